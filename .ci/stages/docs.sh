# The pages of docs/, where a warning of Sphinx is an error, and each page in Chromium. docs/linmem.1 is the manual page
# that the parser gives:
#   argparse-manpage --module linmem.cli --function whole_parser --prog linmem --project-name linmem \
#       --description "linear memories for Python" --manual-section 1 --manual-title "linmem's commands" \
#       --output docs/linmem.1
use_base
cd "$base/src"
"$base/venv/bin/argparse-manpage" --module linmem.cli --function whole_parser --prog linmem --project-name linmem \
    --description "linear memories for Python" --manual-section 1 --manual-title "linmem's commands" \
    --output "$work/docs/linmem.1"
diff <(tail -n +2 docs/linmem.1) <(tail -n +2 "$work/docs/linmem.1")       # the first line has the day
"$base/venv/bin/sphinx-build" -W --keep-going -b html docs "$work/docs/html"
# The pictures of the pages stay in the folder shots for who wants to look.
from_apt chromium chromium
new_venv "$work/docs/venv"
"$work/docs/venv/bin/pip" install -q playwright
"$work/docs/venv/bin/python" "$stages/docs_pages.py" "$work/docs/html" "$work/docs/shots"
figures "$(tail -1 "$work/docs/log")"
