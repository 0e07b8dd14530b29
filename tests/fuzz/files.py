"""Files of images and deltas: built, damaged and sealed again. A second reader, which follows
docs/reference/file-format.md alone, judges them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator

import linmem
from linmem.errors import FileFormatError

from .choices import Choices

PAGE, GROUP = 4096, 65536
LARGE = 1 << 24                     # bytes of content; larger images may not fit in memory
HEADER = ("magic 8s", "version H", "kind H", "header_size I", "group_size I", "page_size I", "size Q", "offset Q",
          "base_size Q", "data_offset Q", "data_size Q", "table_offset Q", "count Q", "layout I", "reserved I",
          "target_offset Q",
          "digest 32s", "base_digest 32s", "table_digest 32s")
NAMES = [field.split()[0] for field in HEADER]
FORMAT = "<" + "".join(field.split()[1] for field in HEADER)
OFFSETS = (0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 5 * GROUP - 1, 1 << 40, (1 << 56) - 1, 1 << 56)


def blake(data) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def span(offset, size):
    return offset // GROUP, -(-(offset + size) // GROUP) if size else offset // GROUP


def image_digest(offset: int, size: int, pages: dict[int, bytes]) -> bytes:
    state = hashlib.blake2b(offset.to_bytes(8, "little") + size.to_bytes(8, "little"), digest_size=32)
    for number in sorted(pages):
        if number - 1 not in pages:
            end = number
            while end in pages:
                end += 1
            state.update((number * PAGE).to_bytes(8, "little") + ((end - number) * PAGE).to_bytes(8, "little"))
        state.update(pages[number])
    return state.digest()


class Draft:
    """The parts of a file before they are written: the header's fields, the table's entries and the data."""

    def __init__(self, c: Choices, version: int) -> None:
        kind, layout = c.pick(((1, 1), (1, 2), (2, 2)))
        self.start = 224 if version == 2 and layout == 2 else GROUP
        offset = c.pick(OFFSETS) if kind == 1 else 0
        size = min(c.pick((0, 1, 4095, 4096, 65536, 65537, 3 * GROUP - 1)) + c.below(300), (1 << 57) - offset)
        self.pages: dict[int, bytes] = {}       # the stored pages
        zeros: set[int] = set()
        first, last = span(offset, size)
        own = range(offset // PAGE, -(-(offset + size) // PAGE) if size else offset // PAGE)
        for _ in range(c.below(6) if own else 0):
            number = own[c.below(len(own))]
            if kind == 2 and c.flag():
                zeros.add(number)
                self.pages.pop(number, None)
            else:
                low = max(offset - number * PAGE, 0)
                high = min(offset + size - number * PAGE, PAGE)
                page = bytearray(PAGE)
                page[low + c.below(high - low)] = c.byte() or 1
                self.pages[number] = bytes(page)
                zeros.discard(number)
        self.table = []
        for group in sorted({number // 16 for number in [*self.pages, *zeros]}):
            stored = sum(1 << number % 16 for number in self.pages if number // 16 == group)
            mentioned = stored | sum(1 << number % 16 for number in zeros if number // 16 == group)
            self.table.append([group, mentioned, stored, 0])
        self.data = bytearray((last - first) * GROUP if layout == 1 else len(self.pages) * PAGE)
        for i, number in enumerate(sorted(self.pages)):
            at = number * PAGE - first * GROUP if layout == 1 else i * PAGE
            self.data[at:at + PAGE] = self.pages[number]
        self.field = {
            "magic": b"\x89LINMEM\n", "version": version, "kind": kind, "header_size": 224, "group_size": GROUP,
            "page_size": PAGE, "size": size, "offset": offset, "base_size": c.below(3) * 5000 if kind == 2 else 0,
            "data_offset": self.start, "data_size": len(self.data), "table_offset": self.start + len(self.data),
            "count": len(self.table), "layout": layout, "reserved": 0,
            "target_offset": size // 3 if kind == version == 2 else 0,
            "digest": image_digest(offset, size, self.pages) if kind == 1 else c.pick((bytes(32), b"\7" * 32)),
            "base_digest": b"\5" * 32 if kind == 2 else bytes(32), "table_digest": bytes(32)}
        for entry in self.table:
            entry[3] = zlib.crc32(b"".join(page for number, page in sorted(self.pages.items())
                                           if number // 16 == entry[0]))

    def damage(self, c: Choices) -> None:
        what = c.below(4)
        if what == 0:
            name = c.pick(NAMES)
            size = struct.calcsize("<" + HEADER[NAMES.index(name)].split()[1])
            if isinstance(self.field[name], int):
                value = c.number() if c.flag() else self.field[name] + c.byte() - 128
                self.field[name] = value & ((1 << 8 * size) - 1)
            else:
                self.field[name] = (c.bytes(size) + self.field[name])[:size]
        elif what == 1 and self.table:
            entry, i = c.pick(self.table), c.below(4)
            entry[i] = (entry[i] ^ (1 << c.below(32))) & ((1 << (64, 16, 16, 32)[i]) - 1)
        elif what == 2 and self.data:
            at = c.unsigned(3) % len(self.data)
            self.data[at] = c.byte()
            self.reseal_pages(c.flag())
        elif what == 3:
            if c.flag() and self.table:
                self.table.append(list(c.pick(self.table)))
            elif self.table:
                self.table.pop(c.below(len(self.table)))
            if c.flag():
                self.field["count"] = len(self.table)

    def reseal_pages(self, digest_too: bool) -> None:
        """Renews the checksums after damage, as an attacker would: the checksums of the stored pages that the table
        lists."""
        first, at, pages = span(self.field["offset"], self.field["size"])[0], 0, {}
        for entry in self.table:
            crc = 0
            for k in range(16):
                if entry[2] >> k & 1:
                    begin = (entry[0] - first) * GROUP + k * PAGE if self.field["layout"] == 1 else at
                    page = bytes(self.data[begin:begin + PAGE]) if begin >= 0 else b""
                    pages[entry[0] * 16 + k] = page
                    crc, at = zlib.crc32(page, crc), at + PAGE
            entry[3] = crc
        if digest_too and self.field["kind"] == 1:
            self.field["digest"] = image_digest(self.field["offset"], self.field["size"], pages)

    def whole(self, c: Choices) -> bytes:
        table = b"".join(struct.pack("<QHHI", *entry) for entry in self.table)
        self.field["table_digest"] = blake(table) if c.byte() < 224 else bytes(32)
        head = struct.pack(FORMAT, *(self.field[name] for name in NAMES))
        head += blake(head) if c.byte() < 224 else bytes(32)
        raw = head.ljust(self.start, b"\0") + self.data + table
        cut = c.byte()
        return raw if cut < 224 else raw[:len(raw) * (cut - 224) // 31] if cut < 255 else raw + b"\0"


class Wrong(Exception):
    pass


def need(truth) -> None:
    if not truth:
        raise Wrong


def judge(raw: bytes):
    """Returns (fields, stored pages, zeroed pages) or raises Wrong, by docs/reference/file-format.md alone. The
    description of a snapshot is not judged."""
    need(len(raw) >= 224)
    f = dict(zip(NAMES, struct.unpack_from(FORMAT, raw), strict=True))
    need(raw[192:224] == blake(raw[:192]))
    is_image, is_delta = f["kind"] == 1, f["kind"] == 2
    offset, size = f["offset"], f["size"]
    need(f["magic"] == b"\x89LINMEM\n" and f["version"] in (1, 2) and f["reserved"] == 0)
    need(f["kind"] in (1, 2) or (f["kind"] == 3 and f["version"] == 2 and size % GROUP == 0 and f["base_size"] <= size))
    need(f["target_offset"] <= (size if f["version"] == f["kind"] == 2 else 0))
    start = 224 if f["version"] == f["layout"] == 2 else GROUP
    need((f["header_size"], f["group_size"], f["page_size"], f["data_offset"]) == (224, GROUP, PAGE, start))
    need(size <= 1 << 56 and offset <= 1 << 56 and f["base_size"] <= 1 << 56)
    need(f["layout"] in (1, 2) and (not is_delta or f["layout"] == 2))
    need((f["base_size"] == 0 and f["base_digest"] == bytes(32)) if is_image else offset == 0)
    first, last = span(offset, size)
    need(f["table_offset"] == start + f["data_size"] and len(raw) == f["table_offset"] + 16 * f["count"])
    if f["layout"] == 1:
        need(f["data_size"] == (last - first) * GROUP)
    table = raw[f["table_offset"]:]
    need(f["table_digest"] == blake(table))
    data = raw[start:f["table_offset"]]
    stored, zeroed = {}, set()
    previous, at = -1, 0
    for group, mentioned, there, crc in struct.iter_unpack("<QHHI", table):
        need(previous < group and first <= group < last and mentioned)
        previous, found = group, 0
        need(there & ~mentioned == 0 and (there == mentioned or is_delta))
        for k in range(16):
            number = group * 16 + k
            if mentioned >> k & 1:
                need((number + 1) * PAGE > offset and number * PAGE < offset + size)
            if there >> k & 1:
                begin = (group - first) * GROUP + k * PAGE if f["layout"] == 1 else at
                page, at = data[begin:begin + PAGE], at + PAGE
                need(len(page) == PAGE and any(page))
                found = zlib.crc32(page, found)
                low = max(offset - number * PAGE, 0)
                high = min(offset + size - number * PAGE, PAGE)
                need(not any(page[:low]) and not any(page[high:]))
                stored[number] = page
            elif mentioned >> k & 1:
                zeroed.add(number)
        need(found == crc)
    if f["layout"] == 2:
        need(at == f["data_size"])
    else:
        need(sum(map(len, stored.values())) - sum(page.count(0) for page in stored.values())
             == len(data) - data.count(0))
    need(not is_image or f["digest"] == image_digest(offset, size, stored))
    return f, stored, zeroed


def spread(f, pages: dict[int, bytes]) -> bytes:
    out = bytearray(f["size"])
    for number, page in pages.items():
        start = number * PAGE - f["offset"]
        low, high = max(start, 0), min(start + PAGE, len(out))
        out[low:high] = page[low - start:high - start]
    return bytes(out)


def opened(what, *args, size: int, **options):
    try:
        return what(*args, **options)
    except FileFormatError:
        return None
    except (linmem.PageError, OverflowError, MemoryError):
        assert size >= LARGE, "no room for a small one"
        return False


def check_image(path: str, truth, size: int, again: bool) -> None:
    for verify in (True, False):
        for mapped in (True, False):
            image = opened(linmem.Image.open, path, verify, map=mapped, size=size)
            if image is False:
                continue
            assert truth is None or image is not None, f"refused {verify=} {mapped=}"
            if verify:
                assert (image is None) == (truth is None), f"{verify=} {mapped=}"
            elif image is not None and size < LARGE:
                # The digest covers every byte of an image, so equal digests mean equal bytes.
                assert image == linmem.Image.from_bytes(bytes(image), image.offset)
            if image is None or size >= LARGE:
                continue
            content = bytes(image)
            assert (image.offset, image.size) == (truth[0]["offset"], size) if truth else len(content) == size
            assert all(start % PAGE == n % PAGE == 0 for start, n in image.runs())
            if truth:
                assert content == spread(truth[0], truth[1])
                assert image.digest == truth[0]["digest"].hex()
                if image.offset + size < LARGE:
                    with image.new_memory(reserve=0) as memory:
                        assert memory.read(image.offset, size) == content
                if again:
                    image.save(path + "2", packed=mapped)
                    assert linmem.Image.open(path + "2", True, max_size=size) == image
                    assert opened(linmem.Image.open, path + "2", max_size=size - 1, size=size) is None if size else True


def check_delta(path: str, truth, size: int, again: bool) -> None:
    delta = opened(linmem.Delta.open, path, size=size)
    assert delta is False or (delta is None) == (truth is None)
    if not delta:
        return
    f, stored, zeroed = truth
    assert (delta.size, delta.base_size, delta.base) == (size, f["base_size"], f["base_digest"].hex())
    assert delta.target == (f["digest"].hex() if any(f["digest"]) else None)
    assert delta.offset == f["target_offset"]
    if size < LARGE:
        seen, covered = bytearray(size), set()
        for start, n, data in delta.pieces():
            seen[start:start + n] = bytes(n) if data is None else data
            covered |= set(range(start // PAGE, -(-(start + n) // PAGE)))
        assert (bytes(seen), covered) == (spread(f, stored), zeroed | set(stored))
    if again:
        delta.save(path + "2")
        assert linmem.Delta.open(path + "2") == delta


@contextlib.contextmanager
def file_of(raw: bytes) -> Iterator[str]:
    """The path of a file with these bytes, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "file")
        with open(path, "wb") as file:
            file.write(raw)
        yield path


def one(data: bytes) -> None:
    for version in (1, 2):
        of_version(data, version)


def of_version(data: bytes, version: int) -> None:
    c = Choices(data)
    draft = Draft(c, version)
    for _ in range(c.below(4)):
        draft.damage(c)
    again = c.byte() > 240          # rarely, because a save waits for the disk
    raw = draft.whole(c)
    try:
        truth = judge(raw)
    except Wrong:
        truth = None
    with file_of(raw) as path:
        kind, size = draft.field["kind"], draft.field["size"]
        if kind == 2:
            check_delta(path, truth, size, again)
            assert opened(linmem.Image.open, path, size=size) is None
        else:
            check_image(path, truth if kind == 1 else None, size, again)
            assert opened(linmem.Delta.open, path, size=size) is None
