"""State that outlives one use: leftovers of a user, of a refused call, or of an earlier owner."""

import gc
from functools import partial

import pytest
import wasmtime
from support import FLOOR, PAGE, SCAN_WAYS, check_fresh, image_kinds, requires, resident_within, scanning

import linmem
import linmem.wasmtime
from linmem import Image
from linmem._os import pages

SHAPE = {"maximum": 512 * PAGE, "reserve": 512 * PAGE, "guard": PAGE}


# -- pages that a slot keeps beyond its minimum ------------------------------------------------------------------

def write_all(mem):
    mem.write(0, b"s" * len(mem))


def resident_of(base, size):
    return resident_within(base, base + size * PAGE)


@requires("maps", "scans", "discard_any_protection")
@pytest.mark.parametrize("way", sorted(SCAN_WAYS))
def test_a_slot_that_gives_all_pages_back_also_gives_hidden_pages_back(way):
    with scanning(way):
        # check=True would read the pages and make them resident
        pool = linmem.PoolingCreator(reset="scan", keep_resident=10 * PAGE)
        with pool.create(3 * PAGE, **SHAPE) as mem:
            base = mem.as_ptr()
            mem.grow_to(12 * PAGE)
            mem.write(0, b"s" * 3 * PAGE)
            mem.write(5 * PAGE, b"s" * 7 * PAGE)
        assert resident_of(base, 12) >= 10 * PAGE       # the pool may keep this many pages; nine of them are hidden
        with pool.create(3 * PAGE, **SHAPE) as mem:
            mem.grow_to(6 * PAGE)
            write_all(mem)
        assert pool.stats()["resets"]["discard"] == 1
        assert (resident_of(base, 12), pool.stats()["resident"]) == (0, 0)
        with pool.create(3 * PAGE, **SHAPE) as mem:
            check_fresh(mem, 3 * PAGE)
            mem.grow_to(12 * PAGE)
            assert bytes(mem) == bytes(12 * PAGE)


@requires("maps", "scans", "discard_any_protection")
def test_an_adaptive_pool_also_gives_hidden_pages_back():
    """The memory has more than 128 pages, so that resets do not zero the whole memory. The pages of the first user's
    growth are hidden from all later users."""
    pool = linmem.PoolingCreator()
    shape = {"maximum": 4096 * PAGE, "reserve": 4096 * PAGE, "guard": PAGE}
    with pool.create(1024 * PAGE, **shape) as mem:
        base = mem.as_ptr()
        mem.grow_to(1536 * PAGE)
        mem.write(0, b"s" * 4 * PAGE)
        mem.write(1200 * PAGE, b"s" * 4 * PAGE)
    assert resident_of(base, 1536) >= 8 * PAGE
    for _ in range(2000):
        with pool.create(1024 * PAGE, **shape) as mem:
            mem.write(0, b"s" * 4 * PAGE)
        if pool.stats()["resets"]["discard"]:
            break
    else:
        raise AssertionError("the pool has never given all pages back")
    assert resident_of(base, 1536) == 0


# -- images that a user left in a slot ---------------------------------------------------------------------------

@pytest.mark.parametrize("kind", image_kinds())
@pytest.mark.parametrize("reset", ["adaptive", pytest.param("scan", marks=requires("scans")), "zero", "discard"])
@pytest.mark.parametrize("whose", ["of an image", "of no image"])
def test_a_slot_restored_to_another_image_has_its_own_image_for_the_next_user(whose, reset, kind):
    before = pages.choose_image(kind)
    try:
        own = Image.from_bytes(b"own" * 2 * PAGE, PAGE)
        others = [Image.from_bytes(b"other" * PAGE, start * PAGE) for start in (0, 1, 3, 7)]
    finally:
        pages.choose_image(before)
    pool = linmem.PoolingCreator(reset=reset, check=True, image=own if whose == "of an image" else None)
    fresh = bytes(12 * PAGE)
    if whose == "of an image":
        fresh = (bytes(PAGE) + bytes(own)).ljust(12 * PAGE, b"\0")
    base = None
    for other in [*others, *others, *reversed(others)]:
        with pool.create(12 * PAGE, **SHAPE) as mem:
            assert base in (None, mem.as_ptr())
            base = mem.as_ptr()
            assert bytes(mem) == fresh
            mem[2 * PAGE] ^= 1
            mem.restore(other, zero_grown=True)
            mem[9 * PAGE] = mem[0] = 1
        with pool.create(12 * PAGE, **SHAPE) as mem:        # the next user takes the slot immediately
            assert bytes(mem) == fresh
            if whose == "of an image":
                assert mem.dirty_pages(own) == []
            mem[5 * PAGE] ^= 1
        assert other.info().memories == 0
    assert (pool.stats()["misses"], pool.stats()["rejected"]) == (1, 0)
    pool.trim()
    assert own.info().memories == 0


# -- owners of a slot --------------------------------------------------------------------------------------------

