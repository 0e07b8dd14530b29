"""The steps of a soak that make, use and close memories."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import linmem
from soak.checks import GUARD, PAGE, Wrong, must, same
from soak.creators import Maker
from soak.memories import SHAPES, Held

MAX_HELD = 6        # memories that a thread has at a time


class MemorySteps:
    """Steps of a `Worker`."""

    def make(self, maker: Maker) -> Held | None:
        """Make a memory. Returns None when its creator refuses because its bound is reached."""
        least, most, reserve = (None if n is None else n * PAGE for n in self.rng.choice(SHAPES))
        least += self.rng.choice((0, 0, 0, 1, 100))
        most = None if most is None else most + PAGE
        if len(maker.start) > least:
            least, most = len(maker.start), None
        try:
            mem = maker.creator.create(least, most, reserve, GUARD if maker.ours else 0, may_move=True)
        except (linmem.LimitError, linmem.PoolError):
            must(maker.bounded, f"{maker.name!r} has no bound, and said that it is reached")
            self.counts["refused by a bound"] += 1
            return None
        held = Held(mem, bytearray(maker.start) + bytes(least - len(maker.start)), maker)
        same(mem, held.model, f"a fresh memory of {maker.name!r}")
        return held

    def create(self) -> None:
        held = self.make(self.rng.choice(self.soak.makers))
        if held is not None:
            self.held.append(held)
            if len(self.held) > MAX_HELD:
                self.close()

    def grow(self) -> None:
        held = self.pick()
        if held is None:
            return
        rng, mem, size = self.rng, held.mem, len(held.model)
        capacity, maximum = mem.byte_capacity(), mem.maximum_byte_size()
        new = rng.choice((size - 1, size, size + 1, size + PAGE, size + rng.randrange(8 * PAGE), capacity, capacity + 1,
                          capacity + 3 * PAGE))
        if not 0 <= new <= 128 * PAGE:
            return
        try:
            mem.grow_to(new)
        except ValueError:
            must(new < size, f"a growth from {size} to {new} bytes was taken for a shrinking")
        except linmem.LimitError:
            must(held.maker.bounded, f"{held.maker.name!r} has no bound, and said that it is reached")
        except linmem.GrowError:
            stays = held.maker.shared or not held.maker.ours
            must((maximum is not None and new > maximum) or (new > capacity and stays),
                 f"growth to {new} refused: capacity {capacity}, maximum {maximum}, {held.maker.name!r}")
        except BufferError:
            must(held.views and new > capacity, f"growth to {new} refused for {len(held.views)} views: {capacity}")
        else:
            must(new >= size and (maximum is None or new <= maximum), f"grown from {size} to {new} of {maximum}")
            held.model.extend(bytes(new - size))
        held.check()

    def write(self) -> None:
        held = self.pick()
        if held is None:
            return
        rng, model = self.rng, held.model
        at = rng.randrange(len(model) + 1)
        data = rng.randbytes(rng.choice((0, 1, 8, 100, 5000)))
        if at + len(data) > len(model):
            try:
                held.mem.write(at, data)
            except ValueError:
                return
            raise Wrong(f"{len(data)} bytes written at {at} of {len(model)}")
        way = rng.randrange(3)
        if way == 0:
            held.mem.write(at, data)
        elif way == 1:
            held.mem[at:at + len(data)] = data
        else:
            with memoryview(held.mem) as view:
                view[at:at + len(data)] = data
        model[at:at + len(data)] = data

    def read(self) -> None:
        held = self.pick()
        if held is None:
            return
        rng, model = self.rng, held.model
        at = rng.randrange(len(model) + 1)
        size = rng.randrange(len(model) - at + 1)
        what = f"the bytes from {at} on of a memory of {held.maker.name!r}"
        same(held.mem.read(at, size), model[at:at + size], what)
        same(held.mem[at:at + size:3], model[at:at + size:3], what)
        if size:
            must(held.mem[at] == model[at], f"byte {at} is {held.mem[at]}, must be {model[at]}")
        held.check()

    def view(self) -> None:
        held = self.pick()
        if held is not None and len(held.views) < 3:
            held.views.append(held.mem.view(self.rng.choice(("B", "I", ">I", "d", "<u2"))))

    def release(self) -> None:
        held = self.pick()
        if held is not None and held.views:
            held.check()
            held.views.pop(self.rng.randrange(len(held.views))).release()

    def part(self, held: Held) -> tuple[int, int]:
        n = len(held.model) // PAGE
        first = self.rng.randrange(n + 1)
        return first * PAGE, self.rng.randrange(n - first + 1) * PAGE

    def protect(self) -> None:
        held = self.pick()
        if held is None:
            return
        at, size = self.part(held)
        if not held.maker.ours:
            self.unsupported(lambda: held.mem.protect(at, size, "r"))
            return
        # A last page that is not full cannot be protected, so "rw" for the whole memory would fail.
        if len(held.model) % PAGE:
            return
        access = self.rng.choice(("r", "none"))
        held.mem.protect(at, size, access)
        try:
            if access == "r":
                held.check()
        finally:
            self.insist(lambda: held.mem.protect(0, len(held.model), "rw"))
        held.check()

    def unsupported(self, call: Callable[[], object]) -> None:
        try:
            call()
        except TypeError:
            return
        raise Wrong("a page call was done on pages that are not linmem's")

    def discard(self) -> None:
        held = self.pick()
        if held is None:
            return
        at = self.rng.randrange(len(held.model) + 1)
        size = self.rng.randrange(len(held.model) - at + 1)
        if not held.maker.ours:
            self.unsupported(lambda: held.mem.discard(at, size))
            return
        held.mem.discard(at, size)
        held.model[at:at + size] = bytes(size)
        held.check()

    def prefault(self) -> None:
        held = self.pick()
        if held is not None and held.maker.ours:
            held.mem.prefault(*self.part(held))
            held.check()

    def info(self) -> None:
        held = self.pick()
        if held is None:
            return
        info = held.mem.info()
        must(info.byte_size == len(held.model) <= info.byte_capacity, f"sizes of {info}, must be {len(held.model)}")
        must(info.exports == len(held.views), f"{info.exports} exports, must be {len(held.views)}")
        must(info.resident is None or info.resident <= info.committed, f"resident and committed of {info}")

    def close(self) -> None:
        held = self.pick()
        if held is None:
            return
        held.check()
        if held.views:
            try:
                held.mem.close()
            except BufferError:
                must(not held.mem.closed, "a refused close closed a memory")
            else:
                raise Wrong("a memory with views was closed")
        for view in held.views:
            view.release()
        held.mem.close()
        self.held.remove(held)
        try:
            held.mem.byte_size()
        except ValueError:
            return
        raise Wrong("a closed memory has a size")

    def drop(self) -> None:
        """Drop the handle before its views. The views keep the bytes alive."""
        held = self.pick()
        if held is None:
            return
        self.held.remove(held)
        views = held.views
        held.views = held.mem = None
        for view in views:
            same(view.cast("B"), held.model[:view.nbytes], f"a view that outlived a memory of {held.maker.name!r}")

    def cycle(self) -> None:
        held = self.pick()
        if held is not None:
            self.held.remove(held)
            around = [held, held.mem, memoryview(held.mem)]
            around.append(around)

    def collect(self) -> None:
        gc.collect(self.rng.randrange(3))

    def give(self) -> None:
        held = self.pick()
        if held is not None and len(self.soak.exchange) < 2 * self.soak.threads:
            self.held.remove(held)
            self.soak.exchange.append(held)

    def take(self) -> None:
        """Take over a memory that another thread made, wrote and gave away."""
        try:
            held = self.soak.exchange.popleft()
        except IndexError:
            return
        self.held.append(held)
        held.check()

    def common(self) -> None:
        rng, common = self.rng, self.soak.common
        mem, at = common.mem, self.number * PAGE
        try:
            same(mem.read(at, PAGE), common.parts[self.number], "this thread's page of the common memory")
            mark = rng.randbytes(64) * (PAGE // 64)
            mem.write(at, mark)
            common.parts[self.number] = mark
            with contextlib.suppress(BufferError), memoryview(mem) as view:
                same(view[at:at + PAGE], mark, "a view of this thread's page of the common memory")
                if rng.random() < 0.3:
                    mem.grow_to(min(len(view) + PAGE, 256 * PAGE))
            if rng.random() < 0.3:
                with contextlib.suppress(BufferError):
                    mem.grow_to(min(len(mem) + PAGE, 256 * PAGE))
            if rng.random() < 0.01:
                with contextlib.suppress(BufferError):
                    mem.close()
        except ValueError as error:     # another thread closed it, or grew it first
            must(mem.closed or "never shrinks" in str(error), f"the common memory: {error}")
        if mem.closed:
            self.soak.replace_common(common)
