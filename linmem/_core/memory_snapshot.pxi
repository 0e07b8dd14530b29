# memory_snapshot(): an image of a memory; memory_changes(), image_changes(): where a memory or an image differs from an
# image; a part of memory.pyx.
#
# They read only pages that may differ. So their time depends on the pages that were touched, not on the memory's size.

cdef int add_range(changes* found, size_t offset, size_t size, bint zero, failure* why) noexcept nogil:
    """Add a range. Join the range and the last one if they touch or overlap, and both are `zero` or both are not."""
    cdef change* last = found.list + (found.n - 1) if found.n else NULL
    cdef change* list
    if last != NULL and last.zero == zero and last.offset <= offset and offset <= last.offset + last.size:
        last.size = max(last.size, offset + size - last.offset)
        return 0
    list = <change*>with_room(found.list, found.n, &found.room, sizeof(change), why)
    if list == NULL:
        return E_NO_MEMORY
    found.list = list
    list[found.n].offset = offset
    list[found.n].size = size
    list[found.n].zero = zero
    found.n += 1
    return 0


# -- where a difference may be: ranges of whole host pages; the offsets are those of a memory

cdef int add_pages(changes* found, size_t offset, size_t size, failure* why) noexcept nogil:
    """Add the host pages in which the bytes lie."""
    cdef size_t first = round_down(offset, host_page()), end = 0
    round_up(offset + size, host_page(), &end)
    return add_range(found, first, end - first, False, why)


cdef int by_offset(const void* a, const void* b) noexcept nogil:
    cdef size_t left = (<const change*>a).offset, right = (<const change*>b).offset
    return -1 if left < right else 1 if left > right else 0


cdef int add_touched(memory* m, size_t end, changes* found, failure* why) noexcept nogil:
    cdef touched_runs touched
    cdef size_t i
    cdef int code
    touched_begin(&touched, m, 0, end)
    while touched_next(&touched):
        for i in range(touched.n):
            # The kernel counts in its own pages, which may be smaller than the host page.
            code = add_pages(found, <size_t>(touched.runs[i].addr - m.base), touched.runs[i].size, why)
            if code:
                return code
    return touched.code


cdef int add_data(memory* m, size_t end, changes* found, failure* why) noexcept nogil:
    cdef size_t offset = 0, start = 0, stop = 0
    cdef int code
    while offset < end:
        code = m.ops.find_data(m, offset, end, &start, &stop)
        if code == 0 and start < end:
            code = add_pages(found, start, stop - start, why)
        if code or start >= end:
            return code
        offset = stop
    return 0


cdef int add_runs(const image* img, changes* found, failure* why) noexcept nogil:
    cdef size_t i
    cdef int code = 0
    if img != NULL:
        for i in range(img.n_runs):
            if code == 0:
                code = add_pages(found, img.offset + img.runs[i].offset, img.runs[i].size, why)
    return code


cdef int add_windows(memory* m, size_t end, changes* found, failure* why) noexcept nogil:
    """The OS does not say which pages of a window differ from anything."""
    cdef size_t i
    cdef int code = 0
    for i in range(m.windows.n if m.windows != NULL else 0):
        if code == 0 and m.windows.items[i].offset < end:
            code = add_pages(found, m.windows.items[i].offset, m.windows.items[i].size, why)
    return code


cdef int find_ranges(memory* m, image* img, image* base, size_t end, changes* out, failure* why) noexcept nogil:
    """Where the first `end` bytes (whole host pages) of `m`, or of `img` if m is NULL, may differ from `base` (NULL:
    from zeros); in ascending order, without overlap."""
    # The image that the untouched pages show; NULL: zeros.
    cdef image* shown = img if m == NULL else image_of(m) if image_maps_pages(m) else NULL
    cdef size_t i, n
    cdef int code = 0
    memset(out, 0, sizeof(changes))
    if m != NULL and end and m.ops.pages_are_shared:
        if m.ops.find_data == NULL or add_data(m, end, out, why):
            out.n = 0
            return add_range(out, 0, end, False, why)
    elif m != NULL and end and (
            not m.ops.pages_are_ours or not pages.capabilities().scans or image_is_broken(m) or end > m.accessible
            or (shown != NULL and shown.offset + shown.high > end) or add_touched(m, end, out, why)):
        out.n = 0       # linmem does not know which pages were touched, so every page is compared
        return add_range(out, 0, end, False, why)
    if shown != base:
        code = add_runs(shown, out, why)
        if code == 0:
            code = add_runs(base, out, why)
    if m != NULL and code == 0:
        code = add_windows(m, end, out, why)
    n = out.n
    if n:
        qsort(out.list, n, sizeof(change), by_offset)
    out.n = 0
    for i in range(n):      # joining needs no memory, because the number of ranges does not increase
        add_range(out, out.list[i].offset, out.list[i].size, False, why)
    return code


