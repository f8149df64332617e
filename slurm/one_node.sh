#!/usr/bin/env bash
# The one task that launch.sh starts by srun on each node: bash slurm/one_node.sh LAUNCHER WORD...
#
# The launcher starts the node's ranks, and this script exits with its status. USR1 and TERM make the ranks save and stop, but either
# kills `deepspeed`. So the launcher ignores USR1, and the ranks do too until they listen. TERM comes from scancel or a preemption, to
# this process alone or to all processes of the task, depending on the site's ProctrackType. The launcher blocks TERM, since deepspeed
# installs a handler of its own. The ranks get USR1 instead, every second, since a rank may not listen yet.
set -uo pipefail
source slurm/caches.sh
[[ -z ${CUDA_VISIBLE_DEVICES:-} ]] || export IGPT_DS_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES # deepspeed overwrites it: igpt_ds/launcher.py
launcher='' teller=''
trap '' USR1
trap tell TERM
trap '[[ -z $teller ]] || kill "$teller" 2>/dev/null' EXIT

tell() {
  [[ -z $teller ]] || return 0
  # shellcheck disable=SC2016 # process 0 means all processes of this task
  (trap - TERM && while kill -USR1 0; do sleep 1; done) &
  teller=$!
}

python -c 'import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.execvp(sys.argv[1], sys.argv[1:])' "$@" &
launcher=$!
while :; do # a signal ends `wait`, not the launcher
  wait "$launcher"
  status=$?
  kill -0 "$launcher" 2>/dev/null || exit "$status"
done
