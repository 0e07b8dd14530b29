"""Images: their content, equality, and the differences between images. These tests do not ask the OS."""

import hashlib
import random
import struct
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import PAGE, answer, image_kinds, requires, round_up

import linmem
from linmem import Delta, Image
from linmem._os import pages

ENOMEM = 12


@pytest.fixture(params=image_kinds())
def kind(request):
    before = pages.choose_image(request.param)
    yield request.param
    pages.choose_image(before)


# -- content of an image ---------------------------------------------------------------------------

@pytest.mark.parametrize("offset", [0, 1, PAGE - 1, PAGE, 3 * PAGE + 17])
@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 3 * PAGE, 5 * PAGE + 1])
def test_an_image_of_bytes_holds_these_bytes_at_the_given_offset(kind, offset, size):
    data = random.Random(size).randbytes(size)
    img = Image.from_bytes(data, offset)
    assert (img.offset, img.size, len(img)) == (offset, size, size)
    assert bytes(img) == data
    with img.new_memory() as mem:
        assert len(mem) == offset + size
        assert mem[:offset] == bytes(offset)
        assert mem[offset:] == data


def test_the_buffer_of_an_image_is_read_only():
    view = memoryview(Image.from_bytes(b"abc"))
    assert view.readonly
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1


def test_an_image_outlives_its_source_and_its_name(kind):
    data = bytearray(b"x" * 10000)
    img = Image.from_bytes(data)
    data[:] = bytes(10000)
    view = memoryview(img)
    mem = img.new_memory()
    del img
    assert view.tobytes() == b"x" * 10000 == mem[:]


def test_an_image_of_zero_bytes_is_valid(kind):
    img = Image.from_bytes(b"")
    assert (bytes(img), img.runs(), img.info().kind) == (b"", [], "none")
    assert img.new_memory()[:] == b""
    assert linmem.create(0).snapshot() == img
    assert Image.from_bytes(b"", 5).new_memory()[:] == bytes(5)


def test_only_blocks_that_are_not_zero_are_stored():
    data = bytearray(1 << 20)
    data[5000] = 1
    data[700000:700010] = b"0123456789"
    img = Image.from_bytes(data, 100)
    assert img.runs() == [(4096, 4096), (700100 // 4096 * 4096, 4096)]
    assert img.info().stored == 8192
    assert bytes(img) == data


def test_pieces_are_put_together_with_zeros_between_them(kind):
    img = Image.from_pieces([(10, b"abc"), (13, b"d"), (5000, bytes(5000)), (20000, b"x" * 9000)], 40000, 7)
    want = bytearray(40007)
    want[10:14] = b"abcd"
    want[20000:29000] = b"x" * 9000
    assert bytes(img) == want[7:]
    assert img == Image.from_bytes(want[7:], 7)


@pytest.mark.parametrize(("pieces", "size", "offset"), [
    ([(5, b"abc"), (7, b"x")], 100, 0), ([(50, b"a"), (5, b"b")], 100, 0), ([(99, b"ab")], 100, 0),
    ([(4, b"a")], 100, 5), ([(200, b"")], 100, 5)])
def test_pieces_that_overlap_or_reach_beyond_are_refused(pieces, size, offset):
    with pytest.raises(ValueError, match="pieces must be in order"):
        Image.from_pieces(pieces, size, offset)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3 * PAGE), st.lists(st.tuples(st.integers(0, 3 * PAGE), st.binary(max_size=200)), max_size=12))
def test_any_pieces_make_the_bytes_that_a_bytearray_would_hold(offset, gaps):
    at, pieces = offset, []
    for gap, data in gaps:
        pieces.append((at + gap, data))
        at += gap + len(data)
    want = bytearray(at)
    for where, data in pieces:
        want[where:where + len(data)] = data
    img = Image.from_pieces(pieces, at - offset, offset)
    assert bytes(img) == want[offset:]
    for where, size in img.runs():
        assert where % 4096 == size % 4096 == 0
        for block in range(where, where + size, 4096):
            assert any(want[block:block + 4096])
    assert sum(size for _, size in img.runs()) == 4096 * sum(
        any(want[block:block + 4096]) for block in range(0, len(want), 4096))


