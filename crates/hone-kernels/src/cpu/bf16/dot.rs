//! Products on the dot product of bf16 pairs, VDPBF16PS.
//!
//! Both factors are packed alike: a group of 16 lanes, pair after pair along the depth, a pair of
//! each lane side by side in one cache line ([`Pairs`]). What is missing at the end of the lanes or
//! of a sum of odd length is zero in both factors. A tile of the result is held in registers: each
//! step multiplies vectors of B's pairs by one lane of A's.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code, reason = "vector instructions are unsafe to call without a proof")]

use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;

use half::bf16;

use super::{Block, Factor, Out, Values, runs};

/// Lanes of a group: those of a vector.
const GROUP: usize = 16;

/// Most rows that are multiplied by pairs as they leave the registers in which they were turned: for
/// more, packing B pays.
const FEW: usize = 4;

/// A pair of bf16 of each lane of a group; the first of the pair in the low half.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Pairs([u32; GROUP]);

thread_local! {
    /// A group of A and the block of B, packed; kept from call to call.
    static PACKED: Cell<[Vec<Pairs>; 2]> = Cell::default();
}

/// Proof that the machine has AVX-512 F, VL, BW, DQ and BF16.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512Bf16(());

impl Avx512Bf16 {
    /// The proof, where it is true.
    pub(super) fn detect() -> Option<Self> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bf16");
        has.then_some(Avx512Bf16(()))
    }
}

/// One block of the result, all of its sums; see [`super::product`].
pub(super) fn block(_: Avx512Bf16, block: Block, k: usize, a: Factor<'_>, b: Factor<'_>, out: Out) {
    // Taken, not borrowed, so that nothing depends on what a thread does in between.
    let mut packed = PACKED.take();
    for (nth, run) in runs(k).enumerate() {
        let beta = if nth == 0 { block.beta } else { 1.0 };
        // SAFETY: the first argument proves that the machine has the instructions.
        unsafe { add_run(&Block { beta, ..block.again() }, run, a, b, out, &mut packed) };
    }
    PACKED.set(packed);
}

impl Block {
    /// The same block.
    fn again(&self) -> Block {
        Block { rows: self.rows.clone(), cols: self.cols.clone(), ..*self }
    }
}

/// Adds one run of the sums to a block of the result.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn add_run(
    block: &Block,
    run: Range<usize>,
    a: Factor<'_>,
    b: Factor<'_>,
    out: Out,
    [a_packed, b_packed]: &mut [Vec<Pairs>; 2],
) {
    let n_pairs = run.len().div_ceil(2);
    let n_groups = block.cols.len().div_ceil(GROUP);
    a_packed.resize(n_pairs.max(a_packed.len()), Pairs([0; GROUP]));
    if block.rows.len() <= FEW && b.depth_stride == 1 {
        let a_packed = &mut a_packed[..n_pairs];
        pack(a, block.rows.clone(), 0..0, run.clone(), a_packed);
        return match block.rows.len() {
            1 => few::<1>(block, run, a_packed, b, out),
            _ => few::<FEW>(block, run, a_packed, b, out),
        };
    }
    b_packed.resize((n_groups * n_pairs).max(b_packed.len()), Pairs([0; GROUP]));
    for group in 0..n_groups {
        let start = block.cols.start + group * GROUP;
        let lanes = start..block.cols.end.min(start + GROUP);
        let next = lanes.end..block.cols.end.min(lanes.end + GROUP);
        pack(b, lanes, next, run.clone(), &mut b_packed[group * n_pairs..][..n_pairs]);
    }
    for start in block.rows.clone().step_by(GROUP) {
        let rows = start..block.rows.end.min(start + GROUP);
        let next = rows.end..block.rows.end.min(rows.end + GROUP);
        pack(a, rows.clone(), next, run.clone(), &mut a_packed[..n_pairs]);
        multiply(block, rows, &a_packed[..n_pairs], b_packed, out);
    }
}

