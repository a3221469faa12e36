# `make demo` and `make test` on a fresh machine: Python 3.10-3.13 and a C++ compiler are all it needs to have.

PYTHON ?= python3
VENV ?= .venv

# Every install goes through the pins, and nothing is built in an isolated environment, so no second torch comes in.
CONSTRAINTS = constraints.txt
EXTRA = dev
PIP_INSTALL = $(VENV)/bin/python -m pip install --disable-pip-version-check --no-build-isolation -c $(CONSTRAINTS)
INSTALLED = .mft_megatron_installed
STAMP := $(VENV)/$(INSTALLED)

# `make test-newest` and `make test-oldest`: an environment each, beside the one of `make test`. In mft_megatron/data the C++
# extension is named by Python's minor version: environments of the same minor version share it.
FIRST_PYTHON = $(shell for python in $(1); do $$python -c '$(2)' 2>/dev/null && echo $$python && break; done)
IS_NEWEST = import sys; sys.exit(not (3, 12) <= sys.version_info < (3, 14))
IS_OLDEST = import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))
PYENV = $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python)
PYTHON_NEWEST ?= $(call FIRST_PYTHON,python3.12 python3.13 python3 $(call PYENV,3.12) $(call PYENV,3.13),$(IS_NEWEST))
PYTHON_OLDEST ?= $(call FIRST_PYTHON,python3.10 python3.11 python3 $(call PYENV,3.10),$(IS_OLDEST))
NEWEST = VENV=.venv-newest PYTHON="$(PYTHON_NEWEST)" EXTRA=test
OLDEST = VENV=.venv-oldest PYTHON="$(PYTHON_OLDEST)" EXTRA=test CONSTRAINTS=constraints-oldest.txt

# Other releases of Megatron-Core than the pinned one, each in its folder, for tests that go from one to another.
OTHER_MEGATRON_CORE = 0.16.1 0.17.1 0.18.2
OTHERS = $(OTHER_MEGATRON_CORE:%=$(VENV)/megatron-core/%)
EMPTY =
SPACE = $(EMPTY) $(EMPTY)

# Each takes up to 2 GB and starts up to eight processes in turn; 0: no workers, one process, as pytest alone does.
TEST_WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo mft-vs-mixed test test-kernels test-all test-faults test-newest test-oldest test-with-others gpu-ready test-gpu bench-gpu \
	imports lint sanitize docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1	/p' Makefile | expand -t 14

setup: $(STAMP) ## create the virtual environment in VENV, install the pinned packages, build the C++ extension

demo: setup ## the main job on real input: tasks, tokenizer, training on four processes, resume, export, completion
	$(VENV)/bin/python examples/demo/run.py

mft-vs-mixed: setup ## losses, normalisations and balancers on unequal tasks and a tiny model, five seeds each; 25 minutes
	$(VENV)/bin/python examples/mft_vs_mixed/run.py

test: setup ## the tests of every change, by TEST_WORKERS processes (2)
	$(PYTEST) -m "not slow"

test-kernels: setup ## the tests of kernels with Triton, by its interpreter and compiled for GPUs that need not be here; installs Triton
	$(PIP_INSTALL) triton
	$(PYTEST) tests/mcore/kernels

test-all: setup ## all tests, those that take minutes too
	$(PYTEST)

# SEED and CHAIN repeat a chain of kills; KILLS=50 for a shorter round
test-faults: setup ## 200 times kill -9 at random instants of every kind of job, each resumed and compared; about 40 minutes
	FUZZ_ROUNDS=200 FUZZ_SEED=$(or $(SEED),1) $(PYTEST) tests/fuzz
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.faults.run $(KILLS:%=--kills %) $(SEED:%=--seed %) $(CHAIN:%=--chain %)

test-newest: ## the tests of every change on Python 3.12 or 3.13 with the newest Megatron-Core and torch, in .venv-newest
	@$(or $(PYTHON_NEWEST),false) -c '$(IS_NEWEST)' 2>/dev/null || { \
		echo "error: Python 3.12 or 3.13 is needed; name it, as in: make test-newest PYTHON_NEWEST=/path/to/python3.12"; exit 1; }
	@$(MAKE) --no-print-directory $(NEWEST) test-with-others

test-oldest: ## the tests of every change on Python 3.10 with the lower bounds of the dependencies and the build, in .venv-oldest
	@$(or $(PYTHON_OLDEST),false) -c '$(IS_OLDEST)' 2>/dev/null || { \
		echo "error: Python 3.10 or 3.11 is needed; name it, as in: make test-oldest PYTHON_OLDEST=/path/to/python3.10"; exit 1; }
	@$(MAKE) --no-print-directory $(OLDEST) test

test-with-others: setup $(OTHERS)
	MFT_OTHER_MEGATRON_CORE="$(subst $(SPACE),:,$(abspath $(OTHERS)))" $(PYTEST) -m "not slow"

$(OTHERS): | $(STAMP)
	rm -rf $@.part
	$(VENV)/bin/python -m pip install --disable-pip-version-check -q --no-deps --target $@.part megatron-core==$(notdir $@)
	mv $@.part $@

# An environment that has a CUDA torch already, used as it is: a vendor's container, a cluster's module.
GPU_PYTHON ?= python3
IN_PLACE = PYTHONPATH=".:$$PYTHONPATH" OMP_NUM_THREADS=1 $(GPU_PYTHON)

