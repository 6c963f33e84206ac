# Everything here sets itself up: the first target that needs .venv builds it. `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PYTEST_ARGS ?= -n auto

.DEFAULT_GOAL := help
.PHONY: help setup test fuzz robustness demo demo-real readers lint bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## build .venv from constraints.txt; then .venv/bin/ckpt works

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "The pinned set needs Python 3.11 or later. hint: make setup PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "hint: on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 1; }
	@echo "Installing the pinned set into $(VENV) (a few minutes the first time)"
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation --editable '.[train,dev]'
	@touch $@

test: $(READY) ## run the tests (PYTEST_ARGS="-k name" to choose)
	$(PYTEST) $(PYTEST_ARGS)

fuzz: $(READY) ## a million hostile inputs, every byte and bit of small checkpoints flipped (FUZZ_ARGS="--inputs 100000")
	$(INSTALL) atheris || echo "atheris cannot be installed here: the inputs come from the grammar alone"
	$(BIN)/python -m tests.hostile.fuzz $(FUZZ_ARGS)
	CKPT_HOSTILE=full $(PYTEST) tests/hostile/test_corruption.py --timeout 7200 $(PYTEST_ARGS)

demo: $(READY) ## convert, train on 2 processes, consolidate, verify and generate: under 2 minutes
	$(BIN)/python -m examples.demo

demo-real: $(READY) ## the same with trained weights (SmolLM2-135M as a Mixtral), read by transformers and vLLM
	$(INSTALL) gguf accelerate
	$(BIN)/python -m examples.demo_real

robustness: $(READY) ## every kill point, fault and power cut, 200 random kills (the tests play a part of them)
	$(PYTEST) tests/robustness --full $(PYTEST_ARGS) --timeout 1800

readers: $(READY) ## every family in transformers 4 and 5, vLLM and SGLang; rewrites the README's support table
	$(PYTEST) tests/readers --readers all --readers-json docs/readers.json
	$(BIN)/python scripts/support_table.py

lint: $(READY) ## ruff, mypy and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY) ## convert and consolidate against cp and installed peers, interleaved (needs about 35 GB of disk)
	$(BIN)/python benchmarks/checkpoints.py

clean: ## remove .venv, caches and outputs
	rm -rf $(VENV) build dist demo-out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
