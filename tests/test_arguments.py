"""Bad input: linmem refuses it by the argument's name, with any type, and leaks no memory."""

import copy
import inspect
import pickle
import re
import types
from functools import partial

import pytest
from support import HALF_CREATOR, PAGE, WORD, answer, build_extension, load_extension, requires

import linmem
from linmem._core.bridge import Offer
from linmem._core.memory import NativeCreator

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
def test_an_invalid_size_is_refused_by_the_name_of_the_argument(name, bad):
    with pytest.raises(REFUSED, match=rf"^{name} must be "):
        SIZE_ARGUMENTS[name](bad)


@pytest.mark.parametrize("bad", [*NO_SIZE, Negative()], ids=lambda bad: f"{type(bad).__name__}")
@pytest.mark.parametrize("name", MEMORY_ARGUMENTS)
def test_an_invalid_size_leaves_a_memory_unchanged(name, bad):
    with linmem.create(PAGE) as mem:
        before = mem.info()
        with pytest.raises(REFUSED, match=rf"^{name.split()[0]} must be "):
            MEMORY_ARGUMENTS[name](mem, bad)
        assert mem.info() == before


@pytest.mark.parametrize("name", ["minimum", "guard_size_in_bytes", "new_size", "offset of read", "size of read"])
def test_none_as_a_size_is_refused_if_it_has_no_meaning(name):
    with linmem.create(PAGE) as mem:
        calls = {**SIZE_ARGUMENTS, **{key: partial(call, mem) for key, call in MEMORY_ARGUMENTS.items()}}
        with pytest.raises(TypeError, match=f"^{name.split()[0]} must be .*NoneType"):
            calls[name](None)


IMAGE = linmem.Image.from_bytes(b"abc")
OTHER_ARGUMENTS = {
    "minimum": lambda bad: IMAGE.new_memory(minimum=bad),
    "maximum": lambda bad: IMAGE.new_memory(bad),
    "offset": lambda bad: linmem.Image.from_bytes(b"abc", bad),
    "offset of from_pieces": lambda bad: linmem.Image.from_pieces([], 1, bad),
    "size of from_pieces": lambda bad: linmem.Image.from_pieces([], bad),
    "offset of a piece": lambda bad: linmem.Image.from_pieces([(bad, b"a")], 1),
    "offset of from_fd": lambda bad: linmem.Image.from_fd(-1, 1, bad),
    "size of from_fd": lambda bad: linmem.Image.from_fd(-1, bad),
    "position": lambda bad: linmem.Image.from_fd(-1, 1, position=bad),
    "runs": lambda bad: linmem.Image.from_fd(-1, 1, runs=[(0, bad)]),
    "base_size": lambda bad: linmem.Delta("0" * 64, bad, 0, [], [], b""),
    "size": lambda bad: linmem.Delta("0" * 64, 0, bad, [], [], b""),
    "ranges": lambda bad: linmem.Delta("0" * 64, 0, 1, [(bad, 1)], [], b"a"),
    "zeros": lambda bad: linmem.Delta("0" * 64, 0, 1, [], [(0, bad)], b""),
    "offset of a delta": lambda bad: linmem.Delta("0" * 64, 0, 1, [], [], b"", None, bad),
    "keep_resident": lambda bad: linmem.PoolingCreator(keep_resident=bad),
    "slots": lambda bad: linmem.PoolingCreator(slots=bad),
}


@pytest.mark.parametrize("name", [*SIZE_ARGUMENTS, *MEMORY_ARGUMENTS, *OTHER_ARGUMENTS])
def test_the_bound_in_the_refusal_of_a_huge_number_is_the_true_bound(name):
    with linmem.create(PAGE) as mem:
        calls = {**SIZE_ARGUMENTS, **OTHER_ARGUMENTS,
                 **{key: partial(call, mem) for key, call in MEMORY_ARGUMENTS.items()}}
        with pytest.raises(OverflowError, match=rf"^{name.split()[0]} must be .*, got {WORD}$") as refused:
            calls[name](WORD)
        power, less = re.search(r"2\*\*(\d+)( - 1)?|$", str(refused.value)).groups()
        if power == "64":
            calls[name](WORD - 1 - bool(less))
        elif power:
            with pytest.raises((*REFUSED, MemoryError), match=r" must "):
                calls[name](2**int(power))
        else:
            assert re.search(r"within (byte_size\(\)|the image|1 bytes|the memory's 1 bytes)", str(refused.value))
            with pytest.raises((*REFUSED, OSError)):
                calls[name](WORD - 1)


