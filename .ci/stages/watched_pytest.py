"""pytest in a process with the fault report, tracking and tracemalloc on."""

import sys
import tracemalloc

import pytest

import linmem
from linmem import creators

# Tests about the creator that is the default of the factory, which is a tracker here, and about the bytes of a struct
# that has a pointer for tracemalloc.
LEFT_OUT = ("test_the_factory_makes_each_kind_by_name", "test_an_upstream_of_none_is_the_default",
            "test_the_factory_makes_a_callback_creator", "test_every_field_of_the_struct_has_its_value_from_the_first")


class Watch:
    """Traces each test, except for those of tracemalloc. Child processes trace nothing: under tracemalloc CPython hangs
    in a new subinterpreter."""

    traced = 0

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if not item.name.startswith(LEFT_OUT)]

    def pytest_runtest_setup(self, item):
        if item.path.name == "test_tracemalloc.py":
            tracemalloc.stop()
        elif not tracemalloc.is_tracing():
            tracemalloc.start()
        self.traced += tracemalloc.is_tracing()


start = tracemalloc.start


def start_again(*frames):
    """For tests that measure with tracemalloc: what was traced before does not count."""
    tracemalloc.stop()
    start(*frames)


if __name__ == "__main__":      # multiprocessing imports this file in its children
    watch = Watch()
    tracemalloc.start = start_again
    tracker = creators._DEFAULT = linmem.TrackingCreator(creators._DEFAULT)
    linmem.enable_fault_report()        # without a quarantine, whose ranges would count as leftovers
    code = pytest.main(plugins=[watch])
    assert code or tracker.scopes()[()].made > 100, "tracking did not see the memories of the suite"
    assert code or watch.traced > 1000, "tracemalloc did not see the tests"
    sys.exit(code)
