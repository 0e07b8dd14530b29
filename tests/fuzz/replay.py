"""Replay the corpus without atheris:   python tests/fuzz/replay.py [--stay] [HARNESS ...]

--stay keeps memories from moving, because valgrind loses track of mappings that mremap(2) enlarges.
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
    """Replays the corpus of one harness and returns the number of entries. The first finding is raised."""
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
