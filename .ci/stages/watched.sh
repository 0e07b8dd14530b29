# The suite in a process with the fault report, tracking and tracemalloc on. The stage leaves out the files that test
# texts, formats, pure functions, the command line, the packaging or child processes.
use_base
all_but bench cli cimport demo_program hoist house image_cli layout limits package readme reset_policy run_cache run_components run_report saving shutdown soak start_processes suite tutorials newcomer wasmtime_processes
suite "$base/src" "$base/venv/bin/python" "$stages/watched_pytest.py" "${fast[@]}" "${chosen[@]}"
figures "fault report, tracking, tracemalloc: $passed"
