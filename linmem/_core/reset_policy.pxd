# How a pool resets a slot: which pages to zero and keep, and when to give them all back. Pure
# arithmetic, no system call. Floor 0: imports nothing of ours.
#
# A page that was given back costs its next user a fault; a page that is kept costs a zeroing at every
# reset. A fault is worth 12 to 70 zeroings, as measured on the machine (reset_costs). So pages are kept,
# and only those that may hold bytes are zeroed (a scan finds them), as long as they are used again. A small
# range is zeroed whole, for that is cheaper than a scan; but the first time it faults in what nobody has
# touched, so a slot must have been used as often as it has pages before.
# Three things tell that they are not:
#
#   churn   each use dirties other pages: use after use, more than half of what one use dirties is new.
#           Then every reset gives all back, without a look, for 4 .. 128 uses; then it looks again.
#   burst   one use dirtied far more than the slot's users come back to. What is kept of it would be
#           zeroed for nobody: all is given back at once. Where bursts return before the zeroing would
#           have cost as much as the faults, that was wrong: they are then kept, for longer each time,
#           unless each burst dirties other pages.
#   age     what was dirtied once and never again cannot be seen: a kept page looks the same. So
#           now and then (after 32, 128, 512 .. uses) all is given back, and half of it must come back
#           before keeping it would have cost as much; else less is believed of this slot.
#
# "Pages" here are runs of 4096 bytes, whatever the host page is.

cdef enum:
    RESET_SCAN = 0          # zero what was touched
    RESET_ZERO = 1          # zero all
    RESET_DISCARD = 2       # give all back

    FIRST_PATIENCE = 32
    MOST_PATIENCE = 4096
    FIRST_BACKOFF = 4
    MOST_BACKOFF = 128
    MOST_DISTRUST = 64
    # Pages: up to here, zeroing all beats a scan once three quarters of them are resident; beyond, once
    # seven eighths are.
    SCANLESS = 256
    ANY = 1 << 30           # pages or uses: no bound

# What this machine's calls cost, in zeroings of one page in the cache.
cdef struct reset_costs:
    unsigned int fault              # of a page, its giving back included
    unsigned int scan               # of a range with little in it, in the cheapest zeroings

cdef struct reset_policy:
    unsigned int uses               # as many as count
    unsigned int resident           # pages, when the slot was handed out
    unsigned int dirty              # pages dirtied by the last use that found nothing resident
    unsigned int level              # pages that its users have been seen to come back to
    unsigned int before             # pages resident before a giving back that is on trial; 0: none is
    unsigned int age                # uses since all was given back, or since a burst was kept
    unsigned int patience           # uses until that is tried again
    unsigned int burst_age          # uses since a burst was given back
    unsigned int burst_patience     # uses to keep the next one for
    unsigned int burst_size         # pages that the burst which is kept has added
    unsigned int distrust           # bursts that will be given back though they return soon
    unsigned int next_distrust
    unsigned int skip               # uses left of a churn, in which nobody looks
    unsigned int backoff            # uses that the next churn will take
    unsigned int strikes            # uses in a row that dirtied other pages
    unsigned int scanless           # pages in the range that is zeroed whole; 0: scan
    bint probing                    # after a churn: strikes count more
    bint empty                      # nothing was resident when the slot was handed out
    bint known                      # one use has been seen


cdef inline void reset_start(reset_policy* p) noexcept nogil:
    p.uses = p.resident = p.dirty = p.level = p.before = p.age = p.burst_patience = 0
    p.skip = p.strikes = p.scanless = p.burst_size = p.distrust = 0
    p.next_distrust = 4
    p.patience = FIRST_PATIENCE
    p.burst_age = ANY
    p.backoff = FIRST_BACKOFF
    p.probing = p.known = False
    p.empty = True


cdef inline unsigned int worth(const reset_costs* costs, unsigned int n) noexcept nogil:
    """Zeroings that a fault is worth among n pages: those that fall out of the caches take longer. Also
    the uses for which n pages are worth keeping for the next one."""
    return costs.fault if n <= 1024 else costs.fault * 2 // 3 if n <= 4096 else costs.fault // 3


