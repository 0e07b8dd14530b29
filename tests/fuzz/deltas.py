"""Deltas, made and composed, compared with byte strings."""

from __future__ import annotations

import pickle

from linmem import Delta

from .choices import Choices

DIGESTS = ("00" * 32, "11" * 32, "22" * 32)


def in_order_and_apart(parts, bound):
    ends = [0, *(offset + size for offset, size in parts)]
    return (all(size > 0 for _, size in parts)
            and all(offset >= end for (offset, _), end in zip(parts, ends, strict=False))
            and ends[-1] <= bound)


def make(c: Choices, base: str, base_size: int, number) -> Delta | None:
    size = number()
    ranges = [(number(), number()) for _ in range(c.below(4))]
    zeros = [(number(), number()) for _ in range(c.below(4))]
    if c.flag():        # mostly sorted, so that few deltas are refused
        ranges.sort()
        zeros.sort()
    total = sum(n for _, n in ranges)
    data = (c.bytes(min(max(total, 0), 64)) or b"\1") * 64
    data = data[:min(max(total, 0), 64) + (c.byte() == 255)]
    valid = (min(size, base_size) >= 0 and max(size, base_size) < 1 << 64 and len(data) == total
             and all(in_order_and_apart(parts, size) for parts in (ranges, zeros, sorted(ranges + zeros))))
    try:
        made = Delta(base, base_size, size, ranges, zeros, data, c.pick((None, *DIGESTS)))
    except (ValueError, OverflowError):
        assert not valid
        return None
    assert valid
    assert (made.ranges, made.zeros, bytes(made.data), made.nbytes) == (tuple(ranges), tuple(zeros), data, len(data))
    return made


def applied(delta: Delta, content: bytes) -> bytes:
    out = bytearray(content[:delta.size].ljust(delta.size, b"\0"))
    end = 0
    for offset, size, data in delta.pieces():
        assert offset >= end
        end = offset + size
        assert data is None or len(data) == size
        out[offset:end] = bytes(size) if data is None else data
    assert len(out) == delta.size
    return bytes(out)


def one(data: bytes) -> None:
    c = Choices(data)
    if c.flag():
        while c.more:
            make(c, c.pick(DIGESTS), c.number(), c.number)
        return
    content = bytes(1 + i % 255 for i in range(c.below(64)))
    whole, expected = None, content
    for _ in range(4):
        step = make(c, whole.target or DIGESTS[0] if whole else c.pick(DIGESTS), len(expected), lambda: c.below(64))
        if step is None:
            continue
        assert pickle.loads(pickle.dumps(step, c.pick((2, 4, 5)))) == step
        expected = applied(step, expected)
        whole = step if whole is None else whole | step
        assert (whole.size, whole.base_size, whole.target) == (len(expected), len(content), step.target)
        assert applied(whole, content) == expected
        for other in DIGESTS:
            stranger = Delta(other, len(expected) + c.below(2), 0, (), (), b"")
            fits = stranger.base_size == whole.size and whole.target in (None, other)
            try:
                whole.then(stranger)
            except ValueError:
                assert not fits
            else:
                assert fits
