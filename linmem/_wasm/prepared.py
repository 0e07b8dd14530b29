"""`prepare` and `Prepared`: modules and components whose memories start from images of their data."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import wasmtime

from linmem._core import bridge as _bridge
from linmem._core.arguments import check_flag, check_path
from linmem._core.memory import Image
from linmem._files.image_file import write_image
from linmem._wasm import outline as state
from linmem._wasm.compiled import cached, compiled
from linmem._wasm.component import HoistedComponent, hoist_component, is_component, with_modules
from linmem._wasm.growth_traps import with_growth_traps
from linmem._wasm.image_cache import Cache
from linmem._wasm.install import check_type, checked_creator, wasmtime_version
from linmem._wasm.instance_state import behind
from linmem._wasm.known_files import FORMAT
from linmem._wasm.module import START, Module
from linmem._wasm.offered import Offered, described
from linmem._wasm.reader import Malformed, Unknown
from linmem._wasm.recording import OPEN
from linmem._wasm.segments import Hoisted, Run, hoist, without_start
from linmem._wasm.snapshot import Snapshot, check_context
from linmem._wasm.start import Start
from linmem.errors import PageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import overload

    from wasmtime import component
    from wasmtime._exportable import AsExtern

    from linmem._core.arguments import AnyPath
    from linmem.abc import MemoryCreator

NOT_OURS = ("linmem.wasmtime.install(config) was not called for this engine, or the config uses the pooling"
            " allocation strategy (which ignores host creators)")

_ASKS: weakref.WeakKeyDictionary[wasmtime.Engine, bool] = weakref.WeakKeyDictionary()
_ImageEntry = tuple[Image | None, str | None]     # an image, and the entry of the cache that has it
_NO_ROOM = PageError, OverflowError     # for an image, for example of segments that are very far apart
_alive: weakref.WeakSet[Prepared] = weakref.WeakSet()       # all, because each has a lock


class Prepared(Offered):
    """A module or component whose data come from images. Made by `prepare`; immutable and usable from any thread.

    As long as `skipped` is empty, an instance costs no more fuel, and checks no more epoch deadlines, than an instance
    of the original module in an engine without linmem. There is one exception. If the module fills an imported table,
    wasmtime counts one unit of fuel for each element segment and one for each of its elements. In plain wasmtime it
    counts less if the module also has data. ``expose=True`` adds one such segment, with each function that references
    name. It costs fuel only if wasmtime fills a table by code: an imported one, or one of typed references.

    Attributes
    ----------
    engine : wasmtime.Engine
        The engine that the module was prepared for.
    module : wasmtime.Module or wasmtime.component.Component
        The module that is instantiated: its hoisted data segments are empty. Use it for its imports and exports. An
        instance that is not made by `instantiate` lacks the data.
    images : tuple
        For each memory that the module defines, an `Image` of its data, or None. For a component: for each memory of
        an instance, in the order in which wasmtime makes them. The tuple ends before the first core instance whose
        memories are not known.
    skipped : tuple of str
        Why data segments stayed in the module, or why `expose` did nothing; empty if all was done.
    added : frozenset of str
        The exports that ``expose=True`` added.
    outline : object or None
        What linmem knows of the state of instances, for its own use; None for a component, or if the module uses
        features that linmem does not know.
    digest : str
        SHA-256 of the binary that `prepare` was given (or made from text), as hexadecimal digits.
    """

    __slots__ = ("__weakref__", "_compile", "_entry", "_hoists", "_image_entries", "_lock", "_start_module", "added",
                 "digest", "engine", "images", "outline", "skipped")

    engine: wasmtime.Engine
    module: wasmtime.Module | Any           # Any: a Component, if a component was prepared
    images: tuple[Image | None, ...]
    skipped: tuple[str, ...]
    added: frozenset[str]
    outline: state.Outline | None
    digest: str
    _hoists: bool                                       # of a component: `module` was made of what was hoisted
    _entry: str | None                                  # of the cache: that of `module`; None: it is not to be noted
    _image_entries: list[str | None]                    # of the cache: those of `images`
    _compile: Callable[[], wasmtime.Module] | None      # makes _start_module; None: it is made
    _start_module: Any                                  # the module that instances with start= are made of
    _lock: threading.Lock                               # of _compile

    def __init__(self) -> None:
        raise TypeError("a Prepared is made by linmem.wasmtime.prepare(engine, wasm)")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Prepared cannot be pickled or copied: it belongs to an engine of this process. In another"
                        " process, prepare() with the same cache= is quick")

    @classmethod
    def _of(cls, engine: wasmtime.Engine, module: wasmtime.Module | component.Component,
            images: Sequence[_ImageEntry], minima: Sequence[int], skipped: Sequence[str], digest: str, *,
            added: frozenset[str] = frozenset(), outline: state.Outline | None = None,
            compile_start: Callable[[], wasmtime.Module] | None = None, names: Sequence[str] | None = None,
            complete: bool, is_alone: bool, hoists: bool = False, entry: str | None) -> Prepared:
        self = object.__new__(cls)
        self.images = tuple(image for image, _ in images)
        Offered.__init__(self, module, self.images, minima, names, complete=complete, is_alone=is_alone)
        self.engine = engine
        self.skipped = tuple(skipped)
        self.added = added
        self.outline = outline
        self.digest = digest
        self._hoists, self._entry, self._image_entries = hoists, entry, [path for _, path in images]
        self._start_module = module
        self._compile, self._lock = compile_start, threading.Lock()
        _alive.add(self)
        return self

    if TYPE_CHECKING:
        @overload
        def instantiate(self, store: wasmtime.Store, imports: Sequence[AsExtern] | wasmtime.Linker = (), *,
                        start: Snapshot | None = None, domain: str | None = None,
                        creator: MemoryCreator | None = None) -> wasmtime.Instance: ...
        @overload
        def instantiate(self, store: wasmtime.Store, imports: component.Linker, *, domain: str | None = None,
                        creator: MemoryCreator | None = None) -> component.Instance: ...

    def instantiate(self, store: wasmtime.Store,
                    imports: Sequence[AsExtern] | wasmtime.Linker | component.Linker = (), *,
                    start: Snapshot | None = None, domain: str | None = None,
                    creator: MemoryCreator | None = None) -> wasmtime.Instance | Any:
        """Make an instance whose memories share the pages of the images until they write to them.

        With ``start=snapshot`` the instance has the state of the snapshot: its memories share the pages of the
        snapshot's images, and its globals and tables have the snapshot's values. No code of the module runs: neither
        the start function nor a data segment takes effect. No fuel is used and no deadline is checked, with one
        exception: wasmtime 50 itself has start-up code, of a few units of fuel, for globals that hold references or
        are computed, and for passive element segments. Imported memories, mutable globals and tables get the
        snapshot's content, too.

        Parameters
        ----------
        store : wasmtime.Store
            A store of the engine that the module was prepared for.
        imports : sequence, wasmtime.Linker or wasmtime.component.Linker
            As for ``wasmtime.Instance``; or a linker that defines them. For a component, a linker of components; it
            may be left out if the component imports nothing.
        start : Snapshot, optional
            A snapshot of an instance of the same module, from any store of any engine. If the module has a start
            function, or data that `skipped` names, it is compiled once more at the first use. Not for a component.
        domain : str, optional
            A pool never gives this guest pages of another domain; as for `linmem.create`.
        creator : MemoryCreator, optional
            Makes the memories of this instance, also its shared memories; by default the creator of
            `linmem.wasmtime.use`, or the one that `install` gave to the engine. The memories have the reservation and
            the guard of the engine. If wasmtime makes the GC heap of the store during this call, the heap comes from
            this creator, too. The same holds for each instance that a host function makes during this call, unless the
            host function calls `instantiate` or `new_memory`. The memories keep their creator, and its budget, as long
            as they live. Imported memories keep their creators (`new_memory` has this argument, too).

        Returns
        -------
        wasmtime.Instance or wasmtime.component.Instance

        Raises
        ------
        wasmtime.WasmtimeError, wasmtime.Trap
            As ``wasmtime.Instance`` or ``wasmtime.component.Linker`` raises for the original module or component.
        RuntimeError
            If a signal handler or a finalizer (``__del__``) interrupts this method, and makes an instance that was not
            prepared. linmem cannot tell its memories from those of this instance. So the data of this instance may be
            in that one. This is not noticed if the module has a start function, or if a core module of the host is in
            the component.
        ValueError
            If `start` is given for a component, if `start` is a snapshot of another module, if it cannot leave its
            store, if it has state that this module does not export (prepare it with ``expose=True``), or if an
            imported memory or table is larger than in the snapshot, or is not linmem's; or if a pool in `creator` has
            an ``image=``.
        GrowError
            If the store, or the maximum of an import, does not let a memory or a table have the size that it has in
            the snapshot.
        """
        check_context(store)
        native = None if creator is None else checked_creator(creator)
        module, offer, plan = self.module, self._offer, None
        if start is not None:
            if not isinstance(start, Snapshot):
                raise TypeError(f"start must be a Snapshot, got {type(start).__name__}")
            plan = start._starts.get(self) or self._plan(start)
            module, offer = self._start_module, plan.offer
        instance = self._checked(offer.making(native, domain, *self._call(imports, store, module)))
        if plan is not None:
            plan.finish(store, instance)
            for recording in list(OPEN) if OPEN else ():
                if recording.snapshot is start:
                    instance._linmem_recorded = True
                    plan.watch(store, instance, recording)
        instance._linmem_prepared = self
        return instance

    def _call(self, imports: Any, store: wasmtime.Store, module: Any) -> tuple[Any, ...]:
        """The function of wasmtime-py that makes an instance, and its arguments."""
        if self._names is not None:
            linker = component_api().Linker
            if not isinstance(imports, linker):
                if imports != ():
                    raise TypeError("imports must be a wasmtime.component.Linker, because a component was prepared, got"
                                    f" {type(imports).__module__}.{type(imports).__name__}")
                imports = linker(self.engine)
            return linker.instantiate, imports, store, module
        if isinstance(imports, wasmtime.Linker):
            return wasmtime.Linker.instantiate, imports, store, module
        try:
            return wasmtime.Instance, store, module, list(imports)
        except TypeError:
            raise TypeError("imports must be a sequence or a wasmtime.Linker, got"
                            f" {type(imports).__module__}.{type(imports).__name__}") from None

    def _memory_names(self) -> list[tuple[str, ...]]:
        """The names of each memory in `_places`: of a module the exports, if there are any."""
        if self._names is not None:
            return super()._memory_names()
        imported, exports = (0, ()) if self.outline is None else (self.outline.imported_memories, self.outline.names)
        names: list[tuple[str, ...]] = [()] * len(self._places)
        for name, kind, index in exports:
            if kind == "memory" and index >= imported:
                names[index - imported] += (name,)
        taken = {name for each in names for name in each}
        for index, exported in enumerate(names):
            name = f"memory {imported + index}"
            while not exported and name in taken:
                name = f"hidden {name}"
            names[index] = exported or (name,)
        return names

    def _plan(self, snapshot: Snapshot) -> Start:
        """How instances of this module start from the snapshot. Also compiles the module that they are made of."""
        if self._names is not None:
            raise ValueError("start must be None for a component: a snapshot holds the state of a core module")
        found = snapshot._travels()
        if found.module != self.digest:
            raise ValueError(f"start is a snapshot of the module {found.module[:16]}..., and this is the module"
                             f" {self.digest[:16]}...")
        if self.outline is None:
            raise ValueError("start cannot be used: this module uses what linmem does not know")
        own = sum(each.index >= self.outline.imported_memories for each in found.memories)
        missing = self.outline.computed_tables() - {each.index for each in found.tables}
        if missing or (self.skipped and own < len(self.images)):
            raise ValueError("the snapshot lacks a memory or a table that instantiation fills with code, which does not"
                             " run for start=: prepare the module with expose=True")
        made = Start(self.outline, found, self._places)
        with self._lock:
            if self._compile is not None:
                self._start_module = self._compile()
                self._compile = None
        snapshot._starts[self] = made
        return made

    def _described(self) -> tuple[list[str], str] | None:
        """The entries of the cache that this program is made of, and a line for `from_description`; None: do not note
        them."""
        missing = any(image and not entry for image, entry in zip(self.images, self._image_entries, strict=True))
        found = None if missing or self._entry is None else described(self, self._image_entries)
        return None if found is None or self._entry is None else ([self._entry, *found[0]], found[1])

    def __repr__(self) -> str:
        return f"<linmem.wasmtime.Prepared: {sum(image is not None for image in self.images)} images>"


def _renew_locks() -> None:
    for prepared in list(_alive):
        prepared._lock = threading.Lock()


if hasattr(os, "register_at_fork"):     # else a lock that another thread holds would stay locked in a forked child
    os.register_at_fork(after_in_child=_renew_locks)


def prepare(engine: wasmtime.Engine, wasm: str | bytes | bytearray, *,
            cache: AnyPath | None = None, expose: bool = False,
            trap_on_refused: bool = False) -> Prepared:
    """Compile a module or a component such that its instances start from images of its data.

    The active data segments of the module's own memories are taken out of the module and put into an `Image` for each
    memory. The memories of an instance that `Prepared.instantiate` makes share the pages of the images until they
    write to them; wasmtime would copy all data each time. Otherwise the instances behave as before. Segments whose
    removal would change that stay in the module. All segments stay if the OS has no room for the images.
    `Prepared.skipped` gives the reasons.

    The same is done for each core module inside a component, also in nested components. The data stays if it is not
    known at which point of an instantiation wasmtime makes the memories of the module, or if the component exports the
    module.

    Parameters
    ----------
    engine : wasmtime.Engine
        An engine of a config that linmem is installed in.
    wasm : bytes or str
        A core module or a component in the binary format, or its text.
    cache : path, optional
        A directory for the images and for wasmtime's compiled module, made if it is missing. The files in it are run
        as code, so the directory must belong to the user, and other users must not be able to write to it. Processes
        that use one cache share the pages of the images.
    expose : bool
        Also export the memories, mutable globals and tables that the module does not export, own and imported, so
        that a `Snapshot` can hold them. `Prepared.added` has their names. The added table of functions, if there is
        one, counts in ``Store.set_limits(tables=, table_elements=)``. Refused for a component.
    trap_on_refused : bool
        A ``memory.grow`` of this module, or component, that would return -1 traps ("unreachable") instead. It does not
        matter what refused: a creator, the OS, ``Store.set_limits``, or the memory's maximum. `cause` returns the
        exception of a creator. Rust has ``StoreLimitsBuilder::trap_on_grow_failure``. A growth costs a few more units
        of fuel. Debug information (DWARF) and branch hints are left out, because their places in the code would be
        wrong. The `digest` does not depend on this option, so snapshots fit modules with and without it.

    Raises
    ------
    wasmtime.WasmtimeError
        If wasmtime refuses the module (or component), with wasmtime's own text; or if the creator of the engine
        refuses the memory that tests the engine.
    ValueError
        If the engine does not make its memories with linmem; if `expose` is set for a component; or if
        `trap_on_refused` is set, and the module has instructions or types that linmem does not know.
    PermissionError
        If other users may write to the directory of the cache.
    RuntimeError
        If this wasmtime-py has no components.
    """
    check_type(engine, wasmtime.Engine, "engine")
    if not isinstance(wasm, (str, bytes, bytearray)):
        raise TypeError(f"wasm must be bytes or str, got {type(wasm).__name__}")
    check_flag(expose, "expose")
    check_flag(trap_on_refused, "trap_on_refused")
    if cache is not None:
        cache = os.fsdecode(check_path(cache, "cache"))
    original = binary_of(wasm)
    if not makes_our_memories(engine):
        raise ValueError(f"the engine does not make its memories with linmem: {NOT_OURS}")
    digest = hashlib.sha256(original).hexdigest()
    if is_component(original):
        if expose:
            raise ValueError("expose must be False for a component: a component cannot export its memories and globals")
        component_api()
        directory = None if cache is None else Cache(cache)
        try:
            return _prepare_component(engine, original, directory, digest, trap_on_refused)
        except (ValueError, wasmtime.WasmtimeError):
            if trap_on_refused:
                component_api().Component(engine, original)     # refuses with the text that it has without the option
            raise
    if trap_on_refused:
        original = _with_growth_traps(engine, original)
    read = Module(original)
    items: dict[int, list[bytes]] = {}
    added: frozenset[str] = frozenset()
    outline = None
    skipped = []
    try:
        if expose:
            items, added, outline = state.additions(read)
        else:
            outline = state.outline(read)
    except ValueError as error:     # malformed or unknown to linmem; wasmtime decides whether the module is valid
        if expose:
            skipped.append(f"nothing is exposed: {error}")
    try:
        hoisted = hoist(read)
    except Malformed as error:
        hoisted = Hoisted(original, [], [], [f"nothing is hoisted: {error}"], unknown=True)
    directory = None if cache is None else Cache(cache)
    images: list[_ImageEntry] = [(None, None)] * len(hoisted.images)
    is_lasting = True       # another run would prepare the same
    try:
        images = _images(hoisted.images, directory)
    except _NO_ROOM as error:
        hoisted = hoisted._replace(module=original, skipped=[_no_room(error)], active=True)
        is_lasting = False
    skipped += hoisted.skipped
    wasm = state.extended(hoisted.module, items)
    try:
        module, entry = compiled(engine, wasm, directory)
    except wasmtime.WasmtimeError as error:
        images, added, outline = [(None, None)] * len(images), frozenset(), None
        skipped = [f"nothing is hoisted or exposed, {_only_original('module', error)}"]
        module = None
    if module is None:      # if wasmtime refuses the original, too, the caller gets that refusal alone
        module, entry = compiled(engine, original, directory)
    compile_start = None
    if outline is not None and (hoisted.active or START in read.sections or outline.computed_tables()):
        compile_start = functools.partial(_compiled_for_start, engine, wasm, outline, directory)
    return Prepared._of(engine, module, images, hoisted.minima, skipped, digest, added=added, outline=outline,
                        compile_start=compile_start, complete=not hoisted.unknown,
                        is_alone=not hoisted.unknown and START not in read.sections,
                        entry=entry if is_lasting else None)


def _with_growth_traps(engine: wasmtime.Engine, wasm: bytes) -> bytes:
    try:
        wasmtime.Module.validate(engine, wasm)
    except wasmtime.WasmtimeError:
        wasmtime.Module(engine, wasm)       # refuses with the text that it has without the option
        raise
    with _growths_must_be_found("module"):
        return with_growth_traps(Module(wasm))


@contextlib.contextmanager
def _growths_must_be_found(kind: str) -> Iterator[None]:
    try:
        yield
    except (Unknown, Malformed) as reason:
        raise ValueError(f"trap_on_refused must be False for this {kind}, because linmem cannot find each memory.grow"
                         f" in it: {reason}") from None


def binary_of(wasm: str | bytes | bytearray) -> bytes:
    """The binary format of a module or a component, which may be given as text."""
    try:
        original = wasm.encode() if isinstance(wasm, str) else bytes(wasm)
    except UnicodeEncodeError as error:
        raise ValueError(f"wasm must be text that UTF-8 can encode: {error}") from None
    if isinstance(wasm, str) or original[:1] not in (b"", b"\0"):
        return bytes(wasmtime.wat2wasm(original))
    return original


def _prepare_component(engine: wasmtime.Engine, original: bytes, cache: Cache | None, digest: str,
                       trap_on_refused: bool) -> Prepared:
    kind = component_api().Component
    if trap_on_refused:
        with _growths_must_be_found("component"):
            original = with_modules(original, functools.partial(_with_growth_traps, engine))
    try:
        hoisted = hoist_component(original)
    except Malformed as error:
        hoisted = HoistedComponent(original, [], [], [], [], False, [f"nothing is hoisted: {error}"])
    none: list[tuple[Image | None, str | None]] = [(None, None)] * len(hoisted.images)
    images = none
    wasm, skipped, component, is_lasting = hoisted.component, hoisted.skipped, None, True
    try:
        images = _images(hoisted.images, cache)
    except _NO_ROOM as error:
        wasm, skipped, is_lasting = original, [_no_room(error)], False
    if wasm is not original:
        try:
            component, entry = compiled(engine, wasm, cache, kind)
        except wasmtime.WasmtimeError as error:
            images = [(None, None)] * len(images)
            skipped = [f"nothing is hoisted, {_only_original('component', error)}"]
    hoists = component is not None
    if component is None:
        component, entry = compiled(engine, original, cache, kind)
    return Prepared._of(engine, component, [images[index] for index in hoisted.order],
                        [hoisted.minima[index] for index in hoisted.order], skipped, digest, names=hoisted.names,
                        complete=hoisted.complete, is_alone=hoisted.complete, hoists=hoists,
                        entry=entry if is_lasting else None)


def _no_room(error: Exception) -> str:
    return f"nothing is hoisted, there is no room for an image: {error}"


def _only_original(kind: str, error: Exception) -> str:
    return f"wasmtime takes the {kind} only as it is: {error}"


def component_api() -> Any:
    """The module ``wasmtime.component``."""
    try:
        return importlib.import_module("wasmtime.component")
    except ImportError as error:
        raise RuntimeError(f"wasmtime {wasmtime_version()} has no components: {error}") from None


def makes_our_memories(engine: wasmtime.Engine) -> bool:
    """Whether linmem makes the memories of the engine; tried once for each engine."""
    found = _ASKS.get(engine)
    if found is None:
        store = wasmtime.Store(engine)
        module = wasmtime.Module(engine, '(module (memory (export "memory") 0))')
        # The engine's own creator makes this memory, also while another creator was chosen.
        choice = _bridge.choose(None)
        try:
            instance = wasmtime.Instance(store, module, [])
        finally:
            _bridge.release_choice(choice)
        memory = instance.exports(store)["memory"]
        assert isinstance(memory, wasmtime.Memory)
        found = _ASKS[engine] = behind(store, memory) is not None
        store.close()
    return found


def _images(contents: Sequence[Sequence[Run] | None], cache: Cache | None) -> list[_ImageEntry]:
    return [(None, None) if runs is None else _image(runs, cache) for runs in contents]


def _image(runs: Sequence[Run], cache: Cache | None) -> _ImageEntry:
    start, (last, data) = runs[0][0], runs[-1]
    make = functools.partial(Image.from_pieces, runs, last + len(data) - start, start)
    if cache is None:
        return make(), None
    digest = hashlib.sha256(f"linmem {FORMAT}, image\n".encode())
    for offset, data in runs:
        digest.update(f"{offset} {len(data)}\n".encode())
        digest.update(data)
    return cached(cache, digest.hexdigest(), ".image", Image.open, make, write_image)


def _compiled_for_start(engine: wasmtime.Engine, wasm: bytes, outline: state.Outline,
                        cache: Cache | None) -> wasmtime.Module:
    module: wasmtime.Module = compiled(engine, without_start(wasm, outline), cache)[0]
    return module
