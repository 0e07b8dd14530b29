"""How a shared memory gets to another process: its handle, its name, and how a process finds the file of the memory.

A memory without a name is a file that no path leads to. Each process that has the memory has a descriptor of the file,
which the kernel shows as /proc/PID/fd/N to processes of the same user. A handle says which process and which descriptor
that was. If the process has ended, or has closed the descriptor, the other processes of the user are searched. The
device, the inode and the random token of the memory tell whether a file is the right one, so a number that the kernel
has used again is never taken for the memory.
"""

from __future__ import annotations

import errno
import os
import stat

from linmem._core.arguments import check_descriptor, shown
from linmem._os import pages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["SharedHandle"]

close = os.close

_DIRECTORY = "/dev/shm"
HEAD = 65536                            # bytes of the file before those of the memory
_TOKEN_AT, _TOKEN_BYTES = 16, 32        # in the file: control_words in shared_memory.pxi
_LONGEST_WAIT = 10**18                  # nanoseconds


class SharedHandle:
    """What another process needs to attach a shared memory, as `Memory.handle` returns it.

    A handle can be pickled any number of times. It does not keep the memory: `linmem.attach` works while some process
    of the same user has the memory, or while the memory has a name.
    """

    __slots__ = ("_device", "_fd", "_inode", "_pid", "_token")

    def __init__(self, pid: int, fd: int, device: int, inode: int, token: bytes) -> None:
        for name, value in (("pid", pid), ("fd", fd), ("device", device), ("inode", inode)):
            if type(value) is not int or not 0 <= value < 1 << 64:
                raise ValueError(f"{name} of a handle must be an int in 0 .. 2**64 - 1, got {shown(value)}")
        if type(token) is not bytes or len(token) != _TOKEN_BYTES:
            raise ValueError(f"token of a handle must be {_TOKEN_BYTES} bytes, got {shown(token)}")
        self._pid, self._fd, self._device, self._inode, self._token = pid, fd, device, inode, token

    def __reduce__(self) -> tuple[object, ...]:
        return SharedHandle, self._parts()

    def __eq__(self, other: object) -> bool:
        """Whether both are handles of the same memory."""
        return isinstance(other, SharedHandle) and self._parts()[2:] == other._parts()[2:]

    def __hash__(self) -> int:
        return hash(self._token)

    def __repr__(self) -> str:
        return f"<linmem shared memory {self._token[:8].hex()}, from process {self._pid}>"

    def _parts(self) -> tuple[int, int, int, int, bytes]:
        return self._pid, self._fd, self._device, self._inode, self._token

    def fileno(self) -> int:
        """The descriptor of the memory in the process that made the handle, for ``socket.send_fds``.

        The other process passes the descriptor that it receives to `linmem.attach`.

        Raises
        ------
        ValueError
            This process did not make the handle, or it has closed the memory.
        """
        try:
            if os.getpid() == self._pid and self._is_ours(os.fstat(self._fd)):
                return self._fd
        except OSError:
            pass
        raise ValueError("fileno() works in the process that made the handle, while that process has the memory")

    def _is_ours(self, about: os.stat_result) -> bool:
        return stat.S_ISREG(about.st_mode) and (about.st_dev, about.st_ino) == (self._device, self._inode)

    def _open(self, pid: int, number: int) -> int | None:
        """A new descriptor, if the descriptor `number` of the process shows the memory."""
        fd = pages.open_descriptor_of(pid, number, self._device, self._inode)
        if fd is not None and os.pread(fd, _TOKEN_BYTES, _TOKEN_AT) != self._token:
            close(fd)
            return None
        return fd

    def open(self) -> int:
        """A new descriptor of the memory; the caller closes it."""
        refused: OSError | None = None
        for pid, number in self._places():
            try:
                fd = self._open(pid, number)
            except PermissionError as error:
                if (pid, number) == (self._pid, self._fd):
                    refused = error
                continue
            except OSError:         # the process has ended, or has closed the descriptor
                continue
            if fd is not None:
                return fd
        if refused is not None:
            raise PermissionError(
                refused.errno, "the shared memory belongs to another user, or the OS does not let this process see the"
                f" descriptors of process {self._pid}")
        raise FileNotFoundError(
            f"the shared memory {self._token[:8].hex()} is gone: no process of this user that can be seen from here has"
            f" it any more (process {self._pid} made the handle)")

    def _lock_of(self, offset: int) -> WordLock:
        return WordLock(self.fileno(), offset)

    def _places(self) -> Iterator[tuple[int, int]]:
        """Processes, and descriptors of them."""
        yield self._pid, self._fd
        user = os.geteuid()
        for process in filter(str.isdecimal, os.listdir("/proc")):
            try:
                if os.stat(f"/proc/{process}").st_uid == user:
                    yield from ((int(process), int(fd)) for fd in os.listdir(f"/proc/{process}/fd"))
            except OSError:         # the process has ended, or is another user's
                continue


