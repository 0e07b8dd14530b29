"""The step of a soak that forks, and what the child does."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import traceback

import linmem
from linmem._os import pages
from soak.checks import must, same
from soak.creators import chain
from soak.guests import WASM_PAGE


class ForkSteps:
    """Steps of a `Worker`."""

    def fork(self) -> None:
        with self.soak.forking, contextlib.ExitStack() as still:
            for worker in self.soak.workers:
                still.enter_context(worker.busy)
            pid = os.fork()
            if pid == 0:
                self.be_a_child()
        self.soak.wait_for(pid)
        self.check()

    def be_a_child(self) -> None:
        """Use everything that was inherited, and end the process."""
        status = 1
        try:
            pages.count_calls_to_failure(0, 0)
            self.use_all()
            if self.rng.random() < 0.2:
                pid = os.fork()
                if pid == 0:
                    self.use_all()
                    os._exit(0)
                must(os.waitpid(pid, 0)[1] == 0, "a child's child failed")
            status = 0
        except BaseException:
            os.write(2, f"in a child of {self.name}:\n{traceback.format_exc()}".encode())
        finally:
            os._exit(status)

    def use_all(self) -> None:
        # The parent ends a child that hangs. If the parent itself has ended after a finding or a crash, this alarm ends
        # the child.
        signal.setitimer(signal.ITIMER_REAL, 2 * self.soak.hang)
        self.check()
        for held in self.held:
            if held.maker.shared:       # the parent would find the bytes that a child writes
                continue
            held.mem.write(0, b"child"[:len(held.model)])
            held.model[:5] = b"child"[:len(held.model)]
            held.check()
        for maker in self.soak.makers:
            held = self.make(maker)
            if held is not None:
                held.mem.write(0, bytes(len(held.model)))
                held.mem.close()
        with self.soak.image.new_memory() as mem:
            same(mem, self.soak.content, "a memory of an inherited image")
        for guest in self.guests:
            guest.check()
            if guest.host.maker.shared:
                continue
            for _ in range(3):
                guest.call("store", 5, 55)
            guest.model[5] = 55
            guest.stores += 3
            if guest.call("grow", 1) != -1:
                guest.model.extend(bytes(WASM_PAGE))
            guest.check()
        self.statistics()
        while self.held:
            self.close()
        for guest in self.guests:
            guest.store.close()
        self.guests.clear()
        for maker in self.soak.makers:
            for one in chain(maker.creator):
                if isinstance(one, linmem.PoolingCreator):
                    one.trim()
        gc.collect()
