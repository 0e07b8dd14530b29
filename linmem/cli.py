"""The command line: ``linmem run | demo | info | image | bench``. Floor 6.

Nothing but argparse is imported before a subcommand is known: each takes what it needs.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import linmem

__all__ = ["main"]

EXIT_REFUSED = 1            # the thing asked for cannot be done, or a check failed
EXIT_USAGE = 2              # the command line is wrong
EXIT_INTERRUPTED = 130      # 128 + SIGINT, as a shell reports it
EXIT_TRAP = 134             # 128 + SIGABRT, as `wasmtime run` does

DESCRIPTION = "Linear memories for Python: run WebAssembly in them, see them at work, ask what this machine allows."

RUN_USAGE = """linmem run [options] PROGRAM [options] [--] [ARGS ...]"""
RUN_DESCRIPTION = """\
Run a WASI preview 1 command module (wasm or wat) with wasmtime, in memories that linmem owns.
Standard input, output and error are the program's, and its exit code is linmem's."""
RUN_EPILOG = """\
Options may stand before PROGRAM and directly after it; the first argument that is no option, or
`--`, begins the program's own ARGS. argv[0] is the file name of PROGRAM. Nothing of this
machine is visible to the program but what --dir and --env give it.

The report comes last on standard error, so that standard output stays the program's. With --json
it is one line, the last, also if PROGRAM could not be run; sizes are bytes, times nanoseconds.
"resident" is the physical memory at the end, which is its peak: wasm memories give nothing back.

Exit codes: the program's (0 to 125, as wasmtime allows); 134 if it trapped; 130 on Ctrl-C; 2 if
the command line is wrong; 1 if PROGRAM cannot be run, with one line that says why."""

DEMO_DESCRIPTION = """\
Show a NumPy view that stays valid while its memory grows, in Python and under a WebAssembly
program, and after the store is closed. Every figure is checked: exit code 0 if all hold, else 1."""

INFO_DESCRIPTION = """\
Print what this machine allows, and let child processes fault on guard pages to see that they
hold. Exit code 0 if they do, else 1."""

BENCH_DESCRIPTION = "Measure linmem against the same system calls in C, against wasmtime's own memories and NumPy."

UNITS: dict[str, int] = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    UNITS[_letter] = UNITS[_letter + "ib"] = 1024 ** _power
    UNITS[_letter + "b"] = 1000 ** _power


class Refused(Exception):
    """What ends a subcommand with one line on standard error."""

    def __init__(self, message: str, code: int = EXIT_REFUSED) -> None:
        super().__init__(message)
        self.code = code


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage is one --help away."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        for action in self._actions:
            # Some Pythons' argparse takes the value of "--option=--" for the word that ends the options.
            value = getattr(found, action.dest, None) if action.option_strings and action.nargs is None else None
            if isinstance(value, list) and ([] in value or action.default is None):
                self.error(f"argument {action.option_strings[0]}: -- is no value")
        return found, unknown


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : list of str, optional
        The arguments without the program's name; those of this process by default.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    SystemExit
        From argparse: after ``--help`` and ``--version``, and with code 2 for a wrong command line.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    command = words[0] if words else ""
    try:
        parser, commands = build_parser()
        for word in words:
            if "\0" in word:        # never of a shell's
                parser.error(f"{word!r:.60} has a NUL in it")
        if command == "run":
            words, program, arguments = split_run(commands["run"], words[1:])
            args, unknown = commands["run"].parse_known_args(words)
            if unknown:
                commands["run"].error(f"no such option: {unknown[0]}; the program's own come after --")
            if program is None:
                commands["run"].error("PROGRAM is missing")
            return run(args, program, arguments)
        if command == "bench":
            return bench(parser, commands["bench"], words)
        if command == "image":
            return image(parser, commands["image"], words)
        args = parser.parse_args(words)
        if args.command is None:
            parser.print_help(sys.stderr)
            return EXIT_USAGE
        code = demo() if args.command == "demo" else info(args)
        sys.stdout.flush()
        return code
    except Refused as refusal:
        print(f"linmem {command}: {refusal}", file=sys.stderr)
        return refusal.code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        # A pipe that nobody reads is an invalid argument to some systems.
        if not isinstance(error, BrokenPipeError) and (type(error) is not OSError or error.errno != errno.EINVAL):
            raise
        # The reader of our output has gone (`linmem info | head -1`). At exit Python would flush
        # into the pipe once more and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_REFUSED


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of the subcommands by name."""
    parser = Parser(prog="linmem", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"linmem {linmem.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    run = subparsers.add_parser(
        "run", help="run a WASI program in linmem memories", usage=RUN_USAGE, description=RUN_DESCRIPTION,
        epilog=RUN_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    run.add_argument("--dir", action="append", default=[], metavar="HOST[::GUEST]",
                     help="a directory that the program may read and write, under the name GUEST; repeatable")
    run.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]",
                     help="a variable for the program, with this process's value if none is given; repeatable")
    run.add_argument("--creator", default="mmap", metavar="KIND",
                     help="who makes the memories, by the name linmem.creator() knows (default: mmap)")
    run.add_argument("--max-memory", type=parse_size, metavar="SIZE",
                     help="a budget for all memories of the program: bytes, or a number with KiB, MiB, GiB (powers"
                          " of 1024; K, M, G mean the same) or KB, MB, GB (powers of 1000). Past it memory.grow"
                          " returns -1")
    run.add_argument("--report", action="store_true", help="at the end, say what each memory did")
    run.add_argument("--json", action="store_true", help="the report as one line of JSON (implies --report)")

    subparsers.add_parser("demo", help="see views survive growth and the end of a store", allow_abbrev=False,
                          description=DEMO_DESCRIPTION)

    info = subparsers.add_parser("info", help="what this machine allows, and a self-test", allow_abbrev=False,
                                 description=INFO_DESCRIPTION)
    info.add_argument("--json", action="store_true", help="print it as JSON")

    image = subparsers.add_parser("image", help="look at the files of images and deltas", allow_abbrev=False)
    bench = subparsers.add_parser("bench", help="the benchmarks", allow_abbrev=False, description=BENCH_DESCRIPTION)
    return parser, {"run": run, "demo": subparsers.choices["demo"], "info": info, "image": image,
                    "bench": bench}


