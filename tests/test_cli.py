"""The command line: processes that the tests start, feed, interrupt and read."""

from __future__ import annotations

import argparse
import errno
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import types

import pytest
import wasmtime
from support import NEEDS, requires

import linmem
from linmem import cli
from linmem._commands import creator_option, demo, info
from linmem._commands.creator_option import compose_creator, option_value
from linmem._commands.parser import parse_size

MANUAL = pathlib.Path(__file__).parents[1] / "docs" / "linmem.1"
SECONDS = 120
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(
    part for part in (str(pathlib.Path(linmem.__file__).parent.parent), os.environ.get("PYTHONPATH", "")) if part)}

PROGRAM_C = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int copy(FILE *from, FILE *to)
{
    char buffer[4096];
    size_t n;
    if (!from || !to)
        return 9;
    while ((n = fread(buffer, 1, sizeof buffer, from)) > 0)
        fwrite(buffer, 1, n, to);
    return fclose(to) ? 8 : 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "args";
    if (!strcmp(what, "exit"))
        return atoi(argv[2]);
    if (!strcmp(what, "cat"))
        return copy(stdin, stdout);
    if (!strcmp(what, "complain")) {
        fprintf(stderr, "a complaint\n");
        return 0;
    }
    if (!strcmp(what, "env")) {
        for (int i = 2; i < argc; i++)
            printf("%s=%s\n", argv[i], getenv(argv[i]) ? getenv(argv[i]) : "(none)");
        return 0;
    }
    if (!strcmp(what, "copy"))
        return copy(fopen(argv[2], "rb"), fopen(argv[3], "wb"));
    if (!strcmp(what, "allocate")) {
        size_t size = strtoul(argv[2], 0, 10);
        char *volatile p = malloc(size);
        if (!p) {
            printf("refused\n");
            return 3;
        }
        memset(p, 7, size);
        printf("got %d\n", p[size - 1]);
        return 0;
    }
    if (!strcmp(what, "wait")) {
        printf("waiting\n");
        fflush(stdout);
        return getchar() == EOF;
    }
    for (int i = 0; i < argc; i++)
        printf("[%s]", argv[i]);
    return 0;
}
"""

GROWS_THREE_TIMES = """
(module (memory (export "memory") 1 10)
  (func (export "_start")
    (drop (memory.grow (i32.const 1)))
    (drop (memory.grow (i32.const 2)))
    (drop (memory.grow (i32.const 3)))))
"""
# The exit code is the number of refused growths, of five growths by one page.
COUNTS_REFUSALS = """
(module
  (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
  (memory (export "memory") 1)
  (func (export "_start") (local $i i32) (local $refused i32)
    (loop $again
      (if (i32.eq (memory.grow (i32.const 1)) (i32.const -1))
        (then (local.set $refused (i32.add (local.get $refused) (i32.const 1)))))
      (br_if $again (i32.lt_u (local.tee $i (i32.add (local.get $i) (i32.const 1))) (i32.const 5))))
    (call $exit (local.get $refused))))
"""
TRAPS = '(module (memory (export "memory") 1) (func $deep unreachable) (func (export "_start") call $deep))'
TOUCHES_THE_GUARD = """
(module (memory (export "memory") 1)
  (func (export "_start") (drop (i32.load (i32.const 65536)))))
"""
# Prints a line when it runs.
RUNS_ON = r"""
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 3)
  (data (i32.const 0) "\10\00\00\00\08\00\00\00\00\00\00\00\00\00\00\00waiting\n")
  (func (export "_start")
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))
    (loop $again (br $again))))
