"""Figures that a process publishes for `linmem top`: the writer and the reader.

The figures are JSON in a sealed file without a path (memfd), which the process keeps open. A reader finds the file
among the descriptors of the process, so the kernel decides who may read the figures: the same user and root, as for
/proc/PID/smaps. Each update is a new file. So a reader never sees half an update, and nothing is left when the process
ends.
"""

from __future__ import annotations

import errno
import json
import os
import re
import threading
import time
import weakref

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None            # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["MOST_MEMORIES", "Publication", "is_possible", "read_published"]

_NAME = "linmem-figures"
_MOST_BYTES = 1 << 22           # that a reader reads
MOST_MEMORIES = 4096            # names of 100 bytes and the figures of so many memories take less than _MOST_BYTES
_publications: weakref.WeakSet[Publication] = weakref.WeakSet()


def is_possible() -> bool:
    return hasattr(os, "memfd_create")


class Publication:
    """Figures of this process that are published, as `linmem.metrics.publish` returns it.

    A thread publishes the figures again and again until `close`, the end of a ``with`` block, or the end of the
    process. A forked child publishes nothing. If an update fails (no memory, no descriptor is left), the earlier
    figures stay until the next update; `linmem top` shows how old they are.
    """

    def __init__(self, figures: Callable[[], dict[str, Any]], interval: float) -> None:
        self._figures, self._interval = figures, interval
        self._file: tuple[int, os.stat_result] | None = None
        self._lock = threading.Lock()
        # Released by close(). A signal handler that raises cannot leave a plain lock half released, as it can an Event.
        end = threading.Lock()
        end.acquire()
        self._end = end
        self._update()
        _publications.add(self)
        threading.Thread(target=_update_until_the_end, args=(weakref.ref(self), self._end, interval), daemon=True,
                         name="linmem figures").start()

    def __enter__(self) -> Publication:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_end"):
            self.close()

    def close(self) -> None:
        """Publish nothing from now on. A second call does nothing, or what an interrupt kept the first from."""
        with self._lock:
            if self._end.locked():
                self._end.release()
            _close_if_same(self._file)
            self._file = None

    def _update(self) -> None:
        text = json.dumps({"pid": os.getpid(), "time": time.time(), **self._figures()}).encode()
        made: list[int] = []
        try:
            # One call in C, so that no signal handler raises before the list has the descriptor.
            made.extend(map(os.memfd_create, [_NAME], [os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING]))
            fd = made[0]
            rest = memoryview(text)
            while rest:
                rest = rest[os.write(fd, rest):]
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
            with self._lock:
                if self._end.locked():
                    before, self._file = self._file, (fd, os.fstat(fd))
                    made.clear()
                    _close_if_same(before)
        finally:
            for fd in made:
                os.close(fd)


def _close_if_same(file: tuple[int, os.stat_result] | None) -> None:
    """Other code may have closed all descriptors and opened others, as a daemon does when it starts."""
    if file is not None:
        try:
            if os.path.samestat(os.fstat(file[0]), file[1]):
                os.close(file[0])
        except OSError as error:
            if error.errno != errno.EBADF:      # for example the TimeoutError of a signal handler
                raise


def _update_until_the_end(publication: weakref.ref[Publication], end: threading.Lock, interval: float) -> None:
    while not end.acquire(timeout=interval):
        it = publication()
        if it is None:
            return
        try:
            it._update()
        except (MemoryError, OSError):
            pass
        del it


def _forget_in_child() -> None:
    for each in list(_publications):
        each._lock = threading.Lock()       # the thread that held it is not in the child
        each.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def read_published(pid: int) -> dict[str, Any] | None:
    """The newest figures that the process publishes, as JSON has them: the process may have written anything there.
    None: it publishes nothing, or nothing that can be read."""
    for _ in range(10):
        found, closed = _look_for_published(pid)
        if found is not None or not closed:
            break
    return found


def _look_for_published(pid: int) -> tuple[dict[str, Any] | None, bool]:
    """The figures, and whether the process has closed a descriptor meanwhile: newer figures may be in a new one."""
    found: dict[str, Any] | None = None
    closed = False
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
            ids = re.findall(r"^NSpid:.*\t(\d+)$", file.read(), re.MULTILINE)
        fds = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return None, False
    for fd in fds:
        path = f"/proc/{pid}/fd/{fd}"
        try:
            if os.readlink(path) == f"/memfd:{_NAME} (deleted)":
                figures = json.loads(_sealed_text(path))
                # A child that was forked behind Python's back has the descriptors of its parent.
                if ids == [str(figures["pid"])] and (found is None or figures["time"] > found["time"]):
                    found = figures
        except FileNotFoundError:
            closed = True
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            pass        # something else with this name
    return found, closed


def _sealed_text(path: str) -> bytes:
    """Only a file of the kernel's own has seals, so a read does not wait for another process."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        size = os.fstat(fd).st_size
        if not seals & fcntl.F_SEAL_WRITE or not seals & fcntl.F_SEAL_SHRINK or size > _MOST_BYTES:
            raise ValueError(f"{path} has the name of linmem's figures, but is not sealed or has {size} bytes")
        return os.pread(fd, size, 0)
    finally:
        os.close(fd)
