"""Address space is shared with others: linmem counts its reservations exactly, and the sizes that linmem chooses leave
room."""

import random

import pytest
from support import PAGE, answer, live_bytes, requires, round_up

import linmem
from linmem._core.memory import _chosen
from linmem._os import pages

# For children. others_find_room() checks that allocations outside linmem still succeed.
OTHERS = """
import mmap, threading
import linmem
from linmem._core.memory import _chosen
from linmem._os import pages

SPACE = pages.describe()["address_space"]

def others_find_room():
    mmap.mmap(-1, 8 << 30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=mmap.PROT_READ).close()
    try:
        import numpy
    except ImportError:
        numpy = None
    if numpy is not None:
        numpy.empty(4 << 30, "u1")
    end = threading.Event()
    threads = [threading.Thread(target=end.wait) for _ in range(100)]
    for thread in threads:
        thread.start()
    end.set()
    for thread in threads:
        thread.join()
    assert pages.describe()["reserved"] <= SPACE // 2, pages.describe()

def nothing_is_held(but=0):
    assert pages.describe()["reserved"] == but, pages.describe()
    with linmem.create(1 << 20, maximum=1 << 40) as mem:
        assert mem.byte_capacity() == 1 << 40
    others_find_room()
"""


@requires("many_mappings", "large_space")
@pytest.mark.parametrize(("n", "options"), [
    (20_000, "4096"), (20_000, "4096, maximum=1 << 32"), (20_000, "1, maximum=1 << 44"), (176, "4096, maximum=1 << 44"),
])
def test_others_find_room_beside_any_number_of_memories(n, options):
    assert answer(OTHERS + f"""
mems = [linmem.create({options}) for _ in range({n})]
assert _chosen()[1] == {n}
others_find_room()
assert sum(mem.info().reserved for mem in mems) == pages.describe()["reserved"]
for mem in (mems[0], mems[-1]):
    assert mem.byte_capacity() >= 1 << 20
    mem.grow_to(1 << 20)
    mem[-1] = 1
del mem
mems.clear()
assert _chosen() == (0, 0)
nothing_is_held()
print("room")
""") == "room"


@requires("many_mappings", "large_space")
def test_others_find_room_beside_thousands_of_clones_of_an_image():
    assert answer(OTHERS + """
image = linmem.Image.from_bytes(bytes(range(1, 256)) * 4000)
held = pages.describe()["reserved"]
mems = [image.new_memory() for _ in range(3000)]
others_find_room()
assert mems[-1][-1] == 255
mems.clear()
nothing_is_held(held)
del image
nothing_is_held()
print("room")
""") == "room"


@requires("many_mappings", "large_space")
@pytest.mark.parametrize("options", ["4096", "4096, maximum=1 << 44"])
def test_other_allocations_find_room_beside_a_pool_with_live_and_then_idle_slots(options):
    assert answer(OTHERS + f"""
pool = linmem.PoolingCreator()
mems = [linmem.create({options}, creator=pool) for _ in range(3000)]
assert pool.stats()["reserved"] == pages.describe()["reserved"] == sum(mem.info().reserved for mem in mems)
others_find_room()
mems.clear()
stats = pool.stats()
assert (stats["live"], stats["warm"] + stats["cold"]) == (0, 3000), stats
assert stats["reserved"] == pages.describe()["reserved"] > 0
others_find_room()
if "maximum" not in {options!r}:
    with linmem.create(1 << 20, maximum=1 << 40) as mem:
        assert mem.byte_capacity() == 1 << 40
pool.trim()
assert pool.stats()["reserved"] == 0
nothing_is_held()
print("room")
""") == "room"


@requires("large_space")
def test_a_memory_gets_no_more_by_choice_than_a_few_times_the_machines_memory():
    assert answer("""
        import linmem
        from linmem._os import pages
        memory = pages.describe()["memory"]
        with linmem.create(4096) as mem:
            assert memory == 0 or mem.byte_capacity() <= (1 << 20) + max(4 * memory, 1 << 20)
        with linmem.create(4096, maximum=1 << 40) as mem:
            print(mem.byte_capacity() == 1 << 40)
        """) == "True"


