"""A short soak succeeds, and a soak with a planted fault finds and names the fault."""

import json
import re
import subprocess
import sys

import pytest
from soak.command import main
from support import NEEDS, ROOT, requires, run_child

PLANTED = """
import os, sys, threading, time
import linmem
from soak.command import main
from soak.creators import Maker

class Planted(linmem.MemoryCreator):
    '''Returns the memories of a native creator, after `wrong` has done something to them.'''

    def __init__(self, wrong):
        self.upstream, self.wrong, self.kept, self.made = linmem.MmapCreator(), wrong, [], 0

    def new_memory(self, *asked):
        mem = self.upstream.new_memory(*asked)
        self.made += 1
        self.wrong(self, mem)
        return mem

def dirty(creator, mem):
    if len(mem) > 4000 and creator.made > 20:
        mem[3999] = 7

def leak(creator, mem):
    everything.append(creator.upstream.create(100))

def descriptor(creator, mem):
    everything.append(linmem.Image.from_bytes(b"x"))

def shared(creator, mem):       # one thread writes to the memories of others
    creator.kept.append(memoryview(mem))
    for view in creator.kept[-30:]:
        if len(view) > 100: view[100] ^= 1

def undocumented(creator, mem):
    if creator.made > 20:
        raise RuntimeError("never heard of")

def hang(creator, mem):
    if creator.made > 20:
        threading.Event().wait()

def child(creator, mem):
    if len(mem) and threading.active_count() == 1:      # only in a forked child
        mem[0] = 1

def orphan(creator, mem):       # a child hangs, and its parent ends with another finding
    if os.getpid() != parent:
        threading.Event().wait()
    if forked:
        raise RuntimeError("never heard of")

everything, forked, parent = [], [], os.getpid()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=lambda: forked.append(True))
more = (Maker("planted", linmem.PythonCreator(Planted({wrong}))),) * 3
status = main({arguments!r}, more=more)
sys.stdout.flush()
os._exit(status)
"""


def planted(wrong, *arguments, minutes="1"):       # minutes: the upper bound; the soak ends at the first finding
    given = ["--seed", "5", "--threads", "4", "--minutes", minutes]
    done = run_child(PLANTED.format(wrong=wrong, arguments=[*given, *arguments]))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "soak: FAILED after" in done.stderr
    assert f"soak: again with: {' '.join(given)}" in done.stderr
    return done.stderr


KINDS = ("create", "grow", "view", "protect", "discard", "close", "clone", "common")
if NEEDS["shared"][0]:
    KINDS += ("attach",)
if NEEDS["file_memories"][0]:
    KINDS += ("open_file", "show")


def test_a_short_soak_finds_nothing_and_says_what_it_did(tmp_path):
    for minutes in ("0.05", "0.3", "1"):        # a slow machine needs longer to do every kind of step
        done = subprocess.run([sys.executable, "-W", "error", str(ROOT / "tests" / "soak"), "--minutes", minutes,
                               "--json", str(tmp_path / "figures.json")], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))
        counts = {"faults": figures["faults_injected"], "raised": figures["faults_raised_and_survived"],
                  **{kind: figures["operations"].get(kind, 0) for kind in KINDS}}
        if all(counts.values()):
            break
    assert all(counts.values()), counts
    assert figures["failure"] is None
    assert f"seed {figures['seed']}" in done.stdout.splitlines()[-1]
    assert figures["operations_in_all"] == sum(figures["operations"].values())
    for kind in KINDS:
        assert kind.replace("_", " ") in done.stdout
    assert len(figures["at_rest"]) == 8
    if NEEDS["maps"][0]:
        for name in ("resident", "mappings", "reserved", "descriptors"):
            assert figures["peak"][name] >= max(reading[name] for reading in figures["at_rest"]) >= 0
        assert figures["at_rest"][0]["reserved"] == figures["at_rest"][-1]["reserved"]


@pytest.mark.parametrize(("wrong", "said"), [
    ("dirty", r"Wrong: byte 3999 of a (fresh |guest's |)memory of 'planted' is 7, must be "),
    ("undocumented", "RuntimeError: never heard of"),
    ("shared", "Wrong: byte 100 of "),
])
def test_a_planted_fault_is_found_and_named(wrong, said):
    assert re.search(said, planted(wrong))


def test_a_thread_that_hangs_is_found_with_its_frames():
    for seconds in ("1.5", "15", "60"):     # on a slow machine, steps that do not hang also take long
        said = planted("hang", "--hang", seconds)
        if "in hang" in said:
            break
    assert re.search(r"Wrong: (worker \d hangs: for|a forked child hung for)", said)
    assert "in hang" in said        # in the frames of the thread or child that hangs


@pytest.mark.slow
@requires("fork")
def test_a_child_that_hangs_ends_though_its_parent_has_ended_before():
    said = planted("orphan", "--hang", "6", minutes="0.5")      # run_child waits for all processes that hold the output
    assert "RuntimeError: never heard of" in said
    assert "in orphan" in said.rpartition("soak: FAILED")[2]        # the child's frames, which come last


@requires("maps")
def test_memories_that_are_never_released_are_found_as_a_leak():
    assert "a leak: reserved was " in planted("leak", minutes="0.1")


@requires("descriptors", "sealed")
def test_descriptors_that_are_never_closed_are_found_as_a_leak():
    assert "a leak: descriptors was " in planted("descriptor", minutes="0.1")


@requires("fork")
def test_a_fault_only_in_a_forked_child_is_found():
    said = planted("child")
    assert "Wrong: a forked child ended with status 1" in said
    assert "of a fresh memory of 'planted' is 1, must be 0" in said


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--threads", "0"], ["--hang", "-1"], ["--minutes", "x"]])
def test_arguments_that_cannot_be_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
