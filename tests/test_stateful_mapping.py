"""Random histories of a memory that shows pages of other sources, against a model of its pages."""

import os
import tempfile

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from support import PAGE, file_requires

import linmem
from linmem import Image

file_requires("real_pages", "maps_images", "shared", "file_memories")

ROOM = 8                                # pages of the memory at first, and of each source
INDEX = st.integers(0, ROOM)
OFFSET = st.integers(0, ROOM * PAGE - 1)
DATA = st.sampled_from([b"\1", b"xyz", b"w" * PAGE, b"v" * (PAGE + 1)])
IMAGE = Image.from_bytes(b"".join(bytes([65 + n]) * PAGE for n in range(ROOM)))
START = Image.from_bytes(b"start" * PAGE, offset=PAGE)


class Page:
    """A page of the memory. source: the bytes whose page it shows; None: it has bytes of its own."""

    def __init__(self, content=bytes(PAGE), *, is_window=False, source=None, index=0, through=False):
        self.content, self.is_window = bytearray(content), is_window
        self.source, self.index, self.through = source, index, through

    def read(self):
        return bytes(self.content if self.source is None else self.source[self.index * PAGE:][:PAGE])

    def copy(self):
        """The first write to a page that is copied on write."""
        if not self.through:
            self.content, self.source = bytearray(self.read()), None

    def write(self, offset, data):
        self.copy()
        content, start = (self.content, 0) if self.source is None else (self.source, self.index * PAGE)
        content[start + offset:start + offset + len(data)] = data


