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
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import linmem
from linmem._files.atomic_file import replacing, write_figure
from linmem._os import pages as _pages
from linmem.bench.harness import EXACT, MORE, P10, RATE, SIZE, SPEED, TIME, Contender, Group, Result, Row, Series

GOOD, BAD, PLAIN, INK, FAINT = "#1a7f5a", "#c0392b", "#5b6b7b", "#22303c", "#6b7785"      # colours of the picture
GRID, BAND, LINES = "#e3e8ed", "#f5f7f9", "#c3ccd5"
# A family of contenders has one hue: linmem is green, wasmtime's pooling purple. (color, shape, size)
STYLES = {
    "linmem": ("#1a7f5a", "o", 11), "adaptive": ("#1a7f5a", "o", 11), "two threads": ("#1a7f5a", "o", 11),
    "plain": ("#79c5a5", "o", 8.5), "scan": ("#4a9e79", "^", 8), "default": ("#22456f", "s", 8),
    "one thread": ("#22456f", "s", 8), "discard": ("#22456f", "s", 8), "zero": ("#d98324", "D", 7),
    "ctypes": ("#c0392b", "X", 8.5), "pooling": ("#5b3f8f", "D", 7.5),
}
MORE_STYLES = tuple(zip(("#8e6fc0", "#6f7fd0", "#a85fb0", "#4f9fc9", "#b58ad6", "#7b93a8", "#c77fae", "#8a8f3c"),
                        "v^<>PpdH", strict=True))
MANY = 10           # a picture with more rows leaves out rows without a goal
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
    from rich.padding import Padding
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
        wide = console.width >= WIDE
        # A word that is longer than its column, such as the name of a method, goes on in the next line. A narrow table
        # has one column for both names, so that these words fit.
        for heading in ("operation", "against") if wide else ("operation",):
            table.add_column(heading, ratio=1, overflow="fold")
        for heading in ("ratio", *["quartiles"] * wide, "at best", "goal"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("verdict")
        for result in results:
            of_sense = [row for row in result.rows if row.sense == sense]
            for i, row in enumerate(of_sense):
                style = {True: "green", False: "bold red", None: "dim"}[row.holds]
                median, best = (Text(times(ratio), style if judged else "dim") for judged, ratio in two_ratios(row))
                same = i > 0 and of_sense[i - 1].operation == row.operation
                names = [Text("" if same else row.operation), Text(row.against)]
                if not wide:
                    if not same:
                        table.add_row(names[0])
                    names = [Padding(Text(f"vs {row.against}"), (0, 0, 0, 2))]
                table.add_row(*names, median, *[spread(row)] * wide, best, bound(row),
                              Text(in_a_row(row, told), style), end_section=row is of_sense[-1])
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
        "rows": [{**asdict(row), "note": row.note or result.group.note} for result in results for row in result.rows],
        "groups": [{
            "key": result.group.key,
            "operation": result.group.operation,
            "table": result.group.table,
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


@dataclass
class Stored(Series):
    """A series of a file. Its figures are the file's, and cannot be computed again."""

    ns_p10: float | None = None

    def p10(self) -> float:
        return 0 if self.ns_p10 is None else self.ns_p10


def read_json(path: str) -> tuple[list[Result], About]:
    """The results that `write_json` wrote, without the figures of the single rounds.

    Raises
    ------
    ValueError
        The file is not such a file.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        figures = json.loads(text)
        about = About(figures["suite"], figures["machine"], figures["rounds"], figures["quick"])
        rows: dict[str, list[Row]] = {}
        for given in figures["rows"]:
            row = Row(**given)
            if row.sense not in HEADINGS:
                raise ValueError(f"no sense {row.sense!r}")
            rows.setdefault(row.key.partition("/")[0], []).append(row)
        groups = {group["key"]: group for group in figures["groups"]}
        results = []
        for key in dict.fromkeys([*rows, *groups]):
            of_group = rows.get(key, [])
            group = groups.get(key) or {"operation": of_group[0].operation, "table": "", "contenders": []}
            series = [Stored(Contender(s["key"], s["what"], _refuse_to_run, s["less"] or ""),
                             unavailable=s["unavailable"], ns_p10=s["ns_p10"]) for s in group["contenders"]]
            by_key = {s.contender.key: s for s in series}
            for s in series:
                s.base = by_key[s.contender.less] if s.contender.less else None
            results.append(Result(Group(key, group["operation"], (), (), of_group[0].note if of_group else "",
                                        table=group["table"]), series, of_group))
        for _ in markdown(results, about):      # figures that are no numbers fail here
            pass
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a file that `linmem bench --json` wrote ({type(error).__name__}: {error})") from None
    return results, about


def _refuse_to_run() -> Callable[[int], int]:
    raise TypeError("the figures were read from a file, so their contenders cannot run")


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

INCHES = 4.6        # the width of a picture; on a phone, where it is narrower, its text stays readable
LINE = 0.18          # inches of a line of text
LETTERS = 50        # letters of a line of text


def draw(path: str, results: list[Result], about: About) -> None:
    """Draw the tables of times, if there are any, then each ratio with its quartiles and its goal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows if row.judged() is not None and row.drawn]
    if len(rows) > MANY:
        rows = [row for row in rows if row.goal is not None]
    panels = [panel_of_times(table.title, results) for table in tables(results)]
    panels += [panel_of_ratios(of_sense) for sense in HEADINGS
               if (of_sense := [row for row in rows if row.sense == sense])]
    head = 0.75
    height = head + sum(panel.height for panel in panels)
    figure = Figure(figsize=(INCHES, height), facecolor="white")
    FigureCanvasAgg(figure)
    top = height - head
    for panel in panels:
        # The text of a panel stands above and below its axes: a title, and the ticks with their legend.
        bottom = top - panel.height + panel.below
        axes = figure.add_axes((0.03, bottom / height, 0.94, (top - 0.35 - bottom) / height))
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(axis="x", labelsize=8.6, labelcolor=FAINT, length=0, pad=4)
        axes.set_yticks([])
        axes.set_xscale("log")
        axes.set_axisbelow(True)
        axes.set_ylim(panel.lines, 0)
        axes.set_title(panel.title, loc="left", fontsize=10, color=INK, pad=8, fontweight="bold")
        panel.paint(axes)
        axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)
        top -= panel.height
    title = f"linmem bench, {about.suite}" + "  (--quick: not a measurement)" * about.quick
    figure.text(0.03, 1 - 0.12 / height, title, va="top", fontsize=13, fontweight="bold", color=INK)
    facts = f"{in_short(about.machine)}; {about.in_rounds('interleaved rounds')}"
    figure.text(0.03, 1 - 0.38 / height, in_lines(facts), va="top", fontsize=8.4, color=FAINT, linespacing=1.3)
    write_figure(figure, path, dpi=150)


@dataclass(frozen=True)
class Panel:
    """A part of the picture. `lines` counts the lines of text and marks in its axes."""

    title: str
    lines: float
    below: float            # inches below the axes
    paint: Callable

    @property
    def height(self) -> float:
        return 0.45 + self.lines * LINE + self.below


def in_lines(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 66))


