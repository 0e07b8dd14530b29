# ruff and cython-lint report no error.
new_venv venv
venv/bin/pip install -q ruff cython-lint
PATH=$PWD/venv/bin:$PATH        # cython-lint looks for pycodestyle there
copy_source src
cd src
../venv/bin/ruff check .
../venv/bin/cython-lint linmem bench
figures "$(../venv/bin/ruff --version), cython-lint"
