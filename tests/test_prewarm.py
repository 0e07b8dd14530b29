"""``linmem prewarm`` and ``linmem run --start``: programs that are initialised once and started from a file."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import wasmtime
from support import NEEDS, requires, run_child
from test_cli import ENVIRONMENT, RUNS_ON, SECONDS, TRAPS, linmem_process, report_of

from linmem import cli
from linmem.wasmtime import Snapshot

PAGE = 65536
GUIDE = Path(__file__).resolve().parent.parent / "docs" / "howto" / "wasmtime.md"
# Most functions write their names to standard output. init grows the memory. The global is not exported. The start
# function and the data would overwrite what init wrote.
PROGRAM = """
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (memory (export "memory") 1 8)
  (global $calls (mut i32) (i32.const 0))
  (data (i32.const 0) "start init   main   serve  _initialize ")
  (func $say (param $at i32) (param $size i32)
    (i32.store (i32.const 64) (local.get $at))
    (i32.store (i32.const 68) (local.get $size))
    (drop (call $fd_write (i32.const 1) (i32.const 64) (i32.const 1) (i32.const 72))))
  (func $start (global.set $calls (i32.add (global.get $calls) (i32.const 1))) (call $say (i32.const 0) (i32.const 6)))
  (start $start)
  (func (export "_initialize")
    (global.set $calls (i32.add (global.get $calls) (i32.const 10))) (call $say (i32.const 27) (i32.const 12)))
  (func (export "wizer.initialize")
    (drop (memory.grow (i32.const 3)))
    (i32.store (i32.const 0) (i32.const 0x52415453))        ;; "STAR" over "star"
    (i32.store (i32.const 200000) (i32.const 40))
    (global.set $calls (i32.add (global.get $calls) (i32.const 100))) (call $say (i32.const 6) (i32.const 5)))
  (func (export "init_twice") (result i32 i64)
    (call $say (i32.const 6) (i32.const 5)) (i32.const -7) (i64.const 1234567890123))
  (func (export "_start") (call $say (i32.const 13) (i32.const 5)) (call $say (i32.const 0) (i32.const 5)))
  (func (export "serve") (result i32) (call $say (i32.const 20) (i32.const 6)) (global.get $calls))
  (func (export "size") (result i32) (memory.size))
  (func (export "kept") (result i32) (i32.load (i32.const 200000)))
  (func (export "arguments") (result i32)
    (drop (call $args_sizes_get (i32.const 80) (i32.const 84))) (i32.load (i32.const 80)))
  (func (export "numbers") (result f32 f64) (f32.const 0.5) (f64.const -2.25))
  (func (export "no_numbers") (result f32 f64 f64) (f32.const nan) (f64.const -inf) (f64.const 1))
  (func (export "grow") (result i32) (memory.grow (i32.const 1)))
  (func (export "wants") (param i32))
  (func $object (export "object") (result funcref) (ref.func $object)))
"""
EXITS = """
(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32))) (memory (export "memory") 1)
  (func (export "wizer.initialize") (call $exit (i32.const {code}))))
"""
# The global refers to an object, and no name denotes it.
HOLDS_AN_OBJECT = """
(module (memory (export "memory") 1) (global $object (mut anyref) (ref.null any))
  (func (export "wizer.initialize") (global.set $object (ref.i31 (i32.const 5))))
  (func (export "_start")))
"""


@pytest.fixture
def there(tmp_path, monkeypatch):
    """The current directory, with the program."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.wat").write_text(PROGRAM)
    return tmp_path


@pytest.fixture
def linmem(capfd):
    """Runs the command line in this process: the exit code, standard output and standard error."""
    def run(*words):
        try:
            code = cli.main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()
    return run


@pytest.fixture
def refused(linmem):
    """The one line with which a command is refused. No file appears or stays that was not there before."""
    def run(*words, code=1):
        before = sorted(os.listdir())
        found, out, error = linmem(*words)
        assert (found, out) == (code, ""), error
        assert error.count("\n") == 1, error
        assert error.startswith("linmem"), error
        assert sorted(os.listdir()) == before
        return error
    return run


