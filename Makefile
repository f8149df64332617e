# make demo, make test: each sets up .venv by itself when it is missing or out of date. No root, no activated environment.
SHELL := bash
INSTALLED := .venv/.installed
# What a recipe runs sees .venv first, for DeepSpeed looks for ninja on PATH. TORCH=cpu asks for the CPU, also beside a GPU.
BUILD := $(or $(TORCH),$(shell sed -n 2p $(INSTALLED) 2>/dev/null))
IN_VENV := export PATH="$(CURDIR)/.venv/bin:$$PATH" $(if $(filter cpu,$(BUILD)),DS_ACCELERATOR=cpu);
SCRIPTS := .ci/run .ci/fresh_machine .ci/versions $(wildcard tools/*.sh slurm/*.sh slurm/*.sbatch)

.DELETE_ON_ERROR:
.PHONY: help install demo paper test test_fast check bench docs
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z_]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'No CUDA: make TORCH=cpu install (demo, test ...); TORCH=cu126, rocm7.1 ... are other builds of PyTorch. .venv keeps its build.'
	@echo 'Another Python: make PYTHON=/path/to/python3 install. From scratch: rm -rf .venv'

install: $(INSTALLED) ## set up .venv with the pinned packages of requirements.txt

# DRY_RUN=1: demo and paper print their stages with commands and times, and run nothing.
DRY := $(if $(DRY_RUN),--dry_run)
demo: $(INSTALLED) ## from images to tables on small images: shards, training, features, probes, pictures in runs/demo
	@$(IN_VENV) bash tools/paper.sh own runs/demo digits: $(DRY) -- --recipe digits_nano_ar_8 $(if $(DRY),,&& cat runs/demo/tables.md)

SCALE ?= tiny
OUT ?= runs/paper_$(SCALE)
paper: $(INSTALLED) ## all tables and figures: SCALE=own DATA=imagefolder:DIR ARGS="-- --recipe NAME", SCALE=tiny (minutes), SCALE=cifar DATA=cifar10:PATH (a night), SCALE=full DATA=DIR (its plan; SUBMIT=1 submits)
	@$(IN_VENV) if [ "$(SCALE)" = full ]; then SUBMIT="$(SUBMIT)" bash slurm/story_paper.sh full "$(OUT)" "$(DATA)" $(DRY) $(ARGS); \
	else bash tools/paper.sh "$(SCALE)" "$(OUT)" "$(DATA)" $(DRY) $(ARGS); fi

# Launches mostly wait, so three workers keep two cores busy. A run narrowed by -k starts no workers, for they take seconds.
WORKERS ?= $(if $(filter -k%,$(ARGS)),0,3)
PYTEST := python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder
test: $(INSTALLED) ## every test; narrow it by ARGS="-k floors"; WORKERS=0 runs them in one process
	@$(IN_VENV) $(if $(filter 0,$(WORKERS)),,python tests/build_extension.py &&) $(PYTEST) $(ARGS)

test_fast: $(INSTALLED) ## the tests that launch no ranks
	@$(IN_VENV) $(PYTEST) -m "not slow" $(ARGS)

bench: $(INSTALLED) ## ours beside its peers, about two minutes: make bench IMAGES=a/folder/of/JPEGs
	@$(IN_VENV) python tools/bench/data.py --images "$(IMAGES)" --quick

docs: .venv/.docs ## README and docs/ as a site in site/; a link that leads nowhere is an error
	@$(IN_VENV) rm -rf site && python -m sphinx -W --keep-going -q -c docs -d .venv/doctrees . site && echo "site/index.html"

check: $(INSTALLED) ## format, lint, types, shell scripts
	@$(IN_VENV) ruff format --check . && ruff check . && mypy && shellcheck $(SCRIPTS) && echo "check: all clean"

# The stamp's first line is the place that .venv was made for, the second PyTorch's build: another place or build installs anew.
ifneq ($(wildcard $(INSTALLED)),)
STAMP := $(shell .venv/bin/python -c '' 2>/dev/null && cat $(INSTALLED))
ifneq ($(STAMP),$(strip $(CURDIR) $(BUILD)))
.PHONY: $(INSTALLED)
endif
endif

$(INSTALLED): requirements.txt pyproject.toml
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" bash tools/install.sh

.venv/.docs: docs/requirements.txt $(INSTALLED)
	@.venv/bin/python -m pip install --disable-pip-version-check --quiet --requirement docs/requirements.txt
	@touch $@
