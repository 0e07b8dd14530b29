"""`Memory.map` and `Memory.unmap`: parts of a memory that show pages of an image or of a file."""

import importlib.util
import io
import itertools
import os
import re
import threading

import pytest
import wasmtime
from support import (
    FORKING,
    PAGE,
    REAL_PAGE,
    ROOT,
    answer,
    dies_at,
    file_requires,
    mappings,
    rebuilt,
    requires,
    run_child,
    smaps,
)

import linmem
import linmem.wasmtime
from linmem import Image
from linmem._core.memory import restore_all
from linmem._files import sparse
from linmem._os import pages

file_requires("maps_images")

SIZE = 8 * PAGE
IMAGE = b"image" * PAGE                 # five pages
OWN = bytes([7]) * SIZE


@pytest.fixture
def mem():
    with linmem.create(SIZE, maximum=4 * SIZE) as made:
        made.write(0, OWN)
        yield made


@pytest.fixture
def img():
    return Image.from_bytes(IMAGE)


@pytest.fixture
def path(tmp_path):
    """A file of two pages and seven bytes."""
    made = tmp_path / "file"
    made.write_bytes(b"f" * (2 * PAGE + 7))
    return made


def shown(mem):
    """The bytes of the memory, as one letter for each page; a dot is a page of zeros."""
    letters = {b"\x07": "o", b"\x00": "."}
    pages = [mem[start:start + PAGE] for start in range(0, len(mem), PAGE)]
    return "".join(letters.get(page[:1], page[:1].decode()) for page in pages)


def sources_of(mem, start=0, end=None):
    """The names of the files of which the OS shows pages in a part of the memory."""
    base = mem.as_ptr()
    return files_within(base + start, base + (mem.byte_size() if end is None else end))


def files_within(start, end):
    return [m.name for m in mappings(start, end) if m.name and not m.name.startswith("[")]


# -- what a window shows

@requires("maps")
def test_a_window_shows_pages_of_an_image_without_a_copy(mem, img):
    mem.map(PAGE, img, PAGE, 2 * PAGE)
    assert mem[:] == OWN[:PAGE] + IMAGE[PAGE:3 * PAGE] + OWN[3 * PAGE:]
    assert len(sources_of(mem, PAGE, 3 * PAGE)) == 1
    assert sources_of(mem, 0, PAGE) == sources_of(mem, 3 * PAGE) == []


def test_the_default_size_is_the_rest_of_the_image_to_the_end_of_its_last_page(mem):
    mem.map(0, Image.from_bytes(b"x" * (2 * PAGE + 1)), PAGE)
    assert mem[:] == b"x" * (PAGE + 1) + bytes(PAGE - 1) + OWN[2 * PAGE:]


def test_source_offset_counts_from_the_first_byte_of_the_image(mem):
    img = Image.from_bytes(b"a" * PAGE + b"b" * PAGE, 5 * PAGE)
    mem.map(0, img, PAGE)
    assert mem[:] == b"b" * PAGE + OWN[PAGE:]
    unaligned = Image.from_bytes(b"c" * 2 * PAGE, PAGE + 16)
    with pytest.raises(ValueError, match=rf"must be a multiple of the host page \({PAGE}\), got {PAGE + 16} \+ 0$"):
        mem.map(0, unaligned)
    mem.map(0, unaligned, PAGE - 16)
    assert mem[:2 * PAGE] == b"c" * (PAGE + 16) + bytes(PAGE - 16)


def test_writes_change_neither_the_image_nor_another_window_of_it(mem, img):
    mem.map(0, img, 0, PAGE)
    mem.map(PAGE, img, 0, PAGE)
    mem[0] = 1
    memoryview(mem)[1] = 2
    assert mem[:2] == b"\1\2"
    assert (mem[PAGE:PAGE + 2], bytes(img)[:2]) == (b"im", b"im")


def test_views_from_before_show_the_new_pages_and_later_the_zeros(mem, img):
    with memoryview(mem) as view:
        mem.map(0, img)
        assert view[:5] == b"image"
        view[0] = 1
        assert mem[0] == 1
        mem.unmap(0, SIZE)
        assert view[:5 * PAGE] == bytes(5 * PAGE)


def test_a_window_outlives_its_source(mem):
    mem.map(0, Image.from_bytes(IMAGE))
    mem.map(5 * PAGE, Image.from_bytes(b"z" * PAGE))
    assert mem[:6 * PAGE] == IMAGE + b"z" * PAGE


def test_a_later_window_replaces_the_pages_of_an_earlier_one(mem, img):
    mem.map(0, img)
    mem.map(PAGE, Image.from_bytes(b"z" * PAGE))
    assert mem[:5 * PAGE] == IMAGE[:PAGE] + b"z" * PAGE + IMAGE[2 * PAGE:]
    mem.unmap(PAGE, PAGE)
    assert mem[:5 * PAGE] == IMAGE[:PAGE] + bytes(PAGE) + IMAGE[2 * PAGE:]


def test_every_sequence_of_three_windows_and_an_unmap_leaves_the_bytes_of_a_model():
    images = [Image.from_bytes(letter * 2 * PAGE) for letter in (b"a", b"b", b"c")]
    for places in itertools.product(range(3), repeat=4):
        with linmem.create(4 * PAGE) as mem:
            mem.write(0, OWN[:4 * PAGE])
            model = list("oooo")
            for place, img, letter in zip(places[:3], images, "abc", strict=True):
                mem.map(place * PAGE, img)
                model[place:place + 2] = letter * 2
            for page in range(places[3], places[3] + 2):
                model[page] = model[page] if model[page] == "o" else "."
            mem.unmap(places[3] * PAGE, 2 * PAGE)
            assert shown(mem) == "".join(model)


