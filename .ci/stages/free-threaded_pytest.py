"""pytest, which fails if the GIL is on at the end."""

import sys

import pytest

if __name__ == "__main__":      # multiprocessing imports this file in its children
    code = pytest.main()
    assert not sys._is_gil_enabled(), "the GIL was on"
    sys.exit(code)
