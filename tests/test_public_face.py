"""Every argument of every public callable gets garbage: each call raises a clear exception and changes no state."""

import argparse
import array
import ast
import contextlib
import functools
import importlib
import inspect
import itertools
import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import stub_docstrings
import wasmtime
from hypothesis import given, settings
from hypothesis import strategies as st
from support import NEEDS, PAGE, answer, requires

import linmem
from linmem import cli
from linmem._commands import cache as cache_cli
from linmem._commands import demo as demo_cli
from linmem._commands import image as image_cli
from linmem._commands import info as info_cli
from linmem._commands import prewarm as prewarm_cli
from linmem._commands import run as run_cli
from linmem._commands import top as top_cli
from linmem._core.shared_handles import SharedHandle

PATTERN = bytes(range(1, 251))
TYPE = linmem.MemoryType(1, page_size=1)


class Own(Exception):
    """Raised by hostile objects; must reach the caller unchanged."""


def raises(*_, **__):
    raise Own("of the argument's own")


class Hostile:
    """An object that raises in every protocol, except for its __name__ in this test."""

    __index__ = __int__ = __float__ = __bool__ = __len__ = __iter__ = __getitem__ = __fspath__ = __hash__ = raises
    __eq__ = __call__ = __buffer__ = __getattr__ = raises


class Liar:
    """An object whose protocols return invalid results."""

    def __index__(self):
        return "1"

    __int__ = __bool__ = __len__ = __iter__ = __hash__ = __index__

    def __fspath__(self):
        return 1

    def __buffer__(self, flags):
        return "no buffer"

    def __getattr__(self, name):
        return "not that either"


class Index:
    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


# -- the values that arguments may have --------------------------------------------------------------


def is_size(value):
    number = value.value if isinstance(value, Index) else value
    return isinstance(number, int) and 0 <= number < 2**64


def is_count(value):
    number = value.value if isinstance(value, Index) else value
    return isinstance(number, int) and number >= 0


def frames(value):
    return is_count(value) and (value.value if isinstance(value, Index) else value) <= 64


def count_from_one(value):
    return is_count(value) and (value.value if isinstance(value, Index) else value) >= 1


def is_buffer(value):
    try:
        with memoryview(value) as view:
            return view.c_contiguous
    except (TypeError, ValueError, Own):
        return False


def is_path(value):
    return isinstance(value, (str, bytes, os.PathLike)) and not isinstance(value, (Hostile, Liar))


def either(*kinds):
    return lambda value: any(kind(value) for kind in kinds)


def of(*classes):
    return lambda value: isinstance(value, classes)


def one_of(*values):
    return lambda value: any(value is one or (type(value) is type(one) and value == one) for one in values)


def nothing(value):
    return value is None


def nothing_in(value):
    return isinstance(value, (str, tuple, list, dict)) and len(value) == 0


def anything(value):
    return True


def is_name(value):
    return isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) <= 100


def is_dtype(value):
    import numpy

    try:
        return numpy.dtype(value).itemsize > 0 and value is not None
    except Exception:
        return False


def a_dtype(value):
    return NEEDS["numpy"][0] and is_dtype(value)


def lengths(value):
    return is_count(value) or (isinstance(value, (tuple, list)) and all(map(is_count, value)))


size = is_size
size_or_none = either(is_size, nothing)
flag = one_of(True, False)
native = of(linmem.MmapCreator, linmem.PoolingCreator, linmem.LimitingCreator, linmem.StatisticsCreator,
            linmem.TrackingCreator, linmem.CallbackCreator, linmem.RoutingCreator, linmem.PythonCreator,
            linmem.SharedCreator)
native_or_none = either(native, nothing)
trait = either(native, lambda value: isinstance(value, Upstream))
image = of(linmem.Image)
delta = of(linmem.Delta)
text = of(str)
text_or_none = either(text, nothing)
name_or_none = either(is_name, nothing)