@pytest.mark.parametrize("make", [
    lambda: Image(), lambda: Image.from_bytes("text"), lambda: Image.from_bytes(5), lambda: Image.from_bytes(b"", "1"),
    lambda: Image.from_bytes(memoryview(b"abcd")[::2]), lambda: Image.from_bytes(b"").new_memory(creator=5),
    lambda: Image.from_bytes(b"").diff(5), lambda: Image.from_bytes(b"").apply(5),
    lambda: linmem.create(1).restore(b""), lambda: linmem.create(1).dirty_pages(b""),
    lambda: linmem.create(1).apply(b""), lambda: linmem.creator("pool", image=b""),
    lambda: linmem.MmapCreator().create(1, image=b"")])
def test_an_object_that_is_not_an_image_is_a_type_error(make):
    with pytest.raises(TypeError):
        make()


@pytest.mark.parametrize(("offset", "error"), [(-1, ValueError), (2**64, OverflowError), (2**64 - 2, OverflowError),
                                               (2**63, OverflowError)])
def test_an_offset_that_cannot_be_is_refused_by_name(offset, error):
    with pytest.raises(error, match=r"offset|size"):
        Image.from_bytes(b"abc", offset)


def test_a_memory_smaller_than_its_image_is_refused():
    img = Image.from_bytes(b"abc", 1000)
    with pytest.raises(ValueError, match=r"end of the image \(1003\), got 1002"):
        img.new_memory(minimum=1002)
    for creator in (linmem.creator("pool"), linmem.creator("limiting", limit_bytes=1 << 20),
                    linmem.PythonCreator(linmem.MmapCreator())):
        with pytest.raises(ValueError, match="end of the image"):
            img.new_memory(minimum=1002, creator=creator)


# -- digest and equality ------------------------------------------------------------------------------

def digest_by_hand(data, offset):
    whole = bytes(offset) + bytes(data)
    state = hashlib.blake2b(struct.pack("<QQ", offset, len(data)), digest_size=32)
    run = None
    for block in range(0, round_up(len(whole), 4096) + 4096, 4096):
        there = any(whole[block:block + 4096])
        if there and run is None:
            run = block
        elif not there and run is not None:
            state.update(struct.pack("<QQ", run, block - run))
            state.update(whole[run:block].ljust(block - run, b"\0"))
            run = None
    return state.hexdigest()


@pytest.mark.parametrize("offset", [0, 5, 4096, 70000])
def test_the_digest_is_the_documented_one_and_no_host_page_is_in_it(kind, offset):
    data = bytearray(100000)
    data[0] = data[4200] = data[9000] = data[-1] = 7
    assert Image.from_bytes(data, offset).digest == digest_by_hand(data, offset)


def test_images_are_equal_if_they_have_the_same_bytes_at_the_same_offset():
    a = Image.from_bytes(b"abc", 5)
    assert a == Image.from_bytes(b"abc", 5)
    assert hash(a) == hash(Image.from_bytes(b"abc", 5))
    assert a != Image.from_bytes(b"abc", 6)
    assert a != Image.from_bytes(b"abd", 5)
    assert a != Image.from_bytes(b"abc\0", 5)
    assert a != b"abc"


# -- snapshots --------------------------------------------------------------------------------------------

def test_a_snapshot_keeps_the_bytes_that_the_memory_held(kind):
    mem = linmem.create(10 * PAGE + 5)
    mem[3 * PAGE:3 * PAGE + 5] = b"hello"
    mem[-1] = 9
    img = mem.snapshot()
    before = mem[:]
    mem[3 * PAGE] = 0
    assert (img.offset, img.size, bytes(img)) == (0, len(before), before)


def test_a_snapshot_is_equal_to_the_image_that_its_memory_started_from(kind):
    img = Image.from_bytes(random.Random(1).randbytes(3 * PAGE) + bytes(2 * PAGE) + b"end")
    mem = img.new_memory()
    assert mem.snapshot() == img
    mem[PAGE] ^= 1
    assert mem.snapshot() != img
    mem[PAGE] ^= 1
    assert mem.snapshot() == img