def parse_size(text: str) -> int:
    """Bytes from "65536", "64MiB", "1.5GiB", "64KB"; a fraction of a byte is dropped."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?\s*([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    unit = UNITS.get(match[3].lower()) if match else None
    if match is None or unit is None or (unit == 1 and match[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no size: bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB, as 65536 or 1.5GiB")
    fraction = match[2] or ""
    parts: int = 10 ** len(fraction)
    size = int(match[1] + fraction) * unit // parts
    if size >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is more than any memory can have: below 8 EiB (2**63 bytes)")
    return size


def show_size(size: int) -> str:
    """1536 -> "1.5 KiB"; whole numbers without a fraction."""
    value, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def show_time(ns: int) -> str:
    if ns < 1_000_000:
        return f"{ns / 1_000:.1f} us"
    return f"{ns / 1_000_000:.1f} ms" if ns < 1_000_000_000 else f"{ns / 1_000_000_000:.2f} s"


def count(n: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{n} {noun if n == 1 else plural}"


# -- run -----------------------------------------------------------------------------------------

def split_run(parser: Parser, words: list[str]) -> tuple[list[str], str | None, list[str]]:
    """linmem's options, the program, and the program's arguments.

    argparse has no word for "options on both sides of the first positional, and none after it".
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
                # Joined, so that a value that begins with a dash is still one.
                options[-1] = f"{word}={rest.pop(0)}"
        elif program is None:
            program = word
        else:
            return options, program, [word, *rest]
    return options, program, []


def run(args: argparse.Namespace, program: str, arguments: list[str]) -> int:
    environment = [split_env(text) for text in args.env]
    directories = [split_dir(text) for text in args.dir]
    code = read_program(program)
    report = args.report or args.json
    creator, statistics = compose_creator(args.creator, args.max_memory, report)

    def work() -> int:
        return execute(program, code, [os.path.basename(program), *arguments], environment, directories, creator)

    try:
        status, running = in_a_thread(work)
    except Refused as refusal:
        print(f"linmem run: {refusal}", file=sys.stderr)
        status, running = refusal.code, False
    if statistics is not None:
        print_report(report_figures(program, args, status, statistics), as_json=args.json)
    if running:
        # The program is still in its endless loop, or waits for input: there is no way to come
        # back from there but the end of the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def split_env(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name:
        raise Refused(f"--env {text!r}: the name is missing (NAME=VALUE)", EXIT_USAGE)
    if not equals:
        if name not in os.environ:
            raise Refused(f"--env {name}: no such variable in this environment (NAME=VALUE sets one)", EXIT_USAGE)
        value = os.environ[name]
    return name, value


