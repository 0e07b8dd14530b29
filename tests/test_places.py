"""find() and live(): which memory an address belongs to, and all memories of the process."""

import ctypes
import dataclasses
import random
import textwrap
import threading

import pytest
from support import (
    FORKING,
    HAS_KERNEL32,
    PAGE,
    accessible_parts,
    build_extension,
    counting,
    failing,
    is_mapped,
    load_extension,
    requires,
    round_up,
    run_child,
    whole,
)

import linmem

SHAPE = {"maximum": 16 * PAGE, "reserve": 16 * PAGE, "guard": 2 * PAGE}
MOVING = {"maximum": 64 * PAGE, "reserve": 0, "guard": PAGE, "may_move": True}


def regions(mem):
    """(region, first offset, end) of each region of the memory that is not empty, from its info()."""
    info = mem.info()
    borders = (-info.pre_guard, 0, info.committed, info.byte_capacity, info.byte_capacity + info.guard)
    names = ("guard before", "accessible", "reserved", "guard after")
    return [(name, start, end) for name, start, end in zip(names, borders, borders[1:], strict=False) if start < end]


def check_found(mem):
    """find() names the memory at both ends of each of its regions."""
    base = mem.as_ptr()
    for name, start, end in regions(mem):
        assert linmem.find(base + start) == linmem.Place(mem, name, start)
        assert linmem.find(base + end - 1) == linmem.Place(mem, name, end - 1)


def held_at(address):
    place = linmem.find(address)
    return place and place.memory


# -- find ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [0, 1, PAGE, 3 * PAGE + 5, 16 * PAGE])
@pytest.mark.parametrize("guard", [0, PAGE, 16 * PAGE])
def test_each_address_of_a_reservation_is_in_a_region_of_its_memory(size, guard):
    with linmem.create(size, **{**SHAPE, "guard": guard}) as mem:
        check_found(mem)
        start, end = whole(mem)
        assert (start, end) == (mem.as_ptr() + regions(mem)[0][1], mem.as_ptr() + regions(mem)[-1][2])
        assert held_at(start - 1) != mem
        assert held_at(end) != mem


@requires("regions")
def test_the_region_is_accessible_where_the_os_says_so():
    with linmem.create(2 * PAGE, **SHAPE) as mem:
        for size in (2 * PAGE, 2 * PAGE + 1, 9 * PAGE, 16 * PAGE):
            mem.grow_to(size)
            (part,) = accessible_parts(mem)
            assert [(start, end) for name, start, end in regions(mem) if name == "accessible"] == [part[:2]]
            check_found(mem)


def test_a_place_is_a_frozen_record():
    with linmem.create(PAGE, **SHAPE) as mem:
        place = linmem.find(mem.as_ptr() + 3)
        assert type(place) is linmem.Place
        assert (place.memory, place.region, place.offset) == (mem, "accessible", 3)
        assert place.memory is not mem
        assert hash(place) == hash(linmem.Place(mem, "accessible", 3))
        assert repr(place) == f"Place(memory={mem!r}, region='accessible', offset=3)"
        with pytest.raises(AttributeError):
            place.offset = 4
        assert dataclasses.replace(place, offset=4) == linmem.Place(mem, "accessible", 4)


def test_an_address_outside_of_all_reservations_is_nowhere():
    buffer = ctypes.create_string_buffer(1)
    for address in (0, 1, PAGE, 2**47, 2**63, 2**64 - 1, id(linmem), ctypes.addressof(buffer)):
        assert linmem.find(address) is None, hex(address)


def test_memories_of_many_sizes_are_found_in_any_order_of_creation_and_release():
    chance = random.Random(7)
    memories = []
    for _ in range(600):
        size = chance.randrange(1 << chance.randrange(1, 22))
        memories.append(linmem.create(size % (64 * PAGE), reserve=size, guard=chance.choice([0, PAGE, 1 << 20])))
        if chance.random() < 0.3:
            memories.pop(chance.randrange(len(memories))).close()
    for mem in memories:
        check_found(mem)
    addresses = [mem.as_ptr() for mem in memories]
    chance.shuffle(memories)
    for mem in memories:
        mem.close()
    assert [held_at(address) for address in addresses] == [None] * len(addresses)


def test_the_handle_of_a_place_keeps_the_memory():
    mem = linmem.create(PAGE, **SHAPE)
    mem.write(0, b"kept")
    base = mem.as_ptr()
    place = linmem.find(base)
    mem.close()
    assert place.memory.read(0, 4) == b"kept"
    place.memory.grow_to(2 * PAGE)
    assert linmem.find(base + PAGE) == linmem.Place(place.memory, "accessible", PAGE)
    place.memory.close()
    assert held_at(base) is None


