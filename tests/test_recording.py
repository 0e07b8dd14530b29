"""The working set of a snapshot: snapshot.record() notes which pages the started instances touch."""

import contextlib
import copy
import gc
import pickle
import threading
import warnings

import pytest
import wasmtime
from support import FORKING, PAGE, answer, each_instruction, failing, file_requires, requires, scanning
from test_hoist import needs_page_sizes
from test_prepare import engine_of
from test_start import Guest

import linmem.wasmtime
from linmem._os import pages
from linmem._wasm.recording import OPEN, Noted, Recording, _merging, union
from linmem.wasmtime import Snapshot, prepare

file_requires("maps_images", "scans", "real_pages")

WASM_PAGE = 65536
SIZE = 64 * WASM_PAGE               # of the memory, of which the image fills all but the last wasm page
WINDOW = 65536                      # by default, the kernel maps the pages in such a window around a page that is read
ENGINE = engine_of()

# Both memories are full of ones after the start; "write" and "read" access one byte.
TWO = f"""(module (memory (export "m") {SIZE // WASM_PAGE} 200) (memory (export "o") 1)
  (global $n (mut i32) (i32.const 0))
  (func (export "fill")
    (memory.fill 0 (i32.const 0) (i32.const 1) (i32.const {SIZE - WASM_PAGE}))
    (memory.fill 1 (i32.const 0) (i32.const 1) (i32.const {WASM_PAGE})))
  (func (export "write") (param i32) (i32.store8 0 (local.get 0) (i32.const 7)))
  (func (export "read") (param i32) (result i32) (i32.load8_u 0 (local.get 0)))
  (func (export "other") (param i32) (i32.store8 1 (local.get 0) (i32.const 7)))
  (func (export "grow") (param i32) (result i32) (memory.grow 0 (local.get 0)))
  (func (export "trap") (param i32) (i32.store8 0 (local.get 0) (i32.const 7)) unreachable))"""


class Filled:
    """A prepared module and a snapshot of it."""

    def __init__(self, kind="mmap", wat=TWO):
        self.engine = engine_of(kind)
        self.prepared = prepare(self.engine, wat, expose=True)
        guest = Guest(self.prepared, self.engine)
        guest.call("fill")
        self.snapshot = guest.take()

    def start(self, snapshot=None):
        return Guest(self.prepared, self.engine, start=snapshot or self.snapshot)


@pytest.fixture
def filled():
    return Filled()


