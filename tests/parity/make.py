#!/usr/bin/env python3
"""Writes what transformers makes of chats under real tokenizers and real templates, for the test `parity` (see README.md).

  HONE_CORPUS=... make.py [--out DIR] [--only TOKENIZER,...]    everything, into a folder outside the tree (default target/parity)
  HONE_CORPUS=... make.py --small                               chats.json and small.json beside this file: one tokenizer of the corpus, hashes only
"""

import argparse
import datetime
import hashlib
import json
import os
import pathlib
import re
import sys
import time

import chats as conversations
import fetch

import jinja2
import tokenizers
import transformers

HERE = pathlib.Path(__file__).resolve().parent
BUILTINS = HERE.parents[1] / "crates" / "hone-chat" / "templates"
NOW = datetime.datetime(2026, 1, 2)
# `<<SYS>>` of Llama 2 is text, and no marker.
MARKER = re.compile(r"(?<!<)<[^<>\s]{1,60}>(?!>)")


class Frozen(datetime.datetime):
    """What `strftime_now` takes for the present."""

    @classmethod
    def now(cls, tz=None):
        return NOW


transformers.utils.chat_template_utils.datetime = Frozen


def templates(corpus):
    """(name, source) of every template that may fit; TRL's, Axolotl's and so on in place, hone's own last."""
    for path in sorted((corpus / "templates").rglob("*.jinja")):
        if "tests" not in path.parts:
            yield f"{path.relative_to(corpus / 'templates').parts[0]}/{path.name}", path.read_bytes().decode()
    for path in sorted(BUILTINS.glob("*.jinja")):
        yield f"hone/{path.name}", path.read_bytes().decode()


def own_template(tokenizer):
    source = tokenizer.chat_template
    return source.get("default") if isinstance(source, dict) else source


def apply(tokenizer, source, chat, tokenize):
    return tokenizer.apply_chat_template(
        chat["messages"],
        tools=chat.get("tools"),
        chat_template=source,
        tokenize=tokenize,
        return_dict=False,
    )


def outcome(tokenizer, source, chat):
    """(text, ids), or how transformers refuses."""
    try:
        text = apply(tokenizer, source, chat, False)
        return text, apply(tokenizer, source, chat, True)
    except jinja2.exceptions.TemplateError as e:
        # `raise_exception` raises TemplateError itself; what Jinja raises of its own accord is a subclass.
        return "refuses" if type(e) is jinja2.exceptions.TemplateError else "fails"
    except (TypeError, KeyError, ValueError, AttributeError) as e:
        return "fails"


PROBES = [
    [("user", "PROBE"), ("assistant", "PROBE"), ("user", "PROBE"), ("assistant", "PROBE")],
    [("system", "PROBE"), ("user", "PROBE"), ("assistant", "PROBE")],
]


def fits(tokenizer, source):
    """Whether every marker that the template writes into small chats is a token of its own for this tokenizer."""
    added = set(tokenizer.get_added_vocab())
    seen = 0
    for probe in PROBES:
        found = outcome(tokenizer, source, conversations.chat("probe", *probe))
        if isinstance(found, str):
            continue
        seen += 1
        if not set(MARKER.findall(found[0])) <= added:
            return False
    return seen > 0


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def control(tokenizer):
    """Texts of the added tokens that no message may write; runs of blanks are text."""
    backend = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return [t.content for t in backend.values() if t.special or t.content.strip()]


THOUGHT = re.compile(r"\s*<think>((?:(?!<think>).)*?)</think>(.*)", re.DOTALL)


def unframed(message):
    """A message without the marks of a thought that its answer opens with: hone takes those for control tokens as well."""
    found = THOUGHT.fullmatch(message["content"]) if message["role"] == "assistant" and message["content"] else None
    return dict(message, content=list(found.groups())) if found else message


def benign(chats, markers):
    """For each chat, whether no string in it spells an added token (in the tokenizer's own normal form or not)."""
    pattern = re.compile("|".join(re.escape(m) for m in sorted(markers, key=len, reverse=True)) or "(?!)")
    said = lambda chat: strings([[unframed(m) for m in chat["messages"]], chat.get("tools")])
    return [not any(pattern.search(s) for s in said(chat)) for chat in chats]


def sha(data):
    return hashlib.sha256(data).hexdigest()


def ids_sha(ids):
    return sha(b"".join(i.to_bytes(4, "little") for i in ids))


def versions():
    return {m.__name__: m.__version__ for m in (transformers, tokenizers, jinja2)}