# -- files

def test_a_file_that_is_open_for_reading_is_copied_on_write(mem, path):
    with path.open("rb") as file:
        mem.map(PAGE, file)
    assert mem[:] == OWN[:PAGE] + b"f" * (2 * PAGE + 7) + bytes(PAGE - 7) + OWN[4 * PAGE:]
    mem[PAGE] = 1
    assert path.read_bytes() == b"f" * (2 * PAGE + 7)


@requires("real_pages", "file_memories")
def test_a_file_that_is_open_for_update_is_written_through(mem, path):
    with path.open("r+b") as file:
        mem.map(0, file, PAGE)
    mem.write(0, b"new")
    mem.write(PAGE, b"end")
    written = b"f" * PAGE + b"new" + b"f" * (PAGE - 3) + b"endffff"
    assert path.read_bytes() == written
    with path.open("r+b") as file:
        file.write(b"outside")
    assert mem[:3] == b"new"
    with path.open("rb") as file:
        mem.map(PAGE, file, 0, PAGE)
    assert mem[PAGE:PAGE + 7] == b"outside"


@requires("real_pages", "file_memories")
def test_a_file_that_is_open_for_update_can_be_shown_read_only(mem, path):
    with path.open("r+b") as file:
        mem.map(0, file, access="r")
    with pytest.raises(ValueError, match="has the access 'r'"):
        mem[0] = 1
    mem.protect(0, PAGE, "rw")
    mem[0] = 1
    assert path.read_bytes()[:2] == b"\1f"


@requires("real_pages", "file_memories")
def test_a_map_that_is_refused_allocates_no_space_in_the_file(mem, tmp_path):
    path = tmp_path / "sparse"
    with path.open("w+b") as file:
        file.truncate(2 * SIZE)
        for offset, error in ((0, "byte_size"), (1, "host page")):
            with pytest.raises(ValueError, match=error):
                mem.map(offset, file)
        mem.close()
        with pytest.raises(ValueError, match="closed"):
            mem.map(0, file, 0, PAGE)
        assert os.stat(path).st_blocks == 0


@requires("real_pages", "file_memories")
def test_map_neither_moves_the_position_of_a_file_nor_changes_its_length(mem, path):
    with path.open("r+b") as file:
        file.seek(5)
        mem.map(0, file)
        assert file.tell() == 5
    assert path.stat().st_size == 2 * PAGE + 7


@requires("sealed")
def test_sealed_memory_is_copied_on_write_although_its_descriptor_can_write(mem, img):
    with open(os.dup(img.fileno()), "r+b") as file:
        mem.map(0, file)
    mem[0] = 1
    assert mem[:5 * PAGE] == b"\1" + IMAGE[1:]
    assert bytes(img) == IMAGE


def test_no_page_past_the_end_of_a_file_becomes_accessible(mem, path):
    with path.open("rb") as file:
        for first, size in ((0, 4 * PAGE), (PAGE, 3 * PAGE), (3 * PAGE, PAGE)):
            with pytest.raises(ValueError, match=rf"source_offset \+ size must be <= the size of the source"
                                                 rf" \({2 * PAGE + 7}\).*, got {first} \+ {size}$"):
                mem.map(0, file, first, size)
        with pytest.raises(ValueError, match=rf"source_offset must be <= the size .*, got {4 * PAGE}$"):
            mem.map(0, file, 4 * PAGE)
        mem.map(0, file, 3 * PAGE)          # the end of the last page: nothing is left
    assert mem[:] == OWN


@requires("file_memories")
def test_a_host_page_that_is_larger_than_the_kernels_shows_no_page_past_the_end_of_a_file():
    larger = 4 * REAL_PAGE
    code = f"""
        import linmem, tempfile
        mem = linmem.create({4 * larger})
        mem.write(0, b"o" * {4 * larger})
        with tempfile.NamedTemporaryFile() as file, open(file.name, "rb") as reader:
            file.write(b"f" * {larger + 5})
            file.flush()
            mem.map(0, file, 0, {larger})
            assert mem[:{larger + 1}] == b"f" * {larger} + b"o"
            mem.map(0, reader)
            assert mem[:] == b"f" * {larger + 5} + bytes({larger - 5}) + b"o" * {2 * larger}
            try:
                mem.map(0, file)
            except ValueError as error:
                assert "size must end at a whole host page" in str(error), error
            else:
                raise AssertionError("a copy would not be written through")
        print("done")
    """
    assert answer(code, env={"LINMEM_PAGE_SIZE": str(larger)}) == "done"


@requires("maps", "file_memories")
def test_a_file_that_is_cut_short_faults_as_the_documentation_says(tmp_path):
    setup = (f"import linmem; mem = linmem.create({2 * PAGE}); file = open({str(tmp_path / 'cut')!r}, 'w+b');"
             f" file.truncate({2 * PAGE}); mem.map(0, file); assert mem[{PAGE}] == 0; file.truncate({PAGE})")
    dies_at(setup, f"mem[{PAGE}]")


def test_the_pieces_of_a_file_keep_its_position_and_end_with_the_file(tmp_path):
    (tmp_path / "short").write_bytes(b"x" * 10)
    with open(tmp_path / "short", "rb", buffering=0) as file:
        file.seek(3)
        assert [(start, bytes(part)) for start, part in sparse.pieces_of_file(file.fileno(), 2, 8)] == [(0, b"x" * 8)]
        assert file.tell() == 3


# -- memories as sources

@pytest.fixture
def source():
    """A memory that processes share, of four pages of letters."""
    with linmem.create(4 * PAGE, maximum=16 * PAGE, creator=linmem.creator("shared")) as made:
        made.write(0, b"a" * PAGE + b"b" * PAGE + b"c" * PAGE + b"d" * PAGE)
        yield made


