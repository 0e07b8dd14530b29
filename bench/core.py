"""The suite "core": the cost of a memory from Python, beside the lower bounds of this cost."""

from __future__ import annotations

from collections import deque
from itertools import repeat

import linmem
from linmem.bench import _loops
from linmem.bench.engines import DEFAULT, GIB, INSTALLED, KIB, LINMEM_PLAIN, MIB, Kept, Setting
from linmem.bench.harness import Contender, Goal, Group, Run, Unavailable, clock

ROUNDS = 40
RUN_NS, QUICK_RUN_NS = 3_000_000, 300_000       # the target length of one run of a contender
STEP = 64 * KIB
SPACE = 4 * GIB
BLOCK = 256 * KIB       # bytes that the view rows read and write; they fit a second-level cache
ITEMS = 1024            # bytes that the element row visits


def groups(quick: bool) -> list[Group]:
    """The groups of the suite. `quick` makes the long group small."""
    total = 64 * MIB if quick else GIB
    return [create_and_close(), grow_by_a_step(), grow_inside_wasm(), export(), grow_under_a_view(total),
            read_in_bulk(), write_in_bulk(), read_elements()]


# -- create and close -------------------------------------------------------------------------------

def create_and_close() -> Group:
    return Group(
        "create_close", "create + close, 64 KiB of 4 GiB + guards",
        (Contender("linmem", "linmem.create(65536, 4 << 30).close()", make_create),
         Contender("c", "the same system calls from a C loop", make_raw_create),
         Contender("mmap", "mmap.mmap(-1, 65536).close()", make_mmap_create)),
        (Goal("c", 1.5), Goal("mmap", None)),
        "mmap.mmap has neither guards nor room to grow")


