#!/usr/bin/env python3
"""Every case of see.py with the versions it needs, and the same rows through hone: run.py [CASE ...] [--bin DIR] (HONE_PARITY says where make.py put the tokenizers)

Packages are put into HONE_PARITY/peers by pip, without their dependencies: those come from the reference environment.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

import see

PIPELINE = """base = "base"
[ingest]
eval_share = 0.0
test_share = 0.0
[[ingest.source]]
name = "rows"
path = "rows.jsonl"
[template]
template = "{template}"
[tokenize]
max_len = {max_len}
too_long = {too_long}
max_violation_share = 1.0
"""
# case: tokenizer, template, longest row, what happens to longer ones.
DEFAULT = ("qwen3", "auto", 1024, '"drop"')
KEEP = '{ truncate = "keep-response" }'
OURS = {
    "pad is eos": ("llama3", "auto", 1024, '"drop"'),
    "doubled bos": ("gemma3", "auto", 1024, '"drop"'),
    "long documents": ("qwen3", "auto", 64, '"split"'),
    "cut": ("qwen3", "auto", 1024, KEEP),
    "half of each": ("qwen3", "auto", 2048, KEEP),
    "response not found": ("llama2", "alpaca", 1024, '"drop"'),
}


def row(at, n):
    ask = dict(role="user", content=f"Go on, number {at}.")
    return dict(id=f"row{at}", messages=[ask, dict(role="assistant", content=" ".join(["la"] * n))])


# Rows of the cases that need many or long ones.
MADE = {
    "wrapped": [row(at, 1 + at % 5) for at in range(2500)],
    "long documents": [row(at, 640) for at in range(100)],
    "half of each": [row(0, 5000)],
}


def package(spec):
    folder = see.PARITY / "peers" / spec.split()[0]
    if not folder.exists():
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *spec.split()], check=True)
    return str(folder)


def theirs(case):
    path = os.pathsep.join([package(spec) for spec in see.CASES[case][1]])
    done = subprocess.run([sys.executable, see.HERE / "see.py", case], env=os.environ | dict(PYTHONPATH=path), capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else dict(case=case, failed=done.stderr[-500:])


def ours(case, programs):
    """What hone trains on: the trained text of every row, and what is said of rows that are not taken."""
    given = see.ROWS.get(case) or MADE[case]
    tokenizer, template, max_len, too_long = OURS.get(case, DEFAULT)
    work = see.PARITY / "ours" / case.replace(" ", "-")
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(see.PARITY / "tokenizers" / tokenizer, work / "base")
    vocab = json.loads((work / "base/tokenizer.json").read_text())["model"]["vocab"]
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=len(vocab) + 8192)
    (work / "base/config.json").write_text(json.dumps(config))
    (work / "rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given))
    (work / "p.toml").write_text(PIPELINE.format(template=template, max_len=max_len, too_long=too_long))
    said = []
    for stage in ("ingest", "template", "tokenize"):
        done = subprocess.run([programs / f"hone-{stage}", "--pipeline", "p.toml"], cwd=work, capture_output=True, text=True)
        said += done.stderr.splitlines()[-1:]
        if done.returncode not in (0, 1):
            return dict(exit=done.returncode, said=done.stderr[-400:])
    rows = []
    for at in range(min(2, len(given))):
        shown = subprocess.run([programs / "hone-tokenize", "show", "--pipeline", "p.toml", "--row", str(at), "--tokens", "--no-color"], cwd=work, capture_output=True, text=True)
        lines = [line for line in shown.stdout.splitlines() if line[:6].strip().isdigit() and ".." in line]
        tokens = [(float(line.split()[3]), line.split('"', 1)[1].rsplit('"', 1)[0].replace("\\n", "\n")) for line in lines] if lines else []
        trained = "".join(text for weight, text in tokens if weight > 0)
        head = [text for _, text in tokens[:3]]
        rows.append(dict(trained=trained if len(trained) < 400 else "..." + trained[-60:], tokens=len(tokens), first=head) if tokens else dict(not_taken=shown.stderr.strip()[-200:]))
    return dict(rows=rows, said=said[-1] if said else "")


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    args.add_argument("cases", nargs="*", default=list(see.CASES))
    args.add_argument("--bin", type=lambda p: pathlib.Path(p).resolve(), default=see.HERE.parents[2] / "target" / "release")
    args = args.parse_args()
    for case in args.cases or see.CASES:
        print(json.dumps(dict(theirs=theirs(case), ours=ours(case, args.bin)), ensure_ascii=False, indent=1), flush=True)


if __name__ == "__main__":
    main()
