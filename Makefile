PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.14.1 torchvision==0.29.1
NBVAL = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --nbval --nbval-sanitize-with tests/notebooks/sanitize.cfg -n 2 --dist loadscope
WORKERS ?= $(if $(filter cuda%,$(DEVICE)),7,2)
NUMBERED := $(sort $(wildcard notebooks/0*.ipynb))
OTHERS := $(sort $(wildcard notebooks/ablations/*.ipynb notebooks/complexity/*.ipynb))

.DEFAULT_GOAL := help
.PHONY: help reproduce ablations record test test-all bench bench-gpu site slides students lint lab clean

help:  ## this page
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(VENV)/.ready: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "upclose needs Python 3.11 or newer with venv; '$(PYTHON)' is not. Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module; install your system's python3-venv package" >&2; exit 1; }
	@echo "making $(VENV): once, from the package index, some minutes and about 6 GB (torch)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[cluster,dev,notebooks]'
	@touch $@

reproduce: $(VENV)/.ready  ## run the numbered notebooks on Birdlets into results/<date>/ (DEVICE=cuda: on a GPU)
	$(BIN)/upclose run --workers $(WORKERS) $(addprefix -p device=,$(DEVICE)) $(NUMBERED:notebooks/%.ipynb=params/birdlets/%.yaml)

ablations: $(VENV)/.ready  ## run the ablation and complexity notebooks
	$(BIN)/upclose run --workers 2 $(OTHERS:notebooks/%.ipynb=params/birdlets/%.yaml)

record: $(VENV)/.ready  ## run every notebook at the size that the claims rest on: 5 hours of a core an encoder, FAIR's ablation a night (DEVICE=cuda: on a GPU)
	$(BIN)/upclose run --workers $(WORKERS) $(addprefix -p device=,$(DEVICE)) $(wildcard params/recorded/*.yaml)

test: $(VENV)/.ready  ## the tests, and nbval over the numbered notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile
	$(NBVAL) $(NUMBERED)

test-all: test  ## the same, the slow tests, and nbval over solutions and ablations
	$(BIN)/python -m pytest -m 'slow'
	$(BIN)/python -m pytest --hypothesis-profile many tests/test_properties.py
	$(NBVAL) notebooks/solutions $(OTHERS)

bench: $(VENV)/.ready  ## benchmarks, as ratios measured in one run
	@for file in $(filter-out %/bench_gpu.py,$(wildcard tests/benchmarks/bench_*.py)); do echo; echo "== $$file"; $(BIN)/python $$file || exit 1; done

bench-gpu: $(VENV)/.ready  ## the core on a GPU, each measure beside its limit, into results/benchmarks-gpu.md
	$(BIN)/python tests/benchmarks/bench_gpu.py

site: $(VENV)/.site  ## the book, into site/, from the notebooks as they are committed
	$(BIN)/python -m sphinx -q -W --keep-going -d .doctrees -b html notebooks site
	$(BIN)/python -m upclose.explorer site/explorer
	$(BIN)/python notebooks/students.py site/students

slides: site  ## the numbered notebooks as slides, into site/slides/
	$(BIN)/python notebooks/slides.py site/slides

students: $(VENV)/.ready  ## the exercises as notebooks with gaps, into students/
	$(BIN)/python notebooks/students.py students

$(VENV)/.site: $(VENV)/.ready
	$(BIN)/python -m pip install -q -e '.[cluster,dev,notebooks,site]'
	@touch $@

lint: $(VENV)/.ready  ## mend style and check imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python notebooks/slides.py --tag
	$(BIN)/lint-imports

lab: $(VENV)/.ready  ## open the notebooks
	$(BIN)/jupyter lab notebooks

clean:  ## remove .venv and caches; results and banks stay
	rm -rf $(VENV) site .doctrees .pytest_cache .ruff_cache .import_linter_cache
