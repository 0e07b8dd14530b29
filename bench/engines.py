"""The wasmtime engines that are compared, one for each configuration, and the two loops that use them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat

import linmem
from linmem._os import pages as _pages
from linmem.bench import _loops
from linmem.bench.harness import Contender, Run, Unavailable, clock

TYPE_CHECKING = False
if TYPE_CHECKING:
    import wasmtime

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40
EVERYTHING = 1 << 62

# A loop has one live instance, so an engine needs room for a few instances, and no stacks. With wasmtime's own numbers
# an engine takes some 2000 mappings and terabytes of addresses, and the process ends when these run out.
BOUNDS = {"total_core_instances": 16, "total_memories": 16, "total_tables": 16, "total_stacks": 1,
          "total_gc_heaps": 16, "total_component_instances": 1}
BOUNDED_SPACE = 256 * GIB
UNBOUNDED_SPACE = 16 * TIB
UNBOUNDED_MAPPINGS = 8192


# -- configurations ------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Setting:
    """A configuration of wasmtime. `configure` prepares a Config and returns objects that must outlive the engine."""

    key: str
    what: str
    configure: Callable[[wasmtime.Config], object]


def pool(**options: object) -> linmem.abc.MemoryCreator:
    try:
        return linmem.creator("pool", **options)
    except ValueError as error:
        raise Unavailable(str(error)) from error


def with_creator(make: Callable[[], object | None]) -> Callable[[wasmtime.Config], object]:
    def configure(config: wasmtime.Config) -> object:
        from linmem.wasmtime import install

        creator = make()
        install(config, creator)
        return creator

    return configure


def leave_alone(config: wasmtime.Config) -> None:
    """wasmtime's default: an allocation for each instance, and copy-on-write for data."""


def pooling(*, bounded: bool = True, copy_on_write: bool = True,
            **settings: int) -> Callable[[wasmtime.Config], object]:
    """wasmtime's pooling allocator, with settings of its C interface under the names of that interface."""
    def configure(config: wasmtime.Config) -> None:
        from wasmtime import _ffi as ffi

        check_room(BOUNDED_SPACE if bounded else UNBOUNDED_SPACE, 0 if bounded else UNBOUNDED_MAPPINGS)
        wanted = {**(BOUNDS if bounded else {}), **settings}
        setters = {name: f"wasmtime_pooling_allocation_config_{name}_set" for name in wanted}
        missing = [setter for setter in ("wasmtime_pooling_allocation_strategy_set", *setters.values())
                   if not hasattr(ffi, setter)]
        if missing:
            raise Unavailable(f"wasmtime's C interface has no {missing[0]}")
        made = ffi.wasmtime_pooling_allocation_config_new()
        try:
            for name, value in wanted.items():
                getattr(ffi, setters[name])(made, value)
            ffi.wasmtime_pooling_allocation_strategy_set(config.ptr(), made)
        finally:
            ffi.wasmtime_pooling_allocation_config_delete(made)
        ffi.wasmtime_config_memory_init_cow_set(config.ptr(), copy_on_write)

    return configure


def check_room(space: int, mappings: int) -> None:
    """Raise `Unavailable` if an engine does not fit: wasmtime itself would end the process."""
    floor = _pages.describe()
    left, most = floor["address_space_left"], floor["limits"].get("vm.max_map_count")
    if left < space:
        raise Unavailable(f"such an engine takes up to {space >> 30} GiB of addresses: {left >> 30} GiB are left")
    if most is not None and most < mappings:
        raise Unavailable(f"such an engine takes thousands of mappings: vm.max_map_count is {most}")


