# shellcheck shell=bash disable=SC2154 # `out` is set by whoever sources this
# Shared by story_xl.sh and story_paper.sh, which submit many jobs at once that wait for one another. They source it at the repository
# root, with `out` set to the story's directory. OUT/jobs.txt has a name and a number for each job of the last submission.

nothing_waits() { # fails if jobs of the last submission are still queued
  local waiting
  if [[ -s $out/jobs.txt ]] && waiting=$(squeue -h -u "$(id -un)" -o '%A' | grep -xFf <(awk '{print $NF}' "$out/jobs.txt") | sort -un | paste -sd ' '); then
    echo "${0##*/}: error: jobs of $out are still queued: $waiting; wait for them, or scancel $waiting" >&2
    exit 2
  fi
}

last='' # the job that the next job waits for; several have colons between them
submit() { # RESULT WORD...: submits the jobs of one stage, unless its result exists
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

tool() { # RESULT NAME FLAG...: submits one tool as a job of the same name
  submit "$1" --job-name="$2" tool "tools/$2.py" "${@:3}"
}
