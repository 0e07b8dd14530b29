"""Words of shared memory that processes wait for, and locks between processes: `wait`, `wake` and `Lock`."""

import contextlib
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support import (
    FORKING,
    PAGE,
    ROOT,
    Interrupt,
    Interrupting,
    answer,
    file_requires,
    new_process,
    requires,
    start_child,
)

import linmem
from linmem import locks

file_requires("shared")
SIZE = 65536


def shared():
    return linmem.create(SIZE, 64 << 20, creator=linmem.creator("shared"))


def pong(connection, handle):
    mem = linmem.attach(handle)
    for n in range(100):
        linmem.wait(mem, 0, n)
        mem.write(4, (n + 1).to_bytes(4, "little"))
        linmem.wake(mem, 4)
    connection.send("done")


def test_two_processes_wait_for_words_in_turn():
    mem = shared()
    with new_process(pong, mem.handle()) as there:
        for n in range(100):
            mem.write(0, (n + 1).to_bytes(4, "little"))
            linmem.wake(mem, 0)
            assert linmem.wait(mem, 4, n, timeout=60)
        assert there.recv() == "done"


def test_a_wait_ends_at_once_if_the_word_differs_and_in_time_if_it_does_not():
    mem = shared()
    mem.write(8, (-5).to_bytes(4, "little", signed=True))
    assert linmem.wait(mem, 8, -6) is True
    assert linmem.wait(mem, 8, -5, timeout=0.01) is False
    assert linmem.wake(mem, 8) == linmem.wake(mem, 8, 0) == 0


@pytest.mark.parametrize(("call", "error", "text"), [
    (lambda mem: linmem.wait(mem, 2, 0), ValueError, "offset must be a multiple of 4, got 2"),
    (lambda mem: linmem.wait(mem, SIZE, 0), ValueError, r"offset \+ size must be <= byte_size\(\)"),
    (lambda mem: linmem.wait(mem, 0, 1 << 31), ValueError, "value must be in"),
    (lambda mem: linmem.wait(mem, 0, -(1 << 31) - 1), ValueError, "value must be >= -2147483648"),
    (lambda mem: linmem.wake(mem, 0, -1), ValueError, "n must be >= 0, got -1"),
    (lambda mem: linmem.wake(linmem.create(8), 0), TypeError, "needs a shared memory"),
    (lambda mem: linmem.wait(None, 0, 0), TypeError, "mem must be a Memory, got NoneType"),
    (lambda mem: linmem.Lock(mem, 2), ValueError, "offset must be a multiple of 4, got 2"),
    (lambda mem: linmem.Lock(mem, SIZE), ValueError, r"offset \+ size must be <= byte_size\(\)"),
    (lambda mem: linmem.Lock(linmem.create(8), 0), TypeError, "mem must be a shared memory: "),
    (lambda mem: linmem.Lock(mem, 0).release(), RuntimeError, "does not hold"),
    (lambda mem: pickle.dumps(linmem.Lock(mem, 0)), TypeError, "a Lock cannot be pickled"),
])
def test_wrong_arguments_of_words_and_locks_are_refused_by_name(call, error, text):
    with pytest.raises(error, match=text):
        call(shared())


def count_up(connection, handle, times):
    mem = linmem.attach(handle)
    lock = linmem.Lock(mem, 0)
    number = mem.view("q", 8, 1)
    for _ in range(times):
        with lock:
            before = number[0]
            time.sleep(0)
            number[0] = before + 1
    connection.send("done")


