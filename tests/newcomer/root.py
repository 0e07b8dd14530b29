"""An empty root with a Python, and a shell in it. The root has users, mounts, processes and a network of its own."""

from __future__ import annotations

import os
import re
import secrets
import select
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

HOME = "/home/newcomer"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
# What pages and the `activate` of a virtual environment use, beside the shell.
PROGRAMS = ("sh", "env", "ls", "cat", "uname", "mkdir")
# The libraries of the system that the manylinux standards let every wheel use.
LIBRARIES = ("libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "libutil.so.1", "libgcc_s.so.1",
             "libstdc++.so.6")
# A user namespace must keep these flags of a mount when it makes the mount read-only.
KEPT_FLAGS = {os.ST_NOSUID: "nosuid", os.ST_NODEV: "nodev", os.ST_NOEXEC: "noexec", os.ST_NOATIME: "noatime",
              os.ST_NODIRATIME: "nodiratime", os.ST_RELATIME: "relatime"}

# The arguments: the root and its flags, the newcomer's own folder, then (source, flags, target) for each folder of the
# machine that the root shows, and after a `--` the folders that it hides.
ENTER = """
set -e
root=$1 flags=$2 own=$3
shift 3
mount --bind "$root" "$root"
mount --bind "$own/home" "$root/home"
mount --bind "$own/tmp" "$root/tmp"
while [ "$1" != -- ]; do
    mount --bind "$1" "$root$3"
    mount -o "remount,bind,ro,$2" "$root$3"
    shift 3
done
shift
for folder in "$@"; do mount -t tmpfs -o ro tmpfs "$root$folder"; done
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755,size=1m tmpfs "$root/dev"
: >"$root/dev/null"
mount --bind /dev/null "$root/dev/null"
mkdir "$root/dev/shm"
mount -t tmpfs -o mode=1777,size=256m tmpfs "$root/dev/shm"
mount -o "remount,bind,ro,$flags" "$root"
chroot=$(command -v chroot)
PATH=/opt/bin:/usr/bin:/bin
exec "$chroot" "$root" /bin/sh
"""


class NotAllowed(Exception):
    """This machine lets the process make no namespaces, or its Python cannot be shown in the root."""


def namespaces() -> list[str]:
    """The beginning of a command that runs the rest of the command in namespaces of its own."""
    said = ""
    for users in ["--user", "--map-root-user"], []:     # without a user namespace, only root may do it
        command = ["unshare", *users, "--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child"]
        try:
            done = subprocess.run([*command, "mount", "-t", "proc", "proc", "/proc"], capture_output=True, text=True)
        except FileNotFoundError as error:
            raise NotAllowed(f"no namespaces: no program {error.filename}") from None
        if done.returncode == 0:
            return command
        said = done.stderr.strip()
    raise NotAllowed(f"no namespaces: {said}")


def interpreter() -> Path:
    """The program of this Python, which the root shows at the same place."""
    python = Path(sys._base_executable).resolve()
    if python.parts[1] in ("home", "tmp"):
        raise NotAllowed(f"{python} is in a folder of which the root has its own")
    return python


def libraries_of(*programs: Path) -> set[Path]:
    """The shared libraries of the programs, and their loaders. (For a static program, ldd ends with the status 1. If a
    program names a loader of its own, ldd shows it as "/its/ld.so => /lib64/ld.so (0x...)".)"""
    found = subprocess.run(["ldd", *programs], stdout=subprocess.PIPE, text=True).stdout
    return {Path(path) for path in re.findall(r"(?:^|=>)\s*(/\S+)(?= \(0x| =>)", found, re.MULTILINE)}


def flags_of(path: Path) -> str:
    flags = os.statvfs(path).f_flag
    return ",".join(name for flag, name in KEPT_FLAGS.items() if flags & flag)