@requires("shared")
def test_a_window_of_a_shared_memory_is_written_through_in_both_directions(mem, source):
    mem.map(PAGE, source, 2 * PAGE)
    assert shown(mem) == "ocdooooo"
    mem[PAGE] = 1
    source[3 * PAGE] = 2
    assert (source[2 * PAGE], mem[2 * PAGE]) == (1, 2)
    source.grow_to(6 * PAGE)
    mem.map(3 * PAGE, source, 4 * PAGE)
    source.write(4 * PAGE, b"e" * 2 * PAGE)
    assert mem[3 * PAGE:6 * PAGE] == b"e" * 2 * PAGE + OWN[:PAGE]


@requires("shared")
def test_two_windows_of_the_same_pages_are_a_ring(source):
    with linmem.create(8 * PAGE) as ring:
        ring.map(0, source)
        ring.map(4 * PAGE, source)
        ring.write(4 * PAGE - 3, b"across")
        assert ring[:3] == b"oss"
        assert ring[8 * PAGE - 3:] == b"acr"
        assert source[:3] == b"oss"
        before = ring.snapshot()
        ring.write(0, b"x" * PAGE)
        ring.restore(before)
        assert ring[:] == bytes(before) == source[:] * 2
        ring.discard(4 * PAGE, PAGE)
        assert source[:PAGE] == ring[:PAGE] == bytes(PAGE)


@requires("shared")
def test_a_window_keeps_the_memory_that_it_shows(mem):
    with linmem.create(2 * PAGE, creator=linmem.creator("shared")) as source:
        handle = source.handle()
        mem.map(0, source)
        mem.map(4 * PAGE, source)
        mem.map(PAGE, source, 0, PAGE)
    for start, size in ((0, PAGE), (PAGE, PAGE), (4 * PAGE, 2 * PAGE)):
        with linmem.attach(handle) as again:
            again[0] = start // PAGE + 1
            assert mem[start] == start // PAGE + 1
        mem.unmap(start, size)
    with pytest.raises(FileNotFoundError, match="is gone"):
        linmem.attach(handle)


@requires("shared")
def test_a_pool_gives_back_the_memories_that_a_tenant_has_shown():
    pool = linmem.PoolingCreator(check=True)
    with pool.create(SIZE) as mem:
        with linmem.create(PAGE, creator=linmem.creator("shared")) as source:
            handle = source.handle()
            source[0] = 7
            mem.map(0, source)
        linmem.attach(handle).close()
    with pytest.raises(FileNotFoundError, match="is gone"):
        linmem.attach(handle)
    with pool.create(SIZE) as mem:
        assert mem[:] == bytes(SIZE)


def test_a_memory_with_pages_of_its_own_is_refused_as_a_source_with_the_way_out(mem):
    with linmem.create(PAGE) as other:
        for one in (other, mem):
            with pytest.raises(TypeError, match=r"^source must be a memory that processes share or one of a file, got"
                                                r" one of kind 'mmap', .*linmem\.creator\('shared'\)"):
                mem.map(0, one, 0, PAGE)


@requires("shared")
def test_the_handle_of_a_shared_memory_is_no_source(mem, source):
    with pytest.raises(TypeError, match=r"^source must be a memory, got its handle .*: linmem\.attach\(source\)"):
        mem.map(0, source.handle(), 0, PAGE)


@requires("shared")
def test_a_shared_memory_has_no_windows(source, img):
    for one in (img, source):
        with pytest.raises(TypeError, match="map is not supported into a memory of kind 'shared'"):
            source.map(0, one, 0, PAGE)
    source.unmap(0, 4 * PAGE)
    assert source[0] == ord("a")


@requires("shared", "real_pages")
@pytest.mark.parametrize("access", ["rw", "r"])
def test_a_guest_shares_the_pages_of_a_shared_memory_or_sees_them_read_only(source, access):
    guest = Guest()
    guest.mem.map(WASM_PAGE, source, access=access)
    assert guest.call("load", WASM_PAGE + PAGE) == ord("b")
    source[2 * PAGE] = ord("z")
    assert guest.call("load", WASM_PAGE + 2 * PAGE) == ord("z")
    guest.call("fill", WASM_PAGE, 1, PAGE)              # an inaccessible page would end the process here
    guest.call("copy", WASM_PAGE + PAGE, WASM_PAGE, 16)
    written = access == "rw"
    assert source[:PAGE] == (b"\1" if written else b"a") * PAGE
    assert source[PAGE] == (1 if written else ord("b"))
    assert guest.mem[WASM_PAGE:WASM_PAGE + PAGE] == b"\1" * PAGE
    guest.store.close()


@requires("shared")
def test_the_range_lies_within_the_memory_that_is_shown(mem, source):
    source.grow_to(4 * PAGE + 5)
    for how in ((1,), (6 * PAGE,), (0, 6 * PAGE), (PAGE, 5 * PAGE)):
        with pytest.raises(ValueError, match="source"):
            mem.map(0, source, *how)
    mem.map(0, source, 3 * PAGE, PAGE)
    assert shown(mem) == "dooooooo"
    source.close()
    with pytest.raises(ValueError, match="closed"):
        mem.map(0, source)


@requires("file_memories")
def test_a_window_of_a_memory_of_a_file_is_written_to_the_file_and_keeps_its_lock(mem, tmp_path):
    path = tmp_path / "source"
    with linmem.open_file(path, minimum=2 * PAGE) as source:
        mem.map(0, source)
        with pytest.raises(TypeError, match="map is not supported into a memory of kind 'file'"):
            source.map(0, source)
    mem[PAGE] = 7
    assert path.read_bytes() == bytes(PAGE) + b"\7" + bytes(PAGE - 1)
    with pytest.raises(BlockingIOError):        # the file has one writer as long as a window shows it
        linmem.open_file(path)
    mem.unmap(0, 2 * PAGE)
    linmem.open_file(path).close()


