"""A beginner who follows a tutorial word by word sees what the page says.

tests/newcomer/page.py says what the blocks of a page mean. Commands that end with `&` run until the other commands of
the block have ended.
"""

import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from newcomer.page import KILLED, Step, steps
from support import ROOT, build_extension, load_extension, requires

import linmem

pytest.importorskip("wasmtime")

PAGES = ROOT / "docs" / "tutorials"
TUTORIALS = [
    pytest.param("column-store", marks=requires("file_memories", "numpy")),
    pytest.param("plugin-sandbox", marks=requires("gil")),      # without it, wasmtime-py prints errors at its end
    pytest.param("emulator", marks=[requires("compiler", "shared", "maps_images"), pytest.mark.slow]),
]


def steps_of(page: str) -> list[Step]:
    """The steps after the installation."""
    return [step for step in steps((PAGES / f"{page}.md").read_text("utf-8")) if not step.installs]


def file_of(page: str, name: str) -> str:
    (text,) = [step.text for step in steps_of(page) if step.file == name]
    return text


def arguments(line: str) -> list[str]:
    """The command that a shell would find in a virtual environment."""
    program, *rest = shlex.split(line)
    programs = {"python": ["-W", "error"], "cythonize": ["-m", "Cython.Build.Cythonize"]}
    return [sys.executable, *programs[program], *rest] if program in programs else [program, *rest]


def run(text: str, folder: Path) -> tuple[str, int]:
    """What the commands print, and the status of the last one."""
    home = str(Path(linmem.__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": home, "PYTHONSAFEPATH": ""}
    printed, status, background = "", 0, []
    try:
        for line in text.splitlines():
            assert status == 0, printed
            command = arguments(line.removesuffix("&"))
            if line.endswith("&"):
                background.append(subprocess.Popen(command, cwd=folder, env=environment))
                continue
            done = subprocess.run(command, cwd=folder, env=environment, timeout=120, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            printed, status = printed + done.stdout, done.returncode
        for child in background:
            assert child.wait(60) == 0
    finally:
        for child in background:
            child.kill()
            child.wait()
    return printed, status


@pytest.mark.parametrize("page", TUTORIALS)
def test_a_beginner_who_follows_a_tutorial_sees_what_the_page_says(page, tmp_path):
    for step in steps_of(page):
        if step.file:
            (tmp_path / step.file).write_text(step.text, "utf-8")
            continue
        printed, status = run(step.commands, tmp_path)
        assert status == (-signal.SIGKILL if step.status == KILLED else step.status), printed
        assert step.shown is None or printed == step.shown


@pytest.mark.parametrize("page", sorted(path.stem for path in PAGES.glob("*.md")))
def test_a_tutorial_says_what_to_install_names_its_files_and_is_in_the_test_above(page):
    text = (PAGES / f"{page}.md").read_text("utf-8")
    assert re.search(r'^pip install ("linmem\[\w+\]"|linmem )', text, re.MULTILINE)
    assert [step.file for step in steps_of(page) if step.file and f"`{step.file}`" not in text] == []
    assert page in [each.values[0] for each in TUTORIALS]


def test_the_column_store_has_at_most_60_lines():
    assert len(file_of("column-store", "store.py").splitlines()) <= 60


@requires("compiler", "zig", "shared")
@pytest.mark.slow
def test_the_emulator_computes_what_the_machine_computes(tmp_path):
    pytest.importorskip("Cython")
    build_extension(tmp_path, "machine", file_of("emulator", "machine.pyx"))
    machine = load_extension(tmp_path, "machine")
    source = ROOT / "tests" / "programs" / "integers.c"
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    subprocess.run([compiler, "-o", tmp_path / "native", source], check=True, timeout=300)
    expected = int(subprocess.run([tmp_path / "native"], check=True, timeout=60, capture_output=True).stdout)
    (tmp_path / "layout").write_text("""SECTIONS {
        . = 0;
        .text : { *(.text* .rodata* .srodata*) }
        . = 0x10000;
        .data : { *(.data* .sdata* .bss* .sbss*) }
        /DISCARD/ : { *(.eh_frame*) }
    }""")
    for level in "-O0", "-O2":
        subprocess.run([sys.executable, "-m", "ziglang", "cc", "-target", "riscv32-freestanding",
                        "-mcpu=generic_rv32-m-a-c-f-d", level, "-fno-sanitize=all", "-ffreestanding", "-nostdlib",
                        f"-Wl,--no-eh-frame-hdr,-T,{tmp_path / 'layout'}", source, "-o", tmp_path / "guest"],
                       check=True, timeout=300)
        with linmem.create(0x20000) as bus:
            computer = machine.Machine(bus, 0x10000)
            computer.state = load(tmp_path / "guest", bus), [0] * 32
            assert computer.run() == expected


def load(path: Path, bus: linmem.Memory) -> int:
    """Write the segments of an ELF file into the memory. Returns the address of the first instruction."""
    raw = path.read_bytes()
    entry, table = struct.unpack_from("<II", raw, 24)
    for number in range(struct.unpack_from("<H", raw, 44)[0]):
        kind, offset, address, _, size = struct.unpack_from("<5I", raw, table + 32 * number)
        if kind == 1:       # PT_LOAD
            bus.write(address, raw[offset:offset + size])
    return entry
