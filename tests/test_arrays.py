"""`linmem.GrowableArray` and `linmem.empty`: rows that never move, what converts to a row, what a failure leaves."""

import array
import contextlib
import copy
import ctypes
import gc
import io
import itertools
import os
import pickle
import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    FORKING,
    PAGE,
    Interrupt,
    Interrupting,
    answer,
    each_instruction,
    file_requires,
    live_bytes,
    requires,
    resident,
    round_up,
)

import linmem

file_requires("numpy")

import numpy as np  # noqa: E402

from linmem._core.memory import RowBuffer  # noqa: E402
from linmem._files.npy_head import MOST_HEAD_BYTES, make_head, read_head  # noqa: E402

RECORD = np.dtype([("id", "<i4"), ("at", "<M8[s]"), ("name", "S5")])
ROWS = {
    "f8": [1.5, -2.0, float("inf")], "f4": [0.5, 1.0, 2.0], "i8": [1, -(2**63), 2**63 - 1], "i4": [-(2**31), 0, 7],
    "i2": [-5, 0, 5], "u1": [0, 255, 7], "u8": [2**64 - 1, 0, 1], ">f8": [1.5, 2.5, 3.5], ">i8": [1, 2, 3],
    "c16": [1j, 2.0, 3], "?": [True, False, True], "S3": [b"ab", b"", b"xyz"], "U3": ["ab", "", "xyz"],
    "M8[D]": ["2000-01-01", "1999-12-31", "2026-11-29"], "m8[ms]": [1, 2, 3], "V3": [b"abc", b"def", b"ghi"],
}


# -- rows come ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ROWS)
def test_rows_of_every_dtype_read_as_numpy_converts_them(dtype):
    wanted = np.array(ROWS[dtype], dtype)
    one_by_one, at_once, lazily = (linmem.GrowableArray(dtype) for _ in range(3))
    for row in ROWS[dtype]:
        one_by_one.append(row)
    at_once.extend(wanted)
    lazily.extend(iter(ROWS[dtype]))
    for a in (one_by_one, at_once, lazily):
        assert a.array.dtype == wanted.dtype
        assert a.array.tobytes() == wanted.tobytes()
        assert len(a) == 3
        assert a.array.flags.writeable


@pytest.mark.parametrize("row", [np.float64(2.5), np.float32(2.5), np.int8(2), 2, True, np.array(2.5), 10**30],
                         ids=lambda row: type(row).__name__)
def test_a_number_that_floats_can_hold_is_a_row_of_floats(row):
    a = linmem.GrowableArray("f8")
    a.append(row)
    assert a[0] == float(row)


NESTED = [("a", [("n", "i4"), ("x", "f4")]), ("v", "u1", (2,)), ("at", "M8[s]"), ("name", "S3")]


@pytest.mark.parametrize(("dtype", "row", "wrong"), [
    ([("n", "i4"), ("x", "f8")], (1.5, 2.0), "float64 in the field 'n'"),
    ([("n", "i4"), ("x", "f8")], (np.float32(1), 2.0), "float32 in the field 'n'"),
    ([("n", "i4"), ("x", "f8")], (np.array(1.5), 2.0), "float64 in the field 'n'"),
    ([("n", "i4"), ("x", "f8")], np.array((1.5, 2.0), "f8,f8")[()], "f8"),
    ([("n", "i4"), ("x", "f8")], (1, "2.5"), "<U3 in the field 'x'"),
    ([("n", "i4"), ("x", "f8")], (1, None), "object in the field 'x'"),
    (NESTED, ((1.5, 2), (3, 4), "2026-01-02", b"abc"), "float64 in the field 'n' in the field 'a'"),
    (NESTED, ((1, 2), (3, 4.5), "2026-01-02", b"abc"), "float64 in the field 'v'"),
    ("i8", np.float64(1.5), "float64"),
])
def test_a_value_of_a_field_converts_without_loss_or_is_refused(dtype, row, wrong):
    a = linmem.GrowableArray(dtype)
    for call in (lambda: a.append(row), lambda: a.extend([row]), lambda: a.extend(iter([row] * 20_000))):
        with pytest.raises(TypeError, match=rf"must convert to .* without loss, got .*{re.escape(wrong)}"):
            call()
    assert len(a) == 0


def test_an_array_of_one_float_is_no_integer():
    a = linmem.GrowableArray("i8")
    with pytest.raises(TypeError, match="without loss, got float64"):
        a.extend([np.array(1.5), 2])
    a.extend([np.array(1), 1 << 62])
    assert a.array.tolist() == [1, 1 << 62]


