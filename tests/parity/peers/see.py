#!/usr/bin/env python3
"""Runs a peer's own code on a row that is known to break it, and prints what it would train on: see.py CASE (README.md has the table).

Each case needs the versions of VERSIONS in front of the reference environment: run.py puts them there. One JSON line comes out.
"""

import json
import os
import pathlib
import sys
import tempfile
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
warnings.filterwarnings("ignore")

HERE = pathlib.Path(__file__).resolve().parent
PARITY = pathlib.Path(os.environ["HONE_PARITY"])
ROWS = {json.loads(line)["case"]: json.loads(line)["rows"] for line in (HERE / "rows.jsonl").read_text().splitlines()}


def tokenizer(name):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(PARITY / "tokenizers" / name)


def sft(rows, tok, **options):
    """What SFTTrainer's own preparation and collator make of rows: (ids, labels) of each that is left."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, vocab_size=len(tok)))
    args = SFTConfig(output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, report_to=[], **options)
    trainer = SFTTrainer(model, args=args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tok)
    out = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        out.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return out


def trained(tok, labels):
    return tok.decode([x for x in labels if x != -100])


def halves(row):
    """A conversation as prompt and completion, as TRL takes them."""
    return dict(prompt=row["messages"][:-1], completion=row["messages"][-1:])


def pad_is_eos(rows):
    from transformers import DataCollatorForLanguageModeling

    tok = tokenizer("llama3")
    tok.pad_token = tok.eos_token
    text = tok.apply_chat_template(rows[0]["messages"], chat_template="{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", tokenize=False)
    ids = tok(text, add_special_tokens=False)["input_ids"]
    batch = DataCollatorForLanguageModeling(tok, mlm=False)([dict(input_ids=ids)])
    return dict(text=text, trained=trained(tok, batch["labels"][0].tolist()))


def doubled_bos(rows):
    tok = tokenizer("gemma3")
    text = tok.apply_chat_template(rows[0]["messages"], tokenize=False)
    ((ids, labels),) = sft([dict(text=text)], tok)
    return dict(tokens=[tok.decode([i]) for i in ids], trained=trained(tok, labels))


def prompt_of_two(rows):
    tok = tokenizer("qwen3")
    ((ids, labels),) = sft([halves(rows[0])], tok)
    return dict(text=tok.decode(ids), trained=trained(tok, labels))


def wrapped(rows):
    import datasets
    from trl import pack_dataset

    ids = [[r * 4 + k for k in range(4)] for r in range(2500)]
    packed = pack_dataset(datasets.Dataset.from_dict(dict(input_ids=ids)), 8, strategy="wrapped")
    got = [t for row in packed["input_ids"] for t in row]
    return dict(tokens_in=10_000, tokens_out=len(got), lost=10_000 - len(set(got)), doubled=len(got) - len(set(got)))


def long_documents(rows):
    import datasets
    from trl import pack_dataset

    ids = [[r * 1000 + k for k in range(640)] for r in range(100)]
    packed = pack_dataset(datasets.Dataset.from_dict(dict(input_ids=ids)), 64, strategy="bfd")
    return dict(tokens_in=64_000, tokens_out=sum(len(row) for row in packed["input_ids"]))


def cut(rows):
    tok = tokenizer("qwen3")
    out = sft([halves(row) for row in rows], tok)
    return dict(rows_in=len(rows), rows_out=len(out), last_trained=[trained(tok, labels)[-12:] for _, labels in out])


def half_of_each(rows):
    """LlamaFactory's own arithmetic on lengths."""
    from importlib.util import module_from_spec, spec_from_file_location

    folder = next(pathlib.Path(p) for p in sys.path if (pathlib.Path(p) / "llamafactory").is_dir())
    spec = spec_from_file_location("lengths", folder / "llamafactory/data/processor/processor_utils.py")
    module = module_from_spec(spec)
    sys.modules["lengths"] = module
    spec.loader.exec_module(module)
    return {f"question {q}, answer {a}, cutoff 2048": module.infer_seqlen(q, a, 2048) for q, a in ((100, 5000), (3000, 3000))}


def injected(rows):
    tok = tokenizer("qwen3")
    ((ids, labels),) = sft([halves(rows[0])], tok)
    markers = [tok.decode([i]) for i in ids if i in tok.added_tokens_decoder]
    return dict(text=tok.decode(ids), markers=markers, n_turns=markers.count("<|im_start|>"), turns_of_the_row=2, trained=trained(tok, labels))


def null_arguments(rows):
    tok = tokenizer("qwen3")
    out = sft(rows, tok)
    return dict(trained=[tok.decode(ids).split("assistant\n")[-1] for ids, _ in out])


def empty_thought(rows):
    tok = tokenizer("qwen3")
    import trl

    tok.chat_template = (pathlib.Path(trl.__file__).parent / "chat_templates/qwen3_training.jinja").read_text()
    ((_, labels),) = sft(rows[:1], tok, assistant_only_loss=True)
    return dict(trained=trained(tok, labels))


def response_not_found(rows):
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.utils import DataCollatorForCompletionOnlyLM

    tok = PreTrainedTokenizerFast(tokenizer_file=str(PARITY / "tokenizers/llama2/tokenizer.json"), eos_token="</s>", pad_token="<unk>")
    question, answer = (m["content"] for m in rows[0]["messages"])
    text = f"### User: {question}\n\n### Assistant: {answer}</s>"
    labels = DataCollatorForCompletionOnlyLM("### Assistant:", tokenizer=tok, mlm=False)([tok(text)])["labels"][0].tolist()
    return dict(searched=tok.tokenize("### Assistant:"), there=tok.tokenize(text)[-16:], trained=trained(tok, labels))


# case: (thread, packages in front of the reference environment, what runs)
CASES = {
    "pad is eos": ("trl#1623", [], pad_is_eos),
    "doubled bos": ("trl#1400", [], doubled_bos),
    "prompt of two": ("trl#6105", ["trl==0.24.0"], prompt_of_two),
    "wrapped": ("trl#6669", ["trl==1.8.0"], wrapped),
    "long documents": ("trl#4554", [], long_documents),
    "cut": ("trl PR#4698", [], cut),
    "half of each": ("LlamaFactory#3995", ["llamafactory==0.9.5"], half_of_each),
    "injected": ("transformers#29279", [], injected),
    "null arguments": ("ms-swift PR#10125, trl PR#5307", [], null_arguments),
    "empty thought": ("trl#6361", ["trl==1.8.0"], empty_thought),
    "response not found": ("trl#588", ["transformers==4.49.0 tokenizers==0.21.0 huggingface-hub==0.29.3 datasets==3.3.2 dill==0.3.8 multiprocess==0.70.16 fsspec==2024.12.0 tyro==0.9.1 docstring-parser shtab rich typeguard aiohttp aiohappyeyeballs aiosignal frozenlist multidict propcache yarl attrs xxhash pytz", "trl==0.9.6"], response_not_found),
}


def main():
    case = sys.argv[1]
    thread, _, run = CASES[case]
    import transformers

    transformers.logging.set_verbosity_error()
    versions = dict(transformers=transformers.__version__)
    try:
        import trl

        versions["trl"] = trl.__version__
    except ImportError:
        pass
    print(json.dumps(dict(case=case, thread=thread, versions=versions) | run(ROWS.get(case)), ensure_ascii=False))


if __name__ == "__main__":
    main()
