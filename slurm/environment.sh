# shellcheck shell=bash
# Sourced by the batch scripts, with the project as the working folder: sets `python` and what every job needs.
# Here, and not in each script, so that a site has one place for its modules or its container.

venv=${LFM_VENV:-.venv}
if [[ -n ${LFM_VENV:-} ]]; then
    if [[ ! -x $venv/bin/python ]]; then
        echo "error: LFM_VENV is $venv, but there is no $venv/bin/python; name a folder that make setup (or python -m venv) made" >&2
        exit 2
    fi
elif ! compgen -G "$venv/complete-*" >/dev/null; then
    # Any stamp will do here: an environment that a pull has outdated is renewed by a person, not by a job that may
    # have no internet. The lock is for two jobs that a person submits to a fresh clone at once.
    echo "there is no $venv yet: making it once with make setup, on $(hostname), which needs the package index"
    if ! flock Makefile make setup; then
        echo "error: make setup failed (see above); where the compute nodes have no internet, run it on the login node first" >&2
        exit 2
    fi
fi
# shellcheck disable=SC2034 # the scripts that source this use it
python=$venv/bin/python

# A job never reaches for the internet: `lfm fetch` on a login node has brought what it needs.
export HF_HUB_OFFLINE=1
