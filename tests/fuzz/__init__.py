"""Fuzzing harnesses. Each module that HARNESSES names has ``one(data)``, which takes any bytes and raises on a finding.

`run.py` drives one of them by atheris (libFuzzer); tests/test_fuzz_corpus.py replays what it has found, in
`corpus/`, without it.
"""

HARNESSES = ("arithmetic", "cache", "calls", "deltas", "files", "modules")
