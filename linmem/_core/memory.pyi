from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NoReturn, Protocol, SupportsIndex, final, overload

from linmem._core.arguments import AnyPath
from linmem._core.process_handles import Handle
from linmem._core.shared_handles import SharedHandle
from linmem._files.delta import Delta
from linmem._files.format import Contents
from linmem.abc import LinearMemory, MemoryCreator
from linmem.records import ImageInfo, MemoryInfo, MemoryType, Place, Refusals

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self, disjoint_base

DEFAULT_GUARD: int
tracemalloc_domain: int

# NumPy declares ndarray.__buffer__ for CPython 3.12 and later only.
class _Array(Protocol):
    @property
    def __array_interface__(self) -> dict[str, Any]: ...

# The element formats whose elements are of one Python type. Every other format gives elements of Any.
_Bool = Literal[
    "?", "@?", "=?", "<?", ">?", "!?", "b1", "=b1", "<b1", ">b1", "|b1", "bool", "bool_"] | type[bool]
_Int = Literal[
    "b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "n", "N", "P", "@b", "@B", "@h", "@H", "@i", "@I", "@l", "@L",
    "@q", "@Q", "@n", "@N", "@P", "=b", "=B", "=h", "=H", "=i", "=I", "=l", "=L", "=q", "=Q", "<b", "<B", "<h", "<H",
    "<i", "<I", "<l", "<L", "<q", "<Q", ">b", ">B", ">h", ">H", ">i", ">I", ">l", ">L", ">q", ">Q", "!b", "!B", "!h",
    "!H", "!i", "!I", "!l", "!L", "!q", "!Q", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "=i1", "=i2", "=i4",
    "=i8", "=u1", "=u2", "=u4", "=u8", "<i1", "<i2", "<i4", "<i8", "<u1", "<u2", "<u4", "<u8", ">i1", ">i2", ">i4",
    ">i8", ">u1", ">u2", ">u4", ">u8", "|i1", "|u1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
    "uint64", "int", "uint", "intp", "uintp", "byte", "ubyte", "short", "ushort", "intc", "uintc", "long", "ulong",
    "longlong", "ulonglong"] | type[int]
_Float = Literal[
    "e", "f", "d", "@e", "@f", "@d", "=e", "=f", "=d", "<e", "<f", "<d", ">e", ">f", ">d", "!e", "!f", "!d", "f2", "f4",
    "f8", "=f2", "=f4", "=f8", "<f2", "<f4", "<f8", ">f2", ">f4", ">f8", "float16", "float32", "float64", "half",
    "single", "double", "float"] | type[float]

class NativeCreator(MemoryCreator):  # registered with the trait
    """Base of the creators that wasmtime can call without the GIL. A subclass in Cython overrides `make`.

    A creator in Python implements `linmem.MemoryCreator` instead.
    """
    @property
    def name(self) -> str | None:
        """The name of the creator, or None."""
    @property
    def refusals(self) -> Refusals:
        """How many new memories and growths this creator itself has refused, and the last 16, as `Refusals`.

        A refusal counts at the creator that refused: at a `LimitingCreator` if its budget was used up, at the
        `MmapCreator` if the OS refused, at a `CallbackCreator` if a function raised. It counts each time, also if
        `on_refused` or a pool then tried again. Growths that are refused after the creator is gone count no longer.
        """
    def new_memory(self, ty: MemoryType, minimum: SupportsIndex, maximum: SupportsIndex | None,
                   reserved_size_in_bytes: SupportsIndex | None, guard_size_in_bytes: SupportsIndex, *,
                   may_move: bool | None = None, domain: str | None = None) -> Memory:
        """Make a memory, as wasmtime asks for one; mirrors ``wasmtime::MemoryCreator::new_memory``.

        Parameters
        ----------
        ty : MemoryType
            The wasm type. A shared memory never moves.
        minimum, maximum : int
            In bytes; not necessarily multiples of a page. None: the memory has no maximum.
        reserved_size_in_bytes : int or None
            Growth up to this size never moves the base. None: the creator chooses.
        guard_size_in_bytes : int
            Inaccessible bytes after the capacity, a multiple of the host page.
        may_move : bool, optional
            Whether growth past the capacity may move the base. None: no. While a Python creator answers a request on
            this thread, None means the may_move of that request (True for requests of wasmtime).
        domain : str or None
            A pool hands this user only pages that were of the same domain before. None is a domain of its own. While a
            Python creator answers a request on this thread, None means the domain of that request.

        Returns
        -------
        Memory

        Raises
        ------
        ValueError, TypeError, OverflowError
            An argument is not valid; the message names it.
        PageError
            The OS refused; the message names the limit in the way.
        GrowError
            A bound of the creator refused.
        """
    def create(self, minimum: SupportsIndex, maximum: SupportsIndex | None = None, reserve: SupportsIndex | None = None,
               guard: SupportsIndex | None = None, *, image: Image | None = None, may_move: bool = False,
               domain: str | None = None) -> Memory:
        """Make a memory for Python; `linmem.create` says what each argument means (all in bytes).

        The memory starts with the bytes of the `image`, otherwise with zeros.
        """

