"""Sessions: each user gets an instance in exactly the state of the snapshot, whatever the users before did."""

import asyncio
import contextlib
import copy
import ctypes
import functools
import gc
import importlib.metadata
import itertools
import os
import pickle
import textwrap
import threading
import time

import pytest
import wasmtime
from support import (
    FORKING,
    LIBC,
    Interrupt,
    Interrupting,
    answer,
    counting,
    descriptors,
    each_instruction,
    failing,
    live_bytes,
    mappings,
    requires,
)
from test_hoist import needs_gc
from test_prepare import engine_of

import linmem.wasmtime
from linmem._wasm import sessions as source
from linmem.wasmtime import Sessions, Snapshot, linear_memory, prepare

PAGE = 65536
ENGINE = engine_of()
WASMTIME = int(importlib.metadata.version("wasmtime").partition(".")[0])
GUEST = """(module
  (import "host" "call" (func $call))
  (memory (export "memory") 2 10)
  (global $count (export "count") (mut i32) (i32.const 100))
  (table (export "table") 1 10 funcref)
  (data (i32.const 8) "seed")
  (func (export "step") (param i32)
    (global.set $count (i32.add (global.get $count) (i32.const 1)))
    (i32.store8 (local.get 0) (global.get $count)))
  (func (export "fail") (global.set $count (i32.const -1)) (i32.store (i32.const 8) (i32.const 0)) unreachable)
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "widen") (result i32) (table.grow (ref.null func) (i32.const 1)))
  (func (export "call") (i32.store (i32.const 20) (i32.const -1)) (call $call))
  (func (export "spin") (loop (i32.store (i32.const 8) (i32.const 7)) (br 0))))"""


@functools.cache
def started(engine=ENGINE):
    """The prepared guest, and a snapshot of an instance whose state differs from a new instance's state."""
    prepared = prepare(engine, GUEST)
    store = wasmtime.Store(engine)
    if engine is not ENGINE:
        store.set_epoch_deadline(1)
        store.set_fuel(10000)
    instance = prepared.instantiate(store, nothing(store))
    instance.exports(store)["step"](store, 3)
    return prepared, Snapshot.take(store, instance)


def calling(function):
    """Imports that call `function`."""
    return lambda store: [wasmtime.Func(store, wasmtime.FuncType([], []), function)]


nothing = calling(lambda: None)


def sessions_of(size=1, imports=nothing, engine=ENGINE, **how):
    prepared, snapshot = started(engine)
    return Sessions(prepared, imports, start=snapshot, size=size, **how)


def check(store, instance):
    """The session has the state of the snapshot. Changes all of this state."""
    exports = instance.exports(store)
    memory = bytes(exports["memory"].read(store))
    assert memory == bytes(3) + bytes([101]) + bytes(4) + b"seed" + bytes(2 * PAGE - 12)
    assert exports["count"].value(store) == 101
    assert exports["table"].size(store) == 1
    assert not isinstance(exports["table"].get(store, 0), wasmtime.Func)
    exports["step"](store, 5000)
    exports["step"](store, PAGE + 3)
    exports["memory"].write(store, b"tenant", 8)
    exports["table"].set(store, 0, exports["step"])
    return exports


def figures(sessions, **expected):
    """All figures of the sessions; those that are not named are 0."""
    names = ("live", "idle", "in_use", "waiting", "handed_out", "reused")
    found = sessions.stats()
    assert found == {"size": sessions.size, "replaced": {}, **dict.fromkeys(names, 0), **expected}, found


def use(sessions):
    with sessions.get(timeout=60) as (store, instance):
        check(store, instance)


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


# -- what the next user gets -------------------------------------------------------------------------


def test_each_session_has_the_state_of_the_snapshot_and_the_instance_is_used_again():
    sessions = sessions_of()
    figures(sessions)
    places = set()
    for turn in range(5):
        with sessions.get() as (store, instance):
            exports = check(store, instance)
            places.add(ctypes.cast(exports["memory"].data_ptr(store), ctypes.c_void_p).value)
            figures(sessions, live=1, in_use=1, handed_out=turn + 1, reused=turn)
    assert len(places) == 1
    figures(sessions, live=1, idle=1, handed_out=5, reused=4)


def test_the_reset_happens_at_the_end_of_the_block_on_its_thread(monkeypatch):
    threads = []
    restore = Snapshot.restore

    def records(self, store, instance):
        threads.append(threading.get_ident())
        restore(self, store, instance)

    monkeypatch.setattr(Snapshot, "restore", records)
    sessions = sessions_of()
    other = threading.Thread(target=use, args=[sessions])
    other.start()
    ident = other.ident
    other.join(60)
    assert threads == [ident]
    with sessions.get():
        assert threads == [ident]
    assert threads == [ident, threading.get_ident()]


def test_an_instance_that_trapped_is_used_again_and_the_trap_is_raised_unchanged():
    sessions = sessions_of()
    for _ in range(3):
        with pytest.raises(wasmtime.Trap, match="unreachable"), sessions.get() as (store, instance):
            check(store, instance)["fail"](store)
    figures(sessions, live=1, idle=1, handed_out=3, reused=2)


