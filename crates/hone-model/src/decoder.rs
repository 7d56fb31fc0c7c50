//! The decoder: embedding, layers, head; forward, backward, adapters, export.

use hone_kernels::{Backend, Compute, LossOptions, LossSums, rng};

use crate::buffers::{Acts, Dims};
use crate::head::{Head, HeadGrad};
use crate::layer::{Layer, Pass};
use crate::linear::{LoraScratch, finite};
use crate::lora::{EmbedLora, Stash, TokenPatch};
use crate::param::{Param, ParamKind};
use crate::plan::check_frozen;
use crate::rope::Ropes;
use crate::tensors::{TensorSource, Tensors};
use crate::workspace::Workspace;
use crate::{Batch, EmbeddingNoise, ModelConfig, ModelError, PassOptions, Recompute};

/// The embedding's matrix.
const EMBED_WEIGHT: &str = "model.embed_tokens.weight";

/// Number of the head's draw of dropout; those of the layers come after one another from 0.
const HEAD_SITE: u64 = u64::MAX;

/// Whether the base weights are trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Training {
    /// No: they are packed once for multiplication and get no gradient. An adapter may still be
    /// trained.
    Frozen,
    /// All of them.
    Full,
}

/// A decoder on a backend, with the buffers of its passes.
pub struct Decoder<B: Backend> {
    pub(crate) backend: B,
    pub(crate) config: ModelConfig,
    pub(crate) dims: Dims,
    /// Packed in bf16, where products are of it, all values are, and nobody writes to it.
    pub(crate) embed: Param<B>,
    /// Whether the base's embedding is packed, adapters apart.
    pub(crate) packs_embed: bool,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) head: Head<B>,
    /// What an adapter changes outside the linear maps.
    pub(crate) embed_lora: Option<EmbedLora<B>>,
    pub(crate) embed_tokens: Option<TokenPatch<B>>,
    pub(crate) stash: Stash<B>,
    pub(crate) recompute: Recompute,
    pub(crate) ropes: Ropes<B>,
    pub(crate) workspace: Option<Workspace<B>>,
    /// Noise of the training pass under way.
    noise: Option<EmbeddingNoise>,
    /// Loss of each row of the last training pass, where they are kept.
    pub(crate) row_losses: Option<Vec<f32>>,
}

impl<B: Backend> Decoder<B> {
    /// Reads the weights of a model. Errors: names or shapes that do not fit `config`, values that
    /// are not finite.
    pub fn load(
        backend: B,
        config: &ModelConfig,
        source: &dyn TensorSource,
        training: Training,
    ) -> Result<Self, ModelError> {
        config.check_source(source)?;
        let trained = training == Training::Full;
        let embed = finite(source, EMBED_WEIGHT)?;
        let is_packed = !trained && backend.compute() == Compute::Bf16;
        let is_packed = is_packed && source.is_bf16(EMBED_WEIGHT);
        let embed = match is_packed {
            true => Param::packed(&backend, ParamKind::Embedding, embed),
            false => Param::new(&backend, ParamKind::Embedding, vec![embed], trained),
        };
        let layer = |idx| Layer::load(&backend, config, source, idx, trained);
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_, _>>()?;
        let head = Head::load(&backend, config, source, trained)?;
        Ok(Decoder {
            dims: Dims::new(config),
            config: config.clone(),
            embed,
            packs_embed: is_packed,
            layers,
            head,
            embed_lora: None,
            embed_tokens: None,
            stash: Stash::new(),
            recompute: Recompute::None,
            ropes: Ropes::new(&backend, config),
            workspace: None,
            noise: None,
            row_losses: None,
            backend,
        })
    }

    /// The backend it runs on.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Its shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Sets what the backward computes again; the result is the same bytes.
    pub fn set_recompute(&mut self, recompute: Recompute) {
        if recompute != self.recompute {
            self.recompute = recompute;
            self.workspace = None;
        }
    }

