"""Everything at once, for minutes, against a model of every byte.

``python -m linmem.bench.soak --minutes N``. Threads make, grow, view, protect, discard, image, save and close
memories of every creator and adaptor, and run wasm in such, while page calls are made to fail and children are
forked. Each of them knows what every byte of its memories has to be. In between all rest, and the process must be
what it was before.

A wrong byte, an exception that is not the documented one, something that is left behind, a hang or a crash ends the
run with a status other than 0, with the seed and with what each thread was doing.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import errno
import faulthandler
import gc
import hashlib  # noqa: F401
import importlib.util
import json
import mmap
import os
import pickle
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import linmem

# What linmem imports when it first needs it, as hashlib: a child would wait for ever for a module that another thread
# was importing when it was forked.
import linmem._files
import linmem.records
from linmem._cli.words import file_name
from linmem._os import pages as _pages
from linmem.bench import report

try:
    import wasmtime

    import linmem.wasmtime
except ImportError:         # then everything but the guests is soaked
    wasmtime = None

FLOOR = _pages.describe()
PAGE = FLOOR["page_size"]
GUARD = max(PAGE, 65536)
WASM_PAGE = 65536
MOST_WASM_PAGES = 8
CODE = errno.EXDEV          # of an injected fault: no page call of an OS says that, so a real one is told apart
MIB = 1 << 20

PHASES = 8                  # of a run; all threads rest between two of them
TICK = 0.05                 # seconds between two looks at the threads,
LOOK = 0.25                 # and between two looks at the figures
FAULTS = 0.1                # share of the steps that inject a fault, into whatever thread calls for pages next
LAST_WORDS = 3.0            # seconds that the other threads have to end after a finding
PATIENCE = 200              # tries of a call that only an injected fault may stop
AT_HAND = 6                 # memories of one thread

HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()

# What the process may have more of, while all rest, than when they first did. Python, malloc and wasmtime keep some
# of what they once needed, and more where each thread has a heap of its own; linmem keeps nothing, so address space
# and descriptors have no slack.
RESIDENT_SLACK = (16 if HAS_GIL else 96) * MIB
GROWTH_SLACK = (8 if HAS_GIL else 48) * MIB     # from a quarter of the time on
MAPPINGS_SLACK = 64 if HAS_GIL else 512

GuestError = wasmtime.WasmtimeError if wasmtime else ()
Trap = wasmtime.Trap if wasmtime else ()


class Wrong(AssertionError):
    """What must not be."""


class Stop(Exception):
    """The run ends, because of another thread."""


def must(holds: object, what: str) -> None:
    if not holds:
        raise Wrong(what)


def same(got: object, expected: bytes | bytearray, what: str) -> None:
    """Every byte of a buffer is what it must be."""
    with memoryview(got) as view:
        if view == expected:
            return
        found = bytes(view)
    must(len(found) == len(expected), f"{what} has {len(found)} bytes, must have {len(expected)}")
    at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    raise Wrong(f"byte {at} of {what} is {found[at]}, must be {expected[at]}")


def is_injected(error: Exception) -> bool:
    if isinstance(error, linmem.PageError):
        return (error.errno if getattr(error, "winerror", None) is None else error.winerror) == CODE
    return isinstance(error, GuestError) and f"failed with code {CODE}:" in str(error)


# -- what the process holds ------------------------------------------------------------------------------

HAS_KERNEL32 = hasattr(ctypes, "WinDLL")            # which may show another system's /proc
HAS_PROC = os.path.exists("/proc/self/maps") and not HAS_KERNEL32
NAME = "[anon:linmem]"


@dataclass(frozen=True)
class Figures:
    """What a process holds, as the OS says; None where it does not."""

    resident: int | None        # bytes
    mappings: int | None
    reserved: int | None        # bytes that memories keep inaccessible: each of them has some
    descriptors: int | None

    @staticmethod
    def now() -> Figures:
        if HAS_PROC:
            with open("/proc/self/statm") as file:
                resident = int(file.read().split()[1]) * mmap.PAGESIZE
            with open("/proc/self/maps") as file:
                maps = [line.split(maxsplit=5) for line in file]
            return Figures(resident, len(maps), sum(map(_kept, maps)), len(os.listdir("/proc/self/fd")))
        return Figures(_working_set() if HAS_KERNEL32 else None, None, None, None)


def _kept(line: list[str]) -> int:
    name = line[5].strip() if len(line) > 5 else ""
    start, end = (int(part, 16) for part in line[0].split("-"))
    if line[1] != "---p" or (name != NAME if FLOOR["capabilities"]["names"] else name):
        return 0
    return end - start if name or end - start > mmap.PAGESIZE else 0      # one page guards a thread's stack


def judged(name: str, value: int | None) -> bool:
    """Whether a figure tells what a process keeps. A working set is what the OS leaves it, and Wine's own tables of
    all addresses that were ever reserved are in it."""
    return value is not None and not (name == "resident" and HAS_KERNEL32)


class _Counters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS."""

    _fields_ = [("cb", ctypes.c_uint32), ("faults", ctypes.c_uint32), ("peak", ctypes.c_size_t),
                ("working_set", ctypes.c_size_t), ("more", ctypes.c_size_t * 6)]


