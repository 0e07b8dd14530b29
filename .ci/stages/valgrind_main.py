"""Runs pytest or a file, without PAGEMAP_SCAN: valgrind does not know that this call writes to memory."""

import runpy
import sys

from linmem._os import pages

pages.choose_scan("reading")
del sys.argv[0]
if sys.argv[0] == "pytest":
    runpy.run_module("pytest", run_name="__main__")
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
