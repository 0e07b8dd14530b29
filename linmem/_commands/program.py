"""A WASI preview 1 program (wasm or wat), as `linmem run` and `linmem prewarm` run it: options, functions, endings."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO, TypeVar

from linmem._commands import compile_cache
from linmem._commands.limits import Clock, Limits
from linmem._commands.parser import (
    EXIT_INTERRUPTED,
    EXIT_TIMEOUT,
    EXIT_TRAP,
    EXIT_USAGE,
    Parser,
    Refused,
    parse_size,
    refuse_errors_of,
)
from linmem._commands.text import count, one_line
from linmem._commands.values import parse_number
from linmem._core.arguments import printable
from linmem.errors import FileFormatError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from linmem._commands.core_file import CoreFile

_T = TypeVar("_T")
RAN = "error while executing at wasm backtrace"     # begins an error of wasmtime if code of the program ran
_MAX_LINE, _MAX_LINES = 500, 50     # of the text of a trap
_INTERRUPTIBLE = 0.2        # seconds of a wait of the main thread
_PATIENCE = 1.0             # seconds that the last words of a process may take
_BRIEF_PATIENCE = 0.02      # the same if no process seems to read them


def add_options(parser: Parser) -> None:
    """Declare the options that say what the program may use."""
    parser.add_argument("--dir", action="append", default=[], type=split_dir, metavar="HOST[::GUEST][:ro]",
                        help="a directory that the program may read and write, under the name GUEST; with :ro at the"
                             " end, it may only read. A name that itself ends in :ro is given with :rw at the end"
                             " (x:ro:rw); repeatable")
    parser.add_argument("--env", action="append", default=[], type=split_env, metavar="NAME[=VALUE]",
                        help="a variable for the program, by default with its value in this process; repeatable")
    parser.add_argument("--env-all", action="store_true",
                        help="all variables of this process; --env adds to them and overrides them")
    parser.add_argument("--max-memory", type=parse_size, metavar="SIZE",
                        help="a budget for the sum of all memories of the program: bytes, or a number with KiB, MiB,"
                             " GiB (powers of 1024; K, M, G mean the same) or KB, MB, GB (powers of 1000). Beyond the"
                             " budget memory.grow returns -1")
    compile_cache.add_options(parser)


def split_env(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r}: the name is missing (NAME=VALUE)")
    if equals:
        return name, value
    if name not in os.environ:
        raise argparse.ArgumentTypeError(f"{name}: no such variable in this environment (NAME=VALUE sets one)")
    return name, os.environ[name]


def split_dir(text: str) -> tuple[str, str, bool]:
    """The directory, its name for the program, and whether the program may write to it."""
    access = next((access for access in (":ro", ":rw") if text.endswith(access)), "")
    host, _, guest = text.removesuffix(access).partition("::")
    if not os.path.isdir(host):
        what = "is not a directory" if os.path.exists(host) else "does not exist"
        hint = f" (for the directory {text!r}, write {text}:rw)" if access == ":ro" and os.path.isdir(text) else ""
        raise argparse.ArgumentTypeError(f"{host!r} {what}{hint}")
    return host, guest or host, access != ":ro"


def in_a_thread(work: Callable[[], _T], clock: Clock | None = None) -> tuple[_T | int, bool]:
    """The result of `work`, or the exit code after Ctrl-C or a timeout; and whether `work` still runs.

    Python handles signals between bytecodes of the main thread. The program runs in another thread, so neither Ctrl-C
    nor the timeout waits for native code.
    """
    import threading

    clock = clock or Clock()
    results: list[_T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as error:      # raised again in the main thread
            errors.append(error)
        finally:
            clock.begun.set()

    threading.stack_size(8 << 20)           # some systems give a second thread less than the stack of wasm
    thread = threading.Thread(target=target, name="linmem program", daemon=True)
    try:
        thread.start()
        threading.stack_size(0)
        while thread.is_alive():
            left = clock.left()
            if left == 0:
                return EXIT_TIMEOUT, True
            wait = thread.join if clock.begun.is_set() else clock.begun.wait
            # On some systems, a wait without a timeout cannot be interrupted.
            wait(_INTERRUPTIBLE if left is None else min(left, _INTERRUPTIBLE))
    except (KeyboardInterrupt, RuntimeError) as error:
        # Event.wait(), which start() calls too, raises RuntimeError if Ctrl-C comes while it takes its lock again.
        if isinstance(error, RuntimeError) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        # CPython before 3.13 takes a thread for ended if an exception ends join().
        return EXIT_INTERRUPTED, not results and not errors
    if errors:
        raise errors[0]
    return results[0], False


def leave_running(status: int, text: str = "", flush: Callable[[], None] | None = None) -> None:
    """End the process although the program is in an endless loop or waits. Nothing else can end such code.

    `text` is the last text on standard error: what the program writes there from now on is dropped. If standard error
    is a full pipe and no process reads it, `text` is dropped. `flush` writes what the program left in a buffer of
    standard output. It is not called if standard output is a full pipe.
    """
    import threading

    def finish() -> None:
        if text:
            last = os.dup(sys.stderr.fileno())
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
            data = text.replace("\n", os.linesep).encode(sys.stderr.encoding, "backslashreplace")
            while data:
                data = data[os.write(last, data):]
        sys.stdout.flush()
        if flush is not None and _is_writable(sys.stdout):
            flush()

    compile_cache.end_announcements()
    try:
        patience = _PATIENCE if _is_writable(sys.stderr) else _BRIEF_PATIENCE
        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(patience)
    finally:            # also on another Ctrl-C
        files = sys.modules.get("linmem._files.atomic_file")
        if files is not None:
            files.remove_drafts()
        os._exit(status)


def _is_writable(file: TextIO) -> bool:
    """Whether the file takes some bytes now; also True if the system does not say."""
    import select

    try:
        return bool(select.select([], [file], [], 0)[1])
    except (OSError, ValueError):       # Windows says this of sockets alone
        return True


def read_program(path: str) -> tuple[bytes, str | None]:
    """The bytes of a wasm module or of its text, and the state of the file; a file of another kind is refused."""
    from linmem._wasm.known_files import read_file

    try:
        code, state = read_file(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Refused(f"cannot read {path!r}: {reason}") from None
    is_text = path.lower().endswith(".wat") or code.lstrip().startswith((b"(", b";;"))
    if not code.startswith(b"\0asm") and not is_text:
        raise Refused(f"{path!r} is not a WebAssembly module (neither wasm nor wat)")
    return code, state


@contextlib.contextmanager
def one_line_warnings(command: str) -> Iterator[None]:
    """Print that a program could not be cached without the line of linmem's source that issued the warning."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("always", "not cached", RuntimeWarning)
        warnings.showwarning = lambda message, *where: print(
            f"linmem {command}: {printable(str(message))}", file=sys.stderr)
        yield


