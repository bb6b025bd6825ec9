# `make demo` and `make test` create .venv and install the project on first use; repeating them installs nothing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help install demo test test-programs docs bench lint clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */  make \1\t/' | expand -t 24

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version); Python 3.11 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "==> creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt scripts/system_libs.sh | $(BIN)/python
	@bash scripts/system_libs.sh $(BIN)/python
	@echo "==> installing prophet-gym and its tools into $(VENV) (one to two minutes, about 2 GB; only the first time)"
	@$(PIP) -e ".[dev]"
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	@echo "==> installing the documentation tools into $(VENV)"
	@$(PIP) -e ".[docs]"
	@touch $@

install: $(INSTALLED)  ## create .venv and install the project with its tools

demo: $(INSTALLED)  ## reinforce a policy inside Prophet, measure it in the simulator: runs/demo/report.html
	@echo "==> a policy gets better inside Prophet and proves it in MuJoCo: results go to runs/demo"
	@$(BIN)/prophrl demo

test: $(INSTALLED)  ## the default test suite (CPU, offline, four to six minutes on two cores)
	@echo "==> running the tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-programs: $(INSTALLED)  ## the tests of whole programs: benchmarks, the demonstration, several processes (four minutes)
	@echo "==> running the tests of whole programs"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --timeout 600 -m "programs and not gpu and not network"

bench: $(INSTALLED)  ## rollout speed, cost against horizon, ratio to the naive pipeline
	@$(BIN)/python benchmarks/rollout.py

lint: $(INSTALLED)  ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_INSTALLED)  ## build the site into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove build outputs and caches (not .venv, not runs)
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache
	find prophet_gym prophrl_agents tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
