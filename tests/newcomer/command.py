"""The options, the wheels that pip finds, and the time of each task."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from newcomer.page import KILLED, Step, steps
from newcomer.root import NotAllowed, Root, Shell, interpreter, namespaces
from newcomer.tasks import TASKS, Task

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300           # that a task may take, without the time for downloads
NOT_RUN = 77            # as the exit status of a stage of the CI


class Failed(Exception):
    """The page and what happened differ."""


@dataclass
class Result:
    first: float = 0    # seconds to the first success
    words: int = 0      # of the page up to there
    whole: float = 0    # seconds for the whole task


def download(wheel: Path, names: set[str], folder: Path) -> None:
    """Put linmem's wheel, and the wheels of what the pages install, into the folder."""
    shutil.copy(wheel, folder)
    words = [re.sub(r"^linmem\b", str(folder / wheel.name), name) for name in sorted(names)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "-w", folder, *words], check=True)


def needs_compiler(text: str) -> bool:
    """Whether the top of a page asks for a compiler."""
    return "a C compiler" in text.partition("\n## ")[0]


def do(step: Step, shell: Shell, seconds: float) -> str:
    """Do what a step of the page says. Returns what the newcomer sees."""
    if step.file:
        (shell.folder / step.file).write_text(step.text, "utf-8")
        return ""
    printed, status = shell.type(step.commands, seconds, dies=step.status != 0)
    if status != step.status:
        raise Failed(f"the status is {status}, and not {step.status}\n{printed}")
    seen = printed
    if status == KILLED:        # the last line is the shell's
        seen = printed.removesuffix("\n").rpartition("\n")[0] + "\n"
    if step.shown not in (None, seen):
        raise Failed(f"the page shows\n{step.shown}the newcomer sees\n{printed}")
    return seen


def follow(task: Task, plan: list[Step], root: Root, own: Path) -> Result:
    """Do what the page says, and look for what it promised."""
    result, seen, start = Result(), "", time.monotonic()
    with Shell(root, own) as shell:
        if not any("-m venv" in step.commands for step in plan):        # the page says "in a virtual environment"
            plan = [Step(0, 0, commands="python3 -m venv venv\n. venv/bin/activate\n"), *plan]
        for step in plan:
            try:
                shown = do(step, shell, start + SECONDS - time.monotonic())
            except Failed as failure:
                raise Failed(f"docs/{task.page}.md:{step.line}: {step.commands}{failure}") from None
            if not step.installs and step.line:
                seen += shown
            if not result.first and step.commands.startswith(("python ", "linmem ")):
                result.first, result.words = time.monotonic() - start, step.words
        result.whole = time.monotonic() - start
        try:
            task.achieved(shell, seen)
        except (AssertionError, OSError, ValueError) as error:
            raise Failed(f"docs/{task.page}.md: at the end: {error}") from error
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/newcomer", description="Follow pages of the docs word by word in an empty root.")
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel of linmem for this Python")
    parser.add_argument("task", nargs="*", help=f"the tasks, by default all: {' '.join(task.name for task in TASKS)}")
    options = parser.parse_args()
    tasks = [task for task in TASKS if not options.task or task.name in options.task]
    if unknown := set(options.task) - {task.name for task in TASKS}:
        parser.error(f"no task {', '.join(sorted(unknown))}")
    try:
        namespaces()
        interpreter()
    except NotAllowed as error:
        print(f"newcomer: NOT RUN: {error}")
        return NOT_RUN
    texts = {task: (ROOT / "docs" / f"{task.page}.md").read_text("utf-8") for task in tasks}
    plans = {task: steps(text, task.until) for task, text in texts.items()}
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory(prefix="newcomer-") as name:
        folder = Path(name)
        (folder / "wheels").mkdir()
        download(options.wheel, {each for plan in plans.values() for step in plan for each in step.installs},
                 folder / "wheels")
        roots: dict[bool, Root] = {}
        for task in tasks:
            compiler = needs_compiler(texts[task])
            if compiler not in roots:
                roots[compiler] = Root(folder / f"root{len(roots)}", folder / "wheels", compiler=compiler)
            own = folder / task.name
            try:
                result = results[task.name] = follow(task, plans[task], roots[compiler], own)
                print(f"{task.name}: first success after {result.first:.1f} s and {result.words} words, "
                      f"all after {result.whole:.1f} s", flush=True)
            except Failed as failure:
                print(f"{task.name}: FAILED\n{failure}", flush=True)
            shutil.rmtree(own)
    if len(results) < len(tasks):
        return 1
    times = ", ".join(f"{name} {result.first:.0f} s" for name, result in results.items())
    print(f"newcomer: ok: {len(results)} tasks, first success: {times}")
    return 0