def test_a_field_takes_what_its_dtype_takes():
    a = linmem.GrowableArray(NESTED)
    a.extend([((True, 2), (3, np.uint8(4)), "2026-01-02", "abcd"),
              ((1, 2.5), np.array([5, 6]), np.datetime64(7, "s"), 8)])
    expected = np.array([((1, 2), (3, 4), "2026-01-02", b"abc"), ((1, 2.5), (5, 6), 7, b"8")], NESTED)
    assert np.array_equal(a.array, expected)
    with pytest.raises(OverflowError, match="an integer must be from 0 to 255, got 256"):
        a.append(((1, 2), (3, 256), "NaT", b""))


def test_records_are_rows_as_tuples_and_as_records():
    a = linmem.GrowableArray(RECORD)
    a.append((1, "2000-01-01", b"one"))
    a.extend([(2, np.datetime64("2001-01-01"), b"two"), a[0]])
    a.extend(a.array[:1])
    assert a["id"].tolist() == [1, 2, 1, 1]
    assert a[1]["name"] == b"two"
    assert a.array.dtype == RECORD


def test_a_row_may_have_a_shape():
    a = linmem.GrowableArray("f4", (2, 3))
    a.append([[1, 2, 3], [4, 5, 6]])
    a.extend(np.ones((4, 2, 3)))
    a.extend([])
    assert a.array.shape == (5, 2, 3)
    assert a.row_shape == (2, 3)
    assert a[0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_a_dtype_that_is_a_subarray_is_the_shape_of_a_row():
    a = linmem.GrowableArray("(2,)i4", 3)
    a.append(np.arange(6, dtype="i4").reshape(3, 2))
    assert (a.dtype, a.row_shape, a.array.shape) == (np.dtype("i4"), (3, 2), (1, 3, 2))


@pytest.mark.parametrize("rows", [b"\1\2\3", bytearray(b"\1\2\3"), memoryview(b"\1\2\3"), np.array([1, 2, 3], "u1"),
                                  array.array("B", [1, 2, 3]), (ctypes.c_ubyte * 3)(1, 2, 3),
                                  [1, 2, 3], (1, 2, 3), range(1, 4), iter([1, 2, 3]),
                                  np.array([1, 9, 2, 9, 3], "u1")[::2]], ids=lambda rows: type(rows).__name__)
def test_extend_takes_arrays_buffers_and_iterables(rows):
    a = linmem.GrowableArray("u1")
    a.extend(rows)
    assert a.array.tolist() == [1, 2, 3]


def test_a_long_iterable_is_taken_whole_and_in_order():
    n = 100_003
    a = linmem.GrowableArray("i8")
    a.append(-1)
    a.extend(iter(range(n)))
    assert np.array_equal(a.array, np.arange(-1, n))


@pytest.mark.parametrize("take", [lambda a: a, lambda a: a.array, lambda a: a.array[2:5], lambda a: a.array[::-1],
                                  lambda a: a.array[::3], iter, list])
def test_an_array_may_be_extended_by_parts_of_itself(take):
    a = linmem.GrowableArray("i4")
    a.extend(range(10))
    more = [int(row) for row in take(a)]
    a.extend(take(a))
    assert a.array.tolist() == [*range(10), *more]


def test_an_older_array_may_overlap_the_rows_that_come():
    a = linmem.GrowableArray("i8")
    a.extend(range(8))
    older = a.array
    a.resize(3)
    a.extend(older[1:])         # the bytes of rows 3 .. 9 are read while they are written
    assert a.array.tolist() == [0, 1, 2, 1, 2, 3, 4, 5, 6, 7]


# -- nothing moves ------------------------------------------------------------------------------------


def test_older_arrays_stay_valid_and_keep_their_length():
    a = linmem.GrowableArray("f8")
    a.append(1.0)
    first = a.array
    address = first.ctypes.data
    a.extend(np.arange(1_000_000.0))
    assert a.array.ctypes.data == address
    assert first.shape == (1,)
    first[0] = 7.0
    assert a[0] == 7.0
    with pytest.raises(BufferError):
        a.close()
    assert len(a) == 1_000_001
    del first
    gc.collect()
    a.close()
    assert a.closed


def test_an_array_taken_from_a_growable_array_outlives_it():
    with linmem.GrowableArray("i4") as a:
        a.extend(range(1000))
        kept = a.array
    assert a.closed
    assert kept.tolist() == list(range(1000))
    for call in (lambda: a.append(1), lambda: len(a), lambda: a.array, lambda: a.extend([1]), lambda: a.resize(0)):
        with pytest.raises(ValueError, match=r"closed"):
            call()


def rows_of_three():
    a = linmem.GrowableArray("f8")
    a.extend([1.0, 2.0, 3.0])
    return a


def read_if_open(a):
    with contextlib.suppress(ValueError):
        assert a[0] == 1.0


def test_a_reader_on_another_thread_that_keeps_no_array_does_not_stop_close():
    for meanwhile in each_instruction(linmem.GrowableArray.close):
        a = rows_of_three()
        with meanwhile(lambda a=a: read_if_open(a)):
            a.close()
        assert a.closed


@requires("maps")
def test_the_pages_go_at_the_end_of_the_block_while_a_reader_on_another_thread_comes_or_goes():
    before = live_bytes()
    for meanwhile in each_instruction(linmem.GrowableArray.__exit__):
        a = rows_of_three()
        with meanwhile(lambda a=a: read_if_open(a)):
            a.__exit__(None, None, None)
        assert live_bytes() == before
    for meanwhile in each_instruction(linmem.GrowableArray.array.fget):
        a = rows_of_three()
        with meanwhile(lambda a=a: a.__exit__(None, None, None)):
            read_if_open(a)
        a.__exit__(None, None, None)
        assert live_bytes() == before


@requires("maps")
def test_an_interrupt_at_the_end_of_a_block_keeps_no_pages_of_a_closed_array():
    before, nth, happened = live_bytes(), 1, True
    while happened:
        nth += 1        # at the first place nothing is closed yet
        a = rows_of_three()
        assert a.array[0] == 1.0
        with Interrupting(nth, linmem.arrays.__file__) as interrupting, contextlib.suppress(Interrupt):
            a.__exit__(None, None, None)
        happened = interrupting.place is not None
        assert a.closed
        assert live_bytes() == before
    assert nth > 2


def test_rows_that_come_back_are_zero():
    a = linmem.GrowableArray("u1", 7)
    a.resize(50_000)
    a.array[:] = 255
    a.clear()
    assert len(a) == 0
    assert a.array.shape == (0, 7)
    a.resize(60_000)
    assert not a.array.any()
    a.array[:] = 255
    a.resize(10)
    a.resize(30)
    assert a.array.sum(axis=1).tolist() == [255 * 7] * 10 + [0] * 20


@requires("smaps")
def test_address_space_is_reserved_and_only_pages_of_rows_are_resident():
    a = linmem.GrowableArray("f8")
    a.extend(np.ones(1_000_000))
    assert 8_000_000 <= resident(a.memory) <= 8_000_000 + PAGE
    a.resize(10_000_000)
    assert resident(a.memory) <= 8_000_000 + 8_000_000 // 8 + (1 << 17), "rows that nobody wrote are resident"


# -- a failure changes nothing ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "row_shape", "row"), [
    ("i8", (), 1.5), ("i8", (), "1"), ("i8", (), None), ("u1", (), 256), ("u1", (), -1), ("i4", (), 2**31),
    ("i8", (), 2**63), ("?", (), 1), ("f8", (), 1j), ("f8", (), "x"), ("f8", (), b"1"), ("f8", (2,), 1.0),
    ("f8", (2,), [1.0]), ("f8", (2,), [[1.0], [2.0]]), ("f8", (), [1.0]), ("f8", (2,), [1.0, "x"]),
    ("i4", (), np.float64(1)), ("i4", (), np.array([1])), (RECORD, (), (1, 2)), (RECORD, (), [1, 2, 3]),
    ("M8[s]", (), "no date"), ("f4", (), [[1], [2, 3]]),
    ("i4", (), np.int64(2**40)), ("i4", (2,), np.array([1, 2**40])), ("u1", (2,), [np.int64(300), 1]),
    ("i8", (2,), [np.uint64(2**63), np.int64(-1)]), ("u8", (), np.int8(-1)),
])
def test_what_is_no_row_is_refused_by_name_and_value(dtype, row_shape, row):
    a = linmem.GrowableArray(dtype, row_shape)
    a.extend(np.zeros((3, *row_shape), dtype))
    with pytest.raises((TypeError, ValueError, OverflowError), match=r"^row must (convert to|have the shape) "):
        a.append(row)
    assert len(a) == 3
    with pytest.raises((TypeError, ValueError, OverflowError), match=r"^rows? must "):
        a.extend([a.array[0].item() if row_shape == () else a.array[0], row])
    assert len(a) == 3


