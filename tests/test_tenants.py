"""One engine for many tenants: the argument creator=, and linmem.wasmtime.use."""

import asyncio
import contextvars
import gc
import threading
import weakref

import pytest

pytest.importorskip("wasmtime")

import wasmtime
from support import FORKING, answer, each_instruction, requires, smaps, whole
from test_prepare import engine_of

import linmem.wasmtime
from linmem.wasmtime import Sessions, Snapshot, cause, linear_memory, new_memory, prepare, use

PAGE = 65536
WAT = """(module (memory (export "m") 1 100) (data (i32.const 0) "data")
    (func (export "grow") (param i32) (result i32) (memory.grow (local.get 0)))
    (func (export "set") (i32.store8 (i32.const 0) (i32.const 1))))"""


def limited(pages, upstream=None):
    return linmem.LimitingCreator(linmem.creator("mmap") if upstream is None else upstream, pages * PAGE)


@pytest.fixture
def engine():
    return engine_of()


class Tenant:
    """An instance in a store of its own."""

    def __init__(self, make, store=None):
        self.store = store
        self.exports = make(store).exports(store)

    def grow(self, pages):
        return self.exports["grow"](self.store, pages)

    def memory(self):
        return linear_memory(self.store, self.exports["m"])


def made(prepared, **how):
    return Tenant(lambda store: prepared.instantiate(store, **how), wasmtime.Store(prepared.engine))


def under_use(prepared, creator):
    with use(creator):
        return made(prepared)


def by_plain_wasmtime(prepared, creator):
    module = wasmtime.Module(prepared.engine, WAT)
    with use(creator):
        return Tenant(lambda store: wasmtime.Instance(store, module, []), wasmtime.Store(prepared.engine))


def by_start(prepared, creator):
    store = wasmtime.Store(prepared.engine)
    return made(prepared, start=Snapshot.take(store, prepared.instantiate(store)), creator=creator)


WAYS = pytest.mark.parametrize("way", [
    lambda prepared, creator: made(prepared, creator=creator), by_start, under_use, by_plain_wasmtime],
    ids=["creator", "start", "use", "wasmtime"])


@WAYS
def test_each_tenant_has_a_budget_of_its_own_also_for_growth(engine, way):
    prepared = prepare(engine, WAT)
    small, large = limited(2), limited(4)
    tenants = [way(prepared, small), way(prepared, large)]
    assert [tenant.grow(1) for tenant in tenants] == [1, 1]
    assert [tenant.grow(2) for tenant in tenants] == [-1, 2]
    assert (small.used_bytes, large.used_bytes) == (2 * PAGE, 4 * PAGE)
    with pytest.raises(wasmtime.WasmtimeError) as raised:
        way(prepared, small)
    assert type(cause(raised.value)) is linmem.LimitError
    other = made(prepared)
    assert other.grow(50) == 1                  # the engine's own creator has no limit
    tenants[1].store.close()
    assert large.used_bytes == 0


@WAYS
def test_a_memory_keeps_its_creator_alive(engine, way):
    calls = []

    class Creator:
        def __init__(self):
            self.upstream = linmem.creator("mmap")

        def new_memory(self, *arguments):
            calls.append(arguments[1])
            return self.upstream.new_memory(*arguments)

    creator = Creator()
    gone = weakref.ref(creator)
    tenant = way(prepare(engine, WAT), creator)
    del creator
    with use(linmem.creator("mmap")):           # else the context of this thread has the creator
        gc.collect()
        assert calls == [PAGE]
        assert tenant.grow(3) == 1
        assert tenant.memory().byte_size() == 4 * PAGE
        tenant.store.close()
        del tenant
    gc.collect()
    assert gone() is None


@WAYS
def test_a_pool_gets_its_slot_back(engine, way):
    pool = linmem.creator("pool")
    tenant = way(prepare(engine, WAT), pool)
    assert pool.stats()["live"] == 1
    tenant.store.close()
    assert pool.stats()["live"] == 0


