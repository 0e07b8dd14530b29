"""examples/plugin_service.py with good and hostile plugins: what clients get, and what the workers keep."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from support import ROOT, file_requires

file_requires("service", "fork", "maps", "descriptors", "sources")
httpx = pytest.importorskip("httpx")

MEMORY = '(memory (export "memory") 1)'
ALLOCATE = '(func (export "allocate") (param $size i32) (result i32) (i32.const 2048))'


def plugin(code, answer="(i64.const 0)", parts="", memory=MEMORY):
    """A plugin that runs the code and returns the answer: the offset << 32 | the size."""
    return f"""(module {memory} {ALLOCATE} {parts}
        (func (export "run") (param $at i32) (param $size i32) (result i64) (local $i i32) {code} {answer}))"""


def grow(pages, otherwise):
    return f"(if (i32.eq (memory.grow (i32.const {pages})) (i32.const -1)) (then {otherwise}))"


SUM = plugin("""
    (local.set $size (i32.add (local.get $at) (local.get $size)))
    (local.set $i (i32.const -1))
    (block $done (loop $next
      (br_if $done (i32.eq (local.get $at) (local.get $size)))
      (local.set $i (i32.xor (i32.shr_u (local.get $i) (i32.const 8)) (i32.load (i32.shl
        (i32.and (i32.xor (local.get $i) (i32.load8_u (local.get $at))) (i32.const 255)) (i32.const 2)))))
      (local.set $at (i32.add (local.get $at) (i32.const 1)))
      (br $next)))
    (i32.store (i32.const 1024) (i32.xor (local.get $i) (i32.const -1)))""", f"(i64.const {1024 << 32 | 4})", """
    (func (export "_initialize") (local $n i32) (local $bit i32) (local $entry i32)     ;; the table of CRC-32
      (loop $next
        (local.set $entry (local.get $n))
        (local.set $bit (i32.const 8))
        (loop $shift
          (local.set $entry (i32.xor (i32.shr_u (local.get $entry) (i32.const 1))
            (i32.and (i32.const 0xedb88320) (i32.sub (i32.const 0) (i32.and (local.get $entry) (i32.const 1))))))
          (br_if $shift (local.tee $bit (i32.sub (local.get $bit) (i32.const 1)))))
        (i32.store (i32.shl (local.get $n) (i32.const 2)) (local.get $entry))
        (br_if $next (i32.lt_u (local.tee $n (i32.add (local.get $n) (i32.const 1))) (i32.const 256)))))""")
# The answer is what lies where every request leaves its own bytes: zeros, unless the plugin sees an earlier request.
TRACES = plugin("(memory.copy (i32.const 40000) (i32.const 50000) (local.get $size))"
                "(memory.copy (i32.const 50000) (local.get $at) (local.get $size))",
                "(i64.or (i64.const 171798691840000) (i64.extend_i32_u (local.get $size)))")
GROWS = plugin(grow(16, "unreachable") + "(memory.fill (i32.const 65536) (i32.const 7) (i32.const 1048576))",
               f"(i64.const {(17 << 16) - 3 << 32 | 3})")

GOOD = {"sum": (SUM, lambda body: zlib.crc32(body).to_bytes(4, "little")),
        "traces": (TRACES, lambda body: bytes(len(body))), "grows": (GROWS, lambda body: b"\7\7\7")}
HOSTILE = {
    "loop": (504, plugin("(loop (br 0))")),
    "loop_without_memory": (504, plugin(f"(loop {grow(1, '')} (br 0))")),
    "bomb": (507, plugin(f"""(loop {grow(1, "unreachable")}
        (i32.store (i32.sub (i32.shl (memory.size) (i32.const 16)) (i32.const 4)) (i32.const 1)) (br 0))""")),
    "bomb_at_once": (507, plugin(grow(40000, "unreachable"))),
    "trap": (422, plugin("unreachable")),
    "division": (422, plugin("(drop (i32.div_u (i32.const 1) (i32.const 0)))")),
    "outside": (422, plugin("(i32.store (i32.const -4) (i32.const 1))")),
    "stack": (422, plugin("(call $again)", parts="(func $again (call $again))")),
    "tables": (422, plugin("""(loop (if (i32.eq (table.grow $t (ref.null func) (i32.const 5000)) (i32.const -1))
        (then unreachable)) (br 0))""", parts="(table $t 0 funcref)")),
    "places": (422, plugin("").replace("(i32.const 2048)", "(i32.const -1)")),
    "output": (502, plugin("(memory.fill (i32.const 0) (i32.const 65) (i32.const 4194304))", f"(i64.const {4 << 20})",
                           memory='(memory (export "memory") 64)')),
    "objects": (507, plugin("""(local $list (ref null $pair)) (loop (local.set $list
        (struct.new $pair (local.get $list) (array.new_default $bytes (i32.const 65536)))) (br 0))""", parts="""
        (type $bytes (array i8)) (type $pair (struct (field (ref null $pair)) (field (ref $bytes))))""")),
    "output_claimed": (502, plugin("", "(i64.const 0xffffffff)")),
    "output_elsewhere": (502, plugin("", "(i64.const -4294967200)")),
}
BROKEN = {
    "starts_forever": plugin("").replace("(module", "(module (func $f (loop (br 0))) (start $f)"),
    "initialises_forever": plugin("", parts='(func (export "_initialize") (loop (br 0)))'),
    "waits": plugin("(drop (memory.atomic.wait32 (i32.const 0) (i32.const 0) (i64.const -1)))",
                    memory='(memory (export "memory") 1 1 shared)'),
    "imports": plugin("").replace("(module", '(module (import "host" "secret" (func))'),
    "too_large": plugin("", memory='(memory (export "memory") 257)'),
    "no_run": f"(module {MEMORY} {ALLOCATE})",
    "no_function": f'(module {MEMORY} {ALLOCATE} (global (export "run") i32 (i32.const 0)))',
    "no_module": "(module (",
}
PLUGINS = {"ann": {name: wat for name, (wat, _) in GOOD.items()}, "bob": {name: wat for name, (wat, _) in GOOD.items()},
           "eve": {"sum": SUM, **{name: wat for name, (_, wat) in HOSTILE.items()}, **BROKEN}}


class Running:
    """The service in a process of its own, with two workers."""

    def __init__(self, folder):
        for tenant, plugins in PLUGINS.items():
            (folder / tenant).mkdir()
            for name, wat in plugins.items():
                (folder / tenant / f"{name}.wat").write_text(wat)
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error", ROOT / "examples" / "plugin_service.py", folder, "--port", "0",
                 "--workers", "2"],
                stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
        line = self.process.stdout.readline()
        assert line.startswith("listening on "), self.log.read_text()
        self.url, *self.own = line.split()[2:]
        self.workers = self.children()
        assert len(self.workers) == 2
        for url in self.own:                # each worker has begun
            httpx.get(f"{url}/metrics", timeout=60)

    def children(self):
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def post(self, tenant, name, body=b"hello"):
        return httpx.post(f"{self.url}/{tenant}/{name}", content=body, timeout=60)

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self):
        for pid in [self.process.pid, *self.workers] if self.process.poll() is None else self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture
def new_service(tmp_path):
    service = Running(tmp_path)
    try:
        yield service
    finally:
        service.kill()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = Running(tmp_path_factory.mktemp("plugins"))
    try:
        yield service
    finally:
        service.kill()


def eventually(holds, seconds=60):
    """Whether it holds at some time soon."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize("name", GOOD)
