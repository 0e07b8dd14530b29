"""The suite "share": memories that processes share, that are files, and that show other pages; arrays that grow.

The rows of shared memories are here. file_rows.py has those of files, mapping.py has the row of `mem.map`, and
array_rows.py has those of `linmem.GrowableArray`.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import time
import weakref
from collections import deque
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from types import ModuleType

import linmem
from linmem.bench import _loops, array_rows, file_rows, mapping
from linmem.bench.engines import MIB
from linmem.bench.harness import P10, Contender, Goal, Group, Run, Unavailable, clock

ROUNDS = 25
RUN_NS, QUICK_RUN_NS = 4_000_000, 400_000
STEP = 65536
GROWTHS = 256
WAKES = 64                          # wake-ups of one run
MOST_WAKES = 1 << 18                # wake-ups of one process
MESSAGES, MESSAGE = 4096, b"m" * 64
PAUSE = 0.0005                      # seconds
GROWTH, WAKE, ATTACH, RING = 1.5, 1.3, 1.0, 0.25
ENDED = 60                          # seconds after which a process that does not answer counts as ended


def groups(quick: bool) -> list[Group]:
    """Rows of shared memories, of files, of windows, and of arrays."""
    return [growth(), wake(), attach(), attach_once(), ring(),
            *file_rows.groups(),
            mapping.map_and_read(),
            *array_rows.groups()]


def create(size: int, maximum: int) -> linmem.Memory:
    try:
        return linmem.create(size, maximum, creator=linmem.creator("shared"))
    except TypeError as error:
        raise Unavailable(f"a shared memory cannot be made here: {error}") from error


class Process:
    """Another process, which is new and not forked. It runs `target(pipe, *args)`, and ends with this object."""

    def __init__(self, target: Callable[..., None], *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        process = context.Process(target=target, args=(theirs, *args), daemon=True)
        process.start()
        theirs.close()
        self.end = weakref.finalize(self, end, process)
        self.answer()

    def answer(self) -> object:
        """What the process has sent."""
        if not self.pipe.poll(ENDED):
            raise RuntimeError(f"the other process did not answer in {ENDED} s")
        return self.pipe.recv()


def end(process: multiprocessing.process.BaseProcess) -> None:
    process.terminate()
    process.join()


# -- growth ----------------------------------------------------------------------------------------------

def growth() -> Group:
    return Group("share_grow", "grow by 64 KiB, untouched",
                 (Contender("linmem", "mem.grow_to(size) of a shared memory", lambda: make_grow(create)),
                  Contender("private", "mem.grow_to(size) of a private memory", lambda: make_grow(linmem.create))),
                 (Goal("private", GROWTH, by=P10),), operations=GROWTHS, share=2)


def make_grow(create: Callable[[int, int], linmem.Memory]) -> Run:
    def run(n: int) -> int:
        with create(STEP, (n + 1) * STEP) as mem:
            calls = map(mem.grow_to, range(2 * STEP, (n + 2) * STEP, STEP))
            began = clock()
            deque(calls, 0)
            return clock() - began

    run(1)
    return run


# -- wake-ups: one process sleeps, another one wakes it. The time is from the call of the one that wakes to the return
# -- in the one that has slept. Each process reads the same clock of the system.

READY, AWOKE = 8, 16                # int64 indices in the words; word 0 is the one of the futex


def wake() -> Group:
    return Group(
        "share_wake", "another process that waits for a growth sees it",
        (Contender("linmem", "mem.grow_to(size) wakes mem.wait_for_growth(size)", waking(sleep_for_growth, grow)),
         Contender("python", "a futex, by one C function for each of two Python programs",
                   waking(sleep_on_word, change_word)),
         Contender("c", "a futex, in C loops of two processes", waking(sleep_in_c, None))),
        (Goal("python", WAKE, by=P10), Goal("c", by=P10)),
        "from the call to the return in the other process, which has slept for some microseconds", operations=WAKES,
        share=2)


def waking(sleep: Callable[..., None], step: Callable[[linmem.Memory, linmem.Memory, int], None] | None
           ) -> Callable[[], Run]:
    def make() -> Run:
        words, grown = create(4096, 4096), create(STEP, MOST_WAKES * STEP)
        process = Process(sleep, words.handle(), grown.handle())
        view, done = words.view("q"), 0

        def run(n: int, alive=process) -> int:
            nonlocal done
            if done + n >= MOST_WAKES:
                raise Unavailable(f"one process can be woken {MOST_WAKES} times")
            took = 0
            if step is None:
                took = _loops.wake_rounds(words, done + 1, n)
            else:
                for turn in range(done + 1, done + n + 1):
                    _loops.until_ready(words, turn)
                    began = clock()
                    step(words, grown, turn)
                    _loops.until_ready(words, turn + 1, False)
                    took += view[AWOKE] - began
            done += n
            return took

        run(1)
        return run

    return make


def grow(words: linmem.Memory, grown: linmem.Memory, turn: int) -> None:
    grown.grow_to((turn + 1) * STEP)


def change_word(words: linmem.Memory, grown: linmem.Memory, turn: int) -> None:
    _loops.futex_wake(words, turn)


def sleep_for_growth(pipe, words, grown) -> None:
    words, grown = linmem.attach(words), linmem.attach(grown)
    view = words.view("q")
    pipe.send("ready")
    for turn in range(1, MOST_WAKES):
        view[READY] = turn
        grown.wait_for_growth((turn + 1) * STEP)
        view[AWOKE] = clock()


def sleep_on_word(pipe, words, grown) -> None:
    words = linmem.attach(words)
    view = words.view("q")
    pipe.send("ready")
    for turn in range(1, MOST_WAKES):
        view[READY] = turn
        _loops.futex_wait(words, turn - 1)
        view[AWOKE] = clock()


def sleep_in_c(pipe, words, grown) -> None:
    words = linmem.attach(words)
    pipe.send("ready")
    _loops.sleep_rounds(words, MOST_WAKES)


# -- attach ------------------------------------------------------------------------------------------------

def attach() -> Group:
    return Group("share_attach", "attach, read a byte, close",
                 (Contender("linmem", "linmem.attach(handle)", make_attach),
                  Contender("own", "linmem.attach(handle) in the process that made the memory", make_attach_own),
                  Contender("name", "SharedMemory(name=...)", make_attach_by_name)),
                 (Goal("name", ATTACH, by=P10), Goal("name", ours="own", by=P10)),
                 "64 KiB; another process has made the memory of the first row", share=2)


def attach_once() -> Group:
    return Group("share_attach_once", "attach, read a byte, close, after a pause",
                 (Contender("linmem", "linmem.attach(handle)", lambda: make_attach(PAUSE)),
                  Contender("name", "SharedMemory(name=...)", lambda: make_attach_by_name(PAUSE))),
                 (Goal("name", ATTACH, by=P10),),
                 "64 KiB, of another process; after 0.5 ms, so the resource tracker of SharedMemory sleeps", share=2)


def make_attach(pause: float = 0) -> Run:
    process = Process(keep_memory)
    return attaching(process.answer(), process, pause)


def keep_memory(pipe) -> None:
    made = create(STEP, 16 * MIB)
    pipe.send("ready")
    pipe.send(made.handle())
    pipe.recv()


def make_attach_own() -> Run:
    made = create(STEP, 16 * MIB)
    return attaching(made.handle(), made)


def attaching(handle, alive, pause: float = 0) -> Run:
    def run(n: int, alive=alive) -> int:
        attach = linmem.attach
        began = clock()
        for _ in repeat(None, n):
            mem = attach(handle)
            mem[0]
            mem.close()
        return clock() - began

    return after_pauses(run, pause) if pause else run


def after_pauses(run: Run, pause: float) -> Run:
    def paused(n: int) -> int:
        took = 0
        for _ in repeat(None, n):
            time.sleep(pause)
            took += run(1)
        return took

    return paused


def make_attach_by_name(pause: float = 0) -> Run:
    from multiprocessing.shared_memory import SharedMemory

    made = SharedMemory(create=True, size=STEP)

    def run(n: int) -> int:
        name = made.name
        began = clock()
        for _ in repeat(None, n):
            mem = SharedMemory(name=name)
            mem.buf[0]
            mem.close()
        return clock() - began

    run.end = weakref.finalize(run, remove, made)
    return after_pauses(run, pause) if pause else run


def remove(made) -> None:
    made.close()
    made.unlink()


# -- the ring ----------------------------------------------------------------------------------------------

def ring() -> Group:
    return Group("share_ring", "a message of 64 bytes from one process to another",
                 (Contender("linmem", "the ring of examples/shared_ring.py", make_ring),
                  Contender("queue", "multiprocessing.Queue", make_queue)),
                 (Goal("queue", RING, by=P10),), "one process writes, the other one reads", operations=MESSAGES)


def example() -> ModuleType:
    """The module of the example. A wheel does not have the folder of the examples."""
    path = Path(__file__).parents[1] / "examples" / "shared_ring.py"
    if not path.exists():
        raise Unavailable("examples/shared_ring.py is missing: a checkout of linmem has it")
    spec = importlib.util.spec_from_file_location("shared_ring", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_ring() -> Run:
    try:
        ring = example().Ring.create()
    except TypeError as error:
        raise Unavailable(f"a shared memory cannot be made here: {error}") from error
    return receiving(Process(put_into_ring, ring.mem.handle()), ring.get)


def make_queue() -> Run:
    queue = multiprocessing.get_context("spawn").Queue(1024)
    return receiving(Process(put_into_queue, queue), queue.get)


def receiving(process: Process, get: Callable[[], bytes]) -> Run:
    def run(n: int) -> int:
        began = clock()
        process.pipe.send(n)
        found = deque((get() for _ in repeat(None, n)), 1)
        took = clock() - began
        if found.pop() != MESSAGE:
            raise AssertionError("a message is wrong")
        return took

    run(1)
    return run


def put_into_ring(pipe, handle) -> None:
    serve(pipe, example().Ring(linmem.attach(handle)).put)


def put_into_queue(pipe, queue) -> None:
    serve(pipe, queue.put)


def serve(pipe, put: Callable[[bytes], None]) -> None:
    """Puts as many messages as each request asks for."""
    pipe.send("ready")
    while True:
        for _ in repeat(None, pipe.recv()):
            put(MESSAGE)
