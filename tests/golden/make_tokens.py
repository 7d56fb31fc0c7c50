#!/usr/bin/env python3
"""Writes what transformers makes of chats.json: renders.json, builtin_renders.json and tokens.json; and of the conformance sets of
the Jinja language: conformance.json (see README.md).

Templates of the corpus are read in place (HONE_CORPUS) and named by their path there: only hashes and lengths of what they render are
kept. The built-in templates are hone's own, so their whole text is.

  HONE_CORPUS=... make_tokens.py           writes the files
  HONE_CORPUS=... make_tokens.py --check   compares instead
"""

import argparse
import datetime
import hashlib
import json
import os
import pathlib
import platform
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import jinja2
import tokenizers
import transformers
from transformers.utils.chat_template_utils import _compile_jinja_template, _render_with_assistant_indices

HERE = pathlib.Path(__file__).resolve().parent
BUILTINS = HERE.parents[1] / "crates" / "hone-chat" / "templates"
NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)
TOKENS = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def versions():
    return dict(
        python=platform.python_version(), jinja2=jinja2.__version__, transformers=transformers.__version__
    )


def prompt_of(messages):
    """What evaluation feeds a model: the conversation without its last answer."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def render(source, messages, generation_prompt, tokens):
    """(text, byte spans of the generation blocks), or {"error": message} or {"fails": exception}."""
    try:
        text, spans = _render_with_assistant_indices(
            _compile_jinja_template(source),
            messages,
            None,
            None,
            generation_prompt,
            strftime_now=lambda form: NOW.strftime(form),
            **tokens,
        )
    except jinja2.exceptions.TemplateError as e:
        # `raise_exception` raises TemplateError itself; what Jinja raises of its own accord is a subclass.
        return (
            {"error": str(e)} if type(e) is jinja2.exceptions.TemplateError else {"fails": type(e).__name__}
        )
    except Exception as e:
        return {"fails": type(e).__name__}
    return text, [[len(text[:n].encode()) for n in span] for span in spans]


def digest(outcome):
    if isinstance(outcome, dict):
        return outcome
    text, spans = outcome
    data = text.encode()
    return [hashlib.sha256(data).hexdigest(), len(data)] + ([spans] if spans else [])


def full(outcome):
    if isinstance(outcome, dict):
        return outcome
    return {"text": outcome[0]} | ({"spans": outcome[1]} if outcome[1] else {})


def both(source, chats, tokens, form):
    """Each chat whole, as training sees it, and without its last answer but with the generation prompt, as evaluation does."""
    return dict(
        whole=[form(render(source, c["messages"], False, tokens)) for c in chats],
        prompt=[form(render(source, prompt_of(c["messages"]), True, tokens)) for c in chats],
    )


def corpus_templates(corpus):
    """(path under the corpus, source, special tokens), sorted by path."""
    for path in sorted((corpus / "templates").rglob("*.jinja")):
        yield str(path.relative_to(corpus)), path.read_bytes().decode(), TOKENS
    for path in sorted((corpus / "tokenizers").rglob("tokenizer_config.json")):
        config = json.loads(path.read_text())
        named = {k: config.get(k) for k in TOKENS}
        text = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items() if v is not None}
        yield str(path.relative_to(corpus)), config["chat_template"], text


def tokenizer_agrees(corpus, chats):
    """transformers' own `apply_chat_template` gives what `render` gives."""
    folder = corpus / "tokenizers" / "qwen3"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    source, tokens = next((s, t) for p, s, t in corpus_templates(corpus) if p.startswith("tokenizers/qwen3/"))
    for c in chats:
        for generation_prompt in (False, True):
            text, _ = render(source, c["messages"], generation_prompt, tokens)
            theirs = tokenizer.apply_chat_template(
                c["messages"], tokenize=False, add_generation_prompt=generation_prompt
            )
            assert text == theirs, (c["name"], text, theirs)


def corpus_renders(corpus, chats):
    out = [dict(template=p, tokens=t) | both(s, chats, t, digest) for p, s, t in corpus_templates(corpus)]
    cells = [x for r in out for x in r["whole"] + r["prompt"]]
    kinds = [("error" if "error" in x else "fails") if isinstance(x, dict) else "rendered" for x in cells]
    counts = {k: kinds.count(k) for k in ("rendered", "error", "fails")}
    return dict(
        versions=versions(),
        now=NOW.isoformat(),
        chats=[c["name"] for c in chats],
        count=len(cells),
        n_templates=len(out),
        counts=counts,
        renders=out,
    )


