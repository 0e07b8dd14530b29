"""Snapshots of instances: state that a restore brings back, and reports about state that it cannot restore."""

import gc
import pathlib
import struct
import subprocess
import sys
import threading
import weakref

import pytest
import wasmtime
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support import NEEDS, answer
from test_hoist import STACK_SWITCHING, all_features, needs_gc, number, table
from test_prepare import engine_of, with_every_creator

import linmem.wasmtime
from linmem._core.memory import restore_all
from linmem.wasmtime import Snapshot, prepare

PAGE = 65536

COUNTER = """(module
  (memory (export "memory") 2 10)
  (global $count (export "count") (mut i32) (i32.const 100))
  (data (i32.const 8) "seed")
  (func (export "step") (param i32)
    (global.set $count (i32.add (global.get $count) (i32.const 1)))
    (i32.store8 (local.get 0) (global.get $count)))
  (func (export "fail") (global.set $count (i32.const -1)) (i32.store (i32.const 8) (i32.const 0)) unreachable)
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))"""


ENGINE = engine_of()        # a MmapCreator, which keeps no memories


def start(wat, imports=(), engine=ENGINE, **how):
    store = wasmtime.Store(engine)
    instance = prepare(engine, wat, **how).instantiate(store, list(imports))
    return store, instance, instance.exports(store)


def contents(store, exports, name="memory"):
    return bytes(exports[name].read(store))


# -- restored state ----------------------------------------------------------------------------------


@with_every_creator
def test_memories_and_globals_can_be_restored_repeatedly(kind):
    store, instance, exports = start(COUNTER, engine=engine_of(kind))
    exports["step"](store, 5)
    before = contents(store, exports)
    snapshot = Snapshot.take(store, instance)
    assert list(snapshot.memories) == ["memory"]
    assert snapshot.globals == ("count",)
    assert snapshot.unseen == ()
    for turn in range(3):
        for address in range(turn, 2 * PAGE, 5000):
            exports["step"](store, address)
        assert contents(store, exports) != before
        snapshot.restore(store)
        assert contents(store, exports) == before
        assert exports["count"].value(store) == 101
    exports["step"](store, 9)
    assert exports["memory"].read(store, 9, 10) == bytes([102])


def test_an_instance_is_restored_completely_after_a_trap():
    store, instance, exports = start(COUNTER)
    snapshot = Snapshot.take(store, instance)
    with pytest.raises(wasmtime.Trap, match="unreachable"):
        exports["fail"](store)
    assert exports["count"].value(store) == -1
    snapshot.restore(store)
    assert exports["count"].value(store) == 100
    assert exports["memory"].read(store, 8, 12) == b"seed"


def test_a_memory_that_has_grown_is_refused_before_anything_is_touched():
    store, instance, exports = start(COUNTER)
    snapshot = Snapshot.take(store, instance)
    assert exports["grow"](store, 3) == 2
    exports["step"](store, 8)
    with pytest.raises(ValueError, match="exported memory 'memory' has grown from 131072 to 327680 bytes"):
        snapshot.restore(store)
    assert exports["count"].value(store) == 101
    assert exports["memory"].read(store, 8, 9) == bytes([101])


TWO = """(module (memory (export "a") 1) (memory (export "b") 1 4) (global (export "g") (mut i32) (i32.const 1))
  (table (export "t") 1 funcref) (func (export "grow") (result i32) (memory.grow 1 (i32.const 1))))"""


def spoiled(store, exports):
    """Changes everything that a snapshot of TWO holds. Returns a function that reads this state."""
    exports["a"].write(store, b"new", 0)
    exports["g"].set_value(store, 2)
    exports["t"].set(store, 0, exports["grow"])
    return lambda: (exports["a"].read(store, 0, 3), exports["g"].value(store),
                    isinstance(exports["t"].get(store, 0), wasmtime.Func))


def test_if_only_the_second_memory_has_grown_no_state_is_changed():
    store, instance, exports = start(TWO)
    snapshot = Snapshot.take(store, instance)
    exports["grow"](store)
    now = spoiled(store, exports)
    with pytest.raises(ValueError, match="exported memory 'b' has grown from 65536 to 131072 bytes"):
        snapshot.restore(store)
    assert now() == (b"new", 2, True)
    snapshot.restore(store, zero_grown=True)
    assert now() == (bytes(3), 1, False)


