"""The benchmark suite measures every row and writes its figures. No test asserts a time."""

import argparse
import errno
import gc
import json
import math
import mmap
import os
import pathlib
import re
import subprocess
import sys
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import support
from support import PAGE, ROOT, answer, mappings, requires, run_child, whichever

pytest.importorskip("linmem.bench._loops")
import linmem
from linmem.bench import (
    _loops,
    command,
    core,
    engines,
    fair,
    harness,
    image,
    report,
    reset,
    run_command,
    soak_pool,
    threads,
    wasm,
)

PNG = b"\x89PNG\r\n\x1a\n"
TIME, SPEED, SIZE, RATE = harness.TIME, harness.SPEED, harness.SIZE, harness.RATE
MEDIAN, P10, EXACT = harness.MEDIAN, harness.P10, harness.EXACT
# The required goals: (bound, sense, the ratio that is compared with the bound).
GOALS = {
    "core": {key: (goal, TIME, MEDIAN) for key, goal in {
        "create_close/c": 1.5, "grow/c": 1.2, "wasm_grow/wasmtime": 1.1, "export/bytearray": 1.3,
        "grow_live/numpy": 0.1, "grow_live/bytearray": 0.1, "read/numpy": 1.02, "write/numpy": 1.02,
        "element/numpy": 1.02}.items()},
    "wasm": {key: (goal, SPEED, P10) for key, goal in {
        "tiny/default": 5, "tiny/best_pooling": 0.95, "tiny/ctypes": 15, "touch/default": 8,
        "touch/best_pooling": 0.95, "fill/default": 5, "fill/best_pooling": 0.95, "grow/default": 0.95,
        "grow/best_pooling": 0.95, "grow/ctypes": 10, "growtouch/default": 1.8, "growtouch/best_pooling": 1.7,
        "sparse/default": 2.5, "sparse/best_pooling": 2, "mean/default": 3.3, "mean/best_pooling": 1.3,
        "python_tiny/default": 1.5, "python_touch/default": 6, "python_fill/default": 5}.items()},
    "reset": {
        "bare/mmap": (0.2, TIME, P10), "bare_touched/mmap": (0.06, TIME, P10),
        "same_16_of_16/discard": (6, SPEED, P10), "same_16_of_1024/discard": (3, SPEED, P10),
        "same_160_of_16384/discard": (1.9, SPEED, P10), "all/better_simple": (0.85, SPEED, P10),
        **{f"{pattern}_{size}/better_simple": (0.85, SPEED, P10)
           for pattern in ("same", "redrawn", "alternating", "bursty", "80-20")
           for size in ("4_of_16", "16_of_16", "64_of_256", "16_of_1024", "160_of_16384")}},
    "threads": {"pool/one": (1.8, SPEED, P10)},
    "image": {
        "restore_16/copy": (0.01, TIME, P10), "restore_1600/copy": (0.35, TIME, P10),
        "new_memory/copy": (0.005, TIME, P10), "instantiate/best": (0.25, TIME, P10),
        "python_instantiate/default": (0.45, TIME, P10), "interpreter/default": (0.02, TIME, P10),
        "pickle/size": (0.02, SIZE, EXACT)},
    "soak-pool": {f"{burst}/before": (1.1, SIZE, EXACT) for burst in ("large", "grown", "many")},
    "fair": {f"{bound}/requests": (0.95, RATE, EXACT)
             for bound in ("by_count", "by_resident", "by_slots", "by_all_pools", "by_two_pools", "by_budget")},
    "travel": {key: (goal, TIME, P10) for key, goal in {
        "start_toy/plain": 1.2, "start_large/plain": 1.2, "start_interpreter/plain": 1.2,
        "start_interpreter/init": 0.02, "new_process/limit": 1, "cold_file/without": 0.5,
        "session/allowed": 1}.items()},
    "hooks": {**{f"unused_{what}/before": (1.01, TIME, MEDIAN) for what in ("create", "grow", "instance")},
              **{key: (goal, TIME, P10) for key, goal in {
                  "rule_grow/without": 1.1, "callback_grow/allowed": 1, "use/allowed": 1, "chosen/allowed": 1,
                  "tracked/without": 3, "find/allowed": 1}.items()}},
    "component": {
        "run_cached/script": (1.3, TIME, MEDIAN), "run_prepared/script": (1.3, TIME, MEDIAN),
        "component_data/default": (0.65, TIME, P10), "component_data/bare": (1.3, TIME, P10),
        "component_bare/default": (0.8, TIME, P10)},
    "share": {"share_grow/private": (1.5, TIME, P10), "share_wake/python": (1.3, TIME, P10),
              "share_attach/name": (1, TIME, P10), "share_ring/queue": (0.25, TIME, P10), "map/copy": (0.33, TIME, P10),
              "share_attach_once/name": (1, TIME, P10), "map/private/copy": (0.33, TIME, P10),
              **{f"file_{what}/memmap": (1, TIME, P10) for what in (
        "read", "write", "random_read", "random_write", "element")}, "file_grow/c": (1.5, TIME, P10),
              "array_extend/copy": (1.1, TIME, P10), "array_append/list": (3, TIME, P10),
              **{f"array_peak/{way}": (1.05, SIZE, EXACT) for way in ("append", "extend", "iterator")}},
}
# Rows that some machines cannot measure. Such a row gives the reason.
MAY_LACK = {"pool/one": r"the control scales only \d\.\d\d x here",
            "cold_file/without": ".*(page cache|working set).*",
            **dict.fromkeys([key for key in GOALS["hooks"] if key.startswith("unused")],
                            "LINMEM_BENCH_BASE names no Python with an older linmem"),
            **dict.fromkeys([key for key in GOALS["component"] if key != "run_cached/script"],
                            "this wasmtime-py has no components: .+"),
            **dict.fromkeys([key for key in GOALS["share"] if "peak" in key], "no /proc/self/status to ask"),
            **dict.fromkeys([key for key in GOALS["share"] if not key.startswith("array")],
                            "(a (shared memory|memory of a file) cannot be made"
                            "|the C library has no fallocate|examples/shared_ring.py is missing).+"),
            **dict.fromkeys(GOALS["soak-pool"], "the system does not say what is resident: .+")}


@pytest.fixture(scope="module", params=whichever(*(("matplotlib", suite) for suite in command.SUITES)))
def quick_run(request, tmp_path_factory):
    """A run of a whole suite in its own process, whose allocator and clock no other test uses."""
    folder = tmp_path_factory.mktemp(request.param)
    done = subprocess.run(
        [sys.executable, "-m", "linmem.bench", "--suite", request.param, "--quick", "--rounds", "2",
         "--json", str(folder / "figures.json"), "--picture", str(folder / "figures.png"),
         "--markdown", str(folder / "figures.md")],
        capture_output=True, text=True, timeout=280, env={**os.environ, "COLUMNS": "190"})
    assert done.returncode == 0, done.stderr
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["suite"] == request.param
    return done.stdout, figures, (folder / "figures.png").read_bytes(), (folder / "figures.md").read_text("utf-8")


