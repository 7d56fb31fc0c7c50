#!/usr/bin/env python3
"""Steps of fine-tuning by PyTorch, transformers and PEFT, by the fastest recipe that leaves the numbers as they are.

  torch_train.py BASE STEPS.json --method lora|qlora|full --dtype f32|bf16|bf16-pure|autocast --lr LR [--adapter DIR] --threads N

STEPS.json is {"steps": [step, ...]}: a step is a list of packs, a pack a list of documents, a document [ids, weights]. Packs of one
length, each of one document, are computed side by side with PyTorch's causal attention; packs of several documents with a
block-diagonal mask and positions that start anew. `--dtype`:

  f32        weights and products in f32
  bf16       frozen weights in bf16, adapters in f32, products under autocast
  bf16-pure  adapters in bf16 too, no autocast
  autocast   weights in f32, products under autocast

The loss runs over the trained rows of the head in chunks that the backward computes again, so that logits are never held whole; AdamW
is the fused one. Prints one JSON line: losses, gradient norms before clipping, seconds of each step.
"""

import argparse
import json
import os
import time
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

import torch
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

CHUNK = 512  # rows of logits held at once
MAX_GRAD_NORM = 1.0


def load(args):
    dtype = torch.bfloat16 if args.dtype.startswith("bf16") else torch.float32
    more = {}
    if args.method == "qlora":
        compute = torch.float32 if args.dtype == "f32" else torch.bfloat16
        more["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
        more["device_map"] = "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype, attn_implementation="sdpa", **more)
    model.config.use_cache = False
    # transformers gives the row of the padding token no gradient; here it is a real token too.
    model.get_input_embeddings().padding_idx = None
    if args.method != "full":
        import peft

        if args.method == "qlora":
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        model = peft.PeftModel.from_pretrained(model, args.adapter, is_trainable=True, autocast_adapter_dtype=args.dtype != "bf16-pure")
    return model.train()


def batch_of(packs, dtype):
    """What the model sees of a step: ids, targets, weights, and positions and mask where a pack has several documents."""
    ids = torch.stack([torch.tensor([i for ids, _ in pack for i in ids]) for pack in packs])
    weights = torch.stack([torch.tensor([w for _, weights in pack for w in weights]) for pack in packs])
    position = torch.stack([torch.cat([torch.arange(len(ids)) for ids, _ in pack]) for pack in packs])
    # The first token of a document is predicted by nothing.
    weights = torch.where(position == 0, 0.0, weights)
    seen = {}
    if any(len(pack) > 1 for pack in packs):
        document = torch.cumsum(position == 0, 1)
        place = torch.arange(ids.shape[1])
        hidden = (document[:, :, None] != document[:, None, :]) | (place[:, None] < place)
        # Added to the scores in their own type: faster than a mask of booleans.
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
        seen = dict(position_ids=position, attention_mask=mask[:, None])
    return ids, weights, seen


def padded(packs):
    """Packs of a step in one length: what is added is a document of its own without weight."""
    length = max(sum(len(ids) for ids, _ in pack) for pack in packs)
    out = []
    for pack in packs:
        short = length - sum(len(ids) for ids, _ in pack)
        out.append(pack + [[[0] * short, [0.0] * short]] if short else pack)
    return out


def chunked_loss(model, packs, dtype):
    ids, weights, seen = batch_of(padded(packs), dtype)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = base.model(input_ids=ids, use_cache=False, **seen).last_hidden_state[:, :-1]
    trained = weights[:, 1:] != 0
    hidden, targets, weights = hidden[trained], ids[:, 1:][trained], weights[:, 1:][trained]
    head = base.lm_head.weight

    def part(hidden, targets, weights):
        losses = F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")
        return (losses * weights).sum()

    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), weights.split(CHUNK))
    return sum(checkpoint(part, *chunk, use_reentrant=False) for chunk in parts) / weights.sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("steps")
    parser.add_argument("--method", choices=["lora", "qlora", "full"], required=True)
    parser.add_argument("--dtype", choices=["f32", "bf16", "bf16-pure", "autocast"], required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--adapter")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load(args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    mixed = torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.dtype in ("bf16", "autocast"))
    losses, norms, seconds = [], [], []
    for packs in json.load(open(args.steps))["steps"]:
        begun = time.perf_counter()
        with mixed:
            loss = chunked_loss(model, packs, torch.float32 if args.dtype == "f32" else torch.bfloat16)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - begun)
    print(json.dumps(dict(losses=losses, grad_norms=norms, seconds=seconds)))


if __name__ == "__main__":
    main()
