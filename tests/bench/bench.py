#!/usr/bin/env python3
"""hone beside PyTorch, llama.cpp and candle on this machine: the same model, packs and adapter, in turn.

  bench.py                      every row of compared.py, into target/bench/{table.md,table.json,chart.svg}
  bench.py lora-bf16 decode-8   some of them
  bench.py products             each product of a step, beside PyTorch's, into target/bench/products.{md,json}
  bench.py scaling              time and memory by tokens, layers and threads, into target/bench/scaling.{md,json,svg}

The first run of each side is compared step by step, and a row whose losses are apart by more than its bound is refused: the comparison ends
with exit code 1. Rates are those of whole steps, read by each side's own clock after two that are not counted; memory is the
process's own peak, as the kernel tells when it ends, loading included on all sides. Others' load is what /proc/stat has beyond the process.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys

import chart
import machine
import work
from compared import DECODERS, ROWS, Decoding
from work import HERE, ROOT

WARM_UP = 2  # steps that are not counted: buffers are made in the first
GUESS = math.log(49152)  # a loss that knows nothing; a model without most of its layers is worse, and sure of it: bounds grow from there on
SAME = 8  # of 32 tokens, that decoders in 16 bits must share on average before rounding leads them apart


def say(what):
    print(what, file=sys.stderr, flush=True)


def refuse(what):
    say(f"error: {what}")
    sys.exit(1)


# ------------------------------------------------------------------------------------------------------------------- what is needed


def python_of(args):
    """The interpreter that has the peers: made once, unless one is given."""
    if args.python:
        return args.python
    venv, wanted = args.out / "venv", HERE / "requirements.txt"
    mark = venv / "requirements.txt"
    if not mark.exists() or mark.read_text() != wanted.read_text():
        say("installing the peers (llama.cpp is compiled)")
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        # llama.cpp for the instructions that this processor has.
        environment = dict(os.environ, CMAKE_ARGS="-DGGML_NATIVE=ON")
        subprocess.run([venv / "bin/python", "-m", "pip", "install", "--quiet", "-r", wanted], env=environment, check=True)
        mark.write_text(wanted.read_text())
    return venv / "bin/python"


def build(args, rows):
    """Programs that only this needs."""
    decoding = any(isinstance(ROWS[name], Decoding) for name in rows)
    candle = any(peer.kind == "candle" for name in rows for peer in ROWS[name].peers)
    cargo = ["cargo", "build", "--quiet", "--release", "--locked"]
    if decoding:
        subprocess.run([*cargo, "-p", "hone-model", "--example", "decode"], cwd=ROOT, check=True)
    crates = ["-p", "bench-ops"] + (["-p", "bench-candle"] if candle else [])
    subprocess.run([*cargo, "--manifest-path", HERE / "Cargo.toml", "--target-dir", args.rust, *crates], check=True)


def ceilings(args, threads):
    """Rates of a large product and of reading memory: hone's own and PyTorch's."""
    own = json.loads(machine.run([args.rust / "release/bench-ops"], threads, args.work)[0])
    peer = json.loads(machine.run([args.python, HERE / "peers/torch_gemm.py", threads], threads, args.work)[0])
    say(f"large products, GFLOP/s: hone {own['gemm_bf16']:.0f} in bf16, {own['gemm_f32']:.0f} in f32; PyTorch {peer['gemm_bf16']:.0f}, {peer['gemm_f32']:.0f}")
    return dict(own=own, torch=peer, **{key: max(own[key], peer[key]) for key in peer})


def in_turn(sides, pairs, check):
    """Results of each side, A B C A B C ...; `check` sees the first of each."""
    results = {name: [] for name in sides}
    for at in range(pairs):
        for name, run in sides.items():
            found = run()
            results[name].append(found)
            say(f"  {at + 1}/{pairs} {name}: {found['rate']:.1f} tokens/s, {found['peak_bytes'] / 1e6:.0f} MB, others {found['others']:.0%}")
        if at == 0:
            check({name: found[0] for name, found in results.items()})
    return results


# ------------------------------------------------------------------------------------------------------------------------- training


def train_peer(args, row, peer, steps, file, adapter, threads, base=None):
    base = base or args.base
    if peer.kind == "candle":
        command = [args.rust / "release/train", base, adapter, file, row.lr]
    else:
        command = [args.python, HERE / "peers/torch_train.py", base, file, "--method", row.method, "--dtype", peer.dtype, "--lr", row.lr]
        command += ["--threads", threads] + ([] if row.method == "full" else ["--adapter", adapter])
    out, took = machine.run(command, threads, args.work)
    found = json.loads(out.splitlines()[-1]) | took
    return found | dict(rate=work.rate(found, steps, 1 if peer.n_steps else WARM_UP))


def train_hone(data, row, steps, adapter, threads, more=()):
    settings = row.settings | dict(more) | ({} if row.method == "full" else {"train.adapter_init": adapter})
    found = data.train(settings, len(steps), row.batch, threads)
    return found | dict(rate=work.rate(found, steps, WARM_UP))


def losses_apart(own, other):
    """Of the steps that the other made: all, but for a slow peer."""
    return [abs(a - b) for a, b in zip(own["losses"], other["losses"])]


def check_losses(name, row):
    def check(first):
        own = first.pop("hone")
        for peer, other in first.items():
            apart = losses_apart(own, other)
            # Not `apart > bound`: what is no number is not within it.
            bounds = [row.bound * max(1, loss / GUESS) for loss in own["losses"]]
            if not all(value <= bound for value, bound in zip(apart, bounds)):
                at = max(range(len(apart)), key=lambda i: math.inf if math.isnan(apart[i]) else apart[i])
                refuse(
                    f"{name}: hone and {peer} do not compute the same: at step {at + 1} the losses are {own['losses'][at]:.6f} and "
                    f"{other['losses'][at]:.6f}, {apart[at]:.1e} apart, and {bounds[at]:.2g} is the bound"
                )
            say(f"  losses of hone and {peer}: at most {max(apart):.1e} apart in {len(apart)} steps (bound {row.bound:g})")

    return check


def training_row(args, name, limits, all_data):
    row = ROWS[name]
    key = f"{row.text}-{row.length}"
    data = all_data.get(key) or all_data.setdefault(key, work.Data(args, key, row.text, row.length))
    steps = data.steps(args.steps, row.batch)
    adapter = data.adapter()
    more = dict(pair.split("=", 1) for pair in args.set)
    sides = {"hone": lambda: train_hone(data, row, steps, adapter, args.threads, more)}
    for peer in row.peers:
        short = steps[: peer.n_steps]
        path = work.write_steps(args, f"{key}-{len(short)}x{row.batch}", short)
        sides[peer.name] = lambda peer=peer, short=short, path=path: train_peer(args, row, peer, short, path, adapter, args.threads)
    results = in_turn(sides, args.pairs, check_losses(name, row))
    config = json.loads((args.base / "config.json").read_text())
    gflop = work.operations_of_a_token(config, steps, row.method == "full") / 1e9
    limit = limits[f"gemm_{row.compute}"]
    own = statistics.median(run["rate"] for run in results["hone"])
    more = dict(gflop_of_a_token=gflop, share_of_gemm=own * gflop / limit, bound=row.bound)
    return lines_of(name, row, results, more, lambda peer: max(losses_apart(results["hone"][0], results[peer][0])))


# ------------------------------------------------------------------------------------------------------------------------- decoding


def prompts_of(args, n, all_data):
    """The starts of questions, all of one length."""
    data = all_data.get("chat-512") or all_data.setdefault("chat-512", work.Data(args, "chat-512", "chat", 512))
    documents = [ids for pack in data.packs for ids, _ in pack if len(ids) > work.PROMPT]
    path = args.work / f"prompts-{n}.json"
    path.write_text(json.dumps([ids[: work.PROMPT] for ids in documents[:n]]))
    return path


def decode(args, kind, dtype, prompts, n, n_new, repeats=3):
    tail = [prompts, n_new]
    if kind == "hone":
        command = [args.bin / "examples/decode", args.base, *tail, dtype, repeats]
    elif kind == "torch":
        command = [args.python, HERE / "peers/torch_generate.py", args.base, *tail, dtype, args.threads, repeats]
    elif kind == "candle":
        command = [args.rust / "release/decode", args.base, *tail, dtype, repeats]
    else:
        file = args.work / f"{dtype}.gguf"
        if not file.exists():
            machine.run([args.python, HERE / "peers/to_gguf.py", args.base, file, dtype], args.threads, args.work)
        command = [args.python, HERE / "peers/llama_generate.py", file, *tail, args.threads, repeats]
    out, took = machine.run(command, args.threads, args.work)
    found = json.loads(out.splitlines()[-1]) | took
    return found | dict(rate=work.decoding_rate(found, n, n_new))


def same_start(own, other):
    """How many tokens two texts share from their start on, on average over sequences."""
    shared = [next((at for at, (x, y) in enumerate(zip(a, b)) if x != y), len(a)) for a, b in zip(own["ids"], other["ids"])]
    return statistics.mean(shared)


def check_texts(args, all_data):
    """Once: in f32 every decoder that has it writes hone's tokens; in 16 bits all start alike, until rounding decides between two words."""
    if "texts agree" in all_data:
        return
    n, n_new = 8, 32
    prompts = prompts_of(args, n, all_data)
    exact = decode(args, "hone", "f32", prompts, n, n_new, 1)
    for kind in ("torch", "candle"):
        shared = same_start(exact, decode(args, kind, "f32", prompts, n, n_new, 1))
        if shared < n_new:
            refuse(f"decoding in f32: hone and {kind} write other tokens; they share {shared:.1f} of {n_new} on average")
    say(f"  in f32, hone, transformers and candle write the same {n_new} tokens after each of {n} prompts")
    own = decode(args, "hone", "bf16", prompts, n, n_new, 1)
    all_data["texts agree"] = agreement = {}
    for peer in DECODERS:
        agreement[peer.name] = shared = same_start(own, decode(args, peer.kind, peer.dtype, prompts, n, n_new, 1))
        if not shared >= SAME:
            refuse(f"decoding: hone in bf16 and {peer.name} share {shared:.1f} of {n_new} tokens on average, and {SAME} is the bound")
        say(f"  hone in bf16 and {peer.name} share {shared:.1f} of {n_new} tokens")