def test_a_slot_that_wasmtime_has_dropped_has_no_pins_when_python_takes_it():
    pool = linmem.PoolingCreator(slots=1)
    config = wasmtime.Config()
    linmem.wasmtime.install(config, pool, tune=False)
    engine = wasmtime.Engine(config)
    module = wasmtime.Module(engine, '(module (memory (export "memory") 1 8))')
    take = partial(pool.new_memory, linmem.MemoryType(1, 8), 65536, 8 * 65536, 4 << 30, 32 << 20)
    for _ in range(2):
        store = wasmtime.Store(engine)
        memory = wasmtime.Instance(store, module, []).exports(store)["memory"]
        mem = linmem.wasmtime.linear_memory(store, memory)
        base = mem.as_ptr()
        assert (mem.info().owner, pool.stats()["pinned"]) == ("wasmtime", 0)
        store.close()
        del store, memory
        gc.collect()
        # `mem` holds the memory that wasmtime has dropped
        assert (pool.stats()["live"], pool.stats()["pinned"]) == (1, 1)
        mem.close()
        assert (pool.stats()["live"], pool.stats()["pinned"]) == (0, 0)
        with take() as mem:
            assert mem.as_ptr() == base
            assert mem.info().owner == "python"
            assert (pool.stats()["live"], pool.stats()["pinned"]) == (1, 0)
            mem.grow_to(2 * 65536)
            mem.protect(0, len(mem), "rw")


# -- limits of the machine ---------------------------------------------------------------------------------------

@pytest.mark.skipif(not FLOOR["memory"], reason="the OS does not say how much memory there is")
def test_the_resident_bound_follows_the_options_up_to_a_quarter_of_the_machines_memory():
    quarter = FLOOR["memory"] // 4
    for keep, warm, bound in [
            (PAGE, 3, 3 * PAGE), (0, 5, 0), (PAGE, 0, 0), (quarter, 1, quarter), (quarter - 1, 1, quarter - 1),
            (quarter + 1, 1, quarter), (1 << 62, 1, quarter), (1 << 62, 4, quarter), (1 << 40, 1 << 30, quarter)]:
        pool = linmem.PoolingCreator(keep_resident=keep, max_unused_warm=warm)
        assert pool.stats()["resident_bound"] == bound, (keep, warm)


# -- buffers of the caller's -------------------------------------------------------------------------------------

def closed_memory():
    mem = linmem.create(PAGE)
    mem.close()
    return mem


def with_pieces(data, offset, size=2 * PAGE):
    return Image.from_pieces([(0, bytes(1)), (offset, data)], size)


REFUSED = {
    "write past the end": lambda mem, data: mem.write(4 * PAGE, data),
    "write before the start": lambda mem, data: mem.write(-5, data),
    "write of no number": lambda mem, data: mem.write("0", data),
    "write to a closed memory": lambda mem, data: closed_memory().write(0, data),
    "slice of another size": lambda mem, data: mem.__setitem__(slice(0, 3), data),
    "slice with a step": lambda mem, data: mem.__setitem__(slice(0, 3, 2), data),
    "slice of a closed memory": lambda mem, data: closed_memory().__setitem__(slice(0, 10), data),
    "one byte": lambda mem, data: mem.__setitem__(0, data),
    "from_bytes": lambda mem, data: Image.from_bytes(data, -1),
    "from_bytes beyond all": lambda mem, data: Image.from_bytes(data, 2**64 - 1),
    "from_pieces behind the size": lambda mem, data: with_pieces(data, 2 * PAGE),
    "from_pieces before the first": lambda mem, data: with_pieces(data, 0),
    "from_pieces of a size that cannot be": lambda mem, data: with_pieces(data, 5, -1),
    "a delta of other bytes": lambda mem, data: linmem.Delta("", PAGE, PAGE, [(0, 3)], [], data),
    "a format": lambda mem, data: mem.view(data),
    "an image": lambda mem, data: mem.restore(data),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_call_holds_no_buffer_of_its_callers(what):
    data = bytearray(10)
    with linmem.create(4 * PAGE) as mem:
        mem[0] = 7
        with pytest.raises((ValueError, TypeError, IndexError, OverflowError, BufferError)):
            REFUSED[what](mem, data)
        data.append(1)      # raises BufferError while a buffer of `data` is exported
        assert (mem[0], mem.info().exports) == (7, 0)


def test_a_call_that_succeeds_holds_no_buffer_of_its_callers_either():
    data = bytearray(b"0123456789")
    with linmem.create(4 * PAGE) as mem:
        mem.write(0, data)
        mem[20:30] = data
        images = [Image.from_bytes(data), with_pieces(data, 5)]
        delta = linmem.Delta("", PAGE, PAGE, [(0, len(data))], [], data)
        data.append(1)
        assert bytes(mem[:30]) == b"0123456789" + bytes(10) + b"0123456789"
        assert [bytes(img)[:15] for img in images] == [b"0123456789", bytes(5) + b"0123456789"]
        assert [bytes(data) for *_, data in delta.pieces()] == [b"0123456789"]