def make_create() -> Run:
    create = linmem.create

    def run(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            create(STEP, SPACE).close()
        return clock() - began

    return run


def make_raw_create() -> Run:
    with linmem.create(STEP, SPACE) as mem:
        info = mem.info()

    def run(n: int) -> int:
        return _loops.create_close(info.reserved, info.pre_guard, info.committed, n)

    return run


def make_mmap_create() -> Run:
    import mmap

    create = mmap.mmap

    def run(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            create(-1, STEP).close()
        return clock() - began

    return run


# -- grow, from Python and from wasm ---------------------------------------------------------------------

def grow_by_a_step() -> Group:
    return Group(
        "grow", "grow_to by 64 KiB, untouched",
        (Contender("linmem", "mem.grow_to(size)", make_grow),
         Contender("c", "the same commits from a C loop", make_raw_grow),
         Contender("mmap", "mmap.mmap.resize(size)", make_mmap_grow)),
        (Goal("c", 1.2), Goal("mmap", None)),
        "mmap.mmap may move, and refuses while a view is live", most=SPACE // STEP - 1, share=2)


def sizes(n: int) -> list[int]:
    """The n sizes after the first step, as a list, so that the clock does not time their computation."""
    return list(range(2 * STEP, (n + 2) * STEP, STEP))


def make_grow() -> Run:
    def run(n: int) -> int:
        with linmem.create(STEP, SPACE) as mem:
            calls = map(mem.grow_to, sizes(n))
            began = clock()
            deque(calls, 0)
            return clock() - began

    return run


def make_raw_grow() -> Run:
    with linmem.create(STEP, SPACE) as mem:
        info = mem.info()

    def run(n: int) -> int:
        return _loops.grow_steps(info.reserved, info.pre_guard, info.committed, STEP, n)

    return run


def private_map(size: int):
    """Make an anonymous mmap.mmap that can be resized and touched. Raises `Unavailable` if it cannot."""
    import mmap

    try:
        made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        made.resize(2 * size)
    except (AttributeError, TypeError, SystemError, OSError) as error:
        raise Unavailable(f"an anonymous private mmap.mmap cannot be resized here: {error}") from error
    made.resize(size)
    return made


def make_mmap_grow() -> Run:
    private_map(STEP).close()

    def run(n: int) -> int:
        with private_map(STEP) as made:
            calls = map(made.resize, sizes(n))
            began = clock()
            deque(calls, 0)
            return clock() - began

    return run


GROW_IN_A_LOOP = """
(module (memory (export "memory") 1 65536)
  (func (export "grow") (param $n i32) (result i32) (local $last i32)
    (loop $again
      (local.set $last (memory.grow (i32.const 1)))
      (local.set $n (i32.sub (local.get $n) (i32.const 1)))
      (br_if $again (local.get $n)))
    (local.get $last)))
"""


def grow_inside_wasm() -> Group:
    return Group(
        "wasm_grow", "memory.grow inside wasm, by one page",
        (Contender("linmem", "with linmem.MmapCreator()", lambda: make_wasm_grow(LINMEM_PLAIN)),
         Contender("installed", "with linmem.wasmtime.install(config)", lambda: make_wasm_grow(INSTALLED)),
         Contender("wasmtime", "wasmtime's own memory, same module", lambda: make_wasm_grow(DEFAULT))),
        (Goal("wasmtime", 1.1), Goal("wasmtime", None, ours="installed")),
        "one call into wasm grows in a loop; instantiation is not counted", operations=4096, share=2)


def make_wasm_grow(setting: Setting) -> Run:
    import wasmtime

    kept = Kept(setting)
    engine = kept.engine
    module = wasmtime.Module(engine, GROW_IN_A_LOOP)

    def run(n: int, alive=kept) -> int:
        store = wasmtime.Store(engine)
        grow = wasmtime.Instance(store, module, []).exports(store)["grow"]
        began = clock()
        last = grow(store, n)
        took = clock() - began
        store.close()
        if last != n:
            raise AssertionError(f"wasm grew to {last} pages instead of {n}")
        return took

    return run


# -- views -------------------------------------------------------------------------------------------------

def export() -> Group:
    return Group(
        "export", "make and drop a memoryview",
        (Contender("linmem", "memoryview(mem)", make_export),
         Contender("bytearray", "memoryview(bytearray)", lambda: make_views_of(bytearray(STEP))),
         Contender("mmap", "memoryview(mmap.mmap)", make_mmap_export)),
        (Goal("bytearray", 1.3), Goal("mmap", None)))


def make_export() -> Run:
    return make_views_of(linmem.create(STEP, SPACE))


def make_mmap_export() -> Run:
    import mmap

    return make_views_of(mmap.mmap(-1, STEP))


def make_views_of(exporter: object) -> Run:
    def run(n: int) -> int:
        calls = map(memoryview, repeat(exporter, n))
        began = clock()
        deque(calls, 0)
        return clock() - began

    return run


def grow_under_a_view(total: int) -> Group:
    text = f"{total >> 30} GiB" if total >= GIB else f"{total >> 20} MiB"
    return Group(
        "grow_live", f"grow to {text} in 64 KiB steps, NumPy view each step",
        (Contender("linmem", "mem.grow_to, older views stay valid", lambda: make_live_grow(total)),
         Contender("numpy", "ndarray.resize, view dropped before", lambda: make_numpy_grow(total)),
         Contender("bytearray", "bytearray.extend, view dropped before", lambda: make_bytearray_grow(total)),
         Contender("mmap", "mmap.mmap.resize, view dropped before", lambda: make_mmap_live_grow(total))),
        (Goal("numpy", 0.1), Goal("bytearray", 0.1), Goal("mmap", None)),
        "the others cannot grow under a live view (numpy refuses, bytearray and mmap raise BufferError): they drop the"
        " view, grow in place and make a new view, which is the cheapest way; to keep the old view would cost a full"
        " copy per step", operations=1, share=0.5)


def make_live_grow(total: int) -> Run:
    import numpy as np

    steps = sizes(total // STEP - 1)

    def run(n: int) -> int:
        with linmem.create(STEP, total) as mem:
            first = np.asarray(mem)
            began = clock()
            for size in steps:
                mem.grow_to(size)
                view = np.asarray(mem)
            took = clock() - began
            if len(view) != total or first.ctypes.data != view.ctypes.data:
                raise AssertionError("the memory moved, or did not grow")
            del first, view
        return took

    return run


def make_numpy_grow(total: int) -> Run:
    import numpy as np

    steps = sizes(total // STEP - 1)

    def run(n: int) -> int:
        array = np.zeros(STEP, np.uint8)
        view = array[:]
        began = clock()
        for size in steps:
            del view
            array.resize(size)
            view = array[:]
        took = clock() - began
        if len(view) != total:
            raise AssertionError("the array did not grow")
        return took

    return run


def make_bytearray_grow(total: int) -> Run:
    import numpy as np

    steps = sizes(total // STEP - 1)
    more = bytes(STEP)

    def run(n: int) -> int:
        array = bytearray(STEP)
        view = np.frombuffer(array, np.uint8)
        began = clock()
        for _ in steps:
            del view
            array.extend(more)
            view = np.frombuffer(array, np.uint8)
        took = clock() - began
        if len(view) != total:
            raise AssertionError("the bytearray did not grow")
        return took

    return run


def make_mmap_live_grow(total: int) -> Run:
    import numpy as np

    private_map(STEP).close()
    steps = sizes(total // STEP - 1)

    def run(n: int) -> int:
        with private_map(STEP) as made:
            view = np.frombuffer(made, np.uint8)
            began = clock()
            for size in steps:
                del view
                made.resize(size)
                view = np.frombuffer(made, np.uint8)
            took = clock() - began
            if len(view) != total:
                raise AssertionError("the mapping did not grow")
            del view
        return took

    return run


def read_in_bulk() -> Group:
    return Group(
        "read", "read 256 KiB through the view (sum of float64)",
        (Contender("linmem", "np.frombuffer(mem)", lambda: make_read(linmem_doubles())),
         Contender("numpy", "a NumPy array", lambda: make_read(numpy_doubles()))),
        (Goal("numpy", 1.02),), share=3)


def write_in_bulk() -> Group:
    return Group(
        "write", "write 256 KiB through the view (fill of float64)",
        (Contender("linmem", "np.frombuffer(mem)", lambda: make_write(linmem_doubles())),
         Contender("numpy", "a NumPy array", lambda: make_write(numpy_doubles()))),
        (Goal("numpy", 1.02),), share=3)


def read_elements() -> Group:
    return Group(
        "element", "read and write single elements through the view",
        (Contender("linmem", "np.asarray(mem)[i]", lambda: make_elements(linmem_bytes())),
         Contender("numpy", "a NumPy array's [i]", lambda: make_elements(numpy_bytes()))),
        (Goal("numpy", 1.02),), share=3)


def linmem_doubles():
    import numpy as np

    return np.frombuffer(linmem.create(BLOCK), np.float64)


def numpy_doubles():
    import numpy as np

    return np.zeros(BLOCK // 8, np.float64)


def linmem_bytes():
    import numpy as np

    return np.asarray(linmem.create(BLOCK))


def numpy_bytes():
    import numpy as np

    return np.zeros(BLOCK, np.uint8)


def make_read(array) -> Run:
    array.fill(1.0)
    read = array.sum

    def run(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            read()
        return clock() - began

    return run


def make_write(array) -> Run:
    write = array.fill

    def run(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            write(2.0)
        return clock() - began

    return run


def make_elements(array) -> Run:
    indexes = list(range(0, len(array), len(array) // ITEMS))

    def run(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            for i in indexes:
                array[i] = array[i]
        return clock() - began

    return run
