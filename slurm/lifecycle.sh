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
    code=138 # that of a step which USR1 ended
    [[ -z $asked ]] || return 0
    code=0
    "$@" & # bash runs a trap only when its foreground command has ended
    step=$!
    # A signal between the test above and this line found no step to tell.
    [[ -z $asked ]] || kill -USR1 "$step" 2>/dev/null || true
    [[ -n $asked ]] || wait "$step" || code=$?
    if [[ -n $asked ]]; then
        ask_until_it_ends
        code=0
        wait "$step" || code=$? # the trap has cut the first one short
    elif ((code != 0)) && is_preempted; then
        asked=TERM
        say "SLURM takes this job's nodes for another: it has asked the ranks itself to stop"
    fi
    step=''
}

# srun drops a signal that comes while it launches its tasks. Who has heard the first one takes the next for the same.
ask_until_it_ends() {
    local seconds=0
    while sleep 1 && kill -0 "$step" 2>/dev/null; do
        ((++seconds % 5)) || kill -USR1 "$step" 2>/dev/null || true
    done
}

# is_preempted: whether this start of the job is. Where the site does not set preempt_send_user_signal, SLURM tells the
# ranks and not this script, which would take their end for a failure.
is_preempted() {
    local facts
    facts=$(SLURM_TIME_FORMAT=standard of_slurm scontrol show job --oneliner "$job") || return 1
    # A start before this one may have been; times as ISO 8601 compare as texts.
    [[ $facts =~ \ StartTime=([0-9T:-]+) ]] || return 1
    local started=${BASH_REMATCH[1]}
    [[ $facts =~ \ PreemptTime=([0-9T:-]+) && ! ${BASH_REMATCH[1]} < $started ]]
}

# of_slurm COMMAND...: a command of SLURM's, again for a minute where its controller does not answer. One that was carried
# out although its answer was lost has been successful: a job that is back in the queue is not requeued twice.
of_slurm() {
    local try errors said failed
    errors=$(mktemp)
    for try in 1 2 3 4 5 6; do
        failed=''
        "$@" 2>"$errors" || failed=1 # apart from the answer: a command may warn, and mean what it answers
        said=$(<"$errors")
        ((try == 1)) || [[ ! $said =~ 'pending execution' ]] || failed=''
        [[ -n $failed && $said =~ 'timed out'|'nable to contact'|'onnection' ]] || break
        ((try == 6)) || sleep 10
    done
    rm "$errors"
    [[ -z $said ]] || printf '%s\n' "$said" >&2
    [[ -z $failed ]]
}

# Returns where the job is its own; where SLURM is ending it, the script has to end, too.
unless_slurm_ends_it() {
    case $(of_slurm squeue --noheader --states=all --jobs="$job" --format=%T || true) in
        CANCELLED | COMPLETING)
            # Whoever cancels the job ends it: its ranks stop at a signal all the same, but it must not come back.
            echo "SLURM ends this job itself (cancelled, preempted, or its time is over); squeue --job=$job tells whether it" \
                "comes back, and where not, the same sbatch line goes on from what is saved"
            exit "$code"
            ;;
    esac
}

# requeue: the same job again, on other hosts than the suspects; ends the script.
requeue() {
    trap '' USR1 TERM
    unless_slurm_ends_it
    say "requeueing job $job to go on"
    if ! of_slurm scontrol requeue "$job"; then
        echo "error: SLURM does not requeue this job; call the same sbatch line again to go on" >&2
        exit 75
    fi
    ((${#suspects[@]} > 0)) || exit 0
    # Only now, for SLURM takes no such list from a job that runs; it has one list, which holds earlier hosts, too.
    local excluded
    excluded=$(of_slurm squeue --noheader --states=all --jobs="$job" --format=%x) || excluded=''
    excluded=$(printf '%s\n' "${excluded/(null)/}" "${suspects[@]}" | paste --serial --delimiters=, | sed 's/^,//')
    if ! of_slurm scontrol update JobId="$job" ExcNodeList="$excluded"; then
        echo "error: the job comes back, but may get ${suspects[*]} again; to leave them out:" \
            "scontrol update JobId=$job ExcNodeList=$excluded" >&2
        exit 0
    fi
    say "the job will not use ${suspects[*]} again; to let it: scontrol update JobId=$job ExcNodeList="
    say "in all it leaves out $excluded; where too few nodes are left, it waits (squeue --job=$job gives the reason)"
    exit 0
}

# hold: back into the queue, where a person has to release the job; ends the script.
hold() {
    trap '' USR1 TERM
    unless_slurm_ends_it
    say "holding job $job; when the cause is mended: scontrol release $job"
    if ! of_slurm scontrol requeuehold "$job"; then
        echo "error: SLURM does not requeue this job; when the cause is mended, call the same sbatch line again" >&2
        exit 75
    fi
    exit 0
}
