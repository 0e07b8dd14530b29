"""The memory, the mappings and the descriptors that the process holds, according to the operating system."""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass

from soak.checks import FLOOR

HAS_KERNEL32 = hasattr(ctypes, "WinDLL")
HAS_PROC = os.path.exists("/proc/self/maps") and not HAS_KERNEL32       # Wine shows the /proc of its host
NAME = "[anon:linmem]"


@dataclass(frozen=True)
class Figures:
    """A reading of the figures of the process. None means that this system does not report a figure."""

    resident: int | None        # bytes
    mappings: int | None
    reserved: int | None        # inaccessible bytes of memories; every memory has some
    descriptors: int | None

    @staticmethod
    def now() -> Figures:
        if HAS_PROC:
            with open("/proc/self/statm") as file:
                resident = int(file.read().split()[1]) * mmap.PAGESIZE
            with open("/proc/self/maps") as file:
                maps = [line.split(maxsplit=5) for line in file]
            return Figures(resident, len(maps), sum(map(_reserved, maps)), len(os.listdir("/proc/self/fd")))
        return Figures(_working_set() if HAS_KERNEL32 else None, None, None, None)


def _reserved(line: list[str]) -> int:
    """The bytes of a line of /proc/self/maps that a memory keeps inaccessible."""
    name = line[5].strip() if len(line) > 5 else ""
    start, end = (int(part, 16) for part in line[0].split("-"))
    if line[1] != "---p" or (name != NAME if FLOOR["capabilities"]["names"] else name):
        return 0
    is_guard_of_a_stack = not name and end - start <= mmap.PAGESIZE
    return 0 if is_guard_of_a_stack else end - start


def judged(name: str, value: int | None) -> bool:
    """Whether a figure can show a leak. On Windows the resident bytes cannot: the system trims a working set as it
    likes, and under Wine the working set contains Wine's own tables of all addresses that were ever reserved."""
    return value is not None and not (name == "resident" and HAS_KERNEL32)


class _Counters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS."""

    _fields_ = [("cb", ctypes.c_uint32), ("faults", ctypes.c_uint32), ("peak", ctypes.c_size_t),
                ("working_set", ctypes.c_size_t), ("more", ctypes.c_size_t * 6)]


def _working_set() -> int | None:
    kernel = ctypes.WinDLL("kernel32")
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    about = _Counters(cb=ctypes.sizeof(_Counters))
    done = kernel.K32GetProcessMemoryInfo(ctypes.c_void_p(kernel.GetCurrentProcess()), ctypes.byref(about), about.cb)
    return about.working_set if done else None


def call_malloc(name: str, *arguments: int) -> None:
    """Call a function of glibc's malloc; do nothing where there is no such function."""
    function = getattr(ctypes.pythonapi, name, None)
    if function is not None:
        function(*arguments)
