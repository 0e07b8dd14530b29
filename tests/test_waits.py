"""The gate of a handle, waits, and interrupts: no gate stays shut, every wait can be interrupted, and no thread waits
for itself."""

import ctypes
import mmap
import os
import signal
import textwrap
import threading
import time

import pytest
import wasmtime
from support import PAGE, answer, is_mapped, requires

import linmem
import linmem.wasmtime


class Delegate(linmem.LinearMemory):
    """A memory that linmem knows only through the methods of the trait. `during` runs in each growth."""

    during = staticmethod(lambda: None)
    after = staticmethod(lambda: None)

    def __init__(self, *request):
        self.inner = linmem.MmapCreator().new_memory(*request)

    def byte_size(self):
        return self.inner.byte_size()

    def byte_capacity(self):
        return self.inner.byte_capacity()

    def as_ptr(self):
        return self.inner.as_ptr()

    def wasm_accessible(self):
        return self.inner.wasm_accessible()

    def grow_to(self, new_size):
        self.during()
        self.inner.grow_to(new_size)
        self.after()


class Delegating(linmem.MemoryCreator):
    def __init__(self, kind=Delegate):
        self.kind, self.made = kind, []

    def new_memory(self, *request):
        self.made.append(self.kind(*request))
        return self.made[-1]


def delegated(moves, kind=Delegate):
    """A handle on a memory in Python, this memory, and a size to grow to. The growth stays in the capacity, or
    moves."""
    creator = Delegating(kind)
    mem = linmem.PythonCreator(creator).create(PAGE, maximum=1 << 30, reserve=16 * PAGE, guard=PAGE, may_move=True)
    return mem, creator.made[0], mem.byte_capacity() + PAGE if moves else 3 * PAGE


# -- the gate --------------------------------------------------------------------------------------------------

def test_an_interrupt_in_the_first_info_leaves_a_memory_that_closes():
    """The first info() imports a module, and an import runs Python code."""
    assert answer("""
        import sys, linmem
        mem = linmem.create(4096)
        assert "linmem.records" not in sys.modules
        class Interrupts:
            def find_spec(self, name, path=None, target=None):
                if name == "linmem.records":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupts())
        try:
            mem.info()
        except KeyboardInterrupt:
            mem.close()
            print(mem.closed)
        """) == "True"


IMAGE = linmem.Image.from_bytes(b"i" * PAGE)
CALLS = {
    "byte_size": lambda mem: mem.byte_size(), "byte_capacity": lambda mem: mem.byte_capacity(),
    "maximum_byte_size": lambda mem: mem.maximum_byte_size(), "as_ptr": lambda mem: mem.as_ptr(),
    "wasm_accessible": lambda mem: mem.wasm_accessible(), "len": len, "repr": repr, "info": lambda mem: mem.info(),
    "memoryview": lambda mem: memoryview(mem).release(), "view": lambda mem: mem.view("d").release(),
    "view of a foreign format": lambda mem: mem.view(">d").release(), "grow_to": lambda mem: mem.grow_to(1 << 20),
    "a growth that moves": lambda mem: mem.grow_to(1 << 22), "a refused growth": lambda mem: mem.grow_to(1 << 50),
    "index": lambda mem: mem[PAGE - 1], "index beyond": lambda mem: mem[1 << 40],
    "index assignment": lambda mem: mem.__setitem__(300, 255), "slice": lambda mem: mem[5:700],
    "slice with a step": lambda mem: mem[0:900:2],
    "slice assignment": lambda mem: mem.__setitem__(slice(0, 3), b"abc"),
    "read": lambda mem: mem.read(0, PAGE), "read beyond": lambda mem: mem.read(1 << 40, 3),
    "write": lambda mem: mem.write(0, b"1" * PAGE), "write beyond": lambda mem: mem.write(1 << 40, b"1"),
    "protect": lambda mem: mem.protect(0, PAGE, "rw"), "protect beyond": lambda mem: mem.protect(0, 1 << 40, "rw"),
    "discard": lambda mem: mem.discard(), "prefault": lambda mem: mem.prefault(),
    "snapshot": lambda mem: mem.snapshot(),
    "restore": lambda mem: mem.restore(IMAGE, zero_grown=True), "dirty_pages": lambda mem: mem.dirty_pages(IMAGE),
    "apply": lambda mem: mem.apply(IMAGE.diff(IMAGE)), "with": lambda mem: mem.__enter__(),
}


