"""Reads and checks the files of images and deltas. A file may come from an attacker.

Time and memory grow with the bytes that a file holds, not with the sizes that its header claims.
"""

from __future__ import annotations

import functools
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from linmem._files.format import ENTRY, GROUP, IN_PLACE, PAGE, ZEROS, Contents, Header, Run, bit_runs, blake2b, round_up
from linmem._files.sparse import NotZero, check_gaps
from linmem.errors import FileFormatError

TABLE_STEP = 4096 * ENTRY.size


def open_file(path: str | bytes | os.PathLike[str]) -> BinaryIO:
    """Open for reading. If the path names a pipe, do not wait for a writer."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


def read(file: BinaryIO, path: str | bytes | os.PathLike[str], kind: int | None = None,
         max_size: int | None = None) -> Contents:
    """Read and check the header and the table; `FileFormatError` if one of them is not valid.

    The file must be at its start.
    """
    name = os.fsdecode(path)
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise FileFormatError(name, "file", "not a regular file", "a regular file")
    header = Header.read(file, name)
    header.check(name, status.st_size, kind, max_size)
    if header.layout == IN_PLACE:
        _check_ends(file, name, header)
    file.seek(header.table_offset)
    contents = Contents(name, status.st_size, header, _read_table(file, name, header))
    if header.layout != IN_PLACE and contents.stored != header.data_size:
        raise FileFormatError(name, "data_size", header.data_size,
                              f"{contents.stored}, the pages that the table counts")
    return contents


def _check_ends(file: BinaryIO, path: str, header: Header) -> None:
    # The bytes before and after the content must be zero, because a memory that maps the file may show them,
    # immediately or after a growth.
    first, last = header.span()
    end = header.offset + header.size
    for start, size in ((first, header.offset - first), (end, last - end)):
        file.seek(header.position(start))
        if header.size and file.read(size).strip(b"\0"):
            raise _padding(path)


def _read_table(file: BinaryIO, path: str, header: Header) -> bytes:
    refusal = functools.partial(FileFormatError, path)
    table = bytearray()
    digest = blake2b()
    is_image, size = header.is_image, header.count * ENTRY.size
    first, last = (edge // GROUP for edge in header.span())
    # The masks of the pages with content in the first and in the last group.
    first_mask = 0xFFFF << header.offset % GROUP // PAGE
    last_mask = (1 << (round_up(header.offset + header.size, PAGE) - (last - 1) * GROUP) // PAGE) - 1
    previous = first - 1
    while len(table) < size:
        # The table is read in steps, so that a table that is one large hole is refused after the first step.
        step = file.read(min(TABLE_STEP, size - len(table)))
        if not step or len(step) % ENTRY.size:
            raise refusal("table", f"{len(table) + len(step)} bytes", f"{size} bytes")
        for i, (number, mentioned, stored, crc) in enumerate(ENTRY.iter_unpack(step), len(table) // ENTRY.size):
            if not previous < number < last:
                raise refusal(f"table[{i}].group", number, f"more than {previous} and below {last}")
            allowed = (first_mask if number == first else 0xFFFF) & (last_mask if number == last - 1 else 0xFFFF)
            if not mentioned or mentioned & ~allowed:
                raise refusal(f"table[{i}].mentioned", f"{mentioned:#06x}", f"some bits of {allowed:#06x}")
            if stored & ~mentioned or (is_image and stored != mentioned):
                raise refusal(f"table[{i}].stored", f"{stored:#06x}",
                              f"{mentioned:#06x}" if is_image else f"within {mentioned:#06x}")
            if not stored and crc:
                raise refusal(f"table[{i}].crc", f"{crc:#010x}", "0, for no page")
            previous = number
        digest.update(step)
        table += step
    if digest.digest() != header.table_digest:
        raise refusal("table_digest", header.table_digest.hex(), f"{digest.hexdigest()}: the table is damaged")
    return bytes(table)


def _padding(path: str) -> FileFormatError:
    return FileFormatError(path, "padding", "set", "zero before and after the content")


def _check_group(path: str, number: int, crc: int, runs: Iterable[memoryview]) -> None:
    """Check the stored pages of one group: their CRC must be right, and each page must have a byte that is not zero."""
    found = 0
    for run in runs:
        found = zlib.crc32(run, found)
    if found != crc:
        raise FileFormatError(path, f"crc of group {number} (bytes {number * GROUP} to {(number + 1) * GROUP - 1})",
                              f"{found:#010x}", f"{crc:#010x}: the content is damaged")
    # If pages of zeros could be stored, a sparse file without data could claim any amount of stored content.
    pages = (run[place:place + PAGE] for run in runs for place in range(0, len(run), PAGE))
    for nth, page in enumerate(pages):
        if page.tobytes() == ZEROS:
            raise FileFormatError(path, f"page {nth} of those stored in group {number}", "all zero",
                                  "something else: such a page is not stored")


def pieces(file: BinaryIO, contents: Contents) -> Iterator[Run]:
    """The pages that the file mentions.

    Each group is checked before its bytes are returned. The caller may keep the bytes.
    """
    path, header = contents.path, contents.header
    packed = header.data_offset
    for number, mentioned, stored, crc in contents.groups():
        runs: dict[int, memoryview] = {}
        for page, count in bit_runs(stored):
            file.seek(header.position(number * GROUP + page * PAGE) if header.layout == IN_PLACE else packed)
            runs[page] = fill(file, bytearray(count * PAGE), path)
            packed += count * PAGE
        _check_group(path, number, crc, runs.values())
        for page, count in sorted(bit_runs(stored) + bit_runs(mentioned & ~stored)):
            run = runs.get(page)
            start = number * GROUP + page * PAGE
            head = max(header.offset - start, 0)
            tail = min(count * PAGE, header.offset + header.size - start)
            if run is not None and (run[:head].tobytes().strip(b"\0") or run[tail:].tobytes().strip(b"\0")):
                raise _padding(path)
            yield start + head, tail - head, None if run is None else run[head:tail]


def fill(file: BinaryIO, buffer: bytearray, path: str) -> memoryview:
    """Read as many bytes as the buffer has; returns a view of the buffer."""
    rest = whole = memoryview(buffer)
    while rest:
        n = file.readinto(rest)     # type: ignore[attr-defined]
        if not n:
            raise FileFormatError(path, "data", f"{len(rest)} bytes short", "whole: the file was cut while it was read")
        rest = rest[n:]
    return whole


def check_view(view: memoryview, contents: Contents, fd: int | None) -> None:
    """Compare the content of a mapping of an IN_PLACE file, which `view` shows, with the table."""
    offset, end = contents.header.offset, contents.header.offset + contents.header.size

    def run(start: int, size: int) -> memoryview:
        low, high = max(start, offset), min(start + size, end)
        part = view[low - offset:high - offset]
        return part if len(part) == size else memoryview(bytes(low - start) + part + bytes(start + size - high))

    for number, _, stored, crc in contents.groups():
        _check_group(contents.path, number, crc, [run(number * GROUP + page * PAGE, count * PAGE)
                                                  for page, count in bit_runs(stored)])
    check_holes(contents, fd, lambda start, size: view[start - offset:start - offset + size])


def check_holes(contents: Contents, fd: int | None, bytes_at: Callable[[int, int], memoryview]) -> None:
    """Check that the pages of an IN_PLACE file that the table does not mention are zero: a mapping shows them."""
    header = contents.header
    try:
        check_gaps(contents.stored_runs(), header.offset, header.offset + header.size, header.position(0), fd, bytes_at)
    except NotZero as error:
        raise not_mentioned(contents, error) from None


def not_mentioned(contents: Contents, error: NotZero) -> FileFormatError:
    return FileFormatError(contents.path, f"page at {error.at}", "set", "zero: the table does not mention it")
