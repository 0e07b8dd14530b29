"""TrackingCreator: which lines and scopes made memories, and what keeps the memories alive."""

import asyncio
import contextlib
import contextvars
import errno
import gc
import inspect
import re
import sys
import textwrap
import threading
import traceback
import weakref

import pytest
from support import FORKING, PAGE, answer, failing, requires

import linmem

MMAP = linmem.MmapCreator()


def tracking(upstream=MMAP, **options):
    return linmem.TrackingCreator(upstream, **options)


def line():
    """The line of the caller."""
    return inspect.currentframe().f_back.f_lineno


def make(creator, *sizes, **options):
    return creator.create(*sizes, **options)


def newest(stack):
    return stack[-1].filename, stack[-1].lineno, stack[-1].name


def sizes(allocations):
    return [found.size for found in allocations]


# -- stacks ------------------------------------------------------------------------------------------

def test_a_memory_has_the_stack_that_made_it_with_the_oldest_frame_first():
    tracker = tracking()
    mem, here = make(tracker, PAGE), line()
    (found,) = tracker.outstanding()
    assert (found.size, found.peak, found.scope, found.name) == (PAGE, PAGE, (), None)
    assert found.age >= 0
    assert found.peak_stack == found.stack
    assert newest(found.stack) == (__file__, make.__code__.co_firstlineno + 1, "make")
    assert newest(found.stack[:-1]) == (__file__, here, inspect.currentframe().f_code.co_name)
    assert traceback.format_list(found.stack)[-1].splitlines()[1].strip() == "return creator.create(*sizes, **options)"
    assert mem.byte_size() == PAGE


def test_linmems_own_frames_are_left_out():
    tracker = tracking()
    mem, here = linmem.create(PAGE, creator=tracker), line()
    assert newest(tracker.outstanding()[0].stack)[:2] == (__file__, here)
    mem.close()
    assert tracker.outstanding() == []


def test_a_growth_to_a_new_peak_has_a_stack_of_its_own():
    tracker = tracking()
    mem, made = tracker.create(PAGE, 4 * PAGE), line()
    mem.grow_to(2 * PAGE)
    mem.grow_to(3 * PAGE); grown = line()       # noqa: E702
    (found,) = tracker.outstanding()
    assert (found.size, found.peak) == (3 * PAGE, 3 * PAGE)
    assert newest(found.stack)[1] == made
    assert newest(found.peak_stack)[1] == grown


def test_a_refused_growth_changes_nothing():
    tracker = tracking(linmem.LimitingCreator(MMAP, 2 * PAGE))
    mem = tracker.create(PAGE, 4 * PAGE)
    with pytest.raises(linmem.LimitError):
        mem.grow_to(3 * PAGE)
    (found,) = tracker.outstanding()
    assert (found.size, found.peak, found.peak_stack) == (PAGE, PAGE, found.stack)
    with pytest.raises(linmem.LimitError):
        tracker.create(3 * PAGE)
    with failing(1, errno.ENOMEM, times=100), pytest.raises(linmem.PageError):
        tracker.create(PAGE, PAGE)
    assert len(tracker.outstanding()) == tracker.scopes()[()].made == 1


@pytest.mark.parametrize("frames", [0, 1, 3, 64])
def test_a_stack_has_at_most_the_given_number_of_frames(frames):
    def deep(n):
        return tracker.create(PAGE) if n == 0 else deep(n - 1)

    tracker = tracking(frames=frames)
    mem = deep(80)
    (found,) = tracker.outstanding()
    assert [frame.name for frame in found.stack] == ["deep"] * frames
    assert tracker.frames == frames
    assert mem.byte_size() == PAGE


def test_equal_stacks_are_kept_once():
    tracker = tracking()
    memories = [tracker.create(PAGE, PAGE) for _ in range(100)]
    assert tracker.overhead()["stacks"] == 1
    assert len({found.stack for found in map(summary, tracker.outstanding())}) == 1
    assert len(memories) == 100


class summary:
    def __init__(self, found):
        self.stack = tuple((frame.filename, frame.lineno) for frame in found.stack)


def lines_of_code(n, filename="<many>"):
    """n functions that make memories, each on a line of its own. Thousands of memories without a maximum would reserve
    half of all addresses."""
    names = {}
    code = "\n".join(f"def f{i}(creator): return creator.create(1, {PAGE})" for i in range(n))
    exec(compile(code, filename, "exec"), names)
    return [names[f"f{i}"] for i in range(n)]


