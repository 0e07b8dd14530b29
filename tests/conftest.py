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
CORE = CHECKOUT / "linmem" / "_core"
if not any((CORE / f"memory{suffix}").exists() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != CHECKOUT]

import support  # noqa: E402

# Tests have no deadline, because a machine under load must not fail a test. Profile "ci" tries more examples; profile
# "few" serves runs in which each example is slow.
settings.register_profile("default", max_examples=50, stateful_step_count=20, deadline=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), max_examples=300, stateful_step_count=50)
settings.register_profile("few", parent=settings.get_profile("default"), max_examples=10, stateful_step_count=10)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# A process in the background starts with SIGINT ignored. Python keeps this setting, and children inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Each arena of glibc's malloc holds inaccessible address space, and the tests would count this space as a memory's.
M_ARENA_MAX = -8
if hasattr(ctypes.pythonapi, "mallopt"):
    ctypes.pythonapi.mallopt(M_ARENA_MAX, 1)


def pytest_configure(config):
    """`linmem run` keeps compiled programs in the user's cache directory. The tests give it another one."""
    folder, patch = tempfile.TemporaryDirectory(prefix="linmem-cache-"), pytest.MonkeyPatch()
    config.add_cleanup(folder.cleanup)
    config.add_cleanup(patch.undo)
    if "ZIG_GLOBAL_CACHE_DIR" not in os.environ:        # zig's cache stays where it is
        usual = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        patch.setenv("ZIG_GLOBAL_CACHE_DIR", os.path.join(usual, "zig"))
    patch.setenv("XDG_CACHE_HOME", folder.name)


def in_a_frame_of_its_name(item):
    """faulthandler ends a test that hangs and prints the names of functions. The test's function has the bare name
    only; the frame added here has the full name, with the test's parameters."""
    runtest = item.runtest

    def run():
        runtest()

    run.__code__ = run.__code__.replace(co_name=item.nodeid)
    return run


def pytest_collection_modifyitems(config, items):
    """Skips a test once if it is skipped with all of its parameters, so that the number of skips is meaningful. Gives
    every test a frame of its full name."""
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
    """Children put their working directory before the installed package, so the working directory must not be the
    source tree."""
    with pytest.MonkeyPatch.context() as patch:
        if "PYTHONPATH" in os.environ:
            parts = os.environ["PYTHONPATH"].split(os.pathsep)
            patch.setenv("PYTHONPATH", os.pathsep.join(map(os.path.abspath, parts)))
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        yield


@pytest.fixture(autouse=True, scope="session")
def children_compile_no_module_twice():
    """Without cached bytecode, each of hundreds of children would compile every module that it imports."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="linmem-bytecode-") as folder:
        if sys.dont_write_bytecode:
            patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
            patch.setenv("PYTHONPYCACHEPREFIX", folder)
        yield


@pytest.fixture(autouse=True, scope="module")
def older_objects_are_not_garbage():
    """gc.collect() in a test need not look through the objects that existed before the file's first test."""
    gc.collect()
    gc.freeze()


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Drops the exception of a failed test, because its frames would keep the test's memories alive into the next
    test."""
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
    """Checks that the OS shows no more bytes of linmem's mappings after a test than before the test. A failed test is
    not checked."""
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
