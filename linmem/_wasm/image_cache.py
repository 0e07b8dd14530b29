"""A folder of images and compiled modules that processes share. An entry is used only if it is whole.

An entry is a file ``<key>/<digest of its content><suffix>``. Its content is first written to a temporary file and
flushed to the disk; then the file is renamed. An entry is used only if the content has the digest in the name. So an
entry that a killed process, a full disk or a flipped bit has damaged is never used. One key may have several entries.
`sparse.content_digest`, which does not read holes, computes the digest.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

from linmem._files.atomic_file import draft, remove_abandoned
from linmem._files.reader import open_file
from linmem._files.sparse import content_digest
from linmem._wasm.known_files import forget_entries, must_be_private

_MAX_ENTRIES = 8    # of one key
_ATTEMPTS = 10      # to add an entry while other processes remove its folder
_KEY = re.compile("[0-9a-f]{64}")
_ENTRY = re.compile(r"[0-9a-f]{64}\.(?:cwasm|ccomponent|image)")


class Used(NamedTuple):
    """An entry. Its size in bytes counts no holes."""

    time: float         # of the last use, as exactly as the file system notes it
    size: int
    path: str


class Cache:
    """The entries below `directory`, which is made if it is missing, with permissions for its owner only.

    Raises
    ------
    PermissionError
        If users other than the owner may write to the directory, or if the directory belongs to another user. Systems
        without owners and modes are not checked.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.path.abspath(os.fspath(directory))
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        must_be_private(self.directory)

    def entries(self, key: str, suffix: str) -> Iterator[str]:
        """The paths of whole entries. Entries whose content does not have the digest in the name are removed."""
        place = os.path.join(self.directory, key)
        try:
            names = sorted(name for name in os.listdir(place) if name.endswith(suffix))
            must_be_private(place)
        except FileNotFoundError:       # no entry was made, or another process removed all
            return
        for name in names:
            path = os.path.join(place, name)
            try:
                with open_file(path) as file:       # if the entry is a pipe, open_file() does not wait for a writer
                    whole = content_digest(file.fileno()) == name.removesuffix(suffix)
            except OSError:         # another process removed the entry, or it cannot be read
                continue
            if whole:
                yield path
            else:
                _remove(path)

    def add(self, key: str, suffix: str, write: Callable[[BinaryIO], object]) -> str:
        """Make an entry whose content ``write(file)`` writes, with permissions for its owner only; returns its path."""
        place = os.path.join(self.directory, key)
        for attempts_left in reversed(range(_ATTEMPTS)):
            try:
                os.makedirs(place, mode=0o700, exist_ok=True)
                must_be_private(place)
                _make_room(place, suffix)
                with draft(place) as made:
                    write(made.file)
                    made.file.flush()
                    path = os.path.join(place, content_digest(made.file.fileno()) + suffix)
                    made.become(path, 0o600)
                break
            # prune() of another process removed the empty folder, or the new entry. FileExistsError: it did so while
            # makedirs() looked at the folder.
            except (FileNotFoundError, FileExistsError):
                if not attempts_left:
                    raise
        return path

    def _keys(self) -> list[str]:
        """The folders of entries."""
        return [each.path for each in os.scandir(self.directory)
                if _KEY.fullmatch(each.name) and each.is_dir(follow_symlinks=False)]

    def used(self) -> list[Used]:
        """All entries; the one that was not used for the longest time comes first."""
        found = []
        for key in self._keys():
            for entry in _files(key):
                if _ENTRY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):    # another process removed the entry
                        about = entry.stat(follow_symlinks=False)
                        size = min(about.st_size, getattr(about, "st_blocks", about.st_size) * 512)
                        found.append(Used(max(about.st_atime, about.st_mtime), size, entry.path))
        return sorted(found)

    def prune(self, max_size: int) -> list[Used]:
        """Remove the entries that were not used for the longest time, until all have at most `max_size` bytes.

        Temporary files that killed processes left are removed, too. Returns the removed entries. A process that runs an
        entry is not affected.
        """
        entries = self.used()
        left, removed = sum(entry.size for entry in entries), []
        for entry in entries:
            if left <= max_size:
                break
            _remove(entry.path)
            if not os.path.lexists(entry.path):
                left -= entry.size
                removed.append(entry)
        for key in self._keys():
            remove_abandoned(key)
        for key in {os.path.dirname(entry.path) for entry in removed}:
            with contextlib.suppress(OSError):      # the key has other entries, or gets a new one
                os.rmdir(key)
        forget_entries(self.directory)
        return removed


def _files(key: str) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(key))
    except FileNotFoundError:       # another process removed the key
        return []


def _make_room(place: str, suffix: str) -> None:
    """Remove the oldest entries, so that with one more there are at most `_MAX_ENTRIES`."""
    entries = []
    for entry in os.scandir(place):
        if entry.name.endswith(suffix) and entry.is_file(follow_symlinks=False):
            with contextlib.suppress(FileNotFoundError):        # another process removed the entry
                entries.append((entry.stat().st_mtime, entry.path))
    for _, path in sorted(entries)[:1 - _MAX_ENTRIES]:
        _remove(path)


def _remove(path: str) -> None:
    # PermissionError: the file is in use, or belongs to another user. IsADirectoryError: linmem did not make the entry.
    # In both cases the entry stays and is not used.
    with contextlib.suppress(FileNotFoundError, PermissionError, IsADirectoryError):
        os.unlink(path)
