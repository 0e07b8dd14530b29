"""Run a WASI program (wasm or wat) with wasmtime, in memories that linmem owns: a preview 1 module, or a component.

The program uses linmem's standard input, output and error, and its exit code becomes linmem's.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
import time
from typing import Any

import linmem
from linmem._commands import compile_cache, creator_option
from linmem._commands.limits import Limits, add_limits
from linmem._commands.parser import (
    EXIT_REFUSED,
    EXIT_TIMEOUT,
    EXIT_USAGE,
    Parser,
    Refused,
    drop_output,
    file_name,
    function_name,
    refuse_errors_of,
)
from linmem._commands.program import Program, add_options, in_a_thread, leave_running
from linmem._core.arguments import printable

USAGE = "linmem run [options] PROGRAM [ARGS ...]"
EPILOG = """\
The options stand before PROGRAM. Everything after PROGRAM belongs to the program, also `--` and what looks
like an option of linmem. argv[0] is the file name of PROGRAM. The program can access only the directories
and the variables that --dir, --env and --env-all give it.

With --start the program has the state that it had when `linmem prewarm` took the snapshot, and nothing
is initialised again. Give the same --dir options in the same order, because the program may know its
directories by number. Without --start, --invoke calls _initialize first if PROGRAM exports it. If NAME
has parameters, ARGS are their values: integers (42, -1, 0x2a) and numbers (1.5, inf, nan). The results of
NAME are printed, each in one line.

A component is a command if it exports wasi:cli/run of a version 0.2. --invoke calls another of its
functions; a function of an exported interface is INTERFACE#FUNCTION. ARGS are texts, true and false,
numbers, and JSON for all other types, as are the results. --start needs a module.

--creator takes the kinds of linmem.creator() whose options are texts and numbers, for example
pool:idle_seconds=5,keep_resident=64KiB. "shared" with shm_name=NAME and "file" with path=FILE keep the bytes of the
program's memory, if the program has one memory. --max-memory puts one budget over the creator, as
linmem.creator("limiting", limit_bytes=...) does. "routing" is for programs in Python.

The compiled program is kept in the user's cache directory, or in the DIR of --cache: `linmem cache info`
shows it. A program that has not changed is neither read nor compiled again.

The core dump has the format of the WebAssembly tool conventions: `wasm-tools print FILE` reads it. FILE is
written after a trap only, and a new FILE has mode 0600.

The report is the last text on standard error, so that standard output has only the program's
output. With --json it is the last line, also if PROGRAM could not be run; sizes are in bytes and
times in nanoseconds. A memory has the name of its export, or its number if it is not exported; "GC heap"
is the heap for garbage-collected objects. "resident" is the physical memory at the end, which is also the
peak, because wasm memories never shrink.

Exit codes: the program's (wasmtime allows 0 to 125, and 0 to 255 for a component); 1 if run of a component,
or the function of --invoke, returns an error; 134 if the program trapped or ran out of fuel;
124 if it ran for longer than --timeout; 130 on Ctrl-C; 2 if the command line is wrong; 1 if PROGRAM cannot
be read or run, with the reason in one line."""


def add_arguments(parser: Parser) -> None:
    parser.usage, parser.description, parser.epilog = USAGE, __doc__, EPILOG
    add_options(parser)
    add_limits(parser)
    parser.add_argument("--start", type=file_name, metavar="FILE",
                        help="start from the snapshot of PROGRAM in FILE, which `linmem prewarm` wrote")
    parser.add_argument("--invoke", type=function_name, metavar="NAME",
                        help="call the exported function NAME instead of _start; ARGS are the values of its parameters,"
                             " if it has any")
    parser.add_argument("--coredump", type=file_name, metavar="FILE",
                        help="if the program traps, write its memories, globals and stack to FILE, a WebAssembly core"
                             " dump")
    creator_option.add_option(parser)
    parser.add_argument("--report", action="store_true", help="at the end, report the sizes and growths of each memory")
    parser.add_argument("--json", action="store_true", help="the report as one line of JSON (implies --report)")
    parser.add_argument("--report-file", type=file_name, metavar="FILE",
                        help="draw the size of each memory over time: .png (needs matplotlib) or .html")
    parser.parse_known_args = functools.partial(parse, parser)      # type: ignore[method-assign]


def parse(parser: Parser, words: list[str], namespace: None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options, and add the program and the arguments of the program to the result."""
    options, rest = split_words(parser, words)
    args, unknown = Parser.parse_known_args(parser, options)
    if unknown:
        parser.error(f"no such option: {unknown[0]}")
    if not rest:
        parser.error("PROGRAM is missing")
    args.program, *args.arguments = rest
    return args, []


def split_words(parser: Parser, words: list[str]) -> tuple[list[str], list[str]]:
    """The options of linmem, and the program with its arguments. A `--` before the program ends the options.

    Some versions of argparse drop a `--` from the arguments of the program.
    """
    takes_value = {name for action in parser._actions if action.nargs != 0 for name in action.option_strings}
    options: list[str] = []
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] != "-":
        word = rest.pop(0)
        if word == "--":
            break
        if word in takes_value and rest:
            word += f"={rest.pop(0)}"       # with "=", argparse accepts a value that begins with a dash
        options.append(word)
    return options, rest


