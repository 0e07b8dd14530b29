# cython: language_level=3
"""The same page calls as linmem's, from a C loop: what the operating system alone costs."""

from linmem._os cimport pages
