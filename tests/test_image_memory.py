"""Images and the OS: shared pages, open descriptors, and images in other processes and threads."""

import mmap
import os
import random
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import (
    PAGE,
    REAL_PAGE,
    SCAN_WAYS,
    answer,
    descriptors,
    image_kinds,
    mappings,
    requires,
    resident,
    scanning,
    smaps,
    whole,
)

import linmem
from linmem import Image
from linmem._os import pages

KINDS = image_kinds()
MIB = 1 << 20


@pytest.fixture(params=KINDS)
def kind(request):
    before = pages.choose_image(request.param)
    yield request.param
    pages.choose_image(before)


@pytest.fixture
def sealed():
    before = pages.choose_image("sealed")
    yield
    pages.choose_image(before)


def figures(mem, name):
    info = mem.info()
    return sum(m.figures[name] for m in smaps(info.base, info.base + info.committed))


def written(mem):
    """Bytes of the memory's own pages, with or without an image."""
    return figures(mem, "Anonymous")


# -- shared pages -----------------------------------------------------------------------------------------

@requires("smaps", "maps_images", "real_pages")
def test_memories_of_an_image_own_only_the_pages_that_they_write():
    img = Image.from_bytes(random.Random(1).randbytes(4 * MIB))
    first, second = img.new_memory(), img.new_memory()
    assert resident(first) == resident(second) == 0
    assert first[:] == second[:]
    assert written(first) == written(second) == 0
    assert figures(first, "Pss") < figures(first, "Rss") == 4 * MIB
    for i in range(16):
        first[i * 256 * 1024] ^= 1
    assert written(first) == 16 * REAL_PAGE
    assert written(second) == 0
    assert second[:] == bytes(img) != first[:]


@requires("smaps", "maps_images")
def test_pages_outside_the_images_bytes_are_ordinary_pages():
    img = Image.from_bytes(bytes(MIB) + b"x" * PAGE + bytes(MIB))
    mem = img.new_memory()
    info = mem.info()
    mapped = [m for m in smaps(info.base, info.base + info.committed) if "linmem" in m.name and "anon" not in m.name]
    assert [(m.start - info.base, m.size) for m in mapped] == [(MIB, PAGE)]


@requires("maps", "maps_images")
def test_an_image_of_zeros_costs_no_mapping_in_its_memories():
    img = Image.from_bytes(bytes(MIB))
    plain, mem = linmem.create(MIB), img.new_memory()
    assert len(mappings(*whole(mem))) == len(mappings(*whole(plain)))


@requires("smaps", "maps_images", "scans", "real_pages")
def test_restored_pages_stay_the_memorys_own_while_they_are_written_again():
    img = Image.from_bytes(b"x" * 4 * MIB)
    mem = img.new_memory()
    for _ in range(10):
        for i in range(100):
            mem[i * REAL_PAGE] = 1
        mem.restore(img)
        assert written(mem) == 100 * REAL_PAGE


@requires("smaps", "maps_images", "real_pages", "scans")
def test_pages_written_at_random_are_given_back_before_a_restore_costs_more_than_their_faults():
    chance = random.Random(2)
    img = Image.from_bytes(b"x" * 16 * MIB, MIB)
    mem = img.new_memory(minimum=32 * MIB)
    for _ in range(60):
        for _ in range(100):
            mem[chance.randrange(len(mem))] = 1
        mem.restore(img)
        assert written(mem) <= 5 * 100 * REAL_PAGE
    assert mem.dirty_pages(img) == []


@requires("smaps", "real_pages")
def test_a_snapshot_touches_no_page_that_was_not_touched(kind):
    mem = linmem.create(64 * MIB)
    for i in range(16):
        mem[i * 4 * MIB] = 1
    before = resident(mem)
    img = mem.snapshot()
    assert resident(mem) == before
    assert img.info().stored == 16 * 4096
    assert mem.dirty_pages(img) == []


