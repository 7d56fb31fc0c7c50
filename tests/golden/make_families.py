#!/usr/bin/env python3
"""Writes the goldens of every family and rotary scaling into families/ (README.md beside this file says what is what).

Inputs come from a seeded numpy generator, results from transformers, PEFT and torch.optim.AdamW in f32 on one thread. The same
runs in f64 give the `yardstick` that goes with the files: how much of a bound is the reference's own rounding.

  make_families.py           writes families/
  make_families.py --check   writes to a temporary folder and compares with families/
"""

import argparse
import copy
import json
import os
import pathlib
import shutil
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers
from family_cases import (
    GENERATE_LENGTHS,
    LENGTHS,
    N_STEPS,
    ROPES,
    RUNS,
    TRAIN_LENGTHS,
    VARIANTS,
    adapter_tensors,
    batches,
    build,
    config_text,
    depends_on_length,
    make_config,
    make_peft,
    make_weights,
    reset,
)
from llama_cases import make_rows, row_terms, weight_sum
from llama_twin import relative
from make_llama import N_NEW, check, files, save, summary, trainable, versions, write_json
from transformers import AutoModelForCausalLM, get_scheduler
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = pathlib.Path(__file__).resolve().parent
FOLDER_BYTES_MAX = 2_500_000


def one(model, ids):
    """Logits of a row alone, whatever was run before."""
    reset(model)
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def accumulate(model, rows, normaliser):
    """Backward of the summed loss, row by row: a scaling may depend on a row's own length."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for row in rows:
        loss = row_terms(one(model, row["input_ids"]), row)[0] / normaliser
        loss.backward()
        total += float(loss.detach())
    return total


def gradients(model, rows):
    accumulate(model, rows, weight_sum(rows))
    return {n: p.grad.clone() for n, p in trainable(model).items()}


def double(model):
    """The same model in f64; norms, softmax and rotary tables keep the f32 that their code asks for."""
    return copy.deepcopy(model).to(torch.float64)


def measure(model, rows, logits, grads):
    """Distances from f64, and of bf16 from f32."""
    exact = double(model)
    with torch.no_grad():
        near = max(float((one(exact, r["input_ids"]) - x).abs().max()) for r, x in zip(rows, logits))
        half = copy.deepcopy(model).to(torch.bfloat16)
        far = max(float((one(half, r["input_ids"]).float() - x).abs().max()) for r, x in zip(rows, logits))
    yard = dict(logits=near, grads=relative(grads, gradients(exact, rows)), bf16_logits=far)
    assert near < 5e-6 and yard["grads"] < 5e-6, yard
    return yard


def train(model, rows, run):
    """20 steps with torch's AdamW, transformers' schedule and torch's clipping."""
    params = trainable(model)
    groups = [
        dict(params=[p for p in params.values() if (p.dim() == 2) == is_matrix], weight_decay=decay)
        for is_matrix, decay in ((True, run["weight_decay"]), (False, 0.0))
    ]
    opt = torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=run["base_lr"],
        betas=(run["beta1"], run["beta2"]),
        eps=run["eps"],
        foreach=False,
        fused=False,
    )
    sched = get_scheduler("cosine", opt, num_warmup_steps=run["warmup_steps"], num_training_steps=N_STEPS)
    steps = []
    for picked in batches(len(rows)):
        batch = [rows[i] for i in picked]
        loss = accumulate(model, batch, weight_sum(batch))
        norm = float(torch.nn.utils.clip_grad_norm_(list(params.values()), run["max_norm"], foreach=False))
        opt.step()
        sched.step()
        steps.append(dict(rows=picked, loss=loss, grad_norm=norm))
    return steps, {n: p.detach().clone() for n, p in params.items()}


def train_case(method, model, rows, tensors):
    """A run in f32 beside the same in f64."""
    run = RUNS[method]
    exact = double(model)
    steps, final = train(model, rows, run)
    steps64, final64 = train(exact, rows, run)
    yard = dict(
        losses=max(abs(a["loss"] - b["loss"]) for a, b in zip(steps, steps64)),
        final=max(float((final[k].double() - final64[k].double()).abs().max()) for k in final),
    )
    assert yard["losses"] < 5e-6 and yard["final"] < 5e-5, yard
    tensors.update({f"{method}_final/{k}": v for k, v in final.items()})
    return dict(optimizer=run, steps=steps, yardstick=yard)


def greedy(model, prompt, by_length):
    """New tokens with the cache and the logits that chose them. Where earlier keys change with a
    text's length, transformers' dynamic scaling keeps the old ones: there the cache is off."""
    n = len(prompt)
    reset(model)
    model.generation_config.eos_token_id = None
    out = model.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=N_NEW,
        use_cache=not by_length,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        attention_mask=torch.ones(1, n, dtype=torch.long),
    )
    new, step = out.sequences[0, n:].tolist(), torch.cat(out.logits)
    for i in range(N_NEW):
        again = one(model, prompt + new[:i])[-1]
        assert float((again - step[i]).abs().max()) < 1e-5, "the cache changes the logits"
    best = step.topk(2).values
    return dict(prompt=prompt, new_ids=new, margin=float((best[:, 0] - best[:, 1]).min())), step


