# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install test quick lint types check clean
.DEFAULT_GOAL := help

help: ## Say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: pyproject.toml .ci/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("gradwatch needs Python 3.11 or newer") if sys.version_info < (3, 11) else None'
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "Installing gradwatch and its development tools into $(VENV) ..."
	@$(BIN)/pip install --quiet --editable '.[dev]' --constraint .ci/constraints.txt
	@touch $@

install: $(VENV)/.installed ## Create .venv and install everything into it

test: install ## Run every test
	$(BIN)/pytest

quick: install ## Run the tests that take under a minute together
	$(BIN)/pytest -m "not slow" -x -q

lint: install ## Check style and import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: install ## Check types
	$(BIN)/pyright

check: lint types test ## Everything that CI checks

clean: ## Remove what was installed and built
	rm -rf $(VENV) dist build
