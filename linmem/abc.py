"""The two traits of wasmtime's memory interface, for Python. Floor 0.

`LinearMemory` mirrors ``wasmtime::LinearMemory`` and `MemoryCreator` mirrors
``wasmtime::MemoryCreator``; the names and the meaning of every argument are theirs. Anyone may
implement them: `linmem.PythonCreator` lets such a class stand wherever a native creator does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

TYPE_CHECKING = False
if TYPE_CHECKING:       # `typing` costs as much to import as linmem itself
    from linmem.records import MemoryType

__all__ = ["LinearMemory", "MemoryCreator"]


class LinearMemory(ABC):
    """A linear memory, as the trait ``wasmtime::LinearMemory``.

    Sizes are in bytes. Implementations must be usable from any thread.
    """

    @abstractmethod
    def byte_size(self) -> int:
        """Bytes accessible now."""

    @abstractmethod
    def byte_capacity(self) -> int:
        """Bytes up to which growth never moves the base; at least `byte_size()`."""

    def maximum_byte_size(self) -> int | None:
        """The most that `grow_to` will ever accept; None is no bound."""
        return None

    @abstractmethod
    def grow_to(self, new_size: int) -> None:
        """Make `new_size` bytes accessible, the new ones zero; raise and change nothing otherwise.

        linmem asks where the memory is afterwards, also if this raised. An answer that cannot be true, or an
        exception, makes the memory lost: every use of it raises from then on. This method must not use linmem's
        handle on the same memory in a way that waits for the growth (`RuntimeError`).
        """

    @abstractmethod
    def as_ptr(self) -> int:
        """Address of byte 0."""

    def wasm_accessible(self) -> range:
        """Addresses that wasm may touch natively: accessible bytes, or a fault that is a trap."""
        base = self.as_ptr()
        return range(base, base + self.byte_capacity())


class MemoryCreator(ABC):
    """A factory of linear memories, as the trait ``wasmtime::MemoryCreator``. Thread-safe."""

    @abstractmethod
    def new_memory(self, ty: MemoryType, minimum: int, maximum: int | None,
                   reserved_size_in_bytes: int | None, guard_size_in_bytes: int) -> LinearMemory:
        """Make a memory.

        Parameters
        ----------
        ty : MemoryType
            The type that asks for it.
        minimum, maximum : int
            In bytes; no maximum is None. Not necessarily a multiple of any page.
        reserved_size_in_bytes : int or None
            Growth up to here must not move the base. None: the creator chooses.
        guard_size_in_bytes : int
            Inaccessible bytes wanted after the capacity (or the reservation, if larger).
        """
