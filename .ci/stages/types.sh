# mypy, with the strict settings of pyproject.toml.
use_base
cd "$base/src"
"$base/venv/bin/mypy" --cache-dir "$cache/mypy" linmem | tee "$work/types/mypy.txt"
figures "$(tail -1 "$work/types/mypy.txt")"
