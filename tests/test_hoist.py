"""The rewriter of modules: the segments that it takes out, the segments that it leaves, and equal behaviour."""

import functools
import platform
import random
import re
import sys

import pytest
import wasmtime
from hypothesis import given
from hypothesis import strategies as st
from wasmtime import _ffi as ffi

import linmem
import linmem.wasmtime
from linmem._wasm.instance_state import _fields
from linmem._wasm.module import Module
from linmem._wasm.outline import additions, extended, outline
from linmem._wasm.segments import hoist

PAGE = 65536
CUSTOM_PAGES = hasattr(wasmtime.Config, "wasm_custom_page_sizes")
needs_page_sizes = pytest.mark.skipif(not CUSTOM_PAGES, reason="this wasmtime-py has no custom page sizes")
# garbage collection also allows constant expressions that name the module's own globals
GC = hasattr(wasmtime.Config, "wasm_gc")
needs_gc = pytest.mark.skipif(not GC, reason="this wasmtime-py cannot turn garbage collection on")


def binary(wat):
    return bytes(wasmtime.wat2wasm(wat))


class Prefilled(linmem.MemoryCreator):
    """A creator whose memories start with the next content in `waiting`."""

    def __init__(self):
        self.upstream = linmem.MmapCreator()
        self.waiting = []

    def new_memory(self, ty, minimum, maximum, reserved, guard):
        memory = self.upstream.new_memory(ty, minimum, maximum, reserved, guard)
        for offset, data in (self.waiting.pop(0) if self.waiting else None) or ():
            memory.write(offset, data)
        return memory


# wasmtime supports stack switching on these machines only. Elsewhere wasmtime ends the process if the feature is on.
STACK_SWITCHING = (hasattr(wasmtime.Config, "wasm_stack_switching") and sys.platform == "linux"
                   and platform.machine() == "x86_64")
FEATURES = ("memory64", "multi_memory", "threads", "reference_types", "gc", "function_references", "custom_page_sizes",
            "exceptions", "bulk_memory", "multi_value", "simd", "relaxed_simd", "tail_call", "wide_arithmetic",
            *["stack_switching"] * STACK_SWITCHING)


def all_features():
    config = wasmtime.Config()
    for name in FEATURES:
        if hasattr(wasmtime.Config, f"wasm_{name}"):
            setattr(config, f"wasm_{name}", True)
    if hasattr(wasmtime.Config, "shared_memory"):
        config.shared_memory = True
    return config


CREATOR = Prefilled()
_config = all_features()
# Off, to follow the specification: with copy-on-write initialisation, a function that a failed instance left in a table
# sees data that was never copied.
ffi.wasmtime_config_memory_init_cow_set(_config.ptr(), False)
PLAIN = wasmtime.Engine(_config)
_config = all_features()
linmem.wasmtime.install(_config, CREATOR)
OURS = wasmtime.Engine(_config)


def _has_one_handle():
    store = wasmtime.Store(PLAIN)
    module = wasmtime.Module(PLAIN, '(module (table (export "a") (export "b") 1 funcref))')
    exports = wasmtime.Instance(store, module, []).exports(store)
    return _fields(exports["a"]._table) == _fields(exports["b"]._table)


# wasmtime before 34 makes a new handle for each export of an object.
HAS_ONE_HANDLE = _has_one_handle()


def expose(wasm):
    """The module with exports of the state that it hides, and the names of these exports."""
    module = Module(wasm)
    items, names, _ = additions(module)
    return extended(module.wasm, items), names


def said(error):
    """An error's class and text, without the backtrace and the number of the refusal."""
    text = str(error).split("wasm backtrace")[0].split("Stack backtrace")[0].strip()
    return type(error).__name__, re.sub(r" \[refusal \w+\]", "", text)


def contents(store, memory):
    if isinstance(memory, wasmtime.SharedMemory):
        return bytes(memory.data_ptr()[:memory.data_len()])
    return bytes(memory.read(store, 0, memory.data_len(store)))


def observe(engine, make, world=lambda store: [], calls=()):
    """The whole visible behaviour of the instance that ``make(store, imports)`` makes, and of calls of its exports.

    `world` makes the imports. The imports' state counts, too, and functions in tables are called.
    """
    store = wasmtime.Store(engine)
    imports = world(store)
    seen = []
    try:
        instance = make(store, imports)
    except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
        seen.append(said(error))
        exports = {}
    else:
        exports = instance.exports(store)
    seen.append(list(exports))
    for name in calls if exports else ():
        try:
            seen.append((name, exports[name](store)))
        except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
            seen.append((name, said(error)))
    for thing in [*exports.values(), *imports]:
        if isinstance(thing, (wasmtime.Memory, wasmtime.SharedMemory)):
            seen.append(contents(store, thing))
        elif isinstance(thing, wasmtime.Global):
            seen.append(thing.value(store))
        elif isinstance(thing, wasmtime.Table):
            for index in range(thing.size(store)):
                function = thing.get(store, index)
                seen.append((index, function(store)) if isinstance(function, wasmtime.Func) else None)
    return seen


