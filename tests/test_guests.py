"""Hostile guests: a module behaves in linmem's memories exactly as in wasmtime's own memories."""

import gc
import random
import tracemalloc
from collections import Counter
from dataclasses import dataclass

import pytest
import wasmtime
from hypothesis import example, given, note, settings
from hypothesis import strategies as st
from support import answer, fewer_examples, requires
from test_hoist import CUSTOM_PAGES, EVERYTHING, Prefilled, all_features, binary, contents, expose, judged

import linmem
import linmem.wasmtime
from linmem._wasm.outline import outline
from linmem._wasm.segments import hoist
from linmem.wasmtime import prepare

PAGE = 65536
MOST = 4 << 20          # bytes; growths stay below this size, which every machine can serve
NOWHERE = 2**48 - PAGE  # bytes; every machine refuses this size, and the tests ask for no size between MOST and NOWHERE
SHARED = hasattr(wasmtime.Config, "shared_memory")
RESERVATIONS = {
    "default": {},
    "none": {"memory_reservation": 0, "memory_guard_size": 0, "memory_reservation_for_growth": 0},
    "small": {"memory_reservation": 1 << 20, "memory_guard_size": PAGE, "memory_reservation_for_growth": PAGE},
}
# Addresses near which limits lie: ends of memories, of reservations and of guards, 32 and 64 bits.
BORDERS = [0, 2**16, 2**20, 2**20 + PAGE, 2**31, 2**32, 2**32 + 2**25, 2**33, 2**47, 2**63, 2**64]

LOADS = {"i32.load8_u": 1, "i32.load8_s": 1, "i32.load16_u": 2, "i32.load16_s": 2, "i32.load": 4, "i64.load8_s": 1,
         "i64.load16_u": 2, "i64.load32_u": 4, "i64.load32_s": 4, "i64.load": 8, "f32.load": 4, "f64.load": 8,
         "v128.load": 16, "v128.load8x8_s": 8, "v128.load16x4_u": 8, "v128.load32x2_s": 8, "v128.load8_splat": 1,
         "v128.load64_splat": 8, "v128.load32_zero": 4, "v128.load64_zero": 8}
STORES = {"i32.store8": 1, "i32.store16": 2, "i32.store": 4, "i64.store8": 1, "i64.store16": 2, "i64.store32": 4,
          "i64.store": 8, "f32.store": 4, "f64.store": 8, "v128.store": 16}
LANES = {"8": (1, 15), "16": (2, 7), "32": (4, 3), "64": (8, 1)}
ATOMICS = {"i32.atomic.load": 4, "i64.atomic.load": 8, "i32.atomic.load8_u": 1, "i64.atomic.load32_u": 4,
           "i32.atomic.store": 4, "i64.atomic.store": 8, "i64.atomic.store16": 2, "i32.atomic.rmw.add": 4,
           "i32.atomic.rmw8.or_u": 1, "i64.atomic.rmw.xchg": 8, "i64.atomic.rmw32.sub_u": 4,
           "i32.atomic.rmw.cmpxchg": 4, "i64.atomic.rmw.cmpxchg": 8, "i64.atomic.rmw16.cmpxchg_u": 2,
           "memory.atomic.wait32": 4, "memory.atomic.wait64": 8, "memory.atomic.notify": 4}


@dataclass(frozen=True)
class Kind:
    """A memory type, and its declaration in the module."""

    is_64: bool = False
    minimum: int = 1
    maximum: int | None = None
    page_size: int = PAGE
    is_shared: bool = False
    exported: bool = True
    imported: bool = False

    @property
    def wide(self):
        return "i64" if self.is_64 else "i32"

    @property
    def bound(self):
        """The largest size in bytes that the type allows."""
        return min(2**(64 if self.is_64 else 32), 2**64 if self.maximum is None else self.maximum * self.page_size)

    def text(self):
        words = ["i64"] * self.is_64 + [str(n) for n in (self.minimum, self.maximum) if n is not None]
        words += ["shared"] * self.is_shared
        return " ".join(words + [f"(pagesize {self.page_size})"] * (self.page_size != PAGE))

    def made(self, store, *, ours):
        """Makes a memory of this type on the host's side."""
        ty = wasmtime.MemoryType(wasmtime.Limits(self.minimum, self.maximum), is_64=self.is_64)
        return linmem.wasmtime.new_memory(store, ty) if ours else wasmtime.Memory(store, ty)


