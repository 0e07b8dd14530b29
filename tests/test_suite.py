"""The suite itself: a hanging test is named and ends the run, and `python -m pytest` works like `pytest`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, requires

HERE = Path(__file__).parent


def run_pytest(folder, *arguments, cwd=None, **env):
    """Runs `python -m pytest` in a child, with the options and the conftest.py of this suite."""
    path = os.pathsep.join(dict.fromkeys(filter(None, [str(HERE), *sys.path])))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"),
         "--rootdir", str(folder), *arguments],
        capture_output=True, text=True, timeout=200, cwd=cwd or folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "", "HYPOTHESIS_PROFILE": "default", **env})


WAITS = {"without the GIL": "threading.Event().wait()", "with the GIL": "ctypes.PyDLL(None).pause()"}


@pytest.mark.parametrize("how", [
    "without the GIL", pytest.param("with the GIL", marks=requires("descriptors"))])     # pause(2) needs POSIX
def test_a_test_that_hangs_ends_the_run_and_is_named_with_its_parameters(how, tmp_path):
    (tmp_path / "test_hanging.py").write_text(f"""
import ctypes, threading
import pytest

@pytest.mark.parametrize("value", ["first", "second", "third"])
def test_with(value):
    if value == "second":
        {WAITS[how]}
""")
    for seconds in (1, 10, 60):     # on a slow machine, a limit of 1 second may end another part of the run
        done = run_pytest(tmp_path, "-o", f"faulthandler_timeout={seconds}", "test_hanging.py")
        if "[second]" in done.stderr:
            break
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Timeout" in done.stderr
    assert "in test_hanging.py::test_with[second]" in done.stderr
    assert "passed" not in done.stdout


def test_every_test_has_a_time_limit_that_ends_the_run(request):
    assert 60 <= float(request.config.getini("faulthandler_timeout")) <= 600
    assert request.config.getini("faulthandler_exit_on_timeout") is True


@requires("maps")
def test_objects_of_a_failed_test_do_not_make_other_tests_fail(tmp_path):
    (tmp_path / "test_leaving.py").write_text("""
import linmem, linmem.metrics, pytest, support

AT_FIRST = linmem.metrics.totals(), support.live_bytes()

@pytest.fixture
def pool():
    return linmem.PoolingCreator()

def test_fails(pool):
    mem, kept = linmem.create(1), pool.create(1)
    def cycle():
        return cycle, mem
    assert not cycle

def test_raises(pool):
    try:
        kept = pool.create(1)
        raise ValueError(kept)
    except ValueError as error:
        raise KeyError(linmem.create(1)) from error

def test_finds_the_process_as_it_should_be():
    assert (linmem.metrics.totals(), support.live_bytes()) == AT_FIRST

def test_leaks():
    global leaked
    leaked = linmem.create(1)

def test_is_not_blamed_for_it():
    linmem.create(1).close()
""")
    done = run_pytest(tmp_path, "-q", "test_leaving.py")
    assert "2 failed, 3 passed, 1 error in" in done.stdout
    for name in ("FAILED test_leaving.py::test_fails ", "FAILED test_leaving.py::test_raises ",
                 "ERROR test_leaving.py::test_leaks "):
        assert name in done.stdout


@requires("sources", "compiler")
def test_python_m_pytest_works_from_the_checkout():
    done = run_pytest(ROOT, "-q", "tests/test_cimport.py", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@requires("sources")
def test_a_checkout_in_which_nothing_was_built_does_not_hide_the_installed_package(tmp_path):
    for name in ("linmem", "tests"):
        (tmp_path / name).mkdir()
    (tmp_path / "linmem" / "__init__.py").write_text("raise ImportError('nothing was built here')")
    for name in ("conftest.py", "support.py"):
        (tmp_path / "tests" / name).write_bytes((HERE / name).read_bytes())
    (tmp_path / "tests" / "test_import.py").write_text(
        "import linmem\n\ndef test_import():\n    linmem.create(1).close()\n")
    path = [entry for entry in sys.path if entry and Path(entry).resolve() != HERE]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"], capture_output=True, text=True,
        timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": ""})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
