"""Creators over creators: budgets, statistics, and a creator written in Python."""

import ctypes
import gc
import mmap
import pickle
import random
import threading
import weakref

import pytest
from support import PAGE, requires, round_up

import linmem

MMAP = linmem.MmapCreator()


def limiting(limit, upstream=MMAP):
    return linmem.LimitingCreator(upstream, limit)


# -- budgets -----------------------------------------------------------------------------------------

def test_a_budget_is_charged_in_host_pages_and_refunded():
    limit = limiting(100 * PAGE)
    a = limit.create(1)
    assert (limit.used_bytes, limit.limit_bytes) == (PAGE, 100 * PAGE)
    b = limit.create(10 * PAGE + 1, maximum=200 * PAGE)
    assert limit.used_bytes == 12 * PAGE
    b.grow_to(10 * PAGE + 2)        # within a page that is already charged
    assert limit.used_bytes == 12 * PAGE
    b.grow_to(50 * PAGE)
    assert limit.used_bytes == 51 * PAGE
    a.close()
    assert limit.used_bytes == 50 * PAGE
    with memoryview(b):
        with pytest.raises(BufferError):
            b.close()
        assert limit.used_bytes == 50 * PAGE
    del b
    gc.collect()
    assert limit.used_bytes == 0
    assert limit.peak_bytes == 51 * PAGE


def test_over_the_budget_is_a_limit_error_with_the_figures():
    limit = limiting(10 * PAGE)
    with limit.create(6 * PAGE, maximum=100 * PAGE) as mem:
        with pytest.raises(linmem.LimitError) as caught:
            limit.create(5 * PAGE)
        assert (caught.value.limit, caught.value.used, caught.value.requested) == (10 * PAGE, 6 * PAGE, 5 * PAGE)
        assert str(caught.value) == (f"limit of {10 * PAGE} bytes reached: {6 * PAGE} in use and {5 * PAGE} more"
                                     " asked for")
        with pytest.raises(linmem.GrowError) as caught:
            mem.grow_to(11 * PAGE)
        assert (caught.value.limit, caught.value.used, caught.value.requested) == (10 * PAGE, 6 * PAGE, 5 * PAGE)
        assert mem.byte_size() == limit.used_bytes == 6 * PAGE
        mem.grow_to(10 * PAGE)
        again = pickle.loads(pickle.dumps(caught.value))
        assert (type(again), str(again)) == (linmem.LimitError, str(caught.value))
        assert (again.limit, again.used, again.requested) == (10 * PAGE, 6 * PAGE, 5 * PAGE)


def test_a_budget_of_zero_bytes_allows_empty_memories():
    limit = limiting(0)
    with limit.create(0, maximum=PAGE) as mem, pytest.raises(linmem.LimitError):
        mem.grow_to(1)


def test_an_absurd_size_is_over_every_budget():
    for size in (2**62, 2**63, 2**64 - 1):
        limit = limiting(1 << 40)
        with limit.create(0, reserve=0) as mem:
            with pytest.raises(linmem.LimitError):
                mem.grow_to(size)
            with pytest.raises(linmem.LimitError):
                limit.create(size)
            assert limit.used_bytes == 0


@pytest.mark.parametrize(("outer", "inner"), [(8, 16), (16, 8)])
def test_budgets_nest_and_unwind_when_either_refuses(outer, inner):
    below = limiting(inner * PAGE)
    above = limiting(outer * PAGE, below)
    assert above.upstream is below
    with above.create(5 * PAGE, maximum=100 * PAGE) as mem:
        assert above.used_bytes == below.used_bytes == 5 * PAGE
        with pytest.raises(linmem.LimitError) as caught:
            mem.grow_to(9 * PAGE)
        assert caught.value.limit == 8 * PAGE
        with pytest.raises(linmem.LimitError):
            above.create(4 * PAGE)
        assert above.used_bytes == below.used_bytes == 5 * PAGE
        mem.grow_to(8 * PAGE)
        assert above.used_bytes == below.used_bytes == 8 * PAGE
    assert above.used_bytes == below.used_bytes == 0


def test_a_growth_that_the_memory_refuses_is_not_charged():
    limit = limiting(100 * PAGE)
    with limit.create(PAGE, reserve=0, may_move=True) as mem, memoryview(mem):
        with pytest.raises(BufferError):
            mem.grow_to(50 * PAGE)
        assert limit.used_bytes == PAGE
    with limit.create(PAGE, maximum=2 * PAGE) as mem:
        with pytest.raises(linmem.GrowError):
            mem.grow_to(3 * PAGE)
        assert limit.used_bytes == PAGE


