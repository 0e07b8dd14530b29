"""Modules that start from images: instances behave the same and start faster."""

import hashlib
import os
import random
import signal
import stat
import threading

import pytest
import wasmtime
from hypothesis import assume, given
from hypothesis import strategies as st
from support import FORKING, REAL_PAGE, answer, fewer_examples, requires, smaps, start_child
from test_hoist import (
    EVERYTHING,
    STACK_SWITCHING,
    Prefilled,
    all_features,
    binary,
    modules,
    mutated,
    needs_gc,
    number,
    observe,
    said,
    table,
)
from wasmtime import _ffi as ffi

import linmem
import linmem.wasmtime
from linmem._files import sparse
from linmem._wasm import module as _module
from linmem._wasm import prepared as _prepared
from linmem._wasm.component import is_component
from linmem._wasm.image_cache import Cache
from linmem._wasm.reader import Unknown
from linmem.wasmtime import prepare

PAGE = 65536
CREATORS = {
    "mmap": linmem.creator,
    "pool": lambda: linmem.creator("pool"),
    "limited pool": lambda: linmem.creator("limiting", limit_bytes=1 << 40, upstream=linmem.creator("pool")),
    "limiting": lambda: linmem.creator("limiting", limit_bytes=1 << 40),
    "statistics": lambda: linmem.creator("statistics"),
    "python": Prefilled,
}
HELLO = '(module (memory (export "m") 1) (data (i32.const 16) "hello") (data (i32.const 60000) "world"))'
GREETED = {16: b"hello", 60000: b"world"}
# References of all kinds that this wasmtime supports. wat2wasm assembles every kind.
TYPES = """(module (type $f (func (param i32))) (type $s (struct (field (mut i8)) (field (ref null $f))))
    (rec (type $a (array (ref null $b))) (type $b (sub (struct (field (ref null $a))))))
    (tag (param i32)) (memory (export "m") 2) (memory 1 (pagesize 1)) (table 2 (ref null $f)) (table 2 anyref)
    (table (export "t") 1 externref) (global (mut (ref null $s)) (ref.null $s)) (global (mut exnref) (ref.null exn))
    (elem (table 1) (i32.const 0) anyref (ref.i31 (i32.const 1))) (data (i32.const 9) "nine")
    (data (i32.const 3) "three"))"""
STACKS = """(module (type $f (func)) (type $c (cont $f)) (table 3 nullcontref) (table (export "t") 1 (ref null $c))
    (memory (export "m") 1) (global (mut contref) (ref.null cont)) (tag) (data (i32.const 1) "one"))"""


def engine_of(kind="mmap", **settings):
    config = all_features()
    for name, value in settings.items():
        setattr(config, name, value)
    linmem.wasmtime.install(config, CREATORS[kind]())
    return wasmtime.Engine(config)


MMAP = engine_of()      # shared by many tests, because a MmapCreator keeps no memories
PLAIN = wasmtime.Engine(all_features())


# Each test makes its own engine, whose end releases the pool's slots.
with_every_creator = pytest.mark.parametrize("kind", CREATORS)


def of(wasm, *, filled):
    """The content of a memory: `filled` (offset -> bytes) and zeros elsewhere."""
    out = bytearray(wasm)
    for offset, data in filled.items():
        out[offset:offset + len(data)] = data
    return bytes(out)


def memory_of(store, instance, name="m"):
    return bytes(instance.exports(store)[name].read(store))


# -- the same instances ----------------------------------------------------------------------------


def same(engine, wat, world=lambda store: [], calls=()):
    """Compares a prepared module with wasmtime's own, twice. Returns the prepared module."""
    prepared = prepare(engine, wat)
    module = wasmtime.Module(engine, wat)
    expected = observe(engine, lambda store, imports: wasmtime.Instance(store, module, imports), world, calls)
    for _ in range(2):
        assert observe(engine, prepared.instantiate, world, calls) == expected
    return prepared


@with_every_creator
def test_a_prepared_module_behaves_like_the_original_module(kind):
    engine = engine_of(kind)

    @fewer_examples(6)
    @given(modules())
    def check(module):
        same(engine, *module)

    check()


@with_every_creator
def test_the_data_is_there_and_each_instance_has_its_own(kind):
    engine = engine_of(kind)
    prepared = prepare(engine, HELLO)
    stores = [wasmtime.Store(engine) for _ in range(3)]
    instances = [prepared.instantiate(store, []) for store in stores]
    for turn, (store, instance) in enumerate(zip(stores, instances, strict=True)):
        memory = instance.exports(store)["m"]
        assert bytes(memory.read(store)) == of(PAGE, filled=GREETED)
        memory.write(store, bytes([turn]) * 5, 16)
    assert memory_of(stores[0], instances[0])[16:21] == bytes(5)
    assert memory_of(stores[1], instances[1])[16:21] == b"\1" * 5
    assert [image is not None for image in prepared.images] == [True]
    assert prepared.skipped == ()
    store = wasmtime.Store(engine)
    assert memory_of(store, prepared.instantiate(store)) == of(PAGE, filled=GREETED)


@with_every_creator
def test_data_survives_growth_and_grown_bytes_are_zero(kind):
    engine = engine_of(kind)
    prepared = prepare(engine, HELLO)
    store = wasmtime.Store(engine)
    memory = prepared.instantiate(store).exports(store)["m"]
    assert memory.grow(store, 3) == 1
    assert bytes(memory.read(store)) == of(4 * PAGE, filled=GREETED)


