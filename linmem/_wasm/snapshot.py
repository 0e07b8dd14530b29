"""`Snapshot`: keeps the state of an instance and puts it back."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import warnings
import weakref
from collections.abc import Container, Iterator, Mapping
from typing import Any

import wasmtime
from wasmtime import _ffi as ffi

from linmem._core.arguments import check_flag
from linmem._core.memory import Image
from linmem._wasm.install import check_type
from linmem._wasm.instance_state import (
    KIND_NAMES,
    Functions,
    HeldGlobal,
    HeldMemory,
    HeldTable,
    Parts,
    behind,
    check_state,
    elements_of,
    export,
    handle,
    initial_elements,
    is_null,
    parts_of,
    raw_bytes,
    read,
)
from linmem._wasm.outline import Outline
from linmem._wasm.recording import OPEN, Noted, Recording
from linmem._wasm.snapshot_file import StoredSnapshot
from linmem._wasm.start import Start
from linmem._wasm.state import NULL, NUMBERS, GlobalState, MemoryState, Reference, State, TableState

_WASMTIME = os.path.dirname(wasmtime.__file__) + os.sep
_numbers: weakref.WeakKeyDictionary[wasmtime.Store, int] = weakref.WeakKeyDictionary()
_ENTRIES = frozenset(("__call__", "__init__", "instantiate", "call_async"))


def check_context(store: Any) -> None:
    """Refuse an object that is neither a store nor a Caller. With such an object wasmtime would end the process."""
    if not callable(getattr(store, "_context", None)):
        check_type(store, wasmtime.Store, "store")


def check_store(store: Any, name: str, handle: ctypes.Structure) -> None:
    """Refuse the objects that `check_context` refuses, and a store that `handle` does not belong to."""
    check_context(store)
    if not isinstance(store, wasmtime.Store):
        return
    store = getattr(store, "_linmem_store", store)      # the store behind the one that a session hands out
    number = _numbers.get(store)
    if number is None:      # the handle of a new object of the store has the number of the store
        mark = wasmtime.Global(store, wasmtime.GlobalType(wasmtime.ValType.i32(), False), 0)
        number = _numbers[store] = _number_in(mark._global)
    if _number_in(handle) != number:
        raise ValueError(f"store must be the one that the {name} belongs to, got another")


def _number_in(handle: ctypes.Structure) -> int:
    return ctypes.c_uint64.from_buffer(handle).value        # store_id, which is the first field of every handle


class Snapshot(StoredSnapshot):
    """The memories, mutable globals and tables of an instance at one moment. Made by `take` and `open`.

    A snapshot holds the state that the instance exports, its own and imported state. `take` refuses other state. With
    ``partial=True`` it names the other state in `unseen` instead, as far as that state is known. If code of the module
    can drop segments, `unseen` says that dropped segments are not held. The state of the host is never named.

    A snapshot of an instance that `Prepared.instantiate` made can start new instances in any store. It can be saved to
    a file, pickled, and sent to another process.

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
    module : str or None
        The `Prepared.digest` of the module; None if the module was not made by `prepare`.
    """

    __slots__ = ("__weakref__", "_bound", "_parts", "_recorded", "_starts", "_state", "_stays", "_store", "globals",
                 "memories", "module", "tables", "unseen")

    memories: Mapping[str, Image]
    globals: tuple[str, ...]
    tables: tuple[str, ...]
    unseen: tuple[str, ...]
    module: str | None
    _store: weakref.ref[wasmtime.Store] | None      # of _parts; None: not taken in this process
    _parts: Parts                                   # of the instance that the snapshot was taken from
    _state: State | None
    _recorded: Noted                                # the working set, also of the record() blocks that have ended
    _stays: str                                     # if _state is None: why the snapshot cannot leave its store
    _bound: weakref.WeakKeyDictionary[wasmtime.Instance, Parts]     # of other instances
    _starts: weakref.WeakKeyDictionary[Any, Start]  # by the Prepared

    def __init__(self) -> None:
        raise TypeError("snapshots are made by Snapshot.take(store, instance) and Snapshot.open(path)")

    @classmethod
    def _new(cls, module: str | None, unseen: tuple[str, ...], state: State | None, stays: str = "") -> Snapshot:
        self = object.__new__(cls)
        self._store, self._parts, self._state, self._stays = None, Parts([], [], []), state, stays
        self._recorded = Noted(() if state is None else state.working_set)
        self._bound, self._starts = weakref.WeakKeyDictionary(), weakref.WeakKeyDictionary()
        self.memories, self.globals, self.tables, self.unseen, self.module = {}, (), (), unseen, module
        return self

    @classmethod
    def _from_state(cls, state: State) -> Snapshot:
        """A snapshot that was not taken in this process."""
        self = cls._new(state.module, state.unseen, state)
        images = {memory.index: memory.image for memory in state.memories}
        held = {*(("global", each.index) for each in state.globals), *(("table", each.index) for each in state.tables)}
        self.memories = {name: images[index] for kind, index, name in state.names
                         if kind == "memory" and index in images}
        names = [(kind, name) for kind, index, name in state.names if (kind, index) in held]
        self.globals = tuple(name for kind, name in names if kind == "global")
        self.tables = tuple(name for kind, name in names if kind == "table")
        return self

    def _travels(self) -> State:
        """The state, for use in any store; ValueError if the snapshot cannot leave its store."""
        if self._state is None:
            raise ValueError(f"the snapshot cannot leave the store that it was taken in: {self._stays}")
        return self._state._replace(working_set=self._recorded.all())

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Add the pages that instances touch to the working set, as a context manager.

        In the ``with`` block, serve some typical requests with instances that are started from this snapshot, on any
        thread. At the end of the block, each page of the snapshot's images that such an instance has read or written
        belongs to the working set. `save` stores the working set, and `open` then has the OS read these pages in few
        calls, so that the first request does not wait for each page.

        Blocks may overlap, on one thread or on several, and the working set is what all of them have noted together.
        What a block has noted counts also if the block raises. Instances that were started before the block do not
        count.

        Notes
        -----
        The block holds the memories of all its instances, also of those that are dropped, until it ends: they take
        room, count in budgets, and return to no pool.

        Where a page is read, the kernel maps the pages beside it too, if they are in the page cache: usually up to the
        next multiples of 64 KiB. linmem cannot tell these pages from pages that were read. Written pages are exact.
        What Python reads from a memory counts like what the guest reads, and `take` reads all of the memory.

        If an instance cannot map the image, for example because its creator is written in Python, it has read all of
        the image.

        Raises
        ------
        ValueError
            The module was not made by `prepare`.
        OSError
            This system does not tell which pages a guest touches. The text names the missing capability, as in
            ``linmem info``. Or the pages of an image are private, for lack of descriptors or of room.
        PageError
            The OS refused to say which pages were touched. If the block itself raises, this is a `RuntimeWarning`.
        """
        recording = Recording(self, self._travels())
        raised = True
        try:
            OPEN.append(recording)
            yield
            raised = False
        finally:
            try:
                self._recorded.add(recording.end())
            except OSError as error:
                if not raised:
                    raise
                warnings.warn(f"no working set was recorded: {error}", RuntimeWarning, stacklevel=3)
            finally:
                # A forked child has removed those of other threads. Without a GIL, `in` could miss the recording while
                # another thread removes its own.
                try:
                    OPEN.remove(recording)
                except ValueError:
                    pass

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
            globals and tables that refer to objects, or to functions that the module neither exports nor has as
            elements, for example functions of the host.

        Raises
        ------
        ValueError
            If there is such state and `partial` is False, if an instance of a module that was not prepared exports
            no state, or if the store is closed.
        RuntimeError
            If a call into the store is running on this thread.
        """
        if type(instance).__module__.startswith("wasmtime.component."):
            raise TypeError("instance must be a wasmtime.Instance, got an instance of a component: its globals and"
                            " tables cannot be reached")
        check_type(instance, wasmtime.Instance, "instance")
        check_flag(partial, "partial")
        context = _idle(store, "taken")
        check_store(store, "instance", instance._instance)
        prepared = getattr(instance, "_linmem_prepared", None)
        outline = None if prepared is None else prepared.outline
        digest = None if prepared is None else prepared.digest
        taken = _Taken(store, context, instance, outline, partial)
        state = None
        if prepared is None or outline is None:
            if not (partial or taken.memories or taken.globals):
                raise ValueError("the instance exports no memory and no mutable global, and what its module hides is"
                                 " not known: make it by prepare(..., expose=True)")
            reason = ("the module was not made by prepare" if prepared is None else
                      "the module uses what linmem does not know")
            taken.unseen.append(f"what it does not export: it is not known, since {reason}")
            taken.stays = f"its state is not all known, since {reason}"
        elif not taken.stays:
            memories, globals, tables = taken.memory_states, taken.global_states, taken.table_states
            state = State(
                prepared.digest, tuple(memories[index] for index in sorted(memories)),
                tuple(globals[index] for index in sorted(globals)), tuple(tables[index] for index in sorted(tables)),
                unseen=tuple(taken.unseen),
                names=tuple((kind, index, name) for name, kind, index in outline.names if index in taken.held(kind)))
        self = cls._new(digest, tuple(taken.unseen), state, taken.stays)
        self._store, self._parts = weakref.ref(store), taken.parts
        self.memories, self.globals, self.tables = taken.memories, tuple(taken.globals), tuple(taken.tables)
        return self

    def restore(self, store: wasmtime.Store, instance: wasmtime.Instance | None = None, *,
                zero_grown: bool = False) -> None:
        """Put back the state of an instance, completely or not at all.

        The time grows with the number of pages that changed since the snapshot. All elements of tables are written.

        A memory that has grown since the snapshot is refused. The memory cannot shrink, so the allocator of the guest
        would know the old size only, and would grow the memory again after each restore. Make a new instance instead.

        Parameters
        ----------
        store : wasmtime.Store
            The store of the instance. No call into the store may be running.
        instance : wasmtime.Instance, optional
            An instance of the same module that `Prepared.instantiate` made, in any store; for example, one that was
            started from the snapshot. By default the instance that the snapshot was taken from.
        zero_grown : bool
            Accept memories that have grown: they keep their size, and their new bytes are zeroed.

        Raises
        ------
        ValueError
            If the instance is of another module, if the store is another one or is closed, if a memory has grown, or
            if a table was resized.
        OwnedError, TypeError
            If a memory cannot be restored now; as for `Memory.restore`.
        RuntimeError
            If a call into the store is running on this thread.
        """
        check_flag(zero_grown, "zero_grown")
        if instance is None and (self._store is None or self._store() is not store):
            why = "has no instance of its own" if self._store is None else "was taken in another store"
            raise ValueError(f"the snapshot {why}: name the instance that shall get its state, with instance=")
        context = _idle(store, "restored")
        parts = self._parts if instance is None else self._parts_of(store, context, instance)
        for held in parts.tables:
            size = held.table.size(store)
            if size != held.size:
                raise ValueError(f"exported table {held.name!r} had {held.size} elements and has {size}, and a table"
                                 " cannot shrink: make a new instance")
        memories, images = [], []
        for name, memory, size, image in parts.memories:
            found = behind(store, memory)
            assert found is not None        # the store keeps its memories
            memories.append(found)
            images.append(image)
            present = found.byte_size()
            if present < size:
                raise ValueError(f"exported memory {name!r} has {present} bytes and had {size} in the snapshot: make a"
                                 " new instance with start=")
            if present > size and not zero_grown:
                raise ValueError(f"exported memory {name!r} has grown from {size} to {present} bytes, and the"
                                 " restored guest would not know: make a new instance, or pass zero_grown=True")
        parts.write(context, memories, images)

    def _parts_of(self, store: wasmtime.Store, context: Any, instance: wasmtime.Instance) -> Parts:
        """The parts of another instance."""
        check_type(instance, wasmtime.Instance, "instance")
        check_store(store, "instance", instance._instance)
        found = self._bound.get(instance)
        if found is None:
            state = self._travels()
            prepared = getattr(instance, "_linmem_prepared", None)
            if prepared is None or prepared.outline is None or prepared.digest != state.module:
                of = "a module that was not prepared" if prepared is None else f"the module {prepared.digest[:16]}..."
                raise ValueError(f"instance must be of the module of the snapshot ({state.module[:16]}...), made by"
                                 f" Prepared.instantiate, got an instance of {of}")
            check_state(prepared.outline, state)
            found = parts_of(store, context, instance, prepared.outline, state, every_element=True)
            found.check_values(context)
            self._bound[instance] = found
        return found

    def __repr__(self) -> str:
        return f"<linmem.wasmtime.Snapshot: {len(self.memories)} memories, {len(self.globals)} globals>"


class _Taken:
    """What `take` finds in an instance."""

    def __init__(self, store: wasmtime.Store, context: Any, instance: wasmtime.Instance, outline: Outline | None,
                 partial: bool) -> None:
        self.store, self.context, self.outline, self.partial = store, context, outline, partial
        self.parts = Parts([], [], [])
        self.memories: dict[str, Image] = {}
        self.globals: list[str] = []
        self.tables: list[str] = []
        self.unseen = _hidden(outline, partial)
        self.stays = ""                     # why the state cannot leave the store
        self.memory_states: dict[int, MemoryState] = {}
        self.global_states: dict[int, GlobalState] = {}
        self.table_states: dict[int, TableState] = {}
        self.known: dict[int, Image] = {}   # by base: one memory may be exported under several names
        self.functions = None if outline is None else Functions(context, instance, outline)
        for name, index, thing in _exports(store, context, instance, outline):
            if isinstance(thing, (wasmtime.Memory, wasmtime.SharedMemory)):
                self.memory(name, index, thing)
            elif isinstance(thing, wasmtime.Table):
                self.table(name, index, thing)
            elif isinstance(thing, wasmtime.Global):
                self.value(name, index, thing)

    def held(self, kind: str) -> Container[int]:
        states: dict[str, Mapping[int, object]] = {
            "memory": self.memory_states, "global": self.global_states, "table": self.table_states}
        return states[kind]

    def refuse(self, text: str) -> None:
        if not self.partial:
            raise ValueError(f"{text}, which a snapshot cannot hold: partial=True takes the rest")
        self.unseen.append(text)

    def memory(self, name: str, index: int, thing: Any) -> None:
        memory = behind(self.store, thing)
        if memory is None:
            self.refuse(f"exported memory {name!r} is not linmem's")
            return
        base = memory.as_ptr()
        if base not in self.known:
            image = self.known[base] = memory.snapshot()
            self.parts.memories.append(HeldMemory(name, thing, image.size, image))
        image = self.memories[name] = self.known[base]
        self.memory_states[index] = MemoryState(index, image.size, image)

    def value(self, name: str, index: int, thing: Any) -> None:
        value = None if self.is_unreadable(name) else read(self.context, ffi.wasmtime_global_get, handle(thing))
        if value is None:
            self.refuse(f"mutable global {name!r} is a reference to an object")
            return
        kind = KIND_NAMES.get(value.kind, "null")
        content: bytes | Reference | None = None
        if kind in NUMBERS:
            content = raw_bytes(value, NUMBERS[kind])
        else:
            content = self.name_of(value)
            if content is None and not self.may_lack_names(f"global {name!r}"):
                self.refuse(f"mutable global {name!r} refers to a function that has no name in the module")
                return
        if content is not None:
            self.global_states[index] = GlobalState(index, kind, content)
        self.parts.globals.append(HeldGlobal(name, handle(thing), ctypes.byref(value)))
        self.globals.append(name)

    def table(self, name: str, index: int, thing: Any) -> None:
        size = thing.size(self.store)
        # Without an outline the elements may be continuations. The C API aborts when it reads one.
        elements = None if self.outline is None or self.is_unreadable(name) else elements_of(self.context, thing, size)
        if self.outline is None:
            self.unseen.append(f"the elements of exported table {name!r}")
        elif elements is None:
            self.refuse(f"exported table {name!r} has references to objects")
        else:
            names = [self.name_of(value) for value in elements]
            if None not in names:
                initial = initial_elements(self.outline, index, size)
                self.table_states[index] = TableState(index, size, tuple(
                    (element, found) for element, (found, first) in enumerate(zip(names, initial, strict=True))
                    if found is not None and found != first))
            elif not self.may_lack_names(f"table {name!r}"):
                self.refuse(f"element {names.index(None)} of exported table {name!r} refers to a function that has no"
                            " name in the module")
                elements = None
        self.parts.tables.append(HeldTable(name, thing, size, list(enumerate(map(ctypes.byref, elements or ())))))
        if elements is not None:
            self.tables.append(name)

    def is_unreadable(self, name: str) -> bool:
        return self.outline is not None and name in self.outline.unreadable

    def name_of(self, value: Any) -> Reference | None:
        """The name of a reference. Without an outline there are no names."""
        return NULL if is_null(value) else None if self.functions is None else self.functions.name(value)

    def may_lack_names(self, what: str) -> bool:
        """Whether functions of the module itself lack names. Then the state of `what` cannot leave the store."""
        lacks = self.outline is None or bool(self.outline.functions and not self.outline.function_table)
        if lacks:
            self.stays = f"{what} refers to functions that have no name: prepare the module with expose=True"
        return lacks


def _exports(store: wasmtime.Store, context: Any, instance: wasmtime.Instance,
             outline: Outline | None) -> Iterator[tuple[str, int, Any]]:
    """The name, the index (if it is known) and the object of each memory, mutable global and table."""
    if outline is None:
        for name, thing in instance.exports(store).items():
            if not isinstance(thing, wasmtime.Global) or thing.type(store).mutable:
                yield name, -1, thing
        return
    for name, kind, index in outline.names:
        if kind != "global" or outline.global_types[index].mutable:
            yield name, index, export(context, instance, name)


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
    dropped = [f"which of {count} passive {kind} segments were dropped"
               for kind, count in zip(("data", "element"), outline.passive, strict=True)
               if count and kind in outline.drops]
    return own + imported + dropped


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
