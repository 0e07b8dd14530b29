"""``linmem run`` of components: commands with ``wasi:cli/run``, and functions of --invoke."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest
from support import file_requires
from test_cli import ENVIRONMENT, SECONDS, linmem_process, refusal, report_of, wat
from test_run_report import takes_objects

from linmem import cli

file_requires("components")

from wasmtime import component  # noqa: E402

from linmem._commands import component_values  # noqa: E402

__all__ = ["wat"]       # a fixture

PAGE = 65536


def command(main, imports="", lowered="", given="", version="0.2.0"):
    """A component with `wasi:cli/run`. The functions of `main` that are given are imports of "wasi"."""
    return f"""(component {imports}
      {lowered}
      (core module $main {main})
      (core instance $main (instantiate $main (with "wasi" (instance {given}))))
      (func $run (result (result)) (canon lift (core func $main "run")))
      (instance $command (export "run" (func $run)))
      (export "wasi:cli/run@{version}" (instance $command)))"""


def exits(function, code, kind):
    return command(
        f'(import "wasi" "exit" (func $exit (param i32))) (memory 3)'
        f'(func (export "run") (result i32) (call $exit (i32.const {code})) (i32.const 0))',
        f'(import "wasi:cli/exit@0.2.0" (instance $exit (export "{function}" (func (param "status" {kind})))))',
        f'(core func $exit (canon lower (func $exit "{function}")))', '(export "exit" (func $exit))')


def returns(code, version="0.2.0"):
    return command(f'(func (export "run") (result i32) (i32.const {code}))', version=version)


RUNS_ON = command('(memory 3) (func (export "run") (result i32) (loop $l (br $l)) (i32.const 0))')
MEMORY = """
  (core module $memory (memory (export "memory") 1) (global $end (mut i32) (i32.const 1024))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (local i32)
      (local.set 4 (i32.and (i32.add (global.get $end) (i32.const 7)) (i32.const -8)))
      (global.set $end (i32.add (local.get 4) (local.get 3)))
      (local.get 4)))
  (core instance $memory (instantiate $memory))
  (alias core export $memory "memory" (core memory $memory))
  (alias core export $memory "realloc" (core func $realloc))
