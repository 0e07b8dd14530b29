"""Images under wasmtime: the bridge's offers, and restores of a store's memory."""

import sys
import threading

import pytest
import wasmtime

import linmem.wasmtime
from linmem import Image
from linmem._core import bridge as _bridge

TWO = """(module (memory (export "a") 2 4) (memory (export "b") 1)
           (func (export "load") (param i32) (result i32) (i32.load8_u (local.get 0)))
           (func (export "grow") (result i32) (memory.grow (i32.const 1))))"""


@pytest.fixture(params=["mmap", "pool"])
def engine(request):
    config = wasmtime.Config()
    linmem.wasmtime.install(config, linmem.creator(request.param))
    made = wasmtime.Engine(config)
    yield made
    made.close()


def offer(*images):
    """An offer for the memories of TWO, and for one more memory."""
    return _bridge.Offer(list(zip((131072, 65536, 65536), images, strict=False)))


def instantiate(engine, images, wat=TWO):
    store = wasmtime.Store(engine)
    module = wasmtime.Module(engine, wat)
    instance, left, *_ = offer(*images).making(None, None, wasmtime.Instance, store, module, [])
    return store, instance.exports(store), left


def test_each_memory_takes_the_next_image_in_order(engine):
    img = Image.from_bytes(b"\x2a", 70000)
    other = Image.from_bytes(b"b", 5)
    for images, left in (([img, other], 0), ([img], 0), ([None, other], 0), ([img, None, other], 1),
                         ([img, None, None], 0), ([], 0)):
        store, exports, remained = instantiate(engine, images)
        assert remained == left
        assert exports["load"](store, 70000) == (42 if images and images[0] is img else 0)
        second = linmem.wasmtime.linear_memory(store, exports["b"])
        assert second[5] == (ord("b") if images[1:2] == [other] else 0)
        second[5] = exports["a"].data_len(store) & 1
        store.close()


def test_a_memory_with_another_minimum_takes_no_image_and_leaves_the_offer_unchanged(engine):
    img = Image.from_bytes(b"x", 5)
    store, exports, left = instantiate(engine, [None, img], """(module
        (memory 0) (memory (export "a") 2) (memory 3) (memory (export "b") 1))""")
    assert left == 0
    assert exports["b"].read(store, 5, 6) == b"x"
    assert exports["a"].read(store, 5, 6) == b"\0"
    _, _, left = instantiate(engine, [None, img], '(module (memory (export "b") 1))')
    assert left == 1


def test_an_image_that_does_not_fit_is_an_error_with_its_bounds(engine):
    img = Image.from_bytes(b"x", 65536)
    with pytest.raises(wasmtime.WasmtimeError, match=r"minimum must be >= the end of the image \(65537\), got 65536"):
        instantiate(engine, [None, img])
    assert instantiate(engine, [])[2] == 0


def test_install_refuses_a_pool_with_an_image_at_any_place_in_a_chain():
    image = Image.from_bytes(b"x")
    pool = linmem.creator("pool", image=image)
    limited = linmem.creator("limiting", limit_bytes=1 << 30, upstream=pool)
    for creator in (pool, limited, linmem.creator("statistics", upstream=limited),
                    linmem.creator("pool", upstream=limited),
                    linmem.PythonCreator(pool)):
        config = wasmtime.Config()
        with pytest.raises(ValueError, match="creator must not have a pool with an image: every memory would"):
            linmem.wasmtime.install(config, creator)
        linmem.wasmtime.install(config)         # the config is unchanged
    without = linmem.creator("limiting", limit_bytes=1, upstream=linmem.creator("pool"))
    linmem.wasmtime.install(wasmtime.Config(), without)


def test_an_offer_is_seen_by_its_own_thread_only(engine):
    img = Image.from_bytes(b"\x2a", 70000)
    seen = []

    def other():
        store, exports, left = instantiate(engine, [])
        seen.append((exports["load"](store, 70000), left))

    def start_another_thread():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    assert offer(img, None).making(None, None, start_another_thread)[1] == 1
    assert seen == [(0, 0)]