def seconds(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def limits_for_a_moment(*limits, **more):
    linmem.set_pool_limits(*limits, **more)
    linmem.set_pool_limits()


def report_for_a_moment(*arguments, **more):
    try:
        linmem.enable_fault_report(*arguments, **more)
    except NotImplementedError:         # after the arguments were checked
        assert not NEEDS["fault_reports"][0]
    linmem.disable_fault_report()


class Upstream(linmem.MemoryCreator):
    def new_memory(self, *arguments):
        return linmem.MmapCreator().new_memory(*arguments)


# -- the objects of the tests ------------------------------------------------------------------------


class World:
    """The objects on which the tests call the public functions. Each object is made on first access."""

    def __init__(self, folder):
        self.folder = folder

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        made = getattr(self, f"_make_{name}")()
        setattr(self, name, made)
        return made

    def _make_mem(self):
        mem = linmem.create(2 * PAGE, 16 * PAGE)
        mem.write(0, PATTERN)
        mem.write(2 * PAGE - len(PATTERN), PATTERN)
        return mem

    def _make_file_mem(self):
        return linmem.open_file(self.folder / "numbers", minimum=PAGE)

    def _make_image(self):
        return self.mem.snapshot()

    def _make_delta(self):
        with self.image.new_memory() as other:
            other[5] = 99
            return self.image.diff(other)

    def _make_rows(self):
        rows = linmem.GrowableArray("u1", maximum=1 << 20)
        rows.extend(PATTERN)
        return rows

    def _make_headed(self):
        from linmem._files.npy_head import make_head

        raw = make_head(self.rows.dtype, ()).raw
        mem = linmem.create(len(raw))
        mem.write(0, raw)
        return mem

    def _make_tracking(self):
        return linmem.TrackingCreator(self.mmap)

    def _make_pool(self):
        return linmem.PoolingCreator(slots=4)

    def _make_limiting(self):
        return linmem.LimitingCreator(linmem.MmapCreator(), 1 << 30)

    def _make_shared(self):
        return linmem.SharedCreator().create(PAGE, PAGE)

    def _make_handle(self):
        return self.shared.handle()

    def _make_mmap(self):
        return linmem.MmapCreator()

    def _make_path(self):
        path = self.folder / "image.linmem"
        self.image.save(path)
        return path

    def _make_delta_path(self):
        path = self.folder / "delta.linmem"
        self.delta.save(path)
        return path

    def _make_file(self):
        (self.folder / "file").write_bytes(bytes(PAGE) * 4)
        return open(self.folder / "file", "rb")

    def _make_config(self):
        return wasmtime.Config()

    def _make_engine(self):
        config = wasmtime.Config()
        linmem.wasmtime.install(config, linmem.MmapCreator())
        return wasmtime.Engine(config)

    def _make_store(self):
        return wasmtime.Store(self.engine)

    def _make_prepared(self):
        return linmem.wasmtime.prepare(self.engine, WAT)

    def _make_instance(self):
        return self.prepared.instantiate(self.store)

    def _make_wasm_memory(self):
        return self.instance.exports(self.store)["m"]

    def _make_snapshot(self):
        return linmem.wasmtime.Snapshot.take(self.store, self.instance)

    def _make_snapshot_path(self):
        path = self.folder / "snapshot.linmem"
        self.snapshot.save(path)
        return path

    def _make_sessions(self):
        return linmem.wasmtime.Sessions(self.prepared, start=self.snapshot, size=1)

    def state(self):
        """The state that a refused call must not change."""
        mem, there = self.mem, self.__dict__
        seen = {"memory": (mem.closed, mem.byte_size(), mem.byte_capacity(), mem.maximum_byte_size(), mem.as_ptr(),
                           mem.info().exports, mem.info().committed), "bytes": mem.read(0, mem.byte_size())}
        if "pool" in there:
            seen["pool"] = {key: value for key, value in self.pool.stats().items() if key in ("slots", "live")}
        if "limiting" in there:
            seen["budget"] = self.limiting.used_bytes
        if "image" in there:
            seen["image"] = self.image.digest, self.image.info().memories
        if "instance" in there:
            seen["instance"] = bytes(self.wasm_memory.read(self.store))
        return seen

    def close(self):
        for name in ("sessions", "prepared", "instance", "wasm_memory", "snapshot", "delta", "image", "pool",
                     "limiting"):
            self.__dict__.pop(name, None)
        if "store" in self.__dict__:
            self.store.close()
        if "file" in self.__dict__:
            self.file.close()
        if "file_mem" in self.__dict__:
            self.file_mem.close()
        with contextlib.suppress(BufferError):
            self.mem.close()
        self.__dict__.clear()


WAT = '(module (memory (export "m") 1 4) (data (i32.const 8) "data"))'
MAKE = {"minimum": (size, PAGE), "maximum": (size_or_none, None), "reserve": (size_or_none, None),
        "guard": (size_or_none, None)}
RECORD = dict.fromkeys(("base", "byte_size", "byte_capacity", "maximum_byte_size", "reserved", "committed", "resident",
                        "pre_guard", "guard", "page_size", "exports", "kind", "owner", "name", "growths"),
                       (anything, 1))


def given_by(name):
    """A valid argument: an attribute of the world."""
    return lambda world: getattr(world, name)


def opened(*arguments, **options):
    with linmem.open_file(*arguments, **options) as mem:
        return mem.byte_size()


# The public functions: name -> (the callable, {argument: (a check of valid values, a valid value)}). The traits are
# abstract. If a valid value is a function, the function makes the value from the world.
def use_block(kind, error, trace):
    block = linmem.wasmtime.use(linmem.MmapCreator())
    block.__enter__()
    block.__exit__(kind, error, trace)


def held_lock(mem):
    lock = linmem.Lock(mem, 0)
    lock.acquire()
    return lock


FACE = {
    "linmem.create": (lambda w: linmem.create, {
        "minimum": (size, PAGE), "maximum": (size_or_none, None), "creator": (either(trait, nothing), None),
        "reserve": (size_or_none, None), "guard": (size_or_none, None), "may_move": (flag, False),
        "domain": (text_or_none, None)}),
    "linmem.creator": (lambda w: linmem.creator, {
        "kind": (one_of("mmap", "pool"), "mmap"), "options": (lambda value: False, None)}),
    "linmem.attach": (lambda w: linmem.attach, {
        "handle_or_name": (either(of(SharedHandle), text), given_by("handle"))}),
    "linmem.SharedHandle": (lambda w: linmem.SharedHandle, {
        **dict.fromkeys(("pid", "fd", "device", "inode"), (
            lambda value: type(value) is int and 0 <= value < 1 << 64, 1)),
        "token": (lambda value: type(value) is bytes and len(value) == 32, bytes(32))}),
    "linmem.wait": (lambda w: linmem.wait, {
        "mem": (of(linmem.Memory), given_by("shared")), "offset": (size, 0),
        "value": (lambda value: is_size(value) or -1 <= getattr(value, "value", value) < 0, 1),
        "timeout": (either(seconds, nothing), 0)}),
    "linmem.wake": (lambda w: linmem.wake, {
        "mem": (of(linmem.Memory), given_by("shared")), "offset": (size, 0), "n": (size_or_none, 1)}),
    "linmem.Lock": (lambda w: linmem.Lock, {"mem": (of(linmem.Memory), given_by("shared")), "offset": (size, 0)}),
    "linmem.Lock.acquire": (lambda w: linmem.Lock(w.shared, 0).acquire, {
        "timeout": (either(seconds, nothing), 0), "recover": (flag, False)}),
    "linmem.Lock.__exit__": (lambda w: held_lock(w.shared).__exit__, {
        "kind": (anything, None), "error": (anything, None), "trace": (anything, None)}),
    "linmem.SharedCreator": (lambda w: linmem.SharedCreator, {
        "shm_name": (text_or_none, None), "attach": (either(of(SharedHandle), text, nothing), None),
        "name": (name_or_none, None)}),
    "linmem.Memory.wait_for_growth": (lambda w: w.shared.wait_for_growth, {
        "size": (size, PAGE), "timeout": (either(seconds, nothing), 0)}),
    "linmem.MmapCreator": (lambda w: linmem.MmapCreator, {
        "prefault": (flag, False), "huge_pages": (flag, False), "name": (name_or_none, None)}),
    "linmem.FileCreator": (lambda w: linmem.FileCreator, {
        "path": (is_path, lambda w: w.folder / "numbers"), "name": (name_or_none, None)}),
    "linmem.open_file": (lambda w: opened, {
        "path": (is_path, lambda w: w.folder / "numbers"), "access": (one_of("rw"), "rw"), "minimum": (size, 1),
        "maximum": (size_or_none, None), "reserve": (size_or_none, None)}),
    "linmem.PoolingCreator": (lambda w: linmem.PoolingCreator, {
        "upstream": (native_or_none, None), "slots": (size_or_none, None), "keep_resident": (size, PAGE),
        "max_unused_warm": (size, 1), "max_resident": (size_or_none, None), "max_reserved": (size_or_none, None),
        "idle_seconds": (either(seconds, nothing), 5), "max_reset_seconds": (either(seconds, nothing), None),
        "reset": (one_of("adaptive", "scan", "zero", "discard"), "zero"),
        "when_full": (one_of("fallback", "error", "wait"), "error"), "timeout": (nothing, None), "check": (flag, True),
        "image": (either(image, nothing), None), "name": (name_or_none, None)}),
    "linmem.PoolingCreator.warm": (lambda w: w.pool.warm, {
        "n": (size, 1), "ty": (of(linmem.MemoryType), linmem.MemoryType(1)),
        "reserved_size_in_bytes": (size_or_none, 0), "guard_size_in_bytes": (size, 0),
        "domain": (text_or_none, None)}),
    "linmem.PoolingCreator.trim": (lambda w: w.pool.trim, {"target": (size, 0)}),
    "linmem.PoolingCreator.purge": (lambda w: w.pool.purge, {"target": (size, 0), "older_than": (seconds, 0)}),
    "linmem.set_pool_limits": (lambda w: limits_for_a_moment, {
        "max_resident": (size_or_none, None), "max_reserved": (size_or_none, None)}),
    "linmem.LimitingCreator": (lambda w: linmem.LimitingCreator, {
        "upstream": (native, given_by("mmap")), "limit_bytes": (size, PAGE), "name": (name_or_none, None)}),
    "linmem.StatisticsCreator": (lambda w: linmem.StatisticsCreator, {
        "upstream": (native, given_by("mmap")), "history": (size, 4), "timeline": (size, 2),
        "name": (name_or_none, None)}),
    "linmem.TrackingCreator": (lambda w: linmem.TrackingCreator, {
        "upstream": (native, given_by("mmap")), "frames": (frames, 4), "name": (name_or_none, None)}),
    "linmem.TrackingCreator.scope": (lambda w: w.tracking.scope, {"name": (text, "tenant")}),
    "linmem.TrackingCreator.report": (lambda w: w.tracking.report, {"path": (either(is_path, nothing), None)}),
    "linmem.CallbackCreator": (lambda w: linmem.CallbackCreator, {
        "upstream": (native, given_by("mmap")), **dict.fromkeys(
            ("on_made", "on_grow", "on_refused", "on_dropped"), (either(callable, nothing), None)),
        "limit_each": (size_or_none, PAGE), "limit_growths": (size_or_none, 1),
        "name": (name_or_none, None)}),
    "linmem.RoutingCreator": (lambda w: linmem.RoutingCreator, {
        "rule": (callable, lambda w: [({"max_size": PAGE}, w.mmap)]), "name": (name_or_none, None)}),
    "linmem.PythonCreator": (lambda w: linmem.PythonCreator, {
        "creator": (lambda value: callable(getattr(value, "new_memory", None)), Upstream()),
        "name": (name_or_none, None)}),
    "linmem.MmapCreator.new_memory": (lambda w: w.mmap.new_memory, {
        "ty": (of(linmem.MemoryType), TYPE), "minimum": (size, PAGE), "maximum": (size_or_none, None),
        "reserved_size_in_bytes": (size_or_none, 0), "guard_size_in_bytes": (size, 0),
        "may_move": (either(flag, nothing), None), "domain": (text_or_none, None)}),
    "linmem.MmapCreator.create": (lambda w: w.limiting.create, {
        **MAKE, "image": (either(image, nothing), None), "may_move": (flag, False), "domain": (text_or_none, None)}),
    "linmem.MemoryType": (lambda w: linmem.MemoryType, {
        "minimum": (is_count, 1), "maximum": (either(is_count, nothing), None),
        "is_64": (flag, False), "is_shared": (flag, False), "page_size": (one_of(1, 65536, True), 65536)}),
    "linmem.MemoryInfo": (lambda w: linmem.MemoryInfo, RECORD),
    "linmem.DroppedInfo": (lambda w: linmem.DroppedInfo, dict.fromkeys(
        ("base", "byte_size", "growths", "kind", "name"), (anything, 1))),
    "linmem.Refusal": (lambda w: linmem.Refusal, dict.fromkeys(
        ("time", "requested", "limit", "error", "creator", "memory", "base"), (anything, 1))),
    "linmem.Refusals": (lambda w: linmem.Refusals, dict.fromkeys(("count", "last"), (anything, 1))),
    "linmem.ImageInfo": (lambda w: linmem.ImageInfo, dict.fromkeys(
        ("offset", "size", "stored", "kind", "shares_pages", "memories"), (anything, 1))),
    "linmem.Allocation": (lambda w: linmem.Allocation, dict.fromkeys(
        ("size", "peak", "age", "stack", "peak_stack", "scope", "name"), (anything, 1))),
    "linmem.ScopeTotals": (lambda w: linmem.ScopeTotals, dict.fromkeys(
        ("size", "peak", "total", "memories", "made"), (anything, 1))),
    "linmem.Place": (lambda w: linmem.Place, dict.fromkeys(("memory", "region", "offset"), (anything, 1))),
    "linmem.find": (lambda w: linmem.find, {"address": (size, 0)}),
    "linmem.live": (lambda w: linmem.live, {}),
    "linmem.enable_fault_report": (lambda w: report_for_a_moment, {
        "quarantine": (lambda value: is_size(value) and getattr(value, "value", value) < 2**63, 0)}),
    "linmem.disable_fault_report": (lambda w: linmem.disable_fault_report, {}),
    "linmem.GrowError": (lambda w: linmem.GrowError, {}),
    "linmem.PageError": (lambda w: linmem.PageError, {}),
    "linmem.OwnedError": (lambda w: linmem.OwnedError, {}),
    "linmem.LimitError": (lambda w: linmem.LimitError, {
        "message": (anything, ""), "limit": (anything, 1), "used": (anything, 1), "requested": (anything, 1)}),
    "linmem.PoolError": (lambda w: linmem.PoolError, {"message": (anything, ""), "slots": (anything, 1)}),
    "linmem.FileFormatError": (lambda w: linmem.FileFormatError, {
        "path": (anything, ""), "field": (anything, ""), "value": (anything, 1), "bound": (anything, 1)}),
    "linmem.NativeCreator": (lambda w: linmem.NativeCreator, {}),
    "linmem.describe": (lambda w: linmem.describe, {}),
    **{f"linmem.{name}": (lambda w, name=name: getattr(linmem, name), {"args": (anything, "text")})
       for name in ("GrowError", "OwnedError", "OwnerDied", "PageError")},
    "linmem.Memory": (lambda w: linmem.Memory, {}),
    "linmem.Memory.grow_to": (lambda w: w.mem.grow_to, {"new_size": (size, 2 * PAGE)}),
    "linmem.Memory.view": (lambda w: w.mem.view, {
        "format": (either(of(type), one_of("B", "d")), "B"), "offset": (size, 0), "count": (size_or_none, 1)}),
    "linmem.Memory.array": (lambda w: w.mem.array, {
        "dtype": (either(of(type), lambda value: NEEDS["numpy"][0] and is_dtype(value)), "u1"), "offset": (size, 0),
        "shape": (either(size_or_none, one_of(-1, ()), lambda value: getattr(value, "value", 0) == -1), 1)}),
    "linmem.Memory.read": (lambda w: w.mem.read, {"offset": (size, 0), "size": (size, 1)}),
    "linmem.Memory.write": (lambda w: w.mem.write, {"offset": (size, 0), "data": (is_buffer, b"x")}),
    "linmem.Memory.restore": (lambda w: w.mem.restore, {
        "image": (image, given_by("image")), "zero_grown": (flag, False)}),
    "linmem.Memory.dirty_pages": (lambda w: w.mem.dirty_pages, {
        "since": (image, given_by("image")), "as_array": (flag, False)}),
    "linmem.Memory.apply": (lambda w: w.mem.apply, {"delta": (delta, given_by("delta"))}),
    "linmem.Memory.protect": (lambda w: w.mem.protect, {
        "offset": (size, 0), "size": (size, 0), "access": (one_of("none", "r", "rw"), "rw")}),
    "linmem.Memory.map": (lambda w: w.mem.map, {
        "offset": (size, 0), "source": (image, given_by("image")), "source_offset": (size, 0),
        "size": (size_or_none, 0), "access": (one_of("r", "rw"), "rw")}),
    "linmem.Memory.unmap": (lambda w: w.mem.unmap, {"offset": (size, 0), "size": (size, 0)}),
    "linmem.Memory.discard": (lambda w: w.mem.discard, {"offset": (size, 0), "size": (size_or_none, 0)}),
    "linmem.Memory.prefault": (lambda w: w.mem.prefault, {"offset": (size, 0), "size": (size_or_none, 0)}),
    "linmem.Memory.flush": (lambda w: w.file_mem.flush, {"offset": (size, 0), "size": (size_or_none, 0)}),
    "linmem.Memory.__getitem__": (lambda w: w.mem.__getitem__, {"key": (either(of(int, Index, slice)), 0)}),
    "linmem.Memory.__setitem__": (lambda w: w.mem.__setitem__, {
        "key": (either(of(int, Index, slice)), 0), "value": (size, 1)}),
    "linmem.Memory.__contains__": (lambda w: w.mem.__contains__, {
        "item": (either(is_buffer, lambda value: is_size(value) and int(getattr(value, "value", value)) < 256), 0)}),
    "linmem.Memory.__delitem__": (lambda w: w.mem.__delitem__, {"key": (lambda value: False, 0)}),
    "linmem.Memory.__exit__": (lambda w: linmem.create(1).__exit__, {
        "kind": (anything, None), "error": (anything, None), "trace": (anything, None)}),
    "linmem.GrowableArray": (lambda w: linmem.GrowableArray, {
        "dtype": (a_dtype, "u1"), "row_shape": (lengths, ()), "maximum": (size_or_none, None),
        "creator": (either(trait, nothing), None)}),
    "linmem.GrowableArray.append": (lambda w: w.rows.append, {"row": (is_count, 1)}),
    "linmem.GrowableArray.extend": (lambda w: w.rows.extend, {"rows": (anything, (1, 2))}),
    "linmem.GrowableArray.resize": (lambda w: w.rows.resize, {"n": (size, 3)}),
    "linmem.GrowableArray.__getitem__": (lambda w: w.rows.__getitem__, {"key": (anything, 0)}),
    "linmem.GrowableArray.__setitem__": (lambda w: w.rows.__setitem__, {"key": (anything, 0), "value": (anything, 1)}),
    "linmem.GrowableArray.__exit__": (lambda w: linmem.GrowableArray("u1").__exit__, {
        "kind": (anything, None), "error": (anything, None), "trace": (anything, None)}),
    "linmem.GrowableArray.attach": (lambda w: linmem.GrowableArray.attach, {
        "memory": (lambda value: False, given_by("headed"))}),
    "linmem.empty": (lambda w: linmem.empty, {
        "shape": (lengths, 3), "dtype": (a_dtype, "u1"), "creator": (either(trait, nothing), None)}),
    "linmem.Image": (lambda w: linmem.Image, {}),
    "linmem.Image.from_bytes": (lambda w: linmem.Image.from_bytes, {"data": (is_buffer, b"x"), "offset": (size, 0)}),
    "linmem.Image.from_pieces": (lambda w: linmem.Image.from_pieces, {
        "pieces": (nothing_in, [(0, b"x")]),
        "size": (size, 1), "offset": (size, 0)}),
    "linmem.Image.from_fd": (lambda w: linmem.Image.from_fd, {
        "fd": (lambda value: False, lambda w: w.file.fileno()), "size": (size, PAGE), "offset": (size, 0),
        "position": (size, 0), "runs": (either(nothing, nothing_in), None),
        "digest": (nothing, None)}),
    "linmem.Image.new_memory": (lambda w: w.image.new_memory, {
        "maximum": (size_or_none, None), "minimum": (size_or_none, None), "creator": (native_or_none, None),
        "reserve": (size_or_none, None), "guard": (size_or_none, None), "may_move": (flag, False),
        "domain": (text_or_none, None)}),
    "linmem.Image.diff": (lambda w: w.image.diff, {"other": (of(linmem.Image, linmem.Memory), given_by("image"))}),
    "linmem.Image.apply": (lambda w: w.image.apply, {"delta": (delta, given_by("delta"))}),
    "linmem.Image.save": (lambda w: w.image.save, {
        "path": (is_path, lambda w: w.folder / "saved"), "packed": (flag, False)}),
    "linmem.Image.open": (lambda w: linmem.Image.open, {
        "path": (is_path, given_by("path")), "verify": (flag, False), "map": (flag, True),
        "max_size": (size_or_none, None)}),
    "linmem.Delta": (lambda w: linmem.Delta, {
        "base": (text, "0" * 64), "base_size": (size, 8), "size": (size, 8),
        "ranges": (nothing_in, [(0, 4)]), "zeros": (nothing_in, [(4, 4)]),
        "data": (is_buffer, b"abcd"), "target": (either(text, nothing), None), "offset": (size, 0)}),
    "linmem.Delta.then": (lambda w: w.delta.then, {"later": (delta, given_by("delta"))}),
    "linmem.Delta.save": (lambda w: w.delta.save, {"path": (is_path, lambda w: w.folder / "saved")}),
    "linmem.Delta.open": (lambda w: linmem.Delta.open, {
        "path": (is_path, given_by("delta_path")), "max_size": (size_or_none, None)}),
    "linmem.wasmtime.install": (lambda w: linmem.wasmtime.install, {
        "config": (of(wasmtime.Config), given_by("config")), "creator": (either(trait, nothing), None),
        "tune": (flag, True)}),
    "linmem.wasmtime.use": (lambda w: linmem.wasmtime.use, {"creator": (trait, linmem.MmapCreator())}),
    "linmem.wasmtime.use.__exit__": (lambda w: use_block, {
        "kind": (anything, None), "error": (anything, None), "trace": (anything, None)}),
    "linmem.wasmtime.cause": (lambda w: linmem.wasmtime.cause, {"error": (of(BaseException), ValueError())}),
    "linmem.wasmtime.patch": (lambda w: lambda creator=None: linmem.wasmtime.patch(creator).undo(), {
        "creator": (either(trait, nothing), None)}),
    "linmem.wasmtime.linear_memory": (lambda w: linmem.wasmtime.linear_memory, {
        "store": (of(wasmtime.Store), given_by("store")), "memory": (of(wasmtime.Memory), given_by("wasm_memory"))}),
    "linmem.wasmtime.memories": (lambda w: linmem.wasmtime.memories, {
        "instance": (of(wasmtime.Instance), given_by("instance")),
        "store": (either(of(wasmtime.Store), nothing), given_by("store"))}),
    "linmem.wasmtime.new_memory": (lambda w: linmem.wasmtime.new_memory, {
        "store": (of(wasmtime.Store), given_by("store")),
        "memory_type": (of(wasmtime.MemoryType), wasmtime.MemoryType(wasmtime.Limits(1, None))),
        "domain": (text_or_none, None),
        "creator": (either(trait, nothing), None)}),
    "linmem.wasmtime.prepare": (lambda w: linmem.wasmtime.prepare, {
        "engine": (of(wasmtime.Engine), given_by("engine")),
        "wasm": (of(str, bytes, bytearray), WAT),
        "cache": (either(is_path, nothing), None), "expose": (flag, False), "trap_on_refused": (flag, False)}),
    "linmem.wasmtime.Prepared": (lambda w: linmem.wasmtime.Prepared, {}),
    "linmem.wasmtime.Prepared.instantiate": (lambda w: w.prepared.instantiate, {
        "store": (of(wasmtime.Store), given_by("store")), "imports": (nothing_in, ()),
        "start": (either(of(linmem.wasmtime.Snapshot), nothing), given_by("snapshot")),
        "domain": (text_or_none, None), "creator": (either(trait, nothing), None)}),
    "linmem.wasmtime.Sessions": (lambda w: linmem.wasmtime.Sessions, {
        "prepared": (of(linmem.wasmtime.Prepared), given_by("prepared")), "imports": (either(nothing_in, callable), ()),
        "start": (of(linmem.wasmtime.Snapshot), given_by("snapshot")), "size": (count_from_one, 1),
        "store": (either(nothing, callable), None), "begin": (either(nothing, callable), None),
        "creator": (either(trait, nothing), None)}),
    "linmem.wasmtime.Sessions.__exit__": (lambda w: w.sessions.__exit__, {
        "kind": (anything, None), "error": (anything, None), "trace": (anything, None)}),
    "linmem.wasmtime.Sessions.get": (lambda w: w.sessions.get, {"timeout": (either(seconds, nothing), None)}),
    "linmem.wasmtime.Snapshot": (lambda w: linmem.wasmtime.Snapshot, {}),
    "linmem.wasmtime.Snapshot.take": (lambda w: linmem.wasmtime.Snapshot.take, {
        "store": (of(wasmtime.Store), given_by("store")), "instance": (of(wasmtime.Instance), given_by("instance")),
        "partial": (flag, False)}),
    "linmem.wasmtime.Snapshot.save": (lambda w: w.snapshot.save, {
        "path": (is_path, lambda w: w.folder / "saved"), "packed": (flag, False)}),
    "linmem.wasmtime.Snapshot.open": (lambda w: linmem.wasmtime.Snapshot.open, {
        "path": (is_path, given_by("snapshot_path")), "verify": (flag, False), "map": (flag, True),
        "max_size": (size_or_none, None)}),
    "linmem.wasmtime.Snapshot.restore": (lambda w: w.snapshot.restore, {
        "store": (of(wasmtime.Store), given_by("store")),
        "instance": (either(of(wasmtime.Instance), nothing), None), "zero_grown": (flag, False)}),
}


def of_dask(world):
    import linmem.dask

    return linmem.dask


def entered(world):
    def memory(*arguments, **options):
        with of_dask(world).memory(*arguments, **options) as mem:
            return mem.byte_size()
    return memory


if NEEDS["dask"][0]:
    FACE |= {
        "linmem.dask.setup": (lambda w: of_dask(w).setup, {"client": (lambda value: False, None)}),
        "linmem.dask.worker_pool": (lambda w: of_dask(w).worker_pool, {
            "image": (image, given_by("image")), "options": (lambda value: False, None)}),
        "linmem.dask.memory": (entered, {
            "image": (image, given_by("image")), "maximum": (size_or_none, None),
            "options": (lambda value: False, None)}),
        "linmem.dask.traffic": (lambda w: of_dask(w).traffic, {}),
        "linmem.dask.LinmemPlugin": (lambda w: of_dask(w).LinmemPlugin, {}),
        "linmem.dask.LinmemPlugin.setup": (lambda w: of_dask(w).LinmemPlugin().setup, {"worker": (anything, None)}),
    }


# -- garbage -------------------------------------------------------------------------------------------


def released(world):
    view = memoryview(bytearray(8))
    view.release()
    return view


def closed_memory(world):
    mem = linmem.create(1)
    mem.close()
    return mem


GARBAGE = {
    "None": lambda w: None, "NaN": lambda w: float("nan"), "inf": lambda w: float("inf"), "1.5": lambda w: 1.5,
    "True": lambda w: True, "-1": lambda w: -1, "-2**63": lambda w: -2**63, "2**31": lambda w: 2**31,
    "2**63 - 1": lambda w: 2**63 - 1, "2**63": lambda w: 2**63, "2**64 - 1": lambda w: 2**64 - 1,
    "2**64": lambda w: 2**64, "10**5000": lambda w: 10**5000, "-10**5000": lambda w: -10**5000, "1j": lambda w: 1j,
    "''": lambda w: "", "text": lambda w: "text", "NUL": lambda w: "a\0b", "surrogate": lambda w: "\ud800",
    "bytes": lambda w: b"bytes", "array of doubles": lambda w: array.array("d", [1, 2]),
    "strided": lambda w: memoryview(bytes(8))[::2], "read-only": lambda w: memoryview(bytes(8)),
    "two dimensions": lambda w: memoryview(bytes(8)).cast("B", (2, 4)), "released": released,
    "()": lambda w: (), "[None]": lambda w: [None], "[(0,)]": lambda w: [(0,)], "[(-1, b'')]": lambda w: [(-1, b"")],
    "{}": lambda w: {}, "object": lambda w: object(), "class": lambda w: int, "function": lambda w: len,
    "Ellipsis": lambda w: ..., "slice": lambda w: slice(-2**70, 2**70), "slice by nothing": lambda w: slice(0, 4, 0),
    "generator": lambda w: (x for x in (1, 2)), "raises": lambda w: Hostile(), "lies": lambda w: Liar(),
    "-1 by index": lambda w: Index(-1), "2**64 by index": lambda w: Index(2**64),
    "a closed memory": closed_memory, "the memory": lambda w: w.mem, "an image": lambda w: w.image,
    "an unmade image": lambda w: linmem.Image.__new__(linmem.Image), "a delta": lambda w: w.delta,
    "an unmade memory": lambda w: linmem.Memory.__new__(linmem.Memory), "a creator": lambda w: w.mmap,
    "an unmade record": lambda w: linmem.MemoryType.__new__(linmem.MemoryType),
    "a path of nothing": lambda w: w.folder / "no" / "such", "a folder": lambda w: w.folder,
    "a store": lambda w: w.store, "a module's memory": lambda w: w.wasm_memory,
}
# A test fails on any other exception.
REFUSALS = (TypeError, ValueError, OverflowError, BufferError, linmem.GrowError, linmem.PageError, linmem.OwnedError)


def refused_as_promised(error, labels):
    """Whether an exception is clear for these arguments: its text must name one of them."""
    names = list(labels)
    if any(label in SAYS and SAYS[label] in str(error) for label in labels.values()):
        return True
    if isinstance(error, IndexError):
        return "key" in names
    if isinstance(error, ImportError):
        return ((bool({"as_array", "dtype"} & set(names)) and not NEEDS["numpy"][0])
                or ("matplotlib" in str(error) and not NEEDS["matplotlib"][0]))
    if isinstance(error, (Own, linmem.GrowError, linmem.PageError, linmem.OwnedError, linmem.FileFormatError)):
        return True
    # Other errors about files and modules are raised by the OS or by wasmtime.
    if isinstance(error, FileNotFoundError) and {"attach", "handle_or_name"} & set(names):
        return True         # a name that no memory has
    if isinstance(error, (OSError, wasmtime.WasmtimeError)):
        return "path" in names or "wasm" in names or "cache" in names
    if not isinstance(error, REFUSALS):
        return False
    text = str(error)
    return any(re.search(rf"\b{re.escape(word)}\b", text) for name in names for word in (name, *ALSO.get(name, ())))


# Error texts of some values: the value itself raises an error with this text.
SAYS = {"a closed memory": "the memory is closed", "an unmade memory": "the memory is closed",
        "released": "released memoryview", "two dimensions": "multi-dimensional"}
# Other words by which an error text may name an argument.
ALSO = {
    "key": ("a memory is indexed", "a memory's bytes", "the slice has", "slice step", "data"),
    "value": ("a byte", "data"), "item": ("a byte", "what is looked for"), "options": ("bogus",),
    "pieces": ("offset", "data"), "imports": ("expected a Func",), "offset": ("pieces",),
    "size": ("the file must have", "ranges", "zeros", "pieces", "data"),
    "fd": ("the file",), "handle_or_name": ("attach",), "mem": ("needs a shared memory",),
    "reserved_size_in_bytes": ("reserve",), "guard_size_in_bytes": ("guard",),
}


def called(world, name, bad):
    """Calls with valid arguments except for the bad ones, and returns the result."""
    what, arguments = FACE[name]
    positional, named = [], {}
    kinds = KINDS[name]
    for argument, (_, good) in arguments.items():
        if argument in bad:
            value = bad[argument]
        elif argument == "options":
            continue
        else:
            value = good(world) if inspect.isfunction(good) else good
        if kinds[argument] == "keyword":
            named[argument] = value
        elif kinds[argument] == "keywords":
            named["bogus"] = value
        else:
            positional.append(value)
    return what(world)(*positional, **named)


# -- the public callables --------------------------------------------------------------------------------


def arguments_of(node):
    """From a function in a stub or a source: (argument, kind of the argument)."""
    given_ = [(argument.arg, "positional") for argument in node.args.posonlyargs + node.args.args]
    given_ = [pair for pair in given_ if pair[0] not in ("self", "cls")]
    if node.args.vararg:
        given_.append((node.args.vararg.arg, "positional"))
    given_ += [(argument.arg, "keyword") for argument in node.args.kwonlyargs]
    if node.args.kwarg:
        given_.append((node.args.kwarg.arg, "keywords"))
    return dict(given_)


@functools.cache
def definitions(module):
    """The definitions of a module, from its stub if it has one: name -> node."""
    package = Path(linmem.__file__).parent
    for suffix in (".pyi", ".py"):
        path = package / (module.removeprefix("linmem.").replace(".", "/") + suffix)
        if path.exists():
            return {node.name: node for node in ast.parse(path.read_text("utf-8")).body
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    raise AssertionError(f"no source or stub of {module}")


# protocol methods with arguments from the caller
PROTOCOL = {"__getitem__", "__setitem__", "__delitem__", "__contains__", "__exit__"}
EMPTY = {"__init__": {}}
MAKERS = ("__init__", "__new__")


def functions_of(cls):
    """The public methods of a class, including methods that it inherits from linmem's classes: name -> arguments."""
    found = dict(EMPTY)
    for base in reversed(cls.__mro__):
        if not base.__module__.startswith("linmem"):
            continue
        node = definitions(base.__module__).get(base.__name__)
        assert node is not None, f"{base} is in no stub and no source"
        fields = {}
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and not any(
                    isinstance(mark, ast.Name) and mark.id == "property" for mark in part.decorator_list):
                found["__init__" if part.name in MAKERS else part.name] = arguments_of(part)
            elif isinstance(part, ast.AnnAssign):
                fields[part.target.id] = "positional"
        if any("dataclass" in ast.unparse(mark) for mark in node.decorator_list):
            found["__init__"] = fields
    return {name: arguments for name, arguments in found.items()
            if not name.startswith("_") or name == "__init__" or name in PROTOCOL}


def public_face():
    """Every public class, and every public callable with arguments: name -> {argument: kind of the argument}."""
    found = {}
    modules = ["linmem", "linmem.wasmtime"] + ["linmem.dask"] * NEEDS["dask"][0]
    for home in modules:
        module = importlib.import_module(home)
        for name in module.__all__:
            thing = getattr(module, name)
            full = f"{home}.{name}"
            if inspect.ismodule(thing):
                assert full in modules
            elif isinstance(thing, int):        # a constant
                continue
            elif not inspect.isclass(thing):
                found[full] = arguments_of(definitions(thing.__module__)[name])
            elif not inspect.isabstract(thing):
                found[full] = functions_of(thing)["__init__"]
                for method, arguments in functions_of(thing).items():
                    assert hasattr(thing, method), f"{full} has no {method}"
                    if arguments and method != "__init__":
                        found[f"{full}.{method}"] = arguments
    return found


def is_the_same(name):
    """A method that several classes share is tested on one of them."""
    home, _, method = name.rpartition(".")
    if method in ("new_memory", "create") and home.endswith("Creator"):
        return f"linmem.MmapCreator.{method}"
    return name


KINDS = {is_the_same(name): arguments for name, arguments in public_face().items()}


# The extension modules have no docstrings, and so no signatures, if CPython was built --without-doc-strings.
with_docstrings = pytest.mark.skipif(not linmem.Memory.__doc__, reason="this CPython was built without docstrings")


@with_docstrings
def test_inspect_shows_the_arguments_of_each_public_class_and_function():
    declared = {name: list(arguments) for name, arguments in public_face().items()
                if name != "linmem.NativeCreator" and "__" not in name}
    shown = {}
    for name in declared:
        thing = functools.reduce(getattr, name.split(".")[1:], linmem)
        shown[name] = [argument for argument in inspect.signature(thing).parameters if argument != "self"]
    assert len(shown) > 90
    assert shown == declared


@with_docstrings
def test_the_docstrings_of_the_stubs_are_those_of_the_extension_modules():
    assert len(stub_docstrings.stubs()) == 5
    for path in stub_docstrings.stubs():
        assert stub_docstrings.documented(path) == path.read_text("utf-8"), "run python tests/stub_docstrings.py"


def test_help_and_completion_know_each_public_name_before_its_first_use():
    listed, helped = answer("""
        import pydoc
        import linmem
        print(*dir(linmem), sep=" ", end="\\n\\0")
        print(pydoc.plain(pydoc.render_doc(linmem)))
        """).split("\0")
    assert set(linmem.__all__) - set(listed.split()) == set()
    assert [name for name in linmem.__all__ if not re.search(rf"^ *(class )?{name}\b", helped, re.MULTILINE)] == []


def test_each_public_name_of_the_stubs_has_a_docstring():
    """Editors show it."""
    seen, without = 0, []
    for path in stub_docstrings.stubs():
        tree = ast.parse(path.read_text("utf-8"))
        for node, owner in stub_docstrings.with_owners(tree, stub_docstrings.public_part(path)):
            if not node.name.startswith("_"):
                seen += 1
                without += [f"{owner.__name__}.{node.name}"] if ast.get_docstring(node) is None else []
    assert seen > 100
    assert without == []


def test_every_public_argument_has_its_row():
    missing = [f"{name}({argument})" for name, arguments in KINDS.items() for argument in arguments
               if name not in FACE or argument not in FACE[name][1]]
    assert not missing, "say in FACE what these may be"
    assert {name: list(row[1]) for name, row in FACE.items()} == {
        name: list(arguments) for name, arguments in KINDS.items()}


def test_the_list_of_public_callables_is_complete():
    seen = set(public_face())
    for home in ["linmem", "linmem.wasmtime"]:
        module = importlib.import_module(home)
        for name in module.__all__:
            thing = getattr(module, name)
            if not inspect.isclass(thing):
                continue
            stubs = functions_of(thing)
            for method in dir(thing):
                attribute = inspect.getattr_static(thing, method)
                if method.startswith("_") or method in dir(Exception):
                    continue
                if isinstance(attribute, property) or inspect.isgetsetdescriptor(attribute):
                    # These attributes cannot be set, so they take no argument.
                    assert getattr(attribute, "fset", None) is None
                elif callable(getattr(thing, method)):
                    assert method in stubs, f"{home}.{name}.{method} is in no stub"
    assert len(seen) > 50


# -- the tests ---------------------------------------------------------------------------------------------


@pytest.fixture
def worlds(tmp_path):
    made = []

    def new():
        while made:
            made.pop().close()
        made.append(World(tmp_path))
        return made[0]

    yield new
    while made:
        made.pop().close()
    if NEEDS["dask"][0] and "linmem.dask" in sys.modules:
        sys.modules["linmem.dask"]._pools.clear()


def problem_of(world, name, labels):
    """Calls with garbage, {argument: its name}. Returns the problem or None, and whether the world was changed."""
    bad = {argument: GARBAGE[label](world) for argument, label in labels.items()}
    before = world.state()
    error = result = None
    try:
        result = called(world, name, bad)
    except KeyboardInterrupt:
        raise
    except BaseException as caught:
        error = caught
    which = f"{name} with {', '.join(f'{argument}: {label}' for argument, label in labels.items())}"
    if error is None:
        if hasattr(result, "close"):
            with contextlib.suppress(BufferError, linmem.OwnedError):
                result.close()
        fits = all(FACE[name][1][argument][0](value) for argument, value in bad.items())
        return None if fits else f"{which} was taken", True
    if not refused_as_promised(error, labels):
        return f"{which}: {type(error).__name__}: {error!s:.300}", True
    after = world.state()
    if any(after[key] != value for key, value in before.items()):
        return f"{which} changed what there was, and then: {type(error).__name__}: {error!s:.300}", True
    return None, False


DONE = Counter()


@pytest.fixture(scope="module", autouse=True)
def figures():
    yield
    print(dict(DONE))


# The callables that some systems do not support, with the feature of `support.NEEDS`.
NEEDED = {**dict.fromkeys(("linmem.wait", "linmem.wake", "linmem.Lock", "linmem.Lock.acquire", "linmem.Lock.__exit__",
                           "linmem.Memory.wait_for_growth"), "shared"),
          **dict.fromkeys(("linmem.open_file", "linmem.Memory.flush"), "file_memories"),
          "linmem.Memory.map": "maps_images"}
assert FACE.keys() >= NEEDED.keys()


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=requires(NEEDED[name]) if name in NEEDED else ())
    for name, (_, arguments) in FACE.items() if arguments])
