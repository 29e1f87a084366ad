# make serve   the demo pair behind an OpenAI API (on the GPU if there is one)
# make test    the CPU test suite
# Both make .venv on first use and start at once after that.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A plain "torch" would bring gigabytes of CUDA to a machine without a GPU; this version has a
# CPU wheel of its own. With a GPU, TORCH=torch keeps the default build.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)
TORCH ?= $(if $(HAS_GPU),torch>=2.11,torch==2.13.0)
# One thread each: two test processes share two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: serve test test-long test-gpu lint types clean

serve: $(VENV)/.ready
	$(BIN)/eaglerun serve

test: $(VENV)/.ready-test
	$(PYTEST) -q -n 2 --dist worksteal -m "not gpu and not multigpu and not long"

# The same tests with ten times the cases, and the slow shapes.
test-long: $(VENV)/.ready-test
	EAGLERUN_TEST_CASES=10 $(PYTEST) -q -n 2 --dist worksteal -m "not gpu and not multigpu"

test-gpu: $(VENV)/.ready-test
	$(PYTEST) -q -m "gpu or multigpu"

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers cannot follow the editable install's mapping of folders, so they read a link tree.
types: $(VENV)/.ready-test
	rm -rf .types && mkdir -p .types/eaglerun
	ln -s $(CURDIR)/eaglerun/* .types/eaglerun/
	ln -s $(CURDIR)/server $(CURDIR)/kernels $(CURDIR)/configs .types/eaglerun/
	cd .types && MYPYPATH=. ../$(BIN)/mypy --config-file ../pyproject.toml -p eaglerun

$(VENV)/.ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(BIN)/pip install -q "$(TORCH)" -e ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) .types build dist *.egg-info
