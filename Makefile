# make demo: trains ONE and the plain network on real digits, in about two minutes.
# make test: the test suite.   make test-fast: the unit tests.   make test-slow: all that is slow.
# make lint   make venv   make torch   make constraints
# make methods: every method on real digits, three seeds: docs/methods.md (an hour or two).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LATEST := .venv-py312
# A Python 3.12 for the newest JAX, if there is one: on the path, or pyenv's.
PYTHON312 := $(firstword $(foreach python,python3.12 $(wildcard $(PYENV_ROOT)/versions/3.12*/bin/python3.12),\
	$(shell $(python) -c 'import sys; print(sys.executable)' 2>/dev/null)))
INSTALL := install --quiet --disable-pip-version-check --constraint constraints.txt
SETTINGS := pyproject.toml setup.cfg constraints.txt
DEMO := runs/demo
# Large pages, if glibc has them: clearing small ones takes much of a train step on CPU.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: demo demo-seeds methods test test-fast test-slow test-latest torch lint venv constraints

venv: $(VENV)/.installed

$(VENV)/.installed: $(SETTINGS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip $(INSTALL) --editable '.[dev]'
	touch $@

demo: venv
	$(BIN)/python -m one_jax.main --config=configs/mnist5k_resnet8.py:few,plain --workdir=$(DEMO)/plain
	$(BIN)/python -m one_jax.main --config=configs/mnist5k_resnet8.py:few --workdir=$(DEMO)/one
	@test -d $(DEMO)/student || $(BIN)/python -m one_jax.export --workdir=$(DEMO)/one --output=$(DEMO)/student
	$(BIN)/python -m one_jax.report $(DEMO)/plain $(DEMO)/one --output=$(DEMO)
	@echo 'Curves: $(DEMO)/curves.png, $(DEMO)/one/curves.png. Student: $(DEMO)/student'

test: venv
	$(BIN)/python -m pytest -n 2 --dist=worksteal tests/unit tests/training tests/commands

test-fast: venv
	$(BIN)/python -m pytest -n 2 --dist=worksteal tests/unit

# Kills, several processes, notebooks, ONNX and PyTorch; and the newest Python and JAX.
test-slow: venv
	$(BIN)/python -m pytest -n 2 --dist=worksteal tests/slow
	$(MAKE) --no-print-directory test-latest

# For the comparisons with PyTorch, which are skipped without it.
torch: venv
	$(BIN)/pip $(INSTALL) --editable '.[torch]'

# The newest end of the supported range: end-to-end runs on Python 3.12 and its newest JAX.
test-latest: $(if $(PYTHON312),$(LATEST)/.installed)
ifeq ($(PYTHON312),)
	@echo 'Python 3.12 not found: skipping the tests on the newest JAX.'
else
	$(LATEST)/bin/python -m pytest -n 2 --dist=worksteal -m end_to_end tests/commands
	$(LATEST)/bin/python -m pytest -n 2 tests/unit/test_layers.py
endif

$(LATEST)/.installed: $(SETTINGS)
	$(PYTHON312) -m venv $(LATEST)
	$(LATEST)/bin/pip $(INSTALL) --editable '.[demo,test]'
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Pins what the two environments hold; to update, remove them and the lines of constraints.txt first.
constraints:
	$(BIN)/python .ci/constraints.py $(BIN)/python $(LATEST)/bin/python > constraints.new
	mv constraints.new constraints.txt

methods: venv
	$(BIN)/python -m benchmarks.methods --seeds=0,1,2 --output=docs/methods.md

# The demo over several seeds, as in the README.
SEEDS ?= 0 1 2 3 4
demo-seeds: venv
	@for seed in $(SEEDS); do for method in ,plain ''; do \
		$(BIN)/python -m one_jax.main --config=configs/mnist5k_resnet8.py:few$$method --config.seed=$$seed \
			--workdir=runs/demo_seeds/$$([ -n "$$method" ] && echo plain || echo one)-$$seed || exit; \
	done; done
	$(BIN)/python -m one_jax.report runs/demo_seeds/*-* --output=runs/demo_seeds
