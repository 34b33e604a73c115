# Two commands do everything on a fresh machine with Python >= 3.11 and a C++ compiler:
#   make demo    install, then compare the norms on real handwritten digits
#   make test    install, then run the tests
# Each target works alone from a fresh clone and does nothing twice.

PYTHON ?= python3
BIN := .venv/bin
PACKAGE := .venv/.package
INSTALLED := .venv/.installed
CSRC := $(wildcard csrc/*/*.*)
CPP := $(CSRC) $(wildcard src/layernorm/gpu/persistent/*.cu* benchmarks/*/*.cu) $(wildcard tests/*/*.cpp tests/gpu/persistent/emulator/*)
NATIVE_SOURCES := CMakeLists.txt $(CSRC)

.PHONY: install demo test persistent sanitize wheel lint format docs clean
.PHONY: gpu gpu-contact gpu-tests gpu-checks gpu-checks-of-tests gpu-benchmarks

install: $(INSTALLED)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "layernorm needs Python >= 3.11; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

# PyTorch first and pinned. The kernels are compiled in this environment and not in one of pip's, so that what
# has been compiled is not compiled again.
BUILD_TOOLS := 'scikit-build-core>=0.11,<2' 'cmake>=3.26' 'ninja>=1.11'
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
$(PACKAGE): .venv/bin/python pyproject.toml $(NATIVE_SOURCES)
	$(PIP) torch==2.13.0 $(BUILD_TOOLS)
	$(PIP) --no-build-isolation --editable '.[experiments]'
	@$(BIN)/layernorm info | grep '^compiled'
	@touch $@

# What the tests, linters and docs need too, which is several times as large.
$(INSTALLED): $(PACKAGE)
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(PACKAGE)
	$(BIN)/layernorm compare digits --jobs 2
	$(BIN)/layernorm compare digits-rows --jobs 2

# OPTIONS are pytest's: `make test OPTIONS=--cov` reports coverage.
test: install
	$(BIN)/python -m pytest -n auto $(OPTIONS)

# The frozen kernels' own tests, which others run only where a file of theirs has changed.
persistent: install
	LAYERNORM_TEST_PERSISTENT=1 $(BIN)/python -m pytest -n auto tests/gpu/persistent
	$(BIN)/python -m tests.gpu.persistent.passed

# The recurrent kernels, and loops, by several threads under ThreadSanitizer, which wants addresses that are not
# random; then the tests of the compiled kernels under AddressSanitizer and
# UndefinedBehaviorSanitizer. The package built with them is in a folder of its own, and so is the
# Python that runs it: .venv's would import the editable installation, whatever comes first on its path.
SANITIZE := $(CURDIR)/build/sanitize
SANITIZED_PYTHON = PYTHONPATH=$(SANITIZE)/site:$(wildcard $(CURDIR)/.venv/lib/python3*/site-packages) \
	LD_PRELOAD="$(foreach name,asan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(SANITIZE)/venv/bin/python
