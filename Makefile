# make demo: ONE beside the plain network on real digits, in about two minutes.
# make test: the whole test suite.   make lint   make venv   make constraints
# make methods: every method on real digits, three seeds: docs/methods.md (an hour or two).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LATEST := .venv-py312
# A Python 3.12 for the newest JAX, where there is one: on the path, or among pyenv's.
PYTHON312 := $(firstword $(foreach python,python3.12 $(wildcard $(PYENV_ROOT)/versions/3.12*/bin/python3.12),\
	$(shell $(python) -c 'import sys; print(sys.executable)' 2>/dev/null)))
INSTALL := install --quiet --disable-pip-version-check --constraint constraints.txt
SETTINGS := pyproject.toml setup.cfg constraints.txt
DEMO := runs/demo
# Large pages, where glibc has them: the system spends much of a train step on CPU clearing small ones.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: demo demo-seeds methods test torch test-latest lint venv constraints

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
	$(BIN)/python -m pytest -n 2 --dist=worksteal
	$(MAKE) --no-print-directory test-latest

# For the comparisons with PyTorch; without it they are skipped.
torch: venv
	$(BIN)/pip $(INSTALL) --editable '.[torch]'

# The other end of the supported range: the end-to-end runs on Python 3.12 and its newest JAX.
test-latest: $(if $(PYTHON312),$(LATEST)/.installed)
ifeq ($(PYTHON312),)
	@echo 'No Python 3.12 here: the run on the newest JAX is left out.'
else
	$(LATEST)/bin/python -m pytest -n 2 --dist=worksteal -m end_to_end tests/test_commands.py
	$(LATEST)/bin/python -m pytest -n 2 tests/test_layers.py
endif

$(LATEST)/.installed: $(SETTINGS)
	$(PYTHON312) -m venv $(LATEST)
	$(LATEST)/bin/pip $(INSTALL) --editable '.[demo,test]'
	touch $@

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Pins what the two environments hold now; to renew, remove them and constraints.txt's lines first.
constraints:
	$(BIN)/python .ci/constraints.py $(BIN)/python $(LATEST)/bin/python > constraints.new
	mv constraints.new constraints.txt

methods: venv
	$(BIN)/python -m benchmarks.methods --seeds=0,1,2 --output=docs/methods.md

# The demo over several seeds: the table of the README.
SEEDS ?= 0 1 2 3 4
demo-seeds: venv
	@for seed in $(SEEDS); do for method in ,plain ''; do \
		$(BIN)/python -m one_jax.main --config=configs/mnist5k_resnet8.py:few$$method --config.seed=$$seed \
			--workdir=runs/demo_seeds/$$([ -n "$$method" ] && echo plain || echo one)-$$seed || exit; \
	done; done
	$(BIN)/python -m one_jax.report runs/demo_seeds/*-* --output=runs/demo_seeds
