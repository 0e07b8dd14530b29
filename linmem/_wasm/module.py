"""A WebAssembly module: where its sections are, and what the sections declare."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from linmem._wasm.reader import GlobalType, Limits, Malformed, Reader, Unknown, leb128, malformed

(TYPE, IMPORT, FUNCTION, TABLE, MEMORY, GLOBAL, EXPORT, START, ELEMENT, CODE, DATA, DATA_COUNT, TAG) = range(1, 14)
_RANKS = {kind: rank for rank, kind in enumerate((
    TYPE, IMPORT, FUNCTION, TABLE, MEMORY, TAG, GLOBAL, EXPORT, START, ELEMENT, DATA_COUNT, CODE, DATA))}
KINDS = ("function", "table", "memory", "global", "tag")    # of imports and exports, by their codes
_CONTINUATIONS = frozenset((0x68 - 0x80, 0x75 - 0x80))      # heap types: cont, nocont
_OBJECT_TYPE = re.compile(rb"[\x5e\x5f]")                     # the start of an array or structure type there
_CONTINUATION_TYPE = b"\x5d"                                # the start of a continuation type in the type section

_CONSTANT = re.compile(rb"[\x41\x42][\x80-\xff]*[\x00-\x7f]\x0b")     # i32.const or i64.const, and end

# The result of a constant expression: (bits, value modulo 2**bits), (0, index of a function), or None if it depends on
# the instance.
Value = tuple[int, int] | None
NULL = 0, -1        # the Value of a null reference

# The constant instructions of garbage collection, and how many indices follow each. The instructions 0 to 8, which are
# struct.new, array.new and their variants, allocate; the two conversions and ref.i31 do not.
_GC_INDICES = {0: 1, 1: 1, 6: 1, 7: 1, 8: 2, 0x1A: 0, 0x1B: 0, 0x1C: 0}

_ARITHMETIC = {0x6A: (32, operator.add), 0x6B: (32, operator.sub), 0x6C: (32, operator.mul),
               0x7C: (64, operator.add), 0x7D: (64, operator.sub), 0x7E: (64, operator.mul)}


# Instructions that name no table, drop no segment and grow no memory, as a pattern of their bytes. The pattern lacks
# those that have a list of operands: br_table, select with types, and try_table.
_NUMBER = rb"[\x80-\xff]*[\x00-\x7f]"                       # LEB128
_TYPE = rb"\x65?" + _NUMBER                                 # a heap type
_BLOCK = rb"[\x63\x64]?" + _TYPE
_PLACE = (rb"(?:[\x00-\x3f]|[\x80-\xbf]%b|(?:[\x40-\x7f]|[\xc0-\xff]%b)%b)%b" % ((_NUMBER,) * 4))    # in a memory
_PASSED = re.compile(rb"(?:" + rb"|".join((
    rb"[\x07-\x09\x0c\x0d\x10\x12\x14\x15\x18\x20-\x24\x3f\x41\x42\xd2\xd5\xd6]" + _NUMBER,
    rb"[\x00\x01\x05\x0a\x0b\x0f\x19-\x1b\x45-\xc4\xd1\xd3\xd4]",
    rb"[\x28-\x3e]" + _PLACE,
    rb"[\x02-\x04\x06]" + _BLOCK,
    rb"\x43.{4}|\x44.{8}|\xd0" + _TYPE,
    rb"\xfc(?:[\x00-\x07\x13-\x16]|[\x08\x0a]%b%b|\x0b%b)" % ((_NUMBER,) * 3),
    rb"\xfd(?:[\x00-\x0b\x5c\x5d]%b|[\x0c\x0d].{16}|[\x15-\x22].|[\x54-\x5b]%b."
    rb"|[\x0e-\x14\x23-\x53\x5e-\x7f]|[\x80-\xff]\x01|[\x80-\x93]\x02)" % ((_PLACE,) * 2),
    rb"\xfe(?:[\x00-\x02\x10-\x4e]%b|\x03.)" % _PLACE,
    rb"\xfb(?:[\x00\x01\x06\x07\x0b-\x0e\x10]%b|[\x02-\x05\x08-\x0a\x11-\x13]%b%b"
    rb"|[\x0f\x1a-\x1e]|[\x14-\x17]%b|[\x18\x19].%b%b%b)" % ((_NUMBER,) * 3 + (_TYPE, _NUMBER, _TYPE, _TYPE)),
)) + rb"){1,500}", re.DOTALL)
_BLOCK_TYPE = re.compile(_BLOCK)
MEMORY_GROW, _DATA_DROP, _ELEMENT_DROP = 0x40, 0xFC09, 0xFC0D
# The operands of other instructions. "w": a table that is changed, "r": one that is not, "-": an index of no table.
_OPERANDS = {MEMORY_GROW: "-", _DATA_DROP: "-", _ELEMENT_DROP: "-", 0x11: "-r", 0x13: "-r", 0x25: "r", 0x26: "w",
             0xFC0C: "-w", 0xFC0E: "wr", 0xFC0F: "w", 0xFC10: "r", 0xFC11: "w"}
# The instructions that change one of the first tables (%02x: the last one, at most 127) or drop a segment have bytes of
# this form.
_EFFECT = rb"\x26[\x00-\x%02x\x80-\xff]|\xfc[\x09\x0c-\x0f\x11\x89\x8c-\x8f\x91]"
# The instructions that name one table (%b: its number): table.get, table.set, two calls, and table.init to table.fill.
_TABLE_USE = rb"(?:[\x25\x26]|[\x11\x13]%b|\xfc(?:[\x0c\x0e-\x11]|[\x8c\x8e-\x91]\x80*\x00)(?:%b)?)%%b" % (
    (_NUMBER,) * 2)


class Effects(NamedTuple):
    tables: set[int]        # that code may change
    used: set[int]          # tables that any instruction names
    drops: set[str]         # the kinds of segments that code may drop: "data", "element"


class ElementSegment(NamedTuple):
    mode: str           # "active", "passive" or "declared"
    table: int
    offset: Value
    elements: list[Value]
    allocates: bool     # one of the elements is an expression that allocates
    start: int
    end: int
    element_type: bytes | None      # None: the elements are indices of functions, not expressions
    is_constant: bool   # the offset is a single constant


class DataSegment(NamedTuple):
    number: int
    start: int
    head: int           # where the flags, the memory and the offset end
    content: int
    size: int           # of the content
    end: int
    active: bool
    memory: int
    offset: Value
    is_constant: bool   # the offset is a single constant


_T = TypeVar("_T")


class _Lazy(Generic[_T]):
    """A `functools.cached_property` without a lock, so two threads may both compute a value.

    Before CPython 3.12, a cached_property has one lock for all objects of the class. The lock would stay locked in a
    child that is forked while another thread computes a value.
    """

    def __init__(self, compute: Callable[[Any], _T]) -> None:
        self._compute = compute

    def __get__(self, module: Module | None, kind: object) -> _T:
        if module is None:
            return self         # type: ignore[return-value]
        found: _T = vars(module).setdefault(self._compute.__name__, self._compute(module))
        return found


class Module:
    """The places of the sections. The methods read a section at each call, the properties once."""

    def __init__(self, wasm: bytes) -> None:
        self.wasm = bytes(wasm)

    @classmethod
    def of(cls, wasm: bytes | Module) -> Module:
        return wasm if isinstance(wasm, Module) else cls(wasm)

    @_Lazy
    def sections(self) -> dict[int, tuple[int, int, int]]:
        """From the kind of a section to where the section starts, where its content starts, and where both end."""
        wasm = self.wasm
        if wasm[:4] != b"\0asm":
            raise Malformed("not a wasm module in the binary format: it does not start with \\0asm"
                            " (wasmtime.wat2wasm makes it from text)")
        if wasm[4:8] != b"\1\0\0\0":
            if len(wasm) >= 8 and wasm[6:8] == b"\1\0":
                raise Malformed("a WebAssembly component, not a core module: components own no memories, the core"
                                " modules inside them do")
            raise malformed(4, f"unknown version {wasm[4:8].hex()}" if len(wasm) >= 8 else "version ends too early")
        found: dict[int, tuple[int, int, int]] = {}
        reader = Reader(wasm, 8, len(wasm))
        rank = -1
        while reader.at < reader.end:
            start = reader.at
            kind = reader.byte("section")
            size = reader.u32("section size")
            content = reader.skip(size, f"section {kind}")
            if kind == 0:
                Reader(wasm, content, reader.at).name("custom section's name")
            elif kind not in _RANKS:
                raise Unknown(f"the section at byte {start} is of kind {kind}")
            elif _RANKS[kind] <= rank:
                raise malformed(start, f"section {kind} stands twice or too late")
            else:
                rank = _RANKS[kind]
                found[kind] = start, content, reader.at
        return found

    def items(self, kind: int, what: str) -> Iterator[Reader]:
        """For each item of a section, a reader that stands at the item; none if there is no such section."""
        if kind in self.sections:
            _, content, end = self.sections[kind]
            yield from Reader(self.wasm, content, end).items(what)

    def replaced(self, kind: int, parts: Iterable[bytes | bytearray | memoryview]) -> bytes:
        """The module with another content of one section. A section that the module lacks is added."""
        if kind in self.sections:
            start, _, end = self.sections[kind]
        else:
            start = end = max((end for other, (_, _, end) in self.sections.items() if _RANKS[other] < _RANKS[kind]),
                              default=8)
        parts = list(parts)
        whole = memoryview(self.wasm)
        return b"".join([whole[:start], bytes([kind]), leb128(sum(map(len, parts))), *parts, whole[end:]])

    def imports(self) -> tuple[list[Limits], list[Limits], list[GlobalType]]:
        """Memories, tables, and globals."""
        found = self.all_imports()
        return found["memory"], found["table"], found["global"]

    def all_imports(self) -> dict[str, list[Any]]:
        """The types of the imports of each kind; of a function, the index of its type."""
        read: dict[str, Callable[[Reader], Any]] = {
            "function": lambda reader: reader.u32("type index"), "table": Reader.table_type,
            "memory": Reader.memory_type, "global": Reader.global_type,
            "tag": lambda reader: (reader.byte("tag's attribute"), reader.u32("type index"))}
        found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        for reader in self.items(IMPORT, "imports"):
            reader.name("import's module")
            reader.name("import's name")
            start = reader.at
            code = reader.byte("import's kind")
            if code >= len(KINDS):
                raise Unknown(f"the import at byte {start} is of kind 0x{code:02x}")
            found[KINDS[code]].append(read[KINDS[code]](reader))
        return found

    def types(self) -> Iterator[list[str]]:
        """For each type its parameters, as `Reader.composite_type` names them. A recursion group is not a type, its
        members are."""
        for reader in self.items(TYPE, "types"):
            is_group = self.wasm.startswith(b"\x4e", reader.at, reader.end)
            reader.at += is_group
            for _ in range(reader.u32("number of types") if is_group else 1):
                yield reader.composite_type()

    def parameters(self, name: str) -> list[str]:
        """The types of the parameters of the exported function: names of numbers, and "" for a reference."""
        index = next((index for exported, code, index in self.exports() if exported == name and code == 0), None)
        if index is None:
            raise Unknown(f"no function {name} is exported")
        types = [*self.all_imports()["function"],
                 *(reader.u32("type index") for reader in self.items(FUNCTION, "functions"))]
        return list(self.types())[types[index]]

    def memories(self) -> list[Limits]:
        return [reader.memory_type() for reader in self.items(MEMORY, "memories")]

    def tables(self, imported: list[Limits]) -> tuple[list[Limits], list[Value]]:
        """The type and the initial value of the elements (imports: None) of each table, imports included."""
        found = list(imported)
        initial: list[Value] = [None] * len(imported)
        for reader in self.items(TABLE, "tables"):
            has_initial_value = self.wasm.startswith(b"\x40\x00", reader.at, reader.end)
            if has_initial_value:
                reader.at += 2
            found.append(reader.table_type())
            initial.append(self.expression(reader, [])[0] if has_initial_value else NULL)
        return found, initial

    def globals(self, imported: list[GlobalType]) -> tuple[list[Value], list[GlobalType], list[Value]]:
        """The value (None if it is not a constant), the type and the initial value of each global, imports included."""
        values: list[Value] = [None] * len(imported)
        initial = list(values)
        types = list(imported)
        for reader in self.items(GLOBAL, "globals"):
            types.append(reader.global_type())
            initial.append(self.expression(reader, values)[0])
            values.append(None if types[-1].mutable else initial[-1])
        return values, types, initial

    def holds_continuations(self, heap_type: int | None) -> bool:
        """Whether references of a heap type may be continuations.

        The result is also True if the type section has a byte that only looks like the start of such a type.
        """
        if heap_type is None or heap_type < 0:
            return heap_type in _CONTINUATIONS
        start, _, end = self.sections.get(TYPE, (0, 0, 0))
        return self.wasm.find(_CONTINUATION_TYPE, start, end) >= 0

    def makes_objects(self) -> bool:
        """Whether the module may make objects in the GC heap: it has types of structures or arrays.

        The result is also True if the type section has a byte that only looks like the start of such a type.
        """
        first = next(self.items(TYPE, "types"), None)       # behind the number of types
        return first is not None and _OBJECT_TYPE.search(self.wasm, first.at, first.end) is not None

    def effects(self, tables: int) -> Effects:
        """What the code changes beside memories and globals; everything if an instruction is not known."""
        found = self._search(_EFFECT % min(max(tables - 1, 0), 0x7F))
        return Effects(set(range(tables)), set(), {"data", "element"}) if found is None else found

    def may_use_table(self, index: int) -> bool:
        """Whether the code has an instruction that names the table, or one that is not known."""
        *first, last = leb128(index)
        number = re.escape(bytes(first)) + rb"(?:\x%02x|\x%02x\x80*\x00)" % (last, last | 0x80)
        found = self._search(_TABLE_USE % number)
        return found is None or index in found.used

    def _search(self, candidates: bytes) -> Effects | None:
        """The effects of each function whose bytes have the pattern somewhere; None: an instruction is not known."""
        found = Effects(set(), set(), set())
        pattern = re.compile(candidates, re.DOTALL)
        if CODE not in self.sections or not pattern.search(self.wasm, *self.sections[CODE][1:]):
            return found
        try:
            for reader in self.items(CODE, "functions"):
                size = reader.u32("size of a function")
                start = reader.skip(size, "function")
                if pattern.search(self.wasm, start, reader.at):
                    self._effects_of(Reader(self.wasm, start, reader.at), found)
        except (Unknown, Malformed):
            return None
        return found

    def _effects_of(self, reader: Reader, found: Effects) -> None:
        for _, code, operands in self.instructions(reader):
            for kind, operand in zip(_OPERANDS[code], operands, strict=True):
                found.used.update([operand] if kind in "rw" else [])
                found.tables.update([operand] if kind == "w" else [])
            if code in (_DATA_DROP, _ELEMENT_DROP):
                found.drops.add("data" if code == _DATA_DROP else "element")

    def instructions(self, reader: Reader) -> Iterator[tuple[int, int, list[int]]]:
        """The instructions of a function that name a table, drop a segment or grow a memory.

        Reads the function from its local variables on. Yields where the instruction starts, its code and its operands.
        Meanwhile the reader stands behind the instruction.
        """
        for _ in range(reader.u32("number of local variables")):
            reader.u32("number of local variables")
            reader.value_type("local variable")
        what = "instruction"
        while reader.at < reader.end:
            passed = _PASSED.match(self.wasm, reader.at, reader.end)
            if passed is not None:
                reader.at = passed.end()
                continue
            start = reader.at
            code = reader.byte(what)
            if code == 0xFC:
                code = 0xFC00 + reader.u32(what)
            if code in _OPERANDS:
                yield start, code, [reader.u32(what) for _ in _OPERANDS[code]]
            elif code == 0x0E:                      # br_table
                for _ in range(reader.u32(what) + 1):
                    reader.u32(what)
            elif code == 0x1C:                      # select with types
                for _ in range(reader.u32(what)):
                    reader.value_type(what)
            elif code == 0x1F:                      # try_table
                block = _BLOCK_TYPE.match(self.wasm, reader.at, reader.end)
                reader.at = reader.end if block is None else block.end()
                for _ in range(reader.u32(what)):
                    catch = reader.byte("catch clause")
                    if catch > 3:
                        raise Unknown(f"the catch clause before byte {reader.at} is of kind {catch}")
                    for _ in range(2 if catch < 2 else 1):
                        reader.u32(what)
            else:
                raise Unknown(f"the {what} at byte {start} is 0x{code:02x}")

    def expression(self, reader: Reader, values: list[Value]) -> tuple[Value, bool]:
        """Read a constant expression: its value if that is known, and whether it allocates."""
        stack: list[Value] = []
        allocates = False
        sound = True        # False: the expression is not valid, or this method does not compute its value
        what = "constant expression"
        while True:
            start = reader.at
            code = reader.byte(what)
            value: Value = None
            if code == 0x0B:
                return (stack[0] if sound and len(stack) == 1 else None), allocates
            if code in (0x41, 0x42):
                bits = 32 if code == 0x41 else 64
                value = bits, reader.integer(bits, what, signed=True) & ((1 << bits) - 1)
            elif code == 0x23:
                index = reader.u32(what)
                sound = sound and index < len(values)
                value = values[index] if sound else None
            elif code in _ARITHMETIC:
                bits, action = _ARITHMETIC[code]
                operands = stack[-2:]
                del stack[-2:]
                sound = sound and len(operands) == 2
                known = [operand[1] for operand in operands if operand is not None and operand[0] == bits]
                if len(known) == 2:
                    value = bits, action(*known) % (1 << bits)
            elif code in (0x43, 0x44):
                reader.skip(4 if code == 0x43 else 8, what)
            elif code == 0xD0:
                reader.heap_type(what)
                value = NULL
            elif code == 0xD2:
                value = 0, reader.u32(what)
            elif code == 0xFD and reader.u32(what) == 12:
                reader.skip(16, what)
            elif code == 0xFB:
                operation = reader.u32(what)
                if operation not in _GC_INDICES:
                    raise Unknown(f"the {what} at byte {start} has an instruction 0xfb {operation}")
                sound = False
                allocates = allocates or operation <= 8
                for _ in range(_GC_INDICES[operation]):
                    reader.u32(what)
            else:
                raise Unknown(f"the {what} at byte {start} has an instruction 0x{code:02x}")
            stack.append(value)

    def exports(self) -> list[tuple[str, int, int]]:
        """The name, the code of the kind, and the index of each export."""
        return [(reader.name("export's name"), reader.byte("export's kind"), reader.u32("export's index"))
                for reader in self.items(EXPORT, "exports")]

    @_Lazy
    def values(self) -> list[Value]:
        """The values of the globals, as `globals` gives them."""
        return self.globals(self.imports()[2])[0]

    @_Lazy
    def elements(self) -> list[ElementSegment]:
        found = []
        for reader in self.items(ELEMENT, "element segments"):
            start = reader.at
            flags = reader.u32("element segment's flags")
            if flags > 7:
                raise malformed(start, f"element segment has flags {flags}")
            mode = "active" if not flags & 1 else "declared" if flags & 2 else "passive"
            table, offset, allocates, is_constant = 0, None, False, False
            if mode == "active":
                if flags & 2:
                    table = reader.u32("table index")
                first = reader.at
                offset, allocates = self.expression(reader, self.values)
                is_constant = _CONSTANT.fullmatch(self.wasm, first, reader.at) is not None
            element_type = b"\x70" if flags & 4 else None
            if flags & 4:
                if flags & 3:
                    first = reader.at
                    reader.reference_type("element type")
                    element_type = self.wasm[first:reader.at]
            elif flags & 3 and reader.byte("element kind") != 0:
                raise Unknown(f"the element segment at byte {start} is not of functions")
            length = reader.u32("number of elements")
            if length > reader.end - reader.at:
                raise malformed(reader.at, f"{length} elements in {reader.end - reader.at} bytes")
            elements: list[Value] = []
            for _ in range(length):
                if flags & 4:
                    element, its_allocates = self.expression(reader, self.values)
                    allocates |= its_allocates
                else:
                    element = 0, reader.u32("function index")
                elements.append(element)
            found.append(ElementSegment(mode, table, offset, elements, allocates, start, reader.at, element_type,
                                        is_constant))
        return found

    @_Lazy
    def data(self) -> list[DataSegment]:
        found = []
        for number, reader in enumerate(self.items(DATA, "data segments")):
            start = reader.at
            flags = reader.u32("data segment's flags")
            if flags > 2:
                raise malformed(start, f"data segment has flags {flags}")
            memory, offset, is_constant = 0, None, False
            if flags == 2:
                memory = reader.u32("memory index")
            if flags != 1:
                first = reader.at
                offset, _ = self.expression(reader, self.values)
                is_constant = _CONSTANT.fullmatch(self.wasm, first, reader.at) is not None
            head = reader.at
            size = reader.u32("data segment's size")
            content = reader.skip(size, "data segment")
            found.append(DataSegment(number, start, head, content, size, reader.at, flags != 1, memory, offset,
                                     is_constant))
        return found
