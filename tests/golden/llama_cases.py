"""What the goldens of the decoder are computed on: configurations, weights, rows, adapters, and the loss of a row."""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LENGTHS = [9, 14, 5, 1, 17, 12, 7, 11]
FRACTIONAL_LENGTHS = [8, 13, 2, 10]
TRAIN_LENGTHS = [6, 13, 9, 3, 16, 8, 11, 5, 12, 7, 14, 4, 10, 15, 2, 9]
N_STEPS = 20

VARIANTS = {
    "plain": dict(
        seed=11,
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-5,
        theta=10000.0,
        old_config=True,
        has=["lora", "rslora", "merged", "train_full", "train_lora"],
    ),
    "tied": dict(
        seed=12,
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        rms_norm_eps=1e-6,
        theta=500000.0,
        tie_word_embeddings=True,
        run=dict(max_norm=3.0, eps=1e-3),
        has=["lora", "train_full"],
    ),
    "bias": dict(
        seed=13,
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        rms_norm_eps=1e-5,
        theta=10000.0,
        attention_bias=True,
        has=["lora"],
    ),
    "mlpbias": dict(
        seed=14,
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-5,
        theta=10000.0,
        mlp_bias=True,
        tie_word_embeddings=True,
        old_config=True,
        has=[],
    ),
}

# Adam's update hardly depends on the gradient's scale, so clipping and the place of eps show only where eps is large:
# the run of `tied` is such a one.
RUNS = {
    "full": dict(
        base_lr=1e-2, warmup_steps=4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_norm=1.0
    ),
    "lora": dict(
        base_lr=2e-2, warmup_steps=3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, max_norm=1.8
    ),
}


def make_config(v):
    keys = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
    )
    config = LlamaConfig(
        num_hidden_layers=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": v["theta"]},
        **{k: v[k] for k in keys if k in v},
    )
    config._attn_implementation = "eager"
    config.architectures = ["LlamaForCausalLM"]
    return config


def config_text(config, v):
    """As transformers writes it; `old_config`: as transformers 4 did, with `rope_theta` at the top and `torch_dtype`."""
    d = json.loads(config.to_json_string(use_diff=False))
    keep = (
        "architectures",
        "attention_bias",
        "attention_dropout",
        "bos_token_id",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "initializer_range",
        "intermediate_size",
        "max_position_embeddings",
        "mlp_bias",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "pad_token_id",
        "pretraining_tp",
        "rms_norm_eps",
        "rope_parameters",
        "tie_word_embeddings",
        "transformers_version",
        "use_cache",
        "vocab_size",
    )
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
    for n in lengths:
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
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        bias="none",
        target_modules=LINEARS,
        task_type="CAUSAL_LM",
        use_rslora=rslora,
    )
    model = get_peft_model(build(config, weights), lora)
    tensors = {}
    for name, p in sorted(get_peft_model_state_dict(model).items()):
        bound = 1.0 / math.sqrt(p.shape[1])
        x = rng.uniform(-bound, bound, p.shape) if ".lora_A." in name else 0.1 * rng.standard_normal(p.shape)
        tensors[name] = torch.from_numpy(x.astype(np.float32))
    set_peft_model_state_dict(model, tensors)
    return model.eval(), tensors


def batches(n_rows):
    """Two micro-batches of two rows a step, walking over the rows with a stride that repeats none in a step."""
    order = [(5 * i) % n_rows for i in range(4 * N_STEPS)]
    return [[order[4 * s : 4 * s + 2], order[4 * s + 2 : 4 * s + 4]] for s in range(N_STEPS)]


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
