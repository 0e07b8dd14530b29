"""A pool in a server that runs for a long time: exact figures, returned memory, bounds, and isolation of tenants."""

import errno
import gc
import random
import sysconfig
import threading
import time
from fractions import Fraction

import pytest
from support import (
    LIBC,
    NEEDS,
    PAGE,
    REAL_PAGE,
    answer,
    build_extension,
    descriptors,
    failing,
    live_bytes,
    load_extension,
    release_idle_slots,
    requires,
    resident_within,
    whole,
)

import linmem
import linmem.metrics
from linmem._core import pool as _pool

MMAP = linmem.MmapCreator()
SHAPE = {"maximum": 64 * PAGE, "reserve": 64 * PAGE, "guard": PAGE}


@pytest.fixture(autouse=True)
def _limits_of_the_process_stay():
    release_idle_slots()
    yield
    linmem.set_pool_limits()
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        # CPython 3.13 never frees the function of a started thread, and so keeps the function's closure.
        for each in gc.get_objects():
            if type(each) is linmem.PoolingCreator:
                each.trim()


def used(pool, pages_written=1, minimum=1, **how):
    """Makes a memory of the pool, writes its first pages and drops it. Returns its whole reservation."""
    with pool.create(minimum * PAGE, **{**SHAPE, **how}) as mem:
        if pages_written > minimum:
            mem.grow_to(pages_written * PAGE)
        mem.write(0, b"x" * pages_written * PAGE)
        return whole(mem)


def idle(pool):
    stats = pool.stats()
    return stats["warm"] + stats["cold"]


# -- the state of the memory on hand-out --------------------------------------------------------------------------

@pytest.mark.parametrize("warm", [0, 100])
def test_every_field_of_the_struct_has_its_value_from_the_first_hand_out(warm):
    class Lowering(linmem.MemoryCreator):
        def new_memory(self, *arguments):
            return pool.new_memory(*arguments)

    pool = linmem.PoolingCreator(max_unused_warm=warm)
    ty = linmem.MemoryType(PAGE, 64 * PAGE, page_size=1)
    image = linmem.Image.from_bytes(b"i" * PAGE)

    def first():
        mem = pool.new_memory(ty, PAGE, 64 * PAGE, 64 * PAGE, PAGE)
        mem.read(0, 1)
        return mem

    mem = first()
    before, base = _pool._struct_of(mem), mem.as_ptr()
    mem.close()
    python = linmem.PythonCreator(Lowering())
    for abuse in (lambda m: m.grow_to(9 * PAGE), lambda m: m.protect(0, PAGE, "r"), lambda m: m.restore(image),
                  lambda m: m.discard(0, PAGE), lambda m: m.write(0, b"x")):
        mem = first()
        abuse(mem)
        mem.close()
        mem = first()
        assert (mem.as_ptr(), _pool._struct_of(mem)) == (base, before)
        mem.close()
    python.new_memory(ty, PAGE, 64 * PAGE, 64 * PAGE, PAGE).close()
    mem = first()
    assert _pool._struct_of(mem) == before


# -- faults -----------------------------------------------------------------------------------------------------------

def test_a_pool_that_closes_while_a_slot_is_made_cold_leaks_no_slot():
    start = live_bytes() if NEEDS["maps"][0] else 0
    for _ in range(60):
        pool = linmem.PoolingCreator(max_unused_warm=0)
        mems = [pool.create(PAGE, reserve=1 << 24) for _ in range(4)]
        gate = threading.Barrier(2)

        def close(mems=mems, gate=gate):
            gate.wait()
            while mems:
                mems.pop().close()

        thread = threading.Thread(target=close)
        thread.start()
        gate.wait()
        del pool
        thread.join()
        del close, thread
    gc.collect()
    if NEEDS["maps"][0]:
        assert live_bytes() == start


@requires("descriptors", "maps_images")
def test_slots_of_an_unreachable_image_are_released_with_the_image():
    pool = linmem.PoolingCreator()
    before = descriptors()
    for n in range(40):
        image = linmem.Image.from_bytes(bytes([n + 1]) * (4 * PAGE))
        image.new_memory(creator=pool).close()
        assert idle(pool) == 1
        assert linmem.metrics.read(pool)["image_bytes"] == 4 * PAGE
        live = image.new_memory(creator=pool)
        del image
        live.close()
        assert idle(pool) == 0
    assert descriptors() == before
    assert linmem.metrics.read(pool)["evictions"]["image"] == 40
    assert linmem.metrics.read(pool)["image_descriptors"] == 0


@requires("descriptors", "maps_images")
@pytest.mark.parametrize("make", ["purge", "trim"])
def test_slots_between_two_states_are_also_released_with_their_image(make):
    pool = linmem.PoolingCreator(max_unused_warm=1)
    before = descriptors()
    done = threading.Event()

    def churn():
        while not done.is_set():
            getattr(pool, make)()

    thread = threading.Thread(target=churn)
    thread.start()
    for n in range(1500):
        image = linmem.Image.from_bytes(bytes([1 + n % 255]) * (4 * PAGE))
        with image.new_memory(creator=pool) as mem:
            mem.write(0, b"x" * 4 * PAGE)
        del image, mem
    done.set()
    thread.join()
    assert (idle(pool), pool.stats()["live"], descriptors()) == (0, 0, before)


def test_all_idle_slots_of_an_image_and_no_others_are_released_with_the_image():
    pool = linmem.PoolingCreator(max_unused_warm=40)
    images = [linmem.Image.from_bytes(bytes([n + 1]) * (4 * PAGE)) for n in range(2)]
    mems = [pool.create(4 * PAGE + n % 3, image=image, domain=("a", None)[n % 2], **SHAPE)
            for n in range(24) for image in [*images, None]]
    while mems:
        mems.pop().close()
    figures = linmem.metrics.read(pool)
    assert (figures["warm"], figures["cold"]) == (40, 32)
    assert linmem.metrics.read(pool)["images"] == 2
    del images[0]
    figures = linmem.metrics.read(pool)
    assert (figures["warm"] + figures["cold"], figures["images"], figures["evictions"]["image"]) == (48, 1, 24)


@pytest.mark.parametrize("above", [linmem.StatisticsCreator, linmem.PoolingCreator, lambda upstream: upstream])
def test_a_request_that_cannot_succeed_takes_no_slot_from_others(above):
    budget = linmem.LimitingCreator(MMAP, 40 * PAGE)
    pool = linmem.PoolingCreator(above(budget))
    for mem in [pool.create(10 * PAGE, **SHAPE) for _ in range(3)]:
        mem.close()
    with pool.create(10 * PAGE, **SHAPE):
        before = pool.stats()
        for size in (31 * PAGE, 60 * PAGE):
            with pytest.raises(linmem.LimitError):
                pool.create(size, **SHAPE)
        after = pool.stats()
        assert [after[key] for key in ("warm", "cold", "live")] == [before[key] for key in ("warm", "cold", "live")]
        # A request evicts only as many slots as it needs, and the oldest slots first.
        with pool.create(15 * PAGE, **SHAPE):
            assert (pool.stats()["warm"], pool.stats()["cold"]) == (1, 1)


@pytest.mark.parametrize("between", [lambda c: c, linmem.StatisticsCreator, linmem.PoolingCreator])
def test_a_request_that_a_lower_budget_refuses_takes_no_slot_over_a_higher_budget(between):
    pool = linmem.PoolingCreator(linmem.LimitingCreator(between(linmem.LimitingCreator(MMAP, 40 * PAGE)), 60 * PAGE))
    for mem in [pool.create(10 * PAGE, **SHAPE) for _ in range(3)]:
        mem.close()
    mem = pool.create(PAGE, **SHAPE)
    for size in (41 * PAGE, 55 * PAGE, 60 * PAGE):
        with pytest.raises(linmem.LimitError):
            pool.create(size, **SHAPE)
        with pytest.raises(linmem.LimitError):
            mem.grow_to(size)
    assert (pool.stats()["warm"], pool.stats()["cold"]) == (3, 0)
    mem.grow_to(40 * PAGE)
    assert (pool.stats()["warm"], pool.stats()["cold"]) == (0, 3)


@pytest.mark.parametrize("size", [1 << 49, 1 << 60])
def test_a_module_that_requests_terabytes_takes_no_slot_from_others(size):
    pool = linmem.PoolingCreator()
    for mem in [pool.create(PAGE, **SHAPE) for _ in range(3)]:
        mem.close()
    with pytest.raises((linmem.PageError, OverflowError)):
        pool.create(size)
    assert pool.stats()["warm"] == 3


