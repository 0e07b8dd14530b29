"""The state of an instance in a file, in a pickle and for another process: a description, and an image of each memory.

A file is a container of kind SNAPSHOT. The content of the file is the description and then the images, each from a new
group on. docs/reference/file-format.md has every field. Pickles send the same description, and the images beside the
description.
"""

from __future__ import annotations

import itertools
import re
import struct
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, SupportsIndex

from linmem._core.arguments import check_bytes, check_flag, check_path, check_size
from linmem._core.memory import Image, fetch_pages, image_in_file
from linmem._core.process_handles import own_runs
from linmem._files.format import (
    GROUP,
    IN_PLACE,
    MAX_SIZE,
    NO_DIGEST,
    PACKED,
    PAGE,
    SNAPSHOT,
    ZEROS,
    Contents,
    Header,
    Run,
    blake2b,
    round_up,
)
from linmem._files.reader import check_ends, open_file, pieces, read, split
from linmem._files.writer import write
from linmem._wasm.state import NULL, NUMBERS, VERSION, GlobalState, MemoryState, Reference, State, TableState
from linmem.errors import FileFormatError

if TYPE_CHECKING:
    from typing_extensions import Self

    from linmem._core.arguments import AnyPath

MOST_MEMORIES = 100         # of a WebAssembly module; each image of a file takes a descriptor and a mapping

# The parts of a description, in their order. The strings follow their lengths. END and the digests of the images follow
# the last part. Strings are numbered from 1. So a page of the description has a byte that is not zero, and is stored.
HEAD = struct.Struct("<IIIIIIII")   # version; how many strings, memories, globals, tables, names, unseen; 0
LENGTH = struct.Struct("<I")        # of a string
MEMORY = struct.Struct("<IIQQQ")    # index, runs of its working set, size, offset and size of the image
RUN = struct.Struct("<QQ")          # of the working sets of all memories: offset, size
GLOBAL = struct.Struct("<II16s")    # index, kind, value
TABLE = struct.Struct("<IIQ")       # index, changed elements, size
CHANGE = struct.Struct("<QIII")     # of all tables: the element, a reference
NAME = struct.Struct("<III")        # kind, index, string
UNSEEN = struct.Struct("<I")        # string
END = b"\xff" * 4

GLOBAL_KINDS = (*NUMBERS, "funcref", "null")
REFERENCE = struct.Struct("<IIII")  # in a global: kind, string or segment, index; 0
REFERENCE_KINDS = ("null", "export", "element")
NAME_KINDS = ("memory", "global", "table")


class Extent(NamedTuple):
    """Where the bytes of an image lie in a memory."""

    offset: int
    size: int

    @property
    def groups(self) -> tuple[int, int]:
        """Where the groups begin and end that the extent touches."""
        return Header(offset=self.offset, size=self.size).span()


# -- the description ------------------------------------------------------------------------------

def encoded(state: State) -> bytes:
    """The description of a state without the digests of the images."""
    strings: dict[str, int] = {}

    def string(text: str) -> int:
        return strings.setdefault(text, len(strings) + 1)

    def reference(it: Reference) -> tuple[int, int, int]:
        return REFERENCE_KINDS.index(it.kind), string(it.name) if it.kind == "export" else it.segment, it.index

    def value(it: bytes | Reference) -> bytes:
        return it if isinstance(it, bytes) else REFERENCE.pack(*reference(it), 0)

    unseen = [string(text) for text in dict.fromkeys(state.unseen)]      # the first strings: the numbers ascend
    sets = state.working_set or ((),) * len(state.memories)
    records = [
        *(MEMORY.pack(index, len(runs), size, image.offset, image.size)
          for (index, size, image), runs in zip(state.memories, sets, strict=True)),
        *(RUN.pack(*run) for runs in sets for run in runs),
        *(GLOBAL.pack(each.index, GLOBAL_KINDS.index(each.kind), value(each.value)) for each in state.globals),
        *(TABLE.pack(index, len(changed), size) for index, size, changed in state.tables),
        *(CHANGE.pack(element, *reference(to)) for table in state.tables for element, to in table.changed),
        *(NAME.pack(NAME_KINDS.index(kind), index, string(name)) for kind, index, name in state.names),
        *map(UNSEEN.pack, unseen)]
    texts = [text.encode() for text in strings]
    head = HEAD.pack(VERSION, len(texts), len(state.memories), len(state.globals), len(state.tables), len(state.names),
                     len(unseen), 0)
    return b"".join([head, *(LENGTH.pack(len(text)) for text in texts), *texts, *records, END])


