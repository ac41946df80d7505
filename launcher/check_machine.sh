#!/bin/sh
# Check what `make setup` needs before it can install anything; each error names its fix.
python=$1
fail() {
    echo "error: $1" >&2
    exit 1
}
case $PWD in *[[:space:]]*) fail "the path $PWD has a space, which breaks pip's scripts; move the project" ;; esac
[ -n "$python" ] || fail "there is no python3.11; install it, or name one: make setup PYTHON=/path/to/python3.11"
command -v "$python" >/dev/null || fail "there is no $python; name an existing one: make setup PYTHON=/path/to/python3.11"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is older than Python 3.11; name a newer one: make setup PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot create virtual environments; on Debian: apt-get install python3-venv"
