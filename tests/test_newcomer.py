"""The newcomer of tests/newcomer: what the newcomer reads in a page, and what the newcomer's root holds. The CI stage
`newcomer` follows the pages of docs/."""

import subprocess
import sys
from pathlib import Path

import pytest
from newcomer.page import CRASHED, KILLED, Step, steps
from support import ROOT, requires

VENV = "```sh\npython() { python3 \"$@\"; }    # faster than python3 -m venv\n```\n"
PAGE = """
# A page

```sh
pip install "linmem[numpy]" other
```

Write `one.py`:

<!-- file: one.py -->
```python
print("one")
```

<!-- run: killed -->
```sh
python one.py
```

```text
one
```

```python
pass
```

<!-- dies -->
```python
crash()
```

```{literalinclude} ../one.py
```

## The end

```c
int main(void);
```
"""


def test_the_steps_of_a_page_are_its_files_commands_and_examples_in_their_order():
    install, *rest = steps(PAGE, until="## The end")
    assert install.installs == ["linmem[numpy]", "other"]
    assert [(step.line, step.file, step.text, step.commands, step.status, step.shown) for step in rest] == [
        (10, "one.py", 'print("one")\n', "", 0, None),
        (15, "", "", "python one.py\n", KILLED, "one\n"),
        (24, "example_24.py", "pass\n", "", 0, None),
        (24, "", "", "python example_24.py\n", 0, None),
        (28, "example_28.py", "crash()\n", "", 0, None),
        (28, "", "", "python example_28.py\n", CRASHED, None)]
    assert rest[0].words == len(PAGE[:PAGE.index("<!-- run")].split())


def test_a_page_that_does_not_say_what_to_do_with_a_block_is_refused():
    with pytest.raises(ValueError, match=r"line 38: .* this c block"):
        steps(PAGE)
    with pytest.raises(ValueError, match="no heading '## Nothing'"):
        steps(PAGE, until="## Nothing")


@requires("mounts")
def test_there_are_eight_tasks_and_each_page_says_what_to_install_before_it_uses_linmem():
    from newcomer.tasks import TASKS
    assert len({task.page for task in TASKS}) == 8
    for task in TASKS:
        plan = steps((ROOT / "docs" / f"{task.page}.md").read_text("utf-8"), task.until)
        first = next(step for step in plan if step.commands)
        assert any(name.startswith("linmem") for name in first.installs), task.page


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    from newcomer.root import NotAllowed, Root
    folder = tmp_path_factory.mktemp("newcomer")
    (folder / "wheels").mkdir()
    (folder / "wheels" / "a-wheel").touch()
    try:
        return Root(folder / "root", folder / "wheels", compiler=False)
    except NotAllowed as error:
        pytest.skip(str(error))


@requires("mounts")
def test_a_newcomer_has_a_python_and_nothing_else(root, tmp_path):
    from newcomer.root import Shell
    with Shell(root, tmp_path / "own") as shell:
        def says(commands):
            return shell.type(commands, 60, dies=True)

        assert says("ls -A . /tmp /dev/shm\n") == (".:\n\n/dev/shm:\n\n/tmp:\n", 0)
        assert says("ls /opt/wheels\n") == ("a-wheel\n", 0)
        for program in "cc", "gcc", "pip", "git", "python":
            assert says(f"command -v {program}\n") == ("", 127)
        for module in "linmem", "numpy", "wasmtime", "pytest":
            assert f"No module named '{module}'" in says(f"python3 -c 'import {module}'\n")[0]
        assert says("python3 -c 'import ctypes, venv, ensurepip'\n") == ("", 0)
        assert says("python3 -c 'import os; print(os.getpid() < 100, os.listdir(\"/home\"))'\n") == (
            "True ['newcomer']\n", 0)
        said, status = says('python3 -c \'import socket; socket.create_connection(("192.0.2.1", 80), 20)\'\n')
        assert ("Network is unreachable" in said, status) == (True, 1)
        for path in "/new", "/usr/new", "/opt/wheels/new":
            assert "Read-only file system" in says(f"mkdir {path}\n")[0]
        shell.folder.joinpath("written").touch()
        assert says("ls\n") == ("written\n", 0)


@requires("mounts")
@pytest.mark.parametrize(("text", "reason"), [
    ("```sh\necho one\n```\n\n```text\none\n```\n", None),
    ("```sh\necho one\n```\n\n```text\ntwo\n```\n", r"page.md:4: .* page shows\ntwo\nthe newcomer sees\none\n"),
    ("```sh\nls nothing\necho one\n```\n", r"page.md:4: .*the status is 2, and not 0"),
    ("```python\nraise SystemExit(3)\n```\n", r"page.md:4: python example_4.py\nthe status is 3"),
    ("<!-- run: killed -->\n```sh\nls\n```\n", r"the status is 0, and not 137"),
    ("<!-- run: killed -->\n```sh\nsh -c 'echo one; kill -9 $$'\n```\n\n```text\none\n```\n", None),
    ("<!-- dies -->\n```python\npass\n```\n", r"the status is 0, and not 139"),
    ("```sh\nsh -c 'exit 4' &\necho one\n```\n", "the status is 4, and not 0"),
    ("```sh\npython -c 'print(1)'\n```\n", r"at the end: .*'nothing', and not '1\\n'"),
], ids=lambda value: "")
def test_a_page_fails_where_it_says_what_does_not_happen(root, text, reason, tmp_path):
    from newcomer.command import Failed, follow
    from newcomer.tasks import Task, equal
    task = Task("page", lambda shell, seen: equal("print" in text and "nothing", "print" in text and seen))
    plan = steps(VENV + text)
    if reason is None:
        result = follow(task, plan, root, tmp_path / "own")
        assert 0 <= result.first <= result.whole
    else:
        with pytest.raises(Failed, match=f"(?s){reason}"):
            follow(task, plan, root, tmp_path / "own")


@requires("mounts")
def test_without_namespaces_the_tasks_do_not_run_and_the_status_says_so(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "newcomer"), "--wheel", "linmem.whl"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (77, "newcomer: NOT RUN: no namespaces: no program unshare\n"), done.stderr


@requires("mounts")
def test_a_command_that_does_not_end_is_stopped_with_its_children(root, tmp_path):
    from newcomer.root import Shell
    with Shell(root, tmp_path / "own") as shell:
        said, status = shell.type("echo begun\nsh -c 'while :; do :; done' &\nwait $!\n", 1)
        assert (said.startswith("begun\n"), status) == (True, -1)
        inside = [process for process in Path("/proc").glob("[0-9]*")
                  if (process / "root").is_symlink() and _is_in(process, root.path)]
        assert inside
    assert not [process for process in inside if _is_in(process, root.path)]


def _is_in(process, root):
    try:
        return (process / "root").samefile(root)
    except OSError:         # the process has ended
        return False


def test_a_step_without_commands_installs_nothing():
    assert Step(1, 1, "a", "pip install linmem").installs == []