def test_a_good_plugin_answers_each_request_from_the_same_state(service, name):
    for body in (b"hello", b"", bytes(range(256)), b"x" * 9000):
        answer = service.post("ann", name, body)
        assert (answer.status_code, answer.content) == (200, GOOD[name][1](body))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_plugin_gets_the_error_of_what_it_did(service, name):
    for _ in range(5):
        answer = service.post("eve", name)
        assert answer.status_code == HOSTILE[name][0], answer.text
        assert len(answer.content) < 100
    assert service.post("eve", "sum").content == GOOD["sum"][1](b"hello")
    assert service.children() == service.workers


@pytest.mark.parametrize("name", BROKEN)
def test_a_plugin_that_cannot_be_loaded_is_named_and_not_served(service, name):
    assert service.post("eve", name).status_code == 404
    assert f"eve/{name}.wat is not available: " in service.log.read_text()


def test_a_tenant_cannot_use_the_plugin_of_another_one(service):
    assert service.post("ann", "loop").status_code == 404
    assert service.post("..", "ann").status_code == 404
    assert service.post("nobody", "sum").status_code == 404


def test_a_request_that_is_too_large_is_refused(service):
    assert service.post("ann", "sum", bytes((1 << 20) + 1)).status_code == 413
    assert service.post("ann", "sum", bytes(60000)).status_code == 200


def test_a_tenant_that_sends_too_much_does_not_keep_others_from_their_answers(service):
    async def flood():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.url, timeout=60, limits=limits) as client:
            loops = asyncio.gather(*[client.post("/eve/loop", content=b"") for _ in range(120)])
            answers = [await client.post("/ann/sum", content=b"hello") for _ in range(30)]
            return answers, await loops
    answers, loops = asyncio.run(flood())
    assert {answer.content for answer in answers} == {GOOD["sum"][1](b"hello")}
    found = [loop.status_code for loop in loops]
    assert set(found) == {503, 504}
    assert found.count(504) <= 2 * (2 + 32)


def test_each_worker_has_its_metrics_on_a_port_of_its_own(service):
    for _ in range(10):
        service.post("bob", "traces")
    assert httpx.get(f"{service.url}/metrics").status_code == 404
    texts = [httpx.get(f"{url}/metrics").text for url in service.own]
    counted = [line.split()[1] for text in texts for line in text.splitlines()
               if line.startswith('plugin_requests_total{plugin="traces",status="200",tenant="bob"}')]
    assert sum(map(float, counted)) == 10
    for text in texts:
        for tenant in PLUGINS:
            assert f'linmem_pool_misses_total{{pool="{tenant}"}}' in text


