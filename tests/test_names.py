"""The names of creators: in errors, records, metrics and info()."""

import errno
import gc
import itertools
import os
import tempfile
import threading

import pytest
from support import HAS_KERNEL32, NEEDS, PAGE, failing, release_idle_slots, requires

import linmem
from linmem._core.memory import NativeCreator

MMAP = linmem.MmapCreator()
NO_MEMORY = 8 if HAS_KERNEL32 else errno.ENOMEM


class Python(linmem.MemoryCreator):
    def new_memory(self, *asked):
        return MMAP.new_memory(*asked)


MAKE = {
    "MmapCreator": lambda **name: linmem.MmapCreator(**name),
    "PoolingCreator": lambda **name: linmem.PoolingCreator(**name),
    "LimitingCreator": lambda **name: linmem.LimitingCreator(MMAP, 1 << 30, **name),
    "StatisticsCreator": lambda **name: linmem.StatisticsCreator(MMAP, **name),
    "TrackingCreator": lambda **name: linmem.TrackingCreator(MMAP, **name),
    "CallbackCreator": lambda **name: linmem.CallbackCreator(MMAP, limit_each=1 << 30, **name),
    "RoutingCreator": lambda **name: linmem.RoutingCreator([({}, MMAP)], **name),
    "PythonCreator": lambda **name: linmem.PythonCreator(Python(), **name),
}
if NEEDS["shared"][0]:
    MAKE["SharedCreator"] = lambda **name: linmem.SharedCreator(**name)
if NEEDS["file_memories"][0]:
    FILES = tempfile.TemporaryDirectory()
    NUMBERS = itertools.count()
    MAKE["FileCreator"] = lambda **name: linmem.FileCreator(os.path.join(FILES.name, str(next(NUMBERS))), **name)
each_kind = pytest.mark.parametrize("kind", MAKE)


def test_every_creator_is_here():
    natives = {name for name in linmem.__all__ if isinstance(getattr(linmem, name), type)
               and issubclass(getattr(linmem, name), NativeCreator)}
    assert natives == {*MAKE, "NativeCreator", "SharedCreator", "FileCreator"}


@each_kind
def test_a_name_is_an_attribute_and_stands_in_the_repr_and_in_info(kind):
    creator = MAKE[kind](name="tenant 7")
    assert creator.name == "tenant 7"
    assert repr(creator).endswith("name='tenant 7')")
    with creator.create(PAGE) as mem:
        assert mem.info().name == "tenant 7"
    with pytest.raises(AttributeError):
        creator.name = "another"


@each_kind
def test_without_a_name_it_is_none(kind):
    for creator in (MAKE[kind](), MAKE[kind](name=None)):
        assert creator.name is None
        assert "name=" not in repr(creator)
        with creator.create(PAGE) as mem:
            assert mem.info().name is None


@each_kind
@pytest.mark.parametrize(("name", "error", "text"), [
    (5, TypeError, "^name must be a str or None, got int$"),
    (b"x", TypeError, "^name must be a str or None, got bytes$"),
    ("", ValueError, "^name must be 1 to 100 bytes of printable text in UTF-8, got ''$"),
    ("a\nb", ValueError, "^name must be 1 to 100 bytes"), ("a\0b", ValueError, "^name must be 1 to 100 bytes"),
    ("\ud800", ValueError, "^name must be 1 to 100 bytes"), ("x" * 101, ValueError, "^name must be 1 to 100 bytes"),
    ("ö" * 51, ValueError, "^name must be 1 to 100 bytes")])
def test_a_wrong_name_is_refused(kind, name, error, text):
    with pytest.raises(error, match=text):
        MAKE[kind](name=name)


@each_kind
@pytest.mark.parametrize("name", ["x" * 100, "ö" * 50, "it's", "%s %n", "日本"])
def test_any_printable_name_comes_back_whole(kind, name):
    creator = MAKE[kind](name=name)
    with creator.create(PAGE, maximum=2 * PAGE) as mem:
        assert creator.name == mem.info().name == name
        with pytest.raises(linmem.GrowError) as raised:
            mem.grow_to(3 * PAGE)
        assert str(raised.value).startswith(f"creator '{name}': new_size must be <= ")


