#!/usr/bin/env python3
"""Writes the goldens of update rules, schedules and the loss's options into optim/ (README.md beside this file says what is what).

Every input is a function of hone's counter-based random numbers, computed here in numpy and there in Rust, so that only results are
stored. References: torch.optim, torch.optim.swa_utils, transformers.optimization, bitsandbytes (its Lion, its code books, its 8-bit
AdamW), and a numpy twin of 8-bit AdamW whose every operation is rounded as hone's is.

  make_optim.py           writes optim/
  make_optim.py --check   writes nothing: compares with what is there
"""

import argparse
import inspect
import json
import os
import pathlib
import platform
import re
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import bitsandbytes
import bitsandbytes.functional
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from bitsandbytes.backends.cpu import ops as bnb_cpu
from safetensors.torch import load_file, save_file
from torch.optim import _muon
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM, optimization
from transformers.optimization import Adafactor

HERE = pathlib.Path(__file__).resolve().parent
STEPS = [1, 10, 50]
SMALL = {"matrix": (6, 10), "tall": (12, 5), "vector": (17,)}
LARGE = {"large": (20, 211), "small": (4095,)}
f32 = np.float32

# ---------------------------------------------------------------------------------------------- hone's random numbers

GAMMA = np.uint64(0x9E3779B97F4A7C15)


def finalise(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def mix(seed, index):
    with np.errstate(over="ignore"):
        return finalise(finalise(np.uint64(seed) + GAMMA) + np.asarray(index, np.uint64) * GAMMA)


def uniform(seed, n):
    return (mix(seed, np.arange(n)) >> np.uint64(11)).astype(np.float64) / 2.0**53


def noise(seed, n, bound):
    """Uniform in +-bound, as f32."""
    return ((2.0 * uniform(seed, n) - 1.0) * bound).astype(f32)


def start(number, shape):
    return noise(1000 + number, int(np.prod(shape)), 1.0).reshape(shape)


def gradient(number, step, shape):
    """Of values whose scale differs by tensor and by place."""
    n = int(np.prod(shape))
    scale = (10.0 ** (-3.0 * uniform(3000 + number, n))).astype(f32)
    return (noise(2000 + 100 * number + step, n, 1.0) * scale).reshape(shape)


# ---------------------------------------------------------------------------------------------- update rules


def muon_f32():
    """torch.optim.Muon's iteration from its own source, with one word changed: it runs in f32, not in bfloat16."""
    source = inspect.getsource(_muon._zeropower_via_newtonschulz)
    assert source.count("torch.bfloat16") == 1
    scope = dict(vars(_muon))
    exec(source.replace("torch.bfloat16", "grad.dtype"), scope)
    return scope["_zeropower_via_newtonschulz"]


def bnb_lion(params, **knobs):
    return bitsandbytes.optim.Lion(params, optim_bits=32, **knobs)


ADAMW = dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)

# name: (constructor, its arguments, hone's settings). A decay here is for every tensor; hone is told so by a group.
RULES = {
    "adamw": (torch.optim.AdamW, ADAMW, dict(name="adamw")),
    "lion": (bnb_lion, dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1), dict(name="lion")),
    "sgd": (torch.optim.SGD, dict(lr=1e-2, weight_decay=0.1), dict(name="sgd", momentum=0.0)),
    "sgd_momentum": (
        torch.optim.SGD,
        dict(lr=1e-2, weight_decay=0.1, momentum=0.9, dampening=0.3),
        dict(name="sgd", momentum=0.9, dampening=0.3),
    ),
    "sgd_nesterov": (
        torch.optim.SGD,
        dict(lr=1e-2, weight_decay=0.1, momentum=0.9, nesterov=True),
        dict(name="sgd", momentum=0.9, nesterov=True),
    ),
    "adafactor": (
        Adafactor,
        dict(lr=1e-2, weight_decay=0.1, scale_parameter=False, relative_step=False),
        dict(name="adafactor"),
    ),
    "adafactor_scaled": (
        Adafactor,
        dict(lr=1e-2, weight_decay=0.1, scale_parameter=True, relative_step=False, beta1=0.9, clip_threshold=0.8),
        dict(name="adafactor", scale_parameter=True, beta1=0.9, clip_threshold=0.8),
    ),
    "adafactor_relative": (
        Adafactor,
        dict(lr=None, scale_parameter=True, relative_step=True, decay_rate=-0.7),
        dict(name="adafactor", scale_parameter=True, relative_step=True, decay_rate=-0.7),
    ),
    "adafactor_warmup": (
        Adafactor,
        dict(lr=None, scale_parameter=False, relative_step=True, warmup_init=True),
        dict(name="adafactor", relative_step=True, warmup_init=True),
    ),
    "muon": (torch.optim.Muon, dict(lr=1e-2, weight_decay=0.1), dict(name="muon")),
    "muon_rms": (
        torch.optim.Muon,
        dict(lr=1e-2, weight_decay=0.1, nesterov=False, adjust_lr_fn="match_rms_adamw"),
        dict(name="muon", nesterov=False, adjust_lr="match_rms_adamw"),
    ),
    "muon_spectral": (
        torch.optim.Muon,
        dict(lr=1e-2, weight_decay=0.1, momentum=0.8, ns_steps=7, adjust_lr_fn="spectral_unclamped"),
        dict(name="muon", momentum=0.8, ns_steps=7, adjust_lr="spectral_unclamped"),
    ),
}


