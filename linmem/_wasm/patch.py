"""`patch`: linmem in the engines that other libraries make, and images for the modules and components that they
compile."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import wasmtime

from linmem._wasm.component import is_component
from linmem._wasm.prepared import Prepared, binary_of, component_api, makes_our_memories, prepare
from linmem.abc import MemoryCreator

if TYPE_CHECKING:
    from typing_extensions import Self

_lock = threading.Lock()            # of changes to `_active` and `_replaced`
_active: tuple[Patch, ...] = ()     # the patches that are not undone; the newest is at the end. Read without the lock
_in_prepare = threading.local()     # `now` is True while prepare() runs on the thread: what it compiles is not prepared
_replaced: list[tuple[type, str, Any, Any]] = []    # class, name of the method, wasmtime's own method, the new method


class Patch:
    """A patch of wasmtime-py, made by `linmem.wasmtime.patch`. The end of a ``with`` block undoes it.

    Attributes
    ----------
    creator : MemoryCreator
        Makes the memories of the engines that are made while this patch is the newest one.
    """

    __slots__ = ("_install", "creator")
    creator: MemoryCreator

    def __init__(self, creator: MemoryCreator, install: Callable[[wasmtime.Config, MemoryCreator], object]) -> None:
        self.creator, self._install = creator, install

    def _begin(self) -> None:
        """If this raises, the caller calls `undo`."""
        global _active
        with _lock:
            _active = (*_active, self)
            if not _replaced:
                _replaced[:] = _replacements()      # one step, so that a forked child finds all methods or none
            _replace()

    def undo(self) -> None:
        """End the patch. Engines and modules that were made under it stay as they are. May be called again."""
        global _active
        with _lock:
            _active = tuple(patch for patch in _active if patch is not self)
            _replace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self.undo()
        except BaseException:       # a signal handler raised
            self.undo()
            raise


def _replacements() -> list[tuple[type, str, Any, Any]]:
    """The rows of `_replaced`. A function: if a trace function of CPython 3.12 raises in a loop directly inside of a
    ``with`` block, the block does not end."""
    return [(kind, name, own, _method(own, new)) for kind, name, new in (*_METHODS, *_component_methods())
            for own in [vars(kind)[name]]]


def _replace() -> None:
    """Put in the new methods if a patch is active, else wasmtime's own. Under the lock."""
    if _active:
        for kind, name, own, new in _replaced:
            if vars(kind)[name] is own:
                setattr(kind, name, new)
    # If another library has wrapped one of the methods since, they all stay, and only call wasmtime's methods.
    elif all(vars(kind)[name] in (own, new) for kind, name, own, new in _replaced):
        for kind, name, own, _ in _replaced:
            setattr(kind, name, own)
        _replaced.clear()


def _start_over_in_child() -> None:
    """Another thread of the parent may have held the lock, in the middle of _replace()."""
    global _lock
    _lock = threading.Lock()
    _replace()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_over_in_child)


# The modules and components that were compiled under a patch, and whose instances start from images. The class of such
# an object is changed, so the new class has no base class but the one before.
#
# Code that does not know of the images gets the original, which is compiled at its first use: `serialize`,
# ``Linker.define_module``, ``Linker.instantiate_pre``, and everything after the patch was undone.

def _is_prepared(thing: Any) -> bool:
    return hasattr(thing, "_linmem_source")


def _opened(thing: Any) -> Prepared:
    prepared: Prepared | None = thing._linmem_prepared
    if prepared is None:
        raise ValueError("already closed")
    return prepared


def _ptr(self: Any) -> Any:
    _opened(self)
    found = vars(self).get("_linmem_original")
    if found is None:       # several threads may compile the original; all of them use the first one
        found = vars(self).setdefault("_linmem_original", self._linmem_kind(*self._linmem_source))
    return found.ptr()


def _close(self: Any) -> None:
    self._linmem_prepared = None
    original = vars(self).pop("_linmem_original", None)
    if original is not None:
        original.close()


class _Plain(wasmtime.Module):
    """A module that a patch leaves alone."""


class PreparedModule(wasmtime.Module):
    _linmem_kind = _Plain
    ptr, close = _ptr, _close

    @property
    def imports(self) -> list[wasmtime.ImportType]:
        return _opened(self).module.imports

    @property
    def exports(self) -> list[wasmtime.ExportType]:
        return _opened(self).module.exports