@pytest.fixture
def snapshot(there, linmem):
    assert linmem("prewarm", "program.wat", "-o", "program.snapshot")[0] == 0
    return there / "program.snapshot"


# -- prewarm ------------------------------------------------------------------------------------------

def test_initialize_runs_before_the_function_of_init_and_their_output_goes_to_standard_error(there):
    done = linmem_process("prewarm", "program.wat", "-o", "program.snapshot", cwd=there)
    assert (done.returncode, done.stderr) == (0, b"start _initialize init ")
    assert done.stdout.startswith(b"program.snapshot: snapshot, ")


def test_the_report_says_what_the_snapshot_holds_and_how_large_it_is(there, linmem):
    code, out, _ = linmem("prewarm", "program.wat", "-o", "program.snapshot")
    assert code == 0
    lines = out.splitlines()
    assert lines[:-1] == linmem("image", "info", "program.snapshot")[1].splitlines()
    assert "  holds     memory 0 of 256 KiB, 1 mutable global" in lines
    assert lines[-1] == "  init      wizer.initialize of program.wat"


def test_the_report_as_json_is_the_only_line_of_standard_output(there):
    done = linmem_process("prewarm", "program.wat", "--json", "--init", "init_twice", "-o", "program.snapshot",
                          cwd=there)
    assert (done.returncode, done.stdout.count(b"\n")) == (0, 1)
    figures = json.loads(done.stdout)
    assert {name: figures.pop(name) for name in ("program", "init", "results")} == {
        "program": "program.wat", "init": "init_twice", "results": [-7, 1234567890123]}
    assert figures["memories"] == [{"index": 0, "size": PAGE}]
    assert [figures] == json.loads(linmem_process("image", "info", "--json", "program.snapshot", cwd=there).stdout)


def test_the_results_of_the_initialising_function_are_in_the_report(there, linmem):
    out = linmem("prewarm", "program.wat", "--init", "init_twice", "-o", "program.snapshot")[1]
    assert out.splitlines()[-1].endswith("init_twice of program.wat, which returned -7, which returned 1234567890123")


def test_results_that_json_has_no_numbers_for_are_text(there, linmem):
    out = linmem("prewarm", "program.wat", "--json", "--init", "no_numbers", "-o", "program.snapshot")[1]
    assert json.loads(out, parse_constant=pytest.fail)["results"] == ["nan", "-inf", 1.0]


def test_the_file_is_a_snapshot_that_python_opens(snapshot):
    found = Snapshot.open(snapshot)
    assert [image.size for image in found.memories.values()] == [4 * PAGE]
    assert len(found.globals) == 1
    assert found.unseen == ()


def test_initialize_alone_runs_once(there, linmem):
    code, _, error = linmem("prewarm", "program.wat", "--init", "_initialize", "-o", "program.snapshot")
    assert (code, error) == (0, "start _initialize ")
    assert linmem("run", "--start", "program.snapshot", "--invoke", "serve", "program.wat")[1] == "serve 11\n"


@pytest.mark.parametrize("thing", ["(global (export NAME) i32 (i32.const 1))", "(memory (export NAME) 1)",
                                   "(table (export NAME) 1 funcref)"])
def test_only_an_exported_function_is_called(there, linmem, thing):
    things = thing.replace("NAME", '"_initialize"') + thing.replace("NAME", '"_start"')
    (there / "odd.wat").write_text(f'(module {things} (func (export "init")))')
    assert linmem("prewarm", "odd.wat", "--init", "init", "-o", "odd.snapshot")[0] == 0
    assert linmem("run", "--invoke", "init", "odd.wat") == (0, "", "")
    for words, name in (["prewarm", "--init", "_initialize", "-o", "x"], "_initialize"), (["run"], "_start"), (
            ["run", "--invoke", "_initialize"], "_initialize"), (
            ["run", "--start", "odd.snapshot", "--invoke", "_initialize"], "_initialize"):
        code, _, error = linmem(words[0], *words[1:], "odd.wat")
        assert (code, f"odd.wat exports no function {name}" in error) == (1, True), error


