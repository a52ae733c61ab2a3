# Every target does its own set-up in .venv and finds it again the next time.
PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/quickstart
export PYTHONPATH := $(CURDIR)

.PHONY: quickstart seeds test test-slow assets smollm2 libtpu cuda-compiler lint clean

quickstart: .venv/ready  ## a tiny policy learns to reason, in minutes
	$(BIN)/python -m rlpr_jax.train --config=configs/quickstart.py --workdir=$(WORKDIR)

seeds: .venv/ready  ## the quickstart over three seeds, with the random-reward control beside it
	for seed in 0 1 2; do for kind in reference random; do \
	  $(BIN)/python -m rlpr_jax.train --config=configs/quickstart.py --workdir=runs/$$kind-$$seed \
	    --config.seed=$$seed --config.reward.kind=$$kind || exit; \
	done; done

test: assets  ## everything but the slow tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: assets  ## the slow tests alone
	$(BIN)/python -m pytest -m slow

assets: .venv/ready-dev  ## a real model and real tokenizers for the tests; what cannot be had is skipped there
	$(BIN)/python tools/smollm2.py || echo "tests of the real model will be skipped"
	$(BIN)/python tools/fetch_tokenizers.py

smollm2: .venv/ready-dev  ## SmolLM2-135M-Instruct as a Hugging Face directory under .cache
	$(BIN)/python tools/smollm2.py

libtpu: .venv/ready  ## the TPU compiler under .cache, for rlpr_jax.plan: in .venv jax would take this for a TPU
	test -d .cache/libtpu || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target .cache/libtpu libtpu==0.0.42.1

cuda-compiler: .venv/ready  ## the GPU compiler under .cache, for rlpr_jax.plan
	test -d .cache/cuda || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  --target .cache/cuda jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .cache runs

# Python compiles what is imported, when it is: --no-compile leaves out the rest.
.venv/ready: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -r requirements-dev.txt
	touch $@
