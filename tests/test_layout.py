"""The map of a memory, as arithmetic: linmem._units through its two doors in linmem._memory."""

from itertools import pairwise

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support import FLOOR

from linmem._memory import _lay_out, _reservation_steps

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
    for size in (2**64 - page + 1, 2**64 - page + 2, TOP):      # one less would be rounded to 2**64 - page
        sizes = [0, 0, 0]
        sizes[place] = size
        assert _lay_out(*sizes, page) is None


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_the_largest_layout_has_a_length_that_python_can_say_and_one_page_more_is_refused(page):
    largest = 2**63 - 2 * page      # with a page before the base, the largest multiple of pages below 2**63
    assert _lay_out(0, largest, 0, page)["total"] == 2**63 - page
    assert _lay_out(largest, 0, 0, page)["total"] == 2**63 - page
    assert _lay_out(0, largest + 1, 0, page) is None
    assert _lay_out(largest + 1, 0, 0, page) is None
    guard = 2**62 - page            # twice: before the base and behind the capacity
    assert _lay_out(0, page, guard, page)["total"] == 2**63 - page
    assert _lay_out(0, page, guard + 1, page) is None
    assert _lay_out(0, 2**63, 2**62, page) is None      # the sum wraps, and is small again


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
    # What JIT code is promised: base .. max(capacity, reservation) + guard lies in the reservation.
    assert at["pre_guard"] + max(at["capacity"], reservation) + guard <= at["total"]


@pytest.mark.parametrize("page", [4096, 16384, 65536])
def test_a_memory_of_nothing_has_a_base_of_its_own(page):
    at = _lay_out(0, 0, 0, page)
    assert at == {"pre_guard": page, "accessible": 0, "capacity": page, "guard": 0, "total": 2 * page}


def test_a_minimum_larger_than_the_reservation_is_the_capacity():
    assert _lay_out(100_000, 5, 0, 4096)["capacity"] == up(100_000, 4096)


SPACES = st.sampled_from([2**38, 2**39, 2**46, 2**47, 2**56])


@given(st.integers(0, 2**48), st.none() | st.integers(0, TOP - 1), SPACES, st.integers(0, 2**56))
def test_the_steps_of_a_reservation_fall_to_the_minimum(minimum, maximum, space, left):
    steps = _reservation_steps(minimum, maximum, space, min(left, space))
    assert steps[-1] == minimum
    assert all(a > b for a, b in pairwise(steps))
    assert all(b >= a // 2 for a, b in pairwise(steps))
    assert len(steps) <= 65


@given(st.integers(0, 2**30), st.integers(0, TOP - 1), SPACES)
def test_a_known_maximum_is_reserved_whole_where_a_quarter_of_the_space_holds_it(minimum, maximum, space):
    first = _reservation_steps(minimum, maximum, space, space)[0]
    if maximum <= space >> 2:
        assert first == max(maximum, minimum)
    else:
        assert first == max(space >> 7, minimum)


@given(st.integers(0, 2**30), st.none() | st.integers(2**30, TOP - 1), SPACES, st.integers(0, 2**38 - 1))
def test_under_a_limit_no_memory_takes_all_that_is_left(minimum, maximum, space, left):
    first = _reservation_steps(minimum, maximum, space, left)[0]
    if maximum is not None and maximum <= min(space >> 2, left >> 1):
        assert first == max(minimum, maximum)
    else:
        assert first <= max(minimum, left >> 3)


def test_the_page_of_this_machine_is_a_power_of_two_and_divides_the_granularity():
    page = FLOOR["page_size"]
    assert page >= 4096
    assert page & (page - 1) == 0
    assert FLOOR["granularity"] % page == 0
