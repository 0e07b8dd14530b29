"""Show a NumPy view that stays valid while its memory grows, in Python and under a WebAssembly
program, and after the store is closed. Every figure is checked.

Exit code 0 if all figures are right, else 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import linmem
from linmem._commands.parser import EXIT_REFUSED, Parser, Refused
from linmem._commands.text import count, one_line, show_size, show_time

STEP = 65536
PLAIN_SIZE = 64 << 20
FIRST_LIMIT, LIMIT = 10_000, 10_000_000
PRIMES = {FIRST_LIMIT: 1_229, LIMIT: 664_579}
LARGEST_PRIME, TWIN_PRIMES = 9_999_991, 58_980      # below LIMIT


class Checks:
    """Prints each claim with the value that was found, and counts the claims that do not hold."""

    def __init__(self) -> None:
        self.failed = 0

    def __call__(self, claim: str, expected: Any, found: Any, show: Callable[[Any], str] = str) -> None:
        held = expected == found
        self.note(held, claim, show(found) if held else f"expected {show(expected)}, found {show(found)}")

    def unchanged(self, claim: str, before: Any, after: Any, show: Callable[[Any], str] = str) -> None:
        self.note(before == after, claim, f"{show(before)} before, {show(after)} after")

    def note(self, held: bool, claim: str, values: str) -> None:
        self.failed += not held
        print(f"   {'[ok]    ' if held else '[FAILED]'} {claim}: {values}")


def add_arguments(parser: Parser) -> None:
    parser.description = __doc__


def main(args: Any) -> int:
    try:
        import numpy
        import wasmtime

        import linmem.wasmtime as installer
    except ImportError as error:
        raise Refused(f"needs NumPy and wasmtime-py: pip install 'linmem[demo]' ({error})") from None
    check = Checks()
    print("linmem demo: arrays that stay valid while their memory grows, and after it is dropped\n")
    try:
        demo_memory(numpy, check)
        demo_program(numpy, wasmtime, installer, check)
    except (MemoryError, RuntimeError, wasmtime.WasmtimeError) as error:
        raise Refused(one_line(error)) from None
    if check.failed:
        print(f"{count(check.failed, 'check')} FAILED.")
        return EXIT_REFUSED
    print("All checks passed.")
    return 0


def address_of(array: Any) -> int:
    return int(array.__array_interface__["data"][0])


def demo_memory(numpy: Any, check: Checks) -> None:
    memory = linmem.create(STEP, maximum=PLAIN_SIZE, reserve=PLAIN_SIZE)
    array = numpy.asarray(memory)
    array[:] = numpy.arange(STEP) % 251
    address, total = address_of(array), int(array.sum())
    print(f"1. A memory of {show_size(STEP)}, a NumPy array on it, and the memory grows in steps of {show_size(STEP)}.")
    for size in range(2 * STEP, PLAIN_SIZE + 1, STEP):
        memory.grow_to(size)
    whole = numpy.asarray(memory)
    resident = memory.info().resident
    check(f"size after {PLAIN_SIZE // STEP - 1} growths", PLAIN_SIZE, whole.nbytes, show_size)
    check.unchanged("address", address, address_of(whole), hex)
    check.unchanged("sum over the old array", total, int(array.sum()))
    check("new bytes that are not zero", 0, int(numpy.count_nonzero(whole[STEP:])))
    array[0] = 42
    check("a byte written through the old array, read through the new one", 42, int(whole[0]))
    print("   No byte was copied or moved: the addresses were reserved at the start, and each growth made\n"
          "   more of them accessible. numpy.resize and bytearray would have copied the bytes, or refused.")
    if resident is not None:
        print(f"   Physical memory in use before the check read all bytes: {show_size(resident)}.")
    print()


def demo_program(numpy: Any, wasmtime: Any, installer: Any, check: Checks) -> None:
    statistics = linmem.StatisticsCreator(linmem.creator())
    config = wasmtime.Config()
    installer.install(config, statistics)
    engine = wasmtime.Engine(config)
    store = wasmtime.Store(engine)
    module = wasmtime.Module(engine, Path(__file__).with_name("demo.wasm").read_bytes())
    exports = wasmtime.Instance(store, module, []).exports(store)
    memory = installer.linear_memory(store, exports["memory"])

    print("2. A WebAssembly program finds primes in a memory of linmem; its table grows page by page.")
    check(f"primes up to {FIRST_LIMIT:,} according to the program", PRIMES[FIRST_LIMIT],
          exports["count_primes"](store, FIRST_LIMIT))
    address, start = memory.as_ptr(), exports["table"](store)
    early = numpy.asarray(memory)[start:start + FIRST_LIMIT + 1]
    early_address = address_of(early)
    print(f"   A NumPy array shows this table, in {show_size(memory.byte_size())} of memory. The program goes on:")
    check(f"primes up to {LIMIT:,} according to the program", PRIMES[LIMIT], exports["count_primes"](store, LIMIT))
    (record,) = statistics.memories()
    print(f"   The memory went from {show_size(record['first_size'])} to {show_size(memory.byte_size())} in"
          f" {count(record['growths'], 'growth')}, {show_time(record['grow_ns'])} in all.")
    check.unchanged("address", address, memory.as_ptr(), hex)
    check(f"primes up to {FIRST_LIMIT:,} in the old array", PRIMES[FIRST_LIMIT],
          int(numpy.count_nonzero(early == 0)))
    table = numpy.asarray(memory)[start:start + LIMIT + 1]
    check("the old array still shares the memory of the program's table", True, bool(numpy.shares_memory(early, table)))
    print("   With wasmtime's own memory the array could now be a dangling pointer.\n")

    print("3. The store is closed. wasmtime has dropped the memory, but the arrays still exist.")
    del memory, exports
    store.close()
    primes = numpy.flatnonzero(table == 0)
    check.unchanged("address of the old array", early_address, address_of(early), hex)
    check(f"primes up to {FIRST_LIMIT:,} in the old array", PRIMES[FIRST_LIMIT],
          int(numpy.count_nonzero(early == 0)))
    check(f"primes up to {LIMIT:,} according to NumPy", PRIMES[LIMIT], len(primes))
    check("the largest of these primes", LARGEST_PRIME, int(primes[-1]))
    check("pairs of twin primes", TWIN_PRIMES, int(numpy.count_nonzero(numpy.diff(primes) == 2)))
    print("   The pages exist as long as an array on them exists. With wasmtime's own memory, a read of the\n"
          "   array would have ended this process here.\n")
