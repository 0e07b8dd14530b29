# ruff, cython-lint and zizmor (the workflows) report no error.
new_venv venv
venv/bin/pip install -q ruff cython-lint zizmor
PATH=$PWD/venv/bin:$PATH        # cython-lint looks for pycodestyle there
copy_source src
cd src
../venv/bin/ruff check .
../venv/bin/cython-lint linmem bench
../venv/bin/zizmor --offline --no-progress "$repo/.github/workflows"
figures "$(../venv/bin/ruff --version), cython-lint, $(../venv/bin/zizmor --version)"
