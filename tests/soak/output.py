"""The report of a soak: tables, one line, a progress bar."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator

from soak.checks import MIB
from soak.run import PHASES


def in_words(name: str, value: int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / MIB:.1f} MiB" if name in ("resident", "reserved") else f"{value}"


def tables(figures: dict) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Yield title, headings and lines of each table."""
    yield "operations", ("kind", "times"), [(name.replace("_", " "), f"{n:,}")
                                            for name, n in figures["operations"].items()]
    yield "in all", ("what", "times"), [(name.replace("_", " "), f"{figures[name]:,}") for name in (
        "operations_in_all", "faults_injected", "faults_raised_and_survived", "traps", "forks", "refused_by_a_bound",
        "damaged_files_refused")]
    rests = figures["at_rest"]
    if rests:
        quarter = rests[min(PHASES // 4, len(rests)) - 1]
        yield ("held by the process (at rest: all threads idle, nothing live)",
               ("what", "first rest", "a quarter", "peak", "end"),
               [(name, *(in_words(name, value) for value in (rests[0][name], quarter[name], figures["peak"].get(name),
                                                            rests[-1][name]))) for name in rests[0]])


def in_short(figures: dict) -> str:
    rests, peak = figures["at_rest"], figures["peak"]
    held = [f"{name} {in_words(name, rests[0][name])}, at most {in_words(name, peak[name])}, at the end"
            f" {in_words(name, rests[-1][name])}" for name in ("resident", "mappings", "descriptors") if name in peak]
    return "; ".join([f"{figures['operations_in_all']:,} operations, {figures['faults_injected']:,} faults injected,"
                      f" {figures['traps']:,} traps, {figures['forks']:,} forks in {figures['seconds']:.0f} s", *held,
                      f"seed {figures['seed']}"])


def show_tables(figures: dict) -> None:
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.table import Table

        for title, headings, lines in tables(figures):
            table = Table(title=title, title_justify="left")
            for i, heading in enumerate(headings):
                table.add_column(heading, justify="right" if i else "left")
            for line in lines:
                table.add_row(*line)
            Console().print(table)
        return
    for title, headings, lines in tables(figures):
        print(f"\n{title}")
        widths = [max(len(line[i]) for line in (headings, *lines)) for i in range(len(headings))]
        for line in (headings, *lines):
            print("  ".join(text.rjust(width) if i else text.ljust(width)
                            for i, (text, width) in enumerate(zip(line, widths, strict=True))).rstrip())


@contextlib.contextmanager
def progress() -> Iterator[Callable[[float, str], None]]:
    """Yield show(share, text). Draws a bar if rich can, else prints one line for each phase."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
                       console=Console(stderr=True), transient=True, auto_refresh=False)
        with bar:
            task = bar.add_task("starting", total=1.0)
            yield lambda share, text: bar.update(task, description=text, completed=share, refresh=True)
        return
    said = ""

    def line(share: float, text: str) -> None:
        nonlocal said
        if text != said:
            said = text
            print(f"soak: {text}, {share:.0%}", file=sys.stderr, flush=True)

    yield line
