"""Sphinx: the pages beside this file, and the API of the linmem that is installed."""

import linmem

project = "linmem"
author = "the linmem developers"
copyright = author
release = version = linmem.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"linmem {release}"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

napoleon_google_docstring = False
napoleon_use_rtype = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"          # the docstrings say them, in words
default_role = "code"               # a single backtick in a docstring is a name