def instantiates(engine, wasm, images=()):
    """A maker for `observe`. If there are images, the memories hold them before wasmtime initialises the memories."""
    def make(store, imports):
        module = wasmtime.Module(engine, wasm)
        CREATOR.waiting = list(images)
        instance = wasmtime.Instance(store, module, imports)
        assert CREATOR.waiting == []
        return instance
    return make


def same(wat, world=lambda store: [], calls=()):
    """Hoists, compares with the original, and returns the result of hoist()."""
    wasm = binary(wat)
    made = hoist(wasm)
    assert len(made.images) == len(made.minima)
    expected = observe(PLAIN, instantiates(PLAIN, wasm), world, calls)
    assert observe(OURS, instantiates(OURS, wasm), world, calls) == expected
    assert observe(OURS, instantiates(OURS, made.module, made.images), world, calls) == expected
    return made


# -- segments that are taken -----------------------------------------------------------------------


def test_a_constant_segment_becomes_a_run_and_stays_as_an_empty_segment():
    made = same('(module (memory (export "m") 1) (data (i32.const 16) "hello"))')
    assert made.images == [((16, b"hello"),)]
    assert made.minima == [PAGE]
    assert made.skipped == []
    assert b"hello" not in made.module
    assert hoist(made.module).images == [None]
    assert hoist(made.module).module == made.module


def test_a_module_without_memories_or_data_is_returned_unchanged():
    for wat in ("(module)", "(module (func))", '(module (memory (export "m") 1))',
                '(module (memory (export "m") 1) (data "passive"))'):
        made = same(wat)
        assert made.module == binary(wat)
        assert not any(made.images)
        assert made.skipped == []


def test_later_segments_overwrite_earlier_ones_and_neighbours_join():
    made = same("""(module (memory (export "m") 1)
        (data (i32.const 10) "aaaaaaaa") (data (i32.const 14) "bb") (data (i32.const 18) "cc")
        (data (i32.const 8) "dddd") (data (i32.const 100) "e") (data (i32.const 0) ""))""")
    assert made.images == [((8, b"ddddaabbaacc"), (100, b"e"))]


def test_each_memory_of_a_module_gets_its_own_image():
    made = same("""(module (memory (export "a") 1) (memory (export "b") 1) (memory (export "c") i64 2)
        (data (memory 2) (i64.const 65536) "c") (data (memory 0) (i32.const 65535) "a"))""")
    assert made.images == [((PAGE - 1, b"a"),), None, ((PAGE, b"c"),)]
    assert made.minima == [PAGE, PAGE, 2 * PAGE]


@needs_gc
def test_offsets_may_be_computed_from_constants_and_constant_globals():
    made = same("""(module (memory (export "m") 1)
        (global $ten i32 (i32.const 10)) (global $minus i32 (i32.const -6))
        (global $sum i32 (i32.add (global.get $ten) (global.get $minus)))
        (data (global.get $sum) "four")
        (data (i32.mul (global.get $ten) (i32.sub (i32.const 5) (i32.const 3))) "twenty"))""")
    assert made.images == [((4, b"four"), (20, b"twenty"))]


def test_an_offset_is_unsigned_and_arithmetic_wraps():
    made = same("""(module (memory (export "m") 1) (memory (export "n") i64 1)
        (data (i32.add (i32.const -1) (i32.const 5)) "x")
        (data (memory 1) (i64.mul (i64.const 0x4000000000000001) (i64.const 8)) "y"))""")
    assert made.images == [((4, b"x"),), ((8, b"y"),)]


@needs_page_sizes
def test_the_minimum_of_a_memory_with_small_pages_is_in_bytes():
    made = same('(module (memory (export "m") 10 (pagesize 1)) (data (i32.const 7) "xyz"))')
    assert (made.images, made.minima) == ([((7, b"xyz"),)], [10])
    made = same('(module (memory (export "m") 10 (pagesize 1)) (data (i32.const 8) "xyz"))')
    assert made.images == [None]
    assert "does not fit" in made.skipped[0]


def test_a_shared_memory_of_the_module_is_hoisted():
    made = same('(module (memory (export "m") 1 2 shared) (data (i32.const 3) "s"))')
    assert made.images == [((3, b"s"),)]


def test_a_segment_of_a_constant_offset_becomes_passive_and_any_other_keeps_its_offset():
    made = hoist(binary('(module (memory 1) (data (i32.const 16) "hello") (data (i32.const 7) ""))'))
    assert made.module.endswith(b"\x0b\5\2\1\0\1\0")        # two segments, both passive and empty
    made = hoist(binary('(module (memory 1) (data (i32.add (i32.const 1) (i32.const 2)) "hello"))'))
    assert made.module.endswith(b"\x0b\x09\1\0\x41\1\x41\2\x6a\x0b\0")


