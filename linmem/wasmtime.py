"""linmem in a wasmtime engine: `install`, `use`, `linear_memory`, `memories`, `new_memory` and `patch`.

>>> import wasmtime, linmem.wasmtime
>>> config = wasmtime.Config()
>>> linmem.wasmtime.install(config)
>>> engine = wasmtime.Engine(config)        # every memory of this engine is linmem's
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from types import TracebackType
from typing import TYPE_CHECKING

try:
    import wasmtime
except ImportError as _error:
    raise ImportError("linmem.wasmtime needs wasmtime-py: pip install 'linmem[wasmtime]'") from _error

from linmem._core import bridge as _bridge
from linmem._core.memory import Memory
from linmem._core.pool import PoolingCreator
from linmem._wasm.cause import cause
from linmem._wasm.install import check_type, checked_creator, install
from linmem._wasm.instance_state import behind
from linmem._wasm.patch import Patch
from linmem._wasm.prepared import NOT_OURS, Prepared, prepare
from linmem._wasm.sessions import Sessions
from linmem._wasm.snapshot import Snapshot, check_store
from linmem.abc import MemoryCreator

if TYPE_CHECKING:
    from wasmtime import component
    from wasmtime._exportable import AsExtern  # the type of what `exports()` gives

__all__ = ["Prepared", "Sessions", "Snapshot", "cause", "install", "linear_memory", "memories", "new_memory", "patch",
           "prepare", "use"]

# The modules that new_memory() used last, by their text. Each module takes memory and address space.
_MAX_MODULES = 8            # of an engine
_modules: weakref.WeakKeyDictionary[wasmtime.Engine, dict[str, wasmtime.Module]] = weakref.WeakKeyDictionary()
_modules_lock = threading.Lock()


def _renew_lock() -> None:
    global _modules_lock
    _modules_lock = threading.Lock()


if hasattr(os, "register_at_fork"):     # else a lock that another thread holds would stay locked in a forked child
    os.register_at_fork(after_in_child=_renew_lock)


def patch(creator: MemoryCreator | None = None) -> Patch:
    """Install linmem in every engine that is made from now on, also by libraries that make their own ``Engine()``.

    Use it in a ``with`` block, or call the `undo` of the result. Classes of wasmtime that a library imported before are
    patched, too. An engine whose config was given to `install` keeps that creator. Modules and components that are
    compiled in the other engines are prepared (`prepare`, without a cache and without ``expose``), so their data starts
    as images that instances share until they write to them.

    Patches may overlap, also on several threads. The newest patch that is not undone gives its creator to a new engine.
    After the last `undo`, the methods of wasmtime-py are the same objects as before.

    Parameters
    ----------
    creator : MemoryCreator, optional
        By default a new `PoolingCreator`. All the engines share the creator.

    Returns
    -------
    Patch
        A context manager with the method `undo` and the attribute `creator`.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As for `install`.

    Notes
    -----
    Engines, modules and components that were made under a patch stay usable when it is undone. Then, and for
    `serialize`, ``Linker.define_module`` and ``Linker.instantiate_pre``, wasmtime compiles the original once more; the
    data of these instances is copied. An index of ``Component.get_export_index`` is of no use for these instances if
    it was made under the patch. For this each module keeps its bytes, and its engine must stay open. A module that was
    deserialized is not prepared. An engine with the pooling allocation strategy ignores creators, and its modules are
    not prepared.
    """
    creator = PoolingCreator() if creator is None else creator
    install(wasmtime.Config(), creator)     # refuses a wrong creator
    made = Patch(creator, install)
    try:
        made._begin()
    except BaseException:       # a signal handler raised
        made.undo()
        raise
    return made


class use:
    """Let the memories that are made in the ``with`` block come from `creator`, on engines that linmem is installed in.

    The block counts for the running thread or task, as a context variable does: tasks that asyncio starts in the block
    and ``asyncio.to_thread`` inherit it, also if they go on after the block. A new thread does not. So one engine, and
    one compilation, serves many tenants, each with a budget of its own.

    The memories keep their creator as long as they live: they grow under its budget also after the block. Blocks may be
    nested; the innermost one counts. Do not `yield` in the block: the caller of a generator would be in the block, too.
    The argument ``creator=`` of `Prepared.instantiate`, `Sessions` and `new_memory` wins over the block. `Sessions`
    without the argument use the creator of the engine, because they hand an instance to one user after the other.

    Parameters
    ----------
    creator : MemoryCreator

    Raises
    ------
    TypeError
        If `creator` is not a creator.
    ValueError
        If a pool in `creator` has an ``image=``.
    RuntimeError
        If the same object is used for a second ``with`` block.
    """

    __slots__ = ("_choice", "_unused")

    def __init__(self, creator: MemoryCreator) -> None:
        self._unused = [checked_creator(creator)]       # one pop() asks for the creator and takes it, on any thread

    def __enter__(self) -> None:
        try:
            native = self._unused.pop()
        except IndexError:
            raise RuntimeError("this object has begun a block already: call use() for each `with` block") from None
        self._choice = _bridge.choose(native)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        _bridge.release_choice(self._choice)


def linear_memory(store: wasmtime.Store | wasmtime.Caller, memory: AsExtern) -> Memory:
    """The linmem memory behind a wasm memory.

    Views of it stay valid after ``memory.grow`` and ``store.close()``. While the store owns the memory, it grows by
    ``wasmtime.Memory.grow``, and `Memory.grow_to` raises `OwnedError`. `Memory.close` closes only the handle.

    Parameters
    ----------
    store : wasmtime.Store
        The store that `memory` belongs to, or a Caller of it. Not used for a shared memory. With a Caller of another
        store, wasmtime ends the process.
    memory : wasmtime.Memory or wasmtime.SharedMemory

    Raises
    ------
    TypeError
        If `memory` is of another type.
    ValueError
        If linmem does not own the memory (the message lists the possible reasons), or if the memory belongs to
        another store.
    """
    if not isinstance(memory, (wasmtime.Memory, wasmtime.SharedMemory)):
        raise TypeError(f"memory must be a wasmtime.Memory or a wasmtime.SharedMemory, got {type(memory).__name__}")
    if isinstance(memory, wasmtime.Memory):
        check_store(store, "memory", memory._memory)
    found = behind(store, memory)
    if found is None:
        raise ValueError(f"memory is not linmem's: {NOT_OURS}, or the memory was made by wasmtime.Memory() or"
                         " wasmtime.SharedMemory() (use linmem.wasmtime.new_memory)")
    return found


def memories(instance: wasmtime.Instance | component.Instance, store: wasmtime.Store | None = None
             ) -> dict[str, Memory]:
    """The linmem memories of an instance, by name.

    For an instance that `Prepared.instantiate` made, these are all memories that wasmtime made for it, exported or not.
    An imported memory is not among them. The names are:

    - of a memory that a module exports: the names of its exports
    - of another memory of a module: ``"memory 1"``, with its index in the module
    - of a memory of a component: ``"module 2, memory 0"``. The core modules are numbered in the order of the file,
      those of nested components included. If a module has several instances: ``"module 2, instance 1, memory 0"``
    - of the heap of the garbage collector, which wasmtime makes for the first instance in a store that needs a heap:
      ``"GC heap"``
    - of a memory that linmem cannot assign, because a core module of the host is in the component, or because a module
      has features that linmem does not know: ``"memory 3"``, with its number among the memories of the instance

    For any other instance, these are the memories that the instance exports, imported memories too, as far as they are
    linmem's. A component exports no memories.

    Parameters
    ----------
    instance : wasmtime.Instance or wasmtime.component.Instance
    store : wasmtime.Store, optional
        The store of the instance, or a Caller of it. Needed if `Prepared.instantiate` did not make the instance. Then
        wasmtime ends the process if it gets a Caller of another store.

    Returns
    -------
    dict
        Its views stay valid as those of `linear_memory`. The dict is empty once the store is closed.

    Raises
    ------
    TypeError
        If `instance` is of another type, or if the store is needed and missing.
    ValueError
        If the instance belongs to another store.
    """
    api = sys.modules.get("wasmtime.component")
    if not isinstance(instance, (wasmtime.Instance, *([] if api is None else [api.Instance]))):
        raise TypeError("instance must be a wasmtime.Instance or a wasmtime.component.Instance, got"
                        f" {type(instance).__name__}")
    if store is not None:
        check_store(store, "instance", instance._instance)
    made = getattr(instance, "_linmem_made", None)
    if made is not None:
        prepared: Prepared = instance._linmem_prepared      # type: ignore[union-attr]
        return prepared._memories(*made)
    if not isinstance(instance, wasmtime.Instance):
        return {}
    if store is None:
        raise TypeError("store must be the store of the instance, because Prepared.instantiate did not make the"
                        " instance, got None")
    exported = [(name, each) for name, each in instance.exports(store).items()
                if isinstance(each, (wasmtime.Memory, wasmtime.SharedMemory))]
    return {name: found for name, each in exported if (found := behind(store, each)) is not None}


def new_memory(store: wasmtime.Store, memory_type: wasmtime.MemoryType, *,
               domain: str | None = None,
               creator: MemoryCreator | None = None) -> wasmtime.Memory | wasmtime.SharedMemory:
    """Make a wasm memory that linmem owns, for modules that import a memory.

    ``wasmtime.Memory(store, ty)`` does not use the creator, but a module that exports a memory does. So this function
    makes an instance of such a module. The memory exists as long as the store.

    Parameters
    ----------
    store : wasmtime.Store
    memory_type : wasmtime.MemoryType
    domain : str, optional
        A pool never gives this memory pages of another domain; as for `linmem.create`.
    creator : MemoryCreator, optional
        Makes the memory; by default the creator that `install` gave to the engine.

    Raises
    ------
    ValueError
        If the store's engine does not make its memories with linmem, or if a pool in `creator` has an ``image=``.
    wasmtime.WasmtimeError
        If the memory cannot be made; the exception has the creator's text.
    """
    check_type(store, wasmtime.Store, "store")
    check_type(memory_type, wasmtime.MemoryType, "memory_type")
    native = None if creator is None else checked_creator(creator)
    limits = memory_type.limits
    words = ["i64"] if memory_type.is_64 else []
    words += [str(bound) for bound in (limits.min, limits.max) if bound is not None]
    words += ["shared"] if memory_type.is_shared else []
    page_size = getattr(memory_type, "page_size", 65536)
    words += [] if page_size == 65536 else [f"(pagesize {page_size})"]
    wat = f'(module (memory (export "memory") {" ".join(words)}))'
    with _modules_lock:
        module = _modules.get(store.engine, {}).get(wat)
    if module is None:
        module = wasmtime.Module(store.engine, wat)
    with _modules_lock:
        modules = _modules.setdefault(store.engine, {})
        modules.pop(wat, None)
        modules[wat] = module               # the module used last is at the end
        while len(modules) > _MAX_MODULES:
            del modules[next(iter(modules))]
    instance = _bridge.making(native, domain, wasmtime.Instance, store, module, ())
    memory = instance.exports(store)["memory"]
    assert isinstance(memory, (wasmtime.Memory, wasmtime.SharedMemory))
    linear_memory(store, memory)
    return memory
