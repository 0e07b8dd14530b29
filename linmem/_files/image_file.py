"""The files of images and deltas: how they are written, and how one is read that may be anybody's. Floor 0.

docs/file-format.md describes the same bytes. `Image` and `Delta`, whose methods the functions of the last
section are, import this room when a file is first named.

::

    0          224          data_offset                           table_offset           end of file
    +----------+------------+-------------------------------------+----------------------+
    | header   | zero, or   | data: pages, or holes between them  | table: 16 bytes for  |
    |          | not there  |                                     | each group           |
    +----------+------------+-------------------------------------+----------------------+

A page is 4096 bytes and a group 16 pages, whatever the host's own are: a file fits every host. Where
something stands ("start") is counted from the memory's first byte, not from the image's.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import BinaryIO

from linmem._files import atomic_file as _saving
from linmem.errors import FileFormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    # What of Image and Delta, which stand above, this room needs to know.
    class AnImage(Protocol):
        @property
        def offset(self) -> int: ...
        @property
        def size(self) -> int: ...
        @property
        def digest(self) -> str: ...
        def runs(self) -> list[tuple[int, int]]: ...
        def fileno(self) -> int: ...
        def __buffer__(self, flags: int, /) -> memoryview: ...

    class ADelta(Protocol):
        base: str
        base_size: int
        size: int
        target: str | None
        offset: int
        def pieces(self) -> Iterator[Run]: ...

__all__ = ["DELTA", "GROUP", "IMAGE", "IN_PLACE", "MOST_ZEROED", "NO_DIGEST", "PACKED", "PAGE", "VERSION", "Contents",
           "NotZero", "check", "content_digest", "nonzero_runs", "open_delta", "open_file", "open_image", "own_runs",
           "pieces", "read", "round_up", "runs_of_file", "save_delta", "save_image", "verify_image", "write",
           "write_image", "write_to"]

MAGIC = b"\x89LINMEM\n"     # a byte that no text has, and a line end that a transfer as text would change
VERSION = 2                 # which has packed data at once after the header, and the target's offset of a delta
VERSIONS = (1, 2)
IMAGE, DELTA = 1, 2
KINDS = {IMAGE: "an image", DELTA: "a delta"}
IN_PLACE, PACKED = 1, 2
PAGE = 4096
GROUP = 65536               # no host maps a file at less than this, nor has larger pages
DIGEST_SIZE = 32
MAX_SIZE = 1 << 56

HEADER = struct.Struct("<8sHHIIIQQQQQQQIIQ32s32s32s32s")
FIELDS = ("magic", "version", "kind", "header_size", "group_size", "page_size", "size", "offset", "base_size",
          "data_offset", "data_size", "table_offset", "count", "layout", "reserved", "target_offset", "digest",
          "base_digest", "table_digest", "header_digest")
ENTRY = struct.Struct("<QHHI")
DATA_OFFSET = GROUP
MOST_ZEROED = GROUP << 20       # bytes, of a delta: their table is a second's work
NO_DIGEST = bytes(DIGEST_SIZE)
ZEROS = bytes(PAGE)
TABLE_STEP = 4096 * ENTRY.size
READ_STEP = 1 << 20

# (start, size, bytes), or None for bytes that are zero.
Run = tuple[int, int, "memoryview | None"]


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _span(offset: int, size: int) -> tuple[int, int]:
    """The groups that the content touches: where they begin and end."""
    first = offset - offset % GROUP
    return first, round_up(offset + size, GROUP) if size else first


@lru_cache(maxsize=4096)
def _bit_runs(mask: int) -> tuple[tuple[int, int], ...]:
    """(first, count) of each run of ones."""
    found = []
    first = 0
    while mask >> first:
        if mask >> first & 1:
            count = ((mask >> first) + 1 & ~(mask >> first)).bit_length() - 1
            found.append((first, count))
            first += count
        else:
            first += 1
    return tuple(found)


def nonzero_runs(view: memoryview, start: int = 0) -> Iterator[tuple[int, memoryview]]:
    """The runs of whole pages of `view` that hold a byte which is not zero, with where each begins.

    `start` is where the view itself begins, at a multiple of `PAGE`.
    """
    first = None
    for at in range(0, len(view), PAGE):
        # Two calls of memcpy's kind: comparing the views themselves would go byte by byte.
        page = view[at:at + PAGE]
        if page.tobytes() == ZEROS[:len(page)]:
            if first is not None:
                yield start + first, view[first:at]
            first = None
        elif first is None:
            first = at
    if first is not None:
        yield start + first, view[first:]


# -- writing -------------------------------------------------------------------------------------

def _whole_pages(runs: Iterable[Run]) -> Iterator[Run]:
    """The same runs, none of which begins within a page."""
    for start, size, run in runs:
        lead = start % PAGE
        if lead:
            rest = min(PAGE - lead, size)
            yield start - lead, lead + rest, None if run is None else memoryview(bytes(lead) + run[:rest])
            start, size, run = start + rest, size - rest, None if run is None else run[rest:]
        if size:
            yield start, size, run


class _Group:
    """The pages of one group that a file mentions, as they come in."""

    __slots__ = ("crc", "mentioned", "number", "stored")

    def __init__(self, number: int) -> None:
        self.number = number
        self.mentioned = self.stored = self.crc = 0

    def entry(self) -> bytes:
        return ENTRY.pack(self.number, self.mentioned, self.stored, self.crc)


class _Data:
    """The data of a file, and its table, as the runs of the content come in."""

    def __init__(self, file: BinaryIO | None, data_offset: int, first: int | None) -> None:
        """`file` None: only the table is made. `first` is what stands at the begin of the data; None: packed."""
        self.file = file
        self.data_offset = data_offset
        self.first = first
        self.at = -1                # where the file stands
        self.stored = 0             # pages
        self.table = bytearray()
        self.group = _Group(-1)

    def add(self, start: int, size: int, run: memoryview | None, *, zeros_too: bool) -> None:
        for cut in range(start - start % GROUP, start + size, GROUP):
            if cut // GROUP != self.group.number:
                self.end_group()
                self.group = _Group(cut // GROUP)
            begin, end = max(cut, start), min(cut + GROUP, start + size)
            if zeros_too:
                self.group.mentioned |= _mask(begin - cut, end - cut)
            if run is not None:
                for at, data in nonzero_runs(run[begin - start:end - start], begin):
                    self._store(at, data)
                    self.group.stored |= _mask(at - cut, at - cut + len(data))
                self.group.mentioned |= self.group.stored

    def _store(self, start: int, data: memoryview) -> None:
        padding = ZEROS[:-len(data) % PAGE]
        self.group.crc = zlib.crc32(padding, zlib.crc32(data, self.group.crc))
        to = self.data_offset + (self.stored * PAGE if self.first is None else start - self.first)
        self.stored += (len(data) + len(padding)) // PAGE
        if self.file is None:
            return
        if to != self.at:
            self.file.seek(to)
        self.file.write(data)
        self.file.write(padding)
        self.at = to + len(data) + len(padding)

    def end_group(self) -> None:
        if self.group.mentioned:
            self.table += self.group.entry()


def _mask(begin: int, end: int) -> int:
    """The bits of the pages of begin .. end within a group."""
    return (1 << round_up(end, PAGE) // PAGE) - (1 << begin // PAGE)


def write(path: str | bytes | os.PathLike[str], kind: int, runs: Callable[[], Iterable[Run]], *, layout: int = PACKED,
          **header: Any) -> None:
    """Put a file at `path` that is there whole or not at all, whenever the process or the machine stops.

    Into a pipe or a device it is written packed. The rest is as of `write_to`.
    """
    with _saving.replacing(path) as (file, is_stream):
        write_to(file, kind, runs, layout=PACKED if is_stream else layout, is_stream=is_stream, **header)


def write_to(file: BinaryIO, kind: int, runs: Callable[[], Iterable[Run]], *, size: int, digest: bytes,
             layout: int = PACKED, is_stream: bool = False, offset: int = 0, base_size: int = 0,
             base_digest: bytes = NO_DIGEST, target_offset: int = 0) -> None:
    """Write a whole file into an empty one.

    `runs` makes the runs, which ascend and do not overlap; each is whole pages, but for the ends of the content. An
    image's pages that no run covers are zero; a delta's are unchanged. A stream cannot seek: then `runs` is asked
    twice, first for the table, whose digest is in the header.
    """
    first, end = _span(offset, size)
    in_place = layout == IN_PLACE
    data_offset = DATA_OFFSET if in_place else HEADER.size
    data = _Data(None if is_stream else file, data_offset, first if in_place else None)
    for run in _whole_pages(runs()):
        data.add(*run, zeros_too=kind == DELTA)
    data.end_group()
    table = bytes(data.table)
    data_size = end - first if in_place else data.stored * PAGE
    table_offset = data_offset + data_size
    # A reader that knows version 1 alone can read what is the same in it.
    head = HEADER.pack(MAGIC, 1 if in_place else VERSION, kind, HEADER.size, GROUP, PAGE, size, offset, base_size,
                       data_offset, data_size, table_offset, len(table) // ENTRY.size, layout, 0, target_offset, digest,
                       base_digest, _digest(table), NO_DIGEST)[:-DIGEST_SIZE]
    head += _digest(head)
    if is_stream:
        file.write(head)
        again = _Data(file, data_offset, None)
        again.at = data_offset
        for run in _whole_pages(runs()):
            again.add(*run, zeros_too=False)
        file.write(table)
        return
    file.seek(table_offset)
    file.write(table)
    file.truncate(table_offset + len(table))
    file.seek(0)
    file.write(head)


def _digest(data: bytes | bytearray) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()


# -- reading -------------------------------------------------------------------------------------

class Contents:
    """The header and the table of a file, checked: nothing in them can lead a reader astray."""

    __slots__ = ("base_digest", "base_size", "count", "data_offset", "digest", "file_size", "kind", "layout", "offset",
                 "path", "size", "stored", "table", "target_offset", "version")

    path: str
    version: int
    kind: int
    layout: int
    data_offset: int
    target_offset: int
    size: int
    offset: int
    base_size: int
    digest: bytes
    base_digest: bytes
    count: int
    stored: int             # bytes of pages in the file
    file_size: int
    table: bytes

    def groups(self) -> Iterator[tuple[int, int, int, int, int]]:
        """For each group: its number, the pages mentioned, those of them stored, their CRC, where they begin."""
        at = self.data_offset
        for number, mentioned, stored, crc in ENTRY.iter_unpack(self.table):
            yield number, mentioned, stored, crc, at
            at += stored.bit_count() * PAGE

    def position(self, number: int, page: int, packed_at: int) -> int:
        """Where the file has a page of a group whose pages before it end at `packed_at`."""
        return self.in_place(number * GROUP + page * PAGE) if self.layout == IN_PLACE else packed_at

    def in_place(self, start: int) -> int:
        """Where an IN_PLACE file has a byte."""
        return self.data_offset + start - _span(self.offset, self.size)[0]


def open_file(path: str | bytes | os.PathLike[str]) -> BinaryIO:
    """Open for reading, without waiting for whoever is to write into a pipe of that name."""
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))


def read(file: BinaryIO, path: str | bytes | os.PathLike[str], kind: int | None = None,
         max_size: int | None = None) -> Contents:
    """The header and the table, or `FileFormatError`. Memory follows the bytes that are in the file.

    `file` stands at its begin and is unbuffered or not read from otherwise.
    """
    name = os.fsdecode(path)
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise FileFormatError(name, "file", "no regular file", "one")
    head = file.read(HEADER.size)
    if head[:8] != MAGIC:
        raise FileFormatError(name, "magic", head[:8], f"{MAGIC!r}: it is no image or delta of linmem's")
    if len(head) >= 10 and (version := int.from_bytes(head[8:10], "little")) not in VERSIONS:
        raise FileFormatError(name, "version", version, f"{' or '.join(map(str, VERSIONS))}, which is all that this"
                              " linmem reads")
    if len(head) < HEADER.size:
        raise FileFormatError(name, "header", f"{len(head)} bytes", f"{HEADER.size} bytes: the file is cut short")
    if (found := _digest(head[:-DIGEST_SIZE])) != head[-DIGEST_SIZE:]:
        raise FileFormatError(name, "header_digest", head[-DIGEST_SIZE:].hex(), f"{found.hex()}: the header is damaged")
    return _checked(file, name, status.st_size, HEADER.unpack(head), kind, max_size)


def _checked(file: BinaryIO, path: str, file_size: int, values: tuple[int | bytes, ...], kind: int | None,
             max_size: int | None) -> Contents:
    field = dict(zip(FIELDS, values, strict=True))
    number: dict[str, int] = {name: value for name, value in field.items() if isinstance(value, int)}

    def must_be(name: str, *allowed: int, why: str = "") -> None:
        if number[name] not in allowed:
            raise FileFormatError(path, name, number[name], " or ".join(map(str, allowed)) + why)

    def at_most(name: str, bound: int, why: str = "") -> None:
        if number[name] > bound:
            raise FileFormatError(path, name, number[name], f"at most {bound}{why}")

    must_be("kind", IMAGE, DELTA)
    if kind is not None and number["kind"] != kind:
        raise FileFormatError(path, "kind", f"{number['kind']} ({KINDS[number['kind']]})", f"{kind} ({KINDS[kind]})")
    is_image = number["kind"] == IMAGE
    must_be("header_size", HEADER.size)
    must_be("group_size", GROUP)
    must_be("page_size", PAGE)
    must_be("layout", *((IN_PLACE, PACKED) if is_image else (PACKED,)))
    if number["reserved"] or (number["version"] == 1 and number["target_offset"]):
        raise FileFormatError(path, "reserved", "set", "0")
    at_most("size", MAX_SIZE)
    if max_size is not None:
        at_most("size", max_size, ", which is the max_size that was asked for")
    at_most("offset", MAX_SIZE)
    if not is_image:
        must_be("offset", 0)
    at_most("base_size", 0 if is_image else MAX_SIZE)
    at_most("target_offset", 0 if is_image else number["size"])
    if is_image and field["base_digest"] != NO_DIGEST:
        raise FileFormatError(path, "base_digest", "set", "zero in an image")
    size, data_size, count = number["size"], number["data_size"], number["count"]
    first, last = _span(number["offset"], size)
    data_offset = HEADER.size if number["version"] > 1 and number["layout"] == PACKED else DATA_OFFSET
    must_be("data_offset", data_offset)
    if number["layout"] == IN_PLACE:
        must_be("data_size", last - first, why=", the groups that the content touches")
    else:
        at_most("data_size", last - first, ", the groups that the content touches")
    must_be("table_offset", data_offset + data_size, why=", where the data ends")
    at_most("count", (last - first) // GROUP, ", the groups that the content touches")
    end = number["table_offset"] + count * ENTRY.size
    if file_size != end:
        raise FileFormatError(path, "file size", file_size, f"{end}, where the table ends")

    found = Contents()
    found.path, found.version, found.kind, found.layout = path, number["version"], number["kind"], number["layout"]
    found.data_offset, found.target_offset = data_offset, number["target_offset"]
    found.size, found.offset, found.base_size, found.count = size, number["offset"], number["base_size"], count
    found.digest, found.base_digest = bytes(values[-4]), bytes(values[-3])
    found.file_size = file_size
    if found.layout == IN_PLACE:
        _check_ends(file, found)
    file.seek(number["table_offset"])
    found.table = _read_table(file, found, bytes(values[-2]))
    found.stored = sum(stored.bit_count() for _, _, stored, _ in ENTRY.iter_unpack(found.table)) * PAGE
    if found.layout == PACKED and found.stored != data_size:
        raise FileFormatError(path, "data_size", data_size, f"{found.stored}, the pages that the table counts")
    return found


def _check_ends(file: BinaryIO, contents: Contents) -> None:
    # A memory that starts from a mapping of the file may see these bytes, now or once it grows, verified or not.
    first, last = _span(contents.offset, contents.size)
    end = contents.offset + contents.size
    for start, size in ((first, contents.offset - first), (end, last - end)):
        file.seek(contents.in_place(start))
        if contents.size and file.read(size).strip(b"\0"):
            raise FileFormatError(contents.path, "padding", "set", "zero before and after the content")


def _read_table(file: BinaryIO, contents: Contents, digest: bytes) -> bytes:
    table = bytearray()
    running = hashlib.blake2b(digest_size=DIGEST_SIZE)
    path, is_image, size = contents.path, contents.kind == IMAGE, contents.count * ENTRY.size
    first, last = (edge // GROUP for edge in _span(contents.offset, contents.size))
    # Of the first and the last group, the pages that hold some of the content.
    first_mask = 0xFFFF << contents.offset % GROUP // PAGE
    last_mask = (1 << (round_up(contents.offset + contents.size, PAGE) - (last - 1) * GROUP) // PAGE) - 1
    previous = first - 1
    while len(table) < size:
        # Step by step: a table that is one large hole is refused at its first entry.
        step = file.read(min(TABLE_STEP, size - len(table)))
        if not step or len(step) % ENTRY.size:
            raise FileFormatError(path, "table", f"{len(table) + len(step)} bytes", f"{size} bytes")
        for i, (number, mentioned, stored, crc) in enumerate(ENTRY.iter_unpack(step), len(table) // ENTRY.size):
            if not previous < number < last:
                raise FileFormatError(path, f"table[{i}].group", number, f"more than {previous} and below {last}")
            allowed = ((first_mask if number == first else 0xFFFF) & (last_mask if number == last - 1 else 0xFFFF))
            if not mentioned or mentioned & ~allowed:
                raise FileFormatError(path, f"table[{i}].mentioned", f"{mentioned:#06x}",
                                      f"some bits of {allowed:#06x}")
            if stored & ~mentioned or (is_image and stored != mentioned):
                raise FileFormatError(path, f"table[{i}].stored", f"{stored:#06x}",
                                      f"{mentioned:#06x}" if is_image else f"within {mentioned:#06x}")
            if not stored and crc:
                raise FileFormatError(path, f"table[{i}].crc", f"{crc:#010x}", "0, for no page")
            previous = number
        running.update(step)
        table += step
    if running.digest() != digest:
        raise FileFormatError(path, "table_digest", digest.hex(), f"{running.hexdigest()}: the table is damaged")
    return bytes(table)


def _wrong_crc(path: str, number: int, found: int, crc: int) -> FileFormatError:
    return FileFormatError(path, f"crc of group {number} (bytes {number * GROUP} to {(number + 1) * GROUP - 1})",
                           f"{found:#010x}", f"{crc:#010x}: the content is damaged")


def _stored_zeros(contents: Contents, number: int, nth: int) -> FileFormatError:
    return FileFormatError(contents.path, f"page {nth} of those stored in group {number}", "all zero",
                           "something else: such a page is not stored")


def pieces(file: BinaryIO, contents: Contents) -> Iterator[Run]:
    """The pages that the file mentions.

    Each group is checked before its bytes are handed out. They are the caller's to keep.
    """
    for number, mentioned, stored, crc, at in contents.groups():
        data = memoryview(bytearray(stored.bit_count() * PAGE))
        place: dict[int, int] = {}
        filled = 0
        for page, count in _bit_runs(stored):
            file.seek(contents.position(number, page, at + filled))
            _fill(file, data[filled:filled + count * PAGE], contents.path)
            place[page] = filled
            filled += count * PAGE
        if (found := zlib.crc32(data)) != crc:
            raise _wrong_crc(contents.path, number, found, crc)
        for page in range(0, len(data), PAGE):
            # Else a hole could pass for any amount of content.
            if data[page:page + PAGE].tobytes() == ZEROS:
                raise _stored_zeros(contents, number, page // PAGE)
        for page, count in sorted(_bit_runs(stored) + _bit_runs(mentioned & ~stored)):
            part = data[place[page]:place[page] + count * PAGE] if page in place else None
            start = number * GROUP + page * PAGE
            head = max(contents.offset - start, 0)
            tail = min(count * PAGE, contents.offset + contents.size - start)
            if part is not None and (part[:head].tobytes().strip(b"\0") or part[tail:].tobytes().strip(b"\0")):
                raise FileFormatError(contents.path, "padding", "set", "zero before and after the content")
            yield start + head, tail - head, None if part is None else part[head:tail]


def _fill(file: BinaryIO, room: memoryview, path: str) -> None:
    while room:
        n = file.readinto(room)     # type: ignore[attr-defined]
        if not n:
            raise FileFormatError(path, "data", f"{len(room)} bytes short", "whole: the file was cut while it was read")
        room = room[n:]


def check(view: memoryview, contents: Contents, fd: int | None) -> None:
    """Compare a mapping of an IN_PLACE file, through the read-only `view` of its content, with the table."""
    offset, end = contents.offset, contents.offset + contents.size
    for number, _, stored, crc, _ in contents.groups():
        found = 0
        for page, count in _bit_runs(stored):
            start = number * GROUP + page * PAGE
            low, high = max(start, offset), min(start + count * PAGE, end)
            for part in (ZEROS[:low - start], view[low - offset:high - offset], ZEROS[:start + count * PAGE - high]):
                found = zlib.crc32(part, found)
        if found != crc:
            raise _wrong_crc(contents.path, number, found, crc)
        for page in (page for page in range(GROUP // PAGE) if stored >> page & 1):
            start = number * GROUP + page * PAGE
            part = view[max(start, offset) - offset:min(start + PAGE, end) - offset]
            if part.tobytes() == ZEROS[:len(part)]:
                raise _stored_zeros(contents, number, (stored & ((1 << page) - 1)).bit_count())
    _check_holes(lambda at, size: view[at - offset:at - offset + size], contents, fd)


def _check_holes(bytes_at: Callable[[int, int], memoryview], contents: Contents, fd: int | None) -> None:
    """Pages of an IN_PLACE file that the table does not mention must be zero: a mapping shows them."""
    try:
        for at, end in _gaps(stored_runs(contents), contents.offset, contents.offset + contents.size):
            _check_gap(bytes_at, fd, contents.in_place(0), at, end)
    except NotZero as error:
        raise _not_mentioned(contents, error) from None


class NotZero(ValueError):
    """A byte of a file that was said to be zero is not: in the page at `at` of a memory."""

    def __init__(self, at: int) -> None:
        super().__init__(f"runs must cover every byte of the file that is not zero: the page at {at} has some outside"
                         " of them")
        self.at = at


def _not_mentioned(contents: Contents, error: NotZero) -> FileFormatError:
    return FileFormatError(contents.path, f"page at {error.at}", "set", "zero: the table does not mention it")


def _gaps(runs: Iterable[tuple[int, int]], clear: int, end: int) -> Iterator[tuple[int, int]]:
    """What of clear .. end lies between the runs, as (first, end)."""
    for start, size in runs:
        if start > clear:
            yield clear, min(start, end)
        clear = max(clear, start + size)
    if end > clear:
        yield clear, end


def _extents(fd: int | None, at: int, end: int) -> Iterator[tuple[int, int]]:
    """What of at .. end in a file is not in a hole, as far as the file system says: (first, end)."""
    if fd is None or not hasattr(os, "SEEK_DATA"):
        yield at, end
        return
    while at < end:
        try:
            first = os.lseek(fd, at, os.SEEK_DATA)
            stop = os.lseek(fd, first, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:      # nothing but a hole up to the end
                return
            raise
        if first >= end:
            return
        yield first, min(stop, end)
        at = stop


def _check_gap(bytes_at: Callable[[int, int], memoryview], fd: int | None, to_file: int, at: int, end: int) -> None:
    # A hole need not be read, which would fill the page cache with it.
    for first, stop in _extents(fd, to_file + at, to_file + end):
        for step in range(first, stop, READ_STEP):
            # A page of a memory lies at a multiple of PAGE, which a file of a stranger's need not keep to.
            part = bytes_at(step - to_file, min(READ_STEP, stop - step)).tobytes()
            if part.count(0) < len(part):
                found = step - to_file + len(part) - len(part.lstrip(b"\0"))
                raise NotZero(found - found % PAGE)


def runs_of_file(fd: int, position: int, first: int, end: int,
                 claimed: list[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
    """Where a file that shows the bytes first .. end of a memory, from `position` on, may hold something.

    What is claimed is checked: `NotZero` where a byte outside of the claimed runs is not zero. The work follows what
    the file holds. None: nothing is claimed, and the file system does not say.
    """
    if claimed is None and not hasattr(os, "SEEK_DATA"):
        return None
    to_file = position - first
    before = os.lseek(fd, 0, os.SEEK_CUR)       # the caller's, too
    try:
        if claimed is None:
            return _joined((start - start % PAGE, round_up(stop, PAGE) - (start - start % PAGE))
                           for start, stop in ((start - to_file, stop - to_file)
                                               for start, stop in _extents(fd, position, position + end - first)))
        for at, stop in _gaps(claimed, first, end):
            _check_gap(lambda at, size: _read_fd(fd, to_file + at, size), fd, to_file, at, stop)
        return claimed
    finally:
        os.lseek(fd, before, os.SEEK_SET)


def _read_fd(fd: int, at: int, size: int) -> memoryview:
    if hasattr(os, "pread"):
        return memoryview(os.pread(fd, size, at))
    os.lseek(fd, at, os.SEEK_SET)
    return memoryview(os.read(fd, size))


def content_digest(fd: int) -> str:
    """What tells a whole file from any other, in time that follows what it holds: hexadecimal digits.

    BLAKE2b of 32 bytes over the size, and for each page (counted from the file's begin) with anything but zeros in
    it where it begins and its bytes; numbers in 8 bytes, least significant first.
    """
    size = os.fstat(fd).st_size
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=DIGEST_SIZE)
    done = 0
    for first, stop in _extents(fd, 0, size):
        for at in range(max(first - first % PAGE, done), stop, READ_STEP):
            done = min(at + READ_STEP, round_up(stop, PAGE))
            part = _read_fd(fd, at, done - at)
            for i in range(0, len(part), PAGE):
                page = part[i:i + PAGE].tobytes()
                if page != ZEROS[:len(page)]:
                    digest.update((at + i).to_bytes(8, "little") + page)
    return digest.hexdigest()


def holes_are_known(file: BinaryIO) -> bool:
    """Whether what a file does not hold can be told from zeros without reading more than it holds."""
    attributes = getattr(os.fstat(file.fileno()), "st_file_attributes", 0)
    return hasattr(os, "SEEK_DATA") or not attributes & stat.FILE_ATTRIBUTE_SPARSE_FILE


# -- what Image and Delta do with files --------------------------------------------------------------

def save_image(image: AnImage, path: str | bytes | os.PathLike[str], *, packed: bool) -> None:
    write(path, IMAGE, _runs_of(image), layout=PACKED if packed else IN_PLACE, **_header_of(image))


def write_image(image: AnImage, file: BinaryIO) -> None:
    write_to(file, IMAGE, _runs_of(image), layout=IN_PLACE, **_header_of(image))


def _runs_of(image: AnImage) -> Callable[[], Iterable[Run]]:
    view = memoryview(image)
    return lambda: ((start, len(data), data) for start, data in own_runs(image, view))


def _header_of(image: AnImage) -> dict[str, Any]:
    return {"size": image.size, "digest": bytes.fromhex(image.digest), "offset": image.offset}


def own_runs(image: AnImage, view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Where an image is not zero and its bytes there, from its first to its last byte."""
    offset, end = image.offset, image.offset + image.size
    for start, size in image.runs():
        low, high = max(start, offset), min(start + size, end)
        yield low, view[low - offset:high - offset]


def open_image(make: Any, path: str | bytes | os.PathLike[str], *, verify: bool, mapped: bool,
               max_size: int | None, host_page: int) -> tuple[Any, Contents | None]:
    """The image, and what its file says of it where it is a mapping of that file."""
    with open_file(path) as file:
        contents = read(file, path, IMAGE, max_size)
        if contents.layout == IN_PLACE and mapped and contents.size and holes_are_known(file):
            try:
                image = make.from_fd(file.fileno(), contents.size, contents.offset, runs=stored_runs(contents),
                                     position=contents.in_place(contents.offset - contents.offset % host_page))
            except NotZero as error:
                raise _not_mentioned(contents, error) from None
            if verify:
                verify_image(image, contents)
            return image, contents
        found = ((start, data) for start, _, data in pieces(file, contents) if data is not None)
        image = make.from_pieces(found, contents.size, contents.offset)
        if verify:
            if contents.layout == IN_PLACE:
                _check_holes(lambda at, size: _read_at(file, contents, at, size), contents, file.fileno())
            _check_digest(image, contents)
    return image, None


def _read_at(file: BinaryIO, contents: Contents, at: int, size: int) -> memoryview:
    room = memoryview(bytearray(size))
    file.seek(contents.in_place(at))
    _fill(file, room, contents.path)
    return room


def stored_runs(contents: Contents) -> list[tuple[int, int]]:
    return _joined((number * GROUP + page * PAGE, count * PAGE)
                   for number, _, stored, _, _ in contents.groups() for page, count in _bit_runs(stored))


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, size in runs:
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], joined[-1][1] + size)
        else:
            joined.append((start, size))
    return joined


