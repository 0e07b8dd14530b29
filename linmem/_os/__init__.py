"""The page calls: only these modules call the operating system's page functions."""
