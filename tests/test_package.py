"""The shipped files: the installed package, the wheel, the sdist, and the C interface that the guide shows."""

import ast
import email
import importlib.metadata
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import types
import zipfile
from pathlib import Path

import pytest
from support import requires

import linmem

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(linmem.__file__).resolve().parent
ENV = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not beside the tests")


def test_the_package_under_test_is_the_one_that_is_installed():
    try:
        installed = importlib.metadata.distribution("linmem")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("linmem is not installed; it was imported from PYTHONPATH")
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        assert PACKAGE == ROOT / "linmem"
    else:
        assert Path(str(installed.locate_file("linmem"))).resolve() == PACKAGE


@requires("mypy")
def test_a_type_checker_finds_the_types_of_the_installed_package(tmp_path):
    """It reads files and runs no import hook."""
    try:
        importlib.metadata.distribution("linmem")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("linmem is not installed; it was imported from PYTHONPATH")
    (tmp_path / "user.py").write_text("import linmem\nreveal_type(linmem.create(1))\n", "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir", str(tmp_path / "cache"), "user.py"],
        cwd=tmp_path, env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")},
        capture_output=True, text=True, timeout=300)
    assert 'Revealed type is "linmem._core.memory.Memory"' in done.stdout, done.stdout + done.stderr


TYPED_USER = """
from argparse import Namespace
from typing import Any, SupportsIndex
from typing_extensions import assert_type

import linmem
import linmem.wasmtime


def creators(args: Namespace, kind: str, options: dict[str, Any]) -> None:
    pool = linmem.creator("pool", slots=args.slots)
    assert_type(pool, linmem.PoolingCreator)
    assert_type(linmem.creator("limiting", limit_bytes=args.limit, upstream=pool).used_bytes, int)
    assert_type(linmem.creator("callback", on_made=lambda mem, size: print(size)), linmem.CallbackCreator)
    assert_type(linmem.creator(kind), linmem.NativeCreator)
    linmem.creator(kind, **options)


def sizes(n: SupportsIndex, snapshot: linmem.wasmtime.Snapshot, prepared: linmem.wasmtime.Prepared) -> None:
    mem = linmem.create(n, n, reserve=n, guard=n)
    linmem.open_file("file", minimum=n, maximum=n, reserve=n)
    linmem.Lock(mem, n)
    linmem.Delta.open("file", max_size=n)
    linmem.Image.open("file", max_size=n)
    linmem.wasmtime.Snapshot.open("file", max_size=n)
    linmem.wasmtime.Sessions(prepared, start=snapshot, size=n)


def views(mem: linmem.Memory) -> None:
    for integers in (mem.view(), mem.view("<I"), mem.view("=q"), mem.view("|u1"), mem.view("P"), mem.view("intc")):
        assert_type(integers, memoryview[int])
    for numbers in (mem.view("<d"), mem.view("=f8"), mem.view("!d"), mem.view("double")):
        assert_type(numbers, memoryview[float])
    assert_type(mem.view("|b1"), memoryview[bool])
"""


