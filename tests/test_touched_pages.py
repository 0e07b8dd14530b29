"""The touched pages that the page floor reports: never too few, and as few extra pages as possible."""

import ctypes
import errno
import mmap
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    FORKING,
    FORKS,
    LIBC,
    PAGE,
    REAL_PAGE,
    answer,
    build_extension,
    failing,
    file_requires,
    load_extension,
    requires,
    scanning,
    whichever,
)

import linmem
from linmem._os import pages

file_requires("scans", "compiler")

SPOTTER = """
# cython: language_level=3
cimport linmem._os.pages as pages


def touched(size_t at, size_t size, bint over_image=False, size_t room=64):
    '''One call. Returns the found runs and the start of the next call.'''
    cdef pages.span runs[256]
    cdef char* next = NULL
    cdef int code
    assert 0 < room <= 256
    with nogil:
        code = pages.touched(<char*>at, size, over_image, runs, &room, &next)
    if code:
        raise OSError(code, "touched")
    return [(<size_t>runs[i].addr, runs[i].size) for i in range(room)], <size_t>next


def all_touched(size_t at, size_t size, bint over_image=False, size_t room=64):
    '''Calls until the end of the range is reached. Returns all runs.'''
    found = []
    end = at + size
    while at < end:
        runs, next = touched(at, end - at, over_image, room)
        assert next > at, "no progress"
        found += runs
        at = next
    return found
"""

