"""Element formats: converts the arguments of `Memory.view` and `Memory.array` into formats of the buffer protocol."""

from __future__ import annotations

import math
import struct
import sys

from linmem._core.arguments import check_count, check_size, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CHARS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
          "f2": "e", "f4": "f", "f8": "d", "c8": "Zf", "c16": "Zd"}
# NumPy's names of these types. None of them is a valid struct format, so no string has two meanings.
_NAMES = {"bool": "?", "bool_": "?", "byte": "b", "ubyte": "B", "short": "h", "ushort": "H", "intc": "i", "uintc": "I",
          "long": "l", "ulong": "L", "longlong": "q", "ulonglong": "Q", "int": "q", "uint": "Q", "intp": "n",
          "uintp": "N", "half": "e", "single": "f", "double": "d", "float": "d", "csingle": "Zf", "cdouble": "Zd",
          "complex": "Zd",
          **{f"{name}{8 * int(text[1:])}": char for kind, name in (("i", "int"), ("u", "uint"), ("f", "float"),
                                                                   ("c", "complex"))
             for text, char in _CHARS.items() if text[0] == kind}}
_COMPLEX = {"Zf": 8, "Zd": 16}
_INSTEAD = "; mem.array(dtype) takes every dtype without Python objects"
_PYTHON_TYPES = {bool: "?", int: "q", float: "d"}
_ORDER = "<" if sys.byteorder == "little" else ">"
_CASTABLE = frozenset("bBhHiIlLqQnNfd?c" + ("e" if sys.version_info >= (3, 12) else ""))


def resolve(format: object) -> tuple[str, int, bool]:
    """Convert an element format into a format of the buffer protocol.

    Parameters
    ----------
    format : str or type or dtype
        A `struct` format ("d", ">I", "<2if"), a NumPy type string or name ("<f8", "float64"), a NumPy
        dtype or scalar type, or `bool`, `int` (64 bits), `float`.

    Returns
    -------
    format : str
        As in PEP 3118.
    itemsize : int
        The size of one element in bytes.
    castable : bool
        Whether `memoryview.cast` accepts the format.
    """
    if isinstance(format, str):
        text = _NAMES.get(format, format)
    elif isinstance(format, type) and format in _PYTHON_TYPES:
        text = _PYTHON_TYPES[format]
    else:
        text, size = _from_dtype(format)
        if size is not None:
            return text, size, False
    order, name = (text[:1], text[1:]) if text[:1] in ("<", ">", "=", "|") else ("", text)
    char = _CHARS.get(name)
    if char is not None:
        if order in ("=", "|", _ORDER) or name[1:] == "1":
            order = ""
        text = order + char
    elif text[:1] in ("@", "=", _ORDER) and len(text) == 2 and text[1] in "bBhHiIqQfd?ce":
        text = text[1]      # these letters have the same size in native and in standard mode
    bare = text.lstrip("<>")
    if bare in _COMPLEX:
        return text, _COMPLEX[bare], False
    try:
        size = struct.calcsize(text)
    except (struct.error, ValueError) as error:
        raise ValueError(f"format must be a struct format or a NumPy type, got {shown(format)}: {error}{_INSTEAD}"
                         ) from None
    if size == 0:
        raise ValueError(f"format must have a size, got {shown(format)}")
    return text, size, text in _CASTABLE


def _from_dtype(format: object) -> tuple[str, int | None]:
    # A caller that has a NumPy object has imported NumPy. linmem does not import NumPy here.
    numpy = sys.modules.get("numpy")
    if numpy is not None and format is not None:
        try:
            dtype = numpy.dtype(format)
        except Exception:       # NumPy raises many classes of exceptions here
            dtype = None
        if dtype is not None:
            if dtype.str[1:] in _CHARS:
                return dtype.str, None
            # Objects: their elements are addresses, and arbitrary bytes are not valid addresses. No size: the number of
            # elements is not defined. Sub-array: memoryview reports the format of its elements, not of the whole.
            for wrong, why in ((dtype.hasobject, "holds Python objects"), (dtype.itemsize == 0, "has no size"),
                               (dtype.subdtype is not None, f"is a sub-array{_INSTEAD}")):
                if wrong:
                    raise ValueError(f"format must be a plain element type, got {shown(format)}, which {why}")
            try:
                return memoryview(numpy.empty(0, dtype)).format, dtype.itemsize
            except ValueError:
                raise ValueError(f"format has no buffer form: {shown(format)}{_INSTEAD}") from None
    raise TypeError(f"format must be a str, a Python number type or a NumPy dtype, got {type(format).__name__}")


def import_numpy(caller: str) -> Any:
    try:
        import numpy
    except ImportError as error:
        raise ImportError(f"{caller} needs NumPy: pip install 'linmem[numpy]' ({error})") from error
    return numpy


def check_dtype(dtype: Any, caller: str) -> Any:
    """The NumPy dtype, whose elements any bytes are valid for."""
    numpy = import_numpy(caller)
    try:
        element = numpy.dtype(dtype)
    except Exception as error:      # NumPy raises many classes of exceptions here
        raise TypeError(f"dtype must be a NumPy dtype, got {shown(dtype)}: {error}") from None
    if dtype is None:               # NumPy takes None for float64
        raise TypeError("dtype must be a NumPy dtype, got None")
    if element.hasobject or element.itemsize == 0:
        why = "holds Python objects" if element.hasobject else "has no size"
        raise ValueError(f"dtype must be that of plain bytes, got {shown(dtype)}, which {why}")
    return element


def array_on(mem: Any, dtype: Any, offset: Any, shape: Any) -> Any:
    """The array that `Memory.array` returns."""
    numpy = import_numpy("Memory.array")
    element = check_dtype(dtype, "Memory.array")
    start = check_size(offset, "offset", "within byte_size()")
    lengths = _lengths(shape)
    size = mem.byte_size()
    if start > size:
        raise ValueError(f"offset must be <= byte_size() ({size}), got {start}")
    most = (size - start) // element.itemsize
    known = math.prod(length for length in lengths if length is not None)
    if None in lengths and known == 0:
        raise ValueError(f"shape must have no -1 beside a 0, got {shown(shape)}")
    if None not in lengths and known > most:
        raise ValueError(f"shape must hold <= {most} elements of {element.itemsize} bytes from offset {start} in"
                         f" {size} bytes, got {shown(shape)}")
    whole = [most // known if length is None else length for length in lengths]
    try:
        # numpy.ndarray(buffer=memoryview) would keep a reference to the memory, not to the buffer that pins it.
        # numpy.asarray(memoryview) keeps the memoryview. The array from asarray() is not in a variable: the traceback
        # of an error would keep the variable, and so the memory would stay pinned.
        return numpy.ndarray(whole, element, numpy.asarray(memoryview(mem)), start)
    except (ValueError, OverflowError) as error:        # too many dimensions, or (0, 2**62)
        raise ValueError(f"shape must be one that NumPy takes, got {shown(shape)}: {error}") from None


def _lengths(shape: Any) -> list[int | None]:
    """The length of each dimension; None for the dimension that is computed."""
    if shape is None:
        return [None]
    if not isinstance(shape, (tuple, list)):
        shape = (shape,)
    numbers = [check_count(length, "shape", "an integer or a tuple of integers", -1) for length in shape]
    lengths = [None if number == -1 else number for number in numbers]
    if lengths.count(None) > 1:
        raise ValueError(f"shape must have at most one -1, got {shown(shape)}")
    return lengths
