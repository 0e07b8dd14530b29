"""Linear memories for Python.

A linear memory is a range of contiguous bytes between inaccessible guard pages. A growth within the
capacity never moves the base address. Python reads and writes the bytes through the buffer protocol without a copy.
The interface follows wasmtime's traits `LinearMemory` and `MemoryCreator`.

>>> import linmem
>>> mem = linmem.create(65536)
>>> view = memoryview(mem)
>>> mem.grow_to(1 << 20)        # `view` stays valid: nothing moved
"""

try:
    from linmem._core.adaptors import (
        CallbackCreator,
        LimitingCreator,
        PythonCreator,
        RoutingCreator,
        StatisticsCreator,
        TrackingCreator,
    )
    from linmem._core.memory import (
        FileCreator,
        Image,
        Memory,
        MmapCreator,
        NativeCreator,
        SharedCreator,
        disable_fault_report,
        enable_fault_report,
        find,
        live,
        tracemalloc_domain,
        wait,
        wake,
    )
    from linmem._core.pool import PoolingCreator, set_pool_limits
    from linmem._files.delta import Delta
    from linmem._os.pages import describe
    from linmem.abc import LinearMemory, MemoryCreator
    from linmem.creators import attach, create, creator, open_file
    from linmem.errors import FileFormatError, GrowError, LimitError, OwnedError, OwnerDied, PageError, PoolError
except ModuleNotFoundError as _error:
    if not (_error.name or "").startswith("linmem."):
        raise
    raise ImportError(
        f"linmem was imported from the folder {__path__[0]!r}, where its extension modules are not built for this"
        f" Python ({_error}). If the folder is a copy of the sources, it hides an installed linmem: build the"
        " extensions there (pip install -e .), or start Python in another folder",
        name="linmem", path=__file__) from _error

__version__ = "0.1.0"

__all__ = ["Allocation", "CallbackCreator", "Delta", "DroppedInfo", "FileCreator", "FileFormatError", "GrowError",
           "GrowableArray", "Image", "ImageInfo", "LimitError", "LimitingCreator", "LinearMemory", "Lock", "Memory",
           "MemoryCreator", "MemoryInfo", "MemoryType", "MmapCreator", "NativeCreator", "OwnedError", "OwnerDied",
           "PageError", "Place", "PoolError", "PoolingCreator", "PythonCreator", "Refusal", "Refusals",
           "RoutingCreator", "ScopeTotals", "SharedCreator", "SharedHandle", "StatisticsCreator", "TrackingCreator",
           "attach", "create", "creator", "describe", "disable_fault_report", "empty", "enable_fault_report", "find",
           "live", "open_file", "set_pool_limits", "tracemalloc_domain", "wait", "wake"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from linmem import metrics as metrics
    from linmem import wasmtime as wasmtime
    from linmem._core.shared_handles import SharedHandle
    from linmem.arrays import GrowableArray, empty
    from linmem.locks import Lock
    from linmem.records import (
        Allocation,
        DroppedInfo,
        ImageInfo,
        MemoryInfo,
        MemoryType,
        Place,
        Refusal,
        Refusals,
        ScopeTotals,
    )
else:
    # These names and modules are imported at their first use. linmem.wasmtime needs wasmtime-py, linmem.records takes
    # time to import `dataclasses`, and few programs need the others.
    _MODULES = {
        "GrowableArray": "arrays", "empty": "arrays", "Lock": "locks", "SharedHandle": "_core.shared_handles",
        **dict.fromkeys(("Allocation", "DroppedInfo", "ImageInfo", "MemoryInfo", "MemoryType", "Place", "Refusal",
                         "Refusals", "ScopeTotals"), "records")}

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in ("wasmtime", "metrics"):
            return import_module(f"linmem.{name}")
        if name in _MODULES:
            return globals().setdefault(name, getattr(import_module(f"linmem.{_MODULES[name]}"), name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """For help() and for the completion of names; without this, names that were not used yet are missing."""
        return sorted({*globals(), *__all__})
