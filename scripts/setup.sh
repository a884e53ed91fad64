#!/usr/bin/env bash
# Makes .venv what pyproject.toml and constraints.txt say, and Debian's GL libraries present. Does nothing when they are.
# Called by every `make` target. It knows no stage.
#   PYTHON             interpreter to build .venv from (default: python3.11, else python3.12)
#   PRTS_TORCH_INDEX   package index of the CPU builds of torch, where pip's own would bring several GB of CUDA
set -euo pipefail
cd "$(dirname "$0")/.."

want=$(cat pyproject.toml constraints.txt "$0" | sha256sum | cut -c1-16)
stamp=".venv/.prts-$want"

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

become_root() {  # run a command as root, or fail
  if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo -n "$@"; else return 1; fi
}

apt_install() {
  command -v apt-get >/dev/null || return 1
  become_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >/dev/null && return 0
  become_root apt-get update -q >/dev/null && become_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >/dev/null
}

gl_libraries() {
  local known missing=""
  known=$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p)
  for name in libOSMesa.so libEGL.so.1 libEGL_mesa.so.0 libGL.so.1 libGLESv2.so.2; do
    grep -q "$name" <<<"$known" || missing="$missing $name"
  done
  [ -n "$missing" ] || return 0
  local packages=(libosmesa6 libegl1 libegl-mesa0 libgl1-mesa-dri libgl1 libgles2)
  say "GL libraries are missing ($missing ): installing ${packages[*]}"
  apt_install "${packages[@]}" && return 0
  say "error: the simulator draws with Mesa, and$missing cannot be found. Cure: sudo apt-get install ${packages[*]}"
  exit 1
}

usable() { "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
  for name in ${PYTHON:-python3.11 python3.12 python3}; do
    if command -v "$name" >/dev/null && usable "$name"; then echo "$name"; return 0; fi
  done
  return 1
}

if [ -e "$stamp" ]; then exit 0; fi
gl_libraries

if ! .venv/bin/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
  if ! python=$(find_python); then
    say "no usable Python 3.11 or 3.12 with venv: asking Debian for one"
    apt_install python3 python3-venv || true
    python=$(find_python) || { say "error: PRTS needs Python 3.11 or 3.12 with its venv module. Cure: sudo apt-get install python3.11 python3.11-venv, or PYTHON=/path/to/python make"; exit 1; }
  fi
  say "building .venv with $("$python" --version) (about 4 minutes, 3.3 GB, once)"
  rm -rf .venv
  "$python" -m venv .venv
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
torch=$(grep -E '^torch==' constraints.txt)
# torch first and by its exact pin: a resolver that is free to choose brings another build of it.
if ! pip show torch 2>/dev/null | grep -q "^Version: ${torch#torch==}"; then
  pip install -q ${PRTS_TORCH_INDEX:+--index-url "$PRTS_TORCH_INDEX"} "$torch"
fi
if pip show prts >/dev/null 2>&1; then pip uninstall -q -y prts; fi  # this project under its earlier name
pip install -q -c constraints.txt -e '.[dev]'
pip check >/dev/null || pip check >&2
find .venv -maxdepth 1 -name '.prts-*' -delete
touch "$stamp"
say ".venv is ready"