    /// Makes the buffers for batches of up to `n_tokens` tokens now. Without it they grow with the
    /// largest batch seen; either way, a pass over a batch that fits allocates nothing.
    pub fn reserve(&mut self, n_tokens: usize) {
        if self.workspace.as_ref().is_none_or(|workspace| workspace.rows < n_tokens) {
            // The old ones go before the new ones are made.
            self.workspace = None;
            let layout = self.layout();
            self.workspace = Some(Workspace::new(&self.backend, &self.dims, layout, n_tokens));
        }
    }

    /// Gives the buffers of the passes back; the next pass makes them anew.
    pub fn release(&mut self) {
        self.workspace = None;
    }

    /// Sets what training adds to cross-entropy. Evaluation stays plain but for the soft cap, which
    /// changes what the model computes: [`Decoder::loss`] has it too.
    pub fn set_loss_options(&mut self, options: LossOptions) {
        self.head.set_options(options);
    }

    // ------------------------------------------------------------------ parameters

    /// Calls `update(backend, buffer index, kind, values, gradient)` for every trained buffer,
    /// always in the same order.
    pub fn for_each_trained(
        &mut self,
        mut update: impl FnMut(&B, usize, ParamKind, &mut B::Buf, &mut B::Buf),
    ) {
        let mut buffer = 0;
        let backend = self.backend.clone();
        self.visit_mut(&mut |param| {
            let Param { value, grad, kind, .. } = param;
            if let Some(grad) = grad {
                update(&backend, buffer, *kind, value, grad);
                buffer += 1;
            }
        });
    }

    /// Takes the gradients of the tensors that `is_frozen` names, so that they stay as they are.
    /// Layers below all that is left to train keep no activations and get no backward. Errors:
    /// [`check_frozen`].
    pub fn freeze(&mut self, is_frozen: &dyn Fn(&str) -> bool) -> Result<(), ModelError> {
        check_frozen(&self.config, is_frozen)?;
        self.workspace = None;
        self.visit_mut(&mut |param| {
            if param.infos(0).all(|info| is_frozen(&info.name)) {
                param.grad = None;
            }
        });
        Ok(())
    }

    /// Sets every gradient to zero.
    pub fn zero_gradients(&mut self) {
        self.for_each_trained(|backend, _, _, _, grad| backend.fill(grad, 0.0));
    }

    /// The values of what is trained, under their names (PEFT's for an adapter).
    pub fn trained(&self) -> Tensors {
        let mut tensors = Tensors::new();
        self.visit(&mut |param| {
            if param.grad.is_some() {
                param.export(&self.backend, &param.value, &mut tensors);
            }
        });
        tensors
    }

    /// Overwrites what is trained. Errors: a name or a shape that does not fit; what came before it
    /// is then overwritten already.
    pub fn set_trained(&mut self, tensors: &Tensors) -> Result<(), ModelError> {
        let backend = self.backend.clone();
        let mut result = Ok(());
        self.visit_mut(&mut |param| {
            if param.grad.is_some() && result.is_ok() {
                result = param.import(&backend, tensors);
            }
        });
        result
    }

    /// The gradients accumulated so far, under the names of what they belong to.
    pub fn gradients(&self) -> Tensors {
        let mut tensors = Tensors::new();
        self.visit(&mut |param| {
            if let Some(grad) = &param.grad {
                param.export(&self.backend, grad, &mut tensors);
            }
        });
        tensors
    }

    /// All base weights under Hugging Face's names; without a head of its own where it is tied.
    /// Adapters are not in them.
    pub fn export(&self) -> Tensors {
        let mut tensors = Tensors::new();
        self.embed.export_values(&self.backend, &mut tensors);
        self.layers.iter().for_each(|layer| layer.export(&self.backend, &mut tensors));
        self.head.export(&self.backend, &self.config, &mut tensors);
        self.stash.undo_export(&self.backend, &mut tensors);
        let tied = self.head.tokens.as_ref().filter(|_| self.config.tie_word_embeddings);
        let tokens = self.embed_tokens.as_ref().or(tied);
        if let (Some(tokens), Some(embed)) = (tokens, tensors.get_mut("model.embed_tokens.weight"))
        {
            tokens.undo_export(embed);
        }
        tensors
    }

