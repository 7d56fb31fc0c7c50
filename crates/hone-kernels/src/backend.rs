//! The operators of a decoder as one trait.
//!
//! Dimensions: T tokens of a batch (documents laid end to end), D model width, H query heads, G
//! key/value heads, K head width, I width of the feed-forward layer, V vocabulary, N rows of a
//! matrix.
//!
//! A backend owns flat buffers. A matrix argument is a view ([`Mat`], [`MatMut`]) into one:
//! row-major rows of `cols` values, `stride` values apart, so that a slice of columns needs no
//! copy. Three backends are meant to exist: [`crate::Cpu`] is fast, [`crate::Reference`] is its
//! plain twin (simple loops, f64 inside), and a CUDA one follows. The decoder is written once
//! against this trait; the tests run every operator on a table of cases through both twins.
//!
//! Shapes are checked by the implementations with `assert!`: they are the caller's proof, never
//! user input.

use std::ops::Range;

use crate::quant::Quantized;
use crate::{Adafactor, Compute, Lion, LossOptions, SecondMoment, Sgd};
#[allow(unused_imports, reason = "the documentation names them")]
use crate::{CODE_BLOCK, CodeBook};

/// A read-only row-major matrix view: `rows` x `cols`, row `i` starts at `offset + i * stride`.
pub struct Mat<'a, B: Backend> {
    /// The buffer viewed.
    pub buf: &'a B::Buf,
    /// Index of the first value.
    pub offset: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Distance between the starts of neighbouring rows, in values; at least `cols`.
    pub stride: usize,
}

/// A writable row-major matrix view; see [`Mat`].
pub struct MatMut<'a, B: Backend> {
    /// The buffer viewed.
    pub buf: &'a mut B::Buf,
    /// Index of the first value.
    pub offset: usize,
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub cols: usize,
    /// Distance between the starts of neighbouring rows, in values; at least `cols`.
    pub stride: usize,
}

impl<B: Backend> Clone for Mat<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Mat<'_, B> {}

impl<'a, B: Backend> Mat<'a, B> {
    /// The whole of `buf` (its first `rows * cols` values) as a dense matrix.
    pub fn new(buf: &'a B::Buf, rows: usize, cols: usize) -> Self {
        Mat { buf, offset: 0, rows, cols, stride: cols }
    }

    /// Columns `start .. start + cols` of a dense matrix whose rows are `stride` wide.
    pub fn columns(buf: &'a B::Buf, rows: usize, start: usize, cols: usize, stride: usize) -> Self {
        Mat { buf, offset: start, rows, cols, stride }
    }

    /// Rows `start .. start + rows` of this view.
    pub fn rows(self, start: usize, rows: usize) -> Self {
        Mat { offset: self.offset + start * self.stride, rows, ..self }
    }
}

impl<'a, B: Backend> MatMut<'a, B> {
    /// The same view, to be used while this one waits.
    pub fn again(&mut self) -> MatMut<'_, B> {
        MatMut { buf: &mut *self.buf, ..*self }
    }

    /// Rows `start .. start + rows` of this view.
    pub fn rows(self, start: usize, rows: usize) -> Self {
        MatMut { offset: self.offset + start * self.stride, rows, ..self }
    }

    /// The whole of `buf` (its first `rows * cols` values) as a dense matrix.
    pub fn new(buf: &'a mut B::Buf, rows: usize, cols: usize) -> Self {
        MatMut { buf, offset: 0, rows, cols, stride: cols }
    }

    /// Columns `start .. start + cols` of a dense matrix whose rows are `stride` wide.
    pub fn columns(
        buf: &'a mut B::Buf,
        rows: usize,
        start: usize,
        cols: usize,
        stride: usize,
    ) -> Self {
        MatMut { buf, offset: start, rows, cols, stride }
    }
}

