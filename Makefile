# make demo | test | lint | docs | format | coverage | bench | clean: each sets up .venv first, with all that it needs.

PYTHON ?= python3.11
PYTHON := $(shell command -v $(PYTHON) || command -v python3)
BIN := .venv/bin
# One thread a worker: two workers on two cores are faster than four threads that fight.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: demo test lint docs format coverage bench clean

.venv/installed: pyproject.toml constraints.txt setup.py $(wildcard audioflamingo/kernels/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir site

coverage: .venv/installed
	$(TEST_ENV) $(BIN)/coverage run -m pytest -q tests/unit tests/field
	$(BIN)/coverage report --skip-covered --show-missing

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed
	$(BIN)/python benchmarks/encoder.py --dtype float32
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/load.py

clean:
	rm -rf .venv .demo build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache audioflamingo/kernels/*.so
