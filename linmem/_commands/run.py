"""Run a WASI preview 1 command module (wasm or wat) with wasmtime, in memories that linmem owns.

The program uses linmem's standard input, output and error, and its exit code becomes linmem's.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import linmem
from linmem._commands.parser import EXIT_INTERRUPTED, EXIT_TRAP, EXIT_USAGE, Parser, Refused, parse_size
from linmem._commands.text import count, one_line, show_size, show_time
from linmem._core.arguments import printable

USAGE = "linmem run [options] PROGRAM [options] [--] [ARGS ...]"
EPILOG = """\
Options may stand before PROGRAM and directly after it. The program's own ARGS begin with the first
argument after PROGRAM that is not an option, or after `--`. argv[0] is the file name of PROGRAM.
The program can access only the directories and the variables that --dir and --env give it.

--creator takes "mmap" (each memory is a mapping of its own), "pool" (memories are reset and used
again) and "statistics", each with the defaults of linmem.creator(). --max-memory puts one budget
over the creator, as linmem.creator("limiting", limit_bytes=...) does.

The report is the last text on standard error, so that standard output has only the program's
output. With --json it is the last line, also if PROGRAM could not be run; sizes are in bytes and
times in nanoseconds. "resident" is the physical memory at the end, which is also the peak, because
wasm memories never shrink.

