"""Calls a function so that the Python stack shows other lines than those of the caller."""

from __future__ import annotations

from types import FunctionType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_TEMPLATE = (lambda rest, function: rest.pop()(rest, function) if rest else function()).__code__
_END = ("(linmem)", 0)      # stands for frames that the stack does not have
_MOST = 1024                # functions that are kept
_functions: dict[tuple[str, int], FunctionType] = {}


def frames_of(lines: list[tuple[str, int]], n: int) -> list[FunctionType]:
    """A function for each (file, line), the newest first, and for `n` in total."""
    return [_frame_of(each) for each in (*lines, *[_END] * (n - len(lines)))]


# Not a new function for each memory: CPython 3.13 without a GIL never frees code once a second thread was started.
def _frame_of(line: tuple[str, int]) -> FunctionType:
    found = _functions.get(line)
    if found is None:
        if len(_functions) >= _MOST:
            _functions.clear()
        file, number = line
        found = _functions[line] = FunctionType(_TEMPLATE.replace(co_filename=file, co_firstlineno=number), {})
    return found


def call_under(frames: list[FunctionType], function: Callable[[], object]) -> None:
    rest = frames.copy()
    rest.pop()(rest, function)
