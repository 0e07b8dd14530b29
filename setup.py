"""Builds the extensions. The only file of the project that knows the operating system."""

import os
import sys
import sysconfig
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PAGES = "windows" if sys.platform == "win32" else "posix"
CHOSEN = any(flag.startswith("-O") for flag in os.environ.get("CFLAGS", "").split())   # ours would come later, and win
# CPython's installer for Windows has one pyconfig.h for both builds, and leaves this to those who build extensions.
WITHOUT_GIL = sys.platform == "win32" and bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
STRICT = os.environ.get("LINMEM_STRICT") == "1"     # CI: a compiler warning is an error
FLAGS = {
    "unix": ["-O3", "-fvisibility=hidden"],
    "mingw32": ["-O3", "-D__USE_MINGW_ANSI_STDIO=1"],       # a printf that knows %zu, and is checked as one
    "msvc": ["/O2"],
}
STRICT_FLAGS = {
    "unix": ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-missing-field-initializers",
             "-Wno-cast-function-type", "-Wno-sign-compare"],
    "mingw32": ["-Wall", "-Werror"],
    "msvc": ["/WX"],
}

# The C headers, by paths from here. The wheel has them, too: the .pxd files that name them are in it.
HEADERS = [path.as_posix() for path in Path("linmem").rglob("*.h")]

extensions = [
    Extension("linmem._os.pages", [f"linmem/_os/{PAGES}.pyx"]),
    Extension("linmem._core.memory", ["linmem/_core/memory.pyx"]),
    Extension("linmem._core.adaptors", ["linmem/_core/adaptors.pyx"]),
    Extension("linmem._core.pool", ["linmem/_core/pool.pyx"]),
    Extension("linmem._core.bridge", ["linmem/_core/bridge.pyx"]),
    Extension("linmem.bench._raw", ["bench/_raw.pyx"]),
    Extension("linmem.bench._loops", ["bench/_loops.pyx"]),
]
directives = {
    "language_level": 3,
    "boundscheck": False,
    "wraparound": False,
    "cdivision": True,                  # else // in nogil code hides a path that takes the GIL
    "embedsignature": False,            # it misprints keyword-only arguments; the .pyi files say them
    "freethreading_compatible": True,
}


class BuildExt(build_ext):
    def build_extensions(self):
        kind = self.compiler.compiler_type
        for extension in self.extensions:
            extension.include_dirs.append(".")
            extension.depends += HEADERS
            extension.extra_compile_args += [flag for flag in FLAGS.get(kind, []) if not (flag == "-O3" and CHOSEN)]
            if WITHOUT_GIL:
                extension.define_macros.append(("Py_GIL_DISABLED", "1"))
            if STRICT:
                extension.extra_compile_args += STRICT_FLAGS.get(kind, [])
        super().build_extensions()


setup(
    ext_modules=cythonize(extensions, compiler_directives=directives,
                          build_dir=os.environ.get("LINMEM_BUILD_DIR", "build/cython")),
    cmdclass={"build_ext": BuildExt},
)
