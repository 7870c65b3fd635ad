# make demo, make test: everything they need is set up in .venv first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: demo test test-all parity bench lint wheel clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/sparse-expansion demo

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest

test-all: .venv/ready
	$(BIN)/python -m pytest -m 'slow or not slow' --deselect tests/test_parity.py

parity: .venv/ready
	$(BIN)/python -m pytest tests/test_parity.py -m 'slow or not slow' -n 1

bench: .venv/ready
	$(BIN)/python -m pytest tests/benchmarks/bench_*.py -n 0

lint: .venv/ready
	$(BIN)/ruff check .

wheel: .venv/ready
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv build dist *.egg-info runs