def groups_of(figures):
    return command.module_of(figures["suite"]).groups(True)


def test_a_quick_run_measures_every_row_that_has_a_goal(quick_run):
    figures = quick_run[1]
    rows = {row["key"]: row for row in figures["rows"]}
    assert len(rows) == len(figures["rows"])
    goals = GOALS[figures["suite"]]
    assert {key: (row["goal"], row["sense"], row["by"]) for key, row in rows.items()
            if row["goal"] is not None} == goals
    for key, (goal, sense, by) in goals.items():
        row = rows[key]
        if key in MAY_LACK and row["unavailable"]:
            assert re.fullmatch(MAY_LACK[key], row["unavailable"])
            assert row["holds"] is None
            continue
        assert row["unavailable"] is None
        judged = row["ratio_p10"] if by == P10 else row["ratio_median"]
        for ratio in (judged, *(row["ratio_quartiles"] or ())):
            assert math.isfinite(ratio)
            assert ratio > 0
        assert row["holds"] is (judged >= goal if sense in harness.MORE else judged <= goal)


def test_a_contender_without_a_goal_has_a_ratio_or_says_why_not(quick_run):
    others = [row for row in quick_run[1]["rows"] if row["goal"] is None]
    assert others
    for row in others:
        judged = row["ratio_median"] if row["by"] == EXACT else row["ratio_p10"]
        assert (row["unavailable"] is None) == (judged is not None)
        assert row["holds"] is None


def test_the_json_has_each_rounds_figure_of_each_contender(quick_run):
    rounds = {group.key: command.shared(2, group) for group in groups_of(quick_run[1]) if group.contenders}
    assert rounds.keys() == {group["key"] for group in quick_run[1]["groups"]}
    for group in quick_run[1]["groups"]:
        for contender in group["contenders"]:
            if contender["unavailable"] is None:
                assert contender["operations_per_run"] >= 1
                assert len(contender["ns"]) == rounds[group["key"]] >= 2
                assert min(contender["ns"]) > 0
                if contender["less"] is None:
                    assert min(contender["ns"]) <= contender["ns_p10"] <= contender["ns_median"] <= max(contender["ns"])


def test_a_suite_measures_each_goals_contenders_unless_the_system_lacks_something(quick_run):
    lacking = {contender["key"]: contender["unavailable"] for group in quick_run[1]["groups"]
               for contender in group["contenders"] if contender["unavailable"]}
    for key, why in lacking.items():
        assert key.partition("/")[0] in ("pooling_scan", "mmap", "scan") or re.search(
                "page cache|working set|LINMEM_BENCH_BASE|memory of a file|fallocate|shared_ring", why), (
            f"{key}: {why}")


def test_the_json_does_not_identify_the_machine(quick_run):
    text = json.dumps(quick_run[1]["machine"])
    for private in (os.path.expanduser("~"), os.getcwd(), sys.prefix):
        assert private not in text
    assert not re.search(r"\d+\.\d+\.\d+-", text), "a kernel's local version"


def test_the_picture_is_a_png(quick_run):
    assert quick_run[2].startswith(PNG)


def test_the_tables_show_every_operation_and_count_the_goals(quick_run):
    text, figures = quick_run[:2]
    for group in groups_of(figures):
        assert group.operation[:20] in text, group.operation
        assert not group.table or group.key in text or group.operation in text
    assert re.search(rf"^\d+ of {len(GOALS[figures['suite']])} goals hold$", text, re.MULTILINE)


def test_the_markdown_has_every_row_between_the_marks_of_its_suite(quick_run):
    figures, text = quick_run[1], quick_run[3]
    begin, end = report.marks(figures["suite"])
    assert text.startswith(begin + "\n")
    assert text.endswith("\n" + end + "\n")
    # Tables of ratios have seven columns; tables of times have another number.
    body = [line for line in text.splitlines() if line.count("|") == 8 and not line.startswith(("| row ", "|---"))]
    assert len(body) == len(figures["rows"])
    for row in figures["rows"]:
        assert f"`{row['key'].rpartition('/')[0]}`" in text
        assert row["against"] in text


def test_a_stored_run_gives_the_same_tables_and_a_picture(quick_run, tmp_path):
    stored = tmp_path / "figures.json"
    stored.write_text(json.dumps(quick_run[1]), "utf-8")
    done = subprocess.run([sys.executable, "-m", "linmem.bench", "--from", str(stored), "--markdown",
                           str(tmp_path / "again.md"), "--picture", str(tmp_path / "again.png")],
                          capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "190"})
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "again.md").read_text("utf-8") == quick_run[3]
    assert (tmp_path / "again.png").read_bytes().startswith(PNG)
    assert done.stdout == quick_run[0]


