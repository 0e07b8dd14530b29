"""New instances from a snapshot: prepared.instantiate(start=), in any store of any engine."""

import gc
import hashlib
import random
import re
import threading
import weakref
from collections import Counter

import pytest
import wasmtime
from hypothesis import example, given
from hypothesis import strategies as st
from support import FORKING, answer, failing, fewer_examples, requires
from test_guests import KNOWN, RESERVATIONS, Program, guests
from test_guests import Guest as GeneratedGuest
from test_hoist import HAS_ONE_HANDLE, binary, needs_gc, needs_page_sizes, number, table
from test_prepare import CREATORS, engine_of, with_every_creator

import linmem.wasmtime
from linmem._wasm.state import NULL, GlobalState, MemoryState, Reference, TableState
from linmem.wasmtime import Snapshot, prepare

PAGE = 65536
ENGINE = engine_of()
OTHER = engine_of()

# Counts how often its start function has run, in a hidden global and in its memory.
COUNTER = """(module (memory (export "m") 1 10) (global $n (mut i32) (i32.const 0)) (data (i32.const 0) "seed")
  (func $count (global.set $n (i32.add (global.get $n) (i32.const 1))) (i32.store (i32.const 8) (global.get $n)))
  (start $count)
  (func (export "count") (call $count)) (func (export "n") (result i32) (global.get $n))
  (func (export "set") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
  (func (export "get") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "size") (result i32) (memory.size))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))"""


class Guest:
    """An instance and its store."""

    def __init__(self, prepared, engine=ENGINE, imports=(), store=None, **how):
        self.store = wasmtime.Store(engine) if store is None else store
        self.instance = prepared.instantiate(self.store, imports, **how)

    def call(self, name, *args):
        return self.instance.exports(self.store)[name](self.store, *args)

    def take(self, **how):
        return Snapshot.take(self.store, self.instance, **how)

    def outcome(self, name, *args):
        """The result, or the kind of the trap."""
        try:
            return self.call(name, *args)
        except wasmtime.Trap as trap:
            return trap.trap_code

    def content(self, name="m"):
        return bytes(self.instance.exports(self.store)[name].read(self.store))


# -- the same state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("other", CREATORS)
@pytest.mark.parametrize("kind", ["mmap", "pool"])
def test_an_instance_starts_with_the_memory_and_the_globals_of_the_snapshot(kind, other):
    engine, second = engine_of(kind), engine_of(other)
    guest = Guest(prepare(engine, COUNTER, expose=True), engine)
    guest.call("count")
    guest.call("set", 1, 120)
    assert guest.call("grow", 2) == 1
    guest.call("set", 3 * PAGE - 1, 7)
    snapshot = guest.take()
    assert snapshot.unseen == ()
    expected = guest.content()
    guest.call("set", 0, 255)
    prepared = prepare(second, COUNTER, expose=True)
    guests = [Guest(prepared, second, start=snapshot) for _ in range(3)]
    for turn, started in enumerate(guests):
        assert started.call("n") == 2                   # the start function did not run again
        assert started.call("size") == 3
        assert started.content() == expected
        started.call("set", 100, turn + 1)
        assert started.call("grow", 7) == 3
        assert started.call("get", 10 * PAGE - 1) == 0
        assert started.call("grow", 1) == -1
    assert [started.call("get", 100) for started in guests] == [1, 2, 3]


def test_the_snapshot_outlives_its_store_and_its_engine():
    engine = engine_of("pool")
    guest = Guest(prepare(engine, COUNTER, expose=True), engine)
    guest.call("count")
    snapshot = guest.take()
    guest.store.close()
    gone = weakref.ref(engine)
    del guest, engine
    gc.collect()
    assert gone() is None
    started = Guest(prepare(ENGINE, COUNTER, expose=True), start=snapshot)
    assert (started.call("n"), started.call("get", 8)) == (2, 2)


def test_a_started_instance_can_be_held_and_restored_like_any_other():
    prepared = prepare(ENGINE, COUNTER, expose=True)
    first = Guest(prepared).take()
    guest = Guest(prepared, start=first)
    guest.call("count")
    second = guest.take()
    last = Guest(prepare(OTHER, COUNTER, expose=True), OTHER, start=second)
    assert last.call("n") == 2
    for snapshot, count in ((first, 1), (second, 2), (first, 1)):
        for each in (guest, last):
            each.call("count")
            each.call("set", 0, 0)
            snapshot.restore(each.store, each.instance)
            assert (each.call("n"), each.call("get", 8), each.call("get", 0)) == (count, count, ord("s"))
    guest.call("count")
    second.restore(guest.store)
    assert guest.call("n") == 2


NUMBERS = {"i32": "(i32.const 5)", "i64": "(i64.const -6)", "f32": "(f32.const nan:0x200001)",
           "f64": "(f64.const -nan:0x4000000000001)", "v128": "(v128.const i64x2 1 2)"}


@pytest.mark.parametrize("exported", [False, True])
def test_globals_of_every_type_travel_bit_by_bit(exported):
    kinds = list(NUMBERS)
    names = [f'(export "g{kind}")' if exported else "" for kind in kinds]
    wat = f"""(module (memory (export "m") 1)
        {"".join(f'(global ${kind} {name} (mut {kind}) {value})'
                 for (kind, value), name in zip(NUMBERS.items(), names, strict=True))}
        {"".join(f'(global $c{kind} {kind} {value})' for kind, value in NUMBERS.items())}
        (func (export "show") {"".join(f'({kind}.store (i32.const {16 * i}) (global.get ${kind}))'
                                       for i, kind in enumerate(kinds))})
        (func (export "change") (global.set $i32 (i32.const 0x12345678)) (global.set $i64 (i64.const 0x123456789abcdef))
          (global.set $f32 (f32.reinterpret_i32 (i32.const 0x7fa00001)))
          (global.set $f64 (f64.reinterpret_i64 (i64.const 0xfff4000000000001)))
          (global.set $v128 (v128.const i64x2 0xffffffffffffffff 0x8000000000000001))))"""
    guest = Guest(prepare(ENGINE, wat, expose=True))
    guest.call("change")
    snapshot = guest.take()
    guest.call("show")
    started = Guest(prepare(OTHER, wat, expose=not exported), OTHER, start=snapshot)
    started.call("show")
    assert started.content() == guest.content()
    assert started.content()[:32:16] == b"\x78\xef"
    assert {each.kind: len(each.value) for each in snapshot._state.globals} == {
        "i32": 4, "i64": 8, "f32": 4, "f64": 8, "v128": 16}


MEMORIES = """(module (memory (export "a") 1 5) (memory (export "b") i64 2) (memory (export "c") 0 4)
  (memory (export "d") 3 3) (memory (export "e") 0) (memory 1)
  (data (memory 0) (i32.const 5) "aaa") (data (memory 1) (i64.const 70000) "bbb")
  (func (export "work") (drop (memory.grow 0 (i32.const 2))) (drop (memory.grow 1 (i64.const 3)))
    (drop (memory.grow 2 (i32.const 4))) (i32.store8 0 (i32.const 100000) (i32.const 1))
    (i64.store 1 (i64.const 300000) (i64.const -1)) (i32.store 2 (i32.const 262140) (i32.const 5)))
  (func (export "sizes") (result i32 i64 i32 i32 i32)
    (memory.size 0) (memory.size 1) (memory.size 2) (memory.size 3) (memory.size 4)))"""


@with_every_creator
def test_several_memories_start_each_with_its_size_and_content(kind):
    engine = engine_of(kind)
    wat = MEMORIES
    guest = Guest(prepare(engine, wat, expose=True), engine)
    guest.call("work")
    snapshot = guest.take()
    started = Guest(prepare(engine, wat, expose=True), engine, start=snapshot)
    assert started.call("sizes") == guest.call("sizes") == [3, 5, 4, 3, 0]
    for name in "abcde":
        assert started.content(name) == guest.content(name)
    assert bytes(started.content("c")[-4:]) == b"\5\0\0\0"


