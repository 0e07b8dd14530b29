"""Which pages of a snapshot's images started instances touch, while blocks of `Snapshot.record` run."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterable

from linmem._core.memory import Memory, forget_touched, touched_pages
from linmem._os import pages
from linmem._wasm.state import State

Runs = tuple[tuple[int, int], ...]
RunsOfMemories = tuple[Runs, ...]       # for each memory of a state; () if all have none

OPEN: list[Recording] = []      # of all blocks that run now. Lists are iterated as copies: other threads change them.
_merging = threading.Lock()     # of the thread that merges what was noted; no thread waits for it


class Noted:
    """The union of what was noted. Any thread may add, also in a finalizer that interrupts a merge."""

    def __init__(self, *sets: RunsOfMemories) -> None:
        self._sets = [*sets]    # What was added during a merge stays at the end, for the next merge.

    def add(self, found: RunsOfMemories) -> None:
        self._sets.append(found)
        while len(self._sets) > 1 and _merging.acquire(blocking=False):
            try:
                count = len(self._sets)
                self._sets[:count] = [_merged(self._sets[:count])]
            finally:
                _merging.release()

    def all(self) -> RunsOfMemories:
        return _merged(self._sets[:])


def _merged(sets: list[RunsOfMemories]) -> RunsOfMemories:
    if len(sets) == 1:
        return sets[0]
    found = tuple(map(union, map(itertools.chain.from_iterable, zip(*filter(None, sets), strict=True))))
    return found if any(found) else ()


class Recording:
    """One block. `snapshot` is the snapshot, `state` its state.

    Each memory is held until the block ends. Otherwise its page tables would be lost when the instance is dropped.

    Raises
    ------
    OSError
        If the pages that a guest touches cannot be found. The text names the missing capability.
    """

    def __init__(self, snapshot: object, state: State) -> None:
        found = pages.describe()["capabilities"]
        for capability in ("maps_images", "scans"):
            if not found[capability]:
                raise OSError(f"no working set can be recorded: this system lacks the capability {capability!r}, so it"
                              " does not tell which pages of an image a guest touches")
        for memory in state.memories:
            about = memory.image.info()
            if about.stored != 0 and not about.shares_pages:
                raise OSError(f"no working set can be recorded: the pages of the image of memory {memory.index} are"
                              " private to this process, so each instance copies them all")
        self.snapshot, self.state = snapshot, state
        self.thread = threading.get_ident()
        self._held: list[tuple[int, Memory]] = []       # with the places of the memories in the state
        self._noted = Noted()

    def add(self, place: int, memory: Memory) -> None:
        """Watch a memory of a new instance, which has exactly the bytes of its image.

        A memory from a pool may have pages that the pool's earlier guests touched, so all its pages are given back.
        """
        image = self.state.memories[place].image
        if forget_touched(memory, image):
            self._held.append((place, memory))
        else:       # all bytes of the image were read to make a copy
            self._note(place, image.runs())

    def _note(self, place: int, runs: Iterable[tuple[int, int]]) -> None:
        self._noted.add(tuple(tuple(runs) if each == place else () for each in range(len(self.state.memories))))

    def note(self, memories: Iterable[Memory]) -> None:
        """Note what was touched in some memories, which may get other pages now."""
        ours = set(memories)
        for place, memory in list(self._held):
            if memory in ours:
                self._note(place, touched_pages(memory, self.state.memories[place].image))

    def end(self) -> RunsOfMemories:
        """What was touched. The memories are not held any longer.

        Until then, they must be held and the recording must be in OPEN: a restore on another thread notes what it
        resets.
        """
        try:
            for place, memory in list(self._held):
                self._note(place, touched_pages(memory, self.state.memories[place].image))
            return self._noted.all()
        finally:
            self._held.clear()


def union(runs: Iterable[tuple[int, int]]) -> Runs:
    """The bytes of all runs (offset, size), which may overlap: as few runs as possible, in ascending order."""
    found: list[tuple[int, int]] = []
    for start, size in sorted(runs):
        if found and start <= sum(found[-1]):
            first = found[-1][0]
            found[-1] = first, max(sum(found[-1]), start + size) - first
        else:
            found.append((start, size))
    return tuple(found)


def note(memories: Iterable[Memory]) -> None:
    """To be called before memories are set back to an image, because a reset may give their pages back to the OS."""
    for recording in list(OPEN):
        recording.note(memories)


def _forget_other_threads() -> None:
    thread = threading.get_ident()
    OPEN[:] = [each for each in OPEN if each.thread == thread]
    global _merging
    _merging = threading.Lock()


if hasattr(os, "register_at_fork"):     # else a child would hold its memories for blocks that never end there, and a
    # lock that another thread held would stay locked
    os.register_at_fork(after_in_child=_forget_other_threads)
