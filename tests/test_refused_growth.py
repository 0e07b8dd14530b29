"""prepare(..., trap_on_refused=True): a memory.grow that is refused traps."""

import contextlib
import functools
import hashlib
import os
import random
import tracemalloc

import pytest

pytest.importorskip("wasmtime")

import wasmtime
from hypothesis import given
from support import fewer_examples
from test_cause import engine_with
from test_hoist import (
    EVERYTHING,
    GC,
    INSTRUCTIONS,
    STACK_SWITCHING,
    all_features,
    binary,
    modules,
    mutated,
    needs_gc,
    needs_page_sizes,
    observe,
    verdict,
)
from test_prepare import STACKS, TYPES, engine_of, verdict_of

import linmem.wasmtime
from linmem._wasm.growth_traps import NAME, _calling, with_growth_traps
from linmem._wasm.module import MEMORY_GROW, Module
from linmem._wasm.reader import Reader, Unknown, leb128
from linmem.wasmtime import Sessions, Snapshot, cause, patch, prepare

PAGE = 65536
LIMIT = 4 * PAGE
GROWS = """(module (memory (export "m") 1 9) (data (i32.const 8) "data") (global $calls (mut i32) (i32.const 0))
    (func (export "grow") (param i32) (result i32)
        (global.set $calls (i32.add (global.get $calls) (i32.const 1))) (memory.grow (local.get 0)))
    (func (export "grow_twice") (param i32) (result i32)
        (memory.grow (local.get 0)) (memory.grow (local.get 0)) i32.add)
    (func (export "calls") (result i32) (global.get $calls)) (func (export "size") (result i32) (memory.size))
    (func (export "trap") unreachable))"""


def limited(limit=LIMIT):
    return linmem.LimitingCreator(linmem.creator("mmap"), limit)


class Guest:
    def __init__(self, wat=GROWS, *, creator=None, engine=None, imports=lambda store: [], **options):
        config = all_features()
        linmem.wasmtime.install(config, limited() if creator is None else creator)
        engine = wasmtime.Engine(config) if engine is None else engine
        self.prepared = prepare(engine, wat, **{"trap_on_refused": True, **options})
        self.store = wasmtime.Store(engine)
        self.exports = self.prepared.instantiate(self.store, imports(self.store)).exports(self.store)

    def call(self, name, *arguments):
        return self.exports[name](self.store, *arguments)

    def trap(self, name, *arguments):
        with pytest.raises(wasmtime.Trap) as raised:
            self.call(name, *arguments)
        assert raised.value.trap_code == wasmtime.TrapCode.UNREACHABLE
        return raised.value


# -- what a guest sees ---------------------------------------------------------------------------------------


def test_without_the_option_a_refused_growth_returns_minus_one():
    for options in ({"trap_on_refused": False}, {}):
        assert Guest(**{"trap_on_refused": False, **options}).call("grow", 9) == -1
    with pytest.raises(TypeError, match="trap_on_refused must be True or False, got 1"):
        Guest(trap_on_refused=1)


def test_a_growth_that_is_granted_returns_the_size_before_it():
    guest = Guest()
    assert [guest.call("grow", pages) for pages in (1, 0, 2, 0)] == [1, 2, 2, 4]
    assert guest.exports["m"].size(guest.store) == 4


def test_a_growth_that_a_creator_refuses_traps_with_its_exception_as_the_cause():
    guest = Guest()
    trap = guest.trap("grow", 4)
    found = cause(trap)
    assert type(found) is linmem.LimitError
    assert (found.limit, found.used, found.requested) == (LIMIT, PAGE, 4 * PAGE)
    assert trap.frames[0].func_name == NAME
    assert (guest.call("size"), guest.call("calls")) == (1, 1)     # the instance stays usable
    assert cause(guest.trap("trap")) is None
    assert type(cause(guest.trap("grow_twice", 2))) is linmem.LimitError
    assert guest.call("size") == 3


def test_a_growth_past_the_maximum_traps_and_has_no_cause():
    guest = Guest(creator=linmem.creator("mmap"))
    trap = guest.trap("grow", 9)
    assert cause(trap) is None
    assert trap.frames[0].func_name == NAME
    assert cause(guest.trap("grow", -1)) is None


def test_a_growth_past_a_limit_of_the_store_traps():
    guest = Guest()
    guest.store.set_limits(memory_size=2 * PAGE)
    assert guest.call("grow", 1) == 1
    assert cause(guest.trap("grow", 1)) is None


