"""The suite "hooks": what rules, functions, choices and records of a creator cost, and what they cost if unused."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from itertools import repeat

import linmem
from linmem.bench import engines
from linmem.bench.engines import KIB, LINMEM_PLAIN, Kept
from linmem.bench.harness import P10, Contender, Goal, Group, Run, Unavailable, clock

ROUNDS = 25
RUN_NS, QUICK_RUN_NS = 3_000_000, 300_000
STEP = 64 * KIB
SPACE = 4 * engines.GIB
BASE = "LINMEM_BENCH_BASE"      # the variable that names a Python with an older linmem
UNUSED = 1.01                   # a feature that is not used, against a build without it
RULE, TRACKED = 1.1, 3.0
CALLBACK, ENTER, CHOSEN, FOUND = 2000, 1000, 1000, 200      # ns
MEMORIES = 10_000
DEPTH = 16                      # Python frames around a creation under tracking


def groups(quick: bool) -> list[Group]:
    return [*(unused(what, operation) for what, operation in UNUSED_OPERATIONS.items()), rule(), rule_in_a_page(),
            callback(), entering(), chosen(), tracked(), found(MEMORIES // 10 if quick else MEMORIES)]


# -- nothing used, against an older build ---------------------------------------------------------------

# The worker of one build. It reads "operation count" and writes the nanoseconds.
WORKER = f"""
import sys, time
from itertools import repeat
import linmem
clock = time.perf_counter_ns
pool = linmem.PoolingCreator()
def create(n):
    for _ in repeat(None, n):
        linmem.create({STEP}, {SPACE}, creator=pool).close()
def grow(n):
    with linmem.create({STEP}, {SPACE}) as mem:
        for size in range({2 * STEP}, (n + 2) * {STEP}, {STEP}):
            mem.grow_to(size)
def instance(n):
    for _ in repeat(None, n):
        store = wasmtime.Store(engine)
        wasmtime.Instance(store, module, ())
        store.close()
try:
    import wasmtime, linmem.wasmtime
    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.PoolingCreator())
    engine = wasmtime.Engine(config)
    module = wasmtime.Module(engine, "(module (memory 1))")
except ImportError:
    del instance
for line in sys.stdin:
    name, n = line.split()
    run = globals().get(name)
    if run is None:
        print("wasmtime is not installed", flush=True)
        continue
    began = clock()
    run(int(n))
    print(clock() - began, flush=True)
