//! Generation with a key/value cache: prompts are read in one packed forward, then every sequence
//! grows by one token a step.

use hone_kernels::{Backend, Mat, MatMut, rng};
use rayon::prelude::*;

use crate::buffers::{ActSets, Dims, NActs, Scratch, rounded};
use crate::head::HeadActs;
use crate::layer::Pass;
use crate::workspace::Layout;
use crate::{Batch, Decoder, ModelError};

/// Sequences generated side by side when nothing else is said: enough for the products to be worth
/// their weights' reading.
const BATCH_SIZE: usize = 32;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Sampling {
    /// The largest logit; of equal ones the lowest id.
    Greedy,
    /// Drawn from the smallest set of tokens whose probabilities sum to `top_p` or more (Holtzman
    /// et al. 2020), after dividing the logits by `temperature`. A draw depends on `seed`, the
    /// prompt's index and the token's position alone.
    Sampled {
        /// Above 0; 1 leaves the model's distribution.
        temperature: f64,
        /// In (0, 1]; 1 keeps every token.
        top_p: f64,
        /// Seed of the draws.
        seed: u64,
    },
}

/// What came of a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// The new tokens, without the stop token.
    pub ids: Vec<u32>,
    /// The stop token that ended it; `None` when the length did.
    pub stop_id: Option<u32>,
}

impl Generation {
    /// Whether it ended by itself.
    pub fn stopped(&self) -> bool {
        self.stop_id.is_some()
    }
}

/// Settings of a generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Generator {
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Tokens that end a sequence.
    pub stop_ids: Vec<u32>,
    /// Most new tokens of a sequence.
    pub max_new: usize,
    /// Sequences generated side by side. The result does not depend on it, the memory of the cache
    /// does.
    pub batch_size: usize,
}

impl Generator {
    /// Always the likeliest token.
    pub fn greedy(max_new: usize, stop_ids: &[u32]) -> Self {
        let stop_ids = stop_ids.to_vec();
        Generator { sampling: Sampling::Greedy, stop_ids, max_new, batch_size: BATCH_SIZE }
    }

    /// Drawn tokens; see [`Sampling::Sampled`].
    pub fn sampled(
        max_new: usize,
        stop_ids: &[u32],
        temperature: f64,
        top_p: f64,
        seed: u64,
    ) -> Self {
        let sampling = Sampling::Sampled { temperature, top_p, seed };
        Generator { sampling, ..Self::greedy(max_new, stop_ids) }
    }

    /// Continues every prompt. Errors: a setting out of range, an empty prompt, a prompt that fills
    /// the model's context, logits that are not finite.
    pub fn run<B: Backend>(
        &self,
        decoder: &mut Decoder<B>,
        prompts: &[Vec<u32>],
    ) -> Result<Vec<Generation>, ModelError> {
        self.check()?;
        let limit = decoder.config().context();
        for (i, prompt) in prompts.iter().enumerate() {
            if prompt.is_empty() || prompt.len() >= limit {
                let what = format!("prompt {i} has {} tokens", prompt.len());
                let what = format!("{what}, it must have at least 1 and fewer than {limit}");
                return Err(ModelError::Generation(what));
            }
        }
        // From inside the pool: a token is made of hundreds of small operators, and from outside
        // each would wake a thread and wait for it.
        rayon::scope(|_| {
            let mut done = Vec::with_capacity(prompts.len());
            for group in prompts.chunks(self.batch_size) {
                let first = done.len();
                done.extend(self.run_group(decoder, group, first)?);
            }
            Ok(done)
        })
    }

    fn check(&self) -> Result<(), ModelError> {
        let bad = |what: String| Err(ModelError::Generation(what));
        if self.batch_size == 0 {
            return bad("`batch_size` is 0".to_owned());
        }
        if let Sampling::Sampled { temperature, top_p, .. } = self.sampling {
            if !(temperature > 0.0 && temperature.is_finite()) {
                return bad(format!("temperature {temperature} is not above 0"));
            }
            if !(top_p > 0.0 && top_p <= 1.0) {
                return bad(format!("top-p {top_p} is not above 0 and at most 1"));
            }
        }
        Ok(())
    }

