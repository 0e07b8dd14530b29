"""Rules for the source: floors, OS code in linmem/_os only, stubs, docstrings, and a budget for imports."""

import importlib.metadata
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, answer, requires

import linmem
from linmem._core.memory import _exception_of

PACKAGE = Path(linmem.__file__).parent
HOUSE = ROOT / "linmem"                 # the sources; an installed package has only some of them
SOURCES = sorted(path for path in HOUSE.rglob("*") if path.suffix in (".py", ".pyx", ".pxd", ".pxi"))


def room_of(path):
    name = ".".join(path.relative_to(HOUSE).with_suffix("").parts)
    return "" if name == "__init__" else name.removesuffix(".__init__")


# The table in CONTRIBUTING.md: the layer of each file.
MAP = re.findall(r"^\| (\d) \| `([^`]+)` \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), flags=re.MULTILINE)
LAYERS = {room_of(HOUSE / name): int(layer) for layer, name in MAP}
LAYERS |= {"_os": 1}
STRANGERS = (3, 4)      # files within one of these layers must not import each other


def code_of(path):
    """The source without comments and docstrings."""
    text = re.sub(r'("""|\'\'\')(?:(?!\1).)*?>>>.*?\1', "", path.read_text("utf-8"), flags=re.S)
    return re.sub(r"(^|\s)#.*", "", text)


def imports_of(path):
    for line in re.findall(r"^\s*((?:from|import|cimport)\s+linmem[^\n]*)", code_of(path), flags=re.M):
        words = re.match(r"(?:from\s+(\S+)\s+c?import\s+(.*)|c?import\s+(\S+))", line)
        base, names, plain = words.groups()
        if plain:
            yield plain.removeprefix("linmem").lstrip(".")
            continue
        base = base.removeprefix("linmem").lstrip(".")
        for name in re.findall(r"(\w+)(?:\s+as\s+\w+)?", names) or [""]:
            inner = f"{base}.{name}".lstrip(".")
            yield inner if inner in LAYERS else base


@requires("sources")
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_imports_point_down_and_files_of_layers_3_and_4_do_not_import_each_other(path):
    room = room_of(path)
    assert room in LAYERS, f"{room} has no row in CONTRIBUTING.md"
    for other in imports_of(path):
        assert other in LAYERS, f"{room} imports {other!r}, which has no row in CONTRIBUTING.md"
        lower = LAYERS[other] + (LAYERS[room] in STRANGERS) <= LAYERS[room]
        assert lower or other == room, f"{room} may not know {other}"


@requires("sources")
def test_imports_have_no_cycle():
    known = {}
    for path in SOURCES:
        known.setdefault(room_of(path), set()).update(set(imports_of(path)) - {room_of(path)})
    while known:
        free = {room for room, others in known.items() if not others & known.keys()}
        assert free, f"imports run in a circle within {sorted(known)}"
        known = {room: others for room, others in known.items() if room not in free}


@requires("sources")
def test_the_map_has_a_row_for_each_file_and_no_other():
    there = {path.relative_to(HOUSE).as_posix() for path in HOUSE.rglob("*")
             if path.suffix in (".py", ".pyx", ".pxi", ".h")
             or (path.suffix == ".pxd" and not path.with_suffix(".pyx").exists() and path.name != "__init__.pxd")}
    assert sorted(name for _, name in MAP) == sorted(there)


@requires("sources")
def test_the_layering_test_sees_imports():
    assert {"_core.units", "_os.pages", "abc"} <= set(imports_of(HOUSE / "_core" / "memory.pyx"))
    assert "_core.memory" in set(imports_of(HOUSE / "_core" / "adaptors.pyx"))


OS_WORDS = re.compile(r"sys\.platform|os\.name|platform\.system|\bmmap\s*\(|\bmunmap\b|\bmprotect\b|\bmadvise\b"
                      r"|VirtualAlloc|VirtualProtect|VirtualFree|sys/mman\.h|windows\.h")


@requires("sources")
@pytest.mark.parametrize("path", [path for path in SOURCES if path.parent.name != "_os"],
                         ids=lambda path: str(path.relative_to(HOUSE)))
def test_only_the_page_floor_uses_names_of_the_operating_system(path):
    text = re.sub(r'""".*?"""', "", code_of(path), flags=re.S)
    text = re.sub(r'"(?:[^"\n\\]|\\.)*"', '""', text)      # messages may contain names of calls
    assert OS_WORDS.findall(text) == []


@requires("sources")
def test_the_word_test_sees_the_page_floor():
    assert OS_WORDS.search((HOUSE / "_os" / "posix.pyx").read_text("utf-8"))


STRINGS = re.compile(r"(\"\"\"|\'\'\')(.*?)\1", re.DOTALL)
# A line of C, not of prose, Python or wasm: a directive, a function's head, a declaration, or a return.
LINE_OF_C = re.compile(r"^\s*#\s*(?:include|define|undef|if|ifdef|ifndef|endif)\b|\)\s*\{\s*$"
                       r"|^\s*(?:static|typedef|struct|return|extern)\b.*[;{]", re.MULTILINE)


def verbatim_c(text):
    """The multi-line strings that hold C."""
    return [string for _, string in STRINGS.findall(text) if "\n" in string.strip() and LINE_OF_C.search(string)]


@requires("sources")
def test_verbatim_c_in_a_string_is_at_most_three_lines():
    found = [(path.name, string) for folder in (HOUSE, ROOT / "bench") for path in folder.rglob("*.p*")
             if path.suffix in (".pyx", ".pxd", ".pxi", ".py") for string in verbatim_c(path.read_text("utf-8"))]
    assert found, "the test finds no verbatim C"
    assert [(name, string) for name, string in found if len(string.strip().splitlines()) > 3] == []


@pytest.mark.parametrize("opening", ["cdef extern from *:", "cdef extern from * nogil:  # why", "C = \\"])
@pytest.mark.parametrize("quotes", ['"""', "'''"])
def test_the_test_for_verbatim_c_finds_each_form_of_it(opening, quotes):
    assert verbatim_c(f"{opening}\n    {quotes}\n    static int f(void) {{\n        return 1;\n    }}\n    {quotes}\n")


@requires("sources")
def test_only_compat_h_has_os_conditions_and_a_cimport_needs_no_header():
    knows = [path.relative_to(HOUSE).as_posix() for path in HOUSE.rglob("*.h")
             if re.search(r"__linux__|_WIN32|sys/mman\.h|windows\.h", path.read_text("utf-8"))]
    assert knows == ["_os/compat.h"]
    assert len((HOUSE / "_os" / "compat.h").read_text("utf-8").splitlines()) <= 220
    rooms, reached = [""], []
    for room in rooms:      # the loop appends to this list
        reached.append(HOUSE.joinpath(*(room or "__init__").split(".")).with_suffix(".pxd"))
        rooms += sorted(set(imports_of(reached[-1])) - set(rooms))
    assert {HOUSE / "_core" / "memory.pxd", HOUSE / "_os" / "pages.pxd"} <= set(reached)
    for path in reached:
        assert not re.search(r'extern from (\*|"(?!<))', code_of(path)), path


@requires("sources")
def test_every_page_call_is_made_to_fail_by_one_mechanism():
    counts = {path.name: path.read_text("utf-8").count("injected(") for path in HOUSE.rglob("*.p*")
              if path.suffix in (".pyx", ".pxd", ".pxi")}
    assert {name for name, count in counts.items() if count} == {"common.pxi"}
    assert counts["common.pxi"] <= 4


def codes():
    return re.findall(r"^\s+(E_\w+) = (-\d+)", (HOUSE / "_core" / "units.pxd").read_text("utf-8"), flags=re.M)


@requires("sources")
def test_every_code_of_ours_has_a_text_and_an_exception():
    assert len(codes()) >= 9
    texts = set()
    for name, code in codes():
        if name == "E_PYTHON":      # carries its own exception
            continue
        error = _exception_of(int(code))
        assert isinstance(error, Exception)
        texts.add("" if name == "E_VALUE" else str(error))      # each failure with E_VALUE has its own text
    assert len(texts) == len(codes()) - 1, "two codes have the same text"


STUBBED = ["linmem._core.memory", "linmem._core.pool", "linmem._core.adaptors",
           "linmem._core.bridge", "linmem._os.pages"]


@requires("mypy", "docstrings")
def test_the_stubs_agree_with_the_runtime(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", *STUBBED, "--concise", "--ignore-unused-allowlist",
         "--allowlist", str(ROOT / "tests" / "stubtest_allowlist.txt"),
         "--mypy-config-file", str(ROOT / "pyproject.toml")],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)})
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_brings_neither_numpy_nor_wasmtime_and_few_modules():
    loaded = answer("""
        import sys, ctypes
        before = set(sys.modules)
        import linmem
        print(*sorted(set(sys.modules) - before))
        """).split()
    assert not {name.split(".")[0] for name in loaded} & {"numpy", "wasmtime", "dataclasses", "re", "inspect"}
    assert "linmem._core.memory" in loaded
    assert len([name for name in loaded if not name.startswith("linmem")]) <= 10, loaded


