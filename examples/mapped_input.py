"""Counts the lines of files in WebAssembly guests, without a copy of a file in the memory of any guest.

    pip install 'linmem[wasmtime]' ziglang
    python -m ziglang cc -target wasm32-wasi -mexec-model=reactor -O2 -o mapped_input.wasm mapped_input.c
    python mapped_input.py mapped_input.wasm FILE...

Each file is read once, into a `linmem.Image`. All guests share the pages of the image. A guest that writes to a page
gets its own copy of that page.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import wasmtime

import linmem
import linmem.wasmtime


class Guest:
    """An instance of mapped_input.c in a store of its own."""

    def __init__(self, engine: wasmtime.Engine, module: wasmtime.Module) -> None:
        self.store = wasmtime.Store(engine)
        self.store.set_wasi(wasmtime.WasiConfig())
        linker = wasmtime.Linker(engine)
        linker.define_wasi()
        self.exports = linker.instantiate(self.store, module).exports(self.store)
        self.call("_initialize")

    def call(self, name: str, *arguments: int) -> int:
        return self.exports[name](self.store, *arguments)

    @contextlib.contextmanager
    def showing(self, source: linmem.Image) -> Iterator[int]:
        """The guest's address of the bytes of the source, which it shows inside of the `with` block."""
        address = self.call("input_room", source.size) & 0xffffffff
        if address == 0:
            raise MemoryError(f"the guest has no room for an input of {source.size} bytes")
        memory = linmem.wasmtime.linear_memory(self.store, self.exports["memory"])
        memory.map(address, source)
        try:
            yield address
        finally:
            memory.unmap(address, -source.size % 65536 + source.size)
            self.call("input_done", address)

    def count_lines(self, source: linmem.Image) -> int:
        with self.showing(source) as address:
            return self.call("count_lines", address, source.size)


def main(program: str, *files: str) -> None:
    config = wasmtime.Config()
    linmem.wasmtime.install(config)
    engine = wasmtime.Engine(config)
    guest = Guest(engine, wasmtime.Module.from_file(engine, program))
    for file in files:
        print(guest.count_lines(linmem.Image.from_bytes(Path(file).read_bytes())), file)


if __name__ == "__main__":
    main(*sys.argv[1:])
