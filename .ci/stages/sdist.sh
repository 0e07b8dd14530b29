# An install from the sdist, without the sources beside it. The tests that run depend on how the package was installed;
# in addition, one test file for each part of the package runs.
copy_source src
new_venv builder
builder/bin/pip install -q build
builder/bin/python -m build --sdist --outdir dist src
mkdir unpacked
tar -x -C unpacked --strip-components=1 -f dist/linmem-*.tar.gz
generated=$(find unpacked/linmem unpacked/bench -name '*.pyx' | sed 's/pyx$/c/' | xargs ls 2>/dev/null || true)
if [[ -n $generated ]]; then
    echo "generated C in the sdist: $generated"
    exit 1
fi
new_venv venv
sdist=$(echo dist/linmem-*.tar.gz)
venv/bin/pip install -q "$sdist[test]"
# The sources are removed before the tests start, so the tests use the installed package.
rm -rf unpacked/linmem unpacked/bench unpacked/setup.py src
only package house cimport cli readme soak memory_bytes pool adaptors image image_files wasmtime hoist
suite unpacked ../venv/bin/pytest "${fast[@]}" "${chosen[@]}"
figures "$(basename "$sdist"): $passed"
