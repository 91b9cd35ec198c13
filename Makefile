# make demo    set up, then search the digits space: the first result, without GPU, hub or account
# make test    set up, then all checks and all tests
# make check   ruff and mypy          make fast   the tests that take no Ray, in two minutes
# make clean
# Tests run in two processes; PYTEST_PROCESSES says otherwise.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_PROCESSES ?= 2
PYTEST := $(BIN)/python -m pytest -n $(PYTEST_PROCESSES) --dist loadgroup
# Written last, so that a set-up that was broken off starts again, and one that is done is not repeated.
INSTALLED := $(VENV)/.installed

.PHONY: demo test check fast clean

demo: $(INSTALLED)
	$(BIN)/python run_search.py --space search_spaces/digits.yaml

test: check
	$(PYTEST)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fast: $(INSTALLED)
	$(PYTEST) -m "not ray and not slow"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info

$(INSTALLED): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
