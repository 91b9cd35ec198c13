# make demo    set up, then search the digits space: the first result, without GPU, hub or account
# make test    set up, then all checks and all tests
# make check   ruff and mypy          make fast   the tests that take no Ray, in two minutes
# make rehearse    the tests that take no Ray, with the oldest versions (requirements.oldest): 6 GB on disk
# make clean
# Tests run in two processes; PYTEST_PROCESSES says otherwise.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_PROCESSES ?= 2
PYTEST := python -m pytest -n $(PYTEST_PROCESSES)
# Written last, so that a set-up that was broken off starts again, and one that is done is not repeated.
INSTALLED := $(VENV)/.installed

# What machines with a GPU often have: Python 3.12, and not the newest packages.
OLDEST_PYTHON ?= $(shell python3.12 --version >/dev/null 2>&1 && echo python3.12 || echo $(PYTHON))
OLDEST := .venv-oldest

.PHONY: demo test check fast rehearse clean

demo: $(INSTALLED)
	$(BIN)/python run_search.py --space search_spaces/digits.yaml

test: check
	$(BIN)/$(PYTEST)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fast: $(INSTALLED)
	$(BIN)/$(PYTEST) -m "not ray and not slow"

rehearse: $(OLDEST)/.installed
	$(OLDEST)/bin/$(PYTEST) -m "not ray"

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache *.egg-info

$(INSTALLED): requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

$(OLDEST)/.installed: requirements.oldest requirements.lock
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	sed -n 's/^\([A-Za-z].*==\).*/^\1/p' requirements.oldest | grep -vif - requirements.lock > $(OLDEST)/newest.txt
	$(OLDEST)/bin/python -m pip install --quiet -r requirements.oldest -r $(OLDEST)/newest.txt
	$(OLDEST)/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(OLDEST)/bin/python -m pip check
	touch $@
