"""Instances of generated modules go on in another process as the original goes on."""

import random

import pytest
import wasmtime
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import fewer_examples, new_process
from test_guests import KNOWN, Program, guests
from test_guests import Guest as GeneratedGuest
from test_prepare import engine_of
from test_start import Guest, Machine

from linmem.wasmtime import Snapshot, prepare

KINDS = ("mmap", "pool", "limited pool")


def imports_of(store, kinds):
    return [kind.made(store, ours=True) for kind in kinds if kind.imported]


def goes_on(store, exports, program):
    """The results and traps of a program, and then the sizes and contents of the memories."""
    seen = program.run(store, exports)
    return seen + [(exports[f"size {index}"](store), exports[f"hash {index}"](store))
                   for index in range(len(program.guest.kinds))]


def serve(connection):
    """In the other process: starts an instance from a file for each request, and sends how it goes on."""
    engines = {kind: engine_of(kind) for kind in KINDS}
    while (request := connection.recv()) is not None:
        path, wat, kind, what, rest = request
        engine = engines[kind]
        store = wasmtime.Store(engine)
        try:
            snapshot, prepared = Snapshot.open(path, verify=True), prepare(engine, wat, expose=True)
            if isinstance(what, Machine):
                found = what.run(Guest(prepared, store=store, start=snapshot), rest)
            else:
                program = Program(what)
                program.fixed = rest
                instance = prepared.instantiate(store, imports_of(store, what.kinds), start=snapshot)
                found = goes_on(store, instance.exports(store), program)
        except Exception as error:
            found = repr(error)
        store.close()
        connection.send(found)


@pytest.fixture(scope="module")
def elsewhere():
    """Sends a request to the other process, and returns the answer."""
    with new_process(serve) as there:
        def ask(*request):
            there.send(request)
            assert there.poll(120)
            return there.recv()

        yield ask
        there.send(None)


alike = settings(fewer_examples(4), suppress_health_check=[HealthCheck.function_scoped_fixture])


def new_file(folder):
    """A new name for each snapshot: Windows replaces no file that the other process has mapped."""
    return folder / str(sum(1 for _ in folder.iterdir()))


def test_generated_memories_go_on_in_another_process_as_the_original_goes_on(elsewhere, tmp_path):
    engine, seen = engine_of(), set()

    @alike
    @given(guests(), st.integers(0, 40), st.sampled_from(KINDS))
    @example(KNOWN, 4, "mmap")
    def check(guest, take, kind):
        store = wasmtime.Store(engine)
        try:
            instance = prepare(engine, guest.wat, expose=True).instantiate(store, imports_of(store, guest.kinds))
        except (wasmtime.Trap, wasmtime.WasmtimeError):
            return
        calls = [call for call in guest.calls if not call[0].startswith("drop ")]     # what was dropped is not held
        exports = instance.exports(store)
        Program(GeneratedGuest(guest.wat, guest.kinds, calls[:take])).run(store, exports)
        path = new_file(tmp_path)
        Snapshot.take(store, instance).save(path, packed=kind == "pool")
        program = Program(GeneratedGuest(guest.wat, guest.kinds, calls[take:]))
        expected = goes_on(store, exports, program)
        assert elsewhere(path, guest.wat, kind, program.guest, program.fixed) == expected
        store.close()
        seen.add(bool(expected))

    check()
    assert True in seen


def test_generated_tables_and_globals_go_on_in_another_process_as_the_original_goes_on(elsewhere, tmp_path):
    engine, seen = engine_of(), set()

    @alike
    @given(st.integers(0, 2**32), st.integers(0, 30), st.sampled_from(KINDS))
    def check(seed, take, kind):
        machine = Machine(random.Random(seed))
        guest = Guest(prepare(engine, machine.wat, expose=True), engine)
        machine.run(guest, machine.program(take))
        path = new_file(tmp_path)
        guest.take().save(path)
        rest = machine.program(30)
        expected = machine.run(guest, rest)
        assert elsewhere(path, machine.wat, kind, machine, rest) == expected
        seen.update(expected[0])

    check()
    assert {"10", "15"} <= seen
