from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, SupportsIndex, final, overload

from linmem._core.arguments import AnyPath
from linmem._core.memory import Memory, NativeCreator
from linmem.abc import MemoryCreator
from linmem.records import Allocation, DroppedInfo, MemoryType, ScopeTotals

if TYPE_CHECKING:
    from typing_extensions import Self

@final
class LimitingCreator(NativeCreator):
    """One budget of committed bytes over all memories that come through it.

    The budget is charged (in whole host pages) when a memory is made and when it grows, and refunded when the memory is
    dropped. The sums are exact under threads. Memories of this process that show the same shared memory count once,
    with the size of the largest. A request that exceeds the budget raises `LimitError`; in wasm, ``memory.grow``
    returns -1. Limits nest: each takes the next as its upstream. rmm has ``LimitingResourceAdaptor``.

    Parameters
    ----------
    upstream : NativeCreator
        The creator that makes the memories.
    limit_bytes : int
        The budget in bytes.
    name : str, optional
        Stands in the text of its `LimitError`, and in `MemoryInfo` of its memories.
    """
    def __new__(cls, upstream: NativeCreator, limit_bytes: SupportsIndex, *, name: str | None = None) -> Self: ...
    @property
    def upstream(self) -> NativeCreator:
        """The creator that makes the memories."""
    @property
    def limit_bytes(self) -> int:
        """The budget in bytes."""
    @property
    def used_bytes(self) -> int:
        """The bytes charged to the budget now, in whole host pages."""
    @property
    def peak_bytes(self) -> int:
        """The most bytes that were ever charged at once."""

@final
class StatisticsCreator(NativeCreator):
    """Counts and times what happens to the memories that come through it.

    rmm's ``StatisticsResourceAdaptor`` has such sums. This creator also keeps a record of each memory. Two memories
    that show the same shared memory count as two.

    Parameters
    ----------
    upstream : NativeCreator
        The creator that makes the memories.
    history : int
        How many records of dropped memories the creator keeps. The oldest record goes first.
    timeline : int
        How many changes of its size a record keeps for `timeline`: the first, the last, and some between. 0: none.
    name : str, optional
        Stands in the text of refusals whose creator has no name, and in `MemoryInfo` of the memories.
    """
    def __new__(cls, upstream: NativeCreator, history: SupportsIndex = 256, timeline: SupportsIndex = 0, *,
                name: str | None = None) -> Self: ...
    @property
    def upstream(self) -> NativeCreator:
        """The creator that makes the memories."""
    def statistics(self) -> dict[str, int]:
        """The sums over all memories, as a dict. Bytes are byte_size. Failures are refused creations and growths."""
    def memories(self) -> list[dict[str, Any]]:
        """A dict for each memory, live ones first, then the newest dropped ones.

        The keys are alive, first_size, size, growths, refused, grow_ns, peak_resident, base (an address) and name (of
        the outermost creator upstream with a name, or of this one, or None). linmem samples peak_resident in this call
        and when a memory is dropped. This figure is exact for a memory that never gives pages back, as memories of
        WebAssembly.
        """
    def timeline(self) -> list[list[tuple[int, int]]]:
        """For each memory, in the order of `memories`, its sizes over time as a list of (nanoseconds, bytes).

        The times are since this creator was made. A memory that was dropped ends with 0 bytes. The lists are empty
        without ``timeline=``.
        """

