//! Rotary positions; `kernels/position.cu`.

use super::{Device, Gpu, GpuBuf, over_packs};
use crate::Heads;
use crate::shape::check_rotary;

pub(super) fn rope<D: Device>(
    gpu: &Gpu<D>,
    qkv: &mut GpuBuf<D>,
    heads: Heads,
    rotary: usize,
    positions: &[u32],
    cos_sin: &GpuBuf<D>,
    inverse: bool,
) {
    check_rotary(heads, rotary);
    let (tokens, width, half) = (positions.len(), heads.qkv_width(), rotary / 2);
    let Some(&last) = positions.iter().max() else { return };
    if half == 0 {
        return;
    }
    let turned = heads.n_q + heads.n_kv;
    let at = gpu.put_u32(positions);
    let args = [
        qkv.first(tokens * width),
        at.arg(),
        cos_sin.first_f32((last as usize + 1) * rotary),
        (if inverse { -1.0_f32 } else { 1.0 }).into(),
        tokens.into(),
        width.into(),
        turned.into(),
        heads.dim.into(),
        half.into(),
    ];
    gpu.launch("rope", &[qkv.holds], over_packs(tokens * turned * half), &args);
}
