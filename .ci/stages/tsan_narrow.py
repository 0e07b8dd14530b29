"""Limits the address space to the space in use plus 1 TiB.

ThreadSanitizer ends the process when a mapping lies beyond the 1.5 TiB that it expects, and linmem reserves 256 GiB
for a memory where there is room.
"""

import resource

with open("/proc/self/statm") as statm:
    limit = int(statm.read().split()[0]) * resource.getpagesize() + (1 << 40)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