@pytest.mark.parametrize("rows", [5, None, 1.5, np.zeros((2, 2)), np.float64(1), np.zeros(3, "c16"), "text",
                                  {"a": 1}, np.array(["x"])], ids=str)
def test_what_are_no_rows_is_refused(rows):
    a = linmem.GrowableArray("f8")
    with pytest.raises((TypeError, ValueError), match=r"^rows must "):
        a.extend(rows)
    assert len(a) == 0


@pytest.mark.parametrize("n", [0, 5, 50_000])
def test_an_iterable_that_raises_midway_changes_nothing(n):
    class Own(Exception):
        pass

    def rows():
        yield from range(n)
        raise Own

    a = linmem.GrowableArray("i8")
    a.extend([1, 2, 3])
    with pytest.raises(Own):
        a.extend(rows())
    assert a.array.tolist() == [1, 2, 3]
    a.resize(6)
    assert a.array.tolist() == [1, 2, 3, 0, 0, 0]


def test_an_iterable_may_append_to_the_array_that_it_extends():
    a = linmem.GrowableArray("i8")

    def rows():
        for i in range(40_000):
            if i % 10_000 == 0:
                a.append(-1)
            yield i

    a.extend(rows())
    assert a.array.tolist() == [-1] * 4 + list(range(40_000))


