"""creator.refusals: what each creator has refused."""

import errno
import gc
import os
import threading
import time

import pytest
from support import PAGE, failing, requires

import linmem

MMAP = linmem.MmapCreator()


def limited(upstream=MMAP, pages=2, **options):
    return linmem.LimitingCreator(upstream, pages * PAGE, **options)


def refuse(creator, size, error=linmem.GrowError):
    with pytest.raises(error):
        creator.create(size)


def test_a_new_creator_has_refused_nothing():
    for creator in (linmem.MmapCreator(), limited(), linmem.PoolingCreator(), linmem.StatisticsCreator(MMAP),
                    linmem.TrackingCreator(MMAP), linmem.CallbackCreator(MMAP), linmem.RoutingCreator([({}, MMAP)]),
                    linmem.PythonCreator(linmem.MmapCreator())):
        creator.create(PAGE, 2 * PAGE).grow_to(2 * PAGE)
        assert creator.refusals == linmem.Refusals(0, ())
        with pytest.raises(AttributeError):
            creator.refusals = None


def test_a_refused_memory_is_noted_with_time_size_limit_and_creator():
    creator = limited(name="tenant 7")
    before = time.time()
    refuse(creator, 3 * PAGE)
    after = time.time()
    found = creator.refusals
    (refusal,) = found.last
    assert found.count == 1
    assert before - 0.1 <= refusal.time <= after + 0.1
    assert refusal == linmem.Refusal(time=refusal.time, requested=3 * PAGE, limit=2 * PAGE, error="LimitError",
                                     creator="tenant 7", memory=None, base=None)
    assert creator.refusals == found


def test_a_refused_growth_is_noted_with_the_memory():
    creator = limited()
    mem = linmem.StatisticsCreator(creator, name="frames").create(PAGE, 9 * PAGE)
    with pytest.raises(linmem.LimitError):
        mem.grow_to(3 * PAGE)
    (refusal,) = creator.refusals.last
    assert (refusal.requested, refusal.limit, refusal.error) == (3 * PAGE, 2 * PAGE, "LimitError")
    assert (refusal.creator, refusal.memory, refusal.base) == (None, "frames", mem.as_ptr())


def test_only_the_creator_that_refused_counts():
    mmap = linmem.MmapCreator()
    inner = limited(mmap)
    python = linmem.PythonCreator(inner)
    middle = linmem.StatisticsCreator(linmem.TrackingCreator(linmem.RoutingCreator([({}, inner)])))
    outer = limited(linmem.CallbackCreator(middle, on_grow=lambda *told: None), pages=8)
    with outer.create(PAGE, 9 * PAGE) as mem:
        refuse(outer, 3 * PAGE)
        with pytest.raises(linmem.LimitError):
            mem.grow_to(3 * PAGE)
        assert inner.refusals.count == 2
        with pytest.raises(linmem.LimitError):
            mem.grow_to(9 * PAGE)
    assert outer.refusals.count == 1
    for creator in (mmap, python, middle, middle.upstream, middle.upstream.upstream, outer.upstream):
        assert creator.refusals.count == 0
    assert middle.statistics()["failures"] == 2


def test_the_os_refuses_at_the_creator_of_mappings():
    mmap = linmem.MmapCreator(name="mappings")
    creator = limited(mmap, pages=100)
    mem = creator.create(PAGE, 4 * PAGE)
    with failing(2, errno.ENOMEM):
        refuse(creator, PAGE, linmem.PageError)
    with failing(1, errno.ENOMEM), pytest.raises(linmem.PageError):
        mem.grow_to(2 * PAGE)
    with pytest.raises(linmem.GrowError):
        mem.grow_to(5 * PAGE)           # above its maximum
    with pytest.raises(ValueError, match="never shrinks"):
        mem.grow_to(0)                  # a mistake of the caller, and no refusal
    assert [(each.error, each.requested, each.limit, each.base) for each in mmap.refusals.last] == [
        ("PageError", PAGE, None, None), ("PageError", 2 * PAGE, None, mem.as_ptr()),
        ("GrowError", 5 * PAGE, 4 * PAGE, mem.as_ptr())]
    assert {each.creator for each in mmap.refusals.last} == {"mappings"}
    assert (mmap.refusals.count, creator.refusals.count) == (3, 0)


