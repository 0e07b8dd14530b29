# The C interface of the creators that pass their requests on to another creator, the upstream. Layer 4.

from linmem._core.linked_list cimport link
from linmem._core.memory cimport NativeCreator, failure, fork_lock, memory, memory_spec
from linmem._core.units cimport atomic_i64
from linmem._os cimport pages

cdef struct budget


cdef class LimitingCreator(NativeCreator):
    cdef readonly NativeCreator upstream
    cdef budget* budget
    cdef const pages.file_pages* attached       # of a creator upstream that attaches one shared memory; else NULL


# The sums over all memories of a StatisticsCreator, as statistics() returns them; sizes in bytes.
cdef struct statistics_sums:
    size_t current_bytes
    size_t peak_bytes
    size_t total_bytes
    size_t current_count
    size_t peak_count
    size_t total_count
    size_t failures


# Shared by a StatisticsCreator and the hooks of its memories, because wasmtime may outlive the creator.
cdef struct statistics_ledger:
    atomic_i64 refs
    fork_lock lock          # protects all members below
    link live               # records of memories that exist
    link dropped            # records of dropped memories, the newest first
    size_t n_dropped        # the number of records in `dropped`
    size_t history          # the most records that `dropped` keeps
    size_t timeline         # the most changes of its size that a record keeps; not 1
    long long started_ns    # when the creator was made
    statistics_sums sums


cdef class StatisticsCreator(NativeCreator):
    cdef readonly NativeCreator upstream
    cdef statistics_ledger* ledger


cdef struct tracker


cdef class TrackingCreator(NativeCreator):
    cdef readonly NativeCreator upstream
    cdef tracker* tracker
    cdef list allocations(self, bint only_leaks)


cdef class CallbackCreator(NativeCreator):
    cdef readonly NativeCreator upstream
    cdef readonly object on_made, on_grow, on_refused, on_dropped
    cdef size_t most_bytes, most_growths
    cdef bint calls_python


cdef struct route


cdef class RoutingCreator(NativeCreator):
    cdef readonly object rule
    cdef route* routes          # NULL: `rule` is a function
    cdef size_t n_routes


cdef class PythonCreator(NativeCreator):
    cdef readonly object creator