def test_an_offer_inside_another_one_ends_before_the_other_goes_on(engine):
    img, other = Image.from_bytes(b"\x2a", 70000), Image.from_bytes(b"\x2b", 70000)
    outer, inner = offer(img, None), offer(other, None)

    def first():        # as a signal handler does, before wasmtime has asked for a memory of the outer instance
        store, exports, left = instantiate(engine, [other])
        assert (exports["load"](store, 70000), left) == (43, 0)
        assert inner.making(None, None, lambda: None)[1] == 1
        store = wasmtime.Store(engine)
        return store, wasmtime.Instance(store, wasmtime.Module(engine, TWO), [])

    for _ in range(3):
        (store, instance), left, *_ = outer.making(None, None, first)
        assert (instance.exports(store)["load"](store, 70000), left) == (42, 0)
    store, exports, _ = instantiate(engine, [])
    assert exports["load"](store, 70000) == 0


def test_a_running_offer_holds_its_images_and_no_offer_does_afterwards():
    img = Image.from_bytes(b"x" * 5000)
    offered = offer(img)
    making, held = offered.making, sys.getrefcount(img)
    del offered
    assert making(None, None, lambda: sys.getrefcount(img))[0] == held
    del making
    assert sys.getrefcount(img) == held - 1


@pytest.mark.parametrize(("wrong", "error"), [
    ([(1, b"x")], TypeError), ([(1, 5)], TypeError), (5, TypeError), ([5], TypeError), ([("1", None)], TypeError),
    ([(-1, None)], OverflowError), ([(1 << 64, None)], OverflowError), ([(1, None, None)], TypeError),
    ([(1, None, 1, 1)], ValueError)])
def test_an_offer_of_something_else_is_refused(wrong, error):
    with pytest.raises(error):
        _bridge.Offer(wrong)


def test_a_stores_memory_is_restored_and_the_program_sees_it(engine):
    store, exports, _ = instantiate(engine, [])
    mem = linmem.wasmtime.linear_memory(store, exports["a"])
    mem[70000] = 7
    img = mem.snapshot()
    mem[70000] = 8
    mem[3] = 1
    assert exports["load"](store, 70000) == 8
    mem.restore(img)
    assert exports["load"](store, 70000) == 7
    assert exports["load"](store, 3) == 0
    exports["grow"](store)
    with pytest.raises(ValueError, match="grown"):
        mem.restore(img)
    mem.restore(img, zero_grown=True)
    assert exports["load"](store, 70000) == 7
    assert exports["a"].size(store) == 3


def test_a_delta_that_grows_a_stores_memory_is_refused_before_anything_is_written(engine):
    store, exports, _ = instantiate(engine, [])
    mem = linmem.wasmtime.linear_memory(store, exports["a"])
    img = mem.snapshot()
    larger = img.new_memory()
    larger.grow_to(3 * 65536)
    larger[5] = 1
    with pytest.raises(linmem.OwnedError):
        mem.apply(img.diff(larger))
    assert mem[5] == 0
    exports["grow"](store)
    mem.apply(img.diff(larger))
    assert exports["load"](store, 5) == 1


def test_restoring_while_the_store_grows_the_memory_is_refused():
    told = []

    class Growing:
        def __init__(self, minimum, reserved, guard):
            self.inner = linmem.MmapCreator().create(minimum, reserve=reserved, may_move=True, guard=guard)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def grow_to(self, size):
            with pytest.raises(linmem.OwnedError, match="growing"):
                self.handle.restore(self.image)
            told.append(size)
            self.inner.grow_to(size)

    class Creator:
        def new_memory(self, ty, minimum, maximum, reserved, guard):
            made.append(Growing(minimum, reserved, guard))
            return made[-1]

    made = []
    config = wasmtime.Config()
    linmem.wasmtime.install(config, Creator())
    engine = wasmtime.Engine(config)
    store, exports, _ = instantiate(engine, [])
    first = made[0]
    first.handle = linmem.wasmtime.linear_memory(store, exports["a"])
    first.image = first.handle.snapshot()
    assert exports["grow"](store) == 2
    assert told == [3 * 65536]
    first.handle.restore(first.image, zero_grown=True)
    assert first.handle.dirty_pages(first.image) == []
    store.close()
    first.handle.close()        # memory and handle refer to each other
    engine.close()
    made.clear()