def test_a_full_pool_notes_which_bound_it_has_reached():
    pool = linmem.PoolingCreator(slots=1, when_full="error")
    with pool.create(PAGE):
        refuse(pool, PAGE)
    small = linmem.PoolingCreator(max_reserved=PAGE, when_full="error")
    refuse(small, 4 * PAGE)
    assert [(each.error, each.limit) for each in pool.refusals.last + small.refusals.last] == [
        ("PoolError", 1), ("PoolError", PAGE)]


def test_a_pool_that_falls_back_refuses_nothing():
    pool = linmem.PoolingCreator(slots=1)
    with pool.create(PAGE), pool.create(PAGE):
        pass
    assert pool.refusals.count == 0


def test_a_budget_under_a_pool_counts_a_slot_that_it_refuses_to_warm_up():
    budget = limited(pages=2)
    pool = linmem.PoolingCreator(budget, when_full="error")
    pool.create(PAGE).close()
    pool.purge()
    with budget.create(2 * PAGE):
        refuse(pool, PAGE)
    assert (pool.refusals.count, budget.refusals.count) == (0, 1)
    assert budget.refusals.last[0].requested == PAGE


class Raises:
    """A creator in Python whose memories and requests fail."""

    class Refused(Exception):
        pass

    def new_memory(self, *asked):
        raise self.Refused


def test_a_creator_in_python_and_a_table_note_what_they_raise():
    python = linmem.PythonCreator(Raises(), name="python")
    refuse(python, PAGE, Raises.Refused)
    table = linmem.RoutingCreator([({"max_size": PAGE}, python)])
    refuse(table, 2 * PAGE, ValueError)
    refuse(table, PAGE, Raises.Refused)
    assert [(each.error, each.limit, each.creator) for each in python.refusals.last] == [
        ("Refused", None, "python"), ("Refused", None, "python")]
    assert [(each.error, each.requested) for each in table.refusals.last] == [("ValueError", 2 * PAGE)]


def test_a_native_memory_of_a_creator_in_python_counts_at_its_native_creator():
    class Python:
        def new_memory(self, *asked):
            return inner.new_memory(*asked)

    inner = limited()
    python = linmem.PythonCreator(Python())
    mem = python.create(PAGE, 9 * PAGE)
    with pytest.raises(linmem.LimitError):
        mem.grow_to(3 * PAGE)
    assert (inner.refusals.count, python.refusals.count) == (1, 0)
    refuse(python, 3 * PAGE)            # both have refused a request of their own
    assert (inner.refusals.count, python.refusals.count) == (2, 1)


def test_functions_that_raise_count_at_their_creator():
    def no(*told):
        raise KeyError("no")

    creator = linmem.CallbackCreator(MMAP, on_made=no)
    refuse(creator, PAGE, KeyError)
    grower = linmem.CallbackCreator(MMAP, on_grow=no, limit_each=3 * PAGE, limit_growths=0)
    mem = grower.create(PAGE, 9 * PAGE)
    with pytest.raises(linmem.LimitError):
        mem.grow_to(4 * PAGE)
    with pytest.raises(linmem.GrowError):
        mem.grow_to(2 * PAGE)
    assert [each.error for each in creator.refusals.last] == ["KeyError"]
    assert [(each.error, each.limit) for each in grower.refusals.last] == [("LimitError", 3 * PAGE), ("GrowError", 0)]


def test_each_attempt_counts_and_on_refused_counts_only_if_it_raises():
    budget = limited()
    answers = [False, True, KeyError("no")] * 2

    def on_refused(mem, requested, error):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    creator = linmem.CallbackCreator(budget, on_refused=on_refused)
    counts = []
    for error in (linmem.LimitError, linmem.LimitError, KeyError):
        refuse(creator, 3 * PAGE, error)
        counts.append((budget.refusals.count, creator.refusals.count))
    mem = creator.create(PAGE, 9 * PAGE)
    for error in (linmem.LimitError, linmem.LimitError, KeyError):
        with pytest.raises(error):
            mem.grow_to(3 * PAGE)
        counts.append((budget.refusals.count, creator.refusals.count))
    assert counts == [(1, 0), (3, 0), (4, 1), (5, 1), (7, 1), (8, 2)]


