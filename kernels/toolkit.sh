#!/usr/bin/env bash
# Installs the compiler of CUDA 13.0 from PyPI into .hone/cuda, 330 MB, once; says where nvcc is. Needs pip.
# 13.0, and not later: the driver of CUDA 13.0 refuses the PTX of later compilers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root="$PWD/.hone/cuda"
nvcc="$root/nvidia/cu13/bin/nvcc"
if [ ! -e "$root/complete" ]; then
  rm -rf "$root"
  python3 -m pip install --quiet --disable-pip-version-check --target "$root" \
    nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 >&2
  chmod +x "$root"/nvidia/cu13/bin/* "$root"/nvidia/cu13/nvvm/bin/*
  touch "$root/complete"
fi
echo "$nvcc"