def conformance(corpus):
    """What Jinja2 in the environment of transformers makes of other people's cases of the Jinja language: hashes and lengths."""
    folder = corpus / "conformance" / "jinja_conformance"
    sets = []
    for name, source, context in (
        ("hf_jinja_lang.json", "template", "context"),
        ("hf_e2e_chat.json", "chat_template", "data"),
    ):
        cases = []
        for case in json.loads((folder / name).read_text()):
            variables = dict(case[context], strftime_now=lambda form: NOW.strftime(form))
            try:
                text = _compile_jinja_template(case[source]).render(**variables).encode()
                cases.append([hashlib.sha256(text).hexdigest(), len(text)])
            except Exception as e:
                cases.append({"fails": type(e).__name__})
        sets.append(dict(template=f"conformance/jinja_conformance/{name}", whole=cases, prompt=[]))
    cells = [c for s in sets for c in s["whole"]]
    return dict(
        versions=versions(),
        now=NOW.isoformat(),
        count=len(cells),
        n_templates=len(sets),
        n_fails=sum(isinstance(c, dict) for c in cells),
        renders=sets,
    )


def ranges(mask):
    """[[start, end]] of the runs of ones."""
    out = []
    for i, x in enumerate(mask):
        if x and (not out or out[-1][1] != i):
            out.append([i, i + 1])
        elif x:
            out[-1][1] = i + 1
    return out


def token_ids(corpus, chats):
    """Ids of whole chats and prompts with a real tokenizer, under its own template and under one with generation blocks."""
    folder = corpus / "tokenizers" / "qwen3"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tagged = "templates/trl/trl/chat_templates/qwen3_training.jinja"
    cases = []
    for name, source in (
        ("tokenizers/qwen3/tokenizer_config.json", tokenizer.chat_template),
        (tagged, (corpus / tagged).read_text()),
    ):
        kw = dict(chat_template=source, tokenize=True, return_dict=True)
        whole, prompt = [], []
        for c in chats:
            out = tokenizer.apply_chat_template(
                c["messages"], return_assistant_tokens_mask=name == tagged, **kw
            )
            cell = dict(ids=out["input_ids"]) | (
                dict(trained=ranges(out["assistant_masks"])) if name == tagged else {}
            )
            safe = tokenizer.apply_chat_template(c["messages"], sanitize_control_tokens=True, **kw)[
                "input_ids"
            ]
            whole.append(cell | (dict(sanitized_ids=safe) if safe != cell["ids"] else {}))
            messages = prompt_of(c["messages"])
            prompt.append(
                dict(
                    ids=tokenizer.apply_chat_template(messages, add_generation_prompt=True, **kw)["input_ids"]
                )
            )
        cases.append(dict(template=name, whole=whole, prompt=prompt))
    return dict(
        versions=versions() | dict(tokenizers=tokenizers.__version__),
        tokenizer="tokenizers/qwen3/tokenizer.json",
        chats=[c["name"] for c in chats],
        n_templates=len(cases),
        count=2 * len(cases) * len(chats),
        renders=cases,
    )


def builtin_renders(chats):
    files = sorted(BUILTINS.glob("*.jinja"))
    return dict(
        versions=versions(),
        tokens=TOKENS,
        chats=[c["name"] for c in chats],
        count=2 * len(files) * len(chats),
        n_templates=len(files),
        renders=[
            dict(template=f.name, sha256=hashlib.sha256(f.read_bytes()).hexdigest())
            | both(f.read_bytes().decode(), chats, TOKENS, full)
            for f in files
        ],
    )


def lines(value):
    """JSON with one line for each render."""
    head = ",\n ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items() if k != "renders")
    rows = []
    for r in value["renders"]:
        fixed = ", ".join(
            f"{json.dumps(k)}: {json.dumps(v)}" for k, v in r.items() if k not in ("whole", "prompt")
        )
        cells = ",\n  ".join(
            f'"{k}": [\n   ' + ",\n   ".join(json.dumps(x) for x in r[k]) + "]" for k in ("whole", "prompt")
        )
        rows.append(f" {{{fixed},\n  {cells}}}")
    return "{\n " + head + ',\n "renders": [\n' + ",\n".join(rows) + "\n]}\n"


def main():
    args = argparse.ArgumentParser(description="Writes the goldens of the chat templates.")
    args.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    check = args.parse_args().check
    chats = json.loads((HERE / "chats.json").read_text())
    wanted = {}
    if BUILTINS.exists():
        wanted["builtin_renders.json"] = builtin_renders(chats)
    if "HONE_CORPUS" in os.environ:
        corpus = pathlib.Path(os.environ["HONE_CORPUS"])
        tokenizer_agrees(corpus, chats)
        wanted["renders.json"] = corpus_renders(corpus, chats)
        wanted["tokens.json"] = token_ids(corpus, chats)
        wanted["conformance.json"] = conformance(corpus)
    else:
        print("renders.json, tokens.json and conformance.json left out: HONE_CORPUS is not set")
    stale = 0
    for name, value in wanted.items():
        text = lines(value)
        assert json.loads(text) == json.loads(json.dumps(value))
        differs = not (HERE / name).exists() or (HERE / name).read_text() != text
        print(
            f"{name}: {value['n_templates']} templates, {value['count']} renders, {len(text)} bytes"
            + (", differs" if check and differs else "")
        )
        stale += differs
        if not check:
            (HERE / name).write_text(text)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
