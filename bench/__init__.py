"""The microbenchmarks of linmem, by suite. A wheel has these files as `linmem.bench`."""
