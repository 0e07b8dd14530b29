"""One pool with many threads, forked children, and the end of the interpreter."""

import gc
import random
import textwrap
import threading

import pytest
from support import (
    FORKING,
    FORKS,
    NEEDS,
    PAGE,
    SCAN_WAYS,
    answer,
    check_fresh,
    live_bytes,
    requires,
    round_up,
    run_child,
)

import linmem
import linmem.metrics

SHAPE = {"maximum": 16 * PAGE, "reserve": 16 * PAGE, "guard": PAGE}
WAYS = [*sorted(SCAN_WAYS), None]


def live():
    return live_bytes() if NEEDS["maps"][0] else 0


def run_threads(*works):
    """Runs each function in a thread, all from a common start. Raises the threads' exceptions."""
    errors = []
    start = threading.Barrier(len(works))

    def guarded(work):
        try:
            start.wait(60)
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def use(pool, rng, mark):
    """Uses one memory, which must be zero and then hold only this thread's bytes."""
    minimum = rng.choice((0, 1, PAGE, 3 * PAGE, 9 * PAGE))
    with pool.create(minimum, **SHAPE) as mem:
        assert bytes(mem).count(0) == minimum, "bytes of another"
        if rng.random() < 0.5:
            mem.grow_to(rng.randrange(minimum, 16 * PAGE))
            assert bytes(mem).count(0) == mem.byte_size(), "bytes of another in what it grew by"
        size = mem.byte_size()
        for _ in range(3):
            at = rng.randrange(size + 1)
            mem.write(at, mark * rng.randrange(min(size - at, 5000) + 1))
        assert set(bytes(mem)) <= {0, mark[0]}
        if rng.random() < 0.1 and size >= PAGE:
            mem.protect(0, PAGE, "none")


@pytest.mark.parametrize("options", [
    {}, {"check": True}, {"reset": "zero"}, {"reset": "discard", "max_unused_warm": 1}, {"slots": 3},
    {"max_unused_warm": 0}, {"slots": 2, "max_unused_warm": 1, "keep_resident": 4 * PAGE},
], ids=str)
def test_threads_never_see_each_others_bytes_and_the_figures_add_up(options):
    start = live()
    limit = linmem.LimitingCreator(linmem.MmapCreator(), 1 << 40)
    pool = linmem.PoolingCreator(limit, **options)

    def work(n):
        rng = random.Random(n)
        for _ in range(250):
            use(pool, rng, bytes([n + 1]))

    run_threads(*(lambda n=n: work(n) for n in range(4)))
    stats = pool.stats()
    assert stats["hits"] + stats["misses"] + stats["fallbacks"] == 1000
    assert (stats["live"], stats["pinned"], stats["rejected"]) == (0, 0, 0)
    assert sum(stats["resets"].values()) == stats["hits"] + stats["misses"]
    assert stats["warm"] + stats["cold"] <= stats["slots"]
    assert stats["warm"] <= options.get("max_unused_warm", 100)
    assert stats["resident"] <= stats["resident_bound"]
    assert stats["hits"] > 0
    pool.trim()
    assert limit.used_bytes == 0
    stats = pool.stats()
    assert (stats["warm"], stats["cold"], stats["resident"]) == (0, 0, 0)
    assert live() == start


def test_a_slot_that_another_thread_cools_is_not_in_use():
    pool, seen, done = linmem.creator("pool"), set(), threading.Event()
    cooling = [None]                # the round, while purge() runs and no slot has a user

    def cool():
        try:
            for n in range(60):
                for mem in [pool.create(PAGE, **SHAPE) for _ in range(20)]:
                    mem.close()
                cooling[0] = n
                pool.purge()
                cooling[0] = None
        finally:
            done.set()

    def look():
        while not done.is_set():
            before, figures, after = cooling[0], pool.stats(), cooling[0]
            if before is not None and before == after:
                seen.add(figures["live"])

    run_threads(cool, look)
    assert seen <= {0}


