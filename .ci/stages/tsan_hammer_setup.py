"""Builds tests/programs/hammer.pyx."""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(name="hammer", ext_modules=cythonize([Extension("hammer", ["hammer.pyx"])]))
