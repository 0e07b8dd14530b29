"""A pool hands out the same memories repeatedly, and each time they are like new memories."""

import ctypes
import errno
import gc
import itertools
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import (
    HALF_CREATOR,
    NEEDS,
    PAGE,
    SCAN_WAYS,
    TOUCH,
    accessible_parts,
    answer,
    build_extension,
    check_fresh,
    dies_at,
    failing,
    fewer_examples,
    is_mapped,
    live_bytes,
    load_extension,
    mappings,
    requires,
    resident_within,
    round_up,
    scanning,
    smaps,
    whole,
)

import linmem
from linmem._os import pages

MMAP = linmem.MmapCreator()
SHAPE = {"maximum": 32 * PAGE, "reserve": 32 * PAGE, "guard": PAGE}
RESETS = [pytest.param("scan", marks=requires("scans")), "zero", "discard", "adaptive"]
# Each kind of reset with each way to find touched pages, if the reset uses that way.
HOW = [(reset, way) for reset in ("adaptive", "scan") for way in sorted(SCAN_WAYS)]
HOW += [(reset, None) for reset in ("adaptive", "zero", "discard")]


def live():
    return live_bytes() if NEEDS["maps"][0] else 0


def idle(pool):
    stats = pool.stats()
    return stats["warm"] + stats["cold"]


@pytest.mark.parametrize("reset", RESETS)
def test_bytes_that_a_system_call_wrote_into_a_memory_are_also_reset(reset, tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(b"\xab" * 40 * PAGE)
    pool = linmem.PoolingCreator(reset=reset, check=True)
    for at in (0, 3 * PAGE + 1, 200 * PAGE):
        with pool.create(256 * PAGE) as mem, path.open("rb", buffering=0) as file:
            assert mem[:] == bytes(len(mem))
            assert file.readinto(memoryview(mem)[at:]) == 40 * PAGE
            assert mem[at:at + 40 * PAGE] == path.read_bytes()
    stats = pool.stats()
    assert (stats["misses"], stats["rejected"], sum(stats["resets"].values())) == (1, 0, 3)


# -- the face ------------------------------------------------------------------------------------------

def test_a_pool_needs_no_option_and_has_the_figures_promised():
    pool = linmem.PoolingCreator()
    with pool.create(PAGE, **SHAPE) as mem:
        check_fresh(mem, PAGE)
        stats, reserved = pool.stats(), mem.info().reserved
    bound = stats.pop("slots")
    assert bound >= 1
    if "vm.max_map_count" in pages.describe()["limits"]:
        assert bound == pages.describe()["limits"]["vm.max_map_count"] // 2 // 3
    assert stats.pop("resident_bound") > 0
    assert stats.pop("reserved") == reserved
    assert stats == {"live": 1, "warm": 0, "cold": 0, "pinned": 0, "hits": 0, "misses": 1, "fallbacks": 0,
                     "rejected": 0, "resets": {"scan": 0, "zero": 0, "discard": 0}, "resident": 0}
    assert isinstance(pool, linmem.MemoryCreator)
    assert isinstance(pool.upstream, linmem.MmapCreator)


def test_a_pool_is_made_by_the_factory_over_any_creator():
    class Mine(linmem.MemoryCreator):
        def new_memory(self, *arguments):
            return MMAP.new_memory(*arguments)

    pool = linmem.creator("pool", upstream=Mine(), slots=7)
    assert isinstance(pool, linmem.PoolingCreator)
    assert isinstance(pool.upstream, linmem.PythonCreator)
    assert pool.stats()["slots"] == 7
    assert linmem.creator("pool").stats().keys() == pool.stats().keys()


def test_a_pool_shows_its_upstream():
    assert repr(linmem.PoolingCreator(slots=5)) == "PoolingCreator(MmapCreator(), slots=5)"


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"slots": 0}, ValueError, "slots must be >= 1, got 0"),
    ({"slots": -1}, ValueError, "slots must be >= "),
    ({"slots": "many"}, TypeError, "slots must be an integer"),
    ({"slots": 1.0}, TypeError, "slots must be an integer"),
    ({"slots": 2**64}, OverflowError, r"slots must be below 2\*\*64"),
    ({"keep_resident": -1}, ValueError, "keep_resident must be >= 0, got -1"),
    ({"keep_resident": None}, TypeError, "keep_resident must be an integer"),
    ({"max_unused_warm": -5}, ValueError, "max_unused_warm must be >= 0, got -5"),
    ({"max_unused_warm": "all"}, TypeError, "max_unused_warm must be an integer"),
    ({"reset": "memset"}, ValueError, "reset must be one of .*'scan'.*got 'memset'"),
    ({"reset": None}, (TypeError, ValueError), "reset must be one of .*got None"),
    ({"reset": []}, (TypeError, ValueError), r"reset must be one of .*got \[\]"),
    ({"when_full": "queue"}, ValueError, "when_full must be one of 'fallback', 'error', 'wait', got 'queue'"),
    ({"check": 1}, TypeError, "check must be True or False, got 1"),
    ({"upstream": "mmap"}, TypeError, "upstream"),
    ({"warm": 3}, TypeError, "warm"),
])
def test_an_option_that_cannot_be_is_refused_by_its_name_value_and_bound(options, error, words):
    with pytest.raises(error, match=words):
        linmem.PoolingCreator(**options)


def test_options_are_keywords():
    with pytest.raises(TypeError, match="at most 1 arguments without a name, got 2"):
        linmem.PoolingCreator(MMAP, 5)


def test_to_scan_where_pages_cannot_be_scanned_is_refused():
    with scanning(None), pytest.raises(ValueError, match="reset must not be 'scan' here"):
        linmem.PoolingCreator(reset="scan")


@pytest.mark.parametrize(("call", "error", "words"), [
    (lambda pool: pool.trim(-1), ValueError, "target must be >= 0, got -1"),
    (lambda pool: pool.trim(None), TypeError, "target must be an integer"),
    (lambda pool: pool.warm(-1, linmem.MemoryType(1)), ValueError, "n must be >= 0, got -1"),
    (lambda pool: pool.warm("x", linmem.MemoryType(1)), TypeError, "n must be an integer"),
    (lambda pool: pool.warm(9, linmem.MemoryType(1)), ValueError, r"n must be <= .*8.*got 9"),
    (lambda pool: pool.warm(2**64 - 1, linmem.MemoryType(1)), ValueError, r"n must be <= "),
    (lambda pool: pool.warm(1, 65536), TypeError, "ty must be a MemoryType, got int"),
    (lambda pool: pool.warm(1, linmem.MemoryType(1), reserved_size_in_bytes=-1), ValueError, "reserved_size_in_bytes"),
    (lambda pool: pool.warm(1, linmem.MemoryType(1), guard_size_in_bytes=1), ValueError, "guard_size_in_bytes must be"),
    (lambda pool: pool.warm(1, linmem.MemoryType(2**60)), OverflowError, "minimum"),
    (lambda pool: pool.create(2, 1), ValueError, "minimum must be <= maximum"),
])
def test_an_impossible_argument_is_refused_without_a_leak(call, error, words):
    pool = linmem.PoolingCreator(slots=8)
    before = pool.stats()
    with pytest.raises(error, match=words):
        call(pool)
    assert pool.stats() == before
    pool.create(PAGE, **SHAPE).close()
    assert pool.stats()["warm"] == 1


