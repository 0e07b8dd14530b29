"""The files that `linmem run` and `linmem prewarm` write: what a hostile program cannot do to them."""

from __future__ import annotations

import json
import os
import stat

import pytest
from support import requires

from linmem import cli
from linmem._wasm import known_files

# The program replaces the file that linmem is about to write, or its folder, by a link to what it may not write to.
PROGRAM = """(module
  (import "wasi_snapshot_preview1" "path_symlink" (func $link (param i32 i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "path_rename" (func $rename (param i32 i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "{target}") (data (i32.const 100) "{place}") (data (i32.const 200) "{moved}")
  (func $replace
    (if (call $rename (i32.const 3) (i32.const 100) (i32.const {size})
                      (i32.const 3) (i32.const 200) (i32.const {moved_size}))
      (then unreachable))
    (if (call $link (i32.const 0) (i32.const {target_size}) (i32.const 3) (i32.const 100) (i32.const {size}))
      (then unreachable)))
  (func (export "_start") (call $replace) {end})
  (func (export "wizer.initialize") (call $replace)))"""
TRAPS, RETURNS = "unreachable", ""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("precious")
    (tmp_path / "its" / "out").mkdir(parents=True)
    (tmp_path / "its" / "out" / "result.html").write_text("old")
    return tmp_path


@pytest.fixture
def program(here):
    """Writes the program that moves a place in its directory, and links it to the target; returns its name."""
    def make(place, target, end, moved="moved"):
        (here / "guest.wat").write_text(PROGRAM.format(
            place=place, size=len(place), target=target, target_size=len(target), end=end, moved=moved,
            moved_size=len(moved)))
        return "guest.wat"
    return make


OUTPUTS = [pytest.param(["--coredump", "its/out/result.html"], TRAPS, 134, id="coredump"),
           pytest.param(["--report-file", "its/out/result.html"], RETURNS, 0, id="report"),
           pytest.param(["--report-file", "its/out/result.html"], TRAPS, 134, id="report after a trap")]


def is_written(path):
    return path.read_bytes().startswith((b"<!DOCTYPE html>", b"\0asm"))


@requires("owners")
@pytest.mark.parametrize(("words", "end", "code"), OUTPUTS)
def test_a_link_that_the_program_puts_in_the_place_of_the_file_is_not_followed(here, program, words, end, code):
    guest = program("out/result.html", "../../mine/file", end)
    assert cli.main(["run", "--no-cache", "--dir", "its", *words, guest]) == code
    assert (here / "mine" / "file").read_text() == "precious"
    assert os.listdir("mine") == ["file"]
    assert stat.S_ISREG(os.lstat("its/out/result.html").st_mode)
    assert is_written(here / "its" / "out" / "result.html")


@requires("owners")
@pytest.mark.parametrize(("words", "end", "code"), OUTPUTS)
@pytest.mark.parametrize("opens", [True, False])
def test_a_link_that_the_program_puts_in_the_place_of_the_folder_is_not_followed(here, program, monkeypatch, capfd,
                                                                                 words, end, code, opens):
    if not opens:
        monkeypatch.delattr(os, "O_PATH", raising=False)
    opens = hasattr(os, "O_PATH")
    guest = program("out", "../mine", end)
    found = cli.main(["run", "--no-cache", "--dir", "its", *words, guest])
    assert os.listdir("mine") == ["file"]
    assert is_written(here / "its" / "moved" / "result.html") == opens
    assert ("A folder was replaced by a link" in capfd.readouterr().err) == (not opens)
    assert found == (code if opens else code or 1)


@requires("owners")
@pytest.mark.parametrize(("place", "target"), [("out/result.html", "../../mine/file"), ("out", "../mine")])
def test_prewarm_follows_no_link_of_the_program(here, program, capfd, place, target):
    guest = program(place, target, RETURNS)
    assert cli.main(["prewarm", "--no-cache", "--dir", "its", "-o", "its/out/result.html", guest]) == 1
    assert "the program replaced it, or a folder of it, by a link" in capfd.readouterr().err
    assert os.listdir("mine") == ["file"]
    assert (here / "mine" / "file").read_text() == "precious"


@requires("fifos")
@pytest.mark.parametrize("option", ["--coredump", "--report-file"])
@pytest.mark.parametrize("make", [lambda: os.mkfifo("pipe.html"), lambda: os.symlink(os.devnull, "pipe.html")])
def test_what_is_no_regular_file_is_refused_before_the_program_runs(here, program, capfd, option, make):
    guest = program("out", "../mine", TRAPS)
    make()
    assert cli.main(["run", "--no-cache", "--dir", "its", option, "pipe.html", guest]) == 2
    assert capfd.readouterr().err == f"linmem run: {option} pipe.html: it is not a regular file\n"
    assert os.listdir("its") == ["out"]


@requires("fifos")
@pytest.mark.parametrize(("words", "end", "code"), OUTPUTS)
def test_a_pipe_that_the_program_puts_in_the_place_of_the_file_is_not_opened(here, program, words, end, code):
    os.mkfifo("its/pipe")       # no process reads it, so a program that opens it waits for ever
    guest = program("pipe", "nothing", end, moved="out/result.html")
    assert cli.main(["run", "--no-cache", "--dir", "its", *words, guest]) == code
    assert is_written(here / "its" / "out" / "result.html")


@requires("fifos")
@pytest.mark.parametrize("end", [RETURNS, TRAPS])
def test_a_program_that_puts_a_pipe_in_its_own_place_does_not_block_the_report(here, program, monkeypatch, capfd, end):
    monkeypatch.setattr(known_files, "_RESOLUTION", -10**18)
    os.rename(program("pipe", "nothing", end, moved="guest.wat"), "its/guest.wat")
    words = ["run", "--cache", "cache", "--dir", "its", "--json", "its/guest.wat"]
    assert cli.main(words) == 134       # there is no pipe to move
    os.mkfifo("its/pipe")
    assert cli.main(words) == (134 if end else 0)
    report = json.loads(capfd.readouterr().err.splitlines()[-1])
    assert [memory["name"] for memory in report["memories"]] == ["memory"]
    assert stat.S_ISFIFO(os.stat("its/guest.wat").st_mode)


@requires("owners")
def test_a_link_of_the_user_is_followed(here, program):
    os.symlink("../mine/new.html", "its/link.html")
    guest = program("out", "../mine", RETURNS)
    assert cli.main(["run", "--no-cache", "--dir", "its", "--report-file", "its/link.html", guest]) == 0
    assert is_written(here / "mine" / "new.html")
    assert os.path.islink("its/link.html")
