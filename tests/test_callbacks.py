"""CallbackCreator: Python functions that are told of memories and decide, and limits for each memory."""

import collections
import errno
import gc
import sys
import threading
import time
import weakref

import pytest
from support import PAGE, answer, failing, requires

import linmem

MMAP = linmem.MmapCreator()


def callback(upstream=MMAP, **options):
    return linmem.CallbackCreator(upstream, **options)


class Told(list):
    """Appends what each function is told, in order."""

    def options(self, *names):
        return {name: getattr(self, name) for name in names or ("on_made", "on_grow", "on_refused", "on_dropped")}

    def on_made(self, mem, size):
        self.append(("made", len(mem), size))

    def on_grow(self, mem, old, new):
        self.append(("grow", len(mem), old, new))

    def on_refused(self, mem, requested, error):
        self.append(("refused", mem and len(mem), requested, type(error)))

    def on_dropped(self, info):
        self.append(("dropped", info.byte_size, info.growths))


# -- what is told, and when ----------------------------------------------------------------------------------

def test_each_event_is_told_once_and_in_order():
    told = Told()
    mem = callback(linmem.LimitingCreator(MMAP, 4 * PAGE), **told.options()).create(PAGE, maximum=9 * PAGE)
    assert told == [("made", PAGE, PAGE)]
    mem.grow_to(3 * PAGE)
    mem.grow_to(3 * PAGE)           # does nothing
    with pytest.raises(linmem.LimitError):
        mem.grow_to(5 * PAGE)
    with pytest.raises(linmem.GrowError):
        mem.grow_to(10 * PAGE)      # above the maximum, which no creator decides
    view = memoryview(mem)
    with mem:
        pass
    assert told[1:] == [("grow", PAGE, PAGE, 3 * PAGE), ("grow", 3 * PAGE, 3 * PAGE, 5 * PAGE),
                        ("refused", 3 * PAGE, 5 * PAGE, linmem.LimitError)]
    view.release()
    assert told[4:] == [("dropped", 3 * PAGE, 1)]


def test_a_refused_creation_is_told_without_a_memory():
    told = Told()
    creator = callback(linmem.LimitingCreator(MMAP, PAGE), **told.options())
    with pytest.raises(linmem.LimitError):
        creator.create(2 * PAGE)
    assert told == [("refused", None, 2 * PAGE, linmem.LimitError)]


def test_on_dropped_gets_a_record_of_the_memory():
    infos = []
    mem = callback(on_dropped=infos.append).create(PAGE)
    base = mem.as_ptr()
    mem.close()
    assert infos == [linmem.DroppedInfo(base=base, byte_size=PAGE, growths=0, kind="mmap")]


def test_on_dropped_comes_when_the_pages_are_gone():
    limit = linmem.LimitingCreator(MMAP, PAGE)
    made = []
    above = linmem.LimitingCreator(callback(limit, on_dropped=lambda info: made.append(callback().create(PAGE))), PAGE)
    above.create(PAGE).close()
    assert len(made) == 1
    assert (limit.used_bytes, above.used_bytes) == (0, 0)


def test_on_dropped_may_use_the_budget_of_the_dropped_memory():
    limit = linmem.LimitingCreator(MMAP, PAGE)
    mem = callback(limit, on_dropped=lambda info: next_tenant.append(limit.create(PAGE))).create(PAGE)
    next_tenant = []
    mem.close()
    assert len(next_tenant[0]) == limit.used_bytes == PAGE
    next_tenant[0].close()


def test_functions_are_called_after_the_creator_is_gone():
    told = Told()
    mem = callback(**told.options("on_grow", "on_dropped")).create(PAGE, maximum=2 * PAGE)
    gc.collect()
    mem.grow_to(2 * PAGE)
    mem.close()
    assert told == [("grow", PAGE, PAGE, 2 * PAGE), ("dropped", 2 * PAGE, 1)]


