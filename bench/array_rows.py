"""The rows of arrays of the suite "share": the time to add rows to a `linmem.GrowableArray`, and their memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque

import linmem
from linmem.bench.harness import P10, Contender, Goal, Group, Row, Run, clock, exact

ROWS = 1_000_000
PEAK_ROWS = 10_000_000
FLOATS = 100_000        # that a run of `append` adds

EXTEND, APPEND, PEAK = 1.1, 3.0, 1.05


def groups() -> list[Group]:
    return [extend(), append(), peak()]


# -- many rows at once ------------------------------------------------------------------------------------

def extend() -> Group:
    return Group(
        "array_extend", f"extend by {ROWS:,} rows of float64",
        (Contender("linmem", "GrowableArray.extend(array)", make_extend),
         Contender("copy", "memcpy into fresh pages", make_copy),
         Contender("numpy", "numpy.concatenate with as many rows", make_concatenate)),
        (Goal("copy", EXTEND, by=P10), Goal("numpy", None, by=P10)),
        "a new array in each operation; making it is not counted", least=4, share=2)


def source():
    import numpy as np

    return np.arange(float(ROWS))


def make_extend() -> Run:
    rows = source()

    def run(n: int) -> int:
        took = 0
        for _ in range(n):
            with linmem.GrowableArray("f8") as array:
                began = clock()
                array.extend(rows)
                took += clock() - began
        return took

    return run


def make_copy() -> Run:
    """A copy by NumPy, which calls memcpy, into a committed memory of the right size that was never touched."""
    rows = source()

    def run(n: int) -> int:
        took = 0
        for _ in range(n):
            with linmem.create(rows.nbytes) as memory:
                there = memory.array(rows.dtype)
                began = clock()
                there[:] = rows
                took += clock() - began
        return took

    return run


def make_concatenate() -> Run:
    import numpy as np

    rows = source()

    def run(n: int) -> int:
        took = 0
        for _ in range(n):
            array = rows.copy()
            began = clock()
            array = np.concatenate([array, rows])
            took += clock() - began
        return took

    return run


# -- one row at a time --------------------------------------------------------------------------------------

def append() -> Group:
    return Group(
        "array_append", "append of a float64",
        (Contender("linmem", "GrowableArray.append(x)", lambda: make_append(lambda: linmem.GrowableArray("f8"))),
         Contender("list", "list.append(x)", lambda: make_append(list)),
         Contender("array", "array.array.append(x)", lambda: make_append(new_array))),
        (Goal("list", APPEND, by=P10), Goal("array", None, by=P10)),
        f"{FLOATS:,} floats that exist already, into a new array", operations=FLOATS)


def new_array():
    import array

    return array.array("d")


def make_append(new) -> Run:
    def run(n: int) -> int:
        rows = [float(i) for i in range(n)]
        made = new()
        calls = map(made.append, rows)
        began = clock()
        deque(calls, 0)
        took = clock() - began
        if len(made) != n:
            raise AssertionError("a row is missing")
        return took

    return run


# -- memory ---------------------------------------------------------------------------------------------------

BUILD = """
import sys
import numpy as np
import linmem

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

n, way = int(sys.argv[1]), sys.argv[2]
array = linmem.GrowableArray("f8")
array.extend(iter(range(100_000)))          # one-time work first
array.clear()
block = np.arange(1000.0)
before = status("VmRSS")
if way == "append":
    append = array.append
    for _ in range(n):
        append(1.0)
elif way == "extend":
    for _ in range(n // 1000):
        array.extend(block)
else:
    array.extend(1.0 for _ in range(n))
assert len(array) == n
print(status("VmHWM") - before + 800_000)   # the pages of the 100,000 rows were resident before
"""
WAYS = {"append": "append", "extend": "extend by 1,000 rows", "iterator": "extend by an iterator"}


def peak() -> Group:
    return Group("array_peak", f"peak of {PEAK_ROWS:,} rows of float64", (), (),
                 "the highest resident size of a process (VmHWM) while it builds the array, less its size before",
                 count=lambda: [count_peak(way, what) for way, what in WAYS.items()])


def count_peak(way: str, what: str) -> Row:
    about = f"array_peak/{way}", f"peak of {PEAK_ROWS:,} rows of float64", what, "the data"
    if not os.path.exists("/proc/self/status"):
        return exact(*about, None, PEAK, unavailable="no /proc/self/status to ask")
    done = subprocess.run([sys.executable, "-c", BUILD, str(PEAK_ROWS), way], stdout=subprocess.PIPE, text=True,
                          check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    return exact(*about, int(done.stdout) / (8 * PEAK_ROWS), PEAK)
