"""Checks of arguments in Python, and how messages show refused values and sizes.

`memory.pyx` checks the arguments of native calls. Its checks accept the same values and raise the same messages.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping
    from typing import Any, TypeAlias

    AnyPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]


REQUIRED = object()     # marks an argument that was not passed and has no default

_SIZE_BOUND = 1 << 64
_SHOWN_CHARACTERS = 100
NAME_BYTES = 100        # the most bytes of a creator's name; memory.pxd has the same number

# Returns whether a buffer shows bytes of a memory that has protected pages. Raises ValueError if one of them cannot
# be read. `linmem._core.memory` replaces this function when it is imported: before that, no memory exists.
shows_protected: Callable[[object], bool] = lambda data: False  # noqa: E731


def shown(value: object) -> str:
    """The value as a message shows it: the first 100 characters of its repr, or its type if repr() fails."""
    try:
        text = repr(value)
    except Exception:       # for example, repr() refuses an int with too many digits
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def printable(text: str) -> str:
    """The text in one line: each character that is not printable is replaced by its escape."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def show_size(size: int) -> str:
    """1536 -> "1.5 KiB"; whole numbers without a fraction."""
    value, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return "1 byte" if size == 1 else f"{value:.1f}".removesuffix(".0") + f" {unit}"


def check_flag(value: object, name: str) -> bool:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return value


def check_choice(value: object, name: str, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(value)}")
    return value


def given(maker: str, names: tuple[str, ...], defaults: Mapping[str, object], positional: tuple[Any, ...],
          named: Mapping[str, Any], most_positional: int | None = None) -> list[Any]:
    """The arguments of a call of the class `maker`, in the order of `names`.

    The constructors of extension classes take ``*args, **kwargs`` and call this function, so that the messages name
    the class. Cython's own messages would name ``__cinit__``.
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
    for name in names:
        if found.setdefault(name, defaults.get(name, REQUIRED)) is REQUIRED:
            raise TypeError(f"{maker}() needs the argument {name!r}")
    return [found[name] for name in names]


def check_count(value: object, name: str, what: str = "an integer", least: int = 0) -> int:
    """An integer of any type that has ``__index__``, and not less than `least`."""
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
    """A number of bytes below 2**64. `bound` is the bound that the message names; the caller checks it."""
    number = check_count(value, name, "an integer number of bytes")
    if number >= _SIZE_BOUND:
        raise OverflowError(f"{name} must be {bound}, got {shown(number)}")
    return number


def check_pairs(given: Iterable[tuple[object, object]], name: str, bound: str) -> list[tuple[int, int]]:
    """A list of (offset, size); `bound` as for `check_size`."""
    try:
        pairs = [(offset, size) for offset, size in given]
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be pairs of an offset and a size, got {shown(given)}: {error}") from None
    if all(type(offset) is type(size) is int and 0 <= offset < _SIZE_BOUND and 0 <= size < _SIZE_BOUND
           for offset, size in pairs):
        return pairs                    # type: ignore[return-value]
    return [(check_size(offset, name, bound), check_size(size, name, bound)) for offset, size in pairs]


def check_bytes(data: object, name: str) -> memoryview:
    """The bytes of a contiguous buffer of any shape and element type; else the exception that says why not."""
    kind = type(data).__name__
    try:
        view = memoryview(data)                 # type: ignore[arg-type]
        try:
            return view.cast("B") if view.nbytes else memoryview(b"")   # a shape with a 0 in it cannot be cast
        except ValueError as error:     # the element type is one that memoryview cannot cast
            raise TypeError(error) from None
    except ValueError as error:         # for example, the memory is closed or the memoryview is released
        raise ValueError(f"{name} must be a buffer that can be read, got {kind}: {error}") from None
    except (TypeError, BufferError) as error:
        raise TypeError(f"{name} must be a contiguous buffer of bytes, got {kind}: {error}") from None


def check_name(value: object) -> str | None:
    """The name of a creator, which stands in the text of errors."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"name must be a str or None, got {type(value).__name__}")
    value = str.__str__(value)      # the text, whatever methods a class of the caller has
    if not value or not value.isprintable() or len(value.encode()) > NAME_BYTES:
        raise ValueError(f"name must be 1 to {NAME_BYTES} bytes of printable text in UTF-8, got {shown(value)}")
    return value


def check_path(path: object, name: str = "path") -> str | bytes:
    """A path that the file system can have."""
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


def check_descriptor(fd: int, name: str, what: str, given: object, *, writes: bool = False) -> None:
    """Refuse a descriptor that is closed, that is not of a regular file, or that cannot read (with `writes`: read and
    write). `given` is the argument `name`, and `what` says what the argument must be.
    """
    import os
    import stat

    try:
        import fcntl
    except ImportError:         # the system has handles, not descriptors
        return
    wrong = ""
    try:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        mode = flags & os.O_ACCMODE
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            wrong = "not a regular file"
        elif flags & getattr(os, "O_PATH", 0):
            wrong = "open without a right to read (O_PATH)"
        elif mode == os.O_WRONLY:
            wrong = "open for writing only"
        elif writes and mode != os.O_RDWR:
            wrong = "open for reading only"
    except (OSError, ValueError, OverflowError):
        wrong = "not open"
    if wrong:
        raise ValueError(f"{name} must be {what}, got {shown(given)}, which is {wrong}")