@needs_page_sizes
@with_every_creator
def test_memories_with_pages_of_one_byte_start_with_their_exact_size(kind):
    engine = engine_of(kind)
    wat = """(module (memory (export "m") 5 5000 (pagesize 1)) (data (i32.const 1) "odd")
        (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
        (func (export "size") (result i32) (memory.size))
        (func (export "set") (param i32) (i32.store8 (local.get 0) (i32.const 9)))
        (func (export "get") (param i32) (result i32) (i32.load8_u (local.get 0))))"""
    guest = Guest(prepare(engine, wat, expose=True), engine)
    assert guest.call("grow", 4096) == 5
    guest.call("set", 4100)
    started = Guest(prepare(engine, wat), engine, start=guest.take())
    assert started.call("size") == 4101
    assert started.content() == guest.content()
    assert started.outcome("get", 4101) == wasmtime.TrapCode.MEMORY_OUT_OF_BOUNDS
    assert started.call("grow", 899) == 4101
    assert started.call("grow", 1) == -1
    assert started.call("get", 4101) == 0


@pytest.mark.skipif(not hasattr(wasmtime, "SharedMemory"), reason="no shared memories here")
@pytest.mark.parametrize("kind", ["mmap", "limiting"])
def test_shared_memories_start_from_a_snapshot(kind):
    engine = engine_of(kind)
    wat = COUNTER.replace("1 10)", "1 10 shared)")
    guest = Guest(prepare(engine, wat, expose=True), engine)
    assert guest.call("grow", 2) == 1
    guest.call("set", 2 * PAGE, 4)
    guest.call("count")
    snapshot = guest.take()
    for _ in range(3):
        started = Guest(prepare(engine, wat, expose=True), engine, start=snapshot)
        assert [started.call(*call) for call in (("n",), ("size",), ("get", 2 * PAGE), ("get", 0))] == [2, 3, 4, 115]
        assert started.call("grow", 1) == 3
        started.call("set", 0, 1)


@pytest.mark.skipif(not hasattr(wasmtime, "SharedMemory"), reason="no shared memories here")
@pytest.mark.parametrize("page", [pytest.param(1, marks=needs_page_sizes), PAGE])
def test_a_shared_memory_without_pages_starts_with_the_pages_of_the_snapshot(page):
    engine = engine_of()
    wat = COUNTER.replace("1 10)", f"0 10 shared{' (pagesize 1)' * (page == 1)})")
    for part in ('(data (i32.const 0) "seed")', "(i32.store (i32.const 8) (global.get $n))"):
        wat = wat.replace(part, "")
    prepared = prepare(engine, wat, expose=True)
    guest = Guest(prepared, engine)
    assert guest.call("grow", 7) == 0
    guest.call("set", 6 * page, 4)
    snapshot = guest.take()
    started = Guest(prepared, engine, start=snapshot)
    assert [started.call(*call) for call in (("size",), ("get", 6 * page), ("grow", 3), ("grow", 1))] == [7, 4, 7, -1]


@pytest.mark.parametrize("segments", [
    '(data (i32.const 0) "seed")', '(data (global.get 0) "far") (data (i32.const 2) "near")',
    '(data (i32.add (i32.const 1) (i32.const 2)) "sum")', '(data (i32.const 0) "")', '(data (global.get 0) "")',
    '(data "passive") (data (i32.const 7) "active")'])
def test_no_data_segment_of_the_module_overwrites_the_state(segments):
    wat = f"""(module (import "e" "g" (global i32)) (memory (export "m") 1) {segments}
        (func (export "clear") (memory.fill (i32.const 0) (i32.const 1) (i32.const 100))))"""
    prepared = prepare(ENGINE, wat, expose=True)
    store = wasmtime.Store(ENGINE)
    guest = Guest(prepared, store=store, imports=[number(store, 50)])
    guest.call("clear")
    snapshot = guest.take()
    store = wasmtime.Store(ENGINE)
    started = Guest(prepared, store=store, imports=[number(store, 30)], start=snapshot)
    assert started.content() == guest.content() == b"\1" * 100 + bytes(PAGE - 100)


def test_passive_segments_keep_their_content_and_active_ones_are_dropped():
    wat = """(module (memory (export "m") 1) (data (i32.const 0) "active") (data "passive") (func $f)
        (start $f) (table (export "t") 4 funcref) (elem (i32.const 0) $f) (elem func $f $f)
        (func (export "memory") (param i32) (memory.init 1 (i32.const 9) (i32.const 0) (local.get 0)))
        (func (export "gone") (param i32) (memory.init 0 (i32.const 9) (i32.const 0) (local.get 0)))
        (func (export "table") (param i32) (table.init 1 (i32.const 2) (i32.const 0) (local.get 0)))
        (func (export "emptied") (param i32) (table.init 0 (i32.const 2) (i32.const 0) (local.get 0))))"""
    prepared = prepare(ENGINE, wat, expose=True)
    guest = Guest(prepared)
    snapshot = guest.take()
    assert snapshot.unseen == ()
    started = Guest(prepared, start=snapshot)
    for name in ("memory", "gone", "table", "emptied"):
        for size in (0, 1, 2, 8):
            assert started.outcome(name, size) == guest.outcome(name, size)
    assert started.content() == guest.content()
    assert started.content()[9:11] == b"pa"


# -- no code runs, and one more compilation ----------------------------------------------------------


def test_no_fuel_is_used_and_no_deadline_is_checked():
    engine = engine_of(consume_fuel=True, epoch_interruption=True)
    wat = COUNTER.replace('(data', '(data (i32.const 99) "") (table 3 funcref) (elem (i32.const 0) $count) (data')
    prepared = prepare(engine, wat, expose=True)
    store = wasmtime.Store(engine)
    store.set_fuel(1000)
    store.set_epoch_deadline(1)
    guest = Guest(prepared, store=store)
    guest.call("grow", 3)
    snapshot = guest.take()
    store = wasmtime.Store(engine)      # no fuel, and a deadline that is met already
    store.set_fuel(0)
    store.set_epoch_deadline(0)
    engine.increment_epoch()
    started = Guest(prepared, store=store, start=snapshot)
    assert store.get_fuel() == 0
    store.set_fuel(100)
    store.set_epoch_deadline(10)
    assert started.call("n") == 1


def test_element_segments_of_imported_tables_and_of_unknown_places_use_no_fuel():
    engine = engine_of(consume_fuel=True, epoch_interruption=True)
    wat = """(module (import "e" "t" (table 4 funcref)) (import "e" "g" (global i32)) (table 9 funcref)
        (memory (export "m") 1) (func $f (result i32) (i32.const 5)) (elem (i32.const 1) $f)
        (elem (table 1) (global.get 0) func $f) (elem (table 1) (i32.const 0) funcref (ref.func $f) (ref.null func))
        (func (export "set") (table.set 1 (i32.const 2) (ref.func $f)))
        (func (export "call") (param i32) (result i32) (call_indirect 1 (result i32) (local.get 0))))"""
    prepared = prepare(engine, wat, expose=True)
    store = wasmtime.Store(engine)
    store.set_fuel(1000)
    store.set_epoch_deadline(1)
    guest = Guest(prepared, store=store, imports=[table(store), number(store, 3)])
    guest.call("set")
    snapshot = guest.take()
    store = wasmtime.Store(engine)
    store.set_fuel(0)
    store.set_epoch_deadline(0)
    engine.increment_epoch()
    # The element at the imported place 3 is the snapshot's, and not the new instance's place 6.
    started = Guest(prepared, store=store, imports=[table(store), number(store, 6)], start=snapshot)
    store.set_fuel(1000)
    store.set_epoch_deadline(9)
    null = wasmtime.TrapCode.INDIRECT_CALL_TO_NULL
    assert [started.outcome("call", index) for index in range(9)] == [5, null, 5, 5, null, null, null, null, null]


def test_an_instance_starts_inside_of_a_host_function():
    prepared = prepare(ENGINE, COUNTER, expose=True)
    guest = Guest(prepared)
    guest.call("grow", 1)
    snapshot = guest.take()
    made = []
    store = wasmtime.Store(ENGINE)
    host = wasmtime.Func(store, wasmtime.FuncType([], []), lambda caller: made.append(
        prepared.instantiate(caller, start=snapshot)), access_caller=True)
    caller = wasmtime.Module(ENGINE, '(module (import "e" "f" (func $f)) (func (export "call") (call $f)))')
    wasmtime.Instance(store, caller, [host]).exports(store)["call"](store)
    assert made[0].exports(store)["size"](store) == 2
    store.close()       # breaks a cycle


