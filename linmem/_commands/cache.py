"""Show and bound the cache of compiled programs, which `linmem run` and `linmem prewarm` fill."""

from __future__ import annotations

import argparse
import json
import os
import time

from linmem._commands.compile_cache import LIMIT, default_directory
from linmem._commands.image import say
from linmem._commands.parser import Parser, Refused, file_name, parse_size, refuse_errors_of
from linmem._commands.text import count, show_size
from linmem._wasm.image_cache import Cache

EPILOG = f"""\
The cache is in the directory "linmem" of the user's cache directory: $XDG_CACHE_HOME, or ~/.cache,
~/Library/Caches on macOS, %LOCALAPPDATA% on Windows. A run that adds a program to this directory removes the
programs that were not used for the longest time, until all have at most {show_size(LIMIT)}. A directory of
--cache is bounded only by `linmem cache prune`.

The time of the last use is as exact as the file system notes it: many note it once a day.

Exit codes: 0 if the command succeeded; 1 if the cache cannot be read, or belongs to another user; 2 if the command
line is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands of ``linmem cache`` and their options."""
    parser.description, parser.epilog = __doc__, EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    actions.add_parser("info", help="show the directory, the number of entries and their size")
    prune = actions.add_parser("prune", help="remove the entries that were not used for the longest time")
    prune.add_argument("--max-size", type=parse_size, default=LIMIT, metavar="SIZE",
                       help=f"the bytes that all entries may have afterwards; by default {show_size(LIMIT)}; 0 removes"
                            " all entries")
    for action in actions.choices.values():
        action.add_argument("--cache", type=file_name, metavar="DIR", help="a directory of --cache of `linmem run`")
        action.add_argument("--json", action="store_true", help="print one line of JSON; sizes are in bytes")


def main(args: argparse.Namespace) -> int:
    """Run a parsed ``linmem cache`` command; returns the exit code."""
    directory = args.cache or default_directory()
    if directory is None:
        raise Refused("this user has no cache directory (--cache DIR)")
    with refuse_errors_of(directory):
        cache = None
        if args.cache is not None or os.path.lexists(directory):        # else no program was kept yet
            os.scandir(directory).close()       # the error of a missing directory, which Cache() would make
            cache = Cache(directory)
        removed = cache.prune(args.max_size) if cache is not None and args.action == "prune" else []
        entries = [] if cache is None else cache.used()
    size, removed_size = (sum(entry.size for entry in some) for some in (entries, removed))
    oldest = entries[0].time if entries else None
    if args.json:
        figures = {"directory": directory, "entries": len(entries), "size": size, "oldest": oldest}
        print(json.dumps(figures | {"removed": len(removed), "removed_size": removed_size}))
        return 0
    if args.action == "prune":
        say(f"removed {count(len(removed), 'entry')} of {show_size(removed_size)}")
    age = "" if oldest is None else f"; the oldest was used on {time.strftime('%Y-%m-%d', time.localtime(oldest))}"
    say(f"{directory}: {count(len(entries), 'entry')} of {show_size(size)}{age}")
    return 0
