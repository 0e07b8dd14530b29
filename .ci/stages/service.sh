# examples/plugin_service.py: a web service in prefork workers, with a real HTTP client, and hostile plugins beside good
# ones.
venv_over_base "$PWD/venv"
venv/bin/pip install -q starlette uvicorn httpx
suite "$base/src" "$PWD/venv/bin/pytest" -s tests/test_plugin_service.py
if grep -E '[0-9]+ skipped' <<<"$passed"; then exit 1; fi
figures "$(grep -a 'service: [0-9]* good' log | sed 's/.*service: //')"