cdef int lock_readable(memory* m, const char* call, failure* why) noexcept nogil:
    """Take the memory's lock, and refuse a memory with a page that cannot be read. A code: the lock is not taken."""
    cdef int code = lock_memory(m, why)
    if code == 0:
        code = refuse_protected(m, READABLE, call, why)
        if code:
            unlock(&m.lock)
    return code


# -- snapshot

cdef int memory_snapshot(memory* m, image** out, failure* why) noexcept nogil:
    """*out: a new image of the bytes that the memory holds now."""
    cdef image* img = NULL
    cdef int code = lock_readable(m, "snapshot", why)
    if code:
        return code
    img = image_new(0, memory_size(m), why)
    code = why.code if img == NULL else copy_into_image(m, img, why)
    unlock(&m.lock)
    if code:
        image_release(img)
    else:
        out[0] = img
    return code


cdef int copy_into_image(memory* m, image* img, failure* why) noexcept nogil:
    cdef size_t i, first
    cdef changes found
    cdef int code = find_ranges(m, NULL, NULL, img.content.size, &found, why)
    for i in range(found.n):
        first = found.list[i].offset
        if code == 0:
            code = image_put(img, first, m.base + first, min(found.list[i].size, img.end - first), why)
    free(found.list)
    return code if code else image_finish(img, why)


# -- differences

cdef int memory_changes(memory* m, image* base, bint for_delta, changes* out, failure* why) noexcept nogil:
    """Where the memory differs from the image `base`. out.list is the caller's to free.

    for_delta: if byte_size lies within a host page, and the image goes on behind it, that page counts as changed. A
    later delta of a chain may zero the bytes behind the size, and a file holds whole pages.
    """
    cdef int code = lock_readable(m, "dirty_pages", why)
    out.list = NULL
    if code == 0:
        code = compare(m, NULL, base, memory_size(m), for_delta, out, why)
        unlock(&m.lock)
    return code


cdef int image_changes(image* img, image* base, changes* out, failure* why) noexcept nogil:
    """As memory_changes(), for a delta from one image to another."""
    return compare(NULL, img, base, img.end, True, out, why)


cdef int compare(memory* m, image* img, image* base, size_t size, bint for_delta, changes* out,
                 failure* why) noexcept nogil:
    """Where the first `size` bytes of `m`, or of `img` if m is NULL, differ from `base`."""
    cdef size_t page = host_page()
    cdef size_t i, offset, step, end = 0
    cdef bint is_zero_now, is_same, is_cut = for_delta and size & (page - 1) and base.end > size
    cdef const char* now
    cdef const char* before
    cdef changes found
    cdef int code
    memset(out, 0, sizeof(changes))
    out.size = size
    round_up(size, page, &end)
    code = find_ranges(m, img, base, end, &found, why)
    # If `base` goes on after `size` in the last page, a delta always contains this page. It is the last page, so the
    # ranges stay in ascending order.
    if code == 0 and is_cut:
        code = add_range(&found, end - page, page, False, why)
    for i in range(found.n):
        offset = found.list[i].offset
        end = min(offset + found.list[i].size, size)
        while offset < end and code == 0:
            step = min(page, end - offset)
            now = image_bytes(img, offset) if m == NULL else <const char*>m.base + offset
            before = image_bytes(base, offset)
            is_zero_now = now == NULL or is_zero(now, step)
            is_same = (is_zero_now if before == NULL else is_zero(before, step) if now == NULL
                       else memcmp(now, before, step) == 0)
            if not is_same or (is_cut and step < page):
                code = add_range(out, offset, step, is_zero_now and for_delta, why)
            offset += step
    free(found.list)
    if code:
        free(out.list)
        out.list = NULL
    return code