def test_the_bounds_of_all_pools_are_those_of_one_call():
    bounds = [(1 << 31, 1 << 40), (1 << 32, 1 << 41)]
    seen, done = set(), threading.Event()

    def bound():
        try:
            for n in range(300000):
                linmem.set_pool_limits(*bounds[n % 2])
        finally:
            done.set()

    def look():
        while not done.is_set():
            totals = linmem.metrics.totals()
            seen.add((totals["resident_bound"], totals["reserved_bound"]))

    linmem.set_pool_limits(*bounds[0])
    try:
        run_threads(bound, look)
    finally:
        linmem.set_pool_limits()
    assert seen <= set(bounds)


def test_stats_trim_and_warm_may_be_called_while_others_use_the_pool():
    pool = linmem.PoolingCreator(max_unused_warm=2)
    ty = linmem.MemoryType(1, 2)
    done = threading.Event()

    def users(n):
        rng = random.Random(n)
        for _ in range(300):
            use(pool, rng, bytes([n + 1]))
        done.set()

    def owner():
        rng = random.Random(9)
        while not done.is_set():
            stats = pool.stats()
            assert all(n >= 0 for n in stats["resets"].values())
            assert all(stats[name] >= 0 for name in stats if name != "resets")
            assert stats["pinned"] <= stats["live"]
            assert pool.trim(rng.choice((0, PAGE, 1 << 30))) >= 0
            made = pool.warm(2, ty, reserved_size_in_bytes=1 << 18, guard_size_in_bytes=round_up(65536))
            assert 0 <= made <= 2

    run_threads(lambda: users(0), lambda: users(1), owner)
    assert pool.stats()["live"] == 0


def test_a_memory_made_in_one_thread_is_reset_in_the_one_that_drops_it():
    pool = linmem.PoolingCreator()
    handed = []

    def make():
        for n in range(200):
            mem = pool.create(2 * PAGE, **SHAPE)
            mem.write(n, b"x" * PAGE)
            handed.append(mem)

    def drop():
        dropped = 0
        while dropped < 200:
            if handed:
                handed.pop().close()
                dropped += 1

    run_threads(make, drop)
    assert (pool.stats()["live"], sum(pool.stats()["resets"].values())) == (0, 200)
    for _ in range(pool.stats()["warm"]):
        with pool.create(2 * PAGE, **SHAPE) as mem:
            check_fresh(mem, 2 * PAGE)


def test_a_creator_may_be_freed_while_other_threads_use_its_memories():
    for _ in range(20):
        start = live()
        pools = [linmem.PoolingCreator()]
        mems = [[pools[0].create(PAGE, **SHAPE) for _ in range(20)] for _ in range(3)]

        def drop(mine):
            while mine:
                mem = mine.pop()
                mem.grow_to(3 * PAGE)
                mem[5] = 1
                mem.close()

        run_threads(*(lambda mine=mine: drop(mine) for mine in mems), pools.clear)
        gc.collect()
        assert live() == start


# -- fork -----------------------------------------------------------------------------------------------------

HEAD = """
import gc
import linmem
from linmem._os import pages
if {way!r}:
    pages.choose_scan({way!r})
P = {page}
how = dict(maximum=16 * P, reserve=16 * P, guard=P)

def secret_stays(pool, mark, at=(3, 5)):
    '''Two guests in a row: the second must not see a byte of the first. Returns the base.'''
    mem = pool.create(8 * P, **how)
    base = mem.as_ptr()
    assert bytes(mem).count(0) == 8 * P, "bytes of the guest before"
    for page in at:
        mem.write(page * P, mark * P)
    mem.close()
    mem = pool.create(8 * P, **how)
    assert mem.as_ptr() == base
    left = 8 * P - bytes(mem).count(0)
    mem.close()
    assert left == 0, f"{{left}} bytes of the guest before"
    return base
"""


def script(way, code):
    return FORKING + HEAD.format(way=way, page=PAGE) + textwrap.dedent(code)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fork", FORKS)
