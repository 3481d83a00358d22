# `make train` and `make test` set up whatever is missing first; `make help` lists every target.

VENV ?= .venv
BIN := $(VENV)/bin
# Interpreters to try, in order; or name one: make train PYTHON=/path/to/python
PYTHON ?= python3.13 python3.12 python3.11 python3 python
CONFIG ?= configs/tasks-cooperative.toml
MODEL := smollm2-135m-instruct
# More arguments for the job: make train ARGS="--set run.seed=1", make test ARGS="-k marker"
ARGS ?=
# Errors only; make test PIP_FLAGS= shows all that pip says.
PIP_FLAGS ?= -qq
PIP := $(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help train test lint format model setup clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:
	@echo "make train   set up, then train three models together: $(CONFIG)"
	@echo "make test    set up, then run the tests"
	@echo "make lint    ruff, mypy and the import direction"
	@echo "make format  let ruff format and fix what it can"
	@echo "make model   fetch the embedded base model"
	@echo "make setup   only set up: $(VENV) with Coterie and its development tools, and the base model"
	@echo "make clean   remove $(VENV) and tool caches (not the base model, not runs)"

train: model
	$(BIN)/coterie train $(CONFIG) $(ARGS)

test: setup
	OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.dev model

model: $(VENV)/.installed
	@$(BIN)/coterie models pull $(MODEL)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Set-up, one stamp a step, so that a step runs again only when what it depends on changed.

$(VENV)/.created:
	@found=; for python in $(PYTHON); do \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; \
		then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "Coterie needs Python 3.11 or newer with its venv module; none of these is one: $(PYTHON)" >&2; \
		echo "Install it (Debian and Ubuntu: apt install python3 python3-venv) or run: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	echo "==> virtual environment $(VENV) from $$("$$found" --version) (seconds)"; \
	"$$found" -m venv $(VENV)
	@touch $@

# PyTorch on its own, so that a build this machine's pip prefers (CPU only, say) is taken before anything asks for it.
$(VENV)/.torch: constraints.txt | $(VENV)/.created
	@echo "==> PyTorch (minutes: the largest download)"
	@$(PIP) torch
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	@echo "==> Coterie and the libraries it needs (about a minute)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.installed
	@echo "==> development tools (about a minute)"
	@$(PIP) -e '.[dev]'
	@touch $@