def label_ticks(axes, left: float, right: float, unit: str) -> None:
    axes.set_xlim(left, right)
    decades = math.log10(right / left)
    steps = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 2.6 else (1,)
    every = [step * 10.0**power for power in range(-5, 9, 2 if decades > 5 else 1) for step in steps]
    ticks = [tick for tick in every if left * 1.1 <= tick <= right / 1.1]
    axes.set_xticks(ticks, [f"{tick:,.12g} {unit}" for tick in ticks])
    axes.set_xticks([], minor=True)


def write(axes, y: float, text: str, **style) -> None:
    """Write a line of text at the left side of the axes."""
    axes.annotate(text, (0.0, y), xycoords=("axes fraction", "data"), va="center", **{"fontsize": 8.6, **style})


def band(axes, top: float, bottom: float) -> None:
    axes.axhspan(top, bottom, color=BAND, zorder=0, linewidth=0)


def panel_of_times(title: str, results: list[Result]) -> Panel:
    of_groups = [result for result in results if result.group.table == title]
    names = {s.contender.what for result in of_groups for s in result.series if not s.why_not()}
    columns = 2 if all(len(name) < 28 for name in names) else 1
    return Panel(f"{sentence(title)}, at best", 2 * len(of_groups), 0.6 + 0.18 * math.ceil(len(names) / columns),
                 lambda axes: draw_times(axes, of_groups, columns))


def draw_times(axes, of_groups: list[Result], columns: int) -> None:
    """Draw a line for each group, with a mark for each contender."""
    more = iter(MORE_STYLES)
    styles: dict[str, tuple[str, str, float]] = {}
    low, high = math.inf, 0.0
    for at, result in enumerate(of_groups):
        y = 2 * at + 1.5
        if at % 2 == 0:
            band(axes, 2 * at, 2 * at + 2)
        write(axes, 2 * at + 0.6, result.group.operation, color=INK)
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
            axes.plot(figures[-1], y, shape, color=color, markersize=size * 0.8, markeredgecolor="white", label=label,
                      markeredgewidth=0.8, zorder=5 + size / 20, linestyle="none")
        if figures:
            axes.plot([min(figures), max(figures)], [y, y], color=LINES, linewidth=1.4, zorder=2)
            low, high = min(low, *figures), max(high, *figures)
    if not styles:
        low, high = 1.0, 10.0
    label_ticks(axes, low / 1.4, high * 1.4, "µs")
    axes.set_xlabel("logarithmic, left is better", fontsize=8.6, color=FAINT, labelpad=4, loc="left")
    if styles:
        axes.legend(loc="upper left", bbox_to_anchor=(-0.02, 0.0), bbox_transform=below(axes, 0.45), frameon=False,
                    fontsize=8.4, labelcolor=INK, handletextpad=0.2, borderaxespad=0, ncols=columns, columnspacing=0.8,
                    borderpad=0)


