# Images: what memories start from and are put back to; a part of memory.pyx.
#
#   |<------------------------- content (host pages) -------------------------->|
#   +------------------+-----------------------------------+--------------------+
#   | zeros            | runs of bytes, zeros between them | zeros              |
#   +------------------+-----------------------------------+--------------------+
#   ^offset            ^offset+low                         ^offset+high       end^ (<= offset + content.size)
#
# Outside offset+low .. offset+high a memory of the image holds zeros, and its pages are those of any memory.

cdef char[GRANULE] zeros

# Of no bytes: what a handle has that nobody gave an image to, so that none is ever without. Never released.
cdef image no_image
no_image.refs = 1
no_image.content.handle = -1
no_image.runs_known = True


cdef bint is_zero(const char* at, size_t size) noexcept nogil:
    while size > GRANULE:
        if memcmp(at, zeros, GRANULE):
            return False
        at += GRANULE
        size -= GRANULE
    return memcmp(at, zeros, size) == 0


cdef image* image_new(size_t offset, size_t size, failure* why) noexcept nogil:
    """An image of zeros that image_put() may fill, until image_finish(). NULL: it failed."""
    cdef size_t page = pages.capabilities().page_size
    cdef size_t end, first = round_down(offset, page)
    cdef image* it
    cdef int code
    if add_up(offset, size, &end) or round_up(end, page, &end) or end > SIZE_MAX >> 1:
        if offset > size:
            fail(why, E_OVERFLOW, "offset", offset)
        else:
            fail(why, E_OVERFLOW, "size", size)
        return NULL
    it = <image*>calloc(1, sizeof(image))
    if it == NULL:
        fail(why, E_NO_MEMORY, "calloc", sizeof(image))
        return NULL
    it.refs = 1
    it.offset = first
    it.end = offset + size
    it.content.handle = -1
    it.runs_known = True
    if end > first:
        code = pages.image_begin(end - first, &it.content)
        if code:
            fail_page_call(why, code, "image_begin", end - first)
            free(it)
            return NULL
    return it


cdef int image_put(image* it, size_t at, const char* bytes, size_t size, failure* why) noexcept nogil:
    """Bytes to stand at `at` (a multiple of GRANULE) in the content, behind all that stands there already.
    Zeros among them take no space."""
    cdef size_t first, step, end = 0
    cdef int code
    while end < size:
        first = end
        while first < size:
            step = size - first if size - first < GRANULE else <size_t>GRANULE
            if memcmp(bytes + first, zeros, step):
                break
            first += step
        end = first
        while end < size:
            step = size - end if size - end < GRANULE else <size_t>GRANULE
            if memcmp(bytes + end, zeros, step) == 0:
                break
            end += step
        if end > first:
            code = image_put_run(it, at + first, bytes + first, end - first, why)
            if code:
                return code
    return 0


cdef int image_put_run(image* it, size_t at, const char* bytes, size_t size, failure* why) noexcept nogil:
    cdef size_t room, n = it.n_runs
    cdef run* more
    cdef int code = pages.image_write(&it.content, at, bytes, size)
    if code:
        return fail_page_call(why, code, "image_write", size)
    round_up(size, GRANULE, &size)
    if n and it.runs[n - 1].offset + it.runs[n - 1].size == at:
        it.runs[n - 1].size += size
        return 0
    if n == it.room:
        room = n + (n >> 1) + 8
        more = <run*>realloc(it.runs, room * sizeof(run))
        if more == NULL:
            return fail(why, E_NO_MEMORY, "realloc", room * sizeof(run))
        it.runs = more
        it.room = room
    it.runs[n].offset = at
    it.runs[n].size = size
    it.n_runs = n + 1
    return 0


cdef int image_finish(image* it, failure* why) noexcept nogil:
    cdef size_t page = pages.capabilities().page_size
    cdef int code = 0
    if it.content.size:
        code = pages.image_end(&it.content)
        if code:
            return fail_page_call(why, code, "image_end", it.content.size)
    if it.n_runs:
        it.low = round_down(it.runs[0].offset, page)
        round_up(it.runs[it.n_runs - 1].offset + it.runs[it.n_runs - 1].size, page, &it.high)
    return 0


