"""Memories that processes share: growth, crashes in the middle of a growth, control words that another process has
written over, and what the other calls of a memory mean."""

import errno
import mmap
import multiprocessing
import os
import pickle
import random
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import wasmtime
from support import (
    NEEDS,
    PAGE,
    answer,
    failing,
    file_requires,
    held,
    new_process,
    requires,
    run_child,
    start_child,
)

import linmem
import linmem.wasmtime
from linmem._core.shared_handles import SharedHandle
from linmem._os import pages

file_requires("shared")

KIB64 = 65536
HEAD = 65536
SIZE_AT = 64            # of the word that says the size, in the file
SHARED = linmem.creator("shared")


def shared(size=KIB64, maximum=64 << 20, **options):
    return linmem.create(size, maximum, creator=linmem.creator("shared", **options))


def words_of(mem):
    """The beginning of the file, as another process can map it."""
    if NEEDS["sections"][0]:
        return mmap.mmap(-1, HEAD, f"{pages.NAMES}{mem.handle()._name}")
    return mmap.mmap(mem.handle().fileno(), HEAD)


@requires("rlimits")
def test_a_refusal_for_want_of_descriptors_names_the_limit():
    assert answer("""
        import errno, linmem
        kept = []
        try:
            for _ in range(64):
                kept.append(linmem.create(4096, creator=linmem.creator("shared")))
        except linmem.PageError as error:
            print(error.errno == errno.EMFILE, "RLIMIT_NOFILE (ulimit -n) is 64" in str(error), len(kept) <= 48)
        """, limits={"RLIMIT_NOFILE": 64}) == "True True True"


# -- growth

def grow_and_write(connection, handle):
    mem = linmem.attach(handle)
    view = memoryview(mem)
    connection.send((len(mem), mem.read(0, 5)))
    mem.grow_to(1 << 20)
    mem.write(900_000, b"theirs")
    connection.send(len(mem))
    assert connection.recv() == "grown"
    connection.send((len(mem), len(view), mem.read(3 << 20, 4)))


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_each_process_sees_growth_at_its_next_call_and_no_base_moves(method):
    mem = shared()
    base, view = mem.as_ptr(), memoryview(mem)
    mem.write(0, b"hello")
    with new_process(grow_and_write, mem.handle(), method=method) as there:
        assert there.recv() == (KIB64, b"hello")
        assert there.recv() == 1 << 20
        assert (len(mem), mem.read(900_000, 6), mem.as_ptr()) == (1 << 20, b"theirs", base)
        mem.grow_to(4 << 20)
        mem.write(3 << 20, b"ours")
        there.send("grown")
        assert there.recv() == (4 << 20, KIB64, b"ours")
    assert bytes(view[:5]) == b"hello"


@requires("shm_files")
def test_fresh_bytes_are_zero_and_pages_past_the_size_are_inaccessible_in_every_process():
    mem = shared(PAGE)
    code = f"""
        import ctypes, sys, pickle, linmem
        mem = linmem.attach(pickle.loads(bytes.fromhex({pickle.dumps(mem.handle()).hex()!r})))
        mem.grow_to(3 * {PAGE})
        assert bytes(mem) == bytes(3 * {PAGE})
        print("last byte", flush=True)
        ctypes.string_at(mem.as_ptr() + 3 * {PAGE}, 1)
    """
    done = run_child(code)
    assert done.stdout == "last byte\n"
    assert done.returncode in (-signal.SIGSEGV, 128 + signal.SIGSEGV), "a SIGBUS would end wasmtime, too"
    assert bytes(mem) == bytes(3 * PAGE)


def test_growth_past_the_maximum_is_refused_and_the_capacity_is_a_maximum():
    mem = shared(PAGE, 4 * PAGE)
    assert mem.maximum_byte_size() == 4 * PAGE
    with pytest.raises(linmem.GrowError, match=rf"new_size must be <= maximum_byte_size\(\) \({4 * PAGE}\)"):
        mem.grow_to(5 * PAGE)
    without = linmem.create(PAGE, reserve=8 * PAGE, creator=SHARED)
    assert without.maximum_byte_size() == without.byte_capacity() == 8 * PAGE
    other = linmem.attach(mem.handle())
    assert (other.byte_capacity(), other.maximum_byte_size()) == (mem.byte_capacity(), 4 * PAGE)