@dataclass(frozen=True)
class Border:
    """An address (or a size) near a limit: near the current end of memory number `memory`, or near a fixed address."""

    memory: int | None
    near: int

    def resolved(self, sizes):
        return self.near + (0 if self.memory is None else sizes[self.memory])


@dataclass
class Guest:
    """A module and its program: a list of calls (export, arguments)."""

    wat: str
    kinds: list
    calls: list


# -- making guests ---------------------------------------------------------------------------------


def raw(kind, name, index, offset, address="(local.get $a)"):
    """The code of one access of any width. A loaded value is an i64."""
    memarg = f"{index} offset={offset}"
    wide = name[:3]
    as_i64 = {"i32": "(i64.extend_i32_u {})", "i64": "{}", "f32": "(i64.extend_i32_u (i32.reinterpret_f32 {}))",
              "f64": "(i64.reinterpret_f64 {})"}
    of_i64 = {"i32": "(i32.wrap_i64 (local.get $x))", "i64": "(local.get $x)",
              "f32": "(f32.reinterpret_i32 (i32.wrap_i64 (local.get $x)))",
              "f64": "(f64.reinterpret_i64 (local.get $x))"}
    vector = "(i64x2.replace_lane 1 (i64x2.splat (local.get $x)) (i64.rotl (local.get $x) (i64.const 9)))"
    both = ("(i64.xor (i64x2.extract_lane 0 (local.get $v)) (i64.rotl (i64x2.extract_lane 1 (local.get $v))"
            " (i64.const 17)))")
    if name.startswith("memory.atomic.wait"):
        expected = "(local.get $x)" if name.endswith("64") else of_i64["i32"]
        return as_i64["i32"].format(f"({name} {memarg} {address} {expected} (i64.const 0))")
    if name == "memory.atomic.notify":
        return as_i64["i32"].format(f"({name} {memarg} {address} {of_i64['i32']})")
    if ".atomic." in name:
        if ".store" in name:
            return f"({name} {memarg} {address} {of_i64[wide]})"
        operands = 0 if ".load" in name else 2 if "cmpxchg" in name else 1
        return as_i64[wide].format(f"({name} {memarg} {address} {' '.join([of_i64[wide]] * operands)})")
    if "_lane" in name:
        bits = name.removeprefix("v128.load").removeprefix("v128.store").removesuffix("_lane")
        lane = LANES[bits][1]
        code = f"({name} {memarg} {lane} {address} {vector})"
        return code if "store" in name else f"(local.set $v {code}) {both}"
    if ".store" in name:
        return f"({name} {memarg} {address} {vector if wide == 'v12' else of_i64[wide]})"
    code = f"({name} {memarg} {address})"
    return f"(local.set $v {code}) {both}" if wide == "v12" else as_i64[wide].format(code)


def has_result(name):
    return ".store" not in name


def hashing(kind, index):
    """A function in the guest that reads every byte of a memory."""
    size = f"(memory.size {index})" if kind.is_64 else f"(i64.extend_i32_u (memory.size {index}))"
    at = "(local.get $at)" if kind.is_64 else "(i32.wrap_i64 (local.get $at))"

    def loop(step, load):
        return f"""(block (loop
            (br_if 1 (i64.gt_u (i64.add (local.get $at) (i64.const {step})) (local.get $end)))
            (local.set $h (i64.mul (i64.xor (i64.rotl (local.get $h) (i64.const 5)) ({load} {index} {at}))
                                   (i64.const 0x517cc1b727220a95)))
            (local.set $at (i64.add (local.get $at) (i64.const {step}))) (br 0)))"""

    return f"""(func (export "hash {index}") (result i64) (local $at i64) (local $end i64) (local $h i64)
        (local.set $end (i64.mul {size} (i64.const {kind.page_size})))
        {loop(8, "i64.load")} {loop(1, "i64.load8_u")} (local.get $h))"""