cdef void image_retain(image* it) noexcept nogil:
    if it != NULL:
        add(&it.refs, 1)


cdef void image_release(image* it) noexcept nogil:
    if it == NULL or add(&it.refs, -1):
        return
    if it.content.size:
        pages.image_drop(&it.content)
    free(it.runs)
    free(it)


cdef inline size_t image_copy_run(const image* it, size_t i, char* base) noexcept nogil:
    """Copy the i-th run into a memory at `base`; up to where, counted from there. The rest of its last granule is
    zero, and in a memory whose pages are not ours it may be somebody else's."""
    cdef size_t start = it.offset + it.runs[i].offset
    cdef size_t end = start + it.runs[i].size
    if end > it.end:
        end = it.end
    memcpy(base + start, it.content.bytes + it.runs[i].offset, end - start)
    return end


cdef void image_copy(const image* it, char* base) noexcept nogil:
    """Into a memory at `base` that holds zeros."""
    cdef size_t i
    for i in range(it.n_runs):
        image_copy_run(it, i, base)


cdef int start_from_image(memory* m, image* it, failure* why) noexcept nogil:
    """The pages of `m` are fresh."""
    cdef int code
    if it.content.maps and it.high > it.low:
        code = pages.image_map(&it.content, it.low, m.base + it.offset + it.low, it.high - it.low)
        if code:
            return fail_page_call(why, code, "image_map", it.high - it.low)
        m.image_state = IMAGE_MAPPED
    else:
        image_copy(it, m.base)
    hold_image(m, it)
    return 0


cdef void hold_image(memory* m, image* it) noexcept nogil:
    cdef image* before = m.image
    image_retain(it)
    add(&it.memories, 1)
    m.image = it
    let_image_go(before)


cdef void leave_image(memory* m) noexcept nogil:
    cdef image* before = m.image
    m.image = NULL
    let_image_go(before)


cdef void let_image_go(image* it) noexcept nogil:
    if it != NULL:
        add(&it.memories, -1)
        image_release(it)


# -- back to an image ------------------------------------------------------------------------------

cdef enum:
    FEW = 1 << 18       # bytes that are put back in next to no time


cdef void touched_begin(touched_runs* runs, memory* m, size_t at, size_t end) noexcept nogil:
    runs.m = m
    runs.at = at
    runs.end = end
    runs.code = 0


cdef bint touched_next(touched_runs* runs) noexcept nogil:
    cdef size_t stop
    cdef char* next
    if runs.at >= runs.end:
        return False
    stop = memory_border(runs.m, runs.at, runs.end, &runs.over_image)
    runs.n = RUNS
    runs.code = pages.touched(runs.m.base + runs.at, stop - runs.at, runs.over_image, runs.runs, &runs.n, &next)
    if runs.code:
        return False
    runs.at = <size_t>(next - runs.m.base)
    return True


cdef bint refill_touched(memory* m, size_t at, size_t end, size_t bound, size_t* total) noexcept nogil:
    """Put the touched pages of at .. end back to the mapped image's bytes, and to zeros where there is none, and
    add their size to `total`. False: they cannot be found, or are more than `bound`; some may have been put back."""
    cdef touched_runs found
    cdef size_t i
    touched_begin(&found, m, at, end)
    while touched_next(&found):
        for i in range(found.n):
            total[0] += found.runs[i].size
        if total[0] > bound:
            return False
        for i in range(found.n):
            memory_refill(m, <size_t>(found.runs[i].at - m.base), found.runs[i].size)
    return found.code == 0


cdef void zero_pages(memory* m, char* at, size_t size) noexcept nogil:
    """Of no image, whole host pages."""
    cdef size_t total = 0, first = <size_t>(at - m.base)
    if size == 0 or (pages.capabilities().scans and refill_touched(m, first, first + size, SIZE_MAX, &total)):
        return
    if pages.discard(at, size):
        memset(at, 0, size)


