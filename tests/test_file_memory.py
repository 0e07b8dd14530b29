"""Memories whose pages are a file's: the bytes and the size are the file's, one process writes, and none faults."""

import ctypes
import errno
import os
import pickle
import random
import signal
import socket
import stat
import time
import tracemalloc
from pathlib import Path

import pytest
from support import (
    FORKING,
    PAGE,
    accessible_parts,
    answer,
    counting,
    descriptors,
    failing,
    file_requires,
    live_bytes,
    os_code,
    requires,
    round_up,
    run_child,
    start_child,
)

import linmem

file_requires("file_memories", "real_pages")

SIZE = 3 * PAGE + 100
ENOMEM, EFBIG = errno.ENOMEM, errno.EFBIG


@pytest.fixture
def path(tmp_path):
    return tmp_path / "numbers.bin"


def pattern(size, seed=1):
    return random.Random(seed).randbytes(size)


# -- the bytes and the size are the file's -----------------------------------------------------------------


def test_the_bytes_of_a_memory_are_those_of_the_file_and_are_there_when_it_is_opened_again(path):
    data = pattern(SIZE)
    with linmem.open_file(path) as mem:
        mem.grow_to(SIZE)
        mem.write(0, data)
        assert path.read_bytes() == data
    with linmem.open_file(path) as mem:
        assert (len(mem), mem.read(0, SIZE), mem.info().kind) == (SIZE, data, "file")
        path.write_bytes(data[::-1])
        assert bytes(mem) == data[::-1]


def test_a_new_file_belongs_to_its_owner_alone_and_is_empty(path):
    before = os.umask(0)
    try:
        with linmem.open_file(path) as mem:
            assert len(mem) == 0
    finally:
        os.umask(before)
    assert (stat.S_IMODE(path.stat().st_mode), path.stat().st_size) == (0o600, 0)


@pytest.mark.parametrize("as_path", [str, os.fsencode, Path])
def test_a_path_may_be_a_str_bytes_or_a_path(path, as_path):
    with linmem.open_file(as_path(path), minimum=1) as mem:
        assert len(mem) == path.stat().st_size == 1


def test_the_size_of_the_file_is_the_size_of_the_memory_after_each_growth_under_live_views(path):
    with linmem.open_file(path, minimum=10) as mem:
        base, view = mem.as_ptr(), memoryview(mem)
        view[:] = b"0123456789"
        for size in (10, 11, PAGE - 1, PAGE, PAGE + 1, SIZE, 100 * PAGE):
            mem.grow_to(size)
            assert path.stat().st_size == mem.byte_size() == size
            assert accessible_parts(mem) == [(0, round_up(size), "rw-s")]
        assert (mem.as_ptr(), bytes(view)) == (base, b"0123456789")
        assert mem.read(10, 100 * PAGE - 10).count(0) == 100 * PAGE - 10
        view[0] = 7
        assert path.read_bytes()[0] == 7
        view.release()


def test_bytes_that_were_written_past_the_size_are_not_in_the_file_and_zero_after_a_growth(path):
    with linmem.open_file(path, minimum=100) as mem:
        ctypes.memset(mem.as_ptr(), 0xFF, PAGE)
        assert path.read_bytes() == b"\xff" * 100
        mem.grow_to(200)
        assert path.read_bytes() == b"\xff" * 100 + bytes(100)
        ctypes.memset(mem.as_ptr() + 200, 0xFF, PAGE - 200)
        mem.grow_to(PAGE + 1)
        assert path.read_bytes() == b"\xff" * 100 + bytes(PAGE - 99)
        assert ctypes.string_at(mem.as_ptr() + 100, 2 * PAGE - 100).count(0) == 2 * PAGE - 100


def test_the_zeros_of_a_minimum_are_there_although_a_program_wrote_past_the_end_of_the_file(path):
    with linmem.open_file(path, minimum=100) as mem:
        ctypes.memset(mem.as_ptr(), 0xFF, PAGE)
    with linmem.open_file(path, minimum=300) as mem:
        assert bytes(mem) == b"\xff" * 100 + bytes(200) == path.read_bytes()


def test_the_space_of_every_byte_is_allocated_at_a_growth_and_when_a_file_with_holes_is_opened(path):
    with linmem.open_file(path, minimum=PAGE) as mem:
        mem.grow_to(64 * PAGE)
        assert path.stat().st_blocks * 512 >= 64 * PAGE
    other = path.with_name("holes")
    with other.open("wb") as file:
        file.truncate(64 * PAGE)
        file.seek(7 * PAGE)
        file.write(b"seven")
    with linmem.open_file(other) as mem:
        assert other.stat().st_blocks * 512 >= 64 * PAGE
        assert mem.read(7 * PAGE, 5) == b"seven"
        assert sum(bytes(mem)) == sum(b"seven")


def test_no_page_past_the_end_of_the_file_is_accessible(path):
    with linmem.open_file(path, minimum=PAGE + 1, maximum=64 * PAGE) as mem:
        assert accessible_parts(mem) == [(0, 2 * PAGE, "rw-s")]
    done = run_child(f"""
        import ctypes, linmem
        mem = linmem.open_file({str(path)!r}, maximum={64 * PAGE})
        ctypes.string_at(mem.as_ptr() + {2 * PAGE - 1}, 1)
        ctypes.string_at(mem.as_ptr() + {2 * PAGE}, 1)
        """)
    assert done.returncode == -signal.SIGSEGV, done


