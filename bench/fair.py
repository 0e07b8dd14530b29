"""The suite "fair": does a tenant with many shapes take the warm slots of a tenant with one shape?

The suite counts and does not time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import linmem
from linmem._os import pages as _pages
from linmem.bench.engines import KIB, MIB, pool
from linmem.bench.harness import RATE, Group, Row, exact

# The number of shapes of the first tenant, which requests each shape between two requests of the second tenant.
SHAPES = 100
ROUNDS_OF_SHAPES, QUICK_ROUNDS_OF_SHAPES = 300, 30
STEP = 64 * KIB             # bytes of each memory, all written
ROOM = SHAPES // 2          # memories that each bound has room for
GOAL = 0.95


@dataclass(frozen=True)
class Case:
    key: str
    what: str
    pools: Callable[[], AbstractContextManager]     # a pool for each tenant, or a pool for both


def of(**options: object) -> Callable[[], AbstractContextManager]:
    return lambda: contextlib.nullcontext((pool(**options),))


@contextlib.contextmanager
def of_all_pools(pools: int = 1) -> Iterator[tuple]:
    linmem.set_pool_limits(max_resident=ROOM * STEP)
    try:
        # The second tenant's pool is made first. If two slots became idle at the same tick of the clock, the slot of
        # the older pool is evicted. So the result for tenants in one domain does not depend on the clock.
        yield tuple(pool() for _ in range(pools))[::-1]
    finally:
        linmem.set_pool_limits()


CASES = (
    Case("by_count", f"max_unused_warm={SHAPES}", of(max_unused_warm=SHAPES)),
    Case("by_resident", f"max_resident={ROOM * STEP / MIB:.3g} MiB", of(max_resident=ROOM * STEP)),
    Case("by_slots", f"slots={ROOM}", of(slots=ROOM)),
    Case("by_all_pools", f"set_pool_limits(max_resident={ROOM * STEP / MIB:.3g} MiB)", of_all_pools),
    Case("by_two_pools", f"a pool each, set_pool_limits(max_resident={ROOM * STEP / MIB:.3g} MiB)",
         lambda: of_all_pools(2)),
    Case("by_budget", f"a budget of {ROOM} memories below the pool",
         lambda: of(upstream=linmem.creator("limiting", limit_bytes=ROOM * STEP))()),
)


def groups(quick: bool) -> list[Group]:
    return [group(case, QUICK_ROUNDS_OF_SHAPES if quick else ROUNDS_OF_SHAPES) for case in CASES]


def group(case: Case, rounds: int) -> Group:
    what = f"one tenant with {SHAPES} shapes, one with a single one, {case.what}"

    def measured() -> list[Row]:
        return [exact(f"{case.key}/requests", what, "warm hits of the second", "its requests",
                      hit_rate(case, rounds, "second"), GOAL, RATE),
                exact(f"{case.key}/one_domain/requests", f"{what}; both in one domain", "warm hits of the second",
                      "its requests", hit_rate(case, rounds, "first"), None, RATE, drawn=False)]

    return Group(case.key, what, (), (), "the first tenant asks for each of its shapes between two requests of the"
                 " second", count=measured)


def hit_rate(case: Case, rounds: int, domain: str) -> float:
    """The warm hits over all requests of the second tenant. With the domain "first" both tenants share a domain."""
    ones = b"\1" * (STEP // _pages.describe()["page_size"])
    page = STEP // len(ones)

    def use(creator: object, maximum: int, domain: str) -> None:
        with linmem.create(STEP, maximum, creator=creator, domain=domain) as mem:
            memoryview(mem)[::page] = ones

    with case.pools() as pools:
        for _ in range(rounds):
            for shape in range(SHAPES):
                use(pools[0], (2 + shape) * STEP, "first")
            use(pools[-1], STEP, domain)
        counts = next(shape for shape in linmem.metrics.read(pools[-1])["shapes"] if shape["shape"]["maximum"] == STEP)
    return counts["hits_warm"] / (counts["hits_warm"] + counts["hits_cold"] + counts["misses"])