@requires("failing_allocations")
@pytest.mark.parametrize("of_python", [False, True])
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=requires("failing_generators")) if name == "apply" else name for name in CALLS])
def test_a_memory_closes_after_a_call_in_which_any_allocation_of_python_failed(name, of_python):
    """Each allocation fails in turn. After any exception, the call must have left the gate."""
    import _testcapi

    call = CALLS[name]

    def fresh():
        maximum = 1 << 30
        if of_python:
            return linmem.PythonCreator(Delegating()).create(PAGE, maximum, PAGE, PAGE, may_move=True)
        return linmem.create(PAGE, maximum=maximum, reserve=PAGE, guard=PAGE, may_move=True)

    with fresh() as mem:        # the first call imports modules and fills caches
        try:
            call(mem)
        except (TypeError, ValueError, IndexError, MemoryError):
            pass
    for nth in range(1, 40):
        mem = fresh()
        _testcapi.set_nomemory(nth, nth + 1)
        try:
            call(mem)
        except (TypeError, ValueError, IndexError, MemoryError, RuntimeError):
            pass
        finally:
            _testcapi.remove_mem_hooks()
        assert mem.info().exports == 0 if not repr(mem).endswith("lost>") else True
        mem.close()
        assert mem.closed
        with pytest.raises(ValueError, match="the memory is closed"):
            mem.byte_size()


@requires("regions")
def test_a_memory_closed_during_another_threads_call_is_released_at_the_end_of_the_call():
    inside, go_on = threading.Event(), threading.Event()
    mem, made, size = delegated(moves=False)
    made.during = lambda: (inside.set(), go_on.wait(30))
    base, ended = mem.as_ptr(), []
    thread = threading.Thread(target=lambda: ended.append(mem.grow_to(size)))
    thread.start()
    assert inside.wait(30)
    mem.close()
    assert mem.closed
    mem.close()
    with pytest.raises(ValueError, match="the memory is closed"):
        mem.byte_size()
    assert is_mapped(base)
    go_on.set()
    thread.join(30)
    assert ended == [None]
    del made.inner
    assert not is_mapped(base)


def test_close_counts_exported_buffers_and_no_calls():
    mem = linmem.create(PAGE, maximum=PAGE)
    stop, errors = threading.Event(), []

    def read():
        try:
            while not stop.is_set():
                mem.read(0, PAGE)
                mem.info()
        except ValueError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    with memoryview(mem), pytest.raises(BufferError, match=r"1 exported buffer\(s\)"):
        mem.close()
    mem.close()         # works at any step of the other threads
    stop.set()
    for thread in threads:
        thread.join(30)
    assert set(errors) <= {"the memory is closed"}


