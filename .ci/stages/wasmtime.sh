# The oldest wasmtime that linmem supports, and the newest.
venv_over_base "$PWD/venv"
venv/bin/pip install -q wasmtime==30.0.0
all=
for venv in "$PWD/venv" "$base/venv"; do
    version=$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("wasmtime"))')
    suite "$base/src" "$venv/bin/pytest" \
        "$base"/src/tests/test_{wasmtime,pool_wasmtime,image_wasmtime,hoist,prepare,snapshot,guests}*.py
    all+="; $version: $passed"
done
figures "${all#; }"
