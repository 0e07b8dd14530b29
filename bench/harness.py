"""Interleaved measuring: what makes a ratio worth believing on a busy machine.

The contenders of a group take turns in one process, in a new order every round, so that whatever
slows the machine down slows all of them. What is kept is each contender's time per operation in
every round. A goal is held against the median of the ratios within a round: a machine that switches
between a fast and a slow state cancels out of it. The ratio of the tenth percentiles (the machine
at its best) stands beside it; it errs where the fast state is so rare that it may miss a contender.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

try:
    import resource
except ImportError:         # no such module here: then a preempted run cannot be told from another
    resource = None

Run = Callable[[int], int]
"""n operations -> the nanoseconds they took; what comes before and after them is not counted."""

TRIES = 5                   # of one run that was preempted
LONG_RUN = 50_000_000       # ns; a run this long is always preempted on a busy machine: never repeated


class Unavailable(Exception):
    """This contender cannot run here; the text says why."""


@dataclass(frozen=True)
class Contender:
    """One way to do the operation of a group. `make` does the set-up and returns what is timed."""

    key: str
    what: str
    make: Callable[[], Run]


@dataclass(frozen=True)
class Goal:
    """linmem's time (the group's first contender) against another's, and what it may be at most."""

    against: str
    at_most: float | None       # None: shown for comparison


@dataclass(frozen=True)
class Group:
    """Contenders for one operation; the first is linmem."""

    key: str
    operation: str
    contenders: tuple[Contender, ...]
    goals: tuple[Goal, ...]
    note: str = ""
    operations: int | None = None       # in one run; None: calibrated
    most: int = 1 << 20                 # operations in one run
    share: float = 1.0                  # of the rounds: less where runs are long, more where a goal is tight


@dataclass
class Series:
    """What one contender did: nanoseconds per operation, one figure a round."""

    contender: Contender
    run: Run | None = None
    unavailable: str | None = None
    ns: list[float] = field(default_factory=list)
    disturbed: int = 0                  # rounds in which every try was preempted

    def p10(self) -> float:
        return statistics.quantiles(self.ns, n=10, method="inclusive")[0]

    def median(self) -> float:
        return statistics.median(self.ns)


@dataclass(frozen=True)
class Row:
    """One line of the table: linmem's time over another contender's."""

    key: str
    operation: str
    ours: str
    against: str
    goal: float | None
    ratio_median: float | None = None       # of the ratios within a round: what the goal is held against
    ratio_quartiles: tuple[float, float] | None = None
    ratio_p10: float | None = None          # of the tenth percentiles
    holds: bool | None = None
    unavailable: str | None = None
    note: str = ""


def measure(group: Group, rounds: int, target_ns: int, tick: Callable[[], object]) -> tuple[int, list[Series]]:
    """Run the group. Returns the operations in one run, and a series for each contender.

    `tick` is called after each round. `target_ns` is how long one run of linmem's shall take where
    the group does not fix the number of operations.
    """
    series = [prepare(contender) for contender in group.contenders]
    able = [s for s in series if s.run is not None]
    if series[0].run is None:
        for _ in range(rounds):
            tick()
        return 0, series
    n = group.operations or calibrate(series[0].run, target_ns, group.most)
    with quiet():
        for s in able:
            s.run(n)                    # the first run also warms caches, and is not kept
        for i in range(rounds):
            start = i % len(able)
            turn = able[start:] + able[:start]
            for s in turn if i // len(able) % 2 == 0 else reversed(turn):
                took, undisturbed = run_undisturbed(s.run, n)
                s.ns.append(took / n)
                s.disturbed += not undisturbed
            tick()
    return n, series


def prepare(contender: Contender) -> Series:
    try:
        return Series(contender, contender.make())
    except ImportError as error:
        return Series(contender, unavailable=f"{error.name or error} is not installed")
    except Unavailable as error:
        return Series(contender, unavailable=str(error))


def calibrate(run: Run, target_ns: int, most: int) -> int:
    """How many operations take about `target_ns`; a power of two, so that runs compare."""
    n = 1
    while n < most and run(n) < target_ns:
        n *= 2
    return min(n, most)


def run_undisturbed(run: Run, n: int) -> tuple[int, bool]:
    """Time a run; again where the thread was preempted in it. The fastest, and whether one was left alone."""
    best = 0
    for _ in range(TRIES):
        before = preemptions()
        took = run(n)
        if preemptions() == before:
            return took, True
        best = min(best, took) if best else took
        if took > LONG_RUN:
            break
    return best, False


def preemptions() -> int:
    """How often this thread lost its processor; always 0 where the system does not say."""
    if resource is None:
        return 0
    who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
    return resource.getrusage(who).ru_nivcsw


class quiet:
    """No garbage collection inside."""

    def __enter__(self) -> None:
        self.enabled = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *exc: object) -> None:
        if self.enabled:
            gc.enable()


def compare(group: Group, series: list[Series]) -> Iterator[Row]:
    """The group's lines of the table."""
    by_key = {s.contender.key: s for s in series}
    ours = series[0]
    for goal in group.goals:
        other = by_key[goal.against]
        row = {"key": f"{group.key}/{goal.against}", "operation": group.operation, "ours": ours.contender.what,
               "against": other.contender.what, "goal": goal.at_most, "note": group.note}
        missing = ours.unavailable or other.unavailable
        if missing:
            yield Row(**row, unavailable=missing)
            continue
        ratios = [a / b for a, b in zip(ours.ns, other.ns, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        yield Row(**row, ratio_median=middle, ratio_quartiles=(low, high), ratio_p10=ours.p10() / other.p10(),
                  holds=None if goal.at_most is None else middle <= goal.at_most)


clock = time.perf_counter_ns
