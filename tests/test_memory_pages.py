"""Pages: guards, protection, discard, prefault, info, the kernel's own view of a memory."""

import ctypes
import mmap
import os

import pytest
from support import (
    FLOOR,
    LIBC,
    NAME,
    NEEDS,
    PAGE,
    REAL_PAGE,
    TOUCH,
    dies_at,
    inaccessible,
    mappings,
    requires,
    resident,
    run_child,
    smaps,
    whole,
)

import linmem

SETUP = TOUCH + f"""
import linmem
mem = linmem.create({PAGE + 5}, maximum={8 * PAGE}, guard={2 * PAGE})
info = mem.info()
first, last = info.base - info.pre_guard, info.base - info.pre_guard + info.reserved - 1
assert peek(info.base) == bytes(1)
poke(info.base + info.committed - 1)
"""


@pytest.mark.parametrize("touch", ["peek", "poke"])
@pytest.mark.parametrize("where", ["info.base - 1", "first", "info.base + info.committed",
                                   "info.base + info.byte_capacity - 1", "info.base + info.byte_capacity", "last"])
def test_an_access_to_inaccessible_pages_is_a_fault(touch, where):
    dies_at(SETUP, f"{touch}({where})")


def test_an_empty_memory_faults_at_its_first_byte():
    dies_at("import ctypes, linmem; mem = linmem.create(0)", "ctypes.c_char.from_address(mem.as_ptr()).value")


def test_a_move_places_the_guards_at_the_new_address():
    moved = (f"import ctypes, linmem; mem = linmem.create({PAGE}, {9 * PAGE}, reserve=0, may_move=True);"
             f" mem[0] = 1; mem.grow_to({2 * PAGE})")
    dies_at(moved, "ctypes.c_char.from_address(mem.as_ptr() - 1).value")
    dies_at(moved, f"ctypes.c_char.from_address(mem.as_ptr() + {2 * PAGE}).value")
    dies_at(moved, "i = mem.info(); ctypes.c_char.from_address(i.base + i.byte_capacity + i.guard - 1).value")
    fatal = "ctypes.c_char.from_address(old).value"
    dies_at(f"old = 0\n{moved.replace('; mem[0] = 1', '; old = mem.as_ptr()')}", fatal)


@requires("regions")
def test_every_address_promised_to_native_code_is_reserved_and_faults_or_is_accessible():
    for minimum, maximum, guard in ((0, None, 0), (PAGE + 1, 5 * PAGE, 3 * PAGE), (PAGE, PAGE, PAGE)):
        with linmem.create(minimum, maximum, guard=guard) as mem:
            accessible = mem.wasm_accessible()
            info = mem.info()
            assert accessible == range(info.base, info.base + info.byte_capacity + guard)
            found = mappings(*whole(mem))
            assert sum(m.size for m in found) == info.reserved      # no gaps
            for m in found:
                inside = info.base <= m.start < info.base + info.committed
                assert m.access == ("rw-p" if inside else "---p")


@requires("maps")
def test_a_memory_is_at_most_two_kernel_mappings_more_than_its_accessible_one():
    with linmem.create(PAGE, maximum=512 * PAGE) as mem:
        for n in range(2, 200):
            mem.grow_to(n * PAGE)
            mem[(n - 1) * PAGE] = n % 256
            assert len(mappings(*whole(mem))) <= 3
        mem.discard(PAGE, 20 * PAGE)
        assert len(mappings(*whole(mem))) <= 3
        mem.grow_to(512 * PAGE)
        assert len(mappings(*whole(mem))) <= 3


@requires("maps")
def test_a_memory_that_moved_has_at_most_one_additional_mapping():
    with linmem.create(PAGE, maximum=512 * PAGE, reserve=0, may_move=True) as mem:
        mem[0] = 1
        for n in range(2, 200):
            mem.grow_to(n * PAGE)
            mem[(n - 1) * PAGE] = n % 256
            assert len(mappings(*whole(mem))) <= 4


@requires("names")
def test_the_mappings_of_a_memory_carry_a_name():
    with linmem.create(PAGE, maximum=4 * PAGE) as mem:
        mem.grow_to(2 * PAGE)
        assert {m.name for m in mappings(*whole(mem))} == {NAME}


# -- the kernel ------------------------------------------------------------------------------------

