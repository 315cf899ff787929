# The habits of the project, by name. Each makes the environment first, where it is not up to date.
#   VENV        where the environment goes
#   PYTHON      the Python that it is made with, 3.10 or newer
#   SOLO_LEARN  the solo-learn to install: a folder, a URL, or what else pip takes.
#               Without it, an installed solo-learn is kept; where there is none, PyPI's 1.0.2 is installed.
VENV ?= .venv
PYTHON ?= python3
SOLO_LEARN ?=
export VENV PYTHON SOLO_LEARN SETUP

RUN = "$(VENV)/bin/python" -m
PYTEST = $(RUN) pytest -n auto --maxprocesses 8 --dist worksteal
SOURCES = metamask_solo scripts tests tools pl_bolts.py
# where most tests take less than a second
QUICK = $(addprefix tests/,method data evaluation analysis checkpoints)

.DEFAULT_GOAL := help
.PHONY: help setup demo test quick lint types format soak docs dist clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile
	@sed -n 's/^#   /    /p' Makefile

setup: ## Make the virtual environment, or bring it up to date
	@sh -c "$$SETUP"

demo: setup ## Make a data set, train MetaMask and its baselines on it, and print the results
	"$(VENV)/bin/metamask-solo" demo

test: lint types ## Check format, lint and types, and run all tests but the soak tests
	$(PYTEST)

quick: lint types ## Check format, lint and types, and run the quick tests of the core
	$(PYTEST) -m "not slow and not soak and not ddp and not precision" $(QUICK)

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

docs: setup ## Write the tables, and build the documentation into site/
	"$(VENV)/bin/python" tools/tables.py
	$(RUN) mkdocs build --strict

dist: setup ## Build wheel and sdist into dist/
	$(RUN) build

clean: ## Remove caches and build leftovers; environment, data and runs stay
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp in the environment says what was installed; it is removed first and written last.
define SETUP
say() { echo "setup: $$1"; }
fail() { echo "setup: error: $$1" >&2; exit 1; }
ask() { "$$VENV/bin/python" -c "from importlib.metadata import requires, version; $$1" 2>/dev/null; }
pip() { "$$VENV/bin/python" -m pip install $$quiet "$$@" || fail "this failed: pip install $$*"; }
[ -t 1 ] || quiet=-q

stamp="$$VENV/metamask-solo-setup"; state="$(CURDIR) $$SOLO_LEARN"
case "$$SOLO_LEARN" in
  *://* | git+*) ;;
  */*) [ -e "$$SOLO_LEARN" ] || fail "SOLO_LEARN=$$SOLO_LEARN: no such file or folder" ;;
esac
if [ -d "$$SOLO_LEARN" ]; then
  [ -f "$$SOLO_LEARN/setup.py" ] && [ -d "$$SOLO_LEARN/solo" ] ||
    fail "SOLO_LEARN=$$SOLO_LEARN: holds no setup.py beside a folder solo"
fi
edited() { [ -d "$$SOLO_LEARN" ] && [ -n "$$(find "$$SOLO_LEARN/solo" -name '*.py' -newer "$$stamp")" ]; }
if [ "$$stamp" -nt pyproject.toml ] && [ "$$stamp" -nt Makefile ] && ask 'version("solo-learn")'; then
  before="$$(cat "$$stamp")"
  if [ -z "$$SOLO_LEARN" ] && [ "$${before#"$$state"}" != "$$before" ]; then before="$$state"; fi
  if [ "$$before" = "$$state" ] && ! edited; then say "$$VENV is up to date"; exit; fi
fi

if ! "$$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  "$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "PYTHON=$$PYTHON is no Python 3.10 or newer: name one, as in PYTHON=python3.11"
  say "making $$VENV"
  # some distributions cut ensurepip out of Python
  "$$PYTHON" -m venv "$$VENV" >/dev/null 2>&1 || {
    "$$PYTHON" -m venv --without-pip "$$VENV" &&
      "$$PYTHON" -m pip --python "$$VENV/bin/python" install -q pip
  } || fail "$$PYTHON cannot make an environment in $$VENV"
fi
rm -f "$$stamp"
pip 'pip>=22'

if [ -n "$$SOLO_LEARN" ] || ! ask 'version("solo-learn")'; then
  source="$${SOLO_LEARN:-solo-learn==1.0.2}"
  say "installing solo-learn from $$source"
  work="$$(mktemp -d)"; trap 'rm -rf "$$work"' EXIT
  # its setup.py needs pkg_resources; pip up to 26.1 reads the first variable for builds, newer ones the second
  echo 'setuptools<81' >"$$work/build.txt"
  if [ -d "$$source" ]; then # a build writes into its folder, and takes what an older one left there
    mkdir "$$work/clone"
    find "$$source" -maxdepth 1 -type f -exec cp {} "$$work/clone" \;
    cp -R "$$source/solo" "$$work/clone"
    source="$$work/clone"
  fi
  (
    export PIP_CONSTRAINT="$$work/build.txt" PIP_BUILD_CONSTRAINT="$$work/build.txt"
    pip --no-deps --force-reinstall "$$source"
  ) || exit 1
fi

extras=dev,docs,sweeps,tensorboard,umap,wandb
! ask 'print(*requires("solo-learn"))' | grep -q pytorch-lightning || extras="$$extras,pypi-release"
say "installing the project and what it needs; the first time, several gigabytes"
# no resolver can meet the pins of solo-learn 1.0.2: pip would warn of them each time
pip --no-warn-conflicts --editable ".[$$extras]"

# an index and a folder of wheels together can give torch 2.13.0+cpu and torchvision 0.28.0, which do not fit
builds="$$(ask 'print(*(n + "===" + version(n) for n in ("torch", "torchvision")))')"
"$$VENV/bin/python" -c 'import torch, torchvision' 2>/dev/null || {
  say "torch and torchvision do not fit ($$builds): taking both from the index"
  pip $$(echo "$$builds" | sed 's/+[^ ]*//g')
  "$$VENV/bin/python" -c 'import torch, torchvision' || fail "torch and torchvision cannot be imported"
}
echo "$$state" >"$$stamp"
say "$$VENV is ready"
endef
