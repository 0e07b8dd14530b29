# The other versions of CPython on this machine. The oldest and the newest run the whole suite. The versions between
# them run the files whose subject depends on the interpreter: its end, forks, threads and signals, reference counts,
# the buffer protocol, argument conversion, exceptions, imports and stubs, pickles, and extensions that are built on
# linmem.
between=(shutdown fork threads waits memory_lifetime memory_bytes arguments public_face failures house package cimport
         image wasmtime)
own=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
copy_source src
versions=() pythons=()
for version in 3.10 3.11 3.12 3.13 3.14; do
    [[ $version == "$own" ]] && continue        # the stage `test` runs on it
    for candidate in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python"$version" $(type -aP "python$version"); do
        if has_headers "$candidate"; then
            versions+=("$version") pythons+=("$candidate")
            break
        fi
    done
done
((${#versions[@]})) || not_run "no other CPython with headers, neither of pyenv nor in PATH"
all=
for i in "${!versions[@]}"; do
    version=${versions[i]}
    cp -r src "src-$version"
    new_venv "venv-$version" "${pythons[i]}"
    CFLAGS=$quick "venv-$version/bin/pip" install -q "./src-$version[test]"
    chosen=()
    ((i == 0 || i == ${#versions[@]} - 1)) || only "${between[@]}"
    suite "src-$version" "../venv-$version/bin/pytest" "${fast[@]}" "${chosen[@]}"
    all+="; $version: $passed"
done
figures "${all#; }"