@requires("fork")
@pytest.mark.parametrize("words", [["prewarm", "program.wat", "-o", "other"], ["image", "info", "program.snapshot"],
                                   ["image", "verify", "program.snapshot"], ["info", "--json"]])
def test_a_command_whose_reader_has_ended_exits_with_1_and_its_file_is_complete(snapshot, words):
    process = subprocess.Popen([sys.executable, "-m", "linmem", *words], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=snapshot.parent)
    process.stdout.close()
    with process.stderr:
        error = process.stderr.read()
    assert (process.wait(SECONDS), error.replace(b"start _initialize init ", b"")) == (1, b"")
    if "other" in words:
        assert Snapshot.open(snapshot.parent / "other", verify=True).module == Snapshot.open(snapshot).module


def test_standard_input_and_the_options_reach_the_initialisation(there):
    (there / "reads.wat").write_text("""
    (module
      (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "args_sizes_get" (func $args (param i32 i32) (result i32)))
      (memory (export "memory") 1) (data (i32.const 0) "\\10\\00\\00\\00\\08\\00\\00\\00")
      (func (export "wizer.initialize") (result i32 i32 i32 i32)
        (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 32)))
        (drop (call $environ (i32.const 40) (i32.const 44)))
        (drop (call $args (i32.const 48) (i32.const 52)))
        (i32.load8_u (i32.const 16)) (i32.load (i32.const 40)) (i32.load (i32.const 48)) (memory.grow (i32.const 1))))
    """)
    done = linmem_process("prewarm", "reads.wat", "--json", "--env", "A=1", "--env=B=2", "--max-memory", "64KiB",
                          "-o", "reads.snapshot", stdin=b"x", cwd=there)
    assert json.loads(done.stdout)["results"] == [ord("x"), 2, 1, -1]


@requires("fork")
def test_a_pipe_gets_the_snapshot_and_standard_error_the_report(there, linmem):
    done = linmem_process("prewarm", "program.wat", "-o", "/dev/stdout", cwd=there)
    assert done.returncode == 0
    *_, last = done.stderr.splitlines()
    assert last.startswith(b"start _initialize init /dev/stdout: snapshot, module ")
    (there / "got").write_bytes(done.stdout)
    assert linmem("run", "--start", "got", "--invoke", "serve", "program.wat")[1] == "serve 111\n"
    figures = json.loads(linmem("prewarm", "program.wat", "--json", "-o", os.devnull)[1])
    assert (figures["path"], figures["kind"], figures["init"]) == (os.devnull, "snapshot", "wizer.initialize")


@requires("fork")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_closed_stream_does_not_keep_the_file_from_being_written(there, linmem, closed):
    done = subprocess.run(["sh", "-c", f'"$0" -m linmem prewarm program.wat -o program.snapshot {closed}',
                           sys.executable], capture_output=True, timeout=SECONDS, env=ENVIRONMENT, cwd=there)
    assert (done.returncode, done.stderr) == (0, b"" if "2" in closed else b"start _initialize init ")
    assert b"start" not in done.stdout
    assert linmem("run", "--start", "program.snapshot", "--invoke", "serve", "program.wat")[1] == "serve 111\n"


def test_a_packed_file_starts_too(there, linmem):
    figures = json.loads(linmem("prewarm", "program.wat", "--packed", "--json", "-o", "program.snapshot")[1])
    assert figures["layout"] == "packed"
    assert linmem("run", "--start", "program.snapshot", "--invoke", "kept", "program.wat")[1] == "40\n"


def test_an_old_file_is_replaced_as_a_whole_and_stays_if_the_program_fails(there, linmem):
    (there / "program.snapshot").write_bytes(b"old")
    (there / "traps.wat").write_text(TRAPS.replace("_start", "wizer.initialize"))
    assert linmem("prewarm", "traps.wat", "-o", "program.snapshot")[:2] == (134, "")
    assert (there / "program.snapshot").read_bytes() == b"old"
    assert linmem("prewarm", "program.wat", "-o", "program.snapshot")[0] == 0
    assert Snapshot.open("program.snapshot").unseen == ()
    assert sorted(os.listdir()) == ["program.snapshot", "program.wat", "traps.wat"]


