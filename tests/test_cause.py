"""linmem.wasmtime.cause: the exception behind an error of wasmtime."""

import gc
import threading
import weakref

import pytest

pytest.importorskip("wasmtime")

import wasmtime
from test_hoist import needs_gc
from test_prepare import engine_of

import linmem.wasmtime
from linmem.wasmtime import Snapshot, cause, prepare

PAGE = 65536
LIMIT = 4 * PAGE

GROWS = """(module (import "e" "call" (func $call)) (memory (export "m") 1)
    (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
    (func (export "must_grow") (param i32)
        (if (i32.eq (memory.grow (local.get 0)) (i32.const -1)) (then (unreachable))))
    (func (export "grow_and_load") (param i32)
        (drop (memory.grow (local.get 0))) (drop (i32.load (i32.const -4))))
    (func (export "grow_and_call") (param i32) (drop (memory.grow (local.get 0))) (call $call))
    (func (export "call_and_trap") (call $call) (unreachable))
    (func (export "trap") (unreachable)))"""


def engine_with(creator):
    config = wasmtime.Config()
    linmem.wasmtime.install(config, creator)
    return wasmtime.Engine(config)


def limited(limit=LIMIT):
    return engine_with(linmem.LimitingCreator(linmem.creator("mmap"), limit))


class Guest:
    def __init__(self, engine=None, call=lambda: None, wat=GROWS):
        engine = limited() if engine is None else engine
        self.store = wasmtime.Store(engine)
        function = wasmtime.Func(self.store, wasmtime.FuncType([], []), call)
        self.exports = wasmtime.Instance(self.store, wasmtime.Module(engine, wat), [function]).exports(self.store)

    def call(self, name, *arguments):
        return self.exports[name](self.store, *arguments)

    def error(self, name, *arguments):
        with pytest.raises((wasmtime.Trap, wasmtime.WasmtimeError)) as raised:
            self.call(name, *arguments)
        return raised.value


def refused(make):
    with pytest.raises(wasmtime.WasmtimeError) as raised:
        make()
    return raised.value


def is_of_the_budget(error, requested):
    assert type(error) is linmem.LimitError
    return (error.limit, error.used, error.requested) == (LIMIT, PAGE, requested)


# -- memories that could not be made -----------------------------------------------------------------


def test_a_memory_over_the_budget_is_refused_because_of_a_limit_error():
    error = refused(lambda: Guest(wat='(module (import "e" "call" (func)) (memory 5))'))
    found = cause(error)
    assert type(found) is linmem.LimitError
    assert (found.limit, found.used, found.requested) == (LIMIT, 0, 5 * PAGE)
    assert str(found) in str(error)


def test_a_memory_for_which_the_system_has_no_room_is_refused_because_of_a_page_error():
    error = refused(lambda: Guest(engine_of(), wat=f'(module (import "e" "call" (func)) (memory i64 {1 << 46}))'))
    found = cause(error)
    assert isinstance(found, linmem.PageError)
    assert (found.errno or found.winerror) > 0


class OwnError(Exception):
    pass


class Refuses:
    """A creator in Python."""

    def __init__(self):
        self.error = OwnError("for a reason of its own")

    def new_memory(self, *arguments):
        raise self.error


def test_the_cause_is_the_very_exception_that_a_creator_in_python_raised():
    creator = Refuses()
    engine = engine_with(creator)
    error = refused(lambda: Guest(engine))
    found = []
    thread = threading.Thread(target=lambda: found.append(cause(error)))
    thread.start()
    thread.join(30)
    assert found == [creator.error]
    assert cause(error) is creator.error


def test_an_error_that_is_raised_because_of_or_during_an_error_of_wasmtime_has_its_cause():
    error = refused(lambda: Guest(wat='(module (import "e" "call" (func)) (memory 5))'))
    because, during = OwnError("of a library"), OwnError("while handling it")
    because.__cause__ = during.__context__ = error
    for each in (because, during):
        assert type(cause(each)) is linmem.LimitError
    error.__context__ = because         # a circle
    assert type(cause(because)) is linmem.LimitError
    during.__suppress_context__ = True
    assert cause(during) is None


def test_errors_that_linmem_has_not_caused_have_no_cause():
    assert cause(refused(lambda: wasmtime.Module(limited(), "(modul)"))) is None
    assert cause(refused(lambda: wasmtime.Module(limited(), b"\0asm[refusal 0123456789abcdef]"))) is None
    assert cause(ValueError("[refusal 0123456789abcdef]")) is None
    assert cause(wasmtime.WasmtimeError("[refusal 0123456789abcdef]")) is None
    with pytest.raises(TypeError, match="error must be an exception, got int"):
        cause(5)


# -- growths that were refused --------------------------------------------------------------------------


def test_a_trap_after_a_refused_growth_has_the_cause_of_the_refusal():
    guest = Guest()
    error = guest.error("must_grow", 9)
    assert error.trap_code == wasmtime.TrapCode.UNREACHABLE
    assert is_of_the_budget(cause(error), 9 * PAGE)
    assert guest.call("grow", 1) == 1
    assert is_of_the_budget(cause(error), 9 * PAGE)


