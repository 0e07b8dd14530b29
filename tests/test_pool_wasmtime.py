"""Wasm guests that use the same memories one after another."""

import ctypes
import gc
import threading

import numpy as np
import pytest
import wasmtime
from support import NEEDS, accessible_parts, is_mapped, live_bytes, requires, resident_within, run_child, whole
from wasmtime import _ffi as ffi

import linmem
import linmem.metrics
import linmem.wasmtime

PAGE = 65536

GUEST = """(module
  (memory (export "memory") {limits})
  {data}
  (func (export "grow") (param {i}) (result {i}) (memory.grow (local.get 0)))
  (func (export "size") (result {i}) (memory.size))
  (func (export "load") (param {i}) (result i32) (i32.load8_u (local.get 0)))
  (func (export "store") (param {i} i32) (i32.store8 (local.get 0) (local.get 1)))
  (func (export "fill") (param {i} i32 {i}) (memory.fill (local.get 0) (local.get 1) (local.get 2))))"""

KINDS = {"plain": ("2 64", "i32"), "unbounded": ("2", "i32"), "64 bits": ("i64 2 64", "i64"),
         "64 bits, unbounded": ("i64 2", "i64"), "empty": ("0 64", "i32")}


def guest(kind="plain", data=""):
    limits, i = KINDS[kind]
    return GUEST.format(limits=limits, i=i, data=data)


def make_engine(creator=None, **settings):
    """An engine with linmem installed. `settings` are wasmtime's own, under their names in the C API."""
    config = wasmtime.Config()
    config.wasm_memory64 = True
    config.wasm_multi_memory = True
    config.wasm_threads = True
    for name, value in settings.items():
        getattr(ffi, f"wasmtime_config_{name}_set")(config.ptr(), value)
    linmem.wasmtime.install(config, creator)
    return wasmtime.Engine(config)


class Guest:
    """One instance in its own store."""

    def __init__(self, engine, module):
        self.owner = wasmtime.Store(engine)
        self.exports = wasmtime.Instance(self.owner, module, []).exports(self.owner)

    def __getattr__(self, name):
        return lambda *arguments: self.exports[name](self.owner, *arguments)

    def linear(self, name="memory"):
        return linmem.wasmtime.linear_memory(self.owner, self.exports[name])

    def close(self):
        self.exports = None
        self.owner.close()


def check_zero(memory):
    info = memory.info()
    assert ctypes.string_at(info.base, info.committed).count(0) == info.committed, "a byte of the guest before"


