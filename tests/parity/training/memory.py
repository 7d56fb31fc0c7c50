"""Memory planned beside memory measured, for the table of tests/parity/training.md.

Each case is a run of a few steps with the settings given; hone-train writes what it planned and the most that its process held
to logs/train/memory.json.

    python3 tests/parity/training/memory.py --pipeline pipelines/smollm2.toml --work /tmp/memory             # the table of methods
    python3 tests/parity/training/memory.py --pipeline pipelines/smollm2.toml --work /tmp/memory --fit 1GiB  # every proposal, run

Stages up to hone-tokenize must have run. Needs nothing but Python itself.
"""

import argparse
import json
import pathlib
import subprocess
import sys

LORA = ["train.rank=8", "train.alpha=16"]

# What is run: a name for the table, and settings.
CASES = [
    ("LoRA, 1 pack", LORA + ["train.micro_batch_size=1"]),
    ("LoRA, 2 packs", LORA + ["train.micro_batch_size=2"]),
    ("LoRA, 4 packs", LORA + ["train.micro_batch_size=4"]),
    ('LoRA, 4 packs, `recompute = "attention"`', LORA + ["train.micro_batch_size=4", "train.recompute=attention"]),
    ('LoRA, 4 packs, `recompute = "layer"`', LORA + ["train.micro_batch_size=4", "train.recompute=layer"]),
    ("LoRA on the head too, 2 packs", LORA + ["train.micro_batch_size=2", "train.target_modules=['all-linear','lm_head']"]),
    ("LoRA, embedding trained whole, 1 pack", LORA + ["train.micro_batch_size=1", "train.modules_to_save=['embed_tokens']"]),
    ("DoRA, 2 packs", LORA + ["train.micro_batch_size=2", "train.dora=true"]),
    ("QLoRA nf4, 1 pack", LORA + ["train.micro_batch_size=1", "train.method=qlora"]),
    ("QLoRA nf4, 4 packs", LORA + ["train.micro_batch_size=4", "train.method=qlora"]),
    ('QLoRA nf4, 4 packs, `recompute = "layer"`', LORA + ["train.micro_batch_size=4", "train.method=qlora", "train.recompute=layer"]),
    ('LoRA, `compute = "bf16"`, 2 packs', LORA + ["train.micro_batch_size=2", "train.compute=bf16"]),
    ("full, adamw, 1 pack", ["train.method=full", "train.micro_batch_size=1", "train.lr=1e-5"]),
    ('full, adamw, 4 packs, `recompute = "layer"`', ["train.method=full", "train.micro_batch_size=4", "train.recompute=layer", "train.lr=1e-5"]),
    ("full, adamw8bit, 2 packs", ["train.method=full", "train.micro_batch_size=2", "train.optimizer=adamw8bit", "train.lr=1e-5"]),
    ('full, adamw, `compute = "bf16"`, 1 pack', ["train.method=full", "train.micro_batch_size=1", "train.compute=bf16", "train.lr=1e-5"]),
]


def hone(args, settings, more):
    """A command line of hone-train."""
    line = [args.train, "--pipeline", args.pipeline]
    return line + [word for setting in settings for word in ("--set", setting)] + more


def measure(args, settings):
    """Planned and measured bytes of a run of these settings."""
    out = pathlib.Path(args.work) / "train"
    settings = settings + [f"train.max_steps={args.steps}", "train.batch_size=8", "train.checkpoint_every=0", "train.eval_every=0"]
    more = ["--out", str(out), "--force", "--restart"]
    run = subprocess.run(hone(args, settings, more), capture_output=True, text=True, check=False)
    if run.returncode != 0:
        sys.exit(f"{settings}: {run.stderr}")
    logs = pathlib.Path(args.logs) / "memory.json"
    found = json.loads(logs.read_text())
    return found["planned"], found["measured"]


def proposals(args):
    """What `plan --fit` proposes, as cases."""
    base = LORA + ["train.batch_size=8", "train.micro_batch_size=8"]
    plan = subprocess.run(hone(args, base, ["plan", "--json", "--fit", args.fit]), capture_output=True, text=True, check=False)
    found = json.loads(plan.stdout)["fitting"]
    for proposal in found:
        changes = [f"train.{change.replace(' = ', '=')}" for change in proposal["change"]]
        name = ", ".join(f"`{change}`" for change in proposal["change"]) or "as it is"
        yield name, base + changes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", required=True)
    parser.add_argument("--work", required=True, help="a directory for what the runs write")
    parser.add_argument("--logs", default="runs/smollm2/logs/train", help="where the pipeline's training logs go")
    parser.add_argument("--train", default="target/release/hone-train")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--fit", help="run every proposal of `plan --fit` for so much memory")
    parser.add_argument("--only", default="", help="cases whose name has this")
    args = parser.parse_args()
    pathlib.Path(args.work).mkdir(parents=True, exist_ok=True)
    cases = list(proposals(args)) if args.fit else [case for case in CASES if args.only in case[0]]
    print("| settings | planned MB | measured MB | off |\n|---|---:|---:|---:|")
    for name, settings in cases:
        planned, measured = measure(args, settings)
        off = 100 * (planned / measured - 1)
        print(f"| {name} | {planned / 1e6:.1f} | {measured / 1e6:.1f} | {off:+.1f} % |", flush=True)


if __name__ == "__main__":
    main()
