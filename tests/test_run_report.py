"""The report of `linmem run`: the names of memories, and the picture of their sizes over time."""

from __future__ import annotations

import html
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import types
import xml.etree.ElementTree as ET

import pytest
import wasmtime
from support import requires
from test_cli import ENVIRONMENT, RUNS_ON, SECONDS

import linmem
from linmem import cli
from linmem._commands import run_report
from linmem._wasm import known_files
from linmem._wasm.module import Module

PAGE = 65536
GROWS = """
(module
  (memory 2) (memory (export "main") (export "again") 1)
  (func (export "_start")
    (drop (memory.grow 0 (i32.const 1))) (drop (memory.grow 1 (i32.const 2))) (drop (memory.grow 1 (i32.const 3)))))
"""
HAS_A_HEAP = """
(module (type $box (struct (field i32))) (memory (export "m") 1) (global $kept (mut (ref null $box)) (ref.null $box))
  (func (export "_start") (global.set $kept (struct.new $box (i32.const 1)))))
"""
TRAPS = '(module (memory (export "m") 1) (func (export "_start") (drop (memory.grow (i32.const 1))) unreachable))'
TWO = '(module (memory (export "first") 1) (memory (export "second") 64) (func (export "_start")))'


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs the text of a program; returns the exit code and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(text, *words):
        (tmp_path / "guest.wat").write_text(text)
        code = cli.main(["run", "--no-cache", *words, "guest.wat"])
        out, error = capfd.readouterr()
        assert out == ""
        return code, error
    return run


def memories(found):
    code, error = found
    return code, [(memory["name"], memory["first_size"], memory["peak_size"])
                  for memory in json.loads(error.splitlines()[-1])["memories"]]


# -- names ------------------------------------------------------------------------------------------------------------

def takes_objects():
    try:
        wasmtime.Module(wasmtime.Engine(), HAS_A_HEAP)
    except wasmtime.WasmtimeError:
        return False
    return True


def test_a_memory_has_the_name_of_its_export_or_its_number(run):
    assert memories(run(GROWS, "--json")) == (0, [("memory 0", 2 * PAGE, 3 * PAGE), ("main", PAGE, 6 * PAGE)])


@pytest.mark.skipif(not takes_objects(), reason="this wasmtime has no references to objects by default")
def test_the_heap_for_objects_is_called_so(run):
    code, error = run(HAS_A_HEAP, "--json")
    assert (code, [memory["name"] for memory in json.loads(error)["memories"]]) == (0, ["GC heap", "m"])


def test_the_text_names_the_memories_too(run):
    _, error = run(GROWS, "--report")
    assert [line.partition(": ")[0] for line in error.splitlines()] == [
        "linmem", "  memory 0", "  main"]


def test_a_program_from_the_cache_has_the_same_names(run, monkeypatch, capfd):
    monkeypatch.setattr(known_files, "_RESOLUTION", -10**18)
    run(TWO)
    for _ in range(2):
        code = cli.main(["run", "--cache", "cache", "--json", "guest.wat"])
        found = memories((code, capfd.readouterr().err))
        assert found == (0, [("first", PAGE, PAGE), ("second", 64 * PAGE, 64 * PAGE)])


def test_a_program_that_could_not_get_all_its_memories_has_names_for_the_others(run):
    assert memories(run(TWO, "--json", "--max-memory", "128KiB")) == (1, [("first", PAGE, PAGE)])


def test_a_started_program_has_the_same_names(run, capfd):
    text = TWO.replace('(func (export "_start"))', '(func (export "_start")) (func (export "init")'
                       " (drop (memory.grow 0 (i32.const 4))))")
    with open("guest.wat", "w") as file:
        file.write(text)
    assert cli.main(["prewarm", "--no-cache", "--init", "init", "-o", "snapshot", "guest.wat"]) == 0
    capfd.readouterr()
    assert memories(run(text, "--start", "snapshot", "--json")) == (0, [
        ("first", 5 * PAGE, 5 * PAGE), ("second", 64 * PAGE, 64 * PAGE)])


def test_a_name_cannot_change_the_terminal_or_fill_it(run):
    name = "\x1b[2J\n" + "x" * 5000
    text = '(module (memory (export "' + r"\1b[2J\0a" + "x" * 5000 + '") 1) (func (export "_start")))'
    assert [found for found, *_ in memories(run(text, "--json"))[1]] == [name]
    _, error = run(text, "--report")
    line = error.splitlines()[1]
    assert line.startswith(r"  \x1b[2J\nxxx")
    assert len(line) < 300


@pytest.mark.parametrize(("sizes", "expected"), [
    ([2 * PAGE, PAGE], ["memory 0", "main"]), ([0, 2 * PAGE, PAGE], ["GC heap", "memory 0", "main"]),
    ([2 * PAGE, PAGE, 0], ["memory 0", "main", "GC heap"]), ([2 * PAGE], ["memory 0"]), ([], []),
    ([0], [None]), ([0, 0, 0], [None] * 3)])