@requires("mypy")
def test_a_type_checker_knows_the_types_of_what_a_program_makes(tmp_path):
    (tmp_path / "user.py").write_text(TYPED_USER, "utf-8")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MYPYPATH")}
    if PACKAGE.parent == ROOT:          # mypy refuses a path of installed packages
        environment["MYPYPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(tmp_path / "cache"), "user.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_view_takes_each_format_that_its_types_name():
    stub = ast.parse((PACKAGE / "_core" / "memory.pyi").read_text("utf-8"))
    formats = [each.value for node in stub.body
               if isinstance(node, ast.Assign) and node.targets[0].id in ("_Bool", "_Int", "_Float")
               for each in ast.walk(node) if isinstance(each, ast.Constant)]
    assert len(formats) > 100
    with linmem.create(65536) as mem:
        for format in formats:
            assert mem.view(format).itemsize > 0


def test_the_version_is_the_one_of_the_changelog():
    assert re.search(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)[1] == \
        linmem.__version__


def test_types_and_the_c_face_are_beside_the_code():
    for name in ("py.typed", "__init__.pxd", "_core/memory.pxd", "_core/adaptors.pxd", "_core/units.pxd",
                 "_core/atomic.pxd", "_core/atomic.h", "_os/pages.pxd", "_commands/demo.c", "_commands/demo.wasm",
                 "_commands/flush.wat"):
        assert (PACKAGE / name).is_file(), name


def test_a_star_import_takes_the_public_names_and_does_not_import_wasmtime():
    # The child hides the package wasmtime, because a star import must also work without this package.
    child = subprocess.run([sys.executable, "-W", "error", "-c", """if True:
        import sys
        sys.modules["wasmtime"] = None
        wasmtime = "the user's own"
        from linmem import *
        print(wasmtime, create(1).byte_size(), MemoryType.__name__)
        """], env=ENV, timeout=120, text=True, capture_output=True)
    assert (child.returncode, child.stdout.strip()) == (0, "the user's own 1 MemoryType"), child.stderr


@pytest.mark.parametrize("missing", ["all", "_os/pages", "_core/memory", "_core/adaptors"])
def test_an_import_without_built_extensions_raises_an_error_with_advice(tmp_path, missing):
    kept = [] if missing == "all" else [f"{missing}."]
    shutil.copytree(PACKAGE, tmp_path / "linmem", ignore=lambda folder, names: [
        name for name in names if name == "__pycache__" or (name.endswith((".so", ".pyd")) and (
            not kept or f"{Path(folder).relative_to(PACKAGE) / name}".replace(os.sep, "/").startswith(kept[0])))])
    # Without site-packages, where the import hook of an editable install would find the extensions.
    child = subprocess.run([sys.executable, "-S", "-W", "error", "-c", "import linmem"], cwd=tmp_path, timeout=120,
                           text=True, env={**ENV, "PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert child.returncode == 1
    said = child.stderr.strip().splitlines()[-1]
    assert said.startswith(f"ImportError: linmem was imported from the folder {str(tmp_path / 'linmem')!r}, where its"
                           " extension modules are not built for this Python (No module named 'linmem.")
    assert "pip install -e ." in said


def test_an_import_error_of_another_module_is_raised_unchanged(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "linmem", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "linmem" / "abc.py", "a", encoding="utf-8") as file:
        file.write("import no_such_module\n")
    child = subprocess.run([sys.executable, "-c", "import linmem"], cwd=tmp_path, timeout=120, text=True,
                           env={**ENV, "PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert child.stderr.strip().splitlines()[-1] == "ModuleNotFoundError: No module named 'no_such_module'"


def test_the_commands_of_the_readme_leave_a_clone_in_which_linmem_can_be_imported():
    readme = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"^(?:<!-- ci: (\w+) -->\n)?```(?:sh|bat)\n(.*)\n```$", readme, re.MULTILINE)
    assert [name for name, _ in commands] == ["demo", "test", "uv", ""]
    for _, command in commands:
        assert re.search(r"\bpip install -e '?\.\[(demo|test)\]", command)


def build(kind: str, folder: Path) -> Path:
    source = folder / "source"
    # A copy without the output of earlier builds, because a stale build/ would get into the wheel.
    shutil.copytree(ROOT, source, copy_function=shutil.copyfile, ignore=shutil.ignore_patterns(
        ".git", ".venv", ".cache", "build", "dist", "*.egg-info", "*.so", "*.pyd", "__pycache__", ".*_cache"))
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(folder), str(source)],
                   check=True, timeout=600, stdout=subprocess.DEVNULL,
                   env={name: value for name, value in os.environ.items() if name != "CFLAGS"})
    return next(folder.glob("linmem-*"))


@needs_sources
@pytest.mark.slow
def test_the_sdist_has_all_sources_and_no_generated_c(tmp_path):
    pytest.importorskip("build")
    pytest.importorskip("Cython")
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for folder in ("linmem", "bench", "tests", "docs", "examples")
               for path in (ROOT / folder).rglob("*")
               if path.suffix in {".py", ".pyx", ".pxd", ".pxi", ".h", ".pyi", ".md"} and "_build" not in path.parts}
    for name in {*sources, "linmem/_os/posix.pyx", "linmem/_os/windows.pyx", "linmem/py.typed", "setup.py",
                 "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "LICENSE"}:
        assert name in names, name
    assert {name for name in names if name.endswith(".c") and not name.startswith("tests/")} == {
        "bench/_forth.c", "examples/mapped_input.c", "linmem/_commands/demo.c"}
    assert {"bench/_forth.fs", "bench/_forth.wasm"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyd", ".pyc")) or "__pycache__" in name]


@needs_sources
@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("wheel", marks=requires("compiler")), "sdist"])
def test_two_builds_in_two_folders_give_the_same_bytes(tmp_path, kind):
    pytest.importorskip("build")
    pytest.importorskip("Cython")
    archives = []
    for name, umask in (("one", 0o022), ("the other", 0o077)):
        before = os.umask(umask)
        try:
            (tmp_path / name).mkdir()
            archives.append(build(kind, tmp_path / name).read_bytes())
        finally:
            os.umask(before)
    assert archives[0] == archives[1]


@needs_sources
@requires("compiler")
@pytest.mark.slow
def test_the_wheel_has_types_the_c_face_and_the_license_and_no_sources(tmp_path):
    pytest.importorskip("build")
    pytest.importorskip("Cython")
    wheel = build("wheel", tmp_path)
    assert wheel.stat().st_size <= 800_000, f"the wheel has {wheel.stat().st_size:,} bytes, may have 800,000"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        described = email.message_from_bytes(archive.read(f"linmem-{linmem.__version__}.dist-info/METADATA"))
    assert described["Author"] == "the linmem developers"
    assert {label.partition(",")[0] for label in described.get_all("Project-URL")} == {
        "Documentation", "Source", "Changelog", "Issues"}
    # The package index shows the README, and has none of the files beside it.
    links = re.findall(r"\]\(([^)]+)\)", described.get_payload())
    assert len(links) >= 20
    assert [link for link in links if not link.startswith("https://")] == []
    stubs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "linmem").rglob("*.py[i]")}
    # Headers that a .pxd file names are shipped, too.
    headers = {path.relative_to(ROOT).as_posix() for pattern in ("**/*.pxd", "_core/*.h")
               for path in (ROOT / "linmem").glob(pattern)}
    assert stubs | headers | {"linmem/py.typed", "linmem/_commands/demo.wasm", "linmem/_commands/flush.wat",
                               "linmem/bench/_forth.wasm"} <= names
    assert [name for name in names if name.endswith("/LICENSE")]
    release = f"linmem-{linmem.__version__}"
    assert {name.partition("/")[0] for name in names} == {"linmem", f"{release}.dist-info", f"{release}.data"}
    assert [name for name in names if ".data/" in name] == [f"{release}.data/data/share/man/man1/linmem.1"]
    assert not [name for name in names if name.endswith((".pyx", ".pxi", ".fs"))]
    not_for_users = re.compile(r"\b(docs|tests?|test_\w+|conftest|support|soak|stress|hammer|fuzz)\b")
    assert not [name for name in names if not_for_users.search(name)]
    assert {name for name in names if name.endswith(".c")} == {"linmem/_commands/demo.c"}
    # The installed package linmem.bench has every Python file of the folder bench/.
    assert {name for name in names if re.fullmatch(r"linmem/bench/\w+\.py", name)} == {
        f"linmem/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "bench").glob("*.py")}


CI = ROOT / ".ci"
needs_ci = pytest.mark.skipif(not CI.exists(), reason="the checks are not beside the tests")


@needs_ci
def test_each_stage_of_the_checks_is_a_file_of_its_own():
    run = (CI / "run").read_text("utf-8")
    named = re.findall(r"^ *(?:STAGES=\")?([a-z-]+) +\d+\"?$", run, re.MULTILINE)
    assert len(named) >= 20
    assert sorted(named) == sorted(path.stem for path in (CI / "stages").glob("*.sh"))
    assert "stage_" not in run.replace("stage_of", "")
    for path in (CI / "run", CI / "functions.sh", CI / "windows", *(CI / "stages").glob("*.sh")):
        assert not re.search(r"<<-?\s*['\"\\]?\w", path.read_text("utf-8")), f"{path.name} has a program in a heredoc"


@needs_ci
def test_the_test_files_that_a_stage_chooses_or_leaves_out_exist():
    """pytest says nothing when a file to ignore is missing."""
    texts = [path.read_text("utf-8") for path in (CI / "stages").glob("*.sh")]
    lists = re.findall(r"^ *(?:(?:only|all_but) [a-z_ ]+$|depends=\([a-z_\s]+\))", "\n".join(texts), re.MULTILINE)
    names = {name for each in lists for name in re.split(r"[ \n()]+", each.strip())[1:] if name}
    assert len(lists) == 7
    assert [name for name in sorted(names) if not (ROOT / "tests" / f"test_{name}.py").exists()] == []


@needs_ci
@requires("fork")
@pytest.mark.parametrize(("deep", "chosen"), [
    ("0", ["-m", "not slow", "tests/test_pool.py", "tests/test_image.py", "--ignore=tests/test_pool.py", "-O1"]),
    ("1", [""])])
def test_a_deep_run_of_the_checks_leaves_no_test_out(deep, chosen):
    script = """
        . "$0"
        only pool image
        files=("${chosen[@]}")
        all_but pool
        printf '%s\\n' "${fast[@]}" "${files[@]}" "${chosen[@]}" $quick
        """
    done = subprocess.run(["bash", "-euc", script, str(CI / "functions.sh")], env={**os.environ, "deep": deep},
                          capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == chosen


@requires("compiler")
@pytest.mark.slow
def test_the_cython_example_of_the_guide_compiles_against_the_package_and_works(tmp_path):
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    code = re.search(r"^```cython\n(.*?)^```$", (ROOT / "docs" / "howto" / "memories.md").read_text("utf-8"),
                     re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "example.pyx").write_text(code, "utf-8")
    subprocess.run([sys.executable, "-m", "Cython.Build.Cythonize", "--inplace", "example.pyx"], cwd=tmp_path, env=ENV,
                   check=True, timeout=300, stdout=subprocess.DEVNULL)
    child = subprocess.run([sys.executable, "-W", "error", "-c", """if True:
        import sys
        sys.path.insert(0, "")
        import example, linmem
        mem = linmem.create(1000, creator=example.RoomyCreator(linmem.creator(), 1 << 24))
        mem[5], mem[999] = 7, 8
        assert mem.byte_capacity() >= 1 << 24
        example.double(mem)
        assert len(mem) == 2000 and example.total(mem) == 15
        bounded = linmem.create(1000, maximum=1000)
        try:
            example.double(bounded)
        except linmem.GrowError:
            print("refused")
        """], cwd=tmp_path, env=ENV, timeout=120, text=True, capture_output=True)
    assert (child.returncode, child.stdout.strip()) == (0, "refused"), child.stderr


@pytest.fixture
def extensions_of_setup(monkeypatch):
    """A function that runs setup.py for a platform and a compiler, and returns the extensions with their flags."""
    pytest.importorskip("Cython")
    setuptools = pytest.importorskip("setuptools")
    import Cython.Build
    from setuptools.command.build_ext import build_ext

    def run(platform, without_gil=0, compiler="msvc"):
        given = {}
        monkeypatch.setattr(setuptools, "setup", lambda **how: given.update(how))
        monkeypatch.setattr(Cython.Build, "cythonize", lambda extensions, **how: extensions)
        monkeypatch.setattr(build_ext, "build_extensions", lambda self: None)
        monkeypatch.setattr(sys, "platform", platform)
        monkeypatch.setattr(sysconfig, "get_config_var",
                            lambda name: without_gil if name == "Py_GIL_DISABLED" else None)
        monkeypatch.chdir(ROOT)
        run.namespace = runpy.run_path("setup.py")
        command = given["cmdclass"]["build_ext"].__new__(given["cmdclass"]["build_ext"])
        command.compiler = types.SimpleNamespace(compiler_type=compiler)
        command.extensions = given["ext_modules"]
        command.build_extensions()
        assert len(command.extensions) >= 6
        return command.extensions
    return run


@pytest.mark.parametrize(("platform", "without_gil", "defined"), [
    ("win32", 1, [("Py_GIL_DISABLED", "1")]), ("win32", 0, []), ("win32", None, []), ("linux", 1, [])])
@needs_sources
def test_a_build_for_free_threaded_windows_defines_the_macro_for_the_compiler(platform, without_gil, defined,
                                                                     extensions_of_setup):
    """CPython's pyconfig.h does not define the macro on Windows; elsewhere it does."""
    extensions = extensions_of_setup(platform, without_gil)
    assert [extension.define_macros for extension in extensions] == [defined] * len(extensions)


@pytest.mark.parametrize("platform", ["win32", "linux"])
@needs_sources
def test_an_edit_of_a_header_causes_a_rebuild_of_every_extension(platform, extensions_of_setup):
    headers = {path.relative_to(ROOT).as_posix() for path in (ROOT / "linmem").rglob("*.h")}
    assert "linmem/_os/compat.h" in headers
    for extension in extensions_of_setup(platform):
        assert headers <= set(extension.depends), extension.name
        assert "." in extension.include_dirs, extension.name


SMALL = ["-fno-plt", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables", "-Wl,-s"]


@pytest.mark.parametrize(("cflags", "compiler", "platform", "expected"), [
    ("", "unix", "linux", ["-O2", "-g0", *SMALL]), ("-g0", "unix", "linux", ["-O2", "-g0", *SMALL]),
    ("-O1", "unix", "linux", ["-g0", *SMALL]), ("-g", "unix", "linux", ["-O2"]), ("-O1 -g1", "unix", "linux", []),
    ("", "unix", "darwin", ["-O2", "-g0"]), ("", "mingw32", "win32", ["-Os"]), ("", "msvc", "win32", [])])
@needs_sources
def test_a_build_has_debug_information_and_symbols_only_when_cflags_asks_for_them(cflags, compiler, platform, expected,
                                                                                  extensions_of_setup, monkeypatch):
    monkeypatch.setenv("CFLAGS", cflags)
    monkeypatch.delenv("LINMEM_STRICT", raising=False)
    for extension in extensions_of_setup(platform, compiler=compiler):
        flags = [*extension.extra_compile_args, *extension.extra_link_args]
        assert [flag for flag in flags if re.match("-O|-g|-Wl|-fno-plt|.*unwind", flag)] == [
            flag for flag in expected if extension.name != "linmem._os.pages" or "unwind" not in flag]


@needs_sources
def test_all_generated_functions_are_marked_small_except_the_ones_that_must_be_fast(extensions_of_setup, tmp_path):
    lines = ["/* Generated by Cython */", "static CYTHON_INLINE int __pyx_f_6memory_helper(int x) {",
             "static int __pyx_f_6linmem_5_core_6memory_copy_bytes(memory *m); /*proto*/",
             "static int __pyx_f_6linmem_5_core_6memory_copy_bytes(memory *m) {",
             "static PyObject *__pyx_pw_6linmem_5_core_6memory_6Memory_31read(PyObject *self, ",
             "static PyObject *__pyx_pw_6linmem_5_core_6memory_5Image_11from_fd(PyObject *self, ",
             "static CYTHON_INLINE void __Pyx_Raise(PyObject *type) {", "static int __pyx_lineno = 0;"]
    (tmp_path / "unit.c").write_text("\n".join(lines), "utf-8")
    extensions_of_setup("linux")
    mark = extensions_of_setup.namespace["optimize_for_size"]
    for _ in range(2):      # a second build finds the marks of the first
        mark(tmp_path / "unit.c")
        first, include, *marked = (tmp_path / "unit.c").read_text("utf-8").split("\n")
        assert (first, include) == (lines[0], '#include "linmem/_core/optimize.h"')
        assert [line for line in marked if line.startswith("LINMEM_SMALL ")] == [
            f"LINMEM_SMALL {line}" for line in (lines[5], lines[6])]
        assert [line.removeprefix("LINMEM_SMALL ") for line in marked] == lines[1:]


@requires("zig")
@pytest.mark.parametrize(("target", "fits"), [
    ("x86_64-linux-musl", True), ("aarch64-linux-musl", True), ("x86-linux-musl", False),
    ("arm-linux-musleabihf", False)])
def test_a_32_bit_build_is_refused_by_the_compiler_in_words(target, fits, tmp_path):
    (tmp_path / "atomic.c").write_text((PACKAGE / "_core" / "atomic.h").read_text("utf-8"), "utf-8")
    done = subprocess.run([sys.executable, "-m", "ziglang", "cc", "-target", target, "-c", "atomic.c",
                           "-o", "atomic.o"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == fits, done.stderr
    assert ("linmem needs a 64-bit Python" in done.stderr) != fits


@needs_sources
def test_every_extension_includes_the_check_that_refuses_a_32_bit_build():
    for path in (ROOT / "linmem").rglob("*.pyx"):
        assert re.search(r"^from linmem\._core\.atomic cimport ", path.read_text("utf-8"), re.MULTILINE), path
