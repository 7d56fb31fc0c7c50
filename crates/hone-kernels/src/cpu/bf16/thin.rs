//! Products of two matrices along their rows, one of them a few columns wide: C <- Wt S or St W, sums
//! over tokens. These are the gradients of low-rank factors, dB = dYt u and dA = dut X.
//!
//! Neither factor lies as VDPBF16PS reads it, pairs of tokens side by side. The thin one is packed
//! once. The wide one is read in place, once, and two of its rows are interleaved in registers, which
//! costs as much as loading them: packing it would take longer than the product. Sums of a few
//! hundred tokens are held in registers and added up in f32.
#![cfg(target_arch = "x86_64")]
#![allow(unsafe_code, reason = "vector instructions are unsafe to call without a proof")]

use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::super::turn;
use super::dot::{Avx512Bf16, Ends, pack_groups, room, write};
use super::packed::{GROUP, Pairs};
use super::pairs::{bf16_lanes, line};
use super::{Factor, Place, Values};

/// Most columns of the thin factor: for more of them packing the wide one pays.
pub(super) const THIN_MAX: usize = 64;

/// Columns of the wide factor that are multiplied at a time: two vectors of sums.
const COLS: usize = 2 * GROUP;

/// Such columns that make a task.
const TASK_COLS: usize = 2 * COLS;

/// Columns of the thin factor whose sums are held in registers at once.
const LANES: usize = 8;

/// Tokens whose sums are added up in registers: so much of the wide factor's columns stays in the
/// nearest cache while the thin one's are gone through.
const RUN: usize = 256;

thread_local! {
    /// The thin factor, kept from call to call.
    static THIN: Cell<Vec<Pairs>> = Cell::default();
}

/// Whether `product` takes these factors.
pub(super) fn takes((m, n): (usize, usize), a: Factor<'_>, b: Factor<'_>) -> bool {
    let (thin, wide) = (m.min(n), m.max(n));
    let along_rows = a.lane_stride == 1 && a.depth_stride > 1 && b.lane_stride == 1;
    along_rows && b.depth_stride > 1 && thin <= THIN_MAX && wide >= 2 * thin
}

/// `C (m, n) <- alpha A (m, k) B (k, n) + beta C`; see [`takes`]. The caller has checked all sides.
pub(super) fn product(
    _: Avx512Bf16,
    (m, n, k): (usize, usize, usize),
    (a, b): (Factor<'_>, Factor<'_>),
    (alpha, beta): (f32, f32),
    c: Place,
) {
    let is_turned = m > n;
    let (wide, thin) = if is_turned { (a, b) } else { (b, a) };
    let (n_wide, n_thin) = (m.max(n), m.min(n));
    let pitch = k.div_ceil(2);
    // Taken, not borrowed, so that nothing depends on what a thread does in between.
    let mut packed = THIN.take();
    let packed_thin = room(&mut packed, n_thin.div_ceil(GROUP) * pitch);
    // SAFETY: the first argument proves that the machine has the instructions.
    unsafe { pack_groups(thin, 0..n_thin, 0..k, packed_thin) };
    let ends = Ends { alpha, old: c, beta, to: c, streams: false };
    let job = Job { wide, k, thin: packed_thin, n_thin, is_turned, ends };
    let tasks = (0..n_wide.div_ceil(TASK_COLS)).into_par_iter();
    tasks.for_each(|task| {
        let cols = task * TASK_COLS..n_wide.min((task + 1) * TASK_COLS);
        for start in cols.clone().step_by(COLS) {
            // SAFETY: as above.
            unsafe { job.columns(start..cols.end.min(start + COLS)) };
        }
    });
    THIN.set(packed);
}

/// Adds the products of two tokens: of [`COLS`] columns of the wide factor, and of [`LANES`] columns of
/// the thin one from `lane` on.
#[inline]
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn add_pairs(
    sums: &mut Sums,
    (lower, upper): (__m512i, __m512i),
    Pairs(pairs): &Pairs,
    lane: usize,
) {
    let low = bf16_lanes(_mm512_unpacklo_epi16(lower, upper));
    let high = bf16_lanes(_mm512_unpackhi_epi16(lower, upper));
    for (sums, &pair) in sums.iter_mut().zip(&pairs[lane..lane + LANES]) {
        let pair = bf16_lanes(_mm512_set1_epi32(pair as i32));
        sums[0] = _mm512_dpbf16_ps(sums[0], low, pair);
        sums[1] = _mm512_dpbf16_ps(sums[1], high, pair);
    }
}

/// The sums of whole lines of bf16, two tokens a pair of the thin factor; the first token's is at the
/// start of the values. Asks for so many tokens for each two, from `next` on.
#[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
fn whole<const N_ASKED: usize>(
    (values, stride): (&[bf16], usize),
    (pairs, lane): (&[Pairs], usize),
    next: *const bf16,
) -> Sums {
    let mut sums = [[_mm512_setzero_ps(); 2]; LANES];
    // What the unchecked reads below rely on.
    assert!(pairs.is_empty() || (2 * pairs.len() - 1) * stride + COLS <= values.len());
    assert!(lane + LANES <= GROUP);
    let (mut at, mut next) = (values.as_ptr(), next);
    for pairs in pairs {
        // SAFETY: the lines of both tokens, see above; what is asked for may be any address.
        let lines = unsafe {
            for token in 0..N_ASKED {
                _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(token * stride).cast());
            }
            let upper = at.wrapping_add(stride);
            (_mm512_loadu_si512(at.cast()), _mm512_loadu_si512(upper.cast()))
        };
        add_pairs(&mut sums, lines, pairs, lane);
        at = at.wrapping_add(2 * stride);
        next = next.wrapping_add(2 * stride);
    }
    sums
}