def test_a_growth_past_the_capacity_is_refused_with_the_way_out_and_changes_nothing(path):
    with linmem.open_file(path, minimum=1, maximum=PAGE) as mem, \
            pytest.raises(linmem.GrowError, match="maximum_byte_size"):
        mem.grow_to(PAGE + 1)
    with linmem.open_file(path, reserve=PAGE) as mem:
        with pytest.raises(linmem.GrowError, match=r"open it with a larger reserve= or maximum="):
            mem.grow_to(PAGE + 1)
        with pytest.raises(ValueError, match="a memory never shrinks"):
            mem.grow_to(0)
        assert path.stat().st_size == len(mem) == 1


def test_a_file_that_is_larger_than_the_maximum_is_refused_and_stays(path):
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"^maximum must be >= the size of the file \(3 bytes.*got 2"):
        linmem.open_file(path, maximum=2)
    assert path.read_bytes() == b"abc"


# -- what is opened --------------------------------------------------------------------------------------


def refused_path(path, kind):
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        # The path of a socket must be short.
        before = os.getcwd()
        os.chdir(path.parent)
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(before)
    elif kind == "device":
        return Path("/dev/null")
    elif kind == "symbolic link":
        path.with_name("target").write_bytes(b"abc")
        path.symlink_to("target")
    elif kind == "dangling link":
        path.symlink_to("nothing")
    elif kind == "no folder":
        return path / "file"
    return path


@pytest.mark.parametrize("access", ["rw", "r"])
@pytest.mark.parametrize(("kind", "error", "words"), [
    ("directory", IsADirectoryError, "path must be a regular file, not a directory"), ("fifo", OSError, "regular file"),
    ("socket", OSError, "path must be a regular file, not a pipe, a socket"), ("device", OSError, "regular file"),
    ("symbolic link", OSError, "symbolic link: give the file"),
    ("dangling link", OSError, "symbolic link: give the file"), ("no folder", FileNotFoundError, "No such file")])
def test_what_is_no_regular_file_is_refused_and_nothing_is_left_behind(path, kind, error, words, access):
    bad = refused_path(path, kind)
    names, open_files = sorted(path.parent.iterdir()), descriptors()
    with pytest.raises(error, match=words) as refused:
        linmem.open_file(bad, access)
    assert refused.value.filename == bad or str(bad) in str(refused.value)
    assert (sorted(path.parent.iterdir()), descriptors()) == (names, open_files)


@requires("maps")
def test_a_file_in_a_folder_that_cannot_be_made_durable_is_refused_with_its_name():
    before = descriptors()
    with pytest.raises(OSError, match="folder of path cannot be made durable") as refused:
        linmem.open_file("/proc/self/comm")
    assert (refused.value.errno, refused.value.filename) == (errno.EINVAL, "/proc/self/comm")
    assert descriptors() == before


def test_a_reader_does_not_make_a_file(path):
    with pytest.raises(FileNotFoundError):
        linmem.open_file(path, "r")
    assert not path.exists()


@requires("root")
def test_a_file_without_permission_is_refused(path):
    path.write_bytes(b"abc")
    path.chmod(0o400)
    for folder in path.parents:
        if folder.stat().st_uid == os.getuid() and folder != Path("/") and "pytest" in folder.name:
            folder.chmod(0o755)
    assert answer(f"""
        import os, linmem, linmem._files.memory_file
        os.setuid(65534)
        for access in "rw", "r":
            try:
                linmem.open_file({str(path)!r}, access)
            except PermissionError:
                print("refused")
        """).split() == ["refused", "refused"]


@pytest.mark.parametrize("bad", ["w", "", "rwx", None, 1])
def test_another_access_is_refused(path, bad):
    with pytest.raises(ValueError, match=r"^access must be one of 'rw', 'r'"):
        linmem.open_file(path, bad)
    assert not path.exists()


def test_a_descriptor_of_a_memory_is_not_inherited_and_closed_with_the_memory(path):
    before = descriptors()
    mem = linmem.open_file(path, minimum=1)
    assert descriptors() == before + 1
    number = next(int(name) for name in os.listdir("/proc/self/fd")
                  if os.path.realpath(f"/proc/self/fd/{name}") == str(path))
    assert not os.get_inheritable(number)
    mem.close()
    assert descriptors() == before


def test_a_new_file_is_removed_if_its_memory_cannot_be_made(path):
    before = descriptors(), live_bytes()
    with pytest.raises(linmem.PageError):
        linmem.open_file(path, minimum=2**62, maximum=2**63 - 1, reserve=2**62)
    assert not path.exists()
    happened = 0
    for call in range(1, 8):
        with failing(call, ENOMEM):
            try:
                mem = linmem.open_file(path, minimum=SIZE)
            except linmem.PageError:
                happened += not path.exists()
                continue
        mem.close()
        path.unlink()
    assert happened >= 4
    assert not path.exists()
    assert (descriptors(), live_bytes()) == before


