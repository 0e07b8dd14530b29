"""Eight concurrent threads on everything that threads may share. Each call works, or raises a documented exception.

Each hammer runs for a part of a second (for seconds in profile "ci"; LINMEM_HAMMER_SECONDS sets another time). Each
thread must find its own bytes unchanged, and no resource may leak. Without a GIL the threads run in parallel; with a
GIL they are switched as often as possible.
"""

import contextlib
import gc
import os
import random
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import wasmtime
from support import NEEDS, PAGE, answer, build_extension, live_bytes, mappings, requires, round_up

import linmem
import linmem.wasmtime

THREADS = 8
SECONDS = float(os.environ.get("LINMEM_HAMMER_SECONDS", 3 if os.environ.get("HYPOTHESIS_PROFILE") == "ci" else 0.7))
# Bytes that the C library keeps for stacks of ended threads, and that the allocator keeps of freed memory. A leaked
# memory with a large reservation is larger.
SLACK = 64 << 20
LARGE = 1 << 30
# With ThreadSanitizer, no thread takes a snapshot while others write: linmem does not synchronise accesses to the bytes
# of a memory, so each such write would be reported as a race. The growth of the address space is not checked either,
# because the sanitizer's own tables grow.
SANITIZED = "libtsan" in os.environ.get("LD_PRELOAD", "")

# The documented exceptions of a call that loses a race against another thread, with texts that distinguish them from
# other causes.
PROMISED = [
    (ValueError, r"the memory is closed|a memory never shrinks|grow it before|has grown to"),
    (BufferError, r"exported buffer\(s\)"),
    (linmem.GrowError, r"maximum_byte_size\(\)|cannot move"),
    (linmem.LimitError, r"limit of \d+ bytes reached"),
    (linmem.PoolError, r"all \d+ slots of the pool are in use"),
    (TypeError, r"with protected pages"),
    (linmem.PageError, r"prefault of"),
]


def is_promised(error):
    return any(isinstance(error, kind) and re.search(words, str(error)) for kind, words in PROMISED)


def hammer(*works, seconds=None, enough=lambda calls, refused: True):
    """Runs each work(rng) repeatedly in its own thread. Returns the number of calls and the number of refused calls.

    Each function runs at least once. On a slow machine, the calls go on until `enough` is true, for at most one more
    minute. The first undocumented exception is raised here.
    """
    seconds = SECONDS if seconds is None else seconds
    ends = []
    start = threading.Barrier(len(works), action=lambda: ends.append(time.monotonic() + seconds))
    errors, counts = [], {}

    def done():
        late = time.monotonic() - ends[0]
        return errors or late > 60 or (
            late > 0 and enough(*(sum(numbers) for numbers in zip(*counts.copy().values(), strict=True))))

    def strike(n, work):
        rng = random.Random(n)
        calls = refused = 0
        try:
            start.wait(60)
            while not calls or not done():
                calls += 1
                try:
                    work(rng)
                except Exception as error:
                    if not is_promised(error):
                        raise
                    refused += 1
                counts[n] = calls, refused
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=strike, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads), "a thread is stuck"
    if errors:
        raise errors[0]
    return sum(calls for calls, _ in counts.values()), sum(refused for _, refused in counts.values())


def some_refused(calls, refused):
    return 0 < refused < calls


