"""Files of snapshots: built, damaged and sealed again. A second reader, which follows
docs/reference/file-format.md alone, judges them."""

from __future__ import annotations

import pickle
import struct
import zlib

import linmem
from linmem._wasm.snapshot_file import open_state, parts_of, save_state, state_of

from .choices import Choices
from .files import FORMAT, GROUP, LARGE, NAMES, PAGE, Wrong, blake, file_of, image_digest, judge, need, opened, span

SIZES = (4, 8, 4, 8, 16)        # of the values of i32, i64, f32, f64, v128
GLOBAL_KINDS = ("i32", "i64", "f32", "f64", "v128", "funcref", "null")
REFERENCE_KINDS = ("null", "export", "element")
NAME_KINDS = ("memory", "global", "table")
HEAD = ("version", "strings", "memories", "globals", "tables", "names", "unseen", "reserved")
# name, struct
RECORDS = {"memories": "<IIQQQ", "runs": "<QQ", "globals": "<II16s", "tables": "<IIQ", "changes": "<QIII",
           "names": "<III", "unseen": "<I"}


class Draft:
    """The parts of a snapshot before they are written. `head` and `field` override what follows from the parts."""

    def __init__(self) -> None:
        self.strings: list[bytes] = []
        self.records: dict[str, list[list]] = {name: [] for name in RECORDS}
        self.images: list[dict[int, bytes]] = []        # of each memory: number of the page in the memory -> bytes
        self.head: dict[str, int] = {}
        self.field: dict[str, int | bytes] = {}
        self.patch: dict[int, int] = {}                 # bytes of the content to replace after all
        self.layout = 1
        self.end = b""                                  # after the description

    def memory(self, index: int, size: int, offset: int, length: int, pages: dict[int, bytes], runs=()) -> None:
        self.records["memories"].append([index, len(runs), size, offset, length])
        self.records["runs"] += [list(run) for run in runs]
        self.images.append(pages)

    def global_(self, index: int, kind: int, value: bytes) -> None:
        self.records["globals"].append([index, kind, value])

    def table(self, index: int, size: int, changes=()) -> None:
        self.records["tables"].append([index, len(changes), size])
        self.records["changes"] += [list(change) for change in changes]

    def description(self) -> bytes:
        counts = {"version": 1, "strings": len(self.strings), "reserved": 0,
                  **{name: len(self.records[name]) for name in HEAD[2:-1]}, **self.head}
        parts = [struct.pack("<8I", *(counts[name] for name in HEAD))]
        parts += [struct.pack("<I", len(string)) for string in self.strings]
        parts += self.strings
        parts += [struct.pack(form, *record) for name, form in RECORDS.items() for record in self.records[name]]
        parts.append(b"\xff" * 4)
        for (_, _, _, offset, length), pages in zip(self.records["memories"], self.images, strict=False):
            parts.append(image_digest(offset, length, pages))
        return b"".join(parts) + self.end

    def content(self) -> tuple[int, int, dict[int, bytes]]:
        """The size of the description and of the content, and the pages of the content that are not zero."""
        description = self.description()
        pages = {at // PAGE: description[at:at + PAGE].ljust(PAGE, b"\0") for at in range(0, len(description), PAGE)}
        groups = -(-len(description) // GROUP)
        for (_, _, _, offset, length), own in zip(self.records["memories"], self.images, strict=False):
            first, last = span(offset, length)
            pages |= {number + (groups - first) * 16: page for number, page in own.items()}
            groups += min(last - first, 64)
        for at, byte in self.patch.items():
            page = bytearray(pages.get(at // PAGE, bytes(PAGE)))
            page[at % PAGE] = byte
            pages[at // PAGE] = bytes(page)
        # After damage, a page of an image may have no place in the content.
        return len(description), groups * GROUP, {number: page for number, page in pages.items()
                                                  if any(page) and 0 <= number < groups * 16}

    def whole(self) -> bytes:
        length, size, pages = self.content()
        masks: dict[int, int] = {}
        for number in pages:
            masks[number // 16] = masks.get(number // 16, 0) | 1 << number % 16
        table = b"".join(
            struct.pack("<QHHI", group, mask, mask, zlib.crc32(b"".join(
                pages[group * 16 + k] for k in range(16) if mask >> k & 1))) for group, mask in sorted(masks.items()))
        if self.layout == 1:
            start, data = GROUP, bytearray(size)
            for number, page in pages.items():
                data[number * PAGE:(number + 1) * PAGE] = page
        else:
            start, data = 224, bytearray().join(page for _, page in sorted(pages.items()))
        field = {"magic": b"\x89LINMEM\n", "version": 2, "kind": 3, "header_size": 224, "group_size": GROUP,
                 "page_size": PAGE, "size": size, "offset": 0, "base_size": length, "data_offset": start,
                 "data_size": len(data), "table_offset": start + len(data), "count": len(masks), "layout": self.layout,
                 "reserved": 0, "target_offset": 0, "base_digest": b"\xab" * 32, "table_digest": blake(table),
                 **self.field}
        content = b"".join(pages.get(number, bytes(PAGE)) for number in range(-(-length // PAGE)))[:length]
        field.setdefault("digest", blake(field["base_digest"] + content))
        head = struct.pack(FORMAT, *(field[name] for name in NAMES))
        return (head + blake(head)).ljust(start, b"\0") + data + table


def of_choices(c: Choices) -> Draft:
    draft = Draft()
    draft.layout = c.pick((1, 2))
    draft.strings = list(dict.fromkeys(
        c.pick((b"", b"memory", "f\u00fc".encode(), b"f" * 5000)) for _ in range(c.below(4))))
    strings = len(draft.strings)

    def reference():
        kind = c.below(3) if strings else c.pick((0, 2))
        return [kind, (0, c.below(strings or 1) + 1, c.word() & 0xFFFFFFFF)[kind], c.byte() if kind == 2 else 0]

    index = 0
    for _ in range(c.below(4)):
        size = c.pick((0, 1, 4095, 65536, 3 * GROUP, 3 * GROUP + 5, 1 << 40))
        offset = c.pick((0, 0, 1, 4096, 65535, GROUP + 4097, (1 << 40) - 5))
        offset = min(offset, size)
        length = min(size - offset, c.pick((0, 1, 4096, 65536, 3 * GROUP)))
        pages = {}
        for _ in range(c.below(4) if length else 0):
            at = offset + c.unsigned(3) % length
            page = bytearray(pages.get(at // PAGE, bytes(PAGE)))
            page[at % PAGE] = c.byte() or 1
            pages[at // PAGE] = bytes(page)
        last = -(-size // PAGE)
        runs = [(PAGE * at, PAGE) for at in sorted({c.below(last) for _ in range(c.below(4))})] if last else []
        index += c.below(3)
        draft.memory(index, size, offset, length, pages, runs)
        index += 1
    index = 0
    for _ in range(c.below(5)):
        index += c.below(300)
        kind = c.below(7)
        value = c.bytes(SIZES[kind]) if kind < 5 else struct.pack("<3I", *reference()) if kind == 5 else b""
        draft.global_(index, kind, value)
        index += 1
    for index in range(c.below(3)):
        size = c.pick((0, 1, 10, 7000, 1 << 33))
        elements = sorted({c.unsigned(5) % size for _ in range(c.below(5))}) if size else []
        draft.table(index, size, [[element, *reference()] for element in elements])
    kinds = [kind for kind, part in enumerate(("memories", "globals", "tables")) if draft.records[part]]
    for _ in range(c.below(4) if strings and kinds else 0):
        kind = c.pick(kinds)
        index = c.pick(draft.records[("memories", "globals", "tables")[kind]])[0]
        draft.records["names"].append([kind, index, c.below(strings) + 1])
    draft.records["unseen"] = [[number] for number in sorted({
        c.below(strings) + 1 for _ in range(c.below(3) if strings else 0)})]
    return draft


def damage(draft: Draft, c: Choices) -> None:
    what = c.below(7)
    records = [record for part in draft.records.values() for record in part]
    if what == 0:
        name = c.pick([name for name in NAMES if name not in ("magic", "table_digest")])
        if name.endswith("digest"):
            draft.field[name] = c.bytes(32).ljust(32, b"\1")
        else:
            size = 2 if name in ("version", "kind") else 4 if name.endswith("_size") and name[0] in "hgp" else 8
            draft.field[name] = c.number() & ((1 << 8 * (4 if name in ("layout", "reserved") else size)) - 1)
    elif what == 1:
        draft.head[c.pick(HEAD)] = c.number() & 0xFFFFFFFF
    elif what == 2 and records:
        record = c.pick(records)
        i = c.below(len(record))
        if isinstance(record[i], bytes):
            record[i] = c.bytes(16)
        else:
            # All fields of 4 bytes lose the upper half of the number in struct.pack's place.
            wide = len(record) == 2 or (len(record) in (3, 5) and i >= 2) or (len(record) == 4 and i == 0)
            wide = wide and not (len(record) == 3 and record in draft.records["names"])
            number = c.number() if c.flag() else record[i] + c.pick((1, -1, PAGE, -PAGE))
            record[i] = number & (0xFFFFFFFFFFFFFFFF if wide else 0xFFFFFFFF)
    elif what == 3:
        draft.patch[c.unsigned(3) % (2 * GROUP)] = c.byte()
    elif what == 4 and records:
        part = c.pick([part for part in draft.records.values() if part])
        (part.append(list(c.pick(part))) if c.flag() else part.pop(c.below(len(part))))
    elif what == 5:
        draft.end = c.bytes(c.pick((1, 32, 64)))
    elif what == 6 and draft.strings:
        draft.strings.append(c.pick(draft.strings))


class Parts:
    def __init__(self, raw: bytes) -> None:
        self.raw, self.at = raw, 0

    def take(self, size: int) -> bytes:
        need(self.at + size <= len(self.raw))
        self.at += size
        return self.raw[self.at - size:self.at]

    def records(self, name: str, count: int) -> list[tuple]:
        form = struct.Struct(RECORDS[name])
        return list(form.iter_unpack(self.take(count * form.size)))


def state_in(raw: bytes):
    """Returns (state as plain tuples, images) of a file, or raises Wrong, by docs/reference/file-format.md alone."""
    f, pages, _ = judge(raw)
    need(f["kind"] == 3)
    length = f["base_size"]
    count = -(-length // PAGE)
    need(all(number in pages for number in range(count)))
    content = b"".join(pages[number] for number in range(count))
    need(not any(content[length:]) and not any(number in pages for number in range(count, -(-count // 16) * 16)))
    need(f["digest"] == blake(f["base_digest"] + content[:length]))
    parts = Parts(content[:length])
    version, n_strings, *counts, zero = struct.unpack("<8I", parts.take(32))
    need(version == 1 and zero == 0 and counts[0] <= 100)
    lengths = struct.unpack(f"<{n_strings}I", parts.take(4 * n_strings))
    try:
        strings = [parts.take(n).decode() for n in lengths]
    except UnicodeDecodeError:
        raise Wrong from None
    need(len(set(strings)) == n_strings)

    def string(number: int) -> str:
        need(0 < number <= len(strings))
        return strings[number - 1]

    def reference(kind: int, second: int, third: int):
        need(kind < 3)
        if kind == 2:
            return "element", "", second, third
        need(third == 0 and (kind or second == 0))
        return ("export", string(second), 0, 0) if kind else ("null", "", 0, 0)

    def ascend(numbers):
        need(sorted(set(numbers)) == list(numbers))

    records = parts.records("memories", counts[0])
    ascend([record[0] for record in records])
    memories, sets, places, at = [], [], [], -(-length // GROUP)
    for index, n_runs, size, offset, n in records:
        need(size <= 1 << 56 and offset + n <= size)
        runs, end = parts.records("runs", n_runs), 0
        for start, run in runs:
            need(start % PAGE == run % PAGE == 0 and run and start >= end and start + run <= -(-size // PAGE) * PAGE)
            end = start + run
        memories.append((index, size))
        sets.append(tuple(runs))
        first, last = span(offset, n)
        places.append((offset, n, first, at))
        at += last - first
    need(f["size"] == at * GROUP)
    globals_ = []
    records = parts.records("globals", counts[1])
    ascend([record[0] for record in records])
    for index, kind, value in records:
        need(kind < 7)
        if kind < 5:
            need(not any(value[SIZES[kind]:]))
            found = value[:SIZES[kind]]
        else:
            need(not any(value[12:]))
            found = reference(*struct.unpack("<3I", value[:12]))
            need(kind == 5 or found[0] == "null")
        globals_.append((index, GLOBAL_KINDS[kind], found))
    records = parts.records("tables", counts[2])
    ascend([record[0] for record in records])
    tables = []
    for index, n_changes, size in records:
        changes = parts.records("changes", n_changes)
        ascend([change[0] for change in changes])
        need(all(change[0] < size for change in changes))
        tables.append((index, size, tuple((element, reference(*rest)) for element, *rest in changes)))
    held = [{index for index, *_ in part} for part in (memories, globals_, tables)]
    names = []
    for kind, index, number in parts.records("names", counts[3]):
        need(kind < 3 and index in held[kind])
        names.append((NAME_KINDS[kind], index, string(number)))
    numbers = [number for number, in parts.records("unseen", counts[4])]
    ascend(numbers)
    unseen = tuple(map(string, numbers))
    need(parts.take(4) == b"\xff" * 4)
    images = []
    for i, (offset, n, first, begin) in enumerate(places):
        last = begin + span(offset, n)[1] - first
        own = {number - (begin - first) * 16: page for number, page in pages.items() if begin <= number // 16 < last}
        for number, page in own.items():
            low = max(offset - number * PAGE, 0)
            high = min(offset + n - number * PAGE, PAGE)
            need(low < PAGE and high > 0 and not any(page[:low]) and not any(page[high:]))
        need(parts.take(32) == image_digest(offset, n, own))
        images.append((offset, n, own))
        assert i < 100
    need(parts.at == length)
    return (f["base_digest"].hex(), memories, globals_, tables, tuple(sets) if any(sets) else (), unseen,
            tuple(names)), images


def plain(state):
    """The same form of what linmem read."""
    return (state.module, [(memory.index, memory.size) for memory in state.memories],
            [(each.index, each.kind, each.value if isinstance(each.value, bytes) else tuple(each.value))
             for each in state.globals],
            [(table.index, table.size, tuple((element, tuple(to)) for element, to in table.changed))
             for table in state.tables], state.working_set, state.unseen, state.names)


def check(path: str, truth, size: int, again: bool) -> None:
    for verify in (True, False):
        for mapped in (True, False):
            state = opened(open_state, path, verify, map=mapped, size=size)
            if state is False:
                continue
            assert truth is None or state is not None, f"refused {verify=} {mapped=}"
            if verify:
                assert (state is None) == (truth is None), f"{verify=} {mapped=}"
            if state is None:
                continue
            for memory in state.memories:
                if memory.image.size < LARGE:
                    assert memory.image == linmem.Image.from_bytes(bytes(memory.image), memory.image.offset)
            if truth is None:
                continue
            assert plain(state) == truth[0]
            for memory, (offset, n, pages) in zip(state.memories, truth[1], strict=True):
                assert (memory.image.offset, memory.image.size) == (offset, n)
                assert memory.image.digest == image_digest(offset, n, pages).hex()
            assert state_of(*parts_of(state)) == pickle.loads(pickle.dumps(state)) == state
            if again:
                save_state(state, path + "2", packed=mapped)
                assert open_state(path + "2", True) == state
                with open(path + "2", "rb") as file:
                    assert state_in(file.read())[0] == truth[0]


def one(data: bytes) -> None:
    c = Choices(data)
    draft = of_choices(c)
    again = c.byte() > 240          # rarely, because a save waits for the disk
    for _ in range(c.below(3)):
        damage(draft, c)
    raw = draft.whole()
    if c.byte() >= 224:
        harm = bytearray(raw)
        harm[c.unsigned(3) % len(raw)] = c.byte()
        raw = bytes(harm)
    cut = c.byte()
    if cut >= 240:
        raw = raw[:len(raw) * (cut - 240) // 15] if cut < 255 else raw + b"\0"
    try:
        truth = state_in(raw)
    except Wrong:
        truth = None
    with file_of(raw) as path:
        check(path, truth, len(raw), again)
        assert opened(linmem.Image.open, path, size=len(raw)) is None or draft.field.get("kind") == 1
        assert opened(linmem.Delta.open, path, size=len(raw)) is None or draft.field.get("kind") == 2