@requires("rlimits")
def test_a_full_disk_leaves_the_old_file_and_no_other(there):
    # The guest fills its memory, so that the file has more bytes than the limit of the size of files.
    (there / "full.wat").write_text("""(module (memory (export "memory") 32) (func (export "wizer.initialize")
      (memory.fill (i32.const 0) (i32.const 7) (i32.const 2097152))))""")
    (there / "full.snapshot").write_bytes(b"old")
    done = run_child("""
        import sys
        from linmem import cli
        sys.exit(cli.main(["prewarm", "full.wat", "-o", "full.snapshot"]))
        """, cwd=there, limits={"RLIMIT_FSIZE": 1 << 20})
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "linmem prewarm: full.snapshot: File too large\n")
    assert (there / "full.snapshot").read_bytes() == b"old"
    assert sorted(os.listdir(there)) == ["full.snapshot", "full.wat", "program.wat"]


@requires("interrupts")
def test_an_interrupt_ends_the_initialisation_with_130_and_leaves_no_file(there):
    (there / "waits.wat").write_text(RUNS_ON.replace("_start", "wizer.initialize"))
    process = subprocess.Popen([sys.executable, "-m", "linmem", "prewarm", "waits.wat", "-o", "waits.snapshot"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT, cwd=there)
    try:
        assert process.stderr.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out, error) == (130, b"", b"")
    assert sorted(os.listdir(there)) == ["program.wat", "waits.wat"]


def test_a_trap_of_the_initialisation_ends_with_134_and_names_its_place(there):
    (there / "traps.wat").write_text(TRAPS.replace("_start", "wizer.initialize"))
    done = linmem_process("prewarm", "traps.wat", "-o", "traps.snapshot", cwd=there)
    assert (done.returncode, done.stdout) == (134, b"")
    lines = done.stderr.decode().splitlines()
    assert lines[0] == "linmem prewarm: traps.wat trapped: wasm trap: wasm `unreachable` instruction executed"
    assert any("deep" in line for line in lines[1:])
    assert not (there / "traps.snapshot").exists()


@pytest.mark.parametrize("code", [0, 3])
def test_a_program_that_ends_itself_has_no_state_to_save(there, refused, code):
    (there / "exits.wat").write_text(EXITS.format(code=code))
    assert (f"exits.wat ended itself with exit code {code} while it was initialised"
            in refused("prewarm", "exits.wat", "-o", "exits.snapshot"))


@pytest.mark.parametrize(("words", "code", "expected"), [
    ([], 2, "the following arguments are required: PROGRAM, --output/-o"),
    (["program.wat"], 2, "the following arguments are required: --output/-o"),
    (["program.wat", "-o", ""], 2, "must be the name of a file, got ''"),
    (["program.wat", "-o", "x", "--init", ""], 2, "must be the name of an exported function, got ''"),
    (["program.wat", "-o", "x", "more"], 2, "unrecognized arguments: more"),
    (["program.wat", "-o", "x", "--dir", "missing"], 2, "'missing' does not exist"),
    (["program.wat", "-o", "x", "--env", "=1"], 2, "the name is missing"),
    (["missing.wat", "-o", "x"], 1, "cannot read 'missing.wat'"),
    (["empty.wasm", "-o", "x"], 1, "not a WebAssembly module"),
    (["component.wasm", "-o", "x"], 1, "is a component"),
    (["typo.wat", "-o", "x"], 1, "(line 1, column "),
    (["imports.wat", "-o", "x"], 1, "unknown import: `env::missing`"),
    (["command.wat", "-o", "x"], 1, "command.wat exports no function wizer.initialize, which is what initialises it by"
                                    " default: --init names another"),
    (["program.wat", "-o", "x", "--init", "missing"], 1, "program.wat exports no function missing"),
    (["program.wat", "-o", "x", "--init", "memory"], 1, "program.wat exports no function memory"),
    (["program.wat", "-o", "x", "--init", "wants"], 1, "wants has parameters, and must have none"),
    (["quiet.wat", "-o", "x", "--init", "object"], 1, "object returned a value that is not a number"),
    (["quiet.wat", "-o", "x", "--init", "vector"], 1, "vector returned a value that is not a number"),
    (["odd.wat", "-o", "x"], 1, "_initialize has parameters or results, and must have none"),
    (["quiet.wat", "-o", "no/such/folder"], 2, "such' is not a directory"),
    (["quiet.wat", "-o", "."], 2, "--output .: it is a directory"),
    (["program.wat", "-o", "x", "--max-memory", "1KiB"], 1, "limit of 1024 bytes reached"),
])
def test_what_cannot_be_prewarmed_is_refused_in_one_line(there, refused, words, code, expected):
    files = {
        "empty.wasm": b"", "component.wasm": b"\0asm\x0d\0\x01\0", "typo.wat": b"(module (funk))",
        "imports.wat": b'(module (import "env" "missing" (func)) (func (export "wizer.initialize")))',
        "command.wat": b'(module (func (export "_start")))',
        "odd.wat": b'(module (func (export "_initialize") (param i32)) (func (export "wizer.initialize")))',
        "quiet.wat": b'''(module (memory (export "memory") 1) (func $init (export "wizer.initialize"))
            (func (export "object") (result funcref) (ref.func $init))
            (func (export "vector") (result v128) (v128.const i64x2 1 2)))''',
    }
    for name, content in files.items():
        (there / name).write_bytes(content)
    assert expected in refused("prewarm", *words, code=code)


