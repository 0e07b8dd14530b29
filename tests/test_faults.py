"""Every public operation, with each of its page calls refused in turn.

A row of the table is an operation. A trial refuses the operation's 1st, 2nd ... page call, until the operation makes no
more calls. The refusals are: one call, two calls in a row (so that the undoing of the first is refused, too), and every
call from there on, with more than one error code. Each time, either the documented exception is raised and the state is
unchanged, or the operation has done its complete work. Afterwards the operation works again, and no resource is leaked.

The table is complete: a test fails if a public name is in no row and not in the list of operations that make no page
call.
"""

import contextlib
import copy
import ctypes
import dataclasses
import functools
import gc
import inspect
import os
import pickle
import re
import tempfile
from dataclasses import dataclass

import pytest
import wasmtime
from support import (
    HAS_KERNEL32,
    NEEDS,
    PAGE,
    SCAN_WAYS,
    accessible_parts,
    answer,
    check_fresh,
    counting,
    descriptors,
    failing,
    image_kinds,
    live_bytes,
    os_code,
    requires,
    scanning,
)

import linmem
import linmem.wasmtime
from linmem import Image
from linmem._core import pool as _pool
from linmem._core.memory import NativeCreator, RowBuffer
from linmem._core.process_handles import Handle
from linmem._os import pages
from linmem._wasm.snapshot_file import SnapshotHandle, StoredSnapshot
from linmem._wasm.state import MemoryState, State

# Two error codes: out of memory, and another code, because no result may depend on the code.
OUT_OF_MEMORY, OTHER = (8, 1455) if HAS_KERNEL32 else (12, 11)
FOR_GOOD = 1 << 40
WAYS = {"once": (OUT_OF_MEMORY, 1), "another code": (OTHER, 1), "twice": (OUT_OF_MEMORY, 2),
        "for good": (OUT_OF_MEMORY, FOR_GOOD)}
if HAS_KERNEL32:
    WAYS = {"once": (OUT_OF_MEMORY, 1), "for good": (OTHER, FOR_GOOD)}
MOST_CALLS = 80         # more page calls than any operation makes

SHAPE = {"maximum": 32 * PAGE, "reserve": 32 * PAGE, "guard": PAGE}
MOVING = {"maximum": 32 * PAGE, "reserve": 0, "guard": PAGE, "may_move": True}
WASM_PAGE = 65536
BUDGET = 64 * max(PAGE, WASM_PAGE)


class MinusOne(Exception):
    """The guest's memory.grow returned -1."""


# -- the state before and after an operation -------------------------------------------------------------

def look_at_memory(mem):
    if mem.closed:
        return "closed"
    info = mem.info()
    told = (info.byte_size, info.byte_capacity, info.maximum_byte_size, info.reserved, info.committed, info.pre_guard,
            info.guard, info.exports, info.kind, info.owner)
    if not NEEDS["regions"][0] or info.kind == "python":
        return told, None, bytes(mem)
    parts = accessible_parts(mem)
    return told, parts, [ctypes.string_at(info.base + start, end - start) for start, end, access in parts
                         if access.startswith("r")]


def look_at_creators(creator, counts):
    """The figures of the creators down to the first pool. The budgets below a pool are left out, because the pool may
    release idle slots for a request."""
    found = []
    for one in chain_of(creator):
        if isinstance(one, linmem.PoolingCreator):
            stats = one.stats()
            names = ("live", "pinned", "hits", "misses", "fallbacks") if counts else ("live", "pinned")
            return [*found, [stats[name] for name in names]]
        if isinstance(one, linmem.LimitingCreator):
            found.append(one.used_bytes)
        if isinstance(one, linmem.StatisticsCreator):
            sums = one.statistics()
            found.append([sums[name] for name in ("current_bytes", "current_count", "total_count", "total_bytes")])
    return found


def look_at_image(img, has_pool):
    return img.offset, img.size, bytes(img), None if has_pool else img.info().memories


class Scene:
    """The things that an operation works on: memories, creators, images, a store, and more things of its row."""

    creator = None
    store = None
    counts = True       # whether a pool's counters must stay the same

    def __init__(self, **things):
        self.__dict__.update(things)

    def things(self):
        return [((name, n), one) for name, thing in vars(self).items()
                for n, one in enumerate(thing if isinstance(thing, list) else [thing])]

    def places(self):
        """The addresses of the memories. Touches no page."""
        return {name: one.as_ptr() for name, one in self.things() if isinstance(one, linmem.Memory) and not one.closed}

    def state(self):
        """The whole visible state except addresses, which differ between twins. The call reads every byte and so makes
        every page resident. Therefore the state before an operation is read from a twin of the operation's scene."""
        found = {"creator": look_at_creators(self.creator, self.counts)}
        for name, one in self.things():
            if isinstance(one, linmem.Memory):
                found[name] = look_at_memory(one)
            elif isinstance(one, Image):
                found[name] = look_at_image(one, self.creator is not None)
        if self.store is not None:
            found["guest"] = self.size(self.store), self.load(self.store, 16), self.load(self.store, WASM_PAGE - 1)
        return found

    def close(self, *more):
        """Drops all things, and checks that no other reference to them is left."""
        for thing in (*more, *vars(self).values()):
            close_memories(thing if isinstance(thing, list) else [thing])
        creator, store = self.creator, self.store
        vars(self).clear()
        if store is not None:
            store.close()
        return creator


def close_memories(things):
    for mem in things:
        if isinstance(mem, linmem.Memory) and not (mem.closed or mem.info().owner == "wasmtime"):
            mem.close()


def prove_idle(creator):
    """Checks that no memory of the creator is alive, and that the next memory is like new."""
    if creator is None:
        return
    with creator.create(3 * PAGE, **SHAPE) as mem:
        check_fresh(mem, 3 * PAGE)
        mem.grow_to(12 * PAGE)
        assert bytes(mem) == bytes(12 * PAGE)
    pools = [one for one in chain_of(creator) if isinstance(one, linmem.PoolingCreator)]
    for pool in pools:
        pool.trim()
    for one in chain_of(creator):
        if one in pools:
            stats = one.stats()
            assert [stats[name] for name in ("live", "pinned", "warm", "cold", "resident")] == [0] * 5
        elif isinstance(one, linmem.LimitingCreator):
            assert one.used_bytes == 0
        elif isinstance(one, linmem.StatisticsCreator):
            sums = one.statistics()
            assert (sums["current_bytes"], sums["current_count"]) == (0, 0)


def chain_of(creator):
    while creator is not None:
        yield creator
        creator = getattr(creator, "upstream", None)


def left_behind():
    if not NEEDS["descriptors"][0]:     # descriptors cannot be counted here
        return None
    for _ in range(3):      # the next releases also release the ranges whose release was refused
        linmem.create(PAGE).close()
    return live_bytes(), descriptors()


# -- the table ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Row:
    name: str
    covers: str                     # the public names that the row covers
    make: object                    # () -> Scene
    act: object                     # (scene) -> result
    check: object                   # (scene, result); runs if the operation succeeded
    refused: frozenset              # the page calls that the operation needs
    error: type                     # the exception if one of these is refused
    within: object                  # () -> context manager
    again: bool                     # the same operation as another row, with another setup
    calls: bool                     # whether it makes page calls here


ROWS = []


def row(name, covers, make, act, check, refused="", error=linmem.PageError, within=contextlib.nullcontext,
        again=False, calls=True):
    # A page call of Windows takes a hundred times as long under Wine, so only one row for each operation runs there.
    if not (again and HAS_KERNEL32):
        ROWS.append(Row(name, covers, make, act, check, frozenset(refused.split()), error, within, again, calls))


def nothing(scene, result):
    """Checks no result. Scene.close() checks for leaks."""


def holds(true):
    def check(scene, result):
        assert true(scene, result)
    return check


# creators and their memories

MMAP = linmem.MmapCreator


class InPython(linmem.LinearMemory):
    """A linear memory in Python over one of linmem's memories."""

    def __init__(self, mem):
        self.mem = mem
        for name in ("byte_size", "byte_capacity", "maximum_byte_size", "as_ptr", "wasm_accessible", "grow_to"):
            setattr(self, name, getattr(mem, name))

    def byte_size(self): ...
    def byte_capacity(self): ...
    def as_ptr(self): ...
    def grow_to(self, new_size): ...


class PythonMemories(linmem.MemoryCreator):
    def __init__(self, wrap):
        self.wrap = wrap

    def new_memory(self, *how):
        return self.wrap(MMAP().new_memory(*how))


def full(pool, state):
    """Fills the pool's only slot, which is then live, or idle with another shape."""
    mem = pool.create(5 * PAGE, **SHAPE)
    if state == "idle":
        mem.close()
    return mem


def used(pool):
    """Returns a pool with a used slot."""
    with pool.create(3 * PAGE, **SHAPE) as mem:
        dirty(mem)
    return pool


def dirty(mem):
    mem.grow_to(12 * PAGE)
    mem.write(0, b"s" * 12 * PAGE)
    mem.protect(2 * PAGE, 3 * PAGE, "none")


DEFAULT = MMAP()


def refuses_nothing(*_):
    return None


