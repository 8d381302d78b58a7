# The daily verbs; `make help` lists them. Everything installs into .venv and nothing outside it.

# An interpreter of 3.11 or newer. Only used to make .venv.
PYTHON ?= python3
# What pip is told for torch. On a machine whose index serves a CUDA build, the smaller CPU build is
#   make setup TORCH="torch==2.13.0 --index-url <the CPU wheel index of pytorch.org>"
TORCH ?= torch==2.13.0
# Passed on to the program: make train ARGS="mini-grpo --run.seed 1", make test ARGS="tests/kernels -k tree".
ARGS ?=
# Threads of the training process, and workers of the test suite.
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Byte code is made on first import: compiling all of torch and transformers takes longer than using them.
INSTALL := $(PIP) install --no-compile
INSTALLED := $(VENV)/.installed
TRAIN := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(CORES)} $(BIN)/torchrun --standalone --nproc-per-node 1 -m
SOURCES := setup.py $(wildcard csrc/*/*)

.DEFAULT_GOAL := help
.PHONY: help setup train test lint format bench mini suite pipeline constraints clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup: $(INSTALLED) ## make .venv, install everything, build the C++ kernels

train: $(INSTALLED) ## train the embedded default (ARGS: another recipe, fields)
	$(TRAIN) axpo.train $(ARGS)

test: $(INSTALLED) ## run the tests, one worker a core (ARGS: pytest's)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(CORES) $(ARGS)

lint: $(INSTALLED) ## ruff, ruff format, pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(INSTALLED) ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## rollout speed against transformers' generate, and the shares of a training step
	$(BIN)/python bench/rollout.py $(ARGS)

mini: $(INSTALLED) ## rebuild the embedded SFT checkpoint: tokenizer, practice, then the teacher's trajectories
	rm -rf build/mini
	$(BIN)/python -m axpo.tasks.build_mini axpo/assets/mini
	$(TRAIN) axpo.sft mini-practice $(ARGS)
	$(TRAIN) axpo.sft mini-crops $(ARGS)
	$(TRAIN) axpo.sft mini-sft --model.path build/mini/mini-crops/policy --sft.export axpo/assets/mini $(ARGS)

suite: $(INSTALLED) ## rebuild the suite's base and teacher from the mini model: practice, then the scripted teacher
	rm -rf build/suite
	$(BIN)/python -m axpo.tasks.build_mini --suite build/suite/start
	mkdir -p axpo/assets/suite/base axpo/assets/suite/teacher
	$(TRAIN) axpo.sft suite-practice $(ARGS)
	$(TRAIN) axpo.sft suite-copying --sft.export axpo/assets/suite/base $(ARGS)
	$(TRAIN) axpo.sft suite-teacher --sft.export axpo/assets/suite/teacher $(ARGS)

pipeline: $(INSTALLED) ## collect, filter, SFT, RL, evaluate on the suite; again: goes on (ARGS: another recipe, fields)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(CORES)} $(BIN)/python -m axpo.pipeline $(ARGS)

constraints: $(INSTALLED) ## pin what .venv holds now in constraints-cpu.txt
	{ grep '^#' constraints-cpu.txt; $(PIP) list --format=freeze --exclude-editable --exclude pip | sed 's/+cpu$$//'; } \
		> constraints-cpu.txt.new
	mv constraints-cpu.txt.new constraints-cpu.txt

clean: ## remove .venv, builds and caches (never runs/)
	rm -rf $(VENV) build dist .pytest_cache .hypothesis .ruff_cache .benchmarks *.egg-info
	find kernels engine axpo bench tests -name __pycache__ -prune -exec rm -rf {} +
	rm -f kernels/*.so

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		f"axpo needs Python 3.11 or newer; $(PYTHON) is {sys.version.split()[0]} (set PYTHON=...)")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: any later request is then satisfied and cannot pull in another build.
$(VENV)/.torch: $(BIN)/python
	$(INSTALL) $(TORCH)
	$(INSTALL) -c constraints-cpu.txt setuptools ninja
	touch $@

# Again whenever a dependency or a C++ source changed: a few seconds when there is nothing to download or build.
$(INSTALLED): $(VENV)/.torch pyproject.toml constraints-cpu.txt $(SOURCES)
	$(INSTALL) -c constraints-cpu.txt --no-build-isolation -e '.[dev]'
	touch $@
