"""The exceptions of linmem."""

from __future__ import annotations

import copyreg

from linmem._core.arguments import printable, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["FileFormatError", "GrowError", "LimitError", "OwnedError", "OwnerDied", "PageError", "PoolError"]


def _reduce(self: BaseException) -> tuple[object, ...]:
    # Python pickles an exception as a call of its class with `args`, but some of these classes take other arguments.
    return copyreg.__newobj__, (type(self), *self.args), vars(self)     # type: ignore[attr-defined]


class GrowError(MemoryError):
    """A growth or a creation exceeds a bound of the memory: its maximum or its capacity."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)

    def __reduce__(self) -> tuple[object, ...]:
        return _reduce(self)


class LimitError(GrowError):
    """A limit of bytes does not cover the request: a `LimitingCreator`'s, or `limit_each` of a `CallbackCreator`.

    Attributes
    ----------
    limit, used, requested : int
        In bytes: the limit, the part of the limit that is in use, and the bytes that the request would add.
    """

    def __init__(self, message: str, *, limit: int, used: int, requested: int) -> None:
        super().__init__(message)
        self.limit = limit
        self.used = used
        self.requested = requested


class PoolError(GrowError):
    """Every slot of a pool is in use, and the pool was made to have no more slots.

    Attributes
    ----------
    slots : int
        The number of slots of the pool.
    """

    def __init__(self, message: str, *, slots: int) -> None:
        super().__init__(message)
        self.slots = slots


# OSError first: in the other order .errno and .winerror are lost.
class PageError(OSError, MemoryError):
    """The operating system refused a page call.

    Attributes
    ----------
    errno, winerror : int
        The code of the operating system, as in any `OSError`. If there is a winerror, errno is ENOMEM for each code
        that reports exhausted memory, an exhausted quota or an exhausted commit limit.
    call : str
        The page call: "reserve", "commit", "discard", "protect" ...
    size : int
        The number of bytes of the call.
    """

    call: str = ""
    size: int = 0

    def __init__(self, *args: object) -> None:
        super().__init__(*args)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), self.args, {**vars(self), "errno": self.errno}


class OwnedError(RuntimeError):
    """Only the owner of the memory, a wasmtime store, may make this call."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)


class OwnerDied(RuntimeError):
    """The process that held a `Lock` ended without a release."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)


class FileFormatError(ValueError):
    """The file is not an image, a delta or a snapshot of linmem, is damaged, or contradicts itself.

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

    def __reduce__(self) -> tuple[object, ...]:
        return _reduce(self)


def page_error(os_error_args: tuple[Any, ...], call: str, size: int) -> PageError:
    """A `PageError`; `os_error_args` is what `pages.os_error_args` returns for the code."""
    error = PageError(*os_error_args)
    if os_error_args[0]:        # 0: the errno that OSError derives from a winerror is right
        error.errno = os_error_args[0]
    error.call = call
    error.size = size
    return error
