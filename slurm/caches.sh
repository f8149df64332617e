# shellcheck shell=bash
# Sourced on each node, at the repository root. Compiled operators and kernels go to the node's own disk: on a shared home the ranks
# of all nodes would write the same files. Variables that you have set keep their values.

own_directory() { # NAME: prints a directory that only this user can write, since what it holds will run
  local path mode
  path=${TMPDIR:-/tmp}/$(id -u)-$1
  mkdir -m 700 "$path" 2>/dev/null
  mode=$(stat -c %a "$path" 2>/dev/null)
  if [[ -d $path && ! -L $path && -O $path ]] && ((!(8#${mode:-777} & 8#022))) && chmod 700 "$path"; then
    printf %s "$path"
  else
    printf %s "$(mktemp -d)"
    echo "warning: other users can write $path, or it is no directory; compiled files go to a new directory, for this start alone" >&2
  fi
}

export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$(own_directory torch-extensions)}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$(own_directory triton)}"
