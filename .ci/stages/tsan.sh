# ThreadSanitizer, with the runtime of gcc. The first program runs threads in C that use the C API: they give no false
# report. The second program runs test files in which several threads use linmem, except those whose threads access the
# same bytes on purpose. Here .ci/tsan.supp silences the reports about code outside linmem.
gcc=${CC:-gcc}
tsan=$("$gcc" -print-file-name=libtsan.so)
[[ -e $tsan ]] || not_run "$gcc has no libtsan"
calm=(setarch "$(uname -m)" -R)     # ThreadSanitizer cannot start if addresses are more random than it expects
"${calm[@]}" true || calm=()
venv_over_base "$PWD/venv"
copy_source src
venv/bin/pip install -q 'setuptools>=77' 'Cython>=3.1'
# These flags come last, after the flags of setup.py. Without builtins ThreadSanitizer sees the accesses of memcpy.
printf '#!/bin/sh\nexec "%s" "$@" -fsanitize=thread -fno-builtin -fno-omit-frame-pointer -g1 -O1\n' "$gcc" >cc
chmod +x cc
export CC=$PWD/cc LDSHARED="$PWD/cc -shared"
(cd src && CFLAGS=-g1 ../venv/bin/python setup.py -q build_ext --inplace -j2)
mkdir hammer findings proof
cp src/tests/programs/hammer.pyx hammer
export PYTHONPATH=$PWD/src
(cd hammer && CFLAGS="-g1 -I$PWD/../src" ../venv/bin/python "$stages/tsan_hammer_setup.py" -q build_ext --inplace)
export PYTHONPATH=$PWD/src:$PWD/hammer:$stages
python=("${calm[@]}" env LD_PRELOAD="$tsan" "$PWD/venv/bin/python")
# The deadlock detector is off: it does not know linmem's own locks, and it limits how many locks a thread may hold.
# wasmtime handles its traps in a signal handler, which allocates.
options() {
    echo "exitcode=0:detect_deadlocks=0:report_signal_unsafe=0:history_size=4:log_path=$PWD/$1/tsan"\
":suppressions=$PWD/src/.ci/tsan.supp"
}
# The program contains a race on purpose. If ThreadSanitizer does not report this race, the stage fails.
TSAN_OPTIONS=$(options proof) "${python[@]}" -c 'import hammer; hammer.race()'
if [[ -z $(ls proof) ]]; then
    echo "ThreadSanitizer has not seen a race"
    exit 1
fi
TSAN_OPTIONS=$(options findings)
export TSAN_OPTIONS
trap 'cat findings/* || true' ERR
"${python[@]}" -c 'import tsan_narrow, hammer; hammer.main(4, 12)' | tee hammered
suite src "${python[@]}" -X faulthandler "$stages/tsan_pytest.py" -m 'not slow' \
    tests/test_{adaptors,callbacks,cause,memories,memory_lifetime,patch,places,pool_threads,prepare,routing}.py \
    tests/test_{saving,sessions,shared_budgets,snapshot,tenants,threads,tracemalloc,tracking,waits,wasmtime}.py
if [[ -n $(ls findings) ]]; then
    cat findings/*
    exit 1
fi
figures "$(cat hammered); tests: $passed; no finding"
