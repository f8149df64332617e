# shellcheck shell=bash
# Tab completion of flags and values in bash, for `python train.py`, `deepspeed --num_gpus 2 train.py`, `python -m igpt_ds.plan`:
#
#     source tools/completion.sh

_igpt_ds() { # the word before the cursor is completed by the program itself (argcomplete), which knows its flags and values
  local python=python place program=() IFS=$'\013'
  [[ ${COMP_WORDS[0]} != *python* ]] || python=${COMP_WORDS[0]}
  for ((place = 1; place < COMP_CWORD; place++)); do
    if [[ ${COMP_WORDS[place]} == *.py ]] && grep -q '^ *cli\.run(main' "${COMP_WORDS[place]}" 2>/dev/null; then
      program=("${COMP_WORDS[place]}")
      break
    elif [[ ${COMP_WORDS[place - 1]} == -m && ${COMP_WORDS[place]} == igpt_ds.* ]]; then
      program=(-m "${COMP_WORDS[place]}")
      break
    fi
  done
  COMPREPLY=()
  ((${#program[@]})) || return 0 # none of ours: files, as without this function
  # shellcheck disable=SC2207
  COMPREPLY=($(
    export COMP_LINE COMP_POINT COMP_TYPE _ARGCOMPLETE=$((place + 1)) _ARGCOMPLETE_IFS=$IFS _ARGCOMPLETE_SHELL=bash
    export _ARGCOMPLETE_COMP_WORDBREAKS=$COMP_WORDBREAKS
    "$python" "${program[@]}" 8>&1 9>/dev/null >/dev/null 2>&1 </dev/null
  ))
}
complete -o default -o bashdefault -F _igpt_ds python python3 deepspeed torchrun srun
