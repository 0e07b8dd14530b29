"""WebAssembly: reading and rewriting modules, prepared modules, snapshots of instances."""