def working_set(snapshot, place=0):
    """The numbers of the pages in the working set of one memory."""
    found = snapshot._travels().working_set
    return [page for offset, size in found[place] for page in range(offset // PAGE, (offset + size) // PAGE)] if found \
        else []


def in_page_tables(memory):
    """The numbers of the pages that the kernel says are present or swapped, of all but the last wasm page."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(memory.as_ptr() // PAGE * 8)
        entries = memoryview(file.read((SIZE - WASM_PAGE) // PAGE * 8)).cast("Q")
    return [page for page, entry in enumerate(entries) if entry >> 62]


def memory_of(guest):
    return linmem.wasmtime.linear_memory(guest.store, guest.instance.exports(guest.store)["m"])


# -- which pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mmap", "pool"])
def test_the_written_pages_of_the_image_are_the_working_set(kind):
    filled = Filled(kind)
    with filled.snapshot.record():
        guest = filled.start()
        for page in (3, 5, 6, 200):
            guest.call("write", page * PAGE + 17)
        guest.call("write", SIZE - 1)       # behind the image
        assert guest.call("grow", 1) == SIZE // WASM_PAGE
        guest.call("write", SIZE + 5)
        guest.call("other", 2 * PAGE)
    assert working_set(filled.snapshot) == [3, 5, 6, 200]
    assert working_set(filled.snapshot, 1) == [2]


def test_pages_that_were_read_belong_to_the_working_set_with_what_the_kernel_maps_around_them(filled):
    read, written = (7, 300, 301), (500, 900)
    with filled.snapshot.record():
        guest = filled.start()
        assert in_page_tables(memory_of(guest)) == []
        for page in read:
            assert guest.call("read", page * PAGE) == 1
        for page in written:
            guest.call("write", page * PAGE)
        expected = in_page_tables(memory_of(guest))
    found = working_set(filled.snapshot)
    assert found == expected
    assert {*read, *written} <= {*found}
    base = memory_of(guest).as_ptr()
    windows = {(base + page * PAGE) // WINDOW for page in read}
    assert {page for page in found if (base + page * PAGE) // WINDOW not in windows} == {*written}


def test_an_instance_that_touches_nothing_adds_nothing(filled):
    for _ in range(2):
        with filled.snapshot.record():
            filled.start()
        assert filled.snapshot._travels().working_set == ()


def test_instances_of_all_threads_count_also_if_they_were_dropped(filled):
    def serve(page):
        guest = filled.start()
        guest.call("write", page * PAGE)
        guest.store.close()

    with filled.snapshot.record():
        threads = [threading.Thread(target=serve, args=[page]) for page in range(0, 800, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        del threads, thread
        gc.collect()
    assert working_set(filled.snapshot) == [*range(0, 800, 100)]


@pytest.mark.parametrize("reset", ["scan", "discard", "adaptive"])
def test_what_earlier_guests_of_a_pools_slot_touched_does_not_count(reset):
    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.creator("pool", reset=reset, keep_resident=1 << 30))
    filled = Filled()
    engine = wasmtime.Engine(config)
    prepared = prepare(engine, TWO, expose=True)

    def serve(*touched):
        guest = Guest(prepared, engine, start=filled.snapshot)
        content = guest.content()
        for page in touched:
            guest.call("write", page * PAGE)
        guest.store.close()
        return content

    expected = serve(*range(0, 900, 3))
    for _ in range(3):
        assert serve(*range(0, 900, 3)) == expected
    with filled.snapshot.record():
        guest = Guest(prepared, engine, start=filled.snapshot)
        guest.call("write", 8 * PAGE)
        guest.store.close()
    assert working_set(filled.snapshot) == [8]
    assert serve() == expected


def test_what_was_touched_before_a_restore_counts(filled):
    other = filled.start().take()
    with filled.snapshot.record():
        guest = filled.start()
        # A restore that finds four times as many written pages as the first gives all pages back to the OS.
        for touched in ((1, 2), range(10, 400, 2), (600,)):
            for page in touched:
                guest.call("write", page * PAGE)
            filled.snapshot.restore(guest.store, guest.instance)
        guest.call("write", 700 * PAGE)
        other.restore(guest.store, guest.instance)
    assert working_set(filled.snapshot) == [1, 2, *range(10, 400, 2), 600, 700]


@pytest.mark.parametrize("by", ["import", "growth"])
def test_memories_that_are_not_offered_are_watched_too(by):
    if by == "growth":      # a memory whose minimum is 0
        filled = Filled(wat=TWO.replace(f'"m") {SIZE // WASM_PAGE} 200', '"m") 0 200').replace(
            '(func (export "fill")', f'(func (export "fill") (drop (memory.grow 0 (i32.const {SIZE // WASM_PAGE})))'))
        with filled.snapshot.record():
            filled.start().call("write", 9 * PAGE)
        assert working_set(filled.snapshot) == [9]
        return
    prepared = prepare(ENGINE, """(module (import "env" "m" (memory 1 100))
      (func (export "fill") (memory.fill (i32.const 0) (i32.const 1) (i32.const 65536)))
      (func (export "write") (param i32) (i32.store8 (local.get 0) (i32.const 7))))""", expose=True)

    def start(store, **how):
        memory = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, 100)))
        return Guest(prepared, store=store, imports=[memory], **how), memory

    first, _ = start(wasmtime.Store(ENGINE))
    first.call("fill")
    snapshot = first.take()
    with snapshot.record():
        guest, memory = start(wasmtime.Store(ENGINE), start=snapshot)
        guest.call("write", 3 * PAGE)
        # The next instance sets the memory back.
        Guest(prepared, store=guest.store, imports=[memory], start=snapshot).call("write", 5 * PAGE)
    assert working_set(snapshot) == [3, 5]


def test_an_instance_whose_creator_copies_the_image_has_read_all_of_it(filled):
    class Copying(linmem.abc.MemoryCreator):
        def new_memory(self, ty, minimum, maximum, reserved, guard):
            return linmem.create(minimum, maximum, reserve=reserved, guard=guard)

    config = wasmtime.Config()
    linmem.wasmtime.install(config, Copying())
    engine = wasmtime.Engine(config)
    prepared = prepare(engine, TWO, expose=True)
    with filled.snapshot.record():
        Guest(prepared, engine, start=filled.snapshot)
    assert filled.snapshot._travels().working_set == tuple(
        tuple(image.runs()) for image in filled.snapshot.memories.values())


def test_each_session_counts_and_is_reset_as_usual(filled):
    sessions = linmem.wasmtime.Sessions(filled.prepared, start=filled.snapshot, size=1)
    with filled.snapshot.record():
        for page in (50, 60, 70):
            with sessions.get() as (store, instance):
                exports = instance.exports(store)
                assert exports["m"].read(store, 50 * PAGE, 50 * PAGE + 1) == b"\1"
                exports["write"](store, page * PAGE)
    assert {50, 60, 70} <= {*working_set(filled.snapshot)}
    assert max(working_set(filled.snapshot)) == 70
    with sessions.get() as (store, instance):
        assert instance.exports(store)["m"].read(store, 70 * PAGE, 70 * PAGE + 1) == b"\1"


@pytest.mark.parametrize("keep", [False, True])
def test_an_instance_that_is_made_in_a_block_serves_one_session(filled, keep):
    """Its memories have handles that come and go with the block, so a kept one could not be told from them."""
    sessions = linmem.wasmtime.Sessions(filled.prepared, start=filled.snapshot, size=1)
    with contextlib.ExitStack() as block:
        block.enter_context(filled.snapshot.record())
        with sessions.get():
            pass
        with sessions.get() as (store, instance):
            block.close()
            exports = instance.exports(store)
            kept = [linmem.wasmtime.linear_memory(store, exports[name]) for name in "mo" if keep]
    assert sessions.stats()["replaced"] == {"recorded": 2}
    with sessions.get():        # after the block instances serve any number
        pass
    with sessions.get():
        pass
    assert (sessions.stats()["replaced"], sessions.stats()["reused"]) == ({"recorded": 2}, 1)
    del kept


# -- blocks ----------------------------------------------------------------------------------------------


def test_a_restore_on_another_thread_while_the_block_ends_loses_no_page(filled):
    """The restore sets back so many pages that it gives them back to the OS."""
    def served():
        if done:
            snapshot.restore(guest.store, guest.instance)

    many = range(10, 1000, 2)
    for meanwhile in each_instruction(Snapshot.record.__wrapped__, Recording.end):
        guest = Guest(filled.prepared, filled.engine)
        guest.call("fill")
        snapshot, done = guest.take(), False
        with meanwhile(served), snapshot.record():
            guest = filled.start(snapshot)
            for page in (1, 2):
                guest.call("write", page * PAGE)
            snapshot.restore(guest.store, guest.instance)
            for page in many:
                guest.call("write", page * PAGE)
            done = True
        assert working_set(snapshot) == [1, 2, *many]


def test_overlapping_blocks_note_each_instance_and_the_working_set_is_their_union(filled):
    snapshot = filled.snapshot
    with snapshot.record():
        filled.start().call("write", 1 * PAGE)
        with snapshot.record():
            filled.start().call("write", 20 * PAGE)
        assert working_set(snapshot) == [20]
    assert working_set(snapshot) == [1, 20]
    started = filled.start()
    started.call("write", 30 * PAGE)
    with snapshot.record():
        started.call("write", 31 * PAGE)        # it was started before
        filled.start().call("write", 19 * PAGE)
    assert snapshot._travels().working_set == (((PAGE, PAGE), (19 * PAGE, 2 * PAGE)), ())


def test_blocks_of_other_threads_end_in_any_order(filled):
    snapshot, begun, written = filled.snapshot, threading.Event(), threading.Event()

    def record():
        with snapshot.record():
            begun.set()
            assert written.wait(60)

    with snapshot.record():
        thread = threading.Thread(target=record)
        thread.start()
        assert begun.wait(60)
    filled.start().call("write", 3 * PAGE)
    written.set()
    thread.join()
    assert working_set(snapshot) == [3]


def test_a_block_of_one_snapshot_does_not_note_instances_of_another(filled):
    other = Filled()
    again = Guest(filled.prepared, filled.engine, start=filled.snapshot).take()
    with filled.snapshot.record(), again.record():
        other.start().call("write", PAGE)
        filled.start(again).call("write", 2 * PAGE)
        filled.start().call("write", 3 * PAGE)
    assert [working_set(each) for each in (filled.snapshot, again, other.snapshot)] == [[3], [2], []]


def test_a_block_that_raises_raises_its_own_exception_and_what_it_noted_counts(filled):
    with pytest.raises(wasmtime.Trap, match="unreachable"), filled.snapshot.record():
        filled.start().call("trap", 4 * PAGE)
    assert working_set(filled.snapshot) == [4]
    assert OPEN == []


def test_the_block_holds_the_memories_of_its_instances_until_it_ends(filled):
    budget = linmem.creator("limiting", limit_bytes=3 * (SIZE + 2 * WASM_PAGE))
    config = wasmtime.Config()
    linmem.wasmtime.install(config, budget)
    engine = wasmtime.Engine(config)
    prepared = prepare(engine, TWO, expose=True)

    def serve():
        guest = Guest(prepared, engine, start=filled.snapshot)
        guest.call("write", 4 * PAGE)
        guest.store.close()

    for _ in range(5):
        serve()
    gc.collect()
    before = budget.used_bytes

    @filled.snapshot.record()
    def serve_many():
        for _ in range(5):
            serve()

    with pytest.raises(wasmtime.WasmtimeError, match="limit of"):
        serve_many()
    gc.collect()
    assert budget.used_bytes == before
    serve()
    assert working_set(filled.snapshot) == [4]


def test_finished_blocks_and_restores_leave_only_their_union(filled):
    snapshot = filled.snapshot
    for page in (3, 5, 3, 4, 5):
        with snapshot.record():
            guest = filled.start()
            for again in (page, page + 100):
                guest.call("write", again * PAGE)
                snapshot.restore(guest.store, guest.instance)
            (recording,) = OPEN
            assert len(recording._noted._sets) == 1
        assert len(snapshot._recorded._sets) == 1
    assert working_set(snapshot) == [3, 4, 5, 103, 104, 105]


def test_blocks_that_end_on_eight_threads_lose_no_page(filled):
    def serve(first):
        for page in range(first, 400, 8):
            with filled.snapshot.record():
                guest = filled.start()
                guest.call("write", page * PAGE)
                guest.store.close()

    threads = [threading.Thread(target=serve, args=[first]) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert working_set(filled.snapshot) == [*range(400)]


def test_what_is_added_in_the_middle_of_a_merge_counts():
    noted = Noted((((0, 1),),))
    _merging.acquire()
    try:
        for start in (4, 8):
            noted.add((((start, 1),),))
        assert noted.all() == (((0, 1), (4, 1), (8, 1)),)
    finally:
        _merging.release()
    noted.add(())
    assert noted._sets == [(((0, 1), (4, 1), (8, 1)),)]


@pytest.mark.parametrize("way", ["taken", "opened"])
def test_a_memory_that_is_imported_twice_has_its_working_set_in_its_first_place(tmp_path, way):
    prepared = prepare(ENGINE, """(module (import "h" "a" (memory 4)) (import "h" "b" (memory 4))
      (func (export "fill") (memory.fill 0 (i32.const 0) (i32.const 1) (i32.const 262144)))
      (func (export "write") (param i32) (i32.store8 1 (local.get 0) (i32.const 7))))""", expose=True)

    def start(**how):
        store = wasmtime.Store(ENGINE)
        memory = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(4, None)))
        return Guest(prepared, store=store, imports=[memory, memory], **how)

    first = start()
    first.call("fill")
    snapshot = first.take()
    if way == "opened":
        snapshot.save(tmp_path / "snapshot")
        snapshot = Snapshot.open(tmp_path / "snapshot")
    with snapshot.record():
        start(start=snapshot).call("write", 2 * PAGE)
    assert snapshot._travels().working_set == (((2 * PAGE, PAGE),), ())


# -- what cannot be recorded -----------------------------------------------------------------------------


def test_a_system_that_cannot_tell_names_the_missing_capability(filled, monkeypatch):
    with scanning(None), pytest.raises(OSError, match="capability 'scans'"), filled.snapshot.record():
        pytest.fail("the block began")
    known = pages.describe()
    monkeypatch.setattr(pages, "describe", lambda: known | {
        "capabilities": known["capabilities"] | {"maps_images": False}})
    with pytest.raises(OSError, match="capability 'maps_images'"), filled.snapshot.record():
        pytest.fail("the block began")
    assert OPEN == []


def test_images_whose_pages_are_private_are_refused():
    usual = pages.describe()["images"]
    try:
        pages.choose_image("private")
        snapshot = Filled().snapshot
    finally:
        pages.choose_image(usual)
    with pytest.raises(OSError, match="image of memory 0 are private"), snapshot.record():
        pytest.fail("the block began")


def test_a_snapshot_of_a_module_that_was_not_prepared_is_refused():
    store = wasmtime.Store(ENGINE)
    instance = wasmtime.Instance(store, wasmtime.Module(ENGINE, '(module (memory (export "m") 1))'), [])
    snapshot = Snapshot.take(store, instance, partial=True)
    with pytest.raises(ValueError, match="prepare"), snapshot.record():
        pytest.fail("the block began")


@pytest.mark.parametrize("way", ["reading", "ioctl"])
def test_after_each_refused_page_call_the_next_block_records(filled, way):
    snapshot = filled.snapshot
    try:
        with scanning(way):
            for raised in (False, True):
                for nth in range(1, 100):
                    with failing(nth, 12) as fault, warnings.catch_warnings(record=True) as warned:
                        warnings.simplefilter("always")
                        refused = contextlib.suppress(linmem.PageError, wasmtime.WasmtimeError, KeyError)
                        with refused, snapshot.record():
                            guest = filled.start()
                            guest.call("write", nth * PAGE)
                            if raised:
                                raise KeyError
                    assert all("no working set was recorded" in str(each.message) for each in warned)
                    assert OPEN == []
                    if not fault.happened:
                        break
                assert nth > 3
                with snapshot.record():
                    filled.start().call("write", (200 + raised) * PAGE)
                assert 200 + raised in working_set(snapshot)
    except ValueError as error:
        pytest.skip(str(error))


def test_an_exception_of_the_block_is_not_hidden_by_a_refused_page_call(filled):
    def serve(error):
        with filled.snapshot.record():
            filled.start().call("write", 0)
            pages.count_calls_to_failure(1, 12)
            if error:
                raise error

    with pytest.warns(RuntimeWarning, match="no working set was recorded"), pytest.raises(KeyError):
        serve(KeyError)
    assert pages.count_calls_to_failure(0, 0) == 0
    with pytest.raises(linmem.PageError):
        serve(None)
    assert filled.snapshot._travels().working_set == ()


# -- where the working set goes --------------------------------------------------------------------------


def test_the_working_set_is_saved_opened_and_pickled_and_an_open_block_is_not(filled, tmp_path):
    snapshot, path = filled.snapshot, tmp_path / "snapshot"
    with snapshot.record():
        filled.start().call("write", 11 * PAGE)
        assert pickle.loads(pickle.dumps(snapshot))._travels() == snapshot._travels()
        assert working_set(copy.copy(snapshot)) == []
    snapshot.save(path)
    opened = Snapshot.open(path)
    assert opened._travels() == pickle.loads(pickle.dumps(snapshot))._travels() == snapshot._travels()
    assert working_set(opened) == [11]
    # An opened snapshot can record more.
    with opened.record():
        filled.start(opened).call("write", 12 * PAGE)
    assert (working_set(opened), working_set(snapshot)) == ([11, 12], [11])
    opened.save(path)
    assert working_set(Snapshot.open(path)) == [11, 12]
    assert working_set(Snapshot.open(path, map=False)) == [11, 12]


@needs_page_sizes
def test_a_memory_that_ends_within_a_page_has_whole_pages_in_its_working_set(tmp_path):
    wat = """(module (memory (export "m") 5000 9000 (pagesize 1))
      (func (export "fill") (memory.fill (i32.const 0) (i32.const 1) (i32.const 5000)))
      (func (export "write") (param i32) (i32.store8 (local.get 0) (i32.const 7))))"""
    filled = Filled(wat=wat)
    with filled.snapshot.record():
        filled.start().call("write", 4999)
    assert working_set(filled.snapshot) == [1]
    filled.snapshot.save(tmp_path / "snapshot")
    assert working_set(Snapshot.open(tmp_path / "snapshot")) == [1]


def test_snapshots_without_memories_record_nothing():
    filled = Filled(wat='(module (global (mut i32) (i32.const 0)) (func (export "fill")))')
    with filled.snapshot.record():
        filled.start()
    assert filled.snapshot._travels().working_set == ()


@requires("fork")
def test_a_forked_child_ends_its_own_block_and_forgets_those_of_other_threads():
    assert answer(FORKING + f"TWO = {TWO!r}" + """
import threading, wasmtime, linmem.wasmtime
from linmem._wasm.recording import OPEN
from linmem.wasmtime import Snapshot, prepare
config = wasmtime.Config()
linmem.wasmtime.install(config)
engine = wasmtime.Engine(config)
prepared = prepare(engine, TWO, expose=True)
store = wasmtime.Store(engine)
instance = prepared.instantiate(store)
instance.exports(store)["fill"](store)
snapshot = Snapshot.take(store, instance)

def serve(page):
    store = wasmtime.Store(engine)
    prepared.instantiate(store, start=snapshot).exports(store)["write"](store, page * 4096)

begun, done = threading.Event(), threading.Event()
def other():
    with snapshot.record():
        begun.set()
        done.wait()
thread = threading.Thread(target=other)
thread.start()
begun.wait()

def in_child():
    assert len(OPEN) == 1
    serve(5)

pid = None
try:
    with snapshot.record():
        pid = os.fork()
        if pid == 0:
            in_child()
    if pid == 0:
        assert OPEN == []
        assert snapshot._travels().working_set[0] == ((5 * 4096, 4096),), snapshot._travels().working_set
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
finally:
    if pid == 0:
        os._exit(1)
done.set()
thread.join()
assert OPEN == []
print("done")
""").endswith("done")


def test_the_union_of_runs_has_few_runs():
    assert union([(4, 2), (0, 2), (1, 3), (10, 1), (4, 1)]) == ((0, 6), (10, 1))
    assert union([]) == ()