def test_the_maximum_is_exact_and_a_refused_extend_changes_nothing():
    a = linmem.GrowableArray("i4", maximum=10)
    a.extend(range(8))
    for call in (lambda: a.extend([1, 2, 3]), lambda: a.extend(np.zeros(3, "i4")), lambda: a.resize(11)):
        with pytest.raises(linmem.GrowError, match=r"8 rows of 4 bytes and address space for 10, .* larger maximum="):
            call()
        assert a.array.tolist() == list(range(8))
    a.extend([8, 9])
    with pytest.raises(linmem.GrowError, match=r"10 rows"):
        a.append(10)
    assert a.array.tolist() == list(range(10))
    assert a.maximum == 10


def test_past_the_reserved_address_space_the_error_names_the_way_out():
    a = linmem.GrowableArray("u1")
    room = a.memory.byte_capacity()
    with pytest.raises(linmem.GrowError, match=rf"0 rows of 1 bytes and address space for {room}, .* maximum="):
        a.resize(room + 1)
    assert len(a) == 0
    assert a.maximum is None


def test_a_budget_that_has_room_for_the_rows_only_is_used_to_its_end():
    budget = linmem.creator("limiting", limit_bytes=2 * PAGE)
    a = linmem.GrowableArray("u1", creator=budget)
    a.extend(bytes(2 * PAGE))
    with pytest.raises(linmem.LimitError) as caught:
        a.append(1)
    assert caught.value.limit == 2 * PAGE
    assert len(a) == 2 * PAGE


@pytest.mark.parametrize("creator", ["pool", "statistics", "mmap"])
def test_any_creator_makes_the_memory(creator):
    made = linmem.creator(creator)
    for _ in range(3):
        with linmem.GrowableArray("i8", creator=made) as a:
            a.resize(5000)
            assert not a.array.any()
            a.array[:] = -1
    assert linmem.find(a.dtype.itemsize) is None


def test_a_row_on_a_page_that_is_read_only_is_refused():
    a = linmem.GrowableArray("u1", PAGE)
    a.append(np.ones(PAGE, "u1"))
    a.resize(2)
    a.memory.protect(0, PAGE, "r")
    a.append(np.full(PAGE, 2, "u1"))            # another page
    a.clear()
    with pytest.raises(ValueError, match=r"append is refused for .* the page at 0 has the access 'r'"):
        a.append(np.ones(PAGE, "u1"))
    with pytest.raises(ValueError, match=r"resize is refused"):
        a.resize(1)
    assert len(a) == 0
    a.memory.protect(0, PAGE, "rw")
    a.resize(1)
    assert not a.array.any()


# -- arguments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "error", "text"), [
    (("O",), ValueError, "dtype must be that of plain bytes, got 'O', which holds Python objects"),
    (([("a", "O")],), ValueError, "holds Python objects"),
    (("V0",), ValueError, "dtype must be that of plain bytes, got 'V0', which has no size"),
    ((None,), TypeError, "dtype must be a NumPy dtype, got None"),
    (("nonsense",), TypeError, "dtype must be a NumPy dtype, got 'nonsense'"),
    (("f8", -1), ValueError, "row_shape must be >= 0, got -1"),
    (("f8", 0), ValueError, "row_shape must be one of at least one element, got 0"),
    (("f8", (3, 0)), ValueError, r"row_shape must be one of at least one element, got \(3, 0\)"),
    (("f8", 1.5), TypeError, "row_shape must be an integer or a tuple of integers, got float"),
    (("f8", (1,) * 64), ValueError, r"^row_shape must be one that NumPy takes, got \(1, 1, "),
    (("f8", 2**62), OverflowError, r"row_shape must be one of less than 2\*\*63 bytes"),
])
def test_an_argument_that_is_not_valid_is_named(arguments, error, text):
    with pytest.raises(error, match=text):
        linmem.GrowableArray(*arguments)


