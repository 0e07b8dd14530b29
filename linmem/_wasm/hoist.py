"""Rewrites wasm modules: data segments into images, hidden state into exports. Floor 0.

A module's active data segments are copied into its memories at each instantiation. `hoist` takes
them out: what they would write becomes runs of bytes, from which an image can be made once, and
the segments stay as empty ones, so that every index keeps its meaning.

An emptied segment becomes a passive one if its offset is a single constant. wasmtime then compiles no
start-up code for it, so it costs no fuel and no deadline. An offset of any other form stays as it is
written, because only validation can say whether the engine allows it.

Why the result cannot be told from the original, apart from where the bytes come from:

- Only segments of memories that the module defines are taken, whose offset is known from the
  module alone and which lie within the memory's minimum. A memory that is being instantiated has
  exactly its minimum, so none of them can trap, and nobody has written to it before.
- An active segment is dropped as soon as it was copied. ``memory.init`` on it traps for every
  size but 0, empty or not, and ``data.drop`` does nothing.
- The order of writes to a memory is kept: once a segment of a memory has to stay, all later ones
  of that memory stay too. Among those that were taken, later ones overwrite earlier ones.
- The place of each segment is untouched, and so is each offset that is not a single constant of the
  type that the memory's addresses have. So a module is valid afterwards if and only if it was before.
- When instantiation fails, nobody can look into the memories of the instance that came to
  nothing, unless it put functions into an imported table first, which active element segments
  do before any data is copied. In a module that has such segments nothing is taken that a failure
  could come before: no data at all if an element segment may trap, and otherwise none after
  the first data segment that may. In every other module the memories of a failed instance are
  unreachable, and what they hold is nobody's business. (This is stricter than wasmtime itself, whose
  copy-on-write initialisation lets such a function see data that was never copied.)
- A segment that is certain to be out of bounds ends it all, since no instance will ever be.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Hoisted", "Malformed", "Outline", "Run", "expose", "hoist", "outline"]

Run = tuple[int, bytes]

(_TYPE, _IMPORT, _FUNCTION, _TABLE, _MEMORY, _GLOBAL, _EXPORT, _START, _ELEMENT, _CODE, _DATA, _COUNT,
 _TAG) = range(1, 14)
_ORDER = {kind: rank for rank, kind in enumerate((
    _TYPE, _IMPORT, _FUNCTION, _TABLE, _MEMORY, _TAG, _GLOBAL, _EXPORT, _START, _ELEMENT, _COUNT, _CODE, _DATA))}
_FUNC_KIND, _TABLE_KIND, _MEMORY_KIND, _GLOBAL_KIND, _TAG_KIND = range(5)
_STATE_KINDS = {"table": _TABLE_KIND, "memory": _MEMORY_KIND, "global": _GLOBAL_KIND}
_NUMBERS = frozenset((0x7F, 0x7E, 0x7D, 0x7C, 0x7B))        # i32, i64, f32, f64, v128
_REFERENCES = frozenset(range(0x68, 0x76))                  # those that are one byte: cont .. nocont
_SHARED = 0x65                                              # before the heap type of shared references
_CONTINUATIONS = frozenset((0x68 - 0x80, 0x75 - 0x80))      # cont, nocont: as signed numbers
_CONTINUATION_TYPE = b"\x5d"                                # begins a continuation type in the type section

_MOST_TABLES = 0x20         # with more tables than this, nobody looks for the code that changes them


@dataclass(frozen=True)
class Hoisted:
    """What `hoist` made.

    Attributes
    ----------
    module : bytes
        The module with the hoisted segments emptied; the original where there are none.
    images : list
        For each memory that the module defines, what its hoisted segments write, as sorted runs
        ``(offset, bytes)`` with a gap between each two; None where nothing was hoisted.
    minima : list of int
        For each memory that the module defines, its minimum in bytes.
    skipped : list of str
        Why segments were left where they are; empty if none was.
    unknown : bool
        The module uses what is not known here, so that nothing can be said about it.
    """

    module: bytes
    images: list[tuple[Run, ...] | None]
    minima: list[int]
    skipped: list[str]
    unknown: bool = False


@dataclass(frozen=True)
class Outline:
    """The state that instances of a module have, and what of it they export.

    Attributes
    ----------
    imported_memories, imported_tables, imported_globals : int
        How many of them are imports: they have the lowest indices.
    memories, tables : int
        How many there are, imports included.
    globals : tuple of bool
        For each global, imports included, whether it is mutable.
    exports : dict
        From (kind, index), with the kinds "memory", "table" and "global", to a name.
    passive : tuple of int
        How many passive data segments and passive element segments an instance can drop.
    changes_tables : bool
        Whether the module's code may change a table. False only if no code of the module can.
    unreadable : frozenset of str
        The exported tables and globals that may hold continuations: wasmtime's C API aborts when they are read.
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
        return [index for index, mutable in enumerate(self.globals)
                if mutable and ("global", index) not in self.exports]

    def hidden_memories(self) -> list[int]:
        """The memories, imports included, that no export names."""
        return [index for index in range(self.memories) if ("memory", index) not in self.exports]

    def hidden_tables(self) -> list[int]:
        """The tables, imports included, that no export names and that anybody can change."""
        return [index for index in range(self.tables) if ("table", index) not in self.exports
                and (self.changes_tables or index < self.imported_tables)]

    def hidden(self) -> list[tuple[str, int, bool]]:
        """Kind, index, and whether it is imported, of all state that no export names."""
        return [*(("memory", index, index < self.imported_memories) for index in self.hidden_memories()),
                *(("table", index, index < self.imported_tables) for index in self.hidden_tables()),
                *(("global", index, index < self.imported_globals) for index in self.hidden_globals())]


