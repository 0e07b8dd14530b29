"""The limits of ``linmem run``: time, fuel, instances, and the elements of tables."""

from __future__ import annotations

import _thread
import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from support import requires, run_child
from test_cli import ENVIRONMENT, NEVER_ENDS, RUNS_ON, SECONDS, TRAPS, linmem_process, refusal, report_of, wat
from test_prewarm import EXITS

from linmem import cli
from linmem._commands.limits import Clock
from linmem._commands.program import in_a_thread

__all__ = ["wat"]       # a fixture

PAGE = 65536
# Prints a line, and then does what stands in the place of {body}.
GUEST = r"""
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\10\00\00\00\08\00\00\00\00\00\00\00\00\00\00\00running\n")
  (func $print (param $descriptor i32)
    (drop (call $write (local.get $descriptor) (i32.const 0) (i32.const 1) (i32.const 8))))
  (func $sleep (param $ns i64)
    (i32.store (i32.const 128) (i32.const 1))           ;; the monotonic clock
    (i64.store (i32.const 136) (local.get $ns))
    (drop (call $poll (i32.const 112) (i32.const 200) (i32.const 1) (i32.const 300))))
  (func (export "_start") (call $print (i32.const 1)) {body}))
"""
WAITS = {
    "runs": "(loop $l (br $l))",
    "sleeps": "(call $sleep (i64.const 1000000000000))",
    "sleeps often": "(loop $l (call $sleep (i64.const 1000000)) (br $l))",
    "reads": "(drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))",
    "prints": "(loop $l (call $print (i32.const 1)) (br $l))",
    "complains": "(loop $l (call $print (i32.const 2)) (br $l))",
}


@pytest.fixture
def guest(wat):
    return lambda body: wat(GUEST.replace("{body}", body))


