"""The pure functions: the layout of memories, the size of a reservation, the pool's policy, element formats."""

from __future__ import annotations

import re
import struct

import linmem
from linmem._core.element_formats import resolve
from linmem._core.memory import _choose_reservation, _lay_out, _room_to_choose
from linmem._core.pool import _Policy

from .choices import TOP, Choices


def up(n, unit):
    return -(-n // unit) * unit


def layout(c: Choices) -> None:
    minimum, reservation, guard = c.word(), c.word(), c.word()
    page = c.pick((4096, 16384, 65536))
    after = up(guard, page)
    before = max(after, page)
    capacity = up(max(minimum, reservation, 1), page)
    found = _lay_out(minimum, reservation, guard, page)
    if before + capacity + after > 2**63 - 1:
        assert found is None
    else:
        assert found == {"pre_guard": before, "accessible": up(minimum, page), "capacity": capacity, "guard": after,
                         "total": before + capacity + after}


def reservation(c: Choices) -> None:
    minimum, maximum = c.word(), c.word()
    space = 1 << c.pick((38, 39, 46, 47, 56))
    left, asked, chosen = min(c.word(), space), min(c.word(), 1 << 57), min(c.word(), 1 << 57)
    others, memory = min(c.word(), 1 << 40), c.word()
    unasked = max(space - asked, 0)
    if left < space:
        unasked = min(unasked, left + chosen)
    room = max(unasked // 2 - chosen, 0)
    assert _room_to_choose(space, left, asked + chosen, chosen) == room
    bounded = maximum != TOP
    if bounded:
        minimum = min(minimum, maximum)
    found = _choose_reservation(minimum, maximum if bounded else None, room, others, memory)
    if bounded and maximum - minimum <= room // 2:
        assert found == maximum
        return
    share = room // 4 // (others + 2)
    if memory and share > 4 * memory:
        share = 4 * memory
    if share < 1 << 20:
        share = 1 << 20 if room >= 1 << 20 else 0
    if share + minimum > TOP:
        share = 0
    assert found == minimum + (min(share, maximum - minimum) if bounded else share)


def policy(c: Choices) -> None:
    """After any history, one use is repeated: no dirty page is ever handed out, and pages that the use touches again
    stay resident."""
    fault, scan = 8 + c.below(57), 4 + c.below(61)
    slot = _Policy(fault, scan)
    n = 1 + c.below(4096)
    most = c.pick((1 << 30, 0, 16, n))
    resident: set[int] = set()
    blind = 0           # discards in a row
    uses = 0

    def use(dirty: set[int], most: int) -> bool:
        nonlocal resident, blind, uses
        resident |= dirty
        uses += 1
        how = slot.begin(n)
        if how == "discard":
            blind += 1
            assert blind <= 128, "nobody looks any more"
        else:
            blind = 0
        if how == "zero":
            assert n <= scan or most >= n or len(resident) > most, "kept more than it may"
            resident = set(range(n))
            return True
        if how == "scan":
            assert n > scan or uses <= n, "a small range is looked at for ever"
            bound = slot.bound(n)
            found = min(len(resident), bound + 1)
            if slot.end(n, found, most) and found <= bound:
                assert found == len(resident), "kept pages that were not zeroed"
                assert found <= most, "kept more than it may"
                return True
        slot.given_back()
        resident = set()
        return False

    for _ in range(64):
        if not c.more:
            break
        first, count, step = c.below(n), c.below(min(n, 256) + 1), 1 + c.below(4)
        for _ in range(1 + c.below(8)):
            use({(first + i * step) % n for i in range(count)}, most)
    same = set(range(min(n, 1 + c.below(16))))
    kept = [use(same, 1 << 30) for _ in range(600)]
    assert sum(kept[-200:]) >= 180, "pages that are used again and again are given back"


NUMBERS = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)\Z")


def formats(c: Choices) -> None:
    import numpy

    text = c.bytes(1 + c.below(24)).decode("latin-1")
    if c.flag():
        text = c.pick("<>=|@!") + text
    try:
        given, size, castable = resolve(text)
    except (ValueError, TypeError):
        assert not NUMBERS.match(text)
        return
    assert size > 0
    assert given.lstrip("<>") in ("Zf", "Zd") or struct.calcsize(given) == size
    if NUMBERS.match(text):
        assert numpy.dtype(text).itemsize == size
    if size <= 4096:
        raw = bytes(range(256)) * (-(-2 * size // 256))
        with linmem.create(len(raw), reserve=0) as mem:
            mem.write(0, raw)
            with mem.view(text, 1, 1) as view:
                assert (view.itemsize, view.nbytes, len(view), view.format) == (size, size, 1, given)
                assert view.tobytes() == raw[1:1 + size]
                if castable:
                    assert view.tolist()[0] in (struct.unpack(given, raw[1:1 + size])[0], view[0])
                if NUMBERS.match(text):
                    found = numpy.asarray(view)
                    assert found.tobytes() == raw[1:1 + size]
                    assert found.dtype == numpy.dtype(text)


def one(data: bytes) -> None:
    c = Choices(data)
    c.pick((layout, reservation, policy, formats))(c)