class _Description:
    """Reads the parts of a description in their order, and refuses a wrong field by its name."""

    def __init__(self, raw: bytes | bytearray | memoryview, path: str) -> None:
        self.rest, self.path = memoryview(raw), path
        self.strings: list[str] = []

    def refusal(self, field: str, value: object, bound: object) -> FileFormatError:
        return FileFormatError(self.path, f"description.{field}", value, bound)

    def take(self, name: str, size: int, unit: int = 1) -> memoryview:
        if size > len(self.rest):
            raise self.refusal(name, size // unit, f"at most {len(self.rest) // unit}, for which the description has"
                               " room")
        found, self.rest = self.rest[:size], self.rest[size:]
        return found

    def records(self, name: str, count: int, form: struct.Struct) -> list[Any]:
        return list(form.iter_unpack(self.take(f"number of {name}", count * form.size, form.size)))

    def ascending(self, name: str, numbers: Iterable[int], field: str = "index") -> None:
        for i, (before, number) in enumerate(itertools.pairwise(numbers), 1):
            if number <= before:
                raise self.refusal(f"{name}[{i}].{field}", number, f"more than {before}")

    def kind(self, name: str, number: int, kinds: Sequence[str]) -> str:
        if number >= len(kinds):
            raise self.refusal(f"{name}.kind", number, f"at most {len(kinds) - 1}")
        return kinds[number]

    def string(self, name: str, number: int) -> str:
        if not 0 < number <= len(self.strings):
            raise self.refusal(f"{name}.string", number, f"from 1 to {len(self.strings)}, the number of strings")
        return self.strings[number - 1]

    def reference(self, name: str, kind: int, first: int, index: int) -> Reference:
        what = self.kind(name, kind, REFERENCE_KINDS)
        if what == "element":
            return Reference(what, segment=first, index=index)
        if index or (first and what == "null"):
            raise self.refusal(f"{name}.index", index or first, f"0 in a reference of the kind {kind}")
        return NULL if what == "null" else Reference(what, self.string(name, first))

    def value(self, name: str, kind: str, raw: bytes) -> bytes | Reference:
        size = NUMBERS.get(kind)
        if size is not None:
            if any(raw[size:]):
                raise self.refusal(f"{name}.value", raw.hex(), f"{size} bytes, and then zeros")
            return raw[:size]
        *parts, zero = REFERENCE.unpack(raw)
        found = self.reference(name, *parts)
        if zero or (kind == "null" and found != NULL):
            raise self.refusal(f"{name}.value", raw.hex(), "a reference and then zeros" if zero else "null")
        return found

    def read_strings(self, count: int) -> None:
        for i, (size,) in enumerate(self.records("strings", count, LENGTH)):
            raw = bytes(self.take(f"strings[{i}].length", size))
            try:
                self.strings.append(raw.decode())
            except UnicodeDecodeError:
                raise self.refusal(f"strings[{i}]", raw, "UTF-8") from None
        first: dict[str, int] = {}
        for i, text in enumerate(self.strings):
            if first.setdefault(text, i) != i:
                raise self.refusal(f"strings[{i}]", text, f"another text than that of strings[{first[text]}]")

    def working_set(self, i: int, count: int, size: int) -> tuple[tuple[int, int], ...]:
        end, last = 0, round_up(size, PAGE)
        runs = self.records(f"memories[{i}].working_set", count, RUN)
        for n, (offset, length) in enumerate(runs):
            if offset % PAGE or length % PAGE or not length or offset < end or offset + length > last:
                raise self.refusal(f"memories[{i}].working_set[{n}]", (offset, length),
                                   f"whole pages from {end} to {last}")
            end = offset + length
        return tuple(runs)

    def changes(self, i: int, count: int, size: int) -> tuple[tuple[int, Reference], ...]:
        least, changed = 0, []
        for n, (element, *reference) in enumerate(self.records(f"tables[{i}].changes", count, CHANGE)):
            name = f"tables[{i}].changes[{n}]"
            if not least <= element < size:
                raise self.refusal(f"{name}.element", element, f"at least {least} and below {size}")
            changed.append((element, self.reference(name, *reference)))
            least = element + 1
        return tuple(changed)

    def names(self, count: int, held: Mapping[str, Container[int]]) -> tuple[tuple[str, int, str], ...]:
        found = []
        for i, (code, index, number) in enumerate(self.records("names", count, NAME)):
            kind = self.kind(f"names[{i}]", code, NAME_KINDS)
            if index not in held[kind]:
                raise self.refusal(f"names[{i}].index", index, f"that of a {kind} of the snapshot")
            found.append((kind, index, self.string(f"names[{i}]", number)))
        return tuple(found)


