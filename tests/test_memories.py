"""linmem.wasmtime.memories: the memories of an instance by name, exported or not."""

import threading

import pytest

pytest.importorskip("wasmtime")

import wasmtime
from test_hoist import all_features, needs_gc
from test_prepare import HELLO, MMAP, PLAIN, engine_of

import linmem.wasmtime
from linmem.wasmtime import Sessions, Snapshot, memories, prepare

PAGE = 65536
try:
    from wasmtime import component
except ImportError:
    component = None
needs_components = pytest.mark.skipif(component is None, reason="this wasmtime-py has no components")


def sizes(instance, store=None):
    return {name: memory.byte_size() // PAGE for name, memory in memories(instance, store).items()}


def test_the_memories_of_a_prepared_module_have_the_names_of_their_exports_or_their_indices():
    engine = MMAP
    prepared = prepare(engine, """(module (memory (export "a") (export "b") 1) (memory 2) (memory (export "c") 3)
        (data (memory 1) (i32.const 0) "hidden") (data (memory 2) (i32.const 0) "shown"))""")
    store = wasmtime.Store(engine)
    instance = prepared.instantiate(store)
    assert sizes(instance) == {"a": 1, "b": 1, "memory 1": 2, "c": 3}
    found = memories(instance, store)
    assert (found["memory 1"].read(0, 6), found["c"].read(0, 5)) == (b"hidden", b"shown")
    assert found["a"] == found["b"] == linmem.wasmtime.linear_memory(store, instance.exports(store)["a"])
    assert sizes(prepared.instantiate(store)) == sizes(instance)
    assert found["memory 1"] != memories(prepared.instantiate(store))["memory 1"]


def test_a_module_without_data_has_its_memories_too():
    store = wasmtime.Store(MMAP)
    assert sizes(prepare(MMAP, "(module (memory 1) (memory 2))").instantiate(store)) == {"memory 0": 1, "memory 1": 2}
    assert sizes(prepare(MMAP, "(module)").instantiate(store)) == {}


def test_a_name_that_an_export_has_is_not_given_twice():
    prepared = prepare(MMAP, '(module (memory (export "memory 1") 1) (memory 2) (memory (export "hidden memory 1") 3))')
    assert sizes(prepared.instantiate(wasmtime.Store(MMAP))) == {
        "memory 1": 1, "hidden hidden memory 1": 2, "hidden memory 1": 3}


def test_an_imported_memory_is_not_among_those_that_were_made_for_a_prepared_instance():
    wat = '(module (import "e" "m" (memory 1)) (export "given" (memory 0)) (memory (export "own") 2) (memory 3))'
    store = wasmtime.Store(MMAP)
    given = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
    assert sizes(prepare(MMAP, wat).instantiate(store, [given])) == {"own": 2, "memory 2": 3}
    plain = wasmtime.Instance(store, wasmtime.Module(MMAP, wat), [given])
    assert sizes(plain, store) == {"given": 1, "own": 2}


def test_a_shared_memory_is_found_as_any_other():
    wat = '(module (memory (export "s") 1 4 shared) (memory 2 2 shared) (data (memory 1) (i32.const 0) "x"))'
    store = wasmtime.Store(MMAP)
    instance = prepare(MMAP, wat).instantiate(store)
    assert sizes(instance) == {"s": 1, "memory 1": 2}
    instance.exports(store)["s"].grow(2)
    assert sizes(instance) == {"s": 3, "memory 1": 2}
    assert memories(instance)["memory 1"].read(0, 1) == b"x"
    assert sizes(wasmtime.Instance(store, wasmtime.Module(MMAP, wat), []), store) == {"s": 1}


def test_a_memory_that_grew_past_its_reservation_is_still_found():
    config = all_features()
    config.memory_reservation = config.memory_reservation_for_growth = 0
    linmem.wasmtime.install(config, linmem.creator())
    engine = wasmtime.Engine(config)
    store = wasmtime.Store(engine)
    prepared = prepare(engine, """(module (memory 1) (data (i32.const 0) "here")
        (func (export "grow") (drop (memory.grow (i32.const 200)))))""")
    instance = prepared.instantiate(store)
    for _ in range(20):
        instance.exports(store)["grow"](store)
    found = memories(instance)["memory 0"]
    assert (found.byte_size(), found.read(0, 4)) == (4001 * PAGE, b"here")


def test_views_outlive_the_store_and_a_closed_store_has_no_memories():
    store = wasmtime.Store(MMAP)
    instance = prepare(MMAP, HELLO.replace('(export "m")', "")).instantiate(store)
    view = memoryview(memories(instance)["memory 0"])
    store.close()
    assert memories(instance) == {}
    assert bytes(view[16:21]) == b"hello"


def test_an_instance_keeps_no_memory_alive():
    creator = linmem.creator("statistics")
    engine = engine_of()
    store = wasmtime.Store(engine)
    instance = prepare(engine, HELLO).instantiate(store, creator=creator)
    memories(instance)
    assert [each["alive"] for each in creator.memories()] == [True]
    store.close()
    assert [each["alive"] for each in creator.memories()] == [False]
    assert memories(instance) == {}


def test_a_plain_instance_has_the_memories_of_linmem_that_it_exports():
    wat = '(module (import "e" "m" (memory 1)) (export "given" (memory 0)) (memory (export "own") 2) (memory 3))'
    store = wasmtime.Store(MMAP)
    given = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))       # not linmem's
    instance = wasmtime.Instance(store, wasmtime.Module(MMAP, wat), [given])
    assert sizes(instance, store) == {"own": 2}
    plain = wasmtime.Store(PLAIN)
    assert memories(wasmtime.Instance(plain, wasmtime.Module(PLAIN, "(module (memory 1))"), []), plain) == {}


