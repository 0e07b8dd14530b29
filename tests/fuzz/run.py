#!/usr/bin/env python3
"""Fuzz one harness by atheris:   python tests/fuzz/run.py --harness=NAME [FOLDER ...] [-OPTION=VALUE ...]

New inputs go into the first folder. The options are libFuzzer's (-max_total_time=60, -print_final_stats=1). libFuzzer
sees the coverage of an extension only if clang built the extension with -fsanitize=fuzzer-no-link;
.ci/stages/fuzz.sh shows how.
"""

import importlib
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> None:
    # libFuzzer ignores arguments that begin with two dashes, and passes them on to the processes that it starts to
    # merge.
    (harness,) = (argument.removeprefix("--harness=") for argument in sys.argv if argument.startswith("--harness="))
    with atheris.instrument_imports(include=["linmem"]):
        one = importlib.import_module(f"fuzz.{harness}").one
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