@needs_gc
def test_a_module_that_allocates_objects_starts_with_its_memories():
    wat = """(module (type $s (struct (field i32))) (global $g (ref $s) (struct.new $s (i32.const 7)))
        (memory (export "a") 0 5) (memory (export "m") 1 5) (data (memory 1) (i32.const 0) "data")
        (func (export "grow") (drop (memory.grow 0 (i32.const 2))) (drop (memory.grow 1 (i32.const 1)))
          (i32.store8 0 (i32.const 70000) (i32.const 1)))
        (func (export "get") (result i32) (struct.get $s 0 (global.get $g)))
        (func (export "new") (result i32) (struct.get $s 0 (struct.new $s (i32.load8_u 0 (i32.const 70000))))))"""
    prepared = prepare(ENGINE, wat, expose=True)
    guest = Guest(prepared)
    guest.call("grow")
    started = Guest(prepared, start=guest.take())
    assert (started.call("new"), started.call("get")) == (1, 7)
    for name in "am":
        assert started.content(name) == guest.content(name)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(("wat", "modules"), [(COUNTER, 2), (COUNTER.replace("(start $count)", ""), 1)])
def test_the_module_is_compiled_at_most_once_more(monkeypatch, tmp_path, wat, modules, cached):
    prepare(ENGINE, "(module)")         # prepare() tries an engine once, with a module of its own
    compiled = []

    class Module(wasmtime.Module):
        def __init__(self, engine, wasm):
            compiled.append(wasm)
            super().__init__(engine, wasm)

    monkeypatch.setattr(wasmtime, "Module", Module)
    how = {"cache": tmp_path} if cached else {}
    wasm = binary(wat)
    for turn in range(2):
        compiled.clear()
        prepared = prepare(ENGINE, wasm, expose=True, **how)
        guest = Guest(prepared)
        snapshots = [guest.take(), guest.take()]
        assert len(compiled) == (not cached or turn == 0)
        for snapshot in snapshots * 2:
            assert Guest(prepared, start=snapshot).content() == guest.content()
        assert len(compiled) == (modules if not cached or turn == 0 else 0)
        assert prepared.digest == hashlib.sha256(wasm).hexdigest()


def test_threads_that_start_the_first_instances_compile_the_module_once(monkeypatch):
    prepared = prepare(ENGINE, COUNTER, expose=True)
    snapshot = Guest(prepared).take()
    compiled = []
    made = wasmtime.Module

    class Module(made):
        def __init__(self, engine, wasm):
            compiled.append(wasm)
            super().__init__(engine, wasm)

    monkeypatch.setattr(wasmtime, "Module", Module)
    found = []
    barrier = threading.Barrier(8)

    def work():
        barrier.wait()
        for turn in range(20):
            guest = Guest(prepared, start=snapshot)
            guest.call("count")
            guest.call("set", 100, turn)
            found.append((guest.call("n"), guest.call("get", 100) - turn, guest.call("get", 0)))
            guest.store.close()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [(2, 0, ord("s"))] * 160
    assert len(compiled) == 1


# -- sizes -------------------------------------------------------------------------------------------


def test_the_limits_of_the_store_hold_for_the_size_in_the_snapshot():
    prepared = prepare(ENGINE, COUNTER, expose=True)
    guest = Guest(prepared)
    guest.call("grow", 3)
    snapshot = guest.take()
    store = wasmtime.Store(ENGINE)
    store.set_limits(memory_size=3 * PAGE)
    with pytest.raises(linmem.GrowError, match="memory 'm' cannot get the 262144 bytes that it has in the snapshot"):
        Guest(prepared, store=store, start=snapshot)
    store = wasmtime.Store(ENGINE)
    store.set_limits(memory_size=4 * PAGE)
    started = Guest(prepared, store=store, start=snapshot)
    assert started.call("size") == 4
    assert started.call("grow", 1) == -1
    store = wasmtime.Store(ENGINE)
    store.set_limits(memory_size=PAGE - 1)
    with pytest.raises(wasmtime.WasmtimeError):
        Guest(prepared, store=store, start=snapshot)


def test_a_budget_is_charged_for_the_size_in_the_snapshot():
    config = wasmtime.Config()
    creator = linmem.creator("limiting", limit_bytes=10 * PAGE)
    linmem.wasmtime.install(config, creator)
    engine = wasmtime.Engine(config)
    prepared = prepare(engine, COUNTER, expose=True)
    guest = Guest(prepared, engine)
    guest.call("grow", 3)
    snapshot = guest.take()
    guest.store.close()
    guests = [Guest(prepared, engine, start=snapshot) for _ in range(2)]
    with pytest.raises(wasmtime.WasmtimeError, match="limit of 655360 bytes reached: 524288 in use and 262144 more"):
        Guest(prepared, engine, start=snapshot)
    assert creator.used_bytes == 8 * PAGE
    assert guests[0].call("grow", 3) == -1
    assert guests[0].call("grow", 2) == 4
    for each in guests:
        each.store.close()
    del guests, each
    assert creator.used_bytes == 0


def changed(snapshot, **fields):
    return Snapshot._from_state(snapshot._state._replace(**fields))


def test_a_state_that_does_not_fit_the_module_is_refused_before_an_instance_is_made():
    wat = COUNTER.replace("(memory", '(table (export "t") 2 5 funcref) (global i32 (i32.const 1)) (memory', 1)
    prepared = prepare(ENGINE, wat, expose=True)
    snapshot = Guest(prepared).take()
    image = snapshot.memories["m"]
    larger = linmem.Image.from_bytes(bytes(11 * PAGE))
    bad = [{"memories": (MemoryState(*each),)} for each in (
        (1, PAGE, image), (-1, PAGE, image), (0, PAGE + 1, image), (0, 0, image), (0, PAGE - 1, image),
        (0, PAGE, larger))]
    bad += [{"globals": (GlobalState(*each),)} for each in (
        (0, "i32", bytes(4)), (2, "i32", bytes(4)), (1, "i64", bytes(8)), (1, "i32", bytes(8)), (1, "null", NULL))]
    bad += [{"tables": (TableState(*each),)} for each in (
        (1, 2), (0, 1), (0, 2, ((2, NULL),)), (0, 2, ((-1, NULL),)))]
    creators = wasmtime.Store(ENGINE)
    for fields in bad:
        with pytest.raises(ValueError, match="the snapshot has"):
            Guest(prepared, store=creators, start=changed(snapshot, **fields))
    guest = Guest(prepared)
    guest.call("set", 0, 9)
    bad += [{"memories": (MemoryState(0, 11 * PAGE, image),)},          # beyond the maximum
            {"tables": (TableState(0, 6, tuple((index, NULL) for index in range(2, 6))),)},
            {"tables": (TableState(0, 3),)}, {"tables": (TableState(0, 1 << 60),)}]    # not listed
    for fields in bad:
        with pytest.raises(ValueError, match="the snapshot has"):
            changed(snapshot, **fields).restore(guest.store, guest.instance)
        with pytest.raises(ValueError, match="the snapshot has"):
            Guest(prepared, start=changed(snapshot, **fields))
    assert guest.call("get", 0) == 9
    for reference in (Reference("export", "none"), Reference("export", "m"), Reference("element", segment=7)):
        with pytest.raises(ValueError, match="which the module does not name"):
            Guest(prepared, start=changed(snapshot, tables=(TableState(0, 2, ((0, reference),)),)))


def test_the_limit_of_the_store_holds_for_the_elements_of_a_table():
    wat = """(module (table (export "t") 2 funcref) (func (export "grow") (drop (table.grow 0 (ref.null func)
        (i32.const 3)))))"""
    prepared = prepare(ENGINE, wat, expose=True)
    guest = Guest(prepared)
    guest.call("grow")
    snapshot = guest.take()
    for limit, accepted in ((5, True), (4, False)):
        store = wasmtime.Store(ENGINE)
        store.set_limits(table_elements=limit)
        if accepted:
            assert Guest(prepared, store=store, start=snapshot).instance.exports(store)["t"].size(store) == 5
        else:
            with pytest.raises(linmem.GrowError, match="table 't' cannot get the 5 elements that it has in the"):
                Guest(prepared, store=store, start=snapshot)


