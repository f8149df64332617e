#!/usr/bin/env bash
# What launch.sh starts by srun on each node, as its one task: bash slurm/one_node.sh LAUNCHER WORD...
#
# The launcher starts the node's ranks; its status is ours. USR1 and TERM are for the ranks alone, which save and stop: `deepspeed`
# dies of either. USR1 it ignores from here on, and so do the ranks until they listen. TERM, of scancel or of a preemption, comes to
# this process alone or to all of the task, as the site has it (ProctrackType). The launcher has it blocked, for it would no longer
# ignore it, and the ranks get a USR1 in its place, again and again: the first may find them before they listen.
set -uo pipefail
launcher='' teller=''
trap '' USR1
trap tell TERM
trap '[[ -z $teller ]] || kill "$teller" 2>/dev/null' EXIT

tell() {
  [[ -z $teller ]] || return 0
  # shellcheck disable=SC2016 # 0: all processes of this task
  (trap - TERM && while kill -USR1 0; do sleep 5; done) &
  teller=$!
}

python -c 'import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.execvp(sys.argv[1], sys.argv[1:])' "$@" &
launcher=$!
while :; do # a signal ends `wait`, and not the launcher
  wait "$launcher"
  status=$?
  kill -0 "$launcher" 2>/dev/null || exit "$status"
done
