"""`linmem.GrowableArray` in a file: an .npy file that grows, that NumPy reads at any time, and that survives a kill."""

import contextlib
import errno
import gc
import os
import pickle
import random
import re
import signal
import time
from pathlib import Path

import pytest
from support import (
    FORKING,
    PAGE,
    answer,
    descriptors,
    failing,
    file_requires,
    live_bytes,
    requires,
    run_child,
    start_child,
)

import linmem

file_requires("numpy", "file_memories")

import numpy as np  # noqa: E402

from linmem._files.npy_head import HEAD_UNIT, MOST_HEAD_BYTES, make_head  # noqa: E402

TOO_MANY = "^maximum must be >= the number of rows that are there"
TRADE = np.dtype([("at", "<M8[us]"), ("price", "<f8"), ("symbol", "S4")])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.npy"


def in_file(path, dtype="f8", row_shape=(), **options):
    return linmem.GrowableArray(dtype, row_shape, creator=linmem.creator("file", path=path), **options)


def reader_of(path):
    return linmem.GrowableArray.attach(linmem.open_file(path, "r"))


# -- the file ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "row_shape"), [("f8", ()), (">i2", (3,)), (TRADE, ()), ("?", (2, 2)), ("U5", ()),
                                                  ("c16", ()), ("m8[ns]", ()), ("V7", ())], ids=str)
def test_numpy_reads_the_file_after_each_change_and_the_rows_are_there_again(path, dtype, row_shape):
    rows = np.zeros((1000, *row_shape), dtype)
    rows.view("u1")[...] = 1
    with in_file(path, dtype, row_shape) as a:
        for n in (0, 1, 10, 1000, 500, 0, 700):
            if n > len(a):
                a.extend(rows[len(a):n])
            else:
                a.resize(n)
            for found in (np.load(path), np.load(path, mmap_mode="r")):
                assert (found.dtype, found.shape, found.tobytes()) == (rows.dtype, rows[:n].shape, rows[:n].tobytes())
    with in_file(path, dtype, row_shape) as a:
        assert a.array.tobytes() == rows[:700].tobytes()
        a.append(rows[0])
        assert len(np.load(path)) == 701


def test_the_head_has_4096_bytes_whatever_the_page_of_the_host_is(path):
    with in_file(path, "u1") as a:
        a.extend(b"first row")
    assert path.read_bytes()[HEAD_UNIT:].startswith(b"first row")
    assert HEAD_UNIT == 4096
    assert path.read_bytes()[HEAD_UNIT - 1:HEAD_UNIT] == b"\n"


def test_a_store_to_the_array_is_in_the_file_and_older_arrays_stay_valid(path):
    with in_file(path, "i4") as a:
        a.extend(range(10))
        older = a.array
        a.extend(range(1_000_000))
        older[3] = -7
        assert np.load(path, mmap_mode="r")[3] == -7
        assert older.ctypes.data == a.array.ctypes.data
        assert len(older) == 10
        a.memory.flush()


def test_an_array_in_a_file_is_opened_by_its_memory_without_its_dtype(path):
    with in_file(path, TRADE, 2) as a:
        a.resize(3)
    a = linmem.GrowableArray.attach(linmem.open_file(path))
    assert (a.dtype, a.row_shape, len(a), a.maximum) == (TRADE, (2,), 3, None)
    a.resize(4)
    assert np.load(path).shape == (4, 2)


@pytest.mark.parametrize("above", [
    lambda one: linmem.creator("statistics", upstream=one), lambda one: linmem.creator("tracking", upstream=one),
    lambda one: linmem.creator("limiting", limit_bytes=1 << 20, upstream=one),
    lambda one: linmem.creator("routing", rule=[({}, one)])])
def test_creators_above_that_of_the_file_keep_the_head(path, above):
    for n in (1, 2):
        with linmem.GrowableArray("u1", creator=above(linmem.creator("file", path=path))) as a:
            a.append(n)
            assert np.load(path).tolist() == [1, 2][:n]


def test_a_second_writer_is_refused(path):
    with in_file(path) as a:
        a.append(1.0)
        with pytest.raises(BlockingIOError):
            in_file(path)
    assert len(in_file(path)) == 1


