"""Writes a file as a whole or not at all, for `save`, for the cache and for the command line.

The content goes to a temporary file in the folder of the target. The writer holds a lock on the temporary file until it
has flushed the file to the disk and renamed it over the target. The system releases the lock of a process that ends.
So a writer first removes the temporary files that no process has locked.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:         # the system has no advisory locks
    fcntl = None            # type: ignore[assignment]

# The length of a temporary name does not depend on the name of the target, which may have the maximum length.
TEMPORARY = re.compile(r"\.linmem-[0-9a-f]{16}\.tmp")
ABANDONED = 3600            # seconds; without locks, an older temporary file counts as abandoned

_HAS_OWNERS = hasattr(os, "fchown")
_drafts: list[Draft] = []       # which this process has neither renamed nor removed


class Draft:
    """A temporary file that only its owner can read and write, until `become` gives it its name."""

    file: BinaryIO
    path: str
    mode: int               # the mode that the system gives a new file in this folder

    def become(self, path: str, mode: int | None = None) -> None:
        """Make the file durable at `path`, with the permissions `mode`; None: the permissions of a new file."""
        self.file.flush()
        fd = self.file.fileno()
        mode = self.mode if mode is None else mode
        # Some file systems have no permissions and refuse every change.
        if _HAS_OWNERS and stat.S_IMODE(os.fstat(fd).st_mode) != mode:
            os.fchmod(fd, mode)
        os.fsync(fd)
        if fcntl is None:
            self.file.close()       # a system without locks cannot rename an open file
        # The lock is held until after the rename, so that no other writer removes the file.
        os.replace(self.path, path)
        self.file.close()
        sync_folder(os.path.dirname(path))


@contextlib.contextmanager
def draft(folder: str) -> Iterator[Draft]:
    """A `Draft` in `folder`. The temporary file is removed at the end of the block, unless `become` has renamed it."""
    remove_abandoned(folder)
    made = Draft()
    # The path is known before the file exists, so that an interrupt at any line leaves no file.
    made.path = _unused(folder)
    _drafts.append(made)
    try:
        while True:
            with open(made.path, "x+b") as made.file:
                if _claim(made):
                    yield made
                    return
            made.path = _unused(folder)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made.path)
        _drafts.remove(made)


def remove_drafts() -> None:
    """Remove the temporary files of this process, because it ends while other threads write to them."""
    for made in _drafts[:]:
        with contextlib.suppress(OSError):      # the file was renamed, or a system cannot remove an open file
            os.unlink(made.path)


def _unused(folder: str) -> str:
    while True:
        path = os.path.join(folder, f".linmem-{os.urandom(8).hex()}.tmp")
        if not os.path.lexists(path):
            return path


def _claim(made: Draft) -> bool:
    """Lock the new file, and close it to other users. False: another writer removed it before it was locked."""
    fd = made.file.fileno()
    made.mode = stat.S_IMODE(os.fstat(fd).st_mode)
    if _HAS_OWNERS:
        with contextlib.suppress(PermissionError):      # as in become()
            os.fchmod(fd, 0o600)
    return fcntl is None or (_lock(fd) and os.fstat(fd).st_nlink > 0)


def _lock(fd: int) -> bool:
    """False: another process holds the lock."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            raise
    return True


def remove_abandoned(folder: str) -> None:
    """Remove the temporary files whose writers ended before the rename.

    Files that this process may not list or remove stay.
    """
    try:
        paths = [os.path.join(folder, name) for name in os.listdir(folder) if TEMPORARY.fullmatch(name)]
    except OSError:
        return
    for path in paths:
        with contextlib.suppress(OSError):
            if fcntl is None:
                if os.stat(path).st_mtime < time.time() - ABANDONED:
                    os.unlink(path)
                continue
            with open(path, "rb",
                      opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)


def sync_folder(folder: str | bytes) -> None:
    # The rename is durable once the folder is. Some systems cannot open folders.
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:     # this process may write to the folder, but not read it
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacing(path: str | bytes | os.PathLike[str], mode: int | None = None, *,
              follow: bool = True) -> Iterator[tuple[BinaryIO, bool]]:
    """Yield a file and whether it is a stream. When the block ends, `path` has the bytes that were written to the file.

    A regular file is replaced as a whole and keeps its owner and its permissions. If the block fails, the old file
    stays. A pipe or a character device (/dev/stdout, /dev/null) is a stream: it is written to directly and cannot seek.
    Files of other kinds are refused. Every OSError names `path`.

    mode: the permissions of a file that did not exist; by default those of a new file.
    follow: False if a program that is not trusted can change the folder. Then the new file takes the place of a link, a
    pipe or a device, and none of these is followed or opened.
    """
    name = os.fsdecode(path)
    # Symbolic links are followed, as by open().
    target = os.path.realpath(name) if follow else name
    try:
        try:
            before = os.stat(name, follow_symlinks=follow)
        except FileNotFoundError:
            if not name:
                raise
            before = None
        if before is not None and not follow and not stat.S_ISREG(before.st_mode) and not stat.S_ISDIR(before.st_mode):
            before = None
        kind = stat.S_IFREG if before is None else stat.S_IFMT(before.st_mode)
        if kind == stat.S_IFDIR or not os.path.basename(name):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFCHR):
            raise OSError(errno.ENXIO, "Not a regular file, a pipe or a character device")
        if before is not None and follow and (kind != stat.S_IFREG or not _is_at(target, before)):
            with open(name, "wb") as stream:
                yield stream, True
            return
        with draft(os.path.dirname(target)) as made:
            if before is not None:
                _give(made, before)
            yield made.file, False
            made.become(target, mode if before is None else stat.S_IMODE(before.st_mode))
    except OSError as error:
        # An error about another file, which the block opened, keeps the name of that file.
        given = error.filename if error.filename is None else os.fsdecode(error.filename)
        if given is None or TEMPORARY.fullmatch(os.path.basename(given)) or given == os.path.dirname(target):
            error.filename = name
            del error.filename2         # str(error) would show a None
        raise


def write_figure(figure: Any, path: str, *, dpi: int) -> None:
    """Draw a figure of matplotlib into `path`. The extension of the name is the format; without one it is PNG."""
    drawn = figure_bytes(figure, os.path.splitext(path)[1][1:].lower() or "png", dpi=dpi)
    with replacing(path) as (file, _):
        file.write(drawn)


def figure_bytes(figure: Any, form: str, *, dpi: int) -> bytes:
    drawn = io.BytesIO()        # the writers of some formats seek, and a pipe cannot
    figure.savefig(drawn, dpi=dpi, format=form)
    return drawn.getvalue()


def _is_at(target: str, status: os.stat_result) -> bool:
    """Whether `target` is the name of that file. A file that was found through /proc/<pid>/fd may have no name."""
    try:
        return os.path.samestat(os.stat(target), status)
    except FileNotFoundError:
        return False


def _give(made: Draft, status: os.stat_result) -> None:
    """Give the draft the owner and the group of the file that it replaces."""
    if not _HAS_OWNERS:
        return
    now = os.fstat(made.file.fileno())
    if (now.st_uid, now.st_gid) == (status.st_uid, status.st_gid):
        return
    try:
        os.fchown(made.file.fileno(), status.st_uid, status.st_gid)
    except PermissionError:
        raise PermissionError(errno.EPERM, f"The file belongs to user {status.st_uid} and group {status.st_gid},"
                              " and this process may not give them a new one") from None