def test_the_names_follow_from_the_order_in_which_the_memories_were_made(sizes, expected):
    program = types.SimpleNamespace(names_from=Module(wasmtime.wat2wasm(GROWS)))
    assert run_report.names_of(program, sizes) == expected


def test_without_a_module_no_name_is_known():
    assert run_report.names_of(None, [PAGE]) == [None]
    assert run_report.names_of(types.SimpleNamespace(names_from=Module(b"\0asm\1\0\0\0\5\xff")), [PAGE]) == [None]
    assert run_report.label({"name": None}, 3) == "memory number 3"


# -- the picture ------------------------------------------------------------------------------------------------------

def page_of(path="report.html"):
    """The title, the lines as lists of numbers (x, y, x, y, ...), and the cells of the table."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    assert not re.search(r"<script|<link|<img|https?:|url\(|@import", text)
    body = ET.fromstring("<body>" + text[text.index("<h1>"):text.index("</html>")] + "</body>")
    lines = [[float(number) for number in re.findall(r"[\d.]+", path.get("d"))]
             for path in body.iter("path") if path.get("class") == "line"]
    rows = [["".join(cell.itertext()) for cell in row] for row in body.iter("tr")]
    return body.find("h1").text, lines, rows


def test_the_html_draws_each_memory_and_needs_nothing_else(run):
    code, error = run(GROWS, "--report-file", "report.html")
    assert (code, error) == (0, "")         # the report itself was not asked for
    title, lines, rows = page_of()
    assert title == "guest.wat: exit code 0"
    assert [row[0] for row in rows] == ["memory", "memory 0", "main"]
    assert rows[2][1:3] == ["64 KiB", "384 KiB"]
    bottom, top = run_report._HEIGHT - run_report._BOTTOM, run_report._TOP
    heights = [[round((bottom - y) / (bottom - top) * 6, 1) for y in line[1::2]] for line in lines]
    assert heights == [[2, 3, 3], [1, 3, 6, 6]]         # the last point is the end of the run
    for line in lines:
        assert line[0::2] == sorted(line[0::2])
        assert line[-2] == 900


@requires("matplotlib")
def test_the_png_is_a_picture(run):
    code, error = run(GROWS, "--report-file", "report.png")
    assert (code, error) == (0, "")
    with open("report.png", "rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"


@requires("matplotlib")
def test_the_figure_has_a_step_line_for_each_memory_with_its_name():
    report = {"program": "a/$b$.wasm", "exit_code": 3, "memories": [
        {"name": "$x$", "peak_size": 2 << 20}, {"name": None, "peak_size": 1 << 20}]}
    figure = run_report.figure_of(report, [[(0, 1 << 20), (5, 2 << 20)], [(1, 1 << 20), (5, 0)]], 5)
    (axes,) = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[1, 2], [1, 0]]
    assert [line.get_drawstyle() for line in axes.lines] == ["steps-post"] * 2
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [r"\$x\$", "memory number 2"]
    assert (axes.get_title(), axes.get_ylabel()) == (r"\$b\$.wasm: exit code 3", "MiB")
    assert axes.get_xlim() == (0, 5e-9)


@pytest.mark.parametrize(("text", "words", "code", "drawn"), [
    (TRAPS, (), 134, 1), (TWO, ("--max-memory", "1KiB"), 1, 0), ("(module (", (), 1, 0),
    ('(module (memory 1) (func (export "other")))', (), 1, 0)])
def test_a_run_that_fails_is_drawn_too(run, text, words, code, drawn):
    assert run(text, "--report-file", "report.html", *words)[0] == code
    title, lines, _ = page_of()
    assert title == f"guest.wat: exit code {code}"
    assert len(lines) == drawn


@requires("interrupts")
def test_a_run_that_is_interrupted_is_drawn_too(tmp_path):
    (tmp_path / "guest.wat").write_text(RUNS_ON)
    process = subprocess.Popen(
        [sys.executable, "-m", "linmem", "run", "--no-cache", "--report-file", "report.html", "guest.wat"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=tmp_path)
    try:
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=SECONDS) == (b"", b"")
    finally:
        process.kill()
        process.wait()
    title, lines, rows = page_of(tmp_path / "report.html")
    assert (title, len(lines), rows[1][0]) == ("guest.wat: exit code 130", 1, "memory")


def test_names_in_the_html_are_text(run):
    run('(module (memory (export "<script>alert(1)</script>&") 1) (func (export "_start")))',
        "--report-file", "report.html")
    with open("report.html", encoding="utf-8") as file:
        text = file.read()
    assert "<script" not in text
    assert html.escape("<script>alert(1)</script>&") in text


@pytest.mark.parametrize(("path", "reason"), [
    ("report.svg", "the name must end in .png or .html"), ("report", "the name must end in .png or .html"),
    ("no/such.html", "/no' is not a directory"), ("folder.html", "it is a directory")])
def test_a_file_that_cannot_be_drawn_is_refused_before_the_run(run, path, reason):
    os.makedirs("folder.html")
    code, error = run(TRAPS, "--report-file", path)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"linmem run: --report-file {path}: ")
    assert error.replace("\\", "/").endswith(f"{reason}\n")


@pytest.mark.parametrize("option", ["--coredump", "--start"])
def test_a_report_does_not_replace_the_file_of_another_option(run, option):
    assert run(TRAPS, option, "one.html", "--report-file", "./one.html") == (
        2, f"linmem run: --report-file ./one.html: it is the FILE of {option} itself\n")
    assert not os.path.exists("one.html")


def test_a_memory_that_a_program_makes_after_the_report_is_not_drawn(tmp_path):
    path = tmp_path / "report.html"
    memory = dict.fromkeys(("first_size", "peak_size", "peak_resident", "growths", "grow_ns", "refused_growths"), 1)
    report = {"program": "p", "exit_code": 124, "max_memory": None, "creator": "mmap",
              "memories": [{"name": "memory", **memory}],
              "all": {"total_count": 1, "failures": 0, "peak_bytes": 1}}
    run_report.ReportFile(str(path), {}).write(report, [[(0, 1), (5, 2)], [(7, 3)]], 10)
    assert path.read_text().count('class="line"') == 1


def test_a_report_does_not_replace_the_program(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.html").write_text(TRAPS)
    assert cli.main(["run", "--no-cache", "--report-file", "./program.html", "program.html"]) == 2
    assert capfd.readouterr().err == "linmem run: --report-file ./program.html: it is PROGRAM itself\n"
    assert (tmp_path / "program.html").read_text() == TRAPS


def test_a_png_without_matplotlib_is_refused_and_an_html_is_drawn(run, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    code, error = run(TRAPS, "--report-file", "report.png")
    assert (code, error.count("\n")) == (2, 1)
    assert "needs matplotlib: pip install 'linmem[image]'" in error
    assert run(TRAPS, "--report-file", "report.html")[0] == 134
    assert page_of()[1]


# -- StatisticsCreator.timeline ---------------------------------------------------------------------------------------

def test_the_timeline_has_each_size_of_each_memory_until_its_end():
    creator = linmem.StatisticsCreator(linmem.MmapCreator(), timeline=10)
    first = linmem.create(PAGE, creator=creator)
    first.grow_to(2 * PAGE)
    with linmem.create(3 * PAGE, creator=creator):
        first.grow_to(5 * PAGE)
        assert [[size for _, size in line] for line in creator.timeline()] == [
            [3 * PAGE], [PAGE, 2 * PAGE, 5 * PAGE]]
    first.close()
    timeline = creator.timeline()
    assert [[size for _, size in line] for line in timeline] == [[PAGE, 2 * PAGE, 5 * PAGE, 0], [3 * PAGE, 0]]
    for line in timeline:
        assert line[0][0] >= 0
        assert line == sorted(line, key=lambda change: change[0])


@pytest.mark.parametrize("room", [2, 3, 4, 7])
def test_a_full_timeline_keeps_the_first_and_the_last_size(room):
    creator = linmem.StatisticsCreator(linmem.MmapCreator(), timeline=room)
    with linmem.create(0, creator=creator) as mem:
        for size in range(1, 200):
            mem.grow_to(size)
            sizes = [size for _, size in creator.timeline()[0]]
            assert (sizes[0], sizes[-1]) == (0, size)
            assert len(sizes) <= room
            assert sizes == sorted(sizes)


def test_without_the_option_there_is_no_timeline():
    creator = linmem.StatisticsCreator(linmem.MmapCreator())
    with linmem.create(PAGE, creator=creator):
        assert creator.timeline() == [[]]


@pytest.mark.parametrize("bad", [1, (1 << 20) + 1])
def test_a_timeline_of_one_change_or_of_too_many_is_refused(bad):
    with pytest.raises(ValueError, match=f"timeline must be 0, or 2 to 1048576 changes, got {bad}"):
        linmem.StatisticsCreator(linmem.MmapCreator(), timeline=bad)


def test_a_record_has_the_address_of_its_memory():
    creator = linmem.StatisticsCreator(linmem.MmapCreator())
    with linmem.create(PAGE, creator=creator, may_move=True, reserve=0) as mem:
        assert creator.memories()[0]["base"] == mem.as_ptr()
        mem.grow_to(1 << 26)
        assert creator.memories()[0]["base"] == mem.as_ptr()
