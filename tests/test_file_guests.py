"""WebAssembly guests whose memory is a file: what they find at the start, how they grow, and what a crash leaves."""

import os
import signal
import subprocess
import sys

import pytest
from support import PAGE, ROOT, answer, file_requires, requires, start_child

import linmem

file_requires("file_memories")
wasmtime = pytest.importorskip("wasmtime")

WASM_PAGE = 65536
WAT = """
(module
  (memory (export "memory") 2 100)
  (global $calls (export "calls") (mut i32) (i32.const 0))
  (data (i32.const 16) "data")
  (func (export "_initialize") (global.set $calls (i32.const 40)))
  (func (export "count") (result i32)
    (global.set $calls (i32.add (global.get $calls) (i32.const 1)))
    (i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (i32.const 1)))
    (i32.load (i32.const 0)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "size") (result i32) (memory.size))
  (func (export "load") (param i32) (result i32) (i32.load (local.get 0)))
  (func (export "fill") (param i32 i32) (memory.fill (local.get 0) (i32.const 65) (local.get 1))))
"""


@pytest.fixture(scope="module")
def engine():
    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.MmapCreator())
    return wasmtime.Engine(config)


@pytest.fixture(scope="module")
def prepared(engine):
    return linmem.wasmtime.prepare(engine, WAT)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "guest.memory"