@pytest.mark.parametrize("grow", [lambda store, exports: exports["grow"](store, 1),
                                  lambda store, exports: exports["grow"](store, 8),
                                  lambda store, exports: exports["memory"].grow(store, 2),
                                  lambda store, exports: exports["widen"](store)])
def test_an_instance_that_grew_is_replaced(grow):
    sessions = sessions_of()
    for _ in range(3):
        with sessions.get() as (store, instance):
            assert grow(store, check(store, instance)) in (1, 2)
    figures(sessions, handed_out=3, replaced={"resized": 3})
    use(sessions)
    figures(sessions, live=1, idle=1, handed_out=4, replaced={"resized": 3})


@pytest.mark.parametrize("spoil", [lambda store, exports: None, lambda store, exports: exports["grow"](store, 1),
                                   lambda store, exports: store.close()])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_of_the_block_is_raised_unchanged(spoil, kind):
    sessions = sessions_of()
    mine = kind("mine")

    def block():
        with sessions.get() as (store, instance):
            spoil(store, check(store, instance))
            raise mine

    with pytest.raises(kind) as caught:
        block()
    assert caught.value is mine
    assert mine.__context__ is None
    use(sessions)
    assert sessions.stats()["live"] == 1


@pytest.mark.parametrize("kind", [KeyError, pytest.param(KeyboardInterrupt, marks=pytest.mark.skipif(
    WASMTIME < 45, reason="this wasmtime-py crashes the process if a host function raises KeyboardInterrupt"))])
def test_an_exception_of_a_host_function_is_raised_and_the_instance_is_used_again(kind):
    mine = [kind("mine")]       # the store keeps `fails`, which must not keep the frames of the exception

    def fails():
        raise mine[0]

    sessions = sessions_of(imports=calling(fails))
    with pytest.raises(kind) as caught, sessions.get() as (store, instance):
        check(store, instance)["call"](store)
    assert caught.value is mine.pop()
    use(sessions)
    figures(sessions, live=1, idle=1, handed_out=2, reused=1)


def test_a_store_that_the_block_closed_is_replaced():
    sessions = sessions_of()
    with sessions.get() as (store, instance):
        exports = check(store, instance)
        store.close()
        with pytest.raises(ValueError, match="the store is closed"):
            exports["step"](store, 1)
    with sessions.get() as (store, instance), store:        # wasmtime's own `with` closes the store
        check(store, instance)
    figures(sessions, handed_out=2, replaced={"closed": 2})


def test_if_the_system_refuses_the_reset_the_instance_is_replaced():
    sessions = sessions_of()
    use(sessions)
    with counting() as made:
        use(sessions)
    for nth in range(1, made.calls + 1):
        with failing(nth, 12, times=1000):
            use(sessions)
        use(sessions)
    assert sessions.stats()["live"] == 1
    assert set(sessions.stats()["replaced"]) <= {"refused"}


@pytest.mark.parametrize(("kind", "reason"), [
    (MemoryError, "refused"), (RuntimeError, "refused"), (linmem.OwnedError, "refused"), (linmem.PageError, "refused"),
    (TypeError, "refused"), (wasmtime.WasmtimeError, "refused"), (ValueError, "resized"),
    (KeyboardInterrupt, "interrupted"), (SystemExit, "interrupted"), (TimeoutError, "interrupted")])
def test_if_the_reset_raises_the_instance_is_replaced_and_only_an_interrupt_is_passed_on(monkeypatch, kind, reason):
    sessions = sessions_of()
    mine = kind("of the reset")

    def fails(*_):
        raise mine

    session = sessions.get()
    check(*session.__enter__())
    monkeypatch.setattr(Snapshot, "restore", fails)
    if reason == "interrupted":
        with pytest.raises(kind) as caught:
            session.__exit__(None, None, None)
        assert caught.value is mine
    else:
        session.__exit__(None, None, None)
    monkeypatch.undo()
    figures(sessions, handed_out=1, replaced={reason: 1})
    use(sessions)


# -- limits of time and fuel, and other settings of the store ------------------------------------------

METERED = engine_of(consume_fuel=True, epoch_interruption=True)


def limited(store):
    store.set_epoch_deadline(1)
    store.set_fuel(10000)


def test_each_session_begins_with_its_own_fuel_and_deadline():
    sessions = sessions_of(engine=METERED, begin=limited)
    for turn in range(6):
        with sessions.get() as (store, instance):
            assert store.get_fuel() == 10000
            exports = check(store, instance)
            if turn % 2:
                with pytest.raises(wasmtime.Trap, match="all fuel consumed"):
                    exports["spin"](store)
            else:
                METERED.increment_epoch()
                with pytest.raises(wasmtime.Trap, match="interrupt"):
                    exports["spin"](store)
    figures(sessions, live=1, idle=1, handed_out=6, reused=5)


def test_a_session_needs_no_fuel_and_no_deadline_to_begin():
    sessions = sessions_of(engine=METERED)
    for _ in range(2):
        with sessions.get() as (store, instance):
            with pytest.raises(wasmtime.Trap):      # the deadline of a new store has passed
                instance.exports(store)["step"](store, 8)
            limited(store)
            check(store, instance)
        METERED.increment_epoch()


