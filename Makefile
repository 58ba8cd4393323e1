SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help fold test gpu-test lint format typecheck clean

# One PyTorch build for everybody: predictions are compared with stored structures, and other builds round differently.
TORCH ?= torch==2.13.0
# Interpreter that .venv is made from; by default the first of python3.13 ... python3 that will do.
PYTHON ?=
# make fold: input, output folder, further arguments of `pairformer-fast fold`.
IN ?= data/examples/trastuzumab.fasta
OUT ?= out/example
ARGS ?=
# make test, make gpu-test: further arguments of pytest.
TESTS ?=
# make test: processes that share the tests, each with one thread; 0 is none, for a debugger.
JOBS ?= 2

BIN := .venv/bin
# Python compiles what is imported; pip would compile all that is installed.
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --no-compile '$(TORCH)' --editable
CODE := pairformer_fast kernels configs data scripts tests

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo 'Variables: IN= OUT= ARGS= (fold), TESTS= (test, gpu-test), JOBS= (test), PYTHON= TORCH= (environment)'

fold: .venv/.installed ## Install, then fold the bundled antibody (IN=, OUT=, ARGS=)
	$(BIN)/pairformer-fast fold "$(IN)" "$(OUT)" $(ARGS)

test: lint typecheck ## Formatting, lint, types and all tests that need no GPU (TESTS=)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not gpu' $(TESTS)

gpu-test: .venv/.installed-dev ## The tests that need a CUDA GPU (TESTS=)
	$(INSTALL) '.[gpu]' --quiet
	$(BIN)/python -m pytest -m gpu $(TESTS)

lint: .venv/.installed-dev ## Check formatting and style
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)

format: .venv/.installed-dev ## Reformat and fix what can be fixed
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

# mypy does not follow setup.cfg's package_dir, so it is shown the layout of an installation.
typecheck: .venv/.installed-dev ## Check types
	rm -rf build/typecheck
	mkdir -p build/typecheck
	cp -R pairformer_fast build/typecheck/
	cp -R kernels configs data build/typecheck/pairformer_fast/
	$(BIN)/mypy build/typecheck/pairformer_fast

clean: ## Remove the environment and everything that was built
	rm -rf .venv build dist out .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info

.venv/.created:
	rm -rf .venv
	@usable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	for python in $(if $(PYTHON),"$(PYTHON)",python3.13 python3.12 python3.11 python3); do \
	  if "$$python" -c "$$usable" >/dev/null 2>&1; then \
	    echo "Creating .venv with $$("$$python" --version)"; \
	    "$$python" -m venv .venv; touch $@; exit 0; \
	  fi; \
	done; \
	echo 'error: $(if $(PYTHON),PYTHON=$(PYTHON) is not,found no) Python 3.11 or newer with its venv module.' >&2; \
	echo 'Install one (Debian, Ubuntu: apt install python3 python3-venv; Fedora: dnf install python3)' >&2; \
	echo 'or name one: make PYTHON=/path/to/python3' >&2; \
	exit 1

.venv/.installed: .venv/.created setup.cfg pyproject.toml Makefile
	$(INSTALL) .
	touch $@

.venv/.installed-dev: .venv/.created setup.cfg pyproject.toml Makefile
	$(INSTALL) '.[dev,openfold,plot,relax]'
	touch .venv/.installed $@