@requires("descriptors", "maps_images", "real_pages")
def test_zeros_take_no_space_in_the_images_own_pages():
    data = bytearray(64 * MIB)
    data[::4 * MIB] = b"x" * 16
    img = Image.from_bytes(data)
    about = os.fstat(img.fileno())
    assert about.st_size == 64 * MIB
    assert about.st_blocks * 512 <= 16 * REAL_PAGE
    assert img.digest
    mem = img.new_memory()
    mem[4 * MIB] = 2
    mem.restore(img)
    assert img.diff(mem).nbytes == 0
    assert os.fstat(img.fileno()).st_blocks * 512 <= 16 * REAL_PAGE


@pytest.mark.parametrize("way", [*sorted(SCAN_WAYS), None])
def test_restore_and_dirty_pages_are_right_with_each_way_to_find_touched_pages(way, kind):
    with scanning(way):
        chance = random.Random(9)
        img = Image.from_bytes(b"x" * 40 * PAGE, 7 * PAGE)
        mem = img.new_memory(minimum=80 * PAGE)
        for _ in range(20):
            touched = sorted({chance.randrange(80) for _ in range(chance.randrange(60))})
            for page in touched:
                mem[page * PAGE + 5] = 1
            assert [at // PAGE + i for at, size in mem.dirty_pages(img) for i in range(-(-size // PAGE))] == touched
            assert bytes(mem.snapshot()) == mem[:]
            mem.restore(img)
            assert mem[:] == bytes(7 * PAGE) + bytes(img) + bytes(33 * PAGE)


# -- descriptors and mappings ------------------------------------------------------------------------------

@requires("descriptors")
def test_an_image_has_at_most_one_descriptor_and_closes_it_with_the_last_reference(kind):
    before = descriptors()
    img = Image.from_bytes(b"x" * PAGE)
    opened = 0 if kind == "private" else 1
    assert descriptors() == before + opened
    memories = [img.new_memory() for _ in range(10)]
    assert img.info().memories == 10
    view = memoryview(img)
    assert descriptors() == before + opened
    del img
    for mem in memories:
        mem.close()
    assert descriptors() == before + opened
    assert view[0] == ord("x")
    view.release()
    assert descriptors() == before


@requires("descriptors")
def test_a_memory_with_foreign_pages_keeps_no_reference_to_the_image_of_its_restore(kind):
    class Handing:
        def __init__(self): self.under = linmem.create(PAGE)
        def __getattr__(self, name): return getattr(self.under, name)

    class Creator:
        def new_memory(self, *asked): return Handing()

    before = descriptors()
    img = Image.from_bytes(b"x" * PAGE)
    with linmem.create(PAGE, creator=Creator(), reserve=0, guard=0) as mem:
        mem.restore(img)
        assert mem[:] == bytes(img)
        assert img.info().memories == 1
    assert img.info().memories == 0
    del img
    assert descriptors() == before


@requires("rlimits", "descriptors")
def test_an_image_without_a_descriptor_left_has_private_pages():
    assert answer("""
        import os, linmem
        from linmem import records
        resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
        held = []
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        img = linmem.Image.from_bytes(b"abc" * 10000)
        with img.new_memory() as mem:
            print(img.info().kind, mem[:] == b"abc" * 10000, img.info().shares_pages)
        """) == "private True False"


@requires("rlimits", "descriptors", "maps_images")
@pytest.mark.parametrize("kind", ["made", "opened"])
def test_images_leave_descriptors_for_others(tmp_path, kind):
    Image.from_bytes(b"abc").save(tmp_path / "file")
    make = {"made": "linmem.Image.from_bytes(b'abc')", "opened": f"linmem.Image.open({str(tmp_path / 'file')!r})"}[kind]
    assert answer(f"""
        import os, linmem
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        images = [{make} for _ in range(200)]
        opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(12)]
        print(all(bytes(image) == b"abc" and image.new_memory()[:] == b"abc" for image in images))
        [image.verify() for image in images]
        """) == "True"


@requires("real_pages")
@requires("rlimits", "descriptors", "unnamed_files")
def test_a_file_of_an_image_that_may_not_have_its_size_leaves_no_descriptor():
    assert answer("""
        import os, linmem
        from linmem._os import pages
        pages.choose_image("file")
        before = os.listdir("/proc/self/fd")
        img = linmem.Image.from_bytes(b"abc" * 10000)
        print(img.info().kind, bytes(img) == b"abc" * 10000, os.listdir("/proc/self/fd") == before)
        """, limits={"RLIMIT_FSIZE": 4096}) == "private True True"


@requires("rlimits", "descriptors", "maps_images")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "private"])
def test_an_image_whose_file_may_not_be_written_becomes_private_and_leaves_no_descriptor(kind):
    assert answer(f"""
        import os, linmem
        from linmem._os import pages
        pages.choose_image({kind!r})
        before = os.listdir("/proc/self/fd")
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def pieces():
            yield 0, b"a" * {PAGE}
            resource.setrlimit(resource.RLIMIT_FSIZE, ({PAGE}, most))     # the file already has its size
            yield {2 * PAGE}, b"b" * {PAGE}

        img = linmem.Image.from_pieces(pieces(), {4 * PAGE})
        whole = bytes(img) == b"a" * {PAGE} + bytes({PAGE}) + b"b" * {PAGE} + bytes({PAGE})
        print(img.info().kind, whole, os.listdir("/proc/self/fd") == before)
        """) == "private True True"


