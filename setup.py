"""Builds the extensions. Outside linmem/_os/, no other file of the project asks which operating system it is on."""

import gzip
import os
import re
import sys
import sysconfig
import tarfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

PAGES = "windows" if sys.platform == "win32" else "posix"
# The compiler gets the flags below after the user's CFLAGS, and the last flag wins. So BuildExt leaves out a flag if
# CFLAGS has its kind.
CFLAGS = os.environ.get("CFLAGS", "").split()
CHOSE_OPTIMIZATION = any(flag.startswith("-O") for flag in CFLAGS)
WANTS_DEBUGGING = any(flag.startswith("-g") and flag != "-g0" for flag in CFLAGS)
# CPython's installer for Windows has one pyconfig.h for the builds with and without a GIL. Extensions must define this.
WITHOUT_GIL = sys.platform == "win32" and bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
# A wheel may have 800,000 bytes, so the C compiler optimizes functions for size (optimize.h), with these exceptions:
# functions that access bytes, grow, create or reset a memory, their page calls, the callbacks that wasmtime calls, and
# Cython's calls.
FAST = re.compile(r"""
    _(getbuffer|releasebuffer|subscript)_ | __(len|[gs]etitem)__$
  | Memory_\d+(read|write|view|grow_to|close|__dealloc__)$ | NativeCreator_\d+create$
  | (tp_new|tp_dealloc)_\w+_Memory$ | memory_\d+find$
  | Memory_(enter|leave)$ | RowBuffer_(\d*append|try_add|add|add_or_raise|enter|count|begin_change)$
  | _(begin_access|end_access|try_access|pins_now|is_guarded|is_protected|handles|try_retain|memory_retain
     |memory_release|copy_bytes?|copy_byte|copy_out|copy_in|move_bytes|check_span|clipped_index|clipped_key|memory_size
     |export_buffer|end_export|memory_grow_to|grow_as|grow_locked|grow_once|grow_pages|begin_own_growth|end_own_growth
     |is_own_growth
     |mapped_grow|mapped_grow_by|mapped_make|mapped_free|open_and_make|wrap|give_access|set_access|begin_page_call
     |take_bytes|check_(size|any_size|optional_size|extent|flag|type)|fill_sizes|mark_closed|release_if_unused
     |memory_drop|publish_windows|drop_windows|note_maker|tell_wrapped|memory_at|place_of
     |lock|unlock|try_lock|lock_memory|image_attach|image_rebind|image_reset|grow_with_hooks)$
  | _5pages_(os_)?(reserve|commit|protect|release|file_map|injected)$
  | _(PoolingCreator_make|take|take_or_make|reset|slot_keep|find_group|lock_pool|unlock_pool|same_shape|count_slot
     |hash_of|keep_counts|held_by)$ | _(get_memory|grow_memory|new_memory|make_with|finalize_memory)$
  | ^__Pyx_.*(ectorcall|Call|GetItem|As_?[A-Z]?s|XDECREF|IsTrue|TypeTest|ErrRestore|ErrFetch
     |Exception(Save|Reset|Swap)|ParseKeywords|AllocateExtensionType)""", re.VERBOSE)
# The first line of a function in the C code that Cython generated. Our own inline functions are left to the compiler.
FUNCTION = re.compile(r"^static (?!CYTHON_INLINE[^\n]*__pyx_|CYTHON_SMALL_CODE)[^=;\n]*?\b(__[Pp]yx_\w+)\([^;\n]*$",
                      re.MULTILINE)
SMALL = '#include "linmem/_core/optimize.h"\n'
STRICT = os.environ.get("LINMEM_STRICT") == "1"     # CI sets it: a compiler warning is an error
FLAGS = {
    # GCC would load two neighbouring counters at once. Directly after a store to one of them, that is slow.
    "unix": ["-O2", "-g0", "-fvisibility=hidden", "-fno-tree-slp-vectorize",
             "-DCYTHON_COMPRESS_STRINGS=0"],        # the wheel compresses strings better than Cython
    # Nothing turns on mingw's own printf: each extension would have a copy, with 10,000 bytes in a wheel. CPython's C
    # library, the UCRT, knows %zu too, but GCC checks formats for an older library. A wheel has 19,000 bytes less than
    # with -O2, and 7,000 less if GCC does not mix the instructions of neighbouring statements.
    "mingw32": ["-Os", "-fno-schedule-insns2", "-DCYTHON_COMPRESS_STRINGS=0", "-Wno-format"],
    "msvc": ["/O2"],
}
# Without its symbol table an extension is smaller by a fifth, without tables for debuggers by a twelfth, and by a
# fiftieth if GCC does not mix the instructions of neighbouring statements. The tools of macOS do not know all flags.
RELEASE_FLAGS = {"unix": ["-fno-plt", "-fno-unwind-tables", "-fno-asynchronous-unwind-tables", "-fno-schedule-insns2"]}
# This extension has the handler of memory faults. With its tables, a traceback of the C stack that starts in a handler
# behind it, as CPython's faulthandler prints one, shows the functions in which the fault happened.
WITH_UNWIND_TABLES = "linmem._os.pages"
STRIP_FLAGS = {"unix": ["-Wl,-s"]}
if sys.platform == "darwin":
    RELEASE_FLAGS = STRIP_FLAGS = {}
