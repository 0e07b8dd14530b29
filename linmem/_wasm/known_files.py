"""Notes in a cache: which entry was made of a file. As long as the file is unchanged, it is not read again.

A note names the state of the file: device, inode, size, and the times of the last modification and the last change. No
program can choose the time of the last change. A state is noted only if

- no other user may write to the file, because bytes that are written through a mapping leave the times as they are;
- the last change was more than `_RESOLUTION` before the file was read, because another change within the resolution of
  the file system's clock would have the same time;
- the system knows a time of change (Windows does not).

A note is ``notes/<device>-<inode>-<settings>``, four lines: the state of the file, the state of the entry, the path of
the entry in the cache, and the path of the file.
"""

from __future__ import annotations

import ast
import contextlib
import os
import stat
import time

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


def entry_of(directory: str, path: str, settings: str) -> str | None:
    """The path of the entry that was made of the file, if the file and the entry are unchanged."""
    try:
        state = state_of(os.stat(path))
        if state is None:
            return None
        must_be_private(directory)
        place = _place(directory, state, settings)
        must_be_private(os.path.dirname(place))
        with open(place, encoding="utf-8") as note:
            lines = note.read().split("\n")
        if len(lines) != 5 or lines[0] != state or lines[3] != ascii(os.path.abspath(path)):
            return None
        entry = os.path.join(directory, lines[2])
        must_be_private(os.path.dirname(entry))
        return entry if state_of(os.stat(entry)) == lines[1] else None
    # There is no note, or no entry, or no such file; or a damaged note.
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def note_entry(directory: str, path: str, state: str, settings: str, entry: str) -> None:
    """Note that `entry` was made of the file in `state`."""
    from linmem._files.atomic_file import draft

    entry_state = state_of(os.stat(entry))
    if entry_state is None:
        return
    place = _place(directory, state, settings)
    os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
    must_be_private(os.path.dirname(place))
    lines = state, entry_state, os.path.relpath(entry, directory), ascii(os.path.abspath(path)), ""
    with draft(os.path.dirname(place)) as made:
        made.file.write("\n".join(lines).encode())
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
    except FileNotFoundError:
        return
    for name in names:
        place = os.path.join(folder, name)
        if not TEMPORARY.fullmatch(name) and not _is_current(directory, place):
            with contextlib.suppress(FileNotFoundError):        # another process removed the note
                os.unlink(place)


def _is_current(directory: str, place: str) -> bool:
    """Whether the note is whole, its entry exists, and its file is in the noted state."""
    try:
        with open(place, encoding="utf-8") as note:
            state, _, entry, path, _ = note.read().split("\n")
        return os.path.exists(os.path.join(directory, entry)) and state_of(os.stat(ast.literal_eval(path))) == state
    except (OSError, ValueError, SyntaxError, TypeError):
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
