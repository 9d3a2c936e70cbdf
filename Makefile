# Everything that a fresh machine needs: `make demo` draws a picture, `make test` runs the suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tiny tensors want one thread; compiled modules are kept, because the tests start dozens of processes.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test test-all test-gpu fuzz notebooks docs check lint format clean

demo: $(VENV)/.installed
	mkdir -p out
	$(BIN)/mmdit generate "a large red circle above a blue star, on a white background" --output out/demo.png

test: $(VENV)/.test
	$(PYTEST) -n 2 --dist worksteal --quiet

# The same with whole notebooks and sweeps, an hour more on two cores; see tests/full.py.
test-all: $(VENV)/.test
	MMDIT_FULL=1 $(PYTEST) -n 2 --dist worksteal --quiet

# What needs a GPU, some minutes on one; with two GPUs of one host also what several ranks draw. Only files that have such
# tests are read, so that no other test's packages are needed.
test-gpu: $(VENV)/.test
	$(BIN)/python -m pytest -m gpu --quiet $$(grep -rlE --include='test_*.py' 'mark\.gpu' tests)

# An hour of generated input; what failed once is a regression case beside its generator.
fuzz: $(VENV)/.test
	MMDIT_FUZZ_SECONDS=$${MMDIT_FUZZ_SECONDS:-300} $(PYTEST) tests/fuzz -n 2 --quiet

# An API reference from the docstrings, to out/docs. pdoc sees only names that are loaded, and ours load when first used.
docs: $(VENV)/.docs
	$(BIN)/python -c "import mmdit, pdoc, pathlib; \
	  vars(mmdit).update({name: getattr(mmdit, name) for name in mmdit.__all__}); \
	  pdoc.render.configure(docformat='google'); \
	  pdoc.pdoc('mmdit', 'encoders', 'quant', 'samplers', output_directory=pathlib.Path('out/docs'))"
	@echo "wrote out/docs/index.html"

notebooks: $(VENV)/.notebooks
	$(BIN)/python notebooks/render.py

check: lint test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python tests/check_links.py

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.venv pyproject.toml constraints.txt
	@echo "Downloading torch and a dozen small packages into $(VENV): 0.9 GB on disk with the CPU build of torch, several"
	@echo "GB with CUDA (on Linux the package index gives that one; take the CPU build by PIP_INDEX_URL or pip's own"
	@echo "settings). The embedded model, 29 MB, is part of the repository; nothing else is downloaded."
	$(INSTALL) --editable .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(INSTALL) --editable ".[test]"
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(INSTALL) --editable ".[dev]"
	touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(INSTALL) --editable ".[docs]"
	touch $@

$(VENV)/.notebooks: $(VENV)/.installed
	$(INSTALL) --editable ".[notebooks]"
	touch $@

clean:
	rm -rf $(VENV) out dist .pytest_cache .mypy_cache .ruff_cache
