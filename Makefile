# Two commands do everything on a fresh machine: `make demo` and `make test`. Both build .venv first.
#   TORCH=torch make demo      another torch than the one these figures were made with, e.g. your CUDA build
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format

demo: $(VENV)/.ready
	$(BIN)/python -m train.demo

test: lint
	$(BIN)/python -m pytest -q --durations=15

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch first and alone: what depends on it must find it installed, or pip picks a build of its own choice.
$(VENV)/.ready: requirements.txt requirements-dev.txt train/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet -r requirements.txt -r train/requirements.txt -r requirements-dev.txt
	touch $@
