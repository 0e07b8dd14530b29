# The copy-on-write state of a memory: which image the memory started from or was restored to, which pages may be mapped
# from the image, and how bytes and pages are set back to the image; a part of memory.pyx.
#
# Only this file, and the inline functions beside `cow_state` in memory.pxd, access the fields of m.cow. All other files
# use these operations:
#   image_attach()             map or copy an image into a memory of zeros
#   image_begin_use()          note that a creator or a pool hands the memory out
#   image_restore()            set all bytes to those of an image, which may be another one
#   image_rebind()             image_restore() for a pool's slot; it can also detach the image
#   image_reset()              give pages back to the OS, so that they show the mapped image again
#   image_renew_pages()        the same for the image's pages alone, in a memory that still has the image's bytes
#   image_fill()               copy the mapped image's bytes over a range
#   image_replace_pages()      replace pages that were mapped from the image by pages of zeros
#   image_loses_pages()        note that some pages will show another source
#   image_pages_are_gone()     note that all pages were decommitted
#   image_detach()             drop the reference on the image
#   image_of(), image_is_attached(), image_is_copied(), image_is_broken(), image_is_intact(), image_maps_pages(),
#   image_split(), image_known_size()       read the state
#   touched_begin(), touched_next()         find the pages that were written

# -- images and memories

cdef void image_copy(const image* img, char* base) noexcept nogil:
    """Copy the image's bytes into a memory at `base` that holds zeros."""
    cdef size_t i
    for i in range(img.n_runs):
        image_copy_run(img, i, base)


cdef inline size_t image_copy_run(const image* img, size_t i, char* base) noexcept nogil:
    """Copy the i-th run into a memory at `base`, and return the offset of its end in the memory. The zeros behind
    img.end in the last granule are not copied, because linmem may not own the bytes behind a memory in Python."""
    cdef size_t start = img.offset + img.runs[i].offset
    cdef size_t end = min(start + img.runs[i].size, img.end)
    memcpy(base + start, img.content.bytes + img.runs[i].offset, end - start)
    return end


cdef inline const char* image_bytes(const image* img, size_t offset) noexcept nogil:
    """The image's bytes of the host page at an offset of a memory; NULL: zeros."""
    if img == NULL or offset < img.offset + img.low or offset >= img.offset + img.high:
        return NULL
    return img.content.bytes + (offset - img.offset)


cdef void hold_image(memory* m, image* img) noexcept nogil:
    """Exchange the reference on the image that the memory started from or was last restored to."""
    cdef image* before = m.cow.image
    if img == before:
        return
    if img != NULL:
        image_retain(img)
        add(&img.memories, 1)
    m.cow.image = img
    m.cow.started = 0
    if before != NULL:
        add(&before.memories, -1)
        image_release(before)


cdef int image_attach(memory* m, image* img) noexcept nogil:
    """Before: all bytes are zero, and no page is mapped from an image. On return the bytes equal the image (NULL: still
    zeros). A code: the OS refused to map the image, and the bytes are unknown."""
    cdef int code
    image_pages_are_gone(m)
    m.cow.dirtied = 0
    hold_image(m, img)
    if image_shares_pages(img):
        code = pages.image_map(&img.content, img.low, m.base + img.offset + img.low, img.high - img.low)
        if code:
            return code
        m.cow.how = IMAGE_MAPPED
    elif img != NULL:
        image_copy(img, m.base)
    return 0


cdef void image_detach(memory* m) noexcept nogil:
    """Drop the reference on the image. The memory is being freed, or no page of it is mapped from an image."""
    hold_image(m, NULL)


cdef inline bint image_maps_pages(memory* m) noexcept nogil:
    """Whether pages were mapped from the image. Some of them may have been replaced by zeros."""
    return m.cow.how != IMAGE_COPIED