def test_state_that_a_snapshot_cannot_hold_is_refused_or_with_partial_named(there, linmem, refused):
    try:
        wasmtime.Module(wasmtime.Engine(), HOLDS_AN_OBJECT)
    except wasmtime.WasmtimeError:
        pytest.skip("this wasmtime has no references to objects by default")
    (there / "object.wat").write_text(HOLDS_AN_OBJECT)
    assert ("is a reference to an object, which a snapshot cannot hold: --partial takes the rest"
            in refused("prewarm", "object.wat", "-o", "object.snapshot"))
    code, out, error = linmem("prewarm", "object.wat", "--partial", "-o", "object.snapshot")
    assert (code, error) == (0, "")
    assert re.search(r"^  unseen    mutable global .* is a reference to an object$", out, re.MULTILINE)
    assert linmem("run", "--start", "object.snapshot", "object.wat") == (0, "", "")


def test_the_program_is_not_replaced_by_its_snapshot(there, refused):
    for name in "program.wat", os.path.join(".", "program.wat"):
        assert "is PROGRAM itself" in refused("prewarm", "program.wat", "-o", name, code=2)
    assert (there / "program.wat").read_text() == PROGRAM


class NeverCompiles(wasmtime.Module):
    def __init__(self, *args):
        pytest.fail("a module was compiled")


def test_the_cache_keeps_the_compiled_program_for_prewarm_and_for_starts(there, linmem, monkeypatch):
    assert linmem("prewarm", "program.wat", "--cache", "cache", "-o", "program.snapshot")[0] == 0
    words = "run", "--start", "program.snapshot", "--cache", "cache", "--invoke", "serve", "program.wat"
    assert linmem(*words) == (0, "serve 111\n", "")        # compiles the program without its start function
    monkeypatch.setattr(wasmtime, "Module", NeverCompiles)
    assert linmem("prewarm", "program.wat", "--cache", "cache", "-o", "program.snapshot")[0] == 0
    assert linmem(*words) == (0, "serve 111\n", "")


@requires("owners")
def test_a_cache_that_others_may_write_to_is_refused(there, refused):
    (there / "cache").mkdir()
    (there / "cache").chmod(0o777)
    assert "may be written by others" in refused("prewarm", "program.wat", "--cache", "cache", "-o", "x")
    assert "Not a directory" in refused("run", "--cache", "program.wat/x", "program.wat")


# -- run --start and --invoke -----------------------------------------------------------------------------

def test_a_started_program_runs_only_start_and_has_the_state_of_the_snapshot(snapshot):
    done = linmem_process("run", "--start", snapshot, "program.wat", cwd=snapshot.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"main STARt", b"")


@pytest.mark.parametrize(("function", "said"), [
    ("serve", "serve 111\n"), ("size", "4\n"), ("kept", "40\n"), ("numbers", "0.5\n-2.25\n"), ("grow", "4\n")])