def test_the_number_of_stacks_is_bounded_and_stacks_of_dropped_memories_give_way():
    tracker = tracking(frames=1)
    functions = lines_of_code(4200)
    for function in functions:
        function(tracker).close()
    kept = tracker.overhead()
    assert (kept["memories"], kept["stacks"], kept["lost_stacks"]) == (0, 4096, 0)
    memories = [function(tracker) for function in functions]
    kept = tracker.overhead()
    assert (kept["memories"], kept["stacks"], kept["lost_stacks"]) == (4200, 4096, 104)
    assert [len(found.stack) for found in reversed(tracker.outstanding())] == [1] * 4096 + [0] * 104
    assert "too many stacks 104 times" in tracker.report()
    memories.clear()
    again = functions[-1](tracker)
    assert newest(tracker.outstanding()[0].stack) == ("<many>", 4200, "f4199")
    assert again.byte_size() == 1


def test_no_local_variable_stays_alive():
    class Local:
        pass

    def work():
        local = Local()
        kept.append(weakref.ref(local))
        return tracker.create(PAGE)

    kept, tracker = [], tracking()
    mem = work()
    assert kept[0]() is None
    assert tracker.outstanding()[0].stack[-1].name == "work"
    assert mem.byte_size() == PAGE


def test_the_code_of_a_stack_is_freed_with_the_tracker_and_its_memories():
    # In a child with one thread: CPython 3.13 without a GIL frees no code once a second thread was started.
    assert answer("""
        import gc, weakref
        import linmem
        names = {}
        exec("def function(creator): return creator.create(1)", names)
        code = weakref.ref(names["function"].__code__)
        tracker = linmem.TrackingCreator(linmem.MmapCreator())
        mem = names.pop("function")(tracker)
        del tracker
        gc.collect()
        print(code() is None)
        mem.close()
        del mem
        gc.collect()
        print(code() is None)
    """) == "False\nTrue"


# -- scopes ------------------------------------------------------------------------------------------

def test_scopes_nest_and_a_scope_includes_the_scopes_in_it():
    tracker = tracking()
    with tracker.scope("tenant 7"):
        a = tracker.create(PAGE, 10 * PAGE)
        with tracker.scope("request"):
            b = tracker.create(2 * PAGE)
    c = tracker.create(4 * PAGE)
    assert [found.scope for found in tracker.outstanding()] == [(), ("tenant 7", "request"), ("tenant 7",)]
    a.grow_to(3 * PAGE)         # outside of the block: a memory stays in its scope
    b.close()
    Totals = linmem.ScopeTotals
    assert tracker.scopes() == {
        (): Totals(7 * PAGE, 9 * PAGE, 9 * PAGE, 2, 3),
        ("tenant 7",): Totals(3 * PAGE, 5 * PAGE, 5 * PAGE, 1, 2),
        ("tenant 7", "request"): Totals(0, 2 * PAGE, 2 * PAGE, 0, 1)}
    assert list(tracker.scopes()) == [(), ("tenant 7",), ("tenant 7", "request")]
    assert c.byte_size() == 4 * PAGE


def test_scopes_of_two_trackers_are_independent():
    below = tracking()
    above = tracking(below)
    with below.scope("below"), above.scope("above"), below.scope("inner"):
        mem = above.create(PAGE)
    assert above.outstanding()[0].scope == ("above",)
    assert below.outstanding()[0].scope == ("below", "inner")
    assert mem.byte_size() == PAGE


def test_tasks_and_to_thread_inherit_the_scope():
    tracker = tracking()

    async def child():
        await asyncio.sleep(0)
        return tracker.create(PAGE)

    async def tenant(name):
        with tracker.scope(name):
            task = asyncio.create_task(child())
            return [await task, await asyncio.to_thread(tracker.create, PAGE)]

    async def main():
        return await asyncio.gather(tenant("a"), tenant("b"))

    kept = asyncio.run(main())
    assert sorted(found.scope for found in tracker.outstanding()) == [("a",), ("a",), ("b",), ("b",)]
    assert len(kept) == 2


def test_a_scope_ends_with_its_block_also_after_an_exception():
    tracker = tracking()
    with pytest.raises(KeyError), tracker.scope("bad"):
        raise KeyError
    mem = tracker.create(PAGE)
    assert tracker.outstanding()[0].scope == ()
    assert mem.byte_size() == PAGE


def test_a_block_is_entered_once_and_a_name_is_a_str():
    tracker = tracking()
    block = tracker.scope("once")
    with block:
        pass
    with pytest.raises(RuntimeError, match="entered once"), block:
        pass
    with pytest.raises(TypeError, match="name must be a str, got int"):
        tracker.scope(7)


