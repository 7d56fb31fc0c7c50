#!/usr/bin/env python3
"""Greedy decoding with transformers' `generate`: torch_generate.py MODEL PROMPTS.json N_NEW f32|bf16 THREADS [REPEATS]

PROMPTS.json is a list of prompts, each a list of ids, all of one length. Prints one JSON line: `first_s` and `whole_s`, seconds to the
first token and to the last of each repeat, and the new `ids`. No token ends a sequence.
"""

import json
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def main():
    path, prompts, n_new, dtype, threads = sys.argv[1:6]
    repeats = int(sys.argv[6]) if len(sys.argv) > 6 else 3
    torch.set_num_threads(int(threads))
    dtype = dict(f32=torch.float32, bf16=torch.bfloat16)[dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(json.load(open(prompts)))

    def generate(n):
        begun = time.perf_counter()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, pad_token_id=0)
        return time.perf_counter() - begun, out[:, ids.shape[1] :].tolist()

    with torch.inference_mode():
        first, whole = [], []
        for _ in range(repeats):
            first.append(generate(1)[0])
            seconds, new = generate(int(n_new))
            whole.append(seconds)
    print(json.dumps(dict(first_s=first, whole_s=whole, ids=new)))


if __name__ == "__main__":
    main()
