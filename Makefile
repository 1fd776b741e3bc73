# Two commands do everything on a fresh machine:
#   make demo    R1-Zero from nothing, on 2 ranks, in minutes
#   make test    all tests
# Both make .venv on their first run. PYTHON=python3.12 chooses another interpreter.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& { echo $$p; break; }; done)
# Where the demo writes. A finished demo is not repeated into the same folder: `make demo RUNS=runs/again`.
RUNS ?= runs/demo
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint format install clean

demo: install
	@$(BIN)/python tools/demo.py --runs $(RUNS)

test: install
	@$(BIN)/python -m pytest tests

lint: install
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

format: install
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

install: $(VENV)/.installed

# torch first and by itself: with it in place, nothing else pulls in another build of it.
$(VENV)/.installed: setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.13 found. Install one, or: make PYTHON=/path/to/python3"; exit 2; }
	@echo "making $(VENV) with $(PYTHON) ($$($(PYTHON) --version))"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
