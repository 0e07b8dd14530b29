"""The report of `linmem run`: the figures of each memory, as text, as JSON, and as a picture of the sizes over time."""

from __future__ import annotations

import html
import importlib.util
import os
from collections.abc import Iterable
from typing import Any

import linmem
from linmem._commands.output_file import OutputFile
from linmem._commands.parser import EXIT_USAGE, Refused
from linmem._commands.text import count, show_size, show_time
from linmem._core.arguments import printable

CHANGES = 1000      # of the size of a memory, at most so many are drawn
COLORS = ("#2a78d6", "#1baf7a", "#eda100", "#e34948", "#4a3aa7", "#e87ba4", "#008300", "#eb6834")
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 900, 360, 90, 40, 20     # of the picture in HTML, in pixels


def figures(args: Any, status: int, statistics: linmem.StatisticsCreator, program: Any) -> dict[str, Any]:
    """The report as a dict. program: None if the program could not be read."""
    records = statistics.memories()[::-1]
    made = {} if program is None else program.names_by_address()
    names = [made.get(memory["base"]) for memory in records] if made else names_of(
        program, [memory["first_size"] for memory in records])
    memories = [{
        "name": name,
        "first_size": memory["first_size"],
        "peak_size": memory["size"],        # a wasm memory never shrinks
        "growths": memory["growths"],
        "refused_growths": memory["refused"],
        "grow_ns": memory["grow_ns"],
        "peak_resident": memory["peak_resident"],
    } for name, memory in zip(names, records, strict=True)]
    return {"program": args.program, "exit_code": status, "creator": args.creator, "max_memory": args.max_memory,
            "memories": memories, "all": statistics.statistics()}


def names_of(program: Any, first_sizes: list[int]) -> list[str | None]:
    """The names of the memories of a run, in the order in which they were made; None: not known.

    A memory that is exported has the name of its first export, another one its number. wasmtime makes the memories of a
    module in their order, and the GC heap of the store before or after all of them.
    """
    try:
        module = program.names_from
        imported, own = len(module.imports()[0]), module.memories()
        exports = {index: name for name, kind, index in reversed(module.exports()) if kind == 2}
    except (AttributeError, ValueError):       # the program was not read, or its module cannot be parsed
        return [None] * len(first_sizes)
    named: list[tuple[str | None, int]] = [
        (exports.get(index, f"memory {index}"), limits.minimum) for index, limits in enumerate(own, start=imported)]
    heaps: list[tuple[str | None, int]] = [("GC heap", 0)] * (len(first_sizes) - len(own))
    for order in (heaps + named, named + heaps):        # a run that failed has but the first memories
        made = order[:len(first_sizes)]
        if len(made) == len(first_sizes) and all(
                size >= minimum for (_, minimum), size in zip(made, first_sizes, strict=True)):
            return [name for name, _ in made]
    return [None] * len(first_sizes)


def label(memory: dict[str, Any], number: int) -> str:
    """The name of a memory in one line; a program may give it any name."""
    name = memory["name"]
    return f"memory number {number}" if name is None else printable(name[:100])


def text_of(report: dict[str, Any]) -> str:
    everything = report["all"]
    if not everything["total_count"] and not everything["failures"]:
        return "linmem: no memory was asked for"
    budget = "" if report["max_memory"] is None else f", of at most {show_size(report['max_memory'])}"
    lines = [f"linmem: {count(everything['total_count'], 'memory')} by {report['creator']},"
             f" {show_size(everything['peak_bytes'])} at the peak{budget};"
             f" {count(everything['failures'], 'request')} refused"]
    for number, memory in enumerate(report["memories"], start=1):
        lines.append(f"  {label(memory, number)}: {show_size(memory['first_size'])} at first,"
                     f" {show_size(memory['peak_size'])} at the peak, {show_size(memory['peak_resident'])} resident;"
                     f" {count(memory['growths'], 'growth')} in {show_time(memory['grow_ns'])},"
                     f" {memory['refused_growths']} refused")
    return "\n".join(lines)


class ReportFile:
    """The file of --report-file. A file that could not be drawn after the run is refused before the run."""

    def __init__(self, path: str, others: dict[str, str | None]) -> None:
        self.form = os.path.splitext(path)[1].lower()
        fault = ""
        if self.form not in (".png", ".html"):
            fault = "the name must end in .png or .html"
        elif self.form == ".png" and importlib.util.find_spec("matplotlib") is None:
            fault = "a .png needs matplotlib: pip install 'linmem[image]' (an .html needs nothing)"
        if fault:
            raise Refused(f"--report-file {path}: {fault}", EXIT_USAGE)
        self.file = OutputFile("--report-file", path, others)

    def write(self, report: dict[str, Any], timeline: list[list[tuple[int, int]]], end_ns: int) -> None:
        """Draw the sizes over time, from the first memory on, because the program is compiled before.

        timeline: as `StatisticsCreator.timeline`, in the order of the report. A program that goes on after the timeout
        may have made more memories than the report has.
        """
        timeline = timeline[:len(report["memories"])]
        begin = min([changes[0][0] for changes in timeline if changes], default=0)
        lines = [[(at - begin, size) for at, size in _line(changes, end_ns)] for changes in timeline]
        end_ns = max(end_ns - begin, 1)
        with self.file.writing() as file:
            if self.form == ".html":
                file.write(html_of(report, lines, end_ns).encode())
            else:
                from linmem._files.atomic_file import figure_bytes

                file.write(figure_bytes(figure_of(report, lines, end_ns), "png", dpi=130))


