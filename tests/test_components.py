"""Components that start from images: instances behave the same, whatever the order of the core instances inside."""

import contextlib
import importlib.util
import itertools
import pathlib
import random
import signal
import sys
import threading
import time
import tracemalloc

import pytest
import wasmtime
from hypothesis import given
from hypothesis import strategies as st
from test_hoist import all_features, binary, mutated, needs_gc, said
from test_prepare import CREATORS, verdict_of, with_every_creator

import linmem
import linmem.wasmtime
from linmem._wasm import prepared as _prepared
from linmem._wasm.component import PREAMBLE, hoist_component, is_component
from linmem._wasm.reader import Malformed, leb128
from linmem.wasmtime import prepare

component = pytest.importorskip("wasmtime.component", reason="this wasmtime-py has no components")

PAGE = 65536
TELL = '(import "tell" (func $tell (param "x" u32))) (core func $lower (canon lower (func $tell)))'
WITH = '(with "h" (instance (export "tell" (func $lower))))'
TYPE = '(core module (import "h" "tell" (func (param i32))))'


def engine_of(kind="mmap", **settings):
    config = all_features()
    for name, value in settings.items():
        setattr(config, name, value)
    linmem.wasmtime.install(config, CREATORS[kind]())
    return wasmtime.Engine(config)


def plain_of(**settings):
    config = all_features()
    for name, value in settings.items():
        setattr(config, name, value)
    return wasmtime.Engine(config)


MMAP, PLAIN = engine_of(), plain_of()


def module(name, byte, rest=""):
    """A core module that tells the host the first byte of its memory when it starts, and then overwrites the byte.

    All of these modules have one page, so that nothing but the order tells their memories apart.
    """
    return f"""(core module ${name} (import "h" "tell" (func $tell (param i32))) (memory 1)
        (data (i32.const 0) "\\{byte:02x}") {rest}
        (func $start (call $tell (i32.load8_u (i32.const 0))) (i32.store8 (i32.const 0) (i32.const 255)))
        (start $start))"""


def instance(name):
    return f"(core instance (instantiate ${name} {WITH}))"


def told(engine, instantiate, host=lambda store: None, define=lambda root: None):
    """What the core modules tell the host when ``instantiate(store, linker)`` makes an instance."""
    heard = []

    def tell(store, value):
        heard.append(value)
        host(store)

    linker, store = component.Linker(engine), wasmtime.Store(engine)
    with linker.root() as root:
        root.add_func("tell", tell)
        define(root)
    instantiate(store, linker)
    store.close()
    return heard


def plainly(engine, wat):
    """A function that makes instances of a component with wasmtime alone."""
    compiled = component.Component(engine, wat)
    return lambda store, linker: linker.instantiate(store, compiled)


def same(wat, engine=MMAP, **world):
    """Compares a prepared component with wasmtime's own, twice. Returns the prepared component and what was told."""
    prepared = prepare(engine, wat)
    expected = told(PLAIN, plainly(PLAIN, wat), **world)
    for _ in range(2):
        assert told(engine, prepared.instantiate, **world) == expected
    return prepared, expected


def taken(prepared):
    return [image is not None for image in prepared.images]


GREETING = """(component
    (core module $m (memory (export "memory") 1) (data (i32.const 16) "hello") (data (i32.const 60000) "world")
        (func (export "get") (param i32) (result i32) (i32.load8_u (local.get 0)))
        (func (export "set") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
        (func (export "grow") (result i32) (memory.grow (i32.const 1))))
    (core instance $i (instantiate $m))
    (func (export "get") (param "at" u32) (result u32) (canon lift (core func $i "get")))
    (func (export "set") (param "at" u32) (param "value" u32) (canon lift (core func $i "set")))
    (func (export "grow") (result u32) (canon lift (core func $i "grow"))))"""


class Greeting:
    def __init__(self, prepared, **how):
        self.store = wasmtime.Store(prepared.engine)
        self.instance = prepared.instantiate(self.store, component.Linker(prepared.engine), **how)

    def call(self, name, *arguments):
        function = self.instance.get_func(self.store, name)
        result = function(self.store, *arguments)
        if hasattr(function, "post_return"):
            function.post_return(self.store)
        return result

    def text(self, offset, size):
        return bytes(self.call("get", offset + i) for i in range(size))


# -- the same instances ----------------------------------------------------------------------------


