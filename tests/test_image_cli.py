"""``linmem image``: tests start the command as a process and read its output."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import struct
import subprocess
import sys

import pytest
from support import requires, run_child

from linmem import Delta, FileFormatError, Image
from linmem._commands import page_map
from linmem.cli import main

PAGE, GROUP = 4096, 65536


def linmem_image(*words, **environment):
    return subprocess.run([sys.executable, "-m", "linmem", "image", *map(str, words)], capture_output=True,
                          encoding="utf-8", timeout=120,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                               "PYTHONIOENCODING": "utf-8", **environment})


def said(*words):
    done = linmem_image(*words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refusal(*words, code=1):
    done = linmem_image(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.fixture
def there(tmp_path, monkeypatch):
    """old.image, new.image, and step.delta from old to new. Together they have a page of each kind."""
    monkeypatch.chdir(tmp_path)
    old = Image.from_pieces([(0, b"same"), (PAGE, b"goes"), (2 * PAGE, b"changes")], 4 * GROUP)
    with old.new_memory() as mem:
        mem[PAGE:2 * PAGE] = bytes(PAGE)
        mem[2 * PAGE] = 1
        mem[3 * GROUP] = mem[3 * GROUP + PAGE] = 7
        new = mem.snapshot()
        new_bytes = bytes(new)
    old.save("old.image")
    new.save("new.image", packed=True)
    # The delta is built by hand, because diff() uses the host's page size.
    Delta(old.digest, old.size, new.size, [(2 * PAGE, PAGE), (3 * GROUP, 2 * PAGE)], [(PAGE, PAGE)],
          new_bytes[2 * PAGE:3 * PAGE] + new_bytes[3 * GROUP:3 * GROUP + 2 * PAGE], new.digest).save("step.delta")
    return tmp_path


def test_info_describes_the_content_of_files(there):
    old, new = Image.open("old.image"), Image.open("new.image")
    lines = said("info", "old.image", "new.image", "step.delta").splitlines()
    assert lines[0] == "old.image: image, 256 KiB"
    assert lines[1] == "  stored    12 KiB in 1 group, in place"
    assert lines[3] == f"  digest    {old.digest}"
    assert lines[5] == "  stored    16 KiB in 2 groups, packed"
    assert lines[8] == "step.delta: delta, 256 KiB"
    assert lines[9] == "  stored    12 KiB in 2 groups, packed; 1 page became zero"
    assert lines[11:] == [f"  from      256 KiB, digest {old.digest}", f"  to        256 KiB, digest {new.digest}"]


def test_info_as_json_has_every_figure(there):
    text = said("info", "--json", "old.image", "step.delta")
    assert text.count("\n") == 1
    image, delta = json.loads(text)
    assert (image["path"], image["kind"], image["version"], image["layout"]) == ("old.image", "image", 1, "in place")
    assert (image["size"], image["offset"], image["stored"], image["groups"]) == (4 * GROUP, 0, 3 * PAGE, 1)
    assert image["file_size"] == os.path.getsize("old.image")
    assert image["digest"] == delta["base_digest"] == Image.open("old.image").digest
    assert (delta["kind"], delta["zero_pages"], delta["base_size"]) == ("delta", 1, 4 * GROUP)
    assert delta["digest"] == Image.open("new.image").digest


def test_verify_names_each_file_that_is_damaged_and_why(there):
    assert said("verify", "old.image", "new.image", "step.delta") == "old.image: ok\nnew.image: ok\nstep.delta: ok\n"
    for name, at in (("old.image", GROUP + 5), ("step.delta", GROUP + 5)):
        with open(name, "r+b") as file:
            file.seek(at)
            file.write(b"\xff")
    done = linmem_image("verify", "old.image", "new.image", "step.delta", "nothing")
    assert done.returncode == 1
    assert done.stdout == "new.image: ok\n"
    lines = done.stderr.splitlines()
    assert [line.split(":")[1].strip() for line in lines] == ["old.image", "step.delta", "nothing"]
    assert "crc of group 0 (bytes 0 to 65535) is 0x" in lines[0]
    assert "No such file" in lines[2]
    done = linmem_image("verify", "--json", "old.image", "new.image")
    assert done.returncode == 1
    answers = [(each["path"], each["ok"]) for each in json.loads(done.stdout)]
    assert answers == [("old.image", False), ("new.image", True)]


def test_diff_counts_the_pages_that_differ(there):
    assert said("diff", "old.image", "new.image").splitlines() == [
        "old.image: 256 KiB", "new.image: 256 KiB",
        "4 of 64 pages differ (6.2 %): changed 1, was zero 2, became zero 1"]
    figures = json.loads(said("diff", "old.image", "new.image", "--json"))
    assert (figures["pages"], figures["differing"], figures["same"]) == (64, 4, False)
    assert (figures["changed"], figures["was_zero"], figures["became_zero"]) == (1, 2, 1)
    assert figures["new"]["digest"] == Image.open("new.image").digest


def test_diff_answers_by_its_exit_code_when_asked(there):
    assert linmem_image("diff", "old.image", "new.image").returncode == 0
    assert linmem_image("diff", "--exit-code", "old.image", "new.image").returncode == 3
    assert linmem_image("diff", "--exit-code", "old.image", "old.image").returncode == 0


def test_diff_saves_the_delta(there):
    said("diff", "old.image", "new.image", "-o", "found.delta")
    assert Image.open("old.image").apply(Delta.open("found.delta")) == Image.open("new.image")


def test_diff_shows_the_pages_on_a_map(there):
    text = said("diff", "old.image", "new.image", "--map")
    assert "each mark is 4 KiB" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("0 "))
    assert row.split() == ["0", "▒▁█" + "." * 45 + "▆▆" + "." * 14]
    assert all(name in text for name in ("zero in both", "the same", "became zero", "was zero", "changed"))


def test_the_map_has_plain_signs_where_the_terminal_has_no_others(there):
    done = linmem_image("diff", "old.image", "new.image", "--map", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "=-#" + " " * 45 + "++" in done.stdout


@pytest.mark.parametrize(("pages", "cells", "per_cell"), [
    (1, 1, 1), (1024, 1024, 1), (1025, 513, 2), (16384, 1024, 16)])
def test_a_cell_of_the_map_shows_the_most_important_state_of_its_pages(pages, cells, per_cell):
    marks = bytearray(pages)
    marks[-1] = page_map.CHANGED
    found, each = page_map.grid(marks, 1024)
    assert (len(found), each) == (cells, per_cell)
    assert found == bytes(cells - 1) + bytes([page_map.CHANGED])


@requires("matplotlib")
def test_diff_draws_a_picture(there):
    from matplotlib import image

    said("diff", "old.image", "new.image", "--picture", "pages.png")
    pixels = image.imread("pages.png")
    colors = {tuple(int(255 * part + 0.5) for part in pixel[:3]) for row in pixels for pixel in row}
    for _, _, _, color, _ in page_map.CLASSES:
        assert tuple(bytes.fromhex(color[1:])) in colors
    said("diff", "old.image", "new.image", "--picture", "pages.svg")
    with open("pages.svg", encoding="utf-8") as file:
        assert "<svg" in file.read()
    assert "Format 'no' is not supported" in refusal("diff", "old.image", "new.image", "--picture", "pages.no")


@requires("matplotlib")
def test_images_without_a_page_can_be_drawn(there):
    Image.from_bytes(b"").save("empty")
    assert "0 of 0 pages differ" in said("diff", "empty", "empty", "--map", "--picture", "pages.png")


def test_apply_leads_from_one_image_to_the_next(there):
    text = said("apply", "old.image", "step.delta", "--output", "made.image")
    assert text == f"made.image: 256 KiB, digest {Image.open('new.image').digest}\n"
    assert Image.open("made.image", verify=True) == Image.open("new.image")
    figures = json.loads(said("apply", "old.image", "step.delta", "-o", "made.image", "--packed", "--json"))
    assert figures["layout"] == "packed"
    assert Image.open("made.image", verify=True) == Image.open("new.image")


@pytest.mark.parametrize(("words", "expected"), [
    (["info", "nothing"], "linmem image: nothing: No such file or directory"),
    (["info", "plain"], "linmem image: plain: magic is b'just wor'"),
    (["diff", "old.image", "step.delta"], "step.delta: kind is 2 (a delta), must be 1 (an image)"),
    (["apply", "new.image", "step.delta", "-o", "x"], "step.delta: the delta is for the image "),
    (["apply", "old.image", "new.image", "-o", "x"], "new.image: kind is 1 (an image)"),
    (["apply", "old.image", "step.delta", "-o", "none/x"], "No such file"),
    pytest.param(["diff", "old.image", "new.image", "--picture", "none/x.png"], "none/x.png: No such file",
                 marks=requires("matplotlib")),
])
def test_an_impossible_command_is_refused_in_one_line(there, words, expected):
    (there / "plain").write_text("just words")
    assert expected in refusal(*words)
    assert not (there / "x").exists()


@pytest.mark.parametrize("words", [
    [], ["fly"], ["info"], ["diff", "one"], ["apply", "one", "two"], ["diff", "--outp", "x"]])
def test_a_wrong_command_line_is_refused_in_one_line(words):
    assert "linmem image" in refusal(*words, code=2)


@pytest.mark.parametrize(("missing", "words"), [("rich", "--map"), ("matplotlib", "--picture=x.png")])
def test_a_package_that_is_not_installed_is_named_with_the_way_to_install_it(there, missing, words):
    done = run_child(f"""
        import sys
        sys.modules[{missing!r}] = None
        from linmem import cli
        sys.exit(cli.main(["image", "diff", "old.image", "new.image", {words!r}]))
        """, cwd=there)
    assert done.returncode == 1
    assert re.search(rf"needs {missing}: pip install 'linmem\[image\]'", done.stderr)
    assert done.stderr.count("\n") == 1


def test_apply_with_a_wrong_target_is_refused_and_with_none_is_done(there):
    old, delta = Image.open("old.image"), Delta.open("step.delta")
    parts = (delta.base, delta.base_size, delta.size, delta.ranges, delta.zeros, delta.data)
    Delta(*parts, old.digest).save("wrong.delta")
    Delta(*parts).save("none.delta")
    text = refusal("apply", "old.image", "wrong.delta", "-o", "x")
    assert text == (f"linmem image: wrong.delta: the delta led to the image {delta.target}, and was to lead to"
                    f" {old.digest}\n")
    assert not (there / "x").exists()
    said("apply", "old.image", "none.delta", "-o", "x")
    assert Image.open("x", verify=True) == Image.open("new.image")


def test_diff_and_apply_lead_to_images_at_any_offset(there):
    a, b = Image.from_bytes(b"a" * 5000, 70_000), Image.from_bytes(b"b" * 100, 3)
    a.save("a")
    b.save("b")
    for base, to in (("a", "b"), ("b", "a")):
        said("diff", base, to, "-o", "d")
        said("apply", base, "d", "-o", "made")
        assert Image.open("made", verify=True) == Image.open(to)


@requires("fork")
@pytest.mark.parametrize("words", [["diff", "old.image", "new.image"], ["apply", "old.image", "step.delta"],
                                   ["apply", "old.image", "step.delta", "--json"]])
def test_the_output_goes_to_a_pipe_and_the_words_to_standard_error(there, words):
    done = subprocess.run([sys.executable, "-m", "linmem", "image", *words, "-o", "/dev/stdout"], capture_output=True,
                          timeout=120, env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert (done.returncode, done.stderr.count(b"\n") > 0) == (0, True)
    (there / "got").write_bytes(done.stdout)
    if words[0] == "diff":
        assert Image.open("old.image").apply(Delta.open("got")) == Image.open("new.image")
    else:
        assert Image.open("got", verify=True) == Image.open("new.image")
    said(*words, "-o", "/dev/null")
    assert "/dev/full: No space left on device" in refusal(*words, "-o", "/dev/full")


def claiming(path, size):
    """A valid file of an image of `size` bytes that stores one page."""
    Image.from_bytes(b"x" * PAGE).save(path)
    small = path.read_bytes()
    size_of_data = size // GROUP * GROUP
    state = hashlib.blake2b((0).to_bytes(8, "little") + size.to_bytes(8, "little"), digest_size=32)
    state.update((0).to_bytes(8, "little") + PAGE.to_bytes(8, "little") + b"x" * PAGE)
    table = small[-16:]
    head = bytearray(small[:192])
    head[96:128] = state.digest()
    struct.pack_into("<Q", head, 24, size)
    struct.pack_into("<QQ", head, 56, size_of_data, GROUP + size_of_data)
    with open(path, "wb") as file:
        file.write(bytes(head) + hashlib.blake2b(head, digest_size=32).digest())
        file.seek(GROUP)
        file.write(b"x" * PAGE)
        try:
            file.seek(GROUP + size_of_data)
            file.write(table)
        except OSError:
            return False
    return True


@requires("holes", "rlimits")
@pytest.mark.parametrize("words", [["verify", "large"], ["diff", "large", "old.image"], ["diff", "old.image", "large"],
                                   ["apply", "large", "step.delta", "-o", "x"]])
def test_a_file_that_claims_a_size_without_room_is_refused_in_one_line(there, words):
    assert claiming(there / "large", 1 << 43)
    done = run_child(f"""
        import sys
        from linmem import cli
        sys.exit(cli.main(["image", *{words!r}]))
        """, cwd=there, limits={"RLIMIT_AS": 4 << 30})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "large: " in done.stderr


@requires("holes")
def test_the_time_to_compare_images_depends_on_their_stored_pages_and_not_on_their_claimed_size(there):
    assert claiming(there / "large", 1 << 38)
    Image.from_pieces([(0, b"x" * PAGE), (1 << 37, b"y")], 1 << 38).save("other")
    figures = json.loads(said("diff", "large", "other", "--json", "--map"))
    assert (figures["pages"], figures["differing"], figures["was_zero"]) == (1 << 26, 1, 1)
    text = said("diff", "large", "other", "--map")
    assert "each mark is 256 MiB" in text
    assert text.count("▆") == 2         # one mark in the map and one mark in the legend


@requires("fork")
def test_a_full_standard_output_is_reported_in_one_line(there):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([sys.executable, "-m", "linmem", "image", "info", "old.image"], stdout=full,
                              stderr=subprocess.PIPE, encoding="utf-8", timeout=60,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
    assert (done.returncode, done.stderr) == (1, "linmem image: standard output: No space left on device\n")


@requires("fork")
def test_a_name_that_is_not_valid_text_is_shown(there):
    os.rename(b"old.image", b"\xff.image")
    assert said("info", b"\xff.image".decode("utf-8", "surrogateescape")).startswith("\\udcff.image: image")


@requires("owners")
@pytest.mark.parametrize("words", [["info", "folder"], ["verify", "folder"], ["diff", "folder", "old.image"],
                                   ["apply", "folder", "step.delta", "-o", "x"],
                                   ["apply", "old.image", "folder", "-o", "x"],
                                   ["diff", "old.image", "new.image", "-o", "folder"],
                                   ["apply", "old.image", "step.delta", "-o", "folder"]])
def test_a_folder_in_place_of_a_file_is_refused_in_one_line(there, words):
    (there / "folder").mkdir()
    assert "folder: Is a directory" in refusal(*words)


def test_the_help_tells_the_exit_codes():
    assert "Exit codes: 0" in said("--help")


@pytest.mark.parametrize("sizes", [(100, 1, 3 * PAGE + 7), (PAGE + 5, 2 * PAGE - 5, 1, GROUP + 3), (GROUP + 1, 0, 7)])
def test_deltas_between_images_of_any_size_lead_from_the_first_to_the_last(tmp_path, sizes):
    paths = [str(tmp_path / f"{i}.image") for i in range(len(sizes))]
    for i, (path, size) in enumerate(zip(paths, sizes, strict=True)):
        Image.from_bytes(bytes([0, i]) * (size // 2) + bytes(size % 2), 5 * i).save(path)
    deltas = [f"{path}.delta" for path in paths[1:]]
    for before, after, delta in zip(paths, paths[1:], deltas, strict=False):
        assert image_cli_main("diff", before, after, "-o", delta) == 0
    chain = functools.reduce(Delta.then, map(Delta.open, deltas))
    chain.save(tmp_path / "chain")
    for steps in (deltas, [str(tmp_path / "chain")]):
        assert image_cli_main("apply", paths[0], *steps, "-o", str(tmp_path / "out")) == 0
        assert Image.open(tmp_path / "out", verify=True) == Image.open(paths[-1])


def image_cli_main(*words):
    return main(["image", *words])


ODD = "a\nb\x1b[31m\r$x$.image"


@pytest.fixture
def odd(there):
    """A file with control characters in its name, and characters that matplotlib would parse as TeX."""
    os.link("old.image", ODD)
    return there


@requires("odd_names")
@pytest.mark.parametrize("words", [("info", ODD), ("verify", ODD), ("diff", ODD, "new.image"),
                                   ("diff", "new.image", ODD), ("apply", ODD, "step.delta", "-o", "a\nc.image")])
def test_a_name_with_control_characters_is_printed_in_one_line(odd, words):
    plain = said(*(re.sub("[^a-z.]", "", word.replace(ODD, "old.image")) if "\n" in word else word for word in words))
    text = said(*words)
    assert text.count("\n") == plain.count("\n")
    assert all(line.isprintable() for line in text.splitlines())
    assert "\r" not in text
    assert "a\\n" in text


@pytest.mark.parametrize("words", [
    ("info", "no\nfile"), ("verify", "da\nmaged"), ("info", "da\nmaged"), ("diff", "no\nfile", "new.image"),
    ("apply", "old.image", "da\nmaged", "-o", "out"), ("apply", "old.image", "step.delta", "-o", "no\nfolder/out"),
    ("diff", "old.image", "new.image", "--picture", "no\nfolder/a.png")])
@requires("matplotlib", "odd_names")
def test_a_refused_name_with_control_characters_is_in_one_line(odd, words):
    (odd / "da\nmaged").write_bytes(b"no image")
    line = refusal(*words)
    assert line[:-1].isprintable()
    assert any(word.replace("\n", "\\n") in line for word in words if "\n" in word)
    with pytest.raises(FileFormatError) as damaged:
        Image.open(odd / "da\nmaged")
    assert str(damaged.value).isprintable()
    assert damaged.value.path == str(odd / "da\nmaged")


@requires("matplotlib", "odd_names")
def test_a_picture_is_written_atomically_for_any_name(odd, monkeypatch, capsys):
    (odd / "map.png").write_bytes(b"old")
    refused = OSError(28, os.strerror(28))

    def refuse(fd):
        raise refused

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        assert image_cli_main("diff", ODD, "new.image", "--picture", "map.png") == 1
    assert (odd / "map.png").read_bytes() == b"old"
    assert image_cli_main("diff", ODD, "new.image", "--picture", "map.png") == 0
    assert (odd / "map.png").read_bytes().startswith(b"\x89PNG")
    assert not [name for name in os.listdir(odd) if name.endswith(".tmp")]


@pytest.mark.parametrize("words", [("diff", "old.image", "new.image", "-o", ""),
                                   ("apply", "old.image", "step.delta", "-o", ""),
                                   ("diff", "old.image", "new.image", "--picture", "")])
def test_a_file_to_write_with_no_name_is_refused(there, words):
    before = sorted(os.listdir(there))
    assert "must be the name of a file, got ''" in refusal(*words, code=2)
    assert sorted(os.listdir(there)) == before
