"""The format of saved images and deltas: the header, the table and the constants. docs/file-format.md describes it.

::

    0          224          data_offset                           table_offset           end of file
    +----------+------------+-------------------------------------+----------------------+
    | header   | zero, or   | data: pages, or holes between them  | table: 16 bytes for  |
    |          | not there  |                                     | each group           |
    +----------+------------+-------------------------------------+----------------------+

A page has 4096 bytes and a group has 16 pages, whatever the page size of the host is: a file fits every host. The
place of a byte of the content ("start") is its offset in the memory, not its offset in the image.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

MAGIC = b"\x89LINMEM\n"     # a byte that no text contains, and a line end that a transfer as text would change
VERSION = 2                 # since version 2, packed data follow the header at once, and a delta has target_offset
IMAGE, DELTA = 1, 2
IN_PLACE, PACKED = 1, 2
PAGE = 4096
GROUP = 65536               # no host has larger pages or maps files in larger units
NO_DIGEST = bytes(32)
ZEROS = bytes(PAGE)

HEADER = struct.Struct("<8sHHIIIQQQQQQQIIQ32s32s32s32s")
ENTRY = struct.Struct("<QHHI")      # of the table: the number of the group, pages mentioned, pages stored, their CRC
DATA_OFFSET = GROUP

# (start, size, bytes); None for the bytes means zeros.
Run = tuple[int, int, "memoryview | None"]


class Header(NamedTuple):
    """The fields of a header, in their order in the file."""

    magic: bytes = MAGIC
    version: int = VERSION
    kind: int = IMAGE
    header_size: int = HEADER.size
    group_size: int = GROUP
    page_size: int = PAGE
    size: int = 0
    offset: int = 0
    base_size: int = 0
    data_offset: int = 0
    data_size: int = 0
    table_offset: int = 0
    count: int = 0          # type: ignore[assignment]   # hides tuple.count()
    layout: int = PACKED
    reserved: int = 0
    target_offset: int = 0
    digest: bytes = NO_DIGEST
    base_digest: bytes = NO_DIGEST
    table_digest: bytes = NO_DIGEST
    header_digest: bytes = NO_DIGEST

    def packed(self) -> bytes:
        """The bytes of the header, with their digest at the end."""
        head = HEADER.pack(*self)[:-len(NO_DIGEST)]
        return head + blake2b(head).digest()

    def span(self) -> tuple[int, int]:
        """Where the groups that the content touches begin and end."""
        first = self.offset - self.offset % GROUP
        return first, round_up(self.offset + self.size, GROUP) if self.size else first

    def position(self, start: int) -> int:
        """The place of a byte in the file, if the layout is IN_PLACE."""
        return self.data_offset + start - self.span()[0]


class Contents(NamedTuple):
    """A file whose header and table were found to be valid."""

    path: str
    file_size: int
    header: Header
    table: bytes

    def groups(self) -> Iterator[tuple[int, int, int, int]]:
        """The entries of the table: group, pages mentioned, pages stored, CRC of the pages stored."""
        return ENTRY.iter_unpack(self.table)

    @property
    def stored(self) -> int:
        """The bytes of all stored pages."""
        return sum(stored.bit_count() for _, _, stored, _ in self.groups()) * PAGE

    def stored_runs(self) -> list[tuple[int, int]]:
        return joined((number * GROUP + page * PAGE, count * PAGE)
                      for number, _, stored, _ in self.groups() for page, count in bit_runs(stored))


def blake2b(data: bytes | bytearray = b"") -> hashlib.blake2b:
    return hashlib.blake2b(data, digest_size=len(NO_DIGEST))


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@lru_cache(maxsize=4096)
def bit_runs(mask: int) -> tuple[tuple[int, int], ...]:
    """(first bit, number of bits) of each run of ones."""
    return tuple((run.start(), len(run[0])) for run in re.finditer("1+", f"{mask:b}"[::-1]))


def joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same runs; runs that touch each other are one run."""
    found: list[tuple[int, int]] = []
    for start, size in runs:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + size)
        else:
            found.append((start, size))
    return found
