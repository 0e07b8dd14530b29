"""`linmem top`: the memories of another process, from the tables of the operating system."""

import subprocess
import sys

import pytest
from support import requires

from linmem import cli
from linmem._commands import top
from linmem._commands.parser import Refused

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
    rows, _ = top.look_at(process.pid)
    by_address = {row.address: (row.end - row.address, row.resident) for row in rows}
    assert by_address[small] == (65536, 0)
    assert by_address[large] == (1 << 20, 1 << 20)
    assert cli.main(["top", str(process.pid), "--once"]) == 0
    assert f"{large:#x}" in capsys.readouterr().out


@requires("smaps", "sealed", "maps_images", "real_pages")
def test_a_memory_that_started_from_an_image_and_the_image_are_shown(process):
    *_, started = map(int, process.stdout.readline().split())
    rows, _ = top.look_at(process.pid)
    assert [(row.end - row.address, row.resident, row.is_image) for row in rows if row.address == started] == [
        (65536, 65536, False)]
    assert [row.end - row.address for row in rows if row.is_image] == [65536]


def test_the_table_is_printed_until_the_process_ends(monkeypatch, capsys):
    found = top.memories(top.mappings(SMAPS.splitlines(keepends=True)))
    looks = iter([found, found])

    def look(pid):
        try:
            return next(looks)
        except StopIteration:
            raise Refused("there is no process") from None

    monkeypatch.setattr(top, "look_at", look)
    assert cli.main(["top", "1", "--interval", "0"]) == 0
    assert capsys.readouterr().out.count("ADDRESS") == 2


@requires("smaps")
def test_a_process_without_a_mapping_of_linmem_is_refused(capsys):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert cli.main(["top", str(child.pid), "--once"]) == 1
        assert f"process {child.pid} has no mapping of linmem, or" in capsys.readouterr().err
    finally:
        child.communicate(b"\n")
