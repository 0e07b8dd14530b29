"""The factory: creators by name, memories in one call. Floor 5."""

from __future__ import annotations

from linmem._core.adaptors import LimitingCreator, PythonCreator, StatisticsCreator, check_trait
from linmem._core.arguments import shown
from linmem._core.memory import Memory, MmapCreator, NativeCreator
from linmem._core.pool import PoolingCreator
from linmem.abc import MemoryCreator

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["as_native", "create", "creator"]

_KINDS: dict[str, type[NativeCreator]] = {
    "mmap": MmapCreator, "pool": PoolingCreator, "limiting": LimitingCreator, "statistics": StatisticsCreator}
_DEFAULT = MmapCreator()


def creator(kind: str = "mmap", **options: Any) -> NativeCreator:
    """Make a creator by the name of its kind.

    Parameters
    ----------
    kind : str
        "mmap": each memory is a mapping of its own (`MmapCreator`; options `prefault`, `huge_pages`).
        "pool": memories are reset and handed out again (`PoolingCreator`; good with no option at all; options
        `slots`, `keep_resident`, `max_unused_warm`, `max_resident`, `max_reserved`, `idle_seconds`,
        `max_reset_seconds`, `reset`, `when_full`, `timeout`, `check`, `image`, `upstream`).
        "limiting": one budget over all memories (`LimitingCreator`; options `limit_bytes`, `upstream`).
        "statistics": counts and times what happens (`StatisticsCreator`; options `upstream`, `history`).
    **options
        The constructor's own. An `upstream` that is left out (or None) is an `MmapCreator`.

    Raises
    ------
    ValueError
        For a kind that does not exist; the message lists those that do.
    TypeError
        For an option that the kind does not have or that is missing, or an `upstream` that is no creator.
    """
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, _KINDS))}, got {shown(kind)}")
    made = _KINDS[kind]
    if made is not MmapCreator:
        upstream = options.get("upstream")
        options["upstream"] = _DEFAULT if upstream is None else as_native(upstream, "upstream")
    return made(**options)


def create(minimum: int, maximum: int | None = None, *, creator: MemoryCreator | None = None,
           reserve: int | None = None, guard: int | None = None, may_move: bool = False,
           domain: str | None = None) -> Memory:
    """Make a linear memory.

    Parameters
    ----------
    minimum : int
        Bytes accessible at once, all zero.
    maximum : int, optional
        Bytes that growth will never exceed. None: only the machine bounds it.
    creator : MemoryCreator, optional
        Who makes it; an `MmapCreator` by default. A Python class that implements the trait will do.
    reserve : int, optional
        Bytes of address space to reserve at least: growth up to there never moves the base. None:
        the maximum where it is known and affordable, else a share of the address space: a few times the
        machine's memory at most, and less for each memory that holds a share already.
    guard : int, optional
        Inaccessible bytes after the capacity (and before the base), a multiple of the host page.
        65536 by default.
    domain : str, optional
        Whose pages a pool may hand to this user: only those of the same domain, and None is one of its own. Without a
        pool it has no effect.
    may_move : bool
        Whether the base may change when the memory grows past its capacity and nothing is exported from
        it. False: such a growth is a `GrowError`.

    Returns
    -------
    Memory

    Raises
    ------
    ValueError, TypeError, OverflowError
        For an argument that is no size, naming it, its value and the bound.
    PageError
        The OS refused; the message names the limit in the way.
    GrowError
        The creator's own bound refused (`LimitError` for a budget).

    Examples
    --------
    >>> mem = linmem.create(65536, maximum=1 << 30)
    >>> view = memoryview(mem)
    >>> mem.grow_to(1 << 20)
    >>> view[0] = 1
    >>> mem[0]
    1
    """
    native = _DEFAULT if creator is None else as_native(creator)
    if domain is None:      # a keyword takes a twentieth of the time of a pooled memory
        return native.create(minimum, maximum, reserve, guard, may_move=may_move)
    return native.create(minimum, maximum, reserve, guard, may_move=may_move, domain=domain)


def as_native(creator: MemoryCreator, name: str = "creator") -> NativeCreator:
    """The creator itself, or a `PythonCreator` around one that is written in Python; `name` is the argument's."""
    if isinstance(creator, NativeCreator):
        return creator
    check_trait(creator, name)
    return PythonCreator(creator)