def below(axes, inches: float):
    """The coordinates of the axes, moved down."""
    from matplotlib.transforms import ScaledTranslation

    return axes.transAxes + ScaledTranslation(0, -inches, axes.figure.dpi_scale_trans)


def panel_of_ratios(rows: list[Row]) -> Panel:
    operations = {row.operation for row in rows}
    return Panel(sentence(HEADINGS[rows[0].sense]), sum(map(lines_of, operations)) + 2 * len(rows), 0.5,
                 lambda axes: draw_ratios(axes, rows))


def lines_of(operation: str) -> float:
    """The lines that the name of an operation takes, and a little space."""
    return len(textwrap.wrap(operation, LETTERS)) + 0.2


def draw_ratios(axes, rows: list[Row]) -> None:
    """Draw each ratio, its quartiles and its goal on a logarithmic axis. The bad side of a goal is shaded."""
    sense = rows[0].sense
    rows = [row for operation in dict.fromkeys(row.operation for row in rows) for row in rows
            if row.operation == operation]
    # A ratio of zero has no place on the axis. It is drawn at the left end.
    least = min([ratio for row in rows if (ratio := row.judged()) > 0] + [1.0]) / 2
    spreads = [tuple(max(ratio, least) for ratio in row.ratio_quartiles or (row.judged(), row.judged()))
               for row in rows]
    others = [max(ratio, least) for row in rows for ratio in (row.ratio_p10, row.goal) if ratio is not None]
    left = min(0.8, *[low for low, _ in spreads], *others) / 1.6
    right = max(2.0, max([high for _, high in spreads] + others) * 1.25)
    top, last, shaded = 0.0, "", False
    for row, (low, high) in zip(rows, spreads, strict=True):
        color = {True: GOOD, False: BAD, None: PLAIN}[row.holds]
        if row.operation != last:
            shaded = not shaded
            if shaded:
                band(axes, top, top + lines_of(row.operation) + 2 * sum(o.operation == row.operation for o in rows))
            for i, line in enumerate(textwrap.wrap(row.operation, LETTERS)):
                write(axes, top + 0.7 + i, line, color=INK, fontweight="bold")
            top, last = top + lines_of(row.operation), row.operation
        y = top + 1.4
        write(axes, top + 0.5, f"vs {row.against}", color=FAINT, fontsize=8.4)
        axes.annotate(times(row.judged()), (1.0, top + 0.5), xycoords=("axes fraction", "data"), va="center",
                      ha="right", color=color, fontsize=8.8,
                      fontweight="normal" if row.goal is None else "bold")
        if row.goal is not None:
            axes.plot([row.goal, row.goal], [y - 0.42, y + 0.42], color=INK, linewidth=2.2, zorder=4,
                      solid_capstyle="butt")
            worse = (left, row.goal) if sense in MORE else (row.goal, right)
            axes.barh(y, worse[1] - worse[0], left=worse[0], height=0.84, color=BAD, alpha=0.1, zorder=1, linewidth=0)
        # From 1 x on: to the left linmem takes less, to the right more.
        judged = max(row.judged(), least)
        axes.plot([1.0, judged], [y, y], color=color, linewidth=1.6, alpha=0.5, zorder=2)
        axes.plot([low, high], [y, y], color=color, linewidth=6, alpha=0.35, zorder=3, solid_capstyle="round")
        axes.plot(judged, y, "o", color=color, markersize=7.5, markeredgecolor="white", markeredgewidth=1.2, zorder=5)
        top += 2
    axes.axvline(1.0, color=LINES, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    label_ticks(axes, left, right, "x")
    ways = {row.by for row in rows}
    dot = {P10: "ratio at best", EXACT: "exact"}.get(next(iter(ways)), "median") if len(ways) == 1 else "ratio"
    axes.set_xlabel(f"logarithmic; dot: {dot}" + "; bar: quartiles" * (ways != {EXACT}) + "; black: goal", fontsize=8.6,
                    color=FAINT, labelpad=4, loc="left")
