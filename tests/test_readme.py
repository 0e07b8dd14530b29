"""README and the documentation are correct: every Python block runs, alone, in a child process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import linmem

pytest.importorskip("numpy")
pytest.importorskip("wasmtime")

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(<!-- dies -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Exit codes: segmentation fault, bus error (macOS), and access violation on Windows.
DEATHS = {-11, -10, -7, 0xC0000005, 0xC0000005 - (1 << 32)}
BLOCKS = [
    pytest.param(block[2], bool(block[1]), id=f"{page.name}:{block.string.count(chr(10), 0, block.start()) + 1}")
    for page in PAGES for block in BLOCK.finditer(page.read_text("utf-8"))
]


def run(code: str, cwd: Path) -> subprocess.CompletedProcess:
    here = str(Path(linmem.__file__).resolve().parent.parent)
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=cwd, timeout=120, text=True,
                          env={**os.environ, "PYTHONPATH": here}, capture_output=True)


@pytest.mark.parametrize(("code", "dies"), BLOCKS)
def test_a_python_block_does_what_the_page_says(code, dies, tmp_path):
    # die_quietly() starts no debugger on a crash; a debugger would block the test.
    child = run(f"from linmem._os import pages\npages.die_quietly()\n{code}" if dies else code, tmp_path)
    if dies:
        assert child.returncode in DEATHS, f"exit {child.returncode}\n{child.stdout}\n{child.stderr}"
    else:
        assert child.returncode == 0, child.stderr


def test_the_readme_shows_one_script_that_crashes_and_a_version_that_works():
    blocks = [(bool(block[1]), block[2]) for block in BLOCK.finditer(PAGES[0].read_text("utf-8"))]
    assert [dies for dies, _ in blocks] == [False, False, True, False, False]
    assert all("store.close()" in code for _, code in blocks[2:4])


def test_the_array_that_grows_under_a_live_view_takes_at_most_fifteen_lines():
    code = [block[2] for block in BLOCK.finditer(PAGES[0].read_text("utf-8"))][1]
    assert len(code.splitlines()) <= 15


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"],
                         ids=lambda page: page.name)
def test_a_link_to_a_file_of_this_project_points_to_an_existing_file(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []
