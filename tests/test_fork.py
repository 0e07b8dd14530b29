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
        acquire(&creator.ledger.lock.held)
        live, n = creator.ledger.live, creator.ledger.n_live
        creator.ledger.live, creator.ledger.n_live = NULL, 7
        held = 1
        usleep(us)
        creator.ledger.live, creator.ledger.n_live = live, n
        unlock(&creator.ledger.lock.held)


def in_a_pool(PoolingCreator creator not None, unsigned int us):
    global held
    cdef slot* slots
    cdef size_t n
    with nogil:
        acquire(&creator.pool.lock.held)
        slots, n = creator.pool.slots, creator.pool.n_slots
        creator.pool.slots, creator.pool.n_slots = NULL, 0
        held = 1
        usleep(us)
        creator.pool.slots, creator.pool.n_slots = slots, n
        unlock(&creator.pool.lock.held)


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


# -- what a child has, and how it ends ----------------------------------------------------------------------

EVERYTHING = """
pool = linmem.PoolingCreator(linmem.LimitingCreator(linmem.MmapCreator(), 1 << 30))
statistics = linmem.StatisticsCreator(pool)
class Mine(linmem.MemoryCreator):
    def new_memory(self, *asked): return pool.new_memory(*asked)
mems = [creator.create(2 * P, **how) for creator in (
    linmem.MmapCreator(), pool, statistics, linmem.PythonCreator(Mine()))]
for mem in mems:
    mem.write(0, b"inherited")
views = [memoryview(mem) for mem in mems]
image = linmem.Image.from_bytes(b"i" * 3 * P)
kept = image.new_memory(maximum=16 * P)
kept[0] = ord("w")
moving = linmem.create(P, reserve=0, may_move=True)

def use():
    for mem, view in zip(mems, views, strict=True):
        assert bytes(view[:9]) == b"inherited"
        view[:9] = b"of child."
        mem.grow_to(3 * P)
        assert mem.read(0, 9) == b"of child." and not any(mem.read(9, 3 * P - 9))
        view.release()
        mem.discard()
        mem.protect(0, P, "r")
        mem.close()
    assert kept[:3 * P] == b"w" + b"i" * (3 * P - 1)
    kept.restore(image)
    assert kept[:] == bytes(image) == bytes(image.new_memory(creator=pool))
    kept.grow_to(5 * P)
    assert bytes(pickle.loads(pickle.dumps(kept.snapshot()))) == bytes(image) + bytes(2 * P)
    moving.grow_to(moving.byte_capacity() + 9 * P)
    for creator in (pool, statistics):
        creator.create(P, **how).close()
    assert statistics.statistics()["current_count"] == 0
    assert pool.stats()["live"] == 0
    pool.trim()
    assert pool.upstream.used_bytes == 0

def check():
    for mem, view in zip(mems, views, strict=True):
        assert bytes(view) == b"inherited" + bytes(2 * P - 9) and len(mem) == 2 * P
    assert kept[:] == b"w" + b"i" * (3 * P - 1)
    assert len(moving) == P and (pool.stats()["live"], statistics.statistics()["current_count"]) == (3, 1)
"""

ENDS = {"os._exit": "os._exit(0)", "sys.exit": "sys.exit(0)", "the end of the script": "",
        "an exit handler": "import atexit; atexit.register(linmem.create(P).close)"}


@pytest.mark.parametrize("end", ENDS)
def test_a_child_uses_all_that_it_inherited_and_leaves_the_parents_alone_and_ends_by(end):
    assert scene(EVERYTHING + f"""
pid = os.fork()
if pid == 0:
    use()
    pid = os.fork()
    if pid == 0:
        with linmem.create(P, creator=pool) as mem:     # of the grandchild
            mem[0] = 1
    else:
        assert os.waitpid(pid, 0)[1] == 0
    {ENDS[end]}
else:
    assert os.waitpid(pid, 0)[1] == 0
    check()
    use()
    print("untouched")
""") == "untouched"


