"""The records of the public interface: the type of a memory, the state of a memory and of an image, and what a tracker
knows.

This module is imported when it is first used, because the import of `dataclasses` takes longer than ``import linmem``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from linmem._core.arguments import check_count, check_flag, shown

__all__ = ["Allocation", "DroppedInfo", "ImageInfo", "MemoryInfo", "MemoryType", "Place", "Refusal", "Refusals",
           "ScopeTotals"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from traceback import FrameSummary


@dataclass(frozen=True)
class MemoryType:
    """A WebAssembly memory type, as ``wasmtime::MemoryType``.

    Parameters
    ----------
    minimum, maximum : int
        In wasm pages of `page_size` bytes. A maximum of None: there is no maximum.
    is_64 : bool
        64-bit addresses (the memory64 proposal).
    is_shared : bool
        Shared between threads; such a memory never moves.
    page_size : int
        Bytes in a wasm page: 65536, or 1 with the custom-page-sizes proposal.
    """

    minimum: int
    maximum: int | None = None
    is_64: bool = False
    is_shared: bool = False
    page_size: int = 65536

    def __post_init__(self) -> None:
        for name in ("minimum", "maximum"):
            value = getattr(self, name)
            if not (name == "maximum" and value is None):
                # Any integer type is accepted and stored as an int, because native code and other processes read it.
                object.__setattr__(self, name, check_count(value, name, "an integer number of wasm pages"))
        check_flag(self.is_64, "is_64")
        check_flag(self.is_shared, "is_shared")
        object.__setattr__(self, "page_size", check_count(self.page_size, "page_size"))
        if self.page_size not in (1, 65536):
            raise ValueError(f"page_size must be 1 or 65536, got {shown(self.page_size)}")
        if self.maximum is not None and self.maximum < self.minimum:
            raise ValueError(f"maximum must be >= minimum ({shown(self.minimum)}), got {shown(self.maximum)}")


@dataclass(frozen=True)
class MemoryInfo:
    """The state of a memory at one moment; every size is in bytes.

    Attributes
    ----------
    base : int
        Address of byte 0.
    byte_size, byte_capacity, maximum_byte_size : int
        As the methods of the trait. A maximum of None: there is no maximum.
    reserved : int
        Reserved address space, guards included.
    committed : int
        Accessible bytes, in whole host pages: these may become resident without another page call.
    resident : int or None
        How many committed bytes are in physical memory, as the OS reports; None if the pages are not linmem's.
    pre_guard, guard : int
        Inaccessible bytes before the base and after the capacity.
    page_size : int
        The size of a host page.
    exports : int
        Buffers exported from the memory, through any handle.
    kind : str
        "mmap", "python", ...
    owner : str
        "wasmtime" while a store owns it, else "python".
    name : str or None
        The name of the outermost creator with a name, of those that the memory came through.
    growths : int
        How often the memory grew; of a slot of a pool, since its present user got it.
    """

    base: int
    byte_size: int
    byte_capacity: int
    maximum_byte_size: int | None
    reserved: int
    committed: int
    resident: int | None
    pre_guard: int
    guard: int
    page_size: int
    exports: int
    kind: str
    owner: str
    name: str | None = None
    growths: int = 0


@dataclass(frozen=True)
class DroppedInfo:
    """A memory that was dropped, as `on_dropped` of a `CallbackCreator` gets it.

    Attributes
    ----------
    base : int
        The address that byte 0 had at the end. Another memory may be there now.
    byte_size : int
        The size at the end, in bytes.
    growths : int
        How often the memory grew.
    kind : str
    name : str or None
        As in `MemoryInfo`.
    """

    base: int
    byte_size: int
    growths: int
    kind: str
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where in linmem's reservations an address lies, as `linmem.find` returns it.

    Attributes
    ----------
    memory : Memory or None
        A handle on the memory, which keeps the memory alive. None if the memory is dropped and nothing has replaced it,
        if it has moved away, if it is an idle slot of a pool, or if its creator is still making it.
    region : str
        "guard before" the base, "accessible", "reserved" for growth, or "guard after" the capacity. Of a dropped
        memory: what the address was last.
    offset : int
        Bytes from the memory's base; negative in the guard before the base.
    """

    memory: Any                 # Memory | None; the layer of this file does not know the class
    region: Literal["guard before", "accessible", "reserved", "guard after"]
    offset: int


@dataclass(frozen=True)
class ImageInfo:
    """How an image is stored; every size is in bytes.

    Attributes
    ----------
    offset, size : int
        Where its bytes lie in a memory.
    stored : int or None
        How many of the bytes take space: blocks of 4096 bytes that are not zero. None if the number is not known
        without reading a whole file.
    kind : str
        "sealed" memory, a "file", a "section" object, "private" pages of this process, or "none" for an
        image of no bytes.
    shares_pages : bool
        Whether memories share the pages of the image until they write to them. False: memories copy the pages.
    memories : int
        How many memories use the image now.
    """

    offset: int
    size: int
    stored: int | None
    kind: str
    shares_pages: bool
    memories: int


@dataclass(frozen=True)
class Refusal:
    """A new memory or a growth that a creator refused.

    Attributes
    ----------
    time : float
        Seconds since the epoch, as `time.time`.
    requested : int
        The bytes that the memory would have had.
    limit : int or None
        The bound in the way, in the unit of this bound: the bytes of a budget, of `limit_each`, of `max_reserved`, of
        the memory's maximum or of its capacity; the slots or mappings of a pool; the number of `limit_growths`. None if
        the OS, a function or a creator in Python refused.
    error : str
        The name of the exception's class: "LimitError", "PageError", "PoolError", "GrowError", or what a function
        raised. `linmem.wasmtime.cause` returns the exception itself.
    creator : str or None
        The name of the creator that refused.
    memory : str or None
        The name of the memory that did not grow, as in `MemoryInfo`. None if the memory has no name, or was not made.
    base : int or None
        The address of byte 0 of the memory that did not grow; None if no memory was made.
    """

    time: float
    requested: int
    limit: int | None
    error: str
    creator: str | None
    memory: str | None
    base: int | None


@dataclass(frozen=True)
class Refusals:
    """What a creator has refused.

    Attributes
    ----------
    count : int
        All refusals since the creator was made.
    last : tuple of Refusal
        The last refusals, at most 16, the oldest first.
    """

    count: int
    last: tuple[Refusal, ...]


@dataclass(frozen=True)
class Allocation:
    """A memory that a `TrackingCreator` has noted.

    Attributes
    ----------
    size, peak : int
        The bytes that it has, and the most that it had. A slot of a pool above the creator that has no pages has 0.
    age : float
        Seconds since the memory was made.
    stack, peak_stack : tuple of traceback.FrameSummary
        The Python stack that made the memory, and the one that grew it to its peak, the oldest frame first, as
        ``traceback.format_list`` takes them. Empty: not known.
    scope : tuple of str
        The names of the scopes in which the memory was made, the outermost first.
    name : str or None
        The name of the creator, if it has one.
    """

    size: int
    peak: int
    age: float
    stack: tuple[FrameSummary, ...]
    peak_stack: tuple[FrameSummary, ...]
    scope: tuple[str, ...]
    name: str | None


@dataclass(frozen=True)
class ScopeTotals:
    """The sums over the memories of a scope of a `TrackingCreator` and of the scopes in it.

    Attributes
    ----------
    size, peak : int
        The bytes that the memories have, and the most that they had at the same time.
    total : int
        The bytes that all memories had at their creation, and all bytes of their growths.
    memories, made : int
        How many memories exist, and how many have been made.
    """

    size: int
    peak: int
    total: int
    memories: int
    made: int
