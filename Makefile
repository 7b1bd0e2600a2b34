# Needs make, and uv or Python 3.11 to 3.14 with venv (Debian: apt install python3-venv).

UV ?= $(shell command -v uv)
PYTHON ?= $(shell for python in python3.12 python3.11 python3.13 python3.14 python3; do \
	$$python -c 'import $(if $(UV),,ensurepip,) sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
	2>/dev/null && echo $$python && break; done)
# More arguments for pip, for instance an index that has torch without CUDA.
PIP_ARGS ?=
PYTEST_ARGS ?=
DOCS_MODULES ?= captioner ray_jobs
BIN := .venv/bin
NO_PYTHON = found neither uv nor Python 3.11 to 3.14 with venv; install one (Debian: apt install python3-venv), or give PYTHON=...
UV_PYTHON = >=3.11,<3.15
ifneq ($(UV),)
# uv brings a Python where the machine has none.
NEW_VENV = test -x $(@D)/bin/python || "$(UV)" venv --quiet --python "$(or $(PYTHON),$(UV_PYTHON))" $(@D)
INSTALL = "$(UV)" pip install --quiet --python $(@D)/bin/python
else
NEW_VENV = "$(PYTHON)" -m venv $(@D)
INSTALL = $(@D)/bin/python -m pip install --quiet
endif

# Tests and the demo need no network and report to nobody.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Also where the user has set it: else each of some hundred processes compiles the modules of this package.
export PYTHONDONTWRITEBYTECODE :=

# The core, without torch and Ray where it can be: under a minute on two CPUs.
FAST := $(addsuffix .py,tests/test_house tests/test_package tests/core/test_config tests/core/test_store_plan \
	tests/core/test_steps tests/core/test_sources_folder tests/core/test_sources_tables tests/core/test_sources_webdataset \
	tests/core/test_scoring tests/core/test_terminal tests/core/test_progress tests/core/test_imaging_fit)

.PHONY: help setup test test-fast test-browser lint unit docs chaos nodes families fuzz demo test-lowest clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.installed ## Install everything into .venv, once

test: setup lint unit ## Lint, type-check and run the whole test suite

test-fast: setup ## The core tests, in about a minute: before each commit
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(FAST)

test-browser: .venv/.browser ## The review page and the report in headless Chromium, checked with axe-core
	@tests/browser/need-chromium
	$(BIN)/python -m pytest tests/browser -m browser -n 2 --dist loadfile $(PYTEST_ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

unit: setup ## The test suite alone; PYTEST_ARGS=... chooses
ifeq ($(strip $(PYTEST_ARGS)),)
	$(BIN)/python -m pytest --ignore tests/jobs --ignore tests/cluster -n 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest tests/cluster -n 3 --dist loadfile # three long files, which wait for nodes
	$(BIN)/python -m pytest tests/jobs -n 2 --dist loadfile --no-loadscope-reorder
else
	$(BIN)/python -m pytest $(PYTEST_ARGS)
endif

chaos: setup ## Kill drivers at random moments, lose nodes and memory, fill small nodes: CHAOS_KILLS=10 CHAOS_SEED=0
	$(BIN)/python -m pytest tests/cluster -m chaos -q

nodes: setup ## A job on NODES=8 nodes, of which some are slow, late, preempted or killed: what is lost, and how busy each is
	$(BIN)/python -m benchmarks.nodes --nodes $(or $(NODES),8) --chunks 20 --seconds 4

families: setup ## Caption and train with a tiny model of every type; the ordinary suite has some of them
	ALL_FAMILIES=1 $(BIN)/python -m pytest tests/core/test_models_families.py tests/core/test_models_check.py \
		tests/core/test_training_families.py tests/core/test_training_fsdp.py -q

fuzz: setup ## Decode 100,000 damaged files, damage 10,000 tables and sources: FUZZ_CASES=... TABLE_CASES=... FUZZ_SEED=...
	FUZZ_CASES=$(or $(FUZZ_CASES),100000) $(BIN)/python -m pytest tests/core/test_fuzz.py -q -s
	TABLE_CASES=$(or $(TABLE_CASES),10000) $(BIN)/python -m pytest tests/core/test_fuzz_table.py -q -s

docs: setup ## API pages from the docstrings, into build/docs
	$(BIN)/python -m pdoc -d google -o build/docs $(DOCS_MODULES)

demo: setup ## Render 300 scenes, caption them with the starter model, check the result, show the report
	rm -rf demo
	$(BIN)/captioner demo

test-lowest: .venv-lowest/.installed ## The test suite on the oldest versions that pyproject.toml allows
	.venv-lowest/bin/python -m pytest $(PYTEST_ARGS)

clean: ## Remove environments, caches and the demo
	rm -rf .venv .venv-lowest .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist demo *.egg-info

.venv/.installed: constraints.txt
.venv-lowest/.installed: constraints-lowest.txt
.venv/.installed .venv-lowest/.installed: pyproject.toml
	@test -n "$(UV)$(PYTHON)" || { echo "make: $(NO_PYTHON)" >&2; exit 1; }
	@$(NEW_VENV)
	@echo "make: $$($(@D)/bin/python --version) in $(@D), packages by $(if $(UV),uv,pip)"
	$(INSTALL) $(PIP_ARGS) -c $(filter constraints%,$^) -e '.[dev]'
	@touch $@

.venv/.browser: .venv/.installed
	$(INSTALL) $(PIP_ARGS) -c constraints.txt -e '.[browser]'
	@touch $@
