# make demo, make test: each builds .venv first if it is not there. constraints.txt pins what this repository is tested with.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUDGET ?= 1e13
SEED ?= 0
DEMO_OUT ?= out/demo

.PHONY: setup test lint demo clean

setup: $(VENV)/.done

$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --no-build-isolation --constraint constraints.txt --editable ".[dev,data]"
	touch $@

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

demo: setup
	$(BIN)/python -m scaling.demo --budget $(BUDGET) --seed $(SEED) --out $(DEMO_OUT)

clean:
	rm -rf out .mypy_cache .ruff_cache .pytest_cache
