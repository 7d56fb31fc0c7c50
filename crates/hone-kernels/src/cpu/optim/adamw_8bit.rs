//! AdamW with moments of 8 bits.

use rayon::prelude::*;

use crate::cpu::loss::Rates;
use crate::cpu::par::TASK_VALUES;
use crate::cpu::simd::{Level, simd_fn};
use crate::{AdamW, CODE_BLOCK, CodeBook};

/// Least divisor of a block: below it a block counts as zeros.
const MAX_MIN: f32 = 1e-38;

simd_fn! {
    /// A block's values of its codes.
    fn decode<_s>(codes: &[u8], max: f32, book: &CodeBook, x: &mut [f32]) {
        x.iter_mut().zip(codes).for_each(|(x, &code)| *x = book.values[usize::from(code)] * max);
    }
}

simd_fn! {
    /// Codes of a block's values; returns its largest magnitude.
    fn encode<_s>(x: &[f32], book: &CodeBook, codes: &mut [u8]) -> f32 {
        let max = x.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let factor = 1.0 / max.max(MAX_MIN);
        for (code, x) in codes.iter_mut().zip(x) {
            *code = book.code((x * factor).clamp(-1.0, 1.0));
        }
        max
    }
}

simd_fn! {
    /// The step itself, as [`crate::cpu::loss`] has it but for the order of the first moment.
    fn step<_s>(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], b1: f32, r: Rates) {
        for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * r.grad_scale;
            *m = *m * b1 + r.first * g;
            *v = *v * r.beta2 + r.second * (g * g);
            let denominator = v.sqrt() / r.root_scale + r.eps;
            *p = *p * r.keep - r.step_size * (*m / denominator);
        }
    }
}

/// See [`crate::Backend::adamw_8bit`].
pub(in crate::cpu) fn adamw_8bit(
    level: Level,
    p: &mut [f32],
    g: &[f32],
    [(m_codes, m_max), (v_codes, v_max)]: [(&mut [u8], &mut [f32]); 2],
    update: AdamW,
) {
    let (rates, beta1) = (Rates::new(update), update.beta1 as f32);
    let (signed, unsigned) = (CodeBook::signed(), CodeBook::unsigned());
    let n_blocks = TASK_VALUES / CODE_BLOCK;
    p.par_chunks_mut(TASK_VALUES)
        .zip(g.par_chunks(TASK_VALUES))
        .zip(m_codes.par_chunks_mut(TASK_VALUES).zip(m_max.par_chunks_mut(n_blocks)))
        .zip(v_codes.par_chunks_mut(TASK_VALUES).zip(v_max.par_chunks_mut(n_blocks)))
        .for_each(|(((p, g), (m_codes, m_max)), (v_codes, v_max))| {
            let (mut m, mut v) = ([0.0; CODE_BLOCK], [0.0; CODE_BLOCK]);
            for (block, (m_max, v_max)) in m_max.iter_mut().zip(v_max).enumerate() {
                let start = block * CODE_BLOCK;
                let part = start..p.len().min(start + CODE_BLOCK);
                let (m, v) = (&mut m[..part.len()], &mut v[..part.len()]);
                decode(level, &m_codes[part.clone()], *m_max, signed, m);
                decode(level, &v_codes[part.clone()], *v_max, unsigned, v);
                step(level, &mut p[part.clone()], &g[part.clone()], m, v, beta1, rates);
                *m_max = encode(level, m, signed, &mut m_codes[part.clone()]);
                *v_max = encode(level, v, unsigned, &mut v_codes[part]);
            }
        });
}
