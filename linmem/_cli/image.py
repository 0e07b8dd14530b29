"""``linmem image info | verify | diff | apply``: what the files of images and deltas hold. Floor 6."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from typing import Any

from linmem import _files
from linmem._cli.words import EXIT_REFUSED, Refused, count, show_size
from linmem._delta import Delta
from linmem._image import Image
from linmem.errors import FileFormatError

__all__ = ["add_arguments", "main"]

EXIT_DIFFERS = 3

DESCRIPTION = "Look at the files of images and deltas, check them, compare images, and apply deltas to them."
EPILOG = """\
Exit codes: 0 if it was done and all is well; 1 if a file cannot be read or is damaged, with one
line each that says why; 2 if the command line is wrong; 3 if `diff --exit-code` found a difference."""

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
    diff.add_argument("--output", "-o", metavar="FILE", help="save the delta that makes NEW of OLD")
    diff.add_argument("--map", action="store_true", help="show which pages differ, on a terminal or not")
    diff.add_argument("--picture", metavar="PNG", help="draw which pages differ (or an SVG or PDF, by the name)")
    diff.add_argument("--exit-code", action="store_true", help=f"exit with {EXIT_DIFFERS} if they differ")
    diff.add_argument("--json", action="store_true", help=json)

    apply = actions.add_parser("apply", help="apply deltas to an image, one after the other", allow_abbrev=False)
    apply.add_argument("base", metavar="IMAGE")
    apply.add_argument("deltas", nargs="+", metavar="DELTA")
    apply.add_argument("--output", "-o", metavar="FILE", required=True, help="where the image that results goes")
    apply.add_argument("--packed", action="store_true", help="write it without holes, as long as what it holds")
    apply.add_argument("--json", action="store_true", help=json)


def main(args: argparse.Namespace) -> int:
    """Run a parsed ``linmem image`` command; returns the exit code."""
    actions = {"info": info, "verify": verify, "diff": diff, "apply": apply}
    try:
        return actions[args.action](args)
    except FileFormatError as error:
        raise Refused(str(error)) from None
    except OSError as error:
        if error.filename is None:
            raise
        raise Refused(f"{error.filename}: {error.strerror}") from None


def print_json(figures: Any) -> None:
    import json

    print(json.dumps(figures))


# -- info ------------------------------------------------------------------------------------------

def info(args: argparse.Namespace) -> int:
    found = [figures_of(path) for path in args.files]
    if args.json:
        print_json(found)
        return 0
    for figures in found:
        kind = figures["kind"]
        print(f"{figures['path']}: {kind}, {show_size(figures['size'])}"
              + (f" at {figures['offset']}" if figures["offset"] else ""))
        zero = f"; {count(figures['zero_pages'], 'page')} became zero" if kind == "delta" else ""
        print(f"  stored    {show_size(figures['stored'])} in {count(figures['groups'], 'group')},"
              f" {figures['layout']}{zero}")
        on_disk = "" if figures["on_disk"] is None else f", of which {show_size(figures['on_disk'])} on the disk"
        print(f"  file      {show_size(figures['file_size'])}{on_disk}; version {figures['version']}")
        if kind == "image":
            print(f"  digest    {figures['digest']}")
        else:
            print(f"  from      {show_size(figures['base_size'])}, digest {figures['base_digest']}")
            print(f"  to        {show_size(figures['size'])}, digest {figures['digest'] or 'unknown'}")
    return 0


def figures_of(path: str) -> dict[str, Any]:
    with _files.open_file(path) as file:
        contents = _files.read(file, path)
        blocks = getattr(os.fstat(file.fileno()), "st_blocks", None)
    is_delta = contents.kind == _files.DELTA
    figures = {
        "path": path,
        "kind": "delta" if is_delta else "image",
        "version": _files.VERSION,
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
                print(f"{result['path']}: ok")
            else:
                print(f"linmem image: {result['error']}", file=sys.stderr)
    return EXIT_REFUSED if wrong else 0


def why_wrong(path: str) -> str | None:
    try:
        with _files.open_file(path) as file:
            kind = _files.read(file, path).kind
        if kind == _files.DELTA:
            Delta.open(path)
        else:
            Image.open(path, verify=True)
    except FileFormatError as error:
        return str(error)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


# -- diff ------------------------------------------------------------------------------------------

def diff(args: argparse.Namespace) -> int:
    old, new = Image.open(args.old), Image.open(args.new)
    try:
        delta = old.diff(new)
    except ValueError as error:
        raise Refused(f"{args.old}, {args.new}: {error}") from None
    pages = classes_of(old, new, delta)
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
    if args.output is not None:
        delta.save(args.output)
    if args.picture is not None:
        draw(args.picture, pages, f"{os.path.basename(args.old)} and {os.path.basename(args.new)}: "
             f"{differing} of {count(len(pages), 'page')} differ")
    if args.json:
        print_json(figures)
    else:
        share = f" ({100 * differing / len(pages):.2g} %)" if differing else ""
        print(f"{args.old}: {show_size(old.size)}\n{args.new}: {show_size(new.size)}")
        print(f"{differing} of {count(len(pages), 'page')} differ{share}: changed {figures['changed']},"
              f" was zero {figures['was_zero']}, became zero {figures['became_zero']}")
        if args.map or sys.stdout.isatty():
            show_map(pages, asked=args.map)
    return EXIT_DIFFERS if args.exit_code and not figures["same"] else 0


def classes_of(old: Image, new: Image, delta: Delta) -> bytearray:
    """One of the classes for each page of both images."""
    pages = bytearray(_files.round_up(max(old.offset + old.size, new.offset + new.size), _files.PAGE) // _files.PAGE)
    was, there, differs = bytearray(len(pages)), bytearray(len(pages)), bytearray(len(pages))
    mark(was, old.runs())
    mark(there, new.runs())
    mark(differs, delta.ranges + delta.zeros)
    for page, (before, after, changed) in enumerate(zip(was, there, differs, strict=True)):
        if before != after:
            pages[page] = NEW if after else GONE
        elif before:
            # A delta speaks of the host's pages, which may be larger.
            pages[page] = CHANGED if changed and page_of(old, page) != page_of(new, page) else SAME
    return pages


def page_of(image: Image, page: int) -> bytes:
    low, high = (min(max(at * _files.PAGE - image.offset, 0), image.size) for at in (page, page + 1))
    # What an image has not is zero, before it and after it.
    missing = max(image.offset - page * _files.PAGE, 0)
    with memoryview(image) as view:
        return (bytes(missing) + view[low:high]).ljust(_files.PAGE, b"\0")


def mark(marks: bytearray, runs: Iterable[tuple[int, int]]) -> None:
    for start, size in runs:
        first, last = start // _files.PAGE, _files.round_up(start + size, _files.PAGE) // _files.PAGE
        marks[first:last] = b"\1" * (last - first)


def show_map(pages: bytearray, *, asked: bool) -> None:
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        if asked:
            raise Refused("--map needs rich: pip install 'linmem[image]'") from None
        return
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
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


def grid(pages: bytearray, columns: int, most: int) -> tuple[int, bytearray, int]:
    """(columns, cells, pages in each cell): a cell shows the class of its pages that says most."""
    per_cell = 1
    while len(pages) > per_cell * most:
        per_cell *= 2
    return columns, bytearray(max(pages[at:at + per_cell]) for at in range(0, len(pages), per_cell)), per_cell


def show_offset(offset: int) -> str:
    return show_size(offset) if offset else "0"


def draw(path: str, pages: bytearray, title: str) -> None:
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
    axes.set_title(title, loc="left", fontsize=10)
    figure.legend(handles=[Patch(facecolor=color, edgecolor="#8894a0", label=name) for _, name, _, color, _ in CLASSES],
                  loc="outside lower left", ncols=len(CLASSES), frameon=False, fontsize=9)
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:         # a format that matplotlib does not know
        raise Refused(f"--picture {path}: {error}") from None


# -- apply -----------------------------------------------------------------------------------------

def apply(args: argparse.Namespace) -> int:
    image = Image.open(args.base, verify=True)
    for path in args.deltas:
        delta = Delta.open(path)
        try:
            image = image.apply(delta)
        except ValueError as error:
            raise Refused(f"{path}: {error}") from None
        if delta.target is not None and image.digest != delta.target:
            raise Refused(f"{path}: led to the digest {image.digest}, and was to lead to {delta.target}")
    image.save(args.output, packed=args.packed)
    if args.json:
        print_json(figures_of(args.output))
    else:
        print(f"{args.output}: {show_size(image.size)}, digest {image.digest}")
    return 0
