"""README and the documentation are correct: every Python block runs in a child process.

A block runs alone, unless a comment before it names a file: these blocks of a page are files of one folder.
test_tutorials.py follows the tutorials.
"""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support import NEEDS, requires

import linmem

pytest.importorskip("numpy")
pytest.importorskip("wasmtime")

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- (dies|file: \S+) -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Files of one folder, and commands to run in it.
FILE = re.compile(r"^<!-- (?:file: (\S+)|run) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Exit codes: segmentation fault, bus error (macOS), and access violation on Windows.
DEATHS = {-11, -10, -7, 0xC0000005, 0xC0000005 - (1 << 32)}
BLOCKS = [
    pytest.param(block[2], bool(block[1]), id=f"{page.name}:{block.string.count(chr(10), 0, block.start()) + 1}")
    for page in PAGES for block in BLOCK.finditer(page.read_text("utf-8")) if block[1] in (None, "dies")
]


def run(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    here = str(Path(linmem.__file__).resolve().parent.parent)
    return subprocess.run([sys.executable, "-W", "error", *arguments], cwd=cwd, timeout=120, text=True,
                          env={**os.environ, "PYTHONPATH": here, "PYTHONSAFEPATH": ""}, capture_output=True)


@pytest.mark.parametrize(("code", "dies"), BLOCKS)
def test_a_python_block_does_what_the_page_says(code, dies, tmp_path):
    if lacks(code):
        pytest.skip("a package or a feature of the OS is missing")
    # die_quietly() starts no debugger on a crash; a debugger would block the test.
    child = run(tmp_path, "-c", f"from linmem._os import pages\npages.die_quietly()\n{code}" if dies else code)
    if dies:
        assert child.returncode in DEATHS, f"exit {child.returncode}\n{child.stdout}\n{child.stderr}"
    else:
        assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name != "tutorials"
                                  and FILE.search(page.read_text("utf-8"))],
                         ids=lambda page: page.name)
def test_the_files_of_a_page_work_in_one_folder_one_after_the_other(page, tmp_path):
    shown = page.read_text("utf-8")
    for name, text in FILE.findall(shown):
        if name:
            assert f"`{name}`" in shown, "the comment before a block is not visible in the page"
            (tmp_path / name).write_text(text, "utf-8")
        commands = [[name]] if name.endswith(".py") else [] if name else [
            ["-m", *shlex.split(line, comments=True)] for line in text.splitlines()]
        if lacks(text):
            continue
        for command in commands:
            child = run(tmp_path, *command)
            assert child.returncode == 0, f"{command}\n{child.stdout}\n{child.stderr}"


def lacks(text: str) -> bool:
    """Whether a block needs a package or a feature of the OS that is missing here."""
    return any(part in text and not NEEDS[need][0]
               for part, need in (("import distributed", "dask"), ("linmem.attach(", "shared"),
                                  (".handle()", "maps_images"),
                                  ("metrics.publish(", "published"), ("linmem.open_file(", "file_memories"),
                                  ('creator("file"', "file_memories"), ('creator("shared"', "shared"),
                                  ('get_context("fork")', "fork"),
                                  ('linmem.attach("prices")', "shm_files"),
                                  (".map(", "maps_images"), ("RLIMIT_AS", "large_space"),
                                  ("RLIMIT_AS, (1 << 30", "gil"),       # Python itself reserves a GiB without it
                                  *((f"import {name}", name) for name in
                                    ("memray", "psutil", "pandas", "pyarrow", "polars", "numba", "torch"))))


def test_each_refusal_that_the_guide_lists_is_a_text_of_linmem():
    texts = []
    for path in (Path(linmem.__file__).parent / "_wasm").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\u2026"
                                     for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    section = (ROOT / "docs" / "howto" / "start-anywhere.md").read_text("utf-8").partition("## Refusals")[2]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    listed = [text for row in rows for text in re.findall("`(.*?)`", row)]
    assert len(listed) >= 10
    patterns = {text: ".*".join(map(re.escape, text.split("\u2026"))) for text in listed}
    assert [text for text, pattern in patterns.items() if not any(re.search(pattern, known) for known in texts)] == []


