# The costs of page faults, scans and zeroing on this machine. Part of pool.pyx.

cdef reset_costs costs          # fault == 0: not measured yet
cdef reset_costs copying_costs  # of a slot whose image is copied into each page
cdef size_t wide_most = 0       # bytes: a memory up to this size is zeroed by zero_wide()
costs.fault = costs.scan = 0

cdef enum:
    SAMPLE = 64                 # pages
    SAMPLES = 5
    SCANS = 8


cdef void measure_costs() noexcept nogil:
    """Takes well below a millisecond. Each time is the time for a whole sample. If measuring is impossible, or if the
    thread lost the processor in each sample, clamp() makes the results plausible."""
    global wide_most
    cdef size_t page = pages.capabilities().page_size
    cdef size_t size = SAMPLE * page
    cdef long long start, zero = 0, wide_zero = 0, fault = 0, scan = 0
    cdef char* base
    cdef char* sparse           # a second sample, with one page in it
    cdef char* next
    cdef pages.span runs[4]
    cdef size_t n, offset
    cdef int _, code
    if pages.reserve(2 * size, True, &base) == 0:
        sparse = base + size
        if pages.commit(base, 2 * size) == 0:
            touch(sparse)
            for _ in range(SAMPLES):
                start = pages.clock_ns()
                offset = 0
                while offset < size:
                    touch(base + offset)
                    offset += page
                code = pages.renew(base, size)
                fault = shortest(fault, start, code)
                if code:
                    break
            memset(base, 0, size)
            for _ in range(SCANS):
                start = pages.clock_ns()
                memset(base, 0, size)
                zero = shortest(zero, start, 0)
                if has_wide_stores():
                    start = pages.clock_ns()
                    zero_wide(base, size)
                    wide_zero = shortest(wide_zero, start, 0)
                # The scan is timed after other work, as in a busy pool. Directly after another scan, it would take only
                # two thirds of the time.
                n = 4
                start = pages.clock_ns()
                code = pages.touched(sparse, size, False, runs, &n, &next)
                scan = shortest(scan, start, code)
        release_address_space(base, 2 * size)
    zero = max(zero, 1)
    # Where both take about the same time for the sample, zero_wide() is better for a few pages: memset() starts slowly.
    wide_most = 0
    if wide_zero and wide_zero - zero < zero >> 3:
        wide_most = WIDE_MOST if zero - wide_zero > zero >> 3 else WIDE_IF_EQUAL
    costs.fault = copying_costs.fault = clamp(fault // zero, 8)
    costs.scan = clamp(scan * SAMPLE // (wide_zero if wide_most == WIDE_MOST else zero), 4)
    copying_costs.scan = clamp(scan * SAMPLE // (2 * zero), 4)


cdef void need_costs() noexcept nogil:
    """Measures once in a process."""
    lock(&start_lock)
    if costs.fault == 0:
        measure_costs()
    unlock(&start_lock)


cdef long long shortest(long long best, long long start, int code) noexcept nogil:
    cdef long long took = pages.clock_ns() - start
    return took if code == 0 and (best == 0 or took < best) else best


cdef unsigned int clamp(long long n, unsigned int least) noexcept nogil:
    return least if n < least else 64 if n > 64 else <unsigned int>n


# -- for tests: the pure functions --------------------------------------------------------------------------

cdef class _Policy:
    """The reset policy of one slot, for ranges of `n` pages of which a scan found `touched`."""

    cdef reset_policy policy
    cdef reset_costs costs

    def __cinit__(self, unsigned int fault, unsigned int scan):
        self.costs.fault = fault
        self.costs.scan = scan
        reset_start(&self.policy)

    def begin(self, unsigned int n):
        return _RESETS[reset_begin(&self.policy, &self.costs, n)]

    def bound(self, unsigned int n):
        return reset_bound(&self.policy, &self.costs, n)

    def end(self, unsigned int n, unsigned int touched, unsigned int most):
        return bool(reset_end(&self.policy, &self.costs, n, touched, most))

    def given_back(self):
        reset_given_back(&self.policy)


def _costs(anew=False):
    """The measured costs. anew: measure again."""
    if anew:
        costs.fault = 0
    need_costs()
    return {"fault": costs.fault, "scan": costs.scan}


def _zero_wide(size_t address, size_t size):
    """zero_wide(). False, and nothing is done, if this processor has no wide stores."""
    if not has_wide_stores():
        return False
    zero_wide(<char*>address, size)
    return True