CREATORS = {        # name -> (creator, the page calls that a creation needs, the page calls that a growth needs)
    "mmap": (MMAP, "reserve commit", "commit"),
    "prefaulting": (lambda: MMAP(prefault=True), "reserve commit prefault", "commit prefault"),
    "huge pages": (lambda: MMAP(huge_pages=True), "reserve commit", "commit"),
    "huge and prefaulting": (lambda: MMAP(prefault=True, huge_pages=True), "reserve commit prefault",
                             "commit prefault"),
    "a pool": (linmem.PoolingCreator, "reserve commit", "commit"),
    "a pool with an idle slot": (lambda: used(linmem.PoolingCreator(max_unused_warm=0)), "reserve commit",
                                 "commit protect"),
    "limiting": (lambda: linmem.LimitingCreator(MMAP(), BUDGET), "reserve commit", "commit"),
    "statistics": (lambda: linmem.StatisticsCreator(MMAP()), "reserve commit", "commit"),
    "callbacks": (lambda: linmem.CallbackCreator(MMAP(), on_made=refuses_nothing, on_grow=refuses_nothing,
                                                 on_refused=refuses_nothing, on_dropped=refuses_nothing,
                                                 limit_each=1 << 40, limit_growths=9), "reserve commit", "commit"),
    "a table of routes": (lambda: linmem.RoutingCreator([({"max_size": 0}, MMAP()), ({}, linmem.PoolingCreator())]),
                          "reserve commit", "commit"),
    "a rule": (lambda: linmem.RoutingCreator(lambda ty, size: DEFAULT), "reserve commit", "commit"),
    "creators with names": (lambda: linmem.LimitingCreator(used(linmem.PoolingCreator(MMAP(name="maps"), name="pool",
                                                                                      max_unused_warm=0)), BUDGET,
                                                            name="limit"), "reserve commit", "commit"),
    "limits above and below a pool": (
        lambda: linmem.LimitingCreator(linmem.StatisticsCreator(used(linmem.PoolingCreator(
            linmem.LimitingCreator(linmem.StatisticsCreator(MMAP()), BUDGET), max_unused_warm=0))), BUDGET),
        "reserve commit", "commit"),
    "a pool above a pool": (lambda: used(linmem.PoolingCreator(used(linmem.PoolingCreator()), max_unused_warm=0)),
                            "reserve commit", "commit"),
    "native memories from Python": (lambda: linmem.PythonCreator(PythonMemories(lambda mem: mem)), "reserve commit",
                                    "commit"),
    "memories in Python": (lambda: linmem.PythonCreator(PythonMemories(InPython)), "reserve commit", "commit"),
    "a pool above memories in Python": (
        lambda: linmem.PoolingCreator(linmem.PythonCreator(PythonMemories(InPython))), "reserve commit", "commit"),
}
if NEEDS["shared"][0]:
    CREATORS["shared memories"] = (linmem.SharedCreator,
                                   "file_begin file_size file_show reserve file_map "
                                   + ("extend" if NEEDS["shm_files"][0] else "commit"), "file_map commit")


def check_made(scene, mem):
    check_fresh_or_python(mem, 3 * PAGE)


def check_fresh_or_python(mem, size):
    if mem.info().kind == "python":
        assert bytes(mem) == bytes(size)
    else:
        check_fresh(mem, size)


def check_grown(scene, result):
    assert scene.mem.byte_size() == 20 * PAGE
    assert bytes(scene.mem) == scene.content + bytes(20 * PAGE - len(scene.content))


def with_memory(make, how=SHAPE, size=2 * PAGE + 5, grown=0):
    creator = make()
    mem = creator.create(size, **how)
    if grown:
        mem.grow_to(grown)
    mem.write(0, b"kept" * 10)
    return Scene(creator=creator, mem=mem, content=bytes(mem))


def check_started(scene, mem):
    img = scene.img
    assert mem[:img.offset] == bytes(img.offset)
    assert mem[img.offset:] == bytes(img)
    assert mem.dirty_pages(img) == []
    mem.close()
    assert img.info().memories == 0 or scene.creator is not None     # a pool's idle slots keep the image's memories


def creator_rows():
    for name, (make, creation, growth) in CREATORS.items():
        row(f"create: {name}", "create NativeCreator.create", lambda make=make: Scene(creator=make()),
            lambda scene: linmem.create(3 * PAGE, creator=scene.creator, **SHAPE), check_made, creation)
        row(f"new_memory: {name}", "NativeCreator.new_memory", lambda make=make: Scene(creator=make()),
            lambda scene: scene.creator.new_memory(linmem.MemoryType(1, 4), 3 * PAGE, 32 * PAGE, 32 * PAGE, PAGE),
            check_made, creation)
        row(f"grow in place: {name}", "Memory.grow_to", functools.partial(with_memory, make),
            lambda scene: scene.mem.grow_to(20 * PAGE), check_grown, growth)
        if name != "shared memories":       # they never move
            row(f"grow past the capacity: {name}", "Memory.grow_to", functools.partial(with_memory, make, MOVING),
                lambda scene: scene.mem.grow_to(20 * PAGE), check_grown, "reserve commit")
        row(f"close: {name}", "Memory.close Memory.__exit__", functools.partial(with_memory, make, grown=20 * PAGE),
            lambda scene: scene.mem.close(), holds(lambda scene, result: scene.mem.closed))


creator_rows()
row("create with a chosen reservation", "create", Scene, lambda scene: linmem.create(3 * PAGE, maximum=1 << 30),
    check_made, "reserve commit")
def check_costs(scene, found):
    assert 8 <= found["fault"] <= 64
    assert 4 <= found["scan"] <= 64
    _pool._costs(anew=True)


row("a pool is made when costs are not known", "PoolingCreator creator", Scene,
    lambda scene: (_pool._costs(anew=True), linmem.creator("pool"))[0], check_costs)


# -- a memory's pages

def plain(**how):
    return with_memory(MMAP, how or SHAPE)


def patchwork():
    """A memory in which some pages have another protection."""
    scene = with_memory(MMAP, SHAPE, 12 * PAGE)
    scene.mem.protect(2 * PAGE, 2 * PAGE, "r")
    scene.mem.protect(6 * PAGE, 2 * PAGE, "none")
    return scene


def over_image():
    """A memory whose middle pages come from an image."""
    img = Image.from_bytes(b"image" * PAGE, 3 * PAGE)
    mem = img.new_memory(minimum=12 * PAGE, **SHAPE)
    mem.write(0, b"before")
    mem.write(9 * PAGE, b"behind")
    return Scene(img=img, mem=mem)


def check_protected(access, start, end):
    def check(scene, result):
        if NEEDS["regions"][0]:
            base = scene.mem.as_ptr()
            found = [part for part in accessible_parts(scene.mem) if part[0] < end and part[1] > start]
            wanted = {"rw": "rw-p", "r": "r--p", "rx": "r-xp"}
            if access == "none":
                assert found == []
            else:
                assert [(max(a, start), min(b, end), how) for a, b, how in found] == [(start, end, wanted[access])]
            assert base == scene.mem.as_ptr()
        scene.mem.protect(0, 12 * PAGE, "rw") if len(scene.mem) >= 12 * PAGE else scene.mem.protect(0, 2 * PAGE, "rw")
        assert scene.mem.read(0, 4) in (b"kept", b"befo")
    return check


def check_zero(scene, result):
    assert bytes(scene.mem) == bytes(len(scene.mem))
    if hasattr(scene, "img"):
        scene.mem.restore(scene.img)
        assert bytes(scene.mem) == bytes(scene.img.offset) + bytes(scene.img) + bytes(4 * PAGE)


for access in ("rw", "r", "none", *(["rx"] if NEEDS["code"][0] else [])):
    row(f"protect {access}", "Memory.protect", plain,
        lambda scene, access=access: scene.mem.protect(0, 2 * PAGE, access), check_protected(access, 0, 2 * PAGE),
        "protect")
    row(f"protect {access} over several mappings", "Memory.protect", patchwork,
        lambda scene, access=access: scene.mem.protect(PAGE, 10 * PAGE, access),
        check_protected(access, PAGE, 11 * PAGE), "protect")
    row(f"protect {access} over an image", "Memory.protect", over_image,
        lambda scene, access=access: scene.mem.protect(2 * PAGE, 8 * PAGE, access),
        check_protected(access, 2 * PAGE, 10 * PAGE), "protect")
row("discard", "Memory.discard", plain, lambda scene: scene.mem.discard(), check_zero, "discard")
row("discard over an image", "Memory.discard", over_image, lambda scene: scene.mem.discard(), check_zero,
    "discard blank")
row("discard from within an image on", "Memory.discard", over_image, lambda scene: scene.mem.discard(4 * PAGE),
    holds(lambda scene, result: scene.mem[4 * PAGE:] == bytes(8 * PAGE)), "discard blank")
row("prefault", "Memory.prefault", plain, lambda scene: scene.mem.prefault(),
    holds(lambda scene, result: bytes(scene.mem) == scene.content), "prefault")


def with_windows():
    """A memory over an image, with a window over a part of the image, and a protected window."""
    scene = over_image()
    scene.shown = Image.from_bytes(b"window" * PAGE)
    scene.mem.map(2 * PAGE, scene.shown, 0, 3 * PAGE)
    scene.mem.map(9 * PAGE, scene.shown, 0, 2 * PAGE, "r")
    return scene


def check_window(start, size, source_offset):
    def check(scene, result):
        assert scene.mem[start:start + size] == bytes(scene.shown)[source_offset:source_offset + size]
        scene.mem.unmap(0, 12 * PAGE)
        assert scene.mem[start:start + size] == bytes(size)
    return check


def file_of_windows():
    path = os.path.join(FOLDER.name, "windows")
    with open(path, "wb") as file:
        file.write(b"file" * PAGE)
    return path


def shown_memory():
    scene = with_windows()
    scene.source = linmem.create(4 * PAGE, creator=linmem.creator("shared"))
    scene.source.write(0, b"s" * 4 * PAGE)
    scene.mem.map(0, scene.source, 0, PAGE)
    return scene


def map_file(mode):
    def act(scene):
        with open(file_of_windows(), mode) as file:
            scene.mem.map(PAGE, file)
    return act