def test_a_size_of_no_byte_is_refused_with_the_bound_that_holds():
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"^size must be >= 1, got {bad}$"):
            linmem.Image.from_fd(0, bad)


COUNT_ARGUMENTS = {
    "slots": lambda bad: linmem.PoolingCreator(slots=bad),
    "max_unused_warm": lambda bad: linmem.PoolingCreator(max_unused_warm=bad),
    "n": lambda bad: linmem.PoolingCreator().warm(bad, TYPE),
    "frames": lambda bad: linmem.TrackingCreator(linmem.MmapCreator(), frames=bad),
    "history": lambda bad: linmem.StatisticsCreator(linmem.MmapCreator(), bad),
    "timeline": lambda bad: linmem.StatisticsCreator(linmem.MmapCreator(), 4, bad),
    "count": lambda bad: linmem.create(PAGE).view("B", 0, bad),
}


@pytest.mark.parametrize("name", COUNT_ARGUMENTS)
def test_an_invalid_count_is_refused_as_not_an_integer_and_not_as_a_number_of_bytes(name):
    for bad in NO_SIZE:
        with pytest.raises(REFUSED, match=rf"^{name} must be (?!.*number of bytes)"):
            COUNT_ARGUMENTS[name](bad)


@pytest.mark.parametrize("huge", [2**63, 2**63 - 1, WORD - 1, WORD - PAGE])
@pytest.mark.parametrize("name", ["minimum", "reserve", "guard"])
def test_a_size_beyond_every_address_is_refused_by_name(name, huge):
    with pytest.raises((OverflowError, ValueError), match=rf"^{name} must .* {huge}"):
        linmem.create(**{"minimum": 0, name: huge})


@pytest.mark.parametrize("name", ["minimum", "reserve"])
def test_the_refusal_of_a_size_beyond_the_address_bits_names_these_bits(name):
    with pytest.raises(linmem.PageError, match=r"reserve of \d+ bytes .* user addresses have \d+ bits") as caught:
        linmem.create(**{"minimum": 0, name: 2**60})
    assert caught.value.call == "reserve"
    assert caught.value.size >= 2**60


def test_a_minimum_above_the_maximum_is_refused():
    with pytest.raises(ValueError, match=r"minimum must be <= maximum \(5\), got 6"):
        linmem.create(6, 5)


def test_a_guard_that_is_not_a_multiple_of_the_host_page_is_refused():
    with pytest.raises(ValueError, match=rf"guard must be a multiple of the host page \({PAGE}\), got {PAGE + 1}"):
        linmem.create(1, guard=PAGE + 1)


@pytest.mark.parametrize("ty", [None, 5, "memory", object(), types.SimpleNamespace(page_size=0),
                                types.SimpleNamespace(page_size=0, is_64=False, is_shared=False),
                                types.SimpleNamespace(page_size=-1, is_64=False, is_shared=False),
                                types.SimpleNamespace(page_size="1", is_64=False, is_shared=False)])
def test_an_object_that_is_not_a_memory_type_is_refused(ty):
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
def test_an_object_that_is_not_contiguous_bytes_cannot_be_written(data):
    with linmem.create(PAGE) as mem:
        with pytest.raises(TypeError, match=r"^data must be a contiguous buffer"):
            mem.write(0, data)
        with pytest.raises(TypeError, match=r"^data must be a contiguous buffer"):
            mem[0:4] = data
        assert mem.info().exports == 0


@pytest.mark.parametrize("format", [None, 5, [], {}, object, str, bytes, b"d", 1.0])
def test_an_invalid_element_type_is_refused_without_numpy(format):
    # The child does not import NumPy.
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
    # In a child: an element of zero bytes once caused a division by zero, and an object was once used as an address.
    assert answer(f"""
        import linmem, numpy
        with linmem.create(64) as mem:
            try:
                mem.view(numpy.dtype({spelling}))
            except ValueError as error:
                print(error)
        """).startswith("format must be a plain element type")


