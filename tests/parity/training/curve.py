#!/usr/bin/env python3
"""Lays a finished training run beside PyTorch, transformers and PEFT, step by step.

  curve.py adapter --pipeline FILE --base DIR --out DIR      makes the adapter that both start from, with PEFT
  curve.py compare RUN --base DIR [--adapter DIR] --out DIR  computes every step of RUN (runs/<name>) again, and compares

The reference takes from the run its settings (train/manifest.json), its packs (tokenize/train.arrow) and which of them each step has
(train/plan.parquet). All else is its own: transformers' model in f32 with plain attention, F.cross_entropy over whole logits,
torch.optim.AdamW, clip_grad_norm_, transformers' schedules. A document is computed alone, or (`--documents masked`) in its pack behind
an additive mask, with positions that start anew.

Writes OUT/curve.tsv, draws it as OUT/curve.svg, prints a summary. Exit code 1 if any step's loss is more than 1e-3 apart, its gradient's norm more than 1 %, its
learning rate more than 1e-12, or a held-out loss more than 1e-3; 2 for a run that this script has no reference for.
"""

import argparse
import hashlib
import json
import math
import os
import pathlib
import sys
import time
import tomllib
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
# `draw` leaves nothing beside the sources.
sys.dont_write_bytecode = True
# OpenMP's threads wait asleep: where others compute too, PyTorch is ten times slower with threads that spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
warnings.filterwarnings("ignore")

import peft
import pyarrow as pa
import pyarrow.parquet
import torch
import torch.nn.functional as F
import transformers
import transformers.utils.logging
from draw import draw
from safetensors.torch import load_file

transformers.utils.logging.disable_progress_bar()

LOSS_BAR, NORM_BAR, RATE_BAR = 1e-3, 1e-2, 1e-12
COLUMNS = ["step", "loss", "loss_reference", "grad_norm", "grad_norm_reference", "learning_rate", "learning_rate_reference"]

# Settings that change what a step computes, and that have no counterpart here: the value that they must have, which is that of a
# manifest without them.
WITHOUT_REFERENCE = dict(
    objective="sft",
    init="base",
    compute="f32",
    dropout=0.0,
    neftune_alpha=0.0,
    optimizer=None,
    groups=[],
    ema_decay=None,
    lora_init="default",
    freeze=[],
    reinit_tokens=[],
    keep_best=False,
    early_stopping=None,
    schedule_convention="transformers",
)

# Those that the reference goes by; those that stand in the adapter too, which PEFT reads; those that change no number.
KNOWN = set(
    """
    method lr schedule warmup_steps warmup_ratio min_lr_ratio beta1 beta2 eps weight_decay max_grad_norm label_smoothing z_loss dft soft_cap
    rank alpha rslora dora bias target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern modules_to_save
    epochs max_steps batch_size shuffle micro_batch_size seed recompute eval_every checkpoint_every keep_checkpoints watchdog log_layers_every
    sample_every sample_prompts sample_tokens save_dtype
    """.split()
)


def refuse(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------------------------------------------------------------------------------- the start of both


def make_adapter(args):
    pipeline = tomllib.loads(args.pipeline.read_text())
    train = pipeline["train"]
    rank = args.rank or train.get("rank", 16)
    targets = train.get("target_modules", ["all-linear"])
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=train.get("alpha", 2 * rank),
        use_rslora=train.get("rslora", False),
        target_modules="all-linear" if "all-linear" in targets else targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(pipeline.get("seed", 0))
    model = peft.get_peft_model(load_base(args.base), config)
    if args.b_std:
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=args.b_std)
    # A set has another order in each process: sorted, the same adapter is the same bytes, and a run from it is fresh.
    made = model.peft_config["default"]
    made.target_modules = sorted(made.target_modules)
    model.save_pretrained(args.out)


