"""linmem under a real wasmtime engine: the views of wasm and of Python, and ownership."""

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import wasmtime
from wasmtime import _ffi as ffi

import linmem
import linmem.wasmtime
from linmem._os import pages

PAGE = 65536

GROWING = """(module
  (memory (export "memory") {limits})
  (data (i32.const 16) "hello")
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "size") (result i32) (memory.size))
  (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "store") (param i32 i32) (i32.store8 (local.get 0) (local.get 1))))"""


def make_config(creator=None, tune=True, **settings):
    """A Config with linmem installed. `settings` are wasmtime's own, under their names in the C API."""
    config = wasmtime.Config()
    config.wasm_memory64 = True
    config.wasm_multi_memory = True
    config.wasm_threads = True
    for name, value in settings.items():
        getattr(ffi, f"wasmtime_config_{name}_set")(config.ptr(), value)
    linmem.wasmtime.install(config, creator, tune=tune)
    return config


def instantiate(wat, creator=None, imports=(), **settings):
    engine = wasmtime.Engine(make_config(creator, **settings))
    store = wasmtime.Store(engine)
    instance = wasmtime.Instance(store, wasmtime.Module(engine, wat), list(imports))
    return store, instance.exports(store)


def needs(name):
    return pytest.mark.skipif(not hasattr(ffi, name), reason=f"this wasmtime-py has no {name}")


# -- the view of wasm --------------------------------------------------------------------------


def test_data_segments_arrive_and_the_rest_is_zero():
    store, exports = instantiate(GROWING.format(limits="1"))
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    assert memory.read(16, 5) == b"hello"
    assert bytes(memory).strip(b"\0") == b"hello"


def test_python_and_wasm_see_the_same_bytes():
    store, exports = instantiate(GROWING.format(limits="1"))
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    exports["store"](store, 1000, 42)
    assert memory[1000] == 42
    memory[1001] = 43
    assert exports["load"](store, 1001) == 43


def test_growth_keeps_the_base_and_the_views_and_adds_zeros():
    store, exports = instantiate(GROWING.format(limits="1"))
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    array = np.asarray(memory)
    base = memory.as_ptr()
    exports["store"](store, PAGE - 1, 7)
    for previous in (1, 11, 21):
        assert exports["grow"](store, 10) == previous
    assert memory.as_ptr() == base
    assert len(memory) == 31 * PAGE
    assert array[PAGE - 1] == 7
    assert not memory.read(PAGE, 30 * PAGE).strip(b"\0")
    assert exports["load"](store, 31 * PAGE - 1) == 0


def test_growth_past_the_maximum_is_refused_and_changes_nothing():
    store, exports = instantiate(GROWING.format(limits="1 3"))
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    assert memory.maximum_byte_size() == 3 * PAGE
    assert exports["grow"](store, 3) == -1
    assert exports["size"](store) == 1
    assert exports["grow"](store, 2) == 1
    assert exports["grow"](store, 1) == -1


def test_a_memory_whose_maximum_is_its_minimum_grows_by_nothing_only():
    store, exports = instantiate(GROWING.format(limits="2 2"))
    assert exports["grow"](store, 0) == 2
    assert exports["grow"](store, 1) == -1


@pytest.mark.parametrize("grown", [0, 5])
def test_the_trap_boundary_is_the_byte_after_the_last(grown):
    store, exports = instantiate(GROWING.format(limits="1"))
    exports["grow"](store, grown)
    end = (1 + grown) * PAGE
    assert exports["load"](store, end - 1) == 0
    for address in (end, end + PAGE, 2**31 - 1):
        with pytest.raises(wasmtime.Trap, match="out of bounds"):
            exports["load"](store, address)
        with pytest.raises(wasmtime.Trap, match="out of bounds"):
            exports["store"](store, address, 1)
    with pytest.raises(wasmtime.Trap, match="out of bounds"):
        exports["load"](store, -1)


@pytest.mark.parametrize("access", ["none", "r", "rx"])
def test_pages_of_a_memory_that_a_store_owns_stay_readable_and_writable(access):
    store, exports = instantiate(GROWING.format(limits="2"))
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    for offset, size in ((0, PAGE), (PAGE, PAGE), (0, len(memory))):
        with pytest.raises(linmem.OwnedError, match=r"memory\.fill.*native code"):
            memory.protect(offset, size, access)
    assert not memoryview(memory).readonly
    memory.protect(PAGE, PAGE, "rw")
    memory.protect(PAGE, 0, access)
    exports["store"](store, PAGE, 1)
    assert memory[PAGE] == 1
    store.close()
    memory.protect(PAGE, PAGE, "r")
    assert memory[PAGE] == 1
    with pytest.raises(ValueError, match="write is refused"):
        memory[PAGE] = 2