class Root:
    """A root in the empty folder `path`, where pip finds `wheels`, and nothing else of the machine than a Python. With
    `compiler`, the root also has the programs and the headers of the machine."""

    def __init__(self, path: Path, wheels: Path, *, compiler: bool) -> None:
        self.path = path
        for name in "proc", "dev", "home", "tmp", "etc", "usr/bin", "opt/bin":
            (path / name).mkdir(parents=True)
        for name in "bin", "lib", "lib64":
            if Path("/", name).is_symlink():
                (path / "usr" / name).mkdir(exist_ok=True)
                (path / name).symlink_to(f"usr/{name}")
        base = {"base": sys.base_prefix, "installed_base": sys.base_prefix,
                "platbase": sys.base_exec_prefix, "installed_platbase": sys.base_exec_prefix}
        stdlib, platstdlib, purelib, platlib, include = (
            sysconfig.get_path(name, vars=base) for name in ("stdlib", "platstdlib", "purelib", "platlib", "include"))
        folders = [stdlib, platstdlib]
        folders.append(sysconfig.get_config_var("WHEEL_PKG_DIR"))       # Debian's ensurepip has its pip there
        if compiler:
            folders = ["/usr", "/etc/alternatives", *folders, include]
        self.shows: dict[Path, Path] = {Path("/opt/wheels"): wheels}
        for folder in map(Path, filter(None, folders)):
            if folder.is_dir() and not self._shows(folder):
                self.shows[folder] = folder
        self.hides = [folder for folder in {Path(purelib), Path(platlib)} if folder.is_dir() and self._shows(folder)]

        python = interpreter()
        programs = {Path(found) for name in PROGRAMS if (found := shutil.which(name, path=PATH))}
        libraries = libraries_of(python, *programs, *Path(platstdlib, "lib-dynload").glob("*.so"))
        # The Python may have a C library of its own, and other libraries beside it, which ldd does not look for.
        folders = {library.parent for library in libraries if library.name == "libc.so.6"}
        names = {*LIBRARIES, *(library.name for library in libraries)}
        libraries |= {folder / name for folder in folders for name in names if (folder / name).exists()}
        for file in sorted({python, *programs, *libraries}):
            if not self._shows(file):
                target = path / file.relative_to("/")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
        (path / "opt/bin/python3").symlink_to(python)
        (path / "etc/pip.conf").write_text(
            "[global]\nno-index = yes\nfind-links = /opt/wheels\ndisable-pip-version-check = yes\n")
        for folder in self.shows:
            (path / folder.relative_to("/")).mkdir(parents=True, exist_ok=True)

    def _shows(self, path: Path) -> bool:
        return any(path.is_relative_to(shown) for shown in self.shows)


class Shell:
    """A shell in the root. Its working directory is new and empty, and is `folder` from outside."""

    def __init__(self, root: Root, own: Path) -> None:
        self.folder = Path(f"{own}{HOME}/work")
        self.folder.mkdir(parents=True)
        (own / "tmp").mkdir()
        shows = [str(word) for target, source in root.shows.items() for word in (source, flags_of(source), target)]
        self._child = subprocess.Popen(
            [*namespaces(), "sh", "-c", ENTER, "sh", root.path, flags_of(root.path), own, *shows, "--", *root.hides],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={"PATH": PATH, "HOME": HOME, "LANG": "C.UTF-8"})
        said, status = self.type(f"cd {HOME}/work\n", 60)
        if status:
            raise OSError(f"the root does not start, status {status}: {said}")

    def type(self, commands: str, seconds: float, *, dies: bool = False) -> tuple[str, int]:
        """What the commands print, and the status of the last one. Another command that fails ends the shell, unless
        the last one `dies`. Commands in the background belong to the commands that the shell waits for."""
        mark = secrets.token_hex(8)
        wait = "wait $!\n" if re.search(r"&$", commands, re.MULTILINE) else ""
        typed = f"set {'+' if dies else '-'}e\n{commands}{wait}printf '{mark} %s\\n' $?\n"
        assert self._child.stdin
        assert self._child.stdout
        self._child.stdin.write(typed.encode())
        self._child.stdin.flush()
        said, end = b"", time.monotonic() + seconds
        while not (found := re.search(rb"%b (\d+)\n" % mark.encode(), said)):
            if not select.select([self._child.stdout], [], [], max(0, end - time.monotonic()))[0]:
                return f"{said.decode(errors='replace')}\n(not at its end after {seconds:.0f} s)\n", -1
            more = os.read(self._child.stdout.fileno(), 1 << 16)
            if not more:
                return said.decode(errors="replace"), self._child.wait() or -1
            said += more
        return said[:found.start()].decode(errors="replace"), int(found[1])

    def close(self) -> None:
        """End all processes of the root."""
        self._child.kill()          # then the kernel kills the first process of the namespace, and with it all others
        self._child.communicate()

    def __enter__(self) -> Shell:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