def split_dir(text: str) -> tuple[str, str]:
    host, _, guest = text.partition("::")
    if not os.path.isdir(host):
        what = "is no directory" if os.path.exists(host) else "does not exist"
        raise Refused(f"--dir {text}: {host!r} {what}", EXIT_USAGE)
    return host, guest or host


def read_program(path: str) -> bytes:
    """The bytes of a wasm module or of its text; anything else is refused here, by name."""
    try:
        with open(path, "rb") as file:
            code = file.read()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Refused(f"cannot read {path!r}: {reason}", EXIT_USAGE) from None
    is_text = path.lower().endswith(".wat") or code.lstrip().startswith((b"(", b";;"))
    if not code.startswith(b"\0asm") and not is_text:
        raise Refused(f"{path!r} is not a WebAssembly module (neither wasm nor wat)")
    return code


def compose_creator(kind: str, max_memory: int | None, report: bool) -> tuple[Any, linmem.StatisticsCreator | None]:
    try:
        creator = linmem.creator(kind)
    except (TypeError, ValueError) as error:
        hint = " (for a budget: --max-memory)" if kind == "limiting" else ""
        raise Refused(f"--creator {kind}: {error}{hint}", EXIT_USAGE) from None
    if max_memory is not None:
        creator = linmem.LimitingCreator(creator, max_memory)
    if not report:
        return creator, None
    # Over the budget, so that it sees what the budget refuses.
    statistics = linmem.StatisticsCreator(creator)
    return statistics, statistics


def in_a_thread(work: Callable[[], int]) -> tuple[int, bool]:
    """The exit code of `work`, and whether it still runs: Ctrl-C does not wait for native code.

    Python's signal handler runs between bytecodes of the main thread, which therefore must not be
    the one inside the program.
    """
    import threading

    status: list[int] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            status.append(work())
        except BaseException as error:      # raised again below, in the main thread
            errors.append(error)

    threading.stack_size(8 << 20)           # some systems give a second thread less than wasm's own stack
    thread = threading.Thread(target=target, name="linmem run", daemon=True)
    thread.start()
    threading.stack_size(0)
    try:
        while thread.is_alive():
            thread.join(0.2)                # where a wait without an end cannot be interrupted
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED, thread.is_alive()
    if errors:
        raise errors[0]
    return status[0], False


def import_wasmtime() -> tuple[Any, Any]:
    """wasmtime and linmem.wasmtime."""
    try:
        import wasmtime

        import linmem.wasmtime as installer
    except (ImportError, OSError) as error:         # OSError: its library does not load here
        raise Refused(f"needs wasmtime-py: pip install 'linmem[wasmtime]' ({error})") from None
    return wasmtime, installer


def execute(program: str, code: bytes, argv: list[str], environment: list[tuple[str, str]],
            directories: list[tuple[str, str]], creator: Any) -> int:
    wasmtime, installer = import_wasmtime()
    config = wasmtime.Config()
    try:
        installer.install(config, creator)
    except RuntimeError as error:
        raise Refused(str(error)) from None
    engine = wasmtime.Engine(config)
    module = compile_program(wasmtime, engine, program, code)
    store = wasmtime.Store(engine)
    store.set_wasi(wasi_config(wasmtime, argv, environment, directories))
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    try:
        instance = linker.instantiate(store, module)
        instance.exports(store)["_start"](store)
    except wasmtime.ExitTrap as end:
        return int(end.code)
    except wasmtime.Trap as trap:
        where = str(trap).partition("Stack backtrace:")[0].partition("Caused by:")[0].rstrip()
        print(f"linmem run: {program} trapped: {one_line(trap)}\n{where}", file=sys.stderr)
        return EXIT_TRAP
    except wasmtime.WasmtimeError as error:
        raise Refused(f"{program}: {one_line(error)}") from None
    return 0


