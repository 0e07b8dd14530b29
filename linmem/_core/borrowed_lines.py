"""Calls a function so that the Python stack shows other lines than those of the caller."""

from __future__ import annotations

from types import FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_TEMPLATE = (lambda rest, function: rest.pop()(rest, function) if rest else function()).__code__
_END = ("(linmem)", 0)      # stands for frames that the stack does not have
_functions: dict[tuple[str, int], FunctionType] = {}


def frames_of(lines: list[tuple[str, int]], n: int) -> list[FunctionType]:
    """A function for each (file, line), the newest first, and for `n` in total."""
    return [_frame_of(*line) for line in (*lines, *[_END] * (n - len(lines)))]


def _frame_of(file: str, line: int) -> FunctionType:
    # Not a new function for each memory: CPython 3.13 without a GIL never frees code once a second thread was started.
    found = _functions.get((file, line))
    if found is None:
        if len(_functions) >= 1024:
            _functions.clear()
        found = FunctionType(_TEMPLATE.replace(co_filename=file, co_firstlineno=line), {})
        _functions[file, line] = found
    return found


def call_under(frames: list[FunctionType], function: Callable[[], object]) -> None:
    rest = frames.copy()
    rest.pop()(rest, function)
