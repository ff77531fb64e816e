# Two commands for a fresh machine with Python 3.11, make and a package index:
#   make run    train the ring with the pair-wise gradient penalty; ends with a picture and a table
#   make test   style, types, the documentation in site/ and the whole test suite
PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
BIN := $(VENV)/bin
# all distributions here are built by flit: one installed for all takes a quarter less time than one fetched for each;
# bytecode is made of what is imported, when it is, and kept: a process that compiles torch anew starts in twice the time
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
unexport PYTHONDONTWRITEBYTECODE
MANIFESTS := requirements-dev.txt pyproject.toml $(wildcard plugins/*/pyproject.toml)

.PHONY: run test test-browser browser conformance check style docs format bench clean
.DEFAULT_GOAL := test

$(VENV)/installed: $(MANIFESTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip "$$(grep ^flit_core requirements-dev.txt)"
	$(PIP) --no-build-isolation --no-compile -r requirements-dev.txt
	touch $@

run: $(VENV)/installed
	$(BIN)/gankit run --plugin pairwise_gp

# each keeps one core busy
check:
	@$(MAKE) --no-print-directory --jobs=2 style docs

style: $(VENV)/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# one single-threaded process per core: two of them do more than one with two threads, and the slowest file sets the pace
test: check
	GANKIT_SITE=site OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# what the report's page does in Debian's Chromium, driven by selenium
test-browser: $(VENV)/installed browser
	$(PIP) "selenium>=4.20"
	GANKIT_BROWSER=1 $(BIN)/python -m pytest tests/browser

browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  [ "$$(id -u)" = 0 ] || { echo "as root: apt-get install -y chromium chromium-driver; then again: make test-browser"; exit 1; }; \
	  apt-get update -qq && apt-get install -y -qq chromium chromium-driver; }

# every plugin of this repository through all of `gankit check`
conformance: $(VENV)/installed
	$(BIN)/python tests/conformance.py --in-tree

format: $(VENV)/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/installed
	$(BIN)/python tests/benchmarks/loop.py

clean:
	rm -rf $(VENV) dist build site .pytest_cache .mypy_cache .ruff_cache .hypothesis
