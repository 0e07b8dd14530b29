# cython: language_level=3
"""Creators that pass their requests on to another creator, the upstream.

Parts: `limiting_creator.pxi`, a budget of bytes; `statistics_creator.pxi`, counts and times; `python_creator.pxi`, a
Python class as a creator.
"""

cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport SIZE_MAX
from libc.stdlib cimport calloc, free, malloc

from linmem._core.atomic cimport add, compare_exchange, load, load_address, store, store_address, store_size
from linmem._core.linked_list cimport link, list_add_first, list_init, list_remove
from linmem._core.memory cimport (
    NO_MAXIMUM, PROTECTION_NONE, RELIEF_BUDGET, UNCHOSEN, Image, Memory, NativeCreator, add_live_memory,
    answer_request, begin_move, begin_own_growth, call_in_each_child, check_bounded, check_count, check_native,
    check_size, current_domain, deferred_decref, end_move, end_own_growth, fail, fail_python, failure, image_copy,
    image_detach, lock, memory, memory_add_hook, memory_hook, memory_ops, memory_resident, memory_retain, memory_size,
    memory_spec, next_live_memory, own_growth, python_is_ending, raise_failure, refuse_foreign, register_fork_lock,
    release_address_space, relieve, remove_live_memory, request, try_lock, unlock, unregister_fork_lock,
)
from linmem._os cimport pages
from linmem._core.units cimport E_BROKEN, E_LIMIT, E_NO_MEMORY, E_UNSUPPORTED, add_up, round_up

from linmem._core.arguments import given as _given


cdef void* new_zeroed(size_t size, str purpose) except NULL:
    cdef void* made = calloc(1, size)
    if made == NULL:
        raise MemoryError(f"no memory for {purpose}")
    return made


include "limiting_creator.pxi"
include "statistics_creator.pxi"
include "python_creator.pxi"