def calls_in(action):
    """The number of Python and C calls that `action` makes. This number measures work independently of the machine's
    load."""
    made = 0

    def count(frame, event, argument):
        nonlocal made
        made += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(before)
    return made


def test_the_work_to_hoist_follows_the_number_of_segments():
    def module(n):
        return binary('(module (memory 100)' + "".join(
            f'(data (i32.const {(i * 7919) % n * 64}) "{i % 10}")' for i in range(n)) + ")")

    few, many = module(500), module(5000)
    for rewrite in (hoist, outline, expose):
        assert calls_in(functools.partial(rewrite, many)) < 11 * calls_in(functools.partial(rewrite, few))
    assert calls_in(lambda: hoist(many)) < 40 * 5000
    assert len(hoist(many).images[0]) == 5000


# -- segments that are left ------------------------------------------------------------------------


def number(store, value):
    return wasmtime.Global(store, wasmtime.GlobalType(wasmtime.ValType.i32(), False), value)


@pytest.mark.parametrize("offset", [0, 3, PAGE - 1, PAGE])
def test_a_segment_at_an_imported_offset_stays_and_so_do_those_after_it(offset):
    made = same("""(module (import "e" "g" (global i32)) (memory (export "m") 1) (memory (export "n") 1)
        (data (i32.const 2) "before") (data (global.get 0) "!") (data (i32.const 3) "after")
        (data (memory 1) (i32.const 0) "other"))""", lambda store: [number(store, offset)])
    assert made.images == [((2, b"before"),), ((0, b"other"),)]
    assert made.skipped == ["data segment 1 and all after it of memory 0: its offset is not a constant of the module"]


@pytest.mark.parametrize("segment", ['(i32.const 65530) "too long"', '(i32.const 65537) ""', '(i32.const -1) "x"'])
def test_a_segment_out_of_bounds_still_traps_and_ends_the_hoisting(segment):
    made = same(f'(module (memory (export "m") 1) (data (i32.const 0) "a") (data {segment}) (data (i32.const 9) "b"))')
    assert made.images == [((0, b"a"),)]
    assert made.skipped == ["data segment 1 and all after it: it does not fit into memory 0, so that instantiation"
                            " traps"]


def test_an_empty_segment_at_the_very_end_counts_as_in_bounds():
    assert same('(module (memory (export "m") 1) (data (i32.const 65536) ""))').skipped == []


def test_segments_of_an_imported_memory_stay():
    def world(store):
        return [wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))]

    made = same("""(module (import "e" "m" (memory 1)) (memory (export "own") 1)
        (data (i32.const 0) "theirs") (data (memory 1) (i32.const 0) "ours"))""", world)
    assert made.images == [((0, b"ours"),)]
    assert made.skipped == ["data segment 0 and all after it of memory 0: the memory is imported"]


def test_memory_init_and_data_drop_keep_their_meaning():
    calls = [f"{what}{segment}" for segment in range(3) for what in ("none", "some", "drop", "none", "some")]
    functions = "".join(f"""
        (func (export "none{k}") (memory.init {k} (i32.const 64) (i32.const 0) (i32.const 0)))
        (func (export "some{k}") (memory.init {k} (i32.const 64) (i32.const 0) (i32.const 2)))
        (func (export "drop{k}") (data.drop {k}))""" for k in range(3))
    made = same(f"""(module (memory (export "m") 1)
        (data (i32.const 0) "active") (data "passive") (data (i32.const 100) "more") {functions})""", calls=calls)
    assert made.images == [((0, b"active"), (100, b"more"))]


# -- visible effects of a failure ------------------------------------------------------------------

PEEK = '(func $peek (result i32) (i32.load8_u (i32.const 0)))'


def table(store, size=4):
    kind = wasmtime.TableType(wasmtime.ValType.funcref(), wasmtime.Limits(size, None))
    return wasmtime.Table(store, kind, None)


def test_a_function_left_in_a_table_by_a_failed_element_segment_sees_no_data():
    made = same(f"""(module (import "e" "t" (table 1 funcref)) (memory 1) {PEEK}
        (elem (i32.const 0) $peek) (elem (i32.const 100) $peek) (data (i32.const 0) "x"))""",
        lambda store: [table(store)])
    assert made.images == [None]
    assert "an element segment may trap" in made.skipped[0]


def test_a_function_left_in_a_table_sees_only_data_from_before_the_failed_segment():
    def world(store):
        return [table(store), number(store, PAGE)]

    made = same(f"""(module (import "e" "t" (table 1 funcref)) (import "e" "g" (global i32)) (memory 1) (memory 1)
        {PEEK} (func $peek2 (result i32) (i32.load8_u 1 (i32.const 0)))
        (elem (i32.const 0) $peek) (data (i32.const 0) "x")
        (data (global.get 0) "fails") (data (memory 1) (i32.const 0) "y"))""", world)
    assert made.images == [((0, b"x"),), None]
    assert "all after data segment 1" in made.skipped[1]


