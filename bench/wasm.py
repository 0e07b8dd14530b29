"""The suite "wasm": the cost of the memory of a wasm instance, from instantiation to drop."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from linmem.bench import engines
from linmem.bench.engines import CTYPES, DEFAULT, LINMEM_PLAIN, LINMEM_POOL, LINMEM_SCAN, POOLING, Engines
from linmem.bench.harness import P10, SPEED, Contender, Goal, Group, Result, together

ROUNDS = 25
RUN_NS, QUICK_RUN_NS = 4_000_000, 200_000
# A pool defers some work. A run must be so long that it contains the deferred work too.
USES, QUICK_USES = 64, 16
TABLE = "memory's part of instantiate + drop, native loop"
NATIVE = (LINMEM_POOL, LINMEM_SCAN, LINMEM_PLAIN, DEFAULT, *POOLING, CTYPES)
PYTHON = (LINMEM_POOL, DEFAULT, POOLING[0], CTYPES)


@dataclass(frozen=True)
class Module:
    key: str
    what: str
    source: Callable[[], str]
    default: float | None = None        # goal: at least so many times faster than wasmtime's default
    pooling: float | None = None        # goal against the best pooling setting
    ctypes: float | None = None
    python: float | None = None         # goal against wasmtime's default in the Python loop; counts all time
    prepared: bool = False              # True: the module is also measured with its data in an image


def text(memory: str, start: str, more: str = "") -> Callable[[], str]:
    """A module with a memory and a start function."""
    return lambda: f"""(module (memory (export "memory") {memory}) {more}
      (func $start (local $i i32) {start}) (start $start))"""


TOUCH = """(loop $again
  (i32.store8 (local.get $i) (i32.const 1))
  (local.set $i (i32.add (local.get $i) (i32.const 4096)))
  (br_if $again (i32.lt_u (local.get $i) (i32.const {end}))))"""

GROW = """(loop $again
  (if (i32.eq (memory.grow (i32.const 1)) (i32.const -1)) (then unreachable))
  {store}
  (local.set $i (i32.add (local.get $i) (i32.const 1)))
  (br_if $again (i32.lt_u (local.get $i) (i32.const 256))))"""

STORE = "(i32.store8 (i32.mul (i32.add (local.get $i) (i32.const 1)) (i32.const 65536)) (i32.const 1))"

# The pages are 4 MiB apart, and each is at another offset in its 4 MiB.
SCATTER = """(loop $again
  (i32.store8 (i32.add (i32.mul (local.get $i) (i32.const 4194304))
                       (i32.mul (i32.rem_u (i32.mul (local.get $i) (i32.const 389)) (i32.const 1024)) (i32.const 4096)))
              (i32.const 1))
  (local.set $i (i32.add (local.get $i) (i32.const 1)))
  (br_if $again (i32.lt_u (local.get $i) (i32.const 16))))"""

# Writes ten of the 1024 pages that the data fill.
DATA_TOUCH = """(loop $again
  (i32.store8 (i32.mul (local.get $i) (i32.const 417792)) (i32.const 1))
  (local.set $i (i32.add (local.get $i) (i32.const 1)))
  (br_if $again (i32.lt_u (local.get $i) (i32.const 10))))"""


@functools.cache
def four_mebibytes() -> str:
    data = "linmem! " * (4 * engines.MIB // 8)
    return text("64", DATA_TOUCH, f'(data (i32.const 0) "{data}")')()


def empty() -> str:
    return "(module)"


MODULES = (
    Module("tiny", "tiny: 2 pages, 64 bytes of data",
           text("2", "", f'(data (i32.const 1024) "{"linmem! " * 8}")'), 5, 0.95, ctypes=15, python=1.5),
    Module("touch", "touch: 1 MiB, every 4 KiB written", text("16", TOUCH.format(end=engines.MIB)), 8, 0.95, python=6),
    Module("fill", "fill: 1 MiB, memory.fill",
           text("16", f"(memory.fill (i32.const 0) (i32.const 171) (i32.const {engines.MIB}))"), 5, 0.95, python=5),
    Module("grow", "grow: 256 x memory.grow(1)", text("1", GROW.format(store="")), 0.95, 0.95, ctypes=10),
    Module("growtouch", "growtouch: the same, a store into each new page", text("1", GROW.format(store=STORE)),
           1.8, 1.7),
    Module("sparse", "sparse: 16 scattered pages of 64 MiB", text("1024", SCATTER), 2.5, 2),
    Module("data4m", "data4m: 4 MiB of data, 1 % touched", four_mebibytes, prepared=True),
)
MEAN_DEFAULT, MEAN_POOLING = 3.3, 1.3


def groups(quick: bool) -> list[Group]:
    """A group for each module in the native loop, then groups of some modules in the Python loop."""
    least = QUICK_USES if quick else USES
    return [in_c(module, least) for module in MODULES] + [
        from_python(module, least) for module in MODULES if module.python]


def in_c(module: Module, least: int) -> Group:
    best = tuple(setting.key for setting in POOLING)
    by_ctypes = (Goal("ctypes", module.ctypes, sense=SPEED, by=P10),) if module.ctypes else ()
    live = Engines()
    contenders = engines.native_contenders(live, NATIVE, module.source, empty)
    by_image = ()
    if module.prepared:
        image = Contender("image", f"{LINMEM_POOL.what}, data in an image",
                          engines.native(live, LINMEM_POOL, module.source, prepared=True),
                          less=f"{LINMEM_POOL.key}/empty")
        contenders = (contenders[0], image, *contenders[1:])
        by_image = (Goal("default", None, ours="image", sense=SPEED, by=P10),
                    Goal(best, None, ours="image", sense=SPEED, by=P10, called="best_pooling"))
    return Group(
        module.key, module.what, contenders,
        (Goal("default", module.default, sense=SPEED, by=P10),
         Goal(best, module.pooling, sense=SPEED, by=P10, called="best_pooling"),
         *by_ctypes, *by_image),
        least=least, alike=False, table=TABLE)


def from_python(module: Module, least: int) -> Group:
    live = Engines()
    return Group(
        f"python_{module.key}", f"from Python, {module.what}",
        tuple(Contender(s.key, s.what, engines.python(live, s, module.source)) for s in PYTHON),
        (Goal("default", module.python, sense=SPEED, by=P10), Goal("pooling", None, sense=SPEED, by=P10),
         Goal("ctypes", None, sense=SPEED, by=P10)),
        "Store, Instance and close with wasmtime-py; everything is counted", least=least, alike=False)


def conclude(results: list[Result]) -> list[Result]:
    """Add rows for the geometric means over the modules that have goals."""
    rows = {row.key: row for result in results for row in result.rows}
    judged = [module.key for module in MODULES if module.default is not None]
    what = "geometric mean of the modules with goals"
    means = [
        together("mean/default", what, [rows[f"{key}/default"] for key in judged], LINMEM_POOL.what, DEFAULT.what,
                 MEAN_DEFAULT),
        together("mean/best_pooling", what, [rows[f"{key}/best_pooling"] for key in judged], LINMEM_POOL.what,
                 "the best pooling setting for each module", MEAN_POOLING)]
    group = Group("mean", what, (), (), "native rows subtract the cost of a module without a memory on the same engine;"
                  " the best pooling setting is the fastest setting above in this run")
    at = sum(result.group.table == TABLE for result in results)
    return [*results[:at], Result(group, [], means), *results[at:]]
