"""A WebAssembly guest whose memory is a file: it goes on where it was, also after a crash.

    pip install 'linmem[wasmtime]'
    python examples/persistent_guest.py FOLDER "buy milk" "call Ann"
    python examples/persistent_guest.py FOLDER

The guest keeps notes in its memory. FOLDER gets two files:

    notes.memory     the memory of the guest, byte by byte. It is the guest's memory while the guest runs.
    notes.snapshot   the guest after its initialisation: its globals and tables, and the bytes of a new memory

The snapshot is written once. Each later start takes the globals and tables from the snapshot and the bytes from the
file, and no code of the guest runs for that. This fits every guest that keeps its state in its memory, as guests of C,
C++ and Rust do between two calls: their stack pointer then has its first value. For a guest with state in globals, save
a new snapshot after each flush().
"""

from __future__ import annotations

import sys
from pathlib import Path

import wasmtime

import linmem
import linmem.wasmtime

# The notes lie one after the other from 1024 on, with a newline after each. `end` is in the memory, at offset 0.
GUEST = """
(module
  (memory (export "memory") 1 256)
  (global $input (export "input") (mut i32) (i32.const 0))
  (data (i32.const 0) "\\00\\04\\00\\00")                    ;; end = 1024
  (func (export "_initialize") (global.set $input (i32.const 64)))
  (func (export "end") (result i32) (i32.load (i32.const 0)))
  (func (export "add") (param $size i32) (local $end i32)
    (local.set $end (i32.add (i32.load (i32.const 0)) (i32.add (local.get $size) (i32.const 1))))
    (if (i32.gt_u (local.get $end) (i32.shl (memory.size) (i32.const 16)))
      (then (if (i32.eq (memory.grow (i32.const 1)) (i32.const -1)) (then unreachable))))
    (memory.copy (i32.load (i32.const 0)) (global.get $input) (local.get $size))
    (i32.store8 (i32.sub (local.get $end) (i32.const 1)) (i32.const 10))
    (i32.store (i32.const 0) (local.get $end))))             ;; the last step: a note is there whole or not at all
"""
MOST = 960              # bytes of a note


def open_guest(folder: Path) -> tuple[wasmtime.Store, wasmtime.Instance, linmem.Memory]:
    """The guest, with the memory in the folder: a new one, or the one that is there."""
    engine = linmem_engine()
    prepared = linmem.wasmtime.prepare(engine, GUEST)
    saved = folder / "notes.snapshot"
    if not saved.exists():
        store = wasmtime.Store(engine)
        first = prepared.instantiate(store)             # in an ordinary memory
        first.exports(store)["_initialize"](store)
        linmem.wasmtime.Snapshot.take(store, first).save(saved)
        store.close()
    start = linmem.wasmtime.Snapshot.open(saved)
    store = wasmtime.Store(engine)
    creator = linmem.creator("file", path=folder / "notes.memory")
    guest = prepared.instantiate(store, start=start, creator=creator)
    return store, guest, linmem.wasmtime.linear_memory(store, guest.exports(store)["memory"])


def linmem_engine() -> wasmtime.Engine:
    config = wasmtime.Config()
    linmem.wasmtime.install(config)
    return wasmtime.Engine(config)


def add(store: wasmtime.Store, guest: wasmtime.Instance, memory: linmem.Memory, note: str) -> None:
    text = note.encode()
    if len(text) > MOST or b"\n" in text:
        raise ValueError(f"a note is one line of at most {MOST} bytes, got {len(text)}")
    parts = guest.exports(store)
    memory.write(parts["input"].value(store), text)
    parts["add"](store, len(text))


def notes(store: wasmtime.Store, guest: wasmtime.Instance, memory: linmem.Memory) -> list[str]:
    end = guest.exports(store)["end"](store)
    return memory.read(1024, end - 1024).decode().splitlines()


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    store, guest, memory = open_guest(folder)
    for note in sys.argv[2:]:
        add(store, guest, memory, note)
    memory.flush()              # from here on the notes are there also if the power fails
    print(*notes(store, guest, memory), sep="\n")


if __name__ == "__main__":
    main()
