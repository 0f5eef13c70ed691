# Everything a developer runs. .venv is made on first use; a change of the pins or of pyproject.toml renews it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# A process for each core, with one thread each: tiny models have no use for more, and threads that wait fight.
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --dist loadfile

.PHONY: help demo test test-all check docs build bench bench-gpu clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: $(READY)  ## draw a sample set, train a small CLIP on it, show before and after (under 5 minutes on 2 cores)
	$(BIN)/cytoclip demo --to demo

test: $(READY)  ## the default tests, on every core
	$(TEST)

test-all: $(READY)  ## the default tests and the slow ones
	$(TEST) -m ''

check: $(READY)  ## lint, format, types, layers, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m docs.render --check

docs: $(READY)  ## render the generated pages, and build the site into site/
	$(BIN)/python -m docs.render
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

build: $(READY)  ## wheel and sdist into dist/
	$(BIN)/python -m build

# One after the other, minutes each: about 40 in all on 2 free cores. Each says what it measured, and a JSON line last; one
# that fails, or misses what is wanted of it, ends no other.
bench: $(READY)  ## every measurement that a CPU can make; what is claimed of them is in bench/RESULTS.md
	-$(BIN)/python bench/peers.py
	-$(BIN)/python bench/mfu.py --end-to-end
	-$(BIN)/python bench/memory.py
	-$(BIN)/python bench/scaling.py
	-$(BIN)/python bench/traffic.py
	-$(BIN)/python bench/loader.py
	-$(BIN)/python bench/ranking.py
	-$(BIN)/python bench/check.py

# With whatever python is first there (PYTHON=…): a GPU machine has its own torch. cytoclip need not be installed. More
# models: GPU_MODELS="B/32 L/14", five minutes each.
GPU_MODELS ?= B/16
bench-gpu: export PYTHONPATH := src:$(PYTHONPATH)
bench-gpu:  ## the same for one GPU, about ten minutes: peers, share of the limit, LoRA, memory
	-$(PYTHON) bench/peers.py --gpu --seconds 270 --models $(GPU_MODELS)
	-$(PYTHON) bench/gpu.py --only plain compiled lora-compiled
	-$(PYTHON) bench/mfu.py --device cuda --models B/16 --compile --end-to-end
	-$(PYTHON) bench/memory.py --device cuda --loss 32768 65536 131072 --plain-loss 32768

# open_clip and timm ask for a torchvision, of which no build stands beside every torch: tests/stand_in.py says what stands
# in. timm lies apart, or accelerate's command would import it, and end there.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps open_clip_torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target .venv/apart timm
	touch $(READY)