def test_a_memory_outlives_its_creators_and_is_still_counted():
    limit = limiting(10 * PAGE)
    mem = linmem.StatisticsCreator(limiting(5 * PAGE, limit)).create(PAGE, maximum=20 * PAGE)
    gc.collect()
    mem.grow_to(5 * PAGE)
    with pytest.raises(linmem.LimitError):
        mem.grow_to(6 * PAGE)
    assert limit.used_bytes == 5 * PAGE
    mem.close()
    assert limit.used_bytes == 0


def test_threads_never_exceed_the_budget_and_its_final_use_is_zero():
    most = 64 * PAGE
    limit = limiting(most)
    creator = linmem.StatisticsCreator(limit)
    errors, refused = [], []
    start = threading.Barrier(8)

    def work(seed):
        rng = random.Random(seed)
        mine = []
        try:
            start.wait(60)
            for _ in range(150):
                try:
                    choice = rng.random()
                    if choice < 0.4 or not mine:
                        mine.append(creator.create(rng.randrange(8 * PAGE), maximum=32 * PAGE))
                    elif choice < 0.8:
                        mem = rng.choice(mine)
                        mem.grow_to(min(32 * PAGE, mem.byte_size() + rng.randrange(6 * PAGE)))
                    else:
                        mine.pop(rng.randrange(len(mine))).close()
                except linmem.LimitError as error:
                    refused.append(error.used)
                    if mine:
                        mine.pop().close()
                assert sum(mem.info().committed for mem in mine) <= limit.used_bytes <= most
            for mem in mine:
                mem.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert all(used <= most for used in refused)
    assert limit.used_bytes == 0
    assert 0 < limit.peak_bytes <= most
    sums = creator.statistics()
    assert (sums["current_bytes"], sums["current_count"]) == (0, 0)
    assert sums["failures"] == len(refused)


def test_a_budget_shows_its_figures():
    assert repr(limiting(5)) == "LimitingCreator(MmapCreator(), limit_bytes=5 bytes, used_bytes=0 bytes)"


# -- statistics --------------------------------------------------------------------------------------

def test_statistics_are_the_sums_over_all_memories():
    creator = linmem.creator("statistics", history=2)
    a = creator.create(PAGE, maximum=4 * PAGE)
    b = creator.create(10)
    a.grow_to(3 * PAGE)
    with pytest.raises(linmem.GrowError):      # refused by the memory's own maximum, before any adaptor
        a.grow_to(5 * PAGE)
    a.prefault()
    assert creator.statistics() == {
        "current_bytes": 3 * PAGE + 10, "peak_bytes": 3 * PAGE + 10, "total_bytes": 3 * PAGE + 10,
        "current_count": 2, "peak_count": 2, "total_count": 2, "failures": 0}
    newest, oldest = creator.memories()
    assert (newest["first_size"], newest["size"], newest["growths"]) == (10, 10, 0)
    assert (oldest["first_size"], oldest["size"], oldest["growths"], oldest["refused"]) == (PAGE, 3 * PAGE, 1, 0)
    assert oldest["alive"]
    assert oldest["grow_ns"] > 0
    assert oldest["peak_resident"] == 3 * PAGE
    a.close()
    b.close()
    sums = creator.statistics()
    assert (sums["current_bytes"], sums["current_count"], sums["peak_bytes"]) == (0, 0, 3 * PAGE + 10)
    assert [record["first_size"] for record in creator.memories()] == [10, PAGE]


@pytest.mark.parametrize("history", [0, 1, 3])
def test_only_the_newest_dropped_memories_are_remembered(history):
    creator = linmem.creator("statistics", history=history)
    for size in range(1, 6):
        creator.create(size).close()
    with creator.create(100):
        records = creator.memories()
    assert [record["first_size"] for record in records] == [100, 5, 4, 3][:history + 1]
    assert [record["alive"] for record in records] == [True] + [False] * history
    assert creator.statistics()["total_count"] == 6


# -- a creator in Python -------------------------------------------------------------------------------

class MappedMemory(linmem.LinearMemory):
    """A memory in pages of the standard library's mmap."""

    def __init__(self, size, capacity):
        self.map = mmap.mmap(-1, max(capacity, mmap.PAGESIZE))
        self.size, self.capacity = size, capacity

    def byte_size(self):
        return self.size

    def byte_capacity(self):
        return self.capacity

    def grow_to(self, new_size):
        if new_size > self.capacity:
            raise linmem.GrowError(f"no more than {self.capacity}")
        self.size = new_size

    def as_ptr(self):
        return ctypes.addressof(ctypes.c_char.from_buffer(self.map))


