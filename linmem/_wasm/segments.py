"""Rewrites a WebAssembly module so that its data segments can come from images.

A module's active data segments are copied into its memories at each instantiation. `hoist` takes the bytes out of the
segments and returns them as runs, from which an image is made once. The segments stay, without bytes, so that the
indices of all segments stay valid.

An emptied segment becomes passive if its offset is a single constant. wasmtime compiles no start-up code for such a
segment, so the segment costs no fuel and no check of a deadline. An offset of any other form is not changed, because
only the engine's validation decides whether it is allowed.

Apart from the source of the bytes, an instance of the result behaves as an instance of the original:

- Only segments with these properties are taken: the module defines the memory, the offset is known from the module
  alone, and the segment lies within the minimum of the memory. The memory has exactly its minimum when it is
  instantiated, so such a segment cannot trap, and nothing has written to the memory before.
- The engine drops an active segment after the copy. ``memory.init`` on a dropped segment traps for every size but 0,
  as on an empty segment. ``data.drop`` has no effect on either.
- The order of the writes to a memory stays. If a segment of a memory has to stay, all later segments of that memory
  stay too. Where segments that were taken overlap, the bytes of the later one count.
- The position of each segment is unchanged. Each offset that is not a single constant of the memory's address type is
  unchanged, too. So the result is valid if and only if the original is valid.
- If instantiation fails, no code can read the memories of the failed instance, with one exception: active element
  segments may have put functions into an imported table before the data are copied. In a module with such element
  segments, a segment is taken only if no failure can come before its copy: no segment is taken if an element segment
  may trap; else no segment is taken after the first data segment that may trap. (This rule is stricter than wasmtime,
  whose copy-on-write initialisation shows such a function data that were never copied.)
- No segment is taken after one that is certainly out of bounds: no instance will exist.
"""

from __future__ import annotations

import bisect
from typing import NamedTuple

from linmem._wasm.module import DATA, ELEMENT, START, DataSegment, Module
from linmem._wasm.outline import Outline
from linmem._wasm.reader import Limits, Unknown, leb128

Run = tuple[int, bytearray]


class Hoisted(NamedTuple):
    """The result of `hoist`.

    Attributes
    ----------
    module : bytes
        The module with the hoisted segments emptied; the original if no segment was hoisted.
    images : list
        For each memory that the module defines, the bytes that its hoisted segments write, as sorted runs
        ``(offset, bytes)`` with a gap between each two; None if no segment was hoisted.
    minima : list of int
        For each memory that the module defines, its minimum in bytes.
    skipped : list of str
        Why segments were not hoisted; empty if all were.
    unknown : bool
        The module uses features that are not known here, so nothing was hoisted.
    active : bool
        Whether `module` has active data segments.
    """

    module: bytes
    images: list[tuple[Run, ...] | None]
    minima: list[int]
    skipped: list[str]
    unknown: bool = False
    active: bool = False


def hoist(wasm: bytes | Module) -> Hoisted:
    """Take the active data segments of a module's own memories out of it.

    Parameters
    ----------
    wasm : bytes or Module
        A core module in the binary format.

    Raises
    ------
    Malformed
        If a part that `hoist` must read is malformed (the message has the position), or if `wasm` is a component. The
        other parts are copied without a check: `hoist` does not validate.
    """
    module = Module.of(wasm)
    try:
        return _hoist(module)
    except Unknown as reason:
        return Hoisted(module.wasm, [], [], [f"nothing is hoisted: {reason}"], unknown=True)