cdef inline bint worth_keeping_whole(const reset_policy* p, const reset_costs* costs, unsigned int n) noexcept nogil:
    """Even if all n pages stayed resident, zeroing them costs less than the faults of one use, or next to
    nothing."""
    return n <= (p.dirty if p.dirty > 2 else 2) * worth(costs, n)


cdef inline void reset_given_back(reset_policy* p) noexcept nogil:
    """All pages have been given back, for whatever reason."""
    p.resident = 0
    p.age = 0
    p.scanless = 0
    p.burst_size = 0
    p.empty = True


cdef inline int reset_begin(reset_policy* p, const reset_costs* costs, unsigned int n) noexcept nogil:
    """How to reset a range of n pages after a use."""
    if n <= costs.scan:
        if p.uses >= n:
            return RESET_ZERO
        p.uses += 1
    if p.skip:
        p.skip -= 1
        return RESET_DISCARD
    if p.scanless and p.scanless == n:
        p.age += 1
        if p.age < p.patience:
            return RESET_ZERO
        p.before = n
        return RESET_DISCARD
    p.scanless = 0
    return RESET_SCAN


cdef inline unsigned int reset_bound(const reset_policy* p, const reset_costs* costs, unsigned int n) noexcept nogil:
    """More touched pages than this are given back: no need to zero them, or to count on. Mostly reset_end() says so,
    too; now and then this very use tells it that they are worth keeping, and comes too late."""
    if (not p.known or p.burst_patience or p.burst_age <= worth(costs, 1) or p.strikes
            or worth_keeping_whole(p, costs, n)):
        return ANY
    return 2 * p.level + 8


cdef inline bint reset_end(reset_policy* p, const reset_costs* costs, unsigned int n, unsigned int touched,
                           unsigned int most) noexcept nogil:
    """After a scan that found `touched` of n pages: whether they are kept. most: the bound on what a slot
    may keep."""
    cdef unsigned int fresh = 0
    if p.empty:
        p.dirty = touched
        if not p.known:
            p.level = touched
            p.known = True
    else:
        fresh = touched - p.resident if touched > p.resident else 0
        if 2 * fresh > p.dirty and not worth_keeping_whole(p, costs, n):
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
    if p.before:
        if 2 * touched >= p.before:
            p.patience = 4 * p.patience if p.patience < MOST_PATIENCE // 4 else MOST_PATIENCE
            p.before = 0
        elif p.age > worth(costs, p.before):
            p.level = touched
            p.patience = FIRST_PATIENCE
            p.burst_patience = p.burst_size = 0
            p.before = 0

    if touched > most or p.strikes >= (2 if p.probing else 3):
        p.skip = p.backoff
        if p.backoff < MOST_BACKOFF:
            p.backoff *= 2
        p.strikes = 0
        p.probing = True
        p.before = 0
        return False
    if p.burst_size and 2 * fresh > p.burst_size:
        p.burst_size = p.burst_patience = 0
        p.distrust = p.next_distrust
        if p.next_distrust < MOST_DISTRUST:
            p.next_distrust *= 2
        p.burst_age = 0
        p.level = p.dirty
        return False
    if touched > 2 * p.level + 8 and not worth_keeping_whole(p, costs, n):
        if p.burst_age <= worth(costs, touched) and p.distrust:
            p.distrust -= 1
        elif p.burst_age <= worth(costs, touched):
            # Long enough to see whether the next one dirties the same pages.
            p.burst_patience = 4 * p.burst_patience if p.burst_patience else 8
            if p.burst_patience < 2 * p.burst_age + 2:
                p.burst_patience = 2 * p.burst_age + 2
            if p.burst_patience > MOST_PATIENCE:
                p.burst_patience = MOST_PATIENCE
        else:
            p.burst_patience //= 4
        if p.burst_patience == 0:
            p.burst_age = 0
            return False
        p.burst_size = touched - p.level
        p.level = touched
        p.patience = p.burst_patience
        p.age = 0
    elif p.age >= p.patience:
        p.before = touched
        return False
    p.resident = touched
    p.empty = False
    if 4 * touched >= 3 * n and n <= SCANLESS or 8 * touched >= 7 * n:
        p.scanless = n
        p.resident = n
    return True
