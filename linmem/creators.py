"""The factory: `creator` makes creators by name, `create` makes a memory in one call."""

from __future__ import annotations

from linmem._core.adaptors import (
    CallbackCreator,
    LimitingCreator,
    RoutingCreator,
    StatisticsCreator,
    TrackingCreator,
    as_native,
)
from linmem._core.arguments import check_choice, shown
from linmem._core.memory import (
    FileCreator,
    Memory,
    MmapCreator,
    NativeCreator,
    SharedCreator,
    _attach,
    open_for_reading,
)
from linmem._core.pool import PoolingCreator
from linmem.abc import MemoryCreator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, Literal, SupportsIndex, overload

    from linmem._core.arguments import AnyPath
    from linmem._core.memory import Image
    from linmem._core.shared_handles import SharedHandle
    from linmem.records import DroppedInfo, MemoryType

__all__ = ["as_native", "attach", "create", "creator", "open_file"]

KINDS: dict[str, type[NativeCreator]] = {
    "mmap": MmapCreator, "pool": PoolingCreator, "limiting": LimitingCreator, "statistics": StatisticsCreator,
    "tracking": TrackingCreator, "callback": CallbackCreator, "routing": RoutingCreator, "shared": SharedCreator,
    "file": FileCreator}
_WITHOUT_UPSTREAM = MmapCreator, RoutingCreator, SharedCreator, FileCreator
_DEFAULT = MmapCreator()

if TYPE_CHECKING:
    @overload
    def creator(kind: Literal["mmap"] = "mmap", *, prefault: bool = False, huge_pages: bool = False,
                name: str | None = None) -> MmapCreator: ...
    @overload
    def creator(kind: Literal["pool"], *, upstream: MemoryCreator | None = None, slots: SupportsIndex | None = None,
                keep_resident: SupportsIndex = 67108864, max_unused_warm: SupportsIndex = 100,
                max_resident: SupportsIndex | None = None, max_reserved: SupportsIndex | None = None,
                idle_seconds: float | None = 5, max_reset_seconds: float | None = None,
                reset: Literal["adaptive", "scan", "zero", "discard"] = "adaptive",
                when_full: Literal["fallback", "error", "wait"] = "fallback", timeout: float | None = None,
                check: bool = False, image: Image | None = None, name: str | None = None) -> PoolingCreator: ...
    @overload
    def creator(kind: Literal["limiting"], *, limit_bytes: SupportsIndex, upstream: MemoryCreator | None = None,
                name: str | None = None) -> LimitingCreator: ...
    @overload
    def creator(kind: Literal["statistics"], *, upstream: MemoryCreator | None = None, history: SupportsIndex = 256,
                timeline: SupportsIndex = 0, name: str | None = None) -> StatisticsCreator: ...
    @overload
    def creator(kind: Literal["tracking"], *, upstream: MemoryCreator | None = None, frames: SupportsIndex = 16,
                name: str | None = None) -> TrackingCreator: ...
    @overload
    def creator(kind: Literal["callback"], *, upstream: MemoryCreator | None = None,
                on_made: Callable[[Memory, int], object] | None = None,
                on_grow: Callable[[Memory, int, int], object] | None = None,
                on_refused: Callable[[Memory | None, int, Exception], object] | None = None,
                on_dropped: Callable[[DroppedInfo], object] | None = None, limit_each: SupportsIndex | None = None,
                limit_growths: SupportsIndex | None = None, name: str | None = None) -> CallbackCreator: ...
    @overload
    def creator(kind: Literal["routing"], *,
                rule: Callable[[MemoryType, int], MemoryCreator] | Iterable[tuple[Mapping[str, int], MemoryCreator]],
                name: str | None = None) -> RoutingCreator: ...
    @overload
    def creator(kind: Literal["shared"], *, shm_name: str | None = None,
                attach: SharedHandle | str | int | None = None, name: str | None = None) -> SharedCreator: ...
    @overload
    def creator(kind: Literal["file"], *, path: AnyPath, name: str | None = None) -> FileCreator: ...
    # Without **options: a call with an option of type Any would match two overloads, and type checkers would not know
    # the class of the creator.
    @overload
    def creator(kind: str) -> NativeCreator: ...


def creator(kind: str = "mmap", **options: Any) -> NativeCreator:
    """Make a creator by the name of its kind.

    Parameters
    ----------
    kind : str
        What the creator does:

        - ``"mmap"``: each memory is a mapping of its own (`MmapCreator`; options `prefault`, `huge_pages`)
        - ``"pool"``: memories are reset and handed out again (`PoolingCreator`; needs no option; options
          `slots`, `keep_resident`, `max_unused_warm`, `max_resident`, `max_reserved`, `idle_seconds`,
          `max_reset_seconds`, `reset`, `when_full`, `timeout`, `check`, `image`, `upstream`)
        - ``"limiting"``: one budget over all memories (`LimitingCreator`; options `limit_bytes`, `upstream`)
        - ``"statistics"``: counts and times what happens (`StatisticsCreator`; options `upstream`, `history`,
          `timeline`)
        - ``"tracking"``: notes which lines and scopes made memories (`TrackingCreator`; options `upstream`, `frames`)
        - ``"callback"``: Python functions, or limits for each memory, decide (`CallbackCreator`; options `on_made`,
          `on_grow`, `on_refused`, `on_dropped`, `limit_each`, `limit_growths`, `upstream`)
        - ``"shared"``: memories that processes share and that grow (`SharedCreator`; options ``shm_name``, ``attach``)
        - ``"routing"``: passes each request to one of several creators (`RoutingCreator`; option `rule`)
        - ``"file"``: the memory of a file (`FileCreator`; option `path`)
    **options
        The options of the constructor; each has `name`, too. An `upstream` that is missing or None is an `MmapCreator`.

    Raises
    ------
    ValueError
        If the kind does not exist; the message lists the kinds.
    TypeError
        If the kind does not have the option, if an option is missing, or if `upstream` is not a creator.
    """
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {shown(kind)}")
    made = KINDS[kind]
    if made not in _WITHOUT_UPSTREAM:
        upstream = options.get("upstream")
        options["upstream"] = _DEFAULT if upstream is None else as_native(upstream, "upstream")
    return made(**options)


