"""Element formats: what `Memory.view` accepts, as what the buffer protocol wants. Floor 0."""

from __future__ import annotations

import struct
import sys

from linmem._checks import shown

__all__ = ["resolve"]

_CHARS = {"b1": "?", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
          "f2": "e", "f4": "f", "f8": "d", "c8": "Zf", "c16": "Zd"}
_COMPLEX = {"Zf": 8, "Zd": 16}
_PYTHON_TYPES = {bool: "?", int: "q", float: "d"}
_ORDER = "<" if sys.byteorder == "little" else ">"
_CASTABLE = frozenset("bBhHiIlLqQnNfd?c" + ("e" if sys.version_info >= (3, 12) else ""))


def resolve(format: object) -> tuple[str, int, bool]:
    """Turn an element format into what the buffer protocol carries.

    Parameters
    ----------
    format : str or type or dtype
        A `struct` format ("d", ">I", "<2if"), a NumPy type string ("<f8"), a NumPy dtype or
        scalar type, or `bool`, `int` (64 bits), `float`.

    Returns
    -------
    format : str
        As in PEP 3118.
    itemsize : int
        Bytes in one element.
    castable : bool
        Whether `memoryview.cast` knows the format.
    """
    if isinstance(format, str):
        text = format
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
        text = text[1]      # those letters mean the same size in the native and the standard set
    bare = text.lstrip("<>")
    if bare in _COMPLEX:
        return text, _COMPLEX[bare], False
    try:
        size = struct.calcsize(text)
    except (struct.error, ValueError) as error:
        raise ValueError(f"format must be a struct format or a NumPy type, got {shown(format)}: {error}") from None
    if size == 0:
        raise ValueError(f"format must have a size, got {shown(format)}")
    return text, size, text in _CASTABLE


def _from_dtype(format: object) -> tuple[str, int | None]:
    # Whoever holds a NumPy object has imported NumPy; linmem itself never does.
    numpy = sys.modules.get("numpy")
    if numpy is not None and format is not None:
        try:
            dtype = numpy.dtype(format)
        except Exception:       # whatever it says of what it can make no type of
            dtype = None
        if dtype is not None:
            if dtype.str[1:] in _CHARS:
                return dtype.str, None
            # Bytes read as objects would be followed as addresses; an element of no bytes has no
            # count; a sub-array's format is that of its parts.
            for wrong, why in ((dtype.hasobject, "holds Python objects"), (dtype.itemsize == 0, "has no size"),
                               (dtype.subdtype is not None, "is a sub-array: view its base and reshape")):
                if wrong:
                    raise ValueError(f"format must be a plain element type, got {shown(format)}, which {why}")
            try:
                return memoryview(numpy.empty(0, dtype)).format, dtype.itemsize
            except ValueError:
                raise ValueError(f"format has no buffer form: {shown(format)}") from None
    raise TypeError(f"format must be a str, a Python number type or a NumPy dtype, got {type(format).__name__}")
