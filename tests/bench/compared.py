"""The rows of the comparison: what is done, beside whom, and what is to be reached."""

from dataclasses import dataclass, field

# How far the losses of two sides may be apart at any step, in nats. f32: two orders of summation; tests/parity/training.md measures 4e-6
# in small models and 1e-5 over a run of this one. bf16: 2^-9 of each factor on both sides, rounded in other places; 1.1e-2 was the most
# seen there.
F32, BF16 = 1e-3, 2e-2


@dataclass
class Peer:
    """Another trainer or decoder. `memory` and `speed` are what hone is to reach: its peak at most 1 / memory of the peer's, and so many
    times its tokens a second; None where nothing is asked. One that is slow by far takes `n_steps` steps, of which one is not counted."""

    name: str
    kind: str
    dtype: str
    speed: float
    memory: float | None = None
    n_steps: int | None = None


@dataclass
class Training:
    what: str
    settings: dict
    peers: list
    text: str = "text"
    length: int = 512
    batch: int = 4
    bound: float = BF16
    lr: float = 1e-4
    method: str = field(init=False)
    compute: str = field(init=False)

    def __post_init__(self):
        self.method = self.settings.get("train.method", "lora")
        self.compute = self.settings.get("train.compute", "f32")


@dataclass
class Decoding:
    what: str
    peers: list
    batch: int


MIXED = {"train.compute": "bf16"}
DECODERS = [
    Peer("transformers, bf16", "torch", "bf16", 2.0),
    Peer("llama.cpp, bf16", "llama", "bf16", 1.0),
    Peer("llama.cpp, f16", "llama", "f16", 1.0),
    Peer("candle, f16", "candle", "f16", 1.0),
    Peer("candle, f32", "candle", "f32", 1.0),
]

ROWS = {
    "lora-bf16": Training(
        "LoRA, bf16, 4 x 512", MIXED, [Peer("PyTorch, f32 adapters", "torch", "bf16", 2.5, 3.0), Peer("PyTorch, all bf16", "torch", "bf16-pure", 2.0)]
    ),
    "lora-f32": Training("LoRA, f32, 4 x 512", {}, [Peer("PyTorch", "torch", "f32", 1.5, 3.0), Peer("candle", "candle", "f32", 1.0, n_steps=3)], bound=F32),
    "qlora-bf16": Training("QLoRA NF4, bf16, 4 x 512", MIXED | {"train.method": "qlora"}, [Peer("bitsandbytes", "torch", "bf16", 2.5, 4.0)]),
    "full-bf16": Training(
        "full, bf16 with f32 masters, 4 x 512", MIXED | {"train.method": "full", "train.lr": 1e-5}, [Peer("PyTorch, autocast", "torch", "autocast", 1.5, 2.0)], lr=1e-5
    ),
    "sft-bf16": Training("LoRA, bf16, 4 x 512 of questions and answers", MIXED, [Peer("PyTorch, block mask", "torch", "bf16", 2.0)], text="chat"),
    "packed-bf16": Training(
        "LoRA, bf16, 1 x 4096 of short documents", MIXED, [Peer("PyTorch, block mask", "torch", "bf16", 3.0)], text="short", length=4096, batch=1
    ),
    "decode-1": Decoding("greedy decoding, bf16, 1 sequence", DECODERS, 1),
    "decode-8": Decoding("greedy decoding, bf16, 8 sequences", DECODERS, 8),
}