@requires("mounts", "unnamed_files")
@pytest.mark.parametrize("size", [1 << 16, 1 << 20, 1 << 24])
def test_a_full_memory_file_system_neither_refuses_an_image_nor_crashes_its_readers(size):
    assert answer(f"""
        import ctypes, os, linmem
        from linmem._os import pages
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x20000) == 0                                       # CLONE_NEWNS
        assert libc.mount(b"none", b"/", None, 0x44000, None) == 0              # MS_REC | MS_PRIVATE
        assert libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=4m") == 0
        pages.choose_image("file")
        image = linmem.Image.from_pieces([(0, b"x"), ({size} - 1, b"y")], {size})
        with open("/dev/shm/full", "wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        other = linmem.Image.from_bytes(b"z" * {size})
        content = b"x" + bytes({size} - 2) + b"y"
        print(bytes(image) == content, image.new_memory()[:] == content, bytes(other) == b"z" * {size})
        """) == "True True True"


@requires("rlimits", "unnamed_files")
def test_an_image_whose_file_is_too_small_becomes_private_and_keeps_its_content():
    # The OS grants the size at the image's start and refuses a later write.
    assert answer("""
        import linmem
        from linmem._os import pages
        pages.choose_image("file")
        def pieces():
            yield 0, b"first" * 1000
            yield 1 << 20, b"second"
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
            yield 2 << 20, b"third"
        img = linmem.Image.from_pieces(pieces(), 3 << 20)
        want = linmem.Image.from_pieces([(0, b"first" * 1000), (1 << 20, b"second"), (2 << 20, b"third")], 3 << 20)
        print(img.info().kind, img == want, bytes(img) == bytes(want))
        """) == "private True True"


@requires("rlimits")
def test_an_image_that_may_not_be_a_file_of_its_size_has_private_pages():
    assert answer("""
        import linmem
        img = linmem.Image.from_bytes(b"abc" * 10000)
        print(img.info().kind, img.new_memory()[:] == b"abc" * 10000)
        """, limits={"RLIMIT_FSIZE": 4096}) == "private True"


# -- immutable --------------------------------------------------------------------------------------------