@requires("file_memories")
def test_a_memory_that_was_opened_for_reading_is_copied_on_write(mem, tmp_path):
    path = tmp_path / "source"
    with linmem.open_file(path, minimum=2 * PAGE) as writer:
        with linmem.open_file(path, access="r") as reader:
            mem.map(0, reader)
        writer[PAGE] = 5
        mem[0] = 1
        assert (mem[PAGE], writer[0]) == (5, 0)


@requires("file_memories")
def test_a_memory_that_another_program_can_cut_short_is_not_shown_to_a_guest(tmp_path):
    guest = Guest()
    with linmem.open_file(tmp_path / "source", minimum=PAGE) as source, pytest.raises(
            linmem.OwnedError, match="cuts short"):
        guest.mem.map(0, source)
    guest.store.close()


# -- arguments

@pytest.mark.parametrize("source", [b"bytes", bytearray(PAGE), memoryview(b"x"), 5, None, "path", object()])
def test_what_has_no_pages_to_show_is_refused_with_the_way_out(mem, source):
    with pytest.raises(TypeError, match=rf"^source must be .*, got {type(source).__name__},"
                                        rf" .*mem.write\(offset, source\) copies the bytes of a buffer"):
        mem.map(0, source)


def test_a_stream_and_a_pipe_have_no_pages_to_show(mem):
    with pytest.raises(TypeError, match=r"got BytesIO,"):
        mem.map(0, io.BytesIO(b"x"))
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe, open(writer, "wb"), open(os.devnull, "rb") as device:
        for source in pipe, device:
            with pytest.raises(ValueError, match=_of(source, "not a regular file")):
                mem.map(0, source)


def _of(file, wrong):
    return f"^source must be a regular file that can be read, got {re.escape(repr(file))}, which is {wrong}$"


class Descriptor:
    def __init__(self, fd):
        self.fd = fd

    def fileno(self):
        return self.fd

    def __repr__(self):
        return f"<{self.fd}>"


def test_a_file_that_cannot_be_read_is_refused_by_name(mem, tmp_path):
    with open(tmp_path / "file", "wb") as file:
        with pytest.raises(ValueError, match=_of(file, "open for writing only")):
            mem.map(0, file, 0, PAGE)
        closed = Descriptor(os.dup(file.fileno()))
    os.close(closed.fd)
    with pytest.raises(ValueError, match=_of(closed, "not open")):
        mem.map(0, closed)
    if hasattr(os, "O_PATH"):
        path = Descriptor(os.open(tmp_path / "file", os.O_PATH))
        with pytest.raises(ValueError, match=_of(path, r"open without a right to read \(O_PATH\)")):
            mem.map(0, path)
        os.close(path.fd)


def test_offsets_and_sizes_are_whole_host_pages_within_the_memory_and_the_source(mem, img):
    multiple = rf"must be a multiple of the host page \({PAGE}\), got "
    for how, message in (
            ((1, img), "^offset " + multiple + "1$"), ((0, img, 0, 1), "^size " + multiple + "1$"),
            ((0, img, 1), multiple + r"0 \+ 1$"),
            ((4 * PAGE, img), rf"^offset \+ size must be <= byte_size\(\) \({SIZE}\), got offset={4 * PAGE}"),
            ((0, img, 0, 6 * PAGE), rf"size of the source \({5 * PAGE}\).*, got 0 \+ {6 * PAGE}$"),
            ((0, img, 6 * PAGE), rf"size of the source \({5 * PAGE}\), got {6 * PAGE}$")):
        with pytest.raises(ValueError, match=message):
            mem.map(*how)
    for how in ((1, PAGE), (0, 1), (PAGE, SIZE)):
        with pytest.raises(ValueError, match=r"host page|byte_size"):
            mem.unmap(*how)
    with pytest.raises(ValueError, match="access must be one of"):
        mem.map(0, img, access="x")
    with pytest.raises(TypeError, match="size must be an integer"):
        mem.unmap(0, None)
    assert mem[:] == OWN
    mem.map(SIZE, img, 0, 0)
    mem.unmap(SIZE, 0)
    mem.map(0, Image.from_bytes(b""))
    assert mem[:] == OWN


def test_a_closed_memory_and_a_memory_in_python_have_no_windows(img):
    mem = linmem.create(SIZE)
    mem.close()
    for call in (lambda: mem.map(0, img), lambda: mem.unmap(0, PAGE)):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_an_image_of_private_pages_is_refused(mem):
    before = pages.choose_image("private")
    try:
        img = Image.from_bytes(IMAGE)
        with pytest.raises(TypeError, match="its pages are private"):
            mem.map(0, img)
    finally:
        pages.choose_image(before)
    mem.write(0, img)
    assert mem[:5 * PAGE] == IMAGE


@requires("few_mappings", "many_mappings")
def test_windows_leave_half_of_the_mappings_of_the_process_to_others():
    assert answer(f"""
        import linmem
        img = linmem.Image.from_bytes(b"x")
        mem = linmem.create(1 << 18, maximum={PAGE << 20})
        mem.grow_to({PAGE << 17})
        n = 0
        try:
            while True:
                mem.map(2 * n * {PAGE}, img)
                n += 1
        except MemoryError as error:
            text = str(error)
        assert f"{{n}} windows" in text and "vm.max_map_count" in text and "unmap()" in text, text
        assert n > 1000
        lines = open("/proc/self/maps").read().count("\\n")
        assert n < lines < 2 * n + 2000
        mem.unmap(0, 2 * {PAGE})
        mem.map(0, img)
        assert mem[0] == ord("x")
        mem.close()
        other = linmem.create({PAGE})
        other.map(0, img)
        print("done")
    """) == "done"


