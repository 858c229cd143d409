# `make demo` and `make test` do everything on a machine with Python 3.11 or newer, make and gcc.
# PYTHON makes the environment: the first that is new enough, unless you name one. VENV is where it lies.
# DEMO_ARGS goes to the demo's `jax-dpo train`. `make parity` has an environment of its own, with torch; PARITY_ARGS goes to it.

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2> /dev/null && echo $$p && break; done)
DEMO_ARGS ?=
PARITY_VENV ?= .venv-parity
PARITY_ARGS ?=
EXTRAS ?= dev

python := $(VENV)/bin/python
stamp := $(VENV)/.installed

.PHONY: setup demo test lint docs parity

setup: $(stamp)

# The stamp is written last, so an installation that was interrupted is done again; an environment without its Python or
# its pip is made anew.
$(stamp): pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "installing jax_dpo and what it needs into $(VENV): once, about 1.3 GB on disk"
	@$(python) -c 'import pip' 2> /dev/null || \
		$(PYTHON) -m venv $$(test ! -f $(VENV)/pyvenv.cfg || echo --clear) $(VENV) || \
		{ echo "make: $(PYTHON) cannot make an environment; Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(python) -m pip install -qq --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

# What it does, step by step: scripts/demo/run.py
demo: $(stamp)
	@$(python) scripts/demo/run.py $(DEMO_ARGS)

# Two processes: most of the time goes into compiling, which takes one core. A file's tests stay together, they share what is dear.
test: $(stamp)
	$(python) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not browser and not parity"

lint: $(stamp)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# docs/options.md and docs/from-trl.md out of the options themselves, docs/troubleshooting.md out of the messages
docs: $(stamp)
	$(python) scripts/options_page.py

# This trainer and TRL side by side; writes docs/parity.md
parity:
	@$(MAKE) --no-print-directory setup VENV=$(PARITY_VENV) EXTRAS=dev,parity
	@$(PARITY_VENV)/bin/python scripts/parity/run.py $(PARITY_ARGS)
