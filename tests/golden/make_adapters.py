#!/usr/bin/env python3
"""Writes the goldens of adapters into adapters/: one folder a knob of PEFT's LoraConfig, on the base models in llama/ and families/.

Results are PEFT's in f32 on one thread; the same model in f64 says how far they can be trusted (`yardstick`).

  make_adapters.py           writes adapters/
  make_adapters.py --check   writes to a temporary folder and compares with adapters/
  make_adapters.py --read D  loads adapters that hone wrote, folders named after the cases, and compares their logits with adapters/
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import family_cases
import llama_cases
import peft
import torch
import transformers
from llama_cases import LINEARS, VARIANTS, row_terms, weight_sum
from llama_twin import relative
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).resolve().parent
FOLDER_BYTES_MAX = 1_500_000

# name: (base, settings); a base is a folder in llama/ or families/.
CASES = {
    "rank_pattern": (
        "plain",
        dict(
            target_modules=LINEARS,
            rank_pattern={"q_proj": 2, r"layers\.1\.mlp\..*": 6, "mlp.up_proj": 1},
            alpha_pattern={"up_proj": 3, r"layers\.0\.self_attn\.(k|v)_proj": 20},
        ),
    ),
    "rank_pattern_rslora": (
        "plain",
        dict(target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 9}, use_rslora=True),
    ),
    "regex": ("plain", dict(target_modules=r".*layers\.1\.(?!mlp\.up).*(q|v|up|down)_proj")),
    "layers": (
        "plain",
        dict(
            target_modules=LINEARS,
            layers_to_transform=[1],
            layers_pattern="layers",
            exclude_modules=["k_proj", "mlp.up_proj"],
        ),
    ),
    "exclude": ("plain", dict(target_modules=["self_attn.q_proj", "v_proj"], exclude_modules=r".*\.0\..*q_proj")),
    "all_linear": ("bias", dict(target_modules="all-linear")),
    "dora": ("bias", dict(target_modules=LINEARS, use_dora=True)),
    "dora_some": (
        "plain",
        dict(
            target_modules=["q_proj", "v_proj", "up_proj", "o_proj"],
            use_dora=True,
            use_rslora=True,
            rank_pattern={"v_proj": 7},
        ),
    ),
    "bias_all": ("bias", dict(target_modules=["q_proj", "up_proj"], bias="all")),
    "bias_lora_only": ("bias", dict(target_modules=["q_proj", "o_proj", "up_proj"], bias="lora_only")),
    "saved": ("plain", dict(target_modules=LINEARS, modules_to_save=["lm_head", "embed_tokens"])),
    "saved_norms": ("bias", dict(target_modules=["q_proj"], modules_to_save=["input_layernorm", "model.norm"])),
    "saved_tied_head": ("tied", dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "saved_tied_embedding": ("tied", dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    "embedding": ("plain", dict(target_modules=["embed_tokens", "q_proj"], rank_pattern={"embed_tokens": 3})),
    "embedding_tied": ("tied", dict(target_modules=["embed_tokens", "q_proj"])),
    "head": ("plain", dict(target_modules=["lm_head", "q_proj"])),
    "head_tied": ("tied", dict(target_modules=["lm_head", "q_proj"])),
    "tokens": (
        "plain",
        dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 5, 63], "lm_head": [63, 5]}),
    ),
    "tokens_tied": ("tied", dict(target_modules=["q_proj"], trainable_token_indices=[60, 2, 7])),
    # Scaled embeddings and logits, soft caps, norms around the halves, fused maps.
    "gemma2_head": ("gemma2", dict(target_modules=["lm_head", "down_proj", "k_proj"])),
    "gemma3_dora": ("gemma3", dict(target_modules="all-linear", use_dora=True)),
    "gemma3_embedding": ("gemma3", dict(target_modules=["embed_tokens", "q_proj"], rank_pattern={"embed_tokens": 3})),
    "gemma3_tokens": ("gemma3", dict(target_modules=["o_proj"], trainable_token_indices=[15, 3, 9])),
    "phi3_all_linear": ("phi3", dict(target_modules="all-linear", use_rslora=True)),
    "phi3_dora": ("phi3", dict(target_modules="all-linear", use_dora=True, rank_pattern={"gate_up_proj": 2})),
    "phi3_saved": ("phi3", dict(target_modules=["qkv_proj"], modules_to_save=["lm_head", "embed_tokens", "model.norm"])),
    "granite_dora": ("granite", dict(target_modules="all-linear", use_dora=True)),
    "granite_embedding": ("granite", dict(target_modules=["embed_tokens", "up_proj"])),
    "granite_head": ("granite", dict(target_modules=["lm_head", "v_proj"])),
    "granite_saved": ("granite", dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "granite_tokens": ("granite", dict(target_modules=["gate_proj"], trainable_token_indices=[15, 3, 9])),
    # The end of a name need not begin at a dot in modules_to_save: every norm, of heads and around halves too.
    "gemma3_saved": ("gemma3", dict(target_modules=["q_proj"], modules_to_save=["norm"])),
    # Names in full are meant whatever the layers.
    "layers_names": (
        "plain",
        dict(target_modules=["up_proj", "lm_head", "model.layers.0.self_attn.v_proj"], layers_to_transform=[1]),
    ),
}


def open_base(base):
    """A function that makes the model, its rows, and whether its head is tied."""
    if base in VARIANTS:
        folder, cases, prefix = HERE / "llama" / base, llama_cases, ""
        weights = load_file(folder / "model.safetensors")
    else:
        folder, cases, prefix = HERE / "families" / base, family_cases, "model/"
        weights = load_file(folder / "tensors.safetensors")
    config = cases.make_config(cases.VARIANTS[base])
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    rows = json.loads((folder / "golden.json").read_text())["rows"]
    return lambda: cases.build(config, weights), rows, config.tie_word_embeddings


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def file_names(model):
    """Names in the adapter's file by parameter: the file's tensors share their memory with the parameters."""
    by_memory = {p.data_ptr(): n for n, p in trained(model).items()}
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    names = {by_memory[t.data_ptr()]: k for k, t in state.items() if t.data_ptr() in by_memory}
    assert set(names) == set(trained(model)), set(trained(model)) ^ set(names)
    return names


def scramble(model, rng):
    """No factor at zero, and nothing that is trained at its base value."""
    with torch.no_grad():
        for name, p in sorted(trained(model).items()):
            x = rng.standard_normal(tuple(p.shape))
            if ".lora_A." in name:
                x = rng.uniform(-1, 1, tuple(p.shape)) / np.sqrt(p.shape[1])
            elif ".lora_B." in name or "lora_embedding" in name:
                x = 0.1 * x if "embedding_A" not in name else 0.5 * x
            elif "magnitude" in name:
                x = p.numpy() * (1 + 0.1 * x)
            else:
                x = p.numpy() + 0.1 * x
            p.copy_(torch.from_numpy(x.astype(np.float32)))


def run(model, rows):
    model.zero_grad(set_to_none=True)
    logits = [model(input_ids=torch.tensor([r["input_ids"]]), use_cache=False).logits[0] for r in rows]
    total = sum(row_terms(x, r)[0] for x, r in zip(logits, rows)) / weight_sum(rows)
    total.backward()
    grads = {n: p.grad.clone() for n, p in trained(model).items()}
    return float(total.detach()), [x.detach() for x in logits], grads


def save(tensors, path):
    save_file({k: v.detach().float().contiguous().clone() for k, v in sorted(tensors.items())}, path, metadata={"format": "pt"})


def case(name, seed, folder):
    base, settings = CASES[name]
    build, rows, is_tied = open_base(base)
    lora = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(build(), lora).eval()
    scramble(model, np.random.Generator(np.random.PCG64(seed)))
    names = file_names(model)
    loss, logits, grads = run(model, rows)

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp, save_embedding_layers=False)
        written = load_file(f"{tmp}/adapter_model.safetensors")
        text = json.loads(pathlib.Path(tmp, "adapter_config.json").read_text())
    for key in ("target_modules", "exclude_modules"):  # PEFT keeps sets: their order changes from run to run
        text[key] = sorted(text[key]) if isinstance(text[key], list) else text[key]
    (folder / "adapter_config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    save(written, folder / "adapter_model.safetensors")
    save({names[n]: g for n, g in grads.items()}, folder / "grads.safetensors")

    yard_loss, yard_logits, yard_grads = run(model.double(), rows)
    yard = dict(
        loss=abs(loss - yard_loss),
        logits=max(float((a.double() - b).abs().max()) for a, b in zip(logits, yard_logits)),
        grads=relative({n: g.double() for n, g in grads.items()}, yard_grads),
    )
    assert yard["logits"] < 4e-6 and yard["grads"] < 4e-6, (name, yard)
    # In f64, merging is exact, where PEFT can merge: it cannot give a tied head weights of its own.
    merged = model.merge_and_unload()
    with torch.no_grad():
        apart = max(
            float((merged(input_ids=torch.tensor([r["input_ids"]]), use_cache=False).logits[0] - x).abs().max())
            for r, x in zip(rows, yard_logits)
        )
    # The families' norms keep f32.
    assert apart < (1e-10 if base in VARIANTS else 1e-5) or is_tied, (name, apart)
    save({"logits": torch.cat(logits)}, folder / "logits.safetensors")
    (folder / "golden.json").write_text(json.dumps(dict(base=base, loss=loss, yardstick=yard)) + "\n")
    print(f"{name}: loss {loss:.6f}, {len(grads)} tensors, yardstick {yard['logits']:.1e} {yard['grads']:.1e}, merged {apart:.1e}")


def write(folder):
    for i, name in enumerate(CASES):
        case(name, 1000 + i, folder / name)
    versions = dict(peft=peft.__version__, torch=torch.__version__.split("+")[0], transformers=transformers.__version__)
    (folder / "index.json").write_text(json.dumps(dict(versions=versions, cases=list(CASES)), indent=1) + "\n")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert size < FOLDER_BYTES_MAX, size


def differences(a, b):
    files = [{str(p.relative_to(x)) for p in x.rglob("*") if p.is_file()} for x in (a, b)]
    if files[0] != files[1]:
        return [f"files differ: {files[0] ^ files[1]}"]
    return sorted(n for n in files[0] if (a / n).read_bytes() != (b / n).read_bytes())


def read(folder):
    """Largest difference of the logits of an adapter in `folder`, as PEFT loads it, from the golden's."""
    golden = json.loads((HERE / "adapters" / folder.name / "golden.json").read_text())
    base = golden["base"]
    build, rows, _ = open_base(base)
    model = PeftModel.from_pretrained(build(), folder).eval()
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([r["input_ids"]]), use_cache=False).logits[0] for r in rows]
    expected = load_file(HERE / "adapters" / folder.name / "logits.safetensors")["logits"]
    return float((torch.cat(logits) - expected).abs().max())


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--read", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.read:
        found = {folder.name: read(folder) for folder in sorted(args.read.iterdir())}
        print("\n".join(f"{name}: logits differ by {apart}" for name, apart in found.items()))
        sys.exit(set(found) != set(CASES) or max(found.values()) > 1e-5)
    with tempfile.TemporaryDirectory() as tmp:
        folder = pathlib.Path(tmp) if args.check else HERE / "adapters"
        write(folder)
        if args.check:
            found = differences(folder, HERE / "adapters")
            print("\n".join(found) or "the same bytes")
            sys.exit(bool(found))


if __name__ == "__main__":
    main()
