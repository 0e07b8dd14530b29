# Images: reference counts, and how an image is filled with bytes; a part of memory.pyx.
#
#   |<------------------------- content (host pages) -------------------------->|
#   +------------------+-----------------------------------+--------------------+
#   | zeros            | runs of bytes, zeros between them | zeros              |
#   +------------------+-----------------------------------+--------------------+
#   ^offset            ^offset+low                         ^offset+high       end^ (<= offset + content.size)
#
# Outside offset+low .. offset+high a memory of the image holds zeros, and its pages are those of any memory.

cdef char[GRANULE] zeros

# The image of no bytes, for an Image object that was made without an image, so that `it` is never NULL. Never freed.
cdef image no_image
no_image.refs = 1
no_image.content.handle = -1
no_image.runs_known = True


cdef bint is_zero(const char* bytes, size_t size) noexcept nogil:
    while size > GRANULE:
        if memcmp(bytes, zeros, GRANULE):
            return False
        bytes += GRANULE
        size -= GRANULE
    return memcmp(bytes, zeros, size) == 0


cdef void image_retain(image* img) noexcept nogil:
    if img != NULL:
        add(&img.refs, 1)


cdef void image_release(image* img) noexcept nogil:
    if img == NULL or add(&img.refs, -1):
        return
    if img.content.size:
        pages.image_drop(&img.content)
    free(img.runs)
    free(img)


cdef void (*tell_forgotten)(image* img) noexcept nogil
tell_forgotten = NULL


cdef void set_forgotten_callback(void (*tell)(image* img) noexcept nogil) noexcept nogil:
    """The pool calls this once. `tell` is called with each image that is forgotten and still has slots."""
    global tell_forgotten
    tell_forgotten = tell


cdef void image_forget(image* img) noexcept nogil:
    """The Image object is gone."""
    store(&img.forgotten, 1)
    if load(&img.slots) and tell_forgotten != NULL:
        tell_forgotten(img)
    image_release(img)


# -- making one: image_new(), image_put() for each piece, image_finish()

cdef image* image_alloc(size_t offset, size_t size, failure* why) noexcept nogil:
    """An image without content. NULL: it failed. *why is filled then."""
    cdef size_t end, page = host_page()
    cdef image* img
    if add_up(offset, size, &end) or round_up(end, page, &end) or end > SIZE_MAX >> 1:
        fail(why, E_OVERFLOW, "offset" if offset > size else "size", offset if offset > size else size)
        return NULL
    img = <image*>calloc(1, sizeof(image))
    if img == NULL:
        fail(why, E_NO_MEMORY, "calloc", sizeof(image))
        return NULL
    img.refs = 1
    img.offset = round_down(offset, page)
    img.end = offset + size
    img.content.handle = -1
    img.runs_known = True
    return img


cdef size_t content_size(const image* img) noexcept nogil:
    """Bytes of the host pages from img.offset to img.end."""
    cdef size_t size = 0
    round_up(img.end - img.offset, host_page(), &size)
    return size


cdef image* image_new(size_t offset, size_t size, failure* why) noexcept nogil:
    """An image of zeros, to be filled. NULL: it failed. *why is filled then."""
    cdef image* img = image_alloc(offset, size, why)
    cdef size_t n
    if img == NULL:
        return NULL
    n = content_size(img)
    if n and fail_page_call(why, pages.image_begin(n, &img.content), "image_begin", n):
        free(img)
        return NULL
    return img


cdef int image_put(image* img, size_t at, const char* bytes, size_t size, failure* why) noexcept nogil:
    """Put bytes at `at` (a multiple of GRANULE) of the content, after all bytes that are there already. Granules of
    zeros take no space."""
    cdef size_t first, end = 0
    cdef int code = 0
    while end < size and code == 0:
        first = end + while_zero(bytes + end, size - end, True)
        end = first + while_zero(bytes + first, size - first, False)
        if end > first:
            code = image_put_run(img, at + first, bytes + first, end - first, why)
    return code


cdef size_t while_zero(const char* bytes, size_t size, bint zero) noexcept nogil:
    """The length of the granules at the beginning that are all zero, or that all are not; `size` at most."""
    cdef size_t end = 0, step
    while end < size:
        step = size - end if size - end < GRANULE else <size_t>GRANULE
        if (memcmp(bytes + end, zeros, step) == 0) != zero:
            break
        end += step
    return end


cdef int image_put_run(image* img, size_t at, const char* bytes, size_t size, failure* why) noexcept nogil:
    cdef size_t n = img.n_runs
    cdef run* runs
    cdef int code = pages.image_write(&img.content, at, bytes, size)
    if code:
        return fail_page_call(why, code, "image_write", size)
    round_up(size, GRANULE, &size)
    if n and img.runs[n - 1].offset + img.runs[n - 1].size == at:
        img.runs[n - 1].size += size
        return 0
    runs = <run*>with_room(img.runs, n, &img.room, sizeof(run))
    if runs == NULL:
        return fail(why, E_NO_MEMORY, "realloc", n * sizeof(run))
    img.runs = runs
    runs[n].offset = at
    runs[n].size = size
    img.n_runs = n + 1
    return 0


cdef void* with_room(void* items, size_t n, size_t* room, size_t item_size) noexcept nogil:
    """The array of `n` items, reallocated if it has no room for one more. NULL: no memory; the array is as before."""
    cdef size_t more = n + (n >> 1) + 16
    if n < room[0]:
        return items
    items = realloc(items, more * item_size)
    if items != NULL:
        room[0] = more
    return items


cdef int image_finish(image* img, failure* why) noexcept nogil:
    image_bound(img)
    return fail_page_call(why, pages.image_end(&img.content), "image_end", img.content.size) if img.content.size else 0


cdef void image_bound(image* img) noexcept nogil:
    """Set low and high from the runs."""
    cdef size_t page = host_page()
    if img.n_runs:
        img.low = round_down(img.runs[0].offset, page)
        round_up(img.runs[img.n_runs - 1].offset + img.runs[img.n_runs - 1].size, page, &img.high)


# -- pieces that begin and end anywhere: image_put() takes whole granules, so their ends are put together here

cdef struct builder:
    image* img
    size_t granule          # where the granule begins that is being filled, in the content
    size_t filled           # bytes of the granule that are filled; 0: no granule is being filled
    char bytes[GRANULE]


cdef int put_granule(builder* b, failure* why) noexcept nogil:
    cdef size_t n = b.filled
    b.filled = 0
    return image_put(b.img, b.granule, b.bytes, n, why) if n else 0


cdef int put_piece(builder* b, size_t at, const char* bytes, size_t size, failure* why) noexcept nogil:
    cdef size_t granule, lead, step
    cdef int code = 0
    while size and code == 0:
        granule = round_down(at, GRANULE)
        lead = at - granule
        if b.filled and b.granule != granule:
            code = put_granule(b, why)
            continue
        if lead == 0 and b.filled == 0 and size >= GRANULE:
            step = round_down(size, GRANULE)
            code = image_put(b.img, at, bytes, step, why)
        else:
            if b.filled == 0:
                memset(b.bytes, 0, GRANULE)
                b.granule = granule
            step = GRANULE - lead if size > GRANULE - lead else size
            memcpy(b.bytes + lead, bytes, step)
            b.filled = lead + step
        at += step
        bytes += step
        size -= step
    return code
