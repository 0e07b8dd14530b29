"""How instances of one module start from one snapshot: what is checked, offered and written."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import wasmtime
from wasmtime import _ffi as ffi

from linmem._core import bridge as _bridge
from linmem._core.memory import Image
from linmem._wasm.instance_state import (
    KINDS,
    HeldTable,
    Parts,
    behind,
    check,
    check_state,
    export,
    handle,
    name_of,
    null,
    number,
    parts_of,
)
from linmem._wasm.outline import Outline
from linmem._wasm.recording import Recording
from linmem._wasm.state import State
from linmem.errors import GrowError

# The kinds of references, and the kind of an abstract heap type; the other heap types are of anyref.
_FUNCREF, _EXTERNREF, _ANYREF, _EXNREF = range(KINDS["funcref"], KINDS["funcref"] + 4)
_ABSTRACT = {0x70 - 0x80: _FUNCREF, 0x73 - 0x80: _FUNCREF, 0x6F - 0x80: _EXTERNREF, 0x72 - 0x80: _EXTERNREF,
             0x69 - 0x80: _EXNREF, 0x74 - 0x80: _EXNREF}


class Start:
    """Checks that a state fits a module, once. `offer` is for the memories of an instance; `finish` does the rest.

    wasmtime asks for a memory of the minimum of its type. The offer makes the memory larger, with the image of the
    snapshot, and wasmtime is told of the minimum. Then wasmtime itself grows the memory, so that the maximum of the
    type and the limits of the store are checked. Two kinds of memories are not offered, but grown and restored:
    imported memories, and memories whose minimum is 0, which cannot be told from the GC heap of a store.
    """

    def __init__(self, outline: Outline, state: State, places: Sequence[tuple[int, Image | None]]) -> None:
        """places: the minimum and the image of each memory of the module's own, for memories that the state lacks."""
        check_state(outline, state)
        self.outline = outline
        self.checked = False                # whether an instance has accepted the values of the rest
        self.sizes: dict[str, int] = {}     # of memories that are offered and then grown
        offered: list[tuple[int, Image | None] | tuple[int, Image | None, int]] = list(places)
        grown: list[tuple[bytes, int | bytes]] = []
        memories, values = [], []
        for memory in state.memories:
            name, kind = name_of(outline, "memory", memory.index), outline.memory_types[memory.index]
            if memory.index < outline.imported_memories or not kind.minimum:
                memories.append(memory)
                continue
            offered[memory.index - outline.imported_memories] = kind.minimum, memory.image, memory.size
            if memory.size > kind.minimum:
                self.sizes[name] = memory.size
                grown.append((name.encode(), (memory.size - kind.minimum) // kind.page_size))
        numbers: list[tuple[bytes, int | bytes]] = []
        for each in state.globals:
            if isinstance(each.value, bytes) and each.index >= outline.imported_globals:
                name = name_of(outline, "global", each.index)
                numbers.append((name.encode(), bytes(number(each.kind, each.value))))
            else:       # the host may give one global to several imports
                values.append(each)
        # The others are as instantiation makes them.
        tables = [table for table in state.tables if table.changed or table.index < outline.imported_tables]
        self.offer = _bridge.Offer(offered) if any(place[1] is not None for place in offered) else None
        self.grown = _bridge.Writes(grown) if grown else None
        self.numbers = _bridge.Writes(numbers) if numbers else None
        # The rest, which is slower.
        rest = state._replace(memories=tuple(memories), globals=tuple(values), tables=tuple(tables))
        self.rest = rest if memories or values or tables else None

    def finish(self, store: Any, instance: wasmtime.Instance) -> None:
        """Grow the memories and tables of a new instance, and write the rest of its state. No wasm code runs."""
        context = store._context()
        address = ctypes.addressof(context.contents)
        place = ctypes.addressof(instance._instance)
        if self.grown is not None:
            refused = self.grown.apply(address, place)
            if refused is not None:
                self._refuse(*refused)
        if self.rest is not None:
            parts = self._sized(store, context, instance, self.rest)
            if not self.checked:
                parts.check_values(context)
                self.checked = True
            parts.write(store, context)
        if self.numbers is not None:
            refused = self.numbers.apply(address, place)
            if refused is not None:
                _raise(refused[1])

    def watch(self, store: Any, instance: wasmtime.Instance, recording: Recording) -> None:
        """Have a recording watch the memories of a new instance, before code runs in it."""
        context = store._context()
        known = set()
        for place, memory in enumerate(recording.state.memories):
            found: Any = export(context, instance, name_of(self.outline, "memory", memory.index))
            ours = behind(store, found)
            assert ours is not None     # the memory was offered, or parts_of has found it
            if ours not in known:       # a memory that was imported twice has the image of its first place
                known.add(ours)
                recording.add(place, ours)

    def _refuse(self, index: int, error: int) -> None:
        name = list(self.sizes)[index]
        try:
            _raise(error)
        except wasmtime.WasmtimeError as reason:
            raise GrowError(f"memory {name!r} cannot get the {self.sizes[name]} bytes that it has in the snapshot:"
                            f" {reason}") from reason

    def _sized(self, store: Any, context: Any, instance: wasmtime.Instance, state: State) -> Parts:
        """The parts of the instance that were not offered, grown to their sizes in the snapshot."""
        parts = parts_of(store, context, instance, self.outline, state, every_element=False)
        deltas = []
        for name, memory, size, _ in parts.memories:
            ours = behind(store, memory)
            assert ours is not None     # parts_of has refused other memories
            page = memory.page_size(store) if hasattr(memory, "page_size") else 65536
            delta, left = divmod(size - ours.byte_size(), page)
            if delta < 0 or left:
                raise ValueError(f"memory {name!r} has {ours.byte_size()} bytes and had {size} in the snapshot, and a"
                                 " memory cannot shrink")
            deltas.append(delta)
        for held in parts.tables:
            if held.table.size(store) > held.size:
                raise ValueError(f"table {held.name!r} has {held.table.size(store)} elements and had {held.size} in the"
                                 " snapshot, and a table cannot shrink")
        for (name, memory, size, _), delta in zip(parts.memories, deltas, strict=True):
            try:
                if delta and isinstance(memory, wasmtime.SharedMemory):
                    memory.grow(delta)
                elif delta and isinstance(memory, wasmtime.Memory):
                    memory.grow(store, delta)
            except wasmtime.WasmtimeError as reason:
                raise GrowError(f"memory {name!r} cannot get the {size} bytes that it has in the snapshot:"
                                f" {reason}") from reason
        for held in parts.tables:
            delta = held.size - held.table.size(store)
            if delta:
                _grow_table(context, held, delta, self.outline.table_types[held.index].heap_type)
        return parts


def _raise(error: int) -> None:
    if not error:
        raise RuntimeError("the instance does not have an export of its module")
    check(ctypes.cast(error, ctypes.POINTER(ffi.wasmtime_error_t)))


def _grow_table(context: Any, held: HeldTable, delta: int, heap_type: int | None) -> None:
    """Grow with null references. A table whose type has none gets the value of its first new element everywhere: the
    state of such a table lists all new elements. A heap type that has an index is a type of functions or of objects."""
    kinds = (_FUNCREF, _ANYREF) if heap_type is None or heap_type >= 0 else (_ABSTRACT.get(heap_type, _ANYREF),)
    first = [value for index, value in held.elements if index == held.size - delta and value is not None]
    for value in [*map(null, kinds), *first]:
        before = ctypes.c_uint64()
        error = ffi.wasmtime_table_grow(context, handle(held.table), delta, ctypes.byref(value), ctypes.byref(before))
        if not error:
            return
        reason = wasmtime.WasmtimeError._from_ptr(error)
    raise GrowError(f"table {held.name!r} cannot get the {held.size} elements that it has in the snapshot: {reason}")
