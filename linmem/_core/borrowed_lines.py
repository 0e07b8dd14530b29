"""Calls a function so that the Python stack shows other lines than those of the caller."""

from __future__ import annotations

from types import FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_TEMPLATE = (lambda rest, function: rest.pop()(rest, function) if rest else function()).__code__
_END = ("(linmem)", 0)      # stands for frames that the stack does not have


def frames_of(lines: list[tuple[str, int]], n: int) -> list[FunctionType]:
    """A function for each (file, line), the newest first, and for `n` in total."""
    return [FunctionType(_TEMPLATE.replace(co_filename=file, co_firstlineno=line), {})
            for file, line in (*lines, *[_END] * (n - len(lines)))]


def call_under(frames: list[FunctionType], function: Callable[[], object]) -> None:
    rest = frames.copy()
    rest.pop()(rest, function)
