# make demo, make test: both set up everything by themselves, in .venv, from a bare clone.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test test-slow test-gpu results notebooks clean

demo: $(VENV)/installed
	$(RUN) train.py
	$(RUN) finetune.py

test: $(VENV)/installed
	$(RUN) -m pytest -q tests -m "not slow and not gpu"

test-slow: $(VENV)/installed
	$(RUN) -m pytest -q tests -m slow

test-gpu: $(VENV)/installed
	$(RUN) -m pytest -q tests -m gpu

results: $(VENV)/installed
	$(RUN) experiments/report.py

notebooks: $(VENV)/installed
	$(RUN) notebooks/run.py

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV)