def test_a_function_is_invoked_in_place_of_start_and_its_results_are_printed(snapshot, linmem, function, said):
    assert linmem("run", "--start", snapshot, "--invoke", function, "program.wat") == (0, said, "")


def test_without_a_snapshot_initialize_runs_before_the_invoked_function(there, linmem):
    assert linmem("run", "--invoke", "serve", "program.wat") == (0, "start _initialize serve 11\n", "")
    assert linmem("run", "--invoke", "_initialize", "program.wat") == (0, "start _initialize ", "")
    assert linmem("run", "program.wat") == (0, "start main start", "")


def test_the_arguments_are_those_of_the_new_command_line(snapshot, linmem):
    words = "run", "--start", snapshot, "--invoke", "arguments", "program.wat"
    assert [linmem(*words, *more)[1] for more in ([], ["a"], ["--", "-a", "b"])] == ["1\n", "2\n", "4\n"]


def test_a_program_starts_from_one_file_as_often_as_wanted(snapshot, linmem):
    before = snapshot.read_bytes()
    for _ in range(3):
        assert linmem("run", "--start", snapshot, "--invoke", "grow", "program.wat") == (0, "4\n", "")
    assert snapshot.read_bytes() == before


def test_the_binary_of_a_text_is_the_same_module(snapshot, linmem):
    (snapshot.parent / "program.wasm").write_bytes(wasmtime.wat2wasm(PROGRAM))
    assert linmem("run", "--start", snapshot, "--invoke", "serve", "program.wasm")[1] == "serve 111\n"


def test_the_report_has_the_memories_of_the_program_alone(snapshot):
    done = linmem_process("run", "--json", "--start", snapshot, "--invoke", "grow", "program.wat", cwd=snapshot.parent)
    figures = report_of(done)
    (memory,) = figures["memories"]
    assert (memory["first_size"], memory["peak_size"], memory["growths"]) == (4 * PAGE, 5 * PAGE, 1)
    assert (figures["all"]["total_count"], figures["all"]["failures"]) == (1, 0)


def test_the_exit_code_of_a_started_program_is_linmems(there, linmem):
    (there / "exits.wat").write_text(EXITS.format(code=42).replace("wizer.initialize", "_start").replace(
        "(memory", '(func (export "wizer.initialize")) (memory'))
    assert linmem("prewarm", "exits.wat", "-o", "exits.snapshot")[0] == 0
    assert linmem("run", "--start", "exits.snapshot", "exits.wat") == (42, "", "")


def test_a_snapshot_of_another_module_is_refused(snapshot, refused):
    (snapshot.parent / "other.wat").write_text(PROGRAM.replace("i32.const 40)", "i32.const 41)"))
    said = refused("run", "--start", "program.snapshot", "other.wat")
    assert "program.snapshot: " in said
    assert Snapshot.open(snapshot).module[:16] in said


@pytest.mark.parametrize(("words", "code", "expected"), [
    (["--start"], 2, "expected one argument"),
    (["--start", "", "program.wat"], 2, "must be the name of a file, got ''"),
    (["--start", "missing", "program.wat"], 1, "linmem run: missing: No such file or directory"),
    (["--start", ".", "program.wat"], 1, "Permission denied" if os.name == "nt" else "Is a directory"),
    (["--start", "empty", "program.wat"], 1, "empty: "),
    (["--start", "cut", "program.wat"], 1, "cut: "),
    (["--start", "damaged", "program.wat"], 1, "damaged: "),
    (["--start", "image", "program.wat"], 1, "image: kind is "),
    (["--start", "program.snapshot", "--invoke", "missing", "program.wat"], 1, "exports no function missing"),
    (["--start", "program.snapshot", "--invoke", "wants", "program.wat"], 2, "wants(i32) takes 1 argument, got 0"),
    (["--start", "program.snapshot", "--invoke", "object", "program.wat"], 1,
     "object returned a value that is not a number"),
    (["--start", "program.snapshot", "--invoke", "", "program.wat"], 2, "the name of an exported function, got ''"),
    (["--start", "program.snapshot", "library.wat"], 1, "exports no function _start"),
    (["--start", "program.snapshot", "--max-memory", "128KiB", "program.wat"], 1, "limit of 131072 bytes reached"),
])
def test_what_cannot_be_started_is_refused_in_one_line(snapshot, refused, words, code, expected):
    from linmem import Image

    content = snapshot.read_bytes()
    files = {"empty": b"", "cut": content[:-1], "damaged": content[:40] + bytes([content[40] ^ 1]) + content[41:],
             "library.wat": b'(module (func (export "f")))'}
    for name, data in files.items():
        Path(name).write_bytes(data)
    Image.from_bytes(b"x").save("image")
    assert expected in refused("run", *words, code=code)


