"""WebAssembly guests, and the steps of a soak that use them."""

from __future__ import annotations

import linmem
from soak.checks import FLOOR, PAGE, PATIENCE, GuestError, Trap, Wrong, is_injected, must, same, wasmtime
from soak.creators import Maker

WASM_PAGE = 65536
MAX_WASM_PAGES = 8
DATA = ((1024, bytes(range(1, 255)) * 4), (40000, b"linmem" * 500))
GUEST = f"""(module
  (memory (export "memory") 1 {MAX_WASM_PAGES})
  (global $stores (export "stores") (mut i32) (i32.const 0))
  {" ".join(f'(data (i32.const {at}) "{"".join(f"{chr(92)}{byte:02x}" for byte in data)}")' for at, data in DATA)}
  (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
  (func (export "store") (param i32 i32)
    (i32.store8 (local.get 0) (local.get 1))
    (global.set $stores (i32.add (global.get $stores) (i32.const 1))))
  (func (export "fill") (param i32 i32 i32) (memory.fill (local.get 0) (local.get 1) (local.get 2)))
  (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0))))"""


def initial_bytes() -> bytearray:
    model = bytearray(WASM_PAGE)
    for at, data in DATA:
        model[at:at + len(data)] = data
    return model


class Host:
    """An engine whose memories come from one creator, and the module, plain and prepared."""

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        config = wasmtime.Config()
        linmem.wasmtime.install(config, maker.creator)
        self.engine = wasmtime.Engine(config)
        self.module = wasmtime.Module(self.engine, GUEST)
        self.prepared = linmem.wasmtime.prepare(self.engine, GUEST)


class Guest:
    """An instance in a store of its own."""

    def __init__(self, host: Host, from_image: bool) -> None:
        self.host = host
        self.store = wasmtime.Store(host.engine)
        self.instance = (host.prepared.instantiate(self.store) if from_image
                         else wasmtime.Instance(self.store, host.module, []))
        self.exports = self.instance.exports(self.store)
        self.mem = linmem.wasmtime.linear_memory(self.store, self.exports["memory"])
        self.model, self.stores = initial_bytes(), 0
        self.kept: tuple[object, bytes, int] | None = None

    def call(self, name: str, *arguments: int) -> int | None:
        return self.exports[name](self.store, *arguments)

    def check(self) -> None:
        same(self.mem, self.model, f"a guest's memory of {self.host.maker.name!r}")
        count = self.exports["stores"].value(self.store)
        must(count == self.stores, f"the global of a guest is {count}, must be {self.stores}")


class GuestSteps:
    """Steps of a `Worker`."""

    def guest(self) -> None:
        if len(self.guests) >= 3:
            self.guests.pop(0).check()
        host = self.rng.choice(self.soak.hosts)
        try:
            guest = Guest(host, self.rng.random() < 0.5)
        except GuestError as error:
            if is_injected(error):
                raise
            must(host.maker.bounded and ("limit of" in str(error) or "slots of the pool" in str(error)),
                 f"no guest in {host.maker.name!r}: {error}")
            self.counts["refused by a bound"] += 1
            return
        guest.check()
        self.guests.append(guest)

    def guest_run(self) -> None:
        if not self.guests:
            return
        rng, guest = self.rng, self.rng.choice(self.guests)
        size = len(guest.model)
        for _ in range(4):
            at = rng.randrange(size)
            must(guest.call("load", at) == guest.model[at], f"a guest loads another byte at {at}")
            byte = rng.randrange(256)
            guest.call("store", at, byte)
            guest.model[at] = byte
            guest.stores += 1
        at = rng.randrange(size)
        n, byte = rng.randrange(size - at + 1), rng.randrange(256)
        guest.call("fill", at, byte, n)
        guest.model[at:at + n] = bytes([byte]) * n
        data = rng.randbytes(rng.randrange(100))
        at = rng.randrange(size - len(data) + 1)
        guest.mem.write(at, data)
        guest.model[at:at + len(data)] = data
        guest.check()

    def guest_grow(self) -> None:
        if not self.guests:
            return
        guest = self.rng.choice(self.guests)
        by, before = self.rng.randrange(4), len(guest.model) // WASM_PAGE
        for _ in range(PATIENCE):
            got = guest.call("grow", by)
            if got != -1 or before + by > MAX_WASM_PAGES or guest.host.maker.bounded:
                break
            self.counts["fault survived"] += 1
        if got == -1:
            must(before + by > MAX_WASM_PAGES or guest.host.maker.bounded, f"a guest cannot grow by {by} pages")
        else:
            must(got == before, f"memory.grow returned {got}, must be {before}")
            guest.model.extend(bytes(by * WASM_PAGE))
        try:
            guest.mem.grow_to(len(guest.model) + WASM_PAGE)
        except linmem.OwnedError:
            pass
        else:
            raise Wrong("a guest's memory was grown from Python")
        guest.check()

    def guest_hostile(self) -> None:
        if not self.guests:
            return
        guest = self.rng.choice(self.guests)
        size = len(guest.model)
        at = self.rng.choice((size, size + 1, size + PAGE, 1 << 30, (1 << 31) - 1, -1, -(1 << 31), -size))
        calls = [lambda: guest.call("fill", size - 1, 7, 2)]
        # Wine lets a guest access the pages of a section that are not committed.
        if not (FLOOR["capabilities"]["names_files"] and guest.mem.info().kind == "shared"):
            calls += [lambda: guest.call("load", at), lambda: guest.call("store", at, 1)]
        for call in calls:
            try:
                call()
            except Trap:
                self.counts["trap"] += 1
            else:
                raise Wrong(f"a guest touched byte {at} of {size}")
        guest.check()

    def guest_snapshot(self) -> None:
        if not self.guests:
            return
        guest = self.rng.choice(self.guests)
        if guest.kept is None or self.rng.random() < 0.3:
            guest.kept = linmem.wasmtime.Snapshot.take(guest.store, guest.instance), bytes(guest.model), guest.stores
            return
        snapshot, frozen, stores = guest.kept
        grown = len(guest.model) - len(frozen)
        try:
            snapshot.restore(guest.store, zero_grown=self.rng.random() < 0.8)
        except ValueError:
            must(grown, "a snapshot cannot be restored in a guest that has not grown")
        else:
            guest.model[:] = frozen + bytes(grown)
            guest.stores = stores
        guest.check()

    def guest_end(self) -> None:
        """Drop store, memory, view, instance and snapshot in a random order."""
        if not self.guests:
            return
        guest = self.guests.pop(self.rng.randrange(len(self.guests)))
        view = memoryview(guest.mem)
        if self.rng.random() < 0.5:
            guest.store.close()
            same(view, guest.model, "a view after store.close()")
            view[0] = guest.model[0]
        parts = [view, *(vars(guest).pop(name) for name in ("store", "instance", "exports", "mem", "kept"))]
        del view
        self.rng.shuffle(parts)
        while parts:
            parts.pop()

    def guest_engine(self) -> None:
        """Close an engine before its guest."""
        host = Host(Maker("a private pool", linmem.PoolingCreator()))
        guest = Guest(host, True)
        host.engine.close()
        guest.check()
