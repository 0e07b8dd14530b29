"""linmem's domain in tracemalloc: committed bytes, by the line that made the memory."""

import inspect
import textwrap
import threading
import tracemalloc

import pytest
from support import FORKING, PAGE, answer, requires, run_child

import linmem

MMAP = linmem.MmapCreator()


@pytest.fixture
def tracing():
    tracemalloc.start()
    yield
    tracemalloc.stop()


def here():
    """The line of the caller, as tracemalloc names it."""
    return f"{__file__}:{inspect.currentframe().f_back.f_lineno}"


def traced(group="lineno"):
    """The bytes and the number of memories for each line."""
    mine = tracemalloc.DomainFilter(True, linmem.tracemalloc_domain)
    found = tracemalloc.take_snapshot().filter_traces([mine]).statistics(group)
    return {str(one.traceback): (one.size, one.count) for one in found}


def grow(mem, size):
    mem.grow_to(size)


@pytest.mark.parametrize("kind", ["linmem", "mmap", "tracking", "statistics", "pool", "python"])
def test_a_memory_counts_with_its_committed_bytes_at_the_line_that_made_it_until_it_is_gone(kind, tracing):
    creator = linmem if kind == "linmem" else linmem.PythonCreator(MMAP) if kind == "python" else linmem.creator(kind)
    assert traced() == {}
    a, line = creator.create(1, 100 * PAGE), here()
    assert traced() == {line: (PAGE, 1)}
    grow(a, PAGE + 1)
    grow(a, 7 * PAGE)
    assert traced() == {line: (7 * PAGE, 1)}
    with pytest.raises(linmem.GrowError):
        grow(a, 101 * PAGE)
    view = memoryview(a)
    del a
    assert traced() == {line: (7 * PAGE, 1)}
    view.release()
    del view
    assert traced() == {}


def test_the_memories_of_a_line_add_up(tracing):
    kept, line = [MMAP.create((i + 1) * PAGE) for i in range(10)], here()
    assert traced() == {line: (55 * PAGE, 10)}
    del kept[5:]
    assert traced() == {line: (15 * PAGE, 5)}


def test_a_memory_that_is_older_than_start_does_not_appear_after_a_growth_either():
    old = MMAP.create(PAGE, 100 * PAGE)
    tracemalloc.start()
    try:
        grow(old, 2 * PAGE)
        new, line = MMAP.create(PAGE, 100 * PAGE), here()
        assert traced() == {line: (PAGE, 1)}
        tracemalloc.clear_traces()
        grow(new, 2 * PAGE)
        assert traced() == {}
    finally:
        tracemalloc.stop()
    tracemalloc.start()
    try:
        grow(new, 3 * PAGE)
        assert traced() == {}
        del new
        newest, line = MMAP.create(PAGE, 100 * PAGE), here()
        assert traced() == {line: (PAGE, 1)}
    finally:
        tracemalloc.stop()
    grow(newest, 5 * PAGE)
    assert old.byte_size() == 2 * PAGE


def test_a_slot_of_a_pool_counts_at_the_line_of_its_present_user(tracing):
    pool = linmem.PoolingCreator(MMAP)
    first, line = pool.create(PAGE, 10 * PAGE), here()
    grow(first, 3 * PAGE)
    assert traced() == {line: (3 * PAGE, 1)}
    first.close()
    assert traced() == {}
    second, line = pool.create(PAGE, 10 * PAGE), here()
    assert pool.stats()["hits"] == 1
    assert traced() == {line: (PAGE, 1)}
    grow(second, 2 * PAGE)
    assert traced() == {line: (2 * PAGE, 1)}
    second.close()
    pool.warm(2, linmem.MemoryType(1))
    assert traced() == {}


def test_a_memory_of_wasm_counts_at_the_line_that_made_the_instance(tracing):
    wasmtime = pytest.importorskip("wasmtime")
    import linmem.wasmtime

    config = wasmtime.Config()
    linmem.wasmtime.install(config)
    store = wasmtime.Store(wasmtime.Engine(config))
    module = wasmtime.Module(store.engine, """(module (memory (export "m") 1 9)
        (func (export "grow") (drop (memory.grow (i32.const 2)))))""")
    instance, line = wasmtime.Instance(store, module, []), here()
    assert traced() == {line: (65536, 1)}
    instance.exports(store)["grow"](store)
    assert traced() == {line: (3 * 65536, 1)}
    store.close()
    assert traced() == {}


@pytest.mark.parametrize("frames", [2, 10, 60])
def test_a_growth_keeps_the_whole_stack_of_the_creation(frames):
    def deep(n):
        return grow(mem, 2 * PAGE) if n == 0 else deep(n - 1)

    tracemalloc.start(frames)
    try:
        mem, line = linmem.create(PAGE, 9 * PAGE), here()
        def stack():
            mine = tracemalloc.DomainFilter(True, linmem.tracemalloc_domain)
            (trace,) = tracemalloc.take_snapshot().filter_traces([mine]).traces
            return trace.size, trace.traceback
        size, made = stack()
        assert (size, str(made[-1])) == (PAGE, line)
        assert len(made) == frames
        deep(5)
        assert stack() == (2 * PAGE, made)
        assert [frame for frame in made if "deep" in str(frame) or "creators.py" in str(frame)] == []
    finally:
        tracemalloc.stop()