/// A low-rank part that is added to some columns of a product: `scale` U op(V), U being (T, r) and
/// op(V) (r, columns). Both are rounded to [`Backend::compute`], U before or after it is scaled.
pub struct Tail<'a, B: Backend> {
    /// (T, r).
    pub u: Mat<'a, B>,
    /// (r, columns), or its transpose.
    pub v: Mat<'a, B>,
    /// Whether V is taken as it lies or transposed.
    pub op_v: Op,
    /// The first of the columns.
    pub column: usize,
    /// Factor of the whole.
    pub scale: f32,
}

impl<B: Backend> Clone for Tail<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Tail<'_, B> {}

/// What the backward of a norm gives beside the gradient at its input, where it is asked for.
pub struct NormMore<'a, B: Backend> {
    /// Gets the weight's gradient added, the sum over rows of dy n.
    pub dw: Option<&'a mut B::Buf>,
    /// Receives the norm's output once more.
    pub y: Option<&'a mut B::Buf>,
    /// Receives dx once more, as it is kept there: products read it rounded.
    pub dx: Option<&'a mut B::Buf>,
}

impl<'a, B: Backend> NormMore<'a, B> {
    /// The weight's gradient, or nothing.
    pub fn dw(dw: Option<&'a mut B::Buf>) -> Self {
        NormMore { dw, y: None, dx: None }
    }
}

/// What a product is added to.
pub enum Onto<'a, B: Backend> {
    /// The result's old values, times this; with 0 they may be anything (NaN too).
    Old(f32),
    /// As many values of another buffer as the result has, f32. The result lies dense at the start of
    /// its own, and so do they.
    Buf(&'a B::Buf),
}

impl<B: Backend> Clone for Onto<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Onto<'_, B> {}

impl<B: Backend> Onto<'_, B> {
    /// The factor of the result's old values.
    pub(crate) fn beta(&self) -> f32 {
        match self {
            Onto::Old(beta) => *beta,
            Onto::Buf(_) => 0.0,
        }
    }

    /// Brings what lies in another buffer into the result, and returns the factor of the old values
    /// that a product has then.
    pub(crate) fn settle(self, backend: &B, y: &mut MatMut<'_, B>) -> f32 {
        match self {
            Onto::Old(beta) => beta,
            Onto::Buf(x) => {
                assert!(y.offset == 0 && y.stride == y.cols, "the result lies dense");
                backend.copy(x, y.buf, y.rows * y.cols);
                1.0
            }
        }
    }
}

/// `Y <- Y + tails`, one product each.
pub(crate) fn add_tails<B: Backend>(backend: &B, tails: &[Tail<'_, B>], mut y: MatMut<'_, B>) {
    for tail in tails {
        let cols = if tail.op_v == Op::N { tail.v.cols } else { tail.v.rows };
        let MatMut { buf, offset, rows, stride, .. } = y.again();
        let y = MatMut { buf, offset: offset + tail.column, rows, cols, stride };
        backend.gemm(tail.u, Op::N, tail.v, tail.op_v, y, tail.scale, 1.0);
    }
}

/// Whether a factor of [`Backend::gemm`] is taken as it lies or transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// As stored.
    N,
    /// Transposed.
    T,
}

/// Head counts and widths of an attention layer. A row of its packed `qkv` buffer is H query heads,
/// then G key heads, then G value heads, each K wide: `(H + 2 G) * K` values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// H, the number of query heads; a multiple of `n_kv`.
    pub n_q: usize,
    /// G, the number of key/value heads.
    pub n_kv: usize,
    /// K, the width of a head.
    pub dim: usize,
}

impl Heads {
    /// Width of a row of the packed `qkv` buffer.
    pub fn qkv_width(&self) -> usize {
        (self.n_q + 2 * self.n_kv) * self.dim
    }

    /// Width of a row of the attention output.
    pub fn out_width(&self) -> usize {
        self.n_q * self.dim
    }
}

/// What a query may see besides the causal rule inside its own document.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttnMask {
    /// Only the last `window` positions, itself included; `None` sees the whole prefix.
    pub window: Option<usize>,
    /// Factor on the scores, 1/sqrt(K) as a rule.
    pub scale: f32,
    /// c of a soft cap: scaled scores s become c tanh(s / c) before the mask (Gemma 2).
    pub soft_cap: Option<f32>,
}

