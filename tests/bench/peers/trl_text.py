#!/usr/bin/env python3
"""Rows a second of TRL's own data preparation, or of the bare tokenizers library, on the rows of rows.py.

  trl_text.py trl   ROWS.jsonl TOKENIZER_DIR MAX_LEN     SFTTrainer: apply_chat_template, tokenize, assistant mask, bfd packing, num_proc=2
  trl_text.py bare  ROWS.jsonl TOKENIZER_DIR MAX_LEN     Tokenizer.encode_batch of the rendered texts, nothing else

Prints one JSON line. Reading the rows and building the (tiny) model are not counted; TRL's own reports of its steps go to stderr.
"""

import json
import os
import resource
import sys
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HOME"] = tempfile.mkdtemp()


def times():
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def report(what, n_rows, wall, cpu, **more):
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    print(json.dumps(dict(what=what, rows=n_rows, wall_s=round(wall, 2), cpu_s=round(cpu, 2), rows_per_s=round(n_rows / wall), peak_mib=(own.ru_maxrss + children.ru_maxrss) // 1024) | more), flush=True)


def trl(path, folder, max_len):
    import datasets
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args, **kwargs):
            began, cpu = time.time(), times()
            out = super()._prepare_dataset(*args, **kwargs)
            self.took = time.time() - began, times() - cpu
            return out

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = datasets.Dataset.from_list([json.loads(line) for line in open(path, encoding="utf-8")])
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=len(tokenizer))
    args = SFTConfig(
        output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], max_length=max_len, packing=True,
        packing_strategy="bfd", assistant_only_loss=True, dataset_num_proc=2,
    )
    trainer = Timed(LlamaForCausalLM(config), args=args, train_dataset=rows, processing_class=tokenizer)
    packed = trainer.train_dataset
    n_tokens = sum(len(x) for x in packed["input_ids"])
    report("trl", len(rows), *trainer.took, packs=len(packed), tokens=n_tokens, fill=round(n_tokens / len(packed) / max_len, 5))


def bare(path, folder, max_len):
    import tokenizers

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = tokenizers.Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    texts = []
    for line in open(path, encoding="utf-8"):
        turns = json.loads(line)["messages"]
        texts.append("".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in turns))
    began, cpu = time.time(), times()
    n_tokens = 0
    for at in range(0, len(texts), 1000):
        n_tokens += sum(len(e.ids) for e in tokenizer.encode_batch(texts[at : at + 1000], add_special_tokens=False))
    report("bare", len(texts), time.time() - began, times() - cpu, tokens=n_tokens)


if __name__ == "__main__":
    {"trl": trl, "bare": bare}[sys.argv[1]](sys.argv[2], sys.argv[3], int(sys.argv[4]))