# -- what is refused ---------------------------------------------------------------------------------


def test_a_snapshot_of_another_module_is_refused_by_name():
    prepared, other = prepare(ENGINE, COUNTER, expose=True), prepare(ENGINE, COUNTER + " ", expose=True)
    assert prepared.digest == other.digest
    other = prepare(ENGINE, COUNTER.replace("seed", "seat"), expose=True)
    snapshot = Guest(prepared).take()
    assert snapshot.module == prepared.digest
    with pytest.raises(ValueError, match=f"{prepared.digest[:16]}.*{other.digest[:16]}"):
        Guest(other, start=snapshot)
    guest = Guest(other)
    with pytest.raises(ValueError, match=f"{prepared.digest[:16]}.*{other.digest[:16]}"):
        snapshot.restore(guest.store, guest.instance)
    with pytest.raises(TypeError, match="start must be a Snapshot, got str"):
        Guest(prepared, start="snapshot")


def test_a_module_that_hides_state_of_the_snapshot_is_refused():
    snapshot = Guest(prepare(ENGINE, COUNTER, expose=True)).take()
    hiding = prepare(ENGINE, COUNTER)
    with pytest.raises(ValueError, match=r"global 0, which the module does not export.*expose=True"):
        Guest(hiding, start=snapshot)
    guest = Guest(hiding)
    with pytest.raises(ValueError, match="expose=True"):
        snapshot.restore(guest.store, guest.instance)
    partial = guest.take(partial=True)
    assert partial.unseen == ("mutable global 0",)
    guest.call("set", 0, 1)
    started = Guest(hiding, start=partial)
    assert (started.call("n"), started.call("get", 8)) == (0, 1)        # the rest is as in the module
    open_module = COUNTER.replace("$n (mut", '$n (export "g") (mut')
    assert Guest(prepare(ENGINE, open_module), start=Guest(prepare(ENGINE, open_module)).take()).call("n") == 1


def test_a_snapshot_of_a_module_that_was_not_prepared_stays_in_its_store():
    store = wasmtime.Store(ENGINE)
    snapshot = Snapshot.take(store, wasmtime.Instance(store, wasmtime.Module(ENGINE, COUNTER), []))
    prepared = prepare(ENGINE, COUNTER, expose=True)
    guest = Guest(prepared)
    assert snapshot.module is None
    for action in (lambda: Guest(prepared, start=snapshot), lambda: snapshot.restore(guest.store, guest.instance)):
        with pytest.raises(ValueError, match=r"cannot leave the store that it was taken in.*prepare"):
            action()
    instance = wasmtime.Instance(guest.store, wasmtime.Module(ENGINE, COUNTER), [])
    with pytest.raises(ValueError, match=r"made by Prepared.instantiate"):
        guest.take().restore(guest.store, instance)


def test_restore_needs_an_instance_of_the_store_with_the_sizes_of_the_snapshot():
    prepared = prepare(ENGINE, COUNTER, expose=True)
    guest, other = Guest(prepared), Guest(prepared)
    small = guest.take()
    guest.call("grow", 1)
    large = guest.take()
    with pytest.raises(ValueError, match="another store"):
        small.restore(other.store)
    with pytest.raises(ValueError, match="store must be the one that the instance belongs to"):
        small.restore(other.store, guest.instance)
    with pytest.raises(TypeError, match=r"instance must be a wasmtime.Instance, got int"):
        small.restore(other.store, 5)
    with pytest.raises(ValueError, match="memory 'm' has 65536 bytes and had 131072 in the snapshot"):
        large.restore(other.store, other.instance)
    with pytest.raises(ValueError, match="has grown from 65536 to 131072"):
        small.restore(guest.store, guest.instance)
    guest.call("set", 0, 0)
    small.restore(guest.store, guest.instance, zero_grown=True)
    assert guest.call("get", 0) == ord("s")
    with pytest.raises(ValueError, match="no instance of its own"):
        Snapshot._from_state(small._state).restore(guest.store)


# -- imports -----------------------------------------------------------------------------------------

IMPORTING = """(module (import "e" "m" (memory 1 10)) (import "e" "g" (global $g (mut i64)))
  (import "e" "t" (table $t 2 funcref)) (memory (export "own") 1)
  (func $one (result i32) (i32.const 1)) (func $two (result i32) (i32.const 2)) (elem (i32.const 0) $one $two)
  (data (i32.const 4) "given") (data (memory 1) (i32.const 4) "own")
  (func (export "work") (result i32) (i32.store (i32.const 70000) (i32.const -1)) (global.set $g (i64.const -1))
    (table.set $t (i32.const 0) (ref.func $two)) (table.grow $t (ref.func $one) (i32.const 2)))
  (func (export "call") (param i32) (result i32) (call_indirect $t (result i32) (local.get 0)))
  (func (export "g") (result i64) (global.get $g)) (func (export "size") (result i32) (memory.size)))"""


def world(store, pages=1, elements=2, largest=10):
    memory = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(pages, largest)))
    counter = wasmtime.Global(store, wasmtime.GlobalType(wasmtime.ValType.i64(), True), 5)
    return [memory, counter, table(store, elements)]


@pytest.mark.parametrize("by_linker", [False, True])
def test_imported_memories_globals_and_tables_get_the_state_of_the_snapshot(by_linker):
    prepared = prepare(ENGINE, IMPORTING, expose=True)
    store = wasmtime.Store(ENGINE)
    imports = world(store, 2)
    guest = Guest(prepared, store=store, imports=imports)
    assert guest.call("work") == 2
    snapshot = guest.take()
    assert snapshot.unseen == ()
    for pages, elements in ((1, 2), (2, 4)):
        store = wasmtime.Store(ENGINE)
        given = imports = world(store, pages, elements)
        imports[0].write(store, b"overwritten", 0)
        if by_linker:
            given = wasmtime.Linker(ENGINE)
            for name, thing in zip("mgt", imports, strict=True):
                given.define(store, "e", name, thing)
        started = Guest(prepared, store=store, imports=given, start=snapshot)
        assert [started.outcome("call", index) for index in range(5)] == [
            2, 2, 1, 1, wasmtime.TrapCode.TABLE_OUT_OF_BOUNDS]
        assert (started.call("g"), started.call("size"), imports[1].value(store)) == (-1, 2, -1)
        assert bytes(imports[0].read(store)) == bytes(4) + b"given" + bytes(69991) + b"\xff" * 4 + bytes(61068)
        assert started.content("own")[:7] == bytes(4) + b"own"
        imports[0].write(store, b"x", 0)
        imports[2].set(store, 0, None)
        snapshot.restore(store, started.instance)
        assert (started.call("call", 0), imports[0].read(store, 0, 1)) == (2, b"\0")


def test_imports_that_cannot_get_the_state_are_refused_before_any_changes():
    prepared = prepare(ENGINE, IMPORTING, expose=True)
    store = wasmtime.Store(ENGINE)
    guest = Guest(prepared, store=store, imports=world(store, 2))
    snapshot = guest.take()

    def refused(imports, error, text, store):
        if isinstance(imports[0], wasmtime.Memory):
            imports[0].write(store, b"kept", 0)
        with pytest.raises(error, match=text):
            Guest(prepared, store=store, imports=imports, start=snapshot)
        assert imports[0].read(store, 0, 4) == b"kept"
        assert imports[1].value(store) == 5

    store = wasmtime.Store(ENGINE)
    refused(world(store, 3), ValueError, "had 131072 in the snapshot, and a memory cannot shrink", store)
    refused(world(store, 1, 3), ValueError, "table 'linmem:table:0' has 3 elements and had 2 in the snapshot", store)
    foreign = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, 10)))
    refused([foreign, *world(store)[1:]], ValueError, "memory 'linmem:memory:0' is not linmem's", store)
    store = wasmtime.Store(ENGINE)
    store.set_limits(memory_size=PAGE)
    refused(world(store), linmem.GrowError, "memory 'linmem:memory:0' cannot get the 131072 bytes", store)
    store = wasmtime.Store(ENGINE)
    with pytest.raises(wasmtime.WasmtimeError, match="incompatible import type"):
        Guest(prepared, store=store, imports=world(store)[::-1], start=snapshot)