@pytest.mark.parametrize("reset", ["scan", "adaptive", "discard"])
def test_a_forked_child_resets_its_own_guests_pages(way, fork, reset):
    """The parent has a warm slot and an open descriptor of its pagemap. The child's guest writes other pages of that
    slot, and only the child's own pagemap shows these pages. With the inherited descriptor, the scan would describe the
    parent, miss the written pages, and leak the guest's bytes to the next user. The next test forces such a descriptor
    into the child and sees this leak. `_Fork` runs no fork handlers, like raw clone(2)."""
    if reset == "scan" and way is None:
        reset = "zero"
    assert answer(script(way, f"""
        pool = linmem.PoolingCreator(reset={reset!r})
        base = secret_stays(pool, b"p", at=(0,))
        def work():
            assert secret_stays(pool, b"c") == base
            assert secret_stays(pool, b"d", at=(1, 6)) == base
            child({fork}, lambda: secret_stays(pool, b"g", at=(2, 7)))
            assert secret_stays(pool, b"e", at=(4,)) == base
        for _ in range(3):
            child({fork}, work)
            assert secret_stays(pool, b"q", at=(2,)) == base
        assert pool.stats()["misses"] == 1
        print("kept apart")
        """)) == "kept apart"


WRONG_DESCRIPTOR = """
    inherited = os.open("/proc/self/pagemap", os.O_RDONLY)
    pool = linmem.PoolingCreator(reset="scan", check={check})
    secret_stays(pool, b"p", at=(0,))
    def work():
        secret_stays(pool, b"c")
        (own,) = (n for n, name in descriptors().items() if name.endswith("/pagemap") and n != inherited)
        if {forged}:        # the position, by which linmem recognises its own descriptor
            os.lseek(inherited, os.lseek(own, 0, os.SEEK_CUR), os.SEEK_SET)
        os.dup2(inherited, own)
        mem = pool.create(8 * P, **how)
        mem.write(6 * P, b"s" * P)
        mem.close()
        with pool.create(8 * P, **how) as mem:
            print(bytes(mem).count(b"s"), pool.stats()["rejected"], flush=True)
    child(os.fork, work)
"""


@requires("fork", "scan_ioctl")
def test_without_detection_the_parents_descriptor_would_leak_bytes_to_another_guest():
    """Forces the leak that the test above excludes, which shows that the test above can fail."""
    assert answer(script("ioctl", WRONG_DESCRIPTOR.format(check=False, forged=True))) == f"{PAGE} 0"
    assert answer(script("ioctl", WRONG_DESCRIPTOR.format(check=False, forged=False))) == "0 0"


@requires("fork", "scan_ioctl")
def test_check_discards_a_slot_whose_reset_left_a_byte():
    assert answer(script("ioctl", WRONG_DESCRIPTOR.format(check=True, forged=True))) == "0 1"


@pytest.mark.parametrize("way", WAYS)
@requires("fork")
def test_a_daemon_that_closed_every_descriptor_goes_on_with_the_pool(way):
    assert answer(script(way, """
        pool = linmem.PoolingCreator()
        base = secret_stays(pool, b"p")
        def daemon():
            os.setsid()
            def second():
                os.closerange(3, 256)
                log = os.open(os.devnull, os.O_RDWR)
                for n in range(20):
                    assert secret_stays(pool, b"d", at=(n % 8,)) == base
                    os.write(log, b"still mine")
                os.closerange(3, 256)
                assert secret_stays(pool, b"d", at=(7,)) == base
                child(os.fork, lambda: secret_stays(pool, b"g", at=(2, 7)))
            child(os.fork, second)
        child(os.fork, daemon)
        print("detached")
        """)) == "detached"