@with_every_creator
def test_an_instance_sees_no_byte_of_earlier_instances(kind):
    engine = engine_of(kind)
    bare = '(module (memory (export "m") 1))'
    plain = wasmtime.Module(engine, bare)
    prepared = [prepare(engine, HELLO), prepare(engine, bare[:-1] + '(data (i32.const 17) "other"))')]
    expected = [of(PAGE, filled=GREETED), of(PAGE, filled={17: b"other"}), bytes(PAGE)]
    for turn in range(24):
        which = (0, 0, 1, 0, 2, 1, 1, 2)[turn % 8]
        store = wasmtime.Store(engine)
        instance = wasmtime.Instance(store, plain, []) if which == 2 else prepared[which].instantiate(store)
        memory = instance.exports(store)["m"]
        assert bytes(memory.read(store)) == expected[which]
        if turn % 3:
            memory.grow(store, turn % 3)
        memory.write(store, b"\xff" * (turn % 5 * 13000), turn * 7)
        memory.write(store, b"\xff" * (memory.data_len(store) - PAGE), PAGE - 1)
        store.close()


@with_every_creator
def test_segments_out_of_bounds_trap_as_in_wasmtime_and_later_instances_are_not_affected(kind):
    engine = engine_of(kind)
    bad = prepare(engine, '(module (memory 1) (data (i32.const 0) "a") (data (i32.const 65535) "too long"))')
    assert "does not fit" in bad.skipped[0]
    good = wasmtime.Module(engine, '(module (memory (export "m") 1))')
    store = wasmtime.Store(engine)
    with pytest.raises(wasmtime.Trap, match="out of bounds memory access"):
        bad.instantiate(store)
    assert not any(memory_of(store, wasmtime.Instance(store, good, [])))


@with_every_creator
def test_data_drop_and_memory_init_of_many_memories(kind):
    engine = engine_of(kind)
    prepared = same(engine, """(module (memory (export "a") 1) (memory (export "b") i64 2)
        (data (i32.const 1) "first") (data (memory 1) (i64.const 65536) "second") (data "passive")
        (func (export "init") (memory.init 2 (i32.const 9) (i32.const 0) (i32.const 7)))
        (func (export "drop") (data.drop 0) (data.drop 2))
        (func (export "again") (memory.init 0 (i32.const 9) (i32.const 0) (i32.const 1))))""",
        calls=["again", "init", "drop", "drop", "init", "again"])
    assert None not in prepared.images


@with_every_creator
def test_imports_may_be_a_sequence_or_a_linker(kind):
    engine = engine_of(kind)
    wat = """(module (import "e" "g" (global i32)) (memory (export "m") 1)
        (data (i32.const 0) "data") (global (export "g") i32 (global.get 0)))"""
    prepared = prepare(engine, wat)
    store = wasmtime.Store(engine)
    linker = wasmtime.Linker(engine)
    linker.define(store, "e", "g", number(store, 7))
    for imports in ([number(store, 7)], linker):
        instance = prepared.instantiate(store, imports)
        assert memory_of(store, instance) == of(PAGE, filled={0: b"data"})
        assert instance.exports(store)["g"].value(store) == 7
    with pytest.raises(wasmtime.WasmtimeError, match="expected 1 imports, found 0"):
        prepared.instantiate(store)


@with_every_creator
def test_host_functions_of_a_start_function_may_make_instances(kind):
    engine = engine_of(kind)
    inner = prepare(engine, '(module (memory (export "m") 1) (data (i32.const 0) "inner"))')
    plain = wasmtime.Module(engine, '(module (memory (export "m") 1))')
    outer = prepare(engine, """(module (import "e" "f" (func $f)) (memory (export "m") 1) (memory (export "n") 1)
        (start $f) (data (i32.const 0) "outer") (data (memory 1) (i32.const 1) "too"))""")
    store = wasmtime.Store(engine)
    made = []

    def host():
        made.append(memory_of(store, wasmtime.Instance(store, plain, [])))
        made.append(memory_of(store, inner.instantiate(store)))

    instance = outer.instantiate(store, [wasmtime.Func(store, wasmtime.FuncType([], []), host)])
    assert made == [bytes(PAGE), of(PAGE, filled={0: b"inner"})]
    assert memory_of(store, instance) == of(PAGE, filled={0: b"outer"})
    assert memory_of(store, instance, "n") == of(PAGE, filled={1: b"too"})
    store.close()       # breaks a cycle: the function refers to the store, and wasmtime-py to the function


@needs_gc
@with_every_creator
def test_a_heap_that_wasmtime_makes_first_does_not_take_an_image(kind):
    engine = engine_of(kind)
    # Before the module's memories, the first instantiation of each store requests the store's GC heap.
    prepared = prepare(engine, """(module (type $s (struct (field i32))) (memory (export "a") 1) (memory (export "b") 1)
        (memory (export "c") 0) (memory (export "d") 1)
        (global (ref $s) (struct.new $s (i32.const 1)))
        (data (memory 1) (i32.const 0) "b") (data (memory 3) (i32.const 0) "d"))""")
    store = wasmtime.Store(engine)
    for _ in range(2):
        instance = prepared.instantiate(store)
        for name in "abd":
            assert memory_of(store, instance, name) == of(PAGE, filled={} if name == "a" else {0: name.encode()})
        assert instance.exports(store)["c"].data_len(store) == 0