def test_the_number_of_scopes_is_bounded():
    tracker = tracking()
    with tracker.scope("outer"):
        for i in range(1100):
            with tracker.scope(str(i)):
                mem = tracker.create(PAGE)
    assert tracker.overhead()["scopes"] == len(tracker.scopes()) == 1024
    assert tracker.overhead()["lost_scopes"] == 1100 - 1022
    assert tracker.outstanding()[0].scope == ("outer",)
    assert mem.byte_size() == PAGE


def test_scopes_beyond_the_bound_take_no_memory_in_contexts_that_inherit_each_other():
    assert answer("""
import contextvars, linmem, tracemalloc
def enter():
    for tracker in trackers:
        tracker.scope("step").__enter__()
trackers = [linmem.creator("tracking"), linmem.creator("tracking")]
context = contextvars.Context()
for n in range(2000):
    context.run(enter)
tracemalloc.start()
for n in range(300000):     # as a task does that starts the next task in its scope
    context.run(enter)
print(tracemalloc.get_traced_memory()[0] < 10000, trackers[0].overhead()["lost_scopes"])
del context                 # the end of a chain of blocks would be a recursion
""", timeout=100) == f"True {302000 - 1023}"


def test_the_names_of_scopes_are_bounded_and_count_in_the_overhead():
    tracker = tracking()
    before = tracker.overhead()["bytes"]
    with tracker.scope(""):
        pass
    empty = tracker.overhead()["bytes"] - before
    for name in ("x" * 1000, "\u20ac" * 333):
        with tracker.scope(name):
            pass
    assert tracker.overhead()["bytes"] == before + 3 * empty + 1000 + 999
    for name in ("x" * 1001, "\u20ac" * 334):
        with pytest.raises(ValueError, match=r"^name must be at most 1000 bytes in UTF-8, got '"):
            tracker.scope(name)


def test_a_context_may_outlive_the_tracker():
    tracker = tracking()
    with tracker.scope("kept"):
        context = contextvars.copy_context()
    del tracker
    gc.collect()
    other = tracking()
    mem = context.run(other.create, PAGE)
    assert other.outstanding()[0].scope == ()
    assert mem.byte_size() == PAGE


# -- leaks -------------------------------------------------------------------------------------------

def test_a_memory_that_only_a_view_keeps_is_a_leak_and_one_with_a_handle_is_not():
    tracker = tracking()
    mem = tracker.create(PAGE)
    view = memoryview(mem)
    typed = mem.view("I")
    assert tracker.leaks() == []
    del mem
    assert sizes(tracker.leaks()) == [PAGE]
    view.release()
    assert sizes(tracker.leaks()) == [PAGE]
    typed.release()
    del view, typed
    assert tracker.leaks() == tracker.outstanding() == []


# Without a GIL, leaks() may see a memory between the end of its last handle and its own end.
@requires("gil")
@pytest.mark.parametrize("above", [
    lambda tracker: tracker, lambda tracker: linmem.CallbackCreator(tracker, on_made=lambda mem, size: None)])
