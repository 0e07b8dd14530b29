"""The cache of compiled programs: what is compiled again, what is not even read, and what is refused early."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import sys
import threading
import types

import pytest
import wasmtime
from support import answer, requires, run_child
from test_cli import linmem_process

from linmem import cli
from linmem._commands import compile_cache
from linmem._wasm import compiled, image_cache, known_files, offered, prepared
from linmem._wasm.image_cache import Cache

# The exit code is a digit in the text, so that programs of equal size behave differently.
EXITS = """(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32))) (memory (export "memory") 1)
  (func (export "_start") (call $exit (i32.const {}))))"""
LIBRARY = '(module (memory (export "memory") 1) (func (export "useful")) (global (export "_start") i32 (i32.const 1)))'
HIDES_THE_CURSOR, SHOWS_THE_CURSOR = "\x1b[?25l", "\x1b[?25h"
OPENS = """
    import sys
    from linmem import cli
    from linmem._wasm import compiled, known_files
    known_files._RESOLUTION = -10**18
    opened = []
    sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
    code = cli.main(["run", "--cache", "cache", *WORDS, "program.wat"])
    print(code, "program.wat" in opened)
"""
# The exit code of each is 0 if the data is in the memory; "*" is 42, and "i" is 105.
DATA = """(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1) (memory $second 2) (data (i32.const 60000) "*") (data (memory 1) (i32.const 9) "+")
  (func (export "_start")
    (call $exit (i32.ne (i32.add (i32.load8_u (i32.const 60000)) (i32.load8_u 1 (i32.const 9))) (i32.const 85)))))"""
DATA_COMPONENT = """(component
  (core module $lib (memory 1) (data (i32.const 60000) "library") (func (export "get") (result i32)
    (i32.load8_u offset=1 (i32.const 60000))))
  (core instance $lib (instantiate $lib))
  (core module $main (import "lib" "get" (func $get (result i32)))
    (memory 0) (memory 3) (data (memory 1) (i32.const 7) "*") (data (memory 1) (i32.const 80000) "far")
    (func (export "run") (result i32)
      (i32.ne (i32.add (call $get) (i32.load8_u 1 (i32.const 7))) (i32.const 147))))
  (core instance $main (instantiate $main (with "lib" (instance $lib))))
  (func $run (result (result)) (canon lift (core func $main "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))"""
PREPARED = [
    pytest.param(DATA, ["--fuel", "100000"], id="module, fuel"),
    pytest.param(DATA, ["--timeout", "60"], id="module, timeout"),
    *(pytest.param(DATA_COMPONENT, words, id=f"component, {words[0]}", marks=requires("components"))
      for words in (["--fuel", "100000"], ["--timeout", "60"], ["--json"], ["--report"],
                    ["--report-file", "report.html"]))]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current directory, with a program. Its state is noted also if it was just written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(known_files, "_RESOLUTION", -10**18)
    (tmp_path / "program.wat").write_text(EXITS.format(7))
    return tmp_path


@pytest.fixture
def compilations(monkeypatch):
    """A list that gets an item whenever wasmtime compiles a module."""
    found = []
    plain = wasmtime.Module.__init__
    monkeypatch.setattr(wasmtime.Module, "__init__", lambda self, *args: (found.append(1), plain(self, *args))[1])
    return found


@pytest.fixture
def linmem(capfd):
    """Runs the command line in this process: the exit code, standard output and standard error."""
    def run(*words):
        code = cli.main([str(word) for word in words])
        return code, *capfd.readouterr()
    return run


def run(linmem, cache="cache"):
    code, out, error = linmem("run", "--cache", cache, "program.wat")
    assert (out, error) == ("", "")
    return code


def notes():
    with contextlib.suppress(FileNotFoundError):
        return [os.path.join("cache", "notes", name) for name in sorted(os.listdir("cache/notes"))]
    return []


def entries(directory="cache"):
    return [entry.path for entry in Cache(directory).used()]


# -- what is compiled, and what is read ------------------------------------------------------------------------------

def test_a_program_is_compiled_once(here, linmem, compilations):
    assert [run(linmem) for _ in range(3)] == [7, 7, 7]
    assert len(compilations) == 1


@requires("owners")
def test_an_unchanged_program_is_not_even_opened(here):
    assert [answer(OPENS.replace("WORDS", "[]"), cwd=here) for _ in range(3)] == ["7 True", "7 False", "7 False"]


@requires("owners")
@pytest.mark.parametrize(("text", "words"), PREPARED)
def test_an_unchanged_program_that_is_prepared_is_not_even_opened(here, text, words):
    (here / "program.wat").write_text(text)
    code = OPENS.replace("WORDS", str(words))
    assert [answer(code, cwd=here) for _ in range(3)] == ["0 True", "0 False", "0 False"]


@requires("owners", "components")
def test_the_report_of_a_component_that_is_not_opened_is_the_same(here, linmem):
    (here / "program.wat").write_text(DATA_COMPONENT)
    names = []
    for _ in range(3):
        code, _, error = linmem("run", "--cache", "cache", "--json", "program.wat")
        names.append((code, [memory["name"] for memory in json.loads(error)["memories"]]))
    assert names == [(0, ["module 0, memory 0", "module 1, memory 0", "module 1, memory 1"])] * 3
    assert [name.endswith("-prepared") for name in notes()] == [True]


@requires("owners")
@pytest.mark.parametrize(("text", "words"), PREPARED[:3:2])
@pytest.mark.parametrize("change", ["removed", "touched", "damaged"])
@pytest.mark.parametrize("suffix", [".image", "cwasm", ".ccomponent"])
def test_a_prepared_program_is_prepared_again_if_an_entry_changed(here, linmem, text, words, change, suffix):
    (here / "program.wat").write_text(text)
    for _ in range(2):
        assert linmem("run", "--cache", "cache", *words, "program.wat") == (0, "", "")
        for entry in entries():
            if not entry.endswith(suffix):
                continue
            if change == "removed":
                os.unlink(entry)
            elif change == "touched":
                os.utime(entry)
            else:
                with open(entry, "r+b") as file:
                    file.seek(-100, os.SEEK_END)
                    file.write(b"damaged")


@requires("owners")
@pytest.mark.parametrize(("text", "words"), PREPARED[:3:2])
@pytest.mark.parametrize("change", [
    lambda note: note._replace(about="what no program wrote"), lambda note: note._replace(about="()"),
    lambda note: note._replace(entries=note.entries[:1]), lambda note: note._replace(entries=[]),
    lambda note: note._replace(entries=note.entries[::-1]), lambda note: note._replace(state="0 0 0 0 0"),
    lambda note: note._replace(path="other.wat"),
], ids=["no description", "an empty description", "no images", "no entries", "the wrong order", "another state",
        "another path"])
def test_a_wrong_note_of_a_prepared_program_is_not_used_and_is_written_again(here, linmem, text, words, change):
    (here / "program.wat").write_text(text)
    assert linmem("run", "--cache", "cache", *words, "program.wat") == (0, "", "")
    (path,) = notes()
    good = known_files.Note.read(path)
    with open(path, "w") as file:
        file.write(change(good).text())
    assert linmem("run", "--cache", "cache", *words, "program.wat") == (0, "", "")
    assert known_files.Note.read(path) == good


@requires("owners")
def test_a_note_of_another_version_of_linmem_is_not_used(here, linmem, monkeypatch):
    assert run(linmem) == 7
    (path,) = notes()
    assert known_files.Note.read(path) is not None
    monkeypatch.setattr(known_files, "FORMAT", known_files.FORMAT + 1)
    assert known_files.Note.read(path) is None


@requires("owners")
@pytest.mark.parametrize(("text", "words"), PREPARED[:3:2])
def test_an_image_of_very_many_runs_is_not_noted(here, linmem, monkeypatch, text, words):
    monkeypatch.setattr(offered, "_MAX_RUNS", 0)
    (here / "program.wat").write_text(text)
    for _ in range(2):
        assert linmem("run", "--cache", "cache", *words, "program.wat") == (0, "", "")
    assert notes() == []


@requires("owners")
@pytest.mark.parametrize(("text", "words"), PREPARED[:3:2])
def test_a_program_runs_although_another_process_removes_its_image_meanwhile(here, linmem, monkeypatch, text, words):
    plain = prepared.Prepared._described
    monkeypatch.setattr(prepared.Prepared, "_described", lambda self: (
        [os.unlink(entry) for entry in entries() if entry.endswith(".image")], plain(self))[1])
    (here / "program.wat").write_text(text)
    assert linmem("run", "--cache", "cache", *words, "program.wat") == (0, "", "")
    assert notes() == []


@requires("owners")
@pytest.mark.parametrize(("text", "words"), PREPARED[2:4])
def test_a_program_whose_images_found_no_room_is_prepared_anew_in_the_next_run(here, linmem, monkeypatch, text, words):
    (here / "program.wat").write_text(text)
    with monkeypatch.context() as patched:
        patched.setattr(prepared, "_images", lambda *arguments: (_ for _ in ()).throw(OverflowError("no room")))
        assert linmem("run", "--cache", "cache", *words, "program.wat")[0] == 0
    assert notes() == []
    assert linmem("run", "--cache", "cache", *words, "program.wat")[0] == 0
    assert len(notes()) == 1


@requires("owners")
def test_a_program_with_the_size_and_the_modification_time_of_another_is_read_again(here, linmem):
    assert run(linmem) == 7
    before = os.stat("program.wat")
    (here / "program.wat").write_text(EXITS.format(8))
    os.utime("program.wat", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat("program.wat").st_size, os.stat("program.wat").st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert run(linmem) == 8


@requires("owners")
def test_a_file_that_takes_the_place_of_the_program_is_read(here, linmem):
    assert run(linmem) == 7
    before = os.stat("program.wat")
    (here / "other.wat").write_text(EXITS.format(9))
    os.utime("other.wat", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace("other.wat", "program.wat")
    assert run(linmem) == 9


def test_a_program_that_was_just_changed_is_not_noted(here, linmem, compilations, monkeypatch):
    monkeypatch.setattr(known_files, "_RESOLUTION", 10**18)
    assert [run(linmem), run(linmem)] == [7, 7]
    assert (notes(), len(compilations)) == ([], 1)


def test_a_program_that_changes_while_it_is_read_is_not_noted(here, linmem, monkeypatch):
    read = os.fstat
    monkeypatch.setattr(known_files, "os", types.SimpleNamespace(
        **{**vars(os), "fstat": lambda fd: (read(fd), (here / "program.wat").chmod(0o640))[0]}))
    (here / "program.wat").chmod(0o600)
    assert run(linmem) == 7
    assert notes() == []


@requires("owners")
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_program_that_others_may_write_to_is_not_noted(here, linmem, compilations, mode):
    (here / "program.wat").chmod(mode)
    assert [run(linmem), run(linmem)] == [7, 7]
    assert (notes(), len(compilations)) == ([], 1)


@requires("root")
def test_a_program_of_another_user_is_not_noted(here, linmem):
    os.chown("program.wat", 12345, -1)
    assert run(linmem) == 7
    assert notes() == []


@requires("fifos")
def test_a_program_may_come_from_a_pipe(here, linmem):
    os.mkfifo("pipe.wat")
    for code in (3, 4):
        writer = threading.Thread(target=lambda code=code: (here / "pipe.wat").write_text(EXITS.format(code)))
        writer.start()
        assert linmem("run", "--cache", "cache", "pipe.wat") == (code, "", "")
        writer.join()
    assert notes() == []


@requires("owners")
def test_a_damaged_entry_is_made_again(here, linmem, compilations):
    assert run(linmem) == 7
    (entry,) = entries()
    with open(entry, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"damaged")
    assert [run(linmem), run(linmem)] == [7, 7]
    assert len(compilations) == 2


@requires("owners")
@pytest.mark.parametrize("change", [
    lambda text: b"", lambda text: b"\xff\xfe\0", lambda text: text + b"more\n", lambda text: text.splitlines()[0],
    lambda text: text.replace(b".cwasm", b".other"), lambda text: text.replace(b" ", b"  "),
], ids=["empty", "no text", "a line too many", "a line", "no such entry", "another state"])
def test_a_damaged_note_is_not_used_and_is_written_again(here, linmem, compilations, change):
    assert run(linmem) == 7
    (path,) = notes()
    with open(path, "rb") as file:
        good = file.read()
    with open(path, "wb") as file:
        file.write(change(good))
    assert run(linmem) == 7
    with open(path, "rb") as file:
        assert file.read() == good
    assert len(compilations) == 1


@requires("owners", "fifos")
@pytest.mark.parametrize("make", [os.mkdir, lambda path: os.mkfifo(path)])
@pytest.mark.parametrize("place", ["note", "entry", "notes"])
def test_a_pipe_or_a_folder_in_the_cache_neither_blocks_nor_fails_a_command(here, linmem, make, place):
    assert run(linmem) == 7
    (path,) = {"note": notes, "entry": entries, "notes": lambda: ["cache/notes"]}[place]()
    shutil.rmtree(path) if place == "notes" else os.unlink(path)
    make(path)
    assert linmem("cache", "info", "--cache", "cache")[::2] == (0, "")
    assert linmem("cache", "prune", "--cache", "cache", "--max-size", "1GiB")[::2] == (0, "")
    if make is os.mkdir and place == "entry":       # the new entry would have the name of the folder
        code, _, error = linmem("run", "--cache", "cache", "program.wat")
        assert (code, error.count("\n")) == (7, 1)
        assert error.startswith("linmem run: not cached: ")
    else:
        assert [run(linmem), run(linmem)] == [7, 7]


@requires("owners")
def test_an_entry_that_this_wasmtime_does_not_take_is_made_again(here, linmem, compilations):
    assert run(linmem) == 7
    (entry,), (note,) = entries(), notes()
    with open(entry, "wb") as file:
        file.write(b"of another version")
    noted = known_files.Note.read(note)
    ((_, path),) = noted.entries
    with open(note, "w") as file:
        file.write(noted._replace(entries=[(known_files.state_of(os.stat(entry)), path)]).text())
    assert run(linmem) == 7
    assert len(compilations) == 2


@requires("owners")
@pytest.mark.parametrize("place", [".", "notes"])
def test_a_folder_that_others_may_write_to_is_refused(here, linmem, place):
    assert run(linmem) == 7
    (here / "cache" / place).chmod(0o722)
    code, out, error = linmem("run", "--cache", "cache", "program.wat")
    assert (code, out) == (1, "")
    assert "may be written by others (mode 722)" in error


def test_a_run_that_starts_from_a_snapshot_uses_what_prewarm_compiled(here, linmem, compilations):
    (here / "program.wat").write_text('(module (memory (export "memory") 1) (func (export "f") (result i32)'
                                      ' (i32.load (i32.const 0))) (data (i32.const 0) "*"))')
    assert linmem("prewarm", "program.wat", "--init", "f", "--cache", "cache", "-o", "snapshot")[0] == 0
    del compilations[:]
    words = "--cache", "cache", "--invoke", "f", "program.wat"
    assert linmem("run", "--start", "snapshot", *words) == (0, "42\n", "")
    assert compilations == []


@requires("components")
def test_components_are_cached_like_modules(here):
    from wasmtime import component

    engine = wasmtime.Engine()
    wasm = bytes(wasmtime.wat2wasm("(component (core module (memory 1)))"))
    cache = Cache("cache")
    made, path = compiled.compiled(engine, wasm, cache, component.Component)
    found, same = compiled.compiled(engine, wasm, cache, component.Component)
    assert type(made) is type(found) is component.Component
    assert (path, path.endswith(known_files.COMPONENT), entries()) == (same, True, [path])
    module, other = compiled.compiled(engine, bytes(wasmtime.wat2wasm("(module)")), cache)
    assert (type(module), other.endswith(known_files.MODULE), len(entries())) == (wasmtime.Module, True, 2)


@pytest.mark.parametrize("times", [1, 3])
def test_an_entry_is_added_although_prune_removes_its_empty_folder_meanwhile(here, linmem, monkeypatch, times):
    plain, removed = image_cache.draft, []

    def draft(folder):
        if len(removed) < times:
            os.rmdir(folder)
            removed.append(folder)
        return plain(folder)

    monkeypatch.setattr(image_cache, "draft", draft)
    assert run(linmem) == 7
    assert (len(removed), len(entries())) == (times, 1)


def test_an_entry_is_added_although_prune_removes_its_folder_while_it_is_made(here, linmem, monkeypatch):
    plain, failed = os.makedirs, []

    def makedirs(path, *arguments, **options):
        if not failed and os.path.dirname(path).endswith("cache"):
            failed.append(path)
            raise FileExistsError(17, "File exists", path)     # mkdir() found a folder, and isdir() found none
        plain(path, *arguments, **options)

    Cache("cache")
    monkeypatch.setattr(os, "makedirs", makedirs)
    assert run(linmem) == 7
    assert (len(failed), len(entries())) == (1, 1)


def test_an_entry_whose_folder_is_removed_again_and_again_is_given_up(here, linmem, monkeypatch):
    plain = image_cache.draft
    monkeypatch.setattr(image_cache, "draft", lambda folder: (os.rmdir(folder), plain(folder))[1])
    code, _, error = linmem("run", "--cache", "cache", "program.wat")
    assert (code, error.count("\n")) == (7, 1)
    assert error.startswith("linmem run: not cached: ")


# -- where the cache is -----------------------------------------------------------------------------------------------

def test_the_default_is_a_private_directory_in_the_users_cache_directory(here, linmem, monkeypatch, compilations):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "caches"))
    assert [linmem("run", "program.wat") for _ in range(2)] == [(7, "", "")] * 2
    assert os.listdir("caches") == ["linmem"]
    if hasattr(os, "geteuid"):
        assert stat.S_IMODE(os.stat("caches/linmem").st_mode) == 0o700
    assert len(compilations) == 1


def test_no_cache_keeps_nothing(here, linmem, monkeypatch, compilations):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "caches"))
    assert [linmem("run", "--no-cache", "program.wat") for _ in range(2)] == [(7, "", "")] * 2
    assert len(compilations) == 2
    assert os.listdir() == ["program.wat"]


@pytest.mark.parametrize(("variable", "expected"), [("/caches", "/caches/linmem"), ("", "/home/me/.cache/linmem"),
                                                    ("relative", "/home/me/.cache/linmem")])
@requires("owners")
def test_the_users_cache_directory_is_that_of_the_environment_or_of_the_home(monkeypatch, variable, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", variable)
    monkeypatch.setenv("HOME", "/home/me")
    assert compile_cache.default_directory() == expected


@requires("owners")
def test_on_macos_the_caches_are_in_the_library(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "Library" / "Caches").mkdir(parents=True)
    assert compile_cache.default_directory() == str(tmp_path / "Library" / "Caches" / "linmem")


def test_without_a_usable_default_the_program_runs_and_one_line_says_so(here, linmem, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "program.wat"))
    code, out, error = linmem("run", "program.wat")
    assert (code, out, error.count("\n")) == (7, "", 1)
    assert error.startswith("linmem run: the compiled program is not kept: ")
    assert linmem("run", "--no-cache", "program.wat") == (7, "", "")


@requires("owners")
def test_a_default_that_others_may_write_to_is_not_used(here, linmem, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here))
    (here / "linmem").mkdir()
    (here / "linmem").chmod(0o777)
    code, _, error = linmem("run", "program.wat")
    assert code == 7
    assert "may be written by others" in error
    assert os.listdir("linmem") == []


@requires("owners")     # Windows lets few users make links
@pytest.mark.parametrize(("directory", "host"), [
    ("its/cache", "its"), ("its/cache", "."), ("its/cache", "its/cache"), ("its/cache", "its/cache/notes"),
    ("link/cache", "its"), ("its/cache", "link")])
@pytest.mark.parametrize("words", [["run"], ["prewarm", "-o", "snapshot"]])
def test_a_cache_that_the_program_may_write_to_is_refused(here, linmem, words, directory, host):
    os.makedirs("its/cache/notes", mode=0o700)
    os.chmod("its/cache", 0o700)
    os.symlink("its", "link")
    code, out, error = linmem(*words, "--cache", directory, "--dir", host, "program.wat")
    assert (code, out, error.count("\n")) == (1, "", 1)
    assert f"the program may write to this cache by --dir {host}" in error
    assert entries("its/cache") == []


def test_a_cache_beside_the_directories_of_the_program_or_in_one_that_it_may_only_read_is_used(here, linmem):
    os.mkdir("its")
    for host in "its", ".:ro", "cache:ro":
        assert linmem("run", "--cache", "cache", "--dir", host, "program.wat") == (7, "", "")
    assert len(entries()) == 1


def test_the_default_cache_is_not_used_if_the_program_may_write_to_it(here, linmem, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "caches"))
    code, out, error = linmem("run", "--dir", ".", "program.wat")
    assert (code, out, error.count("\n")) == (7, "", 1)
    assert error.startswith("linmem run: the compiled program is not kept: the program may write to this cache")
    assert entries("caches/linmem") == []


