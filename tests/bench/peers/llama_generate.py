#!/usr/bin/env python3
"""Greedy decoding with llama.cpp, by its C interface: llama_generate.py MODEL.gguf PROMPTS.json N_NEW THREADS [REPEATS]

Sequences grow side by side, one batch a step, as in llama.cpp's own batched example. Files and output are those of torch_generate.py.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


@llama_cpp.llama_log_callback
def silent(level, text, user_data):
    pass


class Model:
    def __init__(self, path, n_threads, n_sequences, capacity):
        llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_sequences * capacity
        params.n_seq_max = n_sequences
        params.n_threads = params.n_threads_batch = n_threads
        params.kv_unified = n_sequences == 1
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            sys.exit(f"llama.cpp cannot load {path}")
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(n_sequences * capacity, 0, 1)

    def next(self, texts, n_known):
        """The likeliest token after each text, of which the first `n_known` tokens were seen before."""
        batch, asked = self.batch, []
        batch.n_tokens = 0
        for sequence, text in enumerate(texts):
            for position in range(n_known, len(text)):
                at = batch.n_tokens
                batch.token[at], batch.pos[at] = text[position], position
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = position + 1 == len(text)
                batch.n_tokens += 1
            asked.append(batch.n_tokens - 1)
        if llama_cpp.llama_decode(self.context, batch):
            sys.exit("llama.cpp cannot decode this batch")
        rows = (llama_cpp.llama_get_logits_ith(self.context, at) for at in asked)
        return [int(np.ctypeslib.as_array(row, (self.n_vocab,)).argmax()) for row in rows]

    def generate(self, prompts, n_new):
        begun = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        texts, n_known = [list(prompt) for prompt in prompts], 0
        for _ in range(n_new):
            new = self.next(texts, n_known)
            n_known = len(texts[0])
            for text, token in zip(texts, new):
                text.append(token)
        return time.perf_counter() - begun, [text[len(prompt) :] for text, prompt in zip(texts, prompts)]


def main():
    path, prompts, n_new, threads = sys.argv[1:5]
    repeats = int(sys.argv[5]) if len(sys.argv) > 5 else 3
    prompts, n_new = json.load(open(prompts)), int(n_new)
    model = Model(path, int(threads), len(prompts), len(prompts[0]) + n_new)
    first, whole = [], []
    for _ in range(repeats):
        first.append(model.generate(prompts, 1)[0])
        seconds, new = model.generate(prompts, n_new)
        whole.append(seconds)
    print(json.dumps(dict(first_s=first, whole_s=whole, ids=new)))


if __name__ == "__main__":
    main()