def test_an_empty_memory_has_an_address_and_grows_from_nothing():
    store, exports = instantiate(GROWING.format(limits="0").replace('(data (i32.const 16) "hello")', ""),
                                 memory_reservation=0, memory_guard_size=0, tune=False)
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    assert len(memory) == 0
    assert memory.as_ptr() % pages.describe()["page_size"] == 0
    assert memory.as_ptr() > 0
    assert exports["grow"](store, 1) == 0
    exports["store"](store, 5, 6)
    assert memory[5] == 6


def test_many_memories_of_a_module_are_distinct():
    store, exports = instantiate("""(module
        (memory (export "a") 1) (memory (export "b") 2 4) (memory (export "c") i64 1)
        (data (memory 1) (i32.const 0) "b")
        (func (export "grow") (param i32) (result i32) (memory.grow 1 (local.get 0))))""")
    a, b, c = (linmem.wasmtime.linear_memory(store, exports[name]) for name in "abc")
    assert len({a.as_ptr(), b.as_ptr(), c.as_ptr()}) == 3
    assert b[0] == ord("b")
    assert a[0] == c[0] == 0
    assert exports["grow"](store, 2) == 2
    assert (len(a), len(b), len(c)) == (PAGE, 4 * PAGE, PAGE)


def test_a_64_bit_memory_refuses_an_absurd_growth_and_stays_usable():
    store, exports = instantiate("""(module (memory (export "memory") i64 1)
        (func (export "grow") (param i64) (result i64) (memory.grow (local.get 0)))
        (func (export "load") (param i64) (result i32) (i32.load8_u (local.get 0))))""")
    for delta in (-1, 1 << 47, (1 << 48) - 1, 1 << 62):
        assert exports["grow"](store, delta) == -1
    assert exports["grow"](store, 99) == 1
    assert exports["load"](store, 100 * PAGE - 1) == 0
    for address in (100 * PAGE, 1 << 40, -1):
        with pytest.raises(wasmtime.Trap, match="out of bounds"):
            exports["load"](store, address)


@needs("wasmtime_config_wasm_custom_page_sizes_set")
def test_one_byte_pages_bound_to_the_byte_and_refuse_a_growth_that_wraps():
    store, exports = instantiate("""(module (memory (export "memory") i64 5 (pagesize 1))
        (func (export "grow") (param i64) (result i64) (memory.grow (local.get 0)))
        (func (export "load") (param i64) (result i32) (i32.load8_u (local.get 0))))""", wasm_custom_page_sizes=True)
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    assert len(memory) == 5
    for delta in (-1, -5, -6, -4096):       # a size clamped to SIZE_MAX must not wrap to 0 when it is rounded up
        assert exports["grow"](store, delta) == -1
    assert exports["grow"](store, 4096) == 5
    assert len(memory) == 4101
    assert exports["load"](store, 4100) == 0
    with pytest.raises(wasmtime.Trap):
        exports["load"](store, 4101)


def test_growth_past_a_small_reservation_moves_unless_a_view_is_exported():
    store, exports = instantiate(GROWING.format(limits="1"), memory_reservation=1 << 20, memory_guard_size=PAGE,
                                 tune=False)
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    assert memory.byte_capacity() == 1 << 20
    base = memory.as_ptr()
    with memoryview(memory) as view:
        assert exports["grow"](store, 100) == -1
        assert bytes(view[16:21]) == b"hello"
    assert exports["grow"](store, 100) == 1
    assert memory.as_ptr() != base
    assert [exports["load"](store, 16 + i) for i in range(5)] == list(b"hello")
    assert exports["load"](store, 101 * PAGE - 1) == 0
    with pytest.raises(wasmtime.Trap):
        exports["load"](store, 101 * PAGE)
    assert linmem.wasmtime.linear_memory(store, exports["memory"]).as_ptr() == memory.as_ptr()


def test_a_memory_that_may_not_move_stays_within_its_reservation():
    store, exports = instantiate(GROWING.format(limits="1"), memory_reservation=1 << 20, memory_guard_size=PAGE,
                                 memory_may_move=False, tune=False)
    assert exports["grow"](store, 100) == -1
    assert exports["grow"](store, 15) == 1
    assert exports["grow"](store, 1) == -1


