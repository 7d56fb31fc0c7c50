//! Rotary positions; `kernels/position.cu`.

use super::{Device, Gpu, GpuBuf, blocks};
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
    let (width, n_heads) = (heads.qkv_width(), heads.n_q + heads.n_kv);
    let last = positions.iter().max().map_or(0, |&p| p as usize + 1);
    let int = |n: usize| i32::try_from(n).expect("a row has fewer than 2^31 values");
    let places = gpu.put_u32(positions);
    let args = [
        qkv.first(positions.len() * width),
        width.into(),
        int(n_heads).into(),
        int(heads.dim).into(),
        int(rotary).into(),
        places.arg(),
        cos_sin.first_f32(last * rotary),
        (if inverse { -1.0_f32 } else { 1.0 }).into(),
    ];
    gpu.launch("rope", &[qkv.holds], blocks(positions.len()), &args);
}
