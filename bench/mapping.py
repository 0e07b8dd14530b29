"""The group "map" of the suite "share": an input that a guest reads, mapped into its memory or copied into it."""

from __future__ import annotations

import linmem
from linmem.bench.engines import LINMEM_PLAIN, MIB, Kept
from linmem.bench.harness import P10, Contender, Goal, Group, Run, Unavailable, clock

INPUT = 64 * MIB
AT = 16 * MIB
# Reads all bytes of the input, eight at a time.
READER = f"""(module
  (memory (export "memory") {(AT + INPUT) // 65536})
  (func (export "sum") (result i64) (local $at i32) (local $sum i64)
    (local.set $at (i32.const {AT}))
    (loop $next
      (local.set $sum (i64.add (local.get $sum) (i64.load (local.get $at))))
      (br_if $next (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 8))) (i32.const {AT + INPUT}))))
    (local.get $sum)))"""


def map_and_read() -> Group:
    return Group(
        "map", "64 MiB of shared pages appear in a guest, which reads all of them",
        (Contender("linmem", "mem.map(offset, shared)", lambda: make_reader("rw")),
         Contender("private", 'mem.map(offset, shared, access="r"), as private to the guest as a copy',
                   lambda: make_reader("r")),
         Contender("copy", "mem.write(offset, shared) into fresh pages", lambda: make_reader(None))),
        (Goal("copy", 0.33, by=P10), Goal("copy", 0.33, ours="private", by=P10)),
        "both sides include the guest's reads, the page faults, and the end: unmap, or discard", share=0.5)


def make_reader(access: str | None) -> Run:
    """access: of the window; None: the bytes are copied."""
    import wasmtime

    kept = Kept(LINMEM_PLAIN)
    try:
        shared = linmem.create(INPUT, creator=linmem.creator("shared"))
    except TypeError as error:
        raise Unavailable(f"a shared memory cannot be made here: {error}") from error
    shared.write(0, bytes(range(1, 256)) * (INPUT // 255) + b"\xff" * (INPUT % 255))
    store = wasmtime.Store(kept.engine)
    exports = wasmtime.Instance(store, wasmtime.Module(kept.engine, READER), []).exports(store)
    mem = linmem.wasmtime.linear_memory(store, exports["memory"])
    read = exports["sum"]
    mem.write(AT, shared)
    expected = read(store)
    mem.discard(AT, INPUT)

    def run(n: int, alive=kept) -> int:
        began = clock()
        for _ in range(n):
            if access:
                mem.map(AT, shared, access=access)
            else:
                mem.write(AT, shared)
            found = read(store)
            if access:
                mem.unmap(AT, INPUT)
            else:
                mem.discard(AT, INPUT)
        took = clock() - began
        if found != expected or mem[AT] != 0:
            raise AssertionError("the guest read other bytes than those of the input")
        return took

    return run
