# The names that `cimport linmem` offers to other Cython modules. All functions but `raise_failure`
# and `wrap` run without the GIL.
#
#     cimport linmem
#
#     def fill(linmem.Memory mem not None, size_t size):
#         cdef linmem.failure why
#         cdef linmem.memory* m = mem.enter()     # the pages stay until mem.leave()
#         cdef int code
#         with nogil:
#             code = linmem.memory_grow_to(m, size, &why)
#             if code == 0:
#                 memset(m.base, 1, linmem.memory_size(m))
#         mem.leave()
#         if code:
#             linmem.raise_failure(&why)
#
# Read m.base again after each growth: m.base may change when memory_grow_to() goes past m.capacity.

from linmem._core.memory cimport (
    NO_MAXIMUM, UNCHOSEN, Image, Memory, MmapCreator, NativeCreator, delta_piece, failure, image, image_release,
    memory, memory_add_hook, memory_apply, memory_discard, memory_grow_to, memory_hook, memory_prefault,
    memory_protect, memory_release, memory_restore, memory_retain, memory_size, memory_snapshot, memory_spec,
    raise_failure, wrap,
)
from linmem._core.pool cimport PoolingCreator
from linmem._os.pages cimport ACCESS_NONE, ACCESS_READ, ACCESS_READ_EXECUTE, ACCESS_READ_WRITE
