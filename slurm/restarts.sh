# shellcheck shell=bash disable=SC2034,SC2154 # launch.sh, which sources this file, sets and reads the same variables
# Whose the run directory is, what is written down of each start and end, and whether a job that ended queues again. Not run by itself.
#
# It leaves RUN_DIR/restarts.jsonl, a line for each start and each end; RUN_DIR/owner, the start that may write checkpoints
# ("JOB.RESTART"; the ranks have theirs in IGPT_DS_OWNER).

say() { echo "== $(date +%FT%T) job $SLURM_JOB_ID, restart $restart: $*"; }

fail() {
  echo "error: $*" >&2
  exit 2
}

known() { scontrol show job -o "$SLURM_JOB_ID" | grep -oE "(^| )$1=\S+" | cut -d = -f 2; } # NAME: what SLURM has under it for this job

look_at_limit() { # sets `hopeless` where the whole time limit is hardly longer than what USR1 shall be sent before its end
  local limit start end before
  limit=$(known TimeLimit)
  [[ $limit == *:* ]] || return 0 # UNLIMITED
  start=$(date -d "$(known StartTime)" +%s) end=$(date -d "$(known EndTime)" +%s)
  # What --signal asks for SLURM tells nobody: it stands in the batch script, or in the environment. On sbatch's command line it is
  # not seen; then the starts that bring nothing are counted.
  before=${SBATCH_SIGNAL:-$(sed -n 's/^#SBATCH --signal=//p' "$0")}
  [[ $before == *@* ]] && before=${before##*@} || before=60
  # A preemption moves the end alone. SLURM compares clocks about once a minute.
  if ((end - start == $(seconds "$limit") && end - start - before <= 120)); then
    hopeless="of the time limit ($limit) nothing is left before USR1, which --signal asks for: give a longer --time, or sbatch --signal=B:USR1@60"
  fi
}

seconds() { # [DAYS-]HOURS:MINUTES:SECONDS
  local days=0 h m s
  [[ $1 != *-* ]] || days=${1%%-*}
  IFS=: read -r h m s <<<"${1#*-}"
  echo $((((10#$days * 24 + 10#$h) * 60 + 10#$m) * 60 + 10#$s))
}

images() { # images_seen of the newest complete checkpoint
  local complete=("$run_dir"/checkpoints/step-[0-9]*[0-9]/COMPLETE) seen=''
  ((${#complete[@]} == 0)) || seen=$(grep -m 1 -oE '"images_seen": *[0-9]+' "${complete[-1]%/*}/manifest.json")
  echo "${seen:-0}" | grep -oE '[0-9]+$'
}

record() { # EVENT [MORE]: a line of restarts.jsonl; fails where it cannot be written
  printf '{"event": "%s", "job": "%s", "restart": %d, "time": "%s", "nodes": "%s", "images_seen": %d%s}\n' \
    "$1" "$SLURM_JOB_ID" "$restart" "$(date +%FT%T%:z)" "$node_list" "$(images)" "${2:-}" >>"$run_dir/restarts.jsonl"
}

ended() { # STATUS REASON: the last line of this start in restarts.jsonl
  record end ", \"status\": $1, \"reason\": \"$2\", \"bad_nodes\": \"$(join "$bad")\""
}

take() { # makes the run this start's own, unless another job has it; status 1 where nothing can be written
  local owner state tries=0 written=0
  mkdir -p "$run_dir" || return 1
  while :; do
    lock || return 1
    owner='' state=''
    [[ ! -e $run_dir/owner ]] || owner=$(<"$run_dir/owner")
    owner=${owner%.*}
    [[ -z $owner || $owner == "$SLURM_JOB_ID" ]] || state=$(state_of "$owner")
    [[ -n $state ]] || break
    unlock
    # Its last ranks may still be saving, or the controller does not answer: that is waited for, up to five minutes.
    if [[ $state != COMPLETING && $state != UNKNOWN ]] || ((++tries == 60)); then
      fail "job $owner ($state) is still at work in $run_dir; cancel it, or choose another --run_dir"
    fi
    sleep 5
  done
  echo "$IGPT_DS_OWNER" >"$run_dir/owner.partial" && mv "$run_dir/owner.partial" "$run_dir/owner" || written=1
  unlock
  return $written
}

lock() { # of two jobs that start at one moment one waits; status 1 where nothing can be written
  local tries=0 missing=0
  until mkdir "$run_dir/owner.lock" 2>/dev/null; do
    [[ -d $run_dir/owner.lock ]] || ((++missing < 5)) || return 1 # one that was there may have gone at this moment
    ((++tries != 30)) || unlock # whoever made it was killed
    ((tries < 60)) || return 1
    sleep 1
  done
}

unlock() { rmdir "$run_dir/owner.lock"; }

state_of() { # JOB: PENDING, RUNNING ..., or UNKNOWN where SLURM does not answer; nothing where the job has ended
  local said
  # %A, for all tasks of an array are listed under the number that one of them has.
  if said=$(squeue -h -o '%A %T' -j "$1" 2>"$errors"); then
    sed -n "s/^$1 //p" <<<"$said"
  elif ! grep -q 'Invalid job id' "$errors"; then
    echo UNKNOWN
  fi
}

obey_stop() { # a STOP of before our submission was for another job; any later one is for us
  local since=$run_dir/restarts.jsonl
  [[ -e $run_dir/STOP ]] || return 0
  if ((restart == 0)) || [[ ! -e $since ]]; then
    since=$errors
    touch -d "$(known SubmitTime)" "$since"
  fi
  if [[ $run_dir/STOP -nt $since ]]; then
    again="it was asked to stop before it started"
    ended "$STOPPED" "$again"
    give_up "$STOPPED" "$run_dir/STOP is there; submit again to go on"
  fi
  say "removed $run_dir/STOP, which was there before this job"
  rm -f "$run_dir/STOP"
}

begin() { # takes the run over; counts how many starts in a row have brought nothing, this one among them
  local line best=-1
  starts=0 seen=$(images)
  if take && obey_stop && printf "%s slots=$ranks\n" "${nodes[@]}" >"$HOSTFILE" && record start; then
    while read -r line; do
      [[ $line == *'"start"'*"\"job\": \"$SLURM_JOB_ID\""* && $line =~ \"images_seen\":\ ([0-9]+) ]] || continue
      if ((BASH_REMATCH[1] > best)); then best=${BASH_REMATCH[1]} starts=1; else starts=$((starts + 1)); fi
    done <"$run_dir/restarts.jsonl"
  else
    starts=$((restart + 1)) status=1
    again="$run_dir cannot be written"
    finish
  fi
  if ((starts > ${MAX_FRUITLESS:-3})); then
    again="$((starts - 1)) starts in a row brought no new checkpoint, the last of them ended by SLURM"
    ended 1 "$again"
    give_up 1
  fi
  say "start on $node_list, $ranks ranks a node, after $seen images"
}

cause() { # the first error line of a program in what is read, fit for JSON; else the first exception
  local said
  # shellcheck disable=SC1003 # a backslash, no quote
  said=$(tr -cd '\011\012\040-\176' | tr -s '\t"\\' " '/" | grep -aoE '[a-z_]+\.py: error: .*|^(\[rank[0-9]+\]: )?([a-z_]+\.)*[A-Z][A-Za-z]*(Error|Exception)\b.*')
  (grep -m 1 'py: error: ' <<<"$said" || head -n 1 <<<"$said") | cut -c 1-300
}

finish() { # what the end means, and whether the job queues again
  local state why
  if ((status == 0)) && { ((early)) || [[ -e $run_dir/FINISHED ]]; }; then
    ended 0 finished
    say "finished"
    exit 0
  fi
  case $status in
    0) again="it ended without $run_dir/FINISHED" status=1 ;;
    "$STOPPED")
      again="it was asked to stop, and saved what it had"
      (($(images) > seen)) || again="it was stopped before the first step: nothing was saved"
      ;;
    "$HUNG") again="it hung" ;;
    "$BAD_NODES") again="bad nodes: ${bad//$'\n'/ }" ;;
    *)
      again=${again:-"it ended with status $status"}
      why=$(cause <"$errors")
      again+=${why:+" ($why)"}
      ;;
  esac
  ended "$status" "$again"
  (($(images) <= seen)) || starts=0
  state=$(known JobState)
  if [[ $state != RUNNING ]]; then # cancelled, or a node was lost, upon which SLURM queues it again
    say "$again; SLURM has ended the job, and what comes next is not ours to say"
    exit "$status"
  fi
  [[ ! -e $run_dir/STOP ]] || give_up "$status" "$run_dir/STOP is there; submit again to go on"
  [[ $status != "$STOPPED" || -z $hopeless ]] || (($(images) > seen)) || give_up "$status" "$hopeless"
  ((starts < ${MAX_FRUITLESS:-3})) || give_up "$status" "$starts starts in a row brought no new checkpoint"
  ((status != BAD_INPUT || restart > 0 || starts == 0)) || give_up "$status" "the first start could not begin; mend that, and submit again"
  requeue
}

join() { paste -sd , <<<"$1"; }

give_up() { # STATUS [WHY]
  say "$again; not queued again${2:+: $2}"
  exit "$1"
}

requeue() { # ends this script: SLURM stops the job's processes
  local old exclude='' least left
  trap '' TERM
  [[ -n $bad ]] || say "$again; queued again"
  scontrol requeue "$SLURM_JOB_ID" || exit 1
  [[ -n $bad ]] || exit "$status"
  # Only a waiting job takes another list of nodes. How few nodes it may have SLURM no longer tells, but submit.sh does.
  least=${LEAST_NODES:-$SLURM_JOB_NUM_NODES}
  old=$(known ExcNodeList | grep -v '(null)')
  exclude=$(join "$bad")${old:+,$old}
  left=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -t idle,alloc,mix,comp -o %N | sort -u | grep -cvxF -f <(scontrol show hostnames "$exclude"))
  if ((left < least)); then
    say "$again; queued again; $(join "$bad") stays: without it there are $left nodes for $least"
  else
    scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$exclude"
    say "$again; queued again without $exclude"
  fi
  exit "$status"
}
