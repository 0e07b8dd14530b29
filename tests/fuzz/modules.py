"""Any bytes as a wasm module: the rewriter and prepare() against wasmtime."""

from __future__ import annotations

import functools
import platform
import sys

from linmem._wasm.growth_traps import with_growth_traps
from linmem._wasm.module import Module
from linmem._wasm.outline import Outline, additions, extended, outline
from linmem._wasm.reader import Malformed, Unknown
from linmem._wasm.segments import hoist

from .choices import Choices

MAGIC = b"\0asm\1\0\0\0"


def expose(wasm):
    """The module with exports of the state that it hides, and the names of these exports."""
    module = Module(wasm)
    items, names, _ = additions(module)
    return extended(module.wasm, items), names


@functools.cache
def engine(ours: bool = False):
    """An engine with all of wasmtime's features, or None if wasmtime is not installed. `ours`: its memories are
    linmem's."""
    try:
        import wasmtime
    except ImportError:
        return None
    config = wasmtime.Config()
    for name in ("memory64", "multi_memory", "threads", "reference_types", "gc", "function_references",
                 "custom_page_sizes", "exceptions", "bulk_memory", "multi_value", "simd", "relaxed_simd", "tail_call",
                 "wide_arithmetic", "stack_switching"):
        # wasmtime supports stack switching on these machines only. Elsewhere wasmtime ends the process if the feature
        # is on.
        if name == "stack_switching" and (sys.platform, platform.machine()) != ("linux", "x86_64"):
            continue
        if hasattr(wasmtime.Config, f"wasm_{name}"):
            setattr(config, f"wasm_{name}", True)
    if ours:
        import linmem.wasmtime

        linmem.wasmtime.install(config, linmem.creator())
    return wasmtime.Engine(config)


def judged(call, *args, **named):
    """The class and the text of a call's exception, without the backtrace; None if the call raises no exception."""
    try:
        call(*args, **named)
    except Exception as error:
        return type(error), str(error).split("Stack backtrace")[0]
    return None


def is_valid(wasm: bytes) -> bool:
    import wasmtime

    try:
        wasmtime.Module.validate(engine(), wasm)
    except wasmtime.WasmtimeError:
        return False
    return True


def contents(wasm: bytes, names, images=()) -> list[bytes] | None:
    """The bytes of the named memories in a new instance; None if the instance cannot be made."""
    import wasmtime

    store = wasmtime.Store(engine())
    store.set_limits(memory_size=1 << 22, table_elements=1000, instances=1, tables=10, memories=10)
    try:
        exports = wasmtime.Instance(store, wasmtime.Module(engine(), wasm), []).exports(store)
    except (wasmtime.WasmtimeError, wasmtime.Trap):
        return None
    found = []
    for name, runs in zip(names, images or [None] * len(names), strict=True):
        memory = exports[name]
        if not isinstance(memory, wasmtime.Memory):
            return None
        now = bytearray(memory.read(store, 0, memory.data_len(store)))
        for offset, data in runs or ():
            assert not any(now[offset:offset + len(data)]), "a hoisted segment was written all the same"
            now[offset:offset + len(data)] = data
        found.append(bytes(now))
    return found


def one(data: bytes) -> None:
    c = Choices(data)
    wasm = (b"" if c.flag() else MAGIC) + c.bytes(1 << 16)
    results = []
    for call in (hoist, outline, expose):
        try:
            results.append(call(wasm))
        except ValueError as error:
            results.append(error)
    hoisted, outlined, exposed = results
    if engine() is None:
        return
    valid = is_valid(wasm)
    import wasmtime

    from linmem.wasmtime import prepare

    expected = judged(wasmtime.Module, engine(True), wasm)
    assert (expected is None) >= valid      # bytes that are not a module may be valid text
    for with_all in (False, True):
        found = judged(prepare, engine(True), wasm, expose=with_all)
        assert found == expected, f"prepare: {found}, wasmtime: {expected}"
    if valid:
        try:
            with_traps = with_growth_traps(Module(wasm))
        except Unknown:
            pass
        else:
            assert is_valid(with_traps)
            judged_with_traps = judged(prepare, engine(True), wasm, trap_on_refused=True)
            assert judged_with_traps is None, f"prepare with traps: {judged_with_traps}"
    else:
        assert judged(prepare, engine(True), wasm, trap_on_refused=True) == expected
    if isinstance(hoisted, ValueError):
        assert not valid, f"refused a module that wasmtime takes: {hoisted}"
        return
    assert not any(isinstance(other, Malformed) for other in (outlined, exposed)) or not valid
    assert is_valid(hoisted.module) == valid
    if hoisted.unknown:
        assert hoisted.module == wasm
        return
    again = hoist(hoisted.module)
    assert again.module == hoisted.module
    assert again.minima == hoisted.minima
    assert not any(again.images)
    for minimum, runs in zip(hoisted.minima, hoisted.images, strict=True):
        end = -1
        for offset, content in runs or ():
            assert offset > end, "runs must have gaps"
            assert content
            end = offset + len(content)
            assert end <= minimum
    if isinstance(exposed, ValueError):
        return
    wider, names = exposed
    assert is_valid(wider) == valid
    if not valid or isinstance(outlined, ValueError):
        return
    known = outline(wider)
    items, _, follows = additions(Module(wasm))
    assert _without_places(follows) == _without_places(known)
    assert extended(hoisted.module, items) == hoist(wider).module
    assert known.hidden_memories() == known.hidden_globals() == []
    assert (known.memories, known.tables, known.global_types) == (
        outlined.memories, outlined.tables, outlined.global_types)
    assert {*known.exports.values(), known.function_table} >= set(names)
    has_start_or_imports = known.imported_memories or known.imported_tables or known.imported_globals
    if not has_start_or_imports and not _starts(wider) and sum(hoisted.minima) <= 1 << 20 and any(hoisted.images):
        own = [known.exports["memory", i] for i in range(known.memories)]
        expected = contents(wider, own)
        if expected is not None:
            assert contents(hoist(wider).module, own, hoisted.images) == expected


def _without_places(known: Outline) -> Outline:
    return known._replace(segments=tuple(segment._replace(start=0, end=0) for segment in known.segments))


def _starts(wasm: bytes) -> bool:
    """Whether a function runs at instantiation. Such a function may write, or never return."""
    at = 8
    while at < len(wasm):
        kind, at, size, shift = wasm[at], at + 1, 0, 0
        while True:
            byte = wasm[at]
            size |= (byte & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if byte < 0x80:
                break
        if kind == 8:
            return True
        at += size
    return False
