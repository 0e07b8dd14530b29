"""A web service that runs WebAssembly plugins of several tenants, and trusts none of them.

    pip install 'linmem[wasmtime,metrics]' starlette uvicorn
    python examples/plugin_service.py PLUGINS --port 8000 --workers 4
    curl --data-binary hello http://127.0.0.1:8000/ann/upper

PLUGINS is a folder with a folder for each tenant: PLUGINS/ann/upper.wat is the plugin "upper" of the tenant "ann". A
plugin is a module without imports that exports a memory and two functions, as text (.wat) or as a binary (.wasm):

    allocate(size: i32) -> i32              where the service writes the `size` bytes of the request
    run(at: i32, size: i32) -> i64          the answer: its offset in the upper 32 bits, its size in the lower 32 bits

Each request gets an instance in the same state: the state after `_initialize`, if the plugin exports this function.

    404     no such tenant or plugin            503     too many requests of this tenant are waiting
    413     the request is too large            504     the plugin ran longer than DEADLINE
    422     the plugin trapped                  507     the tenant's memories would exceed BUDGET
    502     the answer is too large, or does not lie in the memory

Worker number n also listens on port 8001 + n and has its metrics for Prometheus there, at /metrics. A proxy in front of
the service has to authenticate the tenants, and to bound how long a client may take to send a request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path

import prometheus_client
import uvicorn
import wasmtime
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import linmem
import linmem.metrics
import linmem.wasmtime

TICK = 0.01             # seconds from one epoch to the next
DEADLINE = 0.2          # seconds of a request in the plugin
MAX_REQUEST = MAX_ANSWER = 1 << 20      # bytes
MAX_CONNECTIONS = 200   # of a worker
# The bounds of one tenant in one worker:
BUDGET = 16 << 20       # bytes of all memories, also of those that wait for the next request
RUNNING = 2             # requests that run at the same time
WAITING = 32            # requests that wait

SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
REQUESTS = prometheus_client.Counter("plugin_requests", "Requests by status.", ["tenant", "plugin", "status"])
SECONDS = prometheus_client.Histogram("plugin_seconds", "Seconds from the request to the answer.", ["tenant", "plugin"])
EXPORTS = {"memory": "memory", "allocate": "i32 -> i32", "run": "i32 i32 -> i64"}      # of a plugin


class Refused(Exception):
    """The answer to a request that has no result: the status, and the reason."""


def described(kind: object) -> str:
    if isinstance(kind, wasmtime.FuncType):
        return " ".join([*map(str, kind.params), "->", *map(str, kind.results)])
    return "memory" if isinstance(kind, wasmtime.MemoryType) else "something else"


def new_engine() -> wasmtime.Engine:
    config = wasmtime.Config()
    config.epoch_interruption = True
    config.wasm_threads = False             # `memory.atomic.wait` sleeps in native code, and no deadline ends it there
    config.parallel_compilation = False     # the compiler's threads do not exist in forked workers
    linmem.wasmtime.install(config)
    return wasmtime.Engine(config)


@contextlib.contextmanager
def ticking(engine: wasmtime.Engine) -> Iterator[None]:
    """In the block, deadlines of the engine's stores pass."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(TICK):
            engine.increment_epoch()

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def new_store(engine: wasmtime.Engine) -> wasmtime.Store:
    store = wasmtime.Store(engine)
    store.set_limits(table_elements=100_000)        # tables are not in the budget of the memories
    return store


def begin(store: wasmtime.Store) -> None:
    store.set_epoch_deadline(round(DEADLINE / TICK))