def test_growing_from_many_threads_and_handles_ends_at_the_largest_size():
    mem = shared(PAGE)
    others = [linmem.attach(mem.handle()) for _ in range(4)]

    def grow(handle, sizes):
        for size in sizes:
            try:
                handle.grow_to(size)
            except ValueError:          # another thread was faster
                assert len(handle) > size

    threads = [threading.Thread(target=grow, args=(one, range(i * PAGE, 400 * PAGE, 4 * PAGE)))
               for i, one in enumerate(others, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {len(one) for one in (mem, *others)} == {399 * PAGE}


def test_a_memory_may_have_any_size_in_bytes():
    mem = shared(1)
    other = linmem.attach(mem.handle())
    for size in (2, PAGE - 1, PAGE + 1, 10 * PAGE + 7):
        other.grow_to(size)
        assert (len(mem), bytes(mem)) == (size, bytes(size))
    empty = linmem.create(0, 10, creator=SHARED)
    assert len(linmem.attach(empty.handle())) == 0


def test_a_refused_growth_changes_nothing_in_any_process():
    calls = []
    # A section has its whole length at once.
    steps = ["extend", "file_map", "commit"] if NEEDS["shm_files"][0] else ["commit"]
    for nth in range(1, len(steps) + 1):        # the calls of the first growth
        mem = shared(PAGE)
        other = linmem.attach(mem.handle())
        with failing(nth, 12, 1 << 30), pytest.raises(linmem.PageError) as refused:
            mem.grow_to(40 << 20)
        calls.append(refused.value.call)
        assert len(other) == len(mem) == mem.info().committed == PAGE
        mem.grow_to(40 << 20)
        assert len(other) == 40 << 20
    assert calls == steps


@requires("rlimits")
def test_the_limit_on_file_sizes_is_a_page_error_and_no_signal():
    assert answer("""
        import resource, signal, linmem
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        mem = linmem.create(65536, 1 << 30, creator=linmem.creator("shared"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 20, 32 << 20))
        mem.grow_to((32 << 20) - 65536)
        try:
            mem.grow_to(32 << 20)
        except linmem.PageError as error:
            print(error.errno, error.call, "RLIMIT_FSIZE (ulimit -f) is 33554432 bytes" in str(error), len(mem))
    """) == f"27 extend True {(32 << 20) - 65536}"


def grow_in_steps(connection, handle):
    mem = linmem.attach(handle)
    for n in range(2, 6000):
        mem.grow_to(n * PAGE)
    connection.send("grown")
    connection.recv()


@requires("shm_files")
def test_an_attachment_beside_a_growth_finds_a_size_that_the_file_has_room_for():
    mem = shared(PAGE, 1 << 32, shm_name=f"linmem-test-{os.getpid()}")      # its file is not grown ahead
    try:
        before = PAGE
        with new_process(grow_in_steps, mem.handle()) as there:
            while not there.poll():
                with linmem.attach(mem.handle()) as other:
                    assert len(other) >= before
                    before = len(other)
            there.send("end")
        assert len(mem) == 5999 * PAGE
    finally:
        mem.unlink()


# -- waiting

def grow_after(connection, handle, size):
    mem = linmem.attach(handle)
    connection.recv()
    mem.grow_to(size)
    connection.recv()


def test_a_wait_for_growth_ends_when_another_process_has_grown_the_memory():
    mem = shared()
    with new_process(grow_after, mem.handle(), 1 << 20) as there:
        assert mem.wait_for_growth(KIB64) is True
        assert mem.wait_for_growth(1 << 20, timeout=0.05) is False
        there.send("grow")
        assert mem.wait_for_growth(1 << 20, timeout=60) is True
        assert len(mem) == 1 << 20
        there.send("end")


def test_what_can_never_be_waited_for_is_refused():
    mem = shared(maximum=1 << 20)
    with pytest.raises(ValueError, match=r"size must be <= maximum_byte_size\(\) \(1048576\), got 1048577"):
        mem.wait_for_growth((1 << 20) + 1)
    with pytest.raises(ValueError, match="timeout must be >= 0, got -1"):
        mem.wait_for_growth(1 << 20, -1)
    with pytest.raises(TypeError, match="timeout must be a number of seconds or None, got"):
        mem.wait_for_growth(1 << 20, [])
    with pytest.raises(TypeError, match="needs a shared memory, and this one is of kind 'mmap'"):
        linmem.create(1).wait_for_growth(1)


@requires("interrupts")
def test_ctrl_c_ends_a_wait_for_growth():
    child = start_child("""
        import linmem
        mem = linmem.create(1, 100, creator=linmem.creator("shared"))
        print("waiting", flush=True)
        try:
            mem.wait_for_growth(100)
        except KeyboardInterrupt:
            print("interrupted", len(mem))
    """)
    assert child.stdout.readline() == "waiting\n"
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    assert child.communicate(timeout=30)[0] == "interrupted 1\n"


def test_a_wait_for_growth_does_not_hold_the_gil():
    mem = shared()
    thread = threading.Thread(target=mem.wait_for_growth, args=(1 << 20,))
    thread.start()
    linmem.attach(mem.handle()).grow_to(1 << 20)
    thread.join(60)
    assert not thread.is_alive()


# -- crashes

@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_process_that_dies_after_any_step_of_a_growth_leaves_a_memory_that_others_grow(step):
    mem = shared()
    mem.write(0, b"before")
    seen = []
    waiter = threading.Thread(target=lambda: seen.append(mem.wait_for_growth(1 << 20, 0.5 if step < 3 else 60)))
    waiter.start()
    while struct.unpack_from("q", words_of(mem), SIZE_AT + 8)[0] == 0:      # a waiter, so step 4 is reached
        time.sleep(0.01)
    done = run_child(f"""
        import pickle, linmem
        from linmem._core import memory
        mem = linmem.attach(pickle.loads(bytes.fromhex({pickle.dumps(mem.handle()).hex()!r})))
        memory._stop_growth_at({step})
        mem.grow_to(1 << 20)
    """)
    assert done.returncode == 9
    waiter.join()
    assert seen == [step >= 3]
    assert len(mem) == ((1 << 20) if step >= 3 else KIB64)
    other = linmem.attach(mem.handle())
    other.grow_to(2 << 20)
    assert len(mem) == 2 << 20
    assert mem.read(0, 6) == b"before"
    assert mem.read(KIB64, (2 << 20) - KIB64) == bytes((2 << 20) - KIB64)


@requires("fork")
def test_killing_growing_processes_at_random_moments_never_breaks_the_memory():
    mem = shared(PAGE, 1 << 36)
    rng = random.Random(15)
    view = memoryview(mem)
    end = time.monotonic() + 20
    for _ in range(300):
        child = os.fork()
        if child == 0:
            mine = mem if rng.random() < 0.5 else linmem.attach(mem.handle())
            while True:
                try:
                    mine.grow_to(len(mine) + PAGE)
                    mine[len(mine) - 1] = 1
                except ValueError:      # another process was faster
                    pass
        time.sleep(rng.random() * 0.01)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        before = len(mem)
        assert mem[before - 1] in (0, 1)
        mem.grow_to(before + PAGE)
        assert mem[before] == 0 or len(mem) > before
        if time.monotonic() > end:
            break
    assert len(linmem.attach(mem.handle())) == len(mem) > 100 * PAGE
    assert len(view) == PAGE


@requires("shm_files")
def test_a_size_that_cannot_be_read_is_an_error_and_not_an_old_size():
    mem = shared(PAGE, 4 * PAGE)
    other = linmem.attach(mem.handle())
    mem.grow_to(2 * PAGE)
    with failing(1, errno.EIO), pytest.raises(linmem.PageError, match="file_read"):
        len(other)
    assert len(other) == 2 * PAGE


def test_a_growth_past_the_maximum_of_an_attachment_is_no_damage():
    mem = shared()
    less = linmem.creator("shared", attach=mem.handle()).create(0, maximum=2 * KIB64)
    mem.grow_to(4 * KIB64)
    with pytest.raises(ValueError, match=f"has grown the shared memory to {4 * KIB64} bytes, and the maximum here is"
                                         f" {2 * KIB64}: attach the memory again"):
        len(less)


# -- control words that another process has written over

@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("size", [1 << 62, (1 << 63) - 1, -1, -(1 << 63), 0, 65 << 20])
def test_a_size_that_is_not_credible_is_an_error_and_never_a_crash(size, attached):
    mem = shared()
    mem.write(0, b"kept")
    handle = mem.handle()
    if attached:        # until it has used them some times, it reads the words from the file
        mem = linmem.attach(handle)
    with words_of(mem) as words:
        struct.pack_into("q", words, SIZE_AT, size)
        if size <= KIB64:       # a smaller size is not believed: a memory never shrinks
            assert (len(mem), mem.read(0, 4)) == (KIB64, b"kept")
            mem.grow_to(2 * KIB64)
            assert len(mem) == 2 * KIB64
            return
        for call in (mem.byte_size, lambda: mem.read(0, 4), mem.snapshot, lambda: mem.grow_to(1 << 20),
                     lambda: mem.wait_for_growth(1 << 20), mem.handle, lambda: memoryview(mem), mem.info):
            with pytest.raises(ValueError, match="control words of the shared memory are damaged: they say"):
                call()
        with pytest.raises(ValueError, match="control words of the shared memory are damaged"):
            linmem.attach(handle)
        assert repr(mem) == "<linmem.Memory, lost>"
        assert KIB64 in [info.byte_size for info in linmem.live() if info.kind == "shared"]
        struct.pack_into("q", words, SIZE_AT, KIB64)
    assert mem.read(0, 4) == b"kept"
    mem.close()


def test_random_bytes_over_the_control_words_end_in_errors_only():
    rng = random.Random(7)
    for _ in range(200):
        mem = shared()
        handle = mem.handle()
        with words_of(mem) as words:
            words[:128] = rng.randbytes(16) + words[16:48] + rng.randbytes(80) if rng.random() < 0.5 else \
                words[:48] + rng.randbytes(80)
            for call in (lambda m=mem: m.grow_to(1 << 20), lambda m=mem: m.read(0, 100), lambda m=mem: m.write(5, b"x"),
                         lambda h=handle: linmem.attach(h), lambda m=mem: m.wait_for_growth(1 << 20, 0),
                         lambda m=mem: m.snapshot()):
                try:
                    call()
                except (ValueError, linmem.PageError, linmem.GrowError, FileNotFoundError):
                    pass
        mem.close()


def test_a_size_that_never_stays_the_same_ends_in_an_error_at_most():
    mem = shared()
    handle, done = mem.handle(), threading.Event()
    sizes = [struct.pack("q", size) for size in (KIB64, 0, 1 << 62)]
    seen = set()

    def flip(words):
        while not done.is_set():
            for size in sizes:
                words[SIZE_AT:SIZE_AT + 8] = size

    with words_of(mem) as words:
        thread = threading.Thread(target=flip, args=(words,))
        thread.start()
        try:
            for _ in range(300):
                try:
                    seen.add(len(linmem.attach(handle)))
                except ValueError as error:
                    seen.add(str(error)[:49])
        finally:
            done.set()
            thread.join()
    assert seen <= {0, KIB64, "the control words of the shared memory are damage"}


def mappings_of_words(mem):
    """How many mappings of this process show the beginning of the file."""
    inode = os.fstat(mem.handle().fileno()).st_ino
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    return sum((int(line[2], 16), line[4]) == (0, str(inode)) for line in lines)


@requires("maps", "shm_files")
@pytest.mark.parametrize("use", ["nothing", "grow", "wait", "see growth", "many calls"])
def test_an_attached_memory_maps_the_control_words_when_it_needs_them(use):
    mem = shared()
    other = linmem.attach(mem.handle())
    assert mappings_of_words(mem) == 1      # that of the maker
    if use == "grow":
        other.grow_to(2 * KIB64)
    elif use == "wait":
        assert not other.wait_for_growth(1 << 20, 0)
    elif use == "see growth":
        mem.grow_to(2 * KIB64)
        assert other[2 * KIB64 - 1] == 0
    elif use == "many calls":
        for _ in range(20):
            assert other[0] == 0
    assert mappings_of_words(mem) == (1 if use == "nothing" else 2)
    other.close()
    assert mappings_of_words(mem) == 1


@requires("shm_files")
@pytest.mark.parametrize("calls", [0, 20])
def test_a_program_that_closed_the_descriptor_reads_on_and_never_takes_another_file_for_the_memory(calls, tmp_path):
    mem = shared()
    mem.write(0, b"kept")
    handle = mem.handle()
    other = linmem.attach(handle)
    for _ in range(calls):
        assert other[0] == ord("k")
    fd = other.handle().fileno()
    own = os.dup(fd)
    for content in (None, b"", b"\x7f" * 200):      # closed; the number of an empty file; of one that says a large size
        if content is None:
            os.close(fd)
        else:
            path = tmp_path / str(len(content))
            path.write_bytes(content)
            with path.open("r+b") as file:
                os.dup2(file.fileno(), fd)
        for _ in range(20):
            assert (len(other), other.read(0, 4)) == (KIB64, b"kept")
        if calls == 0:      # the control words are not mapped
            with pytest.raises((ValueError, linmem.PageError), match=r"closed the memory's descriptor|file_read of"):
                other.grow_to(2 * KIB64)
    os.dup2(own, fd)
    os.close(own)
    other.grow_to(2 * KIB64)
    assert len(mem) == 2 * KIB64


@requires("sealed")
def test_no_process_can_shrink_a_memory_or_take_its_pages_away():
    mem = shared(1 << 20)
    fd = mem.handle().fileno()
    for call in (lambda: os.ftruncate(fd, HEAD), lambda: os.ftruncate(fd, 0)):
        with pytest.raises(PermissionError):
            call()
    import fcntl
    for seal in (fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE):
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)


# -- handles

def test_a_memory_leaves_nothing_behind_when_its_last_process_is_killed():
    child = start_child("""
        import pickle, time, linmem
        mem = linmem.create(1 << 20, creator=linmem.creator("shared"))
        mem.write(0, b"x" * (1 << 20))
        print(pickle.dumps(mem.handle()).hex(), flush=True)
        time.sleep(600)
    """)
    handle = pickle.loads(bytes.fromhex(child.stdout.readline()))
    with linmem.attach(handle) as mem:
        assert mem[0] == ord("x")
    if NEEDS["maps"][0]:        # the file of the child's memory has no name, so it ends with the last process
        maps = Path(f"/proc/{child.pid}/maps").read_text()
        assert "/memfd:" in maps
        assert "/dev/shm" not in maps
    child.kill()
    child.communicate()
    with pytest.raises(FileNotFoundError, match=r"the shared memory .* is gone: no process of this (user|session)"):
        linmem.attach(handle)


def attach_and_stay(connection, handle):
    mem = linmem.attach(handle)
    connection.send(len(mem))
    connection.recv()
    connection.send(mem.read(0, 4))


def test_a_handle_finds_the_memory_in_any_process_that_has_it_when_its_maker_has_closed_it():
    mem = shared()
    mem.write(0, b"kept")
    handle = mem.handle()
    with new_process(attach_and_stay, handle) as there:
        assert there.recv() == KIB64
        mem.close()
        again = linmem.attach(handle)
        assert again.read(0, 4) == b"kept"
        again.write(0, b"more")
        there.send("go on")
        assert there.recv() == b"more"
        again.close()
    with pytest.raises(FileNotFoundError):
        linmem.attach(handle)


@requires("shm_files")
def test_a_handle_holds_nothing_and_a_number_that_is_used_again_is_not_taken_for_the_memory():
    mem = shared()
    handle = mem.handle()
    fd = handle.fileno()
    mem.close()
    others = [shared() for _ in range(5)]
    assert fd in [one.handle().fileno() for one in others]
    with pytest.raises(FileNotFoundError):
        linmem.attach(handle)
    with pytest.raises(ValueError, match="fileno\\(\\) works in the process that made the handle"):
        handle.fileno()


def test_handles_of_one_memory_are_equal():
    mem, other = shared(), shared()
    assert mem.handle() == linmem.attach(mem.handle()).handle() != other.handle()
    assert len({mem.handle(), mem.handle(), other.handle()}) == 2


@pytest.mark.parametrize("parts", [(0, 0, 0, 0, b""), (0, 0, 0, -1, bytes(32)), ("1", 0, 0, 0, bytes(32)),
                                   (1, 2, 3, 1 << 64, bytes(32)), (1, 2, 3, 4, "x" * 32)])
def test_a_handle_with_impossible_parts_is_refused(parts):
    with pytest.raises(ValueError, match="of a handle must be"):
        SharedHandle(*parts)


@requires("shm_files")
def test_a_forged_handle_attaches_nothing(tmp_path):
    mem = shared()
    pid, fd, device, inode, token = mem.handle()._parts()
    plain = tmp_path / "plain"
    plain.write_bytes(b"linmem shared 1\n" + token + bytes(HEAD))
    with plain.open("r+b") as file, (tmp_path / "short").open("w+b") as short:
        about = os.fstat(file.fileno())
        for forged in (SharedHandle(pid, fd, device, inode, bytes(32)),
                       SharedHandle(pid, 0, device, inode + 1, token),
                       SharedHandle(2 ** 63, 2 ** 63, device, 1, token),
                       SharedHandle(pid, 2 ** 32 + fd, device, inode + 1, token)):
            with pytest.raises(FileNotFoundError):
                linmem.attach(forged)
        # A file with the right head is a memory like any other: its words are checked, and it has no bytes.
        assert len(linmem.attach(SharedHandle(pid, file.fileno(), about.st_dev, about.st_ino, token))) == 0
        with pytest.raises(ValueError, match="must be a shared memory of linmem"):
            linmem.attach(short.fileno())
    read_end, write_end = os.pipe()
    try:
        with pytest.raises(ValueError, match=f"^attach must be .*, got {read_end}, which is not a regular file$"):
            linmem.attach(read_end)
        about = os.fstat(read_end)
        with pytest.raises(FileNotFoundError):
            linmem.attach(SharedHandle(pid, read_end, about.st_dev, about.st_ino, token))
    finally:
        os.close(read_end)
        os.close(write_end)


@requires("shm_files")
def test_a_descriptor_without_the_right_to_read_and_write_is_refused_by_name():
    mem = shared()
    for flags, wrong in ((os.O_RDONLY, "open for reading only"), (os.O_WRONLY, "open for writing only"),
                         (os.O_PATH, r"open without a right to read \(O_PATH\)")):
        fd = os.open(f"/proc/self/fd/{mem.handle().fileno()}", flags)
        try:
            for attach in linmem.attach, lambda fd: linmem.creator("shared", attach=fd).create(0):
                with pytest.raises(ValueError, match=f"^attach must be a shared memory of linmem, open for reading and"
                                                     f" writing, got {fd}, which is {wrong}$"):
                    attach(fd)
        finally:
            os.close(fd)
    for attach in linmem.attach, lambda fd: linmem.creator("shared", attach=fd):
        with pytest.raises(ValueError, match=f"^attach must be an open descriptor, got {fd}$"):
            attach(fd)


@pytest.mark.parametrize("what", [None, True, -1, 1 << 40, b"name", 1.5, object])
def test_attach_takes_a_handle_a_name_or_a_descriptor(what):
    with pytest.raises(TypeError, match="must be a handle, the name of a shared memory or a descriptor, got"):
        linmem.attach(what)


@requires("root")
def test_another_user_is_refused():
    mem = shared()
    code = f"""
        import os, pickle, linmem
        handle = pickle.loads(bytes.fromhex({pickle.dumps(mem.handle()).hex()!r}))
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            linmem.attach(handle)
        except PermissionError as error:
            print("refused", "belongs to another user" in str(error))
    """
    assert answer(code) == "refused True"


@requires("shm_files")
def test_a_descriptor_that_was_sent_through_a_socket_attaches():
    mem = shared()
    mem.write(0, b"sent")
    here, there = socket.socketpair()
    with here, there:
        socket.send_fds(here, [b"x"], [mem.handle().fileno()])
        _, (fd,), _, _ = socket.recv_fds(there, 1, 1)
        other = linmem.attach(fd)
        os.close(fd)
    assert other.read(0, 4) == b"sent"


def square(handle, n):
    array = linmem.attach(handle).array("int64")
    array[n] = n * n
    return n


def test_handles_go_to_pools_and_executors():
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    mem = shared()
    with get_context("spawn").Pool(2) as pool:
        pool.starmap(square, [(mem.handle(), n) for n in range(20)])
    with ProcessPoolExecutor(2, mp_context=get_context(multiprocessing.get_all_start_methods()[-1])) as executor:
        assert list(executor.map(square, [mem.handle()] * 20, range(20, 40))) == list(range(20, 40))
    assert mem.array("int64")[:40].tolist() == [n * n for n in range(40)]


@requires("dask")
def test_handles_go_to_dask_workers():
    from distributed import Client

    mem = shared()
    with Client(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as client:
        assert client.gather(client.map(square, [mem.handle()] * 5, range(5))) == list(range(5))
    assert mem.array("int64")[:5].tolist() == [0, 1, 4, 9, 16]


# -- names

@pytest.fixture
def name():
    name = f"linmem-test-{os.getpid()}"
    yield name
    path = f"/dev/shm/{name}"
    if os.path.exists(path):
        os.unlink(path)


@requires("shm_files")
def test_a_named_memory_stays_until_it_is_unlinked(name):
    mem = shared(shm_name=name)
    path = f"/dev/shm/{name}"
    assert os.stat(path).st_mode & 0o7777 == 0o600
    mem.write(0, b"named")
    mem.close()
    other = linmem.attach(name)
    assert other.read(0, 5) == b"named"
    with pytest.raises(FileExistsError, match=f"of this shm_name exists already: '/dev/shm/{name}'"):
        shared(shm_name=f"/{name}")
    other.unlink()
    assert not os.path.exists(path)
    with pytest.raises(FileNotFoundError, match="removed already"):
        other.unlink()
    other.grow_to(1 << 20)
    assert len(linmem.attach(other.handle())) == 1 << 20
    with pytest.raises(FileNotFoundError):
        linmem.attach(name)


@requires("shm_files")
def test_unlink_removes_no_other_file_that_has_got_the_name(name):
    mem = shared(shm_name=name)
    os.unlink(f"/dev/shm/{name}")
    new = shared(shm_name=name)
    with pytest.raises(FileNotFoundError):
        mem.unlink()
    new.unlink()


@requires("shm_files")
def test_a_name_that_ends_as_the_kernel_marks_removed_files_is_unlinked(name):
    mem = shared(shm_name=f"{name} (deleted)")
    try:
        assert os.path.exists(f"/dev/shm/{name} (deleted)")
        mem.unlink()
        assert not os.path.exists(f"/dev/shm/{name} (deleted)")
    finally:
        Path(f"/dev/shm/{name} (deleted)").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="removed already"):
        mem.unlink()


def test_a_memory_without_a_name_has_nothing_to_unlink():
    with pytest.raises(ValueError, match="the shared memory has no name"):
        shared().unlink()


@pytest.mark.parametrize("bad", ["", "/", "a/b", "..", ".", "x" * 256, "a\0b"])
def test_a_name_that_the_os_cannot_have_is_refused(bad):
    with pytest.raises(ValueError, match="shm_name must be 1 to 255 bytes without '/' and NUL"):
        linmem.creator("shared", shm_name=bad)
    with pytest.raises(ValueError, match="shm_name and attach cannot both be given"):
        linmem.creator("shared", shm_name="x", attach="y")


@requires("mounts")
@pytest.mark.parametrize("options", ["ro", "size=256k"])
def test_memories_without_a_name_need_no_room_in_dev_shm(options):
    code = f"""
        import subprocess, linmem
        subprocess.run(["mount", "-t", "tmpfs", "-o", {options!r}, "tmpfs", "/dev/shm"], check=True)
        mem = linmem.create(8 << 20, 1 << 30, creator=linmem.creator("shared"))
        mem.write(0, b"x" * (8 << 20))
        try:
            linmem.create(8 << 20, creator=linmem.creator("shared", shm_name="named"))
        except OSError as error:
            print(len(linmem.attach(mem.handle())), error.errno)
    """
    done = subprocess.run(["unshare", "-m", sys.executable, "-c", textwrap.dedent(code)], capture_output=True,
                          text=True, timeout=60)
    assert done.stdout.split() == [str(8 << 20), "30" if options == "ro" else "28"], done.stderr


# -- what the other calls mean

def test_discard_gives_zeros_to_all():
    mem = shared(1 << 20)
    other = linmem.attach(mem.handle())
    mem.write(0, b"x" * (1 << 20))
    blocks = [os.fstat(mem.handle().fileno()).st_blocks] if NEEDS["shm_files"][0] else []
    other.discard(100, 8 * PAGE)
    for before in blocks:
        assert os.fstat(mem.handle().fileno()).st_blocks == before - 7 * PAGE // 512
    assert bytes(mem)[:100] == b"x" * 100
    assert mem.read(100, 8 * PAGE) == bytes(8 * PAGE)
    assert mem[100 + 8 * PAGE] == ord("x")


def test_restore_writes_through():
    mem = shared(1 << 20)
    other = linmem.attach(mem.handle())
    mem.write(PAGE, b"image")
    image = mem.snapshot()
    mem.write(0, b"y" * (1 << 20))
    other.restore(image)
    assert bytes(mem) == bytes(image)
    assert mem.read(PAGE, 5) == b"image"
    other.write(PAGE, b"again")
    assert mem.read(PAGE, 5) == b"again", "the pages are still shared"


@requires("shm_files")
def test_a_snapshot_takes_no_space_for_pages_that_nothing_was_written_to():
    mem = shared(1 << 30, 1 << 30)
    mem.write(512 << 20, b"x")
    image = mem.snapshot()
    assert image.info().stored == 4096
    assert mem.info().resident < 1 << 20
    mem.write(5, b"y")
    assert mem.dirty_pages(image) == [(0, PAGE)]
    assert mem.snapshot().diff(image).size == 1 << 30


def test_protect_holds_in_this_process_only():
    mem = shared(2 * PAGE)
    other = linmem.attach(mem.handle())
    mem.protect(0, PAGE, "r")
    with pytest.raises(ValueError, match="write is refused"):
        mem.write(0, b"x")
    other.write(0, b"x")
    assert mem.read(0, 1) == b"x"


def test_a_memory_starts_from_an_image_by_a_copy_and_an_attached_one_does_not():
    image = linmem.Image.from_bytes(b"start" * 1000)
    mem = SHARED.create(KIB64, 1 << 20, image=image)
    other = linmem.attach(mem.handle())
    assert other.read(0, 5) == b"start"
    other.write(0, b"other")
    assert (mem.read(0, 5), bytes(image)[:5]) == (b"other", b"start")
    with pytest.raises(ValueError, match="cannot start from an image"):
        linmem.creator("shared", attach=mem.handle()).create(KIB64, image=image)


@requires("fork")
def test_a_forked_child_shares_the_memory():
    mem = shared()
    child = os.fork()
    if child == 0:
        mem.write(0, b"child")
        mem.grow_to(1 << 20)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (mem.read(0, 5), len(mem)) == (b"child", 1 << 20)


def test_a_pool_over_shared_memories_makes_fresh_ones():
    pool = linmem.creator("pool", upstream=SHARED)
    first = linmem.create(KIB64, 1 << 20, creator=pool)
    handle = first.handle()
    first.write(0, b"tenant")
    kept = linmem.attach(handle)
    first.close()
    second = linmem.create(KIB64, 1 << 20, creator=pool)
    assert second.read(0, 6) == bytes(6)
    assert second.handle() != handle
    kept.write(0, b"again!")
    assert second.read(0, 6) == bytes(6)
    assert pool.stats()["warm"] == 0


def test_a_budget_is_charged_for_a_growth_by_another_process_when_it_is_seen():
    mem = shared(KIB64, 1 << 20)
    limited = linmem.creator("limiting", upstream=linmem.creator("shared", attach=mem.handle()), limit_bytes=4 * KIB64)
    other = linmem.create(0, creator=limited)
    assert (len(other), limited.used_bytes) == (KIB64, KIB64)
    mem.grow_to(2 * KIB64)
    assert (len(other), limited.used_bytes) == (2 * KIB64, 2 * KIB64)
    mem.grow_to(8 * KIB64)
    with pytest.raises(linmem.LimitError, match="limit of 262144 bytes reached"):
        len(other)
    assert limited.used_bytes == 2 * KIB64
    other.close()
    assert limited.used_bytes == 0
    with pytest.raises(linmem.LimitError):
        linmem.create(0, creator=limited)
    assert limited.used_bytes == 0


def test_info_says_that_a_memory_is_shared():
    mem = shared()
    assert (mem.info().kind, linmem.live()[0].kind) == ("shared", "shared")
    assert linmem.find(mem.as_ptr()).memory == mem


def test_closed_memories_give_back_addresses_and_descriptors():
    before = held()
    for _ in range(3):
        mem = shared()
        other = linmem.attach(mem.handle())
        mem.close()
        other.close()
    assert held() == before


@pytest.mark.parametrize("attached", [False, True])
def test_each_refused_page_call_of_a_creation_leaves_nothing(attached):
    mem = shared()
    creator = linmem.creator("shared", attach=mem.handle()) if attached else SHARED
    before = held()
    for nth in range(1, 30):
        try:
            with failing(nth, 12):
                creator.create(0 if attached else KIB64, 1 << 20).close()
                left = pages.count_calls_to_failure(0, 1)
        except linmem.PageError:
            left = 0
        linmem.create(1).close()        # its release also releases what the OS has refused to take back
        assert held() == before
        if left:
            return
    raise AssertionError("the creation makes more page calls than this test knows")


# -- guests

WAT = """(module (memory (export "memory") 1 100)
  (func (export "load") (param i32) (result i32) local.get 0 i32.load8_u)
  (func (export "fill") (param i32 i32) local.get 0 i32.const 7 local.get 1 memory.fill)
  (func (export "grow") (param i32) (result i32) local.get 0 memory.grow)
  (func (export "size") (result i32) memory.size))"""


class Guest:
    def __init__(self, creator):
        config = wasmtime.Config()
        linmem.wasmtime.install(config, creator)
        engine = wasmtime.Engine(config)
        self.store = wasmtime.Store(engine)
        self.exports = wasmtime.Instance(self.store, wasmtime.Module(engine, WAT), []).exports(self.store)

    def __getattr__(self, name):
        return lambda *arguments: self.exports[name](self.store, *arguments)

    def handle(self):
        return linmem.wasmtime.linear_memory(self.store, self.exports["memory"])


def guest_of(mem):
    return Guest(linmem.creator("shared", attach=mem.handle()))


def grow_guest(connection, handle):
    guest = Guest(linmem.creator("shared", attach=handle))
    guest.fill(10, 3)
    connection.send((guest.grow(2), guest.size()))
    connection.recv()
    connection.send((guest.size(), guest.grow(0), guest.load(4 * KIB64)))


def test_guests_of_two_processes_share_a_memory_that_each_grows():
    mem = shared(KIB64, 100 * KIB64)
    here = guest_of(mem)
    with new_process(grow_guest, mem.handle()) as there:
        assert there.recv() == (1, 3)
        assert (here.load(11), here.size(), here.grow(2), here.size()) == (7, 1, 3, 5)
        here.fill(4 * KIB64, 1)
        there.send("go on")
        assert there.recv() == (3, 5, 7)
    assert len(mem) == 5 * KIB64


@requires("shm_files")
def test_a_guest_traps_at_the_end_of_the_size_that_it_knows_until_its_own_growth():
    mem = shared(KIB64, 100 * KIB64)
    guest, other = guest_of(mem), guest_of(mem)
    handle = guest.handle()
    mem.grow_to(3 * KIB64)
    mem.write(2 * KIB64, b"\x09")
    assert len(handle) == KIB64
    assert handle.wait_for_growth(3 * KIB64, 0) is True
    for _ in range(3):
        with pytest.raises(wasmtime.Trap):
            guest.fill(KIB64, 1)
    with pytest.raises(wasmtime.Trap):
        guest.load(2 * KIB64)
    with pytest.raises(wasmtime.Trap):
        other.load(KIB64)
    assert (guest.size(), other.size()) == (1, 1)
    assert (guest.grow(0), guest.size(), guest.load(2 * KIB64), len(handle)) == (3, 3, 9, 3 * KIB64)
    with pytest.raises(wasmtime.Trap):
        guest.load(3 * KIB64)
    mem.grow_to(99 * KIB64)
    assert (guest.grow(2), guest.grow(1), guest.grow(0)) == (-1, 99, 100)


def test_a_guest_gets_a_memory_of_its_minimum_and_none_beyond_its_maximum():
    small = shared(10, 200 * KIB64)
    assert (guest_of(small).size(), len(small)) == (1, KIB64)
    small.grow_to(101 * KIB64)
    with pytest.raises(wasmtime.WasmtimeError, match="maximum must be >= the size of the shared memory"):
        guest_of(small)


def test_a_guest_meets_a_size_that_is_not_credible_as_a_refused_growth():
    mem = shared(KIB64, 100 * KIB64)
    guest = guest_of(mem)
    with words_of(mem) as words:
        struct.pack_into("q", words, SIZE_AT, 1 << 40)
    assert (guest.grow(0), guest.grow(1), guest.size()) == (1, -1, 1)
    if NEEDS["shm_files"][0]:
        with pytest.raises(wasmtime.Trap):
            guest.load(KIB64)


def test_a_guest_knows_the_size_that_others_gave_its_memory_after_its_own_growth():
    mem = shared(KIB64, 100 * KIB64)
    guest = guest_of(mem)
    handle = guest.handle()
    mem.grow_to(3 * KIB64)
    mem.write(2 * KIB64, b"\x09")
    assert (guest.size(), len(handle)) == (1, KIB64)
    assert (guest.grow(0), guest.size(), guest.load(2 * KIB64), len(handle)) == (3, 3, 9, 3 * KIB64)
    mem.grow_to(99 * KIB64)
    assert (guest.grow(2), guest.grow(1), guest.grow(0)) == (-1, 99, 100)


def test_a_fresh_shared_memory_may_be_the_guests_own():
    guest = Guest(SHARED)
    other = linmem.attach(guest.handle().handle())
    guest.fill(5, 2)
    assert other.read(4, 4) == b"\0\7\7\0"
    assert (guest.grow(1), len(other)) == (1, 2 * KIB64)
