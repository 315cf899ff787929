# The habits of the project, by name. Each makes the environment first, where it is not up to date.
#   VENV        where the environment goes
#   PYTHON      the Python that it is made with, 3.10 or newer
#   SOLO_LEARN  the solo-learn to install: a folder, a git clone, a URL or a requirement.
#               Without it, an installed solo-learn is kept; where there is none, PyPI's 1.0.2 is installed.
VENV ?= .venv
PYTHON ?= python3
SOLO_LEARN ?=

RUN = "$(VENV)/bin/python" -m
SOURCES = metamask_solo scripts tests tools
# where most tests take less than a second
QUICK = $(addprefix tests/,method data evaluation analysis checkpoints test_validation.py) \
  $(addprefix tests/benchmark/test_,tables.py plan.py) tests/training/test_run_config.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick lint types format soak faults docs dist clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@sed -n 's/^#   /    /p' $(firstword $(MAKEFILE_LIST))

setup: ## Make the virtual environment, or bring it up to date
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo 'setup: error: PYTHON=$(PYTHON) is no Python 3.10 or newer: name one, as in PYTHON=python3.11' >&2; exit 1; }
	@$(PYTHON) tools/setup_environment.py --venv "$(VENV)" --solo-learn "$(SOLO_LEARN)"

demo: setup ## Make a data set, train MetaMask and its baselines on it, and print the results
	"$(VENV)/bin/metamask-solo" demo

test: lint types ## Check format, lint and types, and run all tests but the soak tests
	$(RUN) pytest -n auto --maxprocesses 8 --dist worksteal

quick: lint types ## Check format, lint and types, and run the quick tests of the core
	$(RUN) pytest -n auto --maxprocesses 8 --dist worksteal \
	  -m "not slow and not soak and not ddp and not precision" $(QUICK)

lint: setup ## Check format, lint and the layers of the package, change nothing
	$(RUN) ruff format --check $(SOURCES)
	$(RUN) ruff check $(SOURCES)
	"$(VENV)/bin/lint-imports" --no-cache

types: setup ## Check the types
	$(RUN) mypy

format: setup ## Format the code, and mend what lint can mend
	$(RUN) ruff format $(SOURCES)
	$(RUN) ruff check --fix $(SOURCES)

soak: setup ## Run the tests that take minutes or more
	$(RUN) pytest -m soak

faults: setup ## Run the tests with damaged files, full disks and killed runs
	$(RUN) pytest -m faults

docs: setup ## Write the tables and the picture, and build the documentation into site/
	"$(VENV)/bin/python" tools/settings_table.py
	"$(VENV)/bin/python" tools/methods_table.py
	"$(VENV)/bin/python" tools/diagram.py
	$(RUN) mkdocs build --strict

dist: setup ## Build wheel and sdist into dist/
	$(RUN) build

clean: ## Remove caches and build leftovers; environment, data and runs stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