@requires("numpy")
def test_dirty_pages_as_an_array_are_the_same():
    import numpy
    img = Image.from_bytes(bytes(20 * PAGE))
    mem = img.new_memory()
    mem[PAGE] = mem[2 * PAGE] = mem[9 * PAGE] = 1
    array = mem.dirty_pages(img, as_array=True)
    assert array.dtype == numpy.uint64
    assert array.tolist() == [list(pair) for pair in mem.dirty_pages(img)] == [[PAGE, 2 * PAGE], [9 * PAGE, PAGE]]
    assert linmem.create(0).dirty_pages(img, as_array=True).shape == (0, 2)


def test_a_page_that_holds_the_images_bytes_again_is_not_dirty(kind):
    img = Image.from_bytes(b"x" * 4 * PAGE, PAGE)
    mem = img.new_memory(minimum=8 * PAGE)
    assert mem.dirty_pages(img) == []
    mem[2 * PAGE] = 0
    mem[0] = mem[7 * PAGE] = 1
    assert mem.dirty_pages(img) == [(0, PAGE), (2 * PAGE, PAGE), (7 * PAGE, PAGE)]
    mem[2 * PAGE] = ord("x")
    mem[0] = mem[7 * PAGE] = 0
    assert mem.dirty_pages(img) == []


def test_the_last_dirty_page_ends_with_the_memory():
    mem = linmem.create(PAGE + 5)
    img = mem.snapshot()
    mem[PAGE + 1] = 1
    assert mem.dirty_pages(img) == [(PAGE, 5)]


# -- restoring -----------------------------------------------------------------------------------------------

def test_restore_brings_back_every_byte(kind):
    chance = random.Random(5)
    img = Image.from_bytes(chance.randbytes(6 * PAGE) + bytes(9 * PAGE) + chance.randbytes(PAGE + 3), 3 * PAGE + 100)
    for mem in (img.new_memory(), linmem.create(img.offset + img.size)):
        want = bytes(img.offset) + bytes(img)
        for _ in range(12):
            mem.restore(img)
            assert mem[:] == want
            assert mem.dirty_pages(img) == []
            for _ in range(chance.choice([0, 3, 300])):
                mem[chance.randrange(len(mem))] = chance.randrange(256)
        mem[:] = chance.randbytes(len(mem))
        mem.restore(img)
        assert mem[:] == want


def test_live_views_see_the_restored_bytes(kind):
    img = Image.from_bytes(b"x" * 3 * PAGE)
    mem = img.new_memory()
    with memoryview(mem) as view:
        view[PAGE] = 0
        mem.restore(img)
        assert view[PAGE] == ord("x")
        other = Image.from_bytes(b"y" * 3 * PAGE)
        mem.restore(other)
        assert view.tobytes() == bytes(other)
        view[5] = 1
        assert mem[5] == 1


def test_a_memory_goes_from_image_to_image(kind):
    chance = random.Random(7)
    images = [Image.from_bytes(chance.randbytes(4 * PAGE), 2 * PAGE), Image.from_bytes(chance.randbytes(6 * PAGE)),
              Image.from_bytes(bytes(6 * PAGE)), Image.from_bytes(chance.randbytes(5), 6 * PAGE - 5)]
    mem = images[0].new_memory()
    for _ in range(60):
        img = chance.choice(images)
        mem.restore(img)
        want = (bytes(img.offset) + bytes(img)).ljust(6 * PAGE, b"\0")
        assert mem[:] == want
        for other in images:
            assert (mem.dirty_pages(other) == []) == (other == img)
        assert mem.snapshot().runs() == img.runs()
        mem[chance.randrange(len(mem))] ^= 1
        if chance.random() < 0.3:
            mem.discard(chance.randrange(6 * PAGE))


def test_a_memory_that_has_grown_is_restored_only_on_request():
    mem = linmem.create(4 * PAGE)
    mem[PAGE] = 1
    img = mem.snapshot()
    mem.grow_to(6 * PAGE)
    mem[5 * PAGE] = 7
    with pytest.raises(ValueError, match=f"grown to {6 * PAGE} bytes since, the image knows of {4 * PAGE}"):
        mem.restore(img)
    assert mem[5 * PAGE] == 7
    mem.restore(img, zero_grown=True)
    assert len(mem) == 6 * PAGE
    assert mem[:] == bytes(img) + bytes(2 * PAGE)
    with pytest.raises(ValueError, match="grown"):
        mem.restore(img)


