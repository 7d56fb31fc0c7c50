#!/usr/bin/env python3
"""Writes the goldens of the decoder, the loss and the optimizer into llama/ (README.md beside this file says what is what).

Inputs come from a seeded numpy generator, results from transformers' LlamaForCausalLM, PEFT and torch.optim.AdamW in f32 on one
thread. A second decoder, written here in plain f64 tensor algebra, checks every result, so that a golden is never the opinion of
one program; how far apart the two are is the `yardstick` that goes with the files.

  make_llama.py           writes llama/
  make_llama.py --check   writes to a temporary folder and compares with llama/
"""
import argparse
import json
import math
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import peft
import safetensors
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, get_scheduler

HERE = pathlib.Path(__file__).resolve().parent
FOLDER_BYTES_MAX = 1_500_000
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = [9, 14, 5, 1, 17, 12, 7, 11]
FRACTIONAL_LENGTHS = [8, 13, 2, 10]
TRAIN_LENGTHS = [6, 13, 9, 3, 16, 8, 11, 5, 12, 7, 14, 4, 10, 15, 2, 9]
N_NEW = 12
N_STEPS = 20

VARIANTS = {
    "plain": dict(
        seed=11, vocab_size=64, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2,
        head_dim=6, rms_norm_eps=1e-5, theta=10000.0, old_config=True,
        has=["lora", "rslora", "merged", "train_full", "train_lora"]),
    "tied": dict(
        seed=12, vocab_size=61, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        head_dim=12, rms_norm_eps=1e-6, theta=500000.0, tie_word_embeddings=True, max_norm=1.8,
        has=["lora", "train_full"]),
    "bias": dict(
        seed=13, vocab_size=64, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2,
        head_dim=6, rms_norm_eps=1e-5, theta=10000.0, attention_bias=True, has=["lora"]),
    "mlpbias": dict(
        seed=14, vocab_size=64, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, rms_norm_eps=1e-5, theta=10000.0, mlp_bias=True, tie_word_embeddings=True, old_config=True, has=[]),
}

RUNS = {
    "full": dict(base_lr=1e-2, warmup_steps=4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_norm=1.0),
    "lora": dict(base_lr=2e-2, warmup_steps=3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, max_norm=1.8),
}


def versions():
    return dict(
        python=platform.python_version(), torch=torch.__version__.split("+")[0], transformers=transformers.__version__,
        peft=peft.__version__, numpy=np.__version__, safetensors=safetensors.__version__)


def write_json(path, value):
    """One line per list of numbers: small, and a diff still shows what moved."""
    text = json.dumps(value, indent=1, allow_nan=False)
    flat = re.sub(r"\[[^\[\]{}\"]*\]", lambda m: re.sub(r"\s+", " ", m.group()), text)
    path.write_text(flat + "\n")


