#!/usr/bin/env bash
# Compiles every kernel for each target, prints its registers and shared memory, and fails where one spills.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
nvcc="${NVCC:-$(./toolkit.sh)}"
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
for source in *.cu; do
  for target in 80 90; do
    "$nvcc" -std=c++17 -O3 -Werror all-warnings -cubin -arch=sm_$target -Xptxas -v -o "$out/code" "$source" 2>>"$out/log" || { cat "$out/log" >&2; exit 1; }
  done
done
# The one kernel that has no room left on 8.0: 8 bytes, once a tile.
awk '
  BEGIN { allowed["attention_dkv_mma128_bf16_bf16 sm_80"] = allowed["attention_dkv_mma128_bf16_f32 sm_80"] = 16 }
  /Compiling entry function/ { split($0, part, "\047"); name = part[2]; target = part[4] }
  /bytes stack frame/ { stack = $(1); for (i = 1; i <= NF; i++) { if ($i == "stack" && $(i+1) ~ /frame/) stack = $(i-2); if ($(i+1) == "bytes" && $(i+2) == "spill" && $(i+3) ~ /stores/) stores = $i; if ($(i+1) == "bytes" && $(i+2) == "spill" && $(i+3) ~ /loads/) loads = $i } }
  /Used [0-9]+ registers/ {
    registers = $0; sub(/.*Used /, "", registers); sub(/ registers.*/, "", registers)
    shared = 0; if (match($0, /[0-9]+ bytes smem/)) { shared = substr($0, RSTART, RLENGTH); sub(/ .*/, "", shared) }
    printf "%-48s %s %4d registers %6d bytes shared\n", name, target, registers, shared
    kernels++
    if (stores + loads > allowed[name " " target]) { printf "error: %s spills on %s: %d bytes stored, %d loaded\n", name, target, stores, loads; spilled++ }
  }
  END { printf "%d kernels (each for two targets counted twice), %d spill\n", kernels, spilled; exit spilled > 0 || kernels == 0 }
' "$out/log"
