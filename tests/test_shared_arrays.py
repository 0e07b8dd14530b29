"""`linmem.GrowableArray` that processes share: its pickle is a live handle, and others see rows at their next call."""

import copy
import pickle
import random
import time

import pytest
from support import FORKING, NEEDS, PAGE, answer, file_requires, held, new_process, requires, start_child

import linmem

file_requires("numpy", "shared")

import numpy as np  # noqa: E402

from linmem._files.npy_head import make_head  # noqa: E402

SHARED = linmem.creator("shared")


def shared_array(dtype="i8", row_shape=(), **options):
    return linmem.GrowableArray(dtype, row_shape, creator=SHARED, **options)


def again(a):
    return pickle.loads(pickle.dumps(a))


@pytest.mark.parametrize(("dtype", "row_shape"), [("f8", ()), (">i2", (3,)), ([("a", "M8[s]"), ("b", "S3")], 2)],
                         ids=str)
def test_a_pickle_is_the_same_array_and_not_a_copy(dtype, row_shape):
    a = shared_array(dtype, row_shape)
    a.resize(3)
    b = again(a)
    assert (b.dtype, b.row_shape, len(b)) == (a.dtype, a.row_shape, 3)
    first = b.array
    a.array.view("u1")[...] = 1
    a.resize(100_000)
    assert first.tobytes() == a.array[:3].tobytes() != bytes(first.nbytes)
    assert len(b) == 100_000
    b.resize(5)
    assert len(a) == 5
    assert again(b).array.tobytes() == a.array.tobytes()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_has_rows_of_its_own(copied):
    a = shared_array()
    a.extend(range(5))
    b = copied(a)
    b.append(5)
    b[0] = 9
    assert (a.array.tolist(), b.array.tolist()) == ([0, 1, 2, 3, 4], [9, 1, 2, 3, 4, 5])


def append_and_answer(there, a):
    while (n := there.recv()) is not None:
        assert np.array_equal(a.array, np.arange(len(a)))
        a.extend(np.arange(len(a), n))
        there.send(len(a))


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=requires("fork"))])
def test_two_processes_see_the_rows_of_each_other_at_their_next_call(method):
    a = shared_array()
    older = a.array
    with new_process(append_and_answer, a, method=method) as there:
        for n in (10, 5000, 500_000):
            there.send(n)
            assert there.recv() == n == len(a)
            a.append(n)
            assert np.array_equal(a.array, np.arange(n + 1))
        there.send(None)
    assert len(older) == 0


FILLS = """
import pickle, sys, numpy as np
a = pickle.loads(bytes.fromhex(sys.argv[1]))
rng = np.random.default_rng(int(sys.argv[2]))
print(len(a), flush=True)
while True:
    n, way = len(a), rng.integers(4)
    if way == 0:
        a.extend(np.arange(n, n + rng.integers(1, 30000)))
    elif way == 1 and n > 100000:
        a.resize(n - int(rng.integers(50000)))
    else:
        for i in range(n, n + 50):
            a.append(i)
    print(len(a), flush=True)
"""


def test_a_process_that_is_killed_leaves_whole_rows_and_others_go_on():
    a = shared_array()
    rng = random.Random(2)
    for seed in range(12):
        child = start_child(FILLS, pickle.dumps(a).hex(), str(seed))
        child.stdin.close()
        for _ in range(rng.randrange(1, 40)):
            child.stdout.readline()
            rows = a.array[:1000]           # the child removes rows after these only
            assert np.array_equal(rows, np.arange(len(rows)))
        time.sleep(rng.random() / 500)
        child.kill()
        child.stdout.read()
        child.wait()
        child.stdout.close()
        assert np.array_equal(a.array, np.arange(len(a)))
        a.append(len(a))
        if len(a) > 2_000_000:
            a.resize(0)


def test_a_follower_that_never_stops_finds_whole_rows_only():
    a = shared_array()
    child = start_child(FILLS.replace("way == 1", "False"), pickle.dumps(a).hex(), "1")
    try:
        child.stdin.close()
        seen = 0
        while seen < 1_000_000:
            rows = a.array
            assert np.array_equal(rows[seen:], np.arange(seen, len(rows)))
            seen = len(rows)
            assert child.poll() is None
            if seen > 500_000:
                break
            child.stdout.readline()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_the_pickle_of_an_array_that_no_process_has_is_an_error():
    a = shared_array()
    stored = pickle.dumps(a)
    a.close()
    with pytest.raises(FileNotFoundError):
        pickle.loads(stored)


