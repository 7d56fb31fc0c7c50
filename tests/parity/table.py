#!/usr/bin/env python3
"""Puts the results of the test `parity` into README.md, between its marks: HONE_PARITY=... table.py"""

import json
import os
import pathlib
import re

HERE = pathlib.Path(__file__).resolve().parent
BEGIN, END = "<!-- table -->", "<!-- end of the table -->"


def cell(score):
    """`n` identical of the rest, what else there is in words."""
    n = score["identical"]
    out = str(n)
    if different := len(score["text"]) + len(score["ids"]):
        out += f", {different} differ"
    if refused := sum(score["not_taken"].values()):
        out += f", {refused} not taken"
    return out


def tables(root):
    results = json.loads((root / "results.json").read_text())
    forgery = json.loads((root / "forgery.json").read_text())
    tokenizers = results["tokenizers"]
    total = {}
    lines = ["| tokenizer | kind | templates | chats identical | refused by both | spells an added token | differ | not taken | forging attempts | refused | forged |", "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for t in tokenizers:
        scores = t["templates"].values()
        row = dict(
            templates=len(scores),
            identical=sum(s["identical"] for s in scores),
            refused=sum(s["both_refuse"] for s in scores),
            spelled=sum(s["not_benign"] for s in scores),
            differ=sum(len(s["text"]) + len(s["ids"]) + s["only_hone"] for s in scores),
            not_taken=sum(sum(s["not_taken"].values()) for s in scores),
            tried=forgery[t["name"]]["tried"],
            caught=forgery[t["name"]]["refused"],
            forged=forgery[t["name"]]["forged"],
        )
        for key, n in row.items():
            total[key] = total.get(key, 0) + n
        lines.append(f"| `{t['name']}` | {t['kind']} | " + " | ".join(str(n) for n in row.values()) + " |")
    lines.append("| all | | " + " | ".join(f"**{n}**" for n in total.values()) + " |")
    names = {}
    for t in tokenizers:
        for template, score in t["templates"].items():
            names.setdefault("its own" if template == "own" else template, []).append((t["name"], score))
    lines += ["", "| template | tokenizers it fits | identical | refused by both | differ or not taken |", "|---|---|--:|--:|---|"]
    for template, scores in names.items():
        rest = [f"{name}: {cell(s)}" for name, s in scores if s["text"] or s["ids"] or s["not_taken"] or s["only_hone"]]
        who = f"{len(scores)}: " + ", ".join(name for name, _ in scores) if len(scores) < 9 else f"{len(scores)}"
        refused = sum(s["both_refuse"] for _, s in scores)
        lines.append(f"| `{template}` | {who} | {sum(s['identical'] for _, s in scores)} | {refused or ''} | {'; '.join(rest)} |")
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    head = f"{results['n_chats']} chats, {len(tokenizers)} tokenizers, {len(names)} templates; {versions}.\n\n"
    why = "\n".join(f"- `{t or 'any'}` under `{name}`: {reason}." for t, name, reason in results["different"])
    why += "\n- *not taken*: rows with tools where the template compares their words or escapes them (gpt-oss asks whether a name is among the required ones, Apriel writes\n  tools as Python does), so that it cannot be told who wrote what: refused as `provenance unknown`, with both strings."
    return head + "\n".join(lines) + "\n\nWhat differs, and why:\n\n" + why + "\n"


def main():
    root = pathlib.Path(os.environ.get("HONE_PARITY", HERE.parents[1] / "target" / "parity"))
    readme = HERE / "README.md"
    text = readme.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.S)
    new, n = pattern.subn(lambda _: f"{BEGIN}\n{tables(root)}\n{END}", text)
    assert n == 1, "README.md has lost the marks of its table"
    readme.write_text(new)


if __name__ == "__main__":
    main()
