# posix.pyx without the features that only Linux has, as a BSD or macOS would compile it. The tests that need Linux
# skip. The stage leaves out the files that test texts, formats, pure functions, the command line, the packaging or
# the suite itself, because their results do not depend on page calls.
build_over_base CFLAGS='-O1 -U__linux__'
(cd / && "$work/bsd/venv/bin/python" -c 'from linmem._os import pages
can = pages.describe()["capabilities"]
assert not any(can[name] for name in ("moves", "names", "discard_any_protection", "populates", "scans")), can')
all_but bench cli image_cli saving hoist prepare package house cimport readme demo_program dask layout reset_policy run_cache run_components run_report soak suite newcomer
LINMEM_TEST_WITHOUT=linux suite src ../venv/bin/pytest "${fast[@]}" "${chosen[@]}"
figures "without what Linux alone has: $passed"