def test_limits_of_the_store_are_set_before_the_instance_is_made():
    def small():
        store = wasmtime.Store(ENGINE)
        store.set_limits(memory_size=PAGE)
        return store

    sessions = sessions_of(store=small)
    for _ in range(3):
        with pytest.raises((wasmtime.WasmtimeError, linmem.GrowError)), sessions.get(timeout=0):
            raise AssertionError
    figures(sessions)

    def enough():
        store = wasmtime.Store(ENGINE)
        store.set_limits(memory_size=3 * PAGE)
        return store

    with sessions_of(store=enough).get() as (store, instance):
        exports = check(store, instance)
        assert exports["grow"](store, 1) == 2
        assert exports["grow"](store, 1) == -1


def test_a_setting_that_a_block_makes_and_begin_does_not_is_not_passed_on():
    sessions = sessions_of(begin=lambda store: store.set_epoch_deadline(1))
    for setter in (lambda store: store.set_limits(memory_size=PAGE),
                   lambda store: store.set_wasi(wasmtime.WasiConfig())):
        with sessions.get() as (store, _):
            setter(store)
    with sessions.get() as (store, instance):
        store.set_epoch_deadline(5)
        assert check(store, instance)["memory"].grow(store, 0) == 2
    figures(sessions, live=1, idle=1, handed_out=3, replaced={"configured": 2})


WASI = """(module (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1) (data (i32.const 0) "\\10\\00\\00\\00\\04\\00\\00\\00") (data (i32.const 16) "said")
  (func (export "say") (result i32) (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))"""


def test_each_session_can_have_its_own_wasi(tmp_path):
    linker = wasmtime.Linker(ENGINE)
    linker.define_wasi()
    names = map(str, itertools.count())

    def configured(store):
        config = wasmtime.WasiConfig()
        config.stdout_file = str(tmp_path / next(names))
        store.set_wasi(config)

    prepared = prepare(ENGINE, WASI)
    store = wasmtime.Store(ENGINE)
    snapshot = Snapshot.take(store, prepared.instantiate(store, linker))
    with Sessions(prepared, linker, start=snapshot, size=1, begin=configured) as sessions:
        for times in (1, 2, 3):
            with sessions.get() as (store, instance):
                for _ in range(times):
                    assert instance.exports(store)["say"](store) == 0
        figures(sessions, live=1, idle=1, handed_out=3, reused=2)
    assert [(tmp_path / name).read_text() for name in "012"] == ["said", "saidsaid", "saidsaidsaid"]


def test_if_begin_raises_the_session_ends_and_the_next_session_is_exact():
    def begin(store):
        if turns.pop():
            raise LookupError("mine")

    turns = [False, True, False, True]
    sessions = sessions_of(begin=begin)
    for _ in range(2):
        with pytest.raises(LookupError, match="mine"), sessions.get(timeout=0):
            raise AssertionError
        use(sessions)
    figures(sessions, live=1, idle=1, handed_out=2, reused=1)


# -- what an earlier user keeps ------------------------------------------------------------------------


def test_a_store_that_is_kept_does_not_reach_the_next_session():
    sessions = sessions_of()
    with sessions.get() as (kept, instance):
        exports = check(kept, instance)
    with sessions.get() as (store, present):
        assert store is not kept
        for call in (lambda: exports["step"](kept, 1), lambda: exports["memory"].read(kept, 0, 8), kept.gc, kept.data,
                     lambda: exports["count"].value(kept), lambda: linear_memory(kept, exports["memory"]),
                     lambda: Snapshot.take(kept, instance), lambda: started()[1].restore(kept, instance),
                     lambda: kept.set_limits(1), lambda: kept.set_epoch_deadline(1), lambda: kept.set_fuel(1),
                     lambda: wasmtime.Instance(kept, started()[0].module, nothing(store))):
            with pytest.raises(ValueError, match="the store is closed"):
                call()
        kept.close()
        kept = exports = None
        gc.collect()
        check(store, present)
    figures(sessions, live=1, idle=1, handed_out=2, reused=1)


def test_what_a_user_sets_on_the_objects_of_a_session_does_not_reach_the_next_session():
    sessions = sessions_of()
    with sessions.get() as (store, instance):
        store.mine = instance.mine = True
        instance._linmem_prepared = None
    with sessions.get() as (store, instance):
        assert not hasattr(store, "mine")
        assert not hasattr(instance, "mine")
        check(store, instance)
    figures(sessions, live=1, idle=1, handed_out=2, reused=1)


@pytest.mark.parametrize("keep", [lambda memory: memory, memoryview, lambda memory: memory.view("i4")])
def test_a_memory_that_is_kept_stays_with_its_user_and_the_instance_is_replaced(keep):
    sessions = sessions_of()
    use(sessions)
    with sessions.get() as (store, instance):
        exports = check(store, instance)
        kept = keep(linear_memory(store, exports["memory"]))
    figures(sessions, handed_out=2, reused=1, replaced={"kept": 1})
    before = bytes(kept[:16])
    with sessions.get() as (store, instance):
        exports = check(store, instance)
        exports["memory"].write(store, b"secret of another", 0)
        assert bytes(kept[:16]) == before
        kept[0] = 1
        assert exports["memory"].read(store, 0, 6) == b"secret"
    figures(sessions, live=1, idle=1, handed_out=3, reused=1, replaced={"kept": 1})


