"""Objects are freed in any order, in cycles, by finalisers, and at the end of the interpreter."""

import re
import textwrap

import pytest
from support import PAGE, ROOT, run_child

HEAD = f"""
import atexit, ctypes, gc, itertools, os, random, sys, threading, weakref
sys.path.insert(0, {str(ROOT / "tests")!r})
import linmem
P = {PAGE}
how = dict(maximum=16 * P, reserve=16 * P, guard=P)
"""


# wasmtime-py's own finalisers may find their module already cleared and print an error. No other error is allowed.
NOT_OURS = re.compile(r"Exception ignored .*\bManaged\.__del__ .*\nTraceback .*\n(  .*\n)+"
                      r"AttributeError: 'NoneType' .*\n")


def scene(code, status=0):
    """The output of a process that runs `code`. The process must end with `status` and write no errors."""
    # Each arena of glibc's malloc holds inaccessible address space, and the tests would count this space as a memory's.
    done = run_child(HEAD + textwrap.dedent(code), env={"MALLOC_ARENA_MAX": "1"})
    assert (done.returncode, NOT_OURS.sub("", done.stderr)) == (status, ""), done.stdout
    return done.stdout.strip()


# -- any order --------------------------------------------------------------------------------------------

# The child drops the objects of `make()` in many orders, and the OS shows whether memory leaks.
ORDERS = """
from support import live_bytes, NEEDS

def live():
    return live_bytes() if NEEDS["maps"][0] else 0

def in_orders(make, names, most):
    # All choices of the first two objects to drop, and `most` random orders.
    chance = random.Random(6)
    orders = [(*pair, *chance.sample([n for n in names if n not in pair], len(names) - 2))
              for pair in itertools.permutations(names, 2)]
    orders += [chance.sample(names, len(names)) for _ in range(most)]
    make().clear()
    gc.collect()
    before = live()
    for order in orders:
        things = make()
        for name in order:
            del things[name]
        assert not things
    gc.collect()
    linmem.create(P).close()
    assert live() == before, (before, live())
    return len(orders)
"""

THINGS = """
class Mine(linmem.MemoryCreator):
    def __init__(self, upstream): self.upstream = upstream
    def new_memory(self, *asked): return self.upstream.new_memory(*asked)

def make():
    image = linmem.Image.from_bytes(b"i" * 3 * P)
    pool = linmem.PoolingCreator(linmem.LimitingCreator(linmem.MmapCreator(), 1 << 30), image=image)
    creator = linmem.TrackingCreator(linmem.PythonCreator(Mine(linmem.TrackingCreator(pool))))
    memory = creator.create(3 * P, **how)
    other = image.new_memory(creator=pool)
    other.restore(image)
    return dict(image=image, pool=pool, creator=creator, memory=memory, other=other, view=memoryview(memory),
                typed=memory.view(">I"), looks=memoryview(image))
"""


def test_creators_memories_views_and_images_are_freed_in_any_order():
    assert scene(ORDERS + THINGS + """
print(in_orders(make, list(make()), 300))
""") == "356"


GUESTS = """
import wasmtime, linmem.wasmtime
WAT = '''(module (memory (export "memory") 1) (global (export "g") (mut i32) (i32.const 7))
  (data (i32.const 16) "hello") (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))'''

def make():
    creator = linmem.StatisticsCreator(linmem.TrackingCreator(linmem.PoolingCreator()))
    config = wasmtime.Config()
    linmem.wasmtime.install(config, creator)
    engine = wasmtime.Engine(config)
    prepared = linmem.wasmtime.prepare(engine, WAT)
    store = wasmtime.Store(engine)
    instance = prepared.instantiate(store)
    exports = instance.exports(store)
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    snapshot = linmem.wasmtime.Snapshot.take(store, instance)
    assert exports["grow"](store, 1) == 1
    return dict(creator=creator, engine=engine, prepared=prepared, store=store, instance=instance, exports=exports,
                memory=memory, view=memoryview(memory), snapshot=snapshot)
"""


def test_engines_stores_instances_views_prepared_modules_and_snapshots_are_freed_in_any_order():
    assert scene(ORDERS + GUESTS + """
print(in_orders(make, list(make()), 40))
""") == "112"


def test_after_stores_and_engines_are_closed_the_rest_may_be_freed_in_any_order():
    assert scene(ORDERS + GUESTS + """
made = make
def make():
    things = made()
    first, then = random.sample([things["store"].close, things["engine"].close], 2)
    first()
    then()
    assert bytes(things["view"][16:21]) == b"hello" and len(things["view"]) == 2 << 16
    return things
print(in_orders(make, list(make()), 8))
""") == "80"


# -- cycles and finalisers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("things", ["THINGS", "GUESTS"])
def test_all_in_one_cycle_with_finalisers_that_use_it_is_collected(things):
    """Finalisers run before the collector clears any object of the cycle. Objects that they make are freed with the
    cycle."""
    assert scene(ORDERS + {"THINGS": THINGS, "GUESTS": GUESTS}[things] + """
used = []
class Last:
    def __init__(self, things): self.things = things
    def __del__(self):
        self.things["view"][0] += 1
        assert self.things["memory"][0] == self.things["view"][0]
        with self.things["creator"].create(3 * P, **how) as fresh:
            fresh.grow_to(4 * P)
        used.append(1)

def in_a_cycle(first):
    things = make()
    things["last"] = Last(things)
    cycle = [things, things["view"], things["memory"]]
    cycle.insert(first, cycle)
    if first % 2:
        things["again"] = Last(things)
    things["cycle"] = cycle

gc.disable()
in_a_cycle(0)
gc.collect()
before = live()
for turn in range(12):
    in_a_cycle(turn % 4)
    gc.collect()
linmem.create(P).close()
assert live() == before, (before, live())
print(len(used), gc.garbage)
""") == "19 []"


