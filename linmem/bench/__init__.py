"""In a checkout, `linmem.bench` is the folder `bench/`. A wheel has the files of `bench/` here, and not this one."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "bench")]