def test_the_functions_are_freed_with_the_creator_and_its_memories():
    def on_grow(mem, old, new):
        pass

    creator = callback(on_grow=on_grow)
    mem = creator.create(PAGE)
    alive = weakref.ref(on_grow)
    del creator, on_grow
    gc.collect()
    assert alive() is not None
    mem.close()
    gc.collect()
    assert alive() is None


def test_a_creator_in_a_cycle_with_its_function_is_collected():
    class Owner:
        def __init__(self):
            self.creator = callback(on_made=self.on_made)

        def on_made(self, mem, size):
            pass

    owner = Owner()
    owner.creator.create(PAGE).close()
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    assert alive() is None


def test_above_a_pool_each_user_is_told_and_below_a_pool_each_slot():
    above, below = Told(), Told()
    pool = linmem.PoolingCreator(callback(**below.options(), limit_growths=1))
    creator = callback(pool, **above.options())
    for _ in range(3):
        mem = creator.create(PAGE, maximum=4 * PAGE)
        mem.grow_to(2 * PAGE)
        with pytest.raises(linmem.GrowError, match=r"limit_growths is 1$"):
            mem.grow_to(3 * PAGE)
        mem.close()
    one = [("made", PAGE, PAGE), ("grow", PAGE, PAGE, 2 * PAGE), ("grow", 2 * PAGE, 2 * PAGE, 3 * PAGE),
           ("refused", 2 * PAGE, 3 * PAGE, linmem.GrowError), ("dropped", 2 * PAGE, 1)]
    assert above == one * 3
    assert [event[0] for event in below] == ["made", *["grow", "refused"] * 3]
    pool.trim()
    assert [event[0] for event in below[7:]] == ["dropped"]


# -- the handle ----------------------------------------------------------------------------------------------

def test_the_handle_reads_and_writes_and_is_closed_when_the_function_returns():
    kept = []

    def on_made(mem, size):
        mem.write(size - 5, b"hello")
        assert mem.info().byte_size == size
        kept.append(mem)

    dropped = []
    mem = callback(on_made=on_made, on_dropped=dropped.append).create(PAGE)
    assert mem[PAGE - 5:] == b"hello"
    assert kept[0].closed
    with pytest.raises(ValueError, match="the memory is closed"):
        kept[0].byte_size()
    mem.close()
    assert len(dropped) == 1


def test_a_buffer_that_a_function_exported_keeps_the_memory_alive():
    views, dropped = [], []
    creator = callback(on_made=lambda mem, size: views.append(memoryview(mem)), on_dropped=dropped.append)
    creator.create(PAGE).close()
    assert dropped == []
    views.pop().release()
    assert len(dropped) == 1


# -- refusals ------------------------------------------------------------------------------------------------

def raising(error):
    def function(*_):
        raise error
    return function


@pytest.mark.parametrize("error", [KeyError("no"), KeyboardInterrupt(), linmem.GrowError("mine")])
def test_the_exception_of_on_made_refuses_the_memory(error):
    told = Told()
    limit = linmem.LimitingCreator(MMAP, 4 * PAGE)
    creator = callback(limit, on_made=raising(error), **told.options("on_refused", "on_dropped"))
    with pytest.raises(type(error)) as raised:
        creator.create(PAGE)
    assert raised.value is error
    assert told == []
    assert limit.used_bytes == 0


@pytest.mark.parametrize("error", [KeyError("no"), KeyboardInterrupt(), linmem.GrowError("mine")])
def test_the_exception_of_on_grow_refuses_the_growth(error):
    told = Told()
    limit = linmem.LimitingCreator(MMAP, 4 * PAGE)
    creator = callback(limit, on_grow=raising(error), **told.options("on_refused", "on_dropped"))
    mem = linmem.LimitingCreator(creator, 4 * PAGE).create(PAGE, maximum=2 * PAGE)
    with pytest.raises(type(error)) as raised:
        mem.grow_to(2 * PAGE)
    assert raised.value is error
    assert len(mem) == limit.used_bytes == PAGE
    mem.close()
    assert told == [("dropped", PAGE, 0)]