def test_a_worker_that_died_is_replaced(new_service):
    os.kill(new_service.workers[0], signal.SIGKILL)
    assert eventually(lambda: len(new_service.children()) == 2 and new_service.children() != new_service.workers)
    new_service.workers = new_service.children()
    for url in new_service.own:
        assert httpx.get(f"{url}/metrics", timeout=60).status_code == 200
    assert new_service.end() == 0
    assert all(map(is_gone, new_service.workers))


def test_the_workers_end_with_their_parent(new_service):
    new_service.process.kill()
    assert eventually(lambda: all(map(is_gone, new_service.workers)))


def figures(pid):
    """Resident bytes, mappings and open descriptors of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmRSS:"))
    mappings = len(Path(f"/proc/{pid}/maps").read_text().splitlines())
    return resident, mappings, len(os.listdir(f"/proc/{pid}/fd"))


class Load:
    """Clients of the tenants ann and bob, who check each answer, while others call the hostile plugins of eve."""

    def __init__(self, service, seed):
        self.service, self.random = service, random.Random(seed)
        self.seconds = []           # of the good requests of the last round
        self.good = self.hostile = 0

    async def _good(self, client, requests):
        for _ in range(requests):
            tenant, name = self.random.choice(("ann", "bob")), self.random.choice([*GOOD])
            body = self.random.randbytes(self.random.choice((0, 10, 1000, 9000)))
            start = time.perf_counter()
            answer = await client.post(f"/{tenant}/{name}", content=body)
            self.seconds.append(time.perf_counter() - start)
            assert (answer.status_code, answer.content) == (200, GOOD[name][1](body)), (name, answer.text[:200])
            self.good += 1

    async def _hostile(self, client, names, ended):
        for name in names:
            if ended.is_set():
                return
            answer = await client.post(f"/eve/{name}", content=b"hello")
            # Plugins of the tenant that run at the same time share its budget, so another one may have used it up.
            assert answer.status_code in (HOSTILE[name][0], 507), (name, answer.text[:200])
            self.hostile += 1

    async def _round(self, requests, urls):
        self.seconds.clear()
        ended = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=60)) for url in urls]
            attacks = [asyncio.ensure_future(self._hostile(client, itertools.cycle(
                self.random.sample([*HOSTILE], len(HOSTILE))), ended)) for client in clients * 2]
            try:
                await asyncio.gather(*[self._good(client, requests // 8) for client in (clients * 8)[:8]])
            finally:
                ended.set()
                await asyncio.gather(*attacks)

    def round(self, requests, *urls):
        """Returns the figures of the workers after the round, when the clients have closed all connections."""
        asyncio.run(self._round(requests, urls))
        assert self.service.children() == self.service.workers
        return [figures(pid) for pid in self.service.workers]


def within(now, bounds):
    """Whether the figures of each worker are at most the bounds of the worker."""
    return all(each <= bound for figure, most in zip(now, bounds, strict=True)
               for each, bound in zip(figure, most, strict=True))


@pytest.mark.slow
def test_under_load_each_good_request_is_answered_and_nothing_grows(new_service):
    load = Load(new_service, seed=1)
    idle = [figures(pid) for pid in new_service.workers]
    warm = load.round(640, *new_service.own)
    # A request that left one mapping, one descriptor or 32 KiB behind would exceed these bounds.
    bounds = [(resident + (16 << 20), mappings + 40, descriptors + 4)
              for (resident, mappings, _), (_, _, descriptors) in zip(warm, idle, strict=True)]
    rounds = [load.round(640, new_service.url, new_service.url) for _ in range(2)]
    last = [*rounds[-1]]

    def are_within():
        last[:] = [figures(pid) for pid in new_service.workers]
        return within(last, bounds)

    assert eventually(are_within, 20), (idle, warm, rounds, last)
    assert load.good == 3 * 640
    assert load.hostile >= 3 * 4
    p50, p99 = (sorted(load.seconds)[int(len(load.seconds) * share)] for share in (0.5, 0.99))
    print(f"service: {load.good} good and {load.hostile} hostile requests, good ones {p50 * 1e3:.0f} ms (p50),"
          f" {p99 * 1e3:.0f} ms (p99); resident {[each[0] >> 20 for each in warm]} MiB when warm,"
          f" {[each[0] >> 20 for each in last]} at the end, mappings {[each[1] for each in warm]},"
          f" {[each[1] for each in last]}")
    assert new_service.end() == 0
    assert all(map(is_gone, new_service.workers))
    text = new_service.log.read_text()
    assert "Traceback" not in text
    assert text.count("is not available: ") == len(BROKEN)
