# shellcheck shell=bash disable=SC2154 # `out` is set by whoever sources this
# What story_xl.sh and story_paper.sh share: jobs that wait for one another, all submitted at once. Sourced at the repository root,
# with `out` set to the story's directory. OUT/jobs.txt holds the jobs of the last submission, a name and a number a line.

nothing_waits() { # fails where jobs of the last submission are still queued
  local waiting
  if [[ -s $out/jobs.txt ]] && waiting=$(squeue -h -u "$(id -un)" -o '%A' | grep -xFf <(awk '{print $NF}' "$out/jobs.txt") | sort -un | paste -sd ' '); then
    echo "${0##*/}: error: jobs of $out are still queued: $waiting; wait for them, or scancel $waiting" >&2
    exit 2
  fi
}

last='' # the job that the next one waits for, or several with colons between them
submit() { # RESULT WORD...: the jobs of one stage, unless its result is there
  local result=$1 options=()
  shift
  if [[ -e $result ]]; then
    echo "there already: $result"
    return
  fi
  [[ -z $last ]] || options=(--dependency="afterok:$last" --kill-on-invalid-dep=yes)
  bash slurm/submit.sh "${options[@]}" "$@" | tee -a "$out/jobs.txt"
  last=$(tail -n 1 "$out/jobs.txt" | awk '{print $NF}')
}

tool() { # RESULT NAME FLAG...: one tool, with its name as that of the job
  submit "$1" --job-name="$2" tool "tools/$2.py" "${@:3}"
}