def save(tensors, path):
    tensors = {k: v.detach().to(torch.float32).contiguous().clone() for k, v in sorted(tensors.items())}
    save_file(tensors, path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------- inputs


def make_config(v):
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
            "rms_norm_eps", "tie_word_embeddings", "attention_bias", "mlp_bias")
    config = LlamaConfig(
        num_hidden_layers=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": v["theta"]}, **{k: v[k] for k in keys if k in v})
    config._attn_implementation = "eager"
    config.architectures = ["LlamaForCausalLM"]
    return config


def config_text(config, v):
    """As transformers writes it; `old_config`: as transformers 4 did, with `rope_theta` at the top and `torch_dtype`."""
    d = json.loads(config.to_json_string(use_diff=False))
    keep = ("architectures", "attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "head_dim", "hidden_act",
            "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings", "mlp_bias", "model_type",
            "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id", "pretraining_tp", "rms_norm_eps",
            "rope_parameters", "tie_word_embeddings", "transformers_version", "use_cache", "vocab_size")
    d = {k: x for k, x in d.items() if k in keep}
    d["dtype"] = "float32"
    if v.get("old_config"):
        d["rope_theta"] = d.pop("rope_parameters")["rope_theta"]
        d["rope_scaling"] = None
        d["torch_dtype"] = d.pop("dtype")
        d.pop("transformers_version", None)
        if d["head_dim"] * d["num_attention_heads"] == d["hidden_size"]:
            del d["head_dim"]
    return json.dumps(d, indent=2, sort_keys=True) + "\n"


def make_weights(config, rng):
    """Large enough that logits are of the order of 1, and no norm or bias at its neutral value."""
    model = LlamaForCausalLM(config).to(torch.float32)
    weights = {}
    for name, p in sorted(model.named_parameters()):
        shape = tuple(p.shape)
        if name.endswith("norm.weight"):
            x = 1.0 + 0.15 * rng.standard_normal(shape)
        elif name.endswith(".bias"):
            x = 0.2 * rng.standard_normal(shape)
        elif "embed_tokens" in name or "lm_head" in name:
            x = 0.2 * rng.standard_normal(shape)
        else:
            x = rng.standard_normal(shape) / math.sqrt(shape[1])
        weights[name] = torch.from_numpy(x.astype(np.float32))
    return weights


def build(config, weights):
    model = LlamaForCausalLM(config).to(torch.float32)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def make_rows(rng, lengths, vocab, kind):
    """Prompt, then response: weights 0 over the prompt. `kind` "hard" adds the rows that trip a loss up."""
    rows = []
    for i, n in enumerate(lengths):
        ids = rng.integers(0, vocab, n).tolist()
        start = int(rng.integers(1, n)) if n > 1 else 0
        if kind == "fractional":
            weights = [float(x) for x in rng.choice([0.0, 0.25, 0.5, 1.0, 1.5], n)]
        else:
            weights = [0.0] * start + [1.0] * (n - start)
        rows.append(dict(input_ids=ids, weights=weights))
    if kind == "hard":
        rows[0]["weights"] = [1.0] * lengths[0]  # also weights[0], which is nobody's target
        rows[2]["weights"] = [0.0] * lengths[2]  # a row that is masked wholly
        rows[5]["weights"] = [0.0] * (lengths[5] - 1) + [1.0]  # only the last token
        rows[7]["weights"] = [float(k % 3 != 1) for k in range(lengths[7])]  # holes
    return rows


def make_adapter(config, weights, rng, rslora):
    """A PEFT model on fresh base weights. A as PEFT draws it (uniform, 1/sqrt(in)), B not zero: gradients of A are then not zero."""
    lora = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, bias="none", target_modules=LINEARS, task_type="CAUSAL_LM", use_rslora=rslora)
    model = get_peft_model(build(config, weights), lora)
    tensors = {}
    for name, p in sorted(get_peft_model_state_dict(model).items()):
        bound = 1.0 / math.sqrt(p.shape[1])
        x = rng.uniform(-bound, bound, p.shape) if ".lora_A." in name else 0.1 * rng.standard_normal(p.shape)
        tensors[name] = torch.from_numpy(x.astype(np.float32))
    set_peft_model_state_dict(model, tensors)
    return model.eval(), tensors


# ---------------------------------------------------------------------------------------------- the f64 twin


