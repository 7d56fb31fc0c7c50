#!/usr/bin/env python3
"""Writes the goldens of the decoder, the loss and the optimizer into llama/ (README.md beside this file says what is what).

Inputs come from a seeded numpy generator, results from transformers' LlamaForCausalLM, PEFT and torch.optim.AdamW in f32 on one
thread. A second decoder in f64 (llama_twin.py) checks every result, so that a golden is never the opinion of one program; how far
apart the two are is the `yardstick` that goes with the files.

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
import transformers
from llama_cases import (
    FRACTIONAL_LENGTHS,
    LENGTHS,
    N_STEPS,
    RUNS,
    TRAIN_LENGTHS,
    VARIANTS,
    batches,
    build,
    config_text,
    make_adapter,
    make_config,
    make_rows,
    make_weights,
    row_terms,
    weight_sum,
)
from llama_twin import relative, train_twin, twin_check
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, get_scheduler

HERE = pathlib.Path(__file__).resolve().parent
FOLDER_BYTES_MAX = 1_500_000
N_NEW = 12


def versions():
    return dict(
        python=platform.python_version(),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        peft=peft.__version__,
        numpy=np.__version__,
        safetensors=safetensors.__version__,
    )


def write_json(path, value):
    """One line per list of numbers: small, and a diff still shows what moved."""
    text = json.dumps(value, indent=1, allow_nan=False)
    flat = re.sub(r"\[[^\[\]{}\"]*\]", lambda m: re.sub(r"\s+", " ", m.group()), text)
    path.write_text(flat + "\n")


def save(tensors, path):
    tensors = {k: v.detach().to(torch.float32).contiguous().clone() for k, v in sorted(tensors.items())}
    save_file(tensors, path, metadata={"format": "pt"})


# ---------------------------------------------------------------------------------------------- loss


def one(model, row):
    """Logits of a row alone: no padding, no mask."""
    return model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]


def right_padded(rows):
    width = max(len(r["input_ids"]) for r in rows)

    def pad(xs, x):
        return xs + [x] * (width - len(xs))

    ids = torch.tensor([pad(r["input_ids"], 0) for r in rows])
    mask = torch.tensor([pad([1] * len(r["input_ids"]), 0) for r in rows])
    return dict(input_ids=ids, attention_mask=mask)


def padded(model, rows):
    """Logits of ragged rows as one right-padded batch."""
    logits = model(**right_padded(rows), use_cache=False).logits
    return [logits[i, : len(r["input_ids"])] for i, r in enumerate(rows)]


def summary(logits, rows):
    terms = [row_terms(x, r) for x, r in zip(logits, rows)]
    total, weight = sum(float(t[0]) for t in terms), sum(t[1] for t in terms)
    return dict(
        loss=total / weight,
        weighted_ce=total,
        weight_sum=weight,
        n_targets=sum(t[2] for t in terms),
        n_correct=sum(t[3] for t in terms),
        row_weighted_ce=[float(t[0]) for t in terms],
        row_weight_sum=[t[1] for t in terms],
    )


def trainable(model):
    """Parameters with a gradient, under the names of the file format (PEFT drops the adapter's own name)."""
    return {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}


def accumulate(model, rows, layout, normaliser):
    """Backward over micro-batches (lists of row numbers) with the whole step's normaliser; the micro-batches' terms."""
    model.zero_grad(set_to_none=True)
    micro = []
    for picked in layout:
        batch = [rows[i] for i in picked]
        terms = [row_terms(x, r) for x, r in zip(padded(model, batch), batch)]
        total = sum(t[0] for t in terms)
        (total / normaliser).backward()
        micro.append(
            dict(rows=list(picked), weighted_ce=float(total.detach()), weight_sum=sum(t[1] for t in terms))
        )
    return micro


def gradients(model, rows):
    accumulate(model, rows, [[i] for i in range(len(rows))], weight_sum(rows))
    return {n: p.grad.clone() for n, p in trainable(model).items()}


def hf_loss_agrees(model, rows, expected):
    """transformers' own loss on the same rows (weights 0 and 1 only), given the shifted count as its normaliser."""
    batch = right_padded(rows)
    labels = torch.full_like(batch["input_ids"], -100)
    for i, r in enumerate(rows):
        kept = [t if w else -100 for t, w in zip(r["input_ids"], r["weights"])]
        labels[i, : len(kept)] = torch.tensor(kept)
    n = torch.tensor(weight_sum(rows))
    loss = model(**batch, labels=labels, num_items_in_batch=n).loss
    assert abs(float(loss) - expected) < 2e-6, (float(loss), expected)


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
    assert (
        float((model(**kw).logits[0] - got).abs().max()) < 5e-6
    )  # transformers finds the documents by their positions
    weights = [w for r in rows for w in [0.0] + r["weights"][1:]]
    return dict(input_ids=ids, position_ids=positions, seq_lens=lens, weights=weights), got


def greedy(model, prompt):
    """12 new tokens with the cache, the logits that chose them, and the same with a stop id."""
    n = len(prompt)
    model.generation_config.eos_token_id = None
    kw = dict(
        do_sample=False,
        max_new_tokens=N_NEW,
        use_cache=True,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        attention_mask=torch.ones(1, n, dtype=torch.long),
    )
    out = model.generate(torch.tensor([prompt]), **kw)
    new, step = out.sequences[0, n:].tolist(), torch.cat(out.logits)
    assert len(new) == N_NEW
    best = step.topk(2).values
    stop = new[5]
    stopped = model.generate(torch.tensor([prompt]), eos_token_id=stop, **kw).sequences[0, n:].tolist()
    assert stopped == new[: new.index(stop) + 1]
    again = one(model, dict(input_ids=prompt + new))[n - 1 : -1]
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


def accumulation_case(model, rows, grads):
    out = {}
    for name, layout in {
        "1x8": [range(8)],
        "2x4": [range(4), range(4, 8)],
        "8x1": [[i] for i in range(8)],
    }.items():
        micro = accumulate(model, rows, layout, weight_sum(rows))
        got = {n: p.grad for n, p in trainable(model).items()}
        norm = float(
            torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in got.values()]))
        )
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
    text["target_modules"] = sorted(
        text["target_modules"]
    )  # PEFT keeps a set: its order changes from run to run
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
    save(tensors, folder / "adapter_model.safetensors")
    return model, tensors