def test_an_instantiation_that_fails_half_way_leaves_no_image_to_others():
    config = all_features()
    linmem.wasmtime.install(config, linmem.creator("limiting", limit_bytes=3 * PAGE))
    engine = wasmtime.Engine(config)
    prepared = prepare(engine, """(module (memory 1) (memory 4) (memory (export "m") 1)
        (data (memory 0) (i32.const 0) "0") (data (memory 1) (i32.const 0) "1") (data (memory 2) (i32.const 0) "2"))""")
    store = wasmtime.Store(engine)
    with pytest.raises(wasmtime.WasmtimeError, match="limit"):
        prepared.instantiate(store)
    good = wasmtime.Module(engine, '(module (memory (export "m") 1))')
    assert not any(memory_of(store, wasmtime.Instance(store, good, [])))


@with_every_creator
def test_threads_make_instances_of_different_modules_at_once(kind):
    engine = engine_of(kind)
    prepared = [prepare(engine, f'(module (memory (export "m") 1) (memory 1) (data (i32.const {at}) "x"))')
                for at in range(4)]
    wrong = []

    def work(turn):
        for _ in range(25):
            store = wasmtime.Store(engine)
            if memory_of(store, prepared[turn].instantiate(store)) != of(PAGE, filled={turn: b"x"}):
                wrong.append(turn)
            store.close()

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@requires("fork")
def test_a_child_that_is_forked_while_another_thread_reads_a_module_prepares_modules():
    assert answer(FORKING + """
import signal, wasmtime, linmem.wasmtime
from linmem._wasm.module import Module
config = wasmtime.Config()
config.parallel_compilation = False
linmem.wasmtime.install(config)
engine = wasmtime.Engine(config)
wasm = bytes(wasmtime.wat2wasm('(module (memory 1) (data (i32.const 0) "x"))'))
reading, forked, items = threading.Event(), threading.Event(), Module.items

def slow(self, *what):
    reading.set()
    forked.wait(60)
    return items(self, *what)

def work():
    signal.alarm(30)            # ends a child that waits for a lock
    Module.items = items
    assert linmem.wasmtime.prepare(engine, wasm).images[0]
    signal.alarm(0)

Module.items = slow
thread = threading.Thread(target=lambda: Module(wasm).data)
thread.start()
assert reading.wait(60)
try:
    child(os.fork, work)
finally:
    forked.set()
thread.join()
print("done")
""") == "done"


@requires("smaps", "real_pages")
def test_instances_share_the_pages_of_their_data_until_they_write():
    engine = MMAP
    data = os.urandom(64 * PAGE)
    prepared = prepare(engine, b"".join(wasm_with(data)))
    stores = [wasmtime.Store(engine) for _ in range(2)]
    memories = [prepared.instantiate(store).exports(store)["m"] for store in stores]
    for store, memory in zip(stores, memories, strict=True):
        ours = linmem.wasmtime.linear_memory(store, memory)
        assert ours.read(0, len(data)) == data
        ours[5 * REAL_PAGE] = 1
        own = sum(m.figures["Anonymous"] for m in smaps(ours.as_ptr(), ours.as_ptr() + len(data)))
        assert 0 < own <= 4 * REAL_PAGE


