"""Show the linmem memories of a process, as the operating system lists them.

The kernel names the mappings of linmem, if it was built with CONFIG_ANON_VMA_NAME; `linmem info` says whether it was.
The process is not disturbed, and need not know of it. SIZE is the accessible bytes, RESIDENT the part of them in
physical memory, and BEHIND the inaccessible bytes up to the next memory: the rest of the reservation, the guards, and
memories without an accessible byte. A memory with inaccessible pages in its middle is shown as two. The bytes of images
are shown, too.

If the process has called linmem.metrics.publish(), then GROWTHS and NAME of its memories and the figures of its pools
are shown, and the mappings need no names.

Exit code 0 if the process has ended, or after --once; 1 if its mappings cannot be read, or are not named."""

from __future__ import annotations

import argparse
import bisect
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from linmem._commands.parser import Parser, Refused
from linmem._commands.text import count, show_size
from linmem._core.arguments import printable
from linmem._core.publication import read_published

NAMES = {"[anon:linmem]", "/memfd:linmem (deleted)"}
HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+ *(.*)")
MOST_ROWS = 1000
MOST_POOLS = 100
ADDRESSES = 1 << 64
POOL_FIGURES = ("live", "warm", "cold", "slots", "hits_warm", "hits_cold", "misses", "resident", "reserved")


@dataclass
class Row:
    address: int
    end: int
    resident: int
    behind: int
    is_image: bool


@dataclass
class Published:
    """What the process says about itself. It may have said anything, so all numbers are below 2**64."""

    memories: dict[int, tuple[int, str]]        # the base: growths and name
    ranges: list[tuple[int, int]]               # of the reservations, by address; they do not overlap
    pools: list[tuple[str, dict[str, int]]]
    age: float                                  # seconds


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
    if not 0.01 <= float(text) <= 86400:        # 0 would take a whole processor
        raise argparse.ArgumentTypeError(f"must be 0.01 to 86400 seconds, got {text}")
    return float(text)


def main(args: Any) -> int:
    rows, inaccessible, published = look_at(args.pid)
    if not rows and not inaccessible and not published:
        raise Refused(f"process {args.pid} has no mapping of linmem, or its kernel does not name mappings"
                      " (`linmem info` says whether) and the process does not publish its memories")
    while True:
        if not args.once and sys.stdout.isatty():
            sys.stdout.write("\x1b[H\x1b[2J")
        print("\n".join(table(rows, inaccessible, published)), flush=True)
        if args.once:
            return 0
        time.sleep(args.interval)
        try:
            rows, inaccessible, published = look_at(args.pid)
        except Refused:
            return 0


def look_at(pid: int) -> tuple[list[Row], int, Published | None]:
    path = f"/proc/{pid}/smaps"
    published = check_published(read_published(pid))
    try:
        with open(path, encoding="utf-8", errors="replace") as lines:
            first = lines.readline()
            if not first:       # a process that has ended, and whose parent has not noticed yet
                raise Refused(f"{path}: the process has ended, or belongs to the kernel")
            found = mappings(chain([first], lines), published.ranges if published else [])
            return *memories(found), published
    except (FileNotFoundError, ProcessLookupError):
        raise Refused(f"there is no process {pid} with {path}") from None
    except OSError as error:
        raise Refused(f"{path}: {error.strerror or error}") from None


def check_published(figures: Any) -> Published | None:
    """None: the process publishes nothing, or not what linmem publishes."""
    try:
        ranges: list[tuple[int, int]] = []
        for start, end in sorted((number(one["start"]), number(one["end"])) for one in figures["memories"]):
            if start < end and (not ranges or ranges[-1][1] <= start):
                ranges.append((start, end))
        pools = [(name_of(one), {key: number(one[key]) for key in POOL_FIGURES}) for one in figures["pools"]]
        return Published({number(one["base"]): (number(one["growths"]), name_of(one)) for one in figures["memories"]},
                         ranges, pools[:MOST_POOLS], min(max(0.0, time.time() - float(figures["time"])), 1e9))
    except (LookupError, TypeError, ValueError, OverflowError):
        return None


def number(value: object) -> int:
    if type(value) is not int or not 0 <= value < ADDRESSES:
        raise ValueError
    return value


def name_of(one: dict[str, Any]) -> str:
    name = one["name"]
    return "" if name is None else printable(str(name)[:100])


def mappings(lines: Iterable[str], ranges: Sequence[tuple[int, int]] = ()) -> Iterator[Mapping]:
    """The mappings of linmem in the lines of a smaps file: those with its name, and the parts of others that lie in the
    ranges, which are in order."""
    found: list[Mapping] = []
    starts = [start for start, _ in ranges]
    for line in lines:
        head = HEAD.match(line)
        if head:
            yield from found
            start, end = int(head[1], 16), int(head[2], 16)
            access, name = head[3], head[4].strip()
            found = []
            if name in NAMES:
                found = [Mapping(start, end, access, name)]
            elif ranges and not name:
                at = max(bisect.bisect_right(starts, start) - 1, 0)
                while at < len(ranges) and ranges[at][0] < end:
                    if start < ranges[at][1]:
                        found.append(Mapping(max(start, ranges[at][0]), min(end, ranges[at][1]), access, name))
                    at += 1
        elif found and line.startswith("Rss:"):
            found[0].resident = int(line.split()[1]) << 10
    yield from found


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


def table(rows: list[Row], inaccessible: int, published: Published | None = None) -> Iterator[str]:
    more = f" {'GROWTHS':>9} NAME" if published else ""
    yield f"{'ADDRESS':>18} {'SIZE':>12} {'RESIDENT':>12} {'BEHIND':>12}{more}"
    for row in sorted(rows, key=lambda row: -row.resident)[:MOST_ROWS]:
        line = (f"{row.address:#18x} {show_size(row.end - row.address):>12} {show_size(row.resident):>12}"
                + (f" {'image':>12}" if row.is_image else f" {show_size(row.behind):>12}"))
        if published and row.address in published.memories:
            growths, name = published.memories[row.address]
            line += f" {growths:>9} {name}".rstrip()
        yield line
    if len(rows) > MOST_ROWS:
        yield f"{'':>18} and {len(rows) - MOST_ROWS} smaller ones"
    ours = [row for row in rows if not row.is_image]
    yield (f"{count(len(ours), 'memory')}: {show_size(sum(row.end - row.address for row in ours))} accessible,"
           f" {show_size(sum(row.resident for row in ours))} resident, {show_size(inaccessible)} inaccessible;"
           f" {count(len(rows) - len(ours), 'image')}")
    if published:
        for name, pool in published.pools:
            yield (f"pool {name}: {pool['live']} live, {pool['warm']} warm, {pool['cold']} cold of"
                   f" {pool['slots']} slots; {pool['hits_warm'] + pool['hits_cold']} hits, {pool['misses']} misses;"
                   f" {show_size(pool['resident'])} kept, {show_size(pool['reserved'])} reserved")
        yield f"published {published.age:.1f} s ago"
