//! Which function runs which operator.

use std::ops::Range;

use super::{Device, Gpu, GpuBuf, GpuCodes, GpuFrozen};
use super::{adafactor, attention, glu, loss, norm, pointwise, position, rows, update};
use crate::quant::Quantized;
use crate::{
    Adafactor, AdamW, AttnMask, Backend, Compute, Heads, Lion, LossOptions, LossSums, Mat, MatMut,
    NormMore, Onto, Op, RmsNorm, SecondMoment, Sgd, Tail,
};

impl<D: Device> Backend for Gpu<D> {
    type Buf = GpuBuf<D>;
    type Frozen = GpuFrozen<D>;
    type Codes = GpuCodes<D>;

    fn name(&self) -> &'static str {
        self.device.name()
    }

    fn compute(&self) -> Compute {
        self.compute
    }

    fn with_compute(&self, compute: Compute) -> Self {
        Gpu { compute, ..self.clone() }
    }

    fn take_fault(&self) -> Option<String> {
        self.device.take_fault()
    }

    fn zeros(&self, n: usize) -> GpuBuf<D> {
        self.buf(n, Compute::F32)
    }

    fn zeros_rounded(&self, n: usize) -> GpuBuf<D> {
        self.buf(n, self.compute)
    }

    fn buf_bytes(&self, buf: &GpuBuf<D>) -> u64 {
        (buf.len * buf.holds.value_bytes()) as u64
    }

    fn upload(&self, data: &[f32]) -> GpuBuf<D> {
        let mut buf = self.buf(data.len(), Compute::F32);
        self.write_values(&mut buf, 0, data);
        buf
    }

    fn len(&self, buf: &GpuBuf<D>) -> usize {
        buf.len
    }

    fn read(&self, buf: &GpuBuf<D>, offset: usize, out: &mut [f32]) {
        self.read_values(buf, offset, out);
    }

    fn write(&self, buf: &mut GpuBuf<D>, offset: usize, data: &[f32]) {
        self.write_values(buf, offset, data);
    }

    fn fill(&self, buf: &mut GpuBuf<D>, value: f32) {
        pointwise::fill(self, buf, value);
    }

    fn gemm(
        &self,
        a: Mat<'_, Self>,
        op_a: Op,
        b: Mat<'_, Self>,
        op_b: Op,
        c: MatMut<'_, Self>,
        alpha: f32,
        beta: f32,
    ) {
        self.multiply((a, op_a), (b, op_b), c, alpha, Onto::Old(beta), self.compute);
    }

    fn freeze(&self, weight: &[f32], out: usize, inp: usize) -> GpuFrozen<D> {
        self.frozen(weight, out, inp)
    }

    fn thaw(&self, weight: &GpuFrozen<D>) -> Vec<f32> {
        self.thawed(weight)
    }

    fn linear(&self, x: Mat<'_, Self>, w: &GpuFrozen<D>, y: MatMut<'_, Self>, beta: f32) {
        self.linear_onto(x, w, &[], y, Onto::Old(beta));
    }

    fn linear_dx(&self, dy: Mat<'_, Self>, w: &GpuFrozen<D>, dx: MatMut<'_, Self>, beta: f32) {
        self.linear_dx_onto(dy, w, &[], dx, Onto::Old(beta));
    }

    fn gemm_with(
        &self,
        a: (Mat<'_, Self>, Op),
        b: (Mat<'_, Self>, Op),
        tails: &[Tail<'_, Self>],
        c: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
    ) {
        self.multiply_with(a, b, tails, c, onto, self.compute);
    }

    fn linear_with(
        &self,
        x: Mat<'_, Self>,
        w: &GpuFrozen<D>,
        tails: &[Tail<'_, Self>],
        y: MatMut<'_, Self>,
        onto: Onto<'_, Self>,
    ) {
        self.linear_onto(x, w, tails, y, onto);
    }

    fn linear_dx_with(
        &self,
        dy: Mat<'_, Self>,
        w: &GpuFrozen<D>,
        tails: &[Tail<'_, Self>],
        dx: MatMut<'_, Self>,
        beta: f32,
    ) {
        self.linear_dx_onto(dy, w, tails, dx, Onto::Old(beta));
    }

    fn freeze_4bit(&self, parts: Vec<Quantized>, inp: usize) -> GpuFrozen<D> {
        self.frozen_4bit(parts, inp)
    }

    fn copy(&self, x: &GpuBuf<D>, y: &mut GpuBuf<D>, n: usize) {
        pointwise::copy(self, x, y, n);
    }

    fn add(&self, x: &GpuBuf<D>, y: &mut GpuBuf<D>, n: usize) {
        pointwise::add(self, x, y, n);
    }

    fn scale(&self, x: &mut GpuBuf<D>, s: f32, n: usize) {
        pointwise::scale(self, x, s, n);
    }

    fn add_bias(&self, y: MatMut<'_, Self>, bias: &GpuBuf<D>) {
        pointwise::add_bias(self, y, bias);
    }

    fn bias_grad(&self, dy: Mat<'_, Self>, dbias: &mut GpuBuf<D>) {
        pointwise::bias_grad(self, dy, dbias);
    }

    fn dropout(&self, x: Mat<'_, Self>, y: MatMut<'_, Self>, p: f32, seed: u64) {
        pointwise::dropout(self, x, y, p, seed);
    }

    fn gather_rows(&self, table: &GpuBuf<D>, ids: &[u32], d: usize, y: &mut GpuBuf<D>) {
        rows::gather_rows(self, table, ids, d, y);
    }

    fn scatter_add_rows(&self, dy: &GpuBuf<D>, ids: &[u32], d: usize, dtable: &mut GpuBuf<D>) {
        rows::scatter_add_rows(self, dy, ids, d, dtable);
    }

    fn gather_columns(&self, table: Mat<'_, Self>, ids: &[u32], y: &mut GpuBuf<D>) {
        rows::gather_columns(self, table, ids, y);
    }

    fn scatter_add_columns(&self, dy: &GpuBuf<D>, ids: &[u32], dtable: MatMut<'_, Self>) {
        rows::scatter_add_columns(self, dy, ids, dtable);
    }

    fn add_scaled_columns(
        &self,
        x: Mat<'_, Self>,
        scale: Mat<'_, Self>,
        shift: f32,
        y: MatMut<'_, Self>,
        beta: f32,
    ) {
        rows::add_scaled_columns(self, x, scale, shift, y, beta);
    }

    fn columns_dot(
        &self,
        a: Mat<'_, Self>,
        b: Mat<'_, Self>,
        divisor: Mat<'_, Self>,
        out: &mut GpuBuf<D>,
    ) {
        rows::columns_dot(self, a, b, divisor, out);
    }

    fn dora_scales(
        &self,
        squares: &GpuBuf<D>,
        b: Mat<'_, Self>,
        c: Mat<'_, Self>,
        magnitude: &GpuBuf<D>,
        norms: MatMut<'_, Self>,
        scales: MatMut<'_, Self>,
    ) {
        rows::dora_scales(self, squares, b, c, magnitude, norms, scales);
    }

    fn rms_norm(
        &self,
        x: &GpuBuf<D>,
        w: &GpuBuf<D>,
        norm: RmsNorm,
        rows_d: (usize, usize),
        y: &mut GpuBuf<D>,
        r: &mut GpuBuf<D>,
    ) {
        norm::rms_norm(self, x, w, norm, rows_d, y, r);
    }

    fn rms_norm_backward(
        &self,
        dy: &GpuBuf<D>,
        x: &GpuBuf<D>,
        w: &GpuBuf<D>,
        norm: RmsNorm,
        r: &GpuBuf<D>,
        rows_d: (usize, usize),
        dx: &mut GpuBuf<D>,
        more: NormMore<'_, Self>,
    ) {
        norm::rms_norm_backward(self, dy, x, w, norm, r, rows_d, dx, more);
    }

    fn group_norm(
        &self,
        x: MatMut<'_, Self>,
        w: &GpuBuf<D>,
        norm: RmsNorm,
        width: usize,
        raw: &mut GpuBuf<D>,
    ) {
        norm::group_norm(self, x, w, norm, width, raw);
    }

    fn group_norm_backward(
        &self,
        dy: MatMut<'_, Self>,
        raw: &GpuBuf<D>,
        w: &GpuBuf<D>,
        norm: RmsNorm,
        width: usize,
        dw: Option<&mut GpuBuf<D>>,
    ) {
        norm::group_norm_backward(self, dy, raw, w, norm, width, dw);
    }

    fn rope(
        &self,
        qkv: &mut GpuBuf<D>,
        heads: Heads,
        rotary: usize,
        positions: &[u32],
        cos_sin: &GpuBuf<D>,
        inverse: bool,
    ) {
        position::rope(self, qkv, heads, rotary, positions, cos_sin, inverse);
    }

    fn swiglu(&self, gate_up: &GpuBuf<D>, rows_i: (usize, usize), h: &mut GpuBuf<D>) {
        glu::swiglu(self, gate_up, rows_i, h);
    }

    fn swiglu_backward(&self, h: &mut GpuBuf<D>, rows_i: (usize, usize), gate_up: &mut GpuBuf<D>) {
        glu::swiglu_backward(self, h, rows_i, gate_up);
    }

    fn geglu(&self, gate_up: &GpuBuf<D>, rows_i: (usize, usize), h: &mut GpuBuf<D>) {
        glu::geglu(self, gate_up, rows_i, h);
    }

    fn geglu_backward(&self, h: &mut GpuBuf<D>, rows_i: (usize, usize), gate_up: &mut GpuBuf<D>) {
        glu::geglu_backward(self, h, rows_i, gate_up);
    }

    fn soft_cap(&self, x: &mut GpuBuf<D>, cap: f32, n: usize) {
        pointwise::soft_cap(self, x, cap, n);
    }

    fn attention(
        &self,
        qkv: &GpuBuf<D>,
        heads: Heads,
        seq_lens: &[usize],
        mask: AttnMask,
        out: &mut GpuBuf<D>,
        lse: &mut GpuBuf<D>,
    ) {
        attention::attention(self, qkv, heads, seq_lens, mask, out, lse);
    }

    fn attention_backward(
        &self,
        dout: &GpuBuf<D>,
        qkv: &GpuBuf<D>,
        out: &GpuBuf<D>,
        lse: &GpuBuf<D>,
        heads: Heads,
        seq_lens: &[usize],
        mask: AttnMask,
        dqkv: &mut GpuBuf<D>,
    ) {
        attention::attention_backward(self, dout, qkv, out, lse, heads, seq_lens, mask, dqkv);
    }

    fn attention_decode(
        &self,
        q: Mat<'_, Self>,
        k_cache: &GpuBuf<D>,
        v_cache: &GpuBuf<D>,
        capacity: usize,
        lens: &[usize],
        heads: Heads,
        mask: AttnMask,
        out: &mut GpuBuf<D>,
    ) {
        attention::attention_decode(self, q, k_cache, v_cache, capacity, lens, heads, mask, out);
    }

    fn cross_entropy(
        &self,
        logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        grad_scale: Option<f32>,
        row_loss: Option<&mut [f32]>,
    ) -> LossSums {
        let options = LossOptions::default();
        self.cross_entropy_with(logits, targets, weights, grad_scale, row_loss, options)
    }

    fn sum_squares(&self, x: &GpuBuf<D>) -> f64 {
        self.sum_squares_part(x, 0..x.len)
    }

    fn adamw(
        &self,
        p: &mut GpuBuf<D>,
        g: &GpuBuf<D>,
        at: usize,
        m: &mut GpuBuf<D>,
        v: &mut GpuBuf<D>,
        update: AdamW,
    ) {
        update::adamw(self, p, g, at, m, v, update);
    }

    fn zero_codes(&self, n: usize) -> GpuCodes<D> {
        GpuCodes { memory: self.device.alloc(n), len: n }
    }

    fn read_codes(&self, codes: &GpuCodes<D>) -> Vec<u8> {
        let mut out = vec![0; codes.len];
        self.device.read(&codes.memory, 0, &mut out);
        out
    }

    fn write_codes(&self, codes: &mut GpuCodes<D>, data: &[u8]) {
        assert_eq!(data.len(), codes.len, "as many codes");
        self.device.write(&mut codes.memory, 0, data);
    }

    fn sum_squares_part(&self, x: &GpuBuf<D>, part: Range<usize>) -> f64 {
        update::sum_squares_part(self, x, part)
    }

    fn axpby(&self, a: f32, x: (&GpuBuf<D>, usize), b: f32, y: (&mut GpuBuf<D>, usize), n: usize) {
        pointwise::axpby(self, a, x, b, y, n);
    }

    fn adamw_8bit(
        &self,
        p: &mut GpuBuf<D>,
        g: &GpuBuf<D>,
        at: usize,
        moments: [(&mut GpuCodes<D>, &mut GpuBuf<D>); 2],
        update: AdamW,
    ) {
        update::adamw_8bit(self, p, g, at, moments, update);
    }

    fn lion(&self, p: &mut GpuBuf<D>, g: &GpuBuf<D>, at: usize, m: &mut GpuBuf<D>, update: Lion) {
        update::lion(self, p, g, at, m, update);
    }

    fn sgd(
        &self,
        p: &mut GpuBuf<D>,
        g: &GpuBuf<D>,
        part: Range<usize>,
        m: Option<&mut GpuBuf<D>>,
        update: Sgd,
    ) {
        update::sgd(self, p, g, part, m, update);
    }

    fn adafactor(
        &self,
        p: &mut GpuBuf<D>,
        g: &GpuBuf<D>,
        at: usize,
        second: SecondMoment<'_, Self>,
        first: Option<&mut GpuBuf<D>>,
        update: Adafactor,
    ) {
        adafactor::adafactor(self, p, g, at, second, first, update);
    }

    fn cross_entropy_with(
        &self,
        logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        grad_scale: Option<f32>,
        row_loss: Option<&mut [f32]>,
        options: LossOptions,
    ) -> LossSums {
        loss::cross_entropy_with(self, logits, targets, weights, grad_scale, row_loss, options)
    }

    fn cross_entropy_into(
        &self,
        logits: MatMut<'_, Self>,
        targets: &[u32],
        weights: &[f32],
        grad: (f32, &mut GpuBuf<D>),
        row_loss: Option<&mut [f32]>,
        options: LossOptions,
    ) -> LossSums {
        loss::cross_entropy_into(self, logits, targets, weights, grad, row_loss, options)
    }

    fn add_noise(
        &self,
        x: &mut GpuBuf<D>,
        d: usize,
        seq_lens: &[usize],
        alpha: f32,
        seed_first: (u64, u64),
    ) {
        pointwise::add_noise(self, x, d, seq_lens, alpha, seed_first);
    }

    fn gather_frozen(&self, weight: &GpuFrozen<D>, ids: &[u32], y: &mut GpuBuf<D>) {
        self.frozen_rows(weight, ids, y);
    }

    fn frozen_bytes(&self, weight: &GpuFrozen<D>) -> u64 {
        self.bytes_of(weight)
    }
}