@pytest.mark.parametrize("suite", command.SUITES)
def test_a_terminal_of_80_columns_shows_the_whole_words_of_each_name(suite, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    results, about = report.read_json(str(ROOT / "docs" / "figures" / f"{suite}.json"))
    report.show(results, about)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    rows = [row for result in results for row in result.rows]
    assert rows
    words = {word for row in rows for word in f"{row.operation} {row.against}".split()}
    assert words - set(shown.split()) == set()


@pytest.mark.parametrize("text", [
    "", "[1]", "{}", "[" * 100_000,
    '{"suite": "core", "machine": {}, "rounds": 1, "quick": false, "rows": [{}], "groups": []}',
    '{"suite": "core", "machine": {}, "rounds": 1, "quick": false, "rows": 5, "groups": []}',
])
def test_a_file_that_is_no_stored_run_is_refused_with_its_name(text, tmp_path, capsys):
    (tmp_path / "wrong.json").write_text(text, "utf-8")
    assert linmem_bench("--from", str(tmp_path / "wrong.json")) == 1
    assert re.fullmatch(r"linmem bench: .*wrong\.json: not a file that `linmem bench --json` wrote \(.+\)\n",
                        capsys.readouterr().err)


def test_a_stored_run_is_not_measured_again(tmp_path, capsys):
    assert linmem_bench("--from", str(tmp_path / "any.json"), "--quick", "--suite", "core") == 1
    assert capsys.readouterr().err == "linmem bench: --from reads a file, and takes no --suite and no --quick\n"


def linmem_bench(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args(words))


@requires("sources")
@pytest.mark.parametrize("suite", command.SUITES)
def test_the_documentation_shows_the_figures_of_its_stored_run(suite):
    results, about = report.read_json(str(ROOT / "docs" / "figures" / f"{suite}.json"))
    assert about.suite == suite
    text = (ROOT / "docs" / "explanation" / "performance.md").read_text("utf-8")
    begin, end = report.marks(suite)
    assert text.partition(begin)[2].partition(end)[0].strip() == "\n".join(report.markdown(results, about)).strip()
    assert f"```{{plot}} {suite}\n" in text


@requires("sources")
def test_the_documentation_begins_with_ratios_of_its_stored_runs():
    stored = {}
    for suite in command.SUITES:
        for result in report.read_json(str(ROOT / "docs" / "figures" / f"{suite}.json"))[0]:
            stored.update({row.key: row for row in result.rows})
    text = (ROOT / "docs" / "explanation" / "performance.md").read_text("utf-8").partition("\n## ")[0]
    shown = re.findall(r"^\| .* \| `(\w+/\w+)` \| (\S+ x) (as fast|the time) \|$", text, re.MULTILINE)
    assert len(shown) == 9
    for key, ratio, sense in shown:
        row = stored[key]
        assert (ratio, sense) == (report.times(row.judged()), "as fast" if row.sense == SPEED else "the time"), key


@requires("sources")
def test_the_documentation_names_every_group_of_every_suite_and_has_its_marks():
    text = (ROOT / "docs" / "explanation" / "performance.md").read_text("utf-8")
    for suite in command.SUITES:
        begin, end = report.marks(suite)
        assert text.count(begin) == text.count(end) == 1, suite
        assert text.index(begin) < text.index(end)
    for key in {key.split("/")[0] for goals in GOALS.values() for key in goals}:
        assert f"`{key}`" in text, key


def test_the_c_loops_give_their_reservations_back():
    # Together the reservations are larger than the address space, so they would not fit if they leaked. Wine keeps a
    # byte for each page that a process has ever reserved: the loops run in a child, and reserve a TiB at a time.
    assert answer("""
        from linmem.bench import _loops, report
        page, bits = report.machine()["page_size"], report.machine()["address_bits"]
        total = 1 << min(40, bits - 4)
        times = (1 << bits) // total
        assert _loops.create_close(total, page, page, times) > 0
        for _ in range(times):
            assert _loops.grow_steps(total, page, page, page, 5) > 0
        print("all given back")
        """) == "all given back"


@requires("shared")
def test_the_c_loops_wake_a_thread_that_sleeps_on_a_word():
    words = bytearray(256)
    with ThreadPoolExecutor(1) as pool:
        slept = pool.submit(_loops.sleep_rounds, words, 5)
        assert 0 < _loops.wake_rounds(words, 1, 3) < 10**10
        _loops.until_ready(words, 4)
        _loops.futex_wake(words, 4)
        assert slept.result(60) is None
    assert words[0] == 4
    with pytest.raises(ValueError, match="too small"):
        _loops.futex_wait(bytes(8), 0)


def test_the_c_loops_raise_the_systems_error():
    page = report.machine()["page_size"]
    with pytest.raises(OSError, match=r"\((ENOMEM|ERROR_\w+)\)"):
        _loops.create_close((1 << 62) & -page, page, page, 1)
    with pytest.raises(OSError, match=r"\((ENOMEM|ERROR_\w+)\)"):
        _loops.grow_steps((1 << 62) & -page, page, page, page, 1)


def test_the_c_loop_over_memories_gives_each_back():
    counting = linmem.creator("statistics")
    touches, ends = offsets([0, PAGE, 3], [1, 3])
    assert _loops.use_memories(counting, 2 * PAGE, touches, ends, 7) > 0
    counts = counting.statistics()
    assert (counts["current_count"], counts["total_count"]) == (0, 7)


@pytest.mark.parametrize(("touches", "ends", "text"), [
    ([0, 4 * PAGE], [2], "touches must be below"), ([0], [2], "ends must ascend up to 1, got 2"),
    ([0, 1], [2, 1], "ends must ascend up to 2, got 1 after 2"), ([], [], "one use at least"),
])
def test_the_c_loop_over_memories_refuses_to_write_where_no_memory_is(touches, ends, text):
    with pytest.raises(ValueError, match=text):
        _loops.use_memories(linmem.creator(), 4 * PAGE, *offsets(touches, ends), 1)


def test_the_c_loop_over_memories_raises_the_creators_error():
    with pytest.raises(linmem.LimitError):
        _loops.use_memories(linmem.creator("limiting", limit_bytes=PAGE), 2 * PAGE, *offsets([0], [1]), 1)


def offsets(touches, ends):
    import array

    return array.array("Q", touches), array.array("Q", ends)


# -- engines -------------------------------------------------------------------------------------------

@pytest.fixture
def with_wasmtime():
    pytest.importorskip("wasmtime")


def native_run(setting, source):
    return engines.native(engines.Engines(), setting, lambda: source)()


@pytest.mark.usefixtures("with_wasmtime")
@pytest.mark.parametrize("module", wasm.MODULES, ids=lambda module: module.key)
def test_every_module_runs_in_the_native_loop_with_linmem_and_with_wasmtime_alone(module):
    for setting in (engines.LINMEM_POOL, engines.DEFAULT):
        assert native_run(setting, module.source())(3) > 0


@pytest.mark.usefixtures("with_wasmtime")
def test_the_native_loop_raises_the_text_of_a_trap_and_of_an_error():
    with pytest.raises(harness.Unavailable, match="unreachable"):
        native_run(engines.DEFAULT, "(module (func $f unreachable) (start $f))")
    with pytest.raises(harness.Unavailable, match="expected 1 imports, found 0"):
        native_run(engines.DEFAULT, '(module (import "a" "b" (func)))')


@pytest.mark.usefixtures("with_wasmtime")
def test_linmems_contenders_make_their_memories_with_linmem_and_the_default_does_not():
    import wasmtime

    from linmem.wasmtime import linear_memory

    counting = linmem.creator("statistics")
    counted = engines.Setting("counted", "", engines.with_creator(lambda: counting))
    native_run(counted, wasm.MODULES[0].source())(5)
    assert counting.statistics()["total_count"] == 1 + 5      # 1 of the trial run, 5 of the measured run
    kept = engines.Kept(engines.DEFAULT)
    module = wasmtime.Module(kept.engine, '(module (memory (export "memory") 1))')
    store = wasmtime.Store(kept.engine)
    with pytest.raises(ValueError, match="memory is not linmem's"):
        linear_memory(store, wasmtime.Instance(store, module, []).exports(store)["memory"])


@pytest.mark.usefixtures("with_wasmtime")
def test_the_ctypes_creator_grows_and_releases_its_memories():
    import wasmtime

    if not hasattr(mmap, "PROT_READ"):
        with pytest.raises(harness.Unavailable, match="mmap"):
            engines.Kept(engines.CTYPES)
        return
    kept = engines.Kept(engines.CTYPES)
    module = wasmtime.Module(kept.engine, '(module (memory (export "memory") 1 3))')
    store = wasmtime.Store(kept.engine)
    memory = wasmtime.Instance(store, module, []).exports(store)["memory"]
    (size, capacity, mapped), = kept.creator.memories.values()
    assert size == 65536 <= capacity < mapped
    assert memory.grow(store, 2) == 1
    memory.write(store, b"end", 3 * 65536 - 3)
    assert memory.read(store, 3 * 65536 - 3) == b"end"
    assert [m[0] for m in kept.creator.memories.values()] == [3 * 65536]
    store.close()
    assert kept.creator.memories == {}


@pytest.mark.usefixtures("with_wasmtime")
@requires("maps")
@pytest.mark.parametrize("setting", engines.POOLING, ids=lambda setting: setting.key)
def test_a_pooling_engine_stays_within_the_requested_room_and_is_freed(setting):
    from wasmtime import _ffi as ffi

    before = {m.start for m in mappings()}
    setter = "wasmtime_pooling_allocation_config_pagemap_scan_set"
    if setting.key == "pooling_scan" and not hasattr(ffi, setter):
        with pytest.raises(harness.Unavailable, match=setter):
            engines.Kept(setting)
        return
    kept = engines.Kept(setting)
    bounded = setting is not engines.POOLING[0]
    new = [m for m in mappings() if m.start not in before]
    assert len(new) < (64 if bounded else engines.UNBOUNDED_MAPPINGS)
    assert sum(m.size for m in new) < (engines.BOUNDED_SPACE if bounded else engines.UNBOUNDED_SPACE)
    del kept
    gc.collect()
    left = [m for m in mappings() if m.start not in before]
    assert sum(m.size for m in left) < engines.GIB


@pytest.mark.usefixtures("with_wasmtime")
@requires("rlimits")
def test_a_pooling_engine_without_enough_room_reports_it_instead_of_ending_the_process():
    done = run_child("""
        from linmem.bench import engines
        for setting in engines.POOLING[:2]:
            try:
                engines.Kept(setting)
            except engines.Unavailable as error:
                print(error)
    """, limits={"RLIMIT_AS": 8 << 30})
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"takes up to \d+ GiB of addresses: \d+ GiB are left", done.stdout)) == 2