def test_an_existing_file_is_unchanged_if_its_memory_cannot_be_made(path):
    path.write_bytes(b"abc")
    happened = 0
    for call in range(1, 8):
        path.write_bytes(b"abc")
        with failing(call, ENOMEM) as refusal:
            try:
                mem = linmem.open_file(path, minimum=SIZE)
            except linmem.PageError:
                assert path.read_bytes() == b"abc"
                happened += 1
                continue
        mem.close()
        assert not refusal.happened or call == 3, call          # 3: reserve, which is tried again
    assert happened >= 5


def test_a_refused_growth_changes_neither_the_memory_nor_the_file(path):
    refused = 0
    with linmem.open_file(path, minimum=SIZE) as mem:
        mem.write(0, pattern(SIZE))
        for call in range(1, 6):
            before = mem.info().committed, accessible_parts(mem)
            size = len(mem)
            with failing(call, ENOMEM) as refusal:
                error = growth_error(mem, size + 2 * PAGE)
            if error is not None:
                assert os_code(error) == ENOMEM
                assert (len(mem), path.stat().st_size) == (size, size)
                assert (mem.info().committed, accessible_parts(mem)) == before
                refused += 1
            else:
                assert not refusal.happened
        assert refused == 4
        mem.grow_to(len(mem) + PAGE)
        assert path.stat().st_size == len(mem)
        assert mem.read(0, SIZE) == pattern(SIZE)


def growth_error(mem, size):
    try:
        mem.grow_to(size)
    except linmem.PageError as error:
        return error
    return None


# -- one writer, many readers ------------------------------------------------------------------------------


def test_a_second_writer_is_refused_in_this_process_and_in_another_one(path):
    mem = linmem.open_file(path, minimum=1)
    with pytest.raises(BlockingIOError, match="has a writer already") as refused:
        linmem.open_file(path)
    assert refused.value.filename == str(path) or refused.value.filename == path
    with pytest.raises(BlockingIOError):
        linmem.creator("file", path=path).create(1)
    assert answer(f"""
        import linmem
        try:
            linmem.open_file({str(path)!r})
        except BlockingIOError:
            print("refused")
        """) == "refused"
    view = memoryview(mem)
    with mem:
        pass
    with pytest.raises(BlockingIOError):    # the view has the pages
        linmem.open_file(path)
    view.release()
    linmem.open_file(path).close()


def test_the_lock_of_a_killed_writer_dies_with_the_process(path):
    child = start_child("""
        import sys, linmem
        mem = linmem.open_file(sys.argv[1], minimum=5)
        mem.write(0, b"hello")
        print("ready", flush=True)
        sys.stdin.readline()
        """, path)
    assert child.stdout.readline() == "ready\n"
    with pytest.raises(BlockingIOError):
        linmem.open_file(path)
    child.kill()
    child.wait()
    with linmem.open_file(path) as mem:
        assert bytes(mem) == b"hello"
    child.stdin.close()
    child.stdout.close()


def test_readers_see_the_bytes_and_the_growth_of_a_writer_at_their_next_call(path):
    with linmem.open_file(path, minimum=100) as mem, linmem.open_file(path, "r") as reader, \
            linmem.open_file(path, "r") as second:
        view = memoryview(reader)
        mem.write(0, b"abc")
        assert (reader.read(0, 3), bytes(view[:3]), second[0]) == (b"abc", b"abc", 97)
        mem.grow_to(SIZE)
        mem[SIZE - 1] = 7
        assert (len(reader), reader[SIZE - 1], second[-1]) == (SIZE, 7, 7)
        assert accessible_parts(reader) == [(0, round_up(SIZE), "r--s")]
        assert (len(view), len(memoryview(reader))) == (100, SIZE)
        view.release()


def test_a_reader_stays_when_the_writer_is_gone_and_holds_no_lock(path):
    with linmem.open_file(path, minimum=1) as mem:
        reader = linmem.open_file(path, "r")
    with linmem.open_file(path) as mem:
        mem.grow_to(2)
        mem[1] = 9
        assert reader[1] == 9
    reader.close()


WRITES = {
    "write": lambda mem: mem.write(0, b"x"), "item": lambda mem: mem.__setitem__(0, 1),
    "slice": lambda mem: mem.__setitem__(slice(0, 2), b"xx"),
    "slice with a step": lambda mem: mem.__setitem__(slice(0, 4, 2), b"xx"),
    "grow_to": lambda mem: mem.grow_to(SIZE + 1), "discard": lambda mem: mem.discard(0, PAGE),
    "restore": lambda mem: mem.restore(linmem.Image.from_bytes(b"abc"), zero_grown=True),
    "apply": lambda mem: mem.apply(mem.snapshot().diff(linmem.Image.from_bytes(bytes(SIZE)))),
    "protect": lambda mem: mem.protect(0, PAGE, "rw"), "flush": lambda mem: mem.flush(),
    "prefault": lambda mem: mem.prefault(),
}


