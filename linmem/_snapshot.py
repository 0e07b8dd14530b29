"""What an instance holds, kept to be put back. Floor 5."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref

import wasmtime
from wasmtime import _ffi as ffi

from linmem import _bridge
from linmem._checks import check_flag
from linmem._image import Image
from linmem._memory import Memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any, NoReturn

    from linmem._hoist import Outline

__all__ = ["Snapshot", "behind"]

# Values that are no more than the bits of a wasmtime_val_t: numbers, vectors and functions. (A type cannot be asked
# by way of wasmtime-py what it is: at v128 that aborts the process.)
_PLAIN = range(ffi.WASMTIME_I32.value, ffi.WASMTIME_FUNCREF.value + 1)
_WASMTIME = os.path.dirname(wasmtime.__file__) + os.sep
_numbers: weakref.WeakKeyDictionary[wasmtime.Store, int] = weakref.WeakKeyDictionary()
_ENTRIES = frozenset(("__call__", "__init__", "instantiate", "call_async"))


def behind(store: wasmtime.Store, memory: wasmtime.Memory | wasmtime.SharedMemory) -> Memory | None:
    """The linmem memory behind a wasm memory; None if there is none."""
    pointer = memory.data_ptr(store) if isinstance(memory, wasmtime.Memory) else memory.data_ptr()
    return _bridge.find(ctypes.cast(pointer, ctypes.c_void_p).value or 0)


def check_store(store: Any, name: str, handle: ctypes.Structure) -> None:
    """Refuse what is no store (or a Caller), and the store that a thing is not of: wasmtime would end the process."""
    if not isinstance(store, wasmtime.Store):
        if not callable(getattr(store, "_context", None)):
            raise TypeError(f"store must be a wasmtime.Store, got {type(store).__name__}")
        return
    number = _numbers.get(store)
    if number is None:      # what is made in it says which one it is
        mark = wasmtime.Global(store, wasmtime.GlobalType(wasmtime.ValType.i32(), False), 0)
        number = _numbers[store] = _number_in(mark._global)
    if _number_in(handle) != number:
        raise ValueError(f"store must be the one that the {name} belongs to, got another")


def _number_in(handle: ctypes.Structure) -> int:
    return ctypes.c_uint64.from_buffer(handle).value        # store_id, by whatever name


class Snapshot:
    """The memories and the mutable globals of an instance as they were. Made by `take`.

    It holds what the instance exports. State that it cannot see is named in `unseen`, as far as it
    is known: tables, dropped segments, what references lead to, and anything of the host.

    Attributes
    ----------
    memories : dict
        From the export's name to the `Image` of the memory.
    globals : tuple of str
        The names of the mutable globals.
    unseen : tuple of str
        What instances of this module have that a snapshot does not hold.
    """

    __slots__ = ("_globals", "_memories", "_store", "_tables", "globals", "memories", "unseen")

    memories: Mapping[str, Image]
    globals: tuple[str, ...]
    unseen: tuple[str, ...]
    _store: weakref.ref[wasmtime.Store]
    _memories: list[tuple[str, wasmtime.Memory | wasmtime.SharedMemory, int, Image]]
    _globals: list[tuple[Any, Any]]
    _tables: list[tuple[str, wasmtime.Table, int]]

    def __init__(self) -> None:
        raise TypeError("snapshots are made by Snapshot.take(store, instance)")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Snapshot cannot be pickled or copied: it belongs to a store of this process. The Images in"
                        " its `memories` can")

    @classmethod
    def take(cls, store: wasmtime.Store, instance: wasmtime.Instance, *, partial: bool = False) -> Snapshot:
        """Keep what `instance` holds now.

        Parameters
        ----------
        store : wasmtime.Store
            The instance's. Nothing of it may be running.
        instance : wasmtime.Instance
            Its memories must be linmem's.
        partial : bool
            Also for an instance that is known to have memories or mutable globals of its own that it does
            not export. They would keep what they hold when the rest goes back. ``prepare(...,
            expose=True)`` exports them.

        Raises
        ------
        ValueError
            If the instance hides state and `partial` is not given, if a memory is not linmem's, or
            if the store is closed.
        RuntimeError
            If a call into the store is running on this thread.
        """
        if not isinstance(instance, wasmtime.Instance):
            raise TypeError(f"instance must be a wasmtime.Instance, got {type(instance).__name__}")
        check_flag(partial, "partial")
        context = _idle(store, "taken")
        check_store(store, "instance", instance._instance)
        prepared = getattr(instance, "_linmem_prepared", None)
        exports = instance.exports(store)
        outline = None if prepared is None else prepared.outline
        hidden = [] if outline is None else [
            *(f"memory {index}" for index in outline.hidden_memories()),
            *(f"mutable global {index}" for index in outline.hidden_globals())]
        if hidden and not partial:
            raise ValueError(f"the module does not export {', '.join(hidden)} of its own, which would keep what they"
                             " hold when the rest is restored: prepare it with expose=True, or take a snapshot with"
                             " partial=True")
        self = object.__new__(cls)
        self._store = weakref.ref(store)
        self._memories, self._globals, self._tables = [], [], []
        memories: dict[str, Image] = {}
        known: dict[int, Image] = {}        # one memory may be exported under several names
        names = []
        for name, thing in exports.items():
            if isinstance(thing, (wasmtime.Memory, wasmtime.SharedMemory)):
                memory = behind(store, thing)
                if memory is None:
                    raise ValueError(f"exported memory {name!r} is not linmem's")
                base = memory.as_ptr()
                if base not in known:
                    known[base] = memory.snapshot()
                    self._memories.append((name, thing, memory.byte_size(), known[base]))
                memories[name] = known[base]
            elif isinstance(thing, wasmtime.Global) and thing.type(store).mutable:
                self._globals.append(_value_of(context, name, thing))
                names.append(name)
            elif isinstance(thing, wasmtime.Table):
                self._tables.append((name, thing, thing.size(store)))
        self.memories = memories
        self.globals = tuple(names)
        self.unseen = (*hidden, *_unseen(outline, prepared is not None))
        return self

    def restore(self, store: wasmtime.Store, *, zero_grown: bool = False) -> None:
        """Put back what the instance held, in time that follows what changed since.

        A memory that has grown since is refused: it cannot shrink, and the guest's allocator, put back to
        what it was, would not know of the rest and grow the memory anew each time. Make a new instance then.

        Parameters
        ----------
        store : wasmtime.Store
            The one that the snapshot was taken in. Nothing of it may be running.
        zero_grown : bool
            Accept memories that have grown: they keep their size, and what they gained is zeroed.

        Raises
        ------
        ValueError
            If it is another store or a closed one, or, before anything is restored, if a memory has
            grown or an exported table was resized since.
        RuntimeError
            If a call into the store is running on this thread.
        """
        check_flag(zero_grown, "zero_grown")
        if self._store() is not store:
            raise ValueError("the snapshot was taken in another store")
        context = _idle(store, "restored")
        for name, table, size in self._tables:
            if table.size(store) != size:
                raise ValueError(f"exported table {name!r} had {size} elements and has {table.size(store)}: a snapshot"
                                 " does not hold tables")
        memories = []
        for name, memory, size, image in self._memories:
            found = behind(store, memory)
            assert found is not None        # wasmtime holds it as long as the store lives
            if found.byte_size() != size and not zero_grown:
                raise ValueError(f"exported memory {name!r} has grown from {size} to {found.byte_size()} bytes, which a"
                                 " guest that is put back does not know: make a new instance, or pass zero_grown=True")
            memories.append((found, image))
        for found, image in memories:
            found.restore(image, zero_grown=True)
        for place, value in self._globals:
            error = ffi.wasmtime_global_set(context, place, value)
            if error:
                raise wasmtime.WasmtimeError._from_ptr(error)

    def __repr__(self) -> str:
        return f"<linmem.wasmtime.Snapshot: {len(self.memories)} memories, {len(self.globals)} globals>"


def _value_of(context: Any, name: str, thing: wasmtime.Global) -> tuple[Any, Any]:
    """Where a global is and what it holds, both as wasmtime_global_set takes them."""
    place, value = ctypes.byref(thing._global), ffi.wasmtime_val_t()
    ffi.wasmtime_global_get(context, place, ctypes.byref(value))
    kind: Any = value.kind
    if kind not in _PLAIN:
        unroot = ffi.dll.wasmtime_val_unroot        # older ones want the context too
        unroot(*[context, ctypes.byref(value)][-len(unroot.argtypes or ()):])
        raise ValueError(f"mutable global {name!r} is a reference to an object, which a snapshot cannot hold")
    return place, ctypes.byref(value)


def _unseen(outline: Outline | None, was_prepared: bool) -> Iterator[str]:
    if outline is None:
        yield ("what it does not export: " + ("the module uses what linmem does not know" if was_prepared else
                                              "it is not known, since the module was not made by prepare"))
        return
    tables = outline.tables - outline.imported_tables
    if tables:
        yield f"the elements of {tables} tables"
    data, elements = outline.passive
    if data or elements:
        yield f"which of {data} passive data segments and {elements} passive element segments were dropped"
    imported = {"memory": range(outline.imported_memories), "table": range(outline.imported_tables),
                "global": [index for index in range(outline.imported_globals) if outline.globals[index]]}
    for kind, indices in imported.items():
        if any((kind, index) not in outline.exports for index in indices):
            yield f"what it imports and does not export: a {'mutable ' * (kind == 'global')}{kind}"


def _idle(store: wasmtime.Store, what: str) -> Any:
    """The store's context, if it is a store in which this thread runs nothing."""
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
