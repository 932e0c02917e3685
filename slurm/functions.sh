# Sourced by the sbatch scripts: starts one step, passes signals on, and requeues the job where that is right.
# Nothing here is for GPUs or for one site alone; what a site must say stands in the sbatch files and in README.md.

MOST_CRASHES_WITHOUT_PROGRESS=3
ASK_SECONDS=${ASK_SECONDS:-60} # that a scheduler may leave a question without an answer

job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}}
job=${job:-$SLURM_JOB_ID}

log() { echo "$(date '+%F %T') [job $job, restart ${SLURM_RESTART_COUNT:-0}] $*"; }

# The interpreter: $PYTHON, else the checkout's virtual environment, else the one on PATH.
find_python() {
  if [ -z "$PYTHON" ]; then
    PYTHON=python3
    [ -x "$HOME_FOLDER/.venv/bin/python" ] && PYTHON=$HOME_FOLDER/.venv/bin/python
  fi
  export PATH="$(dirname "$(command -v "$PYTHON")"):$PATH" # DeepSpeed looks for ninja there
}

# CPU threads and cores of a task; srun does not take --cpus-per-task from sbatch.
set_cores() {
  if [ -n "$SLURM_CPUS_PER_TASK" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
  fi
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
}

# Field $2 of where run folder $1 stands; more words, such as --exit-code, may follow.
status() { "$PYTHON" -m distributed_at status "$1" --get "$2" "${@:3}"; }

# Step of the newest good checkpoint in run folder $1, 0 without one.
newest_step() { status "$1" checkpoint_step || echo 0; }

# Whether the run in folder $1 has come to its end.
is_finished() { [ "$(status "$1" finished)" = true ]; }

# Run "$@" and set $code; USR1 is passed on as $1 says (USR1, or TERM for a step that cannot stop by itself).
run_step() {
  local as=$1 step
  shift
  asked=
  trap 'asked=yes; log "SIGUSR1: time is nearly up"; kill -'"$as"' $step 2>/dev/null' USR1
  trap 'asked=yes; log "SIGTERM"; kill -TERM $step 2>/dev/null' TERM
  "$@" &
  step=$!
  # a trap runs only between commands, so the step is in the background; wait returns early for each signal
  while :; do
    wait $step
    code=$?
    kill -0 $step 2>/dev/null || break
  done
  log "step ended with exit code $code"
}

# This job's state, empty where the scheduler does not tell it within $ASK_SECONDS: a controller may be restarting.
job_state() {
  local end=$((SECONDS + ASK_SECONDS)) state
  command -v scontrol >/dev/null || return 1
  while :; do
    state=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's/.*JobState=\([A-Z_]*\).*/\1/p')
    [ -n "$state" ] && echo "$state" && return 0
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 5
  done
}

# End with $code unless the job is still this scheduler's to run: not while it is cancelled, requeued or preempted by
# others. $1 is the run folder.
must_be_running() {
  case $(job_state) in
    RUNNING) return 0 ;;
    '') log "not requeued: the scheduler could not be asked by scontrol whether this job still runs. Nothing is lost:" \
      "the same sbatch command goes on at step $(newest_step "$1")" ;;
    *) log "not requeued: the job was cancelled, or the scheduler requeues it by itself" ;;
  esac
  exit "$code"
}

# Requeue this job unless someone else decided about it; $1 is the run folder.
requeue() {
  local end
  if [ "$REQUEUE" = no ]; then
    log "not requeued (REQUEUE=no): the next job of the chain goes on"
    exit 0
  fi
  must_be_running "$1"
  find_bad_nodes "$1"
  log "requeued at step $(newest_step "$1")"
  end=$((SECONDS + ASK_SECONDS))
  until scontrol requeue "$SLURM_JOB_ID"; do
    [ "$SECONDS" -lt "$end" ] || exit "$code"
    sleep 5
  done
  exclude_bad_nodes
  sleep 60 # until the scheduler ends this start
  exit "$code"
}

# Count a crash of run folder $1; false where too many came without a newer checkpoint in between.
may_start_again() {
  local step last=-1 count=0
  step=$(newest_step "$1")
  mkdir -p "$1/log"
  [ -f "$1/log/crashes" ] && read -r last count <"$1/log/crashes"
  [ "$step" -gt "$last" ] && count=0
  count=$((count + 1))
  echo "$step $count" >"$1/log/crashes"
  log "crash $count at step $step (exit code $code)"
  [ "$count" -le "$MOST_CRASHES_WITHOUT_PROGRESS" ]
}

