# libFuzzer, with AddressSanitizer and UndefinedBehaviorSanitizer. With LINMEM_FUZZ_SEED=0, libFuzzer chooses a random
# seed in each run.
# The harnesses, each with the seconds that it runs. Each harness also runs the inputs of its corpus.
harnesses="calls 20 files 10 modules 10 arithmetic 8 snapshots 8 deltas 6 cache 5"
linker=${CC:-gcc}
from_apt clang clang
venv_over_base "$PWD/venv"
venv/bin/pip install -q --only-binary :all: 'atheris>=3' || not_run "no wheel of atheris for $(venv/bin/python -V)"
# Cython's code adds 0 to a null pointer when a constructor is called without arguments, and clang reports that.
printf '[pointer-overflow]\nfun:__pyx_pw_*__cinit__\n' >ignored
# Atheris' own library is the runtime, so nothing is linked by clang. gcc does not know the sanitizer flags in CC.
build_over_base CFLAGS='-O1 -g' LDSHARED="$linker -shared" CC="clang -fsanitize=address,undefined,fuzzer-no-link \
    -fno-sanitize-recover=undefined -fno-omit-frame-pointer -fsanitize-ignorelist=$PWD/ignored"
runtime=$(venv/bin/python -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so
export ASAN_OPTIONS=detect_leaks=0:allow_user_segv_handler=1:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc
[[ -w /dev/shm ]] && export TMPDIR=/dev/shm         # the harness of files would wait for the disk
mkdir found
runs=0 all=
while read -r harness seconds; do
    mkdir "found/$harness"
    # An exit status of libFuzzer may be equal to the status of "NOT RUN", so 1 replaces it.
    LD_PRELOAD=$runtime venv/bin/python src/tests/fuzz/run.py --harness="$harness" "found/$harness" \
        "src/tests/fuzz/corpus/$harness" -max_total_time=$((deep ? seconds * 10 : seconds)) -max_len=600 \
        -len_control=10 -timeout=60 -rss_limit_mb=4096 -print_final_stats=1 -seed="${LINMEM_FUZZ_SEED:-1}" \
        -artifact_prefix="$PWD/found/finding-$harness-" 2>&1 |
        grep -av -e '#[0-9]*.\(NEW\|REDUCE\|pulse\)' -e '# Uses:' || exit 1
    last=$(grep -aE '^#[0-9]+.DONE' log | tail -1)
    runs=$((runs + $(sed 's/^#\([0-9]*\).*/\1/' <<<"$last")))
    all+="; $harness $(sed 's/.*cov: \([0-9]*\).*corp: \([0-9]*\).*/\1 edges by \2 entries/' <<<"$last")"
done < <(xargs -n 2 <<<"$harnesses")
figures "$runs executions, no finding: ${all#; }"
