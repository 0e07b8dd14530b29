"""A forked child inherits memories, images, pools and locks that another thread holds, and ends cleanly."""

import textwrap

import pytest
from support import FORKING, PAGE, ROOT, build_extension, file_requires, requires, run_child

file_requires("fork")

HEAD = FORKING + f"""
import gc, pickle, time
import linmem
P = {PAGE}
how = dict(maximum=16 * P, reserve=16 * P, guard=P)
"""


def scene(code, first="", **how):
    """The output of a process that runs `first` and `code`. The process must succeed and write no errors."""
    done = run_child(HEAD + textwrap.dedent(first) + textwrap.dedent(code), **how)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout.strip()


# -- locks that another thread holds ------------------------------------------------------------------------

HOLDER = """
# cython: language_level=3
from libc.string cimport memset
from linmem._core.adaptors cimport StatisticsCreator
from linmem._core.linked_list cimport link
from linmem._core.memory cimport Memory, lock, unlock
from linmem._core.pool cimport PoolingCreator, census_lock

cdef extern from "<unistd.h>":
    int usleep(unsigned int) noexcept nogil

cdef volatile int held = 0


def is_held():
    return bool(held)


def in_a_ledger(StatisticsCreator creator not None, unsigned int us):
    '''Holds the lock with invalid lists for `us` microseconds. A fork must wait for the lock.'''
    global held
    cdef link live
    cdef size_t n
    with nogil:
        lock(&creator.ledger.lock.held)
        live, n = creator.ledger.live, creator.ledger.sums.current_count
        creator.ledger.live.next, creator.ledger.sums.current_count = NULL, 7
        held = 1
        usleep(us)
        creator.ledger.live, creator.ledger.sums.current_count = live, n
        unlock(&creator.ledger.lock.held)


def in_a_pool(PoolingCreator creator not None, unsigned int us):
    global held
    cdef link slots
    cdef size_t n
    with nogil:
        lock(&creator.pool.lock.held)
        slots, n = creator.pool.slots, creator.pool.n_slots
        creator.pool.slots.next, creator.pool.n_slots = NULL, 0
        held = 1
        usleep(us)
        creator.pool.slots, creator.pool.n_slots = slots, n
        unlock(&creator.pool.lock.held)


def in_a_census(creator, unsigned int us):
    global held
    with nogil:
        lock(&census_lock)
        held = 1
        usleep(us)
        unlock(&census_lock)


def in_a_memory(Memory mem not None, unsigned int us):
    '''Holds the memory's lock for `us` microseconds, like a growth or a snapshot.'''
    global held
    with nogil:
        lock(&mem.m.lock)
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
    "a census of all pools": ("in_a_census", "pool", """
        mem.close()
        linmem.set_pool_limits(max_resident=0)
        assert (pool.stats()["warm"], pool.stats()["cold"]) == (0, 1)"""),
    "a memory": ("in_a_memory", "mem", """
        mem.grow_to(3 * P)
        assert mem.snapshot().size == 3 * P
        mem.restore(mem.snapshot())
        mem.close()"""),
}


@requires("compiler")
@pytest.mark.parametrize("what", HELD)
def test_a_fork_works_while_another_thread_is_in_the_middle_of(holder, what):
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


# -- the child's state, and its end -------------------------------------------------------------------------

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
def test_a_child_uses_its_inherited_memories_without_effect_on_the_parents_and_ends_by(end):
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
        sys.exit(0)         # in the child's only thread, which was not the parent's main thread
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


def test_a_child_that_outlives_its_parent_keeps_its_inherited_memories():
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
    """vfork and posix_spawn run no handlers. The child shares the parent's memory until the child becomes the
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
    """Each thread has its own memories. The child uses other memories of the same creators and the same image."""
    assert scene("""
        image = linmem.Image.from_bytes(b"i" * 4 * P)
        image.digest        # imports hashlib: a fork during an import makes this import hang in the child
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
    """The memory's record of its content must match the pages."""
    assert scene(f"""
        images = [linmem.Image.from_bytes(mark * 4 * P) for mark in (b"a", b"b")]
        # A list: without a GIL, a thread that stores a global may hold the lock of the globals at the fork.
        newest = [images[0].new_memory()]
        ready, done = threading.Event(), threading.Event()
        def turn():
            while not done.is_set():
                if {fresh}:         # a memory without an image
                    newest[0] = linmem.create(4 * P)
                for img in images:
                    newest[0].restore(img)
                    ready.set()
        def either(mem, n):
            for img in (images[n % 2], images[1 - n % 2]):
                mem.restore(img)
                assert mem[:] == bytes(img), n
        def fork_often():
            for n in range(150):
                mem = newest[0]
                child(os.fork, lambda: either(mem, n))
        threads = [threading.Thread(target=turn, daemon=True) for _ in range(4 if {fresh} else 1)]
        for thread in threads:
            thread.start()
        ready.wait()
        fork_often()
        done.set()
        for thread in threads:
            thread.join()
        print("either")
        """) == "either"


def test_a_child_drops_the_memories_that_lost_threads_held():
    """In the child, Python drops the thread-locals of lost threads before the fork handlers run."""
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
        """) == "dropped"


# -- work that a lost thread left unfinished -------------------------------------------------------------------

GUARDED = """
def accessible(mem):
    # The end of the accessible range from the base on, by the OS; and whether this range is contiguous.
    info = mem.info()
    end, found = info.base, []
    with open("/proc/self/maps") as file:
        lines = file.read().splitlines()
    for line in lines:
        start, stop = (int(part, 16) for part in line.split(" ")[0].split("-"))
        if line.split(" ")[1] != "---p" and start < info.base + info.byte_capacity + info.guard and stop > info.base:
            found.append((max(start, info.base), stop))
    for start, stop in found:
        assert start == end, (found, info)
        end = stop
    return end - info.base

def exact(mem):
    info = mem.info()
    whole = -(-info.byte_size // P) * P
    assert (accessible(mem), info.committed) == (whole, whole), (accessible(mem), info)

def looping(work, forks, look, before=tuple):
    # A thread repeats `work` while this thread forks. `look` must succeed in each child. Its arguments are those that
    # `before` returns: without a GIL, `work` may hold the lock of a list or of the globals at the fork.
    stop, failed = threading.Event(), []
    def churn():
        try:
            while not stop.is_set():
                work()
        except BaseException as error:
            failed.append(error)
    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for n in range(forks):
            time.sleep(n % 7 * 0.0001)
            given = before()
            child(os.fork, lambda: look(*given))
    finally:
        stop.set()
        thread.join()
    assert not failed, failed
"""

GROWTHS = {
    "of a mapped memory": "linmem.MmapCreator(), dict(maximum=1 << 30, reserve=1 << 30, guard=P)",
    "that makes pages resident": "linmem.MmapCreator(prefault=True), dict(maximum=1 << 30, reserve=1 << 30, guard=P)",
    "into the hidden pages of a pool's slot":
        "linmem.PoolingCreator(reset='zero'), dict(maximum=1 << 30, reserve=1 << 30, guard=P)",
    "that moves": "linmem.MmapCreator(), dict(maximum=1 << 30, reserve=0, guard=P, may_move=True)",
    "that is counted":
        "linmem.StatisticsCreator(linmem.MmapCreator()), dict(maximum=1 << 30, reserve=1 << 30, guard=P)",
}


@requires("maps")
@pytest.mark.parametrize("kind", GROWTHS)
def test_a_child_that_is_forked_in_the_middle_of_a_growth_has_exact_guards(kind):
    """The accessible range matches the memory's size before the child calls any method of the memory."""
    assert scene(f"""
        creator, how = {GROWTHS[kind]}
        newest = [creator.create(P, **how)]
        newest[0].info()
        def grow():
            fresh = creator.create(P, **how)
            fresh[0] = 7
            old, newest[0] = newest[0], fresh
            old.close()
            for n in range(2, 40):
                fresh.grow_to(n * P + n % 3)
        def look(mem):
            if mem.closed:
                return
            exact(mem)
            size = len(mem)
            assert not any(mem.read(1, size - 1))
            mem.grow_to(size + 3 * P)
            exact(mem)
            assert not any(mem.read(size, 3 * P))
            mem.close()
        looping(grow, 100, look, lambda: [newest[0]])
        print("exact")
        """, GUARDED) == "exact"


@requires("maps", "compiler")
@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in GROWTHS if kind != "that moves"])
def test_a_growth_that_a_fork_breaks_off_after_its_page_call_has_not_begun_in_the_child(kind, half):
    """Forks at the one step that the test above reaches only sometimes: the pages are accessible, but the new size is
    not published."""
    assert scene(f"""
        sys.path.insert(0, {str(half)!r})
        import half
        creator, how = {GROWTHS[kind]}
        mem = creator.create(P, **how)
        thread = threading.Thread(target=half.grow, args=(mem, 9 * P), daemon=True)
        thread.start()
        while not half.is_held():
            time.sleep(0.001)
        assert accessible(mem) == 9 * P
        child(os.fork, lambda: (exact(mem), mem.grow_to(2 * P), exact(mem), mem.close()))
        half.let_go()
        thread.join()
        print("exact")
        """, GUARDED) == "exact"