def test_a_memory_that_is_closed_in_the_block_does_not_cause_a_replacement():
    sessions = sessions_of()
    for _ in range(3):
        with (sessions.get() as (store, instance),
              linear_memory(store, check(store, instance)["memory"]) as memory, memoryview(memory) as view):
            view[0] = 1
    figures(sessions, live=1, idle=1, handed_out=3, reused=2)


def test_a_memory_in_the_traceback_of_an_exception_counts_as_kept():
    sessions = sessions_of()

    def fails(store, exports):
        view = memoryview(linear_memory(store, exports["memory"]))
        raise LookupError(view[0])

    with pytest.raises(LookupError) as caught, sessions.get() as (store, instance):
        fails(store, check(store, instance))
    figures(sessions, handed_out=1, replaced={"kept": 1})
    del caught


def test_a_host_function_may_keep_a_memory_that_it_gives_to_the_guest():
    prepared = prepare(ENGINE, '(module (import "e" "m" (memory 1)) (export "m" (memory 0)))')
    kept = []

    def imports(store):
        memory = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
        kept.append(linear_memory(store, memory))
        return [memory]

    store = wasmtime.Store(ENGINE)
    instance = prepared.instantiate(store, imports(store))
    kept.pop()[:5] = b"taken"
    sessions = Sessions(prepared, imports, start=Snapshot.take(store, instance), size=1)
    for _ in range(3):
        with sessions.get() as (store, instance):
            assert kept[0][:5] == b"taken"
            instance.exports(store)["m"].write(store, b"tenant")
            assert kept[0][:6] == b"tenant"
    figures(sessions, live=1, idle=1, handed_out=3, reused=2)


# -- sessions that end during a call -------------------------------------------------------------------


def test_a_session_that_ends_while_another_thread_runs_in_its_store_stays_in_use_until_that_call_ends():
    inside, go = threading.Event(), threading.Event()
    results = []

    def waits():
        inside.set()
        assert go.wait(60)

    sessions = sessions_of(imports=calling(waits))
    with sessions.get() as (store, instance):
        exports = check(store, instance)
        call = exports["call"]
        thread = threading.Thread(target=lambda: results.append(call(store)))
        thread.start()
        assert inside.wait(60)
    figures(sessions, live=1, in_use=1, handed_out=1)
    with pytest.raises(TimeoutError, match=r"all 1 sessions are in use.*within timeout=0.1 seconds"):
        sessions.get(timeout=0.1).__enter__()
    with pytest.raises(ValueError, match="the store is closed"):
        call(store)
    waiting = threading.Thread(target=use, args=[sessions])
    waiting.start()
    wait_until(lambda: sessions.stats()["waiting"])
    go.set()
    thread.join(60)
    waiting.join(60)
    assert results == [None]
    figures(sessions, live=1, idle=1, handed_out=2, replaced={"running": 1})


def test_a_block_that_ends_on_another_thread_than_it_began_gives_its_instance_back():
    """As in a generator that several threads continue. Without a GIL, objects of a thread that lives are freed later.
    """
    def begin(session):
        check(*session.__enter__())
        begun.set()
        assert ended.wait(60)

    sessions = sessions_of()
    for _ in range(3):
        session, begun, ended = sessions.get(), threading.Event(), threading.Event()
        thread = threading.Thread(target=begin, args=[session])
        thread.start()
        assert begun.wait(60)
        session.__exit__(None, None, None)
        found = sessions.stats()
        ended.set()
        thread.join(60)
        assert (found["idle"], found["in_use"], found["replaced"]) == (1, 0, {})
    figures(sessions, live=1, idle=1, handed_out=3, reused=2)


@pytest.mark.parametrize("close_store", [False, True])
def test_a_session_that_ends_in_a_host_function_of_its_own_call_is_replaced_when_the_call_ends(close_store):
    def ends():
        if close_store:
            session_store.close()
        session.__exit__(None, None, None)
        seen.append(sessions.stats())

    seen = []
    sessions = sessions_of(imports=calling(ends))
    session = sessions.get()
    session_store, instance = session.__enter__()
    instance.exports(session_store)["call"](session_store)
    assert [(each["live"], each["in_use"]) for each in seen] == [(1, 1)]
    figures(sessions, handed_out=1, replaced={"running": 1})
    use(sessions)
    sessions.close()        # the host function, which the store keeps, refers to them


# -- bounds and waits ----------------------------------------------------------------------------------