def twin_forward(config, w, ids, adapter=None, scaling=0.0):
    """Logits (T, V) of one document in f64, from the published formulas and not from transformers' code."""
    n, k = len(ids), config.head_dim
    heads, kv = config.num_attention_heads, config.num_key_value_heads

    def linear(x, name):
        y = x @ w[name + ".weight"].T
        if name + ".bias" in w:
            y = y + w[name + ".bias"]
        if adapter is not None:
            a, b = (adapter[f"base_model.model.{name}.lora_{m}.weight"] for m in "AB")
            y = y + scaling * (x @ a.T @ b.T)
        return y

    def norm(x, name):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * w[name + ".weight"]

    theta = config.rope_parameters["rope_theta"]
    freq = theta ** (-torch.arange(0, k, 2, dtype=torch.float64) / k)
    angle = torch.arange(n, dtype=torch.float64)[:, None] * freq
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rope(x):
        a, b = x[..., : k // 2], x[..., k // 2:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][torch.tensor(ids)]
    future = torch.ones(n, n, dtype=torch.bool).triu(1)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        h = norm(x, at + "input_layernorm")
        q = rope(linear(h, at + "self_attn.q_proj").view(n, heads, k))
        key = rope(linear(h, at + "self_attn.k_proj").view(n, kv, k)).repeat_interleave(heads // kv, 1)
        val = linear(h, at + "self_attn.v_proj").view(n, kv, k).repeat_interleave(heads // kv, 1)
        score = torch.einsum("qhk,shk->hqs", q, key) / math.sqrt(k)
        p = score.masked_fill(future, -math.inf).softmax(-1)
        x = x + linear(torch.einsum("hqs,shk->qhk", p, val).reshape(n, heads * k), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm")
        gate = linear(h, at + "mlp.gate_proj")
        x = x + linear(gate * torch.sigmoid(gate) * linear(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T


def doubles(tensors):
    return {k: v.to(torch.float64).requires_grad_(True) for k, v in tensors.items()}


# ---------------------------------------------------------------------------------------------- loss


def row_terms(logits, row):
    """Sum of w * CE, sum of w, targets with weight, and how many of those are the largest logit, for one document."""
    target = torch.tensor(row["input_ids"][1:], dtype=torch.long)
    weight = torch.tensor(row["weights"][1:], dtype=logits.dtype)
    head = logits[:-1]
    ce = F.cross_entropy(head, target, reduction="none") if len(target) else head.sum(-1)
    hit = ((head.argmax(-1) == target) & (weight > 0)).sum()
    return (ce * weight).sum(), float(weight.sum()), int((weight > 0).sum()), int(hit)


def weight_sum(rows):
    return sum(sum(r["weights"][1:]) for r in rows)


def one(model, row):
    """Logits of a row alone: no padding, no mask."""
    return model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]


def padded(model, rows):
    """Logits of ragged rows as one right-padded batch."""
    width = max(len(r["input_ids"]) for r in rows)
    ids = torch.tensor([r["input_ids"] + [0] * (width - len(r["input_ids"])) for r in rows])
    mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return [logits[i, : len(r["input_ids"])] for i, r in enumerate(rows)]


def summary(logits, rows):
    terms = [row_terms(l, r) for l, r in zip(logits, rows)]
    total, weight = sum(float(t[0]) for t in terms), sum(t[1] for t in terms)
    return dict(
        loss=total / weight, weighted_ce=total, weight_sum=weight, n_targets=sum(t[2] for t in terms),
        n_correct=sum(t[3] for t in terms), row_weighted_ce=[float(t[0]) for t in terms], row_weight_sum=[t[1] for t in terms])


def trainable(model):
    """Parameters with a gradient, under the names of the file format (PEFT drops the adapter's own name)."""
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}


def accumulate(model, rows, layout, normaliser):
    """Backward over micro-batches (lists of row numbers) with the whole step's normaliser; the micro-batches' terms."""
    model.zero_grad(set_to_none=True)
    micro = []
    for picked in layout:
        batch = [rows[i] for i in picked]
        terms = [row_terms(l, r) for l, r in zip(padded(model, batch), batch)]
        total = sum(t[0] for t in terms)
        (total / normaliser).backward()
        micro.append(dict(rows=list(picked), weighted_ce=float(total.detach()), weight_sum=sum(t[1] for t in terms)))
    return micro


def gradients(model, rows):
    accumulate(model, rows, [[i] for i in range(len(rows))], weight_sum(rows))
    return {n: p.grad.clone() for n, p in trainable(model).items()}


def hf_loss_agrees(model, rows, expected):
    """transformers' own loss on the same rows (weights 0 and 1 only), given the shifted count as its normaliser."""
    width = max(len(r["input_ids"]) for r in rows)
    pad = lambda xs, x: xs + [x] * (width - len(xs))
    ids = torch.tensor([pad(r["input_ids"], 0) for r in rows])
    mask = torch.tensor([pad([1] * len(r["input_ids"]), 0) for r in rows])
    labels = torch.tensor([pad([t if w else -100 for t, w in zip(r["input_ids"], r["weights"])], -100) for r in rows])
    n = torch.tensor(weight_sum(rows))
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=n).loss
    assert abs(float(loss) - expected) < 2e-6, (float(loss), expected)


def relative(a, b):
    """Largest over tensors of max|a-b| / max|b|."""
    assert set(a) == set(b), set(a) ^ set(b)
    return max(float((a[k].double() - b[k].double()).abs().max() / b[k].abs().max().clamp_min(1e-30)) for k in b)


# ---------------------------------------------------------------------------------------------- sections of a variant


def packed_case(model, rows, logits):
    """All rows end to end with restarting positions and a block-diagonal causal mask: the same logits as alone."""
    ids = [t for r in rows for t in r["input_ids"]]
    lens = [len(r["input_ids"]) for r in rows]
    positions = [p for n in lens for p in range(n)]
    doc = torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))
    see = (doc[:, None] == doc[None]) & torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    mask = torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)[None, None]
    kw = dict(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False)
    got = model(attention_mask=mask, **kw).logits[0]
    assert float((got - torch.cat(logits)).abs().max()) < 5e-6
    assert float((model(**kw).logits[0] - got).abs().max()) < 5e-6  # transformers finds the documents by their positions
    weights = [w for r in rows for w in [0.0] + r["weights"][1:]]
    return dict(input_ids=ids, position_ids=positions, seq_lens=lens, weights=weights), got


