"""`Sessions`: instances that start from one snapshot and are handed to one user at a time."""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NoReturn, cast

import wasmtime

from linmem._core import bridge as _bridge
from linmem._core.arguments import check_count, shown
from linmem._core.memory import Memory
from linmem._wasm.install import checked_creator
from linmem._wasm.instance_state import behind, export
from linmem._wasm.prepared import Prepared
from linmem._wasm.snapshot import Snapshot

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import SupportsIndex

    from typing_extensions import Self
    from wasmtime._exportable import AsExtern

    from linmem.abc import MemoryCreator

_ALL: weakref.WeakSet[Sessions] = weakref.WeakSet()
_LOOK_EACH = 0.5        # seconds: on some systems a wait for a lock answers Ctrl-C only when it ends


class Sessions:
    """Warm instances of a module, each handed to one user at a time and reset after each use.

    ``with sessions.get() as (store, instance):`` hands out an instance that has exactly the state of the snapshot. At
    the end of the block the instance is reset to the snapshot, on the thread that ran the block. If that is impossible,
    its store is closed. `get` makes a new instance if no instance is idle. An exception of the block is raised
    unchanged.

    The store that the block gets is a handle that ends with the block: a later use raises `ValueError`. A memory handle
    or a view that is still open at the end of the block keeps the memory of this session, and the instance is replaced.

    Sessions are usable from any thread, and from asyncio by ``loop.run_in_executor``.

    Parameters
    ----------
    prepared : Prepared
    imports : wasmtime.Linker, callable or an empty sequence
        The imports of each instance. A linker must only define what belongs to no store, for example by `define_func`
        and `define_wasi`. A callable gets each new store and returns a sequence or a linker.
    start : Snapshot
        The state that each session starts with. If the snapshot has `unseen` state, each instance is used once.
    size : int
        The largest number of instances that live at the same time.
    store : callable, optional
        Makes the store of each new instance, for example with `set_limits`. By default a plain
        ``wasmtime.Store(prepared.engine)``.
    begin : callable, optional
        Called with the store at the start of each session, for what a reset does not change: fuel, the epoch deadline
        and the configuration of WASI. If a block calls a setter of the store that `begin` did not call, for example
        `set_limits`, the instance is replaced, so that the setting does not reach the next user. A setting that a host
        function makes with the store that the callable `imports` got is not noticed: `begin` must make it anew.
    creator : MemoryCreator, optional
        Makes the memories of all instances, as for `Prepared.instantiate`; by default the creator that `install` gave
        to the engine, also in a block of `linmem.wasmtime.use`. Idle instances keep their memories. If the creator
        refuses a memory (for example, because its budget is used up), the start of the block raises
        `wasmtime.WasmtimeError`, and the place among the `size` sessions is free again.

    Raises
    ------
    ValueError
        If instances of this module cannot start from this snapshot, as for `Prepared.instantiate`; if `imports` has
        objects, which belong to one store; if the module imports a shared memory; or if a pool in `creator` has an
        ``image=``.

    Attributes
    ----------
    size : int

    Notes
    -----
    A reset does not change the state of the host: the descriptors of WASI, the data of the store, and what host
    functions keep. Objects that a block makes in its store exist until the store is closed.

    In a forked child, the sessions that other threads of the parent have do not count. The child has copies of the
    others.
    """

    __slots__ = ("__weakref__", "_begin", "_closed", "_creator", "_handed_out", "_idle", "_imports", "_lock",
                 "_make_store", "_memories", "_prepared", "_replaced", "_reused", "_served", "_start", "_taken",
                 "_waiting", "size")

    size: int
    _make_store: Callable[[], wasmtime.Store]

    def __init__(self, prepared: Prepared,
                 imports: wasmtime.Linker | Callable[[wasmtime.Store], Any] | Sequence[AsExtern] = (), *,
                 start: Snapshot, size: SupportsIndex, store: Callable[[], wasmtime.Store] | None = None,
                 begin: Callable[[wasmtime.Store], object] | None = None,
                 creator: MemoryCreator | None = None) -> None:
        if not isinstance(prepared, Prepared):
            raise TypeError(f"prepared must be a Prepared, got {type(prepared).__name__}")
        if not isinstance(start, Snapshot):
            raise TypeError(f"start must be a Snapshot, got {type(start).__name__}")
        self.size = check_count(size, "size", least=1)
        self._creator = None if creator is None else checked_creator(creator)
        for name, call in (("store", store), ("begin", begin)):
            if call is not None and not callable(call):
                raise TypeError(f"{name} must be callable, got {type(call).__name__}")
        if not isinstance(imports, wasmtime.Linker) and not callable(imports):
            if not isinstance(imports, Sequence):
                raise TypeError("imports must be a wasmtime.Linker, a callable or an empty sequence, got"
                                f" {type(imports).__name__}")
            if len(imports):
                raise ValueError("imports must be empty, a wasmtime.Linker or a callable that gets each new store,"
                                 f" because each session has a store of its own, got {shown(imports)}")
        prepared._plan(start)       # refuses a snapshot that does not fit, and a component
        for each in prepared.module.imports:
            if isinstance(each.type, wasmtime.MemoryType) and each.type.is_shared:
                raise ValueError("prepared must be a module without an imported shared memory, which other instances"
                                 f" may write to at any time, got one that imports {each.module!r} {each.name!r}")
        assert prepared.outline is not None
        self._prepared, self._imports, self._start, self._begin = prepared, imports, start, begin
        self._memories = [name for (kind, _), name in prepared.outline.exports.items() if kind == "memory"]
        self._make_store = (lambda: wasmtime.Store(prepared.engine)) if store is None else store
        # A permit is a lock that identifies a session. `_taken` has the permits of the sessions that have or make an
        # instance, so len(_taken) <= size. `_served` has those of them that have looked for an idle instance. The
        # others will, so some of the idle instances count as in use. A permit in `_waiting` is locked until the permit
        # moves to `_taken`. The values are the threads. The lock is recursive, because a session may be collected while
        # its thread holds it.
        self._lock = threading.RLock()
        self._taken: dict[threading.Lock, int] = {}
        self._waiting: dict[threading.Lock, int] = {}
        self._served: set[threading.Lock] = set()
        self._idle: list[_Warm] = []        # the instance that was used last is at the end
        self._handed_out = self._reused = 0
        self._replaced: dict[str, int] = {}
        self._closed = False
        _ALL.add(self)

    def get(self, timeout: float | None = None) -> AbstractContextManager[tuple[wasmtime.Store, wasmtime.Instance]]:
        """A session, as a context manager: its ``with`` block gets a store and an instance.

        If `size` sessions are in use, the start of the block waits. Threads are served in the order of their arrival,
        and Ctrl-C ends a wait.

        Parameters
        ----------
        timeout : float, optional
            Seconds after which a wait raises. None: it waits without end.

        Raises
        ------
        TimeoutError
            At the start of the block, if no session was given back in time.
        RuntimeError
            At the start of the block, if there is no timeout and this thread itself has all sessions, so that its wait
            would not end.
        ValueError
            At the start of the block, if the sessions are closed, also during the wait.
        """
        if timeout is not None and (isinstance(timeout, bool) or not isinstance(timeout, (int, float))):
            raise TypeError(f"timeout must be a number of seconds or None, got {type(timeout).__name__}")
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"timeout must be >= 0, got {shown(timeout)}")
        return _Session(self, timeout)

    def stats(self) -> dict[str, Any]:
        """Figures: sessions now (`size`, `live`, `idle`, `in_use`, `waiting`) and since the start (the others).

        ``live == idle + in_use`` is the number of instances. `handed_out` sessions began. `reused` of them got an
        instance of an earlier session, and the others got a new one. `replaced` has the number of instances that could
        not be reset, by the reason:

        - "resized": a memory or a table has another size than in the snapshot
        - "kept": a memory handle or a view was open at the end of the block
        - "running": a call into the store was running at the end of the block; it is `in_use` until the call ends
        - "closed": the block closed the store
        - "configured": the block called a setter of the store, such as `set_limits`, that `begin` did not call
        - "refused": linmem or the operating system refused the reset
        - "interrupted": an exception of a signal handler, such as `KeyboardInterrupt`, came during the reset
        - "recorded": the instance was made in a block of `Snapshot.record`
        - "unseen": the snapshot does not hold all state of its instances
        - "shared": the instance has a shared memory
        - "objects": the module has types of structures or arrays, so the GC heap of the store may have objects, and
          wasmtime does not free circles of objects
        """
        with self._lock:
            in_use = len(self._taken)
            live = max(in_use, len(self._served) + len(self._idle))
            return {"size": self.size, "live": live, "idle": live - in_use, "in_use": in_use,
                    "waiting": len(self._waiting), "handed_out": self._handed_out, "reused": self._reused,
                    "replaced": dict(self._replaced)}

    def close(self) -> None:
        """Close all idle stores now, and each store in use when its session ends. Each waiting `get` raises."""
        with self._lock:
            self._closed = True
            self._refuse_waiting()
            idle, self._idle = self._idle, []
        for warm in idle:
            warm.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("Sessions cannot be pickled or copied: their instances belong to this process")

    def __repr__(self) -> str:
        text = "closed" if self._closed else f"{len(self._taken)} of {self.size} in use"
        return f"<linmem.wasmtime.Sessions: {text}>"

    # -- permits: no line between the two writes of a permit calls a function, so that no interrupt comes between them

    def _admit(self, session: _Session, timeout: float | None) -> None:
        """Give the session a permit as soon as fewer than `size` are taken."""
        thread = threading.get_ident()
        permit = threading.Lock()
        with self._lock:
            self._check_open()
            if len(self._taken) < self.size and not self._waiting:
                self._taken[permit] = thread
                session._permit = permit
                return
            if timeout is None and len(self._taken) == self.size and set(self._taken.values()) == {thread}:
                raise RuntimeError(f"this thread itself has all {self.size} sessions, so its wait for another session"
                                   " would not end")
            permit.acquire()
            self._waiting[permit] = thread
            session._permit = permit
        end = None if timeout is None else time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
        while True:
            left = _LOOK_EACH if end is None else min(end - time.monotonic(), _LOOK_EACH)
            if permit.acquire(timeout=max(left, 0)):
                break
            with self._lock:
                self._pass_on()     # an interrupt may have ended this call on another thread
                if self._closed:
                    break           # an interrupt may have ended close() before it released the permit
                if left < _LOOK_EACH and permit in self._waiting:
                    raise TimeoutError(f"all {self.size} sessions are in use, and none was given back within"
                                       f" timeout={timeout} seconds")
        self._check_open()

    def _release(self, permit: threading.Lock) -> None:
        """Take a permit back, or end the wait for it. May be called again for the same permit."""
        with self._lock:
            self._forget(permit)
            self._pass_on()

    def _forget(self, permit: threading.Lock) -> None:
        """Under the lock."""
        self._taken.pop(permit, None)
        self._waiting.pop(permit, None)
        self._served.discard(permit)

    def _pass_on(self) -> None:
        """Give permits to those who have waited longest; under the lock."""
        while self._waiting and len(self._taken) < self.size:
            permit = next(iter(self._waiting))
            self._taken[permit] = self._waiting[permit]
            del self._waiting[permit]
            permit.release()

    def _refuse_waiting(self) -> None:
        """Let each wait end, and raise because the sessions are closed; under the lock. A function: if a trace function
        of CPython 3.12 raises in a loop directly inside of a ``with`` block, the block does not end."""
        while self._waiting:
            self._waiting.popitem()[0].release()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the sessions are closed")

    # -- instances

    def _instance(self, permit: threading.Lock) -> _Warm:
        """An idle instance, or a new one. The caller has the permit, so fewer than `size` others live."""
        with self._lock:
            self._served.add(permit)
            if self._idle:
                return self._idle.pop()
        store = self._make_store()
        if not isinstance(store, wasmtime.Store):
            raise TypeError(f"store must return a wasmtime.Store, got {type(store).__name__}")
        if getattr(store, "_linmem_warm", False):
            raise ValueError("store must return a new wasmtime.Store at each call, got one that has an instance")
        warm = _Warm(store)
        try:
            self._fill(warm)
        except BaseException:
            warm.close()
            raise
        return warm

    def _fill(self, warm: _Warm) -> None:
        """Make the instance in its new store."""
        store = warm.store
        choice = _bridge.choose(None)       # the instance may serve users with other creators later
        try:
            imports = self._imports(store) if callable(self._imports) else self._imports
            warm.instance = self._prepared.instantiate(store, imports, start=self._start, creator=self._creator)
        finally:
            _bridge.release_choice(choice)
        if self._start.unseen:
            warm.once = "unseen"
        assert self._prepared.outline is not None
        if self._prepared.outline.makes_objects:
            warm.once = "objects"
        # The recording has handles, and gives them up at any moment. A kept handle could not be told from these.
        if hasattr(warm.instance, "_linmem_recorded"):
            warm.once = "recorded"
        for name in self._memories:
            memory: Any = export(store._context(), warm.instance, name)
            ours = behind(store, memory)
            if isinstance(memory, wasmtime.SharedMemory):
                warm.once = "shared"
            elif ours is not None:
                warm.memories.append(ours)
        warm.references = warm.count()

    def _take_back(self, warm: _Warm, reason: str, permit: threading.Lock) -> None:
        """Reset an instance for its next session. With a reason, or if that is impossible, close its store.

        The caller gives the permit back, which counts as long as the store is open and not idle.
        """
        found = "interrupted"
        try:
            found = reason or self._reset(warm)
        finally:
            with self._lock:
                if found:
                    self._replaced[found] = self._replaced.get(found, 0) + 1
                reusable = not found and not self._closed
                if reusable:
                    self._idle.append(warm)
                    self._forget(permit)
            if not reusable:
                warm.close()

    def _reset(self, warm: _Warm) -> str:
        """Put back the state of the snapshot. Returns why the instance cannot be used again, or ''."""
        if warm.once:
            return warm.once
        if warm.count() != warm.references:
            return "kept"
        try:
            self._start.restore(warm.store, warm.instance)
        except ValueError:
            return "resized"
        # All that restore() raises if linmem (a PageError is a MemoryError) or wasmtime refuses. stats() shows the
        # number. Another exception, such as the TimeoutError of a signal handler, goes to the program.
        except (MemoryError, RuntimeError, TypeError, wasmtime.WasmtimeError):
            return "refused"
        return ""

    def _start_over(self) -> None:
        """In a forked child: forget the sessions of threads that the child does not have."""
        thread = threading.get_ident()
        self._lock = threading.RLock()
        self._waiting = {}
        self._taken = {permit: owner for permit, owner in self._taken.items() if owner == thread}
        self._served.intersection_update(self._taken)


