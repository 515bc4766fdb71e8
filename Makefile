# make demo   builds, makes a 32-expert mixture of SmolLM2 (1.5 GB, once) and chats with it in 500 MB
# make test   builds once (package, native tests, stoker-bench; warnings are errors), lints, and runs
#             every test
# make lint   formatting, linting, types
# make bench  stoker against llama-cpp-python on the same file (installs the baseline: 5 minutes)
# make bench-offload  what each part of expert offloading is worth, in 1 GB (root; 2.9 GB of disk)
# make sanitize  the test suite under ASan + UBSan, the engine tests under TSan
# make neon   the native tests as aarch64 code under qemu-user
# make arm    stoker-bench as one static aarch64 program, for phones and boards; make arm-wheel: the package
# make instruction-counts  instructions a weight, NEON against AVX2 (qemu)
# make fuzz   the GGUF reader for FUZZ_SECONDS (600)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODEL ?= smollm2-135m-instruct
FUZZ_SECONDS ?= 600
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(JOBS)

SOURCES := pyproject.toml CMakeLists.txt $(shell find runtime offload kernels_cpu models mobile_bench export -type f -not -name '*.pyc')

.PHONY: demo test test-python test-native neon arm arm-wheel instruction-counts lint bench bench-offload sanitize fuzz clean

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.installed: $(VENV)/.python $(SOURCES)
	$(BIN)/python -m pip install --quiet .
	touch $@

# The one build: the package's core, the native tests and stoker-bench out of the same objects. What
# builds is in the environment, so that a later build begins where this one ended.
BUILD := build/dev
$(VENV)/.builders: $(VENV)/.python
	$(BIN)/python -m pip install --quiet 'scikit-build-core>=1.0.3' 'nanobind>=2.4' 'cmake>=3.26' ninja
	touch $@

$(VENV)/.dev: $(VENV)/.builders $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation \
	  -C build-dir=$(BUILD) -C cmake.define.STOKER_NATIVE_TESTS=ON -C cmake.define.STOKER_BENCH=ON \
	  -C cmake.define.STOKER_WERROR=ON '.[dev]'
	touch $(VENV)/.installed $@

# Mixtures that are made at first use, in the cache of models.
MADE = $(or $(STOKER_MODELS),$(if $(STOKER_CACHE),$(STOKER_CACHE)/models,$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/stoker/models))
DEMO = $(MADE)/smollm2-135m-32-experts.gguf
UP64 = $(MADE)/smollm2-135m-64-experts.gguf

demo: $(VENV)/.installed
	$(BIN)/stoker pull $(MODEL)
	test -f "$(DEMO)" || $(BIN)/stoker export upcycle $(MODEL) "$(DEMO)" --experts 32 --used 4
	$(BIN)/stoker run "$(DEMO)" --memory 500MB --plan --stats --chat --temperature 0 --max-tokens 128 "Why is the sky blue? Answer in two sentences."

test: lint test-native test-python

# A process a core, each with the tests of whole files.
test-python: $(VENV)/.dev
	$(BIN)/stoker pull $(MODEL)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test-native: $(VENV)/.dev
	$(BIN)/ctest --test-dir $(BUILD) --output-on-failure

neon:
	bash tests/native/run_neon.sh

arm:
	bash mobile_bench/native/build_arm.sh

arm-wheel:
	bash mobile_bench/native/build_arm.sh wheel

instruction-counts:
	$(PYTHON) mobile_bench/checks/instruction_counts.py

lint: $(VENV)/.dev
	bash tests/lint.sh $(BIN)

bench: $(VENV)/.dev
	$(BIN)/python -m stoker.mobile_bench.checks.compare --install-baseline $(MODEL)

bench-offload: $(VENV)/.dev
	$(BIN)/stoker pull $(MODEL)
	test -f "$(UP64)" || $(BIN)/stoker export upcycle $(MODEL) "$(UP64)" --experts 64 --used 4
	$(BIN)/python -m stoker.mobile_bench.checks.offload "$(UP64)"

sanitize: $(VENV)/.dev
	bash tests/sanitize.sh $(BIN)

fuzz: $(VENV)/.dev
	bash tests/fuzz/run.sh $(BIN) $(FUZZ_SECONDS)

clean:
	rm -rf build $(VENV)