"""
UNUSED_OPERATIONS = {"create": "create + close, 64 KiB of a pool", "grow": "grow_to by 64 KiB, untouched",
                     "instance": "Store, instance, close"}


def unused(what: str, operation: str) -> Group:
    return Group(
        f"unused_{what}", f"{operation}; no hook",
        (Contender("linmem", "this build", lambda: in_worker(sys.executable, what)),
         Contender("before", f"the build of {BASE}", lambda: in_worker(os.environ.get(BASE), what))),
        (Goal("before", UNUSED),), "each build runs in a process of its own; the processes take turns",
        most=SPACE // STEP - 1, share=4)


class Worker:
    """A process that measures one build. It ends when it is not used any more."""

    def __init__(self, python: str) -> None:
        # Equal hash seeds give both builds equal dictionaries. The option keeps this folder out of the module path.
        self.process = subprocess.Popen([python, "-P", "-c", WORKER] if sys.version_info >= (3, 11) else
                                        [python, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=os.environ | {"PYTHONHASHSEED": "0"})

    def __call__(self, what: str, n: int) -> int:
        print(what, n, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline().strip()
        if not answer.isdecimal():
            raise Unavailable(answer or "the process of the build ended")
        return int(answer)

    def __del__(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def in_worker(python: str | None, what: str) -> Run:
    if python is None:
        raise Unavailable(f"{BASE} names no Python with an older linmem")
    worker = Worker(python)
    worker(what, 1)
    return lambda n: worker(what, n)


# -- rules and functions ---------------------------------------------------------------------------------

def growing(make_creator: Callable[[], object], step: int = STEP, more: int = 0) -> Callable[[], Run]:
    """Grow a memory by `step` bytes n times. `more` nanoseconds are added for each growth."""
    def make() -> Run:
        creator = make_creator()

        def run(n: int) -> int:
            with linmem.create(step, SPACE, creator=creator) as mem:
                calls = map(mem.grow_to, range(2 * step, (n + 2) * step, step))
                began = clock()
                deque(calls, 0)
                return clock() - began + n * more

        return run

    return make


def with_rule() -> object:
    return linmem.CallbackCreator(linmem.MmapCreator(), limit_each=SPACE, limit_growths=1 << 40)


def with_function() -> object:
    return linmem.CallbackCreator(linmem.MmapCreator(), on_grow=lambda mem, old, new: None)


def rule() -> Group:
    return Group(
        "rule_grow", "grow_to by 64 KiB under limit_each and limit_growths",
        (Contender("linmem", "CallbackCreator(limit_each=, limit_growths=)", growing(with_rule)),
         Contender("without", "MmapCreator()", growing(linmem.MmapCreator))),
        (Goal("without", RULE, by=P10),), most=SPACE // STEP - 1, share=2)


def rule_in_a_page() -> Group:
    return Group(
        "rule_byte", "grow_to by a byte, mostly without a system call, under the same rules",
        (Contender("linmem", "CallbackCreator(limit_each=, limit_growths=)", growing(with_rule, 1)),
         Contender("without", "MmapCreator()", growing(linmem.MmapCreator, 1))),
        (Goal("without", None, by=P10),), share=2)


def callback() -> Group:
    return Group(
        "callback_grow", "grow_to by 64 KiB, on_grow is a Python function",
        (Contender("linmem", "CallbackCreator(on_grow=)", growing(with_function)),
         Contender("allowed", "MmapCreator(), and 2 us", growing(linmem.MmapCreator, more=CALLBACK)),
         Contender("without", "MmapCreator()", growing(linmem.MmapCreator))),
        (Goal("allowed", 1, by=P10), Goal("without", None, by=P10)), most=SPACE // STEP - 1)


# -- choices -------------------------------------------------------------------------------------------------

def entering() -> Group:
    return Group(
        "use", "enter and leave `with linmem.wasmtime.use(creator)`",
        (Contender("linmem", "use(creator)", make_entering), Contender("allowed", "1 us", lambda: lambda n: n * ENTER)),
        (Goal("allowed", 1, by=P10),))


def make_entering() -> Run:
    from linmem.wasmtime import use

    creator = linmem.MmapCreator()

    def run(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            with use(creator):
                pass
        return clock() - began

    return run


def chosen() -> Group:
    return Group(
        "chosen", "Store, instance, close inside of `use(creator)`",
        (Contender("linmem", "in the block", lambda: make_instances(True)),
         Contender("allowed", "without the block, and 1 us", lambda: make_instances(False, CHOSEN)),
         Contender("without", "without the block", lambda: make_instances(False))),
        (Goal("allowed", 1, by=P10), Goal("without", None, by=P10)), alike=False, most=1 << 12, share=2)


def make_instances(choose: bool, more: int = 0) -> Run:
    import contextlib

    import wasmtime

    from linmem.wasmtime import use

    kept = Kept(LINMEM_PLAIN)
    module = wasmtime.Module(kept.engine, "(module (memory 1))")
    creator = linmem.MmapCreator()

    def run(n: int) -> int:
        with use(creator) if choose else contextlib.nullcontext():
            began = clock()
            for _ in repeat(None, n):
                store = wasmtime.Store(kept.engine)
                wasmtime.Instance(store, module, ())
                store.close()
            return clock() - began + n * more

    return run


# -- records -------------------------------------------------------------------------------------------------

def tracked() -> Group:
    return Group(
        "tracked", f"create + close at {DEPTH} frames, with their stack",
        (Contender("linmem", f"TrackingCreator(frames={DEPTH})",
                   lambda: make_at_depth(linmem.TrackingCreator(linmem.MmapCreator(), frames=DEPTH))),
         Contender("without", "MmapCreator()", lambda: make_at_depth(linmem.MmapCreator()))),
        (Goal("without", TRACKED, by=P10),))


def make_at_depth(creator: object) -> Run:
    def at_depth(depth: int, n: int) -> int:
        if depth:
            return at_depth(depth - 1, n)
        create = linmem.create
        began = clock()
        for _ in repeat(None, n):
            create(STEP, SPACE, creator=creator).close()
        return clock() - began

    return lambda n: at_depth(DEPTH, n)


def found(memories: int) -> Group:
    return Group(
        "find", f"find an address among {memories:,} memories, in random order",
        (Contender("linmem", "linmem.find(address)", lambda: make_finding(memories)),
         Contender("allowed", "200 ns", lambda: lambda n: n * FOUND)),
        (Goal("allowed", 1, by=P10),), least=memories)


def make_finding(memories: int) -> Run:
    try:
        held = [linmem.create(STEP, STEP, guard=STEP) for _ in range(memories)]
    except linmem.PageError as error:
        raise Unavailable(str(error)) from error
    addresses = [mem.as_ptr() + 100 for mem in held]
    random.Random(1).shuffle(addresses)

    def run(n: int, alive: list[linmem.Memory] = held) -> int:
        rounds, rest = divmod(n, memories)
        parts = [addresses] * rounds + [addresses[:rest]]
        began = clock()
        for part in parts:
            deque(map(linmem.find, part), 0)
        return clock() - began

    return run
