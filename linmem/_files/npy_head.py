"""The head of an .npy file whose number of rows changes: how it is made, and read back.

The head is that of NumPy's format, so numpy.load() reads the file. Its length is a multiple of 4096 bytes. The number
of rows has 16 bytes at a multiple of 16, so that one store changes the number.
"""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass

from linmem._core.arguments import shown
from linmem._core.element_formats import check_dtype, import_numpy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HEAD_UNIT = 4096
MOST_HEAD_BYTES = 2 * HEAD_UNIT     # numpy.load() refuses a head of more than 10,000 characters
COUNT_BYTES = 16
_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class Head:
    """What a head says, and its bytes for no rows."""

    dtype: Any
    row_shape: tuple[int, ...]
    count_at: int               # the offset of the number of rows
    raw: bytes                  # the first row begins at its end

    def with_rows(self, rows: int) -> bytes:
        return self.raw[:self.count_at] + f"{rows:{COUNT_BYTES}}".encode() + self.raw[self.count_at + COUNT_BYTES:]


def make_head(dtype: Any, row_shape: tuple[int, ...]) -> Head:
    """The head for rows of a dtype that `check_dtype` has accepted.

    Raises
    ------
    ValueError
        The format cannot store the dtype, or its description is too long.
    """
    form = import_numpy("GrowableArray").lib.format
    try:
        description = form.dtype_to_descr(dtype)
        same = form.descr_to_dtype(description) == dtype
    except (TypeError, ValueError) as error:
        raise ValueError(f"dtype must be one that an .npy file can store, got {shown(dtype)}: {error}") from None
    if not same:
        raise ValueError(f"dtype must be one that an .npy file can store, got {shown(dtype)}, which it would change")
    lead = f"{{'descr': {description!r}, 'fortran_order': False, 'shape': ("
    tail = f", {', '.join(map(str, row_shape))}), }}".replace(", )", ",)")
    try:
        start, text = _MAGIC + b"\1\0", lead.encode("latin1")
    except UnicodeEncodeError:
        start, text = _MAGIC + b"\3\0", lead.encode()
    begin = len(start) + (2 if start[6] == 1 else 4)
    count_at = -(-(begin + len(text)) // COUNT_BYTES) * COUNT_BYTES
    whole = -(-(count_at + COUNT_BYTES + len(tail) + 1) // HEAD_UNIT) * HEAD_UNIT
    if whole > MOST_HEAD_BYTES:
        raise ValueError(f"dtype must be described by less than {MOST_HEAD_BYTES} characters in an .npy file, got"
                         f" {shown(dtype)}")
    start += (whole - begin).to_bytes(begin - len(start), "little") + text
    body = start.ljust(count_at) + b"0".rjust(COUNT_BYTES) + tail.encode()
    return Head(dtype, row_shape, count_at, body.ljust(whole - 1) + b"\n")


def read_head(first: bytes) -> tuple[Head, int]:
    """The head at the beginning of a file or a memory of anybody, and the number of rows that it says.

    Parameters
    ----------
    first : bytes
        The first MOST_HEAD_BYTES, or all if there are fewer.

    Raises
    ------
    ValueError
        It is not a head that `make_head` made.
    """
    form = import_numpy("GrowableArray").lib.format
    start, version = first[:6], first[6:8]
    if start != _MAGIC or version not in (b"\1\0", b"\3\0"):
        raise ValueError(f"memory must begin with the head of an .npy file, got {shown(first[:8])}")
    begin = 10 if version == b"\1\0" else 12
    end = begin + int.from_bytes(first[8:begin], "little")
    try:
        found = ast.literal_eval(first[begin:min(end, MOST_HEAD_BYTES)].decode("latin1" if begin == 10 else "utf-8"))
        rows, *row_shape = found["shape"]
        dtype = check_dtype(form.descr_to_dtype(found["descr"]), "GrowableArray")
        if not all(type(n) is int and n > 0 for n in (rows + 1, *row_shape)):
            raise ValueError(f"the shape must be of positive integers, got {shown(found['shape'])}")
        if dtype.itemsize * math.prod(row_shape) >= 1 << 63:
            raise ValueError(f"a row must have less than 2**63 bytes, got the shape {shown(found['shape'])}")
        head = make_head(dtype, tuple(row_shape))
        same = head.with_rows(rows) == first[:len(head.raw)]
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, SyntaxError, TypeError,
            ValueError) as error:
        raise ValueError(f"the head of the .npy file is damaged: {error}") from None
    if not same:
        raise ValueError("the head of the .npy file must be one that GrowableArray wrote; copy the rows of numpy.load()"
                         " into a new GrowableArray")
    return head, rows