@requires("sealed")
@pytest.mark.usefixtures("sealed")
def test_sealed_memory_cannot_be_written_or_truncated():
    img = Image.from_bytes(b"abc" * 10000)
    fd = os.open(f"/proc/self/fd/{img.fileno()}", os.O_RDWR)
    try:
        for number in (fd, img.fileno()):
            with pytest.raises(PermissionError):
                os.pwrite(number, b"x", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(number, 0)
            with pytest.raises(PermissionError):
                os.ftruncate(number, 1 << 20)
            with pytest.raises(PermissionError):
                mmap.mmap(number, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)
    assert bytes(img) == b"abc" * 10000


@requires("unnamed_files")
def test_the_descriptor_of_a_file_cannot_write_and_the_file_has_no_name():
    before = pages.choose_image("file")
    try:
        img = Image.from_bytes(b"abc" * 10000)
    finally:
        pages.choose_image(before)
    assert os.fstat(img.fileno()).st_nlink == 0
    with pytest.raises(OSError, match=r"Bad file|invalid"):
        os.pwrite(img.fileno(), b"x", 0)


def test_private_pages_have_no_descriptor():
    before = pages.choose_image("private")
    try:
        img = Image.from_bytes(b"abc")
    finally:
        pages.choose_image(before)
    with pytest.raises(OSError, match="private"):
        img.fileno()


@requires("regions", "numpy")
def test_the_images_own_view_is_read_only_to_the_processor(kind):
    img = Image.from_bytes(b"abc" * 10000)
    import numpy
    address = numpy.frombuffer(img, numpy.uint8).ctypes.data
    assert [m.access[:2] for m in mappings(address, address + 1)] == ["r-"]


# -- from a descriptor ------------------------------------------------------------------------------------

@pytest.fixture
def a_file(tmp_path):
    """A function that makes a file of bytes and opens it for reading."""
    opened = []

    def make(data, flags=os.O_RDONLY):
        path = tmp_path / str(len(opened))
        path.write_bytes(data)
        opened.append(os.open(path, flags | getattr(os, "O_BINARY", 0)))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


def test_an_image_of_a_file_is_its_bytes(a_file):
    data = random.Random(8).randbytes(3 * PAGE)
    fd = a_file(b"head".ljust(PAGE, b"\0") + data + bytes(PAGE) + b"tail")
    img = Image.from_fd(fd, 4 * PAGE, 2 * PAGE, position=PAGE)
    assert bytes(img) == data + bytes(PAGE)
    assert img.info().kind == "file"
    assert img.info().stored is None
    assert img == Image.from_bytes(data + bytes(PAGE), 2 * PAGE)
    with img.new_memory() as mem:
        assert mem[:] == bytes(2 * PAGE) + bytes(img)
        mem[3 * PAGE] ^= 1
        assert mem.dirty_pages(img) == [(3 * PAGE, PAGE)]
        mem.restore(img)
        assert mem.snapshot().runs() == Image.from_bytes(bytes(img), img.offset).runs()


@requires("real_pages")
def test_the_claimed_runs_and_digest_of_a_file_are_checked(a_file):
    fd = a_file(b"x" * PAGE + bytes(6 * PAGE) + b"y" * PAGE)
    os.lseek(fd, 5, os.SEEK_SET)
    true = Image.from_bytes(b"x" * PAGE + bytes(6 * PAGE) + b"y" * PAGE)
    img = Image.from_fd(fd, 8 * PAGE, runs=[(0, PAGE), (7 * PAGE, PAGE)], digest=true.digest)
    assert img == true
    assert img.runs() == [(0, PAGE), (7 * PAGE, PAGE)]
    assert img.info().stored == 2 * PAGE
    with img.new_memory() as mem:
        assert mem[:] == bytes(img)
    for runs in ([], [(0, PAGE)], [(7 * PAGE, PAGE)], [(0, 7 * PAGE)]):
        with pytest.raises(ValueError, match=r"runs must cover every byte .* the page at (0|28672) has some"):
            Image.from_fd(fd, 8 * PAGE, runs=runs)
    with pytest.raises(ValueError, match="digest must be that of the file's content"):
        Image.from_fd(fd, 8 * PAGE, digest="12" * 32)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 5


def test_runs_that_claim_zeros_are_the_same_image(a_file):
    fd = a_file(bytes(PAGE) + b"x" * PAGE + bytes(2 * PAGE))
    claims = [None, [(0, 4 * PAGE)], [(PAGE, PAGE)], [(0, PAGE), (PAGE, PAGE), (3 * PAGE, PAGE)]]
    images = [Image.from_fd(fd, 4 * PAGE, runs=runs) for runs in claims]
    assert {img.digest for img in images} == {Image.from_bytes(bytes(PAGE) + b"x" * PAGE + bytes(2 * PAGE)).digest}


@pytest.mark.parametrize("runs", [
    [(1, 4096)], [(0, 1)], [(0, 0)], [(4096, 4096), (0, 4096)], [(0, 8192), (4096, 4096)], [(8 * PAGE, 4096)],
    [(0, 9 * PAGE)]])
def test_runs_that_cannot_be_are_refused(a_file, runs):
    with pytest.raises(ValueError, match="runs must be"):
        Image.from_fd(a_file(bytes(8 * PAGE)), 8 * PAGE, runs=runs)


@requires("real_pages")
@pytest.mark.parametrize(("size", "position"), [(3 * PAGE, PAGE), (3 * PAGE + 1, 0), (1, 3 * PAGE), (1, 1 << 40)])
def test_a_file_that_is_too_short_is_refused(a_file, size, position):
    with pytest.raises(ValueError, match="the file must have"):
        Image.from_fd(a_file(bytes(3 * PAGE)), size, position=position)


def test_bytes_around_the_image_that_are_not_zero_are_refused(a_file):
    fd = a_file(b"\1" + bytes(PAGE - 2) + b"\1")
    for size, offset in ((PAGE - 1, 0), (PAGE - 1, 1)):
        with pytest.raises(ValueError, match="zeros around"):
            Image.from_fd(fd, size, offset)
    assert Image.from_fd(fd, PAGE).size == PAGE


@pytest.mark.parametrize(("arguments", "error"), [
    ({"size": 0}, ValueError), ({"size": -1}, ValueError), ({"size": PAGE, "position": 1}, ValueError),
    ({"size": 2**63}, ValueError), ({"size": PAGE, "offset": 2**63}, ValueError),
    ({"size": PAGE, "fd": "x"}, TypeError)])
def test_arguments_that_cannot_be_are_refused(a_file, arguments, error):
    with pytest.raises(error):
        Image.from_fd(**{"fd": a_file(bytes(PAGE)), **arguments})


@requires("descriptors")
def test_a_file_that_can_be_written_to_is_refused_and_no_descriptor_is_left(a_file):
    before_all = descriptors()
    fd = a_file(bytes(PAGE), os.O_RDWR)
    before = descriptors()
    with pytest.raises(ValueError, match="can be written to"):
        Image.from_fd(fd, PAGE)
    with pytest.raises(ValueError, match="the file must have"):
        Image.from_fd(a_file(b""), PAGE)
    reader, writer = os.pipe()
    for pipe in (reader, writer):
        with pytest.raises(ValueError, match=f"fd must be .* got {pipe}, which is not a regular file"):
            Image.from_fd(pipe, PAGE)
        os.close(pipe)
    assert descriptors() == before + 1 == before_all + 2


@requires("sealed")
def test_memory_is_taken_once_it_is_sealed():
    import fcntl
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 2 * PAGE)
        os.pwrite(fd, b"abc", PAGE)
        for seals in (0, fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            if seals != fcntl.F_SEAL_SHRINK:
                with pytest.raises(ValueError, match="sealed"):
                    Image.from_fd(fd, 2 * PAGE)
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
        try:
            assert Image.from_fd(again, 2 * PAGE).info().kind == "sealed"
        finally:
            os.close(again)
        assert bytes(Image.from_fd(fd, 2 * PAGE)) == bytes(PAGE) + b"abc" + bytes(PAGE - 3)
    finally:
        os.close(fd)


@requires("sealed")
def test_memory_that_could_still_be_sealed_is_refused_though_open_for_reading_only():
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, PAGE)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        with pytest.raises(ValueError, match="sealed"):
            Image.from_fd(again, PAGE)
    finally:
        os.close(fd)
        os.close(again)