def image_in_file(file: BinaryIO, contents: Contents, verify: bool, map: bool) -> Image: ...
def fetch_pages(image_: Image, runs: Iterable[tuple[int, int]]) -> None: ...
def forget_touched(mem: Memory, image_: Image) -> bool: ...
def touched_pages(mem: Memory, image_: Image) -> list[tuple[int, int]]: ...
def restore_all(memories: list[Memory], images: list[Image]) -> None: ...
def shows_protected(data: Buffer | _Array) -> bool: ...
def find(address: SupportsIndex) -> Place | None:
    """Find the memory that reserves an address.

    linmem looks among the memories that it has reserved itself, also those of pools and of wasmtime stores, and among
    the last 256 reservations that it gave back. It does not find a memory whose bytes a Python creator provides.

    Parameters
    ----------
    address : int
        For example ``mem.as_ptr() + offset``, or the address in a crash report.

    Returns
    -------
    Place or None
        None: the address is in no reservation of linmem.
    """
def live() -> list[MemoryInfo]:
    """All memories that Python code or a wasmtime store holds now, as a list of `MemoryInfo` in no particular order.

    Memories of Python creators are in the list, except broken ones, and except a memory whose own `grow_to` makes this
    call. Idle slots of pools are not in the list. If another program has damaged a memory, for example cut its file
    short, the figures are those from before.

    Raises
    ------
    PageError
        The OS did not say how much of a memory is resident.
    """
def enable_fault_report(quarantine: SupportsIndex = 0) -> None:
    """Write one line to the standard error when native code is about to die of a fault in one of linmem's memories.

    The line names the access, the byte, the region and the memory, and the line of Python code that made the memory if
    the report was on then. Afterwards the process dies exactly as it would have died. A trap of WebAssembly is not
    reported, because wasmtime handles it. On Linux enable `faulthandler` before this, because a `faulthandler` that is
    enabled later raises the signal once more, without the address.

    Parameters
    ----------
    quarantine : int
        Bytes of address space of dropped memories, of at most 256 memories, that stay reserved and inaccessible, so
        that a use after the end of a memory is named. The oldest are released first, and all of them if an address
        space limit is in the way. A pool's idle slots are not in the quarantine.

    Raises
    ------
    NotImplementedError
        On this system linmem cannot report faults (only Windows, and Linux on x86-64 and on aarch64).

    Notes
    -----
    A second call changes the quarantine, and installs the handlers again if they were replaced by the default action.

    The line comes before the fault handlers of the code that runs, so it also comes if such a handler lets the process
    live. On Windows, `ctypes` raises an `OSError` for a fault inside of a function that it calls.
    """
def disable_fault_report() -> None:
    """Undo `linmem.enable_fault_report`, and release the quarantine. Without an earlier call it does nothing."""

@final
class MmapCreator(NativeCreator):
    """Makes each memory as a mapping of its own, which is reserved, committed as the memory grows, and released.

    Mirrors ``wasmtime::MemoryCreator``. Thread-safe. The creator does not keep memories.

    Parameters
    ----------
    prefault : bool
        Make every page resident when it becomes accessible, at creation and at each growth. If the machine has no
        memory left, the growth is refused, and no page fault fails later. This pays if nearly all pages are written:
        for each page, written or not, the call costs two thirds of a page fault.
    huge_pages : bool
        Make the base a multiple of a huge page (2 MiB on most machines), and ask the OS to use huge pages
        (MADV_HUGEPAGE). This pays if the minimum, or each step of growth, is at least a huge page and most of its bytes
        are written: first touches are then 3 to 5 times faster. The option gains nothing for smaller memories, for
        growth in smaller steps, and if the OS has no free huge pages.
    name : str, optional
        At most 100 bytes of printable text. The name stands in the text of what the creator refuses (`GrowError`,
        `PageError`) and in `MemoryInfo` of its memories. A memory has the name of the outermost creator with a name.
    """
    def __new__(cls, *, prefault: bool = False, huge_pages: bool = False, name: str | None = None) -> Self: ...
    @property
    def prefault(self) -> bool:
        """Whether each page is made resident when it becomes accessible."""
    @property
    def huge_pages(self) -> bool:
        """Whether the memories ask for huge pages."""

@final
class FileCreator(NativeCreator):
    """Makes the memory of a file: its bytes are those of the file, and they are there when the file is opened again.

    The file has no head, and its size is `byte_size`. A file that does not exist is made, with the mode 0600. A file
    that exists keeps its bytes: the memory is as large as the file, or as the minimum if that is larger. An `image` is
    the content of a new file, and does not change a file that has bytes already.

    A creator has one memory at a time: the next one is `BlockingIOError` while a memory of the file exists, in this
    process or in another one. `linmem.open_file` is the short way.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        Of a regular file. A symbolic link is refused.
    name : str, optional
        Stands in the text of refusals, and in `MemoryInfo`.
    """
    def __new__(cls, path: AnyPath, *, name: str | None = None) -> Self: ...
    @property
    def path(self) -> str | bytes:
        """The path of the file."""

