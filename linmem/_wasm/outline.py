"""The state that the instances of a module have, and how to export the state that the module hides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from linmem._wasm.module import EXPORT, KINDS, Module
from linmem._wasm.reader import Unknown, leb128


class Outline(NamedTuple):
    """The state that the instances of a module have, and the part of the state that they export.

    Attributes
    ----------
    imported_memories, imported_tables, imported_globals : int
        How many memories, tables and globals are imports. Imports have the lowest indices.
    memories, tables : int
        How many memories and tables the instances have, imports included.
    globals : tuple of bool
        For each global, imports included, whether it is mutable.
    exports : dict
        From (kind, index), with the kinds "memory", "table" and "global", to a name.
    passive : tuple of int
        How many passive data segments and passive element segments an instance can drop.
    changes_tables : bool
        Whether the code of the module may change a table. False only if the code certainly cannot.
    unreadable : frozenset of str
        The exported tables and globals that may hold continuations. wasmtime's C API aborts when it reads one.
    """

    imported_memories: int
    imported_tables: int
    imported_globals: int
    memories: int
    tables: int
    globals: tuple[bool, ...]
    exports: dict[tuple[str, int], str]
    passive: tuple[int, int]
    changes_tables: bool
    unreadable: frozenset[str]

    def hidden_globals(self) -> list[int]:
        """The mutable globals, imports included, that no export names."""
        return self._without_name("global", (index for index, mutable in enumerate(self.globals) if mutable))

    def hidden_memories(self) -> list[int]:
        """The memories, imports included, that no export names."""
        return self._without_name("memory", range(self.memories))

    def hidden_tables(self) -> list[int]:
        """The tables, imports included, that no export names and that the module or its host can change."""
        return self._without_name("table", range(self.tables if self.changes_tables else self.imported_tables))

    def _without_name(self, kind: str, indices: Iterable[int]) -> list[int]:
        return [index for index in indices if (kind, index) not in self.exports]

    def hidden(self) -> list[tuple[str, int, bool]]:
        """All state that no export names: the kind, the index, and whether the state is imported."""
        return [(kind, index, index < imported) for kind, imported, indices in (
            ("memory", self.imported_memories, self.hidden_memories()),
            ("table", self.imported_tables, self.hidden_tables()),
            ("global", self.imported_globals, self.hidden_globals())) for index in indices]


def outline(wasm: bytes) -> Outline:
    """The state that instances of a module have.

    Raises
    ------
    ValueError
        As for `segments.hoist`; also if a part of the module is of a kind that is not known here.
    """
    try:
        return _outline(Module(wasm))
    except Unknown as reason:
        raise ValueError(f"cannot outline the module: {reason}") from None


def _outline(module: Module) -> Outline:
    memories, tables, imported = module.imports()
    counts = len(memories), len(tables), len(imported)
    values, globals = module.globals(imported)
    memories += module.memories()
    tables += module.tables()
    heap_types = {"table": [table.heap_type for table in tables], "global": [each.heap_type for each in globals]}
    exports: dict[tuple[str, int], str] = {}
    unreadable = []
    for name, code, index in module.exports():
        kind = KINDS[code] if code < len(KINDS) else ""
        if kind in ("memory", "table", "global"):
            exports.setdefault((kind, index), name)
            if any(map(module.holds_continuations, heap_types.get(kind, [])[index:index + 1])):
                unreadable.append(name)
    passive_data = sum(not segment.active for segment in module.data(values))
    passive_elements = sum(segment.mode == "passive" for segment in module.elements(values))
    return Outline(*counts, len(memories), len(tables), tuple(each.mutable for each in globals), exports,
                   (passive_data, passive_elements), module.changes_tables(len(tables)), frozenset(unreadable))


def expose(wasm: bytes) -> tuple[bytes, frozenset[str]]:
    """Export the state that a module hides: memories, mutable globals, and tables that can be changed.

    State that the module imports and does not export is hidden, too.

    Returns
    -------
    wasm : bytes
        The module with those exports added after its own.
    names : frozenset of str
        The names that were added.

    Raises
    ------
    ValueError
        As for `outline`.
    """
    try:
        module = Module(wasm)
        hidden = _outline(module).hidden()
        exports = module.exports()
    except Unknown as reason:
        raise ValueError(f"cannot expose what the module hides: {reason}") from None
    if not hidden:
        return module.wasm, frozenset()
    prefix = "linmem"
    while any(name.startswith(prefix) for name, _, _ in exports):
        prefix += "-"
    added = [(f"{prefix}:{kind}:{index}", KINDS.index(kind), index) for kind, index, _ in hidden]
    own = next((module.wasm[reader.at:reader.end] for reader in module.items(EXPORT, "exports")), b"")
    parts = [leb128(len(exports) + len(added)), own]
    for name, code, index in added:
        parts += [leb128(len(name.encode())), name.encode(), bytes([code]), leb128(index)]
    return module.replaced(EXPORT, parts), frozenset(name for name, _, _ in added)
