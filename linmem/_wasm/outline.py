"""The state that the instances of a module have, and how to export the state that the module hides."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from linmem._wasm.module import (
    ELEMENT,
    EXPORT,
    KINDS,
    NULL,
    TABLE,
    ElementSegment,
    Module,
    Value,
)
from linmem._wasm.reader import GlobalType, Limits, Reader, Unknown, leb128
from linmem._wasm.state import Reference

_MOST_ELEMENTS = 1 << 20        # of a table whose content wasmtime computes when it compiles the module
_FUNCTION_TABLE = re.compile("linmem-*:elements")


class Outline(NamedTuple):
    """The state that the instances of a module have, and the part of the state that they export.

    The table of functions that `expose` adds, and its element segment, are not counted.

    Attributes
    ----------
    imported_memories, imported_tables, imported_globals : int
        How many memories, tables and globals are imports. Imports have the lowest indices.
    memories, tables : int
        How many memories and tables the instances have, imports included.
    exports : dict
        From (kind, index), with the kinds "memory", "table" and "global", to a name.
    names : tuple of (str, str, int)
        The name, the kind and the index of each export of a memory, a table or a global.
    passive : tuple of int
        How many passive data segments and passive element segments have content that an instance can drop.
    drops : frozenset of str
        The kinds of segments, "data" and "element", that the code may drop.
    written_tables : frozenset of int
        The tables that the code may change. If the code has an instruction that is not known here: all tables.
    unreadable : frozenset of str
        The exported tables and globals that may hold continuations. wasmtime's C API aborts when it reads one.
    memory_types, table_types : tuple of Limits
    global_types : tuple of GlobalType
    segments : tuple of ElementSegment
    initial : tuple of Value
        What instantiation puts into each element of each table before it copies the segments.
    functions : dict
        Each function that can be named in every instance, with its name. The table of functions has them in this order.
    function_table : str
        The export of the table of functions; "" if there is none.
    function_exports : tuple of str
        The names of the exported functions.
    makes_objects : bool
        Whether the code may make objects in the GC heap of the store.
    """

    imported_memories: int
    imported_tables: int
    imported_globals: int
    memories: int
    tables: int
    exports: dict[tuple[str, int], str]
    names: tuple[tuple[str, str, int], ...]
    passive: tuple[int, int]
    drops: frozenset[str]
    written_tables: frozenset[int]
    unreadable: frozenset[str]
    memory_types: tuple[Limits, ...]
    table_types: tuple[Limits, ...]
    global_types: tuple[GlobalType, ...]
    segments: tuple[ElementSegment, ...]
    initial: tuple[Value, ...]
    functions: dict[int, Reference]
    function_table: str
    function_exports: tuple[str, ...]
    makes_objects: bool

    def hidden_globals(self) -> list[int]:
        """The mutable globals, imports included, that no export names."""
        return self._without_name("global", (index for index, each in enumerate(self.global_types) if each.mutable))

    def hidden_memories(self) -> list[int]:
        """The memories, imports included, that no export names."""
        return self._without_name("memory", range(self.memories))

    def hidden_tables(self) -> list[int]:
        """The tables, imports included, that no export names and that the module or its host can change."""
        return self._without_name("table", sorted({*range(self.imported_tables), *self.written_tables}))

    def _without_name(self, kind: str, indices: Iterable[int]) -> list[int]:
        return [index for index in indices if (kind, index) not in self.exports]

    def hidden(self) -> list[tuple[str, int, bool]]:
        """All state that no export names: the kind, the index, and whether the state is imported."""
        return [(kind, index, index < imported) for kind, imported, indices in (
            ("memory", self.imported_memories, self.hidden_memories()),
            ("table", self.imported_tables, self.hidden_tables()),
            ("global", self.imported_globals, self.hidden_globals())) for index in indices]

    def needs_functions(self) -> bool:
        """Whether the state has references, which name functions: in a table that can change, or in a global."""
        return bool(self.imported_tables or self.written_tables or self.computed_tables()
                    or any(kind == "table" for _, kind, _ in self.names)
                    or any(each.mutable and not each.number for each in self.global_types))

    def computed_tables(self) -> set[int]:
        """The tables that instantiation fills with code: wasmtime's own start-up code, which costs fuel."""
        return {segment.table for segment in self.segments if self.is_computed(segment)}

    def is_computed(self, segment: ElementSegment) -> bool:
        """Whether wasmtime copies the segment by start-up code; all other active segments are part of the module.

        wasmtime 50 has no code for indices of functions at a constant place of a table that the module defines. It has
        code for every segment behind one with code.
        """
        if segment.mode != "active" or segment.table >= self.tables:        # the table of functions
            return False
        if segment.table < self.imported_tables:
            return True
        end = (segment.offset or (0, 0))[1] + len(segment.elements)
        return not (segment.element_type is None and segment.is_constant
                    and end <= min(self.table_types[segment.table].minimum, _MOST_ELEMENTS)
                    and _function(self.initial[segment.table]) is not None)

    def contents(self, table: int) -> list[int | None]:
        """The function that instantiation puts into each element of a table; -1: null, None: not known.

        The list has the minimum of the table. It is empty for an imported table, of which nothing is known.
        """
        if table < self.imported_tables:
            return []
        found = [_function(self.initial[table])] * self.table_types[table].minimum
        for segment in self.segments:
            if segment.mode == "active" and segment.table == table:
                if segment.offset is None or self.is_computed(segment):
                    return [None] * len(found)
                start = segment.offset[1]
                found[start:start + len(segment.elements)] = map(_function, segment.elements)
        return found


