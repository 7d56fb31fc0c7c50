//! Factors packed for the dot product of bf16 pairs, and the vectors that this takes.
//!
//! A group of 16 lanes, pair after pair along the depth, a pair of each lane side by side in one
//! cache line ([`Pairs`]). What is missing at the end of the lanes or of a sum of odd length is
//! zero.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code, reason = "vector instructions are unsafe to call without a proof")]

use std::arch::x86_64::*;
use std::ops::Range;

use half::bf16;

use super::super::turn;
use super::packed::{GROUP, Pairs};
use super::{Factor, Values};

/// Lanes of a factor along a run, packed; `to` has a place for each pair. The lanes `next` are on
/// their way from memory meanwhile.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(super) fn pack(
    x: Factor<'_>,
    lanes: Range<usize>,
    next: Range<usize>,
    run: Range<usize>,
    to: &mut [Pairs],
) {
    for (to, l) in to.chunks_mut(GROUP).zip(run.clone().step_by(2 * GROUP)) {
        let part = l..run.end.min(l + 2 * GROUP);
        ask_for(x, next.clone(), part.clone());
        let square = square(x, lanes.clone(), part);
        for (to, pairs) in to.iter_mut().zip(square) {
            store(to, pairs);
        }
    }
}

/// Rows of a factor along a run, a row's pairs side by side, times `scale`; a row takes whole vectors
/// of `to`.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(super) fn rows_to_pairs(
    x: Factor<'_>,
    rows: Range<usize>,
    run: Range<usize>,
    scale: f32,
    to: &mut [Pairs],
) {
    let pitch = run.len().div_ceil(2 * GROUP);
    for (row, to) in rows.zip(to.chunks_mut(pitch.max(1))) {
        for (to, l) in to.iter_mut().zip(run.clone().step_by(2 * GROUP)) {
            let n = (run.end - l).min(2 * GROUP);
            store(to, scaled_line(x.values, row * x.lane_stride + l, n, scale));
        }
    }
}

/// At most 16 columns of a weight that is packed in groups of `pitch` pairs, each with 16 of its rows:
/// the columns' pairs along the rows. Both counts start with the groups.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(super) fn pack_turned(groups: &[Pairs], pitch: usize, column: usize, to: &mut [Pairs]) {
    assert!(column.is_multiple_of(GROUP));
    let pairs = column / 2..pitch.min(column / 2 + GROUP / 2);
    for (i, (to, group)) in to.chunks_mut(GROUP / 2).zip(groups.chunks_exact(pitch)).enumerate() {
        let mut vectors = [_mm512_setzero_si512(); GROUP / 2];
        let next = (i + AHEAD) * pitch + pairs.start;
        for (p, vector) in vectors.iter_mut().enumerate() {
            // An address is named, and nothing read: it may be any.
            _mm_prefetch::<_MM_HINT_T0>(groups.as_ptr().wrapping_add(next + p).cast());
            if let Some(pairs) = group.get(pairs.start + p) {
                *vector = load(pairs);
            }
        }
        let turned = turn_pairs(vectors);
        for (to, vector) in to.iter_mut().zip(turned) {
            store(to, vector);
        }
    }
}

/// Groups of a weight that are on their way from memory while one is turned: each lies further off
/// than a processor looks ahead.
const AHEAD: usize = 6;

/// Pairs along the input of 16 rows, made pairs of rows: vector p holds columns 2 p and 2 p + 1 of
/// each row before, and vector j rows 2 j and 2 j + 1 of each of 16 columns afterwards.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn turn_pairs(x: [__m512i; GROUP / 2]) -> [__m512i; GROUP / 2] {
    // The squares of two rows and two columns, 64 bits each, are turned by themselves; then the
    // matrix of squares is.
    const ORDER: i64 = 0x0706_0302_0504_0100;
    let order = _mm512_set4_epi64(
        ORDER + 0x0808_0808_0808_0808,
        ORDER,
        ORDER + 0x0808_0808_0808_0808,
        ORDER,
    );
    let (mut even, mut odd) = ([_mm512_setzero_ps(); 4], [_mm512_setzero_ps(); 4]);
    for k in 0..4 {
        let first = _mm512_shuffle_epi8(x[2 * k], order);
        let second = _mm512_shuffle_epi8(x[2 * k + 1], order);
        even[k] = _mm512_castsi512_ps(_mm512_unpacklo_epi64(first, second));
        odd[k] = _mm512_castsi512_ps(_mm512_unpackhi_epi64(first, second));
    }
    let (even, odd) = (turn::quarters(even), turn::quarters(odd));
    let mut turned = x;
    for k in 0..4 {
        turned[2 * k] = _mm512_castps_si512(even[k]);
        turned[2 * k + 1] = _mm512_castps_si512(odd[k]);
    }
    turned
}

