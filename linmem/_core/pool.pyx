# cython: language_level=3
"""A creator whose memories serve one request after the other.

Parts:

- `pool_slots.pxi`: groups of slots, and the states of a slot
- `pool_limits.pxi`: all pools of the process, and the bounds that they share
- `pool_eviction.pxi`: which idle slot is evicted first; bounds, `trim()`, `purge()`, relief for a refused request
- `reset_costs.pxi`: the costs of page faults, scans and zeroing on this machine
- `pool_reset.pxi`: how the pages of a slot become zero again
- `pool_requests.pxi`: how a request gets a slot, and how the pool takes a slot back after use
- `pool_fork.pxi`: the repair of pools in a forked child
- `pool_statistics.pxi`: `stats()` and the metrics
- `pool_creator.pxi`: the class `PoolingCreator`
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport SIZE_MAX
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from linmem._core.atomic cimport add, atomic_i64, compare_exchange, load, store, store_release, store_size, touch
from linmem._core.linked_list cimport link, list_add_first, list_init, list_remove
from linmem._core.memory cimport (
    CACHE_LINE, NO_MAXIMUM, OWNER_CREATOR, OWNER_LEFT, PROTECTION_NONE, RELIEF_BUDGET, RELIEF_PAGES, RELIEF_SPACE,
    RUNS, UNCHOSEN, FileCreator, Image, Memory, MmapCreator, NativeCreator, call_in_each_child, check_count, check_flag,
    check_native, check_size, commit_pages, count_refusal, current_domain, domain as domain_t, domain_name,
    domain_of, domain_release, domain_retain, fail, fail_interrupted, failure, finish_make, image as image_t,
    image_attach, image_begin_use, image_copy, image_fill, image_is_attached, image_is_copied, image_is_intact,
    image_of, image_pages_are_gone, image_rebind, image_release, image_reset, image_restore, image_retain,
    image_shares_pages, lock, memory, memory_add_hook, memory_close_windows,
    memory_forget_protection, memory_hook,
    memory_protection_becomes_unknown, memory_release, memory_spec, memory_unprotect, name_option, next_live_memory,
    python_is_ending, raise_failure, refusals_count, register_fork_lock, release_address_space, set_domain,
    set_forgotten_callback, set_relief, touched_begin, touched_next, touched_runs, trace_if_on, unlock,
    unregister_fork_lock,
)
from linmem._os cimport pages
from linmem._core.reset_policy cimport (
    ANY, RESET_DISCARD, RESET_SCAN, RESET_ZERO, reset_begin, reset_bound, reset_costs, reset_end, reset_given_back,
    reset_policy, reset_start,
)
from linmem._core.units cimport E_EXHAUSTED, E_NO_MEMORY, E_UNSUPPORTED, lay_out, layout, round_down
from linmem._core.wide_stores cimport has_wide_stores, zero_wide

from time import sleep as _sleep

from linmem._core.arguments import given as _given, shown as _shown

include "pool_slots.pxi"
include "pool_limits.pxi"
include "pool_eviction.pxi"
include "reset_costs.pxi"
include "pool_reset.pxi"
include "pool_requests.pxi"
include "pool_fork.pxi"
include "pool_statistics.pxi"
include "pool_creator.pxi"
