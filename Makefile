# `make demo`, `make tables`, `make test` and `make audit` set up .venv on first use, with the interpreter PYTHON.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := output/demo-$(shell date +%Y%m%d-%H%M%S)

.PHONY: demo tables test audit help
.DELETE_ON_ERROR:

demo: $(VENV)/ready
	$(RUN) digits/train.py --output-dir $(DEMO)
	$(RUN) digits/test.py --checkpoint $(DEMO)/last.pt --energy
	$(RUN) -m analysis.firing_rates --checkpoint $(DEMO)/last.pt
	$(RUN) -m analysis.attention_masks --checkpoint $(DEMO)/last.pt
	$(RUN) -m analysis.curves $(DEMO) --output $(DEMO)/curves.png
	@echo
	@echo "The accuracy above is that of last.pt, the last epoch. best.pt is the epoch with the best accuracy on the test set."
	@echo "Its own accuracy is slightly too high, because the test set chose it. Pictures of this run:"
	@echo "      $(DEMO)/curves.png               loss and accuracy of each epoch"
	@echo "      $(DEMO)/last.predictions.png     test images with wrong answers"
	@echo "      $(DEMO)/attention_masks.png      tokens of a digit that pass the Q-K attention"
	@echo "      $(DEMO)/firing_rates.png         firing rate of each neuron layer"
	@echo "      $(DEMO)/last.energy.png          energy of each layer"
	@echo "docs/analyses.md explains them and the energy."
	@echo "Next: source $(VENV)/bin/activate"
	@echo "      python digits/train.py --help              every setting is a flag"
	@echo "      python digits/train.py --attention channel channel self --time-steps 2"
	@echo "      tensorboard --logdir output"

help:
	@echo "make demo     train and evaluate a small network on digits, in about 2 minutes (also plain make)"
	@echo "make tables   the paper's tables, with the runs in docs/results and output/"
	@echo "make test     linter and tests; one file: make test PYTEST_ARGS=tests/test_models.py"
	@echo "make audit    known vulnerabilities of the pinned packages"
	@echo "The first call sets up $(VENV) with $(PYTHON); another interpreter: make PYTHON=python3.12"

tables: $(VENV)/ready
	$(RUN) -m analysis.tables --results docs/results $(wildcard output)

test: $(VENV)/ready-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(RUN) -m pytest $(PYTEST_ARGS)

audit: $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	$(VENV)/bin/pip-audit --strict --disable-pip --no-deps -r requirements.txt -r requirements-dev.txt

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/ready: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
