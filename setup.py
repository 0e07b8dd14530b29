"""Builds the extensions. Outside linmem/_os/, no other file of the project asks which operating system it is on."""

import os
import sys
import sysconfig
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

PAGES = "windows" if sys.platform == "win32" else "posix"
# The compiler gets the flags below after the user's CFLAGS, and the last flag wins. So BuildExt leaves out a flag if
# CFLAGS has its kind.
CFLAGS = os.environ.get("CFLAGS", "").split()
CHOSE_OPTIMIZATION = any(flag.startswith("-O") for flag in CFLAGS)
WANTS_DEBUGGING = any(flag.startswith("-g") and flag != "-g0" for flag in CFLAGS)
# CPython's installer for Windows has one pyconfig.h for the builds with and without a GIL. Extensions must define this.
WITHOUT_GIL = sys.platform == "win32" and bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
# Extensions whose code is mostly wrappers that Python calls seldom: -O3 makes them larger and hardly faster.
SELDOM_CALLED = ("linmem._core.adaptors", "linmem.bench._loops")
STRICT = os.environ.get("LINMEM_STRICT") == "1"     # CI sets it: a compiler warning is an error
FLAGS = {
    # GCC would load two neighbouring counters at once. Directly after a store to one of them, that is slow.
    "unix": ["-O3", "-g0", "-fvisibility=hidden", "-fno-tree-slp-vectorize",
             "-DCYTHON_COMPRESS_STRINGS=0"],        # the wheel compresses strings better than Cython
    "mingw32": ["-O3", "-D__USE_MINGW_ANSI_STDIO=1"],       # with this macro, mingw's printf knows %zu
    "msvc": ["/O2"],
}
# Without its symbol table an extension is smaller by a fifth. The linker of macOS does not know this flag.
STRIP_FLAGS = {"unix": [] if sys.platform == "darwin" else ["-Wl,-s"]}
STRICT_FLAGS = {
    "unix": ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-missing-field-initializers",
             "-Wno-cast-function-type", "-Wno-sign-compare",
             "-Wno-unused-function"],      # Cython leaves the functions that would decompress its strings
    "mingw32": ["-Wall", "-Werror"],
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
    "freethreading_compatible": True,
}


class BuildPy(build_py):
    def get_package_dir(self, package):
        """The files of `linmem.bench` are in bench/. In a checkout, linmem/bench/__init__.py makes them importable."""
        return "bench" if package == "linmem.bench" else super().get_package_dir(package)


class BuildExt(build_ext):
    def build_extensions(self):
        kind = self.compiler.compiler_type
        for extension in self.extensions:
            extension.include_dirs.append(".")
            extension.depends += HEADERS
            level = "-O2" if extension.name in SELDOM_CALLED else "-O3"
            extension.extra_compile_args += [level if flag == "-O3" else flag for flag in FLAGS.get(kind, [])
                                             if not (flag == "-O3" and CHOSE_OPTIMIZATION)
                                             and not (flag == "-g0" and WANTS_DEBUGGING)]
            if not WANTS_DEBUGGING:
                extension.extra_link_args += STRIP_FLAGS.get(kind, [])
            if WITHOUT_GIL:
                extension.define_macros.append(("Py_GIL_DISABLED", "1"))
            if STRICT:
                extension.extra_compile_args += STRICT_FLAGS.get(kind, [])
        super().build_extensions()


setup(
    ext_modules=cythonize(extensions, compiler_directives=directives,
                          build_dir=os.environ.get("LINMEM_BUILD_DIR", "build/cython")),
    cmdclass={"build_ext": BuildExt, "build_py": BuildPy},
)
