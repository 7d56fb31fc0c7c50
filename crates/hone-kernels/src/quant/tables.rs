//! The code values, and the bounds between them.

use super::CodeBook;

/// NF4: quantiles of a normal distribution, symmetric in number around an exact zero (Dettmers et
/// al. 2023, appendix E).
pub const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// FP4: sign, two bits of exponent and one of mantissa, over the largest value. Codes 0 and 8 are
/// both zero.
pub const FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    0.5,
    2.0 / 12.0,
    0.25,
    0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -0.5,
    -2.0 / 12.0,
    -0.25,
];

/// Codes of [`FP4`] by rising value; of its two zeros, code 0 is taken as the lower.
const FP4_ORDER: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

/// Codes of [`NF4`] by rising value.
const NF4_ORDER: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// The middles between neighbouring code values. A value that lies on one belongs to the lower.
pub(super) struct Bounds {
    middles: [f32; 15],
    order: &'static [u8; 16],
}

/// The bounds of a code book.
pub(super) fn bounds(book: CodeBook) -> Bounds {
    let order = match book {
        CodeBook::Nf4 => &NF4_ORDER,
        CodeBook::Fp4 => &FP4_ORDER,
    };
    let value = |rank: usize| book.values()[usize::from(order[rank])];
    let middles = std::array::from_fn(|rank| (value(rank) + value(rank + 1)) / 2.0);
    Bounds { middles, order }
}

impl Bounds {
    /// The code of a value in -1 ..= 1: the number of middles below it is its rank.
    #[inline]
    pub(super) fn code(&self, x: f32) -> u8 {
        let rank: u8 = self.middles.iter().map(|&middle| u8::from(middle < x)).sum();
        self.order[usize::from(rank)]
    }

    /// The code of zero.
    pub(super) fn zero(&self) -> u8 {
        self.code(0.0)
    }
}

/// Number of code values of the dynamic tree.
pub(super) const DYNAMIC_STEPS: usize = 256;

/// Largest number of exponent bits of the dynamic tree.
const EXPONENTS: i32 = 7;

/// The signed 8-bit dynamic tree (Dettmers 2015), sorted: for each of seven powers of ten the
/// middles of 2^i equal parts of 0.1 ..= 1, positive and negative, then 0 and 1.
pub fn dynamic_map() -> Vec<f32> {
    let mut values = vec![0.0, 1.0];
    for i in 0..EXPONENTS {
        let points = linspace((1 << i) + 1);
        let power = 10_f64.powi(i - EXPONENTS + 1) as f32;
        for pair in points.windows(2) {
            let value = power * ((pair[0] + pair[1]) / 2.0);
            values.extend([value, -value]);
        }
    }
    values.sort_by(f32::total_cmp);
    values
}

/// `n` points from 0.1 to 1 as PyTorch spaces them: from both ends, with fused multiply-adds.
fn linspace(n: usize) -> Vec<f32> {
    let (start, end) = (0.1_f32, 1.0_f32);
    let step = (end - start) / (n - 1) as f32;
    let point = |i: usize| match i < n / 2 {
        true => step.mul_add(i as f32, start),
        false => (-step).mul_add((n - 1 - i) as f32, end),
    };
    (0..n).map(point).collect()
}

/// Number of grid points of [`Nearest`].
const GRID: usize = 1 << 16;

/// The nearest code of the dynamic tree, by way of a grid of 65,536 points over -1 ..= 1, which is
/// what bitsandbytes looks codes up in.
pub(super) struct Nearest {
    codes: Vec<u8>,
}

/// The table of nearest codes of a sorted map.
pub(super) fn dynamic_nearest(map: &[f32]) -> Nearest {
    let middles: Vec<f32> = map.windows(2).map(|pair| 0.5 * (pair[0] + pair[1])).collect();
    let mut code = 0;
    let codes = (0..GRID).map(|i| {
        let value = -1.0 + (2.0 * i as f32) / (GRID - 1) as f32;
        while code < middles.len() && middles[code] < value {
            code += 1;
        }
        code as u8
    });
    Nearest { codes: codes.collect() }
}

impl Nearest {
    /// The code of `x`, which is clamped to -1 ..= 1.
    pub(super) fn code(&self, x: f32) -> u8 {
        let half = (x.clamp(-1.0, 1.0) + 1.0) * 0.5;
        self.codes[half.mul_add((GRID - 1) as f32, 0.5) as usize]
    }
}
