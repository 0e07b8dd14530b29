"""Figures of pools, for a program, for Prometheus and for `linmem top`.

>>> import linmem.metrics, prometheus_client
>>> prometheus_client.REGISTRY.register(linmem.metrics.collector(pool))
"""

from __future__ import annotations

from linmem._core.arguments import check_flag, shown
from linmem._core.memory import live
from linmem._core.pool import PoolingCreator, pool_totals, read_metrics

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from linmem._core.publication import Publication

__all__ = ["collector", "publish", "read", "totals"]

_COUNTERS = {"hits": "Requests that an idle slot served.",
             "misses": "Requests that a new slot served.",
             "evictions": "Idle slots that lost their pages or were dropped, without purges.",
             "purges": "Slots whose pages idle_seconds or purge() gave back.",
             "resets": "Resets by kind.",
             "reset_seconds": "Estimated time in resets, from samples.",
             "bytes_zeroed": "Bytes that resets have zeroed."}
_GAUGES = {"live": "Slots in use.", "peak_live": "The largest number of slots that were in use at the same time.",
           "warm": "Idle slots that keep their pages.", "cold": "Idle slots without pages.",
           "resident": "Upper bound of the resident bytes of idle slots.",
           "page_tables": "Upper bound of the bytes of page tables of idle slots.",
           "reserved": "Bytes of address space of all slots, guards included."}
_COUNTERS_OF_A_POOL = {"fallbacks": "Memories that upstream made because the pool was full.",
                       "rejected": "Slots that were dropped because their reset failed.",
                       "refusals": "Requests that the pool itself refused."}
_GAUGES_OF_A_POOL = {"slots": "The maximum number of slots.",
                     "resident_bound": "The bound of resident and page_tables together."}
_GAUGES_OF_IMAGES = {"image_bytes": "Bytes of the images that slots start from.",
                     "image_descriptors": "Descriptors of these images."}
# The counters whose figure is a dict, and the label that has the keys of the dict as values.
_LABELS = {"hits": "state", "evictions": "cause", "resets": "kind"}


def read(pool: PoolingCreator) -> dict[str, Any]:
    """The figures of a pool: counters, which never decrease, and gauges.

    Returns
    -------
    dict
        Counters: hits_warm, hits_cold, misses, evictions (by cause), purges (by `idle_seconds` or `purge()`; evictions
        do not include purges), resets (by kind), reset_ns (an estimate from the first reset of a slot and then one
        reset of sixteen), bytes_zeroed. Gauges: live, peak_live (the largest number of live slots), warm, cold,
        resident, page_tables, reserved (bytes). Only the pool has the counters fallbacks, rejected and refusals, and
        the gauges slots, resident_bound, reserved_bound (None: no bound), images, image_bytes and image_descriptors.

        name: the pool's name, or None. shapes: a list with a dict for each shape: the figures that shapes and domains
        have too, image_bytes, image_descriptors, and `shape`, a dict. domains: a dict with a dict of the same figures
        for each domain, by name. If there are more than 256 shapes (or domains) without slots, the pool forgets all of
        these: the counters of a forgotten shape start at 0 again.

    Raises
    ------
    TypeError
        If `pool` is not a `PoolingCreator`.
    """
    return read_metrics(pool)


def totals() -> dict[str, int | None]:
    """The sums over all pools of this process, and the bounds of `linmem.set_pool_limits`.

    Returns
    -------
    dict
        resident: an upper bound of the bytes of idle slots, page tables included. resident_bound, reserved_bound:
        None means no bound. reserved: bytes of address space of all slots, live and idle.
    """
    return pool_totals()


def _label(name: str) -> str:
    """The name as a label. Different names have different labels, no label is "", and each label can be encoded."""
    plain = name and name[0] not in "'\"" and not any("\ud800" <= c <= "\udfff" for c in name)
    return name if plain else ascii(name)


def _by_shape(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The sums over all images of the figures of each shape, by the text of the shape."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        text = " ".join(f"{key}={value}" for key, value in row.pop("shape").items()
                        if value is not None and value is not False)
        found[text] = _sum(found[text], row) if text in found else row
    return found


