"""A directory of files that are either whole or ignored. Floor 0.

An entry is a file ``<key>/<digest of its content><suffix>``: it is written to a temporary name,
synced and renamed, and read only after its content was found to have the digest of its name. So a
process that dies in between, a full disk or a flipped bit leave nothing that is ever used. One key
may have several entries. The digest is `_files.content_digest`, which does not read holes.
"""

from __future__ import annotations

import os
import stat

from linmem._files.atomic_file import draft
from linmem._files.reader import open_file
from linmem._files.sparse import content_digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import BinaryIO

__all__ = ["Cache"]

_MOST = 8           # entries of one key


class Cache:
    """The entries below `directory`, which is made where it is missing, for its owner alone.

    Raises
    ------
    PermissionError
        If users other than the owner may write to the directory, or it belongs to another user,
        where the system can tell.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.path.abspath(os.fspath(directory))
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        _must_be_private(self.directory)

    def entries(self, key: str, suffix: str) -> Iterator[str]:
        """Paths of whole entries. One whose content is not what its name says is removed."""
        place = os.path.join(self.directory, key)
        try:
            names = sorted(os.listdir(place))
        except FileNotFoundError:
            return
        _must_be_private(place)
        for name in names:
            if not name.endswith(suffix):
                continue
            path = os.path.join(place, name)
            try:
                whole = _digest_of(path) == name.removesuffix(suffix)
            except OSError:         # another process made room, or it cannot be read: it cannot be used either
                continue
            if whole:
                yield path
            else:
                _remove(path)

    def add(self, key: str, suffix: str, write: Callable[[BinaryIO], object]) -> str:
        """Make an entry of what ``write(file)`` writes; where it is. For its owner alone."""
        place = os.path.join(self.directory, key)
        os.makedirs(place, mode=0o700, exist_ok=True)
        _must_be_private(place)
        _make_room(place, suffix)
        with draft(place) as made:
            write(made.file)
            made.file.flush()
            path = os.path.join(place, content_digest(made.file.fileno()) + suffix)
            made.become(path, 0o600)
        return path


def _make_room(place: str, suffix: str) -> None:
    """Remove the oldest entries of too many."""
    entries = []
    for entry in os.scandir(place):
        try:
            about = entry.stat()
        except FileNotFoundError:       # another process removed it
            continue
        if entry.name.endswith(suffix):
            entries.append((about.st_mtime, entry.path))
    for _, path in sorted(entries)[:max(0, len(entries) - _MOST + 1)]:
        _remove(path)


def _must_be_private(path: str) -> None:
    about = os.stat(path)
    if not hasattr(os, "geteuid"):      # no owner and mode to go by: access is a list of its own there
        return
    if about.st_uid != os.geteuid():
        raise PermissionError(f"cache directory {path!r} belongs to user {about.st_uid}, not to {os.geteuid()}: what is"
                              " in it is run as code, so it must be the user's own")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"cache directory {path!r} may be written by others (mode"
                              f" {stat.S_IMODE(about.st_mode):o}): what is in it is run as code, so it must be the"
                              " user's own")


def _digest_of(path: str) -> str:
    # Without waiting for a writer, where a pipe has the name.
    with open_file(path) as file:
        return content_digest(file.fileno())


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except PermissionError:     # in use, where that keeps a file, or not ours to remove: it stays unused
        pass