# -- every other operation

@requires("maps")
def test_unmap_gives_zeros_and_pages_that_show_nothing_keep_their_bytes(mem, img):
    mem.map(PAGE, img, 0, 2 * PAGE)
    mem.map(5 * PAGE, img, 0, PAGE)
    mem.unmap(0, SIZE)
    assert shown(mem) == "o..oo.oo"
    assert sources_of(mem) == []
    mem.unmap(0, SIZE)
    assert shown(mem) == "o..oo.oo"


def test_a_growth_keeps_windows_and_views_and_adds_zeros(mem, img):
    mem.map(3 * PAGE, img)
    with memoryview(mem) as view:
        mem.grow_to(2 * SIZE + 5)
        assert view[3 * PAGE:SIZE] == IMAGE
        assert mem[:] == OWN[:3 * PAGE] + IMAGE + bytes(SIZE + 5)
        mem.map(2 * SIZE - 5 * PAGE, img)
        mem.grow_to(3 * SIZE)
        assert mem[2 * SIZE - 5 * PAGE:] == IMAGE + bytes(SIZE)


def test_a_memory_with_a_window_never_moves():
    with linmem.create(PAGE, maximum=64 * PAGE, reserve=PAGE, may_move=True) as mem:
        mem.map(0, Image.from_bytes(b"x" * PAGE))
        with pytest.raises(linmem.GrowError, match=r"cannot move; some of its pages show another source \(map\)"):
            mem.grow_to(mem.byte_capacity() + PAGE)
        mem.unmap(0, PAGE)
        mem[0] = 9
        mem.grow_to(mem.byte_capacity() + PAGE)
        assert mem[0] == 9


def test_a_snapshot_holds_the_bytes_of_windows(mem, img):
    mem.map(PAGE, img)
    mem[2 * PAGE] = 1
    snapshot = mem.snapshot()
    mem.unmap(0, SIZE)
    wanted = bytearray(OWN[:PAGE] + IMAGE + OWN[6 * PAGE:])
    wanted[2 * PAGE] = 1
    assert bytes(snapshot) == wanted


def test_differences_are_exact_in_windows(mem, img):
    before = mem.snapshot()
    mem.map(PAGE, Image.from_bytes(OWN[:2 * PAGE]))     # the same bytes, from other pages
    assert mem.dirty_pages(before) == []
    mem[2 * PAGE] = 1
    assert mem.dirty_pages(before) == [(2 * PAGE, PAGE)]
    mem.map(4 * PAGE, img, 0, PAGE)
    assert mem.dirty_pages(before) == [(2 * PAGE, PAGE), (4 * PAGE, PAGE)]
    delta = before.diff(mem)
    with linmem.create(SIZE) as other:
        other.restore(before)
        other.map(2 * PAGE, img, 0, 3 * PAGE)
        other.restore(before)
        other.apply(delta)
        assert other[:] == mem[:]


@requires("maps", "file_memories")
def test_restore_writes_into_windows_and_keeps_them(mem, path):
    before = mem.snapshot()
    with path.open("r+b") as file:
        mem.map(0, file, 0, 2 * PAGE)
    mem.map(4 * PAGE, Image.from_bytes(IMAGE), 0, 2 * PAGE)
    sources = sources_of(mem)
    mem.restore(before)
    assert mem[:] == OWN
    assert path.read_bytes() == OWN[:2 * PAGE] + b"f" * 7
    assert sources_of(mem) == sources
    mem[0] = 1
    assert path.read_bytes()[:1] == b"\1"


@requires("smaps", "real_pages")
def test_restore_copies_only_pages_of_a_window_that_differ(mem):
    big = Image.from_bytes(bytes([7]) * SIZE)
    before = mem.snapshot()
    mem.map(0, big)
    mem[PAGE] = 1
    mem[3 * PAGE] = 1
    mem.restore(before)
    copied = sum(m.figures["Anonymous"] for m in smaps(mem.as_ptr(), mem.as_ptr() + SIZE))
    assert copied == 2 * REAL_PAGE
    assert mem[:] == OWN


def test_a_restore_of_all_memories_writes_into_windows(img):
    with linmem.create(SIZE) as one, linmem.create(SIZE) as two:
        images = [one.snapshot(), two.snapshot()]
        one.map(0, img)
        two[0] = 1
        restore_all([one, two], images)
        assert (one[:], two[:]) == (bytes(SIZE), bytes(SIZE))


@pytest.mark.parametrize("place", [0, PAGE, 3 * PAGE])
def test_a_window_over_the_image_that_a_memory_started_from(place):
    start = Image.from_bytes(b"s" * 4 * PAGE, PAGE)
    with start.new_memory(minimum=SIZE, maximum=2 * SIZE) as mem:
        fresh = mem[:]
        mem.map(place, Image.from_bytes(b"w" * 2 * PAGE))
        wanted = fresh[:place] + b"w" * 2 * PAGE + fresh[place + 2 * PAGE:]
        assert mem[:] == wanted == bytes(mem.snapshot())
        assert mem.dirty_pages(start) == [(place, 2 * PAGE)]
        mem.unmap(0, SIZE)
        assert mem[:] == fresh[:place] + bytes(2 * PAGE) + fresh[place + 2 * PAGE:]
        mem.restore(start)
        assert mem[:] == fresh
        assert mem.dirty_pages(start) == []
        mem.map(place, Image.from_bytes(b"w" * 2 * PAGE))
        mem.restore(start)
        assert mem[:] == fresh