def test_if_only_the_second_memory_cannot_be_restored_now_no_state_is_changed():
    class Growing:
        def __init__(self, minimum, reserved, guard):
            self.inner = linmem.MmapCreator().create(minimum, reserve=reserved, guard=guard)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def grow_to(self, size):
            thread = threading.Thread(target=lambda: told.append((outcome(snapshot.restore, store), now())))
            thread.start()
            thread.join(60)
            self.inner.grow_to(size)

    class Creator:
        def new_memory(self, ty, minimum, maximum, reserved, guard):
            return Growing(minimum, reserved, guard)

    told = []
    config = all_features()
    linmem.wasmtime.install(config, Creator())
    store, instance, exports = start(TWO, engine=wasmtime.Engine(config))
    snapshot = Snapshot.take(store, instance)
    now = spoiled(store, exports)
    assert exports["grow"](store) == 1
    [((kind, text), seen)] = told
    assert kind is linmem.OwnedError
    assert "another thread is growing this memory" in text
    assert seen == (b"new", 2, True)
    snapshot.restore(store, zero_grown=True)
    assert now() == (bytes(3), 1, False)
    store.close()


def test_of_several_memories_all_are_restored_or_none():
    memories = [linmem.create(PAGE) for _ in range(3)]
    images = [memory.snapshot() for memory in memories]
    for memory in memories:
        memory[0] = 1
    larger = linmem.create(2 * PAGE)
    small = linmem.create(PAGE).snapshot()
    for wrong in ([*images[:2], larger.snapshot()], [images[0], larger.snapshot(), images[2]], [*images[:2], None]):
        with pytest.raises((ValueError, TypeError)):
            restore_all(memories, wrong)
        assert [memory[0] for memory in memories] == [1, 1, 1]
    memories[2].protect(0, PAGE, "r")
    with pytest.raises(TypeError, match="protected"):
        restore_all(memories, images)
    memories[2].protect(0, PAGE, "rw")
    assert [memory[0] for memory in memories] == [1, 1, 1]
    restore_all([*memories, larger], [*images, small])
    assert [memory[0] for memory in memories] == [0, 0, 0]
    for memory in (*memories, larger):
        memory.close()          # close() succeeds, so restore_all() has released its locks and references


def test_a_grown_memory_keeps_its_size_and_its_new_pages_are_zeroed_on_demand():
    store, instance, exports = start(COUNTER)
    snapshot = Snapshot.take(store, instance)
    before = contents(store, exports)
    assert exports["grow"](store, 3) == 2
    exports["step"](store, 5 * PAGE - 1)
    exports["step"](store, 2 * PAGE)
    snapshot.restore(store, zero_grown=True)
    assert exports["grow"](store, 0) == 5
    assert contents(store, exports) == before + bytes(3 * PAGE)
    exports["step"](store, 5 * PAGE - 1)
    assert exports["grow"](store, 5) == 5


def test_globals_of_every_number_type_and_functions_are_restored_bit_by_bit():
    kinds = {"i32": "(i32.const -5)", "i64": "(i64.const 0x8123456789abcdef)",
             "f32": "(f32.const nan:0x200001)", "f64": "(f64.const -nan:0x4000000000001)",
             "v128": "(v128.const i64x2 -1 0x123456789abcdef)", "funcref": "(ref.func $f)"}
    globals = "".join(f'(global $g{k} (export "g{k}") (mut {kind}) {value})'
                      for k, (kind, value) in enumerate(kinds.items()))
    store, instance, exports = start(f"""(module (memory (export "memory") 1)
        (func $f (result i32) (i32.const 42)) (elem declare func $f) (table 1 funcref) {globals}
        (func (export "clear")
          (global.set 0 (i32.const 0)) (global.set 1 (i64.const 0)) (global.set 2 (f32.const 0))
          (global.set 3 (f64.const 0)) (global.set 4 (v128.const i64x2 0 0)) (global.set 5 (ref.null func)))
        (func (export "show")
          (i32.store (i32.const 0) (global.get 0)) (i64.store (i32.const 4) (global.get 1))
          (f32.store (i32.const 12) (global.get 2)) (f64.store (i32.const 16) (global.get 3))
          (v128.store (i32.const 24) (global.get 4))
          (table.set 0 (i32.const 0) (global.get 5))
          (i32.store (i32.const 40) (call_indirect (result i32) (i32.const 0)))))""", expose=True)
    snapshot = Snapshot.take(store, instance)
    assert snapshot.globals == tuple(f"g{k}" for k in range(len(kinds)))
    exports["clear"](store)
    with pytest.raises(wasmtime.Trap, match="uninitialized element"):
        exports["show"](store)
    snapshot.restore(store)
    exports["show"](store)
    assert exports["memory"].read(store, 0, 44) == struct.pack(
        "<iQIQqqi", -5, 0x8123456789ABCDEF, 0x7FA00001, 0xFFF4000000000001, -1, 0x123456789ABCDEF, 42)


