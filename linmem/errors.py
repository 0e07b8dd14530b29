"""Every exception of linmem."""

from __future__ import annotations

from linmem._core.arguments import printable, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["FileFormatError", "GrowError", "LimitError", "OwnedError", "PageError", "PoolError"]


class GrowError(MemoryError):
    """A growth (or creation) that the memory's own bounds refuse: its maximum or its capacity."""


class LimitError(GrowError):
    """A `LimitingCreator`'s budget does not cover the request.

    Attributes
    ----------
    limit, used, requested : int
        Bytes: the budget, what is charged to it, and what was asked for on top.
    """

    def __init__(self, message: str, *, limit: int, used: int, requested: int) -> None:
        super().__init__(message)
        self.limit = limit
        self.used = used
        self.requested = requested

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_limit_error, (self.args[0], self.limit, self.used, self.requested)


def _rebuild_limit_error(message: str, limit: int, used: int, requested: int) -> LimitError:
    return LimitError(message, limit=limit, used=used, requested=requested)


class PoolError(GrowError):
    """Every slot of a pool is in use, and it was told not to go beyond them.

    Attributes
    ----------
    slots : int
        The bound.
    """

    def __init__(self, message: str, *, slots: int) -> None:
        super().__init__(message)
        self.slots = slots

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_pool_error, (self.args[0], self.slots)


def _rebuild_pool_error(message: str, slots: int) -> PoolError:
    return PoolError(message, slots=slots)


# OSError first: the other order loses .errno and .winerror.
class PageError(OSError, MemoryError):
    """The operating system refused a page call.

    Attributes
    ----------
    errno, winerror : int
        The OS's own code, as in any `OSError`. Where that is a winerror, errno is ENOMEM for each code that says
        that memory, a quota or the commit limit is used up.
    call : str
        The page call: "reserve", "commit", "discard", "protect" ...
    size : int
        Bytes that it was asked for.
    """

    call: str = ""
    size: int = 0

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self.args, {**vars(self), "errno": self.errno}


class OwnedError(RuntimeError):
    """A memory that a wasmtime store owns was asked to do what only its owner may do."""


class FileFormatError(ValueError):
    """A file that is no image or delta of linmem's, is damaged, or lies about what it holds.

    Attributes
    ----------
    path : str
        The file.
    field : str
        The part of it that is wrong, by the name that the description of the format gives it.
    value, bound : object
        What stands there, and what had to.
    """

    def __init__(self, path: str, field: str, value: object, bound: object) -> None:
        texts = (printable(part) if isinstance(part, str) else shown(part) for part in (path, field, value, bound))
        super().__init__("{}: {} is {}, must be {}".format(*texts))
        self.path = path
        self.field = field
        self.value = value
        self.bound = bound

    def __reduce__(self) -> tuple[object, ...]:
        return FileFormatError, (self.path, self.field, self.value, self.bound)


def page_error(os_error_args: tuple[Any, ...], call: str, size: int) -> PageError:
    """The exception for a page call that the OS refused.

    Parameters
    ----------
    os_error_args : tuple
        The arguments that make an `OSError` carry the code the way this OS does. The first is the errno, or 0 if
        `OSError` knows it.
    call, size : str, int
        The page call, and the bytes that it was asked for.
    """
    error = PageError(*os_error_args)
    if os_error_args[0]:        # where there is a winerror, OSError has replaced it
        error.errno = os_error_args[0]
    error.call = call
    error.size = size
    return error