@pytest.mark.parametrize("way", WAYS)
@requires("fork")
def test_a_fork_while_threads_are_in_the_pool_leaves_a_child_that_works_and_ends(way):
    assert answer(script(way, """
        pool = linmem.PoolingCreator(max_unused_warm=1)
        stop = threading.Event()
        failed = []
        def churn(n):
            # a copy: without a GIL, a lost thread's lock on a shared dict would block the child forever
            own = dict(how)
            try:
                while not stop.is_set():
                    mems = [pool.create(8 * P, **own) for _ in range(3)]
                    for mem in mems:
                        assert bytes(mem).count(0) == 8 * P
                        mem.grow_to(12 * P)
                        mem.write(n * P, b"x" * 3 * P)
                    for mem in mems:
                        mem.close()
                    pool.trim(P)
                    pool.stats()
            except BaseException as error:
                failed.append(error)
        threads = [threading.Thread(target=churn, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        def work():
            for n in range(5):
                mems = [pool.create(8 * P, **how) for _ in range(4)]
                for mem in mems:
                    assert bytes(mem).count(0) == 8 * P
                    mem.write(n * P, b"c" * P)
                for mem in mems:
                    mem.close()
            stats = pool.stats()
            assert stats["live"] >= 0 and stats["warm"] <= 1
            pool.trim()
            assert pool.stats()["warm"] == pool.stats()["cold"] == 0
        def work_and_drop():
            global pool
            work()
            del pool
            gc.collect()
        for n in range(30):
            child(os.fork, work_and_drop if n % 2 else work)
        stop.set()
        for thread in threads:
            thread.join()
        assert not failed, failed
        print(pool.stats()["live"])
        """), timeout=300) == "0"


@requires("fork")
def test_a_fork_in_a_thread_leaves_a_child_that_ends_by_itself():
    assert answer(script(None, """
        pool = linmem.PoolingCreator()
        keep = pool.create(P, **how)
        def work():
            pid = os.fork()
            if pid == 0:
                secret_stays(pool, b"t")
                keep.close()
                sys.exit(0)             # in the child's only thread, which is not the parent's main thread
            assert os.waitpid(pid, 0)[1] == 0
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print("ended")
        """)) == "ended"


# -- the end of the interpreter -------------------------------------------------------------------------------

LAST_SECONDS = {
    "everything is a global": "",
    "the creator is gone first": "del pool",
    "the memories are gone first": "del mem, other, view",
    "modules hold them": "sys.a_pool, sys.a_mem, sys.a_view = pool, mem, view",
    "a cycle holds all": "cycle = [pool, mem, view]; cycle.append(cycle); del pool, mem, view",
    "the cycle is garbage": "cycle = [pool, mem, view]; cycle.append(cycle); gc.disable(); del pool, mem, view, cycle",
    "an exit handler closes": "import atexit; view.release(); atexit.register(mem.close); atexit.register(pool.trim)",
    "a finaliser uses the pool": """
        class Last:
            def __init__(self, pool): self.pool = pool
            def __del__(self):
                with self.pool.create(P, **how) as mem: mem[0] = 1
        last = Last(pool)
        sys.last = Last(pool)""",
    "it stands between adaptors": """
        chain = linmem.StatisticsCreator(linmem.PoolingCreator(linmem.LimitingCreator(pool, 1 << 30)))
        kept = chain.create(P, **how)
        chain.create(P, **how).close()""",
    "it stands over Python": """
        class Mine(linmem.MemoryCreator):
            def new_memory(self, *arguments): return linmem.MmapCreator().new_memory(*arguments)
        over = linmem.creator("pool", upstream=Mine())
        kept = over.create(P, **how)
        over.create(P, **how).close()""",
    "a daemon thread is in the pool": """
        started = threading.Event()
        def churn():
            while True:
                with pool.create(2 * P, **how) as mem: mem.grow_to(5 * P)
                started.set()
        threading.Thread(target=churn, daemon=True).start()
        started.wait()""",
}


@pytest.mark.parametrize("scene", LAST_SECONDS)
def test_the_interpreter_ends_cleanly_with_pooled_memories_while(scene):
    done = run_child(script(None, """
        pool = linmem.PoolingCreator()
        mem, other = pool.create(P, **how), pool.create(2 * P, **how)
        pool.create(P, **how).close()
        view = memoryview(mem)
        """) + textwrap.dedent(LAST_SECONDS[scene]) + "\nprint('end')\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