if NEEDS["maps_images"][0]:
    row("map an image", "Memory.map", with_windows, lambda scene: scene.mem.map(5 * PAGE, scene.shown, PAGE, 2 * PAGE),
        check_window(5 * PAGE, 2 * PAGE, PAGE), "map")
    row("map read-only over windows", "Memory.map", with_windows,
        lambda scene: scene.mem.map(PAGE, scene.shown, access="r"), check_window(PAGE, 6 * PAGE, 0), "map")
    row("map into a part of a window", "Memory.map", with_windows,
        lambda scene: scene.mem.map(3 * PAGE, scene.shown, 5 * PAGE), check_window(3 * PAGE, PAGE, 5 * PAGE), "map")
    row("map a file", "Memory.map", with_windows, map_file("rb"),
        holds(lambda scene, result: scene.mem[PAGE:5 * PAGE] == b"file" * PAGE), "file_adopt file_size map")
    if NEEDS["file_memories"][0]:
        row("map a file for update", "Memory.map", with_windows, map_file("r+b"),
            holds(lambda scene, result: scene.mem[PAGE:5 * PAGE] == b"file" * PAGE),
            "file_adopt file_size file_allocate map")
    if NEEDS["shared"][0]:
        row("map a shared memory", "Memory.map", shown_memory,
            lambda scene: scene.mem.map(5 * PAGE, scene.source, PAGE, 2 * PAGE),
            holds(lambda scene, result: scene.mem[5 * PAGE:7 * PAGE] == b"s" * 2 * PAGE), "map")
    row("unmap a window", "Memory.unmap", with_windows, lambda scene: scene.mem.unmap(3 * PAGE, 6 * PAGE),
        holds(lambda scene, result: scene.mem[3 * PAGE:5 * PAGE] == bytes(2 * PAGE)), "unmap")
    if NEEDS["scans"][0]:      # else the bytes are compared without a page call
        row("restore into a window", "Memory.restore",
            lambda: Scene(mem=(mem := linmem.create(12 * PAGE, **SHAPE)), img=mem.snapshot(),
                          shown=mem.map(2 * PAGE, Image.from_bytes(DATA))),
            lambda scene: scene.mem.restore(scene.img),
            holds(lambda scene, result: scene.mem.dirty_pages(scene.img) == []))
    row("discard windows", "Memory.discard",
        lambda: (scene := with_windows(), scene.mem.protect(0, 12 * PAGE, "rw"))[0],
        lambda scene: scene.mem.discard(), check_zero, "discard")
    row("a pool's slot with windows is dropped", "Memory.close",
        lambda: Scene(creator=(pool := linmem.PoolingCreator(check=True)), mem=(mem := pool.create(3 * PAGE, **SHAPE)),
                      made=[mem.map(n * PAGE, Image.from_bytes(b"x" * PAGE)) for n in range(3)]),
        lambda scene: scene.mem.close(), holds(lambda scene, result: scene.mem.closed))
else:
    row("map where images cannot be mapped", "Memory.map Memory.unmap", over_image,
        lambda scene: refuses(TypeError, lambda scene: scene.mem.map(0, scene.img))(scene), nothing, calls=False)

row("info", "Memory.info", plain, lambda scene: scene.mem.info(),
    holds(lambda scene, info: info.committed == 3 * PAGE), "resident")
if NEEDS["shared"][0]:
    row("attach", "attach", lambda: with_memory(linmem.SharedCreator), lambda scene: linmem.attach(scene.mem.handle()),
        holds(lambda scene, mem: bytes(mem) == scene.content),
        "file_take file_size file_read file_show reserve file_map commit")
    row("discard shared pages", "Memory.discard", lambda: with_memory(linmem.SharedCreator),
        lambda scene: scene.mem.discard(), check_zero, "discard")
row("live", "live", plain, lambda scene: linmem.live(),
    holds(lambda scene, found: scene.mem.info() in found), "resident")
row("records", "StatisticsCreator.memories", functools.partial(with_memory, lambda: linmem.StatisticsCreator(MMAP())),
    lambda scene: scene.creator.memories(), holds(lambda scene, found: len(found) == 1))


# pools, with each kind of reset and each way to find touched pages