def _start_over_in_child() -> None:
    for sessions in list(_ALL):
        sessions._start_over()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_over_in_child)


class _Warm:
    """An instance and its store, for one session after the other."""

    __slots__ = ("instance", "memories", "once", "references", "store", "used")

    instance: wasmtime.Instance
    references: list[int]

    def __init__(self, store: wasmtime.Store) -> None:
        store._linmem_warm = True       # type: ignore[attr-defined]
        self.store = store
        self.memories: list[Memory] = []
        self.once = ""          # why the instance cannot be used again, or ""
        self.used = False       # whether a session had the instance

    def count(self) -> list[int]:
        """The references on each memory. A session that keeps a handle or a view on a memory changes them."""
        return [_bridge.references(memory) for memory in self.memories]

    def close(self) -> None:
        self.memories.clear()
        self.store.close()

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Without a store, an interrupt ended __init__(). While the interpreter ends, wasmtime-py cannot close a store.
        if hasattr(self, "store") and not is_finalizing():
            self.close()


class _Context:
    """The context of a store as an argument of wasmtime's C functions.

    ctypes passes the pointer in `_as_parameter_` and holds it during the call. No frame or traceback has a reference on
    it. So if the session has dropped its own reference, and the pointer still exists, then a call is running.
    """

    __slots__ = ("_as_parameter_",)

    def __init__(self, context: Any) -> None:
        self._as_parameter_ = type(context).from_buffer_copy(context)

    @property
    def contents(self) -> Any:
        return self._as_parameter_.contents