def test_every_argument_refuses_garbage_by_its_name_and_changes_no_state(name, worlds):
    problems = []
    for argument in FACE[name][1]:
        world = worlds()
        for label in GARBAGE:
            problem, used = problem_of(world, name, {argument: label})
            if problem:
                problems.append(problem)
            if used:
                world = worlds()
            DONE["taken" if used else "refused"] += 1
        DONE["arguments"] += 1
    assert not problems, "\n".join(problems)


def test_two_arguments_of_garbage_are_refused_by_the_name_of_one(worlds):
    names = [name for name, (_, arguments) in FACE.items()
             if len(arguments) > 1 and (name not in NEEDED or NEEDS[NEEDED[name]][0])]

    @settings(max_examples=4 * settings.default.max_examples)       # many pairs, and each pair is fast
    @given(st.data())
    def check(data):
        name = data.draw(st.sampled_from(names))
        two = data.draw(st.lists(st.sampled_from(list(FACE[name][1])), min_size=2, max_size=2, unique=True))
        labels = {argument: data.draw(st.sampled_from(list(GARBAGE))) for argument in two}
        problem, _ = problem_of(worlds(), name, labels)
        DONE["pairs"] += 1
        assert problem is None, problem

    check()


# -- arguments with side effects ---------------------------------------------------------------------------


