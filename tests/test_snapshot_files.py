"""Files, pickles and handles of snapshots: what they hold, forged files, the working set."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import tracemalloc

import pytest
from fuzz.files import blake
from fuzz.snapshots import Draft, plain, state_in
from hypothesis import given
from hypothesis import strategies as st
from support import answer, counting, descriptors, failing, mappings, new_process, requires, resident_within, smaps

from linmem import FileFormatError, Image, PageError
from linmem._files import sparse
from linmem._files.format import joined
from linmem._os import pages
from linmem._wasm.snapshot_file import (
    StoredSnapshot,
    fetch_working_set,
    open_state,
    parts_of,
    save_state,
    state_of,
)
from linmem._wasm.state import NULL, NUMBERS, GlobalState, MemoryState, Reference, State, TableState
from linmem.cli import main

PAGE, GROUP = 4096, 65536
MODULE = "ab" * 32


def example() -> Draft:
    """A file with two of each part."""
    draft = Draft()
    draft.strings = [b"memory", "größe".encode(), b"table 1 is hidden"]
    draft.memory(0, 3 * GROUP, PAGE, GROUP + 5, {1: b"a" * PAGE, 17: b"bcdef".ljust(PAGE, b"\0")},
                 [(0, PAGE), (2 * PAGE, 3 * PAGE)])
    draft.memory(4, PAGE + 1, 0, PAGE + 1, {0: b"z" * PAGE}, [(PAGE, PAGE)])
    draft.global_(1, 0, b"\1\2\3\4")
    draft.global_(3, 5, struct.pack("<3I", 1, 2, 0))
    draft.global_(9, 6, b"")
    draft.table(0, 10, [(2, 0, 0, 0), (9, 2, 7, 8)])
    draft.table(2, 5, [(0, 1, 1, 0)])
    draft.records["names"] = [[0, 0, 1], [1, 3, 2]]
    draft.records["unseen"] = [[3]]
    return draft


@pytest.fixture
def path(tmp_path):
    return tmp_path / "one.snapshot"


@pytest.fixture
def state(path):
    path.write_bytes(example().whole())
    return open_state(path, map=False)


def refused(path, draft, **how):
    path.write_bytes(draft if isinstance(draft, bytes) else draft.whole())
    with pytest.raises(FileFormatError) as caught:
        open_state(path, **how)
    error = caught.value
    assert error.path == str(path)
    assert all(text in str(error) for text in (str(path), error.field))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    return error


# -- what a file holds --------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
u32 = st.integers(0, 2**32 - 1)
references = st.one_of(st.just(NULL), names.map(lambda name: Reference("export", name)),
                       st.tuples(u32, u32).map(lambda pair: Reference("element", segment=pair[0], index=pair[1])))


@st.composite
def memory_states(draw, index):
    size = draw(st.sampled_from([0, 1, PAGE, GROUP, GROUP + 1, 5 * GROUP - 7]))
    offset = draw(st.integers(0, size))
    length = draw(st.integers(0, size - offset))
    marks = draw(st.dictionaries(st.integers(0, 80), st.integers(1, 255), max_size=4))
    content = bytearray(length)
    for page, value in marks.items():
        if page * PAGE < length:
            content[page * PAGE] = value
    return MemoryState(index, size, Image.from_bytes(content, offset))


@st.composite
def states(draw):
    def indices(most):
        return sorted(draw(st.sets(u32, max_size=most)))

    def value(kind):
        return draw(st.binary(min_size=NUMBERS[kind], max_size=NUMBERS[kind]) if kind in NUMBERS else
                    references if kind == "funcref" else st.just(NULL))

    memories = tuple(draw(memory_states(index)) for index in indices(3))
    kinds = st.sampled_from([*NUMBERS, "funcref", "null"])
    globals_ = tuple(GlobalState(index, kind, value(kind)) for index in indices(4) for kind in [draw(kinds)])
    tables = tuple(
        TableState(index, size, tuple((element, draw(references)) for element in elements))
        for index in indices(2) for size in [draw(st.integers(1, 2**40))]
        for elements in [sorted(draw(st.sets(st.integers(0, size - 1), max_size=4)))])
    sets = tuple(tuple((page * PAGE, PAGE) for page in sorted(draw(st.sets(st.integers(0, pages - 1), max_size=4))))
                 if pages else () for memory in memories for pages in [-(-memory.size // PAGE)])
    held = [(kind, each.index) for kind, part in (("memory", memories), ("global", globals_), ("table", tables))
            for each in part]
    return State(draw(st.binary(min_size=32, max_size=32)).hex(), memories, globals_, tables,
                 sets if any(sets) else (), tuple(draw(st.lists(names, max_size=3, unique=True))),
                 names=tuple((*draw(st.sampled_from(held)), draw(names))
                             for _ in range(draw(st.integers(0, 3))) if held))


@given(state=states(), packed=st.booleans(), verify=st.booleans(), mapped=st.booleans())
def test_a_state_comes_back_as_it_was_saved_and_pickled(tmp_path_factory, state, packed, verify, mapped):
    path = tmp_path_factory.mktemp("there") / "snapshot"
    save_state(state, path, packed=packed)
    back = open_state(path, verify, map=mapped)
    assert back == state
    assert [bytes(memory.image) for memory in back.memories] == [bytes(memory.image) for memory in state.memories]
    # A reader that knows only the page about the format finds the same.
    assert state_in(path.read_bytes())[0] == plain(state)
    assert pickle.loads(pickle.dumps(state)) == state_of(*parts_of(back)) == state
    for memory in back.memories:
        memory.image.verify()


@requires("fifos")
def test_a_stream_gets_a_packed_file(tmp_path, state):
    code = ("import sys; from linmem._wasm.snapshot_file import open_state, save_state;"
            "save_state(open_state(sys.argv[1]), '/dev/stdout')")
    save_state(state, tmp_path / "here")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "here"], stdout=subprocess.PIPE, timeout=60,
                          check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    (tmp_path / "there").write_bytes(done.stdout)
    assert open_state(tmp_path / "there", verify=True) == state
    save_state(state, tmp_path / "packed", packed=True)
    assert done.stdout == (tmp_path / "packed").read_bytes()


def test_no_text_of_unseen_is_repeated_in_a_file_or_a_pickle(path):
    reference = GlobalState(0, "funcref", Reference("export", "b"))
    state = State(MODULE, (), (reference,), (), unseen=("c", "b", "c", "a", "b"), names=(("global", 0, "a"),))
    save_state(state, path)
    assert open_state(path) == state_of(*parts_of(state)) == state._replace(unseen=("c", "b", "a"))


def test_a_name_of_thousands_of_nuls_is_refused_when_it_is_saved(path):
    for length, works in ((PAGE - 100, True), (3 * PAGE, False)):
        state = State(MODULE, (), (), (), unseen=("\0" * length,))
        if works:
            save_state(state, path)
            assert open_state(path) == state
        else:
            with pytest.raises(ValueError, match="thousands of NUL characters"):
                save_state(state, path)


@requires("smaps", "maps_images")
def test_opening_reads_no_page_of_a_memory(path):
    image = Image.from_bytes(random.Random(1).randbytes(8 << 20))
    save_state(State(MODULE, (MemoryState(0, image.size, image), MemoryState(1, image.size, image)), (), ()), path)
    opened = open_state(path)
    found = [m for m in mappings() if m.name.startswith(str(path))]
    assert sum(m.size for m in found) == 2 * image.size     # the kernel may have made one mapping of both
    assert [part.figures["Rss"] for m in found for part in smaps(m.start, m.end)] == [0] * len(found)
    assert opened.memories[0].image.info().kind == "file"
    assert opened.memories[1].image == image


def test_writes_to_a_memory_of_an_opened_snapshot_do_not_reach_the_file(path, state):
    save_state(state, path)
    before = path.read_bytes()
    for opened in (open_state(path), open_state(path, map=False)):
        for memory in opened.memories:
            with memory.image.new_memory(memory.size + GROUP, minimum=memory.size) as mem:
                assert mem.read(0, memory.size) == (
                    bytes(memory.image.offset) + bytes(memory.image)).ljust(memory.size, b"\0")
                mem.grow_to(memory.size + GROUP)
                assert not any(mem.read(memory.size, GROUP))
                mem[:] = b"\xff" * len(mem)
        assert opened == state
    assert path.read_bytes() == before


# -- forged files --------------------------------------------------------------------------------------

def put(name, i, field, value):
    def harm(draft):
        draft.records[name][i][field] = value
    return harm


def head(name, value):
    return lambda draft: draft.head.update({name: value})


def header(name, value):
    return lambda draft: draft.field.update({name: value})


def reference(kind, second=0, third=0, zero=0):
    return struct.pack("<4I", kind, second, third, zero)


MANY = 2**32 - 1
HARMS = [
    (head("version", 0), "description.version", 0, "1, which is all that this linmem reads"),
    (head("version", 2), "description.version", 2, "1, which is all that this linmem reads"),
    (head("reserved", 1), "description.reserved", 1, "0"),
    (head("strings", MANY), "description.number of strings", MANY, "at most "),
    (head("memories", 101), "description.number of memories", 101, "at most 100"),
    (head("memories", MANY), "description.number of memories", MANY, "at most 100"),
    (head("globals", MANY), "description.number of globals", MANY, "at most "),
    (head("tables", MANY), "description.number of tables", MANY, "at most "),
    (head("names", MANY), "description.number of names", MANY, "at most "),
    (head("unseen", MANY), "description.number of unseen", MANY, "at most "),
    (put("memories", 0, 1, MANY), "description.number of memories[0].working_set", MANY, "at most "),
    (put("tables", 1, 1, MANY), "description.number of tables[1].changes", MANY, "at most "),
    (put("memories", 1, 0, 0), "description.memories[1].index", 0, "more than 0"),
    (put("memories", 0, 2, (1 << 56) + 1), "description.memories[0].size", (1 << 56) + 1, f"at most {1 << 56}"),
    (put("memories", 0, 3, 1 << 63), "description.memories[0].image.offset", 1 << 63, f"at most {3 * GROUP}"),
    (put("memories", 0, 4, 3 * GROUP), "description.memories[0].image.size", 3 * GROUP, f"at most {3 * GROUP - PAGE}"),
    (put("memories", 1, 4, 2**64 - 1), "description.memories[1].image.size", 2**64 - 1, f"at most {PAGE + 1}"),
    (put("runs", 0, 0, 1), "description.memories[0].working_set[0]", (1, PAGE), "whole pages from 0"),
    (put("runs", 0, 1, 0), "description.memories[0].working_set[0]", (0, 0), "whole pages from 0"),
    (put("runs", 1, 0, 0), "description.memories[0].working_set[1]", (0, 3 * PAGE), f"whole pages from {PAGE}"),
    (put("runs", 2, 1, 2 * PAGE), "description.memories[1].working_set[0]", (PAGE, 2 * PAGE), f"to {2 * PAGE}"),
    (put("runs", 2, 0, 2**64 - PAGE), "description.memories[1].working_set[0]", (2**64 - PAGE, PAGE), "whole pages"),
    (put("globals", 1, 0, 1), "description.globals[1].index", 1, "more than 1"),
    (put("globals", 0, 1, 7), "description.globals[0].kind", 7, "at most 6"),
    (put("globals", 0, 2, b"\0" * 4 + b"\1"), "description.globals[0].value", "00000000010000000000000000000000",
     "4 bytes, and then zeros"),
    (put("globals", 1, 2, reference(3)), "description.globals[1].kind", 3, "at most 2"),
    (put("globals", 1, 2, reference(1, 4)), "description.globals[1].string", 4, "from 1 to 3, the number of strings"),
    (put("globals", 1, 2, reference(1, 1, 1)), "description.globals[1].index", 1, "0 in a reference of the kind 1"),
    (put("globals", 1, 2, reference(0, 5)), "description.globals[1].index", 5, "0 in a reference of the kind 0"),
    (put("globals", 1, 2, reference(0, 0, 0, 9)), "description.globals[1].value", reference(0, 0, 0, 9).hex(),
     "a reference and then zeros"),
    (put("globals", 2, 2, reference(1, 1)), "description.globals[2].value", reference(1, 1).hex(), "null"),
    (put("tables", 1, 0, 0), "description.tables[1].index", 0, "more than 0"),
    (put("changes", 1, 0, 10), "description.tables[0].changes[1].element", 10, "at least 3 and below 10"),
    (put("changes", 1, 0, 2), "description.tables[0].changes[1].element", 2, "at least 3 and below 10"),
    (put("changes", 2, 0, 2**64 - 1), "description.tables[1].changes[0].element", 2**64 - 1, "at least 0 and below 5"),
    (put("changes", 1, 1, 3), "description.tables[0].changes[1].kind", 3, "at most 2"),
    (put("changes", 2, 2, 0), "description.tables[1].changes[0].string", 0, "from 1 to 3, the number of strings"),
    (put("names", 0, 0, 3), "description.names[0].kind", 3, "at most 2"),
    (put("names", 0, 1, 1), "description.names[0].index", 1, "that of a memory of the snapshot"),
    (put("names", 1, 1, 2), "description.names[1].index", 2, "that of a global of the snapshot"),
    (put("names", 1, 2, MANY), "description.names[1].string", MANY, "from 1 to 3, the number of strings"),
    (put("unseen", 0, 0, 4), "description.unseen[0].string", 4, "from 1 to 3, the number of strings"),
    (lambda draft: draft.records["unseen"].append([3]), "description.unseen[1].string", 3, "more than 3"),
    (lambda draft: draft.records["unseen"].append([1]), "description.unseen[1].string", 1, "more than 3"),
    (lambda draft: draft.strings.__setitem__(1, b"\xc3("), "description.strings[1]", "b'\\xc3('", "UTF-8"),
    (lambda draft: draft.strings.__setitem__(2, draft.strings[0]), "description.strings[2]", "memory",
     "another text than that of strings[0]"),
    (lambda draft: setattr(draft, "end", b"x" * 32), "description.size", 478, "446, where the digests of 2 images end"),
    (lambda draft: draft.images.pop(), "description.size", 414, "446, where the digests of 2 images end"),
    (lambda draft: draft.records["unseen"].append([0xFFFFFFFF]) or head("unseen", 1)(draft), "description.size", 450,
     "446, where the digests of 2 images end"),
    (lambda draft: draft.records["unseen"].append([1]) or head("unseen", 1)(draft), "description.end",
     b"\1\0\0\0", "\\xff\\xff"),
    (header("base_size", 31), "padding of the description", "set", "zero before and after"),
    (header("base_size", 1 << 17), "base_size", 1 << 17, "at most 8192 and in the last page of these"),
    (header("base_size", 1 << 56), "base_size", 1 << 56, f"at most {4 * GROUP}"),
    (lambda draft: draft.field.update(base_size=0, digest=blake(bytes.fromhex(MODULE)), base_digest=b"\xab" * 32),
     "description.size", 0, "at least 32"),
    (lambda draft: (draft.field.update(size=5 * GROUP), setattr(draft, "layout", 2)), "size", 5 * GROUP,
     "the groups of the description and of the images"),
    (header("size", 4 * GROUP - 1), "size", 4 * GROUP - 1, f"a multiple of {GROUP} in a snapshot"),
    (header("offset", GROUP), "offset", GROUP, "at most 0"),
    (header("target_offset", 1), "target_offset", 1, "at most 0"),
    (header("version", 1), "kind", 3, "1 or 2"),
    (header("kind", 1), "kind", "1 (an image)", "3 (a snapshot)"),
    (header("kind", 2), "kind", "2 (a delta)", "3 (a snapshot)"),
    (header("digest", b"\1" * 32), "digest", "01" * 32, ", that of the module and the description"),
    (lambda draft: draft.patch.update({4000: 1}), "padding of the description", "set", "zero before and after"),
    (lambda draft: draft.patch.update({PAGE: 1}), "table[0].mentioned", "0x0003", "the pages of the description"),
    (lambda draft: draft.patch.update({GROUP + 1: 1}), "table[1].mentioned", "0x0003", "the pages of memory 0"),
    (lambda draft: draft.patch.update({2 * GROUP + PAGE + 6: 1}), "padding of memory 0", "set", "zero before"),
    (lambda draft: draft.patch.update({3 * GROUP + PAGE + 1: 1}), "padding of memory 4", "set", "zero before"),
]


@pytest.mark.parametrize(("harm", "field", "value", "bound"), HARMS, ids=[f"{i} {r[1]}" for i, r in enumerate(HARMS)])
@pytest.mark.parametrize("layout", [1, 2])
def test_a_wrong_field_is_refused_by_its_name(path, harm, field, value, bound, layout):
    draft = example()
    draft.layout = layout
    path.write_bytes(draft.whole())
    open_state(path, verify=True)
    harm(draft)
    error = refused(path, draft, verify=True)
    assert (error.field, bound in str(error.bound)) == (field, True), str(error)
    assert str(error.value) == str(value)


def test_a_description_that_ends_anywhere_is_refused(path):
    whole = example().description()

    class Cut(Draft):
        length = len(whole)

        def description(self):
            return whole[:self.length]

    draft = Cut()
    draft.records, draft.images = example().records, example().images
    path.write_bytes(draft.whole())
    open_state(path, verify=True)
    for draft.length in range(1, len(whole)):
        assert refused(path, draft).field.startswith("description.")


@pytest.mark.parametrize("layout", [1, 2])
def test_a_file_that_ends_anywhere_is_refused(path, layout):
    draft = example()
    draft.layout = layout
    data = draft.whole()
    boundaries = {0, 8, 10, 223, 224, GROUP, GROUP + 507, len(data) // 2, len(data) - 16, len(data) - 1}
    for length in sorted({*boundaries, *range(0, len(data), len(data) // 40)}):
        if length < len(data):
            assert refused(path, data[:length]).field in ("magic", "header", "file size")
    assert refused(path, data + b"\0").field == "file size"


def test_every_page_that_is_stored_is_verified(path):
    for layout in (1, 2):
        draft = example()
        draft.layout = layout
        data = bytearray(draft.whole())
        places = [GROUP + 100, 2 * GROUP + PAGE, 3 * GROUP + PAGE, 4 * GROUP] if layout == 1 else \
            [224 + page * PAGE + 3 for page in range(4)]
        for place, part in zip(places, ["the description", "memory 0", "memory 0", "memory 4"], strict=True):
            path = path.with_name(f"{layout} {place}")      # Windows writes to no file that is mapped
            harm = bytearray(data)
            harm[place] ^= 4
            error = refused(path, bytes(harm), verify=True)
            assert error.field.startswith("crc of group ")
            assert error.field.endswith(f" of {part}")
            if layout == 1 and part != "the description":
                opened = open_state(path)       # opening reads no page of a memory
                with pytest.raises(FileFormatError, match=f"of {part} is"):
                    [memory.image.verify() for memory in opened.memories]
                assert refused(path.with_name("read"), bytes(harm), map=False).field == error.field


def test_bytes_in_a_hole_are_found_when_the_file_is_mapped_or_verified(path, tmp_path):
    data = bytearray(example().whole())
    data[2 * GROUP + 2 * PAGE + 7] = 1
    for i, how in enumerate(({}, {"verify": True}, {"verify": True, "map": False})):
        assert refused(tmp_path / f"harm{i}", bytes(data), **how).field == f"page at {2 * PAGE} of memory 0"


def test_zeros_that_are_written_are_accepted_after_reads_of_any_length(path):
    # The holes of the file are found with its own descriptor, whose position no reader may take for granted.
    draft = Draft()
    draft.memory(0, 1 << 40, (1 << 40) - 5, 5, {})
    draft.memory(2, 3 * GROUP, 0, 3 * GROUP, {})
    path.write_bytes(draft.whole())
    for how in ({}, {"verify": True}, {"map": False}, {"verify": True, "map": False}):
        assert [memory.index for memory in open_state(path, **how).memories] == [0, 2]


@requires("holes")
def test_a_hole_in_place_of_a_description_takes_no_memory(path):
    draft = example()
    data = draft.whole()
    size = 1 << 40
    with open(path, "wb") as file:
        file.write(data[:224])
        file.truncate(GROUP + size)
    draft.field = {"size": size, "base_size": size, "data_size": size, "table_offset": GROUP + size, "count": 0,
                   "digest": b"\1" * 32}
    draft.layout = 2                    # to make the header only
    draft.field |= {"layout": 1, "data_offset": GROUP}
    draft.field["table_digest"] = hashlib.blake2b(b"", digest_size=32).digest()
    with open(path, "r+b") as file:
        file.write(draft.whole()[:224])
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError) as caught:
            open_state(path)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (caught.value.field, caught.value.value) == ("base_size", size)
    assert most < 1 << 20


@pytest.mark.parametrize("name", ["strings", "globals", "tables", "names", "unseen"])
def test_a_huge_count_takes_no_memory(path, name):
    draft = example()
    draft.head[name] = MANY
    path.write_bytes(draft.whole())
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match="for which the description has room"):
            open_state(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_files_of_other_kinds_and_larger_ones_are_refused(path, tmp_path, state):
    Image.from_bytes(b"x").save(tmp_path / "image")
    with pytest.raises(FileFormatError, match=r"kind is 1 \(an image\), must be 3 \(a snapshot\)"):
        open_state(tmp_path / "image")
    with pytest.raises(FileFormatError, match=r"kind is 3 \(a snapshot\), must be 1 \(an image\)"):
        Image.open(path)
    with pytest.raises(FileFormatError, match="max_size"):
        open_state(path, max_size=4 * GROUP - 1)
    assert open_state(path, max_size=4 * GROUP) == state


# -- the working set ----------------------------------------------------------------------------------------

def forget(path):
    """Drop the pages of the file from physical memory, if the file system can do so."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@requires("regions", "maps_images", "fork", "real_pages")