def greedy(model, prompt):
    """12 new tokens with the cache, the logits that chose them, and the same with a stop id."""
    n = len(prompt)
    model.generation_config.eos_token_id = None
    kw = dict(do_sample=False, max_new_tokens=N_NEW, use_cache=True, pad_token_id=0, return_dict_in_generate=True,
              output_logits=True, attention_mask=torch.ones(1, n, dtype=torch.long))
    out = model.generate(torch.tensor([prompt]), **kw)
    new, step = out.sequences[0, n:].tolist(), torch.cat(out.logits)
    assert len(new) == N_NEW
    best = step.topk(2).values
    stop = new[5]
    stopped = model.generate(torch.tensor([prompt]), eos_token_id=stop, **kw).sequences[0, n:].tolist()
    assert stopped == new[: new.index(stop) + 1]
    again = one(model, dict(input_ids=prompt + new))[n - 1:-1]
    assert float((again - step).abs().max()) < 1e-5, "the cache changes the logits"
    margin = float((best[:, 0] - best[:, 1]).min())
    return dict(prompt=prompt, new_ids=new, margin=margin, stop_ids=[stop], stopped_ids=stopped), step


def generation(model, rng, vocab):
    """Prompts are drawn again until no choice among the new tokens is a close one."""
    cases, logits = [], {}
    for i, n in enumerate([1, 6, 11]):
        case, step = greedy(model, rng.integers(3, vocab, n).tolist())
        while case["margin"] < 0.01:
            case, step = greedy(model, rng.integers(3, vocab, n).tolist())
        cases.append(case)
        logits[f"generate.{i}"] = step
    return cases, logits


def twin_check(config, weights, rows, logits, grads, adapter=None, scaling=0.0):
    """Distances of f32 logits and gradients from the f64 twin's."""
    w, a = doubles(weights), doubles(adapter) if adapter else None
    mine = [twin_forward(config, w, r["input_ids"], a, scaling) for r in rows]
    (sum(row_terms(l, r)[0] for l, r in zip(mine, rows)) / weight_sum(rows)).backward()
    wanted = {k: v.grad for k, v in (a or w).items()}
    yard = dict(logits=max(float((x.double() - y.detach()).abs().max()) for x, y in zip(logits, mine)), grads=relative(grads, wanted))
    assert yard["logits"] < 4e-6 and yard["grads"] < 4e-6, yard
    return yard


def accumulation_case(model, rows, grads):
    out = {}
    for name, layout in {"1x8": [range(8)], "2x4": [range(4), range(4, 8)], "8x1": [[i] for i in range(8)]}.items():
        micro = accumulate(model, rows, layout, weight_sum(rows))
        got = {n: p.grad for n, p in trainable(model).items()}
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in got.values()])))
        diff = relative(got, grads)
        assert diff < 2e-6, (name, diff)
        loss = sum(m["weighted_ce"] for m in micro) / weight_sum(rows)
        out[name] = dict(loss=loss, grad_norm=norm, micro=micro, max_grad_difference=diff)
    return out


def adapter_files(config, weights, folder, seed, rslora):
    model, tensors = make_adapter(config, weights, np.random.Generator(np.random.PCG64(seed)), rslora)
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        written = load_file(f"{tmp}/adapter_model.safetensors")
        assert all(torch.equal(written[k], v) for k, v in tensors.items()) and len(written) == len(tensors)
        text = json.loads(pathlib.Path(tmp, "adapter_config.json").read_text())
    text["target_modules"] = sorted(text["target_modules"])  # PEFT keeps a set: its order changes from run to run
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    save(tensors, folder / "adapter_model.safetensors")
    return model, tensors


# ---------------------------------------------------------------------------------------------- training runs


