"""`linmem run --coredump`: what a core dump holds, read by this file, by wasmtime and by wasm-tools."""

from __future__ import annotations

import os
import re
import stat
import subprocess

import pytest
import wasmtime
from support import WASM_TOOLS, requires, run_child

import linmem.wasmtime
from linmem import cli
from linmem._wasm import component as linmem_component
from linmem._wasm import coredump, prepared
from linmem._wasm.component import core_modules
from linmem._wasm.module import Module
from linmem._wasm.reader import Reader

PAGE = 65536
TRAPS = """
(module $guest
  (memory (export "memory") 1 8) (memory $hidden 2)
  (global $stack (mut i32) (i32.const 65536)) (global $constant i64 (i64.const -5))
  (global $half (mut f64) (f64.const 0)) (global $quarter f32 (f32.const 0.25))
  (global $vector (mut v128) (v128.const i64x2 0 0)) (global $object (mut externref) (ref.null extern))
  (data (i32.const 70) "hello") (data (i32.const 20000) "there")
  (func $deep (param i32)
    (global.set $stack (i32.const -77)) (global.set $half (f64.const 0.5))
    (global.set $vector (v128.const i64x2 1 -2))
    (i32.store8 $hidden (i32.const 131071) (i32.const 65))
    (i32.store (i32.const 262140) (i32.const 0x01020304))
    unreachable)
  (func (export "_start") (drop (memory.grow (i32.const 3))) (call $deep (i32.const 1))))
"""
SEGMENTS = [(0, 70, b"hello"), (0, 20000, b"there"), (0, 262140, b"\4\3\2\1"), (1, 131071, b"A")]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trapped(here, capfd):
    """Runs the text of a program that traps; returns the core dump and standard error."""
    def run(text, *words, code=134):
        (here / "guest.wat").write_text(text)
        found = cli.main(["run", "--no-cache", "--coredump", "core", *words, "guest.wat"])
        out, error = capfd.readouterr()
        assert (found, out) == (code, "")
        return (here / "core").read_bytes(), error
    return run


def custom_sections(dump):
    found, reader = {}, Reader(dump, 8, len(dump))
    while reader.at < reader.end:
        kind, size = reader.byte("section"), reader.u32("size")
        start = reader.skip(size, "section")
        if kind == 0:
            inner = Reader(dump, start, reader.at)
            found[inner.name("name")] = inner
    return found


def numbers(reader, count):
    return [reader.u32("number") for _ in range(count)]


def stack(dump):
    """The name of the thread, and (instance, function, offset, locals, operands) of each frame."""
    reader = custom_sections(dump)["corestack"]
    assert reader.byte("thread") == 0
    name, frames = reader.name("thread"), []
    for _ in range(reader.u32("frames")):
        assert reader.byte("frame") == 0
        frames.append(tuple(numbers(reader, 5)))
    assert reader.at == reader.end
    return name, frames


def segments(dump):
    return [(each.memory, each.offset[1], dump[each.content:each.content + each.size]) for each in Module(dump).data]


def contents(dump):
    """What the memories of an instance of the dump hold: wasmtime reads the dump."""
    config = wasmtime.Config()
    linmem.wasmtime.install(config)
    engine = wasmtime.Engine(config)
    prepared = linmem.wasmtime.prepare(engine, dump, expose=True)
    store = wasmtime.Store(engine)
    instance = prepared.instantiate(store)
    return [bytes(memory.read(store)) for memory in instance.exports(store).values()
            if isinstance(memory, wasmtime.Memory)]


def test_a_dump_names_the_program_and_its_instance(trapped):
    dump, _ = trapped(TRAPS)
    found = custom_sections(dump)
    assert list(found) == ["core", "coremodules", "coreinstances", "corestack"]
    assert found["core"].byte("kind") == 0
    assert found["core"].name("program") == "guest.wat"
    modules = found["coremodules"]
    assert (*numbers(modules, 2), modules.name("module")) == (1, 0, "guest.wat")
    instances = found["coreinstances"]
    assert numbers(instances, 12) == [1, 0, 0, 2, 0, 1, 6, 0, 1, 2, 3, 4]
    assert numbers(instances, 1) == [5]
    assert all(reader.at == reader.end for reader in (found["core"], modules, instances))


