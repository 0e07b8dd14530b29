"""A run of a soak: its threads, its phases, and the search for leaks between two phases."""

from __future__ import annotations

import collections
import faulthandler
import gc
import hashlib  # noqa: F401
import os
import random
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable

import linmem

# linmem imports these modules, and hashlib, when it first needs them. If a thread imported one of them during a fork,
# the child would wait for that import for ever.
import linmem._files.image_file
import linmem.records
from linmem._os import pages
from linmem.bench import report
from soak.checks import HAS_GIL, INJECTED_CODE, MIB, PAGE, PATIENCE, Wrong, is_injected, must, wasmtime
from soak.creators import Maker, chain, makers
from soak.guests import Host
from soak.memories import Common, Held
from soak.process import Figures, call_malloc, judged
from soak.worker import Worker

PHASES = 8                  # between two phases, all threads rest
TICK = 0.05                 # seconds between two checks of the threads
READING_INTERVAL = 0.25     # seconds between two readings of the figures of the process
LAST_SECONDS = 3.0          # seconds in which the other threads must end after a finding

# A figure at rest may exceed the same figure at the first rest by this slack. Python, malloc and wasmtime keep a part
# of the memory that they once needed, and they keep more when each thread has a heap of its own. linmem keeps no
# memory, so address space and descriptors have no slack.
RESIDENT_SLACK = (16 if HAS_GIL else 96) * MIB
# The resident bytes at the last rest may exceed those at the rest after a quarter of the time by this slack.
GROWTH_SLACK = (8 if HAS_GIL else 48) * MIB
MAPPINGS_SLACK = 64 if HAS_GIL else 512


