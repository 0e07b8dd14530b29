"""linmem's microbenchmarks: ratios from interleaved runs in one process."""