@pytest.mark.parametrize("format", [None, 5, object()])
def test_objects_from_which_numpy_would_guess_a_type_are_refused(format):
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
def test_an_object_that_is_not_an_index_is_a_type_error(index):
    with linmem.create(PAGE) as mem, pytest.raises(TypeError, match="indexed by an integer or a slice"):
        mem[index]


@pytest.mark.parametrize(("byte", "kind"), [(-1, ValueError), (256, ValueError), (2**70, ValueError),
                                            (1.0, TypeError), ("a", TypeError), (None, TypeError)])
def test_a_value_that_is_not_a_byte_cannot_be_stored(byte, kind):
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
def test_an_unknown_kind_is_refused_with_a_list_of_the_known_kinds(kind):
    with pytest.raises(ValueError, match="kind must be one of 'mmap', "):
        linmem.creator(kind)


# -- objects with an unusual truth value ---------------------------------------------------------------------------


class Quota(linmem.MemoryCreator):
    """A creator whose truth value is false, and that refuses every request."""

    def __bool__(self):
        return False

    def __len__(self):
        return 0

    def new_memory(self, *_):
        raise linmem.GrowError("the quota is used up")


@pytest.mark.parametrize("make", [
    lambda: linmem.create(1, creator=Quota()), lambda: linmem.PythonCreator(Quota()).create(1),
    *(partial(lambda kind, options: linmem.creator(kind, upstream=Quota(), **options).create(1), kind, options)
      for kind, options in (("statistics", {}), ("limiting", {"limit_bytes": 1 << 20}), ("pool", {}),
                            ("tracking", {})))])
def test_a_creator_with_a_false_truth_value_is_used(make):
    with pytest.raises(linmem.GrowError, match="the quota is used up"):
        make()


@pytest.mark.parametrize("kind", ["statistics", "limiting", "pool", "tracking", "callback"])
@pytest.mark.parametrize("bad", [0, False, "", [], (), 0.0, b"", linmem.MmapCreator, Quota, NativeCreator])
def test_an_upstream_that_is_not_a_creator_is_refused_by_name(kind, bad):
    options = {"limit_bytes": 1} if kind == "limiting" else {}
    with pytest.raises(TypeError, match=r"^upstream must be a MemoryCreator, got"):
        linmem.creator(kind, upstream=bad, **options)
    with pytest.raises(TypeError, match=r"^upstream must be a NativeCreator \(a PythonCreator for .*\), got"):
        {"statistics": linmem.StatisticsCreator, "limiting": linmem.LimitingCreator, "tracking": linmem.TrackingCreator,
         "pool": linmem.PoolingCreator, "callback": linmem.CallbackCreator}[kind](bad, **options)


@pytest.mark.parametrize("kind", ["statistics", "limiting", "pool", "tracking", "callback"])
def test_an_upstream_of_none_is_the_default(kind):
    options = {"limit_bytes": 1 << 20} if kind == "limiting" else {}
    assert isinstance(linmem.creator(kind, upstream=None, **options).upstream, linmem.MmapCreator)


@pytest.mark.parametrize("make", [lambda of: linmem.create(1, creator=of), lambda of: linmem.PythonCreator(of),
                                  lambda of: linmem.Image.from_bytes(b"x").new_memory(creator=of)])
def test_a_class_in_place_of_a_creator_is_refused_as_one_that_was_not_called(make):
    for of in (linmem.MmapCreator, Quota):
        with pytest.raises(TypeError, match=rf"^creator must be .*, got the class {of.__name__} itself: call it"):
            make(of)


@pytest.mark.parametrize("thing", [linmem.Image.from_bytes(b""), linmem.MmapCreator(), linmem.PoolingCreator()])
def test_every_object_is_true(thing):
    assert thing


def test_a_memory_of_any_size_open_or_closed_is_true():
    with linmem.create(0) as mem:
        assert bool(mem) is True
        assert len(mem) == 0
    assert bool(mem) is True


# -- integers ------------------------------------------------------------------------------------------------------


class Int:
    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