def test_a_trap_that_wasmtime_names_has_no_cause():
    assert cause(Guest().error("grow_and_load", 9)) is None


def test_a_trap_has_no_cause_if_growths_were_refused_in_other_calls_only():
    guest = Guest()
    for _ in range(300):
        assert guest.call("grow", 9) == -1
        error = guest.error("trap")
        assert cause(error) is None
        del error       # the next call may have the same addresses


def test_the_last_refusal_inside_of_the_outermost_call_counts():
    inner = Guest()
    seen = []

    def call():
        assert inner.call("grow", 7) == -1
        seen.append(cause(inner.error("trap")))

    outer = Guest(call=call)
    assert is_of_the_budget(cause(outer.error("call_and_trap")), 7 * PAGE)
    assert seen == [None]                       # the growth was refused before the inner call that trapped
    outer = Guest(call=lambda: inner.call("must_grow", 8))
    error = outer.error("grow_and_call", 9)     # the trap goes through the host function
    assert is_of_the_budget(cause(error), 8 * PAGE)


def test_a_growth_by_the_host_that_is_refused_has_a_cause():
    guest = Guest()
    memory = guest.exports["m"]
    error = refused(lambda: memory.grow(guest.store, 9))
    assert is_of_the_budget(cause(error), 9 * PAGE)


def test_a_refused_start_has_the_cause_of_the_refused_growth():
    wat = '(module (memory (export "m") 1) (func (export "grow") (drop (memory.grow (i32.const 2)))))'
    first = engine_of()
    store = wasmtime.Store(first)
    instance = prepare(first, wat).instantiate(store)
    instance.exports(store)["grow"](store)
    snapshot = Snapshot.take(store, instance)
    engine = limited()
    prepared = prepare(engine, wat)
    stores = [wasmtime.Store(engine) for _ in range(2)]
    prepared.instantiate(stores[0], start=snapshot)
    with pytest.raises((linmem.GrowError, wasmtime.WasmtimeError)) as raised:
        prepared.instantiate(stores[1], start=snapshot)
    assert type(cause(raised.value)) is linmem.LimitError
    store = wasmtime.Store(first)
    store.set_limits(memory_size=PAGE)
    with pytest.raises(linmem.GrowError) as raised:
        prepare(first, wat).instantiate(store, start=snapshot)
    assert cause(raised.value) is None          # the store refused it


def test_a_program_that_exits_after_a_refused_growth_has_a_cause_unless_it_succeeds():
    engine = limited()
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    for code, found in ((0, type(None)), (3, linmem.LimitError)):
        store = wasmtime.Store(engine)
        store.set_wasi(wasmtime.WasiConfig())
        exports = linker.instantiate(store, wasmtime.Module(engine, f"""(module
            (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32))) (memory (export "memory") 1)
            (func (export "run") (drop (memory.grow (i32.const 9))) (call $exit (i32.const {code}))))""")
            ).exports(store)
        with pytest.raises(wasmtime.ExitTrap) as raised:
            exports["run"](store)
        assert type(cause(raised.value)) is found


@needs_gc
def test_a_gc_heap_that_may_not_grow_has_a_cause():
    config = wasmtime.Config()
    config.gc_support = config.wasm_function_references = config.wasm_gc = True
    linmem.wasmtime.install(config, linmem.LimitingCreator(linmem.creator("mmap"), LIMIT))
    guest = Guest(wasmtime.Engine(config), wat="""(module
        (import "e" "call" (func)) (type $bytes (array i8)) (memory (export "m") 1)
        (func (export "make") (param i32) (drop (array.new_default $bytes (local.get 0)))))""")
    error = guest.error("make", 8 * PAGE)
    assert "GC heap out of memory" in str(error)
    found = cause(error)
    assert type(found) is linmem.LimitError
    assert found.limit == LIMIT < found.used + found.requested
    guest.call("make", 1000)


# -- what is kept -------------------------------------------------------------------------------------------


def test_only_the_last_refusals_are_kept():
    guest = Guest()
    errors = [guest.error("must_grow", 9) for _ in range(258)]
    assert [cause(error) is None for error in errors] == [True, True] + [False] * 256


def test_a_guest_that_tries_in_a_loop_does_not_push_out_the_refusals_of_others():
    other = Guest(wat="""(module (import "e" "call" (func)) (memory (export "m") 1)
        (func (export "try") (param $times i32)
            (loop (drop (memory.grow (i32.const 9)))
                (br_if 0 (local.tee $times (i32.sub (local.get $times) (i32.const 1)))))
            (if (i32.eq (memory.grow (i32.const 7)) (i32.const -1)) (then unreachable))))""")
    error = Guest().error("must_grow", 5)
    last = other.error("try", 300)
    assert is_of_the_budget(cause(error), 5 * PAGE)
    assert is_of_the_budget(cause(last), 7 * PAGE)