@final
class TrackingCreator(NativeCreator):
    """Notes by which lines, and in which scope, the memories that come through it were made.

    A memory is noted with the Python stack that made it and with the stack of the growth to its largest size. The stack
    is the one of the thread that asks for the memory, also if wasmtime asks. The newest frames of linmem and wasmtime
    are left out. rmm has ``TrackingResourceAdaptor`` and the profiler of ``rmm.statistics``; this creator is both.

    Parameters
    ----------
    upstream : NativeCreator
        The creator that makes the memories.
    frames : int
        The most frames of a stack, at most 64. 0: no stacks, only scopes.
    name : str, optional
        Stands in the text of refusals whose creator has no name, and in `MemoryInfo` of the memories.

    Notes
    -----
    The tracker keeps code objects and line numbers; no frame, and so no local variable, stays alive. Equal stacks are
    kept once. There are at most 4096 stacks, and stacks of dropped memories give way first; a memory beyond that has an
    empty stack. There are at most 1024 scopes; a memory of a further scope counts in the enclosing scope. `overhead`
    counts both. A thread that Python does not know has no stack and no scope.
    """
    def __new__(cls, upstream: NativeCreator, *, frames: SupportsIndex = 16, name: str | None = None) -> Self: ...
    @property
    def upstream(self) -> NativeCreator:
        """The creator that makes the memories."""
    @property
    def frames(self) -> int:
        """The most frames of a stack."""
    def scope(self, name: str) -> AbstractContextManager[None]:
        """Count the memories that are made in a ``with`` block under a name.

        The scope is a context variable: tasks that are started in the block, and ``asyncio.to_thread``, inherit it. A
        new `threading.Thread` does not, unless this Python passes the context on. Blocks nest. Do not `yield` in the
        block: the caller of a generator would be in the block, too. A memory counts in the scope in which it was made,
        until it is dropped, and in all scopes around that one.

        Parameters
        ----------
        name : str
            At most 1000 bytes in UTF-8.

        Returns
        -------
        context manager
            For one block.
        """
    def outstanding(self) -> list[Allocation]:
        """The memories that exist, the newest first, as a list of `Allocation`.

        If a pool takes its slots from this creator, they are idle slots, too.
        """
    def leaks(self) -> list[Allocation]:
        """The outstanding memories that only exported buffers keep alive, or nothing that Python can see.

        Such a memory belongs to no wasmtime store, and the program has no open `Memory` of it: every handle is closed
        or is kept by memoryviews and arrays alone. An array that the program still uses looks the same. A handle in a
        reference cycle counts as one of the program's until ``gc.collect()``. Without a GIL, memories that other
        threads are closing at this moment are listed, too.

        Returns
        -------
        list of Allocation
            The newest first.
        """
    def scopes(self) -> dict[tuple[str, ...], ScopeTotals]:
        """The sums of each scope, as a dict from the path of names, ``()`` for all, to `ScopeTotals`.

        The sums of a scope include the scopes in it.
        """
    def history(self) -> tuple[float, dict[tuple[str, ...], list[int]]]:
        """How many bytes the memories of each scope had over time.

        Returns
        -------
        seconds : float
            The time that a point stands for. It doubles when 256 points have been written.
        points : dict
            A list of sizes for each path of names: the most bytes that the memories of the scope, without the scopes in
            it, had in that time. The first point begins with the creator, and the last is the present.
        """
    def overhead(self) -> dict[str, int]:
        """What the tracker itself keeps.

        Returns
        -------
        dict
            memories, stacks, scopes: how many the tracker keeps. lost_stacks, lost_scopes: how often the tracker
            already had too many of them. bytes: of the tracker, without the code objects that it keeps alive.
        """
    @overload
    def report(self, path: None = None) -> str:
        """A report for people: the sums of the scopes, and the lines that made the most bytes.

        Parameters
        ----------
        path : str, bytes or path-like, optional
            Draw a picture into this file instead: the bytes over time, by scope. The suffix names the format ("png",
            "svg", "pdf"). The picture needs matplotlib, which the extra ``linmem[image]`` installs.

        Returns
        -------
        str or None
            The text; None if a picture was drawn.

        Raises
        ------
        ImportError
            A picture without matplotlib.
        """
    @overload
    def report(self, path: AnyPath) -> None: ...

