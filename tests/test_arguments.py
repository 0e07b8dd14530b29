"""Bad input: refused with the argument's name, whatever its type, and nothing is left behind."""

import types
from functools import partial

import pytest
from support import PAGE, WORD, answer, requires

import linmem

TYPE = linmem.MemoryType(0)
REFUSED = (ValueError, TypeError, OverflowError)
NO_SIZE = [float("nan"), 1.5, "16", b"16", [], object(), -1, -(2**64), WORD, 10**5000, -(10**5000)]


class Negative:
    def __index__(self):
        return -1


SIZE_ARGUMENTS = {
    "minimum": lambda bad: linmem.create(bad),
    "maximum": lambda bad: linmem.create(0, bad),
    "reserve": lambda bad: linmem.create(0, reserve=bad),
    "guard": lambda bad: linmem.create(0, guard=bad),
    "reserved_size_in_bytes": lambda bad: linmem.MmapCreator().new_memory(TYPE, 0, None, bad, 0),
    "guard_size_in_bytes": lambda bad: linmem.MmapCreator().new_memory(TYPE, 0, None, None, bad),
    "limit_bytes": lambda bad: linmem.LimitingCreator(linmem.MmapCreator(), bad),
    "history": lambda bad: linmem.StatisticsCreator(linmem.MmapCreator(), bad),
}
MEMORY_ARGUMENTS = {
    "new_size": lambda mem, bad: mem.grow_to(bad),
    "offset of view": lambda mem, bad: mem.view("B", bad),
    "count": lambda mem, bad: mem.view("B", 0, bad),
    "offset of read": lambda mem, bad: mem.read(bad, 0),
    "size of read": lambda mem, bad: mem.read(0, bad),
    "offset of write": lambda mem, bad: mem.write(bad, b""),
    "offset of protect": lambda mem, bad: mem.protect(bad, 0, "r"),
    "size of protect": lambda mem, bad: mem.protect(0, bad, "r"),
    "offset of discard": lambda mem, bad: mem.discard(bad),
    "size of discard": lambda mem, bad: mem.discard(0, bad),
    "offset of prefault": lambda mem, bad: mem.prefault(bad),
    "size of prefault": lambda mem, bad: mem.prefault(0, bad),
}


@pytest.mark.parametrize("bad", [*NO_SIZE, Negative()], ids=lambda bad: f"{type(bad).__name__}")
@pytest.mark.parametrize("name", SIZE_ARGUMENTS)
def test_what_is_no_size_is_refused_by_the_name_of_the_argument(name, bad):
    with pytest.raises(REFUSED, match=rf"^{name} must be "):
        SIZE_ARGUMENTS[name](bad)


@pytest.mark.parametrize("bad", [*NO_SIZE, Negative()], ids=lambda bad: f"{type(bad).__name__}")
@pytest.mark.parametrize("name", MEMORY_ARGUMENTS)
def test_what_is_no_size_leaves_a_memory_as_it_was(name, bad):
    with linmem.create(PAGE) as mem:
        before = mem.info()
        with pytest.raises(REFUSED, match=rf"^{name.split()[0]} must be "):
            MEMORY_ARGUMENTS[name](mem, bad)
        assert mem.info() == before


@pytest.mark.parametrize("name", ["minimum", "guard_size_in_bytes", "new_size", "offset of read", "size of read"])
def test_none_is_no_size_where_it_means_nothing(name):
    with linmem.create(PAGE) as mem:
        calls = {**SIZE_ARGUMENTS, **{key: partial(call, mem) for key, call in MEMORY_ARGUMENTS.items()}}
        with pytest.raises(TypeError, match=f"^{name.split()[0]} must be .*NoneType"):
            calls[name](None)


COUNT_ARGUMENTS = {
    "slots": lambda bad: linmem.PoolingCreator(slots=bad),
    "max_unused_warm": lambda bad: linmem.PoolingCreator(max_unused_warm=bad),
    "n": lambda bad: linmem.PoolingCreator().warm(bad, TYPE),
    "history": lambda bad: linmem.StatisticsCreator(linmem.MmapCreator(), bad),
    "count": lambda bad: linmem.create(PAGE).view("B", 0, bad),
}


@pytest.mark.parametrize("name", COUNT_ARGUMENTS)
def test_what_is_no_count_is_refused_as_no_integer_and_not_as_no_number_of_bytes(name):
    for bad in NO_SIZE:
        with pytest.raises(REFUSED, match=rf"^{name} must be (?!.*number of bytes)"):
            COUNT_ARGUMENTS[name](bad)