class WordLock:
    """The kernel's lock on a word of a shared memory. It has a descriptor of its own, because the lock belongs to what
    open(2) has opened."""

    def __init__(self, fd: int, offset: int) -> None:
        self._at = HEAD + offset
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)

    def _ask(self, kind: int) -> bool:
        import fcntl
        from struct import pack

        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, pack("hhqqi4x", kind, os.SEEK_SET, self._at, 4, 0))
            return True
        except (BlockingIOError, PermissionError):
            return False

    def take(self) -> bool:
        import fcntl

        return self._ask(fcntl.F_WRLCK)

    def write(self, word: bytes) -> None:
        """Also when the memory is closed."""
        os.pwrite(self._fd, word, self._at)

    def give_back(self) -> None:
        import fcntl

        self._ask(fcntl.F_UNLCK)

    def close(self) -> None:
        close(self._fd)


def handle_of(fd: int, token: bytes) -> SharedHandle:
    about = os.fstat(fd)
    return SharedHandle(os.getpid(), fd, about.st_dev, about.st_ino, token)


def new_token() -> bytes:
    return os.urandom(16)


def open_shared(what: Any) -> int:
    """A new descriptor of the memory that a handle, a name or a descriptor stands for."""
    if not hasattr(os, "memfd_create"):
        raise TypeError("attach is not supported on this system: shared memories need Linux or Windows")
    if isinstance(what, SharedHandle):
        return what.open()
    if isinstance(what, str):
        return _owned(os.open(_path(check_shm_name(what, "attach")),
                              os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY), what)
    if isinstance(what, int) and not isinstance(what, bool) and 0 <= what < 1 << 31:
        try:
            return _owned(os.dup(what), what)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            raise ValueError(f"attach must be an open descriptor, got {what}") from None
    raise TypeError(f"attach must be a handle, the name of a shared memory or a descriptor, got {shown(what)}")


def _owned(fd: int, what: object) -> int:
    """Refuse a file that another user made. That user could make the file shorter, and each access would be fatal."""
    try:
        check_descriptor(fd, "attach", "a shared memory of linmem, open for reading and writing", what, writes=True)
        about = os.fstat(fd)
        if about.st_uid != os.geteuid() and not _is_sealed(fd):
            raise PermissionError(f"the shared memory belongs to the user {about.st_uid}")
        return fd
    except BaseException:
        close(fd)
        raise


def _is_sealed(fd: int) -> bool:
    import fcntl

    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:
        return False


# -- names

def check_shm_name(name: object, argument: str) -> str:
    """A name as of shm_open(3), without the slash that it may begin with."""
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a str, got {type(name).__name__}")
    text = str.__str__(name).removeprefix("/")
    try:
        size = len(os.fsencode(text))
    except UnicodeEncodeError:
        size = 0
    if not 1 <= size <= 255 or "/" in text or "\0" in text or text in (".", ".."):
        raise ValueError(f"{argument} must be 1 to 255 bytes without '/' and NUL, got {shown(name)}")
    return text


def _path(name: str) -> str:
    return f"{_DIRECTORY}/{name}"


def open_nameless(size: int) -> int:
    fd = os.open(_DIRECTORY, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
        return fd
    except BaseException:
        close(fd)
        raise


def link(fd: int, name: str) -> None:
    """Give the file of `open_nameless` a name; `FileExistsError` if the name is taken."""
    directory = os.open(_DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:        # without dst_dir_fd, os.link() calls link(2), which does not follow the symbolic link in /proc
        try:
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=directory, follow_symlinks=True)
        except FileExistsError as error:
            raise FileExistsError(error.errno, "a shared memory or a file of this shm_name exists already",
                                  _path(name)) from None
        # The kernel does not know the name of a descriptor that was opened without one, and unlink() asks for the name.
        named = os.open(name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=directory)
        try:
            if os.path.samestat(os.fstat(named), os.fstat(fd)):
                os.dup2(named, fd, inheritable=False)
        finally:
            close(named)
    finally:
        close(directory)


def unlink(fd: int) -> None:
    """Remove the name of the file. If another file has the name by now, that one keeps it, unless it gets the name just
    between the comparison and the removal: Linux has no call that does both."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    if os.path.dirname(path) != _DIRECTORY:
        raise ValueError("the shared memory has no name: it was made without shm_name=, or the name has been removed")
    # The kernel appends " (deleted)" to the path of a file without a name; a name may also end so.
    try:
        is_there = os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        is_there = False
    if not is_there:
        raise FileNotFoundError("the name of the shared memory has been removed already:"
                                f" {path.removesuffix(' (deleted)')}")
    os.unlink(path)


# -- times

def check_timeout(timeout: Any) -> int:
    """Seconds as nanoseconds."""
    from numbers import Real

    if isinstance(timeout, bool) or not isinstance(timeout, Real):
        raise TypeError(f"timeout must be a number of seconds or None, got {shown(timeout)}")
    number: Any = timeout
    if not number >= 0:
        raise ValueError(f"timeout must be >= 0, got {shown(timeout)}")
    return _LONGEST_WAIT if number > 10**9 else int(float(number) * 1e9)