@pytest.mark.parametrize(("maximum", "error", "text"), [
    (-1, ValueError, "maximum must be >= 0, got -1"), (1.0, TypeError, "maximum must be a number of rows, got float"),
    (2**60, OverflowError, f"maximum must be <= {2**60 - 1025} rows of 8 bytes, got {2**60}"),
])
def test_a_maximum_that_is_not_valid_is_named(maximum, error, text):
    with pytest.raises(error, match=text):
        linmem.GrowableArray("f8", maximum=maximum)


@pytest.mark.parametrize("n", [-1, 1.5, "1", None, 2**64, 2**63])
def test_a_number_of_rows_that_is_not_valid_is_refused(n):
    a = linmem.GrowableArray("u1")
    with pytest.raises((ValueError, TypeError, OverflowError, linmem.GrowError)):
        a.resize(n)
    assert len(a) == 0


def test_an_array_is_made_once():
    a = linmem.GrowableArray("u1")
    a.append(1)
    with pytest.raises(TypeError, match=r"called before"):
        a.__init__("f8")
    a.append(2)
    assert a.array.tolist() == [1, 2]
    unmade = linmem.GrowableArray.__new__(linmem.GrowableArray)
    for call in (lambda: unmade.append(1), lambda: len(unmade), lambda: unmade.memory, lambda: unmade.resize(1)):
        with pytest.raises((TypeError, AttributeError)):
            call()


# -- protocols --------------------------------------------------------------------------------------------


def test_it_is_indexed_as_its_array():
    a = linmem.GrowableArray("i4")
    a.extend(range(10))
    assert a[0] == 0
    assert a[-1] == 9
    assert a[2:4].tolist() == [2, 3]
    assert a[::-3].tolist() == [9, 6, 3, 0]
    assert a[[1, 1]].tolist() == [1, 1]
    assert a[a.array > 7].tolist() == [8, 9]
    a[-1] = 100
    a[:2] = 5
    assert list(a) == [5, 5, 2, 3, 4, 5, 6, 7, 8, 100]
    assert 100 in a
    assert bool(a)
    for index in (10, -11):
        with pytest.raises(IndexError):
            a[index]
    with pytest.raises(IndexError):
        a[10] = 1


def test_numpy_takes_it_without_a_copy_unless_asked_for_one():
    a = linmem.GrowableArray("f8")
    a.extend([1, 2, 3])
    assert np.shares_memory(np.asarray(a), a.array)
    assert not np.shares_memory(np.array(a), a.array)
    assert np.asarray(a, "i4").tolist() == [1, 2, 3]
    assert np.sum(a) == 6.0
    with pytest.raises(ValueError, match=r"copy must not be False"):
        a.__array__(np.dtype("i4"), copy=False)
    assert a.__array__(copy=True).tolist() == [1, 2, 3]


def test_dlpack_shares_the_rows():
    a = linmem.GrowableArray("f4")
    a.extend([1, 2, 3])
    taken = np.from_dlpack(a)
    assert np.shares_memory(taken, a.array)
    assert a.__dlpack_device__() == a.array.__dlpack_device__()


def test_the_text_for_people_says_rows_and_dtype():
    a = linmem.GrowableArray("f8", (2,))
    a.resize(3)
    assert repr(a) == "<linmem.GrowableArray: 3 rows of (2,) float64>"
    a.close()
    assert repr(a) == "<linmem.GrowableArray, closed>"


@pytest.mark.parametrize("copied", [lambda a: pickle.loads(pickle.dumps(a)), copy.copy, copy.deepcopy,
                                    lambda a: pickle.loads(pickle.dumps(a, 5))])
def test_a_private_array_pickles_as_a_copy(copied):
    a = linmem.GrowableArray(RECORD, maximum=7)
    a.extend([(1, "2000-01-01", b"one")] * 3)
    b = copied(a)
    assert type(b) is linmem.GrowableArray
    assert (b.dtype, b.row_shape, b.maximum) == (a.dtype, (), 7)
    assert b.array.tolist() == a.array.tolist()
    b.append(b[0])
    assert (len(a), len(b)) == (3, 4)


@requires("fork")
def test_a_forked_child_has_a_copy():
    assert answer(FORKING + """
import linmem
a = linmem.GrowableArray("i8")
a.extend(range(10))

def work():
    a.append(10)
    a[0] = 99
    assert a.array.tolist() == [99, *range(1, 11)]

child(os.fork, work)
print(a.array.tolist())
""") == str(list(range(10)))