def test_at_most_size_instances_live_and_those_who_wait_are_served_in_order():
    sessions = sessions_of(2)
    order = []

    def waits(number):
        with sessions.get() as (store, instance):
            order.append(number)
            check(store, instance)

    threads = [threading.Thread(target=waits, args=[number]) for number in range(6)]
    with sessions.get(), sessions.get():
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(lambda number=number: sessions.stats()["waiting"] == number + 1)
        figures(sessions, live=2, in_use=2, waiting=6, handed_out=2)
        with pytest.raises(TimeoutError):
            sessions.get(timeout=0).__enter__()
        figures(sessions, live=2, in_use=2, waiting=6, handed_out=2)
        session = sessions.get(1e-9)
        with pytest.raises(TimeoutError):
            session.__enter__()
    for thread in threads:
        thread.join(60)
    assert sorted(order) == list(range(6))
    assert order[0] in (0, 1)
    figures(sessions, live=2, idle=2, handed_out=8, reused=6)
    with session as (store, instance):      # a session that did not begin may be tried again
        check(store, instance)


def test_with_one_instance_the_threads_are_served_in_exactly_the_order_of_their_arrival():
    sessions = sessions_of()
    order = []

    def waits(number):
        with sessions.get():
            order.append(number)

    threads = [threading.Thread(target=waits, args=[number]) for number in range(6)]
    with sessions.get():
        for number, thread in enumerate(threads):
            thread.start()
            wait_until(lambda number=number: sessions.stats()["waiting"] == number + 1)
    for thread in threads:
        thread.join(60)
    assert order == list(range(6))


def test_a_thread_that_has_all_sessions_is_refused_another_without_a_timeout():
    sessions = sessions_of(2)
    with sessions.get() as (store, instance):
        with sessions.get():
            with pytest.raises(RuntimeError, match="this thread itself has all 2 sessions"):
                sessions.get().__enter__()
            with pytest.raises(TimeoutError):
                sessions.get(0.01).__enter__()
        check(store, instance)
        use(sessions)
    figures(sessions, live=2, idle=2, handed_out=3, reused=1)


def test_a_session_object_begins_only_once():
    sessions = sessions_of(2)
    session = sessions.get()
    with session, pytest.raises(RuntimeError, match="has begun already"):
        session.__enter__()
    with pytest.raises(RuntimeError, match="has begun already"):
        session.__enter__()
    session.__exit__(None, None, None)
    figures(sessions, live=1, idle=1, handed_out=1)


def test_of_two_threads_that_begin_one_session_object_one_is_refused():
    def begin():
        try:
            session.__enter__()
        except RuntimeError:
            return
        begun.append(session)

    for meanwhile in each_instruction(source._Session.__enter__):
        sessions = sessions_of(2)
        session, begun = sessions.get(), []
        with meanwhile(begin):
            begin()
        assert begun == [session]
        session.__exit__(None, None, None)
        figures(sessions, live=1, idle=1, handed_out=1)
        sessions.close()


def test_a_session_object_whose_wait_was_in_vain_may_begin_later():
    sessions = sessions_of()
    session = sessions.get(timeout=0)
    with sessions.get(), pytest.raises(TimeoutError):
        session.__enter__()
    with session as (store, instance):
        check(store, instance)
    figures(sessions, live=1, idle=1, handed_out=2, reused=1)


def test_a_session_whose_block_never_ends_is_given_back_when_it_is_collected():
    sessions = sessions_of()

    def uses():
        with sessions.get() as (store, instance):
            yield check(store, instance)

    generator = uses()
    next(generator)
    del generator
    gc.collect()
    use(sessions)
    session = sessions.get()
    check(*session.__enter__())
    del session
    gc.collect()
    use(sessions)
    figures(sessions, live=1, idle=1, handed_out=4, reused=3)


@requires("interrupts")
def test_ctrl_c_ends_a_wait():
    assert answer("""
        import signal, sys, threading, time
        sys.path.insert(0, TESTS)
        from test_sessions import sessions_of, use
        sessions = sessions_of()
        release = threading.Event()
        def holds():
            with sessions.get():
                release.wait(60)
        thread = threading.Thread(target=holds)
        thread.start()
        def interrupts():
            while not sessions.stats()["waiting"]:
                time.sleep(0.001)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        threading.Thread(target=interrupts).start()
        while not sessions.stats()["in_use"]:
            time.sleep(0.001)
        try:
            with sessions.get():
                print("got")
        except KeyboardInterrupt:
            assert sessions.stats()["waiting"] == 0
            release.set()
            thread.join()
            use(sessions)
            print(sessions.stats()["live"])
        """.replace("TESTS", repr(os.path.dirname(__file__))), timeout=60) == "1"


def test_closed_sessions_refuse_those_who_wait_and_close_stores_in_use_at_the_end_of_their_session():
    sessions = sessions_of(2)
    raised = []

    def waits():
        try:
            sessions.get().__enter__()
        except ValueError as error:
            raised.append(str(error))

    threads = [threading.Thread(target=waits) for _ in range(3)]
    with sessions.get() as (store, instance):
        with sessions.get():
            for thread in threads:
                thread.start()
            wait_until(lambda: sessions.stats()["waiting"] == 3)
            sessions.close()
            for thread in threads:
                thread.join(60)
        check(store, instance)
        figures(sessions, live=1, in_use=1, handed_out=2)
    assert raised == ["the sessions are closed"] * 3
    figures(sessions, handed_out=2)
    with pytest.raises(ValueError, match="the sessions are closed"):
        sessions.get().__enter__()
    sessions.close()
    assert repr(sessions) == "<linmem.wasmtime.Sessions: closed>"


