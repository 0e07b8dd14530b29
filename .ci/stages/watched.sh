# The suite in a process with the fault report, tracking and tracemalloc on. The stage leaves out the files that test
# texts, formats, pure functions, the packaging or child processes only.
use_base
all_but bench cli cimport demo_program hoist house image_cli layout package readme reset_policy saving suite
suite "$base/src" "$base/venv/bin/python" "$stages/watched_pytest.py" "${fast[@]}" "${chosen[@]}"
figures "fault report, tracking, tracemalloc: $passed"
