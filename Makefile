# `make test` does all the set-up; it needs Python 3.11 or newer, a C++17 compiler and make.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# A compiler that fails is an error here, and not an installation without the extension.
export REALIGN_FAST_REQUIRE_EXTENSION = 1

EXTENSION_FILES = $(wildcard csrc/*.cpp csrc/*.h csrc/simd/*.cpp csrc/simd/*.h)
CXX_TESTS = $(wildcard tests/cpp/test_*.cpp)
CXX_FILES = $(EXTENSION_FILES) $(CXX_TESTS) $(wildcard tests/cpp/*.h tests/cpp/emulated/*.h)

# The environment is whole once this file exists; it is made anew where the requirements or the C++ code have changed.
INSTALLED = $(VENV)/installed
INSTALLED_FROM = pyproject.toml setup.py constraints.txt $(EXTENSION_FILES)

.PHONY: test test-all wheel demo bench bench-full studies docs lint types sanitize clean
.DEFAULT_GOAL = test

# What the extension does, and what stands on it, once more without the extension: by `make test-all`.
PLAIN = $(addprefix tests/test_,alignment.py bank.py cli.py covariance.py file_kernels.py io_bad_input.py io_formats.py \
  io_fuzz.py io_writer.py kernels.py moments.py stages.py)

# The GPU kernels are compiled in one process and interpreted in another: Triton does either.
INTERPRETED = $(wildcard tests/test_triton_*.py) tests/test_kernel_values.py tests/test_gpu_bench.py
# Tests wait for one thread or for other processes most of the time; those of a file share what it sets up. The files go
# in the order of tests/conftest.py.
SPREAD = -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(INSTALLED)
	$(BIN)/pytest $(SPREAD)
	TRITON_INTERPRET=1 $(BIN)/pytest $(SPREAD) $(INTERPRETED)

test-all: $(INSTALLED)
	$(BIN)/pytest $(SPREAD) -m 'slow or not slow'
	REALIGN_FAST_NO_EXTENSION=1 $(BIN)/pytest $(SPREAD) $(PLAIN)
	TRITON_INTERPRET=1 $(BIN)/pytest $(SPREAD) $(INTERPRETED)

wheel:
	PYTHON=$(PYTHON) .ci/wheel

demo: $(INSTALLED)
	$(BIN)/realign demo --overwrite

# Leave the machine alone meanwhile. Ten minutes; `bench-full` takes an hour, adds to the figures and writes the README's.
PEERS = $(VENV)/peers
bench: $(PEERS)
	$(BIN)/pytest bench

bench-full: $(PEERS)
	$(BIN)/pytest bench --size full --record -m 'slow or not slow'
	$(BIN)/python bench/tables.py

# What is no matter of speed: what the maps do to real embeddings, and whether aligned text stands in for pairs.
studies: $(PEERS)
	$(BIN)/python bench/strength.py --json bench/results/strength.json
	$(BIN)/python bench/alignments.py --json bench/results/alignments.json
	$(BIN)/python bench/settle.py --json bench/results/settle.json
	$(BIN)/python bench/tables.py

# Pages of the public modules, and what each command says of itself.
DOCS = build/docs
DOCUMENTED = realign_fast $(addprefix realign_fast.,alignment data nn ray distributed export encode benchmark geometry \
	geometry.metrics geometry.neighbors geometry.frame geometry.spectra geometry.two_sample geometry.centroids \
	geometry.protocol revision revision.data revision.training revision.generation)
COMMANDS = fit stats merge apply convert inspect verify report bench export embed pretrain finetune generate demo

# pdoc does not find the names that a NamedTuple's annotations mean.
docs: $(INSTALLED)
	rm -rf $(DOCS)
	$(BIN)/python -W error -W 'ignore:Error parsing type annotation ForwardRef' \
		-m pdoc --docformat numpy --no-show-source --output-directory $(DOCS) $(DOCUMENTED)
	set -e; for command in $(COMMANDS); do $(BIN)/realign $$command --help; echo; done > $(DOCS)/commands.txt

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

types: $(INSTALLED)
	$(BIN)/mypy --strict realign_fast

# The C++ code without Python, watched for reads and writes outside of memory and for undefined behaviour.
SANITIZE = -std=c++17 -Wall -Wextra -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc -pthread
SANITIZED = $(patsubst csrc/%.cpp,build/sanitize/%.o,$(filter-out csrc/bindings.cpp,$(filter %.cpp,$(EXTENSION_FILES))))
SANITIZED_TESTS = $(patsubst tests/cpp/%.cpp,build/sanitize/%,$(CXX_TESTS))

sanitize: $(SANITIZED_TESTS) build/sanitize/test_parallel_threads
	set -e; for program in $^; do $$program; done

build/sanitize/test_parallel_threads: tests/cpp/test_parallel.cpp tests/cpp/check.h csrc/parallel.cpp csrc/parallel.h
	mkdir -p $(@D)
	$(CXX) $(filter-out -fsanitize%,$(SANITIZE)) -fsanitize=thread $(filter %.cpp,$^) -o $@

build/sanitize/%.o: csrc/%.cpp $(filter %.h,$(EXTENSION_FILES)) Makefile
	mkdir -p $(@D)
	$(CXX) $(SANITIZE) -c $< -o $@

$(SANITIZED_TESTS): build/sanitize/%: tests/cpp/%.cpp tests/cpp/check.h $(SANITIZED)
	$(CXX) $(SANITIZE) $< $(SANITIZED) -o $@

# The extension goes first: setuptools would keep it where only compiler flags have changed.
$(INSTALLED): $(INSTALLED_FROM)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f realign_fast/_C.*.so
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $@

$(PEERS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peers,train]'
	touch $@

clean:
	rm -rf build dist *.egg-info realign_fast/_C.*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(INSTALLED) $(PEERS)