def combos(name, root, corpus):
    """(template's name, source) that fit a tokenizer, its own first; the tokenizer and its folder."""
    folder, tokenizer = fetch.fetch(name, root, corpus)
    own = own_template(tokenizer)
    pairs = [("own", own)] if own else []
    pairs += [(n, s) for n, s in templates(corpus) if fits(tokenizer, s)]
    return folder, tokenizer, pairs


def make(name, root, corpus, chats):
    """Golden of one tokenizer: golden/<name>.jsonl, a line a template and chat, and its entry in the index."""
    began = time.time()
    folder, tokenizer, pairs = combos(name, root, corpus)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    is_benign = benign(chats, control(tokenizer))
    entry = dict(name=name, kind=fetch.TOKENIZERS[name][0], tokens=dict(tokenizer.special_tokens_map), templates=[], benign=is_benign)
    apart = 0
    with open(root / "golden" / f"{name}.jsonl", "w", encoding="utf-8") as file:
        for template, source in pairs:
            stored = f"templates/{sha(source.encode())[:16]}.jinja"
            (root / stored).write_bytes(source.encode())
            cells = []
            for chat in chats:
                found = outcome(tokenizer, source, chat)
                if isinstance(found, str):
                    cells.append(found)
                    continue
                text, ids = found
                apart += ids != plain.encode(text, add_special_tokens=False).ids
                cells.append(dict(text=sha(text.encode())[:16], ids=ids))
            file.write(json.dumps(dict(template=template, cells=cells), separators=(",", ":")) + "\n")
            entry["templates"].append(dict(name=template, file=stored))
    # transformers calls the same library on the same file: where it does not agree with it, the file is not what it runs.
    entry["apart"] = apart
    print(f"{name}: {len(pairs)} templates, {sum(is_benign)} of {len(chats)} chats benign, {apart} apart from the file, {time.time() - began:.0f} s", flush=True)
    return entry


def small(corpus):
    """Hashes for the test that needs the corpus alone: its one whole tokenizer, made chats."""
    chats = conversations.made()
    root = HERE.parents[1] / "target" / "parity"
    _, tokenizer, pairs = combos("qwen3", root, corpus)
    out = dict(versions=versions(), tokenizer="tokenizers/qwen3", tokens=dict(tokenizer.special_tokens_map), n_chats=len(chats), templates=[])
    is_benign = benign(chats, control(tokenizer))
    assert all(is_benign)
    for template, source in pairs:
        cells = [outcome(tokenizer, source, chat) for chat in chats]
        cells = [c if isinstance(c, str) else f"{ids_sha(c[1])[:12]}:{len(c[1])}" for c in cells]
        out["templates"].append(dict(name=template, sha256=sha(source.encode()), cells=cells))
    (HERE / "chats.json").write_text("[\n" + ",\n".join(json.dumps(c, ensure_ascii=False) for c in chats) + "\n]\n")
    rows = ",\n".join(json.dumps(t, separators=(",", ":")) for t in out.pop("templates"))
    (HERE / "small.json").write_text(json.dumps(out)[:-1] + ', "templates": [\n' + rows + "\n]}\n")
    print(f"small.json: {len(pairs)} templates x {len(chats)} chats, {(HERE / 'small.json').stat().st_size} bytes")


def main():
    args = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    args.add_argument("--out", type=pathlib.Path, default=pathlib.Path(os.environ.get("HONE_PARITY", HERE.parents[1] / "target" / "parity")))
    args.add_argument("--only", help="some tokenizers instead of all; the index keeps the others")
    args.add_argument("--small", action="store_true", help="the committed golden of the corpus' own tokenizer")
    args = args.parse_args()
    if "HONE_CORPUS" not in os.environ:
        sys.exit("HONE_CORPUS is not set: templates, rows and vocabularies are read from there")
    corpus = pathlib.Path(os.environ["HONE_CORPUS"])
    if args.small:
        return small(corpus)
    chats = conversations.made() + conversations.corpus(corpus)
    for folder in ("golden", "templates", "tokenizers"):
        (args.out / folder).mkdir(parents=True, exist_ok=True)
    index = args.out / "index.json"
    old = json.loads(index.read_text())["tokenizers"] if index.exists() and args.only else []
    wanted = args.only.split(",") if args.only else list(fetch.TOKENIZERS)
    entries = {e["name"]: e for e in old} | {name: make(name, args.out, corpus, chats) for name in wanted}
    (args.out / "chats.json").write_text(json.dumps(chats, ensure_ascii=False))
    index.write_text(json.dumps(dict(versions=versions(), now=NOW.date().isoformat(), n_chats=len(chats), tokenizers=[entries[n] for n in fetch.TOKENIZERS if n in entries])))


if __name__ == "__main__":
    main()
