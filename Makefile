# Every target does its own set-up in $(VENV) and finds it again the next time. PYTHON=python3.13 takes another Python.
PYTHON ?= python3
VENV ?= .venv
NEWEST ?= $(shell tools/newest_python.sh)
WORKDIR ?= runs/quickstart
BIN := $(VENV)/bin
export PYTHONPATH := $(CURDIR)

# The Python of requirements.txt has that lock, every later one requirements-newest.txt. Their first lines name it.
OLDEST := $(shell sed -n '1s/.*Python \([0-9]*\.[0-9]*\).*/\1/p' requirements.txt)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
LOCK := $(if $(filter $(OLDEST),$(VERSION)),requirements.txt,requirements-newest.txt)
# Python compiles what is imported, when it is: --no-compile leaves out the rest.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

.PHONY: quickstart seeds test test-newest test-newest-quick test-slow quick assets smollm2 libtpu cuda-compiler peers \
  docs lint clean

quickstart: $(VENV)/ready  ## a tiny policy learns to reason, in minutes
	$(BIN)/python -m rlpr_jax.train --config=configs/quickstart.py --workdir=$(WORKDIR)

seeds: $(VENV)/ready  ## the quickstart over three seeds, with the random-reward control beside it
	for seed in 0 1 2; do for kind in reference random; do \
	  $(BIN)/python -m rlpr_jax.train --config=configs/quickstart.py --workdir=runs/$$kind-$$seed \
	    --config.seed=$$seed --config.reward.kind=$$kind || exit; \
	done; done

test: assets  ## everything but the slow tests
	$(PYTEST)

test-newest:  ## the same with the versions of requirements-newest.txt, in an environment of its own
	@test -n "$(NEWEST)" || exit 2
	$(MAKE) test VENV=.venv-newest PYTHON=$(NEWEST)

test-newest-quick:  ## a part of it: imports, kernels, models, sampling, one run from end to end
	@test -n "$(NEWEST)" || exit 2
	$(MAKE) quick VENV=.venv-newest PYTHON=$(NEWEST)

quick: $(VENV)/ready-dev
	$(PYTEST) tests/test_command_line.py tests/test_versions.py tests/models/test_kernels.py \
	  tests/models/test_transformer.py tests/test_train.py::test_whole_run_writes_finite_metrics_rollouts_and_report
	rm -rf runs/quick
	$(BIN)/python -m rlpr_jax train --workdir=runs/quick --config.steps=2 --config.warm_start.steps=20 \
	  --config.evaluation.prompts=40

test-slow: assets peers $(VENV)/ready-docs $(VENV)/ready-slow  ## the slow tests alone
	$(BIN)/python -m pytest -m slow

assets: $(VENV)/ready-dev  ## a real model and real tokenizers for the tests; what cannot be had is skipped there
	$(BIN)/python tools/smollm2.py || echo "tests of the real model will be skipped"
	$(BIN)/python tools/fetch_tokenizers.py

smollm2: $(VENV)/ready-dev  ## SmolLM2-135M-Instruct as a Hugging Face directory under .cache
	$(BIN)/python tools/smollm2.py

# Aside, not in $(VENV): there jax would take them for devices. Their versions follow the jax that is installed.
libtpu: $(VENV)/ready  ## the TPU compiler under .cache, for rlpr_jax.plan
	rm -rf .cache/libtpu
	$(INSTALL) --no-deps --target .cache/libtpu \
	  "$$($(BIN)/python -c 'from rlpr_jax.planning import compiler; print(*compiler.requirements("tpu"))')"

cuda-compiler: $(VENV)/ready  ## the GPU compiler under .cache, for rlpr_jax.plan
	rm -rf .cache/cuda
	$(INSTALL) --no-deps --target .cache/cuda \
	  $$($(BIN)/python -c 'from rlpr_jax.planning import compiler; print(*compiler.requirements("cuda"))')

# Aside as well, and without the torch, jax and numpy that they would bring.
peers: $(VENV)/ready  ## TRL, tunix and verl under .cache, for the tests of examples/ and for benchmarks/
	rm -rf .cache/trl .cache/tunix .cache/verl
	$(INSTALL) --no-deps --target .cache/trl trl==1.16.0 accelerate==1.15.0
	$(INSTALL) --no-deps --target .cache/tunix google-tunix==0.1.7 antlr4-python3-runtime==4.9.3 clu etils \
	  google-metrax hf_transfer kagglehub kagglesdk llvmlite numba omegaconf perfetto pylatexenc python-dotenv qwix \
	  sentencepiece tenacity wrapt
	$(INSTALL) --no-deps --target .cache/verl verl==0.9.1 accelerate==1.15.0 aiohappyeyeballs aiohttp \
	  aiosignal antlr4-python3-runtime==4.9.3 attrs codetiming frozenlist hydra-core multidict omegaconf orjson propcache \
	  pylatexenc pyvers ray tensordict==0.10.0 torchdata yarl

# Without the variable the theme says at each build that it is maintained until May 2027.
docs: $(VENV)/ready-docs  ## the documentation as a site, site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(VENV)/ready-dev  ## style, and types of the modules that pyproject.toml lists
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .venv-newest .cache runs site

# Begun anew when it is another Python's. The stamp is named after its version.
$(VENV)/python-$(VERSION):
	@$(PYTHON) -c 'import sys; oldest = tuple(map(int, "$(OLDEST)".split("."))); sys.exit(sys.version_info < oldest)' || \
	  { echo "$(PYTHON): expected Python $(OLDEST) or later, as in make PYTHON=python3.13" >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

# What is imported as rlpr_jax there is this checkout.
$(VENV)/ready: $(LOCK) $(VENV)/python-$(VERSION)
	$(INSTALL) -r $(LOCK)
	$(BIN)/python -c 'import pathlib, sysconfig; path = sysconfig.get_path("purelib"); \
	  pathlib.Path(path, "rlpr_jax.pth").write_text("$(CURDIR)\n")'
	touch $@

# torch is the CPU build where pip knows an index that has it; the one of the package index has CUDA beside it, 3 GB.
$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	torch=$$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' requirements-dev.txt); \
	  test $(LOCK) != requirements.txt || $(INSTALL) "$$torch+cpu" 2>/dev/null || true
	$(INSTALL) -r requirements-dev.txt
	touch $@

# Notebooks, and a browser's driver: the browser itself is the system's own.
$(VENV)/ready-slow: requirements-slow.txt $(VENV)/ready-dev
	$(INSTALL) -c $(LOCK) -r requirements-slow.txt
	touch $@

$(VENV)/ready-docs: requirements-docs.txt $(VENV)/ready
	$(INSTALL) -c $(LOCK) -r requirements-docs.txt
	touch $@
