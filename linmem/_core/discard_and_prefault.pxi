# Give pages back to the OS, and make pages resident: memory_discard(), memory_prefault(); a part of memory.pyx.

cdef int memory_discard(memory* m, size_t offset, size_t size, failure* why) noexcept nogil:
    """The bytes of a range become zero. Whole host pages go back to the OS; the rest of the first and the last page is
    zeroed. If this fails, no byte has changed."""
    cdef size_t page = host_page(), end = offset + size
    cdef size_t first = offset, last = round_down(end, page)
    cdef bint is_file = m.ops.pages_are_shared and m.ops.zero_pages == NULL
    cdef int code = begin_page_call(m, "discard", offset, size, why)
    if code:
        return code
    round_up(offset, page, &first)
    code = unsupported_on(m, offset, size, WRITABLE, "discard of these pages" if is_file else
                          "discard, on this system,", why)
    if code and pages.capabilities().discard_any_protection and not is_file:
        code = 0
        if offset & (page - 1) or (size & (page - 1) and end != memory_size(m)):
            code = fail_text(why, E_VALUE, "offset and size must be multiples of the host page (%zu) in a range with"
                             " protected pages, got %zu and %zu", page, offset, size)
    if code == 0 and (first >= last or is_file):
        memset(m.base + offset, 0, size)
    elif code == 0:
        code = discard_around_windows(m, first, last, why)
        if code == 0:
            zero_range(m, offset, first)
            zero_range(m, last, end)
    unlock(&m.lock)
    return code


cdef int discard_around_windows(memory* m, size_t start, size_t end, failure* why) noexcept nogil:
    """Whole host pages. A page that is written through is zeroed, also in its source. Every other page goes back to the
    OS. If the OS refuses a part when another part is discarded already, that part is zeroed."""
    cdef size_t offset = start, next
    cdef int code, shows
    if not has_window(m, start, end):
        return discard_pages(m, start, end, why)
    code = unsupported_on(m, start, end - start, WRITABLE, "discard, where the range holds mapped pages,", why)
    while offset < end and code == 0:
        shows = window_at(m, offset, end, &next)
        if shows == WRITTEN_THROUGH:
            memset(m.base + offset, 0, next - offset)
        elif shows == COPIED_ON_WRITE:
            code = fail_page_call(why, pages.blank(m.base + offset, next - offset), "discard", next - offset)
        else:
            code = discard_pages(m, offset, next, why)
        if code and offset > start:
            memset(m.base + offset, 0, next - offset)
            code = 0
        offset = next
    return code


cdef int discard_pages(memory* m, size_t start, size_t end, failure* why) noexcept nogil:
    """Whole host pages. If the OS refuses a part when another part is discarded already, that part is zeroed."""
    cdef size_t low, high
    cdef int code = 0
    if m.ops.zero_pages != NULL:
        return fail_page_call(why, m.ops.zero_pages(m, start, end), "discard", end - start)
    image_split(m, start, end, &low, &high)
    if high > low:
        code = unsupported_on(m, start, end - start, WRITABLE, "discard, where the range holds pages of an image,", why)
        if code:
            return code
    if low > start:
        code = pages.discard(m.base + start, low - start)
    if code == 0 and high > low:
        code = image_replace_pages(m, low, high - low)
        if code and low > start:
            memset(m.base + low, 0, high - low)
            code = 0
    if code == 0 and end > high:
        code = pages.discard(m.base + high, end - high)
        if code and high > start:
            memset(m.base + high, 0, end - high)
            code = 0
    return fail_page_call(why, code, "discard", end - start)


cdef int memory_prefault(memory* m, size_t offset, size_t size, failure* why) noexcept nogil:
    """Make the host pages resident that the range lies in. No byte changes."""
    cdef size_t page = host_page()
    cdef size_t first = round_down(offset, page), end = 0
    cdef int code = begin_page_call(m, "prefault", offset, size, why)
    if code:
        return code
    round_up(offset + size, page, &end)
    if not pages.capabilities().populates:
        code = unsupported_on(m, offset, size, WRITABLE, "prefault, on this system,", why)
    if code == 0 and size:
        code = fail_page_call(why, pages.prefault(m.base + first, end - first), "prefault", end - first)
    unlock(&m.lock)
    return code