@requires("maps_images")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in ("sealed", "file")])
def test_another_process_sees_the_image_through_its_descriptor(kind):
    import subprocess
    before = pages.choose_image(kind)
    try:
        img = Image.from_bytes(b"abc" * 50000, 12345)
    finally:
        pages.choose_image(before)
    code = ("import sys, linmem\n"
            "fd, size, offset = map(int, sys.argv[1:])\n"
            "img = linmem.Image.from_fd(fd, size, offset)\n"
            "with img.new_memory() as mem:\n"
            "    mem[20000] = 0\n"
            "    print(img.digest, mem.dirty_pages(img) != [])\n")
    done = subprocess.run([sys.executable, "-c", code, str(img.fileno()), str(img.size), str(img.offset)],
                          pass_fds=[img.fileno()], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.stdout.split() == [img.digest, "True"], done.stderr
    assert bytes(img) == b"abc" * 50000


# -- fork and threads ----------------------------------------------------------------------------------------

@requires("fork")
def test_a_forked_child_has_pages_of_its_own_and_restores_them(kind):
    assert answer(f"""
        import os, linmem
        from linmem._os import pages
        pages.choose_image({kind!r})
        img = linmem.Image.from_bytes(b"x" * {8 * PAGE})
        mem = img.new_memory()
        mem[{PAGE}] = 1
        mem.restore(img)
        mem[{2 * PAGE}] = 1
        child = os.fork()
        if child == 0:
            ok = mem.dirty_pages(img) == [({2 * PAGE}, {PAGE})]
            mem[{4 * PAGE}] = 1
            ok &= mem.dirty_pages(img) == [({2 * PAGE}, {PAGE}), ({4 * PAGE}, {PAGE})]
            ok &= bytes(mem.snapshot()) == mem[:]
            mem.restore(img)
            ok &= mem[:] == bytes(img) and mem.dirty_pages(img) == []
            with img.new_memory() as other:
                ok &= other[:] == bytes(img)
            os._exit(0 if ok else 1)
        print(os.waitpid(child, 0)[1], mem.dirty_pages(img) == [({2 * PAGE}, {PAGE})])
        """) == "0 True"


def test_threads_make_restore_and_drop_memories_of_one_image(kind):
    img = Image.from_bytes(random.Random(3).randbytes(20 * PAGE), 3 * PAGE)
    pool = linmem.creator("pool", check=True)
    want = bytes(3 * PAGE) + bytes(img)
    start = threading.Barrier(4)

    def work(seed):
        chance = random.Random(seed)
        start.wait()
        for turn in range(40):
            with img.new_memory(creator=pool if turn % 2 else None) as mem:
                assert mem[:] == want
                for _ in range(10):
                    mem[chance.randrange(len(mem))] = chance.randrange(256)
                held = mem[:]
                assert bytes(mem.snapshot()) == held
                assert bytes(img.apply(img.diff(mem))) == held
                mem.restore(img)
                assert mem[:] == want
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))
    assert img.info().memories == pool.stats()["warm"]
    assert pool.stats()["rejected"] == 0


