"""pytest, which skips each test that starts a process: ThreadSanitizer's own threads do not survive a fork, and the
interpreter that a test starts may not load the extensions that were built for ThreadSanitizer."""

import multiprocessing.process
import os
import subprocess
import sys

import pytest
import tsan_narrow  # noqa: F401


def _start(*_, **__):
    pytest.skip("starts a process")


def pytest_collection_finish():
    os.fork = subprocess.Popen.__init__ = multiprocessing.process.BaseProcess.start = _start


if __name__ == "__main__":
    sys.exit(pytest.main(plugins=[sys.modules[__name__]]))