@requires("maps", "compiler")
@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["the first change", "a later change"])
def test_a_child_of_a_fork_in_the_middle_of_a_change_of_protection_protects_again(first, half):
    """The thread that was changing the table of accesses is lost, so the table is half written."""
    assert scene(f"""
        sys.path.insert(0, {str(half)!r})
        import half
        mem = linmem.create(4 * P)
        mem.write(0, b"x" * 4 * P)
        if not {first}:
            mem.protect(0, P, "r")
        def work():
            mem.protect(P, P, "none")
            for use in (lambda: mem.read(P, 1), lambda: mem.write(2 * P - 1, b"y")):
                try:
                    use()
                except ValueError:
                    continue
                raise AssertionError(use)
            mem.protect(0, 4 * P, "rw")
            assert mem.read(0, 4 * P) == b"x" * 4 * P
            mem.write(0, bytes(4 * P))
            mem.close()
        thread = threading.Thread(target=half.protect, args=(mem,), daemon=True)
        thread.start()
        while not half.is_held():
            time.sleep(0.001)
        child(os.fork, work)
        child(os.fork, lambda: child(os.fork, work))
        half.let_go()
        thread.join()
        work()
        print("protected")
        """) == "protected"


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    build_extension(folder, "half", HALF_DONE, headers=True)
    return folder