# -- time -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("waits", WAITS)
def test_a_timeout_ends_the_program_whatever_it_does_although_nobody_reads_its_output(guest, waits):
    words = ["run", "--timeout", "0.2", guest(WAITS[waits])]
    with subprocess.Popen([sys.executable, "-m", "linmem", *map(str, words)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.wait(SECONDS) == 124
        error = process.stderr.read().decode().splitlines()
        assert process.stdout.readline() == b"running\n"
    message = f"linmem run: {words[-1]} ran for longer than --timeout 0.2 seconds"
    if waits == "complains":        # if the pipe was full, there was no room for the message
        assert set(error) - {message} == {"running"}
    else:
        assert error == [message]


@pytest.mark.parametrize("waits", sorted(WAITS.keys() - {"reads"}))     # standard input has ended
def test_after_a_timeout_the_report_is_the_last_text(guest, waits):
    done = linmem_process("run", "--timeout=0.2", "--json", guest(WAITS[waits]))
    assert done.returncode == 124
    *_, message, _ = done.stderr.decode().splitlines()
    assert message.endswith("ran for longer than --timeout 0.2 seconds")
    figures = report_of(done)
    assert figures["exit_code"] == 124
    assert [memory["first_size"] for memory in figures["memories"]] == [PAGE]


@pytest.mark.parametrize("code", [0, 42, 124])
def test_a_program_that_ends_in_time_ends_as_without_a_timeout(wat, code):
    path = wat(EXITS.format(code=code).replace("wizer.initialize", "_start"))
    done = linmem_process("run", "--timeout", "100", path)
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")
    assert linmem_process("run", "--timeout", "100", wat(TRAPS)).returncode == 134


def test_results_are_printed_after_the_time_has_stopped(wat):
    path = wat('(module (func (export "f") (result i32) (i32.const 7)))')
    done = linmem_process("run", "--timeout", "50", "--invoke", "f", path)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [b"7"], b"")


@pytest.mark.parametrize("slow", ["program.Program.compile", "program.Program.plan_start", "run_report.figures"])
def test_the_time_counts_from_the_first_instruction_and_to_the_last(tmp_path, slow):
    (tmp_path / "program.wat").write_text('(module (memory (export "memory") 1) (func (export "_start")))')
    assert cli.main(["prewarm", str(tmp_path / "program.wat"), "--init", "_start",
                     "-o", str(tmp_path / "snapshot")]) == 0
    name, *attributes = slow.split(".")
    done = run_child(f"""
        import sys, time
        from linmem import cli
        from linmem._commands import program, run_report
        *place, last = {[name, *attributes]!r}
        owner = {{"program": program, "run_report": run_report}}[place[0]]
        for part in place[1:]:
            owner = getattr(owner, part)
        original = getattr(owner, last)
        def slow(*arguments, **options):
            time.sleep(2.5)
            return original(*arguments, **options)
        setattr(owner, last, slow)
        sys.exit(cli.main(["run", "--timeout", "2", "--json", "--start", "snapshot", "program.wat"]))
        """, cwd=tmp_path)
    assert (done.returncode, json.loads(done.stderr)["exit_code"]) == (0, 0)


def test_a_clock_has_no_time_left_to_tell_while_the_program_does_not_run():
    clock = Clock(100)
    assert (clock.left(), clock.begun.is_set()) == (None, False)
    with clock.running():
        assert clock.begun.is_set()
        assert 0 < clock.left() <= 100
    assert clock.left() is None
    clock = Clock(1e-9)
    with clock.running():
        time.sleep(0.001)
        assert clock.left() == 0
    with Clock().running():
        assert Clock().left() is None


@requires("interrupts")
def test_an_interrupt_comes_before_the_timeout(wat):
    process = subprocess.Popen([sys.executable, "-m", "linmem", "run", "--timeout", "1000", str(wat(RUNS_ON))],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    try:
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=SECONDS) == (b"", b"")
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130


@pytest.mark.parametrize("delay", [0, 0.1])
def test_after_an_interrupt_it_is_known_that_the_program_still_runs(delay):
    ended, clock = threading.Event(), Clock()

    def work():
        clock.begun.set()
        time.sleep(delay)
        _thread.interrupt_main()
        return ended.wait(SECONDS)

    try:
        assert in_a_thread(work, clock) == (130, True)
    finally:
        ended.set()


def test_a_wait_that_ctrl_c_has_broken_is_an_interrupt_and_another_error_is_raised(monkeypatch):
    ended, clock = threading.Event(), Clock()

    def interrupted(timeout):       # what Event.wait() does if Ctrl-C comes while it takes its lock again
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("release unlocked lock")

    def broken(timeout):
        raise RuntimeError("release unlocked lock")

    try:
        monkeypatch.setattr(clock.begun, "wait", interrupted)
        assert in_a_thread(ended.wait, clock) == (130, True)
        monkeypatch.setattr(clock.begun, "wait", broken)
        with pytest.raises(RuntimeError, match="release unlocked lock"):
            in_a_thread(ended.wait, clock)
    finally:
        ended.set()


# -- fuel -------------------------------------------------------------------------------------------------

def test_a_program_without_fuel_ends_with_134_and_a_line_of_its_own(wat):
    path = wat(NEVER_ENDS)
    done = linmem_process("run", "--fuel", "10000", "--json", path)
    message, _ = done.stderr.decode().splitlines()
    assert (done.returncode, message) == (134, f"linmem run: {path} ran out of fuel (--fuel 10000)")
    assert report_of(done)["exit_code"] == 134


def test_a_trap_is_not_taken_for_a_lack_of_fuel(wat):
    done = linmem_process("run", "--fuel", "10000", wat(TRAPS))
    assert done.returncode == 134
    assert b"trapped: wasm trap: wasm `unreachable` instruction executed" in done.stderr


@pytest.mark.parametrize("options", [[], ["--cache", "cache"]])
def test_the_data_of_a_program_costs_no_fuel(wat, tmp_path, options):
    path = wat(f'(module (memory 2) (data (i32.const 0) "{"x" * PAGE}") (func (export "_start") nop))')
    for fuel, code in (("1", 134), ("50", 0)):
        done = linmem_process("run", *options, "--fuel", fuel, path, cwd=tmp_path)
        assert done.returncode == code, done.stderr


# -- tables -----------------------------------------------------------------------------------------------

def test_the_budget_of_memory_limits_the_elements_of_tables(wat):
    path = wat("""
        (module
          (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
          (memory (export "memory") 1) (table 5 funcref)
          (func (export "_start")
            (drop (table.grow (ref.null func) (i32.const 100000)))
            (call $exit (i32.div_u (table.size) (i32.const 1000)))))""")
    assert linmem_process("run", path).returncode == 100
    assert linmem_process("run", "--max-memory", "1MiB", path).returncode == 100
    assert linmem_process("run", "--max-memory", "128KiB", path).returncode == 0
    path = wat('(module (table 10000 funcref) (func (export "_start")))')
    assert "(--max-memory 65536 allows tables of 8192 elements)" in refusal(
        linmem_process("run", "--max-memory", "64KiB", path), 1)


# -- wrong values ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("words", "expected"), [
    (["--timeout", "0"], "'0' must be more than 0 and at most 1000000000 seconds"),
    (["--timeout", "-1"], "'-1' must be more than 0"),
    (["--timeout", "nan"], "'nan' must be more than 0"),
    (["--timeout", "inf"], "'inf' must be more than 0"),
    (["--timeout", "1e10"], "'1e10' must be more than 0 and at most 1000000000"),
    (["--timeout", "5s"], "'5s' is not a number"),
    (["--timeout", ""], "'' is not a number"),
    (["--fuel", "0"], "'0' must be from 1 to 9223372036854775807"),
    (["--fuel", "-1"], "'-1' must be from 1 to"),
    (["--fuel", "9223372036854775808"], "must be from"),
    (["--fuel", "1.5"], "'1.5' is not an integer"),
    (["--fuel", "9" * 9000], "must be from"),
    (["--max-instances", "0"], "'0' must be from 1"),
    (["--max-instances", "many"], "'many' is not an integer"),
])
def test_a_wrong_limit_is_named_in_one_line(words, expected):
    text = refusal(linmem_process("run", *words, "program.wasm"), 2)
    assert expected in text
    assert words[0] in text
    assert len(text) < 400
