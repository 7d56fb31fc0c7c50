#!/usr/bin/env bash
# Runs on a machine that has a GPU and CUDA 13, and need not have Rust: finds the libraries, then every check.
# `run-on-gpu.sh [directory]` writes results.json there. It lies in the bundle that `just gpu-check` makes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
out="${1:-$PWD}"
for library in libcublasLt.so.13 libcuda.so.1; do
  if ! ldconfig -p 2>/dev/null | grep -q "$library"; then
    found="$(find /usr/local /usr/lib /opt -name "$library" -print -quit 2>/dev/null || true)"
    if [ -n "$found" ]; then
      export LD_LIBRARY_PATH="$(dirname "$found")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
    fi
  fi
done
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null || true
exec ./gpu_check "$out"
