# The whole workflow. `make` alone lists the targets; continuous integration calls the same ones.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-print-directory --no-builtin-rules

VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The first interpreter new enough; `make setup PYTHON=/path/to/python` takes that one instead.
PYTHON     ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$(name) -c '$(NEW_ENOUGH)' 2>/dev/null && echo $(name))))
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# Pins: uv only writes the lock files, so it is the one tool that is not in them.
UV_VERSION := 0.13.9

INSTALLED := $(VENV)/.installed
PROTOS    := $(sort $(wildcard proto/licet/v1/*.proto))
SEEDS     ?= 1000
CASES     ?= 100000
# Most of a test's time is waiting for real processes, so a few more than there are cores.
TEST_WORKERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fmt proto proto-check bench bench-ledger lock sim differential clean

help: ## show this list
	@echo "Licet: make <target>"
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "New here? make setup, then make demo. Before a commit: make fmt check test."
	@echo "One test: make test ARGS='tests/unit -k seat'.  Another Python: make clean setup PYTHON=python3.13."

setup: $(INSTALLED) ## create .venv with everything pinned (does nothing when it is up to date)
	@:

$(INSTALLED): requirements/dev.lock pyproject.toml
	@$(or $(PYTHON),false) -c '$(NEW_ENOUGH)' 2>/dev/null || { \
		echo "make setup: '$(or $(PYTHON),python3)' is not Python 3.11 or newer, which Licet needs." >&2; \
		echo "Install one, or name one: make setup PYTHON=/path/to/python3.13" >&2; exit 1; }
	@$(BIN)/python -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null || { \
		echo "setup: creating $(VENV) with $$($(PYTHON) --version)"; $(PYTHON) -m venv --clear $(VENV); }
	@echo "setup: installing requirements/dev.lock"
	@$(PIP) --require-hashes -r requirements/dev.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@
	@echo "setup: done"

demo: setup ## start the whole stack, replay a workload, compare answers with the ledger
	@$(BIN)/python examples/demo.py $(ARGS)

test: setup ## run the tests (ARGS='tests/unit -k seat' runs some)
	@$(BIN)/python -m pytest -q $(if $(ARGS),,-n $(TEST_WORKERS) --dist worksteal) $(ARGS)

check: setup ## lint, types, import rules, generated code, manifests
	@echo "check: format"
	@$(BIN)/ruff format --check --quiet . || { echo "make fmt does it." >&2; exit 1; }
	@echo "check: lint"
	@$(BIN)/ruff check --quiet .
	@echo "check: types"
	@$(BIN)/mypy --no-error-summary
	@echo "check: import rules"
	@$(BIN)/lint-imports --no-logo >$(VENV)/lint-imports.log 2>&1 || { cat $(VENV)/lint-imports.log; exit 1; }
	@echo "check: generated code"
	@$(MAKE) proto-check
	@echo "check: manifests and images"
	@$(BIN)/python deploy/check.py
	@echo "check: all good"

fmt: setup ## format, and fix what lint can fix
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --fix --quiet .

# $(call generate,folder) compiles the protos into folder/licet/v1: messages, services and their types.
generate = $(BIN)/python -m grpc_tools.protoc -I proto \
	--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	--python_out=$(1) --mypy_out=quiet:$(1) --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)

proto: setup ## regenerate licet/v1 from proto/
	@$(call generate,.)

proto-check: setup ## fail when licet/v1 is not what proto/ generates
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(call generate,"$$fresh") && \
	diff -r -U 2 -x __init__.py -x py.typed -x __pycache__ licet/v1 "$$fresh/licet/v1" \
		|| { echo "licet/v1 differs from what proto/ generates: run make proto." >&2; exit 1; }

bench: setup ## measure the cost of a check, beside a bare gRPC echo
	@$(BIN)/python -m bench $(ARGS)

bench-ledger: setup ## ask a ledger of 10 million events; takes some minutes and 5 GB in TMPDIR (ARGS='--events 1000000')
	@$(BIN)/python -m bench ledger --events 10000000 $(ARGS)

sim: setup ## run the seeded fault simulations longer (SEEDS=1000), or one history again (SEED=7)
	@LICET_SIM_SEEDS=$(SEEDS) LICET_SIM_SEED=$(SEED) $(BIN)/python -m pytest -q --timeout 7200 tests/fault \
		$(if $(SEED),-k 'seeds or overspent or approved or holders or billed',) $(ARGS)

differential: setup ## compare more decisions with the slow evaluator that reads documents itself (CASES=100000)
	@LICET_DIFFERENTIAL_CASES=$(CASES) $(BIN)/python -m pytest -q --timeout 7200 tests/unit/test_compiled_differential.py $(ARGS)

# Universal: one file serves Python 3.11 to 3.14, Linux and macOS. The one pre-release that is let in is asked for by
# name in pyproject.toml, as its project publishes nothing else.
compile = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --prerelease if-necessary-or-explicit $(UPGRADE)

lock: setup ## rewrite requirements/*.lock after pyproject.toml changed (UPGRADE=--upgrade takes newer releases)
	@$(PIP) uv==$(UV_VERSION)
	@$(compile) --group build -o requirements/build.lock
	@$(compile) pyproject.toml --extra sidecar -o requirements/sidecar.lock
	@$(compile) pyproject.toml --extra server -o requirements/server.lock
	@$(compile) pyproject.toml --extra dev --group test -o requirements/dev.lock
	@! grep -n '://' requirements/*.lock || { echo "make lock: a lock file names a host." >&2; exit 1; }
	@echo "lock: wrote requirements/*.lock; make setup installs them"

clean: ## remove .venv and everything that can be made again
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
