# make install | quickstart | test | lint | bench. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart test lint bench

install: .venv/.user

.venv/.user: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/.dev: .venv/.user requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

SEED ?= 0
OUT ?= runs/quickstart

quickstart: install
	$(BIN)/python experiments/quickstart.py --seed $(SEED) --out $(OUT)

# The order of tests/conftest.py is kept: slow files first, not those with the most tests.
test: .venv/.dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy

# PEERS and ENVIRONMENTS: folders of other systems' scripts and of what they run in (experiments/benchmarks/compare.py).
bench: install
	$(BIN)/python experiments/benchmarks/compare.py --works S V --rollouts F T1 T2 P1 V32k V152k G --cases U25 U50 U100 E \
		$(if $(PEERS),--peers $(PEERS)) $(if $(ENVIRONMENTS),--environments $(ENVIRONMENTS))
