#!/usr/bin/env bash
# Sets up .venv with the pinned packages of requirements.txt; `make install` calls it. A finished .venv holds .venv/.installed:
# the directory that .venv was made for (scripts in a copied or moved .venv point to the old one) and PyTorch's build.
#   PYTHON=python3.12 TORCH=cpu bash tools/install.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/.installed index=https://download.pytorch.org/whl
another="another Python: make PYTHON=/path/to/python3 install"
die() {
  echo "error: $*" >&2
  exit 1
}

supported() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }

# One line on all that this machine lacks, before the first download. DeepSpeed compiles a C++ extension that includes Python.h.
check_machine() {
  local lacks=() deb=() rpm=() name=${python##*/} cxx=${CXX:-c++}
  command -v "$python" >/dev/null || die "$python not found; Python 3.10 to 3.14 is needed. To name $another"
  supported "$python" || die "$python is $("$python" --version 2>&1 | head -n 1); Python 3.10 to 3.14 is needed. To name $another"
  [[ $name =~ ^python3(\.[0-9]+)?$ ]] || name=python3
  "$python" -c 'import ensurepip, venv' 2>/dev/null || { lacks+=("Python's venv module") deb+=("$name-venv") rpm+=("$name"); }
  command -v "${cxx%% *}" >/dev/null || { lacks+=("a C++ compiler ($cxx)") deb+=(g++) rpm+=(gcc-c++); }
  "$python" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' ||
    { lacks+=("Python's headers (Python.h)") deb+=("$name-dev") rpm+=("$name-devel"); }
  ((${#lacks[@]} == 0)) && return
  local list fix="apt install ${deb[*]} (Debian, Ubuntu) or dnf install ${rpm[*]} (Fedora, RHEL)"
  printf -v list '%s, ' "${lacks[@]}"
  if command -v apt-get >/dev/null; then fix="apt install ${deb[*]}"; elif command -v dnf >/dev/null; then fix="dnf install ${rpm[*]}"; fi
  die "this machine lacks ${list%, }. As root: $fix. To name $another"
}

make_venv() {
  [[ ! -L .venv ]] || { [[ -d .venv ]] && [[ -z $(ls -A .venv/) ]]; } ||
    die ".venv is a link to another directory, which would be emptied, or to none; rm .venv"
  "$python" -m venv --clear .venv
}

python=${PYTHON:-}
if [[ ! $python ]]; then # the first that fits
  for python in python3 python3.{14,13,12,11,10} python3; do supported "$python" && break; done
fi
place=$(sed -n 1p $stamp 2>/dev/null || true) built=$(sed -n 2p $stamp 2>/dev/null || true)
torch=${TORCH:-$built} # the build chosen before, if none is named now
[[ $torch =~ ^(cpu|xpu|cu[0-9]+|rocm[0-9.]+)?$ ]] || die "TORCH=$torch is no build of PyTorch; cpu, cu126, cu130, rocm7.1 and xpu are (none: PyPI's)"
check_machine
.venv/bin/python -c '' 2>/dev/null && [[ ! -e $stamp || $place == "$PWD" ]] || make_venv
rm -f $stamp

echo "installing the pinned packages into .venv (the first time takes minutes)"
pip=(.venv/bin/python -m pip --disable-pip-version-check)
# uv is faster. pip's own settings of where packages are (a mirror, a folder of wheels) are unknown to uv: then pip installs.
settings=$("${pip[@]}" config list) # not piped: grep -q ends early, and pip then fails
if ! grep -qE '\.(index-url|extra-index-url|find-links|no-index|constraint)=' <<<"$settings"; then
  uv=$(command -v uv || true)
  [[ $uv ]] || { "${pip[@]}" install --quiet --only-binary :all: "$(grep -o '^uv==[^ ]*' requirements.txt)" && uv=.venv/bin/uv; } || true
fi
install() {
  [[ ! ${uv:-} ]] || ! "$uv" pip install --python .venv/bin/python "$@" || return 0
  [[ ! ${uv:-} ]] || echo "note: uv failed; pip tries the same" >&2
  "${pip[@]}" install "$@"
}
if [[ $torch ]]; then
  # The version with its build (2.13.0+cpu) is never PyPI's, so an index out of reach is an error and no download of CUDA.
  version=$(sed -nE 's/^torch==([^ ;]+).*/\1/p' requirements.txt)
  PIP_EXTRA_INDEX_URL=$index/$torch UV_TORCH_BACKEND=$torch install --no-deps "torch==$version+$torch" ||
    die "TORCH=$torch: PyTorch $version+$torch is not at $index/$torch, or this machine cannot reach it"
elif [[ ! -e /proc/driver/nvidia && $(uname -sm) == "Linux x86_64" ]]; then
  echo "note: PyPI's PyTorch brings 3 GB of CUDA, and this machine shows no NVIDIA GPU; make TORCH=cpu install leaves CUDA out"
fi
install --requirement requirements.txt
printf '%s\n%s' "$PWD" "$torch" >$stamp