def test_a_dump_has_the_frames_of_the_trap_and_the_innermost_one_is_first(trapped):
    dump, error = trapped(TRAPS)
    name, frames = stack(dump)
    assert name == "main"
    assert [frame[:2] + frame[3:] for frame in frames] == [(0, 0, 0, 0), (0, 1, 0, 0)]
    # The offsets of the instructions, from the start of each function: an unreachable, and a call.
    wasm = bytes(wasmtime.wat2wasm(TRAPS))
    starts = [reader.skip(reader.u32("size"), "function") for reader in Module(wasm).items(10, "functions")]
    assert [wasm[start + frame[2]] for start, frame in zip(starts, frames, strict=True)] == [0x00, 0x10]
    assert error.splitlines()[-1] == "linmem run: core dump: core (2 memories, 6 globals, 2 frames)"


def test_a_dump_has_the_memories_without_their_zeros_also_those_that_the_program_does_not_export(trapped):
    dump, _ = trapped(TRAPS)
    assert [(limits.minimum, limits.maximum) for limits in Module(dump).memories()] == [
        (4 * PAGE, 1 << 32), (2 * PAGE, 1 << 32)]
    assert segments(dump) == SEGMENTS
    assert len(dump) < 500


def test_wasmtime_finds_the_same_bytes_in_the_memories_of_a_dump(trapped):
    expected = [bytearray(4 * PAGE), bytearray(2 * PAGE)]
    for number, start, data in SEGMENTS:
        expected[number][start:start + len(data)] = data
    assert contents(trapped(TRAPS)[0]) == expected


def test_a_dump_has_the_globals_as_constants(trapped):
    dump, _ = trapped(TRAPS)
    found = []
    for reader in Module(dump).items(6, "globals"):
        kind = reader.global_type()
        assert not kind.mutable
        start = reader.at
        Module(dump).expression(reader, [])
        found.append((kind.number, dump[start:reader.at - 1].hex(" ")))
    assert found == [("i32", "41 b3 7f"), ("i64", "42 7b"), ("f64", "44 00 00 00 00 00 00 e0 3f"),
                     ("f32", "43 00 00 80 3e"),
                     ("v128", "fd 0c 01 00 00 00 00 00 00 00 fe ff ff ff ff ff ff ff"), ("", "d0 6f")]


def wasm_tools(*words):
    return subprocess.run([*WASM_TOOLS, *words, "core"], capture_output=True, text=True, timeout=60, check=True).stdout


@requires("wasm_tools")
def test_wasm_tools_reads_a_dump(trapped):
    dump, _ = trapped(TRAPS)
    printed = wasm_tools("print")
    for line in ('(memory (;0;) 4)', '(memory (;1;) 2)', '(global (;0;) i32 i32.const -77)',
                 '(data (;1;) (i32.const 20000) "there")', '(data (;3;) (memory 1) (i32.const 131071) "A")'):
        assert line in printed
    wasm_tools("validate", "--features", "all")
    dumped = wasm_tools("dump")
    frames = re.findall(r"CoreDumpStackFrame \{ instanceidx: (\d+), funcidx: (\d+), codeoffset: (\d+),", dumped)
    assert [tuple(map(int, frame)) for frame in frames] == [frame[:3] for frame in stack(dump)[1]]
    assert "CoreDumpInstance { module_index: 0, memories: [0, 1], globals: [0, 1, 2, 3, 4, 5] }" in dumped


@pytest.mark.parametrize("memory", ["(memory 1)", "(memory i64 1)", "(memory i64 1 70000)"])
def test_the_last_byte_of_a_memory_is_in_the_dump(trapped, memory):
    kind = "i64" if "i64" in memory else "i32"
    dump, _ = trapped(f'(module {memory} (func (export "_start") (i32.store8 ({kind}.const 65535) (i32.const 9))'
                      " unreachable))")
    assert segments(dump) == [(0, 65535, b"\t")]
    assert contents(dump) == [bytes(65535) + b"\t"]


@requires("large_space")
def test_addresses_above_two_gigabytes_are_right_and_a_dump_of_a_huge_memory_is_small(trapped):
    dump, _ = trapped('(module (memory 65535) (func (export "_start")'
                      " (i32.store8 (i32.const 0xF0000000) (i32.const 9)) unreachable))")
    ((number, offset, data),) = segments(dump)
    assert (number, offset % 2**32, data) == (0, 0xF0000000, b"\t")
    assert len(dump) < 300