@functools.cache
def _prepared_component() -> type:
    """The class of prepared components. Only `patch` needs it, so ``wasmtime.component`` is not imported before."""
    api = component_api()

    class PlainComponent(api.Component):            # type: ignore[name-defined, misc]
        """A component that a patch leaves alone."""

    class PreparedComponent(api.Component):         # type: ignore[name-defined, misc]
        _linmem_kind = PlainComponent
        ptr, close = _ptr, _close

        @property
        def type(self) -> Any:
            module: Any = _opened(self).module
            return module.type

        def get_export_index(self, name: str, instance: Any = None) -> Any:
            """An index for the instances that would be made now: with images, or of the original."""
            found: Any = _opened(self).module if _active else super()
            return found.get_export_index(name, instance)

    return PreparedComponent


def _make_engine(own: Callable[..., None], self: wasmtime.Engine, config: wasmtime.Config | None = None) -> None:
    patch = next(reversed(_active), None)       # of one tuple, so another thread's undo() cannot come between
    ours = patch is not None and (config is None or (
        isinstance(config, wasmtime.Config) and not getattr(config, "_linmem_installed", False)))
    if patch is not None and ours:
        config = wasmtime.Config() if config is None else config
        patch._install(config, patch.creator)
    own(self, config)
    self._linmem_patched = ours         # type: ignore[attr-defined]


def _make_module(own: Callable[..., None], self: wasmtime.Module, engine: wasmtime.Engine, wasm: str | bytes) -> None:
    found = _prepare(engine, wasm, False) if type(self) is wasmtime.Module else None
    if found is None:
        own(self, engine, wasm)
    else:
        _become(self, PreparedModule, *found)


def _make_component(own: Callable[..., None], self: Any, engine: wasmtime.Engine, wasm: str | bytes) -> None:
    found = _prepare(engine, wasm, True) if type(self) is component_api().Component else None
    if found is None:
        own(self, engine, wasm)
    else:
        _become(self, _prepared_component(), *found)


def _prepare(engine: wasmtime.Engine, wasm: Any, is_of_components: bool) -> tuple[Prepared, bytes] | None:
    """None: the engine is not of a patch, or wasmtime refuses the arguments."""
    if not (_active and getattr(engine, "_linmem_patched", False) and isinstance(wasm, (str, bytes, bytearray))
            and not getattr(_in_prepare, "now", False)):
        return None
    _in_prepare.now = True
    try:
        if not _has_our_memories(engine):
            return None
        source = binary_of(wasm)
        return (prepare(engine, source), source) if is_component(source) == is_of_components else None
    finally:
        _in_prepare.now = False


def _become(self: Any, kind: type, prepared: Prepared, source: bytes) -> None:
    if any(image is not None for image in prepared.images):
        self.__class__ = kind
        vars(self).update(_linmem_prepared=prepared, _linmem_source=(prepared.engine, source))
    else:
        self._set_ptr(prepared.module._consume())


def _has_our_memories(engine: wasmtime.Engine) -> bool:
    """False for an engine with the pooling allocation strategy, which ignores its creator; and if the creator refuses a
    memory now."""
    try:
        return makes_our_memories(engine)
    except wasmtime.WasmtimeError:
        return False


def _make_instance(own: Callable[..., None], self: wasmtime.Instance, store: Any, module: wasmtime.Module,
                   imports: Sequence[Any]) -> None:
    if _active and _is_prepared(module):
        vars(self).update(vars(_opened(module).instantiate(store, imports)))
    else:
        own(self, store, module, imports)


def _link_instance(own: Callable[..., wasmtime.Instance], self: wasmtime.Linker, store: Any,
                   module: wasmtime.Module) -> wasmtime.Instance:
    if _active and _is_prepared(module):
        return _opened(module).instantiate(store, self)
    return own(self, store, module)


def _link_component(own: Callable[..., Any], self: Any, store: Any, component: Any) -> Any:
    if _active and _is_prepared(component):
        return _opened(component).instantiate(store, self)
    return own(self, store, component)


def _trap_unknown(own: Callable[..., None], self: Any, component: Any) -> None:
    own(self, _opened(component).module if _active and _is_prepared(component) else component)


_METHODS: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (wasmtime.Engine, "__init__", _make_engine), (wasmtime.Module, "__init__", _make_module),
    (wasmtime.Instance, "__init__", _make_instance), (wasmtime.Linker, "instantiate", _link_instance))


def _component_methods() -> tuple[tuple[type, str, Callable[..., Any]], ...]:
    try:
        api = component_api()
    except RuntimeError:        # this wasmtime-py has no components
        return ()
    return ((api.Component, "__init__", _make_component), (api.Linker, "instantiate", _link_component),
            (api.Linker, "define_unknown_imports_as_traps", _trap_unknown))


def _method(own: Callable[..., Any], new: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def method(*args: Any, **named: Any) -> Any:
        return new(own, *args, **named)
    return method