@pytest.mark.parametrize("huge", [2**63, 2**63 - 1, WORD - 1, WORD - PAGE])
@pytest.mark.parametrize("name", ["minimum", "reserve", "guard"])
def test_a_size_beyond_every_address_is_refused_by_name(name, huge):
    with pytest.raises((OverflowError, ValueError), match=rf"^{name} must .* {huge}"):
        linmem.create(**{"minimum": 0, name: huge})


@pytest.mark.parametrize("name", ["minimum", "reserve"])
def test_a_size_beyond_the_address_bits_is_refused_in_those_words(name):
    with pytest.raises(linmem.PageError, match=r"reserve of \d+ bytes .* user addresses have \d+ bits") as caught:
        linmem.create(**{"minimum": 0, name: 2**60})
    assert caught.value.call == "reserve"
    assert caught.value.size >= 2**60


def test_a_minimum_above_the_maximum_is_refused():
    with pytest.raises(ValueError, match=r"minimum must be <= maximum \(5\), got 6"):
        linmem.create(6, 5)


def test_a_guard_that_is_no_multiple_of_the_host_page_is_refused():
    with pytest.raises(ValueError, match=rf"guard must be a multiple of the host page \({PAGE}\), got {PAGE + 1}"):
        linmem.create(1, guard=PAGE + 1)


@pytest.mark.parametrize("ty", [None, 5, "memory", object(), types.SimpleNamespace(page_size=0),
                                types.SimpleNamespace(page_size=0, is_64=False, is_shared=False),
                                types.SimpleNamespace(page_size=-1, is_64=False, is_shared=False),
                                types.SimpleNamespace(page_size="1", is_64=False, is_shared=False)])
def test_what_is_no_memory_type_is_refused(ty):
    class Upstream:
        def new_memory(self, ty, *sizes):
            raise AssertionError("the type is checked at the door")

    with pytest.raises((TypeError, ValueError), match=r"^ty"):
        linmem.PythonCreator(Upstream()).new_memory(ty, 10, None, None, 0)


@pytest.mark.parametrize(("arguments", "name"), [
    ({"minimum": "1"}, "minimum"), ({"minimum": 1.5}, "minimum"), ({"minimum": None}, "minimum"),
    ({"minimum": -1}, "minimum"), ({"minimum": 2, "maximum": 1}, "maximum"),
    ({"minimum": 2, "maximum": "3"}, "maximum"),
    ({"minimum": 0, "page_size": 0}, "page_size"), ({"minimum": 0, "page_size": 4096}, "page_size"),
])
def test_a_memory_type_refuses_by_name(arguments, name):
    with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
        linmem.MemoryType(**arguments)


@pytest.mark.parametrize("access", ["", "w", "rwx", None, 3, [], "NONE"])
def test_an_access_that_does_not_exist_is_refused(access):
    with linmem.create(PAGE) as mem, pytest.raises(ValueError, match=r"^access must be one of 'none', 'r', 'rw'"):
        mem.protect(0, PAGE, access)


@pytest.mark.parametrize(("offset", "size", "name"), [(1, PAGE, "offset"), (0, 1, "size"), (0, PAGE - 1, "size")])
def test_protection_takes_whole_host_pages(offset, size, name):
    with linmem.create(4 * PAGE) as mem, pytest.raises(ValueError, match=f"^{name} must be a multiple"):
        mem.protect(offset, size, "r")


@pytest.mark.parametrize(("offset", "size"), [(0, 2 * PAGE), (PAGE, PAGE), (2 * PAGE, 0), (WORD - PAGE, PAGE),
                                              (PAGE, WORD - PAGE)])
def test_a_span_past_the_size_is_refused_even_where_the_sum_wraps(offset, size):
    with linmem.create(PAGE) as mem:
        for call in (lambda: mem.read(offset, size), lambda: mem.protect(offset, size, "r"),
                     lambda: mem.discard(offset, size), lambda: mem.prefault(offset, size)):
            with pytest.raises(ValueError, match=r"offset \+ size must be <= byte_size\(\)"):
                call()


@pytest.mark.parametrize("data", ["text", 5, None, [1, 2], memoryview(bytes(8))[::2]], ids=str)
def test_what_is_no_run_of_bytes_cannot_be_written(data):
    with linmem.create(PAGE) as mem:
        with pytest.raises(TypeError, match=r"^data must be a contiguous buffer"):
            mem.write(0, data)
        with pytest.raises(TypeError, match=r"^data must be a contiguous buffer"):
            mem[0:4] = data
        assert mem.info().exports == 0