class Program:
    """A program and its only instance, in memories of a creator.

    Attributes
    ----------
    store, linker : wasmtime.Store, wasmtime.Linker
        After `link`.
    instance : wasmtime.Instance
        After `instantiate`.
    status : int
        The exit code of a program that does not exit and does not trap.
    """

    status = 0

    store: Any
    linker: Any
    instance: Any = None
    module: Any
    prepared: Any = None
    kind: Any                           # wasmtime's class of compiled programs
    core: CoreFile | None = None        # where a trap is written
    named_if_prepared = False           # `names_by_address` has names if the program is prepared
    names_from: Any = None              # the module, after `keep_names`

    def __init__(self, path: str, creator: Any, limits: Limits) -> None:
        self.path, self.limits = path, limits
        try:
            import wasmtime

            from linmem._wasm.install import install
        except (ImportError, OSError) as error:         # OSError: the library of wasmtime does not load
            raise Refused(f"needs wasmtime-py: pip install 'linmem[wasmtime]' ({error})") from None
        self.wasmtime, self.kind = wasmtime, wasmtime.Module
        config = wasmtime.Config()
        limits.configure(config)
        try:
            install(config, creator)
        except RuntimeError as error:
            raise Refused(str(error)) from None
        self.engine = wasmtime.Engine(config)

    @functools.cached_property
    def _file(self) -> tuple[bytes, str | None]:
        return read_program(self.path)

    @functools.cached_property
    def binary(self) -> bytes:
        """The module in the binary format. A module that comes from the cache is read when this is first used."""
        code = self._file[0]
        try:
            return code if code.startswith(b"\0asm") else bytes(self.wasmtime.wat2wasm(code.decode()))
        except self.wasmtime.WasmtimeError as error:
            raise Refused(f"{self.path}: {one_line(error)}") from None
        except UnicodeDecodeError as error:
            raise Refused(f"{self.path} is not valid WebAssembly text: {error}") from None

    def compile(self, command: str, cache: str | None, function: str, *, prepare: bool, outline: bool = False,
                hint: str = "") -> None:
        """Compile the program, or take it from the directory of a cache.

        prepare: for an instance that starts from images.
        outline: also for a snapshot or a core dump, which need to know the state that an instance has.
        function: a program that does not export it is refused before it is compiled, with `hint`.
        """
        if cache is not None and not outline and self._take_kept(cache, prepare):
            return
        binary = self.binary
        self._check_export(binary, function, hint)
        self.prepared = None
        try:
            with compile_cache.announced(f"linmem {command}: compiling {printable(self.path)} ..."), \
                    one_line_warnings(command):
                if prepare:
                    self.prepared = self._prepare(binary, cache)
                    self.module = self.prepared.module
                else:
                    self.module = self._compiled(binary, cache)
        except self.wasmtime.WasmtimeError as error:
            raise Refused(f"{self.path}: {one_line(error)}") from None
        compile_cache.bound(cache)

    def is_component(self, cache: str | None) -> bool:
        """Whether the program is a component; the file is read if the cache does not know it."""
        if cache is not None:
            from linmem._wasm.known_files import COMPONENT

            found = self._noted(cache, False) or self._noted(cache, True)
            if found is not None:
                return found[0][0].endswith(COMPONENT)
        from linmem._wasm.component import is_component

        return is_component(self.binary)

    def _noted(self, cache: str, prepare: bool) -> tuple[list[str], str] | None:
        """The entries of the cache that were made of the program, if it is unchanged; see `entries_of`. The first entry
        is the compiled program."""
        from linmem._wasm.known_files import COMPONENT, MODULE, entries_of

        with refuse_errors_of(cache):
            found = entries_of(cache, self.path, self._settings(prepare))
        return found if found and found[0] and found[0][0].endswith((MODULE, COMPONENT)) else None

    def _settings(self, prepare: bool) -> str:
        """What differs from run to run in what is made of a program."""
        return "fuel" * (self.limits.fuel is not None) + "prepared" * prepare

    def _take_kept(self, cache: str, prepare: bool) -> bool:
        """Take the compiled program from the cache, if the file is unchanged since it was compiled."""
        from linmem._wasm.known_files import COMPONENT, MODULE

        found = self._noted(cache, prepare)
        if found is None:
            return False
        (entry, *images), description = found
        if not entry.endswith(MODULE if self.kind is self.wasmtime.Module else COMPONENT):
            return False
        try:
            self.module = self.kind.deserialize_file(self.engine, entry)
            if prepare:
                from linmem._wasm.offered import from_description

                self.prepared = from_description(self.module, images, description)
        # Another version of wasmtime made the entry, or the OS refuses to map it or to make an image.
        except (self.wasmtime.WasmtimeError, ValueError, OSError, MemoryError):
            return False
        return True

    def _note(self, cache: str, prepare: bool, entries: list[str], description: str = "") -> None:
        """Note that the entries were made of the program."""
        from linmem._wasm.known_files import note_entries

        state = self._file[1]
        if state is not None:
            with contextlib.suppress(OSError):      # without the note, the next run reads the program again
                note_entries(cache, self.path, state, self._settings(prepare), entries, description)

    def _compiled(self, binary: bytes, cache: str | None) -> Any:
        """The compiled program, by its bytes."""
        from linmem._wasm.compiled import compiled
        from linmem._wasm.image_cache import Cache

        if cache is None:
            return compiled(self.engine, binary, None, self.kind)[0]
        with refuse_errors_of(cache):
            module, entry = compiled(self.engine, binary, Cache(cache), self.kind)
        if entry is not None:
            self._note(cache, False, [entry])
        return module

    def _check_export(self, binary: bytes, function: str, hint: str) -> None:
        from linmem._wasm.component import is_component
        from linmem._wasm.module import Module

        if is_component(binary):
            raise Refused(f"{self.path} is a component, which cannot be prewarmed; a module can (compile it for"
                          " wasm32-wasip1)")
        try:
            exports = Module(binary).exports()
        except ValueError:      # wasmtime decides whether the module is valid
            return
        if (function, 0) not in [(name, kind) for name, kind, _ in exports]:
            raise self._no_function(function, hint)

    def _no_function(self, name: str, hint: str) -> Refused:
        return Refused(f"{self.path} exports no function {name}{hint}")

    def _prepare(self, binary: bytes, cache: str | None) -> Any:
        from linmem._wasm import prepared

        # `install` was called for this engine. Otherwise `prepare` would make a memory to find this out, and the report
        # would have that memory.
        prepared._ASKS[self.engine] = True
        with refuse_errors_of(self.path if cache is None else cache):
            made = prepared.prepare(self.engine, binary, cache=cache, expose=self.kind is self.wasmtime.Module)
        if cache is not None:
            with contextlib.suppress(OSError, FileFormatError):     # another process removed an entry
                found = made._described()
                if found is not None:
                    self._note(cache, True, *found)
        return made

    def keep_names(self) -> None:
        """Keep what the report needs for names. Later the program itself may have changed its file."""
        from linmem._wasm.module import Module

        self.names_from = Module(self.binary)

    def names_by_address(self) -> dict[int, str]:
        """The names of memories by the addresses of their first bytes; of a module, the report finds the names."""
        return {}

    def core_content(self, trap: Any) -> Any:
        """What a core dump of the program has, after the trap."""
        from linmem._wasm.coredump import content_of_module, instance_of

        held = [] if self.instance is None else [
            instance_of(self.store, self.instance, self.prepared.outline, self.binary)]
        return content_of_module(self.path, held, trap)

    def plan_start(self, path: str, snapshot: Any) -> None:
        """Compile what a start from the snapshot needs, so that the start compiles nothing."""
        with refuse_errors_of(path):
            self.prepared._plan(snapshot)

    def _function(self, name: str) -> Any:
        """The type of the exported function; None if the program exports no function of this name."""
        found = next((export.type for export in self.module.exports if export.name == name), None)
        return found if isinstance(found, self.wasmtime.FuncType) else None

    def check_function(self, name: str, *, may_return: bool = False, hint: str = "") -> None:
        """Refuse a function that is not exported, or that cannot be called without arguments."""
        function = self._exported_function(name, hint)
        if function.params or (function.results and not may_return):
            what = "parameters" if may_return else "parameters or results"
            raise Refused(f"{self.path}: {name} has {what}, and must have none")

    def parse_arguments(self, name: str, texts: list[str]) -> list[int | float]:
        """The arguments for the exported function, by the types of its parameters.

        If it has none, returns no arguments: then `texts` are the program's arguments alone.
        """
        if not self._exported_function(name).params:
            return []
        from linmem._wasm.module import Module
        from linmem._wasm.reader import Unknown

        # The types are read here, because wasmtime-py aborts the process if it is asked for a type v128.
        try:
            kinds = Module(self.binary).parameters(name)
        except (Unknown, ValueError) as reason:     # ValueError: the file is not the one that is in the cache
            raise Refused(f"{self.path}: the parameters of {name} are not known: {reason}") from None
        signature = f"{name}({', '.join(kind or 'a reference' for kind in kinds)})"
        unfit = next((kind or "a reference" for kind in kinds if kind in ("", "v128")), None)
        if unfit is not None:
            raise Refused(f"{self.path}: {signature} cannot be called from the command line, because no argument can be"
                          f" {unfit}")
        return self._converted(signature, texts, kinds, parse_number)

    def _converted(self, signature: str, texts: list[str], kinds: list[Any],
                   convert: Callable[[str, Any], Any]) -> list[Any]:
        """One value for each type."""
        if len(texts) != len(kinds):
            raise Refused(f"{self.path}: {signature} takes {count(len(kinds), 'argument')}, got {len(texts)}",
                          EXIT_USAGE)
        found = []
        for number, (text, kind) in enumerate(zip(texts, kinds, strict=True), start=1):
            try:
                found.append(convert(text, kind))
            except ValueError as reason:
                raise Refused(f"{self.path}: {signature}: argument {number}, {text!r:.100}, {reason}",
                              EXIT_USAGE) from None
        return found

    def _exported_function(self, name: str, hint: str = "") -> Any:
        function = self._function(name)
        if function is None:
            raise self._no_function(name, hint)
        return function

    def run(self, command: str, work: Callable[[], None]) -> int:
        """The exit code of `work`, which makes the instance and calls its functions."""
        try:
            work()
        except self.wasmtime.ExitTrap as end:
            return int(end.code)
        except (self.wasmtime.Trap, self.wasmtime.WasmtimeError) as trap:
            if not self._is_trap(trap):
                reason = one_line(trap)
                raise Refused(f"{self.path}: {reason}{self.limits.explain(reason)}") from None
            text = self._trap_text(trap)
            print(f"linmem {command}: {printable(self.path)} {text}", file=sys.stderr)
            if self.core is not None:
                self.core.write(self, trap)
            return EXIT_TRAP
        return self.status

    def _is_trap(self, error: Exception) -> bool:
        """A call of the host that fails, for example at a wrong pointer, is a trap in another class of wasmtime-py."""
        return isinstance(error, self.wasmtime.Trap) or (
            str(error).startswith(RAN) and not one_line(error).startswith("exit with invalid exit status"))

    def _trap_text(self, trap: Any) -> str:
        reason = one_line(trap)
        if self.limits.fuel is not None and reason.endswith("all fuel consumed by WebAssembly"):
            return f"ran out of fuel (--fuel {self.limits.fuel})"
        where = str(trap).partition("Stack backtrace:")[0].partition("Caused by:")[0].rstrip()
        # The program chooses the names of its functions.
        lines = [f"trapped: {reason}", *where.splitlines()[:_MAX_LINES]]
        return "\n".join(printable(line[:_MAX_LINE]) for line in lines)

    def link(self, args: argparse.Namespace, arguments: list[str]) -> None:
        """Make the store and the linker, with the directories and the variables of the options."""
        self.store = self.wasmtime.Store(self.engine)
        self.limits.apply(self.store)
        self.store.set_wasi(self._wasi_config(args, arguments))
        self.linker = self._linker()

    def _linker(self) -> Any:
        linker = self.wasmtime.Linker(self.engine)
        linker.define_wasi()
        return linker

    def instantiate(self, snapshot: Any = None, path: str = "") -> None:
        """Make the instance; from the snapshot of the file at `path`, if one is given."""
        if self.prepared is None:
            self.instance = self.linker.instantiate(self.store, self.module)
        elif snapshot is None:
            self.instance = self.prepared.instantiate(self.store, self.linker)
        else:
            with refuse_errors_of(path):
                self.instance = self.prepared.instantiate(self.store, self.linker, start=snapshot)

    def flush_output(self) -> None:
        """Write what the program left in a buffer of standard output. Any thread may do this while the program runs."""

    def _wasi_config(self, args: argparse.Namespace, arguments: list[str]) -> Any:
        wasi = self.wasmtime.WasiConfig()
        try:
            wasi.argv = [os.path.basename(self.path), *arguments]
            wasi.env = list({**(os.environ if args.env_all else {}), **dict(args.env)}.items())
            for host, guest, writable in args.dir:
                try:
                    wasi.preopen_dir(host, guest, *self._permissions(writable))
                except self.wasmtime.WasmtimeError:
                    raise Refused(f"--dir {host}: the directory cannot be opened", EXIT_USAGE) from None
        except UnicodeEncodeError as error:
            raise Refused(f"{error.object!r} is not valid UTF-8, which WASI requires", EXIT_USAGE) from None
        # If the caller closed standard input (`linmem run program.wasm <&-`), descriptor 0 is a file of linmem.
        if sys.__stdin__ is not None:
            wasi.inherit_stdin()
        self._inherit_output(wasi)
        return wasi

    def _inherit_output(self, wasi: Any) -> None:
        wasi.inherit_stdout()
        wasi.inherit_stderr()

    def _permissions(self, writable: bool) -> tuple[Any, ...]:
        """The last arguments of `WasiConfig.preopen_dir`."""
        if writable:
            return ()
        wasmtime: Any = self.wasmtime
        if hasattr(wasmtime, "DirPerms"):       # an older wasmtime-py
            return wasmtime.DirPerms.READ_ONLY, wasmtime.FilePerms.READ_ONLY
        return (False,)

    def initialise(self, name: str, arguments: Sequence[int | float] = ()) -> list[int | float]:
        """Call `_initialize`, which a reactor exports, and then the function; returns the results of the function."""
        if name != "_initialize" and self._function("_initialize") is not None:
            self.check_function("_initialize")
            self.call("_initialize")
        return self.call(name, arguments)

    def call(self, name: str, arguments: Sequence[int | float] = ()) -> list[int | float]:
        """The results of a function, which must be numbers."""
        results: Any
        try:
            results = self.instance.exports(self.store)[name](self.store, *arguments)
        except self.wasmtime.WasmtimeError as error:
            if "wasmtime_valkind_t" not in str(error):
                raise
            results = error         # wasmtime-py has no Python value for a vector or an object
        found = [] if results is None else results if isinstance(results, list) else [results]
        # The types are not asked for before the call, because wasmtime-py aborts the process at the type v128.
        if not all(isinstance(result, (int, float)) for result in found):
            raise Refused(f"{self.path}: {name} returned a value that is not a number")
        return found
