//! What an adapter changes outside the linear maps: the embedding, rows of new tokens, and tensors
//! that are trained whole.

use hone_kernels::{Backend, Mat, MatMut, Op};

use super::{Adapter, EMBED, LoraScratch, PREFIX};
use crate::param::{Param, ParamKind};
use crate::tensors::{NamedTensor, Tensors};

/// The adapter of the embedding: row `id` gets s (column `id` of A)t Bt more.
pub(crate) struct EmbedLora<B: Backend> {
    /// (r, V).
    a: Param<B>,
    /// (D, r).
    b: Param<B>,
    pub(crate) rank: usize,
    vocab: usize,
    scaling: f32,
}

impl<B: Backend> EmbedLora<B> {
    /// The adapter's factors, if it has some for the embedding.
    pub(crate) fn new(backend: &B, adapter: &Adapter, trained: bool) -> Option<Self> {
        let (a, b) = adapter.embedding()?;
        Some(EmbedLora {
            rank: a.shape[0],
            vocab: a.shape[1],
            scaling: adapter.config.scaling_of(EMBED),
            a: Param::new(backend, ParamKind::LoraA, vec![a.clone()], trained),
            b: Param::new(backend, ParamKind::LoraB, vec![b.clone()], trained),
        })
    }

    /// Whether it has gradients.
    pub(crate) fn is_trained(&self) -> bool {
        self.a.grad.is_some()
    }

    /// X (T, D) <- X + the adapter's part of the rows `ids`.
    pub(crate) fn forward(
        &self,
        backend: &B,
        (ids, d): (&[u32], usize),
        x: &mut B::Buf,
        scratch: &mut LoraScratch<B>,
    ) {
        let (t, r) = (ids.len(), self.rank);
        backend.gather_columns(Mat::new(&self.a.value, r, self.vocab), ids, &mut scratch.u);
        let (u, b) = (Mat::new(&scratch.u, t, r), Mat::new(&self.b.value, d, r));
        backend.gemm(u, Op::N, b, Op::T, MatMut::new(x, t, d), self.scaling, 1.0);
    }

    /// Adds to the gradients, given that of the embedding's output.
    pub(crate) fn backward(
        &mut self,
        backend: &B,
        (ids, d): (&[u32], usize),
        dx: &B::Buf,
        scratch: &mut LoraScratch<B>,
    ) {
        let (t, r, s) = (ids.len(), self.rank, self.scaling);
        let dx = Mat::new(dx, t, d);
        if let Some(grad) = &mut self.b.grad {
            backend.gather_columns(Mat::new(&self.a.value, r, self.vocab), ids, &mut scratch.u);
            let u = Mat::new(&scratch.u, t, r);
            backend.gemm(dx, Op::T, u, Op::N, MatMut::new(grad, d, r), s, 1.0);
        }
        if let Some(grad) = &mut self.a.grad {
            let b = Mat::new(&self.b.value, d, r);
            backend.gemm(dx, Op::N, b, Op::N, MatMut::new(&mut scratch.du, t, r), s, 0.0);
            backend.scatter_add_columns(&scratch.du, ids, MatMut::new(grad, r, self.vocab));
        }
    }

    /// Calls `visit` with its parameters.
    pub(crate) fn visit(&self, visit: &mut dyn FnMut(&Param<B>)) {
        visit(&self.a);
        visit(&self.b);
    }

    /// [`EmbedLora::visit`], to change them; the same order.
    pub(crate) fn visit_mut(&mut self, visit: &mut dyn FnMut(&mut Param<B>)) {
        visit(&mut self.a);
        visit(&mut self.b);
    }
}

/// Rows of a matrix (V, D) that are trained by themselves. They are written into the matrix before
/// every pass, so that everything else reads one matrix.
pub(crate) struct TokenPatch<B: Backend> {
    ids: Vec<u32>,
    /// (ids, D).
    pub(crate) rows: Param<B>,
    /// What the matrix had there.
    originals: Vec<f32>,
}

impl<B: Backend> TokenPatch<B> {
    /// The adapter's rows for a module whose matrix is `matrix`, if it has some.
    pub(crate) fn new(
        backend: &B,
        adapter: &Adapter,
        module: &str,
        matrix: &B::Buf,
        trained: bool,
    ) -> Option<Self> {
        let (ids, rows) = adapter.token_rows(module)?;
        let d = rows.shape[1];
        let mut originals = vec![0.0; rows.data.len()];
        for (&id, original) in ids.iter().zip(originals.chunks_mut(d)) {
            backend.read(matrix, id as usize * d, original);
        }
        let rows = Param::new(backend, ParamKind::Embedding, vec![rows.clone()], trained);
        Some(TokenPatch { ids: ids.to_vec(), rows, originals })
    }