class Acting:
    """An integer, a buffer and a path. Each conversion runs `act`, which changes the memory."""

    def __init__(self, act, value):
        self.act, self.value = act, value

    def __index__(self):
        self.act()
        return self.value

    def __buffer__(self, flags):
        self.act()
        return memoryview(bytes(self.value))

    def __fspath__(self):
        self.act()
        return "no such folder/at all"


ACTS = {
    "closes it": lambda mem: mem.close(),
    "grows it": lambda mem: mem.grow_to(4 * PAGE),
    "moves it": lambda mem: mem.grow_to(mem.byte_capacity() + PAGE),
    "discards it": lambda mem: mem.discard(),
    "exports it": lambda mem: memoryview(mem),
}
ACTED = [(name.rpartition(".")[2], argument) for name, (_, arguments) in FACE.items()
         if name.startswith("linmem.Memory.") for argument, (kind, _) in arguments.items()
         if kind in (size, size_or_none, is_buffer)] + [("__getitem__", "key"), ("__setitem__", "key")]


@pytest.mark.parametrize("act", ACTS)
def test_an_argument_that_changes_the_memory_cannot_cause_an_access_past_its_end(act):
    for (method, argument), value in itertools.product(ACTED, (0, 1, PAGE, 2 * PAGE, 2 * PAGE + 1)):
        mem = linmem.create(2 * PAGE, reserve=0, may_move=True)
        mem.write(0, PATTERN)
        kept = []
        acting = Acting(lambda mem=mem, kept=kept: kept.append(ACTS[act](mem)), value)
        given_ = {name: good for name, (_, good) in FACE[f"linmem.Memory.{method}"][1].items()}
        given_[argument] = acting
        try:
            getattr(mem, method)(*given_.values())
        except (ValueError, IndexError, TypeError, linmem.GrowError, BufferError):
            pass
        kept.clear()
        if not mem.closed:
            assert mem.info().exports == 0
            assert len(mem.read(0, mem.byte_size())) == mem.byte_size()
        mem.close()