class Windows(RuleBasedStateMachine):
    @initialize(starts=st.booleans(), pooled=st.booleans(), prefault=st.booleans())
    def create(self, starts, pooled, prefault):
        self.creator = linmem.PoolingCreator(check=True) if pooled else linmem.MmapCreator(prefault=prefault)
        self.image = START if starts else None
        self.shared = linmem.create(ROOM * PAGE, creator=linmem.creator("shared"))
        self.file = tempfile.NamedTemporaryFile(buffering=0)    # noqa: SIM115 - teardown() closes it
        self.file.write(b"f" * ROOM * PAGE)
        self.bytes_of = {"image": bytes(IMAGE), "shared": bytearray(ROOM * PAGE), "file": bytearray(b"f" * ROOM * PAGE)}
        self.kept = []
        self.make()

    def make(self):
        size, maximum = ROOM * PAGE, 2 * ROOM * PAGE
        if self.image is None:
            self.mem, content = linmem.create(size, maximum, creator=self.creator), bytes(size)
        else:
            self.mem = self.image.new_memory(maximum, minimum=size, creator=self.creator)
            content = (bytes(PAGE) + bytes(START)).ljust(size, b"\0")
        self.view = self.mem.view()
        self.model = [Page(content[start:start + PAGE]) for start in range(0, size, PAGE)]
        self.read_only = set()          # page numbers

    def content(self):
        return b"".join(page.read() for page in self.model)

    def span(self, first, n):
        """The numbers of the pages of a range, within the memory."""
        return range(min(first, len(self.model)), min(first + n, len(self.model)))

    def set_access(self, pages, access):
        self.read_only = self.read_only | set(pages) if access == "r" else self.read_only - set(pages)

    @rule(kind=st.sampled_from(["image", "shared", "rb", "r+b"]), first=INDEX, start=INDEX, n=INDEX,
          access=st.sampled_from(["rw", "rw", "r"]))
    def map(self, kind, first, start, n, access):
        n = min(n, ROOM - start)
        span = self.span(first, n)
        where = first * PAGE, IMAGE if kind == "image" else self.shared, start * PAGE, n * PAGE, access
        name = kind if kind in self.bytes_of else "file"
        if name == "file":
            with open(self.file.name, kind) as file:
                self.call_map(len(span) < n, where[0], file, *where[2:])
        else:
            self.call_map(len(span) < n, *where)
        if len(span) < n:
            return
        for number in span:
            self.model[number] = Page(is_window=True, source=self.bytes_of[name], index=start + number - first,
                                      through=kind in ("shared", "r+b"))
        self.set_access(span, access)

    def call_map(self, is_outside, *arguments):
        if is_outside:
            with pytest.raises(ValueError, match="byte_size"):
                self.mem.map(*arguments)
        else:
            self.mem.map(*arguments)

    @rule(first=INDEX, n=INDEX)
    def unmap(self, first, n):
        span = self.span(first, n)
        self.mem.unmap(span.start * PAGE, len(span) * PAGE)
        for number in span:
            if self.model[number].is_window:
                self.model[number] = Page()
                self.read_only.discard(number)

    @rule(offset=OFFSET, data=DATA)
    def write(self, offset, data):
        data = data[:len(self.model) * PAGE - offset]
        touched = range(offset // PAGE, (offset + len(data) - 1) // PAGE + 1)
        if not self.read_only.isdisjoint(touched):
            with pytest.raises(ValueError, match="has the access 'r'"):
                self.mem.write(offset, data)
            return
        self.mem.write(offset, data)
        self.write_model(offset, data)

    def write_model(self, offset, data):
        while data:
            part = data[:PAGE - offset % PAGE]
            self.model[offset // PAGE].write(offset % PAGE, part)
            offset, data = offset + len(part), data[len(part):]

    @rule(offset=OFFSET, data=DATA, which=st.sampled_from(["shared", "file"]))
    def write_to_a_source(self, offset, data, which):
        data = data[:ROOM * PAGE - offset]
        if which == "shared":
            self.shared.write(offset, data)
        else:
            os.pwrite(self.file.fileno(), data, offset)
        self.bytes_of[which][offset:offset + len(data)] = data

    @rule(first=INDEX, n=INDEX)
    def discard_in_the_shared_memory(self, first, n):
        n = min(n, ROOM - first)
        self.shared.discard(first * PAGE, n * PAGE)
        self.bytes_of["shared"][first * PAGE:(first + n) * PAGE] = bytes(n * PAGE)

    @rule(first=INDEX, n=INDEX, cut=st.sampled_from([0, 0, 5]))
    def discard(self, first, n, cut):
        span = self.span(first, n)
        offset, size = span.start * PAGE, len(span) * PAGE
        if size:
            offset, size = offset + cut, size - 2 * cut
        if not self.read_only.isdisjoint(span):
            if cut or any(self.model[number].is_window for number in span):
                with pytest.raises((ValueError, TypeError), match="protected pages"):
                    self.mem.discard(offset, size)
            return
        self.mem.discard(offset, size)
        for number in span:
            page, start = self.model[number], max(offset - number * PAGE, 0)
            end = min(offset + size - number * PAGE, PAGE)
            if end - start == PAGE and not page.through:
                page.content, page.source = bytearray(PAGE), None
            else:
                page.write(start, bytes(end - start))

    @rule(first=INDEX, n=INDEX, access=st.sampled_from(["r", "rw"]))
    def protect(self, first, n, access):
        span = self.span(first, n)
        self.mem.protect(span.start * PAGE, len(span) * PAGE, access)
        self.set_access(span, access)

    @rule(first=INDEX, n=INDEX)
    def prefault(self, first, n):
        span = self.span(first, n)
        if self.read_only.isdisjoint(span):
            self.mem.prefault(span.start * PAGE, len(span) * PAGE)
            for number in span:
                self.model[number].copy()

    @precondition(lambda self: len(self.model) < 2 * ROOM)
    @rule(n=st.integers(1, 3))
    def grow(self, n):
        n = min(n, 2 * ROOM - len(self.model))
        self.mem.grow_to((len(self.model) + n) * PAGE)
        self.model += [Page() for _ in range(n)]

    @precondition(lambda self: len(self.kept) < 3)
    @rule()
    def snapshot(self):
        self.kept.append((self.mem.snapshot(), self.content()))

    @precondition(lambda self: self.kept)
    @rule(which=st.integers(0, 2))
    def restore(self, which):
        img, content = self.kept[which % len(self.kept)]
        if self.read_only:
            with pytest.raises(TypeError, match="with protected pages"):
                self.mem.restore(img, zero_grown=True)
        elif len(content) > len(self.model) * PAGE:
            with pytest.raises(ValueError, match="grow it before"):
                self.mem.restore(img, zero_grown=True)
        else:
            self.mem.restore(img, zero_grown=True)
            content = content.ljust(len(self.model) * PAGE, b"\0")
            for number, page in enumerate(self.model):
                wanted = content[number * PAGE:(number + 1) * PAGE]
                if page.read() != wanted:
                    page.write(0, wanted)

    @precondition(lambda self: self.kept)
    @rule(which=st.integers(0, 2))
    def differences(self, which):
        img, content = self.kept[which % len(self.kept)]
        differ = [page.read() != content[number * PAGE:(number + 1) * PAGE].ljust(PAGE, b"\0")
                  for number, page in enumerate(self.model)]
        found = [False] * len(self.model)
        for offset, size in self.mem.dirty_pages(img):
            found[offset // PAGE:(offset + size) // PAGE] = [True] * (size // PAGE)
        assert found == differ

    @rule()
    def next_tenant(self):
        self.end_of_memory()
        self.make()

    def end_of_memory(self):
        self.view.release()
        self.mem.close()

    # Not an invariant, because the pages that a check reads are resident afterwards.
    @rule()
    def check_all_bytes(self):
        content = self.content()
        assert bytes(self.mem) == content
        assert self.view.tobytes() == content[:self.view.nbytes]
        assert bytes(self.shared) == self.bytes_of["shared"]
        assert os.pread(self.file.fileno(), 2 * ROOM * PAGE, 0) == self.bytes_of["file"]
        assert bytes(IMAGE) == self.bytes_of["image"]

    def teardown(self):
        if hasattr(self, "mem"):
            self.check_all_bytes()
            self.end_of_memory()
            self.shared.close()
            self.file.close()


TestWindows = Windows.TestCase
