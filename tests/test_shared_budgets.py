"""A budget counts a shared memory once in a process, however many memories of the process show its bytes."""

import errno
import threading

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import FORKING, PAGE, answer, failing, file_requires, new_process, requires

import linmem

file_requires("shared")

MOST = 12                               # pages of a shared memory


def shared(pages=1):
    return linmem.create(pages * PAGE, MOST * PAGE, creator=linmem.creator("shared"))


def limiting(upstream, pages=1 << 20):
    return linmem.LimitingCreator(upstream, pages * PAGE)


def attaching(mem):
    return linmem.creator("shared", attach=mem.handle())


def pages_used(*budgets):
    return [budget.used_bytes / PAGE for budget in budgets]


def test_two_attachments_of_one_memory_count_once():
    mem = shared(2)
    budget = limiting(attaching(mem))
    first, second = budget.create(0), budget.create(0)
    assert pages_used(budget) == [2]
    second.grow_to(5 * PAGE)
    assert pages_used(budget) == [5]
    assert len(first) == 5 * PAGE
    assert pages_used(budget) == [5]
    second.close()
    assert pages_used(budget) == [5]
    first.close()
    assert pages_used(budget) == [0]
    assert budget.peak_bytes == 5 * PAGE


def test_the_maker_and_an_attachment_of_it_count_once_in_a_budget_over_both():
    handles = []
    routes = linmem.creator("routing", rule=lambda *_: handles[-1] if handles else linmem.creator("shared"))
    budget = limiting(routes)
    mem = budget.create(3 * PAGE, MOST * PAGE)
    handles.append(attaching(mem))
    other = budget.create(0)
    assert pages_used(budget) == [3]
    mem.close()
    assert pages_used(budget) == [3]
    other.close()
    assert pages_used(budget) == [0]


def test_different_memories_count_each():
    budget = limiting(linmem.creator("shared"))
    with budget.create(2 * PAGE), budget.create(3 * PAGE):
        assert pages_used(budget) == [5]
    assert pages_used(budget) == [0]


def test_a_full_budget_has_room_for_another_attachment_of_the_same_memory_and_for_no_other_memory():
    mem, larger = shared(4), shared(5)
    budget = limiting(attaching(mem), 4)
    first = budget.create(0)
    second = budget.create(4 * PAGE)
    assert pages_used(budget) == [4]
    with pytest.raises(linmem.LimitError):
        second.grow_to(5 * PAGE)
    assert (len(first), len(second), len(mem)) == (4 * PAGE,) * 3
    with pytest.raises(linmem.LimitError):
        limiting(attaching(larger), 4).create(0)


def test_a_growth_that_the_os_refuses_gives_back_what_only_that_growth_was_charged_with():
    mem = shared(2)
    budget = limiting(attaching(mem))
    first, second = budget.create(0), budget.create(0)
    first.grow_to(4 * PAGE)
    assert len(second) == 4 * PAGE
    with failing(1, errno.ENOMEM, 9) as fault, pytest.raises(linmem.PageError):
        second.grow_to(6 * PAGE)
    assert fault.happened
    assert (pages_used(budget), budget.peak_bytes) == ([4], 6 * PAGE)
    first.close()
    assert pages_used(budget) == [4]


def grow(connection, handle):
    with linmem.attach(handle) as mem:
        mem.grow_to(9 * PAGE)
        connection.send("grown")
        connection.recv()


def test_a_growth_by_another_process_is_charged_once():
    mem = shared()
    budget = limiting(attaching(mem))
    first, second = budget.create(0), budget.create(0)
    with new_process(grow, mem.handle()) as there:
        assert there.recv() == "grown"
        assert pages_used(budget) == [1]
        assert len(first) == 9 * PAGE
        assert pages_used(budget) == [9]
        assert len(second) == 9 * PAGE
        assert pages_used(budget) == [9]
        there.send("end")


FORKED = FORKING + f"""
import linmem
PAGE = {PAGE}
made = linmem.create(3 * PAGE, {MOST} * PAGE, creator=linmem.creator("shared"))
inner = linmem.LimitingCreator(linmem.creator("shared", attach=made.handle()), 1 << 30)
outer = linmem.LimitingCreator(inner, 1 << 30)

def check(*pages):
    assert (inner.used_bytes, outer.used_bytes) == tuple(n * PAGE for n in pages), (inner, outer)
"""


@requires("fork")
def test_a_forked_child_counts_as_its_parent_did():
    answer(FORKED + """
first, second, third = inner.create(0), outer.create(0), outer.create(0)

def work():
    check(3, 3)
    second.grow_to(4 * PAGE)
    check(4, 4)
    second.close()
    check(3, 3)
    third.close()
    check(3, 0)
    first.close()
    check(0, 0)

child(os.fork, work)
check(3, 3)
""")