def test_a_pool_error_gives_the_bound_and_can_be_pickled():
    pool = linmem.PoolingCreator(slots=2, when_full="error")
    mems = [pool.create(PAGE, **SHAPE) for _ in range(2)]
    with pytest.raises(linmem.PoolError) as caught:
        pool.create(PAGE, **SHAPE)
    assert isinstance(caught.value, linmem.GrowError)
    assert caught.value.slots == 2
    assert "2" in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again), again.slots) == (linmem.PoolError, str(caught.value), 2)
    assert pool.stats()["live"] == 2
    mems.pop().close()
    with pool.create(PAGE, **SHAPE) as mem:
        check_fresh(mem, PAGE)


# -- reuse of slots by shape -----------------------------------------------------------------------------

def test_the_slot_given_back_last_is_handed_out_first():
    pool = linmem.PoolingCreator()
    mems = [pool.create(PAGE, **SHAPE) for _ in range(3)]
    bases = [mem.as_ptr() for mem in mems]
    assert len(set(bases)) == 3
    for i in (1, 0, 2):
        mems[i].close()
    assert pool.stats()["warm"] == 3
    again = [pool.create(PAGE, **SHAPE) for _ in range(3)]
    assert [mem.as_ptr() for mem in again] == [bases[i] for i in (2, 0, 1)]
    stats = pool.stats()
    assert (stats["hits"], stats["misses"], stats["live"], stats["warm"]) == (3, 3, 3, 0)


REQUEST = {"ty": linmem.MemoryType(1, 8), "minimum": PAGE, "maximum": 16 * PAGE,
           "reserved_size_in_bytes": 16 * PAGE, "guard_size_in_bytes": PAGE}


@pytest.mark.parametrize("other", [
    {"minimum": 2 * PAGE}, {"minimum": PAGE - 1}, {"minimum": 0}, {"maximum": 15 * PAGE}, {"maximum": None},
    {"reserved_size_in_bytes": 17 * PAGE}, {"reserved_size_in_bytes": None}, {"guard_size_in_bytes": 2 * PAGE},
    {"guard_size_in_bytes": 0}, {"ty": linmem.MemoryType(1, 8, is_shared=True)},
], ids=lambda other: "-".join(f"{name}={value}" for name, value in other.items()))
def test_a_request_of_another_shape_gets_another_slot(other):
    pool = linmem.PoolingCreator()
    first = pool.new_memory(**REQUEST)
    base = first.as_ptr()
    first.close()
    with pool.new_memory(**{**REQUEST, **other}) as mem:
        assert mem.as_ptr() != base
        check_fresh(mem, other.get("minimum", PAGE))
        assert mem.maximum_byte_size() == other.get("maximum", 16 * PAGE)
        assert mem.info().guard >= other.get("guard_size_in_bytes", PAGE)
    stats = pool.stats()
    assert (stats["hits"], stats["misses"], stats["warm"]) == (0, 2, 2)
    with pool.new_memory(**REQUEST) as mem:
        assert mem.as_ptr() == base


def test_create_and_new_memory_share_slots_of_one_shape():
    pool = linmem.PoolingCreator()
    pool.new_memory(linmem.MemoryType(PAGE, 8 * PAGE, is_64=True, page_size=1), PAGE, 8 * PAGE, 8 * PAGE, PAGE).close()
    pool.create(PAGE, 8 * PAGE, 8 * PAGE, PAGE).close()
    assert pool.stats()["hits"] == 1


def test_a_reused_memory_gives_the_same_answers_as_a_new_memory():
    pool = linmem.PoolingCreator()
    mem = pool.create(PAGE + 5, **SHAPE)
    first, span = mem.info(), mem.wasm_accessible()
    mem.grow_to(20 * PAGE)
    mem.write(0, b"x" * 20 * PAGE)
    mem.close()
    with pool.create(PAGE + 5, **SHAPE) as mem:
        again = mem.info()
        assert mem.wasm_accessible() == span
        for name in ("base", "byte_size", "byte_capacity", "maximum_byte_size", "reserved", "committed", "pre_guard",
                     "guard", "exports", "kind", "owner"):
            assert getattr(again, name) == getattr(first, name)
        with pytest.raises(linmem.GrowError):
            mem.grow_to(33 * PAGE)
        mem.grow_to(32 * PAGE)


def test_two_live_memories_of_one_pool_are_always_distinct():
    pool = linmem.PoolingCreator()
    for _ in range(3):
        mems = [pool.create(PAGE, **SHAPE) for _ in range(10)]
        ends = sorted(whole(mem) for mem in mems)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
        for i, mem in enumerate(mems):
            mem.write(0, bytes([i + 1]) * PAGE)
        for i, mem in enumerate(mems):
            assert bytes(mem) == bytes([i + 1]) * PAGE
            mem.close()


# -- isolation between users -----------------------------------------------------------------------------------

def use_all(mem, history):
    """Applies one user's history. Returns whether the memory has moved, because a moved memory does not return to the
    pool."""
    base, capacity = mem.as_ptr(), mem.byte_capacity()
    state = {}
    for use in history:
        apply(mem, use, state)
    return (mem.as_ptr(), mem.byte_capacity()) != (base, capacity)