def generation(model, rng, vocab, by_length):
    """Prompts are drawn again until no choice among the new tokens is a close one."""
    cases, tensors = [], {}
    for i, n in enumerate(GENERATE_LENGTHS):
        case, step = greedy(model, rng.integers(3, vocab, n).tolist(), by_length)
        while case["margin"] < 0.01:
            case, step = greedy(model, rng.integers(3, vocab, n).tolist(), by_length)
        cases.append(case)
        tensors[f"logits/generate.{i}"] = step
    return cases, tensors


def variant(name, v, folder):
    folder.mkdir(parents=True)
    rng = np.random.Generator(np.random.PCG64(v["seed"]))
    config = make_config(v)
    weights = make_weights(config, rng)
    (folder / "config.json").write_text(config_text(config, v))
    model = build(config, weights)
    rows = make_rows(rng, LENGTHS, config.vocab_size, "")
    train_rows = make_rows(rng, TRAIN_LENGTHS, config.vocab_size, "")
    with torch.no_grad():
        mine = [one(model, r["input_ids"]) for r in rows]
        cases, tensors = generation(model, rng, config.vocab_size, depends_on_length(v))
    grads = gradients(model, rows)
    tensors.update({f"model/{k}": x for k, x in weights.items()})
    tensors.update({f"logits/rows.{i}": x for i, x in enumerate(mine)})
    tensors.update({f"grads/{k}": x for k, x in grads.items()})
    golden = dict(
        versions=versions(),
        rows=rows,
        loss=summary(mine, rows),
        generate=cases,
        yardstick=measure(model, rows, mine, grads),
    )

    peft, adapter_config = make_peft(config, weights)
    adapter = adapter_tensors(peft, rng)
    with torch.no_grad():
        adapted = [one(peft, r["input_ids"]) for r in rows]
    adapter_grads = gradients(peft, rows)
    golden["adapter_config"] = adapter_config
    golden["lora"] = summary(adapted, rows)
    golden["lora_yardstick"] = measure(peft, rows, adapted, adapter_grads)
    tensors.update({f"adapter/{k}": x for k, x in adapter.items()})
    tensors.update({f"logits/lora.{i}": x for i, x in enumerate(adapted)})
    tensors.update({f"adapter_grads/{k}": x for k, x in adapter_grads.items()})
    if v.get("trains", True):
        golden["train_rows"] = train_rows
        golden["train"] = {
            "full": train_case("full", model, train_rows, tensors),
            "lora": train_case("lora", peft, train_rows, tensors),
        }
    write_json(folder / "golden.json", golden)
    save(tensors, folder / "tensors.safetensors")
    # The text says the same model as the object.
    with tempfile.TemporaryDirectory() as tmp:
        shutil.copy(folder / "config.json", tmp)
        save(weights, pathlib.Path(tmp, "model.safetensors"))
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp, attn_implementation="eager", dtype=torch.float32
        ).eval()
        with torch.no_grad():
            apart = max(float((one(loaded, r["input_ids"]) - x).abs().max()) for r, x in zip(rows, mine))
        assert apart < 4e-6, f"config.json says another model: {apart}"
    peak = max(float(x.abs().max()) for x in mine)
    runs = {k: r["yardstick"] for k, r in golden.get("train", {}).items()}
    print(
        f"{name}: loss {golden['loss']['loss']:.4f}, largest logit {peak:.2f}, {golden['yardstick']}, {runs}"
    )


def rope_tables():
    """Frequencies at the sizes of published models, and cosines and sines of positions in the thousands."""
    out = []
    for name, keys, seq_len in ROPES:
        config = make_config(dict(seed=0, num_attention_heads=1, num_key_value_heads=1, **keys))
        kind = config.rope_parameters["rope_type"]
        if kind == "default":
            dim = config.head_dim
            freq = 1.0 / (
                config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
            )
            factor = 1.0
        else:
            length = torch.tensor(seq_len) if kind == "dynamic" else seq_len
            freq, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
        positions = [p for p in (1, 77, 1000, 4095, seq_len - 1) if p < seq_len]
        angle = torch.tensor(positions).float()[:, None] * freq
        out.append(
            dict(
                name=name,
                config=json.loads(config_text(config, keys)),
                seq_len=seq_len,
                frequencies=freq.double().tolist(),
                factor=factor,
                positions=positions,
                cos=(angle.cos() * factor).double().tolist(),
                sin=(angle.sin() * factor).double().tolist(),
            )
        )
    return dict(versions=versions(), ropes=out)


def write(root):
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "rope.json", rope_tables())
    for name, v in VARIANTS.items():
        variant(name, v, root / name)
    write_json(root / "index.json", dict(versions=versions(), variants=list(VARIANTS)))
    size = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    print(f"{size} bytes in {len(files(root))} files")
    assert size <= FOLDER_BYTES_MAX, "too large for the repository"


def main():
    args = argparse.ArgumentParser(description="Writes the goldens of the families.")
    args.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.parse_args().check:
        with tempfile.TemporaryDirectory() as tmp:
            write(pathlib.Path(tmp, "families"))
            return 0 if check(pathlib.Path(tmp, "families"), HERE / "families") else 1
    with tempfile.TemporaryDirectory(dir=HERE) as tmp:
        write(pathlib.Path(tmp, "families"))
        if (HERE / "families").exists():
            shutil.rmtree(HERE / "families")
        pathlib.Path(tmp, "families").rename(HERE / "families")
    return 0


if __name__ == "__main__":
    sys.exit(main())
