"""The program that `linmem demo` runs: the shipped module is the one that its source describes."""

from __future__ import annotations

import pathlib

import pytest
import support
import wasmtime

import linmem

PACKAGE = pathlib.Path(linmem.__file__).parent
SOURCE = PACKAGE / "_commands" / "demo.c"
SHIPPED = PACKAGE / "_commands" / "demo.wasm"
# n -> number of primes up to n: known values, and values at the edges of the first two wasm pages.
KNOWN = {0: 0, 1: 0, 2: 1, 3: 2, 100: 25, 65535: 6542, 65536: 6542, 65537: 6543, 131071: 12251, 10 ** 6: 78498}


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    return support.rebuilt(SOURCE, tmp_path_factory.mktemp("demo"))


class Program:
    def __init__(self, path):
        self.engine = wasmtime.Engine()
        self.store = wasmtime.Store(self.engine)
        self.module = wasmtime.Module(self.engine, path.read_bytes())
        self.exports = wasmtime.Instance(self.store, self.module, []).exports(self.store)

    def count_primes(self, limit):
        return self.exports["count_primes"](self.store, limit)

    def numbers(self):
        memory = self.exports["memory"]
        return bytes(memory.read(self.store, self.exports["table"](self.store), memory.data_len(self.store)))


def test_the_shipped_program_counts_primes_correctly():
    program = Program(SHIPPED)
    assert {limit: program.count_primes(limit) for limit in KNOWN} == KNOWN


def test_the_shipped_program_has_no_imports_and_returns_minus_one_if_the_table_does_not_fit():
    program = Program(SHIPPED)
    assert [entry.name for entry in program.module.imports] == []
    assert program.count_primes((1 << 30) + 1) == -1
    program.store.set_limits(memory_size=2 << 20)
    assert program.count_primes(10 ** 7) == -1
    assert program.count_primes(100) == 25


def test_a_build_from_the_source_by_its_own_command_behaves_as_the_shipped_program(rebuilt):
    shipped, fresh = Program(SHIPPED), Program(rebuilt)
    names = [sorted(entry.name for entry in program.module.exports) for program in (fresh, shipped)]
    assert names[0] == names[1]
    for limit in KNOWN:
        assert fresh.count_primes(limit) == shipped.count_primes(limit) == KNOWN[limit]
    assert fresh.numbers() == shipped.numbers()
    assert fresh.exports["memory"].size(fresh.store) == shipped.exports["memory"].size(shipped.store)