def compile_program(wasmtime: Any, engine: Any, program: str, code: bytes) -> Any:
    try:
        binary = code if code.startswith(b"\0asm") else bytes(wasmtime.wat2wasm(code.decode()))
        # The second half of the version is the layer: 0 a module, 1 a component.
        if binary[6:8] == b"\1\0":
            raise Refused(f"{program} is a component; linmem runs WASI preview 1 command modules"
                          " (compile it for wasm32-wasip1)")
        module = wasmtime.Module(engine, binary)
    except wasmtime.WasmtimeError as error:
        raise Refused(f"{program}: {one_line(error)}") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{program} is no text of a WebAssembly module: {error}") from None
    start = next((export.type for export in module.exports if export.name == "_start"), None)
    if not isinstance(start, wasmtime.FuncType):
        raise Refused(f"{program} exports no function _start: it is a library, not a WASI command")
    if start.params or start.results:
        raise Refused(f"{program}: _start takes or returns something, so it is not a WASI command's")
    return module


def wasi_config(wasmtime: Any, argv: list[str], environment: list[tuple[str, str]],
                directories: list[tuple[str, str]]) -> Any:
    wasi = wasmtime.WasiConfig()
    try:
        wasi.argv = argv
        wasi.env = environment
        for host, guest in directories:
            try:
                wasi.preopen_dir(host, guest)
            except wasmtime.WasmtimeError:
                raise Refused(f"--dir {host}: the directory cannot be opened", EXIT_USAGE) from None
    except UnicodeEncodeError as error:
        raise Refused(f"{error.object!r} is no UTF-8, and WASI has no other text", EXIT_USAGE) from None
    wasi.inherit_stdin()
    wasi.inherit_stdout()
    wasi.inherit_stderr()
    return wasi


def one_line(error: Exception) -> str:
    """wasmtime's message and its causes, without source excerpt and backtraces (its own too: RUST_BACKTRACE)."""
    head, _, causes = str(error).partition("Stack backtrace:")[0].partition("Caused by:")
    lines = head.strip().splitlines()
    said = [] if not lines or "wasm backtrace" in lines[0] else [lines[0]]
    said += [re.sub(r"^\d+: ", "", line.strip()) for line in causes.splitlines() if line.strip()]
    place = re.search(r"--> .*:(\d+):(\d+)$", head, re.MULTILINE)
    return ": ".join(said) + (f" (line {place[1]}, column {place[2]})" if place else "")


def report_figures(program: str, args: argparse.Namespace, status: int,
                   statistics: linmem.StatisticsCreator) -> dict[str, Any]:
    memories = [{
        "first_size": memory["first_size"],
        "peak_size": memory["size"],        # a wasm memory never shrinks
        "growths": memory["growths"],
        "refused_growths": memory["refused"],
        "grow_ns": memory["grow_ns"],
        "peak_resident": memory["peak_resident"],
    } for memory in reversed(statistics.memories())]
    return {"program": program, "exit_code": status, "creator": args.creator, "max_memory": args.max_memory,
            "memories": memories, "all": statistics.statistics()}


def print_report(figures: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps(figures), file=sys.stderr, flush=True)
        return
    everything = figures["all"]
    if not everything["total_count"] and not everything["failures"]:
        print("linmem: no memory was asked for", file=sys.stderr)
        return
    budget = "" if figures["max_memory"] is None else f", of at most {show_size(figures['max_memory'])}"
    print(f"linmem: {count(everything['total_count'], 'memory')} by {figures['creator']},"
          f" {show_size(everything['peak_bytes'])} at the peak{budget};"
          f" {count(everything['failures'], 'request')} refused", file=sys.stderr)
    for number, memory in enumerate(figures["memories"], start=1):
        print(f"  memory {number}: {show_size(memory['first_size'])} at first, {show_size(memory['peak_size'])} at the"
              f" peak, {show_size(memory['peak_resident'])} resident;"
              f" {count(memory['growths'], 'growth')} in {show_time(memory['grow_ns'])},"
              f" {memory['refused_growths']} refused", file=sys.stderr, flush=True)


# -- demo ----------------------------------------------------------------------------------------

STEP = 65536
PLAIN_SIZE = 64 << 20
FIRST_LIMIT, LIMIT = 10_000, 10_000_000
PRIMES = {FIRST_LIMIT: 1_229, LIMIT: 664_579}
LARGEST_PRIME, TWIN_PRIMES = 9_999_991, 58_980      # below LIMIT


