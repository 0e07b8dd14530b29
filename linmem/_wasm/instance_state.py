"""Finds, reads and writes the state of one instance, through wasmtime's C functions.

wasmtime-py's own methods are not used where they abort the process (values of the type v128, elements of typed tables)
or take time that is quadratic in the number of exports (`Instance.exports`).
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import wasmtime
from wasmtime import _ffi as ffi
from wasmtime._extern import wrap_extern

from linmem._core import bridge as _bridge
from linmem._core.memory import Image, Memory, restore_all
from linmem._wasm import recording
from linmem._wasm.outline import Outline
from linmem._wasm.reader import GlobalType, Limits
from linmem._wasm.state import NULL, NUMBERS, Reference, State

# The kinds of a wasmtime_val_t.
KINDS = {name: getattr(ffi, f"WASMTIME_{name.upper()}").value for name in (*NUMBERS, "funcref")}
KIND_NAMES = {kind: name for name, kind in KINDS.items()}
_REFERENCES = range(KINDS["funcref"], KINDS["funcref"] + 4)
_FUNCREF, _EXTERNREF, _ANYREF, _EXNREF = _REFERENCES
# The kind of an abstract heap type; all other heap types are of anyref.
_ABSTRACT = {0x70 - 0x80: _FUNCREF, 0x73 - 0x80: _FUNCREF, 0x6F - 0x80: _EXTERNREF, 0x72 - 0x80: _EXTERNREF,
             0x69 - 0x80: _EXNREF, 0x74 - 0x80: _EXNREF}
_OF = ffi.wasmtime_val_t.of.offset

Thing = Any         # a memory, global, table or function of wasmtime-py


def behind(store: Any, memory: wasmtime.Memory | wasmtime.SharedMemory) -> Memory | None:
    """The linmem memory behind a wasm memory; None if the memory is not linmem's."""
    pointer = memory.data_ptr(store) if isinstance(memory, wasmtime.Memory) else memory.data_ptr()
    return _bridge.find(ctypes.addressof(pointer.contents) if pointer else 0)


def export(context: Any, instance: wasmtime.Instance, name: str) -> Thing | None:
    """An export of the instance, or None."""
    found, raw = ffi.wasmtime_extern_t(), name.encode()
    if not ffi.wasmtime_instance_export_get(context, ctypes.byref(instance._instance), ctypes.create_string_buffer(raw),
                                            len(raw), ctypes.byref(found)):
        return None
    return wrap_extern(found)


def handle(thing: Thing) -> Any:
    """A pointer to the handle of a global or a table."""
    return ctypes.byref(thing._global if isinstance(thing, wasmtime.Global) else thing._table)


def check(error: Any) -> None:
    """Raise the error that a C function returned, if any."""
    if error:
        raise wasmtime.WasmtimeError._from_ptr(error)


# -- values -------------------------------------------------------------------------------------------

def read(context: Any, get: Any, *place: Any) -> Any | None:
    """A number, a function or a null reference, as a wasmtime_val_t; None for a reference to an object."""
    value = ffi.wasmtime_val_t()
    get(context, *place, ctypes.byref(value))
    if value.kind in KIND_NAMES or is_null(value):
        return value
    unroot(context, value)
    return None


def unroot(context: Any, value: Any) -> None:
    """End the reference that a C function made for a value."""
    function = ffi.dll.wasmtime_val_unroot      # older versions take the context too
    function(*[context, ctypes.byref(value)][-len(function.argtypes or ()):])


def is_null(value: Any) -> bool:
    """Whether a value is a null reference: such a reference belongs to no store."""
    return value.kind in _REFERENCES and value.of.funcref.store_id == 0


def null(kind: int) -> Any:
    """A null reference of a kind of a wasmtime_val_t."""
    value = ffi.wasmtime_val_t()
    value.kind = ctypes.c_uint8(kind)
    return value


def number(kind: str, raw: bytes) -> Any:
    """A number, from its little-endian bytes."""
    value = null(KINDS[kind])
    ctypes.memmove(ctypes.addressof(value) + _OF, raw, NUMBERS[kind])
    return value


