"""What the goldens of the families are computed on: one random model of 2 to 4 layers for each family and rotary scaling."""

import json
import math

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

# Longer and shorter than every window and original context below.
LENGTHS = [13, 5, 1, 19, 8]
TRAIN_LENGTHS = [6, 13, 9, 3, 16, 11, 5, 8]
GENERATE_LENGTHS = [1, 6, 11]
N_STEPS = 20
WINDOW = 5

# Adam's updates hardly depend on a gradient's scale, so `eps` keeps weights whose gradient is noise from moving at full speed.
RUNS = {
    "full": dict(
        base_lr=1e-2, warmup_steps=3, beta1=0.9, beta2=0.95, eps=1e-4, weight_decay=0.1, max_norm=1.0
    ),
    "lora": dict(
        base_lr=2e-2, warmup_steps=3, beta1=0.9, beta2=0.999, eps=1e-4, weight_decay=0.01, max_norm=1.0
    ),
}

BASE = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
    tie_word_embeddings=False,
)

DEFAULT = dict(rope_type="default", rope_theta=10000.0)
LLAMA3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
LONG = dict(short_factor=[1.0, 1.1, 1.3], long_factor=[1.2, 2.5, 7.0])

# `old`: config.json as transformers 4 wrote it. `trains` False: a scaling, whose training is that of its family.
VARIANTS = {
    "smollm3": dict(
        seed=101,
        model_type="smollm3",
        num_hidden_layers=3,
        head_dim=8,
        rope_parameters=DEFAULT | dict(rope_theta=50000.0),
        no_rope_layers=[1, 0, 1],
        use_sliding_window=True,
        sliding_window=WINDOW,
        tie_word_embeddings=True,
    ),
    "mistral": dict(
        seed=102, model_type="mistral", head_dim=6, rope_parameters=DEFAULT, sliding_window=WINDOW, old=True
    ),
    "qwen2": dict(
        seed=103,
        model_type="qwen2",
        num_hidden_layers=3,
        rope_parameters=DEFAULT | dict(rope_theta=1e6),
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=1,
        old=True,
    ),
    "qwen3": dict(
        seed=104, model_type="qwen3", head_dim=6, rope_parameters=DEFAULT, tie_word_embeddings=True
    ),
    "gemma2": dict(
        seed=105,
        model_type="gemma2",
        num_hidden_layers=3,
        head_dim=6,
        rope_parameters=DEFAULT,
        sliding_window=WINDOW,
        query_pre_attn_scalar=11,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=3.0,
        tie_word_embeddings=True,
        old=True,
    ),
    "gemma3": dict(
        seed=106,
        model_type="gemma3_text",
        num_hidden_layers=4,
        head_dim=6,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=4.0, rope_theta=1e5), sliding_attention=DEFAULT
        ),
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=11,
        tie_word_embeddings=True,
    ),
    "phi3": dict(seed=107, model_type="phi3", rope_parameters=DEFAULT, sliding_window=WINDOW, old=True),
    "granite": dict(
        seed=108,
        model_type="granite",
        rope_parameters=DEFAULT,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
        logits_scaling=1.7,
        tie_word_embeddings=True,
    ),
    "olmo2": dict(seed=109, model_type="olmo2", rope_parameters=DEFAULT | dict(rope_theta=500000.0)),
    "llama-linear": dict(
        seed=110,
        model_type="llama",
        rope_parameters=DEFAULT | dict(rope_type="linear", factor=3.0),
        old=True,
        trains=False,
    ),
    "llama-dynamic": dict(
        seed=111,
        model_type="llama",
        head_dim=6,
        max_position_embeddings=10,
        rope_parameters=DEFAULT | dict(rope_type="dynamic", factor=4.0),
        trains=False,
    ),
    "llama-llama3": dict(
        seed=112,
        model_type="llama",
        head_dim=16,
        rope_parameters=dict(rope_type="llama3", rope_theta=1000.0, **LLAMA3),
        trains=False,
    ),
    "qwen2-yarn": dict(
        seed=113,
        model_type="qwen2",
        head_dim=12,
        rope_parameters=DEFAULT | dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
        old=True,
        trains=False,
    ),
    "phi3-longrope": dict(
        seed=114,
        model_type="phi3",
        hidden_size=32,
        intermediate_size=16,
        original_max_position_embeddings=8,
        rope_parameters=DEFAULT | dict(rope_type="longrope", partial_rotary_factor=0.75, **LONG),
        tie_word_embeddings=True,
        trains=False,
    ),
}


def rope(model_type, head_dim, context, theta, **scaling):
    """A model of that head, of which only the rotary positions matter."""
    parameters = dict(rope_type="default", rope_theta=theta) | scaling
    return dict(
        model_type=model_type,
        hidden_size=head_dim,
        head_dim=head_dim,
        max_position_embeddings=context,
        rope_parameters=parameters,
    )


