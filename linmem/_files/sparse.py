"""Reads sparse files without their holes: the time grows with the bytes that a file holds, not with its size."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from linmem._files.format import PAGE, ZEROS, blake2b, joined, round_up

READ_STEP = 1 << 20
NEAR = 2 * PAGE             # reading so many bytes costs less than another request


class NotZero(ValueError):
    """A file has a byte that is not zero outside of the given runs: in the page at `at` of the memory."""

    def __init__(self, at: int) -> None:
        super().__init__(f"runs must cover every byte of the file that is not zero: the page at {at} has some outside"
                         " of them")
        self.at = at


def holes_are_known(file: BinaryIO) -> bool:
    """Whether the zeros of holes need not be read: the system finds holes, or the file cannot have any."""
    attributes = getattr(os.fstat(file.fileno()), "st_file_attributes", 0)
    return hasattr(os, "SEEK_DATA") or not attributes & stat.FILE_ATTRIBUTE_SPARSE_FILE


def extents(fd: int | None, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(first, end) of each part of start .. end that is not a hole. One part, if the system does not find holes."""
    if fd is None or not hasattr(os, "SEEK_DATA"):
        yield start, end
        return
    while start < end:
        try:
            first = os.lseek(fd, start, os.SEEK_DATA)
            stop = os.lseek(fd, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:      # the rest of the file is a hole
                return
            raise
        if first >= end:
            return
        yield first, min(stop, end)
        start = stop


def check_gaps(runs: Iterable[tuple[int, int]], first: int, end: int, to_file: int, fd: int | None,
               bytes_at: Callable[[int, int], memoryview]) -> None:
    """Raise `NotZero` if a byte of first .. end of the memory that lies outside of the runs is not zero.

    Parameters
    ----------
    to_file : int
        The place in the file of the memory's first byte.
    fd : int or None
        The file, if its holes can be found.
    bytes_at : callable
        Returns the bytes of (start, size).
    """
    for start, size in (*runs, (end, 0)):
        for begin, stop in extents(fd, to_file + first, to_file + min(start, end)):
            for step in range(begin - to_file, stop - to_file, READ_STEP):
                part = bytes_at(step, min(READ_STEP, stop - to_file - step)).tobytes()
                if part.count(0) < len(part):
                    found = step + len(part) - len(part.lstrip(b"\0"))
                    raise NotZero(found - found % PAGE)
        first = max(first, start + size)


def runs_of_file(fd: int, position: int, first: int, end: int,
                 claimed: list[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
    """The parts of first .. end of a memory, which a file holds from `position` on, that may be other than zero.

    `claimed` is returned after a check; `NotZero` if a byte outside of it is not zero. If it is None, the file system
    says where the holes are; the result is None if it does not.
    """
    if claimed is None and not hasattr(os, "SEEK_DATA"):
        return None
    to_file = position - first
    before = os.lseek(fd, 0, os.SEEK_CUR)       # the caller uses the position, too
    try:
        if claimed is None:
            found = []
            for start, stop in extents(fd, position, position + end - first):
                page = (start - to_file) // PAGE * PAGE
                found.append((page, round_up(stop - to_file, PAGE) - page))
            return joined(found)
        check_gaps(claimed, first, end, to_file, fd, lambda start, size: _read_fd(fd, to_file + start, size))
        return claimed
    finally:
        os.lseek(fd, before, os.SEEK_SET)


def parts_of_file(fd: int, position: int, first: int, end: int,
                  runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """(start, end) of the parts of runs that are not holes of a file, as distances from `first`.

    The file holds first .. end of a memory from `position` on. The runs ascend. A part may have pages between runs that
    are near each other.
    """
    to_file = position - first
    wanted = [(max(start, first) + to_file, min(start + size, end) + to_file)
              for start, size in joined(runs, NEAR) if start < end and start + size > first]
    i = 0
    for begin, stop in extents(fd, wanted[0][0], wanted[-1][1]) if wanted else ():
        while i < len(wanted) and wanted[i][0] < stop:
            if begin < wanted[i][1]:
                yield max(begin, wanted[i][0]) - position, min(stop, wanted[i][1]) - position
            if wanted[i][1] > stop:     # the rest of the run lies in the next extent
                break
            i += 1


def pieces_of_file(fd: int, position: int, size: int) -> Iterator[tuple[int, memoryview]]:
    """(distance from `position`, bytes) of the parts of a file that are not holes.

    ValueError if the file ends before `position` + `size`.
    """
    before = os.lseek(fd, 0, os.SEEK_CUR)       # the caller uses the position, too
    try:
        for start, stop in extents(fd, position, position + size):
            while start < stop:
                part = _read_fd(fd, start, min(READ_STEP, stop - start))
                if not part:
                    raise ValueError(f"the file has become shorter: it ends at {start}, before {position + size}")
                yield start - position, part
                start += len(part)
    finally:
        os.lseek(fd, before, os.SEEK_SET)


def _read_fd(fd: int, place: int, size: int) -> memoryview:
    if hasattr(os, "pread"):
        return memoryview(os.pread(fd, size, place))
    os.lseek(fd, place, os.SEEK_SET)
    return memoryview(os.read(fd, size))


def content_digest(fd: int) -> str:
    """A digest of a whole file, as hexadecimal digits. Holes are not read.

    BLAKE2b of 32 bytes over the size and, for each page of the file that is not zero, over its place and its bytes;
    numbers in 8 bytes, least significant first.
    """
    size = os.fstat(fd).st_size
    digest = blake2b(size.to_bytes(8, "little"))
    done = 0
    for first, stop in extents(fd, 0, size):
        for start in range(max(first - first % PAGE, done), stop, READ_STEP):
            done = min(start + READ_STEP, round_up(stop, PAGE))
            part = _read_fd(fd, start, done - start)
            for i in range(0, len(part), PAGE):
                page = part[i:i + PAGE].tobytes()
                if page != ZEROS[:len(page)]:
                    digest.update((start + i).to_bytes(8, "little") + page)
    return digest.hexdigest()
