# The other versions of CPython on this machine. The oldest runs the suite without the files that start many programs.
# The newer ones run the files whose subject depends on the interpreter: its end, forks, threads and signals, reference
# counts, the buffer protocol, argument conversion, the command line, exceptions, frames, tracemalloc, imports and stubs,
# pickles, and extensions that are built on linmem. The stage `free-threaded` runs most of the suite on a new version.
depends=(shutdown fork threads waits memory_lifetime memory_bytes arguments public_face cli failures tracking tracemalloc
         house package cimport image arrays wasmtime)
own=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
copy_source src
find_pythons "$own"         # the stage `test` runs on it
((${#versions[@]})) || not_run "no other CPython with headers, neither of pyenv nor in PATH"
all=
for i in "${!versions[@]}"; do
    version=${versions[i]}
    cp -r src "src-$version"
    new_venv "venv-$version" "${pythons[i]}"
    CFLAGS=$quick "venv-$version/bin/pip" install -q "./src-$version[test]"
    if ((i == 0)); then
        all_but bench limits run_cache run_components soak suite
    else
        only "${depends[@]}"
    fi
    suite "src-$version" "../venv-$version/bin/pytest" "${fast[@]}" "${chosen[@]}"
    all+="; $version: $passed"
done
figures "${all#; }"
