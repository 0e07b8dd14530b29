"""`install`: linmem as the creator of a wasmtime engine's memories.

`linmem run` imports this module alone of `linmem.wasmtime`, because a small program runs for less time than the rest
takes to import.
"""

from __future__ import annotations

import ctypes
import functools

import wasmtime
from wasmtime import _ffi as ffi

from linmem._core import bridge as _bridge
from linmem._core.arguments import check_flag
from linmem._core.memory import NativeCreator
from linmem._core.pool import PoolingCreator
from linmem._os import pages as _pages
from linmem.creators import as_native

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar, overload

    from linmem.abc import MemoryCreator

    _Creator = TypeVar("_Creator", bound=MemoryCreator)

_WASM32_SPACE = 1 << 32
_SHORT_SPACE = 1 << 40      # bytes; with less space, wasmtime's default of 4 GiB for each memory uses it up soon
# The functions that `_bridge.bind` takes, in its order.
_NEEDED = ("wasmtime_config_host_memory_creator_set", "wasmtime_error_new", "wasmtime_memorytype_is64",
           "wasmtime_memorytype_isshared")


if TYPE_CHECKING:
    @overload
    def install(config: wasmtime.Config, creator: None = None, *, tune: bool = True) -> PoolingCreator: ...
    @overload
    def install(config: wasmtime.Config, creator: _Creator, *, tune: bool = True) -> _Creator: ...


def install(config: wasmtime.Config, creator: MemoryCreator | None = None, *, tune: bool = True) -> MemoryCreator:
    """Make every memory of the engines built from `config` come from `creator`.

    Mirrors ``wasmtime::Config::with_host_memory``. The creator makes the memories that modules define, also shared
    memories, and their GC heaps. ``wasmtime.Memory(store, ty)`` and ``wasmtime.SharedMemory`` do not use the creator;
    `new_memory` does. Copy-on-write initialisation is switched off: with a host creator it would abort the process.

    Parameters
    ----------
    config : wasmtime.Config
        Not yet given to an Engine.
    creator : MemoryCreator, optional
        By default a new `PoolingCreator`. The config and its engines keep the creator. A pool in it must not have an
        ``image=``.
    tune : bool
        If this process has little address space (because of a limit, or of few address bits), set a smaller memory
        reservation and guard in the config, so that memories can be made at all. Pass False to keep the values of the
        config.

    Returns
    -------
    MemoryCreator
        `creator`, or the new pool.

    Raises
    ------
    TypeError
        If `config` is not a `wasmtime.Config` or `creator` is not a creator.
    ValueError
        If the config was given to an engine already, or if a pool in `creator` starts its memories from an image:
        every memory of the engine, also a memory of another module, would get that image, and a module's own data
        would then be copied over the image.
    RuntimeError
        If this wasmtime-py has no host memory creators.

    Notes
    -----
    Without copy-on-write initialisation, start-up code that wasmtime compiles copies the data of a module. With
    ``consume_fuel`` this code costs about one unit of fuel for each byte. With ``epoch_interruption`` it checks the
    deadline. So add the fuel and set the deadline before you make the instance. Modules that `prepare` made have no
    such code.

    With the pooling allocation strategy wasmtime ignores host creators without an error. The strategy cannot be read
    from a Config, so `linear_memory` and `new_memory` report this case.
    """
    check_type(config, wasmtime.Config, "config")
    try:
        pointer = config.ptr()
    except ValueError:
        raise ValueError("config was given to an Engine already (or closed): install() comes before Engine(config)"
                         ) from None
    check_flag(tune, "tune")
    creator = PoolingCreator() if creator is None else creator
    native = checked_creator(creator)
    _bind()
    if tune:
        _tune(pointer)
    ffi.wasmtime_config_memory_init_cow_set(pointer, False)
    _bridge.set_creator(ctypes.addressof(pointer.contents), native)
    config._linmem_installed = True     # type: ignore[attr-defined]
    return creator


def check_type(value: object, kind: type, name: str) -> None:
    """Refuse a value that is not of the class `kind` of wasmtime."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a wasmtime.{kind.__name__}, got {type(value).__name__}")


def checked_creator(creator: MemoryCreator) -> NativeCreator:
    """The native creator of an argument `creator` whose memories wasmtime uses."""
    native = as_native(creator)
    parts: list[object] = [native]
    for part in parts:                          # each creator of the chain; a table of routes has several
        if isinstance(part, NativeCreator):
            if getattr(part, "image", None) is not None:
                raise ValueError("creator must not have a pool with an image: every memory would start from that image,"
                                 " and the data of a module would be copied over it. Leave image= out, and restore()"
                                 " each instance's memory to the image, or prepare() the module")
            rule = getattr(part, "rule", ())
            parts += [getattr(part, "upstream", getattr(part, "creator", None)),
                      *(chosen for _, chosen in (rule if isinstance(rule, tuple) else ()))]
    return native


@functools.cache
def wasmtime_version() -> str:
    import importlib.metadata  # takes as long as the rest of an import of linmem

    try:
        return importlib.metadata.version("wasmtime")
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def _note(error: Exception) -> str:
    from linmem._wasm.cause import note  # few runs refuse anything

    return note(error)


@functools.cache
def _bind() -> None:
    missing = [name for name in (*_NEEDED, "wasmtime_config_memory_init_cow_set") if not hasattr(ffi.dll, name)]
    if missing:
        raise RuntimeError(f"wasmtime {wasmtime_version()} has no host memory creators: {', '.join(missing)} missing")
    _bridge.noted_by(_note)
    _bridge.bind(*map(_address, (*_NEEDED, "wasmtime_memorytype_page_size")))
    _bridge.bind_instances(
        _address("wasmtime_instance_export_get"), _address("wasmtime_memory_grow"),
        _address("wasmtime_sharedmemory_grow"), _address("wasmtime_sharedmemory_delete"),
        _address("wasmtime_global_set"), extern_size=ctypes.sizeof(ffi.wasmtime_extern_t),
        extern_of=ffi.wasmtime_extern_t.of.offset, value_size=ctypes.sizeof(ffi.wasmtime_val_t))


def _address(name: str) -> int:
    function = getattr(ffi.dll, name, None)
    return 0 if function is None else ctypes.cast(function, ctypes.c_void_p).value or 0


def _tune(pointer: ctypes._Pointer[ffi.wasm_config_t]) -> None:
    left = _pages.describe()["address_space_left"]
    if left >= _SHORT_SPACE:
        return
    # For each memory 1/64 of the free address space, rounded down to a power of two, and at least a wasm page.
    reservation = min(_WASM32_SPACE, max(65536, 1 << max(0, (left // 64).bit_length() - 1)))
    sizes = {"reservation": reservation, "reservation_for_growth": reservation, "guard_size": 65536}
    names = [f"wasmtime_config_memory_{name}_set" for name in sizes]
    if all(hasattr(ffi, name) for name in names):
        for name, size in zip(names, sizes.values(), strict=True):
            getattr(ffi, name)(pointer, size)