def test_every_memory_is_restored_and_a_memory_with_two_names_is_held_once():
    store, instance, exports = start("""(module
        (memory (export "a") (export "again") 1) (memory (export "b") i64 1) (data (i32.const 0) "a"))""")
    exports["b"].write(store, b"bbb", 100)
    snapshot = Snapshot.take(store, instance)
    assert snapshot.memories["a"] is snapshot.memories["again"]
    exports["a"].write(store, b"xxx", 0)
    exports["b"].write(store, b"xxx", 100)
    snapshot.restore(store)
    assert exports["a"].read(store, 0, 3) == b"a\0\0"
    assert exports["b"].read(store, 100, 103) == b"bbb"


def test_imported_memories_and_globals_that_are_exported_are_restored():
    store = wasmtime.Store(ENGINE)
    memory = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
    counter = wasmtime.Global(store, wasmtime.GlobalType(wasmtime.ValType.i64(), True), 5)
    instance = prepare(ENGINE, """(module (import "e" "m" (memory 1)) (import "e" "g" (global (mut i64)))
        (export "m" (memory 0)) (export "g" (global 0)))""").instantiate(store, [memory, counter])
    memory.write(store, b"before", 0)
    snapshot = Snapshot.take(store, instance)
    assert snapshot.unseen == ()
    memory.write(store, b"after!", 0)
    counter.set_value(store, 6)
    snapshot.restore(store)
    assert memory.read(store, 0, 6) == b"before"
    assert counter.value(store) == 5


def test_an_instance_that_was_not_prepared_can_be_held_too():
    store = wasmtime.Store(ENGINE)
    instance = wasmtime.Instance(store, wasmtime.Module(ENGINE, COUNTER), [])
    exports = instance.exports(store)
    snapshot = Snapshot.take(store, instance)
    assert snapshot.unseen == ("what it does not export: it is not known, since the module was not made by prepare",)
    exports["step"](store, 8)
    snapshot.restore(store)
    assert exports["memory"].read(store, 8, 12) == b"seed"
    assert exports["count"].value(store) == 100


class Histories(RuleBasedStateMachine):
    """Random steps, growths, instances, snapshots and restores against a model."""

    @initialize(kind=st.sampled_from(["mmap", "pool"]))
    def begin(self, kind):
        self.engine = engine_of(kind)
        self.store = wasmtime.Store(self.engine)
        self.prepared = prepare(self.engine, COUNTER)
        self.enter()

    @rule()
    def enter(self):
        """Continues in another store, which may get the memory of the previous store."""
        self.store.close()
        self.store = wasmtime.Store(self.engine)
        self.instance = self.prepared.instantiate(self.store)
        self.exports = self.instance.exports(self.store)
        self.model = bytearray(2 * PAGE)
        self.model[8:12] = b"seed"
        self.count = 100
        self.taken = []

    @rule(address=st.integers(0, 10 * PAGE))
    def step(self, address):
        self.count += 1
        if address < len(self.model):
            self.exports["step"](self.store, address)
            self.model[address] = self.count & 0xFF
        else:
            with pytest.raises(wasmtime.Trap):
                self.exports["step"](self.store, address)

    @rule(pages=st.integers(0, 3))
    def grow(self, pages):
        if self.exports["grow"](self.store, pages) != -1:
            self.model.extend(bytes(pages * PAGE))

    @rule()
    def take(self):
        self.taken.append((Snapshot.take(self.store, self.instance), bytes(self.model), self.count))

    @rule(which=st.integers(0, 100))
    def restore(self, which):
        if self.taken:
            snapshot, memory, self.count = self.taken[which % len(self.taken)]
            if len(memory) != len(self.model):
                with pytest.raises(ValueError, match="has grown"):
                    snapshot.restore(self.store)
            snapshot.restore(self.store, zero_grown=True)
            self.model[:] = memory + bytes(len(self.model) - len(memory))

    @invariant()
    def agrees(self):
        assert contents(self.store, self.exports) == self.model
        assert self.exports["count"].value(self.store) == self.count

    def teardown(self):
        self.store.close()