def test_a_memory_made_larger_than_its_image_has_not_grown_until_it_grows():
    img = Image.from_bytes(b"abc")
    mem = img.new_memory(minimum=3 * PAGE)
    mem[2 * PAGE] = 1
    mem.restore(img)
    assert mem[:] == b"abc" + bytes(3 * PAGE - 3)
    mem.grow_to(4 * PAGE)
    with pytest.raises(ValueError, match="grown"):
        mem.restore(img)


def test_a_memory_smaller_than_the_image_is_not_restored_to_it():
    img = Image.from_bytes(b"abc", 100)
    mem = linmem.create(102)
    mem[0] = 1
    with pytest.raises(ValueError, match="has 102 bytes and the image 103"):
        mem.restore(img, zero_grown=True)
    assert mem[0] == 1


@pytest.mark.parametrize("call", [
    lambda mem, img: mem.snapshot(), lambda mem, img: mem.restore(img), lambda mem, img: mem.dirty_pages(img),
    lambda mem, img: img.diff(mem),
    lambda mem, img: mem.apply(img.diff(Image.from_bytes(b"y" * 3 * PAGE)))])
def test_inaccessible_pages_are_refused_until_they_have_their_access_back(call):
    img = Image.from_bytes(b"x" * 3 * PAGE)
    mem = img.new_memory()
    mem.write(PAGE, b"changed")
    mem.protect(PAGE, PAGE, "none")
    with pytest.raises(TypeError, match=r"protected pages.*protect\(0, "):
        call(mem, img)
    mem.protect(PAGE, PAGE, "rw")
    call(mem, img)


def test_a_closed_memory_has_no_images():
    img = Image.from_bytes(b"abc")
    mem = img.new_memory()
    mem.close()
    for call in (mem.snapshot, lambda: mem.restore(img), lambda: mem.dirty_pages(img), lambda: img.diff(mem)):
        with pytest.raises(ValueError, match="closed"):
            call()


# -- discard, growth, moving ------------------------------------------------------------------------------

def test_discarded_pages_read_as_zero_and_come_back_with_the_image(kind):
    img = Image.from_bytes(b"x" * 8 * PAGE)
    mem = img.new_memory()
    mem.discard(PAGE + 1, 3 * PAGE)
    assert mem[:] == b"x" * (PAGE + 1) + bytes(3 * PAGE) + b"x" * (4 * PAGE - 1)
    assert mem.dirty_pages(img) == [(PAGE, 4 * PAGE)]
    mem[2 * PAGE] = 5
    assert bytes(mem.snapshot()) == mem[:]
    mem.restore(img)
    assert mem[:] == bytes(img)
    assert mem.dirty_pages(img) == []


def test_a_memory_of_an_image_grows_and_moves_like_any_other(kind):
    img = Image.from_bytes(b"x" * 4 * PAGE)
    mem = img.new_memory(reserve=5 * PAGE, may_move=True)
    mem[PAGE] = 1
    mem.grow_to(5 * PAGE)
    base = mem.as_ptr()
    mem.grow_to(100 * PAGE)
    assert mem.as_ptr() != base
    want = bytearray(b"x" * 4 * PAGE + bytes(96 * PAGE))
    want[PAGE] = 1
    assert mem[:] == want
    assert mem.dirty_pages(img) == [(PAGE, PAGE)]
    mem.restore(img, zero_grown=True)
    assert mem.dirty_pages(img) == []


@pytest.mark.parametrize("make", [
    lambda: linmem.creator("limiting", limit_bytes=1 << 24), lambda: linmem.creator("statistics"),
    lambda: linmem.MmapCreator(prefault=True), lambda: linmem.MmapCreator(huge_pages=True),
    lambda: linmem.PythonCreator(linmem.MmapCreator()), lambda: linmem.creator("pool"),
    lambda: linmem.creator("limiting", limit_bytes=1 << 24, upstream=linmem.creator("pool"))])