def load_base(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


# ----------------------------------------------------------------------------------------------------------- what the run has done


class Run:
    """A finished run: settings, steps, packs, and its own record."""

    def __init__(self, root):
        self.dir = root / "train"
        self.manifest = json.loads((self.dir / "manifest.json").read_text())
        self.config = self.manifest["config"]
        for key, usual in WITHOUT_REFERENCE.items():
            if self.config.get(key, usual) != usual:
                refuse(f"`{key}` of this run is {self.config[key]!r}; the reference has only {usual!r}")
        if unknown := self.config.keys() - KNOWN - WITHOUT_REFERENCE.keys():
            refuse(f"this script does not know {', '.join(sorted(unknown))}, which this run sets")
        if self.config["method"] not in ("lora", "full"):
            refuse(f"`method` of this run is {self.config['method']!r}; the reference has LoRA and full fine-tuning")
        packs = root / "tokenize"
        self.need_input("packs", hashlib.sha256((packs / "manifest.json").read_bytes()).hexdigest(), packs)
        self.train, self.eval = read_packs(packs / "train.arrow"), read_packs(packs / "eval.arrow")
        self.steps = pa.parquet.read_table(self.dir / "plan.parquet").to_pylist()
        lines = [json.loads(line) for line in (self.dir / "metrics.jsonl").read_text().splitlines()]
        self.record = [line for line in lines if "loss" in line]
        self.evaluations = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
        if [line["step"] for line in self.record] != [step["step"] + 1 for step in self.steps]:
            refuse(f"{self.dir}: the record does not have the steps of the plan")

    def need_input(self, role, sha256, path):
        """A run that had something else is not the run that the reference is about to repeat."""
        if sha256 not in [i["sha256"] for i in self.manifest["inputs"] if i["role"] == role]:
            refuse(f"{path} is not what {self.dir} was trained with ({role})")


def read_packs(path):
    """Of each pack, the documents: ids and loss weights."""
    if not path.exists():
        return []
    with pa.memory_map(str(path)) as file:
        rows = pa.ipc.open_file(file).read_all().select(["input_ids", "loss_weight", "seq_lens"]).to_pylist()
    packs = []
    for row in rows:
        ids, weights = torch.tensor(row["input_ids"]), torch.tensor(row["loss_weight"])
        packs.append(list(zip(ids.split(row["seq_lens"]), weights.split(row["seq_lens"]))))
    return packs


# --------------------------------------------------------------------------------------------------------------------- a step again


def alone(model, pack):
    """Logits, targets and weights of each document, which is all that the model sees."""
    for ids, weights in pack:
        yield model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:], weights[1:]


def masked(model, pack):
    """The same from one pass over the pack: tokens see those before them in their document, positions start anew in each."""
    ids = torch.cat([ids for ids, _ in pack])
    document = torch.cat([torch.full_like(ids, number) for number, (ids, _) in enumerate(pack)])
    position = torch.cat([torch.arange(len(ids)) for ids, _ in pack])
    place = torch.arange(len(ids))
    seen = (document[:, None] == document) & (place[:, None] >= place)
    mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
    logits = model(input_ids=ids[None], position_ids=position[None], attention_mask=mask[None, None], use_cache=False).logits[0]
    # The last token of a document predicts nothing, and nothing predicts the first.
    followed = position[1:] > 0
    weights = torch.cat([weights for _, weights in pack])
    yield logits[:-1][followed], ids[1:][followed], weights[1:][followed]


def token_losses(logits, targets, config):
    plain = F.cross_entropy(logits, targets, reduction="none")
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=config.get("label_smoothing", 0.0))
    if config.get("dft"):
        loss = loss * torch.exp(-plain.detach())
    return loss + config.get("z_loss", 0.0) * torch.logsumexp(logits, -1) ** 2


def weight_of(packs):
    return math.fsum(w for pack in packs for _, weights in pack for w in weights[1:].tolist())


def loss_of(logits_of, model, packs, config, backward):
    """sum(w L) / sum(w) over all packs; with `backward`, its gradient is added up pack by pack."""
    total, weight = 0.0, weight_of(packs)
    for pack in packs:
        for logits, targets, weights in logits_of(model, pack):
            if config.get("soft_cap"):
                logits = config["soft_cap"] * torch.tanh(logits / config["soft_cap"])
            loss = (weights * token_losses(logits, targets, config)).sum() / weight
            if backward:
                loss.backward()
            total += loss.item()
    return total