def vm_size():
    return int(re.search(r"^VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1]) << 10


def open_files():
    """The names of the open files. ThreadSanitizer opens libraries to look up names in its suppressions, and keeps them
    open."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):      # the descriptor of the listing itself
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(name for name in names if not (SANITIZED and ".so" in name))


def what_the_os_shows():
    gc.collect()
    if not NEEDS["maps"][0]:
        return None
    ours = sum(m.name == "[anon:linmem]" for m in mappings()) if NEEDS["names"][0] else 0
    return live_bytes(), ours, open_files(), vm_size()


@pytest.fixture(autouse=True)
def all_is_given_back():
    """Checks that a test leaves the OS's counts of mappings, descriptors and address space unchanged."""
    linmem.PoolingCreator().create(PAGE).close()        # opens the descriptors that stay open
    hammer(*[lambda rng: time.sleep(0.01)] * THREADS, seconds=0.01)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    before = what_the_os_shows()
    yield
    sys.setswitchinterval(interval)
    after = what_the_os_shows()
    if before is not None:
        assert after[:3] == before[:3], "(bytes kept inaccessible, mappings, descriptors)"
        assert SANITIZED or after[3] - before[3] < SLACK, f"{after[3] - before[3]} bytes more of address space"


class Delegate(linmem.LinearMemory):
    """A memory that linmem knows only through the methods of the trait."""

    def __init__(self, *request):
        self.inner = linmem.MmapCreator().new_memory(*request)

    def byte_size(self):
        return self.inner.byte_size()

    def byte_capacity(self):
        return self.inner.byte_capacity()

    def maximum_byte_size(self):
        return self.inner.maximum_byte_size()

    def grow_to(self, new_size):
        self.inner.grow_to(new_size)

    def as_ptr(self):
        return self.inner.as_ptr()

    def wasm_accessible(self):
        return self.inner.wasm_accessible()


class Delegating(linmem.MemoryCreator):
    def new_memory(self, *request):
        return Delegate(*request)


class Handing(linmem.MemoryCreator):
    def new_memory(self, *request):
        return linmem.MmapCreator().new_memory(*request)


class Chains:
    """Every creator and adaptor, alone and in chains, and the figures that each must show at the end."""

    def __init__(self, image):
        self.image = image
        self.mmap = linmem.MmapCreator()
        resets = ["adaptive", "zero", "discard"] + ["scan"] * NEEDS["scans"][0]
        self.pools = {reset: linmem.PoolingCreator(reset=reset, check=True, max_unused_warm=4) for reset in resets}
        self.pools["of an image"] = linmem.PoolingCreator(image=image, check=True, max_unused_warm=3)
        self.pools["small"] = linmem.PoolingCreator(slots=3, when_full="error", keep_resident=2 * PAGE)
        self.limit = linmem.LimitingCreator(self.pools["adaptive"], 60 * 40 * PAGE)
        self.below = linmem.StatisticsCreator(linmem.MmapCreator(prefault=True), history=16)
        self.pools["between"] = linmem.PoolingCreator(linmem.LimitingCreator(self.below, 1 << 40), max_unused_warm=2)
        self.above = linmem.StatisticsCreator(linmem.TrackingCreator(self.pools["between"]), history=16)
        python = [linmem.PythonCreator(Handing()), linmem.StatisticsCreator(linmem.PythonCreator(Delegating()))]
        self.creators = [self.mmap, self.limit, self.above, *self.pools.values(), *python]

    def make(self, rng, minimum, maximum, reserve):
        by = rng.choice(self.creators)
        image = self.image if rng.random() < 0.3 or by is self.pools["of an image"] else None
        mem = by.create(minimum, maximum, reserve, PAGE, image=image, may_move=True)
        want = bytes(self.image.offset) + bytes(self.image) if image else b""
        assert bytes(mem) == want.ljust(len(mem), b"\0"), "a new memory does not hold what it is to start from"
        return mem

    def watch(self, rng):
        """Calls of the creators' owner while other threads use the creators."""
        pool = rng.choice([*self.pools.values()])
        stats = pool.stats()
        assert stats["live"] >= stats["pinned"] >= 0
        assert stats["rejected"] == 0
        pool.trim(rng.choice((0, PAGE, 1 << 30)))
        for book in (self.above, self.below):
            now = book.statistics()
            assert now["peak_bytes"] >= now["current_bytes"] >= 0
            assert now["peak_count"] >= now["current_count"] >= 0
            for record in book.memories():
                assert record["size"] >= record["first_size"]
                assert record["peak_resident"] <= 48 * PAGE, "more than any memory here has: another's pages"
        assert self.limit.used_bytes <= self.limit.peak_bytes <= self.limit.limit_bytes
        if rng.random() < 0.1:
            pool.warm(1, linmem.MemoryType(1, 2), reserved_size_in_bytes=round_up(1 << 18),
                      guard_size_in_bytes=round_up(65536))

    def check_over(self):
        gc.collect()
        for pool in self.pools.values():
            pool.trim()
            stats = pool.stats()
            assert (stats["live"], stats["warm"], stats["cold"], stats["rejected"]) == (0, 0, 0, 0)
        assert self.limit.used_bytes == 0
        for book in (self.above, self.below):
            assert (book.statistics()["current_count"], book.statistics()["current_bytes"]) == (0, 0)
        assert self.image.info().memories == 0


@pytest.fixture
def chains():
    image = linmem.Image.from_bytes(random.Random(1).randbytes(PAGE + 7), PAGE)
    made = Chains(image)
    yield made
    made.check_over()
    vars(made).clear()          # pytest keeps the object for longer


# -- without wasmtime ----------------------------------------------------------------------------------------------

def use_alone(chains, n, rng):
    """Uses a memory that no other thread knows: through growth, a snapshot and a restore, it must hold only this
    thread's bytes."""
    mark = bytes([n + 1])
    reserve = rng.choice((0, 16 * PAGE, LARGE))
    with chains.make(rng, 4 * PAGE, 40 * PAGE, reserve) as mem:
        first = bytes(mem)
        mem.write(PAGE // 2, mark * PAGE)
        here = first[:PAGE // 2] + mark * PAGE + first[PAGE // 2 + PAGE:]
        larger = rng.randrange(4 * PAGE, 30 * PAGE)
        mem.grow_to(larger)
        here = here.ljust(larger, b"\0")
        assert bytes(mem) == here
        if rng.random() < 0.3:
            kept = mem.snapshot()
            mem.write(rng.randrange(larger - PAGE), mark * PAGE)
            mem.restore(kept)
            assert bytes(mem) == here
            assert mem.dirty_pages(kept) == []
        if rng.random() < 0.3 and mem.info().kind == "mmap":
            mem.protect(0, PAGE, rng.choice(("r", "none")))
            mem.prefault(2 * PAGE, PAGE)
            if NEEDS["discard_any_protection"][0]:
                mem.discard(3 * PAGE, PAGE)


def use_in_common(chains, cells, n, rng):
    """Uses a memory that all threads share. Each thread has 32 bytes, and the memory may be closed at any time."""
    at, mark = 32 * n, bytes([n + 1]) * 32
    place = rng.randrange(len(cells))
    if rng.random() < 0.15:
        cells[place] = chains.make(rng, 4 * PAGE, 40 * PAGE, rng.choice((0, 16 * PAGE, LARGE)))
    mem = cells[place]
    match rng.randrange(10):
        case 0 | 1:
            mem.write(at, mark)
            assert mem.read(at, 32) == mem[at:at + 32] == mark
            assert mem[at] == n + 1
        case 2 | 3:
            with memoryview(mem) as view:
                size = len(view)
                view[at:at + 32] = mark
                mem.grow_to(mem.byte_capacity())
                assert view[at:at + 32] == mark
                assert len(view) == size <= len(mem)
        case 4:
            with mem.view("<Q", at, 4) as view:
                view[0] = view[3] = 0x0101010101010101 * (n + 1)
                assert view.tolist() in ([view[0], 0, 0, view[0]], [view[0]] * 4)
        case 5 | 6:
            size = len(mem)
            mem.grow_to(size + rng.randrange(3 * PAGE))
            assert len(mem) >= size
        case 7:
            info = mem.info()
            assert info.byte_size <= info.committed <= info.byte_capacity or info.kind == "python"
            assert info.resident is None or info.resident <= info.byte_capacity
            reach = mem.wasm_accessible()
            assert len(reach) >= info.byte_size + PAGE
        case 8 if not SANITIZED:
            held = bytes(mem.snapshot())[at:at + 32]
            assert set(held) <= {0, n + 1} or chains.image.offset < at + 32
        case 9:
            mem.close()
            assert mem.closed


def test_memories_of_every_creator_work_with_eight_threads_separately_and_shared(chains):
    rng = random.Random(0)
    cells = [chains.make(rng, 4 * PAGE, 40 * PAGE, 16 * PAGE) for _ in range(4)]

    def work(n):
        def once(rng):
            for _ in range(4):
                use_in_common(chains, cells, n, rng)
            use_alone(chains, n, rng)
        return once

    calls, refused = hammer(*map(work, range(THREADS - 1)), chains.watch, enough=some_refused)
    assert 0 < refused < calls
    cells.clear()


def test_no_call_meets_a_page_that_another_thread_has_just_made_inaccessible(chains):
    """The test itself accesses no bytes. The calls that access bytes must not hit a protected page."""
    whole = 8 * PAGE
    image = chains.image

    def fresh():
        return image.new_memory(40 * PAGE, minimum=whole, reserve=16 * PAGE, may_move=True)

    cells = [fresh() for _ in range(3)]

    def work(rng):
        place = rng.randrange(len(cells))
        mem = cells[place]
        match rng.randrange(14):
            case 0 | 1 | 2:
                mem.protect(0, rng.choice((PAGE, whole)), rng.choice(("none", "r")))
            case 3 | 4 | 5:
                mem.protect(0, mem.byte_size(), "rw")
            case 6:
                mem.snapshot()
            case 7:
                mem.restore(image)
            case 8:
                mem.dirty_pages(image)
            case 9:
                image.diff(image.new_memory())
            case 10:
                mem.discard(0, rng.choice((PAGE, whole)))
            case 11:
                mem.prefault(0, whole)
            case 12:
                assert mem.info().exports == 0
            case 13:
                if rng.random() < 0.2:
                    mem.grow_to(mem.byte_size() + PAGE)
                elif rng.random() < 0.2:
                    mem.close()
                    cells[place] = fresh()

    calls, refused = hammer(*[work] * THREADS, enough=some_refused)
    assert 0 < refused < calls
    for mem in cells:
        mem.close()


def test_a_growth_that_moves_waits_for_others_and_only_an_exported_buffer_refuses_it():
    book = linmem.StatisticsCreator(linmem.MmapCreator())

    def fresh():
        mem = book.create(PAGE, 200 * PAGE, 0, PAGE, may_move=True)
        mem.write(0, b"x" * PAGE)
        return mem

    cell = [fresh()]
    moves = [0]

    def mover(rng):
        mem = cell[0]
        base = mem.as_ptr()
        time.sleep(rng.random() / 1000)
        try:
            mem.grow_to(9 * PAGE)       # grows past the capacity once; the new capacity holds all later growths
        except BufferError as error:
            raise AssertionError(f"no buffer is exported here: {error}") from error
        moves[0] += mem.as_ptr() != base
        cell[0] = fresh()

    def reader(rng):
        mem = cell[0]
        assert mem.read(0, PAGE) == b"x" * PAGE
        assert mem[PAGE - 1] == 120
        mem[PAGE - 1] = 120
        mem.write(1, b"x" * 99)
        info = mem.info()
        assert (info.exports, info.base % PAGE) == (0, 0)
        reach = mem.wasm_accessible()
        assert len(reach) % PAGE == 0

    def watcher(rng):
        for record in book.memories():
            assert record["peak_resident"] <= round_up(record["size"]) + 8 * PAGE, "another's pages were counted"

    hammer(mover, *[reader] * (THREADS - 3), watcher, watcher, enough=lambda *_: moves[0] > 0)
    assert moves[0] > 0
    assert book.statistics()["failures"] == 0
    cell[0] = fresh()
    with memoryview(cell[0]), pytest.raises(BufferError, match=r"and 1 exported buffer\(s\) point into it"):
        cell[0].grow_to(9 * PAGE)
    cell.clear()
    assert book.statistics()["current_count"] == 0


def test_threads_that_grow_one_memory_leave_it_at_the_largest_size():
    steps = 200
    with linmem.create(PAGE, maximum=(steps + 1) * PAGE) as mem:
        base = mem.as_ptr()

        def grow(_):
            for n in range(2, steps + 2):
                try:
                    mem.grow_to(n * PAGE)
                except ValueError:      # another thread was faster
                    assert mem.byte_size() > n * PAGE

        with ThreadPoolExecutor(THREADS) as threads:
            assert len(list(threads.map(grow, range(THREADS)))) == THREADS
        assert mem.byte_size() == (steps + 1) * PAGE
        assert mem.as_ptr() == base
        assert not any(mem[::PAGE])


def test_a_handle_that_another_thread_closes_is_not_closed_while_a_view_of_it_exists():
    mem, closed = linmem.create(PAGE), []

    def close():
        nonlocal mem
        while viewer.is_alive():
            try:
                mem.close()
            except BufferError:
                continue
            mem = linmem.create(PAGE)

    def view():
        for _ in range(40000):
            mine = mem
            try:
                with memoryview(mine):
                    closed.append(mine.closed)
            except ValueError:
                pass

    viewer, closer = threading.Thread(target=view), threading.Thread(target=close)
    viewer.start()
    closer.start()
    viewer.join()
    closer.join()
    assert len(closed) > 0
    assert not any(closed)


def test_one_grows_while_others_view_and_another_closes():
    ended = [0] * THREADS

    def work(n):
        def once(rng):
            nonlocal mem
            mine = mem
            try:
                if n == 0:
                    mine.grow_to(mine.byte_size() + PAGE)
                elif n == 1 and rng.random() < 0.3:
                    mine.close()
                    mem = linmem.create(PAGE, maximum=1000 * PAGE, reserve=1000 * PAGE)
                    ended[n] += 1
                else:
                    with memoryview(mine) as view:
                        at = n * 8
                        view[at:at + 8] = bytes([n]) * 8
                        assert view[at:at + 8] == bytes([n]) * 8
                        assert not mine.closed
                        with pytest.raises(BufferError, match=r"cannot close the memory: [1-9]\d* exported"):
                            mine.close()
                    ended[n] += 1
            except linmem.GrowError:
                mine.close()
                mem = linmem.create(PAGE, maximum=1000 * PAGE, reserve=1000 * PAGE)
        return once

    mem = linmem.create(PAGE, maximum=1000 * PAGE, reserve=1000 * PAGE)
    hammer(*map(work, range(THREADS)), enough=lambda *_: all(ended[1:]))
    assert all(ended[1:]), ended
    mem.close()


def test_a_closed_handle_stays_closed_for_every_thread():
    """Several threads close and use one memory concurrently. After a close, no thread can use the memory."""
    def work(rng):
        mem = cell[0]
        if rng.random() < 0.2:
            mem.close()
            assert mem.closed
            with pytest.raises(ValueError, match="closed"):
                mem.byte_size()
            cell[0] = linmem.create(PAGE, reserve=0, may_move=True)
        else:
            mem.write(0, b"abc")
            assert mem.read(0, 3) == b"abc"
            repr(mem)

    cell = [linmem.create(PAGE, reserve=0, may_move=True)]
    hammer(*[work] * THREADS)
    cell[0].close()


# -- images --------------------------------------------------------------------------------------------------------

def test_threads_that_ask_an_image_for_the_first_time_at_once_get_the_same_answer(tmp_path):
    """The first request for the digest and the runs computes them, in any thread."""
    data = random.Random(5).randbytes(3 * PAGE) + bytes(5 * PAGE) + b"end"
    known = linmem.Image.from_bytes(data, PAGE)
    known.save(tmp_path / "image")
    want = (known.digest, known.runs(), hash(known))
    seen = []

    def rounds():
        kinds = [lambda: linmem.Image.from_bytes(data, PAGE), lambda: linmem.Image.open(tmp_path / "image"),
                 lambda: linmem.Image.from_pieces([(PAGE, data)], len(data), PAGE)]
        if NEEDS["maps_images"][0]:
            kinds.append(lambda: linmem.Image.from_fd(known.fileno(), known.size, known.offset))
        while True:
            yield from kinds

    makers = rounds()
    cell = [next(makers)()]
    turn = threading.Barrier(THREADS, action=lambda: cell.__setitem__(0, next(makers)()))

    def work(rng):
        turn.wait(60)
        image = cell[0]
        acts = [lambda: image.digest, image.runs, lambda: hash(image), lambda: image == known]
        got = dict(zip("abcd", [act() for act in acts], strict=True))
        assert (got["a"], got["c"], got["d"]) == (want[0], want[2], True)
        assert sum(size for _, size in got["b"]) >= 3 * PAGE
        seen.append(image.info().memories)

    errors = []

    def guarded():
        try:
            for _ in range(40):
                work(None)
        except BaseException as error:
            errors.append(error)
            turn.abort()

    threads = [threading.Thread(target=guarded) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert len(seen) == 40 * THREADS


def test_deltas_between_memories_of_one_image_show_only_the_writes_of_their_own_thread():
    image = linmem.Image.from_bytes(random.Random(6).randbytes(6 * PAGE))
    pool = linmem.PoolingCreator(image=image, check=True)

    def work(n):
        def once(rng):
            with pool.create(6 * PAGE, 20 * PAGE, 20 * PAGE, PAGE) as mem:
                at = rng.randrange(6 * PAGE - 100)
                mem.write(at, bytes([n]) * 100)
                if rng.random() < 0.5:
                    mem.grow_to(9 * PAGE)
                    mem[8 * PAGE] = 255
                delta = image.diff(mem)
                made = image.apply(delta)
                assert bytes(made) == bytes(mem)
                with image.new_memory(20 * PAGE, reserve=20 * PAGE) as other:
                    other.apply(delta)
                    assert bytes(other) == bytes(mem)
                    assert other.dirty_pages(made) == []
                mem.restore(image, zero_grown=True)
                assert bytes(mem)[:6 * PAGE] == bytes(image)
        return once

    hammer(*map(work, range(THREADS)))
    pool.trim()
    assert image.info().memories == 0


@requires("dask")
def test_tasks_that_ask_a_worker_for_its_pool_at_once_share_it():
    from linmem import dask as linmem_dask
    images = [linmem.Image.from_bytes(bytes([n]) * PAGE) for n in range(1, 4)]

    def work(n):
        def once(rng):
            image = rng.choice(images)
            with linmem_dask.memory(image, 8 * PAGE, reset="zero") as mem:
                assert bytes(mem) == bytes(image)
                mem.write(0, bytes([100 + n]) * PAGE)
                mem.grow_to(3 * PAGE)
                assert set(mem.read(0, PAGE)) == {100 + n}
            assert linmem_dask.worker_pool(image, reset="zero") is linmem_dask.worker_pool(image, reset="zero")
        return once

    hammer(*map(work, range(THREADS)))
    pools = [linmem_dask.worker_pool(image, reset="zero") for image in images]
    assert len({id(pool) for pool in pools}) == len(images)
    assert [pool.stats()["live"] for pool in pools] == [0] * len(images)
    linmem_dask._pools.clear()


# -- with wasmtime -------------------------------------------------------------------------------------------------

WAT = """(module
  (memory (export "memory") 1 40)
  (global $count (export "count") (mut i32) (i32.const 0))
  (data (i32.const 16) "hello")
  (func (export "grow") (param i32) (result i32) local.get 0 memory.grow)
  (func (export "fill") (param i32 i32 i32)
    local.get 0 local.get 1 local.get 2 memory.fill
    global.get $count i32.const 1 i32.add global.set $count)
  (func (export "peek") (param i32) (result i32) local.get 0 i32.load8_u))"""


def wasm_creators():
    pool = linmem.PoolingCreator(check=True)
    budget = linmem.LimitingCreator(linmem.MmapCreator(), 1 << 40)
    return {"the pool": (pool, pool, None),
            "adaptors": (linmem.StatisticsCreator(budget), None, budget),
            "a creator in Python": (Delegating(), None, None)}


def strike_stores(creator):
    """Until the time is over, each thread makes stores of one engine. Another thread often drops the last reference."""
    config = wasmtime.Config()
    linmem.wasmtime.install(config, creator)
    for name, value in (("memory_reservation", 1 << 28), ("memory_guard_size", 1 << 16)):
        if hasattr(type(config), name):
            setattr(config, name, value)
    engine = wasmtime.Engine(config)
    prepared = linmem.wasmtime.prepare(engine, WAT)
    plain = wasmtime.Module(engine, WAT)
    heirs = []                                  # stores and handles that another thread drops

    def end(rng):
        try:
            heir = heirs.pop()
        except IndexError:
            time.sleep(0.001)
            return
        store, handle, mark = heir
        heir.clear()
        closed = rng.random() < 0.5
        if closed:
            store.close()
        del store       # without a GIL, the object may stay alive until its own thread runs again
        assert handle.read(100, 50) == bytes([mark]) * 50, "a handle that outlives its store has lost its bytes"
        if closed:
            handle.close()

    def work(n):
        mark = n + 1

        def once(rng):
            store = wasmtime.Store(engine)
            instance = prepared.instantiate(store) if rng.random() < 0.5 else wasmtime.Instance(store, plain, [])
            exports = instance.exports(store)
            handle = linmem.wasmtime.linear_memory(store, exports["memory"])
            assert handle.read(0, 32) == bytes(16) + b"hello" + bytes(11)
            assert handle.read(32, 65504).count(0) == 65504, "bytes of another store"
            with memoryview(handle) as view:
                kept = linmem.wasmtime.Snapshot.take(store, instance, partial=True) if rng.random() < 0.3 else None
                exports["fill"](store, 100, mark, 50)
                assert view[100:150] == bytes([mark]) * 50
                if kept is not None:
                    kept.restore(store)
                    assert handle.read(100, 50) == bytes(50)
                    exports["fill"](store, 100, mark, 50)
                assert exports["grow"](store, 3) == 1
                assert handle.byte_size() == 4 * 65536
                assert exports["peek"](store, 149) == mark == view[149]
                assert exports["grow"](store, 100) == -1
                with pytest.raises(linmem.OwnedError):
                    handle.grow_to(1 << 20)
                with pytest.raises(BufferError):
                    handle.close()
            heir = [store, handle, mark]
            del store, instance, exports, kept      # the heir's references are the last ones
            heirs.append(heir)
            if len(heirs) > 40:
                end(rng)
        return once

    calls, refused = hammer(*map(work, range(THREADS - 2)), end, end, enough=lambda calls, _: calls > THREADS)
    assert refused == 0
    assert calls > THREADS
    while heirs:
        end(random.Random(0))


@pytest.mark.parametrize("kind", ["the pool", "adaptors", "a creator in Python"])
def test_eight_threads_share_an_engine_and_drop_each_others_stores(kind):
    creator, pool, budget = wasm_creators()[kind]
    strike_stores(creator)
    gc.collect()
    if pool is not None:
        stats = pool.stats()
        assert (stats["live"], stats["pinned"], stats["rejected"]) == (0, 0, 0)
        pool.trim()
    elif budget is not None:
        assert budget.used_bytes == 0
        assert creator.statistics()["current_count"] == 0


def test_a_growth_from_python_does_not_move_a_memory_that_wasm_has_meanwhile():
    """A creator in Python passes on a memory that one of its other threads grows. These growths must fail as soon as
    wasm has the memory."""
    newest = [None]             # other threads read the item at any time, so it is replaced and never removed

    class Keeping(linmem.MemoryCreator):
        def new_memory(self, *request):
            newest[0] = linmem.MmapCreator().new_memory(*request)
            return newest[0]

    config = wasmtime.Config()
    linmem.wasmtime.install(config, Keeping())
    engine = wasmtime.Engine(config)
    module = wasmtime.Module(engine, WAT)
    owned = [0]

    def meddle(rng):
        mem = newest[0]
        if mem is None:
            return
        try:
            mem.grow_to(65536)                  # the current size, so the call has no effect while it is allowed
        except linmem.OwnedError:
            owned[0] += 1
        except ValueError:                      # wasm has grown the memory, or the memory is closed
            pass

    def instantiate(rng):
        store = wasmtime.Store(engine)
        exports = wasmtime.Instance(store, module, []).exports(store)
        mem = newest[0]
        base = linmem.wasmtime.linear_memory(store, exports["memory"]).as_ptr()
        assert exports["grow"](store, 1) == 1
        assert mem.as_ptr() == base
        store.close()
        mem.close()

    hammer(instantiate, meddle, meddle, enough=lambda *_: owned[0] > 0)
    assert owned[0] > 0
    newest.clear()


# -- fork ----------------------------------------------------------------------------------------------------------

CHURN = """
    import os, random, sys, threading, time, traceback, warnings
    import linmem
    warnings.simplefilter("ignore", DeprecationWarning)     # this test forks with threads on purpose
    book = linmem.StatisticsCreator(linmem.MmapCreator(), history=4)
    pool = linmem.PoolingCreator(book, max_unused_warm=1)
    stop, failed = threading.Event(), []

    def churn(seed):
        rng = random.Random(seed)
        try:
            while not stop.is_set():
                mems = [rng.choice((pool, book)).create(P, 99 * P, 0, P, may_move=True) for _ in range(3)]
                for mem in mems:
                    mem.grow_to(rng.randrange(P, 9 * P))        # moves
                    mem.write(0, b"x" * P)
                for mem in mems:
                    mem.close()
                pool.trim(P)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=churn, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(ROUNDS):
            pid = fork()
            until = time.monotonic() + 60
            while True:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended or time.monotonic() > until:
                    break
                time.sleep(0.0005)
            if not ended:
                os.kill(pid, 9)
                os.waitpid(pid, 0)
            assert ended, "the child waits for a lock that nobody has"
            assert status == 0, status
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed, failed
    print("whole")
"""


@requires("fork")
def test_no_operation_of_other_threads_during_a_fork_is_half_done_in_the_child():
    assert answer(f"""
    P, ROUNDS = {PAGE}, 30

    def work():
        for _ in range(5):
            mems = [by.create(P, 99 * P, 0, P, may_move=True) for by in (pool, pool, pool, pool, book)]
            for mem in mems:
                assert bytes(mem).count(0) == P
                mem.grow_to(5 * P)
                mem.write(0, b"c" * P)
            for mem in mems:
                mem.close()
        pool.trim()
        stats = pool.stats()
        assert stats["warm"] == stats["cold"] == 0
        assert len(book.memories()) >= 4
        assert book.statistics()["current_count"] >= 0

    def fork():
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        return pid
    """ + CHURN, timeout=300) == "whole"


FORKING = """
# cython: language_level=3
cimport linmem

cdef extern from "<unistd.h>" nogil:
    int c_fork "fork"()
    void _exit(int status)


def fork(linmem.NativeCreator creator not None, size_t page):
    # The child calls only C functions, and no Python.
    cdef linmem.memory_spec spec
    cdef linmem.failure why
    cdef linmem.memory* m
    cdef int n, pid
    spec.minimum = page
    spec.maximum = 99 * page
    spec.reservation = 0
    spec.guard = page
    spec.page_size = 1
    spec.is_64 = True
    spec.is_shared = False
    spec.image = NULL
    spec.watched = False
    spec.may_move = True
    with nogil:
        pid = c_fork()
        if pid == 0:
            for n in range(20):
                if creator.make(&spec, &m, &why):
                    _exit(1)
                if m.base[0] or linmem.memory_grow_to(m, 5 * page, &why) or m.base[5 * page - 1]:
                    _exit(2)
                m.base[0] = 1
                linmem.memory_release(m)
            _exit(0)
    return pid
"""


@requires("fork", "compiler")
def test_a_fork_by_c_code_without_pythons_handlers_leaves_no_lock_held(tmp_path):
    build_extension(tmp_path, "forking", FORKING)
    assert answer(f"""
    P, ROUNDS = {PAGE}, 200
    import sys
    sys.path.insert(0, {str(tmp_path)!r})
    import forking
    fork = lambda: forking.fork(pool, P)
    """ + CHURN, timeout=300) == "whole"