def test_every_creator_makes_memories_of_images(make, kind):
    creator = make()
    img = Image.from_bytes(b"ab" * 3 * PAGE, 100)
    for _ in range(3):
        with img.new_memory(1 << 20, creator=creator) as mem:
            assert mem[:] == bytes(100) + bytes(img)
            mem[50] = mem[PAGE] = 0xFF
            mem.restore(img)
            assert mem[:] == bytes(100) + bytes(img)
            mem[60] = mem[PAGE] = 0xFF
            mem.grow_to(len(mem) + PAGE)


class Words:
    """A memory in Python over another memory's pages."""

    def __init__(self, size):
        self.inner = linmem.create(size, size)

    def __getattr__(self, name):
        return getattr(self.inner, name)


class WordsCreator:
    def new_memory(self, ty, minimum, maximum, reserved, guard):
        return Words(minimum)


def test_a_memory_with_foreign_pages_is_filled_restored_and_compared(kind):
    img = Image.from_bytes(b"x" * 3 * PAGE, PAGE)
    mem = img.new_memory(creator=linmem.PythonCreator(WordsCreator()), guard=0)
    assert mem.info().kind == "python"
    assert mem[:] == bytes(PAGE) + bytes(img)
    mem[0] = mem[2 * PAGE] = 1
    assert mem.dirty_pages(img) == [(0, PAGE), (2 * PAGE, PAGE)]
    assert mem.snapshot().size == 4 * PAGE
    mem.restore(img)
    assert mem[:] == bytes(PAGE) + bytes(img)


class PartOfAPage:
    """A memory that ends inside a page. The rest of this page belongs to another owner."""

    def __init__(self, size):
        self.whole, self.size = linmem.create(round_up(size)), size
        self.whole.write(size, b"s" * (round_up(size) - size))

    def byte_size(self): return self.size
    def byte_capacity(self): return self.size
    def as_ptr(self): return self.whole.as_ptr()
    def wasm_accessible(self): return range(self.as_ptr(), self.as_ptr() + self.size)
    def grow_to(self, new_size): raise linmem.GrowError("never")


class PartsCreator:
    def __init__(self): self.made = []

    def new_memory(self, ty, minimum, *rest):
        self.made.append(PartOfAPage(minimum))
        return self.made[-1]


@pytest.mark.parametrize("size", [1, 4095, 4097, 2 * PAGE - 5])
def test_an_image_writes_no_byte_beyond_a_memory_with_foreign_pages(kind, size):
    creator = PartsCreator()
    one, two = Image.from_bytes(b"1" * size), Image.from_bytes(b"2" * size)
    with one.new_memory(creator=linmem.PythonCreator(creator), guard=0) as mem:
        for img in (one, two, one):
            assert bytes(mem) == bytes(img)
            (under,) = creator.made
            assert under.whole[size:] == b"s" * (len(under.whole) - size)
            mem.restore(two if img is one else one)


# -- deltas ---------------------------------------------------------------------------------------------------

def test_a_delta_leads_from_an_image_to_a_memory(kind):
    base = Image.from_bytes(b"x" * 5 * PAGE)
    mem = base.new_memory()
    mem[PAGE] = 1
    mem[3 * PAGE:4 * PAGE] = bytes(PAGE)
    mem.grow_to(7 * PAGE)
    mem[6 * PAGE] = 2
    delta = base.diff(mem)
    assert delta.ranges == ((PAGE, PAGE), (6 * PAGE, PAGE))
    assert delta.zeros == ((3 * PAGE, PAGE),)
    assert (delta.base, delta.base_size, delta.size, delta.target) == (base.digest, 5 * PAGE, 7 * PAGE, None)
    other = base.new_memory()
    other.apply(delta)
    assert other[:] == mem[:]
    assert bytes(base.apply(delta)) == mem[:]
    again = base.diff(mem.snapshot())
    assert again.target == mem.snapshot().digest
    assert (again.ranges, again.zeros, again.data) == (delta.ranges, delta.zeros, delta.data)