@pytest.mark.parametrize("options", [
    {}, {"check": True}, {"reset": "zero"}, {"reset": "discard"}, {"max_unused_warm": 0}, {"keep_resident": 0},
], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_guest_gets_the_memory_of_the_first_without_its_bytes(kind, options):
    pool = linmem.PoolingCreator(**options)
    engine = make_engine(pool)
    module = wasmtime.Module(engine, guest(kind))
    first = 0 if kind == "empty" else 2
    bases = set()
    for n in range(5):
        one = Guest(engine, module)
        memory = one.linear()
        bases.add(memory.as_ptr())
        assert (len(memory), one.size()) == (first * PAGE, first)
        check_zero(memory)
        with pytest.raises(wasmtime.Trap, match="out of bounds"):
            one.load(first * PAGE)
        assert one.grow(6) == first
        end = (first + 6) * PAGE
        assert one.load(end - 1) == 0
        check_zero(memory)
        one.fill(0, 0x5A, end)
        assert one.load(end - 1) == 0x5A
        with pytest.raises(wasmtime.Trap, match="out of bounds"):
            one.load(end)
        del memory
        one.close()
        stats = pool.stats()
        assert (stats["hits"], stats["misses"], stats["live"]) == (n, 1, 0)
    assert len(bases) == 1
    assert stats["rejected"] == stats["fallbacks"] == 0


def test_the_growth_of_one_guest_is_out_of_bounds_for_the_next_guest():
    pool = linmem.PoolingCreator()
    engine = make_engine(pool)
    module = wasmtime.Module(engine, guest())
    one = Guest(engine, module)
    one.grow(60)
    one.fill(0, 7, 62 * PAGE)
    one.close()
    two = Guest(engine, module)
    assert pool.stats()["hits"] == 1
    assert two.load(2 * PAGE - 1) == 0
    for address in (2 * PAGE, 2 * PAGE + 1, 30 * PAGE, 62 * PAGE - 1, 62 * PAGE, 2**31 - 1, -1):
        with pytest.raises(wasmtime.Trap, match="out of bounds"):
            two.load(address)
        with pytest.raises(wasmtime.Trap, match="out of bounds"):
            two.store(address, 1)
    memory = two.linear()
    if NEEDS["regions"][0]:
        assert accessible_parts(memory) == [(0, 2 * PAGE, "rw-p")]
    for size in range(3, 63):
        assert two.grow(1) == size - 1
        assert two.load(size * PAGE - 1) == two.load((size - 1) * PAGE) == 0
        with pytest.raises(wasmtime.Trap, match="out of bounds"):
            two.load(size * PAGE)
    assert two.grow(3) == -1
    check_zero(memory)


def test_data_segments_arrive_in_each_guest_anew():
    pool = linmem.PoolingCreator()
    engine = make_engine(pool)
    module = wasmtime.Module(engine, guest(data='(data (i32.const 16) "hello") (data (i32.const 70000) "there")'))
    for n in range(4):
        one = Guest(engine, module)
        memory = one.linear()
        assert bytes(memory).replace(b"\0", b"") == b"hellothere"
        assert (memory.read(16, 5), memory.read(70000, 5)) == (b"hello", b"there")
        one.fill(0, 1, 2 * PAGE)
        one.close()
        del memory
        gc.collect()
        assert pool.stats()["hits"] == n


def test_install_without_a_creator_pools():
    engine = make_engine()
    module = wasmtime.Module(engine, guest())
    bases = []
    for _ in range(3):
        one = Guest(engine, module)
        memory = one.linear()
        bases.append(memory.as_ptr())
        check_zero(memory)
        one.fill(0, 9, 2 * PAGE)
        del memory
        one.close()
    assert len(set(bases)) == 1
    if NEEDS["regions"][0]:
        assert is_mapped(bases[0])
    engine.close()
    del engine, module, one
    gc.collect()
    if NEEDS["regions"][0]:
        assert not is_mapped(bases[0])


@pytest.mark.parametrize("kind", ["plain", "unbounded", "64 bits", "64 bits, unbounded"])
def test_warm_makes_the_next_instantiations_hits(kind):
    pool = linmem.PoolingCreator()
    engine = make_engine(pool)
    module = wasmtime.Module(engine, guest(kind))
    ty = linmem.MemoryType(2, None if "unbounded" in kind else 64, is_64="64" in kind)
    assert pool.warm(4, ty) == 4
    before = pool.stats()
    guests = [Guest(engine, module) for _ in range(4)]
    stats = pool.stats()
    assert (stats["hits"] - before["hits"], stats["misses"] - before["misses"], stats["live"]) == (4, 0, 4)
    for one in guests:
        check_zero(one.linear())
        assert one.grow(1) == 2
        one.close()


def made_by_domain(pool):
    return {name: row["misses"] for name, row in linmem.metrics.read(pool)["domains"].items()}


def test_guests_have_the_domain_that_a_prepared_module_or_a_python_creator_names():
    local = threading.local()

    class OfTenant(linmem.MemoryCreator):
        def new_memory(self, *arguments):
            return pool.new_memory(*arguments, domain=local.tenant)

    pool = linmem.PoolingCreator()
    engine = make_engine(OfTenant())
    module = wasmtime.Module(engine, guest())
    bases = {}
    for local.tenant in ("a", "b", "a"):
        one = Guest(engine, module)
        assert one.grow(1) == 2
        assert bases.setdefault(local.tenant, one.linear().as_ptr()) == one.linear().as_ptr()
        one.close()
        gc.collect()
    assert made_by_domain(pool) == {"a": 1, "b": 1}

    pool = linmem.PoolingCreator()
    engine = make_engine(pool)
    prepared = linmem.wasmtime.prepare(engine, guest(data='(data (i32.const 5) "data")'))
    pool.trim()
    before = made_by_domain(pool)
    for name in ("a", "b", None, "a"):
        store = wasmtime.Store(engine)
        memory = prepared.instantiate(store, domain=name).exports(store)["memory"]
        assert linmem.wasmtime.linear_memory(store, memory).read(5, 4) == b"data"
        store.close()
        gc.collect()
    assert made_by_domain(pool) == {"a": 1, "b": 1, None: before.get(None, 0) + 1}


def test_a_host_made_wasm_memory_has_the_domain_that_is_named():
    pool = linmem.PoolingCreator()
    engine = make_engine(pool)
    store = wasmtime.Store(engine)
    ty = wasmtime.MemoryType(wasmtime.Limits(1, 2))
    linmem.wasmtime.new_memory(store, ty, domain="a")
    linmem.wasmtime.new_memory(store, ty)
    assert made_by_domain(pool) == {"a": 1, None: 1}
    with pytest.raises(TypeError, match="domain must be a str or None, got bytes"):
        linmem.wasmtime.new_memory(store, ty, domain=b"a")
    prepared = linmem.wasmtime.prepare(engine, guest())
    with pytest.raises(TypeError, match="domain must be a str or None, got int"):
        prepared.instantiate(store, domain=1)


def test_a_guest_waits_for_a_slot_and_is_refused_after_the_timeout():
    pool = linmem.PoolingCreator(slots=1, when_full="wait", timeout=3600)
    engine = make_engine(pool)
    module = wasmtime.Module(engine, guest())
    first = Guest(engine, module)
    done = []
    thread = threading.Thread(target=lambda: done.append(Guest(engine, module)))
    thread.start()
    thread.join(0.05)
    assert not done
    first.close()
    gc.collect()
    thread.join()
    assert done[0].grow(1) == 2
    pool = linmem.PoolingCreator(slots=1, when_full="wait", timeout=0.01)
    engine = make_engine(pool)
    module = wasmtime.Module(engine, guest())
    first = Guest(engine, module)
    with pytest.raises(wasmtime.WasmtimeError, match="all 1 slots of the pool are in use"):
        Guest(engine, module)
    first.close()


@requires("maps")
def test_the_pages_of_a_guest_stay_resident_for_the_next():
    pool = linmem.PoolingCreator(reset="scan" if NEEDS["scans"][0] else "zero")
    engine = make_engine(pool)
    module = wasmtime.Module(engine, guest())
    one = Guest(engine, module)
    span = whole(one.linear())
    base = one.linear().as_ptr()
    one.grow(4)
    one.fill(0, 1, 6 * PAGE)
    one.close()
    gc.collect()
    assert resident_within(base, base + 6 * PAGE) == 6 * PAGE <= pool.stats()["resident"]
    assert pool.trim() >= 6 * PAGE
    assert not is_mapped(span[0])


# -- references to a slot -------------------------------------------------------------------------------

def test_a_view_that_outlives_its_store_pins_the_slot_until_it_is_gone():
    pool = linmem.PoolingCreator()
    engine = make_engine(pool)
    module = wasmtime.Module(engine, guest())
    one = Guest(engine, module)
    array = np.asarray(one.linear())
    array[5] = 55
    base = one.linear().as_ptr()
    assert (pool.stats()["live"], pool.stats()["pinned"]) == (1, 0)
    one.close()
    assert (pool.stats()["live"], pool.stats()["pinned"], pool.stats()["warm"]) == (1, 1, 0)
    two = Guest(engine, module)
    assert two.linear().as_ptr() != base
    two.fill(0, 7, 2 * PAGE)
    assert array[5] == 55
    assert int(array.sum()) == 55
    array[6] = 66
    del array
    gc.collect()
    assert (pool.stats()["live"], pool.stats()["pinned"], pool.stats()["warm"]) == (1, 0, 1)
    three = Guest(engine, module)
    assert three.linear().as_ptr() == base
    check_zero(three.linear())


def test_a_handle_alone_pins_the_slot_and_may_grow_it():
    pool = linmem.PoolingCreator()
    engine = make_engine(pool)
    module = wasmtime.Module(engine, guest())
    one = Guest(engine, module)
    memory = one.linear()
    one.close()
    assert pool.stats()["pinned"] == 1
    memory.grow_to(9 * PAGE)
    memory.write(8 * PAGE, b"secret")
    memory.close()
    assert (pool.stats()["pinned"], pool.stats()["warm"]) == (0, 1)
    two = Guest(engine, module)
    with pytest.raises(wasmtime.Trap, match="out of bounds"):
        two.load(8 * PAGE)
    two.grow(7)
    assert two.load(8 * PAGE) == 0
    assert two.linear().info().owner == "wasmtime"
    with pytest.raises(linmem.OwnedError):
        two.linear().grow_to(20 * PAGE)


def test_a_page_that_python_protected_after_one_guest_is_writable_for_the_next():
    pool = linmem.PoolingCreator()
    engine = make_engine(pool)
    module = wasmtime.Module(engine, guest())
    for n in range(3):
        one = Guest(engine, module)
        one.fill(0, 3, 2 * PAGE)
        kept = one.linear()
        one.close()
        gc.collect()
        kept.protect(PAGE, PAGE, "none" if n % 2 else "r")
        kept.close()
    two = Guest(engine, module)
    assert pool.stats()["hits"] == 3
    assert two.load(PAGE) == 0
    two.store(PAGE, 1)
    assert two.load(PAGE) == 1


# -- kinds of memories, engines and creators -----------------------------------------------------------------

def test_memories_of_a_module_come_from_slots_of_their_own_shapes():
    pool = linmem.PoolingCreator()
    engine = make_engine(pool)
    module = wasmtime.Module(engine, """(module
        (memory (export "a") 1) (memory (export "b") 2 4) (memory (export "c") i64 1) (memory (export "d") 1)
        (data (memory 1) (i32.const 0) "b")
        (func (export "grow") (param i32) (result i32) (memory.grow 1 (local.get 0))))""")
    seen = set()
    for n in range(3):
        one = Guest(engine, module)
        memories = [one.linear(name) for name in "abcd"]
        bases = [memory.as_ptr() for memory in memories]
        assert len(set(bases)) == 4
        assert [len(memory) for memory in memories] == [PAGE, 2 * PAGE, PAGE, PAGE]
        assert [memory[0] for memory in memories] == [0, ord("b"), 0, 0]
        for memory in memories:
            assert not memory.read(1, len(memory) - 1).strip(b"\0")
            memory.write(0, b"x" * len(memory))
        assert one.grow(2) == 2
        seen |= set(bases)
        del memory, memories
        one.close()
        gc.collect()
        assert (pool.stats()["hits"], pool.stats()["misses"]) == (4 * n, 4)
    assert len(seen) == 4


@pytest.mark.skipif(not hasattr(ffi, "wasmtime_config_shared_memory_set"), reason="no shared memories here")
def test_shared_memories_are_pooled_apart_from_the_others():
    pool = linmem.PoolingCreator()
    engine = make_engine(pool, shared_memory=True)
    shared = wasmtime.Module(engine, '(module (memory (export "memory") 1 64 shared))')
    plain = wasmtime.Module(engine, '(module (memory (export "memory") 1 64))')
    bases = {}
    for n in range(4):
        for name, module in (("shared", shared), ("plain", plain)):
            one = Guest(engine, module)
            memory = one.linear()
            bases.setdefault(name, set()).add(memory.as_ptr())
            assert len(memory) == PAGE
            check_zero(memory)
            if name == "shared":
                assert one.exports["memory"].grow(63) == 1
                memory.write(63 * PAGE, b"secret")
            memory.write(0, b"x" * PAGE)
            del memory
            one.close()
            gc.collect()
        assert (pool.stats()["hits"], pool.stats()["live"]) == (2 * n, 0)
    assert [len(found) for found in bases.values()] == [1, 1]
    assert not bases["shared"] & bases["plain"]


def test_a_guest_that_outgrows_a_small_reservation_only_loses_the_slot():
    pool = linmem.PoolingCreator()
    engine = make_engine(pool, memory_reservation=1 << 20, memory_guard_size=PAGE)
    module = wasmtime.Module(engine, guest("unbounded"))
    for _ in range(3):
        one = Guest(engine, module)
        check_zero(one.linear())
        assert one.grow(100) == 2
        one.fill(0, 8, 102 * PAGE)
        with pytest.raises(wasmtime.Trap, match="out of bounds"):
            one.load(102 * PAGE)
        one.close()
        gc.collect()
    stats = pool.stats()
    assert (stats["hits"], stats["misses"], stats["warm"], stats["cold"], stats["live"]) == (0, 3, 0, 0, 0)
    for n in range(3):
        one = Guest(engine, module)
        check_zero(one.linear())
        assert one.grow(14) == 2
        one.fill(0, 8, 16 * PAGE)
        one.close()
        gc.collect()
        assert pool.stats()["hits"] == n


def test_two_engines_share_one_pool_and_may_be_freed_in_any_order():
    start = live_bytes() if NEEDS["maps"][0] else 0
    pool = linmem.PoolingCreator()
    engines = [make_engine(pool) for _ in range(2)]
    modules = [wasmtime.Module(engine, guest()) for engine in engines]
    bases = set()
    for n in range(6):
        one = Guest(engines[n % 2], modules[n % 2])
        bases.add(one.linear().as_ptr())
        check_zero(one.linear())
        one.fill(0, n + 1, 2 * PAGE)
        one.close()
        gc.collect()
    assert len(bases) == 1
    both = [Guest(engine, module) for engine, module in zip(engines, modules, strict=True)]
    assert both[0].linear().as_ptr() != both[1].linear().as_ptr()
    both[0].close()
    engines[0].close()
    both[1].fill(0, 3, 2 * PAGE)
    assert both[1].load(2 * PAGE - 1) == 3
    del pool, modules, one
    both[1].close()
    engines[1].close()
    both.clear()
    engines.clear()
    gc.collect()
    if NEEDS["maps"][0]:
        assert live_bytes() == start


def test_python_and_wasm_take_turns_in_the_same_slots():
    pool = linmem.PoolingCreator(slots=1)
    engine = make_engine(pool)
    module = wasmtime.Module(engine, guest())
    ty = linmem.MemoryType(2, 64)
    for n in range(3):
        with pool.new_memory(ty, 2 * PAGE, 64 * PAGE, 4 << 30, 32 << 20) as memory:
            base = memory.as_ptr()
            check_zero(memory)
            assert memory.info().owner == "python"
            memory.grow_to(9 * PAGE)
            memory.write(0, b"python" * PAGE)
        one = Guest(engine, module)
        assert one.linear().as_ptr() == base
        check_zero(one.linear())
        one.fill(0, 4, 2 * PAGE)
        one.close()
        gc.collect()
        assert pool.stats()["hits"] == 2 * n + 1


def test_a_pool_that_is_full_falls_back_or_is_a_wasm_error():
    for full in ("fallback", "error"):
        pool = linmem.PoolingCreator(slots=2, when_full=full)
        engine = make_engine(pool)
        module = wasmtime.Module(engine, guest())
        guests = [Guest(engine, module) for _ in range(2)]
        if full == "fallback":
            third = Guest(engine, module)
            check_zero(third.linear())
            assert third.grow(3) == 2
            third.close()
            assert pool.stats()["fallbacks"] == 1
        else:
            store = wasmtime.Store(engine)
            with pytest.raises(wasmtime.WasmtimeError, match="slots"):
                wasmtime.Instance(store, module, [])
            store.close()
        assert pool.stats()["live"] == 2
        for one in guests:
            one.close()
        gc.collect()
        assert (pool.stats()["live"], pool.stats()["warm"]) == (0, 2)


def test_a_budget_over_or_under_the_pool_bounds_guests_and_is_refunded():
    under = linmem.LimitingCreator(linmem.MmapCreator(), 8 * PAGE)
    pool = linmem.PoolingCreator(under)
    over = linmem.LimitingCreator(pool, 6 * PAGE)
    engine = make_engine(over)
    module = wasmtime.Module(engine, guest())
    for _ in range(3):
        one = Guest(engine, module)
        assert one.grow(4) == 2
        assert one.grow(1) == -1
        one.fill(0, 1, 6 * PAGE)
        assert over.used_bytes == under.used_bytes == 6 * PAGE
        one.close()
        gc.collect()
        assert over.used_bytes == 0
    assert pool.stats()["hits"] == 2
    wide = wasmtime.Module(engine, '(module (memory (export "memory") 5))')
    one = Guest(engine, wide)       # the idle slot is charged its minimum, which fits beside the new memory
    assert under.used_bytes == (2 + 5) * PAGE
    one.close()
    gc.collect()
    pool.trim()
    assert under.used_bytes == 0


def test_threads_instantiate_through_one_pool_and_see_only_their_own_bytes():
    pool = linmem.PoolingCreator(max_unused_warm=3)
    engine = make_engine(pool)
    module = wasmtime.Module(engine, guest())
    errors = []

    def work(n):
        try:
            for _ in range(60):
                one = Guest(engine, module)
                memory = one.linear()
                check_zero(memory)
                assert one.grow(2) == 2
                check_zero(memory)
                one.fill(n, n + 1, 4 * PAGE - n)
                assert set(bytes(memory)) <= {0, n + 1}
                del memory
                one.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    gc.collect()
    stats = pool.stats()
    assert (stats["live"], stats["pinned"], stats["hits"] + stats["misses"]) == (0, 0, 240)
    assert stats["misses"] <= 8


@requires("fork")
def test_a_forked_childs_guests_do_not_see_each_other_either():
    done = run_child("""
        import gc, os, sys, traceback, warnings, wasmtime, linmem, linmem.wasmtime
        warnings.simplefilter("ignore", DeprecationWarning)     # of a fork with threads; wasmtime starts some
        pool = linmem.PoolingCreator()
        config = wasmtime.Config()
        linmem.wasmtime.install(config, pool)
        engine = wasmtime.Engine(config)
        module = wasmtime.Module(engine, '''(module (memory (export "memory") 2)
            (func (export "fill") (param i32 i32 i32) (memory.fill (local.get 0) (local.get 1) (local.get 2))))''')
        def guest(at):
            store = wasmtime.Store(engine)
            exports = wasmtime.Instance(store, module, []).exports(store)
            memory = linmem.wasmtime.linear_memory(store, exports["memory"])
            base = memory.as_ptr()
            assert bytes(memory).count(0) == len(memory)
            exports["fill"](store, at, 7, 5000)
            del memory
            store.close()
            return base
        base = guest(0)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                assert {guest(at) for at in (65536, 30000, 0, 120000)} == {base}
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0
        assert guest(50000) == base and guest(0) == base
        print("apart")
        """)
    assert (done.returncode, done.stdout) == (0, "apart\n"), done.stderr


SCENES = {
    "the creator is gone": "del pool",
    "a view is held": "view = memoryview(linmem.wasmtime.linear_memory(store, exports['memory']))",
    "the store is closed, a view is held": "view = memoryview(linmem.wasmtime.linear_memory(store,"
                                           " exports['memory'])); store.close()",
    "an exit handler closes": "import atexit; atexit.register(store.close); atexit.register(engine.close)",
    "the engine goes first": "engine.close()",
}


@pytest.mark.parametrize("scene", SCENES)
def test_the_interpreter_ends_cleanly_with_pooled_guests_while(scene):
    done = run_child(f"""
import gc, sys, wasmtime, linmem, linmem.wasmtime
pool = linmem.PoolingCreator()
config = wasmtime.Config()
linmem.wasmtime.install(config, pool)
engine = wasmtime.Engine(config)
module = wasmtime.Module(engine, '(module (memory (export "memory") 2))')
for _ in range(2):
    store = wasmtime.Store(engine)
    exports = wasmtime.Instance(store, module, []).exports(store)
{SCENES[scene]}
print("end")
""")
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr
    assert "linmem" not in done.stderr
    assert "Fatal" not in done.stderr