# -- find: dropped memories ------------------------------------------------------------------------------------

# For children. An inaccessible mapping of other code at [address, address + 65536).
FOREIGN_MAPPING = """
import ctypes, os
if hasattr(os, "fork"):
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    place = lambda address: libc.mmap(ctypes.c_void_p(address), ctypes.c_size_t(65536), 0, 0x4032, -1, ctypes.c_long(0))
    remove = lambda address: libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(65536)) == 0
else:
    kernel32 = ctypes.WinDLL("kernel32")
    kernel32.VirtualAlloc.restype = ctypes.c_void_p
    place = lambda address: kernel32.VirtualAlloc(ctypes.c_void_p(address), ctypes.c_size_t(65536), 0x2000, 1)
    remove = lambda address: kernel32.VirtualFree(ctypes.c_void_p(address), ctypes.c_size_t(0), 0x8000)
"""


@requires("regions")
def test_a_dropped_memory_is_named_until_another_mapping_replaces_it():
    mem = linmem.create(3 * PAGE, **SHAPE)
    base = mem.as_ptr()
    parts = regions(mem)
    mem.close()
    for name, start, end in parts:
        assert not is_mapped(base + start)
        assert linmem.find(base + start) == linmem.Place(None, name, start)
        assert linmem.find(base + end - 1) == linmem.Place(None, name, end - 1)
    done = run_child(FOREIGN_MAPPING + textwrap.dedent("""
        import linmem
        mem = linmem.create(1 << 16)
        base = mem.as_ptr()
        mem.close()
        assert linmem.find(base) == linmem.Place(None, "accessible", 0)
        assert place(base) == base
        assert linmem.find(base) is None
        assert linmem.find(base - 1) == linmem.Place(None, "guard before", -1)
        assert remove(base)
        assert linmem.find(base) == linmem.Place(None, "accessible", 0)
    """))
    assert (done.returncode, done.stderr) == (0, "")


def test_a_new_memory_replaces_a_dropped_one():
    seen = set()
    for n in range(40):
        with linmem.create(PAGE * (1 + n % 3), **SHAPE) as mem:
            check_found(mem)
            seen.add(mem.as_ptr())
        assert [held_at(base) for base in seen] == [None] * len(seen)


def test_the_oldest_of_many_dropped_memories_are_forgotten():
    first = linmem.create(PAGE, reserve=1 << 30)
    base = first.as_ptr() + (1 << 29)
    first.close()
    for _ in range(255):
        linmem.create(PAGE, reserve=0, guard=0).close()
    assert linmem.find(base) in (None, linmem.Place(None, "reserved", 1 << 29))     # None: a mapping of someone else
    linmem.create(PAGE, reserve=0, guard=0).close()
    assert linmem.find(base) is None


# -- find: pools, moves, wasmtime, other creators --------------------------------------------------------------

def test_an_idle_slot_of_a_pool_has_a_region_and_no_memory():
    pool = linmem.PoolingCreator(slots=2, max_unused_warm=1)
    memories = [pool.create(PAGE, **SHAPE) for _ in range(2)]
    bases = [mem.as_ptr() for mem in memories]
    for mem in memories:
        mem.grow_to(4 * PAGE)
        check_found(mem)
        mem.close()
    assert (pool.stats()["warm"], pool.stats()["cold"]) == (1, 1)
    assert [linmem.find(base - 1) for base in bases] == [linmem.Place(None, "guard before", -1)] * 2
    assert [linmem.find(base + 15 * PAGE) for base in bases] == [linmem.Place(None, "reserved", 15 * PAGE)] * 2
    assert sorted(linmem.find(base).region for base in bases) == ["accessible", "reserved"]     # warm, cold
    assert not set(bases) & {info.base for info in linmem.live()}
    again = pool.create(PAGE, **SHAPE)
    check_found(again)
    assert sorted(held_at(base) is None for base in bases) == [False, True]
    again.close()
    pool.trim()
    assert [held_at(base) for base in bases] == [None, None]


@pytest.mark.parametrize("make", [
    lambda: linmem.LimitingCreator(linmem.MmapCreator(), 1 << 30),
    lambda: linmem.StatisticsCreator(linmem.PoolingCreator()),
    lambda: linmem.MmapCreator(prefault=True, huge_pages=True),
    lambda: linmem.PythonCreator(linmem.MmapCreator()),
    lambda: linmem.PoolingCreator(linmem.PythonCreator(linmem.PoolingCreator())),
])
def test_the_memories_of_each_creator_are_found(make):
    creator = make()
    for _ in range(3):
        mem = creator.create(PAGE, **SHAPE)
        check_found(mem)
        assert mem.info() in linmem.live()
        base = mem.as_ptr()
        mem.close()
        assert held_at(base) is None