@requires("large_space")
def test_a_requested_size_is_not_bounded_by_half_of_the_space():
    assert answer("""
        import linmem
        from linmem._os import pages
        space = pages.describe()["address_space"]
        mems = [linmem.create(4096, reserve=space // 8) for _ in range(6)]
        assert pages.describe()["reserved"] > space // 2
        # linmem may still choose sizes up to half of the remaining space.
        with linmem.create(4096) as mem:
            print(mem.byte_capacity() > 1 << 20)
        """) == "True"


@requires("rlimits")
def test_under_a_limit_the_chosen_sizes_leave_half_of_the_space():
    assert answer("""
        import linmem
        from linmem._os import pages
        left = pages.describe()["address_space_left"]
        mems = [linmem.create(4096, maximum=maximum, guard=None) for maximum in (None, 1 << 32) * 400]
        assert mems[0].byte_capacity() > 1 << 20
        # The slack is for memories that reserve only their minimum and their guard.
        assert pages.describe()["reserved"] <= left // 2 + (150 << 20)
        print(pages.describe()["address_space_left"] >= left // 2 - (200 << 20))
        """, limits={"RLIMIT_AS": 4 << 30}) == "True"


# -- idle slots go first -------------------------------------------------------------------------------------------

@requires("rlimits")
@pytest.mark.parametrize("how", [
    "linmem.create(4096, reserve=1 << 30)", "other.create(4096, reserve=1 << 30)",
    "linmem.create(1 << 30)", "grown(linmem.create(4096, reserve=4096, may_move=True))",
    "linmem.Image.from_bytes(b'x').new_memory(reserve=1 << 30)",
])
def test_all_pools_give_idle_slots_back_before_a_memory_is_refused(how):
    assert answer(f"""
        import linmem, resource
        from linmem._os import pages

        def grown(mem):
            mem.grow_to(1 << 30)
            return mem

        upper = linmem.PoolingCreator(linmem.PoolingCreator())
        pools = [linmem.PoolingCreator() for _ in range(3)] + [upper]
        other = linmem.PoolingCreator()
        live = pools[0].create(4096, reserve=1 << 20)
        for pool in pools:
            pool.create(4096, reserve=1 << 30).close()
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
        mem = {how}
        assert mem.byte_capacity() >= 1 << 30
        # One slot was enough. The clock is too coarse to show which slot has been idle for longest.
        assert sum(pool.stats()["warm"] + pool.stats()["cold"] for pool in [*pools, upper.upstream]) == 3
        assert pools[0].stats()["live"] == 1
        live[0] = 1
        # If pools have no slot to give back, the refusal stays.
        try:
            more = [linmem.create(0, reserve=3 << 30), linmem.create(0, reserve=3 << 30)]
        except linmem.PageError as error:
            print(error.call, "RLIMIT_AS" in str(error), "linmem holds" in str(error))
        """) == "reserve True True"


@requires("rlimits", "maps")
def test_pools_also_give_slots_back_if_a_new_memory_is_refused_after_its_reservation():
    assert answer("""
        import linmem, re, resource
        pool = linmem.PoolingCreator(reset="zero", keep_resident=1 << 30)
        pool.create(300 << 20).close()
        used = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
        resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20), used + (64 << 20)))
        with linmem.create(200 << 20) as mem:
            mem[-1] = 1
        assert pool.stats()["warm"] == 0
        pool.create(4096).close()
        try:
            linmem.create(1 << 45)
        except linmem.PageError as error:
            print(error.call, pool.stats()["warm"])     # too large for any machine: pools give back no slot
        """) == "commit 1"


def test_a_size_that_no_process_has_takes_no_idle_slot_away():
    pool = linmem.PoolingCreator()
    pool.create(PAGE, reserve=PAGE).close()
    with pytest.raises(linmem.PageError):
        linmem.create(0, reserve=1 << 62)
    assert pool.stats()["warm"] == 1


