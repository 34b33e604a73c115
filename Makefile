# Two commands do everything on a fresh machine with Python >= 3.11 and a C++ compiler:
#   make demo    install, then compare the norms on real handwritten digits
#   make test    install, then run the tests
# Each target works alone from a fresh clone and does nothing twice.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
NATIVE_SOURCES := CMakeLists.txt $(wildcard csrc/*)

.PHONY: install demo test lint format docs clean

install: $(INSTALLED)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "layernorm needs Python >= 3.11; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

# PyTorch first and pinned: the compiled kernels are built against its headers.
$(INSTALLED): .venv/bin/python pyproject.toml $(NATIVE_SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@$(BIN)/layernorm info | grep '^compiled'
	@touch $@

demo: install
	$(BIN)/layernorm compare digits

test: install
	$(BIN)/python -m pytest -n auto

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv build site
