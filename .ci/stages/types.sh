# mypy, with the strict settings of pyproject.toml. pyright knows the type of every public name. Strict settings of both
# find no error of linmem's types in the examples of the README, the docs and examples/. Both find linmem where it is
# installed editable.
venv_over_base "$PWD/venv"
venv/bin/pip install -q 'pyright[nodejs]' starlette uvicorn httpx psutil memray
copy_source src
venv/bin/pip install -q 'setuptools>=77' 'Cython>=3.1'
CFLAGS=$quick venv/bin/pip install -q --no-deps --no-build-isolation -e ./src
PATH=$PWD/venv/bin:$PATH        # pyright looks for the packages of the first Python there
(cd src && python -m mypy --cache-dir "$cache/mypy" linmem) | tee mypy.txt
mkdir empty
(cd empty && pyright --verifytypes linmem --ignoreexternal) | tee pyright.txt
grep -q 'src/linmem/py.typed' pyright.txt
grep -q 'completeness score: 100%' pyright.txt
python "$stages/types_examples.py" src examples | tee examples.txt
figures "$(tail -1 mypy.txt); pyright: $(grep -o 'completeness.*' pyright.txt); $(tail -1 examples.txt)"