def test_what_a_creator_in_python_raises_is_the_cause():
    class Refused(Exception):
        pass

    def refuse(mem, old, new):
        raise Refused

    guest = Guest(creator=linmem.CallbackCreator(linmem.creator("mmap"), on_grow=refuse))
    assert type(cause(guest.trap("grow", 1))) is Refused
    assert guest.call("grow", 0) == 1


def test_a_trap_goes_through_host_functions_to_the_outermost_call():
    inner = Guest()
    outer = Guest("""(module (import "e" "f" (func $f)) (memory 1) (func (export "run")
        (drop (memory.grow (i32.const 0))) (call $f)))""", imports=lambda store: [
            wasmtime.Func(store, wasmtime.FuncType([], []), lambda: inner.call("grow", 5) and None)])
    found = cause(outer.trap("run"))
    assert (type(found), found.requested) == (linmem.LimitError, 5 * PAGE)


def test_growths_of_64_bit_and_of_imported_memories_trap():
    wat = """(module (import "e" "m" (memory 1 9)) (memory i64 0 9)
        (func (export "grow 0") (param i32) (result i32) (memory.grow 0 (local.get 0)))
        (func (export "grow 1") (param i64) (result i64) (memory.grow 1 (local.get 0))))"""

    def imports(store):
        return [linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, 9)))]

    guest = Guest(wat, imports=imports)
    assert (guest.call("grow 0", 1), guest.call("grow 1", 1)) == (1, 0)
    for name in ("grow 0", "grow 1"):
        assert type(cause(guest.trap(name, 3))) is linmem.LimitError
    assert (guest.call("grow 1", 1), guest.call("grow 0", 0)) == (1, 2)


def test_growths_of_shared_memories_trap():
    guest = Guest("""(module (memory 1 9 shared)
        (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))""")
    assert guest.call("grow", 1) == 1
    assert type(cause(guest.trap("grow", 3))) is linmem.LimitError


@needs_page_sizes
def test_a_memory_of_as_many_pages_as_there_may_be_has_no_size_that_looks_like_a_refusal():
    wat = """(module (memory {} (pagesize 1))
        (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))"""
    guest = Guest(wat.format(0xfffffffe), creator=linmem.creator("mmap"))
    assert guest.call("grow", 0) == -2
    guest.trap("grow", 1)
    with pytest.raises(wasmtime.WasmtimeError, match="exceeds memory limits"):
        Guest(wat.format(0xffffffff), creator=linmem.creator("mmap"))


@needs_page_sizes
def test_growths_of_memories_with_small_pages_trap():
    guest = Guest("""(module (memory 1 (pagesize 1))
        (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))""")
    assert guest.call("grow", 100) == 1
    assert type(cause(guest.trap("grow", LIMIT))) is linmem.LimitError


def test_a_growth_costs_eight_more_units_of_fuel():
    config = all_features()
    config.consume_fuel = True
    linmem.wasmtime.install(config, linmem.creator("mmap"))
    engine = wasmtime.Engine(config)
    used = []
    for trap_on_refused in (False, True):
        guest = Guest(engine=engine, trap_on_refused=trap_on_refused)
        guest.store.set_fuel(1000)
        guest.call("grow", 1)
        used.append(1000 - guest.store.get_fuel())
    assert used[1] - used[0] == 8


# -- the rest of the module stays ----------------------------------------------------------------------------


def test_a_module_that_does_not_grow_stays_as_it_is():
    for wat in ("(module)", "(module (memory 1))", "(module (func (drop (i32.const 64))))", """(module (memory 1)
            (func (export "f") (result f64) (f64.mul (f64.const 2) (f64.const 2)) (block) (drop (i32.const 64))))"""):
        wasm = binary(wat)
        assert with_growth_traps(Module(wasm)) == wasm
    wasm = b"\0asm\1\0\0\0\5\3\1\0\1\x0a\1\0"       # an empty section of code, and no section of functions
    assert verdict(wasm)
    assert with_growth_traps(Module(wasm)) == wasm


def test_modules_behave_like_the_original_modules():
    engine = engine_of()
    prepared = {trap: functools.partial(prepare, engine, trap_on_refused=trap) for trap in (False, True)}

    @fewer_examples(3)
    @given(modules())
    def check(module):
        wat, *rest = module
        head, paren, _ = wat.rpartition(")")
        grows = "".join(f"(func (export \"grow {index}\") (drop (memory.grow {index} ({wide}.const 0))))"
                        for index, wide in enumerate(_widths(wat)))
        wat = f"{head} {grows}{paren}"
        seen = [observe(engine, made(wat).instantiate, *rest) for made in prepared.values()]
        assert seen[0] == seen[1]

    check()