def test_no_wait_outlives_a_close_that_was_interrupted():
    nth, happened = 0, True
    while happened:
        nth += 1
        sessions, ended = sessions_of(size=1), []

        def wait(sessions=sessions, ended=ended):
            with pytest.raises(ValueError, match="the sessions are closed"), sessions.get():
                pass
            ended.append(True)

        with sessions.get():
            thread = threading.Thread(target=wait, daemon=True)
            thread.start()
            while not sessions.stats()["waiting"]:
                time.sleep(0.001)
            with Interrupting(nth, source.__file__) as interrupting, contextlib.suppress(Interrupt):
                sessions.close()
            happened = interrupting.place is not None
            sessions.close()
            thread.join(60)
            assert ended, interrupting.place
    assert nth > 5


@pytest.mark.parametrize(("size", "waits"), [(1, False), (2, False), (1, True)])
def test_at_any_instruction_of_a_session_the_one_instance_is_either_idle_or_in_use(size, waits):
    def ask():
        found = sessions.stats()
        if found["live"] != 1 or found["idle"] + found["in_use"] != 1:
            wrong.append(found)

    sessions, wrong = sessions_of(size), []
    use(sessions)
    every = [each for kind in (Sessions, source._Session) for each in vars(kind).values() if callable(each)]
    for meanwhile in each_instruction(*every):
        waiter = threading.Thread(target=use, args=[sessions])
        with meanwhile(ask, sessions._lock), sessions.get() as (store, instance):
            check(store, instance)
            if waits:
                waiter.start()
                wait_until(lambda: len(sessions._waiting))
        if waits:
            waiter.join(60)
    assert wrong == []


def test_two_threads_may_close_the_sessions_at_the_same_time():
    for meanwhile in each_instruction(Sessions.close):
        sessions = sessions_of()
        use(sessions)
        with meanwhile(sessions.close, sessions._lock):
            sessions.close()
        figures(sessions, handed_out=1)


@requires("maps")
def test_closed_and_collected_sessions_give_back_their_address_space():
    gc.collect()
    before = live_bytes()
    with sessions_of(2) as sessions:
        with sessions.get(), sessions.get():
            pass
        assert live_bytes() > before
    assert live_bytes() == before
    sessions = sessions_of(2)
    with sessions.get():
        use(sessions)
    del sessions
    gc.collect()
    assert live_bytes() == before


# -- threads, asyncio and fork -------------------------------------------------------------------------


def test_eight_threads_share_three_instances():
    sessions = sessions_of(3)
    users = threading.Semaphore(3)
    errors = []

    def work(seed):
        try:
            for turn in range(40):
                with sessions.get(timeout=60) as (store, instance):
                    assert users.acquire(blocking=False), "more than three sessions at the same time"
                    try:
                        exports = check(store, instance)
                        if (turn + seed) % 7 == 0:
                            exports["grow"](store, 1)
                        elif (turn + seed) % 7 == 1:
                            with pytest.raises(wasmtime.Trap):
                                exports["fail"](store)
                        elif (turn + seed) % 7 == 2:
                            store.close()
                    finally:
                        users.release()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    stats = sessions.stats()
    grown = sum((turn + seed) % 7 == 0 for turn in range(40) for seed in range(8))
    closed = sum((turn + seed) % 7 == 2 for turn in range(40) for seed in range(8))
    assert stats["replaced"] == {"resized": grown, "closed": closed}
    assert stats["handed_out"] == 320
    assert stats["handed_out"] - stats["reused"] == stats["live"] + grown + closed
    assert (stats["in_use"], stats["waiting"]) == (0, 0)
    assert stats["live"] == stats["idle"] <= 3


def test_sessions_serve_asyncio_in_an_executor():
    sessions = sessions_of(2)

    def request(number):
        with sessions.get(timeout=60) as (store, instance):
            exports = check(store, instance)
            exports["step"](store, number)
            return exports["memory"].read(store, number, number + 1)[0]

    async def serve():
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*[loop.run_in_executor(None, request, number) for number in range(100, 140)])

    assert asyncio.run(serve()) == [104] * 40
    assert sessions.stats()["handed_out"] == 40
    assert sessions.stats()["live"] <= 2


@requires("fork")
def test_a_forked_child_has_its_sessions_and_not_those_that_other_threads_have_or_wait_for():
    assert answer(FORKING + textwrap.dedent("""
        sys.path.insert(0, TESTS)
        import time
        from test_sessions import check, figures, sessions_of, use, wait_until
        sessions = sessions_of(3)
        release = threading.Event()
        def holds():
            with sessions.get() as (store, instance):
                check(store, instance)
                release.wait(60)
        holder = threading.Thread(target=holds)
        holder.start()
        wait_until(lambda: sessions.stats()["handed_out"] == 1)
        first, second = sessions.get(), sessions.get()
        kept, other = first.__enter__(), second.__enter__()
        waiter = threading.Thread(target=use, args=[sessions])
        waiter.start()
        wait_until(lambda: sessions.stats()["waiting"])
        def work():
            figures(sessions, live=2, in_use=2, handed_out=3)
            use(sessions)
            figures(sessions, live=3, in_use=2, idle=1, handed_out=4)
            check(*kept)
            first.__exit__(None, None, None)
            use(sessions)
            use(sessions)
            with sessions.get() as third, sessions.get() as fourth:
                check(*third)
                check(*fourth)
                check(*other)
            threads = [threading.Thread(target=use, args=[sessions]) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            figures(sessions, live=3, in_use=1, idle=2, handed_out=12, reused=8)
        child(os.fork, work)
        child(os.fork, work)
        check(*kept)
        for session in (first, second):
            session.__exit__(None, None, None)
        release.set()
        holder.join(60)
        waiter.join(60)
        figures(sessions, live=3, idle=3, handed_out=4, reused=1)
        print("done")
        """).replace("TESTS", repr(os.path.dirname(__file__)))) == "done"


