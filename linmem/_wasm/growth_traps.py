"""Rewrites a WebAssembly module so that a refused `memory.grow` traps.

Each ``memory.grow`` becomes a call of an added function, which grows the memory and executes ``unreachable`` if the
result is -1. There is one such function for each memory that the code grows.

- The added types and functions have the highest indices, so that all other indices stay valid.
- The instructions behind a replaced one move. So the custom sections that name places in the code are left out: debug
  information and branch hints. Names of functions stay.
- A memory never has 2**32 - 1 pages, which would be -1: wasmtime allows a memory with pages of one byte one page less.
- The module must be valid. In a module that names a function which does not exist, the name could become valid.
"""

from __future__ import annotations

import re

from linmem._wasm.module import CODE, FUNCTION, MEMORY_GROW, TYPE, Module
from linmem._wasm.outline import extended
from linmem._wasm.reader import Limits, Reader, leb128

NAME = "memory.grow, which was refused"     # of the added functions, in backtraces

_CALL = b"\x10"
# The code that the added function has for results of 32 and of 64 bits: their type; a comparison with -1.
_OF_BITS = {32: (b"\x7f", b"\x41\x7f\x46"), 64: (b"\x7e", b"\x42\x7f\x51")}
_NAMES_PLACES = re.compile(r"\.debug_.*|metadata\.code\..*|sourceMappingURL|external_debug_info", re.DOTALL)


def with_growth_traps(module: Module) -> bytes:
    """The module with a trap behind each refused growth; the same bytes if its code grows no memory.

    Raises
    ------
    Unknown
        If the module has an instruction, or a type, that is not known here.
    """
    imports = module.all_imports()
    memories: list[Limits] = imports["memory"] + module.memories()
    if not {FUNCTION, CODE} <= module.sections.keys() or not memories:
        return module.wasm
    functions = Reader(module.wasm, *module.sections[FUNCTION][1:]).u32("number of functions")
    code, grown = _calling(module, len(memories), len(imports["function"]) + functions)
    if not grown:
        return module.wasm
    types, widths = sum(1 for _ in module.types()), sorted({memories[memory].bits for memory in grown})
    bodies = [_grow_or_trap(memory, memories[memory].bits) for memory in grown]
    wasm = extended(module.replaced(CODE, [leb128(functions), code]), {
        TYPE: [b"\x60\1%b\1%b" % (_OF_BITS[bits][0], _OF_BITS[bits][0]) for bits in widths],
        FUNCTION: [leb128(types + widths.index(memories[memory].bits)) for memory in grown],
        CODE: [leb128(len(body)) + body for body in bodies]})
    return _without_places(wasm) + _names(list(grown.values()))


def _calling(module: Module, memories: int, first: int) -> tuple[bytearray, dict[int, int]]:
    """The code section behind its count, with calls in place of growths. Also the number of the called function for
    each memory that grows; `first` is the lowest of these numbers."""
    whole = memoryview(module.wasm)
    candidate = re.compile(_growth_of(memories), re.DOTALL)
    found: dict[int, int] = {}
    head = Reader(module.wasm, *module.sections[CODE][1:])
    head.u32("number of functions")
    code, copied = bytearray(), head.at         # `code` has what stands before `copied`
    for reader in module.items(CODE, "functions"):
        entry = reader.at
        size = reader.u32("size of a function")
        start = reader.skip(size, "function")
        if not candidate.search(whole, start, reader.at):
            continue
        body, at = bytearray(), start
        inside = Reader(module.wasm, start, reader.at)
        for place, instruction, operands in module.instructions(inside):
            if instruction == MEMORY_GROW:
                body += whole[at:place]
                body += _CALL + leb128(found.setdefault(operands[0], first + len(found)))
                at = inside.at
        if at != start:
            body += whole[at:reader.at]
            code += whole[copied:entry]
            code += leb128(len(body)) + body
            copied = reader.at
    code += whole[copied:head.end]
    return code, found


def _growth_of(memories: int) -> bytes:
    """A pattern that each growth of one of the first memories matches. A number may have more bytes than it needs."""
    last = min(memories - 1, 0x7F)
    more = rb"\x80{0,3}\x00" if memories <= 0x80 else b""
    return rb"\x40(?:[\x00-\x%02x]|[\x80-\x%02x]%b)" % (last, last | 0x80, more)


def _grow_or_trap(memory: int, bits: int) -> bytes:
    """The body of a function: memory.grow, and unreachable if the result is -1. The parameter holds the result."""
    return b"\0\x20\0\x40%b\x22\0%b\x04\x40\0\x0b\x20\0\x0b" % (leb128(memory), _OF_BITS[bits][1])


def _without_places(wasm: bytes) -> bytes:
    whole = memoryview(wasm)
    parts, copied = [], 0       # the parts have what stands before `copied` and stays
    reader = Reader(wasm, 8, len(wasm))
    while reader.at < reader.end:
        start = reader.at
        kind = reader.byte("section")
        size = reader.u32("section size")
        content = reader.skip(size, "section")
        name = Reader(wasm, content, reader.at).name("custom section's name") if kind == 0 else ""
        if _NAMES_PLACES.fullmatch(name):
            parts.append(whole[copied:start])
            copied = reader.at
    return b"".join([*parts, whole[copied:]])


def _names(functions: list[int]) -> bytes:
    """A section of names. A module may have several; the names of functions add up."""
    name = leb128(len(NAME)) + NAME.encode()
    names = leb128(len(functions)) + b"".join(leb128(number) + name for number in functions)
    content = b"\4name\1" + leb128(len(names)) + names
    return b"\0" + leb128(len(content)) + content