def test_a_memory_type_takes_integers_of_any_type_and_keeps_ints():
    ty = linmem.MemoryType(Int(1), Int(3), page_size=Int(1))
    assert ty == linmem.MemoryType(1, 3, page_size=1)
    assert hash(ty) == hash(linmem.MemoryType(1, 3, page_size=1))
    assert {type(value) for value in (ty.minimum, ty.maximum, ty.page_size)} == {int}
    assert type(linmem.MemoryType(True).minimum) is int
    assert pickle.loads(pickle.dumps(ty)) == ty


@requires("numpy")
@pytest.mark.parametrize("kind", ["int8", "uint8", "int64", "uint64"])
def test_every_integer_argument_takes_numpys_integers(kind):
    import numpy as np

    one = np.dtype(kind).type(1)
    assert type(linmem.MemoryType(one, one).maximum) is int
    with linmem.create(one, one, reserve=one, guard=one - one) as mem:
        assert mem.read(one - one, one) == bytes(mem[0:one]) == b"\0"
        assert mem.write(one - one, b"a") == 1
        mem[one - one] = one
        assert mem[one - one] == 1
        assert one in mem
        assert len(mem.view("B", one, one - one)) == 0
        assert mem.array("u1", one - one, one).shape == (1,)
    assert linmem.LimitingCreator(linmem.MmapCreator(), one).limit_bytes == 1
    assert linmem.PoolingCreator(slots=one, keep_resident=one, max_unused_warm=one).stats()["slots"] == 1
    assert linmem.Image.from_bytes(b"a", one).offset == 1
    assert linmem.Delta("0" * 64, one, one, [(one - one, one)], [], b"x").ranges == ((0, 1),)


@pytest.mark.parametrize(("name", "bound"), [("maximum", r"2\*\*64 - 1"), ("reserve", r"2\*\*63, in whole .*")])
def test_the_largest_word_is_not_taken_for_none(name, bound):
    for make in (lambda **size: linmem.create(0, **size), lambda **size: linmem.PoolingCreator().create(0, **size),
                 lambda **size: linmem.Image.from_bytes(b"").new_memory(**size)):
        with pytest.raises(OverflowError, match=rf"^{name} must be below {bound}, got {WORD - 1}$"):
            make(**{name: WORD - 1})
    with linmem.create(0, WORD - 2) as mem:
        assert mem.maximum_byte_size() == WORD - 2


@pytest.mark.parametrize("creator", [linmem.MmapCreator(), linmem.PoolingCreator()])
def test_the_largest_word_is_not_taken_for_none_by_the_trait(creator):
    for at, name, bound in ((1, "maximum", r"2\*\*64 - 1"), (2, "reserved_size_in_bytes", r"2\*\*63, in whole .*")):
        sizes = [0, None, None, 0]
        sizes[at] = WORD - 1
        with pytest.raises(OverflowError, match=rf"^{name} must be below {bound}, got {WORD - 1}$"):
            creator.new_memory(TYPE, *sizes)


