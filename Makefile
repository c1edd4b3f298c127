# The commands of a checkout; `make help` lists them. Each creates the virtual environment it needs and builds what
# changed, so that each works alone on a machine with Python >= 3.10, a C++20 compiler and make.

# The interpreter for the virtual environments, and the torch to build against: any requirement or options of
# pip install, for example TORCH='torch==2.11.0 --index-url ...' for the CPU wheels of another index.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
# Comparisons with other packages run the same library under the newest torch those packages have.
PEERS_VENV ?= .venv-peers
PEERS ?= torch==2.14.1 torchvision==0.29.1 onnxruntime onnx onnxscript opencv-python-headless
# The CUDA library is built with the machine's toolkit where there is one, else with PyPI's, and without a GPU.
CUDA_PACKAGES ?= 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-cccl==13.0.*' \
  'nvidia-cuda-runtime==13.0.*'
CUDA_ARCH ?= 8.0;9.0;10.0;12.0
# More arguments for pytest or the benchmarks: make test ARGS='tests/test_abi.py -x'
ARGS ?=
export MAX_JOBS ?= 2

BIN := $(VENV)/bin
PEERS_BIN := $(PEERS_VENV)/bin
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
CXX_FILES := $(shell find csrc tests/emu -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# The files that need torchvision or ONNX Runtime, and one that shows that the library loads there at all.
PEER_TESTS := $(shell grep -lE 'torchvision|onnxruntime' tests/test_*.py) tests/test_abi.py
ASAN := build/asan
# What wheel and source distribution are made of, libraries aside.
DISTRIBUTED := $(shell find benches csrc docs hdrops models tests -type f -not -name '*.so' -not -path '*/__pycache__/*') \
  $(wildcard *.py *.md *.toml *.in) LICENSE NOTICE Makefile

.PHONY: help machine build emulator demo test lint format bench bench-models test-asan peers peers-environment cuda \
  cuda-toolkit gpu wheel clean distclean
.DELETE_ON_ERROR:

help:
	@echo 'make demo       build, and make an HDR image from a bracket of photographs'
	@echo 'make test       build, and run the tests'
	@echo 'make test-asan  a reduced set of tests under AddressSanitizer and UBSan'
	@echo 'make peers      the comparisons with torchvision and ONNX Runtime, in an environment of their own'
	@echo 'make cuda       compile the CUDA library for all architectures, without a GPU, and check it'
	@echo 'make gpu        on a machine with a GPU: build, test, sanitize and measure with the torch of $$(PYTHON)'
	@echo 'make bench      the benchmarks against torchvision, ONNX Runtime and OpenCV, in that environment too'
	@echo 'make bench-models  whole systems with the kernels and without'
	@echo 'make lint       ruff, mypy and clang-format; make format applies the formats'
	@echo 'make build      build and install into $(VENV) in place'
	@echo 'make emulator   build the CUDA kernels for the host, on which the tests run them'
	@echo 'make wheel      wheel and source distribution in dist/'
	@echo 'make clean      remove what was built; make distclean removes the environments too'

demo: build
	$(BIN)/python -m hdrops.demo $(ARGS)

test: build
	$(BIN)/pytest $(ARGS)

bench: peers-environment
	$(PEERS_BIN)/python -m benches $(ARGS)
	$(PEERS_BIN)/python -m benches.memory

bench-models: peers-environment
	$(PEERS_BIN)/python -m benches.models $(ARGS)

build: hdrops/_C.so $(VENV)/installed

# The tests build what they lack of it; beforehand all cores do.
emulator: build
	$(BIN)/python tests/emu/build.py

# What the machine must bring, one line for each thing that may be missing.
machine:
	@command -v $(PYTHON) >/dev/null || \
	  { echo 'hdrops: no $(PYTHON) here. Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3 ...'; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "hdrops: needs Python 3.10 or newer, $(PYTHON) is $$($(PYTHON) -V 2>&1). Install one and name it: make PYTHON=python3.12 ..."; exit 1; } >&2
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo 'hdrops: $(PYTHON) lacks its venv module. Install it (Debian, Ubuntu: apt install python3-venv)'; exit 1; } >&2
	@echo '#include <concepts>' | $${CXX:-c++} -std=c++20 -x c++ -fsyntax-only - 2>/dev/null || \
	  { echo "hdrops: no C++20 compiler ($${CXX:-c++}). Install GCC 11 or Clang 14, or newer (Debian, Ubuntu: apt install g++), or set CXX"; exit 1; } >&2

