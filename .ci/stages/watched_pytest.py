"""pytest in a process with the fault report, tracking and tracemalloc on."""

import sys
import tracemalloc

import pytest

import linmem
from linmem import creators

if __name__ == "__main__":      # multiprocessing imports this file in its children
    tracker = creators._DEFAULT = linmem.TrackingCreator(creators._DEFAULT)
    linmem.enable_fault_report()        # without a quarantine, whose ranges would count as leftovers
    tracemalloc.start()                 # not in children: a new subinterpreter under tracemalloc hangs in CPython
    code = pytest.main()
    assert code or tracker.scopes()[()].made > 1000, "tracking did not see the memories of the suite"
    assert tracemalloc.is_tracing()
    sys.exit(code)
