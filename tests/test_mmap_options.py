"""New memories with resident pages, and memories of huge pages."""

import ctypes
import errno
import itertools

import pytest
from support import (
    FLOOR,
    NEEDS,
    PAGE,
    accessible_parts,
    check_fresh,
    failing,
    live_bytes,
    requires,
    resident,
    resident_within,
    round_up,
    smaps,
    whole,
)

import linmem

HUGE = FLOOR["huge_page"]
MIB = 1 << 20
OPTIONS = [dict(zip(("prefault", "huge_pages"), on, strict=True))
           for on in itertools.product((False, True), repeat=2)]


def live():
    return live_bytes() if NEEDS["maps"][0] else 0


@pytest.mark.parametrize("options", OPTIONS)
def test_a_creator_shows_its_options(options):
    creator = linmem.MmapCreator(**options)
    on = [f"{name}=True" for name, value in options.items() if value]
    assert repr(creator) == f"MmapCreator({', '.join(on)})"
    assert {name: getattr(creator, name) for name in options} == options
    assert repr(linmem.creator("mmap", **options)) == repr(creator)


@pytest.mark.parametrize("name", ["prefault", "huge_pages"])
@pytest.mark.parametrize("value", [None, 1, 0, "yes", []])
def test_an_option_that_is_not_a_bool_is_a_type_error(name, value):
    with pytest.raises(TypeError, match=f"{name} must be True or False, got "):
        linmem.MmapCreator(**{name: value})
    with pytest.raises(AttributeError):
        setattr(linmem.MmapCreator(), name, True)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("minimum", "how"), [
    (0, {}), (1, {}), (3 * PAGE + 1, {"maximum": 9 * PAGE}), (5 * PAGE, {"reserve": 100 * PAGE, "guard": 0}),
    (PAGE, {"reserve": 3 * MIB, "guard": 2 * PAGE}), (3 * MIB, {"maximum": 5 * MIB, "guard": PAGE}),
])
def test_a_memory_of_any_option_is_a_memory_like_any_other(options, minimum, how):
    with linmem.MmapCreator(**options).create(minimum, **how) as mem:
        check_fresh(mem, minimum)
        info = mem.info()
        assert info.byte_capacity >= max(minimum, how.get("reserve", 0), 1)
        assert info.guard >= how.get("guard", PAGE)
        assert info.pre_guard >= max(PAGE, how.get("guard", PAGE))
        assert info.reserved == info.pre_guard + info.byte_capacity + info.guard
        assert mem.wasm_accessible() == range(info.base, info.base + info.byte_capacity + info.guard)
        larger = min(minimum + 2 * PAGE + 3, info.byte_capacity)
        mem.write(0, b"x" * minimum)
        with memoryview(mem):
            mem.grow_to(larger)
        assert mem.as_ptr() == info.base
        assert bytes(mem) == b"x" * minimum + bytes(larger - minimum)
        if NEEDS["regions"][0]:
            assert accessible_parts(mem) == [(0, round_up(larger), "rw-p")]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_whole_reservation_of_a_memory_is_released(options):
    start = live()
    for how in ({"reserve": 0}, {"maximum": 8 * MIB}, {"guard": 16 * PAGE}):
        mem = linmem.MmapCreator(**options).create(PAGE, may_move=True, **how)
        mem.grow_to(7 * MIB)
        mem.close()
    assert live() == start


# -- prefault ------------------------------------------------------------------------------------------

@requires("smaps")
@pytest.mark.parametrize("minimum", [0, 1, PAGE, 64 * PAGE, 2 * MIB + 1])
def test_every_page_is_resident_after_creation_and_after_each_growth(minimum):
    with linmem.MmapCreator(prefault=True).create(minimum, maximum=8 * MIB) as mem:
        assert resident(mem) == round_up(minimum) == mem.info().resident
        for size in (minimum + 1, minimum + PAGE, minimum + 10 * PAGE + 7, 3 * MIB, 3 * MIB):
            mem.grow_to(max(size, mem.byte_size()))
            assert resident(mem) == mem.info().committed >= size
        assert bytes(mem).count(0) == mem.byte_size()


@requires("smaps")
def test_without_prefault_a_page_is_resident_once_it_is_touched():
    with linmem.MmapCreator().create(64 * PAGE, maximum=128 * PAGE) as mem:
        mem.grow_to(128 * PAGE)
        assert resident(mem) == 0
        mem[5] = 1
        assert 0 < resident(mem) <= PAGE


@requires("smaps")
def test_a_prefaulted_memory_is_resident_after_a_move():
    with linmem.MmapCreator(prefault=True).create(4 * PAGE, reserve=4 * PAGE, may_move=True) as mem:
        mem.write(0, b"kept" * PAGE)
        base = mem.as_ptr()
        mem.grow_to(64 * PAGE)
        assert mem.as_ptr() != base
        assert resident(mem) == 64 * PAGE
        assert bytes(mem) == b"kept" * PAGE + bytes(60 * PAGE)


# -- huge pages --------------------------------------------------------------------------------------------