def test_arguments_are_checked():
    store = wasmtime.Store(MMAP)
    plain = wasmtime.Instance(store, wasmtime.Module(MMAP, HELLO), [])
    with pytest.raises(TypeError, match=r"store must be the store of the instance, because .* got None"):
        memories(plain)
    with pytest.raises(TypeError, match=r"instance must be a wasmtime\.Instance or .*component\.Instance, got int"):
        memories(5, store)
    with pytest.raises(TypeError, match=r"store must be a wasmtime\.Store, got int"):
        memories(plain, 5)
    for instance in (plain, prepare(MMAP, HELLO).instantiate(store)):
        with pytest.raises(ValueError, match="store must be the one that the instance belongs to, got another"):
            memories(instance, wasmtime.Store(MMAP))


def test_an_instance_that_starts_from_a_snapshot_has_its_memories():
    prepared = prepare(MMAP, '(module (memory (export "a") 1) (memory 0 9) (memory 2) (func (export "grow")'
                             " (drop (memory.grow 1 (i32.const 3)))))", expose=True)
    store = wasmtime.Store(MMAP)
    instance = prepared.instantiate(store)
    instance.exports(store)["grow"](store)
    snapshot = linmem.wasmtime.Snapshot.take(store, instance)
    other = wasmtime.Store(MMAP)
    expected = {"a": 1, "linmem:memory:1": 3, "linmem:memory:2": 2}
    assert sizes(prepared.instantiate(other, start=snapshot)) == sizes(instance) == expected
    with linmem.wasmtime.Sessions(prepared, start=snapshot, size=1) as sessions, sessions.get() as (_, handed):
        assert sizes(handed) == expected


def test_an_earlier_user_of_a_session_finds_no_memory_of_a_later_one():
    prepared, store = prepare(MMAP, HELLO), wasmtime.Store(MMAP)
    sessions = Sessions(prepared, start=Snapshot.take(store, prepared.instantiate(store)), size=1)
    with sessions.get() as (lent, earlier):
        names = sizes(earlier).keys()
        assert names == sizes(earlier, lent).keys() != set()
    with sessions.get() as (lent, later):
        assert (memories(earlier), sizes(later).keys()) == ({}, names)
    assert sessions.stats()["reused"] == 1
    sessions.close()


def test_an_instance_of_a_patched_library_has_its_memories():
    with linmem.wasmtime.patch():
        engine = wasmtime.Engine()
        store = wasmtime.Store(engine)
        assert sizes(wasmtime.Instance(store, wasmtime.Module(engine, HELLO), [])) == {"m": 1}


def test_instances_that_a_host_function_makes_are_not_mixed_up():
    inner = prepare(MMAP, "(module (memory 1) (memory 5))")
    bare = wasmtime.Module(MMAP, "(module (memory 1))")
    outer = prepare(MMAP, """(module (import "e" "f" (func $f)) (memory 1) (memory 7) (start $f)
        (data (i32.const 0) "x"))""")
    store = wasmtime.Store(MMAP)
    made = []

    def host():
        wasmtime.Instance(store, bare, [])
        made.append(inner.instantiate(store))
        wasmtime.Instance(store, bare, [])

    instance = outer.instantiate(store, [wasmtime.Func(store, wasmtime.FuncType([], []), host)])
    assert (sizes(instance), sizes(made[0])) == ({"memory 0": 1, "memory 1": 7}, {"memory 0": 1, "memory 1": 5})
    store.close()


