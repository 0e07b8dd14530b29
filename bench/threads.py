"""The suite "threads": the speed of two threads, beside the speed of one thread."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import replace

import linmem
from linmem._os import pages as _pages
from linmem.bench import _loops, engines, wasm
from linmem.bench.engines import DEFAULT, KIB, LINMEM_POOL, Engines, Setting, pool
from linmem.bench.harness import P10, SPEED, Contender, Goal, Group, Result, Row, Run, Shared, clock, preemptions

ROUNDS = 25
RUN_NS, QUICK_RUN_NS = 8_000_000, 1_500_000
STEP = 64 * KIB
SPACE = 4 * engines.GIB
OVERLAP = 0.85              # the share of a run in which both threads work; a run with a smaller share is repeated
CONTROL = 1.8               # the speed-up of independent work that the machine must reach, else there is no verdict
SCALING = 1.8

Loop = Callable[[int], object]
"""Do n operations in C without the GIL."""


def groups(quick: bool) -> list[Group]:
    page = _pages.describe()["page_size"]
    return [
        scaling("control", "fill 64 KiB that are the thread's own", lambda: lambda n: _loops.fill(STEP, n)),
        scaling("raw", "reserve 4 GiB, commit 64 KiB, release: system calls", raw_loop),
        scaling("plain", "make, touch 16 pages, close: linmem without a pool",
                functools.partial(touching_loop, linmem.MmapCreator, page)),
        scaling("pool", "make, touch 16 pages, close: one pool", functools.partial(touching_loop, pool, page), SCALING),
        instances(LINMEM_POOL), instances(DEFAULT),
    ]


def raw_loop() -> Loop:
    with linmem.create(STEP, SPACE) as mem:
        info = mem.info()
    return lambda n: _loops.create_close(info.reserved, info.pre_guard, info.committed, n)


def touching_loop(make_creator: Callable[[], object], page: int) -> Loop:
    import numpy as np

    creator = make_creator()
    touches = np.arange(16, dtype=np.uint64) * np.uint64(page)
    ends = np.array([16], np.uint64)
    return lambda n: _loops.use_memories(creator, 16 * page, touches, ends, n)


def instances(setting: Setting) -> Group:
    touch = next(module for module in wasm.MODULES if module.key == "touch")
    return scaling(f"wasm_{setting.key}", f"instantiate {touch.key}, drop: {setting.what}",
                   engines.native(Engines(), setting, touch.source))


def scaling(key: str, what: str, make: Callable[[], Loop], bound: float | None = None) -> Group:
    shared = Shared(make)
    spoilt = Spoilt()

    def contender(name: str, count: int) -> Contender:
        return Contender(name, name, lambda: on_threads(shared(), count, spoilt))

    return Group(key, what, (contender("two threads", 2), contender("one thread", 1)),
                 (Goal("one thread", bound, sense=SPEED, by=P10, called="one"),), disturbances=lambda: spoilt.count,
                 alike=False, table="time for one operation, all threads together")


class Spoilt:
    """Counts the events that spoil a run: a worker lost its processor, or the workers hardly overlapped."""

    def __init__(self) -> None:
        self.count = 0


def on_threads(loop: Loop, workers: int, spoilt: Spoilt) -> Run:
    """A run in which each worker does its part of n operations, timed from the first start to the last end."""
    def run(n: int) -> int:
        part = -(-n // workers)
        spans, preempted = together(loop, part, workers)
        first, last = min(a for a, _ in spans), max(b for _, b in spans)
        both = min(b for _, b in spans) - max(a for a, _ in spans)
        spoilt.count += preempted + (both < OVERLAP * (last - first))
        return (last - first) * n // (part * workers)

    return run


def together(loop: Loop, n: int, workers: int) -> tuple[list[tuple[int, int]], int]:
    """The start and end of each worker's n operations, and how often a worker lost its processor."""
    spans: list[tuple[int, int]] = []
    preempted: list[int] = []
    errors: list[BaseException] = []
    gate = threading.Barrier(workers)

    def work() -> None:
        try:
            gate.wait()
            before = preemptions()
            began = clock()
            loop(n)
            spans.append((began, clock()))
            preempted.append(preemptions() - before)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return spans, sum(preempted)


def conclude(results: list[Result]) -> list[Result]:
    """Remove the verdicts if two threads of this machine are not about twice as fast as one."""
    control = next(row for result in results if result.group.key == "control" for row in result.rows)
    if control.ratio_p10 is None or control.ratio_p10 >= CONTROL:
        return results
    why = f"the control scales only {control.ratio_p10:.2f} x here"
    return [replace(result, rows=[unjudged(row, why) for row in result.rows]) for result in results]


def unjudged(row: Row, why: str) -> Row:
    return row if row.goal is None else replace(row, holds=None, unavailable=row.unavailable or why)
