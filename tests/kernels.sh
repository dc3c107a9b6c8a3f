#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The tests that compare numbers under other kernels than those of this processor, as `make test-kernels` runs them:
#   bash tests/kernels.sh PYTHON [argument of pytest...]
# WORKERS=2 tests run at a time; SETTINGS="default shuffled" names fewer settings, LOGS=folder keeps their whole output.
set -u
python=${1:?"Name the Python of one line: bash tests/kernels.sh .venv/bin/python"}
shift
cd "$(dirname "$0")/.." || exit 1

# The order in which MKL adds on any processor, MKL and PyTorch without AVX512, PyTorch without any vectors, parts of
# sums in two threads, and every sum in an order of its own: tests/other_processor.
declare -A variables=(
    [default]="" [compatible]="MKL_CBWR=COMPATIBLE" [mkl-avx2]="MKL_ENABLE_INSTRUCTIONS=AVX2"
    [aten-avx2]="ATEN_CPU_CAPABILITY=avx2" [aten-default]="ATEN_CPU_CAPABILITY=default" [threads]="HFKDQ_TEST_THREADS=2"
    [shuffled]="HFKDQ_TEST_SUMS=1"
)
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
failed=0
table=$(printf "%-14s %-32s %-48s %s" setting variable result seconds)
for setting in ${SETTINGS:-default compatible mkl-avx2 aten-avx2 aten-default threads shuffled}; do
    echo "== $setting: ${variables[$setting]:-as it is}"
    start=$SECONDS
    env HFKDQ_TEST_CASES=all ${variables[$setting]} "$python" -m pytest -q -m "numbers and not slow and not gpu" -n "${WORKERS:-2}" --dist worksteal "$@" 2>&1 \
        | tee "$logs/$setting.log" | grep -aE "^(FAILED|ERROR) |^INTERNALERROR"
    status=${PIPESTATUS[0]}
    [ "$status" = 0 ] || failed=1
    result=$(tail -n 1 "$logs/$setting.log" | sed -E 's/^=+ //; s/ in [0-9.]+s.*$//')
    [ "$status" = 0 ] || result="$result (exit $status)"
    table+=$(printf "\n%-14s %-32s %-48s %s" "$setting" "${variables[$setting]:--}" "$result" $((SECONDS - start)))
done
echo
echo "$table"
[ -n "${LOGS:-}" ] || [ $failed = 1 ] || rm -r "$logs"
[ $failed = 0 ] || echo "The whole output lies in $logs."
exit $failed
