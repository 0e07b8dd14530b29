"""RoutingCreator: each request goes to one of several creators."""

import threading

import pytest
from support import PAGE

import linmem

MMAP = linmem.MmapCreator()


def counting():
    return linmem.StatisticsCreator(MMAP)


def made(*creators):
    return [creator.statistics()["total_count"] for creator in creators]


def ask(creator, size, **how):
    creator.new_memory(linmem.MemoryType(0, **how), size, None, 0, 0).close()


# -- a table -------------------------------------------------------------------------------------------------

def test_the_first_row_that_fits_gets_the_request():
    small, shared, wide, rest = creators = [counting() for _ in range(4)]
    creator = linmem.RoutingCreator([({"max_size": PAGE, "is_shared": False}, small), ({"is_shared": True}, shared),
                                     ({"is_64": True, "max_size": 2 * PAGE}, wide), ({}, rest)])
    for size, how, expected in [
            (PAGE, {}, small), (PAGE + 1, {}, rest), (PAGE, {"is_shared": True}, shared),
            (PAGE + 1, {"is_64": True}, wide), (2 * PAGE + 1, {"is_64": True}, rest), (0, {"is_64": True}, small)]:
        before = made(*creators)
        ask(creator, size, **how)
        after = made(*creators)
        assert [new - old for new, old in zip(after, before, strict=True)] == [one is expected for one in creators]


def test_a_memory_stays_with_the_creator_that_made_it():
    small, large = linmem.LimitingCreator(MMAP, 4 * PAGE), linmem.LimitingCreator(MMAP, 9 * PAGE)
    creator = linmem.creator("routing", rule=[({"max_size": PAGE}, small), ({}, large)])
    with linmem.create(PAGE, 20 * PAGE, creator=creator) as mem:
        mem.grow_to(4 * PAGE)
        assert (small.used_bytes, large.used_bytes) == (4 * PAGE, 0)
        with pytest.raises(linmem.LimitError):
            mem.grow_to(5 * PAGE)
    assert small.used_bytes == 0


def test_a_request_that_no_row_fits_is_refused_by_its_figures():
    creator = linmem.RoutingCreator([({"max_size": PAGE}, MMAP), ({"is_shared": True}, MMAP)])
    with pytest.raises(ValueError, match=f"^no row of rule fits a memory of {PAGE + 1} bytes with is_64=True and"
                                         " is_shared=False: a last row without fields would$"):
        creator.create(PAGE + 1)


def test_the_table_is_read_once():
    fields, first, second = {"max_size": PAGE}, counting(), counting()
    table = [(fields, first), ({}, second)]
    creator = linmem.RoutingCreator(iter(table))
    table.clear()
    fields["max_size"] = 0
    ask(creator, PAGE)
    assert made(first, second) == [1, 0]
    assert creator.rule == (({"max_size": PAGE}, first), ({}, second))


def test_tables_nest_and_stand_in_chains():
    budget = linmem.LimitingCreator(MMAP, PAGE)
    pool = linmem.PoolingCreator()
    inner = linmem.RoutingCreator([({"max_size": PAGE}, pool), ({}, MMAP)])
    creator = linmem.StatisticsCreator(linmem.RoutingCreator([({"is_shared": True}, budget), ({}, inner)]))
    for _ in range(2):
        ask(creator, PAGE)
    assert pool.stats()["hits"] == 1
    assert made(creator) == [2]


def test_rows_may_have_creators_in_python():
    class Python(linmem.MemoryCreator):
        def new_memory(self, *asked):
            seen.append(asked[1])
            return MMAP.new_memory(*asked)

    seen = []
    ask(linmem.RoutingCreator([({}, Python())]), PAGE)
    assert seen == [PAGE]


@pytest.mark.parametrize(("rule", "error", "text"), [
    (5, TypeError, r"^rule must be a function or a list of \(fields, creator\), got int$"),
    (None, TypeError, "^rule must be a function"),
    ([], ValueError, "^rule must have at least one row"),
    ([MMAP], TypeError, r"^rule\[0\] must be a dict of fields and a creator, got MmapCreator"),
    ([({}, MMAP), (5, MMAP)], TypeError, r"^rule\[1\] must be a dict of fields and a creator"),
    ([({"minimum": 5}, MMAP)], ValueError, r"^rule\[0\] has no field 'minimum'; the fields are: max_size, is_64"),
    ([({"max_size": -1}, MMAP)], ValueError, r"^max_size of rule\[0\] must be >= 0, got -1$"),
    ([({"max_size": "1"}, MMAP)], TypeError, r"^max_size of rule\[0\] must be an integer number of bytes, got str$"),
    ([({"is_64": 1}, MMAP)], TypeError, r"^is_64 of rule\[0\] must be True or False, got 1$"),
    ([({"is_shared": None}, MMAP)], TypeError, r"^is_shared of rule\[0\] must be True or False, got None$"),
    ([({}, None)], TypeError, r"^the creator of rule\[0\] must be a MemoryCreator, got NoneType$"),
    ([({}, linmem.MmapCreator)], TypeError, r"^the creator of rule\[0\] must be a MemoryCreator, got the class"),
])
def test_a_wrong_table_is_refused_by_the_row(rule, error, text):
    with pytest.raises(error, match=text):
        linmem.RoutingCreator(rule)


def test_the_factory_has_no_upstream_for_a_router():
    with pytest.raises(TypeError, match=r"RoutingCreator\(\) has no argument 'upstream'"):
        linmem.creator("routing", rule=[({}, MMAP)], upstream=MMAP)
    with pytest.raises(TypeError, match=r"RoutingCreator\(\) needs the argument 'rule'"):
        linmem.creator("routing")


