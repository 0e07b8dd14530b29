"""Named failures: fallbacks after a refusal, the limits of the process, and an upstream that fails.

test_faults.py tests every operation with every page call refused.
"""

import errno
import pickle

import pytest
from support import NEEDS, PAGE, answer, failing, live_bytes, os_code, requires, round_up

import linmem


def live():
    return live_bytes() if NEEDS["maps"][0] else 0


def check_error(error, call, code=errno.ENOMEM):
    assert isinstance(error, OSError)
    assert isinstance(error, MemoryError)
    assert (os_code(error), error.call) == (code, call)
    assert error.size > 0
    assert error.strerror.startswith(f"{call} of {error.size} bytes failed with code {code}: ")
    again = pickle.loads(pickle.dumps(error))
    assert (again.errno, os_code(again), again.call, again.size, str(again)) == \
        (error.errno, code, error.call, error.size, str(error))


def test_a_failed_protect_does_not_keep_a_memory_from_moving():
    with linmem.create(2 * PAGE, maximum=32 * PAGE, reserve=0, may_move=True) as mem:
        mem.write(0, b"kept")
        with failing(1, errno.ENOMEM), pytest.raises(linmem.PageError):
            mem.protect(0, PAGE, "r")
        mem.grow_to(10 * PAGE)
        assert mem.read(0, 4) == b"kept"


SMALL = 1 << 20     # bytes beyond the minimum


@pytest.mark.parametrize("maximum", [None, 1 << 30])
def test_a_chosen_reservation_that_the_os_refuses_becomes_a_small_one_and_then_the_minimum(maximum):
    # In a child, because pools of this process may have idle slots to give back.
    assert answer(f"""
        import errno, linmem
        from linmem._core.memory import _chosen
        from linmem._os import pages
        usual = linmem.create({PAGE}, maximum={maximum}).byte_capacity()
        found = []
        for times in range(1, 4):
            pages.count_calls_to_failure(1, errno.ENOMEM, times)
            try:
                with linmem.create({PAGE}, maximum={maximum}) as mem:
                    found.append(mem.byte_capacity())
                    assert _chosen()[1] == (mem.byte_capacity() > {PAGE})
            except linmem.PageError as error:
                found.append(error.call)
            pages.count_calls_to_failure(0, 0)
            assert _chosen() == (0, 0) and pages.describe()["reserved"] == 0
        print(usual > 2 * {SMALL}, found)
        """) == f"True {[round_up(PAGE + SMALL), PAGE, 'reserve']}"


@requires("rlimits")
def test_a_refused_reservation_of_address_space_gives_linmems_total_and_ways_to_reduce_it():
    assert answer(f"""
        import linmem
        mem = linmem.create({PAGE}, reserve=64 * {PAGE})
        try:
            linmem.create(0, reserve=4 << 30)
        except linmem.PageError as error:
            assert (f"linmem holds {{mem.info().reserved}} bytes of address space already, and a smaller maximum= or"
                    " reserve= asks for less") in str(error), error
            print("said")
        """, limits={"RLIMIT_AS": 3_000_000_512}) == "said"


def test_a_move_whose_smallest_reservation_is_refused_is_a_page_error():
    # A reservation at the maximum has no smaller fallback.
    with linmem.create(PAGE, maximum=4 * PAGE, reserve=0, may_move=True) as mem:
        mem[0] = 7
        before = mem.info()
        with failing(1, errno.ENOMEM), pytest.raises(linmem.PageError) as caught:
            mem.grow_to(4 * PAGE)
        check_error(caught.value, "reserve")
        assert mem.info() == before
        assert mem[0] == 7


@requires("maps")
def test_a_refused_release_is_tried_again_with_the_next():
    before = live()
    mem = linmem.create(PAGE, reserve=64 * PAGE)
    with failing(1, errno.ENOMEM) as injected:
        mem.close()
    assert injected.happened
    assert mem.closed
    assert live() > before
    linmem.create(PAGE).close()
    assert live() == before


class Nth(Exception):
    pass


class FailsOnNth:
    def __init__(self, nth):
        self.left = nth

    def new_memory(self, ty, *sizes):
        self.left -= 1
        if self.left == 0:
            raise Nth("the upstream gives up")
        return linmem.MmapCreator().new_memory(ty, *sizes)


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_an_upstream_that_fails_on_its_nth_call_unwinds_the_chain(nth):
    limit = linmem.LimitingCreator(linmem.PythonCreator(FailsOnNth(nth)), 64 * PAGE)
    chain = linmem.StatisticsCreator(limit)
    made = []
    for n in range(1, 5):
        if n == nth:
            with pytest.raises(Nth, match="the upstream gives up"):
                chain.create(PAGE)
        else:
            made.append(chain.create(PAGE))
        assert limit.used_bytes == len(made) * PAGE
        assert chain.statistics()["current_count"] == len(made)
    assert chain.statistics()["failures"] == 1
    for mem in made:
        mem.close()
    assert limit.used_bytes == 0


# -- the limits of the process ---------------------------------------------------------------------

@requires("rlimits")
def test_a_short_address_space_gets_smaller_reservations_and_named_refusals():
    assert answer(f"""
        import linmem
        mems = [linmem.create({PAGE}, maximum=1 << 32) for _ in range(10)]
        assert all({PAGE} <= mem.byte_capacity() < 1 << 30 for mem in mems), mems
        for asked in ({{"reserve": 4 << 30}}, {{"minimum": 4 << 30}}):
            try:
                linmem.create(**{{"minimum": 0, **asked}})
            except linmem.PageError as error:
                assert error.call == "reserve" and "RLIMIT_AS (ulimit -v) is 3000000512 bytes" in str(error), error
            else:
                raise AssertionError(asked)
        moving = linmem.create({PAGE}, may_move=True)
        before = moving.info()
        try:
            moving.grow_to(4 << 30)
        except linmem.PageError as error:
            assert "RLIMIT_AS" in str(error), error
        assert moving.info() == before
        print("named")
        """, limits={"RLIMIT_AS": 3_000_000_512}) == "named"


@requires("rlimits", "maps")
def test_a_limit_on_data_refuses_growth_by_name_and_whole():
    assert answer("""
        import re, resource
        import linmem
        mem = linmem.create(1 << 20, maximum=1 << 32)
        mem[0] = 5
        used = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20), used + (64 << 20)))
        try:
            mem.grow_to(1 << 30)
        except linmem.PageError as error:
            assert error.call == "commit" and "RLIMIT_DATA" in str(error), error
            print(mem.byte_size() == 1 << 20, mem[0])
        """) == "True 5"