/// At most `ROWS` rows times all of a block's columns, without packing them; sums are added up in
/// the same order as in [`tile`].
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn few<const ROWS: usize>(block: &Block, run: Range<usize>, a: &[Pairs], b: Factor<'_>, out: Out) {
    for start in block.cols.clone().step_by(GROUP) {
        let cols = start..block.cols.end.min(start + GROUP);
        let mut sums = [_mm512_setzero_ps(); ROWS];
        for (a, l) in a.chunks(GROUP).zip(run.clone().step_by(2 * GROUP)) {
            let part = l..run.end.min(l + 2 * GROUP);
            ask_for(b, cols.end..block.cols.end.min(cols.end + GROUP), part.clone());
            let square = square(b, cols.clone(), part);
            for (Pairs(left), right) in a.iter().zip(square) {
                for (sum, &left) in sums.iter_mut().zip(left) {
                    let left = bf16_lanes(_mm512_set1_epi32(left as i32));
                    *sum = _mm512_dpbf16_ps(*sum, bf16_lanes(right), left);
                }
            }
        }
        for (row, sum) in block.rows.clone().zip(sums) {
            write(block, row, cols.clone(), sum, out);
        }
    }
}

/// A group of rows times all of a block's columns.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn multiply(block: &Block, rows: Range<usize>, a: &[Pairs], b: &[Pairs], out: Out) {
    let n_pairs = a.len();
    let n_groups = block.cols.len().div_ceil(GROUP);
    let half = rows.start + rows.len().min(GROUP / 2);
    let mut group = 0;
    while group < n_groups {
        let b = &b[group * n_pairs..];
        let from = block.cols.start + group * GROUP;
        // Sums in enough registers to hide the latency of an addition, and few enough to have them.
        let vecs = (n_groups - group).min(3);
        let cols = from..block.cols.end.min(from + vecs * GROUP);
        let (upper, lower) = (rows.start..half, half..rows.end);
        match vecs {
            1 => tile::<GROUP, 1, 0>(block, rows.clone(), cols, a, b, out),
            2 => {
                tile::<8, 2, 0>(block, upper, cols.clone(), a, b, out);
                tile::<8, 2, 8>(block, lower, cols, a, b, out);
            }
            _ => {
                tile::<8, 3, 0>(block, upper, cols.clone(), a, b, out);
                tile::<8, 3, 8>(block, lower, cols, a, b, out);
            }
        }
        group += vecs;
    }
}

/// A tile of at most `ROWS` rows, from lane `LANE` of the group `a` on, and `VECS` vectors of
/// columns.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn tile<const ROWS: usize, const VECS: usize, const LANE: usize>(
    block: &Block,
    rows: Range<usize>,
    cols: Range<usize>,
    a: &[Pairs],
    b: &[Pairs],
    out: Out,
) {
    if rows.is_empty() {
        return;
    }
    let n_pairs = a.len();
    // What the unchecked reads below rely on.
    assert!(LANE + ROWS <= GROUP && VECS * n_pairs <= b.len());
    let mut sums = [[_mm512_setzero_ps(); VECS]; ROWS];
    for p in 0..n_pairs {
        let mut right = [_mm512_setzero_si512(); VECS];
        for (v, right) in right.iter_mut().enumerate() {
            // SAFETY: v < VECS and p < n_pairs, for which the length was checked.
            *right = load(unsafe { b.get_unchecked(v * n_pairs + p) });
        }
        // SAFETY: p < n_pairs, the length of `a`.
        let left = unsafe { &a.get_unchecked(p).0 };
        for (r, sums) in sums.iter_mut().enumerate() {
            let left = _mm512_set1_epi32(left[LANE + r] as i32);
            for (sum, &right) in sums.iter_mut().zip(&right) {
                *sum = _mm512_dpbf16_ps(*sum, bf16_lanes(right), bf16_lanes(left));
            }
        }
    }
    for (row, sums) in rows.zip(&sums) {
        for (v, &sum) in sums.iter().enumerate() {
            let start = cols.start + v * GROUP;
            write(block, row, start..cols.end.min(start + GROUP), sum, out);
        }
    }
}

