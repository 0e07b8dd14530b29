"""The reports: tables, a JSON file, a picture."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import linmem
from linmem._files.atomic_file import replacing, write_figure
from linmem._os import pages as _pages
from linmem.bench.harness import EXACT, MORE, P10, RATE, SIZE, SPEED, TIME, Result, Row

GOOD, BAD, PLAIN, INK, FAINT = "#1a7f5a", "#c0392b", "#5b6b7b", "#22303c", "#6b7785"      # colours of the picture
# A family of contenders has one hue: linmem is green, wasmtime's pooling purple. (color, shape, size)
STYLES = {
    "linmem": ("#1a7f5a", "o", 11), "adaptive": ("#1a7f5a", "o", 11), "two threads": ("#1a7f5a", "o", 11),
    "plain": ("#79c5a5", "o", 8.5), "scan": ("#4a9e79", "^", 8), "default": ("#22456f", "s", 8),
    "one thread": ("#22456f", "s", 8), "discard": ("#22456f", "s", 8), "zero": ("#d98324", "D", 7),
    "ctypes": ("#c0392b", "X", 8.5), "pooling": ("#5b3f8f", "D", 7.5),
}
MORE_STYLES = tuple(zip(("#8e6fc0", "#6f7fd0", "#a85fb0", "#4f9fc9", "#b58ad6", "#7b93a8", "#c77fae", "#8a8f3c"),
                        "v^<>PpdH", strict=True))
MANY = 20           # a picture with more rows leaves out rows without a goal
WIDE = 100          # columns of a terminal; a narrower table has no quartiles
HEADINGS = {TIME: "linmem's time over the other's, less is better",
            SPEED: "times faster than the other, more is better",
            SIZE: "linmem's bytes over the other's, less is better",
            RATE: "warm hits over all requests, more is better"}


@dataclass(frozen=True)
class About:
    """The suite, machine and options of a report."""

    suite: str
    machine: dict
    rounds: int             # 0 if nothing is timed
    quick: bool

    def in_rounds(self, what: str) -> str:
        return f"{self.rounds} {what}" if self.rounds else "counted, not timed"


def machine() -> dict:
    """The properties of this machine on which the figures depend, without the names of the machine and its user."""
    system = re.match(r"[^-]+(-\d+(\.\d+)?)?", platform.platform(terse=True))
    pages = _pages.describe()
    return {
        "system": system.group().replace("-", " ") if system else "unknown",
        "architecture": platform.machine(),
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "gil": not sysconfig.get_config_var("Py_GIL_DISABLED"),
        "page_size": pages["page_size"],
        "address_bits": pages["address_bits"],
        "capabilities": pages["capabilities"],
        "linmem": linmem.__version__,
        "numpy": version("numpy"),
        "wasmtime": version("wasmtime"),
    }


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def in_short(facts: dict) -> str:
    libraries = [f"{name} {facts[name]}" for name in ("linmem", "numpy", "wasmtime") if facts[name]]
    python = f"{facts['implementation']} {facts['python']}{'' if facts['gil'] else ' without a GIL'}"
    return ", ".join([facts["system"], facts["architecture"], f"{facts['processors']} processors", python, *libraries])


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int], None]]:
    """Yield advance(text, total), which moves a bar on stderr by one."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
                   console=Console(stderr=True), transient=True, auto_refresh=False)
    with bar:
        task = bar.add_task("starting")

        def advance(text: str, total: int) -> None:
            # The bar is drawn between rounds, because a thread that draws would disturb the measurements.
            bar.update(task, description=text, total=total, advance=1, refresh=True)

        yield advance


# -- words and figures ---------------------------------------------------------------------------------

def verdict(row: Row) -> str:
    if row.unavailable:
        return f"not measured: {row.unavailable}"
    if row.holds is None:
        return ""
    return "holds" if row.holds else "missed"


def times(ratio: float | None) -> str:
    """A ratio as text, with its significant digits."""
    if ratio is None:
        return ""
    if ratio >= 100:
        return f"{ratio:.0f} x"
    if ratio >= 10:
        return f"{ratio:.1f} x"
    return f"{ratio:.2f} x" if ratio >= 0.1 else f"{ratio:.2g} x"


