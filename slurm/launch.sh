# shellcheck shell=bash
# Shared by pretrain.sbatch, finetune.sbatch and sweep_lr.sbatch: starts the ranks, stops them, and starts them again.
#
#     launch train.py --run_dir runs/xl ...         as the last command of a batch script
#     sweep --out runs/sweep -- --recipe NAME ...   the same for one task of the learning rates' array
#
# The program exits with 85 and a complete checkpoint after USR1, TERM, a file RUN_DIR/STOP or --max_minutes, and with 86 if it hung.
# RUN_DIR/FINISHED, not status 0, means that the run is done. `--resume auto` continues from the newest complete checkpoint.
# SPARE_NODES of the job's nodes wait. If ranks or a node die, the ranks start again on the nodes that are left, inside the job.
# This file starts and stops ranks. igpt_ds/ops/restarts.py decides what a start and an end mean. RUN_DIR/hostfile has the nodes.
set -uo pipefail
shopt -s nullglob
source slurm/env.sh
readonly STOPPED=85 BAD_INPUT=2 BAD_NODES=3

say() { echo "== $(date +%FT%T) job $SLURM_JOB_ID, restart $restart: $*"; }

fail() {
  echo "error: $*" >&2
  exit 2
}

restarts() { # ACTION FLAG...: USR1 and TERM, which SLURM may send to all processes of the job, must not end it
  (trap '' USR1 TERM && exec python -m igpt_ds.ops.restarts "$@" --restart "$restart" --max_fruitless "${MAX_FRUITLESS:-3}")
}

launch() { # PROGRAM WORD...: runs the program on all ranks of all nodes
  local program=$1 words=("${@:2}")
  set_up "$(flag --run_dir "${words[@]}")"
  if flag --stop_at_step "${words[@]}" >/dev/null; then early=1; fi
  [[ -z ${DATA:-} ]] || flag --data "${words[@]}" >/dev/null || words+=(--data "$DATA")
  ((restart == 0)) && flag --resume "${words[@]}" >/dev/null || words+=(--resume auto)
  while :; do
    on_nodes "$program" "${words[@]}"
    if ((status == BAD_INPUT)) && fewer_nodes "$program" "${words[@]}"; then on_nodes "$program" "${words[@]}"; fi
    again || break
    words+=(--resume auto)
  done
  finish
}

again() { # begins another start on the nodes of the job that are left; status 1 if it ends or queues instead
  local said left
  ((usr1 == 0)) && said=$(restarts again "${run[@]}" --nodes "$node_list" --least_nodes "$least" --status "$status" --bad "$bad" \
    --lost "$lost" --errors "$errors" --early "$early") && [[ -n $said ]] || return 1
  lost+=${bad:+,$bad} bad='' status=0
  read -ra left <<<"$said"
  begin "${left[@]:0:wanted}"
}

on_nodes() { # PROGRAM WORD...: checks `nodes`, then runs the program on all their ranks
  check_nodes "$@"
  # shellcheck disable=SC2016 # each node expands its own SLURM_NODEID
  ((status != 0)) || follow 'exec bash slurm/one_node.sh deepspeed --no_ssh --log_level warning --hostfile "$HOSTFILE" \
    --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" "$@"' "$@"
}

