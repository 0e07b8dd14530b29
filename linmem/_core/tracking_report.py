"""What a `TrackingCreator` noted, as a text and as a picture."""

from __future__ import annotations

import os

from linmem._core.arguments import check_path, printable, show_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from linmem.records import Allocation, ScopeTotals

LINES = 10                  # of code in a text
AREAS = 8                   # of a picture; the other scopes are drawn as one
REST = "other scopes"
LABEL = 60                  # the most characters of the name of an area


def text(outstanding: list[Allocation], scopes: dict[tuple[str, ...], ScopeTotals], overhead: dict[str, int]) -> str:
    """The sums of the scopes, the lines that made the most bytes, and what the tracker keeps."""
    lines = [f"{'scope':32} {'now':>12} {'peak':>12} {'memories':>9} {'made':>9}"]
    for path, sums in scopes.items():
        name = printable("  " * len(path) + path[-1]) if path else "(all)"
        lines.append(f"{name:32} {show_size(sums.size):>12} {show_size(sums.peak):>12} {sums.memories:>9}"
                     f" {sums.made:>9}")
    made: dict[str, list[int]] = {}
    for found in outstanding:
        place = f"{found.stack[-1].filename}:{found.stack[-1].lineno} in {found.stack[-1].name}" if found.stack else (
            "(no stack)")
        made.setdefault(place, []).append(found.size)
    by_size = sorted(made.items(), key=lambda item: -sum(item[1]))
    lines += ["", f"{'now':>12} {'memories':>9}  made at"]
    lines += [f"{show_size(sum(sizes)):>12} {len(sizes):>9}  {printable(place)}" for place, sizes in by_size[:LINES]]
    if len(by_size) > LINES:
        rest = [size for _, sizes in by_size[LINES:] for size in sizes]
        lines.append(f"{show_size(sum(rest)):>12} {len(rest):>9}  {len(by_size) - LINES} other lines")
    kept = " and ".join(f"{overhead[what]} {what if overhead[what] != 1 else what[:-1]}"
                        for what in ("stacks", "scopes"))
    lines += ["", f"The tracker keeps {kept} in {show_size(overhead['bytes'])}."]
    for what in ("stacks", "scopes"):
        if overhead[f"lost_{what}"]:
            lines.append(f"There were too many {what} {overhead[f'lost_{what}']} times: some memories have none.")
    return "\n".join(lines) + "\n"


def draw(path: str | bytes | os.PathLike[str], seconds: float, points: dict[tuple[str, ...], list[int]]) -> None:
    """The bytes of the largest scopes over time, one area on the other."""
    path = os.fsdecode(check_path(path))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"a picture needs matplotlib: pip install 'linmem[image]' ({error})") from None
    from linmem._files.atomic_file import write_figure

    by_peak = sorted(points.items(), key=lambda item: -max(item[1]))
    areas = [(printable("/".join(names)) if names else "no scope", sizes) for names, sizes in by_peak[:AREAS]]
    if len(by_peak) > AREAS:
        areas.append((REST, [sum(sizes) for sizes in zip(*(sizes for _, sizes in by_peak[AREAS:]), strict=True)]))
    n = len(by_peak[0][1])
    figure = Figure(figsize=(9, 5), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.stackplot([i * seconds for i in range(n)],
                           *([size / 2**20 for size in sizes] for _, sizes in areas), step="post")
    axes.set_xlabel("seconds")
    axes.set_ylabel("MiB")
    axes.set_ylim(bottom=0)
    legend = axes.legend(drawn, [str(i) for i in range(len(drawn))], loc="upper left", frameon=False, fontsize=9)
    for text, (label, _) in zip(legend.get_texts(), areas, strict=True):
        text.set_parse_math(False)      # a name may have any character, also "$", or a "_" at its start
        text.set_text(label if len(label) <= LABEL else f"{label[:LABEL]}...")
    write_figure(figure, path, dpi=130)
