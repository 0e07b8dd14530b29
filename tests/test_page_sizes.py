"""The same guarantees with larger host pages: the tests of memories run again in a child with the override."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import REAL_PAGE, ROOT, answer, requires

HERE = Path(__file__).parent
AGAIN = ["test_layout.py", "test_memory_growth.py", "test_memory_bytes.py", "test_memory_pages.py", "test_failures.py",
         "test_adaptors.py", "test_stateful.py"]


@pytest.mark.slow
@requires("real_pages")
@pytest.mark.parametrize("page", [size for size in (16384, 65536) if size > REAL_PAGE])
def test_the_suite_of_the_memories_passes_on_larger_host_pages(page, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"),
         *(str(HERE / name) for name in AGAIN)],
        # not the source folder, which has no built extensions
        capture_output=True, text=True, timeout=600, cwd=tmp_path,
        env={**os.environ, "LINMEM_PAGE_SIZE": str(page), "HYPOTHESIS_PROFILE": "default",
             "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr
    assert " passed" in done.stdout


@requires("real_pages")
def test_every_size_is_rounded_to_the_override():
    page = max(65536, 2 * REAL_PAGE)
    assert answer("""
        import linmem
        mem = linmem.create(5, maximum=6)
        i = mem.info()
        print(i.page_size, i.base % i.page_size, i.committed, i.byte_capacity, i.guard % i.page_size)
        """, env={"LINMEM_PAGE_SIZE": str(page)}) == f"{page} 0 {page} {page} 0"


@pytest.mark.parametrize("wrong", ["0", "-4096", "4097", "1", "x", "4096.0", str(1 << 31)])
def test_an_override_that_cannot_be_is_refused_by_name(wrong):
    assert "LINMEM_PAGE_SIZE must be a power of two" in answer("""
        try:
            import linmem
        except ValueError as error:
            print(error)
        """, env={"LINMEM_PAGE_SIZE": wrong})