# -- a function ----------------------------------------------------------------------------------------------

def test_a_function_gets_the_type_and_the_size_and_returns_the_creator():
    def rule(ty, size):
        asked.append((ty, size))
        return pool if size <= PAGE else counted

    asked, pool, counted = [], linmem.PoolingCreator(), counting()
    creator = linmem.creator("routing", rule=rule)
    assert creator.rule is rule
    ty = linmem.MemoryType(0, 3, is_64=True, page_size=1)
    creator.new_memory(ty, 5, 3 * PAGE, 0, 0).close()
    creator.create(PAGE + 1).close()
    assert asked == [(linmem.MemoryType(5, 3 * PAGE, is_64=True, page_size=1), 5),
                     (linmem.MemoryType(PAGE + 1, None, is_64=True, page_size=1), PAGE + 1)]
    assert (pool.stats()["misses"], made(counted)) == (1, [1])


@pytest.mark.parametrize("error", [KeyError("no"), KeyboardInterrupt(), linmem.GrowError("mine")])
def test_the_exception_of_a_function_refuses_the_request(error):
    def rule(ty, size):
        raise error

    with pytest.raises(type(error)) as raised:
        linmem.RoutingCreator(rule).create(PAGE)
    assert raised.value is error


def test_the_creator_that_a_function_chose_may_refuse():
    budget = linmem.LimitingCreator(MMAP, PAGE)
    with pytest.raises(linmem.LimitError) as raised:
        linmem.RoutingCreator(lambda ty, size: budget).create(2 * PAGE)
    assert (raised.value.limit, raised.value.requested) == (PAGE, 2 * PAGE)


@pytest.mark.parametrize("result", [None, 5, linmem.MmapCreator])
def test_another_result_than_a_creator_is_refused(result):
    with pytest.raises(TypeError, match=r"^the result of rule\(ty, size\) must be a MemoryCreator, got "):
        linmem.RoutingCreator(lambda ty, size: result).create(PAGE)


def test_a_function_that_chooses_its_own_creator_ends_with_a_recursion_error():
    creators = []
    creators.append(linmem.RoutingCreator(lambda ty, size: creators[0]))
    with pytest.raises(RecursionError):
        creators[0].create(PAGE)


def test_the_domain_of_a_request_goes_to_the_chosen_creator():
    pool = linmem.PoolingCreator()
    linmem.RoutingCreator(lambda ty, size: pool).create(PAGE, domain="a").close()
    assert set(linmem.metrics.read(pool)["domains"]) == {"a"}


def test_each_of_eight_threads_gets_memories_of_its_creator():
    creators = {size: counting() for size in range(1, 9)}
    by_function = linmem.RoutingCreator(lambda ty, size: creators[size])
    by_table = linmem.RoutingCreator([({"max_size": size}, creator) for size, creator in creators.items()])

    def work(size):
        for _ in range(100):
            by_function.create(size).close()
            by_table.create(size).close()

    threads = [threading.Thread(target=work, args=(size,)) for size in creators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert made(*creators.values()) == [200] * 8


def test_modules_of_one_engine_get_memories_by_their_size():
    wasmtime = pytest.importorskip("wasmtime")
    small, large = counting(), counting()
    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.creator("routing", rule=[({"max_size": 1 << 16}, small), ({}, large)]))
    engine = wasmtime.Engine(config)
    for n in (1, 1, 2):
        store = wasmtime.Store(engine)
        wasmtime.Instance(store, wasmtime.Module(engine, f'(module (memory (export "m") {n}))'), [])
        store.close()
    assert made(small, large) == [2, 1]

    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.RoutingCreator(lambda ty, size: None))
    engine = wasmtime.Engine(config)
    with pytest.raises(wasmtime.WasmtimeError, match=r"the result of rule\(ty, size\) must be a MemoryCreator"):
        wasmtime.Instance(wasmtime.Store(engine), wasmtime.Module(engine, "(module (memory 1))"), [])


@pytest.mark.parametrize("above", [lambda creator: creator, lambda creator: linmem.LimitingCreator(creator, 1 << 30)])
def test_wasmtime_gets_no_memory_that_starts_from_an_image_of_its_pool(above):
    wasmtime = pytest.importorskip("wasmtime")
    pool = linmem.PoolingCreator(image=linmem.Image.from_bytes(b"x" * 65536, 0))
    with pytest.raises(ValueError, match="creator must not have a pool with an image"):
        linmem.wasmtime.install(wasmtime.Config(), above(linmem.RoutingCreator([({"max_size": 1}, MMAP), ({}, pool)])))

    chosen = [pool]
    config = wasmtime.Config()
    linmem.wasmtime.install(config, above(linmem.RoutingCreator(lambda ty, size: chosen[0])))
    engine = wasmtime.Engine(config)
    module = wasmtime.Module(engine, '(module (memory (export "m") 1) (data (i32.const 3) "data"))')
    with pytest.raises(wasmtime.WasmtimeError, match="must not start from an image of its pool") as caught:
        wasmtime.Instance(wasmtime.Store(engine), module, [])
    assert isinstance(linmem.wasmtime.cause(caught.value), ValueError)
    assert pool.stats()["live"] == 0
    chosen[0] = linmem.PoolingCreator()
    store = wasmtime.Store(engine)
    memory = wasmtime.Instance(store, module, []).exports(store)["m"]
    assert linmem.wasmtime.linear_memory(store, memory).read(0, 8) == b"\0\0\0data\0"
    store.close()
