# make setup | chat | test | test-browser | check | bench | train-demo: each makes what it needs first and may be stopped and run again at any time.
# Settings: PYTHON (3.11 or newer), TORCH (what pip is asked for), MODEL and PROMPT (chat), ARGS (test, bench), JOBS (test processes),
# OPENBLAS (a library) and BLAS_THREADS (its threads in chat and bench).

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH ?= torch==2.13.0
JOBS ?= 2
BENCHES ?= decode
OPENBLAS ?= $(firstword $(shell ls /usr/lib/*/openblas-pthread/libopenblas.so.0 2>/dev/null))
BLAS_THREADS ?= 2
# The prompt reaches the shell through its environment, just as it was typed.
export BMOJO_PROMPT := $(value PROMPT)
unexport PROMPT

# MLX's Linux wheel brings a slow reference BLAS: put OpenBLAS before it where there is one.
PRELOAD = $(if $(OPENBLAS),env LD_PRELOAD="$(OPENBLAS)")

.PHONY: help setup chat test test-browser clang check bench train-demo clean

help:
	@echo 'make setup               install everything into $(VENV)'
	@echo 'make chat                talk to a small real model; PROMPT="..." asks once, MODEL=DIR takes another model'
	@echo 'make test                run the tests'
	@echo 'make test-browser        try the chat page in Chromium (chromium and chromedriver must be installed)'
	@echo 'make check               lint, format, types, import rules'
	@echo 'make bench               measure this machine'
	@echo 'make train-demo          text to a tiny trained model, minutes on a CPU, into build/train-demo'
	@echo 'make clean               remove $(VENV) and caches'

setup: $(READY)

chat: $(READY)
	@OPENBLAS_NUM_THREADS=$(BLAS_THREADS) $(PRELOAD) $(BIN)/bmojo-edge chat $(if $(MODEL),"$(MODEL)") $(if $(BMOJO_PROMPT),--prompt "$$BMOJO_PROMPT")

test: $(READY) clang
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(PRELOAD) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-browser: $(READY)
	OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1 $(PRELOAD) $(BIN)/python -m pytest -m browser tests/browser $(ARGS)

# Compiles the Metal kernels for this CPU, in tests only (metal_kernels/README.md).
clang:
	@sh metal_kernels/host/install_clang.sh

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/lint-imports

bench: $(READY)
	@for bench in $(BENCHES); do OPENBLAS_NUM_THREADS=$(BLAS_THREADS) $(PRELOAD) $(BIN)/python apps/bench/$$bench.py $(ARGS) || exit; done

train-demo: $(READY)
	$(PRELOAD) sh scripts/train_demo.sh $(BIN) build/train-demo

clean:
	rm -rf $(VENV) dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp comes last: a setup that was stopped starts again and finds most of its work done.
$(READY): pyproject.toml scripts/setup.sh
	@VENV="$(VENV)" PYTHON="$(PYTHON)" TORCH="$(TORCH)" sh scripts/setup.sh
	@touch $@