def batches(n_rows):
    """Two micro-batches of two rows a step, walking over the rows with a stride that repeats none in a step."""
    order = [(5 * i) % n_rows for i in range(4 * N_STEPS)]
    return [[order[4 * s: 4 * s + 2], order[4 * s + 2: 4 * s + 4]] for s in range(N_STEPS)]


def train(model, rows, run):
    """20 steps with torch's AdamW, transformers' schedule and torch's clipping."""
    params = trainable(model)
    decay = [n for n, p in params.items() if p.dim() == 2]
    plain = [n for n, p in params.items() if p.dim() != 2]
    groups = [dict(params=[params[n] for n in names], weight_decay=d) for names, d in ((decay, run["weight_decay"]), (plain, 0.0))]
    opt = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=run["base_lr"], betas=(run["beta1"], run["beta2"]), eps=run["eps"],
        foreach=False, fused=False)
    sched = get_scheduler("cosine", opt, num_warmup_steps=run["warmup_steps"], num_training_steps=N_STEPS)
    steps = []
    for s, layout in enumerate(batches(len(rows))):
        weight = weight_sum([rows[i] for b in layout for i in b])
        lr = sched.get_last_lr()[0]
        micro = accumulate(model, rows, layout, weight)
        norm = float(torch.nn.utils.clip_grad_norm_(list(params.values()), run["max_norm"], foreach=False))
        opt.step()
        sched.step()
        steps.append(dict(
            step=s, micro_batches=layout, lr=lr, loss=sum(m["weighted_ce"] for m in micro) / weight, weight_sum=weight,
            grad_norm=norm, clip=min(1.0, run["max_norm"] / (norm + 1e-6))))
    return steps, decay, plain, {n: p.detach().clone() for n, p in params.items()}


def train_twin(config, weights, adapter, scaling, rows, run):
    """The same run in f64, with the update written out as README.md states it."""
    w, a = doubles(weights), doubles(adapter) if adapter else None
    p = a or w
    m = {k: torch.zeros_like(v) for k, v in p.items()}
    v2 = {k: torch.zeros_like(v) for k, v in p.items()}
    losses = []
    for s, layout in enumerate(batches(len(rows))):
        picked = [rows[i] for b in layout for i in b]
        total = sum(row_terms(twin_forward(config, w, r["input_ids"], a, scaling), r)[0] for r in picked)
        for x in p.values():
            x.grad = None
        loss = total / weight_sum(picked)
        loss.backward()
        losses.append(float(loss.detach()))
        norm = math.sqrt(sum(float((x.grad ** 2).sum()) for x in p.values()))
        clip = min(1.0, run["max_norm"] / (norm + 1e-6))
        up = run["warmup_steps"]
        f = s / up if s < up else (1 + math.cos(math.pi * (s - up) / (N_STEPS - up))) / 2
        lr, b1, b2, t = run["base_lr"] * f, run["beta1"], run["beta2"], s + 1
        with torch.no_grad():
            for k, x in p.items():
                g = x.grad * clip
                if x.dim() == 2:
                    x *= 1 - lr * run["weight_decay"]
                m[k] = b1 * m[k] + (1 - b1) * g
                v2[k] = b2 * v2[k] + (1 - b2) * g * g
                x -= lr / (1 - b1 ** t) * m[k] / (v2[k].sqrt() / math.sqrt(1 - b2 ** t) + run["eps"])
    return losses, {k: x.detach() for k, x in p.items()}


def train_files(method, max_norm, model, config, weights, adapter, scaling, rows, folder):
    run = RUNS[method] | ({"max_norm": max_norm} if max_norm else {})
    steps, decay, plain, final = train(model, rows, run)
    losses, twin = train_twin(config, weights, adapter, scaling, rows, run)
    yard = dict(
        losses=max(abs(a["loss"] - b) for a, b in zip(steps, losses)),
        final=max(float((final[k].double() - twin[k]).abs().max()) for k in final))
    assert yard["losses"] < 5e-6 and yard["final"] < 1e-4, yard
    assert run["max_norm"] == 1.0 or {x["clip"] < 1 for x in steps} == {True, False}, [x["grad_norm"] for x in steps]
    save(final, folder / f"train_{method}_final.safetensors")
    write_json(folder / f"train_{method}.json", dict(
        versions=versions(), method=method, rows=rows,
        optimizer={k: run[k] for k in ("beta1", "beta2", "eps", "weight_decay", "max_norm")},
        schedule=dict(name="cosine", base_lr=run["base_lr"], warmup_steps=run["warmup_steps"], total_steps=N_STEPS),
        decay=sorted(decay), no_decay=sorted(plain), steps=steps, yardstick=yard))
    print(f"  train {method}: loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}, norms "
          f"{min(s['grad_norm'] for s in steps):.3f}..{max(s['grad_norm'] for s in steps):.3f}, yardstick {yard}")


