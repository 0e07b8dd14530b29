"""The page floor: the only rooms that may call the operating system's page functions."""