def decoding_row(args, name, limits, all_data):
    row = ROWS[name]
    check_texts(args, all_data)
    prompts = prompts_of(args, row.batch, all_data)
    sides = {"hone": lambda: decode(args, "hone", "bf16", prompts, row.batch, args.new)}
    for peer in row.peers:
        sides[peer.name] = lambda peer=peer: decode(args, peer.kind, peer.dtype, prompts, row.batch, args.new)
    results = in_turn(sides, args.pairs, lambda first: None)
    n_bytes = (args.base / "model.safetensors").stat().st_size
    own = statistics.median(run["rate"] for run in results["hone"])
    # Each step reads all weights, the head's among them, once for all sequences.
    more = dict(share_of_reading=own / row.batch * n_bytes / 1e9 / limits["own"]["read"], bound=None)
    return lines_of(name, row, results, more, lambda peer: all_data["texts agree"][peer])


# ------------------------------------------------------------------------------------------------------------------------- the table


def lines_of(name, row, results, more, agreement):
    """One entry a peer: ratios of runs that followed each other, their median and range, and what was seen on each side."""
    entries = []
    for peer in row.peers:
        pairs = list(zip(results["hone"], results[peer.name]))
        ratios = sorted(own["rate"] / other["rate"] for own, other in pairs)
        memory = [other["peak_bytes"] / own["peak_bytes"] for own, other in pairs]
        middle = lambda key, side: statistics.median(run[key] for run in results[side])
        entries.append(
            dict(
                row=name,
                what=row.what,
                peer=peer.name,
                n_pairs=len(pairs),
                speed=statistics.median(ratios),
                speed_range=[ratios[0], ratios[-1]],
                speed_bar=peer.speed,
                memory=statistics.median(memory),
                memory_bar=peer.memory,
                tokens_per_s=[middle("rate", "hone"), middle("rate", peer.name)],
                peak_mb=[middle("peak_bytes", "hone") / 1e6, middle("peak_bytes", peer.name) / 1e6],
                others=max(run["others"] for pair in pairs for run in pair),
                agreement=agreement(peer.name),
                **more,
            )
        )
    return entries


