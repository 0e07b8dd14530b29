"""The format of saved images and deltas: the header and its rules, the table, the constants. See docs/file-format.md.

::

    0          224          data_offset                           table_offset           end of file
    +----------+------------+-------------------------------------+----------------------+
    | header   | zero, or   | data: pages, or holes between them  | table: 16 bytes for  |
    |          | not there  |                                     | each group           |
    +----------+------------+-------------------------------------+----------------------+

A page has 4096 bytes and a group has 16 pages, also on hosts with other page sizes, so every host can read a file. The
place of a byte of the content ("start") is its offset in the memory, not its offset in the image.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from linmem.errors import FileFormatError

MAGIC = b"\x89LINMEM\n"     # a byte that no text contains, and a line end that a transfer as text would change
VERSION = 2                 # from version 2 on, packed data begin where the header ends; a delta has target_offset
VERSIONS = (1, 2)           # the versions that this code reads
IMAGE, DELTA = 1, 2
KINDS = {IMAGE: "an image", DELTA: "a delta"}
IN_PLACE, PACKED = 1, 2
PAGE = 4096
GROUP = 65536               # no host has larger pages or maps files in larger units
NO_DIGEST = bytes(32)
ZEROS = bytes(PAGE)
MAX_SIZE = 1 << 56          # bytes of a memory

HEADER = struct.Struct("<8sHHIIIQQQQQQQIIQ32s32s32s32s")
# An entry of the table: the number of the group, the mask of the pages that the file mentions, the mask of the pages
# that it stores, and the CRC of the stored pages.
ENTRY = struct.Struct("<QHHI")
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

    @classmethod
    def read(cls, file: BinaryIO, path: str) -> Header:
        """Read the header at the start of a file.

        Raise `FileFormatError` if the file has another format or version, is cut short, or has a damaged header.
        """
        head = file.read(HEADER.size)
        if head[:8] != MAGIC:
            raise FileFormatError(path, "magic", head[:8], f"{MAGIC!r}: the file is not an image or a delta of linmem")
        if len(head) >= 10 and (version := int.from_bytes(head[8:10], "little")) not in VERSIONS:
            raise FileFormatError(path, "version", version, f"{' or '.join(map(str, VERSIONS))}, which is all that this"
                                  " linmem reads")
        if len(head) < HEADER.size:
            raise FileFormatError(path, "header", f"{len(head)} bytes", f"{HEADER.size} bytes: the file is cut short")
        header = cls(*HEADER.unpack(head))
        if (found := header.packed()[-len(NO_DIGEST):]) != header.header_digest:
            raise FileFormatError(path, "header_digest", header.header_digest.hex(),
                                  f"{found.hex()}: the header is damaged")
        return header

    def check(self, path: str, file_size: int, kind: int | None, max_size: int | None) -> None:
        """Raise `FileFormatError` if a field is wrong. `path` is the name of the file; `kind` None means any kind."""

        def must_be(name: str, *allowed: int, why: str = "") -> None:
            if getattr(self, name) not in allowed:
                raise FileFormatError(path, name, getattr(self, name), " or ".join(map(str, allowed)) + why)

        def at_most(name: str, bound: int, why: str = "") -> None:
            if getattr(self, name) > bound:
                raise FileFormatError(path, name, getattr(self, name), f"at most {bound}{why}")

        must_be("kind", IMAGE, DELTA)
        if kind is not None and self.kind != kind:
            raise FileFormatError(path, "kind", f"{self.kind} ({KINDS[self.kind]})", f"{kind} ({KINDS[kind]})")
        must_be("header_size", HEADER.size)
        must_be("group_size", GROUP)
        must_be("page_size", PAGE)
        must_be("layout", *((IN_PLACE, PACKED) if self.is_image else (PACKED,)))
        if self.reserved or (self.version == 1 and self.target_offset):
            raise FileFormatError(path, "reserved", "set", "0")
        at_most("size", MAX_SIZE)
        if max_size is not None:
            at_most("size", max_size, ", which is the max_size that was asked for")
        at_most("offset", MAX_SIZE if self.is_image else 0)
        at_most("base_size", 0 if self.is_image else MAX_SIZE)
        at_most("target_offset", 0 if self.is_image else self.size)
        if self.is_image and self.base_digest != NO_DIGEST:
            raise FileFormatError(path, "base_digest", "set", "zero in an image")
        first, last = self.span()
        must_be("data_offset", self.data_begin())
        if self.layout == IN_PLACE:
            must_be("data_size", last - first, why=", the groups that the content touches")
        else:
            at_most("data_size", last - first, ", the groups that the content touches")
        must_be("table_offset", self.data_offset + self.data_size, why=", where the data ends")
        at_most("count", (last - first) // GROUP, ", the groups that the content touches")
        end = self.table_offset + self.count * ENTRY.size
        if file_size != end:
            raise FileFormatError(path, "file size", file_size, f"{end}, where the table ends")

    @property
    def is_image(self) -> bool:
        return self.kind == IMAGE

    def packed(self) -> bytes:
        """The bytes of the header, with their digest at the end."""
        head = HEADER.pack(*self)[:-len(NO_DIGEST)]
        return head + blake2b(head).digest()

    def data_begin(self) -> int:
        """Where the data begin in a file of this version and layout."""
        return HEADER.size if self.layout == PACKED and self.version > 1 else DATA_OFFSET

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
