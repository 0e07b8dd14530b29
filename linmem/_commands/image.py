"""Show files of images, deltas and snapshots, check them, compare images, and apply deltas to images."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import stat
import sys
from typing import Any, TextIO

from linmem._commands.page_map import Pages, draw, show_map
from linmem._commands.parser import EXIT_REFUSED, Refused, file_name, refuse_errors_of
from linmem._commands.text import count, show_size
from linmem._core.arguments import printable
from linmem._core.memory import Image
from linmem._files.delta import Delta
from linmem._files.format import DELTA, KINDS, NO_DIGEST, PACKED, PAGE, SNAPSHOT
from linmem._files.reader import open_file, read
from linmem._wasm.snapshot_file import open_state, read_state

EXIT_DIFFERS = 3

EPILOG = """\
If FILE of --output is a pipe or a device (/dev/stdout, /dev/null), it gets a packed file and is not replaced.
If FILE is the standard output, all other text goes to standard error.

Exit codes: 0 if the command succeeded; 1 if a file cannot be read or written, is damaged, or needs more
memory than there is, with one line for each file; 2 if the command line is wrong; 3 if
`diff --exit-code` found a difference."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands of ``linmem image`` and their options."""
    parser.description, parser.epilog = __doc__, EPILOG
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    for name, text in (("info", "show the headers of files"), ("verify", "check each byte of files")):
        actions.add_parser(name, help=text).add_argument("files", nargs="+", metavar="FILE")

    diff = actions.add_parser("diff", help="which pages of two images differ")
    diff.add_argument("old", metavar="OLD")
    diff.add_argument("new", metavar="NEW")
    diff.add_argument("--output", "-o", type=file_name, metavar="FILE", help="save the delta from OLD to NEW")
    diff.add_argument("--map", action="store_true", help="show which pages differ, also if output is not a terminal")
    diff.add_argument("--picture", type=file_name, metavar="PNG",
                      help="draw which pages differ (the extension may also be .svg or .pdf)")
    diff.add_argument("--exit-code", action="store_true", help=f"exit with {EXIT_DIFFERS} if the images differ")

    apply = actions.add_parser("apply", help="apply deltas to an image, one after the other")
    apply.add_argument("base", metavar="IMAGE")
    apply.add_argument("deltas", nargs="+", metavar="DELTA")
    apply.add_argument("--output", "-o", type=file_name, metavar="FILE", required=True,
                       help="the file for the resulting image")
    apply.add_argument("--packed", action="store_true", help="write a file without holes, which cannot be mapped")

    for action in actions.choices.values():
        action.add_argument("--json", action="store_true", help="print one line of JSON; sizes are in bytes")


def main(args: argparse.Namespace) -> int:
    """Run a parsed ``linmem image`` command; returns the exit code."""
    return {"info": info, "verify": verify, "diff": diff, "apply": apply}[args.action](args)


def say(text: str, to: TextIO | None = None) -> None:
    """Print one line. The encoding of the output need not have all characters of the line, for example of a name."""
    to = to or sys.stdout
    encoding = getattr(to, "encoding", None) or "utf-8"
    print(printable(text).encode(encoding, "backslashreplace").decode(encoding), file=to)


def report_to(output: str | None) -> TextIO:
    """The stream for messages: standard error if `output` is the standard output, else the standard output."""
    # OSError: the file does not exist yet, or the standard output has no descriptor.
    with contextlib.suppress(OSError):
        if output is not None and os.path.samestat(os.stat(output), os.fstat(sys.stdout.fileno())):
            return sys.stderr
    return sys.stdout


# -- info ------------------------------------------------------------------------------------------

def info(args: argparse.Namespace) -> int:
    found = [figures_of(path) for path in args.files]
    if args.json:
        print(json.dumps(found))
        return 0
    for figures in found:
        show(figures)
    return 0


def show(figures: dict[str, Any]) -> None:
    """Print the figures of a file in words."""
    kind = figures["kind"]
    say(f"{figures['path']}: {kind}, {show_size(figures['size'])}"
        + (f" at {figures['offset']}" if figures["offset"] else ""))
    zero = f"; {count(figures['zero_pages'], 'page')} became zero" if kind == "delta" else ""
    say(f"  stored    {show_size(figures['stored'])} in {count(figures['groups'], 'group')},"
        f" {figures['layout']}{zero}")
    on_disk = "" if figures["on_disk"] is None else f", of which {show_size(figures['on_disk'])} on the disk"
    say(f"  file      {show_size(figures['file_size'])}{on_disk}; version {figures['version']}")
    if kind != "delta":
        say(f"  digest    {figures['digest']}")
    if kind == "snapshot":
        say(f"  module    {figures['module']}")
        parts = [f"memory {memory['index']} of {show_size(memory['size'])}" for memory in figures["memories"]]
        say("  holds     " + ", ".join([*parts, count(figures["globals"], "mutable global"), *(
            f"table {table['index']} of {count(table['size'], 'element')}, {table['changed']} changed"
            for table in figures["tables"])]))
        if figures["working_set"]:
            say(f"  first     {show_size(figures['working_set'])}, the working set")
        for text in figures["unseen"]:
            say(f"  unseen    {text}")
    if kind == "delta":
        say(f"  from      {show_size(figures['base_size'])}, digest {figures['base_digest']}")
        say(f"  to        {show_size(figures['size'])}, digest {figures['digest'] or 'unknown'}")


