"""Which pages of two images differ: as counts, as a map on a terminal and as a picture."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator
from typing import TextIO

from linmem._commands.parser import Refused
from linmem._commands.text import show_size
from linmem._core.arguments import printable
from linmem._core.memory import Image
from linmem._files.atomic_file import write_figure
from linmem._files.delta import Delta
from linmem._files.format import PAGE, round_up

# The classes of a page. A mark of the map that stands for several pages shows the greatest class of these pages.
NOTHING, SAME, GONE, NEW, CHANGED = range(5)
CLASSES = ((NOTHING, "zero in both", "dim", "#f3f5f7", ". "), (SAME, "the same", "dim", "#b9c3cd", "▒="),
           (GONE, "became zero", "cyan", "#2a9fd6", "▁-"), (NEW, "was zero", "green", "#3b9c5b", "▆+"),
           (CHANGED, "changed", "bold red", "#d1493f", "█#"))
MAP_COLUMNS, MAP_CELLS = 64, 1024
PICTURE_COLUMNS, PICTURE_CELLS = 256, 1 << 16


class Pages:
    """The class of each page of two images, as spans of pages of one class.

    The number of spans is proportional to the number of runs of the images.
    """

    def __init__(self, old: Image, new: Image, delta: Delta) -> None:
        self.n = round_up(max(old.offset + old.size, new.offset + new.size), PAGE) // PAGE
        self.begins = [0]
        self.classes = [NOTHING]
        self.totals = [0] * len(CLASSES)        # the number of pages of each class
        first = 0
        inside = [0, 0, 0]                      # whether `first` is in a run of old, of new and of the delta
        for page, source, step in sorted([*edges(0, old.runs()), *edges(1, new.runs()),
                                          *edges(2, delta.ranges + delta.zeros), (self.n, 0, 0)]):
            if page > first:
                in_old, in_new, in_delta = inside
                if not (in_old and in_new):
                    self.add(first, page, NEW if in_new else GONE if in_old else NOTHING)
                elif not in_delta:
                    self.add(first, page, SAME)
                else:       # a delta covers whole host pages, which may be larger than PAGE
                    for each in range(first, page):
                        self.add(each, each + 1, CHANGED if page_of(old, each) != page_of(new, each) else SAME)
                first = page
            inside[source] += step

    def add(self, first: int, end: int, kind: int) -> None:
        self.totals[kind] += max(min(end, self.n) - first, 0)
        if self.classes[-1] != kind:
            self.begins.append(first)
            self.classes.append(kind)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, part: slice) -> list[int]:
        """The classes of the spans that the slice of the pages touches."""
        first, end, _ = part.indices(self.n)
        return self.classes[bisect.bisect_right(self.begins, first) - 1:bisect.bisect_left(self.begins, end)]


def edges(source: int, runs: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(page, source, 1) for the begin of each run and (page, source, -1) for its end."""
    for start, size in runs:
        yield start // PAGE, source, 1
        yield round_up(start + size, PAGE) // PAGE, source, -1


def page_of(image: Image, page: int) -> bytes:
    """The bytes of a page of the memory that has at least one byte in the image."""
    start = page * PAGE - image.offset      # negative: the bytes before the image are zero
    with memoryview(image) as view:
        return (bytes(max(-start, 0)) + view[max(start, 0):start + PAGE]).ljust(PAGE, b"\0")


def show_map(pages: Pages, to: TextIO, *, asked: bool) -> None:
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        if asked:
            raise Refused("--map needs rich: pip install 'linmem[image]'") from None
        return
    console = Console(file=to, highlight=False, soft_wrap=True)
    glyph = 0 if console.encoding.lower().startswith("utf") else 1
    cells, per_cell = grid(pages, MAP_CELLS)
    console.print(Text(f"each mark is {show_size(per_cell * PAGE)}", "dim"))
    marks = [(glyphs[glyph], style) for _, _, style, _, glyphs in CLASSES]
    for row in range(0, len(cells), MAP_COLUMNS):
        console.print(Text.assemble((f"{show_offset(row * per_cell * PAGE):>10} ", "dim"),
                                    *(marks[cell] for cell in cells[row:row + MAP_COLUMNS])))
    legend = [Text.assemble((glyphs[glyph], style), (f" {name}   ", "dim")) for _, name, style, _, glyphs in CLASSES]
    console.print(Text.assemble(" " * 11, *legend))


def grid(pages: Pages, most: int) -> tuple[bytearray, int]:
    """At most `most` cells, each with the greatest class of its pages, and the number of pages in a cell."""
    per_cell = 1 << (max(len(pages) - 1, 0) // most).bit_length()
    return bytearray(max(pages[first:first + per_cell]) for first in range(0, len(pages), per_cell)), per_cell


def show_offset(offset: int) -> str:
    return show_size(offset) if offset else "0"


def draw(path: str, pages: Pages, title: str) -> None:
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
        from numpy import full, nan
    except ImportError as error:
        raise Refused(f"--picture needs matplotlib: pip install 'linmem[image]' ({error})") from None
    cells, per_cell = grid(pages, PICTURE_CELLS)
    rows = max(1, math.ceil(len(cells) / PICTURE_COLUMNS))
    shown = full((rows, PICTURE_COLUMNS), nan)      # NaN is not drawn
    shown.flat[:len(cells)] = list(cells)
    figure = Figure(figsize=(9, 2.2 + 5 * min(rows, 256) / 256), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shown, cmap=ListedColormap([color for _, _, _, color, _ in CLASSES]),
                vmin=-0.5, vmax=len(CLASSES) - 0.5, interpolation="nearest", aspect="auto")
    cell = per_cell * PAGE
    ticks = range(0, rows, max(1, rows // 8))
    axes.set_yticks(ticks, [show_offset(row * PICTURE_COLUMNS * cell) for row in ticks])
    axes.set_xticks([])
    axes.set_xlabel(f"{show_size(PICTURE_COLUMNS * cell)} in a row, {show_size(cell)} in a cell")
    axes.set_title(printable(title), loc="left", fontsize=10, parse_math=False)
    figure.legend(handles=[Patch(facecolor=color, edgecolor="#8894a0", label=name) for _, name, _, color, _ in CLASSES],
                  loc="outside lower left", ncols=len(CLASSES), frameon=False, fontsize=9)
    write_figure(figure, path, dpi=130)
