"""`linmem top`: the memories of another process, from the tables of the operating system."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from support import FORKING, Interrupt, Interrupting, answer, descriptors, requires, start_child

import linmem.metrics
from linmem import cli
from linmem._commands import top
from linmem._commands.parser import Refused
from linmem._core import publication

# A memory of 64 KiB with an inaccessible guard on both sides and the next memory at once behind; its pages have two
# protections. Then an image, and other code's mappings.
SMAPS = """\
10000-20000 ---p 00000000 00:00 0                    [anon:linmem]
Size:                 64 kB
Rss:                   0 kB
20000-2c000 rw-p 00000000 00:00 0                    [anon:linmem]
Rss:                  16 kB
Pss:                   8 kB
2c000-30000 r--p 00000000 00:00 0                    [anon:linmem]
Rss:                   4 kB
30000-60000 ---p 00000000 00:00 0                    [anon:linmem]
Rss:                   0 kB
60000-70000 rw-p 00000000 00:01 77                   /memfd:linmem (deleted)
Rss:                   8 kB
70000-80000 ---p 00000000 00:00 0                    [anon:linmem]
80000-90000 rw-p 00000000 00:00 0                    [heap]
Rss:                  64 kB
a0000-b0000 r--p 00000000 00:01 77                   /memfd:linmem (deleted)
Rss:                  64 kB
b0000-c0000 rw-p 00000000 00:00 0
"""


def test_neighbouring_mappings_become_memories_and_images():
    rows, inaccessible = top.memories(top.mappings(SMAPS.splitlines(keepends=True)))
    assert rows == [top.Row(0x20000, 0x30000, 20 << 10, 0x30000, False),
                    top.Row(0x60000, 0x70000, 8 << 10, 0x10000, False),
                    top.Row(0xa0000, 0xb0000, 64 << 10, 0, True)]
    assert inaccessible == 0x10000 + 0x30000 + 0x10000
    lines = [line.split() for line in top.table(rows, inaccessible)]
    assert lines[1] == ["0xa0000", "64", "KiB", "64", "KiB", "image"]
    assert lines[2] == ["0x20000", "64", "KiB", "20", "KiB", "192", "KiB"]
    assert " ".join(lines[-1]) == ("2 memories: 128 KiB accessible, 28 KiB resident, 320 KiB inaccessible; 1 image")


def test_the_number_of_rows_is_bounded():
    rows = [top.Row(i << 16, (i << 16) + 4096, 0, 0, False) for i in range(1003)]
    lines = list(top.table(rows, 0))
    assert len(lines) == 1 + 1000 + 2
    assert lines[-2].split() == ["and", "3", "smaller", "ones"]


def test_a_process_that_does_not_exist_is_refused(capsys):
    assert cli.main(["top", "4000000000", "--once"]) == 1
    assert "there is no process 4000000000" in capsys.readouterr().err


CHILD = """
import sys
import linmem
kept = [linmem.create(65536, maximum=1 << 20), linmem.create(1 << 20, maximum=4 << 20)]
image = linmem.Image.from_bytes(b"x" * 65536)
kept[1].prefault()
started = image.new_memory(1 << 20)
started.write(0, bytes(65536))
print(*(mem.as_ptr() for mem in [*kept, started]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def process():
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield child
    child.stdin.close()
    child.wait()
    child.stdout.close()


@requires("smaps", "names", "real_pages")
def test_the_memories_of_another_process_are_shown_with_their_resident_bytes(process, capsys):
    small, large, _ = map(int, process.stdout.readline().split())
    rows, *_ = top.look_at(process.pid)
    by_address = {row.address: (row.end - row.address, row.resident) for row in rows}
    assert by_address[small] == (65536, 0)
    assert by_address[large] == (1 << 20, 1 << 20)
    assert cli.main(["top", str(process.pid), "--once"]) == 0
    assert f"{large:#x}" in capsys.readouterr().out


@requires("smaps", "sealed", "maps_images", "real_pages")
def test_a_memory_that_started_from_an_image_and_the_image_are_shown(process):
    *_, started = map(int, process.stdout.readline().split())
    rows, *_ = top.look_at(process.pid)
    assert [(row.end - row.address, row.resident, row.is_image) for row in rows if row.address == started] == [
        (65536, 65536, False)]
    assert [row.end - row.address for row in rows if row.is_image] == [65536]


def test_the_table_is_printed_until_the_process_ends(monkeypatch, capsys):
    found = *top.memories(top.mappings(SMAPS.splitlines(keepends=True))), None
    looks = iter([found, found])

    def look(pid):
        try:
            return next(looks)
        except StopIteration:
            raise Refused("there is no process") from None

    monkeypatch.setattr(top, "look_at", look)
    assert cli.main(["top", "1", "--interval", "0.01"]) == 0
    assert capsys.readouterr().out.count("ADDRESS") == 2


@pytest.mark.parametrize("seconds", ["0", "0.009", "86401", "-1", "x"])
def test_an_interval_that_takes_a_whole_processor_or_never_ends_is_refused(seconds, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["top", "1", "--once", f"--interval={seconds}"])
    assert ended.value.code == 2
    assert re.search(r"argument --interval: must be (0\.01 to 86400|a number of) seconds, got", capsys.readouterr().err)


@requires("smaps")
def test_a_process_without_a_mapping_of_linmem_is_refused(capsys):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert cli.main(["top", str(child.pid), "--once"]) == 1
        assert f"process {child.pid} has no mapping of linmem, or" in capsys.readouterr().err
    finally:
        child.communicate(b"\n")


@requires("smaps")
def test_a_process_that_has_ended_but_is_still_in_the_table_of_processes_ends_the_table(process, capsys):
    process.stdout.readline()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert cli.main(["top", str(process.pid), "--once"]) == 1
    assert f"/proc/{process.pid}/smaps: the process has ended, or belongs to the kernel" in capsys.readouterr().err


# -- what a process publishes -------------------------------------------------------------------------------

PUBLISHING = """
import sys
import linmem, linmem.metrics
frames = linmem.create(65536, maximum=1 << 20, creator=linmem.creator("mmap", name="frames"))
frames.grow_to(131072)
frames.grow_to(262144)
frames.prefault()
pool = linmem.creator("pool", slots=4, name="guests")
slot = pool.create(65536)
pool.create(65536).close()
publication = linmem.metrics.publish(pool, interval=0.02)
print(frames.as_ptr(), slot.as_ptr(), flush=True)
while sys.stdin.readline():
    frames.grow_to(frames.byte_size() + 65536)
    print("grown", flush=True)
"""


@contextlib.contextmanager
def publishing(code=PUBLISHING):
    child = start_child(code)
    try:
        yield child
    finally:
        child.communicate(timeout=60)


@requires("smaps", "published", "real_pages")
def test_growths_names_and_pools_of_a_process_that_publishes_them_are_shown(capsys):
    with publishing() as child:
        frames, slot = map(int, child.stdout.readline().split())
        assert cli.main(["top", str(child.pid), "--once"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert lines[0][-2:] == ["GROWTHS", "NAME"]
        (of_frames,) = [line for line in lines if line[0] == f"{frames:#x}"]
        assert of_frames[1:5] + of_frames[-2:] == ["256", "KiB", "256", "KiB", "2", "frames"]
        (of_slot,) = [line for line in lines if line[0] == f"{slot:#x}"]
        assert of_slot[1:3] + of_slot[-2:] == ["64", "KiB", "0", "guests"]
        (of_pool,) = [" ".join(line) for line in lines if line[0] == "pool"]
        assert of_pool.startswith("pool guests: 1 live, 1 warm, 0 cold of 4 slots; 0 hits, 2 misses; ")


@requires("smaps", "published", "real_pages")
def test_the_published_figures_follow_the_memories():
    with publishing() as child:
        frames = int(child.stdout.readline().split()[0])
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == "grown\n"
        end = time.monotonic() + 60
        while top.look_at(child.pid)[2].memories[frames] != (3, "frames"):
            assert time.monotonic() < end


@requires("published")
def test_a_publication_ends_with_close_with_its_block_and_with_its_last_reference():
    me = os.getpid()
    mem = linmem.create(1)
    first = linmem.metrics.publish()
    assert [one["base"] for one in publication.read_published(me)["memories"] if one["base"] == mem.as_ptr()]
    first.close()
    first.close()
    assert publication.read_published(me) is None
    with linmem.metrics.publish(interval=86400):
        assert publication.read_published(me)["pools"] == []
    assert publication.read_published(me) is None
    last = linmem.metrics.publish()
    del last
    assert publication.read_published(me) is None


@requires("published")
@pytest.mark.parametrize("kind", [Interrupt, TimeoutError])
def test_close_of_a_publication_finishes_what_an_interrupt_left(kind):
    nth, happened = 0, True
    while happened:
        nth += 1
        before = descriptors()
        published = linmem.metrics.publish(interval=86400)
        interrupting = Interrupting(nth, publication.__file__, threading.__file__, error=kind)
        try:
            with interrupting:
                published.close()
        except kind:
            pass
        else:
            happened = False
        assert happened == (interrupting.place is not None)
        again = threading.Thread(target=published.close, daemon=True)
        again.start()
        again.join(60)
        assert not again.is_alive(), interrupting.place
        assert publication.read_published(os.getpid()) is None, interrupting.place
        assert descriptors() == before
    assert nth > 5


@requires("published")
def test_an_interrupt_anywhere_in_publish_leaves_nothing_published():
    nth, happened = 0, True
    while happened:
        nth += 1
        before = descriptors()
        with Interrupting(nth, publication.__file__) as interrupting, contextlib.suppress(Interrupt):
            linmem.metrics.publish(interval=86400)
        happened = interrupting.place is not None
        assert publication.read_published(os.getpid()) is None, interrupting.place
        assert descriptors() == before, interrupting.place
    assert nth > 10


@requires("published")
def test_a_publication_leaves_the_descriptor_of_other_code_alone(tmp_path):
    published = linmem.metrics.publish(interval=86400)
    fd = published._file[0]
    with open(tmp_path / "other", "wb") as other:
        os.dup2(other.fileno(), fd)         # as a daemon closes all descriptors and opens others
        published.close()
        assert os.fstat(fd).st_ino == os.fstat(other.fileno()).st_ino
        os.close(fd)


@requires("fork", "published")
def test_a_forked_child_publishes_nothing_until_it_calls_publish():
    answer(FORKING + """
import linmem.metrics
from linmem._core import publication
kept = linmem.metrics.publish(interval=0.01)
def in_child():
    assert publication.read_published(os.getpid()) is None
    kept.close()
    with linmem.metrics.publish():
        assert publication.read_published(os.getpid())["pid"] == os.getpid()
# Without a GIL, the thread that publishes may hold a lock of CPython at a fork, and the child then waits for ever.
has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
for _ in range(20 if has_gil else 2):
    child(os.fork, in_child)
assert publication.read_published(os.getpid())["pid"] == os.getpid()
""")


def offer(text, seal=True):
    """Opens a file as a process does that publishes figures."""
    fcntl = pytest.importorskip("fcntl")
    fd = os.memfd_create("linmem-figures", os.MFD_ALLOW_SEALING)
    os.write(fd, text)
    if seal:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


ONE = {"start": 4096, "base": 8192, "end": 16384, "size": 1, "growths": 0, "name": None}
MINE = {"pid": os.getpid(), "time": 0.0, "memories": [ONE], "pools": []}
HOSTILE = {
    "no JSON": b"{", "an endless array": b"[" * 100_000, "another process": json.dumps({**MINE, "pid": 1}).encode(),
    "a list": b"[1]", "no time": json.dumps({"pid": os.getpid()}).encode(),
    "a huge number": b'{"pid": %d, "time": %s}' % (os.getpid(), b"9" * 10_000),
    **{name: json.dumps({**MINE, **part}).encode() for name, part in {
        "no memories": {"memories": None}, "an address that is a text": {"memories": [{**ONE, "base": "8192"}]},
        "an address beyond": {"memories": [{**ONE, "end": 2**64}]},
        "a pool without figures": {"pools": [{"name": "a"}]}}.items()},
}


@requires("published")
@pytest.mark.parametrize("name", [*HOSTILE, "not sealed", "too large"])
def test_what_linmem_does_not_publish_is_not_shown(name):
    text = HOSTILE.get(name) or json.dumps(MINE).encode().ljust((1 << 22) + 1 if name == "too large" else 1)
    fd = offer(text, seal=name != "not sealed")
    try:
        assert top.check_published(publication.read_published(os.getpid())) is None
    finally:
        os.close(fd)


@requires("published")
def test_a_published_name_cannot_write_to_the_terminal():
    fd = offer(json.dumps({**MINE, "memories": [{**ONE, "name": "\x1b[2J" + "n" * 10_000}]}).encode())
    try:
        ((growths, name),) = top.check_published(publication.read_published(os.getpid())).memories.values()
    finally:
        os.close(fd)
    assert (growths, name) == (0, "\\x1b[2J" + "n" * 96)


def test_mappings_without_a_name_count_where_a_published_reservation_lies():
    unnamed = [line.replace("[anon:linmem]", "") for line in SMAPS.splitlines(keepends=True)]
    rows, inaccessible = top.memories(top.mappings(unnamed, [(0x10000, 0x40000), (0xb8000, 0xba000)]))
    assert rows == [top.Row(0x20000, 0x30000, 20 << 10, 0x10000, False),
                    top.Row(0x60000, 0x70000, 8 << 10, 0, False),
                    top.Row(0xa0000, 0xb0000, 64 << 10, 0, True),
                    top.Row(0xb8000, 0xba000, 0, 0, False)]
    assert inaccessible == 0x20000


@pytest.mark.parametrize("bad", [0, -1, 86401, float("nan"), "1", None, True])
def test_an_invalid_interval_is_refused_by_its_name(bad):
    with pytest.raises((ValueError, TypeError), match=r"^interval must be "):
        linmem.metrics.publish(interval=bad)


def test_publish_refuses_what_is_no_pool():
    with pytest.raises(TypeError, match="pools must be PoolingCreators, got MmapCreator"):
        linmem.metrics.publish(linmem.MmapCreator())
