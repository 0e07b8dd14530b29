"""Opens the file of a file memory: only regular files, and one process that writes.

The writer holds a lock on the open file (flock(2)). The system releases the lock when the last descriptor of the open
file is closed, so also when the process dies. A forked child has the same open file, and so the same lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import NoReturn

from linmem._files.atomic_file import sync_folder

try:
    import fcntl
except ImportError:         # the system has no advisory locks
    fcntl = None            # type: ignore[assignment]

_OWNER_ONLY = 0o600
_NO_FILE = "path must be a regular file, not a pipe, a socket or a device"
_A_DIRECTORY = "path must be a regular file, not a directory"
# A pipe or a device must not block the call, and a terminal must not become the terminal of this process.
_FLAGS = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY"))


def open_for_writing(path: str | bytes) -> tuple[int, bool]:
    """Open a file that no other open file writes, or make it.

    Returns
    -------
    fd : int
        The open file holds the lock.
    is_new : bool
        Whether this call has made the file.
    """
    while True:
        fd, is_new = _open_or_make(path)
        try:
            _check_regular(fd, path)
            if not _lock(fd):
                raise BlockingIOError(errno.EAGAIN, "the file has a writer already, in this process or in another one"
                                                    " (open_file(path, 'r') reads beside it)", path)
            if is_at(fd, path):
                _sync_folder_of(path)
                return fd, is_new
        except BaseException:
            if is_new:
                remove_new(fd, path)
            os.close(fd)
            raise
        os.close(fd)        # another process has removed or replaced the file since


def open_for_reading(path: str | bytes) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | _FLAGS)
    except OSError as error:
        _explain(error, path)
    try:
        _check_regular(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def remove_new(fd: int, path: str | bytes) -> None:
    """Remove a file that `open_for_writing` has made, if the memory could not be made. No other process has it then,
    because this process holds the lock; without the lock another process may have taken the empty file, which stays.
    """
    if _lock(fd) and is_at(fd, path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def remove_new_open(fd: int) -> None:
    """`remove_new` of the file that is open as `fd`."""
    with contextlib.suppress(OSError):
        remove_new(fd, os.readlink(f"/proc/self/fd/{fd}"))


def is_at(fd: int, path: str | bytes) -> bool:
    """Whether the path leads to the open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _open_or_make(path: str | bytes) -> tuple[int, bool]:
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, _OWNER_ONLY), True
        except FileExistsError:
            pass
        try:
            return os.open(path, os.O_RDWR | _FLAGS), False
        except FileNotFoundError:       # removed since
            continue
        except OSError as error:
            _explain(error, path)


def _sync_folder_of(path: str | bytes) -> None:
    try:
        sync_folder(os.path.dirname(path) or os.curdir)
    except OSError as error:        # fsync() names no file
        raise OSError(error.errno, f"the folder of path cannot be made durable: {error.strerror}", path) from None


def _explain(error: OSError, path: str | bytes) -> NoReturn:
    # With O_NOFOLLOW, the code for a symbolic link differs among systems.
    if os.path.islink(path):
        raise OSError(errno.ELOOP, "path is a symbolic link: give the file that it leads to (os.path.realpath)",
                      path) from None
    if error.errno == errno.EISDIR:
        raise IsADirectoryError(errno.EISDIR, _A_DIRECTORY, path) from None
    if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):      # a socket
        raise OSError(error.errno, _NO_FILE, path) from None
    raise error


def _check_regular(fd: int, path: str | bytes) -> None:
    mode = os.fstat(fd).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, _A_DIRECTORY, path)
    if not stat.S_ISREG(mode):
        raise OSError(errno.ENODEV, _NO_FILE, path)


def _lock(fd: int) -> bool:
    assert fcntl is not None        # without locks, the system also maps no files
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