    /// Continues prompts side by side; `first` is the index of the first among all.
    fn run_group<B: Backend>(
        &self,
        decoder: &mut Decoder<B>,
        prompts: &[Vec<u32>],
        first: usize,
    ) -> Result<Vec<Generation>, ModelError> {
        let new = |_: &Vec<u32>| Generation { ids: Vec::new(), stop_id: None };
        let mut done: Vec<Generation> = prompts.iter().map(new).collect();
        if self.max_new == 0 {
            return Ok(done);
        }
        let v = decoder.dims.v;
        let mut logits = vec![0.0; prompts.len() * v];
        let mut cache = Cache::prefill(decoder, prompts, self.max_new, &mut logits)?;
        loop {
            let rows = logits.par_chunks_exact(v).zip(&cache.is_live).zip(&done).enumerate();
            let chosen = rows.map(|(b, ((row, is_live), done))| {
                is_live.then(|| self.choose(row, first + b, done.ids.len()))
            });
            let chosen: Vec<_> = chosen.collect();
            for (b, id) in chosen.into_iter().enumerate() {
                let Some(id) = id.transpose()? else { continue };
                if self.stop_ids.contains(&id) {
                    done[b].stop_id = Some(id);
                    cache.is_live[b] = false;
                    continue;
                }
                done[b].ids.push(id);
                cache.push(b, id, done[b].ids.len() < self.max_new);
            }
            if !cache.is_live.contains(&true) {
                return Ok(done);
            }
            cache.step(decoder, &mut logits)?;
        }
    }

    /// The next token of prompt `prompt` after `n_new` new ones.
    fn choose(&self, logits: &[f32], prompt: usize, n_new: usize) -> Result<u32, ModelError> {
        // Counted, not looked for, so that the compiler makes vectors of it.
        if logits.iter().fold(0, |n, z| n + u32::from(!z.is_finite())) > 0 {
            let i = logits.iter().position(|z| !z.is_finite()).unwrap_or(0);
            let what = format!("the logit of token {i} is {}", logits[i]);
            return Err(ModelError::Generation(what));
        }
        match self.sampling {
            Sampling::Greedy => Ok(argmax(logits)),
            Sampling::Sampled { temperature, top_p, seed } => {
                let draw = rng::uniform(rng::mix(seed, prompt as u64), n_new as u64);
                Ok(nucleus(logits, temperature, top_p, draw))
            }
        }
    }
}

/// Index of the largest value, the first of equal ones.
fn argmax(logits: &[f32]) -> u32 {
    // In lanes that the compiler makes vectors of: a vocabulary is looked through for every token.
    let mut tops = [f32::NEG_INFINITY; 16];
    for values in logits.chunks(tops.len()) {
        for (top, &z) in tops.iter_mut().zip(values) {
            *top = if z > *top { z } else { *top };
        }
    }
    let top = tops.into_iter().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|&z| z == top).unwrap_or(0) as u32
}

/// The token at `draw` in [0, 1) of the nucleus, tokens being laid out from the likeliest.
fn nucleus(logits: &[f32], temperature: f64, top_p: f64, draw: f64) -> u32 {
    let max = f64::from(logits[argmax(logits) as usize]);
    let weight = |z: f32| ((f64::from(z) - max) / temperature).exp();
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    let total: f64 = logits.iter().map(|&z| weight(z)).sum();
    let mut kept = 0.0;
    let mut n_kept = 0;
    while n_kept < order.len() && kept < top_p * total {
        kept += weight(logits[order[n_kept] as usize]);
        n_kept += 1;
    }
    let mut below = 0.0;
    for &id in &order[..n_kept] {
        below += weight(logits[id as usize]);
        if draw * kept < below {
            return id;
        }
    }
    // Rounding may leave the draw a hair above the sum.
    order[n_kept.saturating_sub(1)]
}

/// Keys and values of sequences side by side, and the buffers of a step.
///
/// A sequence whose growth changes the rotation of its earlier tokens (it leaves the original
/// context of LongRoPE, or grows beyond that of dynamic scaling) is read anew as a whole, so that
/// every token is chosen by the logits of the whole forward. transformers does so for LongRoPE;
/// with dynamic scaling it keeps keys that were rotated by other frequencies.
struct Cache<B: Backend> {
    /// Per layer: keys and values, each (sequences, capacity, G K), rounded as those that a layer projects are.
    layers: Vec<(B::Buf, B::Buf)>,
    /// Most positions of a sequence.
    capacity: usize,
    /// Each sequence's tokens, that of the next step included.
    texts: Vec<Vec<u32>>,
    /// Which sequences still grow. The others stay in the batch and are computed again at their
    /// last position.
    is_live: Vec<bool>,
    /// Rows of the residual stream.
    rows: Vec<u32>,
    /// Residual stream before and behind a layer, (sequences, D).
    streams: [B::Buf; 2],
    acts: ActSets<B>,
    scratch: Scratch<B>,
    head: HeadActs<B>,
}

