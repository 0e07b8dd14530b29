"""Fixtures of the whole suite."""

from __future__ import annotations

import ctypes
import gc
import importlib.machinery
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# `python -m pytest` puts the checkout on the path. If no extensions were built there, the checkout would hide the
# installed package.
CHECKOUT = Path(__file__).resolve().parent.parent
if not any((CHECKOUT / "linmem" / f"_memory{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != CHECKOUT]

import support  # noqa: E402

# A machine under load must not fail a test: no deadline. Profile "ci" looks longer, "few" where each look is slow.
settings.register_profile("default", max_examples=50, stateful_step_count=20, deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), max_examples=300, stateful_step_count=50)
settings.register_profile("few", parent=settings.get_profile("default"), max_examples=10, stateful_step_count=10)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Each arena of glibc's malloc holds inaccessible address space, which would pass for a memory's.
M_ARENA_MAX = -8
if hasattr(ctypes.pythonapi, "mallopt"):
    ctypes.pythonapi.mallopt(M_ARENA_MAX, 1)


def in_a_frame_of_its_name(item):
    """faulthandler ends a test that hangs, and shows the names of functions: the frame has the test's full name, with
    its parameters, which the name of the function lacks."""
    runtest = item.runtest

    def run():
        runtest()

    run.__code__ = run.__code__.replace(co_name=item.nodeid)
    return run


def pytest_collection_modifyitems(config, items):
    """A test that is skipped whatever its parameters are is skipped once: so the number of skips says something.
    Every test gets its frame."""
    kept, left, seen = [], [], set()
    for item in items:
        item.runtest = in_a_frame_of_its_name(item)
        marks = getattr(item.function, "pytestmark", ()) if isinstance(item, pytest.Function) else ()
        whole = any(mark.name == "skipif" and mark.args[0] is True for mark in marks)
        (left if whole and item.function in seen else kept).append(item)
        if whole:
            seen.add(item.function)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


@pytest.fixture(autouse=True, scope="session")
def the_sources_are_out_of_reach(tmp_path_factory):
    """Children put their working directory before the installed package: it must not be the source tree."""
    with pytest.MonkeyPatch.context() as patch:
        if "PYTHONPATH" in os.environ:
            parts = os.environ["PYTHONPATH"].split(os.pathsep)
            patch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, parts)))
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield


@pytest.fixture(autouse=True, scope="session")
def children_compile_no_module_twice():
    """Where Python was told to keep no bytecode, each of hundreds of children would compile all that it imports."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="linmem-bytecode-") as folder:
        if sys.dont_write_bytecode:
            patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
            patch.setenv("PYTHONPYCACHEPREFIX", folder)
        yield


@pytest.fixture(autouse=True, scope="module")
def what_stays_is_not_garbage():
    """What is there before a file's first test, and stays, need not be looked through by each of its gc.collect()."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def interruptible():
    """A run in the background has SIGINT ignored, and Python then leaves it so, here and in children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What a failed test held goes with the test: its exception and its frames would keep that into the next test."""
    report = yield
    if call.excinfo is not None:
        item.stash[FAILED] = report.failed
        for name in ("last_exc", "last_type", "last_value", "last_traceback"):
            vars(sys).pop(name, None)
        error, seen = call.excinfo.value, set()
        while error is not None and id(error) not in seen and not item.config.getoption("usepdb"):
            seen.add(id(error))
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__ or error.__context__
    return report


@pytest.fixture(autouse=True)
def every_mapping_is_given_back(request):
    """The OS must show no more bytes of linmem's mappings after a test than before it, unless the test has failed."""
    if not support.NEEDS["maps"][0]:
        yield
        return
    before = support.live_bytes()
    yield
    if request.node.stash.get(FAILED, False):
        gc.collect()
    elif support.live_bytes() != before:
        gc.collect()
        assert support.live_bytes() == before, "the test left mappings of linmem behind"