def apply(mem, use, state):
    """Applies one step of a user. `state` records conditions that exclude later steps: protected pages cannot be
    written."""
    name, a, b = use
    size = mem.byte_size()
    info = mem.info()
    if name == "grow":
        try:
            mem.grow_to(size + a % (12 * PAGE))
        except linmem.GrowError:
            pass
    # a moved memory has room for all further growths of this test
    elif name == "outgrow" and info.byte_capacity < 1 << 24:
        try:
            mem.grow_to(info.byte_capacity + 1 + b)
        except linmem.GrowError:
            pass
    elif name == "protect" and size >= PAGE:
        first = a % (size // PAGE)
        mem.protect(first * PAGE, (1 + b % (size // PAGE - first)) * PAGE, ("none", "r")[b % 2])
        state["protected"] = True
    elif name == "discard" and state.get("protected"):
        if NEEDS["discard_any_protection"][0]:
            mem.discard(0, size // PAGE * PAGE)
    elif name == "discard":
        at = a % (size + 1)
        mem.discard(at, b % (size - at + 1))
    elif state.get("protected"):
        return
    elif name == "write" and size:
        at = a % size
        mem.write(at, bytes([1 + b % 255]) * min(size - at, 1 + b))
    elif name == "fill":
        mem.write(0, b"\xff" * size)
    elif name == "scatter":
        for page in range(a % 3, size // PAGE, 3):
            mem[page * PAGE + b % PAGE] = 255
    elif name == "prefault":
        mem.prefault()
    elif name == "past the size":
        ctypes.memset(info.base + size, 0xA5, info.committed - size)
    elif name == "read":
        bytes(mem)


USES = st.tuples(st.sampled_from(["grow", "grow", "outgrow", "protect", "discard", "write", "write", "fill", "scatter",
                                  "prefault", "past the size", "read"]),
                 st.integers(0, 2**20), st.integers(0, 2**14))
SHAPES = [
    {"minimum": 0, "maximum": 8 * PAGE, "reserve": 8 * PAGE, "guard": PAGE},
    {"minimum": 1, "reserve": 8 * PAGE, "guard": 0},
    {"minimum": PAGE, "maximum": 16 * PAGE, "reserve": 16 * PAGE, "guard": PAGE},
    {"minimum": 3 * PAGE + 5, "maximum": 64 * PAGE, "guard": 4 * PAGE},
    {"minimum": 20 * PAGE, "maximum": 20 * PAGE},
    {"minimum": 2 * PAGE, "reserve": 4 * PAGE, "guard": PAGE},
]


@pytest.mark.parametrize(("reset", "way"), HOW)
@fewer_examples(5)
@given(users=st.lists(st.tuples(st.sampled_from(SHAPES), st.lists(USES, max_size=6)), min_size=2, max_size=12),
       check=st.booleans(), warm=st.sampled_from([0, 1, 100]), keep=st.sampled_from([0, 3 * PAGE, 64 << 20]))
def test_after_any_user_the_next_user_gets_a_memory_like_new(reset, way, users, check, warm, keep):
    start = live()
    with scanning(way):
        pool = linmem.PoolingCreator(reset=reset, check=check, max_unused_warm=warm, keep_resident=keep)
        bases, uses = {}, 0
        for shape, history in users:
            with pool.create(**shape, may_move=True) as mem:
                check_fresh(mem, shape["minimum"])
                assert mem.as_ptr() == bases.get(id(shape), mem.as_ptr())
                bases[id(shape)] = mem.as_ptr()
                if use_all(mem, history):
                    del bases[id(shape)]
                else:
                    uses += 1
        stats = pool.stats()
        assert stats["rejected"] == stats["live"] == stats["pinned"] == stats["fallbacks"] == 0
        assert stats["hits"] + stats["misses"] == len(users)
        assert stats["warm"] + stats["cold"] == len(bases)
        assert stats["warm"] <= warm
        assert sum(stats["resets"].values()) == uses
        assert stats["resident"] <= min(stats["resident_bound"], keep * len(bases))
        del pool
    assert live() == start


class Pool(RuleBasedStateMachine):
    """Several live memories of several shapes from one small pool. Bytearrays are the model."""

    @initialize(how=st.sampled_from(HOW),
                check=st.booleans(), slots=st.sampled_from([3, 100]), warm=st.sampled_from([0, 2, 100]),
                full=st.sampled_from(["fallback", "error"]))
    def make(self, how, check, slots, warm, full):
        reset, way = how
        self.start = live()
        self.before = pages.choose_scan(way)
        self.limit = linmem.LimitingCreator(MMAP, 1 << 40)
        self.pool = linmem.PoolingCreator(self.limit, reset=reset, check=check, slots=slots, max_unused_warm=warm,
                                          when_full=full)
        self.full = full
        self.alive = []         # [memory, model, views]
        self.made = 0

    @rule(shape=st.sampled_from(SHAPES))
    def create(self, shape):
        before = self.pool.stats()
        try:
            mem = self.pool.create(**shape)
        except linmem.PoolError:
            assert self.full == "error"
            assert before["live"] == before["slots"]
            assert self.pool.stats() == before
            return
        check_fresh(mem, shape["minimum"])
        after = self.pool.stats()
        fell = after["fallbacks"] - before["fallbacks"]
        assert fell == int(before["live"] == before["slots"])
        assert after["hits"] + after["misses"] - before["hits"] - before["misses"] == 1 - fell
        self.made += 1
        self.alive.append([mem, bytearray(shape["minimum"]), []])

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 99), at=st.integers(0, 2**20), data=st.binary(min_size=1, max_size=3 * PAGE))
    def write(self, which, at, data):
        mem, model, _ = self.alive[which % len(self.alive)]
        if model:
            at %= len(model)
            data = data[:len(model) - at]
            mem.write(at, data)
            model[at:at + len(data)] = data

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 99), by=st.integers(0, 9 * PAGE))
    def grow(self, which, by):
        mem, model, _ = self.alive[which % len(self.alive)]
        try:
            mem.grow_to(len(model) + by)
        except (linmem.GrowError, BufferError):
            return
        model.extend(bytes(by))

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 99), at=st.integers(0, 2**20))
    def discard(self, which, at):
        mem, model, _ = self.alive[which % len(self.alive)]
        at %= len(model) + 1
        mem.discard(at)
        model[at:] = bytes(len(model) - at)

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 99))
    def scribble_past_the_size(self, which):
        mem, model, _ = self.alive[which % len(self.alive)]
        info = mem.info()
        ctypes.memset(info.base + len(model), 0xA5, info.committed - len(model))

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 99))
    def view(self, which):
        mem, _, views = self.alive[which % len(self.alive)]
        if len(views) < 2:
            views.append(memoryview(mem))

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 99))
    def drop(self, which):
        mem, model, views = self.alive.pop(which % len(self.alive))
        before = self.pool.stats()
        if views:
            del mem
            last = views.pop()
            views.clear()
            assert last.tobytes() == model[:len(last)]
            assert idle(self.pool) == before["warm"] + before["cold"], "handed back under a view"
            last.release()
        else:
            mem.close()

    @rule(most=st.sampled_from([0, PAGE, 10 * PAGE, 1 << 40]))
    def trim(self, most):
        before = self.pool.stats()
        released = self.pool.trim(most)
        after = self.pool.stats()
        assert released == before["resident"] - after["resident"]
        assert after["cold"] == 0
        assert after["resident"] <= most or after["warm"] == 0
        assert most or after["warm"] == 0
        assert after["live"] == before["live"]

    @rule(n=st.integers(0, 3))
    def warm(self, n):
        ty = linmem.MemoryType(1, 2)
        how = {"reserved_size_in_bytes": 1 << 18, "guard_size_in_bytes": round_up(65536)}
        before = self.pool.stats()
        try:
            made = self.pool.warm(n, ty, **how)
        except linmem.PoolError:
            assert before["live"] + n > before["slots"]
            return
        assert 0 <= made <= n
        assert self.pool.warm(n, ty, **how) == 0
        assert idle(self.pool) >= n

    @invariant()
    def every_memory_has_its_own_bytes_and_its_own_map(self):
        if not hasattr(self, "pool"):
            return
        for mem, model, _ in self.alive:
            assert bytes(mem) == model
            if NEEDS["regions"][0]:
                end = round_up(len(model))
                assert accessible_parts(mem) == ([(0, end, "rw-p")] if end else [])
        spans = sorted(whole(mem) for mem, _, _ in self.alive)
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        stats = self.pool.stats()
        assert stats["live"] <= len(self.alive) <= stats["live"] + stats["fallbacks"]
        assert stats["live"] + stats["warm"] + stats["cold"] <= stats["slots"]
        assert stats["resident"] <= stats["resident_bound"]
        assert stats["rejected"] == stats["pinned"] == 0
        assert sum(mem.info().committed for mem, _, _ in self.alive) <= self.limit.used_bytes

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        for mem, model, views in self.alive:
            assert bytes(mem) == model
            views.clear()
            del mem
        self.alive.clear()
        gc.collect()
        assert self.pool.stats()["live"] == 0
        self.pool.trim()
        stats = self.pool.stats()
        assert (stats["warm"], stats["cold"], stats["resident"]) == (0, 0, 0)
        assert self.limit.used_bytes == 0
        assert live() == self.start
        pages.choose_scan(self.before)


