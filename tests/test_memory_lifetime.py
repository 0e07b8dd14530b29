"""Lifetime: close, exports, the last view, children of a fork."""

import copy
import gc
import pickle
import weakref

import pytest
from support import NEEDS, PAGE, answer, is_mapped, live_bytes, requires

import linmem


def test_close_with_exports_says_how_many_and_changes_nothing():
    mem = linmem.create(PAGE)
    views = [memoryview(mem), mem.view("d"), mem.view(">d"), memoryview(mem)[5:9]]
    with pytest.raises(BufferError, match=r"4 exported buffer\(s\)"):
        mem.close()
    assert not mem.closed
    assert mem.info().exports == 4
    mem[0] = 3
    assert views[0][0] == 3
    for left, view in zip((3, 2, 1), views, strict=False):
        view.release()
        with pytest.raises(BufferError, match=rf"{left} exported"):
            mem.close()
    del view, views
    mem.close()
    assert mem.closed


CALLS = {
    "byte_size": lambda mem: mem.byte_size(),
    "byte_capacity": lambda mem: mem.byte_capacity(),
    "maximum_byte_size": lambda mem: mem.maximum_byte_size(),
    "grow_to": lambda mem: mem.grow_to(2 * PAGE),
    "as_ptr": lambda mem: mem.as_ptr(),
    "wasm_accessible": lambda mem: mem.wasm_accessible(),
    "memoryview": lambda mem: memoryview(mem),
    "view": lambda mem: mem.view(),
    "view of a foreign format": lambda mem: mem.view(">d"),
    "len": lambda mem: len(mem),
    "index": lambda mem: mem[0],
    "index assignment": lambda mem: mem.__setitem__(0, 1),
    "slice": lambda mem: mem[0:1],
    "slice with a step": lambda mem: mem[0:4:2],
    "slice assignment": lambda mem: mem.__setitem__(slice(0, 1), b"1"),
    "read": lambda mem: mem.read(0, 1),
    "write": lambda mem: mem.write(0, b"1"),
    "protect": lambda mem: mem.protect(0, PAGE, "r"),
    "discard": lambda mem: mem.discard(),
    "prefault": lambda mem: mem.prefault(),
    "info": lambda mem: mem.info(),
    "with": lambda mem: mem.__enter__(),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_on_a_closed_memory_is_a_value_error(name):
    mem = linmem.create(PAGE)
    mem.close()
    with pytest.raises(ValueError, match="the memory is closed"):
        CALLS[name](mem)
    assert mem.closed
    mem.close()
    assert repr(mem) == "<linmem.Memory, closed>"


def test_a_memory_that_no_creator_made_is_closed():
    mem = linmem.Memory.__new__(linmem.Memory)
    assert mem.closed
    with pytest.raises(ValueError, match="closed"):
        mem[0]


def test_a_context_closes_its_memory():
    with linmem.create(PAGE) as mem:
        assert not mem.closed
        base = mem.as_ptr()
        if NEEDS["regions"][0]:
            assert is_mapped(base)
    assert mem.closed


@requires("maps")
def test_close_releases_the_whole_reservation():
    before = live_bytes()
    mem = linmem.create(PAGE, reserve=1 << 30)
    assert live_bytes() - before >= (1 << 30) - PAGE
    mem.close()
    assert live_bytes() == before


@requires("maps")
@pytest.mark.parametrize("format", ["B", "d", ">d"])
def test_a_view_outlives_the_handle_and_the_pages_go_with_the_last_view(format):
    before = live_bytes()
    mem = linmem.create(PAGE, reserve=1 << 30)
    mem.write(0, b"12345678")
    gone = weakref.ref(mem)
    view = mem.view(format)
    part = view[0:1]
    del mem
    gc.collect()
    assert gone() is not None           # the view holds a reference to the handle
    view.release()
    assert bytes(part) == b"12345678"[:part.nbytes]
    assert live_bytes() > before
    del part, view
    gc.collect()
    assert gone() is None
    assert live_bytes() == before


@requires("maps", "numpy")
def test_a_numpy_array_outlives_the_handle():
    import numpy as np

    before = live_bytes()
    array = np.asarray(linmem.create(PAGE, reserve=1 << 30).view("<u4"))
    gc.collect()
    array[:] = 7
    assert array.sum() == 7 * PAGE // 4
    assert live_bytes() > before
    del array
    gc.collect()
    assert live_bytes() == before


@pytest.mark.parametrize("format", ["B", "d", ">d"])
def test_views_in_a_garbage_cycle_are_collected_with_their_memory(format):
    # In a child, because a wrong order of the collector's steps would crash the process.
    assert answer(f"""
        import gc, linmem, weakref
        gc.disable()
        gone = []
        for turn in range(20):
            mem = linmem.create({PAGE})
            gone.append(weakref.ref(mem))
            cycle = [mem, mem.view({format!r}), mem.view({format!r})[1:]]
            cycle[turn % 3:0] = [cycle]
            del mem, cycle
            gc.collect()
        print([one() for one in gone] == [None] * 20)
        """) == "True"


def test_memories_and_creators_are_instances_of_their_traits():
    with linmem.create(1) as mem:
        assert isinstance(mem, linmem.LinearMemory)
    for creator in (linmem.MmapCreator(), linmem.creator("limiting", limit_bytes=1), linmem.creator("statistics")):
        assert isinstance(creator, linmem.MemoryCreator)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_memory_cannot_be_copied_or_pickled(clone):
    with linmem.create(1) as mem, pytest.raises(TypeError, match="cannot be pickled or copied"):
        clone(mem)


def test_a_memory_shows_its_size_and_address():
    with linmem.create(5, reserve=PAGE) as mem:
        assert repr(mem) == f"<linmem.Memory: 5 bytes at {mem.as_ptr():#x}, capacity {PAGE >> 10} KiB>"


def test_memories_alive_at_the_end_of_the_interpreter_do_no_harm():
    assert answer("""
        import linmem, sys
        keep = linmem.create(1 << 20)
        view = memoryview(keep)
        sys.keep = linmem.creator("statistics", upstream=linmem.creator("limiting", limit_bytes=1 << 30)).create(5)
        print("end")
        """) == "end"


@requires("fork")
def test_a_forked_child_has_its_own_copy_and_may_close_it():
    assert answer(f"""
        import linmem, os
        mem = linmem.create({PAGE}, maximum={4 * PAGE})
        mem[0] = 1
        child = os.fork()
        if child == 0:
            mem[0] = 2
            mem.grow_to({2 * PAGE})
            mem.close()
            linmem.create(5).close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        print(mem[0], mem.byte_size())
        """) == f"1 {PAGE}"


# -- leaving a with block ------------------------------------------------------------------------------------------


EXPORTS = {"memoryview": lambda mem: memoryview(mem), "view": lambda mem: mem.view("d"),
           "view of a foreign format": lambda mem: mem.view(">d")}


class Body(Exception):
    """Raised in the body of the with block."""


@requires("maps")
@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("export", EXPORTS)
def test_a_with_block_closes_the_handle_and_the_pages_go_with_the_last_view(export, raises):
    before = live_bytes()
    error = None
    try:
        with linmem.create(PAGE, reserve=1 << 30) as mem:
            mem.write(0, b"12345678")
            views = [EXPORTS[export](mem), EXPORTS[export](mem)]
            if raises:
                raise Body
    except Body as caught:
        error = caught
    assert (error is not None) == raises
    if raises:
        assert error.__context__ is None
    assert mem.closed
    assert repr(mem) == "<linmem.Memory, closed>"
    mem.close()                         # a second close has no effect
    with pytest.raises(ValueError, match="the memory is closed"):
        memoryview(mem)
    with pytest.raises(ValueError, match="the memory is closed"):
        mem[0]
    assert bytes(views.pop())[:8] == b"12345678"
    assert live_bytes() > before
    part = views.pop()[0:1]
    gc.collect()
    assert bytes(part) == b"12345678"[:part.nbytes]
    del part
    assert live_bytes() == before
    del mem, error
    gc.collect()
    assert live_bytes() == before


@requires("maps", "numpy")
@pytest.mark.parametrize("export", [lambda mem: __import__("numpy").asarray(mem), lambda mem: mem.array("M8[s]")])
def test_an_error_in_a_with_block_is_seen_where_an_array_is_left(export):
    before = live_bytes()
    array = None
    with pytest.raises(KeyError) as caught, linmem.create(PAGE) as mem:     # noqa: PT012
        array = export(mem)
        raise KeyError("the body's own")
    assert caught.value.__context__ is None
    assert mem.closed
    array[:1] = array[1:2]
    del array, mem, caught
    gc.collect()
    assert live_bytes() == before


def test_a_pooled_memory_returns_to_the_pool_with_the_last_view_of_a_with_block():
    pool = linmem.PoolingCreator()
    with pool.create(PAGE) as mem:
        view = memoryview(mem)
    assert (pool.stats()["live"], pool.stats()["warm"]) == (1, 0)
    view[0] = 1
    view.release()
    assert (pool.stats()["live"], pool.stats()["warm"]) == (0, 1)
    del mem
    assert (pool.stats()["live"], pool.stats()["warm"]) == (0, 1)
    with pool.create(PAGE) as mem:
        assert mem[0] == 0


def test_a_with_block_within_one_and_a_closed_one_end_quietly():
    with linmem.create(PAGE) as mem:
        with mem:
            view = memoryview(mem)
        assert mem.closed
    view.release()
    with linmem.create(PAGE) as mem:
        mem.close()
    linmem.Memory.__new__(linmem.Memory).__exit__(None, None, None)


def test_a_handle_that_threads_leave_and_enter_at_once_releases_its_memory_once():
    # In a child: a memory that is released twice crashes the process, or two users get the same slot.
    assert answer(f"""
        import linmem, threading
        pool = linmem.PoolingCreator()
        for turn in range(300):
            mem = pool.create({PAGE})
            views = [memoryview(mem) for _ in range(3)]
            start = threading.Barrier(6)
            def use():
                start.wait()
                try:
                    while True:
                        mem.read(0, 1)
                except ValueError:
                    pass
            def end():
                start.wait()
                mem.__exit__(None, None, None)
            def drop(view):
                start.wait()
                view.release()
            threads = [threading.Thread(target=use), threading.Thread(target=end), threading.Thread(target=end),
                       *(threading.Thread(target=drop, args=(view,)) for view in views)]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            assert mem.closed
            stats = pool.stats()
            assert (stats["live"], stats["warm"], stats["hits"] + stats["misses"]) == (0, 1, turn + 1), stats
        print("end")
        """) == "end"


# -- handles on the same memory ------------------------------------------------------------------------------------


def test_a_memory_is_equal_only_to_itself_and_not_to_bytes():
    with linmem.create(8) as mem, linmem.create(8) as other:
        assert mem == mem
        assert mem != other
        assert mem not in [other, bytes(8), None, 0]
        assert {mem: 1}[mem] == 1


def test_closed_handles_equal_only_themselves_though_the_address_may_be_used_again():
    pool = linmem.PoolingCreator()
    closed = pool.create(PAGE)
    closed.close()
    with pool.create(PAGE) as again:        # a reused memory
        assert hash(again) == hash(closed)
        assert again != closed
        assert closed == closed
    assert linmem.Memory.__new__(linmem.Memory) != linmem.Memory.__new__(linmem.Memory)
