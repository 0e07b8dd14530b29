"""Growth: happens in place under live views, is atomic, adds zeros, and moves only a memory without exports."""

import ctypes

import pytest
from support import PAGE, WORD, answer, inaccessible, live_bytes, requires, round_up, whole

import linmem


def test_a_new_memory_reads_as_zero_and_has_the_size_asked_for():
    for size in (0, 1, PAGE - 1, PAGE, PAGE + 1, 10 * PAGE + 7):
        with linmem.create(size, reserve=0) as mem:
            assert mem.byte_size() == len(mem) == size
            assert bytes(mem) == bytes(size)
            assert mem.byte_capacity() == max(round_up(size), PAGE)
            assert mem.as_ptr() % PAGE == 0
            assert mem.as_ptr() != 0


def test_growth_within_the_capacity_keeps_the_base_and_every_view():
    with linmem.create(PAGE, maximum=64 * PAGE) as mem:
        base = mem.as_ptr()
        with memoryview(mem) as view, mem.view("I", offset=4, count=2) as typed:
            view[0] = 7
            typed[0] = 0xDEADBEEF
            for size in range(2 * PAGE, 65 * PAGE, PAGE):
                mem.grow_to(size)
                assert mem.as_ptr() == base
                assert mem.byte_size() == size
            assert view[0] == 7
            assert typed[0] == 0xDEADBEEF
            assert len(view) == PAGE            # the view keeps the length that the memory had when it was exported
            mem[4] = 1
            assert typed[0] == 0xDEADBE01
        assert mem.as_ptr() == base
        assert mem.read(8, 64 * PAGE - 8) == bytes(64 * PAGE - 8)


@pytest.mark.parametrize("old", [0, 1, PAGE - 1, PAGE, PAGE + 1])
@pytest.mark.parametrize("step", [1, 100, PAGE - 1, PAGE, 3 * PAGE + 5])
def test_fresh_bytes_read_as_zero_even_where_native_code_wrote_past_the_size(old, step):
    with linmem.create(old, reserve=16 * PAGE) as mem:
        accessible = mem.info().committed
        ctypes.memset(mem.as_ptr(), 0xAA, accessible)
        mem.grow_to(old + step)
        assert mem.read(0, old) == b"\xaa" * old
        assert mem.read(old, step) == bytes(step)
        # The accessible bytes past the new size, which native code can reach, are zero too.
        rest = mem.info().committed - old
        assert ctypes.string_at(mem.as_ptr() + old, rest) == bytes(rest)


def test_growth_to_the_same_size_changes_nothing():
    with linmem.create(PAGE + 3) as mem:
        mem[PAGE] = 9
        before = mem.info()
        mem.grow_to(PAGE + 3)
        assert mem.info() == before
        assert mem[PAGE] == 9


def test_a_smaller_size_is_a_value_error_that_names_it():
    with linmem.create(PAGE) as mem:
        with pytest.raises(ValueError, match=rf"new_size must be >= byte_size\(\) \({PAGE}\), got {PAGE - 1}"):
            mem.grow_to(PAGE - 1)
        assert mem.byte_size() == PAGE


def test_growth_past_the_maximum_is_a_grow_error_and_changes_nothing():
    with linmem.create(PAGE, maximum=2 * PAGE + 5) as mem:
        assert mem.maximum_byte_size() == 2 * PAGE + 5
        before = mem.info()
        with pytest.raises(linmem.GrowError, match=rf"maximum_byte_size\(\) \({2 * PAGE + 5}\), got {2 * PAGE + 6}"):
            mem.grow_to(2 * PAGE + 6)
        assert mem.info() == before
        mem.grow_to(2 * PAGE + 5)
        with pytest.raises(MemoryError):
            mem.grow_to(2 * PAGE + 6)


def test_a_maximum_that_equals_the_minimum_never_grows():
    with linmem.create(PAGE, maximum=PAGE) as mem:
        assert mem.byte_capacity() == PAGE
        mem.grow_to(PAGE)
        with pytest.raises(linmem.GrowError):
            mem.grow_to(PAGE + 1)