cdef void zero_bytes(memory* m, char* at, size_t size) noexcept nogil:
    """Of no image, any bytes."""
    cdef size_t page = pages.capabilities().page_size
    cdef size_t first = 0, last = round_down(<size_t>at + size, page)
    if (not m.ops.pages_are_ours or m.image_state == IMAGE_BROKEN or round_up(<size_t>at, page, &first)
            or first >= last):
        memset(at, 0, size)
        return
    memset(at, 0, first - <size_t>at)
    zero_pages(m, <char*>first, last - first)
    memset(<char*>last, 0, <size_t>at + size - last)


cdef void memory_restore(memory* m, image* to) noexcept nogil:
    """Every byte of `m` becomes the image's, or zero where it has none; the size stays. With the lock held;
    no page is protected, and the image is within byte_size. What the OS refuses is done by copying, so
    this cannot fail."""
    cdef size_t end = m.accessible if m.ops.pages_are_ours else memory_size(m)
    cdef size_t low = to.offset + to.low, high = to.offset + to.high
    if m.image_state == IMAGE_MAPPED and m.image == to:
        restore_mapped(m, low, high, end)
        return
    if high > end:          # within the last page of a memory whose pages are not ours
        high = end
    turn_hull(m, to, low, high)
    zero_bytes(m, m.base, low)
    zero_bytes(m, m.base + high, end - high)
    if m.image_state != IMAGE_BROKEN:
        if m.image != to:
            hold_image(m, to)
            m.started = 0
        m.dirtied = 0


cdef void restore_mapped(memory* m, size_t low, size_t high, size_t end) noexcept nogil:
    """Pages that were put back stay the memory's own, and are found and put back the next time, too. That is
    cheaper than the faults that giving them back would cost, as long as mostly the same are written. So
    the first restore after a giving back tells how many they are, and with four times as many, they all go."""
    cdef size_t total = 0, bound = m.dirtied << 2 if m.dirtied else SIZE_MAX
    cdef const char* bytes = m.image.content.bytes + (low - m.image.offset)
    if (pages.capabilities().scans
            and refill_touched(m, 0, end, bound, &total)):
        if m.dirtied == 0:
            m.dirtied = total if total > FEW else FEW
        return
    m.dirtied = 0
    if (pages.image_renew(&m.image.content, low - m.image.offset, m.base + low, high - low)
            and pages.image_map(&m.image.content, low - m.image.offset, m.base + low, high - low)):
        memcpy(m.base + low, bytes, high - low)
    if low and pages.discard(m.base, low):
        memset(m.base, 0, low)
    if end > high and pages.discard(m.base + high, end - high):
        memset(m.base + high, 0, end - high)


cdef void turn_hull(memory* m, image* to, size_t low, size_t high) noexcept nogil:
    """low .. high, of no image, of another, or broken: to the image's bytes.

    Around each page call the memory is broken: a child forked just then has it as it is then, and what it
    restores it to must not be taken for what is mapped.
    """
    cdef size_t before = low, i
    cdef char* at
    if m.image_state != IMAGE_COPIED:
        # Whatever has become of them, these pages are not to show the other image.
        at = m.base + m.image.offset + m.image.low
        m.image_state = IMAGE_BROKEN
        if pages.blank(at, m.image.high - m.image.low):
            memset(at, 0, m.image.high - m.image.low)
        else:
            m.image_state = IMAGE_COPIED
    if to.content.maps and high > low and m.ops == &mapped_ops and m.image_state == IMAGE_COPIED:
        if m.image != to:
            hold_image(m, to)
            m.started = 0
        publish(&m.image_state, IMAGE_BROKEN)       # after the image, of which it is broken
        if pages.image_map(&to.content, to.low, m.base + low, high - low) == 0:
            m.image_state = IMAGE_MAPPED
            return
        m.image_state = IMAGE_COPIED
    for i in range(to.n_runs):
        zero_bytes(m, m.base + before, to.offset + to.runs[i].offset - before)
        before = image_copy_run(to, i, m.base)
    zero_bytes(m, m.base + before, high - before)


# -- for a pool, whose memories come back to what they started from --------------------------------