def test_a_creator_above_is_asked_about_the_exception_of_a_creator_below():
    told, error = Told(), KeyError("no")
    below = callback(on_made=raising(error), on_grow=raising(error))
    creator = callback(below, **told.options("on_refused"))
    with pytest.raises(KeyError) as raised:
        creator.create(PAGE)
    assert raised.value is error
    assert told == [("refused", None, PAGE, KeyError)]


def test_a_creator_below_is_not_asked_about_what_a_creator_above_refused():
    above, below = Told(), Told()
    creator = callback(callback(**below.options("on_grow", "on_refused")), limit_each=2 * PAGE,
                       **above.options("on_grow", "on_refused"))
    with creator.create(PAGE, maximum=4 * PAGE) as mem, pytest.raises(linmem.LimitError):
        mem.grow_to(3 * PAGE)
    assert (above, below) == ([("refused", PAGE, 3 * PAGE, linmem.LimitError)], [])


# -- one more try --------------------------------------------------------------------------------------------

def test_a_true_value_of_on_refused_tries_once_more():
    limit = linmem.LimitingCreator(MMAP, 4 * PAGE)
    ballast = [limit.create(3 * PAGE)]

    def on_refused(mem, requested, error):
        asked.append((mem and len(mem), requested, error.used))
        ballast.pop().close()
        return True

    asked = []
    creator = callback(limit, on_refused=on_refused)
    mem = creator.create(2 * PAGE, maximum=9 * PAGE)
    ballast.append(limit.create(2 * PAGE))
    mem.grow_to(4 * PAGE)
    assert asked == [(None, 2 * PAGE, 3 * PAGE), (2 * PAGE, 4 * PAGE, 4 * PAGE)]
    assert limit.used_bytes == 4 * PAGE
    mem.close()


def test_the_second_refusal_is_final():
    asked = []
    creator = callback(linmem.LimitingCreator(MMAP, PAGE), on_refused=lambda *told: asked.append(told) or [1])
    with pytest.raises(linmem.LimitError):
        creator.create(2 * PAGE)
    assert len(asked) == 1
    with creator.create(PAGE, maximum=2 * PAGE) as mem:
        with pytest.raises(linmem.LimitError):
            mem.grow_to(2 * PAGE)
        assert len(mem) == PAGE
    assert len(asked) == 2


@pytest.mark.parametrize("grows", [False, True])
def test_an_exception_of_on_refused_takes_the_place_of_the_refusal(grows):
    error = KeyboardInterrupt()
    creator = callback(linmem.LimitingCreator(MMAP, PAGE), on_refused=raising(error))
    with creator.create(PAGE, maximum=2 * PAGE) if grows else MMAP.create(PAGE) as mem:
        make = mem.grow_to if grows else creator.create
        with pytest.raises(KeyboardInterrupt) as raised:
            make(2 * PAGE)
    assert raised.value is error
    assert type(error.__context__) is linmem.LimitError


def test_on_refused_may_raise_the_cause_of_the_refusal():
    class Refusing(linmem.MemoryCreator):
        def new_memory(self, *_):
            try:
                raise KeyError("cause")
            except KeyError as cause:
                raise ValueError("refusal") from cause

    def on_refused(mem, requested, error):
        raise error.__cause__

    with pytest.raises(KeyError) as raised:
        callback(linmem.PythonCreator(Refusing()), on_refused=on_refused).create(PAGE)
    chain = [raised.value, raised.value.__context__]
    assert type(chain[1]) is ValueError
    assert chain[1].__context__ is None         # a cycle would be endless for contextlib.ExitStack


