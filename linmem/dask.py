"""linmem under Dask: an image crosses to each worker once, and each task works in a memory of its own. Floor 5.

>>> import linmem.dask
>>> linmem.dask.setup(client)                               # and on every worker, also those that come later
>>> client.amm.stop()                                       # which drops copies that no task waits for just now
>>> image = client.scatter(snapshot, broadcast=True)        # once to each worker
>>> def task(part, image):
...     with linmem.dask.memory(image) as mem:              # copy-on-write, from this worker's pool
...         ...
>>> collection.map_partitions(task, image)
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

try:
    import dask.sizeof
    import dask.tokenize
    import distributed
    import distributed.protocol
except ImportError as error:
    raise ImportError(f"linmem.dask needs Dask's distributed: pip install 'linmem[dask]' ({error})") from error

from linmem._core.memory import Image, Memory, NativeCreator
from linmem._files.delta import Delta
from linmem.creators import creator

__all__ = ["LinmemPlugin", "memory", "setup", "traffic", "worker_pool"]

_POOLS = 8                      # that a worker keeps; each holds the pages of its image

_lock = threading.Lock()
if hasattr(os, "register_at_fork"):     # a forked child would wait for a thread that it does not have
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_pools: OrderedDict[tuple[object, ...], NativeCreator] = OrderedDict()
_traffic = {"images_sent": 0, "images_received": 0, "deltas_sent": 0, "deltas_received": 0,
            "bytes_sent": 0, "bytes_received": 0}


# -- across the cluster ------------------------------------------------------------------------------

def _serialize(thing: Image | Delta) -> tuple[dict[str, Any], list[memoryview]]:
    buffers: list[pickle.PickleBuffer] = []
    # The frames are the thing's own pages; what pickle writes is where they belong.
    head = pickle.dumps(thing, protocol=5, buffer_callback=buffers.append)
    frames = [buffer.raw() for buffer in buffers]
    _count(thing, "sent", len(head) + sum(frame.nbytes for frame in frames))
    return {"head": head}, frames


def _deserialize(header: dict[str, Any], frames: list[Any]) -> Image | Delta:
    thing: Image | Delta = pickle.loads(header["head"], buffers=frames)
    _count(thing, "received", len(header["head"]) + sum(memoryview(frame).nbytes for frame in frames))
    return thing


def _count(thing: Image | Delta, way: str, size: int) -> None:
    with _lock:
        _traffic[f"{'images' if isinstance(thing, Image) else 'deltas'}_{way}"] += 1
        _traffic[f"bytes_{way}"] += size


def _register(dask: Any, protocol: Any) -> None:
    protocol.dask_serialize.register((Image, Delta), _serialize)
    protocol.dask_deserialize.register((Image, Delta), _deserialize)
    for kind, token, size in ((Image, _token_of_image, _size_of_image), (Delta, _token_of_delta, _size_of_delta)):
        dask.tokenize.normalize_token.register(kind, token)
        dask.sizeof.sizeof.register(kind, size)


def traffic() -> dict[str, int]:
    """What this process has serialised for others and got from them, since it imported this module.

    Returns
    -------
    dict
        ``images_sent``, ``images_received``, ``deltas_sent``, ``deltas_received``, ``bytes_sent``,
        ``bytes_received``. ``client.run(linmem.dask.traffic)`` asks every worker.
    """
    with _lock:
        return dict(_traffic)


def _token_of_image(image: Image) -> tuple[object, ...]:
    return "linmem.Image", image.digest


def _token_of_delta(delta: Delta) -> tuple[object, ...]:
    return ("linmem.Delta", delta.base, delta.base_size, delta.size, delta.offset, delta.ranges, delta.zeros,
            bytes(delta.data))


def _size_of_image(image: Image) -> int:
    # Zeros take no space: the scheduler weighs what an image costs to hold and to send.
    return sum(size for _, size in image.runs())


def _size_of_delta(delta: Delta) -> int:
    return delta.nbytes


_register(dask, distributed.protocol)


class LinmemPlugin(distributed.WorkerPlugin):
    """Imports linmem.dask in each worker, which registers the serialisers there."""

    # Known to the cluster by its name: registered again it is not registered twice.
    name = "linmem"

    def setup(self, worker: distributed.Worker) -> None:
        """Nothing is left to do: to unpickle the plugin was to import this module."""


def setup(client: distributed.Client) -> None:
    """Make images and deltas known to every worker of the client's cluster, also to those that come later.

    Without it a worker that has not imported this module cannot read what one that has sent to it.
    A cluster whose workers are started with ``--preload linmem.dask`` needs no setup.
    """
    if not isinstance(client, distributed.Client):
        raise TypeError(f"client must be a distributed.Client, got {type(client).__name__}")
    client.register_plugin(LinmemPlugin())


# -- within a worker -----------------------------------------------------------------------------------

def worker_pool(image: Image, **options: Any) -> NativeCreator:
    """This process's pool of memories that start from `image`: the same for every task that asks.

    It is not for `linmem.wasmtime.install`, which refuses a pool with an image.

    Parameters
    ----------
    image : Image
        Images with the same digest share a pool, however they came here.
    **options
        The pool's own, as of ``linmem.creator("pool", ...)``.

    Notes
    -----
    A process keeps the pools of the eight images that it used last; the others end with their last memory.
    """
    if not isinstance(image, Image):
        raise TypeError(f"image must be an Image, got {type(image).__name__}")
    key = (image.digest, *sorted(options.items()))
    try:
        hash(key)
    except Exception:       # no option is one that cannot be a key: whose it is, the pool says
        return creator("pool", image=image, **options)
    with _lock:
        pool = _pools.get(key)
        if pool is None:
            pool = _pools[key] = creator("pool", image=image, **options)
            if len(_pools) > _POOLS:
                _pools.popitem(last=False)
        _pools.move_to_end(key)
    return pool


@contextlib.contextmanager
def memory(image: Image, maximum: int | None = None, **options: Any) -> Iterator[Memory]:
    """A memory of the task's own that starts from `image`, from this worker's pool, given back at the end.

    Parameters
    ----------
    image : Image
    maximum : int, optional
        As of `linmem.create`.
    **options
        As of `worker_pool`.
    """
    pool = worker_pool(image, **options)
    with image.new_memory(maximum, creator=pool) as mem:
        yield mem
