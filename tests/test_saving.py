"""The atomic file writer: the files that it replaces, the attributes that it keeps, and the files that it leaves."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading

import pytest
from support import answer, requires, start_child

from linmem import Delta, Image
from linmem._files import atomic_file
from linmem._wasm.image_cache import Cache

PAGE = 4096
A, B = Image.from_bytes(b"a" * 5000), Image.from_bytes(bytes(3 * PAGE) + b"b" * PAGE, 7)


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "file"
    A.save(path)
    return path


# -- replaced files -----------------------------------------------------------------------------------------

@requires("owners")
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o644, 0o664, 0o777, 0o000])
def test_a_file_that_is_replaced_keeps_its_rights(old, mode):
    old.chmod(mode)
    before = os.umask(0o077)
    try:
        B.save(old)
    finally:
        os.umask(before)
    assert stat.S_IMODE(old.stat().st_mode) == mode


@requires("owners")
def test_other_users_cannot_read_a_file_during_its_write(tmp_path, old, monkeypatch):
    old.chmod(0o666)
    seen = []
    whole = os.fsync

    def look(fd):
        if stat.S_ISREG(os.fstat(fd).st_mode):
            # At fsync the content is complete. Until then, the mode 0600 keeps other users out.
            seen.extend(name for name in os.listdir(tmp_path) if name.startswith("."))
        whole(fd)

    monkeypatch.setattr(os, "fsync", look)
    modes = []
    with atomic_file.replacing(old) as (file, is_stream):
        assert not is_stream
        modes.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        file.write(b"x")
    assert modes == [0o600]
    assert len(seen) == 1
    assert stat.S_IMODE(old.stat().st_mode) == 0o666


@requires("root", "owners")
def test_a_file_that_is_replaced_keeps_its_owner_and_group(old):
    os.chown(old, 65534, 65533)
    old.chmod(0o640)
    B.save(old)
    about = old.stat()
    assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (65534, 65533, 0o640)
    assert Image.open(old, verify=True) == B


AS_ANOTHER = """
import os, sys, linmem
from linmem._core import process_handles
from linmem._files import atomic_file, image_file
import hashlib, random, secrets, zlib
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    linmem.Image.from_bytes(b"theirs").save(sys.argv[1])
    print("saved")
except OSError as error:
    print(type(error).__name__, error.filename == sys.argv[1], error.strerror)
