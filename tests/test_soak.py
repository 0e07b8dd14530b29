"""A short soak ends well, and each kind of fault that it is there for is found and named."""

import json
import re

import pytest
from support import NEEDS, requires, run_child

pytest.importorskip("linmem.bench._raw")

PLANTED = """
import os, sys, threading, time
import linmem
from linmem.bench import soak

class Planted(linmem.MemoryCreator):
    '''Hands on what a good creator makes, but for what is wrong.'''

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

def shared(creator, mem):       # one thread's bytes come to another's
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
    if len(mem) and threading.active_count() == 1:      # only where one thread was forked off
        mem[0] = 1

def orphan(creator, mem):       # a child hangs, and its parent ends with a finding of its own
    if os.getpid() != parent:
        threading.Event().wait()
    if forked:
        raise RuntimeError("never heard of")

everything, forked, parent = [], [], os.getpid()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_parent=lambda: forked.append(True))
more = (soak.Maker("planted", linmem.PythonCreator(Planted({wrong}))),) * 3
status = soak.main({arguments!r}, more=more)
sys.stdout.flush()
os._exit(status)
"""


def planted(wrong, *arguments, minutes="1"):       # at most: it ends with what it finds
    given = ["--seed", "5", "--threads", "4", "--minutes", minutes]
    done = run_child(PLANTED.format(wrong=wrong, arguments=[*given, *arguments]))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "soak: FAILED after" in done.stderr
    assert f"soak: again with: {' '.join(given)}" in done.stderr
    return done.stderr


KINDS = ("create", "grow", "view", "protect", "discard", "close", "clone", "common")


def test_a_short_soak_finds_nothing_and_says_what_it_did(tmp_path):
    for minutes in ("0.05", "0.3", "1"):        # until every kind of step has run, also on a slow machine
        done = run_child(f"""
            import runpy, sys
            sys.argv = ["soak", "--minutes", "{minutes}", "--json", {str(tmp_path / "figures.json")!r}]
            runpy.run_module("linmem.bench.soak", run_name="__main__", alter_sys=True)
            """, timeout=120)
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
        assert kind in done.stdout
    assert len(figures["at_rest"]) == 8
    if NEEDS["maps"][0]:
        for name in ("resident", "mappings", "reserved", "descriptors"):
            assert figures["peak"][name] >= figures["at_rest"][-1][name] >= 0
        assert figures["at_rest"][0]["reserved"] == figures["at_rest"][-1]["reserved"]


@pytest.mark.parametrize(("wrong", "said"), [
    ("dirty", r"Wrong: byte 3999 of a (fresh |guest's |)memory of 'planted' is 7, must be "),
    ("undocumented", "RuntimeError: never heard of"),
    ("shared", "Wrong: byte 100 of "),
])
def test_a_planted_fault_is_found_and_named(wrong, said):
    assert re.search(said, planted(wrong))


def test_a_thread_that_hangs_is_found_and_where():
    for seconds in ("1.5", "15", "60"):     # until no step of another thread takes that long on this machine
        said = planted("hang", "--hang", seconds)
        if "in hang" in said:
            break
    assert re.search(r"Wrong: (worker \d hangs: for|a forked child hung for)", said)
    assert "in hang" in said        # the frames of whoever it is


@pytest.mark.slow
@requires("fork")
def test_a_child_that_hangs_ends_though_its_parent_has_ended_before():
    said = planted("orphan", "--hang", "6", minutes="0.5")      # and not before all that holds its output has ended
    assert "RuntimeError: never heard of" in said
    assert "in orphan" in said.rpartition("soak: FAILED")[2]        # the frames of the child, which comes last


@requires("maps")
def test_memories_that_are_never_let_go_of_are_a_leak():
    assert "a leak: reserved was " in planted("leak", minutes="0.1")


@requires("descriptors", "sealed")
def test_descriptors_that_are_never_let_go_of_are_a_leak():
    assert "a leak: descriptors was " in planted("descriptor", minutes="0.1")


@requires("fork")
def test_what_is_wrong_in_a_forked_child_only_is_found():
    said = planted("child")
    assert "Wrong: a forked child ended with status 1" in said
    assert "of a fresh memory of 'planted' is 1, must be 0" in said


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--threads", "0"], ["--hang", "-1"], ["--minutes", "x"]])
def test_arguments_that_cannot_be_are_refused(arguments, capsys):
    from linmem.bench import soak

    with pytest.raises(SystemExit) as ended:
        soak.main(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err