def run_rule(name, dtype=torch.float32):
    """Values of the small tensors after STEPS; Muon leaves the vector to AdamW."""
    make, knobs, _ = RULES[name]
    params = {k: torch.tensor(start(i, s)).to(dtype).requires_grad_() for i, (k, s) in enumerate(SMALL.items())}
    if make is torch.optim.Muon:
        matrices = [p for p in params.values() if p.ndim == 2]
        rest = [p for p in params.values() if p.ndim != 2]
        optimizers = [make(matrices, **knobs), torch.optim.AdamW(rest, **ADAMW)]
    else:
        optimizers = [make(list(params.values()), **knobs)]
    averaged = AveragedModel(torch.nn.ParameterDict(params), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    values = {}
    for step in range(1, max(STEPS) + 1):
        for i, p in enumerate(params.values()):
            p.grad = torch.tensor(gradient(i, step, p.shape)).to(dtype)
        for optimizer in optimizers:
            optimizer.step()
        averaged.update_parameters(torch.nn.ParameterDict(params))
        if step in STEPS:
            values |= {f"{name}.{step}.{k}": p.detach().clone() for k, p in params.items()}
            if name == "adamw":
                values |= {f"ema.{step}.{k}": p.detach().clone() for k, p in averaged.module.items()}
    return values


def distance(a, b):
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def rules():
    tensors, described = {}, []
    original = _muon._zeropower_via_newtonschulz
    in_f32 = muon_f32()
    for name, (make, knobs, settings) in RULES.items():
        _muon._zeropower_via_newtonschulz = in_f32
        values = run_rule(name)
        row = dict(name=name, settings=settings, lr=knobs["lr"], weight_decay=knobs.get("weight_decay", 0.0))
        if make is not bnb_lion:
            row["yardstick"] = distance(values, run_rule(name, torch.float64))
        if make is torch.optim.Muon:
            _muon._zeropower_via_newtonschulz = original
            row["from_bfloat16"] = distance(values, run_rule(name))
        tensors |= values
        described.append(row)
    return tensors, described


# ---------------------------------------------------------------------------------------------- 8-bit AdamW

BLOCK = 256
MAPS = {s: bitsandbytes.functional.create_dynamic_map(signed=s).numpy().copy() for s in (True, False)}


def decode(codes, absmax, signed):
    return MAPS[signed][codes] * np.repeat(absmax, BLOCK)[: len(codes)]


def encode(x, signed):
    """Nearest value of the map to x over its block's largest magnitude; the lower one of two."""
    code = MAPS[signed]
    bounds = (code[:-1] + code[1:]) / f32(2)
    absmax = np.array([np.abs(x[i : i + BLOCK]).max() for i in range(0, len(x), BLOCK)], f32)
    factor = f32(1) / np.maximum(absmax, f32(1e-38))
    scaled = np.clip(x * np.repeat(factor, BLOCK)[: len(x)], f32(-1), f32(1))
    return np.searchsorted(bounds, scaled, side="left").astype(np.uint8), absmax


def twin_8bit(number, shape, bits=8):
    """8-bit AdamW of one flat tensor, each operation rounded to f32; with bits=32 its moments stay f32."""
    p = start(number, shape).reshape(-1)
    lr, (b1, b2), eps, decay = (ADAMW[k] for k in ("lr", "betas", "eps", "weight_decay"))
    blocks = -(-len(p) // BLOCK)
    state = [(np.zeros(len(p), np.uint8), np.zeros(blocks, f32)) for _ in range(2)]
    moments = [np.zeros(len(p), f32) for _ in range(2)]
    values = {}
    for step in range(1, max(STEPS) + 1):
        g = gradient(number, step, shape).reshape(-1)
        if bits == 8:
            moments = [decode(*state[0], True), decode(*state[1], False)]
        m = moments[0] * f32(b1) + f32(1 - b1) * g
        v = moments[1] * f32(b2) + f32(1 - b2) * (g * g)
        root = f32((1 - b2**step) ** 0.5)
        denominator = np.sqrt(v) / root + f32(eps)
        p = p * f32(1 - lr * decay) - f32(lr / (1 - b1**step)) * (m / denominator)
        moments = [m, v]
        if bits == 8:
            state = [encode(m, True), encode(v, False)]
        if step in STEPS:
            values[step] = p.copy()
    return values, state


def exact_bnb(A, code, absmax_out, out_uint8, blocksize):
    """What bitsandbytes' CPU library looks up in a coarse table (0 becomes 2e-5), computed exactly instead, as its CUDA kernels do."""
    codes, absmax = encode(A.numpy().reshape(-1), bool(code[0] < 0))
    out_uint8.copy_(torch.tensor(codes).view(out_uint8.shape))
    absmax_out.copy_(torch.tensor(absmax))


def run_bnb(exact):
    """bitsandbytes' own AdamW8bit on the CPU; `exact` replaces its table of codes."""
    usual = bnb_cpu._quant_blockwise_fp32_direct
    if exact:
        bnb_cpu._quant_blockwise_fp32_direct = exact_bnb
    params = [torch.tensor(start(10 + i, s)).requires_grad_() for i, s in enumerate(LARGE.values())]
    optimizer = bitsandbytes.optim.AdamW8bit(params, **ADAMW)
    for step in range(1, max(STEPS) + 1):
        for i, p in enumerate(params):
            p.grad = torch.tensor(gradient(10 + i, step, p.shape))
        optimizer.step()
    bnb_cpu._quant_blockwise_fp32_direct = usual
    dtypes = [str(optimizer.state[p]["state1"].dtype) for p in params]
    assert dtypes == ["torch.uint8", "torch.float32"], dtypes
    codes = optimizer.state[params[0]]["state1"].numpy().reshape(-1)
    return [p.detach().numpy().reshape(-1) for p in params], codes


def eight_bits():
    tensors, off, off_table, flipped = {}, [], [], 0
    theirs, their_codes = run_bnb(exact=True)
    table, _ = run_bnb(exact=False)
    for i, (name, shape) in enumerate(LARGE.items()):
        values, state = twin_8bit(10 + i, shape, bits=32 if name == "small" else 8)
        tensors |= {f"adamw8bit.{step}.{name}": torch.tensor(p).reshape(shape) for step, p in values.items()}
        off.append(float(np.abs(values[50] - theirs[i]).max()))
        off_table.append(float(np.abs(values[50] - table[i]).max()))
        if name == "large":
            tensors[f"bitsandbytes.50.{name}"] = torch.tensor(theirs[i]).reshape(shape)
            flipped += int((state[0][0] != their_codes).sum())
            for moment, (codes, absmax) in zip(("m", "v"), state):
                tensors[f"codes.{moment}.{name}"] = torch.tensor(codes.astype(f32))
                tensors[f"absmax.{moment}.{name}"] = torch.tensor(absmax)
    tensors["map.signed"], tensors["map.unsigned"] = torch.tensor(MAPS[True]), torch.tensor(MAPS[False])
    # As bytes of the library's own portable quantiser, which is the exact one.
    x = noise(77, 1000, 1.0) * (10.0 ** (-6 * uniform(78, 1000))).astype(f32)
    kernel = torch.ops.bitsandbytes.quantize_blockwise.default._op_dk
    for signed in (True, False):
        values = torch.tensor(x if signed else np.abs(x))[: 3 * BLOCK]
        key = torch._C.DispatchKey.CompositeExplicitAutograd
        codes, absmax = kernel(key, values, torch.tensor(MAPS[signed]), BLOCK)
        mine, my_absmax = encode(values.numpy(), signed)
        assert (codes.numpy() == mine).all() and (absmax.numpy() == my_absmax).all()
    return tensors, dict(
        lr=ADAMW["lr"],
        weight_decay=ADAMW["weight_decay"],
        from_bitsandbytes=off,
        codes_that_differ=flipped,
        from_its_table=off_table,
    )


# ---------------------------------------------------------------------------------------------- schedules

LR = 3e-4


def schedule(make, kind, warmup, total, floor=0.0, **knobs):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=LR)
    names = inspect.signature(make).parameters
    if "num_warmup_steps" in names:
        knobs["num_warmup_steps"] = warmup
    if "num_training_steps" in names:
        knobs["num_training_steps"] = total
    scheduler = make(optimizer, **knobs)
    rates = []
    for _ in range(total):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return dict(function=make.__name__, kind=kind, warmup_steps=warmup, n_steps=total, min_lr_ratio=floor, lr=rates)


def schedules():
    o = optimization
    restarts, cosine = o.get_cosine_with_hard_restarts_schedule_with_warmup, o.get_cosine_schedule_with_warmup
    polynomial, wsd, inverse = o.get_polynomial_decay_schedule_with_warmup, o.get_wsd_schedule, o.get_inverse_sqrt_schedule
    floor = o.get_cosine_with_min_lr_schedule_with_warmup
    rows = [
        schedule(o.get_constant_schedule, "constant", 0, 5),
        schedule(o.get_constant_schedule_with_warmup, "constant", 4, 9),
        schedule(o.get_linear_schedule_with_warmup, "linear", 3, 20),
        schedule(o.get_linear_schedule_with_warmup, "linear", 0, 7),
        schedule(cosine, "cosine", 3, 20),
        schedule(floor, "cosine", 5, 30, floor=0.2, min_lr_rate=0.2),
        schedule(inverse, dict(name="inverse_sqrt"), 6, 40),
        schedule(inverse, dict(name="inverse_sqrt"), 0, 10),
        schedule(inverse, dict(name="inverse_sqrt", timescale=3), 5, 25, timescale=3),
    ]
    for cycles in (1, 2, 5):
        rows.append(schedule(restarts, dict(name="cosine_restarts", cycles=cycles), 4, 33, num_cycles=cycles))
    for power, floor in ((1.0, 0.0), (2.0, 0.1), (0.5, 0.5), (3.5, 0.01)):
        kind = dict(name="polynomial", power=power)
        rows.append(schedule(polynomial, kind, 3, 21, floor=floor, lr_end=floor * LR, power=power))
    for decay in ("linear", "cosine", "1-sqrt"):
        for floor in (0.0, 0.3):
            kind = dict(name="wsd", decay_steps=8, decay=decay)
            rows.append(schedule(wsd, kind, 5, 30, floor=floor, num_decay_steps=8, decay_type=decay, min_lr_ratio=floor))
    return rows


# ---------------------------------------------------------------------------------------------- loss options

ROWS, VOCAB = 7, 41
OPTIONS = {
    "plain": {},
    "smoothing": dict(label_smoothing=0.1),
    "z_loss": dict(z_loss=0.01),
    "dft": dict(reweight=True),
    "soft_cap": dict(soft_cap=3.0),
    "all": dict(label_smoothing=0.2, z_loss=0.02, reweight=True, soft_cap=5.0),
}


def row_losses(logits, targets, label_smoothing=0.0, z_loss=0.0, reweight=False, soft_cap=None):
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    plain = F.cross_entropy(logits, targets, reduction="none")
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    if reweight:
        loss = loss * torch.exp(-plain).detach()
    return loss + z_loss * torch.logsumexp(logits, -1) ** 2, plain


def losses():
    x = noise(501, ROWS * VOCAB, 6.0).reshape(ROWS, VOCAB)
    targets = torch.tensor((mix(502, np.arange(ROWS)) % np.uint64(VOCAB)).astype(np.int64))
    weights = torch.tensor(noise(503, ROWS, 1.0)).abs()
    tensors, described = {}, []
    for name, options in OPTIONS.items():
        results = []
        for dtype in (torch.float32, torch.float64):
            logits = torch.tensor(x, dtype=dtype, requires_grad=True)
            rows, plain = row_losses(logits, targets, **options)
            (rows * weights.to(dtype)).sum().backward()
            results.append({"loss": rows.detach(), "ce": plain.detach(), "dlogits": logits.grad})
        tensors |= {f"loss.{name}.{k}": v for k, v in results[1].items()}
        described.append(dict(name=name, options=options, yardstick=distance(results[0], results[1])))
    return tensors, described


# ---------------------------------------------------------------------------------------------- noise on embeddings


def neftune():
    """Loss and gradients of llama/plain with a document's noise on its embeddings, one document at a time."""
    folder = HERE / "llama" / "plain"
    config = LlamaConfig.from_dict(json.loads((folder / "config.json").read_text()))
    config._attn_implementation = "eager"
    rows = json.loads((folder / "golden.json").read_text())["rows"]
    alpha, seed = 5.0, 99
    results = []
    for dtype in (torch.float32, torch.float64):
        model = LlamaForCausalLM(config).to(dtype)
        model.load_state_dict({k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()})
        total, weight = 0.0, 0.0
        for k, row in enumerate(rows):
            ids, w = torch.tensor(row["input_ids"]), torch.tensor(row["weights"], dtype=dtype)
            size = len(ids) * config.hidden_size
            drawn = noise(int(mix(seed, k)), size, alpha / size**0.5).reshape(1, len(ids), -1)
            embeds = model.model.embed_tokens(ids)[None] + torch.tensor(drawn).to(dtype)
            logits = model(inputs_embeds=embeds, use_cache=False).logits[0]
            if len(ids) > 1:
                total = total + (F.cross_entropy(logits[:-1], ids[1:], reduction="none") * w[1:]).sum()
                weight += float(w[1:].sum())
        (total / weight).backward()
        kept = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"]
        grads = {f"neftune.{k}": p.grad for k, p in model.named_parameters() if k in kept}
        results.append(({"loss": total.detach() / weight}, grads))
    (loss, grads), (loss64, grads64) = results
    yardstick = dict(loss=distance(loss, loss64), grads=max(distance({k: v}, grads64) / float(v.abs().max()) for k, v in grads.items()))
    return grads64, dict(alpha=alpha, seed=seed, loss=float(loss64["loss"]), yardstick=yardstick)


# ---------------------------------------------------------------------------------------------- files


def write_json(path, value):
    text = json.dumps(value, indent=1, allow_nan=False)
    flat = re.sub(r"\[[^\[\]{}\"]*\]", lambda m: re.sub(r"\s+", " ", m.group()), text)
    path.write_text(flat + "\n")


def made():
    rule_tensors, rule_rows = rules()
    byte_tensors, bytes_row = eight_bits()
    loss_tensors, loss_rows = losses()
    noise_tensors, noise_row = neftune()
    versions = dict(
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        bitsandbytes=bitsandbytes.__version__,
        numpy=np.__version__,
    )
    described = dict(
        versions=versions,
        steps=STEPS,
        rules=rule_rows,
        ema_decay=0.9,
        adamw8bit=bytes_row,
        schedule_lr=LR,
        schedules=schedules(),
        losses=loss_rows,
        neftune=noise_row,
    )
    files = {"rules": rule_tensors, "eight_bits": byte_tensors, "losses": loss_tensors | noise_tensors}
    return {k: {n: t.detach().to(torch.float32).contiguous() for n, t in v.items()} for k, v in files.items()}, described


def close(a, b):
    """Equal, numbers to 1e-5: a yardstick's last digits are another machine's."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(close, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-5
    return a == b


def check(files, described):
    faults = []
    old = json.loads((HERE / "optim" / "optim.json").read_text())
    new = json.loads(json.dumps(described))
    for key in new:
        if key != "versions" and not close(old.get(key), new[key]):
            faults.append(f"optim.json: {key} differs")
    for name, tensors in files.items():
        there = load_file(HERE / "optim" / f"{name}.safetensors")
        if set(there) != set(tensors):
            faults.append(f"{name}: other tensors")
            continue
        faults += [f"{name}: {k} differs" for k, v in tensors.items() if float((v - there[k]).abs().max()) > 1e-6]
    print(f"{len(files) + 1} files compared, {len(faults)} faults", *faults, sep="\n")
    return not faults


def main():
    parser = argparse.ArgumentParser(description="Writes the goldens of update rules, schedules and the loss's options.")
    parser.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    torch.set_num_threads(1)
    files, described = made()
    if parser.parse_args().check:
        return 0 if check(files, described) else 1
    (HERE / "optim").mkdir(exist_ok=True)
    write_json(HERE / "optim" / "optim.json", described)
    for name, tensors in files.items():
        save_file(tensors, HERE / "optim" / f"{name}.safetensors", metadata={"format": "pt"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