@pytest.mark.parametrize("call", WRITES)
def test_a_write_through_a_reader_is_an_exception_and_its_views_are_read_only(path, call):
    data = pattern(SIZE)
    path.write_bytes(data)
    with linmem.open_file(path, "r") as mem:
        with pytest.raises((ValueError, TypeError, linmem.PageError)):
            WRITES[call](mem)
        view = memoryview(mem)
        assert view.readonly
        view.release()
        assert bytes(mem) == bytes(mem.snapshot()) == data
        assert mem.dirty_pages(mem.snapshot()) == []
    assert path.read_bytes() == data


def test_a_reader_whose_capacity_is_too_small_is_told_to_open_the_file_again(path):
    with linmem.open_file(path, minimum=1) as mem, linmem.open_file(path, "r", reserve=PAGE) as reader:
        mem.grow_to(PAGE)
        assert len(reader) == PAGE
        mem.grow_to(PAGE + 1)
        with pytest.raises(linmem.GrowError, match="open it again"):
            len(reader)


def test_a_reader_with_a_minimum_is_refused(path):
    path.write_bytes(b"a")
    with pytest.raises(ValueError, match=r"^minimum must be 0"):
        linmem.open_file(path, "r", minimum=1)


# -- other programs ----------------------------------------------------------------------------------------