@with_every_creator
def test_the_data_is_there_and_each_instance_has_its_own(kind):
    prepared = prepare(engine_of(kind), GREETING)
    assert isinstance(prepared.module, component.Component)
    assert (taken(prepared), prepared.skipped, prepared.outline, prepared.added) == ([True], (), None, frozenset())
    guests = [Greeting(prepared) for _ in range(3)]
    for turn, guest in enumerate(guests):
        assert (guest.text(15, 7), guest.text(60000, 5)) == (b"\0hello\0", b"world")
        guest.call("set", 16, turn)
    assert [guest.call("get", 16) for guest in guests] == [0, 1, 2]
    assert guests[0].call("grow") == 1
    assert [guests[0].call("get", at) for at in (17, 2 * PAGE - 1)] == [ord("e"), 0]


def test_the_compiled_component_lacks_the_data_and_the_digest_is_that_of_the_file():
    prepared = prepare(MMAP, GREETING)
    store = wasmtime.Store(MMAP)
    bare = component.Linker(MMAP).instantiate(store, prepared.module)
    assert bare.get_func(store, "get")(store, 16) == 0
    assert prepared.digest == prepare(MMAP, binary(GREETING)).digest


def test_core_instances_get_the_data_of_their_own_modules_in_any_order():
    wat = f"(component {TELL} {module('a', 1)} {module('b', 2)} {instance('b')} {instance('a')} {instance('b')})"
    prepared, heard = same(wat)
    assert (heard, taken(prepared), prepared.skipped) == ([2, 1, 2], [True] * 3, ())
    assert prepared.images[0] is prepared.images[2] is not prepared.images[1]


def test_a_nested_component_is_instantiated_where_its_instance_stands():
    prepared, heard = same(f"""(component {TELL} {module('a', 1)} {module('b', 2)}
        (component $c (import "m" {TYPE.replace('module', 'module $x', 1)}) {TELL}
            {module('d', 3)} {instance('d')} {instance('x')})
        {instance('b')}
        (instance (instantiate $c (with "m" (core module $a)) (with "tell" (func $tell))))
        {instance('a')}
        (instance (instantiate $c (with "m" (core module $b)) (with "tell" (func $tell)))))""")
    assert (heard, taken(prepared), prepared.skipped) == ([2, 3, 1, 1, 3, 2], [True] * 6, ())


def test_aliases_and_exports_of_modules_and_components_are_followed():
    prepared, heard = same(f"""(component $root {TELL} {module('a', 1)} {module('unused', 9)}
        (component $c {TELL} (alias outer $root $a (core module $o)) {module('d', 2)}
            (component $e {TELL} {module('f', 3)} {instance('f')} (export "o" (core module $d)))
            (instance $inner (export "d" (core module $d)) (export "o" (core module $o)))
            (export $again "i" (instance $inner)) (export "e" (component $e))
            {instance('o')})
        (instance $i (instantiate $c (with "tell" (func $tell))))
        (alias export $i "i" (instance $ii)) (alias export $ii "d" (core module $x))
        (alias export $i "e" (component $y))
        (instance $j (instantiate $y (with "tell" (func $tell)))) (alias export $j "o" (core module $z))
        {instance('x')} {instance('a')} {instance('z')})""")
    assert (heard, taken(prepared), prepared.skipped) == ([1, 3, 2, 1, 2], [True] * 5, ())


def random_component(chance):
    """A component with nested components, whose modules come from everywhere: own, aliases, arguments and exports."""
    byte = itertools.cycle(range(1, 250))
    names = (f"n{i}" for i in range(100_000))

    def body(depth, outers):
        """Its name, text, imports and exports of modules. outers: name and modules of the components around it."""
        name = next(names)
        parts, modules, components, exports = [], [], [], []
        outers = [*outers, (name, modules)]
        imported = [next(names) for _ in range(chance.randrange(3))] if depth else []
        parts += [f'(import "{each}" {TYPE.replace("module", f"module ${each}", 1)})' for each in imported]
        modules += imported
        parts.append(TELL)
        for _ in range(chance.randrange(6, 16)):
            action = chance.randrange(6)
            if action == 0 or not modules:
                new = next(names)
                parts.append(module(new, next(byte)))
                modules.append(new)
            elif action == 1:
                parts.append(instance(chance.choice(modules)))
            elif action == 2 and depth < 3:
                new, text, needed, given = body(depth + 1, outers)
                parts.append(text)
                components.append((new, needed, given))
            elif action == 3 and components:
                which, needed, given = chance.choice(components)
                new = next(names)
                arguments = "".join(f'(with "{each}" (core module ${chance.choice(modules)}))' for each in needed)
                parts.append(f'(instance ${new} (instantiate ${which} (with "tell" (func $tell)) {arguments}))')
                for each in given:
                    alias = next(names)
                    parts.append(f'(alias export ${new} "{each}" (core module ${alias}))')
                    modules.append(alias)
            elif action == 4 and len(outers) > 1:
                outer, theirs = chance.choice(outers[:-1])
                if theirs:
                    new = next(names)
                    parts.append(f"(alias outer ${outer} ${chance.choice(theirs)} (core module ${new}))")
                    modules.append(new)
            elif depth:
                new, alias = next(names), next(names)
                parts.append(f'(export ${alias} "{new}" (core module ${chance.choice(modules)}))')
                modules.append(alias)
                exports.append(new)
        return name, f"(component ${name} {' '.join(parts)})", imported, exports

    return body(0, [])[1]


