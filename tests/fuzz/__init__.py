"""Fuzzing harnesses. Each module that HARNESSES names has ``one(data)``, which takes any bytes and raises on a finding.

`run.py` drives one harness with atheris (libFuzzer). tests/test_fuzz_corpus.py replays the findings in `corpus/`
without atheris.
"""

HARNESSES = ("arithmetic", "cache", "calls", "deltas", "files", "modules", "snapshots")
