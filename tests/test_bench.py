"""The benchmark suite measures every row and writes what it says. No time is asserted."""

import argparse
import json
import math
import os
import re
import subprocess
import sys

import pytest
from support import NEEDS

pytest.importorskip("linmem.bench._raw")
from linmem import bench
from linmem.bench import _raw, core, harness, report

PNG = b"\x89PNG\r\n\x1a\n"
GOALS = {
    "create_close/c": 1.5, "grow/c": 1.2, "wasm_grow/wasmtime": 1.1, "export/bytearray": 1.3, "grow_live/numpy": 0.1,
    "grow_live/bytearray": 0.1, "read/numpy": 1.02, "write/numpy": 1.02, "element/numpy": 1.02,
}


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """One run of the whole suite in a process of its own, whose allocator and clock nobody else uses."""
    if not NEEDS["matplotlib"][0]:
        pytest.skip(NEEDS["matplotlib"][1])
    folder = tmp_path_factory.mktemp("bench")
    done = subprocess.run(
        [sys.executable, "-m", "linmem.bench", "--quick", "--rounds", "2", "--json", str(folder / "figures.json"),
         "--picture", str(folder / "figures.png")],
        capture_output=True, text=True, timeout=60, env={**os.environ, "COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((folder / "figures.json").read_text()), (folder / "figures.png").read_bytes()


def test_a_quick_run_measures_every_row_that_has_a_goal(quick_run):
    rows = {row["key"]: row for row in quick_run[1]["rows"]}
    assert {key: row["goal"] for key, row in rows.items() if row["goal"] is not None} == GOALS
    for key in GOALS:
        row = rows[key]
        assert row["unavailable"] is None
        for ratio in (row["ratio_p10"], row["ratio_median"], *row["ratio_quartiles"]):
            assert math.isfinite(ratio)
            assert ratio > 0
        assert row["holds"] is (row["ratio_median"] <= row["goal"])


def test_a_contender_without_a_goal_has_a_ratio_or_says_why_not(quick_run):
    others = [row for row in quick_run[1]["rows"] if row["goal"] is None]
    assert others
    for row in others:
        assert (row["unavailable"] is None) == (row["ratio_p10"] is not None)
        assert row["holds"] is None


def test_the_json_has_each_rounds_figure_of_each_contender(quick_run):
    rounds = {group.key: bench.shared(2, group) for group in core.groups(quick=True)}
    assert rounds.keys() == {group["key"] for group in quick_run[1]["groups"]}
    for group in quick_run[1]["groups"]:
        assert group["operations_per_run"] >= 1
        for contender in group["contenders"]:
            if contender["unavailable"] is None:
                assert len(contender["ns"]) == rounds[group["key"]] >= 2
                assert min(contender["ns"]) <= contender["ns_p10"] <= contender["ns_median"] <= max(contender["ns"])


def test_the_json_does_not_say_whose_machine_it_is(quick_run):
    text = json.dumps(quick_run[1]["machine"])
    for private in (os.path.expanduser("~"), os.getcwd(), sys.prefix):
        assert private not in text
    assert not re.search(r"\d+\.\d+\.\d+-", text), "a kernel's local version"


def test_the_picture_is_a_png(quick_run):
    assert quick_run[2].startswith(PNG)


def test_the_table_shows_every_operation_once_and_counts_the_goals(quick_run):
    lines = quick_run[0].splitlines()
    for group in core.groups(quick=True):
        assert sum(group.operation[:24] in line for line in lines) == 1, group.operation
    assert re.search(r"^\d of 9 goals hold$", quick_run[0], re.MULTILINE)


def test_the_c_loops_give_their_reservations_back():
    # Each takes a sixteenth of all addresses: 32 that stayed would not fit.
    page = report.machine()["page_size"]
    total = 1 << (report.machine()["address_bits"] - 4)
    assert _raw.create_close(total, page, page, 32) > 0
    for _ in range(32):
        assert _raw.grow_steps(total, page, page, page, 5) > 0


def test_the_c_loops_raise_what_the_system_says():
    page = report.machine()["page_size"]
    with pytest.raises(OSError, match=r"\((ENOMEM|ERROR_\w+)\)"):
        _raw.create_close((1 << 62) & -page, page, page, 1)
    with pytest.raises(OSError, match=r"\((ENOMEM|ERROR_\w+)\)"):
        _raw.grow_steps((1 << 62) & -page, page, page, page, 1)


# -- the harness, with contenders whose times are known ------------------------------------------------

def contender(key, ns, log=None):
    def run(n):
        if log is not None:
            log.append(key)
        return ns * n

    return harness.Contender(key, key, lambda: run)


def test_ratios_are_of_the_first_contender_over_the_other():
    group = harness.Group("g", "operation", (contender("a", 100), contender("b", 50), contender("c", 400)),
                          (harness.Goal("b", 1.9), harness.Goal("c", 0.5), harness.Goal("c", None)), operations=10)
    n, series = harness.measure(group, 4, 0, lambda: None)
    rows = list(harness.compare(group, series))
    assert n == 10
    assert [(row.ratio_p10, row.ratio_median, row.holds) for row in rows] == [
        (2.0, 2.0, False), (0.25, 0.25, True), (0.25, 0.25, None)]


def test_a_state_of_the_machine_that_lasts_a_round_cancels_out_of_the_verdict():
    def switching(key, ns):
        return harness.Contender(key, key, lambda: lambda n: ns * n * (1 if state[0] < 5 else 2))

    state = [0]
    group = harness.Group("g", "operation", (switching("a", 110), switching("b", 100)), (harness.Goal("b", 1.1),),
                          operations=1)
    _, series = harness.measure(group, 10, 0, lambda: state.__setitem__(0, state[0] + 1))
    row, = harness.compare(group, series)
    assert series[0].ns == [110] * 5 + [220] * 5
    assert (row.ratio_median, row.ratio_quartiles, row.holds) == (1.1, (1.1, 1.1), True)


def test_contenders_take_turns_and_each_is_first_in_some_round(monkeypatch):
    monkeypatch.setattr(harness, "preemptions", lambda: 0)
    log = []
    group = harness.Group("g", "operation", tuple(contender(key, 1, log) for key in "abc"), (), operations=1)
    harness.measure(group, 6, 0, lambda: None)
    rounds = [tuple(log[i:i + 3]) for i in range(3, len(log), 3)]       # the first three warm up
    assert len(rounds) == 6
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    assert {turn[0] for turn in rounds} == {"a", "b", "c"}
    assert len(set(rounds)) == 6


def test_a_preempted_run_is_repeated_until_one_is_left_alone(monkeypatch):
    counts = iter([0, 1, 1, 2, 2, 2])
    monkeypatch.setattr(harness, "preemptions", lambda: next(counts))
    times = iter([300, 200, 250])
    assert harness.run_undisturbed(lambda n: next(times), 1) == (250, True)


def test_a_run_that_is_preempted_every_time_counts_as_disturbed_and_gives_its_fastest(monkeypatch):
    counts = iter(range(2 * harness.TRIES))
    monkeypatch.setattr(harness, "preemptions", lambda: next(counts))
    times = iter([300, 200, 250, 220, 210])
    assert harness.run_undisturbed(lambda n: next(times), 1) == (200, False)


def test_a_contender_that_cannot_run_says_why_and_the_others_are_measured():
    def refuse():
        raise harness.Unavailable("not on a Tuesday")

    def lack():
        raise ModuleNotFoundError("No module named 'nothing'", name="nothing")

    group = harness.Group(
        "g", "operation",
        (contender("a", 3), contender("b", 1), harness.Contender("x", "x", refuse), harness.Contender("y", "y", lack)),
        (harness.Goal("b", 4), harness.Goal("x", 1), harness.Goal("y", 1)), operations=1)
    _, series = harness.measure(group, 2, 0, lambda: None)
    measured, refused, lacking = harness.compare(group, series)
    assert measured.ratio_p10 == 3.0
    assert (refused.unavailable, refused.holds) == ("not on a Tuesday", None)
    assert lacking.unavailable == "nothing is not installed"
    assert report.verdict(refused) == "not measured: not on a Tuesday"


def test_the_garbage_collector_rests_while_it_is_measured_and_works_afterwards():
    import gc

    seen = []
    group = harness.Group("g", "operation", (harness.Contender("a", "a", lambda: lambda n: seen.append(gc.isenabled())
                                                               or n),), (), operations=1)
    harness.measure(group, 2, 0, lambda: None)
    assert seen
    assert not any(seen)
    assert gc.isenabled()


def test_one_round_is_refused_because_a_spread_needs_two(capsys):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--rounds", "1"])
    assert "must be >= 2" in capsys.readouterr().err


def fake_suite(monkeypatch, goal):
    group = harness.Group("g", "operation", (contender("a", 2), contender("b", 1)), (harness.Goal("b", goal),),
                          operations=1)
    monkeypatch.setattr(core, "groups", lambda quick: [group])


@pytest.mark.parametrize(("goal", "check", "code"), [(3, True, 0), (1, False, 0), (1, True, 1)])
def test_check_turns_a_missed_goal_into_exit_code_one(monkeypatch, capsys, goal, check, code):
    fake_suite(monkeypatch, goal)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.main(parser.parse_args(["--rounds", "2"] + ["--check"] * check)) == code
    assert ("holds" if goal == 3 else "missed") in capsys.readouterr().out


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.main(parser.parse_args(["--picture", "x.png"])) == 2
    assert "needs rich and matplotlib: pip install 'linmem[bench]'" in capsys.readouterr().err