def test_the_last_reference_may_be_dropped_during_the_check_of_an_argument():
    for method, argument in ACTED:
        if argument == "data" and sys.version_info < (3, 12):
            continue            # before Python 3.12, Python classes cannot export buffers
        holder = [linmem.create(2 * PAGE)]
        given_ = {name: good for name, (_, good) in FACE[f"linmem.Memory.{method}"][1].items()}
        given_[argument] = Acting(holder.clear, 0)
        with contextlib.suppress(ValueError, TypeError):
            getattr(holder[0], method)(*given_.values())
        assert holder == []


@pytest.mark.parametrize("path", ["linmem.Image.open", "linmem.Image.save", "linmem.Delta.open", "linmem.Delta.save",
                                  "linmem.wasmtime.Snapshot.open", "linmem.wasmtime.Snapshot.save"])
def test_a_path_with_side_effects_is_a_valid_path(path, worlds):
    world = worlds()
    what, arguments = FACE[path]
    acting = Acting(lambda: world.mem.close(), 0)
    with pytest.raises(OSError):
        what(world)(acting, *[] if len(arguments) < 3 else [False])
    assert world.mem.closed


# -- calls that would end the process ---------------------------------------------------------------------


@pytest.mark.parametrize("call", ["linmem.wasmtime.linear_memory(other, memory)",
                                  "linmem.wasmtime.memories(instance, other)",
                                  "linmem.wasmtime.Snapshot.take(other, instance)"])
