"""Another Cython module builds on the installed .pxd files and works without the GIL."""

import pytest
from support import HALF_CREATOR, PAGE, build_extension, load_extension, mappings, requires

import linmem

pytestmark = requires("compiler")

MODULE = """
# cython: language_level=3
cimport linmem
from libc.string cimport memset


def fill(linmem.Memory mem not None, size_t size, int byte):
    cdef linmem.failure why
    cdef linmem.memory* m = mem.enter()
    cdef int code
    with nogil:
        code = linmem.memory_grow_to(m, size, &why)
        if code == 0:
            memset(m.base, byte, linmem.memory_size(m))
    mem.leave()
    if code:
        linmem.raise_failure(&why)


def pages(linmem.Memory mem not None, size_t offset, size_t size):
    '''Protect a range, discard it, make the pages resident, and protect them for reading only.'''
    cdef linmem.failure why
    cdef linmem.memory* m = mem.enter()
    cdef int code
    with nogil:
        code = linmem.memory_protect(m, offset, size, linmem.ACCESS_READ_WRITE, &why)
        if code == 0:
            code = linmem.memory_discard(m, offset, size, &why)
        if code == 0:
            code = linmem.memory_prefault(m, offset, size, &why)
        if code == 0:
            code = linmem.memory_protect(m, offset, size, linmem.ACCESS_READ, &why)
    mem.leave()
    if code:
        linmem.raise_failure(&why)


def there_and_back(linmem.Memory mem not None, size_t size, bytes data not None):
    '''Snapshot the memory, apply a delta that grows it to `size` and writes `data` at its end, and restore it.'''
    cdef linmem.failure why
    cdef linmem.image* img = NULL
    cdef linmem.delta_piece piece
    cdef linmem.memory* m = mem.enter()
    cdef size_t before = linmem.memory_size(m)
    cdef int code, applied = 1
    cdef bint written = False
    piece.offset, piece.size, piece.bytes = size - <size_t>len(data), <size_t>len(data), data
    with nogil:
        code = linmem.memory_snapshot(m, &img, &why)
        if code == 0:
            code = applied = linmem.memory_apply(m, before, size, &piece, 1, &why)
        if code == 0:
            written = m.base[size - 1] == (<const char*>piece.bytes)[piece.size - 1]
            code = linmem.memory_restore(m, img, True, &why)
        linmem.image_release(img)
    mem.leave()
    if code:
        linmem.raise_failure(&why)
    return written


""" + HALF_CREATOR


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("client")
    build_extension(folder, "client", MODULE)
    return load_extension(folder, "client")


def test_a_cython_client_grows_and_fills_a_memory_without_the_gil(client):
    with linmem.create(10, 1 << 20) as mem:
        client.fill(mem, 5000, 3)
        assert bytes(mem) == b"\3" * 5000
        with pytest.raises(linmem.GrowError, match="maximum_byte_size"):
            client.fill(mem, 1 << 21, 3)
        with pytest.raises(ValueError, match="new_size must be >="):
            client.fill(mem, 1, 3)
    with pytest.raises(ValueError, match="closed"):
        client.fill(mem, 5000, 3)


def test_a_cython_client_protects_discards_and_prefaults_pages_without_the_gil(client):
    with linmem.create(4 * PAGE) as mem:
        mem[:] = b"x" * 4 * PAGE
        client.pages(mem, PAGE, 2 * PAGE)
        assert mem[:] == b"x" * PAGE + bytes(2 * PAGE) + b"x" * PAGE
        with pytest.raises(ValueError, match="write is refused"):
            mem[PAGE] = 1
        assert [m.access for m in mappings(mem.as_ptr(), mem.as_ptr() + 4 * PAGE)] == ["rw-p", "r--p", "rw-p"]
        with pytest.raises(ValueError, match="offset must be a multiple of the host page"):
            client.pages(mem, 1, PAGE)
        with pytest.raises(ValueError, match=r"offset \+ size must be <= byte_size"):
            client.pages(mem, PAGE, 4 * PAGE)


def test_a_cython_client_snapshots_applies_and_restores_without_the_gil(client):
    with linmem.create(1000, 1 << 20) as mem:
        mem[:3] = b"abc"
        assert client.there_and_back(mem, 70000, b"tail")
        assert (len(mem), mem[:3], mem[3:].strip(b"\0")) == (70000, b"abc", b"")
        with pytest.raises(ValueError, match="the delta is for one of 70000 that becomes one of 100"):
            client.there_and_back(mem, 100, b"tail")


def test_a_creator_written_in_cython_joins_a_chain(client):
    budget = linmem.LimitingCreator(client.Half(linmem.MmapCreator()), 1 << 20)
    with linmem.create(1000, creator=budget) as mem:
        assert len(mem) == 500