/// Adds sums to at most 16 columns of a row of the result.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn write(block: &Block, row: usize, cols: Range<usize>, sum: __m512, out: Out) {
    let mask = first(cols.len()) as u16;
    let at = out.start.at(row * out.stride + cols.start);
    let sum = _mm512_mul_ps(sum, _mm512_set1_ps(block.alpha));
    // SAFETY: `product` has checked that C holds the block, of which these are columns of a row; no
    // other task touches it.
    unsafe {
        let sum = if block.beta == 0.0 {
            sum
        } else {
            let old = _mm512_maskz_loadu_ps(mask, at);
            _mm512_fmadd_ps(old, _mm512_set1_ps(block.beta), sum)
        };
        _mm512_mask_storeu_ps(at, mask, sum);
    }
}

/// Lanes of a factor along a run, packed; `to` has a place for each pair. The lanes `next` are on
/// their way from memory meanwhile.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn pack(
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

/// Asks for what [`square`] will read of these lanes along a run. It reads a cache line of each of
/// many rows before it comes to the next line of any, which no processor sees coming.
#[inline]
#[target_feature(enable = "avx512f")]
fn ask_for(x: Factor<'_>, lanes: Range<usize>, run: Range<usize>) {
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
fn square(x: Factor<'_>, lanes: Range<usize>, run: Range<usize>) -> [__m512i; GROUP] {
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
fn line(values: Values<'_>, at: usize, n: usize) -> __m512i {
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

/// The mask of the first `n` of 32 lanes.
#[inline]
fn first(n: usize) -> u32 {
    if n >= 32 { u32::MAX } else { (1 << n) - 1 }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(from: &Pairs) -> __m512i {
    // SAFETY: the array is 64 bytes, aligned to them.
    unsafe { _mm512_load_si512((from as *const Pairs).cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(to: &mut Pairs, pairs: __m512i) {
    // SAFETY: the array is 64 bytes, aligned to them.
    unsafe { _mm512_store_si512((to as *mut Pairs).cast(), pairs) }
}

#[inline]
fn bf16_lanes(x: __m512i) -> __m512bh {
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

/// The transpose of a square of 32-bit values.
#[inline]
#[target_feature(enable = "avx512f")]
fn turn(x: [__m512i; GROUP]) -> [__m512i; GROUP] {
    let mut two = x;
    for i in (0..GROUP).step_by(2) {
        two[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        two[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    // Afterwards quarter q of `four[4 i + j]` is column 4 q + j of rows 4 i to 4 i + 3.
    let mut four = two;
    for i in (0..GROUP).step_by(4) {
        four[i] = _mm512_unpacklo_epi64(two[i], two[i + 2]);
        four[i + 1] = _mm512_unpackhi_epi64(two[i], two[i + 2]);
        four[i + 2] = _mm512_unpacklo_epi64(two[i + 1], two[i + 3]);
        four[i + 3] = _mm512_unpackhi_epi64(two[i + 1], two[i + 3]);
    }
    let mut turned = four;
    for j in 0..4 {
        const EVEN: i32 = 0b10_00_10_00;
        const ODD: i32 = 0b11_01_11_01;
        let [a, b, c, d] = [four[j], four[j + 4], four[j + 8], four[j + 12]];
        let even = [_mm512_shuffle_i32x4::<EVEN>(a, b), _mm512_shuffle_i32x4::<EVEN>(c, d)];
        let odd = [_mm512_shuffle_i32x4::<ODD>(a, b), _mm512_shuffle_i32x4::<ODD>(c, d)];
        turned[j] = _mm512_shuffle_i32x4::<EVEN>(even[0], even[1]);
        turned[j + 4] = _mm512_shuffle_i32x4::<EVEN>(odd[0], odd[1]);
        turned[j + 8] = _mm512_shuffle_i32x4::<ODD>(even[0], even[1]);
        turned[j + 12] = _mm512_shuffle_i32x4::<ODD>(odd[0], odd[1]);
    }
    turned
}