def test_threads_append_and_extend_in_whole_calls():
    a = linmem.GrowableArray("i8")
    start = threading.Barrier(4)
    sizes = {0: 1, 1: 5, 2: 7}

    def work(number):
        start.wait()
        for call in range(number * 300, number * 300 + 300):
            a.append(3 * call)
            a.extend([3 * call + 1] * sizes[1])
            a.extend(np.full(sizes[2], 3 * call + 2))
            assert len(a.array) >= 13

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    runs = [(value, len(list(run))) for value, run in itertools.groupby(a.array.tolist())]
    assert sorted(runs) == [(value, sizes[value % 3]) for value in range(3 * 4 * 300)]


@settings(deadline=None)
@given(st.lists(st.one_of(
    st.tuples(st.just("append"), st.integers(0, 255)), st.tuples(st.just("extend"), st.binary(max_size=3 * 4096)),
    st.tuples(st.just("resize"), st.integers(0, 20000)), st.tuples(st.just("clear")),
    st.tuples(st.just("own"), st.integers(-5, 20000), st.integers(-5, 20000))), max_size=20))
def test_it_does_what_a_bytearray_does(steps):
    a, model, older = linmem.GrowableArray("u1"), bytearray(), []
    for what, *values in steps:
        if what == "append":
            a.append(values[0])
            model.append(values[0])
        elif what == "extend":
            a.extend(values[0])
            model += values[0]
        elif what == "resize":
            a.resize(values[0])
            model = model[:values[0]].ljust(values[0], b"\0")
        elif what == "clear":
            a.clear()
            model.clear()
        else:
            a.extend(a.array[values[0]:values[1]])
            model += model[values[0]:values[1]]
        assert len(a) == len(model)
        assert a.array.tobytes() == bytes(model)
        older.append((len(a), a.array))
    assert all(len(array) == n for n, array in older)


# -- the head of memories that others see ------------------------------------------------------------------


HEADS = [("f8", ()), ("<i4", (2, 3)), ([("a", "u1"), ("b", ">f8", (2,))], ()), ("M8[us]", (5,)), ("S5", ()),
         ([("\u00e4\u20ac", "f4")], ()), (np.dtype([("a", "u1"), ("b", "f8")], align=True), (1,)), ("?", ()),
         ([(f"name {i:03}", "u1") for i in range(250)], ())]


@pytest.mark.parametrize(("dtype", "row_shape"), HEADS, ids=lambda value: str(value)[:20])
def test_numpy_reads_the_head_and_linmem_reads_it_back(dtype, row_shape, tmp_path):
    head = make_head(np.dtype(dtype), row_shape)
    rows = np.zeros((7, *row_shape), dtype)
    rows.view("u1")[...] = 1
    (tmp_path / "rows.npy").write_bytes(head.with_rows(7) + rows.tobytes() + b"bytes after the rows")
    assert len(head.raw) % 4096 == head.count_at % 16 == 0
    for mapped in (np.load(tmp_path / "rows.npy", mmap_mode="r"), np.load(tmp_path / "rows.npy")):
        assert (mapped.dtype, mapped.shape, mapped.tobytes()) == (rows.dtype, rows.shape, rows.tobytes())
    with open(tmp_path / "rows.npy", "rb") as file:
        assert read_head(file.read(MOST_HEAD_BYTES)) == (head, 7)


@pytest.mark.parametrize(("dtype", "text"), [
    ([(f"name {i:04}", "u1") for i in range(1000)], "dtype must be described by less than 8192 characters"),
    (np.dtype({"names": ["a", "b"], "formats": ["u4", "u4"], "offsets": [0, 2]}), "dtype must be one that an .npy "),
])
def test_a_dtype_that_an_npy_file_cannot_store_is_refused_where_others_see_it(dtype, text):
    with pytest.raises(ValueError, match=text):
        make_head(np.dtype(dtype), ())
    linmem.GrowableArray(dtype, creator=linmem.MmapCreator()).resize(3)     # no head is needed here


GOOD = make_head(np.dtype("f8"), ()).with_rows(7)