fewer_nodes() { # PROGRAM WORD...: uses as many nodes as the batch divides into; fails if the batch is not the problem
  local n said why=''
  for ((n = ${#nodes[@]}; n > 0; n--)); do
    if said=$(alone env RANK=0 LOCAL_RANK=0 WORLD_SIZE=$((n * ranks)) python "$@" --dry_run 2>&1); then
      ((n < ${#nodes[@]})) || return 1
      say "$(hosts "${nodes[@]:n}") stays idle: $why"
      wanted=$n
      use_nodes "${nodes[@]:0:n}"
      rm -f "$HOSTFILE" && (set -C && printf "%s slots=$ranks\n" "${nodes[@]}" >"$HOSTFILE") # never through a link
      status=0
      return
    fi
    why=${why:-$(restarts cause <<<"$said")}
    [[ $why == *divide* ]] || return 1
  done
  say "no number of nodes up to ${#nodes[@]} works: $why"
  return 1
}

alone() { # WORD...: runs a command as one process
  srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpu-bind=none ${lost:+--overlap} "$@"
}

sweep() { # WORD...: runs one rate of tools/sweep_lr.py, which starts its ranks itself, on the job's one node; flags of train.py follow --
  local own=() out name SPARE_NODES=0
  while (($#)) && [[ $1 != -- ]]; do
    own+=("$1")
    shift
  done
  (($#)) || fail "the flags of train.py are missing; write them after --"
  out=$(flag --out "${own[@]}") || fail "--out is missing; name the directory of the search"
  name=$(alone python -c 'import sys; from igpt_ds.train.sweep import rate, run_name; print(run_name(rate(int(sys.argv[1]))))' "$SLURM_ARRAY_TASK_ID") || exit 2
  set_up "$out/$name"
  early=1 # the tool exits with 0 for a rate that diverged, which leaves no FINISHED
  shift # the --
  local program=train.py
  if [[ ${1:-} == *.py ]]; then
    program=$1
    shift
  fi
  local training=(deepspeed --num_gpus "$ranks" --master_port "$MASTER_PORT" "$program" "$@")
  # shellcheck disable=SC2016 # the node expands the words
  follow 'exec bash slurm/one_node.sh python tools/sweep_lr.py "$@"' "${own[@]}" --array_index "$SLURM_ARRAY_TASK_ID" -- "${training[@]}"
  finish
}

set_up() { # RUN_DIR: everything before the ranks start
  run_dir=$1 run=(--run_dir "$1") restart=${SLURM_RESTART_COUNT:-0}
  [[ -n $run_dir ]] || fail "--run_dir is missing; name the run's directory, on a disk that all nodes share"
  early=0 usr1=0 step='' bad='' lost='' status=0 errors=$(mktemp) gone=$(mktemp)
  trap 'rm -f "$errors" "$gone"' EXIT
  trap 'usr1=1; say "USR1: every rank is told to save and stop"; pass_on' USR1
  trap : TERM # the tasks of the nodes get TERM too, see one_node.sh; SLURM gives them KillWait seconds
  if [[ -e $run_dir/FINISHED ]]; then
    say "$run_dir is finished"
    exit 0
  fi
  count_nodes
  begin "${given[@]:0:wanted}"
}

begin() { # NODE...: makes a start on these nodes the run's owner
  restart=$(restarts number "${run[@]}") || exit
  # Systems hand out higher ports by themselves. Each start has another port, so that no rank of the previous start answers.
  MASTER_PORT=$((20000 + (SLURM_JOB_ID + 101 * restart) % 10000))
  HOSTFILE=$run_dir/hostfile IGPT_DS_OWNER=$SLURM_JOB_ID.$restart
  export MASTER_PORT HOSTFILE IGPT_DS_OWNER
  use_nodes "$@"
  restarts begin "${run[@]}" --nodes "$node_list" --ranks "$ranks" || { status=$?; exit $((status == STOPPED ? 0 : status)); }
}

finish() { # queues the job again, or says why not
  local options=()
  ((usr1 == 0)) || options=(--usr1 "$0")
  trap '' USR1 TERM # SLURM ends the processes of a job that it queues again
  restarts finish "${run[@]}" --nodes "$node_list" --least_nodes "${LEAST_NODES:-$SLURM_JOB_NUM_NODES}" --status "$status" \
    --bad "$bad" --lost "$lost" --errors "$errors" --early "$early" "${options[@]}"
  exit
}

count_nodes() { # sets the ranks of a node, the job's nodes, and how many of them train
  ranks=${RANKS_PER_NODE:-${SLURM_GPUS_PER_NODE:-}} # SLURM_GPUS_ON_NODE counts all GPUs of the node with --exclusive
  ranks=${ranks##*:}                                # "8" or "h100:8"
  [[ -n $ranks ]] || fail "the number of ranks of a node is unknown; give sbatch --gpus-per-node, or set RANKS_PER_NODE in slurm/cluster.sh"
  mapfile -t given < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  wanted=$((${#given[@]} - ${SPARE_NODES:-0}))
  ((wanted > 0)) || fail "SPARE_NODES=$SPARE_NODES leaves none of the job's ${#given[@]} nodes for training; set a smaller number"
  least=$((${LEAST_NODES:-$SLURM_JOB_NUM_NODES} - ${SPARE_NODES:-0}))
  ((least > 0)) || least=1
}

use_nodes() { # NODE...: the nodes for the ranks, which meet at the first one
  nodes=("$@") node_list=$(hosts "$@")
  export MASTER_ADDR=$1
  # --ntasks            otherwise srun repeats the job's number of tasks
  # --cpu-bind=none     otherwise the single task with all its ranks is bound to one core
  # --kill-on-bad-exit  one dead node ends the step at once, not after the time limit of the collectives
  # --overlap           a step that had a lost node keeps its GPUs until SLURM notices
  srun=(srun --nodes="$#" --nodelist="$node_list" --ntasks="$#" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=60)
  srun+=(${lost:+--overlap})
}

hosts() { scontrol show hostlist "$(IFS=,; echo "$*")"; } # NODE...: node[1-2]

check_nodes() { # PROGRAM WORD...: checks every node before the ranks start; sets `status`, and `bad` to the nodes that fail
  [[ $1 == train.py && ${PREFLIGHT:-1} != 0 ]] || return 0 # the preflight knows only the flags of train.py
  shift
  local said
  begun=$SECONDS
  # One task a rank, since each checks its own GPU. --overcommit, since the job has one task a node.
  # tee -a, since tee would empty the log.
  said=$("${srun[@]}" --ntasks=$((${#nodes[@]} * ranks)) --ntasks-per-node="$ranks" --overcommit \
    --kill-on-bad-exit=0 python tools/preflight.py "$@" 2> >(tee "$errors" >&2) | tee -a /dev/stderr)
  status=$?
  bad=$(sed -n 's/^bad_nodes: //p' <<<"$said")
  if [[ -n $bad ]]; then status=$BAD_NODES; elif ((status != 0)); then judge; fi
}

judge() { # sets `status` to that of the ranks, and `bad` to the nodes that should not be used again
  local said
  said=$(restarts outcome --status "$status" --errors "$errors" --seconds $((SECONDS - begun + 60)) --bad "$bad" --lost "$lost") &&
    read -r status bad <<<"$said"
}

watch_nodes() { # ends the step when a node is gone, and writes its name to `gone`, if enough others are left for another start
  local commas=${lost//[^,]/} most
  : >"$gone"
  most=$((${#given[@]} - ${#commas} - least))
  ((most > 0)) || return 0
  (trap '' USR1 TERM && exec python -m igpt_ds.ops.node_watch "${run[@]}" --nodes "${nodes[@]}" --most "$most" --step "$step" >"$gone") &
}

pass_on() { # sends USR1 to all ranks every second until they end, since a rank may not listen yet
  [[ -n $step ]] || return 0
  # In its first moments a task would die of the signal, for it ignores USR1 only once its shell runs.
  (while kill -0 "$step" 2>/dev/null; do ((SECONDS - begun < 3)) || kill -USR1 "$step" 2>/dev/null; sleep 1; done) &
}

follow() { # SCRIPT WORD...: runs it by `srun` on every node to its end; sets `status`, and `bad` to the nodes where a rank was killed
  local script=$1
  shift
  if ((usr1)); then # USR1 came during the preflight
    status=$STOPPED
    return
  fi
  # srun passes USR1 to the ranks. At TERM it would kill all ranks, so it runs in its own session, which TERM does not reach.
  (trap '' USR1 && exec setsid "${srun[@]}" bash -c "trap '' USR1; $script" bash "$@") 2> >(tee "$errors" >&2) &
  step=$! begun=$SECONDS
  ((usr1 == 0)) || pass_on
  watch_nodes
  while :; do # a signal ends `wait`, not the step
    wait "$step" 2>/dev/null # where bash would tell of a killed srun
    status=$?
    kill -0 "$step" 2>/dev/null || break
  done
  step=''
  sleep 1 # until tee has written
  bad=$(tr ' \n' ,, <"$gone") bad=${bad%,}
  [[ -z $bad ]] || echo "node_watch.py: error: $bad does not answer any more, and its heartbeat stands still" | tee -a "$errors" >&2
  judge
}