def test_no_import_has_changed_if_the_maximum_of_another_one_is_too_small():
    wat = """(module (import "e" "a" (memory 1 10)) (import "e" "b" (memory 1 10)) (import "e" "t" (table 1 10 funcref))
        (func (export "grow") (drop (memory.grow 0 (i32.const 1))) (drop (memory.grow 1 (i32.const 2)))
            (drop (table.grow 0 (ref.null func) (i32.const 3)))))"""
    prepared = prepare(ENGINE, wat, expose=True)

    def imports(store, *largest):
        memories = [linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, most)))
                    for most in largest[:2]]
        kind = wasmtime.TableType(wasmtime.ValType.funcref(), wasmtime.Limits(1, largest[2]))
        return [*memories, wasmtime.Table(store, kind, None)]

    store = wasmtime.Store(ENGINE)
    guest = Guest(prepared, store=store, imports=imports(store, 9, 9, 9))
    guest.call("grow")
    snapshot = guest.take()
    # An old wasmtime says of an imported table what the module declares.
    for largest in ((9, 2, 9), (9, 9, 3))[:1 + HAS_ONE_HANDLE]:
        store = wasmtime.Store(ENGINE)
        given = imports(store, *largest)
        with pytest.raises(linmem.GrowError, match="has in the snapshot: its maximum is"):
            Guest(prepared, store=store, imports=given, start=snapshot)
        assert [each.size(store) for each in given] == [1, 1, 1]
    store = wasmtime.Store(ENGINE)
    given = imports(store, 2, 3, 4)
    Guest(prepared, store=store, imports=given, start=snapshot)
    assert [each.size(store) for each in given] == [2, 3, 4]


def test_one_memory_that_is_imported_twice_needs_one_content():
    wat = '(module (import "e" "a" (memory 1)) (import "e" "b" (memory 1)))'
    prepared = prepare(ENGINE, wat, expose=True)
    store = wasmtime.Store(ENGINE)
    first, second = world(store)[0], world(store)[0]
    first.write(store, b"first", 0)
    twice = Guest(prepared, store=store, imports=[first, first]).take()
    two = Guest(prepared, store=store, imports=[first, second]).take()
    store = wasmtime.Store(ENGINE)
    for snapshot in (twice, two):
        given = [world(store)[0], world(store)[0]]
        Guest(prepared, store=store, imports=given, start=snapshot)
        assert [bytes(each.read(store, 0, 5)) for each in given] == [b"first", [b"first", bytes(5)][snapshot is two]]
    Guest(prepared, store=store, imports=given[:1] * 2, start=twice)
    with pytest.raises(ValueError, match="is also another memory of the instance, and the snapshot has two contents"):
        Guest(prepared, store=store, imports=given[:1] * 2, start=two)


@pytest.mark.skipif(not HAS_ONE_HANDLE, reason="in this wasmtime, one global or table has several handles")
def test_one_global_or_table_that_is_imported_twice_needs_one_content():
    wat = """(module (import "e" "a" (global $a (mut i32))) (import "e" "b" (global $b (mut i32)))
        (import "e" "t" (table $t 1 funcref)) (import "e" "u" (table $u 1 funcref)) (memory (export "m") 1)
        (func $f (export "f")) (func (export "init") (param i32) (global.set $a (local.get 0))
            (if (i32.eqz (local.get 0)) (then (table.set $t (i32.const 0) (ref.func $f))))))"""
    prepared = prepare(ENGINE, wat, expose=True)

    def imports(store, repeated=()):
        globals = [wasmtime.Global(store, wasmtime.GlobalType(wasmtime.ValType.i32(), True), 5) for _ in range(2)]
        tables = [table(store, 1) for _ in range(2)]
        return [part for kind, parts in (("global", globals), ("table", tables))
                for part in (parts[:1] * 2 if kind in repeated else parts)]

    both = {"global", "table"}
    for kind, argument in (("global", 1), ("table", 0)):
        store = wasmtime.Store(ENGINE)
        guest = Guest(prepared, store=store, imports=imports(store, both - {kind}))
        guest.call("init", argument)
        snapshot = guest.take()
        store = wasmtime.Store(ENGINE)
        Guest(prepared, store=store, imports=imports(store, both - {kind}), start=snapshot)
        given = imports(store, both)
        with pytest.raises(ValueError, match=f"{kind} .* is also another {kind} of the instance, and the snapshot has"):
            Guest(prepared, store=store, imports=given, start=snapshot)
        assert given[0].value(store) == 5


@pytest.mark.parametrize("kind", ["externref", pytest.param("(ref null $s)", marks=needs_gc)])
def test_an_imported_table_that_is_empty_gets_the_null_references_of_the_snapshot(kind):
    prepared = prepare(ENGINE, f"""(module {"(type $s (struct))" * ("$s" in kind)} (table (import "e" "t") 0 {kind})
        (func (export "grow") (drop (table.grow 0 (ref.null {"$s" if "$s" in kind else "extern"}) (i32.const 3))))
        (func (export "size") (result i32) (table.size 0)))""", expose=True)
    wat = f'(module {"(type $s (struct))" * ("$s" in kind)} (table (export "t") 0 {kind}))'

    def imports(store):
        return [wasmtime.Instance(store, wasmtime.Module(ENGINE, wat), []).exports(store)["t"]]

    store = wasmtime.Store(ENGINE)
    guest = Guest(prepared, store=store, imports=imports(store))
    guest.call("grow")
    snapshot = guest.take()
    store = wasmtime.Store(ENGINE)
    assert Guest(prepared, store=store, imports=imports(store), start=snapshot).call("size") == 3


@needs_gc
def test_a_reference_of_a_wrong_type_is_refused_before_any_state_is_changed():
    prepared = prepare(ENGINE, """(module (type $t (func (result i32))) (memory (export "m") 1)
        (global (export "n") (mut i32) (i32.const 1)) (global (export "g") (mut (ref $t)) (ref.func $f))
        (table (export "t") 1 (ref null $t)) (elem declare func $f)
        (func $f (export "f") (type $t) (i32.const 7)) (func (export "h") (param i64))
        (func (export "set") (i32.store (i32.const 0) (i32.const 9)) (global.set 0 (i32.const 9))
            (table.set 0 (i32.const 0) (ref.func $f)))
        (func (export "call") (result i32) (call_ref $t (table.get 0 (i32.const 0))))
        (func (export "own") (result i32) (call_ref $t (global.get 1))))""", expose=True)
    snapshot = Guest(prepared).take()
    number, reference = snapshot._state.globals
    wrong = Reference("export", "h")
    guest = Guest(prepared)
    guest.call("set")
    for what, fields in (("global 'g'", {"globals": (number, reference._replace(value=wrong))}),
                         ("global 'g'", {"globals": (number, reference._replace(kind="null", value=NULL))}),
                         ("table 't'", {"tables": (TableState(0, 1, ((0, wrong),)),)})):
        forged = changed(snapshot, **fields)
        with pytest.raises(ValueError, match=f"the snapshot has a value that {what} cannot hold"):
            forged.restore(guest.store, guest.instance)
        with pytest.raises(ValueError, match=f"the snapshot has a value that {what} cannot hold"):
            Guest(prepared, start=forged)
        assert (guest.content()[:1], guest.call("call"), guest.call("own")) == (b"\x09", 7, 7)
        assert guest.instance.exports(guest.store)["n"].value(guest.store) == 9


SUBTYPES = "(type $super (sub (func (result anyref)))) (type $sub (sub $super (func (result i31ref))))"


def functions(store):
    """A function of each of the types, both of which an import of the type $super takes."""
    wat = f"""(module {SUBTYPES} (func (export "sub") (type $sub) (ref.null i31))
        (func (export "super") (type $super) (ref.null any)))"""
    exports = wasmtime.Instance(store, wasmtime.Module(ENGINE, wat), []).exports(store)
    return exports["sub"], exports["super"]


