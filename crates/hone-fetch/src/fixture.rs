//! A writer of small GGUF files, so that tests need no file that somebody else has made.

/// A value of the metadata.
pub(crate) enum Meta {
    U32(u32),
    F32(f32),
    Bool(bool),
    Str(&'static str),
    Strs(Vec<String>),
    I32s(Vec<i32>),
}

/// A GGUF file in the making.
pub(crate) struct Writer {
    pub(crate) version: u32,
    pub(crate) metadata: Vec<(&'static str, Meta)>,
    /// Name, shape (outermost first), type number, bytes.
    pub(crate) tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn push_str(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Meta {
    fn push(&self, out: &mut Vec<u8>) {
        let kind = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
        match self {
            Meta::U32(value) => {
                kind(out, 4);
                out.extend(value.to_le_bytes());
            }
            Meta::F32(value) => {
                kind(out, 6);
                out.extend(value.to_le_bytes());
            }
            Meta::Bool(value) => {
                kind(out, 7);
                out.push(u8::from(*value));
            }
            Meta::Str(value) => {
                kind(out, 8);
                push_str(out, value);
            }
            Meta::Strs(values) => {
                kind(out, 9);
                kind(out, 8);
                out.extend((values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| push_str(out, value));
            }
            Meta::I32s(values) => {
                kind(out, 9);
                kind(out, 5);
                out.extend((values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| out.extend(value.to_le_bytes()));
            }
        }
    }
}

impl Writer {
    pub(crate) fn set(&mut self, key: &'static str, value: Meta) {
        self.remove(key);
        self.metadata.push((key, value));
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.metadata.retain(|(name, _)| *name != key);
    }

    pub(crate) fn f32_tensor(&mut self, name: &str, shape: &[u64], values: &[f32]) {
        assert_eq!(shape.iter().product::<u64>(), values.len() as u64, "{name}");
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensors.push((name.to_owned(), shape.to_vec(), 0, bytes));
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            push_str(&mut out, key);
            value.push(&mut out);
        }
        let mut offset = 0u64;
        for (name, shape, kind, bytes) in &self.tensors {
            push_str(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (bytes.len() as u64).next_multiple_of(32);
        }
        for (_, _, _, bytes) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(bytes);
        }
        out
    }
}

/// Width of the tiny model: two query heads of width 4 over one key/value head.
pub(crate) const HIDDEN: u64 = 8;
/// Rows of its embedding: the 256 bytes, a merge and three special tokens.
pub(crate) const VOCAB: u64 = 260;

/// GPT-2's letters for bytes, in the order of the bytes.
pub(crate) fn byte_letters() -> Vec<String> {
    let is_printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256;
    let letter = |b: u32| {
        let code = if is_printable(b) {
            b
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).unwrap().to_string()
    };
    (0..256).map(letter).collect()
}

/// A whole tiny model of one layer, tied, in f32. Values of a tensor count up from its place in the
/// file.
pub(crate) fn tiny() -> Writer {
    let mut tokens = byte_letters();
    tokens.extend(["he", "<|endoftext|>", "<|im_start|>", "<|im_end|>"].map(str::to_owned));
    let mut types = vec![1; 257];
    types.extend([3, 3, 3]);
    let metadata = vec![
        ("general.architecture", Meta::Str("llama")),
        ("general.name", Meta::Str("tiny")),
        ("llama.block_count", Meta::U32(1)),
        ("llama.context_length", Meta::U32(64)),
        ("llama.embedding_length", Meta::U32(HIDDEN as u32)),
        ("llama.feed_forward_length", Meta::U32(6)),
        ("llama.attention.head_count", Meta::U32(2)),
        ("llama.attention.head_count_kv", Meta::U32(1)),
        ("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)),
        ("llama.rope.freq_base", Meta::F32(100_000.0)),
        ("llama.rope.dimension_count", Meta::U32(4)),
        ("llama.vocab_size", Meta::U32(VOCAB as u32)),
        ("tokenizer.ggml.model", Meta::Str("gpt2")),
        ("tokenizer.ggml.pre", Meta::Str("smollm")),
        ("tokenizer.ggml.tokens", Meta::Strs(tokens)),
        ("tokenizer.ggml.token_type", Meta::I32s(types)),
        ("tokenizer.ggml.merges", Meta::Strs(vec!["h e".to_owned()])),
        ("tokenizer.ggml.bos_token_id", Meta::U32(258)),
        ("tokenizer.ggml.eos_token_id", Meta::U32(259)),
        ("tokenizer.ggml.unknown_token_id", Meta::U32(257)),
        ("tokenizer.ggml.padding_token_id", Meta::U32(259)),
        ("tokenizer.ggml.add_bos_token", Meta::Bool(false)),
        (
            "tokenizer.chat_template",
            Meta::Str("{% for m in messages %}{{ m.content }}{% endfor %}"),
        ),
    ];
    let mut writer = Writer { version: 3, metadata, tensors: Vec::new() };
    let tensors: [(&str, &[u64]); 11] = [
        ("token_embd.weight", &[VOCAB, HIDDEN]),
        ("output_norm.weight", &[HIDDEN]),
        ("blk.0.attn_norm.weight", &[HIDDEN]),
        ("blk.0.ffn_norm.weight", &[HIDDEN]),
        ("blk.0.attn_q.weight", &[8, HIDDEN]),
        ("blk.0.attn_k.weight", &[4, HIDDEN]),
        ("blk.0.attn_v.weight", &[4, HIDDEN]),
        ("blk.0.attn_output.weight", &[HIDDEN, 8]),
        ("blk.0.ffn_gate.weight", &[6, HIDDEN]),
        ("blk.0.ffn_up.weight", &[6, HIDDEN]),
        ("blk.0.ffn_down.weight", &[HIDDEN, 6]),
    ];
    for (at, (name, shape)) in tensors.into_iter().enumerate() {
        let n = shape.iter().product::<u64>();
        let values: Vec<f32> = (0..n).map(|i| at as f32 + i as f32 / 64.0).collect();
        writer.f32_tensor(name, shape, &values);
    }
    writer
}
