"""`Snapshot`: keeps the state of an instance and puts it back."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import wasmtime
from wasmtime import _ffi as ffi

from linmem._core import bridge as _bridge
from linmem._core.arguments import check_flag
from linmem._core.memory import Image, Memory, restore_all
from linmem._wasm.outline import Outline

# The kinds of values that are complete in a wasmtime_val_t: numbers, vectors and functions. (wasmtime-py's types are
# not used to find the kind, because wasmtime-py aborts the process at v128.)
_PLAIN = range(ffi.WASMTIME_I32.value, ffi.WASMTIME_FUNCREF.value + 1)
_WASMTIME = os.path.dirname(wasmtime.__file__) + os.sep
_numbers: weakref.WeakKeyDictionary[wasmtime.Store, int] = weakref.WeakKeyDictionary()
_ENTRIES = frozenset(("__call__", "__init__", "instantiate", "call_async"))


def behind(store: wasmtime.Store, memory: wasmtime.Memory | wasmtime.SharedMemory) -> Memory | None:
    """The linmem memory behind a wasm memory; None if the memory is not linmem's."""
    pointer = memory.data_ptr(store) if isinstance(memory, wasmtime.Memory) else memory.data_ptr()
    return _bridge.find(ctypes.cast(pointer, ctypes.c_void_p).value or 0)


