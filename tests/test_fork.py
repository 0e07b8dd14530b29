"""What a forked child inherits: memories, images, pools, locks that another thread holds, and a clean end."""

import textwrap

import pytest
from support import FORKING, PAGE, build_extension, file_requires, requires, run_child

file_requires("fork")

HEAD = FORKING + f"""
import gc, pickle, time
import linmem
P = {PAGE}
how = dict(maximum=16 * P, reserve=16 * P, guard=P)
"""


def scene(code, **how):
    """What a process prints that runs `code`, ends well, and has nothing to say on stderr."""
    done = run_child(HEAD + textwrap.dedent(code), **how)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout.strip()


# -- locks that another thread holds ------------------------------------------------------------------------

HOLDER = """
# cython: language_level=3
from libc.string cimport memset
from linmem._adaptors cimport StatisticsCreator, record
from linmem._memory cimport Memory, acquire, unlock
from linmem._pool cimport PoolingCreator, slot

cdef extern from "<unistd.h>":
    int usleep(unsigned int) noexcept nogil

cdef volatile int held = 0


def is_held():
    return bool(held)


def in_a_ledger(StatisticsCreator creator not None, unsigned int us):
    '''Be in the middle of its lists for a while: nothing of them is as it must be.'''
    global held
    cdef record* live
    cdef size_t n
    with nogil:
        acquire(&creator.ledger.lock)
        live, n = creator.ledger.live, creator.ledger.n_live
        creator.ledger.live, creator.ledger.n_live = NULL, 7
        held = 1
        usleep(us)
        creator.ledger.live, creator.ledger.n_live = live, n
        unlock(&creator.ledger.lock)


def in_a_pool(PoolingCreator creator not None, unsigned int us):
    global held
    cdef slot* slots
    cdef size_t n
    with nogil:
        acquire(&creator.pool.lock)
        slots, n = creator.pool.slots, creator.pool.n_slots
        creator.pool.slots, creator.pool.n_slots = NULL, 0
        held = 1
        usleep(us)
        creator.pool.slots, creator.pool.n_slots = slots, n
        unlock(&creator.pool.lock)


def in_a_memory(Memory mem not None, unsigned int us):
    '''As a growth is, or a snapshot.'''
    global held
    with nogil:
        acquire(&mem.m.lock)
        held = 1
        usleep(us)
        unlock(&mem.m.lock)
"""


@pytest.fixture(scope="module")
def holder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("holder")
    build_extension(folder, "holder", HOLDER)
    return folder


HELD = {
    "the lists of a statistics creator": ("in_a_ledger", "statistics", """
        assert len(statistics.memories()) == 3
        assert statistics.statistics()["current_count"] == 3
        mem.close()
        statistics.create(P, **how).grow_to(2 * P)
        assert statistics.statistics()["current_count"] == 2"""),
    "the lists of a pool": ("in_a_pool", "pool", """
        assert pool.stats()["live"] == 3
        mem.close()
        assert (pool.stats()["live"], pool.stats()["warm"]) == (2, 1)
        pool.create(P, **how).close()
        pool.trim()"""),
    "a memory": ("in_a_memory", "mem", """
        mem.grow_to(3 * P)
        assert mem.snapshot().size == 3 * P
        mem.restore(mem.snapshot())
        mem.close()"""),
}


@pytest.mark.slow
@requires("compiler")
@pytest.mark.parametrize("what", HELD)
def test_a_fork_while_another_thread_is_in_the_middle_of(holder, what):
    call, it, work = HELD[what]
    assert scene(f"""
        sys.path.insert(0, {str(holder)!r})
        import holder
        pool = linmem.PoolingCreator()
        statistics = linmem.StatisticsCreator(pool)
        mem, *more = (statistics.create(P, **how) for _ in range(3))
        busy = threading.Thread(target=holder.{call}, args=({it}, 200_000))
        busy.start()
        while not holder.is_held():
            time.sleep(0.001)
        def work():
            {textwrap.indent(textwrap.dedent(work), " " * 12).strip()}
        child(os.fork, work)
        busy.join()
        work()
        print("whole")
        """) == "whole"
