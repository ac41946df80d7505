# shellcheck shell=bash
# Sourced by the batch scripts: runs steps that can be asked to stop, and requeues or holds the job.

asked='' # the signal that asked this job to stop
step=''  # the process id of the running srun
code=0   # srun's exit code, after `run_step`
readonly stopped=75 # as in launcher/exit_codes.py: the same command resumes
suspects=() # hosts that the job must not get again
# The job's id for SLURM's commands. The plain number of an array task may also mean the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

say() { echo "$(date '+%F %T') $*"; }

ask_to_stop() {
    trap '' USR1 TERM # a second signal must not interrupt the wait for the checkpoint
    asked=$1
    say "got $1: asking the ranks to save their work and stop"
    # srun forwards USR1 to all tasks of its step, and to nothing else in the job.
    [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM

# run_step COMMAND...: runs the command and returns when it has ended, even if a signal asks for a stop meanwhile.
# If a signal came before, the command is not started.
run_step() {
    code=138 # the code of a step that USR1 ended
    [[ -z $asked ]] || return 0
    code=0
    "$@" & # in the background, since bash runs traps only after a foreground command has ended
    step=$!
    # A signal between the test above and this line was not forwarded.
    [[ -z $asked ]] || kill -USR1 "$step" 2>/dev/null || true
    [[ -n $asked ]] || wait "$step" || code=$?
    if [[ -n $asked ]]; then
        ask_until_it_ends
        code=0
        wait "$step" || code=$? # the trap interrupted the first wait
    elif ((code != 0)) && is_preempted; then
        asked=TERM
        say "SLURM is preempting this job and has already asked the ranks to stop"
    fi
    step=''
}

# Repeat the signal, since srun drops one that comes while it launches its tasks. Ranks that received the first ignore others.
ask_until_it_ends() {
    local seconds=0
    while sleep 1 && kill -0 "$step" 2>/dev/null; do
        ((++seconds % 5)) || kill -USR1 "$step" 2>/dev/null || true
    done
}

# is_preempted: whether SLURM is preempting this start of the job. Without preempt_send_user_signal, SLURM signals the ranks
# but not this script, which would mistake their end for a failure.
is_preempted() {
    local facts
    facts=$(SLURM_TIME_FORMAT=standard of_slurm scontrol show job --oneliner "$job") || return 1
    # PreemptTime may belong to an earlier start. ISO 8601 times compare as strings.
    [[ $facts =~ \ StartTime=([0-9T:-]+) ]] || return 1
    local started=${BASH_REMATCH[1]}
    [[ $facts =~ \ PreemptTime=([0-9T:-]+) && ! ${BASH_REMATCH[1]} < $started ]]
}

# of_slurm COMMAND...: runs a SLURM command, and repeats it for up to a minute if the controller does not answer.
# A repeated command also succeeds if the first call took effect and only its answer was lost: the job is already requeued.
of_slurm() {
    local try errors said failed
    errors=$(mktemp)
    for try in 1 2 3 4 5 6; do
        failed=''
        "$@" 2>"$errors" || failed=1 # stderr is kept apart: a successful command may print warnings
        said=$(<"$errors")
        ((try == 1)) || [[ ! $said =~ 'pending execution' ]] || failed=''
        [[ -n $failed && $said =~ 'timed out'|'nable to contact'|'onnection' ]] || break
        ((try == 6)) || sleep 10
    done
    rm "$errors"
    [[ -z $said ]] || printf '%s\n' "$said" >&2
    [[ -z $failed ]]
}

# unless_slurm_ends_it: ends the script if SLURM is already ending the job.
unless_slurm_ends_it() {
    case $(of_slurm squeue --noheader --states=all --jobs="$job" --format=%T || true) in
        CANCELLED | COMPLETING)
            # A cancelled job must not be requeued.
            echo "SLURM is ending this job (cancelled, preempted or timed out); squeue --job=$job shows whether it" \
                "comes back; if not, the same sbatch line resumes from what is saved"
            exit "$code"
            ;;
    esac
}

# requeue: requeues the job, excludes the suspected hosts, and ends the script.
requeue() {
    trap '' USR1 TERM
    unless_slurm_ends_it
    say "requeueing job $job to resume"
    if ! of_slurm scontrol requeue "$job"; then
        echo "error: SLURM did not requeue this job; run the same sbatch line again to resume" >&2
        exit "$stopped"
    fi
    ((${#suspects[@]} > 0)) || exit 0
    # Only after the requeue, since SLURM rejects the list for a running job. The one list also holds earlier hosts.
    local excluded
    excluded=$(of_slurm squeue --noheader --states=all --jobs="$job" --format=%x) || excluded=''
    excluded=$(printf '%s\n' "${excluded/(null)/}" "${suspects[@]}" | paste --serial --delimiters=, | sed 's/^,//')
    if ! of_slurm scontrol update JobId="$job" ExcNodeList="$excluded"; then
        echo "error: the job is requeued, but may get ${suspects[*]} again; to exclude them:" \
            "scontrol update JobId=$job ExcNodeList=$excluded" >&2
        exit 0
    fi
    say "the job will not use ${suspects[*]} again; to allow it: scontrol update JobId=$job ExcNodeList="
    say "in all it excludes $excluded; if too few nodes remain, it waits (squeue --job=$job shows the reason)"
    exit 0
}

# hold: requeues the job in the held state, so that a user has to release it, and ends the script.
hold() {
    trap '' USR1 TERM
    unless_slurm_ends_it
    say "holding job $job; when the cause is fixed: scontrol release $job"
    if ! of_slurm scontrol requeuehold "$job"; then
        echo "error: SLURM did not requeue this job; when the cause is fixed, run the same sbatch line again" >&2
        exit "$stopped"
    fi
    exit 0
}
