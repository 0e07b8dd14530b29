# The oldest wasmtime that linmem supports. The other stages use the newest.
venv_over_base "$PWD/venv"
venv/bin/pip install -q wasmtime==30.0.0
suite "$base/src" "$PWD/venv/bin/pytest" "${fast[@]}" \
    "$base"/src/tests/test_{wasmtime,pool_wasmtime,image_wasmtime,hoist,prepare,snapshot,guests}*.py \
    "$base"/src/tests/test_{start,sessions,recording,prewarm}*.py
figures "30.0.0: $passed"