def _function(value: Value) -> int | None:
    """The function that the Value of an element is; -1: null, None: not known."""
    return value[1] if value is not None and value[0] == 0 else None


def outline(wasm: bytes | Module) -> Outline:
    """The state that instances of a module have.

    Raises
    ------
    ValueError
        As for `segments.hoist`; also if a part of the module is of a kind that is not known here.
    """
    try:
        return _outline(Module.of(wasm))
    except Unknown as reason:
        raise ValueError(f"cannot outline the module: {reason}") from None


def _outline(module: Module) -> Outline:
    memories, imported_tables, imported = module.imports()
    counts = len(memories), len(imported_tables), len(imported)
    _, globals, initial_globals = module.globals(imported)
    memories += module.memories()
    tables, initial = module.tables(imported_tables)
    segments = list(module.elements)
    effects = module.effects(len(tables))
    functions, function_table = _functions(segments, initial, initial_globals), ""
    exports = module.exports()
    last = len(tables) - 1
    for name, code, index in exports:
        if KINDS[code:code + 1] == ("table",) and index == last and _FUNCTION_TABLE.fullmatch(name) and segments:
            known = _functions(segments[:-1], initial[:-1], initial_globals)
            segment = segments[-1]
            if segment[:3] == ("active", last, (32, 0)) and segment.elements == [(0, each) for each in known]:
                functions, function_table = known, name
                del tables[-1], initial[-1], segments[-1]
    names = tuple((name, KINDS[code], index) for name, code, index in exports
                  if KINDS[code:code + 1] in (("memory",), ("table",), ("global",)) and name != function_table)
    passive_data = sum(not segment.active and segment.size > 0 for segment in module.data)
    passive_elements = sum(segment.mode == "passive" and bool(segment.elements) for segment in segments)
    found = Outline(
        *counts, len(memories), len(tables), {}, (), (passive_data, passive_elements), frozenset(effects.drops),
        frozenset(effects.tables), frozenset(),
        tuple(memories), tuple(tables), tuple(globals), tuple(segments), tuple(initial), functions, function_table,
        tuple(name for name, code, _ in exports if code == 0), module.makes_objects())
    return _with_names(module, found, names)