def test_a_trap_before_there_is_an_instance_leaves_a_dump_of_the_stack(trapped):
    dump, error = trapped('(module (memory 1) (func $start unreachable) (start $start) (func (export "_start")))')
    assert [frame[1] for frame in stack(dump)[1]] == [0]
    assert Module(dump).memories() == []
    assert "(0 memories, 0 globals, 1 frame)" in error


def test_a_stack_overflow_leaves_a_dump_of_the_frames_that_wasmtime_gives(trapped):
    dump, _ = trapped('(module (func $again (export "_start") (call $again) (call $again)))')
    frames = stack(dump)[1]
    assert len(frames) >= 20
    # The innermost function had not begun, and wasmtime knows no offset. The offsets of the others are of the calls.
    assert [frame[:3] for frame in frames[:3]] == [(0, 0, 0), (0, 0, 1), (0, 0, 1)]


def test_a_call_of_the_host_that_fails_is_a_trap_and_leaves_a_dump(trapped):
    dump, error = trapped("""(module
      (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
      (memory (export "memory") 1) (data (i32.const 70) "hello")
      (func (export "_start")
        (drop (call $write (i32.const 1) (i32.const -4) (i32.const 1) (i32.const 0)))))""")
    assert error.startswith("linmem run: guest.wat trapped: Pointer out of bounds")
    assert segments(dump) == [(0, 70, b"hello")]
    _, [(_, function, offset, *_)] = stack(dump)
    assert function == 1
    assert offset > 0


def test_a_program_that_started_from_a_snapshot_leaves_a_dump_of_its_whole_state(trapped, here):
    text = """(module (memory 1) (global $n (mut i32) (i32.const 1)) (data (i32.const 0) "data")
      (func (export "init") (i32.store8 (i32.const 5000) (i32.const 65)) (global.set $n (i32.const 2)))
      (func (export "_start") (i32.store8 (i32.const 9000) (i32.const 66)) unreachable))"""
    (here / "guest.wat").write_text(text)
    assert cli.main(["prewarm", "--no-cache", "--init", "init", "-o", "snapshot", "guest.wat"]) == 0
    (here / "core").unlink(missing_ok=True)
    found = cli.main(["run", "--no-cache", "--coredump", "core", "--start", "snapshot", "guest.wat"])
    assert found == 134
    dump = (here / "core").read_bytes()
    assert segments(dump) == [(0, 0, b"data"), (0, 5000, b"A"), (0, 9000, b"B")]
    assert Module(dump).values == [(32, 2)]


def test_more_pieces_than_a_module_may_have_segments_are_joined(trapped, monkeypatch):
    monkeypatch.setattr(coredump, "_MAX_SEGMENTS", 11)
    dump, _ = trapped("""(module (memory 64) (memory $more 64) (func (export "_start") (local $at i32)
      (loop $next
        (i32.store8 (local.get $at) (i32.const 7))
        (i32.store8 $more (local.get $at) (i32.const 7))
        (br_if $next (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 30000))) (i32.const 4000000))))
      unreachable))""")
    assert [sum(number == memory for number, *_ in segments(dump)) <= 5 for memory in (0, 1)] == [True, True]
    content = b"".join(b"\7" if at % 30000 == 0 and at < 4000000 else b"\0" for at in range(64 * PAGE))
    assert contents(dump) == [content, content]


def test_of_a_module_that_linmem_does_not_know_the_exported_memories_are_found():
    config = wasmtime.Config()
    linmem.wasmtime.install(config)
    engine = wasmtime.Engine(config)
    store = wasmtime.Store(engine)
    instance = wasmtime.Instance(store, wasmtime.Module(
        engine, '(module (memory (export "m") 2) (memory 1) (data (i32.const 3) "x"))'), [])
    held = coredump.instance_of(store, instance, None, b"")
    assert [(memory.type, [(start, bytes(data)) for start, data in memory.pieces(9)]) for memory in held.memories] == [
        (b"\0\2", [(3, b"x")])]
    assert held.globals == []


@pytest.mark.parametrize("text", [
    '(module (memory (export "memory") 1) (func (export "_start")))',
    """(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32))) (memory (export "memory") 1)
         (func (export "_start") (call $exit (i32.const 0))))"""])