def test_a_name_may_be_a_str_of_another_class_whose_own_methods_do_not_count():
    class Tenant(str):
        __slots__ = ()

        def __str__(self):
            return "another"

        def encode(self, *_):
            return b""

    assert linmem.MmapCreator(name=Tenant("seven")).name == "seven"
    with pytest.raises(ValueError, match=r"^name must be 1 to 100 bytes of printable"):
        linmem.MmapCreator(name=Tenant("x" * 101))
    tracker = linmem.TrackingCreator(MMAP)
    with tracker.scope(Tenant("seven")), tracker.create(PAGE):
        assert tracker.outstanding()[0].scope == ("seven",)


def test_a_name_is_given_by_keyword_only():
    with pytest.raises(TypeError, match="takes at most 2 arguments without a name"):
        linmem.LimitingCreator(MMAP, 5, "x")
    assert linmem.creator("pool", name="x").name == "x"


# -- errors --------------------------------------------------------------------------------------------------

def test_a_refusal_names_the_creator_that_refused():
    inner = linmem.LimitingCreator(MMAP, 2 * PAGE, name="inner")
    outer = linmem.LimitingCreator(inner, 4 * PAGE, name="outer")
    for size, name, limit in ((3 * PAGE, "inner", 2 * PAGE), (5 * PAGE, "outer", 4 * PAGE)):
        text = f"creator '{name}': limit of {limit} bytes reached: "
        with pytest.raises(linmem.LimitError) as raised:
            outer.create(size)
        assert str(raised.value) == f"{text}0 in use and {size} more asked for"
        with outer.create(PAGE, maximum=9 * PAGE) as mem:
            with pytest.raises(linmem.LimitError) as raised:
                mem.grow_to(size)
            assert str(raised.value) == f"{text}{PAGE} in use and {size - PAGE} more asked for"
            assert mem.info().name == "outer"


def test_a_refusal_of_a_creator_without_a_name_has_the_name_of_the_next_one_above():
    limit = linmem.LimitingCreator(linmem.MmapCreator(name="below"), PAGE)
    creator = linmem.StatisticsCreator(linmem.StatisticsCreator(limit, name="next"), name="above")
    with pytest.raises(linmem.LimitError, match=r"^creator 'next': limit"):
        creator.create(2 * PAGE)
    next_one = r"^creator 'next': limit"
    with creator.create(PAGE, maximum=2 * PAGE) as mem, pytest.raises(linmem.LimitError, match=next_one):
        mem.grow_to(2 * PAGE)
    with limit.create(PAGE, maximum=2 * PAGE) as mem, pytest.raises(linmem.LimitError, match=r"^limit"):
        mem.grow_to(2 * PAGE)


@pytest.mark.parametrize(("creator", "name"), [
    (linmem.LimitingCreator(linmem.MmapCreator(name="maps"), 1 << 30, name="limit"), "maps"),
    (linmem.LimitingCreator(MMAP, 1 << 30, name="limit"), "limit")])
def test_a_page_error_names_the_creator(creator, name):
    release_idle_slots()
    with failing(2, NO_MEMORY), pytest.raises(linmem.PageError, match=f"creator '{name}': commit of "):
        creator.create(PAGE)
    with creator.create(PAGE, maximum=2 * PAGE) as mem, failing(1, NO_MEMORY):
        with pytest.raises(linmem.PageError, match=f"creator '{name}': commit of ") as raised:
            mem.grow_to(2 * PAGE)
        assert raised.value.errno == errno.ENOMEM


def test_the_limits_of_a_pool_and_of_callbacks_are_named():
    pool = linmem.PoolingCreator(slots=1, when_full="error", name="p")
    with pool.create(PAGE), pytest.raises(linmem.PoolError, match=r"^creator 'p': all 1 slots of the pool are in use"):
        pool.create(PAGE)
    errors = []
    creator = linmem.CallbackCreator(MMAP, limit_each=PAGE, limit_growths=0, name="c",
                                     on_refused=lambda mem, size, error: errors.append(str(error)))
    with pytest.raises(linmem.LimitError, match=r"^creator 'c': limit of"):
        creator.create(2 * PAGE)
    with creator.create(1, maximum=PAGE) as mem, pytest.raises(linmem.GrowError, match=r"^creator 'c': growing to 2"):
        mem.grow_to(2)
    assert [error[:12] for error in errors] == ["creator 'c':"] * 2