def figures_of(path: str) -> dict[str, Any]:
    with refuse_errors_of(path), open_file(path) as file:
        contents = read(file, path)
        state = read_state(file, contents)[0] if contents.header.kind == SNAPSHOT else None
        blocks = getattr(os.fstat(file.fileno()), "st_blocks", None)
    header = contents.header
    is_delta = header.kind == DELTA
    figures = {
        "path": path,
        "kind": KINDS[header.kind].split()[1],
        "version": header.version,
        "layout": "packed" if header.layout == PACKED else "in place",
        "size": header.size,
        "offset": header.target_offset if is_delta else header.offset,
        "stored": contents.stored,
        "groups": header.count,
        "file_size": contents.file_size,
        "on_disk": None if blocks is None else blocks * 512,
        "digest": None if header.digest == NO_DIGEST else header.digest.hex(),
    }
    if is_delta:
        zero_pages = sum((mentioned & ~stored).bit_count() for _, mentioned, stored, _ in contents.groups())
        figures |= {"zero_pages": zero_pages, "base_size": header.base_size, "base_digest": header.base_digest.hex()}
    if state is not None:
        figures |= {
            "module": state.module,
            "memories": [{"index": memory.index, "size": memory.size} for memory in state.memories],
            "globals": len(state.globals),
            "tables": [{"index": table.index, "size": table.size, "changed": len(table.changed)}
                       for table in state.tables],
            "working_set": sum(size for runs in state.working_set for _, size in runs),
            "unseen": list(state.unseen),
        }
    return figures


# -- verify ------------------------------------------------------------------------------------------

def verify(args: argparse.Namespace) -> int:
    errors = [(path, why_wrong(path)) for path in args.files]
    if args.json:
        print(json.dumps([{"path": path, "error": error, "ok": error is None} for path, error in errors]))
    else:
        for path, error in errors:
            say(f"linmem image: {error}" if error else f"{path}: ok", sys.stderr if error else sys.stdout)
    return EXIT_REFUSED if any(error for _, error in errors) else 0


def why_wrong(path: str) -> str | None:
    try:
        with refuse_errors_of(path):
            with open_file(path) as file:
                kind = read(file, path).header.kind
            if kind == DELTA:
                Delta.open(path)
            elif kind == SNAPSHOT:
                open_state(path, verify=True)
            else:
                Image.open(path, verify=True)
    except Refused as refusal:
        return str(refusal)
    return None


# -- diff ------------------------------------------------------------------------------------------

def diff(args: argparse.Namespace) -> int:
    old, new = open_image(args.old), open_image(args.new)
    with refuse_errors_of(f"{args.old}, {args.new}"):
        delta = old.diff(new)
        pages = Pages(old, new, delta)
    _, _, became_zero, was_zero, changed = pages.totals
    differing = became_zero + was_zero + changed
    figures = {
        "old": {"path": args.old, "size": old.size, "digest": old.digest},
        "new": {"path": args.new, "size": new.size, "digest": new.digest},
        "page_size": PAGE,
        "pages": len(pages),
        "differing": differing,
        "changed": changed,
        "was_zero": was_zero,
        "became_zero": became_zero,
        "same": old.digest == new.digest,
    }
    to = report_to(args.output)
    if args.output is not None:
        with refuse_errors_of(args.output):
            delta.save(args.output)
    if args.picture is not None:
        with refuse_errors_of(args.picture):       # ValueError: matplotlib does not know the format
            draw(args.picture, pages, f"{os.path.basename(args.old)} and {os.path.basename(args.new)}: "
                 f"{differing} of {count(len(pages), 'page')} differ")
    if args.json:
        print(json.dumps(figures), file=to)
    else:
        share = f" ({100 * differing / len(pages):.2g} %)" if differing else ""
        say(f"{args.old}: {show_size(old.size)}", to)
        say(f"{args.new}: {show_size(new.size)}", to)
        say(f"{differing} of {count(len(pages), 'page')} differ{share}: changed {changed}, was zero {was_zero},"
            f" became zero {became_zero}", to)
        if args.map or to.isatty():
            show_map(pages, to, asked=args.map)
    return EXIT_DIFFERS if args.exit_code and not figures["same"] else 0


def open_image(path: str, *, verify: bool = False) -> Image:
    with refuse_errors_of(path):
        return Image.open(path, verify)


# -- apply -----------------------------------------------------------------------------------------

def apply(args: argparse.Namespace) -> int:
    image = open_image(args.base, verify=True)
    for path in args.deltas:
        with refuse_errors_of(path):
            image = image.apply(Delta.open(path))
    to = report_to(args.output)
    with refuse_errors_of(args.output):
        image.save(args.output, packed=args.packed)
    if not args.json:
        say(f"{args.output}: {show_size(image.size)}, digest {image.digest}", to)
    elif stat.S_ISREG(os.stat(args.output).st_mode) and to is sys.stdout:
        print(json.dumps(figures_of(args.output)))
    else:
        print(json.dumps({"path": args.output, "kind": "image", "size": image.size, "offset": image.offset,
                          "digest": image.digest}), file=to)
    return 0