def test_a_refused_creation_leaves_nothing(tracing):
    limit = linmem.LimitingCreator(MMAP, 4 * PAGE)
    with pytest.raises(linmem.LimitError):
        limit.create(5 * PAGE)
    mem, line = limit.create(PAGE, 100 * PAGE), here()
    with pytest.raises(linmem.LimitError):
        grow(mem, 5 * PAGE)
    assert traced() == {line: (PAGE, 1)}


def test_eight_threads_leave_exactly_the_memories_that_exist(tracing):
    kept = []

    def work():
        for n in range(50):
            mem = MMAP.create(PAGE, 9 * PAGE)
            grow(mem, 3 * PAGE)
            if n % 10 == 0:
                kept.append(mem)
            if n % 20 == 0:
                traced()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(traced().values()) == [(40 * 3 * PAGE, 40)]
    kept.clear()
    assert traced() == {}


def test_tracing_that_is_on_before_the_import_and_until_the_end_of_the_process_is_complete():
    done = run_child("""
        import tracemalloc
        tracemalloc.start()
        import linmem
        kept = linmem.create(65536, 1 << 20)
        pool = linmem.PoolingCreator()
        slot = pool.create(65536, 65536)
        def traced():
            mine = tracemalloc.DomainFilter(True, linmem.tracemalloc_domain)
            return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([mine]).traces)
        print(traced())
        class Late:
            def __del__(self, mem=kept):
                mem.grow_to(131072)
        late = Late()
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "131072\n", "")


def test_memories_of_one_line_leave_no_objects_behind():
    # In a child whose only thread besides the first starts here: since then, CPython 3.13 without a GIL frees no code.
    assert answer("""
        import threading, tracemalloc
        import linmem
        from linmem._core import borrowed_lines
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        tracemalloc.start()
        creator = linmem.MmapCreator()
        def objects(memories):
            for _ in range(memories):
                creator.create(1)
            lines = tracemalloc.Filter(True, borrowed_lines.__file__)
            return len(tracemalloc.take_snapshot().filter_traces([lines]).traces)
        before = objects(10)
        print(before > 0, objects(1000) < before + 50)      # CPython 3.10 keeps a few frames for later
    """) == "True True"


@requires("fork")
def test_a_forked_child_goes_on_tracing():
    answer(FORKING + textwrap.dedent("""
        import linmem, tracemalloc
        tracemalloc.start()
        def traced():
            mine = tracemalloc.DomainFilter(True, linmem.tracemalloc_domain)
            return sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([mine]).traces)
        kept = linmem.create(65536, 1 << 20)
        pool = linmem.creator("pool")
        ready, end = threading.Event(), False
        def work():
            while not end:
                mem = pool.create(65536, 1 << 20)
                mem.grow_to(131072)
                mem.close()
                ready.set()
        thread = threading.Thread(target=work)
        thread.start()
        ready.wait()
        def in_child():
            before = traced()
            mem = linmem.create(65536, 1 << 20)
            kept.grow_to(131072)
            assert traced() == before + 131072
            mem.close()
            pool.create(65536, 1 << 20).close()
            assert traced() == before + 65536
        for _ in range(30):
            child(os.fork, in_child)
        end = True
        thread.join()
    """))


@requires("rlimits")      # and so timers that send signals
@pytest.mark.parametrize("error", ["KeyboardInterrupt()", "SystemExit(3)", "TimeoutError('late')"])
@pytest.mark.parametrize("interrupt", ["SIG_IGN", "default_int_handler"])     # SIGINT is ignored in the background
def test_an_exception_of_a_signal_handler_in_a_creation_or_a_growth_reaches_the_program(error, interrupt):
    done = answer(f"""
        import signal, time, tracemalloc
        import linmem
        tracemalloc.start(20)
        end = time.monotonic() + 20
        only = tracemalloc.DomainFilter(True, linmem.tracemalloc_domain)
        signal.signal(signal.SIGINT, signal.{interrupt})
        error, mem = {error}, None
        def handler(*_):
            raise error
        signal.signal(signal.SIGALRM, handler)
        # A function: CPython 3.13 may raise at the jump of a loop as if the jump were outside of its try.
        def work(i):
            global mem
            signal.setitimer(signal.ITIMER_REAL, 0.001 + i * 0.00001)       # once
            while time.monotonic() < end:
                if i % 2:
                    linmem.create(65536).close()
                else:
                    mem = linmem.create(0, 1 << 22)
                    for size in range(65536, 1 << 22, 65536):
                        mem.grow_to(size)
        for i in range(24):
            try:
                work(i)
                print("the exception did not come")
                break
            except BaseException as raised:
                assert raised is error, raised
                raised.__traceback__ = None
            if i % 8 == 0:
                traced = sum(trace.size for trace in tracemalloc.take_snapshot().filter_traces([only]).traces)
                assert traced == sum(info.committed for info in linmem.live()), i
            if mem is not None:
                mem.close()
        print("alive")
    """)
    assert done == "alive"
