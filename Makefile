# Everything a developer runs. .venv is made on first use; a change of the pins or of pyproject.toml renews it.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# A process for each core, with one thread each: tiny models have no use for more, and threads that wait fight.
TEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --dist loadfile

.PHONY: help demo test test-all check docs build clean

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

clean:  ## delete what make made
	rm -rf .venv demo dist build site src/*.egg-info

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# These ask for a torchvision, of which no build stands beside every torch: tests that need one say what stands in.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps open_clip_torch timm
	touch $(READY)