def _hoist(module: Module) -> Hoisted:
    memories, imported_tables, _ = module.imports()
    imported = len(memories)
    memories += module.memories()
    minima = [memory.minimum for memory in memories[imported:]]
    unchanged = Hoisted(module.wasm, [None] * len(minima), minima, [])
    if DATA not in module.sections:
        return unchanged
    segments = module.data
    if not any(segment.active for segment in segments):
        return unchanged
    unchanged = unchanged._replace(active=True)

    leaks = False
    if imported_tables:
        leaks, traps = _leaks(module, module.tables(imported_tables)[0], len(imported_tables))
        if leaks and traps:
            return unchanged._replace(skipped=[
                "nothing is hoisted: an element segment may trap after others filled an imported table, through which"
                " the memories of the failed instance can be seen"])

    taken: list[list[tuple[int, DataSegment]]] = [[] for _ in minima]      # (offset, segment), by memory
    hoisted: set[int] = set()       # the numbers of the segments that become empty
    skipped: list[str] = []
    stays: set[int] = set()         # the memories that have a segment which cannot be hoisted
    for segment in segments:
        if not segment.active:
            continue
        if segment.memory >= len(memories):
            skipped.append(f"data segment {segment.number}: there is no memory {segment.memory}")
            break
        memory, is_own = memories[segment.memory], segment.memory >= imported
        offset = segment.offset[1] if segment.offset is not None and segment.offset[0] == memory.bits else None
        if is_own and offset is not None:
            if offset + segment.size > memory.minimum:
                skipped.append(f"data segment {segment.number} and all after it: it does not fit into memory"
                               f" {segment.memory}, so that instantiation traps")
                break
            if segment.size and segment.memory not in stays:
                taken[segment.memory - imported].append((offset, segment))
                hoisted.add(segment.number)
            elif not segment.size and segment.is_constant:
                hoisted.add(segment.number)
            continue
        if segment.memory not in stays:
            stays.add(segment.memory)
            skipped.append(f"data segment {segment.number} and all after it of memory {segment.memory}: " + (
                "its offset is not a constant of the module" if is_own else "the memory is imported"))
        if leaks and (offset is None or offset + segment.size > memory.minimum):
            skipped.append(f"all after data segment {segment.number}: it may trap, and an imported table lets others"
                           " see the memories of the failed instance")
            break
    if not hoisted:
        return unchanged._replace(skipped=skipped)

    whole = memoryview(module.wasm)
    parts: list[bytes | memoryview] = [leb128(len(segments))]
    for segment in segments:
        if segment.number not in hoisted:
            parts.append(whole[segment.start:segment.end])
        elif segment.is_constant:
            parts.append(b"\1\0")            # a passive segment without bytes
        else:
            parts += [whole[segment.start:segment.head], b"\0"]
    images = [_runs(whole, group) if group else None for group in taken]
    return Hoisted(module.replaced(DATA, parts), images, minima, skipped,
                   active=any(each.active and not (each.number in hoisted and each.is_constant) for each in segments))


def without_start(wasm: bytes, outline: Outline) -> bytes:
    """The module without code that runs at instantiation.

    The start function is gone, active data segments are empty and passive, and the element segments that wasmtime
    copies by start-up code are empty and declared. So these memories and tables must get all content in another way.
    wasmtime 50 has start-up code also for passive element segments and for globals that are not a constant. It stays.
    """
    module = Module(wasm)
    data = [b"\1\0" if segment.active else wasm[segment.start:segment.end] for segment in module.data]
    elements = [wasm[segment.start:segment.end] if not outline.is_computed(segment) else
                b"\3\0\0" if segment.element_type is None else b"\7" + segment.element_type + b"\0"
                for segment in module.elements]
    for kind, segments in ((DATA, data), (ELEMENT, elements)):
        if segments:
            module = Module(module.replaced(kind, [leb128(len(segments)), *segments]))
    if START in module.sections:
        start, _, end = module.sections[START]
        return module.wasm[:start] + module.wasm[end:]
    return module.wasm


def _leaks(module: Module, tables: list[Limits], imported: int) -> tuple[bool, bool]:
    """Whether active element segments fill imported tables, and whether an active element segment may trap."""
    leaks = traps = False
    for segment in module.elements:
        if segment.mode != "active":
            continue
        leaks = leaks or segment.table < imported
        table, offset = tables[segment.table] if segment.table < len(tables) else None, segment.offset
        traps = (traps or segment.allocates or table is None or offset is None or offset[0] != table.bits
                 or offset[1] + len(segment.elements) > table.minimum)
    return leaks, traps


def _runs(whole: memoryview, placed: list[tuple[int, DataSegment]]) -> tuple[Run, ...]:
    """The bytes that the segments write at their offsets, as sorted runs with a gap between each two.

    The segments have the order of the module. Where two overlap, the bytes of the later segment count.
    """
    starts: list[int] = []
    ends: list[int] = []
    for offset, segment in sorted(placed):
        if not ends or offset > ends[-1]:
            starts.append(offset)
            ends.append(offset)
        ends[-1] = max(ends[-1], offset + segment.size)
    contents = [bytearray(end - start) for start, end in zip(starts, ends, strict=True)]
    for offset, segment in placed:
        run = bisect.bisect(starts, offset) - 1
        first = offset - starts[run]
        contents[run][first:first + segment.size] = whole[segment.content:segment.end]
    return tuple(zip(starts, contents, strict=True))