def test_a_child_that_a_thread_forked_may_use_all_and_end_by_itself():
    assert scene(EVERYTHING + """
pids = []
def fork():
    pid = os.fork()
    if pid == 0:
        use()
        sys.exit(0)         # of the child's only thread, which was not the parent's main one
    pids.append(pid)
threads = [threading.Thread(target=fork) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0, 0]
check()
print("untouched")
""") == "untouched"


def test_a_child_that_outlives_its_parent_keeps_what_it_inherited():
    assert scene(EVERYTHING + """
read, write = os.pipe()
if os.fork() == 0:
    parent = os.getpid()
    if os.fork() == 0:
        while os.getppid() == parent:
            time.sleep(0.01)
        use()
        os.write(write, b"outlived")
    os._exit(0)
os.close(write)
print(os.read(read, 100).decode())
os.wait()
""") == "outlived"


TASKS = """
import linmem

pool = linmem.PoolingCreator()

def work(task):
    image, delta, number = task
    with image.new_memory(creator=pool) as mem:
        mem.apply(delta)
        mem[0] = number
        mem.grow_to(len(mem) + 65536)
        return mem.snapshot()
"""


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing_runs_tasks_on_images_while_threads_grow_and_move_memories(method, tmp_path):
    (tmp_path / "tasks.py").write_text(TASKS)
    assert scene(f"""
        sys.path.insert(0, {str(tmp_path)!r})
        import multiprocessing, tasks
        stop = threading.Event()
        def churn():
            while not stop.is_set():
                with linmem.create(P, reserve=0, may_move=True) as mem:
                    mem.write(0, b"mine")
                    mem.grow_to(1 << 20)
                    assert mem.read(0, 4) == b"mine"
                tasks.pool.create(P, **how).close()
        threads = [threading.Thread(target=churn) for _ in range(2)]
        for thread in threads:
            thread.start()
        image = linmem.Image.from_bytes(bytes(range(256)) * (P // 64))
        other = image.new_memory()
        other[P] = 77
        delta = image.diff(other)
        with multiprocessing.get_context({method!r}).Pool(2) as processes:
            done = processes.map(tasks.work, [(image, delta, number) for number in range(8)])
        stop.set()
        for thread in threads:
            thread.join()
        for number, one in enumerate(done):
            other[0] = number
            assert bytes(one) == bytes(other) + bytes(65536), number
        print("done")
        """) == "done"


def test_programs_are_started_while_threads_grow_and_move_memories():
    """By vfork and posix_spawn, which run no handlers: the child shares the parent's memory until it becomes the
    program."""
    assert scene("""
        import subprocess
        stop = threading.Event()
        wrong = []
        def churn(n):
            while not stop.is_set():
                with linmem.create(P, reserve=0, may_move=True) as mem:
                    mem.write(0, bytes([n]) * P)
                    mem.grow_to(1 << 18)
                    if bytes(mem) != bytes([n]) * P + bytes((1 << 18) - P):
                        wrong.append(n)
        threads = [threading.Thread(target=churn, args=(n,)) for n in range(1, 4)]
        for thread in threads:
            thread.start()
        for n in range(30):
            if n % 3:
                assert subprocess.run(["true"], close_fds=n % 3 == 1).returncode == 0
            else:
                pid = os.posix_spawnp("true", ["true"], os.environ)
                assert os.waitpid(pid, 0)[1] == 0
        stop.set()
        for thread in threads:
            thread.join()
        print(wrong)
        """) == "[]"