def test_a_delta_to_a_memory_that_another_thread_grows_leads_to_bytes_that_the_memory_had():
    base, barrier = linmem.Image.from_bytes(b"a" * 64 * PAGE), threading.Barrier(2, timeout=60)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for _ in range(50):
            mem = linmem.create(PAGE, 64 * PAGE)
            mem.write(0, b"a" * PAGE)           # a growth adds zeros, and nothing else is written

            def grow(mem=mem):
                barrier.wait()
                for n in range(2, 65):
                    mem.grow_to(n * PAGE)

            thread = threading.Thread(target=grow)
            thread.start()
            barrier.wait()
            while thread.is_alive():
                assert bytes(base.apply(base.diff(mem))).strip(b"\0") == b"a" * PAGE
            thread.join()
    finally:
        sys.setswitchinterval(before)


def test_a_delta_cannot_be_changed():
    delta = Image.from_bytes(b"abc").diff(Image.from_bytes(b"abd"))
    with pytest.raises(AttributeError, match="immutable"):
        delta.size = 5
    with pytest.raises(AttributeError, match="immutable"):
        del delta.size
    assert delta.data.readonly
    assert delta == Image.from_bytes(b"abc").diff(Image.from_bytes(b"abd"))
    assert hash(delta) == hash(Image.from_bytes(b"abc").diff(Image.from_bytes(b"abd")))
    assert delta != 5


@pytest.mark.parametrize(("ranges", "zeros", "data"), [
    ([(0, 5)], [], b"abcd"), ([(0, 5), (4, 1)], [], b"abcdef"), ([(0, 200)], [], bytes(200)), ([(-1, 1)], [], b"a"),
    ([(0, 5)], [(4, 2)], b"abcde"), ([(5, 0)], [], b""), ([], [(90, 11)], b"")])
def test_a_delta_of_impossible_ranges_is_refused(ranges, zeros, data):
    with pytest.raises(ValueError, match="must"):
        Delta("00", 100, 100, ranges, zeros, data)


@pytest.mark.parametrize("sizes", [(-1, 0), (0, -1)])
def test_a_delta_of_a_negative_size_is_refused(sizes):
    with pytest.raises(ValueError, match="size must be >= 0, got -1"):
        Delta("00", *sizes, (), (), b"")


def test_a_delta_for_another_size_is_refused_and_nothing_is_written():
    base = Image.from_bytes(b"x" * 2 * PAGE)
    mem = base.new_memory()
    mem[0] = 1
    mem.grow_to(3 * PAGE)
    delta = base.diff(mem)
    for size in (PAGE, 4 * PAGE):
        other = linmem.create(size)
        with pytest.raises(ValueError, match=f"has {size} bytes"):
            other.apply(delta)
        assert other[:] == bytes(size)
    bounded = base.new_memory(2 * PAGE)
    with pytest.raises(linmem.GrowError):
        bounded.apply(delta)
    assert bounded[:] == bytes(base)


def test_an_image_takes_only_its_own_deltas():
    a, b = Image.from_bytes(b"a" * PAGE), Image.from_bytes(b"b" * PAGE)
    with pytest.raises(ValueError, match="is for the image"):
        b.apply(a.diff(b))
    with pytest.raises(ValueError, match="was to lead to"):
        a.apply(Delta(a.digest, PAGE, PAGE, [(0, PAGE)], [], b"c" * PAGE, b.digest))
    assert a.apply(a.diff(Image.from_bytes(b"c"))) == Image.from_bytes(b"c")


@pytest.mark.parametrize("rest", [1, 100, PAGE - 1])
def test_a_delta_does_not_name_a_last_part_of_a_page_that_has_not_changed(kind, rest):
    img = Image.from_bytes(b"x" * (PAGE + rest))
    with img.new_memory() as mem:
        for other in (img, mem):
            delta = img.diff(other)
            assert (delta.ranges, delta.zeros) == ((), ())
        mem[PAGE] = 1
        assert img.diff(mem).ranges == ((PAGE, rest),)