# -- what a snapshot cannot hold, and wrong arguments ---------------------------------------------------


def test_if_the_snapshot_does_not_hold_all_state_each_instance_is_used_once():
    prepared = prepare(ENGINE, """(module (memory (export "memory") 1) (global $hidden (mut i32) (i32.const 1))
        (func (export "next") (result i32)
          (global.set $hidden (i32.add (global.get $hidden) (i32.const 1))) (global.get $hidden)))""")
    store = wasmtime.Store(ENGINE)
    snapshot = Snapshot.take(store, prepared.instantiate(store), partial=True)
    sessions = Sessions(prepared, start=snapshot, size=1)
    for _ in range(3):
        with sessions.get() as (store, instance):
            assert instance.exports(store)["next"](store) == 2
    figures(sessions, handed_out=3, replaced={"unseen": 3})


SHARED = "memory 1 2 shared"


def test_an_instance_with_a_shared_memory_is_used_once():
    prepared = prepare(ENGINE, f'(module ({SHARED}) (export "memory" (memory 0)))')
    store = wasmtime.Store(ENGINE)
    sessions = Sessions(prepared, start=Snapshot.take(store, prepared.instantiate(store)), size=1)
    with sessions.get() as (store, instance):
        kept = instance.exports(store)["memory"]
    figures(sessions, handed_out=1, replaced={"shared": 1})
    kept.data_ptr()[0] = 7
    with sessions.get() as (store, instance):
        assert instance.exports(store)["memory"].data_ptr()[0] == 0


@needs_gc
def test_a_user_who_fills_the_gc_heap_leaves_the_next_users_a_whole_heap():
    config = wasmtime.Config()
    config.gc_support = config.wasm_function_references = config.wasm_gc = True
    linmem.wasmtime.install(config, linmem.LimitingCreator(linmem.creator("mmap"), 16 * PAGE))
    engine = wasmtime.Engine(config)
    prepared = prepare(engine, f"""(module
        (type $bytes (array i8)) (type $pair (struct (field (mut (ref null $pair))) (field (ref $bytes))))
        (memory (export "memory") 1)
        (func (export "circle") (local $pair (ref $pair))
          (local.set $pair (struct.new $pair (ref.null $pair) (array.new_default $bytes (i32.const {4 * PAGE}))))
          (struct.set $pair 0 (local.get $pair) (local.get $pair))))""", expose=True)
    store = wasmtime.Store(engine)
    snapshot = Snapshot.take(store, prepared.instantiate(store))
    store.close()
    sessions = Sessions(prepared, start=snapshot, size=1)
    for _ in range(20):
        with sessions.get() as (store, instance):
            instance.exports(store)["circle"](store)
    figures(sessions, handed_out=20, replaced={"objects": 20})


@pytest.mark.parametrize("types", [93, 94, 95, 96])
def test_an_instance_without_objects_is_used_again(types):
    """The number of types is the first byte of the section; 94 and 95 also begin the types of arrays and structures."""
    parameters = [format(n, "07b").replace("0", "i32 ").replace("1", "i64 ") for n in range(types)]
    prepared = prepare(ENGINE, f"""(module {''.join(f'(type (func (param {each})))' for each in parameters)}
        (memory (export "memory") 1))""", expose=True)
    store = wasmtime.Store(ENGINE)
    sessions = Sessions(prepared, start=Snapshot.take(store, prepared.instantiate(store)), size=1)
    for _ in range(2):
        with sessions.get():
            pass
    figures(sessions, live=1, idle=1, handed_out=2, reused=1)


def test_a_module_that_imports_a_shared_memory_is_refused():
    prepared = prepare(ENGINE, f'(module (import "e" "m" ({SHARED})) (export "memory" (memory 0)))')
    store = wasmtime.Store(ENGINE)
    linker = wasmtime.Linker(ENGINE)
    module = wasmtime.Module(ENGINE, f'(module ({SHARED}) (export "m" (memory 0)))')
    linker.define_instance(store, "e", wasmtime.Instance(store, module, []))
    snapshot = Snapshot.take(store, prepared.instantiate(store, linker))
    with pytest.raises(ValueError, match=r"prepared must be a module without an imported shared memory.*'e' 'm'"):
        Sessions(prepared, linker, start=snapshot, size=1)


