"""Refusals by the operating system, in children with real limits.

`failing` refuses a page call before the system call. Here the OS itself refuses the system call. So the error code, the
partial work before the refusal, and the text about the limit are real.
"""

import pytest
from support import answer, image_kinds, requires

TOOLS = """
import ctypes, os, re, resource, subprocess, sys
import linmem
from linmem._os import pages
from support import FLOOR, LIBC, PAGE, REAL_PAGE, accessible_parts, check_fresh, live_bytes, smaps, whole

ENOMEM, EINVAL = 12, 22
SHAPE = {"maximum": 32 * PAGE, "reserve": 32 * PAGE, "guard": PAGE}
LIBC.mmap.restype = ctypes.c_void_p
address, size_t = ctypes.c_void_p, ctypes.c_size_t

def data_in_use():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmData:\\s+(\\d+) kB", status.read())[1]) << 10

def state(mem):
    return mem.info(), accessible_parts(mem), mem.read(0, 4)    # this page is already resident

def refused(call, name, code, words):
    try:
        call()
    except linmem.PageError as error:
        assert (error.call, error.errno) == (name, code), error
        assert words in str(error), error
        assert f"failed with code {code}: " in str(error), error
        return error
    raise AssertionError(f"{name} was not refused")

class no_mappings_left:
    # Splits one large mapping until the kernel refuses a further mapping.
    def __enter__(self):
        self.size = (FLOOR["mappings"] + 2) * REAL_PAGE
        self.at = LIBC.mmap(None, size_t(self.size), 1, 0x4022, -1, ctypes.c_long(0))
        place = self.at + REAL_PAGE
        while LIBC.mprotect(address(place), size_t(REAL_PAGE), 0) == 0:
            place += 2 * REAL_PAGE
            assert place < self.at + self.size, "there is no limit"
        assert ctypes.get_errno() == ENOMEM
        return self

    def __exit__(self, *exc):
        assert LIBC.munmap(address(self.at), size_t(self.size)) == 0
"""


def child(code, **how):
    return answer(TOOLS + code, timeout=300, **how)


# -- mappings ------------------------------------------------------------------------------------------------

@requires("few_mappings")
def test_without_mappings_left_each_page_call_is_refused_by_name_and_changes_nothing():
    assert child("""
empty = linmem.create(0, **SHAPE)
mem = linmem.create(9 * PAGE, **SHAPE)
mem.write(0, b"kept" * PAGE)
image = linmem.Image.from_bytes(b"image" * PAGE)
before = bytes(mem), accessible_parts(mem), accessible_parts(empty), live_bytes()
words = f"vm.max_map_count is {FLOOR['mappings']} and "
with no_mappings_left():
    refused(lambda: mem.protect(4 * PAGE, PAGE, "r"), "protect", ENOMEM, words)
    refused(lambda: mem.protect(4 * PAGE, PAGE, "none"), "protect", ENOMEM, words)
    refused(lambda: empty.grow_to(5 * PAGE), "commit", ENOMEM, words)
    refused(lambda: linmem.create(5 * PAGE, **SHAPE), "commit", ENOMEM, words)
    mem.grow_to(12 * PAGE)      # moves a border, which needs no further mapping
    assert empty.byte_size() == 0
assert (bytes(mem)[:9 * PAGE], accessible_parts(empty)) == (before[0], before[2])
assert accessible_parts(mem) == [(0, 12 * PAGE, "rw-p")]
linmem.create(PAGE).close()     # also releases the ranges whose release was refused
assert live_bytes() == before[3] - 3 * PAGE
empty.grow_to(5 * PAGE)
mem.protect(4 * PAGE, PAGE, "r")
mem.protect(4 * PAGE, PAGE, "rw")
print("refused")
""") == "refused"


