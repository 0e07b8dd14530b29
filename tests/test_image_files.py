"""Files of images and deltas: their content, forged files, and the files that a killed process leaves."""

from __future__ import annotations

import functools
import hashlib
import itertools
import multiprocessing.resource_sharer
import os
import pickle
import random
import re
import signal
import socket
import struct
import time
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT, answer, mappings, new_process, requires, smaps, start_child

import linmem
from linmem import Delta, FileFormatError, Image
from linmem._files import sparse as sparse_file
from linmem._wasm.snapshot_file import open_state, save_state
from linmem._wasm.state import GlobalState, MemoryState, Reference, State, TableState

PAGE, GROUP = 4096, 65536
MOST_ZEROED = 64 << 30
HEADER = 224


def sparse(size, places, offset=0):
    """An image with one stored page at each place, and zeros elsewhere."""
    return Image.from_pieces([(offset + place, bytes([7 + place // PAGE % 200]) * min(PAGE, size - place))
                              for place in places], size, offset)


def blocks(delta):
    """offset -> new bytes of a page, or None for zeros. On hosts with larger pages, stored ranges may hold pages of
    zeros."""
    return {at + i: part if part is None or any(part) else None
            for at, size, data in delta.pieces() for i in range(0, size, PAGE)
            for part in [None if data is None else bytes(data[i:i + PAGE])]}


@pytest.fixture
def image():
    return sparse(5 * GROUP, [0, PAGE, 3 * PAGE, GROUP, 3 * GROUP + 5 * PAGE])


@pytest.fixture
def delta(image):
    with image.new_memory() as mem:
        mem[5000] = 1
        mem[GROUP:GROUP + PAGE] = bytes(PAGE)
        mem[4 * GROUP + 9] = 9
        return image.diff(mem)


@pytest.fixture(params=["in place", "packed"])
def saved(request, image, tmp_path):
    path = tmp_path / "one.image"
    image.save(path, packed=request.param == "packed")
    return path


def field(path, at, kind="<Q"):
    return struct.unpack_from(kind, path.read_bytes(), at)[0]


def seal(data, table=True):
    """The file with valid digests over its content, as an attacker would write it."""
    data = bytearray(data)
    if len(data) >= HEADER:
        start, count = struct.unpack_from("<QQ", data, 64)
        if table and start + 16 * count <= len(data):
            data[160:192] = hashlib.blake2b(data[start:start + 16 * count], digest_size=32).digest()
        data[192:224] = hashlib.blake2b(data[:192], digest_size=32).digest()
    return bytes(data)


# -- round trips --------------------------------------------------------------------------------------------

contents = st.lists(st.tuples(st.integers(0, 40 * PAGE), st.integers(1, 3 * PAGE), st.integers(1, 255)), max_size=5)


@given(size=st.integers(0, 40 * PAGE), offset=st.sampled_from([0, 1, PAGE, GROUP, GROUP + 5, 3 * GROUP - 1]),
       contents=contents, packed=st.booleans(), verify=st.booleans(), mapped=st.booleans())
def test_an_image_comes_back_as_it_was_saved(tmp_path_factory, size, offset, contents, packed, verify, mapped):
    data = bytearray(size)
    for at, n, value in contents:
        data[at:at + n] = bytes([value]) * len(data[at:at + n])
    image = Image.from_bytes(data, offset)
    path = tmp_path_factory.mktemp("there") / "image"
    image.save(path, packed=packed)
    back = Image.open(path, verify, map=mapped)
    assert (back.size, back.offset, bytes(back)) == (size, offset, data)
    assert (back.digest, back.runs()) == (image.digest, image.runs())
    back.verify()
    with back.new_memory(maximum=offset + size + GROUP) as mem:
        assert mem.read(offset, size) == data
        mem.grow_to(offset + size + GROUP)
        assert not any(mem.read(0, offset))
        assert not any(mem.read(offset + size, GROUP))


@given(size=st.integers(1, 30 * PAGE), contents=contents, changes=contents, grown=st.sampled_from([0, 1, GROUP]))
def test_a_delta_comes_back_as_it_was_saved(tmp_path_factory, size, contents, changes, grown):
    with linmem.create(size, maximum=size + grown) as mem:
        for at, n, value in contents:
            mem[at:at + n] = bytes([value]) * len(mem[at:at + n])
        before = mem.snapshot()
        mem.grow_to(size + grown)
        for at, n, value in changes:
            mem[at:at + n] = bytes([value if value < 128 else 0]) * len(mem[at:at + n])
        for delta in (before.diff(mem), before.diff(mem.snapshot())):
            path = tmp_path_factory.mktemp("there") / "delta"
            delta.save(path)
            back = Delta.open(path)
            assert blocks(back) == blocks(delta)
            for name in ("base", "base_size", "size", "target"):
                assert getattr(back, name) == getattr(delta, name)
            assert before.apply(back) == mem.snapshot()


ends = st.sampled_from([0, 1, 100, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 5, 3 * PAGE + 7, GROUP, GROUP + PAGE + 3])
small_image = st.builds(
    lambda size, offset, marks: Image.from_bytes(marked(size, marks), offset), ends,
    st.sampled_from([0, 0, 1, PAGE, PAGE + 50]),
    st.lists(st.tuples(st.integers(0, GROUP), st.integers(1, 2 * PAGE), st.sampled_from(b"\0ab")), max_size=3))


def marked(size, marks):
    content = bytearray(size)
    for at, length, byte in marks:
        if at < size:
            content[at:at + length] = bytes([byte]) * min(length, size - at)
    return bytes(content)


@given(images=st.lists(small_image, min_size=2, max_size=5))
def test_a_chain_of_deltas_over_images_of_any_size_comes_back_from_a_file(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("delta") / "it"
    deltas = [before.diff(after) for before, after in itertools.pairwise(images)]
    from_the_left = functools.reduce(Delta.then, deltas)
    from_the_right = functools.reduce(lambda later, earlier: earlier.then(later), reversed(deltas))
    for delta in (*deltas, from_the_left, from_the_right):
        delta.save(path)
        again = Delta.open(path)
        first = images[deltas.index(delta) if delta in deltas else 0]
        assert (again.target, first.apply(again)) == (delta.target, first.apply(delta))
    assert images[0].apply(from_the_left) == images[0].apply(from_the_right) == images[-1]


@pytest.mark.parametrize("kind", ["image", "memory"])
def test_a_chain_over_an_end_inside_a_page_names_whole_pages(tmp_path, kind):
    # Before byte 1 the first two images are equal, and after byte 1 the first image is zero. So no byte of the page
    # differs.
    first, second, third = Image.from_bytes(bytes(100)), Image.from_bytes(b"\0"), Image.from_bytes(bytes(3 * PAGE + 7))
    with linmem.create(1) as mem:
        cut = first.diff(second if kind == "image" else mem)
    assert (cut.ranges, cut.zeros) == ((), ((0, 1),))
    chain = cut | (second if kind == "image" else Image.from_bytes(b"\0")).diff(third)
    assert (chain.ranges, chain.zeros) == ((), ((0, PAGE),))
    chain.save(tmp_path / "it")
    assert first.apply(Delta.open(tmp_path / "it")) == third


def test_a_chain_of_hand_made_deltas_zeroes_bytes_that_were_cut_off():
    first = Image.from_bytes(b"a" * 100)
    cut = Delta(first.digest, 100, 1, [], [], b"", Image.from_bytes(b"a").digest)
    chain = cut | Image.from_bytes(b"a").diff(Image.from_bytes(b"a" + bytes(PAGE)))
    assert first.apply(chain) == Image.from_bytes(b"a" + bytes(PAGE))


def test_a_file_can_be_named_in_any_way_that_python_knows(tmp_path, image, delta):
    path = tmp_path / "naïve"
    for name in (path, str(path), os.fsencode(path)):
        image.save(name)
        assert Image.open(name) == image
        delta.save(name)
        assert blocks(Delta.open(name)) == blocks(delta)
    with pytest.raises(TypeError):
        image.save(7.5)


@requires("sources")
def test_the_header_is_the_one_that_the_page_describes(saved, image):
    page = (ROOT / "docs" / "reference" / "file-format.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d+) \| `?(\w+)`? \|", page, flags=re.M)
    first, last = rows.index(("0", "8", "group")), rows.index(("0", "4", "version"))
    header = rows[:first]
    for table, size in ((header, HEADER), (rows[first:last], 16), (rows[last:last + 8], 32)):
        ends = [int(at) + int(n) for at, n, _ in table]
        assert [int(at) for at, _, _ in table] == [0, *ends[:-1]]
        assert ends[-1] == size
    data = saved.read_bytes()
    values = {name: data[int(at):int(at) + int(n)] for at, n, name in header}
    number = {name: int.from_bytes(value, "little") for name, value in values.items()}
    assert values["magic"] == b"\x89LINMEM\n"
    packed = number["layout"] == 2
    assert (number["version"], number["kind"], number["header_size"]) == (2 if packed else 1, 1, HEADER)
    start = HEADER if packed else GROUP
    assert (number["group_size"], number["page_size"], number["data_offset"]) == (GROUP, PAGE, start)
    assert (number["size"], number["offset"], number["base_size"]) == (image.size, 0, 0)
    assert values["digest"].hex() == image.digest
    assert (number["base_digest"], number["reserved"], number["target_offset"]) == (0, 0, 0)
    assert number["table_offset"] == start + number["data_size"]
    assert number["count"] == 3
    assert len(data) == number["table_offset"] + 16 * number["count"]
    assert hashlib.blake2b(data[:192], digest_size=32).digest() == values["header_digest"]
    assert hashlib.blake2b(data[number["table_offset"]:], digest_size=32).digest() == values["table_digest"]


def test_a_reader_that_knows_only_the_page_gets_the_same_bytes(saved, image):
    data = saved.read_bytes()
    size, _, _, data_at, data_size, table_at, count, layout = struct.unpack_from("<QQQQQQQI", data, 24)
    found = bytearray(size)
    packed_at = data_at
    for i in range(count):
        group, mentioned, stored, crc = struct.unpack_from("<QHHI", data, table_at + 16 * i)
        assert mentioned == stored
        pages = []
        for k in range(16):
            if stored >> k & 1:
                at = packed_at if layout == 2 else data_at + group * GROUP + k * PAGE
                packed_at += PAGE
                pages.append(data[at:at + PAGE])
                found[group * GROUP + k * PAGE:group * GROUP + (k + 1) * PAGE] = pages[-1]
        assert zlib.crc32(b"".join(pages)) == crc
    assert found == bytes(image)
    assert data_size == (image.size if layout == 1 else 5 * PAGE)


# -- space ----------------------------------------------------------------------------------------------------

@requires("holes")
def test_zeros_take_no_space_on_the_disk(tmp_path):
    image = sparse(64 << 20, range(0, 64 << 20, 100 * PAGE))
    stored = image.info().stored
    image.save(tmp_path / "in place")
    image.save(tmp_path / "packed", packed=True)
    in_place, packed = os.stat(tmp_path / "in place"), os.stat(tmp_path / "packed")
    assert in_place.st_size > image.size
    assert stored <= in_place.st_blocks * 512 <= 2 * stored
    assert stored < packed.st_size < stored + 2 * GROUP


def test_a_file_holds_its_pages_where_any_host_can_map_them(tmp_path, image):
    image.save(tmp_path / "image")
    assert field(tmp_path / "image", 48) % GROUP == 0
    data = (tmp_path / "image").read_bytes()
    assert data[GROUP:GROUP + image.size] == bytes(image)


@requires("smaps")
def test_an_image_in_place_is_mapped_and_not_read(tmp_path):
    dense = Image.from_bytes(random.Random(1).randbytes(8 << 20))
    dense.save(tmp_path / "image")
    before = {(m.start, m.end) for m in mappings()}
    opened = Image.open(tmp_path / "image")
    assert opened.info().kind == "file"
    (mapping,) = [m for m in mappings() if (m.start, m.end) not in before and m.name.endswith("/image")]
    assert mapping.size == dense.size
    assert smaps(mapping.start, mapping.end)[0].figures["Rss"] == 0
    opened.verify()
    assert smaps(mapping.start, mapping.end)[0].figures["Rss"] == dense.size


def test_an_image_that_is_read_does_not_need_its_file_any_more(saved, image):
    opened = Image.open(saved, map=False)
    with open(saved, "r+b") as file:
        file.truncate(0)
    assert opened == image


def test_writes_to_a_memory_of_an_opened_image_do_not_reach_the_file(saved, image):
    before = saved.read_bytes()
    opened = Image.open(saved)
    with opened.new_memory() as mem:
        mem[:] = b"\xff" * len(mem)
    assert saved.read_bytes() == before
    assert opened == image


@requires("fork")
def test_an_opened_image_keeps_the_file_that_it_was_opened_from(tmp_path, image):
    path = tmp_path / "image"
    image.save(path)
    opened = Image.open(path)
    other = sparse(image.size, [7 * PAGE])
    other.save(path)
    assert opened == image
    opened.verify()
    assert Image.open(path, verify=True) == other


def test_the_modules_for_files_are_not_imported_before_a_file_is_named():
    assert answer("""
        import sys, linmem
        image = linmem.Image.from_bytes(bytes(5))
        late = {"linmem._files.image_file", "linmem._core.process_handles", "zlib", "hashlib"}
        print(late & set(sys.modules))
        """) == "set()"


# -- whole or not at all ------------------------------------------------------------------------------------

SAVES = """
import os, signal, sys, traceback
import linmem
from linmem._wasm.snapshot_file import save_state
from linmem._wasm.state import MemoryState, State
path, kind = sys.argv[1:]
new = linmem.Image.from_bytes(bytes(70000) + b"new" * 100000)
if kind == "snapshot":
    state = State("ab" * 32, (MemoryState(0, new.size, new),), (), ())
    save = lambda: save_state(state, path)
else:
    save = lambda: new.save(path)

def dies_at(function, taken=[0]):
    def step(*args, **named):
        for when in range(2):           # before the call and after it
            taken[0] += 1
            if taken[0] == int(steps):
                os.kill(os.getpid(), signal.SIGKILL)
            if when == 0:
                result = function(*args, **named)
        return result
    return step

from linmem._files import atomic_file
import builtins
class File:
    def __init__(self, file):
        self.file = file
    def __enter__(self):
        return self
    def __exit__(self, *exc):
        dies_at(self.file.close)()
    def __getattr__(self, name):
        return dies_at(getattr(self.file, name))
# Runs a process for each requested step and prints its exit status.
for steps in sys.stdin:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            atomic_file.open = lambda *args, **named: File(builtins.open(*args, **named))
            for name in ("open", "fsync", "replace", "close", "fchmod"):
                setattr(os, name, dies_at(getattr(os, name)))
            save()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@requires("fork")
@pytest.mark.parametrize("kind", ["image", "snapshot"])
def test_a_process_killed_at_any_step_leaves_the_old_file_or_the_new_one(tmp_path, kind):
    path = tmp_path / "image"
    old = sparse(4 * GROUP, [0, GROUP])
    new = Image.from_bytes(bytes(70000) + b"new" * 100000)

    def read():
        return Image.open(path, verify=True) if kind == "image" else open_state(path, verify=True).memories[0].image

    def save(image):
        if kind == "image":
            image.save(path)
        else:
            save_state(State("ab" * 32, (MemoryState(0, image.size, image),), (), ()), path)

    save(old)
    seen, most = [], 0
    with start_child(SAVES, path, kind) as saves:
        for step in itertools.count(1):
            save(old)
            left = [name for name in os.listdir(tmp_path) if name != "image"]
            assert left == []
            print(step, file=saves.stdin, flush=True)
            ended = saves.stdout.readline().strip()
            most = max(most, len(os.listdir(tmp_path)) - 1)
            assert all(re.fullmatch(r"\.linmem-[0-9a-f]{16}\.tmp|image", name) for name in os.listdir(tmp_path))
            found = read()
            assert found in (old, new)
            seen.append(found == new)
            if ended == "0":
                break
            assert ended == str(-signal.SIGKILL)
    assert step > 20                        # open, lock, write, flush, fsync, rename, fsync again
    assert seen == sorted(seen)             # first the old file, and from the rename on the new file
    assert seen[0] is False
    assert seen[-2] is True
    assert most == 1
    # The next save removed the files of killed writers, and the last writer was not killed.
    assert os.listdir(tmp_path) == ["image"]


@requires("fork")
def test_a_process_killed_at_any_time_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "image"
    images = [Image.from_bytes(random.Random(i).randbytes(1 << 20)) for i in range(2)]
    for i, image in enumerate(images):
        image.save(tmp_path / f"source{i}")
    images[0].save(path)
    code = """
        import sys, linmem
        images = [linmem.Image.open(source, map=False) for source in sys.argv[2:]]
        print("ready", flush=True)
        while True:
            for image in images:
                image.save(sys.argv[1])
        """
    rnd = random.Random(5)
    for _ in range(12):
        with start_child(code, path, tmp_path / "source0", tmp_path / "source1") as child:
            try:
                assert child.stdout.readline() == "ready\n"
                time.sleep(rnd.random() * 0.05)
            finally:
                child.kill()
        assert Image.open(path, verify=True) in images


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, image, call):
    path = tmp_path / "image"
    image.save(path)

    def refuse(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(OSError, match="No space left"):
        sparse(GROUP, [0]).save(path)
    assert os.listdir(tmp_path) == ["image"]
    assert Image.open(path, verify=True) == image


@requires("rlimits")
def test_a_disk_that_fills_up_leaves_the_old_file_and_nothing_else(tmp_path, image):
    path = tmp_path / "image"
    image.save(path)
    said = answer(f"""
        import resource, signal
        import linmem
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        image = linmem.Image.from_bytes(b"x" * (4 << 20))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            image.save({str(path)!r})
        except OSError as error:
            print(error.errno)
        """)
    assert said == "27"         # EFBIG
    assert os.listdir(tmp_path) == ["image"]
    assert Image.open(path, verify=True) == image


@requires("fork")
def test_a_save_follows_a_symbolic_link_and_gives_the_rights_of_a_new_file(tmp_path, image):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "image")
    before = os.umask(0o027)
    try:
        image.save(tmp_path / "link")
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "image").stat().st_mode & 0o777 == 0o640
    assert Image.open(tmp_path / "there" / "image") == image


def test_a_folder_that_is_not_there_is_named(tmp_path, image):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        image.save(tmp_path / "nowhere" / "image")
    with pytest.raises(FileNotFoundError, match="nothing"):
        Image.open(tmp_path / "nothing")


# -- damaged and forged files -----------------------------------------------------------------------------------

def refused(path, **how):
    with pytest.raises(FileFormatError) as caught:
        Image.open(path, **how)
    error = caught.value
    assert isinstance(error, ValueError)
    assert str(path) in str(error)
    assert (error.path, error.field in str(error), str(error.value) in str(error)) == (str(path), True, True)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error


def test_a_file_cut_short_anywhere_is_refused(saved):
    data = saved.read_bytes()
    end = len(data)
    lengths = {*range(0, 300, 7), HEADER - 1, HEADER, *range(GROUP - 2, end, 3001), *range(end - 50, end)}
    for length in sorted(lengths):
        saved.write_bytes(data[:length])
        refused(saved)
    saved.write_bytes(data + b"\0")
    assert refused(saved).field == "file size"


def test_a_later_version_is_refused_by_its_number(saved):
    data = bytearray(saved.read_bytes())
    data[8:10] = (3).to_bytes(2, "little")
    for harm in (data, data[:12], seal(data)):
        saved.write_bytes(harm)
        error = refused(saved)
        assert (error.field, error.value) == ("version", 3)
        assert "1 or 2, which is all that this linmem reads" in str(error)


def test_a_file_that_linmem_did_not_write_is_refused(tmp_path):
    for data in (b"", b"\0asm\1\0\0\0", b"\x89PNG\r\n\x1a\n" * 100, b"\x89LINMEM\r\n" + bytes(500), os.urandom(300)):
        (tmp_path / "other").write_bytes(data)
        assert refused(tmp_path / "other").field == "magic"


@requires("fork")
def test_a_file_that_is_not_regular_is_refused_immediately(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe").field == "file"
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(tmp_path)      # the path of a socket must be short
        made.bind("socket")
        assert refused(tmp_path / "socket").field == "file"
    with pytest.raises(IsADirectoryError):
        Image.open(tmp_path)


@requires("descriptors")
def test_a_descriptor_that_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_bytes(bytes(1 << 16))          # a host page, whatever its size
    for path, flags, wrong in ((os.devnull, os.O_RDONLY, "not a regular file"),
                               (tmp_path, os.O_RDONLY, "not a regular file"),
                               (tmp_path / "file", os.O_PATH, r"open without a right to read \(O_PATH\)")):
        fd = os.open(path, flags)
        message = f"^fd must be the descriptor of a regular file that can be read, got {fd}, which is "
        with pytest.raises(ValueError, match=f"{message}{wrong}$"):
            Image.from_fd(fd, PAGE)
        os.close(fd)
        with pytest.raises(ValueError, match=f"{message}not open$"):
            Image.from_fd(fd, PAGE)


def test_a_file_of_a_delta_is_refused_as_an_image_and_vice_versa(tmp_path, image, delta):
    image.save(tmp_path / "image")
    delta.save(tmp_path / "delta")
    assert "1 (an image)" in str(refused(tmp_path / "delta"))
    with pytest.raises(FileFormatError, match=r"kind is 1 \(an image\), must be 2 \(a delta\)"):
        Delta.open(tmp_path / "image")


def test_a_larger_image_than_asked_for_is_refused(saved, delta, image):
    error = refused(saved, max_size=image.size - 1)
    assert (error.field, error.value) == ("size", image.size)
    assert Image.open(saved, max_size=image.size) == image
    with pytest.raises(ValueError, match="max_size"):
        Image.open(saved, max_size=-1)
    delta.save(saved)
    with pytest.raises(FileFormatError, match="max_size"):
        Delta.open(saved, max_size=image.size - 1)


LIES = {
    "kind": (10, "<H", 4), "header_size": (12, "<I", 225), "group_size": (16, "<I", 1 << 31),
    "page_size": (20, "<I", 0), "size": (24, "<Q", (1 << 56) + 1), "offset": (32, "<Q", 1 << 63),
    "base_size": (40, "<Q", 1), "data_offset": (48, "<Q", 2 * GROUP), "data_size": (56, "<Q", 1 << 62),
    "table_offset": (64, "<Q", 1 << 40), "count": (72, "<Q", 1 << 60), "layout": (80, "<I", 0),
    "reserved": (92, "<I", 1), "base_digest": (128, "<Q", 1),
}


@pytest.mark.parametrize("name", LIES)
def test_a_wrong_header_field_is_refused_by_its_name(saved, name):
    at, kind, value = LIES[name]
    if name == "reserved" and field(saved, 8, "<H") > 1:
        at = 84                     # in newer versions the field's first bytes have a meaning
    data = bytearray(saved.read_bytes())
    struct.pack_into(kind, data, at, value)
    saved.write_bytes(data)
    assert refused(saved).field == "header_digest"
    saved.write_bytes(seal(data))
    error = refused(saved)
    assert error.field == name
    assert error.value == value or name in ("reserved", "base_digest")


@pytest.mark.parametrize(("entry", "name", "value"), [
    ((0, 1, 1, 0), "table[1].group", 0),                    # a group twice
    ((5, 1, 1, 0), "table[1].group", 5),                    # a group after the end
    ((1 << 60, 1, 1, 0), "table[1].group", 1 << 60),
    ((1, 0, 0, 0), "table[1].mentioned", "0x0000"),
    ((1, 3, 1, 0), "table[1].stored", "0x0001"),
    ((1, 1, 3, 0), "table[1].stored", "0x0003"),
])
def test_a_wrong_table_entry_is_refused_by_its_number(saved, entry, name, value):
    data = bytearray(saved.read_bytes())
    struct.pack_into("<QHHI", data, field(saved, 64) + 16, *entry)
    saved.write_bytes(data)
    assert refused(saved).field in (name, "table_digest")
    saved.write_bytes(seal(data))
    error = refused(saved)
    assert (error.field, error.value) == (name, value)


@pytest.mark.parametrize(("number", "entry", "name", "value", "bound"), [
    (0, (0, 2, 1), "stored", "0x0001", "within 0x0002"),            # a page that the delta does not have
    (0, (0, 2, 6), "stored", "0x0006", "within 0x0002"),
    (1, (1, 1, 0, 5), "crc", "0x00000005", "0, for no page"),
])
def test_a_wrong_table_entry_of_a_delta_is_refused_by_its_number(tmp_path, image, number, entry, name, value,
                                                                            bound):
    path = tmp_path / "delta"
    Delta(image.digest, image.size, image.size, [(PAGE, PAGE)], [(GROUP, PAGE)], b"x" * PAGE).save(path)
    data = bytearray(path.read_bytes())
    at = field(path, 64)
    assert [struct.unpack_from("<QHH", data, at + 16 * i) for i in range(2)] == [(0, 2, 2), (1, 1, 0)]
    struct.pack_into("<QHHI"[:1 + len(entry)], data, at + 16 * number, *entry)
    path.write_bytes(seal(data))
    with pytest.raises(FileFormatError) as caught:
        Delta.open(path)
    error = caught.value
    assert (error.field, error.value, error.bound) == (f"table[{number}].{name}", value, bound)


def test_pages_that_the_content_does_not_reach_are_refused(tmp_path):
    path = tmp_path / "image"
    sparse(PAGE + 1, [0, PAGE], offset=2 * PAGE).save(path)
    data = bytearray(path.read_bytes())
    at = field(path, 64)
    assert struct.unpack_from("<QHHI", data, at)[:3] == (0, 0b1100, 0b1100)
    for mask in (0b1110, 0b11100):
        struct.pack_into("<HH", data, at + 8, mask, mask)
        path.write_bytes(seal(data))
        error = refused(path)
        assert (error.field, error.bound) == ("table[0].mentioned", "some bits of 0x000c")


@pytest.mark.parametrize("packed", [False, True])
def test_bytes_around_the_content_are_refused(tmp_path, packed):
    path = tmp_path / "image"
    image = Image.from_bytes(b"x" * 100, 5)
    image.save(path, packed=packed)
    data = bytearray(path.read_bytes())
    start = field(path, 48)
    for at in (start + 4, start + 105):
        harm = bytearray(data)
        harm[at] = 1
        table = field(path, 64)
        struct.pack_into("<I", harm, table + 12, zlib.crc32(harm[start:start + PAGE]))
        (tmp_path / "harm").write_bytes(seal(harm))
        assert refused(tmp_path / "harm").field == "padding"
    path.write_bytes(seal(data))
    assert Image.open(path, verify=True) == image


@pytest.mark.parametrize("page", [0, 1, 3, 16, 53])
def test_every_page_that_is_stored_is_verified(saved, image, page):
    packed = field(saved, 80, "<I") == 2
    stored = [0, 1, 3, 16, 53]
    at = field(saved, 48) + (stored.index(page) if packed else page) * PAGE + 77
    with open(saved, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    if packed:
        error = refused(saved)
    else:
        opened = Image.open(saved)          # opening reads no page
        with pytest.raises(FileFormatError) as caught:
            opened.verify()
        error = caught.value
        assert refused(saved, map=False).field == error.field
    assert refused(saved, verify=True).field == error.field
    assert error.field.startswith(f"crc of group {page // 16} ")


def test_bytes_in_a_hole_are_found_when_the_file_is_mapped_or_verified(tmp_path, image):
    path = tmp_path / "image"
    image.save(path)
    for page in (2, 17, 40, 79):
        data = bytearray(path.read_bytes())
        data[GROUP + page * PAGE + 4000] = 1
        harm = tmp_path / f"harm{page}"         # a new file, because some systems cannot replace a mapped file
        harm.write_bytes(data)
        for verify, mapped in ((True, True), (True, False), (False, True)):
            assert refused(harm, verify=verify, map=mapped).field == f"page at {page * PAGE}"
        assert Image.open(harm, map=False) == image         # the check reads stored pages only


STEP = sparse_file.READ_STEP


@pytest.mark.parametrize("at", [0, 1, STEP - 1, STEP, STEP + 1, 2 * STEP - 1, 2 * STEP, 3 * STEP - PAGE - 1])
def test_one_byte_at_any_place_in_a_hole_is_found(tmp_path, at):
    # The hole of 3 steps and a page starts at the second page. The file is written in full, so the reader reads the
    # hole in steps.
    image = sparse(3 * STEP + 3 * PAGE, [0, 3 * STEP + 2 * PAGE])
    image.save(tmp_path / "image")
    with open(tmp_path / "image", "r+b") as file:
        file.seek(GROUP + PAGE)
        file.write(bytes(3 * STEP + PAGE))
    assert Image.open(tmp_path / "image") == image
    (tmp_path / "harm").write_bytes((tmp_path / "image").read_bytes())
    with open(tmp_path / "harm", "r+b") as file:
        file.seek(GROUP + PAGE + at)
        file.write(b"\1")
    for verify, mapped in ((False, True), (True, True), (True, False)):
        assert refused(tmp_path / "harm", verify=verify, map=mapped).field == f"page at {(PAGE + at) // PAGE * PAGE}"
    assert Image.open(tmp_path / "harm", map=False) == image


@given(offset=st.sampled_from([0, 1, PAGE, GROUP + 5, 3 * GROUP - 1]), size=st.integers(1, 4 * GROUP),
       harms=st.lists(st.tuples(st.integers(0, 5 * GROUP), st.integers(1, 255)), max_size=3))
def test_an_image_from_any_file_that_opens_matches_its_digest(tmp_path_factory, offset, size, harms):
    path = tmp_path_factory.mktemp("harm") / "image"
    Image.from_pieces([(offset, b"first"[:size])], size, offset).save(path)
    end = field(path, 64)
    with open(path, "r+b") as file:
        for at, value in harms:
            file.seek(min(GROUP + at, end - 1))
            file.write(bytes([value]))
    try:
        opened = Image.open(path)
    except FileFormatError:
        return
    assert opened == Image.from_bytes(bytes(opened), offset)
    assert opened.digest == Image.from_bytes(bytes(opened), offset).digest
    assert bytes(pickle.loads(pickle.dumps(opened))) == bytes(opened)
    with opened.new_memory() as mem:
        assert mem.read(0, offset) == bytes(offset)
        assert mem.read(offset, size) == bytes(opened)


@requires("real_pages")
@requires("holes")
def test_the_time_to_open_a_file_depends_on_its_stored_pages_and_not_on_its_claimed_size(tmp_path, monkeypatch):
    image = sparse(1 << 38, [0, 1 << 30, (1 << 38) - PAGE])
    image.save(tmp_path / "image")
    asked = []
    whole = sparse_file._read_fd
    monkeypatch.setattr(sparse_file, "_read_fd", lambda fd, at, size: asked.append(size) or whole(fd, at, size))
    other = Image.open(tmp_path / "image", verify=True)
    assert other == image
    assert sum(asked) < 1 << 20
    # An algorithm with a step or a mark for each page would not end in time.
    for _ in range(100):
        assert other.diff(image).ranges == ()
    changed = sparse(1 << 38, [0, 1 << 31])
    assert (other.diff(changed).ranges, other.diff(changed).zeros) == (
        ((1 << 31, PAGE),), ((1 << 30, PAGE), ((1 << 38) - PAGE, PAGE)))
    assert other.apply(other.diff(changed)) == changed


@pytest.mark.parametrize("runs", [None, [(0, PAGE)]])
def test_a_descriptor_that_an_image_is_made_from_stays_at_its_position(tmp_path, runs):
    path = tmp_path / "bytes"
    path.write_bytes(b"x" * PAGE + bytes(GROUP - PAGE))
    with open(path, "rb", buffering=0) as file:
        file.seek(5)
        assert bytes(Image.from_fd(file.fileno(), GROUP, runs=runs)) == path.read_bytes()
        assert file.tell() == 5


def test_the_digest_of_a_file_covers_its_size_and_the_offsets_of_its_bytes(tmp_path):
    def digest(content):
        (tmp_path / "file").write_bytes(content)
        with open(tmp_path / "file", "rb", buffering=0) as file:
            return sparse_file.content_digest(file.fileno())

    empty, page = bytes(PAGE), b"x" * PAGE
    contents = [b"", b"x", b"x\0", empty, empty + empty, page, page + empty, empty + page, empty + empty + page,
                page + page, empty + b"x"]
    assert len({digest(content) for content in contents}) == len(contents)
    for content in contents:
        expected = hashlib.blake2b(len(content).to_bytes(8, "little"), digest_size=32)
        for at in range(0, len(content), PAGE):
            if any(content[at:at + PAGE]):
                expected.update(at.to_bytes(8, "little") + content[at:at + PAGE])
        assert digest(content) == expected.hexdigest()


def test_content_that_is_not_the_digests_is_found_when_the_image_is_verified(saved, image):
    data = bytearray(saved.read_bytes())
    data[96] ^= 1
    saved.write_bytes(seal(data))
    assert Image.open(saved) == image
    assert refused(saved, verify=True).field == "digest"


def test_a_stored_page_of_zeros_is_refused(tmp_path):
    # If stored pages of zeros were allowed, a file that is one large hole could have any amount of content.
    path = tmp_path / "image"
    Image.from_bytes(b"x").save(path, packed=True)
    data = bytearray(path.read_bytes())
    data[HEADER:HEADER + PAGE] = bytes(PAGE)
    struct.pack_into("<I", data, field(path, 64) + 12, zlib.crc32(bytes(PAGE)))
    path.write_bytes(seal(data))
    assert refused(path).value == "all zero"


@pytest.mark.parametrize("mapped", [True, False])
def test_a_stored_page_of_zeros_is_refused_even_where_the_digest_counts_it(tmp_path, mapped):
    path = tmp_path / "image"
    Image.from_bytes(b"x" + bytes(PAGE) + b"x").save(path)
    data = bytearray(path.read_bytes())
    data[GROUP] = 0
    size = 2 + PAGE
    content = bytes(data[GROUP:GROUP + 2 * PAGE])
    struct.pack_into("<I", data, field(path, 64) + 12, zlib.crc32(content))
    head = struct.pack("<QQQQ", 0, size, 0, 2 * PAGE)
    data[96:128] = hashlib.blake2b(head[8:16].rjust(16, b"\0") + head[16:] + content, digest_size=32).digest()
    path.write_bytes(seal(data))
    assert refused(path, verify=True, map=mapped).value == "all zero"


def peak(function, *args, **named):
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError):
            function(*args, **named)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@requires("holes")
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_of_holes_that_claims_a_huge_table_costs_nothing(tmp_path, packed):
    path = tmp_path / "image"
    Image.from_bytes(b"x").save(path, packed=packed)
    count = 1 << 28
    data = bytearray(path.read_bytes()[:HEADER])
    struct.pack_into("<Q", data, 24, count * GROUP)
    data_size = 0 if packed else count * GROUP
    struct.pack_into("<QQQ", data, 56, data_size, (HEADER if packed else GROUP) + data_size, count)
    path.write_bytes(seal(data, table=False))
    try:
        os.truncate(path, (HEADER if packed else GROUP + count * GROUP) + 16 * count)
    except OSError:
        assert not packed               # a file system need not support files of 16 TiB
    assert peak(Image.open, path) < 1 << 20


@requires("rlimits")
def test_a_packed_file_that_claims_a_huge_size_is_refused_without_the_memory(tmp_path):
    path = tmp_path / "image"
    Image.from_bytes(b"x").save(path, packed=True)
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, 24, 1 << 50)
    path.write_bytes(seal(data))
    # A file may claim any size, and zeros use no space. The digest or the limit of address space refuses the file.
    said = answer(f"""
        import linmem
        try:
            linmem.Image.open({str(path)!r}, verify=True)
        except (linmem.FileFormatError, linmem.PageError) as error:
            print("refused")
        """, limits={"RLIMIT_AS": 4 << 30})
    assert said == "refused"
    assert refused(path, max_size=1 << 30).field == "size"


MUTATIONS = 4_000       # for each of five files


def mutate(rnd, data):
    harm = bytearray(data)
    spots = (rnd.randrange(HEADER), rnd.randrange(HEADER, len(data)) if len(data) < 2 * GROUP
             else rnd.randrange(GROUP, len(data)), len(data) - 1 - rnd.randrange(48),
             rnd.choice([8, 10, 24, 32, 40, 56, 64, 72, 80]))
    for _ in range(rnd.choice([1, 1, 1, 2, 5])):
        at = min(rnd.choice(spots), len(harm) - 1)
        what = rnd.randrange(8)
        if what <= 2:
            harm[at] ^= 1 << rnd.randrange(8)
        elif what == 3:
            harm[at] = rnd.randrange(256)
        elif what == 4:
            value = rnd.choice([0, 1, 2, 15, 16, PAGE, GROUP, 1 << 31, 1 << 32, 1 << 40, 1 << 63, (1 << 64) - 1])
            harm[at:at + 8] = value.to_bytes(8, "little")[:len(harm) - at]
        elif what == 5:
            n = rnd.choice([1, 16, 4096])
            other = rnd.randrange(len(harm))
            harm[at:at + n] = harm[other:other + n]
        elif what == 6:
            del harm[at:at + rnd.choice([1, 16, 4096])]
        else:
            harm[at:at] = rnd.randbytes(rnd.choice([1, 16, 4096]))
        if not harm:
            break
    how = rnd.randrange(3)
    return bytes(harm) if how == 0 else seal(harm, table=how == 2)


def overwrite(path, data):
    # Overwrites in place, because ten thousand new files would take the file system several seconds.
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()


@pytest.mark.parametrize("kind", ["image in place", "image packed", "delta", "snapshot in place", "snapshot packed"])
def test_ten_thousand_mutations_cause_no_crash_no_large_cost_and_no_wrong_bytes(tmp_path, kind):
    path = tmp_path / "file"
    image = sparse(2 * GROUP + 100, [0, 2 * PAGE, GROUP, 2 * GROUP])
    with image.new_memory() as mem:
        mem[0] = 1
        mem[GROUP:GROUP + PAGE] = bytes(PAGE)
        delta = image.diff(mem.snapshot())
    state = State("ab" * 32, (MemoryState(0, image.size, image), MemoryState(1, GROUP, Image.from_bytes(b"1" * 10))),
                  (GlobalState(0, "i64", b"12345678"), GlobalState(3, "funcref", Reference("export", "f"))),
                  (TableState(0, 7, ((6, Reference("element", segment=1, index=2)),)),), (((0, PAGE),), ()))
    make = Delta.open if kind == "delta" else open_state if kind.startswith("snapshot") else Image.open
    if kind == "delta":
        delta.save(path)
    elif kind.startswith("snapshot"):
        save_state(state, path, packed=kind.endswith("packed"))
    else:
        image.save(path, packed=kind.endswith("packed"))
    data = path.read_bytes()
    rnd = random.Random(kind)
    same = refusals = most = 0
    for _ in range(MUTATIONS):
        harm = mutate(rnd, data)
        overwrite(path, harm)
        try:
            if kind.startswith("snapshot"):
                found = open_state(path, verify=True, max_size=1 << 24)
                # The module's digest is covered by the digest of the snapshot, and so is all of the description.
                right = found == state
            elif kind == "delta":
                found = Delta.open(path, max_size=1 << 24)
                # A delta has no digest of its own. If all checksums are renewed, the file is another valid delta.
                right = blocks(found) == blocks(delta) or harm[:HEADER] != data[:HEADER]
            else:
                found = Image.open(path, verify=True, max_size=1 << 24)
                right = found == image and bytes(found) == bytes(image)
            assert right
            same += 1
            del found       # some systems cannot write to a mapped file
        except FileFormatError:
            refusals += 1
    assert same + refusals == MUTATIONS
    assert refusals > MUTATIONS // 2
    assert same > 0                     # mutations of padding, which nothing reads
    for _ in range(200):                # tracing is slow
        path.write_bytes(mutate(rnd, data))
        tracemalloc.start()
        try:
            make(path, max_size=1 << 24)
        except FileFormatError:
            pass
        finally:
            most = max(most, tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert most < 1 << 20


# -- deltas in files ----------------------------------------------------------------------------------------------

def test_a_delta_of_parts_of_pages_is_refused_when_it_is_saved(tmp_path, image):
    delta = Delta(image.digest, image.size, image.size, [(100, 10)], [], bytes(10))
    with pytest.raises(ValueError, match=r"whole pages of 4096 bytes.* 10 bytes at 100"):
        delta.save(tmp_path / "delta")
    assert os.listdir(tmp_path) == []


def test_a_page_that_became_zero_takes_no_space_in_a_delta(tmp_path, image):
    with image.new_memory() as mem:
        mem[:] = bytes(len(mem))
        delta = image.diff(mem)
    delta.save(tmp_path / "delta")
    assert (tmp_path / "delta").stat().st_size == HEADER + 3 * 16
    assert blocks(Delta.open(tmp_path / "delta")) == blocks(delta)


@requires("real_pages")
def test_the_file_of_a_delta_of_one_page_is_little_larger_than_a_page(tmp_path):
    a, b = sparse(1 << 20, [0]), sparse(1 << 20, [0, 5 * PAGE])
    a.diff(b).save(tmp_path / "delta")
    sparse(PAGE, [0]).save(tmp_path / "image", packed=True)
    for name in ("delta", "image"):
        assert (tmp_path / name).stat().st_size == HEADER + PAGE + 16


places = st.one_of(st.just(0), st.integers(0, 5), st.integers(0, 6).map(lambda n: n * PAGE), st.integers(0, 6 * PAGE),
                   st.sampled_from([GROUP - 1, GROUP, GROUP + 1, 1 << 40, (1 << 50) + 3]))


@st.composite
def any_images(draw):
    offset, size = draw(places), draw(st.one_of(st.just(0), st.integers(0, 5 * PAGE)))
    data = bytearray(size)
    for at, n, value in draw(contents):
        data[at:at + n] = bytes([value]) * len(data[at:at + n])
    return Image.from_bytes(data, offset)


@given(images=st.lists(any_images(), min_size=2, max_size=4))
def test_a_delta_leads_to_the_image_that_it_was_made_for_and_so_does_a_chain(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("chain")
    whole = None
    for i, (a, b) in enumerate(itertools.pairwise(images)):
        step = a.diff(b)
        assert (step.offset, step.size, step.target) == (b.offset, b.offset + b.size, b.digest)
        assert a.apply(step) == b
        whole = step if whole is None else whole | step
        for name, delta, base in ((f"step{i}", step, a), (f"whole{i}", whole, images[0])):
            assert base.apply(delta) == b
            if sum(size for _, size in delta.zeros) > MOST_ZEROED:     # a chain over images that start far apart
                with pytest.raises(ValueError, match="may zero at most"):
                    delta.save(folder / name)
                assert not (folder / name).exists()
                continue
            delta.save(folder / name)
            back = Delta.open(folder / name)
            assert base.apply(back) == b
            for copy in (back, pickle.loads(pickle.dumps(delta))):
                assert (copy.target, copy.offset, copy.size) == (delta.target, delta.offset, delta.size)
            assert pickle.loads(pickle.dumps(delta)) == delta


def test_a_delta_that_zeroes_more_than_a_file_should_name_is_refused_at_once(tmp_path, image):
    for size in (MOST_ZEROED + PAGE, 1 << 62):
        delta = Delta(image.digest, image.size, size, [], [(0, size)], b"")
        with pytest.raises(ValueError, match=f"may zero at most {MOST_ZEROED} bytes.* zeroes {size}"):
            delta.save(tmp_path / "delta")
    assert os.listdir(tmp_path) == []


def test_a_chain_over_an_image_that_ends_within_a_page_is_saved_where_the_delta_reaches_that_end(tmp_path):
    a, b = Image.from_bytes(b"a" * 10), Image.from_bytes(b"b" * 100)
    c = Image.from_bytes(bytes(b).ljust(GROUP, b"\0") + b"c" * GROUP)
    whole = a.diff(b) | b.diff(c)
    whole.save(tmp_path / "delta")
    assert a.apply(Delta.open(tmp_path / "delta")) == c


def test_deltas_that_differ_in_their_target_only_are_not_equal(image, delta):
    parts = (delta.base, delta.base_size, delta.size, delta.ranges, delta.zeros, delta.data)
    known, unknown = Delta(*parts, image.digest), Delta(*parts)
    assert known != unknown
    assert pickle.loads(pickle.dumps(known)).target == image.digest
    assert len({known, unknown, Delta(*parts, None, 1)}) == 3


def old_file(data):
    """Converts a file of version 2 to version 1."""
    data = bytearray(data)
    data[8:10] = (1).to_bytes(2, "little")
    struct.pack_into("<Q", data, 48, GROUP)
    struct.pack_into("<Q", data, 64, struct.unpack_from("<Q", data, 64)[0] + GROUP - HEADER)
    data[HEADER:HEADER] = bytes(GROUP - HEADER)
    return seal(data)


@requires("real_pages")
def test_files_of_version_one_are_read(tmp_path, image, delta):
    image.save(tmp_path / "image", packed=True)
    delta.save(tmp_path / "delta")
    for name in ("image", "delta"):
        (tmp_path / name).write_bytes(old_file((tmp_path / name).read_bytes()))
    assert Image.open(tmp_path / "image", verify=True) == image
    assert Delta.open(tmp_path / "delta") == delta
    image.save(tmp_path / "in place")
    data = bytearray((tmp_path / "in place").read_bytes())
    data[8:10] = (2).to_bytes(2, "little")
    (tmp_path / "in place").write_bytes(seal(data, table=False))
    assert Image.open(tmp_path / "in place", verify=True) == image


def test_a_target_that_begins_behind_its_end_is_refused(tmp_path, delta):
    delta.save(tmp_path / "delta")
    data = bytearray((tmp_path / "delta").read_bytes())
    struct.pack_into("<Q", data, 88, delta.size + 1)
    (tmp_path / "delta").write_bytes(seal(data))
    with pytest.raises(FileFormatError, match="target_offset is"):
        Delta.open(tmp_path / "delta")
    with pytest.raises(ValueError, match="offset must be within"):
        Delta(delta.base, 0, 5, (), (), b"", None, 6)


def test_many_runs_make_few_parts_of_a_pickle():
    image = sparse(40_000 * PAGE, range(0, 40_000 * PAGE, 4 * PAGE), 5)
    buffers = []
    head = pickle.dumps(image, protocol=5, buffer_callback=buffers.append)
    assert len(image.runs()) >= 10_000
    assert len(buffers) == 1
    # A large run is not copied, and gaps are not sent.
    stored = sum(size for _, size in image.runs())
    assert sum(buffer.raw().nbytes for buffer in buffers) <= stored
    assert pickle.loads(head, buffers=buffers) == image
    assert pickle.loads(pickle.dumps(image, 2)) == image
    make, arguments = image.__reduce_ex__(2)
    with pytest.raises(ValueError, match="must be all of its runs"):
        make(*arguments[:-1], arguments[-1] + b"x")


def test_a_chain_of_saved_deltas_leads_to_the_last_snapshot(tmp_path, image):
    rnd = random.Random(3)
    image.save(tmp_path / "base")
    with image.new_memory() as mem:
        last = image
        for i in range(6):
            for _ in range(4):
                at = rnd.randrange(len(mem) - 2 * PAGE)
                mem.write(at, rnd.choice([b"\1", rnd.randbytes(2 * PAGE), bytes(2 * PAGE)]))
            now = mem.snapshot()
            last.diff(now).save(tmp_path / f"delta{i}")
            last = now
    found = Image.open(tmp_path / "base")
    for i in range(6):
        found = found.apply(Delta.open(tmp_path / f"delta{i}"))
    assert found == last


# -- pickles --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("offset", [0, 5, GROUP])
def test_images_and_deltas_pickle_by_every_protocol(image, delta, protocol, offset):
    moved = Image.from_bytes(bytes(image), offset)
    assert pickle.loads(pickle.dumps(moved, protocol)) == moved
    assert pickle.loads(pickle.dumps(delta, protocol)) == delta


def test_a_pickle_of_an_image_of_zeros_but_for_one_percent_has_two_percent_of_its_size():
    image = sparse(64 << 20, range(0, 64 << 20, 100 * PAGE))
    buffers = []
    head = pickle.dumps(image, protocol=5, buffer_callback=buffers.append)
    bytes_out = len(head) + sum(buffer.raw().nbytes for buffer in buffers)
    assert bytes_out <= 0.02 * image.size
    assert len(pickle.dumps(image)) <= 0.02 * image.size
    assert pickle.loads(head, buffers=buffers) == image


@requires("numpy")
def test_pickled_out_of_band_the_buffers_are_the_images_own_pages(image):
    import numpy

    buffers = []
    pickle.dumps(image, protocol=5, buffer_callback=buffers.append)
    base = numpy.frombuffer(image, "u1").ctypes.data
    places = [(numpy.frombuffer(buffer, "u1").ctypes.data - base, buffer.raw().nbytes) for buffer in buffers]
    assert places == image.runs()
    assert all(buffer.raw().readonly for buffer in buffers)


@requires("numpy")
def test_pickled_out_of_band_a_deltas_bytes_are_never_copied(delta):
    import numpy

    buffers = []
    head = pickle.dumps(delta, protocol=5, buffer_callback=buffers.append)
    arrived = bytearray(buffers[0].raw())
    found = pickle.loads(head, buffers=[arrived])
    (sent,) = [numpy.frombuffer(buffer, "u1").ctypes.data for buffer in buffers]
    assert sent == numpy.frombuffer(delta.data, "u1").ctypes.data
    assert numpy.frombuffer(found.data, "u1").ctypes.data == numpy.frombuffer(arrived, "u1").ctypes.data
    assert found == delta


def test_a_pickle_whose_parts_do_not_fit_is_refused(image):
    make, arguments = image.__reduce_ex__(2)
    with pytest.raises(ValueError, match="zip"):
        make(*arguments[:-1])
    with pytest.raises(ValueError, match="pieces must be in order"):
        make(PAGE, *arguments[1:])


# -- handles --------------------------------------------------------------------------------------------------------

def look(connection, handle):
    image = handle.image
    about = os.fstat(image.fileno())
    with image.new_memory() as mem:
        mem[0] = 255
    connection.send((bytes(image), image.digest, image.offset, image.runs(), (about.st_dev, about.st_ino)))
    connection.close()


@requires("fork", "maps_images")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
@pytest.mark.parametrize("source", ["made", "opened"])
def test_an_image_crosses_to_another_process_by_its_handle(tmp_path, method, source):
    image = Image.from_bytes(bytes(3 * PAGE) + b"content" * 5000, GROUP + PAGE)
    if source == "opened":
        image.save(tmp_path / "image")
        image = Image.open(tmp_path / "image")
    with new_process(look, image.handle(), method=method) as there:
        assert there.poll(60)
        content, digest, offset, runs, file = there.recv()
    assert (content, digest, offset, runs) == (bytes(image), image.digest, image.offset, image.runs())
    about = os.fstat(image.fileno())
    assert file == (about.st_dev, about.st_ino)         # the child has the same file
    assert bytes(image) == content


def echo(connection):
    handle = connection.recv()
    connection.send_bytes(bytes(handle.image))
    connection.close()


@requires("fork", "maps_images")
def test_a_handle_goes_through_a_pipe_to_a_process_that_runs_already(image):
    try:
        with new_process(echo) as there:
            there.send(image.handle())
            assert there.poll(60)
            assert there.recv_bytes() == bytes(image)
    finally:
        multiprocessing.resource_sharer.stop(60)        # stops the thread that sent the descriptor


@requires("maps_images")
def test_a_private_image_has_no_handle(image):
    from linmem._os import pages

    before = pages.choose_image("private")
    try:
        alone = Image.from_bytes(b"alone")
    finally:
        pages.choose_image(before)
    with pytest.raises(OSError, match="private"):
        alone.handle()
    assert pickle.loads(pickle.dumps(alone)) == alone
    assert image.handle().image is image
