"""Core dumps of WebAssembly programs, which `wasm-tools print` and `wasmgdb` read.

A dump is a module that is not instantiated. Its memories hold what the memories of the program held, in data segments
without the zeros, and its globals are constants. The custom sections are those of the tool conventions (Coredump.md):
``core`` names the program, ``coremodules`` its modules, ``coreinstances`` which memories and globals an instance has,
and ``corestack`` the frames, the innermost one first. wasmtime's C API gives neither locals nor
operands, and no globals of a component.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import wasmtime
from wasmtime import _ffi as ffi

from linmem._core.memory import Image, Memory
from linmem._core.process_handles import own_runs
from linmem._files.format import PAGE, joined
from linmem._wasm.component import Place, core_modules, hoist_component
from linmem._wasm.instance_state import behind, export, handle, raw_bytes, read
from linmem._wasm.module import CODE, DATA, GLOBAL, MEMORY, Module
from linmem._wasm.outline import Outline
from linmem._wasm.reader import GlobalType, Limits, Malformed, Unknown, leb128
from linmem._wasm.state import NUMBERS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from linmem._wasm.prepared import Prepared

_MAX_SEGMENTS = 90_000          # of a dump; wasm-tools reads at most 100,000 segments of a module
_MAX_SECTION = (1 << 32) - 1    # bytes
_NUMBER_TYPES = {"i32": 0x7F, "i64": 0x7E, "f32": 0x7D, "f64": 0x7C, "v128": 0x7B}
_END = b"\x0b"
_FUNCREF = 0x70


class Frame(NamedTuple):
    instance: int           # an index into the instances of the dump
    function: int           # its index in the module of the instance
    offset: int             # of the instruction, from the start of the function


class Held(NamedTuple):
    """A memory with its content."""

    type: bytes                     # in the binary format, with the present size as the minimum
    bits: int                       # of an address
    image: Image
    runs: list[tuple[int, int]]     # start and size of what is not zero

    def pieces(self, most: int) -> list[tuple[int, memoryview]]:
        """The bytes that are not zero, and some between them, in at most so many pieces with their places."""
        near = 16       # a segment takes as many bytes beside its content
        found = joined(self.runs, near)
        while len(found) > most:
            near *= 2
            found = joined(found, near)
        whole, first = memoryview(self.image), self.image.offset
        return [(start, whole[start - first:start - first + size]) for start, size in found]


class Instance(NamedTuple):
    """The memories and the globals of an instance, by their indices; a global is its type and its value."""

    module: int             # an index into the modules of the dump
    memories: list[Held]
    globals: list[bytes]


class Content(NamedTuple):
    """The modules, the instances and the frames of a trapped program."""

    modules: list[str]
    instances: list[Instance]
    frames: list[Frame]


def content_of_module(name: str, instances: list[Instance], error: wasmtime.Trap | wasmtime.WasmtimeError) -> Content:
    """What a dump of a module has. instances: its only instance, or none if it trapped before it had an instance."""
    return Content([name], instances or [Instance(0, [], [])],
                   [Frame(0, function, offset) for function, offset, _ in _trace(error)])


def _trace(error: wasmtime.Trap | wasmtime.WasmtimeError) -> list[tuple[int, int, int]]:
    """The frames of a trap, the innermost one first.

    Of each the index of the function, the offset in the function, and the place where the function starts in the binary
    that was compiled. Both are 0 if wasmtime does not know the instruction.
    """
    found = ffi.wasm_frame_vec_t()
    trace = ffi.wasm_trap_trace if isinstance(error, wasmtime.Trap) else ffi.wasmtime_error_wasm_trace
    trace(error.ptr(), ctypes.byref(found))
    frames = []
    try:
        for frame in found.data[:found.size]:
            offset, place = ffi.wasm_frame_func_offset(frame), ffi.wasm_frame_module_offset(frame)
            known = offset <= place < 1 << 32
            frames.append((ffi.wasm_frame_func_index(frame), offset * known, (place - offset) * known))
        return frames
    finally:
        ffi.wasm_frame_vec_delete(ctypes.byref(found))


def instance_of(store: wasmtime.Store, instance: wasmtime.Instance, outline: Outline | None,
                wasm: bytes) -> Instance:
    """What an instance holds that a prepared module made. No call into the store may be running.

    outline: of the prepared module. None: only the exported memories are found.
    wasm: the binary of the module, as it was given to `prepare`.
    """
    context = store._context()
    held = []
    if outline is None:
        exports = [thing for thing in instance.exports(store).values()
                   if isinstance(thing, (wasmtime.Memory, wasmtime.SharedMemory))]
        for memory in exports:
            about = memory.type(store) if isinstance(memory, wasmtime.Memory) else memory.type()
            page_size = getattr(about, "page_size", 65536)
            held.append(_read(store, memory, Limits(0, (about.limits.max or 0) * page_size, 64 if about.is_64 else 32,
                                                    page_size=page_size)))
        return Instance(0, held, [])
    for index, limits in enumerate(outline.memory_types):
        name = outline.exports.get(("memory", index))
        if name is not None:
            held.append(_read(store, export(context, instance, name), limits))
    initial = _initial_values(Module(wasm), outline.imported_globals)
    return Instance(0, held, [_global(context, instance, outline, index, each, initial)
                              for index, each in enumerate(outline.global_types)])


def _read(store: wasmtime.Store, memory: Any, limits: Limits) -> Held:
    ours = behind(store, memory)
    image = Image.from_bytes(memory.read(store)) if ours is None else ours.snapshot()
    size = image.offset + image.size if ours is None else ours.byte_size()
    return _held(image, size, limits, shared=isinstance(memory, wasmtime.SharedMemory))


def _held(image: Image, size: int, limits: Limits, *, shared: bool = False) -> Held:
    flags = 3 * shared | 4 * (limits.bits == 64) | 8 * (limits.page_size != 65536)
    kind = bytes([flags]) + leb128(size // limits.page_size)
    if shared:          # such a type has a maximum
        kind += leb128(limits.maximum // limits.page_size)
    if limits.page_size != 65536:
        kind += leb128(limits.page_size.bit_length() - 1)
    return Held(kind, limits.bits, image, _runs(image))


def _runs(image: Image) -> list[tuple[int, int]]:
    """The start and the size of the bytes of each page from the first to the last that is not zero."""
    runs = []
    for start, data in own_runs(image, memoryview(image)):
        for at in range(0, len(data), PAGE):
            page = data[at:at + PAGE].tobytes()
            skipped = len(page) - len(page.lstrip(b"\0"))
            if skipped < len(page):
                runs.append((start + at + skipped, len(page.strip(b"\0"))))
    return runs


def _initial_values(module: Module, imported: int) -> dict[int, bytes]:
    """From the index of each global that the module defines to the constant expression of its initial value."""
    found = {}
    for index, reader in enumerate(module.items(GLOBAL, "globals"), start=imported):
        reader.global_type()
        start = reader.at
        module.expression(reader, [None] * index)
        found[index] = module.wasm[start:reader.at]
    return found


def _global(context: Any, instance: wasmtime.Instance, outline: Outline, index: int, kind: GlobalType,
            initial: dict[int, bytes]) -> bytes:
    """The type and the value of a global, both in the binary format; a reference is written as null."""
    if not kind.number:
        code = _FUNCREF if kind.heap_type is None or kind.heap_type >= 0 else kind.heap_type & 0x7F
        return bytes([code, 0, 0xD0, code]) + _END
    head = bytes([_NUMBER_TYPES[kind.number], 0])
    name = outline.exports.get(("global", index))
    if name is None:        # no code can change this global
        return head + initial[index]
    value = read(context, ffi.wasmtime_global_get, handle(export(context, instance, name)))
    return head + _constant(kind.number, raw_bytes(value, NUMBERS[kind.number])) + _END


def _constant(kind: str, raw: bytes) -> bytes:
    if kind in ("i32", "i64"):
        return bytes([0x41 if kind == "i32" else 0x42]) + signed_leb128(int.from_bytes(raw, "little", signed=True))
    return {"f32": b"\x43", "f64": b"\x44", "v128": b"\xfd\x0c"}[kind] + raw


# -- a component -----------------------------------------------------------------------------------------

def content_of_component(wasm: bytes, prepared: Prepared, memories: Mapping[str, Memory],
                         error: wasmtime.WasmtimeError) -> Content:
    """What a dump of a prepared component has: the memories and the frames of its core instances.

    The C API says neither to which core module a frame belongs nor to which of its instances. The module is found by
    the place of the function in the binary. A frame gets the first instance of its module. The module "unknown" gets
    the other frames, for example those of the functions that wasmtime makes to pass values between components. It also
    gets the memories that linmem cannot assign.

    wasm: the binary of the component, as it was given to `prepare`.
    memories: by the names of `linmem.wasmtime.memories`; empty if the component trapped before it had an instance.
    """
    modules, places, names = [], [], []
    with contextlib.suppress(Malformed, Unknown):       # then nothing was hoisted, and the memories have only numbers
        hoisted = hoist_component(wasm)
        modules = [(start, Module(each))
                   for start, each in core_modules(hoisted.component if prepared._hoists else wasm)]
        places, names = hoisted.places, hoisted.names
    unknown = Place(len(modules), 0, 0)
    instances = {key: Instance(key[0], [], []) for key in sorted(
        {(number, 0) for number in range(len(modules) + 1)} | {place[:2] for place in places})}
    known = dict(zip(names, places, strict=True))
    for name, memory in memories.items():
        place = known.get(name, unknown)
        if name != "GC heap":
            size = memory.byte_size()
            guess = Limits(0, 0, 32 if size <= 1 << 32 else 64, page_size=1 if size % 65536 else 65536)
            limits = guess if place is unknown else modules[place.module][1].memories()[place.memory]
            instances[place[:2]].memories.append(_held(memory.snapshot(), size, limits))
    numbers, frames = {key: number for number, key in enumerate(instances)}, []
    for function, offset, start in _trace(error):
        number = bisect.bisect([first for first, _ in modules], start) - 1
        if number < 0 or _starts(modules[number][1]).get(function) != start - modules[number][0]:
            number = unknown.module
        frames.append(Frame(numbers[number, 0], function, offset))
    held, titles = list(instances.values()), [f"module {number}" for number in range(len(modules))]
    if held[-1].memories or any(frame.instance == len(held) - 1 for frame in frames):
        return Content([*titles, "unknown"], held, frames)
    return Content(titles, held[:-1], frames)


def _starts(module: Module) -> dict[int, int]:
    """From the index of each function that the module defines to where its code starts."""
    try:
        imported = len(module.all_imports()["function"])
        return {index: reader.skip(reader.u32("size"), "function")
                for index, reader in enumerate(module.items(CODE, "functions"), start=imported)}
    except (Malformed, Unknown):        # the module has features that linmem does not know
        return {}


def signed_leb128(value: int) -> bytes:
    out = bytearray()
    while not -64 <= value < 64:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value & 0x7F)
    return bytes(out)


# -- the file --------------------------------------------------------------------------------------------

def write(file: BinaryIO, program: str, content: Content) -> None:
    """Write a core dump.

    Raises
    ------
    OverflowError
        If the memories hold more than a section of a module can have.
    """
    modules, instances, frames = content
    memories = [memory for instance in instances for memory in instance.memories]
    globals = [each for instance in instances for each in instance.globals]
    segments = list(_segments(memories))
    size = len(leb128(len(segments))) + sum(len(head) + len(data) for head, data in segments)
    if size > _MAX_SECTION:
        raise OverflowError(f"the memories hold {size} bytes that are not zero, and a core dump at most {_MAX_SECTION}")
    file.write(b"\0asm\1\0\0\0")
    _custom(file, "core", b"\0" + _name(program))
    _custom(file, "coremodules", _vector(b"\0" + _name(module) for module in modules))
    _custom(file, "coreinstances", _vector(_instances(instances)))
    _custom(file, "corestack", b"\0" + _name("main") + _vector(
        b"\0" + leb128(frame.instance) + leb128(frame.function) + leb128(frame.offset) + b"\0\0" for frame in frames))
    for kind, items in ((MEMORY, [memory.type for memory in memories]), (GLOBAL, globals)):
        section = _vector(items)
        file.write(bytes([kind]) + leb128(len(section)) + section)
    file.write(bytes([DATA]) + leb128(size) + leb128(len(segments)))
    for head, data in segments:
        file.write(head)
        file.write(data)


def _segments(memories: Sequence[Held]) -> Iterable[tuple[bytes, memoryview]]:
    """The head and the content of each data segment."""
    for number, memory in enumerate(memories):
        for start, data in memory.pieces(max(1, _MAX_SEGMENTS // len(memories))):
            head = b"\0" if number == 0 else b"\2" + leb128(number)
            bits = memory.bits
            address = start - (start >> (bits - 1) << bits)        # the constant is a signed number
            yield head + bytes([0x41 if bits == 32 else 0x42]) + signed_leb128(address) + _END + leb128(len(data)), data


def _instances(instances: Sequence[Instance]) -> Iterable[bytes]:
    first_memory = first_global = 0
    for instance in instances:
        memories = range(first_memory, first_memory + len(instance.memories))
        globals = range(first_global, first_global + len(instance.globals))
        first_memory, first_global = memories.stop, globals.stop
        yield b"\0" + leb128(instance.module) + _vector(map(leb128, memories)) + _vector(map(leb128, globals))


def _vector(items: Iterable[bytes]) -> bytes:
    found = list(items)
    return leb128(len(found)) + b"".join(found)


def _name(text: str) -> bytes:
    raw = text.encode("utf-8", "backslashreplace")
    return leb128(len(raw)) + raw


def _custom(file: BinaryIO, name: str, content: bytes) -> None:
    content = _name(name) + content
    file.write(b"\0" + leb128(len(content)) + content)
