#!/usr/bin/env python3
"""A Llama of Hugging Face's layout as GGUF without a vocabulary, for llama.cpp: to_gguf.py MODEL_DIR OUT.gguf bf16|f16"""

import json
import pathlib
import sys

import gguf
import torch
from safetensors.torch import load_file

TYPES = dict(bf16=gguf.GGMLQuantizationType.BF16, f16=gguf.GGMLQuantizationType.F16)
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def named(name):
    stem = name.removesuffix(".weight")
    if stem in WHOLE:
        return WHOLE[stem] + ".weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[rest]}.weight"


def interleaved(weight, n_heads):
    """llama.cpp rotates neighbouring pairs, Hugging Face's files have the halves of a head."""
    out, inp = weight.shape
    return weight.reshape(n_heads, 2, out // n_heads // 2, inp).swapaxes(1, 2).reshape(out, inp)


def main():
    folder, path, kind = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, weight in load_file(folder / "model.safetensors").items():
        weight = weight.to(torch.float32).numpy()
        if name.endswith("q_proj.weight"):
            weight = interleaved(weight, heads)
        if name.endswith("k_proj.weight"):
            weight = interleaved(weight, kv_heads)
        if weight.ndim == 1:
            writer.add_tensor(named(name), weight)
        else:
            writer.add_tensor(named(name), gguf.quants.quantize(weight, TYPES[kind]), raw_dtype=TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
