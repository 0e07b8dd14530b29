# All features at the same time, against a model of every byte.
use_base
"$base/venv/bin/python" "$base/src/tests/soak" --minutes $((deep ? 20 : 1))
figures "$(grep -a '^soak: ok: .* [1-9][0-9,]* traps' log | sed 's/^soak: ok: //')"
