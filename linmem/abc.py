"""The two traits of wasmtime's memory interface, for Python.

`LinearMemory` mirrors ``wasmtime::LinearMemory`` and `MemoryCreator` mirrors ``wasmtime::MemoryCreator``; names and
arguments have the same meaning. Python classes may implement them: `linmem.PythonCreator` makes a native creator of
such a creator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

TYPE_CHECKING = False
if TYPE_CHECKING:       # the import of `typing` takes as long as the import of linmem
    from linmem.records import MemoryType

__all__ = ["LinearMemory", "MemoryCreator"]


class LinearMemory(ABC):
    """A linear memory, as the trait ``wasmtime::LinearMemory``.

    Sizes are in bytes. Implementations must be usable from any thread. The methods must not use the wasmtime store that
    the memory belongs to: wasmtime does not allow such calls, and may abort the process.
    """

    @abstractmethod
    def byte_size(self) -> int:
        """The number of bytes that are accessible now."""

    @abstractmethod
    def byte_capacity(self) -> int:
        """The size up to which growth never moves the base; at least `byte_size()`."""

    def maximum_byte_size(self) -> int | None:
        """The largest size that `grow_to` accepts; None: there is no bound."""
        return None

    @abstractmethod
    def grow_to(self, new_size: int) -> None:
        """Make `new_size` bytes accessible. The new bytes are zero. If this is not possible, raise and change nothing.

        After the call, also if it raised, linmem calls the other methods to find the place of the memory. If one of
        them raises, or returns a value that cannot be right, the memory is lost: every later use of it raises. This
        method must not use linmem's handle on the same memory in a way that waits for the growth (`RuntimeError`).
        """

    @abstractmethod
    def as_ptr(self) -> int:
        """The address of byte 0."""

    def wasm_accessible(self) -> range:
        """The addresses that compiled wasm code may access: each is accessible, or its fault becomes a trap."""
        base = self.as_ptr()
        return range(base, base + self.byte_capacity())


class MemoryCreator(ABC):
    """A factory of linear memories, as the trait ``wasmtime::MemoryCreator``. Thread-safe.

    `new_memory` must not use the wasmtime store that asks for the memory: wasmtime does not allow such calls, and may
    abort the process. Other stores may be used.
    """

    @abstractmethod
    def new_memory(self, ty: MemoryType, minimum: int, maximum: int | None,
                   reserved_size_in_bytes: int | None, guard_size_in_bytes: int) -> LinearMemory:
        """Make a memory.

        Parameters
        ----------
        ty : MemoryType
            The WebAssembly type of the memory.
        minimum, maximum : int
            In bytes, not necessarily a multiple of a page. A maximum of None: there is no maximum.
        reserved_size_in_bytes : int or None
            Growth up to this size must not move the base. None: the creator chooses.
        guard_size_in_bytes : int
            The number of inaccessible bytes after the capacity, or after the reservation if that is larger.
        """
