"""The policy of the pool's resets against a model of what the machine's calls cost. No clock, no system call."""

import itertools
import math
import random
from dataclasses import dataclass

import pytest

import linmem
from linmem._pool import _costs, _Policy, _zero_wide

UNBOUNDED = 1 << 30
USES = 400


@dataclass(frozen=True)
class Machine:
    """Microseconds."""

    fault: float
    free: float             # of one resident page
    scan: float             # of a range with little in it
    discard: float          # the same
    seen: float             # of one resident page in a scan
    zeroing: tuple[tuple[int, float], ...]      # of one page, by how many there are

    def zero(self, n):
        return n * next(us for most, us in self.zeroing if n <= most)

    def policy(self):
        page = self.zero(64) / 64
        return _Policy(round(min(64, max(8, (self.fault + self.free) / page))),
                       round(min(64, max(4, self.scan / page))))


MACHINES = {
    "caches are small": Machine(1.85, 0.15, 0.5, 0.3, 0.02, (
        (8, 0.05), (32, 0.13), (1024, 0.17), (4096, 0.3), (1 << 40, 0.65))),
    "zeroing is cheap": Machine(1.85, 0.15, 1.0, 1.0, 0.015, ((256, 0.026), (4096, 0.035), (1 << 40, 0.06))),
}


def adaptive(machine, n, uses):
    """The cost of each use, its faults and its reset."""
    policy, resident = machine.policy(), set()
    for dirty in uses:
        cost = machine.fault * len(dirty - resident)
        resident |= dirty
        how = policy.begin(n)
        if how == "zero":
            resident = set(range(n))
            yield cost + machine.zero(n)
            continue
        if how == "scan":
            found = min(len(resident), policy.bound(n) + 1)
            cost += machine.scan + machine.seen * found + machine.zero(found)
            if policy.end(n, found, UNBOUNDED):
                assert found == len(resident), "kept pages that were not zeroed"
                yield cost
                continue
        cost += machine.discard + machine.free * len(resident)
        resident = set()
        policy.given_back()
        yield cost


def better_simple_method(machine, n, uses):
    each = [(machine.fault + machine.free) * len(dirty) + machine.discard for dirty in uses]
    return min(sum(each), machine.zero(n) * len(uses))


def patterns(n, d, rng):
    def draw(k):
        return set(rng.sample(range(n), min(k, n)))

    one, other, few, many = draw(d), draw(d), draw(max(1, d // 10)), draw(16 * d)
    four = [draw(d) for _ in range(4)]
    yield "same", itertools.repeat(one)
    yield "redrawn", (draw(d) for _ in itertools.count())
    yield "alternating", itertools.cycle([one, other])
    yield "alternating with few", itertools.cycle([few, one])
    yield "cycle of four", itertools.cycle(four)
    yield "drifting", ({(i // 8 + j) % n for j in range(d)} for i in itertools.count())
    for every in (4, 16, 64):
        yield f"burst every {every}", itertools.cycle([one] * (every - 1) + [many])
        yield f"new burst every {every}", (draw(16 * d) if i % every == every - 1 else one for i in itertools.count())


SIZES = [(2, 1), (16, 1), (16, 16), (32, 2), (256, 4), (256, 64), (256, 256), (1024, 16), (1024, 160), (4096, 256),
         (16384, 16), (16384, 160)]


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_no_pattern_costs_much_more_than_the_better_simple_method_and_most_cost_less(machine):
    found = {}
    for n, d in SIZES:
        for name, uses in patterns(n, d, random.Random(n + d)):
            uses = list(itertools.islice(uses, USES))
            # The second half: by then the policy knows what it deals with.
            ours = sum(list(adaptive(machine, n, uses))[USES // 2:])
            found[n, d, name] = better_simple_method(machine, n, uses[USES // 2:]) / ours
    worst = min(found, key=found.get)
    assert found[worst] > 0.7, (worst, found[worst])
    assert math.exp(sum(map(math.log, found.values())) / len(found)) > 1.4


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
@pytest.mark.parametrize(("n", "d"), [(16, 16), (256, 64), (1024, 16), (16384, 160)])
def test_pages_that_are_used_again_are_kept(machine, n, d):
    uses = [set(random.Random(1).sample(range(n), d))] * 5000
    costs = list(adaptive(machine, n, uses))
    faults = d * machine.fault
    assert sum(cost >= faults for cost in costs[1000:]) <= 2, "given back more than now and then"


def test_pages_that_are_never_used_again_are_given_back_soon():
    policy, resident, kept = MACHINES["zeroing is cheap"].policy(), 0, []
    for _ in range(300):
        resident = resident + 16
        if policy.begin(1 << 20) == "scan" and policy.end(1 << 20, resident, UNBOUNDED):
            kept.append(resident)
        else:
            resident = 0
            policy.given_back()
    assert len(kept) < 60
    assert max(kept) <= 64


def test_what_a_slot_may_not_keep_is_given_back():
    policy = _Policy(12, 4)
    assert policy.begin(1000) == "scan"
    assert not policy.end(1000, 11, 10)
    policy.given_back()
    assert policy.begin(1000) == "discard"      # and the next ones are not looked at


def test_a_small_range_is_zeroed_without_a_look_once_that_may_pay_for_the_faults():
    policy = _Policy(12, 4)
    asked = []
    for _ in range(6):
        asked.append(policy.begin(4))
        if asked[-1] == "scan":
            policy.end(4, 1, UNBOUNDED)
    assert asked == ["scan"] * 4 + ["zero"] * 2
    assert policy.begin(5) == "scan"


def test_the_costs_of_this_machine_are_sane():
    costs = _costs()
    assert 8 <= costs["fault"] <= 64
    assert 4 <= costs["scan"] <= 64


@pytest.mark.parametrize("size", [0, 128, 4096, 65536 + 128])
def test_wide_stores_zero_what_they_shall_and_not_a_byte_more(size):
    with linmem.create(2 * 65536) as mem:
        mem[:] = b"\xab" * len(mem)
        if not _zero_wide(mem.as_ptr() + 4096, size):
            pytest.skip("this processor has no wide stores that linmem knows")
        assert bytes(mem) == b"\xab" * 4096 + bytes(size) + b"\xab" * (len(mem) - 4096 - size)
