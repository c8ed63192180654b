# To be sourced on a bare GPU machine (Python 3.12, torch for CUDA): wheels in .whl, and vLLM's parts in /tmp/kit if they are there.
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTORCH_NVML_BASED_CUDA_CHECK=1
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}"
export NCCL_SOCKET_IFNAME=lo NCCL_RAS_ENABLE=0 TOKENIZERS_PARALLELISM=false
export OUT="${OUT:-$PWD/build}"; mkdir -p "$OUT" /tmp/site
if [ -f /tmp/kit/install.sh ] && [ ! -d /tmp/site/vllm ]; then bash /tmp/kit/install.sh >"$OUT/install.log" 2>&1 || tail -5 "$OUT/install.log"; fi
if [ ! -f /tmp/site/.wheels ] && ls .whl/*.whl >/dev/null 2>&1; then
    python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl 2>&1 | tail -3
    touch /tmp/site/.wheels
fi
python3 benchmarks/gpu/metadata.py /tmp/site
export PYTHONPATH="$PWD/src:$PWD/tests/gpu:$PWD/benchmarks/gpu:/tmp/site:/tmp/kit/stub"