LINMEM_POOL = Setting("linmem", "linmem's pool", with_creator(pool))
LINMEM_SCAN = Setting("scan", "linmem's pool, always a scan", with_creator(lambda: pool(reset="scan")))
LINMEM_PLAIN = Setting("plain", "linmem without a pool", with_creator(linmem.MmapCreator))
INSTALLED = Setting("installed", "linmem.wasmtime.install(config)", with_creator(lambda: None))
DEFAULT = Setting("default", "wasmtime's default", leave_alone)
POOLING = (
    Setting("pooling", "wasmtime's pooling, as it comes", pooling(bounded=False)),
    Setting("pooling_keep_64k", "pooling, 64 KiB kept resident", pooling(linear_memory_keep_resident=64 * KIB)),
    Setting("pooling_keep_1m", "pooling, 1 MiB kept resident", pooling(linear_memory_keep_resident=MIB)),
    Setting("pooling_keep_all", "pooling, everything kept resident", pooling(linear_memory_keep_resident=EVERYTHING)),
    Setting("pooling_batch", "pooling, decommits in batches of 16", pooling(decommit_batch_size=16)),
    Setting("pooling_keep_batch", "pooling, 1 MiB kept, batches of 16",
            pooling(linear_memory_keep_resident=MIB, decommit_batch_size=16)),
    Setting("pooling_keep_no_cow", "pooling, 1 MiB kept, without copy-on-write",
            pooling(copy_on_write=False, linear_memory_keep_resident=MIB)),
    Setting("pooling_scan", "pooling, everything kept, page map scanned",
            pooling(linear_memory_keep_resident=EVERYTHING, pagemap_scan=1)),
)
CTYPES = Setting("ctypes", "a creator in Python, by ctypes", lambda config: CtypesCreator(config))


class CtypesCreator:
    """The host memory creator that a user of wasmtime-py would write today: ctypes callbacks over libc.

    The creator is as fast as ctypes allows: one reservation and one change of protection for a memory, one change for a
    growth, declared argument types, no allocation in get_memory, no wrapper between callback and dictionary.
    """

    def __init__(self, config: wasmtime.Config) -> None:
        import mmap

        from wasmtime import _ffi as ffi

        try:
            libc = ctypes.CDLL(None, use_errno=True)
            map_pages, protect, unmap = libc.mmap, libc.mprotect, libc.munmap
        except (AttributeError, TypeError, OSError) as error:
            raise Unavailable(f"no C library with mmap and mprotect: {error}") from error
        map_pages.restype = ctypes.c_void_p
        map_pages.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                              ctypes.c_long]
        protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        failed = ctypes.c_void_p(-1).value
        memories: dict[int, list[int]] = {}         # base -> [byte_size, byte_capacity, mapped]

        def error(text: bytes) -> int:
            return ctypes.cast(ffi.wasmtime_error_new(text), ctypes.c_void_p).value or 0

        def get_memory(base: int, size, capacity) -> int:
            size[0], capacity[0], _ = memories[base]
            return base

        def grow_memory(base: int, new_size: int) -> int:
            memory = memories[base]
            size = memory[0]
            if new_size > memory[1]:
                return error(b"past the reservation")
            if protect(base + size, new_size - size, access):
                return error(b"mprotect failed")
            memory[0] = new_size
            return 0

        def drop(base: int) -> None:
            unmap(base, memories.pop(base)[2])

        def new_memory(env, ty, minimum: int, maximum: int, reserved: int, guard: int, out) -> int:
            capacity = max(minimum, reserved)
            total = capacity + guard
            base = map_pages(None, total, 0, flags, -1, 0)
            if base == failed:
                return error(b"mmap failed")
            if minimum and protect(base, minimum, access):
                unmap(base, total)
                return error(b"mprotect failed")
            memories[base] = [minimum, capacity, total]
            made = out[0]
            made.env = base
            made.get_memory, made.grow_memory, made.finalizer = callbacks
            return 0

        fields = dict(ffi.wasmtime_linear_memory_t._fields_)
        callbacks = (fields["get_memory"](get_memory), fields["grow_memory"](grow_memory), fields["finalizer"](drop))
        self.creator = ffi.wasmtime_memory_creator_t()
        self.creator.new_memory = ffi.wasmtime_new_memory_callback_t(new_memory)
        self.callbacks = callbacks
        self.memories = memories
        ffi.wasmtime_config_memory_init_cow_set(config.ptr(), False)
        ffi.wasmtime_config_host_memory_creator_set(config.ptr(), ctypes.byref(self.creator))


