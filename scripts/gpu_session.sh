#!/usr/bin/env bash
# Run `prts bench gpu` on a machine that has torch, a GPU and no network: by its own Python, with wheels that were carried.
# It needs neither make nor .venv; a C compiler is what triton, flex attention and torch.compile need.
#   gpu_session.sh OUTPUTS [WHEELS]
#   gpu_session.sh --wheels FOLDER [PYTHON]   on a machine with an index: fetch what a PyTorch image lacks into FOLDER
#                                             (PYTHON: the image's version, default 3.12; x86-64 Linux)
#   GPU_PYTHON   the interpreter with torch (default: .venv's where it has CUDA, else python3)
set -euo pipefail
cd "$(dirname "$0")/.."

# Beside torch, numpy and triton: what the policy and the trainer import, pinned by constraints.txt.
packages=(transformers tokenizers safetensors huggingface-hub hf-xet httpx2 httpcore2 h11 anyio idna truststore click typer
  shellingham annotated-doc regex pydantic pydantic-core annotated-types typing-inspection typing-extensions pyyaml rich
  pygments markdown-it-py mdurl packaging tqdm filelock fsspec pillow)

if [ "${1:-}" = --wheels ]; then
  folder=${2:?a folder for the wheels}
  platforms=()
  for glibc in 2_34 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
  exec python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "${3:-3.12}" \
    "${platforms[@]}" --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -c constraints.txt -d "$folder" "${packages[@]}"
fi

outputs=${1:-outputs}
python=${GPU_PYTHON:-python3}
if [ -z "${GPU_PYTHON:-}" ] && .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  python=.venv/bin/python
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
  3.11 | 3.12) ;;
  *) echo "error: $python is Python $version, and 3.11 or 3.12 is needed: name one that has torch in GPU_PYTHON" >&2; exit 1 ;;
esac
site=""
if [ -n "${2:-}" ]; then
  if ! compgen -G "$2/regex-*-cp${version/./}-*.whl" >/dev/null; then
    echo "error: $2 holds no wheels for Python $version: fetch them with \`scripts/gpu_session.sh --wheels $2 $version\`" >&2
    exit 1
  fi
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$2"/*.whl
fi
PYTHONPATH="$PWD:$PWD/kernels${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}" "$python" -m prts_core.cli.main bench gpu --outputs "$outputs"
