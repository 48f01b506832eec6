#!/bin/sh
# Installs clang 19, which the Metal host harness compiles kernels with. Does nothing where it cannot or need not be:
# not on x86-64 Linux, clang there already, no apt, or not root. Tests then say what is missing (and fail in CI).
set -eu

compiler=${METAL_HOST_CXX:-clang++-19}
if [ "$(uname -s)-$(uname -m)" != Linux-x86_64 ] || command -v "$compiler" >/dev/null; then
    exit 0
fi
hint="sudo apt-get install clang-19 (Debian 12 or newer, Ubuntu 24.04 or newer; for others see apt.llvm.org)"
if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "$compiler is missing, so the Metal kernels' tests cannot run. Install it: $hint" >&2
    exit 0
fi
apt-get update || true # one broken source among many is no reason to stop
DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends clang-19 ||
    echo "clang-19 could not be installed, so the Metal kernels' tests cannot run. Try: $hint" >&2