CALLS = {
    "read": lambda mem: mem.read(0, 1), "write": lambda mem: mem.write(0, b"a"), "[]": lambda mem: mem[0],
    "[]=": lambda mem: mem.__setitem__(0, 1), "grow_to": lambda mem: mem.grow_to(2 * SIZE), "len": len,
    "flush": lambda mem: mem.flush(), "snapshot": lambda mem: mem.snapshot(), "bytes": bytes,
    "discard": lambda mem: mem.discard(), "restore": lambda mem: mem.restore(linmem.Image.from_bytes(b"abc")),
    "view": lambda mem: mem.view("B"), "in": lambda mem: 1 in mem, "protect": lambda mem: mem.protect(0, PAGE, "r"),
    "prefault": lambda mem: mem.prefault(), "as_ptr": lambda mem: mem.as_ptr(),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_raise_after_another_program_has_truncated_the_file(path, call):
    with linmem.open_file(path, minimum=SIZE) as mem:
        os.truncate(path, 10)
        assert repr(mem) == "<linmem.Memory, lost>"
        assert SIZE in [info.byte_size for info in linmem.live() if info.kind == "file"]
        with pytest.raises(OSError, match=f"the file has 10 bytes, and the memory {SIZE}"):
            CALLS[call](mem)
        assert path.stat().st_size == 10
        os.truncate(path, SIZE)
        CALLS["read"](mem)


def test_a_reader_raises_after_a_truncation_too(path):
    path.write_bytes(bytes(SIZE))
    with linmem.open_file(path, "r") as mem:
        os.truncate(path, 0)
        with pytest.raises(OSError, match="the file has 0 bytes"):
            mem.read(0, 1)


def test_bytes_that_another_program_appends_belong_to_the_memory_at_the_next_call(path):
    with linmem.open_file(path, minimum=3) as mem:
        mem.write(0, b"abc")
        with path.open("ab") as file:
            file.write(b"def" * PAGE)
        assert (len(mem), mem[3 * PAGE]) == (3 + 3 * PAGE, b"def"[(3 * PAGE - 3) % 3])
        mem.grow_to(4 * PAGE)
        assert path.stat().st_size == 4 * PAGE


def test_a_budget_and_tracemalloc_count_the_bytes_that_another_program_appends(path):
    tracemalloc.start()
    try:
        path.write_bytes(bytes(PAGE))
        budget = linmem.creator("limiting", upstream=linmem.creator("file", path=path), limit_bytes=4 * PAGE)
        with budget.create(1, 8 * PAGE) as mem, linmem.open_file(path, "r", maximum=8 * PAGE) as reader:
            with path.open("ab") as file:
                file.write(b"x" * 2 * PAGE)
            assert (len(mem), reader[3 * PAGE - 1], budget.used_bytes) == (3 * PAGE, ord("x"), 3 * PAGE)
            mine = tracemalloc.DomainFilter(True, linmem.tracemalloc_domain)
            traces = tracemalloc.take_snapshot().filter_traces([mine])
            assert [trace.size for trace in traces.traces] == [3 * PAGE, 3 * PAGE]
            with path.open("ab") as file:
                file.write(b"x" * 2 * PAGE)
            with pytest.raises(linmem.LimitError):
                len(mem)
            assert (len(reader), budget.used_bytes) == (5 * PAGE, 3 * PAGE)
        assert budget.used_bytes == 0
    finally:
        tracemalloc.stop()


def test_the_memory_stays_usable_when_its_file_is_unlinked_or_renamed(path):
    with linmem.open_file(path, minimum=3) as mem:
        path.rename(path.with_name("other"))
        mem.grow_to(SIZE)
        assert path.with_name("other").stat().st_size == SIZE
        with linmem.open_file(path, minimum=1) as new:      # another file
            new[0] = 5
            assert mem[0] == 0
        path.with_name("other").unlink()
        mem.grow_to(2 * SIZE)
        mem.flush()
        assert len(mem) == 2 * SIZE


# -- other calls ------------------------------------------------------------------------------------------


def test_discard_writes_zeros_and_keeps_the_space(path):
    with linmem.open_file(path, minimum=SIZE) as mem:
        mem.write(0, pattern(SIZE))
        blocks = path.stat().st_blocks
        mem.discard(10, 2 * PAGE)
        expected = pattern(SIZE)[:10] + bytes(2 * PAGE) + pattern(SIZE)[10 + 2 * PAGE:]
        assert bytes(mem) == path.read_bytes() == expected
        assert path.stat().st_blocks >= blocks
        mem.protect(0, PAGE, "r")
        with pytest.raises(TypeError, match="discard of these pages is not supported with protected pages"):
            mem.discard()
        assert path.read_bytes() == expected


def test_restore_and_apply_write_through_also_in_a_memory_that_no_call_has_touched(path):
    path.write_bytes(pattern(8 * PAGE))
    image = linmem.Image.from_bytes(pattern(SIZE, 2), PAGE)
    with linmem.open_file(path) as mem:
        mem.restore(image, zero_grown=True)
        expected = bytes(PAGE) + pattern(SIZE, 2)
        expected += bytes(8 * PAGE - len(expected))
        assert path.read_bytes() == expected == bytes(mem)
        before, changed = mem.snapshot(), pattern(100, 3)
        mem.write(5, changed)
        delta = before.diff(mem.snapshot())
        mem.restore(before)
        assert path.read_bytes() == expected
        mem.apply(delta)
        assert path.read_bytes() == expected[:5] + changed + expected[105:]


def test_a_snapshot_and_its_differences_hold_bytes_that_this_process_never_touched(path):
    data = pattern(4 * PAGE)
    path.write_bytes(data)
    with linmem.open_file(path) as mem:
        image = mem.snapshot()
        assert bytes(image) == data
    path.write_bytes(data[:PAGE] + b"x" + data[PAGE + 1:])
    with linmem.open_file(path) as mem:
        assert mem.dirty_pages(image) == [(PAGE, PAGE)]
        assert mem.dirty_pages(linmem.Image.from_bytes(b"")) == [(0, 4 * PAGE)]


def test_an_image_is_the_content_of_a_new_file_and_does_not_change_an_old_one(path):
    image = linmem.Image.from_bytes(b"start", 10)
    creator = linmem.creator("file", path=path)
    with creator.create(20, image=image) as mem:
        assert bytes(mem) == bytes(10) + b"start" + bytes(5) == path.read_bytes()
        mem.write(10, b"later")
    with creator.create(20, image=image) as mem:
        assert bytes(mem) == bytes(10) + b"later" + bytes(5)
    with pytest.raises(ValueError, match="minimum must be >= the end of the image"):
        linmem.creator("file", path=path.with_name("other")).create(5, image=image)
    assert not path.with_name("other").exists()


def test_protected_pages_are_known_and_the_file_can_be_written_by_others(path):
    with linmem.open_file(path, minimum=4 * PAGE) as mem:
        mem.protect(PAGE, PAGE, "none")
        with pytest.raises(ValueError, match="has the access 'none'"):
            mem.read(PAGE, 1)
        mem.grow_to(8 * PAGE)
        assert accessible_parts(mem) == [(0, PAGE, "rw-s"), (2 * PAGE, 8 * PAGE, "rw-s")]
        mem.protect(PAGE, PAGE, "rw")
        assert mem.read(PAGE, 1) == b"\0"


def test_prefault_makes_the_pages_resident(path):
    with linmem.open_file(path, minimum=16 * PAGE) as mem:
        mem.prefault()
        assert mem.info().resident == 16 * PAGE


def test_a_memory_without_a_file_has_nothing_to_flush():
    with linmem.create(1) as mem, pytest.raises(TypeError, match="flush is not supported by a memory of kind 'mmap'"):
        mem.flush()


def test_flush_checks_its_range(path):
    with linmem.open_file(path, minimum=SIZE) as mem:
        mem.flush(1, 1)
        mem.flush(SIZE)
        mem.flush(0, 0)
        for offset, size in ((SIZE + 1, None), (0, SIZE + 1), (SIZE, 1)):
            with pytest.raises(ValueError, match=r"offset \+ size must be <= byte_size\(\)"):
                mem.flush(offset, size)


def test_a_flush_that_the_os_refuses_is_an_error_and_the_next_one_flushes_again(path):
    with linmem.open_file(path, minimum=SIZE) as mem:
        for call in (2, 3):     # the first page call asks for the size of the file
            with failing(call, errno.EIO), pytest.raises(linmem.PageError) as refused:
                mem.flush()
            assert (refused.value.errno, refused.value.call, refused.value.size) == (errno.EIO, "flush", SIZE)
        mem.flush()


def test_a_flush_makes_the_size_durable_that_another_process_may_have_left(path):
    def calls(mem):
        with counting() as counted:
            mem.flush(0, 1)
        return counted.calls

    path.write_bytes(bytes(SIZE))
    with linmem.open_file(path) as mem:
        # The calls ask for the size of the file, flush pages, and make the size durable once.
        assert [calls(mem), calls(mem)] == [3, 2]
        with path.open("ab") as other:
            other.write(b"more")
        assert len(mem) == SIZE + 4
        assert [calls(mem), calls(mem)] == [3, 2]


def test_a_pool_over_the_memory_of_a_file_is_refused(path):
    creator = linmem.creator("file", path=path)
    for upstream in (creator, linmem.creator("limiting", upstream=creator, limit_bytes=PAGE)):
        with pytest.raises(TypeError, match="a pool is not supported over memories whose pages are a file's"):
            linmem.creator("pool", upstream=upstream)
    routing = linmem.creator("routing", rule=lambda ty, size: creator)
    pool = linmem.creator("pool", upstream=routing)
    with pytest.raises(TypeError, match="a pool is not supported over memories whose pages are a file's"):
        pool.create(1)


def test_a_budget_counts_the_bytes_that_an_old_file_has(path):
    path.write_bytes(bytes(5 * PAGE))
    creator = linmem.creator("file", path=path)
    budget = linmem.creator("limiting", upstream=creator, limit_bytes=8 * PAGE)
    with budget.create(1) as mem:
        assert (len(mem), budget.used_bytes) == (5 * PAGE, 5 * PAGE)
        mem.grow_to(8 * PAGE)
        with pytest.raises(linmem.LimitError):
            mem.grow_to(9 * PAGE)
        assert path.stat().st_size == 8 * PAGE
    assert budget.used_bytes == 0
    small = linmem.creator("limiting", upstream=creator, limit_bytes=4 * PAGE)
    with pytest.raises(linmem.LimitError):
        small.create(1)
    assert small.used_bytes == 0
    each = linmem.creator("callback", upstream=creator, limit_each=4 * PAGE)
    with pytest.raises(linmem.LimitError):
        each.create(1)
    with linmem.creator("statistics", upstream=creator).create(1) as mem:
        assert len(mem) == 8 * PAGE


def test_a_creator_shows_its_path_and_gives_its_name_to_its_memories(path):
    creator = linmem.creator("file", path=path, name="numbers")
    assert (creator.path, repr(creator)) == (str(path), f"FileCreator({str(path)!r}, name='numbers')")
    with creator.create(1, reserve=PAGE) as mem:
        assert mem.info().name == "numbers"
        with pytest.raises(linmem.GrowError, match=r"^creator 'numbers': "):
            mem.grow_to(PAGE + 1)
    assert creator.refusals.count == 1
    with pytest.raises(TypeError):
        pickle.dumps(creator)


def test_find_and_live_know_the_memory(path):
    with linmem.open_file(path, minimum=1) as mem:
        assert linmem.find(mem.as_ptr() + 5).offset == 5
        assert "file" in [info.kind for info in linmem.live()]


# -- forked children -----------------------------------------------------------------------------------------


@requires("fork")
def test_a_forked_child_shares_the_bytes_and_the_lock_and_sees_growth_but_does_not_grow(path):
    assert answer(FORKING + f"""
import linmem
path, SIZE = {str(path)!r}, {SIZE}
mem = linmem.open_file(path, minimum=10)
near, far = os.pipe()
again, back = os.pipe()

def work():
    mem.write(0, b"child")
    for call, error in ((lambda: linmem.open_file(path), BlockingIOError), (lambda: mem.grow_to(20), TypeError)):
        try:
            call()
        except error:
            pass
        else:
            raise AssertionError("not refused")
    os.write(back, b"x")
    os.read(near, 1)
    assert (len(mem), mem[SIZE - 1]) == (SIZE, 7)
    mem.flush()
    mem.close()

def parent():
    os.read(again, 1)
    mem.grow_to(SIZE)
    mem[SIZE - 1] = 7
    os.write(far, b"x")

thread = threading.Thread(target=parent)
thread.start()
child(os.fork, work)
thread.join()
assert mem.read(0, 5) == b"child"
try:
    linmem.open_file(path)
except BlockingIOError:
    print("still locked")
mem.grow_to(2 * SIZE)
""") == "still locked"


@requires("fork")
def test_the_lock_stays_while_a_forked_child_has_the_memory(path):
    assert answer(FORKING + f"""
import linmem
path = {str(path)!r}
mem = linmem.open_file(path, minimum=10)
near, far = os.pipe()
pid = os.fork()
if pid == 0:
    os.close(far)
    os.read(near, 1)
    os._exit(0)
mem.close()
try:
    linmem.open_file(path)
except BlockingIOError:
    print("locked", end=" ")
os.close(far)
os.waitpid(pid, 0)
linmem.open_file(path).close()
print("free")
""") == "locked free"


# -- full file systems and limits -----------------------------------------------------------------------------

FULL = """
import ctypes, errno, os, sys
import linmem
libc = ctypes.CDLL(None, use_errno=True)
def mount(size, kind=b"tmpfs"):
    assert libc.unshare(0x20000) == 0                       # CLONE_NEWNS
    assert libc.mount(b"none", b"/", None, 1 << 14 | 1 << 18, None) == 0        # MS_REC | MS_PRIVATE
    assert libc.mount(b"tmpfs", sys.argv[1].encode() if len(sys.argv) > 1 else b"%s", b"tmpfs", 0,
                      b"size=%%d" %% size) == 0
"""


@requires("mounts")
def test_a_full_file_system_is_an_error_at_the_growth_and_never_a_fault_later(tmp_path):
    assert answer(FULL % str(tmp_path) + f"""
PAGE = {PAGE}
mount(64 * PAGE)
path = {str(tmp_path / "a")!r}
mem = linmem.open_file(path, minimum=PAGE)
view = memoryview(mem)
for size in (65 * PAGE, 10**6 * PAGE):
    try:
        mem.grow_to(size)
    except linmem.PageError as error:
        assert (error.errno, error.call) == (errno.ENOSPC, "extend"), error
        assert "full" in str(error), error
    else:
        raise AssertionError("not refused")
    assert os.path.getsize(path) == len(mem) == PAGE
mem.grow_to(60 * PAGE)
other = open({str(tmp_path / "b")!r}, "wb")
try:
    while True:
        other.write(bytes(PAGE))
        other.flush()
except OSError:
    pass
mem.write(0, b"x" * (60 * PAGE))             # every byte has its space
try:
    linmem.open_file({str(tmp_path / "c")!r}, minimum=PAGE)
except linmem.PageError as error:
    print(error.errno == errno.ENOSPC, sorted(os.listdir({str(tmp_path)!r})))
os.unlink({str(tmp_path / "b")!r})
with open({str(tmp_path / "holes")!r}, "wb") as holes:
    holes.truncate(1000 * PAGE)
try:
    linmem.open_file(holes.name)
except linmem.PageError as error:
    print(error.errno == errno.ENOSPC, error.call, os.path.getsize(holes.name) == 1000 * PAGE)
""").splitlines() == ["True ['a', 'b']", "True allocate True"]


@requires("mounts")
@pytest.mark.parametrize("group", [None, {"memory.max": 100 << 20, "memory.current": 60 << 20,
                                          "memory.stat": "anon 9\ninactive_file 41943040\n"}])
def test_a_growth_in_a_tmpfs_beyond_the_memory_that_is_free_is_refused_before_the_kernel_ends_processes(
        tmp_path, group):
    assert answer(FULL % str(tmp_path) + f"""
PAGE, group = {PAGE}, {group!r}
mount(1 << 30)
folder = {str(tmp_path)!r}
def replace(path, text):
    with open(os.path.join(folder, "fake"), "w") as file:
        file.write(text)
    assert libc.mount(file.name.encode(), path.encode(), None, 4096, None) == 0         # MS_BIND
if group is None:
    replace("/proc/meminfo", "MemTotal: 9999999 kB\\nMemAvailable: 71680 kB\\nSwapFree: 10240 kB\\n")
else:
    assert libc.mount(b"tmpfs", b"/sys/fs/cgroup", b"tmpfs", 0, None) == 0
    for name, text in group.items():
        with open("/sys/fs/cgroup/" + name, "w") as file:
            file.write(str(text))
mem = linmem.open_file(folder + "/a", minimum=PAGE)
for size in (PAGE + (80 << 20) + 1, 1 << 29):
    try:
        mem.grow_to(size)
    except linmem.PageError as error:
        print(error.errno, error.call, os.path.getsize(folder + "/a") == len(mem) == PAGE,
              os.stat(folder + "/a").st_blocks * 512 == PAGE)
mem.grow_to(PAGE + (79 << 20))
print(len(mem) >> 20)
""").splitlines() == [f"{ENOMEM} extend True True"] * 2 + ["79"]


@requires("rlimits")
def test_a_limit_of_the_size_of_files_is_an_error_and_no_signal(path):
    assert answer(f"""
        import linmem, os, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        mem = linmem.open_file({str(path)!r}, minimum={PAGE})
        for size in ({8 * PAGE + 1}, {10**6 * PAGE}):
            try:
                mem.grow_to(size)
            except linmem.PageError as error:
                print(error.errno, os.path.getsize({str(path)!r}))
        mem.grow_to({8 * PAGE})
        """, limits={"RLIMIT_FSIZE": 8 * PAGE}).splitlines() == [f"{EFBIG} {PAGE}"] * 2
    assert path.stat().st_size == 8 * PAGE


# -- crashes --------------------------------------------------------------------------------------------------

GROWS = """
    import sys, linmem
    mem = linmem.open_file(sys.argv[1])
    print(len(mem), flush=True)
    step = int(sys.argv[2])
    while True:
        size = len(mem) + step
        print(size, flush=True)
        mem.grow_to(size)
        mem.write(size - step, size.to_bytes(8, "little") * (step // 8))
        print(size, flush=True)
    """


@pytest.mark.parametrize("step", [8, PAGE, 1000 * 8, 64 * PAGE])
def test_a_process_that_is_killed_leaves_the_size_before_or_after_a_growth_and_all_bytes(path, step):
    path.write_bytes(b"")
    rng = random.Random(step)
    for _ in range(12):
        child = start_child(GROWS, path, str(step))
        child.stdin.close()
        told = [int(child.stdout.readline())]
        for _ in range(rng.randrange(1, 60)):
            told.append(int(child.stdout.readline()))
        time.sleep(rng.random() / 1000)
        child.send_signal(signal.SIGKILL)
        told += map(int, child.stdout.read().split("\n")[:-1])
        child.wait()
        child.stdout.close()
        size = path.stat().st_size
        assert size in told[-2:], (size, told[-3:])
        # The last step may not have been written yet.
        data = path.read_bytes()
        for n in range(step, size if size == told[-1] == told[-2] else size - step + 1, step):
            assert data[n - step:n] == n.to_bytes(8, "little") * (step // 8)
        with path.open("r+b") as file:      # the unfinished step
            file.truncate(size // step * step)
            file.seek(max(0, size - step))
            file.write(size.to_bytes(8, "little") * (step // 8) if size else b"")


def test_a_growth_that_died_between_its_steps_leaves_a_file_that_opens_and_grows(path):
    """The space of the growth was allocated past the end, and the length was not changed."""
    path.write_bytes(b"abc")
    fd = os.open(path, os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.fallocate(fd, 1, ctypes.c_long(3), ctypes.c_long(100 * PAGE)) == 0      # FALLOC_FL_KEEP_SIZE
    os.close(fd)
    with linmem.open_file(path) as mem:
        assert bytes(mem) == b"abc"
        mem.grow_to(PAGE)
        assert bytes(mem) == b"abc" + bytes(PAGE - 3)


# -- power failures: a disk that is a file is copied, and the copy is mounted, as after the failure -----------------

DISK = """
import ctypes, os, shutil, subprocess
import linmem
from pathlib import Path
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000) == 0                                           # CLONE_NEWNS
assert libc.mount(b"none", b"/", None, 1 << 14 | 1 << 18, None) == 0        # MS_REC | MS_PRIVATE
folder = Path(%r)
disk, place, copy, later = folder / "disk", folder / "place", folder / "copy", folder / "later"
def mount(image, at):
    at.mkdir()
    # The journal is not committed by itself before the test ends.
    subprocess.run(["mount", "-o", "loop,commit=600", image, at], check=True)
with disk.open("wb") as file:
    file.truncate(32 << 20)
subprocess.run(["mkfs.ext4", "-q", disk], check=True)
mount(disk, place)
path = place / "numbers"
def after_a_power_failure():
    shutil.copyfile(disk, copy)
    mount(copy, later)
    try:
        found = later / "numbers"
        return found.read_bytes() if found.exists() else None
    finally:
        subprocess.run(["umount", later], check=True)
        later.rmdir()
"""


@requires("disks")
def test_bytes_and_the_size_are_there_after_a_power_failure_if_they_were_flushed_and_only_then(tmp_path):
    assert answer(DISK % str(tmp_path) + f"""
PAGE = {PAGE}
mem = linmem.open_file(path)
mem.grow_to(100 * PAGE)
mem.write(0, b"1" * 100 * PAGE)
assert after_a_power_failure() == b"", "the disk of this test is written before flush()"
mem.flush()
assert after_a_power_failure() == b"1" * 100 * PAGE
mem.write(0, b"2" * 100 * PAGE)
mem.grow_to(200 * PAGE)
assert after_a_power_failure() == b"1" * 100 * PAGE
mem.flush(PAGE + 1, 10)
seen = after_a_power_failure()
assert len(seen) == 200 * PAGE and seen[PAGE:2 * PAGE] == b"2" * PAGE
view = memoryview(mem)
view[199 * PAGE:] = b"3" * PAGE
mem.flush()
assert after_a_power_failure() == b"2" * 100 * PAGE + bytes(99 * PAGE) + b"3" * PAGE
view.release()
mem.close()
subprocess.run(["umount", place], check=True)
print("durable")
""", timeout=300) == "durable"


@requires("disks")
def test_a_growth_is_whole_or_not_at_all_after_a_power_failure_without_a_flush(tmp_path):
    assert answer(DISK % str(tmp_path) + f"""
PAGE = {PAGE}
mem = linmem.open_file(path, minimum=PAGE)
mem.write(0, b"1" * PAGE)
mem.flush()
for size in (2 * PAGE, 1000 * PAGE, 1000 * PAGE + 1):
    mem.grow_to(size)
    os.sync() if size == 1000 * PAGE else None
    seen = after_a_power_failure()
    assert seen in (b"1" * PAGE, b"1" * PAGE + bytes(size - PAGE), b"1" * PAGE + bytes(999 * PAGE)), len(seen)
mem.close()
subprocess.run(["umount", place], check=True)
print("whole")
""", timeout=300) == "whole"


@requires("fork")
def test_a_child_forked_while_the_length_of_the_file_is_taken_over_has_the_length_and_does_not_grow_the_file(tmp_path):
    assert answer(f"""
        import os, linmem
        path = {str(tmp_path / "bytes")!r}
        statuses = []

        def on_grow(mem, old, new):
            pid = os.fork()
            if pid:
                statuses.append(os.waitpid(pid, 0)[1])

        mem = linmem.create(4096, 1 << 20, creator=linmem.CallbackCreator(linmem.FileCreator(path), on_grow=on_grow))
        parent = os.getpid()
        with open(path, "ab") as other:
            other.write(b"x" * 4096)
        size, last = len(mem), mem[-1]
        assert (size, last) == (8192, ord("x")), (size, last)
        if os.getpid() != parent:
            try:
                mem.grow_to(3 * 4096)
            except TypeError:
                os._exit(7)
            os._exit(1)
        assert [os.waitstatus_to_exitcode(status) for status in statuses] == [7], statuses
        assert os.stat(path).st_size == 8192
        print("done")
    """).strip() == "done"
