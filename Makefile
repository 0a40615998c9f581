PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEPENDENCIES := setup.cfg setup.py pyproject.toml constraints.txt
OLDEST := build/oldest
MODEL := quickstart/SmolLM2-135M-Instruct/config.json
# Rooms whose tests call what dependencies change. The tests of other libraries need newer versions of their own.
OLDEST_TESTS := tests/bank tests/cards tests/data tests/lm tests/models tests/ops tests/recipe tests/test_train.py
# Accelerate would ask for as many threads as there are physical cores, half of what these small products can use.
THREADS := $(shell getconf _NPROCESSORS_ONLN)
# Huge pages spare a CPU the cost of touching fresh memory, a fifth of a training step.
RUN := THP_MEM_ALLOC_ENABLE=1 $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(THREADS)

.DEFAULT_GOAL := help

help:  ## Show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: .venv/quickstart.stamp  ## Train two SAEs and a transcoder on a real language model
	$(BIN)/python examples/prepare_quickstart.py
	$(RUN) -m sae_accel.train recipes/quickstart.yaml --training.overwrite_output_dir

test: .venv/test.stamp $(MODEL)  ## Run the tests
	$(BIN)/python -m pytest --numprocesses auto --dist loadscope

test-oldest: $(OLDEST)/test.stamp  ## Run most tests with the lowest version of each dependency
	$(OLDEST)/bin/python -m pytest --numprocesses auto --dist loadscope $(OLDEST_TESTS)

soak: .venv/test.stamp  ## Kill runs at 200 random moments, and fail every file operation of one (half an hour)
	for mode in "kills 200" "faults 1"; do rm -rf build/soak; HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python tests/runs/forced.py build/soak $$mode 2> /dev/null || exit 1; done

benchmark: .venv/test.stamp $(MODEL)  ## Compare training speed with sparsify on this machine
	$(BIN)/python benchmarks/throughput.py

style: .venv/test.stamp  ## Format the code
	$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

quality: .venv/test.stamp  ## Check the code's format and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

docs: .venv/docs.stamp  ## Build the documentation into build/site, and check its links
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

generated: .venv/test.stamp  ## Write the files that are made from the code: the recipes' schema, the command line's page
	$(BIN)/python -m sae_accel.train --schema > recipes/schema.json
	$(BIN)/python docs/command_line.py

clean:  ## Remove the environment and everything that was downloaded or made
	rm -rf .venv quickstart runs build *.egg-info .pytest_cache .ruff_cache .mypy_cache

$(MODEL): .venv/test.stamp
	$(BIN)/python examples/prepare_quickstart.py --model-only

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/quickstart.stamp: .venv/bin/python $(DEPENDENCIES)
	@echo "Installing sae_accel into .venv; this takes a few minutes the first time."
	$(INSTALL) torch
	$(INSTALL) --editable ".[quickstart]"
	@touch $@

.venv/test.stamp: .venv/bin/python $(DEPENDENCIES)
	@echo "Installing sae_accel and what its tests need into .venv; this takes a few minutes the first time."
	$(INSTALL) torch
	$(INSTALL) --editable ".[test]"
	@touch $@

$(OLDEST)/test.stamp: setup.cfg setup.py pyproject.toml constraints-oldest.txt
	@echo "Installing sae_accel with its oldest dependencies into $(OLDEST); this takes a few minutes the first time."
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt torch
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt \
		--editable ".[lora,plots,quantized,quickstart,tensorboard]" eai-sparsify==1.3.3 hypothesis jsonschema pytest pytest-timeout pytest-xdist
	@touch $@

.venv/docs.stamp: .venv/bin/python $(DEPENDENCIES)
	$(INSTALL) torch
	$(INSTALL) --editable ".[docs]"
	@touch $@

.PHONY: help quickstart test test-oldest docs soak benchmark style quality generated clean