def test_the_pages_of_the_working_set_are_read_when_the_file_is_opened(path):
    image = Image.from_bytes(random.Random(1).randbytes(8 << 20))
    near = tuple((page * PAGE, PAGE) for page in range(0, 500, 3))
    far = ((4 << 20, 3 * PAGE), (6 << 20, 400 * PAGE))
    save_state(State(MODULE, (MemoryState(3, image.size, image),), (), (), (near + far,)), path)
    forget(path)
    opened = open_state(path)
    (found,) = [m for m in mappings() if m.name.startswith(str(path))]
    places = [found.start + offset for offset, _ in near] + [
        found.start + offset + page for offset, size in far for page in range(0, size, PAGE)]
    for _ in range(1000):       # the system reads the pages in the background
        if all(resident_within(place, place + PAGE) for place in places):
            break
        time.sleep(0.01)
    else:
        pytest.fail("pages are missing")
    assert opened.memories[0].image == image


@requires("maps_images", "real_pages")
def test_runs_near_each_other_are_read_by_one_call(path):
    image = Image.from_bytes(random.Random(1).randbytes(8 << 20))
    near = tuple((page * PAGE, PAGE) for page in range(0, 500, 3))
    far = ((4 << 20, 3 * PAGE), (6 << 20, 400 * PAGE))
    state = State(MODULE, (MemoryState(3, image.size, image),), (), (), (near + far,))
    calls = []
    for each in (state, state._replace(working_set=())):
        save_state(each, path)
        with counting() as made:
            assert open_state(path) == each
        calls.append(made.calls)
    assert calls[0] - calls[1] == 3