@requires("rlimits")
def test_pools_that_are_freed_while_others_give_back_are_never_used_after_free():
    assert answer("""
        import linmem, resource, threading
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)
        failed = []

        def work(n):
            try:
                for turn in range(150):
                    pool = linmem.PoolingCreator(linmem.PoolingCreator() if turn % 2 else None)
                    for _ in range(3):
                        try:
                            pool.create(4096, reserve=200 << 20).close()
                        except linmem.PageError:
                            pass
                    try:
                        linmem.create(4096, reserve=900 << 20).close()
                    except linmem.PageError:
                        pass
            except BaseException as error:
                failed.append(repr(error))

        threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        from linmem._os import pages
        print(failed, pages.describe()["reserved"])
        """) == "[] 0"


# -- the count is exact --------------------------------------------------------------------------------------------

@requires("maps")
@pytest.mark.parametrize("seed", range(4))
def test_the_bytes_counted_as_reserved_match_the_os(seed):
    rng = random.Random(seed)
    pool = linmem.PoolingCreator(max_unused_warm=2)
    start, seen, chosen = pages.describe()["reserved"], live_bytes(), _chosen()
    mems = []
    for _ in range(300):
        match rng.randrange(6):
            case 0 | 1:
                mems.append(linmem.create(rng.choice((0, PAGE, 9 * PAGE)), rng.choice((None, 64 * PAGE, 1 << 36)),
                                          reserve=rng.choice((None, 0, 16 * PAGE)), may_move=True))
            case 2:
                mems.append(pool.create(2 * PAGE, reserve=rng.choice((None, 8 * PAGE)), may_move=True))
            case 3 if mems:
                mems.pop(rng.randrange(len(mems))).close()
            case 4 if mems:
                mem = rng.choice(mems)
                mem.grow_to(min(max(mem.byte_size(), mem.byte_capacity() + 1 if mem.byte_capacity() < 1 << 21 else 0),
                                mem.maximum_byte_size() or 1 << 62))
            case 5:
                pool.trim(rng.choice((0, 1 << 40)))
        accessible = sum(mem.info().committed for mem in mems) + pool.stats()["warm"] * 2 * PAGE
        assert pages.describe()["reserved"] - start == live_bytes() - seen + accessible
    for mem in mems:
        mem.close()
    pool.trim()
    assert (pages.describe()["reserved"], live_bytes(), _chosen()) == (start, seen, chosen)


def test_an_image_counts_for_its_own_bytes_and_each_memory_for_all_that_it_reserved():
    start = pages.describe()["reserved"]
    image = linmem.Image.from_bytes(b"x" * (5 * PAGE + 1))
    assert pages.describe()["reserved"] - start == round_up(5 * PAGE + 1)
    with image.new_memory(reserve=64 * PAGE) as mem:
        assert pages.describe()["reserved"] - start == round_up(5 * PAGE + 1) + mem.info().reserved
    del image
    assert pages.describe()["reserved"] == start


@pytest.mark.parametrize("call", range(1, 6))
def test_a_memory_that_could_not_be_made_or_moved_is_not_counted(call):
    assert answer(f"""
        import errno, linmem
        from linmem._core.memory import _chosen
        from linmem._os import pages
        for how in (dict(), dict(maximum=1 << 30), dict(reserve=1 << 20)):
            mem = linmem.create({PAGE}, reserve=0, may_move=True)
            for act in (lambda: mem.grow_to(1 << 20), lambda: linmem.create({PAGE}, **how).close()):
                pages.count_calls_to_failure({call}, errno.ENOMEM, 2)
                try:
                    act()
                except linmem.PageError:
                    pass
                pages.count_calls_to_failure(0, 0)
            reserved = pages.describe()["reserved"]
            assert _chosen()[1] == (mem.byte_capacity() > 1 << 20), (_chosen(), mem.info())
            mem.close()
            linmem.create({PAGE}).close()      # also releases the range whose release was refused
            linmem.create({PAGE}).close()
            linmem.create({PAGE}).close()
            assert (pages.describe()["reserved"], _chosen()) == (0, (0, 0)), pages.describe()
        print("exact")
        """) == "exact"


# -- bases that never move -----------------------------------------------------------------------------------------

