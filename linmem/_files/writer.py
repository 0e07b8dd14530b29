"""Writes the files of images, deltas and snapshots."""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from linmem._files.atomic_file import replacing
from linmem._files.format import (
    DELTA,
    ENTRY,
    GROUP,
    IMAGE,
    IN_PLACE,
    PACKED,
    PAGE,
    ZEROS,
    Header,
    Run,
    bit_runs,
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
        This function sets the fields of places, counts and checksums.
    runs : callable
        Returns the runs of the content, which ascend and do not overlap. Without a run, a part of an image is zero, and
        a part of a delta is unchanged.
    is_stream : bool
        The file cannot seek. `runs` is then called twice, first for the table, whose digest is in the header.
    """
    if header.layout == IN_PLACE and header.kind == IMAGE:      # a reader of version 1 can read such a file
        header = header._replace(version=1)
    header = header._replace(data_offset=header.data_begin())
    if not is_stream:
        file.seek(header.data_offset)
    table, pages = _write_data(None if is_stream else file, header, runs())
    first, end = header.span()
    data_size = end - first if header.layout == IN_PLACE else pages * PAGE
    table_offset = header.data_offset + data_size
    head = header._replace(data_size=data_size, table_offset=table_offset, count=len(table) // ENTRY.size,
                           table_digest=blake2b(table).digest()).packed()
    if is_stream:
        file.write(head)
        _write_data(file, header, runs())
        file.write(table)
        return
    file.seek(table_offset)
    file.write(table)
    file.truncate(table_offset + len(table))
    file.seek(0)
    file.write(head)


def _write_data(file: BinaryIO | None, header: Header, runs: Iterable[Run]) -> tuple[bytearray, int]:
    """Write the pages that are not zero; returns the table and the number of these pages.

    If `file` is None, only make the table. Packed data are written from the present position of the file on.
    """
    table, pages = bytearray(), 0
    for group, parts in itertools.groupby(_parts(runs), key=lambda part: part[0] // GROUP):
        mentioned = stored = crc = 0
        for start, size, view in parts:
            first = start % GROUP // PAGE
            if header.kind == DELTA:
                mentioned |= ((1 << round_up(size, PAGE) // PAGE) - 1) << first
            if view is None:
                continue
            mask = _nonzero_pages(view)
            stored |= mask << first
            for page, count in bit_runs(mask):
                data = view[page * PAGE:(page + count) * PAGE]
                padding = ZEROS[:-len(data) % PAGE]
                crc = zlib.crc32(padding, zlib.crc32(data, crc))
                if file is not None:
                    if header.layout == IN_PLACE:
                        file.seek(header.position(start + page * PAGE))
                    file.write(data)
                    file.write(padding)
        if mentioned | stored:
            table += ENTRY.pack(group, mentioned | stored, stored, crc)
        pages += stored.bit_count()
    return table, pages


def _nonzero_pages(view: memoryview) -> int:
    """A mask with one bit for each page of `view`, which is set if the page is not all zero."""
    # tobytes() and != of bytes are a memcpy and a memcmp; != of memoryviews compares byte by byte.
    return sum(1 << place // PAGE for place in range(0, len(view), PAGE)
               if view[place:place + PAGE].tobytes() != ZEROS[:len(view) - place])


def _parts(runs: Iterable[Run]) -> Iterator[Run]:
    """Split the runs so that each part lies in one group. A part that begins within a page gets zeros before it."""
    for start, size, run in runs:
        while size:
            lead = start % PAGE
            step = min(size, PAGE - lead if lead else GROUP - start % GROUP)
            part = None if run is None else run[:step]
            yield start - lead, lead + step, memoryview(bytes(lead) + part) if lead and part else part
            start, size, run = start + step, size - step, None if run is None else run[step:]