@needs_gc
@pytest.mark.parametrize("change", ["global.set 0", "table.set 1 (i32.const 0)"])
def test_a_refused_start_has_changed_no_import(change):
    prepared = prepare(ENGINE, f"""(module {SUBTYPES} (import "e" "h" (func $h (type $super))) (export "h" (func $h))
        (memory (import "e" "m") 1) (table (import "e" "t") 1 funcref) (global (import "e" "n") (mut i32))
        (global (export "g") (mut (ref null $sub)) (ref.null $sub)) (table (export "u") 1 (ref null $sub))
        (elem declare func $h)
        (func (export "set") ({change.replace("global.set 0", "global.set 1")} (ref.cast (ref $sub) (ref.func $h))))
        (func (export "grow") (drop (memory.grow (i32.const 2))) (drop (table.grow 0 (ref.func $h) (i32.const 3)))
            (i32.store (i32.const 0) (i32.const 9)) (global.set 0 (i32.const 9))))""", expose=True)

    def start(which, **how):
        store = wasmtime.Store(ENGINE)
        memory, _, elements = world(store, 1, 1)
        value = wasmtime.Global(store, wasmtime.GlobalType(wasmtime.ValType.i32(), True), 5)
        imports = [functions(store)[which], memory, elements, value]

        def seen():
            return memory.size(store), elements.size(store), value.value(store), bytes(memory.read(store, 0, 1))
        try:
            return Guest(prepared, store=store, imports=imports, **how), seen
        except ValueError as error:
            return error, seen

    guest, seen = start(0)
    guest.call("set")
    guest.call("grow")
    snapshot = guest.take()
    for _ in range(2):          # each start checks its own imports, whatever an earlier one had
        assert start(0, start=snapshot)[1]() == (3, 4, 9, b"\t")
        error, seen = start(1, start=snapshot)
        assert re.search("the snapshot has a value that (global 'g'|table 'u') cannot hold", str(error))
        assert seen() == (1, 1, 5, b"\0")


def test_functions_of_globals_are_named_in_a_module_without_tables():
    prepared = prepare(ENGINE, """(module (global (mut funcref) (ref.func $f)) (elem declare func $f) (func $f))""",
                       expose=True)
    Guest(prepared, start=Guest(prepared).take())


# -- tables and references ---------------------------------------------------------------------------

TABLES = """(module {types} (table $t {table}) {extra}
  (func $one (type $f) (i32.const 1)) (func $two (type $f) (i32.const 2)) (func $three (export "three") (type $f)
    (i32.const 3)) (func $four (type $f) (i32.const 4))
  (elem (i32.const 1) {kind} {one} {two}) (elem declare func $four)
  (func (export "call") (param i32) (result i32) (call_indirect $t (type $f) (local.get 0)))
  (func (export "set") (table.set $t (i32.const 0) (ref.func $two)) (table.set $t (i32.const 1) (ref.func $three))
    (table.set $t (i32.const 2) (ref.null {null})))
  (func (export "grow") (drop (table.grow $t (ref.func $four) (i32.const 2)))
    (table.set $t (i32.const 4) (ref.null {null}))))"""
FUNCREF = {"types": "(type $f (func (result i32)))", "table": "4 10 funcref", "kind": "func", "one": "$one",
           "two": "$two", "null": "func", "extra": ""}
TYPED = {**FUNCREF, "table": "4 10 (ref null $f)", "kind": "(ref null $f)", "one": "(ref.func $one)",
         "two": "(ref.func $two)", "null": "$f"}


@pytest.mark.parametrize("kind", [FUNCREF, pytest.param(TYPED, marks=needs_gc)])
@pytest.mark.parametrize("exported", [False, True])
def test_tables_travel_with_their_size_and_every_function_that_has_a_name(kind, exported):
    wat = TABLES.format(**kind)
    if exported:
        wat = wat.replace("(table $t", '(table $t (export "t")')
    prepared = prepare(ENGINE, wat, expose=True)
    guest = Guest(prepared)
    fresh = guest.take()
    if kind is FUNCREF:     # the content of the other table is not a part of the compiled module
        assert fresh._state.tables == (TableState(0, 4),)
    before = [guest.outcome("call", index) for index in range(7)]
    guest.call("set")
    guest.call("grow")
    snapshot = guest.take()
    assert snapshot.unseen == ()
    expected = [guest.outcome("call", index) for index in range(7)]
    assert [each for each in expected if isinstance(each, int)] == [2, 3, 4]
    for other, engine in ((prepared, ENGINE), (prepare(OTHER, wat, expose=True), OTHER)):
        started = Guest(other, engine, start=snapshot)
        assert [started.outcome("call", index) for index in range(7)] == expected
        again = Guest(other, engine, start=fresh)
        assert [again.outcome("call", index) for index in range(7)] == before
        again.call("set")
        again.call("grow")
        with pytest.raises(ValueError, match="had 4 elements and has 6"):
            fresh.restore(again.store, again.instance)
        again = Guest(other, engine, start=started.take())
        assert [again.outcome("call", index) for index in range(7)] == expected


def test_only_elements_that_differ_from_the_initial_ones_are_held_and_all_are_restored():
    prepared = prepare(ENGINE, TABLES.format(**FUNCREF), expose=True)
    guest = Guest(prepared)
    fresh = guest.take()
    guest.call("set")
    snapshot = guest.take()
    assert snapshot._state.tables == (TableState(0, 4, (
        (0, Reference("element", segment=0, index=1)), (1, Reference("export", "three")), (2, NULL))),)
    started = Guest(prepared, start=snapshot)
    for state, expected in ((fresh, [None, 1, 2, None]), (snapshot, [2, 3, None, None]), (fresh, [None, 1, 2, None])):
        for each in (started, guest):
            state.restore(each.store, each.instance)
            assert [found if isinstance(found, int) and not isinstance(found, wasmtime.TrapCode) else None
                    for found in (each.outcome("call", index) for index in range(4))] == expected


def test_references_in_globals_travel():
    wat = """(module (type $f (func (result i32))) (table 1 funcref) (global $g (mut funcref) (ref.func $init))
        (global $h (mut funcref) (ref.null func)) (global $e (mut externref) (ref.null extern))
        (func $init (result i32) (i32.const 1)) (func $named (export "named") (result i32) (i32.const 2))
        (func $declared (result i32) (i32.const 3)) (elem declare func $declared)
        (func (export "set") (param i32)
          (global.set $h (global.get $g))
          (global.set $g (if (result funcref) (local.get 0) (then (ref.func $named)) (else (ref.func $declared)))))
        (func (export "call") (param i32) (result i32)
          (table.set 0 (i32.const 0) (if (result funcref) (local.get 0) (then (global.get $g)) (else (global.get $h))))
          (call_indirect (type $f) (i32.const 0))))"""
    prepared = prepare(ENGINE, wat, expose=True)
    for which, expected in ((0, 3), (1, 2)):
        guest = Guest(prepared)
        assert guest.outcome("call", 0) == wasmtime.TrapCode.INDIRECT_CALL_TO_NULL
        guest.call("set", which)
        snapshot = guest.take()
        assert snapshot.unseen == ()
        started = Guest(prepare(OTHER, wat, expose=True), OTHER, start=snapshot)
        assert (started.call("call", 1), started.call("call", 0)) == (expected, 1)
        started.call("set", 1 - which)
        snapshot.restore(started.store, started.instance)
        assert (started.call("call", 1), started.call("call", 0)) == (expected, 1)


def test_functions_without_a_name_are_refused_or_named_as_unseen():
    wat = """(module (import "e" "f" (func $host)) (func $mine) (table (export "t") 4 funcref)
        (global (export "g") (mut funcref) (ref.null func)) (memory (export "m") 1)
        (elem (i32.const 0) $mine $host))"""
    prepared = prepare(ENGINE, wat, expose=True)
    store = wasmtime.Store(ENGINE)
    host = wasmtime.Func(store, wasmtime.FuncType([], []), lambda: None)
    guest = Guest(prepared, store=store, imports=[host])
    exports = guest.instance.exports(store)
    snapshot = guest.take()             # an imported function that is an element has a name
    assert (snapshot.unseen, snapshot._state.tables) == ((), (TableState(0, 4),))
    exports["g"].set_value(store, exports["t"].get(store, 1))
    assert guest.take()._state.globals == (GlobalState(0, "funcref", Reference("element", segment=0, index=1)),)
    exports["g"].set_value(store, wasmtime.Func(store, wasmtime.FuncType([], []), lambda: None))
    with pytest.raises(ValueError, match="global 'g' refers to a function that has no name"):
        guest.take()
    exports["t"].set(store, 2, wasmtime.Func(store, wasmtime.FuncType([], []), lambda: None))
    snapshot = guest.take(partial=True)
    assert snapshot.unseen == ("element 2 of exported table 't' refers to a function that has no name in the module",
                               "mutable global 'g' refers to a function that has no name in the module")
    assert (snapshot.tables, snapshot.globals) == ((), ())
    assert Guest(prepared, store=store, imports=[host], start=snapshot).content() == guest.content()


