"""The compiled core: memories, images, the pool, adaptors and wasmtime's callbacks."""
