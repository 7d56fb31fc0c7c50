#!/usr/bin/env python3
"""PyTorch's rate of a large product, GFLOP/s in bf16 and f32: torch_gemm.py THREADS (the median of the runs of two seconds)"""

import json
import statistics
import sys
import time

import torch

M, K, N = 2048, 4096, 4096  # as in ops/src/lib.rs


def rate(dtype):
    x, weight = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype)
    seconds, until = [], time.perf_counter() + 2
    torch.nn.functional.linear(x, weight)
    while len(seconds) < 5 or time.perf_counter() < until:
        begun = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        seconds.append(time.perf_counter() - begun)
    return 2e-9 * M * K * N / statistics.median(seconds)


torch.set_num_threads(int(sys.argv[1]))
print(json.dumps(dict(gemm_bf16=rate(torch.bfloat16), gemm_f32=rate(torch.float32))))