cdef int memory_turn_to(memory* m, image* to) noexcept nogil:
    """Nobody else looks at `m`, and it is none of `to` (NULL: of none), or some of its pages are no longer.
    -> 0: it is, and its bytes are put back to an image's; those of none may be anything. Else a code."""
    cdef int code
    if to != NULL:
        memory_restore(m, to)
        return 0 if m.image == to and m.image_state != IMAGE_BROKEN else E_IMAGE
    if m.image_state != IMAGE_COPIED:
        code = pages.blank(m.base + m.image.offset + m.image.low, m.image.high - m.image.low)
        if code:
            return code
        m.image_state = IMAGE_COPIED
    leave_image(m)
    return 0


cdef size_t memory_border(memory* m, size_t at, size_t end, bint* over_image) noexcept nogil:
    """Of at .. end, up to where the pages are a mapped image's all, or none: which of them they are."""
    cdef size_t low, high
    over_image[0] = False
    if m.image_state != IMAGE_MAPPED:
        return end
    low = m.image.offset + m.image.low
    high = m.image.offset + m.image.high
    if at >= high:
        return end
    if at < low:
        return low if low < end else end
    over_image[0] = True
    return high if high < end else end


cdef void memory_refill(memory* m, size_t at, size_t size) noexcept nogil:
    """Those bytes become the mapped image's, and zero where there is none."""
    cdef size_t end = at + size, stop
    cdef bint over_image
    while at < end:
        stop = memory_border(m, at, end, &over_image)
        if over_image:
            memcpy(m.base + at, m.image.content.bytes + (at - m.image.offset), stop - at)
        else:
            memset(m.base + at, 0, stop - at)
        at = stop


cdef bint memory_is_filled(memory* m, size_t size) noexcept nogil:
    """Whether the first `size` bytes are what memory_refill() makes them, or its image's that was copied."""
    cdef size_t page = pages.capabilities().page_size
    cdef size_t at = 0
    cdef const char* there
    while at < size:
        there = NULL
        if m.image != NULL:
            there = image_at(m.image, at)
        if there == NULL:
            if not is_zero(m.base + at, page):
                return False
        elif memcmp(m.base + at, there, page):
            return False
        at += page
    return True


cdef int memory_renew(memory* m, size_t size) noexcept nogil:
    """The pages of the first `size` bytes are given back: they become the mapped image's, and zeros. As
    pages.renew() otherwise."""
    cdef size_t at = 0, stop
    cdef bint over_image
    cdef int code = 0
    m.dirtied = 0
    while at < size and code == 0:
        stop = memory_border(m, at, size, &over_image)
        if over_image:
            code = pages.image_renew(&m.image.content, at - m.image.offset, m.base + at, stop - at)
        else:
            code = pages.renew(m.base + at, stop - at)
        at = stop
    return code


cdef int memory_start_again(memory* m, image* to) noexcept nogil:
    """Its pages have been decommitted and committed, and are zero. -> they are the image's."""
    cdef int code = 0
    m.image_state = IMAGE_COPIED
    m.dirtied = 0
    if m.image != to:
        if to == NULL:
            leave_image(m)
        else:
            hold_image(m, to)
    if to == NULL:
        return 0
    if to.content.maps and to.high > to.low:
        code = pages.image_map(&to.content, to.low, m.base + to.offset + to.low, to.high - to.low)
        if code == 0:
            m.image_state = IMAGE_MAPPED
    else:
        image_copy(to, m.base)
    return code


# -- what differs ----------------------------------------------------------------------------------

# Ranges of whole host pages, counted from a memory's first byte. The time and the room that they take follow the
# pages that are there, not the size of the memory.
cdef struct ranges:
    run* list
    size_t n
    size_t room


cdef int add_range(ranges* to, size_t offset, size_t size) noexcept nogil:
    cdef size_t room
    cdef run* more
    cdef run* last = to.list + (to.n - 1) if to.n else NULL
    if last != NULL and last.offset <= offset and offset <= last.offset + last.size:
        if offset + size > last.offset + last.size:
            last.size = offset + size - last.offset
        return 0
    if to.n == to.room:
        room = to.n * 2 + 16
        more = <run*>realloc(to.list, room * sizeof(run))
        if more == NULL:
            return E_NO_MEMORY
        to.list = more
        to.room = room
    to.list[to.n].offset = offset
    to.list[to.n].size = size
    to.n += 1
    return 0


