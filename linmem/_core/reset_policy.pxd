# How a pool resets a slot: which pages to zero and keep, and when to give all pages back. Pure arithmetic, no system
# call. Layer 0: imports nothing of linmem.
#
# A page that was given back costs the next guest a page fault. A page that is kept costs a zeroing at every reset. A
# fault costs as much as 12 to 70 zeroings; reset_costs holds the value for this machine. So pages are kept as long as
# guests use them again. A scan finds the pages that may hold bytes, and only these pages are zeroed.
#
# In a small range, zeroing all pages is cheaper than a scan. But the first time, it faults in the pages that no guest
# has touched. So a small range is scanned until the slot has served as many uses as the range has pages.
#
# Three signs show that guests do not use the kept pages again:
#
#   churn   Each use dirties other pages: in several uses in a row, more than half of the dirtied pages are new. Then
#           each reset gives all pages back without a scan, for 4 .. 128 uses. After that, scans begin again.
#   burst   One use dirtied far more pages than usual. It would be a waste to zero these pages at every reset, so all
#           pages are given back at once. But if the next burst follows so soon that keeping the pages would have cost
#           less than the faults, bursts are kept, for longer each time, unless each burst dirties other pages.
#   age     A scan cannot tell a page that was dirtied only once from a page in use, because a kept page stays resident.
#           So all pages are given back from time to time (after 32, 128, 512 .. uses). If guests then dirty at
#           least half of that number of pages before keeping them would have cost as much as the faults, the next
#           interval is longer. Otherwise fewer pages count as usual for this slot.
#
# A "page" in this file is a run of 4096 bytes, also on hosts with larger pages.

from libc.string cimport memset

cdef enum:
    RESET_SCAN = 0          # zero the touched pages
    RESET_ZERO = 1          # zero all pages
    RESET_DISCARD = 2       # give all pages back

    FIRST_PATIENCE = 32
    MOST_PATIENCE = 4096
    FIRST_BACKOFF = 4
    MOST_BACKOFF = 128
    MOST_DISTRUST = 64
    # Pages: in ranges up to this size, zeroing all pages beats a scan if three quarters of them are resident; in larger
    # ranges, if seven eighths are.
    SMALL_RANGE = 256
    ANY = 1 << 30           # pages or uses: no bound

# The costs of calls on this machine, in zeroings of one page in the cache.
cdef struct reset_costs:
    unsigned int fault              # of one page, including the call that gave the page back
    unsigned int scan               # of a range with few touched pages; in zeroings by the fastest way to zero

cdef struct reset_policy:
    unsigned int uses               # counted up to the number of pages
    unsigned int resident           # pages, when the slot was handed out
    unsigned int dirty              # pages that a use dirtied: the last use that began without resident pages
    unsigned int usual              # pages that guests usually dirty
    unsigned int on_trial           # pages that were resident when all were given back because of age; 0: no trial
    unsigned int age                # uses since all pages were given back, or since a burst was kept
    unsigned int patience           # the age at which all pages are given back
    unsigned int burst_age          # uses since a burst was given back
    unsigned int burst_patience     # uses for which the next burst is kept
    unsigned int burst_size         # pages that the kept burst has added
    unsigned int distrust           # how many of the next bursts are given back at once, even if bursts recur soon
    unsigned int next_distrust      # what `distrust` becomes when a burst was kept in vain; doubles each time
    unsigned int skip               # in a churn: how many of the next resets give all pages back without a scan
    unsigned int backoff            # the value of `skip` when the next churn begins
    unsigned int strikes            # uses in a row that dirtied mostly new pages
    unsigned int zero_whole         # pages in the range that is zeroed without a scan; 0: scan
    bint probing                    # after a churn: two strikes are enough
    bint empty                      # no page was resident when the slot was handed out
    bint known                      # `usual` is known, because there has been a scan


cdef inline void reset_start(reset_policy* p) noexcept nogil:
    memset(p, 0, sizeof(reset_policy))
    p.next_distrust = 4
    p.patience = FIRST_PATIENCE
    p.burst_age = ANY
    p.backoff = FIRST_BACKOFF
    p.empty = True


cdef inline unsigned int worth(const reset_costs* costs, unsigned int n) noexcept nogil:
    """How many zeroings cost as much as one fault in a range of n pages: in large ranges, where pages fall out of the
    caches, zeroing takes longer. This number is also the number of uses for which n pages are worth keeping."""
    return costs.fault if n <= 1024 else costs.fault * 2 // 3 if n <= 4096 else costs.fault // 3