def test_a_command_line_that_cannot_be_run_has_its_report_with_start_too(there):
    done = linmem_process("run", "--json", "--start", "missing", "program.wat", cwd=there)
    first, last = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout, first) == (1, b"", "linmem run: missing: No such file or directory")
    assert (json.loads(last)["exit_code"], json.loads(last)["memories"]) == (1, [])


# -- WASI -------------------------------------------------------------------------------------------------

@pytest.fixture
def folders(there):
    """The folders "one" and "two", and the reactor of the guide, which keeps the number of its folder in a global."""
    for name, text in ("one", "hello"), ("two", "world"):
        (there / name).mkdir()
        (there / name / "words.txt").write_text(text)
    section = GUIDE.read_text("utf-8").partition("## WASI programs")[2]
    reactor = re.search(r'prepare\(engine, """\n(.*?)"""', section, re.DOTALL)[1]
    (there / "reactor.wat").write_text(reactor)
    return there


def test_a_started_program_finds_its_folders_by_the_numbers_that_it_kept(folders, linmem):
    assert linmem("prewarm", "reactor.wat", "--init", "_initialize", "--dir", "one::/data", "-o", "snapshot")[0] == 0

    def first_byte(*options):
        code, out, error = linmem("run", "--start", "snapshot", *options, "--invoke", "first_byte", "reactor.wat")
        assert (code, error) == (0, "")
        return int(out)

    assert first_byte("--dir", "one::/data") == ord("h")
    assert first_byte("--dir", "two::/data") == ord("w")                        # other files under the same number
    assert first_byte("--dir", "two::/data", "--dir", "one::/data") == ord("w")
    assert first_byte() == -8                                                   # EBADF


def test_a_program_that_was_initialised_without_a_folder_has_none_in_a_store_with_one(folders, linmem):
    assert linmem("prewarm", "reactor.wat", "--init", "_initialize", "-o", "snapshot")[0] == 0
    for options in (), ("--dir", "one::/data"):
        code, out, _ = linmem("run", "--start", "snapshot", *options, "--invoke", "first_byte", "reactor.wat")
        assert (code, int(out) < 0) == (0, True)


def test_the_reactor_in_c_of_the_guide_does_what_the_guide_says(there):
    if not NEEDS["zig"][0]:
        pytest.skip(NEEDS["zig"][1])
    if importlib.util.find_spec("ziglang") is None:
        pytest.fail("ziglang is not installed: pip install 'linmem[test]'")
    guide = GUIDE.read_text("utf-8")
    (there / "words.c").write_text(re.search(r"^```c\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)[1])
    commands = next(block for block in re.findall(r"^```sh\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
                    if "words.snapshot" in block)
    for name, file, text in ("dictionary", "words.txt", "all well"), ("requests", "request.txt", "l"):
        (there / name).mkdir()
        (there / name / file).write_text(text)
    said = []
    for line in commands.splitlines():
        words = line.removeprefix("python ").split()
        words = ["-m", *words] if words[0] == "linmem" else words
        done = subprocess.run([sys.executable, *words], capture_output=True, timeout=300, env=ENVIRONMENT, cwd=there)
        assert done.returncode == 0, done.stderr
        said.append((done.stdout, done.stderr))
    _, (report, output), answered = said
    assert report.startswith(b"words.snapshot: snapshot, ")
    assert output == b"read 8 bytes\n"
    assert answered == (b"4\n", b"")