class Tenant:
    """The plugins of a tenant. They share a budget and a pool, and no other tenant gets a page of this pool."""

    def __init__(self, name: str) -> None:
        self.name = name
        budget = linmem.LimitingCreator(linmem.creator("mmap"), BUDGET)
        self.pool = linmem.PoolingCreator(budget, slots=200)
        self.sessions: dict[str, linmem.wasmtime.Sessions] = {}
        self.threads: ThreadPoolExecutor
        self.accepted = 0       # requests that run or wait

    def load(self, path: Path, engine: wasmtime.Engine) -> None:
        """Compile and initialise a plugin. Needs `ticking`, because code of the plugin runs."""
        code = path.read_text() if path.suffix == ".wat" else path.read_bytes()
        prepared = linmem.wasmtime.prepare(engine, code, expose=True)
        exports = {each.name: described(each.type) for each in prepared.module.exports}
        for name, kind in EXPORTS.items():
            if exports.get(name) != kind:
                raise ValueError(f"the plugin must export {name} ({kind}), got {exports.get(name)}")
        store = new_store(engine)
        try:
            begin(store)
            instance = prepared.instantiate(store, creator=self.pool)
            if exports.get("_initialize") == "->":
                instance.exports(store)["_initialize"](store)
            snapshot = linmem.wasmtime.Snapshot.take(store, instance)
        finally:
            store.close()
        self.sessions[path.stem] = linmem.wasmtime.Sessions(
            prepared, start=snapshot, size=RUNNING, store=lambda: new_store(engine), begin=begin, creator=self.pool)

    def run(self, plugin: str, request: bytes) -> bytes:
        """The plugin's answer. Runs in a thread of the tenant, so a session is free."""
        try:
            with self.sessions[plugin].get(timeout=0) as (store, instance):
                exports = instance.exports(store)
                with linmem.wasmtime.linear_memory(store, exports["memory"]) as memory:
                    at = exports["allocate"](store, len(request))
                    if at % (1 << 32) + len(request) > memory.byte_size():
                        raise Refused(422, "allocate returned a place outside of the memory")
                    memory.write(at % (1 << 32), request)
                    place = exports["run"](store, at, len(request))
                    offset, size = divmod(place % (1 << 64), 1 << 32)
                    if size > MAX_ANSWER:
                        raise Refused(502, f"the answer has {size} bytes, may have {MAX_ANSWER}")
                    if offset + size > memory.byte_size():
                        raise Refused(502, "the answer does not lie in the memory")
                    return memory.read(offset, size)
        except (wasmtime.Trap, wasmtime.WasmtimeError) as error:
            if isinstance(linmem.wasmtime.cause(error), MemoryError):
                raise Refused(507, f"the memories of the tenant would exceed {BUDGET} bytes") from None
            code = getattr(error, "trap_code", None)
            if code == wasmtime.TrapCode.INTERRUPT:
                raise Refused(504, f"the plugin ran longer than {DEADLINE} s") from None
            # Not the text of the error: it has the names of the plugin's functions, and these may have a megabyte each.
            raise Refused(422, f"the plugin failed: {code.name if code else type(error).__name__}") from None