gpu-ready:
	@$(GPU_PYTHON) tests/gpu/ready.py

test-gpu: gpu-ready ## GPU against CPU, resumes and memory, on a GPU, with the packages that GPU_PYTHON has; about 3 minutes
	$(IN_PLACE) -m pytest -q -p no:cacheprovider tests/gpu

bench-gpu: gpu-ready ## speed of slices of 34B and 70B models and of the kernels on a GPU, with GPU_PYTHON; about 2 minutes
	$(IN_PLACE) benchmarks/gpu/run.py

imports: setup ## import every module of the package, which needs no more than the base dependencies
	$(VENV)/bin/python tests/packaging/import_every_module.py

lint: setup ## ruff's rules and formatting, mypy
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

# A copy of its own, so that the extension in use stays; the second round takes the code for compilers without builtins.
SANITIZED = build/sanitize
SANITIZERS = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
ASAN = $(shell $${CXX:-c++} -print-file-name=libasan.so) $(shell $${CXX:-c++} -print-file-name=libubsan.so)

sanitize: setup ## csrc built with ASan and UBSan, and its tests with that build
	for portable in "" "-DMFT_PORTABLE"; do \
		rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) || exit 1; \
		cp -r mft_megatron csrc tests setup.py pyproject.toml README.md LICENSE $(SANITIZED)/ || exit 1; \
		find $(SANITIZED)/mft_megatron -name '*.so' -delete; \
		(cd $(SANITIZED) \
			&& MFT_CXX_FLAGS="$(SANITIZERS) $$portable" $(abspath $(VENV))/bin/python setup.py -q build_ext --inplace \
			&& LD_PRELOAD="$(ASAN)" ASAN_OPTIONS=detect_leaks=0:handle_sigbus=0 PYTHONPATH=. \
				$(abspath $(VENV))/bin/python -m pytest -q -p no:cacheprovider tests/data/test_sample_index.py tests/data/test_mapped_files.py) || exit 1; \
	done

docs: setup ## write docs/ARGUMENTS.md from the options
	$(VENV)/bin/python -m mft_megatron.arguments.reference > docs/ARGUMENTS.md

clean: ## remove what the build, the tests and the demo left behind; the environment's packages stay
	rm -rf build dist demo_run mft_vs_mixed_run *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	rm -f $(STAMP) .venv-newest/$(INSTALLED) .venv-oldest/$(INSTALLED)
	find $(wildcard mft_megatron tests tools examples benchmarks) -name __pycache__ -prune -exec rm -rf {} +
	find mft_megatron -name '*.so' -delete

define CHECK_MACHINE
import os, shutil, sys, sysconfig
def need(holds, message):
    if not holds:
        sys.exit("error: " + message)
need((3, 10) <= sys.version_info < (3, 14), "Python 3.10, 3.11, 3.12 or 3.13 is needed and %s is %d.%d; name another one, as in: make setup PYTHON=python3.11 VENV=.venv-3.11" % ((sys.executable,) + sys.version_info[:2]))
try:
    import ensurepip, venv
except ImportError:
    need(False, "%s has no venv module; install it (on Debian and Ubuntu: apt install python3-venv)" % sys.executable)
compilers = [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]
need(any(map(shutil.which, filter(None, compilers))), "a C++ compiler is needed; install one (on Debian and Ubuntu: apt install g++) or set CXX")
need(os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")), "Python.h is needed to build the C++ extension; install Python's headers (on Debian and Ubuntu: apt install python3-dev)")
endef
export CHECK_MACHINE

# The pinned torch for the Python that runs this.
define PINNED_TORCH
import sys
from packaging.requirements import Requirement
pins = [Requirement(line.strip()) for line in open(sys.argv[1]) if line.startswith("torch==")]
versions = [str(pin.specifier)[2:] for pin in pins if not pin.marker or pin.marker.evaluate()]
if not versions:
    sys.exit("error: %s has no line torch==... for Python %d.%d; add one" % ((sys.argv[1],) + sys.version_info[:2]))
print(versions[0])
endef
export PINNED_TORCH

# Done once; done again when something it was made of has changed.
$(STAMP): pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*)
	@if [ -x $(VENV)/bin/python ]; then $(VENV)/bin/python -c "$$CHECK_MACHINE"; else $(PYTHON) -c "$$CHECK_MACHINE"; fi
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) setuptools wheel pybind11 packaging
	@torch=$$($(VENV)/bin/python -c "$$PINNED_TORCH" $(CONSTRAINTS)) || exit 1; \
	if $(VENV)/bin/python -m pip freeze | grep -q "^torch==$$torch\(+\|$$\)"; then \
		echo "torch $$torch is installed"; \
	elif nvidia-smi -L >/dev/null 2>&1; then \
		$(PIP_INSTALL) torch==$$torch; \
	else \
		echo "no NVIDIA GPU here: trying the CPU build of torch $$torch, about 200 MB"; \
		$(PIP_INSTALL) -q torch==$$torch+cpu 2>/dev/null \
			|| { echo "pip finds no CPU build; taking the standard one, which brings CUDA packages"; \
			     $(PIP_INSTALL) torch==$$torch; }; \
	fi
	$(PIP_INSTALL) -e ".[$(EXTRA)]"
	@touch $@