    pub(crate) fn visit(&self, visit: &mut dyn FnMut(&Param<B>)) {
        visit(&self.embed);
        self.embed_lora.iter().for_each(|lora| lora.visit(visit));
        self.embed_tokens.iter().for_each(|tokens| visit(&tokens.rows));
        self.layers.iter().for_each(|layer| layer.visit(visit));
        self.head.visit(visit);
    }

    pub(crate) fn visit_mut(&mut self, visit: &mut dyn FnMut(&mut Param<B>)) {
        visit(&mut self.embed);
        self.embed_lora.iter_mut().for_each(|lora| lora.visit_mut(visit));
        self.embed_tokens.iter_mut().for_each(|tokens| visit(&mut tokens.rows));
        self.layers.iter_mut().for_each(|layer| layer.visit_mut(visit));
        self.head.visit_mut(visit);
    }

    // ------------------------------------------------------------------ passes

    /// Adds the gradients of `grad_scale * sum(w * CE)` over a batch to those accumulated, and
    /// returns the batch's sums. With `grad_scale` one over the whole step's sum of weights, the
    /// step's loss does not depend on how it is cut into batches. `dropout_seed` turns the
    /// adapters' dropout on.
    pub fn accumulate(
        &mut self,
        batch: &Batch,
        grad_scale: f32,
        dropout_seed: Option<u64>,
    ) -> Result<LossSums, ModelError> {
        self.accumulate_with(batch, grad_scale, PassOptions { dropout_seed, noise: None })
    }

    /// [`Decoder::accumulate`] with everything that a training pass may have.
    pub fn accumulate_with(
        &mut self,
        batch: &Batch,
        grad_scale: f32,
        PassOptions { dropout_seed, noise }: PassOptions,
    ) -> Result<LossSums, ModelError> {
        batch.check(&self.config)?;
        if let Some(losses) = &mut self.row_losses {
            losses.clear();
            losses.resize(batch.rows.len(), 0.0);
        }
        if batch.rows.is_empty() {
            return Ok(LossSums::default());
        }
        self.prepare(batch);
        let mut workspace = self.workspace.take().expect("`prepare` has made one");
        self.noise = noise;
        self.forward(batch, dropout_seed, &mut workspace, &mut |_, _| {});
        self.noise = None;
        let sums = self.backward(batch, grad_scale, dropout_seed, &mut workspace);
        self.workspace = Some(workspace);
        Ok(sums)
    }

    /// The loss sums of a batch, without gradients or dropout. `row_losses`, when given, becomes
    /// the cross-entropy of each of `batch.rows`.
    pub fn loss(
        &mut self,
        batch: &Batch,
        row_losses: Option<&mut Vec<f32>>,
    ) -> Result<LossSums, ModelError> {
        batch.check(&self.config)?;
        let row_losses = row_losses.map(|losses| {
            losses.clear();
            losses.resize(batch.rows.len(), 0.0);
            losses.as_mut_slice()
        });
        if batch.rows.is_empty() {
            return Ok(LossSums::default());
        }
        self.prepare(batch);
        let mut workspace = self.workspace.take().expect("`prepare` has made one");
        self.forward(batch, None, &mut workspace, &mut |_, _| {});
        let last = workspace.stream(self.layers.len());
        let Workspace { streams, head: acts, .. } = &mut workspace;
        let on = (&self.backend, &self.dims);
        let sums =
            self.head.loss(on, &mut self.embed, &streams[last], batch, acts, None, row_losses);
        self.workspace = Some(workspace);
        Ok(sums)
    }