class Guest:
    """A guest with its memory in the file."""

    def __init__(self, engine, path, prepared=None, **options):
        self.store = wasmtime.Store(engine)
        creator = linmem.creator("file", path=path)
        if prepared is None:
            with linmem.wasmtime.use(creator):
                self.instance = wasmtime.Instance(self.store, wasmtime.Module(engine, WAT), [])
        else:
            self.instance = prepared.instantiate(self.store, creator=creator, **options)
        self.memory = linmem.wasmtime.linear_memory(self.store, self.instance.exports(self.store)["memory"])

    def __getattr__(self, name):
        return lambda *arguments: self.instance.exports(self.store)[name](self.store, *arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.memory.close()
        self.store.close()


def test_a_guest_finds_its_bytes_and_its_size_again(engine, prepared, path):
    with Guest(engine, path, prepared) as guest:
        assert (guest.count(), guest.memory.info().kind, path.stat().st_size) == (1, "file", 2 * WASM_PAGE)
        guest.memory.write(16, b"DATA")
        assert (guest.grow(3), path.stat().st_size) == (2, 5 * WASM_PAGE)
        guest.fill(5 * WASM_PAGE - 3, 3)
    with Guest(engine, path, prepared) as guest:
        assert (guest.count(), guest.size(), guest.memory.read(16, 4)) == (2, 5, b"DATA")
        assert guest.load(5 * WASM_PAGE - 4) == 0x41414100
        assert guest.grow(1) == 5
    assert path.read_bytes()[5 * WASM_PAGE:].count(0) == WASM_PAGE


def test_the_data_segments_of_a_module_that_was_not_prepared_are_copied_over_the_file(engine, path):
    with Guest(engine, path) as guest:
        guest.count()
        guest.memory.write(16, b"DATA")
    with Guest(engine, path) as guest:
        assert (guest.count(), guest.memory.read(16, 4)) == (2, b"data")


def test_a_file_that_is_no_multiple_of_a_wasm_page_grows_to_one(engine, prepared, path):
    path.write_bytes(b"\x05" + bytes(3 * WASM_PAGE))
    with Guest(engine, path, prepared) as guest:
        assert (guest.size(), guest.count(), path.stat().st_size) == (4, 6, 4 * WASM_PAGE)


def test_a_file_that_is_larger_than_the_maximum_of_the_module_is_refused(engine, prepared, path):
    with path.open("wb") as file:
        file.truncate(101 * WASM_PAGE)
    with pytest.raises(wasmtime.WasmtimeError, match="maximum must be >= the size of the file"):
        Guest(engine, path, prepared)
    assert path.stat().st_size == 101 * WASM_PAGE


def test_a_second_guest_of_the_same_file_is_refused_with_the_cause(engine, prepared, path):
    with Guest(engine, path, prepared) as guest:
        with pytest.raises(wasmtime.WasmtimeError, match="has a writer already") as refused:
            Guest(engine, path, prepared)
        assert isinstance(linmem.wasmtime.cause(refused.value), BlockingIOError)
        assert guest.count() == 1
    Guest(engine, path, prepared).__exit__()


@pytest.mark.parametrize("call", ["load", "fill"])
def test_an_access_past_the_end_traps_exactly_also_in_bulk_instructions(engine, prepared, path, call):
    with Guest(engine, path, prepared) as guest:
        for end in (2 * WASM_PAGE, 3 * WASM_PAGE):
            arguments = (end - 3,) if call == "load" else (end - 3, 4)
            with pytest.raises(wasmtime.Trap, match="out of bounds"):
                getattr(guest, call)(*arguments)
            assert guest.grow(1) == end // WASM_PAGE
            getattr(guest, call)(*arguments)


def test_the_growth_of_a_guest_fails_if_another_program_changed_the_size_and_nothing_is_lost(engine, prepared, path):
    with Guest(engine, path, prepared) as guest:
        with path.open("ab") as file:
            file.write(b"appended")
        assert (guest.size(), guest.grow(1), len(guest.memory)) == (2, 0xFFFFFFFF - (1 << 32), 2 * WASM_PAGE)
        os.truncate(path, 2 * WASM_PAGE)
        assert (guest.grow(1), guest.size(), guest.count()) == (2, 3, 1)


@requires("rlimits")
def test_a_growth_that_the_os_refuses_is_minus_one_in_the_guest(path):
    assert answer(f"""
        import linmem, linmem.wasmtime, wasmtime
        config = wasmtime.Config()
        linmem.wasmtime.install(config, linmem.creator("file", path={str(path)!r}))
        engine = wasmtime.Engine(config)
        store = wasmtime.Store(engine)
        guest = wasmtime.Instance(store, wasmtime.Module(engine, {WAT!r}), []).exports(store)
        print(guest["grow"](store, 1), guest["grow"](store, 1), guest["size"](store))
        """, limits={"RLIMIT_FSIZE": 3 * WASM_PAGE}) == "2 -1 3"
    assert path.stat().st_size == 3 * WASM_PAGE


# -- snapshots beside the file -----------------------------------------------------------------------------


def snapshot_of(engine, prepared, pages=0):
    store = wasmtime.Store(engine)
    instance = prepared.instantiate(store)
    parts = instance.exports(store)
    parts["_initialize"](store)
    parts["count"](store)
    if pages:
        parts["grow"](store, pages)
    snapshot = linmem.wasmtime.Snapshot.take(store, instance)
    store.close()
    return snapshot


@pytest.mark.parametrize("pages", [0, 2])
def test_a_start_takes_globals_from_the_snapshot_and_the_bytes_from_an_old_file(engine, prepared, path, pages):
    snapshot = snapshot_of(engine, prepared, pages)
    with Guest(engine, path, prepared, start=snapshot) as guest:
        assert (guest.count(), guest.size(), guest.memory.read(16, 4)) == (2, 2 + pages, b"data")
        assert guest.instance.exports(guest.store)["calls"].value(guest.store) == 42
        guest.memory.write(16, b"DATA")
    for size in (2 + pages, 5 + pages):
        with Guest(engine, path, prepared, start=snapshot) as guest:
            assert (guest.size(), guest.memory.read(16, 4)) == (size, b"DATA")
            assert guest.instance.exports(guest.store)["calls"].value(guest.store) == 41
            with pytest.raises(wasmtime.Trap):
                guest.load(size * WASM_PAGE)
            if size == 2 + pages:
                assert guest.grow(3) == size
    assert path.stat().st_size == (5 + pages) * WASM_PAGE


def test_a_start_does_not_write_the_snapshot_over_the_file_of_an_imported_memory(engine, path):
    text = WAT.replace('(memory (export "memory") 2 100)',
                       '(import "m" "m" (memory 2 100)) (export "memory" (memory 0))')
    prepared = linmem.wasmtime.prepare(engine, text)
    store = wasmtime.Store(engine)
    kind = wasmtime.MemoryType(wasmtime.Limits(2, 100))
    memory = linmem.wasmtime.new_memory(store, kind, creator=linmem.creator("file", path=path))
    instance = prepared.instantiate(store, [memory])
    snapshot = linmem.wasmtime.Snapshot.take(store, instance)
    instance.exports(store)["count"](store)
    with pytest.raises(ValueError, match="is a file's"):
        prepared.instantiate(store, [memory], start=snapshot)
    assert path.read_bytes()[0] == 1
    store.close()


# -- the example -------------------------------------------------------------------------------------------

EXAMPLE = ROOT / "examples" / "persistent_guest.py"


def run_example(*arguments):
    done = subprocess.run([sys.executable, EXAMPLE, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@requires("sources")
def test_the_example_keeps_its_notes_also_when_it_is_killed(tmp_path):
    folder = tmp_path / "notes"
    assert run_example(folder, "buy milk", "call Ann") == ["buy milk", "call Ann"]
    assert run_example(folder) == ["buy milk", "call Ann"]
    child = start_child(f"""
        import importlib.util, pathlib, sys
        spec = importlib.util.spec_from_file_location("example", {str(EXAMPLE)!r})
        example = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(example)
        guest = example.open_guest(pathlib.Path(sys.argv[1]))
        for n in range(10**6):
            example.add(*guest, str(n) * 100)
            print(n, flush=True)
        """, folder)
    child.stdin.close()
    for _ in range(300):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    last = [299, *(int(line) for line in child.stdout.read().split("\n")[:-1])][-1]
    child.wait()
    child.stdout.close()
    kept = run_example(folder)
    assert len(kept) - 3 in (last, last + 1)
    assert kept == ["buy milk", "call Ann", *(str(n) * 100 for n in range(len(kept) - 2))]
    assert (folder / "notes.memory").stat().st_size % PAGE == 0
