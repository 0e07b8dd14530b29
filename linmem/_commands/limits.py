"""The limits of a run besides the budget of its memories: time, fuel, instances and the elements of tables."""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from linmem._commands.parser import Parser
from linmem._commands.values import parse_float, parse_integer

_MAX_SECONDS = 10 ** 9
_MOST = (1 << 63) - 1       # wasmtime takes these numbers with 63 bits
_ELEMENT_SIZE = 8           # bytes of the host for one element of a table


def add_limits(parser: Parser) -> None:
    """Declare the options of the limits."""
    parser.add_argument("--timeout", type=_seconds, metavar="SECONDS",
                        help="end the program after this time, also while it sleeps, reads or waits. The time counts"
                             " from the program's first instruction, not from its compilation")
    parser.add_argument("--fuel", type=_count, metavar="N",
                        help="end the program after N units of fuel: about one for each instruction of WebAssembly")
    parser.add_argument("--max-instances", type=_count, metavar="N",
                        help="refuse a program that makes more than N instances of core modules. A module is one; a"
                             " component may have several")


def _seconds(text: str) -> float:
    try:
        value = parse_float(text, 64)
    except ValueError as reason:
        raise argparse.ArgumentTypeError(f"{text!r:.100} {reason}") from None
    if not 0 < value <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r:.100} must be more than 0 and at most {_MAX_SECONDS} seconds")
    return value


def _count(text: str) -> int:
    try:
        value = parse_integer(text, 64, signed=True)
        if value < 1:
            raise ValueError(f"must be from 1 to {_MOST}")
    except ValueError as reason:
        raise argparse.ArgumentTypeError(f"{text!r:.100} {reason}") from None
    return value


class Clock:
    """Measures the time that the program runs.

    Attributes
    ----------
    seconds : float or None
        The time that the program may take.
    begun : threading.Event
        Set when the program runs, or never will run.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds, self.begun = seconds, threading.Event()
        self._end: float | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The program runs in the block."""
        if self.seconds is not None:
            self._end = time.monotonic() + self.seconds
        self.begun.set()
        try:
            yield
        finally:
            self._end = None

    def left(self) -> float | None:
        """The seconds until the end of the time; None if the time is not limited, or the program does not run."""
        end = self._end
        return None if end is None else max(0.0, end - time.monotonic())


class Limits:
    """What a program may use. `max_memory` also limits the elements of each table, because they take memory, too."""

    def __init__(self, *, timeout: float | None = None, fuel: int | None = None, max_instances: int | None = None,
                 max_memory: int | None = None) -> None:
        self.fuel, self.max_instances, self.max_memory = fuel, max_instances, max_memory
        self.clock = Clock(timeout)

    def configure(self, config: Any) -> None:
        """Set up the config of the engine, before the engine is made."""
        if self.fuel is not None:
            config.consume_fuel = True

    def apply(self, store: Any) -> None:
        """Set the limits of the store, before the program is instantiated in it."""
        if self.fuel is not None:
            store.set_fuel(self.fuel)
        store.set_limits(instances=-1 if self.max_instances is None else self.max_instances,
                         table_elements=-1 if self.max_memory is None else self.max_memory // _ELEMENT_SIZE)

    def explain(self, message: str) -> str:
        """The option that a message of wasmtime is about, in brackets; "" if it is about none."""
        if self.max_instances is not None and "instance count too high" in message:
            return f" (--max-instances {self.max_instances})"
        if self.max_memory is not None and "exceeds table limits" in message:
            return f" (--max-memory {self.max_memory} allows tables of {self.max_memory // _ELEMENT_SIZE} elements)"
        return ""
