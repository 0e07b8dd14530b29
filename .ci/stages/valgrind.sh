# valgrind's memcheck: invalid accesses, uninitialized values, lost blocks.
from_apt valgrind valgrind
build_over_base CFLAGS='-g -O1'
checked=(valgrind --suppressions="$PWD/src/.ci/valgrind.supp" --error-exitcode=99 --num-callers=30 -q
         --leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=none
         --child-silent-after-fork=yes --log-file="$PWD/valgrind.%p"
         "$PWD/venv/bin/python" "$stages/valgrind_main.py")
export PYTHONMALLOC=malloc
trap 'cat valgrind.* || true' ERR
"${checked[@]}" src/tests/fuzz/replay.py --stay arithmetic deltas files snapshots calls
entries=$(awk '/entries, no finding$/ {n += $2} END {print n}' log)
# valgrind guards the stack of a thread with pages that look like the guard of a memory.
suite src "${checked[@]}" pytest -p no:cacheprovider "${fast[@]}" \
    -k 'not thread and not moves_under_readers and not is_moving' \
    tests/test_memory_lifetime.py tests/test_memory_bytes.py tests/test_adaptors.py
# CPython itself does not free everything. A lost block counts when an extension of linmem is on its stack.
sed 's/^==[0-9]*== \{0,1\}//' valgrind.* |
    awk -v RS= '/ definitely lost / && /__pyx_|linmem_/ {print; print ""; n++} END {exit n > 0}'
figures "no error, nothing lost: $passed; $entries entries of the fuzzers' corpus"