def test_a_fork_while_threads_snapshot_restore_and_refuse_leaves_a_child_that_works():
    """Each thread has memories of its own; the child uses others, of the same creators and the same image."""
    assert scene("""
        image = linmem.Image.from_bytes(b"i" * 4 * P)
        image.digest        # imports hashlib: what another thread is importing at a fork a child can never import
        limit = linmem.LimitingCreator(linmem.MmapCreator(), 64 * P)
        statistics = linmem.StatisticsCreator(linmem.PoolingCreator(limit, max_unused_warm=1), history=4)
        stop = threading.Event()
        failed = []
        def churn(n):
            try:
                while not stop.is_set():
                    with image.new_memory(creator=statistics, maximum=40 * P, reserve=40 * P, guard=P) as mem:
                        mem[n * P] = 1
                        assert mem.snapshot() != image
                        mem.restore(image)
                        try:
                            mem.grow_to(40 * P)
                        except linmem.LimitError:
                            pass
                        assert mem[:4 * P] == bytes(image)
            except BaseException as error:
                failed.append(error)
        threads = [threading.Thread(target=churn, args=(n,)) for n in range(3)]
        for thread in threads:
            thread.start()
        def work():
            with image.new_memory(creator=linmem.StatisticsCreator(linmem.PoolingCreator())) as mem:
                mem[5] = 5
                assert mem.snapshot().diff(image).ranges == ((0, P),)
                mem.restore(image)
                assert mem[:] == bytes(image)
            records = statistics.memories()
            assert sum(one["alive"] for one in records) == statistics.statistics()["current_count"] <= 3
            assert 0 <= limit.used_bytes <= limit.peak_bytes <= 64 * P
            try:
                statistics.create(P, **how).close()
            except linmem.LimitError:
                pass
            statistics.upstream.trim()
            statistics.upstream.stats()
        for _ in range(25):
            child(os.fork, work)
        stop.set()
        for thread in threads:
            thread.join()
        assert not failed, failed
        statistics.upstream.trim()
        print(limit.used_bytes, statistics.statistics()["current_count"])
        """) == "0 0"


@requires("maps_images")
@pytest.mark.parametrize("fresh", [False, True])
def test_a_child_forked_in_the_middle_of_a_restore_may_restore_to_either_image(fresh):
    """What the pages show and what the memory says that they show must not come apart."""
    assert scene(f"""
        images = [linmem.Image.from_bytes(mark * 4 * P) for mark in (b"a", b"b")]
        mem = images[0].new_memory()
        ready, done = threading.Event(), threading.Event()
        def turn():
            global mem
            while not done.is_set():
                if {fresh}:         # of no image yet
                    mem = linmem.create(4 * P)
                for img in images:
                    mem.restore(img)
                    ready.set()
        def either(n):
            for img in (images[n % 2], images[1 - n % 2]):
                mem.restore(img)
                assert mem[:] == bytes(img), n
        threads = [threading.Thread(target=turn, daemon=True) for _ in range(4 if {fresh} else 1)]
        for thread in threads:
            thread.start()
        ready.wait()
        for n in range(150):
            child(os.fork, lambda: either(n))
        done.set()
        for thread in threads:
            thread.join()
        print("either")
        """) == "either"


def test_a_child_drops_what_the_threads_held_that_it_has_not():
    """Python drops their thread-locals in the child before it calls anyone's handlers."""
    assert scene("""
        pool = linmem.PoolingCreator()
        statistics = linmem.StatisticsCreator(linmem.LimitingCreator(pool, 1 << 30))
        own = threading.local()
        ready, stop = threading.Barrier(4), threading.Event()
        def hold():
            own.held = [statistics.create(P, **how), pool.create(P, **how), linmem.StatisticsCreator(pool)]
            own.held.append(memoryview(own.held[0]))
            ready.wait()
            stop.wait()
        threads = [threading.Thread(target=hold) for _ in range(3)]
        for thread in threads:
            thread.start()
        ready.wait()
        assert (pool.stats()["live"], statistics.statistics()["current_count"]) == (6, 3)
        def work():
            assert (pool.stats()["live"], statistics.statistics()["current_count"]) == (0, 0)
            assert statistics.upstream.used_bytes == 0
            with pool.create(P, **how) as mem:
                assert not any(mem)
        child(os.fork, work)
        child(os.fork, lambda: child(os.fork, work))
        assert (pool.stats()["live"], statistics.statistics()["current_count"]) == (6, 3)
        stop.set()
        for thread in threads:
            thread.join()
        print("dropped")
        """, timeout=20) == "dropped"