@pytest.mark.parametrize("pools", [1, 2])
def test_a_growth_takes_missing_bytes_of_its_budget_from_idle_slots_of_all_pools(pools):
    budget = linmem.LimitingCreator(MMAP, 40 * PAGE)
    over = [linmem.PoolingCreator(linmem.StatisticsCreator(budget)) for _ in range(pools)]
    for pool in over:
        for mem in [pool.create(10 * PAGE, **SHAPE) for _ in range(4 // pools - (pool is over[0]))]:
            mem.close()
    mem = over[0].create(5 * PAGE, **SHAPE)
    assert budget.used_bytes == 35 * PAGE
    mem.grow_to(20 * PAGE)
    assert budget.used_bytes == 40 * PAGE
    mem.grow_to(40 * PAGE)
    assert budget.used_bytes == 40 * PAGE
    with pytest.raises(linmem.LimitError):
        mem.grow_to(41 * PAGE)
    assert sum(pool.stats()["cold"] for pool in over) == 3
    assert over[0].upstream.statistics()["failures"] == 1


@pytest.mark.parametrize("chain", ["many", "two ways", "mixed"])
def test_idle_slots_charged_to_any_budget_give_up_the_missing_bytes(chain):
    tight = linmem.LimitingCreator(MMAP, 40 * PAGE)
    upstream = tight
    if chain == "many":
        for _ in range(6):
            upstream = linmem.LimitingCreator(upstream, 1 << 40)
        upstream = tight = linmem.LimitingCreator(upstream, 40 * PAGE)
    elif chain == "two ways":
        upstream = linmem.LimitingCreator(tight, 1 << 40)
        upstream = linmem.PoolingCreator(linmem.PythonCreator(Alternating(tight, upstream)), slots=1)
    else:
        upstream = linmem.PythonCreator(Alternating(tight, MMAP))
    pool = linmem.PoolingCreator(upstream, max_unused_warm=100)
    mems = [pool.create(10 * PAGE, **SHAPE) for _ in range(3 if chain != "mixed" else 6)]
    used = tight.used_bytes
    assert used == 30 * PAGE
    while mems:
        mems.pop().close()
    with tight.create(PAGE, **SHAPE) as mem:
        with pytest.raises(linmem.LimitError):
            mem.grow_to(41 * PAGE)
        assert pool.stats()["cold"] == 0
        mem.grow_to(25 * PAGE)
        assert (tight.used_bytes, pool.stats()["cold"]) == (35 * PAGE, 2 if chain != "mixed" else pool.stats()["cold"])
        mem.grow_to(40 * PAGE)
        assert tight.used_bytes == 40 * PAGE


class Alternating(linmem.MemoryCreator):
    """A creator whose memories come from its creators in turn."""

    def __init__(self, *creators):
        self.creators = creators
        self.made = 0

    def new_memory(self, *arguments):
        self.made += 1
        return self.creators[self.made % len(self.creators)].new_memory(*arguments)


def test_a_growth_that_the_os_refuses_is_retried_after_idle_slots_give_up_pages():
    pool = linmem.PoolingCreator()
    for mem in [pool.create(4 * PAGE, **SHAPE) for _ in range(2)]:
        mem.close()
    with linmem.create(PAGE, 64 * PAGE) as mem:
        with failing(1, errno.ENOMEM):
            mem.grow_to(2 * PAGE)
        assert (pool.stats()["warm"], pool.stats()["cold"]) == (1, 1)


@pytest.mark.parametrize("seed", range(6))
def test_budgets_and_sums_below_are_exact_under_any_churn(seed):
    rng = random.Random(seed)
    inner = linmem.LimitingCreator(MMAP, 1 << 40)
    sums = linmem.StatisticsCreator(inner)
    first = linmem.PoolingCreator(sums, max_unused_warm=rng.choice([0, 2, 100]), slots=6,
                                  reset=rng.choice(["adaptive", "zero", "discard"]))
    pools = [first]
    if seed % 2:
        pools.append(linmem.PoolingCreator(first, max_unused_warm=rng.choice([0, 1, 100]), slots=5))
    pool = pools[-1]
    alive = []
    for _ in range(400):
        act = rng.random()
        if act < 0.4 and len(alive) < 5:
            alive.append(pool.create(rng.choice([0, 1, 3 * PAGE + 5]), **SHAPE))
        elif act < 0.7 and alive:
            mem = rng.choice(alive)
            mem.grow_to(min(64 * PAGE, len(mem) + rng.randrange(9 * PAGE)))
        elif alive:
            alive.pop(rng.randrange(len(alive))).close()
        if rng.random() < 0.05:
            pool.purge()
        if rng.random() < 0.03:
            pool.trim()
        # Live memories count their size, warm slots count the size of their shape, and cold slots count zero.
        sizes = [len(mem) for mem in alive]
        for one in pools:
            for row in linmem.metrics.read(one)["shapes"]:
                sizes += [row["shape"]["minimum"]] * row["warm"]
        assert sums.statistics()["current_bytes"] == sum(sizes)
        assert inner.used_bytes == sum(-(-size // PAGE) * PAGE for size in sizes)
        assert all(record["size"] >= record["first_size"] for record in sums.memories())
    del mem
    alive.clear()
    while pools:
        pools.pop().trim()
        del pool
        pool = pools[-1] if pools else None
    del first
    gc.collect()
    assert (inner.used_bytes, sums.statistics()["current_bytes"]) == (0, 0)


def test_a_slot_that_grew_before_is_charged_the_current_size_of_its_guest():
    budget = linmem.LimitingCreator(MMAP, 200 * PAGE)
    pool = linmem.PoolingCreator(budget, max_unused_warm=1)
    used(pool, 60)
    with pool.create(PAGE, **SHAPE) as mem:
        assert budget.used_bytes == PAGE
        mem.grow_to(60 * PAGE)
        assert budget.used_bytes == 60 * PAGE
    pool.purge()
    assert (pool.stats()["cold"], budget.used_bytes) == (1, 0)


@requires("maps_images")
@pytest.mark.parametrize("warm", [0, 100])
def test_a_pool_over_a_pool_of_an_image_gives_every_tenant_the_image(warm):
    image = linmem.Image.from_bytes(b"image" * 1000)
    below = linmem.PoolingCreator(image=image)
    above = linmem.PoolingCreator(below, max_unused_warm=warm)
    for _ in range(4):
        with above.create(65536) as mem:
            assert mem.read(0, 5000) == b"image" * 1000
            mem.write(0, b"x" * 65536)
        if _ == 2:
            above.trim()
    above.trim()
    with above.create(65536) as mem:
        assert mem.read(0, 5000) == b"image" * 1000


def test_a_pool_over_an_image_pool_without_warm_slots_survives_trim():
    assert answer("""
        import linmem
        image = linmem.Image.from_bytes(b"image" * 1000)
        above = linmem.PoolingCreator(linmem.PoolingCreator(image=image), max_unused_warm=0)
        above.create(65536).close()
        above.trim()
        with above.create(65536) as mem:
            print(bytes(mem.read(0, 5)))
        """) == "b'image'"


@requires("maps")
def test_a_discard_gives_pages_back_also_where_the_image_is_all_zeros():
    image = linmem.Image.from_bytes(bytes(16 * PAGE))
    pool = linmem.PoolingCreator(image=image, reset="discard", keep_resident=PAGE)
    span = used(pool, 16, 16)
    assert resident_within(*span) == 0
    assert pool.stats()["resets"]["discard"] == 1


@requires("maps", "huge_pages")
def test_ranges_that_the_os_may_back_with_huge_pages_are_counted_so():
    pool = linmem.PoolingCreator(linmem.MmapCreator(huge_pages=True), reset="scan")
    with pool.create(16 << 20, reserve=16 << 20) as mem:
        span = whole(mem)
        for at in range(0, 16 << 20, 4 << 20):
            mem[at] = 1
    assert resident_within(*span) <= pool.stats()["resident"] <= 16 << 20
    assert pool.stats()["resident"] >= 4 * min(2 << 20, FLOOR_HUGE)


FLOOR_HUGE = linmem._os.pages.describe()["huge_page"] or PAGE


@requires("maps", "scans")
def test_page_tables_of_sparse_slots_are_counted_and_bounded():
    pool = linmem.PoolingCreator(reset="scan", max_resident=900 << 10)
    with pool.create(1 << 30, reserve=1 << 30) as mem:
        for at in range(0, 1 << 28, 2 << 20):
            mem[at] = 1
    figures = linmem.metrics.read(pool)
    assert (figures["warm"], figures["cold"], figures["page_tables"]) == (0, 1, 0)
    pool = linmem.PoolingCreator(reset="scan")
    with pool.create(1 << 30, reserve=1 << 30) as mem:
        for at in range(0, 1 << 28, 2 << 20):
            mem[at] = 1
    assert linmem.metrics.read(pool)["page_tables"] >= 128 * 4096


@requires("maps", "scan_ioctl", "large_space", "real_pages")
@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("grown", [True, False])
@pytest.mark.parametrize("reset", ["scan", "adaptive", "discard"])
def test_page_tables_of_written_and_of_only_read_pages_are_counted_as_the_os_counts_them(written, grown, reset):
    found = answer(f"""
        import linmem
        P, SIZE = {PAGE}, 4 << 30
        def tables():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmPTE"))
        pool = linmem.PoolingCreator(reset={reset!r}, keep_resident=1 << 40)
        mem = pool.create(P if {grown} else SIZE, maximum=SIZE, reserve=SIZE)
        before = tables()
        mem.grow_to(SIZE)
        with memoryview(mem) as view:
            for at in range(0, SIZE, 4 << 20):
                if {written}:
                    view[at] = 1
                else:
                    view[at]
        touched = tables()
        mem.close()
        for n in range(3):
            print(touched - before, tables() - before, linmem.metrics.read(pool)["page_tables"])
            pool.create(P if {grown} else SIZE, maximum=SIZE, reserve=SIZE).close()
        """)
    for line in found.splitlines():
        touched, now, said = map(int, line.split())
        assert now <= said + 4096 * 2, found
        assert touched - 4096 * 4 <= said <= touched * 1.01 + 4096 * 8, found


def test_the_pools_of_a_process_have_one_bound_together():
    pools = [linmem.PoolingCreator(reset="zero") for _ in range(5)]
    linmem.set_pool_limits(max_resident=40 * PAGE + 20 * 8192)
    spans = [used(pool, 10, 10) for pool in pools for _ in range(3)]
    if NEEDS["maps"][0]:
        assert 10 * PAGE <= sum(resident_within(*span) for span in set(spans)) <= 40 * PAGE + 20 * 8192
    linmem.set_pool_limits(max_resident=0)
    assert sum(pool.stats()["warm"] for pool in pools) == 0
    assert linmem.metrics.totals()["resident"] == 0


@requires("maps")
@pytest.mark.parametrize("options", [{"reset": "discard"}, {"max_unused_warm": 0}])
def test_a_prefaulted_memory_is_resident_whenever_it_is_handed_out(options):
    pool = linmem.PoolingCreator(linmem.MmapCreator(prefault=True), **options)
    for _ in range(3):
        with pool.create(8 * PAGE, **SHAPE) as mem:
            assert resident_within(mem.as_ptr(), mem.as_ptr() + 8 * PAGE) == 8 * PAGE
    assert pool.stats()["hits"] == 2


@requires("maps", "scans")
def test_a_report_of_memories_does_not_hold_back_an_unrelated_growth():
    sums = linmem.StatisticsCreator(MMAP)
    large = sums.create(8 << 30)
    view = memoryview(large)
    for at in range(0, 8 << 30, 4096 * 64):
        view[at]
    view.release()
    small = sums.create(PAGE, 1 << 30)
    waits, takes = [], []
    done = threading.Event()

    def report():
        for _ in range(7):
            began = time.perf_counter()
            sums.memories()
            takes.append(time.perf_counter() - began)
        done.set()

    thread = threading.Thread(target=report)
    thread.start()
    while not done.is_set():
        began = time.perf_counter()
        small.grow_to(len(small) + PAGE)
        waits.append(time.perf_counter() - began)
        time.sleep(0.0005)
    thread.join()
    assert sorted(waits)[len(waits) // 2] < 0.4 * sorted(takes)[3]


def test_counters_never_decrease_during_warm():
    pool = linmem.PoolingCreator()
    ty = linmem.MemoryType(1, 2)
    stop, seen = threading.Event(), []

    def watch():
        last = (0, 0)
        while not stop.is_set():
            stats = pool.stats()
            now = stats["hits"], stats["misses"]
            seen.append(now[0] >= last[0] and now[1] >= last[1])
            last = now

    thread = threading.Thread(target=watch)
    thread.start()
    for n in range(200):
        pool.warm(n % 5, ty, reserved_size_in_bytes=1 << 18, guard_size_in_bytes=0)
        if n % 20 == 0:
            pool.trim()
    stop.set()
    thread.join()
    assert all(seen)
    assert (pool.stats()["hits"], pool.stats()["misses"]) == (0, 0)


@requires("maps", "maps_images", "few_mappings")
@pytest.mark.parametrize("kind", ["plain", "huge", "image", "hidden"])
def test_a_full_pool_takes_at_most_half_of_the_mappings(kind):
    most = linmem._os.pages.describe()["mappings"]
    assert answer(f"""
        import linmem
        P = {PAGE}
        kind = {kind!r}
        image = linmem.Image.from_pieces([(2 * P, b"x" * P)], 8 * P) if kind == "image" else None
        upstream = linmem.MmapCreator(huge_pages=kind == "huge")
        pool = linmem.PoolingCreator(upstream, image=image, when_full="error", max_unused_warm=1 << 20,
                                     idle_seconds=None)     # a slow machine must not give back idle pages
        def count():
            with open("/proc/self/maps") as file:
                return sum(1 for _ in file)
        start = count()
        mems = []
        try:
            while True:
                mems.append(pool.create(8 * P, reserve=64 * P, guard=P))
                if kind == "hidden":
                    mems[-1].grow_to(20 * P)
                    mems[-1].write(0, b"x" * 20 * P)
        except linmem.PoolError:
            pass
        live = count() - start
        mems.clear()
        print(max(live, count() - start) <= {most} // 2, count() - start > {most} // 8)
        """, timeout=300) == "True True"


@requires("maps", "memory_locks")
def test_a_pool_works_with_locked_pages():
    import ctypes

    pool = linmem.PoolingCreator(reset="discard")
    libc = ctypes.CDLL(None, use_errno=True)
    for n in range(3):
        with pool.create(8 * PAGE, **SHAPE) as mem:
            assert mem.read(0, 8 * PAGE) == bytes(8 * PAGE)
            mem.write(0, b"x" * 8 * PAGE)
            assert libc.mlock(ctypes.c_void_p(mem.as_ptr() + 2 * PAGE), ctypes.c_size_t(2 * PAGE)) == 0
        stats = pool.stats()
        assert (stats["rejected"], stats["hits"], stats["warm"]) == (0, n, 1)


@requires("memory_locks")
@pytest.mark.parametrize("reset", ["adaptive", "zero", "discard"])
@pytest.mark.parametrize("prefault", [False, True])
@pytest.mark.parametrize("grown", [False, True])
def test_a_pool_of_an_image_gives_each_guest_the_image_also_with_locked_pages(reset, prefault, grown):
    import ctypes

    image = linmem.Image.from_bytes(b"image" * 1000)
    other = linmem.Image.from_bytes(b"other" * 3000)
    pool = linmem.PoolingCreator(linmem.MmapCreator(prefault=prefault), image=image, reset=reset)
    for n in range(4):
        with pool.create(8 * PAGE, **SHAPE) as mem:
            assert mem.read(0, 8 * PAGE) == (b"image" * 1000).ljust(8 * PAGE, b"\0")
            mem.restore(other, zero_grown=True)
            if grown:
                mem.grow_to(16 * PAGE)
                assert mem.read(8 * PAGE, 8 * PAGE) == bytes(8 * PAGE)
            mem.write(0, b"x" * len(mem))
            assert LIBC.mlock(ctypes.c_void_p(mem.as_ptr() + PAGE), ctypes.c_size_t(len(mem) - 2 * PAGE)) == 0
        assert (pool.stats()["rejected"], pool.stats()["hits"]) == (0, n)


def test_an_upstream_in_python_that_uses_the_pool_itself_is_not_refused():
    class Reentrant(linmem.MemoryCreator):
        deep = False

        def new_memory(self, *arguments):
            if not self.deep:
                self.deep = True
                pool.create(PAGE, **SHAPE).close()
                self.deep = False
            return MMAP.new_memory(*arguments)

    pool = linmem.PoolingCreator(linmem.PythonCreator(Reentrant()), slots=1, when_full="error")
    with pool.create(2 * PAGE, **SHAPE) as mem:
        assert len(mem) == 2 * PAGE
        assert pool.stats()["live"] == 1


@requires("maps", "scans", "large_space")       # a sanitizer needs page tables of its own for its shadow memory
def test_page_tables_are_counted_as_the_os_counts_them_and_a_cold_slot_has_at_most_one_page_table():
    assert answer(f"""
        import linmem, linmem.metrics, re
        P = {REAL_PAGE}
        def tables():
            with open("/proc/self/status") as file:
                return int(re.search(r"VmPTE:\\s+(\\d+)", file.read())[1]) * 1024
        for reset in ("zero", "scan", "adaptive"):
            pool = linmem.PoolingCreator(reset=reset, max_unused_warm=1000)
            start = tables()
            mems = [pool.create({PAGE}, reserve=4 << 30, guard=32 << 20) for _ in range(100)]
            for mem in mems:
                mem.write(0, b"x")
            while mems:
                mems.pop().close()
            said, real = linmem.metrics.read(pool)["page_tables"], tables() - start
            pool.purge()
            print(real - 64 * P <= said <= real + 64 * P, tables() - start <= 110 * P, end=" ")
            del pool
        """) == " ".join(["True"] * 6)


# -- memory given back over time, and on request -------------------------------------------------------------------

@requires("maps")
def test_slots_that_are_idle_for_long_lose_their_pages_at_later_give_backs():
    def burst(idle_seconds):
        pool = linmem.PoolingCreator(idle_seconds=idle_seconds, reset="zero")
        mems = [pool.create(32 * PAGE, **SHAPE) for _ in range(20)]
        spans = [whole(mem) for mem in mems]
        for mem in mems:
            mem.write(0, b"x" * 32 * PAGE)
            mem.close()
        return pool, spans

    pool, spans = burst(3600)
    for _ in range(30):
        used(pool)
    assert pool.stats()["warm"] == 21
    assert sum(resident_within(*span) for span in spans) == 20 * 32 * PAGE
    pool, spans = burst(0.05)
    deadline = time.monotonic() + 60
    while pool.stats()["warm"] > 2 and time.monotonic() < deadline:
        time.sleep(0.01)
        used(pool)
    assert pool.stats()["warm"] <= 2
    assert sum(resident_within(*span) for span in spans) <= 2 * 32 * PAGE
    assert linmem.metrics.read(pool)["purges"] >= 18


@requires("maps")
def test_hidden_pages_that_no_growth_uses_are_given_back():
    pool = linmem.PoolingCreator(idle_seconds=0.05, reset="zero")
    span = used(pool, 40)
    assert resident_within(*span) == 40 * PAGE
    time.sleep(0.2)
    assert used(pool) == span
    assert resident_within(*span) == PAGE


@pytest.mark.parametrize("name", ["idle_seconds", "max_reset_seconds", "timeout"])
def test_seconds_are_any_real_number(name):
    numpy = pytest.importorskip("numpy")
    how = {"when_full": "wait"} if name == "timeout" else {}
    for good in (0, 0.0, 3, 1e300, float("inf"), 10**400, Fraction(1, 3), numpy.int8(5), numpy.float32(2), None):
        linmem.PoolingCreator(**{name: good}, **how)
    for bad in (True, numpy.True_, "5", b"5", 1j, numpy.array([5])):
        with pytest.raises(TypeError, match=f"{name} must be a number of seconds or None"):
            linmem.PoolingCreator(**{name: bad}, **how)
    for bad in (-1, -1e-9, float("nan"), Fraction(-1, 3), numpy.float32("nan")):
        with pytest.raises(ValueError, match=f"{name} must be >= 0, got "):
            linmem.PoolingCreator(**{name: bad}, **how)


def test_an_invalid_older_than_is_refused():
    pool = linmem.PoolingCreator()
    for bad in (None, "5", True):
        with pytest.raises(TypeError, match="older_than must be a number of seconds, got"):
            pool.purge(older_than=bad)
    assert pool.purge(older_than=Fraction(1, 2)) == 0


def test_purge_leaves_mappings_and_slots_that_are_young_or_within_the_target():
    pool = linmem.PoolingCreator(reset="zero")
    mems = [pool.create(8 * PAGE, **SHAPE) for _ in range(4)]
    for mem in mems:
        mem.close()
    assert pool.purge(older_than=1000) == 0
    assert pool.purge(16 * PAGE) == 16 * PAGE
    assert (pool.stats()["warm"], pool.stats()["cold"]) == (2, 2)
    assert pool.purge() == 16 * PAGE
    assert (pool.stats()["cold"], pool.stats()["resident"]) == (4, 0)
    assert linmem.metrics.read(pool)["purges"] == 4


# -- bounds, and waiting -----------------------------------------------------------------------------------------------

def test_max_reserved_bounds_live_and_idle_slots_with_their_guards():
    with linmem.create(PAGE, **SHAPE) as mem:
        one = whole(mem)[1] - whole(mem)[0]
    pool = linmem.PoolingCreator(max_reserved=3 * one, when_full="error")
    mems = [pool.create(PAGE, **SHAPE) for _ in range(3)]
    assert pool.stats()["reserved"] == 3 * one
    with pytest.raises(linmem.PoolError, match="max_reserved"):
        pool.create(PAGE, **SHAPE)
    mems.pop().close()
    mems.append(pool.create(2 * PAGE, **SHAPE))         # the idle slot makes room
    mems.pop().close()
    with pytest.raises(linmem.PoolError):
        pool.create(PAGE, reserve=1 << 30)              # cannot succeed, and so takes no slot
    assert idle(pool) == 1


def test_the_process_has_one_bound_for_the_reservations_of_all_pools():
    with linmem.create(PAGE, **SHAPE) as mem:
        one = whole(mem)[1] - whole(mem)[0]
    pools = [linmem.PoolingCreator(when_full="error") for _ in range(2)]
    linmem.set_pool_limits(max_reserved=linmem.metrics.totals()["reserved"] + 2 * one)
    pools[0].create(PAGE, **SHAPE).close()
    held = [pools[1].create(PAGE, **SHAPE) for _ in range(2)]
    assert idle(pools[0]) == 0
    with pytest.raises(linmem.PoolError, match="set_pool_limits"):
        pools[0].create(PAGE, **SHAPE)
    held.clear()


def test_lowering_a_bound_below_the_held_bytes_releases_idle_slots_immediately():
    pools = [linmem.PoolingCreator(when_full="error") for _ in range(2)]
    with linmem.create(PAGE, **SHAPE) as mem:
        one = whole(mem)[1] - whole(mem)[0]
    for pool in pools:
        for mem in [pool.create(PAGE, **SHAPE) for _ in range(4)]:
            mem.close()
    live = pools[0].create(PAGE, **SHAPE)
    linmem.set_pool_limits(max_reserved=linmem.metrics.totals()["reserved"] - 5 * one)
    assert sum(pool.stats()["reserved"] for pool in pools) == 3 * one
    linmem.set_pool_limits(max_reserved=0)
    assert [pool.stats()["reserved"] for pool in pools] == [one, 0]
    with pytest.raises(linmem.PoolError, match="set_pool_limits"):
        pools[1].create(PAGE, **SHAPE)
    linmem.set_pool_limits()
    pools[1].create(PAGE, **SHAPE).close()
    live.close()


def test_the_bound_of_the_process_holds_while_threads_of_many_pools_make_memories():
    with linmem.create(PAGE, **SHAPE) as mem:
        one = whole(mem)[1] - whole(mem)[0]
    most = linmem.metrics.totals()["reserved"] + 3 * one
    linmem.set_pool_limits(max_reserved=most)
    stop, seen = threading.Event(), []

    def work(pool):
        while not stop.is_set():
            try:
                pool.create(PAGE, **SHAPE).close()
                pool.trim()
            except linmem.PoolError:
                pass

    threads = [threading.Thread(target=work, args=(linmem.PoolingCreator(when_full="error"),)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        seen.append(linmem.metrics.totals()["reserved"])
        time.sleep(0.0005)
    stop.set()
    for thread in threads:
        thread.join()
    assert max(seen) <= most


def test_a_pool_may_be_allowed_more_than_its_share_of_the_machine():
    memory = linmem._os.pages.describe()["memory"] or 1 << 40
    assert linmem.PoolingCreator(max_resident=memory).stats()["resident_bound"] == memory
    assert linmem.PoolingCreator(max_resident=PAGE).stats()["resident_bound"] == PAGE
    assert linmem.PoolingCreator().stats()["resident_bound"] <= memory // 4


@pytest.mark.parametrize("of", ["pool", "process"])
@pytest.mark.parametrize("reserve", [1 << 30, None])
def test_a_request_that_can_never_fit_is_refused_without_a_wait(of, reserve):
    pool = linmem.PoolingCreator(when_full="wait", max_reserved=1 << 20 if of == "pool" else None)
    if of == "process":
        linmem.set_pool_limits(max_reserved=1 << 20)
    text = "max_reserved=1048576" if of == "pool" else "set_pool_limits"
    with pytest.raises(linmem.PoolError, match=rf"{text}.* and \d{{9,}} bytes more"):
        pool.create(PAGE, reserve=reserve)


def test_a_wait_with_a_timeout_of_zero_tries_once():
    asked = []

    class Counting(linmem.MemoryCreator):
        def new_memory(self, *arguments):
            asked.append(1)
            return below.new_memory(*arguments)

    below = linmem.PoolingCreator(slots=1, when_full="error")
    pool = linmem.PoolingCreator(linmem.PythonCreator(Counting()), when_full="wait", timeout=0)
    with below.create(PAGE, **SHAPE), pytest.raises(linmem.PoolError):
        pool.create(PAGE, **SHAPE)
    assert len(asked) == 1


def test_a_full_pool_that_waits_hands_out_a_returned_slot_or_gives_up_after_its_timeout():
    pool = linmem.PoolingCreator(slots=1, when_full="wait", timeout=3600)
    mem = pool.create(PAGE, **SHAPE)
    base = mem.as_ptr()
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.create(PAGE, **SHAPE).as_ptr()))
    thread.start()
    time.sleep(0.05)
    assert got == []
    mem.close()
    thread.join()
    assert got == [base]
    pool = linmem.PoolingCreator(slots=1, when_full="wait", timeout=0.01)
    with pool.create(PAGE, **SHAPE), pytest.raises(linmem.PoolError):
        pool.create(PAGE, **SHAPE)


@requires("interrupts")
def test_a_wait_for_a_slot_answers_an_interrupt():
    assert answer(f"""
        import linmem, signal, threading, os
        pool = linmem.PoolingCreator(slots=1, when_full="wait")
        mem = pool.create({PAGE})
        try:
            threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            pool.create({PAGE})
        except KeyboardInterrupt:
            print("interrupted", pool.stats()["live"])
        """) == "interrupted 1"


@requires("rlimits")      # and so timers that send signals
@pytest.mark.parametrize("error", ["KeyboardInterrupt('now')", "SystemExit(3)", "TimeoutError('late')"])
def test_an_exception_of_a_signal_handler_ends_the_wait_of_a_store_for_a_slot(error):
    pytest.importorskip("wasmtime")
    assert answer(f"""
        import linmem, linmem.wasmtime, signal, wasmtime
        error, refused = {error}, []
        def handler(*_):
            raise error
        signal.signal(signal.SIGALRM, handler)
        pool = linmem.PoolingCreator(slots=1, when_full="wait")
        told = linmem.CallbackCreator(pool, on_refused=lambda *refusal: refused.append(refusal))
        config = wasmtime.Config()
        linmem.wasmtime.install(config, told)
        engine = wasmtime.Engine(config)
        module = wasmtime.Module(engine, '(module (memory 1))')
        first = wasmtime.Store(engine)
        wasmtime.Instance(first, module, [])
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            wasmtime.Instance(wasmtime.Store(engine), module, [])
        except BaseException as raised:
            print(raised is error, refused, pool.stats()["live"])
        """) == "True [] 1"


@requires("maps")
def test_pages_that_take_too_long_to_zero_are_given_back_instead():
    pool = linmem.PoolingCreator(reset="zero", max_reset_seconds=1e-9)
    with pool.create(2048 * PAGE, reserve=2048 * PAGE) as mem:
        mem.write(0, b"x" * 2048 * PAGE)
        span = whole(mem)
    assert pool.stats()["resets"] == {"scan": 0, "zero": 0, "discard": 1}
    assert resident_within(*span) == 0
    with pool.create(2048 * PAGE, reserve=2048 * PAGE) as mem:
        assert whole(mem) == span
        assert bytes(mem).count(0) == 2048 * PAGE


@requires("maps", "scans")
def test_a_long_run_of_pages_is_not_zeroed_beyond_the_time_for_a_reset():
    pool = linmem.PoolingCreator(reset="scan", max_reset_seconds=1e-9, keep_resident=1 << 30)
    with pool.create(64 << 20, reserve=64 << 20) as mem:
        for at in range(0, 64 << 20, 1 << 20):
            mem.write(at, b"x" * (1 << 20))
        span = whole(mem)
    assert resident_within(*span) == 0
    figures = linmem.metrics.read(pool)
    assert (figures["resets"]["discard"], figures["bytes_zeroed"]) == (1, 0)
    with pool.create(64 << 20, reserve=64 << 20) as mem:
        assert whole(mem) == span
        assert bytes(mem).count(0) == 64 << 20


# -- tenants -----------------------------------------------------------------------------------------------------------

@requires("maps")
@pytest.mark.parametrize("options", [{}, {"slots": 1}, {"max_unused_warm": 0}])
def test_no_page_that_one_domain_touched_is_resident_for_another(options):
    pool = linmem.PoolingCreator(reset="zero", **options)
    names = [None, "", "a", "b", "a\0b", "\udc80"]
    for name in names * 3:
        with pool.create(PAGE, domain=name, **SHAPE) as mem:
            (start, end) = whole(mem)
            if options:
                assert resident_within(start, end) == 0
            mem.grow_to(20 * PAGE)
            mem.write(0, b"x" * 20 * PAGE)
    if not options:
        assert (pool.stats()["misses"], pool.stats()["hits"]) == (len(names), 2 * len(names))
    assert set(linmem.metrics.read(pool)["domains"]) == set(names)


@pytest.fixture
def bound_of_all_pools():
    linmem.set_pool_limits(max_resident=20 * PAGE)
    yield
    linmem.set_pool_limits()


@pytest.mark.usefixtures("bound_of_all_pools")
@pytest.mark.parametrize("options", [
    {"max_unused_warm": 10, "slots": 20}, {"max_resident": 20 * PAGE}, {"slots": 10}, {"max_reserved": 1 << 24}, {},
    {"upstream": 15 * PAGE}], ids=lambda options: ", ".join(options) or "set_pool_limits")
def test_one_domain_cannot_evict_the_warm_slots_of_another_below_its_share(options):
    if "upstream" in options:
        options = {"upstream": linmem.creator("limiting", limit_bytes=options["upstream"])}
    if options and "max_resident" not in options:
        linmem.set_pool_limits()
    pool = linmem.PoolingCreator(**options)
    for n in range(600):
        with pool.create(PAGE + n % 100, domain="many", **SHAPE) as mem:
            mem[0] = 1
        if n % 50 == 0:
            pool.create(PAGE, domain="one", **SHAPE).close()
    figures = linmem.metrics.read(pool)
    one = figures["domains"]["one"]
    assert (one["misses"], one["hits_cold"], one["hits_warm"], one["warm"]) == (1, 0, 11, 1)
    assert sum(figures["evictions"].values()) > 400     # slots of the domain "many": the bound had an effect


@requires("maps")
@pytest.mark.parametrize("reset", ["zero", "adaptive", "discard", pytest.param("scan", marks=requires("scans"))])
@pytest.mark.parametrize("with_image", [False, True])
def test_a_pool_below_hands_no_page_of_another_domain_on(reset, with_image):
    image = linmem.Image.from_bytes(b"i" * (2 * PAGE)) if with_image else None

    def resident_for_a(touched):
        below = linmem.PoolingCreator(reset=reset, image=image)
        above = linmem.PoolingCreator(below, reset=reset)
        with above.create(8 * PAGE, domain="a", **SHAPE) as mem:
            span = whole(mem)
        above.purge()
        with above.create(8 * PAGE, domain="b", **SHAPE) as mem:
            assert whole(mem) == span
            mem.grow_to(20 * PAGE)
            mem.write(0, b"x" * touched)
        above.trim()
        with below.create(8 * PAGE, domain="a", **SHAPE) as mem:
            assert whole(mem) == span
            resident = resident_within(*span)
            assert mem.read(0, 8 * PAGE) == (b"i" * 2 * PAGE if with_image else b"").ljust(8 * PAGE, b"\0")
        return resident

    resident = resident_for_a(touched=20 * PAGE)
    assert resident == resident_for_a(touched=0)        # linmem itself may have copied the image's bytes there
    assert resident <= (2 * PAGE if with_image else 0)


@pytest.mark.parametrize("over", [lambda pool: pool, lambda pool: linmem.LimitingCreator(pool, 1 << 40),
                                  linmem.StatisticsCreator, linmem.PoolingCreator, "python", "python twice"])
def test_every_creator_over_a_pool_tells_it_the_domain(over):
    class Python(linmem.MemoryCreator):
        def __init__(self, upstream):
            self.upstream = upstream

        def new_memory(self, *arguments):
            return self.upstream.new_memory(*arguments)

    pool = linmem.PoolingCreator()
    if over == "python":
        creator = linmem.PythonCreator(Python(pool))
    elif over == "python twice":
        creator = linmem.PythonCreator(Python(linmem.PythonCreator(Python(pool))))
    else:
        creator = over(pool)
    ty = linmem.MemoryType(1, 2)
    image = linmem.Image.from_bytes(b"i" * PAGE)
    linmem.create(PAGE, creator=creator, domain="create", **SHAPE).close()
    creator.create(PAGE, domain="its create", **SHAPE).close()
    creator.new_memory(ty, 65536, 131072, 131072, PAGE, domain="new_memory").close()
    image.new_memory(creator=creator, domain="image", **SHAPE).close()
    assert set(linmem.metrics.read(pool)["domains"]) == {"create", "its create", "new_memory", "image"}
    linmem.create(PAGE, creator=creator, **SHAPE).close()       # no domain is left over afterwards
    assert None in linmem.metrics.read(pool)["domains"]


def test_slots_that_warm_makes_have_the_same_domain_in_a_pool_below():
    below = linmem.PoolingCreator()
    above = linmem.PoolingCreator(below)
    assert above.warm(2, linmem.MemoryType(1, 2), domain="a") == 2
    assert set(linmem.metrics.read(below)["domains"]) == {"a"}


def test_a_python_creator_may_name_another_domain_and_the_request_s_holds_again_after_it():
    class Python(linmem.MemoryCreator):
        def new_memory(self, *arguments):
            pool.new_memory(*arguments, domain="inner").close()
            return pool.new_memory(*arguments)

    pool = linmem.PoolingCreator()
    linmem.create(PAGE, creator=Python(), domain="outer", **SHAPE).close()
    rows = linmem.metrics.read(pool)["domains"]
    assert {name: row["misses"] for name, row in rows.items()} == {"inner": 1, "outer": 1}


def test_a_domain_is_checked_and_has_no_effect_without_a_pool():
    class Text(str):
        __slots__ = ()

    for name in ("a", "", "\udc80", "a\0b", "x" * 100_000, Text("a")):
        linmem.create(PAGE, domain=name).close()
        linmem.Image.from_bytes(b"i").new_memory(domain=name).close()
    pool = linmem.PoolingCreator()
    for name in ("ab", "a" + "b" * int(str(1)), Text("ab")):        # equal strings, but not identical objects
        pool.create(PAGE, domain=name, **SHAPE).close()
    assert (pool.stats()["misses"], pool.stats()["hits"]) == (1, 2)


@pytest.mark.parametrize("bound", ["process", "budget", "count", "slots", "resident"])
def test_no_bound_lets_one_domain_evict_the_warm_slots_of_another_below_its_share(bound):
    budget = linmem.LimitingCreator(MMAP, 40 * PAGE)
    most = 10 * 8192 + 40 * PAGE
    how = {"count": {"max_unused_warm": 10}, "slots": {"slots": 10}, "resident": {"max_resident": most},
           "budget": {"upstream": budget}, "process": {}}[bound]
    pool = linmem.PoolingCreator(reset="zero", **how)
    if bound == "process":
        linmem.set_pool_limits(max_resident=most)
    for n in range(600):
        used(pool, domain="many", minimum=4, pages_written=4, maximum=(64 + n % 100) * PAGE)
        if n % 30 == 0:
            used(pool, domain="one", minimum=4, pages_written=4)
    one = linmem.metrics.read(pool)["domains"]["one"]
    assert (one["misses"], one["hits_cold"], one["hits_warm"]) == (1, 0, 19)


@pytest.mark.parametrize("bad", [1, b"a", ["a"]])
def test_a_domain_is_a_text_or_none(bad):
    with pytest.raises(TypeError, match="domain must be a str or None"):
        linmem.create(PAGE, domain=bad)


def test_thousands_of_domains_leave_no_more_than_some_bookkeeping():
    pool = linmem.PoolingCreator(slots=4)
    for n in range(3000):
        pool.create(PAGE, domain=f"tenant {n}", **SHAPE).close()
    figures = linmem.metrics.read(pool)
    assert len(figures["domains"]) <= 300
    assert figures["misses"] == pool.stats()["misses"] == 3000 - pool.stats()["hits"]


# -- fair shares between pools -----------------------------------------------------------------------------------------

EACH = 32 * PAGE        # size of a slot in these tests; all of an idle slot is resident
LARGE = {"maximum": 1000 * PAGE, "reserve": 1000 * PAGE, "guard": PAGE}
REFUSALS = ["reserved", "budget", "refused pages", "refused space"]


def fill(pools, domain, slots):
    for pool, n in zip(pools, slots, strict=True):
        for mem in [pool.create(EACH, **{**SHAPE, "domain": domain}) for _ in range(n)]:
            mem.write(0, b"x" * EACH)
            mem.close()


def idle_of(bound, *slots, domains=("a", "b"), reset="zero"):
    """Makes pools with idle slots of several domains and a memory outside the pools. Each list of `slots` belongs to a
    domain and gives its number of slots in each pool. The slots of the first domain have been idle for the longest
    time. If `bound` is "budget", the budget is then used up."""
    budget = linmem.LimitingCreator(MMAP, sum(map(sum, slots)) * EACH + PAGE if bound == "budget" else 1 << 40)
    pools = [linmem.PoolingCreator(budget, reset="zero" if n else reset, max_unused_warm=1000) for n in slots[0]]
    for domain, each in zip(domains, slots, strict=True):
        fill(pools, domain, each)
    return pools, budget.create(PAGE, **LARGE)


def take(slots, bound, pools, live):
    """Makes idle slots give up the bytes of `slots` slots."""
    if bound == "resident":
        rows = [linmem.metrics.read(pool) for pool in pools]
        held = sum(row["resident"] + row["page_tables"] for row in rows)
        linmem.set_pool_limits(max_resident=held - slots * EACH + EACH // 2)
    elif bound == "reserved":
        one = sum(pool.stats()["reserved"] for pool in pools) // sum(idle(pool) for pool in pools)
        linmem.set_pool_limits(max_reserved=linmem.metrics.totals()["reserved"] - slots * one)
    elif bound == "budget":
        live.grow_to(live.byte_size() + slots * EACH)
    else:
        for _ in range(slots):
            with failing(1, errno.ENOMEM) as injected:
                if bound == "refused pages":
                    live.grow_to(live.byte_size() + PAGE)
                else:
                    MMAP.create(PAGE, **SHAPE).close()
            assert injected.happened


def warm_of(pools, *domains):
    found = [linmem.metrics.read(pool)["domains"] for pool in pools]
    return tuple(sum(rows[domain]["warm"] for rows in found if domain in rows) for domain in domains)


@pytest.mark.parametrize("bound", ["resident", *REFUSALS])
@pytest.mark.parametrize("domains", [("a", "b"), (None, "b"), ("a", None)], ids=str)
@pytest.mark.parametrize(("first", "second"), [([3, 0], [0, 9]), ([3, *[0] * 10], [0, *[1] * 10]), ([2, 1], [3, 6])],
                         ids=["a pool each", "ten pools against one", "both in both"])
def test_no_bound_over_several_pools_lets_one_domain_evict_the_warm_slots_of_another_below_its_share(
        first, second, domains, bound):
    pools, live = idle_of(bound, first, second, domains=domains)
    assert warm_of(pools, *domains) == (3, sum(second))
    take(sum(second) - 3, bound, pools, live)
    assert warm_of(pools, *domains) == (3, 3)
    live.close()


@pytest.mark.parametrize("bound", REFUSALS)
def test_a_domain_with_exactly_its_share_of_several_pools_loses_no_slot_while_another_domain_has_more(bound):
    pools, live = idle_of(bound, [3, 0, 0], [0, 5, 0], [0, 0, 1], domains="abc")
    take(1, bound, pools, live)
    assert warm_of(pools, *"abc") == (3, 4, 1)
    live.close()


def test_a_domain_with_exactly_its_share_of_a_pool_loses_no_slot_while_another_domain_has_more():
    pool = linmem.PoolingCreator(reset="zero", max_unused_warm=8)
    for domain, slots in (("a", 3), ("b", 4), ("c", 1), ("b", 5)):
        fill([pool], domain, [slots])
    assert warm_of([pool], *"abc") == (3, 4, 1)


def test_warm_slots_without_pages_do_not_count_for_a_share_of_resident_bytes():
    size = 16 * EACH            # page tables are small beside this size
    pool = linmem.PoolingCreator(reset="zero", max_resident=12 * size + size // 2)
    pool.create(0, **SHAPE, domain="none").close()
    for domain, slots in (("a", 5), ("b", 7), ("b", 8)):
        for mem in [pool.create(size, size, size, 0, domain=domain) for _ in range(slots)]:
            mem.write(0, b"x" * size)
            mem.close()
    assert warm_of([pool], "a", "none", "b") == (5, 1, 7)


def test_a_warm_slot_that_returns_to_the_pool_below_still_counts_for_the_share_of_its_domain():
    linmem.set_pool_limits(max_resident=0, max_reserved=0)
    linmem.set_pool_limits()
    lower, other = (linmem.PoolingCreator(reset="zero") for _ in range(2))
    upper = linmem.PoolingCreator(lower, reset="zero")
    fill([other, upper], "b", [6, 0])
    fill([other, upper], "a", [0, 7])
    each = other.stats()["reserved"] // 6
    bound = linmem.metrics.totals()["reserved"] - 8 * each      # a slot of the upper pool counts in both pools
    linmem.set_pool_limits(max_reserved=bound)
    assert linmem.metrics.totals()["reserved"] <= bound
    # How many slots stay depends on the ticks of the clock, which decide whether the lower pool's slots are the oldest.
    (b,), (a,) = warm_of([other], "b"), warm_of([upper, lower], "a")
    assert b >= 4
    assert abs(a - b) <= 1


@pytest.mark.parametrize("bound", REFUSALS)
def test_of_domains_that_hold_the_same_in_several_pools_the_oldest_slot_goes(bound):
    pools, live = idle_of(bound, [3, 0], [0, 3])
    take(1, bound, pools, live)
    assert warm_of(pools, "a", "b") == (2, 3)
    take(1, bound, pools, live)
    assert warm_of(pools, "a", "b") == (2, 2)
    live.close()


def test_committed_pages_that_are_not_resident_count_if_the_os_refuses_pages():
    pools, live = idle_of("refused pages", [3, 0], [0, 9], reset="discard")
    take(6, "refused pages", pools, live)
    assert warm_of(pools, "a", "b") == (3, 3)
    live.close()


def test_only_bytes_charged_to_a_budget_count_for_a_share_of_the_budget():
    budget = linmem.LimitingCreator(MMAP, 6 * EACH + PAGE)
    pools = [linmem.PoolingCreator(budget, reset="zero"),
             linmem.PoolingCreator(linmem.PythonCreator(Alternating(budget, MMAP)), reset="zero")]
    fill(pools, "a", [2, 0])
    fill(pools, "b", [0, 8])
    live = budget.create(PAGE, **LARGE)
    assert budget.used_bytes == 6 * EACH + PAGE
    take(2, "budget", pools, live)
    assert warm_of(pools, "a", "b") == (2, 6)
    take(2, "budget", pools, live)
    assert warm_of(pools, "a", "b") == (1, 5)
    live.close()


@pytest.mark.parametrize("bound", ["reserved", "refused space"])
def test_cold_slots_of_any_pool_give_address_space_up_before_a_warm_one_does(bound):
    pools, live = idle_of(bound, [2, 0], [0, 3])
    pools[1].purge()
    take(3, bound, pools, live)
    assert (warm_of(pools, "a"), idle(pools[1])) == ((2,), 0)
    take(1, bound, pools, live)
    assert warm_of(pools, "a") == (1,)
    live.close()


@pytest.mark.parametrize("bound", ["resident", "reserved", "budget"])
def test_a_domain_that_makes_ever_new_slots_leaves_the_others_in_other_pools_warm(bound):
    linmem.set_pool_limits(max_resident=0, max_reserved=0)
    linmem.set_pool_limits()
    budget = linmem.LimitingCreator(MMAP, 10 * EACH if bound == "budget" else 1 << 40)
    pools = [linmem.PoolingCreator(budget, reset="zero") for _ in range(11)]
    if bound == "resident":
        linmem.set_pool_limits(max_resident=10 * (EACH + 8192))
    fill(pools, "one", [1] + [0] * 10)
    if bound == "reserved":
        totals = linmem.metrics.totals()["reserved"]
        linmem.set_pool_limits(max_reserved=totals + 9 * pools[0].stats()["reserved"])
    for n in range(300):
        used(pools[1 + n % 10], domain="many", minimum=32, pages_written=32, maximum=(64 + n % 100) * PAGE)
        if n % 30 == 0:
            fill(pools, "one", [1] + [0] * 10)
    row = linmem.metrics.read(pools[0])["domains"]["one"]
    assert (row["misses"], row["hits_cold"], row["hits_warm"]) == (1, 0, 10)
    assert sum(sum(linmem.metrics.read(pool)["evictions"].values()) for pool in pools[1:]) > 250


SUMS = """
# cython: language_level=3
from libc.stdlib cimport calloc, free
from linmem._core.memory cimport lock, unlock
from linmem._core.pool cimport BY_DOMAIN, COLD, WARM, PoolingCreator, group, link, pool, slot, warm_totals

cdef enum:
    MOST = 1000     # domains

def counted(PoolingCreator creator not None):
    '''Returns the pool's counters of warm slots, by domain and in total, and the same sums over the slots.'''
    cdef warm_totals* counts = <warm_totals*>calloc(MOST + 1, sizeof(warm_totals))
    cdef warm_totals* found = <warm_totals*>calloc(MOST + 1, sizeof(warm_totals))
    cdef size_t counters[3]
    cdef size_t sums[3]
    cdef size_t n, i
    cdef pool* p = creator.pool
    # A thread that holds the lock must not wait for the GIL, because another thread may wait for the lock with the GIL.
    with nogil:
        lock(&p.lock.held)
        n = sum_up(p, counts, found, sums)
        counters[0], counters[1], counters[2] = p.n_slots, p.idle_reserved, p.warm_domains
        unlock(&p.lock.held)
    try:
        assert n <= MOST
        return [counts[i] for i in range(n + 1)] + list(counters), [found[i] for i in range(n + 1)] + list(sums)
    finally:
        free(counts)
        free(found)

cdef size_t sum_up(pool* p, warm_totals* counts, warm_totals* found, size_t* sums) noexcept nogil:
    cdef link* node = p.tables[BY_DOMAIN].groups.next
    cdef group* of
    cdef slot* s
    cdef size_t n = 0, i
    sums[0] = sums[1] = sums[2] = 0
    while node.owner != NULL:
        of = <group*>node.owner
        of.row = n
        if n < MOST:
            counts[n] = of.warm
        n += 1
        node = node.next
    if n > MOST:
        return n
    counts[n] = p.warm
    node = p.slots.next
    while node.owner != NULL:
        s = <slot*>node.owner
        sums[0] += 1
        if s.state == WARM:
            add_slot(&found[s.group.of[BY_DOMAIN].row], s)
            add_slot(&found[n], s)
        if s.state == WARM or s.state == COLD:
            sums[1] += s.reserved
        node = node.next
    for i in range(n):
        sums[2] += found[i].n > 0
    return n

cdef void add_slot(warm_totals* to, const slot* s) noexcept nogil:
    to.n += 1
    to.resident += s.resident
    to.tables += s.tables
    to.initial += s.pages.initial
    to.committed += s.pages.committed
"""


@requires("compiler")
def test_the_counters_by_domain_match_the_slots_under_churn_of_threads(tmp_path):
    build_extension(tmp_path, "sums", SUMS)
    counted = load_extension(tmp_path, "sums").counted
    budget = linmem.LimitingCreator(MMAP, 400 * PAGE)
    lower = linmem.PoolingCreator(budget)
    pools = [lower, linmem.PoolingCreator(lower, reset="discard", keep_resident=3 * PAGE),
             linmem.PoolingCreator(budget, reset="zero", idle_seconds=0.001),
             linmem.PoolingCreator(linmem.PythonCreator(Alternating(budget, MMAP)), max_unused_warm=5),
             linmem.PoolingCreator(linmem.LimitingCreator(lower, 100 * PAGE), slots=12)]
    image = linmem.Image.from_bytes(b"i" * PAGE)
    wrong = []

    def work(seed):
        chance = random.Random(seed)
        mems = []
        for n in range(500):
            pool, most = chance.choice(pools), chance.choice((8, 16, 32))
            try:
                mem = pool.create(chance.randrange(1, 4) * PAGE, most * PAGE, most * PAGE, PAGE,
                                  image=chance.choice((None, None, image)),
                                  domain=chance.choice((None, "a", f"{n % 300}")))
                mems.append(mem)
                mem.write(chance.randrange(len(mem)), b"x")
                mem.grow_to(chance.randrange(len(mem) // PAGE, most + 1) * PAGE)
            except (linmem.PoolError, linmem.GrowError):
                pass
            while len(mems) > chance.randrange(12):
                mems.pop(chance.randrange(len(mems))).close()
            if n % 20 == 0:
                chance.choice((pool.trim, pool.purge))(chance.choice((0, 10 * PAGE)))
                linmem.set_pool_limits(max_resident=chance.choice((0, None, 20 * PAGE)),
                                       max_reserved=chance.choice((None, 400 * PAGE)))
            counts, found = counted(pool)
            if counts != found:
                wrong.append((counts, found))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(sum(figures["evictions"].values()) for figures in map(linmem.metrics.read, pools))


# -- figures ---------------------------------------------------------------------------------------------------------

def test_the_figures_add_up():
    pool = linmem.PoolingCreator(max_unused_warm=2, reset="zero")
    for n in range(50):
        pool.create(PAGE * (1 + n % 4), domain=("a", "b")[n % 2], **SHAPE).close()
    figures = linmem.metrics.read(pool)
    stats = pool.stats()
    assert figures["hits_warm"] + figures["hits_cold"] == stats["hits"]
    assert figures["misses"] + stats["hits"] == 50
    for key in ("hits_warm", "hits_cold", "misses", "bytes_zeroed", "reserved", "resident", "purges"):
        assert sum(row[key] for row in figures["shapes"]) == figures[key]
        assert sum(row[key] for row in figures["domains"].values()) == figures[key]
    assert figures["evictions"]["count"] > 0
    assert (figures["peak_live"], figures["live"]) == (1, 0)
    assert figures["bytes_zeroed"] == sum(PAGE * (1 + n % 4) for n in range(50))


FIGURES = {"hits_warm", "hits_cold", "misses", "evictions", "purges", "resets", "reset_ns", "bytes_zeroed", "live",
           "peak_live", "warm", "cold", "resident", "page_tables", "reserved"}


def test_every_figure_is_there_for_the_pool_each_shape_and_each_domain():
    pool = linmem.PoolingCreator()
    image = linmem.Image.from_bytes(b"i" * PAGE)
    mems = [image.new_memory(creator=pool, domain="a", **SHAPE), pool.create(PAGE, domain="a", **SHAPE),
            pool.create(PAGE, domain="b", **SHAPE)]
    figures = linmem.metrics.read(pool)
    assert set(figures) == FIGURES | {"name", "fallbacks", "rejected", "refusals", "slots", "resident_bound",
                                      "reserved_bound", "images", "image_bytes", "image_descriptors", "shapes",
                                      "domains"}
    assert all(set(row) == FIGURES | {"shape", "image_bytes", "image_descriptors"} for row in figures["shapes"])
    assert all(set(row) == FIGURES for row in figures["domains"].values())
    shapes = {row["shape"]["image"]: (row["live"], row["peak_live"], row["image_bytes"]) for row in figures["shapes"]}
    assert shapes == {True: (1, 1, PAGE), False: (2, 2, 0)}
    assert {name: row["peak_live"] for name, row in figures["domains"].items()} == {"a": 2, "b": 1}
    assert set(pool.stats()) == {"slots", "live", "warm", "cold", "pinned", "hits", "misses", "fallbacks", "rejected",
                                 "resets", "resident", "resident_bound", "reserved"}
    mems.clear()
    figures = linmem.metrics.read(pool)
    assert (figures["live"], figures["peak_live"]) == (0, 3)


@pytest.mark.parametrize("bad", [None, 5, linmem.PoolingCreator, MMAP])
def test_figures_are_read_from_pools_only(bad):
    with pytest.raises(TypeError, match="'pool'"):
        linmem.metrics.read(bad)
    with pytest.raises(TypeError, match="pools must be"):
        linmem.metrics.collector(bad)


def test_memories_that_warm_makes_are_not_counted_as_guests():
    pool = linmem.PoolingCreator()
    ty = linmem.MemoryType(1, 2)
    pool.warm(5, ty, reserved_size_in_bytes=1 << 17, guard_size_in_bytes=0, domain="a")
    pool.purge()
    pool.warm(5, ty, reserved_size_in_bytes=1 << 17, guard_size_in_bytes=0, domain="b")
    figures = linmem.metrics.read(pool)
    assert (figures["peak_live"], figures["live"], figures["warm"]) == (0, 0, 5)
    for _ in range(3):
        pool.new_memory(ty, 65536, 131072, 1 << 17, 0, domain="b").close()
    figures = linmem.metrics.read(pool)
    assert (figures["peak_live"], figures["domains"]["b"]["peak_live"], figures["hits_warm"]) == (1, 1, 3)


def test_the_time_of_a_slot_s_first_reset_counts_once():
    def first_reset():
        pool = linmem.PoolingCreator(reset="zero")
        with pool.create(256 * PAGE, reserve=256 * PAGE) as mem:
            mem.write(0, b"x" * 256 * PAGE)
            began = time.perf_counter_ns()
        return linmem.metrics.read(pool)["reset_ns"], time.perf_counter_ns() - began

    for _ in range(20):
        said, took = first_reset()
        assert 0 < said <= took


def test_no_figure_decreases_under_churn_of_threads():
    pool = linmem.PoolingCreator(max_unused_warm=3, slots=12, idle_seconds=0.01)
    stop, down = threading.Event(), []
    counters = ("hits_warm", "hits_cold", "misses", "purges", "reset_ns", "bytes_zeroed", "fallbacks", "rejected",
                "peak_live")

    def flat(figures):
        return [figures[key] for key in counters] + [
            n for key in ("evictions", "resets") for n in figures[key].values()]

    def watch():
        last = flat(linmem.metrics.read(pool))
        while not stop.is_set():
            now = flat(linmem.metrics.read(pool))
            down.extend((a, b) for a, b in zip(last, now, strict=True) if b < a)
            last = now

    def work(seed):
        rng = random.Random(seed)
        for n in range(1500):
            pool.create(PAGE * rng.randrange(1, 40), domain=f"{rng.randrange(400)}", **SHAPE).close()
            if n % 100 == 0:
                pool.trim()

    watcher = threading.Thread(target=watch)
    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in [watcher, *workers]:
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    watcher.join()
    assert down == []
    figures = linmem.metrics.read(pool)
    assert figures["hits_warm"] + figures["hits_cold"] + figures["misses"] + figures["fallbacks"] == 4500


@requires("prometheus_client")
def test_hostile_names_of_domains_stay_distinct_in_prometheus():
    import prometheus_client as client
    from prometheus_client.parser import text_string_to_metric_families

    pool = linmem.PoolingCreator()
    names = [None, "", '""', "''", "'", "\udc80", "'\\udc80'", "a\nb", 'a"} 1\nlinmem_pool_live 7',
             "back\\", "\\n", "\0", "é", "\U0001f600", "\ud83d\ude00"]
    for name in names:
        pool.create(PAGE, domain=name, **SHAPE).close()
    image = linmem.Image.from_bytes(b"i" * PAGE)
    other = linmem.Image.from_bytes(b"j" * PAGE)
    mems = [image.new_memory(creator=pool, **SHAPE), other.new_memory(creator=pool, **SHAPE)]
    registry = client.CollectorRegistry()
    registry.register(linmem.metrics.collector(pool, names=["\udc80"]))
    text = client.generate_latest(registry).decode()
    samples = [(sample.name, tuple(sorted(sample.labels.items())))
               for family in text_string_to_metric_families(text) for sample in family.samples]
    assert len(set(samples)) == len(samples)
    assert sum(name == "linmem_pool_domain_misses_total" for name, _ in samples) == len(names)
    assert ("linmem_pool_domain_live", (("domain", "a\nb"), ("pool", "'\\udc80'"))) in samples
    mems.clear()


@requires("prometheus_client")
def test_a_scraped_exporter_shows_the_figures():
    import urllib.request

    import prometheus_client as client

    pool = linmem.PoolingCreator()
    for name in ("a", "a", None):
        pool.create(PAGE, domain=name, **SHAPE).close()
    registry = client.CollectorRegistry()
    registry.register(linmem.metrics.collector(pool, names=["guests"]))
    server, thread = client.start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics") as reply:
            text = reply.read().decode()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert 'linmem_pool_hits_total{pool="guests",state="warm"} 1.0' in text
    assert 'linmem_pool_misses_total{pool="guests"} 2.0' in text
    assert 'linmem_pool_domain_hits_total{domain="a",pool="guests",state="warm"} 1.0' in text
    assert 'linmem_pool_peak_live{pool="guests"} 1.0' in text
    shape = f"minimum={PAGE} maximum={64 * PAGE} reservation={64 * PAGE} guard={PAGE} is_64=True"
    assert f'linmem_pool_shape_hits_total{{pool="guests",shape="{shape}",state="warm"}} 1.0' in text
    for name in ("evictions_total", "purges_total", "live", "reserved", "resident", "reset_seconds_total",
                 "bytes_zeroed_total", "image_bytes", "image_descriptors"):
        assert f'linmem_pool_{name}{{' in text

