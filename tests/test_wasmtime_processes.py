"""Tests of whole processes: scripts that crash without linmem, limits, fork, and the end of the interpreter."""

import re
import textwrap

import pytest
from support import FORKING, answer, died_of_a_fault, requires, run_child

SETUP = """
import sys, numpy as np, wasmtime
WAT = '''(module (memory (export "memory") 1) (data (i32.const 16) "hello")
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))'''
config = wasmtime.Config()
if {linmem}:
    import linmem.wasmtime
    linmem.wasmtime.install(config)
else:
    from wasmtime import _ffi as ffi
    # the smallest reservation, so that a plain memory moves
    ffi.wasmtime_config_memory_reservation_set(config.ptr(), {reservation})
    ffi.wasmtime_config_memory_reservation_for_growth_set(config.ptr(), 0)
engine = wasmtime.Engine(config)
store = wasmtime.Store(engine)
exports = wasmtime.Instance(store, wasmtime.Module(engine, WAT), []).exports(store)
memory = exports["memory"]
"""


def script(code, *, linmem, reservation=1 << 32):
    return SETUP.format(linmem=linmem, reservation=reservation) + textwrap.dedent(code)


# -- three scripts that kill the process with wasmtime-py alone, and the same with linmem --------------

AFTER_CLOSE = """
    view = {view}
    assert bytes(view[16:21]) == b"hello"
    store.close()
    assert bytes(view[16:21]) == b"hello"
    view[20] = 33
    print("alive", bytes(view[16:21]))
"""

AFTER_MOVE = """
    view = {view}
    assert exports["grow"](store, 2000) == 1
    assert bytes(view[16:21]) == b"hello"
    view[20] = 33
    print("alive", bytes(view[16:21]))
"""

PAST_THE_END = """
    view = {view}
    view[1 << 30] = 1
    print("alive")
"""

PLAIN_VIEW = "np.frombuffer(memory.get_buffer_ptr(store), dtype=np.uint8)"
LINMEM_VIEW = "np.asarray(linmem.wasmtime.linear_memory(store, memory))"


def test_a_view_used_after_store_close_crashes_without_linmem_and_works_with_linmem():
    assert died_of_a_fault(run_child(script(AFTER_CLOSE.format(view=PLAIN_VIEW), linmem=False)))
    result = run_child(script(AFTER_CLOSE.format(view=LINMEM_VIEW), linmem=True))
    assert (result.returncode, result.stdout, result.stderr) == (0, "alive b'hell!'\n", "")


def test_a_view_used_after_a_moving_growth_crashes_without_linmem_and_works_with_linmem():
    assert died_of_a_fault(run_child(script(AFTER_MOVE.format(view=PLAIN_VIEW), linmem=False, reservation=0)))
    result = run_child(script(AFTER_MOVE.format(view=LINMEM_VIEW), linmem=True))
    assert (result.returncode, result.stdout, result.stderr) == (0, "alive b'hell!'\n", "")


def test_a_too_long_view_crashes_without_linmem_and_is_an_exception_with_linmem():
    plain = "np.frombuffer(memory.get_buffer_ptr(store, size=1 << 31), dtype=np.uint8)"
    assert died_of_a_fault(run_child(script(PAST_THE_END.format(view=plain), linmem=False)))
    code = """
        memory = linmem.wasmtime.linear_memory(store, memory)
        for wrong in (lambda: memory.view(count=1 << 31), lambda: np.asarray(memory)[1 << 30],
                      lambda: memory.write(1 << 30, b"x"), lambda: memory[1 << 30]):
            try:
                wrong()
            except (ValueError, IndexError) as error:
                print(type(error).__name__)
    """
    result = run_child(script(code, linmem=True))
    assert (result.returncode, result.stdout) == (0, "ValueError\nIndexError\nValueError\nIndexError\n"), result.stderr


# -- limits ---------------------------------------------------------------------------------------------------

@requires("rlimits")
def test_under_a_limit_of_3_gb_memories_work_out_of_the_box():
    result = run_child("""
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (3000000 << 10, 3000000 << 10))
        import wasmtime, linmem.wasmtime
        config = wasmtime.Config()
        linmem.wasmtime.install(config)
        engine = wasmtime.Engine(config)
        module = wasmtime.Module(engine, '''(module (memory (export "memory") 1)
            (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
            (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0))))''')
        stores = [wasmtime.Store(engine) for _ in range(16)]
        all = [wasmtime.Instance(store, module, []).exports(store) for store in stores]
        assert all[0]["grow"](stores[0], 1600) == 1         # 100 MiB
        assert all[1]["grow"](stores[1], 60000) == -1       # 3.7 GiB
        assert all[1]["load"](stores[1], 65535) == 0
        for address in (65536, 1 << 24, -1):
            try:
                all[1]["load"](stores[1], address)
            except wasmtime.Trap:
                print("trap")
    """)
    assert (result.returncode, result.stdout) == (0, "trap\n" * 3), result.stderr


