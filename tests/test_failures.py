"""Every way to fail: each page call in turn, the limits of the process, an upstream that gives up."""

import errno
import pickle

import pytest
from support import NEEDS, PAGE, answer, failing, live_bytes, os_code, requires

import linmem

ROUNDS = 12     # more page calls than any operation makes


def live():
    return live_bytes() if NEEDS["maps"][0] else 0


def every_failure(make, call, *, code=errno.ENOMEM):
    """`call(make())` with its 1st, 2nd ... page call failing, until none fails any more.

    Yields (mem, error or None, state before) for each; checks that nothing is left behind.
    """
    for nth in range(1, ROUNDS):
        start = live()
        mem = make()
        content, before = bytes(mem), mem.info()    # in this order: reading makes pages resident
        caught = None
        with failing(nth, code) as injected:
            try:
                call(mem)
            except linmem.PageError as error:
                caught = error
        yield mem, caught, before, content
        if not mem.closed:
            mem.close()
        linmem.create(PAGE).close()     # what could not be released is released with the next memory
        assert live() == start
        if not injected.happened:
            return
    raise AssertionError("the operation makes ever more page calls")


def check_error(error, call, code=errno.ENOMEM):
    assert isinstance(error, OSError)
    assert isinstance(error, MemoryError)
    assert (os_code(error), error.call) == (code, call)
    assert error.size > 0
    assert error.strerror.startswith(f"{call} of {error.size} bytes failed with code {code}: ")
    again = pickle.loads(pickle.dumps(error))
    assert (again.errno, os_code(again), again.call, again.size, str(again)) == \
        (error.errno, code, error.call, error.size, str(error))


def memory(**how):
    def make():
        mem = linmem.create(2 * PAGE + 5, **{"maximum": 32 * PAGE, **how})
        mem.write(0, b"kept" * 10)
        return mem
    return make


@pytest.mark.parametrize(("name", "call"), [
    ("commit", lambda mem: mem.grow_to(9 * PAGE)),
    ("protect", lambda mem: mem.protect(0, PAGE, "r")),
    ("discard", lambda mem: mem.discard()),
    ("prefault", lambda mem: mem.prefault()),
    ("resident", lambda mem: mem.info()),
])
def test_a_refused_page_call_is_a_page_error_and_the_state_before_stays(name, call):
    outcomes = []
    for mem, error, before, content in every_failure(memory(), call, code=errno.EAGAIN):
        outcomes.append(error)
        if error is not None:
            check_error(error, name, errno.EAGAIN)
            assert mem.info() == before
            assert bytes(mem) == content
            call(mem)       # and it works when the OS agrees again
    assert [error is None for error in outcomes] == [False, True]


def test_a_failed_protect_does_not_keep_a_memory_from_moving():
    with memory(reserve=0)() as mem:
        with failing(1, errno.ENOMEM), pytest.raises(linmem.PageError):
            mem.protect(0, PAGE, "r")
        mem.grow_to(10 * PAGE)
        assert mem.read(0, 4) == b"kept"


@pytest.mark.parametrize("explicit", [True, False])
def test_a_refused_creation_leaves_nothing_behind(explicit):
    how = {"reserve": 64 * PAGE} if explicit else {}
    calls = []
    for nth in range(1, ROUNDS):
        before = live()
        mem = None
        with failing(nth, errno.ENOMEM) as injected:
            try:
                mem = linmem.create(PAGE, maximum=64 * PAGE, **how)
            except linmem.PageError as error:
                check_error(error, "reserve" if nth == 1 else "commit")
                calls.append(error.call)
        if mem is not None:
            mem.close()
        assert live() == before
        if not injected.happened:
            break
    # A reservation that linmem chose steps down; one that was asked for does not.
    assert calls == (["reserve", "commit"] if explicit else ["commit"])


def test_a_chosen_reservation_steps_down_where_the_os_refuses():
    with failing(1, errno.ENOMEM) as injected:
        mem = linmem.create(PAGE, maximum=64 * PAGE)
    assert injected.happened
    with mem:
        assert mem.byte_capacity() == 32 * PAGE
        mem.grow_to(64 * PAGE)      # past the capacity it moves


def test_a_refused_move_keeps_the_memory_where_it_is_or_copies():
    outcomes = []
    for mem, error, before, content in every_failure(memory(reserve=0), lambda mem: mem.grow_to(20 * PAGE)):
        if error is None:
            assert mem.byte_size() == 20 * PAGE
            assert bytes(mem) == content + bytes(20 * PAGE - len(content))
            outcomes.append("grown")
        else:
            assert mem.info() == before
            assert bytes(mem) == content
            mem.grow_to(20 * PAGE)
            assert mem.read(0, len(content)) == content
            outcomes.append(error.call)
    assert outcomes[-1] == "grown"
    assert "reserve" not in outcomes        # a smaller reservation did


def test_a_move_whose_smallest_reservation_is_refused_is_a_page_error():
    # At the maximum there is no smaller step.
    with linmem.create(PAGE, maximum=4 * PAGE, reserve=0) as mem:
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


@pytest.mark.parametrize("nth", range(1, 7))
def test_adaptors_unwind_a_refused_creation_and_a_refused_growth(nth):
    limit = linmem.creator("limiting", limit_bytes=64 * PAGE)
    chain = linmem.creator("statistics", upstream=linmem.creator("limiting", limit_bytes=48 * PAGE, upstream=limit))
    before = live()
    mem = None
    with failing(nth, errno.ENOMEM):
        try:
            mem = chain.create(PAGE, maximum=32 * PAGE, reserve=0)
            mem.grow_to(32 * PAGE)
        except linmem.PageError:
            pass
    size = 0 if mem is None else mem.byte_size()
    assert limit.used_bytes == chain.upstream.used_bytes == size
    sums = chain.statistics()
    assert (sums["current_bytes"], sums["current_count"]) == (size, int(mem is not None))
    if mem is not None:
        mem.close()
    linmem.create(PAGE).close()
    assert limit.used_bytes == chain.upstream.used_bytes == 0
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
        before = mems[0].info()
        try:
            mems[0].grow_to(4 << 30)
        except linmem.PageError as error:
            assert "RLIMIT_AS" in str(error), error
        assert mems[0].info() == before
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