def test_the_rows_of_a_named_memory_are_attached_by_their_name():
    name = f"linmem-test-{random.SystemRandom().randrange(1 << 60):x}"
    a = linmem.GrowableArray("f8", creator=linmem.creator("shared", shm_name=name))
    try:
        a.append(1.5)
        b = linmem.GrowableArray.attach(linmem.attach(name))
        c = linmem.GrowableArray("f8", creator=linmem.creator("shared", attach=name))
        a.append(2.5)
        assert b.array.tolist() == c.array.tolist() == [1.5, 2.5]
        with pytest.raises(ValueError, match=r"^dtype and row_shape must be those of the rows that are there, float64"):
            linmem.GrowableArray("f4", creator=linmem.creator("shared", attach=name))
        with pytest.raises(FileExistsError):
            linmem.GrowableArray("f8", creator=linmem.creator("shared", shm_name=name))
    finally:
        if NEEDS["shm_files"][0]:
            a.memory.unlink()


def test_what_a_peer_scribbles_into_the_head_is_refused():
    a = shared_array()
    a.extend(range(10))
    b = again(a)
    count_at = make_head(a.dtype, ()).count_at
    for text in (b"9" * 16, b" " * 16, b"-".rjust(16), bytes(16), b"99999".rjust(16)):
        a.memory.write(count_at, text)
        for call in (lambda: len(b), lambda: b.array, lambda: b.append(1), lambda: b.extend([1]), b.clear):
            with pytest.raises(ValueError, match=r"^the (number of rows in the head|head of the array)"):
                call()
        before = held()
        with pytest.raises(ValueError, match=r"head"):
            again(a)
        assert held() == before
    a.memory.write(count_at, b"10".rjust(16))
    b.append(10)
    assert a.array.tolist() == [*range(11)]


def test_a_dtype_without_a_head_is_refused():
    overlapping = np.dtype({"names": ["a", "b"], "formats": ["u4", "u4"], "offsets": [0, 2]})
    with pytest.raises(ValueError, match=r"^dtype must be one that an \.npy file can store"):
        shared_array(overlapping)


def test_the_maximum_is_exact_in_every_process():
    a = shared_array("u1", maximum=10_000)
    b = again(a)
    b.extend(bytes(10_000))
    for each in (a, b):
        with pytest.raises(linmem.GrowError, match=r"10000 rows"):
            each.append(1)


@requires("fork")
def test_a_forked_child_shares_the_rows():
    assert answer(FORKING + """
import linmem
a = linmem.GrowableArray("i8", creator=linmem.creator("shared"))
a.extend(range(10))

def work():
    a.extend(range(10, 100_000))
    a[0] = 99

child(os.fork, work)
print(len(a), a[0], int(a.array[1:].sum()))
""") == f"100000 99 {sum(range(100_000))}"


@pytest.mark.parametrize("call", [
    len, lambda a: a.array, lambda a: a.append(1), lambda a: a.append(np.int8(1)), lambda a: a.extend([1]),
    lambda a: a.extend(iter(range(20_000))), lambda a: a.resize(1), lambda a: a.clear(),
])
@pytest.mark.parametrize("kind", ["shared", pytest.param("file", marks=requires("file_memories"))])
def test_an_inaccessible_head_is_an_error_and_no_fault(kind, call, tmp_path):
    creator = SHARED if kind == "shared" else linmem.creator("file", path=tmp_path / "a.npy")
    a = linmem.GrowableArray("i8", creator=creator)
    a.extend(range(3))
    a.memory.protect(0, PAGE, "none")
    with pytest.raises(ValueError, match="has the access 'none'"):
        call(a)
    assert repr(a) == "<linmem.GrowableArray: an unknown number of rows of int64>"
    a.memory.protect(0, PAGE, "r")
    assert a.array.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="has the access 'r'"):
        a.append(1)
    a.memory.protect(0, PAGE, "rw")
    a.append(3)
    assert a.array.tolist() == [0, 1, 2, 3]
