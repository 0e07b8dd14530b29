from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, final

from linmem._core.memory import Image, NativeCreator
from linmem.records import MemoryType

if TYPE_CHECKING:
    pass

if TYPE_CHECKING:
    from typing_extensions import Self

@final
class PoolingCreator(NativeCreator):
    """Memories that are reset and handed out again instead of being made anew.

    The pool keeps a slot (a memory of the upstream creator) when the last reference on it is gone. wasmtime, Python
    handles and exported buffers have references. The thread that drops the last reference resets the slot, with no
    lock and no GIL. The slot then serves the next request of the same shape (minimum, maximum, reservation, guard). The
    slot that was given back last goes first. The pool keeps what is expensive to make: the mapping, its protection, and
    the resident pages. wasmtime has a pooling allocator like this, which Python cannot reach, and rmm has
    ``PoolMemoryResource``.

    Parameters
    ----------
    upstream : NativeCreator, optional
        The creator that makes the slots; an `MmapCreator` by default. The pool passes memories of a `PythonCreator` on,
        and does not keep them.
    slots : int, optional
        The most slots, in use and idle. By default as many as take half of the mappings that a process may have
        (``vm.max_map_count``).
    keep_resident : int
        The most bytes that one idle slot may keep resident. A slot with more gives all its pages back to the OS.
    image : Image, optional
        The start of each memory whose request names no image. A request for a memory that is smaller than the image is
        refused. A slot always has the same image: a reset restores the bytes that a guest wrote, and no others. A
        request with another image (``img.new_memory(creator=pool)``) has another shape.
    max_unused_warm : int
        The most idle slots that keep their pages. If there are more, the least recently used ones become cold: they
        keep address space only.
    max_resident : int, optional
        The most bytes that all idle slots together keep resident, page tables included. By default
        ``max_unused_warm * keep_resident``, but at most a quarter of the machine's memory. `set_pool_limits` bounds
        what all pools keep together.
    max_reserved : int, optional
        The most bytes of address space that all slots take, live and idle, guards included. `when_full` says what
        happens beyond the bound. A single request that is larger than the bound is a `PoolError`, also with "wait".
    idle_seconds : float or None
        Slots that have been idle for longer become cold, a few each time that a slot is given back. None: their age
        does not matter.
    max_reset_seconds : float, optional
        The most time that zeroing may take. If it takes longer, the pages are given back to the OS instead.
    reset : {"adaptive", "scan", "zero", "discard"}
        How a slot becomes zero again. "scan": the OS says which pages were touched (PAGEMAP_SCAN,
        /proc/self/pagemap, GetWriteWatch), and the pool zeroes those. "zero": the pool zeroes all bytes. "discard": the
        OS gets all pages back (MADV_DONTNEED; on Windows they are decommitted). "adaptive": the pool measures what the
        guests of each slot do, and chooses what costs least.
    when_full : {"fallback", "error", "wait"}
        What happens while every slot is in use. "fallback": the request gets a memory of upstream, which no bound of
        the pool limits. "error": it raises `PoolError`. "wait": it waits until a slot is given back.
    timeout : float, optional
        Seconds after which "wait" raises `PoolError`. None: it waits without end.
    check : bool
        Compare all bytes of a slot with zero after each reset. A slot with another byte is dropped and counted as
        rejected. This is meant for tests; it costs more than everything else.
    name : str, optional
        Stands in the text of its refusals, in `MemoryInfo` of its memories, and in `linmem.metrics`.

    Notes
    -----
    Thread-safe. When the creator is collected, it releases idle slots at once, and slots in use when they are given
    back.
    """
    def __new__(cls, upstream: NativeCreator | None = None, *, slots: SupportsIndex | None = None,
                keep_resident: SupportsIndex = 67108864, max_unused_warm: SupportsIndex = 100,
                max_resident: SupportsIndex | None = None, max_reserved: SupportsIndex | None = None,
                idle_seconds: float | None = 5, max_reset_seconds: float | None = None,
                reset: Literal["adaptive", "scan", "zero", "discard"] = "adaptive",
                when_full: Literal["fallback", "error", "wait"] = "fallback", timeout: float | None = None,
                check: bool = False, image: Image | None = None, name: str | None = None) -> Self: ...
    @property
    def upstream(self) -> NativeCreator:
        """The creator that makes the slots."""
    @property
    def image(self) -> Image | None:
        """The start of each memory whose request names no image, or None."""
    def warm(self, n: SupportsIndex, ty: MemoryType, *, reserved_size_in_bytes: SupportsIndex | None = 4294967296,
             guard_size_in_bytes: SupportsIndex = 33554432, domain: str | None = None) -> int:
        """Make slots ahead, so that the next `n` requests of a type are hits.

        The pages of the minimum are accessible and not yet resident: the first guest faults them in.

        Parameters
        ----------
        n : int
            The least number of idle slots of that shape afterwards.
        ty : MemoryType
        reserved_size_in_bytes, guard_size_in_bytes : int
            As in `new_memory`; by default what wasmtime asks for in its default configuration.
        domain : str or None
            The domain of the requests. Slots that have become cold serve any domain.

        Returns
        -------
        int
            The number of new slots, without the slots that were idle before.

        Raises
        ------
        PoolError
            There are too many slots in use, or the pool cannot keep memories of upstream.
        PageError, GrowError
            Upstream refused. The slots that were made before remain.
        """
    def trim(self, target: SupportsIndex = 0) -> int:
        """Release idle slots, cold ones first, then the least recently used.

        Parameters
        ----------
        target : int
            The most bytes that idle slots may keep resident. 0: the pool releases every idle slot.

        Returns
        -------
        int
            The most bytes that the released slots had resident.
        """
    def purge(self, target: SupportsIndex = 0, *, older_than: float = 0) -> int:
        """Give the pages of idle slots back to the OS. The mappings stay for the next requests. For a timer.

        Parameters
        ----------
        target : int
            The most bytes that idle slots may keep resident. The least recently used ones give their pages back first.
        older_than : float
            Only slots that have been idle for at least this many seconds give their pages back.

        Returns
        -------
        int
            The most bytes that were resident in the pages given back.
        """
    def stats(self) -> dict[str, Any]:
        """What the pool holds and what it did, as a dict of numbers.

        Returns
        -------
        dict
            slots: the most there may be. live, warm, cold: slots in use; idle slots with their pages; idle slots
            without. pinned: live slots that wasmtime has dropped and that a `Memory` or an exported buffer still holds.
            hits, misses: requests that an existing slot served, and a new one. fallbacks: requests that the pool passed
            to upstream, whose memories it does not keep. rejected: slots that the pool dropped because their reset
            failed or left a byte (``check=True``). resets: the number of each kind. resident: the most bytes that idle
            slots keep resident. resident_bound: the most bytes that these and their page tables have, except for a
            moment. reserved: bytes of address space of all slots, live and idle, guards included.
            `linmem.metrics.read` says more.
        """

def set_pool_limits(max_resident: SupportsIndex | None = None, max_reserved: SupportsIndex | None = None) -> None:
    """Bound the bytes that the pools of this process hold together, in addition to the bounds of each pool.

    Idle slots give everything above a bound back before the call returns.

    Parameters
    ----------
    max_resident : int, optional
        Bytes that the idle slots of all pools keep resident at most, page tables included. The least recently used
        slot of a domain that has more than its fair share gives its pages back first. None: a quarter of the machine's
        memory, as at the start.
    max_reserved : int, optional
        Bytes of address space of all slots, live and idle, guards included. A pool beyond it does as its `when_full`
        says. None: no bound, as at the start.

    Raises
    ------
    TypeError, ValueError, OverflowError
        If an argument is not a size; then no bound has changed.
    """
def read_metrics(pool: PoolingCreator) -> dict[str, Any]: ...
def pool_totals() -> dict[str, int | None]: ...