@requires("rlimits")
def test_without_tuning_the_error_names_the_limit():
    result = run_child("""
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (3000000 << 10, 3000000 << 10))
        import wasmtime, linmem.wasmtime
        config = wasmtime.Config()
        linmem.wasmtime.install(config, tune=False)
        store = wasmtime.Store(wasmtime.Engine(config))
        try:
            linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
        except wasmtime.WasmtimeError as error:
            print(error)
    """)
    assert result.returncode == 0, result.stderr
    assert "RLIMIT_AS (ulimit -v) is 3072000000 bytes" in result.stdout


# -- fork -------------------------------------------------------------------------------------------------------


@requires("fork")
def test_a_forked_child_reads_writes_grows_and_drops_everything_independently():
    result = run_child(script("""
        import gc, os, threading
        linear = linmem.wasmtime.linear_memory(store, memory)
        view = memoryview(linear)
        # another thread grows and drops memories, so that the fork may happen while this thread holds a lock
        # or is moving a memory to another address
        stop = threading.Event()
        current = [linmem.create(65536)]
        def churn():
            while not stop.is_set():
                m = linmem.create(65536, 1 << 24, reserve=0, may_move=True)
                current[0] = m
                m.grow_to(1 << 20)
        thread = threading.Thread(target=churn)
        thread.start()
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    assert bytes(view[16:21]) == b"hello"
                    view[16] = 0
                    assert exports["grow"](store, 3) == 1
                    assert bytes(current[0]).strip(b"\\0") == b""
                    m = linmem.create(65536, reserve=0, may_move=True)
                    m.grow_to(1 << 20)
                    m.close()
                    store.close()
                    engine.close()
                    del view, linear
                    gc.collect()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0
        stop.set()
        thread.join()
        assert bytes(view[16:21]) == b"hello"
        assert exports["grow"](store, 0) == 1
        print("parent untouched")
    """, linmem=True))
    assert (result.returncode, result.stdout) == (0, "parent untouched\n"), result.stderr


@requires("fork")
def test_a_child_that_is_forked_while_another_thread_looks_for_a_module_makes_memories():
    """The main thread holds the lock here for the thread that is not in the child."""
    assert answer(FORKING + """
import signal, wasmtime, linmem.wasmtime
config = wasmtime.Config()
linmem.wasmtime.install(config)
engine = wasmtime.Engine(config)

def make():
    signal.alarm(30)            # ends a child that waits for the lock
    memory = linmem.wasmtime.new_memory(wasmtime.Store(engine), wasmtime.MemoryType(wasmtime.Limits(1, 2)))
    signal.alarm(0)

make()
with linmem.wasmtime._modules_lock:
    child(os.fork, make)
make()
print("done")
""") == "done"


# -- the end of the interpreter ---------------------------------------------------------------------------------

LAST_SECONDS = {
    "everything is a global": "",
    "a view is held by a module": "sys.view = np.asarray(linmem.wasmtime.linear_memory(store, memory))",
    "a cycle holds all": "cycle = [linmem.wasmtime.linear_memory(store, memory), store, engine]; cycle.append(cycle)",
    "an exit handler closes": "import atexit; atexit.register(store.close); atexit.register(engine.close)",
    "a finaliser uses a view": """
class Last:
    def __init__(self, view): self.view = view
    def __del__(self): self.view[0] = 1
last = Last(memoryview(linmem.wasmtime.linear_memory(store, memory)))""",
    "a python creator is still in use": """
class Creator(linmem.MemoryCreator):
    def new_memory(self, *arguments): return linmem.MmapCreator().new_memory(*arguments)
config2 = wasmtime.Config(); linmem.wasmtime.install(config2, Creator()); engine2 = wasmtime.Engine(config2)
store2 = wasmtime.Store(engine2)
linmem.wasmtime.new_memory(store2, wasmtime.MemoryType(wasmtime.Limits(1, None)))""",
    "a daemon thread runs wasm": """
import threading
class Creator(linmem.MemoryCreator):
    def new_memory(self, *arguments): return linmem.MmapCreator().new_memory(*arguments)
config2 = wasmtime.Config(); linmem.wasmtime.install(config2, Creator()); engine2 = wasmtime.Engine(config2)
module2 = wasmtime.Module(engine2, WAT)
started = threading.Event()
def work():
    while True:
        store2 = wasmtime.Store(engine2)
        wasmtime.Instance(store2, module2, []).exports(store2)["grow"](store2, 1)
        started.set()
threading.Thread(target=work, daemon=True).start()
started.wait()""",
}


@pytest.mark.parametrize("scene", LAST_SECONDS)
def test_the_interpreter_ends_cleanly_while(scene):
    result = run_child(script(LAST_SECONDS[scene] + "\nprint('end')", linmem=True))
    assert (result.returncode, result.stdout) == (0, "end\n"), result.stderr
    # wasmtime-py's own finalisers may find their module already cleared and print an error; linmem prints no error
    assert not re.search(r"linmem\.|linmem[/\\]_?\w+\.py", result.stderr)
    assert "Fatal" not in result.stderr