def open_for_reading(path: AnyPath, maximum: SupportsIndex | None,
                     reserve: SupportsIndex | None) -> Memory: ...

@final
class SharedCreator(NativeCreator):
    """Makes memories that processes share and that grow: each process sees a growth at its next call.

    ``mem.handle()`` is what another process attaches, with `linmem.attach` or with ``attach=`` here. Without a name, a
    memory exists while some process has it, and leaves nothing behind, however the processes end. On Linux and
    Windows.

    Parameters
    ----------
    shm_name : str, optional
        A name of the OS, as of shm_open(3): the file ``/dev/shm/NAME``, mode 0600. The memory then exists until
        `Memory.unlink`, also if no process has it. On Windows: a section object of this name, which exists while a
        process has it. The creator makes one memory of this name; the next is
        `FileExistsError`.
    attach : optional
        A handle, the name of a memory, or a descriptor. Each memory that the creator makes shows the bytes of that
        memory. The creator itself keeps the bytes. A memory that wasmtime asks for takes over a new size in its own
        ``memory.grow``.
    name : str, optional
        Stands in the text of refusals, and in `MemoryInfo`.
    """
    def __new__(cls, *, shm_name: str | None = None, attach: SharedHandle | str | int | None = None,
                name: str | None = None) -> Self: ...
    @property
    def shm_name(self) -> str | None:
        """The name that the OS knows, or None."""

def _attach(handle_or_name: SharedHandle | str | int) -> Memory: ...
def _remove_new_file(mem: Memory) -> None: ...
def _length_before(creator: object) -> int: ...
def _stop_growth_at(step: int) -> None: ...
def wait(mem: Memory, offset: SupportsIndex, value: SupportsIndex, timeout: float | None = None) -> bool:
    """Wait while a word of a shared memory has a value; futex(2). `wake` ends the waits of other processes.

    Parameters
    ----------
    mem : Memory
        A shared memory.
    offset : int
        In bytes, a multiple of 4. The word has 32 bits, the byte order of the machine, and a sign.
    value : int
        The wait ends when the word has another value, after the next `wake` or some milliseconds later.
    timeout : float, optional
        In seconds; None: no limit.

    Returns
    -------
    bool
        False: the time is over, and the word still has the value.
    """
def wake(mem: Memory, offset: SupportsIndex, n: SupportsIndex | None = None) -> int:
    """Wake threads, of all processes, that are in `wait` for a word; futex(2).

    Parameters
    ----------
    mem : Memory
        A shared memory.
    offset : int
        As for `wait`.
    n : int, optional
        The most threads to wake; None: all.

    Returns
    -------
    int
        How many threads were woken; on Windows, which does not say it, 0.
    """

