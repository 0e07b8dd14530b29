"""The steps of a soak that use memories whose pages are those of a file, and windows that show such pages."""

from __future__ import annotations

import os

import linmem
from soak.checks import PAGE, PATIENCE, Wrong, must, same

MOST = 64 * PAGE        # bytes of a memory


class FileSteps:
    """Steps of a `Worker`."""

    # Capabilities. A window of a shared memory needs one that is a file.
    NEEDS = {"attach": "shares", "open_file": "adopts_files", "show": "adopts_files"}

    def attach(self) -> None:
        """Each of two handles of a shared memory finds what the other one has written, and how far it has grown."""
        rng, model = self.rng, bytearray(self.rng.randrange(8 * PAGE))
        with (linmem.create(len(model), MOST, creator=linmem.SharedCreator()) as first,
              linmem.attach(first.handle()) as second):
            for _ in range(rng.randrange(1, 6)):
                writer, reader = rng.sample((first, second), 2)
                self.grow_and_write(writer, model)
                self.insist(lambda reader=reader: same(reader, model, "a shared memory that another handle wrote"))

    def open_file(self) -> None:
        """A file that is opened again has the bytes that its memory had."""
        rng, path = self.rng, self.soak.path(self, "memory")
        with self.open_when_unlocked(path) as mem:
            same(mem, self.filed, "a memory of a file that was opened again")
            self.grow_and_write(mem, self.filed)
            if rng.random() < 0.2:
                mem.flush()
            same(mem, self.filed, "a memory of a file")
        with open(path, "rb") as file:
            must(file.read() == self.filed, "a file has other bytes than its memory had")
        if len(self.filed) == MOST:
            os.unlink(path)
            self.filed.clear()

    def open_when_unlocked(self, path: str) -> linmem.Memory:
        for _ in range(PATIENCE):
            try:
                return linmem.open_file(path, maximum=MOST)
            except BlockingIOError:
                # Pages whose release was made to fail keep the lock. The next release of any memory releases them.
                linmem.create(PAGE).close()
        raise Wrong("a file is locked although no memory has it")

    def grow_and_write(self, mem: linmem.Memory, model: bytearray) -> None:
        rng = self.rng
        model.extend(bytes(min(rng.randrange(4 * PAGE), MOST - len(model))))
        self.insist(lambda: mem.grow_to(len(model)))
        data = rng.randbytes(rng.randrange(min(len(model), 5000) + 1))
        at = rng.randrange(len(model) - len(data) + 1)
        mem.write(at, data)
        model[at:at + len(data)] = data

    def show(self) -> None:
        """A window shows the pages of a shared memory, which has what is written to the window, or of an image."""
        rng = self.rng
        pages = rng.randrange(1, 8)
        source_at, at = rng.randrange(pages) * PAGE, rng.randrange(8) * PAGE
        size = pages * PAGE - source_at
        with (linmem.create(pages * PAGE, creator=linmem.SharedCreator()) as source,
              linmem.create(16 * PAGE, may_move=False) as mem):
            before, data = rng.randbytes(pages * PAGE), rng.randbytes(size)
            source.write(0, before)
            mem.map(at, source, source_at)
            same(mem, bytes(at) + before[source_at:] + bytes(16 * PAGE - at - size), "a memory with a window")
            mem.write(at, data)
            same(source, before[:source_at] + data, "a shared memory that was written through a window")
            if rng.random() < 0.5:
                mem.map(at, source.snapshot(), source_at)
                mem.write(at, bytes(size))
                same(source, before[:source_at] + data, "a shared memory of whose image a window was written")
                source.write(0, before)
            mem.unmap(at, size)
            same(mem, bytes(16 * PAGE), "a memory whose window was unmapped")
