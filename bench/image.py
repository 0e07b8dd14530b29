"""The suite "image": the cost to start from an image or to restore it, beside copies and new starts."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from itertools import repeat
from pathlib import Path

import linmem
from linmem._os import pages as _pages
from linmem.bench import engines, wasm
from linmem.bench.engines import DEFAULT, LINMEM_PLAIN, LINMEM_POOL, MIB, POOLING, Engines, Setting, pool
from linmem.bench.harness import P10, Contender, Goal, Group, Row, Run, Shared, clock, exact

ROUNDS = 25
RUN_NS, QUICK_RUN_NS = 4_000_000, 200_000
SPACE = 64 * MIB
SEED = 20_240_229
# The fewest restores in one run. A run has several, because the first restore after another contender's run finds cold
# caches.
PUTTINGS, QUICK_PUTTINGS = 8, 2
DRAWS = 64                  # sets of pages to write; each use takes another set
FEW, MANY = 16, 1600        # pages
RESTORE = {FEW: 0.01, MANY: 0.35}
NEW_MEMORY = 0.005
INSTANTIATE, FROM_PYTHON = 0.25, 0.45
RESTORE_INSTANCE = 0.02
PICKLE = 0.02
DATA = next(module for module in wasm.MODULES if module.key == "data4m")


def groups(quick: bool) -> list[Group]:
    """Bare memories, then a module with data, then an interpreter."""
    least = wasm.QUICK_USES if quick else wasm.USES
    full = Shared(full_image)
    puttings = QUICK_PUTTINGS if quick else PUTTINGS
    return [restore(count, full, puttings) for count in RESTORE] + [
        new_memory(full), instantiate(least), instantiate_from_python(least), interpreter(), pickled()]


# -- bare memories -----------------------------------------------------------------------------------------

def full_image() -> linmem.Image:
    """Content without a page of zeros, because a page of zeros needs no copy."""
    return linmem.Image.from_bytes(bytes(range(1, 256)) * (SPACE // 255) + b"\xff" * (SPACE % 255))


def restore(count: int, full: Shared[linmem.Image], least: int) -> Group:
    return Group(
        f"restore_{count}", f"{count:,} pages of 64 MiB written, then all put back",
        (Contender("linmem", "mem.restore(image)", functools.partial(make_restore, full, count, 1)),
         Contender("redrawn", "other pages each time", functools.partial(make_restore, full, count, DRAWS)),
         Contender("read", "the whole memory read once", functools.partial(make_restore, full, count, 1, read=True)),
         Contender("copy", "memcpy of the whole", functools.partial(make_copy_back, full, count))),
        (Goal("copy", RESTORE[count], by=P10), Goal("copy", None, ours="redrawn", by=P10),
         Goal("copy", None, ours="read", by=P10)),
        "both sides include the writes, and so the page faults that a reset leaves to the next use; the image has no"
        " page of zeros", least=least, alike=False)


def draw(count: int, draws: int) -> list:
    """Several sets of the offsets of `count` pages; each run has the same sets."""
    import numpy as np

    page = _pages.describe()["page_size"]
    random = np.random.default_rng([SEED, count])
    return [np.sort(random.choice(SPACE // page, count, replace=False)) * page for _ in range(draws)]


def make_restore(full: Shared[linmem.Image], count: int, draws: int, *, read: bool = False) -> Run:
    image = full()
    drawn = draw(count, draws)
    with image.new_memory() as tried:
        restoring(tried, image, drawn)(2)
        check_restored(tried, image)
    mem = image.new_memory()        # no page of it was touched
    if read:
        check_restored(mem, image)
    return restoring(mem, image, drawn)


def restoring(mem: linmem.Memory, image: linmem.Image, drawn: list) -> Run:
    import numpy as np

    array = np.frombuffer(mem, np.uint8)
    at, last = 0, len(drawn) - 1

    def run(n: int) -> int:
        nonlocal at
        restore = mem.restore
        began = clock()
        for _ in repeat(None, n):
            array[drawn[at]] = 0
            restore(image)
            at = at + 1 if at < last else 0
        return clock() - began

    return run


def make_copy_back(full: Shared[linmem.Image], count: int) -> Run:
    import numpy as np

    image = full()
    offsets, = draw(count, 1)
    mem = linmem.create(SPACE)
    array, view, source = np.frombuffer(mem, np.uint8), memoryview(mem), memoryview(image)

    def run(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            array[offsets] = 0
            view[:] = source
        return clock() - began

    run(1)
    check_restored(mem, image)
    return run


def check_restored(mem: linmem.Memory, image: linmem.Image) -> None:
    if memoryview(mem) != memoryview(image):
        raise RuntimeError("the restored memory has other bytes than the image")


def new_memory(full: Shared[linmem.Image]) -> Group:
    return Group(
        "new_memory", f"a memory of 64 MiB, {FEW} pages written, close",
        (Contender("linmem", "image.new_memory()", functools.partial(make_memories, full, lambda: None)),
         Contender("pool", "in a pool", functools.partial(make_memories, full, pool)),
         Contender("copy", "a fresh memory + memcpy", functools.partial(make_copies, full)),
         Contender("bytearray", "bytearray(data)", functools.partial(make_arrays, full))),
        (Goal("copy", NEW_MEMORY, by=P10), Goal("copy", None, ours="pool", by=P10), Goal("bytearray", None, by=P10)),
        "bytearray has neither guards nor room to grow", alike=False)


def strided() -> tuple[slice, bytes]:
    """FEW pages, far apart: the offsets, and the bytes to write."""
    return slice(None, None, SPACE // FEW + _pages.describe()["page_size"]), bytes(FEW)


def make_memories(full: Shared[linmem.Image], make_creator: Callable[[], object]) -> Run:
    image, creator = full(), make_creator()
    where, zeros = strided()

    def run(n: int) -> int:
        make = image.new_memory
        began = clock()
        for _ in repeat(None, n):
            mem = make(creator=creator)
            memoryview(mem)[where] = zeros
            mem.close()
        return clock() - began

    return run


def make_copies(full: Shared[linmem.Image]) -> Run:
    source = memoryview(full())
    where, zeros = strided()

    def run(n: int) -> int:
        create = linmem.create
        began = clock()
        for _ in repeat(None, n):
            mem = create(SPACE)
            view = memoryview(mem)
            view[:] = source
            view[where] = zeros
            view.release()
            mem.close()
        return clock() - began

    return run


def make_arrays(full: Shared[linmem.Image]) -> Run:
    source = memoryview(full())
    where, zeros = strided()

    def run(n: int) -> int:
        began = clock()
        for _ in repeat(None, n):
            memoryview(bytearray(source))[where] = zeros
        return clock() - began

    return run


# -- a module with data -----------------------------------------------------------------------------------

def instantiate(least: int) -> Group:
    live = Engines()
    best = (DEFAULT, *POOLING)
    return Group(
        "instantiate", "4 MiB of data, 1 % touched, native loop",
        (*engines.native_contenders(live, (LINMEM_POOL, LINMEM_PLAIN), DATA.source, wasm.empty, prepared=True),
         *engines.native_contenders(live, best, DATA.source, wasm.empty)),
        (Goal(tuple(setting.key for setting in best), INSTANTIATE, by=P10, called="best"),
         Goal(tuple(setting.key for setting in best), None, ours="plain", by=P10, called="best"),
         Goal("default", None, by=P10)),
        "the cost of a module without a memory on the same engine is subtracted", least=least, alike=False,
        table=wasm.TABLE)


def instantiate_from_python(least: int) -> Group:
    live = Engines()
    return Group(
        "python_instantiate", "the same module from Python",
        (*(Contender(s.key, f"{s.what}, data in an image", engines.python(live, s, DATA.source, prepared=True))
           for s in (LINMEM_POOL, LINMEM_PLAIN)),
         *(Contender(s.key, s.what, engines.python(live, s, DATA.source)) for s in (DEFAULT, POOLING[0]))),
        (Goal("default", FROM_PYTHON, by=P10), Goal("default", None, ours="plain", by=P10),
         Goal("pooling", None, by=P10)),
        "Store, instance and close with wasmtime-py; everything is counted", least=least, alike=False)


# -- an interpreter ----------------------------------------------------------------------------------------

# The text of a request, and its result. The request defines words, computes, and leaves a dirty heap.
REQUEST = (b"variable total  : area sq 355 113 */ ;  : areas 200 0 do i area total +! loop ;  areas"
           b"  here 4096 7 fill  total @ 30 fib + &eacute +\0",
           sum(i * i * 355 // 113 for i in range(200)) + 832040 + 233)
WORDS = 400                 # of the interpreter's library, as a lower bound


def interpreter() -> Group:
    live = Engines()
    return Group(
        "interpreter", f"an interpreter of over {WORDS} words, ready for a request",
        (Contender("linmem", "snapshot.restore(store)", put_back(live, LINMEM_POOL)),
         Contender("plain", "without a pool", put_back(live, LINMEM_PLAIN)),
         Contender("default", "instantiate and initialise, wasmtime's default", start_again(live, DEFAULT)),
         Contender("again", "the same in linmem's pool", start_again(live, LINMEM_POOL))),
        (Goal("default", RESTORE_INSTANCE, by=P10), Goal("again", None, by=P10),
         Goal("default", None, ours="plain", by=P10)),
        "between two of them the interpreter serves a request, which is not counted", alike=False, most=32)


def program() -> bytes:
    return Path(__file__).with_name("_forth.wasm").read_bytes()


class Interpreter:
    """An initialised interpreter in a store of its own."""

    def __init__(self, engine, instantiate: Callable[[object], object]) -> None:
        import wasmtime

        self.store = wasmtime.Store(engine)
        self.instance = instantiate(self.store)
        self.exports = self.instance.exports(self.store)
        words = self.exports["init"](self.store)
        if words < WORDS:
            raise RuntimeError(f"the interpreter was not initialised: {words}")

    def serve(self) -> None:
        store, exports = self.store, self.exports
        text, expected = REQUEST
        exports["memory"].write(store, text, exports["request"](store))
        found = exports["eval"](store)
        if found != expected:
            raise RuntimeError(f"the interpreter answers {found} instead of {expected}")


def put_back(live: Engines, setting: Setting) -> Callable[[], Run]:
    def make() -> Run:
        from linmem.wasmtime import Snapshot, prepare

        kept = live.get(setting)
        guest = Interpreter(kept.engine, prepare(kept.engine, program(), expose=True).instantiate)
        snapshot = Snapshot.take(guest.store, guest.instance)

        def run(n: int, alive=kept) -> int:
            restore, store, serve, took = snapshot.restore, guest.store, guest.serve, 0
            for _ in repeat(None, n):
                serve()
                began = clock()
                restore(store)
                took += clock() - began
            return took

        return run

    return make


def start_again(live: Engines, setting: Setting) -> Callable[[], Run]:
    def make() -> Run:
        import wasmtime

        kept = live.get(setting)
        module = wasmtime.Module(kept.engine, program())

        def run(n: int) -> int:
            engine, took = kept.engine, 0
            for _ in repeat(None, n):
                began = clock()
                guest = Interpreter(engine, lambda store: wasmtime.Instance(store, module, []))
                took += clock() - began
                guest.serve()
                began = clock()
                guest.store.close()
                took += clock() - began
            return took

        return run

    return make


# -- images to other processes -----------------------------------------------------------------------------------------

def pickled() -> Group:
    return Group("pickle", "an image of 64 MiB with 1 % of its pages not zero", (), (),
                 "bytes of pickle.dumps(image, 5), buffers included; counted, not timed", count=count_pickle)


def count_pickle() -> list[Row]:
    page = _pages.describe()["page_size"]
    count = SPACE // page // 100
    image = linmem.Image.from_pieces(
        [(int(offset), bytes([1 + i % 255]) * page) for i, offset in enumerate(draw(count, 1)[0])], SPACE)
    ratio = len(pickle.dumps(image, 5)) / image.size
    return [exact("pickle/size", pickled().operation, "its pickle", "its size", ratio, PICKLE)]
