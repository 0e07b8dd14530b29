"""``linmem image``, as processes that are started and read."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from support import requires, run_child

from linmem import Delta, Image
from linmem._cli import image as image_cli

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
    """old.image, new.image and step.delta from the one to the other: a page of each kind."""
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
    # By hand: what diff() says is in pages of the host's.
    Delta(old.digest, old.size, new.size, [(2 * PAGE, PAGE), (3 * GROUP, 2 * PAGE)], [(PAGE, PAGE)],
          new_bytes[2 * PAGE:3 * PAGE] + new_bytes[3 * GROUP:3 * GROUP + 2 * PAGE], new.digest).save("step.delta")
    return tmp_path


def test_info_says_what_files_hold(there):
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
def test_a_cell_of_the_map_shows_what_says_most_of_its_pages(pages, cells, per_cell):
    marks = bytearray(pages)
    marks[-1] = image_cli.CHANGED
    _, found, each = image_cli.grid(marks, 64, 1024)
    assert (len(found), each) == (cells, per_cell)
    assert found == bytes(cells - 1) + bytes([image_cli.CHANGED])


@requires("matplotlib")
def test_diff_draws_a_picture(there):
    from matplotlib import image

    said("diff", "old.image", "new.image", "--picture", "pages.png")
    pixels = image.imread("pages.png")
    colors = {tuple(int(255 * part + 0.5) for part in pixel[:3]) for row in pixels for pixel in row}
    for _, _, _, color, _ in image_cli.CLASSES:
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
def test_what_cannot_be_done_is_refused_in_one_line(there, words, expected):
    (there / "plain").write_text("just words")
    assert expected in refusal(*words)
    assert not (there / "x").exists()


@pytest.mark.parametrize("words", [
    [], ["fly"], ["info"], ["diff", "one"], ["apply", "one", "two"], ["diff", "--outp", "x"]])
def test_a_wrong_command_line_is_refused_in_one_line(words):
    assert "linmem image" in refusal(*words, code=2)


@pytest.mark.parametrize(("missing", "words"), [("rich", "--map"), ("matplotlib", "--picture=x.png")])
def test_what_is_not_installed_is_named_with_the_way_to_get_it(there, missing, words):
    done = run_child(f"""
        import sys
        sys.modules[{missing!r}] = None
        from linmem import cli
        sys.exit(cli.main(["image", "diff", "old.image", "new.image", {words!r}]))
        """, cwd=there)
    assert done.returncode == 1
    assert re.search(rf"needs {missing}: pip install 'linmem\[image\]'", done.stderr)
    assert done.stderr.count("\n") == 1


def test_the_help_tells_the_exit_codes():
    assert "Exit codes: 0" in said("--help")
