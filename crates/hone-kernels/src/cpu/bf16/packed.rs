//! A frozen weight in bf16, packed once in the order in which products read it.

use half::bf16;
use rayon::prelude::*;

/// Lanes of a group: those of a vector of 512 bits.
pub(super) const GROUP: usize = 16;

/// A pair of bf16 of each lane of a group; the first of the pair in the low half.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct Pairs(pub(super) [u32; GROUP]);

/// A weight (out, in): groups of 16 rows, one after the other; of each group pair after pair along
/// the input, a pair of each row side by side. What is missing in the last group, and at the end of
/// rows of odd length, is zero.
#[derive(Clone, Debug)]
pub(crate) struct PackedHalf {
    pairs: Vec<Pairs>,
    out: usize,
    inp: usize,
}

impl PackedHalf {
    /// Rounds and packs `weight` (out, in), row-major.
    pub(crate) fn new(weight: &[f32], out: usize, inp: usize) -> Self {
        assert_eq!(weight.len(), out * inp);
        let n_pairs = inp.div_ceil(2);
        let mut pairs = vec![Pairs([0; GROUP]); out.div_ceil(GROUP) * n_pairs];
        let rows = weight.par_chunks((GROUP * inp).max(1));
        pairs.par_chunks_mut(n_pairs.max(1)).zip(rows).for_each(|(group, rows)| {
            for (lane, row) in rows.chunks(inp).enumerate() {
                for (to, pair) in group.iter_mut().zip(row.chunks(2)) {
                    let half = |i: usize| pair.get(i).map_or(0, |&x| bf16::from_f32(x).to_bits());
                    to.0[lane] = u32::from(half(0)) | u32::from(half(1)) << 16;
                }
            }
        });
        PackedHalf { pairs, out, inp }
    }

    /// Its rows and columns, (out, in).
    pub(super) fn sides(&self) -> (usize, usize) {
        (self.out, self.inp)
    }

    /// All groups, one after the other.
    pub(super) fn groups(&self) -> &[Pairs] {
        &self.pairs
    }

    /// Vectors of pairs of a group.
    pub(crate) fn n_pairs(&self) -> usize {
        self.inp.div_ceil(2)
    }

    /// Bytes that it takes, with what fills up the last group.
    pub(crate) fn n_bytes(&self) -> usize {
        size_of_val(self.pairs.as_slice())
    }

    /// `to` <- row `row` from column `start` on, which is even.
    pub(crate) fn read_row(&self, row: usize, start: usize, to: &mut [f32]) {
        let fits = row < self.out && start.is_multiple_of(2) && start + to.len() <= self.inp;
        assert!(fits, "{} values from ({row}, {start}) on", to.len());
        let group = &self.pairs[row / GROUP * self.n_pairs() + start / 2..];
        for (to, Pairs(pairs)) in to.chunks_mut(2).zip(group) {
            let pair = pairs[row % GROUP];
            for (to, half) in to.iter_mut().zip([pair as u16, (pair >> 16) as u16]) {
                *to = bf16::from_bits(half).to_f32();
            }
        }
    }

    /// The rounded values, (out, in) row-major.
    pub(crate) fn thaw(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.out * self.inp];
        let rows = values.par_chunks_mut(self.inp.max(1)).enumerate();
        rows.for_each(|(row, to)| self.read_row(row, 0, to));
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng;

    /// Every value is where products look for it, zeros fill up the rest, and the way back is exact.
    #[test]
    fn values_lie_in_pairs_of_sixteen_rows() {
        for (out, inp) in [(1, 1), (16, 2), (17, 3), (33, 64), (5, 131), (40, 0), (0, 7)] {
            let make = |i: usize| match i % 7 {
                // Denormal numbers, infinity and what is no number are kept too.
                0 => 1e-40,
                1 => f32::INFINITY,
                2 => -0.0,
                _ => rng::normal(1, i as u64) as f32,
            };
            let values: Vec<f32> = (0..out * inp).map(make).collect();
            let packed = PackedHalf::new(&values, out, inp);
            assert_eq!(packed.n_bytes(), crate::Compute::Bf16.frozen_bytes(out, inp));
            let value = |row: usize, col: usize| match row < out && col < inp {
                true => bf16::from_f32(values[row * inp + col]).to_bits(),
                false => 0,
            };
            for (i, Pairs(pairs)) in packed.pairs.iter().enumerate() {
                let (group, pair) = (i / packed.n_pairs(), i % packed.n_pairs());
                for (lane, found) in pairs.iter().enumerate() {
                    let wanted = [0, 1].map(|j| value(group * GROUP + lane, 2 * pair + j));
                    assert_eq!([*found as u16, (found >> 16) as u16], wanted, "{out} x {inp}");
                }
            }
            let wanted: Vec<bf16> = values.iter().map(|&x| bf16::from_f32(x)).collect();
            let bits = |x: f32| x.to_bits();
            let thawed = packed.thaw().into_iter().map(bits);
            assert!(thawed.eq(wanted.iter().map(|x| bits(x.to_f32()))), "{out} x {inp}");
        }
    }
}