@pytest.mark.usefixtures("with_wasmtime")
def test_the_engines_of_a_group_are_shared_while_it_runs_and_gone_afterwards():
    live = engines.Engines()
    contenders = engines.native_contenders(live, (engines.DEFAULT,), wasm.MODULES[0].source, wasm.empty)
    runs = [contender.make() for contender in contenders]
    assert len(live._live) == 1
    del runs
    gc.collect()
    assert len(live._live) == 0


def test_a_kind_of_pool_that_does_not_exist_is_a_reason_and_not_an_error(monkeypatch):
    def refuse(kind, **options):
        raise ValueError(f"no {kind}")

    monkeypatch.setattr(linmem, "creator", refuse)
    with pytest.raises(harness.Unavailable, match="no pool"):
        engines.pool()


WITH_DATA = """(module (memory 2) (data (i32.const 70000) "linmem")
  (func $start (if (i32.ne (i32.load8_u (i32.const 70005)) (i32.const 109)) (then unreachable))) (start $start))"""


@pytest.mark.usefixtures("with_wasmtime")
@pytest.mark.parametrize("setting", [engines.LINMEM_POOL, engines.LINMEM_PLAIN], ids=lambda setting: setting.key)
def test_the_native_loop_offers_each_instance_its_image(setting):
    import wasmtime

    kept = engines.Kept(setting)
    made = engines.prepare(kept.engine, WITH_DATA)
    at = engines.address(kept.engine.ptr()), engines.address(made.module.ptr())
    assert _loops.instantiate(*at, 5, made._offer) > 0
    with pytest.raises(RuntimeError, match="unreachable"):
        _loops.instantiate(*at, 5)
    nothing = wasmtime.Module(kept.engine, "(module)")
    with pytest.raises(RuntimeError, match="an instance was made without its images"):
        _loops.instantiate(at[0], engines.address(nothing.ptr()), 5, made._offer)
    assert _loops.instantiate(*at, 5, made._offer) > 0


@pytest.mark.usefixtures("with_wasmtime")
def test_the_native_loop_does_not_take_the_open_offer_of_another_caller():
    kept = engines.Kept(engines.LINMEM_POOL)
    made, other = (engines.prepare(kept.engine, WITH_DATA) for _ in range(2))
    at = engines.address(kept.engine.ptr()), engines.address(made.module.ptr())
    assert _loops.instantiate(*at, 1, made._offer) > 0      # binds, too
    with pytest.raises(RuntimeError, match="an instance was made without its images"):
        other._offer.making(None, None, _loops.instantiate, *at, 5, made._offer)
    assert _loops.instantiate(*at, 5, made._offer) > 0


@pytest.mark.usefixtures("with_wasmtime")
def test_a_module_that_keeps_data_is_not_measured_as_one_without():
    kept = engines.Kept(engines.LINMEM_POOL)
    with pytest.raises(harness.Unavailable, match=r"the module keeps its data: .+"):
        engines.prepare(kept.engine, '(module (memory 1) (data (i32.const 65536) "x"))')


@pytest.mark.usefixtures("with_wasmtime")
def test_only_big_modules_have_a_line_for_their_data_in_an_image():
    lines = {group.key: [c.what for c in group.contenders if c.key == "image"] for group in wasm.groups(True)}
    assert {key: found for key, found in lines.items() if found} == {"data4m": ["linmem's pool, data in an image"]}


# -- images ------------------------------------------------------------------------------------------------

@requires("numpy")
@pytest.mark.parametrize("count", image.RESTORE)
def test_pages_to_write_differ_and_are_the_same_in_every_run(count):
    drawn = image.draw(count, 3)
    assert [list(offsets) for offsets in drawn] == [list(offsets) for offsets in image.draw(count, 3)]
    for offsets_of_pages in drawn:
        assert len(set(offsets_of_pages)) == count
        assert not (offsets_of_pages % PAGE).any()
        assert offsets_of_pages.max() < image.SPACE
    assert list(drawn[0]) != list(drawn[1])


def test_the_number_of_written_pages_of_a_new_memory_is_16():
    where, zeros = image.strided()
    assert len(range(image.SPACE)[where]) == len(zeros) == 16