def create(minimum: SupportsIndex, maximum: SupportsIndex | None = None, *, creator: MemoryCreator | None = None,
           reserve: SupportsIndex | None = None, guard: SupportsIndex | None = None, may_move: bool = False,
           domain: str | None = None) -> Memory:
    """Make a linear memory.

    Parameters
    ----------
    minimum : int
        The size at the start in bytes; all bytes are zero.
    maximum : int, optional
        The largest size that the memory can grow to, in bytes. None: only the machine limits it.
    creator : MemoryCreator, optional
        The creator that makes the memory; by default an `MmapCreator`. An object of a Python class that implements
        the trait is allowed.
    reserve : int, optional
        The least number of bytes of address space to reserve: growth up to this size never moves the base. None: the
        maximum, if it is given and not too large; else a share of the address space. The share is at most a few times
        the memory of the machine, and it is smaller the more memories have a share already.
    guard : int, optional
        Inaccessible bytes after the capacity and before the base, a multiple of the host page; by default 65536.
    domain : str, optional
        A pool never gives this user pages that were used in another domain. None is a domain, too. Without a pool the
        argument has no effect.
    may_move : bool
        Whether the base may change when the memory grows past its capacity while no buffer is exported. False: such a
        growth is a `GrowError`.

    Returns
    -------
    Memory

    Raises
    ------
    ValueError, TypeError, OverflowError
        If an argument is not a size; the message has its name, its value and the bound.
    PageError
        The OS refused; the message names the limit.
    GrowError
        A bound of the creator refused (`LimitError`: a budget).

    Examples
    --------
    >>> mem = linmem.create(65536, maximum=1 << 30)
    >>> view = memoryview(mem)
    >>> mem.grow_to(1 << 20)
    >>> view[0] = 1
    >>> mem[0]
    1
    """
    # A call of as_native(), like a keyword argument, takes 5 % of the time in which a pool makes a memory.
    native = _DEFAULT if creator is None else creator if isinstance(creator, NativeCreator) else as_native(creator)
    if domain is None:
        return native.create(minimum, maximum, reserve, guard, may_move=may_move)
    return native.create(minimum, maximum, reserve, guard, may_move=may_move, domain=domain)


def attach(handle_or_name: SharedHandle | str | int) -> Memory:
    """A memory on the bytes of a shared memory that another process made.

    Parameters
    ----------
    handle_or_name : SharedHandle, str or int
        What `Memory.handle` returned, the `shm_name` of the memory, or a descriptor that the other process has sent.

    Returns
    -------
    Memory
        It grows when any process grows it. The bytes stay while some process has the memory.

    Raises
    ------
    FileNotFoundError
        No process has the memory any more, or there is no such name.
    PermissionError
        The memory belongs to another user.
    ValueError
        The file is not a shared memory of linmem, or its control words are damaged, or the descriptor is not open for
        reading and writing.

    Examples
    --------
    >>> mem = linmem.create(65536, maximum=1 << 30, creator=linmem.creator("shared"))
    >>> other = linmem.attach(mem.handle())     # usually in another process
    >>> mem.grow_to(1 << 20)
    >>> len(other)
    1048576
    """
    if handle_or_name is None:      # to SharedCreator this means a new memory
        raise TypeError("handle_or_name must be a handle, the name of a shared memory or a descriptor, got None")
    return _attach(handle_or_name)


def open_file(path: AnyPath, access: Literal["r", "rw"] = "rw", *, minimum: SupportsIndex = 0,
              maximum: SupportsIndex | None = None, reserve: SupportsIndex | None = None) -> Memory:
    """Open a file as a linear memory: the bytes of the memory are the file's, and stay there.

    The file has no head, and its size is `byte_size`. It grows with the memory, under live views. If the process is
    killed, the file keeps every byte that was written. `Memory.flush` makes bytes durable also if the power fails.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        Of a regular file on this machine. A symbolic link is refused.
    access : {"rw", "r"}
        "rw": a file that does not exist is made, with the mode 0600. There is one writer at a time, of all processes.
        "r": the file exists. Any number of readers may be there, also beside a writer, whose growth they see at their
        next call. A reader's views are read-only, and calls that write raise.
    minimum : int
        A smaller file is grown to this size, in bytes. Not for readers.
    maximum, reserve : int, optional
        As for `create`. The base never moves, so the memory grows to at most its `byte_capacity`.

    Returns
    -------
    Memory

    Raises
    ------
    BlockingIOError
        The file has a writer already.
    OSError
        The file cannot be opened: there is none, it is no regular file, its permissions do not allow it ...
    PageError
        The OS refused: the file system is full, or cannot allocate space in advance.
    ValueError, TypeError, OverflowError
        An argument is not valid, or the file is larger than the maximum.

    Examples
    --------
    >>> mem = linmem.open_file("numbers.bin")
    >>> mem.grow_to(1 << 20)
    >>> mem[0] = 1
    >>> mem.flush()
    """
    if check_choice(access, "access", ("rw", "r")) == "r":
        if minimum != 0:
            raise ValueError(f"minimum must be 0 where access is 'r', got {shown(minimum)}")
        return open_for_reading(path, maximum, reserve)
    return FileCreator(path).create(minimum, maximum, reserve)
