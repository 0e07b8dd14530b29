"""A wasm function over the partitions of a Dask collection, on a cluster of processes.

The module sieves primes into a table in its memory, which takes a while, and can then tell primes
from other numbers. Here the table is made once: a snapshot of the initialised memory goes to each
worker, once, and every task gets an instance whose memory starts from it, copy-on-write.

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
  (func $is_prime (param $n i32) (result i32) (i32.load8_u (local.get $n)))

  (func (export "init") (local $n i32) (local $m i32)
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
def compiled(creator: Any) -> tuple[wasmtime.Engine, wasmtime.Module]:
    """The module, compiled once for each process and pool, in an engine whose memories come from that pool."""
    config = wasmtime.Config()
    linmem.wasmtime.install(config, creator)
    engine = wasmtime.Engine(config)
    return engine, wasmtime.Module(engine, WAT)


def initialised() -> linmem.Image:
    """The memory of an instance that has made its table."""
    engine, module = compiled(linmem.creator("pool"))
    store = wasmtime.Store(engine)
    exports = wasmtime.Instance(store, module, []).exports(store)
    exports["init"](store)
    return linmem.wasmtime.linear_memory(store, exports["memory"]).snapshot()


def count_primes(numbers: Any, image: linmem.Image) -> Any:
    """The task: runs in a worker, on one partition."""
    import numpy

    engine, module = compiled(linmem.dask.worker_pool(image))
    store = wasmtime.Store(engine)
    exports = wasmtime.Instance(store, module, []).exports(store)
    memory = linmem.wasmtime.linear_memory(store, exports["memory"])
    memory.write(NUMBERS_AT, numpy.ascontiguousarray(numbers, "<u4"))
    found = numpy.array([exports["count"](store, NUMBERS_AT, len(numbers))])
    store.close()           # now, not when collected: its memory goes back to the pool
    return found


def run(client: Any, partitions: int = 16) -> tuple[int, linmem.Image]:
    """Count the primes below `BELOW` on the client's cluster; -> how many, and the image that was sent."""
    import dask.array

    linmem.dask.setup(client)
    image = initialised()
    # It drops copies that no task waits for, every two seconds; a worker with a later task would get its own again.
    client.amm.stop()
    # Directly: else it goes through the scheduler, which is once more over the network.
    everywhere = client.scatter(image, broadcast=True, direct=True)
    numbers = dask.array.arange(BELOW, chunks=BELOW // partitions, dtype="uint32")
    found = numbers.map_blocks(count_primes, everywhere, dtype="int64", chunks=(1,))
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
