"""``linmem info``: what this machine can do, and whether the guards hold."""

from __future__ import annotations

import os
import sys
from typing import Any

import linmem
from linmem._commands.parser import EXIT_REFUSED, Parser
from linmem._commands.text import show_size

DESCRIPTION = """\
Print what this machine allows, and let child processes fault on guard pages to see that they
hold. Exit code 0 if they do, else 1."""

# The byte is read by a getter of ctypes. On some systems a call of a foreign function would turn the fault into an
# exception.
GUARD_CHILD = """
import ctypes, sys
import linmem
from linmem._os import pages
pages.die_quietly()
unit = max(65536, pages.describe()["page_size"])
memory = linmem.create(unit, maximum=4 * unit, reserve=4 * unit, guard=unit)
base = memory.as_ptr()
address = {"last": base + memory.byte_size() - 1, "before": base - 1, "after": base + memory.byte_size(),
           "guard": memory.wasm_accessible().stop - 1}[sys.argv[1]]
print("ready", flush=True)
print(ctypes.c_ubyte.from_address(address).value)
"""

WASMTIME_CHILD = """
import wasmtime
import linmem.wasmtime
config = wasmtime.Config()
linmem.wasmtime.install(config)
engine = wasmtime.Engine(config)
store = wasmtime.Store(engine)
module = wasmtime.Module(engine, '(module (memory (export "memory") 1 4) (data (i32.const 7) "linmem"))')
memory = wasmtime.Instance(store, module, []).exports(store)["memory"]
ours = linmem.wasmtime.linear_memory(store, memory)
view = memoryview(ours)
base = ours.as_ptr()
memory.grow(store, 3)
found = (ours.as_ptr() - base, ours.byte_size(), bytes(view[7:13]))
if found != (0, 4 * 65536, b"linmem"):
    raise SystemExit(f"after a growth: moved by, size, contents = {found}")
store.close()
if bytes(view[7:13]) != b"linmem":
    raise SystemExit("the view does not survive store.close()")
"""

PROBES = (
    ("last", "the last byte of the memory", False),
    ("before", "the first byte before the base", True),
    ("after", "the first byte after byte_size", True),
    ("guard", "the last byte of the guard", True),
)
ACCESS_VIOLATION = 0xC0000005
CHILD_SECONDS = 60


def add_arguments(parser: Parser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("--json", action="store_true", help="print it as JSON")


def main(args: Any) -> int:
    from linmem._os import pages

    figures = {"linmem": linmem.__version__, "python": ".".join(map(str, sys.version_info[:3])),
               **pages.describe(), "wasmtime": probe_wasmtime(), "self_test": self_test()}
    if args.json:
        import json

        print(json.dumps(figures, indent=2))
    else:
        print_info(figures)
    return 0 if figures["self_test"]["passed"] else EXIT_REFUSED


def run_child(script: str, *arguments: str) -> tuple[int | None, str, str]:
    """The exit code (None: the child did not end), standard output and standard error of a child that runs Python."""
    import subprocess

    # The child imports the same linmem as this process.
    ours = os.path.dirname(os.path.dirname(os.path.abspath(linmem.__file__)))
    path = os.pathsep.join(part for part in (ours, os.environ.get("PYTHONPATH", "")) if part)
    try:
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True,
                              errors="replace", timeout=CHILD_SECONDS, env={**os.environ, "PYTHONPATH": path})
    except subprocess.TimeoutExpired:
        return None, "", f"no end after {CHILD_SECONDS} s"
    return done.returncode, done.stdout, done.stderr


def death(returncode: int | None) -> str | None:
    """The name of the memory fault that ended a process; None if the process ended in another way."""
    import signal

    if returncode is None:
        return None
    if returncode & 0xFFFFFFFF == ACCESS_VIOLATION:
        return "access violation (0xC0000005)"
    for name in ("SIGSEGV", "SIGBUS"):
        if hasattr(signal, name) and -returncode == getattr(signal, name):
            return name
    return None


def self_test() -> dict[str, Any]:
    """Starts children that read one byte each: one byte that is accessible, and three that are not."""
    children = []
    for probe, place, must_die in PROBES:
        returncode, out, error = run_child(GUARD_CHILD, probe)
        died_of = death(returncode)
        # The child must reach the access. Then comes a fault, or the zero of a new byte.
        held = died_of is not None and out == "ready\n" if must_die else (returncode, out) == (0, "ready\n0\n")
        children.append({"place": place, "must_fault": must_die, "returncode": returncode, "died_of": died_of,
                         "passed": held, "stderr": "" if held else error.strip()})
    return {"passed": all(child["passed"] for child in children), "children": children}


def probe_wasmtime() -> dict[str, Any]:
    """Try wasmtime in a child, because a wasmtime that is not compatible could end the process."""
    from importlib import metadata

    try:
        version = metadata.version("wasmtime")
    except metadata.PackageNotFoundError:
        return {"version": None, "works": False, "detail": "not installed: pip install 'linmem[wasmtime]'"}
    returncode, _, error = run_child(WASMTIME_CHILD)
    if returncode == 0:
        return {"version": version, "works": True, "detail": "installed, grown and closed under a live view"}
    lines = error.strip().splitlines()
    ended = death(returncode) or f"exit code {returncode}"
    return {"version": version, "works": False, "detail": f"{lines[-1] if lines else 'no message'} ({ended})"}


CAPABILITY_WORDS = {
    "moves": "a memory can move to larger reservations without a copy",
    "names": "memories carry a name in the system's maps",
    "discard_any_protection": "protected pages can be discarded",
    "populates": "prefault reports pages that cannot be written",
    "scans": "a pool learns which pages were touched",
    "maps_images": "memories share the pages of their image until they write them",
}


def print_info(figures: dict[str, Any]) -> None:
    space, left = figures["address_space"], figures["address_space_left"]
    print(f"linmem {figures['linmem']}, Python {figures['python']}\n")
    print(f"host page         {figures['page_size']} bytes")
    print(f"granularity       {figures['granularity']} bytes")
    print(f"address bits      {figures['address_bits']}: {show_size(space)}"
          + ("" if left == space else f", of which limits leave {show_size(left)}")
          + f"; linmem holds {show_size(figures['reserved'])}")
    for title, facts in (("limits", figures["limits"].items()), ("capabilities", figures["capabilities"].items())):
        lines = []
        for name, value in facts:
            if isinstance(value, bool):
                words = CAPABILITY_WORDS.get(name, "")
                lines.append(f"{'yes' if value else 'no ':3}  {name}" + (f": {words}" if words else ""))
            else:
                lines.append(f"{name} = {value}")
        for i, line in enumerate(lines or ["none"]):
            print(f"{title if i == 0 else '':18}{line}")
    wasmtime = figures["wasmtime"]
    version = wasmtime["version"] or "none"
    works = "linmem.wasmtime works" if wasmtime["works"] else "linmem.wasmtime does not work"
    print(f"{'wasmtime':18}{version}, {works}: {wasmtime['detail']}")
    print("\nself-test: each child process reads one byte")
    for child in figures["self_test"]["children"]:
        outcome = f"died of {child['died_of']}" if child["died_of"] else f"ended with code {child['returncode']}"
        print(f"  [{'ok' if child['passed'] else 'FAILED'}] {child['place']}: {outcome}")
        if child["stderr"]:
            print("    " + child["stderr"].replace("\n", "\n    "))
    print("The guards hold." if figures["self_test"]["passed"] else "THE GUARDS DO NOT HOLD on this machine.")