cdef void image_split(memory* m, size_t start, size_t end, size_t* low, size_t* high) noexcept nogil:
    """*low .. *high: the part of start .. end that was mapped from the image; end .. end if no part was."""
    low[0] = high[0] = end
    if image_maps_pages(m):
        low[0] = min(max(m.cow.image.offset + m.cow.image.low, start), end)
        high[0] = min(max(m.cow.image.offset + m.cow.image.high, start), end)


cdef inline void image_loses_pages(memory* m, size_t start, size_t end) noexcept nogil:
    """The pages of the range will show something else than the mapped image."""
    cdef size_t low, high
    image_split(m, start, end, &low, &high)
    if high > low:
        m.cow.how = IMAGE_BROKEN


cdef int image_unmap(memory* m) noexcept nogil:
    """Replace all pages that were mapped from the image by pages of zeros. A code: they are zero, and still mapped."""
    cdef size_t low, high
    cdef int code
    if not image_maps_pages(m):
        return 0
    image_split(m, 0, SIZE_MAX, &low, &high)
    code = image_replace_pages(m, low, high - low)
    if code:
        m.cow.how = IMAGE_BROKEN
        memset(m.base + low, 0, high - low)
    else:
        image_pages_are_gone(m)
    return code


cdef inline bint image_is_broken(memory* m) noexcept nogil:
    return m.cow.how == IMAGE_BROKEN


cdef inline size_t image_known_size(memory* m, const image* img) noexcept nogil:
    """The byte_size that a memory which started from `img`, or was restored to it, has before it grows."""
    return m.cow.started if m.cow.image == img and m.cow.started > img.end else img.end


cdef int image_replace_pages(memory* m, size_t offset, size_t size) noexcept nogil:
    """Replace pages that were mapped from the image by zeros. The next restore maps the image anew. A code: nothing
    has changed."""
    cdef long long before = m.cow.how
    cdef int code
    m.cow.how = IMAGE_BROKEN        # before the call, because a child may be forked during the call
    code = pages.blank(m.base + offset, size)
    if code:
        m.cow.how = before
    return code


# -- set bytes and pages back to the mapped image, and to zeros outside of the image

cdef inline void zero_range(memory* m, size_t start, size_t end) noexcept nogil:
    """Zero the bytes, if start < end. memset() of 0 bytes costs hundreds of cycles on some processors if the next page
    is inaccessible."""
    if start < end:
        memset(m.base + start, 0, end - start)


cdef void image_fill(memory* m, size_t offset, size_t size) noexcept nogil:
    """Copy the mapped image's bytes over the range, and zeros outside of the image."""
    cdef size_t low, high
    image_split(m, offset, offset + size, &low, &high)
    zero_range(m, offset, low)
    if high > low:
        memcpy(m.base + low, m.cow.image.content.bytes + (low - m.cow.image.offset), high - low)
    zero_range(m, high, offset + size)


cdef int image_reset(memory* m, size_t size) noexcept nogil:
    """Give the pages of the first `size` bytes back to the OS. The pages show the mapped image again, and zeros outside
    of the image. The same must hold as before pages.renew(), and a refusal has the same consequences."""
    cdef size_t low, high
    cdef int code = 0
    m.cow.dirtied = 0
    image_split(m, 0, size, &low, &high)
    if low:
        code = pages.renew(m.base, low)
    if code == 0 and high > low:
        code = pages.image_renew(&m.cow.image.content, low - m.cow.image.offset, m.base + low, high - low)
    if code == 0 and size > high:
        code = pages.renew(m.base + high, size - high)
    return code


cdef int image_renew_pages(memory* m) noexcept nogil:
    """Give the pages that are mapped from the image back to the OS. The caller knows that the bytes equal the image, so
    no byte changes; afterwards no such page is in the page tables. A code: the pages are as before."""
    cdef size_t low, high
    image_split(m, 0, SIZE_MAX, &low, &high)
    m.cow.dirtied = 0
    return pages.image_renew(&m.cow.image.content, low - m.cow.image.offset, m.base + low, high - low)


