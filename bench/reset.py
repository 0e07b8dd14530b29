"""The suite "reset": the cost to reuse a memory, beside the costs of a new memory and of simpler resets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import linmem
from linmem._os import pages as _pages
from linmem.bench import _loops
from linmem.bench.core import make_raw_create
from linmem.bench.engines import GIB, KIB, pool
from linmem.bench.harness import P10, SPEED, Contender, Goal, Group, Result, Row, Run, clock, together

ROUNDS = 25
RUN_NS, QUICK_RUN_NS = 4_000_000, 200_000
STEP = 64 * KIB
SPACE = 4 * GIB
SEED = 20_240_229
USES, QUICK_USES = 512, 64
PERIOD = 16                 # uses in which every pattern shows its whole behaviour
LARGE = 4096                # pages; with more, a run has half as many uses, or one period if every page is zeroed
# The four pools keep the same number of bytes resident, so the comparison is between the ways of a reset.
KEEP = GIB
SIMPLE = ("discard", "zero")


def groups(quick: bool) -> list[Group]:
    """Groups of bare memories from Python, then a group for each pattern of touches in a C loop."""
    uses = QUICK_USES if quick else USES
    return [bare(False), bare(True)] + [in_c(case, uses) for case in CASES]


# -- bare memories, from Python -----------------------------------------------------------------------------

def bare(touched: bool) -> Group:
    page = _pages.describe()["page_size"]
    ones = b"\1" * len(range(0, STEP, page))
    return Group(
        "bare_touched" if touched else "bare",
        f"a bare 64 KiB memory from Python, {f'all {len(ones)} pages' if touched else 'not'} touched",
        (Contender("linmem", "linmem's pool", functools.partial(make_memories, pool, page, ones, touched)),
         Contender("mmap", "mmap.mmap", functools.partial(make_maps, page, ones, touched)),
         Contender("bytearray", "bytearray", functools.partial(make_arrays, lambda: bytearray, page, ones, touched)),
         Contender("numpy", "numpy.zeros", functools.partial(make_arrays, numpy_zeros, page, ones, touched)),
         Contender("plain", "linmem without a pool",
                   functools.partial(make_memories, linmem.MmapCreator, page, ones, touched)),
         *([] if touched else [Contender("c", "linmem's system calls from a C loop", make_raw_create)])),
        (Goal("mmap", 0.06 if touched else 0.2, by=P10), Goal("bytearray", None, by=P10),
         Goal("numpy", None, by=P10), Goal("plain", None, by=P10), *([] if touched else [Goal("c", None, by=P10)])),
        "make, touch through a memoryview if the row is for touched pages, close; bytearray and numpy have neither"
        " guards nor room to grow")


def make_memories(make_creator: Callable[[], object], page: int, ones: bytes, touched: bool) -> Run:
    create = linmem.create
    creator = make_creator()

    def run(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            create(STEP, SPACE, creator=creator).close()
        return clock() - began

    def run_touched(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            mem = create(STEP, SPACE, creator=creator)
            memoryview(mem)[::page] = ones
            mem.close()
        return clock() - began

    return run_touched if touched else run


def make_maps(page: int, ones: bytes, touched: bool) -> Run:
    import mmap

    create = mmap.mmap

    def run(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            create(-1, STEP).close()
        return clock() - began

    def run_touched(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            made = create(-1, STEP)
            memoryview(made)[::page] = ones
            made.close()
        return clock() - began

    return run_touched if touched else run


def numpy_zeros() -> Callable[[int], object]:
    import numpy as np

    return functools.partial(np.zeros, dtype=np.uint8)


def make_arrays(get: Callable[[], Callable[[int], object]], page: int, ones: bytes, touched: bool) -> Run:
    create = get()

    def run(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            create(STEP)
        return clock() - began

    def run_touched(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            memoryview(create(STEP))[::page] = ones
        return clock() - began

    return run_touched if touched else run


# -- patterns of touches, in C ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Case:
    """A pattern of uses of a memory of `total` pages. A use writes about `dirty` of them."""

    pattern: str
    dirty: int
    total: int
    discard: float | None = None        # times faster than reset="discard", at least


SIZES = ((4, 16), (16, 16), (64, 256), (16, 1024), (160, 16384))
AGAINST_DISCARD = {(16, 16): 6, (16, 1024): 3, (160, 16384): 1.9}
PATTERNS = {
    "same": "the same pages in every use",
    "redrawn": "other pages in every use",
    "alternating": "two sets of pages, taking turns",
    "bursty": f"the same pages, and in each {PERIOD}th use eight times as many, drawn anew",
    "80-20": "so many touches in every use, four of five of them to a fifth of the pages",
}
CASES = tuple(Case(pattern, dirty, total, AGAINST_DISCARD.get((dirty, total)) if pattern == "same" else None)
              for pattern in PATTERNS for dirty, total in SIZES)
NEVER_WORSE = 0.85


def in_c(case: Case, uses: int) -> Group:
    size = case.total * _pages.describe()["page_size"]
    large = case.total > LARGE
    n = uses // 2 if large else uses
    draws = functools.cache(lambda: draw(case, n))      # one sequence for all four pools

    def contender(reset: str, what: str, operations: int) -> Contender:
        def make() -> Run:
            creator = pool(reset=reset, keep_resident=KEEP)
            touches, ends = draws()
            return lambda n: _loops.use_memories(creator, size, touches, ends, n)

        return Contender(reset, what, make, operations=operations)

    return Group(
        f"{case.pattern}_{case.dirty}_of_{case.total}", f"{case.pattern}: {case.dirty} of {case.total} pages",
        (contender("adaptive", "adaptive", n), contender("scan", "always a scan", n),
         contender("discard", "discard everything", n), contender("zero", "zero everything", PERIOD if large else n)),
        (Goal("discard", case.discard, sense=SPEED, by=P10, drawn=case.discard is not None),
         Goal(SIMPLE, NEVER_WORSE, sense=SPEED, by=P10, called="better_simple", drawn=False)),
        PATTERNS[case.pattern], table="use + reset in a C loop, by the pool's way to reset")


def draw(case: Case, uses: int):
    """The offsets to touch, use after use, and the end of each use's touches; each run has the same offsets."""
    import numpy as np

    random = np.random.default_rng([SEED, case.dirty, case.total, list(PATTERNS).index(case.pattern)])

    def some(count: int):
        return random.choice(case.total, min(count, case.total), replace=False)

    fixed, other = some(case.dirty), some(case.dirty)
    hot = max(1, case.total // 5)
    drawn = []
    for use in range(uses):
        if case.pattern == "same":
            pages = fixed
        elif case.pattern == "redrawn":
            pages = some(case.dirty)
        elif case.pattern == "alternating":
            pages = other if use % 2 else fixed
        elif case.pattern == "bursty":
            pages = some(8 * case.dirty) if use % PERIOD == PERIOD - 1 else fixed
        else:
            often = round(case.dirty * 0.8)
            pages = np.concatenate([random.integers(0, hot, often),
                                    random.integers(hot, case.total, case.dirty - often)])
        drawn.append(pages)
    ends = np.cumsum([len(pages) for pages in drawn], dtype=np.uint64)
    return np.concatenate(drawn).astype(np.uint64) * np.uint64(_pages.describe()["page_size"]), ends


def conclude(results: list[Result]) -> list[Result]:
    """Add rows for the worst pattern and for the geometric mean."""
    cases = [result for result in results if result.group.table]
    rows = {row.key: row for result in cases for row in result.rows}
    against = [rows[f"{result.group.key}/discard"] for result in cases]
    mean = together("all/discard", "all patterns, geometric mean", against, "adaptive", "discard everything")
    better = [rows[f"{result.group.key}/better_simple"] for result in cases]
    worst = min((row for row in better if row.ratio_p10 is not None), key=lambda row: row.ratio_p10, default=None)
    if worst is None:
        last = Row("all/better_simple", "all patterns, the worst", "adaptive", "the better simple way", NEVER_WORSE,
                   sense=SPEED, by=P10, unavailable=better[0].unavailable)
    else:
        last = Row("all/better_simple", f"all patterns, the worst: {worst.operation}", "adaptive", worst.against,
                   NEVER_WORSE, sense=SPEED, by=P10, ratio_p10=worst.ratio_p10, ratio_median=worst.ratio_median,
                   ratio_quartiles=worst.ratio_quartiles, holds=worst.ratio_p10 >= NEVER_WORSE)
    return [*results, Result(Group("all", "all patterns", (), ()), [], [mean, last])]
