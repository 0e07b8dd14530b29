"""What Python code asks of its arguments, as the native code asks of its own; and how to show a bad one. Floor 0."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = ["check_flag", "check_pairs", "check_path", "check_size", "shown", "shows_protected"]

_WORD = 1 << 64
_MOST = 100     # characters of a value in a message

# Whether a buffer shows bytes of a memory that has protected pages; ValueError where one of these bytes cannot be read.
# Memories bring the function when they are imported: before, there are none.
shows_protected: Callable[[object], bool] = lambda data: False  # noqa: E731


def shown(value: object) -> str:
    """The value as a message shows it: its repr, cut short; its type where it has none."""
    try:
        text = repr(value)
    except Exception:       # of a hostile object, or of a number with too many digits
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _MOST else f"{text[:_MOST]}..."


def check_flag(value: object, name: str) -> bool:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def check_size(value: object, name: str) -> int:
    """A number of bytes, as native code takes it."""
    try:
        number = value.__index__()      # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        number = None
    if not isinstance(number, int):
        raise TypeError(f"{name} must be an integer number of bytes, got {type(value).__name__}")
    if number < 0:
        raise ValueError(f"{name} must be >= 0, got {shown(number)}")
    if number >= _WORD:
        raise OverflowError(f"{name} must be below 2**64, got {shown(number)}")
    return number


def check_pairs(given: Iterable[tuple[object, object]], name: str) -> list[tuple[int, int]]:
    """A list of (offset, size)."""
    try:
        pairs = [(offset, size) for offset, size in given]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be pairs of an offset and a size, got {shown(given)}: {error}") from None
    if all(type(offset) is type(size) is int and 0 <= offset < _WORD and 0 <= size < _WORD
           for offset, size in pairs):
        return pairs                    # type: ignore[return-value]
    return [(check_size(offset, name), check_size(size, name)) for offset, size in pairs]


def check_path(path: object, name: str = "path") -> str | bytes:
    """A path, as the file system takes it."""
    try:
        found = os.fspath(path)         # type: ignore[call-overload]
    except TypeError:
        raise TypeError(f"{name} must be a path (str, bytes or os.PathLike), got {type(path).__name__}") from None
    try:
        raw = os.fsencode(found)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} must be one that the file system can encode, got {shown(found)}: {error}") from None
    if b"\0" in raw:
        raise ValueError(f"{name} must have no NUL in it, got {shown(found)}")
    return found                        # type: ignore[no-any-return]