    /// The logits (rows.len(), V) at the given positions of a batch.
    pub fn logits(&mut self, batch: &Batch, rows: &[u32]) -> Result<Vec<f32>, ModelError> {
        let mut out = vec![0.0; rows.len() * self.dims.v];
        self.logits_with(batch, rows, &mut out, &mut |_, _| {})?;
        Ok(out)
    }

    /// [`Decoder::logits`] into a buffer, calling `after_layer(idx, activations)` on the way.
    pub(crate) fn logits_with(
        &mut self,
        batch: &Batch,
        rows: &[u32],
        out: &mut [f32],
        after_layer: &mut dyn FnMut(usize, &Acts<'_, B>),
    ) -> Result<(), ModelError> {
        batch.check(&self.config)?;
        if let Some(row) = rows.iter().find(|&&row| row as usize >= batch.n_tokens()) {
            return Err(ModelError::Batch(format!("row {row} lies outside")));
        }
        if rows.is_empty() {
            return Ok(());
        }
        self.prepare(batch);
        let mut workspace = self.workspace.take().expect("`prepare` has made one");
        self.forward(batch, None, &mut workspace, after_layer);
        let last = workspace.stream(self.layers.len());
        let (backend, v) = (&self.backend, self.dims.v);
        let mut take = |start: usize, n: usize, logits: &B::Buf| {
            backend.read(logits, 0, &mut out[start * v..(start + n) * v]);
        };
        let Workspace { streams, head: acts, rows: capacity, .. } = &mut workspace;
        // The head's buffers hold as many rows as the batch has tokens; rows may repeat, so more
        // are taken in turns.
        for (i, part) in rows.chunks(*capacity).enumerate() {
            let base = i * *capacity;
            let on = (backend, &self.dims);
            self.head.logits(on, &self.embed, &streams[last], part, acts, &mut |start, n, buf| {
                take(base + start, n, buf);
            });
        }
        self.workspace = Some(workspace);
        Ok(())
    }

    /// Makes the rotary tables and the buffers large enough for a batch.
    fn prepare(&mut self, batch: &Batch) {
        self.ropes.prepare(&self.backend, batch);
        self.reserve(batch.n_tokens());
        if let Some(tokens) = &self.embed_tokens {
            tokens.apply(&self.backend, &mut self.embed.value);
        }
        self.head.write_tokens(&self.backend, &mut self.embed);
    }

    fn forward(
        &self,
        batch: &Batch,
        dropout_seed: Option<u64>,
        workspace: &mut Workspace<B>,
        after_layer: &mut dyn FnMut(usize, &Acts<'_, B>),
    ) {
        let pass = self.pass(batch, dropout_seed);
        let d = self.dims.d;
        workspace.head.dropout_seed = dropout_seed.map(|seed| rng::mix(seed, HEAD_SITE));
        let start = workspace.stream(0);
        let Workspace { streams, scratch, .. } = workspace;
        let (ids, x) = (batch.input_ids.as_slice(), &mut streams[start]);
        self.embed_rows(ids, x, &mut scratch.lora);
        if let Some(EmbeddingNoise { alpha, seed, first_document }) = self.noise {
            let place = (seed, first_document);
            self.backend.add_noise(x, d, &batch.seq_lens, alpha, place);
        }
        for (idx, layer) in self.layers.iter().enumerate() {
            let ends = [workspace.stream(idx), workspace.stream(idx + 1)];
            let acts_idx = workspace.acts_idx(idx);
            let Workspace { streams, acts, scratch, .. } = workspace;
            let [x, out] = streams.get_disjoint_mut(ends).expect("neighbours are two streams");
            let mut acts = acts.of_layer(acts_idx);
            layer.forward(&pass, x, &mut acts, scratch, out);
            after_layer(idx, &acts);
        }
    }

    /// `y (ids.len(), D) <-` embeddings, an adapter's part and then the model's factor on them.
    pub(crate) fn embed_rows(&self, ids: &[u32], y: &mut B::Buf, scratch: &mut LoraScratch<B>) {
        let d = self.dims.d;
        self.embed.gather(&self.backend, ids, d, y);
        if let Some(lora) = &self.embed_lora {
            lora.forward(&self.backend, (ids, d), y, scratch);
        }
        if let Some(factor) = self.dims.embedding {
            self.backend.scale(y, factor, ids.len() * d);
        }
    }

    fn pass<'a>(&'a self, batch: &'a Batch, dropout_seed: Option<u64>) -> Pass<'a, B> {
        Pass {
            backend: &self.backend,
            dims: self.dims,
            rows: batch.n_tokens(),
            seq_lens: &batch.seq_lens,
            ropes: &self.ropes,
            rope_rows: None,
            dropout_seed,
        }
    }

    fn backward(
        &mut self,
        batch: &Batch,
        grad_scale: f32,
        dropout_seed: Option<u64>,
        workspace: &mut Workspace<B>,
    ) -> LossSums {
        let n_layers = self.layers.len();
        let (first, last) = (workspace.first, workspace.stream(n_layers));
        let embed_is_trained = self.trains_embedding();
        let Workspace { streams, acts, scratch, head: head_acts, back, .. } = workspace;
        let Some(back) = back else {
            let on = (&self.backend, &self.dims);
            let x = &streams[last];
            let rows = self.row_losses.as_deref_mut();
            return self.head.loss(on, &mut self.embed, x, batch, head_acts, None, rows);
        };
        let on = (&self.backend, &self.dims);
        let grad = HeadGrad { back: &mut back.head, dx: &mut back.dx.exact, scale: grad_scale };
        let x = &streams[last];
        let rows = self.row_losses.as_deref_mut();
        let sums = self.head.loss(on, &mut self.embed, x, batch, head_acts, Some(grad), rows);

        back.dx.round(&self.backend, batch.n_tokens() * self.dims.d);

        let Decoder { backend, dims, layers, ropes, .. } = self;
        let pass = Pass {
            backend,
            dims: *dims,
            rows: batch.n_tokens(),
            seq_lens: &batch.seq_lens,
            ropes,
            rope_rows: None,
            dropout_seed,
        };
        for (idx, layer) in layers[first..].iter_mut().enumerate().rev() {
            let mut acts = acts.of_layer(idx);
            let needs_dx = idx > 0 || embed_is_trained;
            let ends = [idx, idx + 1];
            let [x, out] = streams.get_disjoint_mut(ends).expect("neighbours are two streams");
            // The last layer's activations are still there; the output of any other, the next one's
            // input, is needed no longer.
            if first + idx + 1 < n_layers {
                layer.restore(&pass, self.recompute, x, &mut acts, scratch, out);
            }
            layer.backward(&pass, x, &mut acts, scratch, &mut back.layer, &mut back.dx, needs_dx);
        }
        if let (Some(factor), true) = (self.dims.embedding, embed_is_trained) {
            self.backend.scale(&mut back.dx.exact, factor, batch.n_tokens() * self.dims.d);
        }
        if let Some(grad) = &mut self.embed.grad {
            self.backend.scatter_add_rows(&back.dx.exact, &batch.input_ids, self.dims.d, grad);
        }
        if let Some(lora) = &mut self.embed_lora {
            let ids = (batch.input_ids.as_slice(), self.dims.d);
            lora.backward(&self.backend, ids, &back.dx.exact, &mut scratch.lora);
        }
        let tokens = self.embed_tokens.as_mut().or(self.head.tied_tokens_mut());
        if let Some(tokens) = tokens {
            tokens.embedding_grad(&self.backend, &batch.input_ids, &back.dx.exact);
        }
        sums
    }
}

impl<B: Backend> std::fmt::Debug for Decoder<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decoder")
            .field("backend", &self.backend.name())
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}