def test_imports_of_one_store_are_refused():
    prepared, snapshot = started()
    store = wasmtime.Store(ENGINE)
    with pytest.raises(ValueError, match=r"imports must be empty, a wasmtime\.Linker or a callable"):
        Sessions(prepared, nothing(store), start=snapshot, size=1)
    linker = wasmtime.Linker(ENGINE)
    linker.define(store, "host", "call", nothing(store)[0])
    sessions = Sessions(prepared, linker, start=snapshot, size=1)
    for _ in range(2):
        with pytest.raises(wasmtime.WasmtimeError, match="cross-`Store`"), sessions.get(0):
            raise AssertionError
    figures(sessions)


def test_a_linker_of_host_functions_serves_every_store():
    prepared, snapshot = started()
    linker = wasmtime.Linker(ENGINE)
    calls = []
    linker.define_func("host", "call", wasmtime.FuncType([], []), lambda: calls.append(1))
    sessions = Sessions(prepared, linker, start=snapshot, size=2)
    with sessions.get() as first, sessions.get() as second:
        for store, instance in (first, second):
            check(store, instance)["call"](store)
    assert calls == [1, 1]
    figures(sessions, live=2, idle=2, handed_out=2)


ANY = []


@pytest.mark.parametrize(("make", "kind", "text"), [
    (lambda: None, TypeError, "store must return a wasmtime.Store, got NoneType"),
    (lambda: 1 // 0, ZeroDivisionError, "division"),
    (lambda: ANY[0], ValueError, "store must return a new wasmtime.Store at each call, got one that has an instance")])
@pytest.mark.parametrize("lent", [False, True])
def test_a_store_callable_that_fails_or_returns_no_new_store_is_refused(make, kind, text, lent):
    seen = []
    others = sessions_of(imports=lambda store: seen.append(store) or nothing(store))
    with others.get() as (store, _):
        ANY[:] = [store if lent else seen[0]]
        sessions = sessions_of(2, store=make)
        with pytest.raises(kind, match=text):
            sessions.get(0).__enter__()
        figures(sessions)
    figures(others, live=1, idle=1, handed_out=1)
    use(others)


def test_imports_that_fail_leave_no_store():
    def fails(store):
        stores.append(store)
        raise LookupError("mine")

    stores = []
    sessions = sessions_of(imports=fails)
    for _ in range(3):
        with pytest.raises(LookupError, match="mine"), sessions.get(0):
            raise AssertionError
    figures(sessions)
    for store in stores:
        with pytest.raises(ValueError, match="already closed"):
            store.gc()


def test_a_snapshot_of_another_module_is_refused():
    prepared = prepare(ENGINE, GUEST.replace("100", "200"))
    with pytest.raises(ValueError, match="start is a snapshot of the module"):
        Sessions(prepared, nothing, start=started()[1], size=1)


def test_sessions_cannot_be_copied():
    for call in (copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            call(sessions_of())


# -- growth of the process -----------------------------------------------------------------------------


class Allocated(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]


def allocated():
    """Bytes that malloc gave out."""
    gc.collect()
    LIBC.mallinfo2.restype = Allocated
    found = LIBC.mallinfo2()
    return found.uordblks + found.hblkhd


@requires("mallinfo", "maps", "descriptors")
@pytest.mark.parametrize("grow", [0, 1])
def test_a_thousand_sessions_leave_nothing_behind(grow):
    def capturing(store):
        return [wasmtime.Func(store, wasmtime.FuncType([], []), lambda: store)]

    sessions = sessions_of(2, imports=capturing)

    def rounds(number):
        for _ in range(number):
            with sessions.get() as (store, instance):
                exports = check(store, instance)
                with linear_memory(store, exports["memory"]) as memory:
                    memory[0] = 1
                with pytest.raises(wasmtime.Trap):
                    exports["fail"](store)
                exports["grow"](store, grow)

    rounds(100)
    before = live_bytes(), descriptors(), len(mappings())
    bytes_before = allocated()
    rounds(1000)
    assert allocated() - bytes_before < 50000       # a wasmtime global in each session would take more
    assert (live_bytes(), descriptors()) == before[:2]
    assert len(mappings()) <= before[2] + 20        # malloc's and Python's own
    stats = sessions.stats()
    assert stats["live"] == 1 - grow
    assert stats["replaced"] == ({"resized": 1100} if grow else {})


# -- interrupts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Interrupt, TimeoutError])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("grow", [0, 1])
def test_an_interrupt_anywhere_loses_no_session_and_spoils_no_session(used, grow, kind):
    happened, nth = True, 0
    while happened:
        nth += 1
        sessions = sessions_of()
        if used:
            use(sessions)
        happened = False
        try:
            with Interrupting(nth, source.__file__, error=kind) as interrupting, \
                    sessions.get(timeout=1) as (store, instance):
                exports = check(store, instance)
                exports["grow"](store, grow)
        except kind:
            happened = True
        assert happened == (interrupting.place is not None)
        store = instance = exports = None
        gc.collect(0)
        assert sessions.stats()["in_use"] == 0, nth
        use(sessions)
        figures = sessions.stats()
        assert figures["live"] == figures["idle"] == 1
        sessions.close()
    assert nth > 10
