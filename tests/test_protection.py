"""Protected pages: the behaviour of every call of linmem on them, and linmem's record of them."""

import contextlib
import ctypes
import io
import operator
import threading
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    FORKING,
    NEEDS,
    PAGE,
    accessible_parts,
    answer,
    dies_at,
    failing,
    mappings,
    requires,
    whichever,
)

import linmem
from linmem import Image

PROTECTED = ["none", "r", *(["rx"] if NEEDS["code"][0] else [])]
SHOWN = {"none": "---p", "r": "r--p", "rw": "rw-p", "rx": "r-xp"}
SIZE = 8 * PAGE
AT = 3 * PAGE                   # offset of the protected page
OUT_OF_MEMORY = 12


@pytest.fixture
def mem():
    with linmem.create(SIZE, maximum=4 * SIZE) as mem:
        mem.write(0, bytes(range(256)) * (SIZE // 256))
        yield mem


def shown(mem):
    """The access of each page, as the OS shows it."""
    found = {}
    for part in mappings(mem.as_ptr(), mem.as_ptr() + len(mem) // PAGE * PAGE):
        for address in range(part.start, part.end, PAGE):
            found[(address - mem.as_ptr()) // PAGE] = part.access
    return [found[page] for page in range(len(mem) // PAGE)]


# -- every call, on every kind of page ---------------------------------------------------------------

IMAGE = Image.from_bytes(b"i" * SIZE)
DELTA = linmem.Delta(IMAGE.digest, SIZE, SIZE, [(AT - 1, 2)], [(AT + 5, 3)], b"ab")
ELSEWHERE = linmem.Delta(IMAGE.digest, SIZE, SIZE, [(0, 2)], [(7 * PAGE, PAGE)], b"ab")

# name -> how the call accesses the page: "reads", "writes", or "neither", with the arguments for each case.
CALLS = {
    "read": {"reads": lambda mem: mem.read(AT - 1, 2), "neither": lambda mem: (mem.read(0, AT), mem.read(AT, 0))},
    "write": {"writes": lambda mem: mem.write(AT - 1, b"ab"),
              "neither": lambda mem: (mem.write(0, bytes(AT)), mem.write(AT, b""))},
    "__getitem__": {"reads": lambda mem: (refused_all(lambda: mem[AT], lambda: mem[AT - SIZE], lambda: mem[AT:AT + 1],
                                                     lambda: mem[:], lambda: mem[::PAGE], lambda: mem[::-1])),
                    "neither": lambda mem: (mem[0], mem[-1], mem[:AT], mem[AT:AT], mem[0::2 * PAGE])},
    "__setitem__": {"writes": lambda mem: refused_all(
        lambda: operator.setitem(mem, AT, 1), lambda: operator.setitem(mem, AT - SIZE, 1),
        lambda: operator.setitem(mem, slice(AT - 1, AT + 1), b"ab"),
        lambda: operator.setitem(mem, slice(None), bytes(SIZE)),
        lambda: operator.setitem(mem, slice(None, None, PAGE), bytes(SIZE // PAGE)),
        lambda: operator.setitem(mem, slice(None, None, -PAGE), bytes(SIZE // PAGE))),
        "neither": lambda mem: (operator.setitem(mem, 0, 1), operator.setitem(mem, slice(0, AT), bytes(AT)),
                                operator.setitem(mem, slice(AT, AT), b""),
                                operator.setitem(mem, slice(0, None, 2 * PAGE), bytes(SIZE // PAGE // 2)))},
    "snapshot": {"reads": lambda mem: mem.snapshot()},
    "dirty_pages": {"reads": lambda mem: mem.dirty_pages(IMAGE)},
    "Image.diff": {"reads": lambda mem: IMAGE.diff(mem)},
    "restore": {"writes": lambda mem: mem.restore(IMAGE)},
    "apply": {"writes": lambda mem: mem.apply(DELTA), "neither": lambda mem: mem.apply(ELSEWHERE)},
    "discard": {"neither": lambda mem: NEEDS["discard_any_protection"][0] and mem.discard(AT, PAGE),
                "writes": lambda mem: mem.discard(AT + 1, 5)},
    "prefault": {"writes": lambda mem: mem.prefault(), "neither": lambda mem: mem.prefault(0, AT)},
    "grow_to": {"neither": lambda mem: mem.grow_to(2 * SIZE)},
    "protect": {"neither": lambda mem: mem.protect(0, PAGE, "r")},
    "view": {"neither": lambda mem: (mem.view("I").release(), mem.view(">I").release())},
    "info": {"neither": lambda mem: mem.info()},
    "as_ptr": {"neither": lambda mem: mem.as_ptr()},
    "byte_size": {"neither": lambda mem: mem.byte_size()},
    "byte_capacity": {"neither": lambda mem: mem.byte_capacity()},
    "maximum_byte_size": {"neither": lambda mem: mem.maximum_byte_size()},
    "wasm_accessible": {"neither": lambda mem: mem.wasm_accessible()},
    "closed": {"neither": lambda mem: mem.closed},
    "close": {"neither": lambda mem: mem.close()},
    "__enter__": {"neither": lambda mem: mem.__enter__()},
    "__exit__": {"neither": lambda mem: mem.__exit__(None, None, None)},
    "__len__": {"neither": len},
    "__repr__": {"neither": repr},
    "__delitem__": {"neither": lambda mem: impossible(operator.delitem, mem, 0)},
    "__reduce__": {"neither": lambda mem: impossible(mem.__reduce__)},
    "write of a protected source": {"reads": lambda mem: with_another(lambda other: refused_all(
        lambda: other.write(0, mem), lambda: other.write(0, memoryview(mem)[AT:AT + 1]),
        lambda: operator.setitem(other, slice(None), mem),
        lambda: operator.setitem(other, slice(0, 4, 2), mem.view()[AT:AT + 2])))},
    "write of itself": {"reads": lambda mem: mem.write(0, memoryview(mem)[AT:AT + 9])},
    "Image.from_bytes": {"reads": lambda mem: Image.from_bytes(mem)},
    "Image.from_pieces": {"reads": lambda mem: Image.from_pieces([(0, mem.view(">I", AT - 8, 4))], SIZE)},
    "Delta": {"reads": lambda mem: linmem.Delta("", SIZE, SIZE, [(0, SIZE)], [], mem)},
    "apply of a protected source": {"reads": lambda mem: with_another(
        lambda other: other.apply(linmem.Delta("", SIZE, SIZE, [(0, SIZE)], [], mem)))},
}
HARMLESS = {"__class__", "__delattr__", "__dir__", "__doc__", "__eq__", "__format__", "__ge__", "__getattribute__",
            "__getstate__", "__gt__", "__hash__", "__init__", "__init_subclass__", "__le__", "__lt__", "__ne__",
            "__new__", "__pyx_vtable__", "__reduce_ex__", "__setattr__", "__sizeof__", "__str__", "__subclasshook__",
            "__buffer__", "__release_buffer__", "__bool__", "__setstate__", "__setstate_cython__",
            "__reduce_cython__", "__module__"}


def refused_all(*calls):
    """Either all calls are refused, and this raises the first error, or all calls succeed."""
    errors = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            errors.append(error)
    if errors:
        assert len(errors) == len(calls), errors
        raise errors[0]


def impossible(call, *arguments):
    with pytest.raises(TypeError):
        call(*arguments)


def with_another(call):
    with linmem.create(SIZE) as other:
        try:
            call(other)
        except ValueError:
            assert not any(other)
            raise


def test_every_method_of_a_memory_has_its_row():
    missing = {name for name in dir(linmem.Memory) if name not in CALLS} - HARMLESS
    # These names may be without a row. A Memory has some of them, such as `in` and array().
    assert missing <= {"__contains__", "__iter__", "array", "__dlpack__", "__dlpack_device__", "handle", "flush",
                       "map", "unmap", "unlink", "wait_for_growth", "__copy__",
                       "__deepcopy__"}, f"what do these do on protected pages? {missing}"


@pytest.mark.parametrize("access", PROTECTED)
@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, row in CALLS.items() for kind in row])
def test_a_call_raises_where_it_would_fault_and_works_elsewhere(mem, access, name, kind):
    before = bytes(mem)
    mem.protect(AT, PAGE, access)
    call = CALLS[name][kind]
    if kind == "neither" or (kind == "reads" and access != "none"):
        call(mem)
        return
    with pytest.raises((ValueError, TypeError, linmem.PageError)) as caught:
        call(mem)
    traceback.clear_frames(caught.tb)       # the frames hold views
    if caught.type is ValueError and name != "discard":
        assert f"the page at {AT} has the access '{access}'" in str(caught.value)
    assert shown(mem)[AT // PAGE] == SHOWN[access]
    mem.protect(AT, PAGE, "rw")
    assert bytes(mem) == before
    call(mem)


def test_the_refusal_names_the_call_the_range_and_the_access(mem):
    mem.protect(AT, 2 * PAGE, "none")
    with pytest.raises(ValueError, match=rf"^read is refused for 9 bytes at offset {AT - 2}: the page at {AT} has the"
                                         rf" access 'none'; protect\(0, {SIZE}, 'rw'\) makes all pages writable$"):
        mem.read(AT - 2, 9)


def test_an_iteration_ends_at_the_page_that_cannot_be_read(mem):
    mem.protect(PAGE, PAGE, "none")
    seen = []
    with pytest.raises(ValueError, match="read is refused"):
        seen.extend(mem)
    assert len(seen) == PAGE


def test_a_delta_that_is_refused_has_not_grown_the_memory(mem):
    mem.protect(AT, PAGE, "r")
    delta = linmem.Delta("", SIZE, 2 * SIZE, [(0, 1), (AT, 1)], [], b"ab")
    with pytest.raises(TypeError, match="apply is not supported with protected pages"):
        mem.apply(delta)
    assert (len(mem), mem[0], mem[1]) == (SIZE, 0, 1)
    mem.protect(AT, PAGE, "rw")
    mem.apply(delta)
    assert (len(mem), mem[0], mem[AT]) == (2 * SIZE, ord("a"), ord("b"))


def test_a_memory_made_in_python_of_protected_pages_is_refused_as_a_whole_and_its_calls_raise():
    inner = []

    class Wrapped(linmem.LinearMemory):
        def __init__(self, mem):
            self.mem = mem

        def __getattr__(self, name):
            return getattr(self.mem, name)

        as_ptr = property(lambda self: self.mem.as_ptr)
        byte_size = property(lambda self: self.mem.byte_size)
        byte_capacity = property(lambda self: self.mem.byte_capacity)
        wasm_accessible = property(lambda self: self.mem.wasm_accessible)
        grow_to = property(lambda self: self.mem.grow_to)

    class Mine(linmem.MemoryCreator):
        early = False

        def new_memory(self, *how):
            inner.append(linmem.MmapCreator().new_memory(*how))
            if self.early:
                inner[-1].protect(0, PAGE, "r")
            return Wrapped(inner[-1])

    maker = Mine()
    outer = linmem.create(SIZE, maximum=SIZE, creator=linmem.PythonCreator(maker))
    inner[0].protect(AT, PAGE, "none")
    refused_all(lambda: outer.write(0, b"fine"), lambda: outer[0])
    for call in (lambda: outer[AT], lambda: outer.read(0, SIZE), lambda: outer.write(AT, b"a"),
                 lambda: operator.setitem(outer, AT, 1), lambda: outer[::PAGE]):
        with pytest.raises(ValueError, match="has the access 'none'"):
            call()
    for call in (outer.snapshot, lambda: outer.restore(IMAGE), lambda: outer.dirty_pages(IMAGE)):
        with pytest.raises(TypeError, match="protected pages"):
            call()
    inner[0].protect(AT, PAGE, "rw")
    assert bytes(outer.snapshot())[:4] == b"fine"
    maker.early = True
    for image in (None, IMAGE):
        with pytest.raises(ValueError, match="new_memory is refused"):
            linmem.PythonCreator(maker).create(SIZE, SIZE, image=image)
    outer.close()
    for made in inner:
        made.close()


# -- linmem's record ---------------------------------------------------------------------------------

def check_known(mem, model):
    """linmem refuses exactly the accesses that the model forbids, the OS shows the same protection, and a snapshot
    needs only readable pages."""
    assert shown(mem) == [SHOWN[access] for access in model]
    for page, access in enumerate(model):
        for call, works in ((lambda at: mem.read(at, 1), access != "none"),
                            (lambda at: operator.setitem(mem, at, 0), access == "rw")):
            for at in (page * PAGE, (page + 1) * PAGE - 1):
                with contextlib.nullcontext() if works else pytest.raises(ValueError, match=f"access '{access}'"):
                    call(at)
    try:
        mem.snapshot()
    except TypeError:
        assert "none" in model
    else:
        assert "none" not in model
    with memoryview(mem) as view:
        assert view.readonly == ("rw" not in model and len(mem) == len(model) * PAGE)


@requires("regions")
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(0, 12), st.sampled_from(["rw", *PROTECTED])), max_size=12),
       st.integers(0, 3))
def test_each_page_has_the_access_of_the_last_request(changes, odd):
    with linmem.create(12 * PAGE + odd, maximum=64 * PAGE) as mem:
        model = ["rw"] * 12
        for first, n, access in changes:
            n = min(n, 12 - first)
            mem.protect(first * PAGE, n * PAGE, access)
            model[first:first + n] = [access] * n
            check_known(mem, model)
        mem.grow_to(14 * PAGE)
        check_known(mem, [*model, "rw", "rw"])
        mem.protect(0, 14 * PAGE, "rw")
        check_known(mem, ["rw"] * 14)


@pytest.mark.parametrize("pages", [range(0, 4000, 2), range(3998, -1, -2), [*range(0, 4000, 4), *range(2, 4000, 4)],
                                   range(4000)], ids=["up", "down", "between", "all"])
def test_pages_are_protected_one_by_one_and_given_back_one_by_one(pages):
    with linmem.create(4000 * PAGE, maximum=4000 * PAGE) as mem:
        for page in pages:
            mem.protect(page * PAGE, PAGE, "r")
        protected = set(pages)
        for page in (0, 1, 2, 1999, 2000, 3998, 3999):
            if page in protected:
                with pytest.raises(ValueError, match="has the access 'r'"):
                    mem[page * PAGE] = 1
            else:
                mem[page * PAGE] = 1
        for page in pages:
            mem.protect(page * PAGE, PAGE, "rw")
        mem.write(0, b"w" * len(mem))
        assert not memoryview(mem).readonly


def test_a_memory_moves_again_after_its_protection_is_lifted():
    with linmem.create(4 * PAGE, maximum=64 * PAGE, reserve=0, may_move=True) as mem:
        mem.protect(PAGE, PAGE, "rw")
        mem.protect(PAGE, PAGE, "r")
        with pytest.raises(linmem.GrowError, match="protection"):
            mem.grow_to(32 * PAGE)
        mem.protect(PAGE, PAGE, "rw")
        mem.protect(0, PAGE, "rw")
        mem.snapshot()


@requires("regions")
@pytest.mark.parametrize("access", ["rw", *PROTECTED])
def test_a_refused_protect_leaves_every_page_unchanged_and_known(mem, access):
    model = ["rw", "r", "none", "none", "rw", PROTECTED[-1], "r", "rw"]
    for page, how in enumerate(model):
        mem.protect(page * PAGE, PAGE, how)
    with failing(1, OUT_OF_MEMORY), pytest.raises(linmem.PageError, match="protect"):
        mem.protect(PAGE, 6 * PAGE, access)
    check_known(mem, model)


@requires("regions")
def test_if_an_undo_is_refused_too_only_the_access_of_its_pages_is_unknown(mem):
    mem.protect(5 * PAGE, PAGE, "r")
    with failing(1, OUT_OF_MEMORY, 2), pytest.raises(linmem.PageError, match="protect"):
        mem.protect(PAGE, PAGE, "none")
    for call in (lambda: mem[PAGE], lambda: mem.read(PAGE, 1), lambda: operator.setitem(mem, PAGE, 1)):
        with pytest.raises(ValueError, match="is not known"):
            call()
    assert mem[PAGE - 1] == 255
    assert mem[2 * PAGE] == 0
    with pytest.raises(TypeError, match=r"not known.*protect\(0, "):
        mem.snapshot()
    mem.protect(PAGE, PAGE, "r")
    check_known(mem, ["rw", "r", "rw", "rw", "rw", "r", "rw", "rw"])


def test_if_every_undo_is_refused_the_access_of_all_requested_pages_is_unknown():
    with linmem.create(100 * PAGE) as mem:
        with failing(1, OUT_OF_MEMORY, 1 << 20), pytest.raises(linmem.PageError, match="protect"):
            mem.protect(10 * PAGE, 80 * PAGE, "none")
        for page in range(100):
            if 10 <= page < 90:
                with pytest.raises(ValueError, match="is not known"):
                    mem[page * PAGE]
            else:
                mem[page * PAGE] = 1
        mem.protect(0, 100 * PAGE, "rw")
        mem.snapshot()


# -- exports -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("accesses", [["r"], ["none", "r"], PROTECTED[1:]])
def test_a_memory_of_which_no_byte_can_be_written_exports_read_only(mem, accesses):
    before = memoryview(mem)
    for page in range(SIZE // PAGE):
        assert not memoryview(mem).readonly
        mem.protect(page * PAGE, PAGE, accesses[page % len(accesses)])
    for made in (memoryview(mem), mem.view(), mem.view("<u4"), mem.view(">I"), mem.view("d")):
        assert made.readonly
    for wants_to_write in (ctypes.c_char.from_buffer, io.BytesIO(b"abc").readinto):
        with pytest.raises((BufferError, TypeError), match=r"not writable|read-write"):
            wants_to_write(mem)
    assert not before.readonly
    mem.protect(0, PAGE, "rw")
    assert not memoryview(mem).readonly
    ctypes.c_char.from_buffer(mem).value = b"w"
    assert mem[0] == ord("w")
    mem.protect(0, PAGE, "r")
    mem.grow_to(SIZE + 1)
    assert not memoryview(mem).readonly, "the new page can be written"


@requires("numpy")
def test_arrays_on_a_read_only_memory_are_not_writable(mem):
    import numpy as np
    mem.protect(0, SIZE, "r")
    for array in (np.asarray(mem), np.frombuffer(mem, "<u4"), np.asarray(mem.view(">I"))):
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        np.asarray(mem).flags.writeable = True
    with linmem.create(SIZE) as other:
        other.write(0, np.asarray(mem))
        assert bytes(other) == bytes(mem)
    mem.protect(0, SIZE, "rw")
    assert np.asarray(mem).flags.writeable


def test_an_empty_memory_exports_as_before():
    with linmem.create(0) as mem:
        mem.protect(0, 0, "r")
        assert not memoryview(mem).readonly


def test_a_view_that_was_writable_faults_when_the_memory_has_become_read_only():
    dies_at(f"import linmem; mem = linmem.create({SIZE}); view = mem.view(); mem.protect(0, {SIZE}, 'r')"
            "; assert view[0] == 0 and not view.readonly", "view[0] = 1")


def test_a_delta_of_a_read_only_memory_keeps_its_bytes_when_the_memory_is_written_again(mem):
    mem.protect(0, SIZE, "r")
    delta = linmem.Delta("", SIZE, SIZE, [(0, SIZE)], [], mem)
    kept = bytes(mem)
    mem.protect(0, SIZE, "rw")
    mem.write(0, bytes(SIZE))
    assert bytes(delta.data) == kept


# -- code --------------------------------------------------------------------------------------------

@requires("code", "x86_64", "real_pages")
def test_code_that_was_written_runs_and_is_never_writable_at_the_same_time():
    assert answer(f"""
import ctypes, linmem
from support import mappings
mem = linmem.create({PAGE})
for number in (42, 7):
    mem.write(0, b"\\xb8" + number.to_bytes(4, "little") + b"\\xc3")      # mov eax, number; ret
    mem.protect(0, {PAGE}, "rx")
    assert [m.access for m in mappings(mem.as_ptr(), mem.as_ptr() + {PAGE})] == ["r-xp"]
    print(ctypes.CFUNCTYPE(ctypes.c_int)(mem.as_ptr())())
    try:
        mem[1] = 0
    except ValueError as error:
        assert "'rx'" in str(error), error
    else:
        raise AssertionError("code was written")
    mem.protect(0, {PAGE}, "rw")
""").split() == ["42", "7"]


@requires("code", "regions")
@pytest.mark.parametrize("reset", ["adaptive", "scan", "zero", "discard"])
@pytest.mark.parametrize("below", [0, 1])
def test_a_pool_hands_no_page_on_that_was_code(reset, below):
    if reset == "scan" and not NEEDS["scans"][0]:
        return
    pool = linmem.PoolingCreator(reset=reset)
    if below:
        pool = linmem.PoolingCreator(pool, reset=reset)
    for size in (2 * PAGE, 4 * PAGE):
        mem = pool.create(2 * PAGE, 8 * PAGE)
        mem.grow_to(size)
        mem.write(0, b"\xc3" * size)
        mem.protect(PAGE, size - PAGE, "rx")
        assert accessible_parts(mem)[-1] == (PAGE, size, "r-xp")
        base = mem.as_ptr()
        mem.close()
        assert all("x" not in m.access for m in mappings(base, base + 8 * PAGE))
        with pool.create(2 * PAGE, 8 * PAGE) as again:
            assert again.as_ptr() == base
            assert accessible_parts(again) == [(0, 2 * PAGE, "rw-p")]
            assert not any(again)
            again.grow_to(4 * PAGE)
            assert accessible_parts(again) == [(0, 4 * PAGE, "rw-p")]
            assert not any(again)
    pool.trim()


def test_a_slot_whose_python_memory_is_protected_is_discarded():
    inner = []

    class Mine(linmem.MemoryCreator):
        def new_memory(self, *how):
            inner.append(linmem.MmapCreator().new_memory(*how))
            return inner[-1]

    pool = linmem.PoolingCreator(linmem.PythonCreator(Mine()))
    mem = pool.create(SIZE, SIZE)
    inner[0].protect(0, PAGE, "none")
    mem.close()
    inner[0].close()
    with pool.create(SIZE, SIZE) as again:
        again.write(0, bytes(SIZE))
    for made in inner[1:]:
        made.close()
    pool.trim()


# -- creators in Python --------------------------------------------------------------------------------

@pytest.mark.parametrize("access", PROTECTED)
@pytest.mark.parametrize("image", [None, IMAGE], ids=["zeros", "image"])
def test_a_protected_memory_that_a_python_creator_returns_is_refused(access, image):
    made = []

    class Mine(linmem.MemoryCreator):
        def new_memory(self, *how):
            made.append(linmem.MmapCreator().new_memory(*how))
            made[-1].protect(AT, PAGE, access)
            return made[-1]

    with pytest.raises(ValueError, match="got one with protected pages"):
        linmem.PythonCreator(Mine()).create(SIZE, SIZE, image=image)
    made[0].close()


def test_wasm_gets_no_memory_that_a_python_creator_protected():
    wasmtime = pytest.importorskip("wasmtime")
    import linmem.wasmtime
    made = []

    class Mine(linmem.MemoryCreator):
        def new_memory(self, *how):
            made.append(linmem.MmapCreator().new_memory(*how))
            made[-1].protect(0, PAGE, "r")
            return made[-1]

    config = wasmtime.Config()
    linmem.wasmtime.install(config, Mine())
    engine = wasmtime.Engine(config)
    store = wasmtime.Store(engine)
    with pytest.raises(wasmtime.WasmtimeError, match="got one with protected pages"):
        wasmtime.Instance(store, wasmtime.Module(engine, "(module (memory 1))"), [])
    store.close()
    for one in made:
        one.close()


# -- threads and forks ---------------------------------------------------------------------------------

def test_a_call_of_another_thread_raises_and_never_faults_while_pages_are_protected():
    assert answer(f"""
import sys, threading, linmem
sys.setswitchinterval(1e-5)
mem, source = linmem.create({64 * PAGE}), bytes({64 * PAGE})
counts = {{}}
done = threading.Event()

def repeat(name, call):
    worked = refused = 0
    while not done.is_set():
        try:
            call()
            worked += 1
        except ValueError:
            refused += 1
    counts[name] = worked, refused

calls = {{"read": lambda: mem.read(0, len(mem)), "few": lambda: mem.read({PAGE}, 8), "item": lambda: mem[{PAGE}],
         "write": lambda: mem.write(0, source), "set": lambda: mem.__setitem__({PAGE}, 1)}}
threads = [threading.Thread(target=repeat, args=item) for item in calls.items()]
for thread in threads:
    thread.daemon = True
    thread.start()
for _ in range(400):
    mem.protect(0, len(mem), "none")
    mem.protect(0, len(mem), "rw")
done.set()
for thread in threads:
    thread.join()
assert sorted(counts) == sorted(calls)
print("alive")
""") == "alive"


@pytest.mark.parametrize("use", ["mem[::2]", "mem.__setitem__(slice(None, None, 2), half)"])
def test_a_slice_with_a_step_raises_and_never_faults_while_another_thread_protects_pages(use):
    assert answer(f"""
import sys, threading, linmem
sys.setswitchinterval(1e-5)
mem, half = linmem.create(1 << 20), bytes(1 << 19)
done = threading.Event()

def protect():
    while not done.is_set():
        mem.protect(0, len(mem), "none")
        mem.protect(0, len(mem), "rw")

threads = [threading.Thread(target=protect, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(3000):
    try:
        {use}
    except ValueError:
        pass
done.set()
for thread in threads:
    thread.join()
print("alive")
""") == "alive"


def test_data_that_begin_before_a_memory_with_protected_pages_are_refused():
    assert answer(f"""
        import ctypes, linmem
        with linmem.create({2 * PAGE}) as mem, linmem.create({3 * PAGE}) as other:
            mem.protect(0, {PAGE}, "none")
            data = (ctypes.c_char * {2 * PAGE}).from_address(mem.as_ptr() - {PAGE})
            try:
                other.write(0, data)
            except ValueError as error:
                print("protect(0, " in str(error))
        """) == "True"


@pytest.mark.parametrize("fork", whichever(("fork", "os.fork")))
def test_a_child_that_is_forked_within_protect_raises_until_it_protects_anew(fork):
    assert answer(FORKING + f"""
import linmem
size = {16 * PAGE}
mem = linmem.create(size)
done = threading.Event()

def toggle():
    while not done.is_set():
        mem.protect(0, size, "none")
        mem.protect({PAGE}, {PAGE}, "rw")
        mem.protect(0, size, "rw")

def work():
    for call in (mem.snapshot, lambda: mem[0], lambda: mem.write({PAGE}, b"a"), lambda: memoryview(mem).release()):
        try:
            call()
        except (TypeError, ValueError) as error:
            assert "protect(0, " in str(error), error
    mem.protect({2 * PAGE}, {PAGE}, "r")
    assert mem[{2 * PAGE}] == 0
    mem.protect(0, size, "rw")
    mem.write(0, b"w" * size)
    assert bytes(mem.snapshot()) == b"w" * size

thread = threading.Thread(target=toggle, daemon=True)
thread.start()
for _ in range(200):
    child({fork}, work)
done.set()
thread.join()
mem.protect(0, size, "rw")
assert mem.read(0, size) == bytes(size)
print("alive")
""") == "alive"


def test_protect_does_not_wait_for_a_thread_that_waits_for_it(mem):
    barrier = threading.Barrier(4)

    def use(access):
        barrier.wait()
        for n in range(200):
            mem.protect(n % 8 * PAGE, PAGE, access)
            for call in (mem.snapshot, lambda: mem.read(0, SIZE), lambda: mem.write(0, mem), mem.info):
                try:
                    call()
                except (TypeError, ValueError):
                    pass

    threads = [threading.Thread(target=use, args=(access,)) for access in ("none", "r", "rw", "rw")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    mem.protect(0, SIZE, "rw")
    mem.write(0, bytes(SIZE))
