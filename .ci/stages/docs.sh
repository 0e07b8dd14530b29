# The pages of docs/, where a warning of Sphinx is an error. docs/linmem.1 is the manual page that the parser gives:
#   argparse-manpage --module linmem.cli --function whole_parser --prog linmem --project-name linmem \
#       --manual-section 1 --manual-title "linmem's commands" --output docs/linmem.1
use_base
cd "$base/src"
"$base/venv/bin/argparse-manpage" --module linmem.cli --function whole_parser --prog linmem --project-name linmem \
    --manual-section 1 --manual-title "linmem's commands" --output "$work/docs/linmem.1"
diff <(tail -n +2 docs/linmem.1) <(tail -n +2 "$work/docs/linmem.1")       # the first line has the day
"$base/venv/bin/sphinx-build" -W --keep-going -b html docs "$work/docs/html"
figures "$(find "$work/docs/html" -name '*.html' | wc -l) pages"
