"""pytest, whose child processes do not search for leaks."""

import os
import sys

import pytest

if __name__ == "__main__":      # multiprocessing imports this file in its children
    os.environ["ASAN_OPTIONS"] = os.environ["CHILD_ASAN_OPTIONS"]
    sys.exit(pytest.main())