def test_without_expose_a_table_that_needs_names_stays_in_its_store():
    wat = """(module (memory (export "m") 1) (table (export "t") 2 funcref) (elem (i32.const 0) $f)
        (func $f (result i32) (i32.const 7)) (func (export "call") (result i32)
            (call_indirect (result i32) (i32.const 0))))"""
    guest = Guest(prepare(ENGINE, wat))
    snapshot = guest.take()
    assert (snapshot.tables, snapshot.unseen) == (("t",), ())
    guest.instance.exports(guest.store)["t"].set(guest.store, 0, None)
    snapshot.restore(guest.store)
    assert guest.call("call") == 7
    with pytest.raises(ValueError, match=r"table 't' refers to functions that have no name.*expose=True"):
        Guest(prepare(ENGINE, wat), start=snapshot)
    exported = wat.replace("(func $f", '(func $f (export "f")')
    prepared = prepare(ENGINE, exported)        # an exported function has a name
    snapshot = Guest(prepared).take()
    started = Guest(prepared, start=snapshot)
    started.instance.exports(started.store)["t"].set(started.store, 0, None)
    snapshot.restore(started.store, started.instance)
    assert started.call("call") == 7


def test_a_table_that_nobody_can_change_costs_nothing():
    wat = """(module (memory (export "m") 1) (table 3 funcref) (elem (i32.const 0) $f) (elem $g func $f)
        (func $f (result i32) (i32.const 38) (drop) (i32.const 7)) (func (export "call") (param i32) (result i32)
            (call_indirect (result i32) (local.get 0))))"""
    prepared = prepare(ENGINE, wat, expose=True)
    assert prepared.added == frozenset()
    snapshot = Guest(prepared).take()
    assert (snapshot.tables, snapshot._state.tables) == ((), ())
    assert Guest(prepared, start=snapshot).call("call", 0) == 7


@needs_gc
def test_tables_of_other_references_travel_if_they_hold_null_references():
    wat = """(module (table (export "e") 2 externref) (table (export "a") 0 9 anyref)
        (type $f (func (result i32))) (func $f (type $f) (i32.const 5)) (func $g (export "g") (type $f) (i32.const 6))
        (table (export "n") 2 9 (ref $f) (ref.func $f)) (global (mut (ref $f)) (ref.func $f))
        (func (export "grow") (drop (table.grow 0 (ref.null extern) (i32.const 3)))
            (drop (table.grow 1 (ref.null any) (i32.const 3))) (drop (table.grow 2 (ref.func $g) (i32.const 2)))
            (table.set 2 (i32.const 1) (ref.func $g)) (global.set 0 (ref.func $g)))
        (func (export "sizes") (result i32 i32 i32) (table.size 0) (table.size 1) (table.size 2))
        (func (export "call") (param i32) (result i32) (call_ref $f (table.get 2 (local.get 0))))
        (func (export "own") (result i32) (call_ref $f (global.get 0))))"""
    prepared = prepare(ENGINE, wat, expose=True)
    guest = Guest(prepared)
    guest.call("grow")
    snapshot = guest.take()
    assert snapshot.unseen == ()
    started = Guest(prepared, start=snapshot)
    assert started.call("sizes") == [5, 3, 4]
    assert [started.call("call", index) for index in range(4)] == [5, 6, 6, 6]
    assert started.call("own") == 6
    fresh = Guest(prepared, start=Guest(prepared).take())
    assert [fresh.call("call", index) for index in range(2)] == [5, 5]


# -- faults and forks --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mmap", "pool"])
def test_after_each_refused_page_call_the_next_instance_starts(kind):
    engine = engine_of(kind)
    wat = MEMORIES
    prepared = prepare(engine, wat, expose=True)
    guest = Guest(prepared, engine)
    guest.call("work")
    snapshot = guest.take()
    expected = [guest.content(name) for name in "abcde"]
    Guest(prepared, engine, start=snapshot).store.close()
    refused = 0
    for code in (12, 11):
        for count in range(1, 60):
            store = wasmtime.Store(engine)
            with failing(count, code) as fault:
                try:
                    Guest(prepared, store=store, start=snapshot)
                except (wasmtime.WasmtimeError, linmem.GrowError, linmem.PageError):
                    refused += 1
            store.close()
            started = Guest(prepared, engine, start=snapshot)
            assert [started.content(name) for name in "abcde"] == expected
            started.store.close()
            if not fault.happened:
                break
        else:
            pytest.fail("there are more page calls than expected")
    assert refused or kind == "pool"


@requires("fork")
def test_a_child_that_is_forked_during_the_compilation_compiles_the_module_itself():
    assert answer(FORKING + f"COUNTER = {COUNTER!r}" + """
import wasmtime, linmem.wasmtime
from linmem.wasmtime import Snapshot, prepare
config = wasmtime.Config()
config.parallel_compilation = False
linmem.wasmtime.install(config)
engine = wasmtime.Engine(config)
prepared = prepare(engine, COUNTER, expose=True)
store = wasmtime.Store(engine)
snapshot = Snapshot.take(store, prepared.instantiate(store))
compiling, forked, compile_it = threading.Event(), threading.Event(), prepared._compile

def slow():
    compiling.set()
    forked.wait(60)
    return compile_it()

def begin():
    store = wasmtime.Store(engine)
    assert prepared.instantiate(store, start=snapshot).exports(store)["n"](store) == 1

def begin_quickly():
    prepared._compile = compile_it
    begin()

prepared._compile = slow
thread = threading.Thread(target=begin)
thread.start()
assert compiling.wait(60)
child(os.fork, begin_quickly)
forked.set()
thread.join()
print("done")
""") == "done"


@requires("fork")
def test_a_child_that_is_forked_while_another_thread_begins_its_first_start_starts_instances():
    """The module needs no compilation for start=. The main thread holds the lock for the thread that the child lacks.
    """
    assert answer(FORKING + """
import signal, wasmtime, linmem.wasmtime
from linmem.wasmtime import Snapshot, prepare
config = wasmtime.Config()
linmem.wasmtime.install(config)
engine = wasmtime.Engine(config)
prepared = prepare(engine, '(module (memory (export "memory") 1) (data (i32.const 0) "x"))')
assert prepared._compile is None
store = wasmtime.Store(engine)
snapshot = Snapshot.take(store, prepared.instantiate(store))

def begin():
    signal.alarm(30)            # ends a child that waits for the lock
    prepared.instantiate(wasmtime.Store(engine), start=snapshot)
    signal.alarm(0)

with prepared._lock:
    child(os.fork, begin)
begin()
print("done")
""") == "done"


@requires("fork")
def test_a_forked_child_starts_instances_from_the_snapshot_of_its_parent():
    assert answer(FORKING + f"COUNTER = {COUNTER!r}" + """
import wasmtime, linmem.wasmtime
from linmem.wasmtime import Snapshot, prepare
config = wasmtime.Config()
linmem.wasmtime.install(config)
engine = wasmtime.Engine(config)
prepared = prepare(engine, COUNTER, expose=True)
store = wasmtime.Store(engine)
instance = prepared.instantiate(store)
instance.exports(store)["grow"](store, 3)
snapshot = Snapshot.take(store, instance)

def begin():
    store = wasmtime.Store(engine)
    exports = prepared.instantiate(store, start=snapshot).exports(store)
    exports["count"](store)
    found = [exports["n"](store), exports["size"](store), exports["get"](store, 0)]
    assert found == [2, 4, ord("s")], found

begin()
child(os.fork, begin)
begin()
print("done")
""") == "done"


# -- generated modules -------------------------------------------------------------------------------


