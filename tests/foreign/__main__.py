"""``python tests/foreign FOLDER``: works from a clone, and needs only that linmem and wasmtime are installed."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])      # so that this folder is the package `foreign`

from foreign.guests import KINDS, Guest, Instance  # noqa: E402
from foreign.memory_use import memory_use  # noqa: E402
from linmem.wasmtime import Snapshot  # noqa: E402

MANY = 100      # instances that are alive at the same time
TIMED = 5       # pairs of instances whose times are compared


def answers(make: Callable[[], Instance]) -> dict[str, list[str]]:
    """The answers of one instance to all requests, and those of instances that get one request each."""
    one = make()
    return {"one instance": [one.answer(request) for request in one.requests],
            "an instance each": [make().answer(request) for request in one.requests]}


def save(guest: Guest) -> None:
    """Save a snapshot of an initialised instance, and what initialised instances answer."""
    original = guest.kind(guest)
    snapshot = Snapshot.take(original.store, original.wasm)
    assert not snapshot.unseen, snapshot.unseen
    snapshot.save(guest.file("snapshot"))
    expected = answers(lambda: guest.kind(guest))
    assert [original.answer(request) for request in original.requests] == expected["one instance"]
    guest.file("json").write_text(json.dumps({"answers": expected, "remembered": original.remembered}))


def start(guest: Guest) -> None:
    """Check what instances answer that start from the snapshot, and how much memory they take."""
    snapshot = Snapshot.open(guest.file("snapshot"))
    saved = json.loads(guest.file("json").read_text())

    def make() -> Instance:
        return guest.kind(guest, snapshot, saved["remembered"])

    # Before other instances are made: a pool makes memories from earlier ones, and keeps some of their own pages.
    many = [make() for _ in range(MANY)]
    assert memory_use(many, "Anonymous") == [0], "instances have pages of their own before they write"
    for instance in many:
        instance.answer(instance.requests[0])
    total, written = memory_use(many, "Pss", "Anonymous")
    (image,) = snapshot.memories.values()
    share = total / (image.info().stored + written)
    assert share <= 1.1, f"{MANY} instances take {share:.2f} x one snapshot and what they wrote"
    del many, instance

    started = answers(make)
    for way, expected in saved["answers"].items():
        assert started[way] == expected, f"{way}: {started[way]} != {expected}"
    again = make()
    for _ in range(2):
        assert [again.answer(request) for request in again.requests] == started["one instance"]
        snapshot.restore(again.store, again.wasm, zero_grown=True)

    pairs = [(guest.kind(guest).seconds, make().seconds) for _ in range(TIMED)]
    initialised, from_snapshot = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"{guest.kind.module}: the same answers; {initialised:.1f} ms to initialise, {from_snapshot:.2f} ms to start;"
          f" {MANY} instances take {share:.2f} x one snapshot and what they wrote", flush=True)


STEPS = {"save": save, "start": start}


def main(folder: str, step: str = "", name: str = "") -> None:
    if step:
        STEPS[step](Guest(KINDS[name], Path(folder)))
        return
    for name in KINDS:
        for step in STEPS:      # a process for each
            subprocess.run([sys.executable, Path(__file__).parent, folder, step, name], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