def raw_bytes(value: Any, size: int) -> bytes:
    """The little-endian bytes of a number."""
    return ctypes.string_at(ctypes.addressof(value) + _OF, size)


def elements_of(context: Any, table: wasmtime.Table, size: int) -> list[Any] | None:
    """The elements of a table, or None if an element is a reference to an object."""
    place, found = handle(table), []
    for index in range(size):
        value = read(context, ffi.wasmtime_table_get, place, index)
        if value is None:
            return None
        found.append(value)
    return found


def null_global(context: Any, place: Any) -> Any:
    """A null reference for a global."""
    value = null(KINDS["funcref"])
    ffi.wasmtime_global_get(context, place, ctypes.byref(value))
    if value.kind not in KIND_NAMES:
        unroot(context, value)
    return null(value.kind)


def null_element(context: Any, table: wasmtime.Table, heap_type: int | None) -> Any | None:
    """A pointer to a null reference for a table of this type; None if the type has no null reference."""
    # A heap type that is not negative is the index of a type of functions or of objects.
    kinds = (_FUNCREF, _ANYREF) if heap_type is None or heap_type >= 0 else (_ABSTRACT.get(heap_type, _ANYREF),)
    for value in map(ctypes.byref, map(null, kinds)):
        if grow_table(context, table, 0, value) is None:
            return value
    return None


def grow_table(context: Any, table: wasmtime.Table, delta: int, value: Any) -> wasmtime.WasmtimeError | None:
    """Add elements that hold `value`, a pointer. With a delta of 0 wasmtime only checks the type of the value."""
    before = ctypes.c_uint64()
    error = ffi.wasmtime_table_grow(context, handle(table), delta, value, ctypes.byref(before))
    return wasmtime.WasmtimeError._from_ptr(error) if error else None


class Functions:
    """The functions of one instance that have a name: from a name to a value, and from a value to its name."""

    def __init__(self, context: Any, instance: wasmtime.Instance, outline: Outline) -> None:
        self.context, self.instance, self.outline = context, instance, outline
        self.table = export(context, instance, outline.function_table) if outline.function_table else None
        self.places: dict[Reference, int] = {}
        self.names: dict[int, Reference] = {}

    def value(self, reference: Reference) -> Any | None:
        """The value of a reference that is not null; None if this instance does not have the function."""
        if reference.kind == "export":
            found = export(self.context, self.instance, reference.name)
            if not isinstance(found, wasmtime.Func):
                return None
            value = null(KINDS["funcref"])
            value.of.funcref = found._func
            return value
        if not self.places:
            self.places.update((name, place) for place, name in enumerate(self.outline.functions.values()))
        place = self.places.get(reference)
        if place is None or self.table is None:
            return None
        return read(self.context, ffi.wasmtime_table_get, handle(self.table), place)

    def name(self, value: Any) -> Reference | None:
        """The name of a function or of a null reference; None if it has no name."""
        if is_null(value):
            return NULL
        if not self.names:
            if self.table is not None:
                for place, reference in enumerate(self.outline.functions.values()):
                    element = read(self.context, ffi.wasmtime_table_get, handle(self.table), place)
                    if not is_null(element):        # unless the host has changed the table
                        self.names[self._identity(element)] = reference
            for name in self.outline.function_exports:
                reference = Reference("export", name)
                self.names.setdefault(self._identity(self.value(reference)), reference)
        return self.names.get(self._identity(value))

    def _identity(self, value: Any) -> int:
        return int(ffi.wasmtime_func_to_raw(self.context, ctypes.byref(value.of.funcref)) or 0)


# -- the parts of an instance ------------------------------------------------------------------------

class HeldMemory(NamedTuple):
    name: str
    memory: wasmtime.Memory | wasmtime.SharedMemory
    size: int
    image: Image


class HeldGlobal(NamedTuple):
    name: str
    place: Any
    value: Any              # a pointer to a wasmtime_val_t


class HeldTable(NamedTuple):
    name: str
    table: wasmtime.Table
    size: int
    elements: list[tuple[int, Any]]     # with their indices, as pointers to wasmtime_val_t


