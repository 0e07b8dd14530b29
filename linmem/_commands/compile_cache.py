"""The cache of compiled programs that `run` and `prewarm` use, and what the user sees while a program is compiled."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator

from linmem._commands.parser import Parser, file_name, refuse_errors_of
from linmem._core.arguments import printable

LIMIT = 1 << 30     # bytes; a new entry in the default directory removes old ones above this size
DELAY = 1.0         # seconds; a shorter compilation is not announced

_ends: list[Callable[[], None]] = []        # of the announcements


def add_options(parser: Parser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--cache", type=file_name, metavar="DIR",
                       help="keep the compiled program in DIR instead of the user's cache directory; DIR must belong to"
                            " this user, and other users must not be able to write to it")
    group.add_argument("--no-cache", action="store_true", help="compile the program, and do not keep it")


def directory_of(args: argparse.Namespace, command: str) -> str | None:
    """The directory of the cache, which belongs to the user. It is made if it is missing. None: no cache is used."""
    if args.no_cache:
        return None
    writable = [host for host, _, may_write in args.dir if may_write]
    if args.cache is not None:
        with refuse_errors_of(args.cache):
            return _made(args.cache, writable)
    directory = default_directory()
    try:
        if directory is None:
            raise FileNotFoundError("this user has no cache directory")
        return _made(directory, writable)
    except OSError as error:
        print(f"linmem {command}: the compiled program is not kept: {printable(str(error))} (--cache DIR keeps it,"
              " --no-cache does without)", file=sys.stderr)
        return None


def _made(directory: str, writable: list[str]) -> str:
    """writable: the directories that the program may write to."""
    from linmem._wasm.known_files import must_be_private

    os.makedirs(directory, mode=0o700, exist_ok=True)
    must_be_private(directory)
    for host in writable:
        if _is_inside(directory, host) or _is_inside(host, directory):
            raise PermissionError(f"the program may write to this cache by --dir {host}, and what is in it is run as"
                                  " native code (--cache names another directory, :ro forbids writing)")
    return os.path.abspath(directory)


def _is_inside(folder: str, other: str) -> bool:
    """Whether one existing folder is, or is inside of, the other."""
    path = os.path.realpath(folder)
    while not os.path.samefile(path, other):
        parent = os.path.dirname(path)
        if parent == path:
            return False
        path = parent
    return True


def default_directory() -> str | None:
    """The directory of linmem in the user's cache directory; None if the user has none."""
    places = [os.environ.get("XDG_CACHE_HOME", "")]
    if not hasattr(os, "geteuid"):
        places.append(os.environ.get("LOCALAPPDATA", ""))
    home = os.path.expanduser("~")
    if home != "~":
        library = os.path.join(home, "Library", "Caches")       # on macOS
        places.append(library if os.path.isdir(library) else os.path.join(home, ".cache"))
    # The XDG specification says that a relative path is to be ignored.
    return next((os.path.join(place, "linmem") for place in places if os.path.isabs(place)), None)


def bound(directory: str | None) -> None:
    """Remove the oldest entries of the default directory if all have more than `LIMIT` bytes."""
    if directory is not None and directory == default_directory():
        from linmem._wasm.image_cache import Cache

        with contextlib.suppress(OSError):      # the user may read the directory, but not write to it
            Cache(directory).prune(LIMIT)


@contextlib.contextmanager
def announced(text: str) -> Iterator[None]:
    """Show the text on a terminal while the block runs, if it runs for more than `DELAY`."""
    if not sys.stderr.isatty():
        yield
        return
    import threading

    done = threading.Event()

    def show() -> None:
        if done.wait(DELAY):
            return
        try:
            from rich.console import Console
            from rich.live import Live
            from rich.spinner import Spinner
            from rich.text import Text
        except ImportError:
            print(text, file=sys.stderr, flush=True)
            return
        # Console.status() would also take what the process writes to standard output.
        with Live(Spinner("dots", Text(text)), console=Console(stderr=True), transient=True, redirect_stdout=False,
                  redirect_stderr=False):
            done.wait()

    thread = threading.Thread(target=show, name="linmem announcement", daemon=True)

    def end() -> None:
        done.set()
        thread.join()

    thread.start()
    _ends.append(end)
    try:
        yield
    finally:
        end()
        _ends.remove(end)


def end_announcements() -> None:
    """Take the texts off the terminal, because the process ends while a program is compiled."""
    for end in _ends[:]:
        end()
