//! Held-out loss and perplexity, by source and by kind.

use std::collections::BTreeMap;

use hone_cli::{Context, Failure};
use hone_kernels::Backend;
use hone_model::{Batch, Decoder, ModelError};
use hone_schema::{Kind, Pack};
use serde_json::{Map, Value, json};

/// Tokens computed together.
const TOKENS_A_BATCH: usize = 2048;

/// Loss of some documents.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Loss {
    /// sum(w CE) over trained tokens, in nats.
    weighted: f64,
    /// sum(w).
    weight: f64,
    /// Documents.
    pub(crate) n_docs: u64,
    /// Trained tokens.
    pub(crate) n_tokens: u64,
}

impl Loss {
    fn add(&mut self, other: &Loss) {
        self.weighted += other.weighted;
        self.weight += other.weight;
        self.n_docs += other.n_docs;
        self.n_tokens += other.n_tokens;
    }

    /// sum(w CE) / sum(w); `None` without a trained token.
    pub(crate) fn mean(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.weighted / self.weight)
    }

    /// exp of the mean.
    pub(crate) fn perplexity(&self) -> Option<f64> {
        self.mean().map(f64::exp)
    }

    fn to_json(self) -> Value {
        json!({
            "loss": self.mean(),
            "perplexity": self.perplexity(),
            "n_docs": self.n_docs,
            "n_tokens": self.n_tokens,
        })
    }
}

/// Losses of the test packs.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Losses {
    pub(crate) total: Loss,
    pub(crate) by_source: BTreeMap<String, Loss>,
    pub(crate) by_kind: BTreeMap<&'static str, Loss>,
}

impl Losses {
    fn add(&mut self, source: &str, kind: Kind, loss: &Loss) {
        self.total.add(loss);
        self.by_source.entry(source.to_owned()).or_default().add(loss);
        self.by_kind.entry(kind.as_str()).or_default().add(loss);
    }

    /// Loss of plain text.
    pub(crate) fn plain(&self) -> Loss {
        self.by_kind.get(Kind::Text.as_str()).copied().unwrap_or_default()
    }

    /// Both breakdowns, for `results.json`.
    pub(crate) fn breakdowns(&self) -> (Value, Value) {
        let source = self.by_source.iter().map(|(name, loss)| (name.clone(), loss.to_json()));
        let kind = self.by_kind.iter().map(|(name, loss)| ((*name).to_owned(), loss.to_json()));
        let (source, kind): (Map<_, _>, Map<_, _>) = (source.collect(), kind.collect());
        (source.into(), kind.into())
    }
}

/// Runs all packs through a model.
pub(crate) fn measure<B: Backend>(
    ctx: &Context,
    decoder: &mut Decoder<B>,
    packs: &[Pack],
) -> Result<Losses, Failure> {
    let mut losses = Losses::default();
    let mut rest = packs;
    let mut progress = ctx.progress(packs.len() as u64, "packs");
    while !rest.is_empty() {
        if let Some(exit) = ctx.stop() {
            return Err(Failure::stopped(exit));
        }
        let (part, behind) = rest.split_at(n_together(rest));
        rest = behind;
        add_packs(decoder, part, &mut losses).map_err(|e| Failure::input(e.to_string()))?;
        progress.inc(part.len() as u64);
    }
    progress.finish();
    Ok(losses)
}

/// How many of the first packs fit together; at least one.
fn n_together(packs: &[Pack]) -> usize {
    let mut tokens = 0;
    let fits = |pack: &&Pack| {
        tokens += pack.input_ids.len();
        tokens <= TOKENS_A_BATCH
    };
    packs.iter().take_while(fits).count().max(1)
}

fn add_packs<B: Backend>(
    decoder: &mut Decoder<B>,
    packs: &[Pack],
    losses: &mut Losses,
) -> Result<(), ModelError> {
    let mut batch = Batch::new();
    for pack in packs {
        let lens: Vec<usize> = pack.docs.iter().map(|doc| doc.len as usize).collect();
        batch.push_pack(&pack.input_ids, &pack.loss_weight, &lens)?;
    }
    let mut row_losses = Vec::new();
    decoder.loss(&batch, Some(&mut row_losses))?;
    let mut rows = batch.rows.iter().zip(&row_losses).peekable();
    let mut end = 0;
    for doc in packs.iter().flat_map(|pack| &pack.docs) {
        end += doc.len;
        let mut loss = Loss { n_docs: 1, ..Loss::default() };
        while let Some((&row, &ce)) = rows.next_if(|(row, _)| **row < end) {
            let weight = f64::from(batch.weights[row as usize]);
            loss.weighted += weight * f64::from(ce);
            loss.weight += weight;
            loss.n_tokens += 1;
        }
        losses.add(&doc.source, doc.kind, &loss);
    }
    Ok(())
}
