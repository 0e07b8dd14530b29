"""NumPy arrays on pages of linmem: `GrowableArray`, whose rows never move while it grows, and `empty`."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import islice
from operator import index

from linmem._core.arguments import check_count, shown
from linmem._core.element_formats import check_dtype, import_numpy
from linmem._core.memory import FileCreator, Memory, RowBuffer, SharedCreator, _length_before, _remove_new_file
from linmem._files.npy_head import MOST_HEAD_BYTES, make_head, read_head
from linmem._os import pages
from linmem.creators import attach, create

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Any, SupportsIndex

    from typing_extensions import Self

    from linmem._core.shared_handles import SharedHandle
    from linmem._files.npy_head import Head
    from linmem.abc import MemoryCreator

__all__ = ["GrowableArray", "empty"]

_MOST_BYTES = 1 << 63
_PAGE = pages.describe()["page_size"]
_SHARES = pages.describe()["capabilities"]["shares"]
_ROWS_AT_ONCE = 1 << 14         # rows that extend() takes from an iterator before it converts them
# NumPy's kinds of numbers, from the narrow to the wide. A value of a wider kind would lose something.
_WIDTHS = {"b": 0, "u": 1, "i": 1, "f": 2, "c": 3}
# Kinds of memories whose bytes others see: the head of an .npy file comes before the rows, and has their number.
_HEADED = ("shared", "file")
_FAST_KINDS = {"<f8": "d", "<i8": "q", "<i4": "i", "|u1": "B", "|b1": "?"}


def empty(shape: Any, dtype: Any = float, *, creator: MemoryCreator | None = None) -> Any:
    """A NumPy array of zeros on whole host pages of its own.

    No other object is on these pages, and the rest of the last page is zero. So the pages can be protected, discarded
    and shown elsewhere: `Memory.map` takes the array as a source, and ``linmem.find(array.ctypes.data).memory`` is the
    `Memory` that has the pages.

    Parameters
    ----------
    shape : int or tuple of int
    dtype : dtype
        Or an argument of `numpy.dtype`, but no dtype that holds Python objects.
    creator : MemoryCreator, optional
        The creator of the memory; by default a `SharedCreator`, so the array takes a descriptor, and a forked child
        shares its bytes. The arrays of an `MmapCreator` do neither, and cannot be shown elsewhere. Where no memory can
        be shared, an `MmapCreator` is the default.

    Returns
    -------
    numpy.ndarray

    Raises
    ------
    ValueError, TypeError, OverflowError
        An argument is not valid; the message has its name, its value and the bound.
    PageError
        The OS refused.
    ImportError
        NumPy is not installed.
    """
    element = check_dtype(dtype, "linmem.empty")
    lengths = _shape(shape, "shape")
    size = math.prod(lengths) * element.itemsize
    whole = -(-size // _PAGE) * _PAGE
    if whole >= _MOST_BYTES:
        raise OverflowError(f"shape must be one of less than 2**63 bytes, got {shown(shape)} with {element.itemsize}"
                            " bytes for each element")
    if creator is None and _SHARES:
        creator = SharedCreator()
    return create(whole, whole, creator=creator, reserve=whole).array(element, 0, lengths)


class GrowableArray(RowBuffer):
    """Rows of one dtype, which never move while more are added.

    Address space is reserved for the rows to come, so `append` copies no row that is there already, and every array
    that was taken from this one stays valid.

    Any number of threads may add rows at the same time: each call adds its rows in one piece. Bytes of rows are not
    synchronised. A forked child has a copy.

    Parameters
    ----------
    dtype : dtype
        Or an argument of `numpy.dtype`: also records, dates and text, but no Python objects.
    row_shape : int or tuple of int
        The shape of one row; ``()``: a row is one element.
    maximum : int, optional
        The most rows, at least those that are in the memory already. None: linmem chooses how much address space is
        reserved, as `linmem.create` does.
    creator : MemoryCreator, optional
        The creator of the memory; by default an `MmapCreator`.

    Raises
    ------
    ValueError, TypeError, OverflowError
        An argument is not valid; the message has its name, its value and the bound.
    PageError, GrowError
        The OS or the creator refused. A file that the call has made is removed again.
    ImportError
        NumPy is not installed.

    Examples
    --------
    >>> a = linmem.GrowableArray("f8")
    >>> a.append(1.5)
    >>> a.extend([2.5, 3.5])
    >>> a.array
    array([1.5, 2.5, 3.5])
    """

    _whole: Any = None          # an array of all rows that the memory had room for when it was last asked
    _closing = False            # whether close() runs, which would be refused because of `_whole`

    def __init__(self, dtype: Any, row_shape: SupportsIndex | tuple[SupportsIndex, ...] = (), *,
                 maximum: SupportsIndex | None = None, creator: MemoryCreator | None = None) -> None:
        element = check_dtype(dtype, "GrowableArray")
        shape = (*_shape(row_shape, "row_shape"), *element.shape)
        row_bytes = element.base.itemsize * math.prod(shape)
        if row_bytes == 0:
            raise ValueError(f"row_shape must be one of at least one element, got {shown(row_shape)}")
        if row_bytes >= _MOST_BYTES:
            raise OverflowError(f"row_shape must be one of less than 2**63 bytes, got {shown(row_shape)}")
        most = (_MOST_BYTES - 1 - MOST_HEAD_BYTES) // row_bytes
        if maximum is not None:
            maximum = check_count(maximum, "maximum", "a number of rows")
            if maximum > most:
                raise OverflowError(f"maximum must be <= {most} rows of {row_bytes} bytes, got {shown(maximum)}")
        head: Head | None = None
        wrong = ""
        if creator is not None:     # else the memory is not one that others see
            try:
                head = make_head(element.base, shape)
            except ValueError as error:
                if isinstance(_lowest(creator), (FileCreator, SharedCreator)):      # before it makes a file
                    raise
                wrong = str(error)
        most_bytes = None
        if maximum is not None:
            # A file may be longer than its rows, because it was grown ahead, or because rows were removed.
            most_bytes = max((len(head.raw) if head else 0) + maximum * row_bytes, _length_before(_lowest(creator)))
        try:
            memory = create(0, most_bytes, creator=creator)
        except ValueError as error:
            if maximum is None:
                raise
            raise ValueError(f"maximum must be one that the creator takes, got {maximum} rows of {row_bytes} bytes:"
                             f" {error}") from error
        try:
            if memory.info().kind not in _HEADED:
                head = None
            elif head is None:
                raise ValueError(wrong)
            else:
                _begin_with(memory, head)
            self._begin(memory, head, element.base, shape, maximum)
        except BaseException:
            _remove_new(memory, creator)
            memory.close()
            raise

    @classmethod
    def attach(cls, memory: Memory) -> Self:
        """The array whose rows are in a memory already: one of a file, for readers too, or a shared one.

        Parameters
        ----------
        memory : Memory
            It begins with the head of an .npy file that a GrowableArray wrote; dtype and row shape come from there. Its
            maximum bounds the rows.

        Raises
        ------
        ValueError
            The memory has no such head, or the head is damaged, or it says more rows than there are.
        TypeError
            `memory` is not a `Memory`.

        Examples
        --------
        >>> a = linmem.GrowableArray.attach(linmem.open_file("prices.npy", "r"))
        """
        if not isinstance(memory, Memory):
            raise TypeError(f"memory must be a linmem.Memory, got {shown(memory)}")
        head, _ = read_head(memory.read(0, min(len(memory), MOST_HEAD_BYTES)))
        most = memory.maximum_byte_size()
        row_bytes = head.dtype.itemsize * math.prod(head.row_shape)
        made = cls.__new__(cls)
        made._begin(memory, head, head.dtype, head.row_shape,
                    None if most is None else (most - len(head.raw)) // row_bytes)
        return made

    def _begin(self, memory: Memory, head: Head | None, dtype: Any, row_shape: tuple[int, ...],
               maximum: int | None) -> None:
        """Raises if the memory has a head that says more rows than there are, or than the maximum."""
        try:
            import_numpy("GrowableArray").empty((0, *row_shape), dtype)
        except ValueError as error:         # too many dimensions
            raise ValueError(f"row_shape must be one that NumPy takes, got {shown(row_shape)}: {error}") from None
        row_bytes = dtype.itemsize * math.prod(row_shape)
        start = len(head.raw) if head else 0
        most = (_MOST_BYTES - 1 - start) // row_bytes if maximum is None else maximum
        fast = "" if row_shape else _FAST_KINDS.get(dtype.str, "")
        self._open(memory, start, row_bytes, most, head.count_at if head else 0, fast)
        self._start, self._dtype, self._row_shape, self._maximum = start, dtype, row_shape, maximum
        n = len(self)
        if n > most:
            raise ValueError(f"maximum must be >= the number of rows that are there ({n}), got {most}")

    # -- rows come

    def extend(self, rows: Any) -> None:
        """Add many rows at the end: all, or none if one does not convert or does not fit.

        Parameters
        ----------
        rows : array_like or iterable
            An array is copied at once; it may be this one, or a part of it. An iterator is asked for all rows before
            the first is added, so an exception in it changes nothing.

        Raises
        ------
        TypeError, ValueError, OverflowError
            A row does not convert, or has another shape than `row_shape`.
        GrowError, PageError
            There is no room.
        """
        numpy = import_numpy("GrowableArray")
        if isinstance(rows, GrowableArray):
            rows = rows.array
        elif not hasattr(type(rows), "__array__"):
            with suppress(TypeError):           # not a buffer
                rows = numpy.asarray(memoryview(rows))      # numpy.asarray(b"ab") would be one text
        if hasattr(type(rows), "__array__") or hasattr(type(rows), "__array_interface__"):
            self._extend_bytes(self._bytes_of(numpy.asarray(rows), "rows", many=True))
            return
        try:
            left = iter(rows)
        except TypeError:
            raise TypeError(f"rows must be an array or an iterable of rows, got {type(rows).__name__}") from None
        first = list(islice(left, _ROWS_AT_ONCE))
        if len(first) < _ROWS_AT_ONCE:
            self._extend_bytes(self._bytes_of(first, "rows", many=True))
            return
        staged = RowBuffer()
        row_bytes = self._dtype.itemsize * math.prod(self._row_shape)
        with create(0, may_move=True) as memory:
            staged._open(memory, 0, row_bytes, (_MOST_BYTES - 1) // row_bytes, 0, "")
            while first:
                staged._extend_bytes(self._bytes_of(first, "rows", many=True))
                first = list(islice(left, _ROWS_AT_ONCE))
            self._take_rows(staged)

    def _append_converted(self, row: Any) -> None:
        self._extend_bytes(self._bytes_of(row, "row", many=False))

    def _bytes_of(self, given: Any, name: str, many: bool) -> Any:
        """The bytes of one row or of many, as an array of uint8."""
        numpy = import_numpy("GrowableArray")
        try:
            wrong = _loss(numpy, given, self._dtype)
            found = numpy.asarray(given, self._dtype) if not wrong else None
        except (TypeError, ValueError, OverflowError) as error:
            raise _kind_of(error)(f"{name} must convert to {self._text()}, got {shown(given)}: {error}") from None
        if found is None:
            raise TypeError(f"{name} must convert to {self._text()} without loss, got {wrong}: {shown(given)}")
        if many and found.ndim == 1 and found.size == 0 and not hasattr(type(given), "__array__"):
            return b""                                          # no rows, so no row has another shape
        got = found.shape
        if got[many:] != self._row_shape or len(got) < many:
            del found       # the traceback of the error would keep the array, and so pin the memory behind it
            wanted = str(("n", *self._row_shape)).replace("'", "") if many else self._row_shape
            raise ValueError(f"{name} must have the shape {wanted}, got {got}")
        return numpy.ascontiguousarray(found).reshape(-1).view(numpy.uint8)

    # -- rows are used

    @property
    def dtype(self) -> Any:
        """The dtype of the elements of a row."""
        return self._dtype

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row."""
        return self._row_shape

    @property
    def maximum(self) -> int | None:
        """The most rows, or None."""
        return self._maximum

    @property
    def array(self) -> Any:
        """A NumPy array of all rows of now, without a copy.

        It stays valid and keeps its length while rows are added, and after `close`. Rows that are removed and added
        again change in it.
        """
        n = len(self)
        whole = self._whole
        if whole is None or n > len(whole):
            whole = self.memory.array(self._dtype, self._start, (-1, *self._row_shape))
            self._whole = whole
            if self._closing or self.memory.closed:     # on another thread: `_whole` would keep the pages
                self._whole = None
        return whole[:n]

    def __getitem__(self, key: Any) -> Any:
        array = self.array
        try:
            return array[key]
        except (TypeError, ValueError, OverflowError) as error:
            raise _kind_of(error)(f"key must be an index that NumPy takes, got {shown(key)}: {error}") from None

    def __setitem__(self, key: Any, value: Any) -> None:
        try:
            self.array[key] = value
        except (TypeError, ValueError, OverflowError) as error:
            raise _kind_of(error)(f"value must be what NumPy can assign to rows of {self._text()} by the key"
                                  f" {shown(key)}, got {shown(value)}: {error}") from None

    def __iter__(self) -> Iterator[Any]:
        return iter(self.array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.array
        if dtype is not None and array.dtype != dtype:
            if copy is False:
                raise ValueError(f"copy must not be False for another dtype than {array.dtype}, got dtype={dtype}")
            return array.astype(dtype)
        return array.copy() if copy else array

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def _text(self) -> str:
        """The dtype and the shape of a row, as messages show them."""
        return f"{self._row_shape} {self._dtype}" if self._row_shape else str(self._dtype)

    def __repr__(self) -> str:
        if self.closed:
            return "<linmem.GrowableArray, closed>"
        try:
            rows: object = len(self)
        except (MemoryError, OSError, RuntimeError, ValueError):    # for example, its file was cut short
            rows = "an unknown number of"
        return f"<linmem.GrowableArray: {rows} rows of {self._text()}>"

    # -- lifetime

    def close(self) -> None:
        """Close the array. Its pages go now.

        Raises
        ------
        BufferError
            While arrays that were taken from this one exist.
        """
        self._closing = True
        try:
            self._whole = None
            self.memory.close()
        finally:
            self._closing = False

    @property
    def closed(self) -> bool:
        """Whether the array was closed, by `close` or at the end of a ``with`` block."""
        return self.memory.closed

    def __enter__(self) -> Self:
        self.memory.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Close the array, also while arrays that were taken from it exist: the pages then go with the last one."""
        try:
            self.memory.__exit__(kind, error, trace)
        finally:
            self._whole = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the rows, on a memory of an `MmapCreator`; of a shared array, its live handle."""
        try:
            handle = self.memory.handle()
        except TypeError:       # the memory is not shared
            return self._copied()
        return _attached, (type(self), handle)

    def _copied(self) -> tuple[Any, ...]:
        return _copy, (type(self), self._dtype, self._row_shape, self._maximum, self.array)

    def __copy__(self) -> Self:
        make, arguments = self._copied()
        made: Self = make(*arguments)
        return made

    def __deepcopy__(self, memo: object) -> Self:
        return self.__copy__()


def _loss(numpy: Any, given: Any, dtype: Any) -> str:
    """What of a value the conversion would lose, as the dtype that the value has; "" if nothing.

    Raises
    ------
    OverflowError
        The value has an integer that the dtype cannot hold. NumPy takes it modulo a power of two.
    """
    kind = getattr(given, "dtype", None)
    if isinstance(kind, numpy.dtype) and not numpy.can_cast(kind, dtype, "same_kind"):
        return str(kind)
    if dtype.names is not None and not isinstance(kind, numpy.dtype):
        return _loss_of_fields(numpy, numpy.asarray(given, _of_objects(numpy, dtype)), dtype)
    if dtype.kind not in _WIDTHS:
        return ""
    found = numpy.asarray(given)
    if found.size == 0:
        return ""
    if not isinstance(kind, numpy.dtype) and _WIDTHS.get(found.dtype.kind, 9) > _WIDTHS[dtype.kind]:
        # NumPy makes floats or objects of integers that 64 bits cannot hold.
        found = numpy.asarray(given, object)
        if dtype.kind == "b" or not all(map(_is_integer, found.flat)):
            return str(numpy.asarray(given).dtype)
    if dtype.kind in "iu" and found.dtype.kind in "iuO" and not numpy.can_cast(found.dtype, dtype):
        bounds = numpy.iinfo(dtype)
        for n in (int(found.min()), int(found.max())):
            if not bounds.min <= n <= bounds.max:
                raise OverflowError(f"an integer must be from {bounds.min} to {bounds.max}, got {n}")
    return ""


def _loss_of_fields(numpy: Any, records: Any, dtype: Any) -> str:
    """`_loss` of each field of records whose values are objects."""
    for name in dtype.names:
        field = dtype[name].base
        wrong = (_loss_of_fields(numpy, records[name], field) if field.names is not None
                 else _loss(numpy, records[name].tolist(), field))
        if wrong:
            return f"{wrong} in the field {name!r}"
    return ""


def _of_objects(numpy: Any, dtype: Any) -> Any:
    """The dtype with the same fields, all of them of Python objects."""
    if dtype.subdtype is not None:
        return numpy.dtype((_of_objects(numpy, dtype.base), dtype.shape))
    if dtype.names is None:
        return numpy.dtype(object)
    return numpy.dtype([(name, _of_objects(numpy, dtype[name])) for name in dtype.names])


def _is_integer(value: Any) -> bool:
    """An array of floats has an __index__() too, which raises."""
    try:
        index(value)
    except TypeError:
        return False
    return True


def _copy(kind: type[GrowableArray], dtype: Any, row_shape: tuple[int, ...], maximum: int | None,
          rows: Any) -> GrowableArray:
    made = kind(dtype, row_shape, maximum=maximum)
    made.extend(rows)
    return made


def _attached(kind: type[GrowableArray], handle: SharedHandle) -> GrowableArray:
    memory = attach(handle)
    try:
        return kind.attach(memory)
    except BaseException:
        memory.close()
        raise


def _begin_with(memory: Memory, head: Head) -> None:
    """Write the head into an empty memory, or check that the memory has it."""
    size = len(memory)
    first = memory.read(0, min(size, MOST_HEAD_BYTES))
    # A process that was killed here leaves zeros, or a part of the head without its first bytes.
    if size <= len(head.raw) and not any(first[:8]) and all(a in (0, b) for a, b in zip(first, head.raw, strict=False)):
        memory.grow_to(len(head.raw))
        memory.write(8, head.raw[8:])
        memory.write(0, head.raw[:8])
        return
    found, _ = read_head(first)
    if found != head:
        raise ValueError(f"dtype and row_shape must be those of the rows that are there, {found.dtype} and"
                         f" {found.row_shape}, got {head.dtype} and {head.row_shape}")


def _lowest(creator: Any) -> Any:
    """The creator that makes the memories of a chain of creators."""
    while (upstream := getattr(creator, "upstream", None)) is not None:
        creator = upstream
    return creator


def _remove_new(memory: Memory, creator: Any) -> None:
    """Remove the file or the name that was made with the memory. What existed before stays."""
    _remove_new_file(memory)
    lowest = _lowest(creator)
    if isinstance(lowest, SharedCreator) and lowest.shm_name is not None:
        with suppress(OSError, TypeError):      # on Windows the name goes with the memory
            memory.unlink()


def _kind_of(error: Exception) -> type[Exception]:
    """The class of Python that an exception of NumPy derives from."""
    return next(each for each in (TypeError, OverflowError, ValueError) if isinstance(error, each))


def _shape(given: Any, name: str) -> tuple[int, ...]:
    """A shape of lengths that are >= 0; one integer is a shape of one dimension."""
    lengths = given if isinstance(given, (tuple, list)) else (given,)
    return tuple(check_count(length, name, "an integer or a tuple of integers") for length in lengths)
