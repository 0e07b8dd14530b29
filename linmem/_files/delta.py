"""`Delta`: the changes from one image to the next, as offsets and bytes."""

from __future__ import annotations

import itertools

from linmem._core import arguments
from linmem._core.arguments import check_bytes, check_pairs, check_path, check_size, show_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, SupportsIndex

    from linmem._core.arguments import AnyPath

    Piece = tuple[int, int, "memoryview | None"]


_PAGE = 4096            # bytes in a page of a saved delta
_MAX_ZEROED = 1 << 36   # bytes; the table entries for so many zeros take about a second to write


class Delta:
    """The bytes to write over one image, the base, to get another image; immutable.

    `Image.diff` makes deltas. `Memory.apply` and `Image.apply` use them. Deltas compose: ``a | b`` has the effect of
    `a` and then `b`.

    Attributes
    ----------
    base : str
        The digest of the base.
    base_size : int
        Bytes of a memory of the base.
    size : int
        Bytes of the memory after the delta is applied.
    target : str or None
        The digest of the resulting image, if it is known.
    offset : int
        Where the resulting image begins in the memory. The image ends where the memory ends.
    ranges : tuple of (int, int)
        Offset and size in bytes of each range that is written; the ranges ascend and do not overlap.
    zeros : tuple of (int, int)
        The same for the ranges that become zero.
    data : memoryview
        The bytes of all `ranges`, one after the other; read-only.
    """

    __slots__ = ("base", "base_size", "data", "offset", "ranges", "size", "target", "zeros")

    base: str
    base_size: int
    size: int
    target: str | None
    offset: int
    ranges: tuple[tuple[int, int], ...]
    zeros: tuple[tuple[int, int], ...]
    data: memoryview

    # __new__ instead of __init__: a delta is complete as soon as it exists, and a call of __init__ cannot change it.
    def __new__(cls, base: str, base_size: SupportsIndex, size: SupportsIndex,
                ranges: Iterable[tuple[SupportsIndex, SupportsIndex]],
                zeros: Iterable[tuple[SupportsIndex, SupportsIndex]], data: Any, target: str | None = None,
                offset: SupportsIndex = 0) -> Delta:
        if not isinstance(base, str):
            raise TypeError(f"base must be a str, got {type(base).__name__}")
        if target is not None and not isinstance(target, str):
            raise TypeError(f"target must be a str or None, got {type(target).__name__}")
        base_size, size = check_size(base_size, "base_size"), check_size(size, "size")
        offset = check_size(offset, "offset", f"within the memory's {size} bytes")
        if offset > size:
            raise ValueError(f"offset must be within the memory's {size} bytes, got {offset}")
        kept = check_bytes(data, "data")
        # The delta must not change later. The buffer of a memory is read-only only until `Memory.protect` is called.
        if arguments.shows_protected(kept) or not kept.readonly:
            kept = memoryview(bytes(kept))
        ranges, zeros = _checked("ranges", ranges, size), _checked("zeros", zeros, size)
        total = sum(length for _, length in ranges)
        if total != kept.nbytes:
            raise ValueError(f"data must have the {total} bytes of the ranges, got {kept.nbytes}")
        for (start, length), (following, _) in itertools.pairwise(sorted(ranges + zeros)):
            if start + length > following:
                raise ValueError(f"ranges and zeros must not overlap, and do at {following}")
        self = super().__new__(cls)
        fields = {"base": base, "base_size": base_size, "size": size, "target": target, "offset": offset,
                  "ranges": ranges, "zeros": zeros, "data": kept}
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Delta is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Delta is immutable: cannot delete {name!r}")

    def pieces(self) -> Iterator[Piece]:
        """Offset, size, and the bytes (None: zeros) of every part, in order."""
        written: list[Piece] = []
        start = 0
        for offset, size in self.ranges:
            written.append((offset, size, self.data[start:start + size]))
            start += size
        return iter(_in_order(written, ((offset, size, None) for offset, size in self.zeros)))

    def then(self, later: Delta) -> Delta:
        """One delta that has the effect of this one and then of `later`.

        Raises
        ------
        ValueError
            If `later` is known to start from another image than the result of this delta.
        """
        from linmem._files.format import joined

        if not isinstance(later, Delta):
            raise TypeError(f"later must be a Delta, got {type(later).__name__}")
        if later.base_size != self.size or (self.target is not None and self.target != later.base):
            raise ValueError(f"later must start from the image that this delta leads to ({self.size} bytes, digest"
                             f" {self.target}), and starts from {later.base_size} bytes, digest {later.base}")
        over = list(later.pieces())
        # `later` starts from an image whose bytes past `self.size` are zero. The base may have other bytes there, so
        # the joined delta must zero them. In a file, a range of zeros must end at the end of a page. This is possible,
        # because all bytes past the end of the base are zero anyway.
        reached = self.size in (sum(part) for part in self.ranges[-1:] + self.zeros[-1:])
        if self.base_size > self.size or reached:
            end = min(-(-max(self.base_size, self.size) // _PAGE) * _PAGE, later.size)
            if end > self.size:
                over = _in_order(_outside([(self.size, end - self.size, None)], over, later.size), over)
        ranges: list[tuple[int, int]] = []
        zeros: list[tuple[int, int]] = []
        parts: list[bytes | memoryview] = []
        for offset, size, data in _in_order(_outside(self.pieces(), over, later.size), over):
            if data is None and ranges and sum(ranges[-1]) == offset and offset % _PAGE:
                # A file has whole pages: zeros that follow written bytes in a page become written bytes.
                lead = min(size, _PAGE - offset % _PAGE)
                parts.append(bytes(lead))
                ranges.append((offset, lead))
                offset, size = offset + lead, size - lead
            if data is not None:
                ranges.append((offset, size))
                parts.append(data)
            elif size:
                zeros.append((offset, size))
        return Delta(self.base, self.base_size, later.size, joined(ranges), joined(zeros), b"".join(parts),
                     later.target, later.offset)

    def __or__(self, later: object) -> Delta:
        return self.then(later) if isinstance(later, Delta) else NotImplemented

    @property
    def nbytes(self) -> int:
        """The number of bytes in `data`."""
        return self.data.nbytes

    def save(self, path: AnyPath) -> None:
        """Write the delta to a file, in the way of `Image.save`.

        Raises
        ------
        ValueError
            If a range is not of whole blocks of 4096 bytes. The ranges of `Image.diff`, and of a chain of such
            deltas, are of whole blocks. Also if the delta zeroes more than 64 GiB, which a chain over images that
            begin far apart may do.
        OSError
            The old file, if there is one, is unchanged.
        """
        from linmem._files.format import DELTA, NO_DIGEST, Header
        from linmem._files.writer import write

        path = check_path(path)
        zeroed = sum(size for _, size in self.zeros)
        if zeroed > _MAX_ZEROED:
            raise ValueError(f"a saved delta may zero at most {_MAX_ZEROED} bytes, because its file has an entry for"
                             f" each 65536 of them, and this delta zeroes {zeroed}")
        for start, size, _ in self.pieces():
            if start % _PAGE or ((start + size) % _PAGE and start + size != self.size):
                raise ValueError(f"only deltas of whole pages of {_PAGE} bytes can be saved, and this one has"
                                 f" {size} bytes at {start}")
        write(path, Header(kind=DELTA, size=self.size, base_size=self.base_size, base_digest=bytes.fromhex(self.base),
                           digest=NO_DIGEST if self.target is None else bytes.fromhex(self.target),
                           target_offset=self.offset), self.pieces)

    @staticmethod
    def open(path: AnyPath, *, max_size: SupportsIndex | None = None) -> Delta:
        """Read the delta in a file and check it as a whole.

        Parameters
        ----------
        path : path-like
            A file that `save` wrote, on any machine.
        max_size : int, optional
            Bytes; a delta for a larger memory is refused.

        Raises
        ------
        FileFormatError
            The file is not a saved delta, or it is damaged.
        OSError
            The file cannot be read.
        """
        from linmem._files.format import DELTA, NO_DIGEST, joined
        from linmem._files.reader import open_file, pieces, read

        bound = None if max_size is None else check_size(max_size, "max_size")
        path = check_path(path)
        ranges: list[tuple[int, int]] = []
        zeros: list[tuple[int, int]] = []
        data = bytearray()
        with open_file(path) as file:
            contents = read(file, path, DELTA, bound)
            for start, size, part in pieces(file, contents):
                (zeros if part is None else ranges).append((start, size))
                data += part or b""
        header = contents.header
        target = None if header.digest == NO_DIGEST else header.digest.hex()
        return Delta(header.base_digest.hex(), header.base_size, header.size, joined(ranges), joined(zeros),
                     memoryview(data).toreadonly(), target, header.target_offset)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        # From protocol 5 on, the bytes can be passed beside the pickle, without a copy.
        if int(protocol) >= 5:
            from pickle import PickleBuffer

            data: object = PickleBuffer(self.data)
        else:
            data = bytes(self.data)
        return Delta, (self.base, self.base_size, self.size, self.ranges, self.zeros, data, self.target,
                       self.offset)

    def _key(self) -> tuple[object, ...]:
        return self.base, self.base_size, self.size, self.target, self.offset, self.ranges, self.zeros

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Delta):
            return NotImplemented
        return self._key() == other._key() and self.data.tobytes() == other.data.tobytes()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        n = len(self.ranges) + len(self.zeros)
        return (f"<linmem.Delta: {n} range{'s' * (n != 1)} of {show_size(self.nbytes)}, of a memory of"
                f" {show_size(self.size)}>")


def _checked(name: str, given: Iterable[tuple[SupportsIndex, SupportsIndex]],
             bound: int) -> tuple[tuple[int, int], ...]:
    kept = tuple(check_pairs(given, name, f"within {bound} bytes"))
    end = 0
    for offset, size in kept:
        if size <= 0 or offset < end or offset + size > bound:
            raise ValueError(f"{name} must be in order, apart and within {bound} bytes, got {(offset, size)}")
        end = offset + size
    return kept


def _in_order(*groups: Iterable[Piece]) -> list[Piece]:
    return sorted((piece for group in groups for piece in group), key=lambda piece: piece[0])


def _outside(pieces: Iterable[Piece], over: list[Piece], bound: int) -> Iterator[Piece]:
    """The parts of the pieces below `bound` that `over` does not cover. Both ascend and do not overlap."""
    i = 0
    for offset, size, data in pieces:
        start, end = offset, min(offset + size, bound)
        while start < end:
            while i < len(over) and over[i][0] + over[i][1] <= start:
                i += 1
            stop = min(end, over[i][0]) if i < len(over) else end
            if stop > start:
                yield start, stop - start, None if data is None else data[start - offset:stop - offset]
            start = end if stop == end else over[i][0] + over[i][1]


def bytes_after(delta: Delta, base: Iterable[tuple[int, memoryview]]) -> Iterator[tuple[int, memoryview]]:
    """The bytes of the image that the delta makes of a base with the bytes `base`: (offset, bytes), ascending.

    Raises
    ------
    ValueError
        Bytes before the resulting image would not be zero.
    """
    written = list(delta.pieces())
    kept = _outside(((start, len(data), data) for start, data in base), written, delta.size)
    for start, size, data in _in_order(kept, written):
        if data is None:
            continue
        lead = min(max(delta.offset - start, 0), size)
        if data[:lead].tobytes().strip(b"\0"):
            raise ValueError(f"the delta leaves bytes that are not zero at {start}, before the image that it leads"
                             f" to, which begins at {delta.offset}")
        if lead < size:
            yield start + lead, data[lead:]
