"""The parser of arguments, the types of arguments, refusals and exit codes of all subcommands."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from linmem._core.arguments import printable
from linmem.errors import FileFormatError

EXIT_REFUSED = 1            # the command failed, or a check failed
EXIT_USAGE = 2              # the command line is wrong
EXIT_TIMEOUT = 124          # as `timeout` of the coreutils does
EXIT_INTERRUPTED = 130      # 128 + SIGINT, as a shell reports it
EXIT_TRAP = 134             # 128 + SIGABRT, as `wasmtime run` does

# The errors of a write if the disk is full or a quota or a size limit is reached.
FULL = (errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC))

WIDEST = 100                # columns of the texts of --help on a wider terminal

UNITS: dict[str, int] = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    UNITS[_letter] = UNITS[_letter + "ib"] = 1024 ** _power
    UNITS[_letter + "b"] = 1000 ** _power


class Refused(Exception):
    """Ends a subcommand with one line on standard error."""

    def __init__(self, message: str, code: int = EXIT_REFUSED) -> None:
        super().__init__(printable(message))
        self.code = code


@contextlib.contextmanager
def refuse_errors_of(name: str) -> Iterator[None]:
    """Refuse an error in the block, with one line about the file `name`."""
    try:
        yield
    except FileFormatError as error:        # the message contains the name of the file
        raise Refused(str(error)) from None
    except OSError as error:
        raise Refused(f"{os.fsdecode(error.filename or name) or repr(name)}: {error.strerror or error}") from None
    except (MemoryError, OverflowError, ValueError) as error:
        raise Refused(f"{name}: {error or 'there is not enough memory for it'}") from None


def drop_output(error: OSError) -> str:
    """The reason of a failed write to standard output; "" if the reader of the output has ended, as in `| head -1`.

    What is still to be written is dropped. Any other error is raised again.
    """
    # Some systems report a pipe without a reader as EINVAL.
    if (type(error) not in (OSError, BrokenPipeError) or error.filename is not None
            or error.errno not in (errno.EPIPE, errno.EINVAL, *FULL)):
        raise error
    # Python flushes standard output at exit: without this line, the flush would fail and print a message.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return f"standard output: {error.strerror}" if error.errno in FULL else ""


class Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str, **options: Any) -> None:
        # argparse makes a formatter for each option, also if it prints nothing, and asks `shutil` for the width, which
        # takes long to import.
        super().__init__(prog, **{"width": columns() - 2, **options})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Break the lines of each paragraph at the width of the terminal; argparse calls this method."""
        import textwrap

        wrap = textwrap.TextWrapper(min(width, WIDEST), initial_indent=indent, subsequent_indent=indent,
                                    break_long_words=False, break_on_hyphens=False)
        return "\n\n".join(wrap.fill(paragraph) for paragraph in text.strip().split("\n\n"))


def columns() -> int:
    """The width of the terminal, as `shutil.get_terminal_size` finds it."""
    try:
        width = int(os.environ["COLUMNS"])
    except (KeyError, ValueError):
        width = 0
    if width <= 0:
        try:
            width = os.get_terminal_size(sys.__stdout__.fileno()).columns       # type: ignore[union-attr]
        except (AttributeError, ValueError, OSError):       # standard output is closed, or is not a terminal
            width = 0
    return width or 80


class Parser(argparse.ArgumentParser):
    """Keeps the paragraphs of the help texts, and reports an error in one line with a reference to --help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {printable(message)} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Raise OSError if --help or --version cannot be written. argparse would drop the error."""
        if file is sys.stdout:
            file.write(message)
            file.flush()
        else:
            super()._print_message(message, file)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        for action in self._actions:
            # Some versions of argparse mistake the value of "--option=--" for the "--" that ends the options.
            value = getattr(found, action.dest, None) if action.option_strings and action.nargs is None else None
            if isinstance(value, list) and ([] in value or not isinstance(action.default, list)):
                self.error(f"argument {action.option_strings[0]}: -- is not a value")
        return found, unknown


def check_output(option: str, path: str, others: dict[str, str | None]) -> None:
    """Refuse a file that cannot be written, or that replaces one of the other files of the command."""
    folder = os.path.dirname(os.path.abspath(path))
    fault = ""
    if os.path.isdir(path):
        fault = "it is a directory"
    elif not os.path.isdir(folder):
        fault = f"{folder!r} is not a directory"
    for use, other in others.items():
        if other is not None and os.path.realpath(path) == os.path.realpath(other):
            fault = f"it is {use} itself"
        with contextlib.suppress(OSError, ValueError):      # a file does not exist, or its name is not valid
            if other is not None and os.path.samefile(path, other):
                fault = f"it is {use} itself"
    if fault:
        raise Refused(f"{option} {path}: {fault}", EXIT_USAGE)


def file_name(text: str) -> str:
    """The name of a file, which is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("must be the name of a file, got ''")
    return text


def function_name(text: str) -> str:
    """The name of an exported function, which is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("must be the name of an exported function, got ''")
    return text


def parse_size(text: str) -> int:
    """Bytes from "65536", "64MiB", "1.5GiB", "64KB"; a fraction of a byte is dropped."""
    match = re.fullmatch(r"(\d+)(?:\.(\d+))?\s*([a-z]*)", text.strip(), re.IGNORECASE | re.ASCII)
    unit = UNITS.get(match[3].lower()) if match else None
    if match is None or unit is None or (unit == 1 and match[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: bytes, or a number with KiB, MiB, GiB, TiB, KB, MB, GB or TB (65536, 1.5GiB)")
    fraction = match[2] or ""
    size: int = int(match[1] + fraction) * unit // 10 ** len(fraction)
    if size >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} must be below 8 EiB (2**63 bytes)")
    return size
