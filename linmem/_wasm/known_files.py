"""Notes in a cache: which entries were made of a file. As long as the file is unchanged, it is not read again.

A note names the state of the file: device, inode, size, and the times of the last modification and the last change. No
program can choose the time of the last change. A state is noted only if

- no other user may write to the file, because bytes that are written through a mapping leave the times as they are;
- the last change was more than `_RESOLUTION` before the file was read, because another change within the resolution of
  the file system's clock would have the same time;
- the system knows a time of change (Windows does not).

A note is a file ``notes/<device>-<inode>-<settings>``. Its lines are a checksum of the other lines, the state and the
path of the file, what else is known about it, and the state and the path of each entry.
"""

from __future__ import annotations

import ast
import contextlib
import os
import stat
import time
import zlib
from typing import NamedTuple

# The version of cached files, in their keys and in the checksums of notes; keys of compiled code also have wasmtime's.
FORMAT = 2
MODULE, COMPONENT = ".cwasm", ".ccomponent"     # the suffixes of entries of compiled code
_RESOLUTION = 2_000_000_000     # ns; FAT has the coarsest clock
_NOTES = "notes"


def state_of(status: os.stat_result) -> str | None:
    """The state of a file; None if the file may change without a change of its state."""
    if not hasattr(os, "geteuid"):      # the system has a time of creation in place of the time of change
        return None
    if (not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid())
            or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        return None
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def read_file(path: str) -> tuple[bytes, str | None]:
    """The content of a file, and its state if the state can be noted."""
    started = time.time_ns()
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        content = file.read()
        after = os.fstat(file.fileno())
    settled = before.st_ctime_ns < started - _RESOLUTION
    return content, state_of(before) if settled and state_of(before) == state_of(after) else None


class Note(NamedTuple):
    """What a note says. The paths of the entries are relative to the directory of the cache."""

    state: str
    path: str
    about: str
    entries: list[tuple[str, str]]      # state, path

    @classmethod
    def read(cls, place: str) -> Note | None:
        """None if there is no whole note."""
        try:
            # A pipe is not waited for.
            with open(place, encoding="utf-8", opener=lambda name, flags: os.open(
                    name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    return None
                checksum, _, rest = file.read().partition("\n")
            state, path, about, *entries, end = rest.split("\n")
            if checksum != _checksum(rest) or end or len(entries) % 2:
                return None
            return cls(state, ast.literal_eval(path), about, list(zip(entries[::2], entries[1::2], strict=True)))
        except (OSError, ValueError, SyntaxError):
            return None

    def text(self) -> str:
        lines = self.state, ascii(self.path), self.about, *(line for entry in self.entries for line in entry), ""
        rest = "\n".join(lines)
        return f"{_checksum(rest)}\n{rest}"


def _checksum(text: str) -> str:
    checked = f"linmem {FORMAT}\n{text}"
    return f"{zlib.crc32(checked.encode()):08x}"


def entries_of(directory: str, path: str, settings: str) -> tuple[list[str], str] | None:
    """The paths of the entries that were made of the file, and what else is known, if the file and they are unchanged.
    """
    try:
        state = state_of(os.stat(path))
        if state is None:
            return None
        must_be_private(directory)
        place = _place(directory, state, settings)
        must_be_private(os.path.dirname(place))
        note = Note.read(place)
        if note is None or (note.state, note.path) != (state, os.path.abspath(path)):
            return None
        entries = []
        for expected, name in note.entries:
            entry = os.path.join(directory, name)
            must_be_private(os.path.dirname(entry))
            if state_of(os.stat(entry)) != expected:
                return None
            entries.append(entry)
        return entries, note.about
    except (FileNotFoundError, NotADirectoryError, ValueError):     # there is no note, or no entry, or no such file
        return None


def note_entries(directory: str, path: str, state: str, settings: str, entries: list[str], about: str = "") -> None:
    """Note that the entries were made of the file in `state`. about: one line."""
    from linmem._files.atomic_file import draft

    noted = []
    for entry in entries:
        entry_state = state_of(os.stat(entry))
        if entry_state is None:
            return
        noted.append((entry_state, os.path.relpath(entry, directory)))
    place = _place(directory, state, settings)
    os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
    must_be_private(os.path.dirname(place))
    note = Note(state, os.path.abspath(path), about, noted)
    with draft(os.path.dirname(place)) as made:
        made.file.write(note.text().encode())
        made.become(place, 0o600)


def _place(directory: str, state: str, settings: str) -> str:
    device, inode, *_ = state.split()
    return os.path.join(directory, _NOTES, f"{device}-{inode}-{settings}")


def forget_entries(directory: str) -> None:
    """Remove the notes of files that changed or were removed, and of entries that do not exist."""
    from linmem._files.atomic_file import TEMPORARY, remove_abandoned

    folder = os.path.join(directory, _NOTES)
    remove_abandoned(folder)
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        place = os.path.join(folder, name)
        if not TEMPORARY.fullmatch(name) and not _is_current(directory, place):
            # Another process removed the note, or it is a folder, which linmem did not make.
            with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
                os.unlink(place)


def _is_current(directory: str, place: str) -> bool:
    """Whether the note is whole, its entries exist, and its file is in the noted state."""
    note = Note.read(place)
    try:
        return note is not None and state_of(os.stat(note.path)) == note.state and all(
            os.path.exists(os.path.join(directory, entry)) for _, entry in note.entries)
    except (OSError, ValueError, TypeError):
        return False


def must_be_private(path: str) -> None:
    """Refuse a folder that other users may write to."""
    about = os.stat(path)
    if not hasattr(os, "geteuid"):      # the system has access control lists instead of owners and modes
        return
    if about.st_uid != os.geteuid():
        fault = f"belongs to user {about.st_uid}, not to {os.geteuid()}"
    elif about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        fault = f"may be written by others (mode {stat.S_IMODE(about.st_mode):o})"
    else:
        return
    raise PermissionError(f"cache directory {path!r} {fault}: what is in it is run as code, so it must be the user's"
                          " own")