def test_the_image_of_the_bare_rows_has_no_page_of_zeros():
    full = image.full_image()
    assert len(full) == image.SPACE
    assert full.runs() == [(0, image.SPACE)]


def test_a_memory_that_was_not_restored_is_detected():
    some = linmem.Image.from_bytes(b"some" * PAGE)
    with some.new_memory() as mem:
        image.check_restored(mem, some)
        mem[PAGE] = 0
        with pytest.raises(RuntimeError, match="other bytes than the image"):
            image.check_restored(mem, some)


@pytest.fixture
def of_one_mebibyte(monkeypatch):
    monkeypatch.setattr(image, "SPACE", 1 << 20)


@requires("numpy")
@pytest.mark.usefixtures("of_one_mebibyte")
@pytest.mark.parametrize("build", [lambda full: image.restore(16, full, 2), image.new_memory], ids=["restore", "new"])
def test_every_way_to_read_an_images_bytes_runs(build):
    for one in build(harness.Shared(image.full_image)).contenders:
        assert one.make()(3) > 0, one.what


@requires("numpy")
def test_the_bytes_of_a_pickle_are_counted_and_the_report_says_that_they_are_exact():
    group = image.pickled()
    result = harness.Result(group, [], group.count())
    row, = result.rows
    assert 0.009 < row.ratio_median < 0.011
    assert (row.judged(), row.holds, report.spread(row), report.bound(row)) == (
        row.ratio_median, True, "exact", "<= 0.02 x")
    about = report.About("image", report.machine(), 2, False)
    text = "\n".join(report.markdown([result], about))
    assert "Linmem's bytes" not in text
    assert report.HEADINGS[SIZE] in text
    assert "| `pickle` | its size | **0.01 x** | exact |  | <= 0.02 x | holds |" in text


# -- the interpreter of the suite "image" ------------------------------------------------------------------

INTERPRETER = pathlib.Path(image.__file__).with_name("_forth.wasm")
ITS_SOURCE = support.ROOT / "bench" / "_forth.c"        # the wheel does not have it
ANSWERS = {
    "3 4 +": 7, "10 fact": 3628800, "30 fib": 832040, "1000000 isqrt": 1000, "99 isqrt": 9, "2 10 **": 1024,
    "12 18 gcd": 6, "4 6 lcm": 12, "27 collatz": 111, "10 3 choose": 120, "1000 log2": 9, "12345 digits": 5,
    "12345 digit-sum": 15, "3 200 13 powmod": pow(3, 200, 13), "255 popcount": 8, "1 31 rotl32": 1 << 31,
    "5 8 align-up": 8, "4096 primes-below": 564, "2000 leap": -1, "1900 leap": 0, "2024 2 days-in-month": 29,
    "2000 days-before-year": 730119, "&eacute": 0xe9, "256 sin": 65536, "768 sin": -65536, "3 4 norm": 5,
    "here 49 over c! 50 over 1+ c! 2 crc32": zlib.crc32(b"12"), "5 3 8 within": -1, "8 3 8 within": 0,
    "100 celsius": 212, "3 0 10 clamp": 3, "variable x 5 x ! x inc x @": 6, "5 here 10 rot fill here 10 sum-bytes": 50,
    "( a comment ) : twice dup + ; 21 twice": 42, "no-such-word": -7, "drop": -2, ": f recurse ; f": -3,
    "1 0 /": "INTEGER_DIVISION_BY_ZERO"}


class Interpreter:
    def __init__(self, path):
        import wasmtime

        self.engine = wasmtime.Engine()
        self.module = wasmtime.Module(self.engine, path.read_bytes())

    def answer(self, text):
        import wasmtime

        guest = image.Interpreter(self.engine, lambda store: wasmtime.Instance(store, self.module, []))
        at = guest.exports["request"](guest.store)
        guest.exports["memory"].write(guest.store, text.encode() + b"\0", at)
        try:
            return guest.exports["eval"](guest.store)
        except wasmtime.Trap as trap:
            return trap.trap_code.name


@pytest.mark.usefixtures("with_wasmtime")
def test_the_words_of_the_interpreters_library_compute_the_functions_of_their_names():
    shipped = Interpreter(INTERPRETER)
    assert shipped.module.imports == []
    assert {text: shipped.answer(text) for text in ANSWERS} == ANSWERS


@pytest.mark.skipif(not ITS_SOURCE.exists(), reason="the sources are not beside the tests")
@pytest.mark.usefixtures("with_wasmtime")
def test_the_interpreter_built_from_its_source_by_its_own_command_answers_as_the_shipped_one(tmp_path):
    fresh = Interpreter(support.rebuilt(ITS_SOURCE, tmp_path))
    shipped = Interpreter(INTERPRETER)
    names = [sorted(entry.name for entry in program.module.exports) for program in (fresh, shipped)]
    assert names[0] == names[1]
    assert {text: fresh.answer(text) for text in ANSWERS} == ANSWERS


@pytest.mark.usefixtures("with_wasmtime")
@pytest.mark.parametrize("setting", [engines.LINMEM_POOL, engines.LINMEM_PLAIN], ids=lambda setting: setting.key)
def test_a_restored_or_restarted_interpreter_serves_every_request(setting, monkeypatch):
    for make in (image.put_back, image.start_again):
        assert make(engines.Engines(), setting)()(4) > 0
        with monkeypatch.context() as patch:
            patch.setattr(image, "REQUEST", (b"1\0", 2))
            with pytest.raises(RuntimeError, match="answers 1 instead of 2"):
                make(engines.Engines(), setting)()(1)


# -- patterns of touches ----------------------------------------------------------------------------------

