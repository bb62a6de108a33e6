# Two commands do everything on a fresh machine: `make demo` and `make test`. Both build .venv first (setup_env.py).
#   TORCH=torch make demo      another torch than the one these figures were made with, e.g. your CUDA build
# On Windows, which has no make: the same commands are in README.md.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-newest test-oldest lint format ready

demo: ready
	$(BIN)/python -m train.demo

test: lint
	$(BIN)/python -m pytest -q -n auto --durations=15

# The same tests with the newest release of every dependency, and with the oldest that the requirements allow.
test-newest test-oldest: test-%:
	$(PYTHON) setup_env.py --$*
	.venv-$*/bin/python -m pytest -q -n auto --durations=15

lint: ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ready:
	@$(PYTHON) setup_env.py