@requires("rlimits")      # and so timers that send signals
@pytest.mark.parametrize("error", ["KeyboardInterrupt()", "SystemExit(3)", "TimeoutError('late')"])
def test_on_dropped_is_called_and_the_exception_arrives_if_a_signal_comes_while_the_pages_are_freed(error):
    assert answer(f"""
        import linmem, signal, time
        error, made, dropped, came = {error}, [], [], 0
        def handler(*_):
            raise error
        signal.signal(signal.SIGALRM, handler)
        creator = linmem.CallbackCreator(linmem.MmapCreator(), on_dropped=dropped.append)
        end = time.monotonic() + 20
        # A function: CPython 3.13 may raise at the jump of a loop as if the jump were outside of its try.
        def work(mem, i):
            signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + i % 40))
            mem.close()
            while time.monotonic() < end:
                pass
        for i in range(200):
            mem = creator.create(1 << 20, 1 << 21)
            mem.prefault()
            try:
                work(mem, i)
            except BaseException as raised:
                came += raised is error
                raised.__traceback__ = None
            mem.close()
        print(len(dropped), came)
        """) == "200 200"


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_in_upstream_is_not_a_refusal(interrupt):
    class Interrupted(linmem.MemoryCreator):
        def new_memory(self, *_):
            raise interrupt

    told = Told()
    with pytest.raises(type(interrupt)) as raised:
        callback(linmem.PythonCreator(Interrupted()), **told.options()).create(PAGE)
    assert raised.value is interrupt
    assert told == []


def test_a_refused_page_call_is_told_and_can_be_tried_again():
    asked = []
    creator = callback(on_refused=lambda mem, size, error: asked.append((mem, size, type(error))) or True)
    with failing(2, errno.ENOMEM) as failed, creator.create(PAGE, maximum=2 * PAGE) as mem:
        assert len(mem) == PAGE
    assert failed.happened
    assert asked == [(None, PAGE, linmem.PageError)]
    with creator.create(PAGE, maximum=2 * PAGE) as mem:
        with failing(1, errno.ENOMEM) as failed:
            mem.grow_to(2 * PAGE)
        assert failed.happened
        assert asked[1][1:] == (2 * PAGE, linmem.PageError)


# -- limits without Python code ------------------------------------------------------------------------------

def test_limit_each_bounds_the_bytes_of_a_memory():
    creator = callback(limit_each=3 * PAGE + 1)
    assert (creator.limit_each, creator.limit_growths) == (3 * PAGE + 1, None)
    with pytest.raises(linmem.LimitError) as raised:
        creator.create(3 * PAGE + 2)
    assert str(raised.value) == (f"limit of {3 * PAGE + 1} bytes for each memory reached: 0 in use and"
                                 f" {3 * PAGE + 2} more asked for")
    with creator.create(PAGE, maximum=9 * PAGE) as mem:
        mem.grow_to(3 * PAGE + 1)
        with pytest.raises(linmem.LimitError) as raised:
            mem.grow_to(3 * PAGE + 2)
        assert (raised.value.limit, raised.value.used, raised.value.requested) == (3 * PAGE + 1, 3 * PAGE + 1, 1)
        assert len(mem) == 3 * PAGE + 1


def test_limit_growths_bounds_the_successful_growths_of_a_memory():
    creator = callback(linmem.LimitingCreator(MMAP, 4 * PAGE), limit_growths=2)
    assert (creator.limit_each, creator.limit_growths) == (None, 2)
    for _ in range(2):
        with creator.create(1, maximum=9 * PAGE) as mem:
            mem.grow_to(2)
            with pytest.raises(linmem.LimitError):      # does not count
                mem.grow_to(5 * PAGE)
            mem.grow_to(3)
            with pytest.raises(linmem.GrowError) as raised:
                mem.grow_to(4)
            assert type(raised.value) is linmem.GrowError
            assert str(raised.value) == ("growing to 4 bytes is refused: the memory has grown 2 times, and"
                                         " limit_growths is 2")


def test_limits_of_zero():
    with callback(limit_each=0, limit_growths=0).create(0, maximum=1) as mem, pytest.raises(linmem.LimitError):
        mem.grow_to(1)
    with callback(limit_growths=0).create(0, maximum=1) as mem, pytest.raises(linmem.GrowError):
        mem.grow_to(1)


