"""Whole processes: `linmem run` of a program in the cache, against the shortest script with wasmtime-py."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from linmem._files.atomic_file import replacing
from linmem._wasm.component import with_modules
from linmem._wasm.module import CODE, DATA, EXPORT, FUNCTION, MEMORY, TYPE
from linmem._wasm.reader import leb128
from linmem.bench.harness import Contender, Goal, Group, Run, Shared, Unavailable

CODE_BYTES, QUICK_CODE_BYTES, DATA_BYTES = 18_000_000, 200_000, 2_000_000       # of the program
STATEMENTS = 150            # of a function
GOAL = 1.3
SETTLED = 2.1               # seconds after which linmem notes that a new file is unchanged

# What the console script of linmem does.
LINMEM = "import sys; from linmem.cli import main; sys.exit(main())"
WITH_WASI = """
wasi = wasmtime.WasiConfig()
wasi.argv = sys.argv[1:]
wasi.inherit_stdin()
wasi.inherit_stdout()
wasi.inherit_stderr()
store.set_wasi(wasi)
"""
SCRIPT = f"""
import sys
import wasmtime
engine = wasmtime.Engine()
module = wasmtime.Module.deserialize_file(engine, sys.argv[1])
linker = wasmtime.Linker(engine)
linker.define_wasi()
store = wasmtime.Store(engine)
{WITH_WASI}
linker.instantiate(store, module).exports(store)["_start"](store)
"""
FUEL = 1_000_000
COMPONENT_SCRIPT = f"""
import sys
import wasmtime
from wasmtime import component
config = wasmtime.Config()
config.consume_fuel = True
engine = wasmtime.Engine(config)
program = component.Component.deserialize_file(engine, sys.argv[1])
linker = component.Linker(engine)
linker.add_wasip2()
store = wasmtime.Store(engine)
store.set_fuel({FUEL})
{WITH_WASI}
instance = linker.instantiate(store, program)
run = program.get_export_index("run", program.get_export_index("wasi:cli/run@0.2.0"))
instance.get_func(store, run)(store)
"""
# A command; the first module is replaced by the program.
COMPONENT = """(component
  (core module $program)
  (core instance (instantiate $program))
  (core module $main (func (export "run") (result i32) (i32.const 0)))
  (core instance $main (instantiate $main))
  (func $run (result (result)) (canon lift (core func $main "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))"""


def run_cached(quick: bool) -> Group:
    there = Shared(lambda: Folder(QUICK_CODE_BYTES if quick else CODE_BYTES))
    return Group(
        "run_cached", "linmem run of a cached 20 MB program, whole process",
        (Contender("linmem", "linmem run", processes(there, Folder.linmem)),
         Contender("script", "the shortest wasmtime-py script with a serialized module",
                   processes(there, Folder.script))),
        (Goal("script", GOAL),), "18 MB of code and 2 MB of data, of which nothing runs",
        operations=1)


def run_prepared(quick: bool) -> Group:
    there = Shared(lambda: ComponentFolder(QUICK_CODE_BYTES if quick else CODE_BYTES))
    return Group(
        "run_prepared", "linmem run --fuel of a cached 20 MB component, whole process",
        (Contender("linmem", "linmem run --fuel, which prepares the component",
                   processes(there, ComponentFolder.linmem)),
         Contender("script", "the shortest wasmtime-py script with fuel and a serialized component",
                   processes(there, ComponentFolder.script))),
        (Goal("script", GOAL),), "the same code and data inside a component", operations=1)


def program(code_bytes: int) -> bytes:
    """A WASI command of many functions, which returns at once."""
    some = random.Random(1)
    bodies, size = [], 0
    while size < code_bytes:
        body = b"\0" + b"".join(map(statement, [some] * STATEMENTS)) + b"\x0b"
        bodies.append(leb128(len(body)) + body)
        size += len(bodies[-1])
    n = leb128(len(bodies) + 1)
    sections = (
        (TYPE, b"\1\x60\0\0"), (FUNCTION, n + bytes(len(bodies) + 1)),
        (MEMORY, b"\1\0" + leb128(DATA_BYTES // 65536 + 2)),
        (EXPORT, b"\2\6memory\2\0\6_start\0" + leb128(len(bodies))), (CODE, n + b"".join(bodies) + b"\2\0\x0b"),
        (DATA, b"\1\0\x41\0\x0b" + leb128(DATA_BYTES) + some.randbytes(DATA_BYTES)))
    return b"\0asm\1\0\0\0" + b"".join(bytes([kind]) + leb128(len(content)) + content for kind, content in sections)


def statement(some: random.Random) -> bytes:
    """A load, an addition and a store. These numbers have two bytes, also as signed ones."""
    target, source, summand = (b"\x41" + leb128(some.randrange(128, 8192)) for _ in range(3))
    return target + source + b"\x28\2\0" + summand + b"\x6a\x36\2\0"


class Folder:
    """A temporary folder with the program, compiled for both."""

    def __init__(self, code_bytes: int) -> None:
        content, serialized = self.compiled(program(code_bytes))
        here = Path(tempfile.mkdtemp())
        weakref.finalize(self, shutil.rmtree, here)
        self.program, self.serialized, self.cache = here / "program.wasm", here / "program.cwasm", here / "cache"
        self.environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(here / "bytecode"),
                            "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for path, data in ((self.program, content), (self.serialized, serialized)):
            with replacing(path) as (file, _):
                file.write(data)
        self.start(self.linmem())
        time.sleep(SETTLED)
        self.start(self.linmem())       # reads the program and notes its state

    def compiled(self, module: bytes) -> tuple[bytes, bytes]:
        """The program, and what the script deserializes."""
        import wasmtime

        return module, wasmtime.Module(wasmtime.Engine(), module).serialize()

    def linmem(self) -> list[str]:
        return [LINMEM, "run", "--cache", str(self.cache), str(self.program)]

    def script(self) -> list[str]:
        return [SCRIPT, str(self.serialized)]

    def start(self, words: list[str]) -> None:
        subprocess.run([sys.executable, "-c", *words], check=True, env=self.environment, stdin=subprocess.DEVNULL)


class ComponentFolder(Folder):
    """The same with a component, which counts fuel."""

    def compiled(self, module: bytes) -> tuple[bytes, bytes]:
        try:
            from wasmtime import Config, Engine, component, wat2wasm
        except ImportError as error:
            raise Unavailable(f"this wasmtime-py has no components: {error}") from error
        config = Config()
        config.consume_fuel = True
        modules = iter([module])
        content = with_modules(bytes(wat2wasm(COMPONENT)), lambda core: next(modules, core))
        return content, component.Component(Engine(config), content).serialize()

    def linmem(self) -> list[str]:
        return [LINMEM, "run", "--cache", str(self.cache), "--fuel", str(FUEL), str(self.program)]

    def script(self) -> list[str]:
        return [COMPONENT_SCRIPT, str(self.serialized)]


def processes(there: Shared[Any], words: Callable[[Any], list[str]]) -> Callable[[], Run]:
    def make() -> Run:
        folder = there()

        def run(n: int) -> int:
            began = time.perf_counter_ns()
            for _ in range(n):
                folder.start(words(folder))
            return time.perf_counter_ns() - began

        return run

    return make
