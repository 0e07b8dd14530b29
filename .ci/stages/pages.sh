# Hosts with larger pages: 64 KiB as on some ARM servers, where a host page is as large as a wasm page, and 16 KiB as on
# Apple's processors. With 16 KiB only those files run that test sizes and single pages.
use_base
all=
for size in 65536 16384; do
    chosen=("$base"/src/tests/test_{memory,pool,image,leftovers,refusals}*.py)
    ((deep || size == 65536)) || only memory_{growth,pages,bytes} pool image_memory leftovers
    suite "$base/src" env LINMEM_PAGE_SIZE=$size ../venv/bin/pytest "${fast[@]}" "${chosen[@]}"
    all+="; $size: $passed"
done
figures "${all#; }"