@requires("few_mappings", "maps_images")
def test_without_mappings_left_a_memory_copies_its_image_and_can_be_restored_to_another():
    assert child("""
first = linmem.Image.from_bytes(b"1" * 3 * PAGE, PAGE)
second = linmem.Image.from_bytes(b"second" * PAGE, 4 * PAGE)
plain = linmem.create(12 * PAGE, **SHAPE)
of_first = first.new_memory(minimum=12 * PAGE, **SHAPE)
with no_mappings_left():
    plain.restore(second, zero_grown=True)
    of_first.restore(second, zero_grown=True)
    of_first.restore(second, zero_grown=True)
wanted = bytes(4 * PAGE) + b"second" * PAGE + bytes(2 * PAGE)
assert bytes(plain) == bytes(of_first) == wanted
assert plain.dirty_pages(second) == of_first.dirty_pages(second) == []
for mem in (plain, of_first):
    mem.restore(first, zero_grown=True)
    assert bytes(mem) == bytes(PAGE) + b"1" * 3 * PAGE + bytes(8 * PAGE)
    assert accessible_parts(mem) == [(0, 12 * PAGE, "rw-p")]
print("copied")
""") == "copied"


@requires("few_mappings")
@pytest.mark.parametrize("reset", ["adaptive", "zero", "discard"])
def test_a_slot_returned_without_mappings_left_passes_on_no_byte_and_no_protection(reset):
    assert child(f"""
pool = linmem.PoolingCreator(reset="{reset}", check=True)
mem = pool.create(3 * PAGE, **SHAPE)
mem.grow_to(12 * PAGE)
mem.write(0, b"s" * 12 * PAGE)
with no_mappings_left():
    mem.close()
again = pool.create(3 * PAGE, **SHAPE)
check_fresh(again, 3 * PAGE)
again.grow_to(12 * PAGE)
assert bytes(again) == bytes(12 * PAGE)
again.close()
pool.trim()
print(pool.stats()["live"])
""") == "0"


# -- memory --------------------------------------------------------------------------------------------------

@requires("overcommit_is_guessed", "moves", "real_pages")
def test_a_growth_to_more_than_the_machine_has_is_refused_though_the_address_space_holds_it():
    assert child("""
mem = linmem.create(3 * PAGE, maximum=1 << 43, reserve=1 << 43)
moves = linmem.create(3 * PAGE, maximum=1 << 43, reserve=0, may_move=True)
for one in (mem, moves):
    one.write(0, b"kept")
    before = state(one)
    if one is mem:
        refused(lambda: one.grow_to(1 << 42), "commit", ENOMEM, "vm.overcommit_memory is 0")
        refused(lambda: linmem.create(1 << 42), "commit", ENOMEM, "vm.overcommit_memory is 0")
    else:
        try:
            one.grow_to(1 << 42)
        except (linmem.PageError, linmem.GrowError):
            pass
        else:
            raise AssertionError("grown beyond the machine")
    assert state(one) == before
    one.grow_to(12 * PAGE)
print("refused")
""") == "refused"


@requires("rlimits", "maps")
def test_a_limit_on_data_that_would_hold_the_growth_alone_is_named_when_the_sum_is_beyond_it():
    assert child("""
other = linmem.create(256 << 20, reserve=256 << 20)
mem = linmem.create(3 * PAGE, maximum=1 << 30, reserve=1 << 30)
mem.write(0, b"kept")
limit = data_in_use() + (64 << 20)
assert limit > 200 << 20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
before = state(mem)
refused(lambda: mem.grow_to(128 << 20), "commit", ENOMEM, f"RLIMIT_DATA (ulimit -d) is {limit} bytes")
assert state(mem) == before
other.close()
mem.grow_to(128 << 20)          # now the growth fits
print("named")
""") == "named"


@requires("rlimits", "maps", "moves")
def test_a_move_that_the_limit_on_data_refuses_leaves_the_memory_where_it_was():
    assert child("""
mem = linmem.create(64 << 20, maximum=1 << 30, reserve=0, may_move=True)
mem.write(0, b"kept")
limit = data_in_use() + (32 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
before = state(mem), live_bytes()
try:
    mem.grow_to(128 << 20)
except linmem.PageError as error:
    assert error.errno == ENOMEM and "RLIMIT_DATA" in str(error), error
else:
    raise AssertionError("moved beyond the limit")
linmem.create(0, reserve=PAGE).close()
assert (state(mem), live_bytes()) == before
mem.grow_to(80 << 20)
assert mem.read(0, 4) == b"kept"
print("stayed")
""") == "stayed"


