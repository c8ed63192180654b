#!/bin/bash
# All GPU tests and benchmarks in one go; the table comes last. Usage: benchmarks/gpu/run_all.sh [tests|kernels|ipc|nccl ...]
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD/src:$PWD/benchmarks/gpu:${PYTHONPATH:-}" PYTHONUNBUFFERED=1 OUT="${OUT:-$PWD/build}"
mkdir -p "$OUT"
parts=("$@"); [ ${#parts[@]} -eq 0 ] && parts=(tests kernels ipc nccl)
for part in "${parts[@]}"; do
    case $part in
        # The project's own pytest settings need plug-ins that a bare GPU machine may lack.
        tests) printf '[pytest]\nmarkers = gpu\naddopts = -p no:cacheprovider\n' >"$OUT/pytest.ini"
               timeout 210 python3 -m pytest -q --timeout 60 --maxfail=30 -c "$OUT/pytest.ini" --rootdir . --durations=8 ${TESTS:-tests/gpu} >"$OUT/tests.log" 2>&1
               tail -45 "$OUT/tests.log" | cut -c1-220 ;;
        kernels) timeout 150 python3 benchmarks/gpu/bench_kernels.py ${SWEEP:+--sweep} 2>&1 | tee "$OUT/kernels.log" | tail -70 ;;
        ipc|nccl) timeout 100 python3 "benchmarks/gpu/bench_$part.py" 2>&1 | tee "$OUT/$part.log" | tail -25 ;;
    esac
done