def decoded(raw: bytes | bytearray | memoryview, module: str, path: str) -> tuple[State, list[Extent], memoryview]:
    """The state that a description holds, without its images; where these lie; and what follows the description.

    Raises
    ------
    FileFormatError
        It names `path` and the field.
    """
    it = _Description(raw, path)
    if len(raw) < HEAD.size:
        raise it.refusal("size", len(raw), f"at least {HEAD.size}")
    version, strings, *counts, zero = HEAD.unpack(it.take("head", HEAD.size))
    if version != VERSION:
        raise it.refusal("version", version, f"{VERSION}, which is all that this linmem reads")
    if zero:
        raise it.refusal("reserved", zero, "0")
    n_memories, n_globals, n_tables, n_names, n_unseen = counts
    if n_memories > MOST_MEMORIES:
        raise it.refusal("number of memories", n_memories, f"at most {MOST_MEMORIES}")
    it.read_strings(strings)

    memories, extents, sets = [], [], []
    found = it.records("memories", n_memories, MEMORY)
    it.ascending("memories", (each[0] for each in found))
    for i, (index, n_runs, size, offset, length) in enumerate(found):
        for name, value, most in ("size", size, MAX_SIZE), ("image.offset", offset, size), (
                "image.size", length, size - offset):
            if value > most:
                raise it.refusal(f"memories[{i}].{name}", value, f"at most {most}")
        sets.append(it.working_set(i, n_runs, size))
        memories.append(MemoryState(index, size, None))         # type: ignore[arg-type]    # the caller has the image
        extents.append(Extent(offset, length))

    globals = []
    found = it.records("globals", n_globals, GLOBAL)
    it.ascending("globals", (each[0] for each in found))
    for i, (index, code, value) in enumerate(found):
        kind = it.kind(f"globals[{i}]", code, GLOBAL_KINDS)
        globals.append(GlobalState(index, kind, it.value(f"globals[{i}]", kind, value)))

    tables = []
    found = it.records("tables", n_tables, TABLE)
    it.ascending("tables", (each[0] for each in found))
    for i, (index, n_changes, size) in enumerate(found):
        tables.append(TableState(index, size, it.changes(i, n_changes, size)))

    names = it.names(n_names, {"memory": {each.index for each in memories}, "global": {each.index for each in globals},
                               "table": {each.index for each in tables}})
    numbers = [number for number, in it.records("unseen", n_unseen, UNSEEN)]
    it.ascending("unseen", numbers, "string")       # else a short file could repeat a long text
    unseen = tuple(it.string(f"unseen[{i}]", number) for i, number in enumerate(numbers))
    end = bytes(it.take("size of the end", len(END)))
    if end != END:
        raise it.refusal("end", end, END)
    return State(module, tuple(memories), tuple(globals), tuple(tables), tuple(sets) if any(sets) else (), unseen,
                 names=names), extents, it.rest


# -- files ------------------------------------------------------------------------------------------------

def save_state(state: State, path: AnyPath, *, packed: bool = False) -> None:
    """Write a state to a file as `Image.save` writes an image: as a whole or not at all."""
    check_flag(packed, "packed")
    path = check_path(path)
    images = [memory.image for memory in state.memories]
    description = _whole_description(state)
    if any(description[place:place + PAGE] == ZEROS for place in range(0, len(description), PAGE)):
        raise ValueError("the names in a snapshot must not have thousands of NUL characters in a row")
    module = bytes.fromhex(state.module)
    header = Header(kind=SNAPSHOT, size=sum(_sizes(len(description), map(_extent, images))), base_size=len(description),
                    base_digest=module, digest=_digest(module, description), layout=PACKED if packed else IN_PLACE)
    write(path, header, lambda: _runs(description, images))


def _extent(image: Image) -> Extent:
    return Extent(image.offset, image.size)


