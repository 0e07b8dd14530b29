"""Compiled modules and components, from a cache if there is one."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import wasmtime

from linmem._wasm.image_cache import Cache
from linmem._wasm.install import wasmtime_version
from linmem._wasm.known_files import COMPONENT, FORMAT, MODULE
from linmem.errors import FileFormatError

_T = TypeVar("_T")


def compiled(engine: wasmtime.Engine, wasm: bytes, cache: Cache | None,
             kind: Any = None) -> tuple[Any, str | None]:
    """What wasmtime makes of the bytes, and the entry of the cache that has it. kind: Component; by default Module."""
    kind = wasmtime.Module if kind is None else kind
    make = functools.partial(kind, engine, wasm)
    if cache is None:
        return make(), None
    key = hashlib.sha256(f"linmem {FORMAT}, wasmtime {wasmtime_version()}\n".encode() + wasm).hexdigest()
    suffix = MODULE if kind is wasmtime.Module else COMPONENT
    return cached(cache, key, suffix, functools.partial(read, kind, engine), make,
                  lambda made, file: file.write(made.serialize()))


def read(kind: Any, engine: wasmtime.Engine, path: str) -> Any:
    """What an entry of the cache holds; `WasmtimeError` if the entry is of another wasmtime or of other settings."""
    try:
        return kind.deserialize_file(engine, path)
    except wasmtime.WasmtimeError:      # the file may be in a noexec file system: it can be read, but not mapped
        with open(path, "rb") as file:
            return kind.deserialize(engine, file.read())


def cached(cache: Cache, key: str, suffix: str, read: Callable[[str], _T], make: Callable[[], _T],
           write: Callable[[_T, BinaryIO], object]) -> tuple[_T, str | None]:
    """Read an entry of the cache. If no entry can be read, make the object and add it to the cache.

    Returns the object, and the path of the entry. If the new entry cannot be written, warn: the next process makes the
    object again.
    """
    for path in cache.entries(key, suffix):
        try:
            return read(path), path
        # Another version of linmem or wasmtime wrote the entry, or another process removed the entry.
        except (FileFormatError, wasmtime.WasmtimeError, OSError):
            continue
    made = make()
    try:
        return made, cache.add(key, suffix, lambda file: write(made, file))
    except OSError as error:
        frame, level = sys._getframe(), 1       # the warning names the line that called prepare()
        while frame.f_back is not None and os.path.dirname(frame.f_code.co_filename) == os.path.dirname(__file__):
            frame, level = frame.f_back, level + 1
        warnings.warn(f"not cached: {error}", RuntimeWarning, stacklevel=level)
    return made, None