@requires("huge_pages")
@pytest.mark.parametrize("how", [{}, {"maximum": 4 * MIB}, {"reserve": 1 << 30}, {"reserve": 0}, {"guard": 0},
                                 {"maximum": 3 * MIB, "guard": 5 * PAGE}])
def test_the_base_is_a_multiple_of_a_huge_page_and_the_kernel_was_told(how):
    mems = [linmem.MmapCreator(huge_pages=True).create(PAGE, **how) for _ in range(3)]
    for mem in mems:
        assert mem.as_ptr() % HUGE == 0
        info = mem.info()
        found = smaps(info.base, info.base + info.committed)
        assert found
        assert all("hg" in m.flags for m in found)
        mem.close()


@requires("huge_pages")
def test_writing_two_huge_pages_brings_some_in():
    with linmem.MmapCreator(huge_pages=True).create(4 * MIB + 2 * HUGE, maximum=64 * MIB) as mem:
        mem.write(0, b"x" * (4 * MIB))
        found = smaps(mem.as_ptr(), mem.as_ptr() + mem.info().committed)
        assert sum(m.figures["AnonHugePages"] for m in found) > 0
        mem.discard()
        assert sum(m.figures["AnonHugePages"]
                   for m in smaps(mem.as_ptr(), mem.as_ptr() + mem.info().committed)) == 0
        assert bytes(mem).count(0) == mem.byte_size()


@requires("huge_pages")
def test_without_the_option_the_kernel_is_not_told():
    with linmem.create(4 * MIB, maximum=8 * MIB) as mem:
        assert not any("hg" in m.flags for m in smaps(*whole(mem)))


@requires("huge_pages")
def test_growth_in_place_keeps_to_huge_pages_and_the_guard_exact():
    with linmem.MmapCreator(huge_pages=True).create(PAGE, maximum=16 * MIB) as mem:
        base = mem.as_ptr()
        mem.grow_to(8 * MIB + PAGE)
        mem.write(0, b"x" * (8 * MIB))
        assert mem.as_ptr() == base
        assert accessible_parts(mem) == [(0, 8 * MIB + PAGE, "rw-p")]
        (part,) = smaps(base, base + 8 * MIB + PAGE)
        assert "hg" in part.flags
        assert part.figures["AnonHugePages"] > 0
        # The part of a huge page past the size is inaccessible and not resident.
        assert resident_within(base + 8 * MIB + PAGE, base + 16 * MIB) == 0


@requires("huge_pages")
def test_a_memory_of_huge_pages_has_huge_pages_after_a_move():
    with linmem.MmapCreator(huge_pages=True).create(4 * MIB, reserve=4 * MIB, may_move=True) as mem:
        mem.write(0, b"kept" * MIB)
        base = mem.as_ptr()
        mem.grow_to(16 * MIB)
        assert mem.as_ptr() != base
        assert mem.as_ptr() % HUGE == 0
        mem.write(4 * MIB, b"more" * (3 * MIB))
        assert bytes(mem) == b"kept" * MIB + b"more" * (3 * MIB)
        found = smaps(mem.as_ptr(), mem.as_ptr() + 16 * MIB)
        assert all("hg" in m.flags for m in found)
        assert sum(m.figures["AnonHugePages"] for m in found) > 4 * MIB


@requires("huge_pages")
def test_a_refused_wish_for_huge_pages_is_a_memory_of_small_ones():
    with failing(2, errno.EINVAL) as injected:
        mem = linmem.MmapCreator(huge_pages=True).create(4 * MIB, reserve=8 * MIB, may_move=True)
    assert injected.happened
    with mem:
        assert mem.as_ptr() % HUGE == 0
        check_fresh(mem, 4 * MIB)
        assert not any("hg" in m.flags for m in smaps(*whole(mem)))


@requires("huge_pages", "maps")
def test_an_idle_slot_of_huge_pages_is_of_huge_pages_when_it_is_used_again():
    for warm in (100, 0):
        pool = linmem.PoolingCreator(linmem.MmapCreator(huge_pages=True), max_unused_warm=warm)
        for n in range(3):
            with pool.create(4 * MIB, maximum=16 * MIB) as mem:
                mem.write(0, b"x" * (4 * MIB))
                (part,) = smaps(mem.as_ptr(), mem.as_ptr() + 4 * MIB)
                assert "hg" in part.flags
            assert pool.stats()["hits"] == n


def test_an_impossible_reservation_is_also_refused_with_huge_pages():
    with pytest.raises(OverflowError, match="reserve"):
        linmem.MmapCreator(huge_pages=True).create(PAGE, reserve=2**64 - 2)
    with pytest.raises((OverflowError, linmem.PageError)):
        linmem.MmapCreator(huge_pages=True).create(PAGE, reserve=2**63 - (1 << 20))


@requires("huge_pages")
def test_a_memory_of_one_huge_page_ends_with_this_page():
    with linmem.MmapCreator(huge_pages=True).create(HUGE, guard=PAGE, reserve=4 * MIB) as mem:
        ctypes.memset(mem.as_ptr(), 1, mem.byte_size())
        assert accessible_parts(mem) == [(0, HUGE, "rw-p")]
