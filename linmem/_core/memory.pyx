# cython: language_level=3
"""Memories and images: the structs that threads share without the GIL, and the Python classes over them.

Memory, Image and the creators make and use each other, so they are one module. The files below are its parts.
"""

# The parts use these names; the linter does not look into the parts.
cimport cython  # no-cython-lint
from cpython.buffer cimport PyBuffer_FillInfo  # no-cython-lint
from cpython.object cimport PyObject, PyTypeObject  # no-cython-lint
from cpython.ref cimport Py_DECREF  # no-cython-lint
from libc.stdint cimport SIZE_MAX  # no-cython-lint
from libc.stdio cimport snprintf  # no-cython-lint
from libc.stdlib cimport calloc, free, malloc, qsort, realloc  # no-cython-lint
from libc.string cimport memcmp, memcpy, memmove, memset, strcmp  # no-cython-lint

from linmem._core.atomic cimport (  # no-cython-lint
    add, atomic_i64, compare_exchange, cpu_relax, load, load_address, load_size, store, store_address,  # no-cython-lint
    store_16, store_release, store_size,  # no-cython-lint
)
from linmem._core.linked_list cimport link, list_add_first, list_init, list_remove  # no-cython-lint
from linmem._core.units cimport (  # no-cython-lint
    E_CAPACITY, E_EXPORTED, E_MAXIMUM, E_NO_MEMORY, E_OVERFLOW, E_SHRINK, E_UNSUPPORTED,  # no-cython-lint
    SMALL_RESERVATION, add_up, choose_reservation, lay_out, layout, room_to_choose, round_down,  # no-cython-lint
    round_up,  # no-cython-lint
)
from linmem._os cimport pages  # no-cython-lint

from linmem import abc as _abc  # no-cython-lint

include "failures.pxi"              # turns the code of a failed call into a text and an exception
include "argument_checks.pxi"       # checks of sizes, offsets, flags and buffers that Python passes
include "deferred_decref.pxi"       # Py_DECREF without the GIL
include "python_stack.pxi"          # which lines of Python are being executed
include "locks_and_fork.pxi"        # locks, waits that Ctrl-C can interrupt, and what a forked child repairs
include "lifetime.pxi"              # references, pins and accesses: what keeps a memory and its base
include "tracemalloc_domain.pxi"    # the bytes of memories in Python's tracemalloc
include "growth.pxi"                # growth of any kind of memory, and its hooks
include "address_space.pxi"         # how much is reserved, and what happens if the OS refuses
include "places.pxi"                # which memory an address belongs to, and all live memories
include "fault_report.pxi"          # names the memory before the process dies of a memory fault; the quarantine
include "mapped_memory.pxi"         # the mapped kind of memory
include "protection.pxi"            # which pages are not "rw": protect
include "discard_and_prefault.pxi"  # give pages back to the OS, and make pages resident
include "map_and_unmap.pxi"         # which pages show another source: map and unmap
include "image_builder.pxi"         # images: reference counts, and how one is filled
include "copy_on_write.pxi"         # from which image a memory started, and how to set it back to the image
include "memory_snapshot.pxi"       # a memory's contents, and where they differ from an image
include "restore_and_apply.pxi"     # write an image or a delta into a memory
include "domains.pxi"               # domains, and the request that a Python creator is handling on a thread
include "refusals.pxi"              # which requests each creator refused
include "native_creator.pxi"        # the classes NativeCreator and MmapCreator
include "file_memory.pxi"           # the kind of memory whose pages are a file's, and the class FileCreator
include "shared_memory.pxi"         # the kind of memory that processes share
include "shared_creator.pxi"        # the class SharedCreator
include "memory_class.pxi"          # the class Memory
include "typed_view.pxi"            # the exporter of elements behind Memory.view()
include "row_buffer.pxi"            # rows in a memory, and how many there are: the base of linmem.GrowableArray
include "image_class.pxi"           # the class Image
