"""The state of an instance as plain data: what `Snapshot` keeps, and what its files hold.

The state names memories, globals and tables by their index in the module, imports included. ``prepare(expose=True)``
only adds exports and tables behind the module's own, so these indices are the same in every preparation of the module.
"""

from __future__ import annotations

from typing import NamedTuple

from linmem._core.memory import Image

VERSION = 1         # of the meaning of the fields below

# The kinds of globals whose value is a number, and the size of the value in bytes.
NUMBERS = {"i32": 4, "i64": 8, "f32": 4, "f64": 8, "v128": 16}


class Reference(NamedTuple):
    """A reference that has a name in every instance of the module.

    Attributes
    ----------
    kind : str
        "null"; or "export": the function that the module exports as `name`; or "element": the element `index` of the
        element segment `segment`.
    """

    kind: str
    name: str = ""
    segment: int = 0
    index: int = 0      # type: ignore[assignment]


NULL = Reference("null")


class MemoryState(NamedTuple):
    """A memory of `size` bytes that holds the bytes of `image`, which ends within `size`, and zeros elsewhere."""

    index: int          # type: ignore[assignment]
    size: int
    image: Image


class GlobalState(NamedTuple):
    """A mutable global.

    Attributes
    ----------
    kind : str
        A key of `NUMBERS`, "funcref", or "null" for a null reference of any other type.
    value : bytes or Reference
        The little-endian bytes of a number, or a reference.
    """

    index: int          # type: ignore[assignment]
    kind: str
    value: bytes | Reference


class TableState(NamedTuple):
    """A table of `size` elements.

    Attributes
    ----------
    changed : tuple of (int, Reference)
        The elements that differ from what instantiation puts into the table, in ascending order. All elements beyond
        the minimum of the table are listed.
    """

    index: int          # type: ignore[assignment]
    size: int
    changed: tuple[tuple[int, Reference], ...] = ()


class State(NamedTuple):
    """The state of an instance.

    Attributes
    ----------
    module : str
        SHA-256 of the module's binary as it was given to `prepare`, as hexadecimal digits.
    memories, globals, tables : tuple
        In ascending order of their indices.
    working_set : tuple
        For each memory of `memories`, the runs (offset, size) in bytes that started instances touched; or ().
    unseen : tuple of str
        The state of the instance that is not held.
    version : int
    names : tuple of (str, int, str)
        Exports of the instance: "memory", "global" or "table", the index, and the name.
    """

    module: str
    memories: tuple[MemoryState, ...]
    globals: tuple[GlobalState, ...]
    tables: tuple[TableState, ...]
    working_set: tuple[tuple[tuple[int, int], ...], ...] = ()
    unseen: tuple[str, ...] = ()
    version: int = VERSION
    names: tuple[tuple[str, int, str], ...] = ()