def test_restoring_growing_and_comparing_at_once_leaves_a_memory_whole(kind):
    img = Image.from_bytes(b"x" * 20 * PAGE)
    mem = img.new_memory(reserve=100 * PAGE)
    stop = threading.Event()

    def again(act):
        while not stop.is_set():
            act()

    acts = [lambda: mem.restore(img, zero_grown=True), mem.snapshot, lambda: mem.dirty_pages(img),
            lambda: mem.discard(5 * PAGE, 5 * PAGE)]
    with ThreadPoolExecutor(len(acts)) as threads:
        done = [threads.submit(again, act) for act in acts]
        try:
            for size in range(21, 60):
                mem.grow_to(size * PAGE)
        finally:
            stop.set()
        for one in done:
            one.result()
    mem.restore(img, zero_grown=True)
    assert mem[:] == bytes(img) + bytes(39 * PAGE)


# -- pools -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reset", ["adaptive", pytest.param("scan", marks=requires("scans")), "zero", "discard"])
def test_a_pools_memory_of_an_image_is_like_new_after_any_user(reset, kind):
    chance = random.Random(6)
    img = Image.from_bytes(chance.randbytes(30 * PAGE), 5 * PAGE + 9)
    other = Image.from_bytes(chance.randbytes(10 * PAGE))
    pool = linmem.creator("pool", reset=reset, check=True, image=img)
    want = (bytes(img.offset) + bytes(img)).ljust(64 * PAGE, b"\0")
    for turn in range(60):
        with pool.create(64 * PAGE, 128 * PAGE) as mem:
            assert mem[:] == want
            for _ in range(chance.choice([0, 5, 200])):
                mem[chance.randrange(len(mem))] ^= 1
            if turn % 3 == 0:
                mem.grow_to(100 * PAGE)
                assert mem[64 * PAGE:] == bytes(36 * PAGE)
                mem[90 * PAGE] = 1
            if turn % 5 == 0:
                mem.discard(chance.randrange(64) * PAGE)
            if turn % 7 == 0:
                mem.restore(other, zero_grown=True)
            if turn % 11 == 0:
                mem.protect(6 * PAGE, 3 * PAGE, "r")
        if turn % 13 == 0:
            with pool.create(30 * PAGE + 10 * PAGE, image=other) as mem:
                assert mem[:10 * PAGE] == bytes(other)
    stats = pool.stats()
    assert stats["misses"] == 2
    assert stats["rejected"] == 0