def test_access_r_is_a_protection_that_protect_can_change(mem, img):
    mem.protect(0, 2 * PAGE, "none")
    mem.map(PAGE, img, access="r")
    assert mem[PAGE:6 * PAGE] == IMAGE
    with pytest.raises(ValueError, match="access 'none'"):
        mem[0]
    with pytest.raises(ValueError, match="access 'r'"):
        mem[PAGE] = 1
    with pytest.raises(TypeError, match="protected pages"):
        mem.restore(img)
    mem.protect(0, SIZE, "rw")
    mem[PAGE] = 1
    assert mem[PAGE:PAGE + 5] == b"\1mage"
    mem.map(0, img, access="r")
    mem.unmap(0, 2 * PAGE)
    mem.write(0, b"z" * 2 * PAGE)
    with pytest.raises(ValueError, match=f"the page at {2 * PAGE} has the access 'r'"):
        mem[2 * PAGE] = 1
    mem.map(0, img)
    mem.write(0, b"z" * SIZE)


def test_a_memory_whose_every_page_is_read_only_exports_read_only_buffers(img):
    with linmem.create(5 * PAGE) as mem:
        mem.map(0, img, access="r")
        with memoryview(mem) as view:
            assert view.readonly
            assert view == IMAGE


@requires("maps", "file_memories")
def test_discard_gives_zeros_and_writes_them_through(mem, img, path):
    mem.map(0, img)
    with path.open("r+b") as file:
        mem.map(5 * PAGE, file, 0, 2 * PAGE)
    mem.discard(PAGE, 5 * PAGE)
    assert mem[:] == IMAGE[:PAGE] + bytes(5 * PAGE) + b"f" * PAGE + OWN[7 * PAGE:]
    assert path.read_bytes() == bytes(PAGE) + b"f" * (PAGE + 7)
    assert len(sources_of(mem, 5 * PAGE, 7 * PAGE)) == 1
    assert sources_of(mem, PAGE, 5 * PAGE) == []
    mem.discard(10, 5)
    assert mem[:20] == IMAGE[:10] + bytes(5) + IMAGE[15:20]
    mem.discard()
    assert mem[:] == bytes(SIZE)
    mem.map(0, img, access="r")
    with pytest.raises(TypeError, match=r"discard.*with protected pages"):
        mem.discard(0, PAGE)


def test_prefault_changes_no_byte_of_a_window(mem, img):
    mem.map(0, img)
    mem.prefault()
    assert mem[:] == IMAGE + OWN[5 * PAGE:]
    assert mem.info().resident == SIZE


@requires("maps", "real_pages")
def test_the_pages_of_a_window_go_with_the_memory(path):
    with path.open("rb") as file, linmem.create(SIZE) as mem:
        mem.map(0, file)
        assert any(str(path) in m.name for m in mappings())
    assert not any(str(path) in m.name for m in mappings())


@requires("maps", "file_memories")
@pytest.mark.parametrize("image", [None, Image.from_bytes(b"start" * PAGE)])
@pytest.mark.parametrize("reset", ["adaptive", pytest.param("scan", marks=requires("scans")), "zero", "discard"])
@pytest.mark.parametrize("upstream", [linmem.MmapCreator, lambda: linmem.MmapCreator(prefault=True),
                                      linmem.PoolingCreator], ids=["mmap", "prefault", "pool"])
def test_a_pool_hands_no_window_to_the_next_tenant(path, reset, upstream, image):
    pool = linmem.PoolingCreator(upstream(), reset=reset, check=True, keep_resident=1 << 20)
    secret = Image.from_bytes(b"secret" * PAGE)

    def make():
        return pool.create(SIZE, maximum=2 * SIZE) if image is None else image.new_memory(
            minimum=SIZE, maximum=2 * SIZE, creator=pool)

    with make() as mem:
        fresh, base = mem[:], mem.as_ptr()
        own = sources_of(mem)
    for _ in range(3):
        with make() as mem:
            assert mem.as_ptr() == base
            mem.grow_to(2 * SIZE)
            mem.map(PAGE, secret)
            mem.map(9 * PAGE, secret)
            with path.open("r+b") as file:
                mem.map(8 * PAGE, file, 0, PAGE)
            mem.map(0, secret, 0, PAGE, "r")
        assert files_within(base, base + 2 * SIZE) in (own, [])     # the image of the slot is mapped anew, or copied
        with make() as mem:
            assert mem.as_ptr() == base
            assert mem[:] == fresh
            assert sources_of(mem) in (own, [])
            mem.grow_to(2 * SIZE)
            assert mem[SIZE:] == bytes(SIZE)
            mem.write(0, b"x" * 2 * SIZE)
    assert path.read_bytes() == b"f" * (2 * PAGE + 7)
    assert pool.stats()["misses"] == 1


@requires("fork", "file_memories")
def test_a_forked_child_has_the_windows(path):
    assert answer(FORKING + f"""
import linmem
PAGE, SIZE, OWN = {PAGE}, {SIZE}, bytes([7]) * {SIZE}
mem = linmem.create(SIZE)
mem.write(0, OWN)
img = linmem.Image.from_bytes(b"image" * PAGE)
mem.map(0, img, 0, PAGE)
with open({str(path)!r}, "r+b") as file:
    mem.map(PAGE, file, 0, PAGE)

def work():
    assert mem[:2 * PAGE] == bytes(img)[:PAGE] + b"f" * PAGE
    mem[0] = mem[PAGE] = 1
    mem.unmap(PAGE, PAGE)
    mem.map(2 * PAGE, img)
    assert mem[2 * PAGE:7 * PAGE] == bytes(img)
    mem.close()

child(os.fork, work)
assert mem[:2 * PAGE] == bytes(img)[:PAGE] + bytes([1]) + b"f" * (PAGE - 1)
assert mem[2 * PAGE:] == OWN[2 * PAGE:]
print("done")
""") == "done"