@pytest.mark.parametrize("seed", range(40))
def test_a_component_of_any_shape_behaves_as_in_wasmtime(seed):
    prepared, heard = same(random_component(random.Random(seed)))
    assert taken(prepared) == [True] * len(heard)
    assert prepared.skipped == ()


@with_every_creator
def test_host_code_between_two_core_instances_may_make_instances_of_its_own(kind):
    """Their memories have the same size as the memories that are still to come, and take no image of these."""
    engine = engine_of(kind)
    wat = f"(component {TELL} {module('a', 1)} {module('b', 2)} {instance('a')} {instance('b')} {instance('a')})"
    bare = wasmtime.Module(engine, '(module (memory (export "m") 1))')
    inner = prepare(engine, '(module (memory (export "m") 1) (data (i32.const 0) "i"))')
    other = prepare(engine, GREETING)
    seen = []

    def host(store):
        own = wasmtime.Store(engine)
        for made in (wasmtime.Instance(own, bare, []), inner.instantiate(own), wasmtime.Instance(own, bare, [])):
            seen.append(bytes(made.exports(own)["m"].read(own, 0, 1)))
        memory = linmem.wasmtime.new_memory(own, wasmtime.MemoryType(wasmtime.Limits(1, None)))
        seen.append(bytes(memory.read(own, 0, 1)))
        seen.append(Greeting(other).text(16, 5))

    prepared = prepare(engine, wat)
    for _ in range(2):
        assert told(engine, prepared.instantiate, host) == [1, 2, 1]
    assert seen == [b"\0", b"i", b"\0", b"\0", b"hello"] * 6


def test_a_creator_in_python_may_make_instances_of_its_own():
    class Busy(linmem.MemoryCreator):
        made = ()

        def new_memory(self, *arguments):
            if self.made is not None:
                self.made = None
                store = wasmtime.Store(MMAP)
                self.made = bytes(wasmtime.Instance(store, bare, []).exports(store)["m"].read(store, 0, 1))
            return linmem.creator().new_memory(*arguments)

    bare = wasmtime.Module(MMAP, '(module (memory (export "m") 1))')
    busy = Busy()
    prepared = prepare(MMAP, f"(component {TELL} {module('a', 1)} {instance('a')})")
    assert told(MMAP, lambda *given: prepared.instantiate(*given, creator=busy)) == [1]
    assert busy.made == b"\0"


def test_threads_make_instances_of_different_components_at_once():
    engine = engine_of("pool")
    prepared = {byte: prepare(engine, f"(component {TELL} {module('a', byte)} {instance('a') * 3})")
                for byte in range(1, 5)}
    wrong = []

    def work(byte):
        for _ in range(30):
            heard = told(engine, prepared[byte].instantiate)
            wrong.extend(each for each in heard if each != byte)

    threads = [threading.Thread(target=work, args=(byte,)) for byte in prepared]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@needs_gc
@with_every_creator
def test_a_heap_that_wasmtime_makes_first_takes_no_image(kind):
    collected = """(type $s (struct (field i32))) (memory 0)
        (global $g (mut (ref null $s)) (struct.new $s (i32.const 1)))"""
    wat = f"""(component {TELL} {module('a', 1)} (core module $none (memory 0) (memory 0)) {module('b', 2, collected)}
        {instance('a')} (core instance (instantiate $none)) {instance('b')} {instance('b')})"""
    prepared, heard = same(wat, engine_of(kind))
    assert (heard, taken(prepared)) == ([1, 2, 2], [True, False, False, True, False, True, False])


def test_memories_of_every_kind_are_hoisted():
    kinds = """(memory 1 2 shared) (memory i64 1) (memory 1)
        (data (memory 1) (i32.const 0) "shared") (data (memory 2) (i64.const 0) "wide")"""
    prepared, heard = same(f"(component {TELL} {module('a', 1, kinds)} {instance('a') * 2})")
    assert (heard, taken(prepared)) == ([1, 1], [True, True, True, False] * 2)


