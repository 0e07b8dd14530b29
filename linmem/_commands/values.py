"""Arguments and results of functions that `linmem run --invoke` calls, as text."""

from __future__ import annotations

import re
import struct

_INTEGER = re.compile(r"([+-]?)(?:0x([0-9a-f]+)|(\d+))", re.IGNORECASE | re.ASCII)
_MAX_DIGITS = 40        # more than any integer type has


def parse_integer(text: str, bits: int, signed: bool | None = None) -> int:
    """An integer in decimal or, after "0x", in hexadecimal digits.

    signed: whether the type is signed. None: the type only has bits, and the number that the bits mean as a signed
    number is returned.

    Raises
    ------
    ValueError
        With a message that continues "argument 'x' ".
    """
    match = _INTEGER.fullmatch(text)
    if match is None:
        raise ValueError("is not an integer, like 42, -1 or 0x2a")
    sign, hexadecimal, decimal = match.groups()
    digits = (hexadecimal or decimal).lstrip("0") or "0"
    least = 0 if signed is False else -(1 << bits - 1)
    most = (1 << bits - 1 if signed else 1 << bits) - 1
    value = int(sign + digits[:_MAX_DIGITS], 16 if hexadecimal else 10)
    if len(digits) > _MAX_DIGITS or not least <= value <= most:
        raise ValueError(f"must be from {least} to {most}")
    return value - (1 << bits) if signed is None and value >= 1 << bits - 1 else value


def parse_float(text: str, bits: int) -> float:
    """A floating-point number, "inf", "-inf" or "nan". Raises ValueError as `parse_integer` does."""
    try:
        value = float(text) if text.isascii() and "_" not in text else None
    except ValueError:
        value = None
    if value is None:
        raise ValueError("is not a number, like 1.5, -2e3, inf or nan")
    if bits == 32:
        try:
            struct.pack("<f", value)
        except OverflowError:
            raise ValueError("is too large for an f32") from None
    return value


def parse_number(text: str, kind: str) -> int | float:
    """A number of one of the types i32, i64, f32 and f64. Raises ValueError as `parse_integer` does."""
    bits = int(kind[1:])
    return parse_float(text, bits) if kind[0] == "f" else parse_integer(text, bits)
