"""The format of saved images, deltas and snapshots: the header and its rules, the table, the constants.

docs/reference/file-format.md describes the format::

    0          224          data_offset                           table_offset           end of file
    +----------+------------+-------------------------------------+----------------------+
    | header   | zero, or   | data: pages, or holes between them  | table: 16 bytes for  |
    |          | not there  |                                     | each group           |
    +----------+------------+-------------------------------------+----------------------+

A page has 4096 bytes and a group has 16 pages, also on hosts with other page sizes, so every host can read a file. The
place of a byte of the content ("start") is its offset in the memory, not its offset in the image.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from linmem.errors import FileFormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import hashlib

MAGIC = b"\x89LINMEM\n"     # a byte that no text contains, and a line end that a transfer as text would change
VERSION = 2                 # from version 2 on, packed data begin where the header ends; a delta has target_offset
VERSIONS = (1, 2)           # the versions that this code reads
IMAGE, DELTA, SNAPSHOT = 1, 2, 3
KINDS = {IMAGE: "an image", DELTA: "a delta", SNAPSHOT: "a snapshot"}
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
    """The fields of a header, in their order in the file.

    The content of a snapshot is one range of groups that begins at 0: first its description of `base_size` bytes, then
    the groups of each memory's image. See `_wasm/snapshot_file.py`.
    """

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
            raise FileFormatError(path, "magic", head[:8],
                                  f"{MAGIC!r}: the file is not an image, a delta or a snapshot of linmem")
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

        is_image, is_delta = self.kind == IMAGE, self.kind == DELTA
        must_be("kind", IMAGE, DELTA, *(SNAPSHOT,) * (self.version > 1))
        if kind is not None and self.kind != kind:
            raise FileFormatError(path, "kind", f"{self.kind} ({KINDS[self.kind]})", f"{kind} ({KINDS[kind]})")
        must_be("header_size", HEADER.size)
        must_be("group_size", GROUP)
        must_be("page_size", PAGE)
        must_be("layout", *((PACKED,) if is_delta else (IN_PLACE, PACKED)))
        if self.reserved or (self.version == 1 and self.target_offset):
            raise FileFormatError(path, "reserved", "set", "0")
        at_most("size", MAX_SIZE)
        if max_size is not None:
            at_most("size", max_size, ", which is the max_size that was asked for")
        if self.kind == SNAPSHOT and self.size % GROUP:
            raise FileFormatError(path, "size", self.size, f"a multiple of {GROUP} in a snapshot")
        at_most("offset", MAX_SIZE if is_image else 0)
        at_most("base_size", {IMAGE: 0, DELTA: MAX_SIZE, SNAPSHOT: self.size}[self.kind])
        at_most("target_offset", self.size if is_delta else 0)
        if is_image and self.base_digest != NO_DIGEST:
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

    def edges(self) -> dict[int, int]:
        """For the first and the last group: a mask of the pages that hold some of the content."""
        first, last = (edge // GROUP for edge in self.span())
        masks = {first: (0xFFFF << self.offset % GROUP // PAGE) & 0xFFFF}
        end = (round_up(self.offset + self.size, PAGE) - (last - 1) * GROUP) // PAGE
        masks[last - 1] = masks.get(last - 1, 0xFFFF) & (1 << end) - 1
        return masks

    def position(self, start: int) -> int:
        """The place of a byte in the file, if the layout is IN_PLACE."""
        return self.data_offset + start - self.span()[0]


class Contents(NamedTuple):
    """A file whose header and table were found to be valid; or a part of it that holds an image.

    `part` is the empty string, or " of ..." with the name of the part.
    """

    path: str
    file_size: int
    header: Header
    table: bytes
    part: str = ""

    def refusal(self, field: str, value: object, bound: object) -> FileFormatError:
        return FileFormatError(self.path, field + self.part, value, bound)

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
    # hashlib takes longer to import than `linmem run` takes for all its work on an image.
    import hashlib

    return hashlib.blake2b(data, digest_size=len(NO_DIGEST))


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


@lru_cache(maxsize=4096)
def bit_runs(mask: int) -> tuple[tuple[int, int], ...]:
    """(first bit, number of bits) of each run of ones."""
    return tuple((run.start(), len(run[0])) for run in re.finditer("1+", f"{mask:b}"[::-1]))


def joined(runs: Iterable[tuple[int, int]], gap: int = 0) -> list[tuple[int, int]]:
    """The same runs; runs that touch each other, or have at most `gap` bytes between them, are one run."""
    found: list[tuple[int, int]] = []
    begin = end = -1            # -1: there is no run yet
    for start, size in runs:
        if end < 0 or not 0 <= start - end <= gap:
            if end >= 0:
                found.append((begin, end - begin))
            begin = start
        end = start + size
    if end >= 0:
        found.append((begin, end - begin))
    return found