class MappedCreator(linmem.MemoryCreator):
    def __init__(self, kind=MappedMemory):
        self.kind, self.asked, self.made = kind, [], []

    def new_memory(self, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes):
        self.asked.append((ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes))
        memory = self.kind(minimum, max(minimum, reserved_size_in_bytes or 0))
        self.made.append(weakref.ref(memory))
        return memory


@requires("real_pages")
def test_a_memory_in_python_is_used_like_any_other():
    creator = MappedCreator()
    mem = linmem.create(PAGE, maximum=8 * PAGE, reserve=4 * PAGE, may_move=True, guard=0, creator=creator)
    assert creator.asked == [(linmem.MemoryType(PAGE, 8 * PAGE, is_64=True, page_size=1), PAGE, 8 * PAGE, 4 * PAGE, 0)]
    made = creator.made[0]
    assert mem.as_ptr() == made().as_ptr()
    with memoryview(mem) as view:
        view[5] = 9
        assert made().map[5] == 9
        mem.grow_to(2 * PAGE + 1)
        assert (mem.byte_size(), made().size, mem.byte_capacity()) == (2 * PAGE + 1, 2 * PAGE + 1, 4 * PAGE)
    info = mem.info()
    assert (info.kind, info.resident, info.exports, info.maximum_byte_size) == ("python", None, 0, 8 * PAGE)
    for call in (lambda: mem.protect(0, PAGE, "r"), mem.discard, mem.prefault):
        with pytest.raises(TypeError, match="not supported by a memory of kind 'python'"):
            call()
    with pytest.raises(ValueError, match="offset must be a multiple of the host page"):
        mem.protect(1, PAGE, "r")
    with pytest.raises(linmem.GrowError, match="no more than"):
        mem.grow_to(5 * PAGE)
    assert mem.byte_size() == 2 * PAGE + 1
    assert made() is not None
    mem.close()
    gc.collect()
    assert made() is None


@requires("real_pages")
def test_a_view_keeps_a_memory_in_python_alive():
    creator = MappedCreator()
    view = memoryview(linmem.create(PAGE, guard=0, creator=creator))
    gc.collect()
    assert creator.made[0]() is not None
    view[0] = 1
    view.release()
    gc.collect()
    assert creator.made[0]() is None


@requires("real_pages")
def test_budgets_and_statistics_work_over_a_creator_in_python():
    limit = limiting(4 * PAGE, linmem.PythonCreator(MappedCreator()))
    creator = linmem.StatisticsCreator(limit)
    with creator.create(PAGE, reserve=8 * PAGE, guard=0) as mem:
        mem.grow_to(4 * PAGE)
        with pytest.raises(linmem.LimitError):
            mem.grow_to(4 * PAGE + 1)
        assert limit.used_bytes == 4 * PAGE
        assert creator.memories()[0]["refused"] == 1
    assert limit.used_bytes == 0


class Odd(Exception):
    pass


@pytest.mark.parametrize("error", [Odd("why"), KeyboardInterrupt(), MemoryError("none")])
def test_an_exception_of_a_creator_in_python_reaches_the_caller_unchanged(error):
    class Raises:
        def new_memory(self, *arguments):
            raise error

    limit = limiting(100 * PAGE, linmem.PythonCreator(Raises()))
    with pytest.raises(type(error)) as caught:
        limit.create(PAGE)
    assert caught.value is error
    assert limit.used_bytes == 0


LIES = {
    "another size": ({"byte_size": lambda self: self.size + 1}, r"byte_size\(\) must be what was asked for"),
    "no base": ({"as_ptr": lambda self: 0}, r"as_ptr\(\) must be a non-zero multiple"),
    "an unaligned base": ({"as_ptr": lambda self: MappedMemory.as_ptr(self) + 8}, r"as_ptr\(\) must be a non-zero"),
    "a negative base": ({"as_ptr": lambda self: -4096}, r"as_ptr\(\) must be >= 0"),
    "a base that is no number": ({"as_ptr": lambda self: "0x1000"}, r"as_ptr\(\) must be an integer"),
    "a capacity below its size": ({"byte_capacity": lambda self: self.size - 1}, r"byte_capacity\(\) must be >="),
    "a capacity past every address": ({"byte_capacity": lambda self: 2**64 - 1}, r"byte_capacity\(\) does not fit"),
    "less than wasm may touch": ({"wasm_accessible": lambda self: range(self.as_ptr(), self.as_ptr() + 1)},
                                 r"wasm_accessible\(\) must cover"),
}


