# Every target sets up what it needs: `make quickstart` and `make test` work on a fresh machine.

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
SOURCES := longlora pipeline cluster tests examples $(wildcard benchmarks)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart search-demo test check soak bench schema lock

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## Install the locked dependencies and this project into .venv (once)

quickstart: setup  ## Extend a tiny Llama from 512 to 4096 tokens on real books, on this machine
	$(BIN)/python pipeline/main.py

search-demo: setup  ## Which group size, which rank? Nine short trainings on the quickstart's packs, then the best
	$(BIN)/python pipeline/main.py search --config configs/search-demo.yaml

test: setup  ## Run the tests of the default tier (others: pytest -m slow, pytest -m gpu)
	$(BIN)/python -m pytest

check: setup  ## Check format, lint and types
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

soak: setup  ## Disturb real runs: the slow tests, and three kinds of chaos; 100 minutes at most
	timeout 3000 $(BIN)/python -m pytest -m slow
	timeout 3000 $(BIN)/python benchmarks/chaos.py --disturbances 6

bench: setup  ## Attention, the loop, logging, Ray, checkpoints, recoveries, balance here: over an hour; fails where a goal is missed
	@status=0; for question in attention attention_forms loop checkpoint recovery logging_cost ray_overhead balance; do \
	    $(BIN)/python benchmarks/$$question.py || status=$$?; \
	done; exit $$status

schema: setup  ## Write configs/schema.json, which editors read, from the typed config
	$(BIN)/python -c "import json; from pipeline.config import json_schema; \
	    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))" > configs/schema.json

lock:  ## Resolve pyproject.toml into requirements.lock anew (needs uv; flash-attn is not in it: it needs a build)
	uv pip compile pyproject.toml --output-file requirements.lock --upgrade --quiet --universal \
	    --python-version 3.11 --generate-hashes --no-header --extra dev --extra s3 --extra gcs --extra postgres --extra gpu

$(BIN)/python:
	@if command -v uv >/dev/null; then \
	    uv venv --quiet --allow-existing --python '>=3.11' $(VENV); \
	else \
	    $(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit( \
	        f'Python {sys.version.split()[0]} is too old: install Python 3.11 or later, or uv')" && \
	    $(PYTHON) -m venv $(VENV) && \
	    { $(BIN)/python -m pip install --quiet uv || echo "uv cannot be installed; pip does it, more slowly"; }; \
	fi

# Hashes are checked. The build tool is in the lock too, so that building the project itself downloads nothing.
$(VENV)/.installed: requirements.lock pyproject.toml | $(BIN)/python
	@if command -v uv >/dev/null; then install="uv pip install --python $(BIN)/python"; \
	else install="$(BIN)/python -m pip install"; fi; \
	$$install --require-hashes -r requirements.lock && $$install --no-deps --no-build-isolation -e .
	@touch $@