def _widths(wat):
    wasm = Module(binary(wat))
    return [f"i{memory.bits}" for memory in wasm.imports()[0] + wasm.memories()]


@pytest.mark.parametrize("functions", [0, 100, 126, 127, 128, 200, 17_000])
def test_all_functions_keep_their_numbers(functions):
    wat = f"""(module (import "e" "f" (func $e (result i32))) (memory 1 9) (table 4 funcref)
        (elem (i32.const 0) $first $last $e) (global (export "g") funcref (ref.func $last))
        (func $first (result i32) (i32.add (memory.grow (i32.const 1)) (call $last)))
        {"(func)" * functions}
        (func $last (result i32) (i32.add (memory.grow (i32.const 1)) (call $e)))
        (func (export "run") (param i32) (result i32) (call_indirect (result i32) (local.get 0))))"""

    def imports(store):
        return [wasmtime.Func(store, wasmtime.FuncType([], [wasmtime.ValType.i32()]), lambda: 100)]

    guest = Guest(wat, imports=imports)
    assert [guest.call("run", number) for number in (0, 1, 2)] == [103, 103, 100]
    guest.trap("run", 0)


@pytest.mark.parametrize("instruction", [each.strip() for each in INSTRUCTIONS.split("|")])
def test_growths_beside_every_instruction_are_found(instruction):
    wasm = binary(f"""(module (type $f (func (result i32))) (type $s (struct (field i32)))
        (type $a (array (mut i32))) (tag $x) (table 1 funcref) (table 1 funcref) (table 1 funcref)
        (memory 1) (memory i64 1) (global (mut i32) (i32.const 0))
        (func $g (local i32 i64 v128) (local externref funcref) (local (ref null $f))
            memory.grow 0 {instruction} memory.grow 1 {instruction} memory.grow 0))""")
    code, found = _calling(Module(wasm), 2, 300)
    assert set(found) == {0, 1}
    growths = 5 if instruction == "memory.grow 1" else 3
    assert code.count(b"\x10" + leb128(found[0])) == 2
    assert code.count(b"\x10" + leb128(found[1])) == growths - 2
    _, content, end = Module(wasm).sections[10]
    assert len(code) == end - content - 1 + growths       # a call of these functions is one byte longer
    assert b"\x40\0" not in code


@pytest.mark.parametrize("number", [b"\0", b"\x80\0", b"\x80\x80\x80\x80\0", b"\1", b"\x81\0", b"\x81\x80\x80\x80\0"])
def test_growths_are_found_however_the_number_of_the_memory_is_written(number):
    body = b"\0\x41\1\x40" + number + b"\x1a\x0b"
    wasm = (b"\0asm\1\0\0\0\1\4\1\x60\0\0\3\2\1\0\5\5\2\0\1\0\1\x0a" + bytes([len(body) + 2, 1, len(body)]) + body)
    assert verdict(wasm)
    code, found = _calling(Module(wasm), 2, 1)
    assert found == {number[0] & 1: 1}
    assert code == b"\7" + b"\0\x41\1\x10\1\x1a\x0b"
    assert verdict(with_growth_traps(Module(wasm)))


@pytest.mark.parametrize("memories", [1, 127, 128, 129, 200])
def test_growths_of_the_last_of_many_memories_are_found(memories):
    wasm = binary(f"(module {'(memory 0)' * memories} (func (drop (memory.grow {memories - 1} (i32.const 0)))))")
    assert set(_calling(Module(wasm), memories, 1)[1]) == {memories - 1}
    changed = with_growth_traps(Module(wasm))
    assert changed != wasm
    if verdict(wasm):       # wasmtime bounds the number of memories
        assert verdict(changed)


TYPES_BEFORE = ("(type (func (param i32 f64 v128 externref) (result i64)))", "(type (struct (field (mut i8) i16 f32)))",
                "(type (array (mut i64)))", "(rec (type (func)) (type (array i8)))", "(rec)",
                "(type $a (sub (struct (field i32)))) (type (sub final $a (struct (field i32 i64))))",
                "(rec (type $x (sub (struct (field (ref null $y))))) (type $y (array (ref $x))))")


