# Images: reference counts, and how an image is filled with bytes; a part of memory.pyx.
#
#   |<------------------------- content (host pages) -------------------------->|
#   +------------------+-----------------------------------+--------------------+
#   | zeros            | runs of bytes, zeros between them | zeros              |
#   +------------------+-----------------------------------+--------------------+
#   ^offset            ^offset+low                         ^offset+high       end^ (<= offset + content.size)
#
# Outside offset+low .. offset+high, the pages of a memory that starts from the image are pages of zeros.

cdef char[GRANULE] zeros

# An image of no bytes, which is never freed. Image.img points to no_image if the Image object was made without an
# image, so Image.img is never NULL.
cdef image no_image
no_image.refs = 1
no_image.content.handle = -1


cdef bint is_zero(const char* bytes, size_t size) noexcept nogil:
    return while_zero(bytes, size, True) == size


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


cdef void (*tell_forgotten)(image* img) noexcept nogil      # NULL until the first pool is made


cdef void set_forgotten_callback(void (*tell)(image* img) noexcept nogil) noexcept nogil:
    """The first pool calls this. `tell` is called with each image that is forgotten and still has slots."""
    global tell_forgotten
    tell_forgotten = tell


cdef void image_forget(image* img) noexcept nogil:
    """The Image object is gone."""
    store(&img.forgotten, 1)
    if load(&img.slots) and tell_forgotten != NULL:
        tell_forgotten(img)
    image_release(img)


# -- how to make an image: image_new(), image_put() for each piece, image_finish()

cdef image* image_alloc(size_t offset, size_t size, size_t* content_size, failure* why) noexcept nogil:
    """An image without content. NULL: it failed, and *why is filled. *content_size: bytes of the host pages from
    img.offset to img.end."""
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
    content_size[0] = end - img.offset
    return img


cdef image* image_new(size_t offset, size_t size, failure* why) noexcept nogil:
    """An image of zeros, to be filled. NULL: it failed, and *why is filled."""
    cdef size_t n = 0
    cdef image* img = image_alloc(offset, size, &n, why)
    if img != NULL and n and fail_page_call(why, pages.image_begin(n, &img.content), "image_begin", n):
        free(img)
        return NULL
    return img


cdef int image_put(image* img, size_t offset, const char* bytes, size_t size, failure* why) noexcept nogil:
    """Put bytes at an offset of the content (a multiple of GRANULE), after all bytes that were put before. Granules of
    zeros take no space."""
    cdef size_t first, end = 0
    cdef int code = 0
    while end < size and code == 0:
        first = end + while_zero(bytes + end, size - end, True)
        end = first + while_zero(bytes + first, size - first, False)
        if end > first:
            code = fail_page_call(why, pages.image_write(&img.content, offset + first, bytes + first, end - first),
                                  "image_write", end - first)
            if code == 0:
                code = add_run(img, offset + first, end - first, why)
    return code


cdef size_t while_zero(const char* bytes, size_t size, bint zero) noexcept nogil:
    """The length of the granules at the beginning that are all zero, or that all are not; `size` at most."""
    cdef size_t end = 0, step
    while end < size:
        step = min(size - end, <size_t>GRANULE)
        if (memcmp(bytes + end, zeros, step) == 0) != zero:
            break
        end += step
    return end


cdef int add_run(image* img, size_t offset, size_t size, failure* why) noexcept nogil:
    """Add a run of the content, rounded up to whole granules, behind the last run. Runs that touch are joined."""
    cdef size_t n = img.n_runs
    cdef run* runs
    round_up(size, GRANULE, &size)
    round_up(offset + size, host_page(), &img.high)
    if n == 0:
        img.low = round_down(offset, host_page())
    elif img.runs[n - 1].offset + img.runs[n - 1].size == offset:
        img.runs[n - 1].size += size
        return 0
    runs = <run*>with_room(img.runs, n, &img.room, sizeof(run), why)
    if runs == NULL:
        return E_NO_MEMORY
    img.runs = runs
    runs[n].offset = offset
    runs[n].size = size
    img.n_runs = n + 1
    return 0


cdef void* with_room(void* items, size_t n, size_t* room, size_t item_size, failure* why) noexcept nogil:
    """The array of `n` items, reallocated if it has no room for one more. NULL: it failed, *why is filled, and the
    array has not changed."""
    cdef size_t more = n + (n >> 1) + 16
    if n < room[0]:
        return items
    items = realloc(items, more * item_size)
    if items != NULL:
        room[0] = more
    else:
        fail(why, E_NO_MEMORY, "realloc", more * item_size)
    return items


cdef int image_finish(image* img, failure* why) noexcept nogil:
    return fail_page_call(why, pages.image_end(&img.content), "image_end", img.content.size) if img.content.size else 0


# -- put_piece(): pieces at any offset. image_put() takes whole granules, so a builder collects the partial ones

cdef struct builder:
    image* img
    size_t granule          # where the granule that is being filled begins in the content
    size_t filled           # bytes of that granule that are filled; 0: no granule is being filled
    char bytes[GRANULE]


cdef int put_granule(builder* b, failure* why) noexcept nogil:
    cdef size_t n = b.filled
    b.filled = 0
    return image_put(b.img, b.granule, b.bytes, n, why) if n else 0


cdef int put_piece(builder* b, size_t offset, const char* bytes, size_t size, failure* why) noexcept nogil:
    cdef size_t granule, lead, step
    cdef int code = 0
    while size and code == 0:
        granule = round_down(offset, GRANULE)
        lead = offset - granule
        if b.filled and b.granule != granule:
            code = put_granule(b, why)
            continue
        if lead == 0 and b.filled == 0 and size >= GRANULE:
            step = round_down(size, GRANULE)
            code = image_put(b.img, offset, bytes, step, why)
        else:
            if b.filled == 0:
                memset(b.bytes, 0, GRANULE)
                b.granule = granule
            step = min(size, GRANULE - lead)
            memcpy(b.bytes + lead, bytes, step)
            b.filled = lead + step
        offset += step
        bytes += step
        size -= step
    return code
