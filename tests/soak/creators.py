"""The creators of a soak. Two of them are written in Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import linmem
from soak.checks import FLOOR, PAGE


class Borrowed(linmem.LinearMemory):
    """A memory that is written in Python, over the bytes of another memory."""

    def __init__(self, size: int, capacity: int) -> None:
        self.bytes = linmem.create(capacity, capacity, reserve=capacity)
        self.size, self.capacity = size, capacity

    def byte_size(self) -> int:
        return self.size

    def byte_capacity(self) -> int:
        return self.capacity

    def grow_to(self, new_size: int) -> None:
        if new_size > self.capacity:
            raise linmem.GrowError(f"no more than {self.capacity}")
        self.size = new_size

    def as_ptr(self) -> int:
        return self.bytes.as_ptr()


class Borrowing(linmem.MemoryCreator):
    def new_memory(self, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes):
        return Borrowed(minimum, max(minimum, reserved_size_in_bytes or 0, PAGE))


class Passing(linmem.MemoryCreator):
    """A creator that is written in Python and returns the memories of a native creator."""

    def __init__(self) -> None:
        self.upstream = linmem.MmapCreator()

    def new_memory(self, *asked):
        return self.upstream.new_memory(*asked)


@dataclass(frozen=True)
class Maker:
    """A creator, and the properties that its memories must have."""

    name: str
    creator: linmem.MemoryCreator
    bounded: bool = False       # the creator may refuse, with LimitError or PoolError
    ours: bool = True           # linmem owns the pages
    start: bytes = b""          # the first bytes of a new memory
    shared: bool = False        # forked children have the same bytes, and the memory does not move


def makers(image: linmem.Image, content: bytes) -> Iterator[Maker]:
    pool, over = linmem.PoolingCreator, linmem.MmapCreator
    yield Maker("mmap", over())
    yield Maker("mmap, prefault", over(prefault=True))
    yield Maker("mmap, huge pages", over(huge_pages=True))
    yield Maker("pool", pool())
    yield Maker("pool, check", pool(check=True, max_unused_warm=2))
    for reset in ("scan", "zero", "discard"):
        if reset != "scan" or FLOOR["capabilities"]["scans"]:
            yield Maker(f"pool, {reset}", pool(reset=reset, max_unused_warm=3, keep_resident=24 * PAGE))
    yield Maker("pool, full", pool(slots=3, when_full="error"), bounded=True)
    yield Maker("pool, all cold", pool(max_unused_warm=0))
    yield Maker("pool of an image", pool(image=image), start=content)
    yield Maker("pool of a pool", pool(pool(max_unused_warm=1), max_unused_warm=1))
    yield Maker("limit", linmem.LimitingCreator(over(), 48 * PAGE), bounded=True)
    yield Maker("limit of a pool", linmem.LimitingCreator(pool(), 96 * PAGE), bounded=True)
    yield Maker("statistics", linmem.StatisticsCreator(pool(linmem.LimitingCreator(over(), 1 << 40)), history=8))
    yield Maker("tracking", linmem.TrackingCreator(pool(linmem.TrackingCreator(over()))))
    if FLOOR["capabilities"]["shares"]:
        yield Maker("shared", linmem.SharedCreator(), shared=True)
        yield Maker("limit of shared", linmem.LimitingCreator(linmem.SharedCreator(), 96 * PAGE), bounded=True,
                    shared=True)
        yield Maker("pool of shared", pool(linmem.SharedCreator()), shared=True)
    yield Maker("python, native", linmem.PythonCreator(Passing()))
    yield Maker("python", linmem.PythonCreator(Borrowing()), ours=False)
    yield Maker("pool of python", pool(linmem.PythonCreator(Borrowing())), ours=False)


def chain(creator: object) -> Iterator[object]:
    """A creator, its upstream, the upstream of that, and so on."""
    while creator is not None:
        yield creator
        creator = getattr(creator, "upstream", None)
