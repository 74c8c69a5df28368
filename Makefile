# make demo · make test · make reproduce · make bench · make chaos · make audit · make lint · make venv
#
# PYTHON       any Python >= 3.11, used once to create .venv
# TORCH_INDEX  extra pip index with the PyTorch build you want (CPU or a CUDA version); empty: pip's own configuration decides

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
AUDIT := $(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off

.DEFAULT_GOAL := help
.PHONY: help venv demo test reproduce bench chaos audit lint

help:
	@echo "make demo       two robots, from data to a merged policy and its video, in minutes"
	@echo "make test       lint, types, audit (which only tells) and tests"
	@echo "make reproduce  every figure and table of the paper at the laptop profile (hours; resumes)"
	@echo "make bench      what a training step, an action, a merge cost here, next to the field's way and the floor"
	@echo "make chaos      a sweep, killed a hundred times, ends with the rows of one that nobody disturbed (hours)"
	@echo "make audit      known vulnerabilities of the pinned dependencies, as PyPI knows them (says which it could not look up)"
	@echo "make lint       ruff and mypy alone"
	@echo "make venv       the virtual environment alone (TORCH_INDEX=<pip index> for another PyTorch build)"

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make venv PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/mergedt demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	-$(AUDIT)
	$(BIN)/pytest

bench: $(READY)
	$(BIN)/python -m benchmarks

chaos: $(READY)
	$(BIN)/pytest tests/chaos --kills 100 --capture no

audit: $(READY)
	$(AUDIT)

reproduce: $(READY)
	$(BIN)/mergedt run all --profile laptop
	$(BIN)/mergedt report --profile laptop