@st.composite
def kinds(draw):
    """Memory types of all kinds, of a few pages."""
    is_64 = draw(st.booleans())
    small = CUSTOM_PAGES and draw(st.integers(0, 3)) == 0
    page_size = 1 if small else PAGE
    is_shared = SHARED and draw(st.integers(0, 4)) == 0
    minimum = draw(st.sampled_from([0, 1, 7, 4095, 4096, 4097, PAGE, PAGE + 1] if small else
                                   [0, 0, 1, 1, 2, 3, 3 if is_shared else 17]))
    if is_shared:
        # A shared memory never moves, so its maximum must fit in the engine's reservation. wasmtime's own memories have
        # the same limit.
        maximum = draw(st.sampled_from([minimum, minimum + 1, minimum + 4, 16 * PAGE // page_size]))
    else:
        far = (2**32 if is_64 else 2**32 - 1) if small else (2**48 if is_64 else 2**16)
        maximum = draw(st.sampled_from([None, None, minimum, minimum + 1, minimum + 4, minimum + 40, far]))
    # Shared memories are never imported, because wasmtime-py cannot pass a shared memory.
    return Kind(is_64, minimum, maximum, page_size, is_shared,
                draw(st.integers(0, 3)) > 0, not small and not is_shared and draw(st.integers(0, 5)) == 0)


WORDS = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 0x80, 0xFFFFFFFF, 2**63, 2**64 - 1])


@st.composite
def guests(draw, most_calls=60):
    """A module with memories, data, and functions that access them, and a program for this module."""
    found = sorted((draw(kinds()) for _ in range(draw(st.sampled_from([1, 2, 3, 1, 2, 1, 2, 0])))),
                   key=lambda kind: not kind.imported)
    head, body, data, functions = [], [], [], {}
    for index, kind in enumerate(found):
        words = [f'(export "m{index}")'] * kind.exported + [f'(import "e" "m{index}")'] * kind.imported
        (head if kind.imported else body).append(f"(memory {' '.join(words)} {kind.text()})")
    widths = [*LOADS.items(), *STORES.items(),
              *((f"v128.{way}{bits}_lane", size) for way in ("load", "store") for bits, (size, _) in LANES.items())]

    def places(index, width, offset):
        """Addresses of accesses that end near a limit, with or without the static offset."""
        size = st.just(index) | st.none()
        return st.builds(Border, size, st.builds(
            lambda border, step, slack: border - step + slack, st.sampled_from([*BORDERS, 0, 0, 0, 0]),
            st.sampled_from([0, 1, width, width - 1, width + 1, offset, offset + width, offset + 1,
                             offset + width - 1]), st.sampled_from([0, 0, 0, 0, 1, -1, 5, -64])))

    segments = draw(st.integers(0, 4))
    for segment in range(segments):
        content = "".join(f"\\{byte:02x}" for byte in draw(st.binary(min_size=1, max_size=40) | st.just(b"")))
        if found and draw(st.integers(0, 3)):
            index = draw(st.integers(0, len(found) - 1))
            kind = found[index]
            end = kind.minimum * kind.page_size
            # Most segments are in bounds, because a program needs an instance.
            place = draw(st.sampled_from([0, 3, end - 40, end - 4096, 40, 100, 4095, end - 41] * 3 + [
                end - 1, end, end + 1, 2**32 - 1]) | st.integers(0, max(0, end - 40)))
            place = max(0, place) % 2**(64 if kind.is_64 else 32)
            data.append(f'(data (memory {index}) ({kind.wide}.const {place}) "{content}")')
        else:
            data.append(f'(data "{content}")')
        functions[f"drop {segment}"] = []
        body.append(f'(func (export "drop {segment}") (data.drop {segment}))')
    for index, kind in enumerate(found):
        grown = st.sampled_from([0, 1, 1, 2, 3, 5, 16, 4095, PAGE + 1, 2**31, 2**32 - 1, 2**32 - PAGE, 2**48 - 1, 2**48,
                                 2**48 + 1, 2**63, 2**64 - 1, 2**64 - PAGE])
        functions[f"size {index}"] = []
        functions[f"grow {index}"] = [(kind.is_64, grown)]
        body.append(f'(func (export "size {index}") (result {kind.wide}) (memory.size {index}))')
        body.append(f'(func (export "grow {index}") (param {kind.wide}) (result {kind.wide})'
                    f" (memory.grow {index} (local.get 0)))")
        body.append(hashing(kind, index))
        chosen = draw(st.lists(st.sampled_from(widths), min_size=1, max_size=5))
        if kind.is_shared or draw(st.booleans()):
            chosen += draw(st.lists(st.sampled_from(list(ATOMICS.items())), max_size=3 if SHARED else 0))
        for name, width in chosen:
            offset = draw(st.sampled_from([0, 0, 0, 1, 8, 4096, PAGE - 1, PAGE, 2**20, 2**31, 2**32 - 1,
                                           *([2**32, 2**47, 2**63, 2**64 - 1] if kind.is_64 else [])]))
            export = f"{name} {index} +{offset}"
            if export in functions:
                continue
            functions[export] = [(kind.is_64, places(index, width, offset)), (True, WORDS)]
            body.append(f'(func (export "{export}") (param $a {kind.wide}) (param $x i64)'
                        f' {"(result i64)" * has_result(name)} (local $v v128) {raw(kind, name, index, offset)})')
        lengths = st.builds(Border, st.none(), st.sampled_from([0, 0, 1, 2, 16, 4096, PAGE, 2**32 - 1, 2**64 - 1])) | (
            st.builds(Border, st.just(index), st.sampled_from([0, -1, 1, -16])))
        functions[f"fill {index}"] = [(kind.is_64, places(index, 16, 0)), (False, WORDS), (kind.is_64, lengths)]
        body.append(f'(func (export "fill {index}") (param $a {kind.wide}) (param $x i32) (param $n {kind.wide})'
                    f" (memory.fill {index} (local.get $a) (local.get $x) (local.get $n)))")
        source = draw(st.integers(0, len(found) - 1))
        both = kind.is_64 and found[source].is_64
        functions[f"copy {index} {source}"] = [(kind.is_64, places(index, 16, 0)),
                                               (found[source].is_64, places(source, 16, 0)), (both, lengths)]
        body.append(f'(func (export "copy {index} {source}") (param $a {kind.wide}) (param $b {found[source].wide})'
                    f" (param $n {'i64' if both else 'i32'})"
                    f" (memory.copy {index} {source} (local.get $a) (local.get $b) (local.get $n)))")
        if segments:
            segment = draw(st.integers(0, segments - 1))
            part = st.builds(Border, st.none(), st.sampled_from([0, 0, 1, 20, 39, 40, 41, 2**32 - 1]))
            functions[f"init {index} {segment}"] = [(kind.is_64, places(index, 40, 0)), (False, part), (False, part)]
            body.append(f'(func (export "init {index} {segment}") (param $a {kind.wide}) (param $b i32) (param $n i32)'
                        f" (memory.init {index} {segment} (local.get $a) (local.get $b) (local.get $n)))")
    calls = []
    if functions:
        often = [export for export in functions if export.startswith("grow")]
        for export in draw(st.lists(st.sampled_from(sorted(functions) + 2 * often), min_size=min(20, most_calls),
                                    max_size=most_calls)):
            calls.append((export, [(wide, draw(values)) for wide, values in functions[export]]))
    return Guest(f"(module {' '.join(head)}\n" + "\n".join(body) + "\n" + "\n".join(data) + ")", found, calls)


# -- running them ------------------------------------------------------------------------------------


def signed(value, bits):
    value %= 2**bits
    return value - 2**bits if value >= 2**(bits - 1) else value


def refusal(error):
    """The trap's code, or the fact that wasmtime refused."""
    if not isinstance(error, wasmtime.Trap):
        return ("refused",)
    try:
        return "trap", error.trap_code.name
    except ValueError as unknown:       # unknown to this wasmtime-py; the text has the code's number
        return "trap", str(unknown)


def outcome(call, *arguments):
    """The result of a call: a value, or the reason of a failure."""
    try:
        return call(*arguments)
    except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
        return refusal(error)


class Program:
    """The calls of a guest. The first run resolves every address and size, and all other runs use the same numbers."""

    def __init__(self, guest):
        self.guest = guest
        self.fixed = None

    def run(self, store, exports):
        seen, fixed = [], []
        for turn, (export, arguments) in enumerate(self.guest.calls):
            values = self.fixed[turn] if self.fixed is not None else self.resolved(store, exports, export, arguments)
            fixed.append(values)
            seen.append((export, values, outcome(exports[export], store, *values)))
        self.fixed = fixed
        return seen

    def resolved(self, store, exports, export, arguments):
        sizes = [exports[f"size {index}"](store) % 2**(64 if kind.is_64 else 32) * kind.page_size
                 for index, kind in enumerate(self.guest.kinds)]
        values = [value.resolved(sizes) if isinstance(value, Border) else value for _, value in arguments]
        what, _, which = export.partition(" ")
        if what == "grow":
            kind = self.guest.kinds[int(which)]
            pages = values[0] % 2**(64 if kind.is_64 else 32)
            size = sizes[int(which)] + pages * kind.page_size
            # Whether a size between the two bounds can be served depends on the machine, so the program avoids these
            # sizes.
            if MOST < size < NOWHERE and size <= kind.bound:
                values[0] = pages % 3
        return [signed(value, 64 if wide else 32) for value, (wide, _) in zip(values, arguments, strict=True)]


def observed(engine, make, program, *, ours):
    """The whole visible behaviour: the new instance, the program's results, and the final state."""
    store = wasmtime.Store(engine)
    try:
        imports = [kind.made(store, ours=ours) for kind in program.guest.kinds if kind.imported]
        try:
            instance = make(store, imports)
        except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
            seen = [refusal(error)]
        else:
            exports = instance.exports(store)
            seen = [list(exports)]
            seen += program.run(store, exports)
            for index in range(len(program.guest.kinds)):
                seen.append(("final", index, exports[f"size {index}"](store), exports[f"hash {index}"](store)))
            imports += [thing for thing in exports.values() if isinstance(thing, (wasmtime.Memory,
                                                                                 wasmtime.SharedMemory))]
        seen += [hash(contents(store, memory)) for memory in imports]
        return seen
    finally:
        store.close()


def engine_of(reservation, creator=None, *, tune=False, **more):
    """An engine whose memories come from `creator`. Without a creator the memories are wasmtime's own."""
    config = all_features()
    for name, value in {**RESERVATIONS[reservation], **more}.items():
        setattr(config, name, value)
    if creator is not None:
        linmem.wasmtime.install(config, creator, tune=tune)
    return wasmtime.Engine(config)


def pool(**options):
    return linmem.creator("pool", check=True, **options)


def ours():
    """Engines by reservation: each is (name, engine, the pool of its slots)."""
    found = {}
    for reservation in RESERVATIONS:
        slots, under_a_budget, few = pool(), pool(), pool(slots=1, max_unused_warm=1, keep_resident=PAGE)
        discarding = pool(reset="discard")
        makers = {
            "mmap": (linmem.creator(), None),
            "pool": (slots, slots),
            "limited pool": (linmem.creator("limiting", limit_bytes=1 << 40, upstream=under_a_budget), under_a_budget),
            "python": (Prefilled(), None),
        }
        if reservation == "default":
            makers["pool of one"] = few, few
            makers["statistics over a discarding pool"] = linmem.creator("statistics", upstream=discarding), discarding
            makers["prefaulted"] = linmem.creator("mmap", prefault=True, huge_pages=True), None
        found[reservation] = [(name, engine_of(reservation, creator, tune=reservation == "default"), kept)
                              for name, (creator, kept) in makers.items()]
    return found


class Compared:
    """Runs guests in wasmtime's own memories and in memories of every creator of linmem, and compares the results."""

    def __init__(self, engines=None):
        self.own = engine_of("default")
        self.engines = ours() if engines is None else engines
        self.done = Counter()

    def same(self, guest):
        wasm = binary(guest.wat)
        program = Program(guest)
        module = wasmtime.Module(self.own, wasm)
        expected = observed(self.own, lambda store, imports: wasmtime.Instance(store, module, imports), program,
                            ours=False)
        self.count(expected)
        for engines in self.engines.values():
            # Engines with the same settings share compiled code, like wasmtime's caches.
            compiled = wasmtime.Module(engines[0][1], wasm).serialize()
            for name, engine, _ in engines:
                note(name)
                plain = wasmtime.Module.deserialize(engine, compiled)
                assert observed(engine, lambda store, imports, plain=plain: wasmtime.Instance(store, plain, imports),
                                program, ours=True) == expected
                self.done["runs"] += 1
            for name, engine, _ in engines[1:2]:
                note(f"{name}, prepared")
                prepared = prepare(engine, wasm)
                for _ in range(2):
                    assert observed(engine, prepared.instantiate, program, ours=True) == expected
                    self.done["prepared runs"] += 1
                self.done["images"] += sum(image is not None for image in prepared.images)
        self.settled()

    def settled(self):
        """Checks that the closed stores gave their slots back, and that each reset zeroed every byte."""
        for engines in self.engines.values():
            for name, _, slots in engines:
                if slots is not None:
                    figures = slots.stats()
                    if figures["live"]:
                        gc.collect()        # the host holds a shared memory, too
                        figures = slots.stats()
                    assert (figures["live"], figures["rejected"]) == (0, 0), name

    def count(self, seen):
        self.done["modules"] += 1
        if seen[0] and seen[0][0] in ("trap", "refused"):
            self.done[f"instances {seen[0][0]}"] += 1
            return
        for entry in seen[1:]:
            if not isinstance(entry, tuple) or len(entry) != 3:
                continue
            export, values, result = entry
            self.done["operations"] += 1
            if isinstance(result, tuple) and result[0] == "trap":
                self.done[f"traps {result[1]}"] += 1
            elif export.startswith("grow "):
                self.done["growths refused" if result == -1 else "growths" if values[0] else "growths by nothing"] += 1
            else:
                self.done["of them in bounds"] += 1


# A guest that does for certain the things that other guests do by chance.
KNOWN = Guest(f"""(module (memory (export "m0") 1 4) (data (i32.const 65530) "known")
    (func (export "size 0") (result i32) (memory.size 0)) {hashing(Kind(), 0)}
    (func (export "grow 0") (param i32) (result i32) (memory.grow 0 (local.get 0)))
    (func (export "store 0") (param $a i32) (param $x i64) (i64.store offset=8 (local.get $a) (local.get $x))))""",
    [Kind(maximum=4)], [
        ("store 0", [(False, Border(0, -16)), (True, 2**64 - 2)]), ("store 0", [(False, Border(0, -15)), (True, 1)]),
        ("grow 0", [(False, 2)]), ("grow 0", [(False, 2**32 - 1)]), ("grow 0", [(False, 2)]),
        ("store 0", [(False, Border(0, -16)), (True, 1)]), ("store 0", [(False, Border(0, -8)), (True, 1)])])


def test_a_guest_behaves_the_same_in_linmems_memories_as_in_wasmtimes_own():
    compared = Compared()

    @settings(parent=fewer_examples(2))
    @given(guests())
    @example(KNOWN)
    def check(guest):
        note(guest.wat)
        compared.same(guest)

    check()
    print(dict(compared.done))
    # The comparison is meaningful only if all these events occurred.
    for what in ("prepared runs", "images", "growths", "growths refused", "of them in bounds",
                 "traps MEMORY_OUT_OF_BOUNDS"):
        assert compared.done[what], what


@requires("rlimits")
def test_guests_behave_the_same_in_a_short_address_space_with_a_tuned_engine():
    assert answer("""
        from test_guests import *
        limiting = linmem.creator("limiting", limit_bytes=1 << 33)
        compared = Compared({"default": [("mmap", engine_of("default", linmem.creator(), tune=True), None),
                                         ("limiting", engine_of("default", limiting, tune=True), None)]})
        store = wasmtime.Store(compared.engines["default"][0][1])
        memory = linmem.wasmtime.new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
        assert linmem.wasmtime.linear_memory(store, memory).info().reserved < 2**30, "it was not tuned"
        check = settings(max_examples=15, deadline=None, database=None)(given(guests())(compared.same))
        check()
        print("the same")
        """, limits={"RLIMIT_AS": 1 << 35}) == "the same"


# -- hostile bytes -----------------------------------------------------------------------------------

FUEL = 200_000          # the limit of instructions, for functions that mutation made endless
ROOM = 4 << 20          # bytes; the largest memory of a mutated module
NUMBERS = {"i32": 1, "i64": 2**33, "f32": 0.5, "f64": -1.5}


def mutated(wasm, chance):
    """The bytes, some of which are changed, removed or added."""
    bad = bytearray(wasm)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        place = chance.randrange(8, len(bad) + 1)
        put = chance.choice((b"", b"\0", b"\1", b"\x0b", b"\x41", b"\x7f", b"\x80", b"\xff", b"\xff\xff\xff\xff\x0f",
                             b"\x80\x80\x80\x80\x08", b"\xff" * 9 + b"\1", bytes([chance.randrange(256)])))
        bad[place:place + chance.choice((1, 1, 1, 0, 2, 3, len(put)))] = put
    return bytes(bad)


def can_be_exposed(wasm):
    try:
        expose(wasm)
    except ValueError:
        return False
    return True


def behaviour(engine, make):
    """The behaviour of a module of unknown content: its refusal, or its instance, function results and memories."""
    store = wasmtime.Store(engine)
    store.set_fuel(FUEL)
    store.set_limits(memory_size=ROOM, table_elements=1000)
    try:
        instance = make(store)
    except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
        store.close()
        return [refusal(error)]
    try:
        exports = instance.exports(store)
        seen = [list(exports)]
        for name, thing in exports.items():
            if isinstance(thing, wasmtime.Func):
                params = [str(kind) for kind in thing.type(store).params]
                if all(kind in NUMBERS for kind in params) and "v128" not in map(str, thing.type(store).results):
                    store.set_fuel(FUEL)
                    seen.append((name, repr(outcome(thing, store, *(NUMBERS[kind] for kind in params)))))
        seen += [hash(contents(store, thing)) for thing in exports.values()
                 if isinstance(thing, (wasmtime.Memory, wasmtime.SharedMemory))]
        return seen
    finally:
        store.close()


def test_mutated_modules_are_refused_by_prepare_or_behave_as_in_wasmtime():
    own = engine_of("default", consume_fuel=True)
    engines = [engine_of("default", pool(), consume_fuel=True), engine_of("none", linmem.creator(), consume_fuel=True)]
    done = Counter()

    def compare(wasm):
        judged(wasm)
        try:
            module = wasmtime.Module(own, wasm)
        except wasmtime.WasmtimeError:
            done["refused"] += 1
            for engine in engines:
                with pytest.raises(wasmtime.WasmtimeError):
                    prepare(engine, wasm)
            return
        done["valid"] += 1
        expected = behaviour(own, lambda store: wasmtime.Instance(store, module, []))
        done["instances"] += isinstance(expected[0], list)
        for engine in engines:
            for hidden in (False, True):
                prepared = prepare(engine, wasm, expose=hidden)
                assert not (prepared.added and not (hidden and can_be_exposed(wasm)))
                if not prepared.added:
                    assert behaviour(engine, prepared.instantiate) == expected

    @settings(parent=fewer_examples(5))
    @given(guests(most_calls=0) | st.none(), st.integers(0, 2**32))
    def check(guest, seed):
        wasm = binary(EVERYTHING if guest is None else guest.wat)
        chance = random.Random(seed)
        for _ in range(15):
            compare(mutated(wasm, chance))

    compare(binary(KNOWN.wat))
    compare(binary(KNOWN.wat)[:-1])
    check()
    print(dict(done))
    assert all(done[what] for what in ("refused", "valid", "instances"))


def test_a_wrong_length_costs_neither_memory_nor_time():
    wasm = binary(EVERYTHING)
    lies = [b"\xff\xff\xff\xff\x0f", b"\xff\xff\xff\xff\x07", b"\x80\x80\x80\x80\x01", b"\xff" * 9 + b"\1"]
    tracemalloc.start()
    try:
        for at in range(8, len(wasm)):
            for lie in lies:
                bad = wasm[:at] + lie + wasm[at + 1:]
                for reads in (hoist, expose, outline):
                    try:
                        reads(bad)
                    except ValueError:
                        pass
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("wat", [
    '(memory i64 0x100000000) (data (i64.const 0) "a") (data (i64.const 0xfffffff00000) "b")',
    '(memory i64 0x1000000000000) (data (i64.const 0) "a") (data (i64.const 0xfffffffffff00000) "b")',
    '(memory i64 0x1000000000000) (data (i64.const 0xffffffffffffffff) "a")',
    """(memory 1) (memory i64 0x800000000000) (data (i32.const 0) "a") (data (memory 1) (i64.const 0) "b")
       (data (memory 1) (i64.const 0x7fffffffffffff) "c")""",
], ids=["farther than addresses reach", "farther than an image can be", "at the last byte of all", "one of two"])
def test_data_that_no_image_can_hold_stays_in_the_module(wat):
    engine = engine_of("default", linmem.creator())
    prepared = prepare(engine, f"(module {wat})")
    assert set(prepared.images) == {None}
    assert "there is no room for an image" in prepared.skipped[0]
    with pytest.raises(wasmtime.WasmtimeError):     # wasmtime itself reports the missing memory
        prepared.instantiate(wasmtime.Store(engine))