# Note the node whose task died first of a signal: an exit code of its own is the program's fault, not the node's.
note_bad_nodes() {
  local output
  mkdir -p "$1/log"
  output=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdErr=//p')
  [ -f "$output" ] && tail -c +"$((${output_before:-0} + 1))" "$output" |
    grep -aoE 'srun: error: [^ :,[]+: tasks? [0-9]+: (Killed|Exited|Bus error|Segmentation fault|Aborted)' |
    head -n 1 | grep -v Exited | sed -E 's/srun: error: ([^:]+):.*/\1/' >>"$1/log/failed-nodes"
}

# Set $bad to the nodes that failed twice, if the partition has enough others. Before requeueing: that ends, with a
# signal, whatever this script runs at that moment.
find_bad_nodes() {
  local left
  bad=
  [ -f "$1/log/failed-nodes" ] || return 0
  bad=$(sort "$1/log/failed-nodes" | uniq -c | awk '$1 >= 2 {print $2}' | paste -sd, -)
  [ -n "$bad" ] || return 0
  left=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %T' |
    grep -E ' (idle|mixed|allocated|completing|planned)' | awk '{print $1}' | sort -u |
    grep -cvxF "$(echo "$bad" | tr , '\n')")
  if [ "${left:-0}" -lt "$SLURM_JOB_NUM_NODES" ]; then
    log "nodes that failed twice cannot be left out, too few are left: $bad"
    bad=
  fi
}

# Keep this job off the nodes in $bad; only a job that waits can be told so, hence after requeueing.
exclude_bad_nodes() {
  local attempt
  [ -n "$bad" ] || return 0
  for attempt in 1 2 3 4 5; do
    if scontrol update jobid="$SLURM_JOB_ID" ExcNodeList="$bad"; then
      log "nodes that failed twice are left out: $bad"
      return 0
    fi
    sleep 1
  done
  log "nodes that failed twice could not be left out: $bad"
}

# What follows from $code for run folder $1.
finish() {
  [ "$code" -eq 0 ] && exit 0
  case $(status "$1" exit_class --exit-code "$code") in
    again) requeue "$1" ;;
    person)
      log "not requeued: exit code $code needs a person, see the message above"
      exit "$code"
      ;;
  esac
  must_be_running "$1"
  note_bad_nodes "$1"
  if may_start_again "$1"; then
    requeue "$1"
  fi
  log "not requeued: $MOST_CRASHES_WITHOUT_PROGRESS starts without a newer checkpoint"
  exit "$code"
}

# Train recipe $2 with overrides $3... in run folder $1, one task a GPU; $CONTAINER holds srun's or the container's words.
train() {
  local folder=$1 tasks output
  shift
  if is_finished "$folder"; then
    log "$folder has come to its end: nothing to do"
    exit 0
  fi
  if [ "$REQUEUE" != no ] && ! command -v scontrol >/dev/null; then
    log "there is no scontrol on this node: this job cannot requeue itself. Nothing is lost at its end, but it must be" \
      "submitted again by hand; slurm/chain.sh submits jobs that follow one another"
  fi
  tasks=$("$PYTHON" -m distributed_at plan "$@" --fit-workers "$SLURM_NTASKS") || exit $?
  log "train $* in $folder: $tasks of $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST, from step $(newest_step "$folder")"
  output=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *StdErr=//p')
  output_before=$(stat -c %s "$output" 2>/dev/null || echo 0)
  if [ "${PREFLIGHT:-yes}" = yes ] && [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] && [ "$tasks" -gt 1 ]; then
    mkdir -p "$folder"
    srun --ntasks="$tasks" --kill-on-bad-exit=1 "${CONTAINER_SRUN[@]}" "${CONTAINER[@]}" \
      "$PYTHON" -m distributed_at doctor --distributed --folder "$folder" "$@" || { log "the nodes are not fit"; exit 1; }
  fi
  run_step USR1 srun --ntasks="$tasks" --kill-on-bad-exit=1 "${CONTAINER_SRUN[@]}" "${CONTAINER[@]}" \
    "$PYTHON" -m distributed_at train "$@" --run-folder "$folder" --quiet
  finish "$folder"
}