# ---------------------------------------------------------------------------------------------- the whole


def adapters_of(v, config, weights, golden, logits, folder):
    """LoRA and rsLoRA: logits, losses, gradients and yardsticks of `rows` with the adapter on."""
    rows = golden["rows"]
    for kind, scaling in (("lora", 8 / 4), ("rslora", 8 / math.sqrt(4))):
        if kind not in v["has"]:
            continue
        model, tensors = adapter_files(config, weights, folder / kind, v["seed"] + 100, kind == "rslora")
        with torch.no_grad():
            mine = [one(model, r) for r in rows]
        grads = gradients(model, rows)
        golden["loss"][kind] = summary(mine, rows)
        golden["yardstick"][kind] = twin_check(config, weights, rows, mine, grads, tensors, scaling)
        logits.update({f"{kind}.{i}": x for i, x in enumerate(mine)})
        save(grads, folder / f"{kind}_grads.safetensors")
        if kind == "lora" and "train_lora" in v["has"]:
            train_rows = make_rows(np.random.Generator(np.random.PCG64(v["seed"] + 200)), TRAIN_LENGTHS, config.vocab_size, "")
            train_files("lora", None, model, config, weights, tensors, scaling, train_rows, folder)
        if kind == "lora" and "merged" in v["has"]:
            set_peft_model_state_dict(model, tensors)
            merged = model.merge_and_unload()
            with torch.no_grad():
                assert max(float((one(merged, r) - x).abs().max()) for r, x in zip(rows, mine)) < 5e-6
            save({k: p for k, p in merged.named_parameters()}, folder / "merged.safetensors")


def variant(name, v, folder):
    folder.mkdir(parents=True)
    rng = np.random.Generator(np.random.PCG64(v["seed"]))
    config = make_config(v)
    weights = make_weights(config, rng)
    (folder / "config.json").write_text(config_text(config, v))
    save(weights, folder / "model.safetensors")
    loaded = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()

    model = build(config, weights)
    rows = make_rows(rng, LENGTHS, config.vocab_size, "hard")
    fractional = make_rows(rng, FRACTIONAL_LENGTHS, config.vocab_size, "fractional")
    with torch.no_grad():
        mine, frac = [one(model, r) for r in rows], [one(model, r) for r in fractional]
        apart = max(float((one(loaded, r) - x).abs().max()) for r, x in zip(rows, mine))
        assert apart < 4e-6, f"config.json says another model: {apart}"  # memory alignment moves last bits
        packed, packed_logits = packed_case(model, rows, mine)
        generate, logits = generation(model, rng, config.vocab_size)
    logits |= {f"rows.{i}": x for i, x in enumerate(mine)} | {f"fractional.{i}": x for i, x in enumerate(frac)}
    logits["packed"] = packed_logits
    grads, frac_grads = gradients(model, rows), gradients(model, fractional)
    golden = dict(
        versions=versions(), variant=name, rows=rows, fractional=fractional,
        loss=dict(rows=summary(mine, rows), fractional=summary(frac, fractional)), packed=packed,
        accumulation=accumulation_case(model, rows, grads), generate=generate,
        yardstick=dict(rows=twin_check(config, weights, rows, mine, grads),
                       fractional=twin_check(config, weights, fractional, frac, frac_grads)))
    hf_loss_agrees(model, rows, golden["loss"]["rows"]["loss"])
    save(grads, folder / "grads.safetensors")
    save(frac_grads, folder / "grads_fractional.safetensors")
    adapters_of(v, config, weights, golden, logits, folder)
    if "train_full" in v["has"]:
        train_rows = make_rows(np.random.Generator(np.random.PCG64(v["seed"] + 200)), TRAIN_LENGTHS, config.vocab_size, "")
        train_files("full", v.get("max_norm"), model, config, weights, None, 0.0, train_rows, folder)
    save(logits, folder / "logits.safetensors")
    write_json(folder / "golden.json", golden)
    peak = max(float(x.abs().max()) for x in logits.values())
    print(f"{name}: loss {golden['loss']['rows']['loss']:.4f}, largest logit {peak:.2f}, yardstick {golden['yardstick']}")