def test_a_memory_without_a_maximum_reports_none():
    with linmem.create(1) as mem:
        assert mem.maximum_byte_size() is None
        assert mem.byte_capacity() >= 2**20


def test_a_reservation_asked_for_is_reserved_and_growth_up_to_it_never_moves():
    with linmem.create(1, reserve=40 * PAGE + 1) as mem:
        base = mem.as_ptr()
        assert mem.byte_capacity() == 41 * PAGE
        mem.grow_to(41 * PAGE)
        assert mem.as_ptr() == base


def test_a_minimum_larger_than_the_reservation_wins():
    with linmem.create(5 * PAGE + 1, reserve=PAGE) as mem:
        assert mem.byte_capacity() == 6 * PAGE


@pytest.mark.parametrize("new_size", [2**62, 2**63 - 1, 2**63, WORD - 1])
def test_an_absurd_growth_is_refused_and_changes_nothing(new_size):
    with linmem.create(PAGE, reserve=0) as mem:
        before = mem.info()
        with pytest.raises((MemoryError, OverflowError), match=str(new_size)[:6]):
            mem.grow_to(new_size)
        assert mem.info() == before


# -- past the capacity ------------------------------------------------------------------------------

def test_growth_past_the_capacity_moves_the_bytes_and_zero_fills():
    with linmem.create(PAGE + 5, reserve=0, may_move=True) as mem:
        old = whole(mem)
        for i in range(PAGE + 5):
            mem[i] = i % 251
        kept = bytes(mem)
        mem.grow_to(7 * PAGE + 3)
        assert mem.read(0, PAGE + 5) == kept
        assert mem.read(PAGE + 5, 6 * PAGE - 2) == bytes(6 * PAGE - 2)
        assert mem.byte_capacity() >= 7 * PAGE + 3
        new = whole(mem)
        assert new[1] <= old[0] or old[1] <= new[0]


@requires("maps")
def test_a_move_gives_the_old_place_back():
    before = live_bytes()
    mem = linmem.create(PAGE, maximum=32 * PAGE, reserve=0, may_move=True)
    mem[0] = 1
    old = mem.as_ptr()
    mem.grow_to(4 * PAGE)
    assert mem.as_ptr() != old
    assert live_bytes() - before == inaccessible(mem)
    mem.close()
    assert live_bytes() == before


def test_several_moves_in_a_row_keep_every_byte():
    # Steps makes each new reservation small, so that the next growth moves again.
    with linmem.create(PAGE, maximum=None, reserve=0, may_move=True, creator=Steps()) as mem:
        kept = b""
        bases = set()
        for n in range(1, 9):
            mem.grow_to(n * 3 * PAGE)
            mem.write(len(kept), bytes([n]) * (3 * PAGE))
            kept += bytes([n]) * (3 * PAGE)
            bases.add(mem.as_ptr())
            assert bytes(mem) == kept
        assert bases


class Steps:
    """Passes on native memories, as a creator in Python may."""

    def new_memory(self, ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes):
        return linmem.MmapCreator().new_memory(ty, minimum, maximum, reserved_size_in_bytes, guard_size_in_bytes)


@requires("rlimits")
def test_repeated_moves_in_a_short_address_space_lose_no_bytes():
    # A limit makes each new reservation small: an eighth of the remaining space.
    assert answer(f"""
        import linmem
        import resource
        used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
        mem = linmem.create({PAGE}, reserve=0, may_move=True, guard=0)
        bases, kept = {{mem.as_ptr()}}, 0
        while len(bases) < 4:
            size = mem.byte_capacity() + {PAGE}
            mem.grow_to(size)
            bases.add(mem.as_ptr())
            for at in range(kept, size, {PAGE}):
                assert mem[at] == 0
                mem[at] = at // {PAGE} % 255 + 1
            kept = size
            for at in range(0, size, {PAGE}):
                assert mem[at] == at // {PAGE} % 255 + 1
        print(len(bases))
        """) == "4"


