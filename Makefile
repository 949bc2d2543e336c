# Everything starts here; `make help` lists the targets. Needs make and Python >= 3.11, fetches the rest into $(VENV).
#
#   make demo KEEP=1                     stays up and prints the addresses
#   make test PYTEST_ARGS='-k lease -x'  some of the tests
#   make PYTHON3=python3.13 VENV=/tmp/v  another interpreter, another place

PYTHON3 ?= python3
VENV    ?= .venv
PYTHON  := $(VENV)/bin/python

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := /bin/sh
ifndef SIDE_BY_SIDE
.NOTPARALLEL:
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

## The environment: a stamp in it says which layer is whole. No stamp: it was interrupted, and is built again.

ORIGIN      := $(VENV)/.origin
DEMO_STAMP  := $(VENV)/.layer-demo
DEV_STAMP   := $(VENV)/.layer-dev
# Scripts and the editable install hold absolute paths; a copied tree or another PYTHON3 gets a new environment.
ORIGIN_TEXT := $(CURDIR) $(abspath $(VENV)) $(PYTHON3)
SAY_ORIGIN   = echo '$(ORIGIN_TEXT)' >$(ORIGIN)
ORIGIN_IS   := $(shell test -x $(PYTHON) && cat $(ORIGIN) 2>/dev/null)
PYTHON_IS   := import sys; sys.exit(sys.version_info < (3, 11))
HAS_VENV    := import ensurepip, venv
PIP_INSTALL := $(PYTHON) -m pip install -qq --require-hashes --only-binary=:all:
# No network, no other package: the requirements are there already.
PIP_PROJECT := $(PYTHON) -m pip install -qq --no-index --no-deps --no-build-isolation --editable .

ifneq ($(ORIGIN_IS),$(ORIGIN_TEXT))
.PHONY: $(ORIGIN)
endif

$(ORIGIN):
	@$(PYTHON3) -c '$(PYTHON_IS)' 2>/dev/null || { \
	  echo "make: Python 3.11 or newer is needed, and '$(PYTHON3)' is not: install one, or say PYTHON3=/path/to/python3" >&2; \
	  exit 1; }
	@$(PYTHON3) -c '$(HAS_VENV)' 2>/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "apt-get install python3-venv"; \
	    $(call APT_INSTALL,python3-venv) || :; \
	  fi; }
	@$(PYTHON3) -c '$(HAS_VENV)' 2>/dev/null || { \
	  echo "make: '$(PYTHON3)' lacks its venv module: run 'apt-get install python3-venv' as root (or what your system calls it), then again" >&2; \
	  exit 1; }
	@if [ -e $(VENV) ] && [ ! -e $(VENV)/pyvenv.cfg ] && [ -n "$$(ls -A $(VENV))" ]; then \
	  echo "make: $(VENV) is no Python environment and is left alone: move it away, or say VENV=/another/place" >&2; exit 1; fi
	@echo "environment in $(VENV) ($$($(PYTHON3) -V))"
	@rm -rf $(VENV)
	@$(PYTHON3) -m venv $(VENV)
	@$(SAY_ORIGIN)

$(DEMO_STAMP): requirements/control-plane.txt pyproject.toml $(ORIGIN)
	@$(call FILL,requirements/control-plane.txt)
	@touch $@

# The dev layer holds the demo's.
$(DEV_STAMP): requirements/dev.txt pyproject.toml $(ORIGIN)
	@$(call FILL,requirements/dev.txt)
	@touch $(DEMO_STAMP) $@

# Without $(ORIGIN) while pip works: what pip leaves when it is interrupted would pass for installed.
FILL = echo 'installing $(1)' && rm -f $(ORIGIN) && $(PIP_INSTALL) -r $(1) && $(PIP_PROJECT) && $(SAY_ORIGIN)
# Quiet, unless it fails.
APT_INSTALL = { said=$$({ apt-get update && \
  DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $(1); } </dev/null 2>&1) || \
  { echo "$$said" >&2; false; }; }

## What a person calls

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name text; do \
	  printf '%-22s %s\n' "$$name" "$$text"; done

.PHONY: demo
demo: $(DEMO_STAMP) ## a control plane, an agent and the example tasks, live (KEEP=1 stays up; DEMO_ARGS=...)
	@$(PYTHON) examples/demo.py $(if $(KEEP),--keep) $(DEMO_ARGS)

# Debian keeps the server off the PATH. Its package would make and start a cluster, which nobody here asked for.
HAS_POSTGRES := command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1
POSTGRES_INSTALL = { mkdir -p /etc/postgresql-common && \
  { test -e /etc/postgresql-common/createcluster.conf || \
    echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf; } && \
  $(call APT_INSTALL,postgresql); }