def kernel_can():
    """What the kernel of this machine can do, without linmem: the answers to Python's own calls."""
    page = mmap.PAGESIZE
    PR_SET_VMA, PR_SET_VMA_ANON_NAME, MADV_DONTNEED, MADV_POPULATE_WRITE = 0x53564D41, 0, 4, 23
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, page, private) as moved, mmap.mmap(-1, 3 * page, private) as region:
        moved.resize(2 * page)      # mremap(2)
        region[page] = 1
        field = ctypes.c_char.from_buffer(region)
        base = ctypes.addressof(field)
        del field
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(base // page * 8)
            untouched, touched = memoryview(pagemap.read(16)).cast("Q")
        start, length = ctypes.c_void_p(base + 2 * page), ctypes.c_size_t(page)
        return {"moves": len(moved) == 2 * page,
                "scans": untouched >> 63 == 0 and touched >> 63 == 1,       # bit 63: the page is present
                "names": LIBC.prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, start, length, b"linmem") == 0,
                "populates": LIBC.madvise(start, length, MADV_POPULATE_WRITE) == 0,
                "discard_any_protection": (LIBC.mprotect(start, length, mmap.PROT_READ) == 0
                                           and LIBC.madvise(start, length, MADV_DONTNEED) == 0)}


@requires("maps")
@pytest.mark.skipif(os.environ.get("LINMEM_TEST_WITHOUT") == "linux", reason="this build has not what only Linux has")
def test_linmem_uses_what_the_kernel_has():
    # Other tests skip if linmem says that the machine lacks a capability. So this test does not ask linmem.
    expected = kernel_can()
    assert {name: FLOOR["capabilities"][name] for name in expected} == expected
    for name in ("maps_images", "shares", "adopts_files"):
        assert FLOOR["capabilities"][name], name


# -- protect ---------------------------------------------------------------------------------------

@requires("regions")
def test_the_kernel_shows_the_protection_of_protect():
    with linmem.create(4 * PAGE) as mem:
        base = mem.as_ptr()
        mem.write(PAGE, b"kept")
        code = [("rx", "r-xp")] if NEEDS["code"][0] else []
        for access, shown in (("r", "r--p"), ("none", "---p"), *code, ("rw", "rw-p")):
            mem.protect(PAGE, 2 * PAGE, access)
            assert {m.access for m in mappings(base + PAGE, base + 3 * PAGE)} == {shown}
            for edge in (base, base + 3 * PAGE):
                assert {m.access for m in mappings(edge, edge + PAGE)} == {"rw-p"}
        assert mem.read(PAGE, 4) == b"kept"
        mem.grow_to(8 * PAGE)
        assert mem.read(PAGE, 5) == b"kept\0"


def test_a_memory_is_like_any_other_after_its_protection_is_lifted():
    for size in (2 * PAGE, 2 * PAGE + 10):
        with linmem.create(size) as mem:
            image = mem.snapshot()
            mem.protect(0, PAGE, "none")
            with pytest.raises(TypeError, match=rf"protect\(0, {2 * PAGE}, 'rw'\)"):
                mem.snapshot()
            mem.protect(0, 2 * PAGE, "rw")
            assert mem.snapshot() == image


@pytest.mark.parametrize(("access", "fatal"), [("none", "bytes(mem)"), ("none", "memoryview(mem)[5]"),
                                               ("r", "memoryview(mem)[5] = 1")])
def test_an_access_through_a_view_against_the_protection_is_a_fault(access, fatal):
    dies_at(f"import linmem; mem = linmem.create({2 * PAGE}); mem.protect(0, {PAGE}, '{access}'); mem[{PAGE}] = 1",
            fatal)


@requires("discard_any_protection")
def test_protected_pages_can_be_discarded_and_keep_their_protection():
    with linmem.create(3 * PAGE + 10) as mem:
        mem.write(0, b"x" * (3 * PAGE + 10))
        mem.protect(PAGE, PAGE, "r")
        with pytest.raises(ValueError, match="offset and size must be multiples"):
            mem.discard(1, 2 * PAGE)
        assert mem[1] == ord("x")
        mem.discard()
        assert not any(mem)
        mem.protect(PAGE, PAGE, "rw")
        mem[PAGE] = 1


@requires("populates")
@pytest.mark.parametrize("access", ["r", "none"])
def test_prefault_of_pages_that_cannot_be_written_is_an_error_and_no_fault(access):
    with linmem.create(3 * PAGE) as mem:
        mem.protect(PAGE, PAGE, access)
        with pytest.raises(linmem.PageError) as caught:
            mem.prefault()
        assert (caught.value.call, caught.value.size) == ("prefault", 3 * PAGE)


# -- resident pages ----------------------------------------------------------------------------------

