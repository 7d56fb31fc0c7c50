//! Groups of a weight of 4 bits, packed as they are multiplied.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code, reason = "vector instructions are unsafe to call without a proof")]

use std::arch::x86_64::*;
use std::ops::Range;

use super::packed::{GROUP, Pairs};
use super::pairs::{store, turn};
use crate::cpu::quant::Stack;
use crate::quant::Quantized;

/// Values of a row that are looked up at once, 16 bytes of codes. Rows are whole multiples of it, so
/// that no more than one block of the quantisation is met.
pub(super) const RUN: usize = 2 * GROUP;

/// `to` <- the rows of a group of a weight whose rows are multiples of [`RUN`], along a run of its columns
/// that starts at such a multiple.
///
/// A code is looked up in the 16 values that it may stand for, scaled and rounded: in one table for
/// the first of a pair, in another for the second, which lies in the upper half.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(super) fn unpack_group(stack: &Stack, group: usize, run: Range<usize>, to: &mut [Pairs]) {
    let first = group * GROUP;
    let n_lanes = (stack.rows() - first).min(GROUP);
    let rows: [(&Quantized, usize); GROUP] =
        std::array::from_fn(|lane| stack.row(first + lane.min(n_lanes - 1)));
    let mut tables = [[_mm512_setzero_si512(); 2]; GROUP];
    for (nth, to) in to.chunks_exact_mut(GROUP).enumerate() {
        let mut square = [_mm512_setzero_si512(); GROUP];
        for (lane, square) in square.iter_mut().enumerate().take(n_lanes) {
            let (part, start) = rows[lane];
            let (spec, at) = (part.spec(), start + run.start + nth * RUN);
            // Sizes of blocks are powers of two.
            if nth == 0 || at & (spec.block - 1) == 0 {
                let absmax = part.absmax(at >> spec.block.trailing_zeros());
                tables[lane] = table(spec.book.values(), absmax);
            }
            let [lower, upper] = tables[lane];
            let codes: &[u8; GROUP] =
                part.codes()[at / 2..][..GROUP].try_into().expect("it is so long");
            // SAFETY: the array is 16 bytes.
            let codes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.as_ptr().cast()) });
            // The first value's code is in the high half of its byte. Of an index four bits are read.
            let first = _mm512_permutexvar_epi32(_mm512_srli_epi32::<4>(codes), lower);
            *square = _mm512_or_si512(first, _mm512_permutexvar_epi32(codes, upper));
        }
        for (to, pairs) in to.iter_mut().zip(turn(square)) {
            store(to, pairs);
        }
    }
}

/// The values of a block's codes as bf16, in the lower halves and in the upper.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn table(book: &[f32; GROUP], absmax: f32) -> [__m512i; 2] {
    // SAFETY: the array is a vector of f32.
    let values = unsafe { _mm512_loadu_ps(book.as_ptr()) };
    let values = _mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(absmax)));
    // SAFETY: two names for 256 bits.
    let lower = _mm512_cvtepu16_epi32(unsafe { std::mem::transmute::<__m256bh, __m256i>(values) });
    [lower, _mm512_slli_epi32::<16>(lower)]
}