def _with_names(module: Module, found: Outline, names: tuple[tuple[str, str, int], ...]) -> Outline:
    """The outline of a module with these exports of memories, tables and globals."""
    types: dict[str, tuple[Limits | GlobalType, ...]] = {"table": found.table_types, "global": found.global_types}
    return found._replace(
        exports={(kind, index): name for name, kind, index in reversed(names)}, names=names,
        unreadable=frozenset(name for name, kind, index in names for each in types.get(kind, ())[index:index + 1]
                             if module.holds_continuations(each.heap_type)))


def _functions(segments: Iterable[ElementSegment], *initial: Iterable[Value]) -> dict[int, Reference]:
    """The functions in element segments, and in the initial values of tables and then of globals, each by one name.

    An initial value is named as if it were an element segment behind the others.
    """
    places = [segment.elements for segment in segments] + [[value] for values in initial for value in values]
    found: dict[int, Reference] = {}
    for number, elements in enumerate(places):
        for index, value in enumerate(elements):
            if value is not None and value[0] == 0 and value != NULL:
                found.setdefault(value[1], Reference("element", segment=number, index=index))
    return found


def additions(module: Module) -> tuple[dict[int, list[bytes]], frozenset[str], Outline]:
    """What exports the state that a module hides: memories, mutable globals, and tables that can be changed.

    Returns items by the kind of their section, the names of the exports, and the outline of the module with them. State
    that the module imports and does not export is hidden, too. If the state has references, a table is added that no
    code changes. It has each function that is an element or an initial value, so that references can be named.

    The element segments of the outline have the places that they have in the module without the items.

    Raises
    ------
    ValueError
        As for `outline`.
    """
    try:
        found = _outline(module)
        exports = module.exports()
    except Unknown as reason:
        raise ValueError(f"cannot expose what the module hides: {reason}") from None
    prefix = "linmem"
    while any(name.startswith(prefix) for name, _, _ in exports):
        prefix += "-"
    hidden = [(kind, index) for kind, index, _ in found.hidden()]
    hidden += [("table", index) for index in sorted(found.computed_tables()) if ("table", index) not in found.exports]
    added = [(f"{prefix}:{kind}:{index}", KINDS.index(kind), index) for kind, index in dict.fromkeys(hidden)]
    found = _with_names(module, found, (*found.names, *((name, KINDS[code], index) for name, code, index in added)))
    items = {}
    if _takes_function_table(module, found):
        found = found._replace(function_table=f"{prefix}:elements")
        added.append((found.function_table, KINDS.index("table"), found.tables))
        count = leb128(len(found.functions))
        items[TABLE] = [b"\x70\x01" + count + count]
        items[ELEMENT] = [b"".join((
            b"\2", leb128(found.tables), b"\x41\0\x0b\0", count, *map(leb128, found.functions)))]
    if added:
        items[EXPORT] = [b"".join((
            leb128(len(name.encode())), name.encode(), bytes([code]), leb128(index))) for name, code, index in added]
    return items, frozenset(name for name, _, _ in added), found


def _takes_function_table(module: Module, found: Outline) -> bool:
    """Whether the module needs the table of functions, and stays invalid if it wrongly names a table of this number."""
    number = found.tables
    return bool(found.needs_functions() and found.functions and not found.function_table
                and not any(segment.mode == "active" and segment.table == number for segment in found.segments)
                and not any((kind, index) == ("table", number) for _, kind, index in found.names)
                and not module.may_use_table(number))


def extended(wasm: bytes, items: dict[int, list[bytes]]) -> bytes:
    """The module with more items at the end of each of the sections, which are vectors."""
    for kind, more in items.items():
        module = Module(wasm)
        count, own = 0, b""
        if kind in module.sections:
            _, content, end = module.sections[kind]
            reader = Reader(wasm, content, end)
            count = reader.u32("number of items")
            own = wasm[reader.at:end]
        wasm = module.replaced(kind, [leb128(count + len(more)), own, *more])
    return wasm