# ---------------------------------------------------------------------------------------------- training runs


def train(model, rows, run):
    """20 steps with torch's AdamW, transformers' schedule and torch's clipping."""
    params = trainable(model)
    decay = [n for n, p in params.items() if p.dim() == 2]
    plain = [n for n, p in params.items() if p.dim() != 2]
    groups = [
        dict(params=[params[n] for n in names], weight_decay=d)
        for names, d in ((decay, run["weight_decay"]), (plain, 0.0))
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
    for s, layout in enumerate(batches(len(rows))):
        weight = weight_sum([rows[i] for b in layout for i in b])
        lr = sched.get_last_lr()[0]
        micro = accumulate(model, rows, layout, weight)
        norm = float(torch.nn.utils.clip_grad_norm_(list(params.values()), run["max_norm"], foreach=False))
        opt.step()
        sched.step()
        steps.append(
            dict(
                step=s,
                micro_batches=layout,
                lr=lr,
                loss=sum(m["weighted_ce"] for m in micro) / weight,
                weight_sum=weight,
                grad_norm=norm,
                clip=min(1.0, run["max_norm"] / (norm + 1e-6)),
            )
        )
    return steps, decay, plain, {n: p.detach().clone() for n, p in params.items()}


def train_files(method, other, model, config, weights, adapter, scaling, rows, folder):
    run = RUNS[method] | other
    steps, decay, plain, final = train(model, rows, run)
    losses, twin = train_twin(config, weights, adapter, scaling, rows, run)
    yard = dict(
        losses=max(abs(a["loss"] - b) for a, b in zip(steps, losses)),
        final=max(float((final[k].double() - twin[k]).abs().max()) for k in final),
    )
    assert yard["losses"] < 5e-6 and yard["final"] < 1e-4, yard
    assert run["max_norm"] == 1.0 or {x["clip"] < 1 for x in steps} == {True, False}, [
        x["grad_norm"] for x in steps
    ]
    save(final, folder / f"train_{method}_final.safetensors")
    write_json(
        folder / f"train_{method}.json",
        dict(
            versions=versions(),
            method=method,
            rows=rows,
            optimizer={k: run[k] for k in ("beta1", "beta2", "eps", "weight_decay", "max_norm")},
            schedule=dict(
                name="cosine", base_lr=run["base_lr"], warmup_steps=run["warmup_steps"], total_steps=N_STEPS
            ),
            decay=sorted(decay),
            no_decay=sorted(plain),
            steps=steps,
            yardstick=yard,
        ),
    )
    print(
        f"  train {method}: loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}, norms "
        f"{min(s['grad_norm'] for s in steps):.3f}..{max(s['grad_norm'] for s in steps):.3f}, yardstick {yard}"
    )


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
            train_rows = make_rows(
                np.random.Generator(np.random.PCG64(v["seed"] + 200)), TRAIN_LENGTHS, config.vocab_size, ""
            )
            train_files("lora", {}, model, config, weights, tensors, scaling, train_rows, folder)
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
    logits |= {f"rows.{i}": x for i, x in enumerate(mine)} | {
        f"fractional.{i}": x for i, x in enumerate(frac)
    }
    logits["packed"] = packed_logits
    grads, frac_grads = gradients(model, rows), gradients(model, fractional)
    golden = dict(
        versions=versions(),
        variant=name,
        rows=rows,
        fractional=fractional,
        loss=dict(rows=summary(mine, rows), fractional=summary(frac, fractional)),
        packed=packed,
        accumulation=accumulation_case(model, rows, grads),
        generate=generate,
        yardstick=dict(
            rows=twin_check(config, weights, rows, mine, grads),
            fractional=twin_check(config, weights, fractional, frac, frac_grads),
        ),
    )
    hf_loss_agrees(model, rows, golden["loss"]["rows"]["loss"])
    save(grads, folder / "grads.safetensors")
    save(frac_grads, folder / "grads_fractional.safetensors")
    adapters_of(v, config, weights, golden, logits, folder)
    if "train_full" in v["has"]:
        train_rows = make_rows(
            np.random.Generator(np.random.PCG64(v["seed"] + 200)), TRAIN_LENGTHS, config.vocab_size, ""
        )
        train_files("full", v.get("run", {}), model, config, weights, None, 0.0, train_rows, folder)
    save(logits, folder / "logits.safetensors")
    write_json(folder / "golden.json", golden)
    peak = max(float(x.abs().max()) for x in logits.values())
    print(
        f"{name}: loss {golden['loss']['rows']['loss']:.4f}, largest logit {peak:.2f}, yardstick {golden['yardstick']}"
    )


def schedules():
    out = []
    for name, warm, total, ratio in (
        ("constant", 0, 6, None),
        ("constant_with_warmup", 3, 8, None),
        ("linear", 0, 7, None),
        ("linear", 4, 20, None),
        ("cosine", 0, 7, None),
        ("cosine", 5, 20, None),
        ("cosine", 1, 2, None),
        ("cosine_with_min_lr", 3, 12, 0.1),
        ("linear", 20, 20, None),
    ):
        opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
        extra = dict(scheduler_specific_kwargs=dict(min_lr_rate=ratio)) if ratio else {}
        sched = get_scheduler(name, opt, num_warmup_steps=warm, num_training_steps=total, **extra)
        lrs = []
        for _ in range(total):
            lrs.append(sched.get_last_lr()[0])
            opt.step()
            sched.step()
        out.append(
            dict(
                name=name,
                base_lr=3e-4,
                warmup_steps=warm,
                total_steps=total,
                min_lr_ratio=ratio or 0.0,
                lr=lrs,
            )
        )
    return dict(versions=versions(), schedules=out)


def write(root):
    root.mkdir(parents=True, exist_ok=True)
    for name, v in VARIANTS.items():
        variant(name, v, root / name)
    write_json(root / "schedules.json", schedules())
    index = {n: files(root / n) for n in VARIANTS}
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


def files(root):
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def check(new, old):
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
