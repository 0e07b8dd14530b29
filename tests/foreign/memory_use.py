"""How many bytes the memories of instances take, according to the kernel."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import linmem.wasmtime

from .guests import Instance


def memory_use(instances: Sequence[Instance], *fields: str) -> list[int]:
    """The sums of these fields of /proc/self/smaps over the instances' memories.

    "Pss", the proportional set size, counts a page that n memories share as one n-th for each. "Anonymous" counts the
    pages that a memory has for itself, because something was written to them.
    """
    memories = [linmem.wasmtime.linear_memory(each.store, each.memory()) for each in instances]
    ranges = [(memory.as_ptr(), memory.as_ptr() + memory.byte_size()) for memory in memories]
    sums, inside = dict.fromkeys(fields, 0), False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        mapping = re.match("([0-9a-f]+)-[0-9a-f]+ ", line)
        if mapping:
            start = int(mapping[1], 16)
            inside = any(first <= start < last for first, last in ranges)
        elif inside and line.split(":")[0] in sums:
            sums[line.split(":")[0]] += int(line.split()[1]) * 1024
    return list(sums.values())
