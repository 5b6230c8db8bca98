# Each command makes .venv on its first run, with the versions of constraints.txt, and is quick from then on.
# On a machine where pip would fetch torch's CUDA build, point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheels first.

PYTHON ?= python3
VENV ?= .venv
PIP ?= $(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt
BIN = $(VENV)/bin

.PHONY: app browser demo test test-slow test-gpu lint clean

demo: $(VENV)/.run
	$(BIN)/jdm demo

# A page on which a drawing becomes pictures; it is opened in this machine's browser.
app: $(VENV)/.app
	$(BIN)/jdm app --open

# Chromium for the tests of that page, where there is none.
browser: $(VENV)/.dev
	command -v chromium || $(BIN)/playwright install --with-deps chromium

# A process for each core, each with whole files: what a file's tests share is made once.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf $(VENV) build dist

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e .
	touch $@

$(VENV)/.app: $(VENV)/.run
	$(PIP) -e '.[app]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e '.[dev]'
	touch $@