def reached(value, bar):
    return f"{value:.2f}" if bar is None else f"{value:.2f} of {bar:g}{'' if value >= bar else ' (missed)'}"


def table(entries, about):
    limits = about["ceilings"]
    own, torch = limits["own"], limits["torch"]
    lines = [
        f"{about['date']}, {about['processor']}, {about['threads']} threads, {about['pairs']} pairs in turn; hone {about['commit']}, torch {about['torch']}.",
        f"Large products: hone {own['gemm_bf16']:.0f} GFLOP/s in bf16 and {own['gemm_f32']:.0f} in f32, PyTorch {torch['gemm_bf16']:.0f} and "
        f"{torch['gemm_f32']:.0f}; memory read at {own['read']:.0f} GB/s. Speed is hone's tokens/s over the peer's (median, range), memory the peer's peak",
        "over hone's. The last column is the largest difference of two losses, or the tokens that two texts share.",
        "",
        "| work | peer | speed, of the bar | range | tokens/s | memory, of the bar | MB | of the ceiling | others' load | agreement |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for e in entries:
        share = f"{e['share_of_gemm']:.0%} of GEMM" if "share_of_gemm" in e else f"{e['share_of_reading']:.0%} of reading"
        agreement = f"{e['agreement']:.1e}" if e["bound"] else f"{e['agreement']:.0f} tokens"
        low, high = e["speed_range"]
        rates, peaks = (" / ".join(f"{value:,.0f}" for value in e[key]) for key in ("tokens_per_s", "peak_mb"))
        cells = [e["what"], e["peer"], reached(e["speed"], e["speed_bar"]), f"{low:.2f} to {high:.2f}", rates, reached(e["memory"], e["memory_bar"])]
        lines.append("| " + " | ".join([*cells, peaks, share, f"{e['others']:.0%}", agreement]) + " |")
    return "\n".join(lines) + "\n"


def about(args):
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    version = machine.run([args.python, "-c", "import torch; print(torch.__version__)"], 1, args.work)[0].strip()
    now = datetime.datetime.now(datetime.timezone.utc)
    found = dict(date=f"{now:%Y-%m-%d %H:%M} UTC", processor=machine.processor(), threads=args.threads, pairs=args.pairs, steps=args.steps)
    return found | dict(commit=commit, torch=version, wait_policy=os.environ.get("OMP_WAIT_POLICY", "default"))


def write(args, entries, about):
    """Whatever is there by now: a run that is stopped leaves its finished rows."""
    (args.out / "table.json").write_text(json.dumps(dict(about=about, rows=entries), indent=1) + "\n")
    (args.out / "table.md").write_text(table(entries, about))
    (args.out / "chart.svg").write_text(chart.bars(entries, about))


def compare(args, names):
    build(args, names)
    said = about(args) | dict(ceilings=ceilings(args, args.threads))
    entries, all_data = [], {}
    for name in names:
        say(f"{name}: {ROWS[name].what}")
        rows = decoding_row if isinstance(ROWS[name], Decoding) else training_row
        entries += rows(args, name, said["ceilings"], all_data)
        write(args, entries, said)
    print((args.out / "table.md").read_text())


# -------------------------------------------------------------------------------------------------------------------------- scaling

TOKENS, LAYERS, THREADS = [256, 512, 1024, 2048, 4096], [5, 10, 20, 30], [1, 2]


def scaling(args):
    """LoRA in bf16 beside PyTorch's best like for like: one document a step, of so many tokens, layers or threads."""
    row = ROWS["lora-bf16"]
    peer, points = row.peers[0], []
    at = [("tokens", n, n, 30, 2) for n in TOKENS] + [("layers", n, 1024, n, 2) for n in LAYERS] + [("threads", n, 1024, 30, n) for n in THREADS]
    done, all_data = {}, {}
    for what, value, n_tokens, n_layers, threads in at:
        data = all_data.get(n_tokens) or all_data.setdefault(n_tokens, work.Data(args, f"text-{n_tokens}", "text", n_tokens))
        base = args.base if n_layers == 30 else work.shallow(args, n_layers)
        steps = data.steps(args.steps, 1)
        file = work.write_steps(args, f"{data.name}-{args.steps}x1", steps)
        adapter = data.adapter(base)
        one = dataclasses.replace(row, batch=1)
        sides = {
            "hone": lambda: train_hone(data, one, steps, adapter, threads, {"base": json.dumps(str(base))}),
            "PyTorch": lambda: train_peer(args, row, peer, steps, file, adapter, threads, base),
        }
        point = (n_tokens, n_layers, threads)
        if point not in done:
            say(f"scaling: {n_tokens} tokens, {n_layers} layers, {threads} threads")
            done[point] = in_turn(sides, args.pairs, check_losses("scaling", row))
        for side, runs in done[point].items():
            seconds = statistics.median(n_tokens / run["rate"] for run in runs)
            peak = statistics.median(run["peak_bytes"] for run in runs) / 1e6
            points.append(dict(what=what, value=value, side=side, step_s=seconds, peak_mb=peak))
        said = about(args)
        (args.out / "scaling.json").write_text(json.dumps(dict(about=said, points=points), indent=1) + "\n")
        (args.out / "scaling.svg").write_text(chart.lines(points, said))
        (args.out / "scaling.md").write_text(scaling_table(points, said))
    print((args.out / "scaling.md").read_text())


def scaling_table(points, about):
    lines = [
        f"{about['date']}, {about['processor']}, {about['pairs']} pairs. LoRA of SmolLM2-135M in bf16, one document a step; where nothing else is said, 1,024 tokens,",
        "30 layers, 2 threads.",
        "",
        "| by | hone, s a step | PyTorch | hone, MB | PyTorch |",
        "|---|---:|---:|---:|---:|",
    ]
    for own, other in zip(points[::2], points[1::2]):
        lines.append(f"| {own['value']:,} {own['what']} | {own['step_s']:.2f} | {other['step_s']:.2f} | {own['peak_mb']:,.0f} | {other['peak_mb']:,.0f} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------------------- products


def products(args):
    """Rates of the products of a step, hone's and PyTorch's (oneDNN, MKL), in turn: medians over the rounds."""
    build(args, [])
    rounds = []
    for at in range(args.pairs):
        own, took = machine.run([args.rust / "release/bench-ops", "products"], args.threads, args.work)
        other, _ = machine.run([args.python, HERE / "peers/torch_products.py", args.threads], args.threads, args.work)
        rounds.append((json.loads(own), json.loads(other)))
        say(f"  {at + 1}/{args.pairs} others {took['others']:.0%}")
    lines = [
        f"{datetime.date.today()}, {machine.processor()}, {args.threads} threads, {args.pairs} rounds in turn: medians of GFLOP/s.",
        "",
        "| product | tokens x in x out | hone, bf16 | PyTorch, bf16 | hone, f32 | PyTorch, f32 |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for at, first in enumerate(rounds[0][0]):
        of = lambda side, dtype: statistics.median(both[side][at][dtype] for both in rounds)
        if any(side[at]["sides"] != first["sides"] or side[at]["what"] != first["what"] for both in rounds for side in both):
            refuse("products: the two sides do not multiply the same")
        rates = " | ".join(f"{of(side, dtype):.0f}" for dtype in ("bf16", "f32") for side in (0, 1))
        lines.append(f"| {first['what']} | {' x '.join(map(str, first['sides']))} | {rates} |")
    (args.out / "products.json").write_text(json.dumps(rounds) + "\n")
    (args.out / "products.md").write_text("\n".join(lines) + "\n")
    print((args.out / "products.md").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(ROWS)}, products or scaling; all rows but those two when not given")
    parser.add_argument("--pairs", type=int, default=5, help="rounds of runs in turn (5)")
    parser.add_argument("--steps", type=int, default=6, help=f"steps of a training run, the first {WARM_UP} of them not counted (6)")
    parser.add_argument("--new", type=int, default=128, help="tokens that a prompt is continued with (128)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="train.KEY=VALUE", help="another setting of hone's trainings")
    parser.add_argument("--base", type=pathlib.Path, default=ROOT / "runs/smollm2/base")
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "target/release")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "target/bench")
    parser.add_argument("--python", type=pathlib.Path, help="an interpreter that has the peers already")
    args = parser.parse_args()
    names = args.rows or list(ROWS)
    if unknown := set(names) - set(ROWS) - {"products", "scaling"}:
        parser.error(f"no row is named {', '.join(sorted(unknown))}")
    if args.steps <= WARM_UP or args.pairs < 1 or args.new < 2:
        parser.error(f"a run needs more than {WARM_UP} steps, one pair and two new tokens")
    args.base, args.bin, args.out = (path.resolve() for path in (args.base, args.bin, args.out))
    args.work, args.rust = args.out / "work", args.out / "rust"
    args.work.mkdir(parents=True, exist_ok=True)
    args.python = python_of(args)
    if "products" in names:
        products(args)
    if chosen := [name for name in names if name in ROWS]:
        compare(args, chosen)
    if "scaling" in names:
        scaling(args)


if __name__ == "__main__":
    main()
