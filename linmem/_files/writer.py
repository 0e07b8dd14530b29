"""Writes the files of images and deltas."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from linmem._files.atomic_file import replacing
from linmem._files.format import (
    DATA_OFFSET,
    DELTA,
    ENTRY,
    GROUP,
    HEADER,
    IN_PLACE,
    PACKED,
    PAGE,
    VERSION,
    ZEROS,
    Header,
    Run,
    blake2b,
    round_up,
)


def write(path: str | bytes | os.PathLike[str], header: Header, runs: Callable[[], Iterable[Run]]) -> None:
    """Write a file to `path` as a whole or not at all, also if the process or the machine stops.

    A pipe or a device gets a packed file. `header` and `runs` as for `write_to`.
    """
    with replacing(path) as (file, is_stream):
        write_to(file, header._replace(layout=PACKED) if is_stream else header, runs, is_stream=is_stream)


def write_to(file: BinaryIO, header: Header, runs: Callable[[], Iterable[Run]], *, is_stream: bool = False) -> None:
    """Write a whole file into an empty one.

    Parameters
    ----------
    header : Header
        The fields of places, counts and checksums are set here.
    runs : callable
        Returns the runs of the content, which ascend and do not overlap. The parts of an image that no run covers are
        zero; those of a delta are unchanged.
    is_stream : bool
        The file cannot seek. `runs` is then called twice, first for the table, whose digest is in the header.
    """
    in_place = header.layout == IN_PLACE
    first, end = header.span()
    data_offset = DATA_OFFSET if in_place else HEADER.size

    def write_data(to: BinaryIO | None, position: int) -> _Data:
        data = _Data(to, position, data_offset, first if in_place else None, header.kind == DELTA)
        for run in _from_page_starts(runs()):
            data.add(*run)
        data.end_group()
        return data

    data = write_data(None if is_stream else file, 0)
    table = bytes(data.table)
    data_size = end - first if in_place else data.stored * PAGE
    table_offset = data_offset + data_size
    # A reader that supports only version 1 can read a file of layout IN_PLACE.
    head = header._replace(version=1 if in_place else VERSION, data_offset=data_offset, data_size=data_size,
                           table_offset=table_offset, count=len(table) // ENTRY.size,
                           table_digest=blake2b(table).digest()).packed()
    if is_stream:
        file.write(head)
        write_data(file, data_offset)
        file.write(table)
        return
    file.seek(table_offset)
    file.write(table)
    file.truncate(table_offset + len(table))
    file.seek(0)
    file.write(head)


class _Data:
    """Writes the data of a file run by run, and collects the table."""

    def __init__(self, file: BinaryIO | None, position: int, data_offset: int, first: int | None,
                 mentions_zeros: bool) -> None:
        """`file` None: only the table is made. `first`: the start of the data in place; None: the data are packed."""
        self.file = file
        self.position = position    # of the file
        self.data_offset = data_offset
        self.first = first
        self.mentions_zeros = mentions_zeros
        self.stored = 0             # pages
        self.table = bytearray()
        self.begin_group(-1)

    def begin_group(self, number: int) -> None:
        self.group = number
        self.group_mentioned = self.group_stored = self.group_crc = 0

    def end_group(self) -> None:
        if self.group_mentioned:
            self.table += ENTRY.pack(self.group, self.group_mentioned, self.group_stored, self.group_crc)

    def add(self, start: int, size: int, run: memoryview | None) -> None:
        for group in range(start - start % GROUP, start + size, GROUP):
            if group // GROUP != self.group:
                self.end_group()
                self.begin_group(group // GROUP)
            begin, end = max(group, start), min(group + GROUP, start + size)
            if self.mentions_zeros:
                self.group_mentioned |= _pages_mask(begin - group, end - group)
            if run is not None:
                for place, data in nonzero_runs(run[begin - start:end - start], begin):
                    self.store(place, data)
                    self.group_stored |= _pages_mask(place - group, place - group + len(data))
                self.group_mentioned |= self.group_stored

    def store(self, start: int, data: memoryview) -> None:
        padding = ZEROS[:-len(data) % PAGE]
        self.group_crc = zlib.crc32(padding, zlib.crc32(data, self.group_crc))
        to = self.data_offset + (self.stored * PAGE if self.first is None else start - self.first)
        self.stored += (len(data) + len(padding)) // PAGE
        if self.file is None:
            return
        if to != self.position:
            self.file.seek(to)
        self.file.write(data)
        self.file.write(padding)
        self.position = to + len(data) + len(padding)


def _pages_mask(begin: int, end: int) -> int:
    """The bits of the pages of begin .. end within a group."""
    return (1 << round_up(end, PAGE) // PAGE) - (1 << begin // PAGE)


def _from_page_starts(runs: Iterable[Run]) -> Iterator[Run]:
    """The same runs, with zeros before a run that begins within a page."""
    for start, size, run in runs:
        lead = start % PAGE
        if lead:
            rest = min(PAGE - lead, size)
            yield start - lead, lead + rest, None if run is None else memoryview(bytes(lead) + run[:rest])
            start, size, run = start + rest, size - rest, None if run is None else run[rest:]
        if size:
            yield start, size, run


def nonzero_runs(view: memoryview, start: int = 0) -> Iterator[tuple[int, memoryview]]:
    """The start and the bytes of each run of pages of `view` that are not zero.

    `start` is the start of the view, which is a multiple of `PAGE`.
    """
    first = None
    for place in range(0, len(view), PAGE):
        # tobytes() and == of bytes are a memcpy and a memcmp; == of memoryviews compares byte by byte.
        page = view[place:place + PAGE]
        if page.tobytes() == ZEROS[:len(page)]:
            if first is not None:
                yield start + first, view[first:place]
            first = None
        elif first is None:
            first = place
    if first is not None:
        yield start + first, view[first:]