def test_the_version_is_the_one_of_the_installed_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+", linmem.__version__)
    try:
        installed = importlib.metadata.version("linmem")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == linmem.__version__


def public_things():
    for name in linmem.__all__:
        thing = getattr(linmem, name)
        yield name, thing
        if inspect.isclass(thing):
            for part, value in inspect.getmembers(thing):
                ours = getattr(value, "__module__", "") or getattr(value, "__objclass__", thing).__module__
                public = not part.startswith("_") and part not in dir(Exception) and ours.startswith("linmem")
                if public and (callable(value) or inspect.isdatadescriptor(value)):
                    yield f"{name}.{part}", value


# Classes of plain data. The class docstring describes the fields.
FIELDS = {"MemoryType", "MemoryInfo", "ImageInfo", "Place", "LimitError", "PageError"}


@requires("docstrings")
@pytest.mark.parametrize(("name", "thing"), [pytest.param(*pair, id=pair[0]) for pair in public_things()])
def test_every_public_name_has_a_docstring(name, thing):
    owner, _, part = name.partition(".")
    bare = type(thing).__name__ in ("getset_descriptor", "member_descriptor") and not inspect.getdoc(thing)
    if part and (owner in FIELDS or bare):
        assert re.search(rf"\b{part}\b", inspect.getdoc(getattr(linmem, owner)))
    else:
        assert (inspect.getdoc(thing) or "").strip(), f"{name} has no docstring"


def test_the_public_names_are_the_ones_promised():
    assert set(linmem.__all__) <= set(dir(linmem))
    for name in linmem.__all__:
        assert getattr(linmem, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        linmem.nothing  # noqa: B018


def test_all_files_that_the_command_line_writes_go_through_the_one_writer():
    writes = re.compile(r"""\bopen\([^()]*["'][rbt+]*[wax][rbt+wax]*["']|\.write_(text|bytes)\(|\bsavefig\(""")
    for folder in (HOUSE, HOUSE.parent / "bench"):
        for path in sorted(folder.rglob("*.py")):
            found = [line for line in path.read_text("utf-8").splitlines() if writes.search(line)]
            expected = {"cli.py": ["os.devnull"], "atomic_file.py": ["x+b", "wb", "savefig"]}.get(path.name, [])
            assert len(found) == len(expected), (path, found)
            assert all(word in line for word, line in zip(expected, found, strict=True)), (path, found)
