# Pages of the docs that a newcomer follows word by word, in an empty root with a Python, and with wheels as pip would
# download them. The figures are the times to the first success of each page.
use_base
status=0
"$base/venv/bin/python" "$base/src/tests/newcomer" --wheel "$base"/wheel/linmem-*.whl || status=$?
said=$(grep -a '^newcomer: ' log | tail -1 | sed 's/^newcomer: \(ok\|NOT RUN\): //' || true)
((status == NOT_RUN)) && not_run "$said"
figures "$said"
exit "$status"