@requires("rlimits")
def test_a_full_disk_is_one_line_and_the_program_runs(here):
    done = run_child("""
        import sys
        from linmem import cli
        sys.exit(cli.main(["run", "--cache", "cache", "program.wat"]))
        """, cwd=here, limits={"RLIMIT_FSIZE": 100})
    assert (done.returncode, done.stdout) == (7, "")
    assert re.fullmatch(r"linmem run: not cached: .*File too large.*\n", done.stderr)
    assert entries() == []


# -- what is refused before it is compiled ---------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "reason"), [
    (["run"], "exports no function _start, so it is a library"),
    (["run", "--invoke", "missing"], "exports no function missing"),
    (["prewarm", "-o", "out"], "exports no function wizer.initialize"),
])
def test_a_program_without_the_function_is_refused_before_it_is_compiled(here, compilations, capfd, words, reason):
    (here / "library.wat").write_text(LIBRARY)
    assert cli.main([*words, "--no-cache", "library.wat"]) == 1
    error = capfd.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
    assert compilations == []


def test_a_program_that_linmem_cannot_read_gets_wasmtimes_own_refusal(here, linmem):
    (here / "bad.wasm").write_bytes(b"\0asm\1\0\0\0\x07\xff")
    code, _, error = linmem("run", "--no-cache", "bad.wasm")
    assert code == 1
    assert error.startswith("linmem run: bad.wasm: failed to parse")


