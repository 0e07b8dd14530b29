"""linmem under Dask: an image or a snapshot is sent to each worker once, and each task has its own memory or instance.

>>> import linmem.dask
>>> linmem.dask.setup(client)                               # on every worker, also on those that start later
>>> client.amm.stop()                                       # it would drop copies that no task needs at the moment
>>> sent = client.scatter(image, broadcast=True)            # one transfer to each worker
>>> def task(part, image):
...     with linmem.dask.memory(image) as mem:              # copy-on-write, from this worker's pool
...         ...
>>> collection.map_partitions(task, sent)

Send a `linmem.wasmtime.Snapshot` to tasks that run WebAssembly. Each worker prepares the module itself:

>>> def task(part, snapshot):
...     store = wasmtime.Store(engine)
...     instance = prepared.instantiate(store, start=snapshot)      # copy-on-write, with the globals and tables
...     ...
"""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, SupportsIndex

try:
    import dask.sizeof
    import dask.tokenize
    import distributed
    import distributed.protocol
except ImportError as _error:
    raise ImportError(f"linmem.dask needs Dask's distributed: pip install 'linmem[dask]' ({_error})") from _error

from linmem._core.memory import Image, Memory, NativeCreator
from linmem._core.pool import PoolingCreator
from linmem._files.delta import Delta
from linmem._wasm.snapshot_file import StoredSnapshot, state_digest
from linmem.creators import creator

__all__ = ["LinmemPlugin", "memory", "setup", "traffic", "worker_pool"]

_MAX_POOLS = 8                  # in a worker; each pool keeps the pages of its image

_lock = threading.Lock()
if hasattr(os, "register_at_fork"):     # else a lock that another thread holds would stay locked in a forked child
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_pools: OrderedDict[tuple[object, ...], NativeCreator] = OrderedDict()
_KINDS = {Image: "images", Delta: "deltas", StoredSnapshot: "snapshots"}
_traffic = {f"{kind}_{way}": 0 for kind in (*_KINDS.values(), "bytes") for way in ("sent", "received")}


# -- across the cluster ------------------------------------------------------------------------------

def _serialize(thing: Image | Delta | StoredSnapshot) -> tuple[dict[str, Any], list[memoryview]]:
    buffers: list[pickle.PickleBuffer] = []
    # The frames contain the bytes of the object's pages. The pickle itself contains only their offsets and sizes.
    head = pickle.dumps(thing, protocol=5, buffer_callback=buffers.append)
    frames = [buffer.raw() for buffer in buffers]
    _count(thing, "sent", len(head) + sum(frame.nbytes for frame in frames))
    return {"head": head}, frames


def _deserialize(header: dict[str, Any], frames: list[Any]) -> Image | Delta | StoredSnapshot:
    thing: Image | Delta | StoredSnapshot = pickle.loads(header["head"], buffers=frames)
    _count(thing, "received", len(header["head"]) + sum(memoryview(frame).nbytes for frame in frames))
    return thing


def _count(thing: Image | Delta | StoredSnapshot, way: str, size: int) -> None:
    with _lock:
        _traffic[f"{next(_KINDS[kind] for kind in type(thing).__mro__ if kind in _KINDS)}_{way}"] += 1
        _traffic[f"bytes_{way}"] += size


def traffic() -> dict[str, int]:
    """The traffic of this process with other processes since it imported this module.

    Returns
    -------
    dict
        ``images_sent``, ``images_received``, ``deltas_sent``, ``deltas_received``, ``snapshots_sent``,
        ``snapshots_received``, ``bytes_sent``, ``bytes_received``. ``client.run(linmem.dask.traffic)`` asks every
        worker.
    """
    with _lock:
        return dict(_traffic)


def _token(snapshot: StoredSnapshot) -> object:
    try:
        return "linmem.Snapshot", state_digest(snapshot._travels())
    except ValueError:      # it cannot leave its store, and is refused when it is sent
        return _dask.tokenize.normalize_object(snapshot)


_dask: Any = dask
_protocol: Any = distributed.protocol
_protocol.dask_serialize.register(tuple(_KINDS), _serialize)
_protocol.dask_deserialize.register(tuple(_KINDS), _deserialize)
_dask.tokenize.normalize_token.register(Image, lambda image: ("linmem.Image", image.digest))
_dask.tokenize.normalize_token.register(Delta, lambda delta: (
    "linmem.Delta", delta.base, delta.base_size, delta.size, delta.offset, delta.ranges, delta.zeros,
    bytes(delta.data)))
_dask.tokenize.normalize_token.register(StoredSnapshot, _token)
# The scheduler compares the costs of storing and sending. The zeros of an image cost nothing.
_dask.sizeof.sizeof.register(Image, lambda image: sum(size for _, size in image.runs()))
_dask.sizeof.sizeof.register(StoredSnapshot, lambda snapshot: sum(
    size for image in {id(image): image for image in snapshot.memories.values()}.values() for _, size in image.runs()))
_dask.sizeof.sizeof.register(Delta, lambda delta: delta.nbytes)


class LinmemPlugin(distributed.WorkerPlugin):
    """Makes each worker import linmem.dask, which registers the serialisers there."""

    # The cluster identifies plugins by name, so a second registration has no effect.
    name = "linmem"

    def setup(self, worker: distributed.Worker) -> None:
        """Does nothing: the worker imported this module when it unpickled the plugin."""


def setup(client: distributed.Client) -> None:
    """Register the serialisers in every worker of the client's cluster, also in later ones.

    A worker that has not imported this module cannot read images, deltas and snapshots that another worker sends. A
    cluster whose workers are started with ``--preload linmem.dask`` needs no setup.
    """
    if not isinstance(client, distributed.Client):
        raise TypeError(f"client must be a distributed.Client, got {type(client).__name__}")
    client.register_plugin(LinmemPlugin())


# -- within a worker -----------------------------------------------------------------------------------

def worker_pool(image: Image, **options: Any) -> NativeCreator:
    """The pool of memories that start from `image`; every task of this process gets the same pool.

    Do not give the pool to `linmem.wasmtime.install`, which refuses a pool with an image.

    Parameters
    ----------
    image : Image
        Images with the same digest share a pool.
    **options
        The options of the pool, as for ``linmem.creator("pool", ...)``.

    Notes
    -----
    A process keeps the pools of the eight images that it used last. Another pool ends with its last memory.
    """
    if not isinstance(image, Image):
        raise TypeError(f"image must be an Image, got {type(image).__name__}")
    key = (image.digest, *sorted(options.items()))
    try:
        hash(key)
    except Exception:       # an option cannot be hashed, so it is not valid: the pool raises the exception
        return PoolingCreator(image=image, **options)
    with _lock:
        pool = _pools.get(key)
        if pool is None:
            pool = _pools[key] = creator("pool", image=image, **options)
            if len(_pools) > _MAX_POOLS:
                _pools.popitem(last=False)
        _pools.move_to_end(key)
    return pool


@contextlib.contextmanager
def memory(image: Image, maximum: SupportsIndex | None = None, **options: Any) -> Iterator[Memory]:
    """A memory for one task, which starts from `image` and goes back to the pool of this worker at the end.

    Parameters
    ----------
    image : Image
    maximum : int, optional
        As for `linmem.create`.
    **options
        As for `worker_pool`.
    """
    pool = worker_pool(image, **options)
    with image.new_memory(maximum, creator=pool) as mem:
        yield mem
