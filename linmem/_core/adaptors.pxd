# Creators over an upstream creator. Floor 4.

from linmem._core.memory cimport NativeCreator, failure, fork_lock, memory, memory_spec
from linmem._core.units cimport word


# Shared by a LimitingCreator and the hooks of its memories; wasmtime may outlive the creator.
cdef struct budget:
    word refs
    word used           # bytes charged now
    word peak           # the most that was ever charged
    long long limit     # bytes
    long long least     # of this limit and those below
    budget* next        # of all budgets
    budget* previous


cdef class LimitingCreator(NativeCreator):
    cdef readonly NativeCreator upstream
    cdef budget* budget
    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil


# What happened to one memory; sizes in bytes.
cdef struct record:
    record* next
    record* previous        # the newer neighbour in its list
    memory* m               # NULL once it is dropped
    size_t first_size
    size_t size
    size_t counted          # in current_bytes: the size, or 0 while a pool above has the memory without pages
    word sampling           # a lock: the memory stays until it is open
    size_t peak_resident    # sampled when the report is made and when the memory is dropped
    size_t growths
    size_t refused
    long long grow_ns


# Shared by a StatisticsCreator and the hooks of its memories.
cdef struct ledger:
    word refs
    fork_lock lock
    record* live
    record* dropped         # newest first
    record* oldest          # the last of them
    size_t n_live
    size_t n_dropped        # in the list
    size_t history          # at most so many dropped records are kept
    size_t current_bytes
    size_t peak_bytes
    size_t total_bytes
    size_t peak_count
    size_t total_count
    size_t failures


cdef class StatisticsCreator(NativeCreator):
    cdef readonly NativeCreator upstream
    cdef ledger* ledger
    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil


cdef class PythonCreator(NativeCreator):
    cdef readonly object creator
    cdef int make(self, const memory_spec* spec, memory** out, failure* why) noexcept nogil
    cdef int make_in_python(self, const memory_spec* spec, memory** out) except -1