cdef int by_offset(const void* a, const void* b) noexcept nogil:
    cdef size_t left = (<const run*>a).offset, right = (<const run*>b).offset
    return -1 if left < right else 1 if left > right else 0


cdef void join_ranges(ranges* of) noexcept nogil:
    """-> in order and apart."""
    cdef size_t i, n = of.n
    if n == 0:
        return
    qsort(of.list, n, sizeof(run), by_offset)
    of.n = 0
    for i in range(n):      # never more than were there: no room is needed
        add_range(of, of.list[i].offset, of.list[i].size)


cdef int add_touched(memory* m, size_t end, ranges* to) noexcept nogil:
    cdef touched_runs found
    cdef size_t i, from_, stop = 0, page = pages.capabilities().page_size
    cdef int code
    touched_begin(&found, m, 0, end)
    while touched_next(&found):
        for i in range(found.n):
            # The kernel counts in its own pages, which may be smaller than the host page.
            from_ = round_down(<size_t>(found.runs[i].at - m.base), page)
            round_up(<size_t>(found.runs[i].at - m.base) + found.runs[i].size, page, &stop)
            code = add_range(to, from_, stop - from_)
            if code:
                return code
    return found.code


cdef int add_runs(const image* it, ranges* to) noexcept nogil:
    """In host pages."""
    cdef size_t i, first, last = 0, page = pages.capabilities().page_size
    cdef int code
    for i in range(it.n_runs):
        first = round_down(it.offset + it.runs[i].offset, page)
        round_up(it.offset + it.runs[i].offset + it.runs[i].size, page, &last)
        code = add_range(to, first, last - first)
        if code:
            return code
    return 0


cdef int add_present(memory* m, image* over, ranges* to, size_t end) noexcept nogil:
    """What of the first `end` bytes (whole host pages) may hold something else than the image `over` (NULL: than
    zeros). With the lock held."""
    cdef size_t high = 0
    cdef bint mapped = m.image_state == IMAGE_MAPPED
    cdef int code = 0
    if mapped:
        high = m.image.offset + m.image.high
    if (not m.ops.pages_are_ours or not pages.capabilities().scans or m.image_state == IMAGE_BROKEN
            or high > end or end > m.accessible):
        return add_range(to, 0, end)
    code = add_touched(m, end, to)
    if code:        # the kernel does not say: each page is looked at
        to.n = 0
        return add_range(to, 0, end)
    # What is not touched is the mapped image's, or zero: which `over` may not be.
    if over != m.image or not mapped:
        if mapped:
            code = add_runs(m.image, to)
        if code == 0 and over != NULL:
            code = add_runs(over, to)
    return code


cdef inline const char* image_at(const image* it, size_t at) noexcept nogil:
    """The page of an image that stands at `at` in a memory; NULL: zeros."""
    if at < it.offset + it.low or at >= it.offset + it.high:
        return NULL
    return it.content.bytes + (at - it.offset)


cdef int compare(memory* m, image* now, image* base, bint for_delta, changes* out, failure* why) noexcept nogil:
    """What differs from `base` in `m` (the lock held; no page inaccessible), or in `now`. for_delta: a last page that
    the end cuts counts as changed if `base` goes on behind the end: a chain of deltas may zero what is cut off, and a
    file holds whole pages."""
    cdef size_t page = pages.capabilities().page_size
    cdef size_t size = memory_size(m) if m != NULL else now.end
    cdef size_t i, at, end = 0
    cdef bint is_cut = for_delta and size & (page - 1) and base.end > size
    cdef ranges places
    cdef int code
    memset(&places, 0, sizeof(places))
    round_up(size, page, &end)
    if m != NULL:
        code = add_present(m, base, &places, end) if end else 0
    else:
        code = add_runs(now, &places)
        if code == 0:
            code = add_runs(base, &places)
    if code == 0 and is_cut:
        code = add_range(&places, end - page, page)
    if code:
        fail(why, code, "realloc", places.room * 2 * sizeof(run))
    else:
        join_ranges(&places)
    for i in range(places.n):
        at = places.list[i].offset
        end = at + places.list[i].size
        while at < end and at < size and code == 0:
            code = compare_page(m, now, base, is_cut, at, page, size, out, why)
            at += page
        if code:
            break
    free(places.list)
    return code


