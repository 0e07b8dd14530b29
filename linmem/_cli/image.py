"""``linmem image info | verify | diff | apply``: what the files of images and deltas hold. Floor 6."""

from __future__ import annotations

import argparse
import bisect
import contextlib
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from linmem._cli.words import EXIT_REFUSED, Refused, count, file_name, show_size
from linmem._core.arguments import printable
from linmem._core.memory import Image
from linmem._files import atomic_file as _saving
from linmem._files import image_file as _files
from linmem._files.delta import Delta
from linmem.errors import FileFormatError

__all__ = ["add_arguments", "main"]

EXIT_DIFFERS = 3

DESCRIPTION = "Look at the files of images and deltas, check them, compare images, and apply deltas to them."
EPILOG = """\
Where FILE of --output is a pipe or a device (/dev/stdout, /dev/null) it is written to, packed, and is not
replaced. If it is the standard output, what else there is to say goes to standard error.

Exit codes: 0 if it was done and all is well; 1 if a file cannot be read or written, is damaged, or is
larger than there is room for, with one line each that says why; 2 if the command line is wrong; 3 if
`diff --exit-code` found a difference."""

# What a page is, in the order of what is shown where many share a place in the map.
NOTHING, SAME, GONE, NEW, CHANGED = range(5)
CLASSES = ((NOTHING, "zero in both", "dim", "#f3f5f7", ". "), (SAME, "the same", "dim", "#b9c3cd", "▒="),
           (GONE, "became zero", "cyan", "#2a9fd6", "▁-"), (NEW, "was zero", "green", "#3b9c5b", "▆+"),
           (CHANGED, "changed", "bold red", "#d1493f", "█#"))