class Soak:
    """A run: its threads, what the threads share, and a reading at each rest."""

    def __init__(self, *, minutes: float, seed: int, threads: int, hang: float, faults: bool = True, forks: bool = True,
                 more: tuple[Maker, ...] = ()) -> None:
        self.seconds, self.seed, self.threads, self.hang = minutes * 60, seed, threads, hang
        self.faults, self.forks, self.more = faults, forks, more
        self.rng = random.Random(seed)
        self.turn = threading.Condition()
        self.phase = self.rested = 0
        self.resting = True
        self.failure: tuple[str, str] | None = None        # in one line, and at length
        self.forking, self.arming = threading.Lock(), threading.Lock()
        self.exchange: collections.deque[Held] = collections.deque()
        self.injected = self.forked = 0
        self.armed = False
        self.last_reading = 0.0
        self.peaks: dict[str, int] = {}
        self.at_rest: list[Figures] = []
        self.workers: list[Worker] = []
        self.ended = False

    # Methods that workers call.

    def begins(self, phase: int) -> bool:
        with self.turn:
            self.turn.wait_for(lambda: self.phase >= phase or self.ended)
            return not self.ended

    def rests(self) -> None:
        with self.turn:
            self.rested += 1
            self.turn.notify_all()

    def fails(self, worker: Worker | None, error: BaseException) -> None:
        with self.turn:
            if self.failure is None:
                at = "" if worker is None else f" ({worker.name}, step {worker.steps}, doing {worker.doing})"
                self.failure = (f"{type(error).__name__}: {error}{at}",
                                "".join(traceback.format_exception(type(error), error, error.__traceback__)))
            self.ended = self.resting = True
            self.turn.notify_all()

    def path(self, worker: Worker, what: str) -> str:
        return os.path.join(self.folder, f"{worker.number}.{what}")

    def replace_common(self, old: Common) -> None:
        with self.turn:
            if self.common is old:
                self.common = self.new_common()

    def new_common(self) -> Common:
        for _ in range(PATIENCE):
            try:
                return Common(self.threads, self.rng.choice((0, 256 * PAGE)))
            except linmem.PageError as error:
                if not is_injected(error):
                    raise
        raise Wrong("no common memory can be made")

    def wait_for(self, pid: int) -> None:
        """Wait for a forked child. A child that hangs is made to print its Python frames and to end."""
        deadline = time.monotonic() + self.hang
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGABRT)
                os.waitpid(pid, 0)
                raise Wrong(f"a forked child hung for {self.hang:g} s")
            time.sleep(0.002)
        code = os.waitstatus_to_exitcode(status)
        must(code == 0, f"a forked child ended with status {code}")
        with self.turn:
            self.forked += 1

    # Methods of the main thread.

    def run(self, show: Callable[[float, str], None]) -> None:
        """Run until the time is over or `failure` is set."""
        self.workers += [Worker(self, number) for number in range(self.threads)]
        with tempfile.TemporaryDirectory(prefix="linmem-soak-") as self.folder:
            for worker in self.workers:
                worker.start()
            try:
                self.began = time.monotonic()
                for number in range(PHASES):
                    self.one_phase(number, show)
                    if self.failure:
                        break
            except BaseException as error:
                self.fails(None, error)
            finally:
                pages.count_calls_to_failure(0, 0)
                with self.turn:
                    self.ended = self.resting = True
                    self.turn.notify_all()
                faulthandler.cancel_dump_traceback_later()
                deadline = time.monotonic() + (min(self.hang, LAST_SECONDS) if self.failure else self.hang)
                for worker in self.workers:
                    worker.join(max(0.0, deadline - time.monotonic()))
                    if worker.is_alive():
                        self.fails(worker, Wrong("a thread does not end"))
        self.took = time.monotonic() - self.began

    def one_phase(self, number: int, show: Callable[[float, str], None]) -> None:
        content = self.rng.randbytes(3 * PAGE + 77) + bytes(2 * PAGE) + b"end"
        self.content, self.image = content, linmem.Image.from_bytes(content)
        self.makers = [*makers(self.image, content), *self.more]
        self.hosts = [Host(maker) for maker in self.makers if maker.ours and not maker.start
                          and "full" not in maker.name and "huge" not in maker.name] if wasmtime else []
        self.common = self.new_common()
        end = self.began + self.seconds * (number + 1) / PHASES
        with self.turn:
            self.rested, self.resting = 0, False
            self.phase += 1
            self.turn.notify_all()
        seen = dict.fromkeys(self.workers, (-1, 0.0))
        while self.rested < self.threads and not self.failure:
            now = time.monotonic()
            if now >= end:
                self.resting = True
            self.watch(seen, now)
            show(min(1.0, (now - self.began) / self.seconds), f"phase {number + 1} of {PHASES}")
            with self.turn:
                self.turn.wait_for(lambda: self.rested == self.threads or self.failure, TICK)
        self.inject(0)
        if not self.failure:
            self.check_at_rest(number)

    def inject(self, nth: int) -> None:
        """Make the nth page call from now on fail, in any thread. 0 cancels this."""
        with self.arming:
            left = pages.count_calls_to_failure(nth, INJECTED_CODE if nth else 0)
            self.injected += self.armed and left <= 0
            self.armed = nth > 0

    def watch(self, seen: dict[Worker, tuple[int, float]], now: float) -> None:
        """Take readings at intervals, and raise `Wrong` when a thread hangs."""
        faulthandler.dump_traceback_later(2 * self.hang, exit=True)     # in case this thread hangs
        for worker in self.workers:
            steps, since = seen[worker]
            if steps != worker.steps or worker.doing == "waiting":
                seen[worker] = worker.steps, now
            elif now - since > self.hang:
                faulthandler.dump_traceback(all_threads=True)
                raise Wrong(f"{worker.name} hangs: for {now - since:.0f} s in step {worker.steps}, doing"
                            f" {worker.doing}")
        if now - self.last_reading >= READING_INTERVAL:
            self.last_reading = now
            self.read_figures()

    def read_figures(self) -> Figures:
        """Take a reading. Every reading goes through here, so a peak is never below a reading at rest."""
        figures = Figures.now()
        for name, value in vars(figures).items():
            if value is not None:
                self.peaks[name] = max(self.peaks.get(name, 0), value)
        return figures

    def check_at_rest(self, number: int) -> None:
        """All threads rest and hold nothing. Raises `Wrong` when a creator or the process still holds something."""
        while self.exchange:
            held = self.exchange.popleft()
            held.check()
            for view in held.views:
                view.release()
        held = view = None
        if not self.common.mem.closed:
            self.common.mem.close()
        creators = [one for maker in self.makers for one in chain(maker.creator)]
        self.image = self.common = None
        self.hosts.clear()
        # Without a GIL, a first collection may free an object of another thread, and the next collection the
        # objects that it held.
        for _ in range(3):
            gc.collect()
        for one in creators:
            if isinstance(one, linmem.PoolingCreator):
                one.trim()
                stats = one.stats()
                must((stats["live"], stats["pinned"], stats["warm"], stats["cold"]) == (0, 0, 0, 0),
                     f"left behind in {one!r}: {stats}")
        for one in creators:
            if isinstance(one, linmem.LimitingCreator):
                must(one.used_bytes == 0, f"left behind in {one!r}: {one.used_bytes} bytes")
            if isinstance(one, linmem.StatisticsCreator):
                left = one.statistics()
                must((left["current_count"], left["current_bytes"]) == (0, 0), f"left behind in {one!r}: {left}")
        del creators, one
        self.makers.clear()
        gc.collect()
        linmem.create(PAGE).close()     # releases the ranges whose release was made to fail
        call_malloc("malloc_trim", 0)
        now = self.read_figures()
        self.at_rest.append(now)
        first = self.at_rest[0]
        for name, slack in (("reserved", 0), ("descriptors", 0), ("mappings", MAPPINGS_SLACK),
                            ("resident", RESIDENT_SLACK)):
            before, after = getattr(first, name), getattr(now, name)
            must(not judged(name, before) or after <= before + slack,
                 f"a leak: {name} was {before} when all threads first rested and is {after} after phase {number + 1},"
                 f" with nothing live (slack: {slack})")
        if len(self.at_rest) == PHASES and judged("resident", now.resident):
            quarter = self.at_rest[PHASES // 4 - 1].resident
            must(now.resident <= quarter + GROWTH_SLACK,
                 f"a leak: {quarter} bytes were resident after a quarter of the time and {now.resident} at the end,"
                 f" with nothing live (slack: {GROWTH_SLACK})")

    # The result.

    def summary(self) -> dict[str, object]:
        counts: collections.Counter[str] = collections.Counter()
        for worker in self.workers:
            counts += worker.counts
        survived, traps = counts.pop("fault survived", 0), counts.pop("trap", 0)
        bounds, damaged = counts.pop("refused by a bound", 0), counts.pop("damaged files refused", 0)
        return {
            "seed": self.seed, "threads": self.threads, "seconds": round(self.took, 1),
            "machine": report.machine(), "failure": self.failure and self.failure[0],
            "operations": dict(sorted(counts.items())), "operations_in_all": sum(counts.values()),
            "faults_injected": self.injected, "faults_raised_and_survived": survived, "traps": traps,
            "forks": self.forked, "refused_by_a_bound": bounds, "damaged_files_refused": damaged,
            "peak": self.peaks, "at_rest": [vars(figures) for figures in self.at_rest],
        }
