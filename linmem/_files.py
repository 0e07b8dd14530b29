"""The files of images and deltas: how they are written, and how one is read that may be anybody's. Floor 1.

docs/file-format.md describes the same bytes. This room knows buffers and files only: what is made of
them is for `Image` and `Delta` to say, which import it when a file is first named.

::

    0          224          64 KiB                                table_offset           end of file
    +----------+------------+-------------------------------------+----------------------+
    | header   | zero       | data: pages, or holes between them  | table: 16 bytes for  |
    |          |            |                                     | each group           |
    +----------+------------+-------------------------------------+----------------------+

A page is 4096 bytes and a group 16 pages, whatever the host's own are: a file fits every host.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import BinaryIO

from linmem.errors import FileFormatError

__all__ = ["DELTA", "DIGEST_SIZE", "GROUP", "IMAGE", "IN_PLACE", "PACKED", "PAGE", "TEMPORARY", "Contents", "check",
           "nonzero_runs", "pieces", "read", "write"]

MAGIC = b"\x89LINMEM\n"     # a byte that no text has, and a line end that a transfer as text would change
VERSION = 1
IMAGE, DELTA = 1, 2
KINDS = {IMAGE: "an image", DELTA: "a delta"}
IN_PLACE, PACKED = 1, 2
PAGE = 4096
GROUP = 65536               # no host maps a file at less than this, nor has larger pages
DIGEST_SIZE = 32
MAX_SIZE = 1 << 56

HEADER = struct.Struct("<8sHHIIIQQQQQQQIIQ32s32s32s32s")
FIELDS = ("magic", "version", "kind", "header_size", "group_size", "page_size", "size", "offset", "base_size",
          "data_offset", "data_size", "table_offset", "count", "layout", "reserved", "reserved", "digest",
          "base_digest", "table_digest", "header_digest")
ENTRY = struct.Struct("<QHHI")
DATA_OFFSET = GROUP
NO_DIGEST = bytes(DIGEST_SIZE)
ZEROS = bytes(PAGE)
TABLE_STEP = 4096 * ENTRY.size
READ_STEP = 1 << 20

# Recognisable, and as short for a long name as for a short one.
TEMPORARY = (".linmem-", ".tmp")


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


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

class _Group:
    """The pages of one group that a file mentions, as they come in."""

    __slots__ = ("crc", "mentioned", "number", "stored")

    def __init__(self, number: int) -> None:
        self.number = number
        self.mentioned = self.stored = self.crc = 0

    def entry(self) -> bytes:
        return ENTRY.pack(self.number, self.mentioned, self.stored, self.crc)


def _write_data(file: BinaryIO, layout: int, kind: int, runs: Iterable[tuple[int, memoryview]],
                table: bytearray) -> int:
    """Write the pages of `runs`, which ascend; -> how many are stored."""
    group = _Group(-1)
    stored = 0
    at = -1                         # where the file stands
    for run_start, run in runs:
        for cut in range(run_start - run_start % GROUP, run_start + len(run), GROUP):
            if cut // GROUP != group.number:
                if group.mentioned:
                    table += group.entry()
                group = _Group(cut // GROUP)
            begin, end = max(cut, run_start), min(cut + GROUP, run_start + len(run))
            part = run[begin - run_start:end - run_start]
            if kind == DELTA:
                pages = round_up(len(part), PAGE) // PAGE
                group.mentioned |= ((1 << pages) - 1) << (begin - cut) // PAGE
            for start, data in nonzero_runs(part, begin):
                pages = round_up(len(data), PAGE) // PAGE
                group.stored |= ((1 << pages) - 1) << (start - cut) // PAGE
                padding = ZEROS[:pages * PAGE - len(data)]
                group.crc = zlib.crc32(padding, zlib.crc32(data, group.crc))
                to = DATA_OFFSET + (start if layout == IN_PLACE else stored * PAGE)
                if to != at:
                    file.seek(to)
                file.write(data)
                file.write(padding)
                stored += pages
                at = to + pages * PAGE
            group.mentioned |= group.stored
    if group.mentioned:
        table += group.entry()
    return stored


def _temporary_file(folder: str) -> tuple[int, str]:
    """A new file beside the one that it will become, with the rights that any new file gets."""
    while True:
        path = os.path.join(folder, secrets.token_hex(8).join(TEMPORARY))
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
            return os.open(path, flags, 0o666), path
        except FileExistsError:
            continue


def _sync_folder(folder: str) -> None:
    # The rename is in the folder's own pages. Where folders cannot be opened they cannot be synced.
    if hasattr(os, "O_DIRECTORY"):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def write(path: str | os.PathLike[str], kind: int, runs: Iterable[tuple[int, memoryview]], *, size: int,
          digest: bytes, layout: int = PACKED, offset: int = 0, base_size: int = 0,
          base_digest: bytes = NO_DIGEST) -> None:
    """Put a file at `path` that is there whole or not at all, whenever the process or the machine stops.

    `runs` ascend and do not overlap; each begins at a multiple of `PAGE`, and so does its end but
    for the last. An image's pages that no run covers are zero; a delta's are unchanged.
    """
    # Through a symbolic link, as an open() for writing would.
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    fd, temporary = _temporary_file(folder)
    try:
        with open(fd, "wb") as file:
            table = bytearray()
            stored = _write_data(file, layout, kind, runs, table)
            data_size = round_up(size, GROUP) if layout == IN_PLACE else stored * PAGE
            table_offset = DATA_OFFSET + data_size
            file.seek(table_offset)
            file.write(table)
            file.truncate(table_offset + len(table))
            file.seek(0)
            head = HEADER.pack(MAGIC, VERSION, kind, HEADER.size, GROUP, PAGE, size, offset, base_size, DATA_OFFSET,
                               data_size, table_offset, len(table) // ENTRY.size, layout, 0, 0, digest, base_digest,
                               _digest(table), NO_DIGEST)[:-DIGEST_SIZE]
            file.write(head + _digest(head))
            file.flush()
            os.fsync(fd)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_folder(folder)


def _digest(data: bytes | bytearray) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()


# -- reading -------------------------------------------------------------------------------------

class Contents:
    """The header and the table of a file, checked: nothing in them can lead a reader astray."""

    __slots__ = ("base_digest", "base_size", "count", "digest", "file_size", "kind", "layout", "offset", "path",
                 "size", "stored", "table")

    path: str
    kind: int
    layout: int
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
        at = DATA_OFFSET
        for number, mentioned, stored, crc in ENTRY.iter_unpack(self.table):
            yield number, mentioned, stored, crc, at
            at += stored.bit_count() * PAGE

    def position(self, number: int, page: int, packed_at: int) -> int:
        """Where the file has a page of a group whose pages before it end at `packed_at`."""
        return DATA_OFFSET + number * GROUP + page * PAGE if self.layout == IN_PLACE else packed_at


def read(file: BinaryIO, path: str | os.PathLike[str], kind: int | None = None,
         max_size: int | None = None) -> Contents:
    """The header and the table, or `FileFormatError`. Memory follows the bytes that are in the file.

    `file` stands at its begin and is unbuffered or not read from otherwise.
    """
    name = os.fspath(path)
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
        raise FileFormatError(name, "file", "no regular file", "one")
    head = file.read(HEADER.size)
    if head[:8] != MAGIC:
        raise FileFormatError(name, "magic", head[:8], f"{MAGIC!r}: it is no image or delta of linmem's")
    if len(head) >= 10 and (version := int.from_bytes(head[8:10], "little")) != VERSION:
        raise FileFormatError(name, "version", version, f"{VERSION}, which is all that this linmem reads")
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
    if any(value for name, value in zip(FIELDS, values, strict=True) if name == "reserved"):
        raise FileFormatError(path, "reserved", "set", "0")
    at_most("size", MAX_SIZE)
    if max_size is not None:
        at_most("size", max_size, ", which is the max_size that was asked for")
    at_most("offset", MAX_SIZE)
    if number["offset"] % PAGE:
        raise FileFormatError(path, "offset", number["offset"], f"a multiple of {PAGE}")
    at_most("base_size", 0 if is_image else MAX_SIZE)
    if is_image and field["base_digest"] != NO_DIGEST:
        raise FileFormatError(path, "base_digest", "set", "zero in an image")
    size, data_size, count = number["size"], number["data_size"], number["count"]
    must_be("data_offset", DATA_OFFSET)
    if number["layout"] == IN_PLACE:
        must_be("data_size", round_up(size, GROUP), why=", the size in whole groups")
    else:
        at_most("data_size", round_up(size, PAGE), ", the size in whole pages")
    must_be("table_offset", DATA_OFFSET + data_size, why=", where the data ends")
    at_most("count", round_up(size, GROUP) // GROUP, ", the groups in its size")
    end = number["table_offset"] + count * ENTRY.size
    if file_size != end:
        raise FileFormatError(path, "file size", file_size, f"{end}, where the table ends")

    found = Contents()
    found.path, found.kind, found.layout = path, number["kind"], number["layout"]
    found.size, found.offset, found.base_size, found.count = size, number["offset"], number["base_size"], count
    found.digest, found.base_digest = bytes(values[-4]), bytes(values[-3])
    found.file_size = file_size
    if found.layout == IN_PLACE:
        _check_tail(file, path, size)
    file.seek(number["table_offset"])
    found.table = _read_table(file, path, count, size, is_image, bytes(values[-2]))
    found.stored = sum(stored.bit_count() for _, _, stored, _ in ENTRY.iter_unpack(found.table)) * PAGE
    if found.layout == PACKED and found.stored != data_size:
        raise FileFormatError(path, "data_size", data_size, f"{found.stored}, the pages that the table counts")
    return found


def _check_tail(file: BinaryIO, path: str, size: int) -> None:
    # A memory that starts from a mapping of the file sees these bytes once it grows, verified or not.
    file.seek(DATA_OFFSET + size)
    tail = file.read(round_up(size, GROUP) - size)
    if tail.strip(b"\0"):
        raise FileFormatError(path, "padding", "set", "zero after the last byte")


def _read_table(file: BinaryIO, path: str, count: int, size: int, is_image: bool, digest: bytes) -> bytes:
    table = bytearray()
    running = hashlib.blake2b(digest_size=DIGEST_SIZE)
    previous = -1
    groups = round_up(size, GROUP) // GROUP
    # The pages of the last group that begin before the end of the content.
    last_mask = (1 << (round_up(size, PAGE) - (groups - 1) * GROUP) // PAGE) - 1
    while len(table) < count * ENTRY.size:
        # Step by step: a table that is one large hole is refused at its first entry.
        step = file.read(min(TABLE_STEP, count * ENTRY.size - len(table)))
        if not step or len(step) % ENTRY.size:
            raise FileFormatError(path, "table", f"{len(table) + len(step)} bytes", f"{count * ENTRY.size} bytes")
        for i, (number, mentioned, stored, crc) in enumerate(ENTRY.iter_unpack(step), len(table) // ENTRY.size):
            if not previous < number < groups:
                raise FileFormatError(path, f"table[{i}].group", number, f"more than {previous} and below {groups}")
            allowed = last_mask if number == groups - 1 else 0xFFFF
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


def pieces(file: BinaryIO, contents: Contents) -> Iterator[tuple[int, int, memoryview | None]]:
    """(start, size, bytes) of each run of pages that the file mentions; None for bytes that are zero.

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
        parts = [(page, count, data[place[page]:place[page] + count * PAGE]) for page, count in _bit_runs(stored)]
        parts += [(page, count, None) for page, count in _bit_runs(mentioned & ~stored)]
        for page, count, part in sorted(parts, key=lambda part: part[0]):
            start = number * GROUP + page * PAGE
            size = min(count * PAGE, contents.size - start)
            if part is not None and part[size:].tobytes().strip(b"\0"):
                raise FileFormatError(contents.path, "padding", "set", "zero after the last byte")
            yield start, size, None if part is None else part[:size]


