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
    from typing import Any, SupportsIndex

__all__ = ["Lock"]

_LOOK = 0.02                # seconds until a waiter looks again: a killed owner wakes nobody
_FREE = bytes(4)
_locks: weakref.WeakSet[Lock] = weakref.WeakSet()
# Held while a Lock gets or loses its descriptor, and by a fork. So a child knows all descriptors that it must close.
_descriptors = threading.RLock()


class _Thread(threading.local):
    """`mark` stands for the running thread. The OS gives the number of a thread that has ended to a new thread."""

    def __init__(self) -> None:
        self.mark = object()


_thread = _Thread()
# The mark of the thread that has a lock, for each word (token of the memory, offset) that a thread of this process has.
_owners: dict[tuple[bytes, int], object] = {}


class Lock:
    """A lock among processes and threads that have a shared memory. If its owner is killed, the kernel releases it.

    The lock is one of the kernel: on 4 bytes of the memory's file (fcntl(2), F_OFD_SETLK), or on Windows an object with
    a name. The 4 bytes tell the next owner whether the last one has died. A child that is forked with `os.fork` or
    `multiprocessing` does not hold the locks of its parent.

    Any thread of the process that holds the lock may release it. The thread that took the lock does not wait for
    itself: its next `acquire` is a RuntimeError, also by another Lock on the same 4 bytes.

    Parameters
    ----------
    mem : Memory
        A shared memory.
    offset : int
        Of 4 bytes that only this lock uses, a multiple of 4. They are 0 at the start.
    """

    def __init__(self, mem: Memory, offset: SupportsIndex) -> None:
        if not isinstance(mem, Memory):
            raise TypeError(f"mem must be a Memory, got {type(mem).__name__}")
        self._offset = check_size(offset, "offset", "within byte_size()")
        if self._offset % 4:
            raise ValueError(f"offset must be a multiple of 4, got {shown(offset)}")
        try:
            handle: Any = mem.handle()
        except TypeError:
            raise TypeError("mem must be a shared memory: linmem.creator('shared') makes one") from None
        mem.read(self._offset, 4)
        self._mem = mem
        self._word: Any = None                  # the kernel's lock, from the first acquire() on
        self._threads = threading.Lock()        # the kernel's lock does not keep threads of one descriptor apart
        self._place = handle._token, self._offset
        self._held = False
        self._before = _FREE        # the word before this owner wrote to it
        _locks.add(self)

    def __del__(self) -> None:
        if getattr(self, "_held", False):
            _owners.pop(self._place, None)
        with _descriptors:
            self._close()

    def _close(self) -> None:
        word, self._word = getattr(self, "_word", None), None
        if word is not None:
            word.close()

    def acquire(self, timeout: float | None = None, *, recover: bool = False) -> bool:
        """Take the lock.

        Parameters
        ----------
        timeout : float, optional
            In seconds; None: no limit. Ctrl-C ends the wait. The thread that has the lock already also waits for this
            time, because another thread of its process may release the lock.
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
        RuntimeError
            The thread that calls has the lock already, and `timeout` is None.
        """
        check_flag(recover, "recover")
        end = None if timeout is None else time.monotonic() + check_timeout(timeout) / 1e9
        if end is None and _owners.get(self._place) is _thread.mark:
            raise RuntimeError(f"this thread has the lock at offset {self._offset} already, and acquire() without a"
                               " timeout would wait for itself: release() it first")
        got: list[bool] = []        # [True]: this call has self._threads
        try:
            # One call in C, so that no signal handler raises before the list has the result.
            got.extend(map(self._threads.acquire, [True],
                           [-1 if end is None else min(max(0, end - time.monotonic()), 10**6)]))
            if got == [False]:
                return False
            if self._word is None:
                handle = self._mem.handle()
                with _descriptors:
                    self._word = handle._lock_of(self._offset)
            taken = self._wait(end, recover)
        except BaseException:
            if got == [True]:
                try:
                    self._give_back(self._before)
                except BaseException:       # a signal handler raised
                    self._give_back(self._before)
                    raise
                finally:
                    self._threads.release()
            raise
        if not taken:
            self._threads.release()
        return taken

    def _wait(self, end: float | None, recover: bool) -> bool:
        while not self._word.take():
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
        _owners[self._place] = _thread.mark
        self._mem.write(self._offset, (os.getpid() & 0x7fffffff).to_bytes(4, "little"))
        return True

    def _give_back(self, word: bytes) -> None:
        """Give back what this thread has taken of the kernel's lock, under self._threads. The memory may be closed. A
        second call does what an interrupt kept the first from."""
        if self._held:
            self._word.write(word)
            _owners.pop(self._place, None)      # before another thread of this process can take the lock
        self._held = False
        if self._word is not None:
            self._word.give_back()

    def release(self) -> None:
        """Give the lock back. Any thread of the process that holds the lock may do so.

        Raises
        ------
        RuntimeError
            This process does not hold the lock.
        """
        if not self._held:
            raise RuntimeError("release() of a lock that this process does not hold")
        try:
            self._give_back(_FREE)
        except BaseException:       # a signal handler raised
            self._give_back(_FREE)
            raise
        finally:
            self._threads.release()
        with suppress(ValueError):      # the memory is closed, and the waiters look again soon
            wake(self._mem, self._offset, 1)

    def _is_mine(self) -> bool:
        return self._held and _owners.get(self._place) is _thread.mark

    def __enter__(self) -> Lock:
        before = self._is_mine()        # acquire() refuses
        try:
            self.acquire()
        except BaseException:           # a signal handler raised, perhaps after acquire() has taken the lock
            if not before and self._is_mine():
                self.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self.release()
        except BaseException:           # a signal handler raised, perhaps before release() has begun
            if self._is_mine():
                self.release()
            raise

    def __reduce__(self) -> Any:
        raise TypeError("a Lock cannot be pickled: pickle mem.handle(), and make a Lock at the same offset there")


def _forget_in_child() -> None:
    """The child has the descriptors of its parent, and so would keep the locks of a parent that is killed."""
    _descriptors.release()
    _owners.clear()
    for lock in list(_locks):
        lock._close()
        # Threads of the parent may hold the lock, or wait for it.
        lock._threads, lock._held = threading.Lock(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_descriptors.acquire, after_in_parent=_descriptors.release,
                        after_in_child=_forget_in_child)
