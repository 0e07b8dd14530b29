"""A cache directory that is damaged between two calls: every file that the cache hands out is whole."""

from __future__ import annotations

import hashlib
import os
import tempfile

from linmem._wasm.image_cache import Cache

from .choices import Choices

SUFFIXES = (".wasm", ".image")


def one(data: bytes) -> None:
    c = Choices(data)
    with tempfile.TemporaryDirectory() as folder:
        root = os.path.join(folder, "cache")
        cache = Cache(root)
        content: dict[str, bytes] = {}      # path -> content, for undamaged files
        for _ in range(24):
            if not c.more:
                break
            what, key, suffix = c.below(6), c.pick("ab"), c.pick(SUFFIXES)
            place = os.path.join(root, key)
            names = sorted(os.listdir(place)) if os.path.isdir(place) else []
            if what == 0:
                path = add(cache, key, suffix, c.bytes(c.below(8)))
                with open(path, "rb") as file:
                    content[path] = file.read()
                assert len([name for name in os.listdir(place) if name.endswith(suffix)]) <= 8
            elif what == 1:
                found = list(cache.entries(key, suffix))
                whole = sorted(path for path in content if os.path.exists(path) and path.startswith(place + os.sep)
                               and path.endswith(suffix))
                assert found == whole
                for path in found:
                    with open(path, "rb") as file:
                        assert file.read() == content[path]
                left = [name for name in os.listdir(place) if name.endswith(suffix)] if os.path.isdir(place) else []
                assert sorted(left) == [os.path.basename(path) for path in whole], "what is not whole was not removed"
            elif what == 2:
                refused(cache, key, suffix, c.bytes(c.below(8)))
                now = os.listdir(place) if os.path.isdir(place) else []
                assert set(now) <= set(names), "a writer that failed left a file"
            elif what == 3 and names:       # damage a file, as a disk error or a killed writer would
                path = os.path.join(place, c.pick(names))
                with open(path, "r+b") as file:
                    file.truncate(c.below(8))
                    file.seek(c.below(8))
                    file.write(c.bytes(1))
                with open(path, "rb") as file:
                    now = file.read()
                if digest(now) + os.path.splitext(path)[1] == os.path.basename(path):
                    content[path] = now
                else:
                    content.pop(path, None)
            elif what == 4 and names:
                os.unlink(os.path.join(place, c.pick(names)))
            elif what == 5:
                os.makedirs(place, mode=0o700, exist_ok=True)
                name = c.pick(("new-left", digest(b"x") + suffix, suffix, "0" * 64 + suffix))
                path, now = os.path.join(place, name), c.pick((b"", b"x", b"y"))
                with open(path, "wb") as file:
                    file.write(now)
                if digest(now) + suffix == name:
                    content[path] = now
                else:
                    content.pop(path, None)


def digest(content: bytes) -> str:
    """The digest of an image whose content is shorter than a page."""
    page = bytes(8) + content if any(content) else b""
    return hashlib.blake2b(len(content).to_bytes(8, "little") + page, digest_size=32).hexdigest()


def add(cache: Cache, key: str, suffix: str, content: bytes) -> str:
    path = cache.add(key, suffix, lambda file: file.write(content))
    assert os.path.basename(path) == digest(content) + suffix
    return path


def refused(cache: Cache, key: str, suffix: str, content: bytes) -> None:
    class Refused(Exception):
        pass

    def write(file):
        file.write(content)
        raise Refused

    try:
        cache.add(key, suffix, write)
    except Refused:
        return
    raise AssertionError("the writer's error was lost")