@requires("smaps")
@pytest.mark.parametrize("pages", [4095, 4096, 4097, 8192, 8193])
def test_the_resident_pages_are_counted_exactly_on_both_sides_of_each_step(pages):
    # linmem asks the OS for 4096 pages at a time. The OS refuses a request that is larger than the buffer for its
    # answer.
    with linmem.create(pages * REAL_PAGE) as mem:
        touched = [page for page in (0, 4094, 4095, 4096, 8191, 8192) if page < pages]
        for page in touched:
            mem[page * REAL_PAGE] = 1
        assert mem.info().resident == resident(mem) == len(touched) * REAL_PAGE


@requires("smaps")
def test_discard_gives_the_pages_back_and_they_read_as_zero():
    pages = 64
    with linmem.create(pages * PAGE + 9) as mem:
        mem.write(0, b"x" * len(mem))
        assert resident(mem) >= pages * PAGE
        assert mem.info().resident == resident(mem)
        mem.discard(PAGE // 2, 32 * PAGE)
        assert resident(mem) <= (pages - 31) * PAGE + PAGE
        assert mem.read(PAGE // 2, 32 * PAGE) == bytes(32 * PAGE)
        assert mem.read(0, PAGE // 2) == b"x" * (PAGE // 2)
        assert mem.read(PAGE // 2 + 32 * PAGE, 8) == b"x" * 8
        mem.discard()
        assert not any(mem)
        assert mem.byte_size() == pages * PAGE + 9


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (5, 0), (1, 1), (PAGE - 1, 2), (3, PAGE), (PAGE, PAGE),
                                              (0, PAGE + 1), (PAGE - 1, 2 * PAGE + 2), (3 * PAGE, 7)])
def test_discard_zeroes_exactly_the_bytes_named(offset, size):
    with linmem.create(3 * PAGE + 7) as mem:
        model = bytearray(b"x" * len(mem))
        mem.write(0, model)
        with memoryview(mem) as view:
            mem.discard(offset, size)
            model[offset:offset + size] = bytes(size)
            assert view == model
        mem.discard(2 * PAGE)
        model[2 * PAGE:] = bytes(PAGE + 7)
        assert bytes(mem) == model


@requires("smaps")
def test_prefault_makes_pages_resident_and_changes_no_byte():
    with linmem.create(64 * PAGE) as mem:
        assert resident(mem) == mem.info().resident == 0
        mem.write(3 * PAGE, b"kept")
        mem.prefault(2 * PAGE + 1, PAGE)
        assert resident(mem) == mem.info().resident == 2 * PAGE
        mem.prefault()
        assert resident(mem) == mem.info().resident == 64 * PAGE
        assert mem.read(3 * PAGE, 5) == b"kept\0"


@requires("smaps")
def test_info_agrees_with_the_kernel():
    with linmem.create(10 * PAGE + 1, maximum=100 * PAGE, guard=4 * PAGE) as mem:
        mem.write(0, b"x" * (2 * PAGE + 1))
        with memoryview(mem):
            info = mem.info()
        found = mappings(*whole(mem))
        assert info.reserved == sum(m.size for m in found) == info.pre_guard + info.byte_capacity + info.guard
        assert info.committed == sum(m.size for m in found if m.access == "rw-p") == 11 * PAGE
        assert info.resident == resident(mem) >= 2 * PAGE + REAL_PAGE
        assert sum(m.size for m in smaps(*whole(mem)) if m.access == "---p") >= inaccessible(mem) - info.pre_guard
        assert (info.base, info.byte_size, info.byte_capacity) == (mem.as_ptr(), 10 * PAGE + 1, 100 * PAGE)
        assert (info.maximum_byte_size, info.guard, info.pre_guard) == (100 * PAGE, 4 * PAGE, 4 * PAGE)
        assert (info.page_size, info.exports, info.kind, info.owner) == (PAGE, 1, "mmap", "python")


@requires("core_files", "rlimits")
def test_a_core_dump_leaves_out_inaccessible_pages(tmp_path):
    done = run_child("""
        import linmem, os
        mem = linmem.create(64 << 20, reserve=64 << 30)
        mem.write(0, b"x" * (1 << 20))
        os.abort()
        """, limits={"RLIMIT_CORE": 8 << 30}, cwd=tmp_path)
    assert done.returncode < 0
    cores = list(tmp_path.glob("core*"))
    assert len(cores) == 1
    assert cores[0].stat().st_size < 4 << 30        # some interpreters reserve a GiB themselves