sanitize: install
	@mkdir -p $(SANITIZE)
	$(CXX) -std=c++20 -O1 -g1 -fsanitize=thread -DLAYERNORM_ISA=threads -DLAYERNORM_SANITIZE -ffp-contract=off -Wno-psabi -Icsrc \
		tests/recurrent/threads.cpp $(addprefix csrc/binding/,parallel.cpp status.cpp) $(wildcard csrc/recurrent/*.cpp) -o $(SANITIZE)/threads
	setarch $(shell uname -m) -R $(SANITIZE)/threads
	$(BIN)/python -m venv --without-pip $(SANITIZE)/venv
	LAYERNORM_NATIVE=1 CXX=$(CXX) $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --upgrade --target $(SANITIZE)/site -C build-dir=$(SANITIZE)/cmake \
		-C install.strip=false -C cmake.define.LAYERNORM_SANITIZE=ON .
	@$(SANITIZED_PYTHON) -c 'from layernorm import ops; path = ops.native.__file__; \
		assert b"__asan_init" in open(path, "rb").read(), path; print("sanitized:", path)'
	$(SANITIZED_PYTHON) -m pytest -n auto --exitfirst --capture sys $(wildcard tests/norms/test_norm*.py) \
		$(wildcard tests/recurrent/test_recurrent_*.py) $(addprefix tests/recurrent/test_,activations.py gates.py resets.py spec.py) \
		$(wildcard tests/streaming/test_streaming*.py) tests/ops/test_extension.py -k 'not (interpreted or looped or test_float32 or opcheck or both_orders or leaks)'

# Where there is a GPU, with a Python that has PyTorch and Triton, and pytest if the tests are to run: nothing is
# installed. Results go to OUT. Parts are targets too, of less than ten minutes each but for the last; one that
# fails does not stop the others. The checkers run the persistent kernels by a stage of the first contact.
OUT ?= build/gpu
GPU := CUBLAS_WORKSPACE_CONFIG=:4096:8 TRITON_INTERPRET=0 PYTHONPATH=$(CURDIR)/src:$(CURDIR)
option = $(shell $(PYTHON) -c 'import importlib.util as u; print(u.find_spec("$(1)") and "$(2)" or "")')
GPU_PYTEST = $(PYTHON) -m pytest -o filterwarnings=default $(call option,pytest_timeout,--timeout 100)
GPU_TESTS := tests/norms/test_norm_kernels.py tests/gpu $(wildcard tests/benchmarks/test_gpu_[nr]*.py)
gpu:
	@$(MAKE) --keep-going --no-print-directory gpu-contact gpu-tests gpu-checks gpu-benchmarks gpu-checks-of-tests
gpu-contact:
	$(GPU) $(PYTHON) -m benchmarks first_contact --out $(OUT)
gpu-tests:
	@mkdir -p $(OUT)
	$(GPU) timeout 540 $(GPU_PYTEST) $(call option,xdist,-n 12) $(GPU_TESTS) -k 'on_gpu or gpu' > $(OUT)/tests.txt 2>&1; \
		code=$$?; tail -n 3 $(OUT)/tests.txt; exit $$code
gpu-checks:
	@mkdir -p $(OUT)/sanitizers
	@export $(GPU) LAYERNORM_TIME_LIMIT=60; code=0; for tool in memcheck racecheck synccheck; do \
		command -v compute-sanitizer > /dev/null || continue; \
		check="compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all"; \
		for cell in lstm gru; do \
			timeout 90 $$check $(PYTHON) -m benchmarks.first_contact.stages --only-right --hidden 256 --batches 9 \
				persistent:$$cell:bfloat16 > $(OUT)/sanitizers/$$tool-$$cell.txt 2>&1 || code=1; \
			tail -n 1 $(OUT)/sanitizers/$$tool-$$cell.txt; done; done; exit $$code
gpu-checks-of-tests:
	@for tool in memcheck racecheck; do command -v compute-sanitizer > /dev/null || continue; export $(GPU) LAYERNORM_TIME_LIMIT=600; \
		check="compute-sanitizer --tool $$tool --error-exitcode 1 --target-processes all $(GPU_PYTEST)"; \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 $$check tests/norms/test_norm_kernels.py \
			-k 'on_gpu and (1025 or add_forms or strides)' && \
		$$check tests/gpu/recurrent -m sanitized || exit 1; done
gpu-benchmarks:
	$(GPU) $(PYTHON) -m benchmarks gpu --out $(OUT) --resume

# One wheel for every Python from 3.11 and every PyTorch, on Linux with glibc 2.28 (2018) or newer. Built anew,
# and the same bytes each time.
wheel: export SOURCE_DATE_EPOCH := $(shell git log -1 --format=%ct)
wheel: install
	rm -rf build/wheel dist
	LAYERNORM_NATIVE=1 CXXFLAGS="$(CXXFLAGS) -ffile-prefix-map=$(CURDIR)=." $(BIN)/python -m pip wheel --quiet --no-deps \
		--no-build-isolation --wheel-dir build/wheel -C build-dir=build/wheel/cmake \
		-C cmake.define.LAYERNORM_OLD_GLIBC=ON .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --plat manylinux_2_28_$(shell uname -m) --wheel-dir dist build/wheel/*.whl

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv build site