def test_a_delta_that_leaves_bytes_before_the_image_that_it_leads_to_is_refused():
    img = Image.from_bytes(b"abcd")
    for ranges, data, at in (((), b"", 0), (((PAGE - 4, 8),), b"efghijkl", 0), (((0, 4), (8, 4)), b"\0\0\0\0efgh", 8)):
        delta = Delta(img.digest, 4, 2 * PAGE, ranges, (), data, None, PAGE)
        with pytest.raises(ValueError, match=f"leaves bytes that are not zero at {at}, before the image .* at {PAGE}"):
            img.apply(delta)
    cleared = Delta(img.digest, 4, 2 * PAGE, [(PAGE - 4, 8)], [(0, 4)], b"\0\0\0\0ijkl", None, PAGE)
    assert img.apply(cleared) == Image.from_bytes(b"ijkl".ljust(PAGE, b"\0"), PAGE)


def test_deltas_that_do_not_follow_one_another_do_not_compose():
    a, b, c = (Image.from_bytes(letter * PAGE) for letter in (b"a", b"b", b"c"))
    with pytest.raises(ValueError, match="later must start from"):
        a.diff(b) | c.diff(a)
    with pytest.raises(TypeError):
        a.diff(b) | 5
    with pytest.raises(TypeError):
        a.diff(b).then(5)
    assert a.apply(a.diff(b) | b.diff(c)) == c
    assert (a.diff(b) | b.diff(c)).target == c.digest


def test_bytes_that_an_intermediate_image_cut_off_are_zero_in_composed_deltas():
    a, b = Image.from_bytes(b"a" * 3 * PAGE), Image.from_bytes(b"a" * PAGE)
    for end in (bytes(2 * PAGE), bytes(PAGE) + b"c" * PAGE, b"c" * PAGE + bytes(PAGE), b"c" * PAGE):
        c = Image.from_bytes(b"a" * PAGE + end)
        both = a.diff(b) | b.diff(c)
        if c.size == a.size:
            assert a.apply(both) == c
        else:
            assert both.size == c.size
            assert (both.ranges, both.zeros) == (((PAGE, PAGE),), ())


step = st.one_of(
    st.tuples(st.just("write"), st.integers(0, 1 << 20), st.binary(min_size=1, max_size=3 * PAGE)),
    st.tuples(st.just("zero"), st.integers(0, 1 << 20), st.integers(1, 4 * PAGE)),
    st.tuples(st.just("discard"), st.integers(0, 1 << 20), st.integers(0, 6 * PAGE)),
    st.tuples(st.just("grow"), st.integers(0, 3 * PAGE), st.just(0)))


@settings(max_examples=80, deadline=None)
@given(st.binary(min_size=1, max_size=5 * PAGE), st.integers(0, 2 * PAGE),
       st.lists(st.lists(step, max_size=5), max_size=6))
def test_a_chain_of_deltas_is_the_full_snapshot(data, offset, rounds):
    base = Image.from_bytes(data, offset)
    mem = base.new_memory()
    follower, last, total, deltas = base.new_memory(), base, None, []
    for steps in rounds:
        for what, where, how in steps:
            size = len(mem)
            where %= size
            if what == "write":
                mem.write(where, how[:size - where])
            elif what == "zero":
                mem.write(where, bytes(min(how, size - where)))
            elif what == "discard":
                mem.discard(where, min(how, size - where))
            else:
                mem.grow_to(size + where)
        delta = last.diff(mem)
        follower.apply(delta)
        assert follower[:] == mem[:]
        deltas.append(delta)
        total = delta if total is None else total | delta
        last = mem.snapshot()
        assert bytes(last) == mem[:]
    if total is not None:
        once = base.new_memory()
        once.apply(total)
        assert once[:] == mem[:]
        assert base.apply(total) == last
        associated = deltas[-1]
        for delta in reversed(deltas[:-1]):
            associated = delta | associated
        assert associated == total


def test_an_image_made_without_init_is_empty():
    # An image that __init__ did not make once had a NULL pointer, and its use ended the process.
    assert answer("""
        import linmem
        img = linmem.Image.__new__(linmem.Image)
        assert img == linmem.Image.from_bytes(b"") and bytes(img) == b"" and img.runs() == [] and len(img) == 0
        with img.new_memory(minimum=8) as mem:
            mem[0] = 1
            mem.restore(img, zero_grown=True)
            assert mem[0] == 0 and mem.dirty_pages(img) == [] and img.diff(mem).nbytes == 0
        print(img.info().kind)
        """) == "none"