def test_an_instantiation_that_fails_half_way_leaves_no_image_to_others():
    bad = module("bad", 9, '(memory 0) (data (memory 1) (i32.const 0) "x")')
    prepared = prepare(MMAP, f"""(component {TELL} {module('a', 1)} {module('b', 2)} {bad}
        {instance('a')} {instance('bad')} {instance('b')})""")
    assert prepared.skipped == ("core module 2: data segment 1 and all after it: it does not fit into memory 1, so that"
                                " instantiation traps",)
    heard = []
    for turn in range(2):
        with pytest.raises((wasmtime.WasmtimeError, wasmtime.Trap), match="out of bounds"):
            told(MMAP, prepared.instantiate, heard.append)
        assert len(heard) == turn + 1
        store = wasmtime.Store(MMAP)
        made = wasmtime.Instance(store, wasmtime.Module(MMAP, '(module (memory (export "m") 1))'), [])
        assert bytes(made.exports(store)["m"].read(store, 0, 1)) == b"\0"


# -- data that stays -------------------------------------------------------------------------------


def test_modules_after_one_of_the_host_keep_their_data():
    """The module of the host asks for memories of the same size."""
    host = wasmtime.Module(MMAP, """(module (import "h" "tell" (func (param i32))) (memory 1) (memory 1))""")
    wat = f"""(component (import "m" {TYPE.replace('module', 'module $m', 1)}) {TELL} {module('a', 1)} {module('b', 2)}
        {module('c', 3)} {instance('a')} {instance('b')} {instance('m')} {instance('b')} {instance('c')})"""
    prepared = prepare(MMAP, wat)
    for _ in range(2):
        assert told(MMAP, prepared.instantiate, define=lambda root: root.add_module("m", host)) == [1, 2, 2, 3]
    assert taken(prepared) == [True, False]
    assert prepared.skipped == tuple(
        f"core module {number}: it is instantiated after a module that the host gives, which may make any number of"
        " memories" for number in (1, 2))


def test_a_module_of_the_host_may_come_from_an_instance_and_through_components():
    wat = f"""(component $root (import "i" (instance $i (export "m" {TYPE}))) {TELL} {module('a', 1)} {module('b', 2)}
        (component $c (import "x" {TYPE.replace('module', 'module $x', 1)}) {TELL} {instance('x')})
        (alias export $i "m" (core module $m)) {instance('a')}
        (instance (instantiate $c (with "x" (core module $m)) (with "tell" (func $tell)))) {instance('b')})"""
    host = wasmtime.Module(MMAP, """(module (import "h" "tell" (func (param i32))) (memory 1))""")

    def define(root):
        with root.add_instance("i") as made:
            made.add_module("m", host)

    prepared = prepare(MMAP, wat)
    assert told(MMAP, prepared.instantiate, define=define) == [1, 2]
    assert (taken(prepared), len(prepared.skipped)) == ([True], 1)


@pytest.mark.parametrize("exports", [
    '(export "m" (core module $a))', '(instance $i (export "m" (core module $a))) (export "i" (instance $i))',
    '(component $c (alias outer $root $a (core module $x)) (export "m" (core module $x)))'
    ' (instance $i (instantiate $c)) (export "i" (instance $i))'])
def test_a_module_that_the_component_exports_keeps_its_data(exports):
    prepared, heard = same(f"(component $root {TELL} {module('a', 1)} {module('b', 2)} {instance('a')} {instance('b')}"
                           f" {exports})")
    assert (heard, taken(prepared)) == ([1, 2], [False, True])
    assert prepared.skipped == ("core module 0: the component exports it, and the host may instantiate it",)


def test_an_exported_component_keeps_all_data():
    found = hoist_component(binary(f"(component {TELL} {module('a', 1)} {instance('a')}"
                                   f' (component $c {TELL}) (export "c" (component $c)))'))
    assert found.skipped == ["nothing is hoisted: it exports a component, which the host may instantiate"]
    assert found.order == []


def test_a_module_without_an_instance_stays_as_it_is_and_is_no_reason():
    wat = f"(component {TELL} {module('a', 1)} {module('b', 2)} {instance('b')})"
    prepared, _ = same(wat)
    assert (taken(prepared), prepared.skipped) == ([True], ())
    assert b"\0\x41\0\x0b\1\1" in hoist_component(binary(wat)).component      # the segment of $a


def test_reasons_of_one_module_name_the_module():
    wat = f"""(component {TELL} {module('a', 1)}
        (core module $g (global (export "g") i32 (i32.const 7)))
        (core module $b (import "h" "g" (global i32)) (memory 1) (data (global.get 0) "late"))
        (core instance $gi (instantiate $g)) {instance('a')}
        (core instance (instantiate $b (with "h" (instance $gi)))))"""
    prepared, _ = same(wat)
    assert taken(prepared) == [True, False]
    assert prepared.skipped == ("core module 2: data segment 0 and all after it of memory 0: its offset is not a"
                                " constant of the module",)