@pytest.mark.parametrize("raw", [
    b"", b"\x93NUMPY", GOOD[:100], b"PK" + GOOD[2:], GOOD[:6] + b"\2\0" + GOOD[8:], GOOD[:8] + b"\xff\xff" + GOOD[10:],
    GOOD.replace(b"7", b"-"), GOOD.replace(b" 7", b"-7"), GOOD.replace(b"7", b"x"), GOOD.replace(b"<f8", b"|O8"),
    GOOD.replace(b"<f8", b"|V0"), GOOD.replace(b"7,)", b"7  "), GOOD.replace(b"False", b"True "),
    GOOD.replace(b"'descr'", b"'other'"), GOOD.replace(b"7,)", b"7,0"), GOOD[:10] + b"(" * 4086,
    GOOD[:10] + b"-" * 4086, GOOD.replace(b"   7,)", b"7   ,)"), GOOD.replace(b"<f8", b"(8,"), bytes(4096),
    GOOD.replace(b"               7", b"9" * 16).replace(b"<f8", b"<q9"),
    GOOD.replace(b"7,), }                            ", b"7, 1000000000000000000, 99999), }"),
    GOOD.replace(b"7,), }   ", b"7, 0), } ")], ids=range(23))
def test_a_damaged_head_is_refused(raw):
    with pytest.raises(ValueError, match=r"^(the head of the|memory must begin with the head of an) \.npy file"):
        read_head(raw)


class Rows(RowBuffer):
    """Rows of bytes behind a head, in a memory that several of these objects see."""

    def __init__(self, memory, most=2**40):
        head = make_head(np.dtype("u1"), (3,))
        if len(memory) == 0:
            memory.grow_to(4096)
            memory.write(0, head.raw)
        self._open(memory, 4096, 3, most, head.count_at, "")
        self.count_at = head.count_at


def test_the_number_of_rows_in_the_head_is_what_all_see():
    memory = linmem.create(0)
    one, other = Rows(memory), Rows(memory)
    for n in range(1, 1200):
        (one if n % 3 else other)._extend_bytes(bytes([n % 256] * 3))
        assert len(one) == len(other) == n
        assert memory.read(one.count_at, 16) == f"{n:16}".encode()
    rows = np.load(io.BytesIO(bytes(memory)))
    assert rows.shape == (1199, 3)
    assert rows[:, 2].tolist() == [n % 256 for n in range(1, 1200)]
    other.resize(5)
    one.resize(8)
    assert memory.read(4096 + 15, 9) == bytes(9)
    other.clear()
    assert len(one) == 0
    one.resize(10_000_000)      # the number has digits in both halves of its text
    assert (len(other), memory.read(one.count_at, 16)) == (10_000_000, b"        10000000")
    one.resize(123_456_789)
    assert (len(other), memory.read(one.count_at, 16)) == (123_456_789, b"       123456789")


@pytest.mark.parametrize(("text", "message"), [
    (b" " * 16, "damaged"), (b"               x", "damaged"), (b"       1       2", "damaged"),
    (b"0x00000000000001", "damaged"), (bytes(16), "damaged"), (b"9" * 16, "says 9999999999999999 rows"),
    (b"              22", "says 22 rows, and the memory has room for 21")])
def test_a_number_of_rows_that_a_hostile_peer_wrote_is_refused(text, message):
    memory = linmem.create(0)
    rows = Rows(memory)
    memory.grow_to(4096 + 65)
    rows._extend_bytes(b"abc")
    memory.write(rows.count_at, text)
    for call in (lambda: len(rows), lambda: rows._extend_bytes(b"abc"), lambda: rows.resize(1), rows.clear):
        with pytest.raises(ValueError, match=message):
            call()
    memory.write(rows.count_at, b"               1")
    rows._extend_bytes(b"def")
    assert memory.read(4096, 6) == b"abcdef"


# -- empty ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dtype"), [(0, "f8"), (3, "f8"), ((2, 3), "i4"), ((), "M8[s]"), (PAGE, "u1"),
                                              (PAGE + 1, "u1"), ((5,), RECORD), ((0, 7), "u1")])
def test_empty_has_whole_pages_of_its_own(shape, dtype):
    array = linmem.empty(shape, dtype)
    wanted = np.zeros(shape, dtype)
    assert array.shape == wanted.shape
    assert array.dtype == wanted.dtype
    assert array.tobytes() == wanted.tobytes()
    assert array.flags.writeable
    assert array.flags.c_contiguous
    place = linmem.find(array.ctypes.data)
    assert place.offset == 0
    size = place.memory.byte_size()
    assert size % PAGE == 0
    assert 0 <= size - array.nbytes < PAGE
    assert place.memory.byte_capacity() == max(size, PAGE)
    assert ctypes.string_at(array.ctypes.data, size) == bytes(size)


def test_empty_keeps_its_pages_as_long_as_the_array_exists():
    array = linmem.empty(100, "u1")
    address = array.ctypes.data
    part = array[10:]
    del array
    gc.collect()
    assert linmem.find(address).memory is not None
    part[:] = 1
    del part
    gc.collect()
    found = linmem.find(address)
    assert found is None or found.memory is None


