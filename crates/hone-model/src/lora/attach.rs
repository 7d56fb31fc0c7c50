//! Putting an adapter on a decoder and taking it off.

use hone_kernels::Backend;

use super::{Adapter, EMBED, EmbedLora, Stash, TokenPatch};
use crate::layer::Layer;
use crate::{Decoder, ModelError};

impl<B: Backend> Decoder<B> {
    /// Puts an adapter on, in place of any other; `trained` gives it gradients. The adapter is
    /// checked first.
    pub fn attach(&mut self, adapter: &Adapter, trained: bool) -> Result<(), ModelError> {
        adapter.check(&self.config)?;
        self.detach();
        let backend = self.backend.clone();
        if !adapter.config.token_ids(EMBED).is_empty() {
            // Rows are written into it.
            self.embed.unpack(&backend);
        }
        // The head first: it may need the base's embedding, whose place is then taken.
        self.head.attach(&backend, &self.config, &self.embed, adapter, trained)?;
        if !self.config.tie_word_embeddings {
            let matrix = &self.embed.value;
            self.embed_tokens = TokenPatch::new(&backend, adapter, EMBED, matrix, trained);
        }
        let mut stash = Stash::new();
        self.visit_mut(&mut |param| stash.swap(&backend, adapter, trained, param));
        self.stash = stash;
        self.embed_lora = EmbedLora::new(&backend, adapter, trained);
        for layer in &mut self.layers {
            for linear in layer.linears_mut() {
                linear.attach(&backend, adapter, trained)?;
            }
        }
        Ok(())
    }

    /// Takes the adapter off: the base alone computes again.
    pub fn detach(&mut self) {
        self.workspace = None;
        for linear in self.layers.iter_mut().flat_map(Layer::linears_mut) {
            linear.detach();
        }
        self.embed_lora = None;
        let mut stash = std::mem::replace(&mut self.stash, Stash::new());
        self.visit_mut(&mut |param| stash.put_back(param));
        if let Some(tokens) = self.embed_tokens.take() {
            tokens.undo(&self.backend, &mut self.embed.value);
        }
        self.head.detach(&self.backend, &mut self.embed);
        if self.packs_embed && self.embed.matrix().is_ok() {
            self.embed.pack(&self.backend);
        }
    }
}
