"""A file that `linmem run` writes after the program ran. The program may be hostile, and may write to its folder."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import BinaryIO

from linmem._commands.parser import EXIT_USAGE, Refused, check_output, refuse_errors_of


class OutputFile:
    """The place of the file is fixed before the program runs.

    The program may replace the file by a link, and each folder that it may write to by a link to another folder. So
    linmem opens the folder of the file now, and follows no link later. linmem refuses a pipe, because a write to a pipe
    that no process reads waits for ever.
    """

    _fd: int | None = None

    def __init__(self, option: str, path: str, others: dict[str, str | None]) -> None:
        check_output(option, path, others)
        if os.path.exists(path) and not os.path.isfile(path):
            raise Refused(f"{option} {path}: it is not a regular file", EXIT_USAGE)
        self.path = path
        self._folder, self._name = os.path.split(os.path.realpath(path))
        if hasattr(os, "O_PATH"):
            with contextlib.suppress(OSError):      # no descriptor is left; `_place` then checks the folder
                self._fd = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)

    def __del__(self) -> None:
        if self._fd is not None:
            os.close(self._fd)

    @contextlib.contextmanager
    def writing(self, mode: int | None = None) -> Iterator[BinaryIO]:
        """A file that gets its name when the block ends. Any OSError in the block is refused as one of this file."""
        from linmem._files.atomic_file import replacing

        with refuse_errors_of(self.path):
            try:
                with replacing(self._place(), mode, follow=False) as (file, _):
                    yield file
            except OSError as error:
                error.filename = self.path
                raise

    def _place(self) -> str:
        opened = f"/proc/self/fd/{self._fd}"
        if self._fd is not None and os.path.isdir(opened):
            return os.path.join(opened, self._name)
        if os.path.realpath(self._folder) != self._folder:
            raise OSError(errno.ELOOP, "A folder was replaced by a link")
        return os.path.join(self._folder, self._name)