# -- while a program is compiled --------------------------------------------------------------------------------------

class Terminal:
    """In the ``with`` block, standard error is a terminal."""

    def __enter__(self):
        self.controller, device = os.openpty()
        self.shown, self.before, sys.stderr = "", sys.stderr, open(device, "w")
        return self

    def __exit__(self, *exc):
        sys.stderr.close()
        sys.stderr = self.before
        os.close(self.controller)

    def wait_for(self, text):
        while text not in self.shown:
            self.shown += os.read(self.controller, 1 << 16).decode(errors="replace")


@requires("terminals")
@pytest.mark.parametrize("rich", [True, False])
def test_a_long_compilation_is_announced_on_a_terminal(monkeypatch, rich):
    monkeypatch.setattr(compile_cache, "DELAY", 0)
    monkeypatch.setenv("TERM", "xterm")
    if not rich:
        monkeypatch.setitem(sys.modules, "rich.console", None)
    with Terminal() as terminal:
        with compile_cache.announced("compiling [bold]x.wasm ..."):
            terminal.wait_for("compiling [bold]x.wasm ...")
        if rich:
            terminal.wait_for(SHOWS_THE_CURSOR)
        assert rich == (HIDES_THE_CURSOR in terminal.shown)


@requires("terminals")
def test_a_process_that_ends_while_a_program_is_compiled_shows_the_cursor_again(monkeypatch):
    monkeypatch.setattr(compile_cache, "DELAY", 0)
    monkeypatch.setenv("TERM", "xterm")
    with Terminal() as terminal, compile_cache.announced("compiling"):
        terminal.wait_for("compiling")
        compile_cache.end_announcements()
        terminal.wait_for(SHOWS_THE_CURSOR)