def optimizer_of(model, config):
    """AdamW as transformers' Trainer groups it: vectors (norms, biases) do not decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        dict(params=[p for p in trained if p.ndim > 1], weight_decay=config["weight_decay"]),
        dict(params=[p for p in trained if p.ndim == 1], weight_decay=0.0),
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config["lr"], betas=(config["beta1"], config["beta2"]), eps=config["eps"])


def schedule_of(optimizer, config, n_steps):
    n_warmup = config.get("warmup_steps")
    if n_warmup is None:
        n_warmup = math.ceil((config.get("warmup_ratio") or 0.0) * n_steps)
    name, floor, knobs = config["schedule"], config.get("min_lr_ratio", 0.0), {}
    if name == "constant":
        name = "constant_with_warmup"
    elif name == "cosine" and floor:
        name, knobs = "cosine_with_min_lr", dict(min_lr_rate=floor)
    elif name == "linear" and floor:
        name, knobs = "polynomial", dict(power=1.0, lr_end=floor * config["lr"])
    elif name not in ("linear", "cosine", "inverse_sqrt"):
        refuse(f"`schedule` of this run is {name!r}, which has no reference here")
    return transformers.get_scheduler(name, optimizer, n_warmup, n_steps, scheduler_specific_kwargs=knobs)


def reference(run, model, logits_of):
    """Loss, gradient norm and rate of every step, and held-out losses where the run has some."""
    config = run.config
    optimizer = optimizer_of(model, config)
    schedule = schedule_of(optimizer, config, len(run.steps))
    trained = [p for p in model.parameters() if p.requires_grad]
    clip = config["max_grad_norm"] or math.inf
    rows, held_out, started = [], {}, time.monotonic()
    for step, line in zip(run.steps, run.record):
        packs = [run.train[index] for index in step["packs"]]
        rate = optimizer.param_groups[0]["lr"]
        loss = loss_of(logits_of, model, packs, config, backward=True)
        norm = torch.nn.utils.clip_grad_norm_(trained, clip).item()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        rows.append([line["step"], line["loss"], loss, line["grad_norm"], norm, line["learning_rate"], rate])
        said = f"step {line['step']}/{len(run.steps)}  hone {line['loss']:.6f}  reference {loss:.6f}"
        print(f"{said}  norms {line['grad_norm']:.5f} {norm:.5f}  {time.monotonic() - started:.0f} s", file=sys.stderr)
        if line["step"] in run.evaluations:
            # Evaluation is plain cross-entropy.
            plain = {key: value for key, value in config.items() if key == "soft_cap"}
            with torch.no_grad():
                held_out[line["step"]] = loss_of(logits_of, model, run.eval, plain, backward=False)
    return rows, held_out


# ------------------------------------------------------------------------------------------------------------------- the comparison


def relative(a, b):
    return abs(a - b) / max(abs(b), 1e-30)


def weights_apart(run, model, start):
    """How far the final weights are apart, over how far training has moved them."""
    if run.config["method"] == "lora":
        end, own = peft.get_peft_model_state_dict(model), load_file(run.dir / "adapter_model.safetensors")
    else:
        end, own = model.state_dict(), load_file(run.dir / "model.safetensors")
        # A tied head is stored once.
        end = {name: end[name] for name in own}
    if end.keys() != own.keys():
        refuse(f"{run.dir} and the reference have trained tensors of other names")
    apart = math.fsum((own[name].double() - end[name].double()).square().sum().item() for name in end)
    moved = math.fsum((end[name].double() - start[name].double()).square().sum().item() for name in end)
    largest = max((own[name] - end[name]).abs().max().item() for name in end)
    return math.sqrt(apart / moved), largest


def compare(args):
    run = Run(args.run)
    config = run.config
    if args.threads:
        torch.set_num_threads(args.threads)
    model = load_base(args.base)
    if config["method"] == "lora":
        if args.adapter is None:
            refuse("this run trains an adapter: give `--adapter`, the one that it started from")
        files = ["adapter_config.json", "adapter_model.safetensors"]
        hashes = "".join(f"{hashlib.sha256((args.adapter / name).read_bytes()).hexdigest()} {name}\n" for name in files)
        run.need_input("adapter_init", hashlib.sha256(hashes.encode()).hexdigest(), args.adapter)
        model = peft.PeftModel.from_pretrained(model, args.adapter, is_trainable=True)
        start = peft.get_peft_model_state_dict(model)
    else:
        start = model.state_dict()
    start = {name: weight.detach().clone() for name, weight in start.items()}
    if not args.padding_row:
        # transformers makes the embedding with `padding_idx`, so that the row of the padding token gets no gradient. Where a real token
        # is the padding too (SmolLM2's end of turn), the reference would train another model than the loss says.
        model.get_input_embeddings().padding_idx = None
    model = model.to(getattr(torch, args.dtype))
    # `train` turns nothing on that changes numbers: there is no dropout.
    model.train()
    rows, held_out = reference(run, model, dict(alone=alone, masked=masked)[args.documents])

    args.out.mkdir(parents=True, exist_ok=True)
    table = ["\t".join(COLUMNS)] + ["\t".join(repr(value) for value in row) for row in rows]
    (args.out / "curve.tsv").write_text("\n".join(table) + "\n")
    (args.out / "curve.svg").write_text(draw([dict(zip(COLUMNS, row)) for row in rows]))

    losses = [abs(own - theirs) for _, own, theirs, *_ in rows]
    norms = [relative(own, theirs) for _, _, _, own, theirs, _, _ in rows]
    rates = [abs(own - theirs) for *_, own, theirs in rows]
    evals = [abs(run.evaluations[step] - loss) for step, loss in held_out.items()]
    apart, largest = weights_apart(run, model, start)
    first, last = rows[0], rows[-1]
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, PEFT {peft.__version__}"
    print(f"{len(rows)} steps of {args.run}, documents {args.documents}, reference in {args.dtype}; {versions}")
    print(f"loss, first and last step: hone {first[1]:.6f} {last[1]:.6f}, reference {first[2]:.6f} {last[2]:.6f}")
    print("| what | largest difference | at step | bar |\n|---|---:|---:|---:|")
    passed = True
    for what, found, steps, bar in [
        ("loss", losses, [row[0] for row in rows], LOSS_BAR),
        ("gradient norm, relative", norms, [row[0] for row in rows], NORM_BAR),
        ("learning rate", rates, [row[0] for row in rows], RATE_BAR),
        ("held-out loss", evals, list(held_out), LOSS_BAR),
    ]:
        if found:
            worst = max(range(len(found)), key=found.__getitem__)
            # Not `found > bar`: what is no number is not within it.
            passed &= all(value <= bar for value in found)
            print(f"| {what} | {found[worst]:.1e} | {steps[worst]} | {bar:g} |")
    print(f"| trained weights: apart, over how far they moved | {apart:.1e} | {last[0]} | |")
    print(f"| trained weights: a value | {largest:.1e} | {last[0]} | |")
    print("within the bar" if passed else "APART: past the bar")
    return 0 if passed else 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    adapter = commands.add_parser("adapter")
    adapter.add_argument("--pipeline", type=pathlib.Path, required=True)
    adapter.add_argument("--base", type=pathlib.Path, required=True)
    adapter.add_argument("--out", type=pathlib.Path, required=True)
    adapter.add_argument("--rank", type=int, help="instead of the pipeline's")
    adapter.add_argument("--b-std", type=float, default=0.0, help="draws B too; PEFT's own start has B = 0, under which A has no gradient")
    adapter.set_defaults(do=make_adapter)
    one = commands.add_parser("compare")
    one.add_argument("run", type=pathlib.Path)
    one.add_argument("--base", type=pathlib.Path, required=True)
    one.add_argument("--adapter", type=pathlib.Path)
    one.add_argument("--out", type=pathlib.Path, required=True)
    one.add_argument("--documents", choices=["alone", "masked"], default="alone")
    one.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="of the reference: float64 tells whose rounding it is")
    one.add_argument("--padding-row", action="store_true", help="leave the embedding of the padding token without a gradient, as transformers does")
    one.add_argument("--threads", type=int)
    one.set_defaults(do=compare)
    args = parser.parse_args()
    sys.exit(args.do(args))


if __name__ == "__main__":
    main()
