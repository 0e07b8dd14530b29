"""Files of images, deltas and snapshots: their format, reading, writing; and `Delta`."""