@pytest.mark.parametrize(("element", "taken"), [
    ("(struct.new $s (i32.const 1))", False), ("(array.new_fixed $a 1 (i32.const 1))", False),
    ("(ref.i31 (i32.const 1))", True), ("(ref.null any)", True)])
def test_an_element_that_must_be_allocated_may_fail(element, taken):
    made = hoist(binary(f"""(module (type $s (struct (field i32))) (type $a (array i32))
        (import "e" "t" (table 1 anyref)) (memory 1)
        (elem (table 0) (i32.const 0) anyref {element}) (data (i32.const 0) "x"))"""))
    assert made.images == [((0, b"x"),) if taken else None]
    assert ["an element segment may trap" in reason for reason in made.skipped] == [True] * (not taken)


@pytest.mark.parametrize(("table", "offset"), [("", "i64"), ("i64", "i32")])
def test_an_element_segment_whose_offset_has_the_type_of_other_tables_may_fail(table, offset):
    wasm = binary(f"""(module (import "e" "t" (table {table} 4 funcref)) (memory 1) (func $f)
        (elem (table 0) (offset ({offset}.const 0)) func $f) (data (i32.const 0) "x"))""")
    made = hoist(wasm)
    assert (made.module, made.images) == (wasm, [None])
    assert ["an element segment may trap" in reason for reason in made.skipped] == [True]


def test_the_value_of_a_mutable_global_is_not_a_constant():
    wasm = binary('(module (memory 1) (global (mut i32) (i32.const 3)) (data (global.get 0) "x"))')
    made = hoist(wasm)
    assert (made.module, made.images) == (wasm, [None])
    assert made.skipped == ["data segment 0 and all after it of memory 0: its offset is not a constant of the module"]


def test_references_of_shared_types_are_read_and_prevent_no_rewriting():
    made = hoist(binary("""(module (import "e" "g" (global (ref (shared func)))) (memory 1) (global i32 (i32.const 3))
        (data (global.get 1) "x"))"""))
    assert (made.unknown, made.images, made.skipped) == (False, [((3, b"x"),)], [])


HEAP_TYPES = ("func", "extern", "any", "eq", "i31", "struct", "array", "exn", "cont", "none", "nofunc", "noextern",
              "noexn", "nocont")


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("heap_type", HEAP_TYPES)
@pytest.mark.parametrize("null", ["null ", ""])
def test_references_of_every_heap_type_are_read_in_short_and_at_length(heap_type, null, is_shared):
    it = f"(shared {heap_type})" if is_shared else heap_type
    made = hoist(binary(f"""(module (import "e" "g" (global (ref {null}{it})))
        (import "e" "t" (table 0 (ref null {it}))) (memory 1) (data (i32.const 3) "x"))"""))
    assert (made.unknown, made.images, made.skipped) == (False, [((3, b"x"),)], [])


def test_element_segments_that_cannot_fail_prevent_no_rewriting():
    made = same(f"""(module (import "e" "t" (table 1 funcref)) (table $own 2 funcref) (memory 1) {PEEK}
        (elem (i32.const 0) $peek) (elem (table $own) (i32.const 0) func $peek $peek)
        (elem func $peek) (elem declare func $peek) (data (i32.const 0) "x"))""", lambda store: [table(store)])
    assert made.images == [((0, b"x"),)]


def test_the_start_function_sees_the_data_and_its_trap_stays():
    made = same("""(module (import "e" "t" (table 1 funcref)) (memory 1)
        (func $peek (result i32) (i32.load8_u (i32.const 0)))
        (func $start (i32.store8 (i32.const 0) (i32.const 7)) unreachable)
        (elem (i32.const 0) $peek) (start $start) (data (i32.const 0) "x"))""", lambda store: [table(store)])
    assert made.images == [((0, b"x"),)]


# -- any module ------------------------------------------------------------------------------------


