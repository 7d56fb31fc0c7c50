//! The documents of a sealed output, and the rendered rows that they come from.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use arrow::array::RecordBatch;
use arrow::error::ArrowError;
use arrow::ipc::reader::FileReader;
use hone_cli::{Common, Failure, Pipeline};
use hone_schema::{ArtefactKind, Doc, Pack, Split};
use hone_store::Sealed;
use hone_tokens::Vocab;

use crate::inputs::Inputs;
use crate::view::View;

/// A sealed output of this program.
pub(crate) struct Packs {
    pub(crate) sealed: Sealed,
}

/// A document of a pack.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Document<'a> {
    pub(crate) doc: &'a Doc,
    /// Its tokens in the pack.
    pub(crate) tokens: Range<usize>,
    pub(crate) ids: &'a [u32],
    pub(crate) weights: &'a [f32],
}

impl Packs {
    /// Opens the output of a pipeline, or the directory that `--out` names.
    pub(crate) fn of(pipeline: &Pipeline, common: &Common) -> Result<Self, Failure> {
        Packs::open(&common.out.clone().unwrap_or_else(|| pipeline.dir("tokenize")))
    }

    /// Opens a directory.
    pub(crate) fn open(dir: &Path) -> Result<Self, Failure> {
        Ok(Packs { sealed: Sealed::open(dir, ArtefactKind::Packs)? })
    }

    /// Whether its labels came from another tool.
    pub(crate) fn is_imported(&self) -> bool {
        self.sealed.manifest().stage == "import"
    }

    /// Its vocabulary.
    pub(crate) fn vocab(&self) -> Result<Vocab, Failure> {
        let name = "tokenizer.json";
        let path = self.sealed.path(name);
        Vocab::from_json(&self.sealed.read(name)?)
            .map_err(|e| Failure::input(format!("{}: {e}", path.display())))
    }

    /// Whether it has rows of a split.
    pub(crate) fn has(&self, split: Split) -> bool {
        self.sealed.has(&format!("{split}.arrow"))
    }

    /// The packs of a split in order, a batch in memory at a time; none when it has no such rows.
    pub(crate) fn read(&self, split: Split) -> Result<PackReader, Failure> {
        let name = format!("{split}.arrow");
        let path = self.sealed.path(&name).display().to_string();
        let batches: Batches = if self.has(split) {
            let reader = FileReader::try_new(self.sealed.file(&name)?, None);
            Box::new(reader.map_err(|e| Failure::input(format!("{path}: {e}")))?)
        } else {
            Box::new(std::iter::empty())
        };
        Ok(PackReader { batches, path, batch: Vec::new().into_iter() })
    }

    /// Pack `n` of a split.
    pub(crate) fn nth(&self, split: Split, n: usize) -> Result<Pack, Failure> {
        let mut count = 0;
        for pack in self.read(split)? {
            let pack = pack?;
            if count == n {
                return Ok(pack);
            }
            count += 1;
        }
        Err(Failure::input(format!("split {split} has {count} packs, counted from 0")))
    }
}

/// The batches of a file, read as they are asked for.
type Batches = Box<dyn Iterator<Item = Result<RecordBatch, ArrowError>>>;

/// The packs of a split; see [`Packs::read`].
pub(crate) struct PackReader {
    batches: Batches,
    path: String,
    batch: std::vec::IntoIter<Pack>,
}

impl Iterator for PackReader {
    type Item = Result<Pack, Failure>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(pack) = self.batch.next() {
                return Some(Ok(pack));
            }
            let wrong = |e: &dyn std::fmt::Display| Failure::input(format!("{}: {e}", self.path));
            let batch = match self.batches.next()? {
                Ok(batch) => batch,
                Err(e) => return Some(Err(wrong(&e))),
            };
            match Pack::from_batch(&batch) {
                Ok(packs) => self.batch = packs.into_iter(),
                Err(e) => return Some(Err(wrong(&e))),
            }
        }
    }
}

/// The documents of a pack, in order.
pub(crate) fn documents(pack: &Pack) -> Vec<Document<'_>> {
    pack.documents()
        .map(|(doc, tokens)| {
            let (ids, weights) =
                (&pack.input_ids[tokens.clone()], &pack.loss_weight[tokens.clone()]);
            Document { doc, tokens, ids, weights }
        })
        .collect()
}

impl Document<'_> {
    /// Index in its row of each of its tokens.
    pub(crate) fn in_row(&self) -> Vec<usize> {
        self.doc.row_tokens().map(|token| token as usize).collect()
    }

    /// Whether `view` shows the row that this document was made of: ids and weights agree token by token.
    pub(crate) fn is_of(&self, view: &View) -> bool {
        let is_same = |(n, at): (usize, usize)| {
            view.tokens.get(at).is_some_and(|token| {
                // The first token of a piece is predicted by nothing, whatever it was in its row.
                token.id == self.ids[n] && (n == 0 || token.weight == self.weights[n])
            })
        };
        let same_row =
            view.rendered.id == self.doc.row_id && view.rendered.source == self.doc.source;
        same_row && self.in_row().into_iter().enumerate().all(is_same)
    }
}

/// For each of `docs` the view of its row, where the rendered rows still have it and it still makes the same tokens.
pub(crate) fn views(inputs: &Inputs, docs: &[Document<'_>]) -> Result<Vec<Option<View>>, Failure> {
    let mut found: Vec<Option<View>> = docs.iter().map(|_| None).collect();
    let mut wanted: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (idx, doc) in docs.iter().enumerate() {
        wanted.entry(doc.doc.row).or_default().push(idx);
    }
    let mut from = 0;
    for rows in inputs.batches()? {
        let rows = rows?;
        let to = from + rows.len() as u64;
        for (row, of) in wanted.range(from..to) {
            for idx in of {
                let row = rows[(row - from) as usize].clone();
                let view = View::new(&inputs.vocab, &inputs.rules, row);
                found[*idx] = Some(view).filter(|view| docs[*idx].is_of(view));
            }
        }
        from = to;
        if wanted.last_key_value().is_none_or(|(last, _)| *last < from) {
            break;
        }
    }
    Ok(found)
}
