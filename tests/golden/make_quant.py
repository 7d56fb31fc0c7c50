#!/usr/bin/env python3
"""Writes the goldens of 4-bit quantisation into quant/: what bitsandbytes' CPU build makes of awkward tensors, and a checkpoint that
transformers wrote with it.

One thread: PyTorch's mean of the scales depends on their number.

  make_quant.py           writes quant/
  make_quant.py --check   writes to a temporary folder and compares with quant/
  make_quant.py --read D  loads the checkpoint in D as transformers does, and compares its logits with quant/checkpoint's
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes compiles its plain kernels for each shape otherwise

import bitsandbytes
import bitsandbytes.functional as F
import numpy as np
import torch
import transformers
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute, _get_4bit_quantize_bounds
from llama_cases import LINEARS, make_config, make_weights
from make_adapters import file_names, run, scramble
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def middles(book, absmax):
    """Values that lie on the bounds between codes, and on either side of them, in one block whose absmax is a power of two."""
    bounds = _get_4bit_quantize_bounds(book, torch.device("cpu"))[0].numpy()
    near = [np.nextafter(bounds, np.float32(s)) for s in (-2, 2)]
    values = np.concatenate([[1.0], bounds, *near, [0.0, -0.0, -1.0]]).astype(np.float32)
    return np.pad(values * np.float32(absmax), (0, 64 - len(values)))


def inputs(rng):
    """(name, book, block, nested, dtype, values)."""
    cases = []

    def add(name, values, block=64, books=("nf4", "fp4"), nested=(False, True), dtypes=("float32",)):
        for book in books:
            for n in nested:
                for dtype in dtypes:
                    label = f"{name}.{book}.{block}.{'nested' if n else 'plain'}.{dtype}"
                    cases.append((label, book, block, n, dtype, np.asarray(values, np.float32)))

    for n in (1, 2, 7, 63, 64, 65, 127, 128, 200, 321):
        add(f"n{n}", 0.02 * rng.standard_normal(n))
    for block in (32, 128, 256, 4096):
        add("block", rng.standard_normal(300), block=block, nested=(True,))
    spread = 0.02 * rng.standard_normal(64 * 9 + 13)
    add("dtypes", spread, dtypes=("float32", "bfloat16", "float16"))
    # Every code of the 8-bit map, a second block of scales, and a last one that is not whole.
    many = 0.02 * rng.standard_normal((300, 32)) * np.exp(rng.standard_normal((300, 1)))
    add("many", many.reshape(-1)[:-5], block=32, books=("nf4",), nested=(True,), dtypes=("bfloat16",))
    add("zeros", np.zeros(150))
    add("zeros64", np.zeros(128))
    add("minus_zero", np.where(np.arange(130) % 3 == 0, -0.0, 1e-3 * rng.standard_normal(130)))
    add("one", np.where(np.arange(192) == 70, -3.0, 0.0))
    for name, scale in (("huge", 1e38), ("large", 1e30), ("small", 1e-30), ("tiny", 1e-38), ("denormal", 1e-41)):
        values = np.clip(rng.standard_normal(137), -3, 3) * scale
        add(name, values, nested=(False, True) if name != "huge" else (False,))
    add("alike", np.where(np.arange(256) % 2 == 0, 0.25, -0.25))
    for book in ("nf4", "fp4"):
        add("middles", np.concatenate([middles(book, a) for a in (1.0, 0.5, 4.0)]), books=(book,), nested=(False,))
    return cases


def quantized(book, block, nested, dtype, values):
    tensor = torch.from_numpy(values.copy()).to(DTYPES[dtype])
    codes, state = F.quantize_4bit(tensor, blocksize=block, quant_type=book, compress_statistics=nested)
    result = F.dequantize_4bit(codes, state).reshape(-1)
    scales = state.absmax
    if nested:
        scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    plain = _dequantize_4bit_compute(codes.reshape(-1), scales, state.code, block, tensor.shape, tensor.dtype)
    assert torch.equal(result, plain), "bitsandbytes' kernels differ"
    out = dict(input=tensor, codes=codes.reshape(-1), absmax=state.absmax, values=result)
    if nested:
        out |= dict(nested_absmax=state.state2.absmax, offset=state.offset.reshape(1))
    return out


def write_cases(folder):
    tensors, index = {}, []
    for name, book, block, nested, dtype, values in inputs(np.random.Generator(np.random.PCG64(41))):
        tensors |= {f"{name}/{k}": v.contiguous().clone() for k, v in quantized(book, block, nested, dtype, values).items()}
        index.append(dict(name=name, book=book, block=block, nested=nested, dtype=dtype, n=len(values)))
    tensors["dynamic_map"] = F.create_dynamic_map()
    tensors |= {name: F.get_4bit_type(name, device="cpu") for name in ("nf4", "fp4")}
    save_file(tensors, folder / "cases.safetensors")
    versions = dict(bitsandbytes=bitsandbytes.__version__, torch=torch.__version__.split("+")[0], transformers=transformers.__version__)
    text = json.dumps(dict(versions=versions, cases=index)).replace('{"name"', '\n{"name"')
    (folder / "cases.json").write_text(text + "\n")


# Rows of whole blocks: bitsandbytes 0.50 dequantises others wrongly on AVX-512 machines (its scale index counts blocks by row).
TWIN = dict(
    seed=21,
    vocab_size=48,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    theta=10000.0,
)
SETTINGS = {
    "nf4_double": dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": dict(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
}
IDS = [[1, 7, 33, 12, 47, 5, 20, 2, 9, 9, 31]]


def load(folder, **kw):
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager", device_map="cpu", **kw)


def logits(model):
    """In f32, 4-bit weights included: training mode keeps bitsandbytes from repacking them for its own product in bf16."""
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
    for p in model.parameters():
        p.data = p.data.float() if p.is_floating_point() else p.data
    with torch.no_grad():
        return model.train()(input_ids=torch.tensor(IDS), use_cache=False).logits[0].float()


def write_checkpoints(folder):
    config = make_config(TWIN)
    weights = make_weights(config, np.random.Generator(np.random.PCG64(TWIN["seed"])))
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=False)
    source = folder / "source"
    model.to(torch.bfloat16).save_pretrained(source)
    (source / "generation_config.json").unlink()
    for name, settings in SETTINGS.items():
        quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
        model = load(source, quantization_config=quant, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        again = load(folder / name, dtype=torch.float32)
        save_file({"logits": logits(again)}, folder / name / "logits.safetensors")


def write_qlora(folder):
    """PEFT's LoRA on bitsandbytes' maps, f32 throughout: the base is quantised from f32, else bitsandbytes' backward would multiply with
    values rounded to bf16 and its forward with unrounded ones."""
    folder.mkdir(exist_ok=True)
    for name, settings in SETTINGS.items():
        quant = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **settings)
        base = load(folder.parent / "source", quantization_config=quant, dtype=torch.float32)
        lora = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=LINEARS, use_dora=name == "fp4")
        model = get_peft_model(base, lora).train()
        scramble(model, np.random.Generator(np.random.PCG64(77)))
        names = file_names(model)
        row = dict(input_ids=IDS[0], weights=[1.0] * len(IDS[0]))
        loss, logits, grads = run(model, [row])
        with tempfile.TemporaryDirectory() as tmp:
            model.save_pretrained(tmp, save_embedding_layers=False)
            text = json.loads(pathlib.Path(tmp, "adapter_config.json").read_text())
            adapter = load_file(f"{tmp}/adapter_model.safetensors")
        text |= dict(target_modules=sorted(text["target_modules"]), base_model_name_or_path=None)
        (folder / f"{name}.adapter_config.json").write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
        tensors = {f"adapter/{k}": v for k, v in adapter.items()} | {f"grads/{names[n]}": g for n, g in grads.items()}
        tensors |= dict(logits=logits[0], loss=torch.tensor([loss]))
        save_file({k: v.detach().contiguous().clone() for k, v in sorted(tensors.items())}, folder / f"{name}.safetensors")


def differences(a, b):
    names = [sorted(str(p.relative_to(x)) for p in x.rglob("*") if p.is_file()) for x in (a, b)]
    if names[0] != names[1]:
        return [f"files differ: {set(names[0]) ^ set(names[1])}"]
    return [n for n in names[0] if (a / n).read_bytes() != (b / n).read_bytes()]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--read", type=pathlib.Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.read:
        mine = logits(load(args.read, dtype=torch.float32))
        name = json.loads((args.read / "config.json").read_text())["quantization_config"]["bnb_4bit_quant_type"]
        folder = HERE / "quant" / {"nf4": "nf4_double", "fp4": "fp4"}[name]
        apart = float((mine - load_file(folder / "logits.safetensors")["logits"]).abs().max())
        print(f"{args.read}: logits differ by {apart}")
        sys.exit(apart > 0)
    with tempfile.TemporaryDirectory() as tmp:
        folder = pathlib.Path(tmp) if args.check else HERE / "quant"
        folder.mkdir(exist_ok=True)
        write_cases(folder)
        write_checkpoints(folder)
        write_qlora(folder / "qlora")
        if args.check:
            found = differences(folder, HERE / "quant")
            print("\n".join(found) or "the same bytes")
            sys.exit(bool(found))


if __name__ == "__main__":
    main()
