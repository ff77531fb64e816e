# Two commands for a fresh machine with Python 3.11, make and a package index:
#   make run    train the ring with the pair-wise gradient penalty; ends with a picture and a table
#   make test   style, types and the whole test suite
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MANIFESTS := requirements-dev.txt pyproject.toml $(wildcard plugins/*/pyproject.toml)

.PHONY: run test check format bench clean
.DEFAULT_GOAL := test

$(VENV)/installed: $(MANIFESTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

run: $(VENV)/installed
	$(BIN)/gankit run --plugin pairwise_gp

check: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

format: $(VENV)/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/installed
	$(BIN)/python tests/benchmarks/loop.py

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
