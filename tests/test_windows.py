"""The page floor on Windows. The tests ask kernel32: VirtualQuery, the commit charge, and a child's exit status."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import itertools
import os
import pickle
import subprocess
import sys

import pytest
import support
from support import (
    GRANULARITY,
    MEM_COMMIT,
    MEM_FREE,
    MEM_MAPPED,
    MEM_RESERVE,
    PAGE,
    PAGE_NOACCESS,
    PAGE_READONLY,
    PAGE_READWRITE,
    query,
    requires,
    whole,
)

import linmem
from linmem._os import pages

pytestmark = requires("kernel32")

GIB = 1 << 30
ACCESS_VIOLATION = 0xC0000005
ERROR_NOT_ENOUGH_MEMORY, ERROR_INVALID_ADDRESS = 8, 487
# Windows' error codes for exhausted commit charge and for exhausted addresses. Wine uses access denied (5) for the
# charge.
NO_CHARGE = {5, 8, 14, 1455}
NO_ADDRESSES = {8, 14, 87}


class MemoryStatus(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32)] + [
        (name, ctypes.c_uint64) for name in ("physical", "physical_left", "commit", "commit_left",
                                             "addresses", "addresses_left", "extended")]


class WorkingSetEntry(ctypes.Structure):
    _fields_ = [("address", ctypes.c_size_t), ("flags", ctypes.c_size_t)]


class MemoryCounters(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint32), ("faults", ctypes.c_uint32)] + [
        (name, ctypes.c_size_t) for name in ("peak", "now", "paged_peak", "paged", "other_peak", "other", "pagefile",
                                             "pagefile_peak")]


def kernel32():
    return ctypes.WinDLL("kernel32", use_last_error=True)


def regions(start, end):
    """The regions (size, state, access, allocation) in [start, end), with borders clipped to this range."""
    found = []
    while start < end:
        r = query(start)
        size = min(r.base + r.size, end) - start
        found.append((size, r.state, r.access, r.allocation))
        start += size
    return found


def committed(mem):
    return sum(size for size, state, _, _ in regions(*whole(mem)) if state == MEM_COMMIT)


def resident(start, size):
    entries = (WorkingSetEntry * (size // PAGE))(*((start + at, 0) for at in range(0, size, PAGE)))
    k = kernel32()
    k.GetCurrentProcess.restype = ctypes.c_void_p
    assert k.K32QueryWorkingSetEx(ctypes.c_void_p(k.GetCurrentProcess()), entries, ctypes.sizeof(entries))
    return sum(entry.flags & 1 for entry in entries) * PAGE


def handles():
    """The open handles. Each number is tried, because some versions of kernel32 cannot count handles."""
    about, k = ctypes.c_uint32(), kernel32()
    return {n for n in range(4, 1 << 13, 4) if k.GetHandleInformation(ctypes.c_void_p(n), ctypes.byref(about))}


def commit_status():
    status = MemoryStatus(ctypes.sizeof(MemoryStatus))
    assert kernel32().GlobalMemoryStatusEx(ctypes.byref(status))
    return status


def addresses_in_use():
    end = 1 << support.FLOOR["address_bits"]
    at, used = 0x10000, 0
    while at < end - 0x20000:
        r = query(at)
        used += r.size if r.state != MEM_FREE else 0
        at = r.base + r.size
    return used


def peak():
    """The most bytes that this process has had in physical memory at a time."""
    counters, k = MemoryCounters(ctypes.sizeof(MemoryCounters)), kernel32()
    assert k.K32GetProcessMemoryInfo(ctypes.c_void_p(-1), ctypes.byref(counters), counters.length)
    return counters.peak


# -- the process of the suite -------------------------------------------------------------------------

@requires("wine")
def test_this_process_has_not_reserved_terabytes():
    # Wine keeps a byte for each page that a process has ever reserved. When the machine has no memory left, Linux kills
    # the processes of Wine first, and Wine gives them status 0. So a test that reserves terabytes does so in a child,
    # and a test with thousands of memories gives them a maximum.
    assert peak() < 2 * GIB


# -- reserved and charged bytes ---------------------------------------------------------------------

def test_sixty_four_memories_with_large_reservations_are_charged_only_for_their_bytes():
    before = commit_status().commit_left
    memories = [linmem.create(PAGE, reserve=4 * GIB, guard=32 << 20) for _ in range(64)]
    spans = sorted(whole(mem) for mem in memories)
    assert all(end - start == 4 * GIB + (64 << 20) for start, end in spans)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    for mem in memories:
        found = regions(*whole(mem))
        assert len({allocation for *_, allocation in found}) == 1
        assert {state for _, state, _, _ in found} == {MEM_RESERVE, MEM_COMMIT}
        assert committed(mem) == PAGE
    # 260 GiB are reserved. Meanwhile other programs may take a part of the charge.
    assert before - commit_status().commit_left < 4 * GIB
    for mem in memories:
        mem.close()


def test_a_reservation_starts_at_the_granularity_and_its_base_at_a_page():
    with linmem.create(1, guard=PAGE) as mem:
        start, _ = whole(mem)
        assert start % GRANULARITY == 0
        assert mem.as_ptr() == start + PAGE
        assert mem.wasm_accessible().start == mem.as_ptr()


@pytest.mark.parametrize("page", [8192, 65536, 131072, 1 << 20])
def test_an_overridden_page_aligns_base_and_guards_and_is_released_whole(page):
    with_page = support.answer(f"""
        import ctypes, sys
        sys.path.insert(0, {str(support.ROOT / "tests")!r})
        import linmem, support, test_windows
        mem = linmem.create(1, 1 << 20)
        start, end = support.whole(mem)
        info = mem.info()
        assert info.page_size == {page} and info.base % {page} == 0 and start % 65536 == 0
        assert info.guard % {page} == 0 and info.pre_guard % {page} == 0
        assert test_windows.committed(mem) == {page}
        allocation = test_windows.query(start).allocation
        mem.close()
        assert test_windows.query(allocation).state == test_windows.MEM_FREE
        assert test_windows.query(end - 1).state == test_windows.MEM_FREE
        print("released")
        """, env={"LINMEM_PAGE_SIZE": str(page)})
    assert with_page == "released"


def test_growth_commits_the_difference_and_close_frees_every_address():
    mem = linmem.create(PAGE, 1 << 20)
    start, end = whole(mem)
    mem.grow_to(10 * PAGE + 1)
    assert committed(mem) == 11 * PAGE
    info = mem.info()
    assert regions(info.base, info.base + info.committed) == [(11 * PAGE, MEM_COMMIT, PAGE_READWRITE, start)]
    assert query(info.base + info.committed).state == MEM_RESERVE
    mem.close()
    assert all(state == MEM_FREE for _, state, _, _ in regions(start, end))


def test_growth_past_the_capacity_moves_the_bytes_and_frees_the_old_reservation_whole():
    with linmem.create(PAGE, reserve=PAGE, may_move=True) as mem:
        old = whole(mem)
        mem.write(0, b"first")
        mem.grow_to(1 << 20)
        assert mem.read(0, 5) == b"first"
        assert mem.read(PAGE, 5) == bytes(5)
        assert whole(mem) != old
        assert all(state == MEM_FREE for _, state, _, _ in regions(*old))


def test_virtual_query_shows_the_protection_of_protect():
    with linmem.create(4 * PAGE) as mem:
        base = mem.as_ptr()
        for access, expected in (("r", PAGE_READONLY), ("none", PAGE_NOACCESS), ("rw", PAGE_READWRITE)):
            mem.protect(PAGE, PAGE, access)
            assert [query(base + i * PAGE).access for i in range(3)] == [PAGE_READWRITE, expected, PAGE_READWRITE]


# -- discard --------------------------------------------------------------------------------------------

def test_discard_zeroes_gives_the_pages_back_and_keeps_the_charge():
    size = 3 << 20
    with linmem.create(size) as mem:
        base = mem.as_ptr()
        view = memoryview(mem)
        view[:] = b"\xff" * size
        assert resident(base, size) == size
        mem.discard()
        assert resident(base, size) == 0
        assert regions(base, base + size) == [(size, MEM_COMMIT, PAGE_READWRITE, whole(mem)[0])]
        assert view.tobytes() == bytes(size)
        view.release()


def test_a_view_read_by_another_thread_never_faults_while_pages_are_discarded():
    # discard releases the GIL, so the reader runs during the discard.
    assert support.answer("""
        import threading
        import linmem
        mem = linmem.create(1 << 20)
        view = memoryview(mem)
        done = threading.Event()
        def read():
            while not done.is_set():
                bytes(view)
        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(300):
            mem.discard()
        done.set()
        reader.join()
        print(any(view))
        """) == "False"


# -- faults ---------------------------------------------------------------------------------------------

GUARDED = f"""
    import ctypes
    import linmem
    mem = linmem.create({PAGE}, reserve={GIB}, guard={1 << 20})
    info = mem.info()
    # The getter and the setter of a ctypes value access the byte themselves. A foreign call, like ctypes.memset,
    # would convert the fault to an exception.
    def read(address):
        return ctypes.c_ubyte.from_address(address).value
    def write(address):
        ctypes.c_ubyte.from_address(address).value = 1
    write(info.base)
    write(info.base + info.committed - 1)
    assert read(info.base) == 1
    print("alive", flush=True)
    """


@pytest.mark.parametrize("touch", ["read", "write"])
@pytest.mark.parametrize("where", [
    "info.base - 1",
    "info.base - info.pre_guard",
    "info.base + info.committed",
    "info.base + info.byte_capacity - 1",
    "info.base + info.byte_capacity",
    "info.base + info.byte_capacity + info.guard - 1",
])
def test_an_access_to_a_guard_ends_a_child_with_an_access_violation(touch, where):
    done = support.run_child(support.textwrap.dedent(GUARDED) + f"{touch}({where})\nprint('survived', flush=True)\n")
    assert done.stdout.strip() == "alive", done.stdout + done.stderr
    assert done.returncode & 0xFFFFFFFF == ACCESS_VIOLATION, done.stderr


def test_a_write_to_a_protected_page_ends_a_child_with_an_access_violation():
    done = support.run_child(support.textwrap.dedent(GUARDED)
                             + f"view = memoryview(mem)\nmem.protect(0, {PAGE}, 'r')\nread(info.base)\nview[0] = 2\n")
    assert done.stdout.strip() == "alive", done.stdout + done.stderr
    assert done.returncode & 0xFFFFFFFF == ACCESS_VIOLATION, done.stderr


def test_an_out_of_bounds_access_of_wasm_traps_in_a_memory_that_linmem_owns():
    wasmtime = pytest.importorskip("wasmtime")
    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.MmapCreator())       # keeps no memory after the store is closed
    store = wasmtime.Store(wasmtime.Engine(config))
    module = wasmtime.Module(store.engine, """(module
      (memory (export "memory") 1 3)
      (func (export "load") (param i32) (result i32) (i32.load (local.get 0)))
      (func (export "store") (param i32) (i32.store (local.get 0) (i32.const 7))))""")
    exports = wasmtime.Instance(store, module, []).exports(store)
    mem = linmem.wasmtime.linear_memory(store, exports["memory"])
    for at in (65533, 65536, 1 << 20, -4) * 10:
        for name in ("load", "store"):
            with pytest.raises(wasmtime.Trap, match="out of bounds memory access"):
                exports[name](store, at)
    exports["memory"].grow(store, 1)
    exports["store"](store, 65536)
    assert mem[65536] == 7
    with pytest.raises(wasmtime.Trap, match="out of bounds memory access"):
        exports["store"](store, 131072)
    start, end = whole(mem)
    del exports
    store.close()
    mem.close()
    assert all(state == MEM_FREE for _, state, _, _ in regions(start, end))


# -- refusals ---------------------------------------------------------------------------------------------

def test_windows_refuses_to_commit_past_the_end_of_a_reservation():
    with linmem.create(PAGE, reserve=1 << 20, guard=PAGE) as mem:
        _, end = whole(mem)
        k = kernel32()
        k.VirtualAlloc.restype = ctypes.c_void_p
        last = end - PAGE
        assert k.VirtualAlloc(ctypes.c_void_p(last), ctypes.c_size_t(GRANULARITY + PAGE), MEM_COMMIT,
                              PAGE_READWRITE) is None
        assert ctypes.get_last_error() == ERROR_INVALID_ADDRESS
        assert query(last).state == MEM_RESERVE


@pytest.mark.parametrize("reserve", [1 << 47, 1 << 52, (1 << 62)])
def test_a_reservation_larger_than_the_address_space_is_a_page_error_without_a_leak(reserve):
    before = addresses_in_use()
    with pytest.raises(linmem.PageError, match="user addresses have 47 bits") as caught:
        linmem.create(PAGE, reserve=reserve)
    assert caught.value.winerror in NO_ADDRESSES
    assert caught.value.call == "reserve"
    assert caught.value.size > reserve
    assert isinstance(caught.value, MemoryError)
    gc.collect()
    assert addresses_in_use() - before < GIB


def test_a_creation_past_the_commit_limit_is_a_page_error_and_releases_its_reservation():
    size = commit_status().commit * 2 // GRANULARITY * GRANULARITY
    before = addresses_in_use()
    with pytest.raises(linmem.PageError) as caught:
        linmem.create(size, size)
    assert caught.value.winerror in NO_CHARGE
    assert (caught.value.call, caught.value.size) == ("commit", size)
    assert addresses_in_use() - before < size // 2


def test_a_growth_past_the_commit_limit_changes_nothing_and_a_smaller_one_still_works():
    size = commit_status().commit * 2 // GRANULARITY * GRANULARITY
    with linmem.create(PAGE, reserve=size) as mem:
        view = memoryview(mem)
        view[0] = 5
        with pytest.raises(linmem.PageError) as caught:
            mem.grow_to(size)
        assert caught.value.winerror in NO_CHARGE
        assert caught.value.call == "commit"
        assert mem.byte_size() == committed(mem) == PAGE
        mem.grow_to(1 << 20)
        assert (view[0], mem[PAGE], committed(mem)) == (5, 0, 1 << 20)
        view.release()


@pytest.mark.parametrize(("code", "name"), [
    (8, "ERROR_NOT_ENOUGH_MEMORY"), (14, "ERROR_OUTOFMEMORY"), (1450, "ERROR_NO_SYSTEM_RESOURCES"),
    (1453, "ERROR_WORKING_SET_QUOTA"), (1455, "ERROR_COMMITMENT_LIMIT"), (1816, "ERROR_NOT_ENOUGH_QUOTA"),
    (487, "ERROR_INVALID_ADDRESS"), (5, "ERROR_ACCESS_DENIED")])
@pytest.mark.parametrize(("nth", "call"), [(1, "reserve"), (2, "commit")])
def test_a_page_error_carries_the_code_of_windows_as_winerror(nth, call, code, name):
    with support.failing(nth, code) as failure, pytest.raises(linmem.PageError, match=name) as caught:
        linmem.create(PAGE, reserve=1 << 20)
    assert failure.happened
    error = caught.value
    assert (error.winerror, error.call) == (code, call)
    assert error.errno == (OSError(0, "", None, code).errno if code in (5, 487) else errno.ENOMEM)
    assert isinstance(error, MemoryError)
    again = pickle.loads(pickle.dumps(error))
    assert (again.winerror, again.errno, again.call, again.size, str(again)) == \
        (code, error.errno, error.call, error.size, str(error))


def test_an_error_caused_by_the_commit_limit_gives_its_figures():
    with support.failing(2, 1455), pytest.raises(linmem.PageError) as caught:
        linmem.create(PAGE, reserve=1 << 20)
    assert f"the commit limit is {commit_status().commit} bytes" in str(caught.value)


def test_after_die_quietly_a_crash_ends_the_process_immediately_with_the_faults_code():
    done = subprocess.run([sys.executable, "-c", "import ctypes\nfrom linmem._os import pages\npages.die_quietly()\n"
                           "ctypes.c_ubyte.from_address(8).value"], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.returncode & 0xFFFFFFFF == ACCESS_VIOLATION
    assert done.stderr == ""


def test_describe_names_the_commit_limit_and_no_limit_on_addresses():
    found = pages.describe()
    assert found["limits"]["commit limit"] == commit_status().commit
    assert found["address_space_left"] == found["address_space"] == 1 << found["address_bits"]


# -- images ---------------------------------------------------------------------------------------------

def mapped():
    """Bytes of section views: views of images, and all other mapped views of the process."""
    end = 1 << support.FLOOR["address_bits"]
    at, found = 0x10000, 0
    while at < end - 0x20000:
        r = query(at)
        found += r.size if r.type == MEM_MAPPED else 0
        at = r.base + r.size
    return found


IMAGE = 16 << 20
IMAGE_ACTS = {
    "make": lambda img, mem: linmem.Image.from_bytes(b"x" * IMAGE),
    "take": lambda img, mem: mem.snapshot(),
    "start from": lambda img, mem: img.new_memory().close(),
    "restore": lambda img, mem: mem.restore(img),
    "pool": lambda img, mem: img.new_memory(creator=linmem.creator("pool")).close(),
}


@pytest.mark.parametrize("kind", ["section", "private"])
@pytest.mark.parametrize("act", IMAGE_ACTS)
def test_a_refused_page_call_of_an_image_leaves_no_handle_no_view_and_no_addresses(act, kind):
    before = pages.choose_image(kind)
    try:
        img = linmem.Image.from_bytes(b"x" * IMAGE)
        mem = img.new_memory()
        IMAGE_ACTS[act](img, mem)
        opened, views, addresses = handles(), mapped(), addresses_in_use()
        for nth in range(1, 60):
            with support.failing(nth, ERROR_NOT_ENOUGH_MEMORY) as calls, contextlib.suppress(linmem.PageError):
                IMAGE_ACTS[act](img, mem)
            linmem.create(1).close()        # also releases the ranges whose release was refused
            gc.collect()
            assert (handles(), mapped()) == (opened, views), nth
            assert addresses_in_use() - addresses < IMAGE, nth
            if not calls.happened:
                return
        raise AssertionError("ever more page calls")
    finally:
        pages.choose_image(before)


@pytest.mark.parametrize("kind", ["section", "private"])
def test_a_write_to_an_image_ends_a_child_with_an_access_violation(kind):
    support.dies_at(support.TOUCH + f"""
