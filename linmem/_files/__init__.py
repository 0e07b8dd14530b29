"""Files of images and deltas: their format, reading, writing; and `Delta`."""
