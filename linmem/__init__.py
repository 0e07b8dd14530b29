"""Linear memories for Python.

Contiguous bytes whose base address never moves while they grow, with inaccessible guards around
them, read and written through the buffer protocol with no copy, behind wasmtime's own
`LinearMemory` and `MemoryCreator` traits.

>>> import linmem
>>> mem = linmem.create(65536)
>>> view = memoryview(mem)
>>> mem.grow_to(1 << 20)        # `view` stays valid: nothing moved
"""

from linmem._adaptors import LimitingCreator, PythonCreator, StatisticsCreator
from linmem._memory import Memory, MmapCreator
from linmem.abc import LinearMemory, MemoryCreator, MemoryInfo, MemoryType
from linmem.creators import create, creator
from linmem.errors import GrowError, LimitError, OwnedError, PageError

__version__ = "0.1.0"

__all__ = [
    "GrowError",
    "LimitError",
    "LimitingCreator",
    "LinearMemory",
    "Memory",
    "MemoryCreator",
    "MemoryInfo",
    "MemoryType",
    "MmapCreator",
    "OwnedError",
    "PageError",
    "PythonCreator",
    "StatisticsCreator",
    "create",
    "creator",
    "wasmtime",
]


def __getattr__(name: str):
    # linmem.wasmtime needs wasmtime-py, which `import linmem` must not.
    if name == "wasmtime":
        import importlib

        return importlib.import_module("linmem.wasmtime")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
