"""Interleaved measurements: their ratios are reliable also on a busy machine.

The contenders of a group take turns in one process, in a new order in each round, so everything that slows the machine
down slows all contenders. The harness keeps each contender's time per operation in each round, and computes two ratios:

- The median of the ratios within a round. A switch of the machine between a fast and a slow state does not change this
  ratio.
- The ratio of the tenth percentiles, which shows the machine at its best. If the fast state is so rare that a contender
  never ran in this state, this ratio is wrong.

The tables show both ratios. A goal applies to one of the two.
"""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

try:
    import resource
except ImportError:         # without this module, preempted runs are not noticed
    resource = None

Run = Callable[[int], int]
"""Takes the number of operations, returns the nanoseconds of these operations, without set-up and clean-up."""

TRIES = 5                   # tries of a run that was preempted
LONG_RUN = 50_000_000       # ns; a longer run is not repeated, because a busy machine always preempts it

TIME = "time"               # linmem's time over the other's: less is better
SPEED = "speed"             # the other's time over linmem's, "times faster": more is better
SIZE = "size"               # linmem's bytes over the other's: less is better
RATE = "rate"               # the share of the requests that a warm slot served: more is better
MORE = (SPEED, RATE)        # the senses in which more is better
MEDIAN = "median"           # the median of the ratios within a round
P10 = "p10"                 # the ratio of the tenth percentiles
EXACT = "exact"             # the ratio of two counts, stored in ratio_median; such a row has no ratio_p10


class Unavailable(Exception):
    """This contender cannot run here. The text says why."""


@dataclass(frozen=True)
class Contender:
    """One way to do the operation of a group. `make` does the set-up and returns the function that is timed."""

    key: str
    what: str
    make: Callable[[], Run]
    less: str = ""                      # key of the contender whose time is subtracted
    operations: int | None = None       # in one run; overrides the number of the group


@dataclass(frozen=True)
class Goal:
    """A comparison of two contenders, with an upper or lower bound of their ratio.

    Without a bound the ratio is only shown. Several names in `against` mean the contender that was fastest in this run.
    """

    against: str | tuple[str, ...]
    bound: float | None = None
    ours: str = ""              # empty means the group's first contender
    sense: str = TIME
    by: str = MEDIAN
    called: str = ""            # the name of the row, if it differs from the name of `against`
    drawn: bool = True          # False if another row of the picture shows this ratio

    def holds(self, ratio: float) -> bool | None:
        if self.bound is None:
            return None
        return ratio >= self.bound if self.sense in MORE else ratio <= self.bound


@dataclass(frozen=True)
class Group:
    """Contenders for one operation. The first contender is linmem."""

    key: str
    operation: str
    contenders: tuple[Contender, ...]
    goals: tuple[Goal, ...]
    note: str = ""
    operations: int | None = None       # in one run; None means calibrated
    least: int = 1                      # the fewest operations in one run
    most: int = 1 << 20                 # the most operations in one run
    share: float = 1.0                  # factor of the number of rounds: < 1 for long runs, > 1 for tight goals
    alike: bool = True                  # True: all contenders do as many operations in a run as linmem
    disturbances: Callable[[], int] | None = None       # counts the events that spoil a run; None means `preemptions`
    table: str = ""                     # the title of the table of times that has a line for this group
    count: Callable[[], list[Row]] | None = None        # makes the rows by counting; then nothing is timed


T = TypeVar("T")


class Shared(Generic[T]):
    """An object that is made once for the contenders of a group, and freed when no contender holds it any more."""

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make
        self.made: Callable[[], T | None] = lambda: None

    def __call__(self) -> T:
        made = self.made()
        if made is None:
            made = self.make()
            self.made = weakref.ref(made)
        return made


@dataclass
class Series:
    """The result of one contender: nanoseconds per operation, one figure for each round."""

    contender: Contender
    run: Run | None = None
    unavailable: str | None = None
    operations: int = 0                 # in one run
    ns: list[float] = field(default_factory=list)
    disturbed: int = 0                  # rounds in which every try was preempted
    base: Series | None = None          # whose time is subtracted

    def p10(self) -> float:
        return tenth(self.ns) - (tenth(self.base.ns) if self.base else 0)

    def median(self) -> float:
        return statistics.median(self.ns) - (statistics.median(self.base.ns) if self.base else 0)

    def rounds(self) -> list[float]:
        return [a - b for a, b in zip(self.ns, self.base.ns, strict=True)] if self.base else self.ns

    def timed(self) -> bool:
        return bool(self.ns) and (self.base is None or bool(self.base.ns))

    def why_not(self) -> str | None:
        """The reason why the comparison has no time."""
        if self.unavailable or (self.base and self.base.unavailable):
            return self.unavailable or self.base.unavailable
        return "the difference is less than the noise" if self.p10() <= 0 else None


@dataclass(frozen=True)
class Row:
    """One line of the table: the times of two contenders."""

    key: str
    operation: str
    ours: str
    against: str
    goal: float | None
    sense: str = TIME
    by: str = MEDIAN
    ratio_median: float | None = None       # of the ratios within a round
    ratio_quartiles: tuple[float, float] | None = None
    ratio_p10: float | None = None          # of the tenth percentiles
    holds: bool | None = None
    unavailable: str | None = None          # the reason why there is no ratio or no verdict
    note: str = ""
    drawn: bool = True

    def judged(self) -> float | None:
        """The ratio that the goal applies to."""
        return self.ratio_p10 if self.by == P10 else self.ratio_median


@dataclass(frozen=True)
class Result:
    """The measured series of a group, and their comparison."""

    group: Group
    series: list[Series]
    rows: list[Row]