# -- engines, and loops over them --------------------------------------------------------------------------

class Engines:
    """One engine for each setting, which the contenders of a group share while they run."""

    def __init__(self) -> None:
        self._live: weakref.WeakValueDictionary[str, Kept] = weakref.WeakValueDictionary()

    def get(self, setting: Setting) -> Kept:
        kept = self._live.get(setting.key)
        if kept is None:
            kept = self._live[setting.key] = Kept(setting)
        return kept


class Kept:
    """An engine, and the creator of its memories."""

    def __init__(self, setting: Setting) -> None:
        import wasmtime

        config = wasmtime.Config()
        self.creator = setting.configure(config)
        self.engine = wasmtime.Engine(config)


def native(engines: Engines, setting: Setting, module: Callable[[], str | bytes], *,
           prepared: bool = False) -> Callable[[], Run]:
    """Instantiate and drop in C, without Python. A prepared module has its data in images."""
    def make() -> Run:
        import wasmtime

        bind()
        kept = engines.get(setting)
        if prepared:
            made = prepare(kept.engine, module())
            compiled, offer = made.module, made._offer
        else:
            compiled, offer = wasmtime.Module(kept.engine, module()), None
        at = address(kept.engine.ptr()), address(compiled.ptr())
        try:
            _loops.instantiate(*at, 1, offer)
        except RuntimeError as error:
            raise Unavailable(str(error)) from error

        def run(n: int, alive=(kept, compiled)) -> int:
            return _loops.instantiate(*at, n, offer)

        return run

    return make


def python(engines: Engines, setting: Setting, module: Callable[[], str | bytes], *,
           prepared: bool = False) -> Callable[[], Run]:
    """Instantiate and drop as a program with wasmtime-py does. A prepared module has its data in images."""
    def make() -> Run:
        import wasmtime
        from wasmtime import Instance, Store

        kept = engines.get(setting)
        if prepared:
            instantiate = prepare(kept.engine, module()).instantiate

            def run_prepared(n: int) -> int:
                engine = kept.engine
                began = clock()
                for _ in repeat(None, n):
                    store = Store(engine)
                    instantiate(store, [])
                    store.close()
                return clock() - began

            return run_prepared
        compiled = wasmtime.Module(kept.engine, module())

        def run(n: int) -> int:
            engine = kept.engine
            began = clock()
            for _ in repeat(None, n):
                store = Store(engine)
                Instance(store, compiled, [])
                store.close()
            return clock() - began

        return run

    return make


def prepare(engine: wasmtime.Engine, module: str | bytes) -> linmem.wasmtime.Prepared:
    from linmem.wasmtime import prepare

    made = prepare(engine, module)
    if made.skipped:
        raise Unavailable(f"the module keeps its data: {'; '.join(made.skipped)}")
    return made


def native_contenders(engines: Engines, settings: tuple[Setting, ...], module: Callable[[], str | bytes],
                      empty: Callable[[], str | bytes], *, prepared: bool = False) -> tuple[Contender, ...]:
    """For each setting, the loop of the module, minus the loop of a module without a memory on the same engine."""
    return tuple(Contender(s.key, f"{s.what}, data in an image" if prepared else s.what,
                           native(engines, s, module, prepared=prepared), less=f"{s.key}/empty")
                 for s in settings) + tuple(
        Contender(f"{s.key}/empty", f"{s.what}, no memory", native(engines, s, empty)) for s in settings)


def bind() -> None:
    from wasmtime import _ffi as ffi

    missing = [name for name in _loops.FUNCTIONS if not hasattr(ffi.dll, name)]
    if missing:
        raise Unavailable(f"this wasmtime has no {missing[0]}")
    _loops.bind({name: address(getattr(ffi.dll, name)) for name in _loops.FUNCTIONS})


def address(pointer: object) -> int:
    return ctypes.cast(pointer, ctypes.c_void_p).value or 0
