"""`linmem run --coredump FILE`: what of a trapped program is written, and what the user is told."""

from __future__ import annotations

import sys
from typing import Any

from linmem._commands.output_file import OutputFile
from linmem._commands.parser import Refused
from linmem._commands.text import count
from linmem._core.arguments import printable


class CoreFile:
    """The file for the core dump. A file that could not be written after a trap is refused now."""

    def __init__(self, path: str, others: dict[str, str | None]) -> None:
        self.file = OutputFile("--coredump", path, others)

    def write(self, program: Any, trap: Any) -> None:
        """Write the core dump, and say so in a line. A program that trapped in its start function has no memories."""
        from linmem._wasm.coredump import write

        try:
            with self.file.writing(0o600) as file:
                content = program.core_content(trap)
                write(file, program.path, content)
        except Refused as refusal:
            print(f"linmem run: no core dump: {refusal}", file=sys.stderr)
            return
        parts = [count(sum(len(each.memories) for each in content.instances), "memory"),
                 count(sum(len(each.globals) for each in content.instances), "global"),
                 count(len(content.frames), "frame")]
        print(f"linmem run: core dump: {printable(self.file.path)} ({', '.join(parts)})", file=sys.stderr)