# -- the end of the interpreter ----------------------------------------------------------------------------------

LAST_SECONDS = {
    "a native global holds a view": """
        # Like a C extension that never drops its reference: no Python object owns it.
        for held in (things["view"], things["memory"], things["creator"]):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))""",
    "a native global holds an image's memory": """
        image = linmem.Image.from_bytes(b"i" * P)
        for held in (image, memoryview(image), image.new_memory(), image.new_memory(creator=linmem.PoolingCreator())):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))""",
    "exit handlers use all of it": """
        def use():
            things["view"][5] = 5
            assert things["memory"][5] == 5
            with linmem.PoolingCreator().create(P, **how) as mem: mem.grow_to(2 * P)
            assert bytes(things["memory"].snapshot())[5] == 5
        atexit.register(use)
        threading._register_atexit(use)""",
    "an exit handler drops all of it": "atexit.register(things.clear)",
    "exit handlers drop it one after the other": """
        for name in list(things): atexit.register(things.pop, name)""",
    "a finaliser of a module's global uses it": """
        class Last:
            def __init__(self, things, pool): self.things, self.pool = things, pool
            def __del__(self):
                self.things["view"][0] = 1
                with self.pool.create(3 * P, **how) as mem: mem.grow_to(4 * P)
                try: self.things["creator"].create(3 * P, **how).close()
                except TypeError as error: assert "while the interpreter shuts down" in str(error)
                self.things.clear()
        sys.modules["linmem"].last = last = Last(things, linmem.PoolingCreator())""",
    "weak references outlive it": """
        gone = [weakref.ref(thing, lambda ref: None) for thing in things.values() if hasattr(thing, "__weakref__")]
        finalisers = [weakref.finalize(thing, len, "end") for thing in (things["memory"], things["creator"])]""",
    "a daemon thread holds a view and waits": """
        started = threading.Event()
        def hold(view=memoryview(things["memory"]), mem=linmem.create(P)):
            started.set()
            threading.Event().wait()
        threading.Thread(target=hold, daemon=True).start()
        started.wait()""",
    "daemon threads make, snapshot, restore and drop": """
        started = threading.Semaphore(0)
        image = linmem.Image.from_bytes(b"i" * 4 * P)
        statistics = linmem.StatisticsCreator(linmem.PoolingCreator())
        def churn():
            told = False
            while True:
                with image.new_memory(creator=statistics) as mem:
                    mem[P] = 1
                    mem.snapshot()
                    mem.restore(image)
                if not told: told = not started.release()
        for _ in range(3): threading.Thread(target=churn, daemon=True).start()
        for _ in range(3): started.acquire()""",
    "a daemon thread grows and moves": """
        started = threading.Event()
        def churn():
            while True:
                with linmem.create(P, reserve=0, may_move=True) as mem: mem.grow_to(1 << 22)
                started.set()
        threading.Thread(target=churn, daemon=True).start()
        started.wait()""",
    "the modules of linmem are gone": """
        for name in [name for name in sys.modules if name.startswith("linmem")]: del sys.modules[name]
        del linmem
        gc.collect()""",
    "another interpreter wants it too": """
        # The interpreter may refuse the import, but the process must not crash.
        try:
            import _interpreters as interpreters
            create = interpreters.create
        except ImportError:
            import _xxsubinterpreters as interpreters
            create = interpreters.create
        one = create()
        try: interpreters.run_string(one, "import linmem; linmem.create(4096)")
        except Exception as error: assert "ImportError" in str(error) + str(type(error)), error
        interpreters.destroy(one)""",
}


@pytest.mark.parametrize("what", LAST_SECONDS)
@pytest.mark.parametrize("things", ["THINGS", "GUESTS"])
def test_the_interpreter_ends_cleanly_when(things, what):
    assert scene({"THINGS": THINGS, "GUESTS": GUESTS}[things] + "\nthings = make()\n"
                 + textwrap.dedent(LAST_SECONDS[what]) + "\nprint('end')\n") == "end"


@pytest.mark.parametrize(("end", "status"), [("os._exit(3)", 3), ("sys.exit(4)", 4), ("raise SystemExit(5)", 5),
                                             ("os._exit(6) if not atexit.register(os._exit, 7) else 0", 7)])
def test_a_process_ends_with_its_own_status_while_threads_are_in_pools_and_guests(end, status):
    assert scene(GUESTS + """
things = make()
pool = linmem.PoolingCreator()
started = threading.Semaphore(0)
def churn():
    told = False
    while True:
        with pool.create(2 * P, **how) as mem: mem.grow_to(5 * P)
        if not told: told = not started.release()
def guests():
    store = wasmtime.Store(things["engine"])
    started.release()
    while True:
        exports = things["prepared"].instantiate(store).exports(store)
        exports["grow"](store, 1)
        store = wasmtime.Store(things["engine"])
for work in (churn, churn, guests): threading.Thread(target=work, daemon=True).start()
for _ in range(3): started.acquire()
""" + ("print('end', flush=True)\n" + end), status=status) == "end"
