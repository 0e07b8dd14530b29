"""Replay the corpus without atheris:   python tests/fuzz/replay.py [--stay] [HARNESS ...]

With --stay no memory moves: valgrind loses track of what mremap(2) makes larger.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

CORPUS = Path(__file__).resolve().parent / "corpus"


def entries(harness: str) -> Iterator[Path]:
    return iter(sorted(path for path in (CORPUS / harness).iterdir() if path.is_file()))


def replay(harness: str) -> int:
    """How many entries there are; the first finding is raised."""
    one = importlib.import_module(f"fuzz.{harness}").one
    n = 0
    for path in entries(harness):
        try:
            one(path.read_bytes())
        except BaseException:
            print(f"the finding is in {path}", file=sys.stderr)
            raise
        n += 1
    return n


if __name__ == "__main__":
    sys.path.insert(0, str(CORPUS.parent.parent))
    if "--stay" in sys.argv:
        sys.argv.remove("--stay")
        importlib.import_module("fuzz.calls").MAY_MOVE = False
    for name in sys.argv[1:] or importlib.import_module("fuzz").HARNESSES:
        print(f"{name}: {replay(name)} entries, no finding", flush=True)
