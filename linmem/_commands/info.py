"""Print the limits and the capabilities of this machine, and check in child processes that
accesses to guard pages fault.

Exit code 0 if each of these accesses faults, else 1.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from typing import Any

import linmem
from linmem._commands.parser import EXIT_REFUSED, Parser, columns
from linmem._commands.text import show_size

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
    raise SystemExit("the view shows other bytes after store.close()")
"""

COMPONENT_CHILD = """
import wasmtime
import linmem.wasmtime
config = wasmtime.Config()
linmem.wasmtime.install(config)
engine = wasmtime.Engine(config)
prepared = linmem.wasmtime.prepare(engine, '''(component
    (core module $m (memory 1) (data (i32.const 7) "linmem")
        (func (export "first") (result i32) (i32.load8_u (i32.const 7))))
    (core instance $i (instantiate $m)) (func (export "first") (result u32) (canon lift (core func $i "first"))))''')
store = wasmtime.Store(engine)
instance = prepared.instantiate(store)
memories = linmem.wasmtime.memories(instance)
view = memoryview(memories["module 0, memory 0"])
found = (instance.get_func(store, "first")(store), prepared.skipped)
if found != (ord("l"), ()):
    raise SystemExit(f"the component's first byte, and what was skipped = {found}")
store.close()
if bytes(view[7:13]) != b"linmem":
    raise SystemExit("the view shows other bytes after store.close()")
"""

PROBES = (
    ("last", "the last byte of the memory", False),
    ("before", "the first byte before the base", True),
    ("after", "the first byte after byte_size", True),
    ("guard", "the last byte of the guard", True),
)
# The names of exit codes after a memory fault. Python may show Windows' code for an access violation, 0xC0000005, as a
# negative number.
FAULTS: dict[int | None, str] = dict.fromkeys((0xC0000005, 0xC0000005 - 2 ** 32), "access violation (0xC0000005)")
FAULTS |= {-getattr(signal, name): name for name in ("SIGSEGV", "SIGBUS") if hasattr(signal, name)}
CHILD_SECONDS = 60


def add_arguments(parser: Parser) -> None:
    parser.description = __doc__
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def main(args: Any) -> int:
    from linmem._os import pages

    figures = {"linmem": linmem.__version__, "python": ".".join(map(str, sys.version_info[:3])),
               **pages.describe(), "wasmtime": probe_wasmtime(), "self_test": self_test()}
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        print_info(figures)
    return 0 if figures["self_test"]["passed"] else EXIT_REFUSED


def run_child(script: str, *arguments: str) -> tuple[int | None, str, str]:
    """The exit code (None: the child did not end), standard output and standard error of a child that runs Python."""
    # The child imports the same linmem as this process.
    ours = os.path.dirname(os.path.dirname(os.path.abspath(linmem.__file__)))
    path = os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True,
                              errors="replace", timeout=CHILD_SECONDS, env={**os.environ, "PYTHONPATH": path})
    except subprocess.TimeoutExpired:
        return None, "", f"no end after {CHILD_SECONDS} s"
    return done.returncode, done.stdout, done.stderr


def death(returncode: int | None) -> str | None:
    """The name of the memory fault that ended a process; None if the process ended in another way."""
    return FAULTS.get(returncode)


def self_test() -> dict[str, Any]:
    """Start children that read one byte each: one byte that is accessible, and three bytes that are not."""
    children = []
    for probe, place, must_die in PROBES:
        returncode, out, error = run_child(GUARD_CHILD, probe)
        died_of = death(returncode)
        # The child prints "ready" before the access. The access ends in a fault, or reads the zero of a new byte.
        held = died_of is not None and out == "ready\n" if must_die else (returncode, out) == (0, "ready\n0\n")
        children.append({"place": place, "must_fault": must_die, "returncode": returncode, "died_of": died_of,
                         "passed": held, "stderr": "" if held else error.strip()})
    return {"passed": all(child["passed"] for child in children), "children": children}


def probe_wasmtime() -> dict[str, Any]:
    """Try wasmtime in a child process, because an incompatible wasmtime could end the process."""
    try:
        version = metadata.version("wasmtime")
    except metadata.PackageNotFoundError:
        return {"version": None, "works": False, "detail": "not installed: pip install 'linmem[wasmtime]'"}
    found = {"version": version, **tried(WASMTIME_CHILD, "installed, grown and closed under a live view")}
    if found["works"]:
        found["components"] = tried(COMPONENT_CHILD, "prepared, called and closed under a live view")
    return found


def tried(script: str, success: str) -> dict[str, Any]:
    returncode, _, error = run_child(script)
    if returncode == 0:
        return {"works": True, "detail": success}
    last_line = (error.strip() or "no message").splitlines()[-1]
    return {"works": False, "detail": f"{last_line} ({death(returncode) or f'exit code {returncode}'})"}


CAPABILITY_WORDS = {
    "moves": "a memory can move to larger reservations without a copy",
    "names": "memories carry a name in the system's maps",
    "discard_any_protection": "protected pages can be discarded",
    "populates": "prefault reports pages that cannot be written",
    "scans": "a pool can ask which pages were touched",
    "maps_images": "memories share the pages of their image until they write them",
    "shares": "processes can share a memory that grows",
    "names_files": "processes find a shared memory by a name that the system keeps",
    "adopts_files": "a memory can have the bytes of a file",
    "reports_faults": "a report can name the memory before a memory fault ends the process",
}


def say(title: str, text: str, margin: int = 18) -> None:
    """Print a line. A terminal gets it broken between words at its width, with the rest behind the margin."""
    line = f"{title:18}{text}"
    if sys.stdout.isatty():
        import textwrap

        line = textwrap.fill(line, max(columns(), 2 * margin), subsequent_indent=" " * margin, break_on_hyphens=False)
    print(line)


def print_info(figures: dict[str, Any]) -> None:
    space, left = figures["address_space"], figures["address_space_left"]
    print(f"linmem {figures['linmem']}, Python {figures['python']}\n")
    print(f"host page         {figures['page_size']} bytes")
    print(f"granularity       {figures['granularity']} bytes")
    print(f"address bits      {figures['address_bits']}: {show_size(space)}"
          + ("" if left == space else f", of which limits leave {show_size(left)}")
          + f"; linmem holds {show_size(figures['reserved'])}")
    for title in ("limits", "capabilities"):
        lines = [f"{'yes' if value else 'no':3}  {name}: {CAPABILITY_WORDS[name]}" if isinstance(value, bool)
                 else f"{name} = {value}" for name, value in figures[title].items()]
        for i, line in enumerate(lines or ["none"]):
            say("" if i else title, line, 23 if title == "capabilities" else 18)
    wasmtime = figures["wasmtime"]
    version = wasmtime["version"] or "none"
    works = "linmem.wasmtime works" if wasmtime["works"] else "linmem.wasmtime does not work"
    say("wasmtime", f"{version}, {works}: {wasmtime['detail']}")
    if "components" in wasmtime:
        components = wasmtime["components"]
        say("components", f"{'work' if components['works'] else 'do not work'}: {components['detail']}")
    print("\nself-test: each child process reads one byte")
    for child in figures["self_test"]["children"]:
        outcome = f"ended by {child['died_of']}" if child["died_of"] else f"ended with code {child['returncode']}"
        print(f"  [{'ok' if child['passed'] else 'FAILED'}] {child['place']}: {outcome}")
        if child["stderr"]:
            print("    " + child["stderr"].replace("\n", "\n    "))
    print("The guards hold." if figures["self_test"]["passed"] else "THE GUARDS DO NOT HOLD on this machine.")
