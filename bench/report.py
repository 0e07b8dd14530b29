"""What the figures look like: a table, a JSON file, a picture."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import linmem
from linmem._os import pages as _pages
from linmem.bench.harness import Group, Row, Series

GOOD, BAD, PLAIN = "#1a7f5a", "#c0392b", "#5b6b7b"      # of the picture


@dataclass(frozen=True)
class Result:
    group: Group
    operations: int         # in one run
    series: list[Series]
    rows: list[Row]


def machine() -> dict:
    """What the figures depend on, and nothing that says whose machine it is."""
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
    """Yields advance(text, total), which moves a bar on stderr by one."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
                   console=Console(stderr=True), transient=True, auto_refresh=False)
    with bar:
        task = bar.add_task("starting")

        def advance(text: str, total: int) -> None:
            # Drawn between rounds: a drawing thread would run inside what is measured.
            bar.update(task, description=text, total=total, advance=1, refresh=True)

        yield advance


def verdict(row: Row) -> str:
    if row.unavailable:
        return f"not measured: {row.unavailable}"
    if row.holds is None:
        return ""
    return "holds" if row.holds else "missed"


def times(ratio: float | None) -> str:
    """A ratio with the digits that it deserves."""
    if ratio is None:
        return ""
    return f"{ratio:.2f} x" if ratio >= 0.1 else f"{ratio:.2g} x"


def show(results: list[Result], facts: dict, *, quick: bool) -> None:
    """Print the table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=sys.stdout)
    table = Table(title="linmem bench: linmem's time over another's, less is better", box=box.SIMPLE_HEAD,
                  title_justify="left")
    table.add_column("operation", ratio=3)
    table.add_column("against", ratio=3)
    table.add_column("ratio", justify="right", no_wrap=True)
    table.add_column("quartiles", justify="right", no_wrap=True)
    table.add_column("at best", justify="right", no_wrap=True)
    table.add_column("goal", justify="right", no_wrap=True)
    table.add_column("verdict")
    for result in results:
        for i, row in enumerate(result.rows):
            low, high = row.ratio_quartiles or (None, None)
            style = {True: "green", False: "bold red", None: "dim"}[row.holds]
            table.add_row(Text(row.operation if i == 0 else ""), Text(row.against),
                          Text(times(row.ratio_median), style),
                          f"{low:.2g} .. {high:.2g}" if row.ratio_quartiles else "", times(row.ratio_p10),
                          "" if row.goal is None else f"<= {row.goal:g} x", Text(verdict(row), style),
                          end_section=row is result.rows[-1])
    console.print(table)
    for result in results:
        if result.group.note:
            console.print(Text(f"{result.group.key}: {result.group.note}", "dim"))
    console.print(Text(in_short(facts), "dim"))
    console.print(Text("ratio: the median of the ratios within a round, and their quartiles; at best: the ratio of the"
                       " tenth percentiles" + ("; --quick: a look, not a figure" if quick else ""), "dim"))
    rows = [row for result in results for row in result.rows if row.goal is not None]
    console.print(f"{sum(row.holds is True for row in rows)} of {len(rows)} goals hold")


def write_json(path: str, results: list[Result], facts: dict, *, suite: str, quick: bool) -> None:
    """Write every figure. Times are nanoseconds for one operation, one for each round."""
    figures = {
        "suite": suite,
        "quick": quick,
        "machine": facts,
        "rows": [asdict(row) for result in results for row in result.rows],
        "groups": [{
            "key": result.group.key,
            "operation": result.group.operation,
            "operations_per_run": result.operations,
            "contenders": [{
                "key": s.contender.key,
                "what": s.contender.what,
                "unavailable": s.unavailable,
                "disturbed_rounds": s.disturbed,
                "ns_p10": s.p10() if s.ns else None,
                "ns_median": s.median() if s.ns else None,
                "ns": s.ns,
            } for s in result.series],
        } for result in results],
    }
    with open(path, "w", encoding="utf-8") as out:
        json.dump(figures, out, indent=1)
        out.write("\n")


def draw(path: str, results: list[Result], facts: dict, *, quick: bool) -> None:
    """Draw each ratio, its quartiles and its goal on one logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows if row.ratio_median is not None]
    figure = Figure(figsize=(11, 1.9 + 0.52 * len(rows)), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lowest = min([row.ratio_quartiles[0] for row in rows] + [row.ratio_p10 for row in rows], default=0.1)
    highest = max([row.ratio_quartiles[1] for row in rows] + [row.goal or 1 for row in rows], default=1)
    left, right = lowest / 1.6, max(2.0, highest * 1.25)
    keys = list(dict.fromkeys(row.operation for row in rows))
    for at, row in enumerate(rows):
        color = {True: GOOD, False: BAD, None: PLAIN}[row.holds]
        if keys.index(row.operation) % 2 == 0:
            axes.axhspan(at - 0.5, at + 0.5, color="#f5f7f9", zorder=0, linewidth=0)
        if row.goal is not None:
            axes.plot([row.goal, row.goal], [at - 0.34, at + 0.34], color="#222222", linewidth=2.2, zorder=4,
                      solid_capstyle="butt")
            axes.barh(at, right - row.goal, left=row.goal, height=0.68, color=BAD, alpha=0.07, zorder=1, linewidth=0)
        low, high = row.ratio_quartiles
        axes.plot([left, row.ratio_median], [at, at], color=color, linewidth=1, alpha=0.35, zorder=2)
        axes.plot([low, high], [at, at], color=color, linewidth=7, alpha=0.35, zorder=3, solid_capstyle="round")
        axes.plot(row.ratio_p10, at + 0.27, "^", color=color, markersize=4.5, alpha=0.75, markeredgewidth=0, zorder=4)
        axes.plot(row.ratio_median, at, "o", color=color, markersize=8.5, markeredgecolor="white", markeredgewidth=1.3,
                  zorder=5)
        text = times(row.ratio_median) + ("" if row.goal is None else f"  (goal {row.goal:g} x)")
        axes.annotate(text, (1.0, at), xycoords=("axes fraction", "data"), xytext=(8, 0), textcoords="offset points",
                      va="center", color=color, fontsize=9.5, fontweight="normal" if row.goal is None else "bold")
    axes.axvline(1.0, color="#9aa5b1", linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    axes.set_xscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    ticks = [t for t in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if left <= t <= right]
    axes.set_xticks(ticks, [f"{t:g} x" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(rows)), [f"{row.operation}\nvs {row.against}" for row in rows], fontsize=8.6,
                    linespacing=1.25)
    axes.tick_params(axis="x", labelsize=9, labelcolor="#44505c")
    axes.tick_params(length=0, pad=6)
    axes.grid(axis="x", color="#e3e8ed", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlabel("linmem's time over the other's (logarithmic, left is better)  ·  dot and bar: median and quartiles"
                    " of the rounds, triangle: at best (p10), black: goal", fontsize=8.8, color="#44505c", labelpad=8)
    figure.suptitle("linmem bench" + ("  (--quick)" if quick else ""), x=0.012, ha="left", fontsize=14,
                    fontweight="bold")
    axes.set_title(in_short(facts), loc="right", fontsize=8.2, color="#6b7785", pad=10)
    figure.savefig(path, dpi=150)