import linmem
from linmem._os import pages
pages.choose_image({kind!r})
img = linmem.Image.from_bytes(b"x" * 10000)
view = memoryview(img)
holder = ctypes.py_object(view)
class Buffer(ctypes.Structure):
    _fields_ = [("buf", ctypes.c_size_t), ("rest", ctypes.c_size_t * 12)]
buffer = Buffer()
assert ctypes.pythonapi.PyObject_GetBuffer(holder, ctypes.byref(buffer), 0) == 0
assert peek(buffer.buf) == b"x"
""", "poke(buffer.buf)")


def test_an_image_is_one_section_and_one_view_of_it_which_go_with_the_image():
    before = pages.choose_image("section")
    try:
        opened, views = handles(), mapped()
        img = linmem.Image.from_bytes(b"x" * IMAGE)
        assert (len(handles() - opened), mapped() - views) == (1, IMAGE)
        with img.new_memory() as mem:
            assert (len(handles() - opened), mapped() - views) == (1, IMAGE)      # a memory copies from this view
            del img
            gc.collect()
            assert (mem[0], mem[IMAGE - 1]) == (ord("x"), ord("x"))
        gc.collect()
        assert (handles(), mapped()) == (opened, views)
    finally:
        pages.choose_image(before)


# -- the pool -------------------------------------------------------------------------------------------

def test_a_cold_slot_has_no_commit_charge_and_a_released_slot_is_unmapped():
    pool = linmem.PoolingCreator(max_unused_warm=0)
    for uses in range(3):
        with pool.create(4 * PAGE, reserve=64 * PAGE, guard=PAGE) as mem:
            assert committed(mem) == 4 * PAGE
            mem.grow_to(9 * PAGE)
            mem.write(0, b"x" * 9 * PAGE)
            start, end = whole(mem)
        assert (pool.stats()["hits"], pool.stats()["cold"]) == (uses, 1)
        assert {(state, allocation) for _, state, _, allocation in regions(start, end)} == {(MEM_RESERVE, start)}
    pool.trim()
    assert all(state == MEM_FREE for _, state, _, _ in regions(start, end))


@pytest.mark.parametrize("reset", ["zero", "discard"])
def test_a_warm_slot_is_inaccessible_beyond_its_minimum(reset):
    pool = linmem.PoolingCreator(reset=reset)
    for uses in range(3):
        with pool.create(4 * PAGE, reserve=64 * PAGE, guard=PAGE) as mem:
            base, (start, end) = mem.as_ptr(), whole(mem)
            mem.grow_to(9 * PAGE)
        assert (pool.stats()["hits"], pool.stats()["warm"]) == (uses, 1)
        assert regions(base, base + 4 * PAGE) == [(4 * PAGE, MEM_COMMIT, PAGE_READWRITE, start)]
        assert all(state == MEM_RESERVE or access == PAGE_NOACCESS
                   for _, state, access, _ in regions(start, base) + regions(base + 4 * PAGE, end))


# -- write watch -------------------------------------------------------------------------------------------

def written(mem):
    """The pages of a memory that GetWriteWatch lists, or None if the memory is not watched."""
    k = kernel32()
    most = len(mem) // PAGE
    found, count, unit = (ctypes.c_size_t * most)(), ctypes.c_size_t(most), ctypes.c_uint32()
    k.GetWriteWatch.argtypes = [ctypes.c_uint32, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p,
                                ctypes.c_void_p]
    if k.GetWriteWatch(0, mem.as_ptr(), len(mem), found, ctypes.byref(count), ctypes.byref(unit)):
        return None
    return [(at - mem.as_ptr()) // PAGE for at in found[:count.value]]


@requires("scans")
def test_only_memories_of_a_pool_that_asks_for_written_pages_are_watched():
    for watched, creator in [(True, linmem.PoolingCreator()), (True, linmem.PoolingCreator(reset="scan")),
                             (False, linmem.PoolingCreator(reset="zero")), (False, linmem.MmapCreator())]:
        with creator.create(1024 * PAGE) as mem:
            mem[7 * PAGE] = 1
            assert written(mem) == ([7] if watched else None)


@requires("scans")
def test_watched_pages_are_kept_through_a_reset_and_forgotten_when_they_are_given_back():
    pool = linmem.PoolingCreator(reset="scan", check=True)
    for pages_written in ([3, 900], [3], [4]):
        with pool.create(1024 * PAGE) as mem:
            for page in pages_written:
                mem[page * PAGE + 5] = 1
    with pool.create(1024 * PAGE) as mem:
        assert written(mem) == [3, 4, 900]
        assert resident(mem.as_ptr() + 3 * PAGE, 2 * PAGE) == 2 * PAGE
    assert pool.stats()["resets"] == {"scan": 4, "zero": 0, "discard": 0}
    few = linmem.PoolingCreator(reset="scan", keep_resident=2 * PAGE)
    for pages_written, left in (([1, 2], [1, 2]), ([3], [])):
        with few.create(1024 * PAGE) as mem:
            for page in pages_written:
                mem[page * PAGE] = 1
        with few.create(1024 * PAGE) as mem:
            assert written(mem) == left


@requires("scans")
def test_a_page_that_was_only_read_is_not_listed():
    with linmem.PoolingCreator().create(64 * PAGE) as mem:
        assert mem[::PAGE] == bytes(64)
        assert written(mem) == []


# -- shared memories: sections

def shared(size=65536, maximum=16 << 20, **options):
    return linmem.create(size, maximum, creator=linmem.creator("shared", **options))


def parts(mem):
    """The reservation of a memory: (size, state, whether it is a view of a section) of each region."""
    found, (start, end) = [], whole(mem)
    while start < end:
        r = query(start)
        size = min(r.base + r.size, end) - start
        found.append((size, r.state, r.type == MEM_MAPPED))
        start += size
    return found


def test_a_shared_memory_is_a_view_of_a_section_between_reserved_pages():
    mem = shared()
    start, end = whole(mem)
    info = mem.info()
    # The view is longer than the capacity, by a unit of the granularity.
    ends = [(info.pre_guard, MEM_RESERVE, False), (info.guard - GRANULARITY, MEM_RESERVE, False)]
    shown = (16 << 20) + GRANULARITY
    assert parts(mem) == [ends[0], (65536, MEM_COMMIT, True), (shown - 65536, MEM_RESERVE, True), ends[1]]
    other = linmem.attach(mem.handle())
    other.grow_to(1 << 20)
    assert len(mem) == 1 << 20
    assert parts(mem) == [ends[0], (1 << 20, MEM_COMMIT, True), (shown - (1 << 20), MEM_RESERVE, True), ends[1]]
    mem.close()
    assert (query(start).state, query(end - 1).state) == (MEM_FREE, MEM_FREE)
    assert other.read((1 << 20) - 1, 1) == b"\0"


def test_pages_that_were_hidden_are_accessible_again_with_their_bytes():
    mem = shared()
    mem.write(0, b"bytes")
    other = linmem.attach(mem.handle())
    other.protect(0, PAGE, "none")
    assert query(other.as_ptr()).access == PAGE_NOACCESS
    assert query(mem.as_ptr()).access == PAGE_READWRITE
    other.protect(0, PAGE, "rw")
    assert other.read(0, 5) == b"bytes"


def test_each_place_that_another_thread_takes_is_given_up_for_another_one():
    """Threads reserve and release addresses while memories are placed: each memory is whole, and none is lost."""
    import threading

    library, end = kernel32(), threading.Event()
    library.VirtualAlloc.restype = ctypes.c_void_p

    def reserve():
        while not end.is_set():
            places = [library.VirtualAlloc(None, ctypes.c_size_t(size), MEM_RESERVE, PAGE_NOACCESS)
                      for size in (65536, 1 << 20, 17 << 20)]
            for place in places:
                assert library.VirtualFree(ctypes.c_void_p(place), ctypes.c_size_t(0), 0x8000)

    threads = [threading.Thread(target=reserve) for _ in range(2)]
    for thread in threads:
        thread.start()
    before = pages.describe()["reserved"]
    try:
        for _ in range(200):
            with shared() as mem:
                assert [mapped for _, _, mapped in parts(mem)] == [False, True, True, False]
    finally:
        end.set()
        for thread in threads:
            thread.join()
    assert pages.describe()["reserved"] == before


def test_a_named_memory_lives_as_long_as_a_process_has_it():
    name = f"linmem-test-{os.getpid()}"
    mem = shared(shm_name=name)
    mem.write(0, b"named")
    other = linmem.attach(name)
    with pytest.raises(FileExistsError, match="a shared memory of this shm_name exists already"):
        shared(shm_name=f"/{name}")
    with pytest.raises(TypeError, match="the name is gone when no process has the memory"):
        mem.unlink()
    mem.close()
    assert (linmem.attach(other.handle()).read(0, 5), linmem.attach(name).read(0, 5)) == (b"named", b"named")
    other.close()
    gc.collect()
    with pytest.raises(FileNotFoundError, match=f"no process of this session has a shared memory of the name '{name}'"):
        linmem.attach(name)
    shared(shm_name=name)


def test_a_forged_handle_attaches_no_section():
    import mmap

    from linmem._core.section_handles import SectionHandle

    mem, named = shared(), shared(shm_name="linmem-test-forged")
    tag = f"{pages.NAMES}name-linmem-test-other"
    with mmap.mmap(-1, 1 << 17, tag):       # a section that linmem did not make
        for forged in (SectionHandle(1, 2, bytes(32)), SectionHandle(1, 2, bytes(32), "linmem-test-forged"),
                       SectionHandle(1, 2, mem.handle()._token, "linmem-test-forged"),
                       SectionHandle(1, 2, mem.handle()._token, "linmem-test-other")):
            with pytest.raises(FileNotFoundError, match="is gone"):
                linmem.attach(forged)
        with pytest.raises(ValueError, match="must be a shared memory of linmem, and the name is that of something"):
            linmem.attach("linmem-test-other")
    with pytest.raises(ValueError, match="name of a handle must be 1 to 255 bytes"):
        SectionHandle(1, 2, bytes(32), "a\\b/c")
    with pytest.raises(ValueError, match="fileno\\(\\) is not supported on this system"):
        mem.handle().fileno()
    named.close()


def test_the_control_words_of_a_section_that_is_too_small_are_refused():
    mem = shared(65536, 1 << 20)
    library = kernel32()
    library.OpenFileMappingW.restype = library.CreateFileMappingW.restype = ctypes.c_void_p
    section = library.CreateFileMappingW(ctypes.c_void_p(-1), None, PAGE_READWRITE | 0x4000000, 0, 0x20000,
                                         f"{pages.NAMES}name-linmem-test-small")
    try:
        with pytest.raises(ValueError, match="must be a shared memory of linmem, and the file does not begin as one"):
            linmem.attach("linmem-test-small")
        import mmap
        with mmap.mmap(-1, 1 << 17, f"{pages.NAMES}name-linmem-test-small") as small, \
                mmap.mmap(-1, 65536, f"{pages.NAMES}{mem.handle()._name}") as words:
            small[:PAGE] = words[:PAGE]
        with linmem.attach("linmem-test-small") as other:       # the words say 64 KiB, and the section has them
            assert len(other) == 65536
            with pytest.raises(linmem.PageError, match="the section has no more pages"):
                other.grow_to(1 << 20)
            assert len(other) == 65536
    finally:
        library.CloseHandle(ctypes.c_void_p(section))


def test_processes_that_are_killed_while_they_grow_a_memory_leave_one_that_others_grow():
    mem = shared(PAGE, 1 << 30)
    code = """
        import pickle, sys, linmem
        mem = linmem.attach(pickle.loads(bytes.fromhex(sys.argv[1])))
        print("growing", flush=True)
        while True:
            try:
                mem.grow_to(len(mem) + 4096)
                mem[len(mem) - 1] = 1
            except ValueError:      # another process was faster
                pass
    """
    for _ in range(4):
        children = [support.start_child(code, pickle.dumps(mem.handle()).hex()) for _ in range(2)]
        for child in children:
            assert child.stdout.readline() == "growing\n"
        for child in children:
            child.kill()
            child.communicate()
        before = len(mem)
        mem.grow_to(before + PAGE)
        assert (mem[before], mem[before - 1] in (0, 1)) == (0, True)
    assert len(linmem.attach(mem.handle())) == len(mem) > 4 * PAGE


def test_a_window_of_a_section_is_refused_with_the_way_out():
    mem = linmem.create(65536)
    mem.write(0, b"before")
    with pytest.raises(TypeError, match=r"map of a shared memory is not supported on this system.*mem\.write"):
        mem.map(0, shared(), 0, 65536)
    assert mem.read(0, 6) == b"before"
    with pytest.raises(TypeError, match="a memory of a file is not supported on this system"):
        linmem.open_file("linmem-test.bin")
    assert not os.path.exists("linmem-test.bin")


@pytest.mark.parametrize("bad", ["a\\b", "lone\ud800"])
def test_a_name_that_no_section_can_have_is_refused(bad):
    with pytest.raises(ValueError, match=r"shm_name must be 1 to 255 bytes without .* backslashes and lone surrogates"):
        linmem.creator("shared", shm_name=bad)
    with pytest.raises(ValueError, match="attach must be 1 to 255 bytes"):
        linmem.attach(bad)