@st.composite
def modules(draw):
    """A module's text, and the kinds of its imports."""
    kinds = draw(st.lists(st.sampled_from(["32", "64", "small"] if CUSTOM_PAGES else ["32", "64"]), max_size=3))
    imported = draw(st.booleans())
    offset = draw(st.integers(0, 40) | st.sampled_from([PAGE - 2, PAGE, 2**32 - 1]))
    slots = draw(st.integers(0, 3))
    with_table = draw(st.booleans())
    head, body = ['(import "e" "g" (global $far i32))'], ["(global $near i32 (i32.const 5))"]
    memories = []
    if imported:
        head.append('(import "e" "m" (memory 1))')
        memories.append(("32", "in"))
    if with_table:
        head.append(f'(import "e" "t" (table {draw(st.integers(0, slots))} funcref))')
    for index, kind in enumerate(kinds):
        limits = {"32": "1", "64": "i64 1 3", "small": "40 (pagesize 1)"}[kind]
        name = f'(export "m{index}")' if draw(st.booleans()) else ""
        body.append(f"(memory {name} {limits})")
        memories.append((kind, "own"))
    for index, (kind, _) in enumerate(memories):
        wide = "i64" if kind == "64" else "i32"
        body.append(f"(func $peek{index} (result i32) (i32.load8_u {index} ({wide}.const 5)))")
    if with_table:
        for _ in range(draw(st.integers(0, 3))):
            what = f"$peek{draw(st.integers(0, len(memories) - 1))}" if memories else ""
            at = draw(st.integers(0, 3))
            body.append(draw(st.sampled_from([f"(elem (i32.const {at}) {what})", "(elem declare func)",
                                              f"(elem (global.get $far) func {what})"])))
    calls = []
    for index in range(draw(st.integers(0, 6)) if memories else 0):
        memory = draw(st.integers(0, len(memories) - 1))
        data = "".join(f"\\{byte:02x}" for byte in draw(st.binary(max_size=12)))
        wide = memories[memory][0] == "64"
        at = draw(st.integers(0, 34) | st.sampled_from([PAGE - 4, PAGE, -1, PAGE + 1]))
        if draw(st.integers(0, 5)):
            at = min(max(at, 0), 28)
        bits = "i64" if wide else "i32"
        where = draw(st.sampled_from([f"({bits}.const {at})", f"({bits}.const {at})", "passive",
                                      f"({bits}.add ({bits}.const 3) ({bits}.const {at}))",
                                      f"({bits}.const {at})" if wide else "(global.get $far)",
                                      "(i32.sub (global.get $near) (i32.const 2))" if GC and not wide else "passive"]))
        body.append(f'(data "{data}")' if where == "passive" else f'(data (memory {memory}) {where} "{data}")')
        size = draw(st.integers(0, 12))
        body.append(f'(func (export "init{index}") (memory.init {memory} {index} ({bits}.const 20) (i32.const 0)'
                    f" (i32.const {size})))")
        body.append(f'(func (export "drop{index}") (data.drop {index}))')
        calls += draw(st.lists(st.sampled_from([f"init{index}", f"drop{index}"]), max_size=3))
    if draw(st.booleans()) and memories:
        body.append(f"(func $start (drop (call $peek{draw(st.integers(0, len(memories) - 1))})))(start $start)")

    def world(store):
        things = [number(store, offset)]
        if imported:
            things.append(wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None))))
        if with_table:
            things.append(table(store, slots))
        return things

    return f"(module {' '.join(head)} {' '.join(body)})", world, calls


@given(modules())
def test_hosts_cannot_distinguish_a_hoisted_module_from_the_original(module):
    same(*module)


# -- any bytes -------------------------------------------------------------------------------------

EVERYTHING = """(module
    (type $f (func (param i32 i64) (result f32)))
    (import "e" "g" (global $far i32)) (import "e" "t" (table 1 10 funcref)) (import "e" "f" (func (type $f)))
    (import "e" "m" (memory 0 4))
    (memory (export "m") 1 3) (memory i64 1) (table (export "t") 2 funcref)
    (global (export "a") (mut i32) (i32.const -7)) (global i64 (i64.const 0x123456789abcdef))
    (global f64 (f64.const 1.5))
    (global (mut f32) (f32.const 2)) (global funcref (ref.func $x)) (global externref (ref.null extern))
    (global v128 (v128.const i64x2 1 2))
    (func $x (export "x") (param i32) (result i32) (local i64) (i32.add (local.get 0) (i32.const 1)))
    (func $start (memory.init 3 (i32.const 0) (i32.const 0) (i32.const 1)) (data.drop 3))
    (start $start)
    (elem (i32.const 0) $x) (elem func $x) (elem declare func $x) (elem (table 1) (i32.const 0) funcref (ref.func $x))
    (data (memory 1) (i32.const 1) "one") (data (memory 2) (i64.const 0xfff0) "two")
    (data (memory 1) (global.get $far) "three") (data "four")
    (data (memory 1) (i32.add (i32.const 1) (i32.const 2)) "5"))
"""


def verdict(wasm):
    try:
        wasmtime.Module.validate(PLAIN, wasm)
    except wasmtime.WasmtimeError:
        return False
    return True


def judged(wasm):
    """Hoists hostile bytes. The result is a ValueError if wasmtime refuses the bytes, too, or else a module of the same
    validity."""
    valid = verdict(wasm)
    for rewrite in (lambda: hoist(wasm).module, lambda: expose(wasm)[0]):
        refusal = module = None
        try:
            module = rewrite()
        except ValueError as error:
            refusal = str(error)
        if module is None:
            assert not valid or "cannot expose" in refusal, refusal
        else:
            assert verdict(module) == valid


def test_the_fuzzed_module_is_valid_and_uses_every_kind_of_section():
    wasm = binary(EVERYTHING)
    assert verdict(wasm)
    made = hoist(wasm)
    assert made.images == [((1, b"one"),), ((0xFFF0, b"two"),)]
    assert len(made.skipped) == 2


def test_every_truncation_is_refused_with_the_place_or_judged_as_by_wasmtime():
    wasm = binary(EVERYTHING)
    for size in range(len(wasm)):
        judged(wasm[:size])