def check_type(value: object, kind: type, name: str) -> None:
    """Refuse a value that is not of the class `kind` of wasmtime."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a wasmtime.{kind.__name__}, got {type(value).__name__}")


def check_context(store: Any) -> None:
    """Refuse an object that is neither a store nor a Caller. With such an object wasmtime would end the process."""
    if not callable(getattr(store, "_context", None)):
        check_type(store, wasmtime.Store, "store")


def check_store(store: Any, name: str, handle: ctypes.Structure) -> None:
    """Refuse the objects that `check_context` refuses, and a store that `handle` does not belong to."""
    check_context(store)
    if not isinstance(store, wasmtime.Store):
        return
    number = _numbers.get(store)
    if number is None:      # the handle of a new object of the store has the number of the store
        mark = wasmtime.Global(store, wasmtime.GlobalType(wasmtime.ValType.i32(), False), 0)
        number = _numbers[store] = _number_in(mark._global)
    if _number_in(handle) != number:
        raise ValueError(f"store must be the one that the {name} belongs to, got another")


def _number_in(handle: ctypes.Structure) -> int:
    return ctypes.c_uint64.from_buffer(handle).value        # store_id, which is the first field of every handle


class Snapshot:
    """The memories, mutable globals and tables of an instance at one moment. Made by `take`.

    A snapshot holds the state that the instance exports, its own and imported state. `take` refuses other state. With
    ``partial=True`` it names the other state in `unseen` instead, as far as that state is known. Which segments were
    dropped is always named and never held. The objects that references refer to and the state of the host are never
    named.

    Attributes
    ----------
    memories : dict
        From the name of the export to the `Image` of the memory.
    globals : tuple of str
        The names of the mutable globals.
    tables : tuple of str
        The names of the tables whose elements are held.
    unseen : tuple of str
        The state of the instance that the snapshot does not hold.
    """

    __slots__ = ("_globals", "_memories", "_store", "_tables", "globals", "memories", "tables", "unseen")

    memories: Mapping[str, Image]
    globals: tuple[str, ...]
    tables: tuple[str, ...]
    unseen: tuple[str, ...]
    _store: weakref.ref[wasmtime.Store]
    _memories: list[tuple[str, wasmtime.Memory | wasmtime.SharedMemory, int, Image]]
    _globals: list[tuple[str, Any, Any]]
    _tables: list[tuple[str, wasmtime.Table, int, list[Any] | None]]

    def __init__(self) -> None:
        raise TypeError("snapshots are made by Snapshot.take(store, instance)")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Snapshot cannot be pickled or copied: it belongs to a store of this process. The Images in"
                        " its `memories` can")

    @classmethod
    def take(cls, store: wasmtime.Store, instance: wasmtime.Instance, *, partial: bool = False) -> Snapshot:
        """Keep the present state of `instance`.

        Parameters
        ----------
        store : wasmtime.Store
            The store of the instance. No call into the store may be running.
        instance : wasmtime.Instance
            An instance whose memories are linmem's.
        partial : bool
            Name the state that cannot be held in `unseen`, and take a snapshot of the rest. `restore` does not change
            such state: memories, mutable globals and tables that the instance does not export
            (``prepare(..., expose=True)`` exports them), exported memories that are not linmem's, and exported
            globals and tables that refer to objects.

        Raises
        ------
        ValueError
            If there is such state and `partial` is False, if an instance of a module that was not prepared exports
            no state, or if the store is closed.
        RuntimeError
            If a call into the store is running on this thread.
        """
        check_type(instance, wasmtime.Instance, "instance")
        check_flag(partial, "partial")
        context = _idle(store, "taken")
        check_store(store, "instance", instance._instance)
        prepared = getattr(instance, "_linmem_prepared", None)
        exports = instance.exports(store)
        outline = None if prepared is None else prepared.outline
        self = object.__new__(cls)
        self._store = weakref.ref(store)
        self._memories, self._globals, self._tables = [], [], []
        memories: dict[str, Image] = {}
        known: dict[int, Image] = {}        # one memory may be exported under several names
        unseen = _hidden(outline, partial)
        unreadable = frozenset() if outline is None else outline.unreadable

        def refuse(text: str) -> None:
            if not partial:
                raise ValueError(f"{text}, which a snapshot cannot hold: partial=True takes the rest")
            unseen.append(text)

        for name, thing in exports.items():
            if isinstance(thing, (wasmtime.Memory, wasmtime.SharedMemory)):
                memory = behind(store, thing)
                if memory is None:
                    refuse(f"exported memory {name!r} is not linmem's")
                    continue
                base = memory.as_ptr()
                if base not in known:
                    known[base] = memory.snapshot()
                    self._memories.append((name, thing, memory.byte_size(), known[base]))
                memories[name] = known[base]
            elif isinstance(thing, wasmtime.Global) and thing.type(store).mutable:
                value = None if name in unreadable else _value(
                    context, ffi.wasmtime_global_get, ctypes.byref(thing._global))
                if value is None:
                    refuse(f"mutable global {name!r} is a reference to an object")
                    continue
                self._globals.append((name, ctypes.byref(thing._global), value))
            elif isinstance(thing, wasmtime.Table):
                size = thing.size(store)
                # Without an outline the elements may be continuations. The C API aborts when it reads one.
                elements = None if outline is None or name in unreadable else _elements_of(context, thing, size)
                if outline is None:
                    unseen.append(f"the elements of exported table {name!r}")
                elif elements is None:
                    refuse(f"exported table {name!r} has references to objects")
                self._tables.append((name, thing, size, elements))
        self.memories = memories
        self.globals = tuple(name for name, _, _ in self._globals)
        self.tables = tuple(name for name, _, _, elements in self._tables if elements is not None)
        if outline is None:
            if not (partial or memories or self.globals):
                raise ValueError("the instance exports no memory and no mutable global, and what its module hides is"
                                 " not known: make it by prepare(..., expose=True)")
            unseen.append("what it does not export: " + (
                "it is not known, since the module was not made by prepare" if prepared is None else
                "the module uses what linmem does not know"))
        self.unseen = tuple(unseen)
        return self

    def restore(self, store: wasmtime.Store, *, zero_grown: bool = False) -> None:
        """Put back the state of the instance, completely or not at all.

        The time grows with the number of pages that changed since the snapshot. All elements of tables are written.

        A memory that has grown since the snapshot is refused. The memory cannot shrink, so the allocator of the guest
        would know the old size only, and would grow the memory again after each restore. Make a new instance instead.

        Parameters
        ----------
        store : wasmtime.Store
            The store that the snapshot was taken in. No call into the store may be running.
        zero_grown : bool
            Accept memories that have grown: they keep their size, and their new bytes are zeroed.

        Raises
        ------
        ValueError
            If the store is another one or is closed, if a memory has grown, or if an exported table was resized.
        OwnedError, TypeError
            If a memory cannot be restored now; as for `Memory.restore`.
        RuntimeError
            If a call into the store is running on this thread.
        """
        check_flag(zero_grown, "zero_grown")
        if self._store() is not store:
            raise ValueError("the snapshot was taken in another store")
        context = _idle(store, "restored")
        for name, table, size, _ in self._tables:
            if table.size(store) != size:
                raise ValueError(f"exported table {name!r} had {size} elements and has {table.size(store)}, and a table"
                                 " cannot shrink: make a new instance")
        memories = []
        for name, memory, size, _ in self._memories:
            found = behind(store, memory)
            assert found is not None        # the store keeps its memories
            if found.byte_size() != size and not zero_grown:
                raise ValueError(f"exported memory {name!r} has grown from {size} to {found.byte_size()} bytes, and the"
                                 " restored guest would not know: make a new instance, or pass zero_grown=True")
            memories.append(found)
        restore_all(memories, [image for _, _, _, image in self._memories])     # the following steps cannot be refused
        for _, place, value in self._globals:
            _raise(ffi.wasmtime_global_set(context, place, value))
        for _, table, _, elements in self._tables:
            place = ctypes.byref(table._table)
            for index, value in enumerate(elements or ()):
                _raise(ffi.wasmtime_table_set(context, place, index, value))

    def __repr__(self) -> str:
        return f"<linmem.wasmtime.Snapshot: {len(self.memories)} memories, {len(self.globals)} globals>"


def _raise(error: Any) -> None:
    if error:
        raise wasmtime.WasmtimeError._from_ptr(error)


def _value(context: Any, get: Callable[..., Any], *place: Any) -> Any:
    """A value in the form that wasmtime_global_set and wasmtime_table_set take; None for a reference to an object."""
    value = ffi.wasmtime_val_t()
    get(context, *place, ctypes.byref(value))
    kind: Any = value.kind
    if kind in _PLAIN:
        return ctypes.byref(value)
    unroot = ffi.dll.wasmtime_val_unroot        # older versions take the context too
    unroot(*[context, ctypes.byref(value)][-len(unroot.argtypes or ()):])
    return None


def _elements_of(context: Any, table: wasmtime.Table, size: int) -> list[Any] | None:
    """The elements, or None if an element is a reference to an object."""
    place, elements = ctypes.byref(table._table), []
    for index in range(size):
        value = _value(context, ffi.wasmtime_table_get, place, index)
        if value is None:
            return None
        elements.append(value)
    return elements


def _hidden(outline: Outline | None, partial: bool) -> list[str]:
    """The state that a prepared module does not export, so that a snapshot cannot hold it.

    If `partial` is False, refuse a module that has such state.
    """
    if outline is None:
        return []
    words = {"global": "mutable global"}
    own, imported = ([f"{'imported ' * is_import}{words.get(kind, kind)} {index}"
                      for kind, index, is_import in outline.hidden() if is_import == which] for which in (False, True))
    if (own or imported) and not partial:
        text = ", ".join([", ".join(own) + " of its own"] * bool(own) + imported)
        raise ValueError(f"the module does not export {text}, which would keep their present content when the rest is"
                         " restored: prepare the module with expose=True, or take a snapshot with partial=True")
    data, elements = outline.passive
    dropped = [f"which of {data} passive data segments and {elements} passive element segments were dropped"]
    return own + imported + dropped * bool(data or elements)


def _idle(store: wasmtime.Store, what: str) -> Any:
    """The context of the store; refused if a call into the store is running on this thread."""
    if not isinstance(store, wasmtime.Store):
        raise TypeError(f"store must be a wasmtime.Store, got {type(store).__name__}: a snapshot cannot be {what} while"
                        " wasm runs")
    context = store._context()
    address = ctypes.addressof(context.contents)
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name in _ENTRIES and code.co_filename.startswith(_WASMTIME):
            running = frame.f_locals.get("store")
            if running is not None and ctypes.addressof(running._context().contents) == address:
                raise RuntimeError(f"a snapshot cannot be {what} while a call into its store is running")
        frame = frame.f_back        # type: ignore[assignment]
    return context
