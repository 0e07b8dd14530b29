"""Links of the API pages: from each name to its source, and from short names and foreign names to their pages."""

import functools
import importlib
import inspect
import re
from pathlib import Path

import tomllib
from sphinx.util.nodes import make_refnode

import linmem

ROOT = Path(__file__).resolve().parent.parent


def setup(app) -> dict:
    app.connect("missing-reference", resolve_short_name)
    return {"parallel_read_safe": True}


def resolve_short_name(app, env, node, contnode):
    """Resolve a name of linmem that a docstring of a submodule writes without "linmem."."""
    target = node.get("reftarget", "").removesuffix("()")
    if node.get("refdomain") != "py":
        return None
    domain = env.get_domain("py")
    found = domain.find_obj(env, "linmem", None, target, None, 0)
    if len(found) != 1:
        return None
    name, entry = found[0]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)


def resolve_source(domain: str, info: dict[str, str]) -> str | None:
    """The address of a name's source; None if it has no source of its own. Called by sphinx.ext.linkcode."""
    found = source_of(info["module"], info["fullname"]) if info["module"] else None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return found and f"{project['urls']['Source']}/blob/v{linmem.__version__}/{found[0]}#L{found[1]}"


def source_of(module: str, name: str) -> tuple[str, int] | None:
    """The file, relative to the root of the project, and the line of a name."""
    thing = importlib.import_module(module)
    for part in name.split("."):
        thing = inspect.getattr_static(thing, part, None) if inspect.isclass(thing) else getattr(thing, part, None)
    thing = inspect.unwrap(getattr(thing, "fget", None) or getattr(thing, "__func__", thing))
    home = getattr(thing, "__module__", None)
    try:
        file, line = inspect.getsourcefile(thing), inspect.getsourcelines(thing)[1]
        return Path(file).resolve().relative_to(ROOT).as_posix(), line
    except (TypeError, OSError, ValueError):
        # A class may have inherited the method. Descriptors have __objclass__, and Cython's functions the whole name.
        owner = getattr(thing, "__objclass__", None)
        name = f"{owner.__name__}.{thing.__name__}" if owner else getattr(thing, "__qualname__", name)
        return cython_lines().get(name) if home is None or home.startswith("linmem") else None


@functools.cache
def cython_lines() -> dict[str, tuple[str, int]]:
    """Where each class, method and function of the Cython files is defined."""
    found = {}
    for path in sorted(ROOT.glob("linmem/_*/*.px[iy]")):
        owner = ""
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            match = re.match(r"( *)(cdef class|class|def|cpdef(?: int| void| object)?) (\w+)", line)
            if match is None:
                continue
            indent, kind, name = match.groups()
            if kind.endswith("class"):
                owner = name
            found.setdefault(f"{owner}.{name}" if indent else name, (path.relative_to(ROOT).as_posix(), number))
    return found