@needs("wasmtime_config_shared_memory_set")
def test_a_shared_memory_of_a_module_is_linmems_and_never_moves():
    store, exports = instantiate('(module (memory (export "memory") 1 64 shared))', shared_memory=True)
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    base = memory.as_ptr()
    assert exports["memory"].grow(63) == 1
    assert memory.as_ptr() == base
    assert len(memory) == 64 * PAGE


# -- memories made by the host ------------------------------------------------------------------------


def test_a_host_made_memory_is_linmems_and_can_be_imported():
    engine = wasmtime.Engine(make_config())
    store = wasmtime.Store(engine)
    made = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, 3)))
    memory = linmem.wasmtime.linear_memory(store, made)
    module = wasmtime.Module(engine, """(module (import "env" "memory" (memory 1))
        (func (export "grow") (result i32) (i32.store8 (i32.const 3) (i32.const 9)) (memory.grow (i32.const 1))))""")
    exports = wasmtime.Instance(store, module, [made]).exports(store)
    assert exports["grow"](store) == 1
    assert memory[3] == 9
    assert len(memory) == 2 * PAGE
    assert memory.maximum_byte_size() == 3 * PAGE


@pytest.mark.parametrize(("arguments", "options"), [
    ((0, None), {}), ((2, 2), {}), ((1, 1 << 20), {"is_64": True}), ((3, None), {"is_64": True}),
])
def test_a_host_made_memory_has_the_type_that_was_asked_for(arguments, options):
    store = wasmtime.Store(wasmtime.Engine(make_config()))
    made = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(*arguments), **options))
    limits = made.type(store).limits
    assert (limits.min, limits.max) == arguments
    assert made.type(store).is_64 is options.get("is_64", False)
    assert len(linmem.wasmtime.linear_memory(store, made)) == arguments[0] * PAGE


@needs("wasmtime_config_shared_memory_set")
def test_a_host_made_shared_memory_is_linmems():
    store = wasmtime.Store(wasmtime.Engine(make_config(shared_memory=True)))
    made = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, 2), shared=True))
    assert isinstance(made, wasmtime.SharedMemory)
    assert len(linmem.wasmtime.linear_memory(store, made)) == PAGE


def test_linear_memory_refuses_memories_that_wasmtime_made_itself():
    store = wasmtime.Store(wasmtime.Engine(make_config()))
    own = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, 2)))
    with pytest.raises(ValueError, match=r"new_memory"):
        linmem.wasmtime.linear_memory(store, own)


def test_an_engine_without_linmem_gets_a_clear_error():
    store = wasmtime.Store(wasmtime.Engine(wasmtime.Config()))
    with pytest.raises(ValueError, match=r"install\(config\) was not called"):
        linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, 2)))


@needs("wasmtime_pooling_allocation_strategy_set")
def test_a_pooling_strategy_that_would_ignore_the_creator_is_refused():
    config = wasmtime.Config()
    pooling = ffi.wasmtime_pooling_allocation_config_new()
    ffi.wasmtime_pooling_allocation_config_total_memories_set(pooling, 2)
    ffi.wasmtime_pooling_allocation_config_total_stacks_set(pooling, 2)
    ffi.wasmtime_pooling_allocation_config_total_tables_set(pooling, 2)
    ffi.wasmtime_pooling_allocation_strategy_set(config.ptr(), pooling)
    ffi.wasmtime_pooling_allocation_config_delete(pooling)
    linmem.wasmtime.install(config)
    store = wasmtime.Store(wasmtime.Engine(config))
    with pytest.raises(ValueError, match="pooling allocation strategy"):
        linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))


@pytest.mark.parametrize("bad", [None, 7, "memory", object()])
def test_an_object_that_is_not_a_wasm_memory_is_a_type_error(bad):
    store = wasmtime.Store(wasmtime.Engine(make_config()))
    with pytest.raises(TypeError, match=r"memory must be a wasmtime.Memory"):
        linmem.wasmtime.linear_memory(store, bad)
    with pytest.raises(TypeError, match=r"memory_type must be a wasmtime.MemoryType"):
        linmem.wasmtime.new_memory(store, bad)


# -- the installer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, 7, "config", object()])
def test_none_as_config_is_a_type_error(bad):
    with pytest.raises(TypeError, match=r"config must be a wasmtime.Config"):
        linmem.wasmtime.install(bad)