def _line(changes: list[tuple[int, int]], end_ns: int) -> list[tuple[int, int]]:
    """The changes of a memory until the end of the run."""
    if not changes or changes[-1][0] >= end_ns:
        return changes
    return [*changes, (end_ns, changes[-1][1])]


def figure_of(report: dict[str, Any], lines: list[list[tuple[int, int]]], end_ns: int) -> Any:
    from matplotlib.figure import Figure

    unit, scale = unit_of(report)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, (memory, line) in enumerate(zip(report["memories"], lines, strict=True), start=1):
        # "$" would begin a formula.
        axes.step([at / 1e9 for at, _ in line], [size / scale for _, size in line], where="post", linewidth=2,
                  color=COLORS[(number - 1) % len(COLORS)], label=label(memory, number).replace("$", r"\$"))
    axes.set(xlabel="seconds", ylabel=unit, title=title_of(report).replace("$", r"\$"), xlim=(0, end_ns / 1e9))
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e1e0d9")
    if lines:
        axes.legend(frameon=False)
    return figure


def html_of(report: dict[str, Any], lines: list[list[tuple[int, int]]], end_ns: int) -> str:
    """A page that needs no other file and no script."""
    unit, scale = unit_of(report)
    most = max([size for line in lines for _, size in line], default=0) or 1

    def x(at: int) -> float:
        return round(_LEFT + (_WIDTH - _LEFT) * at / end_ns, 1)

    def y(size: float) -> float:
        return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - size / most), 1)

    drawn = []
    for part in range(5):
        size = most * part / 4
        drawn.append(f'<path class="grid" d="M{_LEFT} {y(size)}H{_WIDTH}"/><text class="size" x="{_LEFT - 8}"'
                     f' y="{y(size) + 4}">{size / scale:.3g} {unit}</text>')
        drawn.append(f'<text class="time" x="{x(end_ns * part // 4)}" y="{_HEIGHT - 12}">'
                     f"{end_ns * part / 4 / 1e9:.3g} s</text>")
    for number, line in enumerate(lines):
        steps = "".join(f"H{x(at)}V{y(size)}" for at, size in line[1:])
        if line:
            drawn.append(f'<path class="line" stroke="{COLORS[number % len(COLORS)]}"'
                         f' d="M{x(line[0][0])} {y(line[0][1])}{steps}"/>')
    return _PAGE.format(title=html.escape(title_of(report)), width=_WIDTH + 40, height=_HEIGHT, drawn="\n".join(drawn),
                        rows="\n".join(_rows(report["memories"])), text=html.escape(text_of(report).splitlines()[0]))


def _rows(memories: Iterable[dict[str, Any]]) -> Iterable[str]:
    for number, memory in enumerate(memories, start=1):
        color = COLORS[(number - 1) % len(COLORS)]
        cells = [show_size(memory[key]) for key in ("first_size", "peak_size", "peak_resident")]
        cells += [str(memory["growths"]), show_time(memory["grow_ns"]), str(memory["refused_growths"])]
        yield (f'<tr><th><span style="background:{color}"></span>{html.escape(label(memory, number))}</th>'
               + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")


def title_of(report: dict[str, Any]) -> str:
    return f"{printable(os.path.basename(report['program']))}: exit code {report['exit_code']}"


def unit_of(report: dict[str, Any]) -> tuple[str, int]:
    peak = max([memory["peak_size"] for memory in report["memories"]], default=0)
    return next((unit, scale) for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
                if peak >= scale or scale == 1 << 10)


_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 14px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff }}
.grid {{ stroke: #e1e0d9 }} .line {{ fill: none; stroke-width: 2 }}
text {{ font-size: 12px; fill: #555 }} .size {{ text-anchor: end }} .time {{ text-anchor: middle }}
td, th {{ padding: .2rem .8rem; text-align: right; font-weight: normal }} th:first-child {{ text-align: left }}
span {{ display: inline-block; width: .8em; height: .8em; margin-right: .5em }}
</style>
<h1>{title}</h1>
<p>{text}</p>
<svg width="{width}" height="{height}" role="img" aria-label="the size of each memory over time">
{drawn}
</svg>
<table>
<tr><th>memory</th><th>first size</th><th>peak size</th><th>resident</th><th>growths</th><th>growing took</th>\
<th>refused</th></tr>
{rows}
</table>
</html>
"""