def test_a_request_that_no_row_of_a_table_fits_names_the_router():
    creator = linmem.RoutingCreator([({"max_size": 1}, linmem.MmapCreator(name="small"))], name="sizes")
    with pytest.raises(ValueError, match=r"^creator 'sizes': no row of rule fits a memory of 2 bytes"):
        creator.create(2)


def test_other_errors_are_not_named():
    creator = linmem.MmapCreator(name="maps")
    with creator.create(PAGE) as mem, pytest.raises(ValueError, match=r"^new_size must be >="):
        mem.grow_to(1)
    creator = linmem.RoutingCreator(lambda ty, size: {}[size], name="r")
    with pytest.raises(KeyError) as raised:
        creator.create(PAGE)
    assert raised.value.args == (PAGE,)


# -- pools ---------------------------------------------------------------------------------------------------

def test_a_slot_has_the_name_of_its_present_user():
    pool = linmem.PoolingCreator(linmem.MmapCreator(name="maps"))
    users = [linmem.StatisticsCreator(pool, name="a"), pool, linmem.LimitingCreator(pool, 1 << 30, name="b")]
    for user, name in zip(users * 2, ["a", "maps", "b"] * 2, strict=True):
        with user.create(PAGE) as mem:
            assert mem.info().name == name
    assert pool.stats()["misses"] == 1


@requires("prometheus_client")
def test_names_of_a_pool_in_metrics():
    pools = [linmem.PoolingCreator(name="guests"), linmem.PoolingCreator()]
    assert [linmem.metrics.read(pool)["name"] for pool in pools] == ["guests", None]
    labels = {sample.labels["pool"] for family in linmem.metrics.collector(*pools).collect()
              for sample in family.samples}
    assert labels == {"guests", "1"}
    with pytest.raises(ValueError, match="names must be 2 different names"):
        linmem.metrics.collector(pools[0], linmem.PoolingCreator(name="guests"))


# -- records -------------------------------------------------------------------------------------------------

def test_a_record_has_the_name_of_the_creator_upstream_or_of_its_own():
    rule = [({"max_size": PAGE}, linmem.MmapCreator(name="small")), ({}, MMAP)]
    for name in ("mine", None):
        creator = linmem.StatisticsCreator(linmem.RoutingCreator(rule), name=name)
        with creator.create(PAGE), creator.create(2 * PAGE):
            assert [row["name"] for row in creator.memories()] == [name, "small"]
        assert {row["name"] for row in creator.memories()} == {name, "small"}


def test_on_dropped_gets_the_name():
    infos = []
    inner = linmem.CallbackCreator(MMAP, on_dropped=infos.append, name="inner")
    for creator in (inner, linmem.StatisticsCreator(inner, name="outer")):
        creator.create(PAGE).close()
    assert [info.name for info in infos] == ["inner", "outer"]


# -- lifetime ------------------------------------------------------------------------------------------------

def test_a_name_lives_as_long_as_its_memories_under_eight_threads():
    def work(number):
        for i in range(100):
            name = f"tenant {number} {i % 3}"
            mem = linmem.LimitingCreator(pool, 1 << 30, name=name).create(PAGE, maximum=2 * PAGE)
            gc.collect(0)
            if mem.info().name != name:
                wrong.append(name)
            mem.close()

    pool, wrong = linmem.PoolingCreator(name="shared"), []
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert wrong == []


def test_the_name_stands_in_an_error_of_wasmtime():
    wasmtime = pytest.importorskip("wasmtime")
    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.LimitingCreator(linmem.creator("pool"), 1 << 16, name="tenant 7"))
    engine = wasmtime.Engine(config)
    with pytest.raises(wasmtime.WasmtimeError, match="creator 'tenant 7': limit of 65536 bytes reached"):
        wasmtime.Instance(wasmtime.Store(engine), wasmtime.Module(engine, "(module (memory 2))"), [])
    store = wasmtime.Store(engine)
    module = wasmtime.Module(engine, '(module (memory (export "m") 1))')
    exports = wasmtime.Instance(store, module, []).exports(store)
    assert linmem.wasmtime.linear_memory(store, exports["m"]).info().name == "tenant 7"
    store.close()
