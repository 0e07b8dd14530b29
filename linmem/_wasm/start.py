"""How instances of one module start from one snapshot: what is checked, offered and written."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

import wasmtime
from wasmtime import _ffi as ffi

from linmem._core import bridge as _bridge
from linmem._core.memory import Image, Memory
from linmem._wasm import cause
from linmem._wasm.instance_state import (
    Parts,
    behind,
    check,
    check_state,
    export,
    grow_table,
    name_of,
    number,
    parts_of,
)
from linmem._wasm.outline import Outline
from linmem._wasm.recording import Recording
from linmem._wasm.state import State
from linmem.errors import GrowError


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
        self.sizes: dict[str, int] = {}     # of memories that are offered and then grown
        offered: list[tuple[int, Image | None] | tuple[int, Image | None, int]] = list(places)
        grown: list[tuple[bytes, int | bytes]] = []
        memories, values = [], []
        self.page_sizes: dict[str, int] = {}        # of memories that are grown and restored
        for memory in state.memories:
            name, kind = name_of(outline, "memory", memory.index), outline.memory_types[memory.index]
            if memory.index < outline.imported_memories or not kind.minimum:
                memories.append(memory)
                self.page_sizes[name] = kind.page_size
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
        self.offer = _bridge.Offer(offered)
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
            begun = time.perf_counter_ns()
            refused = self.grown.apply(address, place)
            if refused is not None:
                self._refuse(*refused, cause.refused_since(begun))
        if self.rest is not None:
            parts = parts_of(store, context, instance, self.outline, self.rest, every_element=False)
            parts.write(context, self._grow(store, context, parts), [held.image for held in parts.memories])
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

    def _refuse(self, index: int, error: int, by_linmem: Exception | None) -> None:
        name = list(self.sizes)[index]
        try:
            _raise(error)
        except wasmtime.WasmtimeError as refusal:
            # The call was not made by wasmtime-py, so `cause` would not find it.
            reason = refusal if by_linmem is None else by_linmem
            raise GrowError(f"memory {name!r} cannot get the {self.sizes[name]} bytes that it has in the snapshot:"
                            f" {reason}") from reason

    def _grow(self, store: Any, context: Any, parts: Parts) -> list[Memory]:
        """Grow the parts of an instance, which were not offered, to their sizes in the snapshot. Returns the memories.

        All checks come first. Then only wasmtime can refuse, if a limit of the store or of a creator forbids a growth.
        """
        memories, deltas = [], []
        for name, memory, size, _ in parts.memories:
            ours = behind(store, memory)
            assert ours is not None     # parts_of has refused other memories
            if ours.info().kind == "file":
                raise ValueError(f"memory {name!r} is a file's, and it is imported or has the minimum 0: the snapshot"
                                 " would overwrite the file")
            memories.append(ours)
            delta, left = divmod(size - ours.byte_size(), self.page_sizes[name])
            if delta < 0 or left:
                raise ValueError(f"memory {name!r} has {ours.byte_size()} bytes and had {size} in the snapshot, and a"
                                 " memory cannot shrink")
            most = ours.maximum_byte_size()         # of an import it may be less than the module's own maximum
            if delta and most is not None and most < size:
                raise GrowError(f"memory {name!r} cannot get the {size} bytes that it has in the snapshot: its maximum"
                                f" is {most}")
            deltas.append(delta)
        present_sizes = [held.table.size(store) for held in parts.tables]
        for held, present in zip(parts.tables, present_sizes, strict=True):
            if present > held.size:
                raise ValueError(f"table {held.name!r} has {present} elements and had {held.size} in the snapshot, and"
                                 " a table cannot shrink")
            most = held.table.type(store).limits.max if present < held.size else None
            if most is not None and most < held.size:
                raise GrowError(f"table {held.name!r} cannot get the {held.size} elements that it has in the snapshot:"
                                f" its maximum is {most}")
        parts.check_values(context)
        for (name, memory, size, _), delta in zip(parts.memories, deltas, strict=True):
            try:
                if delta and isinstance(memory, wasmtime.SharedMemory):
                    memory.grow(delta)
                elif delta and isinstance(memory, wasmtime.Memory):
                    memory.grow(store, delta)
            except wasmtime.WasmtimeError as reason:
                raise GrowError(f"memory {name!r} cannot get the {size} bytes that it has in the snapshot:"
                                f" {reason}") from reason
        for held, present in zip(parts.tables, present_sizes, strict=True):
            if present < held.size:
                # check_state: the state lists all elements beyond the minimum of the table
                refusal = grow_table(context, held.table, held.size - present, dict(held.elements)[present])
                if refusal is not None:
                    raise GrowError(f"table {held.name!r} cannot get the {held.size} elements that it has in the"
                                    f" snapshot: {refusal}") from refusal
        return memories


def _raise(error: int) -> None:
    if not error:
        raise RuntimeError("the instance does not have an export of its module")
    check(ctypes.cast(error, ctypes.POINTER(ffi.wasmtime_error_t)))