def two_ratios(row: Row) -> tuple[tuple[bool, float | None], tuple[bool, float | None]]:
    """The two ratios of a row, each with whether the goal applies to it."""
    return (row.by != P10, row.ratio_median), (row.by == P10, row.ratio_p10)


def spread(row: Row) -> str:
    if row.by == EXACT:
        return "exact"
    if row.ratio_quartiles is None:
        return ""
    low, high = row.ratio_quartiles
    return f"{low:.2g} .. {high:.2g}"


def bound(row: Row) -> str:
    """The goal as text."""
    return "" if row.goal is None else f"{'>=' if row.sense in MORE else '<='} {row.goal:g} x"


def sentence(text: str) -> str:
    """The text with a capital letter, except where it begins with the name linmem."""
    return text if text.startswith("linmem") else text[0].upper() + text[1:]


def microseconds(ns: float | None) -> str:
    if ns is None:
        return "-"
    figure = ns / 1000
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.1f}" if figure >= 10 else f"{figure:.2f}"


@dataclass(frozen=True)
class Times:
    """A table of times, with a line for each of `lines` and a time for each of `columns`."""

    title: str
    columns: list[str]
    lines: list[tuple[str, list[float | None]]]


def tables(results: list[Result]) -> list[Times]:
    """The p10 of every contender in groups that share a title. The longer of the two sides becomes the lines."""
    found = []
    for title in dict.fromkeys(result.group.table for result in results if result.group.table):
        of_groups = [result for result in results if result.group.table == title]
        # A contender whose time is only subtracted has no column.
        taken_off = {s.contender.less for result in of_groups for s in result.series}
        figures = [{s.contender.key: None if s.why_not() else s.p10() for s in result.series} for result in of_groups]
        # Groups may have different contenders. The group with most contenders gives the order.
        longest = max((result.series for result in of_groups), key=len)
        what = {s.contender.key: s.contender.what for series in (longest, *(result.series for result in of_groups))
                for s in series if s.contender.key not in taken_off}
        if len(what) > len(of_groups):
            lines = [(name, [line.get(key) for line in figures]) for key, name in what.items()]
            found.append(Times(title, [result.group.key for result in of_groups], lines))
        else:
            lines = [(result.group.operation, [line.get(key) for key in what])
                     for result, line in zip(of_groups, figures, strict=True)]
            found.append(Times(title, list(what), lines))
    return found


def reasons(results: list[Result]) -> dict[str, list[str]]:
    """The reasons why contenders did not run. A contender that ran in other groups is named by its group."""
    everywhere: dict[str, bool] = {}
    for s in (s for result in results for s in result.series):
        everywhere[s.contender.what] = everywhere.get(s.contender.what, True) and s.unavailable is not None
    found: dict[str, dict[str, None]] = {}
    for result in results:
        taken_off = {s.contender.less for s in result.series}
        for s in result.series:
            if s.unavailable and s.contender.key not in taken_off:
                name = s.contender.what if everywhere[s.contender.what] else result.group.operation
                found.setdefault(s.unavailable, {})[name] = None
    return {why: list(names) for why, names in found.items()}


def in_a_row(row: Row, told: dict[str, list[str]]) -> str:
    """The verdict of a row, without a reason that the table shows elsewhere."""
    return "not measured" if row.unavailable in told else verdict(row)