# -- functions that use linmem themselves --------------------------------------------------------------------

@pytest.mark.parametrize("use", [
    lambda mem: mem.grow_to(3 * PAGE), lambda mem: mem.close(), lambda mem: mem.protect(0, PAGE, "r"),
    lambda mem: mem.restore(linmem.Image.from_bytes(b"x"))])
@pytest.mark.parametrize("event", ["on_made", "on_grow", "on_refused"])
def test_a_function_must_not_change_its_own_memory(use, event):
    def function(mem, *_):
        with pytest.raises(RuntimeError, match="this thread is in a growth of this memory already"):
            use(mem)
        done.append(event)

    done = []
    creator = callback(linmem.LimitingCreator(MMAP, PAGE), **{event: function})
    with creator.create(PAGE, maximum=4 * PAGE) as mem:
        if event != "on_made":
            with pytest.raises(linmem.LimitError):
                mem.grow_to(2 * PAGE)
        assert done == [event]
        assert len(mem) == PAGE
        mem[0] = 1


def test_functions_may_make_grow_and_drop_other_memories():
    def on_grow(mem, old, new):
        told.append((old, new))
        if new == 2 * PAGE:
            other.grow_to(3 * PAGE)
            creator.create(PAGE).close()
            held.clear()

    told, dropped = [], []
    creator = callback(on_grow=on_grow, on_dropped=lambda info: dropped.append(info.byte_size))
    mem, other = (creator.create(PAGE, maximum=4 * PAGE) for _ in range(2))
    held = [creator.create(5)]
    mem.grow_to(2 * PAGE)
    assert told == [(PAGE, 2 * PAGE), (PAGE, 3 * PAGE)]
    assert dropped == [PAGE, 5]
    other.close()       # on_grow refers to this memory, so the memory keeps itself alive


def test_a_function_may_drop_the_last_name_of_its_memory():
    dropped = []
    creator = callback(on_grow=lambda *_: held.clear(), on_dropped=dropped.append)
    held = [creator.create(PAGE, maximum=2 * PAGE)]
    held[0].grow_to(2 * PAGE)
    assert [info.byte_size for info in dropped] == [2 * PAGE]


def test_on_dropped_may_make_a_memory():
    def on_dropped(info):
        if info.byte_size > PAGE:
            creator.create(info.byte_size - PAGE).close()
        sizes.append(info.byte_size)

    sizes = []
    creator = callback(linmem.PoolingCreator(), on_dropped=on_dropped)
    creator.create(4 * PAGE).close()
    assert sizes == [PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE]


def test_an_exception_of_on_dropped_is_unraisable(monkeypatch):
    seen, error = [], KeyError("no")
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(args.exc_value))
    mem = callback(on_dropped=raising(error)).create(PAGE)
    with pytest.raises(ZeroDivisionError), mem:
        1 / 0   # noqa: B018
    assert seen == [error]


# -- threads -------------------------------------------------------------------------------------------------

def test_events_are_complete_under_eight_threads():
    counts, lock = collections.Counter(), threading.Lock()

    def count(event):
        def function(*_):
            with lock:
                counts[event] += 1
        return function

    budget = linmem.LimitingCreator(linmem.PoolingCreator(), 40 * PAGE)
    creator = callback(budget, limit_growths=3, **{
        f"on_{event}": count(event) for event in ("made", "grow", "refused", "dropped")})
    mine = collections.Counter()

    def work(seed):
        done = collections.Counter()
        for i in range(150):
            try:
                mem = creator.create(PAGE * (1 + (seed + i) % 3), maximum=9 * PAGE)
            except linmem.LimitError:
                done["refused"] += 1
                continue
            done["made"] += 1
            for _ in range(4):
                try:
                    mem.grow_to(len(mem) + PAGE)
                    done["grown"] += 1
                except linmem.LimitError:
                    done["grow refused"] += 1
                except linmem.GrowError:
                    done["refused"] += 1
            mem.close()
        with lock:
            mine.update(done)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert counts["made"] == counts["dropped"] == mine["made"] > 0
    assert counts["grow"] == mine["grown"] + mine["grow refused"]
    assert counts["refused"] == mine["refused"] + mine["grow refused"]
    assert budget.used_bytes == 0


