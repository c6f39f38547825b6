# `make demo` and `make test` each work on a fresh machine: python3 with venv and pip is all they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint format clean

demo: $(VENV)/.installed-demo
	$(BIN)/air demo --config configs/demo.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A stamp is newer than pyproject.toml exactly when the environment has what it stands for: the demo needs less.
$(VENV)/.installed-demo: EXTRA := demo
$(VENV)/.installed: EXTRA := dev
$(VENV)/.installed $(VENV)/.installed-demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[$(EXTRA)]"
	touch $@

clean:
	rm -rf $(VENV) out demo-out