@requires("smaps", "maps_images")
@pytest.mark.parametrize("kind", ["mmap", "pool"])
def test_the_memories_of_all_creators_share_the_pages_of_the_image(engine, kind):
    prepared = prepare(engine, WAT)
    tenants = [made(prepared, creator=linmem.creator(kind)) for _ in range(2)]
    for tenant in tenants:
        assert tenant.memory().read(0, 4) == b"data"
        assert sum(part.figures["Anonymous"] for part in smaps(*whole(tenant.memory()))) == 0
    tenants[0].exports["set"](tenants[0].store)
    assert [tenant.memory().read(0, 4) for tenant in tenants] == [b"\1ata", b"data"]


def test_an_imported_memory_can_come_from_another_creator(engine):
    first, second = limited(9), limited(9)
    store = wasmtime.Store(engine)
    kind = wasmtime.MemoryType(wasmtime.Limits(2, 4))
    new_memory(store, kind, creator=first)
    with use(first):
        memory = new_memory(store, kind, creator=second)
        new_memory(store, kind)
    assert (first.used_bytes, second.used_bytes) == (4 * PAGE, 2 * PAGE)
    memory.grow(store, 1)
    assert second.used_bytes == 3 * PAGE


# -- which creator counts --------------------------------------------------------------------------------