/// Asks for what [`square`] will read of these lanes along a run. It reads a cache line of each of
/// many rows before it comes to the next line of any, which no processor sees coming.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn ask_for(x: Factor<'_>, lanes: Range<usize>, run: Range<usize>) {
    if lanes.is_empty() {
        return;
    }
    let (lines, first, stride, n) = if x.depth_stride == 1 {
        (lanes, run.start, x.lane_stride, 2 * GROUP)
    } else {
        (run, lanes.start, x.depth_stride, GROUP)
    };
    for at in lines.map(|line| line * stride + first) {
        // An address is named, and nothing read: it may be any.
        match x.values {
            Values::F32(values) => {
                let from: *const i8 = values.as_ptr().wrapping_add(at).cast();
                _mm_prefetch::<_MM_HINT_T1>(from);
                if n > GROUP {
                    _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(size_of::<Pairs>()));
                }
            }
            Values::Bf16(values) => {
                _mm_prefetch::<_MM_HINT_T1>(values.as_ptr().wrapping_add(at).cast());
            }
        }
    }
}

/// At most 16 lanes of a factor along at most 32 values, pair by pair.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(super) fn square(x: Factor<'_>, lanes: Range<usize>, run: Range<usize>) -> [__m512i; GROUP] {
    let mut square = [_mm512_setzero_si512(); GROUP];
    if x.depth_stride == 1 {
        // The values of a lane lie side by side: 16 pairs of each of 16 lanes, to be turned.
        for (square, lane) in square.iter_mut().zip(lanes) {
            *square = line(x.values, lane * x.lane_stride + run.start, run.len());
        }
        return turn(square);
    }
    // Two neighbours along the depth are two rows here, to be interleaved.
    let order = interleaving();
    for (square, l) in square.iter_mut().zip(run.clone().step_by(2)) {
        let at = l * x.depth_stride + lanes.start;
        let lower = line(x.values, at, lanes.len());
        let upper = if l + 1 < run.end {
            line(x.values, at + x.depth_stride, lanes.len())
        } else {
            _mm512_setzero_si512()
        };
        let both = _mm512_inserti64x4::<1>(lower, _mm512_castsi512_si256(upper));
        *square = _mm512_permutexvar_epi16(order, both);
    }
    square
}

/// At most 32 values from `at` on as bf16, zeros behind them.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
pub(super) fn line(values: Values<'_>, at: usize, n: usize) -> __m512i {
    let mask = first(n);
    match values {
        Values::F32(values) => {
            let values: &[f32] = &values[at..at + n];
            // SAFETY: the masks keep to the slice; where its second half is empty the mask is, too,
            // and the pointer, which nothing reads, may lie behind it.
            let [low, high] = unsafe {
                let from = values.as_ptr();
                [
                    _mm512_maskz_loadu_ps(mask as u16, from),
                    _mm512_maskz_loadu_ps((mask >> GROUP) as u16, from.wrapping_add(GROUP)),
                ]
            };
            integer_lanes(_mm512_cvtne2ps_pbh(high, low))
        }
        Values::Bf16(values) => {
            let values: &[bf16] = &values[at..at + n];
            // SAFETY: the mask keeps to the slice, and a bf16 is its 16 bits.
            unsafe { _mm512_maskz_loadu_epi16(mask, values.as_ptr().cast()) }
        }
    }
}

/// [`line`] times `scale`, which is rounded after.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn scaled_line(values: Values<'_>, at: usize, n: usize, scale: f32) -> __m512i {
    if scale == 1.0 {
        return line(values, at, n);
    }
    let mut scaled = [0.0; 2 * GROUP];
    match values {
        Values::F32(values) => {
            scaled.iter_mut().zip(&values[at..at + n]).for_each(|(to, x)| *to = x * scale);
        }
        Values::Bf16(values) => {
            let values = scaled.iter_mut().zip(&values[at..at + n]);
            values.for_each(|(to, x)| *to = x.to_f32() * scale);
        }
    }
    line(Values::F32(&scaled), 0, 2 * GROUP)
}

/// The mask of the first `n` of 32 lanes.
#[inline]
pub(super) fn first(n: usize) -> u32 {
    if n >= 32 { u32::MAX } else { (1 << n) - 1 }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn load(from: &Pairs) -> __m512i {
    // SAFETY: the array is 64 bytes, aligned to them.
    unsafe { _mm512_load_si512((from as *const Pairs).cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn store(to: &mut Pairs, pairs: __m512i) {
    // SAFETY: the array is 64 bytes, aligned to them.
    unsafe { _mm512_store_si512((to as *mut Pairs).cast(), pairs) }
}

#[inline]
pub(super) fn bf16_lanes(x: __m512i) -> __m512bh {
    // SAFETY: two names for 512 bits.
    unsafe { std::mem::transmute(x) }
}

#[inline]
fn integer_lanes(x: __m512bh) -> __m512i {
    // SAFETY: two names for 512 bits.
    unsafe { std::mem::transmute(x) }
}

/// Indices that lay value i of the lower half beside value i of the upper.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn interleaving() -> __m512i {
    let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * GROUP) as u16);
    // SAFETY: two names for 512 bits.
    unsafe { std::mem::transmute(order) }
}

/// The transpose of a square of 32-bit values. (In loops: what `map` of an array calls has no vector
/// instructions, so that each vector would go through memory.)
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn turn(x: [__m512i; GROUP]) -> [__m512i; GROUP] {
    let mut square = [_mm512_setzero_ps(); GROUP];
    for (to, x) in square.iter_mut().zip(x) {
        *to = _mm512_castsi512_ps(x);
    }
    turn::square(&mut square);
    let mut turned = x;
    for (to, x) in turned.iter_mut().zip(square) {
        *to = _mm512_castps_si512(x);
    }
    turned
}
