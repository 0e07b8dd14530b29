"""The tasks of the newcomer: a page of docs/, and what must be there at its end, seen from outside of the root."""

from __future__ import annotations

import ast
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from newcomer.root import Shell

# The newcomer's shell, and all that the newcomer has seen.
Check = Callable[[Shell, str], None]


@dataclass(frozen=True)
class Task:
    page: str               # below docs/, without .md
    achieved: Check
    until: str = ""         # a heading at which the newcomer stops reading

    @property
    def name(self) -> str:
        return self.page.rpartition("/")[2]


def equal(value: object, expected: object) -> None:
    assert value == expected, f"{value!r}, and not {expected!r}"


def npy_rows(path: Path, code: str) -> list:
    """The rows of an .npy file, whose head says their number as `'shape': (N,)`."""
    data = path.read_bytes()
    equal(data[:8], b"\x93NUMPY\1\0")
    start = 10 + int.from_bytes(data[8:10], "little")
    (rows,) = ast.literal_eval(data[10:start].decode().strip())["shape"]
    return [value for value, in struct.iter_unpack(f"<{code}", data[start:start + rows * struct.calcsize(code)])]


def column_store(shell: Shell, seen: str) -> None:
    hours, cities = npy_rows(shell.folder / "weather/hour.npy", "q"), npy_rows(shell.folder / "weather/city.npy", "8s")
    day = [hour for hour in range(24) for _ in range(2)]
    equal(hours, [*day, *day, *range(96, 1500), *range(1000), *day])
    equal([cities.count(city.ljust(8, b"\0")) for city in (b"Oslo", b"Cairo", b"Lima", b"Quito")], [72, 72, 1404, 1000])
    equal(len(npy_rows(shell.folder / "weather/celsius.npy", "d")), 2548)


def plugin_sandbox(shell: Shell, seen: str) -> None:
    equal(seen.count("b'STILL ALIVE'\n"), 4)
    assert "refused: 1 of bob, 0 of ann\n" in seen


def emulator(shell: Shell, seen: str) -> None:
    row = 1 << 31           # rule 30, with one bit for each cell
    for _ in range(15):
        row = row >> 1 ^ (row | row << 1)
    (drawn,) = [line.split()[1] for line in seen.splitlines() if line.startswith("0x183c0 ")]
    equal(drawn.translate(str.maketrans(".#", "01")), f"{row:064b}")


def arrays(shell: Shell, seen: str) -> None:
    equal(npy_rows(shell.folder / "prices.npy", "d"), [101.25, 101.5, 101.75, 102.0, 102.25])


def shared(shell: Shell, seen: str) -> None:
    equal(seen, "[101.25 101.5 ]\n")
    equal(shell.type("ls -A /dev/shm\n", 60), ("", 0))      # nothing is left


def files(shell: Shell, seen: str) -> None:
    equal(struct.unpack("<2000d", (shell.folder / "numbers.bin").read_bytes()), (*[0.0] * 999, 1.5, *[0.0] * 1000))
    data = (shell.folder / "kept.bin").read_bytes()
    equal((len(data), data[:4], data[-1]), (1 << 20, b"kept", 7))
    equal((shell.folder / "counter.memory").read_bytes(), (42).to_bytes(65536, "little"))


def wasmtime(shell: Shell, seen: str) -> None:
    refused, late = seen.splitlines()
    assert refused.startswith("a wasmtime store owns this memory"), refused
    equal(late, "the request took too long")


def start_anywhere(shell: Shell, seen: str) -> None:
    for name in "squares.snapshot", "prewarmed.snapshot":       # with the bytes of the guest's table
        assert struct.pack("<2q", 99_998 ** 2, 99_999 ** 2) in (shell.folder / name).read_bytes(), name


TASKS = [
    Task("tutorials/column-store", column_store),
    Task("tutorials/plugin-sandbox", plugin_sandbox),
    Task("tutorials/emulator", emulator),
    Task("howto/arrays", arrays),
    Task("howto/shared", shared),
    Task("howto/files", files),
    Task("howto/wasmtime", wasmtime, until="## A service for the plugins of several tenants"),
    Task("howto/start-anywhere", start_anywhere, until="### In a pickle, and on a cluster"),
]