def _sum(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return {key: _sum(value, b[key]) if isinstance(value, dict) else value + b[key] for key, value in a.items()}


def _check_pools(pools: tuple[object, ...]) -> None:
    for pool in pools:
        if not isinstance(pool, PoolingCreator):
            raise TypeError(f"pools must be PoolingCreators, got {type(pool).__name__}")


def publish(*pools: PoolingCreator, interval: float = 1.0) -> Publication:
    """Publish the memories of this process and the figures of pools, so that `linmem top` shows them.

    Without this, `linmem top` shows what the kernel knows: addresses and sizes. Names, growths and pools are known to
    this process alone. Who may read its ``/proc/PID/smaps``, the same user and root, may read the figures, too.

    Parameters
    ----------
    *pools : PoolingCreator
        The pools whose figures are published. The figures have the pool's `name`, or its number in this call.
    interval : float
        Seconds between two updates. An update takes the time of `linmem.live`.

    Returns
    -------
    Publication
        Its `close` ends the publication; it is also a context manager. Keep a reference: the publication ends with the
        last one, or with the process. At most 4096 memories are published, the largest ones.

    Raises
    ------
    TypeError, ValueError
        If a pool is not a `PoolingCreator`, or `interval` is not a number of seconds from 0.01 to a day.
    NotImplementedError
        On this system a file cannot be without a path (only Linux).
    """
    from linmem._core import publication

    _check_pools(pools)
    if isinstance(interval, bool) or not isinstance(interval, (int, float)):
        raise TypeError(f"interval must be a number of seconds, got {type(interval).__name__}")
    if not 0.01 <= interval <= 86400:
        raise ValueError(f"interval must be 0.01 to 86400 seconds, got {shown(interval)}")
    if not publication.is_possible():
        raise NotImplementedError("publish() needs memfd_create(2), which only Linux has")

    def figures() -> dict[str, Any]:
        infos = sorted(live(), key=lambda info: -info.committed)[:publication.MOST_MEMORIES]
        return {
            "memories": [{"start": info.base - info.pre_guard, "base": info.base,
                          "end": info.base + info.byte_capacity + info.guard, "size": info.byte_size,
                          "growths": info.growths, "name": info.name} for info in infos],
            "pools": [{"name": str(i) if pool.name is None else pool.name,
                       **{key: value for key, value in read(pool).items() if type(value) is int}}
                      for i, pool in enumerate(pools)]}

    return publication.Publication(figures, interval)


def collector(*pools: PoolingCreator, names: Iterable[str] | None = None, per_domain: bool = True,
              per_shape: bool = True) -> Any:
    """A collector for ``prometheus_client``, which the extra ``linmem[metrics]`` installs.

    Parameters
    ----------
    *pools : PoolingCreator
        The collector holds references to the pools. A registry takes one collector, so give all pools to one call.
    names : iterable of str, optional
        The label ``pool`` of each pool. By default its `name`, or "0", "1" ... for the pools without a name.
    per_domain : bool
        Adds the figures of each domain, with the label ``domain``. Prometheus is made for hundreds of domains, not for
        millions. The label "" means no domain. A name that is empty, begins with a quote, or is not valid Unicode is
        shown in quotes, as by ``ascii()``.
    per_shape : bool
        Adds the figures of each shape, with the label ``shape``: the sum over shapes that only differ in their image.

    Returns
    -------
    prometheus_client.registry.Collector
        Families ``linmem_pool_...``, ``linmem_pool_domain_...`` and ``linmem_pool_shape_...``.

    Raises
    ------
    TypeError, ValueError
        If a pool is not a `PoolingCreator`, or if `names` does not have one different name for each pool.
    ImportError
        If ``prometheus_client`` is not installed.
    """
    _check_pools(pools)
    if names is None:
        names = [str(i) if pool.name is None else pool.name for i, pool in enumerate(pools)]
    labels = [_label(str(name)) for name in names]
    check_flag(per_domain, "per_domain")
    check_flag(per_shape, "per_shape")
    if len(labels) != len(pools) or len(set(labels)) != len(labels):
        raise ValueError(f"names must be {len(pools)} different names, got {labels}")
    try:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    except ImportError as error:
        raise ImportError("linmem.metrics.collector needs prometheus_client: pip install 'linmem[metrics]'") from error

    class Collector:
        def collect(self) -> Iterator[Any]:
            found = [(label, read(pool)) for label, pool in zip(labels, pools, strict=True)]
            yield from families("linmem_pool", ["pool"], [([label], figures) for label, figures in found],
                                _COUNTERS | _COUNTERS_OF_A_POOL, _GAUGES | _GAUGES_OF_A_POOL | _GAUGES_OF_IMAGES)
            if per_domain:
                yield from families("linmem_pool_domain", ["pool", "domain"], [
                    ([label, "" if name is None else _label(name)], row)
                    for label, figures in found for name, row in figures["domains"].items()], _COUNTERS, _GAUGES)
            if per_shape:
                yield from families("linmem_pool_shape", ["pool", "shape"], [
                    ([label, text], row)
                    for label, figures in found for text, row in _by_shape(figures["shapes"]).items()],
                    _COUNTERS, _GAUGES | _GAUGES_OF_IMAGES)

    def families(prefix: str, keys: list[str], rows: list[tuple[list[str], dict[str, Any]]],
                 counters: dict[str, str], gauges: dict[str, str]) -> Iterator[Any]:
        for _, row in rows:
            row["hits"] = {state: row[f"hits_{state}"] for state in ("warm", "cold")}
            row["reset_seconds"] = row["reset_ns"] / 1e9
        for kind, texts in ((CounterMetricFamily, counters), (GaugeMetricFamily, gauges)):
            for name, text in texts.items():
                own_key = [_LABELS[name]] if name in _LABELS else []
                family = kind(f"{prefix}_{name}", text, labels=keys + own_key)
                for values, row in rows:
                    if own_key:
                        for value, n in row[name].items():
                            family.add_metric([*values, value], n)
                    else:
                        family.add_metric(values, row[name])
                yield family

    return Collector()