MAP_COLUMNS, MAP_CELLS = 64, 1024
PICTURE_COLUMNS, PICTURE_CELLS = 256, 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser`, which is that of ``linmem image``, its subcommands."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    # Written out for each: a parent's own options do not show in the help of its subcommands.
    json = "print it as one line of JSON; sizes are bytes"

    info = actions.add_parser("info", help="what files hold, by their own word", allow_abbrev=False)
    info.add_argument("files", nargs="+", metavar="FILE")
    info.add_argument("--json", action="store_true", help=json)

    verify = actions.add_parser("verify", help="check every byte of files", allow_abbrev=False)
    verify.add_argument("files", nargs="+", metavar="FILE")
    verify.add_argument("--json", action="store_true", help=json)

    diff = actions.add_parser("diff", help="which pages of two images differ", allow_abbrev=False)
    diff.add_argument("old", metavar="OLD")
    diff.add_argument("new", metavar="NEW")
    diff.add_argument("--output", "-o", type=file_name, metavar="FILE",
                      help="save the delta that makes NEW of OLD")
    diff.add_argument("--map", action="store_true", help="show which pages differ, on a terminal or not")
    diff.add_argument("--picture", type=file_name, metavar="PNG",
                      help="draw which pages differ (or an SVG or PDF, by the name)")
    diff.add_argument("--exit-code", action="store_true", help=f"exit with {EXIT_DIFFERS} if they differ")
    diff.add_argument("--json", action="store_true", help=json)

    apply = actions.add_parser("apply", help="apply deltas to an image, one after the other", allow_abbrev=False)
    apply.add_argument("base", metavar="IMAGE")
    apply.add_argument("deltas", nargs="+", metavar="DELTA")
    apply.add_argument("--output", "-o", type=file_name, metavar="FILE", required=True,
                       help="where the image that results goes")
    apply.add_argument("--packed", action="store_true", help="write it without holes, as long as what it holds")
    apply.add_argument("--json", action="store_true", help=json)


def main(args: argparse.Namespace) -> int:
    """Run a parsed ``linmem image`` command; returns the exit code."""
    actions = {"info": info, "verify": verify, "diff": diff, "apply": apply}
    return actions[args.action](args)


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """What fails in the block is a line about the file `name`."""
    try:
        yield
    except FileFormatError as error:        # which names it
        raise Refused(str(error)) from None
    except OSError as error:
        raise Refused(f"{os.fsdecode(error.filename or name) or repr(name)}: {error.strerror or error}") from None
    except (MemoryError, OverflowError, ValueError) as error:
        raise Refused(f"{name}: {error or 'there is not enough memory for it'}") from None


def say(text: str, to: TextIO | None = None) -> None:
    """Print one line, which may have a file's name in it: that need not be text."""
    to = to or sys.stdout
    encoding = getattr(to, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=to)


def report_to(output: str | None) -> TextIO:
    """Where the words go: not into a file that is written to the standard output."""
    try:
        is_output = output is not None and os.path.samestat(os.stat(output), os.fstat(sys.stdout.fileno()))
    except OSError:         # there is no such file yet, or no descriptor behind the standard output
        is_output = False
    return sys.stderr if is_output else sys.stdout


def print_json(figures: Any, to: TextIO | None = None) -> None:
    import json

    print(json.dumps(figures), file=to)


# -- info ------------------------------------------------------------------------------------------

def info(args: argparse.Namespace) -> int:
    found = [figures_of(path) for path in args.files]
    if args.json:
        print_json(found)
        return 0
    for figures in found:
        kind = figures["kind"]
        say(f"{figures['path']}: {kind}, {show_size(figures['size'])}"
            + (f" at {figures['offset']}" if figures["offset"] else ""))
        zero = f"; {count(figures['zero_pages'], 'page')} became zero" if kind == "delta" else ""
        say(f"  stored    {show_size(figures['stored'])} in {count(figures['groups'], 'group')},"
            f" {figures['layout']}{zero}")
        on_disk = "" if figures["on_disk"] is None else f", of which {show_size(figures['on_disk'])} on the disk"
        say(f"  file      {show_size(figures['file_size'])}{on_disk}; version {figures['version']}")
        if kind == "image":
            say(f"  digest    {figures['digest']}")
        else:
            say(f"  from      {show_size(figures['base_size'])}, digest {figures['base_digest']}")
            say(f"  to        {show_size(figures['size'])}, digest {figures['digest'] or 'unknown'}")
    return 0


def figures_of(path: str) -> dict[str, Any]:
    with about(path), _files.open_file(path) as file:
        contents = _files.read(file, path)
        blocks = getattr(os.fstat(file.fileno()), "st_blocks", None)
    is_delta = contents.kind == _files.DELTA
    figures = {
        "path": path,
        "kind": "delta" if is_delta else "image",
        "version": contents.version,
        "layout": "packed" if contents.layout == _files.PACKED else "in place",
        "size": contents.size,
        "offset": contents.offset,
        "stored": contents.stored,
        "groups": contents.count,
        "file_size": contents.file_size,
        "on_disk": None if blocks is None else blocks * 512,
        "digest": None if contents.digest == _files.NO_DIGEST else contents.digest.hex(),
    }
    if is_delta:
        figures["zero_pages"] = sum((mentioned & ~stored).bit_count()
                                    for _, mentioned, stored, _, _ in contents.groups())
        figures["offset"] = contents.target_offset
        figures["base_size"] = contents.base_size
        figures["base_digest"] = contents.base_digest.hex()
    return figures


# -- verify ------------------------------------------------------------------------------------------

def verify(args: argparse.Namespace) -> int:
    results = [{"path": path, "error": why_wrong(path)} for path in args.files]
    wrong = [result for result in results if result["error"] is not None]
    if args.json:
        print_json([{**result, "ok": result["error"] is None} for result in results])
    else:
        for result in results:
            if result["error"] is None:
                say(f"{result['path']}: ok")
            else:
                say(f"linmem image: {result['error']}", sys.stderr)
    return EXIT_REFUSED if wrong else 0


def why_wrong(path: str) -> str | None:
    try:
        with about(path):
            with _files.open_file(path) as file:
                kind = _files.read(file, path).kind
            if kind == _files.DELTA:
                Delta.open(path)
            else:
                Image.open(path, verify=True)
    except Refused as refusal:
        return str(refusal)
    return None


# -- diff ------------------------------------------------------------------------------------------

def diff(args: argparse.Namespace) -> int:
    old, new = open_image(args.old), open_image(args.new)
    with about(f"{args.old}, {args.new}"):
        delta = old.diff(new)
        pages = Pages(old, new, delta)
    differing = pages.count(GONE) + pages.count(NEW) + pages.count(CHANGED)
    figures = {
        "old": {"path": args.old, "size": old.size, "digest": old.digest},
        "new": {"path": args.new, "size": new.size, "digest": new.digest},
        "page_size": _files.PAGE,
        "pages": len(pages),
        "differing": differing,
        "changed": pages.count(CHANGED),
        "was_zero": pages.count(NEW),
        "became_zero": pages.count(GONE),
        "same": old.digest == new.digest,
    }
    to = report_to(args.output)
    if args.output is not None:
        with about(args.output):
            delta.save(args.output)
    if args.picture is not None:
        draw(args.picture, pages, f"{os.path.basename(args.old)} and {os.path.basename(args.new)}: "
             f"{differing} of {count(len(pages), 'page')} differ")
    if args.json:
        print_json(figures, to)
    else:
        share = f" ({100 * differing / len(pages):.2g} %)" if differing else ""
        say(f"{args.old}: {show_size(old.size)}", to)
        say(f"{args.new}: {show_size(new.size)}", to)
        say(f"{differing} of {count(len(pages), 'page')} differ{share}: changed {figures['changed']},"
            f" was zero {figures['was_zero']}, became zero {figures['became_zero']}", to)
        if args.map or to.isatty():
            show_map(pages, to, asked=args.map)
    return EXIT_DIFFERS if args.exit_code and not figures["same"] else 0


def open_image(path: str, *, verify: bool = False) -> Image:
    with about(path):
        return Image.open(path, verify)


class Pages:
    """The class of each page of two images, in spans of one class: as many as the images' runs make."""

    def __init__(self, old: Image, new: Image, delta: Delta) -> None:
        self.n = _files.round_up(max(old.offset + old.size, new.offset + new.size), _files.PAGE) // _files.PAGE
        self.begins = [0]
        self.classes = [NOTHING]
        self.totals = dict.fromkeys(range(len(CLASSES)), 0)
        was = there = differs = at = 0
        for page, kind, step in sorted([*edges(0, old.runs()), *edges(1, new.runs()),
                                        *edges(2, delta.ranges + delta.zeros), (self.n, 0, 0)]):
            if page > at:
                if not (was and there):
                    self.add(at, page, NEW if there else GONE if was else NOTHING)
                elif not differs:
                    self.add(at, page, SAME)
                else:       # a delta speaks of the host's pages, which may be larger
                    for each in range(at, page):
                        self.add(each, each + 1, CHANGED if page_of(old, each) != page_of(new, each) else SAME)
                at = page
            was += step * (kind == 0)
            there += step * (kind == 1)
            differs += step * (kind == 2)

    def add(self, first: int, end: int, kind: int) -> None:
        self.totals[kind] += max(min(end, self.n) - first, 0)
        if self.classes[-1] != kind:
            self.begins.append(first)
            self.classes.append(kind)

    def count(self, kind: int) -> int:
        return self.totals[kind]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, part: slice) -> list[int]:
        """The classes that a slice of the pages has, each once for each span."""
        first, end, _ = part.indices(self.n)
        return self.classes[bisect.bisect_right(self.begins, first) - 1:bisect.bisect_left(self.begins, end)]


def edges(kind: int, runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(page, kind, 1 or -1) where each run begins and ends."""
    for start, size in runs:
        yield start // _files.PAGE, kind, 1
        yield _files.round_up(start + size, _files.PAGE) // _files.PAGE, kind, -1


def page_of(image: Image, page: int) -> bytes:
    low, high = (min(max(at * _files.PAGE - image.offset, 0), image.size) for at in (page, page + 1))
    # What an image has not is zero, before it and after it.
    missing = max(image.offset - page * _files.PAGE, 0)
    with memoryview(image) as view:
        return (bytes(missing) + view[low:high]).ljust(_files.PAGE, b"\0")


def show_map(pages: Pages, to: TextIO, *, asked: bool) -> None:
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        if asked:
            raise Refused("--map needs rich: pip install 'linmem[image]'") from None
        return
    console = Console(file=to, highlight=False, soft_wrap=True)
    glyph = 0 if console.encoding.lower().startswith("utf") else 1
    columns, cells, per_cell = grid(pages, MAP_COLUMNS, MAP_CELLS)
    console.print(Text(f"each mark is {show_size(per_cell * _files.PAGE)}", "dim"))
    for row in range(0, len(cells), columns):
        line = Text(f"{show_offset(row * per_cell * _files.PAGE):>10} ", "dim")
        for cell in cells[row:row + columns]:
            line.append(CLASSES[cell][4][glyph], CLASSES[cell][2])
        console.print(line)
    legend = Text("           ")
    for _, name, style, _, glyphs in CLASSES:
        legend.append(glyphs[glyph], style)
        legend.append(f" {name}   ", "dim")
    console.print(legend)


def grid(pages: Pages, columns: int, most: int) -> tuple[int, bytearray, int]:
    """(columns, cells, pages in each cell): a cell shows the class of its pages that says most."""
    per_cell = 1
    while len(pages) > per_cell * most:
        per_cell *= 2
    return columns, bytearray(max(pages[at:at + per_cell]) for at in range(0, len(pages), per_cell)), per_cell


def show_offset(offset: int) -> str:
    return show_size(offset) if offset else "0"


def draw(path: str, pages: Pages, title: str) -> None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise Refused(f"--picture needs matplotlib: pip install 'linmem[image]' ({error})") from None
    columns, cells, per_cell = grid(pages, PICTURE_COLUMNS, PICTURE_CELLS)
    rows = [list(cells[at:at + columns]) for at in range(0, len(cells), columns)]
    if rows:
        # A last row that is short is filled with what no class is, which is drawn as nothing.
        rows[-1] += [float("nan")] * (columns - len(rows[-1]))      # type: ignore[list-item]
    figure = Figure(figsize=(9, 2.2 + 5 * min(len(rows), 256) / 256), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(rows or [[float("nan")]], cmap=ListedColormap([color for _, _, _, color, _ in CLASSES]),
                vmin=-0.5, vmax=len(CLASSES) - 0.5, interpolation="nearest", aspect="auto")
    step = max(1, len(rows) // 8)
    axes.set_yticks(range(0, len(rows), step),
                    [show_offset(row * columns * per_cell * _files.PAGE) for row in range(0, len(rows), step)])
    axes.set_xticks([])
    cell = per_cell * _files.PAGE
    axes.set_xlabel(f"{show_size(columns * cell)} in a row, {show_size(cell)} in a cell")
    axes.set_title(printable(title), loc="left", fontsize=10, parse_math=False)
    figure.legend(handles=[Patch(facecolor=color, edgecolor="#8894a0", label=name) for _, name, _, color, _ in CLASSES],
                  loc="outside lower left", ncols=len(CLASSES), frameon=False, fontsize=9)
    with about(path):       # ValueError: a format that matplotlib does not know
        _saving.write_figure(figure, path, dpi=130)


# -- apply -----------------------------------------------------------------------------------------

def apply(args: argparse.Namespace) -> int:
    image = open_image(args.base, verify=True)
    for path in args.deltas:
        with about(path):
            image = image.apply(Delta.open(path))
    to = report_to(args.output)
    with about(args.output):
        image.save(args.output, packed=args.packed)
    if not args.json:
        say(f"{args.output}: {show_size(image.size)}, digest {image.digest}", to)
    elif stat.S_ISREG(os.stat(args.output).st_mode) and to is sys.stdout:
        print_json(figures_of(args.output))
    else:
        print_json({"path": args.output, "kind": "image", "size": image.size, "offset": image.offset,
                    "digest": image.digest}, to)
    return 0