/// What a product is made of.
struct Job<'a> {
    wide: Factor<'a>,
    /// Its tokens.
    k: usize,
    /// Groups of 16 columns of the thin factor, pairs of tokens one after the other.
    thin: &'a [Pairs],
    n_thin: usize,
    /// Whether the wide factor's columns are rows of the result.
    is_turned: bool,
    ends: Ends,
}

/// Sums of a few columns of the thin factor with two vectors of the wide one's.
type Sums = [[__m512; 2]; LANES];

impl Job<'_> {
    /// At most [`COLS`] columns of the wide factor, with all of the thin one.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
    fn columns(&self, cols: Range<usize>) {
        let zero = [[_mm512_setzero_ps(); 2]; LANES];
        let mut totals = [zero; THIN_MAX / LANES];
        let n_parts = self.n_thin.div_ceil(LANES);
        for start in (0..self.k).step_by(RUN) {
            let run = start..self.k.min(start + RUN);
            for (part, total) in totals[..n_parts].iter_mut().enumerate() {
                let sums = self.run(cols.clone(), run.clone(), part);
                for (total, sums) in total.iter_mut().zip(sums) {
                    total[0] = _mm512_add_ps(total[0], sums[0]);
                    total[1] = _mm512_add_ps(total[1], sums[1]);
                }
            }
        }
        for pair in 0..n_parts.div_ceil(2) {
            self.finish(cols.clone(), pair * 2 * LANES, [totals[2 * pair], totals[2 * pair + 1]]);
        }
    }

    /// The sums of a run of tokens for one part of the thin factor.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
    fn run(&self, cols: Range<usize>, run: Range<usize>, part: usize) -> Sums {
        let first = part / 2 * self.k.div_ceil(2) + run.start / 2;
        let pairs = &self.thin[first..first + run.len().div_ceil(2)];
        let lane = part % 2 * LANES;
        if let Values::Bf16(values) = self.wide.values
            && cols.len() == COLS
            && run.len().is_multiple_of(2)
        {
            // The next run of the same columns, or the first of the next ones, comes in meanwhile: a
            // line a token, of which the first two parts ask for one each.
            let n_asked = match (self.n_thin > LANES, part) {
                (false, _) => 2,
                (true, 0 | 1) => 1,
                (true, _) => 0,
            };
            let stride = self.wide.depth_stride;
            let next = if run.end < self.k { run.end * stride + cols.start } else { cols.end };
            let next = values.as_ptr().wrapping_add(next + part % 2 * stride);
            let values = &values[run.start * stride + cols.start..];
            return match n_asked {
                0 => whole::<0>((values, stride), (pairs, lane), next),
                1 => whole::<1>((values, stride), (pairs, lane), next),
                _ => whole::<2>((values, stride), (pairs, lane), next),
            };
        }
        let (x, n, stride) = (self.wide, cols.len(), self.wide.depth_stride);
        let mut sums = [[_mm512_setzero_ps(); 2]; LANES];
        for (pairs, token) in pairs.iter().zip(run.clone().step_by(2)) {
            let at = token * stride + cols.start;
            let lower = line(x.values, at, n);
            let upper = if token + 1 < run.end {
                line(x.values, at + stride, n)
            } else {
                _mm512_setzero_si512()
            };
            add_pairs(&mut sums, (lower, upper), pairs, lane);
        }
        sums
    }

    /// Adds the sums of 16 columns of the thin factor, from `lane` on, to the result.
    #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16")]
    fn finish(&self, cols: Range<usize>, lane: usize, totals: [Sums; 2]) {
        let lanes = lane..self.n_thin.min(lane + 2 * LANES);
        // Quarter by quarter, rows were interleaved by four columns.
        let order = |half: i32| {
            let at = |i: i32| 8 * half + i % 4 + i / 4 % 2 * 16 + i / 8 * 4;
            let at: [i32; GROUP] = [
                at(0),
                at(1),
                at(2),
                at(3),
                at(4),
                at(5),
                at(6),
                at(7),
                at(8),
                at(9),
                at(10),
                at(11),
                at(12),
                at(13),
                at(14),
                at(15),
            ];
            // SAFETY: two names for 512 bits.
            unsafe { std::mem::transmute::<[i32; GROUP], __m512i>(at) }
        };
        for half in 0..2 {
            let start = cols.start + half * GROUP;
            if start >= cols.end {
                break;
            }
            let part = start..cols.end.min(start + GROUP);
            let order = order(half as i32);
            let mut square = [_mm512_setzero_ps(); GROUP];
            for (i, sums) in totals.iter().flatten().enumerate() {
                square[i] = _mm512_permutex2var_ps(sums[0], order, sums[1]);
            }
            if self.is_turned {
                turn::square(&mut square);
                for (row, sums) in part.zip(square) {
                    write(row, lanes.clone(), sums, self.ends);
                }
            } else {
                for (row, sums) in lanes.clone().zip(square) {
                    write(row, part.clone(), sums, self.ends);
                }
            }
        }
    }
}
