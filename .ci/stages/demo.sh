# The README's commands for the demo: with pip, and with uv.
for way in demo uv; do
    copy_source "with-$way"
done
new_venv tools
tools/bin/pip install -q uv
for way in demo uv; do
    command=$(readme_command "with-$way/README.md" "$way")
    (cd "with-$way" && PATH=$PWD/../tools/bin:$PATH env -u PYTHONSAFEPATH bash -euo pipefail -c "$command")
done
figures "their own last word: $(tail -1 log)"
