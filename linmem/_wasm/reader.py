"""Reads the binary format of WebAssembly: bytes, numbers, names and types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_NUMBERS = {0x7F: "i32", 0x7E: "i64", 0x7D: "f32", 0x7C: "f64", 0x7B: "v128"}
_REFERENCES = frozenset(range(0x68, 0x76))                  # the reference types of one byte: cont .. nocont
_SHARED = 0x65                                              # precedes the heap type of shared references


class Unknown(Exception):
    """The module may be valid, but uses a later version of WebAssembly than this code knows."""


class Malformed(ValueError):
    """The bytes are not a WebAssembly module: every engine refuses them."""


def malformed(at: int, what: str) -> Malformed:
    return Malformed(f"wasm module is malformed at byte {at}: {what}")


class Limits(NamedTuple):
    """The type of a memory or a table."""

    minimum: int                    # of a memory, in bytes
    maximum: int                    # without a declared maximum, what the addresses or indices allow
    bits: int                       # of an address or an index
    heap_type: int | None = None    # of the elements of a table
    page_size: int = 65536          # of a memory


class GlobalType(NamedTuple):
    mutable: bool
    number: str                     # "i32", "i64", "f32", "f64" or "v128"; "": a reference
    heap_type: int | None           # of a reference


class Reader:
    """Reads `data` from the position `at` on and never past `end`."""

    __slots__ = ("at", "data", "end")

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data, self.at, self.end = data, at, end

    def byte(self, what: str) -> int:
        if self.at >= self.end:
            raise malformed(self.at, f"{what} ends too early")
        self.at += 1
        return self.data[self.at - 1]

    def skip(self, size: int, what: str) -> int:
        """Step over `size` bytes; returns where they start."""
        if size > self.end - self.at:
            raise malformed(self.at, f"{what} of {size} bytes, {self.end - self.at} are left")
        self.at += size
        return self.at - size

    def integer(self, bits: int, what: str, signed: bool = False) -> int:
        """A number in the encoding LEB128."""
        start, value, width = self.at, 0, 0
        while (byte := self.byte(what)) >= 0x80:
            value |= (byte & 0x7F) << width
            width += 7
            if width >= bits:
                raise malformed(start, f"{what} has more bytes than a number of {bits} bits")
        value |= byte << width
        if signed and byte & 0x40:
            value -= 0x80 << width
        least = -(1 << bits - 1) if signed else 0
        if not least <= value < least + (1 << bits):
            raise malformed(start, f"{what} has more than {bits} bits")
        return value

    def u32(self, what: str) -> int:
        return self.integer(32, what)

    def name(self, what: str) -> str:
        size = self.u32(what)
        start = self.skip(size, what)
        try:
            return str(self.data[start:start + size], "utf-8")
        except UnicodeDecodeError:
            raise malformed(start, f"{what} is not UTF-8") from None

    def items(self, what: str) -> Iterator[Reader]:
        """For each item of a vector that fills the rest: this reader. The caller reads the item before the next one."""
        for _ in range(self.u32(f"number of {what}")):
            if self.at >= self.end:
                raise malformed(self.at, f"{what} end too early")
            yield self
        if self.at != self.end:
            raise malformed(self.at, f"{self.end - self.at} bytes after the last of the {what}")

    # -- types

    def heap_type(self, what: str) -> int:
        """The index of a type, or a negative number, which is the code of an abstract type."""
        start = self.at
        value = self.integer(33, what, signed=True)
        if value == _SHARED - 0x80:
            value = self.integer(33, what, signed=True)
        if value < 0 and value + 0x80 not in _REFERENCES:
            raise Unknown(f"{what} at byte {start} is {value}")
        return value

    def reference_type(self, what: str) -> int:
        """The heap type of a reference type."""
        start = self.at
        first = self.byte(what)
        if first in _REFERENCES:
            return first - 0x80
        if first == _SHARED:            # the short form of a nullable reference to a shared type
            self.at = start
        elif first not in (0x63, 0x64):
            raise Unknown(f"{what} at byte {start} is 0x{first:02x}")
        return self.heap_type(what)

    def value_type(self, what: str) -> tuple[str, int | None]:
        """The name of the type if it is a number, else "" and the heap type."""
        number = _NUMBERS.get(self.data[self.at], "") if self.at < self.end else ""
        if number:
            self.at += 1
            return number, None
        return "", self.reference_type(what)

    def global_type(self) -> GlobalType:
        number, heap_type = self.value_type("global type")
        start = self.at
        mutable = self.byte("global type")
        if mutable > 1:
            raise Unknown(f"the global type at byte {start} has flags 0x{mutable:02x}")
        return GlobalType(mutable == 1, number, heap_type)

    def composite_type(self) -> list[str]:
        """Step over the type of a function, a struct, an array or a continuation, with its supertypes.

        Returns the parameters of a function as `value_type` names them, and nothing for other types.
        """
        start = self.at
        code = self.byte("type")
        if code in (0x4F, 0x50):
            for _ in range(self.u32("number of supertypes")):
                self.u32("supertype")
            code = self.byte("type")
        if code == _SHARED:
            code = self.byte("type")
        if code == 0x60:
            found = [self.value_type("parameter")[0] for _ in range(self.u32("number of parameters"))]
            for _ in range(self.u32("number of results")):
                self.value_type("result")
            return found
        if code in (0x5E, 0x5F):        # an array, a struct
            for _ in range(self.u32("number of fields") if code == 0x5F else 1):
                if self.data.startswith((b"\x77", b"\x78"), self.at, self.end):     # i16, i8
                    self.byte("field")
                else:
                    self.value_type("field")
                self.byte("whether a field is mutable")
        elif code == 0x5D:              # a continuation
            self.heap_type("type")
        else:
            raise Unknown(f"the type at byte {start} is 0x{code:02x}")
        return []

    def memory_type(self) -> Limits:
        flags, minimum, maximum, bits = self._limits("memory type", 0x0F)
        shift = 16
        if flags & 8:
            start = self.at
            shift = self.u32("page size")
            if shift > 16:
                raise Unknown(f"the page size at byte {start} is 2 to the power of {shift}")
        return Limits(minimum << shift, min(maximum << shift, 1 << bits), bits, page_size=1 << shift)

    def table_type(self) -> Limits:
        heap_type = self.reference_type("table type")
        _, minimum, maximum, bits = self._limits("table type", 0x07)
        return Limits(minimum, maximum, bits, heap_type)

    def _limits(self, what: str, known: int) -> tuple[int, int, int, int]:
        """The flags, the limits, and the bits of an address or an index; `known`: the flags that are known."""
        start = self.at
        flags = self.byte(what)
        if flags & ~known:
            raise Unknown(f"{what} at byte {start} has flags 0x{flags:02x}")
        bits = 64 if flags & 4 else 32
        minimum = self.integer(bits, what)
        maximum = self.integer(bits, what) if flags & 1 else (1 << bits) - 1
        return flags, minimum, maximum, bits


def leb128(value: int) -> bytes:
    """An unsigned number as LEB128."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
