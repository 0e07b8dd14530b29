# The suite and the demo on Windows' page calls, in Wine: .ci/windows.
rig=${LINMEM_WINRIG:-$repo/../shared/winrig.py}
[[ -e $rig ]] || not_run "no rig; LINMEM_WINRIG names one"
# The rig installs its compiler and Wine from apt, and apt fails if another apt runs.
flock "$work/apt.lock" python3 "$rig" --dir "$cache/winrig" setup
(cd "$repo" && LINMEM_WINRIG=$(readlink -f "$rig") LINMEM_CACHE=$cache bash .ci/windows)
figures "$(grep -a '^ci: windows: ok' log | tail -1 | sed 's/^ci: windows: ok (//; s/)$//')"
