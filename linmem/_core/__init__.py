"""The compiled core: memories, images, the pool, adaptors, wasmtime's callbacks, and what all of these share."""
