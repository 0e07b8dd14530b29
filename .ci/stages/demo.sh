# The README's command for the demo.
copy_source src
command=$(readme_command src/README.md demo)
(cd src && env -u PYTHONSAFEPATH bash -euo pipefail -c "$command")
figures "its own last word: $(tail -1 log)"