TestPool = Pool.TestCase
TestPool.settings = fewer_examples(5)

REUSED = f"""{TOUCH}
import linmem
P = {PAGE}
how = dict(maximum=32 * P, reserve=32 * P, guard=4 * P)
pool = linmem.PoolingCreator()
mem = pool.create(2 * P, **how)
base = mem.as_ptr()
mem.grow_to(32 * P)
mem.write(0, b"x" * 32 * P)
mem.close()
mem = pool.create(2 * P, **how)
assert mem.as_ptr() == base and pool.stats()["hits"] == 1
assert ctypes.string_at(base, 2 * P) == bytes(2 * P)
ctypes.memset(base, 1, 2 * P)
"""


@pytest.mark.parametrize("fatal", [
    "peek(base + 2 * P)", "poke(base + 2 * P)", "peek(base + 31 * P)", "peek(base + 32 * P)",
    "poke(base + 36 * P - 1)", "peek(base - 1)", "poke(base - 4 * P)",
])
def test_an_access_beyond_the_minimum_or_in_a_guard_of_a_reused_memory_is_a_fault(fatal):
    dies_at(REUSED, fatal)


@pytest.mark.parametrize("warm", [0, 100])
def test_an_access_to_an_idle_slot_past_the_minimum_is_a_fault(warm):
    dies_at(REUSED.replace("PoolingCreator()", f"PoolingCreator(max_unused_warm={warm})") + "mem.close()",
            "peek(base + 2 * P)")


@pytest.mark.parametrize("larger", [3, 11, 32])
def test_a_slot_whose_user_grew_over_all_kept_pages_is_kept(larger):
    pool = linmem.PoolingCreator(reset="zero", keep_resident=4 * PAGE)
    for uses, pages_used in enumerate((3, larger, 3, larger)):
        with pool.create(PAGE, **SHAPE) as mem:
            check_fresh(mem, PAGE)
            mem.grow_to(pages_used * PAGE)
            mem.write(0, b"x" * pages_used * PAGE)
        stats = pool.stats()
        assert (stats["hits"], stats["rejected"], stats["warm"]) == (uses, 0, 1)


def test_a_slot_that_its_user_moved_is_discarded():
    pool = linmem.PoolingCreator()
    start = live()
    mem = pool.create(PAGE, reserve=4 * PAGE, may_move=True)
    base = mem.as_ptr()
    mem.grow_to(64 * PAGE)
    moved = mem.as_ptr()
    assert moved != base
    mem.write(0, b"x" * 64 * PAGE)
    mem.close()
    assert idle(pool) == 0
    assert live() == start
    with pool.create(PAGE, reserve=4 * PAGE) as mem:
        check_fresh(mem, PAGE)
        assert mem.byte_capacity() == 4 * PAGE
    assert pool.stats()["hits"] == 0


# -- references to a slot -------------------------------------------------------------------------------------

def test_a_slot_is_not_reused_while_a_buffer_points_into_it():
    pool = linmem.PoolingCreator()
    mem = pool.create(PAGE, **SHAPE)
    mem[0] = 7
    base = mem.as_ptr()
    view = memoryview(mem)
    with pytest.raises(BufferError, match="1 exported"):
        mem.close()
    del mem
    gc.collect()
    assert (pool.stats()["live"], idle(pool)) == (1, 0)
    with pool.create(PAGE, **SHAPE) as other:
        assert other.as_ptr() != base
        assert other[0] == 0
    assert view[0] == 7
    view.release()
    del view
    gc.collect()
    assert pool.stats()["live"] == 0
    mems = [pool.create(PAGE, **SHAPE) for _ in range(2)]
    assert mems[0].as_ptr() == base
    for mem in mems:
        check_fresh(mem, PAGE)


def test_a_typed_view_and_a_slice_of_it_pin_as_well():
    pool = linmem.PoolingCreator()
    view = pool.create(PAGE, **SHAPE).view("<u4", offset=4, count=8)
    part = view[2:4]
    del view
    gc.collect()
    assert idle(pool) == 0
    del part
    gc.collect()
    assert idle(pool) == 1


def test_the_end_of_a_creator_releases_idle_slots_and_leaves_live_memories():
    start = live()
    pool = linmem.PoolingCreator()
    mem = pool.create(PAGE, **SHAPE)
    gone = pool.create(PAGE, **SHAPE)
    gone_at = gone.as_ptr()
    mem[5] = 9
    gone.close()
    del pool
    gc.collect()
    if NEEDS["regions"][0]:
        assert not is_mapped(gone_at)
    mem.grow_to(20 * PAGE)
    assert mem[5] == 9
    view = memoryview(mem)
    base = mem.as_ptr()
    del mem
    assert view[5] == 9
    view.release()
    del view
    gc.collect()
    if NEEDS["regions"][0]:
        assert not is_mapped(base)
    assert live() == start


# -- bounds --------------------------------------------------------------------------------------------------------