def show(results: list[Result], about: About) -> None:
    """Print the tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout)
    if about.quick:
        console.print(Text("--quick: a rough estimate, not a measurement", "bold yellow"))
    for times_table in tables(results):
        table = Table(title=f"{times_table.title}: microseconds at best", box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("")
        for column in times_table.columns:
            table.add_column(column, justify="right", no_wrap=True)
        for what, figures in times_table.lines:
            table.add_row(Text(what), *map(microseconds, figures))
        console.print(table)
    told = reasons(results)
    for why, names in told.items():
        console.print(Text(f"not measured: {'; '.join(names)}: {why}", "dim"))

    rows = [row for result in results for row in result.rows]
    senses = [sense for sense in HEADINGS if any(row.sense == sense for row in rows)]
    for sense in senses:
        table = Table(title=f"linmem bench: {HEADINGS[sense]}", box=box.SIMPLE_HEAD, title_justify="left")
        # A word that is longer than its column, such as the name of a method, goes on in the next line.
        table.add_column("operation", ratio=3, overflow="fold")
        table.add_column("against", ratio=3, overflow="fold")
        wide = console.width >= WIDE
        for heading in ("ratio", *["quartiles"] * wide, "at best", "goal"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("verdict")
        for result in results:
            of_sense = [row for row in result.rows if row.sense == sense]
            for i, row in enumerate(of_sense):
                style = {True: "green", False: "bold red", None: "dim"}[row.holds]
                median, best = (Text(times(ratio), style if judged else "dim") for judged, ratio in two_ratios(row))
                same = i > 0 and of_sense[i - 1].operation == row.operation
                table.add_row(Text("" if same else row.operation), Text(row.against), median, *[spread(row)] * wide,
                              best, bound(row), Text(in_a_row(row, told), style), end_section=row is of_sense[-1])
        console.print(table)
    for note, keys in notes(results).items():
        console.print(Text(f"{', '.join(keys)}: {note}", "dim"))
    console.print(Text(in_short(about.machine), "dim"))
    judged = " and ".join({row.by: "the ratio" if row.by != P10 else "at best" for row in rows
                           if row.goal is not None and row.by != EXACT}.values())
    how = ("ratio: the median of the ratios within a round, and their quartiles; at best: the ratio of the tenth"
           f" percentiles. Goals are held against {judged or 'neither'}" if about.rounds else about.in_rounds("rounds"))
    console.print(Text(how, "dim"))
    goals = [row for row in rows if row.goal is not None]
    console.print(f"{sum(row.holds is True for row in goals)} of {len(goals)} goals hold")


def notes(results: list[Result]) -> dict[str, list[str]]:
    """The notes of the groups, each with the keys of the groups that share it."""
    found: dict[str, list[str]] = {}
    for result in results:
        if result.group.note:
            found.setdefault(result.group.note, []).append(result.group.key)
    return {note: keys if len(keys) < 4 else [f"{keys[0]} .. {keys[-1]}"] for note, keys in found.items()}


# -- files ---------------------------------------------------------------------------------------------

def write_json(path: str, results: list[Result], about: About) -> None:
    """Write every figure. A time is the nanoseconds of one operation in one round."""
    figures = {
        "suite": about.suite,
        "quick": about.quick,
        "rounds": about.rounds,
        "machine": about.machine,
        "rows": [asdict(row) for result in results for row in result.rows],
        "groups": [{
            "key": result.group.key,
            "operation": result.group.operation,
            "contenders": [{
                "key": s.contender.key,
                "what": s.contender.what,
                "unavailable": s.unavailable,
                "operations_per_run": s.operations,
                "disturbed_rounds": s.disturbed,
                "less": s.contender.less or None,
                "ns_p10": s.p10() if s.timed() else None,
                "ns_median": s.median() if s.timed() else None,
                "ns": s.ns,
            } for s in result.series],
        } for result in results if result.series],
    }
    save_text(path, json.dumps(figures, indent=1) + "\n")


def save_text(path: str, text: str) -> None:
    with replacing(path) as (out, _):
        out.write(text.encode())


def marks(suite: str) -> tuple[str, str]:
    return f"<!-- bench: {suite} -->", f"<!-- bench: end of {suite} -->"


def write_markdown(path: str, results: list[Result], about: About) -> None:
    """Write the tables between the marks of the suite. The text around the marks does not change."""
    begin, end = marks(about.suite)
    text = "\n".join([begin, "", *markdown(results, about), "", end])
    old = ""
    if os.path.isfile(path):        # a pipe or a device is not read
        with open(path, encoding="utf-8") as there:
            old = there.read()
    if begin in old and end in old:
        head, _, rest = old.partition(begin)
        text = head + text + rest.partition(end)[2]
    else:
        text = old + ("\n" if old else "") + text + "\n"
    save_text(path, text)


def markdown(results: list[Result], about: About) -> Iterator[str]:
    yield (f"{in_short(about.machine)}; {about.in_rounds('rounds')}"
           f"{'; --quick: a rough estimate, not a measurement' if about.quick else ''}.")
    for table in tables(results):
        yield ""
        yield f"{sentence(table.title)}, microseconds at best:"
        yield ""
        yield from lines(["", *table.columns], "-" + ":" * len(table.columns),
                         [[what, *map(microseconds, figures)] for what, figures in table.lines])
    told = reasons(results)
    for why, names in told.items():
        yield ""
        yield f"Not measured: {'; '.join(names)} ({why})."
    for sense, heading in HEADINGS.items():
        found = []
        for result in results:
            last = ""
            for row in result.rows:
                if row.sense != sense:
                    continue
                key = f"`{row.key.rpartition('/')[0]}`"
                median, best = (f"**{times(ratio)}**" if judged and row.holds is not None else times(ratio)
                                for judged, ratio in two_ratios(row))
                found.append(["" if key == last else key, row.against, median, spread(row), best, bound(row),
                              in_a_row(row, told)])
                last = key
        if found:
            yield ""
            yield f"{sentence(heading)}:"
            yield ""
            yield from lines(["row", "against", "ratio", "quartiles", "at best", "goal", ""], "--::::-", found)


def lines(head: list[str], align: str, body: list[list[str]]) -> Iterator[str]:
    """A Markdown table. A colon in `align` means a column of figures."""
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join('---:' if side == ':' else '---' for side in align)}|"
    for line in body:
        yield f"| {' | '.join(line)} |"


# -- the picture ---------------------------------------------------------------------------------------

def draw(path: str, results: list[Result], about: About) -> None:
    """Draw the tables of times, if there are any, then each ratio with its quartiles and its goal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows if row.judged() is not None and row.drawn]
    if len(rows) > MANY:
        rows = [row for row in rows if row.goal is not None]
    panels = [(0.9 + 0.42 * len({result.group.key for result in results if result.group.table == table.title}),
               lambda axes, table=table: draw_times(axes, table.title, results)) for table in tables(results)]
    for sense in HEADINGS:
        of_sense = [row for row in rows if row.sense == sense]
        if of_sense:
            panels.append((0.9 + 0.5 * len(of_sense), lambda axes, rows=of_sense: draw_ratios(axes, rows)))
    heights = [height for height, _ in panels] or [1.0]
    figure = Figure(figsize=(11.5, 1.0 + sum(heights)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.12, hspace=0.02)
    all_axes = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (_, paint) in zip(all_axes, panels, strict=False):
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(axis="x", labelsize=9, labelcolor="#44505c")
        axes.tick_params(length=0, pad=6)
        axes.set_xscale("log")
        axes.set_axisbelow(True)
        paint(axes)
        axes.grid(axis="x", color="#e3e8ed", linewidth=0.8, zorder=0)
    figure.suptitle(f"linmem bench, {about.suite}" + "  (--quick: not a measurement)" * about.quick, x=0.012, ha="left",
                    fontsize=15, fontweight="bold", color=INK)
    figure.text(0.988, 0.998, f"{in_short(about.machine)}\n{about.in_rounds('interleaved rounds')}", ha="right",
                va="top", fontsize=8.2, color=FAINT, linespacing=1.4)
    write_figure(figure, path, dpi=150)


def label_ticks(axes, left: float, right: float, unit: str) -> None:
    axes.set_xlim(left, right)
    steps = (1, 2, 5) if right / left < 300 else (1,)
    every = [step * 10.0**power for power in range(-4, 9) for step in steps]
    ticks = [tick for tick in every if left <= tick <= right]
    axes.set_xticks(ticks, [f"{tick:,.12g} {unit}" for tick in ticks])
    axes.set_xticks([], minor=True)


def band(axes, at: int) -> None:
    axes.axhspan(at - 0.5, at + 0.5, color="#f7f9fa", zorder=0, linewidth=0)


def draw_times(axes, title: str, results: list[Result]) -> None:
    """Draw a line for each group, with a mark for each contender."""
    of_groups = [result for result in results if result.group.table == title]
    more = iter(MORE_STYLES)
    styles: dict[str, tuple[str, str, float]] = {}
    low, high = math.inf, 0.0
    for at, result in enumerate(of_groups):
        if at % 2 == 0:
            band(axes, at)
        figures = []
        for s in result.series:
            key = s.contender.key
            if key in {other.contender.less for other in result.series} or s.why_not():
                continue
            label = None
            if key not in styles:
                styles[key] = STYLES[key] if key in STYLES else (*next(more), 7)
                label = s.contender.what
            color, shape, size = styles[key]
            figures.append(s.p10() / 1000)
            axes.plot(figures[-1], at, shape, color=color, markersize=size, markeredgecolor="white", label=label,
                      markeredgewidth=1.2, zorder=5 + size / 20, linestyle="none")
        if figures:
            axes.plot([min(figures), max(figures)], [at, at], color="#c3ccd5", linewidth=1.4, zorder=2)
            low, high = min(low, *figures), max(high, *figures)
    if not styles:
        low, high = 1.0, 10.0
    label_ticks(axes, low / 1.4, high * 1.4, "µs")
    axes.set_ylim(len(of_groups) - 0.5, -0.5)
    axes.set_yticks(range(len(of_groups)), [result.group.operation for result in of_groups], fontsize=9)
    axes.set_title(f"{sentence(title)}  (at best, logarithmic, left is better)", loc="left", fontsize=10.5,
                   color=INK, pad=10, fontweight="bold")
    if styles:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8.4, labelcolor=INK,
                    handletextpad=0.3, borderaxespad=0.2)