# -- files of anybody ------------------------------------------------------------------------------


def test_an_exponential_number_of_instances_is_not_counted_out():
    """Each of 40 components instantiates the one before twice. wasmtime itself is not asked: it would not end."""
    inner = "(component $c0 (core module $m (memory 1) (data (i32.const 0) \"x\")) (core instance (instantiate $m)))"
    for depth in range(1, 41):
        inner += f" (component $c{depth} (alias outer $root $c{depth - 1} (component $x))"
        inner += " (instance (instantiate $x)) (instance (instantiate $x)))"
    wasm = binary(f"(component $root {inner} (instance (instantiate $c40)))")
    started = time.process_time()
    found = hoist_component(wasm)
    assert time.process_time() - started < 10
    assert found.component is wasm
    assert found.skipped == ["nothing is hoisted: an instance of the component takes more than 100000 steps"]


def section(kind, content):
    return bytes([kind]) + leb128(len(content)) + content


def nested(levels, content=b""):
    """Components inside each other, each with an instance of the one inside. The innermost has the `content`."""
    for _ in range(levels):
        content = section(4, PREAMBLE + content) + section(5, b"\1\0\0\0")
    return PREAMBLE + content


def test_the_depth_of_nested_components_is_bounded():
    assert hoist_component(nested(100)).skipped == []
    for levels in (101, 3000):
        assert hoist_component(nested(levels)).skipped == ["nothing is hoisted: components are nested deeper than 100"]
    wasm = nested(150)
    assert verdict_of(prepare, MMAP, wasm) == verdict_of(component.Component, MMAP, wasm)


def test_memory_and_time_follow_the_size_of_the_file():
    """100 levels around a module of 4 MiB: its bytes are not copied at each level."""
    inside = binary(f'''(component (core module (memory 70) (data (i32.const 0) "{"x" * (4 << 20)}"))
        (core instance (instantiate 0)))''')
    wasm = nested(100, inside[len(PREAMBLE):])
    tracemalloc.start()
    try:
        found = hoist_component(wasm)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [len(content) for _, content in found.images[0]] == [4 << 20]
    assert (len(found.component), found.order) == (len(nested(100, hoist_component(inside).component[8:])), [0])
    assert peak < 4 * len(wasm)


def test_many_small_sections_take_no_memory():
    wasm = binary(GREETING) + b"\0\1\0" * 20_000
    tracemalloc.start()
    try:
        found = hoist_component(wasm)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(wasm) - len(found.component) < 100
    assert peak < 3 * len(wasm)


@pytest.mark.parametrize("seed", range(3))
def test_any_bytes_are_judged_as_by_wasmtime(seed):
    chance = random.Random(seed)
    valid = [binary(random_component(random.Random(number))) for number in range(5)] + [binary(GREETING)]
    verdicts = set()
    for _ in range(100):
        wasm = mutated(chance.choice(valid), chance)
        if is_component(wasm):
            expected = verdict_of(component.Component, MMAP, wasm)
            assert verdict_of(prepare, MMAP, wasm) == expected
            verdicts.add(expected is None)
    assert verdicts == {True, False}


@given(st.binary(max_size=40), st.sampled_from([PREAMBLE, b"\0asm\x0e\0\1\0"]))
def test_bytes_that_start_as_a_component_are_judged_as_by_wasmtime(tail, head):
    assert verdict_of(prepare, MMAP, head + tail) == verdict_of(component.Component, MMAP, head + tail)


def test_every_truncation_is_malformed_or_ends_between_two_sections():
    wasm = binary(random_component(random.Random(3)))
    whole = 0
    for size in range(8, len(wasm)):
        with contextlib.suppress(Malformed):
            assert hoist_component(wasm[:size]).skipped == []
            whole += 1
    assert 0 < whole < len(wasm) / 10


@pytest.mark.parametrize("parts", [
    # A nested component that imports a module "m", or an instance, and gets an empty instance, or a core module.
    section(4, PREAMBLE + section(10, b"\1\0\1m\0\x11\0") + section(2, b"\1\0\0\0")) + section(5, b"\1\1\0")
    + section(5, b"\1\0\0\1\1m\5\0"),
    section(4, PREAMBLE + section(10, b"\1\0\1m\5\0")) + section(1, b"\0asm\1\0\0\0")
    + section(5, b"\1\0\0\1\1m\0\x11\0"),
    # An export that is a core module, used as an instance.
    section(1, b"\0asm\1\0\0\0") + section(5, b"\1\1\1\0\1m\0\x11\0") + section(6, b"\1\5\0\0\1m"),
    section(2, b"\1\0\0\0"), section(6, b"\1\0\x11\2\1\0"), section(6, b"\1\0\x11\2\xff\xff\xff\xff\x0f\0")])