def test_a_lock_keeps_processes_and_threads_apart():
    mem = shared()
    with new_process(count_up, mem.handle(), 300) as one, new_process(count_up, mem.handle(), 300) as two:
        lock, number = linmem.Lock(mem, 0), mem.view("q", 8, 1)

        def count(lock):
            for _ in range(150):
                with lock:
                    before = number[0]
                    time.sleep(0)
                    number[0] = before + 1

        threads = [threading.Thread(target=count, args=(each,)) for each in (lock, lock, linmem.Lock(mem, 0))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (one.recv(), two.recv()) == ("done", "done")
    assert number[0] == 600 + 450


@pytest.mark.parametrize("maker_forks", [False, pytest.param(True, marks=requires("fork"))])
def test_a_killed_owner_releases_the_lock_and_the_next_one_is_told(maker_forks):
    mem = shared()
    lock = linmem.Lock(mem, 16)
    with lock:
        pass
    child = start_child(f"""
        import os, pickle, sys, time, linmem
        mem = linmem.attach(pickle.loads(bytes.fromhex({pickle.dumps(mem.handle()).hex()!r})))
        lock = linmem.Lock(mem, 16)
        assert lock.acquire()
        if {maker_forks} and os.fork() == 0:
            sys.stdout.close()
            time.sleep(3)       # the child has the descriptors of the owner, and lives longer
            os._exit(0)
        print("held", flush=True)
        time.sleep(600)
    """)
    assert child.stdout.readline() == "held\n"
    time.sleep(0.2 if maker_forks else 0)
    assert lock.acquire(timeout=0.05) is False
    child.kill()
    child.communicate()
    for _ in range(2):
        with pytest.raises(linmem.OwnerDied, match="the last owner of the lock at offset 16 ended without a release"):
            lock.acquire(timeout=2)
    assert lock.acquire(timeout=2, recover=True) is True
    lock.release()
    with lock:
        assert linmem.Lock(mem, 16).acquire(timeout=0) is False


@requires("interrupts")
def test_ctrl_c_ends_a_wait_for_a_lock_or_a_word():
    child = start_child("""
        import threading, linmem
        mem = linmem.create(64, creator=linmem.creator("shared"))
        first, second = linmem.Lock(mem, 0), linmem.Lock(mem, 0)
        held, end = threading.Event(), threading.Event()
        def hold():
            with first:
                held.set()
                end.wait(60)
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait(60)
        for wait in (second.acquire, first.acquire, lambda: linmem.wait(mem, 4, 0)):
            print("waiting", flush=True)
            try:
                wait()
            except KeyboardInterrupt:
                print("interrupted", flush=True)
        end.set()
        thread.join()
        print(second.acquire(timeout=0), flush=True)
    """)
    for _ in range(3):
        assert child.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "interrupted\n"
    assert child.stdout.readline() == "True\n"        # communicate() would miss a line that readline() has buffered
    child.communicate(timeout=30)
    assert child.returncode == 0


OWN = "this thread has the lock at offset 16 already, and acquire\\(\\) without a timeout would wait for itself"


@pytest.mark.parametrize("other", ["same", "second", "attached"])
def test_a_thread_does_not_wait_for_a_lock_that_it_has(other):
    """The first acquire() after each refusal shows that the refusal has changed nothing."""
    mem = shared()
    lock = linmem.Lock(mem, 16)
    again = {"same": lambda: lock, "second": lambda: linmem.Lock(mem, 16),
             "attached": lambda: linmem.Lock(linmem.attach(mem.handle()), 16)}[other]()
    for _ in range(2):
        with lock:
            for recover in (False, True):
                with pytest.raises(RuntimeError, match=OWN):
                    again.acquire(recover=recover)
            with pytest.raises(RuntimeError, match=OWN), again:
                pass
            assert again.acquire(timeout=0) is again.acquire(timeout=0.01) is False
            assert mem.read(16, 4) != bytes(4)
            with linmem.Lock(mem, 20), linmem.Lock(shared(), 16):   # other locks
                pass
        assert mem.read(16, 4) == bytes(4)
        with again:
            pass


@pytest.mark.parametrize("second", [False, True])
def test_another_thread_may_release_the_lock_of_a_thread_that_waits_with_a_timeout(second):
    mem = shared()
    lock = linmem.Lock(mem, 16)
    again = linmem.Lock(mem, 16) if second else lock
    lock.acquire()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: time.sleep(0.1) or lock.release())
        assert again.acquire(timeout=60)
    again.release()


def test_a_thread_with_the_number_of_an_ended_owner_is_another_thread():
    """The lock of a thread that has ended is released by a third one, so acquire() of another thread may wait."""
    lock = linmem.Lock(shared(), 16)
    for waits in (False, True):
        thread = threading.Thread(target=lock.acquire)
        thread.start()
        if waits:
            time.sleep(0.1)
            assert thread.is_alive()
            lock.release()
        thread.join(60)
        assert not thread.is_alive()
    lock.release()


@requires("fork")
def test_a_child_that_is_forked_by_the_owner_waits_for_its_parent():
    assert answer(FORKING + """
import time
import linmem

mem = linmem.create(64, creator=linmem.creator("shared"))
lock, second = linmem.Lock(mem, 16), linmem.Lock(mem, 16)

def work():
    start = time.monotonic()
    with lock if use_lock else second:
        assert time.monotonic() - start > 0.1
        for own in lock, second:
            try:
                own.acquire()
            except RuntimeError:
                continue
            raise AssertionError("the child has waited for itself")

for use_lock in True, False:
    assert lock.acquire()
    threading.Timer(0.5, lock.release).start()
    child(os.fork, work)
    assert lock.acquire(timeout=0)
    lock.release()
print("done")
""", timeout=60) == "done"