def test_none_as_creator_is_a_type_error():
    with pytest.raises(TypeError, match="creator must be a MemoryCreator, got int"):
        linmem.wasmtime.install(wasmtime.Config(), 7)


def test_a_config_that_an_engine_took_is_refused():
    config = wasmtime.Config()
    wasmtime.Engine(config)
    with pytest.raises(ValueError, match="given to an Engine already"):
        linmem.wasmtime.install(config)


def test_a_wasmtime_without_the_entry_point_is_refused(monkeypatch):
    linmem._wasm.install._bind.cache_clear()
    monkeypatch.setattr(linmem._wasm.install, "_NEEDED", (*linmem._wasm.install._NEEDED, "wasmtime_no_such_function"))
    with pytest.raises(RuntimeError, match="wasmtime_no_such_function missing"):
        linmem.wasmtime.install(wasmtime.Config())


def test_the_second_install_on_a_config_replaces_the_first():
    first, second = (linmem.StatisticsCreator(linmem.MmapCreator()) for _ in range(2))
    config = wasmtime.Config()
    linmem.wasmtime.install(config, first)
    linmem.wasmtime.install(config, second)
    gone = weakref.ref(first)
    del first
    gc.collect()
    assert gone() is None
    store = wasmtime.Store(wasmtime.Engine(config))
    linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
    assert second.statistics()["total_count"] == 1


@pytest.mark.parametrize("with_engine", [False, True])
def test_a_creator_is_kept_exactly_as_long_as_the_config_or_its_engine(with_engine):
    creator = linmem.StatisticsCreator(linmem.MmapCreator())
    alive = weakref.ref(creator)
    holder = make_config(creator)
    if with_engine:
        holder = wasmtime.Engine(holder)
    del creator
    gc.collect()
    assert alive() is not None
    holder.close()
    gc.collect()
    assert alive() is None


# -- ownership ----------------------------------------------------------------------------------------------


def test_a_view_outlives_the_store_the_engine_and_the_handle():
    store, exports = instantiate(GROWING.format(limits="1"))
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    array = np.asarray(memory)
    assert memory.info().owner == "wasmtime"
    store.close()
    assert memory.info().owner == "python"
    del memory, exports, store
    gc.collect()
    assert bytes(array[16:21]) == b"hello"
    array[0] = 1


def test_python_may_not_grow_a_memory_of_a_store_and_closes_only_its_own_handle():
    store, exports = instantiate(GROWING.format(limits="1"))
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    with pytest.raises(linmem.OwnedError, match=r"wasmtime.Memory.grow\(store, delta\)"):
        memory.grow_to(2 * PAGE)
    with linmem.wasmtime.linear_memory(store, exports["memory"]) as other:
        assert other == memory
    assert other.closed
    assert not memory.closed
    memory.write(7, b"x")
    with memoryview(memory), pytest.raises(BufferError, match="1 exported buffer"):
        memory.close()
    memory.close()
    assert memory.closed
    assert exports["grow"](store, 1) == 1
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    assert (memory.byte_size(), memory[7]) == (2 * PAGE, ord("x"))
    store.close()
    memory.grow_to(3 * PAGE)
    memory.close()


def test_a_with_block_on_a_memory_of_a_store_may_leave_a_view_behind():
    store, exports = instantiate(GROWING.format(limits="1"))
    with linmem.wasmtime.linear_memory(store, exports["memory"]) as memory:
        view = memoryview(memory)
    assert memory.closed
    view[5] = 5
    assert linmem.wasmtime.linear_memory(store, exports["memory"])[5] == 5
    store.close()
    assert view[5] == 5


def test_two_handles_on_one_memory_are_closed_apart():
    store, exports = instantiate(GROWING.format(limits="1"))
    one, two = (linmem.wasmtime.linear_memory(store, exports["memory"]) for _ in range(2))
    assert one.as_ptr() == two.as_ptr()
    store.close()
    one.close()
    assert two.read(16, 5) == b"hello"
    two.close()


def test_engine_store_module_and_views_may_be_freed_in_any_order():
    import itertools

    for order in itertools.permutations(range(5)):
        config = make_config()
        engine = wasmtime.Engine(config)
        store = wasmtime.Store(engine)
        module = wasmtime.Module(engine, GROWING.format(limits="1"))
        exports = wasmtime.Instance(store, module, []).exports(store)
        memory = linmem.wasmtime.linear_memory(store, exports["memory"])
        things = [engine, store, module, memory, np.asarray(memory)]
        del config, engine, store, module, exports, memory
        for i in order:
            things[i] = None
        gc.collect()


