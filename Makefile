# make demo, make test: both set up everything by themselves, in .venv, from a bare clone.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo lint test test-slow test-old test-gpu test-peers results notebooks clean

demo: $(VENV)/installed
	$(RUN) train.py
	$(RUN) finetune.py

lint: $(VENV)/installed
	$(RUN) -m ruff check

test: $(VENV)/installed
	$(RUN) -m pytest -q tests -m "not slow and not old and not gpu" -n 2 --dist worksteal

test-slow: $(VENV)/installed
	$(RUN) -m pytest -q tests -m slow

test-old: $(VENV)/installed
	$(RUN) -m pytest -q tests -m old

test-gpu: $(VENV)/installed
	$(RUN) -m pytest -q tests -m gpu

# timm, transformers and tensorboard in an environment of their own, which sees all packages of the other
PEERS := .venv-peers
test-peers: $(PEERS)/installed
	$(PEERS)/bin/python -m pytest -q tests/test_peers.py tests/test_bench.py tests/test_weights.py tests/test_any_image.py tests/test_watch.py -m "not slow and not old and not gpu" -rs

$(PEERS)/installed: $(VENV)/installed
	$(PYTHON) -m venv $(PEERS)
	$(RUN) -c "import site; print(site.getsitepackages()[0])" > `$(PEERS)/bin/python -c "import site; print(site.getsitepackages()[0])"`/base.pth
	$(PEERS)/bin/python -m pip install -q timm transformers tensorboard
	touch $@

results: $(VENV)/installed
	$(RUN) experiments/report.py

notebooks: $(VENV)/installed
	$(RUN) notebooks/run.py

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(PEERS)