STRICT_FLAGS = {
    "unix": ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-missing-field-initializers",
             "-Wno-cast-function-type", "-Wno-sign-compare",
             "-Wno-unused-function"],      # Cython leaves the functions that would decompress its strings
    "mingw32": ["-Wall", "-Werror", "-Wno-unused-function"],
    "msvc": ["/WX"],
}

# The C headers, by paths relative to this file. The wheel has them because it has the .pxd files that include them.
HEADERS = [path.as_posix() for path in Path("linmem").rglob("*.h")]

extensions = [
    Extension("linmem._os.pages", [f"linmem/_os/{PAGES}.pyx"]),
    Extension("linmem._core.memory", ["linmem/_core/memory.pyx"]),
    Extension("linmem._core.adaptors", ["linmem/_core/adaptors.pyx"]),
    Extension("linmem._core.pool", ["linmem/_core/pool.pyx"]),
    Extension("linmem._core.bridge", ["linmem/_core/bridge.pyx"]),
    Extension("linmem.bench._loops", ["bench/_loops.pyx"]),
]
directives = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,                  # without it, // in nogil code takes the GIL when the divisor is zero
    "embedsignature": False,            # Cython prints keyword-only arguments wrongly; the .pyi files are right
    "auto_pickle": False,               # each class says itself whether it can be pickled
    "optimize.unpack_method_calls": False,      # smaller code; the paths that are fast call no methods
    "freethreading_compatible": True,
}


class BuildPy(build_py):
    def get_package_dir(self, package):
        """The files of `linmem.bench` are in bench/. In a checkout, linmem/bench/__init__.py makes them importable."""
        return "bench" if package == "linmem.bench" else super().get_package_dir(package)

    def build_package_data(self):
        """Comments are three fifths of the .pxd files, which only Cython reads in an installed package."""
        super().build_package_data()
        for path in Path(self.build_lib).rglob("*.pxd"):
            code = re.sub(r"^[ \t]*#.*\n|[ \t]+#.*$", "", path.read_text("utf-8"), flags=re.MULTILINE)
            path.write_text(code, "utf-8", newline="\n")


class BuildExt(build_ext):
    def build_extensions(self):
        kind = self.compiler.compiler_type
        for extension in self.extensions:
            extension.include_dirs.append(".")
            extension.depends += HEADERS
            extension.extra_compile_args += [flag for flag in FLAGS.get(kind, [])
                                             if not (flag.startswith("-O") and CHOSE_OPTIMIZATION)
                                             and not (flag == "-g0" and WANTS_DEBUGGING)]
            if not WANTS_DEBUGGING:
                extension.extra_compile_args += [flag for flag in RELEASE_FLAGS.get(kind, []) if not (
                    extension.name == WITH_UNWIND_TABLES and flag.endswith("unwind-tables"))]
                extension.extra_link_args += STRIP_FLAGS.get(kind, [])
            if WITHOUT_GIL:
                extension.define_macros.append(("Py_GIL_DISABLED", "1"))
            if STRICT:
                extension.extra_compile_args += STRICT_FLAGS.get(kind, [])
        super().build_extensions()

    def build_extension(self, extension):
        for source in extension.sources:
            optimize_for_size(Path(source))
        super().build_extension(extension)


def optimize_for_size(source):
    """Marks the functions of a C file that Cython generated, unless FAST names them."""
    first, _, code = source.read_bytes().decode().partition("\n")       # Cython knows its files by the first line
    if not code.startswith(SMALL):
        code = FUNCTION.sub(lambda line: line[0] if FAST.search(line[1]) else f"LINMEM_SMALL {line[0]}", code)
        source.write_bytes(f"{first}\n{SMALL}{code}".encode())


class BdistWheel(bdist_wheel):
    def write_wheelfile(self, *args, **kwargs):
        """Called directly before the files are archived. Their modes must not depend on the user's umask."""
        super().write_wheelfile(*args, **kwargs)
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(0o755 if path.is_dir() or path.suffix in (".so", ".pyd") else 0o644)


class Sdist(sdist):
    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        """Leaves out what differs from build to build: times, users, and modes that depend on the umask."""
        if format != "gztar":
            return super().make_archive(base_name, format, root_dir, base_dir, owner, group)
        epoch = int(os.environ["SOURCE_DATE_EPOCH"])

        def same(member):
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            member.mtime = epoch
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            return member

        name = Path(f"{base_name}.tar.gz")
        name.parent.mkdir(parents=True, exist_ok=True)
        with (open(name, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=epoch) as zipped,
              tarfile.open(fileobj=zipped, mode="w") as archive):
            archive.add(base_dir, filter=same)      # in the order of the names
        return str(name)


PROJECT = Path("pyproject.toml").read_text("utf-8")
SOURCES = re.search(r'^Source = "(.*)"$', PROJECT, re.MULTILINE)[1]
# The package index shows the README outside the sources, so its links to files need the address of the sources.
README = re.sub(r"\]\((?!https?:|#)", f"]({SOURCES}/blob/main/", Path("README.md").read_text("utf-8"))

# The times of the files in an archive, unless the user sets others: the earliest time that a zip archive can hold.
os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")
setup(
    long_description=README,
    long_description_content_type="text/markdown",
    ext_modules=cythonize(extensions, compiler_directives=directives,
                          build_dir=os.environ.get("LINMEM_BUILD_DIR", "build/cython")),
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy, "bdist_wheel": BdistWheel, "sdist": Sdist},
)