def test_everything_may_be_dropped_on_another_thread():
    store, exports = instantiate(GROWING.format(limits="1"))
    things = [store, exports, linmem.wasmtime.linear_memory(store, exports["memory"])]
    del store, exports
    thread = threading.Thread(target=things.clear)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert things == []


def test_threads_with_a_store_each_share_an_engine_and_a_budget():
    budget = linmem.LimitingCreator(linmem.MmapCreator(), 4 * 8 * 40 * PAGE)
    engine = wasmtime.Engine(make_config(budget))
    module = wasmtime.Module(engine, GROWING.format(limits="1"))
    errors = []

    def work(mark):
        try:
            for _ in range(30):
                store = wasmtime.Store(engine)
                exports = wasmtime.Instance(store, module, []).exports(store)
                memory = linmem.wasmtime.linear_memory(store, exports["memory"])
                exports["store"](store, 100, mark)
                assert exports["grow"](store, 30) == 1
                assert memory[100] == mark
                assert memory[30 * PAGE] == 0
                memory[30 * PAGE] = mark
                assert exports["load"](store, 30 * PAGE) == mark
                store.close()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i + 1,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    gc.collect()
    assert budget.used_bytes == 0
    assert budget.peak_bytes >= 31 * PAGE


# -- refusals on the way up ---------------------------------------------------------------------------------


def test_a_budget_refuses_growth_in_wasm_and_creation_with_its_figures():
    budget = linmem.LimitingCreator(linmem.MmapCreator(), 10 * PAGE)
    store, exports = instantiate(GROWING.format(limits="4"), budget)
    assert exports["grow"](store, 7) == -1
    assert budget.used_bytes == 4 * PAGE
    assert exports["grow"](store, 6) == 4
    assert budget.used_bytes == 10 * PAGE
    with pytest.raises(wasmtime.WasmtimeError, match=f"limit of {10 * PAGE} bytes reached: {10 * PAGE} in use and"
                                                     f" {PAGE} more asked for"):
        linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, 2)))
    store.close()
    assert budget.used_bytes == 0


def test_the_tightest_of_nested_budgets_decides_and_the_others_are_refunded():
    outer = linmem.LimitingCreator(linmem.LimitingCreator(linmem.MmapCreator(), 5 * PAGE), 9 * PAGE)
    store, exports = instantiate(GROWING.format(limits="2"), outer)
    assert exports["grow"](store, 4) == -1
    assert outer.used_bytes == outer.upstream.used_bytes == 2 * PAGE
    assert exports["grow"](store, 3) == 2
    store.close()
    assert outer.used_bytes == outer.upstream.used_bytes == 0


class Flaky(linmem.MemoryCreator):
    """Fails on the calls with the given numbers."""

    def __init__(self, *failing):
        self.failing = failing
        self.calls = 0

    def new_memory(self, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes):
        self.calls += 1
        if self.calls in self.failing:
            raise LookupError(f"call {self.calls} of {minimum} bytes, señor")
        return linmem.MmapCreator().new_memory(ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes)


def test_an_exception_of_a_python_creator_arrives_through_wasmtime_with_its_text():
    budget = linmem.LimitingCreator(linmem.PythonCreator(Flaky(2)), 1 << 30)
    engine = wasmtime.Engine(make_config(budget))
    module = wasmtime.Module(engine, GROWING.format(limits="1"))
    store = wasmtime.Store(engine)
    wasmtime.Instance(store, module, [])
    with pytest.raises(wasmtime.WasmtimeError, match="LookupError: call 2 of 65536 bytes, señor"):
        wasmtime.Instance(store, module, [])
    assert budget.used_bytes == PAGE
    wasmtime.Instance(store, module, [])
    assert budget.used_bytes == 2 * PAGE
    store.close()
    assert budget.used_bytes == 0


class Plain(linmem.LinearMemory):
    """A linear memory in Python over one of linmem's memories that refuses to grow past `most`."""

    def __init__(self, memory, most):
        self.memory = memory
        self.most = most

    def byte_size(self):
        return self.memory.byte_size()

    def byte_capacity(self):
        return self.memory.byte_capacity()

    def grow_to(self, new_size):
        if new_size > self.most:
            raise RuntimeError(f"no more than {self.most}")
        self.memory.grow_to(new_size)

    def as_ptr(self):
        return self.memory.as_ptr()

    def wasm_accessible(self):
        return self.memory.wasm_accessible()


