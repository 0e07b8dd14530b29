"""The pictures of the pages, drawn as SVG, and the Sphinx directives that show them.

`picture` shows a picture of this file, and `plot` the plot that `linmem bench --from docs/figures/SUITE.json --picture`
draws. Both put the SVG into the page, so the colours follow the theme's switch between light and dark. README shows a
stored file: `python docs/pictures.py` writes the files of STORED and the logo as PNG, and tests compare them.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

WIDTH = 440                     # of every picture; the text stays readable on a phone, where a page has 358 pixels
HERE = Path(__file__).resolve().parent
# A picture in a page follows the theme's switch (`data-theme`). A stored file follows the reader's system.
LIGHT = ("--ink:#22303c;--soft:#56616e;--line:#9aa7b3;--live:#1a7f5a;--pale:#cfeadd;--text:#fff;--held:#e9edf1;"
         "--bad:#b13224;--wash:#f7dcd8;--blue:#28649f;--sky:#d6e6f6")
DARK = ("--ink:#e4e9ee;--soft:#a8b4bf;--line:#66727e;--live:#25805f;--pale:#1f4a3b;--text:#fff;--held:#2a3138;"
        "--bad:#ee7c6b;--wash:#4a2622;--blue:#6ea7e4;--sky:#1e3a57")
STYLE = (f".lm{{{LIGHT}}}@media(prefers-color-scheme:dark){{.lm{{{DARK}}}}}"
         f"body[data-theme=light] .lm{{{LIGHT}}}body[data-theme=dark] .lm{{{DARK}}}"
         ".lm text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif;fill:var(--ink)}"
         ".lm .code{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:12px}"
         ".lm .soft{fill:var(--soft);font-size:12px}.lm .on{fill:var(--text)}.lm .bad{fill:var(--bad)}"
         ".lm .strong{font-weight:600}.lm .blue{fill:var(--blue)}")


class Picture:
    """An SVG under construction. Coordinates are pixels, from the top left corner."""

    def __init__(self, height: int, title: str, alt: str):
        self.title, self.alt, self.height = title, alt, height
        self.parts: list[str] = []

    def box(self, x: float, y: float, width: float, height: float, fill: str = "held", line: str = "line",
            dashed: bool = False, radius: float = 4) -> None:
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        colour = f"var(--{fill})" if fill != "none" else "none"
        self.parts.append(f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"'
                          f' style="fill:{colour};stroke:var(--{line})"{dashes}/>')

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        kinds = f' class="{kind}"' if kind else ""
        at = f' text-anchor="{anchor}"' if anchor != "start" else ""
        self.parts.append(f'<text x="{x:g}" y="{y:g}"{kinds}{at}>{escape(words)}</text>')

    def path(self, data: str, line: str = "line", width: float = 1.5, dashed: bool = False) -> None:
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<path d="{data}" style="fill:none;stroke:var(--{line});stroke-width:{width:g}"{dashes}/>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float, line: str = "soft", dashed: bool = False) -> None:
        """A horizontal or vertical arrow."""
        dx, dy = (to_x > x) - (to_x < x), (to_y > y) - (to_y < y)
        self.path(f"M{x:g} {y:g}L{to_x:g} {to_y:g}", line, dashed=dashed)
        left, right = (to_x - 6 * dx - 4 * dy, to_y - 6 * dy - 4 * dx), (to_x - 6 * dx + 4 * dy, to_y - 6 * dy + 4 * dx)
        self.path(f"M{left[0]:g} {left[1]:g}L{to_x:g} {to_y:g}L{right[0]:g} {right[1]:g}", line)

    def bracket(self, x: float, to_x: float, y: float, words: str, line: str = "soft", kind: str = "soft") -> None:
        """A bracket that opens downwards, with words above."""
        self.path(f"M{x:g} {y + 6:g}V{y:g}H{to_x:g}V{y + 6:g}", line)
        self.text((x + to_x) / 2, y - 6, words, kind, "middle")

    def svg(self) -> str:
        return (f'<svg xmlns="http://www.w3.org/2000/svg" class="lm" viewBox="0 0 {WIDTH} {self.height}" role="img"'
                f' aria-label="{escape(self.alt)}"><title>{escape(self.title)}</title><style>{STYLE}</style>'
                + "".join(self.parts) + "</svg>\n")


def layout() -> Picture:
    p = Picture(206, "The layout of a memory", "A memory is one range of address space. A guard that cannot be accessed"
                " comes first. The accessible bytes follow, from the base up to byte_size. Reserved address space"
                " follows, up to the capacity, and a second guard comes last.")
    p.bracket(62, 378, 34, "capacity: address space, reserved once")
    for x, width, fill, line in ((8, 54, "wash", "bad"), (62, 134, "live", "live"), (196, 182, "held", "line"),
                                 (378, 54, "wash", "bad")):
        p.box(x, 50, width, 50, fill, line, radius=0)
    p.text(35, 79, "guard", "bad", "middle")
    p.text(129, 79, "accessible", "on strong", "middle")
    p.text(287, 72, "reserved", "", "middle")
    p.text(287, 88, "no page behind it yet", "soft", "middle")
    p.text(405, 79, "guard", "bad", "middle")
    for x in (62, 196, 378):
        p.path(f"M{x} 100V114", "soft")
    p.text(62, 128, "base", "code", "middle")
    p.text(62, 144, "never moves", "soft", "middle")
    p.text(196, 128, "byte_size", "code", "middle")
    p.text(378, 128, "base + capacity", "code", "middle")
    p.arrow(200, 144, 290, 144, "live")
    p.text(204, 162, "grow_to() makes more accessible", "soft")
    p.text(8, 192, "an access outside the accessible bytes is a fault", "bad")
    return p


def growth() -> Picture:
    p = Picture(308, "Growth under a view", "With linmem, mem.grow_to makes reserved pages after the accessible bytes"
                " accessible. The base stays the same, and a view from before the growth stays valid. An array that"
                " grows by a copy has a new address, and a view from before shows the freed block.")
    p.text(8, 18, "linmem", "strong")
    p.path("M8 36V190", "live", 1.5, True)
    p.text(14, 52, "mem", "code")
    p.box(8, 60, 110, 34, "live", "live", radius=0)
    p.box(118, 60, 314, 34, "none", "line", True, 0)
    p.text(275, 82, "reserved address space", "soft", "middle")
    p.text(63, 82, "bytes", "on", "middle")
    p.bracket(10, 116, 118, "")
    p.text(63, 112, "view", "code blue", "middle")
    p.text(200, 120, "mem.grow_to(...)", "code")
    p.arrow(190, 102, 190, 130, "live")
    p.box(8, 134, 110, 34, "live", "live", radius=0)
    p.box(118, 134, 190, 34, "pale", "live", radius=0)
    p.box(308, 134, 124, 34, "none", "line", True, 0)
    p.text(63, 156, "same bytes", "on", "middle")
    p.text(213, 156, "new, zero", "", "middle")
    p.text(14, 186, "same address, the view stays valid, no copy", "soft")
    p.path("M8 204H432", "line", 1)
    p.text(8, 228, "growth by a copy", "strong")
    p.box(8, 246, 110, 34, "wash", "bad", True, 0)
    p.text(63, 268, "freed", "bad", "middle")
    p.arrow(124, 263, 172, 263, "soft")
    p.text(148, 256, "copy", "soft", "middle")
    p.box(178, 246, 110, 34, "held", "line", radius=0)
    p.box(288, 246, 144, 34, "held", "line", radius=0)
    p.text(233, 268, "old bytes", "", "middle")
    p.text(360, 268, "new bytes", "", "middle")
    p.text(8, 300, "an old view dangles, or the growth is refused", "bad")
    return p


def pool() -> Picture:
    p = Picture(232, "The slots of a pool over time", "Three slots of a pool over time. A slot serves a guest, then it"
                " is idle and warm, and then it serves the next guest at once. A warm slot that is idle for a long time"
                " becomes cold: the pool gives its pages back and keeps only the address space.")
    rows = (((0, 92, "guest A"), (92, 52, ""), (144, 112, "guest C"), (256, 34, ""), (290, 82, "guest E")),
            ((26, 124, "guest B"), (150, 48, ""), (198, 78, "guest D"), (276, 96, "")),
            ((52, 66, "burst"), (118, 130, ""), (248, 124, "cold")))
    for row, slots in enumerate(rows):
        y = 18 + 44 * row
        p.text(8, y + 21, f"slot {row + 1}")
        for x, width, words in slots:
            fill, line = ("held", "line") if words == "cold" else ("live", "live") if words else ("pale", "live")
            p.box(60 + x, y, width, 32, fill, line, words == "cold", 3)
            if words and words != "cold":
                p.text(60 + x + width / 2, y + 21, words, "on", "middle")
    p.arrow(60, 156, 432, 156)
    p.text(432, 172, "time", "soft", "end")
    for y, fill, line, words in ((164, "live", "live", "in use"),
                                 (186, "pale", "live", "warm: zeroed, its pages are kept"),
                                 (208, "held", "line", "cold: only the address space is kept")):
        p.box(60, y, 22, 14, fill, line, fill == "held", 3)
        p.text(90, y + 12, words)
    return p


def images() -> Picture:
    p = Picture(232, "Memories that share the pages of an image", "An image has eight pages. Three memories start from"
                " the image and share its pages. A page is copied when a memory first writes to it. The first memory"
                " has written one page, the second none, and the third two.")
    p.text(8, 20, "image", "strong")
    for i in range(8):
        p.box(8 + 34 * i, 30, 30, 30, "blue", "blue", radius=3)
    p.text(288, 50, "immutable", "soft")
    for row, written in enumerate(((2,), (), (4, 5))):
        y = 92 + 38 * row
        for i in range(8):
            own = i in written
            p.box(8 + 34 * i, y, 30, 26, "live" if own else "sky", "live" if own else "blue", not own, 3)
        p.text(288, y + 18, ("1 page of its own", "shares all pages", "2 pages of its own")[row], "soft")
    p.text(8, 84, "memories", "strong")
    for x, fill, line, words in ((8, "sky", "blue", "shared with the image"),
                                 (196, "live", "live", "copied at the first write")):
        p.box(x, 208, 22, 14, fill, line, fill == "sky", 3)
        p.text(x + 30, 220, words)
    return p


def layers() -> Picture:
    p = Picture(314, "The layers of linmem", "Seven layers, from the top: command line and benchmarks; factory,"
                " wasmtime, arrays and Dask in Python; pool, adaptors and the bridge to wasmtime; images; memories;"
                " page calls; arithmetic, errors and traits. Imports point down only.")
    rows = (("command line, benchmarks", "for users", "held"), ("factory, wasmtime, arrays, Dask", "Python", "sky"),
            ("pool, adaptors, bridge to wasmtime", "Cython", "pale"), ("images, deltas", "Cython", "pale"),
            ("memories: structs, hooks, locks", "Cython", "pale"),
            ("page calls, one file for each OS", "mmap ...", "live"),
            ("arithmetic, errors, traits", "no OS", "held"))
    for i, (words, kind, fill) in enumerate(rows):
        y = 8 + 38 * i
        p.box(30, y, 402, 32, fill, "live" if fill in ("pale", "live") else "blue" if fill == "sky" else "line")
        p.text(42, y + 21, words, "on strong" if fill == "live" else "")
        p.text(420, y + 21, kind, "on" if fill == "live" else "soft", "end")
    p.arrow(14, 14, 14, 268)
    p.text(8, 300, "An import points down, never up or sideways.", "soft")
    return p


def windows() -> Picture:
    p = Picture(214, "A window of a memory", "A memory has a window. The window shows the pages of an image, of a file"
                " or of a shared memory without a copy. The other pages are the memory's own.")
    p.text(8, 20, "memory", "strong")
    for x, width, fill, line in ((8, 150, "live", "live"), (158, 130, "sky", "blue"), (288, 100, "live", "live")):
        p.box(x, 30, width, 40, fill, line, radius=0)
    p.box(388, 30, 44, 40, "held", "line", radius=0)
    p.text(83, 55, "own pages", "on", "middle")
    p.text(223, 55, "window", "blue strong", "middle")
    p.text(338, 55, "own pages", "on", "middle")
    p.path("M158 70L98 126M288 70L228 126", "blue", 1.5, True)
    p.text(272, 102, "the same pages, no copy", "soft")
    p.box(8, 126, 90, 40, "held", "line", radius=0)
    p.box(98, 126, 130, 40, "blue", "blue", radius=0)
    p.box(228, 126, 204, 40, "held", "line", radius=0)
    p.text(163, 151, "shown part", "on", "middle")
    p.text(8, 186, "an image, a file or a shared memory", "strong")
    p.text(8, 204, "mem.map(offset, source, source_offset, size)", "code")
    return p


def sharing() -> Picture:
    p = Picture(232, "One memory in two processes", "Two processes attach one shared memory. Each process has its own"
                " base address. The pages are the same. When one process grows the memory, the other process sees the"
                " new pages, and no base moves.")
    for y, name, base in ((8, "process 1", "base 0x7f10..."), (168, "process 2", "base 0x7e84...")):
        p.box(8, y, 424, 56, "none", "line", radius=8)
        p.text(20, y + 24, name, "strong")
        p.text(20, y + 42, base, "code")
        p.box(160, y + 12, 130, 32, "pale", "live", radius=0)
        p.box(290, y + 12, 60, 32, "pale", "live", radius=0)
        p.box(350, y + 12, 70, 32, "none", "line", True, 0)
        p.text(225, y + 33, "accessible", "", "middle")
        p.text(320, y + 33, "new", "", "middle")
        p.text(385, y + 33, "reserved", "soft", "middle")
    p.box(160, 98, 130, 36, "live", "live", radius=0)
    p.box(290, 98, 60, 36, "live", "live", radius=0)
    p.text(225, 121, "the same pages", "on strong", "middle")
    p.text(320, 121, "grown", "on", "middle")
    for x in (160, 350):
        p.path(f"M{x} 52V98M{x} 134V180", "live", 1.5, True)
    p.text(20, 112, "mem.handle()", "code")
    p.text(20, 130, "attach(handle)", "code")
    return p


def snapshots() -> Picture:
    p = Picture(226, "Initialise once, start anywhere", "A guest runs its long initialisation once. The snapshot is a"
                " file. Instances in other stores, in other processes and on other machines start from the file, and"
                " share its pages until they write to them.")
    p.box(8, 64, 112, 64, "sky", "blue")
    p.text(64, 92, "init()", "code strong", "middle")
    p.text(64, 112, "once, slow", "soft", "middle")
    p.arrow(124, 96, 158, 96)
    p.box(162, 52, 108, 88, "blue", "blue")
    p.text(216, 86, "snapshot", "on strong", "middle")
    p.text(216, 106, "memories,", "on", "middle")
    p.text(216, 123, "globals, tables", "on", "middle")
    for y, words in ((8, "another store"), (77, "another process"), (146, "another machine")):
        p.path(f"M270 96C288 96 286 {y + 19} 302 {y + 19}", "soft")
        p.box(304, y, 128, 38, "pale", "live")
        p.text(368, y + 24, words, "", "middle")
    p.text(8, 204, "Each start takes about as long as a plain instance,", "soft")
    p.text(8, 220, "and copies a page only when the guest writes to it.", "soft")
    return p


PICTURES: dict[str, Callable[[], Picture]] = {picture.__name__: picture for picture in (
    layout, growth, pool, images, layers, windows, sharing, snapshots)}
STORED = {"growth": HERE / "_static" / "growth.svg"}         # shown by README
LOGO = HERE / "_static" / "linmem.svg"


def logo() -> Any:
    """The pixels of the logo (uint8; height, width, RGBA), for the cards that other sites show. Cards take no SVG."""
    import numpy

    pixels = numpy.zeros((256, 256, 4), numpy.uint8)
    rectangle = r'<rect x="(\d+)" y="(\d+)" width="(\d+)" height="(\d+)" fill="#(\w+)"/>'
    for *numbers, colour in re.findall(rectangle, LOGO.read_text("utf-8")):
        x, y, width, height = (8 * int(number) for number in numbers)
        pixels[y:y + height, x:x + width] = *bytes.fromhex(colour), 255
    return pixels


FIGURES = HERE / "figures"      # of `linmem bench --json`, one file for each suite
# Colours of the plots that have another value in the dark, and the variables of _static/linmem.css or of the theme.
COLOURS = {"#ffffff": "color-background-primary", "#22303c": "color-foreground-primary",
           "#6b7785": "color-foreground-muted", "#f5f7f9": "color-background-secondary",
           "#e3e8ed": "color-background-border", "#c3ccd5": "color-background-border", "#1a7f5a": "plot-good",
           "#c0392b": "plot-bad", "#5b6b7b": "plot-plain", "#22456f": "plot-blue", "#5b3f8f": "plot-violet"}


def plot(path: Path) -> str:
    """The plot of a file of figures, as SVG for a page."""
    import matplotlib

    from linmem.bench import report

    results, about = report.read_json(str(path))
    with tempfile.TemporaryDirectory() as folder, matplotlib.rc_context(
            {"svg.fonttype": "none", "svg.hashsalt": about.suite}):
        drawn = Path(folder, "plot.svg")
        report.draw(str(drawn), results, about)
        svg = drawn.read_text("utf-8")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)                    # every plot has these names
    svg = re.sub("#[0-9a-f]{6}", lambda m: f"var(--{COLOURS[m[0]]})" if m[0] in COLOURS else m[0], svg)
    rows = [f"{row.operation} against {row.against}: {report.times(row.judged())}"
            for result in results for row in result.rows if row.goal is not None and row.judged() is not None]
    alt = f"Plot of the suite {about.suite}. {'; '.join(rows)}."
    return re.sub(r'<svg .*?(viewBox="[^"]*").*?>', lambda m: (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {m[1]} role="img"'
        f' aria-label="{escape(alt)}">'), svg, count=1, flags=re.DOTALL)


def setup(app: Any) -> dict[str, Any]:
    """Add the directives `{picture} NAME` and `{plot} SUITE`."""
    from docutils import nodes
    from docutils.parsers.rst import Directive

    class PictureDirective(Directive):
        required_arguments = 1

        def run(self) -> list[nodes.Node]:
            name = self.arguments[0]
            if name not in PICTURES:
                raise self.error(f"no picture {name!r}; there are: {', '.join(PICTURES)}")
            return [nodes.raw("", f'<figure class="picture">{PICTURES[name]().svg()}</figure>', format="html")]

    class PlotDirective(Directive):
        required_arguments = 1

        def run(self) -> list[nodes.Node]:
            path = FIGURES / f"{self.arguments[0]}.json"
            self.state.document.settings.env.note_dependency(str(path))
            return [nodes.raw("", f'<figure class="plot">{plot(path)}</figure>', format="html")]

    app.add_directive("picture", PictureDirective)
    app.add_directive("plot", PlotDirective)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    from matplotlib.image import imsave

    imsave(LOGO.with_suffix(".png"), logo())
    for name, path in STORED.items():
        path.write_text(PICTURES[name]().svg(), "utf-8")
        print(path, file=sys.stderr)