def test_a_foreign_store_is_refused(call):
    # In a child, because wasmtime itself would end the process.
    assert answer(f"""
        import linmem.wasmtime, wasmtime
        config = wasmtime.Config()
        linmem.wasmtime.install(config)
        engine = wasmtime.Engine(config)
        store, other = wasmtime.Store(engine), wasmtime.Store(engine)
        instance = wasmtime.Instance(store, wasmtime.Module(engine, {WAT!r}), [])
        memory = instance.exports(store)["m"]
        assert linmem.wasmtime.linear_memory(store, memory).byte_size() == 65536
        try:
            {call}
        except ValueError as error:
            print(error)
        """).startswith("store must be the one that the ")


def test_a_delta_of_the_callers_own_class_cannot_write_out_of_bounds(worlds):
    mem = worlds().mem

    class Hostile(linmem.Delta):
        def pieces(self):
            mem.protect(0, PAGE, "none")
            yield 0, 5, None

    with pytest.raises(TypeError, match="apply is not supported with protected pages"):
        mem.apply(Hostile("0" * 64, 2 * PAGE, 2 * PAGE, [], [], b""))
    mem.protect(0, PAGE, "rw")
    assert mem.read(0, len(PATTERN)) == PATTERN


# -- the command line ----------------------------------------------------------------------------------------