HOSTILE = [0, 1, 2, 0x0B, 0x23, 0x40, 0x41, 0x7F, 0x80, 0xFB, 0xFD, 0xFF]


def mutated(wasm, chance):
    """The module, with some bytes replaced, removed or added."""
    bad = bytearray(wasm)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(8, len(bad))
        action = chance.randrange(4)
        if action == 0:
            bad[at] ^= 1 << chance.randrange(8)
        elif action == 1:
            bad[at] = chance.choice(HOSTILE)
        elif action == 2:
            del bad[at:at + chance.randrange(1, 4)]
        else:
            bad[at:at] = bytes(chance.choice(HOSTILE) for _ in range(chance.randrange(1, 4)))
        if len(bad) < 9:
            break
    return bytes(bad)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_modules_are_refused_or_judged_as_by_wasmtime(seed):
    wasm = binary(EVERYTHING)
    chance = random.Random(seed)
    for _ in range(1000):
        judged(mutated(wasm, chance))


@given(st.binary(max_size=60))
def test_random_bytes_are_refused_or_judged_as_by_wasmtime(tail):
    judged(b"\0asm\1\0\0\0" + tail)


@pytest.mark.parametrize(("wasm", "text"), [
    (b"", "not a wasm module"),
    (b"(module)", "wat2wasm"),
    (b"\0asm\1", "version ends too early"),
    (b"\0asm\2\0\0\0", "at byte 4: unknown version"),
    (b"\0asm\x0d\0\1\0", "component"),
    (b"\0asm\1\0\0\0\5\x80", "at byte 10: section size ends too early"),
    (b"\0asm\1\0\0\0\5\xff\xff\xff\xff\x7f", "at byte 9: section size has more than 32 bits"),
    (b"\0asm\1\0\0\0\5\x80\x80\x80\x80\x80\0", "more bytes than a number of 32 bits"),
    (b"\0asm\1\0\0\0\5\xff\xff\xff\xff\x0f", "section 5 of 4294967295 bytes, 0 are left"),
    (b"\0asm\1\0\0\0\x05\1\0\x05\1\0", "at byte 11: section 5 stands twice or too late"),
    (b"\0asm\1\0\0\0\x05\3\1\0\1\x0b\5\xff\xff\xff\xff\x0f", "data segments end too early"),
    (b"\0asm\1\0\0\0\x05\3\1\0\1\x0b\2\0\0", "1 bytes after the last of the data segments"),
    (b"\0asm\1\0\0\0\x0b\2\1\3", "data segment has flags 3"),
    (b"\0asm\1\0\0\0\0\2\1\xff", "name is not UTF-8"),
])
def test_a_malformed_module_is_refused_with_the_place(wasm, text):
    with pytest.raises(ValueError, match=text):
        hoist(wasm)


def test_parts_of_later_proposals_are_left_unchanged_and_named():
    # an import of kind 9, a constant expression with an unknown instruction
    wasm = b"\0asm\1\0\0\0\2\7\1\1e\1x\x09\0\x0b\7\1\0\x41\0\x0b\1x"
    made = hoist(wasm)
    assert made.module == wasm
    assert made.images == []
    assert made.skipped == ["nothing is hoisted: the import at byte 15 is of kind 0x09"]
    with pytest.raises(ValueError, match="the import at byte 15 is of kind 0x09"):
        outline(wasm)
    with pytest.raises(ValueError, match="cannot expose what the module hides: the import at byte 15"):
        expose(wasm)
    # a section of kind 14; a table of references of an unknown kind; a global of a type that has an unknown kind
    for wasm, reason in ((b"\0asm\1\0\0\0\x0e\1\0", "the section at byte 8 is of kind 14"),
                         (b"\0asm\1\0\0\0\4\4\1\x5f\0\0", "table type at byte 11 is 0x5f"),
                         (b"\0asm\1\0\0\0\6\7\1\x63\x62\0\xd0\x70\x0b", "global type at byte 12 is -30")):
        with pytest.raises(ValueError, match=reason):
            outline(wasm)
        with pytest.raises(ValueError, match=f"cannot expose what the module hides: {reason}"):
            expose(wasm)
        made = hoist(wasm)
        assert (made.module, made.images) == (wasm, [])


# -- the state of instances -------------------------------------------------------------------------


def test_the_outline_lists_imported_hidden_and_passive_parts():
    found = outline(binary(EVERYTHING))
    assert (found.imported_memories, found.memories) == (1, 3)
    assert (found.imported_tables, found.tables) == (1, 2)
    assert found.imported_globals == 1
    assert [each.mutable for each in found.global_types] == [False, True, False, False, True, False, False, False]
    assert found.exports == {("memory", 1): "m", ("table", 1): "t", ("global", 1): "a"}
    assert found.passive == (1, 1)
    assert found.hidden_globals() == [4]
    assert found.hidden_memories() == [0, 2]
    assert found.hidden_tables() == [0]
    assert found.hidden() == [("memory", 0, True), ("memory", 2, False), ("table", 0, True), ("global", 4, False)]
    assert not found.written_tables
    assert found.unreadable == frozenset()