def test_values_of_other_kinds_and_missing_values_are_malformed(parts):
    wasm = PREAMBLE + parts
    with pytest.raises(Malformed, match=r"another kind of value as a (module|instance)|has no module 0|fewer than \d+"):
        hoist_component(wasm)
    refused = verdict_of(component.Component, MMAP, wasm)
    assert refused is not None
    assert verdict_of(prepare, MMAP, wasm) == refused


@pytest.mark.parametrize("part", [
    b"\x09\1\0", b"\x0c\1\0", b"\x0d\1\0", section(10, b"\1\2\1a\1\0"), section(10, b"\1\0\1a\6\0"),
    section(6, b"\1\x06\2\0\0"), section(6, b"\1\5\3\0\0"), section(2, b"\1\2\0"), section(5, b"\1\2\0"),
    section(11, b"\1\0\1a\0\x13\0\0")])
def test_parts_of_later_versions_leave_all_data_in_the_component(part):
    wasm = binary(GREETING) + part
    found = hoist_component(wasm)
    assert (found.component, found.order) == (wasm, [])
    assert [reason.startswith("nothing is hoisted: ") for reason in found.skipped] == [True]


# -- fuel, deadlines, caches, refusals -------------------------------------------------------------


STILL = f"""(component (core module $a (memory 20) (data (i32.const 3) "{"x" * (1 << 20)}"))
    (core module $b (memory 1) (data (i32.const 0) "y"))
    (core instance (instantiate $a)) (core instance (instantiate $b))
    (component $c (core module $d (memory 1) (data (i32.const 5) "zzz")) (core instance (instantiate $d)))
    (instance (instantiate $c)) (instance (instantiate $c)))"""


def fuel_of(engine, wat, instantiate, fuel):
    store = wasmtime.Store(engine)
    store.set_fuel(fuel)
    heard = []
    linker = component.Linker(engine)
    with linker.root() as root:
        root.add_func("tell", lambda store, value: heard.append(value))
    try:
        instantiate(store, linker)
    except (wasmtime.WasmtimeError, wasmtime.Trap) as error:
        return heard, "all fuel consumed" in str(error)
    return heard, fuel - store.get_fuel()


PLAIN_FUEL = plain_of(consume_fuel=True)
PLAIN_IS_FREE = fuel_of(PLAIN_FUEL, STILL, plainly(PLAIN_FUEL, STILL), 0) == ([], 0)
where_plain_is_free = pytest.mark.skipif(not PLAIN_IS_FREE, reason="plain wasmtime copies data by code here")


@where_plain_is_free
@pytest.mark.parametrize("fuel", [0, 1, 2, 10, 10_000])
def test_an_instance_costs_the_fuel_that_it_costs_in_plain_wasmtime(fuel):
    ours = engine_of(consume_fuel=True)
    for wat in (STILL, *(random_component(random.Random(seed)) for seed in range(3))):
        assert (fuel_of(ours, wat, prepare(ours, wat).instantiate, fuel)
                == fuel_of(PLAIN_FUEL, wat, plainly(PLAIN_FUEL, wat), fuel))


@where_plain_is_free
def test_an_instance_is_made_past_its_deadline_where_plain_wasmtime_makes_it():
    plain, ours = plain_of(epoch_interruption=True), engine_of(epoch_interruption=True)
    for engine, instantiate in ((plain, plainly(plain, STILL)), (ours, prepare(ours, STILL).instantiate)):
        store = wasmtime.Store(engine)
        store.set_epoch_deadline(1)
        engine.increment_epoch()
        engine.increment_epoch()
        instantiate(store, component.Linker(engine))


@pytest.fixture
def compilations(monkeypatch):
    """Counts the compilations of components."""
    counted = []
    compile = component.Component.__init__
    monkeypatch.setattr(component.Component, "__init__",
                        lambda self, *args: (counted.append(1), compile(self, *args))[1])
    return counted