@final
class Memory(LinearMemory):  # registered with the trait
    """A linear memory: bytes at an address that a growth within `byte_capacity` does not change.

    A creator makes it (`linmem.create`, `linmem.MmapCreator`, `linmem.wasmtime.linear_memory`); the class cannot be
    called. It is a writable buffer of `len(mem)` bytes: ``memoryview(mem)``, ``numpy.asarray(mem)``. Sizes and offsets
    are in bytes.
    """
    def __init__(self) -> None: ...
    def close(self) -> None:
        """Close this handle. The pages go with the memory's last handle, and not before wasmtime has dropped it.

        A second call does nothing, also in another thread. Afterwards every other call is `ValueError`. Calls that are
        under way in other threads complete, and the pages go with the last of them. If a wasmtime store owns the
        memory, only this handle is closed: the program goes on, and `linmem.wasmtime.linear_memory` gives a new handle.

        Raises
        ------
        BufferError
            While buffers are exported from this handle; the message says how many.
        RuntimeError
            In the grow_to() of the memory in Python that is behind this handle.
        """
    @property
    def closed(self) -> bool:
        """Whether the handle was closed, by `close` or at the end of a ``with`` block."""
    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None,
                 /) -> None: ...
    def byte_size(self) -> int:
        """Bytes accessible now; mirrors ``wasmtime::LinearMemory::byte_size``."""
    def byte_capacity(self) -> int:
        """Bytes up to which growth never moves the base; ``wasmtime::LinearMemory::byte_capacity``."""
    def maximum_byte_size(self) -> int | None:
        """The most bytes that `grow_to` will ever accept, or None."""
    def grow_to(self, new_size: SupportsIndex) -> None:
        """Make `new_size` bytes accessible, the new ones zero; mirrors ``wasmtime::LinearMemory::grow_to``.

        It happens whole or changes nothing. Up to `byte_capacity` the base stays, and every view remains valid. Past
        `byte_capacity`, only a memory that was made with ``may_move=True`` grows: it moves, and only while no buffer is
        exported. Uses mprotect(2), and mremap(2) to move.

        Parameters
        ----------
        new_size : int
            In bytes. The present size does nothing.

        Raises
        ------
        ValueError
            Smaller than `byte_size`, or the memory is closed.
        GrowError
            Past the maximum, or past the capacity of a memory that cannot move (`LimitError`: a budget).
        BufferError
            Past the capacity while a buffer is exported.
        PageError
            The OS refused.
        OwnedError
            A wasmtime store owns the memory: ``wasmtime.Memory.grow`` grows it.
        """
    def as_ptr(self) -> int:
        """Address of byte 0, a multiple of the host page; mirrors ``wasmtime::LinearMemory::as_ptr``."""
    def wasm_accessible(self) -> range:
        """Addresses that native code may touch: base .. capacity + guard, accessible or a fault.

        Mirrors ``wasmtime::LinearMemory::wasm_accessible``.
        """
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __len__(self) -> int: ...
    def __bool__(self) -> Literal[True]: ...
    def __contains__(self, item: SupportsIndex | Buffer | _Array, /) -> bool: ...
    def __iter__(self) -> Iterator[int]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __dlpack__(self, **options: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    # format: a struct format, a NumPy type string or name, bool, int, float, or a NumPy dtype or scalar type.
    @overload
    def view(self, format: _Bool, offset: SupportsIndex = 0,
             count: SupportsIndex | None = None) -> memoryview[bool]:
        """Export a part of the memory as elements of a type, without a copy.

        The view stays valid through every growth, and it keeps the pages. Its length is fixed now.

        Parameters
        ----------
        format : str or type or dtype
            A `struct` format ("d", ">I"), a NumPy type string or name ("<f8", "float64"), a NumPy dtype or
            scalar type, or `bool`, `int` (64 bits), `float`. `array` takes the dtypes that have no such format.
            ``view[0]`` is NotImplementedError for formats that `memoryview` does not know: those of another byte order
            than the machine's, and "e" before Python 3.12. ``numpy.asarray(view)`` knows these formats.
        offset : int
            In bytes, of any alignment.
        count : int, optional
            In elements. The default is all whole elements up to `byte_size`.

        Returns
        -------
        memoryview
            One dimension, writable.

        Raises
        ------
        ValueError, TypeError
            There is no such format, or the part is not within `byte_size`.
        """
    @overload
    def view(self, format: _Int = "B", offset: SupportsIndex = 0,
             count: SupportsIndex | None = None) -> memoryview[int]: ...
    @overload
    def view(self, format: _Float, offset: SupportsIndex = 0,
             count: SupportsIndex | None = None) -> memoryview[float]: ...
    @overload
    def view(self, format: Literal["c"], offset: SupportsIndex = 0,
             count: SupportsIndex | None = None) -> memoryview[bytes]: ...
    @overload
    def view(self, format: Any, offset: SupportsIndex = 0,
             count: SupportsIndex | None = None) -> memoryview[Any]: ...
    # dtype: any argument of numpy.dtype(). Returns a numpy.ndarray.
    def array(self, dtype: Any, offset: SupportsIndex = 0,
              shape: SupportsIndex | Sequence[SupportsIndex] | None = None) -> Any:
        """A NumPy array on a part of the memory, without a copy, of any dtype that NumPy can view bytes as.

        The array stays valid through every growth, and it keeps the pages. Its shape is fixed now.

        Parameters
        ----------
        dtype : dtype
            Or an argument of `numpy.dtype`: also dates, records, sub-arrays and the other byte order. A dtype that
            holds Python objects is refused.
        offset : int
            In bytes, of any alignment.
        shape : int or tuple of int, optional
            In elements. One number may be -1: as many elements as fit whole below `byte_size`. None is -1.

        Returns
        -------
        numpy.ndarray
            Writable, unless the memory is read-only.

        Raises
        ------
        ValueError, TypeError
            There is no such dtype, or the part is not within `byte_size`.
        ImportError
            NumPy is not installed.
        """
    @overload
    def __getitem__(self, key: SupportsIndex, /) -> int: ...
    @overload
    def __getitem__(self, key: slice, /) -> bytes: ...
    @overload
    def __setitem__(self, key: SupportsIndex, value: SupportsIndex, /) -> None: ...
    @overload
    def __setitem__(self, key: slice, value: Buffer | _Array, /) -> None: ...
    def __delitem__(self, key: SupportsIndex | slice, /) -> NoReturn: ...
    def read(self, offset: SupportsIndex, size: SupportsIndex) -> bytes:
        """Copy `size` bytes from `offset` out, as `bytes`.

        ValueError past `byte_size`, and if a page cannot be read (`protect`).
        """
    def write(self, offset: SupportsIndex, data: Buffer | _Array) -> int:
        """Copy a contiguous buffer in at `offset` and return its length in bytes.

        ValueError past `byte_size`, if a page cannot be written, or if the data lie in a memory where a page cannot be
        read (`protect`). Nothing is written then.
        """
    def snapshot(self) -> Image:
        """An immutable `Image` of the memory's present contents.

        The call takes time and space for the pages that are not zero, and skips most of the others. The bytes
        are copied one after the other, so the image may hold a part of the bytes that other threads write meanwhile.

        Returns
        -------
        Image
            Its `offset` is 0 and its `size` is this memory's `byte_size`.

        Raises
        ------
        PageError
            The OS has no room for the image.
        TypeError
            A page is inaccessible.
        """
    def restore(self, image: Image, *, zero_grown: bool = False) -> None:
        """Restore every byte from an image; the bytes outside of the image become zero.

        Views stay valid and see the restored bytes. A memory that started from the image, or was restored to it before,
        takes time for the pages that were written since. Another memory is mapped or copied anew.

        The size stays, because the guest already knows the memory's size. So a memory that is larger than the image's
        memory was is refused: the size that the image records (an allocator's, above all) would be wrong.

        Parameters
        ----------
        image : Image
        zero_grown : bool
            Accept a memory that has grown, and zero the bytes that it has grown by.

        Raises
        ------
        ValueError
            The memory is smaller than the image, or larger without `zero_grown`. A memory that a native creator made
            from this image with a larger minimum has its right size as long as it does not grow.
        OwnedError
            A wasmtime store owns the memory, and another thread is growing it now (a call runs in that store), or is
            in another call that looks at all of it. linmem cannot know of other calls in that store.
        TypeError
            A page cannot be written.
        """
    @overload
    def dirty_pages(self, since: Image, *, as_array: Literal[False] = False) -> list[tuple[int, int]]:
        """Where the memory differs from an image, as ranges of whole host pages.

        Exact: a page that was written and holds the image's bytes again is not among them. A page outside of the image
        is compared with zeros.

        Parameters
        ----------
        since : Image
        as_array : bool
            Return a NumPy array of shape (n, 2) and type uint64.

        Returns
        -------
        list of (int, int)
            Offset and size in bytes, in order. Neighbours are one range, and the last range ends at `byte_size` at
            most.

        Raises
        ------
        TypeError
            A page is inaccessible.
        """
    @overload
    def dirty_pages(self, since: Image, *, as_array: bool) -> Any: ...
    def apply(self, delta: Delta) -> None:
        """Write a `Delta` into the memory, which has the contents of the delta's base.

        A memory that is smaller than the delta's is grown first. The bytes are not compared with the base's. The size
        must be the base's, the delta's, or between.

        Parameters
        ----------
        delta : Delta

        Raises
        ------
        ValueError
            The memory is smaller than the delta's base, or larger than the delta's memory.
        OwnedError
            The memory had to grow, and a wasmtime store owns it. Nothing was written.
        GrowError, PageError
            The memory cannot grow so far. Nothing was written.
        TypeError
            A page that the delta writes cannot be written. Nothing was written, and the memory has not grown.
        """
    def protect(self, offset: SupportsIndex, size: SupportsIndex, access: Literal["none", "r", "rw", "rx"]) -> None:
        """Set the access of whole host pages; mprotect(2).

        Calls of linmem that would touch a page against its access raise: `read`, `write`, ``mem[...]`` ValueError,
        calls on the whole memory (`snapshot`, `restore` ...) TypeError. Code that touches the page through a view, or
        by its address, faults, which ends the process. A memory of which no byte can be written exports read-only
        buffers; views that exist already stay writable and fault.

        A memory with protected pages never moves. "rx" is for machine code that was written before: pages are never
        writable and executable at once. New pages of a growth are "rw".

        Parameters
        ----------
        offset, size : int
            In bytes, multiples of the host page, within `byte_size`.
        access : {"none", "r", "rw", "rx"}

        Raises
        ------
        ValueError
            The access is another one, or the range is not whole pages of the memory.
        PageError
            The OS refused, as some hosts refuse "rx". Every page has the access that it had. If the OS refuses that
            too, the access of a page is unknown, and calls raise as if the page were inaccessible, until it is
            protected anew. The same holds in a child that was forked while another thread was in this call.
        OwnedError
            A wasmtime store owns the memory, and access is not "rw". A plain load or store of the guest would trap, but
            ``memory.fill``, ``memory.copy`` and WASI calls run in native code, where a fault ends the process.
        TypeError
            The pages are not linmem's (a memory made in Python).
        """
    # source: a file is an object with fileno().
    def map(self, offset: SupportsIndex, source: Image | Memory | Any, source_offset: SupportsIndex = 0,
            size: SupportsIndex | None = None, access: Literal["rw", "r"] = "rw") -> None:
        """Show pages of a source in a part of the memory, without a copy; mmap(2), MAP_FIXED.

        ========================= ============================ =========================================
        source                    what a write does            what later writes to the source do
        ========================= ============================ =========================================
        an `Image`                changes only this memory     there are none
        a file open for reading   changes only this memory     they show in pages that were not written
        a file open for update    changes the file             they show
        a shared memory           changes that memory          they show
        a `linmem.empty` array    changes the array            they show
        ========================= ============================ =========================================

        Views stay valid and show the new pages. Offsets and sizes are multiples of the host page. The last page of a
        source may be incomplete: its rest is zero. `docs/howto/mapping.md` says what other calls do on such pages.

        Parameters
        ----------
        offset : int
            Where the pages appear in this memory.
        source : Image, Memory, array or file
            A memory that processes share, or the memory of a file; a contiguous array, or another buffer, that begins
            at a host page of such a memory. A file is an object with
            ``fileno()``, of a regular file. Into a memory that a wasmtime store owns, the bytes of a file that other
            programs can cut short are copied. If such a file is open for update, it is refused, and so is the memory
            of such a file, because an access to a page past the end of a file ends the process.
        source_offset : int
            Where the pages begin in the source; for an `Image`, counted from its first byte.
        size : int, optional
            In bytes; the default is the rest of the source, to the end of its last page.
        access : {"rw", "r"}
            "r": the pages are read-only, as after `protect`. In a memory that a wasmtime store owns, "r" means that
            writes change only this memory.

        Raises
        ------
        ValueError
            The range is not whole pages of this memory or of the source, or the source is a file that cannot be read or
            that is not a regular file.
        TypeError
            The source has no pages that another memory can show, the pages of this memory are not its own, or the
            system cannot map pages (Windows), or allocates no space in a file that is open for update (macOS, BSD).
        OwnedError
            A wasmtime store owns the memory, and the source is a file that is open for update, or its memory.
        PageError
            The OS refused. Nothing has changed, or, by an old kernel that failed half way, the range is zero.
        MemoryError
            The windows of all memories would take more than half of the mappings of the process.
        """
    def unmap(self, offset: SupportsIndex, size: SupportsIndex) -> None:
        """Replace the pages of a range that show a source by pages of zeros; other pages stay as they are.

        Parameters
        ----------
        offset, size : int
            In bytes, multiples of the host page, within `byte_size`.

        Raises
        ------
        ValueError
            The range is not whole pages of the memory.
        PageError
            The OS refused. Windows before the refused one may have been unmapped.
        """
    def discard(self, offset: SupportsIndex = 0, size: SupportsIndex | None = None) -> None:
        """Give the pages back to the OS; the bytes read as zero afterwards. madvise(2), MADV_DONTNEED.

        Also in a memory that started from an image the bytes read as zero, and no longer as the image.

        Parameters
        ----------
        offset, size : int
            In bytes; the default is the rest of the memory. Parts of a page are set to zero. If the range has protected
            pages, it must be whole host pages.

        Raises
        ------
        ValueError
            The range is not within `byte_size`.
        PageError
            The OS refused; no byte has changed.
        TypeError
            The pages are not linmem's; or some are protected and the OS cannot discard such pages; or some are
            protected and some are an image's.
        """
    def prefault(self, offset: SupportsIndex = 0, size: SupportsIndex | None = None) -> None:
        """Make the pages of a range resident now; no byte changes. madvise(2), MADV_POPULATE_WRITE.

        Parameters
        ----------
        offset, size : int
            In bytes; the default is the rest of the memory. Rounded outwards to host pages.

        Raises
        ------
        ValueError
            The range is not within `byte_size`.
        PageError
            The OS refused, or a page cannot be written.
        TypeError
            The pages are not linmem's, or are protected and the OS would fault.
        """
    def flush(self, offset: SupportsIndex = 0, size: SupportsIndex | None = None) -> None:
        """Make the bytes of a file memory durable: they are in the file, also if the power fails after the call.

        msync(2), and fdatasync(2) after a growth. The call may write more than the range. Growth and close() do not
        flush: the OS writes the bytes within seconds, also if the process is killed, but not if the power fails.

        Parameters
        ----------
        offset, size : int
            In bytes; the default is the rest of the memory.

        Raises
        ------
        ValueError
            The range is not within `byte_size`, or the memory was opened for reading.
        PageError
            The OS could not write. Bytes that were not flushed before may be lost.
        TypeError
            The memory has no file.
        """
    def handle(self) -> SharedHandle:
        """What another process needs to attach this shared memory: `linmem.attach` takes it.

        The handle can be pickled any number of times, also as an argument of a ``Process``, a ``Pool`` or a Dask task
        on this machine. It does not keep the memory.

        Returns
        -------
        SharedHandle

        Raises
        ------
        TypeError
            The memory is not a shared one.
        """
    def wait_for_growth(self, size: SupportsIndex, timeout: float | None = None) -> bool:
        """Wait until a shared memory has at least `size` bytes; futex(2).

        Parameters
        ----------
        size : int
            In bytes.
        timeout : float, optional
            In seconds; None: no limit.

        Returns
        -------
        bool
            False: the time is over. In a memory that a wasmtime store owns, True means that other processes have the
            size; the guest has it after its next ``memory.grow``.

        Raises
        ------
        ValueError
            The memory can never have `size` bytes.
        TypeError
            The memory is not a shared one.
        """
    def unlink(self) -> None:
        """Remove the name of a shared memory (`shm_name`). Processes that have the memory keep it.

        Raises
        ------
        ValueError
            The memory has no name.
        FileNotFoundError
            The name has been removed already.
        TypeError
            The memory is not a shared one; or on Windows, where the name is gone with the last process.
        """
    def info(self) -> MemoryInfo:
        """The memory's present figures, as a `MemoryInfo`; asks the OS which pages are resident (mincore(2)).

        A page that was only read counts as resident, as the kernel's page of zeros is.
        """
    def __reduce__(self) -> NoReturn: ...

@final
class Image:
    """Bytes at an offset of a memory, and zeros everywhere else; immutable.

    Made by `Memory.snapshot` and `Image.from_bytes`. Memories that start from an image share its pages until they write
    them, if the OS can do that (see `linmem info`); otherwise the bytes are copied. Zeros take no space. An image is a
    read-only buffer of `size` bytes, and equals every image of the same bytes at the same offset. An image exists as
    long as anything uses it, and any thread may use it.

    Attributes
    ----------
    offset, size : int
        Where its bytes lie in a memory.
    """
    def __init__(self) -> None: ...
    @staticmethod
    def from_bytes(data: Buffer | _Array, offset: SupportsIndex = 0) -> Image:
        """Copy a buffer into a new image.

        Parameters
        ----------
        data : buffer
            Contiguous; the image's bytes.
        offset : int
            Where they lie in a memory; any byte.

        Raises
        ------
        PageError
            The OS has no room for the image.
        """
    @staticmethod
    def from_pieces(pieces: Iterable[tuple[SupportsIndex, Buffer | _Array]], size: SupportsIndex,
                    offset: SupportsIndex = 0) -> Image:
        """An image of `size` bytes at `offset` that consists of buffers with zeros between them.

        Parameters
        ----------
        pieces : iterable of (int, buffer)
            Each buffer with its offset in a memory, in ascending order and without overlap.
        size, offset : int
            In bytes; all pieces lie within.
        """
    @staticmethod
    def from_fd(fd: int, size: SupportsIndex, offset: SupportsIndex = 0, *, position: SupportsIndex = 0,
                runs: Iterable[tuple[SupportsIndex, SupportsIndex]] | None = None,
                digest: str | None = None) -> Image:
        """An image whose pages are the pages of a file. A page is read when it is first needed.

        The file holds whole host pages, from the page of `offset` on; the bytes around the image's own must be zero.
        The descriptor is duplicated and may be closed. If a program later writes to the file, or cuts it short, bytes
        change and accesses fault. No program can change memory that was sealed (memfd_create(2)).

        Parameters
        ----------
        fd : int
            A descriptor of a file that is open for reading only, or of sealed memory.
        size, offset : int
            As of any image.
        position : int
            Where the pages begin in the file, a multiple of the host page.
        runs : iterable of (int, int), optional
            What `runs()` of the image returns, if it is known. Outside of the runs the file must have holes or zeros,
            which is checked.
        digest : str, optional
            What `digest` must be. The whole file is read to compare it.

        Raises
        ------
        ValueError
            The file is too short or can still be written to, cannot be read, is not a regular file, or does not hold
            what the arguments claim.
        PageError
            The OS refused.
        """
    @property
    def offset(self) -> int:
        """Where the bytes of the image lie in a memory, in bytes."""
    @property
    def size(self) -> int:
        """How many bytes the image has."""
    @property
    def digest(self) -> str:
        """A hash of the image, as hexadecimal digits; the same on every machine.

        BLAKE2b of 32 bytes over the offset and the size, and then over the offset, the size and the bytes of each run
        of blocks that are not all zero. Blocks have 4096 bytes and begin at a multiple of 4096 in a memory; numbers
        have 8 bytes, least significant first. The first read of this property computes the hash.
        """
    def runs(self) -> list[tuple[int, int]]:
        """Where the image is not zero, as a list of (offset, size) in a memory.

        In ascending order, with a gap between two runs, in multiples of 4096 bytes. The first and the last run may
        reach beyond the image's own bytes (where it is zero).
        """
    def __len__(self) -> int: ...
    def __bool__(self) -> Literal[True]: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def fileno(self) -> int:
        """The descriptor (a handle on Windows) that shows the image's whole host pages to another process.

        The image owns the descriptor: duplicate it to keep it. The other process opens it with
        ``Image.from_fd(fd, img.size, img.offset)``. OSError if there is no descriptor.
        """
    def info(self) -> ImageInfo:
        """How the image is kept, as an `ImageInfo`."""
    def new_memory(self, maximum: SupportsIndex | None = None, *, minimum: SupportsIndex | None = None,
                   creator: NativeCreator | None = None, reserve: SupportsIndex | None = None,
                   guard: SupportsIndex | None = None, may_move: bool = False, domain: str | None = None) -> Memory:
        """A memory that starts with the image's bytes, and shares the image's pages until it writes them.

        Parameters
        ----------
        maximum, reserve, guard, may_move, domain
            As of `linmem.create`.
        minimum : int, optional
            In bytes, at least the end of the image (offset + size), which is the default.
        creator : NativeCreator, optional
            It makes the memory; the default is an `MmapCreator`. Pass a creator in Python as a `PythonCreator`; its
            memories get a copy of the bytes.

        Raises
        ------
        ValueError
            The minimum is below the end of the image.
        PageError, GrowError
            As of `linmem.create`.
        """
    def diff(self, other: Memory | Image) -> Delta:
        """The changes from this image to a memory or to another image, as a `Delta`.

        Parameters
        ----------
        other : Memory or Image

        Raises
        ------
        TypeError
            The memory has an inaccessible page (`Memory.protect`).
        """
    def apply(self, delta: Delta) -> Image:
        """The image that the delta leads to from this one.

        Raises
        ------
        ValueError
            The delta's base is another image, or the result is not the delta's target.
        """
    def save(self, path: AnyPath, *, packed: bool = False) -> None:
        """Write the image to a file. Whenever the process is killed, the whole file is there, or the old one is.

        An image that was opened from the old file keeps the old file. The new file gets the owner and the rights of the
        old one. Into a pipe or a character device, the packed format is written.

        Parameters
        ----------
        path : path-like
        packed : bool
            True: the file has no holes and is as long as the bytes that are not zero, for an upload or an archive; it
            is read into memory when it is opened. False: the file can be mapped, is as long as the image, and has holes
            for zeros.

        Raises
        ------
        OSError
            The exception names `path`. The old file is still there.
        """
    @staticmethod
    def open(path: AnyPath, verify: bool = False, *, map: bool = True,
             max_size: SupportsIndex | None = None) -> Image:
        """The image that a file holds.

        Parameters
        ----------
        path : path-like
            Written by `save`, on any machine.
        verify : bool
            True: call `verify()` at once. False: check the header, the table, each byte that is read instead of mapped,
            and that the file holds zeros where the table says zeros.
        map : bool
            True: if the file is not packed, a page is read from the file when the page is first needed. A program that
            changes the file later changes the image, so open only files that no other user can write. False: read the
            whole file now.
        max_size : int, optional
            Bytes; a larger image is refused.

        Raises
        ------
        FileFormatError
            The file is not an image, or is damaged.
        OSError, PageError
            The file cannot be read, or the OS has no room for the image.
        """
    def verify(self) -> None:
        """Compare every byte with the checksums of the file that the image is a mapping of.

        Another image has nothing to compare: bytes that were read from a file were checked then.

        Raises
        ------
        FileFormatError
            The file is damaged.
        """
    def handle(self) -> Handle:
        """An object that `multiprocessing` can send to another process of this machine without a copy of the bytes.

        Pass it as an argument of a Process, or through a Queue or a Pipe. In the other process, ``handle.image`` is an
        image of the same pages.

        Raises
        ------
        OSError
            No descriptor shows the pages; see `fileno`.
        """
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    def __reduce_ex__(self, protocol: SupportsIndex, /) -> str | tuple[Any, ...]: ...

@disjoint_base
class RowBuffer:
    """Rows of equal size in a memory: the base of `linmem.GrowableArray`."""
    def _open(self, memory: Memory, start: SupportsIndex, row_bytes: SupportsIndex, most: SupportsIndex,
              count_at: SupportsIndex, kind: str) -> None:
        """The caller has checked the numbers: the head ends at `start`, and the text of the number is inside."""
    def append(self, row: Any) -> None:
        """Add one row at the end.

        Parameters
        ----------
        row : array_like
            What NumPy converts to the dtype without loss of its kind: a float is not a row of integers.

        Raises
        ------
        TypeError, ValueError, OverflowError
            The row does not convert, or has another shape than `row_shape`. Nothing was added.
        GrowError, PageError
            The memory cannot grow. No row was added.
        """
    def resize(self, n: SupportsIndex) -> None:
        """Change the number of rows. Rows that are new, or that come back, are zero.

        Arrays that were taken from this one before stay valid and keep their length.

        Parameters
        ----------
        n : int
            Rows.

        Raises
        ------
        GrowError, PageError
            The memory cannot grow. Nothing has changed.
        """
    def clear(self) -> None:
        """Remove all rows. The bytes stay where they are until rows are added again."""
    def __reduce__(self) -> Any: ...
    def _extend_bytes(self, data: Buffer) -> None:
        """Add rows that have the bytes of a contiguous buffer."""
    def _take_rows(self, staged: RowBuffer) -> None:
        """Add the rows of a private RowBuffer that no other code uses. Its pages go back to the OS as they are copied,
        so that the rows are hardly ever resident twice.
        """
    def __len__(self) -> int: ...
    @property
    def memory(self) -> Memory:
        """The `Memory` that has the rows: for `flush`, `info` and `protect`."""
