# make demo, make test: both set up everything by themselves, in .venv, from a bare clone.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo lint test test-all test-old test-gpu test-peers results notebooks clean

demo: $(VENV)/installed
	$(RUN) train.py
	$(RUN) finetune.py

lint: $(VENV)/installed
	$(RUN) -m ruff check

PYTEST := -m pytest -q tests -n 2 --dist worksteal

# what a newcomer and a developer run: five minutes on two cores
test: $(VENV)/installed
	$(RUN) $(PYTEST) -m "not slow and not old and not gpu"

# what `make test` leaves out
test-all: $(VENV)/installed
	$(RUN) $(PYTEST) -m "(slow or old) and not gpu and not peers"
	$(MAKE) test-peers

test-old: $(VENV)/installed
	$(RUN) $(PYTEST) -m old

test-gpu: $(VENV)/installed
	$(RUN) -m pytest -q tests -m gpu

# the libraries that tests compare with, in an environment of their own, which sees all packages of the other
PEERS := .venv-peers
test-peers: $(PEERS)/installed
	$(PEERS)/bin/python $(PYTEST) -m "peers and not gpu"

$(PEERS)/installed: $(VENV)/installed
	$(PYTHON) -m venv $(PEERS)
	$(RUN) -c "import site; print(site.getsitepackages()[0])" > `$(PEERS)/bin/python -c "import site; print(site.getsitepackages()[0])"`/base.pth
	$(PEERS)/bin/python -m pip install -q timm transformers tensorboard pycocotools
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
