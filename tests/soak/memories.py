"""A memory of a soak, together with the bytes that it must have."""

from __future__ import annotations

from dataclasses import dataclass, field

import linmem
from soak.checks import PAGE, same
from soak.creators import Maker

# Minimum, maximum, reservation in host pages. The list is short, so that pools can use a slot again.
SHAPES = ((0, None, 0), (1, None, 0), (1, 8, 8), (2, 32, 32), (4, 40, 4), (7, None, 64), (12, 64, None),
          (1, 3, None))


@dataclass
class Held:
    mem: linmem.Memory
    model: bytearray
    maker: Maker
    views: list[memoryview] = field(default_factory=list)
    image: linmem.Image | None = None       # which the memory may be restored to
    frozen: bytes = b""                     # the bytes of that image

    def check(self) -> None:
        same(self.mem, self.model, f"a memory of {self.maker.name!r}")
        for view in self.views:
            same(view.cast("B"), self.model[:view.nbytes], f"a view of a memory of {self.maker.name!r}")


class Common:
    """One memory that all threads share. Each thread owns one page of it. Any thread may grow or close it."""

    def __init__(self, threads: int, reserve: int) -> None:
        self.mem = linmem.create(threads * PAGE, reserve=reserve, may_move=True)
        self.parts = [bytes(PAGE)] * threads
