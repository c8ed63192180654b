# To be sourced, from the repository's root. Where weightcast is installed nothing is to do. On a bare GPU machine without network:
#   WHEELS  a folder of wheels, installed into SITE (.whl)
#   KIT     a folder with an install.sh that puts vLLM into SITE, and a folder "stub" of modules that stand in for absent ones
#   SITE    where to install
# SETUP_FAILED is set when an installation failed: what needs it cannot be run then.
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTORCH_NVML_BASED_CUDA_CHECK=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}"
export NCCL_SOCKET_IFNAME=lo NCCL_RAS_ENABLE=0 TOKENIZERS_PARALLELISM=false
export OUT="${OUT:-$PWD/build}" SITE="${SITE:-${TMPDIR:-/tmp}/site}" KIT="${KIT:-${TMPDIR:-/tmp}/kit}" WHEELS="${WHEELS:-.whl}"
mkdir -p "$OUT" "$SITE"
if [ -f "$KIT/install.sh" ] && [ ! -d "$SITE/vllm" ]; then bash "$KIT/install.sh" >"$OUT/install.log" 2>&1 || { tail -5 "$OUT/install.log"; SETUP_FAILED=1; }; fi
if [ ! -f "$SITE/.wheels" ] && ls "$WHEELS"/*.whl >/dev/null 2>&1; then
    if python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl >"$OUT/wheels.log" 2>&1
    then touch "$SITE/.wheels"; else tail -3 "$OUT/wheels.log"; SETUP_FAILED=1; fi
fi
python3 benchmarks/gpu/metadata.py "$SITE"
export PYTHONPATH="$PWD/src:$PWD/tests/gpu:$PWD/benchmarks/gpu:$SITE:$KIT/stub"