def _sizes(description: int, extents: Iterable[Extent]) -> Iterator[int]:
    """The bytes of the groups of the description and of each image."""
    yield round_up(description, GROUP)
    for first, end in (extent.groups for extent in extents):
        yield end - first


def state_digest(state: State) -> str:
    """A digest of the whole state, as in the header of the file of the state."""
    return _digest(bytes.fromhex(state.module), _whole_description(state)).hex()


def _whole_description(state: State) -> bytes:
    return encoded(state) + b"".join(bytes.fromhex(memory.image.digest) for memory in state.memories)


def _digest(module: bytes, description: bytes) -> bytes:
    digest = blake2b(module)
    digest.update(description)
    return digest.digest()


def _runs(description: bytes, images: Sequence[Image]) -> Iterator[Run]:
    yield 0, len(description), memoryview(description)
    position = round_up(len(description), GROUP)
    for image in images:
        first, end = _extent(image).groups
        for start, data in own_runs(image, memoryview(image)):
            yield position + start - first, len(data), data
        position += end - first


def read_state(file: BinaryIO, contents: Contents) -> tuple[State, list[Contents]]:
    """The state in a file of kind SNAPSHOT, without its images, and the part of the file of each image.

    `FileFormatError` if the description is not valid, or does not fit the file.
    """
    header = contents.header
    own = ("the description", 0, header.base_size, NO_DIGEST)
    (part,) = split(contents, [own])
    # Every page is stored, so that a hole of the file cannot pass for a long description.
    if part.stored != round_up(header.base_size, PAGE):
        raise contents.refusal("base_size", header.base_size,
                               f"at most {part.stored} and in the last page of these, which are all that is stored")
    check_ends(file, part)
    raw = b"".join(data for _, _, data in pieces(file, part) if data is not None)
    found = _digest(header.base_digest, raw)
    if found != header.digest:
        raise contents.refusal("digest", header.digest.hex(), f"{found.hex()}, that of the module and the description")
    state, extents, rest = decoded(raw, header.base_digest.hex(), contents.path)
    if len(rest) != len(NO_DIGEST) * len(extents):
        raise contents.refusal("description.size", len(raw),
                               f"{len(raw) - len(rest) + len(NO_DIGEST) * len(extents)}, where the digests of"
                               f" {len(extents)} images end")
    total = sum(_sizes(len(raw), extents))
    if header.size != total:
        raise contents.refusal("size", header.size, f"{total}, the groups of the description and of the images")
    digests = (bytes(rest[at:at + len(NO_DIGEST)]) for at in range(0, len(rest), len(NO_DIGEST)))
    images = [(f"memory {memory.index}", *extent, digest)
              for memory, extent, digest in zip(state.memories, extents, digests, strict=True)]
    _, *parts = split(contents, [own, *images])
    for part in parts:
        check_ends(file, part)
    return state, parts


def open_state(path: AnyPath, verify: bool = False, *, map: bool = True,
               max_size: SupportsIndex | None = None) -> State:
    """The state that a file holds; with the arguments and exceptions of `Image.open`.

    The images are mappings of the file, and the OS begins to read the pages of the working set.
    """
    check_flag(verify, "verify")
    check_flag(map, "map")
    bound = None if max_size is None else check_size(max_size, "max_size")
    path = check_path(path)
    with open_file(path) as file:
        state, parts = read_state(file, read(file, path, SNAPSHOT, bound))
        state = _with_images(state, [image_in_file(file, part, verify, map) for part in parts])
    fetch_working_set(state)
    return state


def _with_images(state: State, images: Iterable[Image]) -> State:
    return state._replace(memories=tuple(memory._replace(image=image)
                                         for memory, image in zip(state.memories, images, strict=True)))


def fetch_working_set(state: State) -> None:
    """Have the OS read the pages of the working set, if the images are mappings of a file."""
    for memory, runs in zip(state.memories, state.working_set, strict=bool(state.working_set)):
        fetch_pages(memory.image, runs)


# -- pickles and other processes ------------------------------------------------------------------

def parts_of(state: State) -> tuple[str, bytes, list[Image]]:
    """The arguments of `state_of`."""
    return state.module, encoded(state), [memory.image for memory in state.memories]