def draw_ratios(axes, rows: list[Row]) -> None:
    """Draw each ratio, its quartiles and its goal on a logarithmic axis. The bad side of a goal is shaded."""
    sense = rows[0].sense
    spreads = [row.ratio_quartiles or (row.judged(), row.judged()) for row in rows]
    others = [ratio for row in rows for ratio in (row.ratio_p10, row.goal) if ratio is not None]
    left = min(0.8, *[low for low, _ in spreads], *others) / 1.6
    right = max(2.0, max([high for _, high in spreads] + others) * 1.25)
    operations = list(dict.fromkeys(row.operation for row in rows))
    for at, (row, (low, high)) in enumerate(zip(rows, spreads, strict=True)):
        color = {True: GOOD, False: BAD, None: PLAIN}[row.holds]
        if operations.index(row.operation) % 2 == 0:
            band(axes, at)
        if row.goal is not None:
            axes.plot([row.goal, row.goal], [at - 0.34, at + 0.34], color="#222222", linewidth=2.2, zorder=4,
                      solid_capstyle="butt")
            worse = (left, row.goal) if sense in MORE else (row.goal, right)
            axes.barh(at, worse[1] - worse[0], left=worse[0], height=0.68, color=BAD, alpha=0.07, zorder=1, linewidth=0)
        # From 1 x on: to the left linmem takes less, to the right more.
        axes.plot([1.0, row.judged()], [at, at], color=color, linewidth=1.6, alpha=0.5, zorder=2)
        axes.plot([low, high], [at, at], color=color, linewidth=7, alpha=0.35, zorder=3, solid_capstyle="round")
        median, best = row.ratio_median, row.ratio_p10
        minor = median if row.by == P10 else best
        if minor is not None:
            axes.plot(minor, at + 0.27, "^", color=color, markersize=4.5, alpha=0.75, markeredgewidth=0, zorder=4)
        axes.plot(row.judged(), at, "o", color=color, markersize=8.5, markeredgecolor="white", markeredgewidth=1.3,
                  zorder=5)
        text = times(row.judged()) + ("" if row.goal is None else f"  (goal {bound(row)})")
        axes.annotate(text, (1.0, at), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
                      va="center", color=color, fontsize=9.5, fontweight="normal" if row.goal is None else "bold")
    axes.axvline(1.0, color="#9aa5b1", linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    label_ticks(axes, left, right, "x")
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [f"{row.operation}\nvs {row.against}" for row in rows], fontsize=8.6,
                    linespacing=1.25)
    axes.set_title(sentence(HEADINGS[sense]), loc="left", fontsize=10.5, color=INK, pad=10,
                   fontweight="bold")
    ways = {row.by for row in rows}
    dot, triangle = ("ratio of p10", "median") if ways == {P10} else ("median", "ratio of p10")
    legend = "dot: exact" if ways == {EXACT} else f"dot: {dot}, triangle: {triangle}, bar: quartiles of the rounds"
    axes.set_xlabel(f"logarithmic  ·  {legend}, black: goal", fontsize=8.8, color="#44505c", labelpad=8)