impl<B: Backend> Cache<B> {
    /// Runs the prompts, keeps their keys and values, and writes the logits after each one's last
    /// token.
    fn prefill(
        decoder: &mut Decoder<B>,
        prompts: &[Vec<u32>],
        max_new: usize,
        logits: &mut [f32],
    ) -> Result<Self, ModelError> {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let capacity = (longest + max_new).min(decoder.config().context());
        let n = prompts.len();
        let backend = decoder.backend.clone();
        let dims = decoder.dims;
        let row = rounded(dims.heads.n_kv * dims.heads.dim);
        let make = || row.make(&backend, n * capacity);
        let layout = Layout { n_acts: NActs::SHARED, ..decoder.layout() };
        let mut cache = Cache {
            layers: decoder.layers.iter().map(|_| (make(), make())).collect(),
            capacity,
            texts: prompts.to_vec(),
            is_live: vec![true; n],
            rows: (0..n as u32).collect(),
            streams: [backend.zeros(n * dims.d), backend.zeros(n * dims.d)],
            acts: ActSets::new(&backend, &dims, layout.n_acts, n),
            scratch: Scratch::new(&backend, &dims, layout.lora, n),
            head: HeadActs::new(&backend, &dims, n, layout.head_lora),
        };
        let all: Vec<usize> = (0..n).collect();
        cache.read(decoder, &all, logits)?;
        Ok(cache)
    }

    /// Adds a token to a sequence, which grows no further if it is full or not to.
    fn push(&mut self, b: usize, id: u32, goes_on: bool) {
        self.is_live[b] = goes_on && self.texts[b].len() < self.capacity;
        if self.is_live[b] {
            self.texts[b].push(id);
        }
    }

    /// Takes the whole of some sequences through the model: their keys and values, and the logits
    /// after their last tokens.
    fn read(
        &mut self,
        decoder: &mut Decoder<B>,
        chosen: &[usize],
        logits: &mut [f32],
    ) -> Result<(), ModelError> {
        let mut batch = Batch::new();
        let mut last_rows = Vec::with_capacity(chosen.len());
        for &b in chosen {
            batch.push(&self.texts[b], &vec![0.0; self.texts[b].len()])?;
            last_rows.push(batch.n_tokens() as u32 - 1);
        }
        let (backend, dims, v) = (decoder.backend.clone(), decoder.dims, decoder.dims.v);
        let mut found = vec![0.0; chosen.len() * v];
        let Cache { layers, capacity, texts, .. } = self;
        decoder.logits_with(&batch, &last_rows, &mut found, &mut |idx, acts| {
            let (mut start, layer) = (0, &mut layers[idx]);
            for &b in chosen {
                let len = texts[b].len();
                keep(&backend, &dims, &acts.half.qkv, (start, len), layer, b * *capacity);
                start += len;
            }
        })?;
        for (&b, found) in chosen.iter().zip(found.chunks_exact(v)) {
            logits[b * v..(b + 1) * v].copy_from_slice(found);
        }
        Ok(())
    }

    /// Takes the last token of each sequence through the model; writes the logits after it.
    fn step(&mut self, decoder: &mut Decoder<B>, logits: &mut [f32]) -> Result<(), ModelError> {
        let mut lens: Vec<usize> = self.texts.iter().map(Vec::len).collect();
        let changes = |b: &usize| self.is_live[*b] && decoder.ropes.changes_at(lens[*b]);
        let changed: Vec<usize> = (0..lens.len()).filter(changes).collect();
        // Those read anew take part as if they had one token; what comes of it is overwritten.
        changed.iter().for_each(|&b| lens[b] = 1);
        if changed.len() < lens.len() {
            self.step_all(decoder, &lens, logits);
        }
        if changed.is_empty() { Ok(()) } else { self.read(decoder, &changed, logits) }
    }

