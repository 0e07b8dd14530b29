"""Image files: their format, how they are read, and how a file is written whole or not at all."""