Exit codes: the program's (0 to 125, as wasmtime allows); 134 if the program trapped; 130 on Ctrl-C;
2 if the command line is wrong; 1 if PROGRAM cannot be read or run, with the reason in one line."""


def add_arguments(parser: Parser) -> None:
    parser.usage, parser.description, parser.epilog = USAGE, __doc__, EPILOG
    parser.add_argument("--dir", action="append", default=[], type=split_dir, metavar="HOST[::GUEST]",
                        help="a directory that the program may read and write, under the name GUEST; repeatable")
    parser.add_argument("--env", action="append", default=[], type=split_env, metavar="NAME[=VALUE]",
                        help="a variable for the program, by default with its value in this process; repeatable")
    parser.add_argument("--creator", default="mmap", metavar="KIND",
                        help="the creator of the memories: mmap (the default), pool or statistics; see below")
    parser.add_argument("--max-memory", type=parse_size, metavar="SIZE",
                        help="a budget for all memories of the program: bytes, or a number with KiB, MiB, GiB (powers"
                             " of 1024; K, M, G mean the same) or KB, MB, GB (powers of 1000). Beyond the budget"
                             " memory.grow returns -1")
    parser.add_argument("--report", action="store_true", help="at the end, report the sizes and growths of each memory")
    parser.add_argument("--json", action="store_true", help="the report as one line of JSON (implies --report)")
    parser.parse_known_args = functools.partial(parse, parser)      # type: ignore[method-assign]


def parse(parser: Parser, words: list[str], namespace: None = None) -> tuple[argparse.Namespace, list[str]]:
    """Parse the options, and add the program and the arguments of the program to the result."""
    options, program, arguments = split_words(parser, words)
    args, unknown = Parser.parse_known_args(parser, options)
    if unknown:
        parser.error(f"no such option: {unknown[0]}; the program's own come after --")
    if program is None:
        parser.error("PROGRAM is missing")
    args.program, args.arguments = program, arguments
    return args, []


def split_words(parser: Parser, words: list[str]) -> tuple[list[str], str | None, list[str]]:
    """The options of linmem, the program, and the arguments of the program.

    argparse cannot express "options before and after the first positional argument, and none after the second".
    """
    takes_value = {name for action in parser._actions if action.nargs != 0 for name in action.option_strings}
    options: list[str] = []
    program = None
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            if program is None and rest:
                program = rest.pop(0)
            return options, program, rest
        if word.startswith("-") and word != "-":
            options.append(word)
            if word in takes_value and rest:
                # With "=", argparse accepts a value that begins with a dash.
                options[-1] = f"{word}={rest.pop(0)}"
        elif program is None:
            program = word
        else:
            return options, program, [word, *rest]
    return options, program, []


def main(args: argparse.Namespace) -> int:
    creator = compose_creator(args.creator, args.max_memory)
    # The statistics creator wraps the creator with the budget, so that it also counts the requests that the budget
    # refuses.
    statistics = linmem.StatisticsCreator(creator) if args.report or args.json else None
    try:
        status, running = in_a_thread(functools.partial(execute, args, statistics or creator))
    except Refused as refusal:
        print(f"linmem run: {refusal}", file=sys.stderr)
        status, running = refusal.code, False
    if statistics is not None:
        import json

        figures = report_figures(args, status, statistics)
        print(json.dumps(figures) if args.json else report_text(figures), file=sys.stderr, flush=True)
    if running:
        # The program is in an endless loop or waits for input. Only the end of the process can end it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def split_env(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r}: the name is missing (NAME=VALUE)")
    if equals:
        return name, value
    if name not in os.environ:
        raise argparse.ArgumentTypeError(f"{name}: no such variable in this environment (NAME=VALUE sets one)")
    return name, os.environ[name]


def split_dir(text: str) -> tuple[str, str]:
    host, _, guest = text.partition("::")
    if not os.path.isdir(host):
        what = "is not a directory" if os.path.exists(host) else "does not exist"
        raise argparse.ArgumentTypeError(f"{host!r} {what}")
    return host, guest or host


def read_program(path: str) -> bytes:
    """The bytes of a wasm module or of its text; a file of another kind is refused."""
    try:
        with open(path, "rb") as file:
            code = file.read()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Refused(f"cannot read {path!r}: {reason}") from None
    is_text = path.lower().endswith(".wat") or code.lstrip().startswith((b"(", b";;"))
    if not code.startswith(b"\0asm") and not is_text:
        raise Refused(f"{path!r} is not a WebAssembly module (neither wasm nor wat)")
    return code


def compose_creator(kind: str, max_memory: int | None) -> Any:
    try:
        creator = linmem.creator(kind)
    except (TypeError, ValueError) as error:
        hint = " (for a budget: --max-memory)" if kind == "limiting" else ""
        raise Refused(f"--creator {kind}: {error}{hint}", EXIT_USAGE) from None
    return creator if max_memory is None else linmem.LimitingCreator(creator, max_memory)


def in_a_thread(work: Callable[[], int]) -> tuple[int, bool]:
    """The exit code of `work`, and whether it still runs after Ctrl-C.

    Python handles signals between bytecodes of the main thread. The program runs in another thread, so Ctrl-C does not
    wait for native code.
    """
    import threading

    status: list[int] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            status.append(work())
        except BaseException as error:      # raised again in the main thread
            errors.append(error)

    threading.stack_size(8 << 20)           # some systems give a second thread less than the stack of wasm
    thread = threading.Thread(target=target, name="linmem run", daemon=True)
    thread.start()
    threading.stack_size(0)
    try:
        while thread.is_alive():
            thread.join(0.2)                # on some systems, a wait without a timeout cannot be interrupted
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED, thread.is_alive()
    if errors:
        raise errors[0]
    return status[0], False


def execute(args: argparse.Namespace, creator: Any) -> int:
    """Run the program; returns its exit code."""
    program = args.program
    code = read_program(program)
    try:
        import wasmtime

        from linmem.wasmtime import install
    except (ImportError, OSError) as error:         # OSError: the library of wasmtime does not load
        raise Refused(f"needs wasmtime-py: pip install 'linmem[wasmtime]' ({error})") from None
    config = wasmtime.Config()
    try:
        install(config, creator)
    except RuntimeError as error:
        raise Refused(str(error)) from None
    engine = wasmtime.Engine(config)
    module = compile_program(wasmtime, engine, program, code)
    store = wasmtime.Store(engine)
    store.set_wasi(wasi_config(wasmtime, args))
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    try:
        start: Any = linker.instantiate(store, module).exports(store)["_start"]
        start(store)
    except wasmtime.ExitTrap as end:
        return int(end.code)
    except wasmtime.Trap as trap:
        where = str(trap).partition("Stack backtrace:")[0].partition("Caused by:")[0].rstrip()
        print(f"linmem run: {printable(program)} trapped: {one_line(trap)}\n{where}", file=sys.stderr)
        return EXIT_TRAP
    except wasmtime.WasmtimeError as error:
        raise Refused(f"{program}: {one_line(error)}") from None
    return 0


def compile_program(wasmtime: Any, engine: Any, program: str, code: bytes) -> Any:
    try:
        binary = code if code.startswith(b"\0asm") else bytes(wasmtime.wat2wasm(code.decode()))
        # The second half of the version is the layer: 0 for a module, 1 for a component.
        if binary[6:8] == b"\1\0":
            raise Refused(f"{program} is a component; linmem runs WASI preview 1 command modules"
                          " (compile it for wasm32-wasip1)")
        module = wasmtime.Module(engine, binary)
    except wasmtime.WasmtimeError as error:
        raise Refused(f"{program}: {one_line(error)}") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{program} is not valid WebAssembly text: {error}") from None
    start = next((export.type for export in module.exports if export.name == "_start"), None)
    if not isinstance(start, wasmtime.FuncType):
        raise Refused(f"{program} exports no function _start, so it is a library and not a WASI command")
    if start.params or start.results:
        raise Refused(f"{program}: _start has parameters or results, which the _start of a WASI command does not have")
    return module


def wasi_config(wasmtime: Any, args: argparse.Namespace) -> Any:
    wasi = wasmtime.WasiConfig()
    try:
        wasi.argv = [os.path.basename(args.program), *args.arguments]
        wasi.env = args.env
        for host, guest in args.dir:
            try:
                wasi.preopen_dir(host, guest)
            except wasmtime.WasmtimeError:
                raise Refused(f"--dir {host}: the directory cannot be opened", EXIT_USAGE) from None
    except UnicodeEncodeError as error:
        raise Refused(f"{error.object!r} is not valid UTF-8, which WASI requires", EXIT_USAGE) from None
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    return wasi


def report_figures(args: argparse.Namespace, status: int, statistics: linmem.StatisticsCreator) -> dict[str, Any]:
    memories = [{
        "first_size": memory["first_size"],
        "peak_size": memory["size"],        # a wasm memory never shrinks
        "growths": memory["growths"],
        "refused_growths": memory["refused"],
        "grow_ns": memory["grow_ns"],
        "peak_resident": memory["peak_resident"],
    } for memory in reversed(statistics.memories())]
    return {"program": args.program, "exit_code": status, "creator": args.creator, "max_memory": args.max_memory,
            "memories": memories, "all": statistics.statistics()}


def report_text(figures: dict[str, Any]) -> str:
    everything = figures["all"]
    if not everything["total_count"] and not everything["failures"]:
        return "linmem: no memory was asked for"
    budget = "" if figures["max_memory"] is None else f", of at most {show_size(figures['max_memory'])}"
    lines = [f"linmem: {count(everything['total_count'], 'memory')} by {figures['creator']},"
             f" {show_size(everything['peak_bytes'])} at the peak{budget};"
             f" {count(everything['failures'], 'request')} refused"]
    for number, memory in enumerate(figures["memories"], start=1):
        lines.append(f"  memory {number}: {show_size(memory['first_size'])} at first, {show_size(memory['peak_size'])}"
                     f" at the peak, {show_size(memory['peak_resident'])} resident;"
                     f" {count(memory['growths'], 'growth')} in {show_time(memory['grow_ns'])},"
                     f" {memory['refused_growths']} refused")
    return "\n".join(lines)