FOREIGN = """
import ctypes
from linmem._core import memory

def c_function(name, *types):
    capsule = memory.__pyx_capi__[name]
    ctypes.pythonapi.PyCapsule_GetName.restype = ctypes.c_char_p
    ctypes.pythonapi.PyCapsule_GetName.argtypes = [ctypes.py_object]
    ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
    ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return ctypes.pythonapi.PyCapsule_GetPointer(capsule, ctypes.pythonapi.PyCapsule_GetName(capsule))

def drop_in_foreign_thread(mem):
    '''The last reference is dropped by a thread that Python does not know, while this thread holds the GIL.'''
    m = ctypes.c_void_p(hash(mem))
    ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(c_function("memory_retain"))(m)
    mem.close()
    thread = ctypes.c_size_t()
    libc = ctypes.PyDLL(None)
    assert libc.pthread_create(ctypes.byref(thread), None, ctypes.c_void_p(c_function("memory_release")), m) == 0
    assert libc.pthread_join(thread, None) == 0
"""


@requires("interrupts")
def test_a_thread_that_python_does_not_know_drops_without_the_gil_and_the_main_thread_is_told():
    assert answer("import linmem" + FOREIGN + """
import threading, time
told = []
creator = linmem.CallbackCreator(linmem.MmapCreator(), on_dropped=lambda info: told.append(
    (info.byte_size, threading.current_thread() is threading.main_thread())))
drop_in_foreign_thread(creator.create(5))
for _ in range(10000):       # CPython 3.11 drops the object when a thread takes the GIL
    if told: break
    time.sleep(0.001)
print(told)
""") == "[(5, True)]"


@requires("interrupts")
def test_the_limits_need_no_gil():
    assert answer("import linmem" + FOREIGN + """
drop_in_foreign_thread(linmem.CallbackCreator(linmem.MmapCreator(), limit_each=5, limit_growths=1).create(5))
print("done")
""") == "done"


def test_a_slot_that_a_pool_drops_for_another_request_is_told_later_and_may_use_any_memory():
    sizes = []
    limit = linmem.LimitingCreator(MMAP, 4 * PAGE)
    mem = limit.create(PAGE, maximum=4 * PAGE)

    def on_dropped(info):
        sizes.append((info.byte_size, len(mem)))
        mem.protect(0, PAGE, "rw")      # waits for the lock of the memory, which the growth holds

    pool = linmem.PoolingCreator(linmem.LimitingCreator(callback(limit, on_dropped=on_dropped), 4 * PAGE))
    pool.create(2 * PAGE).close()
    pool.trim()
    assert sizes == [(2 * PAGE, PAGE)]
    pool.create(2 * PAGE).close()
    mem.grow_to(4 * PAGE)
    for _ in range(1000):               # the main thread drops the object between two instructions
        if len(sizes) == 2:
            break
        time.sleep(0.001)
    pool.trim()
    assert sizes[1][1] == 4 * PAGE


# -- forks, and allocations that fail ------------------------------------------------------------------------

@requires("fork")
def test_a_function_may_fork_and_both_processes_are_told_of_the_rest():
    assert answer("""
import linmem, os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
def on_grow(mem, old, new):
    global pid
    pid = os.fork()
def on_dropped(info):
    print("parent" if pid else "child", info.byte_size, info.growths, flush=True)
mem = linmem.CallbackCreator(linmem.MmapCreator(), on_grow=on_grow, on_dropped=on_dropped).create(1, maximum=9)
mem.grow_to(5)
if pid:
    assert os.waitpid(pid, 0)[1] == 0
mem.close()
""") == "child 5 1\nparent 5 1"


