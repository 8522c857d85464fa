# `make train`, `make test` and `make test-all` need nothing but Python 3.11 or newer and make: they set up .venv on the first call.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

# One process per core, each of which runs PyTorch on one thread; a process that runs out of tests takes some from
# another. Options in ARGS come last and win: ARGS="-n 0 --pdb" runs the tests in one process and stops in the debugger.
PYTEST := $(RUN) -m pytest -n auto --maxprocesses 8 --dist worksteal

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train test test-all lint clean

help: ## Print this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

train: $(VENV)/.installed-train ## Train an iMixer on handwritten digits; ARGS="DATA_DIR --epochs 12" passes options on.
	@$(RUN) examples/train_imixer.py $(ARGS)

test: $(VENV)/.installed-dev ## Run the tests except the long ones; ARGS="-k anderson" passes options on.
	@$(PYTEST) -m "not long" $(ARGS)

test-all: $(VENV)/.installed-dev ## Run all tests; ARGS="-k anderson" passes options on.
	@$(PYTEST) $(ARGS)

lint: $(VENV)/.installed-dev ## Check style, formatting and types.
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy

clean: ## Remove the environment, caches and builds; runs/ stays.
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment with the extra %, one of those in pyproject.toml. Each of the extras used here includes `train`.
$(VENV)/.installed-%: pyproject.toml
	@command -v $(PYTHON) > /dev/null || { echo "error: there is no $(PYTHON); install Python 3.11 or newer," \
		"or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is" \
		"needed, and $(PYTHON) is $$($(PYTHON) --version 2>&1); name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Installing into $(VENV). PyTorch is a download of up to several gigabytes: the first time takes minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	@touch $(VENV)/.installed-train $@
