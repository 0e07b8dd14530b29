"""Initialise a WASI preview 1 module (wasm or wat), and save its state, from which `linmem run --start` starts.

_initialize is called first if PROGRAM exports it, then the function of --init.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import stat
import sys
from collections.abc import Iterator

from linmem._commands import compile_cache
from linmem._commands.creator_option import compose_creator
from linmem._commands.image import figures_of, report_to, say, show
from linmem._commands.limits import Limits
from linmem._commands.parser import (
    Parser,
    Refused,
    check_output,
    file_name,
    function_name,
    refuse_errors_of,
)
from linmem._commands.program import Program, add_options, in_a_thread, leave_running

DEFAULT_INIT = "wizer.initialize"

EPILOG = """\
The function of --init takes no parameters. Its results are reported, and not judged. If all that PROGRAM
needs is _initialize, use --init _initialize.

The program uses linmem's standard input and standard error. Its standard output also goes to standard
error, so that standard output has only the report: what the snapshot holds, and its sizes, as
`linmem image info FILE` shows them.

The program may keep in its memory what it got from --dir and --env. So use `linmem run --start` with the
same --dir options in the same order. Random numbers that the program has drawn are in the snapshot, too.

FILE is complete or unchanged: it is written at the end, and replaced as a whole. If FILE is a pipe or a
device (/dev/stdout, /dev/null), it gets a packed file. If it is the standard output, the report goes to
standard error.

Exit codes: 0 if FILE and the report were written; 134 if the program trapped; 130 on Ctrl-C; 2 if the command line is
wrong; 1 if PROGRAM cannot be read or initialised, if it ended itself, if it has state that a snapshot
cannot hold, or if FILE cannot be written, with the reason in one line; or if the report cannot be
written, and then FILE is complete."""


def add_arguments(parser: Parser) -> None:
    parser.description, parser.epilog = __doc__, EPILOG
    parser.add_argument("program", metavar="PROGRAM")
    parser.add_argument("--init", default=DEFAULT_INIT, type=function_name, metavar="NAME",
                        help=f"the exported function that initialises the program; by default {DEFAULT_INIT}")
    parser.add_argument("--output", "-o", type=file_name, metavar="FILE", required=True,
                        help="the file for the snapshot")
    add_options(parser)
    parser.add_argument("--partial", action="store_true",
                        help="save the snapshot also if it cannot hold all of the state; the report names the rest")
    parser.add_argument("--packed", action="store_true", help="write a file without holes, which cannot be mapped")
    parser.add_argument("--json", action="store_true", help="the report as one line of JSON; sizes are in bytes")


def main(args: argparse.Namespace) -> int:
    check_output("--output", args.output, {"PROGRAM": args.program})
    target = os.path.realpath(args.output)
    program = Program(args.program, compose_creator("mmap", args.max_memory), Limits(max_memory=args.max_memory))
    results: list[int | float] = []
    with output_to_standard_error():
        status, running = in_a_thread(lambda: initialise(program, args, results))
        if running:
            leave_running(status)
    if status == 0:
        if os.path.realpath(args.output) != target:
            raise Refused(f"--output {args.output}: the program replaced it, or a folder of it, by a link")
        save(program, args, results)
    return status


@contextlib.contextmanager
def output_to_standard_error() -> Iterator[None]:
    """What the program writes to its standard output goes to standard error."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:         # the caller has closed descriptor 1
        saved = os.open(os.devnull, os.O_WRONLY)
    try:
        with contextlib.suppress(OSError):
            os.dup2(2, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def initialise(program: Program, args: argparse.Namespace, results: list[int | float]) -> int:
    hint = "" if args.init != DEFAULT_INIT else ", which is what initialises it by default: --init names another"
    program.compile("prewarm", compile_cache.directory_of(args, "prewarm"), args.init, prepare=True,
                    outline=True, hint=hint)
    program.check_function(args.init, may_return=True, hint=hint)

    def work() -> None:
        try:
            program.link(args, [])
            program.instantiate()
            results.extend(program.initialise(args.init))
        except program.wasmtime.ExitTrap as end:
            raise Refused(f"{args.program} ended itself with exit code {end.code} while it was initialised, so there is"
                          " no state to save") from None

    return program.run("prewarm", work)


def save(program: Program, args: argparse.Namespace, results: list[int | float]) -> None:
    """Save the state of the initialised program, and report it."""
    from linmem.wasmtime import Snapshot

    try:
        with refuse_errors_of(args.program):
            snapshot = Snapshot.take(program.store, program.instance, partial=args.partial)
    except Refused as refusal:
        raise Refused(str(refusal).replace("partial=True", "--partial")) from None
    to = report_to(args.output)
    with refuse_errors_of(args.output):
        snapshot.save(args.output, packed=args.packed)
    # JSON has no NaN and no infinity.
    texts = [result if math.isfinite(result) else str(result) for result in results]
    about_init = {"program": args.program, "init": args.init, "results": texts}
    if to is not sys.stdout or not stat.S_ISREG(os.stat(args.output).st_mode):
        figures = {"path": args.output, "kind": "snapshot", "module": snapshot.module, **about_init}
        say(json.dumps(figures) if args.json else f"{args.output}: snapshot, module {snapshot.module}", to)
    elif args.json:
        print(json.dumps(figures_of(args.output) | about_init))
    else:
        show(figures_of(args.output))
        say(f"  init      {args.init} of {args.program}" + "".join(f", which returned {result}" for result in results))
