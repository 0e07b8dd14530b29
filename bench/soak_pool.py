"""The suite "soak-pool": does a process become small again after bursts? The suite counts and does not time.

A pool with default options serves three bursts. After each burst it serves small traffic for twice its `idle_seconds`,
because a pool releases pages only when a memory comes back to it.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import linmem
from linmem._os import pages as _pages
from linmem.bench.engines import GIB, KIB, MIB, pool
from linmem.bench.harness import Group, Row, Unavailable, exact

BURST, QUICK_BURST = 16 * GIB // 10, 64 * MIB
IDLE, QUICK_IDLE = 5.0, 0.5             # the pool's idle_seconds
SMALL, SPACE = 64 * KIB, 64 * MIB       # size and maximum of a memory of the small traffic, which writes one page of it
RATE = 100                              # memories of the small traffic in a second
GOAL, SPARE = 1.1, 2 * MIB


@dataclass(frozen=True)
class Case:
    key: str
    what: str
    size: int                           # of each memory when it is written to; all memories exist at the same time
    minimum: int                        # size of each memory when it is made
    maximum: int


CASES = (
    Case("large", "memories of 16 MiB", 16 * MIB, 16 * MIB, 16 * MIB),
    Case("grown", "memories as the small traffic's, grown to 16 MiB", 16 * MIB, SMALL, SPACE),
    Case("many", "memories of 1 MiB", MIB, MIB, MIB),
)


def groups(quick: bool) -> list[Group]:
    server = functools.cache(lambda: Server(QUICK_IDLE if quick else IDLE))
    return [group(case, QUICK_BURST if quick else BURST, server) for case in CASES]


def group(case: Case, burst: int, server) -> Group:
    count = -(-burst // case.size)
    what = f"{burst / GIB:.2g} GiB: {count} {case.what}"

    def measured() -> list[Row]:
        before = at_once = later = why = None
        try:
            before, at_once, later = server().serve(case, count)
        except Unavailable as error:
            why = str(error)
        return [exact(f"{case.key}/before", f"{what}; 2 x idle_seconds later, less 2 MiB", "resident",
                      "before all bursts", before and (later - SPARE) / before, GOAL, unavailable=why),
                exact(f"{case.key}/at_once/before", f"{what}; right after it", "resident", "before all bursts",
                      before and at_once / before, unavailable=why)]

    return Group(case.key, what, (), (), "the process's resident bytes after a burst, over its resident bytes before",
                 count=measured)


class Server:
    """A pool, and the small traffic on it."""

    def __init__(self, idle: float) -> None:
        self.pool = pool(idle_seconds=idle)
        self.idle = idle
        self.page = _pages.describe()["page_size"]
        self.traffic(idle)
        self.before = resident()

    def serve(self, case: Case, count: int) -> tuple[int, int, int]:
        """Serve a burst. Returns the resident bytes before all bursts, right after this one, and later."""
        ones = b"\1" * (case.size // self.page)
        live = []
        for _ in range(count):
            mem = linmem.create(case.minimum, case.maximum, creator=self.pool)
            mem.grow_to(case.size)
            memoryview(mem)[::self.page] = ones
            live.append(mem)
        while live:
            live.pop().close()
        at_once = resident()
        self.traffic(2 * self.idle)
        return self.before, at_once, resident()

    def traffic(self, seconds: float) -> None:
        for _ in range(round(seconds * RATE)):
            with linmem.create(SMALL, SPACE, creator=self.pool) as mem:
                mem[0] = 1
            time.sleep(1 / RATE)


def resident() -> int:
    """The resident bytes of this process, from the only exact figure of the system."""
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("Rss:")) * KIB
    except OSError as error:
        raise Unavailable(f"the system does not report the resident bytes: {error}") from error