@pytest.mark.parametrize("holes", [True, False])
def test_the_parts_of_a_working_set_are_those_that_the_file_has(tmp_path, holes, monkeypatch):
    path = tmp_path / "file"
    with open(path, "wb") as file:
        for place in (0, 10 * GROUP, 11 * GROUP, 30 * GROUP):
            file.seek(place)
            file.write(b"x" * GROUP)
    kept = [(0, GROUP), (10 * GROUP, 12 * GROUP), (30 * GROUP, 31 * GROUP)]
    monkeypatch.setattr(sparse, "extents", lambda fd, start, end: (
        (max(begin, start), min(stop, end)) for begin, stop in (kept if holes else [(0, 31 * GROUP)])
        if begin < end and stop > start))

    def parts(*runs, first=GROUP, end=31 * GROUP, position=0):
        return list(sparse.parts_of_file(-1, position, first, end, runs))

    every = [(0, 40 * GROUP)]
    assert parts(*every) == ([(begin, min(stop, 30 * GROUP)) for begin, stop in kept if begin < 30 * GROUP] if holes
                             else [(0, 30 * GROUP)])
    assert parts((GROUP, PAGE), (GROUP + 3 * PAGE, PAGE), (GROUP + 8 * PAGE, PAGE)) == [
        (0, 4 * PAGE), (8 * PAGE, 9 * PAGE)]
    assert parts((GROUP // 2, GROUP), (12 * GROUP, 2 * PAGE)) == [(0, GROUP // 2), (11 * GROUP, 11 * GROUP + 2 * PAGE)]
    assert parts((0, PAGE), (50 * GROUP, PAGE)) == parts() == []
    # The file holds the memory from a group on.
    assert parts((2 * GROUP, PAGE), first=2 * GROUP, position=10 * GROUP) == [(0, PAGE)]
    assert parts((5 * GROUP, PAGE), first=2 * GROUP, position=10 * GROUP) == ([] if holes else [
        (3 * GROUP, 3 * GROUP + PAGE)])
    # A run over two extents, and two runs in one extent.
    assert parts((GROUP, 10 * GROUP + PAGE), (11 * GROUP + 8 * PAGE, PAGE)) == ([
        (0, GROUP), (10 * GROUP, 10 * GROUP + PAGE), (10 * GROUP + 8 * PAGE, 10 * GROUP + 9 * PAGE)] if holes else [
        (0, 10 * GROUP + PAGE), (10 * GROUP + 8 * PAGE, 10 * GROUP + 9 * PAGE)])


@requires("holes", "maps_images", "real_pages")
def test_a_working_set_of_holes_makes_no_call(path):
    size = 1 << 38
    image = Image.from_pieces([(1 << 30, b"x" * PAGE)], size)
    save_state(State(MODULE, (MemoryState(0, size, image),), (), (), (((0, size),),)), path)
    with counting() as made:
        opened = open_state(path)
    assert opened.working_set == (((0, size),),)
    save_state(opened._replace(working_set=()), path)
    with counting() as without:
        open_state(path)
    assert made.calls - without.calls == 1


@requires("sealed")     # where memory cannot be sealed, the image may be in a file
def test_a_working_set_of_an_image_in_memory_makes_no_call(state):
    assert any(state.working_set)
    with counting() as made:
        fetch_working_set(state)
    assert made.calls == 0


@requires("maps_images", "fork")
def test_a_refused_page_call_leaves_nothing_of_a_snapshot_open(path):
    draft = example()
    path.write_bytes(draft.whole())
    gc.collect()
    before = descriptors(), len([m for m in mappings() if m.name.startswith(str(path))])
    for nth in range(1, 20):
        injected = failing(nth, 12)
        with contextlib.suppress(PageError), injected:
            open_state(path)
        gc.collect()
        assert (descriptors(), len([m for m in mappings() if m.name.startswith(str(path))])) == before
        if not injected.happened:
            break
    # Two images, and the working set of each.
    assert nth == 5


def test_runs_with_a_small_gap_are_joined():
    assert joined([(0, 1), (1, 2), (5, 1), (8, 1)]) == [(0, 3), (5, 1), (8, 1)]
    assert joined([(0, 1), (1, 2), (5, 1), (8, 1)], 2) == [(0, 9)]
    assert joined([(0, 1), (4, 1), (6, 1)], 2) == [(0, 1), (4, 3)]
    assert joined([]) == []


# -- pickles --------------------------------------------------------------------------------------------

def test_a_description_in_a_pickle_is_checked_like_one_in_a_file(state):
    module, description, images = parts_of(state)
    with pytest.raises(FileFormatError, match=r"a pickled snapshot: images is \[\], must be \[Extent"):
        state_of(module, description, [])
    with pytest.raises(FileFormatError, match=r"a pickled snapshot: description.size is"):
        state_of(module, description + b"\0", images)
    with pytest.raises(FileFormatError, match=r"a pickled snapshot: description\..* is"):
        state_of(module, description[:-1], images)


@pytest.mark.parametrize("wrong", [
    None, 5, b"ab" * 32, "", "ab" * 31, "ab" * 33, "AB" * 32, "ab" * 31 + "a ", "ab" * 31 + "zz", "ab" * 32 + "\n"])
def test_a_module_in_a_pickle_must_be_64_lowercase_hexadecimal_digits(state, wrong):
    make, (cls, _, *rest) = Kept(state).__reduce__()
    with pytest.raises(FileFormatError, match="must be 64 lowercase hexadecimal digits") as caught:
        make(cls, wrong, *rest)
    assert (caught.value.path, caught.value.field, caught.value.value) == ("a pickled snapshot", "module", wrong)


@pytest.mark.parametrize("wrong", [None, 5, "images", [b""], [None]])
def test_the_images_in_a_pickle_must_be_a_list_of_images(state, wrong):
    module, description, _ = parts_of(state)
    with pytest.raises(FileFormatError, match=r"a pickled snapshot: images is .*, must be a list of images"):
        state_of(module, description, wrong)


@pytest.mark.parametrize("wrong", [None, 5, "description", [1]])
def test_the_description_in_a_pickle_must_be_bytes(state, wrong):
    module, _, images = parts_of(state)
    with pytest.raises(TypeError, match="description must be a contiguous buffer of bytes, got"):
        state_of(module, wrong, images)


class Kept(StoredSnapshot):
    """A snapshot without wasmtime."""

    def __init__(self, state):
        self.state = state

    @classmethod
    def _from_state(cls, state):
        return cls(state)

    def _travels(self):
        return self.state

    @property
    def memories(self):
        return {str(memory.index): memory.image for memory in self.state.memories}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_snapshot_pickles_by_every_protocol(state, protocol):
    assert pickle.loads(pickle.dumps(Kept(state), protocol)).state == state
    assert copy.copy(Kept(state)).state == copy.deepcopy(Kept(state)).state == state


@requires("numpy")
def test_pickled_out_of_band_the_buffers_are_the_pages_of_the_images(state):
    import numpy

    buffers = []
    head = pickle.dumps(Kept(state), protocol=5, buffer_callback=buffers.append)
    expected = [(numpy.frombuffer(memory.image, "u1").ctypes.data + max(start - memory.image.offset, 0))
                for memory in state.memories for start, _ in memory.image.runs()]
    assert [numpy.frombuffer(buffer, "u1").ctypes.data for buffer in buffers] == expected
    assert len(head) < 2000
    assert pickle.loads(head, buffers=buffers).state == state


def test_a_snapshot_saves_and_opens_itself(path, state):
    Kept(state).save(path, packed=True)
    assert Kept.open(path, verify=True, map=False, max_size=4 * GROUP).state == state
    with pytest.raises(TypeError, match="packed must be True or False"):
        Kept(state).save(path, packed=1)
    for name in ("verify", "map"):
        with pytest.raises(TypeError, match=f"{name} must be True or False"):
            Kept.open(path, **{name: None})
    with pytest.raises(ValueError, match="max_size must be >= 0"):
        Kept.open(path, max_size=-1)


# -- handles ----------------------------------------------------------------------------------------------

def look(connection):
    snapshot = connection.recv().snapshot
    state = snapshot._travels()
    about = [os.fstat(memory.image.fileno()) for memory in state.memories if memory.image.size]
    connection.send((plain(state), [bytes(memory.image) for memory in state.memories],
                     [(each.st_dev, each.st_ino) for each in about]))
    connection.close()


@requires("fork", "maps_images")
@pytest.mark.parametrize("source", ["made", "opened"])
def test_a_snapshot_crosses_to_another_process_by_its_handle(path, state, source):
    state = state._replace(memories=(*state.memories, MemoryState(7, 0, Image.from_bytes(b""))),
                           working_set=(*state.working_set, ()))
    if source == "opened":
        save_state(state, path)
        state = open_state(path)
    with new_process(look) as there:
        there.send(Kept(state).handle())
        assert there.poll(60)
        found, contents, files = there.recv()
    assert found == plain(state)
    assert contents == [bytes(memory.image) for memory in state.memories]
    about = [os.fstat(memory.image.fileno()) for memory in state.memories if memory.image.size]
    assert files == [(each.st_dev, each.st_ino) for each in about]      # the OS shows the same pages


@requires("fork", "maps_images")
def test_a_pickle_of_a_handle_can_be_loaded_once():
    assert answer("""
        import pickle
        import linmem
        image = linmem.Image.from_bytes(b"x" * 4096)
        sent = pickle.dumps(image.handle())
        print(pickle.loads(sent).image == image)
        try:
            pickle.loads(sent)
        except Exception:
            print("once")
        """).split() == ["True", "once"]


def test_a_snapshot_whose_pages_no_descriptor_shows_has_no_handle(state):
    before = pages.choose_image("private")
    try:
        image = Image.from_bytes(b"x")
    finally:
        pages.choose_image(before)
    with pytest.raises(OSError, match="no descriptor shows them"):
        Kept(state._replace(memories=(MemoryState(0, 1, image),), working_set=(), names=())).handle()


# -- the command line ------------------------------------------------------------------------------------

def test_info_says_what_a_snapshot_holds(path, state, capsys):
    assert main(["image", "info", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: snapshot, 256 KiB"
    assert lines[1] == "  stored    16 KiB in 4 groups, in place"
    assert lines[4:] == [
        f"  module    {MODULE}",
        "  holds     memory 0 of 192 KiB, memory 4 of 4 KiB, 3 mutable globals, table 0 of 10 elements, 2 changed,"
        " table 2 of 5 elements, 1 changed",
        "  first     20 KiB, the working set",
        "  unseen    table 1 is hidden"]
    assert main(["image", "info", "--json", str(path)]) == 0
    (figures,) = json.loads(capsys.readouterr().out)
    assert figures["module"] == MODULE
    assert figures["memories"] == [{"index": 0, "size": 3 * GROUP}, {"index": 4, "size": PAGE + 1}]
    assert (figures["globals"], figures["working_set"], figures["unseen"]) == (3, 5 * PAGE, ["table 1 is hidden"])
    assert figures["tables"] == [{"index": 0, "size": 10, "changed": 2}, {"index": 2, "size": 5, "changed": 1}]


def test_verify_checks_a_snapshot(path, state, capsys):
    assert main(["image", "verify", str(path)]) == 0
    data = bytearray(path.read_bytes())
    data[2 * GROUP + PAGE] ^= 1
    path.write_bytes(data)
    assert main(["image", "verify", str(path)]) == 1
    assert "of memory 0 is" in capsys.readouterr().err
    assert main(["image", "info", str(path)]) == 0


# -- snapshots of real instances --------------------------------------------------------------------------

GUEST = """(module
  (memory (export "memory") 1 40)
  (memory 2)
  (table $t 3 funcref)
  (elem (i32.const 0) $one $two)
  (global $hidden (mut i64) (i64.const 5))
  (global (export "fixed") i32 (i32.const 1))
  (global $v (export "v") (mut v128) (v128.const i64x2 1 2))
  (func $one (result i32) (i32.const 1))
  (func $two (export "two") (result i32) (i32.const 2))
  (start $begin)
  (func $begin (global.set $hidden (i64.add (global.get $hidden) (i64.const 1))))
  (data (i32.const 16) "seed")
  (func (export "init")
    (drop (memory.grow (i32.const 3)))
    (i32.store (i32.const 200000) (i32.const 77))
    (i64.store 1 (i32.const 70000) (i64.const 99))
    (global.set $hidden (i64.const 1000))
    (table.set $t (i32.const 0) (ref.func $two))
    (table.set $t (i32.const 1) (ref.null func)))
  (func (export "serve") (param i32) (result i64)
    (i32.store (i32.const 200000) (i32.add (i32.load (i32.const 200000)) (local.get 0)))
    (global.set $hidden (i64.add (global.get $hidden) (i64.load 1 (i32.const 70000))))
    (i64.add (global.get $hidden) (i64.extend_i32_u (i32.add (i32.load (i32.const 200000))
      (i32.add (i32.mul (memory.size) (i32.const 1000000))
               (i32.add (i32.load8_u (i32.const 16)) (call_indirect $t (result i32) (i32.const 0)))))))))"""
SERVE = """
import sys
import wasmtime
import linmem.wasmtime

config = wasmtime.Config()
linmem.wasmtime.install(config)
engine = wasmtime.Engine(config)
module = linmem.wasmtime.prepare(engine, sys.stdin.read(), expose=True)
snapshot = linmem.wasmtime.Snapshot.open(sys.argv[1])
store = wasmtime.Store(engine)
exports = module.instantiate(store, start=snapshot).exports(store)
print([exports["serve"](store, n) for n in (1, 2, 3)])
"""


@pytest.fixture
def guest():
    """An initialised instance: (wasmtime's engine, the prepared module, store, instance, snapshot, its answers)."""
    wasmtime = pytest.importorskip("wasmtime")
    import linmem.wasmtime

    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.MmapCreator())
    engine = wasmtime.Engine(config)
    module = linmem.wasmtime.prepare(engine, GUEST, expose=True)
    store = wasmtime.Store(engine)
    instance = module.instantiate(store)
    exports = instance.exports(store)
    exports["init"](store)
    snapshot = linmem.wasmtime.Snapshot.take(store, instance)
    answers = [exports["serve"](store, n) for n in (1, 2, 3)]
    snapshot.restore(store)
    assert answers[0] == 1000 + 99 + 77 + 1 + 4_000_000 + ord("s") + 2
    yield engine, module, store, instance, snapshot, answers
    store.close()


def served(engine, module, snapshot):
    import wasmtime

    store = wasmtime.Store(engine)
    try:
        exports = module.instantiate(store, start=snapshot).exports(store)
        return [exports["serve"](store, n) for n in (1, 2, 3)]
    finally:
        store.close()


def test_an_instance_starts_from_a_saved_snapshot_in_another_process(path, guest):
    *_, snapshot, answers = guest
    snapshot.save(path)
    done = subprocess.run([sys.executable, "-c", SERVE, path], input=GUEST, stdout=subprocess.PIPE, text=True,
                          timeout=120, check=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.stdout == f"{answers}\n"


@pytest.mark.parametrize("way", ["opened", "packed", "read", "pickled", "pickled out of band", "copied"])
def test_an_instance_starts_from_a_snapshot_that_came_in_any_way(path, guest, way):
    engine, module, store, instance, snapshot, answers = guest
    if way.startswith("pickled"):
        buffers = [] if "out" in way else None
        head = pickle.dumps(snapshot, 5, buffer_callback=None if buffers is None else buffers.append)
        back = pickle.loads(head, buffers=buffers)
    elif way == "copied":
        back = copy.deepcopy(snapshot)
    else:
        snapshot.save(path, packed=way == "packed")
        back = type(snapshot).open(path, verify=True, map=way == "opened")
    for name in ("memories", "globals", "tables", "unseen", "module"):
        assert getattr(back, name) == getattr(snapshot, name), name
    assert "v" in back.globals
    assert "fixed" not in back.globals
    assert back.module == module.digest
    assert served(engine, module, back) == answers
    with pytest.raises(ValueError, match=r"^the snapshot has no instance of its own: name the instance .* instance="):
        back.restore(store)
    exports = instance.exports(store)
    for _ in range(2):
        assert [exports["serve"](store, n) for n in (1, 2, 3)] == answers
        back.restore(store, instance)
    # What came back can go on.
    again = path.with_name("again")         # Windows replaces no file that is mapped
    back.save(again)
    assert served(engine, module, type(snapshot).open(again)) == answers


def test_a_saved_snapshot_of_another_module_is_refused_by_name(path, guest):
    engine, *_, snapshot, _ = guest
    import linmem.wasmtime

    snapshot.save(path)
    other = linmem.wasmtime.prepare(engine, GUEST.replace("seed", "soot"), expose=True)
    with pytest.raises(ValueError) as caught:
        served(engine, other, linmem.wasmtime.Snapshot.open(path))
    assert all(digest[:12] in str(caught.value) for digest in (snapshot.module, other.digest))


def serve_once(connection):
    import wasmtime

    import linmem.wasmtime

    config = wasmtime.Config()
    linmem.wasmtime.install(config)
    engine = wasmtime.Engine(config)
    snapshot = connection.recv().snapshot
    found = served(engine, linmem.wasmtime.prepare(engine, GUEST, expose=True), snapshot)
    connection.send((found, [os.fstat(image.fileno()).st_ino for image in snapshot.memories.values()]))
    connection.close()


@requires("fork", "maps_images")
def test_an_instance_starts_from_a_snapshot_that_came_by_its_handle(guest):
    *_, snapshot, answers = guest
    handle = snapshot.handle()
    assert handle.snapshot is snapshot
    with new_process(serve_once) as there:
        there.send(handle)
        assert there.poll(120)
        found, files = there.recv()
    assert found == answers
    assert files == [os.fstat(image.fileno()).st_ino for image in snapshot.memories.values()]


def test_a_snapshot_of_a_module_that_was_not_prepared_stays_in_its_store(path, guest):
    wasmtime = pytest.importorskip("wasmtime")
    import linmem.wasmtime

    engine = guest[0]
    store = wasmtime.Store(engine)
    instance = wasmtime.Instance(store, wasmtime.Module(engine, '(module (memory (export "memory") 1))'), [])
    snapshot = linmem.wasmtime.Snapshot.take(store, instance)
    for act in (lambda: snapshot.save(path), snapshot.handle, lambda: pickle.dumps(snapshot)):
        with pytest.raises(ValueError, match="prepare"):
            act()
    assert not path.exists()
    snapshot.restore(store)
    store.close()