WAYS = whichever(("scan_ioctl", "ioctl"), ("scan_reading", "reading"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spotter")
    build_extension(folder, "spotter", SPOTTER)
    return folder


@pytest.fixture(scope="module")
def spotter(folder):
    return load_extension(folder, "spotter")


def numbers(runs, base):
    """The numbers of the kernel pages in the runs, from the base on. The runs must be sorted and must not touch."""
    found = []
    for at, size in runs:
        assert at % REAL_PAGE == size % REAL_PAGE == 0
        assert size > 0
        found += range((at - base) // REAL_PAGE, (at - base + size) // REAL_PAGE)
    assert found == sorted(set(found))
    return found


def write_pages(mem, which):
    for page in which:
        mem[page * REAL_PAGE + page % REAL_PAGE] = 1


@pytest.mark.parametrize("way", WAYS)
@given(written=st.sets(st.integers(0, 255)), room=st.sampled_from([1, 2, 3, 63, 64, 65, 256]))
def test_exactly_the_written_pages_are_found_with_any_buffer_size(way, spotter, written, room):
    with scanning(way), linmem.create(256 * REAL_PAGE) as mem:
        write_pages(mem, written)
        assert numbers(spotter.all_touched(mem.as_ptr(), 256 * REAL_PAGE, room=room), mem.as_ptr()) == sorted(written)


@pytest.mark.parametrize("way", WAYS)
def test_neighbouring_pages_are_one_run(way, spotter):
    with scanning(way), linmem.create(64 * REAL_PAGE) as mem:
        base = mem.as_ptr()
        write_pages(mem, [3, 4, 5, 63])
        runs, next = spotter.touched(base, 64 * REAL_PAGE)
        assert runs == [(base + 3 * REAL_PAGE, 3 * REAL_PAGE), (base + 63 * REAL_PAGE, REAL_PAGE)]
        assert next == base + 64 * REAL_PAGE


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("room", [64, 256])
def test_runs_that_do_not_fit_in_the_buffer_continue_at_next(way, spotter, room):
    n = 200
    with scanning(way), linmem.create(2 * n * REAL_PAGE) as mem:
        base, end = mem.as_ptr(), mem.as_ptr() + 2 * n * REAL_PAGE
        write_pages(mem, range(0, 2 * n, 2))
        first, next = spotter.touched(base, end - base, room=room)
        assert 0 < len(first) <= room
        assert first == [(base + 2 * page * REAL_PAGE, REAL_PAGE) for page in range(len(first))]
        if len(first) < n:
            assert first[-1][0] < next <= base + 2 * len(first) * REAL_PAGE
        runs = spotter.all_touched(base, end - base, room=room)
        assert numbers(runs, base) == list(range(0, 2 * n, 2))


@pytest.mark.parametrize("way", WAYS)
def test_no_page_outside_the_range_is_found(way, spotter):
    with scanning(way), linmem.create(64 * REAL_PAGE) as mem:
        write_pages(mem, range(64))
        at = mem.as_ptr() + 7 * REAL_PAGE
        assert spotter.touched(at, 9 * REAL_PAGE) == ([(at, 9 * REAL_PAGE)], at + 9 * REAL_PAGE)


@requires("scan_ioctl")
def test_a_page_that_was_only_read_is_not_found_by_the_ioctl(spotter):
    with scanning("ioctl"), linmem.create(64 * REAL_PAGE) as mem:
        assert not any(mem.read(0, 64 * REAL_PAGE))
        assert spotter.all_touched(mem.as_ptr(), 64 * REAL_PAGE) == []
        mem[5 * REAL_PAGE] = 0      # a write, although the byte stays the same
        assert numbers(spotter.all_touched(mem.as_ptr(), 64 * REAL_PAGE), mem.as_ptr()) == [5]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("access", ["r", "none"])
def test_written_pages_that_cannot_be_touched_any_more_are_found(way, spotter, access):
    with scanning(way), linmem.create(8 * PAGE) as mem:
        base = mem.as_ptr()
        mem[3 * PAGE] = mem[4 * PAGE] = 1
        mem.protect(2 * PAGE, 3 * PAGE, access)
        assert numbers(spotter.all_touched(base, 8 * PAGE), base) == [3 * PAGE // REAL_PAGE, 4 * PAGE // REAL_PAGE]


@pytest.mark.parametrize("way", WAYS)
def test_discarded_pages_are_no_longer_found(way, spotter):
    with scanning(way), linmem.create(16 * PAGE) as mem:
        mem.write(0, b"x" * 16 * PAGE)
        mem.discard(PAGE, 14 * PAGE)
        runs = spotter.all_touched(mem.as_ptr(), 16 * PAGE)
        assert runs == [(mem.as_ptr(), PAGE), (mem.as_ptr() + 15 * PAGE, PAGE)]


@pytest.mark.parametrize("way", WAYS)
def test_a_written_page_that_the_kernel_was_told_to_swap_out_is_found(way, spotter):
    # With swap, the page is then not present but keeps its bytes. Without swap, the page stays present.
    pageout = 21
    with scanning(way), linmem.create(16 * PAGE) as mem:
        base = mem.as_ptr()
        mem.write(PAGE, b"x" * 14 * PAGE)
        LIBC.madvise(ctypes.c_void_p(base), ctypes.c_size_t(16 * PAGE), pageout)    # a hint only
        assert spotter.all_touched(base, 16 * PAGE) == [(base + PAGE, 14 * PAGE)]


@pytest.mark.parametrize("way", WAYS)
def test_over_an_image_only_the_pages_that_differ_are_found(way, spotter, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"i" * 16 * REAL_PAGE)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 16 * REAL_PAGE, flags=mmap.MAP_PRIVATE,
                                            prot=mmap.PROT_READ | mmap.PROT_WRITE) as image, scanning(way):
        anchor = ctypes.c_char.from_buffer(image)
        base = ctypes.addressof(anchor)
        assert image[2 * REAL_PAGE:4 * REAL_PAGE] == b"i" * 2 * REAL_PAGE
        image[3 * REAL_PAGE] = image[9 * REAL_PAGE] = 0
        assert numbers(spotter.all_touched(base, 16 * REAL_PAGE, True), base) == [3, 9]
        assert {2, 3, 9} <= set(numbers(spotter.all_touched(base, 16 * REAL_PAGE, False), base))
        del anchor


def test_a_failure_is_the_code_of_the_os(spotter):
    with linmem.create(PAGE) as mem:
        for code in (errno.ENOSYS, errno.EPERM):
            with failing(1, code) as injected, pytest.raises(OSError) as caught:
                spotter.touched(mem.as_ptr(), PAGE)
            assert injected.happened
            assert caught.value.errno == code


def test_an_unknown_way_is_refused_and_none_finds_no_page(spotter):
    before = pages.choose_scan(None)
    try:
        assert pages.describe()["capabilities"]["scans"] is False
        with linmem.create(PAGE) as mem, pytest.raises(OSError) as caught:
            spotter.touched(mem.as_ptr(), PAGE)
        assert caught.value.errno == errno.ENOSYS
        for wrong in ("", "mincore", 2, True):
            with pytest.raises(ValueError, match="way must be one that works here"):
                pages.choose_scan(wrong)
    finally:
        assert pages.choose_scan(before) is None
    assert pages.describe()["capabilities"]["scans"] is True


# -- the descriptor ----------------------------------------------------------------------------------

HEAD = """
sys.path.insert(0, {folder!r})
import linmem, spotter
from linmem._os import pages
pages.choose_scan({way!r})
P = {page}
mem = linmem.create(8 * P)
base = mem.as_ptr()

def found():
    return [((at - base) // P, size // P) for at, size in spotter.all_touched(base, 8 * P)]
"""


def run(folder, way, code):
    """The output of a child that runs the head and then `code`."""
    return answer(FORKING + HEAD.format(folder=str(folder), way=way, page=REAL_PAGE) + textwrap.dedent(code))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fork", FORKS)
def test_a_forked_child_finds_its_own_pages_and_not_its_parents(folder, way, fork):
    """For each way to fork. `_Fork` runs no fork handler, like raw clone(2)."""
    assert run(folder, way, f"""
        assert found() == []        # the descriptor is open now
        def work():
            mem[2 * P] = 1
            assert found() == [(2, 1)], found()
            def grandchild():
                mem[4 * P] = 1
                assert found() == [(2, 1), (4, 1)], found()
            child({fork}, grandchild)
            assert found() == [(2, 1)], found()
        child({fork}, work)
        mem[6 * P] = 1
        assert found() == [(6, 1)], found()
        print("own pages")
        """) == "own pages"


@requires("fork", "scan_ioctl")
def test_the_parents_descriptor_in_place_of_the_childs_own_is_detected(folder):
    """The parent's descriptor would not show the child's writes; the result of its ioctl proves this."""
    assert run(folder, "ioctl", """
        import fcntl, struct
        inherited = os.open("/proc/self/pagemap", os.O_RDONLY)
        room = ctypes.create_string_buffer(24)
        def asked(fd):
            ask = bytearray(struct.pack("12Q", 96, 0, base, base + 8 * P, 0, ctypes.addressof(room), 1, 0, 4, 4, 8, 0))
            return fcntl.ioctl(fd, 0xc0606610, ask)
        def work():
            mem[2 * P] = 1
            assert found() == [(2, 1)]
            (own,) = (n for n, name in descriptors().items() if name.endswith("/pagemap") and n != inherited)
            assert (asked(inherited), asked(own)) == (0, 1)
            os.dup2(inherited, own)
            assert found() == [(2, 1)], found()
        child(os.fork, work)
        print("noticed")
        """) == "noticed"


@pytest.mark.parametrize("way", WAYS)
@requires("fork")
def test_a_child_does_not_keep_the_descriptor_of_its_parent(folder, way):
    assert run(folder, way, """
        found()
        before = descriptors()
        assert sum(name.endswith("/pagemap") for name in before.values()) == 1, before
        def work():
            assert not any(name.endswith("/pagemap") for name in descriptors().values()), descriptors()
            found()
            assert [name for name in descriptors().values() if name.endswith("/pagemap")] == [
                f"/proc/{os.getpid()}/pagemap"]
        child(os.fork, work)
        assert descriptors() == before
        print("closed")
        """) == "closed"


@pytest.mark.parametrize("way", WAYS)
def test_a_program_that_is_started_inherits_no_descriptor(folder, way):
    assert run(folder, way, """
        import subprocess
        found()
        listed = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False)
        assert "pagemap" not in listed.stdout
        print(listed.returncode)
        """) == "0"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("taken", ["nothing", "os.open('/dev/null', os.O_RDWR)", "os.open(__file__, os.O_RDONLY)",
                                   "os.pipe()", "os.memfd_create('other')", "os.open('/proc/self/maps', os.O_RDONLY)",
                                   "os.open('/proc/self/pagemap', os.O_RDONLY)",
                                   "os.open(f'/proc/{other}/pagemap', os.O_RDONLY)"])
@requires("fork")
def test_after_all_descriptors_were_closed_every_page_is_found(folder, way, taken):
    # Daemons close all descriptors. A new file may get the old number, and then the result must never be "no page was
    # touched".
    assert run(folder, way, f"""
        assert found() == []
        read, write = os.pipe()
        other = os.fork()
        if other == 0:
            os.close(write)
            os.read(read, 1)        # until the parent ends
            os._exit(0)
        mem[3 * P] = 1              # the forked process does not have this write
        assert found() == [(3, 1)]
        (number,) = (n for n, name in descriptors().items() if name.endswith("/pagemap"))
        __file__ = spotter.__file__
        os.closerange(3, write)
        os.closerange(write + 1, 256)
        nothing = None
        kept = {taken}
        if isinstance(kept, int) and kept != number:
            os.dup2(kept, number)
        for _ in range(2):
            assert found() == [(3, 1)], found()
        os.close(write)
        os.waitpid(other, 0)
        print("found")
        """) == "found"


@pytest.mark.parametrize("way", WAYS)
@requires("fork")
def test_a_file_that_took_the_number_of_the_closed_descriptor_stays_open_in_a_child(folder, way):
    assert run(folder, way, """
        found()
        (number,) = (n for n, name in descriptors().items() if name.endswith("/pagemap"))
        os.close(number)
        log = os.open("/dev/null", os.O_WRONLY)
        os.dup2(log, number)
        def work():
            assert os.readlink(f"/proc/self/fd/{number}") == "/dev/null"
            os.write(number, b"still open")
        child(os.fork, work)
        print("open")
        """) == "open"


@pytest.mark.parametrize("way", WAYS)
@requires("rlimits")
def test_without_a_descriptor_to_spare_the_call_fails_by_name_and_works_later(folder, way):
    assert run(folder, way, """
        import errno, resource
        mem[3 * P] = 1
        for number, name in descriptors().items():      # linmem opened it when it chose a way to scan
            if name.endswith("/pagemap"):
                os.close(number)
        assert found() == [(3, 1)]                      # by a new descriptor
        for number, name in descriptors().items():
            if name.endswith("/pagemap"):
                os.close(number)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        codes = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        for _ in range(3):
            try:
                codes.append(found())
            except OSError as error:
                codes.append(error.errno)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert codes == [errno.EMFILE] * 3, codes
        print(found())
        """) == "[(3, 1)]"