MAKERS = {
    "linmem.create": lambda **how: linmem.create(PAGE, reserve=2 * PAGE, **how),
    "a creator": lambda **how: linmem.MmapCreator().create(PAGE, reserve=2 * PAGE, **how),
    "a budget": lambda **how: linmem.creator("limiting", limit_bytes=1 << 30).create(PAGE, reserve=2 * PAGE, **how),
    "a creator in Python": lambda **how: linmem.create(PAGE, reserve=2 * PAGE, creator=Passing(), **how),
    "the trait": lambda **how: linmem.MmapCreator().new_memory(linmem.MemoryType(0), PAGE, None, 2 * PAGE, 0, **how),
    "an image": lambda **how: linmem.Image.from_bytes(b"x" * PAGE).new_memory(reserve=2 * PAGE, **how),
    "a pool": lambda **how: linmem.PoolingCreator().create(PAGE, reserve=2 * PAGE, **how),
    "a used pool": lambda **how: used_pool(not how.get("may_move", False)).create(PAGE, reserve=2 * PAGE, **how),
    "a chosen reservation": lambda **how: linmem.create(PAGE, **how),
}


class Passing:
    def new_memory(self, *how):
        return linmem.MmapCreator().new_memory(*how)


def used_pool(may_move):
    """A pool whose idle slot served a request with the given `may_move`."""
    pool = linmem.PoolingCreator()
    pool.create(PAGE, reserve=2 * PAGE, may_move=may_move).close()
    return pool


@pytest.mark.parametrize("maker", MAKERS)
def test_a_memory_moves_only_if_it_was_made_with_may_move(maker):
    with MAKERS[maker]() as mem:
        before = mem.info()
        with pytest.raises(linmem.GrowError) as caught:
            mem.grow_to(before.byte_capacity + 1)
        for words in (f"byte_capacity() ({before.byte_capacity})", "reserve=", "maximum=", "may_move=True"):
            assert words in str(caught.value)
        assert mem.info() == before
    if maker == "a chosen reservation":
        return
    with MAKERS[maker](may_move=True) as mem:
        base = mem.as_ptr()
        mem.grow_to(mem.byte_capacity() + 1)
        assert mem.as_ptr() != base


def test_a_memory_made_through_a_creator_in_python_follows_the_may_move_of_the_request():
    class Wrapping:
        def new_memory(self, ty, minimum, maximum, reserved, guard):
            inner.append(linmem.MmapCreator().new_memory(ty, minimum, maximum, reserved, guard))
            return inner[-1]

    inner = []
    creator = linmem.PythonCreator(Wrapping())
    for may_move in (True, False):
        with creator.create(PAGE, reserve=PAGE, may_move=may_move) as mem:
            if may_move:
                inner[-1].grow_to(3 * PAGE)
                assert mem.byte_size() == 3 * PAGE
            else:
                with pytest.raises(linmem.GrowError):
                    inner[-1].grow_to(3 * PAGE)
        inner.pop().close()         # the class keeps the list, and only a collection frees the class
    with linmem.MmapCreator().new_memory(linmem.MemoryType(0), PAGE, None, PAGE, 0) as mem, \
            pytest.raises(linmem.GrowError):
        mem.grow_to(2 * PAGE)


@pytest.mark.parametrize("flag", [1, 0, "yes", None, [], b""])
def test_may_move_is_true_or_false(flag):
    for make in (lambda: linmem.create(1, may_move=flag), lambda: linmem.MmapCreator().create(1, may_move=flag),
                 lambda: linmem.Image.from_bytes(b"x").new_memory(may_move=flag)):
        with pytest.raises(TypeError, match="may_move must be True or False"):
            make()


def test_applying_a_delta_to_an_image_needs_no_reservation_for_what_the_delta_adds():
    small, large = linmem.Image.from_bytes(b"a"), linmem.create(1 << 20, reserve=0)
    large[-1] = 7
    large[0] = ord("a")
    made = small.apply(small.diff(large))
    assert bytes(made) == bytes(large)


def test_info_shows_the_reserved_bytes():
    described = pages.describe()
    with linmem.create(PAGE, reserve=64 * PAGE) as mem:
        assert pages.describe()["reserved"] - described["reserved"] == mem.info().reserved