def uses_of(pattern, dirty=16, total=1024, count=64):
    touches, ends = reset.draw(reset.Case(pattern, dirty, total), count)
    assert len(ends) == count
    assert touches.max() < total * PAGE
    assert not (touches % PAGE).any()
    starts = [0, *map(int, ends[:-1])]
    return [sorted(map(int, touches[a:b] // PAGE)) for a, b in zip(starts, map(int, ends), strict=True)]


@requires("numpy")
def test_each_pattern_touches_the_pages_of_its_name():
    same, redrawn, alternating, bursty, skewed = map(uses_of, reset.PATTERNS)
    assert len(set(map(tuple, same))) == 1
    assert len(set(map(tuple, redrawn))) == 64
    assert alternating[0::2] == [alternating[0]] * 32
    assert alternating[1::2] == [alternating[1]] * 32
    assert alternating[0] != alternating[1]
    assert [len(use) for use in bursty] == ([16] * 15 + [128]) * 4
    assert len(set(map(tuple, bursty))) == 5
    hot = sum(page < 1024 // 5 for use in skewed for page in use)
    assert hot / sum(map(len, skewed)) == pytest.approx(0.8, abs=0.05)


@requires("numpy")
@pytest.mark.parametrize("pattern", reset.PATTERNS)
def test_a_pattern_is_the_same_in_every_run_and_stays_within_the_memory(pattern):
    assert uses_of(pattern) == uses_of(pattern)
    assert all(len(use) <= 16 for use in uses_of(pattern, 16, 16))


def test_all_ways_to_reset_run_whole_periods_of_the_same_sequence():
    for quick in (True, False):
        for group in reset.groups(quick)[2:]:
            operations = [contender.operations for contender in group.contenders]
            assert operations[0] == operations[1]
            assert all(n % reset.PERIOD == 0 for n in operations)


# -- threads ----------------------------------------------------------------------------------------------

def test_a_run_on_threads_does_every_operation_and_at_least_one_on_each_thread():
    done = []
    run = threads.on_threads(lambda n: done.append(n), 2, threads.Spoilt())
    assert run(10) >= 0
    assert done == [5, 5]
    run(1)
    assert done[2:] == [1, 1]


@pytest.mark.parametrize(("spans", "preempted", "spoilt_by"), [
    ([(0, 100), (1, 101)], 0, 0), ([(0, 100), (90, 190)], 0, 1), ([(0, 100), (1, 101)], 3, 3),
    ([(0, 100), (90, 190)], 3, 4),
])
def test_threads_that_hardly_overlap_or_lose_their_processor_spoil_a_run(monkeypatch, spans, preempted, spoilt_by):
    spoilt = threads.Spoilt()
    monkeypatch.setattr(threads, "together", lambda loop, n, workers: (spans, preempted))
    assert threads.on_threads(None, 2, spoilt)(2) == spans[1][1]
    assert spoilt.count == spoilt_by


def test_an_error_in_a_threads_loop_is_raised():
    with pytest.raises(ZeroDivisionError):
        threads.on_threads(lambda n: 1 // 0, 2, threads.Spoilt())(2)


@pytest.mark.parametrize(("control", "text"), [
    (1.6, "not measured: the control scales only 1.60 x here"), (1.9, "holds")])
def test_two_threads_are_judged_only_where_the_machine_gives_them_two_processors(control, text):
    def scaling(key, ratio, goal):
        row = harness.Row(f"{key}/one", key, "two", "one", goal, SPEED, P10, ratio_p10=ratio,
                          holds=None if goal is None else ratio >= goal)
        return harness.Result(harness.Group(key, key, (), ()), [], [row])

    results = threads.conclude([scaling("control", control, None), scaling("pool", 1.9, 1.8)])
    row = results[1].rows[0]
    assert report.verdict(row) == text
    assert row.ratio_p10 == 1.9
    assert results[0].rows[0].unavailable is None


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
    series = harness.measure(group, 4, 0, lambda: None)
    rows = list(harness.compare(group, series))
    assert {s.operations for s in series} == {10}
    assert [(row.ratio_p10, row.ratio_median, row.holds) for row in rows] == [
        (2.0, 2.0, False), (0.25, 0.25, True), (0.25, 0.25, None)]


def test_a_state_of_the_machine_that_lasts_a_round_cancels_out_of_the_verdict():
    def switching(key, ns):
        return harness.Contender(key, key, lambda: lambda n: ns * n * (1 if state[0] < 5 else 2))

    state = [0]
    group = harness.Group("g", "operation", (switching("a", 110), switching("b", 100)), (harness.Goal("b", 1.1),),
                          operations=1)
    series = harness.measure(group, 10, 0, lambda: state.__setitem__(0, state[0] + 1))
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


def test_a_preempted_run_is_repeated_until_a_run_is_undisturbed(monkeypatch):
    counts = iter([0, 1, 1, 2, 2, 2])
    monkeypatch.setattr(harness, "preemptions", lambda: next(counts))
    times = iter([300, 200, 250])
    assert harness.run_undisturbed(lambda n: next(times), 1) == (250, True)


def test_a_run_that_is_preempted_every_time_counts_as_disturbed_and_gives_its_fastest(monkeypatch):
    counts = iter(range(2 * harness.TRIES))
    monkeypatch.setattr(harness, "preemptions", lambda: next(counts))
    times = iter([300, 200, 250, 220, 210])
    assert harness.run_undisturbed(lambda n: next(times), 1) == (200, False)


def test_a_contender_that_cannot_run_gives_the_reason_and_the_others_are_measured():
    def refuse():
        raise harness.Unavailable("not on a Tuesday")

    def lack():
        raise ModuleNotFoundError("No module named 'nothing'", name="nothing")

    group = harness.Group(
        "g", "operation",
        (contender("a", 3), contender("b", 1), harness.Contender("x", "x", refuse), harness.Contender("y", "y", lack)),
        (harness.Goal("b", 4), harness.Goal("x", 1), harness.Goal("y", 1)), operations=1)
    series = harness.measure(group, 2, 0, lambda: None)
    measured, refused, lacking = harness.compare(group, series)
    assert measured.ratio_p10 == 3.0
    assert (refused.unavailable, refused.holds) == ("not on a Tuesday", None)
    assert lacking.unavailable == "nothing is not installed"
    assert report.verdict(refused) == "not measured: not on a Tuesday"


def test_the_garbage_collector_is_off_during_a_measurement_and_on_afterwards():
    seen = []
    group = harness.Group("g", "operation", (harness.Contender("a", "a", lambda: lambda n: seen.append(gc.isenabled())
                                                               or n),), (), operations=1)
    harness.measure(group, 2, 0, lambda: None)
    assert seen
    assert not any(seen)
    assert gc.isenabled()


def test_one_round_is_refused_because_a_spread_needs_two(capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--rounds", "1"])
    assert "must be >= 2" in capsys.readouterr().err


def test_a_goal_in_times_faster_is_the_others_time_over_ours_and_holds_from_its_bound_up():
    group = harness.Group(
        "g", "operation", (contender("a", 50), contender("b", 100), contender("c", 40)),
        (harness.Goal("b", 2.0, sense=SPEED), harness.Goal("b", 2.1, sense=SPEED, by=P10),
         harness.Goal("c", 0.8, sense=SPEED, by=P10), harness.Goal("b", 0.5, by=P10)), operations=10)
    rows = list(harness.compare(group, harness.measure(group, 3, 0, lambda: None)))
    assert [(row.judged(), row.holds) for row in rows] == [(2.0, True), (2.0, False), (0.8, True), (0.5, True)]
    assert [report.bound(row) for row in rows] == [">= 2 x", ">= 2.1 x", ">= 0.8 x", "<= 0.5 x"]


def test_a_goal_by_p10_looks_at_the_machines_best_state_and_one_by_median_at_every_round(monkeypatch):
    monkeypatch.setattr(harness, "preemptions", lambda: 0)  # a preempted run is repeated, which would use up a figure
    figures = {"a": iter([100] * 9), "b": iter([100] + [150] * 8)}

    def given(key):
        return harness.Contender(key, key, lambda: lambda n: next(figures[key]))

    group = harness.Group("g", "operation", (given("a"), given("b")),
                          (harness.Goal("b", 1.4, sense=SPEED), harness.Goal("b", 1.4, sense=SPEED, by=P10)),
                          operations=1)
    series = harness.measure(group, 8, 0, lambda: None)
    series[1].ns[:2] = [100, 100]
    by_median, by_p10 = harness.compare(group, series)
    assert (by_median.ratio_median, by_median.holds) == (1.5, True)
    assert (by_p10.ratio_p10, by_p10.holds) == (1.0, False)


def test_the_cost_of_another_contender_is_subtracted_before_times_are_compared():
    def less(key, ns, base):
        return harness.Contender(key, key, lambda: lambda n: ns * n, less=base)

    group = harness.Group(
        "g", "operation", (less("a", 30, "base"), less("b", 110, "base"), less("c", 10, "base"), contender("base", 10)),
        (harness.Goal("b", 5, sense=SPEED, by=P10), harness.Goal("c", None, sense=SPEED)), operations=1)
    series = harness.measure(group, 4, 0, lambda: None)
    assert [s.p10() for s in series] == [20, 100, 0, 10]
    measured, nothing_left = harness.compare(group, series)
    assert (measured.ratio_p10, measured.ratio_median, measured.holds) == (5.0, 5.0, True)
    assert nothing_left.unavailable == "the difference is less than the noise"


def test_a_row_whose_subject_is_not_the_first_contender_is_marked():
    group = harness.Group("g", "operation", (contender("a", 10), contender("b", 30), contender("c", 60)),
                          (harness.Goal("c", None), harness.Goal("c", None, ours="b")), operations=1)
    first, second = harness.compare(group, harness.measure(group, 2, 0, lambda: None))
    assert (first.key, first.operation, first.ours) == ("g/c", "operation", "a")
    assert (second.key, second.operation, second.ours, second.ratio_p10) == ("g/b/c", "operation, b", "b", 0.5)


def test_of_several_contenders_the_fastest_of_this_run_is_the_one_to_beat():
    def refuse():
        raise harness.Unavailable("no")

    group = harness.Group(
        "g", "operation", (contender("a", 10), contender("b", 30), contender("c", 20),
                           harness.Contender("x", "x", refuse)),
        (harness.Goal(("b", "c", "x"), 2.5, sense=SPEED, by=P10, called="best"),
         harness.Goal(("x",), 1, sense=SPEED, called="none")), operations=1)
    best, none = harness.compare(group, harness.measure(group, 2, 0, lambda: None))
    assert (best.key, best.against, best.ratio_p10, best.holds) == ("g/best", "c (best of 2)", 2.0, False)
    assert (none.key, none.unavailable, none.holds) == ("g/none", "no", None)


def test_a_geometric_mean_needs_every_row():
    def row(ratio, why=None):
        return harness.Row("k", "o", "a", "b", None, SPEED, P10, ratio_p10=ratio, unavailable=why)

    mean = harness.together("m", "mean", [row(2.0), row(8.0)], "a", "b", 4)
    assert mean.ratio_p10 == pytest.approx(4.0)
    assert (mean.sense, mean.by) == (SPEED, P10)
    lacking = harness.together("m", "mean", [row(2.0), row(None, "why")], "a", "b", 4)
    assert (lacking.ratio_p10, lacking.unavailable, lacking.holds) == (None, "why", None)


def test_a_contender_that_only_some_groups_of_a_table_have_is_a_dash_for_the_others():
    def result(key, *contenders):
        group = harness.Group(key, key, contenders, (), operations=1, table="t")
        return harness.Result(group, harness.measure(group, 2, 0, lambda: None), [])

    table, = report.tables([result("g", contender("a", 1), contender("c", 3)),
                            result("h", contender("a", 4), contender("b", 5), contender("c", 6))])
    assert table.columns == ["g", "h"]
    assert table.lines == [("a", [1.0, 4.0]), ("b", [None, 5.0]), ("c", [3.0, 6.0])]


def test_the_shared_object_of_a_group_is_made_once_and_kept_while_it_is_referenced():
    class Big:
        pass

    shared = harness.Shared(Big)
    first = shared()
    assert shared() is first
    gone = weakref.ref(first)
    del first
    assert gone() is None
    assert isinstance(shared(), Big)


def test_the_worst_pattern_is_the_summary_row_of_all_patterns():
    def result(key, ratio):
        rows = [harness.Row(f"{key}/{name}", key, "adaptive", name, None, SPEED, P10, ratio_p10=ratio)
                for name in ("discard", "better_simple")]
        return harness.Result(harness.Group(key, key, (), (), table="t"), [], rows)

    mean, worst = reset.conclude([result("x", 4.0), result("y", 0.5), result("z", 0.5)])[-1].rows
    assert mean.ratio_p10 == pytest.approx(1.0)
    assert (worst.ratio_p10, worst.holds) == (0.5, False)
    assert "y" in worst.operation


def test_each_contender_may_have_its_own_number_of_operations_within_the_groups_bounds(monkeypatch):
    monkeypatch.setattr(harness, "preemptions", lambda: 0)
    group = harness.Group(
        "g", "operation", (contender("a", 1), contender("b", 100), contender("c", 1000),
                           harness.Contender("d", "d", lambda: lambda n: n, operations=7)),
        (), alike=False, least=4, most=512)
    assert [s.operations for s in harness.measure(group, 2, 1600, lambda: None)] == [512, 16, 4, 7]


def test_measured_objects_are_freed_before_the_next_group():
    class Big:
        def __call__(self, n):
            return n

    made = []

    def make():
        big = Big()
        made.append(weakref.ref(big))
        return big

    group = harness.Group("g", "operation", (harness.Contender("a", "a", make),), (), operations=1)
    series = harness.measure(group, 2, 0, lambda: None)
    assert series[0].ns == [1, 1]
    assert made[0]() is None


def test_the_markdown_replaces_only_what_stands_between_the_marks(tmp_path):
    group = harness.Group("g", "operation", (contender("a", 2), contender("b", 1)), (harness.Goal("b", 3),),
                          operations=1)
    series = harness.measure(group, 2, 0, lambda: None)
    results = [harness.Result(group, series, list(harness.compare(group, series)))]
    begin, end = report.marks("core")
    path = tmp_path / "page.md"
    path.write_text(f"# Head\n\n{begin}\nstale\n{end}\n\ntail µ\n", encoding="utf-8")
    report.write_markdown(str(path), results, report.About("core", report.machine(), 2, False))
    text = path.read_text("utf-8")
    assert text.startswith(f"# Head\n\n{begin}\n")
    assert text.endswith(f"{end}\n\ntail µ\n")
    assert "stale" not in text
    assert "| `g` | b | **2.00 x** | 2 .. 2 | 2.00 x | <= 3 x | holds |" in text


# -- counted results ------------------------------------------------------------------------------------------

@requires("maps", "scans")       # without scans, a reset discards the pages of large memories immediately
def test_a_burst_raises_resident_bytes_and_later_traffic_gives_them_back(monkeypatch):
    case = soak_pool.CASES[0]
    for idle in (0.1, 2, 20):       # a slow machine needs a larger `idle`: the burst must take less time
        before, at_once, later = soak_pool.Server(idle).serve(case, 4)
        if at_once - before > 3 * case.size:
            break
    assert at_once - before > 3 * case.size > 6 * (later - before)
    monkeypatch.setattr(soak_pool, "pool", lambda **options: linmem.creator("pool", idle_seconds=None))
    before, at_once, later = soak_pool.Server(0.1).serve(case, 4)
    assert later - before > 3 * case.size


@pytest.mark.parametrize("case", fair.CASES, ids=lambda case: case.key)
def test_tenants_of_one_domain_have_no_separate_shares(case):
    assert fair.hit_rate(case, 20, "second") == 0.95
    assert fair.hit_rate(case, 20, "first") == 0
    assert linmem.metrics.totals()["resident_bound"] != fair.ROOM * fair.STEP


def fake_suite(monkeypatch, goal):
    group = harness.Group("g", "operation", (contender("a", 2), contender("b", 1)), (harness.Goal("b", goal),),
                          operations=1)
    monkeypatch.setattr(core, "groups", lambda quick: [group])


@pytest.mark.parametrize(("goal", "check", "code"), [(3, True, 0), (1, False, 0), (1, True, 1)])
def test_check_turns_a_missed_goal_into_exit_code_one(monkeypatch, capsys, goal, check, code):
    fake_suite(monkeypatch, goal)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.main(parser.parse_args(["--rounds", "2"] + ["--check"] * check)) == code
    assert ("holds" if goal == 3 else "missed") in capsys.readouterr().out


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.main(parser.parse_args(["--picture", "x.png"])) == 1
    assert "needs rich and matplotlib: pip install 'linmem[bench]'" in capsys.readouterr().err


def measured(monkeypatch, *options):
    fake_suite(monkeypatch, 3)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.main(parser.parse_args(["--rounds", "2", *map(str, options)]))


def refusals(said):
    return [line for line in said.err.splitlines() if line.startswith("linmem bench: ")]


OUTPUTS = {"--json": "figures.json", "--picture": "figure.png", "--markdown": "page.md"}


@requires("matplotlib")
@pytest.mark.parametrize("option", OUTPUTS)
def test_a_file_of_figures_is_written_atomically(monkeypatch, tmp_path, capsys, option):
    path = tmp_path / OUTPUTS[option]
    path.write_bytes(b"old")
    path.chmod(0o600)
    rights = path.stat().st_mode

    def refuse(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        assert measured(monkeypatch, option, path) == 1
    said = capsys.readouterr()
    assert "holds" in said.out
    assert refusals(said) == [f"linmem bench: {path}: {os.strerror(errno.ENOSPC)}"]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [path.name]
    assert measured(monkeypatch, option, path) == 0
    assert path.stat().st_size > 3
    assert path.stat().st_mode == rights
    assert os.listdir(tmp_path) == [path.name]


@requires("matplotlib")
@pytest.mark.parametrize("option", OUTPUTS)
def test_a_file_of_figures_with_no_name_is_refused_before_anything_is_measured(option, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(SystemExit) as end:
        parser.parse_args([option, ""])
    assert end.value.code == 2
    assert f"argument {option}: must be the name of a file, got ''" in capsys.readouterr().err


@requires("matplotlib")
@pytest.mark.parametrize("option", OUTPUTS)
def test_outputs_that_cannot_be_written_are_named_and_the_rest_is_written(monkeypatch, tmp_path, capsys, option):
    paths = {name: tmp_path / file for name, file in OUTPUTS.items()}
    paths[option] = tmp_path / "no\nfolder" / OUTPUTS[option]
    assert measured(monkeypatch, *(word for pair in paths.items() for word in pair)) == 1
    (line,) = refusals(capsys.readouterr())
    assert line.startswith(f"linmem bench: {tmp_path}{os.sep}no\\nfolder{os.sep}")
    assert sorted(os.listdir(tmp_path)) == sorted(file for name, file in OUTPUTS.items() if name != option)


@requires("matplotlib")
def test_a_picture_of_an_unknown_format_is_refused_and_leaves_no_file(monkeypatch, tmp_path, capsys):
    assert measured(monkeypatch, "--picture", tmp_path / "figure.nothing") == 1
    (line,) = refusals(capsys.readouterr())
    assert "nothing" in line
    assert os.listdir(tmp_path) == []


@requires("fifos")
def test_figures_go_into_a_pipe_as_a_stream(monkeypatch, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE)
    assert measured(monkeypatch, "--json", tmp_path / "pipe") == 0
    assert json.loads(reader.communicate(timeout=60)[0])["suite"] == "core"


@requires("module_files")
@pytest.mark.parametrize(("group", "kind", "suffix"), [
    (run_command.run_cached, run_command.Folder, "cwasm"),
    pytest.param(run_command.run_prepared, run_command.ComponentFolder, "ccomponent", marks=requires("components"))])
def test_both_processes_of_the_cached_run_run_the_same_program(monkeypatch, group, kind, suffix):
    monkeypatch.setattr(run_command, "QUICK_CODE_BYTES", 10_000)
    monkeypatch.setattr(run_command, "DATA_BYTES", 100)
    monkeypatch.setattr(run_command, "SETTLED", 0)
    runs = [contender.make() for contender in group(quick=True).contenders]
    assert all(run(1) > 0 for run in runs)
    folder = kind(10_000)
    assert len(list(folder.cache.glob(f"*/*.{suffix}"))) == 1
    folder.program.write_bytes(b"damaged")
    for words in (folder.linmem(), [folder.script()[0], str(folder.program)]):
        with pytest.raises(subprocess.CalledProcessError):
            folder.start(words)
