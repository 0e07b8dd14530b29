# Hosts with larger pages: 16 KiB as on Apple's processors, 64 KiB as on some ARM servers.
use_base
all=
for size in 16384 65536; do
    suite "$base/src" env LINMEM_PAGE_SIZE=$size ../venv/bin/pytest "${fast[@]}" \
        "$base"/src/tests/test_{memory,pool,image,leftovers,refusals}*.py
    all+="; $size: $passed"
done
figures "${all#; }"
