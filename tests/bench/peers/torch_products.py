#!/usr/bin/env python3
"""PyTorch's rates of the products of a training step, those of ops/src/products.rs: torch_products.py THREADS"""

import json
import statistics
import sys
import time

import torch

MAPS = [(2048, 576, 960), (2048, 576, 576), (2048, 576, 3072), (2048, 1536, 576), (256, 576, 49152)]
THIN = [(2048, 576, 16), (2048, 1536, 16)]


def rate(t, inp, out, run):
    run()
    seconds, until = [], time.perf_counter() + 0.25
    while len(seconds) < 5 or time.perf_counter() < until:
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return 2e-9 * t * inp * out / statistics.median(seconds)


def products(dtype):
    for t, inp, out in MAPS + THIN:
        x, y, weight = (torch.randn(*sides).to(dtype) for sides in ((t, inp), (t, out), (out, inp)))
        runs = {"X Wt": lambda: x @ weight.t(), "dY W": lambda: y @ weight, "dYt X": lambda: y.t() @ x}
        if (t, inp, out) in THIN:
            runs = {"X At": runs["X Wt"], "dUt X": runs["dYt X"]}
        for what, run in runs.items():
            yield dict(what=what, sides=[t, inp, out], rate=rate(t, inp, out, run))


torch.set_num_threads(int(sys.argv[1]))
both = zip(products(torch.bfloat16), products(torch.float32))
print(json.dumps([dict(what=half["what"], sides=half["sides"], bf16=half["rate"], f32=whole["rate"]) for half, whole in both]))