@requires("real_pages")
@pytest.mark.parametrize("lie", LIES)
def test_a_memory_with_inconsistent_answers_is_refused_and_dropped(lie):
    methods, message = LIES[lie]
    creator = MappedCreator(type("Liar", (MappedMemory,), methods))
    limit = limiting(100 * PAGE, linmem.PythonCreator(creator))
    with pytest.raises((ValueError, TypeError), match=message):
        limit.create(2 * PAGE, guard=0)
    gc.collect()
    assert creator.made[0]() is None
    assert limit.used_bytes == 0


@requires("real_pages")
def test_a_guard_that_a_memory_in_python_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"wasm_accessible\(\) must cover .* a guard of"):
        linmem.create(PAGE, guard=PAGE, creator=MappedCreator())


@requires("real_pages")
def test_a_base_that_moves_within_the_capacity_is_an_error():
    class Moves(MappedMemory):
        def grow_to(self, new_size):
            self.old, self.map = self.map, mmap.mmap(-1, self.capacity)
            self.size = new_size

    with linmem.create(PAGE, reserve=4 * PAGE, guard=0, creator=MappedCreator(Moves)) as mem:
        with pytest.raises(RuntimeError, match=r"grow_to\(\d+\) moved the base within its byte_capacity\(\)"):
            mem.grow_to(2 * PAGE)
        with pytest.raises(RuntimeError, match="the memory is lost"):
            mem.as_ptr()            # native code may hold the old address


@pytest.mark.parametrize("made", [None, 5, object()])
def test_an_object_that_is_not_a_memory_is_refused(made):
    class Creator:
        def new_memory(self, *arguments):
            return made

    with pytest.raises(TypeError, match=r"Creator\.new_memory\(\) must return a LinearMemory"):
        linmem.create(1, creator=Creator())


class Hands:
    """Passes on native memories that the test's `make` creates."""

    def __init__(self, make):
        self.make = make

    def new_memory(self, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes):
        return self.make(minimum)


def test_a_native_memory_handed_on_is_the_same_memory():
    kept = []

    def make(minimum):
        kept.append(linmem.create(minimum, reserve=8 * PAGE))
        return kept[-1]

    limit = limiting(4 * PAGE, linmem.PythonCreator(Hands(make)))
    mem = limit.create(PAGE)
    assert mem.as_ptr() == kept[0].as_ptr()
    assert mem.info().kind == "mmap"
    mem[0] = 5
    assert kept[0][0] == 5
    kept[0].grow_to(2 * PAGE)           # a growth through any handle is charged to the budget
    assert (mem.byte_size(), limit.used_bytes) == (2 * PAGE, 2 * PAGE)
    mem.close()
    assert limit.used_bytes == 2 * PAGE
    kept[0].close()
    assert limit.used_bytes == 0


def test_a_native_memory_handed_on_keeps_the_maximum_and_the_sharing_asked_for():
    creator = linmem.PythonCreator(Hands(lambda minimum: linmem.create(minimum, reserve=0)))
    with creator.create(PAGE, maximum=2 * PAGE) as mem:
        assert mem.maximum_byte_size() == 2 * PAGE
        with pytest.raises(linmem.GrowError):
            mem.grow_to(3 * PAGE)
    ty = linmem.MemoryType(PAGE, 9 * PAGE, is_shared=True, page_size=1)
    with creator.new_memory(ty, PAGE, 9 * PAGE, None, 0) as mem, pytest.raises(linmem.GrowError, match="shared"):
        mem.grow_to(2 * PAGE)


@pytest.mark.parametrize(("make", "asked", "message"), [
    (lambda minimum: linmem.create(minimum + 1), {}, "must return a memory of"),
    (lambda minimum: linmem.create(minimum, reserve=0), {"reserve": 10 * PAGE}, "with a reservation of"),
    (lambda minimum: linmem.create(minimum, guard=0), {"guard": 2 * PAGE}, "a guard of"),
])
def test_a_native_memory_that_is_not_what_was_asked_for_is_refused(make, asked, message):
    with pytest.raises(ValueError, match=message):
        linmem.create(PAGE, creator=Hands(make), **asked)


def test_a_native_memory_cannot_be_handed_on_twice_not_even_when_its_taker_is_gone():
    one = linmem.create(PAGE)
    creator = limiting(100 * PAGE, linmem.PythonCreator(Hands(lambda minimum: one)))
    with creator.create(PAGE) as taken:
        taken[0] = 1
        with pytest.raises(ValueError, match="returned a memory that it has returned before"):
            creator.create(PAGE)
    with pytest.raises(ValueError, match="returned a memory that it has returned before"):
        creator.create(PAGE)
    assert creator.used_bytes == PAGE       # the maker still holds this memory
    one.close()
    assert creator.used_bytes == 0