@requires("sources")
def test_the_example_of_a_ring_passes_every_message_in_order():
    example = ROOT / "examples" / "shared_ring.py"
    done = subprocess.run([sys.executable, example, "20000"], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("20000 messages in order"), done.stderr


def test_a_lock_is_given_back_after_its_memory_was_closed():
    mem = shared()
    other = linmem.attach(mem.handle())
    lock = linmem.Lock(mem, 0)
    assert lock.acquire()
    mem.close()
    lock.release()
    assert other.read(0, 4) == bytes(4)
    assert linmem.Lock(other, 0).acquire(timeout=0)


@pytest.mark.parametrize("left", [bytes(4), b"dead"])
def test_an_acquire_that_is_interrupted_leaves_the_lock_as_it_was(left):
    class Interrupted:
        """The memory, for which Ctrl-C comes when the owner writes its number."""

        def __init__(self, mem):
            self.read, self.handle, self.real = mem.read, mem.handle, mem

        def write(self, offset, data):
            self.real.write(offset, data)
            raise KeyboardInterrupt

    mem = shared()
    mem.write(0, left)
    lock = linmem.Lock(mem, 0)
    lock._mem = Interrupted(mem)
    with pytest.raises(KeyboardInterrupt):
        lock.acquire(recover=True)
    assert mem.read(0, 4) == left
    lock._mem = mem
    if any(left):
        with pytest.raises(linmem.OwnerDied):
            lock.acquire(timeout=0)
    assert lock.acquire(timeout=0, recover=True)
    lock.release()
    assert mem.read(0, 4) == bytes(4)


def use_with(lock):
    with lock:
        pass


def time_out(lock):
    assert not lock.acquire(timeout=0)


def find_dead(lock):
    with pytest.raises(linmem.OwnerDied):
        lock.acquire()


@pytest.mark.parametrize("use", [use_with, time_out, find_dead])
def test_an_interrupt_anywhere_leaves_the_lock_free(use):
    """A signal handler that raises at the very start of __exit__ leaves the lock to `release`."""
    mem = shared()
    other = linmem.Lock(mem, 0)
    nth, happened = 0, True
    while happened:
        nth += 1
        mem.write(0, b"dead" if use is find_dead else bytes(4))
        lock = linmem.Lock(mem, 0)
        if use is time_out:
            other.acquire()
        with Interrupting(nth, locks.__file__) as interrupting, contextlib.suppress(Interrupt):
            use(lock)
        happened = interrupting.place is not None
        if use is time_out:
            other.release()
        if interrupting.place == ("__exit__", "call"):
            lock.release()
        assert mem.read(0, 4) == (b"dead" if use is find_dead else bytes(4)), interrupting.place
        for each in other, lock:
            assert each.acquire(timeout=0, recover=use is find_dead), interrupting.place
            each.release()
    assert nth > 10


@pytest.mark.parametrize("call", [
    lambda mem: linmem.wait(mem, 8, 0, 0),
    lambda mem: linmem.wake(mem, 8),
    lambda mem: linmem.Lock(mem, 8),
    lambda mem: linmem.Lock(mem, PAGE).acquire(0),
], ids=["wait", "wake", "Lock", "acquire"])
def test_a_word_on_an_inaccessible_page_is_refused(call):
    mem = shared()
    mem.protect(0, 2 * PAGE, "none")
    with pytest.raises(ValueError, match=r"is refused for 4 bytes at offset .* has the access 'none'"):
        call(mem)
    mem.protect(0, 2 * PAGE, "r")
    assert not linmem.wait(mem, 8, 0, 0)
    assert linmem.wake(mem, 8) == 0


def test_a_wait_ends_when_its_page_becomes_inaccessible():
    mem = shared()
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(linmem.wait, mem, 0, 0)
        time.sleep(0.05)
        mem.protect(0, PAGE, "none")
        with pytest.raises((ValueError, linmem.PageError)):
            waits.result(60)


def test_a_lock_on_a_page_that_became_inaccessible_is_given_back():
    mem = shared()
    lock = linmem.Lock(mem, 0)
    lock.acquire()
    mem.protect(0, PAGE, "none")
    lock.release()
    mem.protect(0, PAGE, "rw")
    assert linmem.Lock(mem, 0).acquire(0)


@requires("fork", "descriptors")
@pytest.mark.parametrize("call", ["open", "close"])
def test_a_fork_while_a_thread_opens_or_closes_a_lock_leaves_free_locks_to_the_child(call):
    assert answer(FORKING + f"""
import time
import linmem
from linmem._core import shared_handles

class Slow:         # the system call is done, and its thread waits for the GIL while another thread forks
    def __getattr__(self, name):
        return self.call if name == {call!r} else getattr(os, name)

    def call(self, *given):
        result = os.{call}(*given)
        called.set()
        time.sleep(0.3)
        return result

mem = linmem.create(64, creator=linmem.creator("shared"))
called, lock, other = threading.Event(), linmem.Lock(mem, 0), linmem.Lock(mem, 4)
other.acquire()
if {call!r} == "close":
    lock.acquire()
    lock.release()
    thread = threading.Thread(target=lock.__del__)
    shared_handles.close = Slow().call
else:
    thread = threading.Thread(target=lambda: lock.acquire() and lock.release())
    shared_handles.os = Slow()
thread.start()
called.wait(60)

def work():
    shared_handles.os, shared_handles.close = os, os.close
    assert sum("linmem" in os.path.basename(target) for target in descriptors().values()) == 1, descriptors()
    assert lock.acquire(timeout=10)
    assert not other.acquire(timeout=0)     # the parent has it

child(os.fork, work)
thread.join()
""") == ""
