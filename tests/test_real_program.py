"""A real program as a client: the same C source runs natively and as wasm in linmem memories."""

import pathlib
import subprocess
import sys

import pytest
import wasmtime
from support import NEEDS

import linmem
import linmem.wasmtime

SOURCE = pathlib.Path(__file__).parent / "programs" / "heap.c"


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """The program as a native executable and as a WASI module."""
    if not NEEDS["zig"][0]:
        pytest.skip(NEEDS["zig"][1])
    folder = tmp_path_factory.mktemp("programs")
    paths = folder / "heap.exe", folder / "heap.wasm"
    for path, target in zip(paths, ([], ["-target", "wasm32-wasi"]), strict=True):
        subprocess.run([sys.executable, "-m", "ziglang", "cc", *target, "-O2", "-o", str(path), str(SOURCE)],
                       check=True, timeout=600, capture_output=True)
    return paths


def run_wasm(path, arguments, creator, out):
    config = wasmtime.Config()
    linmem.wasmtime.install(config, creator)
    engine = wasmtime.Engine(config)
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    store = wasmtime.Store(engine)
    wasi = wasmtime.WasiConfig()
    wasi.argv = ["heap", *arguments]
    wasi.stdout_file = str(out)
    store.set_wasi(wasi)
    instance = linker.instantiate(store, wasmtime.Module.from_file(engine, str(path)))
    try:
        instance.exports(store)["_start"](store)
        code = 0
    except wasmtime.ExitTrap as trap:
        code = trap.code
    store.close()
    return code, out.read_text()


def test_a_program_that_grows_by_hundreds_of_mib_computes_the_same_results_as_natively(programs, tmp_path):
    native, wasm = programs
    arguments = ["3000", str(4 << 20)]
    expected = subprocess.run([str(native), *arguments], capture_output=True, text=True, check=True, timeout=120).stdout
    statistics = linmem.StatisticsCreator(linmem.MmapCreator())
    assert run_wasm(wasm, arguments, statistics, tmp_path / "out") == (0, expected)
    (memory,) = statistics.memories()
    assert memory["growths"] > 50
    assert memory["size"] > 300 << 20
    assert memory["peak_resident"] > 300 << 20
    assert not memory["alive"]


def test_the_same_program_reaches_its_budget_and_reports_this_itself(programs, tmp_path):
    _, wasm = programs
    budget = linmem.LimitingCreator(linmem.MmapCreator(), 64 << 20)
    code, output = run_wasm(wasm, ["3000", str(4 << 20)], budget, tmp_path / "out")
    assert code == 3
    assert "no memory for" in output
    assert 32 << 20 < budget.peak_bytes <= 64 << 20
    assert budget.used_bytes == 0
