"""The command ``python tests/soak``."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import random
import signal
import sys
import warnings

from linmem._commands.parser import file_name
from linmem.bench import report
from soak.checks import wasmtime
from soak.creators import Maker
from soak.output import in_short, progress, show_tables
from soak.process import call_malloc
from soak.run import Soak


def main(arguments: list[str] | None = None, *, more: tuple[Maker, ...] = ()) -> int:
    """Run a soak, print the report, and write it to a file. `more` has creators in addition to the soak's own.

    Returns
    -------
    int
        0 for a run without a finding, 1 for a finding. A crash, or a hang of the main thread, ends the process at once.
    """
    parser = argparse.ArgumentParser("python tests/soak", description="Use all features of linmem at the same time, for"
                                     " minutes, and compare every byte with a model.")
    parser.add_argument("--minutes", type=float, default=1.0, metavar="N", help="the time of the run (default: 1)")
    parser.add_argument("--seed", type=int, metavar="N", help="the seed of the run; random by default")
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="the number of threads (default: 8)")
    parser.add_argument("--json", type=file_name, metavar="FILE", help="write all figures")
    parser.add_argument("--hang", type=float, default=120.0, metavar="SECONDS",
                        help="a step that takes longer is a hang (default: 120)")
    args = parser.parse_args(arguments)
    if not args.minutes > 0 or args.threads < 1 or not args.hang > 0:
        parser.error("--minutes, --threads and --hang must be above 0")
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    again = f"--seed {seed} --threads {args.threads} --minutes {args.minutes:g}"
    print(f"soak: {again}; {report.in_short(report.machine())}", file=sys.stderr, flush=True)

    if wasmtime is None:
        print("soak: without guests: wasmtime is not installed", file=sys.stderr)
    faulthandler.enable()
    if hasattr(signal, "SIGALRM"):      # SIGALRM ends children that hang; see ForkSteps.use_all
        faulthandler.register(signal.SIGALRM, chain=True)
    # Each arena of glibc's malloc reserves inaccessible address space, which looks like the address space of a memory.
    m_arena_max = -8
    call_malloc("mallopt", m_arena_max, 1)
    with warnings.catch_warnings():
        # Python warns that a fork may hang in a process with threads. The soak tests such forks.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        # An automatic collection could enter wasmtime in a child where that is not allowed. MemorySteps.collect
        # collects instead.
        collected = gc.isenabled()
        gc.disable()
        soak = Soak(minutes=args.minutes, seed=seed, threads=args.threads, hang=args.hang, more=more)
        try:
            with progress() as show:
                soak.run(show)
        finally:
            if collected:
                gc.enable()
    figures = soak.summary()
    if args.json:
        report.save_text(args.json, json.dumps(figures, indent=1) + "\n")
    if soak.failure:
        what, at_length = soak.failure
        print(f"\n{at_length}\nsoak: FAILED after {soak.took:.1f} s: {what}", file=sys.stderr)
        for worker in soak.workers:
            print(f"soak: {worker.name}: step {worker.steps}, doing {worker.doing}", file=sys.stderr)
        print(f"soak: again with: {again}", file=sys.stderr, flush=True)
        return 1
    show_tables(figures)
    print(f"\nsoak: ok: {in_short(figures)}")
    return 0
