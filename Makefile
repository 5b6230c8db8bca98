# Each command makes .venv on its first run, with the versions of constraints.txt, and is quick from then on.
# On a machine where pip would fetch torch's CUDA build, point PIP_EXTRA_INDEX_URL at PyTorch's CPU wheels first.

PYTHON ?= python3
VENV ?= .venv
PIP ?= $(VENV)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt
BIN = $(VENV)/bin

.PHONY: app browser demo test test-slow test-gpu test-versions lint docs dist sbom clean

demo: $(VENV)/.run
	$(BIN)/jdm demo

# A page on which a drawing becomes pictures; it is opened in this machine's browser.
MODELS ?= weights/emoji-strokes nano-canny
app: $(VENV)/.app
	$(BIN)/jdm app $(MODELS) --open

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

# The suite with the lowest versions that pyproject.toml allows on the oldest Python, and with the newest of everything on
# the newest; uv finds or fetches the Pythons. TESTS chooses tests: make test-versions TESTS=tests/cli
LOWEST_PYTHON ?= 3.11
NEWEST_PYTHON ?= 3.13
TESTS ?= tests

define suite_with
$(BIN)/uv venv --quiet --clear --python $(2) $(VENV)-$(1)
$(BIN)/uv pip install --quiet --python $(VENV)-$(1)/bin/python --resolution $(1) -e '.[dev,wandb]'
$(BIN)/uv pip list --quiet --python $(VENV)-$(1)/bin/python
$(VENV)-$(1)/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(TESTS)
endef

test-versions: $(VENV)/.release
	$(call suite_with,lowest-direct,$(LOWEST_PYTHON))
	$(call suite_with,highest,$(NEWEST_PYTHON))

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The documentation as a site in build/site; a link that leads nowhere is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# The source archive, and the wheel that is built from it.
dist: $(VENV)/.release
	$(BIN)/python -m build

# What `pip install jdm` installs at the versions of constraints.txt, with licences, in CycloneDX's JSON.
sbom: $(VENV)/.release
	$(PYTHON) -m venv --clear $(VENV)-sbom
	$(subst $(VENV)/,$(VENV)-sbom/,$(PIP)) .
	mkdir -p dist
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible --of JSON \
	  -o dist/sbom.json $(VENV)-sbom/bin/python

clean:
	rm -rf $(VENV) $(VENV)-lowest-direct $(VENV)-highest $(VENV)-sbom build dist

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

$(VENV)/.release: $(VENV)/.dev
	$(PIP) -e '.[release]'
	touch $@