    /// A step of all sequences at the last of their `lens` positions.
    fn step_all(&mut self, decoder: &mut Decoder<B>, lens: &[usize], logits: &mut [f32]) {
        decoder.ropes.reserve(&decoder.backend, lens);
        let ids: Vec<u32> = self.texts.iter().zip(lens).map(|(text, len)| text[len - 1]).collect();
        let Cache { acts, scratch, streams: [x, out], .. } = self;
        decoder.embed_rows(&ids, x, &mut scratch.lora);
        let Decoder { backend: b, dims, embed, layers, head, ropes, .. } = decoder;
        let (n, heads) = (lens.len(), dims.heads);
        let rope_rows = ropes.last_rows(lens);
        let pass = Pass {
            backend: &*b,
            dims: *dims,
            rows: n,
            seq_lens: &[],
            ropes: &*ropes,
            rope_rows: Some(&rope_rows),
            dropout_seed: None,
        };
        let mut acts = acts.of_layer(0);
        for (layer, cache) in layers.iter().zip(&mut self.layers) {
            layer.project(&pass, x, &mut acts, scratch);
            for (i, &len) in lens.iter().enumerate() {
                keep(b, dims, &acts.half.qkv, (i, 1), cache, i * self.capacity + len - 1);
            }
            let q = Mat::columns(&acts.half.qkv, n, 0, heads.out_width(), heads.qkv_width());
            let (k, v) = (&cache.0, &cache.1);
            let to = &mut acts.core.attn;
            b.attention_decode(q, k, v, self.capacity, lens, heads, layer.mask(), to);
            layer.finish(&pass, x, &mut acts, scratch, out);
            std::mem::swap(x, out);
        }
        let v = dims.v;
        head.logits((&*b, &*dims), embed, x, &self.rows, &mut self.head, &mut |start, n, buf| {
            b.read(buf, 0, &mut logits[start * v..(start + n) * v]);
        });
    }
}