    /// D.
    fn width(&self) -> usize {
        self.originals.len() / self.ids.len()
    }

    /// Values of the matrix that are kept.
    pub(crate) fn n_originals(&self) -> usize {
        self.originals.len()
    }

    /// Writes the rows as they are now into the matrix.
    pub(crate) fn apply(&self, backend: &B, matrix: &mut B::Buf) {
        self.write(backend, &backend.download(&self.rows.value), matrix);
    }

    /// Writes back what the matrix had.
    pub(crate) fn undo(&self, backend: &B, matrix: &mut B::Buf) {
        self.write(backend, &self.originals, matrix);
    }

    fn write(&self, backend: &B, rows: &[f32], matrix: &mut B::Buf) {
        let d = self.width();
        for (&id, row) in self.ids.iter().zip(rows.chunks(d)) {
            backend.write(matrix, id as usize * d, row);
        }
    }

    /// Puts what the matrix had into an export of it.
    pub(crate) fn undo_export(&self, tensor: &mut NamedTensor) {
        let d = self.width();
        for (&id, row) in self.ids.iter().zip(self.originals.chunks(d)) {
            tensor.data[id as usize * d..][..d].copy_from_slice(row);
        }
    }

    /// Adds to the rows' gradient what comes in at the embedding's output `dx` (T, D).
    pub(crate) fn embedding_grad(&mut self, backend: &B, input_ids: &[u32], dx: &B::Buf) {
        let d = self.width();
        let Some(grad) = &mut self.rows.grad else { return };
        let (mut places, mut rows) = (Vec::new(), Vec::new());
        for (place, id) in input_ids.iter().enumerate() {
            if let Some(row) = self.ids.iter().position(|known| known == id) {
                places.push(place as u32);
                rows.push(row as u32);
            }
        }
        let mut picked = backend.zeros(places.len() * d);
        backend.gather_rows(dx, &places, d, &mut picked);
        backend.scatter_add_rows(&picked, &rows, d, grad);
    }

    /// Adds to the rows' gradient what comes in at the head's output: `dlogits` (n, V), from the
    /// input `x` (n, D).
    pub(crate) fn head_grad(&mut self, backend: &B, dlogits: Mat<'_, B>, x: Mat<'_, B>) {
        let Some(grad) = &mut self.rows.grad else { return };
        let mut picked = backend.zeros(self.ids.len() * dlogits.rows);
        backend.gather_columns(dlogits, &self.ids, &mut picked);
        let picked = Mat::new(&picked, self.ids.len(), dlogits.rows);
        let grad = MatMut::new(grad, self.ids.len(), x.cols);
        backend.gemm(picked, Op::N, x, Op::N, grad, 1.0, 1.0);
    }
}

/// Base tensors whose place is taken by trained ones, under the names of those.
pub(crate) struct Stash<B: Backend> {
    taken: Vec<(String, Param<B>)>,
}

impl<B: Backend> Stash<B> {
    /// Nothing is taken.
    pub(crate) fn new() -> Self {
        Stash { taken: Vec::new() }
    }

    /// Puts the adapter's tensor in place of `param`, if it has one for it.
    pub(crate) fn swap(
        &mut self,
        backend: &B,
        adapter: &Adapter,
        trained: bool,
        param: &mut Param<B>,
    ) {
        let Some(tensor) = param.name().and_then(|name| adapter.whole(name)) else { return };
        let new = Param::new(backend, param.kind, vec![tensor.clone()], trained);
        let name = tensor.name.clone();
        self.taken.push((name, std::mem::replace(param, new)));
    }

    /// Puts the base's tensor back, if `param` took its place.
    pub(crate) fn put_back(&mut self, param: &mut Param<B>) {
        let taken = self.taken.iter().position(|(name, _)| Some(name.as_str()) == param.name());
        if let Some(idx) = taken {
            *param = self.taken.swap_remove(idx).1;
        }
    }

    /// Bytes of the tensors whose place is taken.
    pub(crate) fn n_bytes(&self, backend: &B) -> u64 {
        self.taken.iter().map(|(_, param)| param.n_bytes(backend)).sum()
    }

    /// Replaces trained tensors in an export by the base's.
    pub(crate) fn undo_export(&self, backend: &B, tensors: &mut Tensors) {
        for (name, base) in &self.taken {
            debug_assert!(name.starts_with(PREFIX), "what takes a place has PEFT's name");
            tensors.remove(name);
            base.export_values(backend, tensors);
        }
    }
}