def test_an_instance_that_a_linker_makes_for_a_call_of_the_start_function_is_another_one():
    command = wasmtime.Module(MMAP, """(module (memory 7) (func (export "_start"))
        (func (export "size") (result i32) (memory.size)))""")
    prepared = prepare(MMAP, """(module (import "command" "size" (func $size (result i32))) (memory (export "m") 1)
        (data (i32.const 0) "x") (global (export "g") (mut i32) (i32.const 5))
        (func $start (global.set 0 (call $size))) (start $start))""")
    store, linker = wasmtime.Store(MMAP), wasmtime.Linker(MMAP)
    linker.define_module(store, "command", command)
    instance = prepared.instantiate(store, linker)
    assert instance.exports(store)["g"].value(store) == 7
    assert sizes(instance) == {"m": 1}


def test_threads_that_make_and_drop_instances_find_their_own_memories():
    engine = engine_of("pool")
    wrong = []

    def work(pages):
        prepared = prepare(engine, f'(module (memory {pages}) (memory 1) (data (i32.const 0) "{pages}"))')
        for _ in range(100):
            with wasmtime.Store(engine) as store:
                instance = prepared.instantiate(store)
                if sizes(instance) != {"memory 0": pages, "memory 1": 1}:
                    wrong.append(pages)

    threads = [threading.Thread(target=work, args=(pages,)) for pages in range(2, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@needs_gc
@pytest.mark.parametrize("plain", ["", "(memory 0)", "(memory 0) (memory 0)", "(memory 1) (memory 0)",
                                   "(memory 0) (memory 1) (memory 0)", "(memory 2) (memory 1)"])
def test_the_heap_of_the_garbage_collector_has_its_own_name(plain):
    prepared = prepare(MMAP, f"""(module {plain} (type $s (struct (field i32)))
        (global (ref $s) (struct.new $s (i32.const 1))))""")
    store = wasmtime.Store(MMAP)
    minima = [int(part.strip(" )")) for part in plain.split("(memory")[1:]]
    first, second = prepared.instantiate(store), prepared.instantiate(store)
    expected = {f"memory {index}": size for index, size in enumerate(minima)}
    assert sizes(second) == expected
    found = sizes(first)
    assert found.pop("GC heap") > 0
    assert found == expected


@needs_components
def test_the_memories_of_a_component_are_numbered_by_module_and_instance():
    prepared = prepare(MMAP, """(component (core module $a (memory 1) (memory 2)) (core module $unused (memory 9))
        (component $c (core module $b (memory 3) (data (i32.const 0) "b")) (core instance (instantiate $b)))
        (core module $d (memory 4))
        (core instance (instantiate $d)) (instance (instantiate $c)) (core instance (instantiate $a))
        (core instance (instantiate $a)))""")
    store = wasmtime.Store(MMAP)
    instance = prepared.instantiate(store)
    assert list(sizes(instance, store).items()) == [
        ("module 3, memory 0", 4), ("module 2, memory 0", 3),
        ("module 0, instance 0, memory 0", 1), ("module 0, instance 0, memory 1", 2),
        ("module 0, instance 1, memory 0", 1), ("module 0, instance 1, memory 1", 2)]
    view = memoryview(memories(instance)["module 2, memory 0"])
    with pytest.raises(ValueError, match="store must be the one that the instance belongs to"):
        memories(instance, wasmtime.Store(MMAP))
    store.close()
    assert memories(instance) == {}
    assert bytes(view[:1]) == b"b"


@needs_components
def test_memories_after_a_module_of_the_host_are_numbered_as_they_were_made():
    prepared = prepare(MMAP, """(component (import "m" (core module $m)) (core module $a (memory 1))
        (core instance (instantiate $a)) (core instance (instantiate $m)) (core instance (instantiate $a)))""")
    linker, store = component.Linker(MMAP), wasmtime.Store(MMAP)
    with linker.root() as root:
        root.add_module("m", wasmtime.Module(MMAP, "(module (memory 5) (memory 6))"))
    assert sizes(prepared.instantiate(store, linker)) == {
        "module 0, memory 0": 1, "memory 1": 5, "memory 2": 6, "memory 3": 1}


@needs_components
def test_a_plain_component_exports_no_memories():
    store = wasmtime.Store(MMAP)
    compiled = component.Component(MMAP, "(component (core module $m (memory 1)) (core instance (instantiate $m)))")
    assert memories(component.Linker(MMAP).instantiate(store, compiled)) == {}
