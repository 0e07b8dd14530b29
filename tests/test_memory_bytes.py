"""Bytes: indexing, slices, read and write, and views in every element format."""

import array
import gc
import struct

import pytest
import support
from hypothesis import given
from hypothesis import strategies as st
from support import NEEDS, PAGE, requires

import linmem

if NEEDS["numpy"][0]:
    import numpy as np
else:
    np = None


@pytest.fixture
def mem():
    with linmem.create(4 * PAGE, maximum=64 * PAGE) as mem:
        yield mem


def test_a_memoryview_is_one_dimension_of_writable_bytes(mem):
    with memoryview(mem) as view:
        assert (view.format, view.ndim, view.itemsize, view.shape, view.strides) == ("B", 1, 1, (4 * PAGE,), (1,))
        assert view.readonly is False
        assert view.contiguous
        assert view.obj is mem
        view[5] = 200
        assert mem[5] == 200
        mem[6] = 201
        assert view[6] == 201


def test_indexing_and_slicing_read_and_write_as_a_bytearray_does(mem):
    model = bytearray(4 * PAGE)
    for index, byte in ((0, 1), (-1, 2), (PAGE, 3), (-PAGE, 4)):
        mem[index] = model[index] = byte
        assert mem[index] == byte
    for part in (slice(3, 9), slice(-6, None), slice(0, 0), slice(2, 20, 3), slice(20, 2, -3), slice(None, None, PAGE)):
        data = bytes(range(len(model[part])))
        mem[part] = data
        model[part] = data
        assert mem[part] == model[part]
    assert bytes(mem) == model
    assert mem[4 * PAGE:] == mem[9:3] == b""


def test_a_slice_takes_any_contiguous_buffer_and_overlapping_parts_of_itself(mem):
    mem[0:8] = array.array("I", [1, 2])
    assert mem[0:8] == struct.pack("=2I", 1, 2)
    mem.write(0, bytes(range(100)))
    with memoryview(mem) as view:
        mem[1:51] = view[0:50]
        assert mem.write(0, view[1:51]) == 50
    assert mem[0:51] == bytes(range(50)) + b"\x31"


@pytest.mark.parametrize("size", [0, 1, 1000, 65535, 65536, 3 * PAGE])
def test_read_and_write_copy_runs_of_any_length(mem, size):
    mem.grow_to(2 * 65536 + 3 * PAGE)
    data = bytes(i % 253 for i in range(size))
    assert mem.write(7, data) == size
    assert mem.read(7, size) == data
    assert mem.read(0, 7) == bytes(7)
    assert mem.read(7 + size, 50) == bytes(50)


def test_a_write_past_the_size_writes_no_byte(mem):
    with pytest.raises(ValueError, match=r"offset \+ size must be <= byte_size\(\)"):
        mem.write(4 * PAGE - 3, b"1234")
    assert not any(mem[-4:])


FORMATS = ["b", "B", "h", "H", "i", "I", "l", "L", "q", "Q", "n", "N", "f", "d", "?", "@d", "=i", "<i", "<d", "<Q"]


@pytest.mark.parametrize("format", FORMATS)
def test_native_formats_read_and_write_elements(mem, format):
    size = struct.calcsize(format)
    one = struct.unpack(format, struct.pack(format, 1))[0]
    with mem.view(format, offset=3, count=5) as view:
        assert (len(view), view.itemsize, view.nbytes) == (5, size, 5 * size)
        view[1] = one
        assert view[1] == one
    assert mem.read(3, 5 * size) == bytes(size) + struct.pack(format, one) + bytes(3 * size)


@pytest.mark.parametrize("format", [">i", ">d", "<2if", "5s", ">f8", "c16", "e", "<e"])
def test_formats_that_memoryview_cannot_cast_to_are_exported_as_they_are(mem, format):
    mem.write(0, bytes(range(64)))
    with mem.view(format, offset=8, count=2) as view:
        assert (len(view), view.ndim) == (2, 1)
        assert bytes(view) == mem.read(8, 2 * view.itemsize)
        assert mem.info().exports == 1
    assert mem.info().exports == 0


@pytest.mark.parametrize(("kind", "format"), [(bool, "?"), (int, "q"), (float, "d")])
def test_python_number_types_are_formats(mem, kind, format):
    with mem.view(kind) as view:
        assert view.format == format