def test_a_python_exception_that_on_refused_lets_pass_counts_once():
    python = linmem.PythonCreator(Raises())
    creator = linmem.CallbackCreator(python, on_refused=lambda *told: False)
    refuse(creator, PAGE, Raises.Refused)
    assert (python.refusals.count, creator.refusals.count) == (1, 0)


def test_ctrl_c_is_not_a_refusal():
    def interrupt(*told):
        raise KeyboardInterrupt

    creator = linmem.CallbackCreator(MMAP, on_made=interrupt)
    with pytest.raises(KeyboardInterrupt):
        creator.create(PAGE)
    assert creator.refusals.count == 0


def test_the_last_sixteen_are_kept_in_order():
    creator = limited()
    for size in range(3, 40):
        refuse(creator, size * PAGE)
    found = creator.refusals
    assert found.count == 37
    assert [each.requested for each in found.last] == [size * PAGE for size in range(24, 40)]
    times = [each.time for each in found.last]
    assert times == sorted(times)


def test_a_refusal_keeps_no_memory_alive():
    creator = limited(pages=4, name="budget")
    mem = creator.create(PAGE, 9 * PAGE)
    with pytest.raises(linmem.LimitError):
        mem.grow_to(5 * PAGE)
    base = mem.as_ptr()
    mem.close()
    assert creator.used_bytes == 0
    assert (creator.refusals.last[0].memory, creator.refusals.last[0].base) == ("budget", base)


def test_memories_outlive_their_creators():
    names = [f"creator {number}" for number in range(4)]
    mem = linmem.CallbackCreator(limited(linmem.MmapCreator(name=names[0]), name=names[1]), limit_each=9 * PAGE,
                                 name=names[2]).create(PAGE, 99 * PAGE)
    gc.collect()
    for size, name in ((3, names[1]), (10, names[2]), (100, names[0])):
        with pytest.raises(linmem.GrowError, match=name):
            mem.grow_to(size * PAGE)
    mem.close()


def test_threads_lose_no_refusal():
    creator = limited(pages=1)
    mems = [creator.create(0, 9 * PAGE) for _ in range(4)]

    def grow(mem):
        for _ in range(500):
            try:
                mem.grow_to(2 * PAGE)
            except linmem.LimitError:
                assert len(creator.refusals.last) <= 16

    threads = [threading.Thread(target=grow, args=(mem,)) for mem in mems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = creator.refusals
    assert (found.count, len(found.last)) == (2000, 16)
    assert {each.base for each in found.last} <= {mem.as_ptr() for mem in mems}


def test_the_growths_of_guests_count_at_the_budget_of_their_tenant():
    wasmtime = pytest.importorskip("wasmtime")
    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.creator("pool"))
    store = wasmtime.Store(wasmtime.Engine(config))
    module = wasmtime.Module(store.engine, """(module (memory (export "memory") 1 4)
        (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))""")
    tenant = linmem.LimitingCreator(linmem.creator("pool"), 2 << 16, name="tenant 7")
    with linmem.wasmtime.use(tenant):
        exports = wasmtime.Instance(store, module, []).exports(store)
    assert [exports["grow"](store, pages) for pages in (1, 1, 9)] == [1, -1, -1]
    (refusal,) = tenant.refusals.last       # a growth past the maximum of the type never reaches a creator
    mem = linmem.wasmtime.linear_memory(store, exports["memory"])
    assert (refusal.requested, refusal.limit) == (3 << 16, 2 << 16)
    assert (refusal.creator, refusal.memory, refusal.base) == ("tenant 7", "tenant 7", mem.as_ptr())


@requires("fork")
def test_a_forked_child_goes_on_counting():
    creator = limited()
    refuse(creator, 3 * PAGE)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            refuse(creator, 4 * PAGE)
            status = 0 if [each.requested for each in creator.refusals.last] == [3 * PAGE, 4 * PAGE] else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert creator.refusals.count == 1


def test_a_pool_counts_its_refusals_in_the_metrics():
    pool = linmem.PoolingCreator(slots=1, when_full="error")
    with pool.create(PAGE):
        refuse(pool, PAGE)
    assert linmem.metrics.read(pool)["refusals"] == 1