cdef bint image_is_intact(memory* m, size_t size) noexcept nogil:
    """Whether the first `size` bytes, whole host pages, equal the memory's image, and are zero outside of the image."""
    cdef size_t offset = 0, page = host_page()
    cdef const char* expected
    while offset < size:
        expected = image_bytes(m.cow.image, offset)
        if not is_zero(m.base + offset, page) if expected == NULL else memcmp(m.base + offset, expected, page) != 0:
            return False
        offset += page
    return True


cdef void touched_begin(touched_runs* runs, memory* m, size_t start, size_t end) noexcept nogil:
    runs.m = m
    runs.offset = start
    runs.end = end
    runs.code = 0


cdef bint touched_next(touched_runs* runs) noexcept nogil:
    cdef size_t low, high, stop
    cdef char* next
    if runs.offset >= runs.end:
        return False
    image_split(runs.m, runs.offset, runs.end, &low, &high)
    runs.over_image = low == runs.offset and high > low
    stop = high if runs.over_image else low if low > runs.offset else runs.end
    runs.n = RUNS
    runs.code = pages.touched(runs.m.base + runs.offset, stop - runs.offset, runs.over_image, runs.runs, &runs.n, &next)
    if runs.code:
        return False
    runs.offset = <size_t>(next - runs.m.base)
    return True


cdef bint fill_touched(memory* m, size_t start, size_t end, size_t bound, size_t* total) noexcept nogil:
    """image_fill() the touched pages of start .. end, and add their size to *total. False: the OS does not say which
    pages were touched, or *total exceeds `bound`. Some pages may have been filled then."""
    cdef touched_runs found
    cdef size_t i
    if not pages.capabilities().scans:
        return False
    touched_begin(&found, m, start, end)
    while touched_next(&found):
        for i in range(found.n):
            total[0] += found.runs[i].size
        if total[0] > bound:
            return False
        for i in range(found.n):
            image_fill(m, <size_t>(found.runs[i].addr - m.base), found.runs[i].size)
    return found.code == 0


# -- set all bytes to those of an image

cdef enum:
    DIRTIED_LEAST = 1 << 18         # the least value of `dirtied`, because a restore of fewer bytes is cheap anyway


cdef void image_restore(memory* m, image* img) noexcept nogil:
    """Every byte becomes the image's, or zero outside of the image; the size stays. The caller holds the memory's lock
    or owns the memory exclusively, no page is protected, and img.end is within byte_size. A restore cannot fail: if
    the OS refuses to map or to give back pages, their bytes are copied or zeroed."""
    cdef size_t end = m.accessible if m.ops.pages_are_ours and m.ops.flush == NULL else memory_size(m)
    cdef size_t low = img.offset + img.low
    # img.high is a multiple of the host page. A memory in Python may end before that, and linmem must not write beyond.
    cdef size_t high = min(img.offset + img.high, end)
    if m.windows != NULL:
        write_differences(m, img, end)
        return
    if m.cow.how == IMAGE_MAPPED and m.cow.image == img:
        restore_mapped(m, low, high, end)
        return
    map_or_copy(m, img, low, high)
    zero_bytes(m, 0, low)
    zero_bytes(m, high, end)
    if m.cow.how != IMAGE_BROKEN:
        hold_image(m, img)
        m.cow.dirtied = 0


cdef void write_differences(memory* m, image* img, size_t end) noexcept nogil:
    """Write the pages that differ from the image, and no other page. No mapping changes. So windows stay: a page that
    is written through changes its source, and a page that is copied on write becomes the memory's own."""
    cdef failure unused
    cdef changes found
    cdef size_t offset, stop, i, page = host_page()
    cdef const char* wanted
    if find_ranges(m, NULL, img, end, &found, &unused):
        found.n = 0
    for i in range(max(found.n, <size_t>1)):
        offset = found.list[i].offset if found.n else 0
        stop = offset + found.list[i].size if found.n else end
        while offset < stop:
            wanted = image_bytes(img, offset)
            if wanted == NULL:
                if not is_zero(m.base + offset, page):
                    memset(m.base + offset, 0, page)
            elif memcmp(m.base + offset, wanted, page):
                memcpy(m.base + offset, wanted, page)
            offset += page
    free(found.list)