def test_a_slot_serves_its_own_image_only():
    images = [Image.from_bytes(bytes([n]) * 3 * PAGE) for n in range(1, 4)]
    pool = linmem.creator("pool", check=True)
    for turn in range(5):
        for img in images:
            with img.new_memory(creator=pool) as mem:
                assert mem[:] == bytes(img)
                mem[5] = 0
        with pool.create(3 * PAGE) as mem:
            assert mem[:] == bytes(3 * PAGE)
            mem[5] = 1
            if turn == 2:
                mem.restore(images[0])
    stats = pool.stats()
    assert (stats["misses"], stats["hits"], stats["rejected"]) == (4, 16, 0)
    assert [img.info().memories for img in images] == [1, 1, 1]
    pool.trim(0)
    assert [img.info().memories for img in images] == [0, 0, 0]


@requires("smaps", "maps_images", "real_pages")
def test_a_cold_slot_holds_no_pages_and_maps_its_image_again():
    img = Image.from_bytes(b"x" * 20 * PAGE)
    pool = linmem.creator("pool", max_unused_warm=0, check=True)
    for _ in range(4):
        mem = img.new_memory(creator=pool)
        assert mem[:] == bytes(img)
        mem[7] = 1
        base, committed = mem.info().base, mem.info().committed
        assert written(mem) == REAL_PAGE
        mem.close()
        assert sum(m.figures["Rss"] for m in smaps(base, base + committed)) == 0
        assert all(m.access == "---p" for m in mappings(base, base + committed))
    assert pool.stats()["hits"] == 3


def test_a_pool_with_an_image_warms_slots_of_the_image_and_refuses_too_small_sizes():
    img = Image.from_bytes(b"x" * 100, 65536)
    pool = linmem.creator("pool", image=img)
    ty = linmem.MemoryType(2, 4)
    assert pool.warm(3, ty) == 3
    assert img.info().memories == 3
    mem = pool.new_memory(ty, 131072, 262144, 4 << 30, 32 << 20)
    assert pool.stats()["hits"] == 1
    assert mem[65536:65636] == bytes(img)
    with pytest.raises(ValueError, match="end of the image"):
        pool.create(65536)
    assert pool.image is img


@requires("smaps", "maps_images", "real_pages", "scans")
def test_resetting_a_slot_of_an_image_writes_dirty_pages_only():
    img = Image.from_bytes(b"x" * 16 * MIB)
    pool = linmem.creator("pool", reset="scan")
    for _ in range(5):
        with img.new_memory(creator=pool) as mem:
            for i in range(16):
                mem[i * MIB] = 1
            assert written(mem) == 16 * REAL_PAGE


def test_image_bytes_beyond_a_smaller_memory_make_no_page_dirty():
    img = Image.from_bytes(b"x" * (2 * PAGE))
    with linmem.create(PAGE + 5) as mem:
        mem[:] = b"x" * (PAGE + 5)
        assert mem.dirty_pages(img) == []
        assert img.apply(img.diff(mem)) == mem.snapshot()
        mem[PAGE] = 0
        assert mem.dirty_pages(img) == [(PAGE, 5)]
