#!/usr/bin/env python3
"""Exported labels as datasets and TRL's collator see them, and a table that TRL packed, for `hone-tokenize import`.

    hone-tokenize export --pipeline P.toml --to packs.parquet
    hone-tokenize export --pipeline P.toml --to rows.parquet --rows
    labels.py packs.parquet rows.parquet packed_by_trl.parquet
    hone-tokenize import packed_by_trl.parquet --pipeline P.toml --out back

Checked with torch, datasets and trl 1.16: ids, labels and positions of every batch are those of the file, and both files train
the same number of tokens, which is the number that `hone-tokenize` reports for the split.
"""

import sys

import datasets
import torch
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

COLUMNS = ("input_ids", "labels", "seq_lengths")


def load(path):
    return datasets.load_dataset("parquet", data_files=path, split="train")


def flat(examples, name):
    return torch.tensor([value for example in examples for value in example[name]])


def collated(packs, size=4):
    """Trained tokens of a packed table, batch by batch through TRL's collator."""
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    n_trained = 0
    for start in range(0, len(packs), size):
        examples = [packs[n] for n in range(start, min(start + size, len(packs)))]
        batch = collator([{name: example[name] for name in COLUMNS} for example in examples])
        for name in ("input_ids", "labels", "position_ids"):
            assert torch.equal(batch[name][0], flat(examples, name)), f"{name} of batch {start}"
        n_trained += int((batch["labels"] != -100).sum())
    return n_trained


def main(packs, rows, packed):
    rows = load(rows)
    n_trained = collated(load(packs))
    assert n_trained == sum(label != -100 for row in rows for label in row["labels"])
    print(f"{n_trained} trained tokens in both")
    longest = max(sum(lengths) for lengths in load(packs)["seq_lengths"])
    rows = rows.select_columns(["input_ids", "labels"])
    pack_dataset(rows, seq_length=longest, strategy="bfd").to_parquet(packed)


if __name__ == "__main__":
    main(*sys.argv[1:])