@needs_gc
@pytest.mark.parametrize("types", [*TYPES_BEFORE, "".join(TYPES_BEFORE), 150 * TYPES_BEFORE[0]])
def test_the_added_types_have_the_next_numbers_after_types_of_all_kinds(types):
    wat = f"""(module {types} (memory 1 9) (memory i64 1 9)
        (func (export "grow 0") (param i32) (result i32) (memory.grow 0 (local.get 0)))
        (func (export "grow 1") (param i64) (result i64) (memory.grow 1 (local.get 0))))"""
    guest = Guest(wat)
    assert (guest.call("grow 0", 1), guest.call("grow 1", 1)) == (1, 1)
    guest.trap("grow 0", 1)
    guest.trap("grow 1", 1)


def test_any_module_that_is_valid_stays_valid():
    sources = [binary(wat) for wat in (GROWS, EVERYTHING, *[TYPES] * GC, *[STACKS] * STACK_SWITCHING)]
    chance = random.Random(16)
    valid = 0
    for source in sources:
        for wasm in [source, *(mutated(source, chance) for _ in range(300))]:
            if verdict(wasm):
                valid += 1
                with contextlib.suppress(Unknown):
                    assert verdict(with_growth_traps(Module(wasm)))
    assert valid > 50


def sections(wasm):
    """The names of the custom sections."""
    found, reader = [], Reader(wasm, 8, len(wasm))
    while reader.at < len(wasm):
        kind = reader.byte("")
        size = reader.u32("")
        start = reader.skip(size, "")
        if kind == 0:
            found.append(Reader(wasm, start, reader.at).name(""))
    return found


def test_sections_that_name_places_in_the_code_are_left_out_and_all_others_stay():
    names = [".debug_info", ".debug_line", "metadata.code.branch_hint", "sourceMappingURL", "external_debug_info",
             "producers", "target_features", "debug", "metadata"]
    custom = b"".join(b"\0" + leb128(len(name) + 3) + leb128(len(name)) + name.encode() + b"ab" for name in names)
    wasm = binary(GROWS)
    assert wasm.startswith(b"\0asm\1\0\0\0")
    wasm = wasm[:8] + custom + wasm[8:] + custom
    kept = ["producers", "target_features", "debug", "metadata"]
    assert verdict(wasm)
    changed = with_growth_traps(Module(wasm))
    assert verdict(changed)
    own = sections(binary(GROWS))
    assert sections(changed) == [*kept, *own, *kept, "name"]
    other = binary("(module (func))") + custom
    assert with_growth_traps(Module(other)) == other


def test_many_small_sections_take_no_memory():
    wasm = binary(GROWS) + b"\0\1\0" * 5_000
    tracemalloc.start()
    try:
        assert len(with_growth_traps(Module(wasm))) > len(wasm)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * len(wasm)


def test_the_names_of_functions_stay():
    trap = Guest("""(module (memory 1 9) (func $inside (drop (memory.grow (i32.const 9))))
        (func $outside (export "run") (call $inside)))""").trap("run")
    assert [frame.func_name for frame in trap.frames] == [NAME, "inside", "outside"]


# -- modules that are refused --------------------------------------------------------------------------------


def test_an_instruction_that_linmem_does_not_know_is_refused_and_names_the_place():
    # i32.trunc_sat_f32_s, with one byte more than its number needs
    body = b"\0\x43\0\0\0\0\xfc\x80\0\x40\0\x1a\x0b"
    wasm = b"\0asm\1\0\0\0\1\4\1\x60\0\0\3\2\1\0\5\3\1\0\1\x0a" + bytes([len(body) + 2, 1, len(body)]) + body
    assert verdict(wasm)
    engine = engine_of()
    prepare(engine, wasm)
    with pytest.raises(ValueError, match=r"^trap_on_refused must be False for this module, because linmem cannot find"
                                         r" each memory\.grow in it: the instruction at byte 33 is 0xfc00$"):
        prepare(engine, wasm, trap_on_refused=True)
    without = wasm.replace(b"\x40\0\x1a", b"\x1a\1\1")
    assert verdict(without)
    prepare(engine, without, trap_on_refused=True)      # it grows no memory