@requires("fork")
def test_on_dropped_may_fork_and_the_budget_is_right_in_both_processes():
    assert answer("""
import linmem, os, warnings
warnings.simplefilter("ignore", DeprecationWarning)
def on_dropped(info):
    global pid
    pid = os.fork()
limit = linmem.LimitingCreator(linmem.MmapCreator(), 1 << 20)
linmem.CallbackCreator(limit, on_dropped=on_dropped).create(1).close()
if pid:
    assert os.waitpid(pid, 0)[1] == 0
print("parent" if pid else "child", limit.used_bytes, flush=True)
""") == "child 0\nparent 0"


@requires("failing_allocations")
def test_an_allocation_that_fails_is_a_memory_error_and_leaves_nothing_behind():
    assert answer("""
import _testcapi, contextlib, linmem, linmem.records
def told(*_):
    counts.append(1)
counts = []
limit = linmem.LimitingCreator(linmem.MmapCreator(), 1 << 20, name="limit")
creator = linmem.CallbackCreator(limit, on_made=told, on_grow=told, on_refused=told, on_dropped=told, name="told")
for creator in (creator, linmem.RoutingCreator(lambda ty, size, creator=creator: creator, name="routes")):
    for n in range(120):
        mem = None
        _testcapi.set_nomemory(n, n + 1)
        try:
            mem = creator.create(4096, 1 << 21)
            mem.grow_to(8192)
            with contextlib.suppress(linmem.LimitError):
                mem.grow_to(1 << 21)
        except MemoryError:
            pass
        finally:
            _testcapi.remove_mem_hooks()
        if mem is not None:
            mem.close()
        assert limit.used_bytes == 0
print(len(counts) > 500)
""") == "True"


# -- shutdown ------------------------------------------------------------------------------------------------

def test_on_dropped_is_not_called_while_the_interpreter_shuts_down():
    assert answer("""
import linmem
import atexit, os, sys
creator = linmem.CallbackCreator(linmem.MmapCreator(), on_dropped=lambda info: print("dropped", info.byte_size))
class Late:
    def __del__(self, write=os.write):
        write(1, b"late")
        self.mem.close()
sys.late = late = Late()
late.mem = creator.create(5)
early = creator.create(6)
atexit.register(early.close)
del late
sys.stdout.reconfigure(line_buffering=True)
""") == "dropped 6\nlate"


# -- arguments -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["on_made", "on_grow", "on_refused", "on_dropped"])
def test_a_function_that_is_none_is_no_function_and_another_object_is_refused(name):
    assert getattr(callback(**{name: None}), name) is None
    assert getattr(callback(**{name: print}), name) is print
    with pytest.raises(TypeError, match=f"^{name} must be callable or None, got int$"):
        callback(**{name: 5})


def test_the_factory_makes_a_callback_creator():
    creator = linmem.creator("callback", on_grow=print, limit_each=5)
    assert repr(creator) == "CallbackCreator(MmapCreator(), on_grow=<built-in function print>, limit_each=5 bytes)"
    with pytest.raises(TypeError, match="takes at most 1 arguments without a name"):
        linmem.CallbackCreator(MMAP, print)


# -- wasmtime ------------------------------------------------------------------------------------------------

WAT = """(module (memory (export "m") 1) (func (export "grow") (param i32) (result i32)
    (memory.grow (local.get 0))))"""


def guest(creator, wat=WAT, **features):
    import wasmtime

    config = wasmtime.Config()
    for name, value in features.items():
        setattr(config, name, value)
    linmem.wasmtime.install(config, creator)
    engine = wasmtime.Engine(config)
    store = wasmtime.Store(engine)
    return store, wasmtime.Instance(store, wasmtime.Module(engine, wat), []).exports(store)