def test_beyond_its_slots_a_pool_falls_back_to_upstream():
    pool = linmem.PoolingCreator(slots=2)
    mems = [pool.create(PAGE, **SHAPE) for _ in range(5)]
    stats = pool.stats()
    assert (stats["slots"], stats["live"], stats["fallbacks"], stats["misses"]) == (2, 2, 3, 2)
    for mem in mems:
        check_fresh(mem, PAGE)
        mem.write(0, b"x" * PAGE)
    for mem in mems[2:]:
        base = mem.as_ptr()
        mem.close()
        if NEEDS["regions"][0]:
            assert not is_mapped(base)      # the memory has no slot, so its close releases it
    assert idle(pool) == 0
    for mem in mems[:2]:
        mem.close()
    assert idle(pool) == 2


@pytest.mark.parametrize("full", ["fallback", "error"])
def test_an_idle_slot_of_another_shape_makes_room(full):
    pool = linmem.PoolingCreator(slots=2, when_full=full)
    old, new = pool.create(PAGE, **SHAPE), pool.create(PAGE, **SHAPE)
    bases = old.as_ptr(), new.as_ptr()
    old.close()
    new.close()
    with pool.create(2 * PAGE, **SHAPE) as mem:
        check_fresh(mem, 2 * PAGE)
        stats = pool.stats()
        assert (stats["live"], stats["warm"] + stats["cold"], stats["fallbacks"]) == (1, 1, 0)
    assert pool.create(PAGE, **SHAPE).as_ptr() == bases[1]  # the slot that was unused for the longest time is released
    assert (pool.stats()["hits"], pool.stats()["misses"]) == (1, 3)


def test_a_small_pool_never_holds_more_mappings_than_its_slots_take():
    pool = linmem.PoolingCreator(slots=4)
    start = len(mappings()) if NEEDS["maps"][0] else 0
    for i in range(10000):
        pool.create(PAGE * (1 + i % 7), **SHAPE).close()
        if NEEDS["maps"][0] and i % 500 == 0:
            assert len(mappings()) <= start + 4 * 3
    assert idle(pool) == 4


def test_a_thousand_shapes_stay_within_the_bounds():
    pool = linmem.PoolingCreator(slots=60, max_unused_warm=10)
    start = live()
    for i in range(1000):
        with pool.create(PAGE + i, **SHAPE) as mem:
            mem.write(0, b"x" * len(mem))
    stats = pool.stats()
    assert (stats["warm"], stats["warm"] + stats["cold"], stats["misses"]) == (10, 60, 1000)
    pool.create(PAGE + 999, **SHAPE).close()
    assert pool.stats()["hits"] == 1
    pool.trim()
    assert idle(pool) == 0
    assert live() == start