def _fill(file: BinaryIO, room: memoryview, path: str) -> None:
    while room:
        n = file.readinto(room)     # type: ignore[attr-defined]
        if not n:
            raise FileFormatError(path, "data", f"{len(room)} bytes short", "whole: the file was cut while it was read")
        room = room[n:]


def check(view: memoryview, contents: Contents, fd: int) -> None:
    """Compare a mapping of an IN_PLACE file, through its read-only `view`, with the table.

    Pages that the table does not mention must be zero: they are what a mapping shows of the file's holes.
    """
    clear = 0                       # so far the file's word holds
    for number, _, stored, crc, _ in contents.groups():
        found = 0
        for page, count in _bit_runs(stored):
            start = number * GROUP + page * PAGE
            _check_hole(view, contents, fd, clear, start)
            clear = start + count * PAGE
            part = view[start:clear]
            found = zlib.crc32(ZEROS[:count * PAGE - len(part)], zlib.crc32(part, found))
        if found != crc:
            raise _wrong_crc(contents.path, number, found, crc)
    _check_hole(view, contents, fd, clear, contents.size)


def _check_hole(view: memoryview, contents: Contents, fd: int, start: int, end: int) -> None:
    at = start
    while at < end:
        if hasattr(os, "SEEK_DATA"):
            # A hole need not be read, which would fill the page cache with it.
            try:
                at = max(at, os.lseek(fd, DATA_OFFSET + at, os.SEEK_DATA) - DATA_OFFSET)
            except OSError as error:
                if error.errno == errno.ENXIO:      # nothing but a hole up to the end
                    return
                raise
        part = view[at:min(at + READ_STEP, end)]
        if at < end and (wrong := next(nonzero_runs(part, at), None)):
            raise FileFormatError(contents.path, f"page at {wrong[0]}", "set", "zero: the table does not mention it")
        at += READ_STEP