class Checks:
    """Prints each claim with what was found, and counts those that do not hold."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, claim: str, expected: Any, found: Any, show: Callable[[Any], str] = str) -> None:
        if expected == found:
            print(f"   [ok]     {claim}: {show(found)}")
        else:
            self.failed += 1
            print(f"   [FAILED] {claim}: expected {show(expected)}, found {show(found)}")

    def unchanged(self, claim: str, before: Any, after: Any, show: Callable[[Any], str] = str) -> None:
        held = before == after
        self.failed += not held
        print(f"   {'[ok]    ' if held else '[FAILED]'} {claim}: {show(before)} before, {show(after)} after")


def demo() -> int:
    try:
        import numpy
        import wasmtime

        import linmem.wasmtime  # noqa: F401  (its own import error names what is missing)
    except ImportError as error:
        raise Refused(f"needs NumPy and wasmtime-py: pip install 'linmem[demo]' ({error})") from None
    check = Checks()
    print("linmem demo: arrays that stay valid while their memory grows, and after it is dropped\n")
    try:
        demo_memory(numpy, check)
        demo_program(numpy, wasmtime, check)
    except (MemoryError, RuntimeError, wasmtime.WasmtimeError) as error:
        raise Refused(one_line(error)) from None
    if check.failed:
        print(f"{count(check.failed, 'check')} FAILED.")
        return EXIT_REFUSED
    print("All of it held.")
    return 0


def address_of(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def demo_memory(numpy: Any, check: Checks) -> None:
    memory = linmem.create(STEP, maximum=PLAIN_SIZE, reserve=PLAIN_SIZE)
    array = numpy.asarray(memory)
    array[:] = numpy.arange(STEP) % 251
    address, total = address_of(array), int(array.sum())
    print(f"1. A memory of {show_size(STEP)}, a NumPy array on it, and the memory grows in steps of {show_size(STEP)}.")
    for size in range(2 * STEP, PLAIN_SIZE + 1, STEP):
        memory.grow_to(size)
    whole = numpy.asarray(memory)
    resident = memory.info().resident
    check(f"size after {PLAIN_SIZE // STEP - 1} growths", PLAIN_SIZE, whole.nbytes, show_size)
    check.unchanged("address", address, address_of(whole), hex)
    check.unchanged("sum over the old array", total, int(array.sum()))
    check("new bytes that are not zero", 0, int(numpy.count_nonzero(whole[STEP:])))
    array[0] = 42
    check("a byte written through the old array, read through the new one", 42, int(whole[0]))
    print("   Nothing was copied and nothing moved: the addresses were reserved at the start, and growing\n"
          "   only made more of them accessible. numpy.resize and bytearray would have copied, or refused.")
    if resident is not None:
        print(f"   Physical memory in use before the check read them all: {show_size(resident)}.")
    print()


def demo_program(numpy: Any, wasmtime: Any, check: Checks) -> None:
    import linmem.wasmtime as installer

    statistics = linmem.StatisticsCreator(linmem.creator())
    config = wasmtime.Config()
    installer.install(config, statistics)
    engine = wasmtime.Engine(config)
    store = wasmtime.Store(engine)
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_demo.wasm")
    with open(path, "rb") as file:
        module = wasmtime.Module(engine, file.read())
    exports = wasmtime.Instance(store, module, []).exports(store)
    memory = installer.linear_memory(store, exports["memory"])

    print("2. A WebAssembly program sieves primes in a memory of linmem's; its table grows page by page.")
    check(f"primes up to {FIRST_LIMIT:,}, says the program", PRIMES[FIRST_LIMIT],
          exports["count_primes"](store, FIRST_LIMIT))
    address, start = memory.as_ptr(), exports["table"](store)
    early = numpy.asarray(memory)[start:start + FIRST_LIMIT + 1]
    early_address = address_of(early)
    print(f"   A NumPy array looks at its table, in {show_size(memory.byte_size())} of memory. The program goes on:")
    check(f"primes up to {LIMIT:,}, says the program", PRIMES[LIMIT], exports["count_primes"](store, LIMIT))
    (record,) = statistics.memories()
    print(f"   Its memory went from {show_size(record['first_size'])} to {show_size(memory.byte_size())} in"
          f" {count(record['growths'], 'growth')}, {show_time(record['grow_ns'])} in all.")
    check.unchanged("address", address, memory.as_ptr(), hex)
    check(f"primes up to {FIRST_LIMIT:,}, counted in the old array", PRIMES[FIRST_LIMIT],
          int(numpy.count_nonzero(early == 0)))
    table = numpy.asarray(memory)[start:start + LIMIT + 1]
    check("the old array still looks at the program's table", True, bool(numpy.shares_memory(early, table)))
    print("   With wasmtime's own memory that array could point to where the memory used to be.\n")

    print("3. The store is closed: for wasmtime the memory is gone. The arrays are still here.")
    del memory, exports
    store.close()
    primes = numpy.flatnonzero(table == 0)
    check.unchanged("address of the old array", early_address, address_of(early), hex)
    check(f"primes up to {FIRST_LIMIT:,}, counted in the old array", PRIMES[FIRST_LIMIT],
          int(numpy.count_nonzero(early == 0)))
    check(f"primes up to {LIMIT:,}, counted by NumPy", PRIMES[LIMIT], len(primes))
    check("the largest of them", LARGEST_PRIME, int(primes[-1]))
    check("pairs of twins among them", TWIN_PRIMES, int(numpy.count_nonzero(numpy.diff(primes) == 2)))
    print("   The pages live as long as the last array on them. With wasmtime's own memory reading it\n"
          "   here would have killed this process.\n")


# -- info ----------------------------------------------------------------------------------------

# Read by ctypes' own getter: on some systems a foreign function's call turns the fault into an exception.
GUARD_CHILD = """
import ctypes, sys
import linmem
from linmem._os import pages
pages.die_quietly()
unit = max(65536, pages.describe()["page_size"])
memory = linmem.create(unit, maximum=4 * unit, reserve=4 * unit, guard=unit)
base = memory.as_ptr()
address = {"last": base + memory.byte_size() - 1, "before": base - 1, "after": base + memory.byte_size(),
           "guard": memory.wasm_accessible().stop - 1}[sys.argv[1]]