def test_an_array_in_a_file_pickles_as_a_copy_in_memory(path):
    with in_file(path, "i4") as a:
        a.extend(range(5))
        b = pickle.loads(pickle.dumps(a))
        b.append(5)
        assert (b.array.tolist(), len(a), b.memory.info().kind) == ([*range(6)], 5, "mmap")


# -- what is refused, and stays as it is ------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "row_shape"), [("f4", ()), ("f8", 2), (">f8", ()), ("i8", ()), (TRADE, ())], ids=str)
def test_rows_of_another_kind_than_those_of_the_file_are_refused(path, dtype, row_shape):
    with in_file(path) as a:
        a.extend([1.0, 2.0])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"^dtype and row_shape must be those of the rows that are there, float64 and"):
        in_file(path, dtype, row_shape)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"x", b"no array\n" * 1000, bytes(5000), b"\x93NUMPY",
                                     b"\x93NUMPY\1\0" + bytes(99)])
def test_a_file_that_is_no_array_is_refused_and_unchanged(path, content):
    path.write_bytes(content)
    for call in (in_file, reader_of):
        with pytest.raises(ValueError, match=r"\.npy file"):
            call(path)
        assert path.read_bytes() == content


@pytest.mark.parametrize("save", [lambda file: np.save(file, np.arange(1000.0)),
                                  lambda file: np.savez(file, np.ones(9))])
