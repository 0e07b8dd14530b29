"""``linmem bench``: the suites of ``linmem.bench``, where what they need is installed."""

from __future__ import annotations

import importlib
from typing import Any

from linmem._cli.words import Parser, Refused

BENCH_PACKAGES = ("rich", "matplotlib", "numpy", "wasmtime")


def main(parser: Parser, own_parser: Parser, words: list[str]) -> int:
    try:
        suite: Any = importlib.import_module("linmem.bench.command")     # type checkers do not see its folder
        suite.add_arguments(own_parser)
        return int(suite.main(parser.parse_args(words)))
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in BENCH_PACKAGES or "linmem[wasmtime]" in str(error):
            raise Refused(f"needs {missing or 'wasmtime'}: pip install 'linmem[bench]'") from None
        if missing == "linmem":
            raise Refused("the benchmarks are not importable from a source tree built in place:"
                          f" pip install -e . first ({error})") from None
        raise
