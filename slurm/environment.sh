# shellcheck shell=bash
# Sourced by the batch scripts from the project's folder: sets `python` and the environment of every job.
# A shared file gives a site one place for its modules or its container.

fail() {
    echo "error: $1" >&2
    exit 2
}

named=()
for name in LFM_VENV LFM_CONDA LFM_IMAGE; do
    [[ -z ${!name:-} ]] || named+=("$name")
done
((${#named[@]} < 2)) || fail "${named[*]} are set, but a job uses only one Python; unset all but one"

# Modules first: one may provide conda or apptainer.
if [[ -n ${LFM_MODULES:-} ]]; then
    # The site's shell code may not work under these options.
    set +eu
    for file in /etc/profile.d/modules.sh /etc/profile.d/lmod.sh "${MODULESHOME:-}/init/bash"; do
        # shellcheck disable=SC1090 # a site's file
        type module &>/dev/null || [[ ! -r $file ]] || source "$file"
    done
    type module &>/dev/null || fail "LFM_MODULES is $LFM_MODULES, but there is no module command on $(hostname); unset it, or run sbatch from a shell that has the command"
    for name in $LFM_MODULES; do
        module load "$name" || fail "LFM_MODULES names $name, which module load cannot load on $(hostname); module avail lists the modules"
    done
    set -eu
fi

if [[ -n ${LFM_IMAGE:-} ]]; then
    [[ -r $LFM_IMAGE ]] || fail "LFM_IMAGE is $LFM_IMAGE, which is not a readable file on $(hostname); name an Apptainer image"
    container=$(command -v apptainer || command -v singularity) ||
        fail "LFM_IMAGE is set, but there is no apptainer on $(hostname); name its module in LFM_MODULES, or unset LFM_IMAGE"
    python=("$container" exec --bind "$PWD" --pwd "$PWD")
    if command -v nvidia-smi >/dev/null; then
        python+=(--nv) # the host's GPUs and driver
    fi
    python+=("$LFM_IMAGE" python3)
elif [[ -n ${LFM_CONDA:-} ]]; then
    command -v conda >/dev/null || fail "LFM_CONDA is set, but there is no conda on $(hostname); name its module in LFM_MODULES, or put it on the PATH"
    set +u # activation scripts of packages may read unset variables
    eval "$(conda shell.bash hook)"
    conda activate "$LFM_CONDA" || fail "LFM_CONDA is $LFM_CONDA, which conda cannot activate; conda env list shows the environments"
    set -u
    python=("$(command -v python)")
elif [[ -n ${LFM_VENV:-} ]]; then
    [[ -x $LFM_VENV/bin/python ]] ||
        fail "LFM_VENV is $LFM_VENV, but there is no $LFM_VENV/bin/python; name a folder that make setup (or python -m venv) made"
    python=("$LFM_VENV/bin/python")
else
    if ! compgen -G '.venv/complete-*' >/dev/null; then
        # Any stamp is accepted: the user renews an outdated environment, since a job may have no internet.
        # The lock is for two jobs that start in a fresh clone at the same time.
        echo "there is no .venv yet: creating it with make setup on $(hostname), which needs the package index"
        flock Makefile make setup ||
            fail "make setup failed (see above); if the compute nodes have no internet, run it on the login node first"
    fi
    # shellcheck disable=SC2034 # the scripts that source this use it
    python=(.venv/bin/python)
fi

# Jobs run without internet: `lfm fetch` downloads what they need on a login node.
export HF_HUB_OFFLINE=1
# Makes NCCL report why a connection fails, not only that it failed.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
if [[ -n ${LFM_INTERFACE:-} ]]; then
    for name in ${LFM_INTERFACE//,/ }; do
        grep -q "^ *$name:" /proc/net/dev || fail "LFM_INTERFACE names $name, which $(hostname) does not have; ip -brief addr lists its interfaces"
    done
    export NCCL_SOCKET_IFNAME=$LFM_INTERFACE GLOO_SOCKET_IFNAME=$LFM_INTERFACE
fi
# Pass all of this on to the job's steps, even if sbatch was called with --export=NONE or a few names.
export SLURM_EXPORT_ENV=ALL
# Variables of another launcher, inherited from the shell that called sbatch, would give a wrong rank.
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE LOCAL_SIZE

# find_master: sets `hosts`, and exports MASTER_ADDR and MASTER_PORT for the ranks' rendezvous.
find_master() {
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${hosts[0]} # the host of rank 0 and of the batch script
    # Different for each job and restart, since a failed attempt may still hold its port. Below the ephemeral ports.
    export MASTER_PORT=$((15000 + (SLURM_JOB_ID * 8 + ${SLURM_RESTART_COUNT:-0}) % 15000))
    while (: <"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do
        MASTER_PORT=$((MASTER_PORT + 1)) # the port is in use
    done
}