@requires("terminals")
def test_what_the_process_prints_to_standard_output_is_not_taken_to_the_terminal(monkeypatch):
    monkeypatch.setattr(compile_cache, "DELAY", 0)
    monkeypatch.setenv("TERM", "xterm")
    with Terminal() as terminal, compile_cache.announced("compiling"):
        out = sys.stdout
        terminal.wait_for("compiling")
        assert sys.stdout is out


@requires("terminals")
def test_a_short_compilation_is_not_announced(monkeypatch):
    monkeypatch.setattr(compile_cache, "DELAY", 600)
    with Terminal() as terminal:
        with compile_cache.announced("compiling"):
            pass
        print("end", file=sys.stderr, flush=True)
        terminal.wait_for("end")
        assert terminal.shown.startswith("end")


def test_nothing_is_announced_where_standard_error_is_no_terminal(monkeypatch, capsys):
    monkeypatch.setattr(compile_cache, "DELAY", 0)
    before = threading.active_count()
    with compile_cache.announced("compiling"):
        assert threading.active_count() == before
    assert capsys.readouterr().err == ""


# -- linmem cache -----------------------------------------------------------------------------------------------------

@pytest.fixture
def three(here, linmem):
    """A cache with three programs: the paths of the entries, the one that was used first comes first."""
    made = []
    for n in (1, 2, 3):
        (here / f"{n}.wat").write_text(EXITS.format(n))
        before = set(entries())
        assert linmem("run", "--cache", "cache", f"{n}.wat")[0] == n
        (new,) = set(entries()) - before
        os.utime(new, (1e9 + n, 1e9 + n))
        made.append(new)
    return made