TestHistories = Histories.TestCase


# -- state that cannot be restored -------------------------------------------------------------------

SECRETIVE = """(module (memory (export "memory") 1) (memory 1) (global $stack (mut i32) (i32.const 4096))
  (func (export "fail") (global.set $stack (i32.const 1)) (i32.store8 1 (i32.const 0) (i32.const 1)) unreachable)
  (func (export "stack") (result i32) (i32.add (global.get $stack) (i32.load8_u 1 (i32.const 0)))))"""


def test_hidden_memories_and_globals_are_refused_unless_they_are_exposed():
    store, instance, exports = start(SECRETIVE)
    with pytest.raises(ValueError, match=r"does not export memory 1, mutable global 0 of its own.*expose=True"):
        Snapshot.take(store, instance)
    partial = Snapshot.take(store, instance, partial=True)
    assert partial.unseen == ("memory 1", "mutable global 0")
    with pytest.raises(wasmtime.Trap):
        exports["fail"](store)
    partial.restore(store)
    assert exports["stack"](store) == 2

    store, instance, exports = start(SECRETIVE, expose=True)
    whole = Snapshot.take(store, instance)
    assert whole.unseen == ()
    with pytest.raises(wasmtime.Trap):
        exports["fail"](store)
    whole.restore(store)
    assert exports["stack"](store) == 4096


def test_state_that_a_snapshot_does_not_hold_is_refused_or_named():
    store = wasmtime.Store(ENGINE)
    imports = [wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None))), table(store), number(store, 1),
               wasmtime.Global(store, wasmtime.GlobalType(wasmtime.ValType.i32(), True), 1)]
    instance = prepare(ENGINE, """(module (import "e" "m" (memory 1)) (import "e" "t" (table 1 funcref))
        (import "e" "g" (global i32)) (import "e" "h" (global (mut i32)))
        (memory (export "memory") 1) (table 1 funcref) (table (export "t") 2 funcref)
        (data (i32.const 0) "active") (data "passive") (elem func $f) (elem func)
        (func $f (data.drop 1) (elem.drop 0)))""").instantiate(store, imports)
    hidden = ("imported memory 0", "imported table 0", "imported mutable global 1")
    with pytest.raises(ValueError, match=f"does not export {', '.join(hidden)}, which would keep"):
        Snapshot.take(store, instance)
    snapshot = Snapshot.take(store, instance, partial=True)
    assert snapshot.unseen == (*hidden, "which of 1 passive data segments were dropped",
                               "which of 1 passive element segments were dropped")
    assert snapshot.tables == ("t",)


@pytest.mark.parametrize(("segments", "code", "unseen"), [
    ('(data "passive") (elem func $f)', "(memory.init 0 (i32.const 0) (i32.const 0) (i32.const 1))", ()),
    ('(data "passive") (elem func $f)', "(data.drop 0)", ("which of 1 passive data segments were dropped",)),
    ('(data "passive") (elem func $f)', "(elem.drop 0)", ("which of 1 passive element segments were dropped",)),
    ('(data "") (elem func)', "(data.drop 0) (elem.drop 0)", ()),
    ('(data (i32.const 0) "active") (elem declare func $f)', "(data.drop 0) (elem.drop 0)", ())])
def test_passive_segments_are_named_if_they_have_content_and_code_can_drop_them(segments, code, unseen):
    store, instance, _ = start(f"""(module (memory (export "memory") 1) {segments} (func $f {code}))""")
    assert Snapshot.take(store, instance).unseen == unseen


IMPORTING = """(module (import "e" "m" (memory 1)) (import "e" "g" (global (mut i32)))
    (import "e" "t" (table 2 funcref))
    (func $one (result i32) (i32.const 1)) (func $two (result i32) (i32.const 2)) (elem (i32.const 0) $one $two)
    (func (export "spoil") (i32.store (i32.const 8) (i32.const -1)) (global.set 0 (i32.const -1))
      (table.set 0 (i32.const 0) (ref.func $two)) (table.set 0 (i32.const 1) (ref.null func))))"""