def test_a_program_that_does_not_trap_leaves_no_dump(here, text):
    (here / "guest.wat").write_text(text)
    assert cli.main(["run", "--no-cache", "--coredump", "core", "guest.wat"]) == 0
    assert os.listdir() == ["guest.wat"]


@requires("owners")
def test_only_the_owner_can_read_a_dump(trapped):
    trapped(TRAPS)
    assert stat.S_IMODE(os.stat("core").st_mode) == 0o600


@pytest.mark.parametrize(("path", "reason"), [
    ("guest.wat", "it is PROGRAM itself"), (".", "it is a directory"),
    ("no/such", "is not a directory"), ("guest.wat/core", "is not a directory")])
def test_a_file_that_cannot_be_written_is_refused_before_the_program_runs(here, capfd, path, reason):
    (here / "guest.wat").write_text(TRAPS)
    assert cli.main(["run", "--no-cache", "--coredump", path, "guest.wat"]) == 2
    error = capfd.readouterr().err
    assert reason in error
    assert (error.count("\n"), os.listdir()) == (1, ["guest.wat"])


@requires("rlimits")
def test_a_dump_that_does_not_fit_the_disk_is_one_line_and_leaves_nothing(here):
    (here / "guest.wat").write_text(TRAPS)
    done = run_child("""
        import sys
        from linmem import cli
        sys.exit(cli.main(["run", "--no-cache", "--coredump", "core", "guest.wat"]))
        """, cwd=here, limits={"RLIMIT_FSIZE": 100})
    assert (done.returncode, done.stdout) == (134, "")
    assert done.stderr.splitlines()[-1] == "linmem run: no core dump: core: File too large"
    assert os.listdir() == ["guest.wat"]


@requires("owners")     # Windows removes no open file; the next dump in the folder removes the abandoned one
def test_an_interrupt_while_a_dump_is_written_leaves_nothing(here):
    (here / "guest.wat").write_text(TRAPS)
    done = run_child("""
        import _thread, os, threading
        from linmem import cli
        from linmem._wasm import coredump

        def write(*arguments):
            print(len(os.listdir()), flush=True)
            _thread.interrupt_main()
            threading.Event().wait()

        coredump._custom = write
        cli.main(["run", "--no-cache", "--coredump", "core", "guest.wat"])
        """, cwd=here)
    assert (done.returncode, done.stdout) == (130, "2\n")
    assert os.listdir() == ["guest.wat"]


# -- components --------------------------------------------------------------------------------------------------------

# The component $inner calls `take` of the outer one, and wasmtime makes a function that passes the string.
COMPONENT = """
(component
  (core module $grows (memory (export "memory") 1 9) (data (i32.const 70) "first")
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 5000))
    (func $deep (i32.store (i32.const 131068) (i32.const 0x01020304)) unreachable)
    (func (export "take") (param i32 i32) (drop (memory.grow (i32.const 1))) (call $deep)))
  (core instance $grows (instantiate $grows))
  (alias core export $grows "memory" (core memory $memory))
  (alias core export $grows "realloc" (core func $realloc))
  (func $take (param "text" string) (canon lift (core func $grows "take") (memory $memory) (realloc $realloc)))
  (component $inner
    (import "take" (func $take (param "text" string)))
    (core module $library (memory (export "memory") 2) (data (i32.const 5) "library"))
    (core instance $one (instantiate $library))
    (core instance $two (instantiate $library))
    (alias core export $two "memory" (core memory $memory))
    (core func $take (canon lower (func $take) (memory $memory)))
    (core module $main (import "" "take" (func $take (param i32 i32))) (memory i64 3 4)
      (func (export "run") (result i32)
        (i64.store (i64.const 65536) (i64.const -1)) (call $take (i32.const 5) (i32.const 4)) (i32.const 0)))
    (core instance $main (instantiate $main (with "" (instance (export "take" (func $take))))))
    (func (export "run") (result (result)) (canon lift (core func $main "run"))))
  (instance $inner (instantiate $inner (with "take" (func $take))))
  (alias export $inner "run" (func $run))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command)))"""
COMPONENT_SEGMENTS = [(0, 70, b"first"), (0, 5000, b"libr"), (0, 131068, b"\4\3\2\1"), (1, 5, b"library"),
                      (2, 5, b"library"), (3, 65536, b"\xff" * 8)]