def test_a_budget_of_2_to_the_63_bytes_or_more_is_refused():
    assert linmem.LimitingCreator(linmem.MmapCreator(), WORD // 2 - 1).limit_bytes == WORD // 2 - 1
    with pytest.raises(OverflowError, match=rf"^limit_bytes must be below 2\*\*63, got {WORD // 2}$"):
        linmem.LimitingCreator(linmem.MmapCreator(), WORD // 2)


@pytest.mark.parametrize("pages", [WORD - 1, WORD, 1 << 100])
def test_a_type_larger_than_the_address_space_cannot_be_warmed(pages):
    for ty in (linmem.MemoryType(1, pages, page_size=1, is_64=True), linmem.MemoryType(pages, is_64=True)):
        with pytest.raises(OverflowError, match=r"^ty\.(minimum|maximum) \* ty\.page_size must be below 2\*\*64 - 1"):
            linmem.PoolingCreator().warm(1, ty)


def test_a_type_of_bytes_without_a_maximum_can_be_warmed():
    pool = linmem.PoolingCreator()
    assert pool.warm(1, linmem.MemoryType(1, page_size=1, is_64=True), reserved_size_in_bytes=PAGE,
                     guard_size_in_bytes=PAGE) == 1


# -- error texts of constructors, in the caller's terms --------------------------------------------------------------


@pytest.mark.parametrize(("make", "text"), [
    (lambda: linmem.creator("limiting"), r"LimitingCreator\(\) needs the argument 'limit_bytes'"),
    (lambda: linmem.creator("mmap", option=1),
     r"MmapCreator\(\) has no argument 'option'; its arguments are: prefault, huge_pages"),
    (lambda: linmem.creator("mmap", upstream=None), r"MmapCreator\(\) has no argument 'upstream'"),
    (lambda: linmem.creator("pool", option=1), r"PoolingCreator\(\) has no argument 'option'; .* upstream, slots, "),
    (lambda: linmem.MmapCreator(True), r"MmapCreator\(\) takes no arguments without a name, got 1"),
    (lambda: linmem.PoolingCreator(None, 5), r"PoolingCreator\(\) takes at most 1 arguments without a name, got 2"),
    (lambda: linmem.LimitingCreator(), r"LimitingCreator\(\) needs the argument 'upstream'"),
    (lambda: linmem.StatisticsCreator(history=5), r"StatisticsCreator\(\) needs the argument 'upstream'"),
    (lambda: linmem.StatisticsCreator(linmem.MmapCreator(), upstream=linmem.MmapCreator()),
     r"StatisticsCreator\(\) got the argument 'upstream' twice"),
    (lambda: linmem.PythonCreator(), r"PythonCreator\(\) needs the argument 'creator'"),
    (lambda: linmem.PoolingCreator(image=5), r"image must be an Image, got int"),
    (lambda: linmem.Memory(5), r"a Memory is made by a creator"), (lambda: linmem.Memory(a=5), r"a Memory is made by"),
    (lambda: linmem.Image(b"x", offset=5), r"an Image is made by"), (lambda: Offer(), r"Offer\(\) needs the argument"),
])
def test_a_constructor_names_a_missing_or_unexpected_argument(make, text):
    with pytest.raises(TypeError, match=f"^{text}") as caught:
        make()
    assert "__" not in str(caught.value)


@pytest.mark.parametrize("make", [
    linmem.MmapCreator, linmem.PoolingCreator, lambda: linmem.creator("statistics"),
    lambda: linmem.creator("tracking"), lambda: linmem.creator("tracking").scope("name"),
    lambda: linmem.creator("limiting", limit_bytes=1), lambda: linmem.PythonCreator(Quota()), lambda: Offer([]),
    lambda: linmem.create(8), lambda: linmem.create(8).view(">d").obj])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps, partial(pickle.dumps, protocol=2)])
def test_objects_of_this_process_refuse_to_be_pickled_or_copied(make, duplicate):
    with pytest.raises(TypeError, match="cannot be pickled or copied: ") as caught:
        duplicate(make())
    assert "__" not in str(caught.value)


def test_a_native_creator_cannot_be_extended_where_its_methods_would_not_be_called():
    class Extended(NativeCreator):
        def new_memory(self, *_):
            raise AssertionError("nobody calls this")

    with pytest.raises(TypeError, match=r"^Extended cannot extend a native creator in Python.*linmem\.MemoryCreator"):
        Extended()
    with pytest.raises(TypeError, match=r"linmem\.creator\(kind\)"):
        NativeCreator()
    for final in (linmem.MmapCreator, linmem.PoolingCreator, linmem.LimitingCreator, linmem.StatisticsCreator,
                  linmem.CallbackCreator, linmem.RoutingCreator, linmem.PythonCreator):
        with pytest.raises(TypeError, match="not an acceptable base type"):
            type("Extended", (final,), {})


@requires("compiler")
def test_a_creator_written_in_cython_can_be_extended_in_cython_and_not_in_python(tmp_path):
    build_extension(tmp_path, "extended", "# cython: language_level=3\ncimport linmem\n" + HALF_CREATOR)
    half = load_extension(tmp_path, "extended").Half

    class Extended(half):
        pass

    assert len(half(linmem.MmapCreator()).create(10)) == 5
    with pytest.raises(TypeError, match=r"^Extended cannot extend a native creator in Python"):
        Extended(linmem.MmapCreator())


