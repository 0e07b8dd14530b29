"""Reads and checks the files of images, deltas and snapshots. A file may come from an attacker.

Time and memory grow with the bytes that a file holds, not with the sizes that its header claims.
"""

from __future__ import annotations

import bisect
import errno
import functools
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from linmem._files.format import DELTA, ENTRY, GROUP, IN_PLACE, PAGE, ZEROS, Contents, Header, Run, bit_runs, blake2b
from linmem._files.sparse import NotZero, check_gaps
from linmem.errors import FileFormatError

TABLE_STEP = 4096 * ENTRY.size


def open_file(path: str | bytes | os.PathLike[str]) -> BinaryIO:
    """Open for reading. If the path names a pipe, do not wait for a writer."""
    # Without a buffer: a search for holes moves the position of the descriptor, and a buffer would not know.
    try:
        return open(path, "rb", buffering=0,
                    opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):      # a socket
            raise _not_regular(os.fsdecode(path)) from None
        raise


def _not_regular(name: str) -> FileFormatError:
    return FileFormatError(name, "file", "not a regular file", "a regular file")


def read(file: BinaryIO, path: str | bytes | os.PathLike[str], kind: int | None = None,
         max_size: int | None = None) -> Contents:
    """Read and check the header and the table; `FileFormatError` if one of them is not valid.

    The file must be at its start.
    """
    name = os.fsdecode(path)
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise _not_regular(name)
    header = Header.read(file, name)
    header.check(name, status.st_size, kind, max_size)
    contents = Contents(name, status.st_size, header, b"")
    check_ends(file, contents)
    file.seek(header.table_offset)
    contents = contents._replace(table=_read_table(file, name, header))
    if header.layout != IN_PLACE and contents.stored != header.data_size:
        raise FileFormatError(name, "data_size", header.data_size,
                              f"{contents.stored}, the pages that the table counts")
    return contents


def check_ends(file: BinaryIO, contents: Contents) -> None:
    """Check that the bytes around the content of an IN_PLACE file are zero, to whole groups.

    A memory that maps the file may show these bytes, immediately or after a growth.
    """
    header = contents.header
    if header.layout != IN_PLACE:
        return
    first, last = header.span()
    end = header.offset + header.size
    for start, size in ((first, header.offset - first), (end, last - end)):
        file.seek(header.position(start))
        if header.size and file.read(size).strip(b"\0"):
            raise _padding(contents)