HALF_DONE = """
# cython: language_level=3
from linmem._core.atomic cimport load, store
from linmem._core.memory cimport PROTECTION_UNKNOWN, Memory, lock, unlock
from linmem._os cimport pages

cdef extern from "<unistd.h>":
    int usleep(unsigned int) noexcept nogil

cdef volatile int held = 0


def is_held():
    return bool(held)


def let_go():
    global held
    held = 0


cdef struct table:          # the first fields of the struct `protections` in protection.pxi
    void* of
    size_t* borders
    size_t n
    size_t gap
    size_t room


def protect(Memory mem not None):
    '''The first half of a change of protection, with a half-written table. let_go() ends the change.'''
    global held
    cdef long long was
    cdef table kept
    cdef table* t = <table*>mem.m.protections
    with nogil:
        lock(&mem.m.lock)
        was = load(&mem.m.protection)
        store(&mem.m.protection, PROTECTION_UNKNOWN)
        if t != NULL:
            kept = t[0]
            t.borders = <size_t*>16
            t.n = t.gap = t.room = 1 << 40
        held = 1
        while held:
            usleep(1000)
        if t != NULL:
            t[0] = kept
        store(&mem.m.protection, was)
        unlock(&mem.m.lock)


def grow(Memory mem not None, size_t size):
    '''The first half of a growth. let_go() ends the growth.'''
    global held
    with nogil:
        lock(&mem.m.lock)
        mem.m.opening = size
        pages.commit(mem.m.base + mem.m.accessible, size - mem.m.accessible)
        held = 1
        while held:
            usleep(1000)
        mem.m.accessible = size
        mem.m.size = <long long>size
        mem.m.opening = 0
        unlock(&mem.m.lock)
"""


def test_a_child_closes_a_memory_that_another_thread_was_reading():
    assert scene("""
        mem = linmem.create(1 << 22, maximum=1 << 30, reserve=1 << 30)
        mem.info()          # a fork during an import makes this import hang in the child
        def use():
            mem.read(0, 1 << 22)
            mem.write(0, bytes(1 << 22))
            mem.info()
        def look():
            assert mem.info().exports == 0
            mem.close()
            assert mem.closed
            mem.close()
            try:
                mem[0]
            except ValueError:
                return
            raise AssertionError("a closed memory can be read")
        looping(use, 60, look)
        mem.close()
        print("closed")
        """, GUARDED) == "closed"


@requires("maps")
def test_a_memory_that_was_closed_while_a_thread_read_it_is_given_back_by_the_child():
    """The thread that would have released the memory is lost."""
    assert scene(f"""
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from support import is_mapped
        def read(mem):
            try:
                mem.read(0, 1 << 26)
            except ValueError:                  # on a busy machine, the memory may be closed before the call begins
                pass
        for attempt in range(50):
            mem = linmem.create(1 << 26, maximum=1 << 26)
            base = mem.as_ptr()
            thread = threading.Thread(target=read, args=(mem,))
            thread.start()
            time.sleep(attempt % 5 * 0.001)
            mem.close()
            if is_mapped(base):             # the thread is inside the call
                def work():
                    mem.close()
                    assert not is_mapped(base)
                child(os.fork, work)
                thread.join()
                assert not is_mapped(base)
                break
            thread.join()
        print("given back")
        """) == "given back"