def hoist(wasm: bytes) -> Hoisted:
    """Take the active data segments of a module's own memories out of it.

    Parameters
    ----------
    wasm : bytes
        A core module in the binary format.

    Raises
    ------
    Malformed
        If a part that must be understood is malformed, with the offset where, or if `wasm` is a component.
        Other parts are copied as they are: `hoist` does not validate.
    """
    try:
        return _hoist(_Module(wasm))
    except _Unknown as reason:
        return Hoisted(bytes(wasm), [], [], [f"nothing is hoisted: {reason}"], unknown=True)


def outline(wasm: bytes) -> Outline:
    """What state instances of a module have.

    Raises
    ------
    ValueError
        As `hoist`; also if a part of the module is of a kind that is not known here.
    """
    try:
        return _outline(_Module(wasm))
    except _Unknown as reason:
        raise ValueError(f"cannot outline the module: {reason}") from None


def expose(wasm: bytes) -> tuple[bytes, frozenset[str]]:
    """Export the state that a module hides: memories, mutable globals, and tables that can be changed.

    What the module imports and does not export is hidden too.

    Returns
    -------
    wasm : bytes
        The module with those exports added after its own.
    names : frozenset of str
        The names that were added.

    Raises
    ------
    ValueError
        As `outline`.
    """
    try:
        module = _Module(wasm)
        found = _outline(module)
        taken = {name for name, _, _ in module.exports()}
    except _Unknown as reason:
        raise ValueError(f"cannot expose what the module hides: {reason}") from None
    prefix = "linmem"
    while any(name.startswith(prefix) for name in taken):
        prefix += "-"
    wanted = [(kind, _STATE_KINDS[kind], index) for kind, index, _ in found.hidden()]
    if not wanted:
        return module.wasm, frozenset()
    section = module.sections.get(_EXPORT)
    old = b""
    count = 0
    if section is not None:
        reader = module.reader(_EXPORT)
        count = reader.u32("number of exports")
        old = module.wasm[reader.at:reader.end]
    parts, names = [_leb(count + len(wanted)), old], []
    for kind, code, index in wanted:
        names.append(f"{prefix}:{kind}:{index}")
        name = names[-1].encode()
        parts += [_leb(len(name)), name, bytes([code]), _leb(index)]
    return module.replaced(_EXPORT, parts), frozenset(names)


# -- reading ---------------------------------------------------------------------------------------


class _Unknown(Exception):
    """Well-formed as far as one can tell, but of a kind that came after this code."""


class Malformed(ValueError):
    """Bytes that no engine takes for a wasm module."""


def _malformed(at: int, what: str) -> Malformed:
    return Malformed(f"wasm module is malformed at byte {at}: {what}")