def goes_on_alike(guest, first, second, take):
    """Runs `guest` until its snapshot, and compares how it goes on with how instances go on that start from it.

    first, second: engines. Returns whether an instance could be made.
    """
    prepared, other = (prepare(engine, guest.wat, expose=True) for engine in (first, second))
    store = wasmtime.Store(first)

    def imports(store):
        return [kind.made(store, ours=True) for kind in guest.kinds if kind.imported]

    try:
        instance = prepared.instantiate(store, imports(store))
    except (wasmtime.Trap, wasmtime.WasmtimeError):
        return False
    calls = [call for call in guest.calls if not call[0].startswith("drop ")]     # what was dropped is not held
    exports = instance.exports(store)
    Program(GeneratedGuest(guest.wat, guest.kinds, calls[:take])).run(store, exports)
    snapshot = Snapshot.take(store, instance)
    rest = Program(GeneratedGuest(guest.wat, guest.kinds, calls[take:]))

    def going_on(store, exports):
        seen = rest.run(store, exports)
        return seen + [(exports[f"size {index}"](store), exports[f"hash {index}"](store))
                       for index in range(len(guest.kinds))]

    expected = going_on(store, exports)
    for engine, module in ((first, prepared), (second, other)):
        store = wasmtime.Store(engine)
        instance = module.instantiate(store, imports(store), start=snapshot)
        assert going_on(store, instance.exports(store)) == expected
        store.close()
    return True


def test_generated_memories_go_on_in_another_store_as_the_original_goes_on():
    engines = [engine_of("mmap"), engine_of("pool"), engine_of("limited pool"),
               engine_of("mmap", **RESERVATIONS["none"]), engine_of("pool", **RESERVATIONS["small"])]
    done = Counter()

    @fewer_examples(2)
    @given(guests(), st.integers(0, 40), st.sampled_from(engines), st.sampled_from(engines))
    @example(KNOWN, 4, *engines[:2])
    def check(guest, take, first, second):
        done[goes_on_alike(guest, first, second, take)] += 1

    check()
    print(dict(done))
    assert done[True]


class Machine:
    """A module of tables, globals, passive segments and a start function, and calls of it, by chance."""

    TYPES = ("i32", "i64", "f32", "f64", "v128", "funcref")

    def __init__(self, chance):
        self.chance = chance
        self.types = [chance.choice(self.TYPES) for _ in range(chance.randrange(1, 6))]
        self.tables = [chance.randrange(1, 6) for _ in range(chance.randrange(1, 4))]
        functions = 6
        parts = [f'(func $f{i} {chance.choice(["", f"""(export "f{i}")"""])} (result i32) (i32.const {i + 10}))'
                 for i in range(functions)]
        for size in self.tables:
            parts.append(f'(table {chance.choice(["", f"""(export "t{len(parts)}")"""])} {size} {size + 6} funcref)')
        for i, kind in enumerate(self.types):
            value = f"({kind}.const {'i64x2 1 ' * (kind == 'v128')}{i})" if kind != "funcref" else chance.choice(
                ["(ref.null func)", f"(ref.func $f{i})"])
            parts.append(f'(global $g{i} {chance.choice(["", f"""(export "g{i}")"""])} (mut {kind}) {value})')
        chosen = [f"$f{chance.randrange(functions)}" for _ in range(4)]
        table = chance.randrange(len(self.tables))
        parts.append(f"(elem (table {table}) (i32.const {chance.randrange(self.tables[table])}) func {chosen[0]})")
        parts.append(f"(elem func {' '.join(chosen)})")
        parts.append(f"(elem declare func {' '.join(f'$f{i}' for i in range(functions))})")
        parts.append('(memory (export "m") 1) (data "passive bytes") (data (i32.const 9) "active bytes")')
        self.calls = {"init": 3, "byte": 1}
        parts.append("""(func (export "init") (param i32 i32 i32)
            (memory.init 0 (local.get 0) (local.get 1) (local.get 2)))
            (func (export "byte") (param i32) (result i32) (i32.load8_u (local.get 0)))""")
        for i, kind in enumerate(self.types):
            change = {"i32": f"(i32.mul (global.get $g{i}) (local.get 0))",
                      "i64": f"(i64.sub (global.get $g{i}) (i64.extend_i32_s (local.get 0)))",
                      "f32": f"(f32.div (global.get $g{i}) (f32.convert_i32_s (local.get 0)))",
                      "f64": f"(f64.sqrt (f64.sub (global.get $g{i}) (f64.convert_i32_s (local.get 0))))",
                      "v128": f"(i32x4.add (global.get $g{i}) (i32x4.splat (local.get 0)))",
                      "funcref": f"(table.get {table} (local.get 0))"}[kind]
            store = {"funcref": "(i32.store (i32.const 64) (ref.is_null (global.get $g%d)))"}.get(
                kind, f"({kind}.store (i32.const 64) (global.get $g%d))") % i
            parts.append(f'(func $change{i} (export "change{i}") (param i32) (global.set $g{i} {change}) {store})')
            self.calls[f"change{i}"] = 1
        for i in range(len(self.tables)):
            other = chance.randrange(len(self.tables))
            parts.append(f"""(func (export "set{i}") (param i32 i32)
                  (table.set {i} (local.get 0) (table.get {other} (local.get 1))))
                (func (export "grow{i}") (param i32) (result i32)
                  (table.grow {i} (ref.func {chance.choice(chosen)}) (i32.and (local.get 0) (i32.const 3))))
                (func (export "fill{i}") (param i32 i32) (table.fill {i} (local.get 0) (ref.null func) (local.get 1)))
                (func (export "copy{i}") (param i32 i32 i32)
                  (table.copy {i} {other} (local.get 0) (local.get 1) (local.get 2)))
                (func (export "load{i}") (param i32 i32 i32)
                  (table.init {i} 1 (local.get 0) (local.get 1) (local.get 2)))
                (func (export "call{i}") (param i32) (result i32) (call_indirect {i} (result i32) (local.get 0)))
                (func (export "size{i}") (result i32) (table.size {i}))""")
            self.calls.update({f"set{i}": 2, f"grow{i}": 1, f"fill{i}": 2, f"copy{i}": 3, f"load{i}": 3, f"call{i}": 1,
                               f"size{i}": 0})
        parts.append("(func $start (call $change0 (i32.const 0))) (start $start)")
        self.wat = f"(module {' '.join(parts)})"

    def program(self, length):
        names = sorted(self.calls)
        return [(name, [self.chance.choice((0, 1, 2, 3, 4, 5, 7, -1)) for _ in range(self.calls[name])])
                for name in (self.chance.choice(names) for _ in range(length))]

    def run(self, guest, program):
        """All results, and then the content of all tables and of the memory."""
        seen = [repr(guest.outcome(name, *arguments)) for name, arguments in program]
        seen += [repr(guest.outcome(f"call{table}", index)) for table in range(len(self.tables)) for index in range(12)]
        return seen, guest.content()


def test_generated_tables_and_globals_go_on_in_another_store_as_the_original_goes_on():
    engines = [ENGINE, OTHER, engine_of("pool")]
    seen = set()

    @fewer_examples(2)
    @given(st.integers(0, 2**32), st.integers(0, 30))
    def check(seed, take):
        machine = Machine(random.Random(seed))
        first, second = machine.chance.choice(engines), machine.chance.choice(engines)
        prepared = prepare(first, machine.wat, expose=True)
        guest = Guest(prepared, first)
        fresh = guest.take()
        machine.run(guest, machine.program(take))
        snapshot = guest.take()
        assert snapshot.unseen == ()
        rest = machine.program(30)
        expected = machine.run(guest, rest)
        started = Guest(prepare(second, machine.wat, expose=True), second, start=snapshot)
        assert machine.run(started, rest) == expected
        seen.update(expected[0])
        sizes = [[table.size for table in each._state.tables] for each in (snapshot, started.take())]
        if sizes[0] == sizes[1]:
            snapshot.restore(started.store, started.instance)
            assert machine.run(started, rest) == expected
        again = Guest(prepared, first, start=fresh)
        assert again.take()._state.tables == fresh._state.tables
        assert again.take()._state.globals == fresh._state.globals

    check()
    assert {"10", "15", "TrapCode.INDIRECT_CALL_TO_NULL", "TrapCode.TABLE_OUT_OF_BOUNDS"} <= {
        each.split(":")[0].lstrip("<") for each in seen} | seen
