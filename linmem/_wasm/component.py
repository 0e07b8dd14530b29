"""Takes the data out of the core modules inside a WebAssembly component, as `hoist` does for one module.

Each memory of an instance must start from the image of its own module. So the order must be known in which wasmtime
asks for the memories of an instance of the component:

- wasmtime processes the items of a component in the order of the file. An item that instantiates a core module asks for
  the memories of that module. An item that instantiates a nested component processes the items of that component.
- Modules, components and instances are values, which aliases, exports and arguments name. This code follows all of
  them.
- A module that the host gives is not known: wasmtime asks for an unknown number of memories. The data of each module
  that is instantiated later stays in the component. The same holds for a module that linmem cannot read.
- The data of a module that the component exports stays, because the host may instantiate that module.
- The modules that wasmtime makes itself, to pass values between components, define no memories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from linmem._wasm.reader import Malformed, Reader, Unknown, leb128, malformed
from linmem._wasm.segments import Hoisted, Run, hoist

PREAMBLE = b"\0asm\x0d\0\1\0"
_MOST_STEPS = 100_000       # items and memories of one instance: a small file can ask for an exponential number
_DEEPEST = 100              # components inside components, in the file and in an instance

(_CUSTOM, _CORE_MODULE, _CORE_INSTANCE, _CORE_TYPE, _COMPONENT, _INSTANCE, _ALIAS, _TYPE, _CANON, _START, _IMPORT,
 _EXPORT) = range(12)
_WITHOUT_EFFECT = frozenset((_CUSTOM, _CORE_TYPE, _TYPE, _CANON))
_CORE = 0                   # the first byte of the core sorts
_CORE_SORTS = {0x00: "", 0x01: "", 0x02: "", 0x03: "", 0x10: "", 0x11: "module", 0x12: ""}
_SORTS = {1: "", 2: "", 3: "", 4: "component", 5: "instance"}       # "": values of this sort are not followed


def is_component(wasm: bytes) -> bool:
    """Whether the bytes start as those of a component of any version."""
    return wasm[:4] == PREAMBLE[:4] and wasm[6:8] == PREAMBLE[6:]


class Place(NamedTuple):
    """A memory of an instance of the component."""

    module: int         # the number of the core module, in the order of the file
    instance: int       # its number among the instances of the module
    memory: int         # its number among the memories that the module defines


class HoistedComponent(NamedTuple):
    """The result of `hoist_component`.

    Attributes
    ----------
    component : bytes
        The component with the hoisted segments emptied; the original if no segment was hoisted.
    images, minima : list
        As for `Hoisted`, for each memory of each core module that has an instance.
    order : list of int
        For each memory of an instance of the component, in the order in which wasmtime asks for them: its index in
        `images`. The list ends before the first core instance whose memories are not known.
    places : list of Place
        Of which core instance each memory in `order` is.
    complete : bool
        Whether `order` has all memories of an instance.
    skipped : list of str
        Why segments were not hoisted; empty if all were.
    """

    component: bytes
    images: list[tuple[Run, ...] | None]
    minima: list[int]
    order: list[int]
    places: list[Place]
    complete: bool
    skipped: list[str]

    @property
    def names(self) -> list[str]:
        """The name of each memory in `order`."""
        several = {place.module for place in self.places if place.instance}
        return [f"module {place.module}, " + f"instance {place.instance}, " * (place.module in several)
                + f"memory {place.memory}" for place in self.places]


class _CoreModule:
    def __init__(self, number: int, start: int, wasm: bytes) -> None:
        self.number, self.start, self.wasm = number, start, wasm    # start: its place in the component
        self.written = wasm                     # its bytes in the component that is written
        self.hoisted: Hoisted | None = None     # of a module that has an instance
        self.stays = ""                         # why no data is taken; "": data may be taken
        self.instances = 0                      # of those whose memories are known


class _Item(NamedTuple):
    """An action, and its operands. Only items with a sort, and instantiations of core modules, are kept."""

    action: str
    sort: str = ""
    number: int = 0                                 # the index of a value of the sort
    name: str = ""
    depth: int = 0                                  # of an outer alias
    named: tuple[tuple[str, str, int], ...] = ()    # arguments or exports: name, sort, index
    value: Any = None                               # a _CoreModule or a _Component


class _Component(NamedTuple):
    items: list[_Item]
    parts: list[memoryview | _CoreModule | _Component]      # other sections, with their kinds and sizes, in between


class _Scope:
    """The values that an instance of a component names by their indices; None: a value that is not known."""

    def __init__(self, outer: _Scope | None) -> None:
        self.outer = outer
        self.values: dict[str, list[Any]] = {"module": [], "component": [], "instance": []}

    def get(self, sort: str, index: int) -> Any:
        if index >= len(self.values[sort]):
            raise Malformed(f"the component has no {sort} {index}")
        return self.values[sort][index]


class _Closure(NamedTuple):
    """A component, and the scope that its outer aliases name."""

    component: _Component
    scope: _Scope


_KINDS: dict[str, type] = {"module": _CoreModule, "component": _Closure, "instance": dict}


def hoist_component(wasm: bytes) -> HoistedComponent:
    """Take the active data segments of the core modules' own memories out of a component.

    Parameters
    ----------
    wasm : bytes
        A component in the binary format.

    Raises
    ------
    Malformed
        If a part that is read here is malformed. The other parts are copied without a check.
    """
    run = _Run()
    try:
        root = run.read_file(wasm)
        run.instantiate(root, None, None, 0)
    except Unknown as reason:
        return HoistedComponent(wasm, [], [], [], [], False, [f"nothing is hoisted: {reason}"])
    return run.result(wasm, root)


def with_modules(wasm: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """The component with each core module replaced by what `change` makes of it.

    Raises
    ------
    Malformed, Unknown
        If a part that is read here is malformed, or not known.
    """
    run = _Run()
    root = run.read_file(wasm)
    for module in run.modules:
        module.written = change(module.wasm)
    return run.bytes_of(wasm, root)


def core_modules(wasm: bytes) -> list[tuple[int, bytes]]:
    """For each core module in the component, in the order of the file: where it starts, and its bytes.

    Raises
    ------
    Malformed, Unknown
        As `with_modules`.
    """
    run = _Run()
    run.read_file(wasm)
    return [(module.start, module.wasm) for module in run.modules]


class _Run:
    def __init__(self) -> None:
        self.modules: list[_CoreModule] = []
        self.steps = 0
        self.unknown = ""       # why the memories of the next core instance cannot be told; "": they can
        self.order: list[tuple[_CoreModule, int, int]] = []     # module, which of its instances, which of its memories

    # -- the file

    def read_file(self, wasm: bytes) -> _Component:
        if not wasm.startswith(PREAMBLE):
            raise malformed(4, f"a component of version {wasm[4:6].hex()}")
        return self.read(wasm, 8, len(wasm), 0)

    def read(self, wasm: bytes, start: int, end: int, depth: int) -> _Component:
        """Read the sections of a component, which stand at start .. end, behind the preamble."""
        if depth > _DEEPEST:
            raise Unknown(f"components are nested deeper than {_DEEPEST}")
        whole, reader = memoryview(wasm), Reader(wasm, start, end)
        found, copied = _Component([], []), start       # the parts have what stands before `copied`
        while reader.at < reader.end:
            first = reader.at
            kind = reader.byte("section")
            size = reader.u32("section size")
            content = reader.skip(size, f"section {kind}")
            part: _CoreModule | _Component | None = None
            if kind == _CORE_MODULE:
                part = _CoreModule(len(self.modules), content, wasm[content:reader.at])
                self.modules.append(part)
                found.items.append(_Item("define", "module", value=part))
            elif kind == _COMPONENT:
                if wasm[content:content + 8] != PREAMBLE:
                    raise malformed(content, "a nested component does not start with its preamble")
                part = self.read(wasm, content + 8, reader.at, depth + 1)
                found.items.append(_Item("define", "component", value=part))
            elif kind in _ITEMS:
                section = Reader(wasm, content, reader.at)
                items = (_ITEMS[kind](item) for item in section.items("items of a component"))
                found.items.extend(item for item in items if item.sort or item.action == "core")
            elif kind not in _WITHOUT_EFFECT:
                raise Unknown(f"the section at byte {first} of a component is of kind {kind}")
            if part is not None:
                found.parts.extend((whole[copied:first], part))
                copied = reader.at
        found.parts.append(whole[copied:reader.at])
        return found

    # -- an instance

    def instantiate(self, component: _Component, outer: _Scope | None, arguments: dict[str, Any] | None,
                    depth: int) -> dict[str, Any]:
        """Process the items as wasmtime does; returns the exports. `arguments`: None for those of the host."""
        if depth > _DEEPEST:
            raise Unknown(f"components instantiate components deeper than {_DEEPEST}")
        scope, exports = _Scope(outer), {}
        for item in component.items:
            self.step(1 + len(item.named))
            value: Any = None
            if item.action == "define":
                value = item.value if item.sort == "module" else _Closure(item.value, scope)
            elif item.action == "import":
                value = None if arguments is None else arguments.get(item.name)
            elif item.action == "export":
                value = exports[item.name] = scope.get(item.sort, item.number)
            elif item.action == "alias":
                instance = scope.get("instance", item.number)
                value = None if instance is None else instance.get(item.name)
            elif item.action == "outer":
                value = self.outer(scope, item)
            elif item.action == "core":
                self.instantiate_core(scope.get("module", item.number))
            else:       # an instance of a component, or of named values
                named = {name: scope.get(sort, index) for name, sort, index in item.named if sort}
                value = named
                if item.action == "instantiate":
                    closure = scope.get("component", item.number)
                    if closure is None:
                        value, self.unknown = None, self.unknown or "a component that the host gives"
                    else:
                        value = self.instantiate(closure.component, closure.scope, named, depth + 1)
            if item.sort:
                if value is not None and not isinstance(value, _KINDS[item.sort]):
                    raise Malformed(f"the component uses another kind of value as a {item.sort}")
                scope.values[item.sort].append(value)
        if arguments is None:
            self.keep_exported(exports)
        return exports

    def step(self, n: int) -> None:
        self.steps += n
        if self.steps > _MOST_STEPS:
            raise Unknown(f"an instance of the component takes more than {_MOST_STEPS} steps")

    def outer(self, scope: _Scope, item: _Item) -> Any:
        for _ in range(item.depth):
            self.step(1)
            if scope.outer is None:
                raise Malformed(f"a component has fewer than {item.depth} outer components")
            scope = scope.outer
        return scope.get(item.sort, item.number)

    def instantiate_core(self, module: _CoreModule | None) -> None:
        if module is None:
            self.unknown = self.unknown or "a module that the host gives"
            return
        if module.hoisted is None:
            module.hoisted = hoist(module.wasm)
        if self.unknown:
            module.stays = f"it is instantiated after {self.unknown}, which may make any number of memories"
            return
        if module.hoisted.unknown:
            self.unknown = f"core module {module.number}, which linmem cannot read"
            return
        self.step(len(module.hoisted.minima))
        self.order += [(module, module.instances, memory) for memory in range(len(module.hoisted.minima))]
        module.instances += 1

    def keep_exported(self, exports: dict[str, Any]) -> None:
        """Take no data of modules that the exports of the outermost component name."""
        waiting, seen = [exports], {id(exports)}
        while waiting:
            for value in waiting.pop().values():
                if isinstance(value, _CoreModule):
                    value.stays = "the component exports it, and the host may instantiate it"
                elif isinstance(value, _Closure):
                    raise Unknown("it exports a component, which the host may instantiate")
                elif isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))
                    waiting.append(value)

    # -- the component without its data

    def result(self, wasm: bytes, root: _Component) -> HoistedComponent:
        images: list[tuple[Run, ...] | None] = []
        minima: list[int] = []
        skipped: list[str] = []
        first = {}
        for module in self.modules:
            hoisted = module.hoisted
            if hoisted is None:
                continue
            if module.stays and hoisted.module is not module.wasm:
                skipped.append(f"core module {module.number}: {module.stays}")
            else:
                skipped += [f"core module {module.number}: {reason}" for reason in hoisted.skipped]
                module.written = hoisted.module
            first[module] = len(images)
            images += [None] * len(hoisted.minima) if module.stays else hoisted.images
            minima += hoisted.minima
        places = [Place(module.number, instance, memory) for module, instance, memory in self.order]
        order = [first[module] + memory for module, _, memory in self.order]
        return HoistedComponent(self.bytes_of(wasm, root), images, minima, order, places, not self.unknown, skipped)

    def bytes_of(self, wasm: bytes, root: _Component) -> bytes:
        """The component with the modules as they are to be written; the same bytes if no module changed."""
        if all(module.written is module.wasm for module in self.modules):
            return wasm
        out: list[bytes | memoryview] = []
        self.write(root, out)
        return b"".join(out)

    def write(self, component: _Component, out: list[bytes | memoryview]) -> int:
        """Append the bytes of a component; returns how many there are."""
        out.append(PREAMBLE)
        total = len(PREAMBLE)
        for part in component.parts:
            if isinstance(part, memoryview):
                out.append(part)
                total += len(part)
                continue
            place = len(out)
            out.append(b"")         # the kind and the size, which is known at the end
            if isinstance(part, _Component):
                kind, size = _COMPONENT, self.write(part, out)
            else:
                out.append(part.written)
                kind, size = _CORE_MODULE, len(out[-1])
            out[place] = bytes([kind]) + leb128(size)
            total += len(out[place]) + size
        return total


# -- items -----------------------------------------------------------------------------------------------------

def _sort(reader: Reader) -> str:
    start = reader.at
    code = reader.byte("sort")
    sorts = _SORTS
    if code == _CORE:
        code, sorts = reader.byte("core sort"), _CORE_SORTS
    if code not in sorts:
        raise Unknown(f"the sort at byte {start} of a component is 0x{code:02x}")
    return sorts[code]


def _extern_name(reader: Reader) -> str:
    start = reader.at
    form = reader.byte("form of a name")
    if form > 1:
        raise Unknown(f"the name at byte {start} of a component is of the form {form}")
    return reader.name("name")


def _count(reader: Reader, what: str) -> Iterator[None]:
    count = reader.u32(f"number of {what}")
    if count > reader.end - reader.at:
        raise malformed(reader.at, f"{count} {what} in {reader.end - reader.at} bytes")
    for _ in range(count):
        yield


def _core_instance(reader: Reader) -> _Item:
    start = reader.at
    form = reader.byte("core instance")
    if form == 0:
        index = reader.u32("module index")
        for _ in _count(reader, "arguments"):
            reader.name("argument's name")
            if reader.byte("argument's sort") != 0x12:
                raise Unknown(f"an argument of the core instance at byte {start} is not an instance")
            reader.u32("instance index")
        return _Item("core", number=index)
    if form != 1:
        raise Unknown(f"the core instance at byte {start} is of the form {form}")
    for _ in _count(reader, "exports"):
        reader.name("export's name")
        reader.byte("export's sort")
        reader.u32("export's index")
    return _Item("named")


def _instance(reader: Reader) -> _Item:
    start = reader.at
    form = reader.byte("instance")
    if form == 0:
        index = reader.u32("component index")
        named = [(reader.name("argument's name"), _sort(reader), reader.u32("argument's index"))
                 for _ in _count(reader, "arguments")]
        return _Item("instantiate", "instance", index, named=tuple(named))
    if form != 1:
        raise Unknown(f"the instance at byte {start} is of the form {form}")
    named = [(_extern_name(reader), _sort(reader), reader.u32("export's index")) for _ in _count(reader, "exports")]
    return _Item("named", "instance", named=tuple(named))


def _alias(reader: Reader) -> _Item:
    start = reader.at
    sort = _sort(reader)
    target = reader.byte("target of an alias")
    if target == 2:
        depth = reader.u32("number of outer components")
        return _Item("outer", sort, reader.u32("index"), depth=depth)
    if target > 2:
        raise Unknown(f"the alias at byte {start} is of the form {target}")
    index = reader.u32("instance index")
    name = reader.name("export's name")
    # A core instance exports none of the sorts that are followed.
    return _Item("alias", sort if target == 0 else "", index, name)


def _type_of(reader: Reader) -> str:
    """Read the description of an import or an export; returns its sort."""
    start = reader.at
    code = reader.byte("description")
    if code == 0 and reader.byte("description") != 0x11:
        raise Unknown(f"the description at byte {start} of a component is of a core sort")
    if code in (2, 3):
        if reader.byte("bound") == 0:
            reader.u32("index")
        elif code == 2:
            reader.integer(33, "type", signed=True)
    elif code in (0, 1, 4, 5):
        reader.u32("type index")
    else:
        raise Unknown(f"the description at byte {start} of a component is 0x{code:02x}")
    return _SORTS[code] if code else "module"


def _import(reader: Reader) -> _Item:
    name = _extern_name(reader)
    return _Item("import", _type_of(reader), name=name)


def _export(reader: Reader) -> _Item:
    name = _extern_name(reader)
    sort, index = _sort(reader), reader.u32("export's index")
    if reader.byte("description of an export"):
        _type_of(reader)
    return _Item("export", sort, index, name)


_ITEMS = {_CORE_INSTANCE: _core_instance, _INSTANCE: _instance, _ALIAS: _alias, _IMPORT: _import, _EXPORT: _export}