@pytest.mark.parametrize(("code", "changes"), [
    ("(table.set 0 (i32.const 0) (ref.null func))", True),
    ("(drop (table.grow 0 (ref.null func) (i32.const 1)))", True),
    ("(table.fill 0 (i32.const 0) (ref.null func) (i32.const 1))", True),
    ("(table.copy 0 0 (i32.const 0) (i32.const 1) (i32.const 1))", True),
    ("(table.init 0 0 (i32.const 0) (i32.const 0) (i32.const 0))", True),
    ("(drop (table.get 0 (i32.const 0)))", False), ("(drop (table.size 0))", False), ("(elem.drop 0)", False),
    ("(call_indirect (i32.const 0))", False), ("(drop (i32.const 38))", False)])
def test_a_hidden_table_is_state_only_if_code_can_change_the_table(code, changes):
    wasm = binary(f"(module (table 2 funcref) (elem func) (func {code}))")
    assert outline(wasm).hidden_tables() == [0] * changes
    assert expose(wasm)[1] == ({"linmem:table:0"} if changes else frozenset())


@pytest.mark.parametrize("tables", [31, 32, 33, 200])
def test_code_that_changes_the_last_of_many_tables_is_seen(tables):
    found = outline(binary(f"""(module {"(table 1 funcref)" * tables}
        (func (table.set {tables - 1} (i32.const 0) (ref.null func))))"""))
    assert found.written_tables == {tables - 1}
    assert found.hidden_tables() == [tables - 1]


# An instruction of each form: with each number and kind of operands.
INSTRUCTIONS = """
    nop|block end|block (result i32) i32.const 38 end|loop (param i32) (result i32 i64) end|if else end|
    block (result v128) unreachable end|block (result externref) unreachable end|
    block (result (ref null $f)) unreachable end|block (result (ref 40)) unreachable end|
    try_table (result i32) (catch $x 0) (catch_ref $x 0) (catch_all 1) (catch_all_ref 1) unreachable end|throw $x|
    throw_ref|br 0|br_if 0|br_table 0 0 0|br_table 0|return|call $g|call_indirect 2 (type 38)|call_indirect (type $f)|
    return_call $g|return_call_indirect 1 (type 38)|call_ref 38|return_call_ref $f|drop|select|select (result i32)|
    select (result (ref null 38))|select (result externref)|local.get 38|local.set 300|local.tee 0|global.get 0|
    global.set 0|table.get 2|i32.load offset=38|i64.store8 offset=0x26fc0f align=1|f64.load 38 offset=0xffffffff|
    i64.load32_u 1 offset=0x1000000000|memory.size|memory.size 38|memory.grow 1|i32.const 38|i32.const -38|
    i64.const 0x26260026|f32.const 38|f64.const 38|i32.eqz|f64.max|i64.extend32_s|i32.trunc_sat_f32_s|
    i64.trunc_sat_f64_u|memory.init 0|memory.init 38 1|memory.copy|memory.copy 38 1|memory.fill|memory.fill 38|
    table.size 2|i64.add128|i64.mul_wide_u|ref.null func|ref.null 38|ref.null any|ref.is_null|ref.func $g|ref.eq|
    ref.as_non_null|br_on_null 0|br_on_non_null 0|v128.load offset=38|v128.load32_splat 38 offset=38|
    v128.const i8x16 38 0 38 0 38 0 38 0 0 0 0 0 0 0 0 0|i8x16.shuffle 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15|
    i8x16.swizzle|i32x4.splat|i8x16.extract_lane_s 15|f64x2.replace_lane 1|v128.load8_lane offset=38 3|
    v128.store64_lane 38 offset=38 1|v128.load64_zero|f32x4.add|i64x2.extmul_high_i32x4_u|i8x16.relaxed_swizzle|
    i32x4.relaxed_dot_i8x16_i7x16_add_s|memory.atomic.notify|memory.atomic.wait64 38 offset=38|atomic.fence|
    i64.atomic.rmw32.cmpxchg_u offset=38|i32.atomic.load|struct.new $s|struct.new_default 38|struct.get $s 0|
    struct.get_u 38 38|struct.set $s 0|array.new $a|array.new_default 38|array.new_fixed 38 38|array.new_data 38 38|
    array.new_elem 38 38|array.get 38|array.get_s 38|array.set 38|array.len|array.fill 38|array.copy 38 38|
    array.init_data 38 38|array.init_elem 38 38|ref.test (ref 38)|ref.test (ref null any)|ref.cast (ref 38)|
    ref.cast anyref|br_on_cast 0 anyref (ref 38)|br_on_cast_fail 0 (ref null 38) nullref|any.convert_extern|
    extern.convert_any|ref.i31|i31.get_s|i31.get_u"""


