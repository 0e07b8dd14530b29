"""A wasm function over the partitions of a Dask collection, on a cluster of processes.

The module sieves primes into a table in its memory, which takes a while, and can then tell primes
from other numbers. Here the table is made once: an image of the initialised memory goes to each
worker, once. Every task makes an instance and restores its memory to the image, copy-on-write, and its
mutable globals to their values (a compiled program has some: its stack pointer, at least).

    pip install 'linmem[dask,wasmtime]' 'dask[array]'
    python examples/dask_wasm.py
"""

from __future__ import annotations

import functools
from typing import Any

import wasmtime

import linmem
import linmem.dask
import linmem.wasmtime

BELOW = 1 << 20
PRIMES_BELOW = 82025
NUMBERS_AT = 2 << 20        # in the wasm memory, behind the table

WAT = f"""
(module
  (memory (export "memory") 1024)                   ;; 64 MiB, of which the table is 1 MiB
  (data (i32.const 0) "\\01\\01")                    ;; init overwrites it, as programs do with their data
  (global $below (mut i32) (i32.const 0))           ;; hidden, like a compiled program's stack pointer
  (func $is_prime (param $n i32) (result i32)
    (if (i32.ge_u (local.get $n) (global.get $below)) (then unreachable))
    (i32.load8_u (local.get $n)))

  (func (export "init") (local $n i32) (local $m i32)
    (global.set $below (i32.const {BELOW}))
    (i32.store16 (i32.const 0) (i32.const 0))
    (memory.fill (i32.const 2) (i32.const 1) (i32.const {BELOW - 2}))
    (local.set $n (i32.const 2))
    (loop $next
      (if (call $is_prime (local.get $n)) (then
        (local.set $m (i32.mul (local.get $n) (local.get $n)))
        (block $done (loop $strike
          (br_if $done (i32.ge_u (local.get $m) (i32.const {BELOW})))
          (i32.store8 (local.get $m) (i32.const 0))
          (local.set $m (i32.add (local.get $m) (local.get $n)))
          (br $strike)))))
      (local.set $n (i32.add (local.get $n) (i32.const 1)))
      (br_if $next (i32.lt_u (local.get $n) (i32.const 1024)))))

  ;; How many of the $count numbers of 32 bits at $at are prime.
  (func (export "count") (param $at i32) (param $count i32) (result i32) (local $found i32)
    (block $done (loop $next
      (br_if $done (i32.eqz (local.get $count)))
      (local.set $found (i32.add (local.get $found) (call $is_prime (i32.load (local.get $at)))))
      (local.set $at (i32.add (local.get $at) (i32.const 4)))
      (local.set $count (i32.sub (local.get $count) (i32.const 1)))
      (br $next)))
    (local.get $found)))
"""


@functools.cache
def prepared() -> tuple[wasmtime.Engine, linmem.wasmtime.Prepared, Any]:
    """The engine of this process, its compiled module, and the pool of its memories.

    If two threads make the first calls at the same time, each of them may make an engine. A module belongs to one
    engine, so a task calls this function once.
    """
    pool = linmem.creator("pool")
    config = wasmtime.Config()
    linmem.wasmtime.install(config, pool)
    engine = wasmtime.Engine(config)
    return engine, linmem.wasmtime.prepare(engine, WAT, expose=True), pool


def initialised() -> tuple[linmem.Image, dict[str, int | float]]:
    """What an instance holds that has made its table: its memory, and its mutable globals."""
    engine, module, _ = prepared()
    store = wasmtime.Store(engine)
    instance = module.instantiate(store)
    exports = instance.exports(store)
    exports["init"](store)
    snapshot = linmem.wasmtime.Snapshot.take(store, instance)       # refuses an instance whose state it cannot hold
    if snapshot.tables or snapshot.unseen:
        raise ValueError(f"this recipe does not send {[*snapshot.tables, *snapshot.unseen]}")
    return snapshot.memories["memory"], {name: exports[name].value(store) for name in snapshot.globals}


def started(store: wasmtime.Store, module: linmem.wasmtime.Prepared, image: linmem.Image,
            globals: dict[str, int | float]) -> Any:
    """Make a new instance, restore the initialised state, and return the exports of the instance."""
    exports = module.instantiate(store).exports(store)
    memory = exports["memory"]
    grown = image.offset + image.size - memory.data_len(store)
    if grown > 0:
        memory.grow(store, grown // 65536)
    linmem.wasmtime.linear_memory(store, memory).restore(image)     # shares the image's pages until they are written
    for name, value in globals.items():
        exports[name].set_value(store, value)
    return exports


def count_primes(numbers: Any, image: linmem.Image, globals: dict[str, int | float]) -> Any:
    """The task: runs in a worker, on one partition."""
    import numpy

    engine, module, _ = prepared()
    store = wasmtime.Store(engine)
    exports = started(store, module, image, globals)
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    memory.write(NUMBERS_AT, numpy.ascontiguousarray(numbers, "<u4"))
    found = numpy.array([exports["count"](store, NUMBERS_AT, len(numbers))])
    store.close()           # now, not when collected: its memory goes back to the pool
    return found


def run(client: Any, partitions: int = 16) -> tuple[int, linmem.Image]:
    """Count the primes below `BELOW` on the client's cluster; -> how many, and the image that was sent."""
    import dask.array

    linmem.dask.setup(client)
    image, globals = initialised()
    # It drops copies that no task waits for, every two seconds; a worker with a later task would get its own again.
    client.amm.stop()
    # Directly: else it goes through the scheduler, which is once more over the network.
    everywhere = client.scatter(image, broadcast=True, direct=True)
    numbers = dask.array.arange(BELOW, chunks=BELOW // partitions, dtype="uint32")
    found = numbers.map_blocks(count_primes, everywhere, globals, dtype="int64", chunks=(1,))
    return int(found.sum().compute(scheduler=client)), image


def main() -> None:
    import distributed

    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        primes, image = run(client)
        assert primes == PRIMES_BELOW, primes
        received = client.run(linmem.dask.traffic)
    print(f"{primes} primes below {BELOW}")
    print(f"the image has {image.size >> 20} MiB, of which {image.info().stored >> 10} KiB are not zero")
    for worker, figures in received.items():
        print(f"{worker} got it {figures['images_received']} time(s), {figures['bytes_received'] >> 10} KiB")


if __name__ == "__main__":
    main()
