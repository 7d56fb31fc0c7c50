#!/usr/bin/env python3
"""What bench.py needs and only the peers' packages can read.

  packs.py PACKS.arrow               the packs as JSON: a pack is a list of documents, a document [ids, weights]
  packs.py --layers N BASE_DIR OUT   a model's first N layers as a model
"""

import json
import pathlib
import shutil
import sys


def packs(path):
    import pyarrow as pa

    with pa.memory_map(path) as file:
        for row in pa.ipc.open_file(file).read_all().select(["input_ids", "loss_weight", "seq_lens"]).to_pylist():
            at, documents = 0, []
            for length in row["seq_lens"]:
                documents.append([row["input_ids"][at : at + length], row["loss_weight"][at : at + length]])
                at += length
            yield documents


def cut(n_layers, base, out):
    from safetensors.torch import load_file, save_file

    def kept(name):
        return not name.startswith("model.layers.") or int(name.split(".")[2]) < n_layers

    out.mkdir(parents=True, exist_ok=True)
    for path in base.iterdir():
        if path.name not in ("config.json", "model.safetensors", "manifest.json"):
            shutil.copyfile(path, out / path.name)
    weights = {name: weight for name, weight in load_file(base / "model.safetensors").items() if kept(name)}
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | dict(num_hidden_layers=n_layers)))


if sys.argv[1] == "--layers":
    cut(int(sys.argv[2]), pathlib.Path(sys.argv[3]), pathlib.Path(sys.argv[4]))
else:
    print(json.dumps(list(packs(sys.argv[1]))))