class PlainCreator(linmem.MemoryCreator):
    def __init__(self):
        self.made = []
        self.asked = []

    def new_memory(self, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes):
        self.asked.append((ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes))
        memory = linmem.MmapCreator().new_memory(ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes)
        plain = Plain(memory, 4 * PAGE)
        self.made.append(weakref.ref(plain))
        return plain


def test_wasm_runs_in_a_memory_written_in_python():
    creator = PlainCreator()
    store, exports = instantiate(GROWING.format(limits="1 8"), creator, memory_reservation=1 << 20,
                                 memory_guard_size=PAGE, tune=False)
    ty, minimum, maximum, reserved, guard = creator.asked[0]
    assert ty == linmem.MemoryType(1, 8)
    assert (minimum, maximum, reserved, guard) == (PAGE, 8 * PAGE, 1 << 20, PAGE)
    assert exports["grow"](store, 3) == 1
    assert exports["grow"](store, 1) == -1
    exports["store"](store, 4 * PAGE - 1, 5)
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    assert memory.info().kind == "python"
    assert memory[4 * PAGE - 1] == 5
    with pytest.raises(wasmtime.Trap):
        exports["load"](store, 4 * PAGE)
    assert creator.made[0]() is not None
    store.close()
    del memory
    gc.collect()
    assert creator.made[0]() is None


class Liar(Plain):
    def wasm_accessible(self):
        return range(self.as_ptr(), self.as_ptr() + self.byte_size())


def test_a_python_memory_that_does_not_cover_its_guard_never_reaches_wasm():
    class LyingCreator(linmem.MemoryCreator):
        def new_memory(self, *arguments):
            return Liar(linmem.MmapCreator().new_memory(*arguments), 1 << 30)

    with pytest.raises(wasmtime.WasmtimeError, match=r"ValueError: Liar.wasm_accessible\(\) must cover"):
        instantiate(GROWING.format(limits="1"), LyingCreator())


def test_handles_on_one_memory_are_equal_and_of_one_hash():
    store, exports = instantiate(GROWING.format(limits="1"))
    other, others = instantiate(GROWING.format(limits="1"))
    one, two = (linmem.wasmtime.linear_memory(store, exports["memory"]) for _ in range(2))
    assert one is not two
    assert one == two
    assert len({one, two}) == 1
    assert one != linmem.wasmtime.linear_memory(other, others["memory"])
    two.close()
    assert one != two
    assert one == linmem.wasmtime.linear_memory(store, exports["memory"])
    store.close()
    other.close()


def test_new_memory_keeps_only_the_few_modules_that_were_used_last(monkeypatch):
    config = wasmtime.Config()
    linmem.wasmtime.install(config)
    engine = wasmtime.Engine(config)
    compiled = []

    class Module(wasmtime.Module):
        def __init__(self, engine, wat):
            compiled.append(wat)
            super().__init__(engine, wat)

    monkeypatch.setattr(linmem.wasmtime.wasmtime, "Module", Module)
    store = wasmtime.Store(engine)

    def make(n):
        before = len(compiled)
        memory = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(0, n)))
        assert memory.size(store) == 0
        return len(compiled) - before

    most = linmem.wasmtime._MAX_MODULES
    assert sum(make(n) for n in range(40)) == 40
    assert len(linmem.wasmtime._modules[engine]) == most
    assert [make(39), make(40 - most), make(39 - most)] == [0, 0, 1]
    assert make(40 - most) == 0             # this module was used last
    store.close()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_prepared_modules_and_snapshots_of_other_modules_say_that_they_cannot_be_pickled_or_copied(duplicate):
    config = wasmtime.Config()
    linmem.wasmtime.install(config)
    engine = wasmtime.Engine(config)
    store = wasmtime.Store(engine)
    text = '(module (memory (export "m") 1) (data (i32.const 0) "x"))'
    with pytest.raises(TypeError, match=r"^a Prepared cannot be pickled or copied: "):
        duplicate(linmem.wasmtime.prepare(engine, text))
    instance = wasmtime.Instance(store, wasmtime.Module(engine, text), [])
    with pytest.raises(ValueError, match=r"^the snapshot cannot leave the store .* not made by prepare"):
        duplicate(linmem.wasmtime.Snapshot.take(store, instance))
    store.close()