class _Reader:
    """Reads `data` from `at` and never past `end`."""

    __slots__ = ("at", "data", "end")

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def byte(self, what: str) -> int:
        if self.at >= self.end:
            raise _malformed(self.at, f"{what} ends too early")
        self.at += 1
        return self.data[self.at - 1]

    def skip(self, size: int, what: str) -> int:
        """Step over `size` bytes; where they start."""
        if size > self.end - self.at:
            raise _malformed(self.at, f"{what} of {size} bytes, {self.end - self.at} are left")
        self.at += size
        return self.at - size

    def unsigned(self, bits: int, what: str) -> int:
        start, value, shift = self.at, 0, 0
        while True:
            byte = self.byte(what)
            value |= (byte & 0x7F) << shift
            if value >> bits:
                raise _malformed(start, f"{what} has more than {bits} bits")
            if byte < 0x80:
                return value
            shift += 7
            if shift >= bits:
                raise _malformed(start, f"{what} has more bytes than a number of {bits} bits")

    def u32(self, what: str) -> int:
        return self.unsigned(32, what)

    def signed(self, bits: int, what: str) -> int:
        start, value, shift = self.at, 0, 0
        while True:
            byte = self.byte(what)
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift >= bits:
                raise _malformed(start, f"{what} has more bytes than a number of {bits} bits")
        if byte & 0x40:
            value -= 1 << shift
        if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
            raise _malformed(start, f"{what} has more than {bits} bits")
        return value

    def name(self, what: str) -> str:
        size = self.u32(what)
        start = self.skip(size, what)
        try:
            return str(self.data[start:start + size], "utf-8")
        except UnicodeDecodeError:
            raise _malformed(start, f"{what} is not UTF-8") from None

    def items(self, what: str) -> Iterator[int]:
        """The indices of a vector that fills the rest: each must be read before the next is asked for."""
        for index in range(self.u32(f"number of {what}")):
            if self.at >= self.end:
                raise _malformed(self.at, f"{what} end too early")
            yield index
        if self.at != self.end:
            raise _malformed(self.at, f"{self.end - self.at} bytes after the last of the {what}")


