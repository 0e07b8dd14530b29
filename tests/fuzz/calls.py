"""The public calls: a random history of memories, images, deltas and creators, each compared with a bytearray."""

from __future__ import annotations

import gc
import os
import pickle
from pathlib import Path

import linmem
from linmem._os import pages

from .choices import TOP, Choices

FLOOR = pages.describe()
PAGE = FLOOR["page_size"]
GRANULE = 4096
LIMIT = 1 << 20                     # bytes that a LimitingCreator allows
SOME = 64 * PAGE                    # bytes; the largest size of a memory
NOWHERE = 1 << 48                   # bytes; more than any address space has
REFUSED = (ValueError, TypeError, OverflowError, IndexError, BufferError, MemoryError)
MAY_MOVE = True                     # whether memories may grow past their capacity
MAPS = Path("/proc/self/maps")
# AddressSanitizer keeps terabytes inaccessible below this address.
SANITIZER_END = 0x640000000000 if "asan" in os.environ.get("LD_PRELOAD", "") else 0


def up(n: int, unit: int = PAGE) -> int:
    return -(-n // unit) * unit


def inaccessible() -> int:
    """Bytes of address space that memories keep inaccessible, as live_bytes() of tests/support.py. Every memory has
    some."""
    # Under Wine, which has no fork, /proc shows the mappings of the host system's kernel.
    if not MAPS.exists() or not hasattr(os, "fork"):
        return 0
    total = 0
    for line in MAPS.read_text().splitlines():
        span, access, *rest = line.split(maxsplit=5)
        if access != "---p":
            continue
        start, end = (int(part, 16) for part in span.split("-"))
        name = rest[3].strip() if len(rest) > 3 else ""
        ours = name == "[anon:linmem]" if FLOOR["capabilities"]["names"] else not name and end - start > PAGE
        if ours and start >= SANITIZER_END:
            total += end - start
    return total


class Upstream(linmem.MemoryCreator):
    """A creator in Python over a native creator."""

    def __init__(self, upstream):
        self.upstream = upstream

    def new_memory(self, ty, minimum, maximum, reserved, guard):
        return self.upstream.new_memory(ty, minimum, maximum, reserved, guard)


class Picture:
    """An image with its expected offset and content."""

    def __init__(self, image: linmem.Image, offset: int, content: bytes) -> None:
        self.image, self.offset, self.content = image, offset, bytes(content)
        assert (image.offset, image.size, len(image)) == (offset, len(content), len(content))
        assert bytes(image) == self.content
        end = 0
        for start, size in image.runs():
            assert start >= end
            assert start % GRANULE == size % GRANULE == 0 < size
            end = start + size

    @property
    def end(self) -> int:
        return self.offset + len(self.content)

    def memory(self, size: int) -> bytearray:
        """The bytes of a new memory of this image."""
        assert size >= self.end
        return bytearray(bytes(self.offset) + self.content).ljust(size, b"\0")


class Held:
    """A memory with its expected state."""

    def __init__(self, mem: linmem.Memory, content: bytearray, maximum: int | None, made_from: Picture | None) -> None:
        self.mem, self.content, self.maximum, self.made_from = mem, content, maximum, made_from
        self.first_size, self.restored_otherwise = len(content), False
        self.views: list[tuple[memoryview, int]] = []
        self.access: dict[int, str] = {}
        self.check()

    def check(self) -> None:
        info = self.mem.info()
        assert info.byte_size == len(self.mem) == len(self.content) <= info.committed <= info.byte_capacity
        assert info.base % PAGE == 0
        assert info.exports == len(self.views)
        assert info.maximum_byte_size == self.maximum
        assert self.mem.wasm_accessible() == range(info.base, info.base + info.byte_capacity + info.guard)
        if not self.kept_from(0, len(self.content), "rw"):
            assert bytes(self.mem) == self.content

    def kept_from(self, offset: int, size: int, access: str) -> bool:
        """Whether an access of this range would fault, so that linmem must refuse the call."""
        wrong = ("none",) if access == "r" else ("none", "r", "rx")
        return any(self.access.get(page) in wrong for page in range(offset // PAGE, up(offset + size) // PAGE))

    @property
    def is_protected(self) -> bool:
        return any(access != "rw" for access in self.access.values())

    @property
    def ours(self) -> bool:
        return self.mem.info().kind != "python"


class History:
    def __init__(self, c: Choices) -> None:
        self.c = c
        self.memories: list[Held] = []
        self.images: list[Picture] = []
        self.deltas: list[linmem.Delta] = []
        self.limits: list[linmem.LimitingCreator] = []
        self.books: list[linmem.StatisticsCreator] = []
        self.pools: list[linmem.PoolingCreator] = []
        self.creators = [self.chain(), None]

    # -- arguments

    def size(self) -> int:
        """A size: often a few pages, sometimes an impossible value."""
        kind = self.c.byte()
        if kind < 128:
            return self.c.unsigned(2) % (12 * PAGE)
        if kind < 224:
            return max(0, self.c.below(13) * PAGE + self.c.byte() % 3 - 1)
        return self.absurd()

    def absurd(self) -> int:
        n = self.c.number()
        return n if n < SOME or n >= NOWHERE else n % SOME

    def data(self) -> bytes:
        part = self.c.bytes(1 + self.c.byte() % 32) or b"\1"
        return part * (1 + (self.c.byte() * PAGE // 16 // len(part) if self.c.flag() else 0))

    def within(self, size: int) -> tuple[int, int]:
        """A range within `size` bytes; often the range ends at the end."""
        start = self.c.unsigned(3) % (size + 1)
        if self.c.flag():
            start = start // PAGE * PAGE
        n = self.c.unsigned(3) % (size - start + 1)
        if self.c.flag():
            n = n // PAGE * PAGE
        return start, n if self.c.flag() else size - start

    def chain(self) -> linmem.MmapCreator:
        made = linmem.creator("mmap", prefault=self.c.byte() > 224)
        for _ in range(self.c.below(4)):
            kind = self.c.below(5)
            if kind == 0:
                made = linmem.LimitingCreator(made, LIMIT)
                self.limits.append(made)
            elif kind == 1:
                made = linmem.StatisticsCreator(made, self.c.below(4))
                self.books.append(made)
            elif kind == 2:
                made = linmem.PythonCreator(Upstream(made))
            else:
                reset = self.c.pick(("adaptive", "zero", "discard", "scan"))
                if reset == "scan" and not FLOOR["capabilities"]["scans"]:
                    reset = "zero"
                made = linmem.PoolingCreator(
                    made, slots=self.c.pick((None, 1, 2, 3)), keep_resident=self.c.pick((64 << 20, 0, PAGE, 5 * PAGE)),
                    max_unused_warm=self.c.pick((100, 0, 1)), reset=reset,
                    when_full=self.c.pick(("fallback", "error")), check=self.c.flag())
                self.pools.append(made)
        return made

    def creator(self):
        return self.c.pick(self.creators)

    # -- memories

    def create(self) -> None:
        if len(self.memories) >= 5:
            self.close()
            return
        minimum = self.size()
        maximum = None if self.c.flag() else minimum + self.size()
        reserve = self.c.pick((0, None, PAGE, 8 * PAGE, -1))
        reserve = self.absurd() if reserve == -1 else reserve
        guard = self.c.pick((None, 0, PAGE, 16 * PAGE, -1))
        guard = self.absurd() if guard == -1 else guard
        numbers = [n for n in (minimum, maximum, reserve, guard) if n is not None]
        try:
            mem = linmem.create(minimum, maximum, reserve=reserve, guard=guard, creator=self.creator(),
                                may_move=MAY_MOVE)
        except (ValueError, OverflowError):
            assert (min(numbers) < 0 or max(numbers) >= NOWHERE or (guard or 0) % PAGE
                    or (maximum is not None and minimum > maximum))
            return
        except MemoryError as error:
            assert max(numbers) >= NOWHERE or self.may_be_full(error)
            return
        assert min(numbers) >= 0
        assert minimum <= TOP if maximum is None else minimum <= maximum
        self.memories.append(Held(mem, bytearray(minimum), None if maximum == TOP else maximum, None))

    def may_be_full(self, error: MemoryError) -> bool:
        return ((isinstance(error, linmem.LimitError) and bool(self.limits))
                or (isinstance(error, linmem.PoolError) and bool(self.pools)))

    def close(self) -> None:
        held = self.pick_memory()
        for view, _ in held.views:
            view.release()
        held.mem.close()
        held.mem.close()
        assert held.mem.closed
        for call in (held.mem.byte_size, held.mem.as_ptr, held.mem.info, held.mem.snapshot, held.mem.prefault,
                     lambda: held.mem[0], lambda: memoryview(held.mem), lambda: held.mem.grow_to(0)):
            try:
                call()
            except ValueError:
                continue
            raise AssertionError("a call on a closed memory")
        self.memories.remove(held)

    def pick_memory(self) -> Held:
        return self.c.pick(self.memories)

    def drop(self) -> None:
        """Drops a handle while its views stay alive."""
        held = self.pick_memory()
        self.memories.remove(held)
        del held.mem
        for view, offset in held.views:
            if not held.kept_from(offset, view.nbytes, "r"):
                assert view.tobytes() == held.content[offset:offset + view.nbytes]
            view.release()

    def grow(self) -> None:
        held = self.pick_memory()
        new = self.size() + self.c.below(2) * len(held.content)
        if SOME <= new < NOWHERE:
            return
        before = held.mem.info()
        if new > before.byte_capacity and not MAY_MOVE:
            return
        try:
            held.mem.grow_to(new)
        except (ValueError, OverflowError) as error:
            assert new < len(held.content) or new >= NOWHERE, error
        except BufferError:
            assert held.views
            assert new > before.byte_capacity
        except MemoryError as error:
            assert (new >= NOWHERE or new > (TOP if held.maximum is None else held.maximum) or self.may_be_full(error)
                    or (new > before.byte_capacity and (held.is_protected or not held.ours))), error
        else:
            assert len(held.content) <= new <= (TOP if held.maximum is None else held.maximum)
            assert held.mem.as_ptr() == before.base or new > before.byte_capacity
            held.content.extend(bytes(new - len(held.content)))
            held.check()
            return
        assert held.mem.info() == before

    def write(self) -> None:
        held, data = self.pick_memory(), self.data()
        offset = self.absurd() if self.c.byte() > 200 else self.c.unsigned(3) % (len(held.content) + 1)
        fits = 0 <= offset <= len(held.content) - len(data)
        if fits and held.kept_from(offset, len(data), "rw"):
            fits = False
        try:
            assert held.mem.write(offset, data) == len(data)
        except (ValueError, OverflowError):
            assert not fits
            return
        assert fits
        held.content[offset:offset + len(data)] = data

    def read(self) -> None:
        held = self.pick_memory()
        offset, size = self.size(), self.size()
        fits = offset >= 0 and size >= 0 and offset + size <= len(held.content)
        if fits and held.kept_from(offset, size, "r"):
            fits = False
        try:
            found = held.mem.read(offset, size)
        except (ValueError, OverflowError):
            assert not fits
        else:
            assert fits
            assert found == held.content[offset:offset + size]

    def item(self) -> None:
        held = self.pick_memory()
        i, byte = self.absurd(), self.c.byte() * 2 - 128
        inside = -len(held.content) <= i < len(held.content)
        kept = inside and held.kept_from(i % len(held.content), 1, "rw")
        try:
            assert held.mem[i] == held.content[i]
            held.mem[i] = byte
        except IndexError:
            assert not inside
        except ValueError:
            assert kept or not 0 <= byte <= 255
        else:
            assert inside
            assert not kept
            assert 0 <= byte <= 255
            held.content[i] = byte

    def slices(self) -> None:
        held = self.pick_memory()
        if held.kept_from(0, len(held.content), "rw"):
            return
        part = slice(*(self.absurd() if self.c.flag() else None for _ in range(2)), self.c.pick((None, 1, 2, -1, 0, 7)))
        try:
            expected = held.content[part]
        except ValueError:
            expected = None
        try:
            assert held.mem[part] == expected
        except ValueError:
            assert expected is None
            return
        data = bytes(len(expected) + self.c.below(2))
        try:
            held.mem[part] = data
        except ValueError:
            assert len(data) != len(expected)
        else:
            held.content[part] = data

    def view(self) -> None:
        held = self.pick_memory()
        if len(held.views) >= 3:
            held.views.pop(self.c.below(3))[0].release()
            return
        format, itemsize = self.c.pick((("B", 1), ("<f8", 8), (">I", 4), ("H", 2), ("<2if", 12), (int, 8)))
        offset, count = self.size(), self.c.pick((None, 0, 1, -1))
        count = self.absurd() if count == -1 else count
        fits = 0 <= offset <= len(held.content) and (
            count is None or 0 <= count * itemsize <= len(held.content) - offset)
        try:
            made = held.mem.view(format, offset, count)
        except (ValueError, OverflowError):
            assert not fits
            return
        assert fits
        n = (len(held.content) - offset) // itemsize if count is None else count
        assert (made.nbytes, len(made), made.itemsize) == (n * itemsize, n, itemsize)
        held.views.append((made, offset))

    def through_view(self) -> None:
        held = self.pick_memory()
        for view, offset in held.views:
            if held.kept_from(offset, view.nbytes, "rw"):
                continue
            assert view.tobytes() == held.content[offset:offset + view.nbytes]
            if view.format == "B" and view.nbytes:
                at = self.c.unsigned(3) % view.nbytes
                view[at] = held.content[offset + at] = self.c.byte()

    # -- pages

    def protect(self) -> None:
        held, access = self.pick_memory(), self.c.pick(("r", "rw", "none", "rx", "x"))
        offset, size = self.size(), self.c.pick((PAGE, 0, 2 * PAGE, -1))
        size = self.absurd() if size == -1 else size
        whole = offset >= 0 and size >= 0 and offset % PAGE == size % PAGE == 0 and offset + size <= len(held.content)
        try:
            held.mem.protect(offset, size, access)
        except TypeError:
            assert not held.ours
        except (ValueError, OverflowError):
            assert not whole or access == "x"
        else:
            assert whole
            for page in range(offset // PAGE, (offset + size) // PAGE):
                held.access[page] = access

    def unprotect(self) -> None:
        self.unprotect_all(self.pick_memory())

    def unprotect_all(self, held: Held) -> None:
        if held.access:
            held.mem.protect(0, len(held.content) // PAGE * PAGE, "rw")
            held.access.clear()
            held.check()

    def discard(self) -> None:
        held = self.pick_memory()
        offset, size = (self.size(), self.size()) if self.c.flag() else self.within(len(held.content))
        rest = size if self.c.flag() else None
        size = len(held.content) - offset if rest is None else size
        fits = offset >= 0 and size >= 0 and offset + size <= len(held.content)
        try:
            held.mem.discard(offset, rest)
        except TypeError:
            assert not held.ours or held.access
        except (ValueError, OverflowError):
            assert not fits or (held.access and (offset % PAGE or size % PAGE))
        else:
            assert fits
            held.content[offset:offset + size] = bytes(size)

    def prefault(self) -> None:
        held = self.pick_memory()
        offset, size = (self.size(), self.size()) if self.c.flag() else self.within(len(held.content))
        fits = offset >= 0 and size >= 0 and offset + size <= len(held.content)
        try:
            held.mem.prefault(offset, size)
        except linmem.PageError:
            assert held.kept_from(offset, size, "rw")
        except TypeError:
            assert not held.ours or held.access
        except (ValueError, OverflowError):
            assert not fits
        else:
            assert fits

    # -- images

    def keep(self, picture: Picture) -> None:
        self.images = [*self.images[-3:], picture]

    def snapshot(self) -> None:
        held = self.pick_memory()
        try:
            made = held.mem.snapshot()
        except TypeError:
            assert held.kept_from(0, len(held.content), "r")
            return
        assert not held.kept_from(0, len(held.content), "r")
        self.keep(Picture(made, 0, held.content))

    def image(self) -> None:
        offset, data = self.size(), self.data()
        size = len(data) if self.c.flag() else len(data) + self.size()
        try:
            if size == len(data):
                made = linmem.Image.from_bytes(data, offset)
            else:
                made = linmem.Image.from_pieces([(offset + size - len(data), data)], size, offset)
        except (ValueError, OverflowError, linmem.PageError):
            assert offset < 0 or size < len(data) or offset >= NOWHERE or size >= NOWHERE
            return
        assert offset >= 0
        if offset < NOWHERE and size < NOWHERE:
            self.keep(Picture(made, offset, data.rjust(size, b"\0")))

    def pieces(self) -> None:
        size, offset, pieces = self.c.below(3 * PAGE), self.c.below(3 * PAGE), []
        for _ in range(1 + self.c.below(3)):
            pieces.append((offset + self.c.unsigned(2) % (size + 2), self.data()[:PAGE + 1]))
        content, end, fits = bytearray(size), offset, True
        for at, data in pieces:
            fits = fits and end <= at and at + len(data) <= offset + size
            content[at - offset:at - offset + len(data)] = data
            end = at + len(data)
        try:
            made = linmem.Image.from_pieces(pieces, size, offset)
        except ValueError:
            assert not fits
        else:
            assert fits
            self.keep(Picture(made, offset, content))

    def same_image(self) -> None:
        """Makes an equal image in another way."""
        picture = self.c.pick(self.images)
        how = self.c.below(3)
        if how == 0:
            made = pickle.loads(pickle.dumps(picture.image, self.c.pick((2, 5))))
        elif how == 1:
            made = linmem.Image.from_bytes(picture.content, picture.offset)
        else:
            try:
                fd = picture.image.fileno()
                runs = picture.image.runs() if self.c.flag() else None
                made = linmem.Image.from_fd(fd, picture.image.size, picture.offset, runs=runs)
            except OSError:
                return
            except ValueError:
                assert not picture.content or picture.image.info().kind == "file"
                return
        copy = Picture(made, picture.offset, picture.content)
        assert copy.image == picture.image
        assert hash(copy.image) == hash(picture.image)
        self.keep(copy)

    def from_image(self) -> None:
        if len(self.memories) >= 5:
            self.close()
        picture, creator = self.c.pick(self.images), self.creator()
        minimum = None if self.c.flag() else self.size()
        size = picture.end if minimum is None else minimum
        reserve = self.c.pick((0, None, 8 * PAGE))
        try:
            mem = picture.image.new_memory(minimum=minimum, creator=creator, reserve=reserve, may_move=MAY_MOVE)
        except (ValueError, OverflowError):
            assert size < picture.end or size >= NOWHERE
            return
        except MemoryError as error:
            assert size >= NOWHERE or self.may_be_full(error)
            return
        copied = "PythonCreator" in repr(creator)       # a copied memory does not know its image
        self.memories.append(Held(mem, picture.memory(size), None, None if copied else picture))

    def restore(self) -> None:
        held, picture, grown = self.pick_memory(), self.c.pick(self.images), self.c.flag()
        size = len(held.content)
        own = held.made_from is not None and held.made_from.image is picture.image and size == held.first_size
        try:
            held.mem.restore(picture.image, zero_grown=grown)
        except TypeError:
            assert held.access
        except ValueError:
            assert size < picture.end or (size > picture.end and not grown
                                          and (not own or held.restored_otherwise))
            held.check()
        else:
            assert not held.is_protected
            assert size == picture.end or (size > picture.end and (grown or own))
            held.content[:] = picture.memory(size)
            if held.made_from is None or held.made_from.image is not picture.image:
                held.restored_otherwise = True
            held.check()

    def dirty(self) -> None:
        held, picture = self.pick_memory(), self.c.pick(self.images)
        try:
            found = held.mem.dirty_pages(picture.image)
        except TypeError:
            assert held.access
            return
        base = picture.memory(max(picture.end, len(held.content)))
        expected: list[tuple[int, int]] = []
        for at in range(0, len(held.content), PAGE):
            stop = min(at + PAGE, len(held.content))
            if held.content[at:stop] != base[at:stop]:
                if expected and sum(expected[-1]) == at:
                    at -= expected.pop()[1]
                expected.append((at, stop - at))
        assert found == expected

    # -- deltas

    def diff(self) -> None:
        picture = self.c.pick(self.images)
        held = self.pick_memory() if self.memories and self.c.flag() else None
        other = None if held else self.c.pick(self.images)
        try:
            delta = picture.image.diff(held.mem if held else other.image)
        except TypeError:
            assert held
            assert held.access
            return
        after = held.content if held else other.memory(other.end)
        assert (delta.base_size, delta.size, delta.base) == (picture.end, len(after), picture.image.digest)
        assert applied(delta, picture.memory(picture.end)) == after
        if not held:
            assert delta.target == other.image.digest
        self.deltas = [*self.deltas[-3:], delta]

    def compose(self) -> None:
        a, b = self.c.pick(self.deltas), self.c.pick(self.deltas)
        try:
            made = a | b
        except ValueError:
            assert b.base_size != a.size or a.target not in (None, b.base)
            return
        start = bytearray(b"\x99" * a.base_size)
        assert applied(made, start) == applied(b, applied(a, start))
        self.deltas.append(made)

    def apply(self) -> None:
        held, delta = self.pick_memory(), self.c.pick(self.deltas)
        size, before = len(held.content), held.mem.info()
        if delta.size > before.byte_capacity and not MAY_MOVE:
            return
        try:
            held.mem.apply(delta)
        except TypeError:
            assert held.access
            assert held.mem.info() == before
        except ValueError:
            assert size < min(delta.base_size, delta.size) or size > delta.size
        except BufferError:
            assert delta.size > before.byte_capacity
        except MemoryError as error:
            assert ((held.maximum is not None and delta.size > held.maximum) or self.may_be_full(error)
                    or delta.size > before.byte_capacity)
        else:
            assert min(delta.base_size, delta.size) <= size <= delta.size
            held.content[:] = applied(delta, held.content)
        held.check()

    def next_image(self) -> None:
        picture, delta = self.c.pick(self.images), self.c.pick(self.deltas)
        after = applied(delta, picture.memory(picture.end))
        content = after[delta.offset:]
        try:
            made = picture.image.apply(delta)
        except ValueError:
            # A delta that was composed of deltas with an unknown target may yield other bytes.
            assert (delta.base != picture.image.digest or any(after[:delta.offset])
                    or linmem.Image.from_bytes(content, delta.offset).digest != delta.target)
            return
        self.keep(Picture(made, delta.offset, content))

    # -- creators

    def new_creator(self) -> None:
        self.creators = [*self.creators[-3:], self.chain()]

    def pool(self) -> None:
        pool = self.c.pick(self.pools)
        if self.c.flag():
            assert pool.trim(self.c.below(3)) >= 0
        else:
            ty = linmem.MemoryType(self.c.below(3), None if self.c.flag() else 3)
            n = self.c.below(4)
            try:
                assert 0 <= pool.warm(n, ty, reserved_size_in_bytes=1 << 18, guard_size_in_bytes=1 << 16) <= n
            except ValueError:
                assert n > pool.stats()["slots"]
            except linmem.GrowError:
                pass
        now = pool.stats()
        assert now["rejected"] == 0
        assert now["live"] + now["warm"] + now["cold"] <= now["slots"]

    def figures(self) -> None:
        for limit in self.limits:
            assert 0 <= limit.used_bytes <= limit.peak_bytes <= limit.limit_bytes == LIMIT
        for book in self.books:
            now = book.statistics()
            assert 0 <= now["current_bytes"] <= now["peak_bytes"] <= now["total_bytes"]
            assert now["current_count"] == sum(one["alive"] for one in book.memories())
        for held in self.memories:
            held.check()
        for picture in self.images:
            assert bytes(picture.image) == picture.content

    # -- the whole

    OF_MEMORIES = (close, drop, grow, write, read, item, slices, view, through_view, protect, unprotect, discard,
                   prefault, snapshot)
    OF_IMAGES = (same_image, from_image)
    OF_DELTAS = (compose,)
    OF_POOLS = (pool,)
    ANY = (create, image, pieces, new_creator, figures)

    def run(self) -> None:
        for _ in range(120):
            if not self.c.more:
                break
            calls = list(self.ANY)
            if self.memories:
                calls += self.OF_MEMORIES
            if self.images:
                calls += [*self.OF_IMAGES, History.diff]
            if self.deltas:
                calls += self.OF_DELTAS
            if self.memories and self.images:
                calls += [History.restore, History.dirty]
            if self.deltas and self.memories:
                calls.append(History.apply)
            if self.deltas and self.images:
                calls.append(History.next_image)
            if self.pools:
                calls += self.OF_POOLS
            self.c.pick(calls)(self)

    def end(self) -> None:
        for held in self.memories:
            self.unprotect_all(held)
        self.figures()
        while self.memories:
            held = self.memories.pop()
            for view, _ in held.views:
                view.release()
            held.mem.close()
        for pool in reversed(self.pools):       # a pool's slots may come from another pool
            pool.trim()
            assert pool.stats()["live"] == pool.stats()["warm"] == pool.stats()["cold"] == 0
        for limit in self.limits:
            assert limit.used_bytes == 0
        for book in self.books:
            assert book.statistics()["current_count"] == book.statistics()["current_bytes"] == 0
        for picture in self.images:
            assert picture.image.info().memories == 0


def applied(delta: linmem.Delta, content: bytes) -> bytearray:
    out = bytearray(content[:delta.size].ljust(delta.size, b"\0"))
    for offset, size, data in delta.pieces():
        out[offset:offset + size] = bytes(size) if data is None else data
    assert len(out) == delta.size
    return out


def one(data: bytes) -> None:
    before = inaccessible()
    history = History(Choices(data))
    history.run()
    history.end()
    del history
    if inaccessible() != before:
        gc.collect()
        assert inaccessible() == before, "mappings are left behind"