def figures(linmem, *words):
    code, out, error = linmem("cache", *words, "--json")
    assert (code, error) == (0, "")
    return json.loads(out)


def test_info_counts_the_entries_and_their_bytes(here, linmem, three):
    sizes = [os.stat(path).st_size for path in three]
    # Windows may set the time of the last access when a file is looked up.
    oldest = 1e9 + 1 if hasattr(os, "geteuid") else min(os.stat(path).st_atime for path in three)
    assert figures(linmem, "info", "--cache", "cache") == {
        "directory": "cache", "entries": 3, "size": sum(sizes), "oldest": oldest, "removed": 0, "removed_size": 0}
    code, out, _ = linmem("cache", "info", "--cache", "cache")
    assert code == 0
    assert out.startswith("cache: 3 entries of ")


def test_prune_removes_the_oldest_entries_and_their_notes(here, linmem, three):
    sizes = [os.stat(path).st_size for path in three]
    assert len(notes()) == (3 if hasattr(os, "geteuid") else 0)
    found = figures(linmem, "prune", "--max-size", sizes[2] + sizes[1], "--cache", "cache")
    assert (found["entries"], found["removed"], found["removed_size"]) == (2, 1, sizes[0])
    assert entries() == three[1:]
    assert not os.path.exists(os.path.dirname(three[0]))
    assert len(notes()) == (2 if hasattr(os, "geteuid") else 0)
    assert figures(linmem, "prune", "--max-size", "0", "--cache", "cache")["entries"] == 0
    assert notes() == []
    assert linmem("run", "--cache", "cache", "1.wat")[0] == 1


