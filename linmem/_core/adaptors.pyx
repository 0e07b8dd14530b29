# cython: language_level=3
"""Creators that pass their requests on to another creator, the upstream.

Parts: `limiting_creator.pxi`, a budget of bytes; `statistics_creator.pxi`, counts and times; `tracking_creator.pxi`,
the lines and scopes that made memories; `callback_creator.pxi`, Python functions that are told and decide;
`routing_creator.pxi`, one of several creators for each request; `python_creator.pxi`, a Python class as a creator.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF, Py_INCREF
from libc.stdint cimport SIZE_MAX
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

from linmem._core.atomic cimport (
    add, compare_exchange, load, load_address, store, store_address, store_release, store_size,
)
from linmem._core.linked_list cimport link, list_add_first, list_init, list_remove
from linmem._core.memory cimport (
    MOST_FRAMES, NAME_BYTES, NO_MAXIMUM, OWNER_CREATOR, OWNER_PYTHON, OWNER_WASMTIME, PROTECTION_NONE, RELIEF_BUDGET,
    UNCHOSEN, Image, Memory, NativeCreator, SharedCreator, add_live_memory, answer_request, begin_move,
    begin_own_growth, call_in_each_child, capture_stack, check_bounded, check_count, check_flag, check_native,
    check_size, current_domain, deferred_decref, domain, domain as domain_t, domain_name, domain_of, domain_release,
    domain_retain, drop_frames, end_move, end_own_growth, exception_of, fail, fail_python, failure, finish_make,
    handle_on, image_copy, image_detach, lock, lock_memory, may_run_python, memory, memory_add_hook, memory_hook,
    memory_name, memory_ops, memory_release, memory_resident, memory_retain, memory_size, memory_spec, name_option,
    next_live_memory, only_buffers_hold, own_growth, python_is_ending, raise_failure, raise_later, refusal_log,
    refusals_release, refusals_retain, refuse_foreign, refuse_make, register_fork_lock, release_address_space, relieve,
    remove_live_memory, request, stack_frame, try_lock, unlock, unregister_fork_lock, window_may_shrink,
)
from linmem._os cimport pages
from linmem._core.units cimport (
    E_BROKEN, E_GROWTHS, E_LIMIT, E_NO_MEMORY, E_PYTHON, E_UNSUPPORTED, E_VALUE, add_up, round_up,
)

from contextvars import ContextVar

from linmem._core.arguments import given as _given, show_size as _show_size, shown as _shown


cdef void* new_zeroed(size_t size, str purpose) except NULL:
    cdef void* made = calloc(1, size)
    if made == NULL:
        raise MemoryError(f"no memory for {purpose}")
    return made


include "limiting_creator.pxi"
include "statistics_creator.pxi"
include "tracking_creator.pxi"
include "callback_creator.pxi"
include "routing_creator.pxi"
include "python_creator.pxi"