def test_closing_in_many_threads_concurrently_closes_once():
    threads = 4
    pool = linmem.PoolingCreator()
    turn, errors, mems = threading.Barrier(threads), [], [pool.create(PAGE, maximum=PAGE) for _ in range(300)]

    def close():
        try:
            for mem in mems:
                turn.wait(30)
                mem.close()
                assert mem.closed
        except BaseException as error:
            errors.append(error)
            turn.abort()

    running = [threading.Thread(target=close) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert errors == []
    stats = pool.stats()
    assert (stats["live"], stats["rejected"]) == (0, 0)


# -- no thread waits for itself ----------------------------------------------------------------------------------

OWN = {
    "snapshot": lambda mem: mem.snapshot(), "grow_to": lambda mem: mem.grow_to(5 * PAGE),
    "restore": lambda mem: mem.restore(IMAGE), "dirty_pages": lambda mem: mem.dirty_pages(IMAGE),
    "apply": lambda mem: mem.apply(IMAGE.diff(IMAGE)), "close": lambda mem: mem.close(),
}
OWN_MOVING = {
    "read": lambda mem: mem.read(0, 1), "write": lambda mem: mem.write(0, b"1"), "info": lambda mem: mem.info(),
    "index": lambda mem: mem[0], "index assignment": lambda mem: mem.__setitem__(0, 1),
    "slice": lambda mem: mem[0:2], "memoryview": memoryview, "view": lambda mem: mem.view(">d"),
    "wasm_accessible": lambda mem: mem.wasm_accessible(),
}


@pytest.mark.parametrize(("name", "moves"), [(name, moves) for name in OWN for moves in (False, True)]
                         + [(name, True) for name in OWN_MOVING])
def test_a_growth_in_python_that_would_wait_for_itself_is_an_error(name, moves):
    mem, made, size = delegated(moves)
    caught = []

    def during():
        with pytest.raises(RuntimeError, match="this thread is in a growth of this memory already") as error:
            (OWN | OWN_MOVING)[name](mem)
        caught.append(error)

    made.during = during
    mem.grow_to(size)
    assert len(caught) == 1
    assert len(mem) == size
    mem[0] = 1
    mem.snapshot()
    mem.close()


def test_calls_that_wait_for_no_lock_work_inside_a_growth_of_the_same_memory():
    mem, made, size = delegated(moves=False)
    other = delegated(moves=True)
    seen = []

    def during():
        seen.append((mem.read(0, 1), len(mem), mem.info().byte_size, mem.as_ptr()))
        other[0].grow_to(other[2])      # a growth of another memory, during a growth of this memory

    made.during = during
    mem.grow_to(size)
    assert seen == [(b"\0", PAGE, PAGE, mem.as_ptr())]
    assert len(other[0]) == other[2]
    mem.close()
    other[0].close()


def test_a_handle_is_not_handed_on_in_the_middle_of_its_own_growth():
    mem, made, size = delegated(moves=False)

    class HandsOn:
        def new_memory(self, *request):
            return mem

    def during():
        with pytest.raises(RuntimeError, match="in a growth of this memory already"):
            linmem.PythonCreator(HandsOn()).create(PAGE)

    made.during = during
    mem.grow_to(size)
    mem.close()


# -- every wait can be interrupted ----------------------------------------------------------------------------------

WAITING = {**OWN, "memoryview": memoryview, "read": lambda mem: mem.read(0, 1), "info": lambda mem: mem.info(),
           "view": lambda mem: mem.view(">d"), "index": lambda mem: mem[0]}


@requires("interrupts")
@pytest.mark.parametrize("name", [name for name in WAITING if name != "close"])
def test_ctrl_c_ends_a_wait_for_another_threads_growth_and_changes_nothing(name):
    inside, go_on = threading.Event(), threading.Event()
    mem, made, size = delegated(moves=True)
    mem[0] = 9
    made.during = lambda: (inside.set(), go_on.wait(60))
    thread = threading.Thread(target=mem.grow_to, args=(size,))
    thread.start()
    assert inside.wait(30)
    main = threading.main_thread().ident
    timer = threading.Timer(0.05, lambda: signal.pthread_kill(main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):      # noqa: PT012
        timer.start()           # inside the block, because the signal may come early
        WAITING[name](mem)
    timer.join()
    assert thread.is_alive()
    go_on.set()
    thread.join(30)
    assert (len(mem), mem[0], mem.info().exports) == (size, 9, 0)
    mem.close()


@requires("interrupts")
def test_ctrl_c_ends_two_growths_in_python_that_wait_for_each_other():
    first, second = delegated(moves=False), delegated(moves=False)
    both = threading.Barrier(2)
    ended = []

    def crossed(other):
        both.wait(30)
        other[0].snapshot()

    first[1].during = lambda: crossed(second)
    second[1].during = lambda: crossed(first)
    thread = threading.Thread(target=lambda: ended.append(second[0].grow_to(second[2])))
    thread.start()
    main = threading.main_thread().ident
    timer = threading.Timer(0.2, lambda: signal.pthread_kill(main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):      # noqa: PT012
        timer.start()           # inside the block, because the signal may come early
        first[0].grow_to(first[2])
    timer.join()
    thread.join(30)
    assert ended == [None]
    assert (len(first[0]), len(second[0])) == (PAGE, second[2])
    first[0].close()
    second[0].close()


@requires("rlimits")
@pytest.mark.parametrize("name", ["snapshot", "memoryview"])
def test_a_thread_that_waits_for_a_long_growth_sleeps(name):
    """The OS gives the thread's processor time. With a busy wait, this time would be the whole time of the growth."""
    inside, go_on = threading.Event(), threading.Event()
    mem, made, size = delegated(moves=True)
    made.during = lambda: (inside.set(), go_on.wait(60))
    thread = threading.Thread(target=mem.grow_to, args=(size,))
    thread.start()
    assert inside.wait(30)
    spent = []

    def wait():
        before = time.thread_time(), time.monotonic()
        WAITING[name](mem)
        spent.append((time.thread_time() - before[0], time.monotonic() - before[1]))

    waiting = threading.Thread(target=wait)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    go_on.set()
    thread.join(30)
    waiting.join(30)
    processor, waited = spent[0]
    assert processor < waited / 2
    mem.close()


# -- memories in Python that move and then raise --------------------------------------------------------------------

class Moving(linmem.LinearMemory):
    """Moves at each growth past its capacity, and unmaps the old address immediately."""

    fails = ""
    error = ZeroDivisionError("in the memory")

    def __init__(self, size):
        self.map, self.size, self.capacity = mmap.mmap(-1, size), size, size

    def ask(self, name):
        if self.fails == name:
            raise self.error

    def byte_size(self):
        self.ask("byte_size")
        return self.size

    def byte_capacity(self):
        self.ask("byte_capacity")
        return self.capacity

    def as_ptr(self):
        self.ask("as_ptr")
        return ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    def wasm_accessible(self):
        self.ask("wasm_accessible")
        return range(self.as_ptr(), self.as_ptr() + self.capacity)

    def maximum_byte_size(self):
        self.ask("maximum_byte_size")
        return 1 << 30

    def grow_to(self, new_size):
        moved = mmap.mmap(-1, new_size)
        moved[:self.size] = self.map[:self.size]
        self.map, self.capacity = moved, new_size
        self.ask("grow_to")
        self.size = new_size
        if self.fails:
            self.failing()

    def failing(self):
        pass


def moving():
    made = []

    class Creator(linmem.MemoryCreator):
        def new_memory(self, ty, minimum, *request):
            made.append(Moving(minimum))
            return made[0]

    return linmem.PythonCreator(Creator()).create(PAGE, reserve=0, guard=0, may_move=True), made[0]


QUESTIONS = ["byte_size", "byte_capacity", "as_ptr", "wasm_accessible", "maximum_byte_size"]


@requires("real_pages")
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_memory_that_moved_to_an_unknown_address_is_lost_and_every_use_raises(question):
    mem, made = moving()
    made.fails = question
    with pytest.raises(ZeroDivisionError, match="in the memory"):
        mem.grow_to(3 * PAGE)
    made.fails = ""             # too late
    for name, call in CALLS.items():
        if name not in ("repr", "protect", "protect beyond", "discard", "prefault"):
            with pytest.raises(RuntimeError, match="the memory is lost"):
                call(mem)
    assert repr(mem) == "<linmem.Memory, lost>"
    assert not mem.closed
    mem.close()
    assert mem.closed


@requires("real_pages")
def test_a_memory_that_moved_and_then_raised_has_its_new_address():
    mem, made = moving()
    mem[7] = 7
    made.fails = "grow_to"
    with pytest.raises(ZeroDivisionError):
        mem.grow_to(3 * PAGE)
    assert mem.as_ptr() == made.as_ptr()
    assert (len(mem), mem[7], mem.byte_capacity()) == (PAGE, 7, 3 * PAGE)
    made.fails = ""
    mem.grow_to(4 * PAGE)
    assert (len(mem), mem[7], mem[4 * PAGE - 1]) == (4 * PAGE, 7, 0)
    mem.close()


@requires("real_pages")
@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_a_signal_while_a_memory_is_asked_where_it_is_does_not_lose_it(error):
    mem, made = moving()
    mem[7] = 7
    asked = []

    def once(name):
        asked.append(name)
        if len(asked) == 1:
            raise error

    made.ask = lambda name: once(name) if name == "byte_capacity" else None
    with pytest.raises(error):
        mem.grow_to(3 * PAGE)
    assert (mem.as_ptr(), len(mem), mem[7]) == (made.as_ptr(), PAGE, 7)
    mem.close()


@requires("real_pages")
def test_a_creation_that_raises_leaks_no_memory():
    class Creator(linmem.MemoryCreator):
        def new_memory(self, ty, minimum, *request):
            made = Moving(minimum)
            made.fails = "byte_capacity"
            return made

    limit = linmem.LimitingCreator(linmem.PythonCreator(Creator()), 1 << 30)
    with pytest.raises(ZeroDivisionError):
        limit.create(PAGE, reserve=0, guard=0, may_move=True)
    assert limit.used_bytes == 0


# -- under wasmtime ----------------------------------------------------------------------------------------------------

WAT = """(module (memory (export "memory") 1 100)
  (func (export "grow") (param i32) (result i32) local.get 0 memory.grow)
  (func (export "twice") (result i32)
    (drop (memory.grow (i32.const 1))) (memory.grow (i32.const 1)))
  (func (export "load") (param i32) (result i32) local.get 0 i32.load8_u)
  (func (export "fill") (param i32 i32) local.get 0 i32.const 1 local.get 1 memory.fill))"""


class Failing(linmem.MemoryCreator):
    """Raises `error` in creations and in growths."""

    def __init__(self):
        self.creation = self.growth = None

    def new_memory(self, *request):
        if self.creation is not None:
            raise self.creation
        made = Delegate(*request)

        def during():
            if self.growth is not None:
                raise self.growth
        made.during = during
        return made


def engine_of(creator, **options):
    config = wasmtime.Config()
    linmem.wasmtime.install(config, creator)
    for name, value in options.items():
        if hasattr(type(config), name):
            setattr(config, name, value)
    return wasmtime.Engine(config)


class Final(BaseException):
    """A class that refuses subclasses, like some classes of asynchronous libraries."""

    def __init_subclass__(cls):
        raise TypeError("final")


class Own(BaseException):
    pass


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("make", [KeyboardInterrupt, lambda: SystemExit(3), lambda: Own("mine"), GeneratorExit, Final])
def test_an_exception_that_is_not_the_guests_surfaces_in_python(make, threaded):
    creator = Failing()
    engine = engine_of(creator)
    module = wasmtime.Module(engine, WAT)
    caught = []

    def run():
        store = wasmtime.Store(engine)
        exports = wasmtime.Instance(store, module, []).exports(store)
        for call in (lambda: exports["grow"](store, 1), lambda: exports["twice"](store)):
            creator.growth = make()
            with pytest.raises(type(creator.growth)) as error:
                call()
            caught.append(error.value is creator.growth)
            creator.growth = None
        assert exports["grow"](store, 1) == 1       # each failed growth returned -1, and wasm runs on
        creator.creation = make()
        with pytest.raises(type(creator.creation)) as error:
            wasmtime.Instance(store, module, [])
        caught.append(error.value is creator.creation)
        creator.creation = None
        wasmtime.Instance(store, module, [])

    if threaded:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(60)
    else:
        run()
    assert caught == [True] * 3


def test_an_exception_of_a_creator_is_only_a_minus_one_for_the_guest():
    creator = Failing()
    engine = engine_of(creator)
    store = wasmtime.Store(engine)
    exports = wasmtime.Instance(store, wasmtime.Module(engine, WAT), []).exports(store)
    creator.growth = ValueError("no")
    assert exports["grow"](store, 1) == -1
    creator.growth = None       # the error's traceback refers to these objects
    assert exports["grow"](store, 1) == 1
    store.close()


def test_a_system_exit_in_a_creator_under_wasm_ends_the_process_with_its_status():
    code = answer(f"""
        import os, subprocess, sys
        sys.exit(subprocess.run([sys.executable, "-c", {EXITING!r}]).returncode != 5)
        """)
    assert code == ""


EXITING = textwrap.dedent("""
    import wasmtime, linmem, linmem.wasmtime
    class Exits(linmem.MemoryCreator):
        def new_memory(self, *request): raise SystemExit(5)
    config = wasmtime.Config()
    linmem.wasmtime.install(config, Exits())
    engine = wasmtime.Engine(config)
    wasmtime.Instance(wasmtime.Store(engine), wasmtime.Module(engine, "(module (memory 1))"), [])
    """)


class Vanishing(Delegate):
    """A growth releases the old address, and then as_ptr() fails."""

    lost = False

    def as_ptr(self):
        if self.lost:
            raise ZeroDivisionError("where?")
        return self.inner.as_ptr()

    def grow_to(self, new_size):
        self.lost = True
        self.inner.close()


@pytest.mark.parametrize("reservation", [0, 1 << 32])
def test_a_guest_whose_memory_is_lost_traps_without_a_crash_of_the_process(reservation):
    done = answer(LOSING.format(reservation=reservation))
    assert done == "-1 trap trap trap 0 lost"


LOSING = f"""
import sys
sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})
import pytest, wasmtime, linmem
from test_waits import WAT, Delegating, Vanishing, engine_of
engine = engine_of(Delegating(Vanishing), memory_reservation={{reservation}}, memory_guard_size=1 << 16)
store = wasmtime.Store(engine)
exports = wasmtime.Instance(store, wasmtime.Module(engine, WAT), []).exports(store)
memory = linmem.wasmtime.linear_memory(store, exports["memory"])
print(exports["grow"](store, 1), end=" ")
for call in (lambda: exports["load"](store, 5), lambda: exports["load"](store, 65535),
             lambda: exports["fill"](store, 5, 9)):
    try:
        call()
    except wasmtime.Trap:
        print("trap", end=" ")
print(exports["memory"].data_len(store), end=" ")
try:
    memory[0]
except RuntimeError as error:
    assert "lost" in str(error)
    print("lost", end="")
store.close()
"""


@requires("fork")
def test_a_signal_handler_that_uses_a_memory_that_its_thread_waits_to_move_is_refused():
    assert answer("""
        import faulthandler, linmem, signal, threading, time
        faulthandler.dump_traceback_later(100, exit=True)
        N, said, mems = 1 << 28, [], []
        def handler(*_):
            try:
                mems[-1].snapshot()
            except RuntimeError as error:
                said.append(str(error))
        signal.signal(signal.SIGALRM, handler)
        for n in range(100):        # until the signal comes while a growth waits for a read
            mem = linmem.create(N, reserve=N, may_move=True)
            mems.append(mem)
            reading = threading.Event()
            def read():
                reading.set()
                for _ in range(3):
                    mem.read(0, N)
            thread = threading.Thread(target=read)
            thread.start()
            reading.wait()
            signal.setitimer(signal.ITIMER_REAL, 0.02)
            mem.grow_to(N + (1 << 16))
            thread.join()
            signal.setitimer(signal.ITIMER_REAL, 0)
            mems.pop()
            mem.close()
            if said:
                break
        assert said and all("would wait for itself" in text for text in said), said
        print("over")
        """) == "over"
