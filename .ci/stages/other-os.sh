# Checks that Cython accepts windows.pyx with the declarations of pages.pxd, and that posix.pyx and the core compile for
# macOS and musl.
copy_source src
new_venv venv
venv/bin/pip install -q 'Cython>=3.1' ziglang
python=$PWD/venv/bin/python
include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
cd src
mkdir c
for name in windows posix; do
    "$python" -m cython -3 -X cdivision=True -Werror --module-name linmem._os.pages \
        "linmem/_os/$name.pyx" -o "c/$name.c"
done
for source in linmem/_core/*.pyx; do
    "$python" -m cython -3 -X cdivision=True "$source" -o "c/$(basename "$source" .pyx).c"
done
rm c/windows.c
# The stage does not link, so the headers of this machine's Python fit any 64-bit POSIX system.
for target in aarch64-macos x86_64-macos aarch64-linux-musl; do
    for source in c/*.c; do
        "$python" -m ziglang cc -target "$target" -O1 -fvisibility=hidden -Wall -Wno-unknown-warning-option \
            -I . -isystem "$include" -Werror=implicit-function-declaration -Werror=incompatible-pointer-types \
            -Werror=int-conversion -c "$source" -o "$source.$target.o"
    done
done
figures "windows.pyx cythonized; $(ls c/*.o | wc -l) objects for aarch64-macos, x86_64-macos and aarch64-linux-musl"
