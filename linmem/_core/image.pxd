# Images in Python. Floor 3.

from linmem._core.memory cimport ImageHandle, image


cdef class Image(ImageHandle):
    cdef object __weakref__
    cdef readonly size_t offset
    cdef readonly size_t size
    # Computed by whoever asks first. Without a GIL these may be several: each reads and writes them in a critical
    # section, or one would hold what another has just dropped.
    cdef object _digest         # or None: not computed yet
    cdef object _runs           # the same
    cdef object _contents       # of the file that this is a mapping of, else None