"""
ALLOCATES = "(memory $memory) (realloc $realloc)"


def streams(version, kind, method, parameters, result):
    return f"""
      (import "wasi:io/error@{version}" (instance $errors (export "error" (type (sub resource)))))
      (alias export $errors "error" (type $error))
      (import "wasi:io/streams@{version}" (instance $streams
        (export "{kind}" (type $stream (sub resource)))
        (alias outer 1 $error (type $error))
        (type $failure (variant (case "last-operation-failed" (own $error)) (case "closed")))
        (export "stream-error" (type $stream-error (eq $failure)))
        (export "[method]{kind}.{method}" (func (param "self" (borrow $stream)) {parameters}
          (result (result {result} (error $stream-error)))))))
      (alias export $streams "{kind}" (type $stream))"""


def writes(text, method="blocking-write-and-flush", version="0.2.0"):
    """A command that writes a text of up to 4096 characters to standard output, and exits with 1 if it cannot."""
    return command(
        """(import "wasi" "memory" (memory 1))
        (import "wasi" "get" (func $get (result i32))) (import "wasi" "write" (func $write (param i32 i32 i32 i32)))
        """ f"""(data (i32.const 4096) "{text}")
        (func (export "run") (result i32)
          (call $write (call $get) (i32.const 4096) (i32.const {len(text)}) (i32.const 0)) (i32.load8_u (i32.const 0)))
        """, streams(version, "output-stream", method, '(param "contents" (list u8))', "") + f"""
        (import "wasi:cli/stdout@{version}" (instance $stdout (export "get-stdout" (func (result (own $stream))))))""",
        MEMORY + f"""(core func $get (canon lower (func $stdout "get-stdout")))
        (core func $write (canon lower (func $streams "[method]output-stream.{method}") {ALLOCATES}))""",
        '(export "memory" (memory $memory "memory")) (export "get" (func $get)) (export "write" (func $write))',
        version)


# -- commands ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "code"), [
    (returns(0), 0), (returns(1), 1), (exits("exit", 0, "(result)"), 0), (exits("exit", 1, "(result)"), 1),
    (exits("exit-with-code", 0, "u8"), 0), (exits("exit-with-code", 42, "u8"), 42),
    (exits("exit-with-code", 255, "u8"), 255),
], ids=str)
def test_the_exit_code_is_the_commands(wat, text, code):
    done = linmem_process("run", wat(text))
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


@pytest.mark.parametrize("version", ["0.2.0", "0.2.6", "0.2.99"])
def test_a_command_of_any_version_0_2_runs(wat, version):
    assert linmem_process("run", wat(returns(1, version))).returncode == 1


@pytest.mark.parametrize("start", ["", "(start $deep)"])
def test_a_trap_ends_with_134_and_names_its_kind_and_place(wat, start):
    path = wat(command(f'(func $deep unreachable) {start} (func (export "run") (result i32) call $deep i32.const 0)'))
    done = linmem_process("run", path)
    assert (done.returncode, done.stdout) == (134, b"")
    first, *rest = done.stderr.decode().splitlines()
    assert first == f"linmem run: {path} trapped: wasm trap: wasm `unreachable` instruction executed"
    assert any("deep" in line for line in rest)


def test_a_result_that_is_none_is_a_trap(wat):
    done = linmem_process("run", wat(returns(7)))
    assert (done.returncode, done.stdout) == (134, b"")
    assert b"trapped: " in done.stderr


@pytest.mark.parametrize("method", ["blocking-write-and-flush", "write"])
@pytest.mark.parametrize("text", ["a line", "a line and its end\\0a"])
def test_all_output_of_a_command_arrives_also_if_it_flushes_nothing(wat, method, text):
    done = linmem_process("run", "--json", wat(writes(text, method)))
    written = text.replace("\\0a", "\n")
    assert done.stdout.decode() == written + "\0" * (len(text) - len(written))
    assert (done.returncode, len(report_of(done)["memories"])) == (0, 1)


def test_the_binary_of_a_component_runs_as_its_text_does(wat):
    import wasmtime

    path = wat(bytes(wasmtime.wat2wasm(returns(1))), "command.wasm")
    assert linmem_process("run", path).returncode == 1


INPUTS = f"""(component
  (import "wasi:cli/environment@0.2.0" (instance $environment
    (export "get-arguments" (func (result (list string))))
    (export "get-environment" (func (result (list (tuple string string)))))))
  {streams("0.2.0", "input-stream", "blocking-read", '(param "len" u64)', "(list u8)")}
  (import "wasi:cli/stdin@0.2.0" (instance $stdin (export "get-stdin" (func (result (own $stream))))))
  {MEMORY}
  (core func $arguments (canon lower (func $environment "get-arguments") {ALLOCATES}))
  (core func $environment (canon lower (func $environment "get-environment") {ALLOCATES}))
  (core func $get (canon lower (func $stdin "get-stdin")))
  (core func $read (canon lower (func $streams "[method]input-stream.blocking-read") {ALLOCATES}))
  (core module $main
    (import "wasi" "arguments" (func $arguments (param i32)))
    (import "wasi" "environment" (func $environment (param i32)))
    (import "wasi" "get" (func $get (result i32)))
    (import "wasi" "read" (func $read (param i32 i64 i32)))
    (func (export "arguments") (result i32) (call $arguments (i32.const 0)) (i32.const 0))
    (func (export "environment") (result i32) (call $environment (i32.const 0)) (i32.const 0))
    (func (export "read") (result i32) (call $read (call $get) (i64.const 100) (i32.const 0)) (i32.const 4)))
  (core instance $main (instantiate $main (with "wasi" (instance
    (export "arguments" (func $arguments)) (export "environment" (func $environment)) (export "get" (func $get))
    (export "read" (func $read))))))
  (func (export "arguments") (result (list string)) (canon lift (core func $main "arguments") {ALLOCATES}))
  (func (export "environment") (result (list (tuple string string)))
    (canon lift (core func $main "environment") {ALLOCATES}))
  (func (export "read") (result (list u8)) (canon lift (core func $main "read") {ALLOCATES})))"""


def test_arguments_variables_and_standard_input_reach_a_component(wat):
    path = wat(INPUTS, "inputs.wat")
    done = linmem_process("run", "--invoke", "arguments", path, "--json", "--", "a b")
    assert json.loads(done.stdout) == ["inputs.wat", "--json", "--", "a b"]
    done = linmem_process("run", "--env", "A=1", "--env", "B=", "--invoke", "environment", path)
    assert json.loads(done.stdout) == [["A", "1"], ["B", ""]]
    done = linmem_process("run", "--invoke", "read", path, stdin=b"ab\xff")
    assert (json.loads(done.stdout), done.stderr) == ([97, 98, 255], b"")


def test_a_component_writes_log_lines_to_standard_error(wat):
    path = wat(command(
        """(import "wasi" "log" (func $log (param i32 i32 i32 i32 i32)))
        (func (export "run") (result i32)
          (call $log (i32.const 1) (i32.const 0) (i32.const 3) (i32.const 3) (i32.const 6)) (i32.const 0))""",
        """(import "wasi:logging/logging" (instance $logging
          (type $levels (enum "trace" "debug")) (export "level" (type $level (eq $levels)))
          (export "log" (func (param "level" $level) (param "context" string) (param "message" string)))))""",
        """(core module $texts (memory (export "memory") 1) (data (i32.const 0) "onetwo\\0a\\1bx"))
        (core instance $texts (instantiate $texts))
        (alias core export $texts "memory" (core memory $memory))
        (core func $log (canon lower (func $logging "log") (memory $memory)))""",
        '(export "log" (func $log))'))
    done = linmem_process("run", path)
    assert (done.returncode, done.stdout, done.stderr.split(b"\n")) == (0, b"", [b"debug one two\\n\\x1bx", b""])


# -- limits ---------------------------------------------------------------------------------------------------

def test_the_limits_hold_for_a_component(wat):
    path = wat(RUNS_ON)
    done = linmem_process("run", "--timeout", "0.2", "--json", path)
    assert (done.returncode, [memory["first_size"] for memory in report_of(done)["memories"]]) == (124, [3 * PAGE])
    done = linmem_process("run", "--fuel", "10000", path)
    said = done.stderr.decode().rstrip()
    assert (done.returncode, said) == (134, f"linmem run: {path} ran out of fuel (--fuel 10000)")
    assert "limit of 65536 bytes reached" in refusal(linmem_process("run", "--max-memory", "64KiB", path), 1)


def test_the_budget_is_one_over_the_memories_of_all_instances(wat):
    path = wat("""(component
      (core module $one (memory (export "memory") 1)
        (func (export "grow") (result i32) (memory.grow (i32.const 1))))
      (core instance $a (instantiate $one)) (core instance $b (instantiate $one))
      (func (export "a") (result s32) (canon lift (core func $a "grow")))
      (func (export "b") (result s32) (canon lift (core func $b "grow"))))""")
    for limit, answer in (("256KiB", b"1"), ("191KiB", b"-1")):
        for function in "a", "b":
            done = linmem_process("run", "--max-memory", limit, "--invoke", function, path)
            assert done.stdout.split() == [answer], done.stderr
    assert linmem_process("run", "--max-instances", "2", "--invoke", "a", path).returncode == 0
    assert "instance count too high at 2 (--max-instances 1)" in refusal(
        linmem_process("run", "--max-instances", "1", "--invoke", "a", path), 1)


LOOP = "(loop $l (br $l)) (i32.const 0)"
WRITE = "(call $write (call $get) (i32.const 4096) (i32.const 4) (i32.const 0))"


@pytest.mark.parametrize("options", [[], ["--fuel", "1000000000000"]])
def test_a_line_without_an_end_arrives_also_if_the_command_is_ended_by_a_timeout(wat, options):
    path = wat(writes("text", "write").replace("(i32.load8_u (i32.const 0))", LOOP))
    done = linmem_process("run", "--timeout", "0.2", *options, path)
    assert (done.returncode, done.stdout) == (124, b"text")
    assert done.stderr.splitlines() == [f"linmem run: {path} ran for longer than --timeout 0.2 seconds".encode()]


def test_a_timeout_ends_a_command_that_fills_a_pipe_that_nobody_reads(wat):
    path = wat(writes("text", "blocking-write-and-flush").replace(WRITE, f"(loop $again {WRITE} (br $again))"))
    words = [sys.executable, "-m", "linmem", "run", "--timeout", "0.2", str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.wait(SECONDS) == 124
        assert set(process.stdout.read()) == set(b"text")
        assert b"--timeout" in process.stderr.read()


# -- the cache ------------------------------------------------------------------------------------------------

def test_a_component_is_compiled_once(wat, tmp_path, monkeypatch, capfd):
    path = wat(writes("text", "write"))
    words = ["run", "--cache", str(tmp_path / "cache"), str(path)]
    assert cli.main(words) == 0
    monkeypatch.setattr(component, "Component", type("Component", (component.Component,), {
        "__init__": lambda *arguments: pytest.fail("a component was compiled")}))
    monkeypatch.setattr("linmem._commands.component_program.component.Component", component.Component)
    assert cli.main(words) == 0
    assert capfd.readouterr() == ("texttext", "")


def test_a_component_with_fuel_and_report_is_compiled_once(wat, tmp_path, monkeypatch, capfd):
    path = wat(command(f'(memory 1) (data (i32.const 0) "{"data" * 1000}") (func (export "run") (result i32)'
                       " (i32.ne (i32.load (i32.const 3996)) (i32.const 0x61746164)))"))
    words = ["run", "--cache", str(tmp_path / "cache"), "--json", "--fuel", "50", str(path)]
    assert cli.main(words) == 0
    monkeypatch.setattr(component, "Component", type("Component", (component.Component,), {
        "__init__": lambda *arguments: pytest.fail("a component was compiled")}))
    monkeypatch.setattr("linmem._commands.component_program.component.Component", component.Component)
    assert cli.main(words) == 0
    assert capfd.readouterr().out == ""


# -- the report -----------------------------------------------------------------------------------------------

def names_in(done):
    return [memory["name"] for memory in report_of(done)["memories"]]


@pytest.mark.parametrize(("body", "code"), [
    ("(i32.const 0)", 0), ("unreachable", 134), ("(loop $l (br $l)) (i32.const 0)", 124)])
@pytest.mark.parametrize("options", [[], ["--no-cache"], ["--fuel", "1000000000000"]])
def test_the_report_names_the_memories_of_a_component_however_it_ends(wat, body, code, options):
    path = wat(f"""(component
      (core module $empty)
      (core module $two (memory 1) (memory 2) (func (export "grow") (drop (memory.grow 1 (i32.const 7)))))
      (component $inner (core module $m (memory 3)) (core instance (instantiate $m)))
      (core instance (instantiate $empty)) (core instance $a (instantiate $two)) (core instance (instantiate $two))
      (instance (instantiate $inner))
      (core module $main (import "a" "grow" (func $grow)) (func (export "run") (result i32) (call $grow) {body}))
      (core instance $main (instantiate $main (with "a" (instance $a))))
      (func $run (result (result)) (canon lift (core func $main "run")))
      (instance $command (export "run" (func $run)))
      (export "wasi:cli/run@0.2.0" (instance $command)))""")
    done = linmem_process("run", *options, "--timeout", "1", "--json", path)
    assert done.returncode == code, done.stderr
    assert [(memory["name"], memory["first_size"] // PAGE, memory["peak_size"] // PAGE)
            for memory in report_of(done)["memories"]] == [
        ("module 1, instance 0, memory 0", 1, 1), ("module 1, instance 0, memory 1", 2, 9),
        ("module 1, instance 1, memory 0", 1, 1), ("module 1, instance 1, memory 1", 2, 2),
        ("module 2, memory 0", 3, 3)]


@pytest.mark.skipif(not takes_objects(), reason="this wasmtime has no references to objects by default")
def test_the_report_names_the_heap_of_a_component(wat):
    done = linmem_process("run", "--json", wat(command("""
        (type $box (struct (field i32))) (memory 1) (global $kept (mut (ref null $box)) (ref.null $box))
        (func (export "run") (result i32) (global.set $kept (struct.new $box (i32.const 1))) (i32.const 0))""")))
    assert (done.returncode, sorted(names_in(done))) == (0, ["GC heap", "module 0, memory 0"])


def test_the_memories_of_a_component_that_could_not_be_made_have_no_names(wat):
    done = linmem_process("run", "--json", "--max-memory", "192KiB", wat(command(
        '(memory 1) (memory 2) (memory 3) (func (export "run") (result i32) (i32.const 0))')))
    assert (done.returncode, names_in(done)) == (1, [None, None])


# -- functions ------------------------------------------------------------------------------------------------

FUNCTIONS = f"""(component
  {MEMORY}
  (core module $main
    (import "memory" "memory" (memory 1))
    (func (export "i32") (param i32) (result i32) (local.get 0))
    (func (export "i64") (param i64) (result i64) (local.get 0))
    (func (export "f32") (param f32) (result f32) (local.get 0))
    (func (export "f64") (param f64) (result f64) (local.get 0))
    (func (export "two") (param i32 i32) (result i32)
      (i32.store (i32.const 0) (local.get 0)) (i32.store (i32.const 4) (local.get 1)) (i32.const 0))
    (func (export "three") (param i32 i32 i32) (result i32)
      (i32.store (i32.const 0) (local.get 0)) (i32.store (i32.const 4) (local.get 1))
      (i32.store (i32.const 8) (local.get 2)) (i32.const 0))
    (func (export "none")) (func (export "sum") (param i32 i32) (result i32) (i32.add (local.get 0) (local.get 1))))
  (core instance $main (instantiate $main (with "memory" (instance $memory))))
  (type $colors (enum "red" "dark-green")) (export $color "color" (type $colors))
  (type $modes (flags "read" "write" "run")) (export $mode "mode" (type $modes))
  (type $points (record (field "at-x" u32) (field "name" string))) (export $point "point" (type $points))
  (type $shapes (variant (case "none") (case "number" u32) (case "text" string))) (export $shape "shape" (type $shapes))
  (type $objects (resource (rep i32))) (export $object "object" (type $objects))
  (core func $new (canon resource.new $objects))
  (func (export "make-object") (param "rep" u32) (result (own $object)) (canon lift (core func $new)))
  (func (export "none") (canon lift (core func $main "none")))
  (func (export "sum") (param "a" s32) (param "b" s32) (result s32) (canon lift (core func $main "sum")))
  IDENTITIES)"""
IDENTITIES = {
    "bool": ("bool", "i32"), "s8": ("s8", "i32"), "u8": ("u8", "i32"), "u16": ("u16", "i32"), "s64": ("s64", "i64"),
    "u64": ("u64", "i64"), "float": ("f32", "f32"), "double": ("f64", "f64"), "char": ("char", "i32"),
    "color": ("$color", "i32"), "mode": ("$mode", "i32"), "string": ("string", "two"), "bytes": ("(list u8)", "two"),
    "numbers": ("(list u32)", "two"), "strings": ("(list string)", "two"), "pair": ("(tuple u32 string)", "three"),
    "point": ("$point", "three"), "maybe": ("(option u32)", "two"), "maybe-twice": ("(option (option u32))", "three"),
    "result": ("(result u32 (error string))", "three"), "shape": ("$shape", "three"),
    "shapes": ("(list $shape)", "two"),
}
FUNCTIONS = FUNCTIONS.replace("IDENTITIES", "\n".join(
    f'(func (export "{name}-id") (param "value" {kind}) (result {kind})'
    f' (canon lift (core func $main "{core}") {ALLOCATES}))'
    for name, (kind, core) in IDENTITIES.items()))
VALUES = [
    ("bool", "true", None), ("bool", "false", None), ("s8", "-128", None), ("s8", "0x7f", "127"), ("u8", "255", None),
    ("u16", "65535", None), ("s64", "-9223372036854775808", None), ("u64", "18446744073709551615", None),
    ("float", "0.5", None), ("float", "-inf", None), ("double", "nan", None), ("double", "7", "7.0"),
    ("char", "\u20ac", None), ("color", "dark-green", None), ("mode", "[]", None), ("mode", '["run", "read"]',
                                                                                     '["read", "run"]'),
    ("string", "", None), ("string", "a \"b\" \u20ac", None), ("bytes", "[0, 255]", None), ("bytes", "[]", None),
    ("numbers", "[1, 4294967295]", None), ("strings", '["a", ""]', None), ("pair", '[7, "x"]', None),
    ("point", '{"at-x": 7, "name": "x"}', None), ("maybe", "null", None), ("maybe", "0", None),
    ("maybe-twice", "5", None), ("result", '{"ok": 5}', None), ("result", '{"err": "x"}', None),
    ("shape", '"none"', None), ("shape", '{"number": 5}', None), ("shape", '{"text": "t"}', None),
    ("shapes", '["none", {"number": 1}]', None),
]


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "functions.wat"
    path.write_text(FUNCTIONS)
    return path


@pytest.fixture
def invoke(functions, capfd):
    """Calls a function of the component; returns the exit code, standard output and standard error."""
    def call(*words):
        try:
            code = cli.main(["run", "--cache", str(functions.parent / "cache"), "--invoke", words[0], str(functions),
                             *words[1:]])
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()
    return call


@pytest.mark.parametrize(("name", "text", "shown"), VALUES)
def test_a_value_is_given_and_printed_by_its_type(invoke, name, text, shown):
    code, out, error = invoke(f"{name}-id", text)
    assert (out, error) == ((text if shown is None else shown) + "\n", "")
    assert code == (1 if '"err"' in text else 0)


def test_a_function_may_have_several_parameters_or_none(invoke):
    assert invoke("sum", "-5", "3") == (0, "-2\n", "")
    assert invoke("none") == (0, "", "")
    assert invoke("none", "an argument of the program") == (0, "", "")


@pytest.mark.parametrize(("words", "code", "expected"), [
    (["sum", "1"], 2, "sum(a: s32, b: s32) -> s32 takes 2 arguments, got 1"),
    (["sum", "1", "2147483648"], 2, "argument 2, '2147483648', must be from -2147483648 to 2147483647"),
    (["u8-id", "256"], 2, "u8-id(value: u8) -> u8: argument 1, '256', must be from 0 to 255"),
    (["u8-id", "x"], 2, "argument 1, 'x', is not an integer"),
    (["float-id", "1e39"], 2, "is too large for an f32"),
    (["bool-id", "1"], 2, "argument 1, '1', must be or have at this place true or false"),
    (["bool-id", "True"], 2, "is not JSON, in which bool is written"),
    (["char-id", "ab"], 2, "one character"),
    (["color-id", "blue"], 2, "one of red, dark-green"),
    (["mode-id", '["fly"]'], 2, "a list of read, write, run"),
    (["mode-id", '"read"'], 2, "a list of read, write, run"),
    (["bytes-id", "[256]"], 2, "must be from 0 to 255"),
    (["bytes-id", "{}"], 2, "list<u8>, a list"),
    (["numbers-id", "[1.5]"], 2, "an integer (u32)"),
    (["numbers-id", "[true]"], 2, "an integer (u32)"),
    (["numbers-id", "[" * 100_000], 2, "is not JSON, in which list<u32> is written"),
    (["numbers-id", "[" + "9" * 5000 + "]"], 2, ""),
    (["strings-id", "[1]"], 2, "a string"),
    (["strings-id", '["\\ud800"]'], 2, "a string without surrogates"),
    (["pair-id", "[1]"], 2, "tuple<u32, string>, a list"),
    (["point-id", '{"at-x": 1}'], 2, "a string"),
    (["point-id", '{"at-x": 1, "name": "x", "more": 2}'], 2, "a record, an object with at-x, name"),
    (["maybe-id", '"x"'], 2, "an integer (u32)"),
    (["result-id", "5"], 2, "one of ok, err, or an object with one of them"),
    (["shape-id", '{"none": 1}'], 2, "none without a value"),
    (["shape-id", '"number"'], 2, "an integer (u32)"),
    (["shape-id", '{"a": 1, "b": 2}'], 2, "one of none, number, text"),
    (["make-object", "1"], 1, "make-object(rep: u32) -> resource cannot be called from the command line, because no"
                              " word can be a resource"),
    (["missing"], 1, "is a component and exports no function missing; its functions are "),
    (["color"], 1, "exports no function color"),
    (["a#b"], 1, "exports no function a#b"),
])
def test_wrong_arguments_are_named_in_one_line(invoke, words, code, expected):
    found, out, error = invoke(*words)
    assert (found, out, error.count("\n")) == (code, "", 1), error
    assert error.startswith("linmem run: ")
    assert expected in error
    assert len(error) < 1000


def test_a_function_of_an_interface_is_named_with_its_interface(wat, capfd):
    path = wat(returns(1, "0.2.3"))
    assert cli.main(["run", "--no-cache", "--invoke", "wasi:cli/run@0.2.3#run", str(path)]) == 1
    assert capfd.readouterr() == ('"err"\n', "")


@pytest.mark.parametrize("code", [0xD800, 0xDCFF, 0xDFFF])
def test_a_surrogate_is_no_character(code):
    with pytest.raises(ValueError, match="one character, and no surrogate"):
        component_values.from_json(chr(code), component.Char())


def test_a_value_of_a_case_that_is_unknown_is_an_error():
    class Kind:
        def _tagged(self):
            return False

        def _cases(self):
            return [("none", None)]

    with pytest.raises(TypeError, match="'x' is of no case of kind"):
        component_values.chosen_case("x", Kind())


# -- what cannot be run -----------------------------------------------------------------------------------------

LIBRARY = """(component (core module $m (func (export "f"))) (core instance $m (instantiate $m))
  (func (export "work") (canon lift (core func $m "f"))))"""


@pytest.mark.parametrize(("text", "words", "code", "expected"), [
    (LIBRARY, [], 1, "is a component and exports no interface wasi:cli/run@0.2, so it is a library and not a WASI"
                     " command: --invoke NAME calls another function; its functions are work"),
    (returns(0, "0.3.0"), [], 1, "its functions are wasi:cli/run@0.3.0#run"),
    ("(component)", [], 1, "exports no interface wasi:cli/run@0.2, so it is a library"),
    (returns(0).replace("(result (result))", "(param \"a\" u32) (result (result))").replace(
        '(func (export "run")', '(func (export "run") (param i32)'), [], 1, "is not of the type func() -> result"),
    (returns(0).replace("(result (result))", "(result u32)"), [], 1, "is not of the type func() -> result"),
    (command('(memory (export "memory") 1) (func (export "run") (result i32) (i32.const 0))').replace(
        '(func $run (result (result)) (canon lift (core func $main "run")))', """
        (alias core export $main "memory" (core memory $memory))
        (func $run (result (result (error u8))) (canon lift (core func $main "run") (memory $memory)))"""),
     [], 1, "is not of the type func() -> result"),
    ('(component (import "unknown:place/things" (instance (export "f" (func)))))' + " " * 20, ["--invoke", "f"], 1,
     "exports no function f"),
    (command('(func (export "run") (result i32) (i32.const 0))',
             '(import "unknown:place/things" (instance (export "f" (func))))'), [], 1, "unknown:place/things"),
    (command('(func (export "run") (result i32) (i32.const 0))', '(import "wasi:io/streams@0.2.0" (func))'), [], 1,
     "wasi:io/streams@0.2.0"),
    (returns(0), ["--start", "file"], 2, "--start: component.wat is a component, and there are no snapshots of"
                                         " components"),
    (b"\0asm\x0d\0\x01\0\xff\xff\xff", [], 1, "component.wat: "),
])
def test_a_component_that_cannot_be_run_is_refused_in_one_line(wat, tmp_path, text, words, code, expected):
    wat(text, "component.wat")
    (tmp_path / "file").write_bytes(b"")
    said = refusal(linmem_process("run", *words, "component.wat", cwd=tmp_path), code)
    assert expected in said


def test_a_component_cannot_be_prewarmed(wat, tmp_path):
    said = refusal(linmem_process("prewarm", wat(returns(0)), "-o", tmp_path / "snapshot"), 1)
    assert "is a component, which cannot be prewarmed; a module can" in said
    assert not (tmp_path / "snapshot").exists()


def test_a_wasmtime_without_components_is_named(wat, monkeypatch, capfd):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: (
        None if name == "wasmtime.component" else found(name, *more)))
    assert cli.main(["run", "--no-cache", str(wat(returns(0)))]) == 1
    out, error = capfd.readouterr()
    assert (out, len(error.splitlines())) == ("", 1)
    assert re.search(r"is a component, which this wasmtime-py cannot run: pip install -U wasmtime$", error.strip())