def test_a_file_that_numpy_wrote_is_refused_with_the_way_out(path, save):
    with path.open("wb") as file:
        save(file)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"head of (the|an) \.npy file"):
        in_file(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kind", ["file", "shared"])
@pytest.mark.parametrize(("longest", "n"), [(100, 100), (1_000_000, 100), (100, 0)], ids=["ahead", "removed", "empty"])
def test_rows_within_the_maximum_open_whatever_the_length_of_the_file_is(path, kind, longest, n):
    with linmem.GrowableArray("f8", creator=linmem.creator(kind, **({"path": path} if kind == "file" else {}))) as a:
        a.resize(longest)
        a.resize(n)
        a[:] = np.arange(n)
        size = len(a.memory)
        assert size > HEAD_UNIT + 8 * (n + 1)

        def again(maximum):
            creator = linmem.creator("shared", attach=a.memory.handle()) if kind == "shared" else linmem.creator(
                "file", path=path)
            return linmem.GrowableArray("f8", maximum=maximum, creator=linmem.StatisticsCreator(creator))

        if kind == "file":
            a.close()
        if n:
            with pytest.raises(ValueError, match=rf"{TOO_MANY} \({n}\), got 99$"):
                again(99)
        for maximum in (n, n + 1):
            with again(maximum) as b:
                assert (len(b), b.maximum, len(b.memory)) == (n, maximum, size)
                assert b.array.tolist() == list(range(n))
                b.resize(maximum)
                with pytest.raises(linmem.GrowError, match=f"has {maximum} rows of .* address space for {maximum},"):
                    b.append(1.0)
                b.resize(n)


def test_a_maximum_that_is_smaller_than_the_rows_is_refused(path):
    with in_file(path, "u1") as a:
        a.resize(100_000)
    with pytest.raises(ValueError, match=rf"{TOO_MANY} \(100000\), got 99$"):
        in_file(path, "u1", maximum=99)
    with in_file(path, "u1", maximum=1_000_000) as a:
        with pytest.raises(linmem.GrowError, match=r"100000 rows of 1 bytes and address space for 1000000"):
            a.resize(1_000_001)
        a.resize(1_000_000)
        assert path.stat().st_size == HEAD_UNIT + 1_000_000
    with pytest.raises(ValueError, match=rf"{TOO_MANY} \(1000000\), got 999999$"):
        in_file(path, "u1", maximum=999_999)


@requires("rlimits")
@pytest.mark.parametrize("there", [None, b""], ids=["new", "there"])
@pytest.mark.parametrize("above", ["made", "linmem.StatisticsCreator(made)",
                                   "linmem.creator('routing', rule=lambda kind, minimum: made)"])
def test_a_constructor_that_fails_leaves_no_file_that_it_has_made(path, above, there):
    if there is not None:
        path.write_bytes(there)
    assert answer(f"""
        import ctypes, os, resource, linmem     # newer versions of libffi keep a descriptor for ctypes
        linmem.describe()           # makes a file to find out what the machine can do
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        before, made = len(os.listdir("/proc/self/fd")), linmem.creator("file", path={os.fspath(path)!r})
        for make in (lambda: linmem.GrowableArray("f8", creator={above}),
                     lambda: {above}.create(5000),
                     lambda: linmem.open_file(made.path, minimum=5000)):
            try:
                make()
            except linmem.PageError as error:
                print(error.errno, os.path.exists(made.path))
        assert len(os.listdir("/proc/self/fd")) == before
        """, limits={"RLIMIT_FSIZE": 8 * PAGE}).splitlines() == [f"{errno.EFBIG} {there is not None}"] * 3
    assert there is None or path.read_bytes() == there


def test_a_constructor_that_fails_leaves_a_file_that_another_one_has_put_in_place_of_its_own(path, monkeypatch):
    def fails(memory, head):
        path.unlink()
        path.write_bytes(b"other")
        raise KeyboardInterrupt

    monkeypatch.setattr("linmem.arrays._begin_with", fails)
    with pytest.raises(KeyboardInterrupt):
        in_file(path)
    assert path.read_bytes() == b"other"


@requires("shm_files")
def test_a_constructor_that_fails_leaves_no_name_that_it_has_made(monkeypatch):
    def fails(memory, head):
        assert path.exists()
        raise KeyboardInterrupt

    path = Path("/dev/shm", f"linmem-test-{os.getpid()}-new")
    monkeypatch.setattr("linmem.arrays._begin_with", fails)
    for above in (linmem.StatisticsCreator, lambda creator: creator):
        with pytest.raises(KeyboardInterrupt):
            linmem.GrowableArray("f8", creator=above(linmem.creator("shared", shm_name=path.name)))
        assert not path.exists()


@pytest.mark.parametrize("above", [lambda creator: creator, linmem.StatisticsCreator])
def test_a_dtype_that_an_npy_file_cannot_store_is_refused_and_there_is_no_new_file(path, above):
    overlapping = np.dtype({"names": ["a", "b"], "formats": ["u4", "u4"], "offsets": [0, 2]})
    with pytest.raises(ValueError, match=r"^dtype must be one that an \.npy file can store"):
        linmem.GrowableArray(overlapping, creator=above(linmem.creator("file", path=path)))
    assert not path.exists()


GOOD = make_head(np.dtype("f8"), ()).with_rows(7)
FORGED = {
    "more rows than the file has": GOOD.replace(b" 7", b" 8") + bytes(56),
    "as many rows as there are digits": GOOD.replace(b" " * 15 + b"7", b"9" * 16) + bytes(56),
    "a negative number of rows": GOOD.replace(b" 7", b"-7") + bytes(56),
    "a row of exabytes": GOOD.replace(b"7,), }" + b" " * 30, b"7, " + b"9" * 18 + b"), }" + b" " * 11) + bytes(56),
    "a long head": GOOD[:8] + b"\xff\xff" + GOOD[10:] + bytes(70_000),
    "objects": GOOD.replace(b"<f8", b"|O8") + bytes(56),
    "an expression": GOOD.replace(b"(" + b" " * 9, b"(exit() or") + bytes(56),
    "deep brackets": GOOD[:10] + b"(" * (HEAD_UNIT - 10) + bytes(56),
    "many signs": GOOD[:10] + b"-" * (HEAD_UNIT - 10) + bytes(56),
    "rows in the order of Fortran": GOOD.replace(b"False", b"True ") + bytes(56),
    "a head alone that was cut": GOOD[:-100],
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_forged_head_is_refused_and_nothing_of_it_stays(path, forged):
    path.write_bytes(FORGED[forged])
    assert len(FORGED[forged]) in (HEAD_UNIT - 100, HEAD_UNIT + 56, HEAD_UNIT + 70_000)
    assert not FORGED[forged].startswith(GOOD)
    gc.collect()
    before = live_bytes(), descriptors()
    for call in (in_file, reader_of):
        with pytest.raises(ValueError, match=r"head|rows"):
            call(path)
        gc.collect()
        assert (live_bytes(), descriptors()) == before
    assert path.read_bytes() == FORGED[forged]


def test_a_forged_head_costs_no_memory(path):
    path.write_bytes(FORGED["deep brackets"])
    assert answer("""
        import sys, resource, linmem, numpy
        linmem.GrowableArray("f8").append(1)
        def attempt():
            try:
                linmem.GrowableArray.attach(linmem.open_file(sys.argv[1], "r"))
            except ValueError:
                return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        first = attempt()
        print(all(attempt() - first < 16 << 10 for _ in range(20)))
        """.replace("sys.argv[1]", repr(os.fspath(path)))) == "True"


@pytest.mark.parametrize("memory", [None, b"bytes", bytearray(5000), "path"])
def test_attach_takes_memories_only(memory):
    with pytest.raises(TypeError, match=r"^memory must be a linmem\.Memory, got "):
        linmem.GrowableArray.attach(memory)


def test_attach_leaves_a_memory_without_a_head_to_the_caller():
    memory = linmem.create(PAGE)
    with pytest.raises(ValueError, match=r"^memory must begin with the head of an \.npy file"):
        linmem.GrowableArray.attach(memory)
    assert len(memory) == PAGE


def test_a_file_that_was_truncated_is_an_error_at_the_next_call(path):
    with in_file(path) as a:
        a.extend(np.ones(10_000))
        os.truncate(path, HEAD_UNIT)
        for call in (lambda: len(a), lambda: a.append(1.0), lambda: a.array, lambda: a.resize(0),
                     lambda: a.extend([1.0])):
            with pytest.raises(OSError, match=r"rows\.npy|file"):
                call()


def test_a_file_that_lost_its_end_in_a_power_failure_opens_again_as_the_error_says(path):
    with in_file(path) as a:
        a.extend(np.ones(10_000))
    os.truncate(path, HEAD_UNIT + 8 * 5000 + 3)     # the head was written, and the new length of the file was not
    for call in (in_file, reader_of):
        with pytest.raises(ValueError, match=r"says 10000 rows, and the file has room for 5000: if the power") as no:
            call(path)
    size = int(re.search(r"grow_to\((\d+)\)", str(no.value))[1])
    with linmem.open_file(path) as mem:
        mem.grow_to(size)
    with in_file(path) as a:
        assert a.array.tolist() == [1.0] * 5000 + [0.0] * 5000
    assert np.load(path, mmap_mode="r").shape == (10_000,)


# -- readers --------------------------------------------------------------------------------------------------------


def test_a_reader_follows_the_writer_and_writes_nothing(path):
    with in_file(path, "i8") as a:
        a.append(0)
        reader = reader_of(path)
        first = reader.array
        for n in (10, 10_000, 300_000):
            a.extend(range(len(a), n))
            assert len(reader) == n
            assert np.array_equal(reader.array, np.arange(n))
        assert (len(first), reader.array.ctypes.data) == (1, first.ctypes.data)
        a.resize(5)
        assert list(reader) == [0, 1, 2, 3, 4]
        before = path.read_bytes()
        for call in (lambda: reader.append(1), lambda: reader.extend(range(100)), lambda: reader.resize(9),
                     reader.clear, lambda: reader.extend(iter(range(50_000))), lambda: reader.resize(10**7)):
            with pytest.raises(ValueError, match=r"read-only|access 'r'|for reading"):
                call()
        with pytest.raises(ValueError, match=r"read-only"):
            reader[0] = 1
        assert path.read_bytes() == before


WRITES = """
import sys, linmem, numpy as np
rng = np.random.default_rng(int(sys.argv[2]))
a = linmem.GrowableArray("i8", creator=linmem.creator("file", path=sys.argv[1]))
assert np.array_equal(a.array, np.arange(len(a)))
print(len(a), flush=True)
while True:
    n, way = len(a), rng.integers(5)
    if way == 0:
        a.append(n)
    elif way == 1:
        a.extend(np.arange(n, n + rng.integers(1, 30000)))
    elif way == 2:
        a.extend(iter(range(n, n + 20000)))
    elif way == 3 and n > 100000:
        a.resize(n - int(rng.integers(50000)))
    else:
        for i in range(n, n + 50):
            a.append(i)
    print(len(a), flush=True)
"""


def test_a_reader_in_another_process_finds_whole_rows_only(path):
    child = start_child(WRITES.replace("way == 3", "False"), path, "1")
    try:
        child.stdin.close()
        child.stdout.readline()
        reader, seen = reader_of(path), 0
        for _ in range(2000):
            rows = reader.array
            assert len(rows) >= seen
            assert np.array_equal(rows[seen:], np.arange(seen, len(rows)))
            seen = len(rows)
            child.stdout.readline()
            if seen > 3_000_000:
                break
        assert seen > 0
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


# -- kills ------------------------------------------------------------------------------------------------------------


def test_a_killed_writer_leaves_a_file_that_numpy_reads_and_that_goes_on(path):
    rng = random.Random(1)
    for seed in range(12):
        child = start_child(WRITES, path, str(seed))
        child.stdin.close()
        for _ in range(rng.randrange(1, 40)):
            child.stdout.readline()
        time.sleep(rng.random() / 500)
        child.send_signal(signal.SIGKILL)
        child.stdout.read()
        child.wait()
        child.stdout.close()
        for rows in (np.load(path, mmap_mode="r"), np.load(path), reader_of(path).array):
            assert np.array_equal(rows, np.arange(len(rows)))
        if path.stat().st_size > 32 << 20:
            path.unlink()


def test_an_array_whose_maker_was_killed_is_made_by_the_next_one(path):
    """The bytes between the steps: the file grows, the head comes without its first 8 bytes, then these come."""
    raw = make_head(np.dtype("f8"), ()).raw
    for state in (b"", bytes(len(raw)), bytes(8) + raw[8:2000] + bytes(len(raw) - 2000), bytes(8) + raw[8:], raw):
        path.write_bytes(state)
        with in_file(path) as a:
            assert len(a) == 0
            a.append(1.0)
        assert np.load(path).tolist() == [1.0]


def test_the_number_of_rows_changes_after_the_file_has_grown(path):
    """A call that the OS refuses at any step leaves the old rows."""
    done = run_child("""
        import resource, signal, sys, linmem, numpy as np
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = sys.argv[1]
        a = linmem.GrowableArray("i8", creator=linmem.creator("file", path=path))
        a.extend(range(1000))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        for rows in (np.zeros(1 << 20, "i8"), iter(range(1 << 18))):
            try:
                a.extend(rows)
            except linmem.PageError:
                assert np.array_equal(np.load(path), np.arange(1000)) and len(a) == 1000
            else:
                sys.exit("not refused")
        while True:
            try:
                a.append(len(a))
            except linmem.PageError:
                break
        most = ((1 << 20) - 4096) // 8
        assert len(a) == most and np.array_equal(np.load(path), np.arange(most)), len(a)
        print("ok")
        """.replace("sys.argv[1]", repr(os.fspath(path))))
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.parametrize("call", [
    lambda a: a.append(1), lambda a: a.extend(np.ones(9 * PAGE)), lambda a: a.extend(iter(range(50_000))),
    lambda a: a.resize(len(a) + 1)], ids=["append", "extend", "iterator", "resize"])
def test_a_call_that_the_os_refuses_at_any_step_changes_no_row(path, call):
    with in_file(path) as a:
        a.resize((a.memory.byte_size() - HEAD_UNIT) // 8 or 1)
        a.resize((a.memory.byte_size() - HEAD_UNIT) // 8)       # the next row needs a growth
        rows = path.read_bytes()
        refused = 0
        for nth in range(1, 40):
            # The growth ahead is tried first, and then the growth by what is needed: both are refused.
            with failing(nth, errno.ENOMEM, times=1000) as calls:
                try:
                    call(a)
                except linmem.PageError:
                    refused += 1
                else:
                    break
            assert path.read_bytes()[:len(rows)] == rows, calls
            assert len(np.load(path)) == len(a) == (len(rows) - HEAD_UNIT) // 8
        assert refused >= 2
        assert len(np.load(path)) == len(a) > (len(rows) - HEAD_UNIT) // 8


@requires("fork")
def test_a_forked_child_has_the_rows_of_the_file(path):
    assert answer(FORKING + f"""
import linmem, os
a = linmem.GrowableArray("i8", creator=linmem.creator("file", path={os.fspath(path)!r}))
a.extend(range(10))

def work():
    a.append(10)
    a[0] = 99

child(os.fork, work)
print(a.array.tolist())
""") == str([99, *range(1, 11)])


def test_the_head_of_a_long_dtype_has_two_units(path):
    dtype = np.dtype([(f"name {i:03}", "u1") for i in range(250)])
    with in_file(path, dtype) as a:
        a.resize(2)
    assert len(make_head(dtype, ()).raw) == 2 * HEAD_UNIT == MOST_HEAD_BYTES
    assert np.load(path, mmap_mode="r").shape == (2,)
    with contextlib.closing(in_file(path, dtype)) as a:
        assert len(a) == 2