@pytest.mark.parametrize("module", ["linmem", "linmem.wasmtime", "linmem.metrics", "linmem.dask"])
def test_the_reference_has_each_public_name(module):
    if module == "linmem.dask":
        pytest.importorskip("distributed")
    pages = "".join(page.read_text("utf-8") for page in (ROOT / "docs" / "reference" / "api").glob("*.md"))
    shown = re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)$", pages, re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert sorted(name for name in shown if name.rpartition(".")[0] == module) == sorted(
        f"{module}.{name}" for name in importlib.import_module(module).__all__)


def test_the_readme_shows_one_script_that_crashes_and_a_version_that_works():
    blocks = [(bool(block[1]), block[2]) for block in BLOCK.finditer(PAGES[0].read_text("utf-8"))]
    assert [dies for dies, _ in blocks[:5]] == [False, False, True, False, False]
    assert not any(dies for dies, _ in blocks[5:])
    assert all("store.close()" in code for _, code in blocks[2:4])


def test_the_array_that_grows_under_a_live_view_takes_at_most_fifteen_lines():
    code = [block[2] for block in BLOCK.finditer(PAGES[0].read_text("utf-8"))][1]
    assert len(code.splitlines()) <= 15


def test_a_snapshot_is_saved_opened_started_and_restored_in_ten_lines():
    code = [block[2] for block in BLOCK.finditer(PAGES[0].read_text("utf-8"))][4]
    lines = code[code.index("store = "):].splitlines()
    assert len([line for line in lines if line]) <= 10
    assert all(word in code for word in ("take(", "save(", "open(", "start=", "restore("))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"],
                         ids=lambda page: page.name)
def test_a_link_to_a_file_of_this_project_points_to_an_existing_file(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_each_picture_is_an_svg_that_says_what_it_shows_and_stands_on_a_page():
    pages = "".join(page.read_text("utf-8") for page in PAGES)
    for name, draw in pictures().PICTURES.items():
        svg = ElementTree.fromstring(draw().svg())
        assert svg.tag == "{http://www.w3.org/2000/svg}svg"
        assert svg.find("{http://www.w3.org/2000/svg}title").text
        assert len(svg.get("aria-label")) > 60, name
        assert f"```{{picture}} {name}\n" in pages


def test_a_stored_picture_is_what_its_script_draws():
    module = pictures()
    for name, path in module.STORED.items():
        assert path.read_text("utf-8") == module.PICTURES[name]().svg(), "run: python docs/pictures.py"
        assert f"]({path.relative_to(ROOT).as_posix()})" in PAGES[0].read_text("utf-8")


@requires("matplotlib")
def test_the_logo_for_other_sites_has_the_rectangles_of_the_logo():
    import matplotlib.image

    module = pictures()
    stored = matplotlib.image.imread(module.LOGO.with_suffix(".png"))      # float32 of 0 to 1
    assert (255 * stored).round().tolist() == module.logo().tolist(), "run: python docs/pictures.py"
    assert len({tuple(pixel) for row in module.logo().tolist() for pixel in row}) == 4       # 3 colours and nothing


def luminance(colour):
    """By WCAG 2.1."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [part / 255 for part in bytes.fromhex(digits)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("palette", "page"), [("LIGHT", "#ffffff"), ("DARK", "#131416")])
def test_the_text_of_the_pictures_has_the_contrast_of_4_5_that_wcag_asks_for(palette, page):
    colours = dict(re.findall(r"--(\w+):(#\w+)", getattr(pictures(), palette)), page=page)
    for text, behind in (("text", "live"), ("bad", "wash"), ("bad", "page"), ("ink", "pale"), ("ink", "held"),
                         ("ink", "sky"), ("ink", "page"), ("soft", "held"), ("soft", "pale"), ("soft", "sky"),
                         ("soft", "page"), ("blue", "sky"), ("blue", "page")):
        low, high = sorted((luminance(colours[text]), luminance(colours[behind])))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, behind)


def pictures():
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
