# The exporter behind Memory.view(): elements of a format that memoryview.cast() does not know; a part of memory.pyx.

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_STRIDES


# A Window needs no garbage collection, because its memory is in no reference cycle. If the collector cleared a Window,
# the Window would lose the memory before its buffers are released.
@cython.no_gc
@cython.final
cdef class Window:
    """Exports a typed part of a memory."""

    cdef Memory memory
    cdef size_t offset
    cdef bytes format
    cdef Py_ssize_t shape[1]
    cdef Py_ssize_t strides[1]

    def __reduce__(self):
        raise TypeError("a Window cannot be pickled or copied: it is a part of a memory of this process")

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        if self.memory is None:
            raise TypeError("a Window is made by Memory.view()")
        export_buffer(self.memory, buffer, self, self.offset, self.shape[0] * self.strides[0], flags)
        buffer.itemsize = self.strides[0]
        if flags & PyBUF_FORMAT:
            buffer.format = PyBytes_AS_STRING(self.format)
        if flags & PyBUF_ND:
            buffer.shape = self.shape
        if (flags & PyBUF_STRIDES) == PyBUF_STRIDES:
            buffer.strides = self.strides

    def __releasebuffer__(self, Py_buffer* buffer):
        end_export(self.memory)


cdef Window new_window(Memory mem, size_t offset, bytes format, size_t n, size_t itemsize):
    cdef Window window = Window.__new__(Window)
    window.memory = mem
    window.offset = offset
    window.format = format
    window.shape[0] = n
    window.strides[0] = itemsize
    return window