@pytest.mark.parametrize("by_linker", [False, True])
def test_the_imports_of_an_instance_are_restored_if_they_are_exposed(by_linker):
    store = wasmtime.Store(ENGINE)
    memory = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
    counter = wasmtime.Global(store, wasmtime.GlobalType(wasmtime.ValType.i32(), True), 5)
    imports = [memory, counter, table(store, 2)]
    if by_linker:
        linker = wasmtime.Linker(ENGINE)
        for name, thing in zip("mgt", imports, strict=True):
            linker.define(store, "e", name, thing)
    given = linker if by_linker else imports
    with pytest.raises(ValueError, match="not export imported memory 0, imported table 0, imported mutable global 0"):
        Snapshot.take(store, prepare(ENGINE, IMPORTING).instantiate(store, given))
    instance = prepare(ENGINE, IMPORTING, expose=True).instantiate(store, given)
    memory.write(store, b"before", 8)
    snapshot = Snapshot.take(store, instance)
    assert snapshot.unseen == ()
    assert [len(held) for held in (snapshot.memories, snapshot.globals, snapshot.tables)] == [1, 1, 1]
    instance.exports(store)["spoil"](store)
    snapshot.restore(store)
    assert memory.read(store, 8, 14) == b"before"
    assert counter.value(store) == 5
    assert [imports[2].get(store, index)(store) for index in range(2)] == [1, 2]


def test_an_instance_without_held_or_known_state_is_refused():
    store = wasmtime.Store(ENGINE)
    memory = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
    module = wasmtime.Module(ENGINE, '(module (import "e" "m" (memory 1)) (func (export "f")))')
    instance = wasmtime.Instance(store, module, [memory])
    with pytest.raises(ValueError, match="no memory and no mutable global, and what its module hides is not known"):
        Snapshot.take(store, instance)
    assert "not made by prepare" in Snapshot.take(store, instance, partial=True).unseen[0]
    store, instance, _ = start('(module (func (export "f")))')      # this module is known to have no state
    assert Snapshot.take(store, instance).unseen == ()


def test_a_table_of_an_instance_that_was_not_prepared_is_named():
    store = wasmtime.Store(ENGINE)
    module = wasmtime.Module(ENGINE, '(module (memory (export "memory") 1) (table (export "t") 2 funcref))')
    snapshot = Snapshot.take(store, wasmtime.Instance(store, module, []))
    assert snapshot.tables == ()
    assert snapshot.unseen[0] == "the elements of exported table 't'"


# A module whose table is a dispatch table that the guest itself changes.
DISPATCHER = """(module (type $f (func (result i32))) {table}
    (func $one (type $f) (i32.const 1)) (func $two (type $f) (i32.const 2)) (elem (i32.const 1) {elements})
    (func (export "call") (param i32) (result i32) (call_indirect (type $f) (local.get 0)))
    (func (export "swap") (table.set (i32.const 1) (ref.func $two)) (table.set (i32.const 2) (ref.null {null}))
      (table.set (i32.const 0) (ref.func $one))))"""
FUNCTIONS = {"table": "(table 3 funcref)", "elements": "func $one $two", "null": "func"}
TYPED = {"table": "(table 3 (ref null $f))", "elements": "(ref null $f) (ref.func $one) (ref.func $two)", "null": "$f"}


def answers(store, exports):
    found = []
    for index in range(3):
        try:
            found.append(exports["call"](store, index))
        except wasmtime.Trap:
            found.append(None)
    return found


@pytest.mark.parametrize("kind", [FUNCTIONS, pytest.param(TYPED, marks=needs_gc)])
@pytest.mark.parametrize("is_exported", [False, True])
def test_a_table_that_the_guest_changes_is_restored(kind, is_exported):
    wat = DISPATCHER.format(**kind)
    if is_exported:
        wat = wat.replace("(table 3", '(table (export "t") 3')
    else:
        store, instance, _ = start(wat)
        with pytest.raises(ValueError, match="does not export table 0 of its own"):
            Snapshot.take(store, instance)
    store, instance, exports = start(wat, expose=True)
    assert answers(store, exports) == [None, 1, 2]
    snapshot = Snapshot.take(store, instance)
    assert snapshot.tables == ("t" if is_exported else "linmem:table:0",)
    assert snapshot.unseen == ()
    for _ in range(2):
        exports["swap"](store)
        assert answers(store, exports) == [1, 2, None]
        snapshot.restore(store)
        assert answers(store, exports) == [None, 1, 2]


def test_a_hidden_table_that_no_code_changes_does_not_prevent_a_snapshot():
    store, instance, exports = start("""(module (memory (export "memory") 1) (table 1 funcref) (elem (i32.const 0) $f)
        (func $f (result i32) (i32.const 7)) (func (export "call") (result i32)
            (call_indirect (result i32) (i32.const 0))))""")
    snapshot = Snapshot.take(store, instance)
    assert (snapshot.tables, snapshot.unseen) == ((), ())
    snapshot.restore(store)
    assert exports["call"](store) == 7