WORDS = ["", " ", "-", "--", "-1", "--no-such", "0x10", "nan", "inf", "1e999", "9" * 5000, str(2**63), str(2**64),
         "text", "\u00e9", "\udc80", "a\nb", "a\0b", "a=b", "=", "::", "::::", ".", "no/such/file", "x" * 5000]
COMMANDS = {
    "run": ["{wat}"], "prewarm": ["{wat}", "--init", "_start", "--output", "{new}"], "demo": None, "info": [],
    "top": ["1", "--once"],
    "cache info": [], "cache prune": [], "image info": ["{image}"], "image verify": ["{image}"],
    "image diff": ["{image}", "{other}"], "image apply": ["{image}", "{delta}", "--output", "{new}"],
    # "cache" and "image" only have subcommands; test_bench.py covers "bench".
    "cache": None, "image": None, "bench": None,
}


def parsers():
    """All commands: words of the command -> its parser."""
    _, found = cli.build_parser()
    for name, command in (("run", run_cli), ("prewarm", prewarm_cli), ("cache", cache_cli), ("demo", demo_cli),
                          ("info", info_cli), ("top", top_cli), ("image", image_cli)):
        command.add_arguments(found[name])
    return found | {f"{name} {inner}": parser for name in ("cache", "image") for action in found[name]._actions
                    if isinstance(action, argparse._SubParsersAction) for inner, parser in action.choices.items()}