@pytest.mark.parametrize("instruction", [each.strip() for each in INSTRUCTIONS.split("|")])
def test_every_instruction_is_read_with_its_operands(instruction):
    def effects(code):
        return Module(binary(f"""(module (type $f (func (result i32))) (type $s (struct (field i32)))
            (type $a (array (mut i32))) (tag $x) (table 1 funcref) (table 1 funcref) (table 1 funcref)
            (memory 1) (memory i64 1) (global (mut i32) (i32.const 0))
            (func $g (local i32 i64 v128) (local externref funcref) (local (ref null $f)) {code}))""")).effects(3)

    found = effects(f"{instruction} i32.const 0 ref.null func table.set 1")
    assert (found.tables, found.drops) == ({1}, set())
    found = effects(f"i32.const 38 drop {instruction}")
    assert (found.tables, found.drops) == (set(), set())
    assert effects(f"elem.drop 2 {instruction} table.copy 2 0 data.drop 0").drops == {"data", "element"}


@pytest.mark.parametrize("code", [
    b"\xfb\x7f", b"\xfc\x30", b"\xfe\x7f\0", b"\xfd\xff\x7f", b"\x27", b"\xff", b"\x1f\x40\1", b"\xfc\x80\0",
    b"\x44\0"])
def test_if_an_instruction_is_not_known_all_tables_may_change(code):
    body = b"\0" + code + b"\x26\0\x0b"
    code = b"\x0a" + bytes([len(body) + 2, 1, len(body)]) + body
    wasm = b"\0asm\1\0\0\0\1\4\1\x60\0\0\3\2\1\0\4\7\2\x70\0\1\x70\0\1" + code
    assert Module(wasm).effects(2) == ({0, 1}, set(), {"data", "element"})
    assert Module(wasm).may_use_table(0)


@pytest.mark.parametrize("use", [
    "(func (drop (table.get 1 (i32.const 0))))", "(func (drop (table.size 1)))", "(elem (table 1) (i32.const 0) func)",
    "(func (call_indirect 1 (i32.const 0)))", "(func (return_call_indirect 1 (i32.const 0)))", '(export "t" (table 1))',
    "(func (table.copy 0 1 (i32.const 0) (i32.const 0) (i32.const 0)))",
    "(func (table.init 1 0 (i32.const 0) (i32.const 0) (i32.const 0)))"])
def test_a_module_that_names_a_missing_table_stays_invalid(use):
    text = "(module (table (export \"own\") 1 funcref) {} (elem (i32.const 0) $f) (func $f) {})"
    wasm = binary(text.format("", use))
    assert not verdict(wasm)
    assert not verdict(expose(wasm)[0])
    valid = binary(text.format("(table 1 funcref)", use))
    assert verdict(valid)
    assert verdict(expose(valid)[0])
    assert "linmem:elements" in expose(valid)[1]


def test_code_that_changes_a_table_is_seen_however_its_numbers_are_written():
    def module(instruction):
        body = b"\0\x41\0\xd0\x70" + instruction + b"\x0b"
        code = b"\x0a" + bytes([len(body) + 2, 1, len(body)]) + body
        return b"\0asm\1\0\0\0\1\4\1\x60\0\0\3\2\1\0\4\4\1\x70\0\1" + code

    for instruction in (b"\x26\0", b"\x26\x80\0", b"\x26\x80\x80\x80\x80\0", b"\xfc\x8f\0\0\x1a",
                        b"\xfc\x8f\x80\x80\0\x80\0\x1a"):
        wasm = module(instruction if instruction[0] == 0x26 else b"\x1a\xd0\x70\x41\0" + instruction)
        changed = outline(wasm).written_tables
        assert changed or not verdict(wasm)
        if instruction[:1] == b"\x26":
            assert verdict(wasm)
        assert changed
    assert verdict(module(b"\x1a\x1a"))
    assert not outline(module(b"\x1a\x1a")).written_tables


def test_hidden_state_can_be_exported_and_no_other_part_changes():
    wasm, names = expose(binary(EVERYTHING))
    assert names == {"linmem:memory:0", "linmem:memory:2", "linmem:table:0", "linmem:global:4", "linmem:elements"}
    assert verdict(wasm)
    assert outline(wasm).hidden_globals() == outline(wasm).hidden_memories() == []
    assert expose(wasm) == (wasm, frozenset())
    assert [name for name in (kind.name for kind in wasmtime.Module(PLAIN, wasm).exports) if name not in names] == [
        kind.name for kind in wasmtime.Module(PLAIN, binary(EVERYTHING)).exports]


def test_exports_are_added_to_a_module_that_has_none_and_never_twice_by_one_name():
    wasm, names = expose(binary("(module (global (mut i32) (i32.const 1)) (func) (memory 1))"))
    assert names == {"linmem:memory:0", "linmem:global:0"}
    assert {kind.name for kind in wasmtime.Module(PLAIN, wasm).exports} == names
    wasm, names = expose(binary('(module (global (mut i32) (i32.const 1)) (func (export "linmem:global:0")))'))
    assert names == {"linmem-:global:0"}
    assert verdict(wasm)
