"""The layout of a memory, as arithmetic: linmem._core.units, through two functions of linmem._core.memory."""

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support import FLOOR

from linmem._core.memory import _choose_reservation, _lay_out, _room_to_choose

TOP = 2**64 - 1
PAGES = st.sampled_from([4096, 16384, 65536])
EDGES = [0, 1, 4095, 4096, 4097, 65535, 65536, 65537, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**47, 2**62,
         2**63 - 65536, 2**63 - 1, 2**63, 2**63 + 1, TOP - 65536, TOP - 65535, TOP - 65534, TOP - 4096, TOP - 4095,
         TOP - 4094, TOP]
SIZES = st.one_of(st.sampled_from(EDGES), st.integers(0, 2**22), st.integers(0, 2**48), st.integers(0, TOP))


def up(n, page):
    return -(-n // page) * page


@given(SIZES, SIZES, SIZES, PAGES)
@example(0, 0, 0, 65536)
@example(TOP, 0, 0, 4096)
@example(1, TOP, 0, 4096)
@example(1, 0, TOP, 4096)
def test_the_layout_is_the_exact_arithmetic_or_a_refusal(minimum, reservation, guard, page):
    accessible, capacity, after = up(minimum, page), up(max(minimum, reservation, 1), page), up(guard, page)
    before = max(after, page)
    total = before + capacity + after
    at = _lay_out(minimum, reservation, guard, page)
    if total > 2**63 - 1:
        assert at is None
    else:
        assert at == {"pre_guard": before, "accessible": accessible, "capacity": capacity, "guard": after,
                      "total": total}


@pytest.mark.parametrize("page", [4096, 16384, 65536])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_size_that_wraps_when_it_is_rounded_up_is_refused_from_the_first_one_on(place, page):
    for size in (2**64 - page + 1, 2**64 - page + 2, TOP):  # a size of one byte less would be rounded to 2**64 - page
        sizes = [0, 0, 0]
        sizes[place] = size
        assert _lay_out(*sizes, page) is None


@pytest.mark.parametrize("minimum", [0, 4096, 2**32])
@pytest.mark.parametrize(("room", "beyond"), [(2**20, 2**19 + 1), (2**20, 2**20 - 1), (2**21 - 3, 2**20 - 1)])
def test_the_least_reservation_does_not_exceed_a_maximum_that_is_nearer(minimum, room, beyond):
    """Half of the room is less than `beyond`, and a small reservation would be larger than `beyond`."""
    assert _choose_reservation(minimum, minimum + beyond, room, 0, 0) == minimum + beyond
    assert _choose_reservation(minimum, None, room, 0, 0) == minimum + 2**20
    assert _choose_reservation(minimum, minimum + 2**21, room, 0, 0) == minimum + 2**20


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_the_largest_layout_has_a_length_that_python_can_say_and_one_page_more_is_refused(page):
    largest = 2**63 - 2 * page  # with a page before the base, the total is the largest multiple of pages below 2**63
    assert _lay_out(0, largest, 0, page)["total"] == 2**63 - page
    assert _lay_out(largest, 0, 0, page)["total"] == 2**63 - page
    assert _lay_out(0, largest + 1, 0, page) is None
    assert _lay_out(largest + 1, 0, 0, page) is None
    guard = 2**62 - page            # the guard counts twice: before the base and after the capacity
    assert _lay_out(0, page, guard, page)["total"] == 2**63 - page
    assert _lay_out(0, page, guard + 1, page) is None
    assert _lay_out(0, 2**63, 2**62, page) is None      # the sum wraps around to a small number


@given(SIZES, SIZES, SIZES, PAGES)
def test_a_layout_keeps_the_invariants_of_the_map(minimum, reservation, guard, page):
    at = _lay_out(minimum, reservation, guard, page)
    assume(at is not None)
    assert all(size % page == 0 for size in at.values())
    assert minimum <= at["accessible"] <= at["capacity"]
    assert at["accessible"] - minimum < page
    assert at["capacity"] >= max(reservation, page)
    assert at["pre_guard"] >= page
    assert at["guard"] >= guard
    # The guarantee for JIT code: [base, base + max(capacity, reservation) + guard) lies in the reservation.
    assert at["pre_guard"] + max(at["capacity"], reservation) + guard <= at["total"]


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_an_empty_memory_has_a_distinct_base(page):
    at = _lay_out(0, 0, 0, page)
    assert at == {"pre_guard": page, "accessible": 0, "capacity": page, "guard": 0, "total": 2 * page}


def test_a_minimum_larger_than_the_reservation_is_the_capacity():
    assert _lay_out(100_000, 5, 0, 4096)["capacity"] == up(100_000, 4096)


SPACES = st.sampled_from([2**38, 2**39, 2**46, 2**47, 2**56])


SMALL = 1 << 20


@given(SPACES, st.integers(0, 2**57), st.integers(0, 2**57), st.integers(0, 2**57))
@example(2**47, 2**47, 0, 0)
def test_linmem_chooses_sizes_up_to_half_of_the_space_that_callers_did_not_request(space, left, asked, chosen):
    left = min(left, space)
    room = _room_to_choose(space, left, asked + chosen, chosen)
    unasked = max(space - asked, 0)
    if left < space:        # a limit is in force; `left` already excludes the sizes that linmem chose
        unasked = min(unasked, left + chosen)
    assert room == max(unasked // 2 - chosen, 0)


@given(st.integers(0, 2**48), st.integers(0, TOP - 1), st.integers(0, 2**56), st.integers(0, 2**40),
       st.integers(0, 2**61))
def test_a_known_maximum_is_reserved_whole_if_its_excess_over_the_minimum_fits_in_half_of_the_room(
        minimum, more, room, others, memory):
    maximum = min(minimum + more, TOP - 1)
    want = _choose_reservation(minimum, maximum, room, others, memory)
    assert minimum <= want <= maximum
    if maximum - minimum <= room // 2:
        assert want == maximum
    else:
        assert want == min(_choose_reservation(minimum, None, room, others, memory), maximum)


@given(st.integers(0, 2**62), st.integers(0, 2**56), st.integers(0, 2**40), st.integers(0, 2**61))
def test_an_unknown_maximum_gets_a_share_of_the_room_on_top_of_the_minimum(minimum, room, others, memory):
    share = _choose_reservation(minimum, None, room, others, memory) - minimum
    assert 0 <= share <= room
    if memory:
        assert share <= max(4 * memory, SMALL)
    if room < SMALL:
        assert share == 0
    else:
        assert share >= SMALL
        exact = room // 4 // (others + 2)
        assert share == max(min(exact, 4 * memory) if memory else exact, SMALL)


@pytest.mark.parametrize(("bits", "memory", "live", "least"), [
    (47, 0, 1_000_000, SMALL), (47, 24 << 30, 65_530, 16 << 20), (47, 1 << 42, 65_530, 16 << 20),
    (47, 512 << 20, 65_530, 64 << 20), (46, 24 << 30, 65_530, 8 << 20), (38, 4 << 30, 15_000, SMALL),
    (38, 4 << 30, 200_000, 0), (31, 1 << 30, 200_000, 0),
])
def test_all_choices_together_stay_below_half_of_the_space_for_any_number_of_memories(bits, memory, live, least):
    space = 1 << bits
    around = 2 * 65536          # guards
    asked = chosen = 0
    previous = space
    for others in range(live):
        room = _room_to_choose(space, space, asked + chosen, chosen)
        share = _choose_reservation(0, None, max(room - around, 0), others, memory)
        if share:
            chosen += share + around
        else:
            asked += around
        assert share <= previous
        previous = share
        if others % 1000 == 0:
            assert chosen <= space // 2
    assert chosen <= space // 2
    assert share >= least


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2**20), st.none() | st.integers(0, 2**48)), max_size=200),
       SPACES, st.randoms(use_true_random=False))
def test_no_order_of_making_and_closing_exceeds_the_half(steps, space, random):
    held = []
    for make, minimum, maximum in steps:
        if not make and held:
            held.pop(random.randrange(len(held)))
            continue
        chosen = sum(held)
        room = _room_to_choose(space, space, chosen, chosen)
        bound = None if maximum is None else max(minimum, maximum)
        share = _choose_reservation(minimum, bound, room, len(held), 24 << 30) - minimum
        if share:
            held.append(share)
        assert sum(held) <= space // 2


def test_the_page_of_this_machine_is_a_power_of_two_and_divides_the_granularity():
    page = FLOOR["page_size"]
    assert page >= 4096
    assert page & (page - 1) == 0
    assert FLOOR["granularity"] % page == 0
