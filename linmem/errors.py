"""The exceptions of linmem, and `from_failure`, which makes one of them from a failure of native code."""

from __future__ import annotations

from linmem._core.arguments import printable, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["FileFormatError", "GrowError", "LimitError", "OwnedError", "PageError", "PoolError"]


def _without_init(kind: type[BaseException], *args: object) -> BaseException:
    return kind.__new__(kind, *args)


def _reduce(self: BaseException) -> tuple[object, ...]:
    # Exceptions are pickled as a call of their class with `args`; the constructors of these classes take other ones.
    return _without_init, (type(self), *self.args), vars(self)


class GrowError(MemoryError):
    """The memory's own bounds refuse a growth (or a creation): its maximum or its capacity."""


class LimitError(GrowError):
    """The budget of a `LimitingCreator` does not cover the request.

    Attributes
    ----------
    limit, used, requested : int
        Bytes: the budget, how much of the budget is in use, and how much more was asked for.
    """

    def __init__(self, message: str, *, limit: int, used: int, requested: int) -> None:
        super().__init__(message)
        self.limit = limit
        self.used = used
        self.requested = requested

    __reduce__ = _reduce


class PoolError(GrowError):
    """Every slot of a pool is in use, and the pool was made to have no more slots.

    Attributes
    ----------
    slots : int
        How many slots the pool has.
    """

    def __init__(self, message: str, *, slots: int) -> None:
        super().__init__(message)
        self.slots = slots

    __reduce__ = _reduce


# OSError first: in the other order .errno and .winerror are lost.
class PageError(OSError, MemoryError):
    """The operating system refused a page call.

    Attributes
    ----------
    errno, winerror : int
        The code of the operating system, as in any `OSError`. If there is a winerror, errno is ENOMEM for each code
        that means that memory, a quota or the commit limit is used up.
    call : str
        The page call: "reserve", "commit", "discard", "protect" ...
    size : int
        The number of bytes that the call was made for.
    """

    call: str = ""
    size: int = 0

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self.args, {**vars(self), "errno": self.errno}


class OwnedError(RuntimeError):
    """The call is reserved for the owner of the memory, which is a wasmtime store."""


class FileFormatError(ValueError):
    """The file is not an image or a delta of linmem, is damaged, or contradicts itself.

    Attributes
    ----------
    path : str
        The file.
    field : str
        The part of the file that is wrong, by its name in the description of the format.
    value, bound : object
        The value of the field, and what the value must be.
    """

    def __init__(self, path: str, field: str, value: object, bound: object) -> None:
        texts = (printable(part) if isinstance(part, str) else shown(part) for part in (path, field, value, bound))
        super().__init__("{}: {} is {}, must be {}".format(*texts))
        self.path = path
        self.field = field
        self.value = value
        self.bound = bound

    __reduce__ = _reduce


# The codes of `units.pxd`, without "E_", whose exception has no attributes.
_CLASSES: dict[str, type[Exception]] = {
    "NO_MEMORY": MemoryError, "OVERFLOW": OverflowError, "SHRINK": ValueError, "MAXIMUM": GrowError,
    "CAPACITY": GrowError, "EXPORTED": BufferError, "IMAGE": ValueError, "OWNED": OwnedError,
    "OWN_GROWTH": RuntimeError, "BROKEN": RuntimeError, "PROTECTED": ValueError, "UNSUPPORTED": TypeError}


def page_error(os_error_args: tuple[Any, ...], call: str, size: int) -> PageError:
    """A `PageError`; `os_error_args` is what `pages.os_error_args` returns for the code."""
    error = PageError(*os_error_args)
    if os_error_args[0]:        # OSError derives errno from a winerror: 0 means that this errno is right
        error.errno = os_error_args[0]
    error.call = call
    error.size = size
    return error


def from_failure(reason: str, text: str, *, os_error_args: tuple[Any, ...], call: str, size: int,
                 used: int, limit: int) -> Exception:
    """The exception for a failure of native code.

    Parameters
    ----------
    reason : str
        "os", or the name of a code in `units.pxd` without "E_".
    text : str
        The whole message.
    """
    if reason == "os":
        return page_error(os_error_args, call, size)
    if reason == "LIMIT":
        return LimitError(text, limit=limit, used=used, requested=size)
    if reason == "EXHAUSTED":
        return PoolError(text, slots=limit)
    return _CLASSES[reason](text)