def test_the_argument_wins_over_the_block_and_the_inner_block_over_the_outer_one(engine):
    prepared = prepare(engine, WAT)
    outer, inner, argument = limited(9), limited(9), limited(9)
    with use(outer):
        made(prepared)
        with use(inner):
            made(prepared)
            made(prepared, creator=argument)
        made(prepared)
    made(prepared)
    assert [creator.used_bytes for creator in (outer, inner, argument)] == [0, 0, 0]
    kept = []
    with use(outer):
        kept.append(made(prepared))
        with use(inner):
            kept += [made(prepared), made(prepared, creator=argument)]
        kept.append(made(prepared))
    kept.append(made(prepared))
    assert [creator.used_bytes // PAGE for creator in (outer, inner, argument)] == [2, 1, 1]


def test_an_instance_that_a_host_function_makes_meanwhile_has_its_own_creator(engine):
    prepared = prepare(engine, WAT)
    chosen, inner = limited(9), limited(9)
    kept = []

    def host():
        kept.append(made(prepared))
        kept.append(made(prepared, creator=inner))
        kept.append(new_memory(kept[0].store, wasmtime.MemoryType(wasmtime.Limits(1, 1))))

    calling = prepare(engine, '(module (import "e" "f" (func $f)) (start $f) (memory 2))')
    store = wasmtime.Store(engine)
    calling.instantiate(store, [wasmtime.Func(store, wasmtime.FuncType([], []), host)], creator=chosen)
    assert (chosen.used_bytes, inner.used_bytes) == (2 * PAGE, PAGE)
    assert len(kept) == 3


def test_a_block_in_a_host_function_wins_over_the_argument_of_the_outer_call(engine):
    prepared = prepare(engine, WAT, expose=True)
    store = wasmtime.Store(engine)
    snapshot = Snapshot.take(store, prepared.instantiate(store))
    module = wasmtime.Module(engine, WAT)
    argument, block = limited(9), limited(9)
    kept, used = [], []

    def plain():
        kept.append(Tenant(lambda store: wasmtime.Instance(store, module, []), wasmtime.Store(engine)))
        used.append((argument.used_bytes // PAGE, block.used_bytes // PAGE))

    def imports(store):
        plain()
        return []

    def host():
        plain()
        with use(block):
            plain()
        plain()
        with Sessions(prepared, imports, start=snapshot, size=1) as sessions, sessions.get():
            plain()

    calling = prepare(engine, '(module (import "e" "f" (func $f)) (start $f))')
    store = wasmtime.Store(engine)
    calling.instantiate(store, [wasmtime.Func(store, wasmtime.FuncType([], []), host)], creator=argument)
    assert used == [(1, 0), (1, 1), (2, 1), (2, 1), (3, 1)]
    plain()
    assert used[-1] == (3, 1)


def test_of_two_threads_that_begin_a_block_with_one_object_one_is_refused():
    def begin():
        try:
            block.__enter__()
        except RuntimeError:
            return
        begun.append(block)

    creator = limited(9)
    for meanwhile in each_instruction(use.__enter__):
        block, begun = use(creator), []
        with meanwhile(begin):
            begin()
        assert begun == [block]
        block.__exit__(None, None, None)


def test_a_block_that_ends_in_another_call_leaves_its_creator_alone(engine):
    prepared = prepare(engine, WAT)
    first, second = limited(9), limited(9)
    kept, blocks = [], []

    def begin():
        blocks.append(use(limited(0)))
        blocks[0].__enter__()

    def end():
        blocks[0].__exit__(None, None, None)
        kept.append(Tenant(lambda store: wasmtime.Instance(store, wasmtime.Module(engine, WAT), []),
                           wasmtime.Store(engine)))

    calling = prepare(engine, '(module (import "e" "f" (func $f)) (start $f))')
    for creator, work in ((first, begin), (second, end)):
        store = wasmtime.Store(engine)
        calling.instantiate(store, [wasmtime.Func(store, wasmtime.FuncType([], []), work)], creator=creator)
    assert (first.used_bytes, second.used_bytes) == (0, PAGE)
    assert made(prepared).grow(1) == 1


def test_after_an_exception_the_creator_of_the_engine_counts_again(engine):
    prepared = prepare(engine, WAT)
    creator = limited(1)
    kept = made(prepared, creator=creator)
    for _ in range(2):
        with pytest.raises(wasmtime.WasmtimeError, match="limit of 65536 bytes"):
            made(prepared, creator=creator)
        with pytest.raises(wasmtime.WasmtimeError, match="limit of 65536 bytes"), use(creator):
            made(prepared)
    assert made(prepared).grow(9) == 1
    assert kept.grow(1) == -1


def test_an_engine_is_tested_with_its_own_creator():
    with use(limited(0)):
        prepared = prepare(engine_of(), WAT)
    assert made(prepared).grow(1) == 1


@pytest.mark.parametrize("how", ["creator", "start", "sessions", "new_memory", "use"])
def test_a_wrong_creator_is_refused_by_name(engine, how):
    prepared = prepare(engine, WAT)
    store = wasmtime.Store(engine)
    snapshot = Snapshot.take(store, prepared.instantiate(store))
    call = {"creator": lambda creator: made(prepared, creator=creator),
            "start": lambda creator: made(prepared, start=snapshot, creator=creator),
            "sessions": lambda creator: Sessions(prepared, start=snapshot, size=1, creator=creator),
            "new_memory": lambda creator: new_memory(store, wasmtime.MemoryType(wasmtime.Limits(1, 1)),
                                                     creator=creator),
            "use": use}[how]
    with pytest.raises(TypeError, match="creator must"):
        call(5)
    with pytest.raises(ValueError, match="creator must not have a pool with an image"):
        call(linmem.creator("pool", image=linmem.Image.from_bytes(b"x")))


def test_a_block_is_begun_once():
    block = use(linmem.creator("mmap"))
    with block, pytest.raises(RuntimeError, match=r"call use\(\) for each `with` block"):
        block.__enter__()


# -- sessions ---------------------------------------------------------------------------------------------


def test_sessions_take_their_memories_from_a_creator_and_give_the_place_back_if_it_refuses(engine):
    prepared = prepare(engine, WAT, expose=True)
    store = wasmtime.Store(engine)
    snapshot = Snapshot.take(store, prepared.instantiate(store))
    creator = limited(2)
    with Sessions(prepared, start=snapshot, size=3, creator=creator) as sessions:
        with sessions.get() as (store, instance), sessions.get():
            assert creator.used_bytes == 2 * PAGE
            for _ in range(5):
                with pytest.raises(wasmtime.WasmtimeError) as raised, sessions.get(timeout=5):
                    raise AssertionError
                assert type(cause(raised.value)) is linmem.LimitError
            assert instance.exports(store)["grow"](store, 1) == -1
        assert (sessions.stats()["live"], sessions.stats()["in_use"], creator.used_bytes) == (2, 0, 2 * PAGE)
        with sessions.get() as (store, instance):
            instance.exports(store)["set"](store)
        with sessions.get() as (store, instance):
            assert linear_memory(store, instance.exports(store)["m"]).read(0, 4) == b"data"
        assert sessions.stats()["replaced"] == {}
    assert creator.used_bytes == 0


def test_sessions_without_a_creator_use_the_one_of_the_engine_also_in_a_block(engine):
    prepared = prepare(engine, WAT, expose=True)
    store = wasmtime.Store(engine)
    snapshot = Snapshot.take(store, prepared.instantiate(store))
    creator = limited(1)
    with Sessions(prepared, start=snapshot, size=1) as sessions:
        for _ in range(2):
            with use(creator), sessions.get() as (store, instance):
                assert instance.exports(store)["grow"](store, 9) == 1
                assert creator.used_bytes == 0
                made_in_block = Tenant(lambda store: prepared.instantiate(store), wasmtime.Store(engine))
                assert creator.used_bytes == PAGE
            made_in_block.store.close()


# -- threads and tasks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", [False, True])
def test_threads_use_their_own_creators_at_the_same_time(engine, argument):
    prepared = prepare(engine, WAT)
    barrier, wrong = threading.Barrier(8), []

    def work():
        creator = limited(3)
        barrier.wait(30)
        for _ in range(50):
            tenant = made(prepared, creator=creator) if argument else under_use(prepared, creator)
            if (tenant.grow(2), tenant.grow(1), creator.used_bytes) != (1, -1, 3 * PAGE):
                wrong.append(creator.used_bytes)
            tenant.store.close()
        if creator.used_bytes:
            wrong.append(creator.used_bytes)

    threads = [threading.Thread(target=work) for _ in range(8)]
    with use(limited(0)):               # a new thread does not inherit it
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_tasks_and_their_threads_inherit_the_creator(engine):
    prepared = prepare(engine, WAT)
    creators = [limited(9) for _ in range(3)]
    kept = []

    async def child():
        await asyncio.sleep(0)
        kept.append(made(prepared))
        kept.append(await asyncio.to_thread(made, prepared))

    async def tenant(creator):
        with use(creator):
            await asyncio.sleep(0)
            kept.append(made(prepared))
            task = asyncio.create_task(child())
        kept.append(made(prepared))     # of the engine's creator
        await task                      # the task goes on after the block

    async def main():
        await asyncio.gather(*map(tenant, creators))

    asyncio.run(main())
    assert [creator.used_bytes for creator in creators] == [3 * PAGE] * 3
    assert len(kept) == 12


def test_a_copied_context_keeps_the_creator(engine):
    prepared = prepare(engine, WAT)
    creator = limited(9)
    with use(creator):
        context = contextvars.copy_context()
    kept = [context.run(made, prepared), made(prepared)]
    assert creator.used_bytes == PAGE
    assert len(kept) == 2


@requires("fork")
def test_a_child_that_is_forked_in_a_block_uses_the_creator():
    assert answer(FORKING + """
import wasmtime, linmem.wasmtime
config = wasmtime.Config()
linmem.wasmtime.install(config, linmem.creator("mmap"))
engine = wasmtime.Engine(config)
module = wasmtime.Module(engine, '(module (memory 2))')
creator = linmem.LimitingCreator(linmem.creator("mmap"), 1 << 20)

def work():
    store = wasmtime.Store(engine)
    wasmtime.Instance(store, module, [])
    assert creator.used_bytes == 2 * 65536, creator.used_bytes

with linmem.wasmtime.use(creator):
    child(os.fork, work)
print("done")
""") == "done"


def test_memories_that_python_makes_do_not_come_from_the_creator_of_the_block():
    with use(limited(0)):
        assert len(linmem.create(PAGE)) == PAGE
