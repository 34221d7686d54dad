# Every target does its own set-up, in a virtual environment in .venv. Only Python 3.11 or later, git and make are needed.

VENV := .venv
PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
QUIETLY := --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
PIP := $(BIN)/python -m pip install $(QUIETLY)
# Names of extras, which $(call) would part at their commas.
TESTING := plot,datasets,test
DOCUMENTING := $(TESTING),docs
LINTING := $(TESTING),lint
# In a virtual environment: the package with extras. By uv, which is quicker; by pip, where uv finds no way out.
install = $(1)/bin/uv pip install --quiet --compile-bytecode --python $(1)/bin/python --constraint $(CONSTRAINTS) --editable ".[$(2)]" \
	|| $(1)/bin/python -m pip install $(QUIETLY) --editable ".[$(2)]"
# By pip, which may have been told where a build of PyTorch is to come from.
basis = $(1)/bin/python -m pip install $(QUIETLY) torch numpy uv

# One thread of PyTorch's for each process of the tests, of which there are two for each core: many tests wait for processes.
PROCESSES := $(shell expr 2 \* $$(getconf _NPROCESSORS_ONLN))
# Hundreds of tests start processes: what they import is compiled once, whatever the environment says of that.
ENVIRONMENT := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=
SECOND := tests/integrations/test_torchio.py tests/integrations/test_lightning.py
PYTEST := $(ENVIRONMENT) $(BIN)/python -m pytest --numprocesses $(PROCESSES) --maxprocesses 16 --dist worksteal
# Tests that take long are given out one by one, and few at a time.
SLOW := $(ENVIRONMENT) $(BIN)/python -m pytest --numprocesses 3 --dist load --maxschedchunk 1
THOROUGH := --hypothesis-profile thorough

.PHONY: demo test test-all test-second test-slow test-examples docs changelog dist lint format bench fuzz clean

demo: $(VENV)/plot.installed  ## Apply a network to a synthetic head, whole and patch by patch, and draw the result
	$(BIN)/voxloom demo --output demo $(DEMO)

test: $(VENV)/test.installed  ## Run the tests, but for those that take long
	$(PYTEST) -m "not slow" $(COVERAGE)

test-slow: $(VENV)/test.installed  ## Run those tests that take long
	$(SLOW) -m slow

test-examples: $(VENV)/test.installed  ## Run those tests that draw examples, with all of them
	$(PYTEST) -m hypothesis $(THOROUGH)

changelog: $(VENV)/python.made  ## Show what the files in changelog.d come to
	$(PIP) towncrier
	$(BIN)/towncrier build --draft --version "$$($(PYTHON) -c 'exec(open("src/voxloom/_version.py").read()); print(__version__)')"

dist: $(VENV)/python.made  ## Build the wheel and the source distribution into dist
	$(PIP) build twine
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m twine check --strict dist/*

test-all:  ## Run all tests, with all examples, and say how much of the code they reach
	$(MAKE) test COVERAGE="--cov voxloom --cov-report="
	$(SLOW) -m "slow or hypothesis" $(THOROUGH) --cov voxloom --cov-append --cov-report term:skip-covered

test-second: $(VENV)-second/installed  ## Run the tests that need TorchIO 2 or Lightning, in an environment of their own
	$(ENVIRONMENT) $(VENV)-second/bin/python -m pytest --numprocesses 2 --dist worksteal $(SECOND)
	$(ENVIRONMENT) $(VENV)-second/bin/python -m pytest tests/test_documentation.py -k "lightning or torchio"

docs: $(VENV)/docs.installed  ## Build the documentation into build/docs; what is wrong with it is an error
	$(BIN)/sphinx-build -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

lint: $(VENV)/lint.installed  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/lint.installed  ## Mend what can be mended of the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/test.installed  ## Measure aggregation, sampling, training and prediction side by side with TorchIO, MONAI and nnU-Net
	$(BIN)/python benchmarks/aggregation.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/training.py --transforms
	$(BIN)/python benchmarks/prediction.py
	$(BIN)/python benchmarks/prediction.py --large
	$(BIN)/python benchmarks/stores.py
	$(BIN)/python benchmarks/efficiency.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/machines.py
	$(BIN)/python benchmarks/network.py
	$(BIN)/python benchmarks/network.py --bfloat16
	$(BIN)/python benchmarks/network.py --network 4 --shape 256 256 256 --batch 4
	$(BIN)/python benchmarks/network.py --network 60 --shape 160 160 160 --batch 4
	$(BIN)/python benchmarks/export.py
	$(BIN)/python benchmarks/windows.py
	$(BIN)/python benchmarks/export.py --classes 118 --shape 192 192 120

fuzz: $(VENV)/test.installed  ## Read thousands of damaged files of all formats
	$(BIN)/python tests/fuzz.py --cases 8000 --seed $(shell date +%s)

clean:  ## Remove what the other targets made
	rm -rf .coverage $(VENV) $(VENV)-second demo bench build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/python.made:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed, and python3 was not found" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed, not $$($(PYTHON) --version)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/basis.installed: $(VENV)/python.made $(CONSTRAINTS)
	$(call basis,$(VENV))
	@touch $@

$(VENV)-second/installed: $(VENV)/python.made pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)-second
	$(call basis,$(VENV)-second)
	$(call install,$(VENV)-second,second)
	@touch $@

$(VENV)/plot.installed: $(VENV)/basis.installed pyproject.toml $(CONSTRAINTS)
	$(call install,$(VENV),plot)
	@touch $@

$(VENV)/test.installed: $(VENV)/basis.installed pyproject.toml $(CONSTRAINTS)
	$(call install,$(VENV),$(TESTING))
	@touch $@

$(VENV)/docs.installed: $(VENV)/basis.installed pyproject.toml $(CONSTRAINTS)
	$(call install,$(VENV),$(DOCUMENTING))
	@touch $@

$(VENV)/lint.installed: $(VENV)/basis.installed pyproject.toml $(CONSTRAINTS)
	$(call install,$(VENV),$(LINTING))
	@touch $@