class Parts(NamedTuple):
    """Memories, globals and tables of one instance, each with the content that is held of it."""

    memories: list[HeldMemory]
    globals: list[HeldGlobal]
    tables: list[HeldTable]

    def write(self, context: Any, memories: list[Memory], images: list[Image]) -> None:
        """Write the contents. `memories` and `images` are those of the parts, whose sizes agree with the state. If a
        memory refuses, nothing is written."""
        if recording.OPEN:
            recording.note(memories)
        restore_all(memories, images)
        # The following steps cannot be refused: take() has read the values, or check_values() has tried them.
        for _, place, value in self.globals:
            error = ffi.wasmtime_global_set(context, place, value)
            if error:
                check(error)
        for _, table, _, elements in self.tables:
            place = handle(table)
            for index, value in elements:
                error = ffi.wasmtime_table_set(context, place, index, value)
                if error:
                    check(error)

    def check_values(self, context: Any) -> None:
        """Refuse a value that is not of the type of its global or table. Nothing is changed, not even sizes."""
        for name, place, value in self.globals:
            before = ffi.wasmtime_val_t()
            ffi.wasmtime_global_get(context, place, ctypes.byref(before))
            try:
                check(ffi.wasmtime_global_set(context, place, value))
            except wasmtime.WasmtimeError as error:
                raise ValueError(f"the snapshot has a value that global {name!r} cannot hold: {error}") from error
            finally:
                check(ffi.wasmtime_global_set(context, place, ctypes.byref(before)))
                unroot(context, before)
        for held in self.tables:
            for value in {id(value): value for _, value in held.elements}.values():
                refusal = grow_table(context, held.table, 0, value)
                if refusal is not None:
                    raise ValueError(f"the snapshot has a value that table {held.name!r} cannot hold: {refusal}"
                                     ) from refusal


def initial_elements(outline: Outline, table: int, size: int) -> list[Reference | None]:
    """What instantiation puts into the elements of a table that has grown to `size`; None: nothing, or not known."""
    known = outline.contents(table)[:size]
    known += [None] * (size - len(known))
    return [None if function is None else NULL if function < 0 else outline.functions.get(function)
            for function in known]


def parts_of(store: Any, context: Any, instance: wasmtime.Instance, outline: Outline, state: State, *,
             every_element: bool) -> Parts:
    """The parts of an instance that a state has, with their contents in the state. `check_state` accepts the state.

    every_element: also the elements of tables that the state does not list, because instantiation put them there.

    Raises
    ------
    ValueError
        If the instance does not have or does not export a part, or the two disagree.
    """
    functions = Functions(context, instance, outline)
    found = Parts([], [], [])
    values: dict[Reference, Any] = {}
    contents: dict[tuple[object, ...], object] = {}     # what the objects of the instance shall hold

    def part(kind: str, index: int) -> tuple[str, Thing]:
        name = name_of(outline, kind, index)
        return name, export(context, instance, name)

    def is_new(kind: str, name: str, thing: object, content: object) -> bool:
        """Whether this object is not held yet: the host may give one object to several imports."""
        held = contents.setdefault((kind, thing), content)
        if held is not content and held != content:
            raise ValueError(f"{kind} {name!r} is also another {kind} of the instance, and the snapshot has two"
                             " contents")
        return held is content

    def value(of: str, reference: Reference) -> Any:
        if reference not in values:
            found = functions.value(reference)
            if found is None:
                raise ValueError(f"the state of {of} has {reference}, which the module does not name: prepare the"
                                 " module with expose=True")
            values[reference] = ctypes.byref(found)
        return values[reference]

    for index, size, image in state.memories:
        name, memory = part("memory", index)
        ours = behind(store, memory)
        if ours is None:
            raise ValueError(f"memory {name!r} is not linmem's")
        if is_new("memory", name, ours.as_ptr(), (size, image)):
            found.memories.append(HeldMemory(name, memory, size, image))
    for index, kind, content in state.globals:
        name, thing = part("global", index)
        place = handle(thing)
        if is_new("global", name, _fields(thing._global), (kind, content)):
            found.globals.append(HeldGlobal(
                name, place, ctypes.byref(number(kind, content)) if isinstance(content, bytes) else
                ctypes.byref(null_global(context, place)) if content == NULL else
                value(f"global {name!r}", content)))
    for index, size, changed in state.tables:
        name, table = part("table", index)
        wanted = dict(changed)
        if every_element:
            present_size = table.size(store)
            if present_size != size:
                raise ValueError(f"exported table {name!r} had {size} elements and has {present_size}, and a table"
                                 " cannot shrink: make a new instance")
            known = enumerate(initial_elements(outline, index, size))
            wanted = {element: reference for element, reference in known if reference is not None} | wanted
        if is_new("table", name, _fields(table._table), (size, wanted)):
            has_null = NULL in wanted.values()
            empty = null_element(context, table, outline.table_types[index].heap_type) if has_null else None
            if has_null and empty is None:
                raise ValueError(f"the snapshot has a null reference in table {name!r}, whose type has none")
            found.tables.append(HeldTable(name, table, size, [
                (element, empty if reference == NULL else value(f"table {name!r}", reference))
                for element, reference in wanted.items()]))
    return found


