# Every target sets up .venv by itself: Python 3.10 to 3.12 and make are all you need.
# Another Python: make PYTHON=/path/to/python3.12 demo. Only one kind of test: make test ARGS="-k report".

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
STAMP := $(VENV)/installed.stamp
# uv trusts the system's certificates, as pip does (the second name is that of older versions).
export UV_SYSTEM_CERTS := true
export UV_NATIVE_TLS := true
PYTHON ?=
ARGS ?=
QUICK ?= --quick
# Costly files come first (tests/hooks/costs.py), not those with many tests.
PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
COMPILE := uv pip compile pyproject.toml --extra all --universal --python-version 3.10 \
	--generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links

.PHONY: help demo test quick lint docs bench dist setup lock clean

help: ## List the targets
	@echo "make TARGET"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 10

demo: $(STAMP) ## Run the main job on the packaged backbones and write out/demo/index.html
	@$(PY) -m experiments.demo $(ARGS)

test: lint ## Run the whole gate: ruff, import layers, types, pytest (ARGS=--exhaustive tries every point)
	$(PY) -m pytest $(PARALLEL) $(ARGS)

quick: lint ## Run lint and the fast tests (every mark but `slow`), in about two minutes
	$(PY) -m pytest $(PARALLEL) -m "not slow" $(ARGS)

lint: $(STAMP) ## Run ruff, import-linter and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: $(STAMP) ## Build the guides and the API reference as one site, out/site/index.html
	@$(PY) docs/site.py

bench: $(STAMP) ## Run every benchmark, quickly (QUICK= in full)
	@set -e; for b in benchmarks/[!_]*.py; do \
		echo "== $$b"; $(PY) -m "benchmarks.$$(basename $$b .py)" $(QUICK) $(ARGS); \
	done

dist: $(STAMP) ## Build wheel and sdist; run the demo from the wheel alone, in an empty environment
	rm -rf build dist out/dist
	$(BIN)/uv build --quiet
	$(BIN)/uv venv --quiet --python $(PY) out/dist
	$(BIN)/uv pip install --quiet --python out/dist/bin/python --no-deps -r requirements.lock
	$(BIN)/uv pip install --quiet --python out/dist/bin/python --no-deps dist/*.whl
	cd out/dist && bin/python -m experiments.demo $(ARGS)

setup: $(STAMP) ## Only install

lock: $(STAMP) ## Resolve pyproject.toml again into requirements.lock
	@$(PY) -c 'import uv' 2>/dev/null || $(PY) -m pip install --quiet uv
	$(BIN)/$(COMPILE) --upgrade --output-file requirements.lock >/dev/null

clean: ## Remove what the other targets made: .venv, out, build, caches
	rm -rf $(VENV) out build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp goes first and comes back last: an install that was cut short is taken up again.
$(STAMP): requirements.lock pyproject.toml
	@rm -f $@; \
	if ! $(PY) -c '$(SUITABLE)' 2>/dev/null; then \
		found=; seen=; \
		for p in $(or $(PYTHON),python3.11 python3.12 python3.10 python3 python); do \
			if "$$p" -c '$(SUITABLE)' 2>/dev/null; then found=$$p; break; fi; \
			seen="$$seen $$("$$p" --version 2>/dev/null || true)"; \
		done; \
		if [ -z "$$found" ]; then \
			echo "error: no Python 3.10, 3.11 or 3.12 with venv and ensurepip found (found:$${seen:- none})." >&2; \
			echo "Install one (Debian, Ubuntu: apt install python3 python3-venv) or give it: make PYTHON=/path/to/python3.11 ..." >&2; \
			exit 1; \
		fi; \
		echo "creating $(VENV) with $$("$$found" --version)"; \
		"$$found" -m venv --clear $(VENV) || exit 1; \
	fi; \
	$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null || exit 1; \
	if $(PY) -m uv --version >/dev/null 2>&1 || $(PY) -m pip install --quiet --disable-pip-version-check uv; then \
		pip="$(PY) -m uv pip"; python="--python $(PY)"; \
	else \
		echo "uv cannot be had: installing with pip, which takes longer"; \
		pip="$(PY) -m pip"; python=; \
	fi; \
	echo "installing requirements.lock (several GB the first time)"; \
	$$pip install --quiet $$python --no-deps -r requirements.lock && \
	$$pip install --quiet $$python --no-deps --editable . && \
	touch $@
