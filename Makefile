# Two commands do all the set-up on a fresh machine (Python >= 3.9, g++, perhaps nvcc):
#   make run     build, validate quickly, then train on real text with our optimizers beside torch's
#   make test    every layer of tests, two files at a time (WORKERS= for one)
# Options: PYTHON=python3.12  CMAKE_ARGS=-DSTEEPEST_CUDA=OFF  DEMO="--steps 50"  PYTEST="-k adamw"

PYTHON ?= python3
VENV   ?= .venv
DEMO   ?=
GALLERY ?=
PYTEST ?=
# Test files run side by side; a file stays in one process, for what its tests compile together.
WORKERS ?= -n 2 --dist loadfile
# The versions that the tests run with here.  The package itself asks for torch>=2.9 only.
TORCH  := torch==2.13.0
TRITON := triton==3.9.0
# Libraries of training whose examples and checkpoints are tested.  A test of one that cannot be had is skipped, by name.
LIBRARIES ?= "transformers>=5" "accelerate>=1.10" "lightning>=2.5" "bitsandbytes>=0.49"

py := $(VENV)/bin/python
sources := CMakeLists.txt setup.py pyproject.toml $(shell find csrc cmake -type f) $(wildcard pyext/*.cpp pyext/*.h)

.PHONY: run test exhaustive build bench gallery lint format clean validate mutants fuzz

run: build
	$(py) -m steepest info
	$(py) -m steepest validate --quick
	$(py) -m steepest demo $(DEMO)

test: build $(VENV)/.libraries
	$(py) -m pytest tests -m "not interpret and not exhaustive" $(WORKERS) $(PYTEST)
	TRITON_INTERPRET=1 $(py) -m pytest tests -m interpret $(WORKERS) $(PYTEST)

# Every Triton variant on four architectures, of which `make test` takes those of each kernel that need most registers;
# inverse roots of every family and condition at 512 and 1024 rows, of which it takes a sample.
exhaustive: build
	$(py) -m pytest tests -m exhaustive $(PYTEST)

bench: build
	mkdir -p out
	$(py) -m pytest bench --benchmark-json=out/bench.json $(PYTEST)

# All examples in their default sizes, two at a time (8 minutes on two cores), and the page of examples/README.md.
gallery: build
	$(py) examples/gallery.py run $(GALLERY)
	$(py) examples/gallery.py write

validate: build
	$(py) -m steepest validate

fuzz: build
	STEEPEST_FUZZ=10000 $(py) -m pytest tests/cpu/test_fuzz.py $(PYTEST)

# At most 14 minutes at a time; status 2 says that some are left, and the next call goes on with them.
# MUTANTS="--count" says what is known, MUTANTS="--only adam.h" takes some files.
mutants: build
	$(py) tests/mutants/run.py --minutes 14 $(MUTANTS)

lint: $(VENV)/.tools
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.tools
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

build: $(VENV)/.build

# An interpreter that already has torch (a GPU machine's) keeps it; otherwise the pinned build is installed.
$(VENV)/.tools: pyproject.toml Makefile
	test -x $(py) || { $(PYTHON) -c "import torch" 2>/dev/null \
	  && $(PYTHON) -m venv --system-site-packages $(VENV) || $(PYTHON) -m venv $(VENV); }
	$(py) -c "import torch" 2>/dev/null || $(py) -m pip install -q $(TORCH)
	$(py) -c "import triton" 2>/dev/null || $(py) -m pip install -q $(TRITON)
	$(py) -m pip install -q "setuptools>=68" wheel "pybind11>=2.13" "cmake>=3.22" ninja numpy \
	  rich matplotlib pytest pytest-benchmark pytest-xdist hypothesis scikit-learn expecttest ruff
	touch $@

# Wheels only, and none that would put other versions of torch, triton and numpy in the place of those that are there.
# Where one cannot be installed (no network, an old Python) this says so and goes on; the next call tries again.
$(VENV)/.libraries: $(VENV)/.tools Makefile
	@$(py) -c "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions() \
	  if d.name in ('torch', 'triton', 'numpy')), sep='\n')" > $(VENV)/constraints.txt
	@missing=; for library in $(LIBRARIES); do \
	  $(py) -m pip install -q --only-binary :all: --retries 1 --timeout 15 -c $(VENV)/constraints.txt "$$library" \
	    || { missing="$$missing $$library"; echo "not installed, its tests are skipped: $$library"; }; \
	done; test -n "$$missing" || touch $@

$(VENV)/.build: $(VENV)/.tools $(sources)
	PATH="$(abspath $(VENV))/bin:$$PATH" STEEPEST_BUILD_DIR=build/cmake CMAKE_GENERATOR=Ninja CMAKE_ARGS="$(CMAKE_ARGS)" \
	  $(py) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build dist out pyext/lib pyext/include pyext/_C*.so *.egg-info $(VENV)/.build
