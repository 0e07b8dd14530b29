# CPython without a GIL. The stage leaves out the files that test texts, formats, pure functions, the command line,
# the packaging or the suite itself: they use one thread, and no code that differs without a GIL.
python=${LINMEM_FTPYTHON:-}
if [[ -z $python && -x $repo/../shared/ftpython ]]; then
    python=$(FTPYTHON_DIR=$cache/ftpython "$repo/../shared/ftpython")
fi
[[ -n $python ]] || python=$(type -P python3.14t python3.13t | head -1) || true
[[ -n $python ]] || not_run "no free-threaded CPython; LINMEM_FTPYTHON names one"
copy_source src
new_venv venv "$python"
install_test_packages venv/bin/python venv/bin/pip
CFLAGS=$quick venv/bin/pip install -q --no-deps ./src
# An extension that does not declare itself safe would switch the GIL on, except with -X gil=0.
venv/bin/python -W error -c 'import sys, linmem, linmem._os.pages, linmem._core.bridge
assert not sys._is_gil_enabled(), "an extension of linmem switched the GIL on"'
all_but bench cli image_cli image_files saving hoist prepare package house cimport readme demo_program layout reset_policy run_cache run_components run_report suite tutorials newcomer
PYTHON_GIL=0 suite src ../venv/bin/python -X gil=0 "$stages/free-threaded_pytest.py" "${fast[@]}" "${chosen[@]}"
figures "$(basename "$python") without a GIL: $passed${missing[*]:+; not available: ${missing[*]}}"