@pytest.mark.skipif(not STACK_SWITCHING, reason="this wasmtime has no stack switching here")
def test_code_with_continuations_is_refused_if_it_grows_a_memory():
    wat = """(module (type $f (func)) (type $c (cont $f)) (memory 1) (func $g) (elem declare func $g)
        (func (drop (cont.new $c (ref.func $g))) {}))"""
    for code, known in (("", True), ("(drop (memory.grow (i32.const 1)))", False)):
        wasm = binary(wat.format(code))
        assert verdict(wasm)
        if known:
            assert with_growth_traps(Module(wasm)) == wasm
        else:
            with pytest.raises(Unknown):
                with_growth_traps(Module(wasm))


@pytest.mark.parametrize("wat", [
    '(module (memory 1) (func (drop (memory.grow (i32.const 1)))) (func (export "f") (drop (call 2 (i32.const 1)))))',
    '(module (memory 1) (func (drop (memory.grow (i32.const 1)))) (export "f" (func 1)))',
    "(module (memory 1) (func (drop (memory.grow (i32.const 1)))) (func (type 1) (local.get 0)))",
    "(module (memory 1) (func (drop (memory.grow 1 (i32.const 1)))))"])
def test_a_module_that_names_what_is_added_stays_invalid(wat):
    engine = engine_of()
    wasm = binary(wat)
    errors = []
    for trap_on_refused in (False, True):
        with pytest.raises(wasmtime.WasmtimeError) as raised:
            prepare(engine, wasm, trap_on_refused=trap_on_refused)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("wasm", [b"\0asm\1\0\0\0\x0a", b"\0asm\1\0\0\0\1\5\2\x60\0\0\x60"])
def test_bytes_that_are_no_module_are_refused_with_wasmtimes_text(wasm):
    engine = engine_of()
    with pytest.raises(wasmtime.WasmtimeError) as expected:
        wasmtime.Module(engine, wasm)
    with pytest.raises(wasmtime.WasmtimeError) as raised:
        prepare(engine, wasm, trap_on_refused=True)
    assert str(raised.value) == str(expected.value)


# -- snapshots, caches and sessions --------------------------------------------------------------------------


def test_the_digest_is_the_one_of_the_module_that_was_given():
    guest = Guest()
    assert guest.prepared.digest == hashlib.sha256(binary(GROWS)).hexdigest()


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_a_snapshot_starts_instances_with_and_without_the_option(taken, started):
    first = Guest(trap_on_refused=taken, expose=True)
    store = wasmtime.Store(first.prepared.engine)
    instance = first.prepared.instantiate(store)
    assert instance.exports(store)["grow"](store, 1) == 1
    snapshot = Snapshot.take(store, instance)
    second = Guest(trap_on_refused=started, expose=True)
    store = wasmtime.Store(second.prepared.engine)
    exports = second.prepared.instantiate(store, start=snapshot).exports(store)
    assert (exports["calls"](store), exports["size"](store)) == (1, 2)
    assert bytes(exports["m"].read(store, 8, 12)) == b"data"
    if started:
        with pytest.raises(wasmtime.Trap):
            exports["grow"](store, 9)
    else:
        assert exports["grow"](store, 9) == -1
    assert (exports["calls"](store), exports["grow"](store, 0)) == (2, 2)


def test_functions_that_expose_and_snapshots_name_are_the_same():
    wat = """(module (memory 1 9) (table 3 funcref) (elem (i32.const 0) $f) (elem declare func $g)
        (func $f (result i32) (memory.grow (i32.const 1))) (func $g (result i32) (memory.grow (i32.const 9)))
        (func (export "swap") (table.set (i32.const 1) (table.get (i32.const 0))))
        (func (export "run") (param i32) (result i32) (call_indirect (result i32) (local.get 0))))"""
    guests = [Guest(wat, expose=True, trap_on_refused=trap) for trap in (False, True)]
    assert guests[0].prepared.added == guests[1].prepared.added
    store = wasmtime.Store(guests[1].prepared.engine)
    instance = guests[1].prepared.instantiate(store)
    instance.exports(store)["swap"](store)
    snapshot = Snapshot.take(store, instance)
    for guest in guests:
        store = wasmtime.Store(guest.prepared.engine)
        exports = guest.prepared.instantiate(store, start=snapshot).exports(store)
        assert [exports["run"](store, number) for number in (0, 1)] == [1, 2]


