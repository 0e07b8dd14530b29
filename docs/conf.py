"""Sphinx: the pages beside this file, and the API of the linmem that is installed."""

import sys
from importlib.metadata import metadata
from pathlib import Path

import linmem

sys.path.insert(0, str(Path(__file__).resolve().parent))       # for links.py and pictures.py

from links import resolve_source as linkcode_resolve  # noqa: F401

project = "linmem"
author = "the linmem developers"
copyright = author
release = version = linmem.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon",
              "sphinx.ext.intersphinx", "sphinx.ext.linkcode", "sphinx_copybutton", "sphinx_design",
              "sphinxext.opengraph", "links", "pictures"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"linmem {release}"
html_logo = html_favicon = "_static/linmem.svg"
html_static_path = ["_static"]
html_css_files = ["linmem.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#17704f", "color-brand-content": "#17704f"},
    "dark_css_variables": {"color-brand-primary": "#6fcfa8", "color-brand-content": "#6fcfa8"},
}

# The picture and the address that other sites show with a link to a page.
ogp_site_url = dict(line.split(", ") for line in metadata("linmem").get_all("Project-URL"))["Documentation"]
ogp_social_cards = {"line_color": "#17704f", "image": "_static/linmem.png", "image_mini": "_static/linmem.png"}
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

napoleon_google_docstring = False
napoleon_use_rtype = False
autosummary_generate = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"          # the docstrings say them, in words
default_role = "py:obj"             # a single backtick in a docstring is a name
napoleon_preprocess_types = True
napoleon_type_aliases = {
    "path-like": "os.PathLike",
    **{name: f"linmem.{name}" for name in linmem.__all__},
}

# The inventories have the names that the docstrings refer to, so a build needs no network.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", "inventories/python.txt"),
    "numpy": ("https://numpy.org/doc/stable", "inventories/numpy.txt"),
    "wasmtime": ("https://bytecodealliance.github.io/wasmtime-py", "inventories/wasmtime.txt"),
}