$(VENV)/created: | machine
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --upgrade pip 'setuptools>=77.0.3' ninja numpy
	@touch $@

# Written anew only when another TORCH is asked for, which then is installed.
$(VENV)/torch: force | $(VENV)/created
	@echo '$(TORCH)' | cmp -s - $@ || \
	  { echo 'installing $(TORCH)'; $(BIN)/python $(PIP_INSTALL) $(TORCH) && echo '$(TORCH)' > $@; }

# ninja compiles what changed; the install finds the objects there and links only.
hdrops/_C.so: setup.py $(VENV)/torch $(shell find csrc -type f) | machine
	$(BIN)/python setup.py -q build_ext --inplace

$(VENV)/installed: pyproject.toml setup.py $(VENV)/torch | hdrops/_C.so
	$(BIN)/python $(PIP_INSTALL) --no-build-isolation --editable '.[photo,test]'
	@touch $@

$(VENV)/linters: pyproject.toml | $(VENV)/created
	$(BIN)/python $(PIP_INSTALL) --group lint
	@touch $@

lint: $(VENV)/linters $(VENV)/torch
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# A second copy of the package, built with the sanitizers and with the AVX-512 kernels alone, lowered to AVX2, so that
# the same run on every x86-64 machine. The sanitizers' run-time libraries must be in the process before python's own
# allocations; libstdc++ must be too, or the first C++ exception ends the process.
test-asan: build
	rm -rf $(ASAN)
	HDROPS_CUDA=0 HDROPS_SANITIZE=1 HDROPS_LOWERED_ISA=only $(BIN)/python setup.py -q build --build-lib $(ASAN)
	HDROPS_SANITIZE=1 $(BIN)/python tests/emu/build.py
	LD_PRELOAD="$$(for name in libasan.so libubsan.so libstdc++.so; do $${CXX:-c++} -print-file-name=$$name; done | tr '\n' ' ')" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(ASAN) HDROPS_SANITIZE=1 \
	  $(BIN)/pytest -m asan -p no:cacheprovider $(ARGS)

$(PEERS_VENV)/created: | machine
	$(PYTHON) -m venv $(PEERS_VENV)
	$(PEERS_BIN)/python $(PIP_INSTALL) --upgrade pip
	@touch $@

# Written anew only when other PEERS are asked for.
$(PEERS_VENV)/peers: force | $(PEERS_VENV)/created
	@echo '$(PEERS)' | cmp -s - $@ || echo '$(PEERS)' > $@

$(PEERS_VENV)/installed: $(PEERS_VENV)/peers dist/.made
	$(PEERS_BIN)/python $(PIP_INSTALL) $(PEERS) "$$(echo dist/hdrops-*.whl)[photo,test]"
	$(PEERS_BIN)/python $(PIP_INSTALL) --force-reinstall --no-deps dist/hdrops-*.whl
	@touch $@

peers-environment: $(PEERS_VENV)/installed

peers: peers-environment
	$(PEERS_BIN)/pytest $(PEER_TESTS) $(ARGS)

cuda-toolkit: peers-environment
	@test -n "$$CUDA_HOME" || command -v nvcc >/dev/null || $(PEERS_BIN)/python $(PIP_INSTALL) $(CUDA_PACKAGES)

# Links against the peers' torch, which is one for CUDA; runs beside the CPU library of this checkout.
cuda: cuda-toolkit
	HDROPS_CUDA=only HDROPS_CUDA_ARCH='$(CUDA_ARCH)' $(PEERS_BIN)/python setup.py -q build_ext --inplace
	PYTHONPATH=. HDROPS_CUDA_TESTS=1 $(PEERS_BIN)/pytest tests/test_cuda_library.py tests/test_abi.py $(ARGS)

# No environment of its own: a machine with a GPU has its torch, and may have no network.
gpu:
	PYTHONPATH=. $(PYTHON) -m benches.gpu $(ARGS)

wheel: dist/.made

dist/.made: hdrops/_C.so $(VENV)/installed $(DISTRIBUTED)
	rm -rf build/lib* dist
	$(BIN)/python -m pip wheel -qq --disable-pip-version-check --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python setup.py -q sdist
	@touch $@

clean:
	rm -rf build dist demo *.egg-info hdrops/*.so
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(PEERS_VENV)

force:
