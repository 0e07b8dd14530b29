"""The command ``linmem bench``, also ``python -m linmem.bench``. Both need the extra ``linmem[bench]``."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys

from linmem._commands.parser import file_name
from linmem._core.arguments import printable

__all__ = ["add_arguments", "main"]

SUITES = ("core", "wasm", "reset", "threads", "image", "soak-pool", "fair", "travel",
          "component", "hooks", "share")   # see module_of()
QUICK_ROUNDS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that `main` reads."""
    parser.add_argument("--suite", choices=SUITES, metavar="SUITE",
                        help=f"the suite to measure: {', '.join(SUITES)} (default: core)")
    parser.add_argument("--from", type=file_name, metavar="FILE", dest="source",
                        help="measure nothing: read the figures from a file that --json wrote")
    parser.add_argument("--quick", action="store_true", help="short runs and few rounds, for a rough estimate")
    parser.add_argument("--rounds", type=at_least_two, metavar="N",
                        help=f"interleaved rounds (default: the suite's own, 25 or 40; with --quick {QUICK_ROUNDS});"
                             " rows with long runs take half, rows with tight goals two or three times as many")
    parser.add_argument("--json", type=file_name, metavar="FILE", help="write all figures and the facts of the machine")
    parser.add_argument("--picture", type=file_name, metavar="FILE", help="draw the ratios (.png, .svg, .pdf)")
    parser.add_argument("--markdown", type=file_name, metavar="FILE",
                        help="write the tables; in a file that has the suite's marks, between them")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")


def at_least_two(text: str) -> int:
    rounds = int(text)
    if rounds < 2:
        raise argparse.ArgumentTypeError(f"must be >= 2 (a spread needs two figures), got {rounds}")
    return rounds


def main(args: argparse.Namespace) -> int:
    """Measure a suite, print the tables, write the files.

    Returns
    -------
    int
        0 after a measurement, even if a goal is missed. 1 if a library is not installed or a file cannot be written;
        with ``--check`` also if a goal is missed or could not be measured.
    """
    needed = ["rich"] + (["matplotlib"] if args.picture else [])
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(f"linmem bench needs {' and '.join(missing)}: pip install 'linmem[bench]'", file=sys.stderr)
        return 1

    from linmem.bench import report

    if args.source:
        given = [f"--{name}" for name in ("suite", "quick", "rounds", "json") if getattr(args, name)]
        if given:
            print(f"linmem bench: --from reads a file, and takes no {' and no '.join(given)}", file=sys.stderr)
            return 1
        try:
            results, about = report.read_json(args.source)
        except (OSError, ValueError) as error:
            complain(args.source, error)
            return 1
    else:
        results, about = run(args)
    report.show(results, about)
    unwritten = 0
    for path, write in ((args.json, report.write_json), (args.picture, report.draw),
                        (args.markdown, report.write_markdown)):
        try:
            if path is not None:
                write(path, results, about)
        except (OSError, ValueError) as error:      # matplotlib raises ValueError for an unknown format
            unwritten += 1
            complain(path, error)
    failed = any(row.goal is not None and not row.holds for result in results for row in result.rows)
    return 1 if unwritten or (args.check and failed) else 0


def complain(path: str, error: Exception) -> None:
    print(printable(f"linmem bench: {path}: {getattr(error, 'strerror', None) or error}"), file=sys.stderr)


def run(args: argparse.Namespace):
    """Measure a suite. Returns its results, and what a report says about them."""
    from linmem.bench import harness, report

    name = args.suite or SUITES[0]
    suite = module_of(name)
    groups = suite.groups(args.quick)
    rounds = run_ns = 0
    if any(group.contenders for group in groups):
        rounds = args.rounds or (QUICK_ROUNDS if args.quick else suite.ROUNDS)
        run_ns = suite.QUICK_RUN_NS if args.quick else suite.RUN_NS
    results = []
    with report.progress() as advance:
        total = sum(shared(rounds, group) for group in groups)
        for group in groups:
            if group.count is not None:
                results.append(harness.Result(group, [], group.count()))
                advance(group.operation, total)
                continue
            series = harness.measure(group, shared(rounds, group), run_ns,
                                     lambda group=group: advance(group.operation, total))
            results.append(harness.Result(group, series, list(harness.compare(group, series))))
    if hasattr(suite, "conclude"):
        results = suite.conclude(results)
    return results, report.About(name, report.machine(), rounds, args.quick)


def module_of(suite: str):
    """Return the module of a suite. The name of the module has "_" where the name of the suite has "-"."""
    return importlib.import_module(f"linmem.bench.{suite.replace('-', '_')}")


def shared(rounds: int, group) -> int:
    """The number of rounds of a group, of the requested number."""
    return 1 if group.count is not None else max(2, round(rounds * group.share))