def test_a_kept_refusal_holds_no_creator_and_no_call():
    class Holds(Refuses):
        def new_memory(self, *arguments):
            held = self
            raise OwnError(str(type(held)))

    creator = Holds()
    engine = engine_with(creator)
    error = refused(lambda: Guest(engine))
    gone = weakref.ref(creator)
    del creator
    engine = None
    assert type(cause(error)) is OwnError
    del error
    gc.collect()
    assert gone() is None
    guest = Guest()
    guest.call("grow", 9)
    gone = weakref.ref(guest.store)
    del guest
    gc.collect()
    assert gone() is None


def test_threads_find_their_own_causes():
    barrier = threading.Barrier(8)
    wrong = []

    def work(pages):
        guest = Guest()
        barrier.wait(30)
        for _ in range(20):
            if not is_of_the_budget(cause(guest.error("must_grow", pages)), pages * PAGE):
                wrong.append(pages)

    threads = [threading.Thread(target=work, args=[pages]) for pages in range(5, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, TimeoutError])
def test_what_a_signal_handler_raises_while_a_refusal_is_kept_reaches_the_caller_of_wasm(kind):
    def interrupted(error):
        raise kind

    guest = Guest()
    linmem._core.bridge.noted_by(interrupted)
    try:
        with pytest.raises(kind):
            guest.call("grow", 9)
    finally:
        linmem._core.bridge.noted_by(linmem._wasm.cause.note)
    assert guest.call("grow", 1) == 1


def test_a_refusal_without_memory_for_its_note_is_still_a_refusal():
    def fails(error):
        raise MemoryError

    guest = Guest()
    linmem._core.bridge.noted_by(fails)
    try:
        assert guest.call("grow", 9) == -1
        error = refused(lambda: Guest(wat='(module (import "e" "call" (func)) (memory 5))'))
    finally:
        linmem._core.bridge.noted_by(linmem._wasm.cause.note)
    assert "limit of 262144 bytes reached" in str(error)
    assert cause(error) is None


def test_an_exception_whose_class_has_no_name_is_a_refusal():
    class Nameless(type):
        @property
        def __name__(cls):
            raise ValueError

    class Odd(Exception, metaclass=Nameless):
        def __str__(self):
            raise ValueError

    class Creator(Refuses):
        def __init__(self):
            self.error = Odd()

    creator = Creator()
    engine = engine_with(creator)
    assert cause(refused(lambda: Guest(engine))) is creator.error


def test_the_exception_that_the_caller_is_handling_is_no_part_of_a_refusal():
    engine = engine_with(Refuses())
    try:
        raise OwnError("of the caller")
    except OwnError as own:
        trace = own.__traceback__
        error = cause(refused(lambda: Guest(engine)))
        assert own.__traceback__ is trace       # noqa: PT017
        assert error.__context__ is None


def test_hidden_contexts_of_a_kept_refusal_hold_no_creator():
    class Hides(Refuses):
        def new_memory(self, *arguments):
            held = self
            try:
                raise KeyError(str(type(held)))
            except KeyError:
                raise OwnError("instead") from None

    creator = Hides()
    engine = engine_with(creator)
    error = refused(lambda: Guest(engine))
    gone = weakref.ref(creator)
    del creator
    engine = None
    assert str(cause(error)) == "instead"
    del error
    gc.collect()
    assert gone() is None


def test_an_error_of_the_host_after_a_refused_growth_has_no_cause():
    def wrong_module():
        wasmtime.Module(engine, b"\0asm")

    def denied():
        raise wasmtime.Trap("the host denies access to a file")

    def wrong_call():
        other.call("grow", 1, 2)

    engine = limited()
    other = Guest(engine_of())
    for fails in (wrong_module, denied, wrong_call):
        assert cause(Guest(engine_of(), fails).error("grow_and_call", 1 << 20)) is None
        assert cause(Guest(limited(), fails).error("grow_and_call", 9)) is None


def test_errors_that_cannot_be_read_have_no_cause():
    class Unready(wasmtime.WasmtimeError):
        def __init__(self):
            pass

    trap = Guest().error("trap")
    trap.close()
    assert [cause(Unready()), cause(trap)] == [None, None]


def test_nested_calls_find_the_cause_of_the_innermost_and_of_the_outermost_one():
    depth, seen = 40, []

    def call():
        if len(guests) < depth:
            guests.append(Guest(engine, call))
            guests[-1].call("grow_and_call", 0)
        else:
            error = Guest(engine).error("must_grow", 50)
            seen.append(type(cause(error)))
            raise error

    engine = limited(50 * PAGE)
    guests = [Guest(engine, call)]
    error = guests[0].error("grow_and_call", 0)
    assert seen == [linmem.LimitError]
    assert type(cause(error)) is linmem.LimitError
    del error
    for guest in guests:
        guest.store.close()     # the host function has the guests, and a store has the host function
