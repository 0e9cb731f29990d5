# make help says what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
# A further index to take torch from. https://download.pytorch.org/whl/cpu has the CPU build, where pip would choose a
# CUDA build of several gigabytes.
TORCH_INDEX ?=
LAYOUT ?= single
SEED ?= 0
XRL_FUZZ_TIMES ?= 20
XRL_FUZZ_SEED ?= 0

STAMP := $(VENV)/.setup-done
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt MANIFEST.in $(wildcard csrc/*) $(wildcard csrc/*/*)

.PHONY: help setup demo test test-fast test-slow test-cluster test-sanitized fuzz check check-static bench-setup clean
.DEFAULT_GOAL := help

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

setup: $(STAMP) ## a virtual environment in .venv with xrl in it (TORCH_INDEX=URL: where torch is)

$(STAMP): $(BUILD_FILES)
	$(PYTHON) -m venv $(VENV)
	# torch first, so that what asks for it later finds it there and takes no other build.
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@
	@echo "Ready. To use xrl in this shell: source $(VENV)/bin/activate"

demo: setup ## train a tiny model with GRPO and show what it learned (LAYOUT=single|tp2pp2|tp2pp2dp2, SEED=0)
	$(BIN)/python examples/demo.py --layout $(LAYOUT) --seed $(SEED)

test: setup test-fast test-slow ## every test that needs no GPU and no other host, the fast ones first

# Two tests at a time, a thread each; those that measure how soon a whole run ends, one by one.
PYTEST := $(BIN)/python -m pytest -q
ALONE := OMP_NUM_THREADS=1 $(PYTEST)
PARALLEL := $(ALONE) -n 2 --dist=worksteal

test-fast: setup
	$(PARALLEL) -m "not slow and not gpu and not cluster and not fuzz"

test-slow: setup
	$(PARALLEL) -m "slow and not alone and not gpu and not cluster and not fuzz"
	$(ALONE) -m "slow and alone and not gpu and not cluster and not fuzz"

test-cluster: setup ## hosts with odd names and little shared memory (as root), and many runs killed, stopped and hung
	$(PYTEST) -m cluster

# The package once more, with csrc built to end the process at the first access to memory that is wrong.
SANITIZED := build/sanitized
SANITIZED_TESTS ?= tests/fuzz/test_kernels.py tests/kernels tests/weights/test_checksum.py
SANITIZED_SELECT ?= not slow and not gpu and not fuzz
# Triton's tests start compilers, which are not what is looked at.
SANITIZED_PYTEST := -n 2 --dist=worksteal -o pythonpath="$(SANITIZED) ." --ignore-glob='*triton*' \
	--ignore=tests/kernels/test_cuda_build.py

$(SANITIZED)/.built: $(STAMP)
	rm -rf $(SANITIZED)
	XRL_SANITIZE=address,undefined XRL_WITH_CUDA=OFF \
		$(BIN)/python -m pip install --quiet --no-deps --target $(SANITIZED)/built .
	touch $@

test-sanitized: $(SANITIZED)/.built ## tests of the kernels under GCC's address and undefined-behaviour sanitizers
	rm -rf $(SANITIZED)/xrl && cp -r xrl $(SANITIZED)/ && rm -f $(SANITIZED)/xrl/_C.*
	cp $(SANITIZED)/built/xrl/_C.* $(SANITIZED)/xrl/
	export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)"; \
	export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2; \
	export PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/$(SANITIZED); \
	$(BIN)/python -c "import sys, xrl._C; sys.exit('$(SANITIZED)' not in xrl._C.__file__)" && \
	$(PYTEST) $(SANITIZED_PYTEST) -m "$(SANITIZED_SELECT)" $(SANITIZED_TESTS)

fuzz: setup ## hostile input of every kind, more of it than `make test` tries (XRL_FUZZ_TIMES=20, XRL_FUZZ_SEED=0)
	XRL_FUZZ_TIMES=$(XRL_FUZZ_TIMES) XRL_FUZZ_SEED=$(XRL_FUZZ_SEED) $(PYTEST) --timeout=3600 -m "not gpu" tests/fuzz
	XRL_FUZZ_TIMES=$(XRL_FUZZ_TIMES) XRL_FUZZ_SEED=$(XRL_FUZZ_SEED) $(MAKE) test-sanitized SANITIZED_SELECT="not gpu"

check: check-static test-fast ## what a change must pass: lint, format, types, import floors, fast tests

check-static: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-setup: setup ## what the benchmarks compare with
	$(BIN)/python -m pip install --quiet -e ".[bench]"

clean: ## remove what was built, the environment too
	rm -rf $(VENV) build dist *.egg-info xrl/*.so .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