def state_of(module: str, description: bytes, images: Sequence[Image]) -> State:
    """The state that `parts_of` took apart. `FileFormatError` if a part is wrong or does not fit the others; TypeError
    if the description is not bytes."""
    path = "a pickled snapshot"
    if not isinstance(module, str) or not re.fullmatch("[0-9a-f]{64}", module):
        raise FileFormatError(path, "module", module, "64 lowercase hexadecimal digits")
    if not isinstance(images, list) or not all(isinstance(image, Image) for image in images):
        raise FileFormatError(path, "images", images, "a list of images")
    state, extents, rest = decoded(check_bytes(description, "description"), module, path)
    if rest:
        raise FileFormatError(path, "description.size", len(description), len(description) - len(rest))
    found = [_extent(image) for image in images]
    if found != extents:
        raise FileFormatError(path, "images", found, extents)
    return _with_images(state, images)


class SnapshotHandle:
    """A snapshot that `multiprocessing` sends to another process as descriptors of its pages, without the bytes.

    Made by `Snapshot.handle`. While this process runs, one process with the same ``multiprocessing`` authkey can load a
    pickle of it, once.

    Attributes
    ----------
    snapshot : Snapshot
        In this process, the snapshot that the handle was made from. In the other process, a snapshot whose images have
        the same pages.
    """

    __slots__ = ("snapshot",)
    snapshot: StoredSnapshot

    def __init__(self, snapshot: StoredSnapshot) -> None:
        self.snapshot = snapshot

    def __reduce__(self) -> tuple[object, ...]:
        module, description, images = parts_of(self.snapshot._travels())
        return _arrived, (type(self.snapshot), module, description,
                          [image.handle() if image.size else image for image in images])


def _arrived(cls: type[StoredSnapshot], module: str, description: bytes, images: Sequence[Any]) -> SnapshotHandle:
    return SnapshotHandle(_unpickled(cls, module, description, [getattr(each, "image", each) for each in images]))


def _unpickled(cls: type[StoredSnapshot], module: str, description: bytes, images: Sequence[Image]) -> StoredSnapshot:
    return cls._from_state(state_of(module, description, images))


class StoredSnapshot(ABC):
    """The methods of the class `Snapshot` that do not need wasmtime."""

    __slots__ = ()

    @classmethod
    @abstractmethod
    def _from_state(cls, state: State) -> Self:
        """A snapshot that has no instance of its own."""

    @abstractmethod
    def _travels(self) -> State:
        """The state; ValueError if the snapshot has only objects of its store."""

    def save(self, path: AnyPath, *, packed: bool = False) -> None:
        """Write the snapshot to a file, as a whole or not at all.

        The file is written, and an old file is replaced, as `Image.save` describes. The file has the working set, too,
        if `record` has noted one.

        Parameters
        ----------
        path : path-like
        packed : bool
            True: the file has no holes and cannot be mapped; as for `Image.save`.

        Raises
        ------
        ValueError
            The module was not made by `prepare`.
        OSError
            The exception names `path`. The old file is still there.
        """
        save_state(self._travels(), path, packed=packed)

    @classmethod
    def open(cls, path: AnyPath, verify: bool = False, *, map: bool = True,
             max_size: SupportsIndex | None = None) -> Self:
        """The snapshot that a file holds. `Prepared.instantiate` starts instances from the snapshot.

        Parameters
        ----------
        path : path-like
            Written by `save`, on any machine.
        verify, map, max_size
            As for `Image.open`. If the pages of the file are mapped, the OS begins to read the pages of the
            working set.

        Raises
        ------
        FileFormatError
            The file is not a snapshot, or is damaged.
        OSError, PageError
            The file cannot be read, or the OS has no room for the images.
        """
        return cls._from_state(open_state(path, verify, map=map, max_size=max_size))

    def handle(self) -> SnapshotHandle:
        """An object that `multiprocessing` can send to another process of this machine without a copy of the bytes.

        Pass it as an argument of a Process, or through a Queue or a Pipe. In the other process, ``handle.snapshot`` is
        a snapshot whose images have the same pages.

        Raises
        ------
        ValueError
            The module was not made by `prepare`.
        OSError
            No descriptor shows the pages of an image; see `Image.fileno`.
        """
        for memory in self._travels().memories:
            if memory.image.size:
                memory.image.fileno()
        return SnapshotHandle(self)

    def __reduce__(self) -> tuple[object, ...]:
        # Each image sends its pages beside the pickle if the protocol can do so.
        return _unpickled, (type(self), *parts_of(self._travels()))