def test_tables_and_globals_of_objects_and_foreign_memories_are_refused_or_named():
    store = wasmtime.Store(ENGINE)
    memory = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
    instance = prepare(ENGINE, """(module (import "e" "m" (memory 1)) (export "m" (memory 0)) (memory (export "own") 1)
        (table (export "t") 2 externref) (global (export "g") (mut externref) (ref.null extern)))""").instantiate(
        store, [memory])
    instance.exports(store)["g"].set_value(store, "an object")
    instance.exports(store)["t"].set(store, 1, "an object")
    with pytest.raises(ValueError, match=r"memory 'm' is not linmem's, which a snapshot cannot hold: partial=True"):
        Snapshot.take(store, instance)
    snapshot = Snapshot.take(store, instance, partial=True)
    assert list(snapshot.memories) == ["own"]
    assert (snapshot.globals, snapshot.tables) == ((), ())
    assert sorted(snapshot.unseen) == ["exported memory 'm' is not linmem's",
                                       "exported table 't' has references to objects",
                                       "mutable global 'g' is a reference to an object"]
    snapshot.restore(store)


@pytest.mark.skipif(not STACK_SWITCHING, reason="this wasmtime has no stack switching here")
@pytest.mark.parametrize("wat", [
    '(table (export "t") 2 nullcontref)', '(type $f (func)) (type $c (cont $f)) (table (export "t") 1 (ref null $c))',
    '(global (export "g") (mut contref) (ref.null cont))', "(global (mut nullcontref) (ref.null nocont))"])
def test_continuations_are_never_read_and_always_refused(wat):
    store, instance, _ = start(f"(module {wat})", expose=True)      # wasmtime's C API ends the process on such a read
    with pytest.raises(ValueError, match="reference"):
        Snapshot.take(store, instance)
    Snapshot.take(store, instance, partial=True).restore(store)


@pytest.mark.skipif(not STACK_SWITCHING, reason="this wasmtime has no stack switching here")
@pytest.mark.parametrize("fields", ["globals=(GlobalState(0, 'null', NULL),)",
                                    "tables=(TableState(0, 1, ((0, NULL),)),)"])
def test_a_snapshot_that_names_continuations_is_refused_without_reading_them(fields):
    assert answer(f"""
        import wasmtime
        from test_hoist import all_features
        import linmem.wasmtime
        from linmem._wasm.state import NULL, GlobalState, TableState
        config = all_features()
        linmem.wasmtime.install(config)
        engine = wasmtime.Engine(config)
        prepared = linmem.wasmtime.prepare(engine, '(module (table (export "a") (export "b") 1 nullcontref)'
            '(global (export "c") (export "d") (mut contref) (ref.null cont)))', expose=True)
        store = wasmtime.Store(engine)
        instance = prepared.instantiate(store)
        snapshot = linmem.wasmtime.Snapshot.take(store, instance, partial=True)
        forged = snapshot._from_state(snapshot._state._replace({fields}))
        for refused in (lambda: prepared.instantiate(store, start=forged), lambda: forged.restore(store, instance)):
            try:
                refused()
            except ValueError as error:
                print("may hold continuations" in str(error))
    """) == "True\nTrue"


def test_a_resized_table_is_reported_before_any_state_is_changed():
    store, instance, exports = start(COUNTER.replace("(memory", '(table (export "table") 2 funcref) (memory', 1))
    snapshot = Snapshot.take(store, instance)
    exports["step"](store, 8)
    exports["table"].grow(store, 1, None)
    with pytest.raises(ValueError, match="exported table 'table' had 2 elements and has 3"):
        snapshot.restore(store)
    assert exports["count"].value(store) == 101
    assert exports["memory"].read(store, 8, 9) == bytes([101])


@pytest.mark.parametrize(("kind", "value"), [("extern", "(local.get 0)"),
                                             pytest.param("any", "(any.convert_extern (local.get 0))", marks=needs_gc),
                                             pytest.param("any", "(ref.i31 (i32.const 5))", marks=needs_gc)])
