"""A thread of a soak, which takes one step after the other."""

from __future__ import annotations

import collections
import os
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import linmem
from soak.checks import FLOOR, HAS_GIL, PATIENCE, Wrong, is_injected, wasmtime
from soak.creator_steps import CreatorSteps
from soak.file_steps import FileSteps
from soak.fork_steps import ForkSteps
from soak.guests import Guest, GuestSteps
from soak.image_steps import ImageSteps
from soak.memories import Held
from soak.memory_steps import MemorySteps

if TYPE_CHECKING:
    from soak.run import Soak

INJECTED_SHARE = 0.1        # the share of steps that make one of the next page calls fail, of any thread


class Worker(threading.Thread, MemorySteps, ImageSteps, CreatorSteps, FileSteps, GuestSteps, ForkSteps):
    """Takes random steps. Each step checks its result against a model."""

    WEIGHTS = {
        "create": 8, "grow": 10, "write": 20, "read": 10, "view": 8, "release": 6, "protect": 3, "discard": 4,
        "prefault": 2, "info": 3, "close": 5, "drop": 4, "cycle": 1, "give": 2, "take": 3, "common": 12,
        "clone": 4, "restore": 6, "delta": 2, "file": 1, "pickle": 1, "pool": 2, "statistics": 1, "private_pool": 1,
        "attach": 3, "open_file": 2, "show": 3,
        "collect": 0.2, "fork": 0.1,
        "guest": 5, "guest_run": 20, "guest_grow": 5, "guest_hostile": 5, "guest_snapshot": 3, "guest_end": 4,
        "guest_engine": 0.2,
    }

    def __init__(self, soak: Soak, number: int) -> None:
        super().__init__(name=f"worker {number}", daemon=True)
        self.soak, self.number = soak, number
        self.rng = random.Random(f"{soak.seed} {number}")
        self.held: list[Held] = []
        self.guests: list[Guest] = []
        self.filed = bytearray()        # the bytes of this thread's file
        # Held while this thread is in wasmtime. A thread that forks takes the locks of all workers, because a child
        # could not take a lock of wasmtime that was locked at the fork. Also held while this thread has a memory of a
        # file: a child would keep the lock of the file.
        self.busy = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.doing, self.steps = "waiting", 0
        able = [name for name in self.WEIGHTS if (wasmtime or not name.startswith("guest"))
                and FLOOR["capabilities"].get(FileSteps.NEEDS.get(name, ""), True)
                and (name != "fork" or (hasattr(os, "fork") and soak.forks))]
        self.able = able, [self.WEIGHTS[name] for name in able]

    def run(self) -> None:
        try:
            phase = 0
            while self.soak.begins(phase := phase + 1):
                while not self.soak.resting:
                    self.step()
                self.doing = "closing all"
                self.close_all()
                self.doing = "waiting"
                self.soak.rests()
        except BaseException as error:
            self.soak.fails(self, error)

    def step(self) -> None:
        (name,) = self.rng.choices(*self.able)
        self.doing = name
        if self.soak.faults and self.rng.random() < INJECTED_SHARE:
            self.soak.inject(self.rng.randrange(1, 12))
        try:
            # A step that may enter wasmtime holds `busy`. Without a GIL every step except `fork` holds it, because a
            # child could not take a lock of Python that was locked at the fork.
            if name.startswith("guest") or name in ("collect", "open_file") or not (HAS_GIL or name == "fork"):
                with self.busy:
                    getattr(self, name)()
            else:
                getattr(self, name)()
        except Exception as error:
            if not is_injected(error):
                raise
            error.__traceback__ = None
            self.counts["fault survived"] += 1
            self.check()
        self.counts[name] += 1
        self.steps += 1

    def check(self) -> None:
        for held in self.held:
            held.check()

    def pick(self) -> Held | None:
        return self.rng.choice(self.held) if self.held else None

    def insist(self, call: Callable[[], object]) -> object:
        """Call until no injected failure stops the call."""
        for _ in range(PATIENCE):
            try:
                return call()
            except linmem.PageError as error:
                if not is_injected(error):
                    raise
                self.counts["fault survived"] += 1
        raise Wrong(f"{PATIENCE} page calls in a row failed, more than were made to fail")

    def close_all(self) -> None:
        while self.held:
            held = self.held.pop()
            held.check()
            for view in held.views:
                view.release()
            held.mem.close()
        with self.busy:
            while self.guests:
                self.guests[-1].check()
                self.guests.pop()