print("ready", flush=True)
print(ctypes.c_ubyte.from_address(address).value)
"""

WASMTIME_CHILD = """
import wasmtime
import linmem.wasmtime
config = wasmtime.Config()
linmem.wasmtime.install(config)
engine = wasmtime.Engine(config)
store = wasmtime.Store(engine)
module = wasmtime.Module(engine, '(module (memory (export "memory") 1 4) (data (i32.const 7) "linmem"))')
memory = wasmtime.Instance(store, module, []).exports(store)["memory"]
ours = linmem.wasmtime.linear_memory(store, memory)
view = memoryview(ours)
base = ours.as_ptr()
memory.grow(store, 3)
found = (ours.as_ptr() - base, ours.byte_size(), bytes(view[7:13]))
if found != (0, 4 * 65536, b"linmem"):
    raise SystemExit(f"after a growth: moved by, size, contents = {found}")
store.close()
if bytes(view[7:13]) != b"linmem":
    raise SystemExit("the view does not survive store.close()")
"""

PROBES = (
    ("last", "the last byte of the memory", False),
    ("before", "the first byte before the base", True),
    ("after", "the first byte after byte_size", True),
    ("guard", "the last byte of the guard", True),
)
ACCESS_VIOLATION = 0xC0000005
CHILD_SECONDS = 60


def info(args: argparse.Namespace) -> int:
    from linmem._os import pages

    figures = {"linmem": linmem.__version__, "python": ".".join(map(str, sys.version_info[:3])),
               **pages.describe(), "wasmtime": probe_wasmtime(), "self_test": self_test()}
    if args.json:
        import json

        print(json.dumps(figures, indent=2))
    else:
        print_info(figures)
    return 0 if figures["self_test"]["passed"] else EXIT_REFUSED


def run_child(script: str, *arguments: str) -> tuple[int | None, str, str]:
    """Return code (None: it did not end), standard output and error of a Python child."""
    import subprocess

    # The child finds the linmem that this process runs, wherever it came from.
    ours = os.path.dirname(os.path.dirname(os.path.abspath(linmem.__file__)))
    path = os.pathsep.join(part for part in (ours, os.environ.get("PYTHONPATH", "")) if part)
    try:
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True,
                              errors="replace", timeout=CHILD_SECONDS, env={**os.environ, "PYTHONPATH": path})
    except subprocess.TimeoutExpired:
        return None, "", f"no end after {CHILD_SECONDS} s"
    return done.returncode, done.stdout, done.stderr


def death(returncode: int | None) -> str | None:
    """The name of the memory fault that ended a process, None if something else did."""
    import signal

    if returncode is None:
        return None
    if returncode & 0xFFFFFFFF == ACCESS_VIOLATION:
        return "access violation (0xC0000005)"
    for name in ("SIGSEGV", "SIGBUS"):
        if hasattr(signal, name) and -returncode == getattr(signal, name):
            return name
    return None


def self_test() -> dict[str, Any]:
    """Children that touch a byte each: one that is theirs, and three that no one may touch."""
    children = []
    for probe, place, must_die in PROBES:
        returncode, out, error = run_child(GUARD_CHILD, probe)
        died_of = death(returncode)
        # It got as far as the access, and then: a fault, or the zero of a fresh byte.
        held = died_of is not None and out == "ready\n" if must_die else (returncode, out) == (0, "ready\n0\n")
        children.append({"place": place, "must_fault": must_die, "returncode": returncode, "died_of": died_of,
                         "passed": held, "stderr": "" if held else error.strip()})
    return {"passed": all(child["passed"] for child in children), "children": children}


def probe_wasmtime() -> dict[str, Any]:
    """In a child: a wasmtime that does not fit could take the process with it."""
    from importlib import metadata

    try:
        version = metadata.version("wasmtime")
    except metadata.PackageNotFoundError:
        return {"version": None, "works": False, "detail": "not installed: pip install 'linmem[wasmtime]'"}
    returncode, _, error = run_child(WASMTIME_CHILD)
    if returncode == 0:
        return {"version": version, "works": True, "detail": "installed, grown and closed under a live view"}
    lines = error.strip().splitlines()
    ended = death(returncode) or f"exit code {returncode}"
    return {"version": version, "works": False, "detail": f"{lines[-1] if lines else 'no message'} ({ended})"}


CAPABILITY_WORDS = {
    "moves": "a memory can move to larger reservations without a copy",
    "names": "memories carry a name in the system's maps",
    "discard_any_protection": "protected pages can be discarded",
    "populates": "prefault reports pages that cannot be written",
    "scans": "a pool learns which pages were touched",
}


def print_info(figures: dict[str, Any]) -> None:
    space, left = figures["address_space"], figures["address_space_left"]
    print(f"linmem {figures['linmem']}, Python {figures['python']}\n")
    print(f"host page         {figures['page_size']} bytes")
    print(f"granularity       {figures['granularity']} bytes")
    print(f"address bits      {figures['address_bits']}: {show_size(space)}"
          + ("" if left == space else f", of which limits leave {show_size(left)}"))
    for title, facts in (("limits", figures["limits"].items()), ("capabilities", figures["capabilities"].items())):
        lines = []
        for name, value in facts:
            if isinstance(value, bool):
                words = CAPABILITY_WORDS.get(name, "")
                lines.append(f"{'yes' if value else 'no ':3}  {name}" + (f": {words}" if words else ""))
            else:
                lines.append(f"{name} = {value}")
        for i, line in enumerate(lines or ["none"]):
            print(f"{title if i == 0 else '':18}{line}")
    wasmtime = figures["wasmtime"]
    version = wasmtime["version"] or "none"
    works = "linmem.wasmtime works" if wasmtime["works"] else "linmem.wasmtime does not work"
    print(f"{'wasmtime':18}{version}, {works}: {wasmtime['detail']}")
    print("\nself-test: each child process reads one byte")
    for child in figures["self_test"]["children"]:
        outcome = f"died of {child['died_of']}" if child["died_of"] else f"ended with code {child['returncode']}"
        print(f"  [{'ok' if child['passed'] else 'FAILED'}] {child['place']}: {outcome}")
        if child["stderr"]:
            print("    " + child["stderr"].replace("\n", "\n    "))
    print("The guards hold." if figures["self_test"]["passed"] else "THE GUARDS DO NOT HOLD on this machine.")


# -- image ---------------------------------------------------------------------------------------

def image(parser: Parser, own_parser: Parser, words: list[str]) -> int:
    from linmem import _image_cli

    _image_cli.add_arguments(own_parser)
    code = _image_cli.main(parser.parse_args(words))
    sys.stdout.flush()
    return code


# -- bench ---------------------------------------------------------------------------------------

BENCH_PACKAGES = ("rich", "matplotlib", "numpy", "wasmtime")


def bench(parser: Parser, own_parser: Parser, words: list[str]) -> int:
    try:
        from linmem import bench as suite

        suite.add_arguments(own_parser)
        return int(suite.main(parser.parse_args(words)))
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in BENCH_PACKAGES or "linmem[wasmtime]" in str(error):
            raise Refused(f"needs {missing or 'wasmtime'}: pip install 'linmem[bench]'") from None
        if missing == "linmem":
            raise Refused("the benchmarks are not importable from a source tree built in place:"
                          f" pip install -e . first ({error})") from None
        raise
