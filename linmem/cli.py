"""The command ``linmem``: finds the subcommand, and turns its exceptions into exit statuses.

Each module of `linmem._commands` that is named after a subcommand has two functions: `add_arguments` declares the
options of the subcommand in its parser, and `main` runs the subcommand. Only the module of the given subcommand is
imported.
"""

from __future__ import annotations

import importlib
import os
import sys

import linmem
from linmem._commands.parser import EXIT_INTERRUPTED, EXIT_REFUSED, EXIT_USAGE, Parser, Refused, drop_output

__all__ = ["main"]

COMMANDS = {"run": "run a WASI program in linmem memories",
            "prewarm": "initialise a WASI program and save its state, for `linmem run --start`",
            "cache": "show and bound the cache of compiled programs",
            "demo": "show views that stay valid after a growth and after the end of a store",
            "info": "show the limits of this machine, and run a self-test",
            "top": "show the memories of another process",
            "image": "show and check files of images, deltas and snapshots; compare images",
            "bench": "run the benchmarks"}

DESCRIPTION = "Linear memories for Python: run WebAssembly in them, see a demonstration, test this machine."
EPILOG = """\
Exit codes of all commands: 0 if the command succeeded; 1 if it cannot be done or a check failed, or
if the reader of standard output has ended, which causes no message; 2 if the command line is wrong;
130 on Ctrl-C. The help of a command lists its other exit codes."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : list of str, optional
        The arguments without the name of the program; by default the arguments of this process.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    SystemExit
        From argparse: after ``--help`` and ``--version``, and with code 2 if the command line is wrong.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    command = words[0] if words else ""
    # If the caller closed descriptor 1 or 2 (`linmem info >&-`), the stream is None: its output is dropped.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))      # noqa: SIM115  it stays open
    if "_ARGCOMPLETE" in os.environ:        # the shell asks for completions
        complete()
    try:
        for word in words:
            if "\0" in word:        # a shell cannot pass such an argument
                Parser(prog="linmem").error(f"{word!r:.60} has a NUL in it")
        if command not in COMMANDS:
            parser, _ = build_parser()
            args = parser.parse_args(words)
            if args.command is None:
                parser.print_help(sys.stderr)
                return EXIT_USAGE
            # Some versions of argparse accept `linmem -- info`.
            parser.error(f"{args.command} must be the first word, got {command!r}")
        # The parser of one command alone, because those of all commands take longer than a small program runs.
        module = importlib.import_module(f"linmem._commands.{command}")
        parser = Parser(prog=f"linmem {command}")
        module.add_arguments(parser)
        args = parser.parse_args(words[1:])
        args.own_process = argv is None
        code = int(module.main(args))
        sys.stdout.flush()
        return code
    except Refused as refusal:
        print(f"linmem {command}: {refusal}", file=sys.stderr)
        return refusal.code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        reason = drop_output(error)
        if reason:
            print(f"linmem {command}: {reason}", file=sys.stderr)
        return EXIT_REFUSED


def complete() -> None:
    """Tell the shell what may come next, and end the process. Does nothing without argcomplete."""
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(whole_parser())


def whole_parser() -> Parser:
    """The parser with the arguments of all subcommands, for completion and for the manual page."""
    parser, parsers = build_parser()
    for name, subparser in parsers.items():
        importlib.import_module(f"linmem._commands.{name}").add_arguments(subparser)
        # argparse-manpage shows the description of a subcommand, and not its epilog.
        subparser.description = "\n\n".join(filter(None, (subparser.description, subparser.epilog)))
    return parser


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and the parsers of the subcommands by name, still without arguments."""
    parser = Parser(prog="linmem", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"linmem {linmem.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    return parser, {name: subparsers.add_parser(name, help=text) for name, text in COMMANDS.items()}