def test_a_component_is_compiled_once_and_then_read(tmp_path, compilations, monkeypatch):
    def text(cache):
        return Greeting(prepare(MMAP, GREETING, cache=cache)).text(16, 5)

    assert [text(tmp_path) for _ in range(3)] == [b"hello"] * 3
    assert compilations == [1]
    other = GREETING.replace("hello", "HELLO")      # the same code; the data is stored elsewhere
    assert Greeting(prepare(MMAP, other, cache=tmp_path)).text(16, 5) == b"HELLO"
    assert compilations == [1]
    for path in tmp_path.rglob("*.ccomponent"):
        path.write_bytes(path.read_bytes()[:-1])    # a damaged entry
    assert text(tmp_path) == b"hello"
    assert compilations == [1, 1]

    def refused(engine, path):
        raise wasmtime.WasmtimeError(f"{path} is on a file system that is mounted noexec")

    monkeypatch.setattr(component.Component, "deserialize_file", refused)
    assert text(tmp_path) == b"hello"
    assert compilations == [1, 1]


def test_a_component_that_wasmtime_accepts_only_unchanged_stays_unchanged(monkeypatch):
    made = _prepared.hoist_component
    monkeypatch.setattr(_prepared, "hoist_component",
                        lambda wasm: made(wasm)._replace(component=wasm + b"\x63\0"))
    prepared = prepare(MMAP, GREETING)
    assert prepared.images == (None,)
    assert "nothing is hoisted, wasmtime takes the component only as it is" in prepared.skipped[0]
    assert Greeting(prepared).text(16, 5) == b"hello"


def test_data_that_needs_too_large_an_image_stays(monkeypatch):
    def refused(*arguments):
        raise linmem.PageError(12, "no room")

    monkeypatch.setattr(_prepared, "_image", refused)
    prepared = prepare(MMAP, GREETING)
    assert prepared.images == (None,)
    assert "nothing is hoisted, there is no room for an image" in prepared.skipped[0]
    assert Greeting(prepared).text(16, 5) == b"hello"


def test_a_component_is_refused_with_wasmtimes_text():
    for wasm in (PREAMBLE + b"\0\5", binary(GREETING)[:-1], "(component (core instance (instantiate 0)))"):
        with pytest.raises(wasmtime.WasmtimeError) as plain:
            component.Component(MMAP, wasm)
        with pytest.raises(wasmtime.WasmtimeError) as ours:
            prepare(MMAP, wasm)
        assert said(ours.value) == said(plain.value)
        assert ours.value.__context__ is None


@pytest.mark.skipif(not hasattr(wasmtime.Config, "wasm_component_model"), reason="components cannot be switched off")
def test_an_engine_without_components_refuses_with_wasmtimes_text():
    engine = engine_of(wasm_component_model=False)
    with pytest.raises(wasmtime.WasmtimeError) as plain:
        component.Component(engine, GREETING)
    with pytest.raises(wasmtime.WasmtimeError) as ours:
        prepare(engine, GREETING)
    assert said(ours.value) == said(plain.value)


def test_arguments_of_a_component_are_checked():
    with pytest.raises(ValueError, match=r"expose must be False for a component: a component cannot export"):
        prepare(MMAP, GREETING, expose=True)
    prepared = prepare(MMAP, GREETING)
    store = wasmtime.Store(MMAP)
    for wrong in ([], wasmtime.Linker(MMAP), None):
        with pytest.raises(TypeError, match=r"imports must be a wasmtime\.component\.Linker, because a component was"):
            prepared.instantiate(store, wrong)
    core = prepare(MMAP, "(module)")
    with pytest.raises(TypeError, match=r"must be a sequence or a wasmtime\.Linker, got wasmtime\.component\._linker"):
        core.instantiate(store, component.Linker(MMAP))
    snapshot = linmem.wasmtime.Snapshot.take(store, core.instantiate(store))
    with pytest.raises(ValueError, match="start must be None for a component"):
        prepared.instantiate(store, start=snapshot)
    with pytest.raises(ValueError, match="start must be None for a component"):
        linmem.wasmtime.Sessions(prepared, start=snapshot, size=1)
    with pytest.raises(TypeError, match=r"must be a wasmtime\.Instance, got an instance of a component"):
        linmem.wasmtime.Snapshot.take(store, prepared.instantiate(store))
    with pytest.raises(TypeError, match="store must be"):
        prepared.instantiate(None)
    with pytest.raises(wasmtime.WasmtimeError, match="tell"):
        prepare(MMAP, f"(component {TELL})").instantiate(store)


def test_a_wasmtime_without_components_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wasmtime.component", None)
    with pytest.raises(RuntimeError, match=r"wasmtime \S+ has no components: "):
        prepare(MMAP, PREAMBLE)


