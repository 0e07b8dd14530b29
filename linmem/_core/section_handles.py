"""What `shared_handles` is, where a shared memory is a section object with a name: on Windows.

The name of a section without a `shm_name` is its random token, so no process can guess the name. The name exists as
long as a process has a handle of the section, so nothing remains after the last process. Names are those of one
session: a service and a user who has logged in do not see each other's.
"""

from __future__ import annotations

import os
from contextlib import suppress

from linmem._core.arguments import shown
from linmem._core.shared_handles import HEAD, SharedHandle, check_timeout, new_token
from linmem._core.shared_handles import check_shm_name as _check_name
from linmem._os import pages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["SectionHandle", "check_shm_name", "check_timeout", "new_token"]

close = pages.close_section

_TOKEN_AT = 16
_NAMED = "name-"


def check_shm_name(name: object, argument: str) -> str:
    """As for files; and a name of Windows has no backslash and no lone surrogate."""
    text = _check_name(name, argument)
    if "\\" in text or any("\ud800" <= each <= "\udfff" for each in text):
        raise ValueError(f"{argument} must be 1 to 255 bytes without '/' and NUL, and here without backslashes and lone"
                         f" surrogates, got {shown(name)}")
    return text


class SectionHandle(SharedHandle):
    """The handle of a shared memory that is a section object. Its number is of no use to another process."""

    __slots__ = ("_name",)

    def __init__(self, pid: int, number: int, token: bytes, name: str | None = None) -> None:
        super().__init__(pid, number, 0, 0, token)
        if name is not None:
            check_shm_name(name, "name of a handle")
        self._name = token.hex() if name is None else _NAMED + name

    def __reduce__(self) -> tuple[object, ...]:
        name = None if self._name == self._token.hex() else self._name.removeprefix(_NAMED)
        return SectionHandle, (self._pid, self._fd, self._token, name)

    def fileno(self) -> int:
        """Raise ValueError, because a section has no descriptor."""
        raise ValueError("fileno() is not supported on this system, where a shared memory has no descriptor: pickle the"
                         " handle, or give the memory a shm_name")

    def _lock_of(self, offset: int) -> Any:
        return WordLock(self, offset)

    def open(self) -> int:
        try:
            section = pages.open_section(self._name)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"the shared memory {self._token[:8].hex()} is gone: no process of this session has it any more"
                f" (process {self._pid} made the handle)") from None
        try:
            words = pages.read_section(section, _TOKEN_AT + len(self._token))
            if words is None or words[_TOKEN_AT:] != self._token:
                raise FileNotFoundError(f"the shared memory {self._token[:8].hex()} is gone: another section has its"
                                        " name")
            return section
        except BaseException:
            close(section)
            raise


def handle_of(section: int, token: bytes) -> SectionHandle:
    name = pages.section_name(section)
    return SectionHandle(os.getpid(), section, token, None if name == token.hex() else name.removeprefix(_NAMED))


def file_name(shm_name: str) -> bytes:
    """The name of the section of a memory with this `shm_name`."""
    return (_NAMED + shm_name).encode()


def open_shared(what: Any) -> int:
    """A new handle of the section that a handle or a name stands for."""
    if isinstance(what, SectionHandle):
        return what.open()
    if isinstance(what, str):
        name = check_shm_name(what, "attach")
        try:
            return pages.open_section(_NAMED + name)
        except FileNotFoundError:
            raise FileNotFoundError(f"no process of this session has a shared memory of the name {name!r}") from None
    raise TypeError(f"attach must be a handle, the name of a shared memory or a descriptor, got {shown(what)}, and on"
                    " this system a shared memory has no descriptor")


def unlink(section: int) -> None:
    if not pages.section_name(section).startswith(_NAMED):
        raise ValueError("the shared memory has no name: it was made without shm_name=")
    raise TypeError("unlink() is not supported on this system: the name is gone when no process has the memory")


class WordLock:
    """A lock on a word of a shared memory, which the system gives back when its owner dies. Its owner is the process
    that has made the kernel object of the lock's name; others look whether the object exists."""

    def __init__(self, handle: SectionHandle, offset: int) -> None:
        self._at = HEAD + offset
        self._section = handle.open()
        self._name = f"lock-{handle._token.hex()}-{offset}"
        self._claim: int | None = None

    def take(self) -> bool:
        with suppress(PermissionError):
            self._claim = pages.claim_name(self._name)
        return self._claim is not None

    def write(self, word: bytes) -> None:
        """Also when the memory is closed."""
        pages.write_section(self._section, self._at, word)

    def give_back(self) -> None:
        claim, self._claim = self._claim, None
        if claim is not None:
            close(claim)

    def close(self) -> None:
        self.give_back()
        close(self._section)
