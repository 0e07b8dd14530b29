# Writes the bytes of an image or of a delta into a memory: memory_restore(), restore_all(), memory_apply(); a part of
# memory.pyx.

cdef enum:
    LOCK_IS_TAKEN = -2000           # from lock_for_restore() only; not one of the E_ constants, and never in a failure


cdef int memory_restore(memory* m, image* img, bint zero_grown, failure* why) noexcept nogil:
    """Gives each byte the value that it has in the image, or zero outside of the image. The size stays. zero_grown:
    allows a memory that is larger than the image's known size. If this fails, no byte has changed."""
    cdef int code = lock_for_restore(m, img, zero_grown, True, why)
    if code == 0:
        image_restore(m, img)
        unlock(&m.lock)
    return code


cdef int lock_for_restore(memory* m, image* img, bint zero_grown, bint may_wait, failure* why) noexcept nogil:
    """0: the caller holds the memory's lock, and image_restore() cannot fail. LOCK_IS_TAKEN: another thread holds the
    lock, and the caller may not wait. After every code but 0 the caller does not hold the lock."""
    cdef size_t size, known
    cdef int code = 0
    if load(&m.owner) == OWNER_WASMTIME:
        if not try_lock(&m.lock):
            fail(why, E_OWNED, "restore", 0)
            explain(why, "another thread is growing this memory or looks at all of it; restore it when no call runs in"
                    " that store")
            return E_OWNED
    elif may_wait:
        code = lock_memory(m, why)
        if code:
            return code
    elif not try_lock(&m.lock):
        return LOCK_IS_TAKEN
    size = memory_size(m)
    known = image_known_size(m, img)
    code = refuse_protected(m, WRITABLE, "restore", why)
    if code == 0 and size < known:
        code = fail_text(why, E_VALUE, "the memory has %zu bytes and the image %zu: grow it before", size, known)
    elif code == 0 and size > known and not zero_grown:
        code = fail_text(why, E_VALUE, "the memory has grown to %zu bytes since, the image knows of %zu:"
                         " zero_grown=True keeps the size and zeroes the rest", size, known)
    if code:
        unlock(&m.lock)
    return code


def restore_all(list memories not None, list images not None):
    """Restore each of several different memories to its image, the one at the same place of `images`, also if the
    memory has grown: all of them, or none.

    Raises
    ------
    OwnedError, TypeError, ValueError
        As `Memory.restore`, for the first memory that cannot be restored. No memory has changed then.
    """
    cdef size_t locked, i, n = len(memories)
    cdef Memory mem
    cdef Image img
    cdef memory* m
    cdef failure why
    cdef int code = LOCK_IS_TAKEN
    if len(images) != n:
        raise ValueError(f"restore_all() needs as many images as memories, got {len(images)} and {n}")
    while code == LOCK_IS_TAKEN:
        locked = code = 0
        try:
            while locked < n:
                mem, img = <Memory?>memories[locked], <Image?>images[locked]
                m = mem.enter()
                with nogil:
                    code = lock_for_restore(m, img.img, True, locked == 0, &why)
                if code:
                    mem.leave()
                    break
                locked += 1
        finally:
            for i in range(locked):
                mem, img = <Memory>memories[i], <Image>images[i]
                with nogil:
                    if locked == n:
                        image_restore(mem.m, img.img)
                    unlock(&mem.m.lock)
                mem.leave()
        # The next round begins with this lock, so the thread waits for it without holding another lock: no deadlock.
        if code == LOCK_IS_TAKEN:
            memories = [memories[locked], *memories[:locked], *memories[locked + 1:]]
            images = [images[locked], *images[:locked], *images[locked + 1:]]
    if code:
        raise_failure(&why)


# -- deltas

cdef int memory_apply(memory* m, size_t base_size, size_t new_size, const delta_piece* pieces, size_t n,
                      failure* why) noexcept nogil:
    """Grow the memory to `new_size`, and write the pieces of a delta that leads there from `base_size` bytes. If this
    fails, nothing was written."""
    cdef size_t i, size
    cdef int code = lock_memory(m, why)
    if code:
        return code
    size = memory_size(m)
    if size > new_size or (size < base_size and size < new_size):
        code = fail_text(why, E_VALUE, "the memory has %zu bytes, and the delta is for one of %zu that becomes one of"
                         " %zu", size, base_size, new_size)
    if code == 0:
        code = refuse_pieces(m, new_size, pieces, n, why)
    if code == 0 and size < new_size:
        code = grow_locked(m, new_size, True, why)
        if code == 0:
            code = refuse_pieces(m, new_size, pieces, n, why)
    if code == 0:
        for i in range(n):
            if pieces[i].bytes != NULL:
                memmove(m.base + pieces[i].offset, pieces[i].bytes, pieces[i].size)
            else:
                memset(m.base + pieces[i].offset, 0, pieces[i].size)
    unlock(&m.lock)
    return code


cdef int refuse_pieces(memory* m, size_t new_size, const delta_piece* pieces, size_t n, failure* why) noexcept nogil:
    """A failure if a piece lies beyond new_size, or its part within byte_size cannot be written."""
    cdef size_t i, offset, size, byte_size = memory_size(m)
    cdef int code
    for i in range(n):
        offset, size = pieces[i].offset, pieces[i].size
        if offset > new_size or size > new_size - offset:
            return fail_text(why, E_VALUE, "offset + size must be <= the size that the delta leads to (%zu), got"
                             " offset=%zu size=%zu", new_size, offset, size)
        if offset >= byte_size:
            continue
        size = size if size < byte_size - offset else byte_size - offset
        if m.ops.pages_are_ours:
            code = unsupported_on(m, offset, size, WRITABLE, "apply", why)
        else:
            code = refuse_foreign(m.base + offset, size, WRITABLE, "apply", why)
        if code:
            return code
    return 0