"""
NEVER_ENDS = '(module (memory (export "memory") 3) (func (export "_start") (loop $l (br $l))))'


def linmem_process(*arguments, stdin=b"", env=None, cwd=None, python=()):
    return subprocess.run([sys.executable, *python, "-m", "linmem", *map(str, arguments)], input=stdin,
                          capture_output=True, timeout=SECONDS, env={**ENVIRONMENT, **(env or {})}, cwd=cwd)


def refusal(done, code):
    """The single line that a refused command prints."""
    text = done.stderr.decode()
    assert done.returncode == code, text
    assert done.stdout == b""
    assert text.count("\n") == 1, text
    assert text.startswith("linmem"), text
    return text


def report_of(done):
    return json.loads(done.stderr.decode().splitlines()[-1])


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    if not NEEDS["zig"][0]:
        pytest.skip(NEEDS["zig"][1])
    if importlib.util.find_spec("ziglang") is None:
        pytest.fail("ziglang is not installed: pip install 'linmem[test]'")
    folder = tmp_path_factory.mktemp("program")
    (folder / "program.c").write_text(PROGRAM_C)
    subprocess.run([sys.executable, "-m", "ziglang", "cc", "-target", "wasm32-wasi", "-O1", "-o", "program.wasm",
                    "program.c"], cwd=folder, check=True, timeout=300)
    return folder / "program.wasm"


@pytest.fixture
def wat(tmp_path):
    def write(text, name="module.wat"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path
    return write


# -- run: data that passes through -------------------------------------------------------------------

@pytest.mark.parametrize("code", [0, 1, 42, 125])
def test_the_programs_exit_code_is_linmems(program, code):
    done = linmem_process("run", program, "exit", code)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


def test_standard_input_reaches_the_program_and_its_output_comes_back_byte_by_byte(program):
    data = bytes(range(256)) * 1000
    done = linmem_process("run", program, "cat", stdin=data)
    assert (done.returncode, done.stdout, done.stderr) == (0, data, b"")


@requires("fork")
@pytest.mark.parametrize(("call", "descriptor"), [("fd_read", 0), ("fd_write", 1), ("fd_write", 2)])
def test_a_stream_that_the_caller_closed_is_empty_for_the_program(wat, call, descriptor):
    path = wat(f"""(module
      (import "wasi_snapshot_preview1" "{call}" (func $call (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1) (data (i32.const 0) "\\40\\00\\00\\00\\08")
      (func (export "_start") (local $failed i32)
        (local.set $failed (call $call (i32.const {descriptor}) (i32.const 0) (i32.const 1) (i32.const 16)))
        (call $exit (i32.or (i32.mul (i32.const 100) (local.get $failed)) (i32.load (i32.const 16))))))""")
    done = subprocess.run(["sh", "-c", f'exec "$@" {descriptor}<&-', "sh", sys.executable, "-m", "linmem", "run", path],
                          timeout=SECONDS, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert done.returncode == (0 if descriptor == 0 else 8)


def test_standard_error_is_the_programs(program):
    done = linmem_process("run", program, "complain")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"a complaint\n")


def test_arguments_are_the_programs_and_the_first_is_its_file_name(program):
    done = linmem_process("run", program, "args", "--report", "-x", "--", "a b", "")
    assert done.stdout == b"[program.wasm][args][--report][-x][--][a b][]"
    assert done.stderr == b""


@pytest.mark.parametrize("words", [
    ["--json", "PROGRAM", "args", "--json"],
    ["--json", "--", "PROGRAM", "args", "--json"],
    ["--env", "A=-1", "--max-memory", "1GiB", "--json", "--dir=.", "PROGRAM", "args", "--json"],
])
def test_options_of_linmem_stand_before_the_program(program, words):
    done = linmem_process("run", *[str(program) if word == "PROGRAM" else word for word in words])
    assert done.stdout == b"[program.wasm][args][--json]"
    assert report_of(done)["exit_code"] == 0


@pytest.mark.parametrize("words", [["--report"], ["--", "--report"], ["--", "--"], ["--max-memory", "1"], ["-h"]])
def test_all_words_after_the_program_are_its_arguments(wat, program, words):
    # Without "args", the program prints its arguments too.
    done = linmem_process("run", program, *words)
    expected = "".join(f"[{word}]" for word in ["program.wasm", *words])
    assert (done.returncode, done.stdout.decode(), done.stderr) == (0, expected, b"")


def test_the_program_sees_only_the_variables_it_is_given(program):
    done = linmem_process("run", "--env", "A=1=2", "--env=B=", "--env", "FROM_HERE", program, "env",
                          "A", "B", "FROM_HERE", "NOT_GIVEN", env={"FROM_HERE": "here", "NOT_GIVEN": "there"})
    assert done.stdout.decode().splitlines() == ["A=1=2", "B=", "FROM_HERE=here", "NOT_GIVEN=(none)"]


def test_the_program_reads_and_writes_files_in_the_directories_it_is_given(program, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    (one / "in.bin").write_bytes(b"\x00text\xff")
    done = linmem_process("run", "--dir", "one", f"--dir={two}::/out", program, "copy", "one/in.bin", "/out/copy.bin",
                          cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (two / "copy.bin").read_bytes() == b"\x00text\xff"


def test_the_program_cannot_open_a_file_outside_its_directories(program, tmp_path):
    (tmp_path / "in.bin").write_bytes(b"secret")
    (tmp_path / "given").mkdir()
    done = linmem_process("run", "--dir", tmp_path / "given", program, "copy", tmp_path / "in.bin",
                          tmp_path / "given" / "out.bin")
    assert (done.returncode, done.stdout) == (9, b"")


def test_env_all_gives_all_variables_and_env_overrides_them(program):
    done = linmem_process("run", "--env", "ONE=new", "--env-all", program, "env", "ONE", "TWO",
                          env={"ONE": "old", "TWO": "b"})
    assert done.stdout.decode().splitlines() == ["ONE=new", "TWO=b"]


def test_the_last_of_two_values_of_a_variable_counts(program):
    done = linmem_process("run", "--env", "A=1", "--env", "A=2", program, "env", "A")
    assert done.stdout.decode().splitlines() == ["A=2"]


@pytest.fixture
def folders(tmp_path):
    """The folders "in", "in:ro" and "out", the first two with a file."""
    for name in "in", "in:ro", "out":
        (tmp_path / name).mkdir()
    (tmp_path / "in" / "file").write_text("of in")
    (tmp_path / "in:ro" / "file").write_text("of in:ro")
    return tmp_path


@requires("odd_names")
@pytest.mark.parametrize(("option", "read", "content", "may_write"), [
    ("in", "in", "of in", True), ("in:rw", "in", "of in", True), ("in:ro", "in", "of in", False),
    ("in::/a", "/a", "of in", True), ("in::/a:ro", "/a", "of in", False), ("in::/a:ro:rw", "/a:ro", "of in", True),
    ("in:ro:rw", "in:ro", "of in:ro", True), ("in:ro:ro", "in:ro", "of in:ro", False),
    ("in:ro::/a", "/a", "of in:ro", True), ("in:ro::/a:ro", "/a", "of in:ro", False),
])
def test_a_folder_with_ro_may_only_be_read(program, folders, option, read, content, may_write):
    done = linmem_process("run", "--dir", option, "--dir", "out", program, "copy", f"{read}/file", "out/copy",
                          cwd=folders)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (folders / "out" / "copy").read_text() == content
    # 9: the file cannot be opened
    for name in "file", "new":
        done = linmem_process("run", "--dir", option, "--dir", "out", program, "copy", "out/copy", f"{read}/{name}",
                              cwd=folders)
        assert (done.returncode, done.stderr) == (0 if may_write else 9, b"")
    found = {path.name: (path / "new").exists() for path in folders.iterdir()}
    assert found == {"in": may_write and content == "of in", "in:ro": may_write and content == "of in:ro",
                     "out": False}


@pytest.mark.parametrize("backtrace", ["0", "1"])
def test_a_trap_ends_with_134_and_prints_its_kind_and_place(wat, backtrace):
    path = wat(TRAPS)
    done = linmem_process("run", path, env={"RUST_BACKTRACE": backtrace})
    assert (done.returncode, done.stdout) == (134, b"")
    lines = done.stderr.decode().splitlines()
    assert lines[0] == f"linmem run: {path} trapped: wasm trap: wasm `unreachable` instruction executed"
    assert any("deep" in line for line in lines[1:])
    assert "Traceback" not in done.stderr.decode()


def test_names_of_functions_cannot_change_the_terminal_or_fill_it(wat):
    name = r"\1b[31m" + 10_000 * "a" + 1_000 * r"\0a"
    done = linmem_process("run", wat(f'(module (func $f (@name "{name}") (export "_start") unreachable))'))
    assert done.returncode == 134
    assert len(done.stderr) < 2_000
    assert done.stderr.decode().replace("\n", "").replace("\r", "").isprintable()
    assert b"\\x1b[31maaa" in done.stderr


def test_an_access_past_the_memory_is_a_trap_and_not_a_crash(wat):
    done = linmem_process("run", wat(TOUCHES_THE_GUARD))
    assert done.returncode == 134
    assert b"out of bounds memory access" in done.stderr


@requires("interrupts")
@pytest.mark.parametrize(("source", "report"), [("wait", False), ("loop", False), ("loop", True)])
def test_an_interrupt_ends_the_program_with_130(program, wat, source, report):
    words = [str(program), "wait"] if source == "wait" else [str(wat(RUNS_ON))]
    process = subprocess.Popen([sys.executable, "-m", "linmem", "run", *(["--json"] if report else []), *words],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    try:
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (130, b"")
    if report:
        figures = json.loads(error)
        assert figures["exit_code"] == 130
        assert [memory["first_size"] for memory in figures["memories"]] == [3 * 65536]
    else:
        assert error == b""


# -- run: budget and report ----------------------------------------------------------------------------

def test_without_a_budget_no_growth_is_refused(wat):
    assert linmem_process("run", wat(COUNTS_REFUSALS)).returncode == 0


def test_a_budget_refuses_growth_and_the_program_sees_minus_one(wat):
    done = linmem_process("run", "--max-memory", "192KiB", "--json", wat(COUNTS_REFUSALS))
    assert done.returncode == 3                 # two of five more pages fit
    figures = report_of(done)
    assert figures["max_memory"] == 192 * 1024
    assert figures["all"]["failures"] == 3
    (memory,) = figures["memories"]
    assert (memory["growths"], memory["refused_growths"], memory["peak_size"]) == (2, 3, 192 * 1024)


# Each budget is far below or far above the allocation, because the program's C library may round a large allocation up.
@pytest.mark.parametrize(("budget", "answer"), [("48MiB", b"refused\n"), ("512MiB", b"got 7\n")])
def test_the_budget_limits_malloc_in_a_real_program(program, budget, answer):
    assert linmem_process("run", f"--max-memory={budget}", program, "allocate", 64 << 20).stdout == answer


def test_a_program_that_does_not_fit_its_budget_is_refused_with_the_figures(wat):
    text = refusal(linmem_process("run", "--max-memory", "64KiB", wat(NEVER_ENDS)), 1)
    assert "limit of 65536 bytes reached" in text
    assert "196608" in text
    assert "[refusal" not in text       # for linmem.wasmtime.cause() only


def test_a_program_that_could_not_be_run_has_a_report_too(wat):
    done = linmem_process("run", "--max-memory", "64KiB", "--json", wat(NEVER_ENDS))
    assert done.returncode == 1
    figures = report_of(done)
    assert (figures["exit_code"], figures["memories"], figures["all"]["failures"]) == (1, [], 1)


def test_the_report_counts_the_programs_operations(wat):
    path = wat(GROWS_THREE_TIMES)
    done = linmem_process("run", "--json", path)
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.count(b"\n") == 1
    figures = report_of(done)
    assert figures["program"] == str(path)
    assert figures["creator"] == "mmap"
    assert figures["max_memory"] is None
    (memory,) = figures["memories"]
    assert (memory["first_size"], memory["peak_size"]) == (65536, 7 * 65536)
    assert (memory["growths"], memory["refused_growths"]) == (3, 0)
    assert memory["grow_ns"] > 0
    assert figures["all"]["peak_bytes"] == 7 * 65536


def test_the_reports_resident_peak_counts_the_pages_that_the_program_touched(program):
    (memory,) = report_of(linmem_process("run", "--json", program, "allocate", 32 << 20))["memories"]
    assert 32 << 20 <= memory["peak_resident"] <= memory["peak_size"]


def test_the_text_report_prints_the_same_figures_on_standard_error(wat):
    done = linmem_process("run", "--report", wat(GROWS_THREE_TIMES))
    assert (done.returncode, done.stdout) == (0, b"")
    head, line = done.stderr.decode().splitlines()
    assert head == "linmem: 1 memory by mmap, 448 KiB at the peak; 0 requests refused"
    assert re.fullmatch(r"  memory: 64 KiB at first, 448 KiB at the peak, \S+ \S+ resident;"
                        r" 3 growths in [\d.]+ (us|ms|s), 0 refused", line)


def test_the_report_comes_after_a_trap_too(wat):
    done = linmem_process("run", "--json", wat(TRAPS))
    assert (done.returncode, report_of(done)["exit_code"]) == (134, 134)


def test_every_memory_of_the_program_has_its_line(wat):
    path = wat('(module (memory 2) (memory 5) (func (export "_start") (drop (memory.grow 1 (i32.const 1)))))')
    memories = report_of(linmem_process("run", "--json", path))["memories"]
    assert [(m["first_size"] >> 16, m["peak_size"] >> 16, m["growths"]) for m in memories] == [(2, 2, 0), (5, 6, 1)]


def test_the_report_of_a_program_without_memory_states_this(wat):
    done = linmem_process("run", "--report", wat('(module (func (export "_start")))'))
    assert (done.returncode, done.stderr.splitlines()) == (0, [b"linmem: no memory was asked for"])


@pytest.mark.parametrize(("text", "value"), [
    ("true", True), ("false", False), ("none", None), ("5", 5), ("-1", -1), ("0x10", 16), ("1.5", 1.5), ("5e-1", 0.5),
    ("64KiB", 65536), ("wait", "wait"), ("1.5.2", "1.5.2")])
def test_a_value_of_an_option_of_a_creator_has_the_type_that_its_text_has(text, value):
    found = option_value(text)
    assert (found, type(found)) == (value, type(value))


def test_a_creator_gets_the_options_after_its_name():
    pool = compose_creator("pool:idle_seconds=0.5,keep_resident=64KiB,slots=1,when_full=error", None)
    assert isinstance(pool, linmem.PoolingCreator)
    memory = pool.create(65536)
    with pytest.raises(linmem.PoolError):
        pool.create(65536)
    del memory
    with pytest.raises(linmem.LimitError):
        compose_creator("limiting:limit_bytes=1KiB", None).create(4096)


def test_the_report_names_the_creator_with_its_options(wat):
    figures = report_of(linmem_process("run", "--creator=pool:idle_seconds=5", "--json", wat(GROWS_THREE_TIMES)))
    assert figures["creator"] == "pool:idle_seconds=5"
    assert figures["memories"][0]["growths"] == 3


# -- run: functions with parameters ------------------------------------------------------------------------

FUNCTIONS = """(module
  (type $pair (sub (struct (field i8) (field (mut funcref)))))
  (rec (type $list (array (mut i64))) (type $other (func (param i64))))
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $sizes (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "sum") (param i32 i64 f32 f64) (result i32 i64 f32 f64)
    (i32.add (local.get 0) (i32.const 1)) (i64.add (local.get 1) (i64.const 1)) (local.get 2) (local.get 3))
  (func (export "count") (param i32) (result i32)
    (drop (call $sizes (i32.const 0) (i32.const 4))) (i32.load (i32.const 0)))
  (func (export "vector") (param i32 v128))
  (func (export "object") (param funcref)))
"""


@pytest.fixture
def invoked(wat):
    try:
        path = wat(wasmtime.Module(wasmtime.Engine(), FUNCTIONS) and FUNCTIONS, "functions.wat")
    except wasmtime.WasmtimeError:      # this wasmtime has no structures by default
        lines = [line for line in FUNCTIONS.splitlines() if "$pair" not in line and "$list" not in line]
        path = wat("\n".join(lines), "functions.wat")
    return lambda name, *arguments: linmem_process("run", "--invoke", name, path, *arguments)


@pytest.mark.parametrize(("arguments", "results"), [
    (["1", "2", "0.5", "-2.25"], ["2", "3", "0.5", "-2.25"]),
    (["-1", "0xffffffffffffffff", "inf", "nan"], ["0", "0", "inf", "nan"]),
    (["0x7fffffff", "-9223372036854775808", "-1e-3", "1e300"],
     ["-2147483648", "-9223372036854775807", "-0.0010000000474974513", "1e+300"]),
    (["4294967295", "+5", "-0", "7"], ["0", "6", "-0.0", "7.0"]),
])
def test_arguments_have_the_types_of_the_parameters(invoked, arguments, results):
    done = invoked("sum", *arguments)
    assert (done.returncode, done.stdout.decode().splitlines(), done.stderr) == (0, results, b"")


def test_arguments_of_a_function_are_also_arguments_of_the_program(invoked):
    assert invoked("count", "5").stdout == b"2\n" if os.name != "nt" else b"2\r\n"


@pytest.mark.parametrize(("arguments", "code", "expected"), [
    (["sum", "1"], 2, "sum(i32, i64, f32, f64) takes 4 arguments, got 1"),
    (["sum", "1", "2", "3", "4", "5"], 2, "takes 4 arguments, got 5"),
    (["sum", "1", "--", "3", "4"], 2, "argument 2, '--', is not an integer, like 42, -1 or 0x2a"),
    (["sum", "1.5", "2", "3", "4"], 2, "argument 1, '1.5', is not an integer"),
    (["sum", "4294967296", "2", "3", "4"], 2, "argument 1, '4294967296', must be from -2147483648 to 4294967295"),
    (["sum", "-2147483649", "2", "3", "4"], 2, "must be from -2147483648 to 4294967295"),
    (["sum", "9" * 5000, "2", "3", "4"], 2, "must be from -2147483648 to 4294967295"),
    (["sum", "1", "2", "1e39", "4"], 2, "argument 3, '1e39', is too large for an f32"),
    (["sum", "1", "2", "3", "1_0"], 2, "argument 4, '1_0', is not a number"),
    (["sum", "1", "2", "3", ""], 2, "argument 4, '', is not a number"),
    (["sum", "\u0661", "2", "3", "4"], 2, "is not an integer"),
    (["vector", "1", "2"], 1, "vector(i32, v128) cannot be called from the command line, because no argument can be"),
    (["object", "1"], 1, "object(a reference) cannot be called from the command line"),
    (["missing"], 1, "exports no function missing"),
    (["memory"], 1, "exports no function memory"),
])
def test_wrong_arguments_of_a_function_are_named_in_one_line(invoked, arguments, code, expected):
    assert expected in refusal(invoked(*arguments), code)


def test_a_creator_is_chosen_by_its_name(wat):
    figures = report_of(linmem_process("run", "--creator", "statistics", "--json", wat(GROWS_THREE_TIMES)))
    assert figures["creator"] == "statistics"
    assert figures["memories"][0]["growths"] == 3


# -- run: refusals ----------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "size"), [
    ("65536", 65536), ("0", 0), ("64MiB", 64 << 20), ("64 mib", 64 << 20), ("64M", 64 << 20), ("1GiB", 1 << 30),
    ("1.5GiB", 3 << 29), ("64KB", 64000), ("0.001KB", 1), ("2TB", 2 * 10 ** 12), ("7b", 7),
])
def test_sizes_with_units_are_parsed(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "64XB", "-1", "1.5", "1e9", "0x10", "1..5GiB", "nan", "8EiB", "٣MiB",
                                  "9223372036854775808", "8388608TiB"])
def test_a_wrong_size_is_named_in_one_line(text):
    said = refusal(linmem_process("run", f"--max-memory={text}", "program.wasm"), 2)
    assert repr(text) in said
    assert "--max-memory" in said


@pytest.mark.parametrize(("words", "code", "expected"), [
    (["run"], 2, "PROGRAM is missing"),
    (["run", "--"], 2, "PROGRAM is missing"),
    (["run", "--dir"], 2, "expected one argument"),
    (["run", "missing.wasm"], 1, "No such file"),
    (["run", "."], 1, "cannot read '.'"),
    (["run", "--no-such-option", "ok.wat"], 2, "no such option: --no-such-option"),
    (["run", "--no-such-option=5"], 2, "no such option: --no-such-option=5"),
    (["run", "--json"], 2, "PROGRAM is missing"),
    (["run", "--rep", "ok.wat"], 2, "no such option: --rep"),
    (["run", "--env", "=x", "ok.wat"], 2, "the name is missing"),
    (["run", "--env", "NOT_SET_ANYWHERE", "ok.wat"], 2, "NOT_SET_ANYWHERE: no such variable"),
    (["run", "--dir", "missing", "ok.wat"], 2, "'missing' does not exist"),
    (["run", "--dir", "ok.wat::/x", "ok.wat"], 2, "'ok.wat' is not a directory"),
    (["run", "--creator", "paper", "ok.wat"], 2, "KIND must be one of mmap, pool, limiting"),
    (["run", "--creator", "limiting", "ok.wat"], 2, "--max-memory"),
    (["run", "--creator", "pool:", "ok.wat"], 2, "--creator pool:: '' is not an option, like idle_seconds=5"),
    (["run", "--creator", "pool:slots", "ok.wat"], 2, "'slots' is not an option"),
    (["run", "--creator", "pool:slots=", "ok.wat"], 2, "'slots=' is not an option"),
    (["run", "--creator", "pool:slots=1,slots=2", "ok.wat"], 2, "slots stands twice"),
    (["run", "--creator", "pool:slots=-1", "ok.wat"], 2, "slots must be "),
    (["run", "--creator", "pool:when_full=cry", "ok.wat"], 2, "when_full must be "),
    (["run", "--creator", "mmap:idle_seconds=5", "ok.wat"], 2, "idle_seconds"),
    (["run", "--creator", "shared:attach=no-memory-has-this-name", "ok.wat"], 2, "--creator shared:attach="),
    (["run", "--creator", "pool:upstream=mmap", "ok.wat"], 2, "upstream"),
    (["run", "--dir", "missing:ro", "ok.wat"], 2, "'missing' does not exist"),
    (["run", "--dir", ":ro", "ok.wat"], 2, "'' does not exist"),
    (["run", "empty.wasm"], 1, "not a WebAssembly module"),
    (["run", "image.png"], 1, "not a WebAssembly module"),
    (["run", "broken.wasm"], 1, "malformed section id"),
    (["run", "cut.wasm"], 1, "cut.wasm: "),
    (["run", "component.wasm"], 1, "is a component"),
    (["run", "component.wat"], 1, "is a component"),
    (["run", "typo.wat"], 1, "(line 2, column "),
    (["run", "latin.wat"], 1, "latin.wat is not valid WebAssembly text"),
    (["run", "library.wat"], 1, "exports no function _start"),
    (["run", "global.wat"], 1, "exports no function _start"),
    (["run", "odd.wat"], 1, "_start has parameters or results"),
    (["run", "imports.wat"], 1, "unknown import: `env::missing`"),
    (["run", "exit200.wat"], 1, "exit with invalid exit status outside of [0..126)"),
    (["demo", "--fast"], 2, "--fast"),
    (["info", "extra"], 2, "extra"),
    (["fly"], 2, "fly"),
])
def test_an_impossible_command_is_refused_in_one_line(tmp_path, words, code, expected):
    ok = '(module (func (export "_start")))'
    files = {
        "ok.wat": ok, "empty.wasm": b"", "image.png": b"\x89PNG\r\n\x1a\n" + bytes(64),
        "broken.wasm": b"\0asm\x01\0\0\0\xff\xff\xff", "cut.wasm": b"\0asm\x01", "component.wasm": b"\0asm\x0d\0\x01\0",
        "component.wat": "(component)", "typo.wat": "(module\n  (funk))", "latin.wat": b"(module) ;; \xe9",
        "library.wat": '(module (func (export "add")))',
        "global.wat": '(module (global (export "_start") i32 i32.const 1))',
        "odd.wat": '(module (func (export "_start") (param i32)))',
        "imports.wat": '(module (import "env" "missing" (func)) (func (export "_start")))',
        "exit200.wat": '(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))'
                       ' (memory (export "memory") 1) (func (export "_start") (call $exit (i32.const 200))))',
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert expected in refusal(linmem_process(*words, cwd=tmp_path), code)


@pytest.mark.parametrize(("words", "missing", "advice"), [
    (["run", "PROGRAM"], "wasmtime", "pip install 'linmem[wasmtime]'"),
    (["prewarm", "PROGRAM", "-o", "no-file"], "wasmtime", "pip install 'linmem[wasmtime]'"),
    (["demo"], "wasmtime", "pip install 'linmem[demo]'"),
    (["demo"], "numpy", "pip install 'linmem[demo]'"),
])
def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, wat, words, missing, advice):
    # A package of this name that raises Python's error for a package that is not installed.
    (tmp_path / "hidden" / missing).mkdir(parents=True)
    (tmp_path / "hidden" / missing / "__init__.py").write_text(
        f"raise ModuleNotFoundError(\"No module named '{missing}'\", name='{missing}')")
    path = os.pathsep.join([str(tmp_path / "hidden"), ENVIRONMENT["PYTHONPATH"]])
    words = [str(wat('(module (func (export "_start")))')) if word == "PROGRAM" else word for word in words]
    assert advice in refusal(linmem_process(*words, env={"PYTHONPATH": path}), 1)


def test_a_bare_linmem_prints_its_help_and_is_a_usage_error():
    done = linmem_process()
    assert (done.returncode, done.stdout) == (2, b"")
    for command in cli.COMMANDS:
        assert command.encode() in done.stderr


def test_the_version_is_the_packages():
    assert linmem_process("--version").stdout.decode().split() == ["linmem", linmem.__version__]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_is_a_module_that_declares_its_arguments_and_runs(command):
    module = importlib.import_module(f"linmem._commands.{command}")
    assert list(inspect.signature(module.add_arguments).parameters) == ["parser"]
    assert list(inspect.signature(module.main).parameters) == ["args"]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_each_command_explains_itself_and_its_exit_codes(command):
    done = linmem_process(command, "--help")
    assert done.returncode == 0
    assert f"linmem {command}".encode() in done.stdout
    assert re.search(r"exit\s+codes?\b", done.stdout.decode(), re.IGNORECASE)


def test_the_help_names_the_exit_codes_that_all_commands_share():
    said = linmem_process("--help").stdout.decode()
    assert re.findall(r"\b(\d+) (?:if|on)\b", said) == ["0", "1", "2", "130"]


def test_the_help_of_run_names_every_creator():
    from linmem.creators import KINDS

    said = linmem_process("run", "--help").stdout.decode()
    for kind in KINDS:
        assert re.search(rf"\b{kind}\b", said), kind


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_the_help_fits_the_terminal(command, columns):
    said = linmem_process(*command.split(), "--help", env={"COLUMNS": str(columns)}).stdout.decode()
    usage, _, rest = said.partition("\n\n")        # argparse breaks the lines of the usage
    assert usage.startswith("usage: ")
    # A line of one word cannot be broken.
    assert [line for line in rest.splitlines() if len(line) > columns and " " in line.strip()] == []
    assert len(said) > 200


def test_the_manual_page_has_the_whole_help_of_each_command():
    page = re.sub(r"\\f.|\\,|\\/", "", MANUAL.read_text("utf-8")).replace("\\", "")
    head, *sections = re.split(r"^\.SH COMMAND 'linmem (?=\w+'$)", page, flags=re.MULTILINE)
    assert "\nlinmem - " in head, "man -k needs a line that says what the command is for"
    found = {section.partition("'")[0]: " ".join(section.split()) for section in sections}
    assert list(found) == list(cli.COMMANDS)
    _, parsers = cli.build_parser()
    for command, text in found.items():
        importlib.import_module(f"linmem._commands.{command}").add_arguments(parsers[command])
        for part in (parsers[command].description, parsers[command].epilog):
            assert part is None or " ".join(part.split()) in text, command


def test_the_reference_has_each_option_in_the_section_of_its_command():
    page = (MANUAL.parent / "reference" / "cli.md").read_text("utf-8")
    _, parsers = cli.build_parser()
    seen = []
    for command, parser in parsers.items():
        importlib.import_module(f"linmem._commands.{command}").add_arguments(parser)
        section = page.partition(f"\n## linmem {command}\n")[2].partition("\n## ")[0]
        waiting = [parser]
        while waiting:
            for action in waiting.pop()._actions:
                if isinstance(action, argparse._SubParsersAction):
                    waiting += action.choices.values()
                seen += [(command, option, section) for option in action.option_strings
                         if option.startswith("--") and option != "--help"]
                if action.dest == "suite":
                    seen += [(command, f"--suite {suite}", section) for suite in action.choices]
    assert len(seen) > 50
    assert [(command, option) for command, option, section in seen if option not in section] == []


def test_info_breaks_its_lines_between_words_on_a_terminal(monkeypatch, capsys):
    figures = {"linmem": "1", "python": "3", **linmem.describe(), "self_test": {"children": [], "passed": True},
               "wasmtime": {"version": "1", "works": True, "detail": "a detail of many words " * 5}}
    info.print_info(figures)
    plain = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    info.print_info(figures)
    said = capsys.readouterr().out
    assert max(map(len, plain.splitlines())) > 100
    assert max(map(len, said.splitlines())) <= 60
    assert said.split() == plain.split()


@requires("docstrings")
def test_creator_help_lists_the_kinds_with_their_options_and_needs_no_program():
    done = linmem_process("run", "--creator", "help", env={"COLUMNS": "60"})
    said = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    assert re.findall(r"^(\w+) ", said, re.MULTILINE) == [
        "mmap", "pool", "limiting", "statistics", "tracking", "callback", "shared", "file"]
    assert re.findall(r"\bpath=VALUE\b|\bslots=none\b|\bprefault=false\b", said) == [
        "prefault=false", "slots=none", "path=VALUE"]
    assert "upstream" not in said
    assert "on_made" not in said
    assert "keep_resident=64MiB" in said
    assert max(map(len, said.splitlines())) <= 60


def test_creator_help_lists_the_kinds_without_options_if_classes_have_no_signatures(monkeypatch):
    def no_signature(thing):
        raise ValueError(f"no signature found for builtin type {thing!r}")

    monkeypatch.setattr(inspect, "signature", no_signature)
    lines = creator_option.list_kinds().splitlines()
    assert [line.split()[0] for line in lines if line[0] != " "] == [
        "mmap", "pool", "limiting", "statistics", "tracking", "callback", "shared", "file"]


@requires("docstrings")
@pytest.mark.parametrize("kind", ["mmap", "pool", "statistics", "tracking", "callback", "shared"])
def test_the_defaults_that_creator_help_shows_are_values_that_the_option_takes(kind):
    said = linmem_process("run", "--creator=help").stdout.decode()
    text = re.search(rf"^{kind} .*?(?=^\w|\Z)", said, re.MULTILINE | re.DOTALL)[0]
    options = re.findall(r"\b\w+=\S+", text)
    assert options
    if kind != "shared" or NEEDS["shared"][0]:
        compose_creator(f"{kind}:{','.join(options)}", None)


def test_a_program_that_cannot_be_read_is_refused_and_reported_as_one_that_cannot_be_run(tmp_path):
    done = linmem_process("run", "--json", tmp_path / "missing.wasm")
    assert done.returncode == 1
    first, last = done.stderr.decode().splitlines()
    assert "cannot read" in first
    assert (json.loads(last)["exit_code"], json.loads(last)["memories"]) == (1, [])


def test_info_has_words_for_every_capability():
    from linmem._os import pages

    assert set(info.CAPABILITY_WORDS) == {
        name for name, value in pages.describe()["capabilities"].items() if isinstance(value, bool)}


def test_importing_the_command_line_loads_neither_numpy_nor_wasmtime_nor_json():
    script = ("import sys; before = set(sys.modules); import linmem.cli;"
              "print(*sorted({'numpy', 'wasmtime', 'json', 'subprocess', 'rich'} & (set(sys.modules) - before)))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=SECONDS, env=ENVIRONMENT,
                          check=True)
    assert done.stdout.strip() == b""


# -- demo ---------------------------------------------------------------------------------------------------

def test_the_demo_succeeds_and_its_addresses_are_the_same_before_and_after():
    done = linmem_process("demo")
    text = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b""), text
    pairs = re.findall(r"(0x[0-9a-f]+) before, (0x[0-9a-f]+) after", text)
    assert len(pairs) == 3
    assert all(before == after for before, after in pairs)
    assert pairs[1] != pairs[0]
    assert "153 growths" in text
    assert text.count("664579") == 2
    assert "FAILED" not in text
    assert len(text.splitlines()) <= 36


def test_the_demo_writes_plain_ascii():
    assert linmem_process("demo").stdout.isascii()


@pytest.mark.parametrize(("name", "value", "said"), [
    ("PRIMES", {demo.FIRST_LIMIT: 1229, demo.LIMIT: 664_580}, "expected 664580, found 664579"),
    ("PRIMES", {demo.FIRST_LIMIT: 1230, demo.LIMIT: 664_579}, "expected 1230, found 1229"),
    ("LARGEST_PRIME", 9_999_992, "expected 9999992, found 9999991"),
    ("TWIN_PRIMES", 58_981, "expected 58981, found 58980"),
])
def test_a_wrong_figure_of_the_demo_is_printed_and_fails_the_demo(monkeypatch, capsys, name, value, said):
    monkeypatch.setattr(demo, name, value)
    assert cli.main(["demo"]) == 1
    out = capsys.readouterr().out
    assert said in out
    assert "FAILED." in out.splitlines()[-1]


def test_an_address_that_moved_fails_the_demo(monkeypatch, capsys):
    addresses = iter([65536, 131072, 65536, 65536])
    monkeypatch.setattr(demo, "address_of", lambda array: next(addresses))
    assert cli.main(["demo"]) == 1
    assert "[FAILED] address: 0x10000 before, 0x20000 after" in capsys.readouterr().out


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_subcommand_after_two_dashes_is_accepted_or_is_a_wrong_command_line(monkeypatch, command):
    """Versions of Python differ in whether argparse accepts a subcommand after two dashes."""
    monkeypatch.setattr(demo, "main", lambda args: 7)
    monkeypatch.setattr(info, "main", lambda args: 7 + args.json)
    def ended():
        try:
            return cli.main(["--", command])
        except SystemExit as end:
            return end.code

    assert ended() in ((2, 7) if command in ("demo", "info") else (2,))


@requires("rlimits")
def test_the_demo_runs_where_the_address_space_is_short():
    import resource

    limit = 3_000_000 * 1024
    done = subprocess.run([sys.executable, "-m", "linmem", "demo"], capture_output=True, timeout=SECONDS,
                          env={**ENVIRONMENT, "OPENBLAS_NUM_THREADS": "1"},
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert (done.returncode, done.stderr) == (0, b""), done.stdout


# -- info ---------------------------------------------------------------------------------------------------

def test_info_shows_the_page_floors_values_and_that_guards_crash_a_child(tmp_path):
    from importlib.metadata import version

    from linmem._os import pages

    done = linmem_process("info", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    figures = json.loads(done.stdout)
    floor = pages.describe()
    assert {name: figures[name] for name in ("page_size", "granularity", "capabilities", "limits")} == {
        name: floor[name] for name in ("page_size", "granularity", "capabilities", "limits")}
    assert figures["linmem"] == linmem.__version__
    assert 30 < figures["address_bits"] <= 64
    assert figures["reserved"] == 0         # that process had made no memory
    assert (figures["wasmtime"]["version"], figures["wasmtime"]["works"]) == (version("wasmtime"), True)
    # A wasmtime-py before 39 has no components.
    has_components = importlib.util.find_spec("wasmtime.component") is not None
    assert figures["wasmtime"]["components"]["works"] is has_components
    assert ("has no components" in figures["wasmtime"]["components"]["detail"]) is not has_components
    children = figures["self_test"]["children"]
    assert figures["self_test"]["passed"] is True
    assert [child["must_fault"] for child in children] == [False, True, True, True]
    assert [child["died_of"] for child in children[:1]] == [None]
    assert all(child["died_of"].startswith(("SIGSEGV", "SIGBUS", "access violation")) for child in children[1:])
    assert list(tmp_path.glob("core*")) == []


def test_info_in_words_names_the_signal_of_each_child():
    done = linmem_process("info")
    text = done.stdout.decode()
    assert (done.returncode, done.stderr) == (0, b"")
    assert len(re.findall(r"\[ok\] .*: ended by (?:SIGSEGV|SIGBUS|access violation)", text)) == 3
    assert "The guards hold." in text
    assert re.search(r"^address bits .*linmem holds 0 bytes\r?$", text, re.MULTILINE)
    assert "linmem.wasmtime works" in text
    assert re.search(r"^components +(work|do not work): ", text, re.MULTILINE)


@pytest.mark.parametrize(("script", "why"), [
    ("print('ready'); print(0)", "a byte that may not be touched was read"),
    ("raise SystemExit('boom')", "the child never came to the access"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", "it died of something else"),
    ("from linmem._os import pages; pages.die_quietly(); import ctypes; ctypes.c_ubyte.from_address(1).value",
     "it died before it was ready"),
])
def test_the_self_test_can_fail(monkeypatch, capsys, script, why):
    monkeypatch.setattr(info, "GUARD_CHILD", script)
    assert cli.main(["info"]) == 1, why
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "THE GUARDS DO NOT HOLD" in out


def test_info_gives_the_reason_if_the_installer_does_not_work(monkeypatch, capsys):
    monkeypatch.setattr(info, "WASMTIME_CHILD", "raise RuntimeError('no host memory creators')")
    assert cli.main(["info", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["wasmtime"]
    assert figures["works"] is False
    assert figures["detail"] == "RuntimeError: no host memory creators (exit code 1)"
    assert "components" not in figures


def test_info_gives_the_reason_if_components_do_not_work(monkeypatch, capsys):
    monkeypatch.setattr(info, "COMPONENT_CHILD", "raise RuntimeError('no components')")
    assert cli.main(["info"]) == 0
    assert re.search(r"^components +do not work: RuntimeError: no components \(exit code 1\)$", capsys.readouterr().out,
                     re.MULTILINE)


@pytest.mark.parametrize(("returncode", "name"), [
    (3221225477, "access violation (0xC0000005)"), (-1073741819, "access violation (0xC0000005)"),
    (0, None), (1, None), (None, None), (-15, None), (139, None),
])
def test_only_memory_faults_are_named_as_memory_faults(returncode, name):
    assert info.death(returncode) == name


def test_a_reader_that_closes_the_pipe_causes_no_traceback():
    process = subprocess.Popen([sys.executable, "-m", "linmem", "info", "--json"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=ENVIRONMENT)
    process.stdout.close()
    with process.stderr:
        error = process.stderr.read()
    assert process.wait(SECONDS) == 1
    assert error == b""


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_run_whose_results_nobody_reads_has_its_report(wat, buffered):
    path = wat('(module (memory (export "memory") 3) (func (export "seven") (result i32) (i32.const 7)))')
    process = subprocess.Popen([sys.executable, "-m", "linmem", "run", "--json", "--invoke", "seven", path],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**ENVIRONMENT, "PYTHONUNBUFFERED": buffered})
    process.stdout.close()
    with process.stderr:
        (line,) = process.stderr.read().splitlines()
    assert process.wait(SECONDS) == 1
    report = json.loads(line)
    assert (report["exit_code"], report["memories"][0]["first_size"]) == (1, 3 * 65536)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
def test_the_report_of_a_run_whose_results_do_not_fit_the_disk_is_the_last_line(wat):
    path = wat('(module (func (export "seven") (result i32) (i32.const 7)))')
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "linmem", "run", "--json", "--invoke", "seven", path],
                              stdout=full, stderr=subprocess.PIPE, timeout=SECONDS, env=ENVIRONMENT)
    reason, line = done.stderr.decode().splitlines()
    assert (done.returncode, reason) == (1, f"linmem run: standard output: {os.strerror(errno.ENOSPC)}")
    assert json.loads(line)["exit_code"] == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no device that is always full")
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["info", "--help"], ["run", "--creator", "help"]])
def test_a_help_that_cannot_be_written_is_a_failure(words):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "linmem", *words], stdout=full, stderr=subprocess.PIPE,
                              timeout=SECONDS, env=ENVIRONMENT)
    assert (done.returncode, done.stderr.decode().splitlines()) == (
        1, [f"linmem {words[0]}: standard output: {os.strerror(errno.ENOSPC)}"])


# -- bench --------------------------------------------------------------------------------------------------

def bench_module(main):
    module = types.ModuleType("linmem.bench.command")
    module.add_arguments = lambda parser: parser.add_argument("--quick", action="store_true")
    module.main = main
    return module


def test_bench_gets_its_arguments_and_its_exit_code_is_ours(monkeypatch):
    seen = []
    module = bench_module(lambda args: seen.append(args.quick) or 7)
    monkeypatch.setitem(sys.modules, "linmem.bench.command", module)
    assert cli.main(["bench", "--quick"]) == 7
    assert seen == [True]


@pytest.mark.parametrize(("missing", "advice"), [
    ("matplotlib.pyplot", "linmem[bench]"), ("linmem.bench", "pip install -e ."),
])
def test_bench_names_the_missing_packages(monkeypatch, capsys, missing, advice):
    def main(args):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    module = bench_module(main)
    monkeypatch.setitem(sys.modules, "linmem.bench.command", module)
    assert cli.main(["bench"]) == 1
    assert advice in capsys.readouterr().err


def test_an_import_error_of_another_kind_is_not_hidden(monkeypatch):
    def main(args):
        raise ModuleNotFoundError("No module named 'left_pad'", name="left_pad")

    module = bench_module(main)
    monkeypatch.setitem(sys.modules, "linmem.bench.command", module)
    with pytest.raises(ModuleNotFoundError, match="left_pad"):
        cli.main(["bench"])


@requires("fork")
@pytest.mark.parametrize("closed", [1, 2])
@pytest.mark.parametrize("words", ["info --json", "info", "image info no-file", "image diff no-file no-file"])
def test_a_closed_output_stream_causes_no_traceback_and_no_output_elsewhere(words, closed, tmp_path):
    done = subprocess.run(["sh", "-c", f'"$0" -m linmem {words} {closed}>&-', sys.executable], capture_output=True,
                          text=True, timeout=120, cwd=tmp_path)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == (1 if "no-file" in words else 0)
    assert (done.stdout, done.stderr)[closed - 1] == ""


@pytest.mark.parametrize("arguments", [
    ["run", "no\nprogram.wasm"], ["run", "--dir", "no\nfolder", "x.wasm"], ["run", "--env", "no\nvariable", "x.wasm"],
    ["run", "--no\noption", "x.wasm"], ["run", "--creator", "no\nkind", "x.wasm"],
    ["run", "--max-memory", "1\nMiB", "x.wasm"], ["run", "--start", "no\nfile", demo.__file__.replace(".py", ".wasm")],
    ["prewarm", "no\nprogram.wasm", "-o", "no-file"], ["prewarm", "--no\noption"],
    ["info", "--no\noption"], ["info", "no\nword"], ["image", "info", "--no\noption", "x"], ["no\ncommand"],
    ["image", "no\naction"], ["bench", "--no\noption"]])
def test_a_refusal_is_one_line_for_words_with_any_characters(arguments):
    done = linmem_process(*arguments)
    assert refusal(done, done.returncode).strip("\r\n").isprintable()
    assert done.returncode in (1, 2)


@requires("odd_names")
@pytest.mark.parametrize(("text", "code"), [
    ("(module)", 1), ("(module (func (export \"_start\") unreachable))", 134), ("(module (", 1),
    ("(module (import \"a\\nb\" \"c\" (func)) (func (export \"_start\")))", 1)])
def test_a_program_with_a_newline_in_its_name_is_named_in_one_line(tmp_path, text, code):
    path = tmp_path / "a\nprogram.wat"
    path.write_text(text)
    done = linmem_process("run", str(path))
    first, *more = done.stderr.decode().splitlines()
    assert (done.returncode, first.startswith("linmem run: "), bool(more)) == (code, True, code == 134)
    assert first.isprintable()
    assert "a\\nprogram.wat" in first


@pytest.mark.skipif(os.name == "nt", reason="argcomplete answers shells of POSIX systems")
@pytest.mark.parametrize(("line", "expected"), [
    ("linmem pre", {"prewarm"}), ("linmem run --max-", {"--max-memory", "--max-instances"}),
    ("linmem cache ", {"-h", "--help", "info", "prune"}), ("linmem nothing --x", set())])
def test_a_shell_gets_what_may_come_next(line, expected, tmp_path):
    pytest.importorskip("argcomplete")
    answer = tmp_path / "answer"
    subprocess.run(
        [sys.executable, "-m", "linmem"], timeout=60, check=True, cwd=tmp_path, capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n",
             "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
             "COMP_LINE": line, "COMP_POINT": str(len(line))})
    assert set(answer.read_text().split()) == expected
