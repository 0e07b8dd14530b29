# What a memory holds now, as an image, and where it differs from an image; a part of memory.pyx.
#
# Both look only at the pages that may matter: time and space follow the pages that are there, not the memory's size.

cdef int add_range(changes* to, size_t offset, size_t size, bint zero, failure* why) noexcept nogil:
    """Add a range, joined to the last one if they touch or overlap and both are `zero` or both are not."""
    cdef change* last = to.list + (to.n - 1) if to.n else NULL
    cdef change* list
    if (last != NULL and last.zero == zero and last.offset <= offset and offset <= last.offset + last.size):
        if offset + size > last.offset + last.size:
            last.size = offset + size - last.offset
        return 0
    list = <change*>with_room(to.list, to.n, &to.room, sizeof(change))
    if list == NULL:
        return fail(why, E_NO_MEMORY, "realloc", to.n * sizeof(change))
    to.list = list
    list[to.n].offset = offset
    list[to.n].size = size
    list[to.n].zero = zero
    to.n += 1
    return 0


# -- where a difference may be: ranges of whole host pages, counted from a memory's first byte

cdef int add_bytes(changes* to, size_t offset, size_t size, failure* why) noexcept nogil:
    """The host pages in which the bytes lie."""
    cdef size_t end = 0, page = host_page()
    cdef size_t first = round_down(offset, page)
    round_up(offset + size, page, &end)
    return add_range(to, first, end - first, False, why)


cdef int by_offset(const void* a, const void* b) noexcept nogil:
    cdef size_t left = (<const change*>a).offset, right = (<const change*>b).offset
    return -1 if left < right else 1 if left > right else 0


cdef int add_touched(memory* m, size_t end, changes* to, failure* why) noexcept nogil:
    cdef touched_runs found
    cdef size_t i
    cdef int code
    touched_begin(&found, m, 0, end)
    while touched_next(&found):
        for i in range(found.n):
            # The kernel counts in its own pages, which may be smaller than the host page.
            code = add_bytes(to, <size_t>(found.runs[i].addr - m.base), found.runs[i].size, why)
            if code:
                return code
    return found.code


cdef int add_runs(const image* img, changes* to, failure* why) noexcept nogil:
    cdef size_t i
    cdef int code = 0
    if img != NULL:
        for i in range(img.n_runs):
            if code == 0:
                code = add_bytes(to, img.offset + img.runs[i].offset, img.runs[i].size, why)
    return code


cdef int find_ranges(memory* m, image* img, image* base, size_t end, changes* out, failure* why) noexcept nogil:
    """Where the first `end` bytes (whole host pages) of `m`, or of `img` if m is NULL, may differ from `base` (NULL:
    from zeros); in order and apart."""
    cdef image* mapped = image_of(m) if m != NULL and image_maps_pages(m) else NULL
    cdef size_t i, n
    cdef int code = 0
    memset(out, 0, sizeof(changes))
    if end and m != NULL and (
            not m.ops.pages_are_ours or not pages.capabilities().scans or image_is_broken(m)
            or (mapped != NULL and mapped.offset + mapped.high > end) or end > m.accessible):
        return add_range(out, 0, end, False, why)
    if end and m != NULL and add_touched(m, end, out, why):     # the OS does not tell: compare every page
        out.n = 0
        return add_range(out, 0, end, False, why)
    # A page that was not touched shows the mapped image, or zeros. `base` may hold something else there.
    if m == NULL or mapped == NULL or mapped != base:
        code = add_runs(img if m == NULL else mapped, out, why)
        if code == 0:
            code = add_runs(base, out, why)
    n = out.n
    if n:
        qsort(out.list, n, sizeof(change), by_offset)
    out.n = 0
    for i in range(n):      # joining needs no memory, because the number of ranges does not increase
        add_range(out, out.list[i].offset, out.list[i].size, False, why)
    return code


cdef int lock_readable(memory* m, const char* call, failure* why) noexcept nogil:
    """Take the lock of a memory whose bytes can all be read. A code: the lock is not taken."""
    cdef int code = lock_memory(m, why)
    if code == 0:
        code = refuse_protected(m, READABLE, call, why)
        if code:
            unlock(&m.lock)
    return code


# -- snapshot

cdef int memory_snapshot(memory* m, image** out, failure* why) noexcept nogil:
    """*out: an image of what the memory holds now."""
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
    cdef size_t i, first, last
    cdef changes found
    cdef int code = find_ranges(m, NULL, NULL, img.content.size, &found, why)
    for i in range(found.n):
        first = found.list[i].offset
        last = first + found.list[i].size if first + found.list[i].size < img.end else img.end
        if code == 0 and first < last:
            code = image_put(img, first, m.base + first, last - first, why)
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
    cdef size_t i, at, end = 0
    cdef bint is_cut = for_delta and size & (page - 1) and base.end > size
    cdef changes found
    cdef int code
    memset(out, 0, sizeof(changes))
    round_up(size, page, &end)
    code = find_ranges(m, img, base, end, &found, why)
    if code == 0 and is_cut:        # the last page, so the ranges stay in order
        code = add_range(&found, end - page, page, False, why)
    for i in range(found.n):
        at = found.list[i].offset
        end = at + found.list[i].size
        while at < end and at < size and code == 0:
            code = compare_page(m, img, base, is_cut, for_delta, at, page, size, out, why)
            at += page
    free(found.list)
    if code:
        free(out.list)
        out.list = NULL
    return code


cdef int compare_page(memory* m, image* img, image* base, bint is_cut, bint for_delta, size_t at, size_t page,
                      size_t size, changes* out, failure* why) noexcept nogil:
    """Compare the page at `at`, as far as it lies below `size`. is_cut: if `size` cuts the page, it counts as
    changed."""
    cdef size_t step = page if size - at > page else size - at
    cdef const char* here = image_bytes(img, at) if m == NULL else <const char*>m.base + at
    cdef const char* there = image_bytes(base, at)
    cdef bint zero = here == NULL or is_zero(here, step)
    if step == page or not is_cut:
        if zero if there == NULL else is_zero(there, step) if here == NULL else memcmp(here, there, step) == 0:
            return 0
    return add_range(out, at, step, zero and for_delta, why)
