"""The steps of a soak that make, use and save images and deltas."""

from __future__ import annotations

import os
import pickle

import linmem
from soak.checks import GUARD, PAGE, must, same
from soak.memories import Held
from soak.memory_steps import MAX_HELD


class ImageSteps:
    """Steps of a `Worker`."""

    def clone(self) -> None:
        held = self.pick()
        if held is None:
            return
        image, frozen = held.mem.snapshot(), bytes(held.model)
        same(image, frozen, f"the image of a memory of {held.maker.name!r}")
        maker = self.rng.choice(self.soak.makers)
        try:
            mem = image.new_memory(creator=maker.creator, reserve=self.rng.choice((0, 64 * PAGE)), may_move=True,
                                   guard=GUARD if maker.ours else 0)
        except (linmem.LimitError, linmem.PoolError):
            must(maker.bounded, f"{maker.name!r} has no bound, and said that it is reached")
            return
        made = Held(mem, bytearray(frozen), maker, image=image, frozen=frozen)
        made.check()
        held.image, held.frozen = image, frozen
        self.held.append(made)
        if len(self.held) > MAX_HELD:
            self.close()

    def restore(self) -> None:
        held = self.pick()
        if held is None or held.image is None:
            return
        grown = len(held.model) - len(held.frozen)
        zero_grown = self.rng.random() < 0.7
        try:
            held.mem.restore(held.image, zero_grown=zero_grown)
        except ValueError:
            must(grown and not zero_grown, f"restore refused: grown by {grown}, zero_grown={zero_grown}")
        else:
            must(zero_grown or not grown, "a memory that has grown was restored")
            held.model[:] = held.frozen + bytes(grown)
        held.check()

    def delta(self) -> None:
        held = self.pick()
        if held is None or held.image is None or len(held.model) < len(held.frozen):
            return
        delta = held.image.diff(held.mem)
        mem = held.image.new_memory(reserve=0, may_move=True)
        mem.apply(delta)
        same(mem, held.model, "a memory after a delta")
        mem.close()
        same(held.image.apply(delta), held.model, "an image after a delta")
        again = pickle.loads(pickle.dumps(delta, self.rng.choice((4, 5))))
        must(again == delta, "a delta is another one after a pickle")
        path = self.soak.path(self, "delta")
        delta.save(path)
        must(linmem.Delta.open(path) == delta, "a delta is another one after a file")
        os.unlink(path)

    def file(self) -> None:
        held = self.pick()
        if held is None:
            return
        rng, image = self.rng, held.mem.snapshot()
        path = self.soak.path(self, "image")
        image.save(path, packed=rng.random() < 0.5)
        opened = linmem.Image.open(path, verify=rng.random() < 0.5, map=rng.random() < 0.7)
        same(opened, held.model, "an image that was opened")
        opened.verify()
        must(opened == image, "an image that was opened is another one")
        with opened.new_memory(reserve=0) as mem:
            same(mem, held.model, "a memory of an image that was opened")
            mem.write(0, bytes(len(held.model)))
            mem.restore(opened)
            same(mem, held.model, "a memory restored to an image that was opened")
        del opened
        with open(path, "rb+") as file:
            data = bytearray(file.read())
            at = rng.randrange(len(data))
            data[at] ^= 1 << rng.randrange(8)
            file.seek(0)
            file.write(data)
        try:
            damaged = linmem.Image.open(path, verify=True)
        except linmem.FileFormatError:
            self.counts["damaged files refused"] += 1
        else:
            same(damaged, held.model, f"an image whose file was damaged at {at}")
            del damaged
        os.unlink(path)

    def pickle(self) -> None:
        held = self.pick()
        if held is None:
            return
        buffers: list[pickle.PickleBuffer] = []
        image = held.mem.snapshot()
        again = (pickle.loads(pickle.dumps(image, 4)) if self.rng.random() < 0.5 else
                 pickle.loads(pickle.dumps(image, 5, buffer_callback=buffers.append), buffers=buffers))
        same(again, held.model, "an image after a pickle")
        must(again == image, "an image is another one after a pickle")