def schedules():
    out = []
    for name, warm, total, ratio in (
            ("constant", 0, 6, None), ("constant_with_warmup", 3, 8, None), ("linear", 0, 7, None), ("linear", 4, 20, None),
            ("cosine", 0, 7, None), ("cosine", 5, 20, None), ("cosine", 1, 2, None), ("cosine_with_min_lr", 3, 12, 0.1),
            ("linear", 20, 20, None)):
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
        extra = dict(scheduler_specific_kwargs=dict(min_lr_rate=ratio)) if ratio else {}
        sched = get_scheduler(name, opt, num_warmup_steps=warm, num_training_steps=total, **extra)
        lrs = []
        for _ in range(total):
            lrs.append(sched.get_last_lr()[0])
            opt.step()
            sched.step()
        out.append(dict(name=name, base_lr=3e-4, warmup_steps=warm, total_steps=total, min_lr_ratio=ratio or 0.0, lr=lrs))
    return dict(versions=versions(), schedules=out)


def write(root):
    root.mkdir(parents=True, exist_ok=True)
    for name, v in VARIANTS.items():
        variant(name, v, root / name)
    write_json(root / "schedules.json", schedules())
    index = {n: sorted(str(p.relative_to(root / n)) for p in (root / n).rglob("*") if p.is_file()) for n in VARIANTS}
    write_json(root / "index.json", dict(versions=versions(), variants=index))
    size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    print(f"{size} bytes")
    assert size <= FOLDER_BYTES_MAX, "too large for the repository"


def same(a, b, where, faults):
    """JSON values equal, numbers with a fraction up to the tolerance of README.md."""
    if isinstance(a, dict) and isinstance(b, dict) and set(a) == set(b):
        for k in a:
            if k not in ("versions", "yardstick", "max_grad_difference"):
                same(a[k], b[k], f"{where}.{k}", faults)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b)):
            same(x, y, f"{where}[{i}]", faults)
    elif isinstance(a, float) and isinstance(b, float):
        if abs(a - b) > 1e-5 * max(1.0, abs(b)):
            faults.append(f"{where}: {a} and {b}")
    elif a != b:
        faults.append(f"{where}: {a!r:.60} and {b!r:.60}")


def check(new, old):
    files = lambda root: sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
    faults = [] if files(new) == files(old) else [f"other files: {set(files(new)) ^ set(files(old))}"]
    for f in sorted(set(files(new)) & set(files(old))):
        if f.endswith(".json"):
            same(json.loads((new / f).read_text()), json.loads((old / f).read_text()), f, faults)
            continue
        a, b = load_file(new / f), load_file(old / f)
        exact = pathlib.Path(f).name in ("model.safetensors", "adapter_model.safetensors")
        tol = 0.0 if exact else 1e-4 if "_final" in f else 1e-5
        for k in sorted(set(a) | set(b)):
            if k not in a or k not in b or a[k].shape != b[k].shape:
                faults.append(f"{f}: {k} is not in both")
            elif float((a[k] - b[k]).abs().max()) > tol * max(1.0, float(b[k].abs().max())):
                faults.append(f"{f}: {k} differs by {float((a[k] - b[k]).abs().max())}")
    print(f"{len(files(new))} files compared, {len(faults)} faults", *faults, sep="\n")
    return not faults


def main():
    args = argparse.ArgumentParser(description="Writes the goldens of the decoder.")
    args.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.parse_args().check:
        with tempfile.TemporaryDirectory() as tmp:
            write(pathlib.Path(tmp, "llama"))
            return 0 if check(pathlib.Path(tmp, "llama"), HERE / "llama") else 1
    with tempfile.TemporaryDirectory(dir=HERE) as tmp:
        write(pathlib.Path(tmp, "llama"))
        if (HERE / "llama").exists():
            shutil.rmtree(HERE / "llama")
        pathlib.Path(tmp, "llama").rename(HERE / "llama")
    return 0


if __name__ == "__main__":
    sys.exit(main())
