# Cython and the C compiler give no warning, and Cython gives no performance hint.
copy_source src
new_venv venv
venv/bin/pip install -q 'setuptools>=77' 'Cython>=3.1'
cd src
LINMEM_STRICT=1 ../venv/bin/python setup.py build_ext --inplace 2>&1 | tee ../build.log
if grep -aiE 'performance hint|warning:' ../build.log; then
    echo "Cython or the compiler had something to say"
    exit 1
fi
figures "$(find linmem bench -name '*.so' | wc -l) extensions, no warning, no performance hint"
