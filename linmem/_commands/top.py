"""Show the linmem memories of a process, as the operating system lists them.

The kernel names the mappings of linmem, if it was built with CONFIG_ANON_VMA_NAME; `linmem info` says whether it was.
The process is not disturbed, and need not know of it. SIZE is the accessible bytes, RESIDENT the part of them in
physical memory, and BEHIND the inaccessible bytes up to the next memory: the rest of the reservation, the guards, and
memories without an accessible byte. A memory with inaccessible pages in its middle is shown as two. The bytes of images
are shown, too.

Exit code 0 if the process has ended, or after --once; 1 if its mappings cannot be read, or are not named."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from linmem._commands.parser import Parser, Refused
from linmem._commands.text import count, show_size

NAMES = {"[anon:linmem]", "/memfd:linmem (deleted)"}
HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+ *(.*)")
MOST_ROWS = 1000


@dataclass
class Row:
    address: int
    end: int
    resident: int
    behind: int
    is_image: bool


@dataclass
class Mapping:
    start: int
    end: int
    access: str
    name: str
    resident: int = 0


def add_arguments(parser: Parser) -> None:
    parser.description = __doc__
    parser.add_argument("pid", metavar="PID", type=process_id, help="the number of the process")
    parser.add_argument("--once", action="store_true", help="print one table and end")
    parser.add_argument("--interval", metavar="SECONDS", type=interval, default=2.0,
                        help="the time between two tables (default: 2)")


def process_id(text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,9}", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be the number of a process, got {text!r:.40}")
    return int(text)


def interval(text: str) -> float:
    if not re.fullmatch(r"\d{1,5}(\.\d{1,9})?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r:.40}")
    return float(text)


def main(args: Any) -> int:
    rows, inaccessible = look_at(args.pid)
    if not rows and not inaccessible:
        raise Refused(f"process {args.pid} has no mapping of linmem, or its kernel does not name mappings"
                      " (`linmem info` says whether)")
    while True:
        if not args.once and sys.stdout.isatty():
            sys.stdout.write("\x1b[H\x1b[2J")
        print("\n".join(table(rows, inaccessible)), flush=True)
        if args.once:
            return 0
        time.sleep(args.interval)
        try:
            rows, inaccessible = look_at(args.pid)
        except Refused:
            return 0


def look_at(pid: int) -> tuple[list[Row], int]:
    path = f"/proc/{pid}/smaps"
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            return memories(mappings(lines))
    except (FileNotFoundError, ProcessLookupError):
        raise Refused(f"there is no process {pid} with {path}") from None
    except OSError as error:
        raise Refused(f"{path}: {error.strerror or error}") from None


def mappings(lines: Iterable[str]) -> Iterator[Mapping]:
    """The mappings of linmem in the lines of a smaps file."""
    found = None
    for line in lines:
        head = HEAD.match(line)
        if head:
            if found:
                yield found
            start, end, access, name = head.groups()
            found = Mapping(int(start, 16), int(end, 16), access, name) if name.strip() in NAMES else None
        elif found and line.startswith("Rss:"):
            found.resident = int(line.split()[1]) << 10
    if found:
        yield found


def memories(found: Iterable[Mapping]) -> tuple[list[Row], int]:
    """A row for each memory and image, and the inaccessible bytes of all of them."""
    rows: list[Row] = []
    inaccessible = 0
    before = None           # the mapping before, if it ends where the next one starts
    for one in found:
        is_next = before is not None and before.end == one.start
        if one.access.startswith("---"):
            inaccessible += one.end - one.start
            if rows and is_next and not rows[-1].is_image:
                rows[-1].behind += one.end - one.start
        elif is_next and before and not before.access.startswith("---") and not rows[-1].is_image:
            rows[-1].end = one.end          # pages of the same memory with another protection
            rows[-1].resident += one.resident
        else:
            is_image = one.name.startswith("/") and "w" not in one.access and not is_next
            rows.append(Row(one.start, one.end, one.resident, 0, is_image))
        before = one
    return rows, inaccessible


def table(rows: list[Row], inaccessible: int) -> Iterator[str]:
    yield f"{'ADDRESS':>18} {'SIZE':>12} {'RESIDENT':>12} {'BEHIND':>12}"
    for row in sorted(rows, key=lambda row: -row.resident)[:MOST_ROWS]:
        yield (f"{row.address:#18x} {show_size(row.end - row.address):>12} {show_size(row.resident):>12}"
               + (f" {'image':>12}" if row.is_image else f" {show_size(row.behind):>12}"))
    if len(rows) > MOST_ROWS:
        yield f"{'':>18} and {len(rows) - MOST_ROWS} smaller ones"
    ours = [row for row in rows if not row.is_image]
    yield (f"{count(len(ours), 'memory')}: {show_size(sum(row.end - row.address for row in ours))} accessible,"
           f" {show_size(sum(row.resident for row in ours))} resident, {show_size(inaccessible)} inaccessible;"
           f" {count(len(rows) - len(ours), 'image')}")
