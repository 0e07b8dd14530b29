"""What Python code asks of its arguments, as the native code asks of its own; and how to show a bad one. Floor 0."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any, NoReturn

__all__ = ["check_bytes", "check_count", "check_flag", "check_pairs", "check_path", "check_size", "given",
           "printable", "refuse_buffer", "shown", "shows_protected"]

REQUIRED = object()     # of an argument that has no default

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


def printable(text: str) -> str:
    """The text, of which a name may be a part, in one line: a character that is not printed is its escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def check_flag(value: object, name: str) -> bool:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def given(maker: str, names: tuple[str, ...], defaults: Mapping[str, object], positional: tuple[Any, ...],
          named: Mapping[str, Any], most_positional: int | None = None) -> list[Any]:
    """The arguments of a call of the class `maker`, in the order of `names`.

    An extension class whose constructor takes its arguments like this refuses a missing or an unknown one in the
    words of its users: Cython's own words are those of ``__cinit__``.
    """
    most = len(names) if most_positional is None else most_positional
    if len(positional) > most:
        bound = f"at most {most}" if most else "no"
        raise TypeError(f"{maker}() takes {bound} arguments without a name, got {len(positional)}")
    found = dict(zip(names, positional, strict=False))
    for name, value in named.items():
        if name not in names:
            raise TypeError(f"{maker}() has no argument {name!r}; its arguments are: {', '.join(names) or 'none'}")
        if name in found:
            raise TypeError(f"{maker}() got the argument {name!r} twice, by its position and by its name")
        found[name] = value
    missing = [name for name in names if name not in found and defaults.get(name, REQUIRED) is REQUIRED]
    if missing:
        raise TypeError(f"{maker}() needs the argument {missing[0]!r}")
    return [found[name] if name in found else defaults[name] for name in names]


def check_count(value: object, name: str, what: str = "an integer", least: int = 0) -> int:
    """A whole number from `least` on, of any integer type (what has ``__index__``)."""
    try:
        number = value.__index__()      # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        number = None
    if not isinstance(number, int):
        raise TypeError(f"{name} must be {what}, got {type(value).__name__}")
    if number < least:
        raise ValueError(f"{name} must be >= {least}, got {shown(number)}")
    return number


def check_size(value: object, name: str, bound: str = "below 2**64") -> int:
    """A number of bytes, as native code takes it. The caller refuses what is not within `bound`, the words for a number
    past all."""
    number = check_count(value, name, "an integer number of bytes")
    if number >= _WORD:
        raise OverflowError(f"{name} must be {bound}, got {shown(number)}")
    return number


def check_pairs(given: Iterable[tuple[object, object]], name: str, bound: str) -> list[tuple[int, int]]:
    """A list of (offset, size), with `bound` as in `check_size`."""
    try:
        pairs = [(offset, size) for offset, size in given]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be pairs of an offset and a size, got {shown(given)}: {error}") from None
    if all(type(offset) is type(size) is int and 0 <= offset < _WORD and 0 <= size < _WORD
           for offset, size in pairs):
        return pairs                    # type: ignore[return-value]
    return [(check_size(offset, name, bound), check_size(size, name, bound)) for offset, size in pairs]


def refuse_buffer(data: object, name: str, error: Exception) -> NoReturn:
    """Say why `data` gives no contiguous bytes, where asking for them raised `error`."""
    kind = type(data).__name__
    if isinstance(error, ValueError):
        # NumPy says ValueError of an array that is not contiguous; others say it of what is closed or released.
        try:
            memoryview(data).release()          # type: ignore[arg-type]
        except ValueError:
            raise ValueError(f"{name} must be a buffer that can be read, got {kind}: {error}") from None
    raise TypeError(f"{name} must be a contiguous buffer of bytes, got {kind}: {error}") from None


def check_bytes(data: object, name: str) -> memoryview:
    """The bytes of a contiguous buffer of any shape and element type."""
    try:
        view = memoryview(data)                 # type: ignore[arg-type]
        if view.nbytes == 0:                    # memoryview casts no shape with a 0 in it
            return memoryview(b"")
        return view.cast("B")
    except (TypeError, ValueError, BufferError) as error:
        refuse_buffer(data, name, error)


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