def test_growth_past_the_capacity_refuses_while_a_buffer_is_exported():
    with linmem.create(PAGE, reserve=0, may_move=True) as mem:
        base = mem.as_ptr()
        views = [memoryview(mem), memoryview(mem), mem.view(">i")]
        before = mem.info()
        with pytest.raises(BufferError, match=r"3 exported buffer\(s\)"):
            mem.grow_to(PAGE + 1)
        assert mem.info() == before
        views[0][0] = 5
        for view in views:
            view.release()
        mem.grow_to(PAGE + 1)
        assert mem.as_ptr() != base
        assert mem[0] == 5


def test_growth_past_the_capacity_stops_at_the_maximum():
    with linmem.create(PAGE, maximum=3 * PAGE, reserve=0, may_move=True) as mem:
        mem.grow_to(2 * PAGE)
        assert mem.byte_capacity() == 3 * PAGE
        with pytest.raises(linmem.GrowError):
            mem.grow_to(3 * PAGE + 1)


def test_a_shared_memory_never_moves():
    ty = linmem.MemoryType(1, 100, is_shared=True, page_size=1)
    with linmem.MmapCreator().new_memory(ty, 1, 100 * PAGE, 2 * PAGE, 0) as mem:
        base = mem.as_ptr()
        mem.grow_to(2 * PAGE)
        with pytest.raises(linmem.GrowError, match=r"byte_capacity\(\).*cannot move; shared memories never do"):
            mem.grow_to(2 * PAGE + 1)
        assert mem.as_ptr() == base
        assert mem.byte_size() == 2 * PAGE


def test_a_memory_with_protected_pages_never_moves():
    with linmem.create(2 * PAGE, reserve=0, may_move=True) as mem:
        mem.protect(0, PAGE, "r")
        base = mem.as_ptr()
        with pytest.raises(linmem.GrowError, match="own protection"):
            mem.grow_to(2 * PAGE + 1)
        assert mem.as_ptr() == base


def test_protecting_an_empty_range_does_not_pin_a_memory():
    with linmem.create(2 * PAGE, reserve=0, may_move=True) as mem:
        mem.protect(PAGE, 0, "none")
        mem.grow_to(3 * PAGE)
        assert mem.byte_size() == 3 * PAGE


def test_an_empty_memory_can_move():
    with linmem.create(0, reserve=0, may_move=True) as mem:
        mem.grow_to(5 * PAGE)
        assert bytes(mem) == bytes(5 * PAGE)


@requires("fork")
def test_a_forked_child_may_grow_and_move_inherited_memories():
    # After a fork the kernel no longer merges a grown range with the old range. The bytes are then several mappings,
    # which do not move as one.
    assert answer(f"""
        import linmem, os
        P = {PAGE}
        mem = linmem.create(P, reserve=2 * P, may_move=True)
        mem[0] = 1
        child = os.fork()
        if child == 0:
            mem.grow_to(2 * P)
            mem[P] = 2
            mem.grow_to(64 * P)
            good = mem[0] == 1 and mem[P] == 2 and mem.read(P + 1, 63 * P - 1) == bytes(63 * P - 1)
            os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        mem.grow_to(3 * P)
        print(mem[0], mem[P])
        """) == "1 0"


@pytest.mark.parametrize("creator", [linmem.MmapCreator(), linmem.PythonCreator(linmem.MmapCreator()),
                                     linmem.creator("statistics")], ids=["mmap", "python", "with a hook"])
def test_info_counts_the_growths_that_changed_the_size(creator):
    mem = creator.create(PAGE, 9 * PAGE)
    for size in (PAGE, PAGE + 1, 3 * PAGE):
        mem.grow_to(size)
    with pytest.raises(linmem.GrowError):
        mem.grow_to(10 * PAGE)
    with pytest.raises(ValueError, match="shrink"):
        mem.grow_to(1)
    assert mem.info().growths == 2


def test_info_of_a_slot_counts_the_growths_of_its_present_user():
    pool = linmem.creator("pool")
    with pool.create(PAGE, 9 * PAGE) as mem:
        mem.grow_to(2 * PAGE)
        assert mem.info().growths == 1
    mem = pool.create(PAGE, 9 * PAGE)
    assert (pool.stats()["hits"], mem.info().growths) == (1, 0)