cdef inline bint worth_keeping_whole(const reset_policy* p, const reset_costs* costs, unsigned int n) noexcept nogil:
    """Whether zeroing all n pages costs less than the faults of one use, or almost nothing."""
    return n <= (p.dirty if p.dirty > 2 else 2) * worth(costs, n)


cdef inline void reset_given_back(reset_policy* p) noexcept nogil:
    """After all pages were given back, for any reason."""
    p.resident = p.age = p.zero_whole = p.burst_size = 0
    p.empty = True


cdef inline int reset_begin(reset_policy* p, const reset_costs* costs, unsigned int n) noexcept nogil:
    """Returns how to reset a range of n pages after a use."""
    if n <= costs.scan:
        if p.uses >= n:
            return RESET_ZERO
        p.uses += 1
    if p.skip:
        p.skip -= 1
        return RESET_DISCARD
    if p.zero_whole and p.zero_whole == n:
        p.age += 1
        if p.age < p.patience:
            return RESET_ZERO
        p.on_trial = n
        return RESET_DISCARD
    p.zero_whole = 0
    return RESET_SCAN


cdef inline unsigned int reset_bound(const reset_policy* p, const reset_costs* costs, unsigned int n) noexcept nogil:
    """If a scan finds more touched pages than this, it stops, and all pages are given back. A complete scan would
    mostly lead reset_end() to the same decision. In rare cases, reset_end() would have kept the pages."""
    if (not p.known or p.burst_patience or p.burst_age <= worth(costs, 1) or p.strikes
            or worth_keeping_whole(p, costs, n)):
        return ANY
    return 2 * p.usual + 8


cdef inline bint reset_end(reset_policy* p, const reset_costs* costs, unsigned int n, unsigned int touched,
                           unsigned int most) noexcept nogil:
    """After a scan that found `touched` of n pages. Returns whether they are kept. most: the most pages that a slot may
    keep."""
    cdef unsigned int new_pages = 0
    if p.empty:
        p.dirty = touched
        if not p.known:
            p.usual = touched
            p.known = True
    else:
        new_pages = touched - p.resident if touched > p.resident else 0
        if 2 * new_pages > p.dirty and not worth_keeping_whole(p, costs, n):
            p.strikes += 1
        else:
            p.strikes = 0
            p.probing = False
            p.backoff = FIRST_BACKOFF
    p.age += 1
    if p.burst_age < ANY:
        p.burst_age += 1
    if touched == 0:
        p.resident = 0
        p.empty = True
        return True
    if p.on_trial:
        if 2 * touched >= p.on_trial:
            p.patience = min(4 * p.patience, <unsigned int>MOST_PATIENCE)
            p.on_trial = 0
        elif p.age > worth(costs, p.on_trial):
            p.usual = touched
            p.patience = FIRST_PATIENCE
            p.burst_patience = p.burst_size = 0
            p.on_trial = 0

    if touched > most or p.strikes >= (2 if p.probing else 3):
        p.skip = p.backoff
        p.backoff = min(2 * p.backoff, <unsigned int>MOST_BACKOFF)
        p.strikes = p.on_trial = 0
        p.probing = True
        return False
    if p.burst_size and 2 * new_pages > p.burst_size:
        p.burst_size = p.burst_patience = 0
        p.distrust = p.next_distrust
        p.next_distrust = min(2 * p.next_distrust, <unsigned int>MOST_DISTRUST)
        p.burst_age = 0
        p.usual = p.dirty
        return False
    if touched > 2 * p.usual + 8 and not worth_keeping_whole(p, costs, n):
        if p.burst_age <= worth(costs, touched) and p.distrust:
            p.distrust -= 1
        elif p.burst_age <= worth(costs, touched):
            # The burst is kept until the next burst shows whether it dirties the same pages.
            p.burst_patience = max(4 * p.burst_patience if p.burst_patience else 8, 2 * p.burst_age + 2)
            p.burst_patience = min(p.burst_patience, <unsigned int>MOST_PATIENCE)
        else:
            p.burst_patience //= 4
        if p.burst_patience == 0:
            p.burst_age = 0
            return False
        p.burst_size = touched - p.usual
        p.usual = touched
        p.patience = p.burst_patience
        p.age = 0
    elif p.age >= p.patience:
        p.on_trial = touched
        return False
    p.resident = touched
    p.empty = False
    if 4 * touched >= 3 * n and n <= SMALL_RANGE or 8 * touched >= 7 * n:
        p.zero_whole = n
        p.resident = n
    return True
