"""The option --creator: the creator that a text describes, and the list of the kinds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import linmem
from linmem._commands.parser import EXIT_USAGE, Parser, Refused, columns, parse_size
from linmem._commands.text import show_size
from linmem._commands.values import parse_float, parse_integer
from linmem.creators import KINDS as CLASSES

# "routing" needs a rule, which a command line cannot say.
KINDS = [kind for kind in CLASSES if kind != "routing"]
# The options whose values are objects of Python.
_OBJECTS = "upstream", "image", "on_made", "on_grow", "on_refused", "on_dropped"
# The options whose values are bytes.
_SIZES = "keep_resident", "max_resident", "max_reserved", "limit_bytes", "limit_each"


class ListKinds(argparse.Action):
    """Keeps the value of the option. The value `help` prints the kinds and ends the process."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: str | None = None) -> None:
        if values == "help":
            parser._print_message(list_kinds() + "\n", sys.stdout)
            parser.exit()
        setattr(namespace, self.dest, values)


def add_option(parser: Parser) -> None:
    """Declare the option."""
    option: Any = parser.add_argument(
        "--creator", default="mmap", metavar="KIND[:OPTION=VALUE,...]", action=ListKinds,
        help=f"the creator of the memories: mmap (the default), {', '.join(KINDS[1:-1])} or {KINDS[-1]}, and its"
             " options. `--creator help` lists all kinds with their options")
    option.completer = lambda **_: (*KINDS, "help")     # for argcomplete


def compose_creator(text: str, max_memory: int | None) -> Any:
    """The creator that KIND[:OPTION=VALUE,...] describes, under the budget."""
    kind, colon, rest = text.partition(":")
    if kind not in KINDS:
        raise Refused(f"--creator {text}: KIND must be one of {', '.join(KINDS)}; `--creator help` lists their options",
                      EXIT_USAGE)
    options: dict[str, Any] = {}
    for option in rest.split(",") if colon else ():
        name, _, value = option.partition("=")
        if not name or not value or name in options:
            what = f"{name} stands twice" if name in options else f"{option!r} is not an option, like idle_seconds=5"
            raise Refused(f"--creator {text}: {what}", EXIT_USAGE)
        options[name] = option_value(value)
    try:
        creator = linmem.creator(kind, **options)
    except (TypeError, ValueError, OverflowError, OSError) as error:
        hint = " (for a budget: --max-memory)" if kind == "limiting" else ""
        raise Refused(f"--creator {text}: {error}{hint}", EXIT_USAGE) from None
    return creator if max_memory is None else linmem.LimitingCreator(creator, max_memory)


def option_value(text: str) -> bool | int | float | str | None:
    """The value of an option of a creator: true, false, none, a number, a size (64MiB) or a word."""
    if text in ("true", "false", "none"):
        return {"true": True, "false": False}.get(text)
    kinds: tuple[Callable[[str], int | float], ...] = (
        lambda text: parse_integer(text, 64), lambda text: parse_float(text, 64), parse_size)
    for parse in kinds:
        try:
            return parse(text)
        except (ValueError, argparse.ArgumentTypeError):
            continue
    return text


def list_kinds() -> str:
    """The kinds, what each does, and its options with their defaults."""
    import inspect
    import textwrap

    lines = []
    for kind in KINDS:
        try:
            parameters = [*inspect.signature(CLASSES[kind]).parameters.values()]
        except ValueError:      # this Python was built without docstrings, so classes in C have no signatures
            parameters = []
        options = [f"{one.name}={_shown(one.name, one.default)}" for one in parameters if one.name not in _OBJECTS]
        summary = inspect.cleandoc(CLASSES[kind].__doc__ or "").partition("\n\n")[0] or f"creator({kind!r})"
        wrap = textwrap.TextWrapper(columns() - 2, subsequent_indent=" " * 12, break_on_hyphens=False)
        wrap.initial_indent = f"{kind:<12}"
        lines += wrap.wrap(summary)
        wrap.initial_indent = wrap.subsequent_indent
        lines += wrap.wrap(" ".join(options))
    return "\n".join(lines)


def _shown(name: str, default: Any) -> str:
    """The default of an option, as the command line takes it. VALUE if the option has no default."""
    import inspect

    if name in _SIZES and isinstance(default, int):
        return show_size(default).replace(" ", "")
    return "VALUE" if default is inspect.Parameter.empty else str(default).lower()
