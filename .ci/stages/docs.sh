# The pages of docs/, where a warning of Sphinx is an error.
use_base
cd "$base/src"
"$base/venv/bin/sphinx-build" -W --keep-going -b html docs "$work/docs/html"
figures "$(find "$work/docs/html" -name '*.html' | wc -l) pages"