def test_a_python_creator_may_have_another_one_upstream():
    def over(upstream):
        return linmem.PythonCreator(Hands(upstream.create))

    native = linmem.MmapCreator()
    with over(over(over(native))).create(PAGE) as mem:
        assert mem.info().kind == "mmap"
        mem[0] = 1
    with over(over(native)).create(PAGE) as mem:
        assert mem[0] == 0


class MovingMemory(MappedMemory):
    """Keeps its bytes in a map. Each growth past the capacity replaces the map with another map."""

    during_growth = staticmethod(lambda: None)

    def grow_to(self, new_size):
        self.during_growth()
        if new_size > self.capacity:
            # The old and the new map exist at the same time, so the addresses differ.
            other = mmap.mmap(-1, new_size)
            other[:self.size] = self.map[:self.size]
            self.old, self.map, self.capacity = self.map, other, new_size
        self.size = new_size


@requires("real_pages")
def test_a_memory_in_python_moves_only_without_exported_pointers():
    creator = MappedCreator(MovingMemory)
    with linmem.create(PAGE, guard=0, reserve=0, may_move=True, creator=creator) as mem:
        base = mem.as_ptr()
        mem[3] = 7
        with memoryview(mem) as view:
            with pytest.raises(BufferError, match="1 exported"):
                mem.grow_to(2 * PAGE)
            assert (len(mem), mem.as_ptr(), view[3]) == (PAGE, base, 7)
        mem.grow_to(2 * PAGE)
        assert (len(mem), mem[3]) == (2 * PAGE, 7)
        assert mem.as_ptr() != base


@requires("real_pages")
def test_an_export_waits_for_a_memory_in_python_that_is_moving():
    creator = MappedCreator(MovingMemory)
    with linmem.create(PAGE, guard=0, reserve=0, may_move=True, creator=creator) as mem:
        seen, moving = [], threading.Event()

        def export():
            moving.wait(30)
            with memoryview(mem) as view:
                seen.append((len(view), ctypes.addressof(ctypes.c_char.from_buffer(view))))

        def during():
            moving.set()
            thread.join(0.05)           # the other thread runs, but its export must wait
            assert seen == []

        creator.made[0]().during_growth = during
        thread = threading.Thread(target=export)
        thread.start()
        mem.grow_to(2 * PAGE)
        thread.join(30)
        assert seen == [(2 * PAGE, mem.as_ptr())]


@requires("real_pages")
def test_a_shared_memory_in_python_never_moves():
    creator = linmem.PythonCreator(MappedCreator(MovingMemory))
    ty = linmem.MemoryType(1, is_shared=True)
    with creator.new_memory(ty, PAGE, None, 0, 0) as mem:
        with pytest.raises(linmem.GrowError, match="shared memories never do"):
            mem.grow_to(2 * PAGE)
        assert len(mem) == PAGE


@requires("real_pages")
def test_a_memory_in_python_may_know_a_smaller_maximum_of_its_own():
    class Bounded(MappedMemory):
        def maximum_byte_size(self):
            return 2 * PAGE

    with linmem.create(PAGE, maximum=8 * PAGE, reserve=4 * PAGE, guard=0, creator=MappedCreator(Bounded)) as mem:
        assert mem.maximum_byte_size() == 2 * PAGE
        with pytest.raises(linmem.GrowError, match=rf"maximum_byte_size\(\) \({2 * PAGE}\)"):
            mem.grow_to(3 * PAGE)


@pytest.mark.parametrize("kind", [linmem.MmapCreator, linmem.LimitingCreator, linmem.StatisticsCreator,
                                  linmem.CallbackCreator, linmem.RoutingCreator, linmem.PythonCreator])
def test_a_native_creator_cannot_be_subclassed_in_python_because_overrides_would_be_ignored(kind):
    with pytest.raises(TypeError, match="not an acceptable base type"):
        type("Sub", (kind,), {})


# -- the factory ---------------------------------------------------------------------------------------

def test_the_factory_makes_each_kind_by_name():
    assert type(linmem.creator()) is type(linmem.creator("mmap")) is linmem.MmapCreator
    limit = linmem.creator("limiting", limit_bytes=5 * PAGE)
    assert (type(limit), type(limit.upstream)) == (linmem.LimitingCreator, linmem.MmapCreator)
    assert linmem.creator("statistics", upstream=limit).upstream is limit
    wrapped = linmem.creator("statistics", upstream=Hands(linmem.create)).upstream
    assert isinstance(wrapped, linmem.PythonCreator)
    with linmem.create(1, creator=limit) as mem:
        assert (len(mem), limit.used_bytes) == (1, round_up(1))
