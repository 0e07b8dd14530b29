"""README and the documentation are correct: every Python block runs in a child process.

A block runs alone, unless a comment before it names a file: these blocks of a page are files of one folder.
"""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support import NEEDS

import linmem

pytest.importorskip("numpy")
pytest.importorskip("wasmtime")

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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


@pytest.mark.parametrize("page", [page for page in PAGES if FILE.search(page.read_text("utf-8"))],
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
               for part, need in (("import distributed", "dask"), (".handle()", "maps_images"),
                                  ("metrics.publish(", "published"), ("linmem.open_file(", "file_memories"),
                                  ('creator("file"', "file_memories"), ('creator("shared"', "shared"),
                                  (".map(", "maps_images"),
                                  ("import memray", "memray"), ("import psutil", "psutil")))


def test_each_refusal_that_the_guide_lists_is_a_text_of_linmem():
    texts = []
    for path in (Path(linmem.__file__).parent / "_wasm").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\u2026"
                                     for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    section = (ROOT / "docs" / "start-anywhere.md").read_text("utf-8").partition("## Refusals")[2]
    rows = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    listed = [text for row in rows for text in re.findall("`(.*?)`", row)]
    assert len(listed) >= 10
    patterns = {text: ".*".join(map(re.escape, text.split("\u2026"))) for text in listed}
    assert [text for text, pattern in patterns.items() if not any(re.search(pattern, known) for known in texts)] == []


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
