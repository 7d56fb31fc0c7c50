#!/usr/bin/env python3
"""Writes how transformers and PEFT compute in bf16 on the models of families/ into bf16/ (README.md beside this file says what is what).

The peer is PyTorch's autocast over f32 master weights, as accelerate wraps a model for `bf16 = True`: factors and results of products
are bf16, logits are f32 again, and so are norms, loss, gradients of the masters, and AdamW. Everything else is that of make_families.py.

  make_bf16.py           writes bf16/
  make_bf16.py --check   writes to a temporary folder and compares with bf16/
"""

import argparse
import json
import os
import pathlib
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from family_cases import RUNS, VARIANTS, build, make_config, make_peft
from make_families import gradients, one, train
from make_llama import check, files, save, summary, versions, write_json
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

HERE = pathlib.Path(__file__).resolve().parent
FOLDER_BYTES_MAX = 1_200_000


def autocast(model):
    """The model with its forward under autocast and its outputs f32, as accelerate's `prepare` leaves it."""
    inner = model.forward

    def forward(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = inner(*args, **kwargs)
        out.logits = out.logits.float()
        return out

    model.forward = forward
    return model


def part(tensors, prefix):
    return {k.removeprefix(prefix + "/"): x for k, x in tensors.items() if k.startswith(prefix + "/")}


def distance(a, b):
    """|a - b| / |b| over all values of all tensors."""
    off = sum(float((a[k].double() - b[k].double()).square().sum()) for k in b)
    return (off / sum(float(x.double().square().sum()) for x in b.values())) ** 0.5


def passes(model, rows, tensors, of, grads_of):
    """Logits, loss and gradients of one model; the tensors that `save` keeps."""
    with torch.no_grad():
        logits = [one(model, r["input_ids"]) for r in rows]
    grads = gradients(model, rows)
    kept = {f"logits/{of}.{i}": x for i, x in enumerate(logits)} | {f"{grads_of}/{k}": x for k, x in grads.items()}
    exact = part(tensors, grads_of)
    far = max(float((x - tensors[f"logits/{of}.{i}"]).abs().max()) for i, x in enumerate(logits))
    return dict(loss=summary(logits, rows)["loss"], logits_from_f32=far, grads_from_f32=distance(grads, exact)), kept


def run(method, model, golden, tensors):
    """The 20 steps of make_families.py; how far the parameters end from those of f32."""
    steps, final = train(model, golden["train_rows"], RUNS[method])
    return dict(
        losses=[s["loss"] for s in steps],
        grad_norms=[s["grad_norm"] for s in steps],
        final_from_f32=distance(final, part(tensors, f"{method}_final")),
    )


def variant(name, v, root):
    folder = HERE / "families" / name
    golden = json.loads((folder / "golden.json").read_text())
    tensors = load_file(folder / "tensors.safetensors")
    config, weights = make_config(v), part(tensors, "model")

    def full():
        return autocast(build(config, weights))

    def lora():
        model, _ = make_peft(config, weights)
        set_peft_model_state_dict(model, part(tensors, "adapter"))
        return autocast(model)

    rows = golden["rows"]
    result, kept = {}, {}
    for method, make, of, grads_of in (("full", full, "rows", "grads"), ("lora", lora, "lora", "adapter_grads")):
        result[method], more = passes(make(), rows, tensors, of, grads_of)
        kept |= more
        if v.get("trains", True):
            result[method]["train"] = run(method, make(), golden, tensors)
    save(kept, root / f"{name}.safetensors")
    return result


def write(root):
    root.mkdir()
    result = {name: variant(name, v, root) for name, v in VARIANTS.items()}
    write_json(root / "bf16.json", dict(versions=versions(), variants=result))
    size = sum((root / f).stat().st_size for f in files(root))
    print(f"{size} bytes in {len(files(root))} files")
    assert size <= FOLDER_BYTES_MAX, "too large for the repository"


def main():
    args = argparse.ArgumentParser(description="Writes the goldens of bf16.")
    args.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    old = HERE / "bf16"
    checks = args.parse_args().check
    with tempfile.TemporaryDirectory(dir=None if checks else HERE) as tmp:
        new = pathlib.Path(tmp, "bf16")
        write(new)
        if checks:
            return 0 if check(new, old) else 1
        if old.exists():
            shutil.rmtree(old)
        new.rename(old)
    return 0


if __name__ == "__main__":
    sys.exit(main())