# Name, keys, and the length of the document.
ROPES = [
    ("Llama 2", rope("llama", 128, 4096, 10000.0), 4096),
    ("SmolLM3", rope("smollm3", 128, 65536, 5e6), 65536),
    (
        "Llama 3.1",
        rope(
            "llama",
            128,
            131072,
            5e5,
            rope_type="llama3",
            **LLAMA3 | dict(factor=8.0, original_max_position_embeddings=8192),
        ),
        131072,
    ),
    (
        "Llama 3.2",
        rope(
            "llama",
            64,
            131072,
            5e5,
            rope_type="llama3",
            **LLAMA3 | dict(factor=32.0, original_max_position_embeddings=8192),
        ),
        131072,
    ),
    ("Vicuna 16k", rope("llama", 128, 16384, 10000.0, rope_type="linear", factor=4.0), 16384),
    ("dynamic within", rope("llama", 128, 4096, 10000.0, rope_type="dynamic", factor=4.0), 4096),
    ("dynamic beyond", rope("llama", 128, 4096, 10000.0, rope_type="dynamic", factor=4.0), 9001),
    (
        "Qwen2.5",
        rope("qwen2", 128, 131072, 1e6, rope_type="yarn", factor=4.0, original_max_position_embeddings=32768),
        131072,
    ),
    (
        "YaRN untruncated",
        rope("llama", 80, 65536, 1e4, rope_type="yarn", factor=16.0, original_max_position_embeddings=4096)
        | dict(more=dict(truncate=False, beta_fast=24.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.9)),
        65536,
    ),
    (
        "LongRoPE within",
        rope("phi3", 96, 131072, 1e4, rope_type="longrope", original_max_position_embeddings=4096),
        4096,
    ),
    (
        "LongRoPE beyond",
        rope("phi3", 96, 131072, 1e4, rope_type="longrope", original_max_position_embeddings=4096),
        131072,
    ),
]
for _, keys, _ in ROPES:
    scaling = keys["rope_parameters"]
    scaling |= keys.pop("more", {})
    if scaling["rope_type"] == "longrope":
        keys["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        scaling |= dict(
            short_factor=[round(1 + 0.01 * i, 2) for i in range(48)],
            long_factor=[round(1.08 * 1.09**i, 6) for i in range(48)],
        )


def depends_on_length(v):
    """Whether transformers' cache holds keys that the whole forward rotates otherwise."""
    return v["rope_parameters"].get("rope_type") == "dynamic"


def make_config(v):
    keys = {k: x for k, x in v.items() if k not in ("seed", "model_type", "old", "trains")}
    config = AutoConfig.for_model(v["model_type"], **json.loads(json.dumps(BASE | keys)))
    config._attn_implementation = "eager"
    return config


def config_text(config, v):
    """As transformers writes it; `old`: as transformers 4 did, with `rope_theta` and `rope_scaling`."""
    d = json.loads(config.to_json_string(use_diff=True))
    d["architectures"] = [build(config, None).__class__.__name__]
    if v.get("old"):
        rope = d.pop("rope_parameters")
        d["rope_theta"] = rope.pop("rope_theta")
        rope.pop("partial_rotary_factor", None)
        rope["type"] = rope.pop("rope_type")
        d["rope_scaling"] = None if rope["type"] == "default" else rope
        d["torch_dtype"] = d.pop("dtype", "float32")
        d.pop("transformers_version", None)
        d.pop("layer_types", None)
    return json.dumps(d, indent=2, sort_keys=True) + "\n"


def make_weights(config, rng):
    """Large enough that logits are of the order of 1, and no norm or bias at its neutral value."""
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    centre = 0.0 if config.model_type.startswith("gemma") else 1.0
    weights = {}
    for name, p in sorted(model.named_parameters()):
        shape = tuple(p.shape)
        if name.endswith("norm.weight"):
            x = centre + 0.15 * rng.standard_normal(shape)
        elif name.endswith(".bias"):
            x = 0.2 * rng.standard_normal(shape)
        elif "embed_tokens" in name or "lm_head" in name:
            x = (0.3 if centre else 0.2) * rng.standard_normal(shape)
        else:
            x = rng.standard_normal(shape) / math.sqrt(shape[1])
        weights[name] = torch.from_numpy(x.astype(np.float32))
    return weights


def build(config, weights):
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    if weights is not None:
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
    return model.eval()


def reset(model):
    """Forgets the longest text seen: transformers' dynamic scaling carries it over to shorter ones."""
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached"):
            module.max_seq_len_cached = module.original_max_seq_len
            if hasattr(module, "original_inv_freq"):
                module.inv_freq = module.original_inv_freq.clone()


def make_peft(config, weights):
    """A PEFT model with an adapter on every linear map of the layers, and its configuration."""
    base = build(config, weights)
    linears = {n.rsplit(".")[-1] for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)}
    lora = LoraConfig(
        r=2,
        lora_alpha=5,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(linears),
        task_type="CAUSAL_LM",
    )
    text = dict(
        peft_type="LORA", r=2, lora_alpha=5, lora_dropout=0.0, bias="none", target_modules=sorted(linears)
    )
    return get_peft_model(base, lora).eval(), text


def adapter_tensors(model, rng):
    """Draws the adapter: A as PEFT draws it, B not zero, so that gradients of A are not."""
    tensors = {}
    for name, p in sorted(get_peft_model_state_dict(model).items()):
        bound = 1.0 / math.sqrt(p.shape[1])
        x = rng.uniform(-bound, bound, p.shape) if ".lora_A." in name else 0.1 * rng.standard_normal(p.shape)
        tensors[name] = torch.from_numpy(x.astype(np.float32))
    set_peft_model_state_dict(model, tensors)
    return tensors


def batches(n_rows):
    """Three rows a step, walking over the rows."""
    return [[(3 * s + i) * 5 % n_rows for i in range(3)] for s in range(N_STEPS)]