@pytest.mark.parametrize("format", ["d", ">d"])
def test_a_view_without_a_count_holds_all_whole_elements_from_its_offset(format):
    with linmem.create(100) as mem:
        for offset, count in ((0, 12), (4, 12), (5, 11), (93, 0), (100, 0)):
            with mem.view(format, offset) as view:
                assert len(view) == count


@requires("numpy")
def test_numpy_arrays_are_views(mem):
    array = np.asarray(mem)
    assert (array.dtype, array.shape) == (np.uint8, (4 * PAGE,))
    assert array.flags.writeable
    assert array.__array_interface__["data"][0] == mem.as_ptr()
    array[10:20] = 7
    assert mem[10:20] == bytes([7] * 10)
    del array


DTYPES = ["?", "i1", "<i2", ">i2", "<u4", ">u4", "<i8", ">f8", "<f2", "<f4", "<c8", ">c16", "S5", "<U3"]


@requires("numpy")
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("spelling", ["string", "dtype", "type"])
def test_numpy_dtypes_are_formats_in_every_spelling(mem, name, spelling):
    dtype = np.dtype(name)
    if spelling == "type" and not dtype.isnative:
        dtype = dtype.newbyteorder("=")
    if dtype.kind in "SU" and spelling != "dtype":
        format = dtype
    else:
        format = {"string": dtype.str, "dtype": dtype, "type": dtype.type}[spelling]
    array = np.asarray(mem.view(format, offset=dtype.itemsize, count=3))
    assert array.dtype == dtype
    array[1] = 1
    expected = np.zeros(3, dtype)
    expected[1] = 1
    assert mem.read(dtype.itemsize, 3 * dtype.itemsize) == expected.tobytes()
    del array


@requires("numpy")
def test_structured_dtypes_keep_their_fields(mem):
    dtype = np.dtype([("id", "<i4"), ("at", ">f8", (2,)), ("tag", "S3")])
    array = np.asarray(mem.view(dtype, offset=16, count=4))
    assert array.dtype == dtype
    array["id"][2] = -5
    array["at"][2] = (1.5, 2.5)
    array["tag"][2] = b"abc"
    one = np.frombuffer(mem.read(16 + 2 * dtype.itemsize, dtype.itemsize), dtype)[0]
    assert one["id"] == -5
    assert list(one["at"]) == [1.5, 2.5]
    assert one["tag"] == b"abc"
    del array


@requires("numpy")
@pytest.mark.parametrize("spelling", ["M8[s]", "m8[ns]"])
def test_a_dtype_without_a_buffer_form_is_refused(mem, spelling):
    with pytest.raises(ValueError, match=r"^format has no buffer form.*mem\.array\(dtype\)"):
        mem.view(np.dtype(spelling))
    assert mem.info().exports == 0