def wasm_with(data):
    """A module of one memory and one segment. The module is built as binary, because a text would be slow to parse."""
    def leb(n):
        out = b""
        while n > 127:
            out += bytes([n & 127 | 128])
            n >>= 7
        return out + bytes([n])

    def section(kind, content):
        return bytes([kind]) + leb(len(content)) + content

    pages = leb(-(-len(data) // PAGE))
    yield b"\0asm\1\0\0\0"
    yield section(5, b"\1\0" + pages)
    yield section(7, b"\1\1m\2\0")
    yield section(11, b"\1\0\x41\0\x0b" + leb(len(data)) + data)


@requires("smaps")
def test_data_at_both_ends_of_a_large_memory_costs_its_two_pages():
    engine = MMAP
    prepared = prepare(engine, """(module (memory (export "m") 16384)
        (data (i32.const 0) "low") (data (i32.const 0x3fffff00) "high"))""")
    store = wasmtime.Store(engine)
    memory = linmem.wasmtime.linear_memory(store, prepared.instantiate(store).exports(store)["m"])
    assert memory.read(0, 4) == b"low\0"
    assert memory.read(0x3FFFFF00, 5) == b"high\0"
    assert sum(m.figures["Rss"] for m in smaps(memory.as_ptr(), memory.as_ptr() + len(memory))) <= 8 * REAL_PAGE


# -- refusals --------------------------------------------------------------------------------------


def with_pooling():
    """A config with the pooling allocation strategy, which ignores host creators."""
    config = all_features()
    settings = ffi.wasmtime_pooling_allocation_config_new()
    for what in ("memories", "stacks", "tables"):
        getattr(ffi, f"wasmtime_pooling_allocation_config_total_{what}_set")(settings, 2)
    ffi.wasmtime_pooling_allocation_strategy_set(config.ptr(), settings)
    ffi.wasmtime_pooling_allocation_config_delete(settings)
    return config


def pooling():
    config = with_pooling()
    linmem.wasmtime.install(config)
    return wasmtime.Engine(config)


@pytest.mark.skipif(not hasattr(ffi, "wasmtime_pooling_allocation_strategy_set"), reason="no pooling strategy here")
def test_an_engine_that_never_requests_memories_from_linmem_is_refused():
    for engine in (PLAIN, pooling()):
        with pytest.raises(ValueError, match=r"does not make its memories with linmem.*pooling"):
            prepare(engine, HELLO)
        with pytest.raises(ValueError, match="does not make its memories with linmem"):
            prepare(engine, "(module)")


@with_every_creator
def test_data_that_no_memory_took_is_an_error_and_is_not_offered_again(monkeypatch, kind):
    engine = engine_of(kind)
    monkeypatch.setattr(_prepared, "makes_our_memories", lambda engine: True)
    prepared = prepare(PLAIN, HELLO)
    with pytest.raises(RuntimeError, match="1 memories were made without their data"):
        prepared.instantiate(wasmtime.Store(PLAIN))
    store = wasmtime.Store(engine)
    module = wasmtime.Module(engine, '(module (memory (export "m") 1))')
    assert not any(memory_of(store, wasmtime.Instance(store, module, [])))


def test_a_prepared_instance_in_between_takes_its_own_images(monkeypatch):
    prepared = prepare(MMAP, HELLO)
    other = prepare(MMAP, '(module (memory (export "m") 1) (data (i32.const 0) "other"))')
    make, seen = wasmtime.Instance.__init__, []

    def interrupted(self, *args):           # begins a second instantiation, as a signal handler could do
        monkeypatch.undo()
        store = wasmtime.Store(MMAP)
        seen.append(memory_of(store, other.instantiate(store)))
        make(self, *args)

    monkeypatch.setattr(wasmtime.Instance, "__init__", interrupted)
    store = wasmtime.Store(MMAP)
    assert memory_of(store, prepared.instantiate(store)) == of(PAGE, filled=GREETED)
    assert seen == [of(PAGE, filled={0: b"other"})]


def test_an_interrupt_leaves_no_image_on_offer(monkeypatch):
    prepared = prepare(MMAP, HELLO)
    with monkeypatch.context() as patch:
        patch.setattr(wasmtime.Instance, "__init__", lambda *args: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            prepared.instantiate(wasmtime.Store(MMAP))
    store = wasmtime.Store(MMAP)
    plain = wasmtime.Instance(store, wasmtime.Module(MMAP, '(module (memory (export "m") 1))'), [])
    assert not any(memory_of(store, plain))
    assert memory_of(store, prepared.instantiate(store)) == of(PAGE, filled=GREETED)


def test_a_store_of_another_engine_is_refused_by_wasmtime():
    prepared = prepare(MMAP, HELLO)
    with pytest.raises(wasmtime.WasmtimeError, match="cross-`Engine`"):
        prepared.instantiate(wasmtime.Store(engine_of("statistics")))


def test_bytes_that_are_not_a_module_are_refused_as_by_wasmtime():
    engine = MMAP
    for wasm in (b"", b"\0asm\1\0\0\0\5", b"\0asm\1\0\0\0\5\1\1", "(module (memory 1) (data", "(module (bad))",
                 binary(HELLO)[:-1], b"\0asm\1\0\0\0\x63\0", b"\0", b"\xff\xfe",
                 # An export of a missing memory. The error text names a byte offset of the original module.
                 binary(HELLO)[:8] + b"\x05\3\1\0\1\7\5\1\1m\2\7\x0b\x0b\1\0\x41\0\x0b\5hello"):
        with pytest.raises(wasmtime.WasmtimeError) as plain:
            wasmtime.Module(engine, wasm)
        for expose in (False, True):
            with pytest.raises(wasmtime.WasmtimeError) as ours:
                prepare(engine, wasm, expose=expose)
            assert said(ours.value) == said(plain.value)
            assert ours.value.__context__ is None


def verdict_of(call, *args, **named):
    """The class and the text of the exception of `call`, or None."""
    try:
        call(*args, **named)
    except Exception as error:
        return type(error), said(error)
    return None


@pytest.mark.parametrize("seed", range(3))
def test_any_bytes_are_judged_as_by_wasmtime(seed):
    chance = random.Random(seed)
    valid = [binary(wat) for wat in (EVERYTHING, HELLO, TYPES)] + [binary(STACKS)] * STACK_SWITCHING
    for _ in range(100):
        wasm = mutated(chance.choice(valid), chance)
        expected = verdict_of(wasmtime.Module, MMAP, wasm)
        for expose in (False, True):
            assert verdict_of(prepare, MMAP, wasm, expose=expose) == expected


@given(st.binary(max_size=40), st.sampled_from([b"", b"\0asm", b"\0asm\1\0\0\0"]))
def test_bytes_of_an_unknown_kind_are_judged_as_by_wasmtime(tail, head):
    assume(not is_component(head + tail))
    assert verdict_of(prepare, MMAP, head + tail) == verdict_of(wasmtime.Module, MMAP, head + tail)


@pytest.mark.skipif(not STACK_SWITCHING, reason="this wasmtime has no stack switching here")
def test_a_module_with_tables_of_continuations_is_prepared_as_any_other():
    for kind in ("3 nullcontref", "3 contref", "3 (ref null $c)"):
        prepared = same(MMAP, f"""(module (type $f (func)) (type $c (cont $f)) (table {kind})
            (memory (export "m") 1) (data (i32.const 5) "x"))""")
        assert prepared.images[0] is not None
        assert prepared.skipped == ()


def test_parts_that_linmem_does_not_know_are_left_unchanged(monkeypatch):
    def unknown(*args):
        raise Unknown("the table is of a later kind")

    monkeypatch.setattr(_module.Module, "tables", unknown)  # simulates a table that wasmtime knows and linmem does not
    prepared = same(MMAP, '(module (table 3 funcref) (memory (export "m") 1) (data (i32.const 0) "x"))')
    assert prepared.outline is None
    assert prepared.images[0] is not None
    monkeypatch.setattr(_module.Module, "memories", unknown)
    for expose in (False, True):
        prepared = prepare(MMAP, HELLO, expose=expose)
        assert (prepared.images, prepared.added, prepared.outline) == ((), frozenset(), None)
        assert prepared.skipped == (*["nothing is exposed: cannot expose what the module hides: the table is of a later"
                                      " kind"] * expose, "nothing is hoisted: the table is of a later kind")
        store = wasmtime.Store(MMAP)
        assert memory_of(store, prepared.instantiate(store)) == of(PAGE, filled=GREETED)


def test_a_module_that_wasmtime_accepts_only_unchanged_stays_unchanged(monkeypatch):
    made = _prepared.hoist
    monkeypatch.setattr(_prepared, "hoist", lambda wasm: made(wasm)._replace(module=wasm.wasm + b"\x63\0"))
    prepared = prepare(MMAP, HELLO, expose=True)
    assert (prepared.images, prepared.added, prepared.outline) == ((None,), frozenset(), None)
    assert "wasmtime takes the module only as it is" in prepared.skipped[0]
    store = wasmtime.Store(MMAP)
    assert memory_of(store, prepared.instantiate(store)) == of(PAGE, filled=GREETED)


@pytest.mark.parametrize("expose", [False, True])
def test_each_section_is_read_once(monkeypatch, expose):
    read = []
    items = _module.Module.items

    def counted(self, kind, what):
        read.append(kind)
        return items(self, kind, what)

    monkeypatch.setattr(_module.Module, "items", counted)
    prepared = prepare(MMAP, """(module (import "e" "t" (table 1 funcref)) (memory 1) (table 1 funcref)
        (global (mut i32) (i32.const 0)) (func $f (table.set 1 (i32.const 0) (ref.func $f)))
        (elem (i32.const 0) $f) (data (i32.const 0) "x") (data (memory 0) (i32.const 9) "y"))""", expose=expose)
    assert (prepared.outline.written_tables, bool(prepared.added), prepared.skipped) == ({1}, expose, ())
    for kind in (_module.CODE, _module.DATA, _module.ELEMENT):
        assert read.count(kind) == 1


def test_the_module_for_start_is_made_only_when_an_instance_starts(monkeypatch):
    made = []
    without_start = _prepared.without_start
    monkeypatch.setattr(_prepared, "without_start", lambda *args: made.append(1) or without_start(*args))
    prepared = prepare(MMAP, START, expose=True)
    store = wasmtime.Store(MMAP)
    snapshot = linmem.wasmtime.Snapshot.take(store, prepared.instantiate(store))
    assert made == []
    for _ in range(2):
        prepared.instantiate(store, start=snapshot)
    assert made == [1]


# -- the cost of an instance ---------------------------------------------------------------------------

FREE = {        # modules that plain wasmtime instantiates without running code
    "data": HELLO,
    "empty data": '(module (memory (export "m") 1) (data (i32.const 0) "") (data (i32.const 65536) ""))',
    "64 bits": '(module (memory (export "m") i64 1) (data (i64.const 100) "hello"))',
    "two memories": """(module (memory 1) (memory (export "m") 1) (data (i32.const 0) "hello")
        (data (memory 1) (i32.const 0) "hello") (data "passive"))""",
    "overlapping": '(module (memory (export "m") 1) (data (i32.const 0) "hello") (data (i32.const 2) "hello"))',
    "a table": """(module (memory (export "m") 1) (table 1 funcref) (func $f) (elem (i32.const 0) $f)
        (data (i32.const 0) "hello"))""",
    "a megabyte": f'(module (memory (export "m") 20) (data (i32.const 3) "{"x" * (1 << 20)}"))',
}
START = """(module (memory (export "m") 1) (data (i32.const 0) "hello") (func $f (export "f")
    (i32.store (i32.const 9) (i32.load (i32.const 0)))) (start $f))"""


def limited(ours, **settings):
    config = all_features()
    for name, value in settings.items():
        setattr(config, name, value)
    if ours:
        linmem.wasmtime.install(config)
    return wasmtime.Engine(config)


def fuel_of(engine, make, fuel, world=lambda store: []):
    """The fuel for making an instance, and then for a call of "f" if it exists; None if no instance is made."""
    store = wasmtime.Store(engine)
    store.set_fuel(1 << 40)
    imports = world(store)
    store.set_fuel(fuel)
    try:
        instance = make(store, imports)
        left = store.get_fuel()
        call = instance.exports(store).get("f")
        if call is not None:
            call(store)
        return fuel - left, left - store.get_fuel()
    except (wasmtime.Trap, wasmtime.WasmtimeError):
        return None
    finally:
        store.close()


def plain_maker(engine, wat):
    module = wasmtime.Module(engine, wat)
    return lambda store, imports: wasmtime.Instance(store, module, imports)


# PLAIN is an engine without linmem. If its wasmtime initialises memories by copy-on-write, an instance with data costs
# no fuel. Otherwise wasmtime copies the data with code that costs fuel.
PLAIN = limited(False, consume_fuel=True)
PLAIN_IS_FREE = fuel_of(PLAIN, plain_maker(PLAIN, HELLO), 0) == (0, 0)


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("expose", [False, True])
def test_an_instance_needs_no_fuel_where_plain_wasmtime_needs_none(name, expose):
    plain, ours = limited(False, consume_fuel=True), limited(True, consume_fuel=True)
    if PLAIN_IS_FREE:
        assert fuel_of(plain, plain_maker(plain, FREE[name]), 0) == (0, 0)
    prepared = prepare(ours, FREE[name], expose=expose)
    assert prepared.skipped == ()
    assert fuel_of(ours, prepared.instantiate, 0) == (0, 0)


@pytest.mark.skipif(not PLAIN_IS_FREE, reason="plain wasmtime copies data by code here")
@pytest.mark.parametrize("fuel", [0, 1, 2, 3, 5, 100, 10000])
def test_a_start_function_and_calls_cost_the_fuel_that_they_cost_in_plain_wasmtime(fuel):
    plain, ours = limited(False, consume_fuel=True), limited(True, consume_fuel=True)
    assert fuel_of(ours, prepare(ours, START).instantiate, fuel) == fuel_of(plain, plain_maker(plain, START), fuel)


@fewer_examples(60)
@given(modules())
def test_no_instance_costs_more_fuel_than_in_plain_wasmtime_but_for_imported_tables(module):
    wat, world, _ = module
    # Each of these active element segments has at most one element. Plain wasmtime fills the imported table for less
    # fuel if the module has data.
    fills = 2 * wat.count("(elem (")
    plain, ours = FUEL_ENGINES
    expected = fuel_of(plain, plain_maker(plain, wat), 1 << 30, world)
    prepared = prepare(ours, wat)
    found = fuel_of(ours, prepared.instantiate, 1 << 30, world)
    assert (found is None) == (expected is None)
    if found is not None and not any("failed instance" in reason for reason in prepared.skipped):
        assert found[0] <= expected[0] + fills
        assert found[1:] == expected[1:]


FUEL_ENGINES = limited(False, consume_fuel=True), engine_of(consume_fuel=True)


@pytest.mark.parametrize("name", FREE)
def test_an_instance_is_made_past_its_deadline_where_plain_wasmtime_makes_it(name):
    for engine in [limited(ours, epoch_interruption=True) for ours in (False, True) if ours or PLAIN_IS_FREE]:
        make = (prepare(engine, FREE[name]).instantiate if linmem_makes(engine) else plain_maker(engine, FREE[name]))
        store = wasmtime.Store(engine)      # no deadline is set: the deadline is epoch 0, which has passed
        engine.increment_epoch()
        memory = make(store, []).exports(store)["m"]
        assert memory.data_len(store) >= PAGE
        store.set_epoch_deadline(1)
        store.close()


def linmem_makes(engine):
    store = wasmtime.Store(engine)
    memory = plain_maker(engine, '(module (memory (export "m") 1))')(store, []).exports(store)["m"]
    try:
        linmem.wasmtime.linear_memory(store, memory)
    except ValueError:
        return False
    finally:
        store.close()
    return True


def test_arguments_are_checked():
    with pytest.raises(TypeError, match=r"engine must be a wasmtime.Engine, got str"):
        prepare("engine", HELLO)
    with pytest.raises(TypeError, match="wasm must be bytes or str, got int"):
        prepare(MMAP, 7)


def test_text_and_every_kind_of_bytes_are_accepted():
    for wasm in (HELLO, HELLO.encode(), binary(HELLO), bytearray(binary(HELLO))):
        store = wasmtime.Store(MMAP)
        assert memory_of(store, prepare(MMAP, wasm).instantiate(store)) == of(PAGE, filled=GREETED)


def test_a_memory_too_large_for_any_machine_is_refused_as_by_wasmtime():
    engine = MMAP
    for pages in (1 << 32, (1 << 48) - 1, 1 << 48):
        wat = f'(module (memory i64 {pages}) (data (i64.const 5) "x"))'
        try:
            wasmtime.Instance(wasmtime.Store(engine), wasmtime.Module(engine, wat), [])
        except wasmtime.WasmtimeError as error:
            expected = said(error)
        with pytest.raises(wasmtime.WasmtimeError) as ours:
            prepare(engine, wat).instantiate(wasmtime.Store(engine))
        assert said(ours.value) == expected


def test_a_prepared_module_has_the_types_of_the_original_module():
    wat = '(module (import "e" "t" (table 1 funcref)) (memory (export "m") 1 3) (data (i32.const 0) "x"))'
    ours, plain = prepare(MMAP, wat).module, wasmtime.Module(MMAP, wat)
    assert [(e.name, type(e.type)) for e in ours.exports] == [(e.name, type(e.type)) for e in plain.exports]
    assert [(i.module, i.name) for i in ours.imports] == [(i.module, i.name) for i in plain.imports]


def test_the_data_that_stays_in_the_module_is_reported():
    prepared = same(MMAP, """(module (import "e" "g" (global i32)) (import "e" "t" (table 0 funcref))
        (memory (export "m") 1) (data (global.get 0) "stays"))""", lambda store: [number(store, 9), table(store)])
    assert prepared.images == (None,)
    assert prepared.skipped == (
        "data segment 0 and all after it of memory 0: its offset is not a constant of the module",)


def test_hidden_state_is_exported_on_demand():
    wat = '(module (memory 1) (global (mut i32) (i32.const 5)) (data (i32.const 0) "x"))'
    engine = MMAP
    assert prepare(engine, wat).added == frozenset()
    prepared = prepare(engine, wat, expose=True)
    assert prepared.added == {"linmem:memory:0", "linmem:global:0"}
    store = wasmtime.Store(engine)
    exports = prepared.instantiate(store).exports(store)
    assert set(exports) == prepared.added
    assert exports["linmem:global:0"].value(store) == 5
    assert bytes(exports["linmem:memory:0"].read(store, 0, 2)) == b"x\0"


# -- the cache -------------------------------------------------------------------------------------


@pytest.fixture
def compilations(monkeypatch):
    """Counts the compilations by wasmtime."""
    counted = []
    compile = wasmtime.Module.__init__
    monkeypatch.setattr(wasmtime.Module, "__init__", lambda self, *args: (counted.append(1), compile(self, *args))[1])
    return counted


def works(engine, cache):
    store = wasmtime.Store(engine)
    return memory_of(store, prepare(engine, HELLO, cache=cache).instantiate(store)) == of(PAGE, filled=GREETED)


def entries(cache, suffix=".cwasm"):
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.name.endswith(suffix))


def test_a_module_is_compiled_once_and_then_read(tmp_path, compilations):
    engine = MMAP
    cache = tmp_path / "new" / "cache"
    assert works(engine, cache)
    assert len(compilations) == 1
    assert len(entries(cache)) == len(entries(cache, ".image")) == 1
    for _ in range(3):
        assert works(engine, str(cache))
    assert len(compilations) == 1
    prepare(engine, HELLO.replace("world", "WORLD"), cache=cache)      # the same code; the data is stored elsewhere
    assert len(compilations) == 1
    prepare(engine, HELLO.replace("60000", "50000"), cache=cache)      # the data's address is stored elsewhere, too
    assert len(compilations) == 1
    prepare(engine, HELLO.replace("1)", "2)"), cache=cache)
    assert len(compilations) == 2


def test_a_cached_module_that_cannot_be_mapped_as_code_is_read(tmp_path, compilations, monkeypatch):
    def refused(engine, path):
        raise wasmtime.WasmtimeError(f"{path} is on a file system that is mounted noexec")

    monkeypatch.setattr(wasmtime.Module, "deserialize_file", refused)
    for _ in range(3):
        assert works(MMAP, tmp_path)
    assert len(compilations) == 1


def test_engines_of_other_settings_have_entries_of_their_own(tmp_path, compilations):
    other = engine_of(consume_fuel=True)
    for engine in (MMAP, other) * 2:
        prepare(engine, HELLO, cache=tmp_path)
    assert len(entries(tmp_path)) == 2
    assert len(compilations) == 2 + 1       # the third checks whether `other` makes memories with linmem


def damaged(how, content):
    return {"flipped": content[:100] + bytes([content[100] ^ 1]) + content[101:], "truncated": content[:-1],
            "emptied": b"", "longer": content + b"x"}[how]


@pytest.mark.parametrize("how", ["flipped", "truncated", "emptied", "longer"])
@pytest.mark.parametrize("suffix", [".cwasm", ".image"])
def test_a_damaged_entry_is_never_used_and_is_written_anew(tmp_path, compilations, suffix, how):
    assert works(MMAP, tmp_path)
    [entry] = entries(tmp_path, suffix)
    content = entry.read_bytes()
    entry.unlink()
    entry.write_bytes(damaged(how, content))
    assert works(MMAP, tmp_path)
    assert len(compilations) == 1 + (suffix == ".cwasm")
    assert entries(tmp_path, suffix) == [entry]
    assert entry.read_bytes() == content


@requires("smaps", "real_pages")
def test_processes_share_the_pages_of_a_cached_image(tmp_path):
    data = os.urandom(16 * PAGE)
    wasm = b"".join(wasm_with(data))
    prepare(MMAP, wasm, cache=tmp_path)
    store = wasmtime.Store(MMAP)
    memory = prepare(MMAP, wasm, cache=tmp_path).instantiate(store).exports(store)["m"]
    ours = linmem.wasmtime.linear_memory(store, memory)
    assert ours.read(0, len(data)) == data
    [entry] = entries(tmp_path, ".image")
    assert {m.name for m in smaps(ours.as_ptr(), ours.as_ptr() + len(data))} == {str(entry)}
    ours[0] = data[0] ^ 1
    assert prepare(MMAP, wasm, cache=tmp_path).images[0].runs() == [(0, len(data))]
    store = wasmtime.Store(MMAP)
    assert memory_of(store, prepare(MMAP, wasm, cache=tmp_path).instantiate(store)) == data


def test_an_entry_that_is_whole_but_not_wasmtimes_is_passed_over(tmp_path, compilations):
    assert works(MMAP, tmp_path)
    [entry] = entries(tmp_path)
    foreign = b"\x7fELF what is this?" * 100
    entry.unlink()
    (entry.parent / f"{hashlib.sha256(foreign).hexdigest()}.cwasm").write_bytes(foreign)
    (entry.parent / "notes.txt").write_text("not an entry")
    [image] = entries(tmp_path, ".image")
    image.unlink()
    (image.parent / f"{hashlib.sha256(foreign).hexdigest()}.image").write_bytes(foreign)
    assert works(MMAP, tmp_path)
    assert works(MMAP, tmp_path)
    assert len(compilations) == 2
    assert entry in entries(tmp_path)
    assert image in entries(tmp_path, ".image")


def writes(content):
    return lambda file: file.write(content)


def test_the_entries_of_one_module_are_bounded(tmp_path):
    cache = Cache(tmp_path)
    paths = [cache.add("key", ".x", writes(bytes([n]))) for n in range(20)]
    for turn, path in enumerate(paths):
        if os.path.exists(path):
            os.utime(path, (turn, turn))
    cache.add("key", ".x", writes(b"newest"))
    assert len(list(cache.entries("key", ".x"))) == 8
    assert os.path.exists(paths[-1])
    assert list(cache.entries("another", ".x")) == []


def test_an_entry_whose_content_differs_from_its_name_is_removed_and_not_handed_out(tmp_path):
    cache = Cache(tmp_path)
    good, cut, other = (cache.add("key", ".x", writes(content)) for content in (b"good", b"cut", b"other"))
    for path, content in ((cut, b"cu"), (other, b"othe\0")):
        with open(path, "wb") as file:
            file.write(content)
    of_another_suffix = tmp_path / "key" / "0.y"
    of_another_suffix.write_bytes(b"")
    assert list(cache.entries("key", ".x")) == [good]
    assert sorted(os.listdir(tmp_path / "key")) == sorted([os.path.basename(good), "0.y"])


@requires("owners")
def test_only_the_owner_can_read_an_entry_during_and_after_the_write(tmp_path):
    seen = []

    def write(file):
        seen.append(os.fstat(file.fileno()).st_mode)
        file.write(b"x")

    before = os.umask(0)
    try:
        path = Cache(tmp_path).add("key", ".x", write)
    finally:
        os.umask(before)
    assert [stat.S_IMODE(mode) for mode in (*seen, os.stat(path).st_mode)] == [0o600, 0o600]


@requires("holes")
def test_a_cache_takes_time_for_the_data_of_a_module_and_not_for_the_memory_between(tmp_path, monkeypatch):
    wasm = '(module (memory (export "m") 65536) (data (i32.const 0) "low") (data (i32.const 0xfffffff0) "high"))'
    asked = []
    whole = sparse._read_fd
    monkeypatch.setattr(sparse, "_read_fd", lambda fd, at, size: asked.append(size) or whole(fd, at, size))
    for _ in range(2):              # a cold cache, then a warm cache
        [image] = prepare(MMAP, wasm, cache=tmp_path).images
        assert [size for _, size in image.runs()] == [4096, 4096]
        assert image.size == (1 << 32) - 12
    assert 0 < sum(asked) < 1 << 24


@requires("owners")
def test_a_directory_that_others_may_write_to_is_refused(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for mode in (0o770, 0o707, 0o777):
        cache.chmod(mode)
        with pytest.raises(PermissionError, match=f"may be written by others .mode {mode:o}.: what is in it is run as"):
            prepare(MMAP, HELLO, cache=cache)
    cache.chmod(0o755)
    assert works(MMAP, cache)
    [entry] = entries(cache)
    assert stat.S_IMODE(entry.stat().st_mode) & 0o077 == 0
    assert stat.S_IMODE(entry.parent.stat().st_mode) & 0o022 == 0
    entry.parent.chmod(0o777)
    with pytest.raises(PermissionError, match="may be written by others"):
        prepare(MMAP, HELLO, cache=cache)


@requires("owners")
def test_a_directory_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="belongs to user"):
        prepare(MMAP, HELLO, cache=tmp_path)


def test_an_image_that_another_process_removes_from_the_cache_as_it_is_opened_is_made_anew(tmp_path, monkeypatch):
    whole = Cache.entries

    def then_removed(self, key, suffix):
        for path in whole(self, key, suffix):
            os.unlink(path)
            yield path

    assert works(MMAP, tmp_path)
    monkeypatch.setattr(Cache, "entries", then_removed)
    assert works(MMAP, tmp_path)
    assert len(entries(tmp_path, ".image")) == 1


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(RuntimeWarning, match=r"^not cached: .*No space left on device") as warned:
        assert works(MMAP, tmp_path)
    assert {os.path.basename(warning.filename) for warning in warned} == {os.path.basename(__file__)}
    assert entries(tmp_path, "") == []


def test_the_files_of_a_killed_writer_are_never_used(tmp_path):
    child = f"""
        from linmem._wasm.image_cache import Cache
        cache = Cache({str(tmp_path)!r})
        print("go", flush=True)
        n = 0
        while True:
            with open({str(tmp_path / "content")!r}, "wb") as file:
                file.write(n.to_bytes(4, "little") * (1 << 16))
            cache.add("key", ".x", lambda file: file.write(open({str(tmp_path / "content")!r}, "rb").read()))
            n += 1
        """
    for delay in (0.0, 0.003, 0.01, 0.02):
        with start_child(child) as process:
            assert process.stdout.readline() == "go\n"
            threading.Event().wait(delay)
            process.kill()
        for path in Cache(tmp_path).entries("key", ".x"):
            with open(path, "rb") as file:
                content = file.read()
            assert len(content) == 4 << 16
            assert content == content[:4] * (1 << 16)
