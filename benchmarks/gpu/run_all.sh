#!/bin/bash
# GPU tests and benchmarks, each part with a limit of its own; a summary comes last, everything is in $OUT.
# Usage: benchmarks/gpu/run_all.sh PART...   without parts: all. Parts that need vLLM are left out where it is absent.
# All parts are run whatever became of the others; the exit status is 1 when one of them failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
. benchmarks/gpu/setup.sh
DEST=$OUT; export OUT="${TMPDIR:-/tmp}/gpu-out"; mkdir -p "$OUT"; rm -f "$OUT"/*.log
keep() { tar -czf "$DEST/logs.tgz" -C "$OUT" . 2>/dev/null; cp -f "$OUT"/*.jsonl "$OUT"/matrix.* "$DEST" 2>/dev/null; true; }
printf '[pytest]\nmarkers =\n  gpu\n  multigpu\n  alone\naddopts = -p no:cacheprovider\n' >"$OUT/pytest.ini"   # the project's own needs more plug-ins
parts=("$@"); [ ${#parts[@]} -eq 0 ] && parts=(tests kernels attention publish streams ipc host moved beside adapters nccl two-gpus matrix vllm-tests vllm-memory-tests vllm-two vllm stall fp8)
failed=(${SETUP_FAILED:+set-up})
has_vllm() { [ -d "$SITE/vllm" ] || python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("vllm") is None)'; }
run() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS; shift 2
    timeout -k 20 "$limit" "$@" >"$OUT/$name.log" 2>&1; local code=$?
    echo "== $name: exit $code after $((SECONDS - start)) s"
    [ "$code" -eq 0 ] || failed+=("$name")
    keep
}
beside() { python3 -c 'import xdist' 2>/dev/null && echo "-n $1"; }
tests() { run "$1" "$2" python3 -m pytest -v --timeout "${T:-110}" $(beside "$3") -c "$OUT/pytest.ini" --rootdir . --tb=short --durations=5 "${@:4}"; }
for part in "${parts[@]}"; do
    case $part in vllm*|stall|fp8) has_vllm || { echo "== $part: left out, there is no vLLM here"; continue; } ;; esac
    case $part in
        tests) tests tests "${LIMIT:-240}" "${JOBS:-12}" tests/gpu/test_gpu_{transports,nixl,host_memory,moved,beside,adapters,lora,vllm_wire,publish,streams,embedded,proven,digest,finite,swap,ranks,deltas}.py \
                   tests/engine/test_engine_cuda.py ${K:+-k "$K"} ;;
        kernels) run kernels 150 python3 benchmarks/gpu/bench_kernels.py ${SWEEP:+--sweep} ;;
        publish|streams|ipc|host|moved|beside|adapters|adapter_rounds|nccl|attention) run "$part" 150 python3 "benchmarks/gpu/bench_$part.py" ;;
        two-gpus) [ "$(python3 -c 'import torch; print(torch.cuda.device_count())')" -lt 2 ] && echo "== $part: left out, there is one GPU" ||
                      run "$part" 150 python3 benchmarks/gpu/bench_two_gpus.py ;;
        matrix) run matrix 150 python3 -m tests.trials.matrix --transports cuda_ipc,nccl --jobs 12 \
                    --budget "${BUDGET:-115}" --cell-timeout 60 --out "$OUT" ;;
        vllm-tests) T=150 tests vllm-tests "${LIMIT:-200}" "${JOBS:-6}" tests/gpu/test_gpu_vllm{,_drafts,_fp8}.py ${K:+-k "$K"} ;;
        vllm-memory-tests) # one at a time: they compare what is in use on the whole card
            T=290 tests vllm-memory-tests "${LIMIT:-500}" 1 tests/gpu/test_gpu_{vllm_{sleep,left},trl}.py ${K:+-k "$K"} ;;
        vllm-two) T=240 tests vllm-two "${LIMIT:-420}" 1 tests/gpu/test_gpu_two.py ${K:+-k "$K"} ;;
        vllm) for shape in ${SHAPES:-0.6B 8B MoE}; do   # a process each: what vLLM's ipc mapped is freed only with it
                  run "vllm-$shape" "${LIMIT:-200}" python3 benchmarks/gpu/bench_vllm.py "$shape"
              done ;;
        stall) run stall 200 python3 benchmarks/gpu/bench_stall.py ;;
        fp8) run fp8-publish 200 python3 benchmarks/gpu/bench_fp8.py publish
             run fp8-stall 200 python3 benchmarks/gpu/bench_fp8.py stall ;;
        *) echo "== $part: no such part"; failed+=("$part") ;;
    esac
done
for part in "${parts[@]}"; do
    [ "$part" != fp8 ] || cat "$OUT"/fp8-*.log >"$OUT/fp8.log" 2>/dev/null
    [ "$part" != vllm ] || cat "$OUT"/vllm-[^t]*.log >"$OUT/vllm.log" 2>/dev/null
    [ -f "$OUT/$part.log" ] || continue
    echo "---- $part"
    case $part in
        *tests|vllm-two) grep -E "^(FAILED|ERROR)|passed|failed|PASSED|FAILED|^E  |slowest|^[0-9.]+s (call|setup)" "$OUT/$part.log" | cut -c1-230 | tail -"${LINES_EACH:-40}" ;;
        *) grep -vE "^\(EngineCore|WARNING|^\[W" "$OUT/$part.log" | tail -"${LINES_EACH:-40}" | cut -c1-330 ;;
    esac
done
keep
[ ${#failed[@]} -eq 0 ] || { echo "FAILED: ${failed[*]}"; exit 1; }