"""


def as_another_user(path):
    done = subprocess.run([sys.executable, "-c", AS_ANOTHER, path], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def shared_folder():
    """A folder that another user can reach. pytest's folders may be unreachable, because each session of pytest removes
    access to their parents."""
    with tempfile.TemporaryDirectory(prefix="linmem-test-") as folder:
        os.chmod(folder, 0o777)
        yield pathlib.Path(folder)


@requires("root", "owners")
def test_another_users_file_is_not_taken_over(shared_folder):
    folder = shared_folder
    path = folder / "file"
    A.save(path)
    before = path.stat()
    text = as_another_user(path)
    assert text == ("PermissionError True The file belongs to user 0 and group 0, and this process may not give them a"
                    " new one")
    assert os.listdir(folder) == ["file"]
    assert (path.stat().st_ino, path.stat().st_uid) == (before.st_ino, 0)
    assert as_another_user(folder / "own") == "saved"
    assert (folder / "own").stat().st_uid == 65534


@requires("fork")
@pytest.mark.parametrize("what", ["image", "packed image", "delta"])
def test_a_pipe_is_written_to_and_stays_a_pipe(tmp_path, what):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    delta = A.diff(B)
    save = {"image": lambda: B.save(path), "packed image": lambda: B.save(path, packed=True),
            "delta": lambda: delta.save(path)}[what]
    got = []
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    save()
    reader.join(60)
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert os.listdir(tmp_path) == ["pipe"]
    (tmp_path / "copy").write_bytes(got[0])
    if what == "delta":
        assert Delta.open(tmp_path / "copy") == delta
    else:
        assert Image.open(tmp_path / "copy", verify=True) == B


@requires("fork")
def test_a_device_is_written_to_and_stays_a_device(tmp_path):
    before = os.stat("/dev/null")
    A.save("/dev/null")
    A.diff(B).save("/dev/null")
    now = os.stat("/dev/null")
    assert stat.S_ISCHR(now.st_mode)
    assert (before.st_ino, before.st_mode) == (now.st_ino, now.st_mode)
    with pytest.raises(OSError, match="/dev/full") as caught:
        A.save("/dev/full")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


@requires("fork")
def test_a_socket_and_a_folder_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        os.mkdir("folder")
        for name in ("socket", "folder", "folder/", "none/", ""):
            with pytest.raises(OSError) as caught:
                A.save(name)
            assert caught.value.filename == name
        assert stat.S_ISSOCK(os.stat("socket").st_mode)
    assert sorted(os.listdir()) == ["folder", "socket"]
    assert os.listdir("folder") == []


@requires("fork", "descriptors")
def test_an_open_file_without_a_name_is_written_to(tmp_path):
    path = tmp_path / "gone"
    with open(path, "w+b") as file:
        path.unlink()
        A.save(f"/proc/self/fd/{file.fileno()}")
        assert os.listdir(tmp_path) == []
        file.seek(0)
        (tmp_path / "copy").write_bytes(file.read())
    assert Image.open(tmp_path / "copy", verify=True) == A


# -- failures -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_save_that_fails_leaves_the_old_file_and_names_the_target(old, monkeypatch, call, kind):
    def refuse(*args):
        names = (args[0], None, args[1]) if call == "replace" else ()
        raise kind(errno.ENOSPC, "No space left on device", *names)

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(kind) as caught:
        B.save(old)
    if kind is OSError:
        assert caught.value.filename == str(old)
        # Windows shows the second number that this OSError has, which is None.
        assert str(caught.value).partition("] ")[2] == f"No space left on device: {str(old)!r}"
    assert os.listdir(old.parent) == ["file"]
    assert Image.open(old, verify=True) == A


@pytest.mark.parametrize("names", [0, 1])
def test_an_interrupt_while_a_temporary_name_is_chosen_is_an_interrupt(old, monkeypatch, names):
    chosen = iter(bytes(8) for _ in range(names))

    def interrupted(size):
        for name in chosen:
            return name
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_file.os, "urandom", interrupted)
    monkeypatch.setattr(atomic_file, "_claim", lambda made: False)
    with pytest.raises(KeyboardInterrupt):
        B.save(old)
    assert os.listdir(old.parent) == ["file"]


def test_an_error_in_a_folder_that_is_not_there_names_the_target(tmp_path):
    target = tmp_path / "nowhere" / "file"
    with pytest.raises(FileNotFoundError) as caught:
        A.save(target)
    assert caught.value.filename == str(target)


@requires("fork")
def test_each_of_the_file_and_its_folder_is_flushed_once_and_in_this_order(tmp_path, monkeypatch):
    done = []
    whole, replace = os.fsync, os.replace

    def sync(fd):
        about = os.fstat(fd)
        done.append(("sync", about.st_ino))
        whole(fd)

    def rename(source, target):
        done.append(("rename", os.stat(source).st_ino, target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", rename)
    B.save(tmp_path / "image")
    cached = Cache(tmp_path / "cache").add("key", ".x", lambda file: file.write(b"x"))
    monkeypatch.undo()
    expected = []
    for path in (str(tmp_path / "image"), cached):
        expected += [("sync", os.stat(path).st_ino), ("rename", os.stat(path).st_ino, path),
                     ("sync", os.stat(os.path.dirname(path)).st_ino)]
    assert done == expected


# -- files of killed writers -----------------------------------------------------------------------------------

DIES = """
import os, signal, sys, linmem
from linmem._files import atomic_file
with atomic_file.draft(sys.argv[1]) as made:
    made.file.write(b"half")
    print("ready", flush=True)
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.stdin.read()
"""


def writer(folder, what):
    child = start_child(DIES, folder, what)
    assert child.stdout.readline() == "ready\n"
    return child


@requires("fork")
@pytest.mark.parametrize("by", ["save", "cache"])
def test_the_next_writer_removes_only_files_of_killed_writers(tmp_path, by):
    folder = tmp_path / "cache" / "key"
    folder.mkdir(parents=True, mode=0o700)
    with writer(folder, "dies") as dead:
        assert dead.wait(60) == -signal.SIGKILL
    with writer(folder, "lives") as alive:
        try:
            [left] = os.listdir(folder)             # the living writer's file; the killed writer's file was removed
            others = [".linmem-0123456789abcdef.tm", "linmem-0123456789abcdef.tmp", ".linmem-0123.tmp"]
            for name in others:
                (folder / name).touch()
            if by == "save":
                A.save(folder / "image")
            else:
                Cache(tmp_path / "cache").add("key", ".image", lambda file: file.write(b"x"))
            assert left in os.listdir(folder)
            assert len(os.listdir(folder)) == 2 + len(others)
        finally:
            alive.stdin.close()
            alive.wait(60)
    assert left not in os.listdir(folder)


@requires("fork")
def test_a_writer_whose_file_was_removed_before_the_lock_starts_again(tmp_path, monkeypatch):
    removed = []
    whole = atomic_file._lock

    def lock(fd):
        if not removed:
            removed.extend(os.listdir(tmp_path))        # like another writer that takes the file for abandoned
            os.unlink(tmp_path / removed[0])
        return whole(fd)

    monkeypatch.setattr(atomic_file, "_lock", lock)
    B.save(tmp_path / "image")
    assert len(removed) == 1
    assert os.listdir(tmp_path) == ["image"]
    assert Image.open(tmp_path / "image", verify=True) == B


@requires("fork")
def test_only_regular_files_are_taken_for_files_of_a_killed_writer(tmp_path):
    pipe, folder, file, link = (tmp_path / f".linmem-{number:016x}.tmp" for number in range(4))
    os.mkfifo(pipe)
    folder.mkdir()
    file.touch()
    (tmp_path / "another").touch()
    link.symlink_to("another")
    A.save(tmp_path / "image")
    assert sorted(os.listdir(tmp_path)) == sorted(["another", "image", pipe.name, folder.name, link.name])


@requires("fork")
@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL])
def test_a_save_works_where_the_file_system_has_no_locks(old, monkeypatch, code):
    def no_locks(fd, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic_file.fcntl, "flock", no_locks)
    B.save(old)
    assert Image.open(old, verify=True) == B


@requires("fork")
def test_a_lock_that_fails_otherwise_fails_the_save_and_leaves_the_old_file(old, monkeypatch):
    def broken(fd, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(atomic_file.fcntl, "flock", broken)
    with pytest.raises(OSError, match=re.escape(os.strerror(errno.EIO))):
        B.save(old)
    assert os.listdir(old.parent) == [old.name]
    assert Image.open(old, verify=True) == A


@requires("fork")
def test_writers_of_one_folder_do_not_take_each_others_files(tmp_path):
    errors = []

    def write(number):
        try:
            for _ in range(20):
                A.save(tmp_path / f"file{number}")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert sorted(os.listdir(tmp_path)) == ["file0", "file1", "file2", "file3"]


@requires("root", "owners", "fork")
def test_a_save_works_in_a_folder_that_may_be_written_and_not_listed(shared_folder):
    folder = shared_folder
    folder.chmod(0o333)
    assert as_another_user(folder / "file") == "saved"
    assert Image.open(folder / "file", verify=True) == Image.from_bytes(b"theirs")


def test_the_writer_is_not_imported_before_a_file_is_named():
    assert answer("import linmem, sys; print('linmem._files.atomic_file' in sys.modules)") == "False"