@requires("shared", "maps_images")
@pytest.mark.parametrize("dtype", ["u2", "M8[s]", RECORD], ids=str)
def test_an_array_of_empty_is_shown_elsewhere_without_a_copy(dtype):
    array = linmem.empty((3, 1000), dtype)
    size = round_up(array.nbytes)
    with linmem.create(size + 2 * PAGE) as mem:
        mem.map(PAGE, array)
        array.view("u1")[:] = 7
        assert mem.read(PAGE, size + PAGE) == array.tobytes() + bytes(size - array.nbytes + PAGE)
        mem.write(PAGE, b"\2")
        assert array.view("u1").flat[0] == 2
        del array
        gc.collect()
        assert mem.read(PAGE, 2) == b"\2\7"


@requires("shared", "maps_images")
def test_a_part_of_an_array_is_shown_from_a_host_page_on():
    array = linmem.empty(3 * PAGE, "u1")
    array[PAGE:] = 5
    with linmem.create(4 * PAGE) as mem:
        mem.map(0, array[PAGE:])
        assert mem.read(0, 3 * PAGE) == b"\5" * 2 * PAGE + bytes(PAGE)
        mem.map(3 * PAGE, array, source_offset=PAGE, size=PAGE)
        assert mem[3 * PAGE] == 5
        with pytest.raises(ValueError, match=f"source must begin at a host page .* begins at byte {PAGE + 1} of its"):
            mem.map(0, array[PAGE + 1:])
        with pytest.raises(TypeError, match=r"linmem.empty\(shape, dtype\) makes a NumPy array whose"):
            mem.map(0, array[::2])
        with pytest.raises(ValueError, match="source_offset \\+ size must be <= the size of the source"):
            mem.map(0, array[:PAGE], size=2 * PAGE)
        array.flags.writeable = False
        with pytest.raises(ValueError, match="access must be 'r' for a read-only ndarray"):
            mem.map(0, array)
        mem.map(0, array, access="r")


@requires("maps_images")
def test_arrays_on_private_pages_are_no_source():
    with linmem.create(4 * PAGE) as mem:
        for array in (np.zeros(PAGE, "u1"), np.zeros(0), b"bytes", memoryview(b"m")):
            with pytest.raises(TypeError, match=r"which has no pages of its own .* linmem.empty\(shape, dtype\) makes"):
                mem.map(0, array)
        private = linmem.empty(PAGE, "u1", creator=linmem.MmapCreator())
        with pytest.raises(TypeError, match=r"got one of kind 'mmap', .* linmem.empty\(\) makes NumPy arrays, whose"):
            mem.map(0, private)
        with pytest.raises(TypeError, match="got one of kind 'mmap'"):
            mem.map(0, mem.array("u1"))


@requires("fork", "shared")
def test_a_forked_child_shares_an_array_of_empty_and_copies_one_on_private_pages():
    shared, private = linmem.empty(3, "u1"), linmem.empty(3, "u1", creator=linmem.MmapCreator())
    child = os.fork()
    if child == 0:
        shared[:] = private[:] = 7
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (shared.tolist(), private.tolist()) == ([7, 7, 7], [0, 0, 0])


@pytest.mark.parametrize(("shape", "dtype", "error", "text"), [
    (-1, "f8", ValueError, "shape must be >= 0, got -1"), (1.5, "f8", TypeError, "shape must be an integer or a tuple"),
    ((1, "x"), "f8", TypeError, "shape must be an integer or a tuple"), (3, "O", ValueError, "holds Python objects"),
    (2**60, "f8", OverflowError, r"shape must be one of less than 2\*\*63 bytes, got"),
])
def test_what_empty_cannot_make_is_refused(shape, dtype, error, text):
    with pytest.raises(error, match=text):
        linmem.empty(shape, dtype)


def test_linmem_is_imported_without_numpy_and_says_what_is_missing():
    assert answer("""
        import sys
        sys.modules["numpy"] = None
        import linmem
        from linmem import *
        for call in (lambda: linmem.GrowableArray("f8"), lambda: linmem.empty(3, "f8")):
            try:
                call()
            except ImportError as error:
                print(error)
        """).splitlines()[:2] == [
            "GrowableArray needs NumPy: pip install 'linmem[numpy]' (import of numpy halted; None in sys.modules)",
            "linmem.empty needs NumPy: pip install 'linmem[numpy]' (import of numpy halted; None in sys.modules)"]


def test_importing_linmem_does_not_import_numpy():
    assert answer("import sys, linmem; print('numpy' in sys.modules, 'linmem.arrays' in sys.modules)"
                  ).split() == ["False", "False"]