class Service:
    def __init__(self, folder: Path, port: int) -> None:
        self.engine = new_engine()
        self.port = port
        self.tenants = {path.name: Tenant(path.name) for path in sorted(folder.iterdir()) if path.is_dir()}
        with ticking(self.engine):
            for tenant in self.tenants.values():
                for path in sorted([*(folder / tenant.name).glob("*.wat"), *(folder / tenant.name).glob("*.wasm")]):
                    try:
                        tenant.load(path, self.engine)
                    except Exception as error:      # a plugin that cannot be loaded does not stop the others
                        logging.error("%s is not available: %.500r", path, str(error))
        pools = [tenant.pool for tenant in self.tenants.values()]
        prometheus_client.REGISTRY.register(linmem.metrics.collector(*pools, names=self.tenants, per_domain=False))
        self.app = Starlette(lifespan=self.lifespan, routes=[
            Route("/metrics", self.metrics), Route("/{tenant}/{plugin}", self.answer, methods=["POST"])])

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """What a worker has and its parent does not: threads. A process with threads must not fork."""
        parent = multiprocessing.parent_process()       # when it dies, the worker ends too
        assert parent is not None
        asyncio.get_running_loop().add_reader(parent.sentinel, os.kill, os.getpid(), signal.SIGTERM)
        with contextlib.ExitStack() as stack:       # ends in the reverse order: the ticks last
            stack.enter_context(ticking(self.engine))
            for tenant in self.tenants.values():
                for sessions in tenant.sessions.values():
                    stack.enter_context(sessions)
                tenant.threads = stack.enter_context(ThreadPoolExecutor(RUNNING))
            yield

    async def metrics(self, request: Request) -> Response:
        if request.scope["server"][1] == self.port:
            return Response("the metrics are on the port of each worker\n", 404)
        return Response(prometheus_client.generate_latest(), media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def answer(self, request: Request) -> Response:
        tenant, plugin = self.tenants.get(request.path_params["tenant"]), request.path_params["plugin"]
        if tenant is None or plugin not in tenant.sessions:
            return Response("no such plugin\n", 404)    # and no labels: a client could make any number of them
        status, start = 200, time.monotonic()
        try:
            content = await self.run(tenant, plugin, request)
        except Refused as refused:
            status, reason = refused.args
            content = f"{reason}\n".encode()
        REQUESTS.labels(tenant.name, plugin, status).inc()
        SECONDS.labels(tenant.name, plugin).observe(time.monotonic() - start)
        # A plugin must not choose the type: a browser would run its scripts.
        return Response(content, status, media_type="application/octet-stream" if status == 200 else "text/plain")

    async def run(self, tenant: Tenant, plugin: str, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_REQUEST:
                raise Refused(413, f"a request may have {MAX_REQUEST} bytes")
        if tenant.accepted >= RUNNING + WAITING:
            raise Refused(503, f"{WAITING} requests of this tenant are waiting")
        tenant.accepted += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(tenant.threads, tenant.run, plugin, bytes(body))
        finally:
            tenant.accepted -= 1


def work(service: Service, *sockets: socket.socket) -> None:
    """A worker. uvicorn answers the requests in progress, and then leaves the signal to these handlers."""
    for number in signal.SIGTERM, signal.SIGINT:
        signal.signal(number, lambda *_: sys.exit())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    config = uvicorn.Config(service.app, log_level="warning", limit_concurrency=MAX_CONNECTIONS,
                            timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(list(sockets))


def supervise(service: Service, shared: socket.socket, *own: socket.socket) -> None:
    """Keep one worker for each socket of `own` until SIGTERM or Ctrl-C."""
    def start(n: int) -> BaseProcess:
        worker = multiprocessing.get_context("fork").Process(target=work, args=(service, shared, own[n]))
        worker.start()
        return worker

    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)       # they are pending until sigwait() takes them
    signal.signal(signal.SIGCHLD, lambda *_: None)          # else the system may drop this signal
    workers = [start(n) for n in range(len(own))]
    try:
        print("listening on", *(f"http://127.0.0.1:{each.getsockname()[1]}" for each in (shared, *own)), flush=True)
        while signal.sigwait(SIGNALS) == signal.SIGCHLD:
            for n, worker in enumerate(workers):
                if not worker.is_alive():
                    logging.error("worker %d ended with status %d", n, worker.exitcode)
                    time.sleep(1)                           # a worker that ends at once must not keep the machine busy
                    workers[n] = start(n)
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(10)
            worker.kill()                                   # does nothing if the worker has ended


def main() -> None:
    """Compile and initialise once, then fork the workers: they share the code and the pages of the snapshots.

    ``uvicorn --workers`` starts its workers with the method "spawn", so each worker would compile every plugin itself.
    No guest may use WASI before the fork: wasmtime's threads for WASI do not exist in the workers.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("plugins", type=Path)
    parser.add_argument("--port", type=int, default=8000, help="0: any free ports")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        shared, *own = (stack.enter_context(
            socket.create_server(("127.0.0.1", options.port and options.port + n), backlog=1024))
            for n in range(1 + options.workers))
        supervise(Service(options.plugins, shared.getsockname()[1]), shared, *own)


if __name__ == "__main__":
    main()
