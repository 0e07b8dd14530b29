"""Another Cython module builds on the installed .pxd files and works without the GIL."""

import pytest
from support import HALF_CREATOR, build_extension, load_extension, requires

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


def test_a_creator_written_in_cython_joins_a_chain(client):
    budget = linmem.LimitingCreator(client.Half(linmem.MmapCreator()), 1 << 20)
    with linmem.create(1000, creator=budget) as mem:
        assert len(mem) == 500