cdef void restore_mapped(memory* m, size_t low, size_t high, size_t end) noexcept nogil:
    """Put the image's bytes back into the written pages of a memory that the image is mapped into, at low .. high.

    A page that was put back stays the memory's own copy, and the next restore finds that page and puts it back too. As
    long as mostly the same pages are written, that is cheaper than the page faults after giving the pages back. So the
    first restore after pages were given back counts the written bytes, and a restore that finds four times as many
    gives all pages back.
    """
    cdef size_t total = 0, bound = m.cow.dirtied << 2 if m.cow.dirtied else SIZE_MAX
    cdef image* img = m.cow.image
    if fill_touched(m, 0, end, bound, &total):
        if m.cow.dirtied == 0:
            m.cow.dirtied = max(total, <size_t>DIRTIED_LEAST)
        return
    m.cow.dirtied = 0
    if (pages.image_renew(&img.content, img.low, m.base + low, high - low)
            and pages.image_map(&img.content, img.low, m.base + low, high - low)):
        memcpy(m.base + low, img.content.bytes + img.low, high - low)
    discard_or_zero(m, 0, low)
    discard_or_zero(m, high, end)


cdef void map_or_copy(memory* m, image* img, size_t low, size_t high) noexcept nogil:
    """Set the bytes low .. high to the image's, if the memory has no image, another image, or the state IMAGE_BROKEN.

    The state is IMAGE_BROKEN during each page call. A child that is forked during the call takes over the state, and a
    restore in the child must not take a part of another image for this one.
    """
    cdef size_t copied = low, i
    image_unmap(m)          # the pages must not show the other image any more
    if image_shares_pages(img) and m.ops == &mapped_ops and m.cow.how == IMAGE_COPIED:
        hold_image(m, img)
        # A child that is forked from here on sees IMAGE_BROKEN. The image must be stored before that.
        store_release(&m.cow.how, IMAGE_BROKEN)
        if pages.image_map(&img.content, img.low, m.base + low, high - low) == 0:
            m.cow.how = IMAGE_MAPPED
            return
        m.cow.how = IMAGE_COPIED
    for i in range(img.n_runs):
        zero_bytes(m, copied, img.offset + img.runs[i].offset)
        copied = image_copy_run(img, i, m.base)
    zero_bytes(m, copied, high)


cdef void zero_bytes(memory* m, size_t start, size_t end) noexcept nogil:
    """Bytes of any range that no image is mapped into become zero; whole host pages in the cheapest way."""
    cdef size_t first = 0, last = round_down(end, host_page()), total = 0
    round_up(start, host_page(), &first)
    if not m.ops.pages_are_ours or m.cow.how == IMAGE_BROKEN or first >= last:
        zero_range(m, start, end)
        return
    zero_range(m, start, first)
    if m.ops.pages_are_shared:
        if m.ops.zero_pages == NULL or m.ops.zero_pages(m, first, last):
            zero_range(m, first, last)
    elif not fill_touched(m, first, last, SIZE_MAX, &total):
        discard_or_zero(m, first, last)
    zero_range(m, last, end)


cdef void discard_or_zero(memory* m, size_t start, size_t end) noexcept nogil:
    if end > start and pages.discard(m.base + start, end - start):
        memset(m.base + start, 0, end - start)


# -- for a pool, whose memories return to the image that they started from

cdef int image_rebind(memory* m, image* img) noexcept nogil:
    """The caller owns the memory exclusively. Rebinds the memory from its current image to `img`; NULL means no image.
    After a 0, image_is_attached(m, img) holds. The bytes are the image's then; without an image they have any value."""
    cdef int code
    if img != NULL:
        image_restore(m, img)
        return 0 if image_is_attached(m, img) else E_IMAGE
    code = image_unmap(m)
    if code == 0:
        image_detach(m)
    return code
