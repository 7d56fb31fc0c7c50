#!/usr/bin/env python3
"""hone-template and hone-tokenize beside TRL's data preparation and the bare tokenizers library, in turn (A B C A B C ...).

  text.py --bin target/release --tokenizer DIR --template FILE.jinja --work DIR [--rows 50000] [--pairs 5] [--max-len 1024]

DIR holds tokenizer.json and tokenizer_config.json; the template needs `generation` blocks, which TRL wants. Both sides get the same rows, template and length,
and must make the same number of tokens. hone's time runs from the start of each program to its sealed output; TRL's from rows in memory to packs in memory.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent

PIPELINE = """base = "base"
[ingest]
eval_share = 0.0
test_share = 0.0
[[ingest.source]]
name = "rows"
path = "rows.jsonl"
[template]
template = "auto"
[tokenize]
max_len = {max_len}
too_long = "{too_long}"
"""


def prepare(args):
    work = args.work
    (work / "base").mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(args.tokenizer / name, work / "base" / name)
    config = json.loads((work / "base" / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (work / "base" / "tokenizer_config.json").write_text(json.dumps(config))
    shutil.copyfile(args.template, work / "base" / "chat_template.jinja")
    vocab = max(json.loads((work / "base" / "tokenizer.json").read_text())["model"]["vocab"].values()) + 1024
    (work / "base" / "config.json").write_text(json.dumps(dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, vocab_size=vocab)))
    (work / "text.toml").write_text(PIPELINE.format(max_len=args.max_len, too_long="drop"))
    subprocess.run([sys.executable, HERE / "rows.py", str(args.rows), work / "rows.jsonl"], check=True)
    subprocess.run([args.bin / "hone-ingest", "--pipeline", "text.toml"], cwd=work, check=True, capture_output=True)


def measured(command, work):
    """Seconds, CPU seconds and peak memory (the largest process) of a command."""
    pid_before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.time()
    process = subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    wall = time.time() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        sys.exit(err.decode()[-2000:])
    cpu = after.ru_utime + after.ru_stime - pid_before.ru_utime - pid_before.ru_stime
    return out.decode(), wall, cpu


def hone(args):
    shutil.rmtree(args.work / "runs/text/template", ignore_errors=True)
    shutil.rmtree(args.work / "runs/text/tokenize", ignore_errors=True)
    stages = {}
    for stage in ("template", "tokenize"):
        out, wall, cpu = measured([args.bin / f"hone-{stage}", "--pipeline", "text.toml", "--json"], args.work)
        stages[stage] = dict(wall_s=wall, cpu_s=cpu)
    wall, cpu = (sum(s[k] for s in stages.values()) for k in ("wall_s", "cpu_s"))
    return dict(wall_s=wall, cpu_s=cpu, rows_per_s=args.rows / wall) | {f"{k}_wall_s": v["wall_s"] for k, v in stages.items()} | {f"{k}_cpu_s": v["cpu_s"] for k, v in stages.items()}


def peer(what, args):
    out, _, _ = measured([sys.executable, HERE / "trl_text.py", what, "rows.jsonl", "base", str(args.max_len)], args.work)
    return json.loads(out.splitlines()[-1])


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("--bin", "--tokenizer", "--template", "--work"):
        args.add_argument(name, type=lambda p: pathlib.Path(p).resolve(), required=True)
    args.add_argument("--rows", type=int, default=50_000)
    args.add_argument("--pairs", type=int, default=5)
    args.add_argument("--max-len", type=int, default=1024)
    args = args.parse_args()
    prepare(args)
    runs = dict(hone=[], bare=[], trl=[])
    for at in range(args.pairs):
        for name in runs:
            found = hone(args) if name == "hone" else peer(name, args)
            runs[name].append(found)
            load = os.getloadavg()[0]
            print(json.dumps(dict(run=at, side=name, load=round(load, 1)) | {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}), flush=True)
    for name in ("bare", "trl"):
        for key in ("wall_s", "cpu_s"):
            ratios = [b[key] / a[key] for a, b in zip(runs["hone"], runs[name])]
            print(f"{name} / hone, {key}: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} pairs")


if __name__ == "__main__":
    main()