def test_sessions_hand_out_instances_whose_refused_growths_trap():
    engine = engine_with(limited(64 * PAGE))
    prepared = prepare(engine, GROWS, expose=True, trap_on_refused=True)
    store = wasmtime.Store(engine)
    snapshot = Snapshot.take(store, prepared.instantiate(store))
    with Sessions(prepared, start=snapshot, size=1) as sessions:
        for _ in range(3):
            with sessions.get() as (store, instance):
                exports = instance.exports(store)
                assert exports["grow"](store, 1) == 1
                with pytest.raises(wasmtime.Trap):
                    exports["grow"](store, 9)


def test_a_cache_keeps_both_modules(tmp_path):
    cache = tmp_path / "cache"
    for _ in range(2):
        for trap_on_refused in (False, True):
            guest = Guest(cache=cache, trap_on_refused=trap_on_refused)
            if trap_on_refused:
                guest.trap("grow", 9)
            else:
                assert guest.call("grow", 9) == -1
    suffixes = sorted(os.path.splitext(name)[1] for _, _, names in os.walk(cache) for name in names)
    assert suffixes.count(".cwasm") == 2
    assert suffixes.count(".image") == 1


def test_a_module_can_be_prepared_with_traps_under_a_patch():
    with patch(limited()):
        engine = wasmtime.Engine()
        guest = Guest(engine=engine)
        assert guest.call("grow", 1) == 1
        assert type(cause(guest.trap("grow", 4))) is linmem.LimitError
        assert bytes(guest.exports["m"].read(guest.store, 8, 12)) == b"data"


def test_no_other_instruction_is_taken_for_a_growth():
    wasm = binary("""(module (memory 1) (func (local f64)
        (local.set 0 (f64.const 2)) (drop (i32.const 64)) block nop end (drop (f32.const 2)) unreachable))""")
    _, content, end = Module(wasm).sections[10]
    reader = Reader(wasm, content + 2, end)
    assert [code for _, code, _ in Module(wasm).instructions(reader)].count(MEMORY_GROW) == 0


# -- components ------------------------------------------------------------------------------------------

GROWS_IN_A_COMPONENT = """(component
    (component $inner
        (core module $m (memory (export "memory") 1) (data (i32.const 0) "data")
            (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))
        (core instance $i (instantiate $m))
        (func (export "grow") (param "pages" u32) (result s32) (canon lift (core func $i "grow"))))
    (instance $i (instantiate $inner))
    (export "grow" (func $i "grow")))"""


def test_a_refused_growth_inside_of_a_component_traps():
    component = pytest.importorskip("wasmtime.component")
    config = all_features()
    linmem.wasmtime.install(config, limited())
    engine = wasmtime.Engine(config)
    for trap_on_refused in False, True:
        prepared = prepare(engine, GROWS_IN_A_COMPONENT, trap_on_refused=trap_on_refused)
        assert prepared.skipped == ()
        store = wasmtime.Store(engine)
        grow = prepared.instantiate(store, component.Linker(engine)).get_func(store, "grow")
        assert grow(store, 2) == 1
        if trap_on_refused:
            with pytest.raises(wasmtime.WasmtimeError, match="unreachable") as caught:
                grow(store, 9)
            assert isinstance(cause(caught.value), linmem.LimitError)
        else:
            grow.post_return(store)
            assert grow(store, 9) == -1
        store.close()


def test_a_component_with_an_invalid_module_is_refused_as_without_the_option():
    component = pytest.importorskip("wasmtime.component")
    engine = engine_of("mmap")
    wasm = bytes(wasmtime.wat2wasm('(component (core module (func (drop (i32.const 1)))))')).replace(
        b"\x41\x01\x1a", b"\x41\x01\x10")
    with pytest.raises(wasmtime.WasmtimeError) as plain:
        component.Component(engine, wasm)
    with pytest.raises(wasmtime.WasmtimeError) as caught:
        prepare(engine, wasm, trap_on_refused=True)
    assert str(caught.value) == str(plain.value)


@pytest.mark.parametrize("change", [
    lambda wasm: wasm[:-3], lambda wasm: wasm + b"\1\5", lambda wasm: wasm + b"\x63\0",
    lambda wasm: wasm + b"\x06\5\1\0\x11\2\x09", lambda wasm: wasm.replace(b"\4grow\x08", b"\4grog\x08")])
def test_a_malformed_component_is_refused_as_without_the_option(change):
    component = pytest.importorskip("wasmtime.component")
    engine = engine_of("mmap")
    wasm = change(binary(GROWS_IN_A_COMPONENT))
    refused = verdict_of(component.Component, engine, wasm)
    assert refused is not None
    assert verdict_of(prepare, engine, wasm, trap_on_refused=True) == refused