def _working_set() -> int | None:
    kernel = ctypes.WinDLL("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    about = _Counters(cb=ctypes.sizeof(_Counters))
    done = kernel.K32GetProcessMemoryInfo(ctypes.c_void_p(kernel.GetCurrentProcess()), ctypes.byref(about), about.cb)
    return about.working_set if done else None


def _call_malloc(name: str, *arguments: int) -> None:
    function = getattr(ctypes.pythonapi, name, None)
    if function is not None:
        function(*arguments)


# -- creators ------------------------------------------------------------------------------------------

class Borrowed(linmem.LinearMemory):
    """A memory in Python, over bytes that it has from elsewhere."""

    def __init__(self, size: int, capacity: int) -> None:
        self.bytes = linmem.create(capacity, capacity, reserve=capacity)
        self.size, self.capacity = size, capacity

    def byte_size(self) -> int:
        return self.size

    def byte_capacity(self) -> int:
        return self.capacity

    def grow_to(self, new_size: int) -> None:
        if new_size > self.capacity:
            raise linmem.GrowError(f"no more than {self.capacity}")
        self.size = new_size

    def as_ptr(self) -> int:
        return self.bytes.as_ptr()


class Borrowing(linmem.MemoryCreator):
    def new_memory(self, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes):
        return Borrowed(minimum, max(minimum, reserved_size_in_bytes or 0, PAGE))


class Passing(linmem.MemoryCreator):
    """A creator in Python that hands on what a native one makes."""

    def __init__(self) -> None:
        self.upstream = linmem.MmapCreator()

    def new_memory(self, *asked):
        return self.upstream.new_memory(*asked)


@dataclass(frozen=True)
class Maker:
    """A creator, and what may be expected of its memories."""

    name: str
    creator: linmem.MemoryCreator
    bounded: bool = False       # it may refuse, with the exception that says so
    ours: bool = True           # the pages are linmem's
    start: bytes = b""          # what fresh memories hold


def makers(image: linmem.Image, content: bytes) -> Iterator[Maker]:
    pool, over = linmem.PoolingCreator, linmem.MmapCreator
    yield Maker("mmap", over())
    yield Maker("mmap, prefault", over(prefault=True))
    yield Maker("mmap, huge pages", over(huge_pages=True))
    yield Maker("pool", pool())
    yield Maker("pool, check", pool(check=True, max_unused_warm=2))
    for reset in ("scan", "zero", "discard"):
        if reset != "scan" or FLOOR["capabilities"]["scans"]:
            yield Maker(f"pool, {reset}", pool(reset=reset, max_unused_warm=3, keep_resident=24 * PAGE))
    yield Maker("pool, full", pool(slots=3, when_full="error"), bounded=True)
    yield Maker("pool, all cold", pool(max_unused_warm=0))
    yield Maker("pool of an image", pool(image=image), start=content)
    yield Maker("pool of a pool", pool(pool(max_unused_warm=1), max_unused_warm=1))
    yield Maker("limit", linmem.LimitingCreator(over(), 48 * PAGE), bounded=True)
    yield Maker("limit of a pool", linmem.LimitingCreator(pool(), 96 * PAGE), bounded=True)
    yield Maker("statistics", linmem.StatisticsCreator(pool(linmem.LimitingCreator(over(), 1 << 40)), history=8))
    yield Maker("python, native", linmem.PythonCreator(Passing()))
    yield Maker("python", linmem.PythonCreator(Borrowing()), ours=False)
    yield Maker("pool of python", pool(linmem.PythonCreator(Borrowing())), ours=False)


def chain(creator: object) -> Iterator[object]:
    """A creator and what it stands on."""
    while creator is not None:
        yield creator
        creator = getattr(creator, "upstream", None)


# minimum, maximum, reserve in host pages; few, so that pools see them again
SHAPES = ((0, None, 0), (1, None, 0), (1, 8, 8), (2, 32, 32), (4, 40, 4), (7, None, 64), (12, 64, None),
          (1, 3, None))


# -- a memory, and what it must hold -----------------------------------------------------------------------

@dataclass
class Held:
    mem: linmem.Memory
    model: bytearray
    maker: Maker
    views: list[memoryview] = field(default_factory=list)
    image: linmem.Image | None = None       # to restore to
    frozen: bytes = b""                     # what that holds

    def check(self) -> None:
        same(self.mem, self.model, f"a memory of {self.maker.name!r}")
        for view in self.views:
            same(view.cast("B"), self.model[:view.nbytes], f"a view of a memory of {self.maker.name!r}")


class Common:
    """One memory of all threads. Each has a page of it to itself, and anyone may grow or close it."""

    def __init__(self, threads: int, reserve: int) -> None:
        self.mem = linmem.create(threads * PAGE, reserve=reserve, may_move=True)
        self.parts = [bytes(PAGE)] * threads


# -- a guest -----------------------------------------------------------------------------------------------

DATA = ((1024, bytes(range(1, 255)) * 4), (40000, b"linmem" * 500))
GUEST = f"""(module
  (memory (export "memory") 1 {MOST_WASM_PAGES})
  (global $stores (export "stores") (mut i32) (i32.const 0))
  {" ".join(f'(data (i32.const {at}) "{"".join(f"{chr(92)}{byte:02x}" for byte in data)}")' for at, data in DATA)}
  (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "store") (param i32 i32)
    (i32.store8 (local.get 0) (local.get 1))
    (global.set $stores (i32.add (global.get $stores) (i32.const 1))))
  (func (export "fill") (param i32 i32 i32) (memory.fill (local.get 0) (local.get 1) (local.get 2)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))"""


def fresh_guest() -> bytearray:
    model = bytearray(WASM_PAGE)
    for at, data in DATA:
        model[at:at + len(data)] = data
    return model


class Country:
    """An engine over a creator, and its module in two ways."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        config = wasmtime.Config()
        linmem.wasmtime.install(config, maker.creator)
        self.engine = wasmtime.Engine(config)
        self.module = wasmtime.Module(self.engine, GUEST)
        self.prepared = linmem.wasmtime.prepare(self.engine, GUEST)


class Guest:
    """An instance in a store of its own."""

    def __init__(self, country: Country, from_image: bool) -> None:
        self.country = country
        self.store = wasmtime.Store(country.engine)
        self.instance = (country.prepared.instantiate(self.store) if from_image
                         else wasmtime.Instance(self.store, country.module, []))
        self.exports = self.instance.exports(self.store)
        self.mem = linmem.wasmtime.linear_memory(self.store, self.exports["memory"])
        self.model, self.stores = fresh_guest(), 0
        self.kept: tuple[object, bytes, int] | None = None

    def call(self, name: str, *arguments: int) -> int | None:
        return self.exports[name](self.store, *arguments)

    def check(self) -> None:
        same(self.mem, self.model, f"a guest's memory of {self.country.maker.name!r}")
        count = self.exports["stores"].value(self.store)
        must(count == self.stores, f"the global of a guest is {count}, must be {self.stores}")


# -- a thread --------------------------------------------------------------------------------------------------

class Worker(threading.Thread):
    """Does one thing after the other, at random, and knows what must come of each."""

    WEIGHTS = {
        "create": 8, "grow": 10, "write": 20, "read": 10, "view": 8, "release": 6, "protect": 3, "discard": 4,
        "prefault": 2, "info": 3, "close": 5, "drop": 4, "cycle": 1, "give": 2, "take": 3, "common": 12,
        "clone": 4, "restore": 6, "delta": 2, "file": 1, "pickle": 1, "pool": 2, "statistics": 1, "private_pool": 1,
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
        self.busy = threading.Lock()        # in wasmtime. Whoever forks takes it: a child cannot take wasmtime's locks
        self.counts: collections.Counter[str] = collections.Counter()
        self.doing, self.steps = "waiting", 0
        able = [name for name in self.WEIGHTS if (wasmtime or not name.startswith("guest"))
                and (name != "fork" or (hasattr(os, "fork") and soak.forks))]
        self.able = able, [self.WEIGHTS[name] for name in able]

    def run(self) -> None:
        try:
            phase = 0
            while self.soak.begins(phase := phase + 1):
                while not self.soak.resting:
                    self.step()
                self.doing = "letting go"
                self.let_go()
                self.doing = "waiting"
                self.soak.rests()
        except Stop:
            pass
        except BaseException as error:
            self.soak.fails(self, error)

    def step(self) -> None:
        (name,) = self.rng.choices(*self.able)
        self.doing = name
        if self.soak.faults and self.rng.random() < FAULTS:
            self.soak.inject(self.rng.randrange(1, 12))
        try:
            # Without a GIL, Python's own locks are no more a child's to take than wasmtime's.
            if name.startswith("guest") or name == "collect" or not (HAS_GIL or name == "fork"):
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
        """Call until no injected fault stops it."""
        for _ in range(PATIENCE):
            try:
                return call()
            except linmem.PageError as error:
                if not is_injected(error):
                    raise
                self.counts["fault survived"] += 1
        raise Wrong(f"{PATIENCE} page calls in a row failed, and so many faults are not injected")

    def let_go(self) -> None:
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

    # -- memories

    def make(self, maker: Maker) -> Held | None:
        """A fresh memory; None where its creator said that its bound is reached."""
        least, most, reserve = (None if n is None else n * PAGE for n in self.rng.choice(SHAPES))
        least += self.rng.choice((0, 0, 0, 1, 100))
        most = None if most is None else most + PAGE
        if len(maker.start) > least:
            least, most = len(maker.start), None
        try:
            mem = maker.creator.create(least, most, reserve, GUARD if maker.ours else 0, may_move=True)
        except (linmem.LimitError, linmem.PoolError):
            must(maker.bounded, f"{maker.name!r} has no bound, and said that it is reached")
            self.counts["refused by a bound"] += 1
            return None
        held = Held(mem, bytearray(maker.start) + bytes(least - len(maker.start)), maker)
        same(mem, held.model, f"a fresh memory of {maker.name!r}")
        return held

    def create(self) -> None:
        held = self.make(self.rng.choice(self.soak.makers))
        if held is not None:
            self.held.append(held)
            if len(self.held) > AT_HAND:
                self.close()

    def grow(self) -> None:
        held = self.pick()
        if held is None:
            return
        rng, mem, size = self.rng, held.mem, len(held.model)
        capacity, maximum = mem.byte_capacity(), mem.maximum_byte_size()
        new = rng.choice((size - 1, size, size + 1, size + PAGE, size + rng.randrange(8 * PAGE), capacity, capacity + 1,
                          capacity + 3 * PAGE))
        if not 0 <= new <= 128 * PAGE:
            return
        try:
            mem.grow_to(new)
        except ValueError:
            must(new < size, f"a growth from {size} to {new} bytes was taken for a shrinking")
        except linmem.LimitError:
            must(held.maker.bounded, f"{held.maker.name!r} has no bound, and said that it is reached")
        except linmem.GrowError:
            must((maximum is not None and new > maximum) or (new > capacity and not held.maker.ours),
                 f"growth to {new} refused: capacity {capacity}, maximum {maximum}, {held.maker.name!r}")
        except BufferError:
            must(held.views and new > capacity, f"growth to {new} refused for {len(held.views)} views: {capacity}")
        else:
            must(new >= size and (maximum is None or new <= maximum), f"grown from {size} to {new} of {maximum}")
            held.model.extend(bytes(new - size))
        held.check()

    def write(self) -> None:
        held = self.pick()
        if held is None:
            return
        rng, model = self.rng, held.model
        at = rng.randrange(len(model) + 1)
        data = rng.randbytes(rng.choice((0, 1, 8, 100, 5000)))
        if at + len(data) > len(model):
            try:
                held.mem.write(at, data)
            except ValueError:
                return
            raise Wrong(f"{len(data)} bytes written at {at} of {len(model)}")
        way = rng.randrange(3)
        if way == 0:
            held.mem.write(at, data)
        elif way == 1:
            held.mem[at:at + len(data)] = data
        else:
            with memoryview(held.mem) as view:
                view[at:at + len(data)] = data
        model[at:at + len(data)] = data

    def read(self) -> None:
        held = self.pick()
        if held is None:
            return
        rng, model = self.rng, held.model
        at = rng.randrange(len(model) + 1)
        size = rng.randrange(len(model) - at + 1)
        what = f"what was read from {at} on of a memory of {held.maker.name!r}"
        same(held.mem.read(at, size), model[at:at + size], what)
        same(held.mem[at:at + size:3], model[at:at + size:3], what)
        if size:
            must(held.mem[at] == model[at], f"byte {at} is {held.mem[at]}, must be {model[at]}")
        held.check()

    def view(self) -> None:
        held = self.pick()
        if held is not None and len(held.views) < 3:
            held.views.append(held.mem.view(self.rng.choice(("B", "I", ">I", "d", "<u2"))))

    def release(self) -> None:
        held = self.pick()
        if held is not None and held.views:
            held.check()
            held.views.pop(self.rng.randrange(len(held.views))).release()

    def part(self, held: Held) -> tuple[int, int]:
        n = len(held.model) // PAGE
        first = self.rng.randrange(n + 1)
        return first * PAGE, self.rng.randrange(n - first + 1) * PAGE

    def protect(self) -> None:
        held = self.pick()
        if held is None:
            return
        at, size = self.part(held)
        if not held.maker.ours:
            self.unsupported(lambda: held.mem.protect(at, size, "r"))
            return
        if len(held.model) % PAGE:      # its last page cannot be protected, and so not all of it given back
            return
        access = self.rng.choice(("r", "none"))
        held.mem.protect(at, size, access)
        try:
            if access == "r":
                held.check()
        finally:
            self.insist(lambda: held.mem.protect(0, len(held.model), "rw"))
        held.check()

    def unsupported(self, call: Callable[[], object]) -> None:
        try:
            call()
        except TypeError:
            return
        raise Wrong("a page call was done on pages that are not linmem's")

    def discard(self) -> None:
        held = self.pick()
        if held is None:
            return
        at = self.rng.randrange(len(held.model) + 1)
        size = self.rng.randrange(len(held.model) - at + 1)
        if not held.maker.ours:
            self.unsupported(lambda: held.mem.discard(at, size))
            return
        held.mem.discard(at, size)
        held.model[at:at + size] = bytes(size)
        held.check()

    def prefault(self) -> None:
        held = self.pick()
        if held is not None and held.maker.ours:
            held.mem.prefault(*self.part(held))
            held.check()

    def info(self) -> None:
        held = self.pick()
        if held is None:
            return
        info = held.mem.info()
        must(info.byte_size == len(held.model) <= info.byte_capacity, f"sizes of {info}, must be {len(held.model)}")
        must(info.exports == len(held.views), f"{info.exports} exports, must be {len(held.views)}")
        must(info.resident is None or info.resident <= info.committed, f"resident and committed of {info}")

    def close(self) -> None:
        held = self.pick()
        if held is None:
            return
        held.check()
        if held.views:
            try:
                held.mem.close()
            except BufferError:
                must(not held.mem.closed, "a refused close closed a memory")
            else:
                raise Wrong("a memory with views was closed")
        for view in held.views:
            view.release()
        held.mem.close()
        self.held.remove(held)
        try:
            held.mem.byte_size()
        except ValueError:
            return
        raise Wrong("a closed memory has a size")

    def drop(self) -> None:
        """The handle first, then the views, which keep the bytes."""
        held = self.pick()
        if held is None:
            return
        self.held.remove(held)
        views = held.views
        held.views = held.mem = None
        for view in views:
            same(view.cast("B"), held.model[:view.nbytes], f"a view that outlived a memory of {held.maker.name!r}")

    def cycle(self) -> None:
        held = self.pick()
        if held is not None:
            self.held.remove(held)
            around = [held, held.mem, memoryview(held.mem)]
            around.append(around)

    def collect(self) -> None:
        gc.collect(self.rng.randrange(3))

    def give(self) -> None:
        held = self.pick()
        if held is not None and len(self.soak.exchange) < 2 * self.soak.threads:
            self.held.remove(held)
            self.soak.exchange.append(held)

    def take(self) -> None:
        """What another thread made, wrote and gave."""
        try:
            held = self.soak.exchange.popleft()
        except IndexError:
            return
        self.held.append(held)
        held.check()

    def common(self) -> None:
        rng, common = self.rng, self.soak.common
        mem, at = common.mem, self.number * PAGE
        try:
            same(mem.read(at, PAGE), common.parts[self.number], "this thread's page of the common memory")
            mark = rng.randbytes(64) * (PAGE // 64)
            mem.write(at, mark)
            common.parts[self.number] = mark
            with contextlib.suppress(BufferError), memoryview(mem) as view:
                same(view[at:at + PAGE], mark, "a view of this thread's page of the common memory")
                if rng.random() < 0.3:
                    mem.grow_to(min(len(view) + PAGE, 256 * PAGE))
            if rng.random() < 0.3:
                with contextlib.suppress(BufferError):
                    mem.grow_to(min(len(mem) + PAGE, 256 * PAGE))
            if rng.random() < 0.01:
                with contextlib.suppress(BufferError):
                    mem.close()
        except ValueError as error:     # closed by another, or another one's growth was ahead
            must(mem.closed or "never shrinks" in str(error), f"the common memory: {error}")
        if mem.closed:
            self.soak.replace_common(common)

    # -- images

    def clone(self) -> None:
        held = self.pick()
        if held is None:
            return
        image, frozen = held.mem.snapshot(), bytes(held.model)
        same(image, frozen, f"the image of a memory of {held.maker.name!r}")
        maker = self.rng.choice(self.soak.makers)
        try:
            mem = image.new_memory(creator=maker.creator, reserve=self.rng.choice((0, 64 * PAGE)), may_move=True,
                                   guard=GUARD if maker.ours else 0)
        except (linmem.LimitError, linmem.PoolError):
            must(maker.bounded, f"{maker.name!r} has no bound, and said that it is reached")
            return
        made = Held(mem, bytearray(frozen), maker, image=image, frozen=frozen)
        made.check()
        held.image, held.frozen = image, frozen
        self.held.append(made)
        if len(self.held) > AT_HAND:
            self.close()

    def restore(self) -> None:
        held = self.pick()
        if held is None or held.image is None:
            return
        grown = len(held.model) - len(held.frozen)
        zero_grown = self.rng.random() < 0.7
        try:
            held.mem.restore(held.image, zero_grown=zero_grown)
        except ValueError:
            must(grown and not zero_grown, f"restore refused: grown by {grown}, zero_grown={zero_grown}")
        else:
            must(zero_grown or not grown, "a memory that has grown was restored")
            held.model[:] = held.frozen + bytes(grown)
        held.check()

    def delta(self) -> None:
        held = self.pick()
        if held is None or held.image is None or len(held.model) < len(held.frozen):
            return
        delta = held.image.diff(held.mem)
        mem = held.image.new_memory(reserve=0, may_move=True)
        mem.apply(delta)
        same(mem, held.model, "a memory after a delta")
        mem.close()
        same(held.image.apply(delta), held.model, "an image after a delta")
        again = pickle.loads(pickle.dumps(delta, self.rng.choice((4, 5))))
        must(again == delta, "a delta is another one after a pickle")
        path = self.soak.path(self, "delta")
        delta.save(path)
        must(linmem.Delta.open(path) == delta, "a delta is another one after a file")
        os.unlink(path)

    def file(self) -> None:
        held = self.pick()
        if held is None:
            return
        rng, image = self.rng, held.mem.snapshot()
        path = self.soak.path(self, "image")
        image.save(path, packed=rng.random() < 0.5)
        opened = linmem.Image.open(path, verify=rng.random() < 0.5, map=rng.random() < 0.7)
        same(opened, held.model, "an image that was opened")
        opened.verify()
        must(opened == image, "an image that was opened is another one")
        with opened.new_memory(reserve=0) as mem:
            same(mem, held.model, "a memory of an image that was opened")
            mem.write(0, bytes(len(held.model)))
            mem.restore(opened)
            same(mem, held.model, "a memory restored to an image that was opened")
        del opened
        with open(path, "rb+") as file:
            data = bytearray(file.read())
            at = rng.randrange(len(data))
            data[at] ^= 1 << rng.randrange(8)
            file.seek(0)
            file.write(data)
        try:
            damaged = linmem.Image.open(path, verify=True)
        except linmem.FileFormatError:
            self.counts["damaged files refused"] += 1
        else:
            same(damaged, held.model, f"an image whose file was damaged at {at}")
            del damaged
        os.unlink(path)

    def pickle(self) -> None:
        held = self.pick()
        if held is None:
            return
        buffers: list[pickle.PickleBuffer] = []
        image = held.mem.snapshot()
        again = (pickle.loads(pickle.dumps(image, 4)) if self.rng.random() < 0.5 else
                 pickle.loads(pickle.dumps(image, 5, buffer_callback=buffers.append), buffers=buffers))
        same(again, held.model, "an image after a pickle")
        must(again == image, "an image is another one after a pickle")

    # -- creators

    def pool(self) -> None:
        pools = [one for maker in self.soak.makers for one in chain(maker.creator)
                 if isinstance(one, linmem.PoolingCreator)]
        pool = self.rng.choice(pools)
        if self.rng.random() < 0.3:
            pool.trim(self.rng.choice((0, 0, 32 * PAGE)))
        else:
            try:
                pool.warm(2, linmem.MemoryType(1, 2), reserved_size_in_bytes=1 << 18, guard_size_in_bytes=GUARD)
            except (linmem.LimitError, linmem.PoolError):
                pass        # full, or of memories that cannot be kept
            except ValueError:
                must(pool.image is not None or isinstance(pool.upstream, linmem.PythonCreator), "warm() refused")
        stats = pool.stats()
        must(0 <= stats["pinned"] <= stats["live"] <= stats["slots"], f"the figures of a pool: {stats}")
        must(all(n >= 0 for n in stats["resets"].values()), f"the figures of a pool: {stats}")

    def statistics(self) -> None:
        for maker in self.soak.makers:
            if isinstance(maker.creator, linmem.StatisticsCreator):
                sums, records = maker.creator.statistics(), maker.creator.memories()
                must(0 <= sums["current_count"] <= sums["peak_count"] <= sums["total_count"], f"the sums {sums}")
                must(sum(not record["alive"] for record in records) <= 8, f"{len(records)} records are kept")

    def private_pool(self) -> None:
        """A pool that is dropped before its memories."""
        maker = Maker("a private pool", linmem.PoolingCreator(max_unused_warm=self.rng.randrange(3)))
        made = [self.make(maker) for _ in range(3)]
        made[0].mem.close()
        self.held += made[1:]
        del maker, made
        while len(self.held) > AT_HAND:
            self.close()

    # -- guests

    def guest(self) -> None:
        if len(self.guests) >= 3:
            self.guests.pop(0).check()
        country = self.rng.choice(self.soak.countries)
        try:
            guest = Guest(country, self.rng.random() < 0.5)
        except GuestError as error:
            if is_injected(error):
                raise
            must(country.maker.bounded and ("limit of" in str(error) or "slots of the pool" in str(error)),
                 f"no guest in {country.maker.name!r}: {error}")
            self.counts["refused by a bound"] += 1
            return
        guest.check()
        self.guests.append(guest)

    def guest_run(self) -> None:
        if not self.guests:
            return
        rng, guest = self.rng, self.rng.choice(self.guests)
        size = len(guest.model)
        for _ in range(4):
            at = rng.randrange(size)
            must(guest.call("load", at) == guest.model[at], f"a guest loads another byte at {at}")
            byte = rng.randrange(256)
            guest.call("store", at, byte)
            guest.model[at] = byte
            guest.stores += 1
        at = rng.randrange(size)
        n, byte = rng.randrange(size - at + 1), rng.randrange(256)
        guest.call("fill", at, byte, n)
        guest.model[at:at + n] = bytes([byte]) * n
        data = rng.randbytes(rng.randrange(100))
        at = rng.randrange(size - len(data) + 1)
        guest.mem.write(at, data)
        guest.model[at:at + len(data)] = data
        guest.check()

    def guest_grow(self) -> None:
        if not self.guests:
            return
        guest = self.rng.choice(self.guests)
        by, before = self.rng.randrange(4), len(guest.model) // WASM_PAGE
        for _ in range(PATIENCE):
            got = guest.call("grow", by)
            if got != -1 or before + by > MOST_WASM_PAGES or guest.country.maker.bounded:
                break
            self.counts["fault survived"] += 1
        if got == -1:
            must(before + by > MOST_WASM_PAGES or guest.country.maker.bounded, f"a guest cannot grow by {by} pages")
        else:
            must(got == before, f"memory.grow returned {got}, must be {before}")
            guest.model.extend(bytes(by * WASM_PAGE))
        try:
            guest.mem.grow_to(len(guest.model) + WASM_PAGE)
        except linmem.OwnedError:
            pass
        else:
            raise Wrong("a guest's memory was grown from Python")
        guest.check()

    def guest_hostile(self) -> None:
        if not self.guests:
            return
        guest = self.rng.choice(self.guests)
        size = len(guest.model)
        at = self.rng.choice((size, size + 1, size + PAGE, 1 << 30, (1 << 31) - 1, -1, -(1 << 31), -size))
        for call in (lambda: guest.call("load", at), lambda: guest.call("store", at, 1),
                     lambda: guest.call("fill", size - 1, 7, 2)):
            try:
                call()
            except Trap:
                self.counts["trap"] += 1
            else:
                raise Wrong(f"a guest touched byte {at} of {size}")
        guest.check()

    def guest_snapshot(self) -> None:
        if not self.guests:
            return
        guest = self.rng.choice(self.guests)
        if guest.kept is None or self.rng.random() < 0.3:
            guest.kept = linmem.wasmtime.Snapshot.take(guest.store, guest.instance), bytes(guest.model), guest.stores
            return
        snapshot, frozen, stores = guest.kept
        grown = len(guest.model) - len(frozen)
        try:
            snapshot.restore(guest.store, zero_grown=self.rng.random() < 0.8)
        except ValueError:
            must(grown, "a snapshot cannot be restored in a guest that has not grown")
        else:
            guest.model[:] = frozen + bytes(grown)
            guest.stores = stores
        guest.check()

    def guest_end(self) -> None:
        """Store, memory, view, instance and snapshot go in any order."""
        if not self.guests:
            return
        guest = self.guests.pop(self.rng.randrange(len(self.guests)))
        view = memoryview(guest.mem)
        if self.rng.random() < 0.5:
            guest.store.close()
            same(view, guest.model, "a view after store.close()")
            view[0] = guest.model[0]
        parts = [view, *(vars(guest).pop(name) for name in ("store", "instance", "exports", "mem", "kept"))]
        del view
        self.rng.shuffle(parts)
        while parts:
            parts.pop()

    def guest_engine(self) -> None:
        """An engine of this thread's own, gone before its guest."""
        country = Country(Maker("a private pool", linmem.PoolingCreator()))
        guest = Guest(country, True)
        country.engine.close()
        guest.check()

    # -- children

    def fork(self) -> None:
        with self.soak.forking, contextlib.ExitStack() as still:
            for worker in self.soak.workers:
                still.enter_context(worker.busy)
            pid = os.fork()
            if pid == 0:
                self.be_a_child()
        self.soak.wait_for(pid)
        self.check()

    def be_a_child(self) -> None:
        """Use all that was inherited. Never returns."""
        status = 1
        try:
            _pages.count_calls_to_failure(0, 0)
            self.use_all()
            if self.rng.random() < 0.2:
                pid = os.fork()
                if pid == 0:
                    self.use_all()
                    os._exit(0)
                must(os.waitpid(pid, 0)[1] == 0, "a child's child failed")
            status = 0
        except BaseException:
            os.write(2, f"in a child of {self.name}:\n{traceback.format_exc()}".encode())
        finally:
            os._exit(status)

    def use_all(self) -> None:
        # Whoever would end a child that hangs may itself have ended by then, with a finding or a crash.
        signal.setitimer(signal.ITIMER_REAL, 2 * self.soak.hang)
        self.check()
        for held in self.held:
            held.mem.write(0, b"child"[:len(held.model)])
            held.model[:5] = b"child"[:len(held.model)]
            held.check()
        for maker in self.soak.makers:
            held = self.make(maker)
            if held is not None:
                held.mem.write(0, bytes(len(held.model)))
                held.mem.close()
        with self.soak.image.new_memory() as mem:
            same(mem, self.soak.content, "a memory of an inherited image")
        for guest in self.guests:
            guest.check()
            for _ in range(3):
                guest.call("store", 5, 55)
            guest.model[5] = 55
            guest.stores += 3
            if guest.call("grow", 1) != -1:
                guest.model.extend(bytes(WASM_PAGE))
            guest.check()
        self.statistics()
        while self.held:
            self.close()
        for guest in self.guests:
            guest.store.close()
        self.guests.clear()
        for maker in self.soak.makers:
            for one in chain(maker.creator):
                if isinstance(one, linmem.PoolingCreator):
                    one.trim()
        gc.collect()


# -- all of them ------------------------------------------------------------------------------------------------------

class Soak:
    """A run: its threads, what they share, and what the process held each time that they rested."""

    def __init__(self, *, minutes: float, seed: int, threads: int, hang: float, faults: bool = True, forks: bool = True,
                 more: tuple[Maker, ...] = ()) -> None:
        self.seconds, self.seed, self.threads, self.hang = minutes * 60, seed, threads, hang
        self.faults, self.forks, self.more = faults, forks, more
        self.rng = random.Random(seed)
        self.turn = threading.Condition()
        self.phase = self.rested = 0
        self.resting = True
        self.failure: tuple[str, str] | None = None        # what, and at length
        self.forking, self.arming = threading.Lock(), threading.Lock()
        self.exchange: collections.deque[Held] = collections.deque()
        self.injected = self.forked = 0
        self.armed = False
        self.looked = 0.0
        self.peaks: dict[str, int] = {}
        self.calms: list[Figures] = []
        self.workers: list[Worker] = []
        self.ended = False

    # what the workers call

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
        """A child that hangs says where, as far as Python knows, and ends."""
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

    # the main thread

    def run(self, show: Callable[[float, str], None]) -> None:
        """Until the time is over, or something was wrong: `failure` says."""
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
                _pages.count_calls_to_failure(0, 0)
                with self.turn:
                    self.ended = self.resting = True
                    self.turn.notify_all()
                faulthandler.cancel_dump_traceback_later()
                deadline = time.monotonic() + (min(self.hang, LAST_WORDS) if self.failure else self.hang)
                for worker in self.workers:
                    worker.join(max(0.0, deadline - time.monotonic()))
                    if worker.is_alive():
                        self.fails(worker, Wrong("a thread does not end"))
        self.took = time.monotonic() - self.began

    def one_phase(self, number: int, show: Callable[[float, str], None]) -> None:
        content = self.rng.randbytes(3 * PAGE + 77) + bytes(2 * PAGE) + b"end"
        self.content, self.image = content, linmem.Image.from_bytes(content)
        self.makers = [*makers(self.image, content), *self.more]
        self.countries = [Country(maker) for maker in self.makers if maker.ours and not maker.start
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
            self.calm(number)

    def inject(self, nth: int) -> None:
        """Make the nth page call from now on fail, whoever makes it; 0: none."""
        with self.arming:
            left = _pages.count_calls_to_failure(nth, CODE if nth else 0)
            self.injected += self.armed and left <= 0
            self.armed = nth > 0

    def watch(self, seen: dict[Worker, tuple[int, float]], now: float) -> None:
        """The figures of this moment, and whether each thread still does something."""
        faulthandler.dump_traceback_later(2 * self.hang, exit=True)     # should this thread be the one that hangs
        for worker in self.workers:
            steps, since = seen[worker]
            if steps != worker.steps or worker.doing == "waiting":
                seen[worker] = worker.steps, now
            elif now - since > self.hang:
                faulthandler.dump_traceback(all_threads=True)
                raise Wrong(f"{worker.name} hangs: for {now - since:.0f} s in step {worker.steps}, doing"
                            f" {worker.doing}")
        if now - self.looked >= LOOK:
            self.looked = now
            self.look()

    def look(self) -> Figures:
        """Reads the figures. No other function reads them, so the peaks include every reading."""
        figures = Figures.now()
        for name, value in vars(figures).items():
            if value is not None:
                self.peaks[name] = max(self.peaks.get(name, 0), value)
        return figures

    def calm(self, number: int) -> None:
        """All threads rest and hold nothing: what is live now is live for no reason."""
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
        self.countries.clear()
        for _ in range(3):      # without a GIL what another thread's object held may go only with the next one
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
        linmem.create(PAGE).close()     # gives back what the OS was made to refuse to take
        _call_malloc("malloc_trim", 0)
        now = self.look()
        self.calms.append(now)
        first = self.calms[0]
        for name, slack in (("reserved", 0), ("descriptors", 0), ("mappings", MAPPINGS_SLACK),
                            ("resident", RESIDENT_SLACK)):
            before, after = getattr(first, name), getattr(now, name)
            must(not judged(name, before) or after <= before + slack,
                 f"a leak: {name} was {before} when all threads first rested and is {after} after phase {number + 1},"
                 f" with nothing live (slack: {slack})")
        if len(self.calms) == PHASES and judged("resident", now.resident):
            quarter = self.calms[PHASES // 4 - 1].resident
            must(now.resident <= quarter + GROWTH_SLACK,
                 f"a leak: {quarter} bytes were resident after a quarter of the time and {now.resident} at the end,"
                 f" with nothing live (slack: {GROWTH_SLACK})")

    # what comes of it

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
            "peak": self.peaks, "at_rest": [vars(figures) for figures in self.calms],
        }


# -- the report -------------------------------------------------------------------------------------------------------

def in_words(name: str, value: int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / MIB:.1f} MiB" if name in ("resident", "reserved") else f"{value}"


def tables(figures: dict) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, headings and lines of each table."""
    yield "operations", ("kind", "times"), [(name.replace("_", " "), f"{n:,}")
                                            for name, n in figures["operations"].items()]
    yield "in all", ("what", "times"), [(name.replace("_", " "), f"{figures[name]:,}") for name in (
        "operations_in_all", "faults_injected", "faults_raised_and_survived", "traps", "forks", "refused_by_a_bound",
        "damaged_files_refused")]
    rests = figures["at_rest"]
    if rests:
        quarter = rests[min(PHASES // 4, len(rests)) - 1]
        yield ("what the process held (at rest: all threads idle, nothing live)",
               ("what", "first rest", "a quarter", "peak", "end"),
               [(name, *(in_words(name, value) for value in (rests[0][name], quarter[name], figures["peak"].get(name),
                                                            rests[-1][name]))) for name in rests[0]])


def in_short(figures: dict) -> str:
    rests, peak = figures["at_rest"], figures["peak"]
    held = [f"{name} {in_words(name, rests[0][name])}, at most {in_words(name, peak[name])}, at the end"
            f" {in_words(name, rests[-1][name])}" for name in ("resident", "mappings", "descriptors") if name in peak]
    return "; ".join([f"{figures['operations_in_all']:,} operations, {figures['faults_injected']:,} faults injected,"
                      f" {figures['traps']:,} traps, {figures['forks']:,} forks in {figures['seconds']:.0f} s", *held,
                      f"seed {figures['seed']}"])


def show_tables(figures: dict) -> None:
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        for title, headings, lines in tables(figures):
            table = Table(title=title, title_justify="left")
            for i, heading in enumerate(headings):
                table.add_column(heading, justify="right" if i else "left")
            for line in lines:
                table.add_row(*line)
            Console().print(table)
        return
    for title, headings, lines in tables(figures):
        print(f"\n{title}")
        widths = [max(len(line[i]) for line in (headings, *lines)) for i in range(len(headings))]
        for line in (headings, *lines):
            print("  ".join(text.rjust(width) if i else text.ljust(width)
                            for i, (text, width) in enumerate(zip(line, widths, strict=True))).rstrip())


@contextlib.contextmanager
def progress() -> Iterator[Callable[[float, str], None]]:
    """Yields show(share, text): a bar on a terminal that rich can draw on, else a line for each phase."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
                       console=Console(stderr=True), transient=True, auto_refresh=False)
        with bar:
            task = bar.add_task("starting", total=1.0)
            yield lambda share, text: bar.update(task, description=text, completed=share, refresh=True)
        return
    said = ""

    def line(share: float, text: str) -> None:
        nonlocal said
        if text != said:
            said = text
            print(f"soak: {text}, {share:.0%}", file=sys.stderr, flush=True)

    yield line


def main(arguments: list[str] | None = None, *, more: tuple[Maker, ...] = ()) -> int:
    """Soak, show, write. `more`: creators beyond those that linmem has.

    Returns
    -------
    int
        0 if nothing was wrong; 1 for a finding. A hang of the main thread, and a crash, end the process at once.
    """
    parser = argparse.ArgumentParser("python -m linmem.bench.soak", description="Use all of linmem at once, for"
                                     " minutes, and compare every byte with a model.")
    parser.add_argument("--minutes", type=float, default=1.0, metavar="N", help="how long; fractions are fine")
    parser.add_argument("--seed", type=int, metavar="N", help="of all that is random; chosen and printed by default")
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="that do all this at once (default: 8)")
    parser.add_argument("--json", type=file_name, metavar="FILE", help="write all figures")
    parser.add_argument("--hang", type=float, default=120.0, metavar="SECONDS",
                        help="after which a step is taken for a hang (default: 120)")
    args = parser.parse_args(arguments)
    if not args.minutes > 0 or args.threads < 1 or not args.hang > 0:
        parser.error("--minutes, --threads and --hang must be above 0")
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    again = f"--seed {seed} --threads {args.threads} --minutes {args.minutes:g}"
    print(f"soak: {again}; {report.in_short(report.machine())}", file=sys.stderr, flush=True)

    if wasmtime is None:
        print("soak: without guests: wasmtime is not installed", file=sys.stderr)
    faulthandler.enable()
    if hasattr(signal, "SIGALRM"):      # which ends children that hang; see Worker.use_all
        faulthandler.register(signal.SIGALRM, chain=True)
    # Each arena of glibc's malloc holds inaccessible address space, which would pass for a memory's.
    m_arena_max = -8
    _call_malloc("mallopt", m_arena_max, 1)
    with warnings.catch_warnings():
        # That a fork in a process with threads may hang is what is tried here.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        # With it a collection could come while a child's wasmtime may not be entered; Worker.collect does it.
        collected = gc.isenabled()
        gc.disable()
        soak = Soak(minutes=args.minutes, seed=seed, threads=args.threads, hang=args.hang, more=more)
        try:
            with progress() as show:
                soak.run(show)
        finally:
            if collected:
                gc.enable()
    figures = soak.summary()
    if args.json:
        report.save_text(args.json, json.dumps(figures, indent=1) + "\n")
    if soak.failure:
        what, at_length = soak.failure
        print(f"\n{at_length}\nsoak: FAILED after {soak.took:.1f} s: {what}", file=sys.stderr)
        for worker in soak.workers:
            print(f"soak: {worker.name}: step {worker.steps}, doing {worker.doing}", file=sys.stderr)
        print(f"soak: again with: {again}", file=sys.stderr, flush=True)
        return 1
    show_tables(figures)
    print(f"\nsoak: ok: {in_short(figures)}")
    return 0


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # Not the interpreter's own end: after a finding a thread may still hang.
    os._exit(status) if status else sys.exit(0)
