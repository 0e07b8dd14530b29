"""Run a wasm function over the partitions of a Dask collection, on a cluster of processes.

The module computes a table of primes in its memory, which takes some time, and then uses the table to test
numbers. This program makes the table once and sends a snapshot of the initialised instance to each worker once.
Every task starts an instance from the snapshot: the memory shares the pages of the snapshot until it writes them,
and mutable globals and tables have the saved values.

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
NUMBERS_AT = 2 << 20        # offset in the wasm memory, after the table

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

    Threads that call this first at the same time may each make an engine. A module belongs to one engine, so a task
    calls this once.
    """
    pool = linmem.creator("pool")
    config = wasmtime.Config()
    linmem.wasmtime.install(config, pool)
    engine = wasmtime.Engine(config)
    return engine, linmem.wasmtime.prepare(engine, WAT, expose=True), pool


def initialised() -> linmem.wasmtime.Snapshot:
    """The state of an instance after `init`."""
    engine, module, _ = prepared()
    store = wasmtime.Store(engine)
    instance = module.instantiate(store)
    instance.exports(store)["init"](store)
    snapshot = linmem.wasmtime.Snapshot.take(store, instance)       # raises if the instance has state that stays here
    store.close()
    return snapshot


def count_primes(numbers: Any, snapshot: linmem.wasmtime.Snapshot) -> Any:
    """The task: counts the primes in one partition, in a worker."""
    import numpy

    engine, module, _ = prepared()
    store = wasmtime.Store(engine)
    exports = module.instantiate(store, start=snapshot).exports(store)     # shares the pages until a write
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    memory.write(NUMBERS_AT, numpy.ascontiguousarray(numbers, "<u4"))
    found = numpy.array([exports["count"](store, NUMBERS_AT, len(numbers))])
    store.close()           # gives the memory back to the pool now
    return found


def run(client: Any, partitions: int = 16) -> tuple[int, linmem.wasmtime.Snapshot]:
    """Count the primes below `BELOW` on the client's cluster. Returns the count and the snapshot."""
    import dask.array

    linmem.dask.setup(client)
    snapshot = initialised()
    # Dask's memory manager drops copies that no task waits for. A later task of the worker would need a new copy.
    client.amm.stop()
    # direct=True: the snapshot does not go through the scheduler, which would send it over the network twice.
    everywhere = client.scatter(snapshot, broadcast=True, direct=True)
    numbers = dask.array.arange(BELOW, chunks=BELOW // partitions, dtype="uint32")
    found = numbers.map_blocks(count_primes, everywhere, dtype="int64", chunks=(1,))
    return int(found.sum().compute(scheduler=client)), snapshot


def main() -> None:
    import distributed

    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        primes, snapshot = run(client)
        assert primes == PRIMES_BELOW, primes
        received = client.run(linmem.dask.traffic)
    image = snapshot.memories["memory"]
    print(f"{primes} primes below {BELOW}")
    print(f"the image has {image.size >> 20} MiB, of which {(image.info().stored or 0) >> 10} KiB are not zero")
    for worker, figures in received.items():
        print(f"{worker} got it {figures['snapshots_received']} time(s), {figures['bytes_received'] >> 10} KiB")


if __name__ == "__main__":
    main()
