# `make demo`, `make test` and the rest set up what they need in one virtual environment; the next one reuses it.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: install demo test test-all versions lint mutants random-mutants faults fuzz bench rehearsal kernels virtual-gpu hub docs clean

# The command `trifuse`, in the virtual environment.
install: $(VENV)/.demo-ready

demo: $(VENV)/.demo-ready
	$(BIN)/trifuse demo --overwrite

# Bytecode is kept: a run of the tests starts hundreds of processes that import the same.
test test-all: export PYTHONDONTWRITEBYTECODE :=

# What every change must pass: each promise once.
test: $(VENV)/.test-ready
	$(BIN)/pytest -n auto --dist worksteal -m "not slow"

# Then the rest: all GPU architectures, forms and grids, and whole networks.
test-all: test
	$(BIN)/pytest -n auto --dist worksteal -m slow

# The kernels' tests with each supported pair of torch and Triton, in environments of their own: several GB, half an hour.
VERSIONS ?= build/versions
versions: $(VENV)/.test-ready
	$(BIN)/python tests/versions/run.py --environments $(VERSIONS)
	$(BIN)/python -m trifuse.benchmarks.reporting.tables

lint: $(VENV)/.lint-ready
	mkdir -p build/types && ln -sfn ../.. build/types/trifuse
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(VENV)/.test-ready
	$(BIN)/python tests/mutants/run.py

# What the tests let pass of so many random changes of the library.
COUNT ?= 200
SEED ?= 14
random-mutants: $(VENV)/.mutation-ready
	$(BIN)/python tests/mutants/random_mutants.py --count $(COUNT) --seed $(SEED)

# The table of faults, from the tests that carry their ids.
faults:
	$(PYTHON) tests/support/fault_table.py

# Damaged files for every reader and every command.
fuzz: $(VENV)/.test-ready
	$(BIN)/python tests/fuzz/run.py --inputs 2000 --seed 0

bench: $(VENV)/.test-ready
	$(BIN)/python -m trifuse.benchmarks.reporting.report --out benchmarks/results
	$(BIN)/python -m trifuse.benchmarks.reporting.tables

# The benchmarks and the GPU tests where there is no GPU, tiny and on a stand-in: shows that they run through, no more.
rehearsal: $(VENV)/.test-ready
	rm -rf build/rehearsal
	$(BIN)/python tests/rehearsal/run_report.py --out build/rehearsal

# What every Triton kernel costs, read from machine code for GPUs that need not be here: ten minutes the first time.
kernels: $(VENV)/.test-ready
	$(BIN)/python -m trifuse.benchmarks.reporting.static_report
	TRITON_INTERPRET=0 $(BIN)/python -m trifuse.benchmarks.reporting.issue_time
	$(BIN)/python -m trifuse.benchmarks.reporting.tables

# Every call of the GPU tests, as compiled for a GPU, on an emulated one; its verdicts are shown by `trifuse doctor`.
virtual-gpu: $(VENV)/.test-ready
	TRITON_INTERPRET=0 $(BIN)/python tests/support/virtual_gpu_cases.py --out kernels/testing/verdicts/virtual_gpu.csv

# The operators as a package that the Hugging Face `kernels` loader takes.
hub:
	$(PYTHON) hub/build.py --out build/hub

# The documentation as a site: build/site/index.html.
docs: $(VENV)/.docs-ready
	$(BIN)/python website/build.py --out build/site

clean:
	rm -rf $(VENV) build

# torch comes first, so that nothing after it can replace it.
$(VENV)/.torch-ready: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "trifuse needs Python 3.11 or newer; run: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(VENV)/.demo-ready: $(VENV)/.torch-ready pyproject.toml
	$(PIP) --editable '.[med,ecg,h5]'
	touch $@

$(VENV)/.test-ready: $(VENV)/.torch-ready pyproject.toml
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/.demo-ready $(VENV)/.docs-ready

$(VENV)/.docs-ready: $(VENV)/.torch-ready pyproject.toml
	$(PIP) --editable '.[docs]'
	touch $@

$(VENV)/.mutation-ready: $(VENV)/.test-ready
	$(PIP) --editable '.[test,mutation]'
	touch $@

$(VENV)/.lint-ready: $(VENV)/.torch-ready pyproject.toml
	$(PIP) --editable '.[dev]'
	touch $@ $(VENV)/.demo-ready $(VENV)/.docs-ready $(VENV)/.test-ready