@final
class CallbackCreator(NativeCreator):
    """Calls Python functions for the memories that come through it, and limits each memory.

    rmm has ``TrackingResourceAdaptor`` and ``FailureCallbackResourceAdaptor``, wasmtime has ``ResourceLimiter``. The
    requests of WebAssembly modules, components and garbage-collected heaps arrive here as those of Python do.

    The handle ``mem`` that a function gets is closed when the function returns, so a function that stores the handle
    does not keep the memory alive. A buffer that it exported does.

    Parameters
    ----------
    upstream : NativeCreator
        The creator that makes the memories.
    on_made : callable, optional
        ``on_made(mem, size)`` is called before the new memory of `size` bytes is handed out. If it raises, the request
        is refused with this exception, and `on_dropped` is not called for the memory.
    on_grow : callable, optional
        ``on_grow(mem, old, new)`` is called before a growth from `old` to `new` bytes. If it raises, the growth is
        refused with this exception. After it returned, upstream or the OS can still refuse the growth.
    on_refused : callable, optional
        ``on_refused(mem, requested, error)`` is called after upstream, the OS or a limit of this creator refused a new
        memory (`mem` is None) or a growth of `mem`, to `requested` bytes. If it returns a true value, the request is
        tried once more, for example because the function has freed something. If it raises, the request is refused with
        that exception. It is not called if `on_made` or `on_grow` of this creator raised, nor for a size above
        the memory's maximum.
    on_dropped : callable, optional
        ``on_dropped(info)`` is called with a `DroppedInfo` after a memory is gone, or after a pool has taken the memory
        back. An exception goes to ``sys.unraisablehook``.
    limit_each : int, optional
        The most bytes that a memory may have. Otherwise `LimitError`, or -1 from ``memory.grow``. No Python code runs.
    limit_growths : int, optional
        How often a memory may grow. Otherwise `GrowError`. No Python code runs.
    name : str, optional
        Stands in the text of what its limits refuse, in `MemoryInfo` and in `DroppedInfo` of its memories.

    Notes
    -----
    Functions run on the thread that makes, grows or drops the memory, and several threads may run them at once.
    `on_dropped` runs on the main thread, later, if a thread that Python does not know dropped the memory, or if a pool
    drops a slot so that another request gets its bytes. It is not called while the interpreter shuts down; at that
    time, requests that `on_made` or `on_grow` would decide are refused.

    A function may make, grow and drop other memories, and may read and write `mem`. It must not grow, restore, protect
    or close `mem` (`RuntimeError`). Two functions that wait for each other's memories wait until Ctrl-C. A function
    must not use the wasmtime store that asks for the memory or for its growth: wasmtime does not allow such calls, and
    may abort the process. Other stores, also of the same engine, may be used.

    Below a pool, a memory is a slot: it is made once and dropped once for many users, and `limit_growths` counts the
    growths of each user. Put the creator above the pool to be told of each user. The functions live as long as the
    memories. A function that refers to a `Memory` of this creator keeps this memory alive.
    """
    def __new__(cls, upstream: NativeCreator, *, on_made: Callable[[Memory, int], object] | None = None,
                on_grow: Callable[[Memory, int, int], object] | None = None,
                on_refused: Callable[[Memory | None, int, Exception], object] | None = None,
                on_dropped: Callable[[DroppedInfo], object] | None = None, limit_each: SupportsIndex | None = None,
                limit_growths: SupportsIndex | None = None, name: str | None = None) -> Self: ...
    @property
    def upstream(self) -> NativeCreator:
        """The creator that makes the memories."""
    @property
    def on_made(self) -> Callable[[Memory, int], object] | None:
        """The function that is called with each new memory, or None."""
    @property
    def on_grow(self) -> Callable[[Memory, int, int], object] | None:
        """The function that is called before each growth, or None."""
    @property
    def on_refused(self) -> Callable[[Memory | None, int, Exception], object] | None:
        """The function that is called after a refusal, or None."""
    @property
    def on_dropped(self) -> Callable[[DroppedInfo], object] | None:
        """The function that is called after a memory is gone, or None."""
    @property
    def limit_each(self) -> int | None:
        """The most bytes that a memory may have, or None."""
    @property
    def limit_growths(self) -> int | None:
        """How often a memory may grow, or None."""

_Rule = Callable[[MemoryType, int], MemoryCreator]
_Table = Iterable[tuple[Mapping[str, int], MemoryCreator]]

@final
class RoutingCreator(NativeCreator):
    """Passes each request to one of several creators, by the memory's type and size.

    A memory belongs to the creator that made it: its growth, its budget and its pool are those of this creator.

    Parameters
    ----------
    rule : list of (dict, MemoryCreator), or callable
        A table: the request goes to the creator of the first row whose fields all fit. The fields are ``max_size`` (the
        memory starts with at most so many bytes), ``is_64`` and ``is_shared`` (True or False). A row without fields
        fits each request. If no row fits, the request is refused with `ValueError`. A table runs no Python code.

        A function ``rule(ty, size)``: it gets the `MemoryType` and the bytes at the start, and returns the creator. If
        it raises, the request is refused with this exception. It must not use the wasmtime store that asks. If wasmtime
        asks, a memory of a pool with an ``image=`` is refused with `ValueError`.
    name : str, optional
        Stands in the text of refusals whose creator has no name, and in `MemoryInfo` of the memories.
    """
    def __new__(cls, rule: _Rule | _Table, *, name: str | None = None) -> Self: ...
    @property
    def rule(self) -> _Rule | tuple[tuple[dict[str, int], NativeCreator], ...]:
        """The function, or the rows of the table."""

@final
class PythonCreator(NativeCreator):
    # creator: a MemoryCreator, or another object with the method new_memory.
    """A native creator that calls a Python class, which implements the two traits.

    A caller in Python gets an exception of the class itself; wasmtime gets the text of the exception. Each creation and
    growth takes the GIL. Reading the base and the size does not take the GIL.

    Parameters
    ----------
    creator : MemoryCreator
        Its `new_memory` returns a `LinearMemory`, or a `Memory` that linmem made.
    name : str, optional
        Stands in `MemoryInfo` of its memories, and in the text of a `GrowError` or a `PageError` for their growth.
    """
    def __new__(cls, creator: Any, *, name: str | None = None) -> Self: ...
    @property
    def creator(self) -> Any:
        """The creator in Python."""

def as_native(creator: MemoryCreator, name: str = "creator") -> NativeCreator: ...
def check_trait(creator: object, name: str) -> None: ...