@pytest.mark.parametrize("format", [None, 5, [], {}, object, str, bytes, b"d", 1.0])
def test_what_is_no_element_type_is_refused_without_numpy(format):
    # In a child, where NumPy is not imported.
    assert answer(f"""
        import linmem
        try:
            linmem.create(8).view({getattr(format, '__name__', repr(format))})
        except (TypeError, ValueError) as error:
            print(error)
        """).startswith("format must be")


@pytest.mark.parametrize("format", ["", "<", "z", "d d d z", "<f7", "O", "é", "i\0", "0d", "99999999999999999999d"])
def test_a_format_that_does_not_exist_is_refused(format):
    with linmem.create(PAGE) as mem:
        with pytest.raises(ValueError, match=r"^format must"):
            mem.view(format)
        assert mem.info().exports == 0


@requires("numpy")
@pytest.mark.parametrize("spelling", ["object", "str", "bytes", "'V0'", "[]", "[('a', object)]", "('f4', (2, 3))"])
def test_a_dtype_that_bytes_cannot_be_is_refused(spelling):
    # In a child: an element of no bytes once divided by zero, an object once was an address.
    assert answer(f"""
        import linmem, numpy
        with linmem.create(64) as mem:
            try:
                mem.view(numpy.dtype({spelling}))
            except ValueError as error:
                print(error)
        """).startswith("format must be a plain element type")


@pytest.mark.parametrize("format", [None, 5, object()])
def test_what_numpy_would_guess_a_type_from_is_refused(format):
    with linmem.create(PAGE) as mem, pytest.raises(TypeError, match=r"^format must be"):
        mem.view(format)


@pytest.mark.parametrize(("offset", "count", "name"), [(PAGE + 1, None, "offset"), (0, PAGE // 8 + 1, "count"),
                                                       (PAGE, 1, "count"), (1, PAGE // 8, "count"),
                                                       (0, 2**61, "count")])
def test_a_view_past_the_size_is_refused(offset, count, name):
    with linmem.create(PAGE) as mem:
        for format in ("d", ">d"):
            with pytest.raises(ValueError, match=f"^{name} must be <="):
                mem.view(format, offset, count)
        assert mem.info().exports == 0


@pytest.mark.parametrize("index", [PAGE, -PAGE - 1, 2**63, -(2**64)])
def test_an_index_past_the_size_is_an_index_error(index):
    with linmem.create(PAGE) as mem:
        with pytest.raises(IndexError):
            mem[index]
        with pytest.raises(IndexError):
            mem[index] = 1


@pytest.mark.parametrize("index", [None, 1.0, "0", (0, 1)])
def test_what_is_no_index_is_a_type_error(index):
    with linmem.create(PAGE) as mem, pytest.raises(TypeError, match="indexed by an integer or a slice"):
        mem[index]


@pytest.mark.parametrize(("byte", "kind"), [(-1, ValueError), (256, ValueError), (2**70, ValueError),
                                            (1.0, TypeError), ("a", TypeError), (None, TypeError)])
def test_what_is_no_byte_cannot_be_stored(byte, kind):
    with linmem.create(PAGE) as mem:
        with pytest.raises(kind, match=r"^a byte must be"):
            mem[0] = byte
        assert mem[0] == 0


def test_a_slice_cannot_be_resized_by_assignment():
    with linmem.create(PAGE) as mem:
        for data in (b"", b"12", b"1234"):
            with pytest.raises(ValueError, match="the slice has 3 bytes"):
                mem[0:3] = data
        assert mem.info().exports == 0


@pytest.mark.parametrize("make", [lambda: linmem.MmapCreator(1), lambda: linmem.MmapCreator(option=1),
                                  lambda: linmem.creator("mmap", option=1), lambda: linmem.creator("limiting"),
                                  lambda: linmem.creator("limiting", limit_bytes=1, option=1),
                                  lambda: linmem.creator("statistics", option=1),
                                  lambda: linmem.LimitingCreator(None, 1), lambda: linmem.StatisticsCreator(5),
                                  lambda: linmem.PythonCreator(5), lambda: linmem.create(1, creator=5),
                                  lambda: linmem.Memory()])
def test_an_option_that_does_not_exist_or_no_creator_is_a_type_error(make):
    with pytest.raises(TypeError):
        make()


@pytest.mark.parametrize("kind", ["", "pools", None, 5, []])
def test_a_kind_that_does_not_exist_is_refused_with_those_that_do(kind):
    with pytest.raises(ValueError, match="kind must be one of 'mmap', "):
        linmem.creator(kind)
