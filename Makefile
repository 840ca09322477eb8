# `make demo` and `make test` do all the set-up; they need Python 3.11 or newer, a C++17 compiler and make.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

CXX_LIBRARY = $(filter-out csrc/bindings.cpp,$(wildcard csrc/*.cpp csrc/simd/*.cpp))
CXX_HEADERS = $(wildcard csrc/*.h csrc/simd/*.h tests/cpp/*.h)
CXX_TESTS = $(wildcard tests/cpp/*.cpp)

# The environment is whole once this file exists; it is made anew where the requirements or the C++ code have changed.
INSTALLED = $(VENV)/installed
INSTALLED_FROM = pyproject.toml setup.py constraints.txt csrc/bindings.cpp $(CXX_LIBRARY) $(filter csrc/%,$(CXX_HEADERS))

.PHONY: demo test test-all lint types sanitize bench clean
.DEFAULT_GOAL = test

demo: $(INSTALLED)
	$(BIN)/realign demo

test: $(INSTALLED)
	$(BIN)/pytest

test-all: $(INSTALLED)
	$(BIN)/pytest -m 'slow or not slow'

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror csrc/bindings.cpp $(CXX_LIBRARY) $(CXX_HEADERS) $(CXX_TESTS)

types: $(INSTALLED)
	$(BIN)/mypy --strict realign_fast

# Takes half an hour, and belongs on a machine that does nothing else.
bench: $(INSTALLED)
	$(BIN)/python bench/kernels.py --json bench/results/kernels.json
	$(BIN)/python bench/commands.py --json bench/results/commands.json
	$(BIN)/python bench/tables.py

# The extension goes first: setuptools would keep it where only compiler flags have changed.
$(INSTALLED): $(INSTALLED_FROM)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f realign_fast/_C.*.so
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[test]'
	touch $@

# Every file of tests/cpp is a program of its own, linked with the kernels.
SANITIZE = build/sanitize
SANITIZE_FLAGS = -std=c++17 -O1 -g -Wall -Wextra -Werror -Icsrc -pthread -ffp-contract=off \
  -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
LIBRARY_OBJECTS = $(CXX_LIBRARY:%.cpp=$(SANITIZE)/%.o)
TEST_PROGRAMS = $(CXX_TESTS:%.cpp=$(SANITIZE)/%)

sanitize: $(TEST_PROGRAMS)
	set -e; for program in $(TEST_PROGRAMS); do echo $$program; $$program; done

$(SANITIZE)/tests/cpp/%: $(SANITIZE)/tests/cpp/%.o $(LIBRARY_OBJECTS)
	$(CXX) $(SANITIZE_FLAGS) $^ -o $@

$(SANITIZE)/%.o: %.cpp $(CXX_HEADERS)
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE_FLAGS) -c $< -o $@

.SECONDARY:

clean:
	rm -rf build dist *.egg-info realign_fast/_C.*.so realign-demo
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(INSTALLED)