@requires("docstrings")
def test_the_factory_names_every_option_of_every_kind():
    from linmem import creators

    said = inspect.getdoc(linmem.creator)
    options = {"mmap": ["prefault", "huge_pages"], "limiting": ["upstream", "limit_bytes"],
               "statistics": ["upstream", "history", "timeline"], "tracking": ["upstream", "frames"],
               "callback": ["upstream", "on_made", "on_grow", "on_refused", "on_dropped", "limit_each",
                            "limit_growths"],
               "routing": ["rule"], "file": ["path"], "shared": ["shm_name", "attach"],
               "pool": ["upstream", "slots", "keep_resident", "max_unused_warm", "max_resident", "max_reserved",
                        "idle_seconds", "max_reset_seconds", "reset", "when_full", "timeout", "check", "image"]}
    assert set(options) == set(creators.KINDS)
    for kind, names in options.items():
        paragraph = said[said.index(f'"{kind}"'):].partition('\n    "')[0]
        for name in names:
            assert f"`{name}`" in paragraph, (kind, name)
        with pytest.raises(TypeError) as caught:
            linmem.creator(kind, option=1)
        assert sorted(str(caught.value).partition("are: ")[2].split(", ")) == sorted([*names, "name"])


# -- two faults in one call -----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("call", "error", "named"), [
    (lambda mem: mem.discard("x"), TypeError, "offset"),
    (lambda mem: mem.discard(0, "x"), TypeError, "size"),
    (lambda mem: mem.prefault(-1), ValueError, "offset"),
    (lambda mem: mem.protect(0, PAGE, "x"), ValueError, "access"),
    (lambda mem: mem.read("x", 1), TypeError, "offset"),
    (lambda mem: mem.write("x", b""), TypeError, "offset"),
    (lambda mem: mem.__setitem__(None, "x"), TypeError, "indexed by"),
    (lambda mem: mem.__setitem__(0, "x"), TypeError, "a byte"),
])
def test_a_wrong_argument_is_named_before_a_closed_memory(call, error, named):
    closed = linmem.create(PAGE)
    closed.close()
    with pytest.raises(error, match=named):
        call(closed)


# -- closed buffers, and shapes --------------------------------------------------------------------------------------


def closed_buffers():
    mem = linmem.create(1)
    mem.close()
    view = memoryview(b"1")
    view.release()
    return {"a closed memory": mem, "a released memoryview": view}


TAKE_BYTES = {
    "write": lambda mem, data: mem.write(0, data), "slice": lambda mem, data: mem.__setitem__(slice(0, 1), data),
    "slice with a step": lambda mem, data: mem.__setitem__(slice(0, 2, 2), data), "in": lambda mem, data: data in mem,
    "Image.from_bytes": lambda mem, data: linmem.Image.from_bytes(data),
    "Image.from_pieces": lambda mem, data: linmem.Image.from_pieces([(0, data)], 1),
    "Delta": lambda mem, data: linmem.Delta("0" * 64, 1, 1, [(0, 1)], [], data)}


@pytest.mark.parametrize("kind", closed_buffers())
@pytest.mark.parametrize("name", TAKE_BYTES)
def test_a_closed_buffer_is_refused_as_closed_and_not_as_scattered(name, kind):
    data = closed_buffers()[kind]
    with linmem.create(PAGE) as mem:
        with pytest.raises(ValueError, match=r"^(data|what is looked for) must be a buffer that can be read, got"
                                             r" (Memory: the memory is closed|memoryview: .*released)"):
            TAKE_BYTES[name](mem, data)
        assert not any(mem[:])
        assert mem.info().exports == 0


@requires("numpy")
@pytest.mark.parametrize("name", TAKE_BYTES)
def test_an_array_that_is_not_contiguous_is_refused_as_scattered(name):
    import numpy as np

    with linmem.create(PAGE) as mem:
        for data in (np.ones(4, "u1")[::2], np.asfortranarray(np.ones((2, 3), "u1")), np.ones((2, 2), "u1")[:, :1]):
            with pytest.raises(TypeError, match=r"must be a contiguous buffer of bytes, got ndarray"):
                TAKE_BYTES[name](mem, data)
        assert not any(mem[:])