def _read_table(file: BinaryIO, path: str, header: Header) -> bytes:
    refusal = functools.partial(FileFormatError, path)
    table = bytearray()
    digest = blake2b()
    is_delta, size = header.kind == DELTA, header.count * ENTRY.size
    first, last = (edge // GROUP for edge in header.span())
    # The masks of the pages with content in the first and in the last group.
    edges = header.edges()
    previous = first - 1
    while len(table) < size:
        # The table is read in steps, so that a table that is one large hole is refused after the first step.
        step = file.read(min(TABLE_STEP, size - len(table)))
        if not step or len(step) % ENTRY.size:
            raise refusal("table", f"{len(table) + len(step)} bytes", f"{size} bytes")
        for i, (number, mentioned, stored, crc) in enumerate(ENTRY.iter_unpack(step), len(table) // ENTRY.size):
            if not previous < number < last:
                raise refusal(f"table[{i}].group", number, f"more than {previous} and below {last}")
            allowed = edges.get(number, 0xFFFF)
            if not mentioned or mentioned & ~allowed:
                raise refusal(f"table[{i}].mentioned", f"{mentioned:#06x}", f"some bits of {allowed:#06x}")
            if stored & ~mentioned or (stored != mentioned and not is_delta):
                raise refusal(f"table[{i}].stored", f"{stored:#06x}",
                              f"within {mentioned:#06x}" if is_delta else f"{mentioned:#06x}")
            if not stored and crc:
                raise refusal(f"table[{i}].crc", f"{crc:#010x}", "0, for no page")
            previous = number
        digest.update(step)
        table += step
    if digest.digest() != header.table_digest:
        raise refusal("table_digest", header.table_digest.hex(), f"{digest.hexdigest()}: the table is damaged")
    return bytes(table)


def split(contents: Contents, parts: Iterable[tuple[str, int, int, bytes]]) -> Iterator[Contents]:
    """The images of a snapshot, whose groups follow each other from the start of the content on.

    The caller has checked that the content has these groups.

    Parameters
    ----------
    parts : iterable of (str, int, int, bytes)
        Name, offset, size and digest of each image.
    """
    whole = contents.header
    words = struct.unpack(f"<{len(contents.table) // 8}Q", contents.table)      # two of each entry: group; the rest
    groups, rest = words[::2], words[1::2]
    at = packed = position = 0
    for name, offset, size, digest in parts:
        header = Header(version=whole.version, layout=whole.layout, size=size, offset=offset, digest=digest,
                        data_offset=whole.data_offset + (position if whole.layout == IN_PLACE else packed))
        first, end = header.span()
        shift, edges, begin = (position - first) // GROUP, header.edges(), at
        position += end - first
        at = bisect.bisect_left(groups, position // GROUP, begin)
        own = list(words[begin * 2:at * 2])
        own[::2] = [group - shift for group in groups[begin:at]]
        part = Contents(contents.path, contents.file_size, header, struct.pack(f"<{len(own)}Q", *own), f" of {name}")
        for i in {begin, at - 1} if own else ():
            mentioned, allowed = rest[i] & 0xFFFF, edges.get(groups[i] - shift, 0xFFFF)
            if mentioned & ~allowed:
                raise contents.refusal(f"table[{i}].mentioned", f"{mentioned:#06x}",
                                       f"some bits of {allowed:#06x}, the pages of {name}")
        if whole.layout != IN_PLACE:
            packed += part.stored
        yield part


def _padding(contents: Contents) -> FileFormatError:
    return contents.refusal("padding", "set", "zero before and after the content")


def _check_group(contents: Contents, number: int, crc: int, runs: Iterable[memoryview]) -> None:
    """Check the stored pages of one group: their CRC must be right, and each page must have a byte that is not zero."""
    found = 0
    for run in runs:
        found = zlib.crc32(run, found)
    if found != crc:
        raise contents.refusal(f"crc of group {number} (bytes {number * GROUP} to {(number + 1) * GROUP - 1})",
                               f"{found:#010x}", f"{crc:#010x}: the content is damaged")
    # If pages of zeros could be stored, a sparse file without data could claim any amount of stored content.
    pages = (run[place:place + PAGE] for run in runs for place in range(0, len(run), PAGE))
    for nth, page in enumerate(pages):
        if page.tobytes() == ZEROS:
            raise contents.refusal(f"page {nth} of those stored in group {number}", "all zero",
                                   "something else: such a page is not stored")


def pieces(file: BinaryIO, contents: Contents) -> Iterator[Run]:
    """The pages that the file mentions.

    Each group is checked before its bytes are returned. The caller may keep the bytes.
    """
    header = contents.header
    packed = header.data_offset
    for number, mentioned, stored, crc in contents.groups():
        runs: dict[int, memoryview] = {}
        for page, count in bit_runs(stored):
            file.seek(header.position(number * GROUP + page * PAGE) if header.layout == IN_PLACE else packed)
            runs[page] = fill(file, bytearray(count * PAGE), contents.path)
            packed += count * PAGE
        _check_group(contents, number, crc, runs.values())
        for page, count in sorted(bit_runs(stored) + bit_runs(mentioned & ~stored)):
            run = runs.get(page)
            start = number * GROUP + page * PAGE
            head = max(header.offset - start, 0)
            tail = min(count * PAGE, header.offset + header.size - start)
            if run is not None and (run[:head].tobytes().strip(b"\0") or run[tail:].tobytes().strip(b"\0")):
                raise _padding(contents)
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
        _check_group(contents, number, crc, [run(number * GROUP + page * PAGE, count * PAGE)
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
    return contents.refusal(f"page at {error.at}", "set", "zero: the table does not mention it")