def test_a_memory_is_found_where_it_has_moved():
    mem = linmem.create(PAGE, **MOVING)
    for size in (2 * PAGE, 20 * PAGE, 64 * PAGE):
        old = whole(mem)
        mem.grow_to(size)
        check_found(mem)
        new = whole(mem)
        for address in old[0], old[1] - 1:
            assert new[0] <= address < new[1] or held_at(address) is None
    mem.close()


def test_a_refused_move_changes_no_place():
    with counting() as whole_move:
        linmem.create(PAGE, **MOVING).grow_to(20 * PAGE)
    for nth in range(1, whole_move.calls + 1):
        for times in (1, 1 << 40):
            mem = linmem.create(PAGE, **MOVING)
            with failing(nth, 8 if HAS_KERNEL32 else 12, times):
                try:
                    mem.grow_to(20 * PAGE)
                except linmem.PageError:
                    assert mem.byte_size() == PAGE
            check_found(mem)
            mem.close()


def test_a_memory_that_wasmtime_owns_is_found_until_its_store_is_gone():
    wasmtime = pytest.importorskip("wasmtime")
    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.MmapCreator())
    engine = wasmtime.Engine(config)
    store = wasmtime.Store(engine)
    module = wasmtime.Module(engine, '(module (memory (export "memory") 2 9))')
    exported = wasmtime.Instance(store, module, []).exports(store)["memory"]
    base = ctypes.addressof(exported.data_ptr(store).contents)
    place = linmem.find(base + 65536)
    assert (place.region, place.offset, place.memory.info().owner) == ("accessible", 65536, "wasmtime")
    assert place.memory == linmem.wasmtime.linear_memory(store, exported)
    assert place.memory.info() in linmem.live()
    exported.grow(store, 3)
    check_found(place.memory)
    place.memory.close()
    store.close()
    assert held_at(base) is None


class InPython(linmem.LinearMemory):
    """A memory whose bytes ctypes provides; it has no guard."""

    def __init__(self, size, calls=None):
        self.buffer = ctypes.create_string_buffer(round_up(size) + PAGE + (1 << 20))
        self.size, self.calls = size, calls

    def byte_size(self):
        return self.size

    def byte_capacity(self):
        return self.size

    def as_ptr(self):
        return round_up(ctypes.addressof(self.buffer))

    def wasm_accessible(self):
        return range(self.as_ptr(), self.as_ptr() + (1 << 62))

    def grow_to(self, new_size):
        self.calls.append(linmem.live())
        raise MemoryError


class PythonMemories(linmem.MemoryCreator):
    def __init__(self, calls):
        self.calls = calls

    def new_memory(self, ty, minimum, maximum, reserved, guard, **more):
        return InPython(minimum, self.calls)


def test_a_memory_in_python_is_in_live_and_has_no_place():
    calls = []
    mem = linmem.PythonCreator(PythonMemories(calls)).create(PAGE, 4 * PAGE, may_move=True)
    assert linmem.find(mem.as_ptr()) is None
    assert mem.info() in linmem.live()
    with pytest.raises(MemoryError):
        mem.grow_to(2 * PAGE)       # its grow_to() calls live(), which does not wait for this growth
    assert mem.info() not in calls[0]
    assert mem.info() in linmem.live()


NATIVE = """
# cython: language_level=3
cimport linmem
from libc.string cimport memset

cdef linmem.memory* m

def make(linmem.NativeCreator creator not None, size_t size):
    global m
    cdef linmem.failure why
    cdef linmem.memory_spec spec
    memset(&spec, 0, sizeof(spec))
    spec.minimum, spec.maximum, spec.reservation, spec.page_size = size, size, size, 1
    if creator.make(&spec, &m, &why):
        linmem.raise_failure(&why)
    return <size_t>m.base

def give():
    return linmem.wrap(m)
"""


@requires("compiler")
def test_a_memory_has_no_handle_before_its_creator_has_given_it_to_somebody(tmp_path):
    build_extension(tmp_path, "native", NATIVE)
    native = load_extension(tmp_path, "native")
    for creator in (linmem.MmapCreator(), pool := linmem.PoolingCreator()):
        for _ in range(2):
            base = native.make(creator, PAGE)
            assert linmem.find(base) == linmem.Place(None, "accessible", 0)
            assert base not in [info.base for info in linmem.live()]
            mem = native.give()
            check_found(mem)
            assert mem.info() in linmem.live()
            mem.close()
            assert held_at(base) is None
    assert pool.stats()["hits"] == 1