@requires("fork")
def test_a_child_that_is_forked_during_a_map_can_use_the_memory():
    assert answer(FORKING + f"""
import linmem
PAGE, SIZE = {PAGE}, {SIZE}
img = linmem.Image.from_bytes(b"image" * PAGE)
mem = linmem.create(SIZE)
stop = threading.Event()

def remap():
    while not stop.is_set():
        mem.map(0, img)
        mem.map(PAGE, img, 0, PAGE, "r")
        mem.unmap(0, SIZE)

def work():
    mem.map(0, img)
    mem.unmap(0, SIZE)
    mem.protect(0, SIZE, "rw")
    mem.discard()
    mem.restore(img, zero_grown=True)
    assert mem[:] == bytes(img) + bytes(3 * PAGE)
    mem.close()

worker = threading.Thread(target=remap)
worker.start()
try:
    for _ in range(30):
        child(os.fork, work)
finally:
    stop.set()
    worker.join()
print("done")
""") == "done"


def test_threads_that_map_and_read_see_whole_pages_of_one_source():
    letters = [Image.from_bytes(bytes([n]) * 4 * PAGE) for n in range(1, 4)]
    with linmem.create(4 * PAGE) as mem:
        stop, errors = threading.Event(), []

        def change(img):
            while not stop.is_set():
                mem.map(0, img)

        def look():
            try:
                for _ in range(200):
                    assert len(set(mem[PAGE:PAGE + 64])) <= 2   # a read may be cut in two by one change
                    assert max(bytes(mem.snapshot())) <= 3
                    mem.dirty_pages(letters[0])
            except BaseException as error:
                errors.append(error)
            finally:
                stop.set()

        workers = [threading.Thread(target=change, args=(img,)) for img in letters] + [threading.Thread(target=look)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert errors == []


# -- guests

GUEST = """(module (memory (export "memory") 8 10)
  (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "store") (param i32 i32) (i32.store8 (local.get 0) (local.get 1)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "fill") (param i32 i32 i32) (memory.fill (local.get 0) (local.get 1) (local.get 2)))
  (func (export "copy") (param i32 i32 i32) (memory.copy (local.get 0) (local.get 1) (local.get 2))))"""
WASM_PAGE = 65536
INPUT = b"0123456789abcdef" * (WASM_PAGE // 16)


class Guest:
    def __init__(self, creator=None):
        config = wasmtime.Config()
        linmem.wasmtime.install(config, creator)
        engine = wasmtime.Engine(config)
        self.store = wasmtime.Store(engine)
        exports = wasmtime.Instance(self.store, wasmtime.Module(engine, GUEST), []).exports(self.store)
        self.exports = exports
        self.mem = linmem.wasmtime.linear_memory(self.store, exports["memory"])

    def call(self, name, *arguments):
        return self.exports[name](self.store, *arguments)


@pytest.mark.parametrize("access", ["rw", "r"])
def test_a_guest_reads_fills_and_copies_a_window_of_an_image(access):
    guest = Guest()
    img = Image.from_bytes(INPUT)
    guest.mem.map(WASM_PAGE, img, access=access)        # "r" would end the process at the memory.fill
    assert [guest.call("load", WASM_PAGE + n) for n in (0, 17, WASM_PAGE - 1)] == [ord("0"), ord("1"), ord("f")]
    guest.call("store", WASM_PAGE, 1)
    guest.call("fill", WASM_PAGE + 1, 2, 12288)
    guest.call("copy", WASM_PAGE + 16384, WASM_PAGE, 8192)
    guest.call("copy", 0, WASM_PAGE + 32768, 4096)
    expected = bytearray(INPUT)
    expected[:12288 + 1] = b"\1" + b"\2" * 12288
    expected[16384:24576] = expected[:8192]
    assert guest.mem[WASM_PAGE:2 * WASM_PAGE] == expected
    assert guest.mem[:4096] == INPUT[32768:36864]
    assert bytes(img) == INPUT
    assert guest.call("grow", 2) == 8
    assert guest.mem[WASM_PAGE:] == expected + bytes(8 * WASM_PAGE)
    guest.mem.unmap(WASM_PAGE, WASM_PAGE)
    assert guest.call("load", WASM_PAGE) == 0
    guest.store.close()


@pytest.mark.parametrize("access", ["rw", "r"])
def test_a_file_is_copied_into_the_memory_of_a_guest_so_that_no_other_program_can_end_the_process(tmp_path, access):
    guest = Guest()
    path = tmp_path / "input"
    path.write_bytes(INPUT[:-5])
    with path.open("rb") as file:
        guest.mem.map(WASM_PAGE, file, access=access)
    os.truncate(path, 0)
    assert guest.mem[WASM_PAGE:2 * WASM_PAGE] == INPUT[:-5] + bytes(5)
    guest.call("fill", WASM_PAGE, 3, WASM_PAGE)
    assert guest.call("load", 2 * WASM_PAGE - 1) == 3
    guest.store.close()


def test_a_file_that_does_not_fit_is_not_copied_for_a_guest(path, monkeypatch):
    guest = Guest()
    monkeypatch.setattr(sparse, "pieces_of_file", None)     # a call raises TypeError
    with path.open("rb") as file, pytest.raises(ValueError, match="byte_size"):
        guest.mem.map(guest.mem.byte_size(), file)
    guest.store.close()


@requires("real_pages")
def test_a_file_for_update_is_not_mapped_into_the_memory_of_a_guest(path):
    guest = Guest()
    with path.open("r+b") as file:
        for access in ("r", "rw"):
            with pytest.raises(linmem.OwnedError, match="that another program cuts short would end the process"):
                guest.mem.map(0, file, access=access)
    guest.call("fill", 0, 1, WASM_PAGE)
    assert path.read_bytes() == b"f" * (2 * PAGE + 7)
    guest.store.close()


class Shows(linmem.MemoryCreator):
    """A creator in Python that maps a source into each memory."""

    def __init__(self, source):
        self.source = source

    def new_memory(self, ty, *how):
        mem = linmem.MmapCreator().new_memory(ty, *how)
        mem.map(WASM_PAGE, self.source)
        return mem


@requires("real_pages")
def test_a_memory_that_shows_a_file_is_not_given_to_a_guest(path):
    with path.open("rb") as file, pytest.raises(wasmtime.WasmtimeError,
                                                match="without pages of a file that another program can cut short"):
        Guest(Shows(file))


def test_a_creator_may_map_an_image_into_the_memory_that_a_guest_gets():
    img = Image.from_bytes(INPUT)
    guest = Guest(Shows(img))
    assert guest.call("load", WASM_PAGE + 1) == ord("1")
    guest.call("fill", WASM_PAGE, 1, WASM_PAGE)
    assert bytes(img) == INPUT
    guest.store.close()


def test_a_snapshot_of_a_guest_holds_what_its_windows_show():
    guest = Guest()
    before = guest.mem.snapshot()
    guest.mem.map(WASM_PAGE, Image.from_bytes(INPUT))
    shown = guest.mem.snapshot()
    guest.mem.restore(before)
    assert guest.call("load", WASM_PAGE) == 0
    guest.mem.restore(shown)
    assert guest.call("load", WASM_PAGE + 1) == ord("1")
    guest.store.close()


@requires("few_mappings")
def test_a_map_that_finds_the_table_of_mappings_full_is_a_page_error():
    done = run_child(f"""
        import linmem, mmap
        img = linmem.Image.from_bytes(b"x" * {4 * PAGE})
        mem = linmem.create({SIZE})
        mem.write(0, b"o" * {SIZE})
        held = []
        try:
            while True:
                held.append(mmap.mmap(-1, {REAL_PAGE}, prot=mmap.PROT_READ if len(held) % 2 else mmap.PROT_WRITE))
        except OSError:
            pass
        try:
            mem.map({PAGE}, img)
        except linmem.PageError as error:
            text = str(error)
        held.clear()
        assert "map of {4 * PAGE} bytes failed" in text and "vm.max_map_count" in text, text
        assert mem[:] in (b"o" * {SIZE}, b"o" * {PAGE} + bytes({4 * PAGE}) + b"o" * {3 * PAGE})
        mem.map({PAGE}, img)
        assert mem[{PAGE}] == ord("x")
        print("done")
    """)
    assert done.stdout.strip() == "done", done.stderr


# -- the example: an input of 100 MiB in several guests

@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """examples/mapped_input.py as a module, an engine, and the guest's compiled module."""
    spec = importlib.util.spec_from_file_location("mapped_input", ROOT / "examples" / "mapped_input.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    made.path = rebuilt(ROOT / "examples" / "mapped_input.c", tmp_path_factory.mktemp("example"))
    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.MmapCreator())
    made.engine = wasmtime.Engine(config)
    made.module = wasmtime.Module.from_file(made.engine, made.path)
    yield made
    del made.module, made.engine


@requires("zig", "smaps", "sources")
def test_guests_read_an_input_of_a_hundred_mib_of_which_no_page_is_copied(example):
    line = b"a line of text, and\0zeros\n"
    size = (100 << 20) + 13
    source = Image.from_pieces([(n << 20, line * 100) for n in range(100)], size)
    guests = [example.Guest(example.engine, example.module) for _ in range(3)]
    for guest in guests:
        assert guest.count_lines(source) == 100 * 100
        with guest.showing(source) as address:
            memory = linmem.wasmtime.linear_memory(guest.store, guest.exports["memory"])
            assert guest.call("count_lines", address, size) == 100 * 100
            start = memory.as_ptr() + address
            window = [m for m in smaps(start, start + size + PAGE) if "memfd" in m.name or "linmem" in m.name]
            assert sum(m.size for m in window) >= size
            assert sum(m.figures["Anonymous"] for m in window) == 0
            memory[address] = ord("\n")         # one page of this guest alone
            assert guest.call("count_lines", address, size) == 100 * 100 + 1
        assert memory[address] == 0
        assert guest.count_lines(source) == 100 * 100
    for guest in guests:
        guest.store.close()


@requires("zig", "sources")
def test_the_example_counts_the_lines_of_files(example, tmp_path, capsys):
    for name, text in (("one", b"1\n2\n3"), ("two", b"\n" * 5000)):
        (tmp_path / name).write_bytes(text)
    example.main(str(example.path), str(tmp_path / "one"), str(tmp_path / "two"))
    assert capsys.readouterr().out.split() == ["2", str(tmp_path / "one"), "5000", str(tmp_path / "two")]


@requires("zig", "sources")
def test_a_guest_that_gives_no_room_or_a_wrong_address_is_refused(example):
    guest = example.Guest(example.engine, example.module)
    source = Image.from_bytes(b"x" * PAGE)
    call = guest.call
    for answer_, error in ((0, MemoryError), (1, ValueError), (-65536, ValueError)):
        guest.call = lambda name, *how, value=answer_: value if name == "input_room" else call(name, *how)
        with pytest.raises(error):
            guest.count_lines(source)
    guest.store.close()