def test_a_mutable_reference_to_an_object_is_refused_and_a_null_reference_is_restored(kind, value):
    store, instance, exports = start(f"""(module (global (export "g") (mut {kind}ref) (ref.null {kind}))
        (table (export "t") 2 {kind}ref)
        (func (export "set") (param externref) (global.set 0 {value}))
        (func (export "put") (param externref) (table.set 0 (i32.const 1) {value}))
        (func (export "null") (result i32)
          (i32.and (ref.is_null (global.get 0)) (ref.is_null (table.get 0 (i32.const 1))))))""")
    snapshot = Snapshot.take(store, instance)
    assert (snapshot.globals, snapshot.tables, snapshot.unseen) == (("g",), ("t",), ())
    exports["set"](store, "an object")
    with pytest.raises(ValueError, match="mutable global 'g' is a reference to an object"):
        Snapshot.take(store, instance)
    snapshot.restore(store)
    assert exports["null"](store) == 1
    exports["put"](store, "an object")
    with pytest.raises(ValueError, match="exported table 't' has references to objects"):
        Snapshot.take(store, instance)
    assert exports["null"](store) == 0
    snapshot.restore(store)
    assert exports["null"](store) == 1


def test_a_memory_that_is_not_linmems_is_refused():
    store = wasmtime.Store(ENGINE)
    memory = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
    prepared = prepare(ENGINE, '(module (import "e" "m" (memory 1)) (export "m" (memory 0)))')
    instance = prepared.instantiate(store, [memory])
    with pytest.raises(ValueError, match="exported memory 'm' is not linmem's"):
        Snapshot.take(store, instance)


def test_another_store_and_a_closed_store_are_refused():
    store, instance, _ = start(COUNTER)
    snapshot = Snapshot.take(store, instance)
    other, _, _ = start(COUNTER)
    with pytest.raises(ValueError, match="taken in another store"):
        snapshot.restore(other)
    store.close()
    with pytest.raises(ValueError, match="closed"):
        snapshot.restore(store)
    with pytest.raises(ValueError, match="closed"):
        Snapshot.take(store, instance)
    image = snapshot.memories["memory"]
    assert bytes(memoryview(image))[8:12] == b"seed"        # the image outlives the store


def test_arguments_are_checked():
    store, instance, _ = start(COUNTER)
    with pytest.raises(TypeError, match=r"store must be a wasmtime.Store, got str"):
        Snapshot.take("store", instance)
    with pytest.raises(TypeError, match=r"instance must be a wasmtime.Instance, got Module"):
        Snapshot.take(store, wasmtime.Module(ENGINE, "(module)"))
    with pytest.raises(TypeError, match=r"made by Snapshot.take"):
        Snapshot()


CALLING = """(module (import "e" "f" (func $f)) (memory (export "memory") 1)
  (func (export "call") (call $f)) (func (export "nothing")) {start})"""


def outcome(action, *args):
    try:
        action(*args)
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error), str(error)
    return None


def test_no_snapshot_is_taken_or_restored_during_a_call_into_the_store():
    store = wasmtime.Store(ENGINE)
    other, other_instance, _ = start(COUNTER)
    other_snapshot = Snapshot.take(other, other_instance)
    seen = {}

    def host(caller):
        seen["caller"] = outcome(Snapshot.take, caller, instance)
        seen["take"] = outcome(Snapshot.take, store, instance)
        seen["restore"] = outcome(snapshot.restore, store)
        seen["other"] = outcome(Snapshot.take, other, other_instance), outcome(other_snapshot.restore, other)

    function = wasmtime.Func(store, wasmtime.FuncType([], []), host, access_caller=True)
    instance = prepare(ENGINE, CALLING.format(start="")).instantiate(store, [function])
    exports = instance.exports(store)
    exports["nothing"](store)
    snapshot = Snapshot.take(store, instance)
    exports["call"](store)
    assert seen.pop("other") == (None, None)
    assert seen == {
        "caller": (TypeError, "store must be a wasmtime.Store, got Caller: a snapshot cannot be taken while wasm runs"),
        "take": (RuntimeError, "a snapshot cannot be taken while a call into its store is running"),
        "restore": (RuntimeError, "a snapshot cannot be restored while a call into its store is running")}
    snapshot.restore(store)
    store.close()       # breaks a cycle: the function refers to the store, and wasmtime-py to the function


def test_a_users_function_with_the_name_of_a_wasmtime_function_is_not_taken_for_a_call_into_the_store():
    store, instance, exports = start(COUNTER)
    before = contents(store, exports)

    def instantiate(store):
        return Snapshot.take(store, instance)

    def call_async(store, snapshot):
        snapshot.restore(store)

    snapshot = instantiate(store)
    exports["step"](store, 0)
    assert contents(store, exports) != before
    call_async(store, snapshot)
    assert contents(store, exports) == before


