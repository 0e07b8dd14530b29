"""Sizes, times, counts and wasmtime's errors as text."""

from __future__ import annotations

import re

from linmem._core.arguments import show_size as show_size


def show_time(ns: int) -> str:
    if ns < 1_000_000:
        return f"{ns / 1_000:.1f} us"
    return f"{ns / 1_000_000:.1f} ms" if ns < 1_000_000_000 else f"{ns / 1_000_000_000:.2f} s"


def count(n: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{n} {noun if n == 1 else plural}"


def one_line(error: Exception) -> str:
    """The message of an error of wasmtime and its causes, without the excerpt of the source and the backtraces."""
    head, _, causes = str(error).partition("Stack backtrace:")[0].partition("Caused by:")
    lines = head.strip().splitlines()
    said = [] if not lines or "wasm backtrace" in lines[0] else [lines[0]]
    said += [re.sub(r"^\d+: ", "", line.strip()) for line in causes.splitlines() if line.strip()]
    from linmem._wasm.cause import without_tokens

    place = re.search(r"--> .*:(\d+):(\d+)$", head, re.MULTILINE)
    return without_tokens(": ".join(said)) + (f" (line {place[1]}, column {place[2]})" if place else "")