.PHONY: postgres
postgres:
	@{ $(HAS_POSTGRES); } || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  echo "apt-get install postgresql" && $(POSTGRES_INSTALL); } || { \
	  echo "make: the tests need PostgreSQL: run 'apt-get install postgresql' as root, then again" >&2; \
	  exit 1; }

.PHONY: test
test: lint postgres ## the checks, then all tests: what CI runs (PYTEST_ARGS=...)
	@$(PYTHON) -m pytest --cov $(PYTEST_ARGS)

.PHONY: test-system
test-system: $(DEV_STAMP) ## what only a real systemd can prove, in the test bed (SYSTEM_ARGS=...)
	@$(PYTHON) -m tests.system $(SYSTEM_ARGS)

.PHONY: test-long
test-long: $(DEV_STAMP) postgres ## the tests that try more the longer they run, at full length (PYTEST_ARGS=...)
	@REMOTEGPU_LONG_TESTS=1 $(PYTHON) -m pytest tests/simulation tests/chaos tests/sidecar/test_abuse.py \
	  tests/sidecar/test_flood.py tests/control_plane/test_instances.py tests/end_to_end/test_api_contract.py \
	  tests/schemas/test_taskfile_fuzz.py tests/schemas/wire/test_wire_fuzz.py tests/agent/api/test_request_fuzz.py \
	  $(PYTEST_ARGS)

.PHONY: bench
bench: $(DEV_STAMP) ## the benchmarks (BENCH_ARGS=...)
	@command -v tsp >/dev/null || { [ "$$(id -u)" = 0 ] && $(call APT_INSTALL,task-spooler); } || { \
	  echo "make: the benchmarks compare with task-spooler: run 'apt-get install task-spooler' as root, then again" >&2; \
	  exit 1; }
	@PYTHONPATH=examples $(PYTHON) -m benchmarks $(BENCH_ARGS)

## The checks, side by side; each also alone, as `make lint-mypy`

CHECKS  := lint-mypy lint-pyright lint-ruff lint-imports lint-deptry

.PHONY: lint
lint: $(DEV_STAMP) ## format, style, types, who imports whom, dependencies
	@$(MAKE) --no-print-directory --keep-going --output-sync=target --jobs=$(shell nproc) SIDE_BY_SIDE=1 $(CHECKS)

.PHONY: $(CHECKS)
lint-ruff: $(DEV_STAMP)
	@$(PYTHON) -m ruff format --quiet --check --output-format concise . || { echo "ruff format: 'make format' mends it"; exit 1; }
	@$(PYTHON) -m ruff check --quiet --output-format concise .

lint-mypy: $(DEV_STAMP)
	@$(PYTHON) -m mypy --no-error-summary

lint-pyright: $(DEV_STAMP)
	@$(PYTHON) -m basedpyright --pythonpath $(PYTHON) --level error

lint-imports: $(DEV_STAMP)
	@$(VENV)/bin/lint-imports --no-cache --no-logo

lint-deptry: $(DEV_STAMP)
	@$(PYTHON) -m deptry agent queue sidecar schemas examples

.PHONY: format
format: $(DEV_STAMP) ## formats and mends what ruff can mend
	@$(PYTHON) -m ruff check --quiet --fix-only .
	@$(PYTHON) -m ruff format .

## Care

# Names, versions and hashes only: an index or download address would tie every clone to one place.
COMPILE = $(PYTHON) -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-strip-extras \
  --no-emit-index-url --no-emit-find-links --custom-compile-command 'make requirements' pyproject.toml

.PHONY: requirements
requirements: $(DEV_STAMP) ## renews requirements/*.txt to the newest versions that pyproject.toml admits
	@rm -rf .make && mkdir -p .make
	@$(COMPILE) --upgrade --extra control-plane --group dev -o .make/dev.txt
	@cp .make/dev.txt .make/control-plane.txt && $(COMPILE) --extra control-plane --group build -o .make/control-plane.txt
	@cp .make/dev.txt .make/runtime.txt && $(COMPILE) -o .make/runtime.txt
	@sed -i "s/ ; sys_platform == 'linux' / /" .make/*.txt
	@! grep -n '://' .make/*.txt || { echo "make: an address got into the requirements; they stay as they were" >&2; exit 1; }
	@for layer in .make/*.txt; do cmp -s $$layer requirements/$${layer##*/} || mv $$layer requirements/; done
	@rm -rf .make

.PHONY: clean
clean: ## removes the environment and every cache
	@if [ -e $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	@rm -rf .make .demo build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage*
	@rm -rf agent/*.egg-info queue/*.egg-info sidecar/*.egg-info schemas/*.egg-info *.egg-info
	@find agent queue sidecar schemas examples tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
