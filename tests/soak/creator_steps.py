"""The steps of a soak that use creators themselves."""

from __future__ import annotations

import linmem
from soak.checks import GUARD, PAGE, must
from soak.creators import Maker, chain
from soak.memory_steps import MAX_HELD


class CreatorSteps:
    """Steps of a `Worker`."""

    def pool(self) -> None:
        pools = [one for maker in self.soak.makers for one in chain(maker.creator)
                 if isinstance(one, linmem.PoolingCreator)]
        pool = self.rng.choice(pools)
        if self.rng.random() < 0.3:
            pool.trim(self.rng.choice((0, 0, 32 * PAGE)))
        else:
            try:
                pool.warm(2, linmem.MemoryType(1, 2), reserved_size_in_bytes=1 << 18, guard_size_in_bytes=GUARD)
            except (linmem.LimitError, linmem.PoolError):
                pass        # the pool is full, or cannot keep memories of this kind
            except ValueError:
                must(pool.image is not None or isinstance(pool.upstream, linmem.PythonCreator), "warm() refused")
        stats = pool.stats()
        must(0 <= stats["pinned"] <= stats["live"] <= stats["slots"], f"the figures of a pool: {stats}")
        must(all(n >= 0 for n in stats["resets"].values()), f"the figures of a pool: {stats}")

    def statistics(self) -> None:
        for maker in self.soak.makers:
            if isinstance(maker.creator, linmem.StatisticsCreator):
                sums, records = maker.creator.statistics(), maker.creator.memories()
                must(0 <= sums["current_count"] <= sums["peak_count"] <= sums["total_count"], f"the sums {sums}")
                must(sum(not record["alive"] for record in records) <= 8, f"{len(records)} records are kept")

    def private_pool(self) -> None:
        """Drop a pool before its memories."""
        maker = Maker("a private pool", linmem.PoolingCreator(max_unused_warm=self.rng.randrange(3)))
        made = [self.make(maker) for _ in range(3)]
        made[0].mem.close()
        self.held += made[1:]
        del maker, made
        while len(self.held) > MAX_HELD:
            self.close()
