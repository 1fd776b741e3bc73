# Two commands do everything on a fresh machine:
#   make demo    R1-Zero from nothing, on 2 ranks, in minutes
#   make test    all tests
# On a machine with an NVIDIA GPU:
#   make gpu-check   builds the CUDA operators, tests and measures them
# The first two make .venv on their first run. PYTHON=python3.12 chooses another interpreter.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.10 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& { echo $$p; break; }; done)
# Where the demo writes. A finished demo is not repeated into the same folder: `make demo RUNS=runs/again`.
RUNS ?= runs/demo
# Compiled by the installation.
SOURCES := $(shell find csrc -type f)
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slurm test-pipeline bench gpu-check lint format install clean

demo: install
	@$(BIN)/python tools/demo.py --runs $(RUNS)

test: install
	@$(BIN)/python -m tests.run

# sbatch on a real Slurm of three nodes on loopback: signals, requeues, a hang, lost nodes. Needs root, slurm-wlm and
# munge; without them it says so and passes.
test-slurm: install
	@$(BIN)/python -m pytest -rs tests/slurm/on_real_slurm.py

# Every node of the tiny pipeline in a few steps, killed in one of every stage: six minutes.
test-pipeline: install
	@$(BIN)/python -m pytest -q tests/e2e/whole_recipe.py

# The operators against their peers on this CPU. `make bench ARGS=--write` puts the table into BENCHMARKS.md.
bench: install
	@$(BIN)/python tools/bench_kernels.py $(ARGS)

# On a machine with an H100 or H200: builds, tests and measures the CUDA operators in under 10 minutes, then a slice of
# DeepSeek-V3 in at most 7 more (ARGS="--only slice" for that alone). It installs nothing, so that it also runs where
# there is no network, with the Python that has torch. ARGS as above.
gpu-check:
	@"$$(test -x $(BIN)/python && echo $(BIN)/python || command -v python3)" tools/gpu_check.py $(ARGS)

lint: install
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright
	@$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: install
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	@$(BIN)/clang-format -i $(SOURCES)

install: $(VENV)/.installed

# torch first and by itself: with it in place, nothing else pulls in another build of it.
$(VENV)/.installed: setup.py constraints.txt $(SOURCES)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.13 found. Install one, or: make PYTHON=/path/to/python3"; exit 2; }
	@echo "making $(VENV) with $(PYTHON) ($$($(PYTHON) --version))"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info