@requires("numpy")
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 2), (), (1,), (1, 1), (2, 3), (2, 1, 4)])
@pytest.mark.parametrize("dtype", ["u1", ">f8", "M8[s]"])
def test_a_contiguous_array_of_any_shape_is_its_bytes(shape, dtype):
    import numpy as np

    data = np.ones(shape, dtype)
    n = data.nbytes
    with linmem.create(PAGE) as mem:
        assert mem.write(3, data) == n
        assert mem[3:3 + n] == data.tobytes()
        mem[:] = bytes(PAGE)
        mem[5:5 + n] = data
        assert mem[5:5 + n] == data.tobytes()
        mem[:] = bytes(PAGE)
        mem[7:7 + 2 * n:2] = data
        assert mem[7:7 + 2 * n:2] == data.tobytes()
        assert sum(mem[:]) == sum(data.tobytes())
        mem.write(9, data)
        if dtype != "M8[s]":        # Python's memoryview does not support this dtype
            assert data in mem
            assert linmem.Delta("0" * 64, n, n, [(0, n)] if n else [], [], data).data == data.tobytes()
        assert bytes(linmem.Image.from_bytes(data)) == data.tobytes()


# -- arrays of any dtype ---------------------------------------------------------------------------------------------


@requires("numpy")
@pytest.mark.parametrize("dtype", [object, "O", [("a", "u1"), ("b", "O")], "V0", "S0", []])
def test_an_array_of_objects_or_of_empty_elements_is_refused(dtype):
    import numpy as np

    with linmem.create(PAGE) as mem:
        with pytest.raises(ValueError, match=r"^dtype must be that of plain bytes, got .*which (holds Py|has no size)"):
            mem.array(dtype)
        if hasattr(np.dtypes, "StringDType") if hasattr(np, "dtypes") else False:
            with pytest.raises(ValueError, match="holds Python objects"):
                mem.array(np.dtypes.StringDType())
        assert mem.info().exports == 0


@requires("numpy")
@pytest.mark.parametrize("dtype", [None, 5, "no dtype", object()])
def test_an_invalid_dtype_is_refused(dtype):
    with linmem.create(PAGE) as mem, pytest.raises(TypeError, match=r"^dtype must be a NumPy dtype, got"):
        mem.array(dtype)


@requires("numpy")
@pytest.mark.parametrize(("offset", "shape", "kind", "text"), [
    (PAGE + 1, None, ValueError, rf"offset must be <= byte_size\(\) \({PAGE}\), got {PAGE + 1}"),
    (-1, None, ValueError, "offset must be >= 0, got -1"), (1.5, None, TypeError, "offset must be an integer"),
    (WORD, None, OverflowError, r"offset must be within byte_size\(\), got"),
    (0, PAGE // 4 + 1, ValueError, rf"shape must hold <= {PAGE // 4} elements of 4 bytes from offset 0 in {PAGE} b"),
    (1, PAGE // 4, ValueError, rf"shape must hold <= {PAGE // 4 - 1} elements of 4 bytes from offset 1"),
    (0, (2, PAGE), ValueError, "shape must hold <= "), (0, 1 << 100, ValueError, "shape must hold <= "),
    (0, -2, ValueError, "shape must be >= -1, got -2"), (0, (2, -3), ValueError, "shape must be >= -1, got -3"),
    (0, (-1, -1), ValueError, "shape must have at most one -1"), (0, (0, -1), ValueError, "shape must have no -1"),
    (0, "2", TypeError, "shape must be an integer or a tuple of integers, got str"),
    (0, (1, 1.5), TypeError, "shape must be an integer or a tuple of integers, got float"),
    (0, (1,) * 100, ValueError, "shape must be one that NumPy takes"),
    (0, (0, 1 << 80), ValueError, "shape must be one that NumPy takes"),
])
def test_an_array_past_the_size_or_of_no_shape_is_refused_by_the_name_of_the_argument(offset, shape, kind, text):
    with linmem.create(PAGE) as mem:
        with pytest.raises(kind, match=f"^{text}"):
            mem.array("f4", offset, shape)
        assert mem.info().exports == 0


def test_an_array_without_numpy_names_the_command_that_installs_numpy():
    assert answer("""
        import linmem, sys
        sys.modules["numpy"] = None
        try:
            linmem.create(8).array("u1")
        except ImportError as error:
            print(error)
        """).startswith("Memory.array needs NumPy: pip install 'linmem[numpy]'")