HOW = [(reset, way) for reset in ("adaptive", "scan") for way in sorted(SCAN_WAYS)]
HOW += [(reset, None) for reset in ("adaptive", "zero", "discard")]
TYPE = linmem.MemoryType(1, 4)
TYPE_SIZES = {"reserved_size_in_bytes": 1 << 18, "guard_size_in_bytes": -(-65536 // PAGE) * PAGE}


def pool_rows(reset, way):
    def a_pool(**options):
        return linmem.PoolingCreator(**{"keep_resident": 1 << 20, "reset": reset, "check": True, **options})

    def idle(states="warm cold"):
        pool = a_pool(max_unused_warm={"warm": 9, "cold": 0, "warm cold": 1}[states])
        for mem in [pool.create(3 * PAGE, **SHAPE) for _ in range(3)]:
            mem.write(0, b"s" * 3 * PAGE)
            mem.close()
        return Scene(creator=pool)

    def in_use(memories=1, **options):
        pool = a_pool(**options)
        scene = Scene(creator=pool, mems=[pool.create(3 * PAGE, **SHAPE) for _ in range(memories)])
        for mem in scene.mems:
            dirty(mem)
        return scene

    def check_fallback(scene, mem):
        check_fresh(mem, 4 * PAGE)
        assert scene.creator.stats()["fallbacks"] == 1
        mem.close()

    def check_closed(scene, result):
        assert all(mem.closed for mem in scene.mems)
        assert scene.creator.stats()["live"] == 0

    def of(name, covers, *how, **more):
        row(f"{name} ({reset}, {way})", covers, *how, within=lambda: scanning(way),
            again=(reset, way) not in (HOW[0], HOW[-1]), **more)

    of("a pool's cold slot", "PoolingCreator", functools.partial(idle, "cold"),
       lambda scene: scene.creator.create(3 * PAGE, **SHAPE), check_made, "reserve commit")
    of("another shape from a pool", "PoolingCreator", idle,
       lambda scene: scene.creator.create(4 * PAGE, **SHAPE),
       lambda scene, mem: check_fresh(mem, 4 * PAGE), "reserve commit")
    of("a full pool, an idle slot of another shape", "PoolingCreator",
       lambda: Scene(creator=(pool := a_pool(slots=1)), used=full(pool, "idle")),
       lambda scene: scene.creator.create(4 * PAGE, **SHAPE), lambda scene, mem: check_fresh(mem, 4 * PAGE),
       "reserve commit")
    of("a full pool that falls back", "PoolingCreator",
       lambda: Scene(creator=(pool := a_pool(slots=1)), used=full(pool, "live")),
       lambda scene: scene.creator.create(4 * PAGE, **SHAPE), check_fallback, "reserve commit")
    of("close of a slot", "Memory.close", in_use, lambda scene: [mem.close() for mem in scene.mems], check_closed)
    of("close of two slots, of which one stays warm", "Memory.close",
       functools.partial(in_use, 2, max_unused_warm=1), lambda scene: [mem.close() for mem in scene.mems],
       check_closed)
    of("grow in a slot that was used", "Memory.grow_to",
       lambda: Scene(creator=(pool := used(a_pool())), mem=(mem := pool.create(3 * PAGE, **SHAPE)),
                     content=bytes(mem)),
       lambda scene: scene.mem.grow_to(20 * PAGE), check_grown, "commit")
    of("trim", "PoolingCreator.trim", idle, lambda scene: scene.creator.trim(), nothing)
    of("purge", "PoolingCreator.purge", idle, lambda scene: scene.creator.purge(), nothing)
    of("trim some", "PoolingCreator.trim", idle, lambda scene: scene.creator.trim(PAGE), nothing)
    of("warm", "PoolingCreator.warm", idle, lambda scene: scene.creator.warm(3, TYPE, **TYPE_SIZES),
       holds(lambda scene, made: scene.creator.stats()["warm"] >= 1), "reserve commit")
    of("warm what is cold", "PoolingCreator.warm",
       lambda: Scene(creator=(pool := a_pool(max_unused_warm=1)), made=pool.warm(3, TYPE, **TYPE_SIZES)),
       lambda scene: scene.creator.warm(3, TYPE, **TYPE_SIZES), nothing, "reserve commit")

    def drop_the_pool(scene):
        scene.creator = None

    of("a pool is dropped with idle slots", "PoolingCreator", idle, drop_the_pool, nothing)


for how in HOW:
    pool_rows(*how)


# -- images, with each kind of pages

DATA = b"image" * PAGE
FOLDER = tempfile.TemporaryDirectory(prefix="linmem-test-", ignore_cleanup_errors=True)


@contextlib.contextmanager
def images_of(kind):
    before = pages.choose_image(kind)
    try:
        yield
    finally:
        pages.choose_image(before)


class Duplicate:
    """A copy of a descriptor, as `multiprocessing` sends it to another process."""

    def __init__(self, number):
        self.number = number

    def detach(self):
        return os.dup(self.number)


def image_rows(kind):
    def an_image():
        return Scene(img=Image.from_bytes(DATA, 3 * PAGE))

    def restored_from(other):
        def make():
            img = Image.from_bytes(DATA, 3 * PAGE)
            was = {"the same": img, "another": Image.from_bytes(b"y" * 4 * PAGE, PAGE), "none": None}[other]
            mem = linmem.create(8 * PAGE, **SHAPE) if was is None else was.new_memory(minimum=8 * PAGE, **SHAPE)
            mem[PAGE] = mem[4 * PAGE] = 1
            return Scene(img=img, mem=mem)
        return make

    def check_restored(scene, result):
        assert scene.mem[:] == bytes(3 * PAGE) + DATA
        assert scene.mem.dirty_pages(scene.img) == []

    def written():
        scene = an_image()
        scene.mem = scene.img.new_memory(minimum=12 * PAGE, **SHAPE)
        scene.mem[PAGE] = scene.mem[5 * PAGE] = scene.mem[10 * PAGE] = 1
        scene.delta = scene.img.diff(scene.mem)
        return scene

    def check_image(scene, img):
        assert (img.offset, bytes(img)) == (3 * PAGE, DATA)

    def check_applied(scene, img):
        assert bytes(img) == scene.mem[:]

    def pooled(**options):
        scene = an_image()
        scene.creator = linmem.PoolingCreator(**(options or {"max_unused_warm": 0}))
        for mem in [scene.img.new_memory(creator=scene.creator, **SHAPE) for _ in range(2)]:
            mem[4 * PAGE] = mem[0] = 1
            mem.close()
        return scene

    def slot_of_image(**options):
        scene = pooled(**options)
        scene.mem = scene.img.new_memory(creator=scene.creator, **SHAPE)
        scene.mem.grow_to(12 * PAGE)
        scene.mem[4 * PAGE] = scene.mem[11 * PAGE] = 1
        return scene

    def stored():
        path = os.path.join(FOLDER.name, f"{kind}.linmem")
        if not os.path.exists(path):
            Image.from_bytes(DATA, 3 * PAGE).save(path)
        return Scene(path=path)

    def grown_image(how):
        def make():
            scene = an_image()
            scene.mem = scene.img.new_memory(**how)
            scene.mem[4 * PAGE] = 1
            scene.content = bytes(scene.mem)
            return scene
        return make

    def of(name, covers, *how, **more):
        row(f"{name} ({kind})", covers, *how, within=lambda: images_of(kind), again=kind != image_kinds()[0], **more)

    filling = "image_begin image_write image_end"
    pieces = [(3 * PAGE, DATA[:PAGE + 7]), (6 * PAGE + 1, b"x" * PAGE)]
    of("from_bytes", "Image.from_bytes", Scene, lambda scene: Image.from_bytes(DATA, 3 * PAGE), check_image, filling)
    of("from_pieces", "Image.from_pieces", Scene, lambda scene: Image.from_pieces(pieces, 5 * PAGE, 3 * PAGE),
       holds(lambda scene, img: bytes(img)[:PAGE + 8] == DATA[:PAGE + 7] + b"\0"), filling)
    of("unpickle", "Image.__reduce_ex__", an_image, lambda scene: pickle.loads(pickle.dumps(scene.img, 5)),
       check_image, filling)
    of("copy", "Image.__reduce_ex__", an_image, lambda scene: copy.copy(scene.img), check_image, filling)
    of("snapshot", "Memory.snapshot", written, lambda scene: scene.mem.snapshot(), check_applied, filling)
    of("dirty_pages", "Memory.dirty_pages", written, lambda scene: scene.mem.dirty_pages(scene.img),
       holds(lambda scene, found: found == [(n * PAGE, PAGE) for n in (1, 5, 10)]),
       calls=NEEDS["scans"][0])
    of("diff", "Image.diff", written, lambda scene: scene.img.diff(scene.mem),
       holds(lambda scene, delta: delta == scene.delta), calls=NEEDS["scans"][0])
    of("apply to an image", "Image.apply", written, lambda scene: scene.img.apply(scene.delta), check_applied,
       "reserve commit image_map " + filling)
    for how, needs in ((SHAPE, "commit"), (MOVING, "reserve commit")):
        of(f"apply a delta that grows the memory, {needs}", "Memory.apply",
           lambda how=how, written=written: Scene(
               **{**vars(scene := written()), "other": scene.img.new_memory(**how)}),
           lambda scene: scene.other.apply(scene.delta),
           holds(lambda scene, result: scene.other[:] == scene.mem[:]), needs)
    of("new_memory of an image", "Image.new_memory", an_image, lambda scene: scene.img.new_memory(), check_started,
       "reserve commit image_map")
    of("create with image=", "NativeCreator.create", an_image,
       lambda scene: MMAP(prefault=True).create(8 * PAGE, image=scene.img, **SHAPE), check_started,
       "reserve commit image_map prefault")
    of("new_memory of an image, with limits", "Image.new_memory",
       lambda: Scene(**vars(an_image()), creator=linmem.StatisticsCreator(linmem.LimitingCreator(MMAP(), BUDGET))),
       lambda scene: scene.img.new_memory(creator=scene.creator), check_started, "reserve commit image_map")
    of("new_memory of an image, from Python", "Image.new_memory",
       lambda: Scene(**vars(an_image()), creator=linmem.PythonCreator(PythonMemories(InPython))),
       lambda scene: scene.img.new_memory(creator=scene.creator, **SHAPE), check_started, "reserve commit")
    of("a cold slot of an image", "Image.new_memory PoolingCreator", pooled,
       lambda scene: scene.img.new_memory(creator=scene.creator, **SHAPE), check_started, "reserve commit image_map")
    for options in ({"max_unused_warm": 0}, {"max_unused_warm": 1}, {"reset": "discard"}):
        of(f"close of a slot of an image, {options}", "Memory.close", functools.partial(slot_of_image, **options),
           lambda scene: scene.mem.close(), holds(lambda scene, result: scene.mem.closed))
    of("a slot that was turned to an image", "Memory.close",
       lambda: Scene(img=Image.from_bytes(DATA, 3 * PAGE), creator=(pool := linmem.PoolingCreator()),
                     mem=pool.create(8 * PAGE, **SHAPE)),
       lambda scene: (scene.mem.restore(scene.img), scene.mem.close()),
       holds(lambda scene, result: scene.mem.closed))
    for other in ("the same", "another", "none"):
        of(f"restore, from {other}", "Memory.restore", restored_from(other), lambda scene: scene.mem.restore(scene.img),
           check_restored)
    of("grow a memory of an image in place", "Memory.grow_to", grown_image({**SHAPE, "minimum": 8 * PAGE}),
       lambda scene: scene.mem.grow_to(20 * PAGE), check_grown, "commit")
    of("grow a memory of an image past the capacity", "Memory.grow_to", grown_image(MOVING),
       lambda scene: scene.mem.grow_to(20 * PAGE), check_grown, "reserve commit")
    of("open", "Image.open", stored, lambda scene: Image.open(scene.path), check_image, "image_open")
    of("open and verify", "Image.open", stored, lambda scene: Image.open(scene.path, verify=True), check_image,
       "image_open")
    of("open without mapping", "Image.open", stored, lambda scene: Image.open(scene.path, map=False), check_image,
       filling)


# -- under wasmtime

GUEST = """(module
  (memory (export "memory") 1 8)
  (data (i32.const 16) "hello")
  (global (export "count") (mut i32) (i32.const 7))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
  (func (export "size") (result i32) (memory.size))
  (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "store") (param i32 i32) (i32.store8 (local.get 0) (local.get 1))))"""


def engine_of(creator, **settings):
    config = wasmtime.Config()
    config.wasm_threads = True
    for name, value in {**settings, "shared_memory": True}.items():
        getattr(wasmtime._ffi, f"wasmtime_config_{name}_set")(config.ptr(), value)
    linmem.wasmtime.install(config, creator, tune=False)
    return wasmtime.Engine(config)


def module_of(make=MMAP, **settings):
    creator = make()
    engine = engine_of(creator, **settings)
    return Scene(creator=creator, engine=engine, module=wasmtime.Module(engine, GUEST), others=[])


def instantiate(scene):
    store = wasmtime.Store(scene.engine)
    scene.others.append(store)
    return store, wasmtime.Instance(store, scene.module, []).exports(store)


def check_instance(scene, made):
    store, exports = made
    check_guest(store, exports)
    for one in scene.others:
        one.close()


def check_guest(store, exports):
    assert [exports["load"](store, at) for at in (15, 16, 20, 21, WASM_PAGE - 1)] == [0, *b"ho", 0, 0]
    assert exports["grow"](store, 2) == 1
    assert exports["load"](store, 3 * WASM_PAGE - 1) == 0
    assert traps(exports["load"], store, 3 * WASM_PAGE) or not faults_past_the_end(store, exports)


def faults_past_the_end(store, exports):
    """Not where Wine lets a program access pages of a section that are not committed."""
    kind = linmem.wasmtime.linear_memory(store, exports["memory"]).info().kind
    return kind != "shared" or NEEDS["shared_faults"][0]


def running(make=MMAP, prepared=False, grown=0, **settings):
    scene = module_of(make, **settings)
    scene.store = wasmtime.Store(scene.engine)
    if prepared:
        scene.prepared = linmem.wasmtime.prepare(scene.engine, GUEST)
        scene.instance = scene.prepared.instantiate(scene.store)
    else:
        scene.instance = wasmtime.Instance(scene.store, scene.module, [])
    scene.exports = scene.instance.exports(scene.store)
    scene.size, scene.load, scene.grow = (scene.exports[name] for name in ("size", "load", "grow"))
    scene.mem = linmem.wasmtime.linear_memory(scene.store, scene.exports["memory"])
    scene.grow(scene.store, grown)
    return scene


def guest_grows(scene):
    if scene.grow(scene.store, 3) == -1:
        raise MinusOne


def check_guest_has_grown(scene, result):
    assert scene.size(scene.store) == 4
    assert scene.load(scene.store, 16) == ord("h")
    assert scene.load(scene.store, 4 * WASM_PAGE - 1) == 0
    assert scene.mem[WASM_PAGE:] == bytes(3 * WASM_PAGE)
    assert traps(scene.load, scene.store, 4 * WASM_PAGE) or not faults_past_the_end(scene.store, scene.exports)


def traps(function, *arguments):
    try:
        function(*arguments)
    except (wasmtime.Trap, wasmtime.WasmtimeError):
        return True
    return False


def close_store(scene):
    store, scene.store = scene.store, None
    for name in ("instance", "exports", "size", "load", "grow"):
        delattr(scene, name)
    del scene.mem
    store.close()


def wasm_rows():
    error = wasmtime.WasmtimeError
    for name, (make, creation, _) in CREATORS.items():
        row(f"instantiate: {name}", "install", functools.partial(module_of, make), instantiate,
            check_instance, creation, error=error)
        row(f"memory.grow: {name}", "install", functools.partial(running, make), guest_grows,
            check_guest_has_grown, "-1", error=MinusOne)
        row(f"store.close: {name}", "install", functools.partial(running, make, grown=3), close_store,
            nothing)
    for name in ("mmap", "prefaulting", "limiting", "memories in Python"):
        make = CREATORS[name][0]
        row(f"memory.grow that moves: {name}", "install",
            functools.partial(running, make, memory_reservation=WASM_PAGE, memory_guard_size=65536), guest_grows,
            check_guest_has_grown, "-1", error=MinusOne)
    row("install and instantiate with the default", "install",
        lambda: Scene(others=[]),
        lambda scene: (setattr(scene, "engine", engine_of(None)),
                       setattr(scene, "module", wasmtime.Module(scene.engine, GUEST)), instantiate(scene))[-1],
        check_instance, "reserve commit", error=error)


def image_wasm_rows(kind):
    error = wasmtime.WasmtimeError

    def of(name, covers, *how, **more):
        row(f"{name} ({kind})", covers, *how, within=lambda: images_of(kind), again=kind != image_kinds()[0], **more)

    def preparable(make):
        creator = make()
        return Scene(creator=creator, engine=engine_of(creator), others=[], counts=False)

    def prepared(make):
        scene = preparable(make)
        scene.prepared = linmem.wasmtime.prepare(scene.engine, GUEST)
        scene.img = scene.prepared.images[0]
        return scene

    def instantiate_prepared(scene):
        store = wasmtime.Store(scene.engine)
        scene.others.append(store)
        return store, scene.prepared.instantiate(store).exports(store)

    def snapshot_of(scene):
        return linmem.wasmtime.Snapshot.take(scene.store, scene.instance)

    def check_snapshot(scene, snapshot):
        assert bytes(snapshot.memories["memory"]) == scene.mem[:]

    def spoilt(make):
        scene = running(make, True)
        scene.snapshot = snapshot_of(scene)
        scene.mem[16] = scene.mem[WASM_PAGE - 1] = 1
        scene.exports["count"].set_value(scene.store, 8)
        return scene

    def check_restored(scene, result):
        assert bytes(scene.snapshot.memories["memory"]) == scene.mem[:]
        assert scene.exports["count"].value(scene.store) == 7
        assert scene.load(scene.store, 16) == ord("h")

    def travelling(make):
        scene = prepared(make)
        store = wasmtime.Store(scene.engine)
        instance = scene.prepared.instantiate(store)
        exports = instance.exports(store)
        exports["grow"](store, 2)
        exports["store"](store, 3 * WASM_PAGE - 1, 9)
        exports["count"].set_value(store, 8)
        scene.snapshot = linmem.wasmtime.Snapshot.take(store, instance)
        store.close()
        return scene

    def start(scene):
        store = wasmtime.Store(scene.engine)
        scene.others.append(store)
        return store, scene.prepared.instantiate(store, start=scene.snapshot).exports(store)

    def check_started(scene, made):
        store, exports = made
        assert (exports["count"].value(store), exports["size"](store)) == (8, 3)
        assert [exports["load"](store, at) for at in (16, 21, 3 * WASM_PAGE - 1)] == [ord("h"), 0, 9]
        assert exports["grow"](store, 5) == 3
        assert exports["load"](store, 8 * WASM_PAGE - 1) == 0
        assert traps(exports["load"], store, 8 * WASM_PAGE)
        for one in scene.others:
            one.close()

    def session(scene):
        sessions = linmem.wasmtime.Sessions(scene.prepared, start=scene.snapshot, size=1)
        scene.others.append(sessions)
        with sessions.get() as (store, instance):
            assert instance.exports(store)["count"].value(store) == 8
        return sessions

    def check_session(scene, sessions):
        with sessions.get() as (store, instance):
            check_started(scene, (store, instance.exports(store)))      # also closes the sessions

    def new_memory(scene, shared=False):
        store = wasmtime.Store(scene.engine)
        scene.others.append(store)
        ty = wasmtime.MemoryType(wasmtime.Limits(1, 4), shared=shared)
        return store, linmem.wasmtime.new_memory(store, ty)

    def check_new_memory(scene, made):
        store, memory = made
        mem = linmem.wasmtime.linear_memory(store, memory)
        check_fresh(mem, WASM_PAGE)
        del mem, memory
        for one in scene.others:
            one.close()

    def check_prepared(scene, made):
        assert made.images == (None,) or not made.skipped
        assert made.images[0] or "there is no room for an image: " in made.skipped[0]

    for name in ("mmap", "a pool"):
        make = CREATORS[name][0]
        of(f"prepare: {name}", "prepare Prepared", functools.partial(preparable, make),
           lambda scene: linmem.wasmtime.prepare(scene.engine, GUEST),
           check_prepared, "reserve commit", error=error)
        of(f"prepare with a cache: {name}", "prepare", functools.partial(preparable, make),
           lambda scene: linmem.wasmtime.prepare(scene.engine, GUEST, cache=os.path.join(FOLDER.name, "cache")),
           check_prepared, "reserve commit", error=error)
        of(f"Prepared.instantiate: {name}", "Prepared.instantiate", functools.partial(prepared, make),
           instantiate_prepared, check_instance, "reserve commit image_map", error=error)
        of(f"Prepared.instantiate with start: {name}", "Prepared.instantiate", functools.partial(travelling, make),
           start, check_started, "reserve commit image_map", error=error)
        of(f"Sessions.get: {name}", "Sessions Sessions.get Sessions.close", functools.partial(travelling, make),
           session, check_session, "reserve commit image_map", error=error)
        of(f"Snapshot.take: {name}", "Snapshot.take", functools.partial(running, make, True), snapshot_of,
           check_snapshot, "image_begin image_write image_end")
        of(f"Snapshot.restore: {name}", "Snapshot.restore", functools.partial(spoilt, make),
           lambda scene: scene.snapshot.restore(scene.store), check_restored)
        if kind == image_kinds()[0]:
            for shared in (False, True):
                row(f"wasmtime.new_memory: {name}, {shared=}", "new_memory",
                    functools.partial(module_of, make), functools.partial(new_memory, shared=shared),
                    check_new_memory, "reserve commit", error=error)


def descriptor_rows():
    def a_file():
        path = os.path.join(FOLDER.name, "plain")
        with open(path, "wb") as file:
            file.write(bytes(PAGE) + DATA)
        return Scene(path=path)

    def from_fd(scene):
        fd = os.open(scene.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            return Image.from_fd(fd, len(DATA), 3 * PAGE, position=PAGE)
        finally:
            os.close(fd)

    def arrive(scene):
        handle = scene.img.handle()
        return handle._rebuild(Duplicate(scene.img.fileno()), *handle._parts_of(scene.img))

    def a_snapshot():
        img = Image.from_bytes(DATA, 3 * PAGE)
        states = MemoryState(0, 3 * PAGE + len(DATA), img), MemoryState(1, 9 * PAGE, img)
        state = State("ab" * 32, states, (), (), (((3 * PAGE, PAGE),), ()))
        scene = Scene(path=os.path.join(FOLDER.name, "snapshot"), kept=state)
        linmem.wasmtime.Snapshot._from_state(state).save(scene.path)
        return scene

    check = holds(lambda scene, img: (img.offset, bytes(img)) == (3 * PAGE, DATA))
    row("Snapshot.open", "StoredSnapshot.open", a_snapshot, lambda scene: linmem.wasmtime.Snapshot.open(scene.path),
        holds(lambda scene, snapshot: snapshot._travels() == scene.kept), "image_open image_fetch")
    row("from_fd", "Image.from_fd", a_file, from_fd, check, "image_open")
    if not HAS_KERNEL32:
        row("a handle that arrives", "Handle.__reduce__", lambda: Scene(img=Image.from_bytes(DATA, 3 * PAGE)), arrive,
            check, "image_open")


def mem_with_a_head():
    from linmem._files.npy_head import make_head

    raw = make_head(linmem.empty(0, "u1").dtype, ()).raw
    mem = linmem.create(len(raw), **SHAPE)
    mem.write(0, raw)
    return mem


def array_rows():
    def made(creator=MMAP):
        rows = linmem.GrowableArray("u1", maximum=32 * PAGE, creator=creator())
        rows.extend(b"a")
        rows.extend(b"b" * (rows.memory.byte_size() - 1))       # the next row needs a page call
        return Scene(rows=rows, mem=rows.memory, before=len(rows))

    def added(n):
        return holds(lambda scene, result: len(scene.rows) == scene.before + n)

    row("GrowableArray", "GrowableArray", Scene, lambda scene: linmem.GrowableArray("u1", maximum=32 * PAGE),
        holds(lambda scene, rows: len(rows) == 0), "reserve")
    row("empty", "empty", Scene, lambda scene: linmem.empty(3 * PAGE, "u1"),
        holds(lambda scene, array: array.tobytes() == bytes(3 * PAGE)),
        CREATORS["shared memories"][1] if NEEDS["shared"][0] else "reserve commit")
    row("append", "RowBuffer.append", made, lambda scene: scene.rows.append(7), added(1), "commit")
    # A copy is a new array that is extended.
    row("extend", "GrowableArray.extend GrowableArray.__copy__ GrowableArray.__deepcopy__", made,
        lambda scene: scene.rows.extend(b"c" * PAGE), added(PAGE), "commit")
    row("extend by an iterator", "GrowableArray.extend", made, lambda scene: scene.rows.extend(iter(b"c" * 20000)),
        added(20000), "reserve commit")
    row("resize", "RowBuffer.resize", made, lambda scene: scene.rows.resize(scene.before + PAGE), added(PAGE), "commit")
    row("close an array", "GrowableArray.close GrowableArray.__exit__", made, lambda scene: scene.rows.close(),
        holds(lambda scene, result: scene.rows.closed and scene.mem.closed))


if NEEDS["numpy"][0]:
    array_rows()
for kind in image_kinds():
    image_rows(kind)
    image_wasm_rows(kind)
descriptor_rows()
wasm_rows()


# -- the trials ---------------------------------------------------------------------------------------------

def call_refused(error, code):
    """The refused page call of an error, from the documented attributes or from wasmtime's text."""
    if isinstance(error, MinusOne):
        return "-1"
    if isinstance(error, linmem.PageError):
        assert isinstance(error, OSError)
        assert isinstance(error, MemoryError)
        assert os_code(error) == code
        assert error.size > 0
        text = error.strerror.removeprefix("creator 'maps': ")
        assert text.startswith(f"{error.call} of {error.size} bytes failed with code {code}")
        again = pickle.loads(pickle.dumps(error))
        assert (again.errno, os_code(again), again.call, again.size, str(again)) == \
            (error.errno, code, error.call, error.size, str(error))
        return error.call
    return re.search(rf"(\w+) of \d+ bytes failed with code {code}\b", str(error))[1]


def give_up(scene, *more):
    """Drops the scene and returns its creator, which then has no memory in use."""
    engine = hasattr(scene, "engine")
    creator = scene.close(*more)
    if engine and creator is None:
        gc.collect()        # the default pool is freed with the engine, and a trap leaves a reference cycle in wasmtime
    return creator


def state_of_a_twin(one):
    scene = one.make()
    state = scene.state()
    give_up(scene)
    return state


def attempt(one, nth, code, times, before=None):
    """Runs one scene with one refusal and checks its state against `before`. Returns whether a call failed, and the
    refused call that the error names."""
    scene = one.make()
    places = scene.places()
    result = refused = None
    with failing(nth, code, times) as injected:
        try:
            result = one.act(scene)
        except one.error as error:
            refused = call_refused(error, code)
            error.__traceback__ = None
    if refused is not None:
        assert scene.places() == places
        assert scene.state() == before
        result = one.act(scene)
    one.check(scene, result)
    creator = give_up(scene, result)
    del result, scene
    prove_idle(creator)
    return injected.happened, refused


def trial(one, code, times):
    """Refuses each page call in turn. Returns the calls that errors named, by number, and the number of faults."""
    told = {}
    with one.within():
        attempt(one, MOST_CALLS, code, 1)       # one-time work first: descriptors, imports
        before = state_of_a_twin(one)
        start = left_behind()
        for nth in range(1, MOST_CALLS):
            happened, refused = attempt(one, nth, code, times, before)
            found = left_behind()
            if found != start:
                gc.collect()        # earlier tests may have left cycles
                found = left_behind()
                start = tuple(map(min, start, found))
            assert found == start, f"left behind by refusal {nth}"
            if not happened:
                return told, nth - 1
            told[nth] = refused
    raise AssertionError("the operation makes ever more page calls")


@pytest.fixture(autouse=True, scope="module")
def garbage_of_earlier_tests_is_collected():
    gc.collect()


@pytest.fixture(autouse=True)
def only_the_operation_itself_makes_page_calls():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("one", [pytest.param(one, id=one.name) for one in ROWS])
def test_the_refusal_of_any_page_call_loses_no_state_and_leaks_no_resource(one):
    for way, (code, times) in WAYS.items():
        told, faults = trial(one, code, times)
        assert bool(faults) == one.calls, "a row is of an operation that makes a page call"
        assert {call for call in told.values() if call} <= one.refused, way
    assert bool(told.get(1)) == bool(one.refused)       # the last way, "for good", refuses every call


# -- partial work of the OS before a refusal ------------------------------------------------------------

# mprotect(2) changes one mapping after another. At a hole it stops, and the mappings before the hole stay changed.
CUT = f"""
import ctypes
import linmem
from support import LIBC, PAGE, accessible_parts
SHAPE = {SHAPE}

def cut(mem, page):
    assert LIBC.munmap(ctypes.c_void_p(mem.as_ptr() + page * PAGE), ctypes.c_size_t(PAGE)) == 0

def mend(mem, page):
    LIBC.mmap.restype = ctypes.c_void_p
    at = mem.as_ptr() + page * PAGE
    assert LIBC.mmap(ctypes.c_void_p(at), ctypes.c_size_t(PAGE), 0, 0x32, -1, ctypes.c_long(0)) == at

def parts(mem):
    return [(start // PAGE, end // PAGE, access) for start, end, access in accessible_parts(mem)]
"""


@requires("maps")
def test_a_protection_that_is_refused_half_way_is_undone_and_the_memory_counts_as_protected():
    assert answer(CUT + """
mem = linmem.create(8 * PAGE, maximum=64 * PAGE, reserve=8 * PAGE, may_move=True)
mem.write(0, b"kept")
cut(mem, 5)
try:
    mem.protect(0, 8 * PAGE, "r")
except linmem.PageError as error:
    assert error.call == "protect", error
else:
    raise AssertionError("a hole was protected")
mend(mem, 5)
assert parts(mem) == [(0, 5, "rw-p"), (6, 8, "rw-p")], parts(mem)
mem.write(0, b"more")
for call, refused in ((mem.snapshot, TypeError), (lambda: mem.grow_to(64 * PAGE), linmem.GrowError)):
    try:
        call()
    except refused as error:
        assert "protect" in str(error), error
    else:
        raise AssertionError("nobody knows how its pages are protected")
mem.protect(0, 8 * PAGE, "rw")
assert bytes(mem.snapshot()) == b"more" + bytes(8 * PAGE - 4)
mem.grow_to(64 * PAGE)
print("undone")
""") == "undone"


@requires("maps")
def test_a_growth_refused_half_way_leaves_no_accessible_page_behind_the_size():
    assert answer(CUT + """
pool = linmem.PoolingCreator(reset="zero")
with pool.create(2 * PAGE, **SHAPE) as mem:
    mem.grow_to(6 * PAGE)       # the range that a returned slot hides is a separate mapping
with pool.create(2 * PAGE, **SHAPE) as mem:
    cut(mem, 8)
    try:
        mem.grow_to(12 * PAGE)
    except linmem.PageError as error:
        assert error.call == "commit", error
    else:
        raise AssertionError("grown over a hole")
    mend(mem, 8)
    assert parts(mem) == [(0, 2, "rw-p")], parts(mem)
    mem.grow_to(12 * PAGE)
    assert parts(mem) == [(0, 12, "rw-p")], parts(mem)
    assert bytes(mem) == bytes(12 * PAGE)
print("hidden")
""") == "hidden"


@requires("maps", "scans")
def test_a_slot_that_cannot_be_hidden_is_not_touched_by_the_pool_below():
    assert answer(CUT + """
below = linmem.PoolingCreator(reset="zero")
above = linmem.PoolingCreator(below, reset="scan")
mem = above.create(3 * PAGE, **SHAPE)
mem.grow_to(12 * PAGE)
mem.write(0, b"x" * 12 * PAGE)
cut(mem, 11)
mem.close()
print([pool.stats()["rejected"] for pool in (above, below)])
""") == "[1, 1]"


def test_a_protection_whose_undoing_is_refused_too_keeps_the_memory_from_moving():
    with linmem.create(2 * PAGE, maximum=32 * PAGE, reserve=0, may_move=True) as mem:
        mem.write(0, b"kept")
        with failing(1, OUT_OF_MEMORY, 2), pytest.raises(linmem.PageError, match="protect"):
            mem.protect(0, PAGE, "r")
        with pytest.raises(linmem.GrowError, match="protection"):
            mem.grow_to(10 * PAGE)
        mem.protect(0, 2 * PAGE, "rw")
        mem.grow_to(10 * PAGE)
        assert mem.read(0, 4) == b"kept"


def test_a_growth_that_can_neither_be_prefaulted_nor_undone_succeeds():
    with MMAP(prefault=True).create(2 * PAGE, **SHAPE) as mem:
        with failing(2, OUT_OF_MEMORY, 3) as injected:      # the calls of prefault, decommit and protect
            mem.grow_to(5 * PAGE)
        assert injected.happened
        check_fresh(mem, 5 * PAGE)


# -- completeness ---------------------------------------------------------------------------------------

def quiet_scene():
    scene = running(prepared=True)
    img = Image.from_bytes(DATA, 3 * PAGE)
    mem = linmem.create(12 * PAGE, **SHAPE)
    path = os.path.join(FOLDER.name, "quiet")
    img.save(path)
    vars(scene).update(
        guest=scene.mem, mem=mem, img=img, delta=img.diff(mem), path=path, file=Image.open(path),
        pool=linmem.PoolingCreator(), limit=linmem.LimitingCreator(MMAP(), BUDGET),
        sums=linmem.StatisticsCreator(MMAP()), tracking=linmem.TrackingCreator(MMAP()), mmap=MMAP(),
        callback=linmem.CallbackCreator(MMAP()), routing=linmem.RoutingCreator([({}, MMAP())]),
        python=linmem.PythonCreator(MMAP()),
        snapshot=linmem.wasmtime.Snapshot.take(scene.store, scene.instance))
    if NEEDS["numpy"][0]:
        scene.rows = linmem.GrowableArray("u1", maximum=9)
        scene.rows.extend(b"abc")
        scene.headed = mem_with_a_head()
    scene.sessions = linmem.wasmtime.Sessions(scene.instance._linmem_prepared, start=scene.snapshot, size=1)
    scene.pool.create(3 * PAGE, **SHAPE).close()
    return scene


def refuses(error, call):
    """For a call that is refused before any page call."""
    def act(scene):
        with pytest.raises(error):
            call(scene)
    return act


def attributes(what, *names):
    where, cls = what.split()
    return {f"{cls}.{name}": lambda scene, name=name: getattr(getattr(scene, where), name) for name in names}


def use_block():
    with linmem.wasmtime.use(MMAP()):
        pass


LOCK = linmem.Lock(linmem.SharedCreator().create(8), 0) if NEEDS["shared"][0] else None

# The operations that make no page call, with any argument.
# -- memories of files

def new_path():
    with tempfile.NamedTemporaryFile(dir=FOLDER.name, delete=False) as file:
        return file.name


def of_file():
    mem = linmem.open_file(new_path(), minimum=3 * PAGE, maximum=32 * PAGE)
    mem.write(0, b"kept")
    return Scene(mem=mem)


def check_file(scene, mem):
    assert (len(mem), os.path.getsize(scene.path), bytes(mem)) == (3 * PAGE, 3 * PAGE, bytes(3 * PAGE))
    mem.close()


if NEEDS["file_memories"][0]:
    row("open_file", "open_file", lambda: Scene(path=new_path()),
        lambda scene: linmem.open_file(scene.path, minimum=3 * PAGE, maximum=32 * PAGE), check_file,
        "file_size file_adopt reserve file_map extend commit")
    row("grow a file", "Memory.grow_to", of_file, lambda scene: scene.mem.grow_to(20 * PAGE),
        holds(lambda scene, result: bytes(scene.mem) == b"kept" + bytes(20 * PAGE - 4)), "file_size extend commit")
    row("flush", "Memory.flush", of_file, lambda scene: scene.mem.flush(),
        holds(lambda scene, result: scene.mem[:4] == b"kept"), "file_size flush")

QUIET = {
    **({} if NEEDS["file_memories"][0] else {
        "open_file": refuses(TypeError, lambda scene: linmem.open_file(scene.path + " memory")),
        "Memory.flush": refuses(TypeError, lambda scene: scene.mem.flush())}),
    "FileCreator": lambda scene: linmem.FileCreator(scene.path),
    "FileCreator.path": lambda scene: linmem.FileCreator(scene.path).path,
    "FileCreator.__repr__": lambda scene: repr(linmem.FileCreator(scene.path)),
    "Sessions.stats": lambda scene: scene.sessions.stats(),
    "Sessions.__enter__": lambda scene: scene.sessions.__enter__(),
    "Sessions.__exit__": lambda scene: scene.sessions.__exit__(None, None, None),
    "Sessions.__repr__": lambda scene: repr(scene.sessions),
    "Sessions.__reduce__": refuses(TypeError, lambda scene: pickle.dumps(scene.sessions)),
    "describe": lambda scene: linmem.describe(),
    "Memory": refuses(TypeError, lambda scene: linmem.Memory()),
    "Memory.byte_size": lambda scene: scene.mem.byte_size(),
    "Memory.byte_capacity": lambda scene: scene.mem.byte_capacity(),
    "Memory.maximum_byte_size": lambda scene: scene.mem.maximum_byte_size(),
    "Memory.as_ptr": lambda scene: scene.mem.as_ptr(),
    "Memory.wasm_accessible": lambda scene: scene.mem.wasm_accessible(),
    "Memory.read": lambda scene: scene.mem.read(0, 9 * PAGE),
    "Memory.write": lambda scene: scene.mem.write(0, b"x" * 9 * PAGE),
    "Memory.view": lambda scene: (scene.mem.view("d"), scene.mem.view("<H", 1), memoryview(scene.mem)),
    "Memory.array": (lambda scene: scene.mem.array("M8[s]", 1)) if NEEDS["numpy"][0] else refuses(
        ImportError, lambda scene: scene.mem.array("u1")),
    "Memory.__dlpack__": (lambda scene: scene.mem.__dlpack__()) if NEEDS["numpy"][0] else refuses(
        ImportError, lambda scene: scene.mem.__dlpack__()),
    "Memory.__dlpack_device__": lambda scene: scene.mem.__dlpack_device__(),
    "Memory.__bool__": lambda scene: bool(scene.mem),
    "Memory.__contains__": lambda scene: (b"not there" in scene.mem, 255 in scene.mem),
    "Memory.__eq__": lambda scene: scene.mem == scene.guest,
    "Memory.__hash__": lambda scene: hash(scene.mem),
    "Memory.__enter__": lambda scene: scene.mem.__enter__(),
    "Memory.__len__": lambda scene: len(scene.mem),
    "Memory.__getitem__": lambda scene: (scene.mem[5], scene.mem[:], scene.mem[::2]),
    "Memory.__setitem__": lambda scene: (scene.mem.__setitem__(5, 1), scene.mem.__setitem__(slice(0, 2), b"ab")),
    "Memory.__delitem__": refuses(TypeError, lambda scene: scene.mem.__delitem__(0)),
    "Memory.__repr__": lambda scene: repr(scene.mem),
    "Memory.__reduce__": refuses(TypeError, lambda scene: pickle.dumps(scene.mem)),
    **attributes("mem Memory", "closed"),
    **{f"Memory.{name}": refuses(TypeError, lambda scene, call=call: call(scene.mem)) for name, call in (
        ("handle", lambda mem: mem.handle()), ("unlink", lambda mem: mem.unlink()),
        ("wait_for_growth", lambda mem: mem.wait_for_growth(1)))},
    "wait": refuses(TypeError, lambda scene: linmem.wait(scene.mem, 0, 0)),
    "wake": refuses(TypeError, lambda scene: linmem.wake(scene.mem, 0)),
    "Lock": refuses(TypeError, lambda scene: linmem.Lock(scene.mem, 0)),
    "Lock.acquire": lambda scene: LOCK and (LOCK.acquire(), LOCK.release()),
    "Lock.release": lambda scene: LOCK and (LOCK.acquire(), LOCK.release()),
    "Lock.__enter__": lambda scene: LOCK and LOCK.__enter__().release(),
    "Lock.__exit__": lambda scene: LOCK and LOCK.__enter__().__exit__(None, None, None),
    "Lock.__reduce__": lambda scene: LOCK and refuses(TypeError, lambda _: pickle.dumps(LOCK))(scene),
    "Lock.__del__": lambda scene: LOCK and linmem.Lock(LOCK._mem, 4),
    "SharedCreator": lambda scene: linmem.SharedCreator(shm_name="x"),
    "SharedCreator.shm_name": lambda scene: linmem.SharedCreator(shm_name="x").shm_name,
    "SharedCreator.__repr__": lambda scene: repr(linmem.SharedCreator()),
    **({} if NEEDS["shared"][0] else {"attach": refuses((TypeError, OSError), lambda scene: linmem.attach("x"))}),
    "Image": refuses(TypeError, lambda scene: Image()),
    "Image.__bool__": lambda scene: bool(scene.img),
    "Image.__len__": lambda scene: len(scene.img),
    "Image.__eq__": lambda scene: scene.img == scene.file,
    "Image.__hash__": lambda scene: hash(scene.img),
    "Image.__repr__": lambda scene: repr(scene.img),
    "Image.runs": lambda scene: (scene.img.runs(), scene.file.runs(), memoryview(scene.img)),
    "Image.fileno": lambda scene: scene.file.fileno(),
    "Image.info": lambda scene: scene.img.info(),
    "Image.save": lambda scene: [scene.img.save(f"{scene.path} {packed}", packed=packed) for packed in (True, False)],
    "Image.verify": lambda scene: scene.file.verify(),
    "Image.handle": lambda scene: scene.file.handle(),
    **attributes("img Image", "offset", "size", "digest"),
    "Handle": lambda scene: Handle(scene.img, None, None),
    "Delta": lambda scene: linmem.Delta(scene.img.digest, PAGE, PAGE, [(0, 1)], [], b"x"),
    "Delta.pieces": lambda scene: list(scene.delta.pieces()),
    "Delta.then": lambda scene: scene.delta.then(linmem.Delta("", scene.delta.size, scene.delta.size, [], [], b"")),
    "Delta.__or__": lambda scene: scene.delta | linmem.Delta("", scene.delta.size, scene.delta.size, [], [], b""),
    "Delta.save": lambda scene: scene.delta.save(scene.path + " delta"),
    "Delta.open": lambda scene: (scene.delta.save(scene.path + " delta"), linmem.Delta.open(scene.path + " delta")),
    "Delta.nbytes": lambda scene: scene.delta.nbytes,
    "Delta.__reduce_ex__": lambda scene: pickle.loads(pickle.dumps(scene.delta)),
    "Delta.__eq__": lambda scene: scene.delta == copy.copy(scene.delta),
    "Delta.__hash__": lambda scene: hash(scene.delta),
    "Delta.__repr__": lambda scene: repr(scene.delta),
    "Delta.__setattr__": refuses(AttributeError, lambda scene: setattr(scene.delta, "size", 1)),
    "Delta.__delattr__": refuses(AttributeError, lambda scene: delattr(scene.delta, "size")),
    "NativeCreator": refuses(TypeError, lambda scene: NativeCreator()),
    **attributes("pool NativeCreator", "name", "refusals"),
    "MmapCreator": lambda scene: MMAP(prefault=True, huge_pages=True),
    **attributes("mmap MmapCreator", "prefault", "huge_pages"),
    "LimitingCreator": lambda scene: linmem.LimitingCreator(scene.mmap, 0),
    **attributes("limit LimitingCreator", "limit_bytes", "used_bytes", "peak_bytes", "upstream"),
    "StatisticsCreator": lambda scene: linmem.StatisticsCreator(scene.mmap),
    "StatisticsCreator.statistics": lambda scene: scene.sums.statistics(),
    "StatisticsCreator.timeline": lambda scene: scene.sums.timeline(),
    **attributes("sums StatisticsCreator", "upstream"),
    "TrackingCreator": lambda scene: linmem.TrackingCreator(scene.mmap),
    "TrackingCreator.scope": lambda scene: scene.tracking.scope("tenant").__enter__(),
    "TrackingCreator.outstanding": lambda scene: scene.tracking.outstanding(),
    "TrackingCreator.leaks": lambda scene: scene.tracking.leaks(),
    "TrackingCreator.report": lambda scene: scene.tracking.report(),
    "TrackingCreator.scopes": lambda scene: scene.tracking.scopes(),
    "TrackingCreator.history": lambda scene: scene.tracking.history(),
    "TrackingCreator.overhead": lambda scene: scene.tracking.overhead(),
    **attributes("tracking TrackingCreator", "upstream", "frames"),
    "CallbackCreator": lambda scene: linmem.CallbackCreator(scene.mmap, on_made=print, limit_each=0),
    **attributes("callback CallbackCreator", "upstream", "on_made", "on_grow", "on_refused", "on_dropped",
                 "limit_each", "limit_growths"),
    "RoutingCreator": lambda scene: linmem.RoutingCreator([({"is_64": True}, scene.mmap), ({}, scene.limit)]),
    **attributes("routing RoutingCreator", "rule"),
    "PythonCreator": lambda scene: linmem.PythonCreator(scene.mmap),
    **attributes("python PythonCreator", "creator"),
    "PoolingCreator.stats": lambda scene: scene.pool.stats(),
    "set_pool_limits": lambda scene: linmem.set_pool_limits(),
    **attributes("pool PoolingCreator", "upstream", "image"),
    **{f"{cls}.__repr__": lambda scene, name=name: repr(getattr(scene, name)) for cls, name in (
        ("MmapCreator", "mmap"), ("LimitingCreator", "limit"), ("StatisticsCreator", "sums"),
        ("TrackingCreator", "tracking"), ("CallbackCreator", "callback"), ("RoutingCreator", "routing"),
        ("PythonCreator", "python"), ("PoolingCreator", "pool"), ("Prepared", "prepared"), ("Snapshot", "snapshot"))},
    **{f"{cls}.__reduce__": refuses(TypeError, lambda scene, name=name: pickle.dumps(getattr(scene, name)))
       for cls, name in (("NativeCreator", "pool"), ("Prepared", "prepared"))},
    "StoredSnapshot.save": lambda scene: scene.snapshot.save(scene.path + " snapshot"),
    "StoredSnapshot.handle": lambda scene: scene.snapshot.handle(),
    "StoredSnapshot": refuses(TypeError, lambda scene: StoredSnapshot()),
    "SnapshotHandle": lambda scene: SnapshotHandle(scene.snapshot),
    "StoredSnapshot.__reduce__": lambda scene: pickle.dumps(scene.snapshot),
    "SnapshotHandle.__reduce__": lambda scene: scene.snapshot.handle().__reduce__(),
    "Snapshot": refuses(TypeError, lambda scene: linmem.wasmtime.Snapshot()),
    "Snapshot.record": lambda scene: record_nothing(scene.snapshot),
    "use": lambda scene: linmem.wasmtime.use(MMAP()),
    **dict.fromkeys(("use.__enter__", "use.__exit__"), lambda scene: use_block()),
    "cause": lambda scene: linmem.wasmtime.cause(ValueError()),
    "patch": lambda scene: linmem.wasmtime.patch(MMAP()).undo(),
    "linear_memory": lambda scene: linmem.wasmtime.linear_memory(scene.store, scene.exports["memory"]),
    "memories": lambda scene: linmem.wasmtime.memories(scene.instance, scene.store),
    # Plain Python: the traits, and classes for results.
    "LinearMemory": lambda scene: InPython(scene.mem),
    "LinearMemory.maximum_byte_size": lambda scene: linmem.LinearMemory.maximum_byte_size(scene.mem),
    "LinearMemory.wasm_accessible": lambda scene: linmem.LinearMemory.wasm_accessible(scene.mem),
    "MemoryCreator": lambda scene: PythonMemories(None),
    "MemoryType": lambda scene: linmem.MemoryType(1, 2),
    "MemoryInfo": lambda scene: linmem.MemoryInfo(*range(14)),
    "Refusal": lambda scene: linmem.Refusal(*range(7)),
    "Refusals": lambda scene: linmem.Refusals(0, ()),
    "DroppedInfo": lambda scene: linmem.DroppedInfo(*range(5)),
    "ImageInfo": lambda scene: linmem.ImageInfo(*range(6)),
    "Allocation": lambda scene: linmem.Allocation(*range(7)),
    "ScopeTotals": lambda scene: linmem.ScopeTotals(*range(5)),
    **{f"SharedHandle{method}": lambda scene: linmem.SharedHandle(*[0] * 4, bytes(32)).__reduce__()
       for method in ("", ".__eq__", ".__hash__", ".__reduce__", ".__repr__", ".fileno", ".open")},
    "enable_fault_report": lambda scene: (linmem.enable_fault_report() if NEEDS["fault_reports"][0] else None,
                                          linmem.disable_fault_report()),
    "disable_fault_report": lambda scene: linmem.disable_fault_report(),
    "find": lambda scene: linmem.find(scene.mem.as_ptr()),
    "Place": lambda scene: linmem.Place(*range(3)),
}

if NEEDS["numpy"][0]:
    QUIET |= {
        "RowBuffer": refuses(TypeError, lambda scene: RowBuffer().append(1)),
        "RowBuffer.__len__": lambda scene: len(scene.rows),
        "GrowableArray.attach": lambda scene: linmem.GrowableArray.attach(scene.headed),
        "RowBuffer.clear": lambda scene: (scene.rows.clear(), scene.rows.extend(b"abc")),
        "RowBuffer.__reduce__": refuses(TypeError, lambda scene: pickle.dumps(RowBuffer())),
        "GrowableArray.__getitem__": lambda scene: scene.rows[:2],
        "GrowableArray.__setitem__": lambda scene: scene.rows.__setitem__(0, 1),
        "GrowableArray.__iter__": lambda scene: list(scene.rows),
        "GrowableArray.__array__": lambda scene: scene.rows.__array__("f8"),
        "GrowableArray.__dlpack__": lambda scene: scene.rows.__dlpack__(),
        "GrowableArray.__dlpack_device__": lambda scene: scene.rows.__dlpack_device__(),
        "GrowableArray.__repr__": lambda scene: repr(scene.rows),
        "GrowableArray.__enter__": lambda scene: scene.rows.__enter__(),
        "GrowableArray.__reduce__": lambda scene: pickle.dumps(scene.rows),
        **attributes("rows RowBuffer", "memory"),
        **attributes("rows GrowableArray", "array", "closed", "dtype", "maximum", "row_shape"),
    }

for cls, where in ((linmem.Memory, "mem"), (Image, "img")):
    for name in ("__buffer__", "__release_buffer__"):       # these exist from Python 3.12 on
        if name in vars(cls):
            QUIET[f"{cls.__name__}.{name}"] = lambda scene, where=where: memoryview(getattr(scene, where)).release()
if HAS_KERNEL32:        # multiprocessing does not pass descriptors on Windows
    QUIET["Handle.__reduce__"] = refuses(TypeError, lambda scene: scene.img.handle().__reduce__())

OF_PYTHON = {"__dict__", "__weakref__", "__new__", "__init__", "__setstate__", "__lt__", "__le__", "__ne__", "__gt__",
             "__ge__", "__reduce_cython__", "__setstate_cython__", "__annotate__", "__annotate_func__"}


def record_nothing(snapshot):
    # test_recording.py makes the page calls of instances in a block fail.
    with contextlib.suppress(OSError), snapshot.record():       # a system may not tell which pages are touched
        pass


def public_names():
    """The public names that can be called or are computed on access."""
    things = [getattr(room, name) for room in (linmem, linmem.wasmtime) for name in room.__all__]
    for thing in [*things, RowBuffer, Handle, StoredSnapshot, SnapshotHandle]:
        if not NEEDS["numpy"][0] and (thing is RowBuffer or thing is linmem.empty or thing is linmem.GrowableArray):
            continue
        if (inspect.ismodule(thing) or isinstance(thing, int)
                or (inspect.isclass(thing) and issubclass(thing, BaseException))):
            continue
        yield thing.__name__
        if not inspect.isclass(thing) or dataclasses.is_dataclass(thing):
            continue
        for name, value in vars(thing).items():
            hidden = name in OF_PYTHON or (name.startswith("_") and not name.endswith("__"))
            abstract = getattr(value, "__isabstractmethod__", False)
            if not hidden and not abstract and (callable(value) or inspect.isgetsetdescriptor(value) or isinstance(
                    value, (property, staticmethod, classmethod))):
                yield f"{thing.__name__}.{name}"


def test_every_public_name_is_in_a_row_or_makes_no_page_call():
    in_rows = {name for one in ROWS for name in one.covers.split()}
    assert in_rows & QUIET.keys() == set()
    assert sorted(public_names()) == sorted(in_rows | QUIET.keys())


def test_the_operations_without_page_calls_make_no_page_call():
    scene = quiet_scene()
    scene.mem.discard()
    with counting() as counted:
        scene.mem.discard()
    assert counted.calls == 1       # page calls are counted
    for name, act in QUIET.items():
        with counting() as counted:
            act(scene)
        assert counted.calls == 0, name
    with counting() as counted:
        mem = scene.pool.create(3 * PAGE, **SHAPE)      # a warm slot
        mem.grow_to(3 * PAGE)
    assert counted.calls == 0
    mem.close()
    scene.guest = None
    scene.close()
