"""Checks the Python examples of the README, the docs and examples/ with the strict settings of pyright and mypy.

    python types_examples.py CHECKOUT FOLDER

linmem's own types have no unknown part, which `pyright --verifytypes` checks. So an unknown type in an example comes
from another package, or from a function of the example without annotations. These reports are off, and so are those
about the values of wasmtime-py's `exports()`, whose type is a union of all kinds of exports.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r"^(?:<!-- (?:dies|file: \S+) -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OFF = ("reportUnknownMemberType", "reportUnknownArgumentType", "reportUnknownVariableType",
       "reportUnknownParameterType", "reportUnknownLambdaType", "reportMissingParameterType", "reportMissingImports",
       "reportMissingTypeStubs", "reportDeprecated")
MYPY_OFF = ("no-untyped-def", "no-untyped-call", "import-not-found", "import-untyped", "var-annotated", "unused-ignore")
EXPORT = re.compile(r'"(Func|Table|Global|Tag)"')
DASK = re.compile(r'"dashboard_address"|"chunks"|"CoroutineType\[')     # distributed declares these wrongly


def extract(root: Path, folder: Path) -> int:
    for page in [root / "README.md", *sorted((root / "docs").rglob("*.md"))]:
        text = page.read_text("utf-8")
        for block in BLOCK.finditer(text):
            line = text.count("\n", 0, block.start()) + 1
            (folder / f"{page.stem.replace('-', '_')}_{line}.py").write_text(block[1], "utf-8")
    for example in (root / "examples").rglob("*.py"):
        (folder / f"example_{example.stem}.py").write_text(example.read_text("utf-8"), "utf-8")
    return len(list(folder.glob("*.py")))


def found_by_pyright(folder: Path) -> list[str]:
    settings = {"typeCheckingMode": "strict", **dict.fromkeys(OFF, "none")}
    (folder / "pyrightconfig.json").write_text(json.dumps(settings), "utf-8")
    done = subprocess.run([sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "."],
                          cwd=folder, capture_output=True, text=True, check=False)
    found = [(Path(one["file"]).name, one["range"]["start"]["line"] + 1, one["message"])
             for one in json.loads(done.stdout)["generalDiagnostics"] if one["severity"] == "error"]
    return of_linmem("pyright", found)


def found_by_mypy(folder: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context",
                           *(f"--disable-error-code={code}" for code in MYPY_OFF), "."],
                          cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    lines = (re.match(r"(\S+):(\d+): error: (.*)", line) for line in done.stdout.splitlines())
    return of_linmem("mypy", [(line[1], int(line[2]), line[3]) for line in lines if line])


def of_linmem(checker: str, found: list[tuple[str, int, str]]) -> list[str]:
    """Leaves out reports about distributed, and about a line in which a value of `exports()` is one of the causes."""
    exports = {(name, line) for name, line, message in found if EXPORT.search(message)}
    return [f"{checker}: {name}:{line}: {message}" for name, line, message in found
            if (name, line) not in exports and not DASK.search(message)]


root, folder = map(Path, sys.argv[1:])
folder.mkdir()
n = extract(root, folder)
assert n > 60, n
errors = [*found_by_pyright(folder), *found_by_mypy(folder)]
print(*errors, sep="\n")
print(f"{n} examples, {len(errors)} errors")
sys.exit(bool(errors))