/// Copies keys and values of `len` rows of `qkv` from row `start` into a layer's cache from
/// position `to` of all its positions.
fn keep<B: Backend>(
    backend: &B,
    dims: &Dims,
    qkv: &B::Buf,
    (start, len): (usize, usize),
    (keys, values): &mut (B::Buf, B::Buf),
    to: usize,
) {
    let heads = dims.heads;
    let (stride, width) = (heads.qkv_width(), heads.n_kv * heads.dim);
    for (buf, column) in [(keys, heads.out_width()), (values, heads.out_width() + width)] {
        let from =
            Mat { buf: qkv, offset: start * stride + column, rows: len, cols: width, stride };
        let to = MatMut { buf, offset: to * width, rows: len, cols: width, stride: width };
        // Dropout that drops nothing is a copy from view to view.
        backend.dropout(from, to, 0.0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shares of the ids over an even grid of draws, in thousandths, each within one of the
    /// expected.
    fn check_shares(logits: &[f32], temperature: f64, top_p: f64, expected: [i64; 3]) {
        let mut counts = [0; 3];
        for i in 0..1000 {
            let draw = (f64::from(i) + 0.5) / 1000.0;
            counts[nucleus(logits, temperature, top_p, draw) as usize] += 1;
        }
        let near = counts.iter().zip(expected).all(|(&count, e)| i64::abs(count - e) <= 1);
        assert!(near, "temperature {temperature}, top-p {top_p}: {counts:?}, not {expected:?}");
    }

    #[test]
    fn the_nucleus_is_cut_and_scaled() {
        // Probabilities 1/4, 1/2, 1/4.
        let logits = [0.0, 2.0_f32.ln(), 0.0];
        check_shares(&logits, 1.0, 1.0, [250, 500, 250]);
        check_shares(&logits, 1.0, 0.49, [0, 1000, 0]);
        check_shares(&logits, 1.0, 0.6, [333, 667, 0]);
        // Half the temperature squares the odds: 1 to 4 to 1.
        check_shares(&logits, 0.5, 1.0, [167, 667, 167]);
    }

    /// New tokens of the texts below.
    const N_NEW: usize = 8;

    /// A model of two layers with an adapter that changes what it says.
    fn adapted<B: Backend>(backend: B, more: &str) -> Decoder<B> {
        let text = format!(
            r#"{{"vocab_size": 41, "hidden_size": 20, "intermediate_size": 28,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "head_dim": 8, "tie_word_embeddings": true, "initializer_range": 0.3, {more}}}"#
        );
        let config = crate::ModelConfig::from_json(&text).unwrap();
        let weights = crate::init_weights(&config, 1);
        let training = crate::Training::Frozen;
        let mut decoder = Decoder::load(backend, &config, &weights, training).unwrap();
        let mut adapter = crate::LoraConfig::all_linear(2, 4.0);
        adapter.target_modules = crate::Targets::AllLinear;
        let mut adapter = crate::Adapter::init(&config, adapter, 1).unwrap();
        let names: Vec<String> = adapter.tensors.iter().map(|t| t.name.clone()).collect();
        for name in names.iter().filter(|name| name.contains("lora_B")) {
            adapter.tensors.get_mut(name).unwrap().data.fill(0.1);
        }
        decoder.attach(&adapter, false).unwrap();
        decoder
    }

    /// Texts of several lengths.
    fn texts() -> [Vec<u32>; 3] {
        [15, 9, 30].map(|n| (0..n).map(|i| (i * i + n) % 41).collect())
    }

    /// A cache of the texts but for their last tokens, and the logits after them.
    fn cache_of<B: Backend>(decoder: &mut Decoder<B>) -> (Cache<B>, Vec<f32>) {
        let prompts = texts().map(|text| text[..text.len() - N_NEW].to_vec());
        let mut logits = vec![0.0; prompts.len() * 41];
        let cache = Cache::prefill(decoder, &prompts, N_NEW, &mut logits).unwrap();
        (cache, logits)
    }

    /// Logits of every step with the cache are those of one forward over the whole text, on both
    /// backends.
    fn check_cache<B: Backend>(backend: B, more: &str) {
        let mut decoder = adapted(backend, more);
        let (mut cache, mut found) = cache_of(&mut decoder);
        for step in 0..N_NEW {
            for (b, text) in texts().iter().enumerate() {
                let end = text.len() - N_NEW + step;
                let seen = &text[..end];
                let batch = Batch::from_pack(seen, &vec![0.0; end], &[end]).unwrap();
                let expected = decoder.logits(&batch, &[end as u32 - 1]).unwrap();
                for (a, b) in expected.iter().zip(&found[b * 41..]) {
                    assert!((a - b).abs() < 1e-5, "{more}, step {step}: {a} {b}");
                }
                cache.push(b, text[end], true);
            }
            cache.step(&mut decoder, &mut found).unwrap();
        }
    }

    /// What makes a cached step differ from Llama's: windows, positions by layer, frequencies that
    /// change as a text grows beyond ten tokens, norms, caps and factors.
    const MODELS: [&str; 7] = [
        r#""model_type": "llama""#,
        r#""model_type": "gemma3_text", "sliding_window": 5, "sliding_window_pattern": 2"#,
        r#""model_type": "gemma2", "sliding_window": 5, "attn_logit_softcapping": 1.5"#,
        r#""model_type": "smollm3", "no_rope_layers": [0, 1]"#,
        r#""model_type": "phi3", "original_max_position_embeddings": 10, "rope_scaling": {
            "type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [2, 3, 4, 5]}"#,
        r#""model_type": "llama", "max_position_embeddings": 10, "rope_scaling": {
            "type": "dynamic", "factor": 4}"#,
        r#""model_type": "olmo2""#,
    ];

    #[test]
    fn the_cache_is_the_whole_forward() {
        for more in MODELS {
            check_cache(hone_kernels::Cpu::new(), more);
            check_cache(hone_kernels::Reference, more);
        }
    }

    /// A cache in bf16 changes no logit: keys and values were rounded before. Returns its bytes, and
    /// those of one in f32.
    fn check_rounded_cache<B: Backend>(backend: B, more: &str) -> [u64; 2] {
        let backend = backend.with_compute(hone_kernels::Compute::Bf16);
        let mut decoder = adapted(backend.clone(), more);
        let (mut cache, mut found) = cache_of(&mut decoder);
        let (mut wide, mut expected) = cache_of(&mut decoder);
        for (keys, values) in &mut wide.layers {
            for buf in [keys, values] {
                let held = backend.download(buf);
                *buf = backend.zeros(held.len());
                backend.write(buf, 0, &held);
            }
        }
        for step in 0..N_NEW {
            for (b, text) in texts().iter().enumerate() {
                cache.push(b, text[text.len() - N_NEW + step], true);
                wide.push(b, text[text.len() - N_NEW + step], true);
            }
            cache.step(&mut decoder, &mut found).unwrap();
            wide.step(&mut decoder, &mut expected).unwrap();
            assert_eq!(found, expected, "{more}, step {step} on {}", backend.name());
        }
        [cache, wide].map(|cache| backend.buf_bytes(&cache.layers[1].0))
    }

    #[test]
    fn a_cache_in_bf16_takes_half_of_the_memory_and_changes_nothing() {
        for more in MODELS {
            let [rounded, wide] = check_rounded_cache(hone_kernels::Cpu::new(), more);
            assert_eq!(2 * rounded, wide);
            check_rounded_cache(hone_kernels::Reference, more);
        }
    }

    #[test]
    fn the_first_of_equal_logits_wins() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0, 2.0]), 1);
    }
}
