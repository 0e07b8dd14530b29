# AddressSanitizer, UndefinedBehaviorSanitizer and LeakSanitizer, with the assertions of a checked build.
gcc=${CC:-gcc}
asan=$("$gcc" -print-file-name=libasan.so)
[[ -e $asan ]] || not_run "$gcc has no libasan"
flags='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g -O1 -DLINMEM_CHECKED'
build_over_base CFLAGS="$flags" LDFLAGS='-fsanitize=address,undefined'
mkdir findings
# Python and wasmtime handle SIGSEGV themselves. The sanitizer needs terabytes of address space and of data, so the
# tests that limit these are left out. Tests that fork while other threads run are left out, too: one of these threads
# may hold a lock of the sanitizer's malloc, and then malloc in the child waits for ever. All processes write their
# findings into one folder, because a finding of a child counts. The search for leaks at the end of a process takes long,
# so only the process of the suite does it.
options="handle_segv=0:handle_sigbus=0:allow_user_segv_handler=1:log_path=$PWD/findings/asan"
export UBSAN_OPTIONS="print_stacktrace=1:log_path=$PWD/findings/ubsan" LSAN_OPTIONS=exitcode=0
export CHILD_ASAN_OPTIONS="detect_leaks=0:$options"
shopt -s nullglob
tests=(src/tests/test_{memory,adaptors,failures,pool,image_memory,image_wasmtime,image_files,touched,mmap}*.py
       src/tests/test_{image,layout,arguments,stateful*,fuzz_corpus,mapping,shared,shared_budgets,words,file_memory}.py)
suite src env HYPOTHESIS_PROFILE=few PYTHONMALLOC=malloc LD_PRELOAD="$asan" ASAN_OPTIONS="detect_leaks=1:$options" \
    ../venv/bin/python "$stages/sanitizers_pytest.py" "${fast[@]}" \
    -k 'not address_space and not a_limit_on and not huge_size and not (fork and (thread or guest or during or while))' "${tests[@]#src/}"
# CPython itself does not free everything. A leak counts when an extension of linmem is on the stack of its allocation, but
# not the record of refusals of a creator that CPython did not free.
if cat findings/* /dev/null | awk -v RS= '
        /ERROR: AddressSanitizer|runtime error:|LeakSanitizer has encountered/ {n++}
        /Indirect leak of/ && /NativeCreator___cinit__/ {next}
        /irect leak of/ && /__pyx_|linmem_/ {n++} END {exit !n}'; then
    cat findings/*
    exit 1
fi
figures "address, undefined and leaks: $passed, no finding"
