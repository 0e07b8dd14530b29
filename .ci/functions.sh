# The functions of the stages. .ci/run starts each stage in a process and a folder of its own, and reads this file and
# then the stage's file in .ci/stages/. These variables are set: $stage is the name of the stage, $work/$stage its
# folder, $repo the checkout, $cache the cache, $stages the folder of this checkout with the programs of the stages,
# $deep 1 in a deep run and 0 in others.

if ((deep)); then fast=(); else fast=(-m 'not slow'); fi        # options of pytest: slow tests only in a deep run

# CFLAGS for stages that do not test the compiler's optimisations: the build takes less than half the time. Deep runs
# build as users do.
if ((deep)); then quick=; else quick=-O1; fi

# The text in brackets of the stage's last line.
figures() { printf '%s' "$*" >"$work/$stage/figures"; }

not_run() { figures "$*"; exit "$NOT_RUN"; }

# Sets `chosen`, the arguments of pytest that choose these test files: `only pool image`.
only() {
    chosen=()
    ((deep)) || chosen=("${@/#/tests/test_}") chosen=("${chosen[@]/%/.py}")
}

# Sets `chosen`, the arguments of pytest that leave these test files out: `all_but bench cli`.
all_but() {
    chosen=()
    ((deep)) || chosen=("${@/#/--ignore=tests/test_}") chosen=("${chosen[@]/%/.py}")
}

# Copies the files of the checkout, also files that git does not know yet, but no generated files.
copy_source() {
    mkdir -p "$1"
    if git -c safe.directory='*' -C "$repo" rev-parse --git-dir >/dev/null 2>&1; then
        (cd "$repo" && git -c safe.directory='*' ls-files -z --cached --others --exclude-standard |
            while IFS= read -r -d '' file; do [[ -e $file ]] && printf '%s\0' "$file"; done |
            tar -c --null --files-from=- -f -) | tar -x -C "$1" -f -
    else
        tar -c -C "$repo" --exclude=./.cache --exclude=./.venv --exclude=./build --exclude='*.so' -f - . | tar -x -C "$1" -f -
    fi
}

new_venv() { "${2:-python3}" -m venv "$1" && "$1/bin/python" -m pip install -q --upgrade pip; }

# Makes $base/venv (linmem with its test and docs extras), $base/wheel (with its wheel) and $base/src, once in a run. The
# first stage that needs them makes them, and other stages wait.
use_base() {
    base=$work/base
    local lock
    exec {lock}>"$work/base.lock"
    flock "$lock"
    if [[ ! -e $base/ready-$LINMEM_CI_RUN ]]; then
        rm -rf "$base"
        copy_source "$base/src"
        new_venv "$base/venv"
        "$base/venv/bin/pip" wheel -q --no-deps -w "$base/wheel" "$base/src"
        "$base/venv/bin/pip" install -q "$(echo "$base"/wheel/linmem-*.whl)[test,docs]"
        touch "$base/ready-$LINMEM_CI_RUN"
    fi
    exec {lock}>&-
}

# Makes a venv that finds the base's packages after its own.
venv_over_base() {
    use_base
    new_venv "$1"
    "$1/bin/pip" install -q pytest
    local site='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$base/venv/bin/python" -c "$site" >"$("$1/bin/python" -c "$site")/base.pth"
}

# Makes `venv` over the base, unless it is there, with linmem built from `src` with these variables: CFLAGS='-O1 -g'.
# They are arguments, because variables before the call would also apply to a build of the base.
build_over_base() {
    [[ -e venv ]] || venv_over_base "$PWD/venv"
    copy_source src
    venv/bin/pip install -q 'setuptools>=77' 'Cython>=3.1'
    env "$@" venv/bin/pip install -q --no-deps --no-build-isolation ./src
}

# Installs the packages of the extra `test` that have a wheel for this Python, of an older version if necessary:
# PYTHON PIP... The Python has tomllib, and reads `src`. Sets `missing` to the other packages. Their tests skip.
install_test_packages() {
    local requirement
    missing=()
    while IFS= read -r requirement; do
        "${@:2}" install -q --only-binary :all: "$requirement" || missing+=("$requirement")
    done < <("$1" -c 'import tomllib
for line in tomllib.load(open("src/pyproject.toml", "rb"))["project"]["optional-dependencies"]["test"]: print(line)')
}

# Installs a program that pip does not have: its name, and the name of its package. apt fails if another apt runs, so
# stages wait for each other.
from_apt() {
    type -P "$1" >/dev/null && return
    flock "$work/apt.lock" sh -c 'apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get \
        -o DPkg::Lock::Timeout=600 install -y -q --no-install-recommends "$1"' sh "$2" ||
        not_run "no $1, and apt cannot install it"
}

has_headers() {
    "$1" -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null
}

# Sets `versions` and `pythons` to the versions of CPython, of pyenv and in PATH, that can build extensions: [VERSION TO
# LEAVE OUT].
find_pythons() {
    local version candidate
    versions=() pythons=()
    for version in 3.10 3.11 3.12 3.13 3.14; do
        [[ $version == "${1:-}" ]] && continue
        for candidate in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python"$version" \
            $(type -aP "python$version"); do
            if has_headers "$candidate"; then
                versions+=("$version") pythons+=("$candidate")
                break
            fi
        done
    done
}

# Prints the command that a README shows under "<!-- ci: NAME -->".
readme_command() {
    awk -v mark="<!-- ci: $2 -->" '$0 == mark {found = 1; next} found && /^```$/ {exit} found && !/^```/ {print}' "$1" |
        grep . || { echo "$1 has no command marked $2" >&2; return 1; }
}

# Prints pytest's closing line in a log, without its frame: "9 passed, 1 skipped in 2.3s".
CLOSING='^=+ .*[0-9]+ passed.* =+$'
closing() { grep -aE "$CLOSING" "$1" | tail -1 | sed 's/^=* *//; s/ *=*$//'; }

# Runs pytest, or a command that ends with pytest, in a folder. Sets `passed` to pytest's closing line. Returns pytest's
# status, also where `set -e` has no effect: after `||`.
suite() {
    local status=0
    (cd "$1" && "${@:2}") || status=$?
    passed=$(closing "$work/$stage/log")
    return "$status"
}