def _references_of_one_name() -> int:
    pointer = object()
    return sys.getrefcount(pointer)


_ALONE = _references_of_one_name()      # what sys.getrefcount tells of an object that only one local variable has


class _Lent(wasmtime.Store):
    """The store that a session hands out: it reaches the instance's store until the session ends."""

    _linmem_warm = True
    _lent_store: wasmtime.Store | None = None
    _lent_context: _Context | None = None
    _call: Callable[[], Any] = staticmethod(lambda: None)

    def __init__(self, store: wasmtime.Store) -> None:
        self._lent_begun: set[str] = set()      # the setters that `begin` called
        self._lent_set: set[str] = set()        # those that were called since
        self.engine = store.engine
        context = self._lent_context = _Context(store._context())
        self._call = weakref.ref(context._as_parameter_)
        self._lent_store = store

    def _context(self) -> Any:
        if self._lent_store is None:
            raise ValueError("the store is closed, because its session has ended or closed it")
        return self._lent_context

    @property
    def _linmem_store(self) -> wasmtime.Store:
        self._context()
        return cast(wasmtime.Store, self._lent_store)

    def ptr(self) -> Any:
        return self._linmem_store.ptr()

    def close(self) -> None:
        self._lent_store = None
        if self._lent_context is None:
            return
        pointer, self._lent_context._as_parameter_ = self._lent_context._as_parameter_, None
        # Without a GIL, a pointer that another thread has made is freed later, and until then `_call` finds it, as if a
        # call had it. If only this function has it, `_call` forgets it now.
        if pointer is not None and sys.getrefcount(pointer) <= _ALONE:
            self._call = _Lent._call