@requires("mallinfo")
def test_shapes_that_are_no_longer_used_leave_no_bookkeeping_behind():
    class Malloc(ctypes.Structure):
        _fields_ = [(name, ctypes.c_size_t) for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

    mallinfo2 = ctypes.PyDLL(None).mallinfo2
    mallinfo2.restype = Malloc

    def round_of_shapes(start):
        for i in range(start, start + 2000):
            pool.create(i, **SHAPE).close()
        gc.collect()
        return mallinfo2().uordblks

    pool = linmem.PoolingCreator(slots=16)
    first = round_of_shapes(0)
    # A slot and its groups take over 1000 bytes. If 10000 of them stayed, they would take many times the bound.
    assert max(round_of_shapes(2000 * n) for n in range(1, 6)) < first + 500_000


# -- warm, cold, resident ------------------------------------------------------------------------------------------

def written(pool, pages_written, minimum=8):
    """Uses a memory of the pool and writes its first pages. Returns ((start, end) of its reservation, base)."""
    with pool.create(minimum * PAGE, **SHAPE) as mem:
        mem.write(0, b"x" * pages_written * PAGE)
        return whole(mem), mem.as_ptr()


@requires("smaps")
@pytest.mark.parametrize("reset", RESETS)
def test_a_warm_slot_keeps_its_pages_resident_also_those_beyond_the_minimum(reset):
    pool = linmem.PoolingCreator(reset=reset)
    with pool.create(8 * PAGE, **SHAPE) as mem:
        mem.grow_to(24 * PAGE)
        mem.write(0, b"x" * 6 * PAGE)
        mem.write(20 * PAGE, b"x" * 2 * PAGE)
        (start, end), base = whole(mem), mem.as_ptr()
    stats = pool.stats()
    assert sum(stats["resets"].values()) == 1
    (kind,) = (kind for kind, n in stats["resets"].items() if n)
    kept = {"scan": 8 * PAGE, "zero": 24 * PAGE, "discard": 0}[kind]
    assert reset in (kind, "adaptive")
    assert resident_within(start, end) == kept <= stats["resident"]
    assert (stats["warm"], stats["cold"]) == (1, 0)
    accessible = [m for m in smaps(start, end) if m.access != "---p"]
    assert [(m.start, m.end) for m in accessible] == [(base, base + 8 * PAGE)]
    assert accessible[0].figures["Rss"] == {"scan": 6 * PAGE, "zero": 8 * PAGE, "discard": 0}[kind]
    with pool.create(8 * PAGE, **SHAPE) as mem:
        assert mem.as_ptr() == base
        mem.grow_to(24 * PAGE)
        assert resident_within(start, end) == kept
        assert bytes(mem).count(0) == 24 * PAGE


@requires("maps")
@pytest.mark.parametrize("reset", RESETS)
def test_a_slot_with_more_than_keep_resident_gives_all_its_pages_back(reset):
    pool = linmem.PoolingCreator(reset=reset, keep_resident=4 * PAGE)
    (start, end), base = written(pool, 5)
    stats = pool.stats()
    assert resident_within(start, end) == 0 == stats["resident"]
    assert (stats["warm"], stats["resets"]) == (1, {"scan": 0, "zero": 0, "discard": 1})
    with pool.create(8 * PAGE, **SHAPE) as mem:
        assert mem.as_ptr() == base
        check_fresh(mem, 8 * PAGE)


@requires("maps", "scans")
def test_hidden_pages_beyond_the_minimum_count_towards_keep_resident():
    pool = linmem.PoolingCreator(reset="scan", keep_resident=6 * PAGE)
    spans = set()
    for page in (1, 3, 5, 7, 9, 11, 13, 15, 17, 19):
        with pool.create(PAGE, **SHAPE) as mem:
            spans.add(whole(mem))
            mem.grow_to((page + 1) * PAGE)
            mem[page * PAGE] = 1
        (span,) = spans
        assert resident_within(*span) <= pool.stats()["resident"] <= 6 * PAGE


@requires("maps")
@pytest.mark.parametrize("reset", RESETS)
def test_idle_slots_beyond_max_unused_warm_become_cold_the_oldest_first(reset):
    pool = linmem.PoolingCreator(max_unused_warm=2, reset=reset)
    mems = [pool.create(8 * PAGE, **SHAPE) for _ in range(5)]
    spans = [whole(mem) for mem in mems]
    bases = [mem.as_ptr() for mem in mems]
    for mem in mems:
        mem.grow_to(12 * PAGE)
        mem.write(0, b"x" * 12 * PAGE)
    for mem in mems:
        mem.close()
    stats = pool.stats()
    assert (stats["warm"], stats["cold"], stats["live"]) == (2, 3, 0)
    for span in spans[:3]:
        assert resident_within(*span) == 0
        assert {m.access for m in mappings(*span)} == {"---p"}
        assert sum(m.size for m in mappings(*span)) == span[1] - span[0]
    warm = sum(resident_within(*span) for span in spans[3:])
    assert warm == {"discard": 0}.get(reset, 24 * PAGE)
    assert stats["resident"] == warm
    again = [pool.create(8 * PAGE, **SHAPE) for _ in range(5)]
    assert [mem.as_ptr() for mem in again[:2]] == [bases[4], bases[3]]
    assert sorted(mem.as_ptr() for mem in again) == sorted(bases)
    for mem in again:
        check_fresh(mem, 8 * PAGE)
        mem.grow_to(12 * PAGE)
        assert bytes(mem).count(0) == 12 * PAGE
    assert pool.stats()["hits"] == 5


@requires("maps")
def test_without_unused_warm_slots_every_idle_one_is_cold():
    pool = linmem.PoolingCreator(max_unused_warm=0)
    for _ in range(3):
        span, _ = written(pool, 8)
        assert resident_within(*span) == 0
        stats = pool.stats()
        assert (stats["warm"], stats["cold"], stats["resident"]) == (0, 1, 0)


@requires("regions")
def test_trim_releases_cold_slots_then_the_least_recently_used_until_the_target_holds():
    pool = linmem.PoolingCreator(max_unused_warm=4, reset="zero")
    mems = [pool.create(8 * PAGE, **SHAPE) for _ in range(6)]
    bases = [mem.as_ptr() for mem in mems]
    for mem in mems:
        mem.close()
    assert (pool.stats()["warm"], pool.stats()["cold"], pool.stats()["resident"]) == (4, 2, 32 * PAGE)
    assert pool.trim(1 << 40) == 0      # cold slots have no resident pages
    assert [is_mapped(base) for base in bases] == [False, False, True, True, True, True]
    assert pool.trim(17 * PAGE) == 16 * PAGE
    assert [is_mapped(base) for base in bases] == [False] * 4 + [True] * 2
    assert pool.trim(16 * PAGE) == 0
    assert pool.trim() == 16 * PAGE
    assert not any(map(is_mapped, bases))
    assert (idle(pool), pool.stats()["resident"]) == (0, 0)
    assert pool.trim() == 0


def test_trim_leaves_live_memories_alone():
    pool = linmem.PoolingCreator()
    with pool.create(PAGE, **SHAPE) as mem:
        mem[0] = 3
        pool.create(PAGE, **SHAPE).close()
        pool.trim()
        assert (mem[0], pool.stats()["live"], idle(pool)) == (3, 1, 0)


@requires("maps")
@pytest.mark.parametrize("reset", RESETS)
@fewer_examples(4)
@given(users=st.lists(st.tuples(st.sampled_from(SHAPES), st.lists(USES, max_size=5)), min_size=1, max_size=20))
def test_idle_slots_never_keep_more_resident_than_the_pool_says(reset, users):
    pool = linmem.PoolingCreator(reset=reset, max_unused_warm=3, keep_resident=16 * PAGE)
    spans = set()
    for shape, history in users:
        with pool.create(**shape, may_move=True) as mem:
            span = whole(mem)
            # Reads are left out: pages that were only read belong to no memory, but mincore would count them.
            moved = use_all(mem, [use for use in history if use[0] != "read"])
        (spans.discard if moved else spans.add)(span)
        stats = pool.stats()
        assert sum(resident_within(*span) for span in spans) <= stats["resident"]
        assert stats["resident"] <= stats["resident_bound"] == 3 * 16 * PAGE


@requires("regions")
def test_warm_makes_slots_ahead_and_the_next_requests_are_hits():
    pool = linmem.PoolingCreator()
    ty = linmem.MemoryType(2, 10)
    how = {"reserved_size_in_bytes": 1 << 20, "guard_size_in_bytes": round_up(65536)}
    assert pool.warm(3, ty, **how) == 3
    assert (pool.stats()["warm"], pool.stats()["live"]) == (3, 0)
    assert pool.warm(3, ty, **how) == 0
    assert pool.warm(2, ty, **how) == 0
    assert pool.warm(4, ty, **how) == 1
    assert pool.warm(0, ty, **how) == 0
    before = pool.stats()
    assert (before["warm"], before["hits"], before["misses"]) == (4, 0, 0)      # no memory was requested yet
    mems = [pool.new_memory(ty, 2 << 16, 10 << 16, 1 << 20, round_up(65536)) for _ in range(4)]
    for mem in mems:
        check_fresh(mem, 2 << 16)
    after = pool.stats()
    assert (after["hits"] - before["hits"], after["misses"] - before["misses"]) == (4, 0)


def test_warm_beyond_the_slots_is_a_pool_error_and_the_made_ones_remain():
    pool = linmem.PoolingCreator(slots=3)
    ty = linmem.MemoryType(1, 2)
    how = {"reserved_size_in_bytes": 1 << 18, "guard_size_in_bytes": round_up(65536)}
    with pool.create(PAGE, **SHAPE), pool.create(PAGE, **SHAPE):
        with pytest.raises(linmem.PoolError):
            pool.warm(2, ty, **how)
        assert idle(pool) == 1
        assert pool.warm(1, ty, **how) == 0


# -- upstream ----------------------------------------------------------------------------------------------------------

def test_a_budget_below_is_charged_for_idle_slots_and_refunded_with_them():
    limit = linmem.LimitingCreator(MMAP, 100 * PAGE)
    pool = linmem.PoolingCreator(limit)
    for _ in range(10):
        with pool.create(10 * PAGE, **SHAPE) as mem:
            mem.grow_to(20 * PAGE)
            assert limit.used_bytes == 20 * PAGE
        assert 10 * PAGE <= limit.used_bytes <= 20 * PAGE
    pool.trim()
    assert limit.used_bytes == 0
    assert limit.peak_bytes == 20 * PAGE


def test_a_budget_used_up_by_idle_slots_is_freed_by_releasing_them():
    limit = linmem.LimitingCreator(MMAP, 30 * PAGE)
    pool = linmem.PoolingCreator(limit)
    for mem in [pool.create(10 * PAGE, **SHAPE) for _ in range(3)]:
        mem.close()
    assert limit.used_bytes == 30 * PAGE
    with pool.create(25 * PAGE, **SHAPE) as mem:
        assert limit.used_bytes == 25 * PAGE
        assert (pool.stats()["warm"], pool.stats()["cold"]) == (0, 3)
        before = pool.stats()
        with pytest.raises(linmem.LimitError) as caught:
            pool.create(6 * PAGE, **SHAPE)
        assert (caught.value.limit, caught.value.used, caught.value.requested) == (30 * PAGE, 25 * PAGE, 6 * PAGE)
        assert pool.stats() == before
        with pytest.raises(linmem.LimitError):
            mem.grow_to(31 * PAGE)
    pool.trim()
    assert limit.used_bytes == 0


def test_a_refused_growth_leaves_the_charge_for_kept_pages():
    limit = linmem.LimitingCreator(MMAP, 100 * PAGE)
    pool = linmem.PoolingCreator(limit)
    with pool.create(10 * PAGE, **SHAPE) as mem:
        mem.grow_to(20 * PAGE)
    kept = limit.used_bytes
    with pool.create(10 * PAGE, **SHAPE) as mem:
        for size in (15 * PAGE, 25 * PAGE):
            with failing(1, errno.ENOMEM), pytest.raises(linmem.PageError):
                mem.grow_to(size)
            assert limit.used_bytes == kept
        mem.grow_to(25 * PAGE)
        assert limit.used_bytes == 25 * PAGE
    pool.trim()
    assert limit.used_bytes == 0


def test_statistics_below_add_up_over_many_uses_of_a_slot():
    statistics = linmem.StatisticsCreator(MMAP)
    pool = linmem.PoolingCreator(statistics)
    for _ in range(5):
        with pool.create(PAGE, **SHAPE) as mem:
            mem.grow_to(10 * PAGE)
    sums = statistics.statistics()
    assert (sums["current_count"], sums["total_count"]) == (1, 1)
    pool.trim()
    sums = statistics.statistics()
    assert (sums["current_count"], sums["current_bytes"]) == (0, 0)
    assert sums["peak_bytes"] == 10 * PAGE


def test_adaptors_above_see_each_use_as_a_memory_of_its_own():
    pool = linmem.PoolingCreator()
    limit = linmem.LimitingCreator(pool, 30 * PAGE)
    statistics = linmem.StatisticsCreator(limit)
    for n in range(1, 6):
        with statistics.create(PAGE, **SHAPE) as mem:
            check_fresh(mem, PAGE)
            mem.grow_to(20 * PAGE)
            assert limit.used_bytes == 20 * PAGE
            with pytest.raises(linmem.LimitError):
                mem.grow_to(31 * PAGE)
        sums = statistics.statistics()
        assert (sums["current_count"], sums["current_bytes"], sums["total_count"]) == (0, 0, n)
        assert limit.used_bytes == 0
    assert (pool.stats()["hits"], pool.stats()["misses"]) == (4, 1)
    with pool.create(PAGE, **SHAPE) as mem:     # not through the adaptors, so no adaptor counts or limits its growth
        mem.grow_to(31 * PAGE)
        assert limit.used_bytes == 0
        assert statistics.statistics()["total_count"] == 5


class Plain(linmem.LinearMemory):
    """A linear memory in Python over one of linmem's memories."""

    def __init__(self, memory):
        self.memory = memory

    def byte_size(self):
        return self.memory.byte_size()

    def byte_capacity(self):
        return self.memory.byte_capacity()

    def grow_to(self, new_size):
        self.memory.grow_to(new_size)

    def as_ptr(self):
        return self.memory.as_ptr()

    def wasm_accessible(self):
        return self.memory.wasm_accessible()


def test_memories_written_in_python_are_passed_through_and_not_kept():
    class Mine(linmem.MemoryCreator):
        def new_memory(self, *arguments):
            return Plain(MMAP.new_memory(*arguments))

    pool = linmem.PoolingCreator(linmem.PythonCreator(Mine()), when_full="error", slots=2)
    start = live()
    mems = [pool.create(PAGE, **SHAPE) for _ in range(4)]
    assert {mem.info().kind for mem in mems} == {"python"}
    stats = pool.stats()
    assert (stats["live"], stats["fallbacks"], stats["hits"], stats["misses"]) == (0, 4, 0, 0)
    for mem in mems:
        mem.close()
    gc.collect()
    assert idle(pool) == 0
    assert live() == start
    with pytest.raises(linmem.PoolError):
        pool.warm(1, linmem.MemoryType(1, 2), reserved_size_in_bytes=1 << 18, guard_size_in_bytes=0)


class Odd(Exception):
    pass


def test_an_exception_of_an_upstream_in_python_reaches_the_caller_and_no_slot_is_lost():
    class Mine(linmem.MemoryCreator):
        def new_memory(self, *arguments):
            raise Odd("no")

    pool = linmem.PoolingCreator(linmem.PythonCreator(Mine()), slots=2, when_full="error")
    before = pool.stats()
    for _ in range(5):
        with pytest.raises(Odd, match="no"):
            pool.create(PAGE, **SHAPE)
    assert pool.stats() == before


def test_native_memories_that_python_hands_on_are_kept():
    class Mine(linmem.MemoryCreator):
        def new_memory(self, *arguments):
            return MMAP.new_memory(*arguments)

    pool = linmem.PoolingCreator(linmem.PythonCreator(Mine()))
    for n in range(3):
        with pool.create(PAGE, **SHAPE) as mem:
            check_fresh(mem, PAGE)
            mem.write(0, b"x" * PAGE)
        assert pool.stats()["hits"] == n


@requires("maps")
def test_a_pool_over_a_pool_leaves_no_hidden_pages_in_a_slot_of_the_pool_below():
    below = linmem.PoolingCreator(max_unused_warm=0)
    above = linmem.PoolingCreator(below)
    for n in range(3):
        with above.create(PAGE, **SHAPE) as mem:
            check_fresh(mem, PAGE)
            mem.grow_to(20 * PAGE)
            mem.write(0, b"x" * 20 * PAGE)
            span = whole(mem)
        assert (above.stats()["hits"], above.stats()["warm"], below.stats()["live"]) == (n, 1, 1)
    above.trim()
    assert (idle(above), below.stats()["live"], below.stats()["cold"]) == (0, 0, 1)
    assert resident_within(*span) == 0
    with above.create(PAGE, **SHAPE) as mem:
        check_fresh(mem, PAGE)
        assert whole(mem) == span
        mem.grow_to(20 * PAGE)
        assert bytes(mem).count(0) == 20 * PAGE
    del above
    gc.collect()
    assert below.stats()["live"] == 0
    below.trim()
    assert idle(below) == 0


def test_a_pool_below_keeps_slots_cold_that_the_pool_above_made_cold():
    below = linmem.PoolingCreator()
    above = linmem.PoolingCreator(below, max_unused_warm=0)
    for n in range(3):
        with above.create(3 * PAGE, **SHAPE) as mem:
            check_fresh(mem, 3 * PAGE)
            mem.grow_to(9 * PAGE)
            mem.write(0, b"x" * 9 * PAGE)
        above.trim()
        assert below.stats()["hits"] == n
        assert (below.stats()["warm"], below.stats()["cold"]) == (0, 1)


def test_a_creator_may_be_freed_while_its_memory_is_a_slot_of_the_pool_below():
    below = linmem.PoolingCreator(max_unused_warm=0)
    above = linmem.PoolingCreator(below)
    for size in (20, 2):
        mem = above.create(PAGE, **SHAPE)
        mem.grow_to(size * PAGE)
        mem.write(0, b"x" * size * PAGE)
        span = whole(mem)
        if size == 20:
            mem.close()
    del above
    gc.collect()
    mem.close()
    assert (below.stats()["live"], below.stats()["cold"]) == (0, 1)
    if NEEDS["maps"][0]:
        assert resident_within(*span) == 0


def test_a_pool_over_a_full_pool_warms_no_slot_that_it_cannot_keep():
    below = linmem.PoolingCreator()
    above = linmem.PoolingCreator(below, slots=1)
    with above.create(PAGE, **SHAPE):
        with pytest.raises(linmem.PoolError):
            above.warm(1, linmem.MemoryType(1, 2), reserved_size_in_bytes=1 << 18, guard_size_in_bytes=0)
        assert idle(above) == 0


@requires("maps")
def test_prefaulted_and_huge_slots_are_pooled_like_any_other():
    for options in ({"prefault": True}, {"huge_pages": True}, {"prefault": True, "huge_pages": True}):
        for warm in (0, 100):
            pool = linmem.PoolingCreator(linmem.MmapCreator(**options), max_unused_warm=warm)
            for _ in range(4):
                with pool.create(3 * PAGE, **SHAPE) as mem:
                    check_fresh(mem, 3 * PAGE)
                    mem.grow_to(9 * PAGE)
                    if "prefault" in options:
                        assert resident_within(mem.as_ptr() + 3 * PAGE, mem.as_ptr() + 9 * PAGE) == 6 * PAGE
                    mem.write(0, b"x" * 9 * PAGE)
            assert pool.stats()["hits"] == 3


HALF = """
# cython: language_level=3
cimport linmem


""" + HALF_CREATOR


@requires("compiler")
def test_a_pool_accepts_memories_of_an_upstream_that_are_smaller_than_requested(tmp_path):
    build_extension(tmp_path, "half", HALF)
    pool = linmem.PoolingCreator(load_extension(tmp_path, "half").Half(MMAP))
    for _ in range(2):
        with pool.create(8 * PAGE, **SHAPE) as mem:
            check_fresh(mem, 4 * PAGE)
            mem.write(0, b"x" * len(mem))
    assert pool.stats()["hits"] == 1


# -- refusals ----------------------------------------------------------------------------------------------------------

@requires("scans")
def test_without_a_way_to_find_touched_pages_the_pages_are_given_back():
    pool = linmem.PoolingCreator(reset="scan")
    mem = pool.create(8 * PAGE, **SHAPE)
    base = mem.as_ptr()
    mem.write(0, b"x" * 8 * PAGE)
    with failing(1, errno.EPERM) as injected:
        mem.close()
    assert injected.happened
    assert pool.stats()["resets"] == {"scan": 0, "zero": 0, "discard": 1}
    with pool.create(8 * PAGE, **SHAPE) as mem:
        assert mem.as_ptr() == base
        check_fresh(mem, 8 * PAGE)


@pytest.mark.parametrize("reset", RESETS)
def test_a_slot_whose_protection_cannot_be_restored_is_discarded(reset):
    pool = linmem.PoolingCreator(reset=reset)
    start = live()
    mem = pool.create(8 * PAGE, **SHAPE)
    mem.write(0, b"x" * 8 * PAGE)
    mem.protect(0, PAGE, "none")
    with failing(1, errno.ENOMEM) as injected:
        mem.close()
    assert injected.happened
    stats = pool.stats()
    assert (stats["rejected"], stats["live"], idle(pool)) == (1, 0, 0)
    assert live() == start


def test_a_slot_whose_pages_cannot_be_given_back_is_discarded():
    pool = linmem.PoolingCreator(reset="discard")
    start = live()
    mem = pool.create(8 * PAGE, **SHAPE)
    mem.write(0, b"x" * 8 * PAGE)
    with failing(1, errno.ENOMEM) as injected:
        mem.close()
    assert injected.happened
    assert (pool.stats()["rejected"], idle(pool)) == (1, 0)
    assert live() == start
    with pool.create(8 * PAGE, **SHAPE) as mem:
        check_fresh(mem, 8 * PAGE)


def test_one_idle_slot_after_the_other_is_released_for_a_request_that_upstream_refuses():
    pool = linmem.PoolingCreator()
    for mem in [pool.create(PAGE, **SHAPE) for _ in range(3)]:
        mem.close()
    with failing(1, errno.ENOMEM) as injected, pool.create(2 * PAGE, **SHAPE) as mem:
        check_fresh(mem, 2 * PAGE)
    assert injected.happened
    assert (idle(pool), pool.stats()["misses"]) == (3, 4)
    pool.trim()
    with failing(1, errno.ENOMEM), pytest.raises(linmem.PageError, match="reserve"):
        pool.create(2 * PAGE, **SHAPE)      # no idle slot, so the refusal is immediate
    assert pool.stats()["live"] == 0


@requires("rlimits", "maps")
def test_a_limit_on_address_space_is_met_by_releasing_idle_slots():
    assert answer(f"""
        import resource, linmem
        pool = linmem.PoolingCreator()
        for mem in [pool.create({PAGE}, reserve=1 << 30) for _ in range(4)]:
            mem.close()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), used + (1 << 29)))
        with pool.create({PAGE}, reserve=3 << 30) as mem:
            assert pool.stats()["warm"] == 1
            try:
                pool.create({PAGE}, reserve=3 << 30)
            except linmem.PageError as error:
                assert re.search("RLIMIT_AS", str(error)), error
                print("named", pool.stats()["live"])
        """.replace("import resource", "import re, resource")) == "named 1"


@requires("docstrings")
def test_the_docstring_names_every_option_and_every_figure():
    text = linmem.PoolingCreator.__doc__ or ""
    for name in ("slots", "keep_resident", "max_unused_warm", "reset", "when_full", "check", "upstream"):
        assert re.search(rf"^\s*{name} :", text, flags=re.M)
    for name in linmem.PoolingCreator().stats():
        assert re.search(rf"\b{name}\b", linmem.PoolingCreator.stats.__doc__)