def test_an_exported_buffer_is_the_childs_too_and_refuses_to_close_there():
    assert scene("""
        mem = linmem.create(P)
        views = [memoryview(mem), mem.view(">I")]
        def work():
            for left in (2, 1):
                try:
                    mem.close()
                except BufferError as error:
                    assert f"{left} exported buffer(s)" in str(error), error
                else:
                    raise AssertionError("closed")
                views.pop().release()
            mem.close()
        child(os.fork, work)
        child(os.fork, lambda: child(os.fork, work))
        work()
        print("two")
        """) == "two"


def test_a_budget_and_statistics_do_not_count_a_growth_that_no_thread_ends():
    """The fork happens while a thread is in grow_to of a memory in Python."""
    assert scene("""
        limit = linmem.LimitingCreator(linmem.PythonCreator(Delegating()), 100 * P)
        book = linmem.StatisticsCreator(limit)
        mem = book.create(P, **how)
        inside, go_on = threading.Event(), threading.Event()
        Delegate.during = lambda self: (inside.set(), go_on.wait(30))
        thread = threading.Thread(target=mem.grow_to, args=(9 * P,))
        thread.start()
        inside.wait(30)
        def work():
            Delegate.during = lambda self: None
            assert limit.used_bytes == P
            record = book.memories()[0]
            assert (record["size"], record["refused"], record["growths"]) == (P, 1, 0), record
            mem.grow_to(5 * P)
            assert (len(mem), limit.used_bytes) == (5 * P, 5 * P)
            mem.close()
            assert limit.used_bytes == 0
        assert limit.used_bytes == 9 * P
        child(os.fork, work)
        go_on.set()
        thread.join()
        assert (len(mem), limit.used_bytes, book.memories()[0]["growths"]) == (9 * P, 9 * P, 1)
        print("counted")
        """, DELEGATES) == "counted"


@pytest.mark.parametrize("options", [{"reset": "zero"}, {"reset": "discard"}, {"max_unused_warm": 0},
                                     {"reset": "zero", "check": True}])
@pytest.mark.parametrize("above", [False, True])
def test_a_slot_that_a_lost_thread_was_using_is_neither_in_use_nor_charged_in_the_child(options, above):
    assert scene(f"""
        size = 64 << 20
        below = linmem.LimitingCreator(linmem.MmapCreator(), 1 << 40)
        book = linmem.StatisticsCreator(below)
        pool = inner = linmem.PoolingCreator(book, slots=2, when_full="error", keep_resident=1 << 40, **{options!r})
        if {above}:
            pool = linmem.PoolingCreator(pool, slots=2, when_full="error", keep_resident=1 << 40, **{options!r})
        over = linmem.LimitingCreator(pool, 1 << 40)
        creator = linmem.StatisticsCreator(over)
        how = dict(reserve=size, guard=P)
        def work():
            for mem in mems:
                mem.close()
            stats = pool.stats()
            assert (stats["live"], over.used_bytes, creator.statistics()["current_count"]) == (0, 0, 0), stats
            assert below.used_bytes == book.statistics()["current_bytes"] == stats["warm"] * size, stats
            with pool.create(size, **how) as one, pool.create(size, **how) as other:
                assert one[size - 1] == other[size - 1] == 0
            creator.memories(), book.memories()
            pool.trim(), inner.trim()
            assert below.used_bytes == 0
        for n in range(6):
            mems = [creator.create(size, **how) for _ in range(2)]
            for mem in mems:
                mem.write(0, b"x" * (8 << 20))
            threads = [threading.Thread(target=mem.close) for mem in mems]
            for thread in threads:
                thread.start()
            while creator.statistics()["current_count"]:    # while it is not 0, threads still hold references
                time.sleep(0)
            time.sleep(n * 0.003)
            child(os.fork, work)
            for thread in threads:
                thread.join()
        print("dropped")
        """) == "dropped"


