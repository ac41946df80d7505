#!/bin/sh
# What `make setup` needs before it can install anything: each lack is one sentence with its fix.
python=$1
fail() {
    echo "error: $1" >&2
    exit 1
}
case $PWD in *[[:space:]]*) fail "the path $PWD has a space, with which pip's scripts do not start; move the project" ;; esac
[ -n "$python" ] || fail "there is no python3.11; install it, or name one: make setup PYTHON=/path/to/python3.11"
command -v "$python" >/dev/null || fail "there is no $python; name an existing one: make setup PYTHON=/path/to/python3.11"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is older than Python 3.11; name a newer one: make setup PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments; on Debian: apt-get install python3-venv"
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
    fail "$python has no header files (Python.h), which DeepSpeed's operators need; on Debian: apt-get install python3-dev"
command -v "${CXX:-c++}" >/dev/null || fail "there is no C++ compiler, which DeepSpeed's operators need; on Debian: apt-get install g++"
if command -v nvidia-smi >/dev/null && ! command -v nvcc >/dev/null && [ ! -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ]; then
    fail "there is a GPU but no CUDA compiler (nvcc), which DeepSpeed's optimizer needs; load your site's CUDA module or set CUDA_HOME"
fi
