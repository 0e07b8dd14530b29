"""A component, as `linmem run` runs it: a command that exports `wasi:cli/run`, or a function of --invoke."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from wasmtime import component

from linmem._commands.parser import EXIT_REFUSED, Refused
from linmem._commands.program import RAN, Program
from linmem._core.arguments import printable
from linmem._core.bridge import making
from linmem._core.memory import MmapCreator

_RUN = re.compile(r"wasi:cli/run@0\.2\.\d+")
_LOGGING = re.compile(r"wasi:logging/logging(@.*)?")
_STREAMS = re.compile(r"wasi:io/streams@0\.2\..*")
_FLUSH = os.path.join(os.path.dirname(__file__), "flush.wat")
_SHOWN = 8              # functions in a message
_FLUSH_FUEL = 1_000_000


class ComponentProgram(Program):
    """A component and its only instance. "_start" is the name of `run` of its export `wasi:cli/run`."""

    named_if_prepared = True
    _calling = False        # a function of the component runs
    _flush: Any = None      # the component of flush.wat, if the program may leave output in wasmtime's buffer

    def __init__(self, program: Program) -> None:
        vars(self).update(vars(program))
        self.kind = component.Component

    def compile(self, command: str, cache: str | None, function: str, *, prepare: bool, outline: bool = False,
                hint: str = "") -> None:
        Program.compile(self, command, cache, function, prepare=prepare, outline=outline, hint=hint)
        imports = self.module.type.imports(self.engine)
        streams = [_type_of(imports[name]) for name in filter(_STREAMS.fullmatch, imports)]
        if any("[method]output-stream.write" in each.exports(self.engine) for each in streams
               if isinstance(each, component.ComponentInstanceType)):
            flush = ComponentProgram(self)
            flush.path = _FLUSH
            for read in "_file", "binary":
                vars(flush).pop(read, None)
            Program.compile(flush, command, cache, "flush", prepare=False)
            self._flush = flush.module

    def _check_export(self, binary: bytes, function: str, hint: str) -> None:
        """A component is compiled first."""

    def _functions(self) -> dict[str, Any]:
        """The types of the exported functions. A function of an exported instance is named INSTANCE#FUNCTION."""
        found = {}
        for name, item in self._items(self.module.type):
            if isinstance(item, component.ComponentInstanceType):
                found.update({f"{name}#{function}": kind for function, kind in self._items(item)})
            else:
                found[name] = item
        return {name: kind for name, kind in found.items() if isinstance(kind, component.FuncType)}

    def _items(self, owner: Any) -> list[tuple[str, Any]]:
        found = []
        for name, item in owner.exports(self.engine).items():
            try:
                found.append((name, _type_of(item)))
            except TypeError:       # a kind of type that wasmtime-py does not know; functions are known
                continue
        return found

    def _resolve(self, name: str) -> str:
        """The full name of a function; of "_start", if the component is a command."""
        if name != "_start":
            return name
        interfaces = (each for each in self.module.type.exports(self.engine) if _RUN.fullmatch(each))
        return next((f"{each}#run" for each in interfaces), name)

    def _exported_function(self, name: str, hint: str = "") -> Any:
        functions = self._functions()
        function = functions.get(self._resolve(name))
        if function is None:
            what = "interface wasi:cli/run@0.2" if name == "_start" else f"function {name}"
            names = sorted(functions, key=lambda each: "[" in each)     # those of resources come last
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            exports = f"; its functions are {shown}" if functions else ""
            raise Refused(f"{self.path} is a component and exports no {what}{hint}{exports}")
        return function

    def parse_arguments(self, name: str, texts: list[str]) -> list[Any]:
        """The arguments for the exported function, by the types of its parameters; as `Program.parse_arguments`."""
        from linmem._commands.component_values import describe, parse_value, unfit

        function = self._exported_function(name)
        kinds = [kind for _, kind in function.params]
        results = [] if function.result is None else [function.result]
        parameters = ", ".join(f"{parameter}: {describe(kind)}" for parameter, kind in function.params)
        signature = f"{name}({parameters})" + "".join(f" -> {describe(kind)}" for kind in results)
        wrong = next(filter(None, map(unfit, [*kinds, *results])), None)
        if wrong is not None:
            raise Refused(f"{self.path}: {signature} cannot be called from the command line, because no word can be a"
                          f" {wrong}")
        return self._converted(signature, texts, kinds, parse_value) if kinds else []

    def check_function(self, name: str, *, may_return: bool = False, hint: str = "") -> None:
        """Refuse a function that is not exported, or that is not `run` of a command."""
        function = self._exported_function(name, hint)
        result = function.result
        if function.params or not isinstance(result, component.ResultType) or result.ok or result.err:
            raise Refused(f"{self.path}: {self._resolve(name)} is not of the type func() -> result")

    def _linker(self) -> Any:
        linker = component.Linker(self.engine)
        linker.add_wasip2()
        for name in filter(_LOGGING.fullmatch, self.module.type.imports(self.engine)):
            with linker.root() as root, root.add_instance(name) as logging:
                logging.add_func("log", _log)
        return linker

    def _memories(self) -> dict[str, Any]:
        """The memories of a prepared component that has an instance, by name."""
        if self.prepared is None or self.instance is None:
            return {}
        found: dict[str, Any] = self.prepared._memories(*self.instance._linmem_made)
        return found

    def names_by_address(self) -> dict[int, str]:
        return {memory.as_ptr(): name for name, memory in self._memories().items()}

    def core_content(self, trap: Any) -> Any:
        from linmem._wasm.coredump import content_of_component

        return content_of_component(self.binary, self.prepared, self._memories(), trap)

    def initialise(self, name: str, arguments: Sequence[Any] = ()) -> list[Any]:
        return self.call(name, arguments)

    def call(self, name: str, arguments: Sequence[Any] = ()) -> list[Any]:
        """The results of a function as text. If the result is an error, `status` becomes 1."""
        place = None
        for part in self._resolve(name).rpartition("#")[::2]:
            if part:
                place = self.instance.get_export_index(self.store, part, place)
        function: Any = self.instance.get_func(self.store, place)
        kind = function.type(self.store).result
        self._calling = True
        try:
            value = function(self.store, *arguments)
            function.post_return(self.store)
        except (TypeError, ValueError, NotImplementedError) as error:       # some versions cannot pass some values
            raise Refused(f"{self.path}: {name}: wasmtime-py cannot convert a value: {error}") from None
        finally:
            self.flush_output()
        self._calling = False
        if name == "_start":        # a result without values
            self.status = EXIT_REFUSED if value.tag == "err" else 0
            return []
        if kind is None:
            return []
        from linmem._commands.component_values import chosen_case, show_value

        if isinstance(kind, component.ResultType) and chosen_case(value, kind)[0] == "err":
            self.status = EXIT_REFUSED
        encoding = sys.stdout.encoding
        return [show_value(value, kind).encode(encoding, "backslashreplace").decode(encoding)]

    def flush_output(self) -> None:
        if self._flush is None:
            return
        store, wasi = self.wasmtime.Store(self.engine), self.wasmtime.WasiConfig()
        wasi.inherit_stdout()
        store.set_wasi(wasi)
        if self.limits.fuel is not None:
            store.set_fuel(_FLUSH_FUEL)
        linker = component.Linker(self.engine)
        linker.add_wasip2()
        # The memory is not one of the program's, so the report and the budget do not count it.
        instance = making(MmapCreator(), None, linker.instantiate, store, self._flush)
        function: Any = instance.get_func(store, "flush")
        function(store)

    def _is_trap(self, error: Exception) -> bool:
        """In a component, wasmtime-py has one class for traps and for other errors.

        What ends a call is a trap. What ends the instantiation is a trap if code of the component ran.
        """
        return self._calling or str(error).startswith(RAN)


def _type_of(item: Any) -> Any:
    """The type of an import or export, which is the item itself in an older wasmtime-py."""
    return getattr(item, "ty", item)


def _log(store: Any, *parts: Any) -> None:
    """`log` of wasi:logging, with a level, a context and a message: one line on standard error."""
    text = printable(" ".join(filter(None, map(str, parts)))) + "\n"
    os.write(sys.stderr.fileno(), text.encode(errors="backslashreplace"))
