"""Measure linmem against the same system calls in C, against wasmtime's own memories, and against NumPy.

Exit code 0 if all was measured; 1 if a library is missing, if a file cannot be written, or if a
goal is missed (with --check).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from linmem._commands.parser import Parser, Refused

BENCH_PACKAGES = ("rich", "matplotlib", "numpy", "wasmtime")


def add_arguments(parser: Parser) -> None:
    parser.description = __doc__
    with benchmarks() as bench:
        bench.add_arguments(parser)


def main(args: Any) -> int:
    with benchmarks() as bench:
        return int(bench.main(args))


@contextlib.contextmanager
def benchmarks() -> Iterator[Any]:
    """The module `linmem.bench.command`. If an import fails in the block, the message says what to install."""
    try:
        yield importlib.import_module("linmem.bench.command")
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in BENCH_PACKAGES or "linmem[wasmtime]" in str(error):
            raise Refused(f"needs {missing or 'wasmtime'}: pip install 'linmem[bench]'") from None
        if missing == "linmem":
            raise Refused("the benchmarks are not importable from a source tree built in place:"
                          f" pip install -e . first ({error})") from None
        raise