cdef int compare_page(memory* m, image* now, image* base, bint is_cut, size_t at, size_t page, size_t size,
                      changes* out, failure* why) noexcept nogil:
    """The page at `at`, of which what is below `size` is compared. is_cut: one that `size` cuts counts as changed."""
    cdef size_t step = page if size - at > page else size - at
    cdef const char* here
    cdef const char* there = image_at(base, at)
    cdef bint zero
    if m != NULL:
        here = m.base + at
    else:
        here = image_at(now, at)
    zero = here == NULL or is_zero(here, step)
    if step == page or not is_cut:
        if zero if there == NULL else is_zero(there, step) if here == NULL else memcmp(here, there, step) == 0:
            return 0
    return add_change(out, at, step, zero, why)


cdef int add_change(changes* to, size_t offset, size_t size, bint zero, failure* why) noexcept nogil:
    cdef size_t room
    cdef change* more
    cdef change* last
    if to.n:
        last = to.list + (to.n - 1)
        if last.zero == zero and last.offset + last.size == offset:
            last.size += size
            return 0
    if to.n == to.room:
        room = to.n * 2 + 16
        more = <change*>realloc(to.list, room * sizeof(change))
        if more == NULL:
            return fail(why, E_NO_MEMORY, "realloc", room * sizeof(change))
        to.list = more
        to.room = room
    to.list[to.n].offset = offset
    to.list[to.n].size = size
    to.list[to.n].zero = zero
    to.n += 1
    return 0


cdef int memory_snapshot(memory* m, image** out, failure* why) noexcept nogil:
    """With the lock held; no page is inaccessible."""
    cdef size_t page = pages.capabilities().page_size
    cdef size_t size = memory_size(m)
    cdef size_t i, first, last = 0
    cdef int code = 0
    cdef ranges places
    cdef image* it = image_new(0, size, why)
    if it == NULL:
        return why.code
    memset(&places, 0, sizeof(places))
    round_up(size, page, &last)
    if last:
        code = add_present(m, NULL, &places, last)
    if code:
        fail(why, code, "realloc", places.room * 2 * sizeof(run))
    else:
        join_ranges(&places)
    for i in range(places.n):
        first = places.list[i].offset
        last = first + places.list[i].size if first + places.list[i].size < size else size
        if code == 0 and first < last:
            code = image_put(it, first, m.base + first, last - first, why)
    free(places.list)
    if code == 0:
        code = image_finish(it, why)
    if code:
        image_release(it)
        return code
    out[0] = it
    return 0


cdef int discard_pages(memory* m, char* at, size_t size, failure* why) noexcept nogil:
    """Whole pages to zeros, given back, with the lock held. Those that show an image stop doing so: the next restore
    maps it anew. All or nothing: what is refused when other pages have gone already is zeroed instead."""
    cdef char* low
    cdef char* high
    cdef char* end = at + size
    cdef word shown
    cdef size_t other
    cdef int access, code = 0
    low = high = end
    if m.image_state != IMAGE_COPIED:
        low = m.base + m.image.offset + m.image.low
        high = m.base + m.image.offset + m.image.high
        low = at if low < at else end if low > end else low
        high = low if high < low else end if high > end else high
    if high > low and memory_has_other(m, <size_t>(at - m.base), size, WRITABLE, &other, &access):
        code = unsupported_protection(m, other, access, "discard, where the range holds pages of an image,", why)
    if code == 0 and low > at:
        code = pages.discard(at, <size_t>(low - at))
    if code == 0 and high > low:
        shown = m.image_state
        m.image_state = IMAGE_BROKEN        # before: a child may be forked just then
        code = pages.blank(low, <size_t>(high - low))
        if code and low > at:
            memset(low, 0, <size_t>(high - low))
            code = 0
        if code:
            m.image_state = shown
    if code == 0 and end > high:
        code = pages.discard(high, <size_t>(end - high))
        if code and high > at:
            memset(high, 0, <size_t>(end - high))
            code = 0
    return fail_page_call(why, code, "discard", size) if code > 0 else code
