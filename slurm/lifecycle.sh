# shellcheck shell=bash
# Sourced by the batch scripts: a step that can be asked to stop, and the job's way back into the queue.

asked='' # the signal that asked this job to stop
step=''  # the process of the srun that works
code=0   # srun's exit code, after `run_step`
suspects=() # hosts that the job should not get again
# What SLURM's commands know this job by. The number of one task of an array is also the whole array's.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

say() { echo "$(date '+%F %T') $*"; }

ask_to_stop() {
    trap '' USR1 TERM # once: a second signal must not cut short the wait for the checkpoint
    asked=$1
    say "got $1: asking the ranks to save what they have and stop"
    # srun hands USR1 on to all tasks of its step, and to nothing else of the job.
    [[ -z $step ]] || kill -USR1 "$step" 2>/dev/null || true
}
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop TERM' TERM

# run_step COMMAND...: runs it, and returns when it has ended, at a signal too; not at all where one came before.
run_step() {
    code=0
    [[ -z $asked ]] || return 0
    "$@" & # bash runs a trap only when its foreground command has ended
    step=$!
    # A signal between the test above and this line found no step to tell.
    [[ -z $asked ]] || kill -USR1 "$step" 2>/dev/null || true
    wait "$step" || code=$?
    if [[ -n $asked ]]; then
        code=0
        wait "$step" || code=$? # a trap cuts a wait short; this one lasts until srun has ended
    fi
    step=''
}

# requeue: the same job again, on other hosts than the suspects; ends the script.
requeue() {
    trap '' USR1 TERM
    # Whoever cancels the job ends it: its ranks stop at a signal all the same, but it must not come back.
    case $(squeue --noheader --states=all --jobs="$job" --format=%T || true) in
        CANCELLED | COMPLETING)
            echo "the job was cancelled; the same sbatch line goes on from what is saved"
            exit "$code"
            ;;
    esac
    say "requeueing job $job to go on"
    if ! scontrol requeue "$job"; then
        echo "error: SLURM does not requeue this job; call the same sbatch line again to go on" >&2
        exit 75
    fi
    ((${#suspects[@]} > 0)) || exit 0
    # Only now, for SLURM takes no such list from a job that runs; it has one list, which holds earlier hosts, too.
    local excluded
    excluded=$(squeue --noheader --states=all --jobs="$job" --format=%x)
    excluded=$(printf '%s\n' "${excluded/(null)/}" "${suspects[@]}" | paste --serial --delimiters=, | sed 's/^,//')
    scontrol update JobId="$job" ExcNodeList="$excluded"
    say "the job will not use ${suspects[*]} again; to let it: scontrol update JobId=$job ExcNodeList="
    say "in all it leaves out $excluded; where too few nodes are left, it waits (squeue --job=$job gives the reason)"
    exit 0
}

# hold: back into the queue, where a person has to release the job; ends the script.
hold() {
    trap '' USR1 TERM
    say "holding job $job; when the cause is mended: scontrol release $job"
    scontrol requeuehold "$job"
    exit 0
}
