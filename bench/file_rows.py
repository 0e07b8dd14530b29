"""The rows of files of the suite "share": against np.memmap, and against the system calls of a growth."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import tempfile
from collections import deque
from collections.abc import Callable
from itertools import repeat

import linmem
from linmem.bench.engines import KIB, MIB
from linmem.bench.harness import P10, Contender, Goal, Group, Run, Shared, Unavailable, clock

SPACE = 16 * MIB
STEP = 64 * KIB
BLOCK = 4 * KIB
MOST_GROWTHS = 64
AS_MEMMAP, GROWTH = 1.00, 1.5
SEED = 20_261_129


def groups() -> list[Group]:
    files = Shared(Files)
    return [access(files, "read", "read 16 MiB in order, as an array", Files.read_all),
            access(files, "write", "write 16 MiB in order, as an array", Files.write_all),
            access(files, "random_read", "read 4 KiB at a random offset", Files.read_block),
            access(files, "random_write", "write 4 KiB at a random offset", Files.write_block),
            access(files, "element", "read an element of an array", Files.element), growth()]


class Files:
    """A file with a linmem memory, and one with a np.memmap, in one folder. All pages are in the page cache."""

    def __init__(self) -> None:
        try:
            import numpy
        except ImportError as error:
            raise Unavailable("NumPy is not installed") from error
        self.folder = tempfile.TemporaryDirectory()
        self.memory = open_file(os.path.join(self.folder.name, "linmem"), SPACE)
        self.array = self.memory.array("u1")
        self.memmap = numpy.memmap(os.path.join(self.folder.name, "memmap"), "u1", "w+", shape=SPACE)
        self.array[:] = self.memmap[:] = 1
        rng = random.Random(SEED)
        self.offsets = [rng.randrange(SPACE - BLOCK) for _ in range(4096)]
        self.block = rng.randbytes(BLOCK)
        self.values = numpy.frombuffer(self.block, "u1")

    def array_of(self, ours: bool):
        return self.array if ours else self.memmap

    def read_all(self, ours: bool, n: int) -> int:
        return timed(map(self.array_of(ours).max, repeat(None, n)))

    def write_all(self, ours: bool, n: int) -> int:
        return timed(map(self.array_of(ours).fill, repeat(2, n)))

    def read_block(self, ours: bool, n: int) -> int:
        read = self.memory.read if ours else lambda offset, size: self.memmap[offset:offset + size].tobytes()
        return timed(map(read, self.some(n), repeat(BLOCK)))

    def write_block(self, ours: bool, n: int) -> int:
        def write(offset: int, data: object) -> None:
            self.memmap[offset:offset + BLOCK] = data

        call, data = (self.memory.write, self.block) if ours else (write, self.values)
        return timed(map(call, self.some(n), repeat(data)))

    def element(self, ours: bool, n: int) -> int:
        return timed(map(self.array_of(ours).__getitem__, self.some(n)))

    def some(self, n: int) -> list[int]:
        return (self.offsets * (n // len(self.offsets) + 1))[:n]


def timed(calls: map) -> int:
    began = clock()
    deque(calls, 0)
    return clock() - began


def open_file(path: str, size: int) -> linmem.Memory:
    try:
        return linmem.open_file(path, minimum=size, maximum=SPACE)
    except TypeError as error:
        raise Unavailable(f"a memory of a file cannot be made here: {error}") from error


def access(files: Shared[Files], key: str, what: str, call: Callable[[Files, bool, int], int]) -> Group:
    def making(ours: bool) -> Callable[[], Run]:
        def make() -> Run:
            it = files()
            return lambda n: call(it, ours, n)
        return make

    return Group(f"file_{key}", what,
                 (Contender("linmem", "the memory of a file", making(True)),
                  Contender("memmap", "np.memmap", making(False))),
                 (Goal("memmap", AS_MEMMAP, by=P10),), share=2)


# -- growth: each growth is in a new file, and the first byte of the new bytes is written -------------------------

def growth() -> Group:
    return Group("file_grow", "grow a file by 64 KiB, and write a byte",
                 (Contender("linmem", "mem.grow_to(size)", make_grow),
                  Contender("c", "fallocate and mremap of the C library, called by ctypes", make_c_grow),
                  Contender("mmap", "mmap.mmap.resize(size), which allocates nothing", make_mmap_grow)),
                 (Goal("c", GROWTH, by=P10), Goal("mmap", by=P10)), operations=MOST_GROWTHS, share=2)


def make_grow() -> Run:
    def run(n: int) -> int:
        with tempfile.TemporaryDirectory() as folder, open_file(os.path.join(folder, "file"), STEP) as mem:
            mem[0] = 1
            began = clock()
            for size in range(STEP, (n + 1) * STEP, STEP):
                mem.grow_to(size + STEP)
                mem[size] = 1
            return clock() - began

    run(1)
    return run


def make_c_grow() -> Run:
    try:
        libc = ctypes.PyDLL(None, use_errno=True)
        fallocate, mremap, map_file, unmap = libc.fallocate, libc.mremap, libc.mmap, libc.munmap
    except (AttributeError, TypeError, OSError) as error:
        raise Unavailable(f"the C library has no fallocate or mremap: {error}") from error
    size_t, pointer = ctypes.c_size_t, ctypes.c_void_p
    fallocate.argtypes = ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
    mremap.argtypes, mremap.restype = (pointer, size_t, size_t, ctypes.c_int), pointer
    map_file.argtypes = pointer, size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
    map_file.restype, unmap.argtypes = pointer, (pointer, size_t)
    protection, may_move = mmap.PROT_READ | mmap.PROT_WRITE, 1

    def run(n: int) -> int:
        with tempfile.TemporaryFile() as file:
            fd = file.fileno()
            fallocate(fd, 0, 0, STEP)
            place = map_file(None, STEP, protection, mmap.MAP_SHARED, fd, 0)
            began = clock()
            for size in range(STEP, (n + 1) * STEP, STEP):
                if fallocate(fd, 0, size, STEP):
                    raise Unavailable("the file system cannot allocate space in advance")
                place = mremap(place, size, size + STEP, may_move)
                ctypes.memset(place + size, 1, 1)
            took = clock() - began
            unmap(place, (n + 1) * STEP)
            return took

    run(1)
    return run


def make_mmap_grow() -> Run:
    def run(n: int) -> int:
        with tempfile.TemporaryFile() as file:
            file.truncate(STEP)
            with mmap.mmap(file.fileno(), STEP) as made:
                began = clock()
                for size in range(STEP, (n + 1) * STEP, STEP):
                    made.resize(size + STEP)
                    made[size] = 1
                return clock() - began

    run(1)
    return run
