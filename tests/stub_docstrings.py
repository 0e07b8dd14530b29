"""Copies the docstrings of the extension modules into their stubs, where editors read them.

    python tests/stub_docstrings.py
"""

import ast
import importlib
import inspect
from pathlib import Path

import linmem

PACKAGE = Path(linmem.__file__).parent
ROOMS = ("_core", "_os")


def stubs() -> list[Path]:
    return sorted(path for room in ROOMS for path in (PACKAGE / room).glob("*.pyi"))


def public_part(stub: Path) -> object:
    return importlib.import_module(".".join(["linmem", *stub.relative_to(PACKAGE).with_suffix("").parts]))


def documented(stub: Path) -> str:
    """The text of the stub, in which every public name of linmem has its docstring,
    and every method and property of such a class (of the base of GrowableArray, too), but for methods such as __len__.
    Attributes that Cython makes (`cdef readonly`) have no docstring at run time: theirs are written in the stub."""
    text = stub.read_text("utf-8")
    lines = text.splitlines()
    module = public_part(stub)
    # From the end to the start, so that the numbers of the lines before stay right.
    for node, owner in reversed(list(with_owners(ast.parse(text), module))):
        found = None if node.name.startswith("__") else inspect.getdoc(getattr(owner, node.name))
        if found is not None:
            put_docstring(lines, node, found)
    return "\n".join(lines) + "\n"


def with_owners(tree, module):
    """The classes, functions and methods in the order of their lines; of overloads, the first."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and (
                node.name in linmem.__all__ or getattr(module, node.name, None) in linmem.GrowableArray.__bases__):
            yield node, module
            before = None
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and member.name != before:
                    yield member, getattr(module, node.name)
                    before = member.name
        elif isinstance(node, ast.FunctionDef) and node.name in linmem.__all__:
            yield node, module


def put_docstring(lines: list[str], node, text: str) -> None:
    body = node.body[0]
    has_docstring = isinstance(body, ast.Expr) and isinstance(getattr(body.value, "value", None), str)
    margin = " " * (node.col_offset + 4)
    shown = text.replace("\\", "\\\\").splitlines()
    block = [f'{margin}"""{shown[0]}', *[f"{margin}{line}" if line else "" for line in shown[1:]]]
    if len(shown) > 1:
        block.append(f'{margin}"""')
    else:
        block[0] += '"""'
    if has_docstring:
        lines[body.lineno - 1:body.end_lineno] = block
    elif isinstance(node, ast.ClassDef):
        lines[body_start(node) - 1:body_start(node) - 1] = block
    else:
        head, dots = lines[body.lineno - 1][:body.col_offset].rstrip(), lines[body.lineno - 1][body.end_col_offset:]
        lines[body.lineno - 1:body.lineno] = [head + dots, *block]


def body_start(node: ast.ClassDef) -> int:
    first = node.body[0]
    return min([first.lineno, *[decorator.lineno for decorator in getattr(first, "decorator_list", [])]])


if __name__ == "__main__":
    for path in stubs():
        path.write_text(documented(path), "utf-8")
