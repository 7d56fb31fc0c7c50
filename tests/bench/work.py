"""What is computed: text, the pipelines that make packs of it, hone's own runs, and the operations that a token needs."""

import json
import os
import pathlib
import shutil
import statistics
import sys

import machine

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RANK, ALPHA = 16, 32
PROMPT = 64  # tokens of a prompt that is continued

PIPELINE = """base = {base}
seed = 1
[ingest]
eval_share = 0.0
test_share = 0.0
[[ingest.source]]
name = "rows"
path = {rows}
[template]
template = "auto"
[tokenize]
max_len = {length}
too_long = "split"
packing = "{packing}"
[train]
method = "lora"
rank = {rank}
alpha = {alpha}
lr = 1e-4
schedule = "constant"
shuffle = "{shuffle}"
epochs = 1000
checkpoint_every = 0
eval_every = 0
"""


def long_text(path):
    """One text that is cut into packs without gaps."""
    path.write_text(json.dumps(dict(text=made_rows().text(60_000))) + "\n")


def short_texts(path):
    """Documents of about 120 words."""
    rows = made_rows()
    texts = (rows.text(min(600, int(rows.draw.lognormvariate(4.5, 0.8)) + 8)) for _ in range(800))
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))


def chats(path):
    """Questions and answers: the first rows of GSM8K where HONE_CORPUS has them, or made ones."""
    real = pathlib.Path(os.environ.get("HONE_CORPUS", "/nowhere")) / "rows/gsm8k/train.jsonl"
    if real.exists():
        lines = real.read_text().splitlines()[:800]
        rows = [json.loads(line) for line in lines]
        rows = [dict(instruction=row["question"], output=row["answer"]) for row in rows]
    else:
        made = made_rows()
        rows = [made.row() for _ in range(800)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return "GSM8K" if real.exists() else "made rows"


def made_rows():
    sys.path.insert(0, str(HERE / "peers"))
    from rows import Rows

    return Rows(20260101)


class Data:
    """Packs that the pipeline makes, and hone's trainings on them. `name` is that of text and length."""

    # How the rows are written, and whether they share packs, which then come in a random order: full ones lie last.
    TEXTS = dict(text=(long_text, False), chat=(chats, True), short=(short_texts, True))

    def __init__(self, args, name, text, length):
        self.args, self.name, self.length = args, name, length
        write, shared = self.TEXTS[text]
        rows = args.work / f"{name}.jsonl"
        write(rows)
        self.pipeline = args.work / f"{name}.toml"
        paths = dict(base=json.dumps(str(args.base)), rows=json.dumps(str(rows)))
        ways = dict(packing="best-fit", shuffle="packs") if shared else dict(packing="none", shuffle="none")
        self.pipeline.write_text(PIPELINE.format(**paths, **ways, length=length, rank=RANK, alpha=ALPHA))
        for stage in ("ingest", "template", "tokenize"):
            machine.run([args.bin / f"hone-{stage}", "--pipeline", self.pipeline], 2, args.work)
        self.packs = json.loads(machine.run([args.python, HERE / "packs.py", self.dir / "tokenize/train.arrow"], 2, args.work)[0])

    @property
    def dir(self):
        return self.args.work / "runs" / self.name

    def steps(self, n_steps, batch):
        """Packs of each step, as `hone-train plan` says."""
        if len(self.packs) <= n_steps * batch:
            sys.exit(f"{self.name}: {n_steps} steps of {batch} packs are more than its {len(self.packs)}: give fewer `--steps`")
        command = [*self.command(batch, n_steps), "plan", "--json"]
        plan = json.loads(machine.run(command, 2, self.args.work)[0])
        return [[self.packs[idx] for idx in step["packs"]] for step in plan["steps"]]

    def command(self, batch, n_steps, settings=()):
        sets = {"train.batch_size": batch, "train.micro_batch_size": batch, "train.max_steps": n_steps, **dict(settings)}
        words = [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
        return [self.args.bin / "hone-train", "--pipeline", self.pipeline, *words]

    def adapter(self, base=None):
        """The adapter that all sides start from, made by PEFT with both factors drawn, so that every gradient counts."""
        base = base or self.args.base
        out = self.args.work / f"adapter-{base.name}"
        if not (out / "adapter_config.json").exists():
            make = [ROOT / "tests/parity/training/curve.py", "adapter", "--pipeline", self.pipeline]
            machine.run([self.args.python, *make, "--base", base, "--out", out, "--b-std", "0.01"], 2, self.args.work)
        return out

    def train(self, settings, n_steps, batch, threads):
        """A run of hone-train: losses and seconds of each step, and what the process took."""
        shutil.rmtree(self.dir / "logs", ignore_errors=True)
        command = self.command(batch, n_steps, settings)
        command += ["--out", self.args.work / "trained", "--force", "--restart", "--threads", threads]
        _, took = machine.run(command, threads, self.args.work)
        lines = [json.loads(line) for line in (self.dir / "logs/train/metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "loss" in line]
        ends = [line["seconds"] for line in lines]
        seconds = [end - begun for begun, end in zip([0.0, *ends], ends)]
        return dict(losses=[line["loss"] for line in lines], grad_norms=[line["grad_norm"] for line in lines], seconds=seconds) | took


def write_steps(args, name, steps):
    """Steps as a file for the peers."""
    path = args.work / f"{name}.json"
    path.write_text(json.dumps(dict(steps=steps)))
    return path


def operations_of_a_token(config, steps, full):
    """Multiplications and additions that a token of these steps cannot do without, forward and backward: products with the weights
    (the head's only for trained rows), with the adapters, and attention over the tokens that a token sees. Nothing that is computed
    again counts, nor what is not a product."""
    d, inner, v = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    kv = d // heads * config["num_key_value_heads"]
    maps = [(d, d), (d, kv), (d, kv), (d, d), (d, inner), (d, inner), (inner, d)]
    weights = layers * sum(inp * out for inp, out in maps)
    low = 0 if full else layers * RANK * sum(inp + out for inp, out in maps)
    documents = [document for step in steps for pack in step for document in pack]
    n_tokens = sum(len(ids) for ids, _ in documents)
    n_trained = sum(sum(weight != 0 for weight in weights[1:]) for _, weights in documents)
    n_seen = sum(len(ids) * (len(ids) + 1) // 2 for ids, _ in documents)
    # Forward, gradient of the input, and of the weight where it is trained: two operations a weight each.
    frozen = 6 if full else 4
    per_step = n_tokens * (frozen * weights + 6 * low) + n_trained * frozen * v * d + n_seen * 12 * layers * d
    return per_step / n_tokens


def shallow(args, n_layers):
    """The base with its first layers alone."""
    out = args.work / f"base-{n_layers}-layers"
    if not (out / "config.json").exists():
        machine.run([args.python, HERE / "packs.py", "--layers", n_layers, args.base, out], 2, args.work)
    return out


def rate(result, steps, n_warm_up):
    """Tokens a second: the median of the steps after the warm-up. What a peer pads is not counted."""
    n_tokens = [sum(len(ids) for pack in step for ids, _ in pack) for step in steps]
    return statistics.median(n / seconds for n, seconds in list(zip(n_tokens, result["seconds"]))[n_warm_up:])


def decoding_rate(result, n_sequences, n_new):
    """Tokens a second after the first: that of reading the prompt is taken away."""
    return n_sequences * (n_new - 1) / (statistics.median(result["whole_s"]) - statistics.median(result["first_s"]))
