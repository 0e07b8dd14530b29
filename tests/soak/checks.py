"""The comparisons of a soak, and the facts of this machine."""

from __future__ import annotations

import errno
import sys

import linmem
from linmem._os import pages

try:
    import wasmtime

    import linmem.wasmtime
except ImportError:         # then a soak has no guests
    wasmtime = None

FLOOR = pages.describe()
PAGE = FLOOR["page_size"]
GUARD = max(PAGE, 65536)
MIB = 1 << 20
# The code of an injected failure. No page call of an operating system fails with it, so real failures differ.
INJECTED_CODE = errno.EXDEV
PATIENCE = 200              # how often a call is repeated if injected failures make it fail
HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()

GuestError = wasmtime.WasmtimeError if wasmtime else ()
Trap = wasmtime.Trap if wasmtime else ()


class Wrong(AssertionError):
    """A finding."""


def must(holds: object, what: str) -> None:
    if not holds:
        raise Wrong(what)


def same(got: object, expected: bytes | bytearray, what: str) -> None:
    """Check that a buffer has the expected bytes."""
    with memoryview(got) as view:
        if view == expected:
            return
        found = bytes(view)
    must(len(found) == len(expected), f"{what} has {len(found)} bytes, must have {len(expected)}")
    offset = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    raise Wrong(f"byte {offset} of {what} is {found[offset]}, must be {expected[offset]}")


def is_injected(error: Exception) -> bool:
    if isinstance(error, linmem.PageError):
        return (error.errno if getattr(error, "winerror", None) is None else error.winerror) == INJECTED_CODE
    return isinstance(error, GuestError) and f"failed with code {INJECTED_CODE}:" in str(error)