def test_a_guest_is_told_refused_and_dropped():
    wasmtime = pytest.importorskip("wasmtime")
    told, error = Told(), KeyError("no more")

    def on_grow(mem, old, new):
        told.on_grow(mem, old, new)
        if new > 3 << 16:
            raise error

    creator = callback(on_grow=on_grow, limit_growths=2, **told.options("on_made", "on_refused", "on_dropped"))
    store, exports = guest(creator)
    assert [exports["grow"](store, n) for n in (1, 5, 1, 1)] == [1, -1, 2, -1]
    kept = memoryview(linmem.wasmtime.linear_memory(store, exports["m"]))
    store.close()
    del exports
    K = 1 << 16
    assert told == [("made", K, K), ("grow", K, K, 2 * K), ("grow", 2 * K, 2 * K, 7 * K),
                    ("grow", 2 * K, 2 * K, 3 * K), ("refused", 3 * K, 4 * K, linmem.GrowError)]
    kept.release()
    gc.collect()
    assert told[-1] == ("dropped", 3 * K, 2)

    with pytest.raises(wasmtime.WasmtimeError, match="KeyError: 'no more'") as raised:
        guest(callback(on_made=raising(error)))
    assert linmem.wasmtime.cause(raised.value) is error


def test_a_garbage_collected_heap_of_a_guest_is_told():
    pytest.importorskip("wasmtime")
    told = Told()
    wat = """(module (type $box (struct (field i32)))
        (func (export "get") (result i32) (struct.get $box 0 (struct.new $box (i32.const 7)))))"""
    creator = callback(**told.options("on_made", "on_dropped"))
    store, exports = guest(creator, wat, wasm_gc=True, wasm_function_references=True)
    assert exports["get"](store) == 7
    assert [event[0] for event in told] == ["made"]
    store.close()
    assert [event[0] for event in told] == ["made", "dropped"]


TWO = """(module (memory (export "a") 1) (memory (export "b") 1)
    (data (memory 0) (i32.const 0) "AAAA") (data (memory 1) (i32.const 0) "BBBB"))"""


class MadeByCalling(linmem.MemoryCreator):
    def __init__(self, function):
        self.function = function

    def new_memory(self, *request):
        self.function()
        return MMAP.new_memory(*request)


def refused_once(function):
    refusals = [KeyError("once")]

    def refuse():
        if refusals:
            raise refusals.pop()

    return callback(linmem.PythonCreator(MadeByCalling(refuse)), on_refused=lambda *_: function() or True)


@pytest.mark.parametrize("calling", [
    lambda function: callback(on_made=lambda *_: function()),
    refused_once,
    lambda function: linmem.RoutingCreator(lambda *_: function() or MMAP),
    lambda function: linmem.PythonCreator(MadeByCalling(function))])
@pytest.mark.parametrize("is_prepared", [False, True])
def test_an_instance_that_a_function_makes_takes_no_data_of_the_instance_that_is_being_made(calling, is_prepared):
    wasmtime = pytest.importorskip("wasmtime")

    def function():
        if not made:
            made.append(store := wasmtime.Store(engine))
            inner = plain.instantiate(store, []) if is_prepared else wasmtime.Instance(store, plain.module, [])
            data.append(read(store, inner, "m"))

    def read(store, instance, name):
        return linmem.wasmtime.linear_memory(store, instance.exports(store)[name]).read(0, 4)

    made, data = [], []
    creator = calling(function)
    config = wasmtime.Config()
    linmem.wasmtime.install(config, MMAP)
    engine = wasmtime.Engine(config)
    plain = linmem.wasmtime.prepare(engine, wasmtime.wat2wasm(
        '(module (memory (export "m") 1) (data (i32.const 0) "MM"))' if is_prepared else
        '(module (memory (export "m") 1))'))
    two = linmem.wasmtime.prepare(engine, wasmtime.wat2wasm(TWO))
    store = wasmtime.Store(engine)
    outer = two.instantiate(store, [], creator=creator)
    assert [read(store, outer, name) for name in "ab"] == [b"AAAA", b"BBBB"]
    assert data == [b"MM\0\0" if is_prepared else bytes(4)]
    made.pop().close()      # its memory keeps on_refused alive, and on_refused keeps the store alive