@requires("fork")
def test_forks_at_any_moment_leave_exact_budgets():
    answer(FORKED + """
kept = outer.create(0)
stop = threading.Event()

def churn():
    while not stop.is_set():
        outer.create(0).close()

def work():
    check(3, 3)
    with outer.create(0):
        check(3, 3)
        kept.close()
        check(3, 3)
    # A thread that is not in the child may have had a memory, which stays, and may have been about to tell the outer.
    assert (inner.used_bytes // PAGE, outer.used_bytes // PAGE) in [(0, 0), (3, 0), (3, 3)], (inner, outer)

threads = [threading.Thread(target=churn) for _ in range(2)]
for thread in threads:
    thread.start()
try:
    for _ in range(20):
        child(os.fork, work)
finally:
    stop.set()
    for thread in threads:
        thread.join()
check(3, 3)
""")


def test_threads_that_attach_grow_and_drop_leave_exact_budgets():
    made = [shared(), shared()]
    inner = [limiting(attaching(mem)) for mem in made]
    outer = [limiting(each, MOST) for each in inner]
    failures = []

    def churn(seed):
        try:
            for n in range(60):
                which = (seed + n) % 2
                with outer[which].create(0) as mem, inner[which].create(0) as other:
                    mem.grow_to(max(len(mem), (1 + n % MOST) * PAGE))
                    assert len(other) >= (1 + n % MOST) * PAGE
        except ValueError as error:
            if "must be >=" not in str(error):     # another thread has grown the memory meanwhile
                failures.append(error)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert pages_used(*inner, *outer) == [0, 0, 0, 0]
    assert all(budget.peak_bytes <= MOST * PAGE for budget in inner + outer)


class Attached:
    """A memory of the process. seen: its pages, as this memory knows; budgets: those that it is charged to."""

    def __init__(self, mem, source, seen, budgets):
        self.mem, self.source, self.seen, self.budgets = mem, source, seen, budgets


class Budgets(RuleBasedStateMachine):
    """Two shared memories; for each a budget over its attachments, and one more above that one."""

    @initialize(first=st.integers(1, MOST), second=st.integers(1, MOST), room=st.integers(1, MOST))
    def create(self, first, second, room):
        self.made = [shared(first), shared(second)]
        self.pages = [first, second]
        routes = linmem.creator("routing", rule=lambda *_: attaching(self.made[self.source]))
        self.inner = limiting(routes, 2 * MOST - room)
        self.outer = limiting(self.inner, MOST + room)
        self.limits = {self.inner: 2 * MOST - room, self.outer: MOST + room}
        self.attached = []

    def charges(self, budget, changed=None, seen=0):
        """What the budget is charged with; if `changed` has `seen` pages."""
        return sum(max((seen if each is changed else each.seen for each in self.attached
                        if each.source == source and budget in each.budgets), default=0) for source in (0, 1))

    def fits(self, changed, seen):
        return all(self.charges(budget, changed, seen) <= self.limits[budget] for budget in changed.budgets)

    def take_over(self, each):
        """Whether a call can take over the size that other memories gave the shared one."""
        if not self.fits(each, self.pages[each.source]):
            return False
        each.seen = self.pages[each.source]
        return True

    @rule(source=st.integers(0, 1), outer=st.booleans())
    def attach(self, source, outer):
        self.source = source
        new = Attached(None, source, self.pages[source], [self.outer, self.inner] if outer else [self.inner])
        self.attached.append(new)
        if self.fits(new, new.seen):
            new.mem = new.budgets[0].create(0)
            assert new.mem.info().byte_size == new.seen * PAGE
        else:
            self.attached.remove(new)
            with pytest.raises(linmem.LimitError):
                new.budgets[0].create(0)

    @precondition(lambda self: self.attached)
    @rule(data=st.data(), pages=st.integers(1, MOST))
    def grow(self, data, pages):
        each = data.draw(st.sampled_from(self.attached))
        if not self.take_over(each):
            with pytest.raises(linmem.LimitError):
                each.mem.grow_to(pages * PAGE)
        elif pages < each.seen:
            with pytest.raises(ValueError, match="must be >="):
                each.mem.grow_to(pages * PAGE)
        elif not self.fits(each, pages):
            with pytest.raises(linmem.LimitError):
                each.mem.grow_to(pages * PAGE)
        else:
            each.mem.grow_to(pages * PAGE)
            each.seen = self.pages[each.source] = pages

    @rule(source=st.integers(0, 1), pages=st.integers(1, MOST))
    def grow_the_maker(self, source, pages):
        """It is in no budget."""
        if pages >= self.pages[source]:
            self.made[source].grow_to(pages * PAGE)
            self.pages[source] = pages

    @precondition(lambda self: self.attached)
    @rule(data=st.data())
    def look(self, data):
        each = data.draw(st.sampled_from(self.attached))
        if self.take_over(each):
            assert len(each.mem) == each.seen * PAGE
        else:
            with pytest.raises(linmem.LimitError):
                len(each.mem)

    @precondition(lambda self: self.attached)
    @rule(data=st.data())
    def drop(self, data):
        each = data.draw(st.sampled_from(self.attached))
        self.attached.remove(each)
        each.mem.close()

    @invariant()
    def the_budgets_are_exact(self):
        if hasattr(self, "attached"):
            assert pages_used(self.inner, self.outer) == [self.charges(self.inner), self.charges(self.outer)]

    def teardown(self):
        for each in self.attached:
            each.mem.close()
        assert pages_used(self.inner, self.outer) == [0, 0]


TestBudgets = Budgets.TestCase
