"""Random histories of one memory against a bytearray."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support import NEEDS, PAGE

import linmem

SIZES = st.one_of(st.sampled_from([0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 8 * PAGE]), st.integers(0, 12 * PAGE))
DATA = st.binary(min_size=1, max_size=64)


class History(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.mem = None

    @initialize(minimum=SIZES, room=st.none() | SIZES, reserve=st.none() | SIZES, limited=st.booleans(),
                may_move=st.booleans())
    def create(self, minimum, room, reserve, limited, may_move):
        self.limit = linmem.creator("limiting", limit_bytes=1 << 30) if limited else None
        self.maximum = None if room is None else minimum + room
        self.mem = linmem.create(minimum, self.maximum, reserve=reserve, creator=self.limit, may_move=may_move)
        self.may_move = may_move
        self.model = bytearray(minimum)
        self.views = []
        self.protected = {}

    @rule(size=SIZES)
    def grow(self, size):
        size += len(self.model) // 2
        old, before = self.mem.as_ptr(), self.mem.info()
        try:
            self.mem.grow_to(size)
        except ValueError:
            assert size < len(self.model)
        except linmem.GrowError:
            too_large = self.maximum is not None and size > self.maximum
            stays = self.touched(0, len(self.model)) or not self.may_move
            assert too_large or (stays and size > before.byte_capacity)
        except BufferError:
            assert self.views
            assert size > before.byte_capacity
        else:
            assert size >= len(self.model)
            assert self.mem.as_ptr() == old or (self.may_move and size > before.byte_capacity)
            self.model.extend(bytes(size - len(self.model)))
            return
        assert self.mem.info() == before

    def touched(self, offset, size):
        return {page for page, access in self.protected.items()
                if size and access != "rw" and page * PAGE < offset + size and (page + 1) * PAGE > offset}

    @rule(at=st.integers(0, 2**32), data=DATA)
    def write(self, at, data):
        at %= len(self.model) + 1
        if at + len(data) > len(self.model) or self.touched(at, len(data)):
            with pytest.raises(ValueError):
                self.mem.write(at, data)
        else:
            self.mem.write(at, data)
            self.model[at:at + len(data)] = data

    @precondition(lambda self: self.model)
    @rule(at=st.integers(0, 2**32), byte=st.integers(0, 255))
    def store(self, at, byte):
        at %= len(self.model)
        if self.touched(at, 1):
            with pytest.raises(ValueError, match="has the access 'r'"):
                self.mem[at - len(self.model)] = byte
        else:
            self.mem[at - len(self.model)] = byte
            self.model[at] = byte

    @rule(a=SIZES, b=SIZES, step=st.sampled_from([None, 1, 2, -1, 7]))
    def read(self, a, b, step):
        assert self.mem[a:b:step] == self.model[a:b:step]

    @rule(format=st.sampled_from(["B", "I", ">I"]))
    def view(self, format):
        if len(self.views) < 4:
            self.views.append(self.mem.view(format))

    @precondition(lambda self: self.views)
    @rule(which=st.integers(0, 3))
    def release(self, which):
        self.views.pop(which % len(self.views)).release()

    @precondition(lambda self: self.views)
    @rule(which=st.integers(0, 3))
    def views_show_the_bytes(self, which):
        view = self.views[which % len(self.views)]
        assert view.tobytes() == self.model[:view.nbytes]

    @rule(offset=SIZES, size=st.none() | SIZES)
    def discard(self, offset, size):
        offset = min(offset, len(self.model))
        size = None if size is None else min(size, len(self.model) - offset)
        end = len(self.model) if size is None else offset + size
        if self.touched(offset, end - offset):
            if not NEEDS["discard_any_protection"][0]:
                with pytest.raises(TypeError, match="protected pages"):
                    self.mem.discard(offset, size)
                return
            if offset % PAGE or (end % PAGE and end != len(self.model)):
                with pytest.raises(ValueError, match="with protected pages"):
                    self.mem.discard(offset, size)
                return
        self.mem.discard(offset, size)
        self.model[offset:end] = bytes(end - offset)

    @rule(page=st.integers(0, 11), access=st.sampled_from(["r", "rw"]))
    def protect(self, page, access):
        if (page + 1) * PAGE <= len(self.model):
            self.mem.protect(page * PAGE, PAGE, access)
            self.protected[page] = access

    @rule()
    def unprotect(self):
        for page in self.protected:
            self.mem.protect(page * PAGE, PAGE, "rw")
            self.protected[page] = "rw"

    @rule()
    def prefault(self):
        if self.touched(0, len(self.model)):
            with pytest.raises((linmem.PageError, TypeError)):
                self.mem.prefault()
        else:
            self.mem.prefault()

    @rule()
    def snapshot(self):
        assert bytes(self.mem.snapshot()) == self.model

    @invariant()
    def the_map_holds(self):
        if self.mem is None:
            return
        info = self.mem.info()
        assert info.byte_size == len(self.mem) == len(self.model) <= info.committed <= info.byte_capacity
        assert info.committed % PAGE == info.base % PAGE == 0
        assert info.exports == len(self.views)
        if self.limit is not None:
            assert self.limit.used_bytes == info.committed

    def teardown(self):
        if self.mem is None:
            return
        assert bytes(self.mem) == self.model
        if self.views:
            with pytest.raises(BufferError, match=rf"{len(self.views)} exported"):
                self.mem.close()
        for view in self.views:
            view.release()
        self.mem.close()
        if self.limit is not None:
            assert self.limit.used_bytes == 0


TestHistory = History.TestCase