# -- live ----------------------------------------------------------------------------------------------------

def test_live_has_the_info_of_each_memory_once():
    before = {info.base for info in linmem.live()}
    pool = linmem.PoolingCreator()
    memories = [linmem.create(n * PAGE, creator=creator, **SHAPE)
                for creator in (None, pool) for n in range(1, 9)]
    view = memoryview(memories[3])
    second = linmem.find(memories[4].as_ptr()).memory
    found = [info for info in linmem.live() if info.base not in before]
    assert sorted(found, key=lambda info: info.base) == sorted((mem.info() for mem in memories),
                                                               key=lambda info: info.base)
    assert [info.exports for info in found].count(1) == 1
    for mem in [*memories[:3], *memories[4:]]:
        mem.close()
    kept = {info.base for info in linmem.live()} - before
    assert kept == {memories[3].as_ptr(), second.as_ptr()}
    view.release()
    memories[3].close()
    second.close()
    assert {info.base for info in linmem.live()} <= before


def test_a_refusal_of_the_os_leaves_no_memory_behind():
    memories = [linmem.create(PAGE, **SHAPE) for _ in range(5)]
    bases = [mem.as_ptr() for mem in memories]
    for nth in (1, 3, 5):
        with failing(nth, 8 if HAS_KERNEL32 else 12), pytest.raises(linmem.PageError, match="resident"):
            linmem.live()
    for mem in memories:
        mem.close()
    assert [held_at(base) for base in bases] == [None] * 5


# -- threads and forks ---------------------------------------------------------------------------------------

ROUNDS = 150


def test_places_are_exact_while_eight_threads_make_grow_move_and_drop_memories():
    pool = linmem.PoolingCreator(linmem.MmapCreator(), slots=64)
    known = [0] * 64        # addresses in memories of all threads. Without a GIL, a deque that grows cannot be copied.
    failed, stop = [], threading.Event()

    def work(number):
        chance = random.Random(number)
        try:
            for n in range(ROUNDS):
                how = MOVING if n % 3 else SHAPE
                with linmem.create(PAGE, creator=pool if n % 2 else None, **how) as mem:
                    check_found(mem)
                    known[chance.randrange(64)] = mem.as_ptr() + chance.randrange(PAGE)
                    mem.grow_to(chance.randrange(1, 16) * PAGE)
                    known[chance.randrange(64)] = mem.as_ptr()
        except BaseException as error:
            failed.append(error)

    def look():
        try:
            while not stop.is_set():
                for address in list(known):
                    place = linmem.find(address)
                    if place is None or place.memory is None:
                        continue
                    assert place.memory.byte_size() >= PAGE         # the handle is open
                    place.memory.read(0, 1)
                for info in linmem.live():
                    assert info.byte_size <= info.byte_capacity
        except BaseException as error:
            failed.append(error)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    watchers = [threading.Thread(target=look) for _ in range(2)]
    for thread in [*workers, *watchers]:
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    for thread in watchers:
        thread.join()
    if failed:
        raise failed[0]
    assert [held_at(address) for address in known] == [None] * len(known)
    assert pool.stats()["live"] == 0


@requires("fork")
def test_a_child_forked_at_any_moment_finds_the_memories_that_it_has():
    done = run_child(FORKING + textwrap.dedent(f"""
        import linmem
        P = {PAGE}
        stay = [linmem.create(P, maximum=16 * P, reserve=16 * P, guard=P) for _ in range(20)]
        stop = threading.Event()
        linmem.find(stay[0].as_ptr()), linmem.live()    # so that no thread imports at a fork

        def work():
            while not stop.is_set():
                with linmem.create(P, maximum=64 * P, reserve=0, guard=P, may_move=True) as mem:
                    mem.grow_to(20 * P)
                    linmem.find(mem.as_ptr()), linmem.live()

        def look():
            for mem in stay:
                assert linmem.find(mem.as_ptr() + 5) == linmem.Place(mem, "accessible", 5)
            assert len(linmem.live()) >= 20
            with linmem.create(P) as new:
                base = new.as_ptr()
                assert linmem.find(base).memory == new
            assert linmem.find(base) == linmem.Place(None, "accessible", 0)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(40):
                child(os.fork, look)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    """), timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