def test_a_child_is_not_charged_for_the_memory_that_a_lost_thread_was_making_but_for_its_own():
    assert scene("""
        class Creator(linmem.MemoryCreator):
            def new_memory(self, *request):
                during()
                return linmem.MmapCreator().new_memory(*request)
        inner = linmem.LimitingCreator(linmem.PythonCreator(Creator()), 100 * P)
        outer = linmem.LimitingCreator(inner, 100 * P)
        inside, go_on = threading.Event(), threading.Event()
        during = lambda: (inside.set(), go_on.wait(30))
        thread = threading.Thread(target=lambda: outer.create(9 * P, **how))
        thread.start()
        inside.wait(30)
        pids = []
        def forks():
            global during
            during = lambda: None
            pids.append(os.fork())
        during = forks
        assert (outer.used_bytes, inner.used_bytes) == (9 * P, 9 * P)
        with outer.create(2 * P, **how):
            more = 0 if pids == [0] else 9 * P
            assert (outer.used_bytes, inner.used_bytes) == (2 * P + more, 2 * P + more)
        assert (outer.used_bytes, inner.used_bytes) == (more, more)
        if pids == [0]:
            os._exit(0)
        assert os.waitpid(pids[0], 0)[1] == 0
        go_on.set()
        thread.join()
        assert (outer.used_bytes, inner.used_bytes) == (0, 0)
        print("charged")
        """) == "charged"


def test_a_memory_in_python_that_a_lost_thread_was_moving_is_lost_in_the_child():
    """The memory's object may have released the old address and not have published the new address."""
    assert scene("""
        mem = linmem.PythonCreator(Delegating()).create(P, reserve=0, guard=P, may_move=True)
        mem[0] = 5
        inside, go_on = threading.Event(), threading.Event()
        Delegate.during = lambda self: (inside.set(), go_on.wait(30))
        thread = threading.Thread(target=mem.grow_to, args=(mem.byte_capacity() + P,))
        thread.start()
        inside.wait(30)
        def work():
            for use in (mem.as_ptr, mem.info, mem.snapshot, lambda: mem[0], lambda: memoryview(mem)):
                try:
                    use()
                except RuntimeError as error:
                    assert "the memory is lost" in str(error), error
                else:
                    raise AssertionError(use)
            assert repr(mem) == "<linmem.Memory, lost>"
            mem.close()
        child(os.fork, work)
        go_on.set()
        thread.join()
        assert mem[0] == 5
        print("lost")
        """, DELEGATES) == "lost"


def test_a_growth_whose_own_code_forks_continues_in_the_child_under_its_lock():
    assert scene("""
        pids = []
        def during(self):
            pids.append(os.fork())
            if pids[-1] == 0:
                inside.set()
                other = threading.Thread(target=lambda: (mem.grow_to(size + P), order.append("other")))
                other.start()
                other.join(0.05)
                order.append("own")
                others.append(other)
                for refused in (mem.close, mem.snapshot):
                    try:
                        refused()
                    except RuntimeError as error:
                        assert "in a growth of this memory already" in str(error), error
                    else:
                        raise AssertionError(refused)
            Delegate.during = lambda self: None
        inside, order, others = threading.Event(), [], []
        for moves in (False, True):
            pids.clear()
            Delegate.during = during
            mem = linmem.PythonCreator(Delegating()).create(P, maximum=1 << 30, reserve=16 * P, guard=P, may_move=True)
            size = mem.byte_capacity() + P if moves else 5 * P
            mem.grow_to(size)
            if pids[0] == 0:
                others[0].join(30)
                assert order == ["own", "other"] and len(mem) == size + P, (order, len(mem))
                mem.close()
                os._exit(0)
            assert os.waitpid(pids[0], 0)[1] == 0
            mem.close()
        print("in order")
        """, DELEGATES) == "in order"


DELEGATES = """
        class Delegate(linmem.LinearMemory):
            # A memory that linmem knows only by the methods of the trait.
            during = lambda self: None
            def __init__(self, *request): self.inner = linmem.MmapCreator().new_memory(*request)
            def byte_size(self): return self.inner.byte_size()
            def byte_capacity(self): return self.inner.byte_capacity()
            def as_ptr(self): return self.inner.as_ptr()
            def wasm_accessible(self): return self.inner.wasm_accessible()
            def grow_to(self, new_size):
                type(self).during(self)
                self.inner.grow_to(new_size)
        class Delegating(linmem.MemoryCreator):
            def new_memory(self, *request): return Delegate(*request)
"""


@requires("dask")
def test_a_child_uses_the_pools_of_a_worker_while_a_thread_of_the_parent_is_in_their_lock():
    assert scene("""
        import linmem.dask
        images = [linmem.Image.from_bytes(bytes([n]) * P) for n in range(12)]     # a worker keeps fewer pools
        [image.digest for image in images]
        stop = threading.Event()
        def churn():
            while not stop.is_set():
                for image in images:
                    linmem.dask.worker_pool(image)
        thread = threading.Thread(target=churn)
        thread.start()
        def work():
            with linmem.dask.memory(images[3]) as mem:
                assert mem[0] == 3
            linmem.dask.traffic()
        for _ in range(40):
            child(os.fork, work)
        stop.set()
        thread.join()
        print("used")
        """) == "used"