def _leb(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _heap_type(reader: _Reader, what: str) -> int:
    """Read one: the index of a type, or a negative number that names an abstract one."""
    start = reader.at
    value = reader.signed(33, what)
    if value == _SHARED - 0x80:
        value = reader.signed(33, what)
    if value < 0 and value + 0x80 not in _REFERENCES:
        raise _Unknown(f"{what} at byte {start} is {value}")
    return value


def _reference_type(reader: _Reader, what: str) -> int:
    """Read one; its heap type."""
    start = reader.at
    first = reader.byte(what)
    if first in _REFERENCES:
        return first - 0x80
    if first == _SHARED:            # short for a nullable reference of a shared type
        reader.at = start
    elif first not in (0x63, 0x64):
        raise _Unknown(f"{what} at byte {start} is 0x{first:02x}")
    return _heap_type(reader, what)


def _value_type(reader: _Reader, what: str) -> int | None:
    """Read one; the heap type of a reference, None for a number."""
    if reader.at < reader.end and reader.data[reader.at] in _NUMBERS:
        reader.at += 1
        return None
    return _reference_type(reader, what)


@dataclass(frozen=True)
class _Limits:
    minimum: int        # of a memory, in bytes
    is_64: bool
    heap_type: int | None = None    # of a table's elements


def _limits(reader: _Reader, what: str, known: int) -> tuple[int, int, bool]:
    """flags, minimum, 64 bits."""
    start = reader.at
    flags = reader.byte(what)
    if flags & ~known:
        raise _Unknown(f"{what} at byte {start} has flags 0x{flags:02x}")
    bits = 64 if flags & 4 else 32
    minimum = reader.unsigned(bits, what)
    if flags & 1:
        reader.unsigned(bits, what)
    return flags, minimum, bits == 64


def _memory_type(reader: _Reader) -> _Limits:
    flags, minimum, is_64 = _limits(reader, "memory type", 0x0F)
    shift = 16
    if flags & 8:
        start = reader.at
        shift = reader.u32("page size")
        if shift > 16:
            raise _Unknown(f"the page size at byte {start} is 2 to the power of {shift}")
    return _Limits(minimum << shift, is_64)


def _table_type(reader: _Reader) -> _Limits:
    heap_type = _reference_type(reader, "table type")
    _, minimum, is_64 = _limits(reader, "table type", 0x07)
    return _Limits(minimum, is_64, heap_type)


# What a constant expression leaves: (bits, value modulo 2^bits), or None if only the instance knows.
_Value = tuple[int, int] | None
# Of a global: whether it is mutable, and the heap type if it is a reference.
_Global = tuple[bool, int | None]

_ARITHMETIC = {0x6A: (32, "add"), 0x6B: (32, "sub"), 0x6C: (32, "mul"),
               0x7C: (64, "add"), 0x7D: (64, "sub"), 0x7E: (64, "mul")}


class _Module:
    """Where the sections of a module are; what they hold is read when asked for."""

    def __init__(self, wasm: bytes) -> None:
        self.wasm = wasm = bytes(wasm)
        if wasm[:4] != b"\0asm":
            raise Malformed("not a wasm module in the binary format: it does not start with \\0asm"
                             " (wasmtime.wat2wasm makes it from text)")
        if wasm[4:8] != b"\1\0\0\0":
            if len(wasm) >= 8 and wasm[6:8] == b"\1\0":
                raise Malformed("a WebAssembly component, not a core module: components own no memories, the core"
                                " modules inside them do")
            raise _malformed(4, f"unknown version {wasm[4:8].hex()}" if len(wasm) >= 8 else "version ends too early")
        self.sections: dict[int, tuple[int, int, int]] = {}     # kind: its first byte, its content, its end
        reader = _Reader(wasm, 8, len(wasm))
        rank = -1
        self.after: dict[int, int] = {}         # rank: the end of the last section up to it
        while reader.at < reader.end:
            start = reader.at
            kind = reader.byte("section")
            size = reader.u32("section size")
            content = reader.skip(size, f"section {kind}")
            if kind == 0:
                _Reader(wasm, content, reader.at).name("custom section's name")
            elif kind in _ORDER:
                if _ORDER[kind] <= rank:
                    raise _malformed(start, f"section {kind} stands twice or too late")
                rank = _ORDER[kind]
                self.sections[kind] = start, content, reader.at
                self.after[rank] = reader.at
            else:
                raise _Unknown(f"the section at byte {start} is of kind {kind}")

    def reader(self, kind: int) -> _Reader:
        _, content, end = self.sections[kind]
        return _Reader(self.wasm, content, end)

    def replaced(self, kind: int, parts: Iterable[bytes | memoryview]) -> bytes:
        """The module with another content of one section, which is added where it is missing."""
        if kind in self.sections:
            start, _, end = self.sections[kind]
        else:
            before = [rank for rank in self.after if rank < _ORDER[kind]]
            start = end = self.after[max(before)] if before else 8
        parts = list(parts)
        whole = memoryview(self.wasm)
        return b"".join([whole[:start], bytes([kind]), _leb(sum(map(len, parts))), *parts, whole[end:]])

    # Each of these reads its section anew; the callers keep what they need.

    def imports(self) -> tuple[list[_Limits], list[_Limits], list[_Global]]:
        """Memories, tables, and globals."""
        memories: list[_Limits] = []
        tables: list[_Limits] = []
        globals: list[_Global] = []
        if _IMPORT not in self.sections:
            return memories, tables, globals
        reader = self.reader(_IMPORT)
        for _ in reader.items("imports"):
            reader.name("import's module")
            reader.name("import's name")
            start = reader.at
            kind = reader.byte("import's kind")
            if kind == _FUNC_KIND:
                reader.u32("type index")
            elif kind == _TABLE_KIND:
                tables.append(_table_type(reader))
            elif kind == _MEMORY_KIND:
                memories.append(_memory_type(reader))
            elif kind == _GLOBAL_KIND:
                globals.append(self._global_type(reader))
            elif kind == _TAG_KIND:
                reader.byte("tag's attribute")
                reader.u32("type index")
            else:
                raise _Unknown(f"the import at byte {start} is of kind 0x{kind:02x}")
        return memories, tables, globals

    def memories(self) -> list[_Limits]:
        if _MEMORY not in self.sections:
            return []
        reader = self.reader(_MEMORY)
        return [_memory_type(reader) for _ in reader.items("memories")]

    def tables(self) -> list[_Limits]:
        found: list[_Limits] = []
        if _TABLE in self.sections:
            reader = self.reader(_TABLE)
            for _ in reader.items("tables"):
                if self.wasm[reader.at:reader.at + 2] == b"\x40\x00" and reader.end - reader.at >= 2:
                    reader.at += 2
                    found.append(_table_type(reader))
                    self.expression(reader, [])
                else:
                    found.append(_table_type(reader))
        return found

    @staticmethod
    def _global_type(reader: _Reader) -> _Global:
        heap_type = _value_type(reader, "global type")
        start = reader.at
        mutable = reader.byte("global type")
        if mutable > 1:
            raise _Unknown(f"the global type at byte {start} has flags 0x{mutable:02x}")
        return mutable == 1, heap_type

    def globals(self, imported: list[_Global]) -> tuple[list[_Value], list[_Global]]:
        """Of each global, imports included: the value if it is a constant, and its type."""
        values: list[_Value] = [None] * len(imported)
        types = list(imported)
        if _GLOBAL in self.sections:
            reader = self.reader(_GLOBAL)
            for _ in reader.items("globals"):
                types.append(self._global_type(reader))
                value, _ = self.expression(reader, values)
                values.append(None if types[-1][0] else value)
        return values, types

    def holds_continuations(self, heap_type: int | None) -> bool:
        """Whether references of a heap type may be continuations. (A byte that looks like such a type will do.)"""
        if heap_type is None or heap_type < 0:
            return heap_type in _CONTINUATIONS
        start, _, end = self.sections.get(_TYPE, (0, 0, 0))
        return self.wasm.find(_CONTINUATION_TYPE, start, end) >= 0

    def changes_tables(self, tables: int) -> bool:
        """Whether the code may change a table: it holds bytes that look like table.set, .init, .copy, .grow or .fill.

        Such bytes may also be part of something else. Numbers may be written with more bytes than they need.
        """
        if _CODE not in self.sections or not tables:
            return False
        if tables > _MOST_TABLES:
            return True
        _, content, end = self.sections[_CODE]
        last = tables - 1
        pattern = (b"\x26(?:[\\x00-\\x%02x]|[\\x80-\\x%02x]\\x80*\\x00)" % (last, 0x80 + last)
                   + rb"|\xfc(?:[\x0c\x0e\x0f\x11]|[\x8c\x8e\x8f\x91]\x80*\x00)")
        return re.compile(pattern).search(self.wasm, content, end) is not None

    def constant(self, reader: _Reader) -> _Value:
        """Read an offset that is a single constant; None, and nothing is read, if it has another form."""
        start = reader.at
        bits = {0x41: 32, 0x42: 64}.get(reader.byte("data segment's offset"))
        if bits is not None:
            value = reader.signed(bits, "data segment's offset")
            if reader.byte("data segment's offset") == 0x0B:
                return bits, value & ((1 << bits) - 1)
        reader.at = start
        return None

    def expression(self, reader: _Reader, values: list[_Value]) -> tuple[_Value, bool]:
        """Read a constant expression: what it leaves where that is known, and whether it allocates."""
        stack: list[_Value] = []
        allocates = False
        sound = True        # else validation will say so, and there is no value
        what = "constant expression"
        while True:
            start = reader.at
            code = reader.byte(what)
            if code == 0x0B:
                return (stack[0] if sound and len(stack) == 1 else None), allocates
            if code == 0x41:
                stack.append((32, reader.signed(32, what) & 0xFFFFFFFF))
            elif code == 0x42:
                stack.append((64, reader.signed(64, what) & 0xFFFFFFFFFFFFFFFF))
            elif code == 0x23:
                index = reader.u32(what)
                sound = sound and index < len(values)
                stack.append(values[index] if sound else None)
            elif code in _ARITHMETIC:
                bits, action = _ARITHMETIC[code]
                operands = stack[-2:]
                sound = sound and len(operands) == 2
                del stack[-2:]
                known = [value for operand in operands if operand is not None for width, value in [operand]
                         if width == bits]
                if len(known) == 2:
                    a, b = known
                    result = a + b if action == "add" else a - b if action == "sub" else a * b
                    stack.append((bits, result % (1 << bits)))
                else:
                    stack.append(None)
            elif code in (0x43, 0x44):
                reader.skip(4 if code == 0x43 else 8, what)
                stack.append(None)
            elif code == 0xD0:
                _heap_type(reader, what)
                stack.append(None)
            elif code == 0xD2:
                reader.u32(what)
                stack.append(None)
            elif code == 0xFD and reader.u32(what) == 12:
                reader.skip(16, what)
                stack.append(None)
            elif code == 0xFB:
                operation = reader.u32(what)
                sound = False       # how much it takes from the stack is in the types
                if operation in (0x1A, 0x1B, 0x1C):     # conversions, ref.i31
                    pass
                elif operation in (0, 1, 6, 7, 8):      # struct.new, array.new and their like
                    allocates = True
                    reader.u32(what)
                    if operation == 8:
                        reader.u32(what)
                else:
                    raise _Unknown(f"the {what} at byte {start} has an instruction 0xfb {operation}")
            else:
                raise _Unknown(f"the {what} at byte {start} has an instruction 0x{code:02x}")

    def exports(self) -> list[tuple[str, int, int]]:
        """Name, kind and index of each."""
        found = []
        if _EXPORT in self.sections:
            reader = self.reader(_EXPORT)
            for _ in reader.items("exports"):
                name = reader.name("export's name")
                kind = reader.byte("export's kind")
                found.append((name, kind, reader.u32("export's index")))
        return found

    def elements(self, values: list[_Value]) -> Iterator[tuple[str, int, _Value, int, bool]]:
        """Of each element segment: mode, table, offset, length, whether making its elements allocates."""
        if _ELEMENT not in self.sections:
            return
        reader = self.reader(_ELEMENT)
        for _ in reader.items("element segments"):
            start = reader.at
            flags = reader.u32("element segment's flags")
            if flags > 7:
                raise _malformed(start, f"element segment has flags {flags}")
            active = not flags & 1
            table, offset, allocates = 0, None, False
            if active:
                if flags & 2:
                    table = reader.u32("table index")
                offset, allocates = self.expression(reader, values)
            if flags & 4:
                if flags & 3:
                    _reference_type(reader, "element type")
            elif flags & 3 and reader.byte("element kind") != 0:
                raise _Unknown(f"the element segment at byte {start} is not of functions")
            count = reader.u32("number of elements")
            if count > reader.end - reader.at:
                raise _malformed(reader.at, f"{count} elements in {reader.end - reader.at} bytes")
            for _ in range(count):
                if flags & 4:
                    _, one = self.expression(reader, values)
                    allocates = allocates or one
                else:
                    reader.u32("function index")
            yield "active" if active else "declared" if flags & 2 else "passive", table, offset, count, allocates

    def data(self, values: list[_Value]) -> Iterator[_Segment]:
        if _DATA not in self.sections:
            return
        reader = self.reader(_DATA)
        for index in reader.items("data segments"):
            start = reader.at
            flags = reader.u32("data segment's flags")
            if flags > 2:
                raise _malformed(start, f"data segment has flags {flags}")
            memory, offset, is_constant = 0, None, False
            if flags == 2:
                memory = reader.u32("memory index")
            if flags != 1:
                offset = self.constant(reader)
                is_constant = offset is not None
                if not is_constant:
                    offset, _ = self.expression(reader, values)
            head = reader.at
            size = reader.u32("data segment's size")
            content = reader.skip(size, "data segment")
            yield _Segment(index, start, head, content, reader.at, flags != 1, memory, offset, is_constant)


class _Segment(NamedTuple):
    number: int
    start: int
    head: int           # past the flags, the memory and the offset
    content: int
    end: int
    active: bool
    memory: int
    offset: _Value
    is_constant: bool   # the offset is a single constant


# -- rewriting -------------------------------------------------------------------------------------


def _outline(module: _Module) -> Outline:
    memories, tables, imported = module.imports()
    counts = len(memories), len(tables), len(imported)
    values, globals = module.globals(imported)
    memories += module.memories()
    tables += module.tables()
    heap_types = {"table": [table.heap_type for table in tables], "global": [heap_type for _, heap_type in globals]}
    kinds = {code: kind for kind, code in _STATE_KINDS.items()}
    exports: dict[tuple[str, int], str] = {}
    unreadable = []
    for name, code, index in module.exports():
        if code in kinds:
            kind = kinds[code]
            exports.setdefault((kind, index), name)
            if any(map(module.holds_continuations, heap_types.get(kind, [])[index:index + 1])):
                unreadable.append(name)
    passive_data = sum(not segment.active for segment in module.data(values))
    passive_elements = sum(mode == "passive" for mode, *_ in module.elements(values))
    return Outline(*counts, len(memories), len(tables), tuple(mutable for mutable, _ in globals), exports,
                   (passive_data, passive_elements), module.changes_tables(len(tables)), frozenset(unreadable))


def _hoist(module: _Module) -> Hoisted:
    imported, imported_tables, imported_globals = module.imports()
    memories = imported + module.memories()
    own = memories[len(imported):]
    minima = [memory.minimum for memory in own]
    unchanged = Hoisted(module.wasm, [None] * len(own), minima, [])
    if _DATA not in module.sections:
        return unchanged
    values, _ = module.globals(imported_globals)
    segments = list(module.data(values))
    if not any(segment.active for segment in segments):
        return unchanged

    leaks = False
    if imported_tables:
        tables = imported_tables + module.tables()
        leaks, traps = _leaks(module, values, tables, len(imported_tables))
        if leaks and traps:
            unchanged.skipped.append("nothing is hoisted: an element segment may trap after others filled an imported"
                                     " table, through which the memories of the failed instance can be seen")
            return unchanged

    taken: list[list[_Segment]] = [[] for _ in own]
    hoisted: set[int] = set()       # segments that write nothing any more
    skipped: list[str] = []
    stays: set[int] = set()         # memories of which a segment had to stay
    for segment in segments:
        if not segment.active:
            continue
        which, size = segment.memory - len(imported), segment.end - segment.content
        if segment.memory >= len(memories):
            skipped.append(f"data segment {segment.number}: there is no memory {segment.memory}")
            break
        place = memories[segment.memory]
        bits = 64 if place.is_64 else 32
        offset = segment.offset[1] if segment.offset is not None and segment.offset[0] == bits else None
        inside = offset is not None and offset + size <= place.minimum
        if offset is not None and not inside and which >= 0:
            skipped.append(f"data segment {segment.number} and all after it: it does not fit into memory"
                           f" {segment.memory}, so that instantiation traps")
            break
        if which >= 0 and inside:
            if size == 0 and segment.is_constant:
                hoisted.add(segment.number)
            elif size and segment.memory not in stays:
                taken[which].append(segment)
                hoisted.add(segment.number)
        elif segment.memory not in stays:
            stays.add(segment.memory)
            skipped.append(f"data segment {segment.number} and all after it of memory {segment.memory}: " + (
                "its offset is not a constant of the module" if which >= 0 else "the memory is imported"))
        if not inside and leaks:
            skipped.append(f"all after data segment {segment.number}: it may trap, and an imported table lets others"
                           " see the memories of the failed instance")
            break
    if not hoisted:
        unchanged.skipped.extend(skipped)
        return unchanged

    whole = memoryview(module.wasm)
    parts: list[bytes | memoryview] = [_leb(len(segments))]
    for segment in segments:
        if segment.number in hoisted and segment.is_constant:
            parts.append(b"\1\0")            # passive, of no bytes
        elif segment.number in hoisted:
            parts += [whole[segment.start:segment.head], b"\0"]
        else:
            parts.append(whole[segment.start:segment.end])
    images = [_runs(whole, group) if group else None for group in taken]
    return Hoisted(module.replaced(_DATA, parts), images, minima, skipped)


def _leaks(module: _Module, values: list[_Value], tables: list[_Limits], imported: int) -> tuple[bool, bool]:
    """Whether active element segments fill imported tables, and whether one of the active ones may trap."""
    leaks = traps = False
    for mode, table, offset, count, allocates in module.elements(values):
        if mode != "active":
            continue
        leaks = leaks or table < imported
        place = tables[table] if table < len(tables) else None
        traps = (traps or allocates or place is None or offset is None or offset[0] != (64 if place.is_64 else 32)
                 or offset[1] + count > place.minimum)
    return leaks, traps


def _runs(whole: memoryview, segments: list[_Segment]) -> tuple[Run, ...]:
    """What the segments write, one after the other, as sorted runs with a gap between each two."""
    placed = [(segment.offset[1], segment) for segment in segments if segment.offset is not None]
    groups: list[tuple[int, int, list[tuple[int, _Segment]]]] = []
    for offset, segment in sorted(placed, key=lambda pair: pair[0]):
        end = offset + segment.end - segment.content
        if groups and offset <= groups[-1][1]:
            start, before, members = groups[-1]
            members.append((offset, segment))
            groups[-1] = start, max(before, end), members
        else:
            groups.append((offset, end, [(offset, segment)]))
    runs = []
    for start, end, members in groups:
        content = bytearray(end - start)
        for offset, segment in sorted(members, key=lambda pair: pair[1].number):
            at = offset - start
            content[at:at + segment.end - segment.content] = whole[segment.content:segment.end]
        runs.append((start, bytes(content)))
    return tuple(runs)