def test_prune_removes_what_killed_processes_left(here, linmem, three):
    left = [here / "cache" / place / ".linmem-0123456789abcdef.tmp" for place in ("a" * 64, "notes")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half of an ent")
        os.utime(path, (0, 0))      # without locks, only an old file is known to be abandoned
    assert figures(linmem, "prune", "--cache", "cache")["entries"] == 3
    assert not any(path.exists() for path in left)


@requires("owners")
@pytest.mark.parametrize("change", ["removed", "changed"])
def test_prune_removes_the_notes_of_programs_that_are_gone(here, linmem, three, change):
    if change == "removed":
        (here / "1.wat").unlink()
    else:
        (here / "1.wat").write_text(EXITS.format(4) + " ")
    assert figures(linmem, "prune", "--cache", "cache")["entries"] == 3
    assert len(notes()) == 2


def test_entries_that_another_process_removes_are_no_error(here, linmem, three, monkeypatch):
    plain = os.scandir

    def scandir(path):
        if path == os.path.dirname(os.path.abspath(three[0])):
            monkeypatch.setattr(os, "scandir", plain)       # rmtree() uses it, too
            shutil.rmtree(path)
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert figures(linmem, "info", "--cache", "cache")["entries"] == 2


def test_a_key_that_another_process_removes_has_no_entries(here, monkeypatch):
    cache = Cache("cache")
    cache.add("a" * 64, ".cwasm", lambda file: file.write(b"x"))
    plain = os.listdir

    def listdir(path):
        names = plain(path)
        shutil.rmtree(path)
        return names

    monkeypatch.setattr(os, "listdir", listdir)
    assert list(cache.entries("a" * 64, ".cwasm")) == []


def test_prune_removes_nothing_but_entries(here, linmem, three):
    kept = [here / "cache" / "precious", here / "cache" / ("a" * 64) / "precious", here / "cache" / ("b" * 64)]
    kept[1].parent.mkdir()
    for path in kept:
        path.write_text("mine")
    (here / "elsewhere").mkdir()
    outside = here / "elsewhere" / ("c" * 64 + ".cwasm")
    outside.write_text("mine")
    with contextlib.suppress(OSError):      # not every user may make links on Windows
        os.symlink(here / "elsewhere", here / "cache" / ("d" * 64), target_is_directory=True)
    found = figures(linmem, "prune", "--max-size", "0", "--cache", "cache")
    assert (found["entries"], found["removed"]) == (0, 3)
    assert [path.read_text() for path in [*kept, outside]] == ["mine"] * 4


def test_the_default_directory_is_bounded_by_itself(here, linmem, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here))
    assert linmem("run", "program.wat")[0] == 7
    (first,) = entries("linmem")
    os.utime(first, (1e9, 1e9))
    monkeypatch.setattr(compile_cache, "LIMIT", os.stat(first).st_size * 3 // 2)
    (here / "program.wat").write_text(EXITS.format(5))
    assert linmem("run", "program.wat")[0] == 5
    (second,) = entries("linmem")
    assert second != first
    found = figures(linmem, "info")
    assert (found["directory"], found["entries"]) == (os.path.join(str(here), "linmem"), 1)


def test_a_cache_that_is_not_there_is_empty_if_it_is_the_default_and_else_refused(here, linmem, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "caches"))
    assert figures(linmem, "info")["entries"] == 0
    assert figures(linmem, "prune")["removed"] == 0
    assert not os.path.exists("caches")
    for path in ("missing", "program.wat"):
        code, out, error = linmem("cache", "prune", "--cache", path)
        assert (code, out) == (1, "")
        assert error.startswith(f"linmem cache: {path}: ")


@requires("owners")
def test_the_cache_of_others_is_not_touched(here, linmem, three):
    (here / "cache").chmod(0o777)
    code, _, error = linmem("cache", "prune", "--max-size", "0", "--cache", "cache")
    assert code == 1
    assert "may be written by others" in error
    assert all(map(os.path.exists, three))


def test_cache_and_no_cache_exclude_each_other(here):
    done = linmem_process("run", "--cache", "cache", "--no-cache", "program.wat", cwd=here)
    assert done.returncode == 2
    assert b"not allowed with argument" in done.stderr