def values_of(parser):
    """The arguments of a command that take a value: the name of an option, or the number of a positional argument."""
    place = 0
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction) or action.nargs == 0:
            continue
        if action.option_strings:
            yield action.option_strings[0]
        else:
            yield place
            place += 1
    if "PROGRAM" in (parser.usage or ""):       # an argument that argparse does not know
        yield 0


def test_every_command_is_in_the_table():
    assert set(parsers()) == set(COMMANDS)


@pytest.mark.filterwarnings("ignore:not cached")      # on Windows, a space is the name of no folder
@pytest.mark.parametrize("command", [command for command, words in COMMANDS.items() if words is not None])
def test_every_word_of_the_command_line_may_be_garbage(command, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "program.wat").write_text('(module (memory 1) (func (export "_start")))')
    old, new = linmem.Image.from_bytes(bytes(PAGE)), linmem.Image.from_bytes(b"x" * PAGE)
    old.save(tmp_path / "image")
    new.save(tmp_path / "other")
    old.diff(new).save(tmp_path / "delta")
    good = [word.format(wat=tmp_path / "program.wat", image=tmp_path / "image", other=tmp_path / "other",
                        delta=tmp_path / "delta", new=tmp_path / "new") for word in COMMANDS[command]]
    places = list(values_of(parsers()[command]))
    for place, word in itertools.product([*places, None], WORDS):
        if place == "--picture":        # test_image_cli.py tests the commands that draw
            continue
        words = list(good)
        if isinstance(place, int):
            words[place] = word
        elif place is None:                     # an additional word
            words.append(word)
        else:
            words += [f"{place}={word}"]
        # Options come before the program, because words after the program are the program's arguments.
        words = words[::-1] if command == "run" and isinstance(place, str) else words
        try:
            code = cli.main([*command.split(), *words])
        except SystemExit as ended:
            code = ended.code
        said = capfd.readouterr()
        assert isinstance(code, int), (place, word)
        assert "Traceback" not in said.err, (place, word)
        assert code == 0 or said.err.strip(), (place, word)
        assert len(said.err) < 20_000
        DONE["words"] += 1
