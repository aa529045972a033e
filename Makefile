# `make run` finishes a real study, `make test` runs the tests; both make .venv first and touch nothing outside the tree.
PYTHON ?= python3
SPACE ?= wide
TRIALS ?= 8

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help run test test-system test-long docs mutants bench lint format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /  make \1	/p' $(MAKEFILE_LIST) | expand -t 20

run: $(VENV)/installed  ## environment, then a study of 8 trials on CPU and SQLite (SPACE=, TRIALS=)
	$(BIN)/ris-hpo run --space $(SPACE) --n-trials $(TRIALS) --gpus none

# One thread in each of several processes: the tests are many small problems, where more threads only wait for each other.
# The tests of a file stay together, since they share what it trains or starts; folders in order, the long ones come first.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed-test  ## environment, then the tests
	$(PYTEST)

test-system: $(VENV)/installed-test  ## whole programs as users start them: clusters, servers, kernels, wheels, many workers
	$(PYTEST) -m "system and not slow"

test-long: $(VENV)/installed-test  ## every test, long forms included
	$(PYTEST) -m "" --hypothesis-profile long --timeout 7200

mutants: $(VENV)/installed-mutants  ## plant small faults and count those that the tests notice (hours; goes on where it stopped)
	$(BIN)/python -m benchmarks.mutants run
	$(BIN)/python -m benchmarks.mutants table

docs: $(VENV)/installed-docs  ## the documentation as a site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(VENV)/installed-test  ## the benchmark table, appended to benchmarks/LOG.md
	$(BIN)/python -m benchmarks

lint: $(VENV)/installed-test  ## ruff, mypy strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-test  ## ruff's formatter and its safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches; storage/ (studies, checkpoints) stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch first, from the constraint alone: a build that is at hand for exactly this version is then taken.
$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	$(PIP) torch
	$(PIP) -e '.[test]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-mutants: $(VENV)/installed-test
	$(PIP) -e '.[mutants]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(PIP) -e '.[docs]'
	@touch $@