@requires("numpy")
def test_views_of_every_kind_survive_growth(mem):
    array, foreign, plain = np.asarray(mem), np.asarray(mem.view(">f8")), memoryview(mem)
    mem.grow_to(64 * PAGE)
    array[0] = 1
    foreign[1] = 2.5
    plain[16] = 9
    assert mem.read(0, 17) == b"\1" + bytes(7) + struct.pack(">d", 2.5) + b"\t"
    assert (len(array), len(foreign), len(plain)) == (4 * PAGE, PAGE // 2, 4 * PAGE)
    assert len(np.asarray(mem)) == 64 * PAGE
    plain.release()
    del array, foreign


def test_an_empty_memory_has_empty_views():
    with linmem.create(0) as mem:
        assert bytes(mem) == mem[:] == mem.read(0, 0) == b""
        assert mem.write(0, b"") == 0
        assert len(mem.view("d")) == 0
        assert len(mem.view(">d")) == 0
        with pytest.raises(IndexError, match="the memory is empty, got 0"):
            mem[0]
        mem.discard()
        mem.prefault()


def test_a_memory_is_true_to_its_length_and_not_hashable_by_content(mem):
    assert len(mem) == mem.byte_size()
    assert mem == mem
    assert mem in {mem}


def test_the_exporter_of_a_typed_view_cannot_be_made_by_hand():
    with linmem.create(PAGE) as mem, mem.view(">d") as view:
        window = type(view.obj)
        for arguments in ((), (mem, 10 * PAGE, 1, b">d", 8)):
            with pytest.raises(TypeError, match=r"made by Memory\.view"):
                memoryview(window(*arguments))


NAMES = ["bool", "bool_", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16",
         "float32", "float64", "complex64", "complex128", "byte", "ubyte", "short", "ushort", "intc", "uintc", "long",
         "ulong",
         "longlong", "ulonglong", "intp", "uintp", "half", "single", "double", "csingle", "cdouble", "int", "float",
         "complex"]


@requires("numpy")
@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_numpys_types_are_formats(mem, name):
    array = np.asarray(mem.view(name))
    if name != "int":       # NumPy's type for int has 64 bits, or is C's long in older versions
        assert array.dtype == np.dtype({"long": "l", "ulong": "L"}.get(name, name))
    assert array.itemsize == mem.view(name).itemsize
    del array


def test_the_names_of_numpys_types_are_formats_without_numpy():
    assert support.answer("""
        import linmem, sys
        with linmem.create(64) as mem:
            print(*[mem.view(name).itemsize for name in ("float64", "int32", "uint8", "bool", "complex128", "float16")],
                  "numpy" in sys.modules)
        """) == "8 4 1 1 16 2 False"


@pytest.mark.parametrize("format", ["datetime64[ns]", "timedelta64", "longdouble", "object", "f16", "S5"])
def test_the_refusal_of_an_unknown_format_recommends_array(mem, format):
    with pytest.raises(ValueError, match=r"^format must be a struct format or a NumPy type, got .*mem\.array\(dtype\)"):
        mem.view(format)


ANY_DTYPES = ["datetime64[ns]", "<m8[s]", ">M8[D]", ">c16", ">f8", "V5", "S3", "U2", "longdouble", "bool",
              [("when", "M8[us]"), ("at", ">f8", (2,)), ("tag", "S3")], {"names": ["a"], "formats": ["u2"],
                                                                          "offsets": [3], "itemsize": 7}]


@requires("numpy")
@pytest.mark.parametrize("dtype", ANY_DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 16])
def test_an_array_shows_the_memorys_bytes_as_any_dtype(mem, dtype, offset):
    dtype = np.dtype(dtype)
    mem.write(0, bytes(i % 7 for i in range(4 * PAGE)))
    array = mem.array(dtype, offset)
    n = (4 * PAGE - offset) // dtype.itemsize
    assert (array.dtype, array.shape) == (dtype, (n,))
    assert array.flags.writeable
    assert array.__array_interface__["data"][0] == mem.as_ptr() + offset
    assert mem.info().exports == 1
    one = np.zeros(1, dtype)
    array[1:2] = one
    mem.grow_to(8 * PAGE)
    array[-1:] = one
    assert mem.read(offset + dtype.itemsize, dtype.itemsize) == mem.read(
        offset + (n - 1) * dtype.itemsize, dtype.itemsize)
    del array, one
    assert mem.info().exports == 0


@requires("numpy")
def test_dlpack_shares_the_bytes_and_counts_as_an_exported_buffer(mem):
    taken = np.from_dlpack(mem)
    assert (taken.dtype, taken.shape) == (np.dtype("u1"), (4 * PAGE,))
    mem.grow_to(8 * PAGE)
    (taken if taken.flags.writeable else mem)[5] = 7        # before NumPy 2.1 the array is read-only
    assert mem[5] == taken[5] == 7
    assert mem.__dlpack_device__() == taken.__dlpack_device__()
    with pytest.raises(BufferError, match=r"1 exported buffer"):
        mem.close()
    del taken
    mem.close()
    with pytest.raises(ValueError, match=r"closed"):
        mem.__dlpack__()


@requires("numpy")
def test_dlpack_of_a_read_only_memory_gives_no_writable_array(mem):
    mem.protect(0, 4 * PAGE, "r")
    try:
        taken = np.from_dlpack(mem)
    except BufferError:             # a NumPy that cannot pass on that an array is read-only
        assert mem.info().exports == 0
    else:
        assert not taken.flags.writeable


@requires("numpy")
@pytest.mark.parametrize(("shape", "expected"), [
    (None, (25,)), (-1, (25,)), (3, (3,)), ((), ()), ((2, 3), (2, 3)), ([2, 3], (2, 3)), ((-1, 4), (6, 4)), (0, (0,)),
    ((5, 0), (5, 0)), ((3, -1, 2), (3, 4, 2)), ((-1,), (25,))])
def test_an_array_has_the_shape_that_was_asked_for_or_all_whole_elements(shape, expected):
    with linmem.create(103) as mem:
        assert mem.array("f4", 0, shape).shape == expected
        assert mem.array(("f4", (2, 2)), 3).shape == (6, 2, 2)
        assert mem.array("f4", 103).shape == mem.array("f4", 100).shape == (0,)
    with linmem.create(0) as mem:
        assert mem.array("f4").shape == (0,)


