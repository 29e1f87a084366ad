# make serve   the demo pair behind an OpenAI API (on the GPU if there is one)
# make test    the CPU test suite
# Both make .venv on first use and start at once after that.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A plain "torch" would bring gigabytes of CUDA to a machine without a GPU; this version has a
# CPU wheel of its own. With a GPU, TORCH=torch keeps the default build, which brings its triton.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -n 1)
TORCH ?= $(if $(HAS_GPU),torch>=2.11,torch==2.13.0)
TRITON ?= $(if $(HAS_GPU),,triton==3.9.0)
# Everything else has the version that the lock names.
PIP_INSTALL := $(BIN)/pip install -q -c requirements.lock
# One thread each: two test processes share two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
UV := uv==0.13.9

.PHONY: serve test test-long test-latest test-gpu lint types lock clean

serve: $(VENV)/.ready
	$(BIN)/eaglerun serve

test: $(VENV)/.ready-test
	$(PYTEST) -q -n 2 --dist worksteal -m "not gpu and not multigpu and not long"

# The same tests with ten times the cases, and the slow shapes.
test-long: $(VENV)/.ready-test
	EAGLERUN_TEST_CASES=10 $(PYTEST) -q -n 2 --dist worksteal -m "not gpu and not multigpu"

# The suite on the newest versions that pyproject.toml allows, torch and triton apart.
test-latest:
	rm -f .venv-latest/.ready .venv-latest/.ready-test
	$(MAKE) test VENV=.venv-latest PIP_INSTALL=".venv-latest/bin/pip install -q --upgrade --upgrade-strategy eager"
	.venv-latest/bin/pip freeze --exclude-editable

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

# Renews requirements.lock. torch and triton, and what only their CUDA builds bring, stay out: each
# machine has its own. Without hashes, because pip would then ask for one of torch's build too.
lock:
	test -x .venv-lock/bin/pip || $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install -q "$(UV)"
	(printf '# Made by make lock, for Python 3.11 and newer.\n' && \
	  echo 'setuptools>=77' | .venv-lock/bin/uv pip compile -q --universal --python-version 3.11 \
	    --all-extras --upgrade --no-header --no-annotate pyproject.toml - | \
	  grep -Ev '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)==') > requirements.lock.new
	mv requirements.lock.new requirements.lock

$(VENV)/.ready: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) "$(TORCH)" setuptools
	$(PIP_INSTALL) --no-build-isolation "$(TORCH)" -e .
	touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	$(PIP_INSTALL) --no-build-isolation "$(TORCH)" $(TRITON) -e ".[test,lint]"
	touch $@

clean:
	rm -rf $(VENV) .venv-latest .venv-lock .types build dist *.egg-info
