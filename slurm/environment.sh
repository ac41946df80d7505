# shellcheck shell=bash
# Sourced by the batch scripts, with the project as the working folder: sets `python` and what every job needs.
# Here, and not in each script, so that a site has one place for its modules or its container.

fail() {
    echo "error: $1" >&2
    exit 2
}

named=()
for name in LFM_VENV LFM_CONDA LFM_IMAGE; do
    [[ -z ${!name:-} ]] || named+=("$name")
done
((${#named[@]} < 2)) || fail "${named[*]} are set, and each names a Python; unset all but one"

# Modules first: conda or apptainer may come with one.
if [[ -n ${LFM_MODULES:-} ]]; then
    # Other people's shell code, which need not be written for these.
    set +eu
    for file in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh "${MODULESHOME:-}/init/bash"; do
        # shellcheck disable=SC1090 # a site's file
        type module &>/dev/null || [[ ! -r $file ]] || source "$file"
    done
    type module &>/dev/null || fail "LFM_MODULES is $LFM_MODULES, but there is no module command on $(hostname); unset it, or call sbatch from a shell that has one"
    for name in $LFM_MODULES; do
        module load "$name" || fail "LFM_MODULES names $name, which module load does not find on $(hostname); module avail lists what is there"
    done
    set -eu
fi

if [[ -n ${LFM_IMAGE:-} ]]; then
    [[ -r $LFM_IMAGE ]] || fail "LFM_IMAGE is $LFM_IMAGE, which is not a file that can be read here; name an Apptainer image"
    container=$(command -v apptainer || command -v singularity) ||
        fail "LFM_IMAGE is set, but there is no apptainer on $(hostname); name its module in LFM_MODULES, or unset LFM_IMAGE"
    python=("$container" exec --bind "$PWD" --pwd "$PWD")
    if command -v nvidia-smi >/dev/null; then
        python+=(--nv) # the host's GPUs and driver
    fi
    python+=("$LFM_IMAGE" python3)
elif [[ -n ${LFM_CONDA:-} ]]; then
    command -v conda >/dev/null || fail "LFM_CONDA is set, but there is no conda on $(hostname); name its module in LFM_MODULES, or put it on the PATH"
    set +u # activation scripts of packages read what may be unset
    eval "$(conda shell.bash hook)"
    conda activate "$LFM_CONDA" || fail "LFM_CONDA is $LFM_CONDA, which conda cannot activate; conda env list shows what is there"
    set -u
    python=("$(command -v python)")
elif [[ -n ${LFM_VENV:-} ]]; then
    [[ -x $LFM_VENV/bin/python ]] ||
        fail "LFM_VENV is $LFM_VENV, but there is no $LFM_VENV/bin/python; name a folder that make setup (or python -m venv) made"
    python=("$LFM_VENV/bin/python")
else
    if ! compgen -G '.venv/complete-*' >/dev/null; then
        # Any stamp will do here: an environment that a pull has outdated is renewed by a person, not by a job that may
        # have no internet. The lock is for two jobs that a person submits to a fresh clone at once.
        echo "there is no .venv yet: making it once with make setup, on $(hostname), which needs the package index"
        flock Makefile make setup ||
            fail "make setup failed (see above); where the compute nodes have no internet, run it on the login node first"
    fi
    # shellcheck disable=SC2034 # the scripts that source this use it
    python=(.venv/bin/python)
fi

# A job never reaches for the internet: `lfm fetch` on a login node has brought what it needs.
export HF_HUB_OFFLINE=1
# NCCL says why a connection fails, rather than only that one did.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
if [[ -n ${LFM_INTERFACE:-} ]]; then
    for name in ${LFM_INTERFACE//,/ }; do
        grep -q "^ *$name:" /proc/net/dev || fail "LFM_INTERFACE names $name, which $(hostname) does not have; ip -brief addr lists what it has"
    done
    export NCCL_SOCKET_IFNAME=$LFM_INTERFACE GLOO_SOCKET_IFNAME=$LFM_INTERFACE
fi
# Steps get all of that, also where sbatch was told to pass on nothing of the shell (--export=NONE) or a few names.
export SLURM_EXPORT_ENV=ALL
# Variables of another launcher, from the shell that called sbatch, would name a wrong rank.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE

# Where the ranks meet: sets `hosts`, and exports MASTER_ADDR and MASTER_PORT.
find_master() {
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${hosts[0]} # rank 0 runs there, and so does the batch script
    # By job and by restart, since an attempt that has just died may still hold its port; below the ephemeral ports.
    export MASTER_PORT=$((15000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0}) % 15000))
    while (: <"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
        MASTER_PORT=$((MASTER_PORT + 1)) # somebody else listens there
    done
}