/// The constants of an RMSNorm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsNorm {
    /// Added to the mean square.
    pub eps: f32,
    /// Added to the weight: 0, or 1 where the file holds weight - 1 (Gemma).
    pub offset: f32,
}

/// One AdamW update; see [`Backend::adamw`]. The rates are f64 as in PyTorch: 1 - 0.999 is off by
/// 1e-5 of itself in f32.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Step number, from 1: for the bias correction.
    pub step: u64,
    /// Factor applied to the gradient first (clipping).
    pub grad_scale: f32,
}

/// Sums over the rows of one call of [`Backend::cross_entropy`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossSums {
    /// Sum of weight times loss, in nats: cross-entropy, and what options add to it.
    pub weighted_loss: f64,
    /// Sum of weight times cross-entropy alone, in nats.
    pub weighted_ce: f64,
    /// Sum of the weights.
    pub weight: f64,
    /// Rows whose largest logit is the target's.
    pub n_correct: u64,
    /// Rows.
    pub n_rows: u64,
}

impl std::ops::AddAssign for LossSums {
    /// Adds the sums of further rows.
    fn add_assign(&mut self, more: Self) {
        self.weighted_loss += more.weighted_loss;
        self.weighted_ce += more.weighted_ce;
        self.weight += more.weight;
        self.n_correct += more.n_correct;
        self.n_rows += more.n_rows;
    }
}