def tenth(figures: list[float]) -> float:
    return statistics.quantiles(figures, n=10, method="inclusive")[0]


def measure(group: Group, rounds: int, target_ns: int, tick: Callable[[], object]) -> list[Series]:
    """Measure the group; returns a series for each contender.

    `tick` is called after each round. `target_ns` is the target length of a run for which the group does not fix the
    number of operations.
    """
    series = [prepare(contender) for contender in group.contenders]
    by_key = {s.contender.key: s for s in series}
    for s in series:
        s.base = by_key[s.contender.less] if s.contender.less else None
    able = [s for s in series if s.run is not None]
    if not able:
        for _ in range(rounds):
            tick()
        return series
    alike = group.operations
    for s in able:
        if s.contender.operations:
            s.operations = s.contender.operations
        else:
            s.operations = alike or max(group.least, calibrate(s.run, target_ns, group.most))
            if group.alike:
                alike = s.operations
    with quiet():
        for s in able:
            s.run(s.operations)         # this run warms the caches; its time is not kept
        for i in range(rounds):
            start = i % len(able)
            turn = able[start:] + able[:start]
            for s in turn if i // len(able) % 2 == 0 else reversed(turn):
                took, undisturbed = run_undisturbed(s.run, s.operations, group.disturbances)
                s.ns.append(took / s.operations)
                s.disturbed += not undisturbed
            tick()
    for s in series:
        s.run = None
    return series


def prepare(contender: Contender) -> Series:
    try:
        return Series(contender, contender.make())
    except ImportError as error:
        return Series(contender, unavailable=f"{error.name or error} is not installed")
    except Unavailable as error:
        return Series(contender, unavailable=str(error))


def calibrate(run: Run, target_ns: int, most: int) -> int:
    """The number of operations that take about `target_ns`: a power of two, so that runs can be compared."""
    n = 1
    while n < most and run(n) < target_ns:
        n *= 2
    return min(n, most)


def run_undisturbed(run: Run, n: int, disturbances: Callable[[], int] | None = None) -> tuple[int, bool]:
    """Time a run, and repeat it if it was disturbed. Returns the least time, and whether a run was undisturbed."""
    count = disturbances or preemptions
    best = 0
    for _ in range(TRIES):
        before = count()
        took = run(n)
        if count() == before:
            return took, True
        best = min(best, took) if best else took
        if took > LONG_RUN:
            break
    return best, False


def preemptions() -> int:
    """How often this thread lost its processor. Always 0 where the system does not report this."""
    if resource is None:
        return 0
    who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)
    return resource.getrusage(who).ru_nivcsw


class quiet:
    """Switch garbage collection off."""

    def __enter__(self) -> None:
        self.enabled = gc.isenabled()
        gc.collect()
        gc.disable()

    def __exit__(self, *exc: object) -> None:
        if self.enabled:
            gc.enable()


def compare(group: Group, series: list[Series]) -> Iterator[Row]:
    """Yield the rows of a group."""
    by_key = {s.contender.key: s for s in series}
    for goal in group.goals:
        ours = by_key[goal.ours] if goal.ours else series[0]
        others = [by_key[key] for key in ([goal.against] if isinstance(goal.against, str) else goal.against)]
        other = fastest(others)
        able = sum(s.why_not() is None for s in others)
        name = goal.called or other.contender.key
        row = {"key": "/".join(filter(None, (group.key, goal.ours, name))),
               "operation": group.operation + (f", {ours.contender.what}" if goal.ours else ""),
               "ours": ours.contender.what, "goal": goal.bound,
               "against": other.contender.what + (f" (best of {able})" if able > 1 else ""),
               "sense": goal.sense, "by": goal.by, "note": group.note, "drawn": goal.drawn}
        missing = ours.why_not() or other.why_not()
        if missing:
            yield Row(**row, unavailable=missing)
            continue
        above, below = (ours, other) if goal.sense == TIME else (other, ours)
        best = above.p10() / below.p10()
        # A round has no ratio if the subtraction leaves nothing, because the noise was larger.
        ratios = [a / b for a, b in zip(above.rounds(), below.rounds(), strict=True) if a > 0 and b > 0]
        middle = spread = None
        if len(ratios) >= 2:
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            spread = low, high
        judged = best if goal.by == P10 else middle
        yield Row(**row, ratio_median=middle, ratio_quartiles=spread, ratio_p10=best,
                  holds=None if judged is None else goal.holds(judged),
                  unavailable="the difference is less than the noise" if judged is None else None)


def exact(key: str, operation: str, ours: str, against: str, ratio: float | None, bound: float | None = None,
          sense: str = SIZE, **more: Any) -> Row:
    """A row whose ratio was counted."""
    return Row(key, operation, ours, against, bound, sense, EXACT, ratio_median=ratio,
               holds=None if ratio is None else Goal(against, bound, sense=sense).holds(ratio), **more)


def fastest(series: list[Series]) -> Series:
    """The series with the least time, or the first series if no series has a time."""
    return min((s for s in series if s.why_not() is None), key=Series.p10, default=series[0])


def together(key: str, operation: str, rows: list[Row], ours: str, against: str, bound: float | None = None) -> Row:
    """A row with the geometric mean of the p10 ratios of some rows. All of them have the same sense."""
    row = {"key": key, "operation": operation, "ours": ours, "against": against, "goal": bound, "by": P10,
           "sense": rows[0].sense}
    missing = [r for r in rows if r.ratio_p10 is None]
    if missing:
        return Row(**row, unavailable=missing[0].unavailable)
    mean = statistics.geometric_mean([r.ratio_p10 for r in rows])
    return Row(**row, ratio_p10=mean, holds=Goal("", bound, sense=rows[0].sense).holds(mean))


clock = time.perf_counter_ns
