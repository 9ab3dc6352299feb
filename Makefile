# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := .ci/constraints.txt
# What the other parts stand on, and needs no service.
QUICK := tests/wire tests/health tests/reference_engine \
	$(addprefix tests/agent/test_, $(addsuffix .py, activations layers measure pacer right_values settings sync)) \
	$(addprefix tests/server/test_, $(addsuffix .py, findings ingest merge metrics queries resources))

.PHONY: help demo install test quick lint types check bench zoo missing clean
.DEFAULT_GOAL := help

help: ## Say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "gradwatch needs Python 3.11 or newer: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	@echo "Installing gradwatch into $(VENV) (PyTorch is large: a minute or more) ..."
	@$(BIN)/pip install --quiet --editable '.[all]' --constraint $(CONSTRAINTS)
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	@echo "Installing gradwatch and its development tools into $(VENV) (PyTorch is large: a minute or more) ..."
	@$(BIN)/pip install --quiet --editable '.[dev]' --constraint $(CONSTRAINTS)
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo ## Train six networks, print the verdicts, leave a dashboard to look at
	@$(BIN)/gradwatch demo --data .gradwatch/demo

install: $(VENV)/.dev ## Create .venv and install everything into it

test: install missing ## Run every test
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --durations 40

quick: install ## Run those that take a minute together: formats, detectors, the agent's numbers, storage
	$(BIN)/pytest -m "not slow" -k "not postgresql" -x -q -n auto --maxprocesses 8 --dist loadfile $(QUICK)

lint: install ## Check style and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install ## Check types
	$(BIN)/pyright

check: lint types test ## Everything that CI checks

bench: install ## Run every benchmark and print its figures
	$(BIN)/python benchmarks/all.py

zoo: install ## Train every labelled fault and healthy job, judge them, print the score
	$(BIN)/python -m tests.zoo

missing: # Tests start their own services where the binaries are; say what else could be tested.
	@sh .ci/missing

clean: ## Remove what was installed, built and recorded
	rm -rf $(VENV) .gradwatch dist build