def _noted(name: str) -> Callable[..., None]:
    def setter(self: _Lent, *args: Any, **named: Any) -> None:
        self._lent_set.add(name)
        getattr(wasmtime.Store, name)(self, *args, **named)
    return setter


for _name in dir(wasmtime.Store):
    if _name.startswith("set_"):
        setattr(_Lent, _name, _noted(_name))


class _Running:
    """An instance whose session ended during a call. The argument of the call holds this object until the call ends."""

    parts: tuple[Sessions, _Warm, threading.Lock] | None = None

    def __del__(self) -> None:
        if self.parts is not None:
            sessions, warm, permit = self.parts
            try:
                sessions._take_back(warm, "running", permit)
            finally:
                sessions._release(permit)


class _Session:
    """The context manager that `Sessions.get` returns. If its block never ends, collecting it ends the session."""

    _permit: threading.Lock | None = None
    _warm: _Warm | None = None
    _lent: _Lent | None = None
    _instance: wasmtime.Instance | None = None

    def __init__(self, sessions: Sessions, timeout: float | None) -> None:
        self._sessions, self._timeout = sessions, timeout
        self._unused = [True]       # empty: the session has begun. One pop() both asks and marks, on any thread.

    def __enter__(self) -> tuple[wasmtime.Store, wasmtime.Instance]:
        try:
            self._unused.pop()
        except IndexError:
            raise RuntimeError("this session has begun already: call get() for each `with` block") from None
        sessions = self._sessions
        try:
            sessions._admit(self, self._timeout)
            assert self._permit is not None
            warm = self._warm = sessions._instance(self._permit)
            # New objects for each session, so that nothing that an earlier user keeps or sets reaches this one.
            lent = self._lent = _Lent(warm.store)
            instance = self._instance = object.__new__(type(warm.instance))
            vars(instance).update(vars(warm.instance))
            if sessions._begin is not None:
                sessions._begin(lent)
                lent._lent_begun, lent._lent_set = lent._lent_set, set()
            with sessions._lock:
                sessions._handed_out += 1
                sessions._reused += warm.used
            warm.used = True
            return lent, instance
        except BaseException:
            self._end()
            if self._lent is None:      # the block may be tried again, for example after a TimeoutError
                self._unused.append(True)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        """May be called again. An interrupt leaves the session as it is, or without its instance and permit."""
        permit = self._permit
        if permit is None:
            return
        sessions, warm, lent, reason = self._sessions, self._warm, self._lent, ""
        if warm is not None and lent is not None:
            if lent._lent_store is None:
                reason = "closed"
            elif lent._lent_set - lent._lent_begun:
                reason = "configured"
            lent.close()
            if self._instance is not None:
                vars(self._instance)["_linmem_made"] = 0, None      # memories() finds none; no call has the number 0
            call = lent._call()
            if call is not None:
                call.linmem_running = running = _Running()
                sessions._taken[permit] = 0     # no thread waits for itself if it waits for the end of this call
                running.parts = sessions, warm, permit
                self._warm = self._permit = None
                return
            if self._instance is not None:
                # The table of exports is made at its first use, which takes long.
                vars(warm.instance)["_exports"] = vars(self._instance).get("_exports")
        self._warm = None
        try:
            if warm is not None:
                sessions._take_back(warm, reason, permit)
        finally:
            sessions._release(permit)
            self._permit = None

    def __del__(self) -> None:
        self._end()