def verify_image(image: AnImage, contents: Contents) -> None:
    try:
        fd = image.fileno()
    except OSError:         # the pages are mapped, and no descriptor was left for them
        fd = None
    check(memoryview(image), contents, fd)
    _check_digest(image, contents)


def _check_digest(image: AnImage, contents: Contents) -> None:
    if image.digest != contents.digest.hex():
        raise FileFormatError(contents.path, "digest", contents.digest.hex(), f"{image.digest}, that of the content")


def save_delta(delta: ADelta, path: str | bytes | os.PathLike[str]) -> None:
    zeroed = sum(size for _, size, data in delta.pieces() if data is None)
    if zeroed > MOST_ZEROED:
        raise ValueError(f"a saved delta may zero at most {MOST_ZEROED} bytes, since its file names each {GROUP} of"
                         f" them, and this one zeroes {zeroed}")
    for start, size, _ in delta.pieces():
        if start % PAGE or ((start + size) % PAGE and start + size != delta.size):
            raise ValueError(f"only deltas of whole pages of {PAGE} bytes can be saved, and this one has"
                             f" {size} bytes at {start}")
    write(path, DELTA, delta.pieces, size=delta.size,
          digest=NO_DIGEST if delta.target is None else bytes.fromhex(delta.target),
          base_size=delta.base_size, base_digest=bytes.fromhex(delta.base), target_offset=delta.offset)


def open_delta(make: Any, path: str | bytes | os.PathLike[str], *, max_size: int | None) -> Any:
    ranges: list[tuple[int, int]] = []
    zeros: list[tuple[int, int]] = []
    data = bytearray()
    with open_file(path) as file:
        contents = read(file, path, DELTA, max_size)
        for start, size, part in pieces(file, contents):
            if part is None:
                zeros.append((start, size))
            else:
                ranges.append((start, size))
                data += part
    target = None if contents.digest == NO_DIGEST else contents.digest.hex()
    return make(contents.base_digest.hex(), contents.base_size, contents.size, _joined(ranges), _joined(zeros),
                memoryview(data).toreadonly(), target, contents.target_offset)