def test_a_memory_that_is_being_made_is_no_leak(above):
    def work():
        while not stop.is_set():
            creator.create(PAGE).close()

    tracker = tracking()
    creator = above(tracker)
    stop = threading.Event()
    threads = [threading.Thread(target=work) for _ in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for thread in threads:
        thread.start()
    try:
        assert sum(len(tracker.leaks()) for _ in range(100000)) == 0
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        for thread in threads:
            thread.join()


def test_an_array_is_a_buffer_like_any_other():
    pytest.importorskip("numpy")
    tracker = tracking()
    mem = tracker.create(PAGE)
    array = mem.array("u1")
    assert tracker.leaks() == []
    del mem
    assert sizes(tracker.leaks()) == [PAGE]
    del array
    assert tracker.outstanding() == []


def test_a_closed_handle_does_not_count_as_a_handle():
    tracker = tracking()
    with tracker.create(PAGE) as mem:
        view = memoryview(mem)
    assert mem.closed
    assert sizes(tracker.leaks()) == [PAGE]
    view.release()
    assert tracker.outstanding() == []


def test_many_handles_that_are_gone_take_no_memory():
    wasmtime = pytest.importorskip("wasmtime")
    import linmem.wasmtime

    tracker = tracking()
    config = wasmtime.Config()
    linmem.wasmtime.install(config, creator=tracker)
    store = wasmtime.Store(wasmtime.Engine(config))
    memory = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
    for _ in range(1000):
        linmem.wasmtime.linear_memory(store, memory).close()
    assert tracker.leaks() == []
    assert sum(type(ref) is weakref.ref and ref() is None for ref in gc.get_objects()) < 500


def test_a_memory_of_a_store_is_no_leak_until_the_store_is_gone_and_a_view_keeps_it():
    wasmtime = pytest.importorskip("wasmtime")
    import linmem.wasmtime

    tracker = tracking()
    config = wasmtime.Config()
    linmem.wasmtime.install(config, creator=tracker)
    store = wasmtime.Store(wasmtime.Engine(config))
    module = wasmtime.Module(store.engine, """(module (memory (export "m") 1 4)
        (func (export "grow") (drop (memory.grow (i32.const 1)))))""")
    with tracker.scope("tenant"):
        instance, made = wasmtime.Instance(store, module, []), line()
    exports = instance.exports(store)
    exports["grow"](store); grown = line()      # noqa: E702
    mem = linmem.wasmtime.linear_memory(store, exports["m"])
    view = memoryview(mem)
    (found,) = tracker.outstanding()
    assert (found.size, found.scope) == (131072, ("tenant",))
    assert newest(found.stack)[:2] == (__file__, made)
    assert newest(found.peak_stack)[:2] == (__file__, grown)
    del mem
    assert tracker.leaks() == []
    store.close()
    assert sizes(tracker.leaks()) == [131072]
    view.release()
    del view
    assert tracker.outstanding() == []


def test_an_idle_slot_of_a_pool_above_is_outstanding_and_no_leak():
    tracker = tracking()
    pool = linmem.creator("pool", upstream=tracker, idle_seconds=None)
    pool.create(PAGE, PAGE).close()
    assert sizes(tracker.outstanding()) == [PAGE]
    assert tracker.leaks() == []
    pool.purge()
    assert sizes(tracker.outstanding()) == [0]
    mem = pool.create(PAGE, PAGE)
    assert sizes(tracker.outstanding()) == [PAGE]
    mem.close()
    pool.trim()
    assert tracker.outstanding() == []
    assert tracker.scopes()[()].size == 0


# -- reports -----------------------------------------------------------------------------------------

def test_the_report_names_scopes_lines_and_what_the_tracker_keeps():
    tracker = tracking()
    with tracker.scope("tenant 7"):
        a, here = tracker.create(3 << 20), line()
    b = tracker.create(1 << 20)
    rows = [row.split() for row in tracker.report().splitlines() if row]
    assert ["(all)", "4", "MiB", "4", "MiB", "2", "2"] in rows
    assert ["tenant", "7", "3", "MiB", "3", "MiB", "1", "1"] in rows
    made = ["3", "MiB", "1", f"{__file__}:{here}", "in", inspect.currentframe().f_code.co_name]
    assert rows.index(made) < rows.index(["1", "MiB", "1", f"{__file__}:{here + 1}", *made[4:]])
    assert rows[-1][:8] == ["The", "tracker", "keeps", "2", "stacks", "and", "2", "scopes"]
    assert a.byte_size() + b.byte_size() == 4 << 20


@requires("matplotlib")
def test_the_picture_has_bytes_over_time(tmp_path):
    tracker = tracking()
    kept = []
    for i in range(12):
        with tracker.scope(f"tenant {i}"):
            kept.append(tracker.create(PAGE * (i + 1)))
    assert tracker.report(tmp_path / "drawn.svg") is None
    drawn = (tmp_path / "drawn.svg").read_text("utf-8")
    assert "<svg" in drawn
    assert tracker.report(tmp_path / "drawn.png") is None
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_has_each_scope_under_its_own_name(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    tracker = tracking()
    paths = [("a/b",), ("a", "b"), ("_hidden",), (r"$\bad$",), ("no scope",), ("",), ("other scopes",)]
    kept = []
    for i, path in enumerate(paths):
        with contextlib.ExitStack() as stack:
            for name in path:
                stack.enter_context(tracker.scope(name))
            kept.append(tracker.create(PAGE * (i + 1)))
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        assert tracker.report(tmp_path / "drawn.svg") is None
    drawn = (tmp_path / "drawn.svg").read_text("utf-8")
    texts = [text for text in re.findall(r">([^<>\n]+)</text>", drawn) if text[0] not in "\u22120123456789"]
    assert sorted(texts) == sorted(["a/b", "a/b", "a", "_hidden", r"$\bad$", "no scope", "other scopes", "other scopes",
                                    "seconds", "MiB"])
    assert len(kept) == 7


def test_the_history_is_bounded_and_keeps_each_peak():
    tracker = tracking()
    with tracker.scope("peak"):
        tracker.create(5 * PAGE).close()
    kept = tracker.create(PAGE)
    first, points = tracker.history()
    seconds = first
    while seconds < 4 * first:          # the interval has doubled twice
        mem = tracker.create(PAGE)
        mem.close()
        seconds, points = tracker.history()
        assert len({len(sizes) for sizes in points.values()}) == 1
        assert 1 <= len(points[()]) <= 256
    assert max(points["peak",]) == 5 * PAGE
    assert points["peak",][-1] == 0
    assert max(points[()]) == 2 * PAGE
    assert points[()][-1] in (PAGE, 2 * PAGE)
    kept.close()


# -- threads, forks, shutdown ------------------------------------------------------------------------

def test_the_sums_of_all_scopes_are_of_one_moment():
    tracker, different = tracking(frames=0), []

    def churn():
        for _ in range(4000):
            with tracker.scope("inner"):
                tracker.create(PAGE).close()

    thread = threading.Thread(target=churn)
    thread.start()
    while thread.is_alive():
        sums = tracker.scopes()
        if ("inner",) in sums and sums[()] != sums["inner",]:
            different.append(sums)
    thread.join()
    assert different == []


def test_threads_that_make_handles_of_one_memory_at_once_raise_nothing(monkeypatch):
    """The tracker has noted 16 handles, all but one of them dead. The next handle removes the dead ones."""
    ignored, bases, barrier = [], [], threading.Barrier(4, timeout=60)
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)

    def work():
        for _ in range(300):
            barrier.wait()
            linmem.find(bases[-1])
            barrier.wait()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        mem = linmem.TrackingCreator(linmem.creator("mmap")).create(PAGE)
        bases.append(mem.info().base)
        for _ in range(15):
            linmem.find(bases[-1])
        barrier.wait()
        linmem.find(bases[-1])
        barrier.wait()
    for thread in threads:
        thread.join()
    assert ignored == []


def test_events_are_complete_under_eight_threads():
    tracker = tracking()
    barrier = threading.Barrier(8)
    left = []

    def work(i):
        barrier.wait()
        with tracker.scope(f"thread {i}"):
            for n in range(100):
                mem = tracker.create(PAGE, 4 * PAGE)
                mem.grow_to(2 * PAGE)
                if n % 10 == 0:
                    left.append(mem)
                if n % 50 == 0:
                    tracker.leaks()
                    tracker.history()
                    tracker.report()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    del thread
    totals = tracker.scopes()
    assert (totals[()].size, totals[()].total, totals[()].memories, totals[()].made) == (160 * PAGE, 1600 * PAGE, 80,
                                                                                       800)
    for i in range(8):
        assert (totals[f"thread {i}",].size, totals[f"thread {i}",].made) == (20 * PAGE, 100)
    assert tracker.leaks() == []
    assert {newest(found.stack)[2] for found in tracker.outstanding()} == {"work"}
    left.clear()
    assert tracker.outstanding() == []
    assert tracker.overhead()["memories"] == 0


@requires("fork")
def test_a_forked_child_goes_on_tracking():
    answer(FORKING + textwrap.dedent("""
        import linmem
        tracker = linmem.creator("tracking")
        kept = tracker.create(4096, 1 << 20)
        ready = threading.Event()
        end = False
        def work():
            mem = tracker.create(4096, 1 << 30)
            size = 4096
            while not end:
                size += 1
                mem.grow_to(size)
                tracker.create(1).close()
                ready.set()
        thread = threading.Thread(target=work)
        thread.start()
        ready.wait()
        def in_child():
            assert tracker.scopes()[()].memories == len(tracker.outstanding())
            kept.grow_to(8192)
            mem = tracker.create(123)
            sizes = [found.size for found in tracker.outstanding()]
            assert 123 in sizes and 8192 in sizes, sizes
            mem.close()
            assert 123 not in [found.size for found in tracker.outstanding()]
        for _ in range(30):
            child(os.fork, in_child)
        end = True
        thread.join()
    """))


def test_a_memory_that_outlives_the_interpreter_is_no_trouble():
    done = answer("""
        import linmem, os
        tracker = linmem.creator("tracking")
        kept = tracker.create(65536, 1 << 20)
        class Late:
            def __del__(self, mem=kept, tracker=tracker, os=os):
                mem.grow_to(131072)
                os.write(1, b'%d %d' % (mem.byte_size(), tracker.overhead()['memories']))
        late = Late()
    """)
    assert done == "131072 1"