@pytest.mark.parametrize("way", ["instance", "linker", "prepared", "by a caller"])
def test_a_start_function_and_a_nested_call_are_calls_too(way):
    store, instance, _ = start(COUNTER)
    seen = []

    def host(caller):
        seen.append(outcome(Snapshot.take, store, instance))
        if way == "by a caller" and len(seen) == 1:
            started.exports(caller)["call"](caller)

    function = wasmtime.Func(store, wasmtime.FuncType([], []), host, access_caller=True)
    prepared = prepare(ENGINE, CALLING.format(start="" if way == "by a caller" else "(start $f)"))
    if way == "linker":
        linker = wasmtime.Linker(ENGINE)
        linker.define(store, "e", "f", function)
        linker.instantiate(store, prepared.module)
    elif way == "instance":
        wasmtime.Instance(store, prepared.module, [function])
    else:
        started = prepared.instantiate(store, [function])
        if way == "by a caller":
            started.exports(store)["call"](store)
    assert len(seen) == 1 + (way == "by a caller")
    assert {kind for kind, _ in seen} == {RuntimeError}
    Snapshot.take(store, instance)
    store.close()


def test_a_snapshot_keeps_no_store_alive_and_may_be_dropped_anywhere():
    store, instance, exports = start(COUNTER)
    snapshot = Snapshot.take(store, instance)
    gone = weakref.ref(store)
    del store, instance, exports
    gc.collect()
    assert gone() is None
    box = [snapshot]
    del snapshot
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join(30)
    assert box == []


# -- a real program --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forth(tmp_path_factory):
    """An interpreter, which a compiler builds from C."""
    if not NEEDS["zig"][0]:
        pytest.skip(NEEDS["zig"][1])
    source = pathlib.Path(__file__).parent / "programs" / "forth.c"
    path = tmp_path_factory.mktemp("programs") / "forth.wasm"
    subprocess.run([sys.executable, "-m", "ziglang", "cc", "-target", "wasm32-wasi", "-mexec-model=reactor", "-O2",
                    "-o", str(path), str(source)], check=True, timeout=600, capture_output=True)
    return path.read_bytes()


class Forth:
    def __init__(self, engine, instantiate):
        self.store = wasmtime.Store(engine)
        self.store.set_wasi(wasmtime.WasiConfig())
        linker = wasmtime.Linker(engine)
        linker.define_wasi()
        self.instance = instantiate(linker, self.store)
        self.exports = self.instance.exports(self.store)
        self.call("_initialize")
        self.call("init", 500)

    def call(self, name, *args):
        return self.exports[name](self.store, *args)

    def eval(self, text):
        self.exports["memory"].write(self.store, text.encode() + b"\0", self.call("request"))
        try:
            return self.call("eval")
        except wasmtime.Trap as trap:
            return str(trap.trap_code)


REQUESTS = [
    "5 square", "3 poly", "2 quad cube", "1 0 /", "7 double double double", "4095 table 500000 table + 1048575 table *",
    "1000000 fill 9 square", "square square square", "1 0 / 1", "6 poly quad", " ".join(["2"] * 200 + ["+"] * 199)]


@pytest.mark.parametrize("kind", ["mmap", "pool"])
def test_a_restored_interpreter_answers_like_a_new_one(forth, kind):
    engine = engine_of(kind)
    module = wasmtime.Module(engine, forth)
    expected = [Forth(engine, lambda linker, store: linker.instantiate(store, module)).eval(text) for text in REQUESTS]
    assert expected[:4] == [25, 36, 512, "TrapCode.INTEGER_DIVISION_BY_ZERO"]
    assert expected[5] == (2 + 3) * 4

    prepared = prepare(engine, forth, expose=True)
    assert prepared.skipped == ()
    assert prepared.images[0].size > 1 << 20
    assert prepared.added
    program = Forth(engine, lambda linker, store: prepared.instantiate(store, linker))
    program.call("init", 2000)      # room on the heap for the later requests
    snapshot = Snapshot.take(program.store, program.instance)
    assert all("tables" in text for text in snapshot.unseen)
    for turn in range(3):
        for text, said in zip(REQUESTS, expected, strict=True):
            assert program.eval(text) == said, (turn, text)
            snapshot.restore(program.store, zero_grown=True)
