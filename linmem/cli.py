"""The command line: ``linmem run | demo | info | image | bench``. Floor 6.

Nothing but argparse is imported before a subcommand is known: each takes what it needs.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys

import linmem
from linmem._cli.words import EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_USAGE, Parser, Refused, parse_size

__all__ = ["main"]

# What a write says where there is no room, or no more of it for this user or process.
FULL = (errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC))

DESCRIPTION = "Linear memories for Python: run WebAssembly in them, see them at work, ask what this machine allows."

RUN_USAGE = """linmem run [options] PROGRAM [options] [--] [ARGS ...]"""
RUN_DESCRIPTION = """\
Run a WASI preview 1 command module (wasm or wat) with wasmtime, in memories that linmem owns.
Standard input, output and error are the program's, and its exit code is linmem's."""
RUN_EPILOG = """\
Options may stand before PROGRAM and directly after it; the first argument that is no option, or
`--`, begins the program's own ARGS. argv[0] is the file name of PROGRAM. Nothing of this
machine is visible to the program but what --dir and --env give it.

--creator takes "mmap" (each memory is a mapping of its own), "pool" (memories are reset and handed
out again) and "statistics"; each with the defaults of linmem.creator(). --max-memory puts one
budget over it (what linmem.creator("limiting", limit_bytes=...) does).

The report comes last on standard error, so that standard output stays the program's. With --json
it is one line, the last, also if PROGRAM could not be run; sizes are bytes, times nanoseconds.
"resident" is the physical memory at the end, which is its peak: wasm memories give nothing back.

Exit codes: the program's (0 to 125, as wasmtime allows); 134 if it trapped; 130 on Ctrl-C; 2 if
the command line is wrong; 1 if PROGRAM cannot be read or run, with one line that says why."""

DEMO_DESCRIPTION = """\
Show a NumPy view that stays valid while its memory grows, in Python and under a WebAssembly
program, and after the store is closed. Every figure is checked: exit code 0 if all hold, else 1."""

INFO_DESCRIPTION = """\
Print what this machine allows, and let child processes fault on guard pages to see that they
hold. Exit code 0 if they do, else 1."""

BENCH_DESCRIPTION = """\
Measure linmem against the same system calls in C, against wasmtime's own memories and NumPy. Exit
code 0 if it was measured; 1 if a library is missing, if a file cannot be written, or if a goal is missed
(with --check)."""

EPILOG = """\
Exit codes of all commands: 0 if it was done and all is well; 1 if it cannot be done or a check
failed; 2 if the command line is wrong; 130 on Ctrl-C. What a command adds is in its own help."""


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
    # Where a caller closed descriptor 1 or 2 (`linmem info >&-`) there is no stream: words for that stream are dropped.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))      # noqa: SIM115  it stays open
    try:
        parser, commands = build_parser()
        for word in words:
            if "\0" in word:        # never of a shell's
                parser.error(f"{word!r:.60} has a NUL in it")
        if command == "run":
            from linmem._cli import run

            return run.main(commands["run"], words[1:])
        if command == "bench":
            from linmem._cli import bench

            return bench.main(parser, commands["bench"], words)
        if command == "image":
            from linmem._cli import image

            image.add_arguments(commands["image"])
            code = image.main(parser.parse_args(words))
        else:
            args = parser.parse_args(words)
            if args.command is None:
                parser.print_help(sys.stderr)
                return EXIT_USAGE
            if args.command == "demo":
                from linmem._cli import demo

                code = demo.main()
            elif args.command == "info":
                from linmem._cli import info

                code = info.main(args)
            else:
                parser.error(f"{args.command} must be the first word, got {command!r}")
        sys.stdout.flush()
        return code
    except Refused as refusal:
        print(f"linmem {command}: {refusal}", file=sys.stderr)
        return refusal.code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        # A pipe that nobody reads is an invalid argument to some systems.
        if not isinstance(error, BrokenPipeError) and (type(error) is not OSError or error.filename is not None
                                                       or error.errno not in (errno.EINVAL, *FULL)):
            raise
        if error.errno in FULL:
            print(f"linmem {command}: standard output: {error.strerror}", file=sys.stderr)
        # The reader of our output has gone (`linmem info | head -1`). At exit Python would flush
        # into the pipe once more and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_REFUSED


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of the subcommands by name."""
    parser = Parser(prog="linmem", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
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
                     help="who makes the memories: mmap (the default), pool or statistics; see below")
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
