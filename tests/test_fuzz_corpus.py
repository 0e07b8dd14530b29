"""Replays the useful inputs that the fuzzers have found, without the fuzzers. The harnesses are in tests/fuzz/."""

import importlib

import pytest
from fuzz import HARNESSES, choices, replay
from support import requires


@requires("numpy")
@pytest.mark.parametrize("harness", HARNESSES)
def test_no_entry_of_the_corpus_is_a_finding(harness):
    assert replay.replay(harness) >= 5


@requires("numpy")
@pytest.mark.parametrize("harness", HARNESSES)
def test_a_harness_takes_any_bytes(harness):
    one = importlib.import_module(f"fuzz.{harness}").one
    for data in (b"", b"\0", b"\xff" * 64, bytes(range(64))):
        one(data)


def test_every_folder_of_the_corpus_has_its_harness_and_all_of_it_is_small():
    assert sorted(path.name for path in replay.CORPUS.iterdir()) == sorted(HARNESSES)
    files = [path for harness in HARNESSES for path in replay.entries(harness)]
    assert len(files) <= 150
    assert sum(path.stat().st_size for path in files) <= 200_000


def test_choices_past_the_end_are_the_first_ones():
    c = choices.Choices(b"\x01\x02")
    assert (c.byte(), c.byte(), c.byte(), c.below(7), c.number()) == (1, 2, 0, 0, 0)
    assert (c.pick("abc"), c.flag(), c.bytes(3)) == ("a", False, b"")
    assert not c.more