def _fields(handle: Any) -> object:
    """The fields of a handle, without the bytes between them, which are not set."""
    if not isinstance(handle, ctypes.Structure):
        return handle
    return tuple(_fields(getattr(handle, name)) for name, *_ in handle._fields_)


def check_state(outline: Outline, state: State) -> None:
    """Refuse a state whose sizes and types are not those of the module. Only an instance can tell of references."""
    for index, size, image in state.memories:
        memory: Limits = _type_of(outline.memory_types, "memory", index)
        name, end = name_of(outline, "memory", index), image.offset + image.size
        if not memory.minimum <= size <= memory.maximum or (size - memory.minimum) % memory.page_size or end > size:
            raise ValueError(f"the snapshot has {size} bytes of memory {name!r}, and an image that ends at {end}; the"
                             f" memory has {memory.minimum} to {memory.maximum} bytes, in pages of {memory.page_size}")
    for index, kind, value in state.globals:
        declared: GlobalType = _type_of(outline.global_types, "global", index)
        name = name_of(outline, "global", index)
        is_number = isinstance(value, bytes)
        if not declared.mutable or (kind if is_number else "") != declared.number or (
                isinstance(value, bytes) and len(value) != NUMBERS.get(kind)):
            raise ValueError(f"the snapshot has a value of the type {kind!r} of global {name!r}, which is"
                             f" {'' if declared.mutable else 'not '}mutable, of the type"
                             f" {declared.number or 'reference'!r}")
    for index, size, changed in state.tables:
        table: Limits = _type_of(outline.table_types, "table", index)
        name = name_of(outline, "table", index)
        listed = sum(element >= table.minimum for element, _ in changed)
        # A file that claims a size must hold the elements, so that the time of a start follows the size of the file.
        if not table.minimum <= size <= table.maximum or size - table.minimum != listed or any(
                not 0 <= element < size for element, _ in changed):
            raise ValueError(f"the snapshot has {size} elements of table {name!r}, and lists {listed} beyond its"
                             f" minimum; the table has {table.minimum} to {table.maximum}, and all beyond the minimum"
                             " must be listed")


def _type_of(types: tuple[Any, ...], kind: str, index: int) -> Any:
    if not 0 <= index < len(types):
        raise ValueError(f"the snapshot has {kind} {index}, and the module has {len(types)} of this kind")
    return types[index]


def name_of(outline: Outline, kind: str, index: int) -> str:
    """The export that names a part of the instance."""
    name = outline.exports.get((kind, index))
    if name is None:
        raise ValueError(f"the snapshot has {kind} {index}, which the module does not export: prepare the module with"
                         " expose=True")
    if name in outline.unreadable:
        raise ValueError(f"the snapshot has {kind} {name!r}, which may hold continuations: wasmtime cannot read these")
    return name
