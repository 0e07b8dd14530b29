"""The suite "component": a component from instantiation to drop, with its data in an image and without data; and the
command `linmem run`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat

from linmem.bench.engines import DEFAULT, INSTALLED, MIB, Kept, Setting, prepare
from linmem.bench.harness import P10, Contender, Goal, Group, Run, Unavailable, clock
from linmem.bench.run_command import run_cached, run_prepared

ROUNDS = 25
RUN_NS, QUICK_RUN_NS = 4_000_000, 200_000
USES, QUICK_USES = 64, 16       # a pool defers some work; a run must be so long that it contains the deferred work
WITH_DATA, WITHOUT_DATA, INSTALL_ALONE = 0.65, 1.3, 0.8
TEXT = b"linmem! "


def groups(quick: bool) -> list[Group]:
    """A component with data, then one without, then whole processes."""
    least = QUICK_USES if quick else USES
    return [
        Group("component_data", "a component with 4 MiB of data: make, call, drop",
              (Contender("linmem", "data in an image", using(INSTALLED, prepared=True)),
               Contender("installed", "install alone", using(INSTALLED)),
               Contender("bare", "the same without data, in linmem", using(INSTALLED, data=False)),
               Contender("default", DEFAULT.what, using(DEFAULT))),
              (Goal("default", WITH_DATA, by=P10), Goal("bare", WITHOUT_DATA, by=P10),
               Goal("default", None, ours="installed", by=P10)),
              "Store, instance, one call and close with wasmtime-py; everything is counted", least=least, alike=False),
        Group("component_bare", "a component without data: make, call, drop",
              (Contender("linmem", "install alone", using(INSTALLED, data=False)),
               Contender("prepared", "prepared; the component has no data",
                         using(INSTALLED, prepared=True, data=False)),
               Contender("default", DEFAULT.what, using(DEFAULT, data=False))),
              (Goal("default", INSTALL_ALONE, by=P10), Goal("default", None, ours="prepared", by=P10)), least=least),
        run_cached(quick), run_prepared(quick)]


def source(*, data: bool) -> str:
    """A component of one core module with 65 wasm pages, and a function that reads a byte of the last TEXT."""
    text = f'(data (i32.const 0) "{TEXT.decode() * (4 * MIB // len(TEXT))}")' if data else ""
    return f"""(component
      (core module $m (memory 65) {text}
        (func (export "read") (result i32) (i32.load8_u (i32.const {4 * MIB - 2}))))
      (core instance $i (instantiate $m))
      (func (export "read") (result u32) (canon lift (core func $i "read"))))"""


def using(setting: Setting, *, prepared: bool = False, data: bool = True) -> Callable[[], Run]:
    def make() -> Run:
        try:
            from wasmtime import Store, component
        except ImportError as error:
            raise Unavailable(f"this wasmtime-py has no components: {error}") from error

        kept = Kept(setting)      # of its own, because a pool learns from what was in it
        linker = component.Linker(kept.engine)
        if prepared:
            made = prepare(kept.engine, source(data=data))
            compiled, instantiate = made.module, made.instantiate

            def instance_in(store):
                return instantiate(store, linker)
        else:
            compiled = component.Component(kept.engine, source(data=data))

            def instance_in(store):
                return linker.instantiate(store, compiled)

        read = compiled.get_export_index("read")

        def run(n: int) -> int:
            engine, found = kept.engine, 0
            began = clock()
            for _ in repeat(None, n):
                store = Store(engine)
                found += instance_in(store).get_func(store, read)(store)
                store.close()
            took = clock() - began
            if found != n * data * TEXT[-2]:
                raise RuntimeError("an instance has other data than its component")
            return took

        return run

    return make