def test_a_component_without_imports_needs_no_linker_and_takes_a_creator_and_a_domain():
    prepared = prepare(MMAP, GREETING)
    budget = linmem.creator("limiting", limit_bytes=PAGE)
    store = wasmtime.Store(MMAP)
    instance = prepared.instantiate(store, creator=budget, domain="tenant")
    assert instance.get_func(store, "get")(store, 16) == ord("h")
    assert budget.used_bytes == PAGE
    with pytest.raises(wasmtime.WasmtimeError, match="limit"):
        prepared.instantiate(store, creator=budget)
    with linmem.wasmtime.use(budget), pytest.raises(wasmtime.WasmtimeError, match="limit"):
        prepared.instantiate(store)


def test_an_interrupt_leaves_no_image_on_offer(monkeypatch):
    prepared = prepare(MMAP, GREETING)
    with monkeypatch.context() as patch:
        patch.setattr(component.Linker, "instantiate", lambda *args: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            prepared.instantiate(wasmtime.Store(MMAP))
    store = wasmtime.Store(MMAP)
    plain = wasmtime.Instance(store, wasmtime.Module(MMAP, '(module (memory (export "m") 1))'), [])
    assert bytes(plain.exports(store)["m"].read(store, 16, 21)) == bytes(5)
    assert Greeting(prepared).text(16, 5) == b"hello"


class Interrupted(wasmtime.Store):
    """A store that a signal interrupts between the offer of the images and the call of wasmtime."""

    def _context(self):
        signal.raise_signal(signal.SIGINT)
        return super()._context()


@pytest.mark.parametrize("wat", [GREETING, '(module (memory 1) (data (i32.const 16) "hello"))'])
@pytest.mark.parametrize(("minimum", "is_refused"), [(1, True), (0, False)])
def test_an_instance_that_a_signal_handler_makes_takes_no_data_unnoticed(wat, minimum, is_refused):
    bystander, prepared = wasmtime.Module(MMAP, f"(module (memory {minimum}))"), prepare(MMAP, wat)

    def handler(number, frame):
        store = wasmtime.Store(MMAP)
        wasmtime.Instance(store, bystander, [])
        prepare(MMAP, wat).instantiate(store)

    refused = pytest.raises(RuntimeError, match="a signal handler or a finalizer")
    before = signal.signal(signal.SIGINT, handler)
    try:
        with refused if is_refused else contextlib.nullcontext():
            prepared.instantiate(Interrupted(MMAP))
    finally:
        signal.signal(signal.SIGINT, before)
    prepared.instantiate(wasmtime.Store(MMAP))


def test_data_that_no_memory_took_is_an_error(monkeypatch):
    monkeypatch.setattr(_prepared, "makes_our_memories", lambda engine: True)
    prepared = prepare(PLAIN, GREETING)
    with pytest.raises(RuntimeError, match="1 memories were made without their data"):
        prepared.instantiate(wasmtime.Store(PLAIN))


# -- a component that others wrote; the stage `foreign` installs it --------------------------------


CODEC = importlib.util.find_spec("numcodecs_wasm_bit_round")


def rounded(engine, instantiate, numbers):
    """What the codec names itself, and the numbers with three bits of their mantissas."""
    linker, store = component.Linker(engine), wasmtime.Store(engine)
    linker.add_wasip2()
    with linker.root() as root, root.add_instance("wasi:logging/logging") as log:
        log.add_func("log", lambda store, *text: None)
    store.set_wasi(wasmtime.WasiConfig())
    instance = instantiate(store, linker)
    interface = instance.get_export_index(store, "numcodecs:abc/codec@0.1.1")

    def call(name, *arguments):
        function = instance.get_func(store, instance.get_export_index(store, name, interface))
        result = function(store, *arguments)
        if hasattr(function, "post_return"):
            function.post_return(store)
        return result

    array = component.Record()
    array.data, array.shape = component.Variant("f32", numbers), [len(numbers)]
    codec = call("[static]codec.from-config", '{"mode": "keepbits", "keepbits": 3}')
    return call("codec-id"), call("[method]codec.encode", codec, array).payload.data.payload


@pytest.mark.skipif(CODEC is None, reason="numcodecs_wasm_bit_round is not installed")
def test_a_codec_from_pypi_computes_the_same():
    wasm = (pathlib.Path(CODEC.origin).parent / "codec.wasm").read_bytes()
    prepared = prepare(MMAP, wasm)
    assert (taken(prepared), prepared.skipped) == ([True], ())
    assert prepared.images[0].size > 40_000
    found = rounded(MMAP, prepared.instantiate, [1.1, 2.7, 3.14159])
    assert found == rounded(PLAIN, plainly(PLAIN, wasm), [1.1, 2.7, 3.14159])
    assert found[1] == [1.125, 2.75, 3.25]