def instances(dump):
    """The names of the modules, and (module, memories, globals) of each instance."""
    found = custom_sections(dump)
    reader, names, items = found["coremodules"], [], []
    for _ in range(reader.u32("modules")):
        assert reader.byte("module") == 0
        names.append(reader.name("module"))
    reader = found["coreinstances"]
    for _ in range(reader.u32("instances")):
        assert reader.byte("instance") == 0
        module = reader.u32("module")
        items.append((names[module], *(numbers(reader, reader.u32("number")) for _ in ("memories", "globals"))))
    assert reader.at == reader.end
    return names, items


@requires("components")
def test_a_dump_of_a_component_has_the_memories_of_each_core_instance(trapped):
    dump, error = trapped(COMPONENT)
    assert error.splitlines()[-1] == "linmem run: core dump: core (4 memories, 0 globals, 4 frames)"
    assert instances(dump) == (["module 0", "module 1", "module 2", "unknown"], [
        ("module 0", [0], []), ("module 1", [1], []), ("module 1", [2], []), ("module 2", [3], []),
        ("unknown", [], [])])
    assert [(limits.minimum // PAGE, limits.bits) for limits in Module(dump).memories()] == [
        (2, 32), (2, 32), (2, 32), (3, 64)]
    assert segments(dump) == COMPONENT_SEGMENTS


@requires("components")
def test_the_frames_of_a_component_name_the_module_of_each_function(trapped):
    dump, _ = trapped(COMPONENT)
    _, held = instances(dump)
    frames = stack(dump)[1]
    # The third function is wasmtime's.
    assert [(held[frame[0]][0], frame[1]) for frame in frames if frame[0] != 4] == [
        ("module 0", 1), ("module 0", 2), ("module 2", 1)]
    assert [held[frame[0]][0] for frame in frames] == ["module 0", "module 0", "unknown", "module 2"]
    modules = [Module(wasm) for _, wasm in core_modules(bytes(wasmtime.wat2wasm(COMPONENT)))]
    codes = []
    for instance, function, offset, *_ in frames:
        if held[instance][0] != "unknown":
            module = modules[int(held[instance][0][-1])]
            starts = [reader.skip(reader.u32("size"), "function") for reader in module.items(10, "functions")]
            codes.append(module.wasm[starts[function - len(module.all_imports()["function"])] + offset])
    assert codes == [0x00, 0x10, 0x10]      # an unreachable, and two calls


@requires("components")
def test_a_component_whose_data_stays_leaves_the_same_dump(trapped, monkeypatch):
    expected, _ = trapped(COMPONENT)
    monkeypatch.setattr(prepared, "_images", lambda *arguments: (_ for _ in ()).throw(OverflowError("no room")))
    assert trapped(COMPONENT)[0] == expected


@requires("components")
def test_a_component_that_linmem_cannot_follow_leaves_a_dump_of_its_memories_and_frames(trapped, monkeypatch):
    monkeypatch.setattr(linmem_component, "_MOST_STEPS", 1)
    dump, _ = trapped(COMPONENT)
    names, held = instances(dump)
    assert names == ["module 0", "module 1", "module 2", "unknown"]
    assert held[-1] == ("unknown", [0, 1, 2, 3], [])
    assert sorted(data for _, _, data in segments(dump)) == sorted(data for _, _, data in COMPONENT_SEGMENTS)
    assert [frame[0] for frame in stack(dump)[1]] == [0, 0, 3, 2]


@requires("components")
def test_a_component_that_traps_before_it_is_an_instance_leaves_a_dump_of_the_stack(trapped):
    dump, error = trapped(COMPONENT.replace("(func $deep", "(start $deep) (func $deep"))
    assert "(0 memories, 0 globals, 1 frame)" in error
    assert instances(dump)[1][0] == ("module 0", [], [])
    assert [frame[:2] for frame in stack(dump)[1]] == [(0, 1)]


@requires("components", "wasm_tools")
def test_wasm_tools_reads_a_dump_of_a_component(trapped):
    trapped(COMPONENT)
    printed = wasm_tools("print")
    for line in ("(memory (;0;) 2)", "(memory (;3;) i64 3)", '(data (;2;) (i32.const 131068) "\\04\\03\\02\\01")',
                 '(data (;4;) (memory 2) (i32.const 5) "library")'):
        assert line in printed
    wasm_tools("validate", "--features", "all")
    assert "CoreDumpInstance { module_index: 2, memories: [3], globals: [] }" in wasm_tools("dump")