def main(args: argparse.Namespace) -> int:
    reported, file, timeline = args.report or args.json, None, 0
    if reported or args.report_file is not None:
        from linmem._commands import run_report

        if args.report_file is not None:
            others = {"PROGRAM": args.program, "the FILE of --start": args.start,
                      "the FILE of --coredump": args.coredump}
            file, timeline = run_report.ReportFile(args.report_file, others), run_report.CHANGES
    creator = creator_option.compose_creator(args.creator, args.max_memory)
    # The statistics creator wraps the creator with the budget, so that it also counts the requests that the budget
    # refuses.
    began = time.perf_counter_ns()
    statistics = linmem.StatisticsCreator(creator, timeline=timeline) if reported or file is not None else None
    limits = Limits(timeout=args.timeout, fuel=args.fuel, max_instances=args.max_instances, max_memory=args.max_memory)
    programs: list[Program] = []
    said = []
    try:
        status, running = in_a_thread(functools.partial(execute, args, statistics or creator, limits, programs),
                                      limits.clock)
        if running and status == EXIT_TIMEOUT:
            said.append(f"linmem run: {printable(args.program)} ran for longer than --timeout {args.timeout:g} seconds")
    except Refused as refusal:
        said.append(f"linmem run: {refusal}")
        status, running = refusal.code, False
    except OSError as error:        # the results of --invoke could not be printed
        reason = drop_output(error)
        said += [f"linmem run: {reason}"] if reason else []
        status, running = EXIT_REFUSED, False
    if statistics is not None:
        figures = run_report.figures(args, status, statistics, programs[0] if programs else None)
        end_ns, sizes = time.perf_counter_ns() - began, statistics.timeline()[::-1]
        try:
            if file is not None:
                file.write(figures, sizes, end_ns)
        except Refused as refusal:
            said.append(f"linmem run: --report-file: {refusal}")
            status = figures["exit_code"] = status or EXIT_REFUSED
        if reported:
            import json

            said.append(json.dumps(figures) if args.json else run_report.text_of(figures))
    text = "".join(f"{part}\n" for part in said)
    if running:
        leave_running(status, text, programs[0].flush_output if programs else None)
    sys.stderr.write(text)
    sys.stderr.flush()
    return status


def execute(args: argparse.Namespace, creator: Any, limits: Limits, programs: list[Program]) -> int:
    """Run the program, and append it to `programs`; returns its exit code."""
    cache = compile_cache.directory_of(args, "run")
    program = open_program(args, creator, limits, cache)
    programs.append(program)
    if args.own_process:
        # At its end the interpreter would look for cycles in all that was imported, and take 8 ms.
        gc.freeze()
    snapshot = None if args.start is None else open_snapshot(args.start)
    hint = ", so it is a library and not a WASI command: --invoke NAME calls another function"
    hint = "" if args.invoke else hint
    function = args.invoke or "_start"
    if args.coredump is not None:
        from linmem._commands.core_file import CoreFile

        program.core = CoreFile(args.coredump, {"PROGRAM": args.program, "the FILE of --start": args.start})
    # The data of a prepared program is not copied, and so costs no fuel and no time of --timeout. A component is
    # prepared for the report, too, because only then the names of its memories are known.
    outline = args.start is not None or args.coredump is not None
    reported = args.report or args.json or args.report_file is not None
    prepare = outline or args.fuel is not None or args.timeout is not None or (program.named_if_prepared and reported)
    program.compile("run", cache, function, prepare=prepare, outline=outline, hint=hint)
    if reported and not program.named_if_prepared:
        program.keep_names()
    arguments: list[Any] = []
    if args.invoke:
        arguments = program.parse_arguments(function, args.arguments)
    else:
        program.check_function(function, hint=hint)
    if snapshot is not None:
        program.plan_start(args.start, snapshot)

    def work() -> None:
        program.link(args, args.arguments)
        with limits.clock.running():
            program.instantiate(snapshot, args.start)
            begin = program.call if args.invoke is None or snapshot is not None else program.initialise
            results = begin(function, arguments)
        for result in results:
            print(result)
        sys.stdout.flush()

    return program.run("run", work)


def open_program(args: argparse.Namespace, creator: Any, limits: Limits, cache: str | None) -> Program:
    program = Program(args.program, creator, limits)
    if not program.is_component(cache):
        return program
    if args.start is not None:
        raise Refused(f"--start: {args.program} is a component, and there are no snapshots of components, because the"
                      " globals and tables inside a component cannot be reached", EXIT_USAGE)
    import importlib.util

    if importlib.util.find_spec("wasmtime.component") is None:
        raise Refused(f"{args.program} is a component, which this wasmtime-py cannot run: pip install -U wasmtime")
    from linmem._commands.component_program import ComponentProgram

    return ComponentProgram(program)


def open_snapshot(path: str) -> Any:
    from linmem.wasmtime import Snapshot

    with refuse_errors_of(path):
        return Snapshot.open(path)
