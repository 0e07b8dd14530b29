"""Calls a function so that the Python stack shows other lines than those of the caller."""

from __future__ import annotations

from functools import lru_cache
from types import FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_TEMPLATE = (lambda rest, function: rest.pop()(rest, function) if rest else function()).__code__
_END = ("(linmem)", 0)      # stands for frames that the stack does not have


def frames_of(lines: list[tuple[str, int]], n: int) -> list[FunctionType]:
    """A function for each (file, line), the newest first, and for `n` in total."""
    return [_frame_of(*line) for line in (*lines, *[_END] * (n - len(lines)))]


# Not a new function for each memory: CPython 3.13 without a GIL never frees code once a second thread was started.
@lru_cache(1024)
def _frame_of(file: str, line: int) -> FunctionType:
    return FunctionType(_TEMPLATE.replace(co_filename=file, co_firstlineno=line), {})


def call_under(frames: list[FunctionType], function: Callable[[], object]) -> None:
    rest = frames.copy()
    rest.pop()(rest, function)