/// The operators of a decoder over buffers of f32 or of rounded values. Every implementation gives the same bytes for
/// any number of threads.
pub trait Backend: Clone + Send + Sync + 'static {
    /// Flat memory of values on the device.
    type Buf: Send + Sync;
    /// A weight matrix (out, in) that will not change, in whatever form the device multiplies
    /// fastest.
    type Frozen: Send + Sync;

    /// Name for reports: `cpu`, `reference`.
    fn name(&self) -> &'static str;

    // ------------------------------------------------------------------ arithmetic

    /// What [`Backend::gemm`], [`Backend::linear`] and [`Backend::linear_dx`] round their factors
    /// to, and buffers of [`Backend::zeros_rounded`] their values. [`Backend::freeze`] rounds a weight
    /// once and for all.
    fn compute(&self) -> Compute;
    /// The same device with other arithmetic of products: an update rule that is made of them asks
    /// for f32. A weight that was frozen in bf16 is multiplied in bf16 by either.
    fn with_compute(&self, compute: Compute) -> Self;

    /// What has failed on the device since this was last asked, if anything has: memory that was not to be
    /// had, a driver's error. What was asked for after that has not been done, and buffers keep what was in them.
    /// Asking forgets it, so that they can be saved. The processor does not fail so.
    fn take_fault(&self) -> Option<String> {
        None
    }

    // ------------------------------------------------------------------ memory

    /// A buffer of `n` zeros.
    fn zeros(&self, n: usize) -> Self::Buf;
    /// A buffer of `n` zeros whose values are rounded to [`Backend::compute`] whenever they are
    /// written: with f32 a buffer like any other, with bf16 one of half the size. It may be any
    /// factor or result of a product; an activation or its gradient in the other operators; what an
    /// attention reads and writes, its caches too, but not its log-sum-exp; and the result of a norm.
    /// Whatever else (weights, gradients of weights, residual streams, logits) is f32, and a backend
    /// panics where it is not.
    fn zeros_rounded(&self, n: usize) -> Self::Buf;
    /// Bytes of the values of `buf`.
    fn buf_bytes(&self, buf: &Self::Buf) -> u64;
    /// A buffer holding `data`.
    fn upload(&self, data: &[f32]) -> Self::Buf;
    /// Number of values in `buf`.
    fn len(&self, buf: &Self::Buf) -> usize;
    /// `out <- buf[offset .. offset + out.len()]`, on the host.
    fn read(&self, buf: &Self::Buf, offset: usize, out: &mut [f32]);
    /// `buf[offset .. offset + data.len()] <- data`.
    fn write(&self, buf: &mut Self::Buf, offset: usize, data: &[f32]);
    /// `buf <- value`, everywhere.
    fn fill(&self, buf: &mut Self::Buf, value: f32);
    /// All of `buf` on the host.
    fn download(&self, buf: &Self::Buf) -> Vec<f32> {
        let mut out = vec![0.0; self.len(buf)];
        self.read(buf, 0, &mut out);
        out
    }

    // ------------------------------------------------------------------ matrix products

    /// `C <- alpha * op(A) op(B) + beta * C`, A and B rounded to [`Backend::compute`], sums of at
    /// least f32; with `beta = 0`, C may hold anything (NaN too)
    /// before.
    #[allow(clippy::too_many_arguments, reason = "the seven arguments of BLAS")]
    fn gemm(
        &self,
        a: Mat<'_, Self>,
        op_a: Op,
        b: Mat<'_, Self>,
        op_b: Op,
        c: MatMut<'_, Self>,
        alpha: f32,
        beta: f32,
    );
    /// Takes a weight (out, in), dense and row-major, that only [`Backend::linear`] and
    /// [`Backend::linear_dx`] will read.
    fn freeze(&self, weight: &[f32], out: usize, inp: usize) -> Self::Frozen;
    /// The values given to [`Backend::freeze`], (out, in) row-major, as products see them: rounded
    /// to [`Backend::compute`].
    fn thaw(&self, weight: &Self::Frozen) -> Vec<f32>;
    /// `Y (T, out) <- X (T, in) Wt + beta * Y`.
    fn linear(&self, x: Mat<'_, Self>, w: &Self::Frozen, y: MatMut<'_, Self>, beta: f32);
    /// `dX (T, in) <- dY (T, out) W + beta * dX`.
    fn linear_dx(&self, dy: Mat<'_, Self>, w: &Self::Frozen, dx: MatMut<'_, Self>, beta: f32);
    /// [`Backend::gemm`] with alpha = 1, and low-rank parts added in the same pass: `C <- op(A) op(B) +
    /// tails + onto`. At most four of them.
    fn gemm_with(
        &self,
        (a, op_a): (Mat<'_, Self>, Op),
        (b, op_b): (Mat<'_, Self>, Op),
        tails: &[Tail<'_, Self>],
        mut c: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
    ) {
        let beta = onto.settle(self, &mut c);
        self.gemm(a, op_a, b, op_b, c.again(), 1.0, beta);
        add_tails(self, tails, c);
    }
    /// [`Backend::linear`], and low-rank parts added in the same pass: `Y <- X Wt + tails + onto`. At
    /// most four of them.
    fn linear_with(
        &self,
        x: Mat<'_, Self>,
        w: &Self::Frozen,
        tails: &[Tail<'_, Self>],
        mut y: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
    ) {
        let beta = onto.settle(self, &mut y);
        self.linear(x, w, y.again(), beta);
        add_tails(self, tails, y);
    }
    /// [`Backend::linear_dx`], and low-rank parts added in the same pass: `dX <- dY W + tails + beta
    /// dX`. At most four of them.
    fn linear_dx_with(
        &self,
        dy: Mat<'_, Self>,
        w: &Self::Frozen,
        tails: &[Tail<'_, Self>],
        mut dx: MatMut<'_, Self>,
        beta: f32,
    ) {
        self.linear_dx(dy, w, dx.again(), beta);
        add_tails(self, tails, dx);
    }
    /// [`Backend::freeze`] of a 4-bit weight: matrices (rows, `inp`), each quantised on its own,
    /// one below the other. It stays 4-bit: products dequantise a part at a time, and
    /// [`Backend::thaw`] gives the dequantised values (rounded as all are that products see).
    fn freeze_4bit(&self, parts: Vec<Quantized>, inp: usize) -> Self::Frozen;

    // ------------------------------------------------------------------ elementwise

    /// `y <- x`, the first `n` values.
    fn copy(&self, x: &Self::Buf, y: &mut Self::Buf, n: usize);
    /// `y <- y + x`, the first `n` values.
    fn add(&self, x: &Self::Buf, y: &mut Self::Buf, n: usize);
    /// `x <- s * x`, the first `n` values.
    fn scale(&self, x: &mut Self::Buf, s: f32, n: usize);
    /// Adds `bias` (cols) to every row of `y`.
    fn add_bias(&self, y: MatMut<'_, Self>, bias: &Self::Buf);
    /// `dbias (cols) <- dbias + sum over rows of dy`, rows in a fixed order.
    fn bias_grad(&self, dy: Mat<'_, Self>, dbias: &mut Self::Buf);
    /// Inverted dropout of probability `p`: `y[i] <- x[i] * keep(seed, i) / (1 - p)`, with `keep` a
    /// function of `seed` and the index alone (see [`crate::rng::keep`]). Its own backward: apply
    /// it to dy with the same seed.
    fn dropout(&self, x: Mat<'_, Self>, y: MatMut<'_, Self>, p: f32, seed: u64);

    // ------------------------------------------------------------------ rows

    /// `y (ids.len(), D) <- table[ids]`, `table` being (V, D).
    fn gather_rows(&self, table: &Self::Buf, ids: &[u32], d: usize, y: &mut Self::Buf);
    /// `dtable[ids[i]] <- dtable[ids[i]] + dy[i]`; rows that meet are added in the order of `i`.
    fn scatter_add_rows(&self, dy: &Self::Buf, ids: &[u32], d: usize, dtable: &mut Self::Buf);

    // ------------------------------------------------------------------ adapters

    /// `y (ids.len(), r) <- columns ids of table (r, V)`, one a row.
    fn gather_columns(&self, table: Mat<'_, Self>, ids: &[u32], y: &mut Self::Buf);
    /// Column `ids[i]` of `dtable` (r, V) `<-` itself + row i of `dy (ids.len(), r)`; columns that
    /// meet are added in the order of `i`.
    fn scatter_add_columns(&self, dy: &Self::Buf, ids: &[u32], dtable: MatMut<'_, Self>);
    /// `y[i][j] <- beta y[i][j] + (scale[j] + shift) x[i][j]`, with `scale` (1, cols).
    fn add_scaled_columns(
        &self,
        x: Mat<'_, Self>,
        scale: Mat<'_, Self>,
        shift: f32,
        y: MatMut<'_, Self>,
        beta: f32,
    );
    /// `out[j] <- out[j] + (sum over i of a[i][j] b[i][j]) / divisor[j]`, rows in a fixed order;
    /// `divisor` is (1, cols).
    fn columns_dot(
        &self,
        a: Mat<'_, Self>,
        b: Mat<'_, Self>,
        divisor: Mat<'_, Self>,
        out: &mut Self::Buf,
    );
    /// Row norms of an adapted weight and what its magnitudes make of them (DoRA, Liu et al. 2024):
    /// `norms[j] = sqrt(squares[j] + sum over k of b[j][k] c[k][j])`, `scales[j] = magnitude[j] /
    /// norms[j]`. `b` is (out, r), `c` (r, out), the rest (1, out). With b = B, c = 2 s A Wt + s^2
    /// A At Bt and the squares those of W, the norms are those of W + s B A.
    fn dora_scales(
        &self,
        squares: &Self::Buf,
        b: Mat<'_, Self>,
        c: Mat<'_, Self>,
        magnitude: &Self::Buf,
        norms: MatMut<'_, Self>,
        scales: MatMut<'_, Self>,
    );

    // ------------------------------------------------------- normalisation, position, activation

    /// RMSNorm (Zhang and Sennrich 2019): `y = x * r * (w + offset)`, `r = 1 / sqrt(mean(x^2) +
    /// eps)`; `r` (T) is kept for the backward. `rows_d` is (T, D).
    fn rms_norm(
        &self,
        x: &Self::Buf,
        w: &Self::Buf,
        norm: RmsNorm,
        rows_d: (usize, usize),
        y: &mut Self::Buf,
        r: &mut Self::Buf,
    );
    /// With z = dy * (w + offset) and n = x * r: `dx <- dx + r (z - n mean(z n))`, and what of
    /// `more` is asked for. `rows_d` is (T, D).
    #[allow(clippy::too_many_arguments, reason = "what the formula names")]
    fn rms_norm_backward(
        &self,
        dy: &Self::Buf,
        x: &Self::Buf,
        w: &Self::Buf,
        norm: RmsNorm,
        r: &Self::Buf,
        rows_d: (usize, usize),
        dx: &mut Self::Buf,
        more: NormMore<'_, Self>,
    );
    /// RMSNorm in place on each group of `width` neighbouring columns of `x`, all with the one
    /// weight `w` (width): the norm of queries or keys by head, or of all heads at once. `raw`
    /// receives what stood there before, (rows, cols) dense.
    fn group_norm(
        &self,
        x: MatMut<'_, Self>,
        w: &Self::Buf,
        norm: RmsNorm,
        width: usize,
        raw: &mut Self::Buf,
    );
    /// Overwrites `dy` with the gradient at [`Backend::group_norm`]'s input, which is `raw`, and
    /// adds to `dw` (width) when asked for, over rows and groups in a fixed order.
    fn group_norm_backward(
        &self,
        dy: MatMut<'_, Self>,
        raw: &Self::Buf,
        w: &Self::Buf,
        norm: RmsNorm,
        width: usize,
        dw: Option<&mut Self::Buf>,
    );
    /// Rotary positions in place (Su et al. 2021, the half-split layout of Hugging Face) on the
    /// first R = `rotary` columns of the query and key heads of a packed `qkv` buffer: (a, b) -> (a
    /// cos - b sin, b cos + a sin) with a, b the halves of those columns. `cos_sin` is (P, R): for
    /// each position R/2 cosines, then R/2 sines. `inverse` takes the transpose, which is the
    /// backward.
    fn rope(
        &self,
        qkv: &mut Self::Buf,
        heads: Heads,
        rotary: usize,
        positions: &[u32],
        cos_sin: &Self::Buf,
        inverse: bool,
    );
    /// SwiGLU (Shazeer 2020): rows of `gate_up` are I gates, then I ups; `h = gate * sigmoid(gate)
    /// * up`, (T, I). `rows_i` is (T, I).
    fn swiglu(&self, gate_up: &Self::Buf, rows_i: (usize, usize), h: &mut Self::Buf);
    /// Overwrites `gate_up` with its gradient, given the gradient `h` (T, I) at the output, and `h` with
    /// that output, as [`Backend::swiglu`] makes it. `rows_i` is (T, I).
    fn swiglu_backward(&self, h: &mut Self::Buf, rows_i: (usize, usize), gate_up: &mut Self::Buf);
    /// GeGLU (Shazeer 2020) with the tanh formula of GELU (Hendrycks and Gimpel 2016): `h = gate *
    /// (1 + tanh(u)) / 2 * up`, `u = sqrt(2 / pi) (gate + 0.044715 gate^3)`. Layout as
    /// [`Backend::swiglu`].
    fn geglu(&self, gate_up: &Self::Buf, rows_i: (usize, usize), h: &mut Self::Buf);
    /// The backward of [`Backend::geglu`], as [`Backend::swiglu_backward`].
    fn geglu_backward(&self, h: &mut Self::Buf, rows_i: (usize, usize), gate_up: &mut Self::Buf);
    /// `x <- cap * tanh(x / cap)`, the first `n` values; the loss caps by itself, with its gradient.
    fn soft_cap(&self, x: &mut Self::Buf, cap: f32, n: usize);

    // ------------------------------------------------------------------ attention

    /// Causal attention inside each document (online softmax, after FlashAttention-2): `out` (T, H
    /// K), and the log-sum-exp of each row's scores in `lse` (T, H). `seq_lens` are the documents'
    /// lengths, their sum is T. Never holds T x T.
    fn attention(
        &self,
        qkv: &Self::Buf,
        heads: Heads,
        seq_lens: &[usize],
        mask: AttnMask,
        out: &mut Self::Buf,
        lse: &mut Self::Buf,
    );
    /// Overwrites `dqkv` with the gradient of [`Backend::attention`], given `dout` (T, H K).
    #[allow(clippy::too_many_arguments, reason = "what the formula names")]
    fn attention_backward(
        &self,
        dout: &Self::Buf,
        qkv: &Self::Buf,
        out: &Self::Buf,
        lse: &Self::Buf,
        heads: Heads,
        seq_lens: &[usize],
        mask: AttnMask,
        dqkv: &mut Self::Buf,
    );
    /// One new token per sequence against its cache: `q` rows are the query heads of the B newest
    /// tokens, (B, H K); `k_cache` and `v_cache` are (B, capacity, G K); `lens[b]` positions of
    /// sequence b are valid, the newest included. Both caches are rounded, or neither. Writes `out`
    /// (B, H K).
    #[allow(clippy::too_many_arguments, reason = "what the formula names")]
    fn attention_decode(
        &self,
        q: Mat<'_, Self>,
        k_cache: &Self::Buf,
        v_cache: &Self::Buf,
        capacity: usize,
        lens: &[usize],
        heads: Heads,
        mask: AttnMask,
        out: &mut Self::Buf,
    );

    // ------------------------------------------------------------------ loss and update

    /// Weighted cross-entropy over rows of logits (N, V), which become their own gradient when
    /// `grad_scale` is given: `L = sum_i w_i (lse_i - z_i[y_i])`, `dz_ij = grad_scale * w_i
    /// (softmax(z_i)_j - [j = y_i])`. With `None` the logits stay. `row_loss`, when given, receives
    /// each row's unweighted cross-entropy. Sums are f64, in the order of the rows.
    fn cross_entropy(
        &self,
        logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        grad_scale: Option<f32>,
        row_loss: Option<&mut [f32]>,
    ) -> LossSums;
    /// Sum of squares of `x` in f64, in a fixed order.
    fn sum_squares(&self, x: &Self::Buf) -> f64;
    /// AdamW (Loshchilov and Hutter 2019) in PyTorch's order, on as many values of `p` and `g` from
    /// `at` on as `m` and `v` have:
    ///
    /// ```text
    /// p <- p (1 - lr wd)
    /// m <- lerp(m, g, 1 - b1)
    /// v <- b2 v + (1 - b2) g^2
    /// p <- p - (lr / (1 - b1^t)) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    /// ```
    fn adamw(
        &self,
        p: &mut Self::Buf,
        g: &Self::Buf,
        at: usize,
        m: &mut Self::Buf,
        v: &mut Self::Buf,
        update: AdamW,
    );

    // ------------------------------------------------------------------ further updates, options

    /// Flat memory of 8-bit codes on the device.
    type Codes: Send + Sync;
    /// `n` codes of 0.
    fn zero_codes(&self, n: usize) -> Self::Codes;
    /// The codes on the host.
    fn read_codes(&self, codes: &Self::Codes) -> Vec<u8>;
    /// Overwrites the codes, of which there are as many.
    fn write_codes(&self, codes: &mut Self::Codes, data: &[u8]);
    /// [`Backend::sum_squares`] of a part of `x`.
    fn sum_squares_part(&self, x: &Self::Buf, part: Range<usize>) -> f64;
    /// `y <- a x + b y` on `n` values, from the given index of each buffer on.
    fn axpby(&self, a: f32, x: (&Self::Buf, usize), b: f32, y: (&mut Self::Buf, usize), n: usize);
    /// [`Backend::adamw`] with both moments in 8 bits (Dettmers et al. 2022): codes and, for each
    /// [`CODE_BLOCK`] of them, the largest magnitude. A block is decoded by [`CodeBook::signed`]
    /// (first) or [`CodeBook::unsigned`] (second), `x = value[code] max`; updated in f32, as `m <-
    /// b1 m + (1 - b1) g`; and coded again, `code(x (1 / max))`, whole blocks at a time, the last
    /// one being short.
    fn adamw_8bit(
        &self,
        p: &mut Self::Buf,
        g: &Self::Buf,
        at: usize,
        moments: [(&mut Self::Codes, &mut Self::Buf); 2],
        update: AdamW,
    );
    /// Lion: `p <- p (1 - lr wd) - lr sign(b1 m + (1 - b1) g)`, then `m <- b2 m + (1 - b2) g`.
    fn lion(&self, p: &mut Self::Buf, g: &Self::Buf, at: usize, m: &mut Self::Buf, update: Lion);
    /// Descent in PyTorch's order on a part of `p` and `g`: `g <- g + wd p`; with a momentum, `m <- mu m + (1 -
    /// dampening) g` and `g <- m`, or `g + mu m` with Nesterov; `p <- p - lr g`.
    fn sgd(
        &self,
        p: &mut Self::Buf,
        g: &Self::Buf,
        part: Range<usize>,
        m: Option<&mut Self::Buf>,
        update: Sgd,
    );
    /// Adafactor as transformers has it. With s = g^2 + eps, the second moment decays by b2 towards
    /// the means of s by row and column, r and c, or towards s itself, v:
    ///
    /// ```text
    /// u <- g / sqrt(r / mean(r)) / sqrt(c)      or  g / sqrt(v)
    /// u <- a u / max(1, rms(u) / clip)          a = lr max(scale_min, rms(p)), or lr
    /// m <- b1 m + (1 - b1) u, u <- m            where a first moment is kept
    /// p <- p - wd a p - u
    /// ```
    fn adafactor(
        &self,
        p: &mut Self::Buf,
        g: &Self::Buf,
        at: usize,
        second: SecondMoment<'_, Self>,
        first: Option<&mut Self::Buf>,
        update: Adafactor,
    );
    /// [`Backend::cross_entropy`] with options. With z = c tanh(x / c) of the logits x (or x), lse
    /// their log-sum-exp, p = softmax(z), q = p_y held constant (or 1):
    ///
    /// ```text
    /// L   = sum_i w_i (q ((1 - e) (lse - z_y) + e (lse - mean(z))) + l lse^2)
    /// dz  = w (q (p - (1 - e) [j = y] - e / V) + 2 l lse p),  dx = dz (1 - (z / c)^2)
    /// ```
    ///
    /// `row_loss` receives what is summed, without its weight; the sum of plain cross-entropy is in
    /// [`LossSums::weighted_ce`]. Without a gradient the logits are left as they were or capped.
    fn cross_entropy_with(
        &self,
        logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        grad_scale: Option<f32>,
        row_loss: Option<&mut [f32]>,
        options: LossOptions,
    ) -> LossSums;
    /// [`Backend::cross_entropy_with`] whose gradient goes into the start of another buffer, dense and
    /// rounded where that is; `grad` is the factor and the buffer. The logits may be written over.
    fn cross_entropy_into(
        &self,
        logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        grad: (f32, &mut Self::Buf),
        row_loss: Option<&mut [f32]>,
        options: LossOptions,
    ) -> LossSums;
    /// Uniform noise on embeddings (Jain et al. 2023: NEFTune): row t of document k of `x` (T, D)
    /// gets `alpha / sqrt(L D) (2 u - 1)`, L being the document's length and u value `t D + j` of
    /// the stream `mix(seed, first + k)`, so that a document's noise does not know its neighbours.
    fn add_noise(
        &self,
        x: &mut Self::Buf,
        d: usize,
        seq_lens: &[usize],
        alpha: f32,
        seed_first: (u64, u64),
    );

    // ------------------------------------------------------------------ generation

    /// `y (ids.len(), in) <- rows ids` of a frozen weight (out, in), as [`Backend::thaw`] gives them.
    fn gather_frozen(&self, weight: &Self::Frozen, ids: &[u32], y: &mut Self::Buf);

    // ------------------------------------------------------------------ sizes

    /// Bytes of a frozen weight as it is kept, its scales with it.
    fn frozen_bytes(&self, weight: &Self::Frozen) -> u64;
}
