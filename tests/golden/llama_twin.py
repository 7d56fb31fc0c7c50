"""A second opinion on every golden: the decoder, its loss and AdamW in plain f64 tensor algebra."""

import math

import torch
from llama_cases import N_STEPS, batches, row_terms, weight_sum


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
        a, b = x[..., : k // 2], x[..., k // 2 :]
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


def relative(a, b):
    """Largest over tensors of max|a-b| / max|b|."""
    assert set(a) == set(b), set(a) ^ set(b)
    return max(
        float((a[k].double() - b[k].double()).abs().max() / b[k].abs().max().clamp_min(1e-30)) for k in b
    )


def twin_check(config, weights, rows, logits, grads, adapter=None, scaling=0.0):
    """Distances of f32 logits and gradients from the f64 twin's."""
    w, a = doubles(weights), doubles(adapter) if adapter else None
    mine = [twin_forward(config, w, r["input_ids"], a, scaling) for r in rows]
    (sum(row_terms(x, r)[0] for x, r in zip(mine, rows)) / weight_sum(rows)).backward()
    wanted = {k: v.grad for k, v in (a or w).items()}
    yard = dict(
        logits=max(float((x.double() - y.detach()).abs().max()) for x, y in zip(logits, mine)),
        grads=relative(grads, wanted),
    )
    assert yard["logits"] < 4e-6 and yard["grads"] < 4e-6, yard
    return yard


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
        norm = math.sqrt(sum(float((x.grad**2).sum()) for x in p.values()))
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
                x -= lr / (1 - b1**t) * m[k] / (v2[k].sqrt() / math.sqrt(1 - b2**t) + run["eps"])
    return losses, {k: x.detach() for k, x in p.items()}
