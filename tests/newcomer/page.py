"""What a page of the docs tells its reader to do, in the order of the page.

A comment before a block says what the reader does with the block:

    <!-- file: NAME -->     the reader writes the file
    <!-- run -->            the reader types the commands, and each of them ends with the status 0
    <!-- run: killed -->    the reader types the commands, and SIGKILL ends the last one
    <!-- dies -->           the reader runs the example, and it ends by a segmentation fault

Without a comment, a ``sh`` block is typed, and a ``python`` block is saved and run. A ``text`` block that follows is
all that the reader sees.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

BLOCK = re.compile(r"^(?:<!-- (file: \S+|run(?:: killed)?|dies) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
KILLED = 128 + 9        # what a shell says after SIGKILL and after SIGSEGV
CRASHED = 128 + 11


@dataclass(frozen=True)
class Step:
    line: int                   # of the page
    words: int                  # of the page up to the end of the block
    file: str = ""              # the name of a file that the reader writes
    text: str = ""              # the content of the file
    commands: str = ""          # what the reader types
    status: int = 0             # of the last command
    shown: str | None = None    # what the reader sees, if the page says it

    @property
    def installs(self) -> list[str]:
        """What a `pip install` of the step names."""
        return [word for line in self.commands.splitlines() if "pip install " in line
                for word in shlex.split(line.partition("pip install ")[2]) if not word.startswith("-")]


def steps(text: str, until: str = "") -> list[Step]:
    """The steps of a page, up to the heading `until`."""
    if until:
        text, found, _ = text.partition(f"\n{until}\n")
        if not found:
            raise ValueError(f"the page has no heading {until!r}")
    blocks = list(BLOCK.finditer(text))
    result = []
    for block, after in zip(blocks, [*blocks[1:], None], strict=True):
        mark, language, body = block.groups()
        line = text.count("\n", 0, block.start()) + 1
        words = len(text[:block.end()].split())
        shown = after[3] if after and after[2] == "text" else None
        if mark and mark.startswith("file: "):
            result.append(Step(line, words, mark.removeprefix("file: "), body))
        elif language == "sh":
            result.append(Step(line, words, commands=body, status=KILLED if mark == "run: killed" else 0, shown=shown))
        elif language == "python":
            name = f"example_{line}.py"
            result.append(Step(line, words, name, body))
            result.append(Step(line, words, commands=f"python {name}\n", status=CRASHED if mark == "dies" else 0,
                               shown=shown))
        elif language != "text":
            raise ValueError(f"line {line}: the page does not say what to do with this {language} block")
    return result