@requires("numpy", "maps")
def test_an_array_keeps_the_memory_open_and_its_pages_mapped():
    before = support.live_bytes()
    mem = linmem.create(PAGE, reserve=1 << 30)
    array = mem.array("M8[s]", 8, (2, 3))
    end = array
    while isinstance(end, np.ndarray):
        end = end.base
    assert isinstance(end, memoryview)
    assert end.obj is mem
    part = array[1:, ::2].T
    del array, end
    with pytest.raises(BufferError, match="1 exported buffer"):
        mem.close()
    del mem
    part[0, 0] = 5
    assert support.live_bytes() > before
    del part
    gc.collect()
    assert support.live_bytes() == before


# -- `in` ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 10, 4 * PAGE])
@given(data=st.data())
def test_in_finds_the_same_as_bytes(size, data):
    held = data.draw(st.binary(min_size=min(size, 40), max_size=min(size, 40))).ljust(size, b"a")
    with linmem.create(size) as mem:
        mem.write(0, held)
        start = data.draw(st.integers(0, size))
        there = held[start:start + data.draw(st.integers(0, 20))]
        other = data.draw(st.binary(max_size=4) | st.integers(0, 255))
        for item in (there, bytearray(there), memoryview(there), b"", other, held, held + b"x", ord("b")):
            assert (item in mem) == (item in held)


def test_in_looks_across_the_parts_that_it_copies():
    with linmem.create((3 << 20) + 5) as mem:
        for at in (0, (1 << 20) - 3, (1 << 20) - 1, 1 << 20, (2 << 20) - 2, (3 << 20) - 1, (3 << 20) + 1):
            mem.write(at, b"here")
            assert b"here" in mem
            assert b"\0her" in mem or at == 0
            assert ord("h") in mem
            mem.write(at, bytes(4))
            assert b"here" not in mem
        long = b"a" + bytes(1 << 20) + b"b"
        mem.write((3 << 20) + 5 - len(long), long)
        assert long in mem
        assert long[:-1] + b"c" not in mem
        assert mem in mem


def test_in_ends_also_where_a_naive_search_would_not():
    with linmem.create(8 << 20) as mem:
        mem[:] = b"a" * (8 << 20)
        needle = b"a" * (1 << 18) + b"b" + b"a" * (1 << 18)     # a naive search would take 2**41 steps
        assert needle not in mem


@pytest.mark.parametrize("item", [256, -1, 2**70])
def test_in_refuses_a_number_that_is_not_a_byte(mem, item):
    with pytest.raises(ValueError, match=r"^a byte must be in 0 \.\. 255"):
        item in mem  # noqa: B015


@pytest.mark.parametrize("item", ["a", None, 1.5, [1], object()])
def test_in_refuses_an_object_that_is_not_a_buffer(mem, item):
    with pytest.raises(TypeError, match=r"must be a contiguous buffer of bytes"):
        item in mem  # noqa: B015


@requires("interrupts")
def test_in_lets_an_interrupt_through():
    assert support.answer("""
        import linmem, signal
        def stop(*_):
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, stop)
        found = "not yet"
        with linmem.create(1 << 29) as mem:
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.01)      # inside the `try`, because the signal may come early
                found = b"x" in mem
                signal.pause()          # waits for the signal if the search ends first
            except KeyboardInterrupt:
                print(found)
        """) == "not yet"


def test_a_slice_with_a_step_takes_the_same_values_as_bytearray(mem):
    model = bytearray(mem)
    for key in (slice(None, None, -1), slice(5, 0, -2), slice(0, 100, 7), slice(-(2**70), None, -1), slice(9, 3, 2),
                slice(-1, None, -5), slice(3, 3, -1), slice(3, None, 2**64), slice(3, None, -(10**30))):
        data = bytes(i % 250 for i in range(len(model[key])))
        model[key] = data
        mem[key] = data
        assert mem[:] == model
        assert mem[key] == data


def test_a_growth_while_a_slice_is_assigned_changes_neither_the_slice_nor_its_length(mem):
    class Step:
        def __index__(self):
            mem.grow_to(6 * PAGE)
            return 2

    mem[::Step()] = b"\x07" * (2 * PAGE)
    assert mem.read(0, 6 * PAGE) == b"\x07\0" * (2 * PAGE) + bytes(2 * PAGE)