@requires("maps", "memory_locks", "discard_any_protection")
def test_locked_pages_cannot_be_discarded_but_a_pool_zeroes_them():
    assert child("""
mem = linmem.create(4 * PAGE, **SHAPE)
mem.write(0, b"s" * 4 * PAGE)
assert LIBC.mlock(address(mem.as_ptr() + PAGE), size_t(PAGE)) == 0
error = refused(lambda: mem.discard(PAGE, PAGE), "discard", EINVAL, "EINVAL")
assert bytes(mem) == b"s" * 4 * PAGE and accessible_parts(mem) == [(0, 4 * PAGE, "rw-p")]
for reset in ("adaptive", "zero", "discard"):
    pool = linmem.PoolingCreator(reset=reset, check=True)
    mem = pool.create(4 * PAGE, **SHAPE)
    mem.write(0, b"s" * 4 * PAGE)
    assert LIBC.mlock(address(mem.as_ptr()), size_t(PAGE)) == 0
    mem.close()
    with pool.create(4 * PAGE, **SHAPE) as mem:
        check_fresh(mem, 4 * PAGE)
print("cleared")
""") == "cleared"


@requires("smaps", "overcommit_is_not_strict")
def test_no_page_of_a_memory_is_charged_before_it_is_written():
    assert child("""
def check(mem, what):
    for one in smaps(*whole(mem)):
        assert "nr" in one.flags, (what, one)

mem = linmem.create(3 * PAGE, **SHAPE)
check(mem, "made")
mem.grow_to(9 * PAGE)
check(mem, "grown")
mem.protect(0, 9 * PAGE, "none")
mem.protect(0, 9 * PAGE, "rw")
mem.discard(0, 2 * PAGE)
check(mem, "discarded")
mem = linmem.create(3 * PAGE, maximum=64 * PAGE, reserve=0, may_move=True)
mem.grow_to(64 * PAGE)
check(mem, "moved")
image = linmem.Image.from_bytes(b"image" * PAGE, 3 * PAGE)
mem = image.new_memory(minimum=12 * PAGE, **SHAPE)
check(mem, "of an image")
mem.write(4 * PAGE, b"x")
mem.discard()
check(mem, "blank")
mem.restore(image, zero_grown=True)
check(mem, "restored")
pool = linmem.PoolingCreator(max_unused_warm=0, keep_resident=0)
for n in range(3):
    mem = pool.create(3 * PAGE, **SHAPE)
    mem.grow_to(9 * PAGE)
    mem.write(0, b"x" * 9 * PAGE)
    check(mem, "of a pool")
    mem.close()
print("charged as used")
""") == "charged as used"


# -- descriptors ---------------------------------------------------------------------------------------------

@requires("descriptors")
@pytest.mark.parametrize("kind", image_kinds())
def test_no_descriptor_reaches_a_program_that_is_started_with_all_of_them(kind, tmp_path):
    assert child(f"""
before = set(os.listdir("/proc/self/fd"))
pages.choose_image("{kind}")
images = [linmem.Image.from_bytes(b"image" * PAGE) for _ in range(3)]
images[0].save("saved")
images += [linmem.Image.open("saved"), linmem.Image.open("saved", map=False)]
with open("saved", "rb") as file:
    images.append(linmem.Image.from_fd(file.fileno(), PAGE, position=PAGE))
pool = linmem.PoolingCreator()
mems = [image.new_memory(creator=pool) for image in images]
mems[0].write(0, b"x")
assert mems[0].dirty_pages(images[0]) == [(0, PAGE)]
images.append(mems[0].snapshot())
mems[1].close()
kept = {{os.readlink("/proc/self/fd/" + n) for n in set(os.listdir("/proc/self/fd")) - before
        if os.path.islink("/proc/self/fd/" + n)}}
lister = "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd')))"
inherited = subprocess.run([sys.executable, "-I", "-S", "-c", lister], close_fds=False, capture_output=True, text=True)
clean = subprocess.run([sys.executable, "-I", "-S", "-c", lister], close_fds=True, capture_output=True, text=True)
assert inherited.stdout == clean.stdout, (inherited.stdout, clean.stdout, kept)
if "{kind}" != "private":
    assert any("memfd" in name or "deleted" in name for name in kept), kept
print("none")
""", cwd=tmp_path) == "none"
