"""`Lock`: a lock in a shared memory, which processes take in turn and which a killed process does not keep."""

from __future__ import annotations

import os
import threading
import time
import weakref
from contextlib import suppress

from linmem._core.arguments import check_flag, check_size, shown
from linmem._core.memory import Memory, wait, wake
from linmem._core.shared_handles import check_timeout
from linmem.errors import OwnerDied

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any

__all__ = ["Lock"]

_HEAD = 65536               # of the file of a shared memory: the bytes of the memory follow
_LOOK = 0.02                # seconds until a waiter looks again: a killed owner wakes nobody
_FREE = bytes(4)
_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """A lock among processes and threads that have a shared memory. If its owner is killed, the kernel releases it.

    The lock is a lock of the kernel on 4 bytes of the memory's file (fcntl(2), F_OFD_SETLK). The bytes tell the next
    owner whether the last one has died. A child that is forked with `os.fork` or `multiprocessing` does not hold the
    locks of its parent.

    Parameters
    ----------
    mem : Memory
        A shared memory.
    offset : int
        Of 4 bytes that only this lock uses, a multiple of 4. They are 0 at the start.
    """

    def __init__(self, mem: Memory, offset: int) -> None:
        if not isinstance(mem, Memory):
            raise TypeError(f"mem must be a Memory, got {type(mem).__name__}")
        self._offset = check_size(offset, "offset", "within byte_size()")
        if self._offset % 4:
            raise ValueError(f"offset must be a multiple of 4, got {shown(offset)}")
        try:
            mem.handle()
        except TypeError:
            raise TypeError("mem must be a shared memory: linmem.creator('shared') makes one") from None
        mem.read(self._offset, 4)
        self._mem = mem
        self._fd = -1
        self._threads = threading.Lock()        # the kernel's lock does not keep threads of one descriptor apart
        self._held = False
        self._before = _FREE        # the word before this owner wrote to it
        _locks.add(self)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)

    def _forget(self) -> None:
        os.close(self._fd)
        self._fd = -1
        self._threads, self._held = threading.Lock(), False

    def _ask(self, kind: int) -> bool:
        import fcntl
        from struct import pack

        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK,
                        pack("hhqqi4x", kind, os.SEEK_SET, _HEAD + self._offset, 4, 0))
            return True
        except (BlockingIOError, PermissionError):
            return False

    def acquire(self, timeout: float | None = None, *, recover: bool = False) -> bool:
        """Take the lock.

        Parameters
        ----------
        timeout : float, optional
            In seconds; None: no limit. Ctrl-C ends the wait.
        recover : bool
            Take the lock also if its last owner has died. What the lock protects may be half written.

        Returns
        -------
        bool
            False: the time is over.

        Raises
        ------
        OwnerDied
            The last owner ended without `release`. Nobody gets the lock until one call has ``recover=True``.
        """
        check_flag(recover, "recover")
        end = None if timeout is None else time.monotonic() + check_timeout(timeout) / 1e9
        if not self._threads.acquire(timeout=-1 if end is None else min(max(0, end - time.monotonic()), 10**6)):
            return False
        try:
            if self._fd < 0:    # a descriptor of its own: the kernel's lock belongs to what open(2) has opened
                self._fd = os.open(f"/proc/self/fd/{self._mem.handle().fileno()}", os.O_RDWR | os.O_CLOEXEC)
            taken = self._wait(end, recover)
        except BaseException:
            self._give_back(self._before)
            raise
        if not taken:
            self._threads.release()
        return taken

    def _wait(self, end: float | None, recover: bool) -> bool:
        import fcntl

        while not self._ask(fcntl.F_WRLCK):
            word = self._mem.read(self._offset, 4)
            left = _LOOK if end is None else min(_LOOK, end - time.monotonic())
            if left <= 0:
                return False
            if word == _FREE:       # the owner is about to release the lock
                time.sleep(0)
            else:
                wait(self._mem, self._offset, int.from_bytes(word, "little", signed=True), left)
        word = self._mem.read(self._offset, 4)
        if word != _FREE and not recover:
            raise OwnerDied(f"the last owner of the lock at offset {self._offset} ended without a release: what the"
                            " lock protects may be half written. acquire(recover=True) takes the lock")
        self._before, self._held = word, True
        self._mem.write(self._offset, (os.getpid() & 0x7fffffff).to_bytes(4, "little"))
        return True

    def _give_back(self, word: bytes) -> None:
        """Give back what this thread has taken of the lock. The file is written, because the memory may be closed."""
        import fcntl

        if self._held:
            os.pwrite(self._fd, word, _HEAD + self._offset)
        self._held = False
        if self._fd >= 0:
            self._ask(fcntl.F_UNLCK)
        self._threads.release()

    def release(self) -> None:
        """Give the lock back.

        Raises
        ------
        RuntimeError
            This process does not hold the lock.
        """
        if not self._held:
            raise RuntimeError("release() of a lock that this process does not hold")
        self._give_back(_FREE)
        with suppress(ValueError):      # the memory is closed, and the waiters look again soon
            wake(self._mem, self._offset, 1)

    def __enter__(self) -> Lock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.release()

    def __reduce__(self) -> Any:
        raise TypeError("a Lock cannot be pickled: pickle mem.handle(), and make a Lock at the same offset there")


def _forget_in_child() -> None:
    """The child has the descriptors of its parent, and so would keep the locks of a parent that is killed."""
    for lock in list(_locks):
        if lock._fd >= 0:
            lock._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
