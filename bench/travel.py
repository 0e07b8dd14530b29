"""The suite "travel": instances that start from a snapshot, in other stores and other processes, and sessions."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

from linmem.bench import image
from linmem.bench.engines import LINMEM_POOL, MIB, Kept
from linmem.bench.harness import P10, Contender, Goal, Group, Run, Shared, Unavailable, clock

ROUNDS = 25
RUN_NS, QUICK_RUN_NS = 4_000_000, 200_000
SPACE = 64 * MIB
START, AGAIN, COLD, SESSION = 1.2, 0.02, 0.5, 30_000        # SESSION: ns more than a restore alone
NEW_PROCESS = 2_000_000                                     # ns
REQUESTED = 400         # pages that a request reads
SEED = 20_261_128
TRIES_TO_DROP = 50

TOY = """(module (memory (export "memory") 1) (global $n (mut i32) (i32.const 0)) (data (i32.const 0) "seed")
  (func (export "init") (global.set $n (i32.const 1)) (i32.store (i32.const 8) (i32.const 42))))"""
# Every page of the memory has a byte that is not zero. read() adds up one byte of some pages, in a scattered order.
LARGE = f"""(module (memory (export "memory") {SPACE // 65536}) (global $n (mut i32) (i32.const 0))
  (func (export "init") (global.set $n (i32.const 1))
    (memory.fill (i32.const 0) (i32.const 1) (i32.const {SPACE})))
  (func (export "read") (param $page i32) (param $step i32) (param $left i32) (result i32) (local $sum i32)
    (loop $again
      (local.set $sum (i32.add (local.get $sum) (i32.load8_u (i32.and
        (i32.mul (local.get $page) (i32.const 4096)) (i32.const {SPACE - 1})))))
      (local.set $page (i32.add (local.get $page) (local.get $step)))
      (br_if $again (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
    (local.get $sum)))"""
STRIDE = 7919           # pages from one read to the next: a prime, so that the reads are far apart


def groups(quick: bool) -> list[Group]:
    """Starts, first of all in one process; then a new process, a cold file, and sessions."""
    interpreter, large = Shared(lambda: Guest(image.program(), "init")), Shared(lambda: Guest(LARGE, "init"))
    return [start("toy", "a toy module", Shared(lambda: Guest(TOY, "init"))),
            start("large", "a module with an image of 64 MiB", large),
            start("interpreter", f"an interpreter of over {image.WORDS} words", interpreter, init=True),
            new_process(large), cold(large), sessions(interpreter)]


class Guest:
    """A prepared module, and a snapshot of an instance after its initialisation."""

    def __init__(self, wasm: str | bytes, init: str) -> None:
        import wasmtime

        from linmem.wasmtime import Snapshot, prepare

        self.kept = Kept(LINMEM_POOL)
        self.engine, self.wasm, self.init = self.kept.engine, wasm, init
        self.prepared = prepare(self.engine, wasm, expose=True)
        store = wasmtime.Store(self.engine)
        self.snapshot = Snapshot.take(store, self.fresh(store))
        store.close()
        self.kept.creator.purge()       # else instances that are not initialised would get a slot with dirty pages

    def fresh(self, store):
        instance = self.prepared.instantiate(store)
        instance.exports(store)[self.init](store)
        return instance


# -- starts in one process -----------------------------------------------------------------------------

def start(key: str, what: str, guest: Shared[Guest], *, init: bool = False) -> Group:
    def begin(it: Guest) -> Callable[[object], object]:
        return lambda store: it.prepared.instantiate(store, start=it.snapshot)

    initialise = (Contender("init", "instantiate and initialise", making(guest, lambda it: it.fresh)),) * init
    return Group(
        f"start_{key}", f"{what}: Store, instance, close",
        (Contender("linmem", "instantiate(store, start=snapshot)", making(guest, begin)),
         Contender("plain", "instantiate(store)", making(guest, lambda it: it.prepared.instantiate)), *initialise),
        (Goal("plain", START, by=P10), *(Goal("init", AGAIN, by=P10),) * init), alike=False, most=1 << 12)


def making(guest: Shared[Guest], how: Callable[[Guest], Callable[[object], object]]) -> Callable[[], Run]:
    def make() -> Run:
        from wasmtime import Store

        it = guest()
        instantiate = how(it)

        def run(n: int) -> int:
            engine = it.engine
            began = clock()
            for _ in repeat(None, n):
                store = Store(engine)
                instantiate(store)
                store.close()
            return clock() - began

        return run

    return make


# -- a new process -------------------------------------------------------------------------------------

CHILD = """
import sys, time
import wasmtime, linmem.wasmtime
from linmem.wasmtime import Snapshot, prepare
from linmem.bench.travel import LARGE
config = wasmtime.Config()
linmem.wasmtime.install(config)
engine = wasmtime.Engine(config)
prepared = prepare(engine, LARGE, cache=sys.argv[1], expose=True)
store = wasmtime.Store(engine)
began = time.perf_counter_ns()
snapshot = Snapshot.open(sys.argv[2])
instance = prepared.instantiate(store, start=snapshot)
print(time.perf_counter_ns() - began)
"""


def new_process(guest: Shared[Guest]) -> Group:
    return Group(
        "new_process", "a new process: open + first instance, 64 MiB",
        (Contender("linmem", "Snapshot.open, instantiate(start=)", in_children(guest)),
         Contender("limit", "2 ms", lambda: lambda n: n * NEW_PROCESS)),
        (Goal("limit", 1, by=P10),), "the file is in the page cache and the module in the cache of prepare; imports,"
        " the engine and the module's load are not counted", operations=1, share=0.4)


class Folder:
    """A temporary folder with the snapshot's file."""

    def __init__(self, guest: Guest) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.cache = Path(self.folder.name) / "cache"
        self.path = Path(self.folder.name) / "snapshot"
        guest.snapshot.save(self.path)


def in_children(guest: Shared[Guest]) -> Callable[[], Run]:
    def make() -> Run:
        there = Folder(guest())

        def run(n: int) -> int:
            return sum(int(subprocess.run([sys.executable, "-c", CHILD, there.cache, there.path], check=True,
                                          capture_output=True).stdout) for _ in range(n))

        return run

    return make


# -- a cold file ---------------------------------------------------------------------------------------

def cold(guest: Shared[Guest]) -> Group:
    return Group(
        "cold_file", f"the first request from a cold file: open, instance, {REQUESTED} pages of 64 MiB read",
        (Contender("linmem", "with a recorded working set", first_request(guest, record=True)),
         Contender("without", "without one", first_request(guest, record=False))),
        (Goal("without", COLD, by=P10),), "the page cache is dropped for the file before each request; the requests are"
        " equal", operations=1)


def first_request(guest: Shared[Guest], record: bool) -> Callable[[], Run]:
    def make() -> Run:
        from wasmtime import Store

        from linmem.wasmtime import Snapshot

        it = guest()
        first = random.Random(SEED).randrange(SPACE // 4096)

        def serve(snapshot) -> None:
            store = Store(it.engine)
            exports = it.prepared.instantiate(store, start=snapshot).exports(store)
            if exports["read"](store, first, STRIDE, REQUESTED) != REQUESTED:
                raise RuntimeError("the request has a wrong answer")
            store.close()

        there = Folder(it)
        snapshot = Snapshot.open(there.path)
        if record:
            try:
                with snapshot.record():
                    serve(snapshot)
            except OSError as error:
                raise Unavailable(str(error)) from error
            snapshot.save(there.path)
        del snapshot
        drop(there.path)

        def run(n: int) -> int:
            took = 0
            for _ in repeat(None, n):
                it.kept.creator.purge()     # a warm slot would keep pages of the file mapped
                drop(there.path)
                began = clock()
                snapshot = Snapshot.open(there.path)
                serve(snapshot)
                took += clock() - began
                del snapshot
            return took

        return run

    return make


def drop(path: Path) -> None:
    """Drop the page cache of a file, and ask the system whether it did."""
    if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
        raise Unavailable("the system does not drop the page cache of a file on request")
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        for _ in range(TRIES_TO_DROP):      # the system keeps a page that it uses at this moment
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            try:
                found = os.preadv(file.fileno(), [bytearray(1)], os.path.getsize(path) // 2, os.RWF_NOWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                raise Unavailable(
                    f"the file system does not say what is in the page cache: {error.strerror}") from error
            if not found:
                return
            time.sleep(0.01)
        raise Unavailable("the file system keeps the file in the page cache")


# -- sessions ------------------------------------------------------------------------------------------

def sessions(guest: Shared[Guest]) -> Group:
    return Group(
        "session", "a session of the interpreter: get, a request, give back",
        (Contender("linmem", "sessions.get()", in_sessions(guest)),
         Contender("kept", "the same store kept: the request + restore", in_one_store(guest)),
         Contender("allowed", "the same, and 30 us", in_one_store(guest, SESSION)),
         Contender("new", "a new store, instance and initialisation", in_new_stores(guest))),
        (Goal("allowed", 1, by=P10), Goal("kept", None, by=P10), Goal("new", None, by=P10)),
        "all times include the request, which takes the largest part", alike=False, most=1 << 10)


def request(store, instance) -> None:
    text, expected = image.REQUEST
    exports = instance.exports(store)
    exports["memory"].write(store, text, exports["request"](store))
    if exports["eval"](store) != expected:
        raise RuntimeError("the interpreter has a wrong answer")


def in_sessions(guest: Shared[Guest]) -> Callable[[], Run]:
    def make() -> Run:
        from linmem.wasmtime import Sessions

        it = guest()
        made = Sessions(it.prepared, (), start=it.snapshot, size=1)

        def run(n: int) -> int:
            get = made.get
            began = clock()
            for _ in repeat(None, n):
                with get() as (store, instance):
                    request(store, instance)
            return clock() - began

        return run

    return make


def in_one_store(guest: Shared[Guest], more: int = 0) -> Callable[[], Run]:
    def make() -> Run:
        from wasmtime import Store

        it = guest()
        store = Store(it.engine)
        instance = it.prepared.instantiate(store, start=it.snapshot)

        def run(n: int) -> int:
            restore = it.snapshot.restore
            began = clock()
            for _ in repeat(None, n):
                request(store, instance)
                restore(store, instance)
            return clock() - began + n * more

        return run

    return make


def in_new_stores(guest: Shared[Guest]) -> Callable[[], Run]:
    def make() -> Run:
        from wasmtime import Store

        it = guest()

        def run(n: int) -> int:
            began = clock()
            for _ in repeat(None, n):
                store = Store(it.engine)
                request(store, it.fresh(store))
                store.close()
            return clock() - began

        return run

    return make
